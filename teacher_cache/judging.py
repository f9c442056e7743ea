"""Judges answers during a build (JudgeQueue) and on demand (`teacher-cache judge`), and commits the verdicts.

In: answers and references. Out: rows of the verdicts table, which is small and separate from the shards, so judging
again neither generates nor rewrites anything. Rows are only added, and the latest verdict of a sample counts; hence an
undecided verdict is not written over a decided one.

A program that hangs keeps a judge busy for tens of seconds, so a build never waits for one: answers queue up, and
finished verdicts are committed whenever a shard closes. Answers that do not fit into the queue, or are not judged when
the build is interrupted, have no verdict, which is how `teacher-cache judge` finds them.
"""

import datetime
import itertools
import json
import queue
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.cache.catalog import Catalog, Table, publish
from stillroom.errors import CacheConflict, ConfigError, StillroomError, one_line
from stillroom.judging.answers import Verdict
from stillroom.judging.judges import KINDS, NEEDS, check_kind, require_judge
from stillroom.judging.opinion import question_of
from stillroom.judging.process import JudgeProcess
from stillroom.log import Progress, format_plural
from stillroom.schema.records import Prompt
from stillroom.schema.tables import JUDGE_METADATA_KEY, VERDICT_SCHEMA
from stillroom.sql.conditions import check_condition, in_brackets, run_with
from stillroom.sql.session import Session, open_session
from stillroom.storage.paths import TEMP_SUFFIX, Location, spool
from teacher_cache.config import LlmJudgeConfig
from teacher_cache.writer.commit import lock_path, next_sequence, until_first, worker_lock

COMMIT_ROWS = 20_000
"""Verdicts committed at once, which is how many are judged again after a crash at most."""
COMMIT_OPINIONS = 500
"""The same for a language model's verdicts, which cost more."""
JUDGE_RUN = "judge"
"""Takes the run's place in the file names of `teacher-cache judge`."""
MAX_WAITING = 10_000
"""Answers that may wait during a build: tens of MB of text."""
POLL_S = 0.2
MAX_REASONS = 3
"""Reasons of undecided verdicts that a summary lists."""

LLM = "llm"
"""Judge of prompts whose chains wait for a language model; which one is named on the command line."""
_OWN_JUDGE = f"nullif(json_extract_string(metadata, '$.judge'), '{LLM}')"


@dataclass(frozen=True, slots=True)
class JudgedSample:
    """One row to be added to the verdicts table."""

    sample_id: str
    judge: str
    verdict: Verdict


@dataclass(slots=True)
class JudgeSummary:
    """What one judge found. `num_kept` of the undecided chains keep an earlier verdict."""

    num_chains: int = 0
    num_correct: int = 0
    num_wrong: int = 0
    num_undecided: int = 0
    num_kept: int = 0
    undecided_rules: Counter[str] = field(default_factory=Counter)
    """Why chains are undecided, such as `no reference`, and how many each."""

    def add(self, verdict: Verdict, is_kept: bool) -> None:
        """Counts one verdict; `is_kept` if an earlier one stays in place."""
        self.num_chains += 1
        if verdict.correct is None:
            self.undecided_rules[verdict.rule or "unknown"] += 1
        self.num_correct += verdict.correct is True
        self.num_wrong += verdict.correct is False
        self.num_undecided += verdict.correct is None
        self.num_kept += is_kept

    @property
    def line(self) -> str:
        """The counts for a person, with the most frequent reasons of undecided chains."""
        line = f"{self.num_chains} judged, {self.num_correct} right, {self.num_wrong} wrong, "
        reasons = ", ".join(f"{num} {rule}" for rule, num in self.undecided_rules.most_common(MAX_REASONS))
        line += f"{self.num_undecided} undecided" + (f" ({reasons})" if reasons else "")
        return line + (f"; {self.num_kept} of them keep their earlier verdict" if self.num_kept else "")


@dataclass(slots=True)
class JudgeReport:
    """What `judge_cache` did: counts by judge, and chains without one."""

    by_judge: dict[str, JudgeSummary] = field(default_factory=dict)
    num_without_judge: int = 0
    num_not_judged: int = 0
    """Chains that a language model was not asked about because their own judge was not."""

    def warnings(self) -> list[str]:
        """A line for each judge that could decide no chain."""
        return [
            f"none of {format_plural(one.num_chains, 'chain')} has what judge {name} needs ({NEEDS[name]}), or its "
            "checks timed out: " + ("earlier verdicts are kept" if one.num_kept else "the chains stay undecided")
            for name, one in self.by_judge.items()
            if one.num_undecided == one.num_chains and name in NEEDS
        ]


def judge_of(prompt: Prompt) -> str | None:
    """The kind of judge that the prompt's source asks for and a build can run."""
    kind = prompt.metadata.get("judge")
    return None if kind is None or kind == LLM else str(kind)


def require_judges(prompts: Iterable[Prompt]) -> None:
    """Raises StillroomError, before anything is generated, if a judge that prompts name cannot work here."""
    kinds = {kind for prompt in prompts if (kind := judge_of(prompt)) is not None}
    for kind in sorted(kinds):
        check_kind(kind)
        require_judge(kind)


def judge_cache(
    root: Location, kind: str | None = None, where: str | None = None, again: bool = False, num_processes: int = 1
) -> JudgeReport:
    """Judges chains of a cache and commits the verdicts as it goes.

    `kind` judges every chain with one judge, None each chain with the one that its prompt names. `where` is a SQL
    condition on the columns of `chains`. Unless `again`, chains whose latest verdict is this judge's decision are
    skipped, or with None those that have a decision and one of their own judge. An undecided verdict never replaces a
    decided one, whichever judge gave it.
    Raises ConfigError for an unknown kind or a wrong condition, StillroomError for a missing package.
    """
    if kind is not None:
        check_kind(kind)
    catalog = Catalog(root)
    report = JudgeReport()
    with open_session(catalog) as session, ExitStack() as stack:
        kinds, total = _count_pending(session, kind, where, again, report)
        if not total:
            return report
        judges = stack.enter_context(closing(_Judges(num_processes)))
        judges.prepare(kinds)
        progress = stack.enter_context(Progress("judge", total, "chains"))
        worker = lock_own_name(root, stack)
        latest = session.arrow("SELECT max(judged_at) AS latest FROM verdicts").column("latest").to_pylist()[0]
        # Commits on every exit, also after an interrupt: what was judged need not be judged again.
        pending = stack.enter_context(UncommittedVerdicts(catalog.verdicts, latest, worker))
        query = _pending_query("sample_id, answer, reference, metadata, truncated", kind, where, again)
        for sample, had_verdict in _judged(session, query, judges):
            # The latest verdict counts, so one that decides nothing must not come after one that does.
            is_kept = had_verdict and sample.verdict.correct is None
            report.by_judge.setdefault(sample.judge, JudgeSummary()).add(sample.verdict, is_kept)
            if not is_kept:
                pending.add(sample)
            progress.update(sum(summary.num_chains for summary in report.by_judge.values()), 0)
    return report


def ask_about_cache(
    root: Location, config: LlmJudgeConfig, where: str | None = None, again: bool = False
) -> JudgeReport:
    """Puts the undecided chains of a cache to a language model and commits its verdicts as they come.

    Undecided is a chain whose judge could not decide, or that has no judge. A chain is asked about once by this judge
    (model, prompt and parameters); `again` asks about every chain of `where`, decided ones included.
    Raises ConfigError for a wrong condition, and the errors of llm_judge.opinions.
    """
    from teacher_cache.llm_judge import Question, llm_judge_name, llm_judge_record, opinions

    catalog, name = Catalog(root), llm_judge_name(config)
    report = JudgeReport()
    with open_session(catalog) as session, ExitStack() as stack:
        check_condition(session, "--where", where)
        pending = _undecided_query(name, where, again)
        counts = _select(session, where, f"SELECT asked, count(*) AS n FROM ({pending}) GROUP BY asked").to_pylist()
        totals = {row["asked"]: row["n"] for row in counts}
        report.num_not_judged = totals.get(False, 0)
        if not totals.get(True):
            return report
        summary = report.by_judge.setdefault(name, JudgeSummary())
        progress = stack.enter_context(Progress("judge", totals[True], "chains"))
        worker = lock_own_name(root, stack)
        latest = session.arrow("SELECT max(judged_at) AS latest FROM verdicts").column("latest").to_pylist()[0]
        record = llm_judge_record(config)
        uncommitted = stack.enter_context(
            UncommittedVerdicts(catalog.verdicts, latest, worker, COMMIT_OPINIONS, record)
        )
        decided: set[str] = set()

        def questions() -> Generator[Question]:
            query = f"SELECT p.*, s.messages FROM ({pending}) p JOIN shards s USING (sample_id) WHERE p.asked"
            for batch in session.batches(query, rows_per_batch=256):
                for row in batch.to_pylist():
                    if row["has_verdict"]:
                        decided.add(row["sample_id"])
                    yield Question(row["sample_id"], question_of(row["messages"]), row["reference"], row["answer"])

        # Unwound in reverse: requests end, then questions, what was judged is committed, and the name is free last.
        asked = stack.enter_context(closing(questions()))
        for opinion in stack.enter_context(closing(opinions(config, asked))):
            is_kept = opinion.key in decided and opinion.verdict.correct is None
            summary.add(opinion.verdict, is_kept)
            # A refused question has no verdict, so that the next run asks it again.
            if not is_kept and not opinion.was_refused:
                uncommitted.add(JudgedSample(opinion.key, name, opinion.verdict))
            progress.update(summary.num_chains, 0)
    return report


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
        if file not in table.files():
            table.commit([file], application, next_sequence(table, application))

    until_first(table, attempt)


class JudgeQueue:
    """Judges of one build. `put`, `finished` and `wait` are for one thread, `hurry` and `close` for any."""

    def __init__(
        self,
        num_processes: int,
        max_waiting: int = MAX_WAITING,
        on_verdict: Callable[[str, bool], None] | None = None,
    ) -> None:
        """Starts no process before the first answer arrives. `on_verdict` hears at once, in a judge's thread, whether
        an answer is right; False also if nobody could tell.
        """
        self.num_left = 0
        """Answers left to `teacher-cache judge`."""
        self._max_waiting = max_waiting
        self._judges = _Judges(num_processes)
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix="judge")
        self._pending: dict[Future[JudgedSample | None], None] = {}
        self._done: deque[Future[JudgedSample | None]] = deque()
        self._hurried = False
        self._on_verdict = on_verdict or (lambda _sample_id, _correct: None)

    def put(self, sample_id: str, prompt: Prompt, answer: str | None, truncated: bool = False) -> None:
        """Queues an answer; does nothing for a prompt without a judge."""
        kind = judge_of(prompt)
        if kind is None:
            return
        if len(self._pending) >= self._max_waiting:
            # Finished verdicts that wait for their shard to close take no room.
            self._settle()
        if self._hurried or len(self._pending) >= self._max_waiting:
            self.num_left += 1
            self._on_verdict(sample_id, False)
            return
        future = self._threads.submit(
            self._judge, sample_id, kind, answer, prompt.reference, prompt.metadata, truncated
        )
        self._pending[future] = None

    def finished(self) -> list[JudgedSample]:
        """New verdicts since the last call. Raises StillroomError if a judge cannot work."""
        judged: list[JudgedSample] = []
        self._settle()
        while self._done:
            error = self._done[0].exception()
            if error is not None and judged:
                # Hand over the good verdicts first; the next call raises the error.
                break
            future = self._done.popleft()
            if error is not None:
                raise error
            verdict = future.result()
            self.num_left += verdict is None
            judged += [] if verdict is None else [verdict]
        return judged

    def wait(self) -> None:
        """Waits until everything is judged or `hurry` is called; the rest is left to `teacher-cache judge`."""
        while self._pending and not self._hurried and not all(future.done() for future in self._pending):
            time.sleep(POLL_S)
        for future in [future for future in self._pending if not future.done()]:
            future.cancel()
            del self._pending[future]
            self.num_left += 1

    def hurry(self) -> None:
        """Leaves answers that are not judged yet to `teacher-cache judge`."""
        self._hurried = True

    def close(self) -> None:
        """Ends the processes, even in the middle of a check."""
        self._hurried = True
        # Threads wait for their processes: killed in between, they need not finish their checks.
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._judges.kill()
        self._threads.shutdown(wait=True)
        self._judges.close()

    def _settle(self) -> None:
        for future in [future for future in self._pending if future.done()]:
            del self._pending[future]
            self._done.append(future)

    def _judge(
        self,
        sample_id: str,
        kind: str,
        answer: str | None,
        reference: str | None,
        metadata: Mapping[str, Any],
        truncated: bool,
    ) -> JudgedSample | None:
        if self._hurried:
            return None
        correct = None
        try:
            verdict = self._judges.judge(kind, answer, reference, metadata, truncated)
            correct = verdict.correct
        finally:
            # Also of a judge that broke: `finished` raises its error later.
            self._on_verdict(sample_id, correct is True)
        return JudgedSample(sample_id, kind, verdict)


class _Judges:
    """Judge processes that threads share. Processes, because math checks keep their time limit with SIGALRM, which
    needs a main thread, and a regular expression can backtrack forever.
    """

    def __init__(self, num_processes: int) -> None:
        self._all = [JudgeProcess() for _ in range(num_processes)]
        self._free: queue.SimpleQueue[JudgeProcess] = queue.SimpleQueue()
        for judge in self._all:
            self._free.put(judge)

    def __len__(self) -> int:
        return len(self._all)

    def prepare(self, kinds: Sequence[str]) -> None:
        for judge in self._all:
            judge.prepare(kinds)

    def judge(
        self, kind: str, answer: str | None, reference: str | None, metadata: Mapping[str, Any], truncated: bool
    ) -> Verdict:
        judge = self._free.get()
        try:
            return judge.judge(kind, answer, reference, metadata, truncated)
        finally:
            self._free.put(judge)

    def kill(self) -> None:
        """Ends running checks; their callers get an undecided verdict."""
        for judge in self._all:
            judge.kill()

    def close(self) -> None:
        for judge in self._all:
            judge.close()


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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._commit()

    def add(self, sample: JudgedSample) -> None:
        self._samples.append(sample)
        if len(self._samples) >= self._max_rows:
            self._commit()

    def _commit(self) -> None:
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


def _judged(session: Session, query: str, judges: _Judges) -> Iterator[tuple[JudgedSample, bool]]:
    """Verdicts in the order of the rows, `len(judges)` checks at a time, with one batch of rows in memory; and whether
    the chain had a decided verdict before.
    """

    def check(row: dict[str, Any]) -> tuple[JudgedSample, bool]:
        metadata = json.loads(row["metadata"])
        verdict = judges.judge(row["judge"], row["answer"], row["reference"], metadata, bool(row["truncated"]))
        return JudgedSample(row["sample_id"], row["judge"], verdict), row["has_verdict"]

    with ThreadPoolExecutor(len(judges)) as pool:
        try:
            for batch in session.batches(query, rows_per_batch=256):
                yield from pool.map(check, batch.to_pylist())
        except BaseException:
            # Leaving the pool would wait for running checks, which may take minutes.
            judges.kill()
            raise


def _count_pending(
    session: Session, kind: str | None, where: str | None, again: bool, report: JudgeReport
) -> tuple[list[str], int]:
    """The judges that are needed, and the number of chains to judge."""
    check_condition(session, "--where", where)
    query = f"SELECT judge, count(*) AS n FROM ({_pending_query('sample_id', kind, where, again)}) GROUP BY judge"
    counts = Counter({row["judge"]: row["n"] for row in _select(session, where, query).to_pylist()})
    if kind is None:
        condition = "true" if where is None else in_brackets(where)
        query = f"SELECT count(*) AS n FROM chains WHERE {condition} AND {_OWN_JUDGE} IS NULL"
        report.num_without_judge = _select(session, where, query).column("n").to_pylist()[0]
    for name in counts:
        if name not in KINDS:
            raise ConfigError(f"the cache's prompts name the unknown judge {name!r}: choose one with --judge")
    return sorted(counts), counts.total()


def _select(session: Session, where: str | None, query: str) -> pa.Table:
    return session.arrow(query) if where is None else run_with(session, "--where", where, query)


def _undecided_query(name: str, where: str | None, again: bool) -> str:
    """SELECT of the chains that a language model's judge is asked about (`asked`), and of those that wait for a judge
    of their own.
    """
    condition = "true" if where is None else in_brackets(where)
    selected = (
        "SELECT sample_id, answer, reference, chains.correct IS NOT NULL AS has_verdict,"
        f" chains.judge IS NOT NULL OR {_OWN_JUDGE} IS NULL AS was_judged FROM chains WHERE {condition}"
    )
    if again:
        return f"SELECT *, true AS asked FROM ({selected})"
    return (
        f"SELECT p.*, was_judged AS asked FROM ({selected}) p WHERE NOT has_verdict AND NOT EXISTS"
        f" (SELECT 1 FROM verdicts v WHERE v.sample_id = p.sample_id AND v.judge = '{name}')"
    )


def _pending_query(columns: str, kind: str | None, where: str | None, again: bool) -> str:
    """SELECT of the chains to judge, with the judge's name as `judge`, and `has_verdict` if the latest verdict decides.
    The condition sees the columns of `chains` only.
    """
    condition = "true" if where is None else in_brackets(where)
    judge = _OWN_JUDGE if kind is None else f"'{kind}'"
    selected = (
        f"SELECT {columns}, {judge} AS judge, chains.correct IS NOT NULL AS has_verdict, chains.judge AS latest_judge"
        f" FROM chains WHERE {condition} AND {judge} IS NOT NULL"
    )
    if again:
        return selected
    if kind is not None:
        return f"SELECT * FROM ({selected}) WHERE NOT (has_verdict AND latest_judge = judge)"
    return (
        f"SELECT p.* FROM ({selected}) p WHERE NOT has_verdict OR NOT EXISTS (SELECT 1 FROM verdicts v"
        " WHERE v.sample_id = p.sample_id AND v.judge = p.judge AND v.correct IS NOT NULL)"
    )
