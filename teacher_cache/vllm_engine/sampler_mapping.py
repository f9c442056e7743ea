"""Rows of the sampler's signals laid out anew for answers that are mappings (vllm_engine.wide_rows).

Shape legend: N rows, K top candidates, M draws, S temperatures, X columns of numbers, A ids that they may get.
"""

import torch
from torch import Tensor

from teacher_cache.vllm_engine.sampler_signals import Rows
from teacher_cache.vllm_engine.wide_rows import Layout


def mapped_rows(rows: Rows, layout: Layout) -> Rows:
    """`rows` of `layout.unmapped()` as those of `layout`; the vocabulary has `layout.min_vocab_size` ids at least."""
    end_top, end_draws = 1 + layout.top, 1 + layout.top + layout.draws
    sampled_N1 = rows.logprobs[:, :1]
    # A token whose log probability is NaN has no rank, however many logits vLLM's comparison counts.
    rank_N1 = rows.ranks[:, None].where(~sampled_N1.isnan(), 0)
    values = [
        rows.logprobs[:, :end_top],
        rows.ids[:, end_top:end_draws],
        rows.logprobs[:, end_top:-1],
        rank_N1,
        torch.full_like(sampled_N1, layout.mark),
    ]
    tokens = rows.ids[:, :end_top]
    free_NX = _free_ids(tokens, layout.num_numbers)
    # Whole numbers below 2^24, which vocabularies are far from, are exact.
    return Rows(torch.cat([tokens, free_NX], dim=1), torch.cat([one.float() for one in values], dim=1), rows.ranks)


def _free_ids(tokens: Tensor, num: int) -> Tensor:
    """int32 [N, X]: for each row the X smallest ids that are not among its tokens int32 [N, K+1]."""
    num_ids = num + tokens.shape[1]
    taken_NA = torch.zeros((len(tokens), num_ids + 1), dtype=torch.uint8, device=tokens.device)
    # Those beyond A, which nobody wants, fall on one more.
    taken_NA.scatter_(1, tokens.long().clamp_(max=num_ids), 1)
    return taken_NA[:, :num_ids].argsort(dim=1, stable=True)[:, :num].int()
