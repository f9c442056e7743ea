"""English text that every installation has: docstrings of the standard library, Python's help topics, and the
descriptions and licences of the installed packages. Which packages those are moves the numbers of a run a little, so
ratios and differences within one run are what counts.
"""

import ast
import hashlib
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

MIN_CHARS = 200
"""Shorter texts say little."""
PACKAGE_TEXTS = ("METADATA", "LICENSE*", "licenses/**/*", "NOTICE*", "COPYING*")


def read_corpus(seed: int, max_chars: int) -> list[str]:
    """Different texts in random order, `max_chars` characters of them at most."""
    texts = sorted({hashlib.sha256(text.encode()).hexdigest(): text for text in _texts()}.items())
    shuffled = [text for _, text in texts]
    random.Random(seed).shuffle(shuffled)
    kept, num_chars = [], 0
    for text in shuffled:
        if num_chars >= max_chars:
            break
        kept.append(text)
        num_chars += len(text)
    return kept


def _texts() -> Iterator[str]:
    import pydoc_data.topics

    yield from pydoc_data.topics.topics.values()
    paths = sysconfig.get_paths()
    standard = Path(paths["stdlib"])
    for path in sorted(standard.rglob("*.py")):
        if "site-packages" not in path.parts and "test" not in path.parts:
            yield from _docstrings(path)
    for folder in sorted(Path(paths["purelib"]).glob("*.dist-info")):
        for pattern in PACKAGE_TEXTS:
            for path in sorted(folder.glob(pattern)):
                if path.is_file():
                    text = path.read_text(encoding="utf-8", errors="ignore")
                    if len(text) >= MIN_CHARS:
                        yield text


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            # Old modules hold escapes that newer Pythons warn of.
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None and len(text) >= MIN_CHARS:
                yield text
