"""Which rows of a batch ask for signals, and their tensors. Between vLLM's runners and the mathematics; knows neither.

A runner says for each row of its logits what the row's request asked for and which place in its sequence the row
predicts; other rows of the same batch get what vLLM itself would give them.

Shape legend: N rows of logits, V vocabulary, W columns after the sampled token's.

Also lays out rows as mappings from token id to log probability, for HTTP answers (engine.row_layout).

Shape legend: N rows, K top candidates, M draws, S temperatures, X columns of numbers, A ids that they may get.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teacher_cache.engine.plugin.signals import Rows, signal_rows
from teacher_cache.engine.row_layout import DRAWS, MAPPED, TEMPERATURES, TOP, Layout


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
    # Free ids are zeros and sort first; a stable sort keeps them ascending.
    return taken_NA[:, :num_ids].argsort(dim=1, stable=True)[:, :num].int()


Plain = Callable[[Tensor, Tensor, int], Rows]
"""vLLM's own rows: logits [N, V], sampled ids [N] int64 and the number of top candidates, to Rows."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What one request asks for. `layout` None: it made no sense, and its rows are NaN, which nobody can mistake."""

    layout: Layout | None
    seed: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of logits: `asked_N` (None asks for nothing) and `positions_N` int64, the places that they predict."""

    asked_N: Sequence[Asked | None]
    positions_N: Tensor

    def __len__(self) -> int:
        return len(self.asked_N)

    def slice(self, start: int, stop: int) -> "Batch":
        """Rows start..stop-1."""
        return Batch(self.asked_N[start:stop], self.positions_N[start:stop])

    def rows(self, logits_NV: Tensor, sampled_N: Tensor, width: int, plain: Plain) -> Rows:
        """Rows of W = `width` columns for every row of the batch; those of narrower requests end in their sampled token
        again, which adds nothing to a mapping.
        """
        assert len(logits_NV) == len(self)
        groups = self._groups()
        # The usual batch, of one build: nothing is gathered or scattered.
        if len(groups) == 1:
            return self._group(*groups.popitem(), logits_NV, sampled_N, width, plain)
        result = Rows(
            torch.zeros((len(self), width + 1), dtype=torch.int32, device=logits_NV.device),
            torch.zeros((len(self), width + 1), dtype=torch.float32, device=logits_NV.device),
            torch.zeros(len(self), dtype=torch.int64, device=logits_NV.device),
        )
        for asked, members in groups.items():
            index = torch.tensor(members, device=logits_NV.device)
            part = self._group(asked, members, logits_NV[index], sampled_N[index], width, plain)
            result.ids[index], result.logprobs[index], result.ranks[index] = part.ids, part.logprobs, part.ranks
        return result

    def _groups(self) -> dict["Layout | bool", list[int]]:
        """Row numbers by layout; True: nothing asked, False: what was asked makes no sense."""
        groups: dict[Layout | bool, list[int]] = {}
        for row, asked in enumerate(self.asked_N):
            key: Layout | bool = asked is None if asked is None or asked.layout is None else asked.layout
            groups.setdefault(key, []).append(row)
        return groups

    def _group(
        self, layout: "Layout | bool", members: list[int], logits: Tensor, sampled: Tensor, width: int, plain: Plain
    ) -> Rows:
        if layout is True:
            return plain(logits, sampled, width)
        if layout is False or layout.min_vocab_size > logits.shape[1]:
            return _nan_rows(sampled, width)
        seeds = positions = None
        if layout.draws:
            asked = [self.asked_N[row] for row in members]
            # None of them is None here: rows without a request have a group of their own.
            seeds = torch.tensor([one.seed for one in asked if one is not None]).to(logits.device, non_blocking=True)
            positions = self.positions_N if len(members) == len(self) else self.positions_N[members]
        rows = signal_rows(logits, sampled, layout.unmapped(), seeds, positions)
        return _padded(mapped_rows(rows, layout) if layout.mapped else rows, width)


def asked_of(extra_args: Mapping[str, Any] | None, width: int | None, seed: int | None) -> Asked | None:
    """What a request's sampling parameters ask for; `width` is its number of log probabilities, None for none."""
    if width is None or not extra_args or TOP not in extra_args:
        return None
    try:
        # A tuple, because `_parsed` is cached by its arguments: runners ask again at every step.
        taus = tuple(extra_args.get(TEMPERATURES) or ())
        return _parsed(extra_args[TOP], extra_args.get(DRAWS) or 0, taus, extra_args.get(MAPPED), width, seed)
    except TypeError:
        # Clients of a server may send nonsense: a list is not a number.
        return Asked(None, 0)


@functools.lru_cache(maxsize=4096)
def _parsed(
    top: int, draws: int, temperatures: tuple[float, ...], mapped: float | None, width: int, seed: int | None
) -> Asked:
    try:
        layout = Layout.of({TOP: top, DRAWS: draws, TEMPERATURES: temperatures, MAPPED: mapped})
    except ValueError:
        return Asked(None, 0)
    # NaN rows rather than an error: inside vLLM an exception would end the engine, and with it everyone's requests.
    if layout is None or layout.width > width or (layout.draws > 0 and seed is None):
        return Asked(None, 0)
    # As int64: vLLM takes seeds up to 2^64.
    return Asked(layout, ((seed or 0) + 2**63) % 2**64 - 2**63)


def _padded(rows: Rows, width: int) -> Rows:
    missing = width + 1 - rows.ids.shape[1]
    if missing == 0:
        return rows
    ids = torch.cat([rows.ids, rows.ids[:, :1].expand(-1, missing)], dim=1)
    return Rows(ids, torch.cat([rows.logprobs, rows.logprobs[:, :1].expand(-1, missing)], dim=1), rows.ranks)


def _nan_rows(sampled_N: Tensor, width: int) -> Rows:
    ids = torch.zeros((len(sampled_N), width + 1), dtype=torch.int32, device=sampled_N.device)
    ids[:, 0] = sampled_N
    return Rows(ids, torch.full_like(ids, math.nan, dtype=torch.float32), torch.zeros_like(sampled_N))
