"""Plans an epoch: which pieces of chains go into which pack, in which order.

In: lengths of R chains and the row group each lies in. Out: packs of at most `pack_tokens` tokens. The plan depends on
lengths, seed and epoch alone, not on ranks or workers; rank r of `world` takes every world-th pack. It uses integers
and the raw bits of PCG64 only, so every machine and numpy version gets the same plan.

Shuffling: row groups are shuffled and dealt to `lanes`; each lane spreads its chains over the `window_groups` groups
around their own; pack i comes from lane i mod lanes. A batch therefore mixes lanes x window_groups row groups, while a
rank whose world size divides `lanes` (or is a multiple of it) reads only its share of the files.

Packing: a pack takes the piece that has waited longest if it fits, then the largest ones that still fit. Packs of
chains a fifth their length are 99% full. Cost at 10^6 chains: benchmarks/results/stream.md.

A place is (epoch, cursor): pack number `cursor` of that epoch's plan.

    R chains, P pieces, I items (pieces of one epoch, copies counted), G row groups, V visits of row groups
"""

import heapq
from array import array
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from stillroom.errors import ConfigError
from stillroom.schema.records import Int32, Int64, stable_hash
from student_train.data.selection import Selection

LongChains = Literal["truncate", "skip", "split"]

SPLIT_OVERLAP_FRAC = 1 / 8
"""Context that a later piece of a split chain repeats without a loss, as a share of the limit."""


@dataclass(frozen=True, slots=True)
class LongChainCounts:
    """What the limit on sequence length did; tokens lost are completion tokens that no loss sees."""

    num_long: int
    num_truncated: int
    num_skipped: int
    num_split: int
    num_tokens_lost: int


@dataclass(frozen=True, slots=True)
class Pieces:
    """Parts of chains, each trained as one sequence; positions count from the first prompt token.

    Piece p reads tokens first_P[p]..stop_P[p]-1 of chain row_P[p] and has a loss on tokens loss_P[p]..stop_P[p]-1, all
    of them completion tokens, each in exactly one piece. int32 [P]; first < loss < stop.
    """

    row_P: Int32
    first_P: Int32
    loss_P: Int32
    stop_P: Int32
    counts: LongChainCounts

    @property
    def num_tokens_P(self) -> Int32:
        """int32 [P], tokens that a piece takes in a pack."""
        return self.stop_P - self.first_P


def cut_chains(num_prompt_R: Int32, num_tokens_R: Int32, limit: int, policy: LongChains) -> Pieces:
    """Pieces of chains with `num_prompt_R` (>= 1) and `num_tokens_R` (>= 1) tokens, in order of rows.

    A truncated chain keeps its beginning and never teaches an end of sequence. A prompt that leaves no room for a
    completion token drops the chain, except under `split`, where every completion token keeps a loss: later pieces
    repeat the tokens just before them, an eighth of the limit, as context.
    """
    # In int64: a prompt and a completion that each fit int32 need not fit it together.
    prompt_R, total_R = num_prompt_R.astype(np.int64), num_prompt_R.astype(np.int64) + num_tokens_R
    long_R = total_R > limit
    if policy == "split":
        pieces = _split(prompt_R, total_R, limit)
        num_cut = int(long_R.sum())
        return _pieces(*pieces, LongChainCounts(num_cut, 0, 0, num_cut, 0))
    # A prompt that fills the limit leaves no loss token.
    kept_R = ~long_R if policy == "skip" else prompt_R < limit
    row_P = np.flatnonzero(kept_R)
    stop_P = np.minimum(total_R, limit)[row_P]
    counts = LongChainCounts(
        num_long=int(long_R.sum()),
        num_truncated=int((long_R & kept_R).sum()),
        num_skipped=int((~kept_R).sum()),
        num_split=0,
        num_tokens_lost=int(num_tokens_R.sum(dtype=np.int64) - (stop_P - prompt_R[row_P]).sum()),
    )
    return _pieces(row_P, np.zeros_like(row_P), prompt_R[row_P], stop_P, counts)


def _split(prompt_R: Int64, total_R: Int64, limit: int) -> tuple[Int64, Int64, Int64, Int64]:
    # At least one token, because a piece's first loss token needs one before it that predicts it.
    overlap = max(1, int(limit * SPLIT_OVERLAP_FRAC))
    step = limit - overlap
    # Limit 8, overlap 1, prompt 3, 12 completion tokens: reads 0..7 with loss on 3..7, then reads 7..14 with loss on
    # 8..14.
    first_stop_R = np.minimum(total_R, np.where(prompt_R < limit, limit, prompt_R + step))
    num_later_R = -(-(total_R - first_stop_R) // step)
    row_P = np.repeat(np.arange(len(prompt_R)), 1 + num_later_R)
    ends_R = np.cumsum(1 + num_later_R)
    later_P = np.arange(len(row_P)) - (ends_R - 1 - num_later_R)[row_P]
    loss_P = np.where(later_P == 0, prompt_R[row_P], first_stop_R[row_P] + (later_P - 1) * step)
    stop_P = np.where(later_P == 0, first_stop_R[row_P], np.minimum(total_R[row_P], loss_P + step))
    # A first piece reads the prompt from its beginning, unless the prompt alone fills the limit.
    whole_P = (later_P == 0) & (prompt_R[row_P] < limit)
    first_P = np.where(whole_P, 0, loss_P - overlap)
    return row_P, first_P, loss_P, stop_P


def _pieces(row_P: Int64, first_P: Int64, loss_P: Int64, stop_P: Int64, counts: LongChainCounts) -> Pieces:
    row, first, loss, stop = (values.astype(np.int32) for values in (row_P, first_P, loss_P, stop_P))
    return Pieces(row, first, loss, stop, counts)


POOL_PACKS = 8
"""Size of the packing pool, in packs: a larger one fills packs better, a smaller one keeps a pack's chains close on
disk."""

WEIGHT_UNITS = 1_000_000
"""Cache weights are counted in millionths, which makes repeats exact integers."""

UInt64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class PlanSpec:
    """How chains become packs. Raises ConfigError for impossible values."""

    pack_tokens: int
    """Maximum tokens (prompt and completion) of a pack."""
    seed: int = 0
    max_tokens: int | None = None
    """Maximum tokens (prompt and completion) of a sequence; None is pack_tokens."""
    long_chains: LongChains = "truncate"
    """Longer chains lose their end, are skipped, or are split into pieces."""
    window_groups: int = 8
    """Row groups that one lane mixes at a time."""
    lanes: int = 8
    """Independent reading orders; should divide the world size or be a multiple of it."""

    def __post_init__(self) -> None:
        if self.pack_tokens < 2:
            raise ConfigError(
                f"pack_tokens={self.pack_tokens} is below 2: a prompt and a completion token need that much"
            )
        if self.max_tokens is not None and not 2 <= self.max_tokens <= self.pack_tokens:
            raise ConfigError(
                f"max_tokens={self.max_tokens} is outside 2..pack_tokens={self.pack_tokens}: a chain must fit a pack"
            )
        if self.long_chains not in get_args(LongChains):
            raise ConfigError(
                f"long_chains={self.long_chains!r} is unknown: choose one of {', '.join(get_args(LongChains))}"
            )
        if self.window_groups < 1 or self.lanes < 1:
            raise ConfigError(f"window_groups={self.window_groups} and lanes={self.lanes} must be at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} is negative: seeds are 0 or more")

    @property
    def sequence_tokens(self) -> int:
        """Maximum tokens of a sequence."""
        return self.max_tokens if self.max_tokens is not None else self.pack_tokens


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """Pack i holds the pieces items_I[offsets[i]:offsets[i + 1]] (int32 indices into Pieces; offsets int64)."""

    items_I: Int32
    offsets: Int64

    @property
    def num_packs(self) -> int:
        return len(self.offsets) - 1

    def pack(self, index: int) -> Int32:
        """int32 piece indices of one pack."""
        return self.items_I[self.offsets[index] : self.offsets[index + 1]]


def plan_epoch(pieces: Pieces, group_R: Int32, copies_R: Int32 | None, spec: PlanSpec, epoch: int) -> EpochPlan:
    """The packs of one epoch, in seeded order; each piece appears `copies_R` times (None: once).

    group_R int32: row group of each chain. `epoch` counts from 0.
    """
    item_I, visit_I, num_visits = _items(pieces, group_R, copies_R)
    if not num_visits:
        return EpochPlan(np.zeros(0, np.int32), np.zeros(1, np.int64))
    # "plan" in ASCII: keeps this stream apart from that of repeat_counts ("weig"), which has the same seed.
    bits = np.random.PCG64(np.random.SeedSequence([spec.seed, epoch, 0x706C616E]))
    tokens_I = pieces.num_tokens_P[item_I]
    tokens_V = np.bincount(visit_I, tokens_I, num_visits).astype(np.int64)
    # The order of draws from `bits` is part of the plan: resumed runs must get the packs they had.
    lane_V, position_V = _deal(np.argsort(_raw(bits, num_visits), kind="stable"), tokens_V, spec)
    # Within a lane, chains spread over the row groups around their own, which the reader holds at the same time.
    time_I = _times(
        position_V[visit_I], np.bincount(lane_V)[lane_V[visit_I]], spec.window_groups, _raw(bits, len(item_I))
    )
    order_I = np.lexsort((time_I, lane_V[visit_I]))
    lane_stops = np.cumsum(np.bincount(lane_V[visit_I]))
    lanes = []
    # Lane by lane, so that the chains of a pack lie close together on disk.
    for start, stop in zip([0, *lane_stops[:-1]], lane_stops, strict=True):
        taken, sizes = fill_packs(tokens_I[order_I[start:stop]], spec.pack_tokens)
        lanes.append((order_I[start:stop][taken], sizes))
    return _interleave(item_I, lanes)


def repeat_counts(
    cache_R: npt.NDArray[np.integer[Any]], weights: Sequence[float], seed: int, epoch: int
) -> Int32 | None:
    """How often each chain is read in an epoch when caches have weights; None when all of them are 1.

    A chain of a cache with weight w is read floor(w) or ceil(w) times; where w < 1, each chain is read once in 1/w
    epochs. The total of an epoch is within one of w times the chains.
    """
    if all(weight == 1 for weight in weights):
        return None
    copies_R = np.zeros(len(cache_R), np.int32)
    for cache, weight in enumerate(weights):
        rows = np.flatnonzero(cache_R == cache)
        bits = np.random.PCG64(np.random.SeedSequence([seed, cache, 0x77656967]))
        # Chain number c in a seeded order stands at phase c/n of a cycle that advances by `weight` an epoch.
        rows = rows[np.argsort(_raw(bits, len(rows)), kind="stable")]
        phase = np.arange(len(rows), dtype=np.int64) * WEIGHT_UNITS // max(len(rows), 1)
        units = round(weight * WEIGHT_UNITS)
        copies_R[rows] = (phase + (epoch + 1) * units) // WEIGHT_UNITS - (phase + epoch * units) // WEIGHT_UNITS
    return copies_R


def fill_packs(tokens_I: Int32, pack_tokens: int) -> tuple[Int32, Int64]:
    """(item numbers in pack order, items per pack) of items no longer than `pack_tokens`, in roughly their order."""
    taken, sizes = array("i"), array("q")
    arrivals: deque[int] = deque()
    # One integer an item, ordered by length: tokens << 32 | number.
    pool: list[int] = []
    lengths = tokens_I.tolist()
    num_items, next_item, pool_tokens, mask = len(lengths), 0, 0, (1 << 32) - 1
    waiting = bytearray(b"\1") * num_items
    while pool or next_item < num_items:
        while next_item < num_items and pool_tokens < POOL_PACKS * pack_tokens:
            insort(pool, lengths[next_item] << 32 | next_item)
            arrivals.append(next_item)
            pool_tokens += lengths[next_item]
            next_item += 1
        free, size = pack_tokens, 0
        while pool:
            # Items taken out of turn are dropped when they reach the head: removing them at once would be linear.
            while not waiting[arrivals[0]]:
                arrivals.popleft()
            key = lengths[arrivals[0]] << 32 | arrivals[0]
            # The item that waits longest, so that none starves; if it does not fit, the longest that does.
            index = bisect_left(pool, key) if key >> 32 <= free else bisect_right(pool, free << 32 | mask) - 1
            if index < 0:
                break
            item = pool.pop(index) & mask
            taken.append(item)
            waiting[item] = 0
            size += 1
            free -= lengths[item]
        pool_tokens -= pack_tokens - free
        sizes.append(size)
    return np.array(taken, np.int32), np.array(sizes, np.int64)


def _items(pieces: Pieces, group_R: Int32, copies_R: Int32 | None) -> tuple[Int32, Int32, int]:
    """(piece of each item, its visit, number of visits); a second copy of a row group is a visit of its own."""
    group_P = group_R[pieces.row_P].astype(np.int64)
    if copies_R is None:
        item_I, visit_I = np.arange(len(group_P)), group_P
    else:
        copies_P = copies_R[pieces.row_P]
        item_I = np.repeat(np.arange(len(group_P)), copies_P)
        copy_I = np.arange(len(item_I)) - np.repeat(np.cumsum(copies_P) - copies_P, copies_P)
        # Copy c of group g is number c x (groups) + g: copies of one group are read at different times.
        visit_I = group_P[item_I] + copy_I * (int(group_R.max(initial=0)) + 1)
    unique, visit_I = np.unique(visit_I, return_inverse=True)
    return item_I.astype(np.int32), visit_I.astype(np.int32), len(unique)


def _deal(shuffled_V: Int64, tokens_V: Int64, spec: PlanSpec) -> tuple[Int32, Int64]:
    """(lane, place in it) of each visit; a visit goes to the lane with the fewest tokens so far."""
    num_visits = len(shuffled_V)
    # Few lanes mix a small cache better: each holds at least one window of row groups.
    num_lanes = max(1, min(spec.lanes, num_visits // spec.window_groups))
    heap = [(0, lane) for lane in range(num_lanes)]
    lengths = [0] * num_lanes
    lane_V, position_V = np.zeros(num_visits, np.int32), np.zeros(num_visits, np.int64)
    for visit in shuffled_V.tolist():
        tokens, lane = heap[0]
        lane_V[visit], position_V[visit] = lane, lengths[lane]
        lengths[lane] += 1
        heapq.heapreplace(heap, (tokens + int(tokens_V[visit]), lane))
    return lane_V, position_V


def _times(position_I: Int64, length_I: Int64, window_groups: int, random_I: UInt64) -> UInt64:
    """When an item is due: uniform over the window around its own group, in units of 2^-32 of a group."""
    radius = window_groups // 2
    # Integers, as floats could sort two items differently on another machine.
    low_I = np.maximum(position_I - radius, 0).astype(np.uint64)
    high_I = np.minimum(position_I - radius + window_groups, length_I)
    span_I = high_I.astype(np.uint64) - low_I
    shift = np.uint64(32)
    return np.asarray((low_I << shift) + (random_I >> shift) * span_I, np.uint64)


def _interleave(item_I: Int32, lanes: Sequence[tuple[Int64, Int64]]) -> EpochPlan:
    """Pack j of every lane, then pack j + 1 of every lane; the surplus of longer lanes comes last."""
    sizes = np.concatenate([sizes for _, sizes in lanes])
    lane = np.repeat(np.arange(len(lanes)), [len(sizes) for _, sizes in lanes])
    turn = np.concatenate([np.arange(len(sizes)) for _, sizes in lanes])
    # lexsort's last key counts first: by turn, then by lane.
    order = np.lexsort((lane, turn))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    taken_I = np.concatenate([taken for taken, _ in lanes])
    items_I = item_I[taken_I[np.argsort(np.repeat(rank, sizes), kind="stable")]]
    offsets = np.concatenate([[0], np.cumsum(sizes[order])]).astype(np.int64)
    return EpochPlan(items_I, offsets)


def _raw(bits: np.random.PCG64, count: int) -> UInt64:
    return np.asarray(bits.random_raw(count), np.uint64)


Place = tuple[int, int]
# A global batch may span two epochs.
MAX_KEPT_PLANS = 2


class EpochPlans:
    """Plans of one selection, made on demand; the latest two are kept."""

    def __init__(self, selection: Selection, spec: PlanSpec, num_epochs: int | None) -> None:
        """`num_epochs` None never ends. Raises ConfigError if the length limit leaves no chain."""
        assert num_epochs is None or num_epochs > 0
        self.selection, self.spec, self.num_epochs = selection, spec, num_epochs
        self.pieces = cut_chains(selection.num_prompt_R, selection.num_tokens_R, spec.sequence_tokens, spec.long_chains)
        if not len(self.pieces.row_P):
            raise ConfigError(
                f"all {selection.num_chains} selected chains ({selection.header.where or 'no condition'}) are longer "
                f"than {spec.sequence_tokens} tokens and long_chains={spec.long_chains!r} leaves none: raise "
                "pack_tokens or choose another policy"
            )
        self._plans: dict[int, EpochPlan] = {}
        self._num_packs: dict[int, int] = {}

    @property
    def hash(self) -> str:
        """Identifies the sequence of packs: streams with equal hashes yield equal packs."""
        return stable_hash("plan", self.selection.header.hash, asdict(self.spec))

    @property
    def counts(self) -> LongChainCounts:
        """What the length limit did."""
        return self.pieces.counts

    def plan(self, epoch: int) -> EpochPlan:
        """Plan of one epoch."""
        plan = self._plans.get(epoch)
        if plan is None:
            selection = self.selection
            weights = [cache.weight for cache in selection.header.caches]
            copies_R = repeat_counts(selection.cache_G[selection.group_R], weights, self.spec.seed, epoch)
            plan = plan_epoch(self.pieces, selection.group_R, copies_R, self.spec, epoch)
            # The number of packs stays when a plan goes: `total_packs` asks for every epoch.
            # The older one goes: a batch spans two epochs at most, and `total_packs` counts upwards.
            if len(self._plans) == MAX_KEPT_PLANS:
                del self._plans[min(self._plans)]
            self._plans[epoch] = plan
            self._num_packs[epoch] = plan.num_packs
        return plan

    def num_packs(self, epoch: int) -> int:
        """Packs of one epoch."""
        return self._num_packs[epoch] if epoch in self._num_packs else self.plan(epoch).num_packs

    def total_packs(self) -> int:
        """Packs of all epochs; plans each of them once."""
        assert self.num_epochs is not None
        return sum(self.num_packs(epoch) for epoch in range(self.num_epochs))

    def place(self, epoch: int, cursor: int) -> Place:
        """The place `cursor` packs after the start of `epoch`, maybe in a later one; (num_epochs, 0) at the end."""
        while not self.is_end(epoch) and cursor >= self.num_packs(epoch):
            epoch, cursor = epoch + 1, cursor - self.num_packs(epoch)
        return (epoch, cursor) if not self.is_end(epoch) else (epoch, 0)

    def is_end(self, epoch: int) -> bool:
        """Whether `epoch` lies past the last one."""
        return self.num_epochs is not None and epoch >= self.num_epochs
