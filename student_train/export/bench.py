"""`student-train bench`: the speed of one student in several formats, each in its own runtime, in one run.

Rounds go in turns (A B C, A B C, ...), so that other programs' load falls on all alike. Each round generates once with
one new token and once with all of them: the first time is the prefill and the first token, the difference the decoding.
Figures are medians over rounds with their quartiles, ratios are those of a median to the first folder's.

    B requests of a batch, P prompt tokens, G generated tokens
"""

import contextlib
import json
import os
import random
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stillroom.config import Json
from stillroom.errors import ConfigError, DataError, StillroomError
from stillroom.log import Progress, note
from stillroom.models import model_settings
from student_train.export.energy import EnergyMeter
from student_train.export.formats import RUNTIMES
from student_train.export.worker import RuntimeWorker
from student_train.export.writing import RECORD, positions_of, weight_bytes
from student_train.model.shape import tensor_shapes

BATCHES = (1, 8)
MEASURES = ("prefill_tokens_per_s", "decode_tokens_per_s", "first_token_ms", "request_ms")
MAX_ATTEMPTS = 5
READ_THE_SAME_FOLDERS = {"transformers", "vllm"}
NUM_IDS = 200
"""Prompts are drawn from this many token ids: vocabularies may be cut to what a cache uses."""


@dataclass(frozen=True)
class Load:
    """What is generated. `threads` None leaves their number to each runtime."""

    prompt_tokens: int = 128
    new_tokens: int = 32
    rounds: int = 5
    threads: int | None = None
    is_eager: bool = False
    """vLLM without compiling: it starts in seconds instead of minutes."""
    seed: int = 0


@dataclass(frozen=True)
class Contestant:
    """A folder and what runs it; `record` is what its export found, None for a float folder."""

    name: str
    folder: Path
    runtime: str
    record: Json | None
    is_float: bool = False
    """Whether it is what exports are compared with. Without a record, another folder's agreement is unknown."""


def contestant(text: str) -> Contestant:
    """Of a folder, or RUNTIME:FOLDER for another runtime than the format's own. Raises ConfigError, DataError."""
    runtime, _, rest = text.partition(":")
    folder = Path(text)
    if not folder.exists() and rest:
        if runtime not in RUNTIMES:
            raise ConfigError(f"{text}: {runtime!r} is not a runtime: choose one of {', '.join(RUNTIMES)}")
        folder = Path(rest)
    else:
        runtime = ""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: use one that `student-train export` wrote")
    tensor_shapes(folder)
    record = None
    if (folder / RECORD).exists():
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    own = record["runtime"] if record is not None else _runtime_of(folder)
    name = f"{record['format'] if record is not None else folder.name}"
    if runtime and runtime != own and not {runtime, own} <= READ_THE_SAME_FOLDERS:
        raise ConfigError(f"{text}: {folder} is for {own}, which {runtime} cannot read: leave {runtime}: out")
    is_float = record is None and own == "transformers"
    return Contestant(f"{name} in {runtime}" if runtime else name, folder, runtime or own, record, is_float)


def _runtime_of(folder: Path) -> str:
    """What runs a folder that no export of ours described."""
    if (folder / "genai_config.json").exists():
        return "onnx"
    if (folder / "openvino_model.xml").exists():
        return "openvino"
    if any(folder.glob("*.gguf")):
        return "llama.cpp"
    if not (folder / "config.json").exists():
        raise DataError(f"{folder} holds no model: neither config.json nor GGUF, ONNX or OpenVINO files")
    return "vllm" if "quantization_config" in model_settings(folder) else "transformers"


def _require_room(folder: Path, num_tokens: int) -> None:
    """Raises ConfigError if a request is longer than the folder's model."""
    longest = positions_of(folder) if (folder / "config.json").exists() else None
    if longest is not None and num_tokens > longest:
        raise ConfigError(
            f"{folder} has room for {longest:,} tokens and a request has {num_tokens:,}: lower --prompt-tokens or "
            "--new-tokens"
        )


def bench(contestants: Sequence[Contestant], load: Load) -> Json:
    """Measures all of them; memory holds them all at once. Raises StillroomError where a runtime fails."""
    names = _told_apart(contestants)
    if load.is_eager and "vllm" not in [one.runtime for one in contestants]:
        raise ConfigError("--eager has no effect: vLLM runs none of these folders")
    for one in contestants:
        _require_room(one.folder, load.prompt_tokens + load.new_tokens)
    draws = random.Random(load.seed)
    prompts = [[draws.randrange(1, NUM_IDS) for _ in range(load.prompt_tokens)] for _ in range(max(BATCHES))]
    with contextlib.ExitStack() as stack:
        workers = []
        for one in contestants:
            note(f"loading {one.name.removesuffix(f' in {one.runtime}')} in {one.runtime}")
            made = RuntimeWorker(one.runtime, one.folder, load.threads, is_quick=load.is_eager)
            workers.append(stack.enter_context(made))
        rounds = _rounds(workers, names, prompts, load)
        memory = [worker.peak_memory_bytes() for worker in workers]
        results = [
            {
                "name": names[number],
                "folder": str(one.folder),
                "runtime": one.runtime,
                "size_bytes": weight_bytes(one.folder),
                "load_s": worker.load_s,
                "peak_memory_bytes": peak,
                "is_float": one.is_float,
                "agreement": None if one.record is None else one.record["agreement"],
                "batches": {str(batch): _summary(rounds, number, batch) for batch in BATCHES},
                "versions": worker.versions,
            }
            for number, (one, worker, peak) in enumerate(zip(contestants, workers, memory, strict=True))
        ]
    return {
        "prompt_tokens": load.prompt_tokens,
        "new_tokens": load.new_tokens,
        "rounds": load.rounds,
        "threads": load.threads,
        "num_cores": len(os.sched_getaffinity(0)),
        "is_eager": load.is_eager,
        "formats": results,
    }


Sample = dict[str, float | None]
"""The measures of one turn."""


def _rounds(
    workers: Sequence[RuntimeWorker], names: Sequence[str], prompts: list[list[int]], load: Load
) -> list[dict[tuple[int, int], Sample]]:
    """Of each round the sample of every (worker, batch)."""
    meter = EnergyMeter()
    rounds: list[dict[tuple[int, int], Sample]] = []
    for worker in workers:
        for batch in BATCHES:
            # Kernels are chosen, caches filled.
            worker.generate(prompts[:batch], 2)
    with Progress("bench", load.rounds * len(workers), "turns") as progress:
        for number in range(load.rounds):
            found = {}
            for place, worker in enumerate(workers):
                for batch in BATCHES:
                    found[place, batch] = _turn(worker, prompts[:batch], load.new_tokens, meter)
                progress.update(number * len(workers) + place + 1, 0, {"": names[place]})
            rounds.append(found)
    return rounds


def _turn(worker: RuntimeWorker, prompts: list[list[int]], num_new: int, meter: EnergyMeter) -> Sample:
    for _ in range(MAX_ATTEMPTS):
        first_s, _ = worker.generate(prompts, 1)
        before_j = meter.read_j()
        whole_s, _ = worker.generate(prompts, num_new)
        after_j = meter.read_j()
        # Noise can make the short call the longer one.
        if (decode_s := whole_s - first_s) > 0:
            break
    else:
        raise StillroomError(
            f"{num_new} tokens took no longer than the first one, {MAX_ATTEMPTS} times: other programs disturb this, "
            "raise --new-tokens"
        )
    num_prompt = sum(map(len, prompts))
    energy_j = None if before_j is None or after_j is None else (after_j - before_j) / (len(prompts) * num_new)
    return {
        "prefill_tokens_per_s": num_prompt / first_s,
        "decode_tokens_per_s": len(prompts) * (num_new - 1) / decode_s,
        "first_token_ms": 1000 * first_s,
        "request_ms": 1000 * whole_s,
        "energy_j_per_token": energy_j,
    }


def _summary(rounds: Sequence[dict[tuple[int, int], Sample]], place: int, batch: int) -> Json:
    """Median and quartiles of each measure, and the ratio of its median to the first worker's."""
    summary: Json = {
        name: _spread(found[place, batch][name] for found in rounds) for name in (*MEASURES, "energy_j_per_token")
    }
    for name in ("prefill", "decode"):
        key = f"{name}_tokens_per_s"
        first = _spread(found[0, batch][key] for found in rounds)
        assert first is not None
        # Not the median of the rounds' own ratios, which is not what a reader finds who divides the figures shown.
        summary[f"{name}_ratio"] = summary[key]["median"] / first["median"]
    return summary


def _spread(values: Iterable[float | None]) -> Json | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    low, median, high = statistics.quantiles(known, n=4, method="inclusive") if len(known) > 1 else known * 3
    return {"median": median, "low": low, "high": high}


def choose(result: Json, max_ms: float, min_agreement: float) -> str | None:
    """The format that answers one request within `max_ms` and is closest to the float student; of equals the smallest.

    Folders of unknown agreement are never chosen.
    """
    fitting = [
        (found, -one["size_bytes"], str(one["name"]))
        for one in result["formats"]
        if (found := top1_agreement(one)) is not None
        and found >= min_agreement
        and one["batches"]["1"]["request_ms"]["median"] <= max_ms
    ]
    return max(fitting)[2] if fitting else None


def top1_agreement(one: Json) -> float | None:
    """With the float student, of one format of a result: 1 for the float student itself, None where unknown."""
    if one["agreement"] is not None:
        return float(one["agreement"]["top1_agreement"])
    return 1.0 if one["is_float"] else None


def _told_apart(contestants: Sequence[Contestant]) -> list[str]:
    """Their names, with the folder where several have the same. Raises ConfigError for one that is named twice."""
    counts = Counter(one.name for one in contestants)
    names = [one.name if counts[one.name] == 1 else f"{one.name} ({one.folder})" for one in contestants]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ConfigError(f"{repeated[0]} is named twice: name each folder once for each runtime")
    return names
