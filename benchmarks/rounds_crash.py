"""Kills either side of two on-policy rounds at random and compares the result with that of undisturbed rounds.

    python -m benchmarks.rounds_crash [--kills N] [--seed S] [--folder FOLDER] [--json]

`teacher-cache rounds` and `student-train rounds` run side by side on a tiny teacher, with real vLLM and DeepSpeed; one
of them is killed with SIGKILL every now and then and started again. `same_weights` says whether the student of the last
round has the same bytes as undisturbed; `lost` and `duplicated` count rows of the caches of chains and of scores;
`orphans` are files that no log names. Exit code 1 unless all is as it should be. The last line is one JSON object.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from stillroom.cache.catalog import Catalog
from stillroom.log import note
from stillroom.sql.session import open_session
from tests.helpers.tiny import make_tiny_teacher

SIDES = ("teacher-cache", "student-train")
SIZE, SAMPLES, ROUNDS = 24, 2, 2
EAGER = {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
ENGINE = {"dtype": "float32", "max_num_seqs": 4, "enforce_eager": True, "kv_cache_gb": 0.25}
MIN_S, MAX_S = 3.0, 40.0
"""Seconds between kills: from the imports of a part to the middle of the next one."""


def config_of(folder: Path) -> dict[str, Any]:
    """Two rounds, small enough for a minute each."""
    return {
        "folder": str(folder / "rounds"),
        "rounds": ROUNDS,
        "student": str(folder.parent / "student"),
        "generate": {
            "prompts": {
                "heldout_frac": 0.25,
                "sources": [{"kind": "reasoning_gym", "name": "sums", "task": "chain_sum", "size": SIZE}],
            },
            "sampling": {"max_tokens": 24, "samples": SAMPLES},
            "capture": {"max_support": 1, "draws": 0},
            "engine": ENGINE,
            "shard": {"max_minutes": 0.02},
        },
        "score": {
            "teacher": {"model": str(folder.parent / "teacher")},
            "engine": ENGINE,
            "shard": {"max_minutes": 0.02},
        },
        "train": {
            "data": {"where": "split = 'train'", "pack_tokens": 256},
            "stages": [
                {
                    "losses": {"policy_gradient": 1, "reverse_kl": 0.5},
                    "epochs": 4,
                    "batch_tokens": 512,
                    "learning_rate": 1e-3,
                }
            ],
            "engine": {"precision": "float32"},
            "checkpoint": {"every_steps": 2},
        },
        "answers": None,
    }


def run_rounds(folder: Path, num_kills: int, chance: random.Random) -> int:
    """Runs both sides to their end, with `num_kills` kills; returns how many there were."""
    folder.mkdir(parents=True)
    config = folder / "rounds.yaml"
    config.write_text(yaml.safe_dump(config_of(folder)))
    sides: dict[str, subprocess.Popen[bytes]] = {}
    killed, next_s = 0, time.monotonic() + chance.uniform(MIN_S, MAX_S)
    while len(sides) < len(SIDES) or any(side.poll() != 0 for side in sides.values()):
        for name in SIDES:
            code = sides[name].poll() if name in sides else -signal.SIGKILL
            if code == -signal.SIGKILL:
                module = f"{name.replace('-', '_')}.cli"
                command = [sys.executable, "-P", "-m", module, "rounds", str(config)]
                with (folder / f"{name}.log").open("ab") as log:
                    sides[name] = subprocess.Popen(command, env={**os.environ, **EAGER}, stdout=log, stderr=log)
            elif code not in (None, 0):
                raise SystemExit(f"{name} rounds ended with {code}: see {folder / name}.log")
        if killed < num_kills and time.monotonic() >= next_s:
            # Whoever is at work: a side that waits has nothing to lose.
            state = folder / "rounds" / "state.json"
            running = json.loads(state.read_text())["running"] if state.exists() else None
            name = running["by"] if running is not None and chance.random() < 0.9 else chance.choice(SIDES)
            if sides[name].poll() is None:
                sides[name].kill()
                sides[name].wait()
                killed += 1
                where = "nothing" if running is None else f"round {running['round']}, {running['part']}"
                note(f"kill {killed} of {num_kills}: {name} during {where}")
            next_s = time.monotonic() + chance.uniform(MIN_S, MAX_S)
        time.sleep(0.2)
    return killed


def weights_of(folder: Path) -> str:
    """Hash of the last round's student."""
    path = folder / "rounds" / f"round-{ROUNDS}" / "student" / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def count_rows(folder: Path) -> dict[str, int]:
    """Rows lost and duplicated over all caches of all rounds, and files that no log names."""
    counts = {"rows": 0, "lost": 0, "duplicated": 0, "orphans": 0}
    for number in range(1, ROUNDS + 1):
        for name in ("chains", "scored"):
            catalog = Catalog(folder / "rounds" / f"round-{number}" / name)
            with open_session(catalog) as session:
                query = "SELECT count(*) AS n, count(DISTINCT sample_id) AS d FROM chains"
                (row,) = session.arrow(query).to_pylist()
            counts["rows"] += row["n"]
            counts["lost"] += SIZE * SAMPLES - row["d"]
            counts["duplicated"] += row["n"] - row["d"]
            shards = Path(str(catalog.chains.folder))
            named = {file.path for file in catalog.chains.files()}
            found = {str(path.relative_to(shards)) for path in shards.rglob("*.parquet")}
            counts["orphans"] += len({one for one in found if not one.startswith("_")} - named)
    return counts


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="keep everything here instead of a temporary folder")
    parser.add_argument("--json", action="store_true", help="print the JSON object alone")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        make_tiny_teacher(folder / "teacher")
        # Of the same vocabulary, and as a student with other weights.
        make_tiny_teacher(folder / "student", seed=1)
        started_s = time.monotonic()
        run_rounds(folder / "quiet", 0, random.Random(given.seed))
        quiet_s = time.monotonic() - started_s
        killed = run_rounds(folder / "killed", given.kills, random.Random(given.seed))
        counts = count_rows(folder / "killed")
        # Two chains of a prompt with the same tokens are scored once, kills or not.
        counts["lost"] -= count_rows(folder / "quiet")["lost"]
        result = {
            "kills": killed,
            **counts,
            "same_weights": weights_of(folder / "quiet") == weights_of(folder / "killed"),
            "quiet_s": round(quiet_s, 1),
            "seconds": round(time.monotonic() - started_s, 1),
        }
    if not given.json:
        for key, value in result.items():
            print(f"{key:13} {value}")
    print(json.dumps(result))
    if counts["lost"] or counts["duplicated"] or not result["same_weights"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
