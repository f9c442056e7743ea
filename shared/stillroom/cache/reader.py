"""A cache from Python, for notebooks and programs:

    from stillroom.cache.reader import open_cache
    cache = open_cache("runs/demo/cache")
    cache.sql("SELECT source, avg(num_tokens) FROM chains GROUP BY source").df()
    ids_TK, logprobs_TK = cache.sample("3fa1").dense(64)

Needs the base install alone: no torch. What `sql` may read is locked down as in `teacher-cache sql`.

Shape legend: T completion tokens, K candidates of a token by falling probability.
"""

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stillroom.cache.catalog import Catalog
from stillroom.cache.shards import open_shard, read_signals
from stillroom.errors import DataError
from stillroom.schema.manifest import ShardHeader
from stillroom.schema.records import Float32, Int32, Signals
from stillroom.sql.session import Session
from stillroom.sql.views import quote
from stillroom.storage.objects import ObjectPath
from stillroom.storage.paths import location, open_parquet

if TYPE_CHECKING:
    import duckdb


SAMPLE_PREFIX = re.compile(r"^[0-9A-Za-z_\-]{1,64}$")
MAX_NAMED = 5
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def open_cache(
    root: str | Path | ObjectPath, chains_version: int | None = None, verdicts_version: int | None = None
) -> "Cache":
    """Opens a cache at its latest version, or at pinned ones. Raises DataError where there is none."""
    return Cache(Catalog(location(root), chains_version, verdicts_version))


@dataclass(frozen=True)
class Sample:
    """One chain with its decoded distributions.

    `chain` is its row of the view `chains`, `messages` the prompt, token_ids_T int32 the completion; `signals` the
    stored distributions, `header` what the shard says of them; `piece_of` the text of every token, candidate and draw
    alone.
    """

    chain: dict[str, Any]
    messages: Sequence[dict[str, str]]
    token_ids_T: Int32
    signals: Signals
    header: ShardHeader
    piece_of: dict[int, str]

    @property
    def pieces_T(self) -> list[str]:
        """The text of each completion token alone."""
        return [self.piece_of[token] for token in self.token_ids_T.tolist()]

    def dense(self, k: int | None = None) -> tuple[Int32, Float32]:
        """ids_TK int32 and logprobs_TK float32 (nats) by falling probability; past a token's support id 0 and -inf.

        `k` None is the largest support that the shard allows; what lies outside the support is
        `signals.tail_logmass_T`.
        """
        return self.signals.dense(self.header.max_support if k is None else k)


class Cache:
    """An open cache; `close` it, or use it in a `with` block."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.session = Session({"main": catalog})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the SQL session; decoded samples stay usable."""
        self.session.close()

    def sql(self, query: str) -> "duckdb.DuckDBPyRelation":
        """A DuckDB relation: run when it is asked for rows, with `df()`, `pl()`, `arrow()`, `fetchall()` or printed.

        Raises ConfigError where the query is wrong or is no SELECT.
        """
        return self.session.relation(query)

    def arrow(self, query: str) -> pa.Table:
        """The result as an Arrow table. Raises ConfigError where the query is wrong or is no SELECT."""
        return self.session.arrow(query)

    def sample(self, sample_id: str) -> Sample:
        """The chain whose `sample_id` begins so, decoded. Raises DataError where none or several do."""
        found = self._find(sample_id)
        path = location(found["filename"])
        shard, header = open_shard(path)
        with shard:
            group, row = _row_group(shard, found["file_row_number"])
            table, signals, offsets = read_signals(shard, header, group, ["token_ids", "messages"], str(path))
        start, stop = int(offsets[row]), int(offsets[row + 1])
        token_ids_T = table.column("token_ids")[row].values.to_numpy()
        own = signals.slice(start, stop)
        ids = {*token_ids_T.tolist(), *own.topk_ids_N.tolist()}
        if own.draws is not None:
            ids.update(own.draws.ids_D.tolist())
        (chain,) = self.arrow(f"SELECT * FROM chains WHERE sample_id = {quote(found['sample_id'])}").to_pylist()
        return Sample(
            chain=chain,
            messages=table.column("messages")[row].as_py(),
            token_ids_T=token_ids_T,
            signals=own,
            header=header,
            piece_of=self._pieces(ids, header.tokenizer_fingerprint),
        )

    def _pieces(self, ids: set[int], tokenizer_fingerprint: str) -> dict[int, str]:
        """The text of each id; `<id>` where the cache has no vocabulary of that tokenizer."""
        pieces = {token: f"<{token}>" for token in ids}
        path = self.catalog.vocab_path(tokenizer_fingerprint)
        if path.exists():
            wanted = pa.array(sorted(ids), pa.int32())
            with open_parquet(path) as file:
                table = file.read(columns=["token_id", "piece"])
            table = table.filter(pc.is_in(table.column("token_id"), wanted))
            pieces |= dict(zip(table.column("token_id").to_pylist(), table.column("piece").to_pylist(), strict=True))
        return pieces

    def _find(self, prefix: str) -> dict[str, Any]:
        if not SAMPLE_PREFIX.match(prefix):
            raise DataError(f"sample {prefix!r} is no sample id: `teacher-cache sql` finds them in chains.sample_id")
        rows = self.arrow(
            "SELECT sample_id, filename, file_row_number, count(*) OVER () AS num_found FROM shards"
            f" WHERE starts_with(sample_id, {quote(prefix)}) ORDER BY sample_id LIMIT {MAX_NAMED}"
        ).to_pylist()
        if not rows:
            raise DataError(f"no sample of {self.catalog.root} begins with {prefix!r}")
        exact: list[dict[str, Any]] = [row for row in rows if row["sample_id"] == prefix]
        if len(rows) > 1 and not exact:
            names = ", ".join(row["sample_id"] for row in rows)
            count, first = rows[0]["num_found"], "the first " if rows[0]["num_found"] > len(rows) else ""
            raise DataError(
                f"{count} samples of {self.catalog.root} begin with {prefix!r}, {first}{names}: give more of it"
            )
        found: dict[str, Any] = (exact or rows)[0]
        return found


def readable(pieces: Sequence[str]) -> list[str]:
    """Pieces as one reads them: bytes of a character that several tokens share stand, as the character, in the last.

    Example: `["a", "<0xC3>", "<0xA9>"]` becomes `["a", "", "é"]`.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(_bytes_of(piece)) for piece in pieces]
    if texts:
        texts[-1] += decoder.decode(b"", final=True)
    return texts


def _bytes_of(piece: str) -> bytes:
    parts = _BYTE.split(piece)
    # Every second part is the number of a byte, the others are text.
    return b"".join(
        bytes([int(part, 16)]) if number % 2 else part.encode("utf-8", "replace") for number, part in enumerate(parts)
    )


def _row_group(shard: pq.ParquetFile, row_in_file: int) -> tuple[int, int]:
    """Row group of a row, and its number in it."""
    for group in range(shard.num_row_groups):
        num_rows = shard.metadata.row_group(group).num_rows
        if row_in_file < num_rows:
            return group, row_in_file
        row_in_file -= num_rows
    raise AssertionError("DuckDB numbered a row past the file's end")
