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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from stillroom.config import Json
from stillroom.errors import ConfigError
from stillroom.log import Progress
from stillroom.models import cached_pieces
from stillroom.sql.conditions import in_brackets
from student_train.answers import GenerateConfig, Render, generate_and_judge, heldout_prompts
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
from student_train.data.vocabulary.pieces import Vocabulary, lengths_of
from student_train.exporting import adopt_tokens, cache_tokenizer, trained_model
from student_train.losses.fused_head import fuse_head
from student_train.losses.metrics import TokenMetrics
from student_train.model.quantise import quantise_layers
from student_train.model.student import Student, load_causal, widen_vocab
from student_train.runtime.checkpoint import find_state
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
    metrics_of: Callable[[TorchPack], TokenMetrics], selection: Selection, spec: PlanSpec, ranks: Ranks
) -> EvalResult:
    """Metrics over all packs of the selection, sharded over the ranks, which must all call this together."""
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


def evaluate_config(
    config: TrainConfig,
    where: str | None,
    which: str,
    generate: GenerateConfig | None = None,
    quantise: QuantiseConfig | None = None,
) -> Json:
    """Evaluates checkpoint `which` of a run, or the untrained student (`initial`).

    Without `where`, on the run's held-out selection; with `generate`, also by its answers to prompts. `quantise` rounds
    the forward pass, as a checkpoint of a stage that quantises always is.

    Raises ConfigError, DataError, CorruptError.
    """
    if config.eval is None and where is None:
        raise ConfigError("the configuration has no eval block: add one, or pass --where")
    run = RunFolder(config.run)
    asked = config.eval or EvalConfig()
    wanted = asked if where is None else asked.updated(where=where)
    if which == "initial":
        model = load_causal(config.student.model, config.student, config.engine.precision)
        name = config.student.model
    else:
        state = find_state(run.checkpoints, which)
        model, name = trained_model(config, state, merged=True), state.tag
        quantise = quantise or config.stages[state.stage].quantise
    kept = run.heldout_path if where is None else None
    trained = run.selection_path(config.stages[0].name)
    chunk_tokens = config.engine.chunk_tokens
    result = _evaluate(model, config.student, config.data, wanted, kept, trained, chunk_tokens, generate, quantise)
    return {"model": name, **result}


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
) -> Json:
    """Evaluates a Hugging Face folder or hub id; `kind` is that of DataConfig, `quantise` rounds the forward pass.

    Raises ConfigError, DataError, CorruptError.
    """
    if (Path(model) / "adapter_config.json").exists():
        raise ConfigError(
            f"--model {model} is a LoRA adapter without its model: export it merged (`student-train export` without "
            "--adapter-only) and pass that folder"
        )
    student = StudentConfig(model=model)
    data = DataConfig(caches=[CacheConfig(path=path) for path in caches], kind=kind, pack_tokens=pack_tokens)
    wanted = EvalConfig(where=where or HELDOUT, max_chains=max_chains)
    precision = "bfloat16" if torch.cuda.is_available() else "float32"
    loaded = load_causal(model, student, precision)
    return {"model": model, **_evaluate(loaded, student, data, wanted, None, None, None, generate, quantise)}


def _evaluate(
    model: Any,
    student: StudentConfig,
    data: DataConfig,
    wanted: EvalConfig,
    kept: Path | None,
    trained: Path | None,
    chunk_tokens: int | None,
    generate: GenerateConfig | None,
    quantise: QuantiseConfig | None,
) -> Json:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(prefix="student-train-eval-") as temp, memory_advice(MEMORY_ADVICE):
        request = eval_request(data, wanted)
        path = Path(temp) / "heldout.selection.parquet"
        if kept is not None:
            path = kept_or_temporary(kept, request, Path(temp))
        if trained is None and data.kind == "projected":
            trained = _other_chains(Path(temp), data, wanted)
        selection = open_data(path, request, data, student, counted=trained)
        vocabulary = check_vocabulary(student, selection, [cache.path for cache in data.caches])
        widen_vocab(model, vocabulary.num_ids)
        fuse_head(model)
        if quantise is not None:
            quantise_layers(model, quantise)
        metrics_of = student_metrics(Student(model, chunk_tokens).to(device))
        result = evaluate(metrics_of, selection, eval_spec(data), Ranks(0, 1, device))
        answers = None
        if generate is not None:
            answers = _answers(model, student, data, selection, wanted.where, generate)
    return {
        "where": wanted.where,
        "quantise": None if quantise is None else quantise.format,
        **result.model_dump(),
        "generation": answers,
    }


def _other_chains(folder: Path, data: DataConfig, wanted: EvalConfig) -> Path | None:
    """A selection of what is not evaluated, whose chains say how the evaluated ones are projected; None if empty."""
    path = folder / "others.selection.parquet"
    with contextlib.suppress(ConfigError):
        freeze_source(path, SelectionRequest(sources_of(data), f"NOT {in_brackets(wanted.where)}"))
        return path
    return None


def _answers(
    model: Any, student: StudentConfig, data: DataConfig, selection: Selection, where: str, config: GenerateConfig
) -> Json:
    # Evaluation on packs may have replaced the attention.
    model.set_attn_implementation(student.attention)
    tokenizer = cache_tokenizer(student, selection, None)
    adopt_tokens(model, tokenizer)
    render = _render_of(tokenizer, data, selection)
    pinned = [
        cache.model_copy(update={"root": str(source.path)})
        for cache, source in zip(selection.header.caches, data.caches, strict=True)
    ]
    prompts = heldout_prompts(pinned, where, config.num_prompts, render)
    return generate_and_judge(model, tokenizer, prompts, config).model_dump()


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
