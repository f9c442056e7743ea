"""Whether a server serves the teacher: its model, vocabulary, tokenizer, length, and log probabilities as they must be.

A handful of requests of a few tokens, at the start and whenever an endpoint comes back (it may have been started anew
with other flags). A misfit is a ConfigError that names the flag of `vllm serve` to set. Whether the server has the
sampler plugin decides in which form it is asked: with it, entropies are exact; draws and log-partitions need it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from shared.errors import ConfigError
from teacher_cache.http_engine.answer_rows import MALFORMED, Form
from teacher_cache.http_engine.form_check import PROBE_TEXT, Entropy, Expected, check_logprobs, form_of, probe_ids
from teacher_cache.http_engine.http_client import HttpClient, Refused, Unavailable
from teacher_cache.http_engine.wire import Api, CompletionsApi, GenerateApi
from teacher_cache.vllm_engine.wide_rows import UnmarkedRows

NO_TOKEN = 2**31 - 1
"""Outside every vocabulary: the refusal says how large the vocabulary is."""
VOCABULARY_SIZE = re.compile(r"Vocabulary size: (\d+)")

NO_ENDPOINT_STATUS = {404, 405}
HIDDEN_STATUS = {403, 404, 405}
"""Of paths that proxies keep to themselves while they pass on those of OpenAI."""
KEY_STATUS = {401, 403}


class KeyRefused(ConfigError):
    """The server does not take the API key, or wants one: no use in asking again."""


@dataclass(frozen=True, slots=True)
class Served:
    """What is served. `max_model_len` is what a chain may take; `version` is vLLM's, `unknown` where it is not told."""

    model: str
    max_model_len: int
    version: str
    api: Api
    form: Form

    @property
    def entropy(self) -> Entropy:
        """Of the whole distribution, or of the candidates."""
        return "support" if self.form.layout is None else "exact"


async def shake_hands(http: HttpClient, expected: Expected) -> Served:
    """Raises ConfigError where the server does not fit, its KeyRefused for the key, Unavailable where it cannot be
    asked.
    """
    try:
        model, max_model_len = await _model(http, expected)
        await _check_tokenizer(http, model, expected)
        await _check_vocabulary(http, model, expected)
        api = await _api(http, model)
        form = await form_of(http, api, model, expected)
        await check_logprobs(http, api, model, form, expected)
        version = await _version(http)
    except Unavailable as error:
        if error.status in KEY_STATUS:
            raise key_refused(http.url, expected) from error
        raise
    except Refused as error:
        raise ConfigError(f"{http.url} refuses a request that a build needs: {error}") from error
    except UnmarkedRows as error:
        raise ConfigError(
            f"{http.url} has workers with stillroom's sampler plugin and others without: install it for all of them"
        ) from error
    except MALFORMED as error:
        raise ConfigError(
            f"{http.url} answers otherwise than vLLM 0.32 ({' '.join(str(error).split())}): update its vLLM"
        ) from error
    return Served(model, max_model_len - api.num_spare_tokens(form), version, api, form)


def key_refused(url: str, expected: Expected) -> KeyRefused:
    """What to tell of a status 401 or 403."""
    if expected.api_key_env is None:
        remedy = "name the environment variable that holds it with engine.api_key_env"
    else:
        remedy = f"set the right one in the environment variable {expected.api_key_env}"
    return KeyRefused(f"{url} refuses the API key: {remedy}")


async def _model(http: HttpClient, expected: Expected) -> tuple[str, int]:
    """Name and max_model_len."""
    try:
        answer = await http.get("/v1/models")
    except Unavailable as error:
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
        if error.status in HIDDEN_STATUS:
            return
        raise
    if theirs != (ours := probe_ids(expected)):
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
        if error.status in HIDDEN_STATUS:
            return CompletionsApi()
        raise
    return GenerateApi()


def _start(ids: Sequence[int]) -> str:
    return f"[{', '.join(map(str, ids[:5]))}, ...]"
