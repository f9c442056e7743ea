"""Sizes of a student, and whether its vocabulary is the cache's, from its files alone.

In: a Hugging Face folder or hub id. Out: counts and layer names for `plan`, without a model. A local folder of a plain
decoder is read as JSON and safetensors headers, in milliseconds; everything else (hub ids, experts, layouts not known
here) is built by transformers on the meta device, which costs ten seconds of imports.
"""

import importlib.util
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.errors import DataError, first_line
from student_train.config.run import StudentConfig

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")
BALANCE_WEIGHTS = ("router_aux_loss_coef", "moe_loss_weight", "aux_loss_coef")
"""Keys of config.json with the weight of the experts' balance loss: most models, DBRX, JetMoe."""


@dataclass(frozen=True)
class ModelShape:
    """Counts of a causal language model."""

    num_parameters: int
    num_head: int
    linear_widths: dict[str, int]
    """Inputs plus outputs of each linear layer of the decoder, by name below it."""
    adaptable: list[str]
    """Dotted names of the layers that peft can adapt."""
    num_layers: int
    hidden_size: int
    has_tied_head: bool
    balance_weight: float | None = None
    """Weight of the experts' own balance loss; None without one."""


def model_shape(student: StudentConfig) -> ModelShape:
    """Raises DataError where transformers does not know the model, or its files are not whole."""
    shapes = tensor_shapes(Path(student.model))
    return _from_files(student, shapes) or _from_meta(student)


def read_config(student: StudentConfig) -> dict[str, Any] | None:
    """config.json of a local folder whose architecture transformers ships; None where transformers must be asked."""
    path = Path(student.model) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    # auto_map: the folder brings code of its own.
    if not isinstance(config, dict) or "auto_map" in config or not _is_known(config.get("model_type")):
        return None
    return config if all(isinstance(config.get(key), int) for key in SIZES) else None


def _is_known(model_type: Any) -> bool:
    """Whether the installed transformers has this architecture; its import alone takes a second."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None or not isinstance(model_type, str) or not model_type:
        return False
    # transformers keeps architectures in Python packages, whose names have no hyphens.
    return (Path(spec.origin).parent / "models" / model_type.replace("-", "_")).is_dir()


def _from_files(student: StudentConfig, shapes: Mapping[str, tuple[int, ...]]) -> ModelShape | None:
    config = read_config(student)
    if config is None or not shapes or shapes.get(f"{EMBEDDING}.weight") is None:
        return None
    # transformers saves a tied weight once, as the embeddings.
    is_tied = f"{HEAD}.weight" not in shapes
    # Both a head in the file and a tied configuration: what transformers makes of that is its own business.
    if not is_tied and config.get("tie_word_embeddings", False):
        return None
    linears = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith(".weight") and not name.startswith((EMBEDDING, HEAD))
    }
    # Experts are stored in forms that differ from the modules transformers builds.
    if not all(name.startswith("model.layers.") and "expert" not in name for name in linears):
        return None
    return ModelShape(
        num_parameters=sum(map(math.prod, shapes.values())),
        num_head=math.prod(shapes[f"{EMBEDDING if is_tied else HEAD}.weight"]),
        linear_widths={name.removeprefix("model."): sum(shape) for name, shape in linears.items()},
        adaptable=[EMBEDDING, *linears, HEAD],
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        has_tied_head=is_tied,
    )


def tensor_shapes(folder: Path) -> Mapping[str, tuple[int, ...]]:
    """By name, from the headers of a local folder's files. Raises DataError for one that is damaged or missing."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    paths = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{index} is damaged: copy it again ({type(error).__name__}: {error})") from error
        # Files that the index names and the folder lacks are opened too: that is what reports them.
        paths += [path for part in sorted(parts) if (path := folder / part) not in paths]
    for path in paths:
        try:
            with safe_open(path, framework="numpy") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} is missing, damaged or cut short: copy it again ({first_line(error)})") from error
    return shapes


def _from_meta(student: StudentConfig) -> ModelShape:
    import torch

    from student_train.model.student import adaptable_layers, meta_causal

    model = meta_causal(student)
    return ModelShape(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_head=sum(parameter.numel() for parameter in model.get_output_embeddings().parameters()),
        linear_widths={
            name: module.in_features + module.out_features
            for name, module in model.get_decoder().named_modules()
            if isinstance(module, torch.nn.Linear)
        },
        adaptable=adaptable_layers(model),
        num_layers=int(model.config.num_hidden_layers),
        hidden_size=int(model.config.hidden_size),
        has_tied_head=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        balance_weight=balance_weight_of(model.config.to_dict()),
    )


def balance_weight_of(config: Mapping[str, Any]) -> float | None:
    """The weight of the balance loss in a model's configuration; None without one."""
    for name, value in config.items():
        if name in BALANCE_WEIGHTS and isinstance(value, int | float):
            return float(value)
        if isinstance(value, Mapping) and (found := balance_weight_of(value)) is not None:
            return found
    return None
