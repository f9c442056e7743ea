"""Environments of foreign tools: made once, whole or not at all; failures are one line."""

import stat
import sys
from pathlib import Path

import pytest

from stillroom.errors import ConfigError, StillroomError
from stillroom.program import StopRequest
from student_train.export import environments
from student_train.export.environments import REQUIREMENTS, folder_of, python_of

FAKE_UV = """#!/bin/sh
echo "$@" >> "$UV_LOG"
case "$1" in
  venv) for last; do :; done; mkdir -p "$last/bin"; ln -s "$UV_PYTHON" "$last/bin/python" ;;
  pip) [ "$UV_FAILS" != signal ] || { sleep 0.2; kill -TERM $PPID; exec sleep 60; }
       [ -z "$UV_FAILS" ] || { echo "error: no route to host" >&2; exit 1; } ;;
esac
"""


@pytest.fixture
def uv_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a uv that installs nothing was asked."""
    uv = tmp_path / "uv"
    uv.write_text(FAKE_UV)
    uv.chmod(uv.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(environments, "_uv", lambda: str(uv))
    monkeypatch.setenv("UV_LOG", str(tmp_path / "uv.log"))
    monkeypatch.setenv("UV_PYTHON", sys.executable)
    monkeypatch.setenv("UV_FAILS", "")
    monkeypatch.setenv(environments.FOLDER_VARIABLE, str(tmp_path / "environments"))
    return tmp_path / "uv.log"


def test_an_environment_is_made_once(uv_log: Path) -> None:
    python = python_of("gguf")
    assert python == folder_of("gguf") / "bin" / "python"
    assert python.exists()
    assert python_of("gguf") == python
    venv, install = uv_log.read_text().splitlines()
    assert venv.startswith("venv ")
    assert install.endswith(f"--requirements {REQUIREMENTS / 'gguf.txt'}")
    assert sorted(path.name for path in folder_of("gguf").parent.iterdir()) == [
        python.parent.parent.name,
        f"{python.parent.parent.name}.lock",
    ]


def test_one_whose_interpreter_is_gone_is_made_again(uv_log: Path) -> None:
    python = python_of("gguf")
    python.unlink()
    python.symlink_to("gone")
    assert python_of("gguf").exists()


def test_without_network_nothing_is_left(uv_log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_FAILS", "1")
    with pytest.raises(StillroomError, match=r"no route to host.*needs the package index once"):
        python_of("gguf")
    assert [path.suffix for path in folder_of("gguf").parent.iterdir()] == [".lock"]
    monkeypatch.setenv("UV_FAILS", "")
    assert python_of("gguf").exists()


def test_a_signal_leaves_no_half_environment(uv_log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_FAILS", "signal")
    with StopRequest(at_once=True), pytest.raises(KeyboardInterrupt):
        python_of("gguf")
    assert [path.suffix for path in folder_of("gguf").parent.iterdir()] == [".lock"]


def test_a_real_uv_that_reaches_no_index_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environments.FOLDER_VARIABLE, str(tmp_path / "environments"))
    for name, value in {
        "UV_DEFAULT_INDEX": (tmp_path / "none").as_uri(),
        "UV_EXTRA_INDEX_URL": (tmp_path / "none").as_uri(),
        "UV_FIND_LINKS": str(tmp_path),
        "UV_CACHE_DIR": str(tmp_path / "cache"),
        "UV_OFFLINE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StillroomError, match=r"the environment could not be made: .*point UV_FIND_LINKS at") as raised:
        python_of("gguf")
    assert "\n" not in str(raised.value)
    assert [path.suffix for path in (tmp_path / "environments").iterdir()] == [".lock"]


def test_without_uv_the_message_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(environments.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="pip install uv"):
        python_of("gguf")


@pytest.mark.parametrize("path", sorted(REQUIREMENTS.glob("*.txt")), ids=lambda path: path.stem)
def test_requirements_are_exact_and_name_no_index(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) > 30
    assert all(name and version and " " not in line for line in lines for name, _, version in [line.partition("==")])
