"""Losses on a sparse teacher, fused with the language model head and chunked over tokens.

In: hidden states [N, H], the head's weight [V, H], sparse targets, a mix of losses. Out: sums in nats, of which the
total carries gradients to hidden, weight, bias and a LoRA pair on the head.
Cost: the three matrix products of plain cross-entropy (two with a frozen head or frozen body, one without gradient),
and one [chunk, V] buffer instead of three [N, V] ones. The gradient is computed in the forward pass, chunk by chunk,
and kept (hidden [N, H] and weight [V, H], float32), so backward is one multiplication (the plan of Liger Kernel,
arXiv 2410.10989). Only log q at a few slots a token passes through autograd; `chunk.py` carries its gradient to all V
logits in closed form.

`fused_loss` takes tensors. `fuse_head` puts the same into a Hugging Face model, as the forward of the module that owns
the head's weight: under ZeRO-3 a weight exists only inside the forward of its module, and tied embeddings and peft's
LoRA on the head keep working.

    N loss tokens, C tokens of a chunk, V vocabulary, H hidden, R LoRA rank, J losses of the mix
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stillroom.errors import ConfigError
from student_train.losses.chunk import chunk_losses, read_slots, weighted_sum
from student_train.losses.divergences import Loss
from student_train.losses.head_chunks import PLAIN, HeadChunks, HeadInputs, LogitMap
from student_train.losses.logit_probe import probe_logits
from student_train.losses.metrics import TokenMetrics, metrics_tensor
from student_train.losses.mix import LossMix
from student_train.losses.targets import ChainPairs, SparseTargets


class LossSums(NamedTuple):
    """Sums over tokens; divide once, after the all-reduce.

    Attributes:
        loss_sum: float32 scalar, sum over losses and tokens of loss weight x token weight x nats; has the gradient.
        term_sums_J: float32, one sum for each loss of the mix in its order, token weights in and loss weight out, so
            that loss_sum = sum over losses of loss weight x term sum; no gradient. Divergences carry temperature^2.
        weight_sum: float32 scalar, sum of the token weights (focal factor included); no gradient.
    """

    loss_sum: Tensor
    term_sums_J: Tensor
    weight_sum: Tensor


class TokenSlots(NamedTuple):
    """Log probabilities of N tokens at temperature 1, float32, no gradient.

    Attributes:
        sampled_N: of the sampled token.
        slots_NS: of the support's ids, then of the drawn ones, padding included.
        rest_N: of all other ids; -inf where there are none.
    """

    sampled_N: Tensor
    slots_NS: Tensor
    rest_N: Tensor


def fused_loss(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets: SparseTargets,
    mix: LossMix,
    *,
    bias_V: Tensor | None = None,
    lora_hidden_NR: Tensor | None = None,
    lora_weight_VR: Tensor | None = None,
    chunk_tokens: int | None = None,
    logit_map: LogitMap = PLAIN,
) -> LossSums:
    """All losses of `mix` at once, of logits that are never materialised: hidden W^T (+ bias) (+ lora_hidden
    lora_weight^T), then scaled or capped by `logit_map`.

    hidden and weight may be float32, bfloat16, float16 or float64; matrix products run in the weight's dtype,
    everything else and the accumulated gradients in float32 (float64 for float64). `lora_hidden_NR` is A x with the
    LoRA scaling in it, `lora_weight_VR` is B. Gradients go to those inputs that require them, and are not computed
    under no_grad. Call backward once: it consumes the gradients.

    Raises:
        ConfigError: the targets lack what a loss of the mix needs.
    """
    return LossSums(
        *_fused_loss(
            HeadInputs(hidden_NH, weight_VH, bias_V, lora_hidden_NR, lora_weight_VR, chunk_tokens, logit_map),
            targets,
            mix,
        )
    )


def _fused_loss(head: HeadInputs, targets: SparseTargets, mix: LossMix) -> tuple[Tensor, Tensor, Tensor]:
    for term in mix.terms:
        if term.needs_distribution and targets.num_support == 0:
            raise ConfigError(
                f"{term.name} needs the teacher's distribution and these targets hold none: use cross_entropy"
            )
        if term.needs_hidden and targets.whole is None:
            raise ConfigError(
                f"{term.name} with tail: exact needs the teacher's hidden states and head and these targets hold none"
            )
        if term.needs_chunks and targets.chunks is None:
            raise ConfigError(
                f"{term.name} needs the teacher's log probabilities of chunks of text and these targets hold none"
            )
        _require_own_words(term, targets)
    # Decided here: inside an autograd function `ctx.needs_input_grad` stays true under no_grad.
    needs_grad = tuple(
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in head.tensors
    )
    if not any(needs_grad):
        return _forward(HeadChunks(head, cuts=targets.cuts), targets, mix, with_gradient=False)
    sums: tuple[Tensor, Tensor, Tensor] = _FusedLoss.apply(  # type: ignore[no-untyped-call]
        *head.tensors, head.chunk_tokens, head.logit_map, targets, mix, needs_grad
    )
    return sums


def _require_own_words(term: Loss, targets: SparseTargets) -> None:
    """Raises ConfigError where targets lack log probabilities of behaviour or start, or pairs of chains."""
    spoken = targets.spoken
    lacks = {
        "the behaviour's log probabilities": term.needs_behaviour
        and (spoken.behaviour_N is None or spoken.teacher_N is None),
        "the log probabilities of the student's start": (term.needs_start == "tokens" and spoken.start_N is None)
        or (term.needs_start == "distribution" and targets.start is None),
        "pairs of chains": term.needs_pairs and targets.pairs is None,
    }
    for what, is_lacking in lacks.items():
        if is_lacking:
            raise ConfigError(f"{term.name} needs {what} and these targets hold none")


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        lora_hidden_NR: Tensor | None,
        lora_weight_VR: Tensor | None,
        chunk_tokens: int | None,
        logit_map: LogitMap,
        targets: SparseTargets,
        mix: LossMix,
        needs_grad: tuple[bool, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = HeadInputs(hidden_NH, weight_VH, bias_V, lora_hidden_NR, lora_weight_VR, chunk_tokens, logit_map)
        chunks = HeadChunks(head, needs_grad, targets.cuts)
        loss_sum, term_sums_J, weight_sum = _forward(chunks, targets, mix, with_gradient=True)
        ctx.mark_non_differentiable(term_sums_J, weight_sum)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in head.tensors]
        # Not as plain attributes of ctx: only saved tensors get the version check that backward relies on.
        ctx.save_for_backward(*chunks.gradients)
        return loss_sum, term_sums_J, weight_sum

    @staticmethod
    # The gradient was computed without a graph, so it has no derivative of its own.
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # In place, or the weight's gradient would exist twice; a second backward (retain_graph) is then refused by
        # autograd's version check. The product comes before the cast, so that fp16 loss scales do not overflow.
        gradients = [
            None if gradient is None else _times(gradient, grad_loss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *gradients, None, None, None, None, None


def _times(gradient: Tensor, factor: Tensor) -> Tensor:
    # On a GPU, reading the factor would wait for it.
    if factor.is_cpu and factor.item() == 1.0:
        torch.autograd.graph.increment_version(gradient)
        return gradient
    return gradient.mul_(factor)


def _forward(
    chunks: HeadChunks, targets: SparseTargets, mix: LossMix, *, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """LossSums over all chunks; the gradient, if requested, stays in `chunks.gradients`."""
    term_sums_J = torch.zeros(len(mix.terms), dtype=chunks.dtype, device=targets.ids_NK.device)
    weight_sum = torch.zeros((), dtype=chunks.dtype, device=targets.ids_NK.device)
    # Precision is chosen here, not by an enclosing autocast.
    with torch.autocast(targets.ids_NK.device.type, enabled=False):
        if mix.reads_pairs and isinstance(targets.pairs, ChainPairs):
            # A pair's gradient depends on both chains as a whole: one more matrix product measures them first.
            assert targets.spoken.start_N is not None
            sampled_N = torch.cat([_sampled(chunks, targets, start, stop) for start, stop in chunks.spans()])
            targets = replace(targets, pairs=targets.pairs.measured(sampled_N, targets.spoken.start_N))
        for start, stop in chunks.spans():
            logits_CV = chunks.logits(start, stop)
            values_CJ, weights_C = chunk_losses(
                logits_CV, targets.narrow(start, stop), mix, with_gradient=with_gradient
            )
            term_sums_J += (weights_C.unsqueeze(1) * values_CJ).sum(dim=0)
            weight_sum += weights_C.sum()
            if with_gradient:
                # chunk_losses has left dL/dlogits in the memory of the logits.
                chunks.accumulate(start, stop, logits_CV)
    return weighted_sum(mix, term_sums_J), term_sums_J, weight_sum


def _sampled(chunks: HeadChunks, targets: SparseTargets, start: int, stop: int) -> Tensor:
    """[C] log q of the sampled tokens, without gradient."""
    logits_CV = chunks.logits(start, stop)
    return logits_CV.gather(1, targets.sampled_ids_N[start:stop].unsqueeze(1)).squeeze(1) - logits_CV.logsumexp(dim=1)


@torch.no_grad()
def _slots_tensor(head: HeadInputs, targets: SparseTargets) -> Tensor:
    """float32 [N, 2 + S]: the columns of TokenSlots, sampled and rest first."""
    chunks, parts = HeadChunks(head), []
    with torch.autocast(targets.ids_NK.device.type, enabled=False):
        for start, stop in chunks.spans():
            sampled_C, slots_CS, rest_C = read_slots(chunks.logits(start, stop), targets.narrow(start, stop))
            parts.append(torch.cat([sampled_C.unsqueeze(1), rest_C.unsqueeze(1), slots_CS], dim=1).float())
    return torch.cat(parts)


class FusedHead(torch.nn.Linear):
    """`torch.nn.Linear` [V, H] whose forward can also be the fused loss; state dict and weights are the same."""

    logit_map: LogitMap = PLAIN

    @staticmethod
    def sharing(linear: torch.nn.Linear) -> FusedHead:
        """A head around the very Parameters of `linear`, so that tied embeddings stay tied."""
        has_bias = linear.bias is not None
        # On the meta device: the weight is replaced at once, and a second [V, H] would only take memory.
        head = FusedHead(
            linear.in_features, linear.out_features, bias=has_bias, device="meta", dtype=linear.weight.dtype
        )
        head.weight = linear.weight
        if has_bias:
            head.bias = linear.bias
        return head.train(linear.training)

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        *,
        targets: SparseTargets | None = None,
        mix: LossMix | None = None,
        lora_hidden_NR: Tensor | None = None,
        lora_weight_VR: Tensor | None = None,
        chunk_tokens: int | None = None,
        as_slots: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """z [..., V] without targets, to which the model adds its own scale or cap; with targets and mix the tensors of
        LossSums; with targets alone those of `metrics_tensor`, or of `head_slots`. `head_loss`, `head_metrics` and
        `head_slots` give them names.

        Plain tensors, and targets as keywords, because DeepSpeed's hooks look for tensors in positional inputs and in
        outputs that are tensors or tuples.
        """
        if targets is None:
            return super().forward(input)
        head = HeadInputs(input, self.weight, self.bias, lora_hidden_NR, lora_weight_VR, chunk_tokens, self.logit_map)
        if as_slots:
            return _slots_tensor(head, targets)
        return metrics_tensor(head, targets) if mix is None else _fused_loss(head, targets, mix)


def fuse_head(model: Any) -> FusedHead:
    """Put a FusedHead in the place of the model's head and return it; call before peft and DeepSpeed wrap the model.

    Runs a few tokens to learn what the model does to hidden states before the head and to logits after it.

    Raises:
        ConfigError: no head, a head that is not a plain `torch.nn.Linear` (quantised, say), or a model whose logits are
            neither the head's, nor scaled, nor capped.
    """
    linear = model.get_output_embeddings()
    if isinstance(linear, FusedHead):
        return linear
    # Not isinstance: quantised layers are Linear too, but their weight does not hold floats.
    if type(linear) is not torch.nn.Linear:
        raise ConfigError(f"the student's head is a {type(linear).__name__}: losses need a plain torch.nn.Linear head")
    head = FusedHead.sharing(linear)
    head.logit_map = probe_logits(model)
    model.set_output_embeddings(head)
    return head


def head_loss(
    head: torch.nn.Module, hidden_NH: Tensor, targets: SparseTargets, mix: LossMix, *, chunk_tokens: int | None = None
) -> LossSums:
    """`fused_loss` through the model's output embeddings as they stand: a FusedHead, or peft's LoRA or copy around one.

    Raises:
        ConfigError: the targets lack what the mix needs, or the adapter has no plain low-rank form (DoRA and the like).
    """
    return LossSums(*_through_head(head, hidden_NH, targets, mix, chunk_tokens))


@torch.no_grad()
def head_metrics(
    head: torch.nn.Module, hidden_NH: Tensor, targets: SparseTargets, *, chunk_tokens: int | None = None
) -> TokenMetrics:
    """TokenMetrics through the model's output embeddings as they stand, without gradient; see `head_loss`."""
    return TokenMetrics(*_through_head(head, hidden_NH, targets, None, chunk_tokens))


@torch.no_grad()
def head_slots(
    head: torch.nn.Module, hidden_NH: Tensor, targets: SparseTargets, *, chunk_tokens: int | None = None
) -> TokenSlots:
    """TokenSlots through the model's output embeddings as they stand, without gradient; see `head_loss`."""
    columns_NX = _through_head(head, hidden_NH, targets, None, chunk_tokens, as_slots=True)
    return TokenSlots(columns_NX[:, 0], columns_NX[:, 2:], columns_NX[:, 1])


def _through_head(
    head: torch.nn.Module,
    hidden_NH: Tensor,
    targets: SparseTargets,
    mix: LossMix | None,
    chunk_tokens: int | None,
    *,
    as_slots: bool = False,
) -> Any:
    hidden_scale = _fused_below(head).logit_map.hidden_scale
    # Before LoRA, whose A reads the same scaled states.
    if hidden_scale != 1.0:
        hidden_NH = hidden_NH * hidden_scale
    fused, lora_hidden_NR, lora_weight_VR = _without_lora(head, hidden_NH)
    # Called as a module: ZeRO-3 gathers the weight in the hooks around its forward.
    return fused(
        hidden_NH,
        targets=targets,
        mix=mix,
        lora_hidden_NR=lora_hidden_NR,
        lora_weight_VR=lora_weight_VR,
        chunk_tokens=chunk_tokens,
        as_slots=as_slots,
    )


def _fused_below(head: torch.nn.Module) -> FusedHead:
    """The FusedHead in a peft wrapper, which holds one (LoRA) or two equal ones (a full copy)."""
    return next(module for module in head.modules() if isinstance(module, FusedHead))


def _without_lora(head: torch.nn.Module, hidden_NH: Tensor) -> tuple[torch.nn.Module, Tensor | None, Tensor | None]:
    """(head below the adapter, A x scaled [N, R], B [V, R]); several active adapters are concatenated along R."""
    if isinstance(head, FusedHead):
        return head, None, None
    from peft.tuners.lora import Linear as LoraLinear

    if not isinstance(head, LoraLinear):
        return head, None, None
    # An adapter can be active in the model without having a part on the head.
    active = [] if head.disable_adapters or head.merged else [a for a in head.active_adapters if a in head.lora_A]
    if any(adapter in head.lora_variant or head.lora_bias[adapter] for adapter in active):
        raise ConfigError(
            "LoRA on the head must be plain: switch off DoRA, lora_bias and other variants, or leave lm_head out"
        )
    if not active:
        return head.get_base_layer(), None, None
    lora_hidden, lora_weight = [], []
    for adapter in active:
        lora_a, lora_b = head.lora_A[adapter], head.lora_B[adapter]
        assert isinstance(lora_a, torch.nn.Linear)
        assert isinstance(lora_b, torch.nn.Linear)
        dropped_NH = head.lora_dropout[adapter](hidden_NH.to(lora_a.weight.dtype))
        lora_hidden.append(lora_a(dropped_NH) * head.scaling[adapter])
        # Under ZeRO-3 reading `weight` within the engine's forward gathers it and registers it with the outer module.
        lora_weight.append(lora_b.weight)
    return head.get_base_layer(), torch.cat(lora_hidden, dim=1), torch.cat(lora_weight, dim=1)
