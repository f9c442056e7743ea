"""What the check of an export measures, and on which positions."""

import numpy as np
import pytest
import torch

from stillroom.errors import StillroomError
from student_train.export.agreement import Chain, divergences
from student_train.export.worker import Scores


def _logits(seed: int, num_ids: int = 50) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(0, 3, (6, num_ids)).astype(np.float32)


def test_divergences_are_those_of_dense_distributions() -> None:
    expected, found = _logits(0), _logits(1)
    agreement_N, kl_N, js_N = divergences(Scores(expected, None, None), Scores(found, None, None))
    p, q = (torch.from_numpy(one).double().softmax(dim=1) for one in (expected, found))
    m = (p + q) / 2
    assert torch.equal(agreement_N, (p.argmax(dim=1) == q.argmax(dim=1)).double())
    assert torch.allclose(kl_N, (p * (p / q).log()).sum(dim=1))
    assert torch.allclose(js_N, ((p * (p / m).log()).sum(dim=1) + (q * (q / m).log()).sum(dim=1)) / 2)


@pytest.mark.parametrize("num_top", [4, 50])
def test_most_likely_tokens_alone_give_lower_bounds(num_top: int) -> None:
    expected, found = _logits(0), _logits(1)
    logprobs = torch.from_numpy(found).log_softmax(dim=1)
    top = logprobs.topk(num_top, dim=1)
    sparse = Scores(None, top.indices.int().numpy(), top.values.numpy())
    dense = divergences(Scores(expected, None, None), Scores(found, None, None))
    bounded = divergences(Scores(expected, None, None), sparse)
    assert torch.equal(bounded[0], dense[0])
    for bound, exact in zip(bounded[1:], dense[1:], strict=True):
        assert (bound <= exact + 1e-6).all()
        assert num_top < 50 or torch.allclose(bound, exact, atol=1e-5)


def test_rows_are_compared_in_blocks() -> None:
    scores = Scores(_logits(0), None, None), Scores(_logits(1), None, None)
    whole = torch.stack(divergences(*scores))
    blocks = [torch.stack(divergences(*(one.rows(first, first + 4) for one in scores))) for first in (0, 4)]
    assert torch.equal(torch.cat(blocks, dim=1), whole)


def test_a_chain_is_cut_to_the_positions_of_a_model() -> None:
    # Position 2 predicts token 3, which is gone.
    assert Chain([5, 6, 7, 8], [0, 1, 2]).shortened(3) == Chain([5, 6, 7], [0, 1])


def test_a_padded_vocabulary_is_cut_and_a_smaller_one_refused() -> None:
    expected = _logits(0)
    padded = np.concatenate([expected, np.full((6, 14), 9.0, np.float32)], axis=1)
    agreement_N, kl_N, _ = divergences(Scores(expected, None, None), Scores(padded, None, None))
    assert agreement_N.all()
    assert kl_N.abs().max() < 1e-9
    with pytest.raises(StillroomError, match="predicts 50 ids, the student 64"):
        divergences(Scores(padded, None, None), Scores(expected, None, None))
