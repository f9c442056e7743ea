"""OpenAIEngine: a teacher behind an OpenAI-compatible API, which takes messages and answers text.

In: requests. Out: chains in the tokens of `teacher.model`. With `signals: top_logprobs` every token of an answer and
every candidate must be one token of that tokenizer, byte for byte, or the chain is a failure; the token that ends the
turn, which APIs do not report, is stored as certain, unless a `stop` string may have ended it. With `signals: none` the
text is tokenised here and each token is its own only candidate: such a cache holds no distributions, its manifest says
so, and trainers take it as text alone.

An answer's reasoning (`reasoning_content`, or `reasoning`) becomes the chain's reasoning between the usual markers.

Shape legend: T completion tokens, K candidates.
"""

import asyncio
import itertools
import queue
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stillroom.errors import ConfigError, StillroomError
from stillroom.log import note
from stillroom.models import end_id_of, reasoning_ids
from stillroom.pieces import vocabulary_of
from stillroom.schema.records import Capture, Message, Prompt
from teacher_cache.config import OFF, CaptureConfig, OpenAIConfig, ReasoningConfig
from teacher_cache.engine.api import EngineInfo, Finished, Outcome, Request, refusal
from teacher_cache.engine.http.client import HttpClient, Refused, Unavailable, failed_choice, read_api_key
from teacher_cache.engine.http.handshake import KEY_STATUS, NO_ENDPOINT_STATUS
from teacher_cache.engine.http.pool import pause_s
from teacher_cache.engine.teacher import IdentifiedTeacher

PATH = "/chat/completions"
STEP_S = 0.2
PROBE = "Count from one to five in words, separated by commas."
PROBE_TOKENS = 64
"""Enough for the models that reason first; the answer may be cut."""
NO_LIMIT = 1 << 30
"""APIs do not report the length of their context; they refuse what is longer."""
LEAST_NATS = -100.0
MAX_ABOVE_NATS = 0.01
"""Half precision rounds a probability of 1 up; anything higher, and NaN, is none."""
REPLACEMENT = "\ufffd".encode()
"""What decoders write for a part of a character."""
REASONING_KEYS = ("reasoning_content", "reasoning")
FINISHES = {
    **dict.fromkeys(("stop", "eos", "eos_token", "end_turn"), "stop"),
    **dict.fromkeys(("length", "max_tokens", "model_length"), "length"),
}
"""Names of the two ways in which an answer may end."""
USAGE_KEY = "api_usage"
"""Of a row's metadata: the tokens that the API counted, hidden reasoning among them."""
MAX_PAUSE_S = 3600.0
"""Longest pause that an API may ask for: a limit per hour is over by then."""
FORBIDDEN_STATUS = 403
"""A wrong key, and with some gateways also a prompt that their moderation rejects."""
MOVED_STATUS = {301, 302, 303, 307, 308}
NO_CREDIT_STATUS = 402
NO_CREDIT_CODES = ("insufficient_quota", "billing_hard_limit_reached")
"""Sent with 429, and no pause helps."""

Json = Mapping[str, Any]
MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError)


class Unusable(Exception):
    """An answer that cannot become a chain, in one line."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one choice says."""

    text: str
    reasoning: str | None
    finish_reason: str
    is_ended: bool
    """Whether the model ended its turn, as far as the API says."""
    logprobs: Sequence[Json] | None


class OpenAIEngine:
    """Implements teacher_cache.engine.api.Engine."""

    def __init__(
        self, config: OpenAIConfig, vocab_size: int, chat: "OpenAIChat", sampling: Sequence[Mapping[str, Any]]
    ) -> None:
        """Asks one short question with the parameters of each kind of `sampling`. Raises ConfigError if an answer shows
        that the endpoint does not fit, StillroomError if there is none.
        """
        self._config, self._chat = config, chat
        self._http = HttpClient(config.endpoint, read_api_key(config.api_key_env, "engine.api_key_env"), config.stall_s)
        self._answers: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()
        self._num_open = self._num_tokens = 0
        self._answered_s = time.monotonic()
        """When the API last answered anything but an error."""
        self._error: BaseException | None = None
        self._closed = self._has_noted_busy = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="api engine", daemon=True)
        self._thread.start()
        limit = config.max_model_len or NO_LIMIT
        settings = {"max_model_len": config.max_model_len, "signals": config.signals}
        self.info = EngineInfo(vocab_size, limit, "support", {}, settings)
        probe = asyncio.run_coroutine_threadsafe(self._probe(sampling), self._loop)
        try:
            probe.result()
        except BaseException:
            # Also Ctrl-C, while the API lets it wait.
            probe.cancel()
            self.close()
            raise

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    @property
    def num_unfinished(self) -> int:
        return self._num_open

    def has_room(self) -> bool:
        return self._num_open < self._config.max_in_flight

    def submit(self, request: Request) -> None:
        self._num_open += 1
        refused = refusal(request, self.info)
        if refused is not None:
            self._answers.put(refused)
        else:
            self._loop.call_soon_threadsafe(self._start, request)

    def step(self) -> list[Outcome]:
        outcomes: list[Outcome] = []
        timeout_s = STEP_S
        while self._num_open and self._error is None:
            try:
                answer = self._answers.get(timeout=timeout_s) if timeout_s else self._answers.get_nowait()
            except queue.Empty:
                break
            timeout_s = 0.0
            if isinstance(answer, BaseException):
                self._error = answer
            else:
                outcomes.append(answer)
        # Answers that were paid for are handed over before the error of another.
        while self._error is not None and not self._answers.empty():
            answer = self._answers.get_nowait()
            outcomes += [] if isinstance(answer, BaseException) else [answer]
        if not outcomes and self._error is not None:
            raise self._error
        self._num_open -= len(outcomes)
        self._num_tokens += sum(len(one.capture.token_ids_T) for one in outcomes if isinstance(one, Finished))
        return outcomes

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        asyncio.run_coroutine_threadsafe(self._give_up(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _give_up(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._http.__aexit__(None, None, None)

    def _start(self, request: Request) -> None:
        task = asyncio.get_running_loop().create_task(self._run(request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, request: Request) -> None:
        try:
            self._answers.put(await self._ask(request))
        except Exception as error:  # noqa: BLE001 - raised again in the build's thread
            self._answers.put(error)

    async def _ask(self, request: Request) -> Outcome:
        num_attempts, started_s = 0, time.monotonic()
        for number in itertools.count(1):
            begun_s = time.monotonic()
            try:
                answer = await self._http.post(PATH, self._chat.body(request))
                outcome = self._chat.outcome(request, answer)
                self._answered_s = time.monotonic()
                return outcome
            except Refused as error:
                return request.failure("refused", str(error))
            except Unusable as error:
                return request.failure("engine_error", str(error))
            except Unavailable as error:
                trouble = await self._trouble(request) if error.status == FORBIDDEN_STATUS else error
                if trouble is None:
                    # The key is right, and only this prompt is rejected.
                    return request.failure("refused", str(error))
                self._raise_if_final(trouble)
                # A busy API did no work: it may stay so for hours, which is not the chain's fault.
                num_attempts += not trouble.is_busy
                self._note_busy(trouble)
                if num_attempts >= self._config.max_attempts:
                    # Others were answered between these attempts.
                    if started_s < self._answered_s < begun_s:
                        return request.failure(
                            "engine_error", f"after {num_attempts} attempts {self._config.endpoint} {trouble}"
                        )
                    # Otherwise the API may be down, which is not the fault of this chain.
                    num_attempts, started_s = 0, time.monotonic()
                    if await self._trouble(request) is not None:
                        self._give_up_if_long(trouble)
                await self._pause(number, trouble)
        raise AssertionError

    async def _trouble(self, request: Request) -> Unavailable | None:
        """What keeps the API from answering a short question, None if it answers."""
        try:
            await self._http.post(PATH, self._chat.body(_probe_of(request.sampling)))
        except Unavailable as error:
            return error
        except Refused:
            pass
        self._answered_s = time.monotonic()
        return None

    def _give_up_if_long(self, error: Unavailable) -> None:
        minutes = self._config.give_up_minutes
        if time.monotonic() - self._answered_s > 60 * minutes:
            raise StillroomError(
                f"{self._config.endpoint} {error}, for {minutes:g} minutes (engine.give_up_minutes): run the same "
                "command again to resume"
            ) from error

    async def _pause(self, number: int, error: Unavailable) -> None:
        await asyncio.sleep(max(pause_s(number, random.Random()), min(error.retry_after_s, MAX_PAUSE_S)))

    async def _probe(self, samplings: Sequence[Mapping[str, Any]]) -> None:
        """Raises ConfigError if no build could use the answers."""
        # Exactly what builds send: some models take no temperature but 1, and some no top_p.
        requests = {str(self._chat.body(one)): one for one in map(_probe_of, samplings)}
        for request in requests.values():
            await self._probe_with(request)
        self._answered_s = time.monotonic()

    async def _probe_with(self, request: Request) -> None:
        where = self._config.endpoint
        for number in itertools.count(1):
            try:
                answer = await self._http.post(PATH, self._chat.body(request))
                self._chat.outcome(request, answer, is_probe=True)
                return
            except Unusable as error:
                raise ConfigError(f"{where} {error}") from error
            except Refused as error:
                raise ConfigError(
                    f"{where} rejects a request that builds need: {error} (sampling sets temperature, top_p and the "
                    "like; engine.parameters removes a field with null)"
                ) from error
            except Unavailable as error:
                self._raise_if_final(error)
                if number >= self._config.max_attempts:
                    raise StillroomError(f"{where} {error}, {number} times in a row: try again later") from error
                self._note_busy(error)
                await self._pause(number, error)

    def _note_busy(self, error: Unavailable) -> None:
        # Once: it may come and go with every chain.
        if error.is_busy and not self._has_noted_busy:
            self._has_noted_busy = True
            slower = "overloaded, sending requests more slowly (lower engine.max_in_flight to send fewer)"
            note(f"{self._config.endpoint} {error}: {slower}")

    def _raise_if_final(self, error: Unavailable) -> None:
        where = self._config.endpoint
        if error.status == NO_CREDIT_STATUS or error.code in NO_CREDIT_CODES:
            raise StillroomError(f"{where} {error}: add credit there, then run the same command again to resume")
        if error.status in KEY_STATUS:
            variable = self._config.api_key_env
            remedy = "set engine.api_key_env to the variable that holds it" if variable is None else f"check {variable}"
            raise ConfigError(f"{where} rejects the API key: {remedy}") from error
        if error.status in NO_ENDPOINT_STATUS | MOVED_STATUS:
            raise ConfigError(f"{where}{PATH} {str(error).rstrip('.')}: {self._remedy(error)}") from error

    def _remedy(self, error: Unavailable) -> str:
        if error.status in MOVED_STATUS:
            return f"set engine.endpoint to that address without {PATH}"
        # APIs answer 404 also for a model that they do not serve, and say so.
        if self._config.model in str(error) or "model" in error.code:
            return f"set engine.model ({self._config.model}) to a name that this API serves"
        return "set engine.endpoint to the API's base address, such as http://host:8000/v1"


class OpenAIChat:
    """Bodies of requests, and answers as chains. No I/O."""

    def __init__(
        self,
        config: OpenAIConfig,
        teacher: IdentifiedTeacher,
        capture: CaptureConfig,
        reasoning: ReasoningConfig,
        template_kwargs: Mapping[str, Any],
    ) -> None:
        self._config, self._tokenizer, self._template_kwargs = config, teacher.tokenizer, template_kwargs
        self._k = capture.max_support
        self._marks = reasoning
        self._start_id, _ = reasoning_ids(teacher.tokenizer, reasoning.start, reasoning.end)
        self._end_id = end_id_of(teacher.tokenizer, template_kwargs)
        self._has_stops = any(value for name, value in config.parameters.items() if name.startswith("stop"))
        self._ids: dict[bytes, int] = {}
        if config.signals == "top_logprobs":
            table = vocabulary_of(teacher.tokenizer).bytes_by_id()
            # Backwards: of two tokens with the same bytes the first is the one that text is tokenised to.
            self._ids = {data: number for number, data in reversed([*enumerate(table)]) if data}

    def body(self, request: Request) -> dict[str, Any]:
        """The request to post."""
        config, sampling = self._config, request.sampling
        body: dict[str, Any] = {
            "model": config.model,
            "messages": [{"role": one.role, "content": one.content} for one in request.prompt.messages],
            "temperature": sampling.get("temperature", 1.0),
            "max_tokens": request.max_tokens,
            "seed": request.seed,
            # Only where they have an effect: not every API knows them.
            **{key: sampling[key] for key, off in OFF.items() if sampling.get(key, off) != off},
        }
        if config.signals == "top_logprobs":
            body |= {"logprobs": True, "top_logprobs": self._k}
        if self._template_kwargs:
            body["chat_template_kwargs"] = dict(self._template_kwargs)
        # None removes a field: newer models of OpenAI want max_completion_tokens and no temperature.
        return {key: value for key, value in {**body, **config.parameters}.items() if value is not None}

    def outcome(self, request: Request, answer: Json, *, is_probe: bool = False) -> Outcome:
        """The chain. Raises Unusable if the answer cannot become one, Unavailable if it says that it failed."""
        try:
            self._require_model(answer)
            if (failed := failed_choice(_choice_of(answer))) is not None:
                raise failed
            read = self._read(_choice_of(answer))
            if self._config.signals == "top_logprobs":
                capture = self._with_logprobs(read)
            else:
                capture = self._of_text(request, read)
        except Unusable:
            raise
        except MALFORMED as error:
            raise Unusable(
                f"does not answer like an OpenAI-compatible API ({type(error).__name__}: {error})"
            ) from error
        if is_probe:
            return request.failure("probe", "")
        if not len(capture.token_ids_T):
            return request.failure("engine_error", f"the answer is empty (finish_reason {read.finish_reason!r})")
        return Finished(_with_usage(request, answer), capture, read.finish_reason)

    def _read(self, choice: Json) -> Answer:
        message, reason = choice["message"], choice["finish_reason"]
        if reason not in FINISHES:
            raise Unusable(f"ended the answer with {reason!r}")
        if message.get("refusal"):
            raise Unusable("declines to answer")
        texts, thoughts = _parts_of(message.get("content") or "")
        thoughts = next((message[key] for key in REASONING_KEYS if message.get(key)), None) or thoughts
        finish = FINISHES[reason]
        # `stop` is also the reason of a stop string. Which one it was, vLLM says in stop_reason, and most APIs nowhere.
        is_ended = finish == "stop" and (not self._has_stops or choice.get("stop_reason", "") in (None, self._end_id))
        logprobs = choice.get("logprobs")
        return Answer(texts, thoughts, finish, is_ended, None if logprobs is None else logprobs.get("content"))

    def _require_model(self, answer: Json) -> None:
        model, wanted = str(answer.get("model") or self._config.model), self._config.model
        # APIs answer with the dated version of a name: gpt-4o-2024-08-06 for gpt-4o.
        if not model.rpartition("/")[2].startswith(wanted.rpartition("/")[2]):
            raise Unusable(f"answers as model {model!r}, not as engine.model={wanted}: set engine.model to that name")

    def _of_text(self, request: Request, read: Answer) -> Capture:
        start, end = self._marks.start, self._marks.end
        text = read.text
        if read.reasoning is not None:
            # Many templates open the reasoning in the prompt.
            opened = self._start_id is not None and self._start_id in request.prompt_token_ids
            # A chain that was cut in its reasoning has not ended it.
            closing = f"\n{end}\n\n" if text or read.is_ended else ""
            text = f"{'' if opened else start}\n{read.reasoning.strip()}{closing}{text}"
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        if ids and read.is_ended and self._end_id is not None:
            ids.append(self._end_id)
        certain_T = np.zeros(len(ids), np.float32)
        ids_T = np.array(ids, np.int32)
        return Capture(ids_T, certain_T, np.ones(len(ids), np.int32), ids_T[:, None], certain_T[:, None])

    def _with_logprobs(self, read: Answer) -> Capture:
        if read.reasoning:
            raise Unusable("gives no log probabilities for its reasoning: set engine.signals: none")
        if read.logprobs is None:
            raise Unusable("gives no log probabilities: set engine.signals: none, or use another model")
        ids, logprobs, ranks, top_ids, top_logprobs = [], [], [], [], []
        for entry in read.logprobs:
            candidates = sorted(entry["top_logprobs"], key=lambda one: -one["logprob"])[: self._k]
            if len(candidates) < self._k:
                raise Unusable(
                    f"gives {len(candidates)} top log probabilities, {self._k} were requested: lower "
                    "capture.max_support"
                )
            if REPLACEMENT in _bytes_of(entry):
                raise Unusable("gives parts of characters without their bytes: set engine.signals: none")
            is_end = not _bytes_of(entry) and entry is read.logprobs[-1] and read.is_ended
            own = self._end_id if is_end and self._end_id is not None else self._id_of(entry)
            # Left out, so that their mass is in the tail: parts of a character that come without their bytes, and
            # special tokens, which vLLM's server writes as nothing.
            known = [one for one in candidates if _bytes_of(one) and REPLACEMENT not in _bytes_of(one)]
            row = {self._id_of(one): _logprob(one) for one in reversed(known)}
            if is_end and not all(map(_bytes_of, candidates)):
                row[own] = _logprob(entry)
            row = dict(sorted(row.items(), key=lambda one: -one[1]))
            ids.append(own)
            logprobs.append(_logprob(entry))
            # Outside the candidates the rank is unknown: at least the next.
            ranks.append([*row].index(own) + 1 if own in row else self._k + 1)
            # Rows are of one width: any other ids, with next to no probability.
            row |= dict.fromkeys(
                itertools.islice((one for one in itertools.count() if one not in row), self._k - len(row)), LEAST_NATS
            )
            top_ids.append([*row])
            top_logprobs.append([*row.values()])
        _require_whole(read)
        if read.is_ended and self._end_id is not None and ids and ids[-1] != self._end_id:
            ids.append(self._end_id)
            logprobs.append(0.0)
            ranks.append(1)
            # Other candidates have next to no probability, whatever their ids.
            top_ids.append([self._end_id, *(one for one in range(self._k) if one != self._end_id)][: self._k])
            top_logprobs.append([0.0] + [LEAST_NATS] * (self._k - 1))
        shape = (len(ids), self._k)
        return Capture(
            np.array(ids, np.int32),
            np.array(logprobs, np.float32),
            np.array(ranks, np.int32),
            np.array(top_ids, np.int32).reshape(shape),
            np.array(top_logprobs, np.float32).reshape(shape),
        )

    def _id_of(self, entry: Json) -> int:
        data = _bytes_of(entry)
        if not data:
            raise Unusable(
                "answers with special tokens as nothing: set engine.signals: none, or engine.kind: server for vLLM"
            )
        found = self._ids.get(data)
        if found is None:
            raise Unusable(
                f"answers with the token {data!r}, which the tokenizer of teacher.model lacks: set teacher.model to "
                "this model's own tokenizer, or engine.signals: none"
            )
        return found


def _probe_of(sampling: Mapping[str, Any]) -> Request:
    message = Prompt("probe", (Message("user", PROBE),), "probe", "train")
    return Request(message, [0], 0, 0, sampling, PROBE_TOKENS, "probe")


def _choice_of(answer: Json) -> Json:
    choices = answer.get("choices")
    if not choices:
        raise Unusable("does not answer like an OpenAI-compatible API (no choices)")
    choice: Json = choices[0]
    return choice


def _parts_of(content: str | Sequence[Json]) -> tuple[str, str | None]:
    """Text and reasoning of a message's content, which some APIs give in parts."""
    if isinstance(content, str):
        return content, None
    texts = "".join(one["text"] for one in content if one["type"] == "text")
    thoughts = "".join(_parts_of(one["thinking"])[0] for one in content if one["type"] == "thinking")
    return texts, thoughts or None


def _require_whole(read: Answer) -> None:
    """Raises Unusable if the tokens lack a part of the text: the chain would be another answer."""
    spelt = iter(b"".join(map(_bytes_of, read.logprobs or ())).decode(errors="replace"))
    # In order, but not all: some APIs leave special tokens out of the text, and white space at its ends. Half of a
    # character at the end of a cut answer is one replacement sign or several.
    if not all(character in spelt for character in read.text.strip().replace("\ufffd", "")):
        raise Unusable("gives log probabilities for a part of its answer only: set engine.signals: none")


def _with_usage(request: Request, answer: Json) -> Request:
    usage = answer.get("usage")
    usage = usage if isinstance(usage, Mapping) else {}
    counts = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
    if not all(isinstance(one, int) for one in counts.values()):
        return request
    metadata = {**request.prompt.metadata, USAGE_KEY: counts}
    return replace(request, prompt=replace(request.prompt, metadata=metadata))


def _bytes_of(entry: Json) -> bytes:
    return bytes(entry["bytes"]) if entry.get("bytes") else str(entry["token"]).encode()


def _logprob(entry: Json) -> float:
    value = float(entry["logprob"])
    if not value <= MAX_ABOVE_NATS:
        raise Unusable(f"gives the log probability {value:g}")
    # OpenAI and vLLM write -9999 for minus infinity.
    return min(max(value, LEAST_NATS), 0.0)
