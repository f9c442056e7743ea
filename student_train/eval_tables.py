"""Held-out evaluations as reports show them: which measures, in which words, and a table of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shared.config import Json
from shared.report import Piece, Table
from student_train.run_curves import Run


@dataclass(frozen=True)
class Measure:
    """A number of an evaluation: its name in eval.json, in words, unit, and whether less is better."""

    name: str
    words: str
    unit: str
    less_is_better: bool = True

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
    Measure("top1_agreement", "top-1 agreement", "%", less_is_better=False),
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
    "KL and JSD are estimates where the cache holds draws from the teacher's tail, else lower bounds with the tail in "
    "one bucket, as reverse KL is. Agreement: the student's first choice is the teacher's; accuracy: it is the token "
    "that was sampled; overconfidence: confidence - accuracy, the probability of that choice less how often it is so."
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
