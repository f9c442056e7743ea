"""The sampler plugin where vLLM makes it hard.

vLLM's engine runs in a process of its own, which finds the plugin by its entry point alone; prompts are cut into
chunks, draft tokens are guessed from the prompt and verified, and the key-value cache is too small for the batch, so
that chains are thrown out and start again. As a program it writes what came back.
"""

import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.schema.records import Capture, Float32, Int32
from teacher_cache.engine.row_layout import Layout
from tests.helpers.environment import python_path
from tests.helpers.programs import run_with_vllm
from tests.helpers.tiny import make_tiny_teacher
from tests.helpers.vllm_fork import fork_engines

LAYOUT = Layout(8, 5, (2.0,))
MAX_TOKENS = 40
NUM_CHAINS = 8


@dataclass(frozen=True)
class Answers:
    """`captures` by name of the request; `scored` the rows of prompt tokens."""

    teacher: Path
    captures: dict[str, Capture]
    scored: tuple[Int32, Float32]


def run(folder: Path) -> Answers:
    """Starts vLLM with stillroom installed beside it, asks, ends it."""
    make_tiny_teacher(folder / "teacher")
    site = folder / "site" / "stillroom-0.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: stillroom\nVersion: 0\n")
    (site / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nstillroom = teacher_cache.engine.plugin.register:register\n"
    )
    environ = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_PLUGINS": "stillroom", **python_path(site.parent)}
    run_with_vllm(["tests.helpers.vllm_sampler", str(folder)], environ=environ)
    captures, scored = pickle.loads((folder / "answers.pickle").read_bytes())
    return Answers(folder / "teacher", captures, scored)


def prompt_of(number: int) -> list[int]:
    """Prompts that repeat themselves, so that drafts are guessed, longer than a chunk."""
    return [0, *([20 + number, 30, 2, 1] * 10)]


def main() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

    from teacher_cache.engine.vllm.arrays import install_arrays
    from teacher_cache.engine.vllm.capture import capture_of, rows_of

    fork_engines()
    folder = Path(sys.argv[1])
    arguments = EngineArgs(
        model=str(folder / "teacher"),
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=4,
        enable_chunked_prefill=True,
        max_num_batched_tokens=24,
        # Four chains of 81 tokens need twelve.
        num_gpu_blocks_override=9,
        block_size=32,
        kv_cache_memory_bytes=1 << 24,
        enable_prefix_caching=False,
        max_logprobs=LAYOUT.width,
        speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2},
    )
    engine: Any = LLMEngine.from_vllm_config(arguments.create_engine_config(), disable_log_stats=True)
    install_arrays()

    def ask(name: str, number: int, **asked: Any) -> None:
        settings: dict[str, Any] = {
            "temperature": 0.0,
            "seed": number,
            "max_tokens": MAX_TOKENS,
            "ignore_eos": True,
            **asked,
        }
        quick: dict[str, Any] = {
            "flat_logprobs": True,
            "detokenize": False,
            "output_kind": RequestOutputKind.FINAL_ONLY,
        }
        params = SamplingParams(**settings, **quick)
        engine.add_request(name, tokens_input(prompt_of(number)), params)

    for number in range(NUM_CHAINS):
        ask(f"chain{number}", number, logprobs=LAYOUT.width, extra_args=LAYOUT.extra_args())
    # In the same batches: one that asks for nothing, one for plain candidates, one in a layout that has no room.
    ask("silent", 1)
    ask("plain", 2, logprobs=3)
    ask("senseless", 3, logprobs=4, extra_args=LAYOUT.extra_args())
    ask("scored", 4, max_tokens=1, prompt_logprobs=LAYOUT.width, extra_args=LAYOUT.extra_args())
    captures: dict[str, Capture] = {}
    scored = None
    while engine.has_unfinished_requests():
        for output in engine.step():
            completion, name = output.outputs[0], output.request_id
            if name.startswith("chain"):
                captures[name] = capture_of(completion.logprobs, completion.token_ids, LAYOUT.top, LAYOUT)
            elif name == "plain":
                captures[name] = capture_of(completion.logprobs, completion.token_ids, 3)
            elif name == "senseless":
                assert np.isnan(rows_of(completion.logprobs, 4)[1]).all()
            elif name == "scored":
                scored = rows_of(output.prompt_logprobs, LAYOUT.width)[:2]
    engine.engine_core.shutdown()
    (folder / "answers.pickle").write_bytes(pickle.dumps((captures, scored)))


if __name__ == "__main__":
    main()
