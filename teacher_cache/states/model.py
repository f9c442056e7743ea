"""Facts of a teacher that need no engine: its shape, its head, and its final norm. Torch is loaded only for weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stillroom.cache.features import Head
from stillroom.cache.tensors import bfloat16_bits
from stillroom.errors import ConfigError, DataError, one_line
from stillroom.schema.manifest import Teacher
from teacher_cache.states.config import FeaturesConfig
from teacher_cache.states.engine import HeadWeights, Shape, Wanted

if TYPE_CHECKING:
    import torch
    from torch import nn


def shape_of(teacher: Teacher, trust_remote_code: bool) -> Shape:
    """The teacher's size, from its config.json. Raises DataError if that does not say."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            teacher.model, revision=teacher.revision, trust_remote_code=trust_remote_code
        ).get_text_config()
        return Shape(
            int(config.num_hidden_layers),
            int(config.hidden_size),
            int(config.num_attention_heads),
            int(config.vocab_size),
            # So do both bfloat16 and float16.
            2 if str(config.dtype).endswith("float16") else 4,
        )
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{teacher.model} has no config.json that names layers, heads and width: {error}") from error


def head_bytes_of(config: FeaturesConfig, shape: Shape) -> int:
    """Bytes of the head in the type that the engine loads it with."""
    # vLLM's head is read from the model's files.
    dtype: str = config.engine.dtype if config.engine.kind == "transformers" else "auto"
    num_bytes = shape.weight_bytes if dtype == "auto" else 4 if dtype == "float32" else 2
    return shape.vocab_size * shape.hidden_size * num_bytes


def wanted_of(config: FeaturesConfig, shape: Shape) -> Wanted:
    """Layers by number. Raises ConfigError for a layer that the teacher does not have, or a rank that saves nothing."""
    num_layers = shape.num_layers
    layers = () if config.layers is None else _numbered("layers.at", config.layers.at, num_layers, 1)
    attention = config.attention
    attended = () if attention is None else _numbered("attention.layers", attention.layers, num_layers, 0)
    for name, block in (("last_hidden", config.last_hidden), ("layers", config.layers)):
        if block is not None and block.rank is not None and block.rank >= shape.hidden_size:
            raise ConfigError(
                f"{name}.rank={block.rank} saves nothing, the teacher's width is {shape.hidden_size}: lower it, or set "
                "null to store every channel"
            )
    return Wanted(config.last_hidden is not None, layers, attended, 0 if attention is None else attention.keys)


def head_of(head: "nn.Module", config: Mapping[str, Any], norm: "nn.Module | None") -> HeadWeights:
    """The output layer of a transformers model; `config` is that of its text part."""
    tensors = {name: to_numpy(tensor) for name, tensor in head.named_parameters() if name in ("weight", "bias")}
    scale = 1.0
    # Cohere and Falcon-H1 multiply logits, Granite divides them, Gemma caps them.
    scale *= float(config.get("logit_scale") or 1.0) * float(config.get("lm_head_multiplier") or 1.0)
    # `or`: a key that is there with null means the same as none.
    scale /= float(config.get("logits_scaling") or 1.0)
    softcap = config.get("final_logit_softcapping")
    facts: dict[str, Any] = {}
    if norm is not None:
        epsilon = config.get("rms_norm_eps") or config.get("layer_norm_eps") or config.get("layer_norm_epsilon")
        facts = {"kind": type(norm).__name__, "epsilon": epsilon}
    return HeadWeights(tensors, scale, None if softcap is None else float(softcap), facts)


def final_norm(decoder: "nn.Module") -> "nn.Module | None":
    """The norm between the last decoder layer and the head: the decoder's own child of that name, if there is one."""
    # GPT-2 calls it ln_f, most others norm. The last one: some decoders also norm their embeddings.
    names = [name for name, _ in decoder.named_children() if "norm" in name or name.startswith("ln_f")]
    return decoder.get_submodule(names[-1]) if names else None


def load_outer(teacher: Teacher, trust_remote_code: bool) -> "tuple[nn.Module, nn.Module, dict[str, Any]]":
    """Head and final norm alone, in float32 for the norm, without loading the model; and the text config.

    Raises DataError if the weights are not whole safetensors files, ConfigError for a model without a final norm.
    """
    import torch
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(teacher.model, revision=teacher.revision, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    head, norm = model.get_output_embeddings(), final_norm(model.base_model)
    if norm is None:
        raise ConfigError(f"{type(model).__name__} has no final norm that is known here: use engine.kind: transformers")
    prefixes = {name: module for name, module in model.named_modules() if module in (head, norm)}
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    weights: dict[str, dict[str, torch.Tensor]] = {name: {} for name in prefixes}
    for path in _safetensors_of(teacher):
        try:
            with safe_open(str(path), "pt") as file:
                # Not a dictionary, although it looks like one: only keys() iterates.
                for key in file.keys():  # noqa: SIM118
                    module, _, name = key.rpartition(".")
                    if module in weights:
                        weights[module][name] = file.get_tensor(key)
                    # A tied head has no tensor of its own.
                    elif module == embedding and config.get_text_config().tie_word_embeddings:
                        for own, found in prefixes.items():
                            if found is head:
                                weights[own].setdefault(name, file.get_tensor(key))
        except SafetensorError as error:
            raise DataError(f"{path} is damaged or cut short: copy it again ({one_line(error)})") from error
    for name, module in prefixes.items():
        missing = {key for key, _ in module.named_parameters()} - weights[name].keys()
        if missing:
            raise DataError(f"{teacher.model} has no tensor {name}.{min(missing)} in safetensors files")
        # assign: nothing can be copied into tensors on the meta device.
        module.load_state_dict(weights[name], assign=True, strict=False)
    return head, norm.float(), config.get_text_config().to_dict()


def to_numpy(tensor: "torch.Tensor") -> Any:
    """A contiguous array; bfloat16 as its bits."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    # numpy has no bfloat16.
    return bfloat16_bits(tensor.float().numpy()) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _numbered(key: str, at: Sequence[int | float], num_layers: int, first: int) -> tuple[int, ...]:
    last = num_layers - 1
    found = []
    for one in at:
        # Layer 0 would be the embeddings, and what comes after the last layer is `last_hidden`.
        layer = min(max(round(one * num_layers), first), last) if isinstance(one, float) else one
        if not first <= layer <= last:
            raise ConfigError(f"{key}: {one} is not a layer from {first} to {last} of the teacher's {num_layers}")
        found.append(layer)
    if len(set(found)) < len(found):
        raise ConfigError(f"{key}: two entries mean the same layer ({', '.join(map(str, found))})")
    return tuple(sorted(found))


def _safetensors_of(teacher: Teacher) -> list[Path]:
    folder = Path(teacher.model)
    if not folder.is_dir():
        import huggingface_hub

        try:
            folder = Path(
                huggingface_hub.snapshot_download(
                    teacher.model, revision=teacher.revision, allow_patterns="*.safetensors"
                )
            )
        except (OSError, ValueError) as error:
            raise DataError(f"{teacher.model} cannot be downloaded: {one_line(error)}") from error
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise DataError(f"{teacher.model} has no safetensors files, which engine.kind vllm needs: use transformers")
    return found


def float_head(weights: HeadWeights) -> Head:
    """The head in float32."""
    arrays = {
        # bfloat16 is the upper half of a float32, kept in uint16.
        name: (one.astype(np.uint32) << 16).view(np.float32) if one.dtype == np.uint16 else one.astype(np.float32)
        for name, one in weights.tensors.items()
    }
    return Head(arrays["weight"], arrays.get("bias"), weights.logit_scale, weights.softcap)
