"""Bytes, fidelity and speed of the codecs on anybody's distributions.

    python -m benchmarks.codec [--input FILE.npz | --input CACHE] [--json] [--repeat N]

FILE.npz holds `ids` int32 [T, K] by rank, `logprobs` float32 [T, K] (natural, of the whole vocabulary), `sampled` int32
[T], `lengths` int32 (tokens of each chain, adding up to T) and `vocab_size`; `rank`, `sampled_logprob` and `entropy`
[T] are used where they are there. Their supports are cut at nucleus 0.999 and 64 entries for every codec. A cache keeps
the supports and draws that it holds, and its codes are the original; without --input it is the demo's
(runs/demo/cache). Everything is written as `teacher-cache build` writes it, with empty texts. bytes_per_token is the
whole file over T; KL is of stored against original, the tail one outcome, in nats.
Speeds are of CPU seconds of one thread, best of N: encode from captured arrays (of a cache, from supports)
to a closed file, decode from file to arrays. `naive` is Parquet as one would write it: nested lists of int32 and
float32, snappy.

The last line is one JSON object; with --json it is the only one.
"""

import argparse
import datetime
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.cache.catalog import Catalog
from stillroom.cache.shards import open_shard, read_signals
from stillroom.errors import ConfigError, DataError, StillroomError
from stillroom.schema.manifest import ShardHeader
from stillroom.schema.records import (
    Capture,
    Float32,
    Int32,
    Int64,
    Message,
    Signals,
    chain_id_of,
    prompt_id_of,
    stable_hash,
)
from stillroom.schema.tables import CODECS
from teacher_cache.writer.rows import ChainRow, scalars_of, support_of
from teacher_cache.writer.shard import ShardFile

DEMO_CACHE = Path("runs/demo/cache")
MAX_SUPPORT, NUCLEUS = 64, 0.999
ROW_GROUP_TOKENS = 65_536
HASH = "0" * 32

Result = dict[str, float]


@dataclass(frozen=True, slots=True)
class Chain:
    """A completion's tokens int32 [T], and what is stored of them: cut from what was captured each time it is asked."""

    token_ids_T: Int32
    signals: Callable[[], Signals]


@dataclass(frozen=True, slots=True)
class Distributions:
    """Chains with what their shards' header says of them, and the flat candidates that a naive file would hold."""

    chains: list[Chain]
    vocab_size: int
    max_support: int
    naive_n_T: Int32
    naive_ids_N: Int32
    naive_logprobs_N: Float32
    draws: int = 0
    temperatures: tuple[float, ...] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.naive_n_T)


def main() -> None:
    """Measures every codec and prints a table and the JSON line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codec")
    parser.add_argument("--input", type=Path, default=DEMO_CACHE, help="npz file or cache; default: the demo's cache")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--repeat", type=int, default=3, help="runs of which the fastest counts")
    options = parser.parse_args()
    pa.set_cpu_count(1)
    try:
        data = load_npz(options.input) if options.input.is_file() else load_cache(options.input)
        with tempfile.TemporaryDirectory(prefix="stillroom-codec-") as name:
            results = measure(data, Path(name), options.repeat)
    except StillroomError as error:
        parser.exit(error.exit_code, f"{error}\n")
    if not options.json:
        print(f"{data.num_tokens} tokens, {len(data.chains)} chains, vocabulary {data.vocab_size}")
        for codec, one in results.items():
            print(f"{codec:10}", "  ".join(f"{key} {value:.4g}" for key, value in one.items()))
    print(json.dumps({"num_tokens": data.num_tokens, "codecs": results}))


def load_npz(path: Path) -> Distributions:
    """The file's arrays. Raises DataError where it lacks one or they do not fit together."""
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not an npz file: {error}") from error
    missing = {"ids", "logprobs", "sampled", "lengths", "vocab_size"} - arrays.keys()
    if missing:
        raise DataError(f"{path} lacks {min(missing)}: it needs ids, logprobs, sampled, lengths and vocab_size")
    ids_TK, logprobs_TK = arrays["ids"].astype(np.int32), arrays["logprobs"].astype(np.float32)
    sampled_T, lengths_R = arrays["sampled"].astype(np.int32), arrays["lengths"].astype(np.int64)
    if ids_TK.ndim != 2 or ids_TK.shape != logprobs_TK.shape or len(ids_TK) != len(sampled_T):
        raise DataError(
            f"{path}: ids {ids_TK.shape}, logprobs {logprobs_TK.shape} and sampled {sampled_T.shape} differ"
        )
    if lengths_R.sum() != len(sampled_T) or (lengths_R < 1).any():
        raise DataError(f"{path}: lengths add up to {lengths_R.sum()}, there are {len(sampled_T)} tokens")
    hit_TK = ids_TK == sampled_T[:, None]
    place_T, inside_T = hit_TK.argmax(axis=1), hit_TK.any(axis=1)
    found_T = np.take_along_axis(logprobs_TK, place_T[:, None], axis=1)[:, 0]
    whole = Capture(
        token_ids_T=sampled_T,
        sampled_logprob_T=arrays.get("sampled_logprob", np.where(inside_T, found_T, logprobs_TK[:, -1])),
        sampled_rank_T=arrays.get("rank", np.where(inside_T, place_T + 1, ids_TK.shape[1] + 1)),
        topk_ids_TK=ids_TK,
        topk_logprobs_TK=logprobs_TK,
        entropy_T=arrays.get("entropy"),
    )
    n_T = np.full(len(ids_TK), ids_TK.shape[1], np.int32)
    chains = [_captured(one) for one in _chains(whole, lengths_R)]
    return Distributions(
        chains, int(arrays["vocab_size"]), MAX_SUPPORT, n_T, ids_TK.reshape(-1), logprobs_TK.reshape(-1)
    )


def load_cache(root: Path) -> Distributions:
    """Everything that a cache holds. Raises ConfigError where there is none, DataError where its captures differ."""
    if not root.exists():
        raise ConfigError(f"{root} does not exist: run `make demo` once, or name a file with --input FILE.npz")
    catalog = Catalog(root)
    chains: list[Chain] = []
    headers: list[ShardHeader] = []
    for file in catalog.chains.files():
        shard, header = open_shard(catalog.chains.path_of(file))
        with shard:
            headers.append(header)
            for group in range(shard.num_row_groups):
                table, signals, offsets = read_signals(shard, header, group, ["token_ids"], file.path)
                tokens_T = table.column("token_ids").combine_chunks().flatten().to_numpy()
                for start, stop in pairwise(offsets.tolist()):
                    chains.append(_stored(tokens_T[start:stop], signals.slice(start, stop)))
    captures = {(one.vocab_size, one.max_support, one.draws, tuple(one.temperatures)) for one in headers}
    if len(captures) != 1:
        raise DataError(f"{root} holds {len(captures)} kinds of captures: name a cache of one")
    vocab_size, max_support, draws, temperatures = captures.pop()
    n_T, ids_N, logprobs_N, _ = _flat([one.signals() for one in chains])
    return Distributions(chains, vocab_size, max_support, n_T, ids_N, logprobs_N, draws, temperatures)


def measure(data: Distributions, folder: Path, repeat: int) -> dict[str, Result]:
    """Every codec's figures, and the naive layout's."""
    plain = [_plain_columns(number, one) for number, one in enumerate(data.chains)]
    original = [one.signals() for one in data.chains]
    results = {"naive": _measure_naive(data, folder / "naive.parquet", repeat)}
    for codec in CODECS:
        path = folder / f"{codec}.parquet"

        def write(codec: str = codec, path: Path = path) -> None:
            shard = ShardFile(path, _header(codec, data), ROW_GROUP_TOKENS)
            for columns, one in zip(plain, data.chains, strict=True):
                shard.add(ChainRow(**columns, signals=one.signals()))
            shard.close()

        def read(path: Path = path) -> list[Signals]:
            file, header = open_shard(path)
            with file:
                groups = range(file.num_row_groups)
                return [read_signals(file, header, group, [], str(path))[1] for group in groups]

        write()
        read()
        encode_s, decode_s = _best(write, repeat), _best(read, repeat)
        kl_T = divergences(original, read())
        results[codec] = {
            "bytes_per_token": path.stat().st_size / len(kl_T),
            "kl_mean": float(kl_T.mean()),
            "kl_max": float(kl_T.max()),
            "encode_tokens_per_s": len(kl_T) / encode_s,
            "decode_tokens_per_s": len(kl_T) / decode_s,
        }
    return results


def divergences(original: list[Signals], stored: list[Signals]) -> npt.NDArray[np.float64]:
    """KL of stored against original of each token, nats: support id by id, and the tail as one outcome."""
    n_T, ids_N, logprobs_N, tail_T = _flat(original)
    stored_n_T, stored_ids_N, stored_logprobs_N, stored_tail_T = _flat(stored)
    np.testing.assert_array_equal(n_T, stored_n_T)
    token_N = np.repeat(np.arange(len(n_T)), n_T)
    here_N, there_N = np.lexsort((ids_N, token_N)), np.lexsort((stored_ids_N, token_N))
    np.testing.assert_array_equal(ids_N[here_N], stored_ids_N[there_N])
    logprob_N = logprobs_N[here_N].astype(np.float64)
    difference_N = logprob_N - stored_logprobs_N[there_N]
    kl_T = np.add.reduceat(np.exp(logprob_N) * difference_N, np.cumsum(n_T) - n_T)
    some_T = np.isfinite(tail_T)
    tail_T = tail_T[some_T].astype(np.float64)
    kl_T[some_T] += np.exp(tail_T) * (tail_T - stored_tail_T[some_T])
    return kl_T


def _flat(rows: list[Signals]) -> tuple[Int32, Int32, Float32, Float32]:
    """Support sizes [T], ids and log probabilities [N], log tail masses [T] of all rows."""
    return (
        np.concatenate([one.topk_n_T for one in rows]),
        np.concatenate([one.topk_ids_N for one in rows]),
        np.concatenate([one.topk_logprobs_N for one in rows]),
        np.concatenate([one.tail_logmass_T for one in rows]),
    )


def _captured(capture: Capture) -> Chain:
    return Chain(capture.token_ids_T, lambda: support_of(capture, MAX_SUPPORT, NUCLEUS))


def _stored(token_ids_T: Int32, signals: Signals) -> Chain:
    return Chain(token_ids_T, lambda: signals)


def _chains(capture: Capture, lengths_R: Int64) -> list[Capture]:
    stops_R = np.cumsum(lengths_R)
    found = []
    for start, stop in zip(stops_R - lengths_R, stops_R, strict=True):
        part = slice(int(start), int(stop))
        found.append(
            Capture(
                capture.token_ids_T[part],
                capture.sampled_logprob_T[part],
                capture.sampled_rank_T[part],
                capture.topk_ids_TK[part],
                capture.topk_logprobs_TK[part],
                None if capture.entropy_T is None else capture.entropy_T[part],
            )
        )
    return found


def _plain_columns(number: int, chain: Chain) -> dict[str, Any]:
    message = Message("user", f"prompt {number}")
    tokens = chain.token_ids_T.tolist()
    return {
        "sample_id": stable_hash("benchmark", number),
        "chain_id": chain_id_of([0], tokens),
        "prompt_id": prompt_id_of([message]),
        "sample_index": 0,
        "run_id": "benchmark",
        "worker": "w0",
        "created_at": datetime.datetime(2026, 11, 21, tzinfo=datetime.UTC),
        "source": "benchmark",
        "split": "train",
        "messages": [{"role": message.role, "content": message.content}],
        "prompt_token_ids": [0],
        "reference": None,
        "metadata": "{}",
        "text": "",
        "reasoning": None,
        "answer": "",
        "token_ids": chain.token_ids_T,
        "reasoning_end": 0,
        "finish_reason": "stop",
        "seed": number,
        "num_prompt_tokens": 1,
        "num_tokens": len(tokens),
        "num_reasoning_tokens": 0,
        **scalars_of(chain.signals()),
    }


def _header(codec: str, data: Distributions) -> ShardHeader:
    return ShardHeader(
        codec=codec,
        max_support=data.max_support,
        nucleus=NUCLEUS,
        entropy="support",
        draws=data.draws,
        temperatures=list(data.temperatures),
        vocab_size=data.vocab_size,
        run_id="benchmark",
        worker="w0",
        teacher_fingerprint=HASH,
        tokenizer_fingerprint=HASH,
        template_fingerprint=HASH,
    )


def _measure_naive(data: Distributions, path: Path, repeat: int) -> Result:
    """All candidates, as nested lists, one row a token."""
    token_ids_T = np.concatenate([one.token_ids_T for one in data.chains])
    offsets_T = np.concatenate([[0], np.cumsum(data.naive_n_T)]).astype(np.int32)

    def write() -> None:
        columns = {
            "token_id": token_ids_T,
            "ids": pa.ListArray.from_arrays(offsets_T, pa.array(data.naive_ids_N)),
            "logprobs": pa.ListArray.from_arrays(offsets_T, pa.array(data.naive_logprobs_N)),
        }
        pq.write_table(pa.table(columns), path, compression="snappy")

    def read() -> list[Float32]:
        table = pq.read_table(path, use_threads=False)
        return [table[name].combine_chunks().flatten().to_numpy() for name in ("ids", "logprobs")]

    num_tokens = data.num_tokens
    encode_s, decode_s = _best(write, repeat), _best(read, repeat)
    return {
        "bytes_per_token": path.stat().st_size / num_tokens,
        "kl_mean": 0.0,
        "kl_max": 0.0,
        "encode_tokens_per_s": num_tokens / encode_s,
        "decode_tokens_per_s": num_tokens / decode_s,
    }


def _best(action: Callable[[], object], repeat: int) -> float:
    """CPU seconds of the fastest run."""
    seconds = []
    for _ in range(repeat):
        start = time.process_time()
        action()
        seconds.append(time.process_time() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
