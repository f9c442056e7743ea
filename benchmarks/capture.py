"""What keeping distributions costs: vLLM alone, vLLM with its own log probabilities, and the builder with Parquet.

    python -m benchmarks.capture --json [--config benchmarks/demo/teacher.yaml] [--prompts 96] [--rounds 2]

All three generate the same chains: same model, same engine arguments, same prompts, same seeds. Each runs in a process
of its own, one after the other, in turn for every round; a few chains are generated before the clock starts.
`frontend` is CPU time in vLLM's output processing.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shared.config import load_config
from teacher_cache.config import BuildConfig
from teacher_cache.prompts import load_prompts, requests
from teacher_cache.requests import Request
from teacher_cache.teacher import IdentifiedTeacher, identify_teacher

MODES = ("bare", "vllm_logprobs", "builder")
NUM_WARM_UP = 2


def main() -> None:
    """Runs the rounds and prints medians and ratios; the last line is one JSON object with --json."""
    options = _options()
    if options.mode is not None:
        config = load_config(options.config, [f"cache={options.cache}"] if options.cache else [], BuildConfig)
        print(json.dumps(_measure(options.mode, config, options.prompts)))
        return
    runs: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    for number in range(options.rounds):
        for mode in MODES:
            runs[mode].append(_in_a_process(mode, options))
            print(f"round {number} {mode}: {runs[mode][-1]}", file=sys.stderr, flush=True)
    result = _summary(runs)
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:28} {value}")


def _summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    def median(mode: str, name: str) -> float:
        return statistics.median(run[name] for run in runs[mode])

    def ratio(mode: str) -> float:
        pairs = zip(runs[mode], runs["bare"], strict=True)
        return statistics.median(run["tokens_per_s"] / bare["tokens_per_s"] for run, bare in pairs)

    return {
        "bare_tokens_per_s": round(median("bare", "tokens_per_s"), 1),
        "vllm_logprobs_tokens_per_s": round(median("vllm_logprobs", "tokens_per_s"), 1),
        "builder_tokens_per_s": round(median("builder", "tokens_per_s"), 1),
        "vllm_logprobs_vs_bare": round(ratio("vllm_logprobs"), 3),
        "builder_vs_bare": round(ratio("builder"), 3),
        "frontend_us_per_token": round(median("builder", "frontend_us_per_token"), 1),
        "vllm_logprobs_frontend_us_per_token": round(median("vllm_logprobs", "frontend_us_per_token"), 1),
        "num_tokens": runs["bare"][0]["num_tokens"],
        "rounds": len(runs["bare"]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def _in_a_process(mode: str, options: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.capture", "--mode", mode, "--config", str(options.config)]
        command += ["--prompts", str(options.prompts), "--cache", folder]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return found


def _measure(mode: str, config: BuildConfig, num_prompts: int) -> dict[str, float]:
    teacher = identify_teacher(config.teacher)
    prompts = load_prompts(config.prompts).prompts[: num_prompts + NUM_WARM_UP]
    wanted = requests(config, prompts, teacher.tokenizer, teacher.record.fingerprint)
    asked = [request for request in wanted if isinstance(request, Request)]
    warm, measured = asked[:NUM_WARM_UP], asked[NUM_WARM_UP:]
    run = _builder if mode == "builder" else _vllm_alone(with_logprobs=mode == "vllm_logprobs")
    return run(config, teacher, warm, measured)


Runner = Callable[[BuildConfig, IdentifiedTeacher, Sequence[Request], Sequence[Request]], dict[str, float]]


def _builder(
    config: BuildConfig, teacher: IdentifiedTeacher, warm: Sequence[Request], measured: Sequence[Request]
) -> dict[str, float]:
    from teacher_cache.build import Build
    from teacher_cache.engine import EmbeddedEngine

    engine = EmbeddedEngine(config.teacher, config.engine, config.capture.max_support)
    for request in warm:
        engine.submit(request)
    while engine.num_unfinished:
        engine.step()
    frontend = _Stopwatch()
    build = Build(config, teacher, "w0")
    started_s = time.perf_counter()
    result = build.run(measured, len(measured), lambda: engine)
    seconds = time.perf_counter() - started_s
    build.close()
    return _rates(result.recorded.num_tokens, seconds, frontend)


def _vllm_alone(*, with_logprobs: bool) -> Runner:
    def run(
        config: BuildConfig, teacher: IdentifiedTeacher, warm: Sequence[Request], measured: Sequence[Request]
    ) -> dict[str, float]:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM, SamplingParams

        from teacher_cache.engine import engine_args

        llm = LLM(**engine_args(config.teacher, config.engine, config.capture.max_support, on_cpu=True))

        def generate(batch: Sequence[Request]) -> int:
            params = [
                SamplingParams(
                    temperature=request.sampling.get("temperature", 1.0),
                    top_p=request.sampling.get("top_p", 1.0),
                    seed=request.seed,
                    max_tokens=request.max_tokens,
                    logprobs=config.capture.max_support if with_logprobs else None,
                )
                for request in batch
            ]
            prompts: Any = [{"prompt_token_ids": list(request.prompt_token_ids)} for request in batch]
            outputs = llm.generate(prompts, params, use_tqdm=False)
            return sum(len(output.outputs[0].token_ids) for output in outputs)

        generate(warm)
        frontend = _Stopwatch()
        started_s = time.perf_counter()
        num_tokens = generate(measured)
        return _rates(num_tokens, time.perf_counter() - started_s, frontend)

    return run


class _Stopwatch:
    """Counts this process's CPU time in vLLM's output processing, from now on."""

    def __init__(self) -> None:
        from vllm.v1.engine.output_processor import OutputProcessor

        self.seconds = 0.0
        process_outputs = OutputProcessor.process_outputs

        def timed(*arguments: Any, **named: Any) -> Any:
            started_s = time.thread_time()
            try:
                return process_outputs(*arguments, **named)
            finally:
                self.seconds += time.thread_time() - started_s

        setattr(OutputProcessor, "process_outputs", timed)  # noqa: B010 - mypy refuses the plain form


def _rates(num_tokens: int, seconds: float, frontend: _Stopwatch) -> dict[str, float]:
    return {
        "num_tokens": num_tokens,
        "seconds": round(seconds, 2),
        "tokens_per_s": num_tokens / seconds,
        "frontend_us_per_token": 1e6 * frontend.seconds / num_tokens,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cost of capture against vLLM alone.")
    parser.add_argument("--json", action="store_true", help="last line is one JSON object")
    parser.add_argument("--config", type=Path, default=Path("benchmarks/demo/teacher.yaml"))
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
