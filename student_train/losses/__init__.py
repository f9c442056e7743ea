"""Losses on a partly known teacher: divergences, targets, and a head that computes them without storing logits.

For a training loop of your own:

    mix = LossMix((ForwardKL(0.9), CrossEntropy(0.1)))
    sums = fused_loss(hidden_NH, lm_head.weight, targets, mix)  # hidden states of the N tokens that have a loss
    (sums.loss_sum / sums.weight_sum).backward()

Targets come from `student_train.data.to_torch(pack, device).targets`, or from your own tensors as SparseTargets.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from student_train.losses.divergences import (
    JSD,
    ChunkLikelihood,
    CrossEntropy,
    CrossEntropyArgmax,
    ForwardKL,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
    Spoken,
    TotalVariation,
)
from student_train.losses.mix import LossMix
from student_train.losses.own_words import DPO, TAID, AsymmetricLikelihood, PolicyGradient, StartKL, Unlikelihood

if TYPE_CHECKING:
    from student_train.losses.fused_head import LossSums, fused_loss
    from student_train.losses.head_chunks import LogitMap
    from student_train.losses.targets import ChainPairs, SparseTargets, StartBuckets, TailDraws, TextChunks
    from student_train.losses.whole_teacher import TeacherHead, WholeTeacher

__all__ = [
    "DPO",
    "JSD",
    "TAID",
    "AsymmetricLikelihood",
    "ChainPairs",
    "ChunkLikelihood",
    "CrossEntropy",
    "CrossEntropyArgmax",
    "ForwardKL",
    "LogitMap",
    "LossMix",
    "LossSums",
    "PolicyGradient",
    "ReverseKL",
    "SkewedForwardKL",
    "SkewedReverseKL",
    "SparseTargets",
    "Spoken",
    "StartBuckets",
    "StartKL",
    "TailDraws",
    "TeacherHead",
    "TextChunks",
    "TotalVariation",
    "Unlikelihood",
    "WholeTeacher",
    "fused_loss",
]

_MODULE_OF = {
    "ChainPairs": "targets",
    "LogitMap": "head_chunks",
    "LossSums": "fused_head",
    "SparseTargets": "targets",
    "StartBuckets": "targets",
    "TailDraws": "targets",
    "TeacherHead": "whole_teacher",
    "TextChunks": "targets",
    "WholeTeacher": "whole_teacher",
    "fused_loss": "fused_head",
}


# Lazy: configurations and plans name losses, and must not wait for torch.
def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
