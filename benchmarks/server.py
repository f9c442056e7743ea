"""What a teacher costs over HTTP: bytes on the wire and processor time at both ends, by both ways into a vLLM server.

    python -m benchmarks.server --teacher FOLDER [--k K] [--chains N] [--tokens T] [--json]

Starts a real `vllm serve` on the loopback, generates chains, and scores the same chains, with the server engine alone:
no rows, no shards. Three captures: K candidates as vLLM itself gives them, the same with what stillroom's sampler
plugin adds, and the default one of 8 candidates and 8 draws. `client_us` is this process, `front_end_us` the server's
process that speaks HTTP (its engine core is another), both in microseconds of processor time a completion token;
scoring a chain also reads its prompt. The last line is one JSON object; with --json it is the only one.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from stillroom.schema.records import Message, Prompt
from teacher_cache.config import CaptureConfig, ServerConfig, TeacherConfig
from teacher_cache.engine.api import Finished, Request
from teacher_cache.engine.http import client, handshake
from teacher_cache.engine.http.client import HttpClient
from teacher_cache.engine.http.server import ServerEngine
from teacher_cache.engine.http.wire import Api, CompletionsApi, GenerateApi
from teacher_cache.engine.teacher import identify_teacher
from tests.helpers.vllm_server import Server, serve

NUM_AT_ONCE = 16
NUM_BESIDE = 4
"""Log probabilities that a server must give besides the candidates: entropy, rank, mark, and one to spare."""
FIRST_PROMPT_TOKEN = 20


@dataclass(frozen=True, slots=True)
class Cost:
    """One way of asking. `bytes_per_token` counts what comes in, a completion token."""

    capture: str
    path: str
    work: str
    num_tokens: int
    tokens_per_s: float
    bytes_per_token: float
    client_us: float
    front_end_us: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.server")
    parser.add_argument("--teacher", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--chains", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--enable-scale-out", "--max-logprobs", str(max(asked.k + NUM_BESIDE, 28)))
        with serve(asked.teacher.absolute(), Path(folder), *flags, VLLM_CPU_KVCACHE_SPACE="1") as server:
            costs = [
                cost
                for api in (GenerateApi(), CompletionsApi())
                for kind in captures(asked.k)
                for cost in measure(server, api, kind, asked)
            ]
    if not asked.json:
        for cost in costs:
            print(
                f"{cost.work:8} {cost.path:22} {cost.capture:16} {cost.num_tokens} tokens "
                f"at {cost.tokens_per_s:.0f} tok/s, {cost.bytes_per_token:.0f} B, "
                f"client {cost.client_us:.0f} µs, front end {cost.front_end_us:.0f} µs"
            )
    print(json.dumps({"k": asked.k, "costs": [asdict(cost) for cost in costs]}))
    return 0


@dataclass(frozen=True, slots=True)
class Kind:
    """What is captured, by which rows."""

    name: str
    capture: CaptureConfig
    with_plugin: bool


def captures(k: int) -> list[Kind]:
    """K candidates without and with the plugin, and the default."""
    candidates = CaptureConfig(max_support=k, draws=0)
    return [
        Kind(f"{k}", candidates, with_plugin=False),
        Kind(f"{k} with plugin", candidates, with_plugin=True),
        Kind("8 + 8 draws", CaptureConfig(max_support=8, draws=8), with_plugin=True),
    ]


def measure(server: Server, api: Api, kind: Kind, asked: argparse.Namespace) -> Iterator[Cost]:
    """Generates chains by one way, then scores them by it."""
    config = ServerConfig(kind="server", endpoints=[server.url], max_in_flight=NUM_AT_ONCE)
    teacher = identify_teacher(TeacherConfig(model=str(asked.teacher)), config)
    with _by(api, kind), _counted_bytes() as counted:
        engine = ServerEngine(config, teacher.record, teacher.tokenizer, kind.capture)
        assert engine.info.entropy == ("exact" if kind.with_plugin else "support")
        try:
            requests = [_request(number, asked.tokens) for number in range(asked.chains)]
            chains: list[Finished] = []
            for work in ("generate", "score"):
                counted.clear()
                before = (time.process_time(), _processor_s(server.pid), time.monotonic())
                chains = _answers(engine, requests)
                after = (time.process_time(), _processor_s(server.pid), time.monotonic())
                client_s, front_end_s, seconds = (end - start for start, end in zip(before, after, strict=True))
                num = sum(len(chain.capture.token_ids_T) for chain in chains)
                costs = (sum(counted) / num, 1e6 * client_s / num, 1e6 * front_end_s / num)
                yield Cost(kind.name, api.path, work, num, num / seconds, *costs)
                requests = [_scored(chain) for chain in chains]
        finally:
            engine.close()


def _answers(engine: ServerEngine, requests: Sequence[Request]) -> list[Finished]:
    for request in requests:
        engine.submit(request)
    chains: list[Finished] = []
    while engine.num_unfinished:
        for outcome in engine.step():
            assert isinstance(outcome, Finished), outcome
            chains.append(outcome)
    return chains


def _request(number: int, num_tokens: int) -> Request:
    prompt = Prompt("benchmark", (Message("user", "benchmark"),), "benchmark", "train")
    ids = [FIRST_PROMPT_TOKEN, FIRST_PROMPT_TOKEN + number, FIRST_PROMPT_TOKEN]
    return Request(prompt, ids, 0, number, {"temperature": 1.0}, num_tokens, str(number))


def _scored(chain: Finished) -> Request:
    request, ids = chain.request, chain.capture.token_ids_T.tolist()
    return Request(request.prompt, request.prompt_token_ids, 0, None, {}, len(ids), request.sample_id, ids)


@contextmanager
def _by(api: Api, kind: Kind) -> Iterator[None]:
    """Servers are met as if they had this way alone, and with the plugin or without it."""
    found_api, found_plugin = handshake._api, handshake._has_plugin

    async def only(http: HttpClient, model: str) -> Api:
        return api

    async def none(http: HttpClient, api: Api, model: str, expected: handshake.Expected) -> bool:
        return False

    handshake._api = only
    if not kind.with_plugin:
        handshake._has_plugin = none
    try:
        yield
    finally:
        handshake._api, handshake._has_plugin = found_api, found_plugin


@contextmanager
def _counted_bytes() -> Iterator[list[int]]:
    """Sizes of all JSON that comes in."""
    parsed, sizes = client._parsed, list[int]()

    def counting(content: bytes) -> client.Json:
        sizes.append(len(content))
        return parsed(content)

    client._parsed = counting
    try:
        yield sizes
    finally:
        client._parsed = parsed


def _processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
