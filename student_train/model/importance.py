"""Which layers and channels of a decoder matter least: by its weights, or by running cached chains through it.

In: a model, packs of cached chains. Out: layers to keep, and a score for every channel.

Layers: leave out the layer whose absence raises KL(teacher, model) least, and repeat. Channels: L1 norm of their
weights (Li et al., arXiv 1608.08710), or the size of what they pass on: root mean square activation times the norm of
the weights that read it (Minitron, arXiv 2407.14679; Wanda, 2306.11695).

    L tokens of a pack, H hidden channels, M MLP channels, G KV groups
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.errors import ConfigError, DataError
from stillroom.log import Progress
from student_train.config.run import InitConfig, TrainConfig
from student_train.data.epoch_plan import PlanSpec
from student_train.data.open import open_data, plan_spec, train_request
from student_train.data.pack import TargetView, TorchPack, to_torch
from student_train.data.selection import Selection
from student_train.data.stream import PackStream
from student_train.data.tokenizer_check import check_vocabulary
from student_train.losses.fused_head import fuse_head
from student_train.losses.metrics import TokenMetrics
from student_train.model.narrow import LINEARS, Layout, norms_of
from student_train.model.student import Student, widen_vocab


@dataclass(frozen=True)
class Calibration:
    """Cached chains to run through a model."""

    packs: list[TorchPack]
    num_ids: int
    """Rows that its embeddings must have."""
    has_teacher: bool
    """Whether there are distributions to compare with."""

    @property
    def num_tokens(self) -> int:
        return sum(pack.input_ids_1L.shape[1] for pack in self.packs)


def calibration_of(selection: Selection, spec: PlanSpec, num_tokens: int, num_ids: int) -> Calibration:
    """The first packs of a selection's order, until they hold `num_tokens`."""
    view = TargetView(with_draws=selection.header.draws > 0)
    packs: list[TorchPack] = []
    with PackStream(selection, spec, packs_per_step=1, num_epochs=1) as stream:
        for pack in stream:
            packs.append(to_torch(pack, _device(), view))
            # Whole packs: their order is shuffled already, so the first ones are a sample.
            if sum(one.input_ids_1L.shape[1] for one in packs) >= num_tokens:
                break
    return Calibration(packs, num_ids, has_teacher=not selection.is_text)


def init_calibration(config: TrainConfig, asked: InitConfig) -> Calibration:
    """Of the first stage's chains, before there is a run. Raises ConfigError, DataError, CorruptError."""
    # The student's folder does not exist yet: its tokenizer is the teacher's.
    teacher = config.student.model_copy(update={"model": asked.teacher, "init": None})
    request = train_request(config.data, 0, config.stages[0])
    with tempfile.TemporaryDirectory(prefix="student-train-init-") as temp:
        selection = open_data(Path(temp) / "init.selection.parquet", request, config.data, teacher)
        vocabulary = check_vocabulary(teacher, selection, [cache.path for cache in config.data.caches])
        return calibration_of(selection, plan_spec(config, 0), asked.calibration_tokens, vocabulary.num_ids)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def _running(model: Any, calibration: Calibration) -> Iterator[Callable[[TorchPack], TokenMetrics]]:
    """The model on the device as it evaluates, and afterwards as it was."""
    attention = model.config._attn_implementation
    # Before fuse_head, because resizing makes a new plain head.
    widen_vocab(model, calibration.num_ids)
    fuse_head(model)
    student = Student(model.to(_device())).eval()

    def metrics_of(pack: TorchPack) -> TokenMetrics:
        with torch.no_grad():
            return TokenMetrics(*student(pack))

    try:
        yield metrics_of
    finally:
        # What follows cuts and saves it from the memory of the CPU.
        model.to("cpu")
        # Student may have switched to an attention function that only packs can use.
        model.set_attn_implementation(attention)


def least_needed_layers(model: Any, calibration: Calibration, num_kept: int) -> tuple[list[int], list[float]]:
    """(numbers of the layers to remove, the least needed first; KL(teacher, model) in nats before and after each).

    Raises ConfigError without distributions, DataError where no KL is finite.
    """
    if not calibration.has_teacher:
        raise ConfigError("rank_layers: importance needs distributions, and data.kind: text has none: use spacing")
    layers = list(model.get_decoder().layers)
    left_out: list[int] = []
    num_tokens = sum(pack.targets.sampled_ids_N.shape[0] for pack in calibration.packs)
    # With n layers left each round tries n removals.
    num_passes = len(calibration.packs) * sum(range(num_kept + 1, len(layers) + 1))
    with _running(model, calibration) as metrics_of, Progress("rank layers", num_passes, "passes") as progress:
        # Not 0 before any cut: the model may not be the teacher that wrote the chains.
        course = [sum(float(metrics_of(pack).forward_kl_N.sum()) for pack in calibration.packs) / num_tokens]
        num_done = 0
        while len(layers) - len(left_out) > num_kept:
            present = [number for number in range(len(layers)) if number not in left_out]
            kl = dict.fromkeys(present, 0.0)
            for pack in calibration.packs:
                with _passing_on([layers[number] for number in left_out]):
                    inputs = _inputs_of_layers(layers, present, metrics_of, pack)
                    for number in present:
                        # What comes before the layer is known: only the layers after it run.
                        before = [layers[one] for one in present if one < number]
                        with _passing_on(before), _answering(layers[number], inputs[number]):
                            kl[number] += float(metrics_of(pack).forward_kl_N.sum()) / num_tokens
                        num_done += 1
                        progress.update(num_done, num_done * num_tokens, _shown(course))
            # NaN compares false with everything: min would return whichever came first.
            best = min(present, key=lambda number: kl[number] if kl[number] == kl[number] else float("inf"))
            if kl[best] != kl[best]:
                raise DataError(
                    "rank_layers: importance found no layer whose removal leaves a finite KL: check the model"
                )
            left_out.append(best)
            course.append(kl[best])
            progress.update(num_done, num_done * num_tokens, _shown(course))
    return left_out, course


def _shown(course: Sequence[float]) -> dict[str, str]:
    """The KL so far. A teacher's to itself is 0, and a little less after rounding."""
    return {"KL": f"{max(0.0, course[-1]):.3f}"}


def _inputs_of_layers(
    layers: Sequence[Any], present: Sequence[int], run: Callable[[TorchPack], TokenMetrics], pack: TorchPack
) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}

    def keep(number: int) -> Callable[[Any, tuple[Any, ...]], None]:
        # A function of its own: a lambda in the loop would see the last number only.
        return lambda _, inputs: found.__setitem__(number, inputs[0])

    hooks = [layers[number].register_forward_pre_hook(keep(number)) for number in present]
    try:
        run(pack)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@contextlib.contextmanager
def _passing_on(layers: Sequence[Any]) -> Iterator[None]:
    """Layers that return what they are given. An attribute, not another module: decoders read the layers' own."""
    for layer in layers:
        layer.forward = lambda hidden_states, *_, **__: hidden_states
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextlib.contextmanager
def _answering(layer: Any, output: Tensor) -> Iterator[None]:
    layer.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del layer.forward


@dataclass(frozen=True)
class WidthScores:
    """Larger matters more. float32: [layer] of M, [layer] of G, and H.

    energy_H of a norm, by name, is each channel's share of the mean square that the norm divides by.
    """

    mlp: list[Tensor]
    groups: list[Tensor]
    hidden: Tensor
    energy: dict[str, Tensor]

    def norm_scales(self, hidden: Tensor) -> dict[str, float]:
        """Factors of norms that from now on average over the channels `hidden` only.

        Channels without energy: RMS over H' of H is sqrt(H / H') larger, and so is the factor. Channels of average
        energy: RMS stays, and the factor is 1.
        """
        return {
            name: float((energy_H[hidden].mean() / energy_H.mean().clamp_min(1e-30)).sqrt())
            for name, energy_H in self.energy.items()
        }


@torch.no_grad()
def scores_by_weights(model: Any, layout: Layout) -> WidthScores:
    """L1 norms of the weights that make and read a channel."""
    decoder = model.get_decoder()
    mlp, groups = [], []
    embeddings = model.get_input_embeddings().weight.detach().float()
    hidden = _share(embeddings.abs().sum(dim=0))
    energy_H = embeddings.square().mean(dim=0)
    for layer in decoder.layers:
        weights = {name: dict(layer.named_modules())[name].weight.detach().float() for name in LINEARS}
        by_dim: dict[str, Tensor] = {}
        for name, dims in LINEARS.items():
            for axis, dim in enumerate(dims):
                # A channel of the rows is made by its row; one of the columns is read by its column.
                l1 = weights[name].abs().sum(dim=1 - axis)
                if dim == "hidden":
                    # As shares of their matrix: large matrices would decide alone.
                    hidden += _share(l1)
                else:
                    by_dim[dim] = by_dim.get(dim, 0) + l1
            if dims[0] == "hidden":
                energy_H += weights[name].square().sum(dim=1)
        mlp.append(by_dim["mlp"])
        size = layout.head_dim
        # A group leaves as a whole, so its heads count together.
        groups.append(
            by_dim["key"].unflatten(0, (-1, size)).sum(dim=1)
            + by_dim["query"].unflatten(0, (-1, size * layout.queries_per_group)).sum(dim=1)
        )
    return WidthScores(mlp, groups, hidden, dict.fromkeys(norms_of(decoder), energy_H))


def _share(values: Tensor) -> Tensor:
    return values / values.mean().clamp_min(1e-30)


@dataclass
class _Sums:
    """Sums over all tokens, float64."""

    by_name: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, values: Tensor) -> None:
        # float32 loses small terms once the sum is 10^7 times as large.
        total = values.double().sum(dim=tuple(range(values.dim() - 1))).cpu()
        self.by_name[name] = self.by_name.get(name, 0) + total


@torch.no_grad()
def scores_by_activations(model: Any, layout: Layout, calibration: Calibration) -> WidthScores:
    """Sizes of what channels pass on, over all tokens of the calibration chains."""
    decoder, sums = model.get_decoder(), _Sums()
    hooks = []

    def input_squares(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        return lambda _, inputs: sums.add(name, inputs[0].detach().float().square())

    def norm_io(name: str) -> Callable[[Any, tuple[Any, ...], Tensor], None]:
        def add(_: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            square = inputs[0].detach().float().square()
            # Each token counts as much: a few tokens of huge norm would decide alone.
            sums.add(f"energy {name}", square / square.sum(dim=-1, keepdim=True).clamp_min(1e-30))
            sums.add(f"output {name}", output.detach().float().abs())

        return add

    with _running(model, calibration) as run, Progress("rank channels", len(calibration.packs), "passes") as progress:
        for number, layer in enumerate(decoder.layers):
            hooks.append(layer.mlp.down_proj.register_forward_pre_hook(input_squares(f"mlp {number}")))
            hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(input_squares(f"heads {number}")))
        hooks += [norm.register_forward_hook(norm_io(name)) for name, norm in norms_of(decoder).items()]
        try:
            for done, pack in enumerate(calibration.packs):
                run(pack)
                progress.update(done + 1, 0)
        finally:
            for hook in hooks:
                hook.remove()
    passed = sums.by_name
    mlp, groups = [], []
    for number, layer in enumerate(decoder.layers):
        # Squared activations times the column's squared norm: the size of what the channel adds to the output.
        mlp.append((passed[f"mlp {number}"] * _column_squares(layer.mlp.down_proj)).float())
        heads = passed[f"heads {number}"] * _column_squares(layer.self_attn.o_proj)
        groups.append(heads.unflatten(0, (-1, layout.head_dim * layout.queries_per_group)).sum(dim=1).float())
    names = list(norms_of(decoder))
    hidden = torch.stack([_share(passed[f"output {name}"]) for name in names]).sum(dim=0).float()
    return WidthScores(mlp, groups, hidden, {name: passed[f"energy {name}"].float() for name in names})


def _column_squares(linear: torch.nn.Linear) -> Tensor:
    return linear.weight.detach().double().square().sum(dim=0)


def best_of(scores: Tensor, num_kept: int) -> Tensor:
    """Numbers of the largest scores, ascending."""
    # Ascending: channels that stay keep their order, and attention heads their group.
    return torch.sort(torch.topk(scores, num_kept).indices).values
