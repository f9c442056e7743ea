"""What is said to a vLLM server over HTTP and where in its answers the rows stand: bodies and JSON. No I/O.

Two ways lead into a server. `/inference/v1/generate` (vllm serve --enable-scale-out) takes and gives token ids and
decodes nothing. `/v1/completions` is what every server has; it decodes every candidate to text, which costs it several
times the CPU, and tells no ranks: a token drawn from outside the k candidates needs a second question.

Shape legend: K candidates, W columns besides the sampled token's.

Rows of candidates as servers answer them, to arrays. No I/O, and nothing of either API.

Candidates come as a mapping in this order: the sampled token, then the most probable ones by rank, the sampled one not
repeated. Values are float32 written out in full, -9999 stands for minus infinity and null for NaN. Where the server has
the sampler plugin, mapped rows of vllm_engine.wide_rows come in the same way, with what only the sampler sees.

Shape legend: T completion tokens, K candidates, W columns besides the sampled token's, n tokens of one message.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from stillroom.schema.records import Capture, Float32, Int32
from teacher_cache.engine.api import Request
from teacher_cache.engine.row_layout import Layout, UnmarkedRows, capture_of_rows

MINUS_INFINITY = -9999.0
"""What vLLM writes for it, JSON has no infinities."""

UNKNOWN_RANK = 0
"""Rank of a sampled token outside the candidates where the answer does not tell it."""


class BadAnswer(ValueError):
    """The answer is not what was asked for. The message is one line without the server's name."""


MALFORMED = (BadAnswer, UnmarkedRows, KeyError, IndexError, TypeError, ValueError, AttributeError)
"""What reading an answer of another form raises."""


@dataclass(frozen=True, slots=True)
class Form:
    """What is asked of every token: its K most probable candidates, or the plugin's rows of a mapped `layout`."""

    k: int
    vocab_size: int
    layout: Layout | None = None

    @property
    def width(self) -> int:
        """W, columns besides the sampled token's."""
        return self.k if self.layout is None else self.layout.width


class Rows:
    """Growing arrays of one completion, message by message."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.num_tokens = 0
        self._blocks: list[tuple[Int32, Float32, Int32, Int32, Float32]] = []

    def add(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float | None],
        ranks: Sequence[int],
        ids: Sequence[int],
        values: Sequence[float | None],
    ) -> None:
        """Takes n tokens; `ids` and `values` hold n W entries, one token after the other."""
        num, width = len(token_ids), self.form.width
        if len(ids) != num * width:
            raise BadAnswer(f"{len(ids)} candidates came for {num} tokens, {width} a token were asked for")
        self.num_tokens += num
        self._blocks.append(
            (
                np.array(token_ids, np.int32)[:, None],
                _logprobs(logprobs)[:, None],
                np.array(ranks, np.int32),
                np.array(ids, np.int32).reshape(num, width),
                _logprobs(values).reshape(num, width),
            )
        )

    def capture(self) -> Capture:
        """All tokens. Raises BadAnswer where none came, UnmarkedRows where the plugin was asked and did not answer."""
        if not self.num_tokens:
            raise BadAnswer("the completion holds no token")
        token_ids_T1, logprob_T1, rank_T, ids_TW, values_TW = map(np.concatenate, zip(*self._blocks, strict=True))
        ids, values = np.hstack([token_ids_T1, ids_TW]), np.hstack([logprob_T1, values_TW])
        return capture_of_rows(ids, values, rank_T, token_ids_T1[:, 0].tolist(), self.form.k, self.form.layout)


def place_of(values: Sequence[float | None], rank: int | None, form: Form) -> int | None:
    """Which column is the sampled token's, whose entry comes first; None where it has none beside its own."""
    if form.layout is None:
        return rank if rank and rank <= form.k else None
    # Entries of a mapped row are one fewer where the sampled token is one of the top.
    return None if len(values) > form.width else rank_among(values[: form.layout.top])


def in_columns(entries: list[Any], place: int | None, form: Form) -> list[Any]:
    """W columns out of entries whose first is the sampled token: [s a b c], place 2, W 3 gives [a s b]."""
    if place is None:
        return entries[1 : form.width + 1]
    return entries[1:place] + entries[:1] + entries[place : form.width]


def rank_among(values: Sequence[float | None]) -> int:
    """Rank of the first among all, behind its equals as vLLM counts it; 1 where it is no number."""
    own = values[0]
    if own is None:
        return 1
    return sum(value is None or value >= own for value in values)


def _logprobs(values: Sequence[float | None]) -> Float32:
    # None becomes NaN.
    logprobs: Float32 = np.array(values, np.float32)
    logprobs[logprobs <= MINUS_INFINITY] = -np.inf
    return logprobs


STREAM_INTERVAL = 16
"""Tokens a message of the stream: progress is seen, a dead server is noticed, and messages cost little."""

TOKEN_ID_PREFIX = "token_id:"

Json = Mapping[str, Any]


class Api(Protocol):
    """One of the two ways."""

    path: str
    """Where bodies are posted."""

    def num_spare_tokens(self, form: Form) -> int:
        """Of the server's max_model_len, what a chain may not take: room for asking about all of it."""

    def num_logprobs(self, form: Form) -> int:
        """What must be asked for so that W entries are known, and what --max-logprobs must allow."""

    def generation(self, model: str, request: Request, form: Form, max_tokens: int) -> dict[str, Any]:
        """Body that generates a chain as a stream."""

    def forced(self, model: str, token_ids: Sequence[int], form: Form) -> dict[str, Any]:
        """Body that generates the last of the tokens after the others, as a stream: no other is allowed."""

    def scoring(self, model: str, token_ids: Sequence[int], form: Form, seed: int) -> dict[str, Any]:
        """Body that has all tokens scored, in one answer. `seed` is that of the draws."""

    def read(self, choice: Json, rows: Rows) -> None:
        """Adds the tokens of one message."""

    def read_scores(self, answer: Json, token_ids: Sequence[int], num_prompt_tokens: int, rows: Rows) -> None:
        """Adds the scored tokens that follow the prompt."""


class GenerateApi:
    """Token ids in and out, with ranks."""

    path = "/inference/v1/generate"

    def num_spare_tokens(self, form: Form) -> int:
        return 0

    def num_logprobs(self, form: Form) -> int:
        # The sampled token is one of the entries: without it W must be left.
        return min(form.width + 1, form.vocab_size)

    def generation(self, model: str, request: Request, form: Form, max_tokens: int) -> dict[str, Any]:
        sampling = {
            **neutral_sampling(request.sampling),
            "seed": request.seed,
            "max_tokens": max_tokens,
            "stream_interval": STREAM_INTERVAL,
        }
        return self._body(model, request.prompt_token_ids, sampling, form) | {"stream": True}

    def forced(self, model: str, token_ids: Sequence[int], form: Form) -> dict[str, Any]:
        sampling = {"temperature": 0.5, "max_tokens": 1, "allowed_token_ids": [token_ids[-1]], **_seed(form, 0)}
        return self._body(model, token_ids[:-1], sampling, form) | {"stream": True}

    def scoring(self, model: str, token_ids: Sequence[int], form: Form, seed: int) -> dict[str, Any]:
        # The last token is generated rather than read: a chain that fills the model's length has room for no other.
        sampling = {
            "temperature": 0.0,
            "max_tokens": 1,
            "allowed_token_ids": [token_ids[-1]],
            "prompt_logprobs": form.width,
            **_seed(form, seed),
        }
        return self._body(model, token_ids[:-1], sampling, form)

    def read(self, choice: Json, rows: Rows) -> None:
        token_ids = choice["token_ids"]
        logprobs, ranks, all_ids, all_values = [], [], [], []
        for token_id, one in zip(token_ids, choice["logprobs"]["content"], strict=True):
            entries = one["top_logprobs"]
            if entries[0]["token_id"] != token_id:
                raise BadAnswer("its distributions do not belong to its tokens")
            rank = one["rank"]
            logprobs.append(None if rank is None else one["logprob"])
            ranks.append(rank or UNKNOWN_RANK)
            ids, values = [entry["token_id"] for entry in entries], [entry["logprob"] for entry in entries]
            place = place_of(values, rank, rows.form)
            all_ids += in_columns(ids, place, rows.form)
            all_values += in_columns(values, place, rows.form)
        rows.add(token_ids, logprobs, ranks, all_ids, all_values)

    def read_scores(self, answer: Json, token_ids: Sequence[int], num_prompt_tokens: int, rows: Rows) -> None:
        _read_prompt(answer["prompt_logprobs"], token_ids[:-1], num_prompt_tokens, rows)
        (choice,) = answer["choices"]
        _require_token(choice, token_ids[-1])
        self.read(choice, rows)

    def _body(self, model: str, token_ids: Sequence[int], sampling: Mapping[str, Any], form: Form) -> dict[str, Any]:
        # Neither text nor an object a candidate: flat_logprobs and detokenize spare the server most of its work.
        quick = {"logprobs": self.num_logprobs(form), "flat_logprobs": True, "detokenize": False}
        extra = {} if form.layout is None else {"extra_args": form.layout.extra_args()}
        return {"model": model, "token_ids": list(token_ids), "sampling_params": {**sampling, **quick, **extra}}


class CompletionsApi:
    """What every vLLM server has."""

    path = "/v1/completions"

    def num_spare_tokens(self, form: Form) -> int:
        return 1 if form.layout is None else 0

    def num_logprobs(self, form: Form) -> int:
        # W entries besides the sampled token, as OpenAI has it.
        return min(form.width, form.vocab_size)

    def generation(self, model: str, request: Request, form: Form, max_tokens: int) -> dict[str, Any]:
        sampling = neutral_sampling(request.sampling)
        limits = {"seed": request.seed, "max_tokens": max_tokens, "stream_interval": STREAM_INTERVAL, "stream": True}
        return self._body(model, request.prompt_token_ids, {**sampling, **limits, **self._logprobs(form)})

    def forced(self, model: str, token_ids: Sequence[int], form: Form) -> dict[str, Any]:
        asked = {"temperature": 0.5, "max_tokens": 1, "allowed_token_ids": [token_ids[-1]], "stream": True}
        return self._body(model, token_ids[:-1], {**asked, **_seed(form, 0), **self._logprobs(form)})

    def scoring(self, model: str, token_ids: Sequence[int], form: Form, seed: int) -> dict[str, Any]:
        asked = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": form.width, **_seed(form, seed)}
        if form.layout is None:
            # A generated token would come without its rank: all are prompt, and the one that follows is dropped.
            return self._body(model, token_ids, asked)
        last = {"allowed_token_ids": [token_ids[-1]], **self._logprobs(form)}
        return self._body(model, token_ids[:-1], {**asked, **last})

    def read(self, choice: Json, rows: Rows) -> None:
        token_ids, given = choice["token_ids"], choice["logprobs"]
        ranks, all_ids, all_values = [], [], []
        for token_id, candidates in zip(token_ids, given["top_logprobs"], strict=True):
            ids, values = [int(key[len(TOKEN_ID_PREFIX) :]) for key in candidates], list(candidates.values())
            if ids[0] != token_id:
                raise BadAnswer("its distributions do not belong to its tokens")
            # One entry more than k: the sampled token stands outside.
            rank = UNKNOWN_RANK if len(ids) > rows.form.width else rank_among(values)
            ranks.append(rank)
            place = place_of(values, rank, rows.form)
            all_ids += in_columns(ids, place, rows.form)
            all_values += in_columns(values, place, rows.form)
        rows.add(token_ids, given["token_logprobs"], ranks, all_ids, all_values)

    def read_scores(self, answer: Json, token_ids: Sequence[int], num_prompt_tokens: int, rows: Rows) -> None:
        (choice,) = answer["choices"]
        if rows.form.layout is None:
            _read_prompt(choice["prompt_logprobs"], token_ids, num_prompt_tokens, rows)
            return
        _read_prompt(choice["prompt_logprobs"], token_ids[:-1], num_prompt_tokens, rows)
        _require_token(choice, token_ids[-1])
        self.read(choice, rows)

    def _logprobs(self, form: Form) -> dict[str, Any]:
        extra = {} if form.layout is None else {"vllm_xargs": form.layout.extra_args()}
        return {"logprobs": self.num_logprobs(form), **extra}

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


def _seed(form: Form, seed: int) -> dict[str, int]:
    """Draws depend on it; nothing else of what is forced or scored does."""
    return {} if form.layout is None else {"seed": seed}


def _require_token(choice: Json, token_id: int) -> None:
    if list(choice["token_ids"]) != [token_id]:
        raise BadAnswer("it generated another token than the only one allowed")


def _read_prompt(
    scores: Sequence[Mapping[str, Json] | None], token_ids: Sequence[int], num_prompt_tokens: int, rows: Rows
) -> None:
    """Adds the tokens after the prompt out of `prompt_logprobs`, one mapping a token: {id: {logprob, rank}}."""
    if len(scores) != len(token_ids):
        raise BadAnswer(f"{len(scores)} scores came for {len(token_ids)} tokens")
    logprobs, ranks, all_ids, all_values = [], [], [], []
    for token_id, candidates in zip(token_ids[num_prompt_tokens:], scores[num_prompt_tokens:], strict=True):
        ids = [int(key) for key in candidates or {}]
        if not candidates or ids[0] != token_id:
            raise BadAnswer("its scores do not belong to the tokens")
        values = [entry["logprob"] for entry in candidates.values()]
        rank = next(iter(candidates.values()))["rank"]
        logprobs.append(values[0])
        ranks.append(rank)
        place = place_of(values, rank, rows.form)
        all_ids += in_columns(ids, place, rows.form)
        all_values += in_columns(values, place, rows.form)
    rows.add(token_ids[num_prompt_tokens:], logprobs, ranks, all_ids, all_values)
