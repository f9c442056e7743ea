"""Judges the chains of a cache: `teacher-cache judge`, by the judges that prompts name or by a language model.

In: answers and references, chosen by SQL. Out: verdicts, committed as they come.
"""

import json
from collections import Counter
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from stillroom.cache.catalog import Catalog
from stillroom.errors import ConfigError
from stillroom.judging.answers import Verdict
from stillroom.judging.judges import KINDS, NEEDS, check_kind
from stillroom.judging.opinion import question_of
from stillroom.log import Progress, format_plural
from stillroom.sql.conditions import check_condition, in_brackets, run_with
from stillroom.sql.session import Session, open_session
from stillroom.storage.paths import Location
from teacher_cache.judging.config import LlmJudgeConfig
from teacher_cache.judging.queue import LLM, Judges
from teacher_cache.writer.verdicts import JudgedSample, UncommittedVerdicts, lock_own_name

COMMIT_OPINIONS = 500
"""A language model's verdicts committed at once: fewer than others, because they cost more."""
MAX_REASONS = 3
"""Reasons of undecided verdicts that a summary lists."""

_OWN_JUDGE = f"nullif(json_extract_string(metadata, '$.judge'), '{LLM}')"


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
        judges = stack.enter_context(closing(Judges(num_processes)))
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
    Raises ConfigError for a wrong condition, and the errors of judging.llm.opinions.
    """
    from teacher_cache.judging.llm import Question, llm_judge_name, llm_judge_record, opinions

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


def _judged(session: Session, query: str, judges: Judges) -> Iterator[tuple[JudgedSample, bool]]:
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
    # Counted before the first check: the progress bar needs a total, and unknown judges are refused before any work.
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
