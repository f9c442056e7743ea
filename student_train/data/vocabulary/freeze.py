"""A selection projected into a student's vocabulary: computed once, when a run freezes it, then read like a cache.

In: a selection, the student's tokenizer. Out: files of retokenised.py with the signal columns of a cache over the
student's ids, and two more: `is_common`, whether a token begins where a teacher token does, and `chunk_logprob`, the
teacher's log probability of the text from one such place to the next, on its last token (null elsewhere).

Two passes. The first aligns up to MAX_COUNTED teacher tokens of evenly spaced row groups (for held-out chains: of those
to train on) and counts which student token comes where the teacher says what. The second aligns every chain and
projects its distributions. A student token that the teacher's tokens do not cover (a <think> of its own, a chain that
cannot be aligned) has no distribution: its target is itself, so that a divergence there is the cross-entropy.

S student tokens, R chains, N stored candidates
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stillroom.cache.catalog import Catalog
from stillroom.cache.codec import decode, encode
from stillroom.cache.columns import LOGPROB_RANGE_NATS, list_column
from stillroom.cache.shards import open_shard
from stillroom.errors import ConfigError
from stillroom.log import Progress
from stillroom.models import cached_pieces, compare_vocab
from stillroom.pieces import OPEN, Vocabulary, vocabulary_of
from stillroom.schema import FORMAT_VERSION
from stillroom.schema.manifest import SHARD_METADATA_KEY, ShardHeader
from stillroom.schema.records import Float32, Int32, Int64, Signals
from stillroom.schema.tables import TOKEN_FIELDS, list_of, signal_fields
from stillroom.storage.paths import Location
from student_train.data.freezing import SelectionRequest, open_selection
from student_train.data.retokenised import (
    CHUNK_LOGPROB,
    IS_COMMON,
    Counts,
    read_groups,
    retokenise,
    vocab_beside,
    write_retokenised,
)
from student_train.data.selection import Projection, Selection, load_selection
from student_train.data.text import (
    TEXT_COLUMNS,
    TEXT_SCHEMA,
    HuggingFaceText,
    Markers,
    has_ended,
    markers_of,
    reopen_retokenised,
    with_last_id,
)
from student_train.data.vocabulary.alignment import chunk_logprobs, first_tokens_with, is_written_with
from student_train.data.vocabulary.chains import CHANGED, RESPELLED, AlignedChain, Aligner
from student_train.data.vocabulary.merges import merges_of
from student_train.data.vocabulary.pairs import Pairs
from student_train.data.vocabulary.pieces import END, MARK, VocabularyPair
from student_train.data.vocabulary.projection import MAX_SUPPORT, Targets, project
from student_train.data.vocabulary.transport import Aligned, Strings, Transport, joins_of

VERSION = 2
"""Of all code that decides targets: files of another version are made again."""
MAX_COUNTED = 2_000_000
BATCH_TOKENS = 16_384
"""Teacher tokens projected together: the projection's arrays are some hundred times as long."""
EXTRA_FIELDS = [
    pa.field(IS_COMMON, list_of(pa.bool_()), nullable=False),
    pa.field(CHUNK_LOGPROB, list_of(pa.float32()), nullable=False),
]


def open_projected_selection(
    path: Path, request: SelectionRequest, tokenizer: HuggingFaceText, counted: Path | None = None
) -> Selection:
    """The projected selection kept at `path`, or a new one: frozen, then projected into a folder beside it.

    `counted` is the path of another projected selection, with whose chains a new one counts instead of its own: those
    of training, for held-out chains. Goes on where an interrupted call stopped. Raises ConfigError where `path` answers
    another request or tokenizer, where the vocabularies agree, and where most of the text cannot be aligned.
    """
    if path.exists():
        return reopen_retokenised(path, request, tokenizer)
    source = freeze_source(path, request)
    roots = [one.root for one in request.sources]
    other = None if counted is None or not _source_path(counted).exists() else _source_path(counted)
    maker = ProjectedRows(source, tokenizer, None if other is None else load_selection(other, roots))
    made = retokenise(path, source, maker)
    # Before the selection's own file, which says that all is here.
    tokenizer.write_vocab(vocab_beside(made.folder))
    counts = made.counts
    projection = Projection(
        num_aligned=int(counts["aligned"]),
        num_changed=int(counts[CHANGED]),
        num_respelled=int(counts[RESPELLED]),
        num_common=int(counts["common"]),
        num_teacher_tokens=int(counts["teacher_tokens"]),
        mass=counts["mass"] / max(counts["common"], 1),
        special=maker.special,
    )
    header = {
        "projection": projection,
        "tokenizer_fingerprints": [tokenizer.fingerprint],
        "vocab_size": tokenizer.vocab_size,
        "max_support": MAX_SUPPORT,
    }
    return write_retokenised(path, source, made, header, "text")


def freeze_source(path: Path, request: SelectionRequest) -> Selection:
    """The chains of which open_projected_selection() makes the selection at `path`."""
    return open_selection(_source_path(path), replace(request, any_tokenizer=True))


class ProjectedRows:
    """Makes rows with distributions over the student's ids."""

    verb = "project"
    folder_suffix = "projected"
    columns = TEXT_COLUMNS
    with_signals = True

    def __init__(self, source: Selection, tokenizer: HuggingFaceText, counted: Selection | None = None) -> None:
        """Raises ConfigError where the vocabularies agree."""
        self._tokenizer = tokenizer
        other = [] if counted is None else [counted.header.hash]
        self.identity = ["projected", VERSION, *tokenizer.identity, source.header.hash, *other]
        student = vocabulary_of(tokenizer.tokenizer, tokenizer.pieces)
        paths = {one: _vocab_path(source, one) for one in source.header.tokenizer_fingerprints}
        if all(_is_same(one, path, tokenizer) for one, path in paths.items()):
            raise ConfigError(
                "the student has the cache's vocabulary, and projecting into it would only lose: leave out data.kind: "
                "projected"
            )
        groups_of = {} if counted is None else _groups_by_teacher(counted)
        self._teachers = {}
        for fingerprint, groups in _groups_by_teacher(source).items():
            vocabulary, chains = Vocabulary(*cached_pieces(paths[fingerprint])), _Chains(source, groups)
            # Of a teacher that writes none of the other chains, its own are all there is.
            has_other = counted is not None and len(groups_of.get(fingerprint, ())) > 0
            others = _Chains(counted, groups_of[fingerprint]) if counted is not None and has_other else None
            self._teachers[fingerprint] = _Teacher(chains, others, vocabulary, student, tokenizer)

    def prepare(self) -> None:
        """Counts the transport of each teacher. Raises ConfigError where the student's tokenizer changes the text."""
        for teacher in self._teachers.values():
            teacher.count()

    @property
    def special(self) -> list[tuple[str, str | None]]:
        """Special tokens of the chains, and what the student writes for each; None is their text."""
        return sorted({one for teacher in self._teachers.values() for one in teacher.special.items()})

    def metadata(self, header: ShardHeader) -> dict[bytes, bytes]:
        """A shard's header, by which the rows are decoded."""
        changed: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "max_support": MAX_SUPPORT,
            "nucleus": None,
            "draws": 0,
            "temperatures": [],
            "entropy": "support",
            "vocab_size": self._tokenizer.vocab_size,
            "tokenizer_fingerprint": self._tokenizer.fingerprint,
        }
        described = header.model_copy(update=changed).model_dump_json().encode()
        return {SHARD_METADATA_KEY: described, **self._tokenizer.metadata}

    def schema(self, header: ShardHeader) -> pa.Schema:
        """Tokens, the signals of the shard's codec, and this module's two columns."""
        return pa.schema([*TEXT_SCHEMA, *TOKEN_FIELDS, *signal_fields(header.codec), *EXTRA_FIELDS])

    def make(self, table: pa.Table, header: ShardHeader, where: str) -> tuple[pa.Table, Counts]:
        """Rows of the chains that come to a token."""
        teacher = self._teachers[header.tokenizer_fingerprint]
        chains = teacher.align(table, where)
        is_aligned_R = np.array([chain.alignment is not None for chain in chains])
        signals, offsets = decode(table.filter(pa.array(is_aligned_R)), header, where)
        good = [chain for chain in chains if chain.alignment is not None]
        targets = _concatenated([teacher.project(*batch) for batch in _batches(good, signals)])
        is_common_S = _joined([chain.alignment.is_common_S for chain in good if chain.alignment is not None]) > 0
        has_common_S = is_common_S & (targets.n_S > 0)
        counts: Counts = {
            "aligned": len(good),
            CHANGED: sum(chain.problem == CHANGED for chain in chains),
            RESPELLED: sum(chain.problem == RESPELLED for chain in chains),
            "common": int(is_common_S.sum()),
            "teacher_tokens": len(signals.topk_n_T),
            # 1 - exp(x) by expm1, which keeps its digits where the tail holds nearly all.
            "mass": float(-np.expm1(targets.tail_logmass_S[has_common_S].astype(np.float64)).sum()),
        }
        made = iter(_split(_filled(targets, _joined([chain.student_ids_S for chain in good])), good))
        said = iter(np.split(signals.sampled_logprob_T, offsets[1:-1]))
        rows: list[Row] = []
        for chain in chains:
            if chain.alignment is not None:
                rows.append((chain, next(made), next(said)))
            else:
                rows.append((chain, _filled(_no_targets(len(chain.student_ids_S)), chain.student_ids_S), None))
        # Without a prompt no position predicts the first token.
        kept = [row for row in rows if len(row[0].student_ids_S) and row[0].prompt_ids]
        return _table(kept, header.codec).cast(self.schema(header)), counts


@dataclass(frozen=True)
class _Chains:
    """Chains of one teacher: row groups of a selection."""

    source: Selection
    groups: Int64

    def evenly(self, num_tokens: int) -> Self:
        """Evenly spaced row groups, of so many completion tokens together."""
        tokens_G = np.bincount(self.source.group_R, self.source.num_tokens_R, len(self.source.file_G))
        # Rounded up: a smaller step would take more than was asked for, and a step of 0 is an error.
        return replace(self, groups=self.groups[:: -(-int(tokens_G[self.groups].sum()) // num_tokens)])

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Their rows, a row group at a time."""
        for group in self.groups.tolist():
            for _, table in read_groups(self.source, [group], columns):
                yield table


class _Teacher:
    """One teacher's chains: their alignment with the student, and the transport that they say."""

    def __init__(
        self,
        chains: _Chains,
        counted: _Chains | None,
        vocabulary: Vocabulary,
        student: Vocabulary,
        tokenizer: HuggingFaceText,
    ) -> None:
        """`counted` are the chains to count, where these are others than `chains`."""
        self._chains, self._other, self._tokenizer = chains, counted, tokenizer
        markers = markers_of(chains.source)
        seen, ends = _special_in(chains, vocabulary, markers)
        if counted is not None:
            markers = {**markers_of(counted.source), **markers}
            ends |= _special_in(counted.evenly(MAX_COUNTED), vocabulary, markers)[1]
        self.aligner = Aligner(vocabulary, chains.source.header.vocab_size, ends, student, tokenizer, markers)
        self.special = _special_of(vocabulary, seen, student, self.aligner.pair)
        pair = self.aligner.pair
        # At most MAX_COUNTED tokens and a row group: some 100 MB.
        self._counted: dict[str, list[AlignedChain]] = {}
        self._is_mark_V = np.array(
            [data[:1] == OPEN and MARK.fullmatch(data) is not None for data in pair.student_bytes]
        )
        encode = tokenizer.encode_completions
        joins = joins_of(pair.student_bytes)
        merges = merges_of(tokenizer.tokenizer, pair.student_bytes)
        self._strings = Strings(*_without_marks(pair), first_tokens_with(pair, encode), joins, merges)
        # A tokenizer may have more tokens than the model has rows, as long as no text needs them.
        num_ids = max(tokenizer.vocab_size, len(pair.student_bytes))
        self._transport = Transport(self._strings, num_ids)
        self._pairs = Pairs(pair.student_bytes, is_written_with(pair, encode), num_ids, joins, merges)

    def align(self, table: pa.Table, where: str) -> list[AlignedChain]:
        """Chains of `table`, the row group at `where`, once in all for those that were counted."""
        chains = self._counted.pop(where, None)
        return self.aligner.align(table) if chains is None else chains

    def count(self) -> None:
        """Counts over a sample of the row groups. Raises ConfigError where most of its chains cannot be aligned."""
        counted = (self._other or self._chains).evenly(MAX_COUNTED)
        problems: list[str] = []
        with Progress("align", len(counted.groups), "row groups") as progress:
            for number, table in enumerate(counted.tables(TEXT_COLUMNS)):
                chains = self.aligner.align(table)
                if self._other is None:
                    self._counted[counted.source.where(int(counted.groups[number]))] = chains
                aligned = self._aligned([chain for chain in chains if chain.alignment is not None])
                self._transport.add(aligned)
                self._pairs.add(aligned.before_S, aligned.student_ids_S)
                problems += [chain.problem for chain in chains]
                progress.update(number + 1, 0)
        if 2 * sum(map(bool, problems)) > len(problems):
            raise ConfigError(_refusal(self._tokenizer, [problem for problem in problems if problem]))
        self._transport.finish()

    def project(self, chains: Sequence[AlignedChain], signals: Signals) -> Targets:
        """Targets of the student tokens of all chains, one after the other; `signals` are of the teacher's."""
        return project(self._aligned(chains), signals, self._strings, self._transport, self._pairs)

    def _aligned(self, chains: Sequence[AlignedChain]) -> Aligned:
        teacher_R = np.array([len(chain.teacher_ids_T) for chain in chains], np.int64)
        student_R = np.array([len(chain.student_ids_S) for chain in chains], np.int64)
        ends_R = np.cumsum(teacher_R)
        places_S = _joined([chain.alignment.teacher_place_S for chain in chains if chain.alignment is not None])
        first_S = np.repeat(ends_R - teacher_R, student_R)
        lengths_S = [np.diff(one.alignment.student_ends_S, prepend=0) for one in chains if one.alignment is not None]
        return Aligned(
            teacher_ids_T=_joined([chain.teacher_ids_T for chain in chains]),
            ends_T=np.repeat(ends_R, teacher_R),
            student_ids_S=(student_ids_S := _joined([chain.student_ids_S for chain in chains])),
            student_bytes_S=np.where(self._is_mark_V[student_ids_S], 0, _joined(lengths_S)),
            places_S=np.where(places_S >= 0, places_S + first_S, -1),
            skipped_S=_joined([one.alignment.skipped_S for one in chains if one.alignment is not None]),
            # -1 where a chain begins: there is no token before.
            before_S=_joined([np.append(-1, chain.student_ids_S)[:-1] for chain in chains]),
        )


Row = tuple[AlignedChain, Signals, Float32 | None]
"""A chain, its targets, and where it is aligned the teacher's log probability of each of its own tokens."""


def _groups_by_teacher(source: Selection) -> dict[str, Int64]:
    """Row groups by the teacher's tokenizer."""
    names = source.header.tokenizer_fingerprints
    name_G = np.zeros(len(source.file_G), np.int64)
    if len(names) > 1:
        number_of: dict[Location, int] = {}
        for group in range(len(name_G)):
            path = source.path_of(group)
            if path not in number_of:
                shard, header = open_shard(path)
                shard.close()
                number_of[path] = names.index(header.tokenizer_fingerprint)
            name_G[group] = number_of[path]
    return {name: np.flatnonzero(name_G == number) for number, name in enumerate(names)}


def _special_in(chains: _Chains, vocabulary: Vocabulary, markers: Mapping[str, Markers]) -> tuple[set[int], set[int]]:
    """The special tokens in all chains of the row groups, and those among them that end one."""
    special = np.array(sorted(vocabulary.special), np.int32)
    seen: set[int] = set()
    ends: set[int] = set()
    with Progress("scan", len(chains.groups), "row groups") as progress:
        for number, table in enumerate(chains.tables(["sample_id", "run_id", "text", "finish_reason", "token_ids"])):
            ids = table.column("token_ids").combine_chunks().flatten().to_numpy()
            seen.update(np.unique(ids[np.isin(ids, special)]).tolist())
            ends.update(row["last_id"] for row in with_last_id(table) if has_ended(row, markers[row["run_id"]]))
            progress.update(number + 1, 0)
    return seen, ends & vocabulary.special


def _source_path(path: Path) -> Path:
    """Where the selection lies that the one at `path` was made from."""
    return path.with_name(f"{path.stem}.source.parquet")


def _vocab_path(source: Selection, fingerprint: str) -> Location:
    """The teacher's vocabulary in one of the caches. Raises ConfigError where none has it."""
    paths = [Catalog(folder.parent).vocab_path(fingerprint) for folder in dict.fromkeys(source.folders)]
    path = next((one for one in paths if one.exists()), None)
    if path is None:
        raise ConfigError(f"{paths[0]} is missing, and says what the teacher's tokens are: copy the whole cache")
    return path


def _is_same(fingerprint: str, path: Location, tokenizer: HuggingFaceText) -> bool:
    """Whether a teacher's vocabulary is the student's."""
    is_same = fingerprint == tokenizer.tokenizer_fingerprint
    return is_same or compare_vocab(path, tokenizer.tokenizer, tokenizer.pieces).agree


def _special_of(
    teacher: Vocabulary, seen: set[int], student: Vocabulary, pair: VocabularyPair
) -> dict[str, str | None]:
    own = set(student.pieces.values())
    found: dict[str, str | None] = {}
    for token_id in seen & teacher.special:
        text, data = teacher.pieces[token_id], pair.teacher_bytes[token_id]
        found[text] = student.pieces[pair.end_id] if data == END else text if text in own else None
    return found


def _without_marks(pair: VocabularyPair) -> tuple[list[bytes], dict[int, int]]:
    """The teacher's bytes with none for special tokens that the student has, and the student's ids of those."""
    own = {one: pair.student_id_of[data] for one, data in enumerate(pair.teacher_bytes) if data in pair.student_id_of}
    return [b"" if one in own else data for one, data in enumerate(pair.teacher_bytes)], own


def _refusal(tokenizer: HuggingFaceText, problems: Sequence[str]) -> str:
    num_changed = sum(problem == CHANGED for problem in problems)
    if 2 * num_changed < len(problems):
        return (
            "most chains have tokens that do not spell their text, so nothing can be aligned with them: the vocabulary "
            "in the cache does not say which bytes its tokens stand for; use data.kind: text"
        )
    backend = json.loads(tokenizer.tokenizer.backend_tokenizer.to_str()) if tokenizer.tokenizer.is_fast else {}
    normaliser = (backend.get("normalizer") or {}).get("type", "none")
    return (
        f"the student's tokenizer (normalizer {normaliser}) does not give back the text of most chains, so its tokens "
        "cannot be aligned with the teacher's: use data.kind: text, or a student whose tokenizer keeps every byte"
    )


def _filled(targets: Targets, student_ids_S: Int32 | Int64) -> Signals:
    """`targets` as signals, with the student's own token where there is no distribution."""
    num_tokens = len(student_ids_S)
    has_none_S = targets.n_S == 0
    n_S = np.where(has_none_S, 1, targets.n_S).astype(np.int32)
    owner_N = np.repeat(np.arange(num_tokens), n_S)
    is_own_N = has_none_S[owner_N]
    ids_N, logprobs_N = np.zeros(len(owner_N), np.int32), np.zeros(len(owner_N), np.float32)
    ids_N[is_own_N] = student_ids_S[has_none_S]
    ids_N[~is_own_N] = targets.ids_N
    # Where nothing lands on a student token, the one entry that signals must have holds nothing.
    logprobs_N[~is_own_N] = np.maximum(targets.logprobs_N, -LOGPROB_RANGE_NATS)
    tail_S = np.where(has_none_S, -np.inf, targets.tail_logmass_S).astype(np.float32)
    # A token that is not among the stored ones has at most the tail's mass, and a rank after all of them.
    is_hit_N = ids_N == student_ids_S[owner_N]
    sampled_S = np.maximum(tail_S, -LOGPROB_RANGE_NATS)
    sampled_S[owner_N[is_hit_N]] = logprobs_N[is_hit_N]
    rank_S = n_S + 1
    rank_S[owner_N[is_hit_N]] = (np.arange(len(owner_N)) - (np.cumsum(n_S) - n_S)[owner_N])[is_hit_N] + 1
    prob_N, tail_mass_S = np.exp(logprobs_N.astype(np.float64)), np.exp(tail_S.astype(np.float64))
    # The limit keeps out 0 * -inf, which is nan.
    tail_nats_S = tail_mass_S * np.maximum(tail_S, -LOGPROB_RANGE_NATS)
    entropy_S = -np.bincount(owner_N, prob_N * logprobs_N, num_tokens) - tail_nats_S
    return Signals(
        topk_n_T=n_S,
        topk_ids_N=ids_N,
        topk_logprobs_N=logprobs_N,
        tail_logmass_T=tail_S,
        sampled_logprob_T=sampled_S,
        sampled_rank_T=rank_S.astype(np.int32),
        entropy_T=np.maximum(entropy_S, 0.0).astype(np.float32),
    )


def _batches(chains: Sequence[AlignedChain], signals: Signals) -> Iterator[tuple[Sequence[AlignedChain], Signals]]:
    """Chains of about BATCH_TOKENS teacher tokens with their part of `signals`."""
    ends_R = np.cumsum([len(chain.teacher_ids_T) for chain in chains])
    first = 0
    while first < len(chains):
        start = int(ends_R[first - 1]) if first else 0
        # One chain at least, however long.
        last = max(first + 1, int(np.searchsorted(ends_R, start + BATCH_TOKENS, side="right")))
        yield chains[first:last], signals.slice(start, int(ends_R[last - 1]))
        first = last


def _concatenated(parts: Sequence[Targets]) -> Targets:
    parts = parts or [_no_targets(0)]
    return Targets(*(np.concatenate([getattr(part, one.name) for part in parts]) for one in fields(Targets)))


def _no_targets(num_tokens: int) -> Targets:
    nothing, nothing_S = np.zeros(0, np.int32), np.zeros(num_tokens, np.int32)
    unknown_S = np.full(num_tokens, -np.inf, np.float32)
    return Targets(nothing_S, nothing, nothing.astype(np.float32), unknown_S, np.zeros(num_tokens, np.float32))


def _split(signals: Signals, chains: Sequence[AlignedChain]) -> list[Signals]:
    ends_R = np.cumsum([len(chain.student_ids_S) for chain in chains])
    return [
        signals.slice(int(end) - len(chain.student_ids_S), int(end)) for chain, end in zip(chains, ends_R, strict=True)
    ]


def _table(rows: Sequence[Row], codec: str) -> pa.Table:
    common_R, logprobs_R = [], []
    for chain, _, sampled_logprob_T in rows:
        is_common_S, chunk_S = np.zeros(len(chain.student_ids_S), bool), np.full(len(chain.student_ids_S), np.nan)
        if chain.alignment is not None and sampled_logprob_T is not None:
            is_common_S, chunk_S = chain.alignment.is_common_S, chunk_logprobs(chain.alignment, sampled_logprob_T)
        common_R.append(is_common_S)
        logprobs_R.append(chunk_S)
    lengths_R = np.array([len(one) for one in common_R], np.int64)
    columns = {
        "sample_id": pa.array([chain.sample_id for chain, _, _ in rows], pa.string()),
        "prompt_token_ids": pa.array([chain.prompt_ids for chain, _, _ in rows], list_of(pa.int32())),
        "token_ids": list_column(_joined([chain.student_ids_S for chain, _, _ in rows]).astype(np.int32), lengths_R),
        **encode(codec, [signals for _, signals, _ in rows]),
        IS_COMMON: list_column(_joined(common_R).astype(bool), lengths_R),
        CHUNK_LOGPROB: _nullable(_joined(logprobs_R).astype(np.float32), lengths_R),
    }
    names = [one.name for one in [*TEXT_SCHEMA, *TOKEN_FIELDS, *signal_fields(codec), *EXTRA_FIELDS]]
    return pa.Table.from_pydict({name: columns[name] for name in names})


def _nullable(values: Float32, lengths_R: Int64) -> pa.Array:
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths_R)]).astype(np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(values, mask=np.isnan(values)), type=list_of(pa.float32()))


def _joined(parts: Sequence[npt.NDArray[Any]]) -> Int64:
    """int64, or what the parts are where that is wider."""
    return np.concatenate([np.zeros(0, np.int64), *parts])
