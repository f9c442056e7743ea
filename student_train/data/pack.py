"""One packed sequence: pieces of chains and the targets of their loss tokens. Labels shift by one here, and only here.

In: decoded rows and which of their tokens to take. Out: numpy arrays of one pack; `to_torch` copies them to a device.
The hidden state at position i of a document predicts its token i + 1, so the first completion token is predicted by the
last prompt token, and the last completion token's own hidden state predicts nothing. Prompts have no loss.

    L tokens of the pack, N loss tokens, K largest support in the pack, M most draws of a token in it, S temperatures,
    D documents

A row of two chains (a right and a wrong one of the same prompt) becomes two documents: prompts and completions of both
stand one after the other in the row, and `documents` says where they part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stillroom.schema.records import Draws, Float32, Int32, Int64, Signals
from student_train.config.stage import TokenWeightsConfig
from student_train.data.features import PackFeatures, PieceFeatures, StageFeatures, pack_features
from student_train.data.rows import RowBlock

if TYPE_CHECKING:
    import torch

    from student_train.losses.features import FeatureTargets, TeacherTensors
    from student_train.losses.targets import SparseTargets
    from student_train.losses.whole_teacher import WholeTeacher

MAX_CHUNK_TOKENS = 64
"""Longer chunks are not used: the logits of a whole chunk are in memory together."""


@dataclass(frozen=True, slots=True)
class PackedPiece:
    """Tokens first..stop-1 of one chain, with a loss on loss..stop-1, counted from the prompt's first token.

    `row` is the chain's number in the selection, `index` its number in `block`. `skipped` completion tokens after the
    prompt are left out of the chain, and not counted.
    """

    row: int
    block: RowBlock
    index: int
    first: int
    loss: int
    stop: int
    weight: float
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class StartNumbers:
    """Log probabilities of the student that a stage starts from, float32: of the sampled token, and where losses
    compare distributions of the stored ids, the drawn ids (padded like those of the pack) and all others.
    """

    sampled_N: Float32
    support_NK: Float32 | None = None
    draws_NM: Float32 | None = None
    rest_N: Float32 | None = None


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
        teacher_logprobs_N: what the teacher gives the token that came; None for text alone.
        pair_ids_N, pair_signs_N: number of the pair of chains that a token belongs to, 1 in its right chain and -1 in
            the wrong one (0: in none); None where the selection has no pairs.
        behaviour_logprobs_N, is_negative_N, start: attached by key (`attached.py`); nan is unknown.
        features: of the loss tokens that have any; None where they are not read.
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
    teacher_logprobs_N: Float32 | None = None
    pair_ids_N: Int32 | None = None
    pair_signs_N: Float32 | None = None
    behaviour_logprobs_N: Float32 | None = None
    is_negative_N: npt.NDArray[np.bool_] | None = None
    start: StartNumbers | None = None
    features: PackFeatures | None = None

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
    """A pack on a device: input_ids, position_ids and predict_positions int64; tokens of each document in order.

    shift_LH: float32, added to the input embeddings in units of each one's root mean square; None adds nothing.
    """

    input_ids_1L: torch.Tensor
    position_ids_1L: torch.Tensor
    document_lengths: tuple[int, ...]
    predict_positions_N: torch.Tensor
    targets: SparseTargets
    features: FeatureTargets | None = None
    shift_LH: torch.Tensor | None = None


def build_pack(pieces: Sequence[PackedPiece], features: StageFeatures | None = None) -> Pack:
    """Concatenates pieces, in their order, into one pack; with the `features` of its tokens."""
    documents = [document for number, piece in enumerate(pieces) for document in _documents(number, piece)]
    # Where each begins in the pack, and positions from 0 in each.
    lengths_D = np.array([len(one.ids) for one in documents], np.int64)
    starts_D = np.cumsum(lengths_D) - lengths_D
    document_ids_L = np.repeat(np.arange(len(documents), dtype=np.int32), lengths_D)
    position_ids_L = np.arange(len(document_ids_L), dtype=np.int32) - starts_D.astype(np.int32)[document_ids_L]
    # Loss tokens, document by document, and the positions that predict them.
    loss_D = np.array([one.num_context for one in documents], np.int64)
    num_losses_D = lengths_D - loss_D
    document_N = np.repeat(np.arange(len(documents)), num_losses_D)
    place_N = np.arange(len(document_N)) - (np.cumsum(num_losses_D) - num_losses_D)[document_N]
    # Prompt of 3, completion of 2: token 3 of the document is the first with a loss; position 3 - 1 predicts it.
    # Every document has a token before its first loss, so that position is never another document's.
    predict_positions_N = (starts_D + loss_D - 1)[document_N] + place_N
    input_ids_L = np.concatenate([one.ids for one in documents])
    first_token_D = np.array([one.first_token for one in documents], np.int32)
    piece_N = np.array([one.number for one in documents], np.int32)[document_N]
    sign_D = np.array([one.sign for one in documents], np.float32)
    has_pairs = any(piece.block.documents_R4 is not None for piece in pieces)
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
        weights_N=np.array([piece.weight for piece in pieces], np.float32)[piece_N],
        row_N=np.array([piece.row for piece in pieces], np.int32)[piece_N],
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
        teacher_logprobs_N=signals.sampled_logprob_T if signals is not None else None,
        pair_ids_N=piece_N if has_pairs else None,
        pair_signs_N=sign_D[document_N] if has_pairs else None,
        features=None if features is None else _features(pieces, num_losses_D, features),
    )


def empty_pack(*, with_signals: bool, features: StageFeatures | None = None) -> Pack:
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
        teacher_logprobs_N=none,
        features=None if features is None else pack_features([], features),
    )


@dataclass(frozen=True, slots=True)
class TargetView:
    """What a mix of losses reads of the targets; `partition` is the temperature's column in Pack.log_partitions_NS."""

    with_draws: bool = False
    temperature: float = 1.0
    partition: int | None = None
    with_chunks: bool = False
    with_pairs: bool = False


PLAIN_VIEW = TargetView()


@dataclass(frozen=True, slots=True)
class FeatureView:
    """How features enter the losses of a step.

    Attributes:
        scale: the weight of the batch's loss tokens over that of its tokens with features, 0 without any; makes a loss
            the mean over the latter.
        attention_scale: the same of tokens whose attention is compared.
    """

    teacher: TeacherTensors
    scale: float
    attention_scale: float


def to_torch(
    pack: Pack,
    device: torch.device | str,
    view: TargetView = PLAIN_VIEW,
    features: FeatureView | None = None,
) -> TorchPack:
    """The pack as tensors on `device`, with its features if a view is given. An empty one gets a token of weight 0."""
    # Imported late: plans and streams work on numpy and must not wait for torch.
    import torch

    from student_train.losses.targets import SparseTargets, TailDraws, TextChunks

    def tensor(array: npt.NDArray[Any]) -> torch.Tensor:
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
    targets = _with_own_words(pack, targets, tensor)
    found = None
    if features is not None:
        found, whole = _feature_tensors(pack, features, view.temperature, tensor)
        targets = replace(targets, whole=whole)
    return TorchPack(
        input_ids_1L=tensor(pack.input_ids_L).long().unsqueeze(0),
        position_ids_1L=tensor(pack.position_ids_L).long().unsqueeze(0),
        # Python numbers: they split tensors, and reading them from a GPU would wait for it.
        document_lengths=tuple(np.bincount(pack.document_ids_L).tolist()),
        predict_positions_N=tensor(pack.predict_positions_N),
        targets=targets,
        features=found,
    )


def _with_own_words(
    pack: Pack, targets: SparseTargets, tensor: Callable[[npt.NDArray[Any]], torch.Tensor]
) -> SparseTargets:
    """The targets with what was attached to the pack, and its pairs of chains."""
    from student_train.losses.divergences import Spoken
    from student_train.losses.targets import ChainPairs, StartBuckets

    start, behaviour_N, teacher_N = pack.start, pack.behaviour_logprobs_N, pack.teacher_logprobs_N
    spoken = Spoken(
        None if behaviour_N is None or teacher_N is None else tensor(teacher_N),
        None if behaviour_N is None else tensor(behaviour_N),
        None if start is None else tensor(start.sampled_N),
    )
    buckets = pairs = None
    if start is not None and start.support_NK is not None and start.rest_N is not None:
        drawn = None if targets.draws is None or start.draws_NM is None else tensor(start.draws_NM)
        buckets = StartBuckets(tensor(start.support_NK), drawn, tensor(start.rest_N))
    if pack.pair_ids_N is not None and pack.pair_signs_N is not None:
        pairs = ChainPairs(tensor(pack.pair_ids_N).long(), tensor(pack.pair_signs_N))
    is_negative_N = None if pack.is_negative_N is None else tensor(pack.is_negative_N)
    return replace(targets, spoken=spoken, is_negative_N=is_negative_N, start=buckets, pairs=pairs)


def _feature_tensors(
    pack: Pack, view: FeatureView, temperature: float, tensor: Callable[[Any], torch.Tensor]
) -> tuple[FeatureTargets, WholeTeacher | None]:
    """What losses below the head read, and whole distributions if the head is there."""
    from student_train.losses.features import FeatureTargets, LayerAttention
    from student_train.losses.whole_teacher import WholeTeacher

    assert pack.features is not None
    held, teacher = pack.features, view.teacher
    weights_P = _weights_of_features(pack, held)
    found = FeatureTargets(
        positions_P=tensor(pack.predict_positions_N[held.places_P]),
        weights_P=tensor(weights_P * np.float32(view.scale)),
        attention_weights_P=tensor(weights_P * held.is_whole_P * np.float32(view.attention_scale)),
        # An empty pack is one document without any.
        counts=tuple(held.counts_D.tolist()) or (0,),
        layers={layer: teacher.expand(tensor(one), layer) for layer, one in held.layers.items()},
        attention={
            layer: LayerAttention(
                teacher.heads[layer], tensor(one.keys_PAm).long(), tensor(one.weights_PAm), tensor(one.rest_PA)
            )
            for layer, one in held.attention.items()
        },
        num_heads=teacher.num_heads,
    )
    if teacher.head is None or held.hidden_PR is None:
        return found, None
    hidden_PD = teacher.expand(tensor(held.hidden_PR), "hidden")
    return found, WholeTeacher(held.places_P.astype(np.int64), hidden_PD, teacher.head, temperature, view.scale)


def feature_weights(pack: Pack) -> tuple[float, float]:
    """Weight of the pack's tokens with features, and of those whose attention is compared."""
    if pack.features is None:
        return 0.0, 0.0
    weights_P = _weights_of_features(pack, pack.features).astype(np.float64)
    return float(weights_P.sum()), float((weights_P * pack.features.is_whole_P).sum())


def _weights_of_features(pack: Pack, held: PackFeatures) -> Float32:
    """float32 [P]; wrong chains teach no states."""
    weights_P = pack.weights_N[held.places_P]
    if pack.is_negative_N is None:
        return weights_P
    return weights_P * ~pack.is_negative_N[held.places_P]


def _weightless(pack: Pack, view: TargetView) -> Pack:
    """An empty pack with a loss token of weight 0, so that a rank without data runs the same collectives."""
    zero_11 = np.zeros((1, 1), np.float32)
    placeholder = replace(
        pack,
        predict_positions_N=np.zeros(1, np.int64),
        sampled_ids_N=np.zeros(1, np.int32),
        weights_N=np.zeros(1, np.float32),
        draw_ids_NM=np.zeros((1, 1), np.int32),
        # -inf and weight 0: padding.
        draw_logprobs_NM=zero_11 - np.inf,
        draw_weights_NM=zero_11,
        log_partitions_NS=np.zeros((1, (view.partition or 0) + 1), np.float32),
        chunk_ids_N=np.full(1, -1, np.int32),
        chunk_logprobs_N=np.zeros(1, np.float32),
        behaviour_logprobs_N=None if pack.behaviour_logprobs_N is None else np.full(1, np.nan, np.float32),
        is_negative_N=None if pack.is_negative_N is None else np.zeros(1, bool),
        start=None if pack.start is None else _no_start(pack.start),
        pair_ids_N=np.zeros(1, np.int32) if view.with_pairs else None,
        pair_signs_N=np.zeros(1, np.float32) if view.with_pairs else None,
    )
    if pack.tail_logmass_N is None:
        return placeholder
    return replace(
        placeholder,
        # All mass on one id and none in the tail: a distribution like any other for the arithmetic.
        ids_NK=np.zeros((1, 1), np.int32),
        logprobs_NK=zero_11,
        tail_logmass_N=np.full(1, -np.inf, np.float32),
        teacher_logprobs_N=np.zeros(1, np.float32),
    )


def _no_start(start: StartNumbers) -> StartNumbers:
    zero_1, zero_11 = np.zeros(1, np.float32), np.zeros((1, 1), np.float32)
    if start.support_NK is None:
        return StartNumbers(zero_1)
    return StartNumbers(zero_1, zero_11, zero_11, zero_1)


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
        # Rounded codes may put the tail a little above mass 1.
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


@dataclass(frozen=True, slots=True)
class _Document:
    """Tokens of a piece that see each other alone: `num_context` without a loss, then loss tokens from number
    `first_token` of the row's completion on. `number` is the piece's, `sign` that of a chain in its pair.
    """

    number: int
    ids: Int32
    num_context: int
    first_token: int
    sign: float = 0.0


def _documents(number: int, piece: PackedPiece) -> list[_Document]:
    if piece.block.documents_R4 is None:
        return [_Document(number, _tokens(piece), piece.loss - piece.first, _first_loss_token(piece))]
    num_prompt, num_tokens, num_second_prompt, _ = piece.block.documents_R4[piece.index].tolist()
    # Pairs are never cut: the plan's limit is at least as long as any of them.
    assert (piece.first, piece.loss) == (0, num_prompt + num_second_prompt)
    prompts, completions = piece.block.prompt_of(piece.index), piece.block.tokens_of(piece.index)
    right = np.concatenate([prompts[:num_prompt], completions[:num_tokens]])
    wrong = np.concatenate([prompts[num_prompt:], completions[num_tokens:]])
    return [_Document(number, right, num_prompt, 0, 1.0), _Document(number, wrong, num_second_prompt, num_tokens, -1.0)]


def _tokens(piece: PackedPiece) -> Int32:
    prompt = piece.block.prompt_of(piece.index)
    # A later piece of a split chain begins within the completion.
    start, stop = max(piece.first - len(prompt), 0), piece.stop - len(prompt)
    completion = piece.block.tokens_of(piece.index)[start + piece.skipped : stop + piece.skipped]
    return np.concatenate([prompt[piece.first :], completion])


def _features(pieces: Sequence[PackedPiece], num_losses_D: Int64, wanted: StageFeatures) -> PackFeatures:
    bases_D = np.cumsum(num_losses_D) - num_losses_D
    parts = []
    for piece, base in zip(pieces, bases_D.tolist(), strict=True):
        assert piece.block.features is not None
        start = _first_loss_token(piece)
        row = piece.block.features[piece.index]
        num_before = piece.first + piece.skipped
        parts.append(PieceFeatures(row, base, start, start + piece.stop - piece.loss, num_before))
    return pack_features(parts, wanted)


def _first_loss_token(piece: PackedPiece) -> int:
    return piece.loss - len(piece.block.prompt_of(piece.index)) + piece.skipped


def _signals(pieces: Sequence[PackedPiece]) -> Signals | None:
    """Signals of the loss tokens, one after the other; None for text alone."""
    parts = []
    for piece in pieces:
        first = _first_loss_token(piece)
        part = piece.block.signals_of(piece.index, first, first + piece.stop - piece.loss)
        if part is None:
            return None
        parts.append(part)
    return Signals.concat(parts)


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
        # Without projection teacher and student have the same tokens: each is a chunk.
        return np.arange(len(signals.topk_n_T), dtype=np.int32), signals.sampled_logprob_T, None
    is_common_N = np.concatenate([common_N for common_N, _ in found])
    logprob_N = np.concatenate([logprobs_N for _, logprobs_N in found])
    # A piece that begins inside a chunk begins one of its own: that part has no probability and is left out below.
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
