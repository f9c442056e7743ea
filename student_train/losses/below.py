"""Losses below the head, one frozen class each: their settings. `features.py` computes them.

They compare a layer of the student with a layer of the teacher, on the tokens whose features the cache holds.
"""

from __future__ import annotations

from dataclasses import dataclass

from student_train.losses.divergences import FeatureLoss


@dataclass(frozen=True)
class HiddenLoss(FeatureLoss):
    """A loss on the states between two layers: layer n is the stream after n decoder layers."""


@dataclass(frozen=True)
class ProjectedLoss(HiddenLoss):
    """A loss on states of one width.

    Attributes:
        project: whether a learned linear map takes the student's states to the teacher's; None: where widths differ.
    """

    project: bool | None = None


@dataclass(frozen=True)
class HiddenMSE(ProjectedLoss):
    """|s - t|^2 / |t|^2 of a token's states: 0 is equal, 1 is as good as zero."""

    name = "hidden_mse"


@dataclass(frozen=True)
class HiddenCosine(ProjectedLoss):
    """1 - cos(s, t) of a token's states."""

    name = "hidden_cosine"


@dataclass(frozen=True)
class HiddenRelations(HiddenLoss):
    """KL between teacher and student of each token's similarities to the other tokens of its document (in the manner of
    MiniLM, arXiv 2012.15828): softmax over the others of RELATION_SHARPNESS x cosine of states minus their mean.

    Needs no projection, as similarities have no width.
    """

    name = "hidden_relations"


@dataclass(frozen=True)
class AttentionKL(FeatureLoss):
    """KL(teacher | student) of where a token attends: the stored positions and, in one bucket, all others; nats,
    the mean over the stored heads.

    Layers count from 0. Teacher head h of A is compared with the student's head floor(h A' / A) of A'.
    """

    name = "attention_kl"
