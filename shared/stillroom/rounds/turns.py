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
from stillroom.errors import StillroomError, one_line
from stillroom.log import format_count, format_duration, note
from stillroom.program import INTERRUPTED, PARENT_VARIABLE, SIGNALS
from stillroom.rounds.config import RoundsConfig, generate_config, round_folder, score_config, train_config
from stillroom.rounds.provenance import refuse_other_scores
from stillroom.rounds.state import PARTS, STUDENT_TRAIN, TEACHER_CACHE, Part, RoundsFolder, RoundsState, RunningPart

POLL_S = 1.0
FIRST_REMINDER_S, LAST_REMINDER_S = 60.0, 3600.0
"""A side that waits says so again after a minute, then after twice as long each time, up to an hour."""
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
    # -P: nothing in the working directory may stand for a module.
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
    """Does every part of `programs` when its turn comes, until none is left for them; returns the last state.

    Raises ConfigError where the folder was started with other settings, CacheConflict where another process does these
    parts, PartFailed with the exit code of a command that failed, StillroomError where the folder cannot be written,
    KeyboardInterrupt after a signal.
    """
    folder = RoundsFolder(config)
    try:
        folder.open()
        with folder.held(programs), _signals_to_child() as children:
            waiting = _Waiting(folder)
            while (state := folder.read()).is_left_for(programs, config.rounds):
                part = state.next_part(config.rounds)
                assert part is not None
                if part.by in programs:
                    _do(config, part, folder, children, num_ranks)
                else:
                    waiting.tell(part, state.running)
                    children.sleep(POLL_S)
    except OSError as error:
        raise StillroomError(
            f"{config.folder}: {one_line(error)}: fix that and run the same command again to resume"
        ) from error
    return state


def _do(config: RoundsConfig, part: Part, folder: RoundsFolder, children: "_Children", num_ranks: int) -> None:
    # Once more: the other side may have been started with something else at the same moment as this one.
    folder.open()
    if part.part == "train":
        refuse_other_scores(config, part.round)
    write = {"generate": generate_config, "score": score_config, "train": train_config}.get(part.part)
    if write is not None:
        folder.write_part(round_folder(config, part.round) / f"{part.part}.yaml", write(config, part.round))
    commands = commands_of(config, part, num_ranks)
    started_s, results = time.monotonic(), list[Json]()
    if commands:
        note(f"{part.title}:")
        folder.begin(part)
    for command in commands:
        # Exports refuse a folder that exists; the other commands see themselves what is done.
        if command.unless is None or not command.unless.exists():
            try:
                result = children.run(command)
            except (PartFailed, KeyboardInterrupt) as end:
                how = "interrupted" if isinstance(end, KeyboardInterrupt) else f"failed with exit code {end.exit_code}"
                folder.stop(time.monotonic() - started_s, how)
                raise
            # state.json is read by both sides at every poll: it stays small.
            results.append({key: result[key] for key in KEPT if result.get(key) is not None})
    folder.finish(part, time.monotonic() - started_s, results)


class _Waiting:
    """Says whom this side waits for: when that changes, and now and then. By this machine's clock alone."""

    def __init__(self, folder: RoundsFolder) -> None:
        self._folder = folder
        self._known: tuple[Part, RunningPart | None] | None = None
        self._since_s = self._next_s = 0.0

    def tell(self, part: Part, running: RunningPart | None) -> None:
        """`running`: what the other side says that it does."""
        now_s = time.monotonic()
        if self._known != (part, running):
            self._known, self._since_s, self._next_s = (part, running), now_s, FIRST_REMINDER_S
            note(self._line(part, running))
        elif (waited_s := now_s - self._since_s) >= self._next_s:
            # At doubling times, later at equal ones.
            self._next_s += min(self._next_s, LAST_REMINDER_S)
            note(f"{self._line(part, running)} ({format_duration(waited_s)} so far)")

    def _line(self, part: Part, running: RunningPart | None) -> str:
        is_begun = running is not None and (running.round, running.part) == (part.round, part.part)
        if running is not None and is_begun and running.stopped is not None:
            return f"{part.title}: {part.by} on {running.host} {running.stopped}: start it again; waiting"
        # Its lock, not its last words: a program that was killed says nothing.
        if not self._folder.is_held(part.by):
            return f"{part.title}: `{part.by} rounds` is not running: start it where it can see the folder; waiting"
        if running is not None and is_begun:
            return f"{part.title}: {part.by} on {running.host} since {running.started_at}; waiting"
        return f"{part.title}: waiting for {part.by}"


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
        # Also where the command still succeeded: run again, it finds nothing left to do.
        if child.returncode == INTERRUPTED or self._is_asked:
            raise KeyboardInterrupt
        if child.returncode != 0:
            # A negative return code is a signal, not an exit code.
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
    # Its stderr goes to the user: the reason stands there.
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
            built = made.results[0]
            rate = built.get("pass_rate")
            size = f"{built.get('num_chains', 0):,} chains, {format_count(built.get('num_tokens', 0))} tokens"
            facts.append(size + ("" if rate is None else f", {rate:.1%} correct"))
        if scored is not None and trained is None:
            facts.append("scored")
        if trained is not None and trained.results:
            heldout = [trained.results[0].get(f"heldout_{when}") or {} for when in ("before", "after")]
            before, after = (one.get("reverse_kl") for one in heldout)
            if before is not None and after is not None:
                facts.append(f"reverse KL {before:.4f} -> {after:.4f}")
        answered = state.of(number, "answers")
        if answered is not None and answered.results:
            shares = [(one.get("generation") or {}).get("accuracy") for one in answered.results]
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
