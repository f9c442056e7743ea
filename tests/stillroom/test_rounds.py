"""Rounds: two programs take turns over one folder, are killed at any moment, and do nothing twice.

The programs are stand-ins that note each piece of work; what they would do is tested by their own commands.
"""

import errno
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

from stillroom.errors import CacheConflict, ConfigError, CorruptError, StillroomError
from stillroom.rounds import state as state_module
from stillroom.rounds import turns
from stillroom.rounds.config import RoundsConfig, generate_config, score_config, student_of, train_config
from stillroom.rounds.provenance import refuse_other_scores
from stillroom.rounds.state import PARTS, STUDENT_TRAIN, TEACHER_CACHE, Part, RoundsFolder
from stillroom.rounds.turns import PartFailed, _Waiting, commands_of, state_lines, take_turns
from teacher_cache.rounds import require_heldout
from tests.helpers import ROOT
from tests.helpers.caches import make_cache

GENERATE = Part(round=1, part="generate", by=TEACHER_CACHE)
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
    ("message", "block"),
    [
        ("each round sets cache itself", {"generate": {"cache": "c"}}),
        (r"each round sets student\.model itself", {"train": {"student": {"model": "m"}}}),
        (r"teacher\.adapter is not part of the student that trains", {"generate": {"teacher": {"adapter": "a"}}}),
        (r"student must be a mapping of keys to values \(got 'm'\)", {"train": {"student": "m"}}),
        ("sampling must be a mapping", {"generate": {"sampling": "r1"}}),
    ],
)
def test_what_a_round_would_overwrite_is_refused(tmp_path: Path, message: str, block: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **block)


def test_a_seed_that_is_not_a_number_is_left_for_the_build_to_refuse(tmp_path: Path) -> None:
    config = make_config(tmp_path, generate={"sampling": {"seed": "five"}})
    assert generate_config(config, 2)["sampling"]["seed"] == "five"


def test_a_changed_meaning_is_refused_and_a_changed_machine_is_not(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    RoundsFolder(config).open()
    RoundsFolder(config.updated(rounds=3, generate={**config.generate, "engine": {"max_num_seqs": 2}})).open()
    with pytest.raises(ConfigError, match=r"generate\.sampling\.seed=5, now it is 6"):
        RoundsFolder(config.updated(generate={"prompts": {"sources": []}, "sampling": {"seed": 6}})).open()


@pytest.mark.parametrize(
    "state", [b"", b"{", b"\xff\xfe", b"[]", b'{"done": [{"round": "one"}]}', b'{"done": 3}'], ids=repr
)
def test_a_damaged_state_is_reported(tmp_path: Path, state: bytes) -> None:
    config = make_config(tmp_path)
    folder = RoundsFolder(config)
    folder.open()
    folder.begin(GENERATE)
    (config.folder / "state.json").write_bytes(state)
    with pytest.raises(CorruptError, match=r"state\.json is not the state of rounds: .*: delete it") as damage:
        folder.read()
    assert "\n" not in str(damage.value)


def test_numbers_removed_by_hand_are_not_shown(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    folder = RoundsFolder(config)
    for part, by in PARTS.items():
        folder.finish(Part(round=1, part=part, by=by), 1.0, [{}])
    assert state_lines(config, folder.read())[0] == "round 1    0 chains, 0 tokens; answers - correct"


def test_a_side_that_runs_already_is_not_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "LOCK_WAIT_S", 0.0)
    config = make_config(tmp_path)
    # Two processes: a lock is of the file that was opened.
    with RoundsFolder(config).held([STUDENT_TRAIN]):
        with pytest.raises(CacheConflict, match=rf"`student-train rounds` runs already \(process {os.getpid()} on"):
            take_turns(config, [TEACHER_CACHE, STUDENT_TRAIN])
        # The side that was free is free again.
        assert not RoundsFolder(config).is_held(TEACHER_CACHE)


def test_a_side_ends_once_nothing_is_left_for_it(tmp_path: Path) -> None:
    config = make_config(tmp_path, rounds=1)
    folder = RoundsFolder(config)
    for part in ("generate", "score", "judge"):
        folder.finish(Part(round=1, part=part, by=TEACHER_CACHE), 1.0, [])
    assert take_turns(config, [TEACHER_CACHE]).next_part(1) == Part(round=1, part="train", by=STUDENT_TRAIN)


def test_a_side_that_waits_says_for_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path)
    folder, other = RoundsFolder(config), RoundsFolder(config)
    folder.open()
    now_s = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    waiting = _Waiting(folder)

    def said() -> str:
        nonlocal now_s
        now_s += 3600.0
        waiting.tell(GENERATE, other.read().running)
        return capsys.readouterr().err

    assert "`teacher-cache rounds` is not running: start it" in said()
    with other.held([TEACHER_CACHE]):
        assert said() == "round 1, generate: waiting for teacher-cache (1:00:00 so far)\n"
        other.begin(GENERATE)
        assert "generate: teacher-cache on" in said()
        assert said().endswith("waiting (1:00:00 so far)\n")
        other.stop(30.0, "failed with exit code 3")
        assert "failed with exit code 3: start it again; waiting" in said()
        other.begin(GENERATE)
        other.finish(GENERATE, 12.0, [])
    # What its earlier start took counts.
    assert folder.read().done[0].seconds == 42.0


def test_an_earlier_rounds_other_teacher_is_refused_before_training(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    for number, weights in ((1, "a"), (2, "b")):
        root = config.folder / f"round-{number}" / "scored"
        make_cache(root, num_chains=2, vocab_size=50, max_tokens=4)
        for path in (root / "runs").glob("*.json"):
            found = json.loads(path.read_text())
            found["teacher"]["weights_fingerprint"] = weights
            path.write_text(json.dumps(found))
    with pytest.raises(ConfigError, match=r"of round 1 is of .* with other weights: score with that teacher"):
        refuse_other_scores(config, 2)
    refuse_other_scores(config.updated(allow_other_teacher=True), 2)


def test_rounds_without_held_out_prompts_are_refused_before_they_generate(tmp_path: Path) -> None:
    config = make_config(tmp_path, train={"stages": []})
    require_heldout(config, 3)
    for train in ({"eval": None}, {"eval": {"where": "true"}}, {"data": {"caches": ["off"]}}):
        require_heldout(config.updated(train=train), 0)
    with pytest.raises(ConfigError, match=r"set generate\.prompts\.heldout_frac, or train\.eval: null"):
        require_heldout(config, 0)


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = make_config(tmp_path)
    RoundsFolder(config).open()
    monkeypatch.setattr(state_module, "write_text_atomic", full)
    with pytest.raises(StillroomError, match=r"No space left on device: fix that and run the same command again"):
        take_turns(config, [TEACHER_CACHE])


def test_a_failed_part_ends_with_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "launcher", lambda program: [sys.executable, "-S", "-c", "import sys; sys.exit(3)"])
    config = make_config(tmp_path)
    with pytest.raises(PartFailed, match=r"teacher-cache build .* ended with exit code 3") as failed:
        take_turns(config, [TEACHER_CACHE])
    assert failed.value.exit_code == 3
    state = RoundsFolder(config).read()
    assert state.running is not None
    assert (state.running.part, state.running.stopped, state.done) == ("generate", "failed with exit code 3", [])


def test_two_sides_killed_again_and_again_do_every_piece_once(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "side.py").write_text(SIDE)
    (tmp_path / "rounds.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    sides: dict[str, subprocess.Popen[bytes]] = {}
    random_kills, num_kills, deadline_s = random.Random(0), 0, time.monotonic() + 300
    num_done = 0
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
        time.sleep(0.02)
        # Among pieces, on a slow machine too.
        if num_kills < 10 and len(list((tmp_path / "work").glob("*"))) > num_done:
            time.sleep(random_kills.uniform(0.0, 0.1))
            sides[random_kills.choice(list(sides))].send_signal(signal.SIGKILL)
            num_kills += 1
            num_done = len(list((tmp_path / "work").glob("*")))
    assert num_kills > 5
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
