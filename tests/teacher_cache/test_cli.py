"""The `teacher-cache` command: results on stdout, one line for a mistake, the right exit code, a quick start."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

import stillroom.program
import teacher_cache.maintenance.quarantine
from stillroom.judging.judges import KINDS
from teacher_cache.cli import main
from tests.helpers.caches import damage, make_cache

HEAVY = {"torch", "transformers", "vllm", "numpy", "pyarrow", "duckdb", "deltalake", "datasets", "pydantic"}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return make_cache(tmp_path / "cache", num_chains=20).root


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Result:
    monkeypatch.setattr(sys, "argv", ["teacher-cache", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    captured = capsys.readouterr()
    return Result(code, captured.out, captured.err)


def test_help_starts_without_heavy_packages() -> None:
    script = (
        "import sys; sys.argv = ['teacher-cache', '--help']\n"
        "from teacher_cache.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code in (0, None)\n"
        f"heavy = {HEAVY!r} & sys.modules.keys()\nassert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    for command in ("plan", "build", "verify", "judge", "sql", "stats", "report", "doctor"):
        assert f"\n  {command} " in result.stdout


def test_mistakes_in_usage_end_with_2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, said in (
        (["verfy", "x"], "Did you mean 'verify'?"),
        (["verify"], "Missing argument"),
        (["verify", "x", "--jsno"], "--json"),
        (["verify", "no-such-folder"], "teacher-cache: no-such-folder is not a cache"),
        (["plan", "no-such-file.yaml"], "teacher-cache: no-such-file.yaml does not exist"),
    ):
        result = run(capsys, monkeypatch, *arguments)
        assert (result.code, result.out) == (2, "")
        assert said in result.err
        assert "Traceback" not in result.err


def test_ctrl_c_ends_with_130(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(root: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(teacher_cache.maintenance.quarantine, "verify_cache", interrupted)
    assert run(capsys, monkeypatch, "verify", cache).code == 130


def test_verify_reports_and_ends_with_3_when_something_is_wrong(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(capsys, monkeypatch, "verify", cache)
    assert result.code == 0
    assert result.out.startswith("2 shards, 20 chains")
    assert result.out.endswith("no problems\n")
    shard = next((cache / "chains").rglob("*.parquet"))
    damage(shard)
    result = run(capsys, monkeypatch, "verify", cache, "--json")
    assert result.code == 3
    assert result.json["ok"] is False
    assert result.json["problems"][0]["file"] == f"chains/{shard.relative_to(cache / 'chains')}"
    result = run(capsys, monkeypatch, "verify", cache)
    assert result.code == 3
    assert str(shard.relative_to(cache)) in result.out


def test_judge_prints_counts(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(capsys, monkeypatch, "judge", cache, "--judge", "regex", "--json")
    assert result.code == 0
    assert result.json["by_judge"]["regex"]["num_chains"] == 20
    assert run(capsys, monkeypatch, "judge", cache, "--judge", "regex").out == "nothing to judge\n"
    assert "20 chains have no judge" in run(capsys, monkeypatch, "judge", cache).out
    result = run(capsys, monkeypatch, "judge", cache, "--judge", "code")
    assert re.search(r"20 undecided \(20 the reference holds .*\); 20 of them keep their earlier verdict", result.out)
    assert "none of 20 chains has what judge code needs" in result.err
    helped = run(capsys, monkeypatch, "judge", "--help").out
    assert all(kind in helped for kind in KINDS)
    assert "newest verdict" in helped
    result = run(capsys, monkeypatch, "judge", cache, "--judge", "maths")
    assert (result.code, result.err) == (2, "teacher-cache: judge 'maths' is unknown: did you mean 'math'?\n")
    assert "math" in KINDS


def test_sql_answers(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(capsys, monkeypatch, "sql", cache, "SELECT count(*) AS n FROM chains", "--format", "json")
    assert result.json == [{"n": 20}]
    result = run(capsys, monkeypatch, "sql", cache, "SELECT nothing FROM chains")
    assert result.code == 2
    assert result.err.startswith("teacher-cache: query: ")
    result = run(capsys, monkeypatch, "sql", cache, "DELETE FROM chains")
    assert (result.code, result.err.count("\n"), "read-only" in result.err) == (2, 1, True)
    for arguments in (["sql", cache, ".tables\n"], ["sql", cache, "-"], ["sql", cache]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("  .tables\nSELECT 1"))
        result = run(capsys, monkeypatch, *arguments)
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith("teacher-cache: query: .tables works only in an interactive session")


@pytest.mark.parametrize(
    "arguments",
    [["stats"], ["show", "SAMPLE"]],
)
def test_a_closed_pipe_is_not_an_error(cache: Path, arguments: list[str]) -> None:
    sample = next(iter(pq.read_table(next(cache.rglob("w0*.parquet")), columns=["sample_id"]).column(0))).as_py()
    command, *others = [sample if one == "SAMPLE" else one for one in arguments]
    read_end, write_end = os.pipe()
    os.close(read_end)
    program = [sys.executable, "-m", "teacher_cache.cli", command, str(cache), *others]
    try:
        done = subprocess.run(program, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_a_file_that_cannot_be_written_is_one_line(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody can create files there, not even root.
    for arguments in (["sql", cache, "SELECT 1", "--out", "/proc/x.csv"], ["sql", cache, "--export-views", "/proc/x"]):
        result = run(capsys, monkeypatch, *arguments)
        assert (result.code, result.out) == (2, "")
        assert re.search(r"/proc/x\S* cannot be written \(.*\): use a folder you can write to\n$", result.err), (
            result.err
        )


@pytest.mark.parametrize(
    "arguments", [["report", "--out"], ["show", "0", "--html"], ["sql", "SELECT 1", "--out"], ["sql", "--export-views"]]
)
def test_no_folder_is_made_for_a_file_and_nothing_is_written_into_a_cache(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    command, *others, flag = arguments
    for out, said in (
        (cache.parent / "no" / "x.csv", f"there is no folder {cache.parent}/no: create it"),
        (cache.parent, "is a folder: use the path of a file"),
        (cache / "x.csv", "which is read-only here"),
    ):
        result = run(capsys, monkeypatch, command, cache, *others, flag, out)
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith(f"teacher-cache: {flag} {out}")
        assert said in result.err
    assert not (cache.parent / "no").exists()


def test_doctor_reports_what_is_installed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(capsys, monkeypatch, "doctor", "--json")
    assert result.code == (0 if result.json["ok"] else 1)
    assert {"python", "duckdb", "cpu", "disk"} <= {check["name"] for check in result.json["checks"]}


def test_version_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stillroom.program, "version", lambda name: f"{name} 1.2.3")
    result = run(capsys, monkeypatch, "--version")
    assert (result.code, result.out) == (0, "stillroom 1.2.3\n")


@pytest.mark.parametrize("command", ["plan", "build"])
def test_mistakes_in_the_configuration_are_named(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "build.yaml"
    source = {"kind": "jsonl", "name": "q", "path": str(tmp_path / "q.jsonl"), "prompt_field": "q"}
    config = {
        "cache": str(tmp_path / "cache"),
        "run": "test",
        "teacher": {"model": str(tmp_path)},
        "prompts": {"sources": [source]},
    }
    path.write_text(yaml.safe_dump(config))
    for overrides, said in (
        (["sampling.temprature=1"], "did you mean 'temperature'?"),
        (["sampling.temperature=-1"], "sampling.temperature: must be greater than or equal to 0 (got -1)"),
        ([], "q.jsonl does not exist"),
    ):
        arguments = [part for override in overrides for part in ("--set", override)]
        result = run(capsys, monkeypatch, command, path, *arguments)
        assert result.code == 2
        assert said in result.err
        assert sum(line.startswith("teacher-cache: ") for line in result.err.splitlines()) == 1
    (tmp_path / "q.jsonl").write_text('{"q": "What is 2+3?"}\n')
    result = run(capsys, monkeypatch, command, path)
    assert result.code == 2
    assert "teacher-cache: teacher.model: " in result.err
    assert "has no config.json: use a Hugging Face model folder" in result.err
    assert not (tmp_path / "cache").exists()
    if command == "build":
        assert "is not I/N" in run(capsys, monkeypatch, "build", path, "--worker", "4/4").err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["build", "score"])
def test_a_signal_while_the_model_loads_prints_the_command_that_resumes(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    number: signal.Signals,
) -> None:
    def loading(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(f"teacher_cache.building.commands.{command}_cache", loading)
    block, fields = ("prompts", "prompt_field: q") if command == "build" else ("completions", "messages_field: m")
    source = f"{{kind: jsonl, name: s, path: s.jsonl, {fields}}}"
    (tmp_path / "c.yaml").write_text(f"cache: c\nrun: r\nteacher: {{model: m}}\n{block}: {{sources: [{source}]}}\n")
    monkeypatch.chdir(tmp_path)
    result = run(capsys, monkeypatch, command, "c.yaml")
    assert (result.code, result.out) == (130, "")
    assert result.err.endswith(f"Interrupted. Resume with: teacher-cache {command} c.yaml\n")
