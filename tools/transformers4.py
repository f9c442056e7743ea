"""Compares exported folders under transformers 4 and 5: `python -m tools.transformers4 FOLDER...`.

In: Hugging Face folders that `student-train init` or `export` wrote. Out: a line a folder, and exit code 1 if logits or
token ids differ. transformers 4 lives in an environment of its own, made once by uv below the user's cache folder
(`.../stillroom/transformers4-VERSION`), in about 20 seconds.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tools.setup_env import cpu_flags, fail, gpu_present, pinned_version, run, say, uv_environ

VERSION = "4.57.6"
REQUIREMENTS = (f"transformers=={VERSION}", f"torch=={pinned_version('torch')}", "numpy==2.3.5", "jinja2==3.1.6")
TOLERANCE = 1e-5
"""Relative to the largest logit: experts are summed in another order."""

READ = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
ids = torch.arange(20).unsqueeze(0) * 7 % model.config.get_text_config().vocab_size
tokens = AutoTokenizer.from_pretrained(folder)("w3 What is 2+3?")["input_ids"]
with torch.no_grad():
    print(json.dumps({"logits": model(ids, use_cache=False).logits[0].tolist(), "tokens": tokens}))
"""


def main() -> None:
    """Prints the comparison."""
    if not sys.argv[1:]:
        fail("name the folders to compare")
    python = environment()
    differences = {folder: difference(python, folder) for folder in sys.argv[1:]}
    for folder, one in differences.items():
        print(f"{folder}: {'equal' if one <= TOLERANCE else f'DIFFERENT by {one:.1e}'} under transformers {VERSION}")
    sys.exit(any(not one <= TOLERANCE for one in differences.values()))


def existing() -> Path | None:
    """The Python of an environment that an earlier call made; None without one."""
    python = _folder() / "bin" / "python"
    return python if (_folder() / ".whole").exists() else None


def environment() -> Path:
    """The Python of the environment, made now if there is none."""
    python = existing()
    if python is not None:
        return python
    folder = _folder()
    shutil.rmtree(folder, ignore_errors=True)
    own = Path(sys.prefix)
    environ = uv_environ(own)
    say(f"making {folder}")
    run([str(own / "bin" / "uv"), "venv", "--quiet", "--python", sys.executable, str(folder)], environ)
    target = [] if gpu_present() else cpu_flags(environ)
    install = [str(own / "bin" / "uv"), "pip", "install", "--quiet", "--python", str(folder / "bin" / "python")]
    run([*install, *target, *REQUIREMENTS], environ)
    (folder / ".whole").touch()
    return folder / "bin" / "python"


def difference(python: Path, folder: str) -> float:
    """Largest difference of logits, relative to the largest one; infinite if token ids differ."""
    old, new = (_read(one, folder) for one in (python, Path(sys.executable)))
    if old["tokens"] != new["tokens"]:
        return float("inf")
    pairs = [pair for rows in zip(old["logits"], new["logits"], strict=True) for pair in zip(*rows, strict=True)]
    return float(max(abs(a - b) for a, b in pairs) / max(abs(b) for _, b in pairs))


def _read(python: Path, folder: str) -> dict[str, list[list[float]]]:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(
        [str(python), "-c", READ, folder], env=environ, capture_output=True, text=True, check=False
    )
    if finished.returncode != 0:
        fail(f"{folder} cannot be read by {python}: {finished.stderr.strip().splitlines()[-1]}")
    result: dict[str, list[list[float]]] = json.loads(finished.stdout)
    return result


def _folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "stillroom" / f"transformers4-{VERSION}"


if __name__ == "__main__":
    main()
