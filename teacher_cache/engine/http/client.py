"""HTTP to one vLLM server: JSON out, JSON or a stream of it in, and every way to fail as one of two errors.

Unavailable is the server's trouble (gone, overloaded, broken off) and may pass; Refused is its answer to this very
request and will not.
"""

from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any, Self

from pydantic_core import from_json

from stillroom.errors import ConfigError

try:
    import httpx2
except ModuleNotFoundError as missing:
    raise ConfigError("engine.kind: server needs httpx2: pip install 'stillroom[teacher-server]'") from missing

CONNECT_TIMEOUT_S = 10.0
KEEP_ALIVE_S = 2.0
"""Idle connections are closed before the server closes them (vLLM after 5 s), in the middle of the next request."""
REFUSING_STATUS = {400, 413, 422}
BUSY_STATUS = {429, 503}
"""Too much to do now, or not ready: nothing was worked on."""
MAX_MESSAGE_CHARS = 300

Json = Mapping[str, Any]


class Unavailable(Exception):
    """The server cannot be used now. `was_sent`: it may have worked on the request; `status` is None without an
    answer; `retry_after_s` is the pause that it asks for.
    """

    def __init__(self, message: str, *, was_sent: bool, status: int | None = None, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.was_sent, self.status, self.retry_after_s = was_sent, status, retry_after_s

    @property
    def is_busy(self) -> bool:
        """Whether the server only asked to come back later."""
        return self.status in BUSY_STATUS


class Refused(Exception):
    """The server will not do this request, however often it is asked. The message is the server's own, in one line."""


class HttpClient:
    """Connections to one server, as an asynchronous context manager."""

    def __init__(self, url: str, api_key: str | None, stall_s: float) -> None:
        """`stall_s` is the longest wait for the next byte."""
        self.url = url
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._client = httpx2.AsyncClient(
            base_url=url,
            headers=headers,
            timeout=httpx2.Timeout(stall_s, connect=CONNECT_TIMEOUT_S, pool=None),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_ALIVE_S),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def get(self, path: str) -> Json:
        """The JSON at a path. Raises Unavailable or Refused."""
        try:
            response = await self._client.get(path)
        except httpx2.RequestError as error:
            raise _broken(error) from error
        return _answer(response, response.content)

    async def post(self, path: str, body: Json) -> Json:
        """The JSON that answers a body. Raises Unavailable or Refused."""
        try:
            response = await self._client.post(path, json=body)
        except httpx2.RequestError as error:
            raise _broken(error) from error
        return _answer(response, response.content)

    async def stream(self, path: str, body: Json) -> AsyncIterator[Json]:
        """The events that answer a body (server-sent, `data: {...}`), up to `data: [DONE]`.

        Raises Unavailable or Refused, also where the stream ends without [DONE].
        """
        try:
            async with self._client.stream("POST", path, json=body) as response:
                if response.status_code != httpx2.codes.OK:
                    _answer(response, await response.aread())
                    raise Unavailable(f"answers {response.status_code} to a request for a stream", was_sent=True)
                async for event in _events(response):
                    yield event
        except httpx2.RequestError as error:
            raise _broken(error) from error


async def _events(response: httpx2.Response) -> AsyncIterator[Json]:
    waiting = b""
    async for data in response.aiter_bytes():
        *events, waiting = (waiting + data).split(b"\n\n")
        for event in events:
            text = event.strip().removeprefix(b"data: ")
            if text == b"[DONE]":
                return
            # A line that begins with a colon is a comment, with which gateways keep a connection awake.
            if text and not text.startswith(b":"):
                yield _checked(_parsed(text))
    raise Unavailable("broke off in the middle of an answer", was_sent=True)


def _checked(event: Json) -> Json:
    """An error in the middle of a stream comes as an event, after the status said that all was well."""
    error = event.get("error")
    if not error:
        return event
    message = _one_line(str(error.get("message", error) if isinstance(error, Mapping) else error))
    if isinstance(error, Mapping) and error.get("code") in REFUSING_STATUS:
        raise Refused(message)
    raise Unavailable(f"failed in the middle of an answer: {message}", was_sent=True, status=500)


def _answer(response: httpx2.Response, content: bytes) -> Json:
    status = response.status_code
    if status == httpx2.codes.OK:
        return _parsed(content)
    message = _message_of(content)
    if status in REFUSING_STATUS:
        raise Refused(message or f"refused with status {status}")
    said = f"answers {status}: {message}" if message else f"answers {status}"
    # Seconds; the other form of the header, a date, is rare.
    told = response.headers.get("retry-after", "")
    retry_after_s = float(told) if told.isascii() and told.isdecimal() else 0.0
    raise Unavailable(said, was_sent=True, status=status, retry_after_s=retry_after_s)


def _parsed(content: bytes) -> Json:
    try:
        parsed = from_json(content)
    except ValueError as error:
        raise Unavailable(f"sent what is not JSON: {_one_line(str(error))}", was_sent=True) from error
    if not isinstance(parsed, Mapping):
        raise Unavailable(f"sent a {type(parsed).__name__} where a JSON object belongs", was_sent=True)
    return parsed


def _message_of(content: bytes) -> str:
    """vLLM: {"error": {"message": ...}}; its web framework: {"detail": ...}; proxies: a page."""
    try:
        parsed = from_json(content)
    except ValueError:
        return _one_line(content[:MAX_MESSAGE_CHARS].decode("utf-8", errors="replace"))
    said = parsed.get("error", parsed.get("detail", parsed)) if isinstance(parsed, Mapping) else parsed
    return _one_line(str(said.get("message", said) if isinstance(said, Mapping) else said))


def _broken(error: httpx2.RequestError) -> Unavailable:
    never_sent = isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout))
    if isinstance(error, httpx2.ReadTimeout):
        problem = "sends nothing any more"
    elif isinstance(error, httpx2.ConnectTimeout):
        problem = f"does not answer within {CONNECT_TIMEOUT_S:.0f} s"
    else:
        problem = _one_line(str(error)) or type(error).__name__
    return Unavailable(problem, was_sent=not never_sent)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:MAX_MESSAGE_CHARS]
