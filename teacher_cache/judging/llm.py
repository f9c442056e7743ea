"""A language model as second opinion: chains that no judge could decide are put to it, and its verdicts are kept.

In: a configuration of its own (LlmJudgeConfig), and questions. Out: verdicts in the order in which replies come, from
any OpenAI-compatible endpoint or from vLLM in this process. A judge is a model with its prompt and parameters, and its
name says so (`llm_1a2b3c4d`): nothing is asked twice, and another prompt is another judge.
"""

import asyncio
import contextlib
import itertools
import random
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.config import read_yaml, validate_config
from stillroom.errors import ConfigError, StillroomError, one_line
from stillroom.judging.answers import Verdict, undecided
from stillroom.judging.opinion import CLOSING, opinion_prompt, read_opinion, verdict_without_asking
from stillroom.judging.pairs import Pair
from stillroom.models import load_tokenizer
from stillroom.schema.records import Message, Prompt, stable_hash
from teacher_cache.config import CaptureConfig, TeacherConfig
from teacher_cache.engine.api import Engine, Finished, Outcome, Request
from teacher_cache.judging.config import LlmJudgeConfig
from teacher_cache.prompts.rendering import tokenize

MAX_REFUSED = 5
"""Refusals without a reply after which it must be the request's form that is refused, not a chain."""
MAX_RETRY_AFTER_S = 60.0
KEY_STATUS = {401, 403}
NO_ENDPOINT_STATUS = {404, 405}


@dataclass(frozen=True, slots=True)
class Question:
    """One answer to be judged; `key` is the caller's."""

    key: str
    question: str
    reference: str | None
    answer: str | None


@dataclass(frozen=True, slots=True)
class Opinion:
    """The verdict on one answer. `was_refused`: the request was not accepted, so nothing was asked or paid."""

    key: str
    verdict: Verdict
    was_refused: bool = False


def load_llm_judge(path: Path) -> LlmJudgeConfig:
    """Raises ConfigError for the first key that is wrong."""
    return validate_config(read_yaml(path), LlmJudgeConfig, str(path))


def llm_judge_name(config: LlmJudgeConfig) -> str:
    """`<name>_<8 hex>`: another model, prompt or parameter is another judge, the same model elsewhere is not."""
    return f"{config.name}_{stable_hash('judge', *_identity(config).values())[:8]}"


def llm_judge_record(config: LlmJudgeConfig) -> dict[str, Any]:
    """What is kept with the verdicts of this judge."""
    return {"judge": llm_judge_name(config), **_identity(config)}


def opinions(config: LlmJudgeConfig, questions: Iterable[Question]) -> Generator[Opinion]:
    """One opinion per question, in the order in which they come.

    Raises ConfigError for a key, address or parameter that the endpoint refuses, StillroomError if it cannot be used;
    opinions that came before were yielded.
    """
    settled: list[Opinion] = []

    def to_ask() -> Iterator[Question]:
        for one in questions:
            verdict = verdict_without_asking(config.asked, one.reference, one.answer)
            if verdict is None:
                yield one
            else:
                # Handed over between replies: whoever reads the questions gets nothing for these.
                settled.append(Opinion(one.key, verdict))

    found = _of_engine(config, to_ask()) if config.endpoint is None else _of_endpoint(config, to_ask())
    with contextlib.closing(found):
        for one in found:
            yield one
            yield from _drained(settled)
    yield from _drained(settled)


def opinions_on_pairs(config: LlmJudgeConfig, pairs: Sequence[Pair]) -> Iterator[tuple[Pair, Verdict]]:
    """Verdicts on pairs, in their order."""
    questions = (Question(str(number), pair.question, pair.reference, pair.answer) for number, pair in enumerate(pairs))
    waiting: dict[int, Verdict] = {}
    number = 0
    with contextlib.closing(opinions(config, questions)) as found:
        for one in found:
            waiting[int(one.key)] = one.verdict
            while number in waiting:
                yield pairs[number], waiting.pop(number)
                number += 1


def _drained(done: list[Opinion]) -> Iterator[Opinion]:
    while done:
        yield done.pop()


def _identity(config: LlmJudgeConfig) -> dict[str, Any]:
    prompt = f"{config.asked}\n\n{CLOSING}"
    return {
        "model": config.model,
        "revision": config.revision,
        "prompt": prompt,
        "parameters": config.parameters,
    }


def _read(config: LlmJudgeConfig, one: Question, reply: str | None, finish_reason: str | None) -> Opinion:
    return Opinion(one.key, read_opinion(reply, finish_reason, config.model, one.answer or "", one.reference))


def _message(config: LlmJudgeConfig, one: Question) -> str:
    return opinion_prompt(config.asked, one.question, one.reference, one.answer or "")


def _of_endpoint(config: LlmJudgeConfig, questions: Iterator[Question]) -> Generator[Opinion]:
    """At most `max_in_flight` questions at once, in an event loop that turns only while the caller waits."""
    from teacher_cache.engine.http.client import HttpClient, read_api_key

    key = read_api_key(config.api_key_env, "api_key_env")
    http = HttpClient(str(config.endpoint), key, config.timeout_s)
    loop = asyncio.new_event_loop()
    tasks: set[asyncio.Task[Opinion]] = set()
    refused, num_refused, num_answered = "", 0, 0
    try:
        while True:
            # A refusal comes sooner than a reply: wait for the replies under way before every question is blamed.
            is_suspect = num_refused >= MAX_REFUSED and not num_answered
            for one in itertools.islice(questions, 0 if is_suspect else config.max_in_flight - len(tasks)):
                tasks.add(loop.create_task(_ask(http, config, one)))
            if not tasks and is_suspect:
                raise ConfigError(
                    f"{config.endpoint} rejects every request ({refused}): check `parameters`, and the model's "
                    "maximum length"
                )
            if not tasks:
                return
            done, tasks = loop.run_until_complete(asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED))
            # Paid replies are handed over before the error of another.
            for task in sorted(done, key=lambda task: task.exception() is not None):
                opinion = task.result()
                num_refused, num_answered = num_refused + opinion.was_refused, num_answered + (not opinion.was_refused)
                refused = opinion.verdict.rule or "" if opinion.was_refused else refused
                yield opinion
    finally:
        loop.run_until_complete(_give_up(http, tasks))
        loop.close()


async def _give_up(http: Any, tasks: "set[asyncio.Task[Opinion]]") -> None:
    for task in tasks:
        # Cancelled and awaited before the client closes, or errors of their requests would be lost.
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await http.__aexit__(None, None, None)


async def _ask(http: Any, config: LlmJudgeConfig, one: Question) -> Opinion:
    from teacher_cache.engine.http.client import Refused, Unavailable
    from teacher_cache.engine.http.pool import pause_s

    body = {
        "model": config.model,
        "messages": [{"role": "user", "content": _message(config, one)}],
        **config.parameters,
    }
    for attempt in itertools.count(1):
        try:
            answer = await http.post("/chat/completions", body)
            choice = answer["choices"][0]
            return _read(config, one, choice["message"].get("content"), choice.get("finish_reason"))
        except Refused as error:
            return Opinion(one.key, undecided(f"refused: {error}"), was_refused=True)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{config.endpoint} does not answer like an OpenAI-compatible API: {one_line(error)}"
            ) from error
        except Unavailable as error:
            _raise_if_final(config, error.status, str(error))
            if attempt == config.max_attempts:
                raise StillroomError(
                    f"{config.endpoint} {error}, {attempt} times in a row: verdicts so far are kept, and the same "
                    "command continues with the rest"
                ) from error
            await asyncio.sleep(max(pause_s(attempt, random.Random()), min(error.retry_after_s, MAX_RETRY_AFTER_S)))
    raise AssertionError


def _raise_if_final(config: LlmJudgeConfig, status: int | None, problem: str) -> None:
    if status in KEY_STATUS:
        where = (
            "set api_key_env to the variable that holds it"
            if config.api_key_env is None
            else f"check {config.api_key_env}"
        )
        raise ConfigError(f"{config.endpoint} rejects the API key: {where}")
    if status in NO_ENDPOINT_STATUS:
        raise ConfigError(
            f"{config.endpoint}/chat/completions {problem}: set endpoint to the API's base address, such as "
            "http://host:8000/v1, and model to a name that it serves"
        )


def _of_engine(config: LlmJudgeConfig, questions: Iterator[Question]) -> Generator[Opinion]:
    tokenizer = load_tokenizer(config.model, config.revision, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise ConfigError(f"the tokenizer of {config.model} has no chat template: use an instruction-tuned model")
    engine: Engine | None = None
    waiting: dict[str, Question] = {}
    try:
        while True:
            # The model is loaded for the first question, if there is one.
            for one in questions:
                engine = engine or start_engine(config)
                waiting[one.key] = one
                request = _request(config, tokenizer, one)
                if isinstance(request, str):
                    yield Opinion(waiting.pop(one.key).key, undecided(f"refused: {request}"), was_refused=True)
                else:
                    engine.submit(request)
                if not engine.has_room():
                    break
            if engine is None or not engine.num_unfinished:
                return
            for outcome in engine.step():
                yield _of_outcome(config, tokenizer, waiting.pop(outcome.sample_id), outcome)
    finally:
        if engine is not None:
            engine.close()


def start_engine(config: LlmJudgeConfig) -> Engine:
    """vLLM with the judge's model."""
    from teacher_cache.engine.vllm.engine import EmbeddedEngine

    model = TeacherConfig(model=config.model, revision=config.revision)
    return EmbeddedEngine(model, config.engine, CaptureConfig(max_support=1, draws=0))


def _request(config: LlmJudgeConfig, tokenizer: Any, one: Question) -> Request | str:
    """The request, or why the chat template refuses it."""
    prompt = Prompt(one.key, (Message("user", _message(config, one)),), config.name, "train")
    sampling: Mapping[str, Any] = config.parameters
    (ids,) = tokenize(tokenizer, [prompt], config.parameters.get("chat_template_kwargs", {}))
    if isinstance(ids, str):
        return ids
    # 15 hex digits are 60 bits: every engine takes them as a seed.
    seed = int(stable_hash("judge", one.key)[:15], 16)
    return Request(prompt, ids, 0, seed, sampling, int(config.parameters["max_tokens"]), one.key)


def _of_outcome(config: LlmJudgeConfig, tokenizer: Any, one: Question, outcome: Outcome) -> Opinion:
    if not isinstance(outcome, Finished):
        return Opinion(one.key, undecided(f"refused: {outcome.message}"), was_refused=True)
    ids = outcome.capture.token_ids_T.tolist()
    # The token that ends the turn is not part of the reply.
    if outcome.finish_reason == "stop" and ids[-1] in tokenizer.all_special_ids:
        ids = ids[:-1]
    # Special tokens stay: </think> may be one.
    reply = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    return _read(config, one, reply, outcome.finish_reason)
