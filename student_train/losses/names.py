"""The losses by the name that configurations and metrics use."""

from __future__ import annotations

from dataclasses import fields

from stillroom.config import nearest_name
from stillroom.errors import ConfigError
from student_train.losses.below import AttentionKL, HiddenCosine, HiddenMSE, HiddenRelations
from student_train.losses.divergences import (
    JSD,
    ChunkLikelihood,
    CrossEntropy,
    CrossEntropyArgmax,
    ForwardKL,
    Loss,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
    TotalVariation,
)
from student_train.losses.own_words import DPO, TAID, AsymmetricLikelihood, PolicyGradient, StartKL, Unlikelihood

LOSSES: dict[str, type[Loss]] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "jsd": JSD,
    "skewed_forward_kl": SkewedForwardKL,
    "skewed_reverse_kl": SkewedReverseKL,
    "total_variation": TotalVariation,
    "taid": TAID,
    "start_kl": StartKL,
    "cross_entropy": CrossEntropy,
    "cross_entropy_argmax": CrossEntropyArgmax,
    "chunk_likelihood": ChunkLikelihood,
    "policy_gradient": PolicyGradient,
    "asymmetric_likelihood": AsymmetricLikelihood,
    "unlikelihood": Unlikelihood,
    "dpo": DPO,
    "hidden_mse": HiddenMSE,
    "hidden_cosine": HiddenCosine,
    "hidden_relations": HiddenRelations,
    "attention_kl": AttentionKL,
}

Setting = str | float | bool | tuple[tuple[int, int], ...] | None


def make_loss(name: str, weight: float = 1.0, **settings: Setting) -> Loss:
    """The loss of that name; a setting of None takes its default.

    Raises ConfigError for an unknown name, a value out of range, or a setting that this loss does not have.
    """
    if name not in LOSSES:
        raise ConfigError(f"loss {name!r} is unknown{nearest_name(name, list(LOSSES), 'choose one of')}")
    given = {key: value for key, value in settings.items() if value is not None}
    for key, value in given.items():
        if key not in {field.name for field in fields(LOSSES[name])}:
            way = "divergences share the stage's own temperature" if key == "temperature" else "remove it"
            raise ConfigError(f"{name}.{key}={value} has no effect: {name} takes no {key}, {way}")
    return LOSSES[name](weight, **given)
