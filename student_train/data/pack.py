"""One packed sequence: pieces of chains and the targets of their loss tokens. Labels shift by one here, and only here.

In: decoded rows and which of their tokens to take. Out: numpy arrays of one pack; `to_torch` copies them to a device.
The hidden state at position i of a document predicts its token i + 1, so the first completion token is predicted by the
last prompt token, and the last completion token's own hidden state predicts nothing. Prompts have no loss.

    L tokens of the pack, N loss tokens, K largest support in the pack, M most draws of a token in it, S temperatures,
    D documents
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stillroom.schema.records import Draws, Float32, Int32, Int64, Signals
from student_train.config import TokenWeightsConfig
from student_train.data.rows import RowBlock

if TYPE_CHECKING:
    import torch

    from student_train.losses.targets import SparseTargets

MAX_CHUNK_TOKENS = 64
"""Longer chunks are none: logits of a whole chunk are in memory together."""


@dataclass(frozen=True, slots=True)
class PackedPiece:
    """Tokens first..stop-1 of one chain, with a loss on loss..stop-1, counted from the prompt's first token.

    `row` is the chain's number in the selection, `index` its number in `block`.
    """

    row: int
    block: RowBlock
    index: int
    first: int
    loss: int
    stop: int
    weight: float


@dataclass(frozen=True, slots=True)
class Pack:
    """One packed sequence. int32 and float32 unless noted.

    Attributes:
        position_ids_L: from 0 in every document.
        document_ids_L: 0, 1, ...; a token attends to its own document only.
        predict_positions_N: int64, position in the pack of the hidden state that predicts each loss token.
        sampled_ids_N: the tokens to predict.
        weights_N: the chain's weight.
        row_N, token_N: key of each loss token, the chain's number in the selection and the place in its completion.
        ids_NK, logprobs_NK: the teacher's distributions (padding: id 0 and -inf); K = 0 for text alone.
        tail_logmass_N, entropy_N: of the teacher, entropy in nats; None for text alone.
        draw_ids_NM, draw_logprobs_NM, draw_weights_NM: padding is id 0, -inf, 0; None where the cache has no draws.
        log_partitions_NS: None where the cache has no other temperatures.
        chunk_ids_N, chunk_logprobs_N: which chunk of text each token belongs to (-1: none), and the teacher's log
            probability of that chunk. In the teacher's own vocabulary each token is one. None for text alone.
        is_common_N: bool, of projected chains: whether the token has a distribution of the teacher's, else its target
            is itself.
    """

    input_ids_L: Int32
    position_ids_L: Int32
    document_ids_L: Int32
    predict_positions_N: Int64
    sampled_ids_N: Int32
    weights_N: Float32
    row_N: Int32
    token_N: Int32
    ids_NK: Int32
    logprobs_NK: Float32
    tail_logmass_N: Float32 | None
    entropy_N: Float32 | None
    draw_ids_NM: Int32 | None = None
    draw_logprobs_NM: Float32 | None = None
    draw_weights_NM: Float32 | None = None
    log_partitions_NS: Float32 | None = None
    chunk_ids_N: Int32 | None = None
    chunk_logprobs_N: Float32 | None = None
    is_common_N: npt.NDArray[np.bool_] | None = None

    @property
    def num_tokens(self) -> int:
        """L."""
        return len(self.input_ids_L)

    @property
    def num_loss_tokens(self) -> int:
        """N."""
        return len(self.sampled_ids_N)


@dataclass(frozen=True, slots=True)
class TorchPack:
    """A pack on a device: input_ids, position_ids and predict_positions int64; tokens of each document in order."""

    input_ids_1L: torch.Tensor
    position_ids_1L: torch.Tensor
    document_lengths: tuple[int, ...]
    predict_positions_N: torch.Tensor
    targets: SparseTargets


def build_pack(pieces: Sequence[PackedPiece]) -> Pack:
    """Concatenates pieces, in their order, into one pack."""
    # Documents: where each begins in the pack, and positions from 0 in each.
    lengths_D = np.array([piece.stop - piece.first for piece in pieces], np.int64)
    starts_D = np.cumsum(lengths_D) - lengths_D
    document_ids_L = np.repeat(np.arange(len(pieces), dtype=np.int32), lengths_D)
    position_ids_L = np.arange(len(document_ids_L), dtype=np.int32) - starts_D.astype(np.int32)[document_ids_L]
    # Loss tokens, document by document, and the positions that predict them.
    num_losses_D = np.array([piece.stop - piece.loss for piece in pieces], np.int64)
    document_N = np.repeat(np.arange(len(pieces)), num_losses_D)
    place_N = np.arange(len(document_N)) - (np.cumsum(num_losses_D) - num_losses_D)[document_N]
    # Prompt of 3, completion of 2: token 3 of the document is the first with a loss; position 3 - 1 predicts it.
    loss_D = np.array([piece.loss - piece.first for piece in pieces], np.int64)
    # loss > first in every piece, so the position before a loss token is never another document's.
    predict_positions_N = (starts_D + loss_D - 1)[document_N] + place_N
    input_ids_L = np.concatenate([_tokens(piece) for piece in pieces])
    first_token_D = np.array([_first_loss_token(piece) for piece in pieces], np.int32)
    signals = _signals(pieces)
    ids_NK, logprobs_NK = _no_support(len(document_N), 0)
    if signals is not None:
        # Padded to the widest token of this pack rather than to max_support: K is what the losses pay for.
        ids_NK, logprobs_NK = signals.dense(int(signals.topk_n_T.max()))
    draw_ids_NM, draw_logprobs_NM, draw_weights_NM = _draws(signals)
    chunk_ids_N, chunk_logprobs_N, is_common_N = _chunks(pieces, signals)
    return Pack(
        input_ids_L=input_ids_L,
        position_ids_L=position_ids_L,
        document_ids_L=document_ids_L,
        predict_positions_N=predict_positions_N,
        sampled_ids_N=input_ids_L[predict_positions_N + 1],
        weights_N=np.array([piece.weight for piece in pieces], np.float32)[document_N],
        row_N=np.array([piece.row for piece in pieces], np.int32)[document_N],
        token_N=first_token_D[document_N] + place_N.astype(np.int32),
        ids_NK=ids_NK,
        logprobs_NK=logprobs_NK,
        tail_logmass_N=signals.tail_logmass_T if signals is not None else None,
        entropy_N=signals.entropy_T if signals is not None else None,
        draw_ids_NM=draw_ids_NM,
        draw_logprobs_NM=draw_logprobs_NM,
        draw_weights_NM=draw_weights_NM,
        log_partitions_NS=signals.log_partitions_TS if signals is not None else None,
        chunk_ids_N=chunk_ids_N,
        chunk_logprobs_N=chunk_logprobs_N,
        is_common_N=is_common_N,
    )


def empty_pack(*, with_signals: bool) -> Pack:
    """One token, no loss: what a rank gets while others finish the last step of a stage."""
    none = np.zeros(0, np.float32) if with_signals else None
    # A support of no tokens is one entry wide: width 0 would say that there are no distributions.
    ids_NK, logprobs_NK = _no_support(0, int(with_signals))
    zero_L, nothing_N = np.zeros(1, np.int32), np.zeros(0, np.int32)
    return Pack(
        input_ids_L=zero_L,
        position_ids_L=zero_L,
        document_ids_L=zero_L,
        predict_positions_N=np.zeros(0, np.int64),
        sampled_ids_N=nothing_N,
        weights_N=np.zeros(0, np.float32),
        row_N=nothing_N,
        token_N=nothing_N,
        ids_NK=ids_NK,
        logprobs_NK=logprobs_NK,
        tail_logmass_N=none,
        entropy_N=none,
    )


@dataclass(frozen=True, slots=True)
class TargetView:
    """What a mix of losses reads of the targets; `partition` is the temperature's column in Pack.log_partitions_NS."""

    with_draws: bool = False
    temperature: float = 1.0
    partition: int | None = None
    with_chunks: bool = False


PLAIN_VIEW = TargetView()


def to_torch(pack: Pack, device: torch.device | str, view: TargetView = PLAIN_VIEW) -> TorchPack:
    """The pack as tensors on `device`. An empty one gets a token of weight 0."""
    import torch

    from student_train.losses.targets import SparseTargets, TailDraws, TextChunks

    def tensor(array: Int32 | Int64 | Float32) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    if not pack.num_loss_tokens:
        pack = _weightless(pack, view)
    # int32 is copied and int64 made on the device: half the bytes cross the bus.
    sampled_ids_N, weights_N = tensor(pack.sampled_ids_N).long(), tensor(pack.weights_N)
    if pack.tail_logmass_N is None:
        targets = SparseTargets.text_alone(sampled_ids_N, weights_N)
    else:
        draws = None
        if view.with_draws:
            assert pack.draw_ids_NM is not None
            assert pack.draw_weights_NM is not None
            assert pack.draw_logprobs_NM is not None
            draws = TailDraws(tensor(pack.draw_ids_NM), tensor(pack.draw_weights_NM), tensor(pack.draw_logprobs_NM))
        targets = SparseTargets(
            tensor(pack.ids_NK),
            tensor(pack.logprobs_NK),
            tensor(pack.tail_logmass_N),
            sampled_ids_N,
            weights_N,
            draws=draws,
        )
        if view.with_chunks:
            assert pack.chunk_ids_N is not None
            assert pack.chunk_logprobs_N is not None
            chunks = TextChunks.of(torch.from_numpy(pack.chunk_ids_N), torch.from_numpy(pack.chunk_logprobs_N))
            targets = targets.with_chunks(chunks)
        if view.partition is not None:
            assert pack.log_partitions_NS is not None
            column_N = np.ascontiguousarray(pack.log_partitions_NS[:, view.partition])
            targets = targets.at_temperature(view.temperature, tensor(column_N))
    return TorchPack(
        input_ids_1L=tensor(pack.input_ids_L).long().unsqueeze(0),
        position_ids_1L=tensor(pack.position_ids_L).long().unsqueeze(0),
        # Python numbers: they split tensors, and reading them from a GPU would wait for it.
        document_lengths=tuple(np.bincount(pack.document_ids_L).tolist()),
        predict_positions_N=tensor(pack.predict_positions_N),
        targets=targets,
    )


def _weightless(pack: Pack, view: TargetView) -> Pack:
    """An empty pack with a loss token of weight 0, so that a rank without data runs the same collectives."""
    zero_11 = np.zeros((1, 1), np.float32)
    placeholder = replace(
        pack,
        predict_positions_N=np.zeros(1, np.int64),
        sampled_ids_N=np.zeros(1, np.int32),
        weights_N=np.zeros(1, np.float32),
        draw_ids_NM=np.zeros((1, 1), np.int32),
        draw_logprobs_NM=zero_11 - np.inf,
        draw_weights_NM=zero_11,
        log_partitions_NS=np.zeros((1, (view.partition or 0) + 1), np.float32),
        chunk_ids_N=np.full(1, -1, np.int32),
        chunk_logprobs_N=np.zeros(1, np.float32),
    )
    if pack.tail_logmass_N is None:
        return placeholder
    return replace(
        placeholder,
        ids_NK=np.zeros((1, 1), np.int32),
        logprobs_NK=zero_11,
        tail_logmass_N=np.full(1, -np.inf, np.float32),
    )


def apply_token_weights(pack: Pack, config: TokenWeightsConfig | None) -> Pack:
    """The pack with weights_N float32 [N] times (1 + entropy)^a times (1 - tail mass)^b, entropy in nats."""
    if config is None:
        return pack
    assert pack.entropy_N is not None
    assert pack.tail_logmass_N is not None
    weights_N = pack.weights_N.astype(np.float64)
    if config.entropy is not None:
        weights_N *= (1.0 + pack.entropy_N.astype(np.float64)) ** config.entropy
    if config.tail is not None:
        held_N = -np.expm1(np.minimum(pack.tail_logmass_N.astype(np.float64), 0.0))
        weights_N *= held_N**config.tail
    return replace(pack, weights_N=weights_N.astype(np.float32))


def dense_draws(draws: Draws, tail_logmass_N: Float32) -> tuple[Int32, Float32, Float32]:
    """ids_NM, logprobs_NM and weights_NM: each draw of a token stands for an equal share of the tail's mass.

    Padding: id 0, -inf, 0; M is at least 1.
    """
    ids_NM, logprobs_NM = draws.dense(max(1, int(draws.n_T.max(initial=0))))
    share_N = np.exp(tail_logmass_N) / np.maximum(draws.n_T, 1)
    weights_NM = np.where(np.isfinite(logprobs_NM), share_N[:, None], 0.0).astype(np.float32)
    return ids_NM, logprobs_NM, weights_NM


def _tokens(piece: PackedPiece) -> Int32:
    prompt = piece.block.prompt_of(piece.index)
    # A later piece of a split chain begins within the completion.
    completion = piece.block.tokens_of(piece.index)[max(piece.first - len(prompt), 0) : piece.stop - len(prompt)]
    return np.concatenate([prompt[piece.first :], completion])


def _first_loss_token(piece: PackedPiece) -> int:
    return piece.loss - len(piece.block.prompt_of(piece.index))


def _signals(pieces: Sequence[PackedPiece]) -> Signals | None:
    """Signals of the loss tokens, one after the other; None for text alone."""
    parts = []
    for piece in pieces:
        first = _first_loss_token(piece)
        part = piece.block.signals_of(piece.index, first, first + piece.stop - piece.loss)
        if part is None:
            return None
        parts.append(part)
    return Signals(
        topk_n_T=np.concatenate([part.topk_n_T for part in parts]),
        topk_ids_N=np.concatenate([part.topk_ids_N for part in parts]),
        topk_logprobs_N=np.concatenate([part.topk_logprobs_N for part in parts]),
        tail_logmass_T=np.concatenate([part.tail_logmass_T for part in parts]),
        sampled_logprob_T=np.concatenate([part.sampled_logprob_T for part in parts]),
        sampled_rank_T=np.concatenate([part.sampled_rank_T for part in parts]),
        entropy_T=np.concatenate([part.entropy_T for part in parts]),
        draws=_all_draws(parts),
        log_partitions_TS=_all_partitions(parts),
    )


def _all_draws(parts: Sequence[Signals]) -> Draws | None:
    """Draws are used only where every shard of a selection holds them."""
    found = [part.draws for part in parts if part.draws is not None]
    return Draws.concat(found) if len(found) == len(parts) else None


def _all_partitions(parts: Sequence[Signals]) -> Float32 | None:
    found = [part.log_partitions_TS for part in parts if part.log_partitions_TS is not None]
    return np.concatenate(found) if len(found) == len(parts) else None


def _draws(signals: Signals | None) -> tuple[Int32, Float32, Float32] | tuple[None, None, None]:
    if signals is None or signals.draws is None:
        return None, None, None
    return dense_draws(signals.draws, signals.tail_logmass_T)


def _chunks(
    pieces: Sequence[PackedPiece], signals: Signals | None
) -> tuple[Int32 | None, Float32 | None, npt.NDArray[np.bool_] | None]:
    """chunk_ids_N, chunk_logprobs_N and is_common_N of a pack.

    A chunk begins at a common token, and its last token has its log probability. With common tokens 0 and 2 and values
    at 1 and 4 of a piece that ends after token 3, ids are 0, 0, -1, -1.
    """
    if signals is None:
        return None, None, None
    parts = []
    for piece in pieces:
        first = _first_loss_token(piece)
        parts.append(piece.block.chunks_of(piece.index, first, first + piece.stop - piece.loss))
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        return np.arange(len(signals.topk_n_T), dtype=np.int32), signals.sampled_logprob_T, None
    is_common_N = np.concatenate([common_N for common_N, _ in found])
    logprob_N = np.concatenate([logprobs_N for _, logprobs_N in found])
    begins_N = is_common_N.copy()
    begins_N[np.cumsum([0, *(len(common_N) for common_N, _ in found[:-1])])] = True
    number_N = np.cumsum(begins_N) - 1
    starts_C = np.flatnonzero(begins_N)
    lengths_C = np.diff(starts_C, append=len(number_N))
    value_C = logprob_N[starts_C + lengths_C - 1]
    is_whole_C = is_common_N[starts_C] & np.isfinite(value_C) & (lengths_C <= MAX_CHUNK_TOKENS)
    ids_N = np.where(is_whole_C[number_N], number_N, -1).astype(np.int32)
    return ids_N, np.where(is_whole_C, value_C, 0.0).astype(np.float32)[number_N], is_common_N


def _no_support(num_tokens: int, k: int) -> tuple[Int32, Float32]:
    return np.zeros((num_tokens, k), np.int32), np.zeros((num_tokens, k), np.float32)
