"""Rounds: two programs take turns over one folder, are killed at any moment, and do nothing twice.

The programs are stand-ins that note each piece of work; what they would do is tested by their own commands.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillroom.errors import ConfigError, CorruptError
from stillroom.rounds import turns
from stillroom.rounds.config import RoundsConfig, generate_config, score_config, student_of, train_config
from stillroom.rounds.state import PARTS, STUDENT_TRAIN, TEACHER_CACHE, Part, RoundsFolder
from stillroom.rounds.turns import PartFailed, commands_of, state_lines, take_turns
from tests.helpers import ROOT

STAND_IN = """
import json, sys, time
from pathlib import Path
command = sys.argv[1:-1]
work = Path("work")
work.mkdir(exist_ok=True)
# Three pieces a command, each done once however often the command is started.
for piece in range(3):
    done = work / ("-".join(command).replace("/", "_") + f".{piece}")
    if not done.exists():
        time.sleep(0.03)
        with open("log", "a") as log:
            log.write(f"{' '.join(command)} {piece}\\n")
        done.touch()
if "--out" in command:
    Path(command[-1]).mkdir(parents=True, exist_ok=True)
print(json.dumps({"num_chains": 8, "num_tokens": 64, "pass_rate": 0.5, "generation": {"accuracy": 0.25}, "x": 1}))
"""
SIDE = """
import sys
from pathlib import Path
from stillroom.config import load_config
from stillroom.rounds import turns
from stillroom.rounds.config import RoundsConfig
turns.launcher = lambda program: [sys.executable, "-S", "stand_in.py", program]
turns.POLL_S = 0.02
turns.take_turns(load_config(Path("rounds.yaml"), [], RoundsConfig), sys.argv[1:])
"""


def make_config(folder: Path, **changes: Any) -> RoundsConfig:
    return RoundsConfig.model_validate(
        {
            "folder": str(folder / "rounds"),
            "rounds": 2,
            "student": "start",
            "generate": {"prompts": {"sources": []}, "sampling": {"seed": 5}},
            "score": {"teacher": {"model": "teacher"}},
            "train": {"data": {"caches": ["off"]}, "stages": [{"learning_rate": 0.1}]},
            **changes,
        }
    )


def test_the_configurations_of_a_round_lead_from_one_to_the_next(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    root = tmp_path / "rounds"
    assert [student_of(config, number) for number in (1, 2)] == ["start", f"{root}/round-1/student"]
    build = generate_config(config, 2)
    assert build["teacher"] == {"model": f"{root}/round-1/student"}
    assert build["sampling"] == {"temperature": 1.0, "top_p": 1.0, "seed": 6}
    (source,) = score_config(config, 2)["completions"]["sources"]
    assert source["path"] == build["cache"] == f"{root}/round-2/chains"
    data = train_config(config, 2)["data"]
    assert data == {"caches": [f"{root}/round-2/scored", "off"], "behaviour": [build["cache"]]}


@pytest.mark.parametrize(
    ("key", "block"),
    [("cache", {"generate": {"cache": "c"}}), ("student.model", {"train": {"student": {"model": "m"}}})],
)
def test_keys_that_a_round_sets_are_refused(tmp_path: Path, key: str, block: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"each round sets {key} itself"):
        make_config(tmp_path, **block)


def test_a_changed_meaning_is_refused_and_a_changed_machine_is_not(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    RoundsFolder(config).open()
    RoundsFolder(config.updated(rounds=3, generate={**config.generate, "engine": {"max_num_seqs": 2}})).open()
    with pytest.raises(ConfigError, match=r"generate\.sampling\.seed=5, now it is 6"):
        RoundsFolder(config.updated(generate={"prompts": {"sources": []}, "sampling": {"seed": 6}})).open()


def test_a_damaged_state_is_told(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    RoundsFolder(config).open()
    (config.folder / "state.json").write_text("{")
    with pytest.raises(CorruptError, match="delete it"):
        RoundsFolder(config).read()


def test_a_failed_part_ends_with_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "launcher", lambda program: [sys.executable, "-S", "-c", "import sys; sys.exit(3)"])
    config = make_config(tmp_path)
    with pytest.raises(PartFailed, match=r"teacher-cache build .* ended with exit code 3") as failed:
        take_turns(config, [TEACHER_CACHE])
    assert failed.value.exit_code == 3
    state = RoundsFolder(config).read()
    assert state.running is not None
    assert (state.running.part, state.done) == ("generate", [])


def test_two_sides_killed_again_and_again_do_every_piece_once(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "side.py").write_text(SIDE)
    (tmp_path / "rounds.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    sides: dict[str, subprocess.Popen[bytes]] = {}
    random_kills, num_kills, deadline_s = random.Random(0), 0, time.monotonic() + 120
    while any(side.poll() != 0 for side in sides.values()) or len(sides) < 2:
        assert time.monotonic() < deadline_s
        for program in (TEACHER_CACHE, STUDENT_TRAIN):
            if program not in sides or sides[program].poll() not in (None, 0):
                path = os.pathsep.join(str(one) for one in (ROOT, ROOT / "shared"))
                sides[program] = subprocess.Popen(
                    [sys.executable, "side.py", program],
                    cwd=tmp_path,
                    env={**os.environ, "PYTHONPATH": path},
                    stderr=subprocess.DEVNULL,
                )
        time.sleep(0.05 if num_kills >= 10 else random_kills.uniform(0.6, 1.4))
        if num_kills < 10:
            sides[random_kills.choice(list(sides))].send_signal(signal.SIGKILL)
            num_kills += 1
    logged = Counter((tmp_path / "log").read_text().splitlines())
    state = RoundsFolder(config).read()
    parts = [Part(round=number, part=part, by=by) for number in (1, 2) for part, by in PARTS.items()]
    assert [(one.round, one.part) for one in state.done] == [(one.round, one.part) for one in parts]
    wanted = [
        f"{command.program} {' '.join(command.arguments)} {piece}"
        for part in parts
        for command in commands_of(config, part, 1)
        for piece in range(3)
    ]
    # A kill between a line and its mark repeats that piece, and nothing else is ever repeated.
    assert sum(logged.values()) <= len(wanted) + num_kills
    assert logged.keys() == set(wanted)
    assert state.next_part(2) is None
    assert (
        state_lines(config, state)[0] == "round 1    8 chains, 64 tokens, 50.0% correct; answers 25.0% -> 25.0% correct"
    )
    assert json.loads((config.folder / "state.json").read_text())["running"] is None
