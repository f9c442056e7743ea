"""The Python interface: `import teacher_cache` is cheap, and its functions do what the commands do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import teacher_cache
import teacher_cache.building.commands
from stillroom.errors import ConfigError
from student_train.commands.options import load_train_config
from teacher_cache.config import load_run_config
from tests.helpers import ROOT
from tests.helpers.fake_builds import make_config, make_engine, make_teacher


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration of six prompts and six completions whose teacher is the fake engine."""
    teacher = make_teacher()
    teacher.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(teacher_cache.building.commands, "identify_teacher", lambda *_: teacher)
    monkeypatch.setattr(teacher_cache.building.commands, "start_engine", lambda *_: make_engine())
    rows = [{"q": f"question {number}", "a": "5", "c": f"answer {number}"} for number in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"prompt_field": "q", "reference_field": "a", "judge": "exact"}
    source = {"kind": "jsonl", "name": "own", "path": str(tmp_path / "rows.jsonl"), **fields}
    shared = {"cache": str(tmp_path / "c"), "run": "own", "teacher": {"model": "fake"}}
    shared["capture"] = make_config(tmp_path).capture.model_dump()
    (tmp_path / "build.yaml").write_text(yaml.safe_dump({**shared, "prompts": {"sources": [source]}}))
    scored = {"sources": [{**source, "completion_field": "c"}]}
    (tmp_path / "score.yaml").write_text(yaml.safe_dump({**shared, "completions": scored}))
    return tmp_path / "build.yaml"


def test_build_score_and_judge(config: Path) -> None:
    first = teacher_cache.build(config, worker="0/2")
    second = teacher_cache.build(str(config), worker="1/2")
    assert first.recorded.num_chains + second.recorded.num_chains == 6
    more = teacher_cache.build(config, overrides=["sampling.samples=2"])
    assert (more.num_total, more.num_done_before, more.recorded.num_chains) == (12, 6, 6)
    scored = teacher_cache.score(config.with_name("score.yaml"))
    assert (scored.recorded.num_chains, scored.stopped) == (6, None)
    report = teacher_cache.judge(config.parent / "c", again=True)
    assert report.by_judge["exact"].num_chains == 18


def test_a_configuration_of_the_other_kind_is_refused(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"student.yaml configures a student: student-train run"):
        load_run_config(ROOT / "benchmarks/demo/student.yaml")
    with pytest.raises(ConfigError, match=r"teacher.yaml: this configures a teacher: use teacher-cache build"):
        load_train_config(ROOT / "benchmarks/demo/teacher.yaml", None)
    with pytest.raises(ConfigError, match=r"names existing completions.*teacher-cache score"):
        teacher_cache.build(config.with_name("score.yaml"))
    with pytest.raises(ConfigError, match=r"names prompts.*teacher-cache build"):
        teacher_cache.score(config)


def test_the_interface_loads_nothing_until_it_is_used() -> None:
    script = (
        "import sys, teacher_cache; loaded = {'pydantic', 'numpy', 'pyarrow', 'torch'} & sys.modules.keys();"
        "assert not loaded, loaded; assert {*teacher_cache.__all__} <= {*dir(teacher_cache)}"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
