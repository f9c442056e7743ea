"""One pack: where documents begin, which hidden state predicts what, and whose distribution stands beside it."""

import dataclasses

import numpy as np
import pytest
import torch

from stillroom.schema.records import Signals
from student_train.data.pack import PackedPiece, TargetView, build_pack, empty_pack, to_torch
from student_train.data.rows import RowBlock
from student_train.losses.divergences import ChunkLikelihood, CrossEntropy, ForwardKL, HeadLoss
from student_train.losses.fused_head import fused_loss
from student_train.losses.mix import LossMix


def block_of(chains: list[tuple[list[int], list[int]]], *, with_signals: bool = True) -> RowBlock:
    """Chains of (prompt, completion). Token t of chain r has support [100 r + t, 900] and entropy r + t / 100."""
    prompts, completions = [one for one, _ in chains], [one for _, one in chains]
    token_offsets = np.cumsum([0, *map(len, completions)])
    key_T = [(row, token) for row, ids in enumerate(completions) for token in range(len(ids))]
    num_tokens = len(key_T)
    signals = Signals(
        topk_n_T=np.full(num_tokens, 2, np.int32),
        topk_ids_N=np.array([one for row, token in key_T for one in (100 * row + token, 900)], np.int32),
        topk_logprobs_N=np.tile(np.log(np.array([0.6, 0.3], np.float32)), num_tokens),
        tail_logmass_T=np.full(num_tokens, np.log(0.1), np.float32),
        sampled_logprob_T=np.full(num_tokens, np.log(0.6), np.float32),
        sampled_rank_T=np.ones(num_tokens, np.int32),
        entropy_T=np.array([row + token / 100 for row, token in key_T], np.float32),
    )
    return RowBlock(
        rows_R=np.arange(len(chains)),
        prompt_ids=np.concatenate(prompts).astype(np.int32),
        prompt_offsets=np.cumsum([0, *map(len, prompts)]),
        token_ids_T=np.concatenate(completions).astype(np.int32),
        token_offsets=token_offsets,
        signals=signals if with_signals else None,
        entry_offsets_T=2 * np.arange(num_tokens + 1) if with_signals else None,
    )


CHAINS = [([11, 12, 13], [21, 22]), ([31], [41, 42, 43])]


def test_a_worked_example() -> None:
    block = block_of(CHAINS)
    pack = build_pack([PackedPiece(7, block, 0, 0, 3, 5, 1.0), PackedPiece(9, block, 1, 0, 1, 4, 0.5)])
    assert pack.input_ids_L.tolist() == [11, 12, 13, 21, 22, 31, 41, 42, 43]
    assert pack.position_ids_L.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert pack.document_ids_L.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    # 21 is predicted by the last prompt token 13 at position 2; the prompts have no loss.
    assert pack.predict_positions_N.tolist() == [2, 3, 5, 6, 7]
    assert pack.sampled_ids_N.tolist() == [21, 22, 41, 42, 43]
    assert pack.row_N.tolist() == [7, 7, 9, 9, 9]
    assert pack.token_N.tolist() == [0, 1, 0, 1, 2]
    assert pack.weights_N.tolist() == [1, 1, 0.5, 0.5, 0.5]
    assert pack.ids_NK.tolist() == [[0, 900], [1, 900], [100, 900], [101, 900], [102, 900]]
    assert pack.entropy_N is not None
    np.testing.assert_allclose(pack.entropy_N, [0, 0.01, 1, 1.01, 1.02], rtol=1e-6)
    assert (pack.num_tokens, pack.num_loss_tokens) == (9, 5)


def test_a_truncated_chain_keeps_its_last_target() -> None:
    pack = build_pack([PackedPiece(0, block_of(CHAINS), 1, 0, 1, 3, 1.0)])
    assert pack.input_ids_L.tolist() == [31, 41, 42]
    assert pack.sampled_ids_N.tolist() == [41, 42]
    assert pack.predict_positions_N.tolist() == [0, 1]


def test_a_later_piece_of_a_split_chain() -> None:
    block = block_of([([1, 2, 3], list(range(10, 20)))])
    pack = build_pack([PackedPiece(0, block, 0, 6, 8, 12, 1.0)])
    # Token 6 of the chain is completion token 3; 6 and 7 are context, 8 to 11 have a loss.
    assert pack.input_ids_L.tolist() == [13, 14, 15, 16, 17, 18]
    assert pack.position_ids_L.tolist() == [0, 1, 2, 3, 4, 5]
    assert pack.predict_positions_N.tolist() == [1, 2, 3, 4]
    assert pack.token_N.tolist() == [5, 6, 7, 8]
    assert pack.ids_NK[:, 0].tolist() == [5, 6, 7, 8]
    assert pack.sampled_ids_N.tolist() == [15, 16, 17, 18]


def test_a_split_inside_a_long_prompt() -> None:
    block = block_of([(list(range(1, 9)), [20, 21, 22])])
    pack = build_pack([PackedPiece(0, block, 0, 6, 8, 10, 1.0)])
    assert pack.input_ids_L.tolist() == [7, 8, 20, 21]
    assert pack.sampled_ids_N.tolist() == [20, 21]
    assert pack.token_N.tolist() == [0, 1]


def test_supports_of_several_sizes_are_padded() -> None:
    block = block_of([([1], [5, 6])])
    assert block.signals is not None
    signals = dataclasses.replace(
        block.signals,
        topk_n_T=np.array([1, 3], np.int32),
        topk_ids_N=np.array([50, 60, 61, 62], np.int32),
        topk_logprobs_N=np.array([-0.1, -1, -2, -3], np.float32),
    )
    block = dataclasses.replace(block, signals=signals, entry_offsets_T=np.array([0, 1, 4]))
    pack = build_pack([PackedPiece(0, block, 0, 0, 1, 3, 1.0)])
    assert pack.ids_NK.tolist() == [[50, 0, 0], [60, 61, 62]]
    assert pack.logprobs_NK[0].tolist() == [pytest.approx(-0.1), -np.inf, -np.inf]
    narrow_ids_NK, narrow_logprobs_NK = signals.dense(2)
    assert narrow_ids_NK.tolist() == [[50, 0], [60, 61]]
    np.testing.assert_array_equal(narrow_logprobs_NK, pack.logprobs_NK[:, :2])


def test_text_alone() -> None:
    pack = build_pack([PackedPiece(0, block_of(CHAINS, with_signals=False), 0, 0, 3, 5, 1.0)])
    assert pack.ids_NK.shape == (2, 0)
    assert pack.tail_logmass_N is None
    targets = to_torch(pack, "cpu").targets
    assert targets.num_support == 0
    assert targets.sampled_ids_N.tolist() == [21, 22]


def test_tensors_are_what_model_and_losses_take() -> None:
    block = block_of(CHAINS)
    pack = to_torch(build_pack([PackedPiece(0, block, 1, 0, 1, 4, 0.5)]), "cpu")
    assert pack.input_ids_1L.dtype == pack.position_ids_1L.dtype == torch.int64
    assert pack.input_ids_1L.tolist() == [[31, 41, 42, 43]]
    assert pack.predict_positions_N.tolist() == [0, 1, 2]
    assert pack.targets.weights_N is not None
    assert pack.targets.weights_N.tolist() == [0.5, 0.5, 0.5]
    loss = fused_loss(
        torch.randn(4, 8)[pack.predict_positions_N],
        torch.randn(1000, 8),
        pack.targets,
        LossMix((CrossEntropy(),)),
    )
    assert float(loss.weight_sum) == 1.5


@pytest.mark.parametrize("with_signals", [True, False])
def test_an_empty_pack_costs_nothing_and_moves_nothing(with_signals: bool) -> None:
    pack = to_torch(empty_pack(with_signals=with_signals), "cpu", TargetView(with_chunks=with_signals))
    hidden_NH = torch.randn(1, 8, requires_grad=True)
    weight_VH = torch.randn(1000, 8, requires_grad=True)
    kinds: tuple[HeadLoss, ...] = (ForwardKL(), ChunkLikelihood()) if with_signals else (CrossEntropy(),)
    loss = fused_loss(hidden_NH[pack.predict_positions_N], weight_VH, pack.targets, LossMix(kinds))
    loss.loss_sum.backward()
    assert float(loss.weight_sum) == 0
    assert float(loss.loss_sum.detach()) == 0
    assert weight_VH.grad is not None
    assert float(weight_VH.grad.abs().sum()) == 0
