"""What capturing distributions costs: vLLM alone, vLLM's own log probabilities, and the whole builder.

    python -m benchmarks.capture [--teacher FOLDER] [--prompts N] [--max-tokens T] [--rounds R] [--json]

On one teacher (the demo's, when `make demo` has made it; a tiny one with random weights is measured as well) the same
seeded requests are generated in several ways, in rounds that alternate on one warm engine, so that whatever else the
machine does hits all of them. Ratios are medians over the rounds.

    bare            no log probabilities
    vllm_logprobs   `logprobs=64`, vLLM's default dictionaries
    plain           the builder on vLLM's own top 64, without the sampler's plugin
    builder         the builder: requests to committed Parquet shards, top 64 and exact entropy
    preset          the builder as it is configured by default
    signals         the builder with top 64, 8 draws and 2 temperatures

Vllm alone is also measured with its engine in a process of its own, and the faster of the two is what the builder is
compared with. The engine's start-up is outside every figure, and so are judges, which work in processes of their own.

Tokens a second are completion tokens over the wall clock of generation. `frontend_us_per_token` is CPU time that the
engine's caller spends on outputs (vLLM's output processor, and for the builder the arrays' way to a Capture);
`writer_us_per_token` the CPU time of the builder's second thread: rows, codec, Parquet, commits;
`process_us_per_token` the CPU time of the whole process, all threads. Peak memory is that of builds of 1,000 and 10,000
chains with a fake engine, in MiB. The last line is one JSON object; with --json it is the only one.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stillroom.log import note
from teacher_cache.engine.api import Request

DEMO_TEACHER = Path("runs/demo/teacher")
K = 64
CAPTURES: dict[str, dict[str, Any]] = {
    "builder": {"max_support": K, "draws": 0},
    "preset": {},
    "signals": {"max_support": K, "draws": 8, "temperatures": [0.5, 2.0]},
    "plain": {"max_support": K, "draws": 0},
}
"""`capture` of the modes that build."""
MODES = ("bare", *CAPTURES, "vllm_logprobs")
MAX_NUM_SEQS = 32

Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--teacher", type=Path, default=DEMO_TEACHER)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="no lines for people on stdout, only the JSON object")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        print(json.dumps(_run_part(options.part, options)))
        return
    if not options.teacher.is_dir():
        parser.error(f"{options.teacher} does not exist: run `make demo` once, or use a Hugging Face folder")
    say: Callable[[str], None] = (lambda line: None) if options.json else print
    result = _measure_teacher(options.teacher, options, say)
    with tempfile.TemporaryDirectory(prefix="stillroom-tiny-") as folder:
        from tests.helpers.tiny import make_tiny_teacher

        make_tiny_teacher(Path(folder))
        result |= {f"tiny_{name}": value for name, value in _measure_teacher(Path(folder), options, say).items()}
    for num_rows in (1_000, 10_000):
        peak = _part(f"memory:{num_rows}", options.teacher, options)["peak_mib"]
        say(f"memory  {num_rows} chains: {peak:.0f} MiB at the peak")
        result[f"peak_mib_{num_rows // 1000}k_rows"] = peak
    print(json.dumps(result))


def _measure_teacher(teacher: Path, options: argparse.Namespace, say: Callable[[str], None]) -> Result:
    paired = _part("paired", teacher, options)
    # Said at once: what comes later may fail after many minutes.
    for mode, rounds in paired.items():
        note(f"{teacher.name}  {mode}: {[one['tokens_per_s'] for one in rounds]} tok/s")
    own_process = _part("own_process", teacher, options)["bare"][0]
    rates = {mode: statistics.median(one["tokens_per_s"] for one in paired[mode]) for mode in MODES}
    faster = max(1.0, own_process["tokens_per_s"] / rates["bare"])
    for mode in MODES:
        cpu = statistics.median(one["process_us_per_token"] for one in paired[mode])
        front = statistics.median(one["frontend_us_per_token"] for one in paired[mode])
        say(f"{teacher.name}  {mode}: {rates[mode]:.1f} tok/s, front end {front:.1f}, all CPU {cpu:.0f} us/token")
    say(f"{teacher.name}  bare, in a process of its own: {own_process['tokens_per_s']:.1f} tok/s")

    def median(mode: str, name: str) -> float:
        values: list[float] = [one[name] for one in paired[mode]]
        return statistics.median(values)

    def over_bare(mode: str, name: str = "tokens_per_s") -> float:
        pairs = zip(paired[mode], paired["bare"], strict=True)
        ratios: list[float] = [one[name] / bare[name] for one, bare in pairs]
        return round(statistics.median(ratios), 3)

    return {
        "bare_tokens_per_s": round(max(rates["bare"], own_process["tokens_per_s"]), 1),
        "bare_own_process_tokens_per_s": own_process["tokens_per_s"],
        "vllm_logprobs_tokens_per_s": rates["vllm_logprobs"],
        "builder_tokens_per_s": rates["builder"],
        "builder_over_bare": round(over_bare("builder") / faster, 3),
        "preset_over_bare": round(over_bare("preset") / faster, 3),
        "signals_over_bare": round(over_bare("signals") / faster, 3),
        "plain_over_bare": round(over_bare("plain") / faster, 3),
        "vllm_logprobs_over_bare": round(over_bare("vllm_logprobs") / faster, 3),
        "builder_cpu_over_bare": over_bare("builder", "process_us_per_token"),
        "preset_cpu_over_bare": over_bare("preset", "process_us_per_token"),
        "signals_cpu_over_bare": over_bare("signals", "process_us_per_token"),
        "plain_cpu_over_bare": over_bare("plain", "process_us_per_token"),
        "frontend_us_per_token": median("builder", "frontend_us_per_token"),
        "vllm_logprobs_frontend_us_per_token": median("vllm_logprobs", "frontend_us_per_token"),
        "bare_frontend_us_per_token": median("bare", "frontend_us_per_token"),
        "writer_us_per_token": median("builder", "writer_us_per_token"),
        "bytes_per_token": median("builder", "bytes_per_token"),
        "num_tokens": paired["builder"][0]["num_tokens"],
        "num_rounds": len(paired["builder"]),
    }


def _part(part: str, teacher: Path, options: argparse.Namespace) -> Result:
    """One measurement in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.capture", "--part", part, "--teacher", str(teacher)]
    command += ["--prompts", str(options.prompts), "--max-tokens", str(options.max_tokens)]
    command += ["--rounds", str(options.rounds)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        sys.exit(f"the measurement of {part} failed:\n{ended.stderr[-3000:]}")
    result: Result = json.loads(ended.stdout.splitlines()[-1])
    return result


def _run_part(part: str, options: argparse.Namespace) -> Result:
    if part.startswith("memory:"):
        return _memory(int(part.partition(":")[2]))
    if part == "paired":
        return _paired(options, MODES, in_process=True)
    return _paired(options, ("bare",), in_process=False)


def _memory(num_rows: int) -> Result:
    """Peak resident memory of a whole build of `num_rows` chains, whose requests come one by one as from a file."""
    from teacher_cache.building.build import Build
    from tests.helpers.fake_builds import make_config, make_engine, make_requests, make_teacher

    with tempfile.TemporaryDirectory(prefix="stillroom-memory-") as folder:
        # Small shards, so that the shorter build closes several as well.
        build = Build(make_config(Path(folder) / "c", shard={"max_mb": 0.2}), make_teacher(), "w0")
        stream = (request for number in range(num_rows) for request in make_requests(number + 1, number))
        build.run(stream, num_rows, make_engine)
        build.close()
    return {"peak_mib": round(_peak_kib() / 1024, 1)}


def _peak_kib() -> int:
    """Of this program alone: getrusage counts the memory of the program that started it as well."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))


def _paired(options: argparse.Namespace, modes: Sequence[str], *, in_process: bool) -> Result:
    """Rounds of every mode on one engine: a list of measurements a mode."""
    from teacher_cache.config import BuildConfig, EmbeddedConfig
    from teacher_cache.engine.teacher import identify_teacher
    from teacher_cache.engine.vllm.engine import EmbeddedEngine
    from teacher_cache.prompts.prompts import load_prompts, requests

    with tempfile.TemporaryDirectory(prefix="stillroom-capture-") as folder:
        configs = {
            mode: BuildConfig.model_validate(_config(Path(folder), options, capture))
            for mode, capture in CAPTURES.items()
        }
        # Bare vLLM needs no plugin, and in a process of its own it may not have it.
        config = configs["signals" if in_process else "plain"]
        identified = identify_teacher(config.teacher)
        loaded = load_prompts(config.prompts).prompts
        stream = requests(config, loaded, identified.tokenizer, identified.record.fingerprint)
        wanted = [one for one in stream if isinstance(one, Request)]
        settings = EmbeddedConfig.model_validate({**config.engine.model_dump(), "in_process": in_process})
        engine = EmbeddedEngine(config.teacher, settings, config.capture)
        frontend = _FrontEnd(engine)
        measured: dict[str, list[Result]] = {mode: [] for mode in modes}
        writer_s = _timed_writer()
        with contextlib.closing(engine):
            # The first round warms every mode up and is not counted.
            for number in range(-1, options.rounds):
                for mode in modes:
                    _ask_for(engine, configs.get(mode), mode)
                    frontend.seconds, writer_s[:] = 0.0, []
                    before_s, cpu_s = time.perf_counter(), time.process_time()
                    asked = wanted if number >= 0 else wanted[:4]
                    if mode in CAPTURES:
                        cache = Path(folder) / f"{mode}{number}"
                        one = _build(configs[mode].updated(cache=cache), identified, engine, asked)
                    else:
                        one = {"num_tokens": _raw(engine, asked, mode), "seconds": time.perf_counter() - before_s}
                    cpu_s = time.process_time() - cpu_s
                    if number >= 0:
                        measured[mode].append(_rates(one, frontend.seconds, sum(writer_s), cpu_s))
        return measured


def _ask_for(engine: Any, config: Any, mode: str) -> None:
    """Sets what the engine asks vLLM for: the rows of this mode's capture, or without the plugin vLLM's own top k."""
    from teacher_cache.engine.row_layout import Layout

    engine._layout = None
    if config is not None and mode != "plain":
        capture = config.capture
        engine._layout = Layout(capture.max_support, capture.draws, tuple(capture.temperatures))
    engine._info = dataclasses.replace(engine._info, entropy="support" if engine._layout is None else "exact")


def _timed_writer() -> list[float]:
    """Filled with the CPU seconds of each build's writer thread."""
    from teacher_cache.writer.recorder import Recorder

    writer_s: list[float] = []
    run = Recorder._run

    def timed_run(self: Recorder) -> None:
        before_s = time.thread_time()
        run(self)
        writer_s.append(time.thread_time() - before_s)

    Recorder._run = timed_run  # type: ignore[method-assign]
    return writer_s


def _config(folder: Path, options: argparse.Namespace, capture: Result) -> Result:
    prompts = folder / "prompts.jsonl"
    lines = [
        json.dumps({"prompt": f"Explain step by step why {i} + {i + 7} = {2 * i + 7}."}) for i in range(options.prompts)
    ]
    prompts.write_text("\n".join(lines), encoding="utf-8")
    source = {"kind": "jsonl", "name": "sums", "path": prompts, "prompt_field": "prompt"}
    return {
        "cache": folder / "cache",
        "run": "bench",
        "teacher": {"model": str(options.teacher)},
        "prompts": {"sources": [source]},
        "sampling": {"temperature": 0.6, "top_p": 1.0, "max_tokens": options.max_tokens},
        "capture": capture,
        "engine": {"dtype": "float32", "max_model_len": 256, "max_num_seqs": MAX_NUM_SEQS, "kv_cache_gb": 1},
    }


class _FrontEnd:
    """CPU seconds that this thread spends on vLLM's outputs, measured around its output processor and capture_of."""

    def __init__(self, engine: Any) -> None:
        self.seconds = 0.0
        processor = engine._engine.output_processor
        processor.process_outputs = self._timed(processor.process_outputs)
        engine._outcome = self._timed(engine._outcome)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            before_s = time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds += time.thread_time() - before_s

        return timed


def _raw(engine: Any, wanted: Sequence[Request], mode: str) -> int:
    """Generates with vLLM alone; completion tokens."""
    from vllm.inputs.engine import tokens_input

    inner = engine._engine
    for number, request in enumerate(wanted):
        params = engine._sampling_params(request)
        params.flat_logprobs = False
        params.detokenize = mode == "vllm_logprobs"
        if mode.startswith("bare"):
            params.logprobs = None
        inner.add_request(str(number), tokens_input(list(request.prompt_token_ids)), params)
    num_tokens = 0
    while inner.has_unfinished_requests():
        num_tokens += sum(len(output.outputs[0].token_ids) for output in inner.step() if output.finished)
    return num_tokens


def _build(config: Any, teacher: Any, engine: Any, wanted: Sequence[Request]) -> Result:
    from teacher_cache.building.build import Build

    with contextlib.closing(Build(config, teacher, "w0")) as build:
        result = build.run(wanted, len(wanted), lambda: _Kept(engine))
    return {
        "num_tokens": result.recorded.num_tokens,
        "seconds": result.seconds,
        "bytes_per_token": round(result.recorded.bytes_per_token or 0.0, 1),
    }


class _Kept:
    """The engine, which the build must not close: it was warmed up and is closed by who started it."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.info, self.has_room, self.submit, self.step = engine.info, engine.has_room, engine.submit, engine.step

    @property
    def num_tokens(self) -> int:
        return int(self._engine.num_tokens)

    @property
    def num_unfinished(self) -> int:
        return int(self._engine.num_unfinished)

    def close(self) -> None:
        pass


def _rates(one: Result, frontend_s: float, writer_s: float, cpu_s: float) -> Result:
    num_tokens = one["num_tokens"]
    return {
        **one,
        "tokens_per_s": round(num_tokens / one["seconds"], 1),
        "frontend_us_per_token": round(1e6 * frontend_s / num_tokens, 1),
        "writer_us_per_token": round(1e6 * writer_s / num_tokens, 1),
        "process_us_per_token": round(1e6 * cpu_s / num_tokens, 1),
    }


if __name__ == "__main__":
    main()
