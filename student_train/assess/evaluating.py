"""`student-train eval`: a student on held-out chains, and the further parts that are asked for, one after the other.

In: a run's checkpoint or a Hugging Face folder. Out: one JSON object. Parts are prepared before the first is measured,
so that what can be refused costs no hours; one that fails all the same is listed in `failed` and the others are kept.
"""

import contextlib
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from stillroom.config import Json
from stillroom.errors import ConfigError, DataError, StillroomError, one_line
from stillroom.log import warn
from stillroom.models import load_tokenizer, vocab_size_of
from stillroom.sql.conditions import in_brackets
from stillroom.storage.paths import Location
from student_train.answers import (
    AskedPrompt,
    GenerateConfig,
    Given,
    Render,
    end_ids,
    generate_and_judge,
    heldout_prompts,
)
from student_train.assess import forgetting
from student_train.assess.answered import answer_groups
from student_train.assess.breakdown import Breakdown, retention_of, sources_of_rows
from student_train.assess.harness import HarnessConfig, require_tasks, run_harness
from student_train.assess.robustness import as_json, robustness
from student_train.config.data import CacheConfig, DataConfig
from student_train.config.run import HELDOUT, EvalConfig, StudentConfig, TrainConfig
from student_train.config.stage import QuantiseConfig
from student_train.data.freezing import SelectionRequest
from student_train.data.open import eval_request, eval_spec, kept_or_temporary, open_data, sources_of
from student_train.data.pack import TorchPack
from student_train.data.prepared import render_prompts, template_arguments
from student_train.data.selection import Selection
from student_train.data.text import HuggingFaceText
from student_train.data.tokenizer_check import check_vocabulary
from student_train.data.vocabulary.freeze import freeze_source
from student_train.evaluation import evaluate, student_metrics
from student_train.exporting import adopt_tokens, cache_tokenizer, export, trained_model
from student_train.losses.fused_head import fuse_head
from student_train.losses.metrics import TokenMetrics
from student_train.model.quantise import quantise_layers
from student_train.model.student import Student, load_causal, widen_vocab
from student_train.runtime.checkpoint import find_state
from student_train.runtime.cost import device_kind
from student_train.runtime.ranks import Ranks, memory_advice
from student_train.runtime.run_folder import RunFolder

DEFAULT_CHAINS = 512
DEFAULT_PACK_TOKENS = 4096
MEMORY_ADVICE = "Lower data.pack_tokens or engine.chunk_tokens; with --model, --pack-tokens"
FORGETTING, GENERATION, ROBUSTNESS, LM_EVAL = "forgetting", "generation", "robustness", "lm_eval"
"""Parts besides the held-out chains, as they are named in the result; robustness lies within generation."""

Part = Callable[[], Json]
Saved = Callable[[Json], None]
"""Takes the result so far; `pending` are the parts that are still to come."""


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

    name: str
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
    write: Callable[[Path], Json] | None = None
    """Writes a Hugging Face folder for other tools; None where `student.model` is one."""


def _not_saved(result: Json) -> None:
    """Where only the whole result is wanted."""


def evaluate_config(
    config: TrainConfig,
    where: str | None,
    which: str,
    generate: GenerateConfig | None = None,
    quantise: QuantiseConfig | None = None,
    more: More = NOTHING_MORE,
    saved: Saved = _not_saved,
) -> Json:
    """Evaluates checkpoint `which` of a run, or the untrained student (`initial`).

    Without `where`, on the run's held-out selection; with `generate`, also by its answers to prompts. `quantise` rounds
    the forward pass, as a checkpoint of a stage that quantises always is. `saved` is called after every part.

    Raises ConfigError, DataError, CorruptError, before anything is measured.
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
        config.student.model if state is None else state.tag,
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
        write=None if state is None else partial(export, config, state, adapter_only=False, tokenizer=None),
    )
    return _evaluate(subject, generate, more, saved)


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
    saved: Saved = _not_saved,
) -> Json:
    """Evaluates a Hugging Face folder or hub id; `kind` is that of DataConfig, `quantise` rounds the forward pass.

    `saved` is called after every part. Raises ConfigError, DataError, CorruptError, before anything is measured.
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
        model,
        load_causal(model, student, precision),
        student,
        DataConfig(caches=[CacheConfig(path=path) for path in caches], kind=kind, pack_tokens=pack_tokens),
        EvalConfig(where=where or HELDOUT, max_chains=max_chains),
        precision,
        quantise=quantise,
        before=None if more.before is None else StudentConfig(model=more.before),
    )
    return _evaluate(subject, generate, more, saved)


def _evaluate(subject: _Subject, generate: GenerateConfig | None, more: More, saved: Saved) -> Json:
    data, wanted = subject.data, subject.wanted
    with tempfile.TemporaryDirectory(prefix="student-train-eval-") as name:
        temp = Path(name)
        with memory_advice(MEMORY_ADVICE):
            request = eval_request(data, wanted, "--where" if subject.kept is None else "eval.where")
            path = temp / "heldout.selection.parquet"
            if subject.kept is not None:
                path = kept_or_temporary(subject.kept, request, temp)
            if subject.trained is None and data.kind == "projected":
                subject = replace(subject, trained=_other_chains(temp, data, wanted))
            selection = open_data(path, request, data, subject.student, counted=subject.trained)
            breakdown = Breakdown(selection, sources_of_rows(selection, [cache.path for cache in data.caches]))
            metrics_of = _metrics_of(subject.model, subject, selection)
            parts = _prepared(subject, selection, generate, more, temp)
            whole = evaluate(metrics_of, selection, eval_spec(data), _alone(), breakdown)
        result: Json = {
            "model": subject.name,
            "where": wanted.where,
            "quantise": None if subject.quantise is None else subject.quantise.format,
            "device": device_kind(),
            **whole.model_dump(),
            "retention": None if whole.js is None else retention_of(whole.js),
            **breakdown.result(),
            GENERATION: None,
            FORGETTING: None,
            LM_EVAL: None,
            "failed": [],
            "pending": list(parts),
        }
        saved(result)
        for part, measure in parts.items():
            _measure(part, measure, result)
            result["pending"].remove(part)
            saved(result)
    return result


def _measure(name: str, part: Part, result: Json) -> None:
    """Adds a part to the result, or why it failed."""
    try:
        with memory_advice(MEMORY_ADVICE):
            found = part()
    except StillroomError as error:
        failed = {"part": name, "reason": str(error), "exit_code": error.exit_code}
    except Exception as error:  # noqa: BLE001  whatever a library raises, the parts before it are kept
        traceback.print_exc()
        failed = {"part": name, "reason": f"{type(error).__name__}: {one_line(error)}", "exit_code": 1}
    else:
        place = result[GENERATION] if name == ROBUSTNESS else result
        place[name] = found
        return
    result["failed"].append(failed)
    warn(f"{name} failed, what was measured before is kept: {failed['reason']}")


def _prepared(
    subject: _Subject, selection: Selection, generate: GenerateConfig | None, more: More, temp: Path
) -> dict[str, Part]:
    """The parts in their order, once all that can be checked without measuring is."""
    parts: dict[str, Part] = {}
    if more.forgetting is not None:
        parts[FORGETTING] = _forgetting_part(subject, more.forgetting, temp)
    if generate is not None:
        parts |= _answer_parts(subject, selection, generate, more)
    if more.harness is not None:
        parts[LM_EVAL] = _lm_eval_part(subject, selection, more.harness, temp)
    return parts


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


def _forgetting_part(subject: _Subject, given: str, temp: Path) -> Part:
    """Both models stand on the device together."""
    second, before = forgetting.second_set(given), subject.before
    assert before is not None
    if isinstance(second, Path) and second.is_file():
        return _text_part(subject, before, second)
    data = subject.data.updated(caches=[CacheConfig(path=second)])
    request = eval_request(data, EvalConfig(max_chains=subject.wanted.max_chains), "--forgetting")
    # Projected as the run's own held-out chains are: by the counts of what it trained on.
    other = open_data(temp / "second.selection.parquet", request, data, subject.student, counted=subject.trained)
    check_vocabulary(subject.student, other, [second])
    _require_same_vocabulary(subject.student, before, other, second)

    def measure() -> Json:
        old = load_causal(before.model, before, subject.precision)
        found = {}
        for name, model, student in (("after", subject.model, subject.student), ("before", old, before)):
            metrics_of = _metrics_of(model, replace(subject, student=student, data=data, quantise=None), other)
            result = evaluate(metrics_of, other, eval_spec(data), _alone())
            retention = None if result.js is None else retention_of(result.js)
            found[name] = {**result.model_dump(), "retention": retention}
        return forgetting.change("cache", given, before.model, found["before"], found["after"])

    return measure


def _require_same_vocabulary(student: StudentConfig, before: StudentConfig, other: Selection, cache: Location) -> None:
    """Raises ConfigError where the chains of a cache are not in the ids of the model from before."""
    try:
        check_vocabulary(before, other, [cache])
        # Chains that were tokenised again have the student's ids.
        if other.is_retokenised and _ids_by_token(student) != _ids_by_token(before):
            raise ConfigError("its tokenizer differs from the student's")
    except ConfigError as error:
        raise ConfigError(
            f"--before {before.model} has another vocabulary than {student.model}, in whose tokens the chains of "
            f"--forgetting {cache} are read: pass a .txt or .jsonl file, on which both are compared in bits per byte"
        ) from error


def _ids_by_token(student: StudentConfig) -> dict[str, int]:
    tokenizer = load_tokenizer(student.model, student.revision, student.trust_remote_code)
    found: dict[str, int] = tokenizer.get_vocab()
    return found


def _text_part(subject: _Subject, before: StudentConfig, path: Path) -> Part:
    from transformers import AutoConfig

    texts = forgetting.texts_of(path)
    # Raises ConfigError or DataError where there is no such model.
    vocab_size_of(before.model, before.revision, before.trust_remote_code)
    old_config = AutoConfig.from_pretrained(
        before.model, revision=before.revision, trust_remote_code=before.trust_remote_code
    )
    contexts = [config.to_dict().get("max_position_embeddings") for config in (subject.model.config, old_config)]
    size = forgetting.window_size(min(filter(None, contexts), default=None), subject.data.pack_tokens)
    # Special tokens may differ from the cache's, and a text has none.
    read = {
        name: forgetting.windows(
            texts, load_tokenizer(student.model, student.revision, student.trust_remote_code), size
        )
        for name, student in (("after", subject.student), ("before", before))
    }
    if not all(one.pieces for one in read.values()):
        raise DataError(f"--forgetting {path} holds no text of two tokens")

    def measure() -> Json:
        models = {"after": subject.model, "before": load_causal(before.model, before, subject.precision)}
        for name, model in models.items():
            model.set_attn_implementation(subject.student.attention)
            model.to(_alone().device).eval()
            widen_vocab(model, max(map(max, read[name].pieces)) + 1)
        found = {name: forgetting.text_loss(model, read[name], f"{name} the run") for name, model in models.items()}
        same = read["after"].pieces == read["before"].pieces
        return forgetting.change("text", str(path), before.model, found["before"], found["after"], same_tokens=same)

    return measure


def _answer_parts(subject: _Subject, selection: Selection, config: GenerateConfig, more: More) -> dict[str, Part]:
    """Answers to prompts, and to changed prompts."""
    model, data = subject.model, subject.data
    tokenizer = cache_tokenizer(subject.student, selection, None)
    adopt_tokens(model, tokenizer)
    end_ids(model)
    render = _render_of(tokenizer, data, selection)
    pinned = [
        cache.model_copy(update={"root": str(source.path)})
        for cache, source in zip(selection.header.caches, data.caches, strict=True)
    ]
    prompts = heldout_prompts(pinned, subject.wanted.where, config.num_prompts, render)
    given: list[Given] = []

    def measure() -> Json:
        # Evaluation on packs may have replaced the attention.
        model.set_attn_implementation(subject.student.attention)
        result, answers = generate_and_judge(model, tokenizer, prompts, config)
        given.extend(answers)
        cost = None if more.price_per_hour is None else result.seconds / 3600 * more.price_per_hour
        return {
            **result.model_dump(),
            "cost": cost,
            "cost_per_correct": cost / result.num_correct if cost is not None and result.num_correct else None,
            **answer_groups(given),
            ROBUSTNESS: None,
        }

    if not more.is_robustness:
        return {GENERATION: measure}
    write = render or _rendered_as_cached(tokenizer, selection)
    alike = _rendered_alike(prompts, write)

    def measure_changed() -> Json:
        if not given:
            raise StillroomError("there are no answers to compare with")
        clean = [one for one in given if one.prompt.prompt_id in alike]
        return as_json(robustness(model, tokenizer, clean, config, lambda one: write(one.messages, one.run_id)))

    return {GENERATION: measure, ROBUSTNESS: measure_changed}


def _rendered_alike(prompts: Sequence[AskedPrompt], write: Render) -> set[str]:
    """Ids of the prompts that `write` gives the ids that the student reads; changed ones differ by their change only.

    Raises ConfigError where there are none.
    """
    alike = {one.prompt_id for one in prompts if list(one.token_ids) == write(one.messages, one.run_id)}
    if not alike:
        raise ConfigError(
            "--robustness: the student's chat template reproduces none of the cached prompts, so changed prompts would "
            "also differ in their template: remove it"
        )
    if len(alike) < len(prompts):
        warn(f"--robustness skips {len(prompts) - len(alike)} of {len(prompts)} prompts: their chat template differs")
    return alike


def _lm_eval_part(subject: _Subject, selection: Selection, config: HarnessConfig, temp: Path) -> Part:
    student, folder = subject.student, temp / "student"
    tokenizer = (
        load_tokenizer(student.model, student.revision, student.trust_remote_code)
        if subject.write is None
        else cache_tokenizer(student, selection, None)
    )
    is_chat = config.uses_chat(tokenizer)
    require_tasks(config, student.model)

    def measure() -> Json:
        # lm-eval loads the student once more, and needs the memory that this one takes.
        subject.model.to("meta")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if subject.write is None:
            return run_harness(student.model, config, subject.precision, is_chat=is_chat)
        subject.write(folder)
        return run_harness(folder, config, subject.precision, is_chat=is_chat)

    return measure


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
