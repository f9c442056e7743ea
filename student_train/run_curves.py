"""What reports read of a run: configuration, numbers by step, stages, held-out evaluations, and curves of them.

In: run folders, finished or not. Out: arrays by optimizer step. Reads config.yaml, metrics.jsonl and eval.json only;
needs no torch.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stillroom.config import Json
from stillroom.errors import ConfigError, DataError
from stillroom.html.charts import Line, Mark
from stillroom.html.report import Piece, Table
from student_train.config.run import TrainConfig
from student_train.runtime.run_folder import RunFolder

Array = npt.NDArray[Any]

NUM_WINDOWS = 60
"""A curve of more steps is drawn as means over this many windows, with the spread in each."""


@dataclass(frozen=True)
class Stage:
    """The steps of one stage, in order; at least one."""

    name: str
    steps: Sequence[Json]

    @property
    def has_one_loss(self) -> bool:
        """Whether the whole loss is the same sum of the same parts at every step."""
        first = _what_is_summed(self.steps[0])
        return all(_what_is_summed(step) == first for step in self.steps)

    def parts(self) -> list[str]:
        """Names of the losses in it."""
        return list(dict.fromkeys(name for step in self.steps for name in step["parts"]))

    def weight_words(self, part: str) -> str:
        """The weight of a part: 0.8, or 0.9 → 0.5 where it changes."""
        first, last = (f"{step['weights'][part]:.3g}" for step in (self.steps[0], self.steps[-1]))
        return first if first == last else f"{first} → {last}"

    def ends(self, part: str | None) -> tuple[float, float]:
        """A part of the loss before its weight, or the whole loss, where its curve starts and ends."""
        values = [step["loss"] if part is None else step["parts"][part] for step in self.steps]
        y = curve("", np.arange(len(values)), np.array(values, float)).y
        return float(y[0]), float(y[-1])


@dataclass(frozen=True)
class Run:
    """One run. At least one of `steps` and `evals` is not empty."""

    name: str
    folder: RunFolder
    steps: Sequence[Json]
    evals: Sequence[Json]

    def config(self) -> TrainConfig:
        """The configuration that it began with. Raises ConfigError, and DataError where there is none."""
        if not self.folder.config_path.exists():
            raise DataError(f"{self.folder.root} holds no config.yaml: use a run folder of `student-train run`")
        return self.folder.read_config()

    def column(self, name: str) -> Array:
        """A number by step."""
        return np.array([step[name] for step in self.steps], float)

    def tokens(self) -> Array:
        """Tokens read up to the end of each step."""
        return np.cumsum(self.column("num_tokens"))

    @property
    def num_tokens(self) -> int:
        return int(self.column("num_tokens").sum())

    @property
    def seconds(self) -> float:
        """In optimizer steps."""
        return float(self.column("step_s").sum())

    @property
    def tokens_per_s(self) -> float | None:
        """Over all steps and ranks."""
        return self.num_tokens / self.seconds if self.seconds else None

    @property
    def stall_frac(self) -> float:
        """Share of the time in steps that was waiting for data."""
        waited_s = float((self.column("stall_frac") * self.column("step_s")).sum())
        return waited_s / self.seconds if self.seconds else 0.0

    def stages(self) -> list[Stage]:
        """Those that have begun."""
        names = dict.fromkeys((step["stage_number"], step["stage"]) for step in self.steps)
        return [Stage(name, [step for step in self.steps if step["stage_number"] == number]) for number, name in names]

    @property
    def has_one_loss(self) -> bool:
        """Whether the loss of any step compares with that of any other: one stage, weights that stay."""
        stages = self.stages()
        return len(stages) == 1 and stages[0].has_one_loss

    def stage_marks(self, unit: float) -> list[Mark]:
        """Where each stage begins, in tokens over `unit`; none where there is one stage alone."""
        stages, ends = self.stages(), [0.0, *self.tokens()]
        starts = np.cumsum([0, *(len(stage.steps) for stage in stages)])[:-1]
        marks = [Mark(stage.name, ends[start] / unit) for stage, start in zip(stages, starts, strict=True)]
        return marks if len(marks) > 1 else []

    def eval_curve(self, name: str) -> tuple[Array, Array]:
        """Tokens read and the measure, at every evaluation that has it and is of the same chains as the last."""
        done = {
            (step["stage_number"], step["step"]): tokens for step, tokens in zip(self.steps, self.tokens(), strict=True)
        }
        before, points = 0.0, []
        for one in self.evals:
            # Before the first step of a stage no step has these numbers: it stands where the stage before ended.
            before = done.get((one["stage_number"], one["step"]), before)
            if one.get(name) is not None and one.get("selection") == self.evals[-1].get("selection"):
                points.append((before, one[name]))
        x, y = zip(*points, strict=True) if points else ((), ())
        return np.array(x, float), np.array(y, float)


@dataclass(frozen=True)
class TokenAxis:
    """The unit in which numbers of tokens are plain: its size and its label."""

    unit: float
    label: str


def token_axis(runs: Sequence[Run]) -> TokenAxis:
    """For the longest of the runs."""
    most = max((run.num_tokens for run in runs), default=0)
    for unit, name in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if most >= 4 * unit:
            return TokenAxis(unit, f"tokens read ({name})")
    return TokenAxis(1.0, "tokens read")


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Raises ConfigError where none is named, DataError for a folder that holds no run."""
    if not folders:
        raise ConfigError("no run given: pass at least one run folder")
    runs = []
    for folder in folders:
        run = RunFolder(folder)
        steps, evals = run.read_metrics(), run.read_evals()
        if not steps and not evals:
            raise DataError(f"{folder} has no metrics.jsonl with at least one step: use a run folder")
        name = folder.resolve().name
        # The runs of a sweep often have one name in folders of their own.
        if sum(other.resolve().name == name for other in folders) > 1:
            name = f"{folder.resolve().parent.name}/{name}"
        runs.append(Run(name, run, steps, evals))
    return runs


def curve(name: str, x: Array, y: Array, series: int | None = None) -> Line:
    """The values as they are, or as means over windows with their spread where there are many."""
    if len(y) <= NUM_WINDOWS:
        return Line(name, x, y, series=series)
    windows = np.array_split(np.arange(len(y)), NUM_WINDOWS)
    low, high = (np.array([np.quantile(y[window], q) for window in windows]) for q in (0.1, 0.9))
    means = np.array([y[window].mean() for window in windows])
    # The last step of each window: the curve ends where the run does.
    return Line(name, np.array([x[window[-1]] for window in windows]), means, low, high, series)


def part_curve(run: Run, part: str, unit: float, name: str, series: int | None = None) -> Line:
    """A part of the loss, before its weight, over tokens / `unit`: of the stages that have it, at least one."""
    pieces, done = [], 0
    for stage in run.stages():
        if part in stage.parts():
            x = run.tokens()[done : done + len(stage.steps)] / unit
            # No window holds steps of two stages.
            pieces.append(curve("", x, np.array([step["parts"][part] for step in stage.steps], float)))
        done += len(stage.steps)
    low = np.concatenate([piece.y if piece.low is None else piece.low for piece in pieces])
    high = np.concatenate([piece.y if piece.high is None else piece.high for piece in pieces])
    x, y = (np.concatenate(columns) for columns in zip(*((piece.x, piece.y) for piece in pieces), strict=True))
    return Line(name, x, y, low, high, series)


def loss_words(name: str) -> str:
    """`skewed_forward_kl` as "skewed forward KL"."""
    words = name.replace("cross_entropy", "cross-entropy").replace("_", " ")
    words = re.sub(r"\b(kl|jsd|mse)\b", lambda match: match[1].upper(), words)
    return re.sub(r" argmax$", " (argmax)", words)


def loss_unit(name: str) -> str:
    """Of a part of the loss, a token."""
    units = {"total_variation": "share", "hidden_mse": "share", "hidden_cosine": "share"}
    return units.get(name, "nats")


def _what_is_summed(step: Json) -> tuple[Json, float | None]:
    return step["weights"], step.get("temperature")


@dataclass(frozen=True)
class Measure:
    """A number of an evaluation: its name in eval.json, in words, and its unit."""

    name: str
    words: str
    unit: str

    @property
    def scale(self) -> float:
        """From the unit of eval.json to `unit`."""
        return 100.0 if self.unit == "%" else 1.0

    def shown(self, value: float) -> str:
        """A value of eval.json with its unit."""
        return f"{value:.1%}" if self.unit == "%" else f"{value:.3f} {self.unit}"


MEASURES = (
    Measure("forward_kl", "KL to the teacher", "nats"),
    Measure("js", "JSD to the teacher", "nats"),
    Measure("cross_entropy", "cross-entropy", "nats"),
    Measure("top1_agreement", "top-1 agreement", "%"),
)

_PLAIN: Callable[[float], str] = "{:.4f}".format
_SHARE: Callable[[float], str] = "{:.1%}".format
_SIGNED: Callable[[float], str] = "{:+.3f}".format
_COLUMNS = (
    ("forward_kl", "KL (nats)", _PLAIN),
    ("reverse_kl", "reverse KL (nats)", _PLAIN),
    ("js", "JSD (nats)", _PLAIN),
    ("cross_entropy", "cross-entropy (nats)", _PLAIN),
    ("top1_agreement", "top-1 agreement", _SHARE),
    ("accuracy", "accuracy", _SHARE),
    ("confidence_minus_accuracy", "overconfidence", _SIGNED),
)
_NOTE = (
    "KL and JSD are unbiased estimates if the cache holds draws from the teacher's tail; otherwise, like the reverse "
    "KL, they are lower bounds with the tail as one outcome. Agreement: how often the student's top token is the "
    "teacher's. Accuracy: how often it is the sampled token. Overconfidence: its mean probability minus accuracy."
)


def eval_table(runs: Sequence[Run]) -> list[Piece]:
    """The last evaluation of each run where several are compared, every evaluation where there is one."""
    several = len(runs) > 1
    rows = [
        [*([run.name, _when(one)] if several else [_when(one)]), *_cells(one)]
        for run in runs
        for one in (run.evals[-1:] if several else run.evals)
    ]
    if not rows:
        return []
    title = "The last evaluation of each run" if several else "Every evaluation on held-out chains"
    names = [name for _, name, _ in _COLUMNS]
    columns = ["run", "evaluated after", *names] if several else ["evaluated after", *names]
    right = frozenset(range(len(columns) - len(names), len(columns)))
    return [Table(title, columns, rows, f"{_NOTE} {not_comparable(runs)}".strip(), right=right)]


def not_comparable(runs: Sequence[Run]) -> str:
    """A warning where runs were last evaluated on different chains; nothing where on the same."""
    if len({run.evals[-1].get("selection") for run in runs if run.evals}) < 2:
        return ""
    return "The runs were evaluated on different selections of chains: their numbers compare only roughly."


def _when(one: Json) -> str:
    return f"{one['stage']}, step {one['step']:,}"


def _cells(one: Json) -> list[str]:
    return ["-" if one.get(name) is None else write(one[name]) for name, _, write in _COLUMNS]
