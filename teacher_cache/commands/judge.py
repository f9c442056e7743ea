"""`teacher-cache judge`: a cache, or a file of pairs."""

from pathlib import Path
from typing import Annotated

import typer

from stillroom.errors import ConfigError
from stillroom.log import note, warn
from stillroom.program import AsJson, StopRequest, print_result


def judge(
    cache: Annotated[
        str | None, typer.Argument(metavar="[CACHE]", help="Cache: a folder or s3://BUCKET/PREFIX.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--judge",
            help="Judge every chain with this judge: math, exact, regex, reasoning_gym or code. Default: the one "
            "that its prompt names.",
        ),
    ] = None,
    llm: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Ask a language model about chains that are still undecided. FILE is YAML: model, endpoint, prompt.",
        ),
    ] = None,
    where: Annotated[str | None, typer.Option(help="SQL condition on chains.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Include chains that were judged before.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Number of judge processes.")] = 1,
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="Judge this file's pairs instead of a cache: JSON Lines with judge, reference and answer. Prints one "
            "verdict per line, with its rule; pairs with `right` (true or false) also give the agreement.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check answers and add verdicts. Shards are not rewritten.

    `correct` shows a chain's newest verdict from any judge; an undecided verdict never replaces a decided one.
    """
    from dataclasses import asdict

    import teacher_cache

    if llm is not None and (kind is not None or processes != 1):
        raise ConfigError("--llm asks a language model: remove --judge and --processes")
    if pairs is not None:
        if cache is not None or where is not None or again:
            raise ConfigError("--pairs judges a file: remove CACHE, --where and --again, or remove --pairs")
        _judge_pairs(pairs, kind, llm, processes, as_json)
        return
    if cache is None:
        raise ConfigError("pass a CACHE, or a file with --pairs FILE")
    with StopRequest(at_once=True):
        report = teacher_cache.judge(cache, kind=kind, where=where, again=again, processes=processes, llm=llm)
    for warning in report.warnings():
        warn(warning)
    lines = [f"{name}: {one.line}" for name, one in report.by_judge.items()]
    if report.num_without_judge:
        lines.append(f"{report.num_without_judge} chains have no judge: choose one with --judge, or --llm")
    if report.num_not_judged:
        lines.append(f"{report.num_not_judged} chains need their own judge first: teacher-cache judge {cache}")
    print_result(asdict(report), lines or ["nothing to judge"], as_json)


def _judge_pairs(path: Path, kind: str | None, llm: Path | None, num_processes: int, as_json: bool) -> None:
    """Verdicts on stdout as JSON Lines, the agreement on stderr; with --json the agreement alone, on stdout."""
    from dataclasses import asdict

    from stillroom.judging.pairs import Agreement, agreement_lines, judge_pairs, read_pairs, verdict_line
    from stillroom.log import Progress

    if llm is None:
        found = read_pairs(path, kind)
        judged = judge_pairs(found, num_processes)
    else:
        from teacher_cache.judging.llm import llm_judge_name, load_llm_judge, opinions_on_pairs

        config = load_llm_judge(llm)
        found = read_pairs(path, llm_judge_name(config), is_model=True)
        judged = opinions_on_pairs(config, found)
    agreements: dict[str, Agreement] = {}
    with StopRequest(at_once=True), Progress("judge", len(found), "pairs") as progress:
        for number, (pair, verdict) in enumerate(judged, 1):
            agreements.setdefault(pair.judge, Agreement()).add(pair, verdict)
            if not as_json:
                print(verdict_line(pair, verdict), flush=True)
            progress.update(number, 0)
    if as_json:
        print_result({name: asdict(one) for name, one in agreements.items()}, [], as_json)
    for line in () if as_json else agreement_lines(agreements.items()):
        note(line)
