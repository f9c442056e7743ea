"""HTTP to one vLLM server or API: JSON requests, JSON or streamed answers, and two errors for every way to fail.

Unavailable is a problem of the server (gone, overloaded, broken off) that may pass; Refused is its answer to this
request, which will not change.
"""

import contextlib
import datetime
import email.utils
import math
import os
import re
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any, Self

from pydantic_core import from_json

from stillroom.errors import ConfigError

try:
    import httpx2
except ModuleNotFoundError as missing:
    raise ConfigError("servers and APIs need the package httpx2: pip install 'stillroom[teacher-server]'") from missing

CONNECT_TIMEOUT_S = 10.0
KEEP_ALIVE_S = 2.0
"""vLLM closes idle connections after 5 s: close them earlier, or the next request may break off."""
REFUSING_STATUS = {400, 413, 422}
BUSY_STATUS = {429, 503, 529}
"""Overloaded or not ready: the request was not worked on."""
PAGE_TITLE = re.compile(rb"<title[^>]*>(.*?)</title>", re.IGNORECASE | re.DOTALL)
MAX_MESSAGE_CHARS = 300
STREAM_FIELDS = (b"data:", b":", b"event:", b"id:", b"retry:")
"""What a message of a stream begins with; MIN_START_BYTES tell."""
MIN_START_BYTES = 6
MAX_BODY_BYTES = 65536
"""Bytes read of a body that is not a stream."""

Json = Mapping[str, Any]


class Unavailable(Exception):
    """The server cannot be used now. `was_sent`: it may have worked on the request; `status` is None if there was no
    answer; `retry_after_s` is the pause that it asks for; `code` its own name of the error.
    """

    def __init__(
        self, message: str, *, was_sent: bool, status: int | None = None, retry_after_s: float = 0.0, code: str = ""
    ) -> None:
        super().__init__(message)
        self.was_sent, self.status, self.retry_after_s, self.code = was_sent, status, retry_after_s, code

    def after(self, num_tokens: int, seconds: float) -> "Unavailable":
        """The same for a chain that broke off after `num_tokens` tokens and `seconds`."""
        return Unavailable(
            f"{self}, after {num_tokens} tokens and {seconds:.1f} s",
            was_sent=self.was_sent,
            status=self.status,
            retry_after_s=self.retry_after_s,
            code=self.code,
        )

    @property
    def is_busy(self) -> bool:
        """Whether the server only asked to retry later."""
        return self.status in BUSY_STATUS


class Refused(Exception):
    """The server refuses this request for good. The message is the server's own, in one line."""


def read_api_key(variable: str | None, setting: str) -> str | None:
    """The API key in an environment variable, None without one; `setting` names it in the configuration.

    Raises ConfigError if the variable is not set, or holds what is not a key.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"{setting} names {variable}, which is not set: export it, or remove the setting")
    if not key.isascii() or not key.isprintable():
        # Checked here because the HTTP library's own error would quote the key.
        raise ConfigError(
            f"the API key in {variable} holds a character that HTTP headers do not allow: use plain ASCII"
        )
    return key


class HttpClient:
    """Connections to one server, as an asynchronous context manager."""

    def __init__(self, url: str, api_key: str | None, stall_s: float) -> None:
        """`stall_s` is the longest wait for the next byte, in seconds."""
        self.url = url
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._client = httpx2.AsyncClient(
            base_url=url,
            headers=headers,
            # The timeout is between bytes: a long chain may take an hour as long as it keeps arriving.
            timeout=httpx2.Timeout(stall_s, connect=CONNECT_TIMEOUT_S, pool=None),
            # No limit here: the pool bounds requests with max_in_flight, and a second bound would queue them unseen.
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
        return await self._request("GET", path)

    async def post(self, path: str, body: Json) -> Json:
        """The JSON response to a body. Raises Unavailable or Refused."""
        return await self._request("POST", path, body)

    async def stream(self, path: str, body: Json) -> AsyncIterator[Json]:
        """The events of a streamed response (`data: {...}`), up to `data: [DONE]`.

        Raises Unavailable or Refused, also if the stream ends without [DONE].
        """
        try:
            async with self._client.stream("POST", path, json=body) as response:
                if response.status_code != httpx2.codes.OK:
                    _answer(response, await response.aread())
                async for event in _events(response):
                    yield event
        except httpx2.RequestError as error:
            raise _broken(error) from error

    async def _request(self, method: str, path: str, body: Json | None = None) -> Json:
        try:
            response = await self._client.request(method, path, json=body)
        except httpx2.RequestError as error:
            raise _broken(error) from error
        return _answer(response, response.content)


async def _events(response: httpx2.Response) -> AsyncIterator[Json]:
    waiting, is_stream = b"", False
    async for data in response.aiter_bytes():
        # Some gateways end lines with CR LF; JSON never has a bare CR.
        waiting += data.replace(b"\r", b"")
        if not is_stream and len(waiting.lstrip()) < MIN_START_BYTES:
            continue
        is_stream = is_stream or waiting.lstrip().startswith(STREAM_FIELDS)
        if not is_stream:
            # Read on, so that the error can quote the page or JSON that came instead of a stream.
            if len(waiting) < MAX_BODY_BYTES:
                continue
            break
        # The last part is an event that has not arrived whole.
        *events, waiting = waiting.split(b"\n\n")
        for event in events:
            text = event.strip().removeprefix(b"data:").lstrip()
            if text == b"[DONE]":
                return
            # Lines that begin with a colon are comments, which gateways send to keep a connection alive.
            if text and not text.startswith(b":"):
                yield _checked(_parsed(text))
    if not is_stream and waiting.strip():
        raise _no_stream(response, waiting)
    # A stream that ends without [DONE] looks complete to HTTP but lacks tokens.
    raise Unavailable("closed the connection in the middle of an answer", was_sent=True)


def _no_stream(response: httpx2.Response, body: bytes) -> Unavailable:
    """Gateways send their own errors and pages with status 200."""
    kind = response.headers.get("content-type", "").partition(";")[0]
    problem = f"answered 200 with {kind or 'a body'} instead of a stream: {_message_of(body)}"
    return Unavailable(problem, was_sent=True, status=httpx2.codes.OK)


def _checked(event: Json) -> Json:
    """The event. An error in the middle of a stream is an event too, because the status was already sent."""
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
        answer = _parsed(content)
        if not answer.get("error"):
            return answer
        # Gateways pass on the errors of others with status 200, and their status as a code.
        status = _status_in(answer["error"]) or httpx2.codes.INTERNAL_SERVER_ERROR
    message = _message_of(content)
    if status in REFUSING_STATUS:
        raise Refused(message or f"refused with status {status}")
    location = response.headers.get("location")
    redirect = f" and redirects to {_one_line(location)}" if location else ""
    problem = f"answers {status}{redirect}" + (f": {message}" if message and not redirect else "")
    retry_after_s = _seconds_of(response.headers.get("retry-after", ""))
    raise Unavailable(problem, was_sent=True, status=status, retry_after_s=retry_after_s, code=_code_of(content))


def failed_choice(choice: Json) -> Unavailable | None:
    """The error that a gateway puts into a choice, beside what it got of the answer; None without one."""
    error = choice.get("error")
    if not error:
        return None
    message = _one_line(str(error.get("message", error) if isinstance(error, Mapping) else error))
    return Unavailable(f"failed in the middle of an answer: {message}", was_sent=True, status=_status_in(error) or 500)


def _status_in(error: Any) -> int | None:
    code = str(error.get("code", "")) if isinstance(error, Mapping) else ""
    return int(code) if code.isascii() and code.isdecimal() and 400 <= int(code) < 600 else None


def _code_of(content: bytes) -> str:
    try:
        error = from_json(content)["error"]
        return str(error.get("code") or error.get("type") or "")
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""


def _seconds_of(pause: str) -> float:
    """The header Retry-After: seconds, which some APIs write with decimals, or a date."""
    with contextlib.suppress(ValueError):
        seconds = float(pause)
        return max(0.0, seconds) if math.isfinite(seconds) else 0.0
    try:
        date = email.utils.parsedate_to_datetime(pause)
    except (ValueError, TypeError):
        return 0.0
    now = datetime.datetime.now(datetime.UTC)
    return max(0.0, (date.replace(tzinfo=date.tzinfo or datetime.UTC) - now).total_seconds())


def _parsed(content: bytes) -> Json:
    try:
        parsed = from_json(content)
    except ValueError as error:
        raise Unavailable(f"sent invalid JSON: {_one_line(str(error))}", was_sent=True) from error
    if not isinstance(parsed, Mapping):
        raise Unavailable(f"sent a {type(parsed).__name__} instead of a JSON object", was_sent=True)
    return parsed


def _message_of(content: bytes) -> str:
    """vLLM sends {"error": {"message": ...}}, its web framework {"detail": ...}, a proxy a page."""
    try:
        parsed = from_json(content)
    except ValueError:
        title = PAGE_TITLE.search(content)
        return _one_line((title[1] if title else content[:MAX_MESSAGE_CHARS]).decode("utf-8", errors="replace"))
    error = parsed.get("error", parsed.get("detail", parsed)) if isinstance(parsed, Mapping) else parsed
    return _one_line(str(error.get("message", error) if isinstance(error, Mapping) else error))


def _broken(error: httpx2.RequestError) -> Unavailable:
    # What was sent may have been worked on, and counts as an attempt at the chain.
    never_sent = isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout))
    if isinstance(error, httpx2.ReadTimeout):
        problem = "stopped sending"
    elif isinstance(error, httpx2.ConnectTimeout):
        problem = f"does not answer within {CONNECT_TIMEOUT_S:.0f} s"
    else:
        problem = _one_line(str(error)) or type(error).__name__
        problem += " (does a server run there?)" if never_sent else ""
    return Unavailable(problem, was_sent=not never_sent)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:MAX_MESSAGE_CHARS]
