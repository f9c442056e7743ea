"""Real vLLM on a tiny teacher, once a test session, in a process of its own (vLLM changes the process that it runs in).

`run_session(folder)` returns what the engine gave, by the path that its log probabilities took. As a program it is that
process.
"""

import json
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.schema.records import Capture, Message, Prompt, prompt_id_of
from teacher_cache.config import CaptureConfig
from teacher_cache.engine.api import EngineInfo, Finished, Outcome, Request
from tests.helpers.programs import program_with_vllm
from tests.helpers.tiny import VOCAB_SIZE, make_tiny_adapter, make_tiny_teacher

K = 12
CAPTURE = CaptureConfig(max_support=K, draws=6, temperatures=[0.5, 2.0])
NUM_CHAINS = 10
MAX_MODEL_LEN = 128


@dataclass(frozen=True)
class Session:
    """`arrays` and `flat` map sample ids to what came back; `dicts` to vLLM's default: a list of {id: (lp, rank)}.
    `scores` and `flat_scores` are of the same chains, given as completions, and of those that `make_scored` adds.
    `switched` are chains with parameters of vLLM's own, `adapted` those of the teacher with an adapter.
    """

    teacher: Path
    info: EngineInfo
    arrays: dict[str, Outcome]
    flat: dict[str, Outcome]
    dicts: dict[str, list[dict[int, tuple[float, int]]]]
    scores: dict[str, Outcome]
    flat_scores: dict[str, Outcome]
    num_tokens: int
    num_scored_tokens: int
    switched: dict[str, Outcome]
    adapted: dict[str, Outcome]
    adapted_scores: dict[str, Outcome]
    stdout: str

    @property
    def adapter(self) -> Path:
        return self.teacher.parent / "adapter"


def run_session(folder: Path) -> Session:
    """Starts vLLM, generates, ends it."""
    make_tiny_adapter(folder / "adapter", make_tiny_teacher(folder / "teacher"))
    stdout, _ = _run(folder, "session")
    results = pickle.loads((folder / "session.pickle").read_bytes())
    return Session(teacher=folder / "teacher", **results, stdout=stdout)


def run_start(folder: Path) -> dict[str, Any]:
    """Starts a compiled engine, with saved compilations in `folder`, and generates one chain."""
    # Kernels without optimisation compute the same and are compiled sooner.
    compiler = folder / "g++"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    stdout, stderr = _run(folder, "start", TORCHDYNAMO_DISABLE="0", VLLM_CACHE_ROOT=str(folder / "vllm"))
    return {"stderr": stderr, **json.loads(stdout)}


def _run(folder: Path, way: str, **environ: str) -> tuple[str, str]:
    program = program_with_vllm(["tests.helpers.vllm_session", str(folder), way], environ=environ)
    code, stdout, stderr = program.communicate()
    assert code == 0, stderr[-4000:]
    return stdout, stderr


def make_requests() -> list[Request]:
    """Good requests, and one of each bad kind in their middle."""
    sampling = {"temperature": 0.8, "top_p": 0.9}
    good = [_request(f"good{i}", [0, 20 + i, 30, 2, 1], sampling, i) for i in range(NUM_CHAINS)]
    bad = [
        _request("empty", [], {}, 0),
        _request("long", [5] * MAX_MODEL_LEN, {}, 0),
        _request("vocabulary", [5, VOCAB_SIZE], {}, 0),
        _request("refused", [5, 6], {"top_p": 7.0}, 0),
    ]
    return [*good[:5], *bad, *good[5:]]


SWITCHES: dict[str, dict[str, Any]] = {
    "stop": {"stop": ["a", "b", "c", "d", "e"]},
    "repetition": {"repetition_detection": {"max_pattern_size": 2, "min_count": 2}},
    "budget": {"thinking_token_budget": 6},
    "forbidden": {"bad_words": ["a"], "min_tokens": 20, "presence_penalty": 1.0},
}
"""Of `sampling.vllm`."""
REASONING = {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}


def make_switched(teacher: Path) -> list[Request]:
    """Requests with each of SWITCHES; their prompts end in <think>."""
    from transformers import AutoTokenizer

    think_id = int(AutoTokenizer.from_pretrained(teacher).convert_tokens_to_ids("<think>"))  # type: ignore[arg-type]
    return [
        _request(f"{name}{number}", [0, 20, 30, 2, think_id], {"temperature": 0.8, "vllm": extra}, number)
        for name, extra in SWITCHES.items()
        for number in range(6)
    ]


def make_scored(chains: dict[str, Finished]) -> list[Request]:
    """Requests that score these chains, one that fills the model's length, one of a token, and bad ones."""
    given = [
        (name, chain.request.prompt_token_ids, chain.capture.token_ids_T.tolist()) for name, chain in chains.items()
    ]
    given += [
        ("full", [5, 6], [7] * (MAX_MODEL_LEN - 2)),
        ("single", [5], [1]),
        ("nothing", [5], []),
        ("too long", [5, 6], [7] * (MAX_MODEL_LEN - 1)),
        ("vocabulary", [5], [6, VOCAB_SIZE]),
    ]
    prompt = make_requests()[0].prompt
    return [Request(prompt, ids, 0, None, {}, len(tokens), name, tokens) for name, ids, tokens in given]


def _request(sample_id: str, ids: list[int], sampling: dict[str, Any], index: int) -> Request:
    messages = (Message("user", sample_id),)
    prompt = Prompt(prompt_id_of(messages), messages, "s", "train")
    return Request(prompt, ids, index, 2**62 + index, sampling, 40, sample_id)


def main() -> None:
    folder, way = Path(sys.argv[1]), sys.argv[2]
    (_start if way == "start" else _session)(folder)


def _start(folder: Path) -> None:
    from torch._inductor import config as inductor
    from vllm.compilation.counter import compilation_counter

    from teacher_cache.config import EmbeddedConfig, TeacherConfig
    from teacher_cache.engine.vllm.engine import EmbeddedEngine

    inductor.cpp.cxx = (None, str(folder / "g++"))
    # Scalar kernels need not try out which vectors the processor has, and include less.
    inductor.cpp.vec_isa_ok, inductor.cpp.simdlen = True, 1
    config = EmbeddedConfig(dtype="float32", max_num_seqs=4, max_model_len=MAX_MODEL_LEN)
    engine = EmbeddedEngine(TeacherConfig(model=str(folder / "teacher")), config, CAPTURE)
    chain = finished(_generate(engine, make_requests()[:1]))["good0"]
    found = {
        "loaded": compilation_counter.num_aot_artifacts_loaded,
        "token_ids": chain.capture.token_ids_T.tolist(),
        "num_kv_blocks": engine._engine.vllm_config.cache_config.num_gpu_blocks,
    }
    engine.close()
    print(json.dumps(found))


def _session(folder: Path) -> None:
    from teacher_cache.config import EmbeddedConfig, TeacherConfig
    from teacher_cache.engine.vllm.arrays import install_arrays, uninstall_arrays
    from teacher_cache.engine.vllm.engine import EmbeddedEngine

    config = EmbeddedConfig(
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=4,
        max_model_len=MAX_MODEL_LEN,
        kv_cache_gb=0.05,
        vllm={"enable_prefix_caching": True, "reasoning_config": REASONING},
    )
    sampling = [{"temperature": 0.8, "max_tokens": 40, "vllm": extra} for extra in SWITCHES.values()]
    engine = EmbeddedEngine(TeacherConfig(model=str(folder / "teacher")), config, CAPTURE, sampling=sampling)
    arrays = _generate(engine, make_requests())
    num_tokens = engine.num_tokens
    scores = _generate(engine, make_scored(finished(arrays)))
    num_scored_tokens = engine.num_tokens - num_tokens
    switched = _generate(engine, make_switched(folder / "teacher"))
    uninstall_arrays()
    flat = _generate(engine, make_requests())
    flat_scores = _generate(engine, make_scored(finished(arrays)))
    dicts = _default_path(engine)
    install_arrays()
    info = engine.info
    engine.close()
    engine.close()
    teacher = TeacherConfig(model=str(folder / "teacher"), adapter=str(folder / "adapter"))
    engine = EmbeddedEngine(teacher, config.updated(vllm={"lora_dtype": "auto"}), CAPTURE)
    adapted = _generate(engine, make_requests())
    adapted_scores = _generate(engine, make_scored(finished(adapted)))
    engine.close()
    results = {
        "info": info,
        "arrays": arrays,
        "flat": flat,
        "dicts": dicts,
        "scores": scores,
        "flat_scores": flat_scores,
        "num_tokens": num_tokens,
        "num_scored_tokens": num_scored_tokens,
        "switched": switched,
        "adapted": adapted,
        "adapted_scores": adapted_scores,
    }
    (folder / "session.pickle").write_bytes(pickle.dumps(results))


def _generate(engine, requests: list[Request]) -> dict[str, Outcome]:  # type: ignore[no-untyped-def]
    outcomes: dict[str, Outcome] = {}
    while requests or engine.num_unfinished:
        while requests and engine.has_room():
            engine.submit(requests.pop(0))
        outcomes.update({outcome.sample_id: outcome for outcome in engine.step()})
    return outcomes


def _default_path(engine) -> dict[str, list[dict[int, tuple[float, int]]]]:  # type: ignore[no-untyped-def]
    """What vLLM gives whoever asks for logprobs in the usual way, for the good requests."""
    from vllm.inputs.engine import tokens_input

    inner = engine._engine
    for request in make_requests():
        if request.sample_id.startswith("good"):
            params = engine._sampling_params(request)
            # The top candidates as vLLM itself computes them.
            params.flat_logprobs, params.logprobs, params.extra_args = False, K, None
            inner.add_request(request.sample_id, tokens_input(list(request.prompt_token_ids)), params)
    found = {}
    while inner.has_unfinished_requests():
        for output in inner.step():
            rows = output.outputs[0].logprobs
            found[output.request_id] = [{i: (one.logprob, one.rank) for i, one in row.items()} for row in rows]
    return found


def capture_of_dicts(rows: list[dict[int, tuple[float, int]]], k: int) -> Capture:
    """A Capture out of dictionaries: insertion order is the sampled token, then the top k; a double stands once."""
    sampled = [next(iter(row)) for row in rows]
    # The double keeps its first place and takes its last value: rank in the top k.
    ordered = [sorted(row.items(), key=lambda item: (-item[1][0], item[1][1])) for row in rows]
    top = [[item for item in row if item[1][1] <= k][:k] for row in ordered]
    return Capture(
        token_ids_T=np.array(sampled, np.int32),
        sampled_logprob_T=np.array([row[token][0] for row, token in zip(rows, sampled, strict=True)], np.float32),
        sampled_rank_T=np.array([row[token][1] for row, token in zip(rows, sampled, strict=True)], np.int32),
        topk_ids_TK=np.array([[token for token, _ in row] for row in top], np.int32),
        topk_logprobs_TK=np.array([[value for _, (value, _) in row] for row in top], np.float32),
    )


def finished(outcomes: dict[str, Outcome]) -> dict[str, Finished]:
    return {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, Finished)}


if __name__ == "__main__":
    main()
