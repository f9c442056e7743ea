"""Chains split at their steps: where steps begin, and that each target stays with its token."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.config import Json
from stillroom.errors import ConfigError, CorruptError
from student_train.config.data import DataConfig, StepsConfig
from student_train.config.run import StudentConfig
from student_train.data.completion_text import spell
from student_train.data.epoch_plan import PlanSpec
from student_train.data.freezing import CacheSource, SelectionRequest
from student_train.data.open import open_data
from student_train.data.selection import Selection
from student_train.data.steps import examples_path, patterns_of, planned, step_starts, with_examples, write_examples
from tests.helpers.caches import make_cache
from tests.helpers.vocabularies import make_text_cache, student_folder, teacher_tokenizer
from tests.student_train.data.test_stream import Frozen, all_keys, contents, freeze_all, keys, read, read_world

SPEC = PlanSpec(128, max_tokens=48, lanes=2, window_groups=2)


@pytest.mark.parametrize(
    ("at", "steps"),
    [
        ("paragraphs", ["First.\n\n", "2 = 2,\nso\n \n", "第二步：done"]),
        ("lines", ["First.\n\n", "2 = 2,\n", "so\n \n", "第二步：done"]),
        ("numbered", ["First.\n\n2 = 2,\nso\n \n", "第二步：done"]),
        ("equations", ["First.\n\n2 = 2,\n", "so\n \n第二步：done"]),
        ("numbered", ["So:\n", "Step 1: add.\n", "**Step 2** 3.5\n", "3. end"]),
        ("equations", ["As $$\na = b\n$$\n", "we see \\[x\\] ", "it."]),
    ],
)
def test_steps_begin_where_the_rules_say(at: Any, steps: list[str]) -> None:
    text = spell([char.encode() for char in "".join(steps)])
    starts_S = step_starts(text, patterns_of(StepsConfig(at=[at])), 1)
    assert [text.text[a:b] for a, b in itertools.pairwise([*starts_S.tolist(), len(text.text)])] == steps


def test_a_boundary_inside_a_token_moves_to_the_next_and_short_steps_join() -> None:
    text = spell([b"a", b".\n", b"\nB", b"b", b"\n\n", b"c"])
    patterns = patterns_of(StepsConfig())
    assert step_starts(text, patterns, 1).tolist() == [0, 3, 5]
    assert step_starts(text, patterns, 2).tolist() == [0, 3]
    assert step_starts(text, patterns, 4).tolist() == [0]


@given(st.text(max_size=30), st.lists(st.integers(1, 4), max_size=60))
def test_characters_and_tokens_meet_at_their_bytes(said: str, lengths: list[int]) -> None:
    data = said.encode("utf-8", errors="ignore") + b"\xe4\xb8"
    stops = [*itertools.takewhile(lambda stop: stop < len(data), np.cumsum(lengths).tolist()), len(data)]
    parts = [data[a:b] for a, b in itertools.pairwise([0, *stops])]
    text = spell(parts)
    for number, char in enumerate(text.text):
        at = text.tokens_of(number, number + 1)
        assert char.encode("utf-8", errors="surrogateescape") in b"".join(parts[at])
        assert text.byte_T[at.start] <= text.byte_C[number]
        assert text.byte_T[at.stop] >= text.byte_C[number + 1]


def split(folder: Path, selection: Selection, spec: PlanSpec, **steps: Any) -> Selection:
    data = DataConfig.model_validate(
        {"caches": ["unused"], "pack_tokens": spec.pack_tokens, "max_tokens": spec.max_tokens, "steps": steps}
    )
    path = examples_path(folder, "distill", selection, data)
    write_examples(path, selection, data)
    return with_examples(path, selection)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Frozen:
    root = tmp_path_factory.mktemp("steps")
    return freeze_all(root, make_cache(root / "cache", num_chains=50, num_workers=2))


@pytest.mark.parametrize("context_steps", [None, 1])
def test_each_target_belongs_to_its_own_token(frozen: Frozen, tmp_path: Path, context_steps: int | None) -> None:
    """By key, after a change of the number of ranks: pieces of the vocabulary are w and the id, steps begin where an id
    ends with 3 or 7, and the cache's distribution of token t of chain r holds the ids r and V/2 + t.
    """
    steps: Json = {"pattern": r"w\d*[37](?!\d)", "min_tokens": 2, "context_steps": context_steps}
    selection = split(tmp_path, frozen.selection, SPEC, **steps)
    half_vocab = selection.header.vocab_size // 2
    whole = contents(read(selection, SPEC, packs_per_step=6)[0])
    first, state = read(selection, SPEC, count=2, world=3, packs_per_step=6)
    packs = read_world(selection, SPEC, 2, packs_per_step=6, state=state)
    assert contents(packs) == whole[6:]
    assert contents(first)[0] == whole[0]
    packs = read_world(selection, SPEC, 3, packs_per_step=6)
    assert keys(packs) == all_keys(frozen)
    num_examples = 0
    for pack in packs:
        for place, (row, token) in enumerate(zip(pack.row_N.tolist(), pack.token_N.tolist(), strict=True)):
            chain = frozen.chain_R[row]
            position = pack.predict_positions_N[place]
            document = pack.document_ids_L[position]
            first_place = np.flatnonzero(pack.document_ids_L[pack.predict_positions_N] == document)[0]
            num_examples += first_place == place
            starts = expected_starts(chain.token_ids.tolist())
            step = int(np.searchsorted(starts, token, side="right")) - 1
            stop = [*starts, len(chain.token_ids)][step + 1]
            oldest = 0 if context_steps is None else max(step - context_steps, 0)
            while oldest < step and len(chain.prompt_ids) + stop - starts[oldest] > 48:
                oldest += 1
            read_before = pack.input_ids_L[np.flatnonzero(pack.document_ids_L == document)[0] : position + 1].tolist()
            assert read_before == [*chain.prompt_ids.tolist(), *chain.token_ids[starts[oldest] : token].tolist()]
            assert pack.token_N[first_place] == starts[step]
            assert pack.sampled_ids_N[place] == chain.token_ids[token]
            assert pack.ids_NK[place, :2].tolist() == [chain.row, half_vocab + token]
            assert pack.entropy_N is not None
            assert pack.entropy_N[place] == chain.signals.entropy_T[token]
    assert num_examples == len(planned(selection).num_tokens_R) > selection.num_chains


def expected_starts(ids: list[int]) -> list[int]:
    starts = [0]
    for token in range(1, len(ids)):
        if ids[token] % 10 in (3, 7) and min(token - starts[-1], len(ids) - token) >= 2:
            starts.append(token)
    return starts


def test_steps_of_another_vocabulary_keep_the_targets_of_whole_chains(tmp_path: Path) -> None:
    cache = make_text_cache(tmp_path / "cache", teacher_tokenizer(tmp_path / "teacher"), num_chains=12)
    data = DataConfig.model_validate({"caches": [str(cache.root)], "kind": "projected"})
    student = StudentConfig(model=str(student_folder(tmp_path, "bytes")))
    selection = open_data(tmp_path / "selection.parquet", SelectionRequest([CacheSource(cache.root)]), data, student)
    spec = PlanSpec(512)
    steps = split(tmp_path, selection, spec, pattern=r" \w+ \w+ \w+", min_tokens=3, context_steps=1)
    found, expected = (by_key(read(one, spec)[0]) for one in (steps, selection))
    assert len(planned(steps).num_tokens_R) > 2 * len(cache.chains)
    assert found == expected


def by_key(packs: list[Any]) -> dict[tuple[int, int], Any]:
    """Stored ids, log probabilities, tail and token by chain and place."""
    found = {}
    for pack in packs:
        for place, key in enumerate(zip(pack.row_N.tolist(), pack.token_N.tolist(), strict=True)):
            is_stored_K = pack.logprobs_NK[place] > -np.inf
            tail = None if pack.tail_logmass_N is None else pack.tail_logmass_N[place]
            is_common = None if pack.is_common_N is None else pack.is_common_N[place]
            ids, logprobs = (one[place][is_stored_K].tolist() for one in (pack.ids_NK, pack.logprobs_NK))
            found[key] = (pack.sampled_ids_N[place], ids, logprobs, tail, is_common)
    return found


def test_what_splits_nothing_or_does_not_belong_is_refused(frozen: Frozen, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none of the 50 selected chains has two steps of 16 tokens: change at or"):
        split(tmp_path, frozen.selection, SPEC)
    with pytest.raises(ValueError, match="pattern '\\(' is not a regular expression"):
        StepsConfig(pattern="(")
    split(tmp_path, frozen.selection, SPEC, pattern="3", min_tokens=1)
    (path,) = tmp_path.glob("*.npy")
    fewer = dataclasses.replace(frozen.selection, num_tokens_R=frozen.selection.num_tokens_R - 1)
    with pytest.raises(CorruptError, match="does not hold the steps of the selected chains"):
        with_examples(path, fewer)
    path.write_bytes(b"torn")
    with pytest.raises(CorruptError, match="cannot be read"):
        with_examples(path, frozen.selection)
