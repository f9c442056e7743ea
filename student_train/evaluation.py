"""How close a student is to its teacher on held-out chains: during training, and as `student-train eval`.

In: a function from a pack to token metrics, a frozen selection. Out: means over all loss tokens of all ranks. Every
token counts equally, whatever its chain's weight. Where the cache holds draws from the tail, KL and JSD are unbiased
estimates of the dense ones; otherwise the tail is one bucket and they are lower bounds, exact where the support holds
all of the mass. Reverse KL is always a lower bound.
"""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from stillroom.config import Json
from stillroom.errors import ConfigError
from stillroom.log import Progress
from student_train.answers import GenerateConfig, generate_and_judge, heldout_prompts
from student_train.config import HELDOUT, CacheConfig, DataConfig, EvalConfig, StudentConfig, TrainConfig
from student_train.data.epoch_plan import PlanSpec
from student_train.data.open import check_vocabulary, eval_request, eval_spec, kept_or_temporary, open_data
from student_train.data.pack import TargetView, TorchPack, to_torch
from student_train.data.selection import Selection
from student_train.data.stream import PackStream
from student_train.data.text import HuggingFaceText
from student_train.exporting import adopt_tokens, cache_tokenizer, trained_model
from student_train.losses.fused_head import fuse_head
from student_train.losses.metrics import TokenMetrics
from student_train.model.student import Student, load_causal, widen_vocab
from student_train.runtime.checkpoint import find_state
from student_train.runtime.ranks import Ranks
from student_train.runtime.run_folder import RunFolder


class EvalResult(BaseModel):
    """Means over `num_tokens` held-out tokens, in nats. None where there are no distributions."""

    model_config = ConfigDict(frozen=True)

    num_chains: int
    num_tokens: int
    cross_entropy: float
    """-log q of the teacher's token."""
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
        if self.forward_kl is not None:
            parts += [f"KL {self.forward_kl:.4f}", f"JSD {self.js:.4f}", f"top-1 agreement {self.top1_agreement:.1%}"]
        return "  ".join([*parts, f"confidence - accuracy {self.confidence_minus_accuracy:+.3f}"])


def evaluate(
    metrics_of: Callable[[TorchPack], TokenMetrics], selection: Selection, spec: PlanSpec, ranks: Ranks
) -> EvalResult:
    """Metrics over all packs of the selection, sharded over the ranks, which must all call this together."""
    sums = torch.zeros(len(TokenMetrics._fields), dtype=torch.float64, device=ranks.device)
    num_tokens = 0
    stream = PackStream(
        selection, spec, packs_per_step=ranks.num_ranks, rank=ranks.rank, world=ranks.num_ranks, num_epochs=1
    )
    num_packs = stream.plans.total_packs()
    view = TargetView(with_draws=selection.header.draws > 0)
    with stream, Progress("evaluate", num_packs, "packs") if ranks.is_first else nullcontext() as progress:
        for number, pack in enumerate(stream):
            metrics = metrics_of(to_torch(pack, ranks.device, view))
            if pack.num_loss_tokens:
                sums += torch.stack([values.double().sum() for values in metrics])
                num_tokens += pack.num_loss_tokens
            if progress is not None:
                # What other ranks read is only known at the end.
                known = num_tokens if ranks.num_ranks == 1 else 0
                progress.update(min((number + 1) * ranks.num_ranks, num_packs), known)
        *totals, total_tokens = ranks.sum([*sums.tolist(), float(num_tokens)])
        if progress is not None:
            progress.update(num_packs, int(total_tokens))
    return _result(selection, dict(zip(TokenMetrics._fields, totals, strict=True)), int(total_tokens))


@torch.no_grad()
def student_metrics(student: Student) -> Callable[[TorchPack], TokenMetrics]:
    """Metrics of a student without an engine."""
    student.eval()

    def metrics_of(pack: TorchPack) -> TokenMetrics:
        with torch.no_grad():
            return TokenMetrics(*student(pack))

    return metrics_of


def _result(selection: Selection, totals: dict[str, float], num_tokens: int) -> EvalResult:
    mean = {name: total / num_tokens for name, total in totals.items()}
    has_teacher = not selection.is_text
    return EvalResult(
        num_chains=selection.num_chains,
        num_tokens=num_tokens,
        cross_entropy=mean["cross_entropy_N"],
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


def evaluate_config(config: TrainConfig, where: str | None, which: str, generate: GenerateConfig | None = None) -> Json:
    """Evaluates checkpoint `which` of a run, or the untrained student (`initial`).

    Without `where`, on the run's held-out selection; with `generate`, also by its answers to prompts.

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
    kept = run.heldout_path if where is None else None
    result = _evaluate(model, config.student, config.data, wanted, kept, config.engine.chunk_tokens, generate)
    return {"model": name, **result}


def evaluate_model(
    model: str,
    caches: Sequence[Path],
    where: str | None,
    *,
    max_chains: int | None = DEFAULT_CHAINS,
    pack_tokens: int = DEFAULT_PACK_TOKENS,
    generate: GenerateConfig | None = None,
) -> Json:
    """Evaluates a Hugging Face folder or hub id. Raises ConfigError, DataError, CorruptError."""
    if (Path(model) / "adapter_config.json").exists():
        raise ConfigError(
            f"--model {model} is a LoRA adapter without its model: export it merged (`student-train export` without "
            "--adapter-only) and pass that folder"
        )
    student = StudentConfig(model=model)
    data = DataConfig(caches=[CacheConfig(path=path) for path in caches], pack_tokens=pack_tokens)
    wanted = EvalConfig(where=where or HELDOUT, max_chains=max_chains)
    precision = "bfloat16" if torch.cuda.is_available() else "float32"
    loaded = load_causal(model, student, precision)
    return {"model": model, **_evaluate(loaded, student, data, wanted, None, None, generate)}


def _evaluate(
    model: Any,
    student: StudentConfig,
    data: DataConfig,
    wanted: EvalConfig,
    kept: Path | None,
    chunk_tokens: int | None,
    generate: GenerateConfig | None,
) -> Json:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(prefix="student-train-eval-") as temp:
        request = eval_request(data, wanted)
        path = Path(temp) / "heldout.selection.parquet"
        if kept is not None:
            path = kept_or_temporary(kept, request, Path(temp))
        selection = open_data(path, request, data, student)
        vocabulary = check_vocabulary(student, selection, [cache.path for cache in data.caches])
        widen_vocab(model, vocabulary.num_ids)
        fuse_head(model)
        metrics_of = student_metrics(Student(model, chunk_tokens).to(device))
        result = evaluate(metrics_of, selection, eval_spec(data), Ranks(0, 1, device))
        answers = None
        if generate is not None:
            answers = _answers(model, student, data, selection, wanted.where, generate)
    return {"where": wanted.where, **result.model_dump(), "generation": answers}


def _answers(
    model: Any, student: StudentConfig, data: DataConfig, selection: Selection, where: str, config: GenerateConfig
) -> Json:
    # Evaluation on packs may have replaced the attention.
    model.set_attn_implementation(student.attention)
    tokenizer = cache_tokenizer(student, selection, None)
    adopt_tokens(model, tokenizer)
    text = HuggingFaceText(tokenizer, selection.header.vocab_size) if selection.is_text else None
    pinned = [
        cache.model_copy(update={"root": str(source.path)})
        for cache, source in zip(selection.header.caches, data.caches, strict=True)
    ]
    prompts = heldout_prompts(pinned, where, config.num_prompts, text)
    return generate_and_judge(model, tokenizer, prompts, config).model_dump()
