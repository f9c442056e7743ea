"""Losses below the head: states between layers, similarities of a document's tokens, and where tokens attend.

In: what one forward pass of the student recorded, and the teacher's features of the same positions. Out: sums in nats
(or the loss's own unit) with gradients. Cost: O(P H D) for states; l^2 products of a document's l tokens for
similarities and attention, in blocks that are computed again in the backward pass, so that no [l, l] matrix is kept.

Documents of a pack never meet: similarities and attention are computed document by document.

    P tokens of the pack with features, L tokens of the pack, l of a document, X of a block, J losses
    H student's width, D teacher's, A heads, B key-value heads, E head width, m stored positions
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from torch.utils.checkpoint import checkpoint

from student_train.losses.below import AttentionKL, HiddenCosine, HiddenMSE, HiddenRelations, ProjectedLoss
from student_train.losses.divergences import NO_MASS, FeatureLoss, kl
from student_train.losses.whole_teacher import TeacherHead

RELATION_SHARPNESS = 8.0
"""What MiniLM's relations between unit-variance states in heads of width 64 have: 64 cos / sqrt(64)."""
LEAST_NORM = 1e-3
"""States of a repeated token may all be the same: what is left of them without their mean is rounding, whose direction
would get a gradient of any size.
"""
BLOCK_NUMBERS = 1 << 22
"""Largest block of similarities or attention, in numbers."""


@dataclass(frozen=True)
class Basis:
    """States are coefficients @ vectors + mean."""

    mean_D: Tensor
    vectors_RD: Tensor


@dataclass(frozen=True)
class TeacherTensors:
    """Constants of a feature set on this rank's device: never trained, in no checkpoint.

    Attributes:
        width: D.
        head: None where no loss needs it.
        bases: by layer, "hidden" for the last state; states of other layers are stored whole.
        heads: stored query heads by layer.
        num_heads: query heads of a layer, stored or not; 0 without attention.
    """

    width: int
    head: TeacherHead | None
    bases: Mapping[int | str, Basis]
    heads: Mapping[int, tuple[int, ...]]
    num_heads: int

    def expand(self, stored_PR: Tensor, layer: int | str) -> Tensor:
        """States [P, D] in float32."""
        if not len(stored_PR):
            return stored_PR.new_zeros(0, self.width)
        basis = self.bases.get(layer)
        return stored_PR if basis is None else torch.addmm(basis.mean_D, stored_PR, basis.vectors_RD)


@dataclass(frozen=True)
class LayerAttention:
    """Where a layer's stored heads attend, as probabilities; slots of weight 0 are padding.

    keys_PAm int64, positions in the document; weights_PAm; rest_PA of all other positions up to the query.
    """

    heads: tuple[int, ...]
    keys_PAm: Tensor
    weights_PAm: Tensor
    rest_PA: Tensor


@dataclass(frozen=True)
class FeatureTargets:
    """The teacher's features of P tokens of a pack.

    Attributes:
        positions_P: int64, place in the pack of the state that predicts the token.
        weights_P: float32, token weights; scaled so that a sum over the batch, divided by the weight of all its loss
            tokens, is a mean over tokens with features.
        attention_weights_P: the same for attention, 0 in documents that begin inside a chain.
        counts: tokens with features in each document.
        num_heads: the teacher's query heads in a layer.
    """

    positions_P: Tensor
    weights_P: Tensor
    attention_weights_P: Tensor
    counts: tuple[int, ...]
    layers: Mapping[int, Tensor]
    attention: Mapping[int, LayerAttention]
    num_heads: int


@dataclass
class Recorded:
    """What a forward pass of the student leaves: states [1, L, H] after chosen layers, queries and keys of others.

    Attributes:
        layers, attention: student layers to record; states count from 1, attention from 0.
        is_open: False outside the forward pass: gradient checkpointing runs layers again in the backward pass.
    """

    layers: frozenset[int]
    attention: frozenset[int]
    is_open: bool = True
    states: dict[int, list[Tensor]] = field(default_factory=dict)
    queries_keys: dict[int, tuple[Tensor, Tensor, float]] = field(default_factory=dict)

    def add_state(self, layer: int, state_1LH: Tensor) -> None:
        """Adds the states after a layer, of the whole pack or of its next document."""
        if self.is_open and layer in self.layers:
            self.states.setdefault(layer, []).append(state_1LH)

    def add_attention(self, layer: int, query_1ALE: Tensor, key_1BLE: Tensor, scaling: float) -> None:
        """Adds the queries and keys of a layer, rotated as its product uses them."""
        if self.is_open and layer in self.attention:
            self.queries_keys[layer] = (query_1ALE, key_1BLE, scaling)


def feature_sums(
    terms: Sequence[FeatureLoss],
    recorded: Recorded,
    targets: FeatureTargets,
    document_lengths: Sequence[int],
    projections: torch.nn.ModuleDict,
) -> tuple[Tensor, Tensor]:
    """(loss_sum, term_sums_J) as in LossSums, float32; the first carries gradients.

    Every rank calls every projection, whether or not it has features: ZeRO 3 gathers there.
    """
    # In float32 whatever autocast encloses this, as for the losses on the head.
    with torch.autocast(targets.weights_P.device.type, enabled=False):
        sums = [_sum(term, recorded, targets, document_lengths, projections) for term in terms]
    loss_sum = torch.stack([term.weight * one for term, one in zip(terms, sums, strict=True)]).sum()
    return loss_sum, torch.stack(sums).detach()


def projection_key(teacher_layer: int, student_layer: int) -> str:
    """Name of the learned map between a pair of layers."""
    return f"{teacher_layer}-{student_layer}"


def _sum(
    term: FeatureLoss,
    recorded: Recorded,
    targets: FeatureTargets,
    document_lengths: Sequence[int],
    projections: torch.nn.ModuleDict,
) -> Tensor:
    pairs = term.layers or ()
    if isinstance(term, AttentionKL):
        values = [
            attention_nats(recorded.queries_keys[mine], targets, teacher, document_lengths) for teacher, mine in pairs
        ]
        return (targets.attention_weights_P * torch.stack(values).mean(dim=0)).sum()
    values = []
    for teacher, mine in pairs:
        state_LH = torch.cat(recorded.states[mine], dim=1)[0]
        student_PH = state_LH.index_select(0, targets.positions_P)
        if isinstance(term, ProjectedLoss) and term.project:
            student_PH = projections[projection_key(teacher, mine)](student_PH)
        values.append(hidden_values(term, student_PH.float(), targets.layers[teacher], targets.counts))
    return (targets.weights_P * torch.stack(values).mean(dim=0)).sum()


def hidden_values(term: FeatureLoss, student_PD: Tensor, teacher_PD: Tensor, counts: Sequence[int]) -> Tensor:
    """[P] of one pair of layers, without weights; `counts` tokens belong to each document."""
    match term:
        case HiddenMSE():
            error_P, size_P = ((student_PD - teacher_PD).square().mean(dim=1), teacher_PD.square().mean(dim=1))
            # A state of nothing but zeros has no scale of its own.
            return error_P / size_P.where(size_P > 0.0, 1.0)
        case HiddenCosine():
            return 1.0 - cosine_similarity(student_PD, teacher_PD, dim=1)
        case HiddenRelations():
            documents = zip(student_PD.split(list(counts)), teacher_PD.split(list(counts)), strict=True)
            return torch.cat([_relation_nats(*document) for document in documents])
        case _:
            raise AssertionError(term)


def _relation_nats(student_lH: Tensor, teacher_lD: Tensor) -> Tensor:
    """[l] of one document."""
    if len(student_lH) < 2:
        # Nothing to be similar to, but the graph must reach the student on every rank.
        return 0.0 * student_lH.sum(dim=1)
    # States of a model share one large direction: without their mean all cosines are near 1.
    student_lH, teacher_lD = (
        normalize(one - one.mean(dim=0, keepdim=True), dim=1, eps=LEAST_NORM) for one in (student_lH, teacher_lD)
    )

    def block(first: int, stop: int, student_lH: Tensor, teacher_lD: Tensor) -> Tensor:
        to_itself_X = torch.arange(first, stop, device=student_lH.device).unsqueeze(1)
        sides = [
            (RELATION_SHARPNESS * one[first:stop] @ one.t()).scatter(1, to_itself_X, NO_MASS).log_softmax(dim=1)
            for one in (teacher_lD, student_lH)
        ]
        return kl(sides[0], sides[1])

    return _in_blocks(block, len(student_lH), len(student_lH), student_lH, teacher_lD)


def attention_nats(
    queries_keys: tuple[Tensor, Tensor, float], targets: FeatureTargets, layer: int, document_lengths: Sequence[int]
) -> Tensor:
    """[P], the mean over the stored heads of `layer`, of one pair of layers; without weights."""
    query_1ALE, key_1BLE, scaling = queries_keys
    stored = targets.attention[layer]
    num_heads, num_groups = query_1ALE.shape[1], query_1ALE.shape[1] // key_1BLE.shape[1]
    # Teacher head 6 of 8 is compared with head 3 of 4.
    mine = [head * num_heads // targets.num_heads for head in stored.heads]
    query_ALE, key_ALE = query_1ALE[0, mine], key_1BLE[0, [head // num_groups for head in mine]]
    # An empty part in front: without any document with features the graph must reach the student all the same.
    values = [0.0 * query_ALE[:, :0].float().sum(dim=(0, 2))]
    starts = accumulate(document_lengths, initial=0)
    rows = accumulate(targets.counts, initial=0)
    # `starts` and `rows` have one entry more than there are documents.
    for start, length, row, count in zip(starts, document_lengths, rows, targets.counts, strict=False):
        if count:
            own = slice(row, row + count)
            position_l = targets.positions_P[own] - start
            values.append(
                _document_attention(
                    query_ALE[:, start : start + length].index_select(1, position_l) * scaling,
                    key_ALE[:, start : start + length],
                    position_l,
                    stored.keys_PAm[own].transpose(0, 1),
                    stored.weights_PAm[own].transpose(0, 1),
                    stored.rest_PA[own].t(),
                )
            )
    return torch.cat(values)


def _document_attention(
    query_AlE: Tensor, key_AkE: Tensor, position_l: Tensor, keys_Alm: Tensor, weights_Alm: Tensor, rest_Al: Tensor
) -> Tensor:
    """[l] of the l queries with features, over the document's k keys."""
    num_keys = key_AkE.shape[1]
    log_stored_Alm, log_rest_Al = (_log(one) for one in (weights_Alm, rest_Al))

    def block(first: int, stop: int, query_AlE: Tensor, key_AkE: Tensor) -> Tensor:
        rows = slice(first, stop)
        score_AXk = torch.bmm(query_AlE[:, rows].float(), key_AkE.float().transpose(1, 2))
        is_later_Xk = torch.arange(num_keys, device=score_AXk.device) > position_l[rows].unsqueeze(1)
        log_q_AXk = score_AXk.masked_fill(is_later_Xk, NO_MASS).log_softmax(dim=2)
        keys_AXm, is_stored_AXm = keys_Alm[:, rows], weights_Alm[:, rows] > 0.0
        log_q_AXm = log_q_AXk.gather(2, keys_AXm)
        # One more column takes the padding, which would otherwise hide a real key.
        is_listed = torch.zeros(*log_q_AXk.shape[:2], num_keys + 1, dtype=torch.bool, device=score_AXk.device)
        is_listed.scatter_(2, keys_AXm.where(is_stored_AXm, num_keys), True)
        # Finite, so that a query whose keys are all listed has a gradient.
        log_q_rest_AX = log_q_AXk.masked_fill(is_listed[..., :-1], NO_MASS).logsumexp(dim=2).clamp(min=NO_MASS)
        teacher_AXB = torch.cat([log_stored_Alm[:, rows], log_rest_Al[:, rows].unsqueeze(2)], dim=2)
        student_AXB = torch.cat([log_q_AXm.where(is_stored_AXm, NO_MASS), log_q_rest_AX.unsqueeze(2)], dim=2)
        return kl(teacher_AXB.flatten(0, 1), student_AXB.flatten(0, 1)).view(student_AXB.shape[:2]).mean(dim=0)

    return _in_blocks(block, query_AlE.shape[1], len(query_AlE) * num_keys, query_AlE, key_AkE)


def _log(probability: Tensor) -> Tensor:
    return probability.log().clamp(min=NO_MASS)


def _in_blocks(block: Callable[..., Tensor], num_rows: int, numbers_per_row: int, *inputs: Tensor) -> Tensor:
    """`block(first, stop, *inputs)` for all rows; its matrices are freed and computed again in the backward pass."""
    step = max(1, BLOCK_NUMBERS // numbers_per_row)
    # Blocks draw nothing at random, so there is no generator state to restore before they run again.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat(
        [
            checkpoint(block, first, min(first + step, num_rows), *inputs, **options)
            for first in range(0, num_rows, step)
        ]
    )
