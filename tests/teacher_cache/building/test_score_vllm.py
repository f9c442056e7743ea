"""Scoring by real vLLM, in the program and over HTTP, says of a chain what its generation said."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from stillroom.cache.catalog import Catalog
from stillroom.config import validate_config
from teacher_cache.building.commands import score_cache
from teacher_cache.config import ScoreConfig
from teacher_cache.engine.http import handshake
from teacher_cache.engine.http.wire import CompletionsApi
from teacher_cache.prompts.prompts import WHOLE
from tests.helpers.line import NUM_CHAINS, SCORE, Line
from tests.teacher_cache.engine.http.test_server_vllm import (
    SETTINGS,
    SIGNALS,
    WAYS,
    assert_same_signals,
    assert_served_alike,
    chains_of,
    completions_alone,
)


@pytest.fixture(scope="module")
def num_chains(line: Line) -> int:
    """Different ones: two samples of a prompt that came out alike are one chain to be scored."""
    found = {row["chain_id"] for row, _ in chains_of(line.folder / "runs/demo/cache").values()}
    assert len(found) > NUM_CHAINS // 2
    return len(found)


def assert_scored_alike(generated: Path, scored: Path) -> None:
    first = {row["chain_id"]: (row, signals) for row, signals in chains_of(generated).values()}
    second = {row["chain_id"]: (row, signals) for row, signals in chains_of(scored).values()}
    assert first.keys() == second.keys()
    for chain_id, (row, signals) in second.items():
        origin, own = first[chain_id]
        assert (row["finish_reason"], row["seed"]) == ("scored", None)
        assert (row["text"], row["token_ids"]) == (origin["text"], origin["token_ids"])
        assert_same_signals(signals, own, 64)


def test_the_command_scores_chains_of_another_cache(line: Line, num_chains: int, tmp_path: Path) -> None:
    config = {**SCORE, "cache": str(tmp_path / "c")}
    path = tmp_path / "score.yaml"
    path.write_text(yaml.safe_dump(config))
    planned = line.step("score plan", "teacher-cache", "plan", str(path))
    assert (planned["num_left"], planned["num_duplicates"]) == (num_chains, NUM_CHAINS - num_chains)
    result = line.step("score", "teacher-cache", "score", str(path))
    assert (result["num_new_chains"], result["num_failures"]) == (num_chains, 0)
    assert_scored_alike(line.folder / "runs/demo/cache", tmp_path / "c")
    assert line.step("score again", "teacher-cache", "score", str(path))["num_new_chains"] == 0
    planned = line.step("score planned", "teacher-cache", "plan", str(path))
    assert (planned["num_done"], planned["num_left"]) == (num_chains, 0)
    assert line.step("score verify", "teacher-cache", "verify", str(tmp_path / "c"))["ok"]
    (manifest,) = Catalog(tmp_path / "c").runs().values()
    assert manifest.kind == "score"


@pytest.fixture(scope="module")
def scored(line: Line) -> Path:
    """A cache of the line's chains scored with all signals by vLLM in the program."""
    config = {**SCORE, "cache": "scored_signals", "capture": SIGNALS}
    (line.folder / "score_signals.yaml").write_text(yaml.safe_dump(config))
    line.step("score signals", "teacher-cache", "score", "score_signals.yaml")
    return line.folder / "scored_signals"


@WAYS
def test_servers_with_the_plugin_score_with_what_the_sampler_sees(
    line: Line, vllm_server: str, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    if path == CompletionsApi.path:
        monkeypatch.setattr(handshake, "_api", completions_alone)
    score_cache(served_config(line, vllm_server, tmp_path / "c", SIGNALS), WHOLE, retry_failures=False)
    assert_served_alike(chains_of(scored), tmp_path / "c")


def served_config(line: Line, url: str, cache: Path, capture: dict[str, Any]) -> ScoreConfig:
    block = {**SCORE, "cache": cache, "engine": {**SETTINGS, "endpoints": [url]}, "capture": capture}
    block["teacher"] = {"model": str(line.folder / "runs/demo/teacher")}
    block["completions"] = {"sources": [{"kind": "cache", "name": "demo", "path": line.folder / "runs/demo/cache"}]}
    return validate_config(block, ScoreConfig, "test")


@WAYS
def test_servers_score_too(
    line: Line, plain_vllm_server: str, num_chains: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    if path == CompletionsApi.path:
        monkeypatch.setattr(handshake, "_api", completions_alone)
    config = served_config(line, plain_vllm_server, tmp_path / "c", SCORE["capture"])
    result = score_cache(config, WHOLE, retry_failures=False)
    assert (result.recorded.num_chains, result.recorded.num_failures) == (num_chains, 0)
    assert_scored_alike(line.folder / "runs/demo/cache", tmp_path / "c")
