"""How close a student is to its teacher on held-out chains: during training, and as `student-train eval`.

In: a function from a pack to token metrics, a frozen selection. Out: means over all loss tokens of all ranks. Every
token counts equally, whatever its chain's weight. Where the cache holds draws from the tail, KL and JSD are unbiased
estimates of the dense ones; otherwise the tail is one bucket and they are lower bounds, exact where the support holds
all of the mass. Reverse KL is always a lower bound. Of projected chains only the tokens that begin where a teacher
token does are compared with its distribution.

Bits per byte compare students of different vocabularies: the bits of all loss tokens over the bytes that they spell.
"""

import contextlib
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from stillroom.config import Json
from stillroom.errors import ConfigError
from stillroom.log import Progress, warn
from stillroom.models import cached_pieces, load_tokenizer
from stillroom.pieces import Vocabulary
from stillroom.sql.conditions import in_brackets
from stillroom.storage.paths import Location
from student_train.answers import GenerateConfig, Given, Render, generate_and_judge, heldout_prompts
from student_train.assess import forgetting
from student_train.assess.answered import answer_groups
from student_train.assess.breakdown import Breakdown, retention_of, sources_of_rows
from student_train.assess.harness import HarnessConfig, require_harness, run_harness
from student_train.assess.robustness import as_json, robustness
from student_train.config import (
    HELDOUT,
    CacheConfig,
    DataConfig,
    EvalConfig,
    QuantiseConfig,
    StudentConfig,
    TrainConfig,
)
from student_train.data.epoch_plan import PlanSpec
from student_train.data.kept_ids import ids_of
from student_train.data.open import check_vocabulary, eval_request, eval_spec, kept_or_temporary, open_data, sources_of
from student_train.data.pack import Pack, TargetView, TorchPack, to_torch
from student_train.data.prepared import render_prompts, template_arguments
from student_train.data.retokenised import has_leading_space, vocab_path_of
from student_train.data.selection import Selection, SelectionRequest
from student_train.data.stream import PackStream
from student_train.data.text import HuggingFaceText
from student_train.data.vocabulary.freeze import freeze_source
from student_train.data.vocabulary.pieces import lengths_of
from student_train.exporting import adopt_tokens, cache_tokenizer, export, trained_model
from student_train.losses.fused_head import fuse_head
from student_train.losses.metrics import TokenMetrics
from student_train.model.quantise import quantise_layers
from student_train.model.student import Student, load_causal, widen_vocab
from student_train.runtime.checkpoint import find_state
from student_train.runtime.cost import device_kind
from student_train.runtime.ranks import Ranks, memory_advice
from student_train.runtime.run_folder import RunFolder


class EvalResult(BaseModel):
    """Means over `num_tokens` held-out tokens, in nats. None where there are no distributions."""

    model_config = ConfigDict(frozen=True)

    num_chains: int
    num_tokens: int
    cross_entropy: float
    """-log q of the teacher's token."""
    bits_per_byte: float | None = None
    """Cross-entropy in bits for each byte of text; the token that ends a chain has none. None where neither cache nor
    run has the vocabulary."""
    forward_kl: float | None
    """KL(teacher | student), the tail as the cache holds it."""
    reverse_kl: float | None
    """KL(student | teacher), everything not stored in one bucket."""
    js: float | None
    """Jensen-Shannon divergence, at most log 2; knowledge retention is 1 - js / log 2."""
    top1_agreement: float | None
    """Share of tokens on which the student's most likely token is the teacher's."""
    accuracy: float
    """Share of tokens on which the student's most likely token is the one that the teacher sampled."""
    confidence: float
    """The student's largest probability."""
    confidence_minus_accuracy: float
    """Calibration: above 0 the student is overconfident."""
    entropy: float
    """Entropy of the student's distribution."""

    @property
    def loss(self) -> float:
        """Decides which checkpoint is best: KL to the teacher, or cross-entropy without distributions."""
        return self.cross_entropy if self.forward_kl is None else self.forward_kl

    def line(self) -> str:
        """For the progress output."""
        parts = [f"cross-entropy {self.cross_entropy:.4f}"]
        if self.bits_per_byte is not None:
            parts.append(f"bits per byte {self.bits_per_byte:.4f}")
        if self.forward_kl is not None:
            parts += [f"KL {self.forward_kl:.4f}", f"JSD {self.js:.4f}", f"top-1 agreement {self.top1_agreement:.1%}"]
        return "  ".join([*parts, f"confidence - accuracy {self.confidence_minus_accuracy:+.3f}"])


def evaluate(
    metrics_of: Callable[[TorchPack], TokenMetrics],
    selection: Selection,
    spec: PlanSpec,
    ranks: Ranks,
    breakdown: Breakdown | None = None,
) -> EvalResult:
    """Metrics over all packs of the selection, sharded over the ranks, which must all call this together.

    `breakdown` gets this rank's packs.
    """
    sums = torch.zeros(len(TokenMetrics._fields), dtype=torch.float64, device=ranks.device)
    num_tokens = num_compared = num_bytes = 0
    bytes_of = _byte_counter(selection)
    # A step is one pack a rank: all ranks call the model equally often, as collectives under ZeRO-3 require.
    stream = PackStream(
        selection,
        spec,
        packs_per_step=ranks.num_ranks,
        rank=ranks.rank,
        world=ranks.num_ranks,
        num_epochs=1,
        tell=ranks.tell,
    )
    num_packs = stream.plans.total_packs()
    view = TargetView(with_draws=selection.header.draws > 0)
    with stream, Progress("evaluate", num_packs, "packs") if ranks.is_first else contextlib.nullcontext() as progress:
        for number, pack in enumerate(stream):
            metrics = metrics_of(to_torch(pack, ranks.device, view))
            if pack.num_loss_tokens:
                is_compared_N = _compared(pack)
                sums += _sums(metrics, is_compared_N)
                if breakdown is not None:
                    breakdown.add(pack, metrics, None if is_compared_N is None else is_compared_N.numpy())
                num_tokens += pack.num_loss_tokens
                num_compared += pack.num_loss_tokens if is_compared_N is None else int(is_compared_N.sum())
                num_bytes += 0 if bytes_of is None else bytes_of(pack)
            if progress is not None:
                # What other ranks read is only known at the end.
                known = num_tokens if ranks.num_ranks == 1 else 0
                progress.update(min((number + 1) * ranks.num_ranks, num_packs), known)
        counts = map(float, (num_compared, num_bytes, num_tokens))
        *totals, total_compared, total_bytes, total_tokens = ranks.sum([*sums.tolist(), *counts])
        if progress is not None:
            progress.update(num_packs, int(total_tokens))
    named = dict(zip(TokenMetrics._fields, totals, strict=True))
    return _result(selection, named, int(total_tokens), int(total_compared), int(total_bytes))


def student_metrics(student: Student) -> Callable[[TorchPack], TokenMetrics]:
    """Metrics of a student without an engine."""
    student.eval()

    def metrics_of(pack: TorchPack) -> TokenMetrics:
        with torch.no_grad():
            return TokenMetrics(*student(pack))

    return metrics_of


COMPARED = ("forward_kl_N", "reverse_kl_N", "jsd_N", "agreement_N")
"""Metrics that compare with a distribution."""


def _compared(pack: Pack) -> torch.Tensor | None:
    """bool [N]: which loss tokens have a distribution to compare with; None for text alone."""
    if pack.tail_logmass_N is None:
        return None
    # A cut vocabulary may have lost all stored ids of a token, where metrics are nan.
    has_support_N = (pack.logprobs_NK > -np.inf).any(axis=1)
    return torch.from_numpy(has_support_N if pack.is_common_N is None else has_support_N & pack.is_common_N)


def _sums(metrics: TokenMetrics, is_compared_N: torch.Tensor | None) -> torch.Tensor:
    """float64, one sum for each metric."""
    values = metrics._asdict()
    if is_compared_N is not None:
        is_compared_N = is_compared_N.to(metrics.forward_kl_N.device)
        # Not a product: nan * 0 is nan.
        values |= {name: values[name].where(is_compared_N, 0.0) for name in COMPARED}
    return torch.stack([one.double().sum() for one in values.values()])


def _byte_counter(selection: Selection) -> Callable[[Pack], int] | None:
    """A function from a pack to the bytes that its loss tokens stand for; None without the vocabulary's file.

    A special token counts as its text, which a student without it has to spell, and as nothing where it ends a chain.
    """
    paths = [vocab_path_of(selection, folder) for folder in dict.fromkeys(selection.folders)]
    found = [cached_pieces(path) for path in paths if path.exists()]
    if not found:
        return None
    pieces, special = found[0]
    known_V = lengths_of(Vocabulary(pieces, special).bytes_by_id())
    width = selection.header.vocab_size
    # Kept ids are the cache's, and go beyond the number that is left of them.
    if selection.header.kept_ids is not None:
        width = int(ids_of(selection.header.kept_ids)[-1]) + 1
    lengths_V = np.zeros(max(len(known_V), width), np.int64)
    lengths_V[: len(known_V)] = known_V
    is_special_V = np.zeros(len(lengths_V), bool)
    is_special_V[sorted(special)] = True
    has_space_V = np.zeros(len(lengths_V), bool)
    if selection.is_retokenised and has_leading_space(selection):
        has_space_V[[token_id for token_id, piece in pieces.items() if piece.startswith(" ")]] = True
    if selection.header.kept_ids is not None:
        kept_K = ids_of(selection.header.kept_ids)
        lengths_V, is_special_V, has_space_V = lengths_V[kept_K], is_special_V[kept_K], has_space_V[kept_K]

    def count(pack: Pack) -> int:
        ids_N = pack.sampled_ids_N
        is_last_N = pack.token_N == selection.num_tokens_R[pack.row_N] - 1
        is_end_N = is_last_N & is_special_V[ids_N]
        # A text begins with a chain, and again after a special token.
        is_first_N = (pack.token_N == 0) | np.append(False, is_special_V[ids_N])[:-1]
        return int(lengths_V[ids_N][~is_end_N].sum()) - int((is_first_N & has_space_V[ids_N]).sum())

    return count


def _result(
    selection: Selection, totals: dict[str, float], num_tokens: int, num_compared: int, num_bytes: int
) -> EvalResult:
    counts = dict.fromkeys(COMPARED, max(num_compared, 1))
    mean = {name: total / counts.get(name, num_tokens) for name, total in totals.items()}
    has_teacher = not selection.is_text
    return EvalResult(
        num_chains=selection.num_chains,
        num_tokens=num_tokens,
        cross_entropy=mean["cross_entropy_N"],
        bits_per_byte=totals["cross_entropy_N"] / math.log(2.0) / num_bytes if num_bytes else None,
        forward_kl=mean["forward_kl_N"] if has_teacher else None,
        reverse_kl=mean["reverse_kl_N"] if has_teacher else None,
        js=mean["jsd_N"] if has_teacher else None,
        top1_agreement=mean["agreement_N"] if has_teacher else None,
        accuracy=mean["correct_N"],
        confidence=mean["confidence_N"],
        confidence_minus_accuracy=mean["confidence_N"] - mean["correct_N"],
        entropy=mean["entropy_N"],
    )


DEFAULT_CHAINS = 512
DEFAULT_PACK_TOKENS = 4096
MEMORY_ADVICE = "Lower data.pack_tokens or engine.chunk_tokens; with --model, --pack-tokens"


@dataclass(frozen=True)
class More:
    """What else to measure. `before` is the folder from before the training, where no run says which it was."""

    is_robustness: bool = False
    forgetting: str | None = None
    """A second held-out set: a cache or a text file."""
    before: str | None = None
    harness: HarnessConfig | None = None
    price_per_hour: float | None = None


NOTHING_MORE = More()


@dataclass(frozen=True)
class _Subject:
    """A loaded student, how it is evaluated, and how the one from before it is loaded."""

    model: Any
    student: StudentConfig
    data: DataConfig
    wanted: EvalConfig
    precision: str
    kept: Path | None = None
    trained: Path | None = None
    chunk_tokens: int | None = None
    quantise: QuantiseConfig | None = None
    before: StudentConfig | None = None


def evaluate_config(
    config: TrainConfig,
    where: str | None,
    which: str,
    generate: GenerateConfig | None = None,
    quantise: QuantiseConfig | None = None,
    more: More = NOTHING_MORE,
) -> Json:
    """Evaluates checkpoint `which` of a run, or the untrained student (`initial`).

    Without `where`, on the run's held-out selection; with `generate`, also by its answers to prompts. `quantise` rounds
    the forward pass, as a checkpoint of a stage that quantises always is.

    Raises ConfigError, DataError, CorruptError.
    """
    if config.eval is None and where is None:
        raise ConfigError("the configuration has no eval block: add one, or pass --where")
    if which == "initial" and more.forgetting is not None:
        raise ConfigError("--forgetting compares with the student before the run: remove it, or --initial")
    run = RunFolder(config.run)
    asked = config.eval or EvalConfig()
    state = None if which == "initial" else find_state(run.checkpoints, which)
    if state is None:
        model = load_causal(config.student.model, config.student, config.engine.precision)
    else:
        model = trained_model(config, state, merged=True)
        quantise = quantise or config.stages[state.stage].quantise
    subject = _Subject(
        model,
        config.student,
        config.data,
        asked if where is None else asked.updated(where=where),
        config.engine.precision,
        kept=run.heldout_path if where is None else None,
        trained=run.selection_path(config.stages[0].name),
        chunk_tokens=config.engine.chunk_tokens,
        quantise=quantise,
        before=config.student,
    )
    result = {"model": config.student.model if state is None else state.tag, **_evaluate(subject, generate, more)}
    if more.harness is None:
        return result
    if state is None:
        return {**result, "lm_eval": run_harness(config.student.model, more.harness, config.engine.precision)}
    with tempfile.TemporaryDirectory(prefix="student-train-eval-") as temp:
        folder = Path(temp) / "student"
        export(config, state, folder, adapter_only=False, tokenizer=None)
        return {**result, "lm_eval": run_harness(folder, more.harness, config.engine.precision)}


def evaluate_model(
    model: str,
    caches: Sequence[Path],
    where: str | None,
    *,
    kind: Literal["distributions", "projected", "text"] = "distributions",
    max_chains: int | None = DEFAULT_CHAINS,
    pack_tokens: int = DEFAULT_PACK_TOKENS,
    generate: GenerateConfig | None = None,
    quantise: QuantiseConfig | None = None,
    more: More = NOTHING_MORE,
) -> Json:
    """Evaluates a Hugging Face folder or hub id; `kind` is that of DataConfig, `quantise` rounds the forward pass.

    Raises ConfigError, DataError, CorruptError.
    """
    for folder in filter(None, (model, more.before)):
        if (Path(folder) / "adapter_config.json").exists():
            raise ConfigError(
                f"{folder} is a LoRA adapter without its model: export it merged (`student-train export` without "
                "--adapter-only) and pass that folder"
            )
    if (more.forgetting is None) != (more.before is None):
        raise ConfigError("with --model, --forgetting needs --before, the student before its training, and vice versa")
    precision: Literal["bfloat16", "float32"] = "bfloat16" if torch.cuda.is_available() else "float32"
    student = StudentConfig(model=model)
    subject = _Subject(
        load_causal(model, student, precision),
        student,
        DataConfig(caches=[CacheConfig(path=path) for path in caches], kind=kind, pack_tokens=pack_tokens),
        EvalConfig(where=where or HELDOUT, max_chains=max_chains),
        precision,
        quantise=quantise,
        before=None if more.before is None else StudentConfig(model=more.before),
    )
    result = {"model": model, **_evaluate(subject, generate, more)}
    return result if more.harness is None else {**result, "lm_eval": run_harness(model, more.harness, precision)}


def _evaluate(subject: _Subject, generate: GenerateConfig | None, more: More) -> Json:
    data, wanted = subject.data, subject.wanted
    # Before hours of evaluation.
    second = None if more.forgetting is None else forgetting.second_set(more.forgetting)
    if more.harness is not None:
        require_harness()
    with tempfile.TemporaryDirectory(prefix="student-train-eval-") as temp, memory_advice(MEMORY_ADVICE):
        request = eval_request(data, wanted)
        path = Path(temp) / "heldout.selection.parquet"
        if subject.kept is not None:
            path = kept_or_temporary(subject.kept, request, Path(temp))
        trained = subject.trained
        if trained is None and data.kind == "projected":
            trained = _other_chains(Path(temp), data, wanted)
        selection = open_data(path, request, data, subject.student, counted=trained)
        metrics_of = _metrics_of(subject.model, subject, selection)
        breakdown = Breakdown(selection, sources_of_rows(selection, [cache.path for cache in data.caches]))
        result = evaluate(metrics_of, selection, eval_spec(data), _alone(), breakdown)
        forgotten = None if second is None else _forgotten(subject, second, Path(temp))
        answers = None if generate is None else _answers(subject, selection, generate, more)
    return {
        "where": wanted.where,
        "quantise": None if subject.quantise is None else subject.quantise.format,
        "device": device_kind(),
        **result.model_dump(),
        "retention": None if result.js is None else retention_of(result.js),
        **breakdown.result(),
        "generation": answers,
        "forgetting": forgotten,
        "lm_eval": None,
    }


def _alone() -> Ranks:
    return Ranks(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _metrics_of(model: Any, subject: _Subject, selection: Selection) -> Callable[[TorchPack], TokenMetrics]:
    """The model on this machine's device, ready for packs of the selection."""
    vocabulary = check_vocabulary(subject.student, selection, [cache.path for cache in subject.data.caches])
    widen_vocab(model, vocabulary.num_ids)
    fuse_head(model)
    # Rounded once: a second selection finds the layers as they are.
    if subject.quantise is not None and model is subject.model:
        quantise_layers(model, subject.quantise)
    return student_metrics(Student(model, subject.chunk_tokens).to(_alone().device))


def _other_chains(folder: Path, data: DataConfig, wanted: EvalConfig) -> Path | None:
    """A selection of what is not evaluated, whose chains say how the evaluated ones are projected; None if empty."""
    path = folder / "others.selection.parquet"
    with contextlib.suppress(ConfigError):
        freeze_source(path, SelectionRequest(sources_of(data), f"NOT {in_brackets(wanted.where)}"))
        return path
    return None


def _forgotten(subject: _Subject, second: Location, folder: Path) -> Json:
    """The second set before and after the training; both models stand on the device together."""
    assert subject.before is not None
    before = load_causal(subject.before.model, subject.before, subject.precision)
    models = {"after": subject.model, "before": before}
    if isinstance(second, Path) and second.is_file():
        # Special tokens may differ from the cache's, and a text has none.
        tokenizer = load_tokenizer(subject.student.model, subject.student.revision, subject.student.trust_remote_code)
        pieces = forgetting.windows(second, tokenizer, forgetting.window_size(before, subject.data.pack_tokens))
        for model in models.values():
            model.set_attn_implementation(subject.student.attention)
            model.to(_alone().device).eval()
        widen_vocab(before, max(map(max, pieces)) + 1)
        found = {name: forgetting.text_loss(model, pieces, f"{name} the run") for name, model in models.items()}
        return forgetting.change("text", str(second), subject.before.model, found["before"], found["after"])
    data = subject.data.updated(caches=[CacheConfig(path=second)])
    wanted = EvalConfig(max_chains=subject.wanted.max_chains)
    path, request = folder / "second.selection.parquet", eval_request(data, wanted)
    # Projected as the run's own held-out chains are: by the counts of what it trained on.
    other = open_data(path, request, data, subject.student, counted=subject.trained)
    subjects = {"after": subject, "before": replace(subject, student=subject.before)}
    found = {}
    for name, model in models.items():
        metrics_of = _metrics_of(model, replace(subjects[name], data=data, quantise=None), other)
        result = evaluate(metrics_of, other, eval_spec(data), _alone())
        retention = None if result.js is None else retention_of(result.js)
        found[name] = {**result.model_dump(), "retention": retention}
    return forgetting.change("cache", str(second), subject.before.model, found["before"], found["after"])


def _answers(subject: _Subject, selection: Selection, config: GenerateConfig, more: More) -> Json:
    model, data = subject.model, subject.data
    # Evaluation on packs may have replaced the attention.
    model.set_attn_implementation(subject.student.attention)
    tokenizer = cache_tokenizer(subject.student, selection, None)
    adopt_tokens(model, tokenizer)
    render = _render_of(tokenizer, data, selection)
    pinned = [
        cache.model_copy(update={"root": str(source.path)})
        for cache, source in zip(selection.header.caches, data.caches, strict=True)
    ]
    prompts = heldout_prompts(pinned, subject.wanted.where, config.num_prompts, render)
    result, given = generate_and_judge(model, tokenizer, prompts, config)
    cost = None if more.price_per_hour is None else result.seconds / 3600 * more.price_per_hour
    return {
        **result.model_dump(),
        "cost": cost,
        "cost_per_correct": cost / result.num_correct if cost is not None and result.num_correct else None,
        **answer_groups(given),
        "robustness": _robustness(model, tokenizer, selection, given, config, render) if more.is_robustness else None,
    }


def _robustness(
    model: Any,
    tokenizer: Any,
    selection: Selection,
    given: Sequence[Given],
    config: GenerateConfig,
    render: Render | None,
) -> Json:
    """Raises ConfigError where changed prompts cannot be written as the clean ones were."""
    write = render or _rendered_as_cached(tokenizer, selection)
    alike = [one for one in given if list(one.prompt.token_ids) == write(one.prompt.messages, one.prompt.run_id)]
    if not alike:
        raise ConfigError(
            "--robustness: the student's chat template reproduces none of the cached prompts, so changed prompts would "
            "also differ in their template: remove it"
        )
    if len(alike) < len(given):
        warn(f"--robustness skips {len(given) - len(alike)} of {len(given)} prompts: their chat template differs")
    return as_json(robustness(model, tokenizer, alike, config, lambda one: write(one.messages, one.run_id)))


def _rendered_as_cached(tokenizer: Any, selection: Selection) -> Render:
    """As the teacher read a conversation."""
    arguments = template_arguments(selection)

    def render(messages: Sequence[Mapping[str, str]], run_id: str) -> list[int]:
        given = arguments.get(run_id, {})
        ids: list[int] = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=False, **given
        )
        return ids

    return render


def _render_of(tokenizer: Any, data: DataConfig, selection: Selection) -> Render | None:
    """How the student reads a conversation where it is not as the teacher did."""
    changes = data.prompt
    if changes is not None:
        given = template_arguments(selection)
        return lambda messages, run_id: render_prompts(tokenizer, changes, [messages], given.get(run_id, {}))[0]
    if not selection.is_retokenised and selection.header.kept_ids is None:
        return None
    text = HuggingFaceText(tokenizer, selection.header.vocab_size)
    return lambda messages, _: text.encode_prompts([text.render(messages)])[0]
