"""The sampler's signals against a dense float64 computation, on random logits and on those that break shortcuts."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from teacher_cache.engine.plugin import signals
from teacher_cache.engine.plugin.signals import STRIPE_IDS, Rows, signal_rows, top_candidates, uniforms_of
from teacher_cache.engine.row_layout import MARK, Layout

TEMPERATURES = (0.5, 2.0, 8.0)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def rows_of(logits_NV: Tensor, layout: Layout, seed: int = 7) -> Rows:
    num = len(logits_NV)
    sampled = torch.randint(logits_NV.shape[1], (num,), generator=torch.Generator().manual_seed(seed))
    before = logits_NV.clone()
    rows = signal_rows(logits_NV, sampled, layout, torch.arange(num) + seed, torch.arange(num) * 3)
    torch.testing.assert_close(logits_NV, before, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(rows.ids[:, 0], sampled.int())
    assert (rows.ids.dtype, rows.logprobs.dtype) == (torch.int32, torch.float32)
    assert rows.ids.shape == rows.logprobs.shape == (num, layout.width + 1)
    return rows


def assert_dense(logits_NV: Tensor, layout: Layout, rows: Rows, atol: float = 2e-6) -> None:
    """Everything in the rows agrees with log_softmax in float64."""
    dense_NV = logits_NV.double().log_softmax(dim=-1)
    ids, logprobs = rows.ids.long(), rows.logprobs.double()
    k, m = layout.top, layout.draws
    entries = slice(0, 1 + k)
    torch.testing.assert_close(logprobs[:, entries], dense_NV.gather(1, ids[:, entries]), rtol=2e-6, atol=atol)
    # Ties may be broken either way: the values are the largest, the ids distinct and theirs.
    largest = logits_NV.topk(k, dim=-1).values
    assert torch.equal(logits_NV.gather(1, ids[:, 1 : 1 + k]), largest)
    assert all(len(set(row)) == k for row in ids[:, 1 : 1 + k].tolist())
    sampled = logits_NV.gather(1, ids[:, :1])
    assert torch.equal(rows.ranks, (logits_NV >= sampled).sum(dim=1))
    entropy = -torch.special.xlogy(dense_NV.exp(), dense_NV.exp()).sum(dim=1)
    torch.testing.assert_close(logprobs[:, 1 + k + m], entropy, rtol=2e-6, atol=atol)
    for column, tau in enumerate(layout.temperatures, start=2 + k + m):
        torch.testing.assert_close(logprobs[:, column], (dense_NV / tau).logsumexp(dim=1), rtol=2e-6, atol=atol)
    assert (logprobs[:, layout.width] == MARK).all()
    assert (ids[:, 1 + k + m :] == 0).all()


def assert_draws(logits_NV: Tensor, layout: Layout, rows: Rows) -> None:
    """Draws lie outside the top, where there is mass, with the teacher's own log probability."""
    dense_NV = logits_NV.double().log_softmax(dim=-1)
    top, draws = rows.ids[:, 1 : 1 + layout.top].long(), slice(1 + layout.top, 1 + layout.top + layout.draws)
    tail_NV = dense_NV.exp().scatter(1, top, 0.0)
    ids, logprobs = rows.ids[:, draws].long(), rows.logprobs[:, draws].double()
    some = tail_NV.sum(dim=1) > 1e-44
    assert (tail_NV.gather(1, ids)[some] > 0).all()
    torch.testing.assert_close(logprobs[some], dense_NV.gather(1, ids)[some], rtol=2e-6, atol=2e-6)
    assert (ids[~some] == 0).all()
    assert (logprobs[~some] == -math.inf).all()


def random_logits(num: int, vocab_size: int, scale: float, seed: int = 0) -> Tensor:
    return scale * torch.randn(num, vocab_size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("vocab_size", "layout"),
    [
        (49_152, Layout(64, 8, TEMPERATURES)),
        (49_153, Layout(64, 8, TEMPERATURES)),
        (STRIPE_IDS * 131 + 63, Layout(64, 3)),
        (400, Layout(12, 5, TEMPERATURES)),
        (400, Layout(399, 5, TEMPERATURES)),
        (400, Layout(400, 5, TEMPERATURES)),
        (63, Layout(1, 16)),
        (2, Layout(1, 1)),
        (1, Layout(1, 2, (2.0,))),
        (1 << 20, Layout(64, 8, TEMPERATURES)),
        ((1 << 20) - 1, Layout(1024, 32)),
    ],
)
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_rows_agree_with_float64(vocab_size: int, layout: Layout, scale: float) -> None:
    logits = random_logits(3, vocab_size, scale)
    rows = rows_of(logits, layout)
    assert_dense(logits, layout, rows)
    if layout.draws:
        assert_draws(logits, layout, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_with_their_many_ties(dtype: torch.dtype) -> None:
    layout = Layout(64, 8, TEMPERATURES)
    logits = random_logits(4, 20_000, 2.0).to(dtype)
    rows = rows_of(logits, layout)
    assert_dense(logits, layout, rows)
    assert_draws(logits, layout, rows)


def adversarial() -> dict[str, Tensor]:
    vocab_size = 20_001
    base = random_logits(1, vocab_size, 1.0)[0]
    ramp = torch.arange(vocab_size).float() / 1000
    one_stripe = base.clone()
    # The whole top in one stripe: ids 5, 5 + C, 5 + 2C, ...
    one_stripe[5 :: vocab_size // STRIPE_IDS] += 50
    last = base.clone()
    last[-64:] += 40
    masked = torch.full((vocab_size,), -math.inf)
    masked[::100] = base[::100]
    few = torch.full((vocab_size,), -math.inf)
    few[[7, 20_000]] = torch.tensor([1.0, 2.0])
    sure = base.clone()
    sure[77] = 300.0
    huge = base * 1e30
    return {
        "uniform": torch.zeros(vocab_size),
        "ramp up": ramp,
        "ramp down": -ramp,
        "top in one stripe": one_stripe,
        "top in the remainder": last,
        "mostly -inf": masked,
        "fewer finite than the top": few,
        "one certain": sure,
        "far apart": huge,
        "shifted": base + 1e4,
    }


@pytest.mark.parametrize("name", adversarial())
def test_adversarial_rows(name: str) -> None:
    layout = Layout(64, 8, TEMPERATURES)
    logits = adversarial()[name].repeat(2, 1)
    # 1e4 + x holds x to 1e-3: the logits are what they are, and float64 sees the same ones.
    rows = rows_of(logits, layout)
    assert_dense(logits, layout, rows)
    assert_draws(logits, layout, rows)


def test_a_row_with_nan_is_nan_and_leaves_its_neighbours_alone() -> None:
    layout = Layout(8, 4, (2.0,))
    logits = random_logits(5, 30_000, 2.0)
    clean = rows_of(logits, layout)
    logits[1, 17], logits[2] = math.nan, -math.inf
    logits[3, 4] = math.inf
    rows = rows_of(logits, layout)
    for row in (1, 2, 3):
        assert rows.logprobs[row, 1:-1].isnan().any()
        assert rows.logprobs[row, 1 + 8 + 4].isnan()
        assert ((rows.ids[row] >= 0) & (rows.ids[row] < 30_000)).all()
    for row in (0, 4):
        assert torch.equal(rows.logprobs[row], clean.logprobs[row])
        assert torch.equal(rows.ids[row], clean.ids[row])


def test_rows_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, reordered, or in chunks: the same draws and values."""
    layout = Layout(16, 8, TEMPERATURES)
    logits, sampled = random_logits(9, 10_007, 2.0), torch.arange(9) * 11
    seeds, positions = torch.arange(9) + 2**62, torch.arange(9)
    whole = signal_rows(logits, sampled, layout, seeds, positions)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    mixed = signal_rows(logits[order], sampled[order], layout, seeds[order], positions[order])
    monkeypatch.setattr(signals, "CPU_CHUNK_LOGITS", 2 * 10_007)
    chunked = signal_rows(logits, sampled, layout, seeds, positions)
    for other, index in ((mixed, order), (chunked, torch.arange(9))):
        assert torch.equal(other.ids, whole.ids[index])
        torch.testing.assert_close(other.logprobs, whole.logprobs[index], rtol=0, atol=1e-6)
        assert torch.equal(other.ranks, whole.ranks[index])
    for row in range(9):
        one = slice(row, row + 1)
        alone = signal_rows(logits[one], sampled[one], layout, seeds[one], positions[one])
        assert torch.equal(alone.ids, whole.ids[one])
    none = signal_rows(logits[:0], sampled[:0], layout, seeds[:0], positions[:0])
    assert none.ids.shape == none.logprobs.shape == (0, layout.width + 1)


def test_seed_and_position_both_matter() -> None:
    layout = Layout(4, 32)
    logits = random_logits(1, 5_000, 0.1).repeat(4, 1)
    seeds, positions = torch.tensor([1, 1, 2, 2]), torch.tensor([0, 1, 0, 1])
    ids = signal_rows(logits, torch.zeros(4, dtype=torch.int64), layout, seeds, positions).ids[:, 5:37]
    assert len({tuple(row) for row in ids.tolist()}) == 4
    # No two rows share more than chance would have it.
    for first in range(4):
        for second in range(first):
            assert len(set(ids[first].tolist()) & set(ids[second].tolist())) < 8


def test_uniforms_are_splitmix64() -> None:
    def mix(bits: int) -> int:
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
        return bits ^ bits >> 31

    gamma = 0x9E3779B97F4A7C15
    # Reference outputs of SplitMix64 seeded with 1234567 (Vigna's splitmix64.c).
    assert [mix((1234567 + j * gamma) % 2**64) for j in (1, 2)] == [6457827717110365317, 3203168211198807973]
    for seed, position in ((0, 0), (2**62 + 5, 131_071), (-3, 7)):
        start = mix((mix(seed % 2**64) + position * gamma) % 2**64)
        expected = [(mix((start + j * gamma) % 2**64) >> 11) * 2.0**-53 for j in range(1, 6)]
        got = uniforms_of(torch.tensor([seed]), torch.tensor([position]), 5)
        np.testing.assert_array_equal(got[0].numpy(), expected)


def test_draws_pass_chi_square() -> None:
    """200,000 draws over 300 tokens, at stripes and remainder alike."""
    vocab_size, layout = 300, Layout(5, 200)
    logits = random_logits(1, vocab_size, 1.5, seed=3).repeat(1000, 1)
    rows = signal_rows(
        logits, torch.zeros(1000, dtype=torch.int64), layout, torch.zeros(1000).long(), torch.arange(1000)
    )
    counts = torch.bincount(rows.ids[:, 6:206].flatten().long(), minlength=vocab_size).double()
    tail = logits[0].double().softmax(0).scatter(0, rows.ids[0, 1:6].long(), 0.0)
    expected = tail / tail.sum() * 200_000
    often = expected > 5
    chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum().item()
    freedom = int(often.sum()) - 1
    # Mean f, standard deviation sqrt(2 f): five of them would be one run in a million.
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)
    assert counts[rows.ids[0, 1:6].long()].sum() == 0
    wrong = expected[often].roll(1)
    assert ((counts[often] - wrong) ** 2 / wrong).sum() > freedom + 50 * math.sqrt(2 * freedom), "the test can fail"


def test_the_sampled_target_is_the_distribution_on_average() -> None:
    """Exact top plus draws, each of weight tail mass / M, averaged over many positions."""
    vocab_size, layout, num = 200, Layout(4, 8), 20_000
    logits = random_logits(1, vocab_size, 1.0, seed=5)
    rows = signal_rows(logits.repeat(num, 1), torch.zeros(num).long(), layout, torch.full((num,), 9), torch.arange(num))
    dense = logits[0].double().softmax(0)
    top = rows.ids[0, 1:5].long()
    target = torch.zeros(vocab_size, dtype=torch.float64)
    target[top] = rows.logprobs[0, 1:5].double().exp()
    tail = 1.0 - target.sum()
    target += torch.bincount(rows.ids[:, 5:13].flatten().long(), minlength=vocab_size) * tail / (num * 8)
    deviation = (dense * tail / (num * 8)).sqrt() + 1e-6
    assert ((target - dense).abs() < 5 * deviation).all()


def test_top_candidates_of_a_whole_stripe_row() -> None:
    logits = random_logits(2, 64 * 300, 1.0)
    values, ids = top_candidates(logits, 64)
    assert torch.equal(values, logits.topk(64).values)
    assert torch.equal(ids, logits.topk(64).indices)


def test_what_does_not_fit_is_refused() -> None:
    zero = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="top=6 exceeds the vocabulary of 5"):
        signal_rows(torch.zeros(1, 5), zero, Layout(6), None, None)
    with pytest.raises(ValueError, match="need a seed"):
        signal_rows(torch.zeros(1, 5), zero, Layout(2, 1), None, None)
