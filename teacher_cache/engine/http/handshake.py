"""Checks that a server serves the teacher: model, vocabulary, tokenizer, length, and the model's own logprobs.

Servers do not report flags that would silently spoil a cache, so a few requests of a few tokens test for them, at the
start and whenever an endpoint comes back (it may have been restarted with other flags). A misfit is a ConfigError that
names the `vllm serve` flag to set. With stillroom's sampler plugin a server gives rows that hold everything, including
exact entropies; without it vLLM gives its top candidates, which is enough if neither draws nor log-partitions are
captured.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from stillroom.config import nearest_name
from stillroom.errors import ConfigError
from stillroom.log import note
from stillroom.schema.records import Capture
from teacher_cache.engine.http.client import HttpClient, Refused, Unavailable
from teacher_cache.engine.http.wire import MALFORMED, Api, CompletionsApi, Form, GenerateApi, Json, Rows
from teacher_cache.engine.row_layout import Layout, UnmarkedRows
from teacher_cache.engine.vllm.fit import VLLM_RANGE

PROBE_TEXT = "The least common multiple of 4 and 6 is 12, as 2 × 6 = 12 = 3 × 4. Überall: 最小公倍数 → \n\tok."
"""Tokenised on both sides, and scored: digits, spaces, and letters of several scripts."""
NUM_PROBE_TOKENS = 16

PROBE_LAYOUT = Layout(1, draws=1, mapped=True)
"""Narrow enough for every --max-logprobs, so that the plugin is detected before the real width is requested."""
NUM_MODE_CANDIDATES = 4

MAX_EXCESS_NATS = 0.05
"""How far rounding may lift a sum of probabilities above 1, as a logarithm."""
CERTAIN_NATS = -1e-4
SURELY_UNCERTAIN_NATS = -0.5

MODE_REMEDY = "start it with --logprobs-mode raw_logprobs (vLLM's default)"

Entropy = Literal["exact", "support"]

NO_TOKEN = 2**31 - 1
"""Outside every vocabulary: the refusal reports the vocabulary size."""
VOCABULARY_SIZE = re.compile(r"Vocabulary size: (\d+)")

NO_ENDPOINT_STATUS = {404, 405}
HIDDEN_STATUS = {403, 404, 405}
"""Of paths that gateways block while they pass on OpenAI's."""
KEY_STATUS = {401, 403}


@dataclass(frozen=True, slots=True)
class Expected:
    """What an endpoint must serve: k candidates per token of a model with this tokenizer and vocabulary, `draws` from
    the rest and log-partitions at `temperatures`. `entropy` None accepts either kind. `extra` is sampling.vllm.
    `is_adapter` says whether `model` must be a LoRA adapter there; None if the name alone identifies the teacher.
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
    extra: Mapping[str, Any] = field(default_factory=dict)
    is_adapter: bool | None = False

    @property
    def plain(self) -> Form:
        """The form without the plugin."""
        return Form(self.k, self.vocab_size)

    @property
    def signals(self) -> Form:
        """The form with the plugin."""
        layout = Layout(self.k, self.draws, self.temperatures, mapped=True)
        return Form(self.k, self.vocab_size, layout)

    @property
    def needing_plugin(self) -> str | None:
        """The setting that needs the plugin, None if none does."""
        if self.draws:
            return "capture.draws"
        return "capture.temperatures" if self.temperatures else None


class KeyRefused(ConfigError):
    """The server rejects or requires an API key: retrying is useless."""


@dataclass(frozen=True, slots=True)
class Served:
    """What is served. `max_model_len` limits a chain; `version` is vLLM's, or `unknown`."""

    model: str
    max_model_len: int
    version: str
    api: Api
    form: Form

    @property
    def entropy(self) -> Entropy:
        """`exact` for entropies of the whole distribution, `support` for those of the candidates."""
        return "support" if self.form.layout is None else "exact"


async def check_server(http: HttpClient, expected: Expected) -> Served:
    """Raises ConfigError if the server does not fit (KeyRefused for the key), Unavailable if it cannot be reached."""
    try:
        model, max_model_len = await _model(http, expected)
        await _check_tokenizer(http, model, expected)
        await _check_vocabulary(http, model, expected)
        api = await _api(http, model)
        form = await _form_of(http, api, model, expected)
        await _check_logprobs(http, api, model, form, expected)
        if expected.extra:
            await _check_extra(http, api, model, expected.extra)
        version = await _version(http)
    except Unavailable as error:
        if error.status in KEY_STATUS:
            raise key_refused(http.url, expected) from error
        raise
    except Refused as error:
        raise ConfigError(f"{http.url} rejects a request that builds need: {error}") from error
    except UnmarkedRows as error:
        raise ConfigError(
            f"{http.url} has workers with stillroom's sampler plugin and others without: install it on all of them"
        ) from error
    except MALFORMED as error:
        raise ConfigError(
            f"{http.url} does not answer like vLLM 0.32 or 0.33 ({' '.join(str(error).split())}): update its vLLM"
        ) from error
    return Served(model, max_model_len - api.num_spare_tokens(form), version, api, form)


def key_refused(url: str, expected: Expected) -> KeyRefused:
    """The error for status 401 or 403."""
    if expected.api_key_env is None:
        remedy = "set engine.api_key_env to the environment variable that holds it"
    else:
        remedy = f"set the right one in the environment variable {expected.api_key_env}"
    return KeyRefused(f"{url} rejects the API key: {remedy}")


async def score_tokens(
    http: HttpClient,
    api: Api,
    model: str,
    token_ids: Sequence[int],
    num_prompt_tokens: int,
    form: Form,
    seed: int = 0,
) -> Capture:
    """Capture of the tokens after the prompt; `seed` is that of their draws. Raises Refused, Unavailable or a type of
    MALFORMED.
    """
    rows = Rows(form)
    answer: Json = await http.post(api.path, api.scoring(model, token_ids, form, seed))
    api.read_scores(answer, token_ids, num_prompt_tokens, rows)
    return rows.capture()


async def _force_token(http: HttpClient, api: Api, model: str, token_ids: Sequence[int], form: Form) -> Capture:
    """Capture of the last token only, generated after the others."""
    rows = Rows(form)
    async for event in http.stream(api.path, api.forced(model, token_ids, form)):
        for choice in event["choices"]:
            api.read(choice, rows)
    return rows.capture()


def _probe_ids(expected: Expected) -> list[int]:
    """PROBE_TEXT in the teacher's tokens."""
    ids: list[int] = expected.tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"]
    return ids


async def _form_of(http: HttpClient, api: Api, model: str, expected: Expected) -> Form:
    """The form of requests. Raises ConfigError if it needs the plugin and the server lacks it."""
    needed_for = expected.needing_plugin
    if needed_for is None and expected.entropy == "exact":
        needed_for = "exact entropies, which this build started with"
    if needed_for is None and (expected.entropy == "support" or _is_too_small(expected)):
        return expected.plain
    if _is_too_small(expected):
        raise ConfigError(
            f"{needed_for} over HTTP needs a vocabulary of {expected.signals.width + 1} tokens, but the teacher has "
            f"{expected.vocab_size}: set capture: {{max_support: {expected.vocab_size}, draws: 0}}"
        )
    try:
        has_plugin = await _has_plugin(http, api, model, expected)
    except Refused as error:
        if needed_for is not None:
            raise _too_few(http, api, expected.signals, error) from error
        # The server allows fewer logprobs than the probe, which may still be enough for very few candidates.
        has_plugin = False
    if has_plugin:
        return expected.signals
    if needed_for is None:
        return expected.plain
    # The plugin is also inactive if logprobs are not the model's own: that would be the better message.
    few = Form(min(expected.k, NUM_MODE_CANDIDATES), expected.vocab_size)
    await _check_logprobs(http, api, model, few, expected)
    instead = "" if expected.entropy == "exact" else ", or set capture: {max_support: 64, draws: 0}"
    raise ConfigError(
        f"{http.url} answers without stillroom's sampler plugin, needed for {needed_for}: pip install stillroom where "
        f"its vllm{VLLM_RANGE} runs (VLLM_PLUGINS, if set there, must name stillroom) and start it with --max-logprobs "
        f"{api.num_logprobs(expected.signals)}{instead}"
    )


def _is_too_small(expected: Expected) -> bool:
    layout = expected.signals.layout
    return layout is not None and layout.min_vocab_size > expected.vocab_size


async def _has_plugin(http: HttpClient, api: Api, model: str, expected: Expected) -> bool:
    form = Form(PROBE_LAYOUT.top, expected.vocab_size, PROBE_LAYOUT)
    try:
        await _force_token(http, api, model, _probe_ids(expected)[:2], form)
    except UnmarkedRows:
        return False
    return True


async def _check_logprobs(http: HttpClient, api: Api, model: str, form: Form, expected: Expected) -> None:
    """Requires enough logprobs, of the model's own distribution at temperature 1."""
    ids = _probe_ids(expected)[:NUM_PROBE_TOKENS]
    try:
        # The least probable token is scored and then forced: flags that change logprobs show in the difference.
        scored = await score_tokens(http, api, model, ids, 1, form)
        # Row i scores token i + 1, because the probe's prompt is its first token.
        least = int(np.argmin(scored.sampled_logprob_T[:-1])) + 1
        forced = await _force_token(http, api, model, ids[: least + 1], form)
    except Refused as error:
        raise _too_few(http, api, form, error) from error
    for capture in (scored, forced):
        with np.errstate(over="ignore"):
            mass_T = np.exp(capture.topk_logprobs_TK.astype(np.float64)).sum(axis=1)
        if not (mass_T < np.exp(MAX_EXCESS_NATS)).all():
            raise ConfigError(f"{http.url} returns logits instead of log probabilities: {MODE_REMEDY}")
    # With one allowed token at temperature 0.5, the logprob is 0 after processing, and the model's own before.
    if forced.sampled_logprob_T[0] > CERTAIN_NATS and scored.sampled_logprob_T[least - 1] < SURELY_UNCERTAIN_NATS:
        raise ConfigError(f"{http.url} returns log probabilities after temperature and truncation: {MODE_REMEDY}")


def _too_few(http: HttpClient, api: Api, form: Form, refused: Refused) -> ConfigError | Refused:
    """The flag to set, or the server's own refusal if that is about something else."""
    if "max allowed" not in str(refused):
        return refused
    wanted = f"capture.max_support={form.k}"
    if form.layout is not None:
        wanted += f" and draws={form.layout.draws}" if form.layout.draws else ""
        wanted += " with stillroom's plugin"
    return ConfigError(
        f"{http.url} returns too few log probabilities for {wanted}: start it with --max-logprobs "
        f"{api.num_logprobs(form)} ({refused})"
    )


async def _model(http: HttpClient, expected: Expected) -> tuple[str, int]:
    """Name and max_model_len."""
    try:
        answer = await http.get("/v1/models")
    except Unavailable as error:
        if error.status in NO_ENDPOINT_STATUS:
            raise ConfigError(f"{http.url} is not an OpenAI-compatible server: it has no /v1/models") from error
        raise
    served = {entry["id"]: entry for entry in answer["data"]}
    if expected.model is None and len(served) != 1:
        raise ConfigError(f"{http.url} serves {', '.join(served) or 'nothing'}: choose one with engine.model")
    name = expected.model or next(iter(served))
    if name not in served:
        raise ConfigError(f"{http.url} serves {', '.join(served)} but not engine.model={name}")
    # An adapter's entry names its base model, whose length is its own.
    base = served[name].get("parent")
    if base is not None and expected.is_adapter is False:
        raise ConfigError(
            f"{http.url} serves {name} as a LoRA adapter of {base}, and chains would be stored as {base}'s own: set "
            "teacher.adapter to the adapter's folder"
        )
    if base is None and expected.is_adapter:
        adapters = [one for one, entry in served.items() if entry.get("parent") is not None]
        raise ConfigError(
            f"{http.url} serves {name} without an adapter: start it with --enable-lora --lora-modules NAME=FOLDER and "
            f"set engine.model to that name (served: {', '.join(adapters) or 'no adapter'})"
        )
    max_model_len = served.get(base or name, {}).get("max_model_len")
    if max_model_len is None:
        raise ConfigError(f"{http.url} is not a vLLM server: it does not report max_model_len of {name}")
    if expected.max_model_len is not None and max_model_len < expected.max_model_len:
        raise ConfigError(
            f"{http.url} has max_model_len {max_model_len}, but {expected.max_model_len} is needed: start it with "
            f"--max-model-len {expected.max_model_len} or lower engine.max_model_len"
        )
    return name, int(max_model_len)


async def _version(http: HttpClient) -> str:
    try:
        return str((await http.get("/version")).get("version", "unknown"))
    except (Unavailable, Refused):
        return "unknown"


async def _check_tokenizer(http: HttpClient, model: str, expected: Expected) -> None:
    body = {"model": model, "prompt": PROBE_TEXT, "add_special_tokens": False}
    try:
        theirs = list((await http.post("/tokenize", body))["tokens"])
    except Unavailable as error:
        if error.status in HIDDEN_STATUS:
            return
        raise
    if theirs != (ours := _probe_ids(expected)):
        raise ConfigError(
            f"{http.url} tokenises text differently from teacher.model ({_start(theirs)} there, {_start(ours)} here): "
            "serve the model that teacher.model names"
        )


async def _check_vocabulary(http: HttpClient, model: str, expected: Expected) -> None:
    # No API reports the width of the logits, but vLLM's refusal of an impossible stop token does.
    body = {"model": model, "prompt": [0], "max_tokens": 1, "stop_token_ids": [NO_TOKEN]}
    try:
        await http.post(CompletionsApi.path, body)
    except Unavailable as error:
        if error.status not in NO_ENDPOINT_STATUS:
            raise
    except Refused as error:
        reported = VOCABULARY_SIZE.search(str(error))
        if reported is None:
            raise
        if int(reported[1]) != expected.vocab_size:
            raise ConfigError(
                f"{http.url} has a vocabulary of {reported[1]}, teacher.model one of {expected.vocab_size}: serve the "
                "model that teacher.model names"
            ) from error


async def _api(http: HttpClient, model: str) -> Api:
    """The cheaper API if the server has it."""
    body = {"model": model, "token_ids": [0], "sampling_params": {"max_tokens": 1}}
    try:
        await http.post(GenerateApi.path, body)
    except Unavailable as error:
        if error.status in HIDDEN_STATUS:
            return CompletionsApi()
        raise
    return GenerateApi()


async def _check_extra(http: HttpClient, api: Api, model: str, extra: Mapping[str, Any]) -> None:
    """Raises ConfigError for a sampling parameter that the server does not know, which it would ignore, or refuses."""
    try:
        openapi = await http.get("/openapi.json")
        body = openapi["paths"][api.path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        schema = _resolved(api.parameters(_resolved(body, openapi)), openapi)
        _require_known(http.url, "sampling.vllm", schema, extra, openapi)
    except (Unavailable, Refused, KeyError):
        note(f"{http.url} does not list its parameters: names in sampling.vllm are not checked")
    try:
        await http.post(api.path, api.trial(model, extra))
    except Refused as error:
        raise ConfigError(f"{http.url} rejects sampling.vllm: {error}") from error


def _require_known(url: str, block: str, schema: Json, given: Mapping[str, Any], openapi: Json) -> None:
    known = schema["properties"]
    for name, value in given.items():
        if name not in known:
            hint = nearest_name(name, list(known))
            raise ConfigError(f"{url} ignores {block}.{name}, which its vLLM does not have{hint}")
        if isinstance(value, Mapping):
            for one in (_resolved(part, openapi) for part in known[name].get("anyOf", [known[name]])):
                if "properties" in one:
                    _require_known(url, f"{block}.{name}", one, value, openapi)


def _resolved(schema: Json, openapi: Json) -> Json:
    """The part of the document that a reference names."""
    found: Json = openapi if "$ref" in schema else schema
    for part in schema.get("$ref", "#").split("/")[1:]:
        found = found[part]
    return found


def _start(ids: Sequence[int]) -> str:
    return f"[{', '.join(map(str, ids[:5]))}, ...]"
