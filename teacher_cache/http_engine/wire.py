"""What is said to a vLLM server over HTTP and what its answers mean: bodies and JSON to arrays. No I/O.

Two ways lead into a server. `/inference/v1/generate` (vllm serve --enable-scale-out) takes and gives token ids and
decodes nothing. `/v1/completions` is what every server has; it decodes every candidate to text, which costs it several
times the CPU, and tells no ranks: a token drawn from outside the k candidates needs a second question.

In both, candidates come as a mapping in this order: the sampled token, then the most probable ones by rank, the sampled
one not repeated. Values are float32 written out in full, -9999 stands for minus infinity and null for NaN.

Shape legend: T completion tokens, K candidates, n tokens of one message.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from schemas.records import Capture, Float32, Int32
from teacher_cache.requests import Request

STREAM_INTERVAL = 16
"""Tokens a message of the stream: progress is seen, a dead server is noticed, and messages cost little."""

MINUS_INFINITY = -9999.0
"""What vLLM writes for it, JSON has no infinities."""

TOKEN_ID_PREFIX = "token_id:"

UNKNOWN_RANK = 0
"""Rank of a sampled token outside the candidates where the answer does not tell it."""

Json = Mapping[str, Any]


class BadAnswer(ValueError):
    """The answer is not what was asked for. The message is one line without the server's name."""


MALFORMED = (BadAnswer, KeyError, IndexError, TypeError, ValueError, AttributeError)
"""What reading an answer of another form raises."""


class Rows:
    """Growing arrays of one completion, message by message."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.num_tokens = 0
        self._blocks: list[tuple[Int32, Float32, Int32, Int32, Float32]] = []

    def add(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float | None],
        ranks: Sequence[int],
        topk_ids: Sequence[int],
        topk_logprobs: Sequence[float | None],
    ) -> None:
        """Takes n tokens; `topk_*` hold n K entries, one token after the other."""
        num = len(token_ids)
        if len(topk_ids) != num * self.k:
            raise BadAnswer(f"{len(topk_ids)} candidates came for {num} tokens, {self.k} a token were asked for")
        self.num_tokens += num
        self._blocks.append(
            (
                np.array(token_ids, np.int32),
                _logprobs(logprobs),
                np.array(ranks, np.int32),
                np.array(topk_ids, np.int32).reshape(num, self.k),
                _logprobs(topk_logprobs).reshape(num, self.k),
            )
        )

    def capture(self) -> Capture:
        """All tokens. Raises BadAnswer where none came."""
        if not self.num_tokens:
            raise BadAnswer("the completion holds no token")
        token_ids_T, logprob_T, rank_T, topk_ids_TK, topk_logprobs_TK = map(
            np.concatenate, zip(*self._blocks, strict=True)
        )
        return Capture(token_ids_T, logprob_T, rank_T, topk_ids_TK, topk_logprobs_TK)


class Api(Protocol):
    """One of the two ways."""

    path: str
    """Where bodies are posted."""
    num_spare_tokens: int
    """Of the server's max_model_len, what a chain may not take: room for asking about all of it."""

    def num_logprobs(self, k: int, vocab_size: int) -> int:
        """What must be asked for so that K candidates are known, and what --max-logprobs must allow."""

    def generation(self, model: str, request: Request, num_logprobs: int, max_tokens: int) -> dict[str, Any]:
        """Body that generates a chain as a stream."""

    def forced(self, model: str, token_ids: Sequence[int], num_logprobs: int) -> dict[str, Any]:
        """Body that generates the last of the tokens after the others, as a stream: no other is allowed."""

    def scoring(self, model: str, token_ids: Sequence[int], k: int, num_logprobs: int) -> dict[str, Any]:
        """Body that has all tokens scored, in one answer."""

    def read(self, choice: Json, rows: Rows) -> None:
        """Adds the tokens of one message."""

    def read_scores(self, answer: Json, token_ids: Sequence[int], num_prompt_tokens: int, rows: Rows) -> None:
        """Adds the scored tokens that follow the prompt."""


class GenerateApi:
    """Token ids in and out, with ranks."""

    path = "/inference/v1/generate"
    num_spare_tokens = 0

    def num_logprobs(self, k: int, vocab_size: int) -> int:
        # The sampled token is one of the entries: without it k must be left.
        return min(k + 1, vocab_size)

    def generation(self, model: str, request: Request, num_logprobs: int, max_tokens: int) -> dict[str, Any]:
        sampling = {
            **neutral_sampling(request.sampling),
            "seed": request.seed,
            "max_tokens": max_tokens,
            "stream_interval": STREAM_INTERVAL,
        }
        return self._body(model, request.prompt_token_ids, sampling, num_logprobs) | {"stream": True}

    def forced(self, model: str, token_ids: Sequence[int], num_logprobs: int) -> dict[str, Any]:
        sampling = {"temperature": 0.5, "max_tokens": 1, "allowed_token_ids": [token_ids[-1]]}
        return self._body(model, token_ids[:-1], sampling, num_logprobs) | {"stream": True}

    def scoring(self, model: str, token_ids: Sequence[int], k: int, num_logprobs: int) -> dict[str, Any]:
        # The last token is generated rather than read: a chain that fills the model's length has room for no other.
        sampling = {
            "temperature": 0.0,
            "max_tokens": 1,
            "allowed_token_ids": [token_ids[-1]],
            "prompt_logprobs": k,
        }
        return self._body(model, token_ids[:-1], sampling, num_logprobs)

    def read(self, choice: Json, rows: Rows) -> None:
        token_ids = choice["token_ids"]
        logprobs, ranks, topk_ids, topk_logprobs = [], [], [], []
        for token_id, one in zip(token_ids, choice["logprobs"]["content"], strict=True):
            entries = one["top_logprobs"]
            if entries[0]["token_id"] != token_id:
                raise BadAnswer("its distributions do not belong to its tokens")
            rank = one["rank"]
            logprobs.append(None if rank is None else one["logprob"])
            ranks.append(rank or UNKNOWN_RANK)
            ids, values = [entry["token_id"] for entry in entries], [entry["logprob"] for entry in entries]
            topk_ids += _ranked(ids, rank, rows.k)
            topk_logprobs += _ranked(values, rank, rows.k)
        rows.add(token_ids, logprobs, ranks, topk_ids, topk_logprobs)

    def read_scores(self, answer: Json, token_ids: Sequence[int], num_prompt_tokens: int, rows: Rows) -> None:
        _read_prompt(answer["prompt_logprobs"], token_ids[:-1], num_prompt_tokens, rows)
        (choice,) = answer["choices"]
        if list(choice["token_ids"]) != [token_ids[-1]]:
            raise BadAnswer("it generated another token than the only one allowed")
        self.read(choice, rows)

    def _body(
        self, model: str, token_ids: Sequence[int], sampling: Mapping[str, Any], num_logprobs: int
    ) -> dict[str, Any]:
        # Neither text nor an object a candidate: flat_logprobs and detokenize spare the server most of its work.
        quick = {"logprobs": num_logprobs, "flat_logprobs": True, "detokenize": False}
        return {"model": model, "token_ids": list(token_ids), "sampling_params": {**sampling, **quick}}


class CompletionsApi:
    """What every vLLM server has."""

    path = "/v1/completions"
    num_spare_tokens = 1

    def num_logprobs(self, k: int, vocab_size: int) -> int:
        # k entries besides the sampled token, as OpenAI has it.
        return min(k, vocab_size)

    def generation(self, model: str, request: Request, num_logprobs: int, max_tokens: int) -> dict[str, Any]:
        sampling = neutral_sampling(request.sampling)
        limits = {"seed": request.seed, "max_tokens": max_tokens, "stream_interval": STREAM_INTERVAL, "stream": True}
        return self._body(model, request.prompt_token_ids, {**sampling, **limits, "logprobs": num_logprobs})

    def forced(self, model: str, token_ids: Sequence[int], num_logprobs: int) -> dict[str, Any]:
        asked = {"temperature": 0.5, "max_tokens": 1, "allowed_token_ids": [token_ids[-1]], "stream": True}
        return self._body(model, token_ids[:-1], {**asked, "logprobs": num_logprobs})

    def scoring(self, model: str, token_ids: Sequence[int], k: int, num_logprobs: int) -> dict[str, Any]:
        # A generated token would come without its rank, so all tokens are prompt, and the one that follows is dropped.
        return self._body(model, token_ids, {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": k})

    def read(self, choice: Json, rows: Rows) -> None:
        token_ids, given = choice["token_ids"], choice["logprobs"]
        ranks, topk_ids, topk_logprobs = [], [], []
        for token_id, candidates in zip(token_ids, given["top_logprobs"], strict=True):
            ids, values = [int(key[len(TOKEN_ID_PREFIX) :]) for key in candidates], list(candidates.values())
            if ids[0] != token_id:
                raise BadAnswer("its distributions do not belong to its tokens")
            # One entry more than k: the sampled token stands outside.
            rank = UNKNOWN_RANK if len(ids) > rows.k else _rank_among(values)
            ranks.append(rank)
            topk_ids += _ranked(ids, rank, rows.k)
            topk_logprobs += _ranked(values, rank, rows.k)
        rows.add(token_ids, given["token_logprobs"], ranks, topk_ids, topk_logprobs)

    def read_scores(self, answer: Json, token_ids: Sequence[int], num_prompt_tokens: int, rows: Rows) -> None:
        (choice,) = answer["choices"]
        _read_prompt(choice["prompt_logprobs"], token_ids, num_prompt_tokens, rows)

    def _body(self, model: str, token_ids: Sequence[int], asked: Mapping[str, Any]) -> dict[str, Any]:
        as_ids = {"return_token_ids": True, "return_tokens_as_token_ids": True}
        return {"model": model, "prompt": list(token_ids), **asked, **as_ids}


def neutral_sampling(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Every sampling parameter spelt out: what is left out would take the server's or the model's own default."""
    return {
        "temperature": sampling.get("temperature", 1.0),
        "top_p": sampling.get("top_p", 1.0),
        "top_k": sampling.get("top_k") or 0,
        "min_p": sampling.get("min_p", 0.0),
        "repetition_penalty": sampling.get("repetition_penalty", 1.0),
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def _ranked(entries: list[Any], rank: int | None, k: int) -> list[Any]:
    """The first K by rank of entries whose first is the sampled token: [s a b c], rank 2, k 3 gives [a s b]."""
    if not rank or rank > k:
        return entries[1 : k + 1]
    return entries[1:rank] + entries[:1] + entries[rank:k]


def _rank_among(values: Sequence[float | None]) -> int:
    """Rank of the first among all, behind its equals as vLLM counts it; 1 where it is no number."""
    own = values[0]
    if own is None:
        return 1
    return sum(value is None or value >= own for value in values)


def _read_prompt(
    scores: Sequence[Mapping[str, Json] | None], token_ids: Sequence[int], num_prompt_tokens: int, rows: Rows
) -> None:
    """Adds the tokens after the prompt out of `prompt_logprobs`, one mapping a token: {id: {logprob, rank}}."""
    if len(scores) != len(token_ids):
        raise BadAnswer(f"{len(scores)} scores came for {len(token_ids)} tokens")
    logprobs, ranks, topk_ids, topk_logprobs = [], [], [], []
    for token_id, candidates in zip(token_ids[num_prompt_tokens:], scores[num_prompt_tokens:], strict=True):
        ids = [int(key) for key in candidates or {}]
        if not candidates or ids[0] != token_id:
            raise BadAnswer("its scores do not belong to the tokens")
        values = [entry["logprob"] for entry in candidates.values()]
        rank = next(iter(candidates.values()))["rank"]
        logprobs.append(values[0])
        ranks.append(rank)
        topk_ids += _ranked(ids, rank, rows.k)
        topk_logprobs += _ranked(values, rank, rows.k)
    rows.add(token_ids[num_prompt_tokens:], logprobs, ranks, topk_ids, topk_logprobs)


def _logprobs(values: Sequence[float | None]) -> Float32:
    # None becomes NaN.
    logprobs: Float32 = np.array(values, np.float32)
    logprobs[logprobs <= MINUS_INFINITY] = -np.inf
    return logprobs
