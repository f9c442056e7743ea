"""Completions to score: rows of files, datasets and other caches, turned into requests.

In: the `completions` block of the configuration. Out: a lazy stream of Requests and Failures in source order; only the
batch being tokenised is in memory.

Text becomes tokens as in generation: the prompt by the chat template with the assistant's turn opened, the completion
on its own. The template does not render the completion, because templates drop the reasoning of earlier turns. So:

- A finished completion must end as a turn of the teacher does, by the token that the template writes behind an answer,
  which `append_eos` adds unless the text ends with a special token already.
- If the template has already written <think> into the prompt, a completion's own <think> is removed, along with the
  white space that follows it in the prompt. A finished completion without </think> is refused there: the teacher would
  score its answer as reasoning.
- Of `turns: all`, every assistant turn is a chain of its own whose prompt is the conversation before it. No mask is
  needed: a chain's loss is on its completion, and templates drop earlier reasoning as they do in a conversation.

Chains of another cache keep their token ids if both teachers share a vocabulary; `chain_id` then joins their views of
the same tokens.
"""

import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from stillroom.cache.catalog import Catalog
from stillroom.errors import ConfigError, CorruptError
from stillroom.models import came_to_its_end, compare_vocab, end_id_of, reasoning_ids, special_pieces
from stillroom.schema.records import Message, Prompt, prompt_id_of, scored_sample_id_of, stable_hash
from stillroom.sql.conditions import in_brackets, run_with
from stillroom.sql.session import Session
from teacher_cache.config import ScoreConfig
from teacher_cache.engine.api import Failure, Request
from teacher_cache.engine.switches import identity_of
from teacher_cache.engine.teacher import IdentifiedTeacher
from teacher_cache.prompts.config import CacheCompletions, CompletionFields, CompletionSource, FileCompletions
from teacher_cache.prompts.conversations import Json, find, messages_of, text_of, value_of
from teacher_cache.prompts.decontaminate import Contaminated, EvaluationTexts
from teacher_cache.prompts.files import Row
from teacher_cache.prompts.kept import prompt_of
from teacher_cache.prompts.prompts import (
    TOKENIZE_BATCH,
    WHOLE,
    Part,
    WorkerShare,
    part_name,
    template_failure,
)
from teacher_cache.prompts.rendering import tokenize
from teacher_cache.prompts.sources import (
    Draft,
    count_rows,
    malformed,
    metadata_of,
    read_rows,
    reference_of,
    require_encodable,
)
from teacher_cache.scrub.counts import is_made_up
from teacher_cache.scrub.rows import Scrubber

COLUMNS = (
    "sample_id, sample_index, run_id, source, split, messages, prompt_token_ids, reference, metadata, text, "
    "token_ids, finish_reason, filename, file_row_number"
)
ORIGIN_KEY = "scored_from"
"""Of a row's metadata: the chain of another cache that was scored."""
ROWS_PER_BATCH = 256
NUM_SHOWN = 3
MAX_ID = 2**31 - 1
"""Ids are stored as int32; the engine checks them against the teacher's vocabulary."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and its completion, as text or as token ids. `where` names the row for a person; `original` is what its
    prompt was before personal data was replaced.
    """

    where: str
    prompt: Prompt
    completion: str | list[int]
    prompt_token_ids: list[int] | None = None
    append_eos: bool = False
    sample_index: int = 0
    original: tuple[Message, ...] | None = None


_Reader = Callable[[Scrubber | None], Sequence[Completion | Failure]]


class Completions:
    """All completions of a configuration, for one teacher, as a context manager."""

    def __init__(self, config: ScoreConfig, teacher: IdentifiedTeacher, scrubber: Scrubber | None = None) -> None:
        """Opens other caches. Raises ConfigError or DataError if one does not fit the teacher."""
        self.contaminated: list[Contaminated] = []
        self._config, self._teacher, self._scrubber = config, teacher, scrubber
        self._identity = identity_of(teacher.record.fingerprint, config.engine.switches)
        self._start_id, self._end_id = reasoning_ids(teacher.tokenizer, config.reasoning.start, config.reasoning.end)
        added = teacher.tokenizer.added_tokens_decoder.items()
        special = {*teacher.tokenizer.all_special_ids, *(token_id for token_id, one in added if one.special)}
        self._final_ids = special - {self._start_id, self._end_id}
        self._appended_id = end_id_of(teacher.tokenizer, config.teacher.chat_template_kwargs)
        decontaminate = config.completions.decontaminate
        self._evaluation = None if decontaminate is None else EvaluationTexts(decontaminate)
        self._require_template()
        self._caches: dict[str, _OtherCache] = {}
        with contextlib.ExitStack() as stack:
            for source in config.completions.sources:
                if isinstance(source, CacheCompletions):
                    self._caches[source.name] = _OtherCache(source, teacher, names_places=scrubber is not None)
                    stack.callback(self._caches[source.name].close)
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def count(self, share: WorkerShare = WHOLE) -> int:
        """Number of rows, including malformed and repeated ones, which are found only while reading."""
        with self._errors():
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
            found = self._rows(source, share, self._scrubber)
            rows = (row for row in found if not self._is_contaminated(row, source))
            while batch := list(itertools.islice(rows, TOKENIZE_BATCH)):
                yield from self._tokenized(batch)

    def parts(self, size: int) -> Iterator[Part]:
        """The same requests in parts of `size` rows each, which are tokenised on demand. Reads the sources again."""
        for source in self._config.completions.sources:
            rows = ((read, place, row) for read in self._readers(source, WHOLE) for place, row in enumerate(read(None)))
            for number in itertools.count():
                batch = list(itertools.islice(rows, size))
                if not batch:
                    break
                names = [self._name_of(row) for _, _, row in batch]
                yield part_name(number, [source.name, *names]), functools.partial(self._part, batch, source)

    def _part(
        self, batch: Sequence[tuple[_Reader, int, Completion | Failure]], source: CompletionSource
    ) -> Sequence[Request | Failure]:
        if self._scrubber is None:
            rows = [row for _, _, row in batch]
        else:
            # Only now, when the part is leased: finding personal data takes longer than all else here.
            own = {id(read): read(self._scrubber) for read, _, _ in batch}
            rows = [own[id(read)][place] for read, place, _ in batch]
        return [*self._tokenized([row for row in rows if not self._is_contaminated(row, source)])]

    def _name_of(self, row: Completion | Failure) -> str:
        if isinstance(row, Failure):
            return row.sample_id
        # A part's name is a file's name, and the id of a text with personal data could be guessed back to it.
        return row.where if self._scrubber is not None else f"{row.prompt.prompt_id} {row.where}"

    def _num_rows(self, source: CompletionSource, share: WorkerShare) -> int:
        if isinstance(source, CacheCompletions):
            return self._caches[source.name].count(share)
        if source.turns == "all" or _holds_lists(source):
            return sum(1 for _ in self._rows(source, share))
        num_rows = count_rows(source)
        num_used = num_rows if source.limit is None else min(num_rows, source.limit)
        return len(range(share.index, num_used, share.count))

    def _rows(
        self, source: CompletionSource, share: WorkerShare, scrubber: Scrubber | None = None
    ) -> Iterator[Completion | Failure]:
        for read in self._readers(source, share):
            yield from read(scrubber)

    def _readers(self, source: CompletionSource, share: WorkerShare) -> Iterator[_Reader]:
        """A row's completions each, with personal data or without."""
        if isinstance(source, CacheCompletions):
            for chain in self._caches[source.name].chains(share):
                yield functools.partial(_of_chain, chain, source)
            return
        heldout_frac, tokenizer = self._config.completions.heldout_frac, self._teacher.tokenizer
        with self._errors():
            for row in itertools.islice(read_rows(source), share.index, source.limit, share.count):
                yield functools.partial(_of_row, source, row, heldout_frac, tokenizer)

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._scrubber is None else self._scrubber.errors()

    def _is_contaminated(self, row: Completion | Failure, source: CompletionSource) -> bool:
        if self._evaluation is None or isinstance(row, Failure):
            return False
        # Evaluation sets have their names.
        against = self._evaluation.overlap(row.prompt.messages if row.original is None else row.original)
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
            elif self._lacks_end_of_reasoning(row, ids):
                yield malformed(row.prompt.source, row.where, self._no_end_of_reasoning())
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
            sample_id=scored_sample_id_of(self._identity, prompt_ids, ids),
            completion_token_ids=ids,
        )

    def _completion_ids(self, row: Completion, prompt_ids: list[int]) -> list[int]:
        tokenizer, text = self._teacher.tokenizer, str(row.completion)
        opening = self._opening(prompt_ids)
        start = self._config.reasoning.start
        if opening is not None and text.lstrip().startswith(start):
            text = text.lstrip().removeprefix(start).removeprefix(opening)
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not row.append_eos:
            return ids
        # Rendered conversations keep their end marks and the line break after them: "5<|im_end|>\n".
        bare: list[int] = tokenizer(text.rstrip(), add_special_tokens=False)["input_ids"]
        if bare and bare[-1] in self._final_ids:
            return bare
        assert self._appended_id is not None
        return [*ids, self._appended_id]

    def _lacks_end_of_reasoning(self, row: Completion, prompt_ids: list[int]) -> bool:
        is_finished_text = isinstance(row.completion, str) and row.append_eos
        if not is_finished_text or self._end_id is None or self._config.reasoning.end in row.completion:
            return False
        return self._opening(prompt_ids) is not None

    def _no_end_of_reasoning(self) -> str:
        start, end = self._config.reasoning.start, self._config.reasoning.end
        return (
            f"the chat template opens {start} in the prompt, and the completion has no {end}, so its answer would "
            f"count as reasoning: put {end} before the answer, turn thinking off with "
            "teacher.chat_template_kwargs if the template can, or set append_eos: false if the text is cut"
        )

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
        if appending and self._appended_id is None:
            raise ConfigError(
                f"the tokenizer of {model} has no end-of-sequence token: set append_eos: false for source "
                f"{appending[0].name}"
            )


class _OtherCache:
    """Chains of another cache, selected by a SQL condition."""

    def __init__(self, source: CacheCompletions, teacher: IdentifiedTeacher, *, names_places: bool = False) -> None:
        """With `names_places` chains are named by file and row: an id that was made of personal data could be guessed
        back to it.

        Raises DataError if there is no cache, ConfigError for a wrong condition or tokens that mean something else
        to this teacher, CorruptError if a run's manifest is missing.
        """
        self._source, self._names_places = source, names_places
        self._catalog = Catalog(source.path)
        with contextlib.ExitStack() as stack:
            self._session = stack.enter_context(Session({"main": self._catalog}))
            # Ordered, so that every worker and every rerun selects the same chains.
            limit = "" if source.limit is None else f" ORDER BY sample_id LIMIT {source.limit}"
            where = "true" if source.where is None else source.where
            query = f"SELECT sample_id FROM chains WHERE {in_brackets(where)}{limit}"
            selected = run_with(self._session, f"source {source.name}: where", where, query)
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
        by itself; `where` names it for a person.
        """
        for row in self._rows(f"SELECT {COLUMNS} FROM shards"):
            if row["sample_id"] in share:
                origin = {name: row[name] for name in ("sample_id", "run_id", "source")}
                row["metadata"] = {**json.loads(row["metadata"]), ORIGIN_KEY: origin}
                place = f"{'/'.join(row['filename'].split('/')[-2:])} row {row['file_row_number']}"
                row["where"] = place if self._names_places else row["sample_id"]
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


def _of_row(
    source: FileCompletions, row: Row, heldout_frac: float, tokenizer: Any, scrubber: Scrubber | None
) -> list[Completion | Failure]:
    """The row's completions: one, or one per assistant turn. A row with a bad turn is one failure."""

    def failed(message: str) -> Failure:
        return malformed(source.name, row.where, message if scrubber is None else scrubber.text(message))

    if isinstance(row.values, str):
        return [failed(row.values)]
    try:
        prompt_ids = None if source.prompt_ids_field is None else _ids(row.values, source.prompt_ids_field)
        turns = _turns(source, row.values, prompt_ids, tokenizer)
        drafts = _drafts(source, row, row.values, turns)
        for draft, (_, completion) in zip(drafts, turns, strict=True):
            require_encodable(draft, completion if isinstance(completion, str) else "")
    except (ValueError, RecursionError) as error:
        return [failed(str(error))]
    originals = [None if scrubber is None else one.messages for one in drafts]
    if scrubber is not None:
        if source.are_ids:
            problem = scrubber.problem(drafts[0], *(str(tokenizer.decode(one)) for one in (prompt_ids, turns[0][1])))
            if problem is not None:
                return [_with_personal_data(source.name, row.where, problem)]
        else:
            pairs = scrubber.completions([(one, str(text)) for one, (_, text) in zip(drafts, turns, strict=True)])
            drafts, turns = [draft for draft, _ in pairs], [([], text) for _, text in pairs]
    prompts = [prompt_of(one, source.name, source.system, source.instruction, heldout_frac) for one in drafts]
    completions: list[Completion | Failure] = []
    unit = "turn" if source.turns == "all" else "item" if _is_list(source, row.values) else None
    for place, (prompt, (_, completion)) in enumerate(zip(prompts, turns, strict=True)):
        # One split for the whole conversation: later turns quote earlier ones.
        prompt = replace(prompt, split=prompts[0].split)
        where = row.where if unit is None else f"{row.where} {unit} {place}"
        index = place if unit == "item" else 0
        completions.append(
            Completion(where, prompt, completion, prompt_ids, source.append_eos, index, originals[place])
        )
    return completions


def _with_personal_data(source: str, where: str, problem: str) -> Failure:
    """The failure of a row whose text cannot be replaced, because its tokens are given."""
    failure = malformed(source, where, f"its tokens contain personal data, which is not scored ({problem})")
    return replace(failure, reason="personal_data")


def _drafts(
    source: FileCompletions, row: Row, values: Json, turns: Sequence[tuple[list[Message], str | list[int]]]
) -> list[Draft]:
    metadata, reference = metadata_of(source, row, values), reference_of(source, values)
    metas, references = [metadata] * len(turns), [reference] * len(turns)
    if source.turns == "all":
        # The reference answers the last question, so judging an earlier turn by it would call it wrong.
        unjudged = {name: value for name, value in metadata.items() if name != "judge"}
        metas = [{**one, "turn": turn} for turn, one in enumerate([*([unjudged] * (len(turns) - 1)), metadata])]
        references[:-1] = [None] * (len(turns) - 1)
    elif _is_list(source, values):
        metas = [_own(metadata, place, len(turns)) for place in range(len(turns))]
    return [
        Draft(row.where, tuple(messages), answer, one)
        for (messages, _), answer, one in zip(turns, references, metas, strict=True)
    ]


def _own(metadata: Json, place: int, num: int) -> Json:
    """Metadata of one of `num` completions: its item of each list that has one for every completion."""
    return {
        name: value[place] if isinstance(value, list) and len(value) == num else value
        for name, value in metadata.items()
    }


def _is_list(source: CompletionFields, values: Json) -> bool:
    """Whether a row holds a list of completions."""
    return source.completion_field is not None and isinstance(find(values, source.completion_field), list)


def _holds_lists(source: FileCompletions) -> bool:
    """Whether the first row that can be read holds a list of completions."""
    first = next((row.values for row in read_rows(source) if isinstance(row.values, dict)), {})
    return _is_list(source, first)


def _turns(
    source: CompletionFields, values: Json, prompt_ids: list[int] | None, tokenizer: Any
) -> list[tuple[list[Message], str | list[int]]]:
    """Each completion and the messages before it. Raises ValueError if the row has none."""
    if source.prompt_field is not None or source.messages_field is not None:
        messages = messages_of(source, values)
    else:
        messages = [Message("user", str(tokenizer.decode(prompt_ids)))]
    beside = source.completion_ids_field or source.completion_field
    if beside is None:
        return _turns_of(messages, str(source.messages_field), every=source.turns == "all")
    if messages[-1].role == "assistant":
        field = source.messages_field or source.prompt_field
        raise ValueError(
            f"field {field!r} ends with the assistant's turn, and {beside!r} holds the completion too: remove that "
            f"turn, or the setting of {beside!r} to score the turn"
        )
    if _is_list(source, values):
        texts = {f"{beside}[{place}]": one for place, one in enumerate(find(values, beside))}
        if not texts:
            raise ValueError(f"field {beside!r} is an empty list")
        return [(messages, text_of(texts, name)) for name in texts]
    return [(messages, _ids(values, beside) if source.are_ids else text_of(values, beside))]


def _turns_of(messages: list[Message], field: str, *, every: bool) -> list[tuple[list[Message], str | list[int]]]:
    places = [place for place, message in enumerate(messages) if message.role == "assistant"]
    if not every:
        places = places[-1:] if messages[-1].role == "assistant" else []
    if not places:
        raise ValueError(f"field {field!r} does not end with a question and the assistant's answer")
    for place in places:
        if place == 0 or not messages[place].content.strip():
            problem = "has no question before it" if place == 0 else "is empty"
            raise ValueError(f"field {field!r}, message {place} of the assistant {problem}")
        if messages[place - 1].role == "assistant":
            raise ValueError(f"field {field!r}, messages {place - 1} and {place} are both the assistant's: join them")
    return [(messages[:place], messages[place].content) for place in places]


def _ids(values: Json, name: str) -> list[int]:
    ids = value_of(values, name)
    if not isinstance(ids, list) or not ids or not all(type(one) is int and 0 <= one <= MAX_ID for one in ids):
        raise ValueError(f"field {name!r} is not a list of token ids (at least one, each from 0 to {MAX_ID})")
    return ids


def _of_chain(chain: Json, source: CacheCompletions, scrubber: Scrubber | None) -> list[Completion | Failure]:
    """A row of another cache. Reasoning markers are part of its text unless they are special tokens there."""
    where, index, text = chain["where"], chain["sample_index"], chain["text"]
    messages = tuple(Message(one["role"], one["content"]) for one in chain["messages"])
    # Its ids are not texts: their digits may look like a card's.
    own = {name: value for name, value in chain["metadata"].items() if name != ORIGIN_KEY}
    draft, origin = Draft(where, messages, chain["reference"], own), chain["metadata"][ORIGIN_KEY]
    original = None if scrubber is None else messages
    if scrubber is not None and not is_made_up(own):
        if source.retokenise:
            ((scrubbed, text),) = scrubber.completions([(draft, text)])
            if scrubbed is not draft or text != chain["text"]:
                # An id that was made of the original text could be guessed back to it.
                origin = {name: value for name, value in origin.items() if name != "sample_id"}
            draft = scrubbed
        elif (problem := scrubber.problem(draft, text)) is not None:
            return [_with_personal_data(source.name, where, f"{problem}; retokenise: true replaces it in the text")]
    metadata = {**draft.metadata, ORIGIN_KEY: origin}
    prompt = Prompt(
        prompt_id_of(draft.messages), draft.messages, source.name, chain["split"], draft.reference, metadata
    )
    if source.retokenise:
        return [Completion(where, prompt, text, None, chain["stopped"], index, original)]
    return [Completion(where, prompt, chain["token_ids"], chain["prompt_token_ids"], False, index, original)]
