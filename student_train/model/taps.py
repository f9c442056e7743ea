"""Both sides of losses below the head: what a student's forward pass records, and the constants of the teacher's set.

In: a Hugging Face decoder with a list of layers; feature sets. Out: `Recorded` of each pass; `TeacherTensors`, once per
rank. States are read by hooks on the layers, which work under peft, ZeRO and gradient checkpointing; queries and keys
come from the attention function that keeps the documents of a pack apart, rotated as the model uses them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stillroom.errors import ConfigError
from stillroom.schema.records import Float32, stable_hash
from student_train.data.features import StageFeatures
from student_train.losses.below import AttentionKL, ProjectedLoss
from student_train.losses.divergences import FeatureLoss
from student_train.losses.features import Basis, Recorded, TeacherTensors, projection_key
from student_train.losses.head_chunks import LogitMap
from student_train.losses.whole_teacher import TeacherHead
from student_train.model.packed_attention import Apart


class LayerTaps:
    """Hooks on the layers that the losses of a stage read. One forward pass at a time."""

    def __init__(self, causal: Any, apart: Apart, losses: tuple[FeatureLoss, ...]) -> None:
        """Raises ConfigError for a decoder without a list of layers, or whose attention cannot be seen."""
        is_attention = [isinstance(loss, AttentionKL) for loss in losses]
        self._attention = _student_layers(losses, is_attention)
        self._states = _student_layers(losses, [not one for one in is_attention])
        self._recorded: Recorded | None = None
        if self._attention and apart is not Apart.BY_ATTENTION:
            raise ConfigError(
                f"attention_kl cannot read the attention of {type(causal).__name__}, whose documents are separated "
                f"{apart.value}: it needs student.attention: sdpa and full attention in every layer"
            )
        if not self._states:
            return
        layers = dict(causal.get_decoder().named_children()).get("layers")
        if not isinstance(layers, torch.nn.ModuleList):
            raise ConfigError(
                f"{type(causal).__name__} has no list of decoder layers, which losses below the head need"
            )
        for layer in sorted(self._states):
            # States are numbered by the layers passed, modules from 0.
            layers[layer - 1].register_forward_hook(self._hook(layer))

    def open(self) -> Recorded:
        """Starts to record a forward pass."""
        self._recorded = Recorded(self._states, self._attention)
        return self._recorded

    def close(self) -> None:
        """Ends it: gradient checkpointing runs layers again in the backward pass."""
        if self._recorded is not None:
            self._recorded.is_open = False
        # Nothing here may keep the states of a step alive until the next.
        self._recorded = None

    def _hook(self, layer: int) -> Any:
        def record(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            if self._recorded is not None:
                self._recorded.add_state(layer, output[0] if isinstance(output, tuple) else output)

        return record


def _student_layers(losses: tuple[FeatureLoss, ...], is_wanted: list[bool]) -> frozenset[int]:
    return frozenset(
        mine for loss, wanted in zip(losses, is_wanted, strict=True) if wanted for _, mine in loss.layers or ()
    )


def make_projections(
    losses: tuple[FeatureLoss, ...], student_width: int, teacher_width: int, seed: int
) -> torch.nn.ModuleDict:
    """A learned linear map [D, H] for each pair of layers that a loss projects, by `projection_key`.

    Widths that agree begin with the identity, others with random rows of unit variance.
    """
    pairs = {pair for loss in losses if isinstance(loss, ProjectedLoss) and loss.project for pair in loss.layers or ()}
    made = torch.nn.ModuleDict()
    for pair in sorted(pairs):
        linear = torch.nn.Linear(student_width, teacher_width, bias=False)
        # From the pair alone: all ranks, and a resumed run, must begin with the same map.
        number = int(stable_hash("projection", seed, *pair)[:15], 16)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            if student_width == teacher_width:
                torch.nn.init.eye_(linear.weight)
            else:
                linear.weight.normal_(std=student_width**-0.5, generator=generator)
        made[projection_key(*pair)] = linear
    return made


def load_teacher(features: StageFeatures, device: torch.device, dtype: torch.dtype) -> TeacherTensors:
    """Constants of the stage's feature set: the head in `dtype` if a loss needs it, bases in float32."""

    def tensor(array: Float32) -> Tensor:
        # A copy: what a file gave may be read-only.
        return torch.tensor(array, device=device)

    stored, head = features.first, None
    if features.with_hidden:
        found = stored.head()
        weight_VD = torch.from_numpy(found.weight_VD).to(device, dtype)
        bias_V = None if found.bias_V is None else tensor(found.bias_V)
        head = TeacherHead(weight_VD, bias_V, LogitMap(scale=found.logit_scale, cap=found.softcap))
    of: list[int | str] = [*features.layers, *(["hidden"] if features.with_hidden else [])]
    bases = {one: stored.basis(one) for one in of} if features.has_one_basis else {}
    return TeacherTensors(
        width=stored.hidden_size,
        head=head,
        bases={
            one: Basis(tensor(basis.mean_D), tensor(basis.vectors_RD))
            for one, basis in bases.items()
            if basis is not None
        },
        heads=features.attention,
        num_heads=0 if stored.manifest.attention is None else stored.manifest.attention.num_heads,
    )
