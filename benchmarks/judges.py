"""How often the judges agree with labels, beside plain math-verify on the same pairs.

    python -m benchmarks.judges FILE [FILE ...]

In: JSON Lines as `teacher-cache judge --pairs` reads them, with `right` (true or false). Out: a Markdown table; per
judge the share of right answers that were judged right, and of wrong ones that were not. Plain math-verify is
`verify(parse(reference), parse(answer))` with its defaults, the reference as it is and between dollars, on the pairs of
math and exact; it runs no programs.
"""

import argparse
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from stillroom.judging.answers import Verdict
from stillroom.judging.pairs import Agreement, Pair, judge_pairs, read_pairs


def plain_math_verify(pairs: Iterable[Pair], mark: str = "") -> Iterator[tuple[Pair, Verdict]]:
    """What math-verify alone says of each pair, the reference between two of `mark`."""
    from math_verify import parse, verify

    for pair in pairs:
        gold, given = parse(f"{mark}{pair.reference or ''}{mark}"), parse(pair.answer or "")
        correct = bool(verify(gold, given)) if gold else None
        yield pair, Verdict(correct, None if correct is None else float(correct))


def table_row(name: str, kind: str, judged: Iterable[tuple[Pair, Verdict]]) -> str:
    """One line of the table, with the time that it took."""
    started_s = time.perf_counter()
    agreement = Agreement()
    for pair, verdict in judged:
        agreement.add(pair, verdict)
    seconds = time.perf_counter() - started_s
    right, wrong = agreement.num_right, agreement.num_wrong
    right_frac = f"{agreement.num_right_judged_right / right:.3f}" if right else ""
    wrong_frac = f"{agreement.num_wrong_not_judged_right / wrong:.3f}" if wrong else ""
    return f"| {kind} | {name} | {right} | {right_frac} | {wrong} | {wrong_frac} | {seconds:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON Lines of labelled pairs")
    files = parser.parse_args().files
    print("| judge | by | right answers | judged right | wrong answers | not judged right | seconds |")
    print("|---|---|---|---|---|---|---|")
    pairs = [pair for file in files for pair in read_pairs(file) if pair.right is not None]
    for kind in sorted({pair.judge for pair in pairs}):
        mine = [pair for pair in pairs if pair.judge == kind]
        print(table_row("stillroom", kind, judge_pairs(mine)), flush=True)
        if kind in ("math", "exact"):
            print(table_row("math-verify", kind, plain_math_verify(mine)), flush=True)
            print(table_row("math-verify, reference in $", kind, plain_math_verify(mine, "$")), flush=True)


if __name__ == "__main__":
    main()
