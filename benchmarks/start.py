"""What starting the embedded engine costs: seconds to the first token, tokens/s after it, resident memory.

    python -m benchmarks.start [--teacher FOLDER] [--eager] [--tokens T] [--busy]

32 prompts of 61 tokens are sampled to T tokens each at the demo's engine settings. Run it twice: the first compiled
start compiles, later ones load what was saved below VLLM_CACHE_ROOT. With --busy the same prompts run again beside two
busy loops; `ratio` is the rate beside them over the rate alone. Prints one JSON object.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from stillroom.schema.records import Message, Prompt, prompt_id_of
from teacher_cache.config import CaptureConfig, EmbeddedConfig, TeacherConfig
from teacher_cache.engine.api import Engine, Request

MAX_NUM_SEQS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--teacher", type=Path, default=Path("runs/demo/teacher"))
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--tokens", type=int, default=80)
    parser.add_argument("--busy", action="store_true")
    options = parser.parse_args()
    started_s = time.monotonic()
    from teacher_cache.engine.vllm.engine import EmbeddedEngine

    config = EmbeddedConfig(dtype="float32", max_model_len=1024, max_num_seqs=MAX_NUM_SEQS, enforce_eager=options.eager)
    engine = EmbeddedEngine(TeacherConfig(model=str(options.teacher)), config, CaptureConfig())
    result = {"start_s": time.monotonic() - started_s, **generate(engine, options.tokens)}
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    result["resident_gib"] = int(status["VmRSS"].split()[0]) / 2**20
    if options.busy:
        loops = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(2)]
        try:
            result["ratio"] = generate(engine, options.tokens)["tokens_per_s"] / result["tokens_per_s"]
        finally:
            for loop in loops:
                loop.kill()
    engine.close()
    print(json.dumps({name: round(value, 2) for name, value in result.items()}))


def generate(engine: Engine, num_tokens: int) -> dict[str, float]:
    """Seconds of the first step, which reads the prompts, and tokens/s after it."""
    messages = (Message("user", "x"),)
    prompt = Prompt(prompt_id_of(messages), messages, "start", "train")
    for index in range(MAX_NUM_SEQS):
        ids = [1, *((37 * index + 11 * place) % 40000 + 100 for place in range(60))]
        engine.submit(Request(prompt, ids, index, index, {"temperature": 0.6}, num_tokens, str(index)))
    started_s = time.monotonic()
    engine.step()
    first_s, first_tokens = time.monotonic(), engine.num_tokens
    while engine.num_unfinished:
        engine.step()
    rate = (engine.num_tokens - first_tokens) / (time.monotonic() - first_s)
    return {"first_step_s": first_s - started_s, "tokens_per_s": rate}


if __name__ == "__main__":
    main()
