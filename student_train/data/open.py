"""What each part of a run asks of the caches, frozen: opened, or made where there is none yet, for every kind of data.

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
from stillroom.sql.conditions import in_brackets
from student_train.config.data import DataConfig
from student_train.config.run import EvalConfig, StudentConfig, TrainConfig
from student_train.config.stage import StageConfig, stage_key
from student_train.data.epoch_plan import PlanSpec
from student_train.data.freezing import CacheSource, SelectionRequest, open_selection
from student_train.data.kept_ids import read_kept_ids
from student_train.data.prepared import Pairing, open_prepared_selection
from student_train.data.retokenised import vocab_beside
from student_train.data.selection import Selection, load_selection


def sources_of(data: DataConfig) -> list[CacheSource]:
    """The configured caches as a selection wants them."""
    return [
        CacheSource(cache.path, cache.weight, cache.chains_version, cache.verdicts_version) for cache in data.caches
    ]


def train_request(data: DataConfig, number: int, stage: StageConfig) -> SelectionRequest:
    """What stage number `number`, from 0, learns from, wrong chains included."""
    key = "data.where" if stage.where is None else f"{stage_key(number, stage.name)}: where"
    where = stage.where or data.where
    if stage.negatives is not None and where is not None:
        # One selection for both kinds: they share an order and packs, and a mask says which chains are wrong.
        where = f"{in_brackets(where)} OR {in_brackets(stage.negatives.where)}"
        key = f"{key} or negatives.where"
    return SelectionRequest(sources_of(data), where, data.weight, data.max_chains, key=key)


def negatives_request(data: DataConfig, number: int, stage: StageConfig) -> SelectionRequest:
    """The wrong chains among those of a stage."""
    assert stage.negatives is not None
    key = f"{stage_key(number, stage.name)}: negatives.where"
    return SelectionRequest(_unweighted(data), stage.negatives.where, None, None, key=key)


def right_request(data: DataConfig, config: EvalConfig, number: int, stage: StageConfig) -> SelectionRequest:
    """The held-out chains whose likelihood must not fall in a stage with wrong chains."""
    assert stage.negatives is not None
    key = f"{stage_key(number, stage.name)}: eval.where and negatives.right"
    # Held-out chains: how likely right answers are must be measured where the stage does not push them up itself.
    where = f"{in_brackets(config.where)} AND {in_brackets(stage.negatives.right)}"
    return SelectionRequest(_unweighted(data), where, None, config.max_chains, key=key)


def eval_request(data: DataConfig, config: EvalConfig, key: str = "eval.where") -> SelectionRequest:
    """What the student is evaluated on; cache weights do not count there. `key`: what the condition is called."""
    return SelectionRequest(_unweighted(data), config.where, None, config.max_chains, key=key)


def at_versions_of(request: SelectionRequest, other: Selection) -> SelectionRequest:
    """The request for the versions of its caches that another selection of them has seen."""
    pinned = [
        replace(source, chains_version=cache.chains_version, verdicts_version=cache.verdicts_version)
        for source, cache in zip(request.sources, other.header.caches, strict=True)
    ]
    return replace(request, sources=pinned)


def _unweighted(data: DataConfig) -> list[CacheSource]:
    # A chain read twice for its weight would count twice in a mean over held-out chains.
    return [CacheSource(one.root, 1.0, one.chains_version, one.verdicts_version) for one in sources_of(data)]


def plan_spec(config: TrainConfig, stage_index: int) -> PlanSpec:
    """How the chains of a stage are packed and ordered; each stage has an order of its own."""
    data, stage = config.data, config.stages[stage_index]
    return PlanSpec(
        pack_tokens=data.pack_tokens,
        # Not seed + index: stage 1 of seed 0 would have the order of stage 0 of seed 1.
        seed=config.seed * len(config.stages) + stage_index,
        # A row of two chains is as long as both; each was held to the limit when they were paired.
        max_tokens=None if is_paired(stage) else data.max_tokens,
        long_chains=data.long_chains,
    )


def is_paired(stage: StageConfig) -> bool:
    """Whether the stage trains on pairs of a right and a wrong chain."""
    return stage.negatives is not None and "dpo" in stage.losses


def eval_spec(data: DataConfig) -> PlanSpec:
    """How held-out chains are packed: in the same way, in an order that never changes."""
    return PlanSpec(pack_tokens=data.pack_tokens, max_tokens=data.max_tokens, long_chains=data.long_chains)


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
    # Versions are left out: a cache that has grown must not change the chains of the evaluation.
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
