"""The plans of a selection, epoch after epoch, and places in them.

A place is (epoch, cursor): pack number `cursor` of that epoch's plan.
"""

from dataclasses import asdict

from schemas.records import stable_hash
from shared.errors import ConfigError
from student_train.streaming.epoch_plan import EpochPlan, PlanSpec, plan_epoch, repeat_counts
from student_train.streaming.pieces import LongChainCounts, cut_chains
from student_train.streaming.selection import Selection

Place = tuple[int, int]

MAX_KEPT_PLANS = 2


class EpochPlans:
    """Plans of one selection, made when they are needed; the latest two are kept."""

    def __init__(self, selection: Selection, spec: PlanSpec, num_epochs: int | None) -> None:
        """None epochs never end. Raises ConfigError where the limit on length leaves no chain."""
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
        """Names the sequence of packs: two streams with the same hash give the same ones."""
        return stable_hash("plan", self.selection.header.hash, asdict(self.spec))

    @property
    def counts(self) -> LongChainCounts:
        """What the limit on length did."""
        return self.pieces.counts

    def plan(self, epoch: int) -> EpochPlan:
        """The plan of one epoch."""
        plan = self._plans.get(epoch)
        if plan is None:
            selection = self.selection
            weights = [cache.weight for cache in selection.header.caches]
            copies_R = repeat_counts(selection.cache_G[selection.group_R], weights, self.spec.seed, epoch)
            plan = plan_epoch(self.pieces, selection.group_R, copies_R, self.spec, epoch)
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
        """The place `cursor` packs after the beginning of `epoch`, in later epochs where it is too far for this one.

        Past the last epoch it is (num_epochs, 0).
        """
        while not self.is_end(epoch) and cursor >= self.num_packs(epoch):
            epoch, cursor = epoch + 1, cursor - self.num_packs(epoch)
        return (epoch, cursor) if not self.is_end(epoch) else (epoch, 0)

    def is_end(self, epoch: int) -> bool:
        """Whether no epoch of this number is read."""
        return self.num_epochs is not None and epoch >= self.num_epochs
