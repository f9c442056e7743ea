"""What a run would read and cost, before it does: `student-train plan`. Loads no model; refuses what the run would
refuse."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from shared.config import Json
from student_train.checkpoint import latest_state
from student_train.config import EngineConfig, StudentConfig, TrainConfig
from student_train.losses.divergences import LossTerm
from student_train.metrics_log import require_tensorboard
from student_train.model import meta_causal
from student_train.prepare import StagePlan, prepare
from student_train.runfolder import RunFolder
from student_train.schedule import temperature_steps
from student_train.stage_config import LoraConfig, StageConfig
from student_train.streaming.data import eval_request
from student_train.streaming.heldout import kept_or_temporary
from student_train.streaming.selection import SelectionHeader

GIB = 2**30
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ADAM_BYTES = 12
"""A trained weight's float32 copy and its two moments."""
ACTIVATIONS_PER_LAYER = 34
"""Values of hidden width that a layer keeps a token for its backward pass (arXiv 2205.05198, table 2)."""


@dataclass(frozen=True)
class _Shape:
    num_parameters: int
    num_head: int
    linear_widths: dict[str, int]
    """Inputs plus outputs of each linear layer of the decoder, by name."""
    num_layers: int
    hidden_size: int
    vocab_size: int
    has_tied_head: bool


def plan_run(config: TrainConfig, num_ranks: int) -> Json:
    """Counts of the selection that the run has frozen, or would freeze, and an estimate of its memory.

    Raises ConfigError, DataError and CorruptError for everything that the run would refuse before it loads a model.
    """
    if config.tensorboard:
        require_tensorboard()
    run = RunFolder(config.run)
    if latest_state(run.checkpoints) is not None:
        run.refuse_other_meaning(config)
    with tempfile.TemporaryDirectory(prefix="student-train-plan-") as temp:
        wanted = None if config.eval is None else eval_request(config.data, config.eval)
        folder = config.run if run.has_frozen(config) else Path(temp)
        plan = prepare(
            config,
            folder,
            num_ranks,
            is_first=True,
            barrier=lambda: None,
            heldout_path=kept_or_temporary(RunFolder(folder).heldout_path, wanted, Path(temp)),
        )
        shape = _shape(config.student, plan.vocabulary.num_ids)
        stages = [_stage(stage, config, shape, num_ranks) for stage in plan.stages]
        heldout = plan.heldout
        return {
            "run": str(config.run),
            "num_ranks": num_ranks,
            "num_parameters": shape.num_parameters,
            "notes": [*plan.vocabulary.notes, *_notes_on_heads(config, shape)],
            "stages": stages,
            "num_steps": plan.num_steps,
            "heldout_chains": 0 if heldout is None else heldout.header.num_chains,
            "heldout_tokens": 0 if heldout is None else heldout.header.num_tokens,
        }


def _stage(stage: StagePlan, config: TrainConfig, shape: _Shape, num_ranks: int) -> Json:
    header = stage.selection.header
    with stage.stream(0, num_ranks) as stream:
        plans = stream.plans
        counts = plans.counts
        packs = plans.num_packs(0)
        packed_tokens = int(plans.pieces.num_tokens_P[plans.plan(0).items_I].sum(dtype="int64"))
    return {
        "name": stage.config.name,
        "where": header.where,
        "num_chains": header.num_chains,
        "num_prompt_tokens": header.num_prompt_tokens,
        "num_tokens": header.num_tokens,
        "is_text": stage.selection.is_text,
        "num_left_out": header.num_zero_weight + header.num_empty,
        "num_truncated": counts.num_truncated,
        "num_skipped": counts.num_skipped,
        "num_split": counts.num_split,
        "num_tokens_lost": counts.num_tokens_lost,
        "packs_per_epoch": packs,
        "pack_fill": packed_tokens / (packs * config.data.pack_tokens) if packs else None,
        "packs_per_step": stage.packs_per_step,
        "accumulation": stage.accumulation,
        "steps_per_epoch": -(-packs // stage.packs_per_step),
        "num_steps": stage.num_steps,
        "losses": {term.name: _targets_of(term, header) for term in stage.mix.terms},
        "temperatures": temperature_steps(stage.config, header.temperatures, stage.num_steps),
        "trainable": stage.config.trainable,
        "memory_gib_per_rank": _memory_gib(stage.config, config, shape, num_ranks),
    }


def _targets_of(term: LossTerm, header: SelectionHeader) -> str:
    """What a loss compares the student with on each token, as far as this selection's shards hold it."""
    if term.is_cross_entropy:
        return "the teacher's most likely token" if term.needs_distribution else "the next token"
    entries = f"at most {header.max_support} stored entries a token"
    if term.estimates_tail and header.draws:
        return f"{entries}, the tail estimated from {header.draws} draws"
    if term.splits_tail and header.draws:
        return f"{entries} and the distinct ones of {header.draws} drawn ids, all others in one bucket"
    return f"{entries}, all others in one bucket" if term.needs_tail else f"{entries} alone"


def _memory_gib(stage: StageConfig, config: TrainConfig, shape: _Shape, num_ranks: int) -> Json:
    """Estimate by part: weights, gradients, optimizer, activations of one pack, logits of one chunk."""
    engine = config.engine
    width = WEIGHT_BYTES[engine.precision]
    trained = {"all": shape.num_parameters, "head": shape.num_head, "lora": _lora_size(stage, shape.linear_widths)}[
        stage.trainable
    ]
    extra = trained if stage.trainable == "lora" else 0
    kept = 2 if engine.gradient_checkpointing else ACTIVATIONS_PER_LAYER
    layers = 1 if stage.trainable == "head" and not shape.has_tied_head else shape.num_layers
    parts = {
        "weights": (shape.num_parameters + extra) * width / (num_ranks if engine.zero_stage == 3 else 1),
        "gradients": trained * width / (num_ranks if engine.zero_stage >= 2 else 1),
        "optimizer": trained * ADAM_BYTES / (num_ranks if engine.zero_stage >= 1 else 1),
        "activations": config.data.pack_tokens * shape.hidden_size * width * kept * layers,
        "logits": _chunk_tokens(engine) * shape.vocab_size * 4 * 2,
    }
    return {**{name: size / GIB for name, size in parts.items()}, "total": sum(parts.values()) / GIB}


def _notes_on_heads(config: TrainConfig, shape: _Shape) -> list[str]:
    names = [stage.name for stage in config.stages if stage.trainable == "head"]
    if not (names and shape.has_tied_head):
        return []
    said = f"the head of {config.student.model} is its embeddings too (tied): stage {' and '.join(names)} trains both"
    return [f"{said}, and its gradient passes through all layers"]


def _chunk_tokens(engine: EngineConfig) -> int:
    return engine.chunk_tokens if engine.chunk_tokens is not None else 1024


def _lora_size(stage: StageConfig, linears: dict[str, int]) -> int:
    """Weights of the adapters: r times (inputs + outputs) of each linear layer that gets one."""
    lora = stage.lora or LoraConfig()
    chosen = [
        width
        for name, width in linears.items()
        if lora.targets is None or any(name == one or name.endswith(f".{one}") for one in lora.targets)
    ]
    return lora.r * sum(chosen)


def _shape(student: StudentConfig, vocab_size: int) -> _Shape:
    """Sizes of the student out of its config.json."""
    import torch

    model = meta_causal(student)
    return _Shape(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_head=sum(parameter.numel() for parameter in model.get_output_embeddings().parameters()),
        linear_widths={
            name: module.in_features + module.out_features
            for name, module in model.get_decoder().named_modules()
            if isinstance(module, torch.nn.Linear)
        },
        num_layers=int(model.config.num_hidden_layers),
        hidden_size=int(model.config.hidden_size),
        vocab_size=vocab_size,
        has_tied_head=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
    )
