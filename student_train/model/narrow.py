"""Makes a decoder narrower: MLP channels, KV groups and hidden channels leave its tensors and its configuration.

In: a Hugging Face decoder and the channels to keep. Out: the same model with smaller tensors, which transformers, vLLM
and DeepSpeed open like any other of its family. A KV group is a key-value head with the query heads that read it, so
grouped-query attention stays regular. Every layer keeps as many channels as the others, but its own.

    V vocabulary, H hidden channels, M MLP channels, G KV groups
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from stillroom.errors import ConfigError
from student_train.config.stage import PRUNED_AXES, Axis, PruneConfig

FAMILIES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Model types whose forward has no other use for these sizes; others may scale by them without a word."""
GEMMA = ("gemma", "gemma2", "gemma3_text")
"""Embeddings times sqrt(H), and norms that multiply by 1 + weight."""
HEADS_DIVIDE_HIDDEN = ("gemma2", "gemma3_text", "llama")
"""transformers refuses a configuration whose hidden size is not a multiple of its heads."""
HEAD_DIM_IS_DERIVED = ("qwen2",)
"""vLLM takes hidden size / heads for the size of a head, whatever `head_dim` says."""
MULTIPLE = 32
"""Sizes chosen here are multiples of it where they can be: kernels and groups of 32 weights need that."""

Dim = Literal["mlp", "query", "key", "hidden"]
LINEARS: dict[str, tuple[Dim, Dim]] = {
    "self_attn.q_proj": ("query", "hidden"),
    "self_attn.k_proj": ("key", "hidden"),
    "self_attn.v_proj": ("key", "hidden"),
    "self_attn.o_proj": ("hidden", "query"),
    "mlp.gate_proj": ("mlp", "hidden"),
    "mlp.up_proj": ("mlp", "hidden"),
    "mlp.down_proj": ("hidden", "mlp"),
}
"""What rows and columns of a layer's matrices stand for."""
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder along the axes that can be cut."""

    layers: int
    mlp_channels: int
    kv_groups: int
    hidden_size: int

    def of(self, axis: Axis) -> int:
        return int(asdict(self)[axis])


@dataclass(frozen=True)
class Layout:
    """What cutting leaves as it is, and the shape of every tensor as a function of Sizes."""

    model_type: str
    head_dim: int
    queries_per_group: int
    layer_tensors: list[tuple[Dim | int, ...]]
    other_tensors: list[tuple[Dim | int, ...]]

    def width(self, dim: Dim, sizes: Sizes) -> int:
        """Channels of a dimension."""
        return {
            "mlp": sizes.mlp_channels,
            "key": sizes.kv_groups * self.head_dim,
            "query": sizes.kv_groups * self.queries_per_group * self.head_dim,
            "hidden": sizes.hidden_size,
        }[dim]

    def num_parameters(self, sizes: Sizes) -> int:
        """Parameters of a model of these sizes, embeddings included."""

        def count(tensors: list[tuple[Dim | int, ...]]) -> int:
            return sum(
                math.prod(dim if isinstance(dim, int) else self.width(dim, sizes) for dim in dims) for dims in tensors
            )

        return sizes.layers * count(self.layer_tensors) + count(self.other_tensors)

    def problem(self, sizes: Sizes) -> str | None:
        """Why transformers or vLLM would not open a model of these sizes."""
        heads = sizes.kv_groups * self.queries_per_group
        if self.model_type in HEAD_DIM_IS_DERIVED and sizes.hidden_size != heads * self.head_dim:
            return (
                f"vLLM reads the size of a {self.model_type} head as hidden_size / heads: {sizes.hidden_size} / "
                f"{heads} is not {self.head_dim}: cut kv_groups and hidden_size in proportion"
            )
        if self.model_type in HEADS_DIVIDE_HIDDEN and sizes.hidden_size % heads:
            return f"hidden_size {sizes.hidden_size} must be a multiple of the {heads} attention heads that remain"
        return None


def layout_of(model: Any) -> tuple[Layout, Sizes]:
    """Works on the meta device too. Raises ConfigError for a model that cannot be narrowed, with the reason."""
    config = model.config
    name = type(model).__name__
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"{name} (model_type {config.model_type}) cannot be cut by width: supported are {', '.join(FAMILIES)}; "
            "`layers` alone cuts any decoder with model.layers"
        )
    decoder = model.get_decoder()
    sizes = Sizes(
        int(config.num_hidden_layers),
        int(config.intermediate_size),
        int(config.num_key_value_heads),
        int(config.hidden_size),
    )
    heads = int(config.num_attention_heads)
    head_dim = decoder.layers[0].self_attn.head_dim
    layers = [_layer_dims(layer, name, head_dim) for layer in decoder.layers]
    if any(one != layers[0] for one in layers):
        raise ConfigError(f"{name} cannot be cut by width: its layers differ in their tensors")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    vocab = int(model.get_input_embeddings().weight.shape[0])
    others: list[tuple[Dim | int, ...]] = [(vocab, "hidden"), ("hidden",)]
    if not tied:
        others.append((int(model.get_output_embeddings().weight.shape[0]), "hidden"))
    layout = Layout(config.model_type, head_dim, heads // sizes.kv_groups, layers[0], others)
    # The formula by which ratios are searched must count what the model has.
    assert layout.num_parameters(sizes) == sum(one.numel() for one in model.parameters())
    return layout, sizes


def _layer_dims(layer: Any, name: str, head_dim: int) -> list[tuple[Dim | int, ...]]:
    """Dimensions of the layer's tensors. Raises ConfigError for one of no known role."""
    found: list[tuple[Dim | int, ...]] = []
    for tensor, parameter in layer.named_parameters():
        module, _, kind = tensor.rpartition(".")
        if module in LINEARS and kind in ("weight", "bias"):
            # A bias has an entry for each row.
            found.append(LINEARS[module] if kind == "weight" else LINEARS[module][:1])
        elif module in HEAD_NORMS and tuple(parameter.shape) == (head_dim,):
            found.append((head_dim,))
        elif module.endswith("layernorm") and kind == "weight":
            found.append(("hidden",))
        else:
            shown = f"{tensor} {tuple(parameter.shape)}"
            raise ConfigError(
                f"{name} cannot be cut by width: it has {shown}, and only separate q, k, v, o, gate, up and down "
                "projections with RMSNorms are cut (fused projections, experts and norms over all heads are not)"
            )
    return found


def planned_sizes(layout: Layout, sizes: Sizes, asked: PruneConfig) -> Sizes:
    """The sizes that `asked` leaves of `sizes`. Raises ConfigError for sizes that do not exist."""
    named = {axis: number for axis in PRUNED_AXES if (number := asked.number_of(axis)) is not None}
    for axis, number in named.items():
        if number > sizes.of(axis):
            raise ConfigError(f"{axis}={number} must be at most {sizes.of(axis)}, what the model has")
    planned = replace(sizes, **named)
    if asked.parameters is not None:
        planned = _fitted(layout, planned, asked)
    problem = layout.problem(planned)
    if problem is not None:
        raise ConfigError(problem)
    return planned


def _fitted(layout: Layout, sizes: Sizes, asked: PruneConfig) -> Sizes:
    """All axes of `asked.along` cut by one ratio, the largest at which the model has at most `asked.parameters`."""
    assert asked.parameters is not None
    target = asked.parameters * layout.num_parameters(sizes) if asked.parameters < 1 else asked.parameters
    # Not by bisection: sizes are rounded, and not every size can be opened, so the count does not fall evenly.
    for thousandths in range(1000, -1, -1):
        fitted = _scaled(layout, sizes, asked, thousandths / 1000)
        if layout.num_parameters(fitted) <= target and layout.problem(fitted) is None:
            return fitted
    least = layout.num_parameters(_scaled(layout, sizes, asked, 0))
    raise ConfigError(
        f"parameters={asked.parameters:g} cannot be reached along {', '.join(asked.along_axes)}: {least} parameters "
        "remain at least; add axes to `along`, or cut the vocabulary"
    )


def _scaled(layout: Layout, sizes: Sizes, asked: PruneConfig, ratio: float) -> Sizes:
    """Sizes whose axes of `asked.along` are cut by a ratio; the other axes stay."""
    if ratio == 1:
        return sizes
    axes = asked.along_axes
    groups = max(1, round(sizes.kv_groups * ratio)) if "kv_groups" in axes else sizes.kv_groups
    return replace(
        sizes,
        kv_groups=groups,
        layers=max(1, round(sizes.layers * ratio)) if "layers" in axes else sizes.layers,
        mlp_channels=_nearest(sizes.mlp_channels, ratio, MULTIPLE) if "mlp_channels" in axes else sizes.mlp_channels,
        hidden_size=(
            _nearest(sizes.hidden_size, ratio, _hidden_step(layout, sizes, groups))
            if "hidden_size" in axes
            else sizes.hidden_size
        ),
    )


def _hidden_step(layout: Layout, sizes: Sizes, groups: int) -> int:
    if layout.model_type not in HEADS_DIVIDE_HIDDEN:
        return MULTIPLE
    # Of the groups that remain: their number decides what divides the hidden size.
    heads = groups * layout.queries_per_group
    # SmolLM2 has 9 heads and 576 channels: steps of 288 would be too coarse, so it gets steps of 72.
    step = math.lcm(MULTIPLE, heads)
    return step if step * 8 <= sizes.hidden_size else math.lcm(8, heads)


def _nearest(size: int, ratio: float, step: int) -> int:
    """A multiple of `step`, at least one; any size where the model is smaller than a few steps."""
    return max(step, round(size * ratio / step) * step) if size >= 4 * step else max(1, round(size * ratio))


@dataclass(frozen=True)
class Kept:
    """Channels to keep, ascending: [layer] of MLP channels and of KV groups, and the hidden ones; None keeps all.

    `norm_scales` corrects a norm, by name in the decoder, for the channels it no longer averages over.
    """

    mlp: Sequence[Tensor] | None = None
    groups: Sequence[Tensor] | None = None
    hidden: Tensor | None = None
    norm_scales: Mapping[str, float] | None = None


@torch.no_grad()
def narrow(model: Any, layout: Layout, kept: Kept) -> None:
    """Cuts a model in place: weights and configuration, for saving. Constants that modules took from the configuration
    (eps, Gemma's embedding scale) are right once it is loaded again.
    """
    decoder, config = model.get_decoder(), model.config
    for number, layer in enumerate(decoder.layers):
        groups = None if kept.groups is None else kept.groups[number]
        kept_of: dict[Dim, Tensor | None] = {
            "mlp": None if kept.mlp is None else kept.mlp[number],
            "hidden": kept.hidden,
            "key": _spread(groups, layout.head_dim),
            "query": _spread(groups, layout.head_dim * layout.queries_per_group),
        }
        modules = dict(layer.named_modules())
        # Each layer keeps channels of its own: the MLP and the heads of one layer are private to it.
        for name, (rows, columns) in LINEARS.items():
            _narrow_linear(modules[name], kept_of[rows], kept_of[columns])
    if kept.hidden is not None:
        scales = kept.norm_scales or {}
        _narrow_hidden(model, kept.hidden, scales)
        config.hidden_size = len(kept.hidden)
        # c x / sqrt(c^2 mean + eps') is x / sqrt(mean + eps) where eps' = c^2 eps.
        config.rms_norm_eps *= sum(one**2 for one in scales.values()) / len(scales) if scales else 1.0
    if kept.mlp is not None:
        config.intermediate_size = len(kept.mlp[0])
    if kept.groups is not None:
        config.num_key_value_heads = len(kept.groups[0])
        config.num_attention_heads = len(kept.groups[0]) * layout.queries_per_group
    # Otherwise loaders derive it from the new hidden size and number of heads.
    config.head_dim = layout.head_dim


def _narrow_hidden(model: Any, hidden: Tensor, norm_scales: Mapping[str, float]) -> None:
    decoder, is_gemma = model.get_decoder(), model.config.model_type in GEMMA
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head.weight is embeddings.weight
    # Gemma multiplies embeddings by sqrt(H) of its configuration, which shrinks with the cut.
    factor = math.sqrt(model.config.hidden_size / len(hidden)) if is_gemma else 1.0
    embeddings.weight = torch.nn.Parameter(_at(embeddings.weight, 1, hidden) * factor)
    embeddings.embedding_dim = len(hidden)
    if is_tied:
        head.weight, head.in_features = embeddings.weight, len(hidden)
    else:
        _narrow_linear(head, None, hidden)
    for name, norm in norms_of(decoder).items():
        scale = norm_scales.get(name, 1.0)
        if is_tied and norm is decoder.norm:
            # The head shares the embeddings, factor and all.
            scale /= factor
        weight = _at(norm.weight, 0, hidden).float()
        # Gemma stores a norm's weight minus 1.
        scaled = (1 + weight) * scale - 1 if is_gemma else weight * scale
        norm.weight = torch.nn.Parameter(scaled.to(norm.weight.dtype))


def norms_of(decoder: Any) -> dict[str, Any]:
    """The norms over hidden channels, by name in the decoder."""
    found = {name: one for name, one in decoder.named_modules() if name.endswith("layernorm")}
    return {**found, "norm": decoder.norm}


def _narrow_linear(linear: Any, rows: Tensor | None, columns: Tensor | None) -> None:
    if rows is None and columns is None:
        return
    linear.weight = torch.nn.Parameter(_at(_at(linear.weight, 0, rows), 1, columns))
    if linear.bias is not None:
        linear.bias = torch.nn.Parameter(_at(linear.bias, 0, rows))
    linear.out_features, linear.in_features = linear.weight.shape


def _at(tensor: Tensor, dim: int, kept: Tensor | None) -> Tensor:
    return tensor.detach() if kept is None else tensor.detach().index_select(dim, kept.to(tensor.device))


def _spread(groups: Tensor | None, width: int) -> Tensor | None:
    """Channels of the groups: groups 0 and 2 of width 3 are channels 0, 1, 2, 6, 7, 8."""
    return None if groups is None else (groups.unsqueeze(1) * width + torch.arange(width)).flatten()
