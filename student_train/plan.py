"""Everything about a run that is known before a model is loaded: what each stage reads, in how many steps, by which
losses. All refusals that need no GPU happen here, for all stages at once.
"""

import contextlib
import functools
import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from stillroom.cache.catalog import Catalog
from stillroom.cache.features import FeatureSet
from stillroom.errors import ConfigError
from stillroom.log import note, warn
from stillroom.storage.paths import atomic_path
from student_train.config import (
    DataConfig,
    LoraConfig,
    StageConfig,
    StudentConfig,
    TrainConfig,
    accumulation_of,
    packs_per_step,
    stage_key,
)
from student_train.data.attached import NOTHING_ATTACHED, Attached
from student_train.data.epoch_plan import EpochPlans, PlanSpec
from student_train.data.features import StageFeatures, pin_features, reopen_features, stage_features, with_layers
from student_train.data.open import (
    Vocabulary,
    at_versions_of,
    check_losses,
    check_own_words,
    check_prepared,
    check_temperature,
    check_vocabulary,
    eval_request,
    eval_spec,
    is_paired,
    kept_or_temporary,
    negatives_request,
    open_data,
    open_heldout,
    plan_spec,
    reopen_data,
    right_request,
    train_request,
)
from student_train.data.prepared import Pairing
from student_train.data.selection import OpenCaches, Selection, SelectionRequest, open_selection
from student_train.data.steps import examples_path, planned, with_examples, write_examples
from student_train.data.stream import PackStream
from student_train.data.terms import MarkedTerms, terms_path, write_terms
from student_train.data.token_numbers import TokenNumbers, numbers_path, write_behaviour
from student_train.losses.below import AttentionKL
from student_train.losses.divergences import LossMix
from student_train.model.prune import require_cut
from student_train.model.shape import model_shape
from student_train.runtime.run_folder import RunFolder
from student_train.schedule import check_mixes

Opener = Callable[[Path, SelectionRequest, DataConfig, StudentConfig], Selection]


@dataclass(frozen=True)
class StagePlan:
    """One stage with its frozen selection and its length."""

    index: int
    config: StageConfig
    """As configured, but losses below the head name every pair of layers."""
    selection: Selection
    spec: PlanSpec
    num_epochs: int | None
    """None where max_steps alone ends the stage."""
    accumulation: int
    """Packs that each rank takes a step."""
    packs_per_step: int
    num_steps: int
    mix: LossMix
    """Of the first step."""
    with_signals: bool
    """Whether a loss or a weight of the stage needs distributions; else only token ids are read."""
    attached: Attached = NOTHING_ATTACHED
    """What is known of its tokens besides the stream; the student's start comes with the weights."""
    right: Selection | None = None
    """Held-out right chains of a stage that moves away from wrong ones."""
    features: StageFeatures | None = None
    """What its losses read of the tables of features."""

    def stream(self, rank: int, num_ranks: int, tell: Callable[[str], None] = note) -> PackStream:
        """This rank's packs from the beginning of the stage; `tell` is called while it waits for data."""
        return PackStream(
            self.selection,
            self.spec,
            packs_per_step=self.packs_per_step,
            rank=rank,
            world=num_ranks,
            num_epochs=self.num_epochs,
            with_signals=self.with_signals,
            features=self.features,
            tell=tell,
        )


@dataclass(frozen=True)
class RunPlan:
    """A run that nothing refuses."""

    stages: list[StagePlan]
    heldout: Selection | None
    vocabulary: Vocabulary

    @property
    def num_steps(self) -> int:
        return sum(stage.num_steps for stage in self.stages)


def prepare(
    config: TrainConfig,
    folder: Path,
    num_ranks: int,
    *,
    is_first: bool,
    barrier: Callable[[], None],
    spare: Path | None = None,
) -> RunPlan:
    """Freezes the selections below `folder`, or opens those that are there, and checks everything against them.

    With `spare`, held-out chains that `folder` keeps for another `eval` stay there: new ones go to `spare`. The first
    rank writes, the others read after the barrier. Raises ConfigError, DataError, CorruptError.
    """
    with OpenCaches() as caches:
        return _prepared(config, folder, num_ranks, is_first, barrier, spare, caches)


def _prepared(
    config: TrainConfig,
    folder: Path,
    num_ranks: int,
    is_first: bool,
    barrier: Callable[[], None],
    spare: Path | None,
    caches: OpenCaches,
) -> RunPlan:
    for number, stage in enumerate(config.stages):
        with _naming_stage(number, stage):
            check_own_words(check_mixes(stage, 1), stage, config.data)
    if is_first and config.student.init is not None:
        # Report missing caches first: no student should be cut for a run that would be refused.
        for cache in config.data.caches:
            Catalog(cache.path, cache.chains_version, cache.verdicts_version)
    require_cut(config.student)
    run = RunFolder(folder)
    accumulations = [_accumulation(config, number, num_ranks) for number in range(len(config.stages))]

    sets, is_pinned_here = None, False
    if any(check_mixes(stage, 1).reads_features for stage in config.stages):
        # Pinned by the first rank: sets may grow while others start.
        is_pinned_here = is_first and not run.features_path.exists()
        sets = pin_features(run.features_path, config.data) if is_first else None
        barrier()
        sets = sets or reopen_features(run.features_path, config.data)
    shared = _Shared(config, run, is_first, barrier, spare, caches)
    try:
        stages = [
            _own_words(
                _stage_plan(config, index, accumulation, _in_steps(index, _opened_stage(index, shared), shared), sets),
                shared,
            )
            for index, accumulation in enumerate(accumulations)
        ]
    except ConfigError:
        # What a stage lacks may be added to the cache, and must then be seen.
        if is_pinned_here:
            run.features_path.unlink()
        raise
    heldout = None
    if config.eval is not None:
        heldout = shared.heldout(run.heldout_path, eval_request(config.data, config.eval))
        # Refuse here rather than at the first evaluation if the length limit leaves no held-out chain.
        EpochPlans(heldout, eval_spec(config.data), 1)
    if heldout is not None and is_first:
        _warn_of_seen(stages, heldout)
    _require_one_teacher_vocabulary([*(stage.selection for stage in stages), *([heldout] if heldout else [])])
    roots = [cache.path for cache in config.data.caches]
    vocabulary = check_vocabulary(config.student, stages[0].selection, roots)
    _check_lora_targets(config)
    if is_first:
        _check_prunes(config)
    _check_balance(config)
    return RunPlan(stages, heldout, vocabulary)


@dataclass(frozen=True)
class _Shared:
    """Files of a run that its first rank writes and the others read after the barrier."""

    config: TrainConfig
    run: RunFolder
    is_first: bool
    barrier: Callable[[], None]
    spare: Path | None
    caches: OpenCaches
    written_for: dict[tuple[str, str], Path] = field(default_factory=dict)
    """Files by what they are and the chains that they are about."""

    def opened(self, path: Path, request: SelectionRequest, open_here: Opener = open_data) -> Selection:
        """A selection."""
        if self.is_first:
            asked = replace(request, opened=self.caches)
            selection = open_here(path, asked, self.config.data, self.config.student)
        self.barrier()
        return selection if self.is_first else reopen_data(path, request)

    def heldout(self, path: Path, request: SelectionRequest) -> Selection:
        """A selection of held-out chains, which `eval` may change."""
        trained = self.run.selection_path(self.config.stages[0].name)
        return self.opened(
            path if self.spare is None else kept_or_temporary(path, request, self.spare),
            request,
            functools.partial(open_heldout, trained=trained),
        )

    def written(self, kind: str, path: Path, selection: Selection, write: Callable[[Path], None]) -> None:
        """A file about each chain of a selection, and what lies beside it under the same stem. Stages often read the
        same chains: these files are copied.
        """
        if self.is_first:
            # Not the header's hash: once chains are split, it has the stage's name in it.
            chains = hashlib.sha256(selection.key_R.tobytes()).hexdigest()
            earlier = self.written_for.setdefault((kind, chains), path)
            if not path.exists() and earlier == path:
                write(path)
            elif not path.exists():
                # .json before .npy, whose presence means that both are whole.
                for source in sorted(earlier.parent.glob(f"{earlier.stem}.*")):
                    with atomic_path(path.with_suffix(source.suffix)) as temp:
                        shutil.copyfile(source, temp)
        self.barrier()


def _opened_stage(index: int, shared: _Shared) -> Selection:
    """The selection of a stage: single chains, or pairs."""
    config, run = shared.config, shared.run
    stage, data = config.stages[index], config.data
    request = train_request(data, index, stage)
    if stage.negatives is None:
        return shared.opened(run.selection_path(stage.name), request)
    # First, so that what is wrong with its SQL alone is said of it alone.
    negatives = shared.opened(run.negatives_path(stage.name), negatives_request(data, index, stage), _open_plain)
    path = run.selection_path(stage.name)
    if not path.exists():
        # Caches may grow meanwhile: a wrong chain that only the second selection saw would be imitated.
        request = at_versions_of(request, negatives)
    if not is_paired(stage):
        return shared.opened(path, request)
    pairing = Pairing(negatives, data.pack_tokens, data.max_tokens)
    return shared.opened(path, request, functools.partial(open_data, pairing=pairing))


def _in_steps(index: int, selection: Selection, shared: _Shared) -> Selection:
    """The selection, its chains split into examples where `data.steps` says so."""
    data = shared.config.data
    if data.steps is None:
        return selection
    path = examples_path(shared.run.root, shared.config.stages[index].name, selection, data)
    shared.written("steps", path, selection, lambda path: write_examples(path, selection, data))
    return with_examples(path, selection)


def _own_words(plan: StagePlan, shared: _Shared) -> StagePlan:
    """The plan with what the stage knows of the student's own chains and of wrong ones."""
    config, run = shared.config, shared.run
    stage, data, selection = plan.config, config.data, plan.selection
    attached = NOTHING_ATTACHED
    if plan.mix.reads_behaviour:
        path = numbers_path(run.root, stage.name, "behaviour", selection)
        shared.written("behaviour", path, selection, lambda path: write_behaviour(path, selection, data.behaviour))
        attached = Attached(behaviour=TokenNumbers(path, selection))
    if (terms := data.terms) is not None:
        path = terms_path(run.root, stage.name, selection, terms)
        shared.written("terms", path, selection, lambda path: write_terms(path, selection, terms))
        attached = replace(attached, terms=MarkedTerms(path, selection, terms))
    if stage.negatives is None:
        return replace(plan, attached=attached)
    if not is_paired(stage):
        request = negatives_request(data, plan.index, stage)
        negatives = shared.opened(run.negatives_path(stage.name), request, _open_plain)
        # By key: this selection holds right chains too, so its row numbers are others.
        is_negative_R = np.isin(selection.key_R, negatives.key_R)
        if not is_negative_R.any():
            raise ConfigError(f"{request.key} {request.where!r} selects none of the chains that data.max_chains leaves")
        attached = replace(attached, is_negative_R=is_negative_R)
    assert config.eval is not None
    right = shared.heldout(run.right_path(stage.name), right_request(data, config.eval, plan.index, stage))
    return replace(plan, attached=attached, right=right)


def _open_plain(path: Path, request: SelectionRequest, data: DataConfig, student: StudentConfig) -> Selection:
    """Which chains are wrong: neither their tokens nor their distributions are read here."""
    return open_selection(path, replace(request, any_tokenizer=True))


@contextlib.contextmanager
def _naming_stage(number: int, stage: StageConfig) -> Iterator[None]:
    """Puts the stage before what is wrong with its settings."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{stage_key(number, stage.name)}: {error}") from error


def _accumulation(config: TrainConfig, number: int, num_ranks: int) -> int:
    with _naming_stage(number, config.stages[number]):
        return accumulation_of(config.stages[number], config.data, num_ranks)


def _check_prunes(config: TrainConfig) -> None:
    """Refuses cuts of later stages that would only fail when the stages before are trained."""
    asked = [(number, stage) for number, stage in enumerate(config.stages) if stage.prune is not None]
    if not asked:
        return
    from student_train.model.narrow import Sizes, layout_of, planned_sizes
    from student_train.model.prune import kept_layers, require_layers
    from student_train.model.student import meta_causal

    model = meta_causal(config.student)
    num_layers = int(model.config.to_dict().get("num_hidden_layers", 0))
    sizes: Sizes | None = None
    for number, stage in asked:
        assert stage.prune is not None
        with _naming_stage(number, stage):
            require_layers(model)
            if stage.prune.rank_layers == "importance" and config.data.kind == "text":
                raise ConfigError("prune.rank_layers: importance needs distributions, and data.kind: text has none")
            # The next cut starts from what this one leaves.
            if set(stage.prune.axes) - {"layers"} or stage.prune.parameters is not None:
                layout, first = layout_of(model)
                sizes = planned_sizes(layout, replace(sizes or first, layers=num_layers), stage.prune)
                num_layers = sizes.layers
            elif stage.prune.layers is not None:
                num_layers = len(kept_layers(num_layers, stage.prune.layers))


def _check_lora_targets(config: TrainConfig) -> None:
    """Refuses names that peft would refuse only when the stages before are trained."""
    named = [(number, stage) for number, stage in enumerate(config.stages) if stage.lora and stage.lora.targets]
    if not named:
        return
    layers = model_shape(config.student).adaptable
    for number, stage in named:
        assert stage.lora is not None
        with _naming_stage(number, stage):
            _require_lora_targets(layers, stage.lora)


def _check_balance(config: TrainConfig) -> None:
    """Refuses a weight for a loss that the student does not have."""
    named = [(number, stage) for number, stage in enumerate(config.stages) if stage.balance_weight]
    if named and model_shape(config.student).balance_weight is None:
        with _naming_stage(*named[0]):
            raise ConfigError("balance_weight: the student has no balance loss of experts: remove it")


def _require_lora_targets(layers: list[str], lora: LoraConfig) -> None:
    """Raises ConfigError for a target that is the name, or the end of the dotted name, of no layer that peft adapts."""
    for target in lora.targets or []:
        # peft adapts every layer whose dotted name ends so.
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
            raise ConfigError(f"lora.targets: the student has no linear layer {target!r}: there are {known}")


def _require_one_teacher_vocabulary(selections: list[Selection]) -> None:
    found = {
        (*selection.header.tokenizer_fingerprints, str(selection.header.vocab_size))
        for selection in selections
        # A selection of text has the ids of the student, not of a teacher.
        if not selection.is_text
    }
    if len(found) > 1:
        shown = " and ".join(sorted(" ".join(one) for one in found))
        raise ConfigError(
            f"stages and eval select chains of different vocabularies (tokenizer, logits): {shown}: select one"
        )


def _warn_of_seen(stages: list[StagePlan], heldout: Selection) -> None:
    for stage in stages:
        num_seen = len(np.intersect1d(stage.selection.key_R, heldout.key_R))
        if num_seen:
            warn(
                f"stage {stage.config.name} trains on {num_seen} of the {len(np.unique(heldout.key_R))} chains that it "
                f"is evaluated on: add split <> 'heldout' to {_where_of(stage.config)}"
            )


def _where_of(stage: StageConfig) -> str:
    """The conditions that select a stage's chains."""
    own = "data.where" if stage.where is None else "the stage's where"
    return own if stage.negatives is None else f"{own} and to negatives.where"


def _stage_plan(
    config: TrainConfig,
    index: int,
    accumulation: int,
    selection: Selection,
    sets: list[FeatureSet | None] | None,
) -> StagePlan:
    stage, features = config.stages[index], None
    spec = plan_spec(config, index)
    # Neither given: one epoch. max_steps alone reads as many epochs as it needs.
    num_epochs = stage.epochs if stage.epochs is not None or stage.max_steps is not None else 1
    with _naming_stage(index, stage):
        num_steps = _num_steps(selection, spec, num_epochs, stage, config.data)
        mix = check_mixes(stage, num_steps)
        check_losses(mix, selection)
        check_prepared(selection, config.data)
        check_temperature(mix, selection, stage)
        if sets is not None and mix.reads_features:
            if selection.header.kept_ids is not None:
                raise ConfigError("losses on features need the teacher's vocabulary, and the student's is cut")
            if mix.features:
                if any(one.prune is not None for one in config.stages[: index + 1]):
                    raise ConfigError("losses below the head read layers that `prune` changes: use them before it")
                stage = _with_layers(config, stage, mix, sets)
                mix = check_mixes(stage, num_steps)
            features = stage_features(mix, selection, sets)
    return StagePlan(
        index=index,
        config=stage,
        selection=selection,
        spec=spec,
        num_epochs=num_epochs,
        accumulation=accumulation,
        packs_per_step=packs_per_step(stage, config.data),
        num_steps=num_steps,
        mix=mix,
        with_signals=stage.token_weights is not None
        or mix.reads_chunks
        or any(term.needs_distribution for term in mix.terms),
        features=features,
    )


def _with_layers(config: TrainConfig, stage: StageConfig, mix: LossMix, sets: list[FeatureSet | None]) -> StageConfig:
    if any(isinstance(term, AttentionKL) for term in mix.features) and config.student.attention != "sdpa":
        raise ConfigError(f"attention_kl needs student.attention: sdpa, not {config.student.attention}")
    shape = model_shape(config.student)
    first = next(one for one in sets if one is not None)
    return with_layers(stage, mix, first, shape.num_layers, shape.hidden_size)


def _num_steps(
    selection: Selection, spec: PlanSpec, num_epochs: int | None, stage: StageConfig, data: DataConfig
) -> int:
    plans = EpochPlans(planned(selection), spec, num_epochs)
    if num_epochs is None:
        assert stage.max_steps is not None
        return stage.max_steps
    if plans.total_packs() == 0:
        raise ConfigError(f"no chain is read in {num_epochs} epochs: raise data.caches.weight")
    # The last step of a stage may be short; epochs in between follow each other without a gap.
    num_steps = -(-plans.total_packs() // packs_per_step(stage, data))
    return num_steps if stage.max_steps is None else min(num_steps, stage.max_steps)
