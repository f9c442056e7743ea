"""Completions to score: rows of files, datasets and other caches, turned into requests.

In: the `completions` block of the configuration. Out: a lazy stream of Requests and Failures in source order; only the
batch being tokenised is in memory.

Text becomes tokens as in generation: the prompt by the chat template with the assistant's turn opened, the completion
on its own. The template does not render the completion, because templates drop the reasoning of earlier turns. So:

- A finished completion must end with the end-of-sequence token, which `append_eos` adds if it is missing.
- If the template has already written <think> into the prompt, a completion's own <think> is removed, along with the
  white space that follows it in the prompt.

Chains of another cache keep their token ids if both teachers share a vocabulary; `chain_id` then joins their views of
the same tokens.
"""

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from stillroom.cache.catalog import Catalog
from stillroom.errors import ConfigError, CorruptError
from stillroom.models import came_to_its_end, compare_vocab, reasoning_ids, special_pieces
from stillroom.schema.records import Message, Prompt, prompt_id_of, scored_sample_id_of, stable_hash
from stillroom.sql.session import Session
from teacher_cache.config import CacheCompletions, CompletionFields, CompletionSource, FileCompletions, ScoreConfig
from teacher_cache.engine.api import Failure, Request
from teacher_cache.engine.teacher import IdentifiedTeacher
from teacher_cache.prompts.decontaminate import Contaminated, EvaluationTexts
from teacher_cache.prompts.prompts import TOKENIZE_BATCH, WHOLE, WorkerShare, prompt_of, template_failure, tokenize
from teacher_cache.prompts.sources import (
    Draft,
    Json,
    Row,
    conversation_of,
    count_rows,
    malformed,
    metadata_of,
    read_rows,
    reference_of,
    require_encodable,
    text_of,
    value_of,
)

COLUMNS = (
    "sample_id, sample_index, run_id, source, split, messages, prompt_token_ids, reference, metadata, text, "
    "token_ids, finish_reason"
)
ROWS_PER_BATCH = 256
NUM_SHOWN = 3
MAX_ID = 2**31 - 1
"""Ids are stored as int32; the engine checks them against the teacher's vocabulary."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and its completion, as text or as token ids. `where` names the row for a person."""

    where: str
    prompt: Prompt
    completion: str | list[int]
    prompt_token_ids: list[int] | None = None
    append_eos: bool = False
    sample_index: int = 0


class Completions:
    """All completions of a configuration, for one teacher, as a context manager."""

    def __init__(self, config: ScoreConfig, teacher: IdentifiedTeacher) -> None:
        """Opens other caches. Raises ConfigError or DataError if one does not fit the teacher."""
        self.contaminated: list[Contaminated] = []
        self._config, self._teacher = config, teacher
        self._start_id, _ = reasoning_ids(teacher.tokenizer, config.reasoning.start, config.reasoning.end)
        decontaminate = config.completions.decontaminate
        self._evaluation = None if decontaminate is None else EvaluationTexts(decontaminate)
        self._require_template()
        self._caches: dict[str, _OtherCache] = {}
        with contextlib.ExitStack() as stack:
            for source in config.completions.sources:
                if isinstance(source, CacheCompletions):
                    self._caches[source.name] = _OtherCache(source, teacher)
                    stack.callback(self._caches[source.name].close)
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def count(self, share: WorkerShare = WHOLE) -> int:
        """Number of rows, including malformed and repeated ones, which are found only while reading."""
        return sum(self._num_rows(source, share) for source in self._config.completions.sources)

    def judges(self) -> set[str]:
        """Kinds of judges that the completions name."""
        of_caches = {kind for cache in self._caches.values() for kind in cache.judges()}
        sources = self._config.completions.sources
        return of_caches | {one.judge for one in sources if isinstance(one, CompletionFields) and one.judge is not None}

    def requests(self, share: WorkerShare = WHOLE) -> Iterator[Request | Failure]:
        """One request per completion of this share: every `share.count`th row of a file from `share.index` on; of
        another cache, the chains whose hash falls to it.
        """
        for source in self._config.completions.sources:
            rows = (row for row in self._rows(source, share) if not self._is_contaminated(row, source))
            while batch := list(itertools.islice(rows, TOKENIZE_BATCH)):
                yield from self._tokenized(batch)

    def _num_rows(self, source: CompletionSource, share: WorkerShare) -> int:
        if isinstance(source, CacheCompletions):
            return self._caches[source.name].count(share)
        num_rows = count_rows(source)
        num_used = num_rows if source.limit is None else min(num_rows, source.limit)
        return len(range(share.index, num_used, share.count))

    def _rows(self, source: CompletionSource, share: WorkerShare) -> Iterator[Completion | Failure]:
        if isinstance(source, CacheCompletions):
            yield from (_of_chain(chain, source) for chain in self._caches[source.name].chains(share))
            return
        for row in itertools.islice(read_rows(source), share.index, source.limit, share.count):
            yield _of_row(source, row, self._config.completions.heldout_frac, self._teacher.tokenizer)

    def _is_contaminated(self, row: Completion | Failure, source: CompletionSource) -> bool:
        if self._evaluation is None or isinstance(row, Failure):
            return False
        against = self._evaluation.overlap(row.prompt.messages)
        if against is not None:
            self.contaminated.append(Contaminated(f"{source.name} {row.where}", against))
        return against is not None

    def _tokenized(self, batch: Iterable[Completion | Failure]) -> Iterator[Request | Failure]:
        texts = [row.prompt for row in batch if isinstance(row, Completion) and row.prompt_token_ids is None]
        template_kwargs = self._config.teacher.chat_template_kwargs
        prompt_ids = iter(tokenize(self._teacher.tokenizer, texts, template_kwargs) if texts else [])
        for row in batch:
            if isinstance(row, Failure):
                yield row
                continue
            ids = next(prompt_ids) if row.prompt_token_ids is None else row.prompt_token_ids
            if isinstance(ids, str):
                failed_id = stable_hash("template", row.prompt.prompt_id, row.completion)
                yield template_failure(row.prompt, failed_id, row.sample_index, ids)
            else:
                yield self._request(row, ids)

    def _request(self, row: Completion, prompt_ids: list[int]) -> Request:
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

    def _completion_ids(self, row: Completion, prompt_ids: list[int]) -> list[int]:
        tokenizer, text = self._teacher.tokenizer, str(row.completion)
        opening = self._opening(prompt_ids)
        start = self._config.reasoning.start
        if opening is not None and text.lstrip().startswith(start):
            text = text.lstrip().removeprefix(start).removeprefix(opening)
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        if row.append_eos and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        return ids

    def _opening(self, prompt_ids: list[int]) -> str | None:
        """White space after the <think> that ends the prompt; None if the prompt does not open the reasoning."""
        if self._start_id is None or self._start_id not in prompt_ids:
            return None
        last = len(prompt_ids) - 1 - prompt_ids[::-1].index(self._start_id)
        rest = str(self._teacher.tokenizer.decode(prompt_ids[last + 1 :]))
        return rest if not rest.strip() else None

    def _require_template(self) -> None:
        """Texts need a chat template, and an end-of-sequence token if one is appended."""
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


class _OtherCache:
    """Chains of another cache, selected by a SQL condition."""

    def __init__(self, source: CacheCompletions, teacher: IdentifiedTeacher) -> None:
        """Raises DataError if there is no cache, ConfigError for a wrong condition or tokens that mean something else
        to this teacher, CorruptError if a run's manifest is missing.
        """
        self._source = source
        self._catalog = Catalog(source.path)
        with contextlib.ExitStack() as stack:
            self._session = stack.enter_context(Session({"main": self._catalog}))
            condition = "true" if source.where is None else f"({source.where}\n)"
            # Ordered, so that every worker and every rerun selects the same chains.
            limit = "" if source.limit is None else f" ORDER BY sample_id LIMIT {source.limit}"
            selected = self._session.arrow(f"SELECT sample_id FROM chains WHERE {condition}{limit}")
            self._selected: set[str] = set(selected.column("sample_id").to_pylist())
            self._special = {
                run_id: special_pieces(self._catalog.vocab_path(run.teacher.tokenizer_fingerprint))
                for run_id, run in self._catalog.runs().items()
            }
            if not source.retokenise:
                self._require_same_tokens(teacher)
            stack.pop_all()

    def close(self) -> None:
        self._session.close()

    def count(self, share: WorkerShare) -> int:
        return sum(sample_id in share for sample_id in self._selected)

    def judges(self) -> set[str]:
        query = "SELECT sample_id, json_extract_string(metadata, '$.judge') AS kind FROM shards"
        return {row["kind"] for row in self._rows(query) if row["kind"] is not None}

    def chains(self, share: WorkerShare) -> Iterator[dict[str, Any]]:
        """Rows. `metadata` is a dictionary that also names the chain's origin; `stopped` says whether the chain ended
        by itself.
        """
        for row in self._rows(f"SELECT {COLUMNS} FROM shards"):
            if row["sample_id"] in share:
                origin = {name: row[name] for name in ("sample_id", "run_id", "source")}
                row["metadata"] = {**json.loads(row["metadata"]), "scored_from": origin}
                last_piece = self._special.get(row["run_id"], {}).get(row["token_ids"][-1])
                row["stopped"] = came_to_its_end(row["finish_reason"], row["text"], last_piece)
                yield row

    def _rows(self, query: str) -> Iterator[dict[str, Any]]:
        for batch in self._session.batches(query, ROWS_PER_BATCH):
            yield from (row for row in batch.to_pylist() if row["sample_id"] in self._selected)

    def _require_same_tokens(self, teacher: IdentifiedTeacher) -> None:
        where = f"source {self._source.name}: "
        runs = {row["run_id"] for row in self._rows("SELECT sample_id, run_id FROM shards")}
        manifests = self._catalog.runs()
        if missing := runs - manifests.keys():
            raise CorruptError(
                f"{where}{self._source.path}/runs/{min(missing)}.json is missing, so its token ids cannot be "
                "interpreted: restore it from a copy, or run its build again"
            )
        fingerprints = {manifests[run_id].teacher.tokenizer_fingerprint for run_id in runs}
        for fingerprint in sorted(fingerprints - {teacher.record.tokenizer_fingerprint}):
            difference = compare_vocab(self._catalog.vocab_path(fingerprint), teacher.tokenizer)
            if differing := [*difference.ordinary, *difference.special]:
                shown = ", ".join(f"{i} is {one!r} there and {other!r} here" for i, one, other in differing[:NUM_SHOWN])
                raise ConfigError(
                    f"{where}{len(differing)} tokens of {self._source.path} mean something else to "
                    f"{teacher.record.model} ({shown}): set retokenise: true to score the chains' text instead"
                )


def _are_tokens(source: CompletionSource) -> bool:
    return source.are_ids if isinstance(source, CompletionFields) else not source.retokenise


def _of_row(source: FileCompletions, row: Row, heldout_frac: float, tokenizer: Any) -> Completion | Failure:
    if isinstance(row.values, str):
        return malformed(source.name, row.where, row.values)
    try:
        prompt_ids = None if source.prompt_ids_field is None else _ids(row.values, source.prompt_ids_field)
        messages, completion = _texts(source, row.values, prompt_ids, tokenizer)
        metadata = metadata_of(source, row, row.values)
        draft = Draft(row.where, tuple(messages), reference_of(source, row.values), metadata)
        require_encodable(draft, completion if isinstance(completion, str) else "")
    except ValueError as error:
        return malformed(source.name, row.where, str(error))
    prompt = prompt_of(draft, source.name, source.system, source.instruction, heldout_frac)
    return Completion(row.where, prompt, completion, prompt_ids, source.append_eos)


def _texts(
    source: CompletionFields, values: Json, prompt_ids: list[int] | None, tokenizer: Any
) -> tuple[list[Message], str | list[int]]:
    """The prompt's messages, and the completion. Raises ValueError if the row has none."""
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
        raise ValueError(f"field {name!r} is not a list of token ids (at least one, each from 0 to {MAX_ID})")
    return ids


def _of_chain(chain: Json, source: CacheCompletions) -> Completion:
    """A row of another cache. Reasoning markers are part of its text unless they are special tokens there."""
    messages = tuple(Message(one["role"], one["content"]) for one in chain["messages"])
    prompt_id = prompt_id_of(messages)
    prompt = Prompt(prompt_id, messages, source.name, chain["split"], chain["reference"], chain["metadata"])
    where, index = chain["sample_id"], chain["sample_index"]
    if source.retokenise:
        return Completion(where, prompt, chain["text"], None, chain["stopped"], index)
    return Completion(where, prompt, chain["token_ids"], chain["prompt_token_ids"], False, index)
