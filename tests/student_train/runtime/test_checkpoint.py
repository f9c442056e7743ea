"""Runs that end in the middle: killed, interrupted, resumed, on one rank or two; checkpoints that cannot be used."""

import contextlib
import os
import random
import re
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
import torch
import yaml

from stillroom.config import Json, plain
from stillroom.errors import CacheConflict, CorruptError, DataError
from student_train.config.run import EngineConfig, TrainConfig
from student_train.runtime import checkpoint
from student_train.runtime.checkpoint import CheckpointState, find_state, latest_state
from student_train.runtime.engine import saved_weights
from student_train.runtime.ranks import RANK_VARIABLES, Ranks
from student_train.runtime.run_folder import RunFolder
from tests.helpers.programs import TIMEOUT_S, Program
from tests.helpers.training import IGNORE_LIBRARY_WARNINGS, Trainer, losses_of

if TYPE_CHECKING:
    from student_train.runtime.engine import Engine

pytestmark = IGNORE_LIBRARY_WARNINGS

LORA: Json = {"trainable": "lora", "lora": {"r": 4, "dropout": 0.2}, "epochs": 6}


@pytest.mark.parametrize(("num_ranks", "stage", "kills"), [(1, LORA, (4, 10)), (2, {"epochs": 5}, (5,))])
def test_killed_run_resumes_bit_for_bit(trainer: Trainer, num_ranks: int, stage: Json, kills: tuple[int, ...]) -> None:
    """SIGKILL at random times, with a checkpoint every step, so that many hit one being written; then to the end."""
    options = ("--nproc", str(num_ranks))
    if num_ranks == 1:
        whole = trainer.finished(stage, eval=None)
    else:
        whole = trainer.config("whole", stage, eval=None)
        _start(whole, *options).wait(expect=0)
    config = trainer.config("run", stage, eval=None, checkpoint={"every_steps": 1})
    random_delay = random.Random(num_ranks)
    place = ""
    for num_steps in kills:
        process = _start(config, *options)
        _wait_for_steps(config, num_steps, process)
        time.sleep(random_delay.uniform(0.0, 0.2))
        process.kill()
        _wait_for_lock(config)
        reached = latest_state(RunFolder(config.run).checkpoints)
        assert reached is not None
        assert 0 < reached.step < reached.num_steps
        place = f"{reached.step} of {reached.num_steps}"
    code, _, said = _start(config, *options).communicate()
    assert code == 0, said
    assert f"resuming after step {place}" in said
    assert losses_of(RunFolder(config.run).read_metrics()) == losses_of(RunFolder(whole.run).read_metrics())
    assert _trained_bytes(config) == _trained_bytes(whole)


@pytest.mark.parametrize("options", [(), ("--nproc", "2")])
def test_interrupted_before_the_first_step_ends_at_once(trainer: Trainer, options: tuple[str, ...]) -> None:
    config = trainer.config("run")
    process = _start(config, *options)
    while not (config.run / ".lock").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    code, _, said = process.communicate()
    assert code == 130, said
    assert "Traceback" not in said
    assert "Resume with: student-train run" in said
    assert not RunFolder(config.run).read_metrics()


def test_two_ranks_give_the_losses_of_one_and_one_resumes_from_two(trainer: Trainer) -> None:
    """Two ranks at ZeRO 2 are interrupted politely, then one rank takes over through a universal checkpoint."""
    stage: Json = {"epochs": 6, "clip_norm": 0.05}
    whole = losses_of(trainer.reference(stage))
    config = trainer.config("run", stage)
    process = _start(config, "--nproc", "2")
    _wait_for_steps(config, 6, process)
    process.send_signal(signal.SIGINT)
    code, _, said = process.communicate()
    assert code == 130, said
    assert "Interrupted. Resume with: student-train run" in said
    assert "--nproc 2" in said
    assert said.count("training on 2 ranks\n") == 1
    # Of all ranks, not of the first alone.
    counted = re.findall(r"^evaluate .* (\S+) tok ", said, flags=re.MULTILINE)
    assert set(counted) == {str(RunFolder(config.run).read_evals()[0]["num_tokens"])}
    state = latest_state(RunFolder(config.run).checkpoints)
    assert state is not None
    assert state.num_ranks == 2
    records = RunFolder(config.run).read_metrics()
    assert len(records) == state.step < state.num_steps
    assert losses_of(records) == pytest.approx(whole[: state.step], rel=1e-4)
    assert losses_of(trainer.run(config)) == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("is_first", [False, True])
def test_one_rank_steps_like_zero_and_each_resumes_the_other(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    """A run that changes after three steps between DeepSpeed's steps and those of OneRank, against OneRank alone."""
    stage: Json = {"clip_norm": 0.05, "weight_decay": 0.1}
    whole = trainer.reference(stage, eval=None)
    config = trainer.config("run", stage, eval=None)
    for needs_no_zero, stop_after in ((is_first, 3), (not is_first, None)):
        monkeypatch.setattr(EngineConfig, "needs_no_zero", lambda *_, own=needs_no_zero, **__: own)
        records = trainer.run(config, stop_after)
    assert losses_of(records) == pytest.approx(losses_of(whole), rel=1e-5)
    assert [one["grad_norm"] for one in records] == pytest.approx([one["grad_norm"] for one in whole], rel=1e-3)


def test_ranks_of_deepspeeds_launcher_give_the_losses_of_one(trainer: Trainer) -> None:
    stage: Json = {"max_steps": 2, "losses": {"forward_kl": 0.8, "chunk_likelihood": 0.1, "cross_entropy": 0.1}}
    whole = losses_of(trainer.reference(stage, eval=None))
    config = trainer.config("run", stage, eval=None)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = ["--master_addr", "127.0.0.1", "--master_port", str(probe.getsockname()[1])]
    launcher = ["deepspeed.launcher.runner", "--num_accelerators", "2", "--no_local_rank", *place, "--module"]
    command = [*launcher, "student_train.cli", "run", _written(config)]
    Program(command, environ={**_environ(), "DS_ACCELERATOR": "cpu"}).wait(expect=0)
    assert losses_of(RunFolder(config.run).read_metrics()) == pytest.approx(whole, rel=1e-4)


def test_a_mistake_under_several_ranks_is_one_line(trainer: Trainer) -> None:
    config = trainer.config("run")
    code, _, said = _start(config, "--nproc", "3").communicate()
    assert code == 2
    assert said.startswith(
        "student-train: stages.0 (distill): batch_tokens=512 is 4 packs of 128 tokens, which 3 ranks cannot share"
    )
    assert said.count("\n") == 1


def test_checkpoints_are_found_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no checkpoint yet"):
        find_state(tmp_path, "last")
    (tmp_path / "latest.json").write_text("{")
    with pytest.raises(CorruptError, match="is not a checkpoint's state"):
        find_state(tmp_path, "last")


def test_a_step_saved_again_forgets_its_universal_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a rewind: a resumption on other ranks would load the weights from before it."""

    class Writer:
        def save(self, folder: Path, tag: str) -> None:
            (folder / tag).mkdir()

    # As after a kill between marker and sweep.
    monkeypatch.setattr(checkpoint, "_sweep", lambda *_: None)
    (tmp_path / "a-000002.universal").mkdir()
    state = CheckpointState(
        stage=0,
        stage_name="a",
        step=2,
        num_steps=4,
        num_ranks=1,
        zero_stage=2,
        stream={},
        num_loss_tokens=1,
        train_s=1.0,
    )
    checkpoint.save(tmp_path, cast("Engine", Writer()), state, 2, Ranks(0, 1, torch.device("cpu")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-000002", "latest.json"]


def _trained_bytes(config: TrainConfig) -> list[bytes]:
    """The trained weights of the last checkpoint, to the bit."""
    checkpoints = RunFolder(config.run).checkpoints
    state = find_state(checkpoints, "last")
    weights = saved_weights(checkpoints, state.tag, state.zero_stage)
    return [weights[name].numpy().tobytes() for name in sorted(weights)]


def _written(config: TrainConfig) -> str:
    path = config.run.parent / "config.yaml"
    path.write_text(yaml.safe_dump(plain(config)))
    return str(path)


def _environ() -> dict[str, str]:
    """Without the variables of the fixture `trainer`."""
    return {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}


def _start(config: TrainConfig, *options: str) -> Program:
    return Program(["student-train", "run", _written(config), *options], environ=_environ())


def _wait_for_lock(config: TrainConfig) -> None:
    """Ranks end with the program that started them, but not before it."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline_s:
        with contextlib.suppress(CacheConflict), RunFolder(config.run).lock():
            return
        time.sleep(0.02)


def _wait_for_steps(config: TrainConfig, num_steps: int, process: Program) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while len(RunFolder(config.run).read_metrics()) < num_steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
