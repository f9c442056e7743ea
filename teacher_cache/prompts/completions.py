"""Completions that exist already, from files, datasets and other caches, to requests that score them.

In: the `completions` block of the configuration. Out: a lazy stream of Requests in the order of the sources, and
LoadFailures; nothing but what is being tokenised is held in memory.

Where text becomes tokens it does so as in generation: the prompt by the chat template with the assistant's turn opened,
the completion by itself, so that the first token of the completion is one that the teacher could have written there.
The template is not asked for the completion: templates drop the reasoning of earlier turns. Two things are decided:

- A completion that stopped ends with the end-of-sequence token, which `append_eos` appends where it is missing.
- A template that opens the reasoning has written <think> into the prompt; a completion that begins with <think> itself
  then loses its own, and the white space that the prompt has too.

Chains of another cache, to be looked at by a second teacher, token by token.

In: a source of kind `cache`. Out: rows of its `chains` that a SQL condition picks, as a stream. Where both teachers
have the same vocabulary, `chain_id` joins what they think of the same tokens.
"""

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from stillroom.cache.catalog import Catalog
from stillroom.errors import ConfigError, CorruptError
from stillroom.judging.judges import jsonable
from stillroom.models import came_to_its_end, compare_vocab, reasoning_ids, special_pieces
from stillroom.schema.records import Message, Prompt, prompt_id_of, scored_sample_id_of, stable_hash
from stillroom.sql.session import Session
from teacher_cache.config import (
    CacheCompletions,
    CompletionFields,
    CompletionSource,
    HuggingFaceCompletions,
    JsonlCompletions,
    ParquetCompletions,
    ScoreConfig,
)
from teacher_cache.engine.api import Request
from teacher_cache.engine.teacher import IdentifiedTeacher
from teacher_cache.prompts.decontaminate import Contaminated, EvaluationTexts
from teacher_cache.prompts.prompts import TOKENIZE_BATCH, WHOLE, WorkerShare, prompt_of, tokenize
from teacher_cache.prompts.sources import (
    HALF_CHARACTERS,
    Draft,
    Json,
    LoadFailure,
    Row,
    conversation_of,
    count_jsonl_rows,
    count_parquet_rows,
    has_half_characters,
    huggingface_rows,
    jsonl_rows,
    malformed,
    optional_fields,
    parquet_rows,
    reference_text,
    require_jsonl_fields,
    text_of,
    value_of,
)

COLUMNS = (
    "sample_id, sample_index, run_id, source, split, messages, prompt_token_ids, reference, metadata, text, "
    "token_ids, finish_reason"
)
ROWS_PER_BATCH = 256
NUM_SHOWN = 3


class OtherCache:
    """A cache that is read."""

    def __init__(self, source: CacheCompletions, teacher: IdentifiedTeacher) -> None:
        """Raises DataError where there is no cache, ConfigError where the condition is wrong or the tokens mean
        something else to this teacher, CorruptError where a run's manifest is missing.
        """
        self._source = source
        self._catalog = Catalog(source.path)
        with contextlib.ExitStack() as stack:
            self._session = stack.enter_context(Session({"main": self._catalog}))
            condition = "true" if source.where is None else f"({source.where}\n)"
            # The same ones for every worker and every time: without an order DuckDB picks whichever come first.
            limit = "" if source.limit is None else f" ORDER BY sample_id LIMIT {source.limit}"
            picked = self._session.arrow(f"SELECT sample_id FROM chains WHERE {condition}{limit}")
            self._picked: set[str] = set(picked.column("sample_id").to_pylist())
            self._special = {
                run_id: special_pieces(self._catalog.vocab_path(run.teacher.tokenizer_fingerprint))
                for run_id, run in self._catalog.runs().items()
            }
            if not source.retokenise:
                self._require_same_tokens(teacher)
            stack.pop_all()

    def close(self) -> None:
        """Ends its session."""
        self._session.close()

    def count(self, share: WorkerShare) -> int:
        """How many chains are picked whose sample_id falls to the share."""
        return sum(sample_id in share for sample_id in self._picked)

    def judges(self) -> set[str]:
        """Kinds of checks that the picked chains' prompts name."""
        query = "SELECT sample_id, json_extract_string(metadata, '$.judge') AS kind FROM shards"
        return {row["kind"] for row in self._rows(query) if row["kind"] is not None}

    def chains(self, share: WorkerShare) -> Iterator[dict[str, Any]]:
        """Rows with `metadata` as a dictionary that also says which sample of which source and run this was, and
        `stopped`: whether the chain came to its own end.
        """
        for row in self._rows(f"SELECT {COLUMNS} FROM shards"):
            if row["sample_id"] in share:
                origin = {name: row[name] for name in ("sample_id", "run_id", "source")}
                row["metadata"] = {**json.loads(row["metadata"]), "scored_from": origin}
                last_piece = self._special.get(row["run_id"], {}).get(row["token_ids"][-1])
                row["stopped"] = came_to_its_end(row["finish_reason"], row["text"], last_piece)
                yield row

    def _rows(self, query: str) -> Iterator[dict[str, Any]]:
        """Rows of the picked chains, a batch of them in memory."""
        for batch in self._session.batches(query, ROWS_PER_BATCH):
            yield from (row for row in batch.to_pylist() if row["sample_id"] in self._picked)

    def _require_same_tokens(self, teacher: IdentifiedTeacher) -> None:
        runs = {row["run_id"] for row in self._rows("SELECT sample_id, run_id FROM shards")}
        manifests = self._catalog.runs()
        lost = runs - manifests.keys()
        if lost:
            raise CorruptError(
                f"source {self._source.name}: {self._source.path}/runs/{min(lost)}.json is missing: nobody "
                "could say what its tokens are"
            )
        fingerprints = {manifests[run_id].teacher.tokenizer_fingerprint for run_id in runs}
        for fingerprint in sorted(fingerprints - {teacher.record.tokenizer_fingerprint}):
            difference = compare_vocab(self._catalog.vocab_path(fingerprint), teacher.tokenizer)
            differing = [*difference.ordinary, *difference.special]
            if differing:
                shown = ", ".join(f"{i} is {one!r} there and {other!r} here" for i, one, other in differing[:NUM_SHOWN])
                raise ConfigError(
                    f"source {self._source.name}: {len(differing)} tokens of {self._source.path} mean something else "
                    f"to {teacher.record.model} ({shown}): set retokenise: true to score the chains' text instead"
                )


MAX_ID = 2**31 - 1
"""Ids are stored as int32; how large the teacher's are is the engine's to say."""


@dataclass(frozen=True, slots=True)
class Given:
    """A prompt and a completion, as text or as tokens. `where` is a place that a person can look up."""

    where: str
    prompt: Prompt
    completion: str | list[int]
    prompt_token_ids: list[int] | None = None
    append_eos: bool = False
    sample_index: int = 0


class Completions:
    """All completions of a configuration, for one teacher, as a context manager."""

    def __init__(self, config: ScoreConfig, teacher: IdentifiedTeacher) -> None:
        """Opens other caches. Raises ConfigError or DataError where one does not fit the teacher."""
        self.contaminated: list[Contaminated] = []
        self._config, self._teacher = config, teacher
        self._start_id, _ = reasoning_ids(teacher.tokenizer, config.reasoning.start, config.reasoning.end)
        decontaminate = config.completions.decontaminate
        self._evaluation = None if decontaminate is None else EvaluationTexts(decontaminate)
        self._require_template()
        self._caches: dict[str, OtherCache] = {}
        with contextlib.ExitStack() as stack:
            for source in config.completions.sources:
                if isinstance(source, CacheCompletions):
                    self._caches[source.name] = OtherCache(source, teacher)
                    stack.callback(self._caches[source.name].close)
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def count(self, share: WorkerShare = WHOLE) -> int:
        """How many rows there are, before any is looked at: none is known yet to be malformed or there twice."""
        return sum(self._num_rows(source, share) for source in self._config.completions.sources)

    def judges(self) -> set[str]:
        """Kinds of checks that will be asked for."""
        of_caches = {kind for cache in self._caches.values() for kind in cache.judges()}
        sources = self._config.completions.sources
        return of_caches | {one.judge for one in sources if isinstance(one, CompletionFields) and one.judge is not None}

    def requests(self, share: WorkerShare = WHOLE) -> Iterator[Request | LoadFailure]:
        """One request a completion of this share: every `share.count`th row of a file, from `share.index` on; of
        another cache, the chains whose hash falls to it.
        """
        for source in self._config.completions.sources:
            rows = self._rows(source, share)
            yield from self._requests(row for row in rows if not self._is_contaminated(row, source))

    def _num_rows(self, source: CompletionSource, share: WorkerShare) -> int:
        if isinstance(source, CacheCompletions):
            return self._caches[source.name].count(share)
        if isinstance(source, JsonlCompletions):
            num_rows = count_jsonl_rows(source.path, source.name)
        elif isinstance(source, ParquetCompletions):
            num_rows = count_parquet_rows(source.path, source.name)
        else:
            num_rows = sum(1 for _ in itertools.islice(_huggingface(source, source.fields[:1]), source.limit))
        num_taken = num_rows if source.limit is None else min(num_rows, source.limit)
        return len(range(share.index, num_taken, share.count))

    def _rows(self, source: CompletionSource, share: WorkerShare) -> Iterator[Given | LoadFailure]:
        if isinstance(source, CacheCompletions):
            chains = self._caches[source.name].chains(share)
            yield from (_of_cache(chain, source) for chain in chains)
            return
        if isinstance(source, JsonlCompletions):
            require_jsonl_fields(source.path, optional_fields(source), source.name)
            rows: Iterable[Row] = jsonl_rows(source.path, source.name)
        elif isinstance(source, ParquetCompletions):
            rows = parquet_rows(source.path, source.fields, source.name)
        else:
            rows = _huggingface(source, source.fields)
        for row in itertools.islice(rows, share.index, source.limit, share.count):
            yield _given(source, row, self._config.completions.heldout_frac, self._teacher.tokenizer)

    def _is_contaminated(self, row: Given | LoadFailure, source: CompletionSource) -> bool:
        if self._evaluation is None or isinstance(row, LoadFailure):
            return False
        against = self._evaluation.overlap(row.prompt.messages)
        if against is not None:
            self.contaminated.append(Contaminated(f"{source.name} {row.where}", against))
        return against is not None

    def _requests(self, rows: Iterable[Given | LoadFailure]) -> Iterator[Request | LoadFailure]:
        rows = iter(rows)
        while batch := list(itertools.islice(rows, TOKENIZE_BATCH)):
            texts = [row for row in batch if isinstance(row, Given) and row.prompt_token_ids is None]
            prompt_ids = iter(self._prompt_ids(texts))
            for row in batch:
                if isinstance(row, LoadFailure):
                    yield row
                    continue
                ids = next(prompt_ids) if row.prompt_token_ids is None else row.prompt_token_ids
                yield _refused(row, ids) if isinstance(ids, str) else self._request(row, ids)

    def _prompt_ids(self, rows: Sequence[Given]) -> list[list[int] | str]:
        if not rows:
            return []
        template_kwargs = self._config.teacher.chat_template_kwargs
        return tokenize(self._teacher.tokenizer, [row.prompt for row in rows], template_kwargs)

    def _request(self, row: Given, prompt_ids: list[int]) -> Request:
        ids = row.completion if isinstance(row.completion, list) else self._completion_ids(row, prompt_ids)
        return Request(
            prompt=row.prompt,
            prompt_token_ids=prompt_ids,
            sample_index=row.sample_index,
            seed=None,
            sampling={},
            max_tokens=len(ids),
            sample_id=scored_sample_id_of(self._teacher.record.fingerprint, prompt_ids, ids),
            completion_token_ids=ids,
        )

    def _completion_ids(self, row: Given, prompt_ids: list[int]) -> list[int]:
        tokenizer, text = self._teacher.tokenizer, str(row.completion)
        opened = self._opened(prompt_ids)
        start = self._config.reasoning.start
        if opened is not None and text.lstrip().startswith(start):
            text = text.lstrip().removeprefix(start).removeprefix(opened)
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        if row.append_eos and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        return ids

    def _opened(self, prompt_ids: list[int]) -> str | None:
        """The white space after the marker with which the prompt opens the reasoning; None where it does not."""
        if self._start_id is None or self._start_id not in prompt_ids:
            return None
        last = len(prompt_ids) - 1 - prompt_ids[::-1].index(self._start_id)
        rest = str(self._teacher.tokenizer.decode(prompt_ids[last + 1 :]))
        return rest if not rest.strip() else None

    def _require_template(self) -> None:
        """A chat template and an end-of-sequence token, where texts need them."""
        tokenizer, model = self._teacher.tokenizer, self._config.teacher.model
        texts = [one for one in self._config.completions.sources if not _are_tokens(one)]
        if texts and not tokenizer.chat_template:
            raise ConfigError(
                f"the tokenizer of {model} has no chat template, which source {texts[0].name} needs: use an "
                "instruction-tuned teacher, or token ids"
            )
        appending = [one for one in texts if not isinstance(one, CompletionFields) or one.append_eos]
        if appending and tokenizer.eos_token_id is None:
            raise ConfigError(
                f"the tokenizer of {model} has no end-of-sequence token: set append_eos: false for source "
                f"{appending[0].name}"
            )


def _are_tokens(source: CompletionSource) -> bool:
    return source.are_ids if isinstance(source, CompletionFields) else not source.retokenise


def _huggingface(source: HuggingFaceCompletions, fields: Sequence[str]) -> Iterator[Row]:
    hub = (source.dataset, source.config, source.split, source.revision)
    return huggingface_rows(*hub, limit=source.limit, fields=fields, name=source.name)


def _given(source: CompletionFields, row: Row, heldout_frac: float, tokenizer: Any) -> Given | LoadFailure:
    if isinstance(row.values, str):
        return malformed(source.name, row.where, row.values)
    try:
        return _checked(source, row, row.values, heldout_frac, tokenizer)
    except ValueError as error:
        return malformed(source.name, row.where, str(error))


def _checked(source: CompletionFields, row: Row, values: Json, heldout_frac: float, tokenizer: Any) -> Given:
    """Raises ValueError where the row is no prompt with a completion."""
    prompt_ids = None if source.prompt_ids_field is None else _ids(values, source.prompt_ids_field)
    messages, completion = _texts(source, values, prompt_ids, tokenizer)
    number = "line" if isinstance(source, JsonlCompletions) else "row"
    metadata = {number: row.number, **{name: jsonable(values.get(name)) for name in source.metadata_fields}}
    if source.judge is not None:
        metadata["judge"] = source.judge
    reference = None if source.reference_field is None else reference_text(values.get(source.reference_field))
    draft = Draft(row.where, tuple(messages), reference, metadata)
    if has_half_characters(draft, completion if isinstance(completion, str) else ""):
        raise ValueError(HALF_CHARACTERS)
    prompt = prompt_of(draft, source.name, source.system, source.instruction, heldout_frac)
    return Given(row.where, prompt, completion, prompt_ids, source.append_eos)


def _texts(
    source: CompletionFields, values: Json, prompt_ids: list[int] | None, tokenizer: Any
) -> tuple[list[Message], str | list[int]]:
    """The prompt's messages, and the completion."""
    if source.prompt_field is not None:
        messages = [Message("user", text_of(values, source.prompt_field))]
    elif source.messages_field is not None:
        messages = conversation_of(values, source.messages_field)
    else:
        messages = [Message("user", str(tokenizer.decode(prompt_ids)))]
    if source.completion_ids_field is not None:
        return messages, _ids(values, source.completion_ids_field)
    if source.completion_field is not None:
        return messages, text_of(values, source.completion_field)
    last = messages.pop()
    if last.role != "assistant" or not last.content.strip() or not messages:
        raise ValueError(f"field {source.messages_field!r} does not end with a question and the assistant's answer")
    return messages, last.content


def _ids(values: Json, name: str) -> list[int]:
    ids = value_of(values, name)
    if not isinstance(ids, list) or not ids or not all(type(one) is int and 0 <= one <= MAX_ID for one in ids):
        raise ValueError(f"field {name!r} is not a list of token ids with something in it")
    return ids


def _of_cache(chain: Json, source: CacheCompletions) -> Given:
    """A row of another cache's `chains`; its own reasoning marks are part of its text, unless special tokens."""
    messages = tuple(Message(one["role"], one["content"]) for one in chain["messages"])
    prompt = Prompt(
        prompt_id=prompt_id_of(messages),
        messages=messages,
        source=source.name,
        split=chain["split"],
        reference=chain["reference"],
        metadata=chain["metadata"],
    )
    if source.retokenise:
        return Given(chain["sample_id"], prompt, chain["text"], None, chain["stopped"], chain["sample_index"])
    ids = chain["token_ids"]
    return Given(chain["sample_id"], prompt, ids, chain["prompt_token_ids"], False, chain["sample_index"])


def _refused(row: Given, message: str) -> LoadFailure:
    return LoadFailure(
        sample_id=stable_hash("template", row.prompt.prompt_id, row.completion),
        prompt_id=row.prompt.prompt_id,
        source=row.prompt.source,
        sample_index=row.sample_index,
        reason="chat_template",
        message=message,
    )
