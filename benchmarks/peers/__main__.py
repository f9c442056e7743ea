"""Speed of training on one cache beside DistillKit and TRL, which run in an environment of their own.

    python -m benchmarks.peers --python PYTHON --distillkit CHECKOUT [--json] [--rounds N] [--steps N] [--vocab V] ...

    kd          student-train: the default losses on the default capture
    ce          student-train, cross-entropy alone
    distillkit  DistillKit's trainer on the same chains from a file: its KL on 16 entries a token, and cross-entropy
    trl_sft     TRL's SFTTrainer: cross-entropy alone
    trl_gkd     TRL's GKDTrainer, off-policy, with a teacher of twice the width and depth in the process

All train the same student (random weights, shape of SmolLM2 with fewer layers) in float32 on one thread with AdamW,
two sequences of 1,024 tokens a step, cut from the same chains one after the other; sides take turns, each in a fresh
process. PYTHON is the interpreter of an environment with trl 0.25.1, transformers 4, accelerate, datasets and torch;
CHECKOUT is a clone of DistillKit. Speed is tokens, prompts included, over the CPU seconds of a step, median of all
steps but the first. The last line is one JSON object, with --json the only one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

import stillroom
from benchmarks.loss import Setting as LossSetting
from benchmarks.loss import hardware
from benchmarks.train import Setting, prepare
from stillroom.config import Json

OURS = ("kd", "ce")
PEERS = ("distillkit", "trl_sft", "trl_gkd")
SUPPORT = 16
WORKER = Path(__file__).with_name("worker.py")


def main() -> None:
    """Runs all sides and prints the ratios of ours to theirs."""
    arguments = _arguments()
    setting = Setting(
        steps=arguments.steps,
        rounds=arguments.rounds,
        vocab=arguments.vocab,
        hidden=576,
        layers=arguments.layers,
        packs=2,
    )
    with tempfile.TemporaryDirectory(prefix="stillroom-peers-") as name:
        root = Path(name)
        prepare(root, setting)
        _name_tokenizer(root / "student")
        _write_rows(root / "cache", root / "rows.npz", setting)
        rounds = [
            {side: _measure(side, setting, root, arguments) for side in arguments.sides} for _ in range(setting.rounds)
        ]
    print(json.dumps(_result(rounds, setting)))


def _name_tokenizer(folder: Path) -> None:
    """In a way that transformers 4 knows too."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}))


def _write_rows(cache: Path, path: Path, setting: Setting) -> None:
    """Ids, labels [R, L] and the teacher's entries [R, L, K] of chains one after the other, cut at `pack_tokens`.

    Entries stand where the student predicts: at position i for token i + 1.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    with stillroom.open_cache(str(cache)) as opened:
        for sample in opened.samples():
            num_prompt = int(sample.chain["num_prompt_tokens"])
            ids_TK, logprobs_TK = sample.dense(SUPPORT)
            ids_L = np.concatenate([np.full(num_prompt, 7), sample.token_ids_T])
            labels_L = np.where(np.arange(len(ids_L)) < num_prompt, -100, ids_L)
            entries_LK = np.zeros((len(ids_L), SUPPORT), np.int64)
            values_LK = np.full((len(ids_L), SUPPORT), -30.0, np.float32)
            entries_LK[num_prompt - 1 : -1], values_LK[num_prompt - 1 : -1] = ids_TK, np.maximum(logprobs_TK, -30.0)
            parts.append((ids_L, labels_L, entries_LK, values_LK))
    names = ("input_ids", "labels", "token_ids", "top_values")
    num_rows = setting.steps * setting.packs
    whole = {key: np.concatenate(column) for key, column in zip(names, zip(*parts, strict=True), strict=True)}
    length = setting.pack_tokens
    np.savez(
        path,
        **{key: array[: num_rows * length].reshape(num_rows, length, *array.shape[1:]) for key, array in whole.items()},
    )


def _measure(side: str, setting: Setting, root: Path, arguments: argparse.Namespace) -> Json:
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    if side in OURS:
        options = [
            word for key, value in asdict(setting).items() for word in (f"--{key.replace('_', '-')}", str(value))
        ]
        command = [sys.executable, "-m", "benchmarks.train", "--side", side, "--folder", str(root), *options]
    else:
        environment |= {"PYTHONPATH": str(arguments.distillkit), "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
        command = [str(arguments.python), str(WORKER), side, str(root), str(setting.packs)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if ended.returncode:
        sys.exit(f"benchmarks.peers: {side} failed:\n{ended.stderr[-3000:]}")
    measured: Json = json.loads(ended.stdout.splitlines()[-1])
    print(f"{side:12}{measured['tokens_per_cpu_s']:8.0f} tok/CPU s {measured['peak_mib']:8.0f} MiB", file=sys.stderr)
    return measured


def _result(rounds: list[dict[str, Json]], setting: Setting) -> Json:
    ratios = {
        f"kd_vs_{side}_cpu": round(
            statistics.median(turn["kd"]["tokens_per_cpu_s"] / turn[side]["tokens_per_cpu_s"] for turn in rounds), 3
        )
        for side in rounds[0]
        if side != "kd"
    }
    return {**ratios, "rounds": rounds, "setting": asdict(setting), "hardware": hardware(LossSetting(device="cpu"))}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers")
    parser.add_argument("--json", action="store_true", help="print only the JSON object on stdout")
    parser.add_argument("--python", type=Path, required=True, help="interpreter of the environment of the peers")
    parser.add_argument("--distillkit", type=Path, required=True, help="checkout of DistillKit")
    parser.add_argument("--sides", nargs="+", default=[*OURS, *PEERS], choices=[*OURS, *PEERS])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--layers", type=int, default=8)
    return parser.parse_args()


if __name__ == "__main__":
    main()
