"""Other programs read a cache, at the newest and an older version: do all give the same probabilities?

    python -m benchmarks.readers [--json] [PROGRAM ...]

A cache is built with the fake engine in three commits, and its first shard is then removed, so that its folder holds
more than its log shows. Every Python block of docs/other_programs.md then runs in an environment of its own, made by uv
with the versions pinned below, and the exported views run in the newest duckdb program. Each gives, at both versions:
chains; candidates, sums of their probabilities and weights; tokens, sums of their top-1 probabilities and tail masses.
The first row is the SQL views. The last line is one JSON object; with --json it is the only one. Exits with 1 if a
number differs by more than 1e-6 of it.
"""

import argparse
import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from stillroom.cache.catalog import Catalog
from stillroom.sql.session import export_views, open_session
from teacher_cache.engine.fake import FakeEngine
from tests.helpers import ROOT
from tests.helpers.fake_builds import EOS_ID, VOCAB_SIZE, make_config, make_requests, run_build

PAGE = ROOT / "docs" / "other_programs.md"
PINS = {
    "chdb": "4.4.0",
    "daft": "0.7.26",
    "datafusion": "55.0.0",
    "datasets": "5.2.0",
    "deltalake": "1.6.6",
    "duckdb-cli": "1.5.6",
    "polars": "2.1.0",
    "pysail": "0.7.2",
    "ray[data]": "2.60.0",
}
"""Newest releases of the day. What is not listed (pyarrow, numpy, pandas) is what these ask for."""
NUMBERS = """SELECT t.*, k.* FROM
  (SELECT count(DISTINCT sample_id) AS chains, count(*) AS candidates, sum(prob), sum(weight) FROM topk) t,
  (SELECT count(*) AS tokens, sum(top1_prob), sum(tail_mass) FROM tokens) k"""
HARNESS = """
import json
from stillroom import arrow
def sums(table, *names):
    return [table.num_rows, *(sum(table[name].to_pylist()) for name in names)]
def numbers(chains, candidates):
    tokens = arrow.tokens(chains)
    return [chains.num_rows, *sums(candidates, "prob", "weight"), *sums(tokens, "top1_prob", "tail_mass")]
def main():
    names = {"arrow": arrow, "root": ROOT, "version": VERSION, "COLUMNS": arrow.TOKENS_COLUMNS}
    exec(BLOCK, names)
    found = [numbers(names["newest"], names["candidates"]), numbers(names["older"], arrow.topk(names["older"]))]
    print("NUMBERS " + json.dumps(found))
if __name__ == "__main__":
    main()
"""
LIMIT_S = 300
MAX_SUPPORT = 4
Numbers = list[list[float]]


def main() -> int:
    """Reads with every program and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="*", help="titles of the page's sections; default: all, and duckdb")
    parser.add_argument("--json", action="store_true", help="print the result as JSON alone")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stillroom-readers-") as name:
        root = Path(name) / "cache"
        version = write_cache(root)
        own = own_numbers(root, version)
        result: dict[str, object] = {"teacher-cache sql": own}
        for title, packages, block in blocks():
            if not arguments.programs or title in arguments.programs:
                result[title] = _read(Path(name), title, packages, block, root, version)
        if not arguments.programs or "duckdb" in arguments.programs:
            result["duckdb"] = _duckdb(Path(name), root, version)
    if not arguments.json:
        _show(result)
    print(json.dumps(result))
    return 0 if all(is_same(_numbers(found), own) for found in result.values()) else 1


def write_cache(root: Path) -> int:
    """Builds a cache of three commits with draws and removes its first file; returns the older version to read."""
    config = make_config(root, capture={"max_support": MAX_SUPPORT, "draws": 3})
    for num_prompts in (40, 80, 130):
        run_build(config, make_requests(num_prompts), _engine)
    table = Catalog(root).chains
    older = table.version - 1
    first = table.files()[0]
    table.commit([], "stillroom/readers/w0", 1, removed=[first])
    return older


def _engine() -> FakeEngine:
    # As many candidates as the support holds at most: only a token whose support is cut has draws.
    return FakeEngine(VOCAB_SIZE, MAX_SUPPORT, mean_tokens=40, eos_id=EOS_ID, draws=3)


def is_same(found: object, wanted: Numbers) -> bool:
    """Whether all numbers are equal to a millionth."""
    return isinstance(found, list) and all(
        len(mine) == len(theirs) and all(map(functools.partial(math.isclose, rel_tol=1e-6), mine, theirs))
        for mine, theirs in zip(found, wanted, strict=True)
    )


def own_numbers(root: Path, version: int) -> Numbers:
    """What `teacher-cache sql` says at the newest version and at `version`."""
    found = []
    for one in (None, version):
        with open_session(Catalog(root, one)) as session:
            found.append([float(one) for one in session.arrow(NUMBERS).to_pylist()[0].values()])
    return found


def blocks() -> Iterator[tuple[str, list[str], str]]:
    """Title, packages and code of each block of the page."""
    page = PAGE.read_text(encoding="utf-8")
    for title, code in re.findall(
        r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE
    ):
        packages, _, rest = code.removeprefix("# needs: ").partition("\n")
        yield title, packages.split(), rest


def program_of(block: str, root: Path, version: int) -> str:
    """A program that runs a block and prints the numbers of what it read."""
    values = {"ROOT": str(root), "VERSION": version, "BLOCK": block}
    return "\n".join(f"{name} = {value!r}" for name, value in values.items()) + HARNESS


def _read(folder: Path, title: str, packages: list[str], block: str, root: Path, version: int) -> dict[str, object]:
    """The numbers of one block in an environment of its own, and the versions installed there."""
    python = _install(folder / title.replace(" ", "_"), ["numpy", *packages])
    script = folder / "read.py"
    script.write_text(program_of(block, root, version), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "shared"), "HF_HOME": str(folder), "RAY_DEDUP_LOGS": "0"}
    ran = subprocess.run(
        [python, str(script)], env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    said = re.search(r"^NUMBERS (.*)$", ran.stdout, re.MULTILINE)
    numbers = json.loads(said[1]) if said else f"failed: {' '.join(ran.stderr.split())[-600:]}"
    return {"versions": _versions(python, packages), "numbers": numbers}


def _duckdb(folder: Path, root: Path, version: int) -> dict[str, object]:
    """The exported views in the newest duckdb program, whose storage is older than that of the library."""
    python = _install(folder / "duckdb", ["duckdb-cli"])
    found = []
    for one in (None, version):
        export_views({"main": Catalog(root, one)}, folder / "views.duckdb")
        ran = subprocess.run(
            [python.with_name("duckdb"), "-readonly", "-json", str(folder / "views.duckdb"), NUMBERS],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        found.append([float(one) for one in json.loads(ran.stdout)[0].values()] if ran.returncode == 0 else ran.stderr)
    return {"versions": _versions(python, ["duckdb-cli"]), "numbers": found}


def _install(folder: Path, packages: list[str]) -> Path:
    pinned = [f"{name}=={PINS[name]}" if name in PINS else name for name in packages]
    subprocess.run(["uv", "venv", "-q", "-p", sys.executable, str(folder)], check=True)
    python = folder / "bin" / "python"
    subprocess.run(["uv", "pip", "install", "-q", "--python", str(python), *pinned], check=True)
    return python


def _versions(python: Path, packages: list[str]) -> str:
    listed = subprocess.run(
        ["uv", "pip", "list", "-q", "--format", "json", "--python", str(python)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    versions = {one["name"]: one["version"] for one in json.loads(listed)}
    return ", ".join(f"{name} {versions[name]}" for name in (one.partition("[")[0] for one in packages))


def _numbers(found: object) -> object:
    return found["numbers"] if isinstance(found, dict) else found


def _show(result: dict[str, object]) -> None:
    print("| program | versions | newest: chains; candidates, prob, weight; tokens, top-1, tail | older |")
    print("|---|---|---|---|")
    for title, found in result.items():
        versions = found["versions"] if isinstance(found, dict) else "this project"
        numbers = _numbers(found)
        cells = (
            [", ".join(f"{value:.9g}" for value in one) for one in numbers]
            if isinstance(numbers, list)
            else [str(numbers), ""]
        )
        print(f"| {title} | {versions} | {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(main())
