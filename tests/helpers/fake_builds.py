"""Builds with the fake engine: the real path from requests to visible rows, without a model.

As a program (`python -m tests.helpers.fake_builds CACHE I/N|join NUM_PROMPTS STEP_S [impatient]`) it is one worker, to
be killed. Its steps take STEP_S until a file CACHE.hurry is there.
"""

import contextlib
import functools
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from stillroom.cache.catalog import Table
from stillroom.program import obey_parent, print_result
from stillroom.schema.manifest import Teacher
from stillroom.schema.records import Message, Prompt, prompt_id_of, sample_id_of
from stillroom.storage.paths import Location, location
from teacher_cache.building.build import Build
from teacher_cache.building.result import BuildResult, result_json
from teacher_cache.config import BuildConfig
from teacher_cache.engine.api import Engine, Outcome, Request
from teacher_cache.engine.fake import FakeEngine
from teacher_cache.engine.teacher import IdentifiedTeacher
from teacher_cache.prompts.prompts import Part, part_name, seed_of
from teacher_cache.workers.joining import JoinedWork, of_prompts
from teacher_cache.workers.leases import EXPIRY_S, new_worker_name
from tests.helpers.caches import on_disk
from tests.helpers.tiny_tokenizer import byte_level

VOCAB_SIZE = 400
K = 8
EOS_ID = 1
MAX_TOKENS = 60
PART_CHAINS = 8
IMPATIENCE = {
    "teacher_cache.workers.leases.HEARTBEAT_S": 0.2,
    "teacher_cache.workers.leases.LIST_S": 0.1,
    "teacher_cache.workers.joining.LIST_S": 0.1,
    "teacher_cache.building.build.WAIT_S": 0.05,
    "teacher_cache.building.loop.WAIT_S": 0.05,
    "teacher_cache.states.passes.WAIT_S": 0.05,
}
"""Workers look at each other often. Who dies counts as dead after `silence`, not by the clock of a busy machine."""
SAMPLING = {"temperature": 0.6, "max_tokens": MAX_TOKENS}


def make_config(cache: Location, **blocks: object) -> BuildConfig:
    """A configuration whose prompts block is for the manifest alone: requests come from `make_requests`."""
    return BuildConfig.model_validate(
        {
            "cache": cache,
            "run": "fake",
            "teacher": {"model": "fake"},
            "prompts": {"sources": [{"kind": "jsonl", "name": "fake", "path": "none.jsonl", "prompt_field": "text"}]},
            "capture": {"max_support": K, "draws": 0},
            "shard": {"row_group_tokens": 500, "max_mb": 0.05},
            **blocks,
        }
    )


def make_teacher() -> IdentifiedTeacher:
    """A tokenizer and made-up fingerprints."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="<|im_end|>")
    tokenizer.add_tokens(["<think>", "</think>"])
    record = Teacher(
        model="fake",
        fingerprint="f" * 32,
        weights_fingerprint="a" * 32,
        tokenizer_fingerprint="b" * 32,
        template_fingerprint="c" * 32,
        vocab_size=VOCAB_SIZE,
    )
    return IdentifiedTeacher(record, tokenizer)


def make_requests(num_prompts: int, index: int = 0, count: int = 1) -> list[Request]:
    """One request a prompt; a worker has every `count`th."""
    made = []
    for number in range(index, num_prompts, count):
        messages = (Message("user", f"question {number}"),)
        prompt = Prompt(prompt_id_of(messages), messages, "fake", "train", reference="5", metadata={"number": number})
        ids = [0, 10 + number % 200, 20, 3 + number // 200]
        seed = seed_of(0, prompt.prompt_id, 0)
        sample_id = sample_id_of("f" * 32, ids, SAMPLING, seed, 0)
        made.append(Request(prompt, ids, 0, seed, SAMPLING, MAX_TOKENS, sample_id))
    return made


def make_engine(step_s: float = 0.0, refuse: Callable[[Request], str | None] | None = None) -> FakeEngine:
    return FakeEngine(VOCAB_SIZE, K, mean_tokens=40, eos_id=EOS_ID, step_s=step_s, refuse=refuse)


def run_build(
    config: BuildConfig,
    requests: Sequence[Request],
    start_engine: Callable[[], Engine] = make_engine,
    worker: str = "w0",
    *,
    retry_failures: bool = False,
) -> BuildResult:
    """One process' build, from opening the cache to giving the lock back."""
    build = Build(config, make_teacher(), worker)
    try:
        return build.run(requests, len(requests), start_engine, retry_failures=retry_failures)
    finally:
        build.close()


def parts_of(requests: Sequence[Request]) -> Iterator[Part]:
    """Parts of PART_CHAINS requests."""
    for start in range(0, len(requests), PART_CHAINS):
        part = requests[start : start + PART_CHAINS]
        yield part_name(0, (one.sample_id for one in part)), functools.partial(list, part)


def join_build(config: BuildConfig, requests: Sequence[Request], start_engine: Callable[[], Engine]) -> BuildResult:
    """One process' build of parts that no other one has."""
    build = Build(config, make_teacher(), new_worker_name())
    try:
        wanted = of_prompts({one.prompt.prompt_id: 1 for one in requests})
        return build.join(lambda: parts_of(requests), len(requests), start_engine, wanted, retry_failures=False)
    finally:
        build.close()


def silence(folder: Path, worker: str = "*") -> None:
    """Sets the heartbeats in a folder of leases so far back that their workers count as dead, instead of waiting."""
    for heartbeat in folder.glob(f"{worker}.json"):
        os.utime(heartbeat, (time.time() - 2 * EXPIRY_S,) * 2)


def fall_silent(work: JoinedWork[Any], *_: object) -> None:
    """In place of `JoinedWork.__exit__`: what a worker that dies leaves, which gives nothing back."""
    work.leases._ended.set()
    # A late heartbeat would revive it.
    work.leases._thread.join()
    silence(on_disk(work.leases.folder), work.leases.worker)


@contextlib.contextmanager
def killed_before_commit(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What runs inside ends between the rename of its first file and the commit, and must reach it."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Table, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            yield


def main() -> None:
    obey_parent()
    cache, share, num_prompts, step_s, *impatient = sys.argv[1:]
    for name, value in IMPATIENCE.items() if impatient else ():
        module, _, attribute = name.rpartition(".")
        setattr(importlib.import_module(module), attribute, value)
    config = make_config(location(cache), shard={"row_group_tokens": 200, "max_mb": 0.01})

    def start_engine() -> FakeEngine:
        engine = make_engine(float(step_s))
        step = engine.step

        def hurried() -> list[Outcome]:
            if Path(f"{cache}.hurry").exists():
                engine._step_s = 0.0
            return step()

        vars(engine)["step"] = hurried
        return engine

    if share == "join":
        result = join_build(config, make_requests(int(num_prompts)), start_engine)
    else:
        index, count = map(int, share.split("/"))
        result = run_build(config, make_requests(int(num_prompts), index, count), start_engine, f"w{index}of{count}")
    print_result(result_json(config, result), [], as_json=True)
    # 130 as the command itself would end.
    sys.stdout.flush()
    os._exit(130 if result.stopped else 0)


if __name__ == "__main__":
    main()
