"""Long chains: whole, truncated, skipped, split."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.schema.records import Int32
from student_train.data.epoch_plan import LongChains, Pieces, cut_chains


def cut(prompts: list[int], tokens: list[int], limit: int, policy: LongChains) -> Pieces:
    return cut_chains(np.array(prompts, np.int32), np.array(tokens, np.int32), limit, policy)


def rows(pieces: Pieces) -> list[tuple[int, ...]]:
    return list(zip(*(a.tolist() for a in (pieces.row_P, pieces.first_P, pieces.loss_P, pieces.stop_P)), strict=True))


def test_short_chains_are_left_whole() -> None:
    policies: list[LongChains] = ["truncate", "skip", "split"]
    for policy in policies:
        pieces = cut([3, 2], [5, 6], 8, policy)
        assert rows(pieces) == [(0, 0, 3, 8), (1, 0, 2, 8)]
        assert pieces.counts.num_long == 0


def test_truncate_keeps_the_beginning_and_counts_the_rest() -> None:
    pieces = cut([3, 8, 9], [10, 4, 1], 8, "truncate")
    assert rows(pieces) == [(0, 0, 3, 8)]
    counts = pieces.counts
    assert (counts.num_long, counts.num_truncated, counts.num_skipped) == (3, 1, 2)
    assert counts.num_tokens_lost == 5 + 4 + 1


def test_skip_leaves_out_long_chains() -> None:
    pieces = cut([3, 3], [5, 6], 8, "skip")
    assert rows(pieces) == [(0, 0, 3, 8)]
    assert (pieces.counts.num_skipped, pieces.counts.num_tokens_lost) == (1, 6)


def test_split_repeats_the_tokens_before_as_context() -> None:
    # Limit 16: an eighth, 2 tokens, of context before every later piece.
    pieces = cut([4], [30], 16, "split")
    assert rows(pieces) == [(0, 0, 4, 16), (0, 14, 16, 30), (0, 28, 30, 34)]
    assert pieces.counts.num_split == 1


def test_split_of_a_chain_whose_prompt_alone_is_too_long() -> None:
    pieces = cut([20], [16], 16, "split")
    assert rows(pieces) == [(0, 18, 20, 34), (0, 32, 34, 36)]


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 200)), min_size=1, max_size=20),
    st.integers(2, 80),
    st.sampled_from(["truncate", "skip", "split"]),
)
def test_every_completion_token_has_one_loss_or_is_counted_lost(
    lengths: list[tuple[int, int]], limit: int, policy: LongChains
) -> None:
    prompts, tokens = [one for one, _ in lengths], [one for _, one in lengths]
    pieces = cut(prompts, tokens, limit, policy)
    seen = [np.zeros(p + t, np.int32) for p, t in lengths]
    for row, first, loss, stop in rows(pieces):
        assert 0 <= first < loss < stop <= prompts[row] + tokens[row]
        assert loss >= prompts[row]
        assert stop - first <= limit
        seen[row][loss:stop] += 1
    lost = 0
    for one, prompt in zip(seen, prompts, strict=True):
        completion: Int32 = one[prompt:]
        assert one[:prompt].sum() == 0
        assert completion.max() <= 1
        lost += int((completion == 0).sum())
    assert lost == pieces.counts.num_tokens_lost
    if policy == "split":
        assert lost == 0


@pytest.mark.parametrize("policy", ["truncate", "skip"])
def test_nothing_fits(policy: LongChains) -> None:
    assert len(cut([9], [9], 8, policy).row_P) == 0
