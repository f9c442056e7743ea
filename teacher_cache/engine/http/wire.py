"""Request bodies for vLLM servers, and their JSON answers as arrays. No I/O.

There are two ways into a server. `/inference/v1/generate` (vllm serve --enable-scale-out) takes and returns token ids
and decodes nothing. `/v1/completions` exists on every server; it decodes every candidate to text, which costs several
times the CPU, and reports no ranks, so a token sampled outside the k candidates needs a second request.

Candidates arrive in this order: the sampled token, then the most probable ones by rank without repeating it. Values are
float32 written in full; -9999 stands for minus infinity and null for NaN. With stillroom's plugin on the server, mapped
rows of engine.row_layout arrive in the same form and hold what only the sampler sees.

Shape legend: T completion tokens, K candidates, W columns besides the sampled token's, n tokens of one message.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from stillroom.schema.records import Capture, Float32, Int32
from teacher_cache.engine.api import Request
from teacher_cache.engine.row_layout import Layout, UnmarkedRows, capture_of_rows

MINUS_INFINITY = -9999.0
"""How vLLM writes minus infinity, which JSON lacks."""
UNKNOWN_RANK = 0
"""Rank of a sampled token outside the candidates if the answer does not report it."""
STREAM_INTERVAL = 16
"""Tokens per message: small enough to show progress and notice a dead server, large enough to be cheap."""
TOKEN_ID_PREFIX = "token_id:"

Json = Mapping[str, Any]
Token = tuple[int, float | None, int | None, list[int], list[float | None]]
"""One token of an answer: id, logprob, rank, and the ids and logprobs of its entries, its own first."""


class BadAnswer(ValueError):
    """The answer does not match the request. The message is one line without the server's name."""


MALFORMED = (BadAnswer, UnmarkedRows, KeyError, IndexError, TypeError, ValueError, AttributeError)
"""What parsing an answer of another form raises."""


@dataclass(frozen=True, slots=True)
class Form:
    """What is requested for every token: its K most probable candidates, or the plugin's rows of a mapped `layout`."""

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

    def add(self, tokens: Iterable[Token]) -> None:
        """Adds the tokens of one message. Raises BadAnswer if entries belong to another token or are too few."""
        width = self.form.width
        token_ids, logprobs, ranks = [], [], []
        all_ids: list[int] = []
        all_values: list[float | None] = []
        for token_id, logprob, rank, ids, values in tokens:
            if ids[0] != token_id:
                raise BadAnswer("its distributions do not match its tokens")
            token_ids.append(token_id)
            logprobs.append(logprob)
            # Requested again by scoring the chain (pool._with_ranks).
            ranks.append(rank or UNKNOWN_RANK)
            place = _place_of(values, rank, self.form)
            all_ids += _in_columns(ids, place, width)
            all_values += _in_columns(values, place, width)
        num = len(token_ids)
        if len(all_ids) != num * width:
            raise BadAnswer(f"received {len(all_ids)} candidates for {num} tokens, but requested {width} per token")
        self.num_tokens += num
        self._blocks.append(
            (
                np.array(token_ids, np.int32)[:, None],
                _logprobs(logprobs)[:, None],
                np.array(ranks, np.int32),
                np.array(all_ids, np.int32).reshape(num, width),
                _logprobs(all_values).reshape(num, width),
            )
        )

    def capture(self) -> Capture:
        """All tokens. Raises BadAnswer without tokens, UnmarkedRows if the plugin did not answer although requested."""
        if not self.num_tokens:
            raise BadAnswer("the completion has no tokens")
        token_ids_T1, logprob_T1, rank_T, ids_TW, values_TW = map(np.concatenate, zip(*self._blocks, strict=True))
        ids, values = np.hstack([token_ids_T1, ids_TW]), np.hstack([logprob_T1, values_TW])
        return capture_of_rows(ids, values, rank_T, token_ids_T1[:, 0].tolist(), self.form.k, self.form.layout)


class Api(Protocol):
    """One of the two ways."""

    path: str
    """Where bodies are posted."""

    def num_spare_tokens(self, form: Form) -> int:
        """Tokens of the server's max_model_len that a chain must leave free, so that all of it can be scored."""

    def num_logprobs(self, form: Form) -> int:
        """The number of logprobs that yields W entries, which --max-logprobs must allow."""

    def generation(self, model: str, request: Request, form: Form, max_tokens: int) -> dict[str, Any]:
        """Body that generates a chain as a stream."""

    def forced(self, model: str, token_ids: Sequence[int], form: Form) -> dict[str, Any]:
        """Body that generates the last of the tokens after the others, as a stream; no other token is allowed."""

    def scoring(self, model: str, token_ids: Sequence[int], form: Form, seed: int) -> dict[str, Any]:
        """Body that scores all tokens, in one answer. `seed` is that of the draws."""

    def trial(self, model: str, extra: Mapping[str, Any]) -> dict[str, Any]:
        """Body with these sampling parameters, for the server to refuse."""

    def parameters(self, request: Json) -> Json:
        """Where the schema of a body has the sampling parameters."""

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
        # The sampled token is one of the entries, and W must remain without it.
        return min(form.width + 1, form.vocab_size)

    def generation(self, model: str, request: Request, form: Form, max_tokens: int) -> dict[str, Any]:
        sampling = {**_sampling(request, max_tokens), "stream_interval": STREAM_INTERVAL}
        return self._body(model, request.prompt_token_ids, sampling, form) | {"stream": True}

    def forced(self, model: str, token_ids: Sequence[int], form: Form) -> dict[str, Any]:
        return self._body(model, token_ids[:-1], _forced(token_ids, form), form) | {"stream": True}

    def scoring(self, model: str, token_ids: Sequence[int], form: Form, seed: int) -> dict[str, Any]:
        # The last token is generated rather than read: a chain that fills the model's length has no room for another.
        sampling = {**_scoring(form, seed), "allowed_token_ids": [token_ids[-1]]}
        return self._body(model, token_ids[:-1], sampling, form)

    def trial(self, model: str, extra: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": model, "token_ids": [0], "sampling_params": {**extra, "max_tokens": _trial_tokens(extra)}}

    def parameters(self, request: Json) -> Json:
        return dict(request["properties"]["sampling_params"])

    def read(self, choice: Json, rows: Rows) -> None:
        def tokens() -> Iterable[Token]:
            for token_id, one in zip(choice["token_ids"], choice["logprobs"]["content"], strict=True):
                entries, rank = one["top_logprobs"], one["rank"]
                ids, values = [entry["token_id"] for entry in entries], [entry["logprob"] for entry in entries]
                yield token_id, None if rank is None else one["logprob"], rank, ids, values

        rows.add(tokens())

    def read_scores(self, answer: Json, token_ids: Sequence[int], num_prompt_tokens: int, rows: Rows) -> None:
        _read_prompt(answer["prompt_logprobs"], token_ids[:-1], num_prompt_tokens, rows)
        (choice,) = answer["choices"]
        _require_token(choice, token_ids[-1])
        self.read(choice, rows)

    def _body(self, model: str, token_ids: Sequence[int], sampling: Mapping[str, Any], form: Form) -> dict[str, Any]:
        # flat_logprobs and detokenize: false spare the server most of its work: no text and no object per candidate.
        # Stop strings are looked for in text.
        quick = {"logprobs": self.num_logprobs(form), "flat_logprobs": True, "detokenize": "stop" in sampling}
        extra = {} if form.layout is None else {"extra_args": form.layout.extra_args()}
        return {"model": model, "token_ids": list(token_ids), "sampling_params": {**sampling, **quick, **extra}}


class CompletionsApi:
    """What every vLLM server has."""

    path = "/v1/completions"

    def num_spare_tokens(self, form: Form) -> int:
        return 1 if form.layout is None else 0

    def num_logprobs(self, form: Form) -> int:
        # OpenAI's API counts W entries besides the sampled token.
        return min(form.width, form.vocab_size)

    def generation(self, model: str, request: Request, form: Form, max_tokens: int) -> dict[str, Any]:
        stream = {"stream_interval": STREAM_INTERVAL, "stream": True}
        sampling = {**_sampling(request, max_tokens), **stream, **self._logprobs(form)}
        return self._body(model, request.prompt_token_ids, sampling)

    def forced(self, model: str, token_ids: Sequence[int], form: Form) -> dict[str, Any]:
        return self._body(model, token_ids[:-1], {**_forced(token_ids, form), "stream": True, **self._logprobs(form)})

    def scoring(self, model: str, token_ids: Sequence[int], form: Form, seed: int) -> dict[str, Any]:
        if form.layout is None:
            # A generated token would come without its rank: all are prompt, and the one that follows is dropped.
            return self._body(model, token_ids, _scoring(form, seed))
        last = {"allowed_token_ids": [token_ids[-1]], **self._logprobs(form)}
        return self._body(model, token_ids[:-1], {**_scoring(form, seed), **last})

    def trial(self, model: str, extra: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": model, "prompt": [0], **extra, "max_tokens": _trial_tokens(extra)}

    def parameters(self, request: Json) -> Json:
        return request

    def read(self, choice: Json, rows: Rows) -> None:
        given = choice["logprobs"]

        def tokens() -> Iterable[Token]:
            reported = zip(choice["token_ids"], given["token_logprobs"], given["top_logprobs"], strict=True)
            for token_id, logprob, candidates in reported:
                ids, values = [int(key[len(TOKEN_ID_PREFIX) :]) for key in candidates], list(candidates.values())
                # With one entry more than k the sampled token is outside the candidates.
                rank = UNKNOWN_RANK if len(ids) > rows.form.width else _rank_among(values)
                yield token_id, logprob, rank, ids, values

        rows.add(tokens())

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

    def _body(self, model: str, token_ids: Sequence[int], sampling: Mapping[str, Any]) -> dict[str, Any]:
        as_ids = {"return_token_ids": True, "return_tokens_as_token_ids": True}
        return {"model": model, "prompt": list(token_ids), **sampling, **as_ids}


def _sampling(request: Request, max_tokens: int) -> dict[str, Any]:
    """Every parameter spelled out: an omitted one would take the server's or the model's own default."""
    given = request.sampling
    return {
        "temperature": given.get("temperature", 1.0),
        "top_p": given.get("top_p", 1.0),
        "top_k": given.get("top_k") or 0,
        "min_p": given.get("min_p", 0.0),
        "repetition_penalty": given.get("repetition_penalty", 1.0),
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": request.seed,
        "max_tokens": max_tokens,
        **given.get("vllm", {}),
    }


def _trial_tokens(extra: Mapping[str, Any]) -> int:
    return max(1, int(extra.get("min_tokens", 0)))


def _forced(token_ids: Sequence[int], form: Form) -> dict[str, Any]:
    # Not 1, at which processed and raw log probabilities could not be told apart (handshake.py).
    return {"temperature": 0.5, "max_tokens": 1, "allowed_token_ids": [token_ids[-1]], **_seed(form, 0)}


def _scoring(form: Form, seed: int) -> dict[str, Any]:
    return {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": form.width, **_seed(form, seed)}


def _seed(form: Form, seed: int) -> dict[str, int]:
    """Of what is forced or scored, only draws depend on the seed."""
    return {} if form.layout is None else {"seed": seed}


def _require_token(choice: Json, token_id: int) -> None:
    if list(choice["token_ids"]) != [token_id]:
        raise BadAnswer("it generated a token other than the only one allowed")


def _read_prompt(
    scores: Sequence[Mapping[str, Json] | None], token_ids: Sequence[int], num_prompt_tokens: int, rows: Rows
) -> None:
    """Adds the tokens after the prompt from `prompt_logprobs`, one mapping per token: {id: {logprob, rank}}."""
    if len(scores) != len(token_ids):
        raise BadAnswer(f"received {len(scores)} scores for {len(token_ids)} tokens")

    def tokens() -> Iterable[Token]:
        for token_id, candidates in zip(token_ids[num_prompt_tokens:], scores[num_prompt_tokens:], strict=True):
            if not candidates:
                raise BadAnswer("received a token without its scores")
            values = [entry["logprob"] for entry in candidates.values()]
            rank = next(iter(candidates.values()))["rank"]
            yield token_id, values[0], rank, [int(key) for key in candidates], values

    rows.add(tokens())


def _place_of(values: Sequence[float | None], rank: int | None, form: Form) -> int | None:
    """The column (from 1) of the sampled token, whose entry comes first; None if it is not among the candidates."""
    if form.layout is None:
        return rank if rank and rank <= form.k else None
    # A mapped row has one entry fewer if the sampled token is among the top.
    return None if len(values) > form.width else _rank_among(values[: form.layout.top])


def _in_columns(entries: list[Any], place: int | None, width: int) -> list[Any]:
    """W columns from entries whose first is the sampled token: [s a b c], place 2, W 3 gives [a s b]."""
    if place is None:
        return entries[1 : width + 1]
    return entries[1:place] + entries[:1] + entries[place:width]


def _rank_among(values: Sequence[float | None]) -> int:
    """Rank of the first value, after its equals as vLLM counts; 1 if it is not a number."""
    own = values[0]
    if own is None:
        return 1
    return sum(value is None or value >= own for value in values)


def _logprobs(values: Sequence[float | None]) -> Float32:
    # numpy turns None into NaN.
    logprobs: Float32 = np.array(values, np.float32)
    logprobs[logprobs <= MINUS_INFINITY] = -np.inf
    return logprobs
