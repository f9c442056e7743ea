"""What capturing distributions costs: vLLM alone, vLLM's own log probabilities, and the whole builder.

    python -m benchmarks.capture [--teacher FOLDER] [--prompts N] [--max-tokens T] [--json]

On one teacher (the demo's, when `make demo` has made it; a tiny one with random weights is measured as well) the same
seeded requests are generated, each mode in a fresh process after a warm-up:

    bare            no log probabilities, vLLM in this process; and in processes of its own, for the faster of the two
    vllm_logprobs   `logprobs=64`, vLLM's default dictionaries
    builder         requests to committed Parquet shards

Tokens a second are completion tokens over the wall clock of generation. `frontend_us_per_token` is CPU time that the
engine's caller spends on outputs (vLLM's output processor, and for the builder the arrays' way to a Capture);
`writer_us_per_token` the CPU time of the builder's second thread: rows, codec, Parquet, commits. Peak memory is that of
builds of 1,000 and 10,000 chains with a fake engine, in MiB. The last line is one JSON object; with --json it is the
only one.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shared.log import note
from teacher_cache.requests import Request

DEMO_TEACHER = Path("runs/demo/teacher")
K = 64
MODES = ("bare", "bare_own_process", "vllm_logprobs", "builder")
MAX_NUM_SEQS = 32

Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--teacher", type=Path, default=DEMO_TEACHER)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON object")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        print(json.dumps(_run_part(options.part, options.teacher, options.prompts, options.max_tokens)))
        return
    if not options.teacher.is_dir():
        parser.error(f"{options.teacher} does not exist: run `make demo` once, or name a Hugging Face folder")
    say: Callable[[str], None] = (lambda line: None) if options.json else note
    result = _measure_teacher(options.teacher, options, say)
    with tempfile.TemporaryDirectory(prefix="stillroom-tiny-") as folder:
        from tests.tiny import make_tiny_teacher

        make_tiny_teacher(Path(folder))
        result |= {f"tiny_{name}": value for name, value in _measure_teacher(Path(folder), options, say).items()}
    for num_rows in (1_000, 10_000):
        peak = _part(f"memory:{num_rows}", options.teacher, options)["peak_mib"]
        say(f"memory  {num_rows} chains: {peak:.0f} MiB at the peak")
        result[f"peak_mib_{num_rows // 1000}k_rows"] = peak
    print(json.dumps(result))


def _measure_teacher(teacher: Path, options: argparse.Namespace, say: Callable[[str], None]) -> Result:
    modes = {}
    for mode in MODES:
        modes[mode] = _part(mode, teacher, options)
        rate, cost = modes[mode]["tokens_per_s"], modes[mode]["frontend_us_per_token"]
        say(f"{teacher.name}  {mode}: {rate:.1f} tok/s, front end {cost:.1f} us/token")
    bare = max(modes["bare"]["tokens_per_s"], modes["bare_own_process"]["tokens_per_s"])
    return {
        "bare_tokens_per_s": bare,
        "bare_own_process_tokens_per_s": modes["bare_own_process"]["tokens_per_s"],
        "vllm_logprobs_tokens_per_s": modes["vllm_logprobs"]["tokens_per_s"],
        "builder_tokens_per_s": modes["builder"]["tokens_per_s"],
        "builder_over_bare": round(modes["builder"]["tokens_per_s"] / bare, 3),
        "frontend_us_per_token": modes["builder"]["frontend_us_per_token"],
        "vllm_logprobs_frontend_us_per_token": modes["vllm_logprobs"]["frontend_us_per_token"],
        "bare_frontend_us_per_token": modes["bare"]["frontend_us_per_token"],
        "writer_us_per_token": modes["builder"]["writer_us_per_token"],
        "bytes_per_token": modes["builder"]["bytes_per_token"],
        "num_tokens": modes["builder"]["num_tokens"],
    }


def _part(part: str, teacher: Path, options: argparse.Namespace) -> Result:
    """One measurement in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.capture", "--part", part, "--teacher", str(teacher)]
    command += ["--prompts", str(options.prompts), "--max-tokens", str(options.max_tokens)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        sys.exit(f"the measurement of {part} failed:\n{ended.stderr[-3000:]}")
    result: Result = json.loads(ended.stdout.splitlines()[-1])
    return result


def _run_part(part: str, teacher: Path, num_prompts: int, max_tokens: int) -> Result:
    if part.startswith("memory:"):
        return _memory(int(part.partition(":")[2]))
    return _generate(part, teacher, num_prompts, max_tokens)


def _memory(num_rows: int) -> Result:
    """Peak resident memory of a whole build of `num_rows` chains, whose requests come one by one as from a file."""
    from teacher_cache.build import Build
    from tests.fake_builds import make_config, make_engine, make_requests, make_teacher

    with tempfile.TemporaryDirectory(prefix="stillroom-memory-") as folder:
        # Small shards, so that the shorter build closes several as well.
        build = Build(make_config(Path(folder) / "c", shard={"max_mb": 0.2}), make_teacher(), "w0")
        stream = (request for number in range(num_rows) for request in make_requests(number + 1, number))
        build.run(stream, num_rows, make_engine)
        build.close()
    return {"peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)}


def _generate(mode: str, teacher: Path, num_prompts: int, max_tokens: int) -> Result:
    from teacher_cache.config import BuildConfig, EmbeddedConfig
    from teacher_cache.engine import EmbeddedEngine
    from teacher_cache.prompts import load_prompts, requests
    from teacher_cache.teacher import identify_teacher

    with tempfile.TemporaryDirectory(prefix="stillroom-capture-") as folder:
        config = BuildConfig.model_validate(_config(Path(folder) / "cache", teacher, num_prompts, max_tokens))
        identified = identify_teacher(config.teacher)
        loaded = load_prompts(config.prompts).prompts
        stream = requests(config, loaded, identified.tokenizer, identified.record.fingerprint)
        wanted = [one for one in stream if isinstance(one, Request)]
        own_process = mode == "bare_own_process"
        settings = EmbeddedConfig.model_validate({**config.engine.model_dump(), "in_process": not own_process})
        engine = EmbeddedEngine(config.teacher, settings, K)
        frontend = _FrontEnd(engine)
        try:
            _raw(engine, wanted[:4], mode)
            frontend.seconds = 0.0
            if mode == "builder":
                return _timed_build(config, identified, engine, wanted, frontend)
            started_s = time.perf_counter()
            num_tokens = _raw(engine, wanted, mode)
            return _rates(num_tokens, time.perf_counter() - started_s, frontend.seconds)
        finally:
            engine.close()


def _config(cache: Path, teacher: Path, num_prompts: int, max_tokens: int) -> Result:
    source = {"kind": "reasoning_gym", "name": "sums", "task": "chain_sum", "size": num_prompts, "seed": 1}
    return {
        "cache": cache,
        "run": "bench",
        "teacher": {"model": str(teacher)},
        "prompts": {"sources": [source]},
        "sampling": {"temperature": 0.6, "top_p": 1.0, "max_tokens": max_tokens},
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
        params.flat_logprobs = mode == "builder"
        params.detokenize = mode == "vllm_logprobs"
        if mode.startswith("bare"):
            params.logprobs = None
        inner.add_request(str(number), tokens_input(list(request.prompt_token_ids)), params)
    num_tokens = 0
    while inner.has_unfinished_requests():
        num_tokens += sum(len(output.outputs[0].token_ids) for output in inner.step() if output.finished)
    return num_tokens


def _timed_build(config: Any, teacher: Any, engine: Any, wanted: Sequence[Request], frontend: _FrontEnd) -> Result:
    from teacher_cache.build import Build
    from teacher_cache.recorder import Recorder

    writer_s: list[float] = []
    run = Recorder._run

    def timed_run(self: Recorder) -> None:
        before_s = time.thread_time()
        run(self)
        writer_s.append(time.thread_time() - before_s)

    Recorder._run = timed_run  # type: ignore[method-assign]
    build = Build(config, teacher, "w0")
    result = build.run(wanted, len(wanted), lambda: _Kept(engine))
    build.close()
    num_tokens = result.recorded.num_tokens
    return {
        **_rates(num_tokens, result.seconds, frontend.seconds),
        "writer_us_per_token": round(1e6 * sum(writer_s) / num_tokens, 1),
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


def _rates(num_tokens: int, seconds: float, frontend_s: float) -> Result:
    return {
        "num_tokens": num_tokens,
        "tokens_per_s": round(num_tokens / seconds, 1),
        "frontend_us_per_token": round(1e6 * frontend_s / num_tokens, 1),
    }


if __name__ == "__main__":
    main()
