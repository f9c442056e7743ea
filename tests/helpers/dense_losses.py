"""What the losses are tested against: dense float64 definitions over the whole vocabulary, and small inputs.

N loss tokens, H hidden, V vocabulary, K support, M draws, R LoRA rank
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from student_train.losses.divergences import LossName, LossTerm
from student_train.losses.targets import SparseTargets, TailDraws

N, H, V, K, M = 13, 8, 37, 5, 4


def head_tensors(seed: int = 0, num_vocab: int = V, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """float64 hidden [N, H] and weight [V, H] that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(N, H, generator=generator, dtype=torch.float64) * scale
    weight_VH = torch.randn(num_vocab, H, generator=generator, dtype=torch.float64)
    return hidden_NH.requires_grad_(), weight_VH.requires_grad_()


def teacher_logprobs(seed: int = 1, num_vocab: int = V, sharpness: float = 2.0) -> Tensor:
    """Dense float64 log probabilities [N, V]."""
    generator = torch.Generator().manual_seed(seed)
    logits_NV = torch.randn(N, num_vocab, generator=generator, dtype=torch.float64)
    return torch.log_softmax(sharpness * logits_NV, dim=1)


def sparse(dense_NV: Tensor, num_support: int = K, padding: int = 0) -> SparseTargets:
    """The top `num_support` of each row, tail, sampled token, and `padding` slots that repeat a real id.

    Row 0 keeps a single entry, so that supports of several sizes share a batch.
    """
    num_tokens, num_vocab = dense_NV.shape
    logprobs_NK, ids_NK = dense_NV.topk(num_support, dim=1)
    logprobs_NK[0, 1:] = -torch.inf
    ids_NK[0, 1:] = ids_NK[0, 0]
    ids_NK = torch.cat([ids_NK, ids_NK[:, :1].expand(-1, padding)], dim=1)
    logprobs_NK = torch.cat([logprobs_NK, logprobs_NK.new_full((num_tokens, padding), -torch.inf)], dim=1)
    is_outside_NV = ~support_mask(ids_NK, logprobs_NK, num_vocab)
    tail_N = dense_NV.masked_fill(~is_outside_NV, -torch.inf).logsumexp(dim=1)
    generator = torch.Generator().manual_seed(7)
    sampled_N = torch.multinomial(dense_NV.exp(), 1, generator=generator).flatten()
    return SparseTargets(ids_NK.int(), logprobs_NK, tail_N, sampled_N)


def support_mask(ids_NK: Tensor, logprobs_NK: Tensor, num_vocab: int) -> Tensor:
    mask_NV = torch.zeros(ids_NK.shape[0], num_vocab, dtype=torch.bool)
    for row, (ids_K, logprobs_K) in enumerate(zip(ids_NK.tolist(), logprobs_NK.tolist(), strict=True)):
        for token_id, logprob in zip(ids_K, logprobs_K, strict=True):
            if logprob > -math.inf:
                mask_NV[row, token_id] = True
    return mask_NV


def with_draws(targets: SparseTargets, dense_NV: Tensor, num_draws: int = M, seed: int = 3) -> SparseTargets:
    """`num_draws` from each row's tail, with replacement, each standing for an equal share of its mass."""
    is_outside_NV = ~support_mask(targets.ids_NK, targets.logprobs_NK, dense_NV.shape[1])
    generator = torch.Generator().manual_seed(seed)
    tail_NV = dense_NV.exp() * is_outside_NV
    ids_NM = torch.multinomial(tail_NV, num_draws, replacement=True, generator=generator)
    weights_NM = (tail_NV.sum(dim=1, keepdim=True) / num_draws).expand(-1, num_draws)
    return replace(targets, draws=TailDraws(ids_NM, weights_NM, dense_NV.gather(1, ids_NM)))


def dense_loss(name: LossName, logits_NV: Tensor, dense_NV: Tensor, targets: SparseTargets) -> Tensor:
    """[N] nats, straight from the definition, with everything [N, V] materialised. `dense_NV` is at temperature 1."""
    if name.startswith("cross_entropy"):
        against_N = {
            "cross_entropy": targets.sampled_ids_N,
            "cross_entropy_argmax": targets.ids_NK[:, 0].long(),
        }[name]
        return torch.nn.functional.cross_entropy(logits_NV, against_N, reduction="none")
    tau = targets.temperature
    log_q_NV = torch.log_softmax(logits_NV / tau, dim=1)
    log_p_NV = torch.log_softmax(dense_NV / tau, dim=1)
    mask_NV = support_mask(targets.ids_NK, targets.logprobs_NK, dense_NV.shape[1])
    p_NV, q_NV = log_p_NV.exp(), log_q_NV.exp()
    on_support_N = (mask_NV * p_NV * (log_p_NV - log_q_NV)).sum(dim=1)
    if name == "forward_kl_truncated":
        return tau**2 * on_support_N
    if name == "forward_kl_renormalised":
        mass_N1 = (mask_NV * p_NV).sum(dim=1, keepdim=True)
        return tau**2 * (mask_NV * (p_NV / mass_N1) * (log_p_NV - mass_N1.log() - log_q_NV)).sum(dim=1)
    if name.endswith(("_sampled_tail", "_stored_tail")) and targets.draws is not None:
        ids_NM = targets.draws.ids_NM
        mass_NM = targets.draws.weights_NM * (log_p_NV - dense_NV).gather(1, ids_NM).exp()
        log_ratio_NM = (log_q_NV - log_p_NV).gather(1, ids_NM)
        slopes = tail_slopes(name)
        tails = [(~mask_NV * probs_NV).sum(dim=1) for probs_NV in (p_NV, q_NV)]
        on_support_N = per_id(name, log_p_NV, log_q_NV).masked_fill(~mask_NV, 0.0).sum(dim=1)
        bent_NM = (
            per_id(name, torch.zeros_like(log_ratio_NM), log_ratio_NM) - slopes[0] - slopes[1] * log_ratio_NM.exp()
        )
        return tau**2 * (on_support_N + slopes[0] * tails[0] + slopes[1] * tails[1] + (mass_NM * bent_NM).sum(dim=1))
    # Divergences of the merged distributions, one token at a time, the tail as one more outcome.
    apart_NV = mask_NV.clone()
    if targets.draws is not None and name == "reverse_kl_tail_bucket":
        apart_NV.scatter_(1, targets.draws.ids_NM, True)
    values = []
    for p_V, q_V, stored_V, apart_V in zip(p_NV, q_NV, mask_NV, apart_NV, strict=True):
        # What is left of the teacher's tail beside drawn ids counts as a 32nd of the tail at least.
        p_left = (
            torch.maximum(p_V[~apart_V].sum(), p_V[~stored_V].sum() / 32)
            if apart_V.sum() > stored_V.sum()
            else p_V[~apart_V].sum()
        )
        outcomes = [(p_V[apart_V], q_V[apart_V])]
        if not apart_V.all():
            outcomes.append((p_left.reshape(1), q_V[~apart_V].sum().reshape(1)))
        p_B, q_B = (torch.cat(parts) for parts in zip(*outcomes, strict=True))
        values.append(merged_divergence(name, p_B, q_B))
    return tau**2 * torch.stack(values)


def per_id(name: LossName, log_p: Tensor, log_q: Tensor) -> Tensor:
    """What each id adds to a divergence."""
    p, q = log_p.exp(), log_q.exp()
    match name:
        case "forward_kl_stored_tail" | "forward_kl_sampled_tail":
            return p * (log_p - log_q)
        case "jsd_stored_tail":
            log_m = (0.3 * p + 0.7 * q).log()
            return 0.3 * p * (log_p - log_m) + 0.7 * q * (log_q - log_m)
        case "skewed_forward_kl_stored_tail":
            return p * (log_p - (0.2 * p + 0.8 * q).log())
        case "skewed_reverse_kl_stored_tail":
            return q * (log_q - (0.2 * q + 0.8 * p).log())
        case "total_variation_stored_tail":
            return (p - q).abs() / 2
        case _:
            raise AssertionError(name)


def tail_slopes(name: LossName) -> tuple[float, float]:
    """`per_id` a unit of p where q is 0, and a unit of q where p is 0; 0 where that is infinite."""
    found = {
        "jsd_stored_tail": (0.3 * math.log(1 / 0.3), 0.7 * math.log(1 / 0.7)),
        "skewed_forward_kl_stored_tail": (math.log(1 / 0.2), 0.0),
        "skewed_reverse_kl_stored_tail": (0.0, math.log(1 / 0.2)),
        "total_variation_stored_tail": (0.5, 0.5),
    }
    return found.get(name, (0.0, 0.0))


def merged_divergence(name: LossName, p_B: Tensor, q_B: Tensor) -> Tensor:
    def kl(left_B: Tensor, right_B: Tensor) -> Tensor:
        return (left_B * (left_B / right_B).log())[left_B > 0].sum()

    match name:
        case "forward_kl_tail_bucket" | "forward_kl_stored_tail" | "forward_kl_sampled_tail":
            return kl(p_B, q_B)
        case "reverse_kl_tail_bucket":
            return kl(q_B, p_B)
        case "jsd_stored_tail":
            return 0.3 * kl(p_B, 0.3 * p_B + 0.7 * q_B) + 0.7 * kl(q_B, 0.3 * p_B + 0.7 * q_B)
        case "skewed_forward_kl_stored_tail":
            return kl(p_B, 0.2 * p_B + 0.8 * q_B)
        case "skewed_reverse_kl_stored_tail":
            return kl(q_B, 0.2 * q_B + 0.8 * p_B)
        case "total_variation_stored_tail":
            return (p_B - q_B).abs().sum() / 2
        case _:
            raise AssertionError(name)


def term(name: LossName, weight: float = 1.0) -> LossTerm:
    """With the parameters that `merged_divergence` uses."""
    beta = 0.3 if name == "jsd_stored_tail" else None
    return LossTerm(name, weight, beta=beta, alpha=0.2 if name.startswith("skewed") else None)
