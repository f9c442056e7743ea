"""The teacher in transformers: states of all layers by hooks, attention by the eager path, one forward pass a batch."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from stillroom.errors import ConfigError, DataError, StillroomError, one_line
from stillroom.log import note
from stillroom.schema.manifest import Teacher
from teacher_cache.engine.teacher import require_whole_weights
from teacher_cache.states.config import TransformersConfig
from teacher_cache.states.engine import AttendedKeys, ChainTokens, HeadWeights, States, Wanted
from teacher_cache.states.model import final_norm, head_of

if TYPE_CHECKING:
    import torch
    from torch import nn


ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")


class TransformersStates:
    """Implements teacher_cache.states.engine.StatesEngine."""

    is_teacher = True

    def __init__(self, teacher: Teacher, trust_remote_code: bool, config: TransformersConfig, wanted: Wanted) -> None:
        """Loads the model. Raises ConfigError if its layers cannot be found, DataError if it cannot be loaded."""
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM

        self._wanted = wanted
        self._device = _device(config.device)
        note(f"loading {teacher.model} in transformers")
        # Only the eager path forms the attention weights.
        attention = "eager" if wanted.attention else "sdpa"
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                teacher.model,
                revision=teacher.revision,
                trust_remote_code=trust_remote_code,
                dtype=config.dtype,
                attn_implementation=attention,
            )
            if teacher.adapter is not None:
                model = _merged(model, teacher.adapter)
            self._model: nn.Module = model.to(self._device).eval()
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            require_whole_weights(teacher.model)
            raise DataError(f"transformers cannot load {teacher.model}: {one_line(error)}") from error
        self._decoder = model.base_model
        config_of_text = model.config.get_text_config()
        self._config: dict[str, Any] = config_of_text.to_dict()
        # Not from the dictionary: GPT-2 calls it n_layer there.
        self._layers = _decoder_layers(self._decoder, config_of_text.num_hidden_layers)
        self.settings: Mapping[str, Any] = {
            "kind": "transformers",
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(self._device),
            "attention": attention,
        }
        self.software: Mapping[str, str] = {name: version(name) for name in ("torch", "transformers")}

    def head(self) -> HeadWeights:
        """The output layer as loaded."""
        model: Any = self._model
        head = model.get_output_embeddings()
        if head is None:
            raise ConfigError(f"last_hidden: {type(model).__name__} has no output layer")
        return head_of(head, self._config, final_norm(self._decoder))

    def run(self, chains: Sequence[ChainTokens]) -> list[States]:
        """One forward pass, padded on the right: causal attention never looks there."""
        import torch

        longest = max(len(chain.inputs) for chain in chains)
        ids_BL = torch.zeros((len(chains), longest), dtype=torch.long)
        mask_BL = torch.zeros_like(ids_BL)
        for row, chain in enumerate(chains):
            ids_BL[row, : len(chain.inputs)] = torch.tensor(chain.inputs)
            mask_BL[row, : len(chain.inputs)] = 1
        seen = _Seen(chains)
        try:
            with torch.inference_mode(), self._hooked(seen):
                output = self._decoder(
                    input_ids=ids_BL.to(self._device), attention_mask=mask_BL.to(self._device), use_cache=False
                )
        except (RuntimeError, ValueError) as error:
            raise StillroomError(
                f"the teacher failed on a batch of {ids_BL.numel()} tokens: {one_line(error)}"
            ) from error
        if self._wanted.hidden:
            seen.hidden = seen.picked(output.last_hidden_state)
        return [
            States(
                seen.hidden[row] if self._wanted.hidden else None,
                {layer: found[row] for layer, found in seen.layers.items()},
                {layer: found[row] for layer, found in seen.attention.items()},
            )
            for row in range(len(chains))
        ]

    def close(self) -> None:
        """Frees the model."""
        import torch

        del self._model, self._decoder, self._layers
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def _hooked(self, seen: "_Seen") -> Iterator[None]:
        """Keeps what the wanted layers return; hooks rather than output_hidden_states, which keeps every layer's."""
        with contextlib.ExitStack() as stack:
            for number in self._wanted.layers:
                # The stream after `number` layers is what layer number - 1, from 0, returns.
                hook = self._layers[number - 1].register_forward_hook(_stream_hook(seen, number))
                stack.callback(hook.remove)
            for number in self._wanted.attention:
                module = _attention_of(self._layers[number], number)
                hook = module.register_forward_hook(_attention_hook(seen, number, self._wanted.num_keys))
                stack.callback(hook.remove)
            yield


class _Seen:
    """What one forward pass has shown, by chain."""

    def __init__(self, chains: Sequence[ChainTokens]) -> None:
        self.chains = chains
        self.hidden: list[Any] = []
        self.layers: dict[int, list[Any]] = {}
        self.attention: dict[int, list[AttendedKeys]] = {}

    def picked(self, states_BLD: "torch.Tensor") -> list[Any]:
        """The rows of each chain's queries, float32 on the CPU."""
        return [
            # numpy has no bfloat16, so float32 comes first.
            states_BLD[row, chain.query_P.astype(np.int64)].float().cpu().numpy()
            for row, chain in enumerate(self.chains)
        ]


def _stream_hook(seen: _Seen, number: int) -> Callable[..., None]:
    def hook(module: Any, inputs: Any, output: Any) -> None:
        seen.layers[number] = seen.picked(output[0] if isinstance(output, tuple) else output)

    return hook


def _attention_hook(seen: _Seen, number: int, num_keys: int) -> Callable[..., None]:
    def hook(module: Any, inputs: Any, output: Any) -> None:
        if not isinstance(output, tuple) or output[1] is None:
            raise ConfigError(
                f"attention: decoder layer {number} ({type(module).__name__}) returns no attention weights"
            )
        seen.attention[number] = [_attended(output[1][row], chain, num_keys) for row, chain in enumerate(seen.chains)]

    return hook


def _attended(weights_HLK: "torch.Tensor", chain: ChainTokens, num_keys: int) -> AttendedKeys:
    import torch

    query_P = torch.from_numpy(chain.query_P.astype(np.int64)).to(weights_HLK.device)
    num_inputs = len(chain.inputs)
    # Keys past the chain are padding, with weight 0.
    weights_PHK = weights_HLK[:, query_P, :num_inputs].transpose(0, 1).float()
    kept = min(num_keys, num_inputs)
    best = weights_PHK.topk(kept, dim=-1)
    keys_PHM = torch.where(best.values > 0, best.indices, 0)
    # xlogy is 0 at 0, where w log w would be nan; masked keys have weight 0.
    entropy_PH = -torch.special.xlogy(weights_PHK, weights_PHK).sum(dim=-1)
    # Relative to the entropy of looking everywhere alike, or late queries would decide alone.
    relative_PH = entropy_PH / torch.log(query_P.float() + 1).clamp(min=1e-6)[:, None]
    pad = ((0, 0), (0, 0), (0, num_keys - kept))
    return AttendedKeys(
        np.pad(keys_PHM.int().cpu().numpy(), pad),
        np.pad(best.values.cpu().numpy(), pad),
        relative_PH.mean(dim=0).cpu().numpy(),
    )


def _merged(model: Any, adapter: str) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ConfigError("teacher.adapter needs peft here: pip install peft") from error
    # Merged rather than beside the weights: the head that is stored must be the one that belongs to the states.
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def _device(name: str | None) -> "torch.device":
    """The device of this name, or the first GPU. Raises ConfigError for one that is not there."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        # A name alone proves nothing: `cuda:1` is valid on a machine without GPU.
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"engine.device: {name} cannot be used here: {one_line(error)[:200]}") from error
    return device


def _attention_of(layer: "nn.Module", number: int) -> "nn.Module":
    """The attention of a decoder layer: `self_attn`, `attn`, `attention` or `self_attention`."""
    for name, module in layer.named_children():
        if name in ATTENTION_NAMES:
            return module
    raise ConfigError(f"attention.layers: decoder layer {number} ({type(layer).__name__}) has no attention")


def _decoder_layers(decoder: "nn.Module", num_layers: int) -> Any:
    from torch import nn

    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ConfigError(f"{type(decoder).__name__} has no list of {num_layers} decoder layers that is known here")
