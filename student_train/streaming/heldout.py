"""The held-out chains of a run: frozen with it like those it learns from, but chosen anew when `eval` asks for others.

What was measured on other chains is kept, and compared with nothing: evaluations carry the hash of their selection.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from shared.config import Json
from shared.log import note
from student_train.config import DataConfig, StudentConfig
from student_train.streaming.data import open_data
from student_train.streaming.select import SelectionRequest
from student_train.streaming.selection import Selection, load_selection


def open_heldout(path: Path, request: SelectionRequest, data: DataConfig, student: StudentConfig) -> Selection:
    """The selection frozen at `path`, made anew where `eval` asks for other chains by now.

    Raises ConfigError, DataError, CorruptError.
    """
    if path.exists() and not is_answered(path, request):
        note("eval asks for other held-out chains than before: they are selected anew, and the best checkpoint with it")
        _forget(path)
    return open_data(path, request, data, student)


def is_answered(path: Path, request: SelectionRequest) -> bool:
    """Whether a selection is kept at `path` that was asked the same of its caches. Raises CorruptError."""
    if not path.exists():
        return False
    header = load_selection(path, [source.root for source in request.sources]).header
    return (header.where, header.max_chains) == (request.where, request.max_chains)


def kept_or_temporary(kept: Path, request: SelectionRequest | None, temp: Path) -> Path:
    """`kept` where it holds what is asked, else a path in the folder `temp`: for commands that change no run."""
    return kept if request is not None and is_answered(kept, request) else temp / kept.name


def before_and_after(evals: Sequence[Json]) -> tuple[Json | None, Json | None]:
    """The last of a run's evaluations, and the one before its first step where that was on the same chains."""
    if not evals:
        return None, None
    first, last = evals[0], evals[-1]
    is_start = (first["stage_number"], first["step"]) == (0, 0)
    return (first if is_start and first.get("selection") == last.get("selection") else None), last


def _forget(path: Path) -> None:
    """Removes a selection, and last of all the file that says what was asked."""
    path.with_name(f"{path.stem}.source.parquet").unlink(missing_ok=True)
    shutil.rmtree(path.parent / f"{path.stem}-text", ignore_errors=True)
    path.unlink()
