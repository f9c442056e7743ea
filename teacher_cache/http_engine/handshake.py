"""Whether a server serves the teacher: its model, vocabulary, tokenizer, length, and log probabilities as they must be.

A handful of requests of a few tokens, at the start and whenever an endpoint comes back (it may have been started anew
with other flags). A misfit is a ConfigError that names the flag of `vllm serve` to set.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from schemas.records import Capture
from shared.errors import ConfigError
from teacher_cache.http_engine.http_client import HttpClient, Refused, Unavailable
from teacher_cache.http_engine.wire import MALFORMED, Api, CompletionsApi, GenerateApi, Json, Rows

PROBE_TEXT = "The least common multiple of 4 and 6 is 12, as 2 × 6 = 12 = 3 × 4. Überall: 最小公倍数 → \n\tok."
"""Turned into tokens on both sides, and scored: digits, spaces, and letters of several scripts."""
NUM_PROBE_TOKENS = 16

NO_TOKEN = 2**31 - 1
"""Outside every vocabulary: the refusal says how large the vocabulary is."""
VOCABULARY_SIZE = re.compile(r"Vocabulary size: (\d+)")

MAX_EXCESS_NATS = 0.05
"""How far rounding may lift a sum of probabilities above 1."""
CERTAIN_NATS = -1e-4
SURELY_UNCERTAIN_NATS = -0.5

NO_ENDPOINT_STATUS = {404, 405}
KEY_STATUS = {401, 403}


@dataclass(frozen=True, slots=True)
class Expected:
    """What must be served: k candidates a token of a model with this tokenizer and vocabulary."""

    model: str | None
    api_key_env: str | None
    max_model_len: int | None
    k: int
    vocab_size: int
    tokenizer: Any


@dataclass(frozen=True, slots=True)
class Served:
    """What is served. `max_model_len` is what a chain may take; `version` is vLLM's, `unknown` where it is not told."""

    model: str
    max_model_len: int
    version: str
    api: Api
    num_logprobs: int


async def shake_hands(http: HttpClient, expected: Expected) -> Served:
    """Raises ConfigError where the server does not fit, Unavailable where it cannot be asked."""
    try:
        model, max_model_len = await _model(http, expected)
        await _check_tokenizer(http, model, expected)
        await _check_vocabulary(http, model, expected)
        api = await _api(http, model)
        num_logprobs = api.num_logprobs(expected.k, expected.vocab_size)
        await _check_logprobs(http, api, model, num_logprobs, expected)
    except Refused as error:
        raise ConfigError(f"{http.url} refuses a request that a build needs: {error}") from error
    except MALFORMED as error:
        raise ConfigError(
            f"{http.url} answers otherwise than vLLM 0.32 ({' '.join(str(error).split())}): update its vLLM"
        ) from error
    return Served(model, max_model_len - api.num_spare_tokens, await _version(http), api, num_logprobs)


async def _model(http: HttpClient, expected: Expected) -> tuple[str, int]:
    """Name and max_model_len."""
    try:
        answer = await http.get("/v1/models")
    except Unavailable as error:
        if error.status in KEY_STATUS:
            raise ConfigError(f"{http.url} refuses the API key: {_key_remedy(expected)}") from error
        if error.status in NO_ENDPOINT_STATUS:
            raise ConfigError(f"{http.url} is no OpenAI-compatible server: it has no /v1/models") from error
        raise
    served = {entry["id"]: entry for entry in answer["data"]}
    if expected.model is None and len(served) != 1:
        raise ConfigError(f"{http.url} serves {', '.join(served) or 'nothing'}: name one with engine.model")
    name = expected.model or next(iter(served))
    if name not in served:
        raise ConfigError(f"{http.url} serves {', '.join(served)} and no engine.model={name}")
    max_model_len = served[name].get("max_model_len")
    if max_model_len is None:
        raise ConfigError(f"{http.url} is no vLLM server: it does not tell the max_model_len of {name}")
    if expected.max_model_len is not None and max_model_len < expected.max_model_len:
        raise ConfigError(
            f"{http.url} has max_model_len {max_model_len}, the build needs {expected.max_model_len}: start it with "
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
        # Proxies pass on the paths of OpenAI alone.
        if error.status in NO_ENDPOINT_STATUS:
            return
        raise
    if theirs != (ours := _probe_ids(expected)):
        raise ConfigError(
            f"{http.url} turns text into other tokens than teacher.model (it makes {_start(theirs)} of what is "
            f"{_start(ours)} here): let it serve the model that teacher.model names"
        )


async def _check_vocabulary(http: HttpClient, model: str, expected: Expected) -> None:
    body = {"model": model, "prompt": [0], "max_tokens": 1, "stop_token_ids": [NO_TOKEN]}
    try:
        await http.post(CompletionsApi.path, body)
    except Unavailable as error:
        if error.status not in NO_ENDPOINT_STATUS:
            raise
    except Refused as error:
        told = VOCABULARY_SIZE.search(str(error))
        if told is None:
            raise
        if int(told[1]) != expected.vocab_size:
            raise ConfigError(
                f"{http.url} has a vocabulary of {told[1]}, teacher.model one of {expected.vocab_size}: let it serve "
                "the model that teacher.model names"
            ) from error


async def _api(http: HttpClient, model: str) -> Api:
    """The better way where there is one."""
    body = {"model": model, "token_ids": [0], "sampling_params": {"max_tokens": 1}}
    try:
        await http.post(GenerateApi.path, body)
    except Unavailable as error:
        if error.status in NO_ENDPOINT_STATUS:
            return CompletionsApi()
        raise
    return GenerateApi()


async def _check_logprobs(http: HttpClient, api: Api, model: str, num_logprobs: int, expected: Expected) -> None:
    """That enough are given, and that they are the model's own distribution at temperature 1."""
    ids = _probe_ids(expected)[:NUM_PROBE_TOKENS]
    try:
        scored = await score_tokens(http, api, model, ids, 1, expected.k, num_logprobs)
        least = int(np.argmin(scored.sampled_logprob_T[:-1])) + 1
        forced = await force_token(http, api, model, ids[: least + 1], expected.k, num_logprobs)
    except Refused as error:
        if "max allowed" not in str(error):
            raise
        raise ConfigError(
            f"{http.url} gives too few log probabilities for capture.max_support={expected.k}: start it with "
            f"--max-logprobs {num_logprobs} ({error})"
        ) from error
    for capture in (scored, forced):
        with np.errstate(over="ignore"):
            mass_T = np.exp(capture.topk_logprobs_TK.astype(np.float64)).sum(axis=1)
        if not (mass_T < np.exp(MAX_EXCESS_NATS)).all():
            raise ConfigError(f"{http.url} gives logits where log probabilities belong: {_MODE_REMEDY}")
    # One allowed token at temperature 0.5 has log probability 0 after processing, and its own before.
    if forced.sampled_logprob_T[0] > CERTAIN_NATS and scored.sampled_logprob_T[least - 1] < SURELY_UNCERTAIN_NATS:
        raise ConfigError(f"{http.url} gives log probabilities after temperature and truncation: {_MODE_REMEDY}")


_MODE_REMEDY = "start it with --logprobs-mode raw_logprobs (vLLM's default)"


async def force_token(
    http: HttpClient, api: Api, model: str, token_ids: Sequence[int], k: int, num_logprobs: int
) -> Capture:
    """Capture of the last token alone, generated after the others."""
    rows = Rows(k)
    async for event in http.stream(api.path, api.forced(model, token_ids, num_logprobs)):
        for choice in event["choices"]:
            api.read(choice, rows)
    return rows.capture()


async def score_tokens(
    http: HttpClient, api: Api, model: str, token_ids: Sequence[int], num_prompt_tokens: int, k: int, num_logprobs: int
) -> Capture:
    """Capture of the tokens after the prompt. Raises Refused, Unavailable or BadAnswer."""
    rows = Rows(k)
    answer: Json = await http.post(api.path, api.scoring(model, token_ids, k, num_logprobs))
    api.read_scores(answer, token_ids, num_prompt_tokens, rows)
    return rows.capture()


def _probe_ids(expected: Expected) -> list[int]:
    ids: list[int] = expected.tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"]
    return ids


def _key_remedy(expected: Expected) -> str:
    if expected.api_key_env is None:
        return "name the environment variable that holds it with engine.api_key_env"
    return f"set the right one in the environment variable {expected.api_key_env}"


def _start(ids: Sequence[int]) -> str:
    return f"[{', '.join(map(str, ids[:5]))}, ...]"
