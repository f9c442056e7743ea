"""Configuration: every mistake is one line that names the key, the value and the remedy."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from stillroom.config import load_config, plain
from stillroom.errors import ConfigError
from teacher_cache.config import BuildConfig, SamplingConfig

MINIMAL: dict[str, Any] = {
    "cache": "cache",
    "run": "demo",
    "teacher": {"model": "folder"},
    "prompts": {"sources": [{"kind": "reasoning_gym", "name": "sums", "task": "chain_sum", "size": 3}]},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "build.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    return file


def test_overrides_reach_nested_keys_and_list_items(path: Path) -> None:
    config = load_config(path, ["sampling.temperature=1.0", "prompts.sources.0.size=5"], BuildConfig)
    assert config.sampling.temperature == 1.0
    assert config.prompts.sources[0].model_dump()["size"] == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.temprature=1", "unknown key 'temprature': did you mean 'temperature'?"),
        ("prompts.sources.0.sizes=3", "unknown key 'sizes': did you mean 'size'?"),
        ("prompts.sources.0.kind=foo", r"prompts\.sources\.0: kind 'foo' is unknown: choose one of csv, "),
        ("prompts.sources.0.kind=json", r"kind 'json' is unknown: did you mean 'jsonl'"),
        ("samples=2", r"unknown key 'samples': it belongs in sampling$"),
        ("prompts.sources.4.size=3", "'4' is not an item of a list of 1"),
        ("sampling.temperature=-1", r"sampling\.temperature: .*greater than or equal to 0 \(got -1\)"),
        ("run=a-b", r"run: must be letters, digits and underscores \(got 'a-b'\)"),
        ("prompts.sources.0.name=a b", r"sources\.0\.name: must be letters, digits, underscores, dots and hyphens \("),
        ("prompts.sources.0.size=many", r"yaml: prompts\.sources\.0\.size: must be a valid integer"),
        ('prompts.sources.0={"kind": "jsonl", "name": "a"}', r"yaml: prompts\.sources\.0\.path: is required"),
        ("engine={kind: server}", r"yaml: engine\.endpoints: is required"),
        ("engine={kind: server, endpoint: x}", r"yaml: engine: unknown key 'endpoint'"),
        ("cache", "is not of the form key=value"),
        ("run.name=x", "holds a plain value"),
        ("sampling={", "the value is not YAML"),
        ("teacher.revision=2024-13-01", "the value is not YAML"),
    ],
)
def test_mistakes_are_named(path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path, [override], BuildConfig)
    assert "\n" not in str(caught.value)


def test_a_server_may_be_asked_for_what_the_embedded_engine_gives(path: Path) -> None:
    engine = 'engine={"kind": "server", "endpoints": ["http://localhost:8000"]}'
    assert load_config(path, [engine, "capture.temperatures=[2.0]"], BuildConfig).capture.draws == 8


def test_greedy_sampling_of_several_chains_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="would repeat one chain"):
        load_config(path, ["sampling.temperature=0", "sampling.samples=2"], BuildConfig)


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not YAML"), ("- a", "holds a list"), ("\x00", "not YAML")])
def test_files_that_are_not_a_mapping_are_refused(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path, [], BuildConfig)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cache: a\nrun: b\nrun: c\n", r"key 'run' appears twice, in lines 2 and 3"),
        ("sampling: {seed: 1, seed: 2}\n", r"key 'seed' appears twice, in lines 1 and 1"),
    ],
)
def test_keys_that_stand_twice_are_refused(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path, [], BuildConfig)


def test_anchors_and_merged_keys_are_read(path: Path) -> None:
    path.write_text(
        "cache: cache\nrun: demo\nteacher: {model: folder}\n"
        "prompts:\n  sources:\n    - &one {kind: reasoning_gym, name: a, task: chain_sum, size: 3}\n"
        "    - &two {<<: *one, name: b}\n    - {<<: *two, name: c, size: 4}\n"
    )
    sources = [one.model_dump() for one in load_config(path, [], BuildConfig).prompts.sources]
    assert [(one["name"], one["size"]) for one in sources] == [("a", 3), ("b", 3), ("c", 4)]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist"):
        load_config(tmp_path / "none.yaml", [], BuildConfig)


def test_configurations_are_frozen(path: Path) -> None:
    config = load_config(path, [], BuildConfig)
    with pytest.raises(ValueError, match="frozen"):
        config.run = "other"  # type: ignore[misc]


def test_a_sampling_preset_fills_in_and_is_overridden() -> None:
    assert SamplingConfig.model_validate({"preset": "r1"}) == SamplingConfig(preset="r1")
    qwen = SamplingConfig.model_validate({"preset": "qwen3", "temperature": 0.7})
    assert (qwen.temperature, qwen.top_p, qwen.top_k, qwen.max_tokens) == (0.7, 0.95, 20, 32768)
    # The values make the identity of a run, not the name.
    assert plain(SamplingConfig.model_validate({"preset": "r1"})) == plain(SamplingConfig())
    assert "preset" not in plain(qwen)
    assert qwen.updated(samples=4).top_k == 20
    with pytest.raises(ValidationError, match="preset"):
        SamplingConfig.model_validate({"preset": "r2"})
