"""In which form a server is asked about its tokens, and whether what it answers is the model's own distribution.

With stillroom's sampler plugin a server gives rows that hold everything; entropies are then exact. Without it vLLM
gives its top candidates, which is enough where neither draws nor log-partitions are wanted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from schemas.records import Capture
from shared.errors import ConfigError
from teacher_cache.http_engine.answer_rows import Form, Rows
from teacher_cache.http_engine.http_client import HttpClient, Refused
from teacher_cache.http_engine.wire import Api, Json
from teacher_cache.vllm_engine.wide_rows import Layout, UnmarkedRows

PROBE_TEXT = "The least common multiple of 4 and 6 is 12, as 2 × 6 = 12 = 3 × 4. Überall: 最小公倍数 → \n\tok."
"""Turned into tokens on both sides, and scored: digits, spaces, and letters of several scripts."""
NUM_PROBE_TOKENS = 16

PROBE_LAYOUT = Layout(1, draws=1, mapped=True)
"""Narrow enough for every --max-logprobs: whether there is a plugin is known before what it is to be asked."""
NUM_MODE_CANDIDATES = 4

MAX_EXCESS_NATS = 0.05
"""How far rounding may lift a sum of probabilities above 1."""
CERTAIN_NATS = -1e-4
SURELY_UNCERTAIN_NATS = -0.5

MODE_REMEDY = "start it with --logprobs-mode raw_logprobs (vLLM's default)"

Entropy = Literal["exact", "support"]


@dataclass(frozen=True, slots=True)
class Expected:
    """What must be served: k candidates a token of a model with this tokenizer and vocabulary, `draws` from the rest
    and log-partitions at `temperatures`. `entropy` None takes what there is.
    """

    model: str | None
    api_key_env: str | None
    max_model_len: int | None
    k: int
    draws: int
    temperatures: tuple[float, ...]
    vocab_size: int
    tokenizer: Any
    entropy: Entropy | None = None

    @property
    def plain(self) -> Form:
        """What vLLM gives without the plugin."""
        return Form(self.k, self.vocab_size)

    @property
    def signals(self) -> Form:
        """What it gives with the plugin."""
        layout = Layout(self.k, self.draws, self.temperatures, mapped=True)
        return Form(self.k, self.vocab_size, layout)

    @property
    def needing_plugin(self) -> str | None:
        """The setting that cannot be had without the plugin, None where everything can."""
        if self.draws:
            return "capture.draws"
        return "capture.temperatures" if self.temperatures else None


async def form_of(http: HttpClient, api: Api, model: str, expected: Expected) -> Form:
    """In which form tokens are asked for. Raises ConfigError where it needs a plugin that is not at work."""
    needed_for = expected.needing_plugin
    if needed_for is None and expected.entropy == "exact":
        needed_for = "exact entropies, which the build was begun with"
    if needed_for is None and (expected.entropy == "support" or _is_too_small(expected)):
        return expected.plain
    if _is_too_small(expected):
        raise ConfigError(
            f"{needed_for} over HTTP needs a vocabulary of {expected.signals.width + 1} tokens, the teacher's has "
            f"{expected.vocab_size}: set capture: {{max_support: {expected.vocab_size}, draws: 0}}"
        )
    try:
        has_plugin = await _has_plugin(http, api, model, expected)
    except Refused as error:
        if needed_for is not None:
            raise _too_few(http, api, expected.signals, error) from error
        # Not even the probe's few: what remains may do for very few candidates.
        has_plugin = False
    if has_plugin:
        return expected.signals
    if needed_for is None:
        return expected.plain
    # The plugin is silent, too, where log probabilities are not the model's own.
    few = Form(min(expected.k, NUM_MODE_CANDIDATES), expected.vocab_size)
    await check_logprobs(http, api, model, few, expected)
    instead = "" if expected.entropy == "exact" else ", or set capture: {max_support: 64, draws: 0}"
    raise ConfigError(
        f"{http.url} answers without stillroom's sampler plugin, needed for {needed_for}: pip install stillroom where "
        "its vllm 0.32.0 runs (VLLM_PLUGINS, if set there, must name stillroom) and start it with --max-logprobs "
        f"{api.num_logprobs(expected.signals)}{instead}"
    )


def _is_too_small(expected: Expected) -> bool:
    layout = expected.signals.layout
    return layout is not None and layout.min_vocab_size > expected.vocab_size


async def _has_plugin(http: HttpClient, api: Api, model: str, expected: Expected) -> bool:
    form = Form(PROBE_LAYOUT.top, expected.vocab_size, PROBE_LAYOUT)
    try:
        await force_token(http, api, model, probe_ids(expected)[:2], form)
    except UnmarkedRows:
        return False
    return True


async def check_logprobs(http: HttpClient, api: Api, model: str, form: Form, expected: Expected) -> None:
    """That enough are given, and that they are the model's own distribution at temperature 1."""
    ids = probe_ids(expected)[:NUM_PROBE_TOKENS]
    try:
        scored = await score_tokens(http, api, model, ids, 1, form)
        least = int(np.argmin(scored.sampled_logprob_T[:-1])) + 1
        forced = await force_token(http, api, model, ids[: least + 1], form)
    except Refused as error:
        raise _too_few(http, api, form, error) from error
    for capture in (scored, forced):
        with np.errstate(over="ignore"):
            mass_T = np.exp(capture.topk_logprobs_TK.astype(np.float64)).sum(axis=1)
        if not (mass_T < np.exp(MAX_EXCESS_NATS)).all():
            raise ConfigError(f"{http.url} gives logits where log probabilities belong: {MODE_REMEDY}")
    # One allowed token at temperature 0.5 has log probability 0 after processing, and its own before.
    if forced.sampled_logprob_T[0] > CERTAIN_NATS and scored.sampled_logprob_T[least - 1] < SURELY_UNCERTAIN_NATS:
        raise ConfigError(f"{http.url} gives log probabilities after temperature and truncation: {MODE_REMEDY}")


def _too_few(http: HttpClient, api: Api, form: Form, refused: Refused) -> ConfigError | Refused:
    """What to say of a refusal: the flag to set, or the server's own words where they are about something else."""
    if "max allowed" not in str(refused):
        return refused
    asked_for = f"capture.max_support={form.k}"
    if form.layout is not None:
        asked_for += f" and draws={form.layout.draws}" if form.layout.draws else ""
        asked_for += " with stillroom's plugin"
    return ConfigError(
        f"{http.url} gives too few log probabilities for {asked_for}: start it with --max-logprobs "
        f"{api.num_logprobs(form)} ({refused})"
    )


async def force_token(http: HttpClient, api: Api, model: str, token_ids: Sequence[int], form: Form) -> Capture:
    """Capture of the last token alone, generated after the others."""
    rows = Rows(form)
    async for event in http.stream(api.path, api.forced(model, token_ids, form)):
        for choice in event["choices"]:
            api.read(choice, rows)
    return rows.capture()


async def score_tokens(
    http: HttpClient,
    api: Api,
    model: str,
    token_ids: Sequence[int],
    num_prompt_tokens: int,
    form: Form,
    seed: int = 0,
) -> Capture:
    """Capture of the tokens after the prompt; `seed` is that of their draws. Raises Refused, Unavailable or one of
    MALFORMED.
    """
    rows = Rows(form)
    answer: Json = await http.post(api.path, api.scoring(model, token_ids, form, seed))
    api.read_scores(answer, token_ids, num_prompt_tokens, rows)
    return rows.capture()


def probe_ids(expected: Expected) -> list[int]:
    """PROBE_TEXT in the teacher's tokens."""
    ids: list[int] = expected.tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"]
    return ids
