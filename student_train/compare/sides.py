"""A student that answers prompts: served behind an OpenAI-compatible address, or a Hugging Face folder in this process.

In: messages of a prompt. Out: `Reply` with its text, tokens and times, or why there is none. Answers are streamed, so
that the time to the first token is known; a server that answers whole is accepted and has none.

The only file of the student side that imports httpx2.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from stillroom.errors import ConfigError, StillroomError, first_line
from student_train.answers import AskedPrompt, GenerateConfig

CONNECT_TIMEOUT_S = 10.0
MAX_ERROR_CHARS = 200


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. `error` says why nothing did; other fields are then empty or unknown."""

    text: str = ""
    reasoning: str | None = None
    """Of servers that return it apart from the answer."""
    is_cut: bool = False
    """Whether it ended at the limit of tokens."""
    num_prompt_tokens: int | None = None
    num_tokens: int | None = None
    latency_s: float = 0.0
    first_token_s: float | None = None
    error: str | None = None


class Side(Protocol):
    """One of the students that are compared."""

    name: str
    model: str
    address: str
    device: str | None
    """The kind of device that answers; None is not known."""

    def answer(
        self, prompts: Sequence[AskedPrompt], config: GenerateConfig, concurrency: int, done: Callable[[Reply], None]
    ) -> list[Reply]:
        """One reply to each prompt, in order; `done` is called as each comes."""


def open_sides(given: Sequence[str], api_key: str | None, timeout_s: float) -> list[Side]:
    """Raises ConfigError, also for fewer than two, DataError, StillroomError."""
    # Before any of them is asked anything.
    if len(given) < 2:
        raise ConfigError(f"got only the side {given[0]}: name at least two, each [NAME=]URL or [NAME=]FOLDER")
    return [open_side(one, api_key, timeout_s) for one in given]


def open_side(given: str, api_key: str | None, timeout_s: float) -> Side:
    """`[NAME=]URL[#MODEL]` or `[NAME=]FOLDER`. Raises ConfigError, DataError, StillroomError."""
    # A name holds neither / nor :, which every address and most folders do.
    first, _, rest = given.partition("=")
    name, target = (first, rest) if rest and not set(first) & {"/", ":"} else ("", given)
    if target.startswith(("http://", "https://")):
        return Endpoint(name, target, api_key, timeout_s)
    if not Path(target).is_dir():
        raise ConfigError(
            f"{target} is neither a folder nor an address: use a Hugging Face folder or http://HOST:PORT/v1"
        )
    return Folder(name or Path(target).resolve().name, target)


class Endpoint:
    """A server with /v1/chat/completions."""

    def __init__(self, name: str, target: str, api_key: str | None, timeout_s: float) -> None:
        try:
            import httpx2
        except ModuleNotFoundError as missing:
            raise ConfigError("comparing served students needs httpx2: pip install 'httpx2>=2.12'") from missing
        address, _, model = target.partition("#")
        parts = urlsplit(address)
        if parts.password is not None or parts.username is not None:
            raise ConfigError(f"the address of {parts.hostname} holds a password: use --api-key-env")
        address = address.rstrip("/")
        self.address = address if address.endswith("/v1") else f"{address}/v1"
        self.name = name or parts.netloc
        self.device: str | None = None
        self._http = httpx2
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        # Between bytes: a long answer may take longer as long as it keeps coming.
        self._timeout = httpx2.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S, pool=None)
        self.model = model or self._only_model()

    def _client(self) -> Any:
        # No limit on connections: the number of threads already bounds the requests.
        return self._http.Client(
            headers=self._headers, timeout=self._timeout, limits=self._http.Limits(max_connections=None)
        )

    def _only_model(self) -> str:
        """Raises StillroomError if the server does not answer, ConfigError if it serves several models."""
        try:
            with self._client() as client:
                response = client.get(f"{self.address}/models")
            found = [str(one["id"]) for one in response.json()["data"]] if response.is_success else None
        except (self._http.RequestError, ValueError, KeyError, TypeError) as error:
            raise StillroomError(
                f"{self.address}/models does not answer as an OpenAI-compatible server ({first_line(error)}): check "
                "the address, or give the model: URL#MODEL"
            ) from error
        if found is None:
            raise StillroomError(f"{self.address}/models answers {response.status_code}: {_message(response.text)}")
        if len(found) != 1:
            raise ConfigError(
                f"{self.address} serves {', '.join(found) or 'no model'}: choose one: {self.address}#MODEL"
            )
        return found[0]

    def answer(
        self, prompts: Sequence[AskedPrompt], config: GenerateConfig, concurrency: int, done: Callable[[Reply], None]
    ) -> list[Reply]:
        def ask(prompt: AskedPrompt) -> Reply:
            reply = self._ask(client, prompt, config)
            done(reply)
            return reply

        with self._client() as client, ThreadPoolExecutor(concurrency, thread_name_prefix="compare") as pool:
            return list(pool.map(ask, prompts))

    def _ask(self, client: Any, prompt: AskedPrompt, config: GenerateConfig) -> Reply:
        body = {
            "model": self.model,
            "messages": list(prompt.messages),
            "max_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "seed": config.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        started_s = time.perf_counter()
        try:
            with client.stream("POST", f"{self.address}/chat/completions", json=body) as response:
                if not response.is_success:
                    text = response.read().decode("utf-8", errors="replace")
                    return Reply(error=f"status {response.status_code}: {_message(text)}")
                if response.headers.get("content-type", "").startswith("text/event-stream"):
                    return _streamed(_lines(response.iter_bytes()), started_s)
                return _whole(response.read(), started_s)
        except self._http.RequestError as error:
            return Reply(error=first_line(error)[:MAX_ERROR_CHARS] or type(error).__name__)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            return Reply(error=f"not an answer of chat completions ({first_line(error)[:MAX_ERROR_CHARS]})")


def _lines(parts: Iterable[bytes]) -> Iterator[str]:
    """Lines that end with a newline. httpx2's iter_lines also splits at U+2028 and others, which JSON may hold."""
    rest = b""
    for part in parts:
        *whole, rest = (rest + part).split(b"\n")
        yield from (line.decode("utf-8", errors="replace") for line in whole)
    yield rest.decode("utf-8", errors="replace")


def _streamed(lines: Iterator[str], started_s: float) -> Reply:
    text, reasoning, finish, usage, first_token_s, ended = "", "", None, None, None, False
    for line in lines:
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if data == "[DONE]":
            ended = True
            break
        if not data:
            continue
        event = json.loads(data)
        if event.get("error"):
            return Reply(error=_message(data))
        usage = event.get("usage") or usage
        for choice in event.get("choices", []):
            delta = choice.get("delta", {})
            # vLLM has called it both ways.
            thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
            said = delta.get("content") or ""
            if first_token_s is None and (said or thought):
                first_token_s = time.perf_counter() - started_s
            text, reasoning = text + said, reasoning + thought
            finish = choice.get("finish_reason") or finish
    latency_s = time.perf_counter() - started_s
    if not ended and finish is None:
        return Reply(error="the connection closed in the middle of an answer")
    return _reply(text, reasoning or None, finish, usage, latency_s, first_token_s)


def _whole(content: bytes, started_s: float) -> Reply:
    latency_s = time.perf_counter() - started_s
    answer = json.loads(content)
    if answer.get("error"):
        return Reply(error=_message(content.decode("utf-8", errors="replace")))
    choice = answer["choices"][0]
    message = choice["message"]
    thought = message.get("reasoning_content") or message.get("reasoning")
    return _reply(
        message.get("content") or "", thought, choice.get("finish_reason"), answer.get("usage"), latency_s, None
    )


def _reply(
    text: str,
    reasoning: str | None,
    finish: str | None,
    usage: Mapping[str, Any] | None,
    latency_s: float,
    first_token_s: float | None,
) -> Reply:
    counts = usage or {}
    return Reply(
        text=text,
        reasoning=reasoning,
        is_cut=finish == "length",
        num_prompt_tokens=counts.get("prompt_tokens"),
        num_tokens=counts.get("completion_tokens"),
        latency_s=latency_s,
        first_token_s=first_token_s,
    )


def _message(text: str) -> str:
    """A server's own message in one line: {"error": {"message": ...}}, {"detail": ...}, or a page."""
    try:
        parsed = json.loads(text)
    except ValueError:
        return " ".join(text.split())[:MAX_ERROR_CHARS]
    error = parsed.get("error", parsed.get("detail", parsed)) if isinstance(parsed, Mapping) else parsed
    return " ".join(str(error.get("message", error) if isinstance(error, Mapping) else error).split())[:MAX_ERROR_CHARS]


class Folder:
    """A Hugging Face folder, run by transformers one prompt at a time."""

    def __init__(self, name: str, folder: str) -> None:
        import torch

        from stillroom.models import load_tokenizer
        from student_train.config.run import StudentConfig
        from student_train.exporting import adopt_tokens
        from student_train.model.student import load_causal
        from student_train.runtime.cost import device_kind

        self.name, self.address, self.model = name, folder, folder
        self.device: str | None = device_kind()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        precision = "bfloat16" if device == "cuda" else "float32"
        self._tokenizer = load_tokenizer(folder)
        self._causal = load_causal(folder, StudentConfig(model=folder), precision).to(device).eval()
        adopt_tokens(self._causal, self._tokenizer)

    def answer(
        self, prompts: Sequence[AskedPrompt], config: GenerateConfig, concurrency: int, done: Callable[[Reply], None]
    ) -> list[Reply]:
        replies = []
        for prompt in prompts:
            replies.append(self._ask(prompt, config))
            done(replies[-1])
        return replies

    def _ask(self, prompt: AskedPrompt, config: GenerateConfig) -> Reply:
        from jinja2 import TemplateError

        from student_train.answers import end_ids, generate

        try:
            ids = self._tokenizer.apply_chat_template(
                list(prompt.messages), add_generation_prompt=True, return_dict=False
            )
        except (TemplateError, ValueError) as error:
            # Without a template, or for a conversation that it does not take, as a server refuses it.
            return Reply(error=first_line(error)[:MAX_ERROR_CHARS])
        started_s = time.perf_counter()
        (made,) = generate(self._causal, self._tokenizer, [replace(prompt, token_ids=ids)], config)
        latency_s = time.perf_counter() - started_s
        ends = end_ids(self._causal)
        text = self._tokenizer.decode(
            [one for one in made if one not in ends], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return Reply(
            text=text,
            is_cut=made[-1] not in ends,
            num_prompt_tokens=len(ids),
            num_tokens=len(made),
            latency_s=latency_s,
        )
