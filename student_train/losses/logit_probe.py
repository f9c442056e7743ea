"""What a model does between its last hidden states and its logits, found by running it: configurations do not say.

In: a Hugging Face causal model. Out: `LogitMap`, which the fused head repeats. Cost: two passes over a few tokens.

The first pass gives the decoder's hidden states as training reads them. In the second one, of the whole model, the
head's input is recorded and its output replaced by chosen numbers: input over hidden states is the factor before the
head (MiniCPM), logits over chosen numbers the factor after it (Cohere, Granite, Falcon-H1), and the logit of a huge
number the cap (Gemma 2, xLSTM).

    L tokens, V vocabulary, H hidden
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from stillroom.errors import ConfigError, one_line
from student_train.losses.head_chunks import PLAIN, LogitMap

NUM_TOKENS = 4
STEEP = 14.0
"""The chosen numbers are sinh(-STEEP..STEEP): 0.05 to 6e5, so that slope and cap of any map show."""


def probe_logits(causal: Any) -> LogitMap:
    """Raises ConfigError unless logits are the head's product with the decoder's hidden states, scaled or capped."""
    try:
        with ready_for_trial(causal):
            try:
                return _probe(causal)
            except RuntimeError as missing_kernel:
                with _without_decoder(causal), contextlib.suppress(AttributeError):
                    return _probe(causal)
                raise missing_kernel
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise _refused(causal, f"a few tokens cannot be run through it ({one_line(error)[:200]})") from error


@contextlib.contextmanager
def ready_for_trial(causal: Any) -> Iterator[None]:
    """Lets a model run in CPU memory, where models are tried: without dropout and without GPU-only kernels."""
    was_training, attention = causal.training, causal.config._attn_implementation
    causal.eval()
    causal.set_attn_implementation("eager" if attention == "eager" else "sdpa")
    try:
        yield
    finally:
        causal.set_attn_implementation(attention)
        causal.train(was_training)


def _probe(causal: Any) -> LogitMap:
    hidden_LH = _hidden(causal)
    head_input_LH, z_V, logits_LV = _run(causal)
    hidden_scale = _ratio(head_input_LH, hidden_LH, causal)
    # Every token's head output was the same z, so rows that differ have another cause.
    if not torch.equal(logits_LV, logits_LV[:1].expand_as(logits_LV)):
        raise _refused(causal, "its logits depend on more than the head's output")
    return _fit(causal, hidden_scale, z_V, logits_LV[0])


@contextlib.contextmanager
def _without_decoder(causal: Any) -> Iterator[None]:
    """Replaces the decoder, whose kernels this machine lacks, by fixed hidden states."""
    from transformers.modeling_outputs import MoeModelOutputWithPast

    decoder, head = causal.get_decoder(), causal.get_output_embeddings()
    shape = (1, NUM_TOKENS, head.in_features)
    hidden_1LH = torch.linspace(-1.0, 1.0, math.prod(shape)).reshape(shape).to(head.weight)
    decoder.forward = lambda *_, **__: MoeModelOutputWithPast(last_hidden_state=hidden_1LH)  # type: ignore[arg-type]
    try:
        yield
    finally:
        del decoder.forward


def trial_ids(causal: Any) -> Tensor:
    """A few token ids [1, L]."""
    weight = causal.get_input_embeddings().weight
    return (torch.arange(NUM_TOKENS, device=weight.device) + 1).remainder(len(weight)).unsqueeze(0)


@torch.no_grad()
def _hidden(causal: Any) -> Tensor:
    hidden_LH: Tensor = causal.get_decoder()(input_ids=trial_ids(causal), use_cache=False).last_hidden_state[0]
    return hidden_LH


@torch.no_grad()
def _run(causal: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(the head's input [L, H], chosen head outputs z [V], the model's logits for them [L, V])."""
    head = causal.get_output_embeddings()
    z_V = torch.linspace(-STEEP, STEEP, len(head.weight), dtype=torch.float64).sinh().float().to(head.weight.device)
    inputs: list[Tensor] = []

    def replace(_: torch.nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # The head's output is replaced by known numbers: what the model makes of them is its map from z to logits.
        inputs.append(given[0].detach())
        return z_V.expand(output.shape)

    hook = head.register_forward_hook(replace)
    try:
        logits_1LV = causal(input_ids=trial_ids(causal), use_cache=False).logits
    finally:
        hook.remove()
    if len(inputs) != 1 or logits_1LV.shape != (1, NUM_TOKENS, len(z_V)):
        raise _refused(causal, "its head is not called once for all tokens")
    return inputs[0].reshape(NUM_TOKENS, -1), z_V, logits_1LV[0]


def _ratio(head_input_LH: Tensor, hidden_LH: Tensor, causal: Any) -> float:
    """head_input / hidden, which must be one number."""
    if head_input_LH.shape != hidden_LH.shape:
        raise _refused(causal, "its head does not read the decoder's last hidden states")
    if torch.equal(head_input_LH, hidden_LH) or not bool(torch.isfinite(hidden_LH).all()):
        # Weights that are not finite are reported by the first step.
        return 1.0
    input_LH, given_LH = head_input_LH.double(), hidden_LH.double()
    found = float((input_LH * given_LH).sum() / given_LH.square().sum())
    scale = _exact(causal, found, head_input_LH.dtype)
    error = float((input_LH - scale * given_LH).abs().max() / input_LH.abs().max())
    # Not `error >= ...`: nan must be refused too.
    if not error < _tolerance(hidden_LH.dtype):
        raise _refused(causal, f"its head does not read the decoder's last hidden states (difference {error:.1e})")
    return scale


def _fit(causal: Any, hidden_scale: float, z_V: Tensor, logits_V: Tensor) -> LogitMap:
    """The map from z to the logits that the model makes of it."""
    if torch.equal(logits_V, z_V.to(logits_V.dtype)):
        return LogitMap(hidden_scale) if hidden_scale != 1.0 else PLAIN
    z, logits, dtype = z_V.double(), logits_V.double(), logits_V.dtype
    cap = None
    # Where a fourth of the largest number gives nearly the same logit, there is a cap.
    if float(logits[-1]) > 0 and abs(float(logits[-1] / logits[-len(z) // 20])) < 1.5:
        cap = _exact(causal, float(logits[-1]), dtype)
        bent = logits.abs() < cap / 2
        z, logits = z[bent], cap * torch.atanh(logits[bent] / cap)
    # Half precision overflows at the largest numbers.
    usable = (z.abs() > z.abs().max() / 1000) & logits.isfinite()
    scale = _exact(causal, float((logits[usable] / z[usable]).mean()), dtype)
    finite = logits_V.isfinite()
    z, logits = z_V[finite].double(), logits_V[finite].double()
    fitted = scale * z if cap is None else cap * torch.tanh(scale * z / cap)
    error = float(((fitted - logits).abs() / logits.abs().clamp(min=1e-3)).max())
    if not error < _tolerance(dtype):
        raise _refused(
            causal, f"it changes the head's logits by more than a factor or a soft cap (difference {error:.1e})"
        )
    return LogitMap(hidden_scale, scale, cap)


def _exact(causal: Any, found: float, dtype: torch.dtype) -> float:
    """The number of the configuration, or its inverse, or the ratio of two, that was measured as `found`."""
    # A pass of the model measures with rounding; a configuration holds the exact number.
    numbers = list(dict.fromkeys([1.0, *_numbers(causal.config.to_dict())]))
    for known in (numbers, [1.0 / one for one in numbers], [one / other for one in numbers for other in numbers]):
        nearest = min(known, key=lambda one: abs(one - found))
        if math.isclose(nearest, found, rel_tol=_tolerance(dtype) / 10):
            return nearest
    return found


def _numbers(config: Mapping[str, Any]) -> Iterator[float]:
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and math.isfinite(value):
            yield float(value)


def _tolerance(dtype: torch.dtype) -> float:
    return 2e-2 if dtype.itemsize == 2 else 1e-5


def _refused(causal: Any, why: str) -> ConfigError:
    return ConfigError(f"{type(causal).__name__} cannot be trained: {why}; losses are fused with the head")
