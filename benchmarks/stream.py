"""From shards to packed batches: tokens a second and core; planning time and memory by number of chains; distance.

    python -m benchmarks.stream [--json] [--tokens N] [--pack-tokens L] [--rows R ...] [--round-trips-ms D ...]

Reading: a cache of synthetic chains (topk-u8, 22 entries a token on average, vocabulary 129,280, row groups of 65,536
tokens) is selected and streamed for one epoch by one rank, once with distributions and once with token ids alone.
Speed is completion tokens over the CPU seconds of the whole process (decompression, checksums, decoding, packing, both
threads). Planning: for each number of chains a selection is written (row groups of 65,536 tokens, lengths exponential
with mean 1,500) and a fresh process loads it and plans an epoch, imports not counted: wall clock of the best of three,
the CPU seconds of the same one, and the MiB that its resident set grew by at the peak. Distance: the same cache lies
in an S3 server on the loopback (SeaweedFS, extra `dev`) behind a link that adds each of `--round-trips-ms`; freezing a
selection and streaming an epoch by wall clock, with row groups read when they are due (`one by one`) and read ahead, in
turns; best of two. The last line is one JSON object; with --json it is the only one.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from stillroom.storage.paths import Location, location
from student_train.data.epoch_plan import EpochPlans, PlanSpec
from student_train.data.freezing import CacheSource, SelectionRequest, freeze
from student_train.data.rows import STORE_AHEAD_GROUPS
from student_train.data.selection import (
    SCHEMA,
    PinnedCache,
    Selection,
    SelectionHeader,
    load_selection,
    write_selection,
)
from student_train.data.stream import PackStream, StreamStats
from teacher_cache.maintenance.copy import copy_caches
from tests.helpers.caches import CacheShape, write_cache
from tests.helpers.object_store import BUCKET, object_store
from tests.helpers.slow_link import slow_link

MEAN_TOKENS = 1500
GROUP_TOKENS = 65_536
MIB = 2**20

Result = dict[str, object]


def main() -> None:
    """Runs the measurements and prints them."""
    arguments = _arguments()
    if arguments.plan_of is not None:
        print(json.dumps(_plan(arguments.plan_of, arguments.pack_tokens)))
        return
    with tempfile.TemporaryDirectory(prefix="stillroom-stream-") as name:
        folder = Path(name)
        result = {**measure_reading(folder, arguments.tokens, arguments.pack_tokens)}
        if arguments.round_trips_ms:
            result["distance"] = measure_distance(folder, arguments.round_trips_ms, arguments.pack_tokens)
        plans = {rows: measure_plan(folder, rows, arguments.pack_tokens) for rows in arguments.rows}
    for key in ("plan_seconds", "plan_cpu_seconds", "plan_mib", "fill_frac"):
        result[key] = {str(rows): plan[key] for rows, plan in plans.items()}
    if not arguments.json:
        _show(result)
    print(json.dumps(result))


def measure_reading(folder: Path, num_tokens: int, pack_tokens: int) -> Result:
    """One epoch of one rank over a new cache of about `num_tokens` completion tokens."""
    cache = write_cache(
        folder / "cache",
        CacheShape(
            num_chains=num_tokens // MEAN_TOKENS,
            codec="topk-u8",
            vocab_size=129_280,
            max_support=64,
            min_tokens=MEAN_TOKENS // 3,
            max_tokens=MEAN_TOKENS * 5 // 3,
            max_prompt_tokens=200,
            rows_per_group=GROUP_TOKENS // MEAN_TOKENS,
            groups_per_shard=6,
            id_skew=4.0,
        ),
    )
    shard_bytes = sum(path.stat().st_size for path in cache.root.glob("chains/*/*.parquet"))
    selection = freeze(folder / "selection.parquet", SelectionRequest([CacheSource(cache.root)]))
    full, full_cpu_s = _stream(selection, pack_tokens, with_signals=True)
    ids, ids_cpu_s = _stream(selection, pack_tokens, with_signals=False)
    total = selection.header.num_tokens
    entries = sum(len(chain.signals.topk_ids_N) for chain in cache.chains) / total
    return {
        "tokens_per_s_per_core": round(total / full_cpu_s),
        "ids_alone_tokens_per_s_per_core": round(total / ids_cpu_s),
        "num_tokens": total,
        "bytes_per_token": round(shard_bytes / total, 1),
        "entries_per_token": round(entries, 1),
        "num_packs": full.num_packs,
        "max_buffer_mib": round(full.max_buffer_bytes / MIB, 1),
        "reads_per_row_group": full.num_group_reads / len(selection.file_G),
        "ids_alone_max_buffer_mib": round(ids.max_buffer_bytes / MIB, 1),
    }


def measure_distance(folder: Path, round_trips_ms: list[float], pack_tokens: int) -> list[Result]:
    """The cache of `measure_reading` in an object store: seconds to freeze it and to stream an epoch of it."""
    store_folder = folder / "store"
    store_folder.mkdir()
    results: list[Result] = []
    with object_store(store_folder) as store:
        os.environ.update(store.environment)
        root = location(f"s3://{BUCKET}/cache")
        copy_caches([folder / "cache"], root)
        for round_trip_ms in round_trips_ms:
            with slow_link(store.port, round_trip_ms / 1000) as port:
                os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
                results.append({"round_trip_ms": round_trip_ms, **_distant(folder, root, pack_tokens)})
    return results


def _distant(folder: Path, root: Location, pack_tokens: int) -> Result:
    freeze_s, epoch_s = [], {0: [0.0] * 0, STORE_AHEAD_GROUPS: [0.0] * 0}
    for _ in range(2):
        started_s = time.perf_counter()
        selection = freeze(folder / "distant.parquet", SelectionRequest([CacheSource(root)]))
        freeze_s.append(time.perf_counter() - started_s)
        for read_ahead_groups, seconds in epoch_s.items():
            started_s = time.perf_counter()
            with PackStream(
                selection,
                PlanSpec(pack_tokens),
                packs_per_step=1,
                num_epochs=1,
                read_ahead_groups=read_ahead_groups,
            ) as stream:
                for _ in stream:
                    pass
            seconds.append(time.perf_counter() - started_s)
    total = selection.header.num_tokens
    return {
        "freeze_s": round(min(freeze_s), 2),
        "one_by_one_tokens_per_s": round(total / min(epoch_s[0])),
        "read_ahead_tokens_per_s": round(total / min(epoch_s[STORE_AHEAD_GROUPS])),
    }


def measure_plan(folder: Path, num_chains: int, pack_tokens: int) -> Result:
    """Loads a selection of so many chains and plans an epoch, in a fresh process, three times."""
    path = folder / f"plan-{num_chains}.parquet"
    _write_lengths(path, num_chains)
    command = [sys.executable, "-m", "benchmarks.stream", "--plan-of", str(path), "--pack-tokens", str(pack_tokens)]
    runs = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(3)]
    return dict(min(runs, key=lambda run: run["plan_seconds"]))


def _plan(path: Path, pack_tokens: int) -> Result:
    # pyarrow imports pandas with its first conversion, where that is installed: not a cost of planning.
    pa.chunked_array([pa.array(np.zeros(1))]).to_numpy()
    # Linux hands the high-water mark on to children: reset it.
    Path("/proc/self/clear_refs").write_text("5")
    before_kib = _status_kib("VmRSS")
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    plans = EpochPlans(load_selection(path), PlanSpec(pack_tokens), num_epochs=None)
    num_packs = plans.num_packs(0)
    seconds, cpu_seconds = time.perf_counter() - started_s, time.process_time() - started_cpu_s
    grown_kib = _status_kib("VmHWM") - before_kib
    fill_frac = int(plans.pieces.num_tokens_P.sum(dtype=np.int64)) / (num_packs * pack_tokens)
    return {
        "plan_seconds": round(seconds, 3),
        "plan_cpu_seconds": round(cpu_seconds, 3),
        "plan_mib": round(grown_kib / 1024, 1),
        "fill_frac": round(fill_frac, 4),
    }


def _status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _stream(selection: Selection, pack_tokens: int, *, with_signals: bool) -> tuple[StreamStats, float]:
    with PackStream(
        selection, PlanSpec(pack_tokens), packs_per_step=1, num_epochs=1, with_signals=with_signals
    ) as stream:
        started_s = time.process_time()
        for _ in stream:
            pass
        return stream.stats, time.process_time() - started_s


def _write_lengths(path: Path, num_chains: int) -> None:
    """A selection whose rows point nowhere: plans read lengths alone."""
    rng = np.random.default_rng(0)
    num_tokens = np.clip(rng.exponential(MEAN_TOKENS, num_chains), 10, 8000).astype(np.int32)
    per_group = math.ceil(GROUP_TOKENS / MEAN_TOKENS)
    number = np.arange(num_chains)
    files = number // (per_group * 75)
    rows = pa.Table.from_pydict(
        {
            "cache": np.zeros(num_chains, np.int16),
            "file": pa.array([f"run/w0-{file:06d}.parquet" for file in files.tolist()]),
            "row_group": (number // per_group % 75).astype(np.int32),
            "row_in_group": (number % per_group).astype(np.int32),
            "sample_id": pa.array([rng.bytes(16).hex() for _ in range(num_chains)]),
            "num_prompt_tokens": rng.integers(50, 300, num_chains).astype(np.int32),
            "num_tokens": num_tokens,
            "weight": np.ones(num_chains, np.float32),
        }
    )
    header = SelectionHeader(
        caches=[PinnedCache(root="nowhere", weight=1.0, chains_version=0, verdicts_version=0)],
        where=None,
        weight=None,
        max_chains=None,
        num_chains=num_chains,
        num_prompt_tokens=0,
        num_tokens=int(num_tokens.sum()),
        num_zero_weight=0,
        num_empty=0,
        teacher_fingerprints=[],
        tokenizer_fingerprints=[],
        template_fingerprints=[],
        codecs=[],
        vocab_size=1,
        max_support=1,
    )
    write_selection(path, rows.cast(SCHEMA), header)


def _show(result: Result) -> None:
    for name, value in result.items():
        print(f"{name:34} {value}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="From shards to packed batches, and planning.")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--tokens", type=int, default=1_500_000, help="completion tokens of the cache that is read")
    parser.add_argument("--pack-tokens", type=int, default=8192)
    parser.add_argument("--rows", type=int, nargs="+", default=[10**4, 10**5, 10**6], help="numbers of chains to plan")
    parser.add_argument("--round-trips-ms", type=float, nargs="*", default=[0, 10, 30], help="added by the link")
    parser.add_argument("--plan-of", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
