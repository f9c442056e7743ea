"""What a planned run reads and needs: `student-train plan`, which loads no model and refuses what the run would refuse.

Out: counts of every stage (chains, tokens, packs, steps) and an estimate of the memory that one rank needs.
"""

import contextlib
import shutil
import tempfile
from pathlib import Path

from stillroom.config import Json
from stillroom.errors import CacheConflict
from student_train.config.run import CPU_CHUNK_TOKENS, GPU_CHUNK_TOKENS, EngineConfig, TrainConfig
from student_train.config.stage import LoraConfig, StageConfig
from student_train.data.features import StageFeatures
from student_train.data.selection import SelectionHeader
from student_train.losses.below import AttentionKL, ProjectedLoss
from student_train.losses.divergences import Divergence, FeatureLoss, Loss
from student_train.model.prune import cut_words
from student_train.model.shape import ModelShape, model_shape
from student_train.planning.plan import StagePlan, prepare
from student_train.runtime.checkpoint import latest_state
from student_train.runtime.metrics_log import require_tensorboard
from student_train.runtime.run_folder import RunFolder
from student_train.schedule import temperature_steps

GIB = 2**30
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
COPY_BYTES, MOMENT_BYTES, GRADIENT_BYTES = 4, 8, 4
"""Per trained weight: the optimizer's float32 copy, its two moments, and the float32 gradient of its step."""
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's reduce_bucket_size: ZeRO's buffer of gradients to reduce has this size for the smallest model too."""
LIBRARIES_BYTES = 0.75 * GIB
"""Of a training process on a CPU: torch, transformers, DeepSpeed."""
ACTIVATIONS_PER_LAYER = 34
"""Values of hidden width that a layer keeps a token for its backward pass (arXiv 2205.05198, table 2)."""


def plan_run(config: TrainConfig, num_ranks: int) -> Json:
    """Counts of the selection that the run has frozen, or would freeze, and an estimate of its memory.

    Raises ConfigError, DataError and CorruptError for everything that the run would refuse before it loads a model.
    """
    if config.tensorboard:
        require_tensorboard()
    run = RunFolder(config.run)
    if latest_state(run.checkpoints) is not None:
        run.refuse_other_meaning(config)
    with tempfile.TemporaryDirectory(prefix="student-train-plan-") as temp, contextlib.ExitStack() as held:
        folder = config.run if run.has_frozen(config) else _folder_of_plan(config, run, Path(temp), held)
        plan = prepare(
            config,
            folder,
            num_ranks,
            is_first=True,
            # A plan is one process, whatever the number of ranks it is for.
            barrier=lambda: None,
            spare=Path(temp) if folder == config.run else None,
        )
        shape = model_shape(config.student)
        stages = [_stage(stage, config, shape, plan.vocabulary.num_ids, num_ranks) for stage in plan.stages]
        heldout = plan.heldout
        return {
            "run": str(config.run),
            "num_ranks": num_ranks,
            "num_parameters": shape.num_parameters,
            "notes": [*plan.vocabulary.notes, *_notes_on_heads(config, shape), *_notes_on_prunes(config)],
            "stages": stages,
            "num_steps": plan.num_steps,
            "heldout_chains": 0 if heldout is None else heldout.header.num_chains,
            "heldout_tokens": 0 if heldout is None else heldout.header.num_tokens,
        }


def _folder_of_plan(config: TrainConfig, run: RunFolder, temp: Path, held: contextlib.ExitStack) -> Path:
    """Where selections of a run that has frozen none go: to `temp`, but retokenised ones where the run finds them.

    The run's folder is locked until `held` closes. Where another process has it, or it cannot be written, `temp` it is.
    """
    if config.data.kind == "distributions":
        return temp
    # Projecting a large cache takes hours: the run must find what its plan has made.
    try:
        held.enter_context(run.lock())
    except (CacheConflict, OSError):
        return temp
    run.plan_folder.mkdir(exist_ok=True)
    # The caches may have grown since the last plan. Files of retokenised chains say themselves what they were made of.
    for file in run.plan_folder.iterdir():
        if file.is_file():
            file.unlink()
    return run.plan_folder


def _stage(stage: StagePlan, config: TrainConfig, shape: ModelShape, num_ids: int, num_ranks: int) -> Json:
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
        "projection": None if header.projection is None else header.projection.model_dump(),
        "prepared": None if header.prepared is None else header.prepared.model_dump(),
        "num_negative": _num_negative(stage),
        "num_own_chains": None if stage.attached.behaviour is None else stage.attached.behaviour.num_known_chains(),
        "num_examples": None if stage.selection.examples is None else len(stage.selection.examples.row_E),
        "num_packed_tokens": packed_tokens,
        "terms": None if (terms := stage.attached.terms) is None else {**terms.found, "weight": terms.weight},
        "num_left_out": header.num_zero_weight + header.num_empty,
        "num_truncated": counts.num_truncated,
        "num_skipped": counts.num_skipped,
        "num_split": counts.num_split,
        "num_tokens_lost": counts.num_tokens_lost,
        "packs_per_epoch": packs,
        "pack_fill": packed_tokens / (packs * config.data.pack_tokens) if packs else None,
        "packs_per_step": stage.packs_per_step,
        "accumulation": stage.accumulation,
        # The last step of an epoch is counted whole, although the next epoch fills it.
        "steps_per_epoch": -(-packs // stage.packs_per_step),
        "num_steps": stage.num_steps,
        "losses": {term.name: _targets_of(term, header, stage.features) for term in stage.mix.all},
        "temperatures": _temperatures(stage),
        "features": None if stage.features is None else _features(stage.features),
        "trainable": stage.config.trainable,
        "adversarial": None if (asked := stage.config.adversarial) is None else asked.model_dump(),
        "memory_gib_per_rank": _memory_gib(stage, config, shape, num_ids, num_ranks),
    }


def _num_negative(stage: StagePlan) -> int:
    """Chains to move away from."""
    header, is_negative_R = stage.selection.header, stage.attached.is_negative_R
    if stage.selection.has_pairs:
        return header.num_chains
    return 0 if is_negative_R is None else int(is_negative_R.sum())


def _temperatures(stage: StagePlan) -> list[tuple[int, float]]:
    """(first step, temperature) of each run of equal temperatures; both ends of a schedule that is followed exactly."""
    if not stage.mix.is_exact:
        return temperature_steps(stage.config, stage.selection.header.temperatures, stage.num_steps)
    # Exact losses take every temperature of a schedule, another one at each step.
    found = temperature_steps(stage.config, None, stage.num_steps)
    return found if len(found) <= 2 else [found[0], found[-1]]


def _features(features: StageFeatures) -> Json:
    """The sets that a stage reads, and how many of its chains they hold."""
    sets = [one.set_id for one in features.sets if one is not None]
    return {"sets": sets, "num_chains": features.num_chains}


def _targets_of(loss: Loss, header: SelectionHeader, features: StageFeatures | None) -> str:
    """What a loss compares the student with on each token, as far as this selection's shards hold it."""
    if isinstance(loss, FeatureLoss):
        assert features is not None
        return _layers_of(loss, features)
    if loss.needs_hidden:
        return "the teacher's whole distribution, from its last hidden states"
    if loss.needs_chunks:
        return "the teacher's log probability of each chunk of text"
    if loss.needs_behaviour:
        return "the token's log probability under the teacher and under the student that generated it"
    if loss.needs_pairs:
        return "which chain of a pair is right"
    if not isinstance(loss, Divergence):
        return "the teacher's most likely token" if loss.needs_distribution else "the next token"
    entries = f"at most {header.max_support} stored entries a token"
    if loss.tail in ("drop", "renormalise"):
        return f"{entries} only"
    if loss.tail == "bucket" or not header.draws:
        return f"{entries}, all others in one bucket"
    if not loss.estimates_tail:
        return f"{entries} and the distinct ones of {header.draws} drawn ids, all others in one bucket"
    return f"{entries}, the tail estimated from {header.draws} draws"


def _layers_of(loss: FeatureLoss, features: StageFeatures) -> str:
    """`layers 6 → 2 and 12 → 4, through a learned projection`: of the teacher and of the student."""
    pairs = ", ".join(f"{teacher} → {student}" for teacher, student in loss.layers or ())
    if isinstance(loss, AttentionKL):
        num_heads = sum(len(features.attention[teacher]) for teacher, _ in loss.layers or ())
        return f"the attention of {num_heads} of the teacher's heads, layers from 0: {pairs}"
    projected = isinstance(loss, ProjectedLoss) and loss.project
    return f"the teacher's states after layers: {pairs}{', through learned projections' if projected else ''}"


def _memory_gib(planned: StagePlan, config: TrainConfig, shape: ModelShape, num_ids: int, num_ranks: int) -> Json:
    """Estimate by part: weights, gradients, optimizer, activations of one pack, logits of one chunk, teacher's head,
    ZeRO's bucket, and what the optimizer's step needs beyond the room of these four. `offloaded` lies in CPU memory.
    """
    stage, engine, is_cpu = planned.config, config.engine, _is_cpu()
    width = WEIGHT_BYTES[engine.precision]
    num_ends = shape.num_head * (1 if shape.has_tied_head else 2)
    trained = {
        "all": shape.num_parameters,
        "head": shape.num_head,
        "body": shape.num_parameters - num_ends,
        "lora": _lora_size(stage, shape.linear_widths),
    }[stage.trainable]
    # Adapters are weights besides the model; all other choices train what is there.
    extra = trained if stage.trainable == "lora" else 0
    num_projected = _num_projected(planned, shape)
    trained, extra = trained + num_projected, extra + num_projected
    kept = 2 if engine.gradient_checkpointing else ACTIVATIONS_PER_LAYER
    # A frozen decoder keeps no activations; a tied head trains the embeddings, so gradients pass all layers.
    layers = 1 if stage.trainable == "head" and not shape.has_tied_head else shape.num_layers
    # A run shows the memory of the whole process on a CPU, of tensors alone on a GPU.
    lasting = ({"libraries": LIBRARIES_BYTES} if is_cpu else {}) | {
        "weights": (shape.num_parameters + extra) * width / (num_ranks if engine.zero_stage == 3 else 1),
        "gradients": trained * width / (num_ranks if engine.zero_stage >= 2 else 1),
    }
    passing = {
        "activations": config.data.pack_tokens * shape.hidden_size * width * kept * layers,
        # float32, and a second buffer for half precision, capped logits or another temperature (head_chunks.py).
        "logits": _chunk_tokens(engine) * num_ids * 4 * 2,
    }
    if planned.features is not None and planned.features.with_hidden:
        # Its head, and the gradient of a chunk besides the buffers above.
        passing["teacher"] = num_ids * (planned.features.first.hidden_size * width + _chunk_tokens(engine) * 4)
    if engine.zero_stage >= 1 and not engine.needs_no_zero(num_ranks, is_cpu=is_cpu):
        # Of a CPU's memory only what is written counts.
        num_bucket = min(trained, BUCKET_ELEMENTS) if is_cpu else BUCKET_ELEMENTS
        passing["bucket"] = num_bucket * width
    optimizer, step = optimizer_bytes(engine, trained, num_ranks, is_cpu=is_cpu)
    offloaded = 0.0
    if engine.offload_parameters:
        offloaded += lasting.pop("weights")
    if engine.offload_optimizer:
        offloaded += optimizer + trained * GRADIENT_BYTES / num_ranks
    else:
        # The step comes when the backward pass has freed its own.
        lasting |= {"optimizer": optimizer, "step": max(0.0, step - sum(passing.values()))}
    parts = lasting | passing
    sizes = {**parts, "total": sum(parts.values())} | ({"offloaded": offloaded} if offloaded else {})
    return {name: size / GIB for name, size in sizes.items()}


def optimizer_bytes(engine: EngineConfig, num_trained: int, num_ranks: int, *, is_cpu: bool) -> tuple[float, float]:
    """What AdamW keeps on a rank, and what its step adds to the gradients."""
    if engine.zero_stage == 0 or engine.needs_no_zero(num_ranks, is_cpu=is_cpu):
        # In float32 it steps on the weights and their gradients themselves.
        kept, added = (
            (MOMENT_BYTES, 0) if engine.precision == "float32" else (COPY_BYTES + MOMENT_BYTES, GRADIENT_BYTES)
        )
        return num_trained * kept, num_trained * added
    # ZeRO frees the gradients of the backward pass before it steps on the shard's float32 ones.
    freed = WEIGHT_BYTES[engine.precision] / (1 if engine.zero_stage == 1 else num_ranks)
    added_bytes = max(0.0, GRADIENT_BYTES / num_ranks - freed)
    return num_trained * (COPY_BYTES + MOMENT_BYTES) / num_ranks, num_trained * added_bytes


def _num_projected(planned: StagePlan, shape: ModelShape) -> int:
    """Weights of the learned maps from the student's states to the teacher's."""
    if planned.features is None:
        return 0
    losses = [term for term in planned.mix.features if isinstance(term, ProjectedLoss) and term.project]
    pairs = {pair for term in losses for pair in term.layers or ()}
    return len(pairs) * shape.hidden_size * planned.features.first.hidden_size


def _notes_on_heads(config: TrainConfig, shape: ModelShape) -> list[str]:
    names = [stage.name for stage in config.stages if stage.trainable == "head"]
    if not (names and shape.has_tied_head):
        return []
    tied = f"the head of {config.student.model} is tied to its embeddings: stage {' and '.join(names)} trains both"
    return [f"{tied} and backpropagates through all layers"]


def _notes_on_prunes(config: TrainConfig) -> list[str]:
    return [
        f"stage {stage.name} first prunes the model to {cut_words(stage.prune)}; its memory is that of the whole model"
        for stage in config.stages
        if stage.prune is not None
    ]


def _chunk_tokens(engine: EngineConfig) -> int:
    if engine.chunk_tokens is not None:
        return engine.chunk_tokens
    return CPU_CHUNK_TOKENS if _is_cpu() else GPU_CHUNK_TOKENS


def _is_cpu() -> bool:
    # torch would know, and take seconds to import.
    return shutil.which("nvidia-smi") is None


def _lora_size(stage: StageConfig, linears: dict[str, int]) -> int:
    """Weights of the adapters: r times (inputs + outputs) of each linear layer that gets one."""
    lora = stage.lora or LoraConfig()
    chosen = [
        width
        for name, width in linears.items()
        if lora.targets is None or any(name == one or name.endswith(f".{one}") for one in lora.targets)
    ]
    return lora.r * sum(chosen)
