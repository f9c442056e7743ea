"""A cache as Python reads it: `stillroom.open_cache` returns the Cache of this module.

What `sql` may read is restricted as in `teacher-cache sql`. Chains are decoded a row group at a time, the unit that
Parquet reads.

Shape legend: R rows (chains) of a row group, T completion tokens, K candidates of a token by falling probability.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.cache.catalog import Catalog
from stillroom.cache.codec import decode, signal_columns
from stillroom.cache.features import FeatureSet
from stillroom.cache.shards import open_shard, read_row_group
from stillroom.config import nearest_name
from stillroom.errors import ConfigError, DataError, StillroomError
from stillroom.models import cached_pieces
from stillroom.schema.manifest import ShardHeader
from stillroom.schema.records import CUT_REASONS, Float32, Int32, Int64, Signals
from stillroom.schema.tables import CHAIN_FIELDS, TOKEN_FIELDS, table_schema
from stillroom.sql.conditions import check_condition, in_brackets
from stillroom.sql.session import Session
from stillroom.sql.views import WINDOW_TOKENS, quote
from stillroom.storage.objects import ObjectPath
from stillroom.storage.paths import location

if TYPE_CHECKING:
    import pandas
    import polars

SAMPLE_PREFIX = re.compile(r"^[0-9A-Za-z_\-]{1,64}$")
MAX_NAMED = 5
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

_LISTS = ("messages", "prompt_token_ids", "token_ids")
_SCALARS = [field.name for field in CHAIN_FIELDS if field not in TOKEN_FIELDS and field.name not in _LISTS]
# `chains` has the latest verdict, `shards` the place; the order lets each row group be read once.
_PLACES = """SELECT c.*, s.filename, s.file_row_number
    FROM (SELECT sample_id, correct, score, judge, rule, compared FROM chains{condition}) c
    JOIN (SELECT sample_id, filename, file_row_number FROM shards) s USING (sample_id)
    ORDER BY s.filename, s.file_row_number"""


def open_cache(
    root: str | Path | ObjectPath,
    chains_version: int | None = None,
    verdicts_version: int | None = None,
    files: Mapping[str, str | Path] | None = None,
) -> Cache:
    """Opens a cache at its latest version, or at pinned ones. Raises DataError where there is none."""
    own = {name: Path(path) for name, path in (files or {}).items()}
    return Cache(Catalog(location(root), chains_version, verdicts_version), own)


@dataclass(frozen=True, repr=False)
class Sample:
    """One chain with its decoded distributions.

    `chain` is its row of the view `chains`, `messages` the prompt, token_ids_T int32 the completion; `signals` the
    stored distributions, `header` what the shard says about them; `piece_of` the text of any single token.
    """

    chain: dict[str, Any]
    messages: Sequence[dict[str, str]]
    token_ids_T: Int32
    signals: Signals
    header: ShardHeader
    piece_of: dict[int, str]

    def __repr__(self) -> str:
        return f"Sample({self.chain['sample_id']}, {len(self.token_ids_T)} tokens, {self.chain['text'][:40]!r})"

    @property
    def pieces_T(self) -> list[str]:
        """The text of each completion token by itself."""
        return [self.piece_of[token] for token in self.token_ids_T.tolist()]

    def dense(self, k: int | None = None) -> tuple[Int32, Float32]:
        """ids_TK int32 and logprobs_TK float32 (nats) by falling probability; past a token's support id 0 and -inf.

        `k` None is the largest support the shard allows. The log mass outside the support is `signals.tail_logmass_T`.
        """
        return self.signals.dense(self.header.max_support if k is None else k)


@dataclass(frozen=True)
class RowGroup:
    """Chains of one row group: `table` has R rows of the requested columns, `signals` all their distributions.

    Row r owns tokens offsets_R[r] to offsets_R[r + 1] - 1 of the signals (int64, R + 1 entries).
    """

    table: pa.Table
    signals: Signals
    offsets_R: Int64
    header: ShardHeader

    def signals_of(self, row: int) -> Signals:
        """Distributions of one row, as views."""
        return self.signals.slice(int(self.offsets_R[row]), int(self.offsets_R[row + 1]))


class Result:
    """The answer to a query, computed each time one of its methods asks for it. Printed, it shows the first rows."""

    def __init__(self, session: Session, query: str) -> None:
        self._session, self._query = session, query
        self._relation = session.relation(query)

    def __repr__(self) -> str:
        return repr(self._relation)

    def arrow(self) -> pa.Table:
        """An Arrow table."""
        return self._session.arrow(self._query)

    def df(self) -> pandas.DataFrame:
        """A pandas DataFrame. Raises StillroomError if pandas is not installed."""
        try:
            import pandas  # noqa: F401 - pyarrow's own error does not say what to install
        except ImportError as error:
            raise _not_installed("pandas") from error
        frame: pandas.DataFrame = self.arrow().to_pandas()
        return frame

    def pl(self) -> polars.DataFrame:
        """A Polars DataFrame. Raises StillroomError if Polars is not installed."""
        try:
            import polars
        except ImportError as error:
            raise _not_installed("polars") from error
        frame = polars.from_arrow(self.arrow())
        assert isinstance(frame, polars.DataFrame)
        return frame

    def fetchall(self) -> list[tuple[Any, ...]]:
        """Rows as tuples."""
        # Not through dictionaries, which keep one of two columns of the same name.
        table = self.arrow()
        return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


class Cache:
    """An open cache; `close` it, or use it in a `with` block."""

    def __init__(self, catalog: Catalog, files: Mapping[str, Path] | None = None) -> None:
        self.catalog = catalog
        self.session = Session({"main": catalog}, files)
        self._pieces: dict[str, dict[int, str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Cache({str(self.catalog.root)!r}, chains_version={self.catalog.chains.version})"

    def close(self) -> None:
        """Ends the SQL session. Decoded samples stay usable."""
        self.session.close()

    def sql(self, query: str) -> Result:
        """The result of one SELECT over the views `chains`, `prompts`, `tokens`, `topk`, `verdicts`, ... (docs/sql.md).

        Raises ConfigError if the query is wrong or is not a SELECT.
        """
        return Result(self.session, query)

    def sample(self, sample_id: str) -> Sample:
        """The decoded chain whose `sample_id` begins with these characters. Raises DataError for none or several."""
        return next(self.samples(f"sample_id = {quote(self._find(sample_id))}"))

    def samples(self, where: str | None = None) -> Iterator[Sample]:
        """Decoded chains that meet a SQL condition over `chains`, in the order they are stored.

        Reads only row groups that hold a match, one at a time. Raises ConfigError if the condition is wrong.
        """
        check_condition(self.session, "where", where)
        for places, group in self._groups([*_SCALARS, "messages", "token_ids"], where):
            pieces = self._pieces_of(group.header.tokenizer_fingerprint)
            # Kept in Arrow: to_pylist would make a Python int of every token.
            token_ids = group.table.column("token_ids")
            rows = group.table.drop_columns(["token_ids"]).to_pylist()
            for number, (row, place) in enumerate(zip(rows, places, strict=True)):
                messages = row.pop("messages")
                tokens_T = token_ids[number].values.to_numpy()
                yield Sample(
                    chain=_chain(row, messages, place) | {"repeated_frac": repeated_frac(tokens_T)},
                    messages=messages,
                    token_ids_T=tokens_T,
                    signals=group.signals_of(number),
                    header=group.header,
                    piece_of=pieces,
                )

    def features(self, set_id: str | None = None, version: int | None = None) -> FeatureSet:
        """A feature set of the cache, by id or name; None is the only one. Raises DataError if there is none."""
        return FeatureSet.open(self.catalog, set_id, version)

    def row_groups(self, columns: Sequence[str] = ("sample_id",), where: str | None = None) -> Iterator[RowGroup]:
        """Distributions in bulk: each row group with a match, its matching rows decoded at once.

        `columns` are those of the shards (schemas/FORMAT.md), such as sample_id or token_ids. Raises ConfigError for
        others.
        """
        known = table_schema().names
        for name in columns:
            if name not in known:
                raise ConfigError(f"columns: shards have no column {name!r}{nearest_name(name, known)}")
        check_condition(self.session, "where", where)
        for _, group in self._groups(columns, where):
            yield group

    def _groups(self, columns: Sequence[str], where: str | None) -> Iterator[tuple[list[dict[str, Any]], RowGroup]]:
        """Row groups that hold matches, with the places and latest verdicts of those."""
        condition = "" if where is None else f" WHERE {in_brackets(where)}"
        # Places and verdicts only: texts come from one row group at a time, so memory does not grow with the cache.
        found = self.session.arrow(_PLACES.format(condition=condition))
        for filename, rows in groupby(found.to_pylist(), itemgetter("filename")):
            path = location(filename)
            shard, header = open_shard(path)
            with shard:
                for index, places, rows_R in _by_row_group(shard, list(rows)):
                    # decode counts tokens by token_ids, whether the caller wants that column or not.
                    needed = list(dict.fromkeys([*columns, "token_ids", *signal_columns(header)]))
                    table = read_row_group(shard, index, needed, str(path))
                    # Rows without a match need not be decoded.
                    if len(rows_R) < table.num_rows:
                        table = table.take(pa.array(rows_R))
                    signals, offsets_R = decode(table, header, f"{path}: row group {index}")
                    yield places, RowGroup(table.select(list(columns)), signals, offsets_R, header)

    def _pieces_of(self, tokenizer_fingerprint: str) -> dict[int, str]:
        """The text of every token; `<id>` for one that the cache's vocabulary does not have."""
        if tokenizer_fingerprint not in self._pieces:
            pieces, _ = cached_pieces(self.catalog.vocab_path(tokenizer_fingerprint))
            self._pieces[tokenizer_fingerprint] = _Pieces(pieces)
        return self._pieces[tokenizer_fingerprint]

    def _find(self, prefix: str) -> str:
        if not SAMPLE_PREFIX.match(prefix):
            raise DataError(f"sample {prefix!r} is not a sample id: `teacher-cache sql` lists them in chains.sample_id")
        rows = self.session.arrow(
            "SELECT DISTINCT sample_id, count(DISTINCT sample_id) OVER () AS num_found FROM shards"
            f" WHERE starts_with(sample_id, {quote(prefix)}) ORDER BY sample_id LIMIT {MAX_NAMED}"
        ).to_pylist()
        found: list[str] = [row["sample_id"] for row in rows]
        if not found:
            raise DataError(f"no sample of {self.catalog.root} begins with {prefix!r}")
        # A whole id is not ambiguous, even if longer ids begin with it.
        if len(found) > 1 and prefix not in found:
            count, first = rows[0]["num_found"], "the first " if rows[0]["num_found"] > len(rows) else ""
            raise DataError(
                f"{count} samples of {self.catalog.root} begin with {prefix!r}, {first}{', '.join(found)}: "
                "add more characters"
            )
        return prefix if prefix in found else found[0]


class _Pieces(dict[int, str]):
    # Models pad their vocabulary, so a candidate's id may be one that the tokenizer does not know.
    def __missing__(self, token: int) -> str:
        return f"<{token}>"


def readable(pieces: Sequence[str]) -> list[str]:
    """Pieces as text: a character whose bytes several tokens share appears whole at the last of them.

    Example: `["a", "<0xC3>", "<0xA9>"]` becomes `["a", "", "é"]`.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(_bytes_of(piece)) for piece in pieces]
    if texts:
        # A chain cut by its limit can end within a character: that shows as U+FFFD.
        texts[-1] += decoder.decode(b"", final=True)
    return texts


def repeated_frac(token_ids_T: Int32) -> float:
    """Share of windows of WINDOW_TOKENS tokens that occurred before in the chain, as in the view `chains`.

    Example: a loop of 100 tokens, 10 times, has 985 windows, 100 of them new: 0.9.
    """
    windows, width = token_ids_T.astype(np.uint64), 1
    while width < WINDOW_TOKENS:
        # Odd multipliers, so that no bit is lost; the shift mixes high bits into low ones.
        windows = windows[:-width] * np.uint64(0x9E3779B97F4A7C15) + windows[width:] * np.uint64(0xC2B2AE3D27D4EB4F)
        windows ^= windows >> np.uint64(29)
        width *= 2
    return 1 - len(np.unique(windows)) / len(windows) if len(windows) else 0.0


def _bytes_of(piece: str) -> bytes:
    parts = _BYTE.split(piece)
    # re.split with one group alternates text and byte values.
    return b"".join(
        bytes([int(part, 16)]) if number % 2 else part.encode("utf-8", "replace") for number, part in enumerate(parts)
    )


def _not_installed(package: str) -> StillroomError:
    return StillroomError(f"{package} is not installed: pip install 'stillroom[notebook]'")


def _chain(row: dict[str, Any], messages: list[dict[str, str]], place: dict[str, Any]) -> dict[str, Any]:
    """The row of the view `chains` from a shard's scalars and its latest verdict."""
    prompts = [message["content"] for message in messages if message["role"] == "user"]
    verdict = {name: place[name] for name in ("correct", "score", "judge", "rule", "compared")}
    return (
        row | verdict | {"prompt": prompts[-1] if prompts else None, "truncated": row["finish_reason"] in CUT_REASONS}
    )


def _by_row_group(
    shard: pq.ParquetFile, places: list[dict[str, Any]]
) -> Iterator[tuple[int, list[dict[str, Any]], Int64]]:
    """Row groups that hold some of the rows, which are ordered by their number in the file."""
    sizes = [shard.metadata.row_group(index).num_rows for index in range(shard.num_row_groups)]
    ends = np.cumsum(sizes)
    numbers = np.array([place["file_row_number"] for place in places], np.int64)
    # Row 5 of groups that end at rows 3, 6, ... is row 2 of group 1.
    group_of = np.searchsorted(ends, numbers, side="right")
    for index in np.unique(group_of):
        mine = np.flatnonzero(group_of == index)
        yield int(index), [places[number] for number in mine], numbers[mine] - (ends[index] - sizes[index])
