"""SmolLM2-135M-Instruct in every format: size, agreement with its float32 self, and speed. Also runs every environment
for real.

    python -m benchmarks.formats [--json] [--only FORMAT ...] [--rounds N] [--threads N] [--chains N] [--eager]

The chains are those of the demo: `runs/demo/cache` where `make demo` has run, otherwise built here. Exports are kept in
runs/formats and made once. Speed is measured in two groups, each beside transformers float32, to which all ratios are:
ONNX, GGUF and OpenVINO, then what vLLM runs, its own float32 included. `decode_ratio` is at batch 1, `decode_ratio_8`
at batch 8; for vLLM's formats `..._over_own_float` is against vLLM float32 in the same rounds. The last line is one
JSON object, the only one with --json.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.demo.smollm2 import ensure_teacher
from stillroom.config import Json
from stillroom.errors import ConfigError, Disagreement, StillroomError
from stillroom.log import note
from student_train.export.bench import Load, bench, contestant
from student_train.export.formats import FORMATS
from student_train.export.writing import RECORD, Check, export_folder, weight_bytes
from student_train.model.student import use_cpu_where_there_is_no_gpu

FOLDER = Path("runs/formats")
DEMO = Path("runs/demo")
MB = 1_000_000


def main() -> None:
    """Exports what is missing, measures, prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.formats", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the JSON object only")
    parser.add_argument("--only", nargs="+", choices=list(FORMATS), help="formats; default: all that run here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--chains", type=int, default=48, help="held-out chains of the check")
    parser.add_argument("--eager", action="store_true", help="vLLM without compiling, which takes minutes on a CPU")
    arguments = parser.parse_args()
    use_cpu_where_there_is_no_gpu()
    teacher, cache = _teacher(), _cache()
    made: dict[str, Json] = {}
    for name in arguments.only or FORMATS:
        try:
            made[name] = _exported(teacher, cache, name, arguments.chains)
        except ConfigError as error:
            note(f"{name}: left out: {error}")
    table: dict[str, Json] = {"transformers": _float(teacher)}
    for runtimes in ({"onnx", "llama.cpp", "openvino"}, {"vllm"}):
        is_eager = arguments.eager and runtimes == {"vllm"}
        load = Load(rounds=arguments.rounds, threads=arguments.threads, is_eager=is_eager)
        _measure(table, teacher, {name: one for name, one in made.items() if one["runtime"] in runtimes}, load)
    if not arguments.json:
        for name, one in table.items():
            print(f"{name:14}" + "  ".join(f"{key} {value:.4g}" for key, value in one.items() if value is not None))
    print(json.dumps(table))


def _teacher() -> Path:
    found = DEMO / "teacher"
    return found if found.exists() else ensure_teacher(FOLDER / "teacher")


def _cache() -> Path:
    if (DEMO / "cache" / "runs").exists():
        return DEMO / "cache"
    cache = FOLDER / "cache"
    note(f"building {cache}, the chains of the check")
    overrides = [f"cache={cache}", f"teacher.model={_teacher()}"]
    program = str(Path(sys.executable).parent / "teacher-cache")
    command = [
        program,
        "build",
        "benchmarks/demo/teacher.yaml",
        *(part for one in overrides for part in ("--set", one)),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return cache


def _exported(teacher: Path, cache: Path, name: str, num_chains: int) -> Json:
    """What the export of a format found; one that fails the check is kept and measured too."""
    out = FOLDER / name
    if (out / RECORD).exists():
        found: Json = json.loads((out / RECORD).read_text(encoding="utf-8"))
        return found
    try:
        return export_folder(teacher, [cache], None, out, name, Check(max_chains=num_chains))
    except Disagreement as error:
        note(str(error))
        return export_folder(teacher, [cache], None, out, name, Check(num_chains, allow_disagreement=True))


def _float(teacher: Path) -> Json:
    return {"size_mb": weight_bytes(teacher) / MB, "top1_agreement": 1.0, "kl": 0.0}


def _measure(table: dict[str, Json], teacher: Path, made: dict[str, Json], load: Load) -> None:
    """Adds the formats of one group to the table."""
    if not made:
        return
    own_float = f"vllm:{teacher}"
    with_vllm = any(one["runtime"] == "vllm" for one in made.values())
    folders = [str(teacher), *([own_float] if with_vllm else []), *(str(FOLDER / name) for name in made)]
    try:
        formats = bench([contestant(folder) for folder in folders], load)["formats"]
    except StillroomError as error:
        sys.exit(f"benchmarks.formats: {error}")
    names = ["transformers", *(["vllm"] if with_vllm else []), *made]
    speeds = dict(zip(names, formats, strict=True))
    table.setdefault("transformers", {}).update(_speed(speeds["transformers"]))
    if with_vllm:
        table["vllm"] = {**_float(teacher), **_speed(speeds["vllm"])}
    for name, one in made.items():
        found = one["agreement"]
        sizes = {"size_mb": one["size_bytes"] / MB, "top1_agreement": found["top1_agreement"], "kl": found["kl"]}
        table[name] = {**sizes, **_speed(speeds[name])}
        if with_vllm:
            own = table["vllm"]
            ratios = ("prefill_ratio", "decode_ratio", "decode_ratio_8")
            table[name] |= {f"{key}_over_own_float": table[name][key] / own[key] for key in ratios}


def _speed(one: Json) -> Json:
    single, eight = one["batches"]["1"], one["batches"]["8"]
    return {
        "prefill_ratio": single["prefill_ratio"],
        "decode_ratio": single["decode_ratio"],
        "prefill_ratio_8": eight["prefill_ratio"],
        "decode_ratio_8": eight["decode_ratio"],
        "decode_tokens_per_s": single["decode_tokens_per_s"]["median"],
        "peak_memory_mb": None if one["peak_memory_bytes"] is None else one["peak_memory_bytes"] / MB,
    }


if __name__ == "__main__":
    main()
