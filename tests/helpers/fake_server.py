"""A vLLM server that is not there: both of its ways in, one distribution for every token, and trouble on demand.

Token v has probability proportional to 1 / (v + 1), whatever came before, so its rank is v + 1. A chain is the same
function of its seed everywhere: NUM_TOKENS tokens, the last one EOS_ID. With `has_plugin` it answers as vLLM does whose
workers have stillroom's sampler plugin.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from teacher_cache.engine.plugin.batch import mapped_rows
from teacher_cache.engine.plugin.signals import signal_rows
from teacher_cache.engine.row_layout import Layout
from tests.helpers.tiny_tokenizer import byte_level

VOCAB_SIZE = 400
NUM_TOKENS = 20
EOS_ID = 1
LOGPROBS_V = -np.log(np.arange(1, VOCAB_SIZE + 1)) - np.log((1 / np.arange(1, VOCAB_SIZE + 1)).sum())

PAGE = {"error": "the\n\nbackend is asleep"}
_SAMPLING = {
    "min_tokens": {"type": "integer"},
    "stop": {"type": "array"},
    "repetition_detection": {"anyOf": [{"$ref": "#/components/schemas/Repetition"}, {"type": "null"}]},
}
OPENAPI = {
    "paths": {
        path: {"post": {"requestBody": {"content": {"application/json": {"schema": {"$ref": f"#/components/{name}"}}}}}}
        for path, name in (("/v1/completions", "Completion"), ("/inference/v1/generate", "Generate"))
    },
    "components": {
        "Completion": {"properties": _SAMPLING},
        "Generate": {"properties": {"sampling_params": {"properties": _SAMPLING}}},
        "schemas": {"Repetition": {"properties": {"max_pattern_size": {}, "min_count": {}}}},
    },
}
"""What vLLM says of its requests, as much as is read."""
EVENT = "data: {}\n\n"
"""A message of a stream."""

Json = dict[str, Any]
Trouble = str
"""`500` and other numbers: that status. `cut`: the stream ends in the middle. `garbage`: not JSON. `hang`: nothing
comes any more. `close`: the connection ends without an answer. `nan`: no finite number. `abort` and `repetition`:
ends the chain so. `page`: a gateway's page with status 200. `silent`: no answer at all.
"""


@dataclass
class Behaviour:
    """How a server is set up. `trouble` says what goes wrong with a request to generate or score, None for nothing."""

    trouble: Callable[[Json], Trouble | None] = lambda body: None
    has_generate: bool = True
    has_plugin: bool = False
    plugin_places: range = range(10**9)
    """Tokens at other places fall to a worker without the plugin."""
    nan_seeds: set[int] = field(default_factory=set)
    """Chains whose logits are NaN."""
    model: str = "tiny"
    parent: str | None = None
    """The model of which `model` is a LoRA adapter."""
    max_model_len: int | None = 256
    max_logprobs: int = 20
    vocab_size: int = VOCAB_SIZE
    key: str | None = None
    logprobs_mode: str = "raw_logprobs"
    tokenizer_shift: int = 0
    lists_parameters: bool = True
    delay_s: float = 0.0
    chat: Callable[[str], Any] = lambda message: None
    """The reply of /v1/chat/completions to a message: a text, a choice (with `model` and `usage` of the answer), or
    a body with an `error` and perhaps the `status` to send it with."""
    seen: list[Json] = field(default_factory=list)
    most_at_once: int = 0
    now: int = 0


class FakeServer:
    """Serves on a free port of the loopback, as a context manager; `stop` and `start` let it die and come back."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self._server: ThreadingHTTPServer | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        behaviour = self.behaviour

        class Handler(_Handler):
            setup_of = behaviour

        class Server(ThreadingHTTPServer):
            # As many connections as a client opens at once: more than a backlog of 5 would be reset.
            request_queue_size = 512

            def handle_error(self, request: Any, client_address: Any) -> None:
                # A client that gives up is part of many tests.
                if not isinstance(sys.exception(), ConnectionError):
                    super().handle_error(request, client_address)

        self._server = Server(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        """Refuses connections from now on."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def tokens_of(seed: int) -> list[int]:
    """The chain of a seed: some tokens are outside of any top k."""
    drawn = np.random.default_rng(seed).integers(2, VOCAB_SIZE, NUM_TOKENS - 1)
    small = drawn % 9 + 2
    return [*np.where(drawn % 3 == 0, drawn, small).tolist(), EOS_ID]


class _Handler(BaseHTTPRequestHandler):
    setup_of: Behaviour
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        setup = self.setup_of
        models = [{"id": setup.parent or setup.model, "max_model_len": setup.max_model_len}]
        # vLLM gives an adapter no length.
        models += [] if setup.parent is None else [{"id": setup.model, "parent": setup.parent, "max_model_len": None}]
        if not self._has_key():
            self._send(401, {"error": "Unauthorized"})
        elif self.path == "/v1/models":
            self._send(200, {"object": "list", "data": models})
        elif self.path == "/version":
            self._send(200, {"version": "0.32.0"})
        elif self.path == "/openapi.json" and self.setup_of.lists_parameters:
            self._send(200, OPENAPI)
        else:
            self._send(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ways = {"/v1/completions": _completions, "/inference/v1/generate": _generate}
        if not self._has_key():
            self._send(401, {"error": "Unauthorized"})
        elif self.path == "/tokenize":
            ids = [one + self.setup_of.tokenizer_shift for one in byte_level().encode(body["prompt"]).ids]
            self._send(200, {"tokens": ids})
        elif self.path == "/v1/chat/completions":
            self._chat(body)
        elif self.path not in ways or (self.path.startswith("/inference") and not self.setup_of.has_generate):
            self._send(404, {"detail": "Not Found"})
        else:
            self._work(body, ways[self.path])

    def _work(self, body: Json, way: Callable[[Json, Behaviour], "Plan"]) -> None:
        setup = self.setup_of
        setup.seen.append(body)
        setup.now += 1
        setup.most_at_once = max(setup.most_at_once, setup.now)
        try:
            time.sleep(setup.delay_s)
            trouble = setup.trouble(body)
            if trouble is not None and trouble.isdecimal():
                self._send(int(trouble), {"error": {"message": f"status {trouble} on demand", "code": int(trouble)}})
            elif trouble == "close":
                self.close_connection = True
            elif trouble == "silent":
                time.sleep(60)
            elif trouble == "page":
                self._send(200, PAGE)
            elif (refusal := _refusal(body, setup)) is not None:
                self._send(400, {"error": {"message": refusal, "code": 400}})
            else:
                self._answer(body, way(body, setup), trouble)
        finally:
            setup.now -= 1

    def _chat(self, body: Json) -> None:
        self.setup_of.seen.append(body)
        trouble = self.setup_of.trouble(body)
        if trouble is not None:
            self._send(int(trouble), {"error": {"message": f"status {trouble} on demand"}})
            return
        reply = self.setup_of.chat(body["messages"][0]["content"])
        if isinstance(reply, dict) and "error" in reply and "message" not in reply:
            self._send(reply.get("status", 200), reply)
            return
        choice = reply if isinstance(reply, dict) else {"message": {"content": reply}, "finish_reason": "stop"}
        if body.get("stream"):
            self._stream_chat(choice)
            return
        beside = {key: choice.pop(key) for key in ("model", "usage") if key in choice}
        self._send(200, {"choices": [choice], **beside})

    def _stream_chat(self, choice: Json) -> None:
        """Word by word; each word is a token."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        message = choice["message"]
        words = message["content"].split(" ")
        pieces = [word if number == 0 else f" {word}" for number, word in enumerate(words)]
        deltas = [{"delta": {"content": piece}} for piece in pieces]
        if "reasoning_content" in message:
            deltas.insert(0, {"delta": {"reasoning_content": message["reasoning_content"]}})
        last = {"delta": {}, "finish_reason": choice["finish_reason"]}
        for event in [*({"choices": [delta]} for delta in deltas), {"choices": [last]}]:
            self.wfile.write(EVENT.format(json.dumps(event, ensure_ascii=False)).encode())
        usage = {"prompt_tokens": 7, "completion_tokens": len(words)}
        self.wfile.write(EVENT.format(json.dumps({"choices": [], "usage": usage})).encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def _answer(self, body: Json, plan: "Plan", trouble: Trouble | None) -> None:
        if not body.get("stream"):
            self._send(200, plan.whole, broken=trouble == "garbage")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        for number, event in enumerate(plan.events(trouble)):
            if trouble in ("cut", "hang") and number == 1:
                if trouble == "hang":
                    time.sleep(60)
                return
            text = json.dumps(event) if trouble != "garbage" else json.dumps(event)[:-3]
            self.wfile.write(EVENT.format(text).encode())
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, status: int, answer: Json, broken: bool = False) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:-5] + b"#####" if broken else data)

    def _has_key(self) -> bool:
        return self.setup_of.key is None or self.headers.get("Authorization") == f"Bearer {self.setup_of.key}"

    def log_message(self, *arguments: object) -> None:
        pass


@dataclass
class Plan:
    """An answer: whole, and as the choices of a stream."""

    whole: Json
    choices: list[Json]

    def events(self, trouble: Trouble | None) -> Iterator[Json]:
        for number, choice in enumerate(self.choices):
            last = number == len(self.choices) - 1
            if trouble in ("abort", "repetition") and last:
                choice = {**choice, "finish_reason": trouble}
            if trouble == "nan":
                choice = json.loads(json.dumps(choice).replace('"rank": ', '"rank": null, "was": '))
                if "token_logprobs" in choice["logprobs"]:
                    choice["logprobs"]["token_logprobs"] = [None] * len(choice["token_ids"])
            yield {"choices": [choice]}


def _refusal(body: Json, setup: Behaviour) -> str | None:
    asked = body.get("sampling_params", body)
    num_logprobs = max(asked.get("logprobs") or 0, asked.get("prompt_logprobs") or 0)
    prompt = body["prompt"] if "prompt" in body else body["token_ids"]
    if body.get("model") != setup.model:
        return "no such model"
    if num_logprobs > setup.max_logprobs:
        return f"Requested sample logprobs of {num_logprobs}, which is greater than max allowed: {setup.max_logprobs}"
    if any(one >= setup.vocab_size for one in asked.get("stop_token_ids", [])):
        return f"token_id(s) in stop_token_ids contain out-of-vocab token ids. Vocabulary size: {setup.vocab_size}"
    if len(prompt) + asked["max_tokens"] > (setup.max_model_len or 10**9):
        return "too many tokens"
    return None


def _generated(asked: Json) -> list[int]:
    if "allowed_token_ids" in asked:
        return list(asked["allowed_token_ids"])
    return tokens_of(asked.get("seed", 0))[: asked["max_tokens"]]


def _finish(ids: list[int]) -> str:
    return "stop" if ids[-1] == EOS_ID else "length"


@dataclass(frozen=True)
class Question:
    """What is asked of every token: candidates, or the plugin's rows."""

    num: int
    extra_args: Json | None
    seed: int
    forced: bool = False

    @classmethod
    def of(cls, body: Json, num: int, *, forced: bool = False) -> Self:
        asked = body.get("sampling_params", body)
        extra_args = asked.get("extra_args", asked.get("vllm_xargs"))
        return cls(num, extra_args, asked.get("seed", 0), forced)


Entry = tuple[int, float, int]
"""Id, log probability, rank."""


def signal_entries(token: int, place: int, layout: Layout, seed: int, setup: Behaviour) -> list[Entry]:
    """What the plugin makes of a token, merged as vLLM merges it."""
    logits = torch.tensor(LOGPROBS_V, dtype=torch.float32)[None]
    if seed in setup.nan_seeds:
        logits = logits * torch.nan
    places = (torch.tensor([seed]), torch.tensor([place]))
    rows = mapped_rows(signal_rows(logits, torch.tensor([token]), layout.unmapped(), *places), layout)
    merged = dict(zip(rows.ids[0].tolist(), rows.logprobs[0].tolist(), strict=True))
    return [(one, clamped(value), number or token + 1) for number, (one, value) in enumerate(merged.items())]


def clamped(value: float) -> float:
    """-9999 for what JSON has no number for."""
    return max(value, -9999.0) if value == value else -9999.0


def _entries(token: int, place: int, question: Question, setup: Behaviour) -> list[Entry]:
    """The sampled token, then the most probable ones."""
    layout = Layout.of(question.extra_args)
    has_plugin = setup.has_plugin and place in setup.plugin_places and setup.logprobs_mode == "raw_logprobs"
    if has_plugin and layout is not None:
        return signal_entries(token, place, layout, question.seed, setup)
    num, forced = question.num, question.forced
    if setup.logprobs_mode == "processed_logprobs" and forced:
        return [(token, 0.0, 1)] + [(one, -9999.0, one + 1) for one in range(num) if one != token]
    shift = 30.0 if setup.logprobs_mode == "raw_logits" else 0.0
    return [(one, float(np.float32(LOGPROBS_V[one])) + shift, one + 1) for one in dict.fromkeys([token, *range(num)])]


def _prompt_scores(prompt: list[int], question: Question, setup: Behaviour) -> list[Json | None]:
    scores: list[Json | None] = [None]
    for place, token in enumerate(prompt[1:], start=1):
        entries = _entries(token, place, question, setup)
        scores.append({str(one): {"logprob": value, "rank": rank} for one, value, rank in entries})
    return scores


def _generate(body: Json, setup: Behaviour) -> Plan:
    asked = body["sampling_params"]
    ids, forced = _generated(asked), "allowed_token_ids" in asked
    question = Question.of(body, asked.get("logprobs", 0), forced=forced)
    content = []
    for place, token in enumerate(ids, start=len(body["token_ids"])):
        entries = _entries(token, place, question, setup)[: asked.get("logprobs") or 1]
        listed = [{"token_id": one, "logprob": value, "rank": rank} for one, value, rank in entries]
        content.append({**listed[0], "top_logprobs": listed})
    half = len(ids) // 2
    parts = [(ids[:half], content[:half], None), (ids[half:], content[half:], _finish(ids))]
    choices = [
        {"token_ids": part, "logprobs": {"content": rows}, "finish_reason": finish}
        for part, rows, finish in parts
        if part
    ]
    whole: Json = {"choices": [{"token_ids": ids, "logprobs": {"content": content}, "finish_reason": _finish(ids)}]}
    if "prompt_logprobs" in asked:
        asked_of_prompt = Question.of(body, asked["prompt_logprobs"])
        whole["prompt_logprobs"] = _prompt_scores(body["token_ids"], asked_of_prompt, setup)
    return Plan(whole, choices)


def _completions(body: Json, setup: Behaviour) -> Plan:
    ids, forced = _generated(body), "allowed_token_ids" in body
    question, prompt = Question.of(body, body.get("logprobs", 0), forced=forced), body["prompt"]
    tops = [_entries(token, place, question, setup) for place, token in enumerate(ids, start=len(prompt))]
    choices = []
    for part in (slice(None, len(ids) // 2), slice(len(ids) // 2, None)):
        if ids[part]:
            logprobs = {
                "token_logprobs": [entries[0][1] for entries in tops[part]],
                "top_logprobs": [{f"token_id:{one}": value for one, value, _ in entries} for entries in tops[part]],
            }
            finish = _finish(ids) if part.stop is None else None
            choices.append({"token_ids": ids[part], "logprobs": logprobs, "finish_reason": finish})
    top_logprobs = [{f"token_id:{one}": value for one, value, _ in entries} for entries in tops]
    logprobs = {"token_logprobs": [entries[0][1] for entries in tops], "top_logprobs": top_logprobs}
    whole: Json = {"choices": [{"token_ids": ids, "logprobs": logprobs, "finish_reason": _finish(ids)}]}
    if "prompt_logprobs" in body:
        asked_of_prompt = Question.of(body, body["prompt_logprobs"])
        whole["choices"][0]["prompt_logprobs"] = _prompt_scores(prompt, asked_of_prompt, setup)
    return Plan(whole, choices)
