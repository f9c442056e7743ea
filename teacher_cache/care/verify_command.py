"""What `teacher-cache verify` prints: what is wrong, what was taken out, and one line that sums up."""

from dataclasses import asdict

from shared.catalog import Catalog
from shared.config import Json
from shared.errors import DataError
from shared.storage import Location
from teacher_cache.care.quarantine import quarantine as take_out_damaged
from teacher_cache.care.quarantine import quarantine_lines
from teacher_cache.care.verify import summary_of, verify_cache


def verify_command(root: Location, *, quarantine: bool) -> tuple[Json, list[str]]:
    """Verifies and, if asked, quarantines; the result for programs and its lines for a person.

    `ok` means that nothing is wrong any more: problems that were quarantined are no longer the cache's.
    """
    report = verify_cache(root)
    lines = [f"{problem.file}: {problem.problem}" for problem in report.problems]
    summary = summary_of(report)
    is_damaged = bool(report.damages)
    step = f"teacher-cache verify {root} --quarantine takes damaged files out; the next build makes them again"
    try:
        taken = take_out_damaged(Catalog(root), report) if quarantine and report.damages else []
    except OSError as error:
        raise DataError(f"{root} cannot be written, nothing was taken out: {error}") from error
    result = asdict(report)
    del result["damages"]
    result |= {"quarantined": [asdict(one) for one in taken], "ok": report.ok}
    advice = [step] if is_damaged and not quarantine else []
    return result, [*lines, summary, *advice, *quarantine_lines(taken, root)]
