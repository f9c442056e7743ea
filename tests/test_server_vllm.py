"""A real `vllm serve` and vLLM in the program itself cache the same tokens and the same distributions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from schemas.records import Signals
from shared.catalog import Catalog
from shared.config import validate_config
from shared.shards import open_shard, read_signals
from teacher_cache.build_command import build_cache
from teacher_cache.config import BuildConfig
from teacher_cache.http_engine import handshake
from teacher_cache.http_engine.wire import Api, CompletionsApi
from teacher_cache.intake.prompts import WHOLE
from tests.line import TEACHER, Line

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


def served_config(line: Line, url: str, cache: Path) -> BuildConfig:
    block = {**TEACHER, "cache": cache, "engine": {**SETTINGS, "endpoints": [url]}}
    block["teacher"] = {"model": str(line.folder / TEACHER["teacher"]["model"])}
    return validate_config(block, BuildConfig, "test")


@WAYS
def test_a_served_teacher_fills_the_same_cache(
    line: Line, vllm_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    if path == CompletionsApi.path:
        monkeypatch.setattr(handshake, "_api", completions_alone)
    result = build_cache(served_config(line, vllm_server, tmp_path / "c"), WHOLE, retry_failures=False)
    assert (result.recorded.num_chains, result.recorded.num_failures) == (60, 0)
    embedded, served = chains_of(line.folder / "runs/demo/cache"), chains_of(tmp_path / "c")
    assert embedded.keys() == served.keys(), "the same requests of the same teacher have the same ids"
    for sample_id, (row, signals) in embedded.items():
        assert served[sample_id][0] == row
        assert_same_signals(served[sample_id][1], signals, 64)
    (manifest,) = Catalog(tmp_path / "c").runs().values()
    assert manifest.software["vllm"].startswith("0.")
    assert manifest.engine["served"][vllm_server]["path"] == path


async def completions_alone(*_: object) -> Api:
    """As a server without --enable-scale-out would be met."""
    return CompletionsApi()


def test_the_command_asks_a_server(line: Line, vllm_server: str, tmp_path: Path) -> None:
    config = {**TEACHER, "cache": str(tmp_path / "c"), "engine": {**SETTINGS, "endpoints": [f"{vllm_server}/v1"]}}
    (tmp_path / "served.yaml").write_text(yaml.safe_dump(config))
    result = line.step("served", "teacher-cache", "build", str(tmp_path / "served.yaml"))
    assert (result["num_new_chains"], result["num_failures"], result["run_id"]) == (
        60,
        0,
        line.results["build"]["run_id"],
    )
