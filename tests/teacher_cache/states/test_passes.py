"""Passes with invented states: exactly once, resumed, in shares, of chosen chains and tokens."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.cache.catalog import Catalog
from stillroom.cache.features import FeatureSet
from stillroom.errors import ConfigError, StillroomError
from teacher_cache.config import load_run_config
from teacher_cache.maintenance.gc import gc_cache
from teacher_cache.maintenance.verify import verify_cache
from teacher_cache.prompts.prompts import WHOLE, WorkerShare
from teacher_cache.states.config import load_features_config
from teacher_cache.states.engine import ChainTokens, FakeStates, States, Wanted
from teacher_cache.states.model import wanted_of
from teacher_cache.states.passes import FeaturesPass
from teacher_cache.states.plan import plan_units
from teacher_cache.states.selection import choose, most_uncertain, num_stored
from teacher_cache.states.sets import set_id_of
from teacher_cache.writer.commit import read_sample_ids
from tests.helpers import ROOT
from tests.helpers.caches import make_cache
from tests.helpers.feature_sets import SHAPE, add_features, features_config, teacher_of


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten chains that no test gives features."""
    return make_cache(tmp_path_factory.mktemp("small") / "c", num_chains=10).root


def stored_ids(root: Path) -> list[str]:
    table = Catalog(root).features
    assert table is not None
    return [one for file in table.files() for one in read_sample_ids(table.path_of(file))]


def test_a_second_pass_adds_nothing_and_shares_add_up(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", num_chains=40)
    first = add_features(cache.root, WorkerShare(0, 2))
    second = add_features(cache.root, WorkerShare(1, 2))
    assert first.num_chains + second.num_chains == 40
    assert min(first.num_chains, second.num_chains) > 0
    assert add_features(cache.root).num_done_before == 40
    assert sorted(stored_ids(cache.root)) == sorted(chain.sample_id for chain in cache.chains)


def test_more_chains_continue_a_set_and_other_states_begin_another(tmp_path: Path) -> None:
    root = make_cache(tmp_path / "c", num_chains=40).root
    few = add_features(root, chains={"fraction": 0.4, "where": "split = 'train'"})
    more = add_features(root)
    assert 0 < few.num_chains < 30
    assert (more.set_id, more.num_done_before, more.num_chains) == (few.set_id, few.num_chains, 40 - few.num_chains)
    other = add_features(root, name="hidden", layers=None, attention=None)
    assert other.set_id != few.set_id
    assert other.num_chains == 40
    # By number: 0.5 of four layers is layer 2.
    assert add_features(root, layers={"at": [1, 2], "rank": 8}).set_id == few.set_id


def test_the_most_uncertain_tokens_are_those_of_the_cache(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", num_chains=12)
    add_features(cache.root, tokens={"entropy_frac": 0.2}, calibration={"tokens": 400})
    rows = FeatureSet.open(cache.root).read([chain.sample_id for chain in cache.chains])
    for chain in cache.chains:
        entropy_T, positions_P = chain.signals.entropy_T, rows[chain.sample_id].positions_P
        assert len(positions_P) == num_stored(len(entropy_T), 0.2) == max(1, int(np.ceil(len(entropy_T) / 5)))
        others = np.delete(entropy_T, positions_P)
        assert not len(others) or entropy_T[positions_P].min() >= others.max()
    assert most_uncertain(np.array([1, 3, 3, 0], np.float32), 0.25).tolist() == [1]


@pytest.mark.parametrize(
    ("blocks", "problem"),
    [
        ({"layers": {"at": [4]}}, r"layers.at: 4 is not a layer from 1 to 3 of the teacher's 4"),
        ({"attention": {"layers": [1, 0.25]}}, r"attention.layers: two entries mean the same layer \(1, 1\)"),
        ({"last_hidden": {"rank": 16}}, "last_hidden.rank=16 saves nothing, the teacher's width is 16"),
        ({"chains": {"where": "num_tokens > 9999"}}, "no chain of synthetic-teacher in .* meets the condition"),
        ({"attention": {"layers": [0, 1.5]}}, "1.5 is neither a layer's number nor a fraction of depth"),
        ({"attention": {"layers": [float("nan")]}}, "nan is neither a layer's number nor a fraction of depth"),
        ({"max_bytes": 50_000}, r"max_bytes=50000: the set would take \d+ bytes \(.* tokens of .* B and .* of const"),
        (
            {"calibration": {"tokens": 1}, "layers": {"at": [1], "rank": 15}, "chains": {"where": "num_tokens < 12"}},
            r"layer1: a basis of rank 15 cannot be fitted on \d+ tokens: raise calibration.tokens",
        ),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(small: Path, blocks: dict[str, Any], problem: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=problem):
        add_features(small, **blocks)


@pytest.mark.parametrize("command", ["build", "score"])
def test_other_commands_name_this_one(command: str) -> None:
    path = ROOT / "docs/examples/features.yaml"
    with pytest.raises(ConfigError, match=f"states to store at existing chains: teacher-cache features {path}"):
        load_run_config(path, command=command)
    with pytest.raises(ConfigError, match="another command: teacher-cache build"):
        load_features_config(ROOT / "docs/examples/r1.yaml")


def test_another_teacher_is_refused_by_name(small: Path) -> None:
    other = teacher_of(small).model_copy(update={"fingerprint": "0" * 32, "model": "other"})
    with pytest.raises(ConfigError, match=r"other \(00000000\) wrote no chain of .* teachers are synthetic-teacher"):
        FeaturesPass(features_config(small), other, SHAPE, WHOLE)


def test_calibration_on_one_token_leaves_a_set_that_can_be_read(tmp_path: Path) -> None:
    root = make_cache(tmp_path / "c", num_chains=10).root
    add_features(root, calibration={"tokens": 1}, tokens={"entropy_frac": 0.01}, layers={"at": [1], "rank": 1})
    assert len(FeatureSet.open(root)) == 10


def test_calibration_counts_stored_tokens(tmp_path: Path) -> None:
    root = make_cache(tmp_path / "c", num_chains=20).root
    add_features(root, calibration={"tokens": 40}, tokens={"entropy_frac": 0.1})
    assert 40 <= FeatureSet.open(root).manifest.num_calibration_tokens < 50


class BrokenStates(FakeStates):
    """Gives one chain a state that a narrow type cannot hold."""

    broken = ""

    def run(self, chains: Sequence[ChainTokens]) -> list[States]:
        found = super().run(chains)
        for chain, one in zip(chains, found, strict=True):
            if chain.sample_id == self.broken:
                one.layers[1][0, 0] = np.inf
        return found


def test_states_that_are_not_finite_end_the_pass_and_name_the_chain(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", num_chains=20)
    BrokenStates.broken = max(chain.sample_id for chain in cache.chains)
    config, teacher = features_config(cache.root, calibration={"tokens": 64}), teacher_of(cache.root)
    features = FeaturesPass(config, teacher, SHAPE, WHOLE)
    message = f"chain {BrokenStates.broken}: layer 1 is not finite .* exclude the chain"
    with contextlib.closing(features), pytest.raises(StillroomError, match=message):
        features.run(lambda wanted: BrokenStates(SHAPE, wanted))
    others = {"where": f"sample_id <> '{BrokenStates.broken}'"}
    assert 0 < add_features(cache.root, chains=others, calibration={"tokens": 64}).num_chains <= 19
    assert len(stored_ids(cache.root)) == 19
    assert verify_cache(cache.root).ok


def test_chains_dropped_during_a_pass_get_no_features(tmp_path: Path) -> None:
    root = make_cache(tmp_path / "c", num_chains=36, num_runs=2).root
    dropped = sorted(Catalog(root).runs())[0]

    class Dropping(FakeStates):
        def run(self, chains: Sequence[ChainTokens]) -> list[States]:
            gc_cache(root, dry_run=False, grace_s=0.0, drop_runs=[dropped])
            return super().run(chains)

    features = FeaturesPass(features_config(root), teacher_of(root), SHAPE, WHOLE)
    with contextlib.closing(features):
        assert features.run(lambda wanted: Dropping(SHAPE, wanted)).num_chains == 36
    assert 0 < len(stored_ids(root)) < 36
    assert verify_cache(root).ok


def test_the_plan_counts_what_another_selection_has_stored(tmp_path: Path) -> None:
    root = make_cache(tmp_path / "c", num_chains=40).root
    add_features(root, chains={"where": "split = 'train'"})
    with pytest.raises(ConfigError, match="the set would take"):
        add_features(root, chains={"where": "split <> 'train'"}, max_bytes=set_bytes(root))
    add_features(root, chains={"where": "split <> 'train'"}, max_bytes=2 * set_bytes(root))


def set_bytes(root: Path) -> int:
    files = [*(root / "features").rglob("*.parquet"), *(root / "feature_sets").rglob("*.safetensors")]
    return sum(path.stat().st_size for path in files)


@pytest.mark.parametrize("frac", [None, 0.3])
def test_the_plan_is_within_five_percent_of_what_comes(tmp_path: Path, frac: float | None) -> None:
    root = make_cache(tmp_path / "c", num_chains=60, max_tokens=400, min_tokens=100).root
    blocks: dict[str, Any] = {"tokens": {"entropy_frac": frac}} if frac else {}
    config, catalog, teacher = features_config(root, **blocks), Catalog(root), teacher_of(root)
    wanted = wanted_of(config, SHAPE)
    assert wanted == Wanted(True, (1, 2), (2,), 3)
    units = choose(catalog, config.chains, teacher)
    planned = plan_units(catalog, config, wanted, SHAPE, set_id_of(config, teacher, wanted), units)
    assert not (root / "features").exists()
    result = add_features(root, **blocks)
    assert result.num_tokens == planned.num_tokens
    sizes = [one.stat().st_size for name in ("features", "feature_sets") for one in (root / name).rglob("*.[ps]a*")]
    head = 4 * SHAPE.vocab_size * SHAPE.hidden_size
    # Not counting the head, which would hide everything else.
    assert sum(sizes) - head == pytest.approx(planned.total_bytes - head, rel=0.05)
    again = plan_units(Catalog(root), config, wanted, SHAPE, planned.set_id, units)
    assert (again.num_left, again.tokens_left) == (0, 0)
    assert json.loads((root / "feature_sets" / planned.set_id / "manifest.json").read_text())["hidden"]["bits"] == 8
