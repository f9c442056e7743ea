"""Takes a program's turns: does its parts of rounds when they are due, each as a process of its own, or waits.

A process a part, because a teacher and a student must never share one, and because memory of a GPU is free for certain
once its process has ended.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from stillroom.config import Json
from stillroom.errors import StillroomError
from stillroom.log import format_count, note
from stillroom.program import INTERRUPTED, PARENT_VARIABLE, SIGNALS
from stillroom.rounds.config import RoundsConfig, generate_config, round_folder, score_config, train_config
from stillroom.rounds.state import PARTS, STUDENT_TRAIN, TEACHER_CACHE, Part, RoundsFolder, RoundsState

POLL_S = 1.0
MODULES = {TEACHER_CACHE: "teacher_cache.cli", STUDENT_TRAIN: "student_train.cli"}
KEPT = (
    *("num_chains", "num_tokens", "num_failures", "pass_rate", "by_judge"),
    *("num_steps", "num_loss_tokens", "heldout_before", "heldout_after", "generation", "folder"),
)
"""Numbers of a command's result that state.json keeps."""


class PartFailed(StillroomError):
    """A part's command failed and has said why; ends with its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Command:
    """A command line of one of the programs; `unless` names a folder that it has made before."""

    program: str
    arguments: tuple[str, ...]
    unless: Path | None = None

    @property
    def line(self) -> list[str]:
        """With this interpreter, or the program's own where this environment lacks it."""
        return [*launcher(self.program), *self.arguments, "--json"]


def launcher(program: str) -> list[str]:
    """How `program` is started from here."""
    beside = Path(sys.executable).with_name(program)
    found = str(beside) if beside.exists() else shutil.which(program)
    return [found] if found is not None else [sys.executable, "-P", "-m", MODULES[program]]


def commands_of(config: RoundsConfig, part: Part, num_ranks: int) -> list[Command]:
    """The commands of a part, in order."""
    folder = round_folder(config, part.round)
    train = str(folder / "train.yaml")
    if part.part == "generate":
        return [Command(TEACHER_CACHE, ("build", str(folder / "generate.yaml")))]
    if part.part == "score":
        return [Command(TEACHER_CACHE, ("score", str(folder / "score.yaml")))]
    if part.part == "judge":
        # The student's answers are judged where they were written; what was cut short is judged here.
        return [Command(TEACHER_CACHE, ("judge", str(folder / name))) for name in ("chains", "scored")]
    if part.part == "train":
        ranks = () if num_ranks == 1 else ("--nproc", str(num_ranks))
        return [Command(STUDENT_TRAIN, ("run", train, *ranks))]
    if part.part == "export":
        student = folder / "student"
        return [Command(STUDENT_TRAIN, ("export", train, "--out", str(student)), unless=student)]
    if config.answers is None:
        return []
    answers = config.answers
    asked = ("eval", train, "--generate", str(answers.prompts), "--max-new-tokens", str(answers.max_new_tokens))
    before = [Command(STUDENT_TRAIN, (*asked, "--initial"))] if part.round == 1 else []
    return [*before, Command(STUDENT_TRAIN, asked)]


def take_turns(config: RoundsConfig, programs: Collection[str], *, num_ranks: int = 1) -> RoundsState:
    """Does every part of `programs` when its turn comes, until all rounds are done; returns the last state.

    Raises ConfigError where the folder was started with other settings, PartFailed with the exit code of a command that
    failed, KeyboardInterrupt after a signal.
    """
    folder = RoundsFolder(config)
    folder.open()
    waited_for = ""
    with _signals_to_child() as children:
        while (part := (state := folder.read()).next_part(config.rounds)) is not None:
            if part.by not in programs:
                if (line := _waiting_line(config, part, state)) != waited_for:
                    note(line)
                    waited_for = line
                children.sleep(POLL_S)
                continue
            _do(config, part, folder, children, num_ranks)
    return state


def _do(config: RoundsConfig, part: Part, folder: RoundsFolder, children: "_Children", num_ranks: int) -> None:
    write = {"generate": generate_config, "score": score_config, "train": train_config}.get(part.part)
    if write is not None:
        folder.write_part(round_folder(config, part.round) / f"{part.part}.yaml", write(config, part.round))
    commands = commands_of(config, part, num_ranks)
    started_s, results = time.monotonic(), list[Json]()
    if commands:
        note(f"{part.title}:")
        folder.begin(part)
    for command in commands:
        if command.unless is None or not command.unless.exists():
            result = children.run(command)
            results.append({key: result[key] for key in KEPT if result.get(key) is not None})
    folder.finish(part, time.monotonic() - started_s, results)


def _waiting_line(config: RoundsConfig, part: Part, state: RoundsState) -> str:
    running = state.running
    if running is not None and (running.round, running.part) == (part.round, part.part):
        return f"{part.title}: {part.by} on {running.host} since {running.started_at}; waiting"
    return f"{part.title}: waiting for {part.by} rounds on {config.folder}"


class _Children:
    """Runs commands one at a time; signals go to the one that runs."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._is_asked = False

    def forward(self, number: int, frame: FrameType | None) -> None:
        """Handler of a signal."""
        self._is_asked = True
        if self._child is None:
            raise KeyboardInterrupt
        self._child.send_signal(number)

    def sleep(self, seconds: float) -> None:
        """Waits without a child: a signal ends the program."""
        time.sleep(seconds)

    def run(self, command: Command) -> Json:
        """The command's JSON result. Raises PartFailed, or KeyboardInterrupt if it was interrupted."""
        # Dies with this process: a build that lives on would hold the cache's lock against the next start.
        environ = {**os.environ, PARENT_VARIABLE: str(os.getpid())}
        # In a session of its own, so that Ctrl-C reaches it once, through `forward`.
        child = subprocess.Popen(command.line, stdout=subprocess.PIPE, env=environ, start_new_session=True)
        self._child = child
        try:
            out, _ = child.communicate()
        finally:
            self._child = None
        if child.returncode == INTERRUPTED or self._is_asked:
            raise KeyboardInterrupt
        if child.returncode != 0:
            code = child.returncode if child.returncode > 0 else 1
            how = f"exit code {child.returncode}" if child.returncode > 0 else signal.Signals(-child.returncode).name
            raise PartFailed(f"{command.program} {' '.join(command.arguments)} ended with {how}", code)
        result: Json = json.loads(out)
        return result


@contextmanager
def _signals_to_child() -> Iterator[_Children]:
    children = _Children()
    before = {one: signal.signal(one, children.forward) for one in SIGNALS}
    try:
        yield children
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def check_other(program: str, arguments: Sequence[str]) -> None:
    """Runs `program rounds ... --plan`, so that its mistakes are known before the first part. Raises PartFailed."""
    done = subprocess.run([*launcher(program), *arguments, "--plan", "--json"], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise PartFailed(f"{program} rounds refuses this configuration", done.returncode)


def state_lines(config: RoundsConfig, state: RoundsState) -> list[str]:
    """What each round came to: chains, verdicts, KL, answers."""
    lines = []
    for number in range(1, config.rounds + 1):
        facts = []
        made, scored, trained = (state.of(number, part) for part in ("generate", "score", "train"))
        if made is not None and made.results:
            rate = made.results[0].get("pass_rate")
            size = f"{made.results[0]['num_chains']:,} chains, {format_count(made.results[0]['num_tokens'])} tokens"
            facts.append(size + ("" if rate is None else f", {rate:.1%} correct"))
        if scored is not None and trained is None:
            facts.append("scored")
        if trained is not None and trained.results:
            before, after = (trained.results[0].get(f"heldout_{when}") for when in ("before", "after"))
            if before and after and after.get("reverse_kl") is not None:
                facts.append(f"reverse KL {before['reverse_kl']:.4f} -> {after['reverse_kl']:.4f}")
        answered = state.of(number, "answers")
        if answered is not None and answered.results:
            shares = [one["generation"]["accuracy"] for one in answered.results]
            facts.append("answers " + " -> ".join("-" if one is None else f"{one:.1%}" for one in shares) + " correct")
        lines.append(f"round {number}    {'; '.join(facts) or 'not started'}")
    due = state.next_part(config.rounds)
    return [*lines, "next       " + ("nothing: all rounds are done" if due is None else f"{due.title} ({due.by})")]


def seconds_of(state: RoundsState, program: str) -> float | None:
    """Seconds that a round's parts took `program`, of the newest round that it has finished; None before that."""
    for number in sorted({one.round for one in state.done}, reverse=True):
        parts = [state.of(number, part) for part, by in PARTS.items() if by == program]
        if all(parts):
            return sum(one.seconds for one in parts if one is not None)
    return None
