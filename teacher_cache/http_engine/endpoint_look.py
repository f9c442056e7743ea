"""A look at the endpoints of a server engine, without a build: for `plan` and `doctor`."""

import asyncio
from dataclasses import dataclass

from shared.errors import ConfigError
from teacher_cache.config import CaptureConfig
from teacher_cache.engine_config import ServerConfig
from teacher_cache.http_engine.form_check import Expected
from teacher_cache.http_engine.handshake import shake_hands
from teacher_cache.http_engine.http_client import HttpClient, Unavailable
from teacher_cache.http_engine.server import api_key_of, expected_of
from teacher_cache.teacher import IdentifiedTeacher

MAX_SILENCE_S = 20.0
"""A server that is loading or has much to do may take its time; a plan does not."""


@dataclass(frozen=True, slots=True)
class EndpointLook:
    """What an endpoint of a server engine turned out to be; `max_model_len` None where it does not fit."""

    url: str
    told: str
    max_model_len: int | None


def look_at_endpoints(config: ServerConfig, teacher: IdentifiedTeacher, capture: CaptureConfig) -> list[EndpointLook]:
    """What each endpoint serves, or why a build could not use it. Raises ConfigError where the API key is missing."""
    key = api_key_of(config)
    expected = expected_of(config, teacher.record, teacher.tokenizer, capture)

    async def look() -> list[EndpointLook]:
        return await asyncio.gather(*(_look(url, key, expected) for url in config.endpoints))

    return asyncio.run(look())


async def _look(url: str, key: str | None, expected: Expected) -> EndpointLook:
    async with HttpClient(url, key, MAX_SILENCE_S) as http:
        try:
            served = await shake_hands(http, expected)
        except Unavailable as error:
            return EndpointLook(url, f"cannot be used now: {error}", None)
        except ConfigError as error:
            return EndpointLook(url, f"does not fit: {str(error).removeprefix(url).strip()}", None)
    told = (
        f"serves {served.model}, max_model_len {served.max_model_len}, vllm {served.version}, {served.api.path}, "
        f"{'entropy of the candidates alone (no plugin)' if served.form.layout is None else 'sampler plugin'}"
    )
    return EndpointLook(url, told, served.max_model_len)
