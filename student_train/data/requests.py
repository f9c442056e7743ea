"""What each part of a run asks of the caches, and how what they answer is packed and ordered."""

from dataclasses import replace

from stillroom.sql.conditions import in_brackets
from student_train.config.data import DataConfig
from student_train.config.run import EvalConfig, TrainConfig
from student_train.config.stage import StageConfig, stage_key
from student_train.data.epoch_plan import PlanSpec
from student_train.data.freezing import CacheSource, SelectionRequest
from student_train.data.selection import Selection


def sources_of(data: DataConfig) -> list[CacheSource]:
    """The configured caches as a selection wants them."""
    return [
        CacheSource(cache.path, cache.weight, cache.chains_version, cache.verdicts_version) for cache in data.caches
    ]


def train_request(data: DataConfig, number: int, stage: StageConfig) -> SelectionRequest:
    """What stage number `number`, from 0, learns from, wrong chains included."""
    key = "data.where" if stage.where is None else f"{stage_key(number, stage.name)}: where"
    where = stage.where or data.where
    if stage.negatives is not None and where is not None:
        # One selection for both kinds: they share an order and packs, and a mask says which chains are wrong.
        where = f"{in_brackets(where)} OR {in_brackets(stage.negatives.where)}"
        key = f"{key} or negatives.where"
    return SelectionRequest(sources_of(data), where, data.weight, data.max_chains, key=key)


def negatives_request(data: DataConfig, number: int, stage: StageConfig) -> SelectionRequest:
    """The wrong chains among those of a stage."""
    assert stage.negatives is not None
    key = f"{stage_key(number, stage.name)}: negatives.where"
    return SelectionRequest(_unweighted(data), stage.negatives.where, None, None, key=key)


def right_request(data: DataConfig, config: EvalConfig, number: int, stage: StageConfig) -> SelectionRequest:
    """The held-out chains whose likelihood must not fall in a stage with wrong chains."""
    assert stage.negatives is not None
    key = f"{stage_key(number, stage.name)}: eval.where and negatives.right"
    # Held-out chains: how likely right answers are must be measured where the stage does not push them up itself.
    where = f"{in_brackets(config.where)} AND {in_brackets(stage.negatives.right)}"
    return SelectionRequest(_unweighted(data), where, None, config.max_chains, key=key)


def eval_request(data: DataConfig, config: EvalConfig) -> SelectionRequest:
    """What the student is evaluated on; cache weights do not count there."""
    return SelectionRequest(_unweighted(data), config.where, None, config.max_chains, key="eval.where")


def at_versions_of(request: SelectionRequest, other: Selection) -> SelectionRequest:
    """The request for the versions of its caches that another selection of them has seen."""
    pinned = [
        replace(source, chains_version=cache.chains_version, verdicts_version=cache.verdicts_version)
        for source, cache in zip(request.sources, other.header.caches, strict=True)
    ]
    return replace(request, sources=pinned)


def _unweighted(data: DataConfig) -> list[CacheSource]:
    # A chain read twice for its weight would count twice in a mean over held-out chains.
    return [CacheSource(one.root, 1.0, one.chains_version, one.verdicts_version) for one in sources_of(data)]


def plan_spec(config: TrainConfig, stage_index: int) -> PlanSpec:
    """How the chains of a stage are packed and ordered; each stage has an order of its own."""
    data, stage = config.data, config.stages[stage_index]
    return PlanSpec(
        pack_tokens=data.pack_tokens,
        # Not seed + index: stage 1 of seed 0 would have the order of stage 0 of seed 1.
        seed=config.seed * len(config.stages) + stage_index,
        # A row of two chains is as long as both; each was held to the limit when they were paired.
        max_tokens=None if is_paired(stage) else data.max_tokens,
        long_chains=data.long_chains,
    )


def is_paired(stage: StageConfig) -> bool:
    """Whether the stage trains on pairs of a right and a wrong chain."""
    return stage.negatives is not None and "dpo" in stage.losses


def eval_spec(data: DataConfig) -> PlanSpec:
    """How held-out chains are packed: in the same way, in an order that never changes."""
    return PlanSpec(pack_tokens=data.pack_tokens, max_tokens=data.max_tokens, long_chains=data.long_chains)
