"""A real `vllm serve` and vLLM in the program itself cache the same tokens and the same distributions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from stillroom.cache.catalog import Catalog
from stillroom.cache.shards import open_shard, read_signals
from stillroom.config import validate_config
from stillroom.errors import ConfigError
from stillroom.schema.records import Signals
from teacher_cache.building.commands import build_cache
from teacher_cache.config import BuildConfig, CaptureConfig
from teacher_cache.engine.http import handshake
from teacher_cache.engine.http.wire import Api, CompletionsApi, GenerateApi
from teacher_cache.prompts.prompts import WHOLE
from tests.helpers.line import NUM_CHAINS, TEACHER, Line

SETTINGS = {"kind": "server", "max_in_flight": 16, "give_up_minutes": 1}
WAYS = pytest.mark.parametrize("path", ["/inference/v1/generate", "/v1/completions"])


def chains_of(cache: Path) -> dict[str, tuple[dict[str, Any], Signals]]:
    """Rows and signals by sample id."""
    catalog, found = Catalog(cache), {}
    columns = ["sample_id", "chain_id", "prompt_token_ids", "token_ids", "finish_reason", "text", "seed", "answer"]
    for file in catalog.chains.files():
        shard, header = open_shard(catalog.chains.path_of(file))
        for group in range(shard.num_row_groups):
            table, signals, offsets = read_signals(shard, header, group, columns, file.path)
            for index, row in enumerate(table.to_pylist()):
                own = signals.slice(int(offsets[index]), int(offsets[index + 1]))
                found[row["sample_id"]] = (row, own)
    return found


def assert_same_signals(one: Signals, other: Signals, k: int) -> None:
    """Equal but for the rounding of differently composed batches."""
    np.testing.assert_allclose(one.sampled_logprob_T, other.sampled_logprob_T, atol=2e-3)
    np.testing.assert_allclose(one.sampled_rank_T, other.sampled_rank_T, atol=1)
    (ids_TK, logprobs_TK), (other_ids_TK, other_logprobs_TK) = one.dense(k), other.dense(k)
    np.testing.assert_allclose(logprobs_TK, other_logprobs_TK, atol=2e-3)
    # Near ties may stand in either order.
    assert (ids_TK == other_ids_TK).mean() > 0.99
    np.testing.assert_allclose(one.tail_logmass_T, other.tail_logmass_T, atol=5e-3)


def assert_served_alike(embedded: dict[str, tuple[dict[str, Any], Signals]], cache: Path) -> None:
    """By key: the same chains with the same signals."""
    served = chains_of(cache)
    assert embedded.keys() == served.keys()
    for sample_id, (row, signals) in embedded.items():
        assert served[sample_id][0] == row
        assert_same_signals(served[sample_id][1], signals, 8)
        assert_same_sampler_signals(served[sample_id][1], signals)


def assert_same_sampler_signals(one: Signals, other: Signals) -> None:
    """What only the sampler sees: exact entropies, log-partitions, and the same seeded draws."""
    np.testing.assert_allclose(one.entropy_T, other.entropy_T, atol=2e-3)
    assert (one.log_partitions_TS is None) == (other.log_partitions_TS is None)
    if one.log_partitions_TS is not None and other.log_partitions_TS is not None:
        assert one.log_partitions_TS.shape[1] == 2
        np.testing.assert_allclose(one.log_partitions_TS, other.log_partitions_TS, atol=2e-3)
    assert (one.draws is None) == (other.draws is None)
    if one.draws is not None and other.draws is not None:
        assert one.draws.n_T.tolist() == other.draws.n_T.tolist() == [8] * len(one.entropy_T)
        same_D = one.draws.ids_D == other.draws.ids_D
        # A draw near a border may fall on its other side.
        assert same_D.mean() > 0.99
        np.testing.assert_allclose(one.draws.logprobs_D[same_D], other.draws.logprobs_D[same_D], atol=2e-3)


def served_config(line: Line, url: str, cache: Path, capture: dict[str, Any]) -> BuildConfig:
    block = {**TEACHER, "cache": cache, "engine": {**SETTINGS, "endpoints": [url]}, "capture": capture}
    block["teacher"] = {"model": str(line.folder / TEACHER["teacher"]["model"])}
    return validate_config(block, BuildConfig, "test")


def fill(line: Line, url: str, cache: Path, monkeypatch: pytest.MonkeyPatch, path: str, capture: dict[str, Any]) -> str:
    """Builds a cache by one way; gives the kind of its entropies."""
    if path == CompletionsApi.path:
        monkeypatch.setattr(handshake, "_api", completions_alone)
    result = build_cache(served_config(line, url, cache, capture), WHOLE, retry_failures=False)
    assert (result.recorded.num_chains, result.recorded.num_failures) == (NUM_CHAINS, 0)
    catalog = Catalog(cache)
    (manifest,) = catalog.runs().values()
    assert manifest.software["vllm"].startswith("0.")
    assert manifest.engine["served"][url.removesuffix("/v1")]["path"] == path
    (kind,) = {open_shard(catalog.chains.path_of(file))[1].entropy for file in catalog.chains.files()}
    return kind


@WAYS
def test_a_served_teacher_fills_the_same_cache(
    line: Line, plain_vllm_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Without the plugin: vLLM's own candidates."""
    kind = fill(line, plain_vllm_server, tmp_path / "c", monkeypatch, path, TEACHER["capture"])
    assert kind == "support"
    embedded, served = chains_of(line.folder / "runs/demo/cache"), chains_of(tmp_path / "c")
    assert embedded.keys() == served.keys(), "the same requests of the same teacher have the same ids"
    for sample_id, (row, signals) in embedded.items():
        assert served[sample_id][0] == row
        assert_same_signals(served[sample_id][1], signals, 64)


SIGNALS = {"codec": "topk-f32", "max_support": 8, "nucleus": None, "draws": 8, "temperatures": [0.5, 2.0]}


@pytest.fixture(scope="module")
def embedded(line: Line) -> dict[str, tuple[dict[str, Any], Signals]]:
    """Chains with all signals, from vLLM in the program."""
    (line.folder / "signals.yaml").write_text(yaml.safe_dump({**TEACHER, "cache": "signals", "capture": SIGNALS}))
    line.step("signals", "teacher-cache", "build", "signals.yaml")
    return chains_of(line.folder / "signals")


@WAYS
def test_a_server_with_the_plugin_gives_what_the_sampler_sees(
    line: Line,
    vllm_server: str,
    embedded: dict[str, tuple[dict[str, Any], Signals]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
) -> None:
    assert fill(line, vllm_server, tmp_path / "c", monkeypatch, path, SIGNALS) == "exact"
    assert_served_alike(embedded, tmp_path / "c")


def test_entropies_are_exact_without_draws_too(
    line: Line, vllm_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 candidates need no plugin; where there is one it is used. The run is the embedded engine's."""
    url = f"{vllm_server}/v1"
    assert fill(line, url, tmp_path / "c", monkeypatch, GenerateApi.path, TEACHER["capture"]) == "exact"
    assert [*Catalog(tmp_path / "c").runs()] == [line.results["build"]["run_id"]]
    embedded, served = chains_of(line.folder / "runs/demo/cache"), chains_of(tmp_path / "c")
    for sample_id, (_, signals) in embedded.items():
        assert_same_signals(served[sample_id][1], signals, 64)
        assert_same_sampler_signals(served[sample_id][1], signals)


def test_a_server_without_the_plugin_is_refused_what_needs_it(
    line: Line, plain_vllm_server: str, vllm_server: str, tmp_path: Path
) -> None:
    config = served_config(line, plain_vllm_server, tmp_path / "c", SIGNALS)
    told = (
        r"without stillroom's sampler plugin, needed for capture\.draws: pip install stillroom .*--max-logprobs 30, or "
    )
    with pytest.raises(ConfigError, match=told) as caught:
        build_cache(config, WHOLE, retry_failures=False)
    assert "\n" not in str(caught.value)
    engine = config.engine.updated(endpoints=[vllm_server, plain_vllm_server])
    with pytest.raises(ConfigError, match="or list only one kind"):
        build_cache(config.updated(engine=engine, capture=CaptureConfig(draws=0)), WHOLE, retry_failures=False)
    assert not chains_of(tmp_path / "c")


async def completions_alone(*_: object) -> Api:
    """As a server without --enable-scale-out would be met."""
    return CompletionsApi()
