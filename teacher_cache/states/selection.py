"""Which chains get features, and where they lie: SQL condition, fraction by hash, and the teacher's own chains only.

In: a configuration and the cache. Out: chains by row group of their shards, in stored order, the unit of a pass.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa

from stillroom.cache.catalog import Catalog
from stillroom.cache.shards import open_shard, read_row_group
from stillroom.errors import ConfigError, CorruptError
from stillroom.log import format_plural, note
from stillroom.schema.manifest import Teacher
from stillroom.schema.records import Float32, Int32, stable_hash
from stillroom.sql.conditions import check_condition, in_brackets
from stillroom.sql.session import open_session
from stillroom.sql.views import quote
from teacher_cache.prompts.prompts import WorkerShare
from teacher_cache.states.config import ChainsConfig
from teacher_cache.states.engine import ChainTokens

COLUMNS = ["sample_id", "chain_id", "prompt_token_ids", "token_ids", "entropy", "sampled_logprob"]


@dataclass(frozen=True, slots=True)
class Place:
    """A chain: its row within a row group, and its lengths in tokens."""

    sample_id: str
    row: int
    num_prompt: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Unit:
    """The chosen chains of one row group of a shard; `file` is relative to the table."""

    file: str
    group: int
    places: Sequence[Place]

    def is_of(self, share: WorkerShare) -> bool:
        """Whether a worker has this unit. By hash, so that shards that come later move none to another worker."""
        return int(stable_hash("features", self.file, self.group)[:8], 16) % share.count == share.index


def choose(catalog: Catalog, config: ChainsConfig, teacher: Teacher) -> list[Unit]:
    """The chosen chains in stored order.

    Raises ConfigError if the condition is wrong or selects no chain, or if the cache holds no chain of this teacher.
    """
    runs = catalog.runs()
    own = [run_id for run_id, run in runs.items() if run.teacher.fingerprint == teacher.fingerprint]
    if not own:
        others = ", ".join(sorted({f"{run.teacher.model} ({run.teacher.fingerprint[:8]})" for run in runs.values()}))
        raise ConfigError(
            f"teacher.model: {teacher.model} ({teacher.fingerprint[:8]}) wrote no chain of {catalog.root}, whose "
            f"teachers are {others or 'none'}: features must come from the teacher that the distributions came from"
        )
    with open_session(catalog) as session:
        check_condition(session, "chains.where", config.where)
        condition = "" if config.where is None else f" AND {in_brackets(config.where)}"
        limit = "" if config.fraction == 1 else f" AND sample_id < {quote(_hash_limit(config.fraction))}"
        found = session.arrow(
            "SELECT sample_id, run_id, file, row_group, row_in_group, num_prompt_tokens, num_tokens"
            f" FROM internal.chain_rows WHERE true{condition}{limit} ORDER BY file, row_group, row_in_group"
        ).to_pylist()
    rows = [row for row in found if row["run_id"] in set(own)]
    if not rows:
        raise ConfigError(f"chains: no chain of {teacher.model} in {catalog.root} meets the condition")
    if len(rows) < len(found):
        num = format_plural(len(found) - len(rows), "chain")
        note(f"{num} of other teachers skipped")
    return [
        Unit(
            file,
            group,
            [
                Place(one["sample_id"], one["row_in_group"], one["num_prompt_tokens"], one["num_tokens"])
                for one in places
            ],
        )
        for (file, group), places in groupby(rows, lambda row: (row["file"], row["row_group"]))
    ]


def read_unit(
    catalog: Catalog, unit: Unit, places: Sequence[Place], entropy_frac: float | None
) -> Iterator[ChainTokens]:
    """Tokens of these chains of the unit, in stored order. Raises CorruptError if a row is another chain."""
    path = catalog.chains.folder / unit.file
    parquet, _ = open_shard(path)
    with parquet:
        table = read_row_group(parquet, unit.group, COLUMNS, str(path))
    # In Arrow: to_pylist would make a Python int of every token.
    table = table.take(pa.array([place.row for place in places]))
    names = table.select(["sample_id", "chain_id"]).to_pylist()
    for number, (place, row) in enumerate(zip(places, names, strict=True)):
        if row["sample_id"] != place.sample_id:
            raise CorruptError(f"{path}: row group {unit.group}: row {place.row} is not the chain {place.sample_id}")
        prompt_ids, token_ids, entropy_T, logprob_T = (
            table.column(one)[number].values.to_numpy() for one in COLUMNS[2:]
        )
        positions_P = most_uncertain(entropy_T, entropy_frac)
        yield ChainTokens(place.sample_id, row["chain_id"], prompt_ids, token_ids, positions_P, logprob_T[positions_P])


def most_uncertain(entropy_T: Float32, entropy_frac: float | None) -> Int32:
    """Rising indices of the tokens to store; of equal entropies the earlier."""
    if entropy_frac is None:
        return np.arange(len(entropy_T), dtype=np.int32)
    chosen = np.argsort(-entropy_T, kind="stable")[: num_stored(len(entropy_T), entropy_frac)]
    return np.sort(chosen).astype(np.int32)


def num_stored(num_tokens: int, entropy_frac: float | None) -> int:
    """How many tokens of a chain get features: at least one."""
    # Without the 1e-9, 0.2 of 10 tokens, 2.0000000000000004, would be 3.
    return num_tokens if entropy_frac is None else max(1, math.ceil(entropy_frac * num_tokens - 1e-9))


def _hash_limit(fraction: float) -> str:
    """Sample ids are hashes, so those below this string are that fraction of them."""
    return f"{int(fraction * 2**32):08x}"
