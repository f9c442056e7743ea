"""Which of vLLM's switches keep the capture right: `python -m benchmarks.switches [NAME ...]` prints one line per case.

Every case starts the embedded engine with a tiny teacher, `engine.vllm` and `sampling.vllm`, generates chains, and
compares each token's log probability, rank and entropy with a dense computation by transformers. Cases named `adapter`
have a random LoRA adapter of q_proj and v_proj, which peft merges for the dense computation. A line says whether all
agree, whether the tokens are those without the switch, and how chains ended. docs/switches.md holds the verdicts.
"""

import argparse
import contextlib
import importlib
import itertools
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.errors import StillroomError
from stillroom.schema.records import Message, Prompt, prompt_id_of
from teacher_cache.config import CaptureConfig, EmbeddedConfig, TeacherConfig
from teacher_cache.engine.api import Failure, Finished, Outcome, Request
from tests.helpers.tiny import make_tiny_adapter, make_tiny_teacher, merged

NUM_CHAINS = 12
MAX_TOKENS = 48
TOLERANCE = 1e-3
MAX_MODEL_LEN = 128

REASONING = {"reasoning_config": {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}}
NGRAM = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    # engine.vllm, sampling.vllm, temperature
    "nothing": ({}, {}, 0.8),
    "greedy": ({}, {}, 0.0),
    **{
        name: ({name: value}, {}, 0.8)
        for name, value in {
            "enable_prefix_caching": True,
            "prefix_caching_hash_algo": "xxhash",
            "block_size": 64,
            "num_gpu_blocks_override": 12,
            "scheduling_policy": "priority",
            "async_scheduling": True,
            "max_num_scheduled_tokens": 200,
            "scheduler_reserve_full_isl": False,
            "disable_cascade_attn": True,
            "skip_tokenizer_init": True,
            "tokenizer_mode": "slow",
            "load_format": "safetensors",
            "optimization_level": 0,
            "hf_overrides": {"rope_theta": 500.0},
            "use_fp64_gumbel": True,
            "attention_backend": "CPU_ATTN",
            "max_num_active_seqs": 2,
            "enable_sleep_mode": True,
            "structured_outputs_config": {"backend": "xgrammar"},
            "additional_config": {"note": "x"},
            "shutdown_timeout": 5,
        }.items()
    },
    "adapter": ({}, {}, 0.8),
    "adapter_greedy": ({}, {}, 0.0),
    "adapter_lora_dtype": ({"lora_dtype": "auto"}, {}, 0.8),
    "adapter_fully_sharded_loras": ({"fully_sharded_loras": True}, {}, 0.8),
    "adapter_specialize_active_lora": ({"specialize_active_lora": True}, {}, 0.8),
    "prefix_caching_off": ({"enable_prefix_caching": False}, {}, 0.8),
    "ngram_greedy": (NGRAM, {}, 0.0),
    "ngram_random": (NGRAM, {}, 0.8),
    "chunked_prefill": ({"enable_chunked_prefill": True}, {}, 0.8),
    "reasoning_config": (REASONING, {}, 0.8),
    "thinking_token_budget": (REASONING, {"thinking_token_budget": 8}, 0.8),
    **{
        name: ({}, {name: value}, 0.8)
        for name, value in {
            "stop": ["a", "b", "c", "d"],
            "stop_token_ids": [20, 21, 22, 23, 24, 25],
            "ignore_eos": True,
            "min_tokens": 30,
            "presence_penalty": 1.0,
            "frequency_penalty": 1.0,
            "bad_words": ["a", "e"],
            "allowed_token_ids": list(range(40, 200)),
            "logit_bias": {50: 20.0},
            "structured_outputs": {"regex": "[a-z]{20}"},
            "repetition_detection": {"max_pattern_size": 2, "min_pattern_size": 1, "min_count": 2},
            "skip_reading_prefix_cache": True,
            "watermarking": False,
        }.items()
    },
}


def run_cases(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Generates the chains of cases with the same engine arguments, in this process."""
    from teacher_cache.engine.vllm.engine import EmbeddedEngine

    config = EmbeddedConfig(
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=16,
        max_model_len=MAX_MODEL_LEN,
        kv_cache_gb=0.05,
        vllm=CASES[names[0]][0],
    )
    sampling = {}
    for name in names:
        _, extra, temperature = CASES[name]
        extras = {"vllm": extra} if extra else {}
        sampling[name] = {"temperature": temperature, "top_p": 0.95, "max_tokens": MAX_TOKENS, **extras}
    adapter = _adapter_of(folder, names[0])
    teacher = TeacherConfig(model=str(folder / "teacher"), adapter=None if adapter is None else str(adapter))
    engine = EmbeddedEngine(teacher, config, CaptureConfig(max_support=8, draws=4), sampling=[*sampling.values()])
    outcomes: dict[str, list[Outcome]] = {}
    try:
        # One case after the other: rows of one batch do not influence one another, and tokens are compared.
        for name in names:
            for request in _requests(sampling[name]):
                engine.submit(request)
            outcomes[name] = []
            while engine.num_unfinished:
                outcomes[name] += engine.step()
    finally:
        engine.close()
    model = merged(folder / "teacher", adapter)
    return {name: _judged(model, sorted(found, key=lambda one: one.sample_id)) for name, found in outcomes.items()}


def _adapter_of(folder: Path, name: str) -> Path | None:
    return folder / "adapter" if name.startswith("adapter") else None


def _requests(sampling: dict[str, Any]) -> list[Request]:
    messages = (Message("user", "x"),)
    prompt = Prompt(prompt_id_of(messages), messages, "s", "train")
    # A common beginning, longer than a block, for prefix caching; it ends in <think> for budgets.
    starts = [[*([7, 8, 9, 10] * 10), 20 + number, 30] for number in range(NUM_CHAINS)]
    return [
        Request(prompt, ids, 0, 1000 + number, sampling, MAX_TOKENS, f"{number:03}")
        for number, ids in enumerate(starts)
    ]


def _judged(model: Any, outcomes: list[Outcome]) -> dict[str, Any]:
    import torch

    worst, tokens = 0.0, []
    for one in outcomes:
        if not isinstance(one, Finished):
            continue
        ids = list(one.request.prompt_token_ids)
        given = one.capture.token_ids_T.tolist()
        with torch.inference_mode():
            logits_TV = model(torch.tensor([ids + given])).logits[0, len(ids) - 1 : -1]
        dense_TV = torch.log_softmax(logits_TV.double(), dim=-1).numpy()
        entropy_T = -(np.exp(dense_TV) * dense_TV).sum(axis=1)
        assert one.capture.entropy_T is not None
        differences = (
            one.capture.sampled_logprob_T - dense_TV[np.arange(len(given)), given],
            one.capture.topk_logprobs_TK - np.take_along_axis(dense_TV, one.capture.topk_ids_TK, axis=1),
            one.capture.entropy_T - entropy_T,
        )
        worst = max(worst, *(float(np.abs(part).max()) for part in differences))
        tokens.append(given)
    failures = sorted({one.message for one in outcomes if isinstance(one, Failure)})
    reasons = Counter(one.finish_reason if isinstance(one, Finished) else one.reason for one in outcomes)
    return {"worst": worst, "tokens": tokens, "reasons": dict(reasons), "failures": failures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"cases, all by default: {', '.join(CASES)}")
    names = parser.parse_args().names or list(CASES)
    # Imported once, and each case forked: an engine leaves traces in its process.
    os.environ |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
    for module in ("vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.llama"):
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as name:
        make_tiny_adapter(Path(name) / "adapter", make_tiny_teacher(Path(name) / "teacher"))
        plain: dict[float, list[list[int]]] = {}
        for _, group in itertools.groupby(
            ["nothing", "greedy", *names], key=lambda case: (CASES[case][0], case.startswith("adapter"))
        ):
            cases = list(dict.fromkeys(group))
            found = _run(name, cases)
            for case in cases:
                one, temperature = found.get(case, {}), CASES[case][2]
                if not one:
                    print(f"{case:28} {found['refused'][:300]}", flush=True)
                    continue
                verdict = "dense" if one["worst"] < TOLERANCE else f"OFF by {one['worst']:.3g}"
                same = (
                    "same tokens" if one["tokens"] == plain.setdefault(temperature, one["tokens"]) else "other tokens"
                )
                print(f"{case:28} {verdict:16} {same:14} {one['reasons']} {one['failures'][:1]}", flush=True)


def _run(folder: str, cases: Sequence[str]) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_inside, args=(Path(folder), cases, there))
    process.start()
    there.close()
    try:
        return dict(here.recv())
    except EOFError:
        return {"refused": "the process died"}
    finally:
        process.join()


def _inside(folder: Path, cases: Sequence[str], connection: Connection) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        try:
            found: dict[str, Any] = run_cases(folder, cases)
        except StillroomError as error:
            found = {"refused": str(error)}
    connection.send(found)


if __name__ == "__main__":
    main()
