"""How a student compares with a cached teacher on each token, for evaluation; chunked like the losses, no gradient.

In: hidden states [N, H], the head, sparse targets. Out: eight float32 numbers a token, in the order of TokenMetrics.
Cost: one matrix product, and two [chunk, V] buffers. Always at temperature 1.

    N loss tokens, C tokens of a chunk, V vocabulary
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from student_train.losses.chunk import chunk_losses
from student_train.losses.divergences import JSD, CrossEntropy, ForwardKL, ReverseKL
from student_train.losses.head_chunks import HeadChunks, HeadInputs
from student_train.losses.mix import LossMix
from student_train.losses.targets import SparseTargets, in_support

# Each loss is read by itself: the weights play no part.
_MIX = LossMix((CrossEntropy(), ForwardKL(), ReverseKL(), JSD()))


class TokenMetrics(NamedTuple):
    """Per token, float32 [N]. What compares with a distribution is nan where the targets hold none (text alone).

    Attributes:
        cross_entropy_N: -log q of the sampled token, nats.
        forward_kl_N: KL(teacher | student), nats: an unbiased estimate of the dense KL where the targets hold draws,
            otherwise at most the dense one.
        reverse_kl_N: KL(student | teacher) over support, distinct drawn ids and the rest, nats: at most the dense one.
        jsd_N: Jensen-Shannon divergence, nats ("knowledge retention"), estimated or bounded like forward_kl_N; at most
            log 2.
        agreement_N: 1 where the student's most likely token is the teacher's rank-0 token, else 0.
        confidence_N: the student's largest probability.
        correct_N: 1 where the student's most likely token is the sampled one, else 0. Calibration: confidence -
            correct.
        entropy_N: the student's entropy, nats.
    """

    cross_entropy_N: Tensor
    forward_kl_N: Tensor
    reverse_kl_N: Tensor
    jsd_N: Tensor
    agreement_N: Tensor
    confidence_N: Tensor
    correct_N: Tensor
    entropy_N: Tensor


@torch.no_grad()
def metrics_tensor(head: HeadInputs, targets: SparseTargets) -> Tensor:
    """float32 [8, N], rows in the order of TokenMetrics' attributes: the plain tensor a module's hooks understand."""
    chunks = HeadChunks(head)
    # Evaluations of stages with different temperatures must compare.
    targets = targets.at_temperature(1.0, None)
    metrics_8N = torch.full((8, targets.num_tokens), torch.nan, dtype=torch.float32, device=head.hidden_NH.device)
    with torch.autocast(targets.ids_NK.device.type, enabled=False):
        for start, stop in chunks.spans():
            metrics_8N[:, start:stop] = _chunk_metrics(chunks.logits(start, stop), targets.narrow(start, stop))
    return metrics_8N


def _chunk_metrics(logits_CV: Tensor, targets: SparseTargets) -> Tensor:
    """[8, C]; consumes the logits."""
    top_logit_C, top_id_C = logits_CV.max(dim=1)
    logsumexp_C = logits_CV.logsumexp(dim=1)
    softmax_CV = (logits_CV - logsumexp_C.unsqueeze(1)).exp_()
    # H = -sum q log q = logsumexp - sum q logit, as a batched dot product: no third [C, V].
    mean_logit_C = torch.bmm(softmax_CV.unsqueeze(1), logits_CV.unsqueeze(2)).flatten()
    del softmax_CV
    correct_C = (top_id_C == targets.sampled_ids_N).to(logits_CV.dtype)
    confidence_C = (top_logit_C - logsumexp_C).exp()
    if targets.num_support == 0:
        unknown_C = torch.full_like(logsumexp_C, torch.nan)
        sampled_C = logits_CV.gather(1, targets.sampled_ids_N.unsqueeze(1)).squeeze(1)
        compared = [logsumexp_C - sampled_C, unknown_C, unknown_C, unknown_C, unknown_C]
    else:
        has_teacher_C = in_support(targets).any(dim=1)
        # Column 0 is rank 0, the teacher's most likely token.
        agreement_C = (top_id_C == targets.ids_NK[:, 0]).to(logits_CV.dtype)
        # After all other reads: it consumes the logits.
        values_CJ, _ = chunk_losses(logits_CV, targets, _MIX, with_gradient=False)
        cross_entropy_C, *divergences = values_CJ.unbind(dim=1)
        compared = [cross_entropy_C]
        compared += [torch.where(has_teacher_C, value_C, torch.nan) for value_C in (*divergences, agreement_C)]
    return torch.stack([*compared, confidence_C, correct_C, logsumexp_C - mean_logit_C])
