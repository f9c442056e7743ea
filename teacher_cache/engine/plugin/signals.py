"""What is worth knowing of whole distributions, as functions of logits: torch alone, whichever of vLLM's runners calls.

In: raw logits, the tokens sampled from them. Out: rows of engine.row_layout, [sampled | top | draws | entropy |
log-partitions | mark]. Nothing of the size of the logits is sorted or normalised: the vocabulary is cut into stripes
whose maxima say where the top can be and whose sums say where a draw falls; one exponential of each logit serves
normaliser, entropy and draws.

Shape legend: N rows, V vocabulary, K top candidates, M draws, R ids a stripe, C stripes (stripe c holds the ids c,
C + c, 2C + c, ...: maxima and sums then run along memory), W columns after the sampled token's.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from teacher_cache.engine.row_layout import MARK, Layout

STRIPE_IDS = 64
"""R. The top 64 of 49,152 come out of 768 maxima and 64 stripes, 4,096 logits."""
CPU_CHUNK_LOGITS = 1 << 19
GPU_CHUNK_LOGITS = 1 << 25
"""Logits looked at together, three float32 buffers of them: 6 MiB stay in a CPU's cache, 384 MiB fill a GPU."""

LOG2_E = math.log2(math.e)
MIN_LOG2 = -200.0
"""Powers of two below 2^-149 are zero in float32; a finite bound, times the largest temperature, keeps 0 · -inf out of
the entropy.
"""
MAX_UNIFORM = 1.0 - 2.0**-40
"""Keeps target = uniform · total below the total whatever is rounded."""


@dataclass(frozen=True, slots=True)
class Rows:
    """ids int32 [N, W+1], logprobs float32 [N, W+1], ranks int64 [N]: the number of logits not below the sampled one,
    as vLLM counts.
    """

    ids: Tensor
    logprobs: Tensor
    ranks: Tensor


def signal_rows(
    logits_NV: Tensor, sampled_N: Tensor, layout: Layout, seeds_N: Tensor | None, positions_N: Tensor | None
) -> Rows:
    """Rows of `layout` from raw logits (any floating type; computed in float32, left as they are).

    `sampled_N`, `seeds_N` and `positions_N` are int64; the latter two are needed for draws, which depend on them and
    on the row's logits alone: a token's place in its sequence and its request's seed give the same draws in any batch.
    Draws are with replacement from p restricted to outside the top (Sparse Logit Sampling, arXiv 2503.16870, beside
    exact candidates); where nothing outside has mass in float32, every draw is id 0 with log probability -inf. A row
    with NaN gives NaN. Raises ValueError where the layout does not fit V.
    """
    num_rows, vocab_size = logits_NV.shape
    if layout.top > vocab_size:
        raise ValueError(f"top={layout.top} exceeds the vocabulary of {vocab_size}")
    if layout.draws and (seeds_N is None or positions_N is None):
        raise ValueError(f"draws={layout.draws} need a seed and a position for each row")
    budget = CPU_CHUNK_LOGITS if logits_NV.device.type == "cpu" else GPU_CHUNK_LOGITS
    step = max(1, budget // vocab_size)
    chunks = []
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        uniforms = None
        if layout.draws and seeds_N is not None and positions_N is not None:
            uniforms = uniforms_of(seeds_N[rows], positions_N[rows], layout.draws)
        chunks.append(_chunk_rows(logits_NV[rows].float(), sampled_N[rows], layout, uniforms))
    if len(chunks) == 1:
        return chunks[0]
    return Rows(
        torch.cat([one.ids for one in chunks]) if chunks else sampled_N.new_zeros((0, layout.width + 1)).int(),
        torch.cat([one.logprobs for one in chunks]) if chunks else logits_NV.new_zeros((0, layout.width + 1)).float(),
        torch.cat([one.ranks for one in chunks]) if chunks else sampled_N.new_zeros(0),
    )


def uniforms_of(seeds_N: Tensor, positions_N: Tensor, num: int) -> Tensor:
    """Uniform draws [N, num] float64 in [0, 1), a pure function of seed and position (int64).

    The first `num` outputs of SplitMix64 (Steele, Lea and Flood 2014, OOPSLA) started at mix(mix(seed) + position · γ).
    """
    start_N = _mix(_mix(seeds_N) + positions_N * _GAMMA)
    steps_M = torch.arange(1, num + 1, device=seeds_N.device) * _GAMMA
    bits_NM = _mix(start_N[:, None] + steps_M[None, :])
    # The upper 53 bits are all that a double holds.
    return _shifted(bits_NM, 11).double() * 2.0**-53


def top_candidates(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and ids (int64) [N, K] of the K largest logits, falling; among equal ones any.

    At most K stripes hold them, those with the largest maxima: a logit in another stripe has K maxima not below it.
    """
    num_rows, vocab_size = logits_NV.shape
    num_stripes = vocab_size // STRIPE_IDS
    # Too few stripes to leave many of them out.
    if num_stripes <= 2 * k:
        top = logits_NV.topk(k, dim=-1)
        return top.values, top.indices
    even = num_stripes * STRIPE_IDS
    maxima_NC = logits_NV[:, :even].view(num_rows, STRIPE_IDS, num_stripes).amax(dim=1)
    stripe_NK = maxima_NC.topk(k, dim=-1, sorted=False).indices
    offsets_R = torch.arange(STRIPE_IDS, device=logits_NV.device) * num_stripes
    ids_NA = (stripe_NK[:, :, None] + offsets_R).view(num_rows, -1)
    if even < vocab_size:
        rest = torch.arange(even, vocab_size, device=logits_NV.device).expand(num_rows, -1)
        ids_NA = torch.cat([ids_NA, rest], dim=1)
    top = logits_NV.gather(1, ids_NA).topk(k, dim=-1)
    return top.values, ids_NA.gather(1, top.indices)


def _chunk_rows(logits_NV: Tensor, sampled_N: Tensor, layout: Layout, uniforms_NM: Tensor | None) -> Rows:
    sampled_N1 = sampled_N[:, None]
    sampled_logits_N1 = logits_NV.gather(1, sampled_N1)
    top_logits_NK, top_ids_NK = top_candidates(logits_NV, layout.top)
    # The top's first is the maximum: no further pass over V.
    max_N1 = top_logits_NK[:, :1]
    floor = MIN_LOG2 * max((1.0, *layout.temperatures))
    log2_NV = (logits_NV - max_N1).mul_(LOG2_E).clamp_(min=floor)
    weights_NV = log2_NV.exp2()
    total_N1 = weights_NV.sum(dim=1, keepdim=True)
    log_total_N1 = total_N1.log()
    # -sum p log p with p = weight / total and log weight = log2 · ln 2, all terms of one sign.
    mean_log_N = torch.linalg.vecdot(weights_NV, log2_NV) / LOG2_E / total_N1[:, 0]
    # Where one token has all the mass, rounding can leave the difference just below 0.
    scalars = [(log_total_N1[:, 0] - mean_log_N).clamp_(min=0.0)]
    ids, logits = [sampled_N1, top_ids_NK], [sampled_logits_N1, top_logits_NK]
    if uniforms_NM is not None:
        draw_ids_NM, drawn_N1 = draws_outside(weights_NV, top_ids_NK, uniforms_NM)
        ids.append(draw_ids_NM.where(drawn_N1, 0))
        logits.append(logits_NV.gather(1, draw_ids_NM).where(drawn_N1, -math.inf))
    for tau in layout.temperatures:
        # The weights are no longer needed: their buffer takes the next ones.
        torch.mul(log2_NV, 1.0 / tau, out=weights_NV).exp2_()
        scalars.append(weights_NV.sum(dim=1).log() - log_total_N1[:, 0] / tau)
    scalars.append(torch.full_like(scalars[0], MARK))
    scalars_NS = torch.stack(scalars, dim=1)
    logprobs = torch.cat([torch.cat(logits, dim=1) - max_N1 - log_total_N1, scalars_NS], dim=1)
    ids.append(torch.zeros_like(scalars_NS, dtype=torch.int64))
    ranks_N = _ranks(logits_NV, sampled_logits_N1, top_logits_NK)
    return Rows(torch.cat(ids, dim=1).int(), logprobs, ranks_N)


def draws_outside(weights_NV: Tensor, top_ids_NK: Tensor, uniforms_NM: Tensor) -> tuple[Tensor, Tensor]:
    """Ids (int64) [N, M] drawn with replacement by weight from outside the top, and whether there was weight [N, 1].

    By inverting the distribution function twice, over stripes and within one. Sets the top's weights to zero.
    """
    # In place: the chunk's weights are no longer needed whole (see _chunk_rows).
    weights_NV.scatter_(1, top_ids_NK, 0.0)
    num_rows, vocab_size = weights_NV.shape
    num_stripes = max(1, vocab_size // STRIPE_IDS)
    even = vocab_size // num_stripes * num_stripes
    sums_NC = weights_NV[:, :even].view(num_rows, -1, num_stripes).sum(dim=1)
    num_ids = even // num_stripes
    if even < vocab_size:
        # What does not fill a row of stripes is one more stripe.
        sums_NC = torch.cat([sums_NC, weights_NV[:, even:].sum(dim=1, keepdim=True)], dim=1)
        num_ids = max(num_ids, vocab_size - even)
    # In float64: in float32 the running sum would swallow small stripes at its end, which would then never be drawn.
    below_NC = sums_NC.double().cumsum(dim=1)
    target_NM = uniforms_NM.clamp(max=MAX_UNIFORM) * below_NC[:, -1:]
    # The first stripe whose running sum exceeds the target: its own sum is positive. NaN ends past the last.
    stripe_NM = torch.searchsorted(below_NC, target_NM, right=True).clamp_(max=sums_NC.shape[1] - 1)
    sum_NM = sums_NC.gather(1, stripe_NM).double()
    # Where the target lies within its stripe, from 0 to 1: one uniform number serves both searches.
    within_NM = 1.0 - (below_NC.gather(1, stripe_NM) - target_NM) / sum_NM
    offsets = torch.arange(num_ids, device=weights_NV.device)
    ids_NMR = stripe_NM[:, :, None] + offsets * num_stripes
    ids_NMR = ids_NMR.where(stripe_NM[:, :, None] < num_stripes, even + offsets)
    # The last stripe, of the remaining rows, may be shorter or longer than the others.
    is_id = ids_NMR < (torch.where(stripe_NM < num_stripes, even, vocab_size))[:, :, None]
    # Places beyond the last id read some weight here, which is then set to 0.
    ids_NMR = ids_NMR.clamp_(max=vocab_size - 1)
    members = weights_NV.gather(1, ids_NMR.view(num_rows, -1)).view(ids_NMR.shape).double().where(is_id, 0.0)
    below_NMR = members.cumsum(dim=-1)
    target = within_NM.clamp(0.0, MAX_UNIFORM)[:, :, None] * below_NMR[:, :, -1:]
    place = torch.searchsorted(below_NMR, target, right=True).clamp_(max=num_ids - 1)
    return ids_NMR.gather(-1, place)[:, :, 0], below_NC[:, -1:] > 0


def _ranks(logits_NV: Tensor, sampled_N1: Tensor, top_logits_NK: Tensor) -> Tensor:
    """Logits not below the sampled one. Above the last of the top, the top itself tells."""
    if logits_NV.device.type != "cpu":
        # One pass on a GPU is cheaper than finding the rows that need it, which would wait for the device.
        return (logits_NV >= sampled_N1).sum(dim=1)
    ranks_N = (top_logits_NK >= sampled_N1).sum(dim=1)
    beyond = (sampled_N1[:, 0] <= top_logits_NK[:, -1]).nonzero()[:, 0]
    if len(beyond):
        ranks_N[beyond] = (logits_NV[beyond] >= sampled_N1[beyond]).sum(dim=1)
    return ranks_N


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >= 1 << 63 else bits


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser; int64 arithmetic wraps like the unsigned one."""
    bits = (bits ^ _shifted(bits, 30)) * _MIX_1
    bits = (bits ^ _shifted(bits, 27)) * _MIX_2
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, num: int) -> Tensor:
    """A logical shift to the right: torch's own copies the sign."""
    return (bits >> num) & ((1 << (64 - num)) - 1)
