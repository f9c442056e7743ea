"""Frozen selections of a run: opened, or made where there is none yet, for every kind of data.

Refusals come here, before any model is loaded: an empty selection, or a cache without what its kind needs. Held-out
chains are frozen with those that a run learns from, but selected again when `eval` selects others. What was measured on
other chains is kept, and compared with nothing: evaluations carry the hash of their selection.
"""

import shutil
from dataclasses import replace
from pathlib import Path

from stillroom.cache.catalog import Catalog
from stillroom.errors import ConfigError, naming
from stillroom.log import note
from stillroom.models import load_tokenizer, vocab_size_of
from student_train.config.data import DataConfig
from student_train.config.run import StudentConfig
from student_train.data.freezing import SelectionRequest, open_selection
from student_train.data.kept_ids import read_kept_ids
from student_train.data.prepared import Pairing, open_prepared_selection
from student_train.data.retokenised import vocab_beside
from student_train.data.selection import Selection, load_selection


def open_data(
    path: Path,
    request: SelectionRequest,
    data: DataConfig,
    student: StudentConfig,
    pairing: Pairing | None = None,
    counted: Path | None = None,
) -> Selection:
    """The frozen selection at `path`, made where there is none yet; its tokens are the student's for `kind: text` and
    `kind: projected`. Rows differ from the caches' for `mixture`, `prompt` and with a `pairing`. `counted`: see
    open_projected_selection().
    """
    if data.kind == "distributions" and data.mixture is None and data.prompt is None and pairing is None:
        return _of_kind(path, open_selection(path, replace(request, kept_ids=read_kept_ids(student.model))), data)
    if data.kind == "distributions":
        if read_kept_ids(student.model) is not None:
            raise ConfigError(
                f"{student.model} has a cut vocabulary, and data.mixture, data.prompt and dpo need the whole one: cut "
                "the student without student.init.vocabulary"
            )
        return open_prepared_selection(path, request, data, student, pairing)
    from student_train.data.text import HuggingFaceText, open_text_selection

    with naming("student.model"):
        tokenizer = load_tokenizer(student.model, student.revision, student.trust_remote_code)
        width = vocab_size_of(student.model, student.revision, student.trust_remote_code)
    # The width of the logits, not the length of the tokenizer: embeddings are often padded beyond it.
    text = HuggingFaceText(tokenizer, width)
    if data.kind == "text":
        return _of_kind(path, open_text_selection(path, request, text, data.text), data)
    from student_train.data.vocabulary.freeze import open_projected_selection

    return _of_kind(path, open_projected_selection(path, request, text, counted), data)


def _of_kind(path: Path, selection: Selection, data: DataConfig) -> Selection:
    """`selection`. Raises ConfigError where it was frozen with another `data.kind`, and then kept."""
    if data.kind != "text":
        _require_distributions(selection, data)
    # The kind is not part of a request, so a folder frozen for another kind would be found and read as this one.
    found = "text" if selection.is_text else "projected" if selection.is_projected else "distributions"
    if found != data.kind:
        raise ConfigError(f"{path} was frozen with data.kind {found}, now it is {data.kind}: choose another run folder")
    return selection


def _require_distributions(selection: Selection, data: DataConfig) -> None:
    """Raises ConfigError for chains of an API that gave their text alone: each token is its own only candidate."""
    without = {
        run_id
        for cache in data.caches
        for run_id, run in Catalog(cache.path).runs().items()
        if run.engine.get("signals") == "none"
    }
    # Files of the caches lie in folders named by their runs; prepared ones do not.
    own = {file.partition("/")[0] for file in selection.files} if selection.header.text is None else without
    if named := sorted(without & own):
        raise ConfigError(f"run {named[0]} has text without distributions (engine.signals: none): set data.kind: text")


def reopen_data(path: Path, request: SelectionRequest) -> Selection:
    """The selection that another rank has made at `path`."""
    return load_selection(path, [source.root for source in request.sources])


def open_heldout(
    path: Path, request: SelectionRequest, data: DataConfig, student: StudentConfig, trained: Path
) -> Selection:
    """The selection frozen at `path`, or a new one if `eval` now selects other chains; `trained` is what trains.

    Raises ConfigError, DataError, CorruptError.
    """
    if path.exists() and not is_answered(path, request):
        note(
            "eval selects different held-out chains than before: selecting them again and resetting the best checkpoint"
        )
        _forget(path)
    return open_data(path, request, data, student, counted=trained)


def is_answered(path: Path, request: SelectionRequest) -> bool:
    """Whether a selection is kept at `path` that was asked the same of its caches. Raises CorruptError."""
    if not path.exists():
        return False
    header = load_selection(path, [source.root for source in request.sources]).header
    # Versions are left out: a cache that grew since is no reason to evaluate on other chains.
    return (header.where, header.max_chains) == (request.where, request.max_chains)


def kept_or_temporary(kept: Path, request: SelectionRequest | None, temp: Path) -> Path:
    """`kept` where it holds what is asked, else a path in the folder `temp`: for commands that change no run."""
    return kept if request is not None and is_answered(kept, request) else temp / kept.name


def _forget(path: Path) -> None:
    """Removes a selection, and last of all the file that says what was asked."""
    path.with_name(f"{path.stem}.source.parquet").unlink(missing_ok=True)
    for kind in ("text", "projected", "prepared"):
        folder = path.parent / f"{path.stem}-{kind}"
        shutil.rmtree(folder, ignore_errors=True)
        vocab_beside(folder).unlink(missing_ok=True)
    path.unlink()
