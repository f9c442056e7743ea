"""DeepSpeed around a student: distribution, ZeRO, optimizer step, saved state. The only file that imports deepspeed.

In: a Student and settings. Out: `Engine`, whose gradients are those of the *sum* of losses over all ranks and
micro-steps, divided by a number that the caller chooses.

DeepSpeed averages gradients over ranks and, in `backward`, over micro-steps. Here `backward` is told not to divide by
the accumulation, and each rank's loss is multiplied by the number of ranks, so mean over ranks = sum over ranks.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from stillroom.errors import ConfigError, CorruptError, StillroomError, first_line
from student_train.config.run import EngineConfig
from student_train.config.stage import AdversarialConfig, StageConfig
from student_train.data.pack import TorchPack
from student_train.losses.balance import BALANCE
from student_train.losses.fused_head import LossSums, TokenSlots
from student_train.losses.metrics import TokenMetrics
from student_train.losses.mix import LossMix
from student_train.model.adversarial import disturb
from student_train.model.student import Student
from student_train.runtime.one_rank import OneRank
from student_train.runtime.ranks import Ranks

ADAM_EPS = 1e-8
FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class _SkippableAdamW(torch.optim.AdamW):
    """AdamW whose step can be skipped where DeepSpeed adds no wrapper that would: it reads `overflow` of either."""

    overflow = False

    def step(self, closure: Any = None) -> Any:
        return None if self.overflow else super().step(closure)


class Engine:
    """A student under DeepSpeed for one stage. All ranks call every method together."""

    def __init__(
        self,
        student: Student,
        stage: StageConfig,
        config: EngineConfig,
        ranks: Ranks,
        accumulation: int,
        *,
        universal: bool,
    ) -> None:
        """Spreads the student over the ranks; `universal` if a universal state will be loaded."""
        self._ranks = ranks
        self._student = student
        self._has_parted_weights = config.zero_stage == 3
        self._clip_norm = stage.clip_norm
        # There DeepSpeed neither computes a gradient norm nor skips a step that is not finite: both are done here.
        self._is_plain = config.zero_stage == 0 and config.precision == "float32"
        self._own_norm: Tensor | None = None
        with _quiet():
            import deepspeed

            _import_muon_uncompiled()
            _refuse_precision(config.precision, deepspeed.accelerator.get_accelerator())
            self._adam = _SkippableAdamW(
                _parameter_groups(student, stage.weight_decay),
                lr=stage.learning_rate,
                betas=(stage.beta1, stage.beta2),
                eps=ADAM_EPS,
                # One pass over memory instead of a dozen.
                fused=True,
            )
            self._deepspeed, *_ = deepspeed.initialize(
                model=student,
                optimizer=self._adam,
                config=deepspeed_config(stage, config, ranks.num_ranks, accumulation, universal=universal),
                # joined_ranks has done that.
                dist_init_required=False,
            )
        if config.zero_stage == 0 and config.precision != "float32":
            # DeepSpeed creates Adam's moments with a step on zero gradients, which bias correction would count.
            self._deepspeed.optimizer.optimizer.state.clear()
        self._one_rank: OneRank | None = None
        self._divisor = 1.0
        if config.needs_no_zero(ranks.num_ranks, is_cpu=ranks.device.type == "cpu"):
            self._one_rank = OneRank(self._deepspeed.optimizer, self._adam, stage.clip_norm)

    def loss(self, pack: TorchPack, mix: LossMix) -> LossSums:
        """Sums of one pack's losses, with gradient."""
        if self._one_rank is not None:
            return LossSums(*self._student(pack, mix))
        return LossSums(*self._deepspeed(pack, mix))

    def disturbed(self, pack: TorchPack, mix: LossMix, config: AdversarialConfig) -> tuple[TorchPack, Tensor]:
        """The pack with a shift of its prompts that raises its losses, and the sum of these before."""

        # Past DeepSpeed's engine, which would take the gradient of a shift for that of a micro-step; the hooks by which
        # ZeRO-3 gathers weights are the modules' own.
        def loss_of(one: TorchPack) -> Tensor:
            return LossSums(*self._student(one, mix)).loss_sum

        return disturb(pack, loss_of, self._student.embedding_width, config)

    @torch.no_grad()
    def metrics(self, pack: TorchPack) -> TokenMetrics:
        """Metrics of one pack's loss tokens, without dropout."""
        self._deepspeed.eval()
        values = self._deepspeed(pack)
        self._deepspeed.train()
        return TokenMetrics(*values)

    @torch.no_grad()
    def slots(self, pack: TorchPack) -> TokenSlots:
        """Log probabilities of one pack's loss tokens at the ids of its targets, without dropout."""
        self._deepspeed.eval()
        values = self._deepspeed(pack, None, True)
        self._deepspeed.train()
        return TokenSlots(*values)

    def backward(self, loss_sum: Tensor, total_weight: float, *, is_last: bool) -> None:
        """Adds the gradient of loss_sum / total_weight, which is the same for all micro-steps before a `step`;
        `is_last` marks the last of them.
        """
        if self._one_rank is not None:
            # Divided in `step`, with the factor that clips.
            self._divisor = total_weight
            loss_sum.backward()
            return
        self._deepspeed.set_gradient_accumulation_boundary(is_last)
        # DeepSpeed takes the mean over ranks; times their number it is the sum.
        self._deepspeed.backward(loss_sum * (self._ranks.num_ranks / total_weight), scale_wrt_gas=False)
        # DeepSpeed wants a step after every backward; off the boundary it only counts micro-steps.
        if not is_last:
            self._deepspeed.step()

    def step(self, learning_rate: float) -> bool:
        """Clips and applies the accumulated gradient; False if it was not finite and the step was skipped.

        Raises StillroomError if float16 overflows at the smallest loss scale.
        """
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        if self._one_rank is not None:
            self._own_norm = self._one_rank.step(self._divisor)
            return bool(self._own_norm.isfinite())
        skipped_before = int(self._deepspeed.skipped_steps)
        self._own_norm = self._norm_without_zero()
        self._adam.overflow = self._own_norm is not None and not bool(self._own_norm.isfinite())
        try:
            self._deepspeed.step()
        except Exception as error:
            # DeepSpeed raises no narrower type.
            if "loss scale already at minimum" not in str(error):
                raise
            raise StillroomError(
                "float16 overflows even at the smallest loss scale: set engine.precision to bfloat16 or float32"
            ) from error
        return int(self._deepspeed.skipped_steps) == skipped_before

    def is_finite(self) -> bool:
        """Whether this rank's trained weights and AdamW's copies and moments of them are finite."""
        trained: list[Any] = [parameter for parameter in self._student.parameters() if parameter.requires_grad]
        # Under ZeRO-3 a parameter outside its forward is empty and DeepSpeed's attribute holds this rank's part.
        weights = [one.ds_tensor for one in trained] if self._has_parted_weights else trained
        moments = [one for state in self._adam.state.values() for one in state.values()]
        return all(_is_finite(tensor) for tensor in [*weights, *self._adam.state, *moments])

    @property
    def balance_weight(self) -> dict[str, float]:
        """Weight of the balance loss by its name, the last of the losses of a pack; empty without one."""
        return {} if self._student.balance is None else {BALANCE: self._student.balance.weight}

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping."""
        return float(self._deepspeed.get_global_grad_norm() if self._own_norm is None else self._own_norm)

    def _norm_without_zero(self) -> Tensor | None:
        """Gradient norm under ZeRO 0 in float32, where DeepSpeed computes none."""
        if not self._is_plain:
            return None
        grads = [parameter.grad for parameter in self._student.parameters() if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(grads)

    def save(self, folder: Path, tag: str) -> None:
        """Writes trained weights and optimizer state to `folder/tag`; frozen weights stay in the model's folder."""
        with _quiet():
            self._deepspeed.save_checkpoint(
                str(folder), tag=tag, client_state=_universal_info(), save_latest=False, exclude_frozen_parameters=True
            )

    def load(self, folder: Path, tag: str) -> None:
        """Loads what `save` wrote. Raises CorruptError for files with more than tensors and plain values."""
        with _quiet(), _tensors_only(folder / tag):
            # Not strict: frozen weights are not in the file.
            path, _ = self._deepspeed.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
        assert path is not None
        # DeepSpeed loads the saved limit too, but a run may resume with another.
        self._deepspeed.optimizer.clip_grad = self._clip_norm or 0.0

    def close(self) -> None:
        """Frees DeepSpeed's memory; the engine cannot be used afterwards."""
        self._deepspeed.destroy()


def _is_finite(tensor: Tensor) -> bool:
    # Extremes rather than isfinite(): they need no memory of the tensor's size.
    return tensor.numel() == 0 or bool(torch.stack(tensor.detach().aminmax()).isfinite().all())


def _refuse_precision(precision: str, accelerator: Any) -> None:
    """Raises ConfigError if the machine's accelerator does not support the precision."""
    supported = {
        "float32": True,
        "bfloat16": accelerator.is_bf16_supported(),
        "float16": accelerator.is_fp16_supported(),
    }
    if not supported[precision]:
        possible = ", ".join(name for name, has in supported.items() if has)
        raise ConfigError(
            f"engine.precision={precision} is not supported on this {accelerator.device_name()}: choose {possible}"
        )


def deepspeed_config(
    stage: StageConfig, config: EngineConfig, num_ranks: int, accumulation: int, *, universal: bool
) -> dict[str, Any]:
    """DeepSpeed's own configuration, without an optimizer block: its "AdamW" compiles an operator even on a CPU."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        # A pack is one sequence, [1, L].
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": accumulation * num_ranks,
        "gradient_clipping": stage.clip_norm or 0.0,
        "bf16": {"enabled": config.precision == "bfloat16"},
        "fp16": {"enabled": config.precision == "float16"},
        "zero_optimization": zero,
        # DeepSpeed counts only optimizers of its own as tested; ours is torch's.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": universal},
        # DeepSpeed itself prints nothing.
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def make_universal(source: Path, target: Path) -> None:
    """Converts a saved ZeRO state to DeepSpeed's universal form, which any number of ranks can load.

    Called by one rank. Raises CorruptError as `Engine.load` does.
    """
    from argparse import Namespace

    with _quiet(), _tensors_only(source):
        from deepspeed.checkpoint import ds_to_universal

        ds_to_universal.main(
            Namespace(
                input_folder=str(source),
                output_folder=str(target),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=False,
            )
        )


def saved_weights(folder: Path, tag: str, zero_stage: int) -> dict[str, Tensor]:
    """Trained weights of a saved state in CPU memory, by parameter name of the Hugging Face (or peft) model.

    Raises CorruptError as `Engine.load` does.
    """
    with _quiet(), _tensors_only(folder / tag):
        if zero_stage == 3:
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            state = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=tag, exclude_frozen_parameters=True)
        else:
            path = folder / tag / "mp_rank_00_model_states.pt"
            state = torch.load(path, map_location="cpu", weights_only=True)["module"]
    # `Student` holds the Hugging Face model in its attribute `model`, and projections beside it.
    return {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}


def _import_muon_uncompiled() -> None:
    """Imports DeepSpeed's Muon without compiling it.

    ZeRO asks of every optimizer whether it is Muon, whose module decorates functions with `torch.compile`; that alone
    imports the whole of torch._inductor, 1.5 CPU seconds of every start.
    """
    compiled = torch.compile
    torch.compile = lambda model=None, **_: model
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        torch.compile = compiled


def _parameter_groups(student: Student, weight_decay: float) -> list[dict[str, Any]]:
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if not weight_decay:
        return [{"params": trained, "weight_decay": 0.0}]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        # Biases and norms: decay would pull scales towards 0.
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def _universal_info() -> dict[str, Any]:
    from deepspeed.checkpoint.constants import (
        UNIVERSAL_CHECKPOINT_INFO,
        UNIVERSAL_CHECKPOINT_VERSION_KEY,
        UNIVERSAL_CHECKPOINT_VERSION_VALUE,
    )

    # ds_to_universal refuses a state without a version.
    return {UNIVERSAL_CHECKPOINT_INFO: {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}}


@contextlib.contextmanager
def _tensors_only(folder: Path) -> Iterator[None]:
    """Lets DeepSpeed load only tensors, plain values and four small classes of its own.

    DeepSpeed asks torch for unrestricted pickle, so a checkpoint from elsewhere could run any code; an environment
    variable of torch overrides that. Raises CorruptError, naming `folder`, for a file that holds anything else.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(FORCE_WEIGHTS_ONLY)
    os.environ[FORCE_WEIGHTS_ONLY] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    except UnpicklingError as error:
        raise CorruptError(
            f"{folder} holds more than tensors, so it is not loaded (it could run code): {first_line(error)}"
        ) from error
    finally:
        if before is None:
            del os.environ[FORCE_WEIGHTS_ONLY]
        else:
            os.environ[FORCE_WEIGHTS_ONLY] = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides DeepSpeed's greetings, deprecation warnings and progress bars, but not its errors."""
    greetings = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(greetings), contextlib.redirect_stderr(greetings):
        warnings.simplefilter("ignore")
        import deepspeed  # noqa: F401 - its logger exists from here on

        logger = logging.getLogger("DeepSpeed")
        logger.setLevel(logging.ERROR)
        for handler in logger.handlers:
            # Its handler writes to stdout, which belongs to results.
            if type(handler) is logging.StreamHandler:
                handler.setStream(sys.__stderr__)
        yield
