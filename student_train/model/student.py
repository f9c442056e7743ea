"""The student as one module, which DeepSpeed wraps: its forward returns losses or metrics of a pack, never logits.

In: a Hugging Face folder. Out: `Student`, a decoder whose head is fused with the losses. All weights are trained, the
head alone, all but head and embeddings, or LoRA adapters; with losses below the head also their projections to the
teacher's width. The head is called inside this module's forward, so ZeRO-3 gathers its weight.

    L tokens of a pack, N loss tokens, H hidden, J terms of a mix
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from stillroom.errors import ConfigError, DataError, one_line
from stillroom.models import hush_hub, require_model_folder_or_id, unreachable
from student_train.config.run import EngineConfig, StudentConfig
from student_train.config.stage import LoraConfig, StageConfig
from student_train.data.pack import TorchPack
from student_train.losses.balance import RouterBalance, find_balance
from student_train.losses.divergences import FeatureLoss
from student_train.losses.features import feature_sums
from student_train.losses.fused_head import LossSums, fuse_head, head_loss, head_metrics, head_slots
from student_train.losses.mix import LossMix
from student_train.model.adversarial import shifted
from student_train.model.packed_attention import Apart, hidden_states, keep_apart
from student_train.model.shape import balance_weight_of, tensor_shapes
from student_train.model.taps import LayerTaps, make_projections

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Student(torch.nn.Module):
    """A causal language model (`model`, with or without peft) that computes losses at chosen positions of a pack."""

    def __init__(
        self,
        model: Any,
        chunk_tokens: int | None = None,
        below: LossesBelow | None = None,
        balance: RouterBalance | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.balance = balance
        # Beside the model: exports are made of the model alone.
        self.projections = torch.nn.ModuleDict() if below is None else below.projections(self.causal)
        self._chunk_tokens = chunk_tokens
        self.apart = keep_apart(self.causal)
        # ZeRO-3 leaves weights without a shape.
        self.embedding_width = int(self.causal.get_input_embeddings().weight.shape[1])
        self._taps = None if below is None else LayerTaps(self.causal, self.apart, below.losses)
        self._decoder_learns = any(parameter.requires_grad for parameter in self.causal.get_decoder().parameters())

    @property
    def causal(self) -> Any:
        """The Hugging Face model without its peft wrapper."""
        # If there is an adapter, peft is imported already; importing it here would slow every other start by 0.3 s.
        peft = sys.modules.get("peft")
        return self.model.get_base_model() if peft and isinstance(self.model, peft.PeftModel) else self.model

    def forward(self, pack: TorchPack, mix: LossMix | None = None, as_slots: bool = False) -> tuple[Tensor, ...]:
        """LossSums with a mix, TokenMetrics without, TokenSlots on request, as plain tuples: module hooks rebuild
        outputs by their type.

        Each token sees its own document only. The hidden state at predict_positions_N[n] predicts target n. The balance
        loss of experts, if there is one, is the last of the terms.
        """
        causal = self.causal
        recorded = self._taps.open() if self._taps is not None and mix is not None else None
        balance = self.balance if mix is not None else None
        if balance is not None:
            balance.open()
        # A frozen decoder under a trained head keeps no activations, except to find a shift.
        needs_grad = self._decoder_learns or (pack.shift_LH is not None and pack.shift_LH.requires_grad)
        with torch.set_grad_enabled(torch.is_grad_enabled() and needs_grad), shifted(causal, pack.shift_LH):
            sink = recorded if recorded is not None and recorded.attention else None
            hidden_LH = hidden_states(
                causal, self.apart, pack.input_ids_1L, pack.position_ids_1L, pack.document_lengths, sink
            )
            # Only positions that predict a loss token reach the head: prompts cost no logits.
            hidden_NH = hidden_LH.index_select(0, pack.predict_positions_N)
        head = causal.get_output_embeddings()
        if mix is None and as_slots:
            return tuple(head_slots(head, hidden_NH, pack.targets, chunk_tokens=self._chunk_tokens))
        if mix is None:
            return tuple(head_metrics(head, hidden_NH, pack.targets, chunk_tokens=self._chunk_tokens))
        parts = []
        if mix.terms:
            parts.append(head_loss(head, hidden_NH, pack.targets, mix, chunk_tokens=self._chunk_tokens))
        if recorded is not None:
            assert self._taps is not None
            self._taps.close()
            assert pack.features is not None
            loss_sum, term_sums_J = feature_sums(
                mix.features, recorded, pack.features, pack.document_lengths, self.projections
            )
            parts.append(LossSums(loss_sum, term_sums_J, loss_sum.new_zeros(())))
        if balance is not None:
            parts.append(_balance_sums(balance, pack))
        return tuple(_joined(parts))


@dataclass(frozen=True)
class LossesBelow:
    """Losses below the head, with their layers named, and what their projections are made from."""

    losses: tuple[FeatureLoss, ...]
    teacher_width: int
    seed: int

    def projections(self, causal: Any) -> torch.nn.ModuleDict:
        """In the model's dtype."""
        made = make_projections(self.losses, causal.config.get_text_config().hidden_size, self.teacher_width, self.seed)
        return made.to(causal.get_input_embeddings().weight.dtype)


def _find_balance(model: Any, stage: StageConfig) -> RouterBalance | None:
    # A frozen decoder learns nothing from it.
    if stage.trainable == "head":
        return None
    return find_balance(model, balance_weight_of(model.config.to_dict()), stage.balance_weight)


def _joined(parts: list[LossSums]) -> LossSums:
    """Sums of losses on the head, below it and of experts; the first has the weight."""
    if len(parts) == 1:
        return parts[0]
    loss_sum = torch.stack([one.loss_sum for one in parts]).sum()
    return LossSums(loss_sum, torch.cat([one.term_sums_J for one in parts]), parts[0].weight_sum)


def _balance_sums(balance: RouterBalance, pack: TorchPack) -> LossSums:
    """The balance loss is a mean over a pack: times the pack's weight, packs of a batch average by their weight."""
    weights_N = pack.targets.weights_N
    pack_weight = float(pack.targets.num_tokens) if weights_N is None else weights_N.sum()
    balance_sum = balance.close() * pack_weight
    return LossSums(balance.weight * balance_sum, balance_sum.detach().view(1), balance_sum.new_zeros(()))


def load_student(
    student: StudentConfig,
    folder: str,
    stage: StageConfig,
    engine: EngineConfig,
    *,
    seed: int,
    vocab_size: int,
    below: LossesBelow | None = None,
) -> Student:
    """The model in `folder`, ready for the stage's training on ids below `vocab_size`.

    Raises ConfigError, DataError.
    """
    model = load_causal(folder, student, engine.precision)
    # Before fuse_head, because resizing makes a new plain head.
    widen_vocab(model, vocab_size)
    # Before peft: its wrapper then holds a FusedHead, and LoRA on the head is found around it.
    fuse_head(model)
    # Before Student, which may switch attention to a function that only packs can use.
    balance = _find_balance(model, stage)
    if stage.quantise is not None:
        from student_train.model.quantise import quantise_layers

        quantise_layers(model, stage.quantise)
    if engine.gradient_checkpointing:
        # The reentrant form needs an input that requires grad, which LoRA and a frozen embedding do not have.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if stage.trainable == "lora":
        # peft draws A from the global generator: all ranks must begin with the same adapter.
        torch.manual_seed(seed)
        model = add_lora(model, stage.lora or LoraConfig())
    elif stage.trainable == "head":
        model.requires_grad_(False)
        model.get_output_embeddings().requires_grad_(True)
    elif stage.trainable == "body":
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.requires_grad_(False)
    # from_pretrained returns models in evaluation mode, without dropout.
    model.train()
    made = Student(model, engine.chunk_tokens, below, balance)
    if made.apart is Apart.ONE_BY_ONE and engine.zero_stage == 3:
        raise ConfigError(
            f"{folder} has recurrent state, so each document of a pack is a separate forward pass, and ranks "
            "with different numbers of documents would deadlock under ZeRO 3: set engine.zero_stage to 2"
        )
    return made


def use_cpu_where_there_is_no_gpu() -> None:
    """Prepares this process for a machine without GPU; call it before the first model."""
    if torch.cuda.is_available():
        return
    # DeepSpeed, which transformers may import, would guess and print what it found.
    os.environ["DS_ACCELERATOR"] = "cpu"
    _use_huge_pages()
    _keep_freed_memory()


def _use_huge_pages() -> None:
    """Makes torch ask for pages of 2 MiB, which take fewer faults and fewer lookups, where the kernel offers them."""
    offered = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    # Where it does not, torch would warn.
    if offered.exists() and "[never]" not in offered.read_text(encoding="ascii"):
        # Read at the first tensor.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _keep_freed_memory() -> None:
    """Makes glibc reuse freed memory instead of returning it to the kernel.

    By default it maps a large tensor when it is made and unmaps it when it is freed. The kernel then zeroes every page
    again at its first use: 2.2 GB, and a quarter of all CPU seconds, in a step of a 57M student.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    # No mmap for large blocks, and no trim of the heap's top: both give pages back.
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)


def return_freed_memory() -> None:
    """Gives the kernel what `_keep_freed_memory` keeps: after a stage, whose holes the next one's flat buffers miss."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def load_causal(folder: str, student: StudentConfig, precision: str | None) -> Any:
    """Loads a Hugging Face causal language model into CPU memory; precision None keeps the stored one.

    Raises DataError, and ConfigError for an attention that the model lacks.
    """
    require_model_folder_or_id(folder)
    use_cpu_where_there_is_no_gpu()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    hush_hub()
    # A later stage's folder has no revisions.
    revision = student.revision if folder == student.model else None
    loader: Any = transformers.AutoModelForCausalLM
    try:
        model, report = loader.from_pretrained(
            folder,
            revision=revision,
            trust_remote_code=student.trust_remote_code,
            dtype="auto" if precision is None else DTYPES[precision],
            attn_implementation=student.attention,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if "does not support an attention implementation" in str(error):
            # transformers' own advice names an argument that nobody can pass here.
            raise ConfigError(f"{folder} cannot use student.attention: {student.attention}: set it to eager") from error
        if isinstance(error, ImportError) and student.attention == "flash_attention_2":
            raise ConfigError(
                f"student.attention: flash_attention_2 needs the package flash-attn and a GPU ({one_line(error)}): "
                "install it, or leave the setting out"
            ) from error
        if isinstance(error, OSError) and not Path(folder).is_dir():
            raise DataError(unreachable(folder, error)) from error
        # Names the file that is cut short, which transformers does not.
        tensor_shapes(Path(folder))
        raise DataError(
            f"{folder} is not a model that transformers can load: {' '.join(str(error).split())[:300]}"
        ) from error
    if report["missing_keys"]:
        names = ", ".join(sorted(report["missing_keys"])[:3])
        raise DataError(f"{folder} lacks {len(report['missing_keys'])} weights that its config asks for ({names}, ...)")
    return model


def meta_causal(student: StudentConfig) -> Any:
    """The student's modules and shapes without memory, from config.json alone. Raises DataError."""
    require_model_folder_or_id(student.model)
    use_cpu_where_there_is_no_gpu()
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            student.model, revision=student.revision, trust_remote_code=student.trust_remote_code
        )
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=student.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DataError(
            f"{student.model} has no config that transformers can load: {' '.join(str(error).split())}"
        ) from error


def widen_vocab(model: Any, vocab_size: int) -> int:
    """Pads the embeddings to `vocab_size` rows and returns how many were added.

    Related models pad their vocabularies differently. New rows are the mean of the others, to which a head gives
    ordinary logits.
    """
    old_size = model.get_input_embeddings().weight.shape[0]
    if old_size >= vocab_size:
        return 0
    # transformers' mean_resizing draws from a normal fitted to all rows; the plain mean is enough and repeatable.
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight[old_size:] = module.weight[:old_size].mean(dim=0)
    return int(vocab_size - old_size)


def add_lora(model: Any, lora: LoraConfig) -> Any:
    """Wraps the model in a peft adapter. Routers and stacked experts get none unless they are named.

    Raises ConfigError for targets that the model does not have, or that peft cannot adapt.
    """
    import peft

    experts = [name for name in lora.targets or [] if any(_ends_in(one, name) for one in stacked_experts(model))]
    named = [name for name in lora.targets or [] if name not in experts]
    wanted = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # annotated int, used as a divisor
        lora_dropout=lora.dropout,
        target_modules=_all_linear(model) if lora.targets is None else named,
        target_parameters=experts or None,
    )
    try:
        return peft.get_peft_model(model, wanted)
    except ValueError as error:
        # peft's messages begin with "Target modules" or hold "target modules".
        at_fault = f"lora.targets={lora.targets}" if "arget modules" in str(error) else "lora cannot adapt this student"
        raise ConfigError(f"{at_fault}: {one_line(error)[:200]}") from error


def adaptable_layers(model: Any) -> list[str]:
    """Dotted names of the layers, and of the experts' stacked weights, that peft can adapt."""
    import transformers

    kinds = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, transformers.pytorch_utils.Conv1D)
    return [
        *(name for name, module in model.named_modules() if isinstance(module, kinds)),
        *stacked_experts(model),
    ]


def stacked_experts(model: Any) -> list[str]:
    """Dotted names of weights [experts, out, in] outside of layers."""
    return [name for name, one in model.named_parameters() if one.dim() == 3 and not name.endswith(".weight")]


def _all_linear(model: Any) -> str | list[str]:
    """peft's name for all linear layers but the head, or their names where it would take routers and experts too."""
    routers, head = set(routers_of(model)), model.get_output_embeddings()
    if not routers:
        return "all-linear"
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return [name for name, module in linears if name not in routers and module is not head]


def routers_of(model: Any) -> list[str]:
    """Dotted names of the modules that score experts: called router, or gate beside experts."""
    names = [name for name, _ in model.named_modules()]
    beside_experts = {f"{name.removesuffix('.experts')}.gate" for name in names if name.endswith(".experts")}
    return [name for name in names if name in beside_experts or _ends_in(name, "router")]


def _ends_in(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")
