"""From a run's configuration to what its streams read: frozen selections, how they are packed, and the tokenizer check.

Refusals come here, before any model is loaded: an empty selection, a cache without what a loss needs, a vocabulary
that is not the student's.

The held-out chains of a run: frozen with it like those it learns from, but selected again when `eval` selects others.

What was measured on other chains is kept, and compared with nothing: evaluations carry the hash of their selection.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from stillroom.cache.catalog import Catalog
from stillroom.config import Json
from stillroom.errors import ConfigError, naming
from stillroom.log import note
from stillroom.models import (
    compare_vocab,
    fingerprint_template,
    fingerprint_tokenizer,
    fingerprints_from_files,
    load_tokenizer,
    require_same_vocab,
    vocab_size_of,
)
from stillroom.sql.conditions import in_brackets
from stillroom.storage.paths import Location
from student_train.config import DataConfig, EvalConfig, StageConfig, StudentConfig, TrainConfig, stage_key
from student_train.data.epoch_plan import PlanSpec
from student_train.data.kept_ids import ids_of, read_kept_ids
from student_train.data.prepared import Pairing, open_prepared_selection
from student_train.data.retokenised import vocab_beside
from student_train.data.selection import CacheSource, Selection, SelectionRequest, load_selection, open_selection
from student_train.model.shape import read_config

if TYPE_CHECKING:
    from student_train.losses.divergences import LossMix

SHOWN_DIFFERENCES = 5
WITH_SIGNALS = "distributions, or projected for a student of another vocabulary"


@dataclass(frozen=True)
class Vocabulary:
    """What the student's tokenizer has to do with the cache's. `notes` are lines for the person who watches."""

    num_ids: int
    """Rows that the student's embeddings must have."""
    notes: list[str]


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


def eval_request(data: DataConfig, config: EvalConfig) -> SelectionRequest:
    """What the student is evaluated on; cache weights do not count there."""
    return SelectionRequest(_unweighted(data), config.where, None, config.max_chains, key="eval.where")


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


def check_losses(mix: "LossMix", selection: Selection) -> None:
    """Raises ConfigError where the cache does not hold what a loss of the mix needs."""
    for term in mix.terms:
        if term.needs_distribution and selection.is_text:
            raise ConfigError(f"{term.name} needs distributions: set data.kind: {WITH_SIGNALS}")
        if term.needs_chunks and selection.is_text:
            raise ConfigError(f"{term.name} needs the teacher's log probabilities: set data.kind: {WITH_SIGNALS}")


def check_own_words(mix: "LossMix", stage: StageConfig, data: DataConfig) -> None:
    """Raises ConfigError where losses on wrong chains or on the student's own have none, and where such chains have no
    loss.
    """
    wanting = [term.name for term in mix.terms if term.needs_negatives]
    if wanting and stage.negatives is None:
        raise ConfigError(
            f"{wanting[0]} needs wrong chains: set negatives: {{where: split = 'train' and not correct and "
            "finish_reason = 'stop'}"
        )
    if stage.negatives is not None and not wanting:
        raise ConfigError(
            f"negatives have no effect with the losses {', '.join(mix.names)}: add asymmetric_likelihood, unlikelihood "
            "or dpo"
        )
    if mix.reads_behaviour and not data.behaviour:
        raise ConfigError(
            "policy_gradient needs the student's log probabilities of its own chains: set data.behaviour to the cache "
            "into which it generated them"
        )
    trained = {_absolute(one.path) for one in data.caches}
    if (
        mix.reads_behaviour
        and data.mixture is None
        and (same := [one for one in data.behaviour if _absolute(one) in trained])
    ):
        raise ConfigError(
            f"data.behaviour names {same[0]}, which data.caches reads too: teacher and writer would be one, and "
            "policy_gradient 0: name the cache that `teacher-cache score` read the chains from"
        )
    if mix.reads_pairs and mix.reads_behaviour:
        raise ConfigError("dpo trains on pairs of chains, policy_gradient on single ones: give each a stage of its own")
    if mix.reads_pairs and data.steps is not None:
        raise ConfigError("dpo compares whole chains: remove data.steps")
    if mix.reads_pairs and (stage.token_weights is not None or mix.focal_gamma is not None):
        raise ConfigError("dpo weighs pairs as a whole: remove token_weights and focal_gamma")
    if mix.reads_pairs and data.terms is not None:
        raise ConfigError("dpo weighs pairs as a whole: remove data.terms")


def _absolute(root: Location) -> str:
    return str(root.absolute() if isinstance(root, Path) else root)


def check_prepared(selection: Selection, data: DataConfig) -> None:
    """Raises ConfigError where `mixture` or `prompt` has changed none of a stage's chains."""
    made = selection.header.prepared
    if data.mixture is not None and made is not None and not made.num_reached:
        raise ConfigError(
            "data.mixture: none of its teachers has scored any of the selected chains (same prompt and completion "
            "tokens) with a weight above 0: score them with `teacher-cache score` from the same cache"
        )
    if data.prompt is not None and made is not None and not made.num_rewritten:
        raise ConfigError("data.prompt changes none of the selected prompts: remove it")


def check_temperature(mix: "LossMix", selection: Selection, stage: StageConfig) -> None:
    """Raises ConfigError where the cache lacks the log-partition of the stage's temperature, or of a schedule's end."""
    if mix.is_exact:
        return
    asked = stage.temperature
    # At another temperature p^(1/T) needs its own normaliser over the whole vocabulary, and of the teacher only a part
    # of it is stored.
    held = selection.header.temperatures
    if asked == 1.0 or (isinstance(asked, float) and asked in held):
        return
    if selection.is_projected:
        raise ConfigError("temperature must be 1 with data.kind: projected: log-partitions are of the teacher's ids")
    names = ", ".join(f"{one:g}" for one in held) or "none besides 1"
    if isinstance(asked, float):
        raise ConfigError(
            f"temperature {asked:g} needs the teacher's log-partition at it; the selected chains hold {names}: use one "
            f"of them, or build a cache with capture.temperatures: [{asked:g}]"
        )
    if not held:
        raise ConfigError(
            "temperature is a schedule, but the selected chains hold no other than 1: build a cache with "
            "capture.temperatures"
        )


def check_vocabulary(student: StudentConfig, selection: Selection, caches: Sequence[Location]) -> Vocabulary:
    """Compares the student's tokenizer with the cache's.

    Equal fingerprints are fine. Otherwise ordinary ids must agree; special tokens may differ, and so may the number of
    embedding rows. Raises ConfigError naming the ids where they do not.
    """
    config = read_config(student)
    with naming("student.model"):
        width = (
            vocab_size_of(student.model, student.revision, student.trust_remote_code)
            if config is None
            else int(config["vocab_size"])
        )
    if selection.is_retokenised:
        return Vocabulary(width, [])
    if selection.header.kept_ids is not None:
        return _cut_vocabulary(student, selection)
    # Embeddings of one family are padded differently: Qwen2.5 has 151936 rows at 1.5B, 152064 at 7B.
    num_ids = max(width, selection.header.vocab_size)
    notes = []
    if width < num_ids:
        notes.append(
            f"{student.model} has {width} embedding rows, the cache's ids go up to {num_ids - 1}: "
            f"{num_ids - width} rows are added, each the mean of the others"
        )
    cached = selection.header.tokenizer_fingerprints[0]
    # Reading two JSON files takes milliseconds, importing transformers to load the tokenizer seconds.
    found = fingerprints_from_files(student.model)
    if found is None or found[0] != cached:
        with naming("student.model"):
            tokenizer = load_tokenizer(student.model, student.revision, student.trust_remote_code)
        found = fingerprint_tokenizer(tokenizer), fingerprint_template(tokenizer)
    if found[0] == cached:
        if selection.header.template_fingerprints != [found[1]]:
            notes.append("the student's chat template differs from the cache's: the student learns the cache's")
        return Vocabulary(num_ids, notes)
    difference = compare_vocab(_vocab_path(caches, cached), tokenizer)
    require_same_vocab(difference, student.model)
    notes.append(
        f"the student adopts the cache's tokenizer; {len(difference.special)} special tokens differ"
        + "".join(f"; id {i}: {mine!r} for {other!r}" for i, mine, other in difference.special[:SHOWN_DIFFERENCES])
        + (", ..." if len(difference.special) > SHOWN_DIFFERENCES else "")
    )
    return Vocabulary(num_ids, notes)


def _cut_vocabulary(student: StudentConfig, selection: Selection) -> Vocabulary:
    """Of a student that keeps some of the cache's ids. Raises ConfigError where it was cut for another tokenizer."""
    kept = read_kept_ids(student.model)
    if kept is None or kept.packed != selection.header.kept_ids:
        raise ConfigError(
            f"{student.model} has a different vocabulary than when the run started: choose another run folder"
        )
    if selection.header.tokenizer_fingerprints != [kept.tokenizer_fingerprint]:
        raise ConfigError(f"{student.model} was cut for a cache of another tokenizer: train it from that cache")
    num_ids = len(ids_of(kept.packed))
    tail = "" if kept.has_all_stored else "; the others' mass in distributions counts as tail"
    return Vocabulary(num_ids, [f"the student keeps {num_ids} of the cache's ids{tail}"])


def _vocab_path(caches: Sequence[Location], fingerprint: str) -> Location:
    paths = [Catalog(root).vocab_path(fingerprint) for root in caches]
    for path in paths:
        if path.exists():
            return path
    raise ConfigError(f"{paths[0]} is missing, and the student's tokenizer is not the cache's: copy the whole cache")


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


def before_and_after(evals: Sequence[Json]) -> tuple[Json | None, Json | None]:
    """The last of a run's evaluations, and the one before its first step where that was on the same chains."""
    if not evals:
        return None, None
    first, last = evals[0], evals[-1]
    is_start = (first["stage_number"], first["step"]) == (0, 0)
    # A run that was resumed with another `eval` has its first evaluation on other chains: no progress can be read off
    # that.
    return (first if is_start and first.get("selection") == last.get("selection") else None), last


def _forget(path: Path) -> None:
    """Removes a selection, and last of all the file that says what was asked."""
    path.with_name(f"{path.stem}.source.parquet").unlink(missing_ok=True)
    for kind in ("text", "projected", "prepared"):
        folder = path.parent / f"{path.stem}-{kind}"
        shutil.rmtree(folder, ignore_errors=True)
        vocab_beside(folder).unlink(missing_ok=True)
    path.unlink()
