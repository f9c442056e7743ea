"""Rows for answers that are mappings: nothing merges but the sampled token, and everything comes back."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stillroom.errors import StillroomError
from stillroom.schema.records import Capture
from teacher_cache.engine.plugin.batch import mapped_rows
from teacher_cache.engine.plugin.signals import Rows, signal_rows
from teacher_cache.engine.row_layout import MAPPED, MAPPED_MARK, Layout, UnmarkedRows, capture_of_rows

LAYOUTS = [Layout(8, 8), Layout(1, 1), Layout(5, 0, (0.5, 2.0)), Layout(64, 3, (2.0,)), Layout(40)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def both_forms(logits_NV: Tensor, sampled_N: Tensor, layout: Layout) -> tuple[Rows, Rows]:
    """Rows for this process, and those for mappings."""
    num = len(logits_NV)
    rows = signal_rows(logits_NV, sampled_N, layout, torch.arange(num), torch.arange(num) * 3)
    return rows, mapped_rows(rows, dataclasses.replace(layout, mapped=True))


def capture_of(rows: Rows, layout: Layout) -> Capture:
    ids, logprobs, ranks = rows.ids.numpy(), rows.logprobs.numpy(), rows.ranks.int().numpy()
    return capture_of_rows(ids, logprobs, ranks, ids[:, 0].tolist(), layout.top, layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("vocab_size", [400, 3000])
def test_both_forms_say_the_same(layout: Layout, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = 3 * torch.randn(200, vocab_size, generator=generator)
    sampled = torch.where(torch.arange(200) % 2 == 0, logits.argmax(dim=1), torch.randint(vocab_size, (200,)))
    rows, mapped = both_forms(logits, sampled, layout)
    other = dataclasses.replace(layout, mapped=True)
    expected, got = capture_of(rows, layout), capture_of(mapped, other)
    for one in dataclasses.fields(Capture):
        np.testing.assert_array_equal(getattr(got, one.name), getattr(expected, one.name), err_msg=one.name)
    assert got.topk_ids_TK.dtype == got.sampled_rank_T.dtype == np.int32
    assert mapped.ids.shape == mapped.logprobs.shape == (200, other.width + 1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ids_of_a_row_are_distinct_and_in_the_smallest_vocabulary(layout: Layout) -> None:
    """Whatever the tokens: small ids, large ids, and a vocabulary that has just enough."""
    least = dataclasses.replace(layout, mapped=True).min_vocab_size
    for vocab_size, shift in ((least, 0.0), (least + 7, 1.0), (2000, 1.0), (2000, -1.0)):
        logits = torch.randn(300, vocab_size) + shift * torch.arange(vocab_size)
        sampled = torch.arange(300) % vocab_size
        _, mapped = both_forms(logits, sampled, layout)
        others = mapped.ids[:, 1:]
        assert all(len(set(row)) == len(row) for row in others.tolist())
        numbers = mapped.ids[:, 1 + layout.top :]
        assert (numbers != sampled[:, None]).all()
        assert int(mapped.ids.min()) >= 0
        assert int(mapped.ids.max()) < vocab_size


def test_what_json_cannot_say_comes_back() -> None:
    """-9999 stands for minus infinity, and NaN tells itself by its rank."""
    layout = Layout(4, 3)
    logits = torch.full((2, 50), -math.inf)
    logits[:, :5] = torch.arange(5.0)
    logits[1, 2] = math.nan
    rows, mapped = both_forms(logits, torch.tensor([7, 2]), layout)
    other = dataclasses.replace(layout, mapped=True)
    clamped = Rows(mapped.ids, mapped.logprobs.nan_to_num(nan=-9999.0, neginf=-9999.0), mapped.ranks)
    logprobs = clamped.logprobs.numpy()
    logprobs[logprobs <= -9999] = -np.inf
    ids = clamped.ids.numpy()
    capture = capture_of_rows(ids, logprobs, np.zeros(2, np.int32), ids[:, 0].tolist(), 4, other)
    assert capture.sampled_logprob_T[0] == -np.inf
    assert capture.sampled_rank_T.tolist() == [50, 0]
    assert np.isnan(capture.sampled_logprob_T[1])
    assert rows.logprobs[1].isnan().any()


def test_unmarked_rows_are_refused() -> None:
    layout = Layout(3, 2, mapped=True)
    top = torch.randn(4, 50).log_softmax(-1).topk(layout.width + 1)
    plain = Rows(top.indices.int(), top.values, torch.ones(4, dtype=torch.int64))
    with pytest.raises(UnmarkedRows, match="without the sampler plugin"):
        capture_of(plain, layout)
    _, mapped = both_forms(torch.randn(4, 50), torch.arange(4), layout.unmapped())
    mapped.logprobs[2, -1] = 1.0
    with pytest.raises(StillroomError, match="without the sampler plugin"):
        capture_of(mapped, layout)


@pytest.mark.parametrize("layout", [*LAYOUTS, Layout(8, 8, (2.0,), mapped=True)], ids=str)
def test_a_layout_survives_its_request(layout: Layout) -> None:
    assert Layout.of(layout.extra_args()) == layout


@pytest.mark.parametrize("version", [1, 3, "2", [2], {"a": 2}, 0])
def test_another_version_makes_no_sense(version: Any) -> None:
    asked = Layout(8, mapped=True).extra_args()
    assert asked[MAPPED] == MAPPED_MARK
    with pytest.raises(ValueError, match="does not match version 2"):
        Layout.of({**asked, MAPPED: version})
