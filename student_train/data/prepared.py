"""Chains that differ from the cache's, made once and kept with the run: prompts as the student reads them, targets of
several teachers, pairs of a right and a wrong chain.

In: a selection, and what `data.mixture`, `data.prompt` and `dpo` ask for. Out: files of retokenised.py with the signal
columns of a cache, exact (`topk-f32`), which plans, streams and resumes like any other. A completion's tokens never
change, so every signal stays with its token; another cache's are found by `chain_id`.

A pair is one row: both prompts, then both completions, and `documents` says where they part (pack.py).

R chains of a row group, T tokens of one chain
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stillroom.cache.catalog import Catalog
from stillroom.cache.codec import decode, encode, signal_columns
from stillroom.cache.columns import list_column
from stillroom.cache.shards import open_shard
from stillroom.config import Json
from stillroom.errors import ConfigError, CorruptError, one_line
from stillroom.schema import FORMAT_VERSION
from stillroom.schema.manifest import SHARD_METADATA_KEY, ShardHeader
from stillroom.schema.records import Int32, Int64, Signals, chain_id_of, stable_hash
from stillroom.schema.tables import TOKEN_FIELDS, list_of, signal_fields
from stillroom.sql.conditions import in_brackets, run_with
from stillroom.sql.session import open_session
from stillroom.storage.paths import Location, location
from student_train.data.freezing import SelectionRequest, check_request, open_selection
from student_train.data.lookup import ChainIndex, prompt_keys
from student_train.data.mixture import mix
from student_train.data.retokenised import DOCUMENTS, Counts, read_groups, retokenise, write_retokenised
from student_train.data.selection import Prepared, Selection, UInt64, keys_of, load_selection

if TYPE_CHECKING:
    from student_train.config.data import DataConfig, MixtureConfig, PromptConfig
    from student_train.config.run import StudentConfig

VERSION = 1
"""Of all code that decides rows: files of another version are made again."""
CODEC = "topk-f32"
COLUMNS = ("sample_id", "chain_id", "messages", "prompt_token_ids", "token_ids")
KEPT_GROUPS = 4
PREPARED_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("prompt_token_ids", list_of(pa.int32()), nullable=False),
        pa.field("token_ids", list_of(pa.int32()), nullable=False),
        pa.field("chain_id", pa.string(), nullable=False),
        pa.field(DOCUMENTS, list_of(pa.int32()), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Pairing:
    """Pairs right chains with the wrong ones that `negatives` holds, of the same prompt."""

    negatives: Selection
    pack_tokens: int
    """Both chains of a pair, prompts included, have at most this many tokens together."""
    max_tokens: int | None
    """Each chain of a pair has at most this many."""


def open_prepared_selection(
    path: Path, request: SelectionRequest, data: DataConfig, student: StudentConfig, pairing: Pairing | None
) -> Selection:
    """The prepared selection kept at `path`, or a new one: frozen, then prepared into a folder beside it.

    Goes on where an interrupted call stopped. Raises ConfigError where `path` answers another request or settings.
    """
    identity = stable_hash(
        "prepared",
        VERSION,
        None if data.mixture is None else data.mixture.model_dump(mode="json"),
        None if data.prompt is None else data.prompt.model_dump(mode="json"),
        None if pairing is None else [pairing.negatives.header.hash, pairing.pack_tokens, pairing.max_tokens],
    )
    if path.exists():
        selection = load_selection(path, [one.root for one in request.sources])
        check_request(path, selection.header, request)
        if selection.header.prepared is None or selection.header.prepared.identity != identity:
            raise ConfigError(
                f"{path} was prepared with other settings of data.mixture, data.prompt or dpo: choose another run "
                "folder"
            )
        return selection
    # Kept, so that a call that resumes finds the same chains in a cache that has grown.
    source = open_selection(path.with_name(f"{path.stem}.source.parquet"), request)
    maker = PreparedRows(source, data, student, pairing, identity)
    made = retokenise(path, source, maker)
    counts = made.counts
    header = {
        "prepared": Prepared(
            identity=identity,
            num_rewritten=int(counts["rewritten"]),
            num_reached=int(counts["reached"]),
            num_mixed=int(counts["mixed"]),
            num_pairs=int(counts["pairs"]),
            num_unpaired=int(counts["unpaired"]),
        ),
        "codecs": [CODEC],
        "template_fingerprints": source.header.template_fingerprints,
        "max_support": maker.limits.max_support,
        "draws": source.header.draws if data.mixture is None else maker.limits.draws,
        "vocab_size": maker.limits.vocab_size,
        "temperatures": [] if data.mixture is not None else source.header.temperatures,
    }
    missing = "a teacher of weight above 0", "raise a weight in data.mixture, or select others"
    if pairing is not None:
        missing = "a partner", "dpo needs a right and a wrong chain of one prompt that fit a pack together"
    return write_retokenised(path, source, made, header, *missing)


@dataclass(frozen=True, slots=True)
class _Chain:
    sample_id: str
    chain_id: str
    prompt_ids: Int32
    token_ids: Int32
    signals: Signals


@dataclass(frozen=True, slots=True)
class _Limits:
    """Most draws and most stored ids that a token has, and what every id is below."""

    draws: int
    max_support: int
    vocab_size: int


class PreparedRows:
    """Makes rows of chains, or of pairs of chains."""

    verb = "prepare"
    folder_suffix = "prepared"
    columns = COLUMNS
    with_signals = True

    def __init__(
        self, source: Selection, data: DataConfig, student: StudentConfig, pairing: Pairing | None, identity: str
    ) -> None:
        self._source, self._pairing = source, pairing
        self._mixture = None if data.mixture is None else _Mixture(source, data.mixture)
        # An interrupted call keeps its files only if the teachers have scored nothing since.
        versions = [] if self._mixture is None else self._mixture.versions
        self.identity = (identity, source.header.hash, versions)
        self._prompts = None if data.prompt is None else _Prompts(source, data.prompt, student)
        # One path a file: its first row group stands for it.
        own = _limits_of(source.path_of(int(group)) for group in np.unique(source.file_G, return_index=True)[1])
        # Draws that not every shard holds are dropped; a shard may hold more than the fewest.
        own = replace(own, draws=own.draws if source.header.draws else 0)
        self.limits = own if self._mixture is None else self._mixture.limits(own)
        self._partner_of = {} if pairing is None else _partners(source, pairing.negatives)
        # Partners lie in other row groups, of which the last few stay decoded. Weak: in a cycle with its cache this
        # would outlive its last use.
        decode_group = functools.partial(type(self)._decode, weakref.proxy(self))
        self._decoded = functools.lru_cache(KEPT_GROUPS)(decode_group)

    def prepare(self) -> None:
        """Nothing: what all chains need is known."""

    def metadata(self, header: ShardHeader) -> dict[bytes, bytes]:
        """A shard's header, by which the rows are decoded."""
        changed: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "codec": CODEC,
            "max_support": self.limits.max_support,
            "draws": self.limits.draws,
            "vocab_size": self.limits.vocab_size,
            "temperatures": self._source.header.temperatures if self._mixture is None else [],
        }
        return {SHARD_METADATA_KEY: header.model_copy(update=changed).model_dump_json().encode()}

    def schema(self, header: ShardHeader) -> pa.Schema:
        """Tokens, chain_id, documents and exact signals."""
        return pa.schema([*PREPARED_SCHEMA, *TOKEN_FIELDS, *signal_fields(CODEC)])

    def make(self, table: pa.Table, header: ShardHeader, where: str) -> tuple[pa.Table, Counts]:
        """Rows of the chains that have a teacher, and a partner where pairs are asked for."""
        counts: Counts = dict.fromkeys(("mixed", "reached", "rewritten", "pairs", "unpaired"), 0)
        chains = [chain for chain in self._chains(table, header, where, counts) if chain is not None]
        rows: list[list[_Chain]] = [[chain] for chain in chains]
        if self._pairing is not None:
            rows = [pair for chain in chains if (pair := self._pair(chain)) is not None]
            counts["pairs"] = len(rows)
            # Over all row groups, a pair takes a right and a wrong chain.
            counts["unpaired"] = len(chains) - 2 * len(rows)
        schema = self.schema(header)
        return _table(rows).select(schema.names).cast(schema), counts

    def _chains(self, table: pa.Table, header: ShardHeader, where: str, counts: Counts) -> list[_Chain | None]:
        """Every chain of a table; None where no teacher of weight knows it."""
        signals, offsets = decode(table, header, where)
        chain_ids = table.column("chain_id").to_pylist()
        sample_ids = table.column("sample_id").to_pylist()
        prompts = [np.asarray(ids, np.int32) for ids in table.column("prompt_token_ids").to_pylist()]
        tokens = [np.asarray(ids, np.int32) for ids in table.column("token_ids").to_pylist()]
        if self._source.header.draws == 0:
            signals = replace(signals, draws=None)
        signals = replace(signals, log_partitions_TS=self._partitions(signals, header))
        parts: list[Signals | None] = [
            signals.slice(start, stop) for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
        ]
        if self._mixture is not None:
            parts = self._mixture.mixed(table, parts, counts)
        if self._prompts is not None:
            rendered = self._prompts.render(table.column("messages").to_pylist(), header.run_id)
            counts["rewritten"] += sum(not np.array_equal(a, b) for a, b in zip(prompts, rendered, strict=True))
            prompts = rendered
            chain_ids = [chain_id_of(a.tolist(), b.tolist()) for a, b in zip(prompts, tokens, strict=True)]
        return [
            None if part is None else _Chain(sample_id, chain_id, prompt_ids, token_ids, part)
            for sample_id, chain_id, prompt_ids, token_ids, part in zip(
                sample_ids, chain_ids, prompts, tokens, parts, strict=True
            )
        ]

    def _partitions(self, signals: Signals, header: ShardHeader) -> npt.NDArray[np.float32] | None:
        """Those of the temperatures that every shard of the selection has."""
        kept = [header.temperatures.index(one) for one in self._source.header.temperatures]
        if self._mixture is not None or not kept or signals.log_partitions_TS is None:
            return None
        return signals.log_partitions_TS[:, kept]

    def _pair(self, right: _Chain) -> list[_Chain] | None:
        """The chain and its wrong partner, where it has one and both fit a pack."""
        assert self._pairing is not None
        row = self._partner_of.get(right.sample_id[:16])
        wrong = None if row is None else self._chain(row)
        if wrong is None:
            return None
        lengths = [len(one.prompt_ids) + len(one.token_ids) for one in (right, wrong)]
        limit = self._pairing.max_tokens or self._pairing.pack_tokens
        return None if sum(lengths) > self._pairing.pack_tokens or max(lengths) > limit else [right, wrong]

    def _chain(self, row: int) -> _Chain | None:
        """Chain number `row` of the source."""
        return self._decoded(int(self._source.group_R[row]))[row]

    def _decode(self, group: int) -> dict[int, _Chain | None]:
        """The chains of a row group, by number in the source."""
        shard, header = open_shard(self._source.path_of(group))
        shard.close()
        columns = list(dict.fromkeys([*COLUMNS, *signal_columns(header)]))
        ((_, table),) = read_groups(self._source, [group], columns)
        ignored: Counts = dict.fromkeys(("mixed", "reached", "rewritten"), 0)
        chains = self._chains(table, header, self._source.where(group), ignored)
        rows = np.flatnonzero(self._source.group_R == group).tolist()
        return dict(zip(rows, chains, strict=True))


class _Mixture:
    """The teachers of `data.mixture`, and each one's weight of each chain."""

    def __init__(self, source: Selection, config: MixtureConfig) -> None:
        self._tokenizer = source.header.tokenizer_fingerprints[0]
        own = [
            Catalog(folder.parent, cache.chains_version, cache.verdicts_version)
            for folder, cache in zip(source.folders, source.header.caches, strict=True)
        ]
        self._own = _Weights(own, config.own, "data.mixture.own")
        catalogs = [Catalog(teacher.path) for teacher in config.teachers]
        # Weights in SQL may read verdicts.
        self.versions = [(catalog.chains.version, catalog.verdicts.version) for catalog in catalogs]
        self._others = [
            (ChainIndex(catalog), _Weights([catalog], teacher.weight, f"data.mixture.teachers.{number}.weight"))
            for number, (catalog, teacher) in enumerate(zip(catalogs, config.teachers, strict=True))
        ]
        self._limits = [
            _limits_of(catalog.chains.path_of(file) for file in catalog.chains.files()) for catalog in catalogs
        ]

    def limits(self, own: _Limits) -> _Limits:
        """A token keeps as many draws as its teachers have together, and a support that is the union of theirs."""
        every = [own, *self._limits]
        return _Limits(
            sum(one.draws for one in every),
            sum(one.max_support for one in every),
            # Models of one tokenizer may pad their logits to different widths.
            max(one.vocab_size for one in every),
        )

    def mixed(self, table: pa.Table, parts: Sequence[Signals | None], counts: Counts) -> list[Signals | None]:
        """The mixture of each chain of a table whose own signals are `parts`; None without a teacher of weight."""
        keys_R = keys_of(table.column("chain_id"), "a row group")
        found: list[list[tuple[Signals, float]]] = [
            [(part, weight)] if part is not None and weight > 0 else []
            for part, weight in zip(parts, self._own.of(keys_R), strict=True)
        ]
        num_tokens = [len(ids) for ids in table.column("token_ids").to_pylist()]
        is_reached = [False] * len(found)
        for index, weights in self._others:
            weight_R = np.array(weights.of(keys_R))
            # Where a teacher has no weight, its shards are not read.
            places_R = np.where(weight_R > 0, index.find(keys_R), -1)
            for rows, signals in self._read(index, places_R, num_tokens):
                found[rows].append((signals, float(weight_R[rows])))
                is_reached[rows] = True
        counts["reached"] += sum(is_reached)
        counts["mixed"] += sum(len(one) > 1 for one in found)
        # By the chain, so that the same chain resamples alike wherever it is read.
        return [
            None if not one else one[0][0] if len(one) == 1 else _mixed(one, int(key))
            for one, key in zip(found, keys_R, strict=True)
        ]

    def _read(self, index: ChainIndex, places_R: Int64, num_tokens: Sequence[int]) -> list[tuple[int, Signals]]:
        read = []
        for part in index.read(places_R, lambda header: ["token_ids", *signal_columns(header)]):
            if part.header.tokenizer_fingerprint != self._tokenizer:
                raise ConfigError(
                    f"data.mixture: {index.root} has another tokenizer than the selected chains, so the same ids mean "
                    "other tokens"
                )
            signals, offsets = decode(part.table, part.header, part.where)
            bounds = zip(part.rows.tolist(), offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
            for row, start, stop in bounds:
                if stop - start != num_tokens[row]:
                    raise CorruptError(
                        f"{part.where} holds a chain with {stop - start} tokens, which has {num_tokens[row]} in "
                        "another cache"
                    )
                read.append((row, replace(signals.slice(start, stop), log_partitions_TS=None)))
        return read


def _mixed(found: Sequence[tuple[Signals, float]], seed: int) -> Signals:
    return mix([one for one, _ in found], [weight for _, weight in found], np.random.default_rng(seed))


class _Weights:
    """A number, or a SQL expression, for each chain of caches."""

    def __init__(self, catalogs: Sequence[Catalog], weight: float | str, key: str) -> None:
        """Raises ConfigError for SQL that DuckDB refuses, and for weights below 0."""
        self._constant = weight if not isinstance(weight, str) else None
        self._keys: UInt64 = np.zeros(0, np.uint64)
        self._values = np.zeros(0, np.float64)
        if isinstance(weight, str):
            tables = [_weights_of(catalog, weight, key) for catalog in catalogs]
            keys = np.concatenate([keys_of(one.column("chain_id"), key) for one in tables])
            values = np.concatenate([one.column("weight").to_numpy() for one in tables])
            order = np.argsort(keys, kind="stable")
            # NULL has no weight; infinity stays, to be refused.
            self._keys, self._values = keys[order], np.where(np.isnan(values), 0.0, values)[order]
        given = self._values if self._constant is None else np.array([self._constant])
        if len(bad := given[~(np.isfinite(given) & (given >= 0))]):
            raise ConfigError(f"{key} {weight!r} is {bad[0]:g} for a chain: weights must be finite and at least 0")

    def of(self, keys_R: UInt64) -> list[float]:
        """One for each chain; 0 where it is not known."""
        if self._constant is not None:
            return [self._constant] * len(keys_R)
        if not len(self._keys):
            return [0.0] * len(keys_R)
        places = np.minimum(np.searchsorted(self._keys, keys_R), len(self._keys) - 1)
        found: list[float] = np.where(self._keys[places] == keys_R, self._values[places], 0.0).tolist()
        return found


def _weights_of(catalog: Catalog, weight: str, key: str) -> pa.Table:
    with open_session(catalog) as session:
        query = f"SELECT chain_id, CAST({in_brackets(weight)} AS DOUBLE) AS weight FROM chains"
        return run_with(session, key, weight, query)


def _limits_of(paths: Iterable[Location]) -> _Limits:
    limits = _Limits(0, 0, 0)
    for path in paths:
        shard, header = open_shard(path)
        shard.close()
        limits = _Limits(
            max(limits.draws, header.draws),
            max(limits.max_support, header.max_support),
            max(limits.vocab_size, header.vocab_size),
        )
    return limits


class _Prompts:
    """Prompts as the student reads them."""

    def __init__(self, source: Selection, config: PromptConfig, student: StudentConfig) -> None:
        from student_train.exporting import cache_tokenizer

        self._config = config
        self._tokenizer = cache_tokenizer(student, source, None)
        self._arguments = template_arguments(source)

    def render(self, conversations: Sequence[Sequence[Mapping[str, str]]], run_id: str) -> list[Int32]:
        """Token ids, the assistant's turn opened. Raises ConfigError where the template refuses a prompt."""
        given = self._arguments.get(run_id, {})
        return [
            np.asarray(ids, np.int32) for ids in render_prompts(self._tokenizer, self._config, conversations, given)
        ]


def template_arguments(selection: Selection) -> dict[str, Json]:
    """The arguments that each run of the selection's caches gave the chat template."""
    roots = [location(cache.root) for cache in selection.header.caches]
    return {run_id: run.chat_template_kwargs for root in roots for run_id, run in Catalog(root).runs().items()}


def render_prompts(
    tokenizer: Any,
    config: PromptConfig,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    given: Mapping[str, Any],
) -> list[list[int]]:
    """Token ids of conversations without what `config` takes away; `given` are the teacher's arguments of the template,
    which stay unless `config` sets them. Raises ConfigError.
    """
    from jinja2 import TemplateError

    chats = [_without(messages, config) for messages in conversations]
    if not all(chats):
        raise ConfigError("data.prompt removes every message of a prompt: remove fewer")
    try:
        encoded = tokenizer.apply_chat_template(
            chats,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            **{**given, **config.chat_template_kwargs},
        )
    except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ConfigError(f"data.prompt: the chat template rejects a prompt: {one_line(error)}") from error
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _without(messages: Sequence[Mapping[str, str]], config: PromptConfig) -> list[dict[str, str]]:
    kept = []
    for message in messages:
        content = message["content"]
        for text in config.remove:
            content = content.replace(text, "")
        # What was joined to the question by blank lines leaves none behind.
        content = content.strip() if content != message["content"] else content
        if not (config.drop_system and message["role"] == "system") and (content or content == message["content"]):
            kept.append({"role": message["role"], "content": content})
    return kept


def _partners(source: Selection, negatives: Selection) -> dict[str, int]:
    """Row of the wrong chain for the first 16 digits of the sample id of a right one; each chain is in one pair."""
    prompts_R = prompt_keys(source)
    is_wrong_R = np.isin(source.key_R, negatives.key_R)
    waiting: dict[int, list[int]] = {}
    # By hash, so that a pair does not depend on the order of files.
    order = np.argsort(source.key_R, kind="stable").tolist()
    for row in order:
        if is_wrong_R[row]:
            waiting.setdefault(int(prompts_R[row]), []).append(row)
    partner_of = {}
    for row in order:
        if not is_wrong_R[row] and (rows := waiting.get(int(prompts_R[row]))):
            partner_of[f"{int(source.key_R[row]):016x}"] = rows.pop(0)
    return partner_of


def _table(rows: Sequence[Sequence[_Chain]]) -> pa.Table:
    """A row of one chain, or of two."""
    lengths = [[n for one in row for n in (len(one.prompt_ids), len(one.token_ids))] for row in rows]
    columns: dict[str, Any] = {
        "sample_id": pa.array([row[0].sample_id for row in rows], pa.string()),
        "prompt_token_ids": _lists([np.concatenate([one.prompt_ids for one in row]) for row in rows]),
        "token_ids": _lists([np.concatenate([one.token_ids for one in row]) for row in rows]),
        "chain_id": pa.array([row[0].chain_id for row in rows], pa.string()),
        DOCUMENTS: _lists([np.array(one, np.int32) for one in lengths]),
        **encode(CODEC, [Signals.concat([one.signals for one in row]) for row in rows]),
    }
    return pa.Table.from_pydict(columns)


def _lists(rows: Sequence[Int32]) -> pa.Array:
    flat = np.concatenate([np.zeros(0, np.int32), *rows])
    return list_column(flat, np.array([len(row) for row in rows], np.int64))
