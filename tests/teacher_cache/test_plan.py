"""Plan: exactly what build would do, measured where the cache tells, bounded where it does not."""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import teacher_cache.plan
from stillroom.cache.catalog import Catalog
from stillroom.config import plain as config_json
from stillroom.config import validate_config
from stillroom.errors import ConfigError, DataError
from stillroom.schema.records import Capture, stable_hash
from teacher_cache.building.build import Build
from teacher_cache.building.commands import build_cache
from teacher_cache.building.run_manifest import run_id_of
from teacher_cache.config import BuildConfig, EmbeddedConfig
from teacher_cache.engine.api import EngineInfo, Finished, Outcome, Request
from teacher_cache.engine.teacher import identify_teacher
from teacher_cache.maintenance.verify import verify_cache
from teacher_cache.plan import disk_warning, plan_build, plan_lines, shown_lines
from teacher_cache.prompts.prompts import load_prompts, requests
from teacher_cache.writer.recorder import MetricsLog, Recorded
from tests.helpers.tiny_tokenizer import byte_level, save

VOCAB_SIZE = 400


class InstantEngine:
    """Answers every request with five tokens at once; those in `refuses` with a failure."""

    def __init__(self, refuses: str) -> None:
        self.info = EngineInfo(VOCAB_SIZE, 256, "support", {}, {})
        self.num_tokens = 0
        self._refuses = refuses
        self._waiting: list[Request] = []

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting)

    def has_room(self) -> bool:
        return not self._waiting

    def submit(self, request: Request) -> None:
        self._waiting.append(request)

    def step(self) -> list[Outcome]:
        waiting, self._waiting = self._waiting, []
        return [self._answer(request) for request in waiting]

    def close(self) -> None:
        pass

    def _answer(self, request: Request) -> Outcome:
        if self._refuses in request.prompt.messages[0].content:
            return request.failure("refused", "not this one")
        self.num_tokens += 5
        ids = np.arange(40, 45, dtype=np.int32)
        logprobs_TK = np.log(np.tile(np.array([[0.7, 0.2]], np.float32), (5, 1)))
        topk_TK = np.stack([ids, ids + 1], axis=1)
        return Finished(request, Capture(ids, logprobs_TK[:, 0], np.ones(5, np.int32), topk_TK, logprobs_TK), "length")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = save(byte_level(), tmp_path / "model")
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": VOCAB_SIZE}))
    (model / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def config_of(folder: Path, num_sums: int = 6, num_words: int = 4, **more: Any) -> BuildConfig:
    sources: list[dict[str, Any]] = []
    for name, count in (("sums", num_sums), ("words", num_words)):
        path = folder / f"{name}.jsonl"
        rows = [json.dumps({"q": f"{name} number {n}?"}) for n in range(count)]
        path.write_text("\n".join([*rows, rows[0], "{bad"]))
        sources.append({"kind": "jsonl", "name": name, "path": str(path), "prompt_field": "q"})
    sources[1]["samples"] = 2
    data = {
        "cache": str(folder / "cache"),
        "run": "test",
        "teacher": {"model": str(folder / "model")},
        "prompts": {"sources": sources, "heldout_frac": 0.5},
        "sampling": {"max_tokens": 100},
        "capture": {"max_support": 16, "draws": 0},
        **more,
    }
    return validate_config(data, BuildConfig, "test")


def build(config: BuildConfig, refuses: str = "nothing") -> None:
    teacher = identify_teacher(config.teacher)
    loaded = load_prompts(config.prompts)
    wanted = requests(config, loaded.prompts, teacher.tokenizer, teacher.record.fingerprint)
    job = Build(config, teacher, "w0")
    try:
        job.run([*loaded.failures, *wanted], 14, lambda: InstantEngine(refuses))
    finally:
        job.close()


def test_without_a_cache_everything_is_left_and_bounded(folder: Path) -> None:
    config = config_of(folder)
    plan = plan_build(config)
    assert (plan.num_prompts, plan.num_malformed, plan.num_duplicates) == (10, 2, 2)
    assert 0 < plan.num_heldout < 10
    assert (plan.num_chains, plan.num_done, plan.num_left) == (14, 0, 14)
    assert (plan.tokens_left, plan.tokens_left_measured) == (1400, False)
    assert (plan.bytes_per_token, plan.bytes_per_token_measured) == (20.0 + 1.8 * 16, False)
    assert plan.gb_left == pytest.approx(1400 * (20 + 1.8 * 16) / 1e9)
    warmer = plan_build(config_of(folder, capture={"temperatures": [0.5, 2.0]}))
    assert warmer.bytes_per_token == plan.bytes_per_token + 8
    assert plan.hours_left is None
    assert plan.fits
    assert disk_warning(plan) is None
    assert [(one.source, one.num_prompts, one.num_chains) for one in plan.sources] == [("sums", 6, 6), ("words", 4, 8)]
    assert not config.cache.exists()
    text = "\n".join(plan_lines(plan))
    assert "up to 1.4k" in text
    assert f"malformed: {folder / 'sums.jsonl'}:8: not JSON" in text
    assert f"duplicate: sums {folder / 'sums.jsonl'}:7 repeats sums {folder / 'sums.jsonl'}:1" in text


def test_after_a_build_nothing_is_left_and_more_prompts_are_measured(folder: Path) -> None:
    build(config_of(folder), refuses="sums number 2")
    plan = plan_build(config_of(folder))
    assert (plan.num_chains, plan.num_done, plan.num_failed, plan.num_left) == (14, 13, 1, 0)
    assert (plan.tokens_left, plan.gb_left) == (0, 0)
    assert plan_lines(plan)[-1] == "nothing is left to do"

    more = plan_build(config_of(folder, num_sums=16))
    assert (more.num_done, more.num_failed, more.num_left) == (13, 1, 10)
    assert more.sources[0].mean_num_tokens == 5.0
    assert (more.tokens_left, more.tokens_left_measured) == (50.0, True)
    files = list((folder / "cache" / "chains").glob("*/*.parquet"))
    assert more.bytes_per_token_measured
    assert more.bytes_per_token == pytest.approx(sum(file.stat().st_size for file in files) / (13 * 5))
    assert more.tokens_per_s is not None
    assert more.hours_left == pytest.approx(50 / more.tokens_per_s / 3600)
    assert any(line.startswith("time") and "as in the last build" in line for line in plan_lines(more))


def test_another_sampling_is_another_run_with_the_old_lengths(folder: Path) -> None:
    build(config_of(folder))
    plan = plan_build(config_of(folder, sampling={"max_tokens": 3, "temperature": 1.0}))
    assert (plan.num_done, plan.num_left) == (0, 14)
    # The same teacher's chains had five tokens; these may have three.
    assert (plan.tokens_left, plan.bytes_per_token_measured, plan.hours_left) == (42.0, False, None)


def test_prompts_without_room_are_counted_separately(folder: Path) -> None:
    plan = plan_build(config_of(folder, engine={"max_model_len": 20}))
    assert (plan.num_unusable, plan.num_left) == (14, 0)
    plan = plan_build(config_of(folder, engine={"max_model_len": 60}))
    assert (plan.num_unusable, plan.num_left) == (0, 14)
    assert plan.tokens_left < 14 * 60


def test_a_small_disk_is_warned_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 1000))
    plan = plan_build(config_of(folder))
    assert not plan.fits
    warning = disk_warning(plan)
    assert warning is not None
    assert "has 1.0 kB free and the build needs up to 68.3 kB" in warning


def test_speed_is_that_of_the_workers_running_together(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    started = {"w0of2": 8_000, "w1of2": 7_000, "stopped": 7_000, "long_dead": 500}
    lasts = {"w0of2": (10_000, 100.0), "w1of2": (9_000, 50.0), "stopped": (7_990, 30.0), "long_dead": (1_000, 70.0)}
    for worker, (time, speed) in lasts.items():
        seconds = time - started[worker]
        lines = [
            {"time": time - 10, "seconds": seconds - 10, "tokens_per_s": 1.0},
            {"time": time, "seconds": seconds, "tokens_per_s": speed},
        ]
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (tmp_path / "runs" / f"test_1.{worker}.metrics.jsonl").write_text(text)
    assert teacher_cache.plan._last_speed(tmp_path, "test_1") == 150.0
    assert teacher_cache.plan._last_speed(tmp_path, "test_2") is None


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model" / "model.safetensors").unlink()
    with pytest.raises(DataError, match="holds no weights"):
        plan_build(config_of(folder))


def test_a_metrics_line_that_was_cut_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    path = tmp_path / "runs" / "test_1.w0.metrics.jsonl"
    path.write_text('{"time": 1.0, "seconds": 1.0, "tokens_per_s": 5.0}\n{"time": 2.0, "tok')
    assert teacher_cache.plan._last_speed(tmp_path, "test_1") == 5.0
    with MetricsLog(path) as log:
        log.write(1, 2, 3, Recorded())
    lines = path.read_text().splitlines()
    assert (lines[1], len(lines), json.loads(lines[2])["num_done"]) == ('{"time": 2.0, "tok', 3, 1)
    path.write_text('{"ti')
    assert teacher_cache.plan._last_speed(tmp_path, "test_1") is None


def test_rows_left_out_are_counted_beyond_the_first_few(folder: Path) -> None:
    config = config_of(folder)
    path = folder / "sums.jsonl"
    path.write_text(path.read_text() + "\n{bad" * 3)
    plan = plan_build(config)
    assert plan.examples[3] == "malformed: and 2 more"
    assert sum(line.startswith("malformed: ") for line in plan.examples) == 4
    plan.num_duplicates = 1
    assert "5 malformed, 1 duplicate, 0 contaminated" in "\n".join(plan_lines(plan))


def test_values_of_switches_are_checked_before_prompts_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(engine: EmbeddedConfig, sampling: dict[str, Any]) -> None:
        raise ConfigError(f"{engine.vllm} {sampling}")

    monkeypatch.setattr("teacher_cache.engine.vllm.arguments.check_values", refuse)
    monkeypatch.setattr("teacher_cache.plan.load_prompts", None)
    monkeypatch.setattr("teacher_cache.building.commands.load_prompts", None)
    config = config_of(folder, engine={"vllm": {"block_size": 64}}, sampling={"vllm": {"min_tokens": 2}})
    for start in (plan_build, lambda config: build_cache(config, None, retry_failures=False)):
        with pytest.raises(ConfigError, match=r"\{'block_size': 64\} \{'min_tokens': 2\}"):
            start(config)
    with pytest.raises(ConfigError, match=r"sampling\.vllm: the installed vLLM has no 'min_token'"):
        plan_build(config_of(folder, sampling={"vllm": {"min_token": 2}}))


def test_a_heldout_split_without_prompts_is_noted(folder: Path) -> None:
    config = config_of(folder)
    config = config.updated(prompts=config.prompts.updated(heldout_frac=1e-9))
    assert "no prompt is held out: prompts.heldout_frac=1e-09" in "\n".join(plan_lines(plan_build(config)))


@pytest.mark.parametrize("opens", [Catalog, verify_cache])
def test_a_configuration_given_as_cache_names_its_own(tmp_path: Path, opens: Callable[[Path], object]) -> None:
    path = tmp_path / "teacher.yaml"
    path.write_text("cache: runs/c")
    with pytest.raises(DataError, match=r"teacher\.yaml is a configuration file: use the cache that it names, runs/c"):
        opens(path)
    path.write_text("a: [")
    with pytest.raises(DataError, match=r"teacher\.yaml is a file: use the folder of a cache"):
        opens(path)


def test_a_file_is_refused_as_cache(folder: Path) -> None:
    config = config_of(folder, cache=str(folder / "sums.jsonl"))
    refused = r"sums\.jsonl is a file: use a folder"
    with pytest.raises(DataError, match=refused):
        plan_build(config)
    with pytest.raises(DataError, match=refused):
        Build(config, identify_teacher(config.teacher), "w0")


def test_prompts_are_shown_as_the_teacher_reads_them(folder: Path) -> None:
    config = config_of(folder)
    path = folder / "sums.jsonl"
    path.write_text(json.dumps({"q": "\x1b[31mred?", "a": "5\n6"}) + "\n" + path.read_text())
    plan = plan_build(config, num_shown=5)
    assert [one.source for one in plan.shown] == ["sums", "words"] * 2 + ["sums"]
    assert len({one.prompt_id for one in plan.shown}) == 5
    first = plan.shown[1]
    assert first.prompt.startswith("<|im_start|>user\nwords number")
    assert first.prompt.endswith("?<|im_end|>\n<|im_start|>assistant\n")
    text = "\n".join(shown_lines(plan))
    assert text.count("<|im_start|>assistant") == 5
    assert f"=== words {first.prompt_id[:8]}, {first.num_prompt_tokens} tokens, no reference\n<|im_start|>user" in text
    everything = plan_build(config, num_shown=50).shown
    assert [one.source for one in everything] == ["sums", "words"] * 4 + ["sums"] * 3
    assert "\n\\x1b[31mred?" in "\n".join(shown_lines(plan_build(config, num_shown=50)))
    assert shown_lines(plan_build(config)) == []


def test_refused_prompts_are_named(folder: Path) -> None:
    roles = (["user"], ["user", "tool"], ["user", "system", "user"])
    rows = [{"m": [{"role": role, "content": f"{role}?"} for role in row]} for row in roles]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chat = {"kind": "jsonl", "name": "chat", "path": str(folder / "chat.jsonl"), "messages_field": "m"}
    plan = plan_build(config_of(folder, prompts={"sources": [chat]}))
    assert plan.num_unusable == 1
    assert "refused: source chat, line 2: the chat template rejects the prompt: no tools here" in plan.examples


def test_template_arguments_make_another_run(folder: Path) -> None:
    model = str(folder / "model")
    plain, opened = (
        config_of(folder, teacher={"model": model, "chat_template_kwargs": kwargs})
        for kwargs in ({}, {"open_reasoning": True})
    )
    assert plan_build(plain).run_id != plan_build(opened).run_id
    # As earlier versions wrote it.
    teacher = identify_teacher(plain.teacher).record
    settings = (teacher.fingerprint, config_json(plain.capture), config_json(plain.reasoning))
    sampling = {key: value for key, value in config_json(plain.sampling).items() if key != "samples"}
    assert run_id_of(plain, teacher) == f"test_{stable_hash('run', *settings, sampling)[:8]}"
    build(opened)
    (run,) = Catalog(folder / "cache").runs().values()
    assert run.chat_template_kwargs == {"open_reasoning": True}
    assert run.run_id == run_id_of(opened, teacher)
    unknown = config_of(folder, teacher={"model": model, "chat_template_kwargs": {"open_reasonin": True}})
    with pytest.raises(
        ConfigError, match="open_reasonin has no effect: the chat template does not mention it: did you"
    ):
        plan_build(unknown)


def test_references_that_no_judge_can_use_are_counted(folder: Path) -> None:
    rows = [{"q": f"{one}?", "a": one} for one in ("5", None, "NaN", {"x": 1}, {"x": 2})]
    (folder / "refs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refs = {"kind": "jsonl", "name": "refs", "path": str(folder / "refs.jsonl"), "prompt_field": "q"}
    plan = plan_build(config_of(folder, prompts={"sources": [{**refs, "reference_field": "a", "judge": "math"}]}))
    cannot = "undecided: the judge math cannot decide 2 prompts of refs:"
    assert plan.examples == [f"{cannot} no reference", f"{cannot} the reference is a struct"]
    plan = plan_build(config_of(folder, prompts={"sources": [{**refs, "reference_field": "a"}]}))
    assert plan.examples == ["unjudged: 4 prompts of refs with a reference but no judge: set judge, such as math"]
