"""Rows of the verdicts table: made visible, all or none, by a build or by `teacher-cache judge`.

The table is small and separate from the shards, so judging again neither generates nor rewrites anything. Rows are only
added, and the latest verdict of a sample counts; hence an undecided verdict is not written over a decided one.
"""

import datetime
import itertools
import json
import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.cache.catalog import Table, publish
from stillroom.errors import CacheConflict, StillroomError, one_line
from stillroom.judging.answers import Verdict
from stillroom.schema.tables import JUDGE_METADATA_KEY, VERDICT_SCHEMA
from stillroom.storage.paths import TEMP_SUFFIX, Location, spool
from teacher_cache.writer.commit import lock_path, next_sequence, until_first, worker_lock

COMMIT_ROWS = 20_000
"""Verdicts committed at once, which is how many are judged again after a crash at most."""
JUDGE_RUN = "judge"
"""Takes the run's place in the file names of `teacher-cache judge`."""


@dataclass(frozen=True, slots=True)
class JudgedSample:
    """One row to be added to the verdicts table."""

    sample_id: str
    judge: str
    verdict: Verdict


def commit_verdicts(
    table: Table,
    samples: Sequence[JudgedSample],
    run_id: str,
    worker: str,
    after: datetime.datetime | None = None,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Makes the verdicts visible, all or none, with a time later than `after`; `record` becomes the file's metadata.

    Raises CacheConflict if others keep committing.
    """
    if not samples:
        return
    now = datetime.datetime.now(datetime.UTC)
    if after is not None and now <= after:
        # Clocks differ or were set back, but the newest verdict must have the latest time.
        now = after + datetime.timedelta(microseconds=1)
    columns: dict[str, list[Any]] = {
        "sample_id": [sample.sample_id for sample in samples],
        "judge": [sample.judge for sample in samples],
        "correct": [sample.verdict.correct for sample in samples],
        "score": [sample.verdict.score for sample in samples],
        "judged_at": [now] * len(samples),
        "rule": [sample.verdict.rule for sample in samples],
        "compared": [sample.verdict.compared for sample in samples],
    }
    # A cache of an older version lacks `rule` and `compared`.
    table.add_columns(VERDICT_SCHEMA)
    temp = verdict_temp(table, worker)
    schema = (
        VERDICT_SCHEMA if record is None else VERDICT_SCHEMA.with_metadata({JUDGE_METADATA_KEY: json.dumps(record)})
    )
    verdicts = pa.Table.from_pydict(columns, schema=schema)
    try:
        pq.write_table(verdicts, temp, compression="zstd", write_page_checksum=True)
    except OSError as error:
        with suppress(OSError):
            temp.unlink(missing_ok=True)
        problem = f"{table.folder} cannot be written: {one_line(error)}"
        raise StillroomError(f"{problem}: fix that and judge again") from error
    commit_verdict_file(table, temp, len(samples), run_id, worker)


def verdict_temp(table: Table, worker: str) -> Path:
    """Temporary path of a file of verdicts."""
    return spool(table.folder) / f".{worker}-0.{secrets.token_hex(4)}{TEMP_SUFFIX}"


def commit_verdict_file(table: Table, temp: Path, num_rows: int, run_id: str, worker: str) -> None:
    """Makes a finished file of verdicts visible. Raises CacheConflict if others keep committing."""
    application = f"stillroom/{run_id}/{worker}"
    table.refresh()
    try:
        file = publish(temp, table.folder, f"{run_id}/{worker}-{next_sequence(table, application):06d}", num_rows)
    finally:
        temp.unlink(missing_ok=True)

    def attempt() -> None:
        table.refresh()
        # Verdicts never exclude each other, so nothing has to be dropped after another commit.
        # The commit of an earlier attempt may have gone through although its answer was lost.
        if file not in table.files():
            table.commit([file], application, next_sequence(table, application))

    until_first(table, attempt)


class UncommittedVerdicts:
    """Verdicts to be committed: every `max_rows`, and on exit however that happens."""

    def __init__(
        self,
        table: Table,
        after: datetime.datetime | None,
        worker: str,
        max_rows: int = COMMIT_ROWS,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """`record` is kept in the files' metadata: what the judge was."""
        self._table, self._after, self._worker, self._max_rows, self._record = table, after, worker, max_rows, record
        self._samples: list[JudgedSample] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._commit()

    def add(self, sample: JudgedSample) -> None:
        self._samples.append(sample)
        if len(self._samples) >= self._max_rows:
            self._commit()

    def _commit(self) -> None:
        # Emptied first: if the commit fails, __exit__ must not try the same rows again.
        samples, self._samples = self._samples, []
        commit_verdicts(self._table, samples, JUDGE_RUN, self._worker, self._after, self._record)


def lock_own_name(root: Location, stack: ExitStack) -> str:
    """The first free worker name, locked until the stack unwinds: `gc` then leaves this process's files alone, and
    several processes may judge at once.
    """
    for number in itertools.count():
        name = f"j{number}"
        try:
            stack.enter_context(worker_lock(lock_path(root, JUDGE_RUN, name), 0.0))
        except CacheConflict:
            continue
        except OSError as error:
            raise StillroomError(f"{root} cannot be written: {one_line(error)}: fix that and judge again") from error
        return name
    raise AssertionError
