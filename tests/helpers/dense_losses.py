"""What the losses are tested against: dense float64 definitions over the whole vocabulary, and small inputs.

N loss tokens, H hidden, V vocabulary, K support, M draws, R LoRA rank
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from stillroom.schema.records import Signals
from student_train.losses.chunk import read_slots
from student_train.losses.divergences import (
    JSD,
    ChunkLikelihood,
    CrossEntropy,
    CrossEntropyArgmax,
    Divergence,
    ForwardKL,
    HeadLoss,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
    Spoken,
    Tail,
    TotalVariation,
)
from student_train.losses.own_words import DPO, TAID, AsymmetricLikelihood, PolicyGradient, StartKL, Unlikelihood
from student_train.losses.targets import ChainPairs, SparseTargets, StartBuckets, TailDraws, TextChunks

N, H, V, K, M = 13, 8, 37, 5, 4
CHUNK_IDS = torch.tensor([3, 3, 4, -1, -1, 6, 6, 6, 6, 6, 6, 8, 9])
"""Chunks of one, two and six tokens, and tokens in none."""
TAILS: tuple[Tail, ...] = ("stored", "bucket", "drop", "renormalise")


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
    """The top `num_support` of each row, tail, sampled token, chunks, and `padding` slots that repeat a real id.

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
    sizes_N = torch.linspace(0.3, 2.0, num_tokens, dtype=torch.float64)[CHUNK_IDS.clamp(min=0)]
    return SparseTargets(ids_NK.int(), logprobs_NK, tail_N, sampled_N, chunks=TextChunks.of(CHUNK_IDS, -sizes_N))


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


PAIR_IDS = torch.tensor([4, 4, 4, 4, 4, 4, 2, 2, 2, 2, 2, 0, 0])
PAIR_SIGNS = torch.tensor([1, 1, 1, -1, -1, -1, 1, 1, -1, -1, -1, 0, 0], dtype=torch.float64)
"""Two pairs of chains, right ones of 3 and 2 tokens, wrong ones of 3; two tokens in none."""


def with_own_words(targets: SparseTargets, dense_NV: Tensor, seed: int = 5) -> SparseTargets:
    """The targets of chains that a behaviour wrote, some of them wrong, with the log probabilities of a start."""
    start_NV = teacher_logprobs(seed, dense_NV.shape[1])
    # Near the dense teacher of another seed, so that ratios lie within and beyond every limit.
    behaviour_NV = teacher_logprobs(seed + 1, dense_NV.shape[1], sharpness=1.0)
    sampled_N1 = targets.sampled_ids_N.unsqueeze(1)
    behaviour_N = behaviour_NV.gather(1, sampled_N1).squeeze(1)
    behaviour_N[[2, 9]] = torch.nan
    num_support = targets.num_support
    _, slots_NS, rest_N = read_slots(start_NV.clone(), targets)
    return replace(
        targets,
        spoken=Spoken(
            dense_NV.gather(1, sampled_N1).squeeze(1), behaviour_N, start_NV.gather(1, sampled_N1).squeeze(1)
        ),
        is_negative_N=(PAIR_SIGNS < 0) | (torch.arange(N) == N - 1),
        start=StartBuckets(slots_NS[:, :num_support], slots_NS[:, num_support:], rest_N),
        pairs=ChainPairs(PAIR_IDS, PAIR_SIGNS),
    )


DIVERGENCES: tuple[Divergence, ...] = (
    *(ForwardKL(tail=tail) for tail in TAILS),
    *(JSD(tail=tail, beta=0.3) for tail in TAILS),
    *(ReverseKL(tail=tail) for tail in TAILS[:2]),
    *(SkewedForwardKL(tail=tail, alpha=0.2) for tail in TAILS[:2]),
    *(SkewedReverseKL(tail=tail, alpha=0.2) for tail in TAILS[:2]),
    *(TotalVariation(tail=tail) for tail in TAILS[:2]),
)
EVERY_LOSS: tuple[HeadLoss, ...] = (
    *DIVERGENCES,
    CrossEntropy(),
    CrossEntropyArgmax(),
    ChunkLikelihood(temperature=2.0),
)
ONE_OF_EACH: tuple[HeadLoss, ...] = tuple({loss.name: loss for loss in reversed(EVERY_LOSS)}.values())
"""With stored tails; a mix takes each name once."""


OWN_WORDS: tuple[HeadLoss, ...] = (
    PolicyGradient(max_ratio=1.5, max_advantage=2.0),
    AsymmetricLikelihood(alpha=0.3),
    Unlikelihood(),
    DPO(beta=0.5),
    *(TAID(tail=tail, interpolation=0.3) for tail in TAILS[:2]),
    *(StartKL(tail=tail) for tail in TAILS[:2]),
)
"""Losses on the student's own chains and on wrong ones, and with targets that move."""


def loss_id(loss: HeadLoss) -> str:
    """For pytest."""
    return f"{loss.name}-{loss.tail}" if isinstance(loss, Divergence) else loss.name


def dense_loss(loss: HeadLoss, logits_NV: Tensor, dense_NV: Tensor, targets: SparseTargets) -> Tensor:
    """[N] nats, straight from the definition, with everything [N, V] materialised. `dense_NV` is at temperature 1."""
    if isinstance(loss, ChunkLikelihood):
        return dense_chunk_likelihood(loss, logits_NV, targets)
    if isinstance(loss, PolicyGradient | AsymmetricLikelihood | Unlikelihood | DPO):
        return dense_own_words(loss, logits_NV, targets)
    if not isinstance(loss, Divergence):
        against_N = targets.sampled_ids_N if isinstance(loss, CrossEntropy) else targets.ids_NK[:, 0].long()
        return torch.nn.functional.cross_entropy(logits_NV, against_N, reduction="none")
    tau = targets.temperature
    log_q_NV = torch.log_softmax(logits_NV / tau, dim=1)
    log_p_NV = torch.log_softmax(dense_NV / tau, dim=1)
    mask_NV = support_mask(targets.ids_NK, targets.logprobs_NK, dense_NV.shape[1])
    p_NV, q_NV = log_p_NV.exp(), log_q_NV.exp()
    if loss.tail in ("drop", "renormalise"):
        mass_N1 = (mask_NV * p_NV).sum(dim=1, keepdim=True) if loss.tail == "renormalise" else torch.ones(N, 1)
        return tau**2 * per_id(loss, log_p_NV - mass_N1.log(), log_q_NV).masked_fill(~mask_NV, 0.0).sum(dim=1)
    if isinstance(loss, TAID):
        # The target of the definition over the whole vocabulary would merge otherwise: each side merges first.
        values_N = torch.stack([dense_taid(loss, *one) for one in merged(log_p_NV, log_q_NV, targets, loss)])
        assert targets.is_negative_N is not None
        return values_N.masked_fill(targets.is_negative_N, 0.0)
    if isinstance(loss, StartKL):
        log_p_NV = teacher_logprobs(5, dense_NV.shape[1])
        return torch.stack([(q_B * (q_B / p_B).log()).sum() for p_B, q_B in merged(log_p_NV, log_q_NV, targets, loss)])
    draws = targets.draws if loss.tail == "stored" else None
    if draws is not None and not isinstance(loss, ReverseKL):
        mass_NM = draws.weights_NM * (log_p_NV - dense_NV).gather(1, draws.ids_NM).exp()
        log_ratio_NM = (log_q_NV - log_p_NV).gather(1, draws.ids_NM)
        slopes = tail_slopes(loss)
        tails = [(~mask_NV * probs_NV).sum(dim=1) for probs_NV in (p_NV, q_NV)]
        on_support_N = per_id(loss, log_p_NV, log_q_NV).masked_fill(~mask_NV, 0.0).sum(dim=1)
        bent_NM = (
            per_id(loss, torch.zeros_like(log_ratio_NM), log_ratio_NM) - slopes[0] - slopes[1] * log_ratio_NM.exp()
        )
        return tau**2 * (on_support_N + slopes[0] * tails[0] + slopes[1] * tails[1] + (mass_NM * bent_NM).sum(dim=1))
    # Divergences of the merged distributions, one token at a time, the tail as one more outcome.
    apart_NV = mask_NV.clone()
    if draws is not None:
        apart_NV.scatter_(1, draws.ids_NM, True)
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
        values.append(per_id(loss, p_B.log(), q_B.log())[(p_B > 0) & (q_B > 0)].sum())
    return tau**2 * torch.stack(values)


def stored_kl(signals: Signals, logprobs_TV: Tensor) -> Tensor:
    """[T] KL(teacher, student) in nats over a cache's entries, the tail one outcome; `logprobs_TV` the student's."""
    ids_TK, teacher_TK = (torch.from_numpy(one) for one in signals.dense(int(signals.topk_n_T.max())))
    is_stored_TK, num_vocab = teacher_TK > -torch.inf, logprobs_TV.shape[1]
    teacher_TK, ids_TK = teacher_TK.to(logprobs_TV.dtype), ids_TK.long()
    per_entry_TK = teacher_TK.exp() * (teacher_TK - logprobs_TV.gather(1, ids_TK))
    is_listed_TV = torch.zeros(len(ids_TK), num_vocab + 1, dtype=torch.bool)
    is_listed_TV = is_listed_TV.scatter(1, ids_TK.where(is_stored_TK, num_vocab), True)[:, :num_vocab]
    student_tail_T = logprobs_TV.masked_fill(is_listed_TV, -torch.inf).logsumexp(dim=1)
    tail_T = torch.tensor(signals.tail_logmass_T, dtype=logprobs_TV.dtype).clamp(min=-32.0)
    return per_entry_TK.where(is_stored_TK, 0.0).sum(dim=1) + tail_T.exp() * (tail_T - student_tail_T)


def dense_chunk_likelihood(loss: ChunkLikelihood, logits_NV: Tensor, targets: SparseTargets) -> Tensor:
    """[N] nats of two outcomes, one chunk after the other."""
    assert targets.chunks is not None
    log_q_N = torch.log_softmax(logits_NV, dim=1).gather(1, targets.sampled_ids_N[:, None])[:, 0]
    values = torch.zeros(len(log_q_N), dtype=log_q_N.dtype)
    for chunk in set(targets.chunks.ids_N.tolist()) - {-1}:
        inside_N = targets.chunks.ids_N == chunk
        p = (targets.chunks.logprobs_N[inside_N][0] / loss.temperature).exp()
        q = (log_q_N[inside_N].sum() / loss.temperature).exp()
        value = loss.temperature * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
        values = values + inside_N * value / inside_N.sum()
    return values


def merged(log_p_NV: Tensor, log_q_NV: Tensor, targets: SparseTargets, loss: Divergence) -> list[tuple[Tensor, Tensor]]:
    """(p, q) of each token over the support, each drawn id if tails are stored, and all others as one outcome."""
    apart_NV = support_mask(targets.ids_NK, targets.logprobs_NK, log_p_NV.shape[1])
    stored_NV = apart_NV.clone()
    if targets.draws is not None and loss.tail == "stored":
        apart_NV.scatter_(1, targets.draws.ids_NM, True)
    found = []
    for p_V, q_V, stored_V, apart_V in zip(log_p_NV.exp(), log_q_NV.exp(), stored_NV, apart_NV, strict=True):
        outcomes = [(p_V[apart_V], q_V[apart_V])]
        if not apart_V.all():
            p_left = p_V[~apart_V].sum()
            if isinstance(loss, TAID):
                # What is left of the teacher's tail beside drawn ids counts as a 32nd of the tail at least.
                p_left = torch.maximum(p_left, p_V[~stored_V].sum() / 32)
            outcomes.append((p_left.view(1), q_V[~apart_V].sum().view(1)))
        p_B, q_B = (torch.cat(parts) for parts in zip(*outcomes, strict=True))
        found.append((p_B, q_B))
    return found


def dense_taid(loss: TAID, p_B: Tensor, q_B: Tensor) -> Tensor:
    target_B = q_B.detach() ** (1 - loss.interpolation) * p_B**loss.interpolation
    target_B = target_B / target_B.sum()
    return (target_B * (target_B / q_B).log()).sum()


def dense_own_words(loss: HeadLoss, logits_NV: Tensor, targets: SparseTargets) -> Tensor:
    """[N] nats, one token or pair after the other."""
    log_q_N = torch.log_softmax(logits_NV, dim=1).gather(1, targets.sampled_ids_N[:, None])[:, 0]
    spoken, is_negative_N = targets.spoken, targets.is_negative_N
    assert spoken.teacher_N is not None
    assert spoken.behaviour_N is not None
    assert spoken.start_N is not None
    assert is_negative_N is not None
    match loss:
        case AsymmetricLikelihood():
            return torch.where(is_negative_N, 0.3 * log_q_N, -log_q_N)
        case Unlikelihood():
            return torch.where(is_negative_N, -torch.log(1 - log_q_N.exp()), 0.0)
        case DPO():
            values = torch.zeros_like(log_q_N)
            for pair in (4, 2):
                inside_N = pair == PAIR_IDS
                moved_N = PAIR_SIGNS * (log_q_N - spoken.start_N)
                values = values + inside_N * -torch.log(torch.sigmoid(loss.beta * moved_N[inside_N].sum()))
            return values
        case _:
            assert isinstance(loss, PolicyGradient)
    found = []
    for log_q, log_p, log_b, is_negative in zip(
        log_q_N, spoken.teacher_N, spoken.behaviour_N, is_negative_N, strict=True
    ):
        if is_negative or log_b.isnan():
            found.append(log_q * 0)
            continue
        advantage = max(-2.0, min(2.0, float(log_p - log_b)))
        ratio = (log_q - log_b).exp()
        if ratio > 1.5:
            ratio = 1.5 + 1.5 * (log_q - log_b - math.log(1.5))
        # Two-sided: beyond a fifth in the advantage's direction nothing is left to learn.
        limited = ratio.clamp(max=1.2) if advantage > 0 else ratio.clamp(min=0.8)
        found.append(-limited * advantage)
    return torch.stack(found)


def per_id(loss: HeadLoss, log_p: Tensor, log_q: Tensor) -> Tensor:
    """What each id adds to a divergence."""
    p, q = log_p.exp(), log_q.exp()
    match loss:
        case ForwardKL():
            return p * (log_p - log_q)
        case ReverseKL():
            return q * (log_q - log_p)
        case JSD():
            log_m = (0.3 * p + 0.7 * q).log()
            return 0.3 * p * (log_p - log_m) + 0.7 * q * (log_q - log_m)
        case SkewedReverseKL():
            return q * (log_q - (0.2 * q + 0.8 * p).log())
        case SkewedForwardKL():
            return p * (log_p - (0.2 * p + 0.8 * q).log())
        case TotalVariation():
            return (p - q).abs() / 2
        case _:
            raise AssertionError(loss)


def tail_slopes(loss: HeadLoss) -> tuple[float, float]:
    """`per_id` a unit of p where q is 0, and a unit of q where p is 0; 0 where that is infinite."""
    match loss:
        case JSD():
            return 0.3 * math.log(1 / 0.3), 0.7 * math.log(1 / 0.7)
        case SkewedReverseKL():
            return 0.0, math.log(1 / 0.2)
        case SkewedForwardKL():
            return math.log(1 / 0.2), 0.0
        case TotalVariation():
            return 0.5, 0.5
        case _:
            return 0.0, 0.0
