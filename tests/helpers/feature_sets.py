"""Feature sets over synthetic caches: a real pass with invented states."""

from collections.abc import Sequence

from stillroom.cache.catalog import Catalog
from stillroom.schema.manifest import Teacher
from stillroom.storage.paths import Location
from teacher_cache.prompts.prompts import WHOLE, WorkerShare
from teacher_cache.states.config import FeaturesConfig
from teacher_cache.states.engine import ChainTokens, FakeStates, Shape, States, Wanted
from teacher_cache.states.passes import FeaturesPass, FeaturesResult
from teacher_cache.states.selection import choose, read_unit

SHAPE = Shape(num_layers=4, hidden_size=16, num_heads=4, vocab_size=4000)
BLOCKS: dict[str, object] = {
    "last_hidden": {},
    "layers": {"at": [1, 0.5], "rank": 8},
    "attention": {"layers": [2], "keep_frac": 0.5, "keys": 3},
}
"""Everything at once; a test's own blocks replace these."""


def features_config(root: Location, **blocks: object) -> FeaturesConfig:
    """A configuration for the teacher of a synthetic cache."""
    content = {"cache": root, "name": "all", "teacher": {"model": "synthetic-teacher"}, **BLOCKS, **blocks}
    return FeaturesConfig.model_validate({"engine": {"kind": "transformers", "batch_tokens": 200}, **content})


def teacher_of(root: Location) -> Teacher:
    return next(iter(Catalog(root).runs().values())).teacher


def add_features(
    root: Location, share: WorkerShare | None = WHOLE, step_s: float = 0.0, shape: Shape = SHAPE, **blocks: object
) -> FeaturesResult:
    """One process' pass over the cache at `root`, from opening it to giving the lock back. Without a share it joins."""
    features = FeaturesPass(features_config(root, **blocks), teacher_of(root), shape, share)
    try:
        return features.run(lambda wanted: FakeStates(shape, wanted, step_s))
    finally:
        features.close()


def expected(root: Location, wanted: Wanted, **blocks: object) -> dict[str, tuple[ChainTokens, States]]:
    """What the invented teacher had at every chosen chain, before coding."""
    config, catalog = features_config(root, **blocks), Catalog(root)
    chains: Sequence[ChainTokens] = [
        chain
        for unit in choose(catalog, config.chains, teacher_of(root))
        for chain in read_unit(catalog, unit, unit.places, config.tokens.entropy_frac)
    ]
    states = FakeStates(SHAPE, wanted).run(chains)
    return {chain.sample_id: (chain, one) for chain, one in zip(chains, states, strict=True)}
