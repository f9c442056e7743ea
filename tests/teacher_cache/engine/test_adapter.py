"""`teacher.adapter`: what is refused before anything is loaded, who the teacher is, and a server that serves one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.cache.catalog import Catalog
from stillroom.cache.tensors import tensor_bytes
from stillroom.errors import ConfigError, DataError
from stillroom.schema.records import stable_hash
from teacher_cache.config import TeacherConfig
from teacher_cache.doctor import diagnose
from teacher_cache.engine.teacher import IdentifiedTeacher, identify_teacher
from teacher_cache.inspect.stats import cache_stats, stats_text
from teacher_cache.plan import plan_build, plan_lines
from tests.helpers import fake_builds
from tests.helpers.fake_server import VOCAB_SIZE, Behaviour, FakeServer
from tests.helpers.tiny_tokenizer import byte_level, save
from tests.teacher_cache.engine.http.test_endpoints import as_config, served

WIDTH = 8
MODULE = "model.layers.0.self_attn.q_proj"


def matrices(module: str = MODULE, width: int = WIDTH, value: float = 1.0) -> dict[str, Any]:
    name = f"base_model.model.{module}"
    return {
        f"{name}.lora_A.weight": np.full((2, width), value, np.float32),
        f"{name}.lora_B.weight": np.ones((WIDTH, 2), np.float32),
    }


def write_adapter(folder: Path, tensors: dict[str, Any] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.safetensors").write_bytes(tensor_bytes(matrices() if tensors is None else tensors))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's folder, with as much of it as identifies a teacher."""
    made = save(byte_level(), tmp_path / "model")
    (made / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": VOCAB_SIZE}))
    (made / "model.safetensors").write_bytes(tensor_bytes({f"{MODULE}.weight": np.ones((WIDTH, WIDTH), np.float32)}))
    return made


def identified(model: Path, adapter: Path | None) -> IdentifiedTeacher:
    return identify_teacher(TeacherConfig(model=str(model), adapter=None if adapter is None else str(adapter)))


@pytest.mark.parametrize(
    ("tensors", "config", "said"),
    [
        ({}, {"peft_type": "IA3"}, r"adapter of another kind \(peft_type IA3\) than LORA: merge the adapter"),
        ({"base_model.model.lm_head.weight": np.ones(4, np.float32)}, {}, r"more than LoRA matrices \(base_model"),
        (matrices() | matrices("model.layers.7.mlp.up_proj"), {}, r"to another model: .* has no model.layers.7$"),
        (
            matrices() | {f"base_model.model.{MODULE}.lora_A.weight": np.ones(4, np.float32)},
            {},
            "A.weight is not a matrix",
        ),
        (matrices(width=6), {}, r"q_proj.lora_A.weight has 6 channels, and the weights in .* have 8 × 8$"),
    ],
)
def test_an_adapter_that_cannot_be_applied_is_refused(
    tmp_path: Path, model: Path, tensors: dict[str, Any], config: dict[str, Any], said: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", tensors, **config)
    with pytest.raises(DataError, match=f"^teacher.adapter: .*{said}"):
        identified(model, adapter)


def test_a_folder_without_an_adapter_and_one_that_adds_tokens_are_refused(tmp_path: Path, model: Path) -> None:
    with pytest.raises(DataError, match=r"holds no adapter_config.json: use the folder of a LoRA adapter by peft"):
        identified(model, tmp_path / "none")
    adapter = write_adapter(tmp_path / "adapter")
    save(byte_level(), adapter)
    assert identified(model, adapter).record.adapter_fingerprint
    save(byte_level(), adapter, ("<think>", "</think>", "<tool>"))
    with pytest.raises(DataError, match=r"adds 1 token to the model's vocabulary, such as '<tool>': merge"):
        identified(model, adapter)
    header = b'{"base_model.model.x.lora_A.weight":{"dtype":"F32","data_offsets":[0,0]}}'
    (adapter / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(DataError, match=r"^teacher.adapter: .* offsets of 'base_model.model.x.lora_A.weight' do not"):
        identified(model, adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(DataError, match=r"holds no adapter_model.safetensors: save the adapter"):
        identified(model, adapter)


def test_an_adapter_makes_another_teacher_by_its_content(tmp_path: Path, model: Path) -> None:
    plain = identified(model, None).record
    parts = (plain.weights_fingerprint, plain.tokenizer_fingerprint, plain.template_fingerprint)
    assert plain.fingerprint == stable_hash("teacher", *parts), "teachers without one keep their fingerprints"
    assert not {"adapter", "adapter_fingerprint"} & plain.model_dump().keys()
    first = identified(model, write_adapter(tmp_path / "a")).record
    again = write_adapter(tmp_path / "b", target_modules=["v_proj", "q_proj"], base_model_name_or_path="elsewhere")
    other = write_adapter(tmp_path / "c", matrices(value=1.5))
    scaled = write_adapter(tmp_path / "d", lora_alpha=8)
    assert identified(model, again).record.fingerprint == first.fingerprint
    found = {one.fingerprint for one in (plain, first, *(identified(model, one).record for one in (other, scaled)))}
    assert len(found) == 4
    assert first.weights_fingerprint == plain.weights_fingerprint


def test_stats_name_the_adapter_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = fake_builds.make_teacher()
    adapted = made.record.model_copy(update={"adapter": "a", "adapter_fingerprint": "d" * 32})
    monkeypatch.setattr(fake_builds, "make_teacher", lambda: IdentifiedTeacher(adapted, made.tokenizer))
    result = fake_builds.run_build(fake_builds.make_config(tmp_path / "c"), fake_builds.make_requests(2))
    catalog = Catalog(tmp_path / "c")
    assert catalog.runs()[result.run_id].teacher.adapter_fingerprint == "d" * 32
    assert f"run {result.run_id}: LoRA adapter a (dddddddd)" in stats_text(cache_stats(catalog))


def test_a_server_serves_the_adapter_that_is_meant(tmp_path: Path, model: Path) -> None:
    adapter = str(write_adapter(tmp_path / "adapter"))
    with FakeServer(Behaviour()) as server:
        block = served(tmp_path, model, server.url)

        def status(adapter: str | None, parent: str | None) -> str:
            server.behaviour.parent = parent
            plan = plan_build(as_config({**block, "teacher": {"model": str(model), "adapter": adapter}}))
            assert (f"adapter  {adapter}" in "\n".join(plan_lines(plan))) == (adapter is not None)
            return plan.endpoints[0].summary

        assert status(adapter, "base").startswith("serves tiny, max_model_len 256")
        assert "serves tiny without an adapter: start it with --enable-lora" in status(adapter, None)
        assert "as a LoRA adapter of base, and chains would be stored as base's own" in status(None, "base")
        (model / "model.safetensors").unlink()
        # The served name alone identifies such a teacher.
        assert status(None, "base").startswith("serves tiny, ")
        found = {one["name"]: one for one in diagnose(as_config(block))["checks"]}
        assert found["server"]["state"] == "ok"


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ({"engine": {"vllm": {"lora_dtype": "auto"}}}, "engine.vllm.lora_dtype has no effect without teacher.adapter"),
        ({"engine": {"vllm": {"max_lora_rank": 8}}}, "use teacher.adapter"),
        (
            {"teacher": {"model": "m", "adapter": "a"}, "engine": {"kind": "server", "endpoints": ["http://x"]}},
            "set engine.model to",
        ),
        (
            {
                "teacher": {"model": "m", "adapter": "a"},
                "engine": {"kind": "openai", "endpoint": "http://x", "model": "m"},
                "capture": {"max_support": 20, "draws": 0},
            },
            "teacher.adapter has no effect with engine.kind openai",
        ),
    ],
)
def test_settings_without_effect_are_refused(tmp_path: Path, blocks: dict[str, Any], said: str) -> None:
    block = served(tmp_path, tmp_path, "http://x")
    with pytest.raises(ConfigError, match=said):
        as_config({**block, "engine": {}, **blocks})
