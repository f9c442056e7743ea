"""Synthetic caches for tests: real shards, logs, manifests, verdicts and vocabularies on disk, without a teacher.

The distribution of completion token t of chain number `row` names both: rank 0 holds the id `row`, ranks 1.. hold
V/2 + t, V/2 + t + 1, ... So whatever shuffles, cuts and packs the chains can be checked by key afterwards.
"""

import dataclasses
import datetime
import functools
import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.cache.catalog import Catalog, Table, publish
from stillroom.cache.codec import encode
from stillroom.models import write_vocab
from stillroom.schema.manifest import SHARD_METADATA_KEY, RunManifest, ShardHeader, Teacher
from stillroom.schema.records import (
    Draws,
    Float32,
    Int32,
    Message,
    Signals,
    chain_id_of,
    prompt_id_of,
    sample_id_of,
    stable_hash,
)
from stillroom.schema.tables import VERDICT_SCHEMA, VOCAB_SCHEMA, chain_schema, list_of
from stillroom.storage.paths import Location, spool
from teacher_cache.writer.commit import read_sample_ids
from teacher_cache.writer.rows import scalars_of

EOS_ID = 1
THINK_END_ID = 2
NUM_SPECIAL = 3
CREATED_AT = datetime.datetime(2026, 11, 21, tzinfo=datetime.UTC)
SAMPLING = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 4096}


@dataclass(frozen=True)
class Chain:
    """One synthetic row as it was made: what a reader should give back. `row` is its number in the cache."""

    row: int
    sample_id: str
    sample_index: int
    source: str
    split: str
    prompt: str
    text: str
    prompt_ids: Int32
    token_ids: Int32
    signals: Signals
    finish_reason: str
    correct: bool | None


@dataclass(frozen=True)
class SyntheticCache:
    """A cache on disk and the chains in it, in the order of their numbers (and of writing)."""

    root: Path
    chains: list[Chain]
    manifests: list[RunManifest]

    @property
    def catalog(self) -> Catalog:
        return Catalog(self.root)


@dataclass(frozen=True)
class CacheShape:
    """What a synthetic cache is like; lengths in tokens are drawn between the limits."""

    num_chains: int = 40
    codec: str = "topk-f32"
    seed: int = 0
    vocab_size: int = 4000
    max_support: int = 8
    min_tokens: int = 4
    max_tokens: int = 60
    max_prompt_tokens: int = 20
    rows_per_group: int = 4
    groups_per_shard: int = 3
    samples_per_prompt: int = 2
    num_runs: int = 1
    num_workers: int = 1
    heldout_frac: float = 0.15
    unfinished_frac: float = 0.15
    scored: bool = False
    """Chains that were given and not generated: `finish_reason` says nothing of how they end."""
    judged: bool = True
    tokenizer: str = "synthetic"
    draws: int = 0
    temperatures: tuple[float, ...] = ()
    id_skew: float | None = None
    """None writes the identity ids; a number draws them, those near 0 the commoner, for sizes and speeds."""


def make_cache(
    root: Path, num_chains: int = 40, codec: str = "topk-f32", seed: int = 0, **shape: object
) -> SyntheticCache:
    """`write_cache` with fields of CacheShape as keywords. A new cache is a copy of the process' first of its shape."""
    asked = CacheShape(num_chains=num_chains, codec=codec, seed=seed, **shape)  # type: ignore[arg-type]
    if root.exists():
        return write_cache(root, asked)
    made = _make_template(asked)
    shutil.copytree(made.root, root)
    return dataclasses.replace(made, root=root, chains=[*made.chains])


@functools.cache
def _make_template(shape: CacheShape) -> SyntheticCache:
    return write_cache(Path(_templates().name) / stable_hash(dataclasses.astuple(shape)), shape)


@functools.cache
def _templates() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="templates-")


def write_cache(root: Path, shape: CacheShape) -> SyntheticCache:
    """Writes a cache below `root`, or more rows into it; shards go to runs and workers in turn."""
    if shape.id_skew is None:
        assert max(shape.num_chains, shape.max_tokens + shape.max_support) < shape.vocab_size // 2
    rng = np.random.default_rng(shape.seed)
    teacher = _manifest(shape, 0).teacher.fingerprint
    return write_chains(root, shape, [_chain(shape, teacher, row, rng) for row in range(shape.num_chains)])


def write_chains(root: Path, shape: CacheShape, chains: list[Chain], tokenizer: Any = None) -> SyntheticCache:
    """Writes given chains below `root`, and the vocabulary of `tokenizer` or that of synthetic chains."""
    catalog = Catalog.create(root)
    manifests = [_manifest(shape, run) for run in range(shape.num_runs)]
    for manifest in manifests:
        catalog.write_run(manifest)
    rows_per_shard = shape.rows_per_group * shape.groups_per_shard
    for number in range(math.ceil(len(chains) / rows_per_shard)):
        rows = chains[number * rows_per_shard : (number + 1) * rows_per_shard]
        run = manifests[number % shape.num_runs]
        worker = f"w{number // shape.num_runs % shape.num_workers}"
        _write_shard(catalog.chains, shape, run, worker, rows)
    if shape.judged:
        _write_verdicts(catalog.verdicts, chains)
    if tokenizer is None:
        _write_vocab(catalog, shape, manifests[0].teacher.tokenizer_fingerprint)
    else:
        write_vocab(catalog.vocab_path(manifests[0].teacher.tokenizer_fingerprint), tokenizer)
    return SyntheticCache(root, chains, manifests)


def on_disk(path: Location) -> Path:
    """The path of a cache that lies in a folder."""
    assert isinstance(path, Path)
    return path


def visible_ids(root: Location, table: str = "chains") -> list[str]:
    """Sample ids of the rows that a cache shows, sorted."""
    catalog = Catalog(root)
    shown = {"chains": catalog.chains, "failures": catalog.failures}[table]
    return sorted(one for file in shown.files() for one in read_sample_ids(shown.path_of(file)))


def damage(path: Location, at_frac: float = 0.5) -> None:
    """Flips one byte inside a file."""
    path = on_disk(path)
    data = bytearray(path.read_bytes())
    data[int(len(data) * at_frac)] ^= 0xFF
    path.write_bytes(bytes(data))


def _manifest(shape: CacheShape, run: int) -> RunManifest:
    weights, tokenizer, template = (
        stable_hash("weights", shape.seed),
        stable_hash("tokenizer", shape.tokenizer),
        stable_hash("template", shape.tokenizer),
    )
    teacher = Teacher(
        model="synthetic-teacher",
        fingerprint=stable_hash(weights, tokenizer, template),
        weights_fingerprint=weights,
        tokenizer_fingerprint=tokenizer,
        template_fingerprint=template,
        vocab_size=shape.vocab_size,
    )
    return RunManifest(
        run_id=stable_hash("run", shape.seed, shape.tokenizer, run)[:16],
        name=f"synthetic{run}",
        kind="generate",
        created_at=CREATED_AT.isoformat(),
        teacher=teacher,
        sampling=SAMPLING,
        capture={"codec": shape.codec, "max_support": shape.max_support, "nucleus": None},
        engine={"kind": "none"},
        prompts={"sources": ["sums", "stories"]},
        reasoning={"start": "<think>", "end": "</think>"},
        software={},
    )


def _chain(shape: CacheShape, teacher_fingerprint: str, row: int, rng: np.random.Generator) -> Chain:
    question, sample_index = divmod(row, shape.samples_per_prompt)
    # Prompts draw from a generator of their own, so that samples of one prompt share its tokens.
    prompt_rng = np.random.default_rng([shape.seed, question])
    num_prompt = int(prompt_rng.integers(2, shape.max_prompt_tokens + 1))
    prompt_ids = prompt_rng.integers(NUM_SPECIAL, shape.vocab_size, num_prompt).astype(np.int32)
    split = "heldout" if prompt_rng.random() < shape.heldout_frac else "train"
    num_tokens = int(rng.integers(shape.min_tokens, shape.max_tokens + 1))
    finished = bool(rng.random() >= shape.unfinished_frac)
    signals = _signals(shape, row, num_tokens, rng)
    token_ids = _sample(shape, signals, rng)
    if finished:
        token_ids[-1] = EOS_ID
    token_ids[num_tokens // 2] = THINK_END_ID
    signals = _agreeing(signals, token_ids)
    return Chain(
        row=row,
        sample_index=sample_index,
        sample_id=sample_id_of(teacher_fingerprint, prompt_ids.tolist(), SAMPLING, shape.seed, sample_index),
        source="sums" if question % 2 == 0 else "stories",
        split=split,
        prompt=f"question {question} of {shape.seed}",
        text=" ".join(f"w{token}" for token in token_ids[: num_tokens - finished]),
        prompt_ids=prompt_ids,
        token_ids=token_ids,
        signals=signals,
        finish_reason="scored" if shape.scored else "stop" if finished else "length",
        correct=bool(rng.random() < 0.6) if finished else None,
    )


def _signals(shape: CacheShape, row: int, num_tokens: int, rng: np.random.Generator) -> Signals:
    low = min(2, shape.max_support)
    n_T = np.minimum(low + rng.geometric(3.0 / (shape.max_support + 2), num_tokens) - 1, shape.max_support).astype(
        np.int32
    )
    rank_N = _ranks(n_T)
    token_N = np.repeat(np.arange(num_tokens), n_T)
    if shape.id_skew is None:
        ids_N = np.where(rank_N == 0, row, shape.vocab_size // 2 + token_N + rank_N - 1)
    else:
        ids_N = (shape.vocab_size * rng.random(len(token_N)) ** shape.id_skew).astype(np.int64)
    weight_N = (1.0 + rank_N) ** -rng.uniform(1.0, 4.0, num_tokens)[token_N]
    starts_T = np.cumsum(n_T) - n_T
    tail_T = 10.0 ** rng.uniform(-6, -1.5, num_tokens)
    prob_N = weight_N / np.add.reduceat(weight_N, starts_T)[token_N] * (1 - tail_T)[token_N]
    entropy_T = -np.add.reduceat(prob_N * np.log(prob_N), starts_T)
    sampled_rank_T = np.where(rng.random(num_tokens) < 0.02, n_T + 1, 1 + rng.integers(0, n_T))
    inside_T = sampled_rank_T <= n_T
    sampled_N = starts_T + np.where(inside_T, sampled_rank_T - 1, 0)
    sampled_logprob_T = np.where(inside_T, np.log(prob_N[sampled_N]), np.log(tail_T) - 1)
    draws, log_partitions_TS = _extras(shape, n_T, tail_T, rng)
    return Signals(
        topk_n_T=n_T,
        topk_ids_N=ids_N.astype(np.int32),
        topk_logprobs_N=np.log(prob_N).astype(np.float32),
        tail_logmass_T=np.log(tail_T).astype(np.float32),
        sampled_logprob_T=sampled_logprob_T.astype(np.float32),
        sampled_rank_T=sampled_rank_T.astype(np.int32),
        entropy_T=entropy_T.astype(np.float32),
        draws=draws,
        log_partitions_TS=log_partitions_TS,
    )


def _extras(
    shape: CacheShape, n_T: Int32, tail_T: np.ndarray[Any, np.dtype[np.float64]], rng: np.random.Generator
) -> tuple[Draws | None, Float32 | None]:
    """Draws for tokens of full support, with ids above all support ids; log-partitions that tell the token."""
    # Nothing is drawn where the shape asks for nothing, so that older tests keep their numbers.
    draws = partitions_TS = None
    if shape.draws:
        draw_n_T = np.where(n_T == shape.max_support, shape.draws, 0).astype(np.int32)
        token_D = np.repeat(np.arange(len(n_T)), draw_n_T)
        ids_D = (shape.vocab_size - 1 - rng.integers(0, 50, len(token_D))).astype(np.int32)
        logprobs_D = np.log(tail_T[token_D] / 50).astype(np.float32)
        draws = Draws(draw_n_T, ids_D, logprobs_D)
    if shape.temperatures:
        partitions_TS = np.add.outer(np.arange(len(n_T)) / 64.0, np.asarray(shape.temperatures)).astype(np.float32)
    return draws, partitions_TS


def _sample(shape: CacheShape, signals: Signals, rng: np.random.Generator) -> Int32:
    starts_T = np.cumsum(signals.topk_n_T) - signals.topk_n_T
    inside_T = signals.sampled_rank_T <= signals.topk_n_T
    inner_T = signals.topk_ids_N[starts_T + np.where(inside_T, signals.sampled_rank_T - 1, 0)]
    outer_T = rng.integers(NUM_SPECIAL, shape.vocab_size, len(inside_T))
    return np.where(inside_T, inner_T, outer_T).astype(np.int32)


def _agreeing(signals: Signals, token_ids: Int32) -> Signals:
    """The signals with ranks and log probabilities of the tokens that the chain really has."""
    n_T = signals.topk_n_T
    token_N = np.repeat(np.arange(len(n_T)), n_T)
    hit_N = signals.topk_ids_N == token_ids[token_N]
    rank_T = n_T + 1
    rank_T[token_N[hit_N]] = _ranks(n_T)[hit_N] + 1
    last_T = signals.topk_logprobs_N[np.cumsum(n_T) - 1]
    logprob_T = np.minimum(signals.tail_logmass_T, last_T) - 1
    logprob_T[token_N[hit_N]] = signals.topk_logprobs_N[hit_N]
    return dataclasses.replace(signals, sampled_rank_T=rank_T, sampled_logprob_T=logprob_T)


def _ranks(n_T: Int32) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    starts_T = np.cumsum(n_T) - n_T
    return np.arange(int(n_T.sum())) - np.repeat(starts_T, n_T)


def _encoded(shape: CacheShape, chains: Sequence[Chain]) -> dict[str, pa.Array]:
    """Signal columns, encoded row group by row group."""
    parts = []
    for first in range(0, len(chains), shape.rows_per_group):
        group = chains[first : first + shape.rows_per_group]
        parts.append(encode(shape.codec, [chain.signals for chain in group]))
    return {name: pa.concat_arrays([part[name] for part in parts]) for name in parts[0]}


def _write_shard(table: Table, shape: CacheShape, run: RunManifest, worker: str, chains: Sequence[Chain]) -> None:
    application = f"stillroom/{run.run_id}/{worker}"
    sequence = (table.last_sequence(application) or 0) + 1
    header = ShardHeader(
        codec=shape.codec,
        max_support=shape.max_support,
        nucleus=None,
        draws=shape.draws,
        temperatures=list(shape.temperatures),
        entropy="support",
        vocab_size=shape.vocab_size,
        run_id=run.run_id,
        worker=worker,
        teacher_fingerprint=run.teacher.fingerprint,
        tokenizer_fingerprint=run.teacher.tokenizer_fingerprint,
        template_fingerprint=run.teacher.template_fingerprint,
    )
    schema = chain_schema(shape.codec).with_metadata({SHARD_METADATA_KEY: header.model_dump_json().encode()})
    plain = pa.Table.from_pylist([_row(chain, run.run_id, worker) for chain in chains])
    signals = _encoded(shape, chains)
    token_ids = {
        "token_ids": pa.array([chain.token_ids for chain in chains], list_of(pa.int32())),
        "prompt_token_ids": pa.array([chain.prompt_ids for chain in chains], list_of(pa.int32())),
    }
    columns = {**{name: plain.column(name) for name in plain.column_names}, **token_ids, **signals}
    data = pa.Table.from_arrays([_typed(columns[field.name], field.type) for field in schema], schema=schema)
    temp = spool(table.folder) / f".{worker}-{sequence}.tmp"
    dictionary = [f"{name}.list.element" for name in columns if name.startswith(("topk_", "tail_"))]
    pq.write_table(
        data,
        temp,
        row_group_size=shape.rows_per_group,
        compression="zstd",
        compression_level=3,
        use_dictionary=dictionary,
        dictionary_pagesize_limit=1 << 22,
        write_page_checksum=True,
    )
    file = publish(temp, table.folder, f"{run.run_id}/{worker}-{sequence:06d}", len(chains))
    table.commit([file], application, sequence)


def _typed(column: pa.ChunkedArray | pa.Array, kind: pa.DataType) -> pa.Array:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array if array.type == kind else array.cast(kind)


def _row(chain: Chain, run_id: str, worker: str) -> dict[str, object]:
    messages = (Message("user", chain.prompt),)
    reasoning_end = int(np.flatnonzero(chain.token_ids == THINK_END_ID)[0]) + 1
    return {
        "sample_id": chain.sample_id,
        "chain_id": chain_id_of(chain.prompt_ids.tolist(), chain.token_ids.tolist()),
        "prompt_id": prompt_id_of(messages),
        "sample_index": chain.sample_index,
        "run_id": run_id,
        "worker": worker,
        "created_at": CREATED_AT,
        "source": chain.source,
        "split": chain.split,
        "messages": [{"role": "user", "content": chain.prompt}],
        "reference": "42",
        "metadata": json.dumps({"row": chain.row}),
        "text": chain.text,
        "reasoning": chain.text[: len(chain.text) // 2],
        "answer": chain.text[len(chain.text) // 2 :],
        "reasoning_end": reasoning_end,
        "finish_reason": chain.finish_reason,
        "seed": chain.row,
        "num_prompt_tokens": len(chain.prompt_ids),
        "num_tokens": len(chain.token_ids),
        "num_reasoning_tokens": reasoning_end,
        **scalars_of(chain.signals),
    }


def _write_verdicts(table: Table, chains: Sequence[Chain]) -> None:
    judged = [chain for chain in chains if chain.correct is not None]
    rows = [
        {
            "sample_id": chain.sample_id,
            "judge": "exact",
            "correct": chain.correct,
            "score": float(chain.correct or 0),
            "judged_at": CREATED_AT,
        }
        for chain in judged
    ]
    temp = spool(table.folder) / ".verdicts.tmp"
    pq.write_table(pa.Table.from_pylist(rows, schema=VERDICT_SCHEMA), temp)
    sequence = (table.last_sequence("stillroom/judge/w0") or 0) + 1
    file = publish(temp, table.folder, f"judge/w0-{sequence:06d}", len(rows))
    table.commit([file], "stillroom/judge/w0", sequence)


def _write_vocab(catalog: Catalog, shape: CacheShape, tokenizer_fingerprint: str) -> None:
    ids = range(shape.vocab_size)
    path = catalog.vocab_path(tokenizer_fingerprint)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "token_id": list(ids),
        "piece": [f"w{token}" for token in ids],
        "is_special": [token < NUM_SPECIAL for token in ids],
    }
    pq.write_table(pa.Table.from_pydict(columns, schema=VOCAB_SCHEMA), path)
