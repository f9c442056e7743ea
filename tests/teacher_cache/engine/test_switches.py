"""`engine.vllm` and `sampling.vllm`: names, values, identities, and what a server is asked."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillroom.cache.catalog import Catalog
from stillroom.config import validate_config
from stillroom.errors import ConfigError
from stillroom.schema.manifest import run_id_for
from stillroom.schema.records import stable_hash
from teacher_cache.building.run_manifest import run_id_of
from teacher_cache.config import BuildConfig, ScoreConfig, ServerConfig, load_run_config
from teacher_cache.engine import switches
from teacher_cache.engine.vllm.arguments import new_config
from teacher_cache.maintenance.verify import verify_cache
from teacher_cache.prompts.prompts import sampling_of
from tests.helpers import ROOT
from tests.helpers.fake_builds import make_config, make_requests, make_teacher, run_build
from tests.helpers.fake_server import Behaviour, FakeServer
from tests.helpers.programs import run_with_vllm

RUN: dict[str, Any] = {
    "cache": "cache",
    "run": "r",
    "teacher": {"model": "m"},
    "prompts": {"sources": [{"kind": "jsonl", "name": "s", "path": "p.jsonl", "prompt_field": "q"}]},
}


def config_of(**blocks: Any) -> BuildConfig:
    return BuildConfig.model_validate({**RUN, **blocks})


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        (
            {"engine": {"vllm": {"max_model_len": 5}}},
            "engine.vllm: max_model_len cannot be set here: use engine.max_mo",
        ),
        ({"engine": {"vllm": {"logprobs_mode": "x"}}}, "the stored distributions are the teacher's own"),
        (
            {"engine": {"vllm": {"data_parallel_size": 2}}},
            "start more with --join or --on ray, or serve them (vllm serve --data-parallel-size N)",
        ),
        ({"engine": {"vllm": {"hf_token": "x"}}}, "set the environment variable HF_TOKEN"),
        ({"engine": {"vllm": {"_api_process_count": 1}}}, "it is internal"),
        ({"sampling": {"vllm": {"n": 2}}}, "sampling.vllm: n cannot be set here: use sampling.samples"),
        (
            {
                "engine": {"kind": "openai", "endpoint": "http://x", "model": "m"},
                "capture": {"max_support": 20, "draws": 0},
                "sampling": {"vllm": {"stop": ["x"]}},
            },
            "an API takes further fields in engine.parameters",
        ),
        ({"sampling": {"vllm": {"structured_outputs": {}}}}, "its mask changes the logits that the capture reads"),
        (
            {"engine": {"kind": "server", "endpoints": ["http://x"], "vllm": {"enable_prefix_caching": True}}},
            "vllm: a server has its own engine arguments: give --enable-prefix-caching to `vllm serve` instead",
        ),
    ],
)
def test_what_cannot_be_set_is_named_with_the_remedy(blocks: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate_config({**RUN, **blocks}, BuildConfig, "c.yaml")
    assert said in str(error.value)


def test_workers_that_would_wait_for_each_other_do_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DP_SIZE", "2")
    with pytest.raises(ConfigError, match="VLLM_DP_SIZE=2 ties workers together: unset it, and start more with --join"):
        new_config({})


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "engine.vllm.enable_prefix_cachin=true",
            "has no 'enable_prefix_cachin': did you mean 'enable_prefix_caching'?",
        ),
        (
            "sampling.vllm.stop_tokens=[1]",
            "sampling.vllm: the installed vLLM has no 'stop_tokens': did you mean 'stop_",
        ),
        (
            "engine.vllm.gpu_memory_utilisation=0.5",
            "gpu_memory_utilization cannot be set here: use engine.gpu_memory_utilization",
        ),
    ],
)
def test_a_slip_in_a_name_is_noticed_before_anything_starts(tmp_path: Path, override: str, said: str) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(RUN))
    with pytest.raises(ConfigError) as error:
        load_run_config(tmp_path / "c.yaml", [override])
    assert said in str(error.value)


def test_identities_change_where_tokens_may_and_nowhere_else() -> None:
    teacher = make_teacher().record

    def ids(**blocks: Any) -> tuple[str, str]:
        config = config_of(**blocks)
        source = config.prompts.sources[0]
        sampling = sampling_of(config.sampling, source)
        return run_id_of(config, teacher), stable_hash(sampling | {"engine": config.engine.switches})

    plain = ids()
    same = (
        {"engine": {"vllm": {"enable_prefix_caching": False}}},
        {"sampling": {"vllm": {"stop": [], "min_tokens": 0, "presence_penalty": 0.0}}},
    )
    assert all(ids(**blocks) == plain for blocks in same)
    others = [
        ids(**blocks)
        for blocks in (
            {"engine": {"vllm": {"hf_overrides": {"rope_theta": 5.0}}}},
            {"engine": {"vllm": {"an_argument_of_tomorrow": 1}}},
            {"sampling": {"vllm": {"stop": ["x"]}}},
            {"sampling": {"vllm": {"stop": ["y"]}}},
        )
    ]
    for position in (0, 1):
        assert len({one[position] for one in (plain, *others)}) == 5


def test_runs_without_switches_keep_their_ids() -> None:
    settings = ("t", {"k": 1}, {"start": "x"})
    assert run_id_for("r", "score", "t", {}, *settings[1:], {}) == f"r_{stable_hash('run', *settings, 'score')[:8]}"
    assert run_id_for("r", "score", "t", {"engine": {"a": 1}}, *settings[1:], {}) != run_id_for(
        "r", "score", "t", {}, *settings[1:], {}
    )
    assert switches.identity_of("t", {}) == "t"
    completions = {"sources": [{"kind": "cache", "name": "c", "path": "other"}]}
    score = ScoreConfig.model_validate(
        {"cache": "c", "run": "r", "teacher": {"model": "m"}, "completions": completions}
    )
    assert switches.identity_of("t", score.engine.switches) == "t"


def test_the_manifest_says_what_was_set_and_verifies(tmp_path: Path) -> None:
    switched = {
        "engine": {"vllm": {"block_size": 64, "hf_overrides": {}}},
        "sampling": {"vllm": {"stop_token_ids": [9]}},
    }
    for cache, blocks in (("plain", {}), ("switched", switched)):
        run_build(make_config(tmp_path / cache, **blocks), make_requests(3))
        assert verify_cache(tmp_path / cache).ok
    plain, found = (next(iter(Catalog(tmp_path / name).runs().values())) for name in ("plain", "switched"))
    assert "vllm" not in plain.sampling
    assert "vllm" not in plain.engine
    assert found.engine["vllm"] == {"block_size": 64, "hf_overrides": {}}
    assert (found.sampling["vllm"], found.sampling["engine"]) == ({"stop_token_ids": [9]}, {"hf_overrides": {}})


def test_without_switches_vllm_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switches, "fields_of", None)
    for block in ("engine", "sampling"):
        switches.check_names(block, {})


def test_every_judged_name_is_in_the_documentation_and_in_vllm() -> None:
    text = (ROOT / "docs/switches.md").read_text(encoding="utf-8")
    for block, safe in (("engine", switches.ENGINE_SAFE), ("sampling", switches.SAMPLING_SAFE)):
        switches.check_names(block, safe)
        assert [name for name in sorted(safe) if f"`{name}`" not in text] == []
    refused = {**switches.ENGINE_REFUSED, **switches.SAMPLING_REFUSED}
    # Those whose remedy names another key of the same name need no line.
    unlisted = "it is not a sampling parameter"
    listed = [name for name, why in refused.items() if not why.endswith(f".{name}") and why != unlisted]
    assert [name for name in listed if f"`{name}`" not in text] == []


VALUES = r"""
from stillroom.errors import ConfigError
from teacher_cache.engine.vllm.values import cpu_problem, typed

def said(block, given):
    try:
        typed(block, given)
    except ConfigError as error:
        return str(error)

reasoning = typed("engine", {"reasoning_config": {"reasoning_start_str": "<think>"}})["reasoning_config"]
assert reasoning.reasoning_start_str == "<think>"
detection = {"max_pattern_size": 2, "min_count": 3}
assert typed("sampling", {"repetition_detection": detection})["repetition_detection"].min_count == 3
assert "engine.vllm.enable_prefix_caching: must be a valid bool" in said("engine", {"enable_prefix_caching": "maybe"})
assert "unknown key 'reasoning_start': did you mean" in said("engine", {"reasoning_config": {"reasoning_start": "x"}})
# vLLM itself would ignore the key, and detect nothing.
slip = said("sampling", {"repetition_detection": {"max_patern_size": 2}})
assert "unknown key 'max_patern_size': did you mean 'max_pattern_size'?" in slip
assert "sampling.vllm.min_tokens: must be a valid integer" in said("sampling", {"min_tokens": "x"})
assert said("sampling", {"logit_bias": {50: 1.0}, "stop": "x"}) is None
from teacher_cache.config import EmbeddedConfig
from teacher_cache.engine.vllm.arguments import check_values
for engine, sampling in (({"block_size": [1]}, {}), ({}, {"min_tokens": "many"})):
    try:
        check_values(EmbeddedConfig.model_validate({"vllm": engine}), sampling)
        raise AssertionError
    except ConfigError as error:
        assert "must be a valid integer" in str(error)
ngram = {"speculative_config": {"method": "ngram"}}
assert "ignores the temperature on a CPU" in cpu_problem(ngram, scores=False, is_random=True)
assert cpu_problem(ngram, scores=False, is_random=False) is None
assert "enable_chunked_prefill" in cpu_problem({"enable_chunked_prefill": True}, scores=False, is_random=False)
print("all good")
"""


def test_values_are_judged_by_vllms_own_types() -> None:
    # `plan` and the build check them alike.
    assert run_with_vllm(["tests.helpers.vllm_script", VALUES]).endswith("all good\n")


@pytest.mark.parametrize("has_generate", [True, False])
def test_a_server_is_asked_for_its_parameters(has_generate: bool, capsys: pytest.CaptureFixture[str]) -> None:
    from teacher_cache.config import CaptureConfig
    from teacher_cache.engine.http.server import check_endpoints

    def summary(extra: dict[str, Any]) -> str:
        config = ServerConfig.model_validate({"kind": "server", "endpoints": [server.url]})
        return check_endpoints(config, make_teacher(), CaptureConfig(max_support=8, draws=0), extra)[0].summary

    detection = {"max_pattern_size": 2, "min_count": 3}
    with FakeServer(Behaviour(has_generate=has_generate)) as server:
        assert summary({"min_tokens": 2, "repetition_detection": detection}).startswith("serves tiny")
        asked = server.behaviour.seen[-1]
        assert asked.get("sampling_params", asked)["repetition_detection"] == detection
        assert "ignores sampling.vllm.min_token, which its vLLM does not have: did you mean 'min_tokens'?" in summary(
            {"min_token": 2}
        )
        assert (
            "repetition_detection.max_size, which its vLLM does not have: did you mean 'max_pattern_size'?"
            in summary({"repetition_detection": {"max_size": 1}})
        )
        server.behaviour.trouble = lambda body: "400" if '"stop"' in json.dumps(body) else None
        assert "rejects sampling.vllm: status 400" in summary({"stop": [""]})
        server.behaviour.lists_parameters = False
        assert summary({"anything": 2}).startswith("serves tiny")
        assert "names in sampling.vllm are not checked" in capsys.readouterr().err
