"""Writes the golden shards: `python -m tests.helpers.golden`, once a format version, never to make a test pass."""

import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.cache.codec import encode
from stillroom.schema.manifest import SHARD_METADATA_KEY, ShardHeader
from stillroom.schema.records import Capture, Float32, Int32, Message, chain_id_of, prompt_id_of, sample_id_of
from stillroom.schema.tables import CHAIN_FIELDS, CODECS, TOKEN_FIELDS, chain_schema
from teacher_cache.writer.rows import scalars_of, support_of
from tests.helpers import ROOT

FOLDER = ROOT / "schemas" / "golden"
VOCAB_SIZE = 151_936
TEACHER = "0123456789abcdef0123456789abcdef"


def captures() -> list[Capture]:
    """Two chains of 3 and 2 tokens with hand-written distributions: sure, unsure, a tail of none, ids past 2^17."""
    probs = [
        [[0.6, 0.3, 0.0999], [0.999, 0.0005, 0.0001], [0.4, 0.3, 0.1]],
        [[1.0, 1e-30, 1e-31], [0.5, 0.25, 0.125]],
    ]
    ids = [
        [[7, 131_072, 151_935], [3, 2, 1], [0, 5, 9]],
        [[151_643, 11, 12], [42, 43, 44]],
    ]
    ranks = [[1, 1, 3], [1, 70_000]]
    found = []
    for chain_probs, chain_ids, chain_ranks in zip(probs, ids, ranks, strict=True):
        logprobs_TK = np.log(np.array(chain_probs, np.float64)).astype(np.float32)
        ids_TK = np.array(chain_ids, np.int32)
        rank_T = np.array(chain_ranks, np.int32)
        inside_T = rank_T <= 3
        column_T = np.where(inside_T, rank_T - 1, 0)
        rows = np.arange(len(rank_T))
        sampled_T = np.where(inside_T, logprobs_TK[rows, column_T], np.float32(-14.25)).astype(np.float32)
        token_T = np.where(inside_T, ids_TK[rows, column_T], 99_999).astype(np.int32)
        found.append(Capture(token_T, sampled_T, rank_T, ids_TK, logprobs_TK, *_extras(len(token_T))))
    return found


def _extras(num_tokens: int) -> tuple[Float32, Int32, Float32, Float32]:
    """Exact entropies, two draws a token (one id twice) and log-partitions at 0.5 and 2."""
    entropy_T = np.linspace(0.5, 1.5, num_tokens).astype(np.float32)
    draw_ids_TM = np.tile(np.array([[150_000, 150_000]], np.int32), (num_tokens, 1))
    draw_ids_TM[0, 1] = 13
    draw_logprobs_TM = np.full((num_tokens, 2), -6.5, np.float32)
    partitions_TS = np.tile(np.array([[-0.4, 1.7]], np.float32), (num_tokens, 1))
    return entropy_T, draw_ids_TM, draw_logprobs_TM, partitions_TS


def golden_table(codec: str) -> pa.Table:
    """The golden rows as a shard's table, header included."""
    messages = [Message("user", "What is 2+3?")]
    prompt_ids = [1, 4093, 198]
    rows: list[dict[str, Any]] = []
    signals = [support_of(capture, 3, 0.999) for capture in captures()]
    for index, (capture, signal) in enumerate(zip(captures(), signals, strict=True)):
        tokens = capture.token_ids_T.tolist()
        rows.append(
            {
                "sample_id": sample_id_of(TEACHER, prompt_ids, {"temperature": 0.6, "top_p": 0.95}, 17 + index, index),
                "chain_id": chain_id_of(prompt_ids, tokens),
                "prompt_id": prompt_id_of(messages),
                "sample_index": index,
                "run_id": "golden_00000000",
                "worker": "w0",
                "created_at": datetime.datetime(2026, 11, 21, tzinfo=datetime.UTC),
                "source": "golden",
                "split": "train",
                "messages": [{"role": "user", "content": "What is 2+3?"}],
                "prompt_token_ids": prompt_ids,
                "reference": "5",
                "metadata": "{}",
                "text": "5",
                "reasoning": None,
                "answer": "5",
                "token_ids": tokens,
                "reasoning_end": 0,
                "finish_reason": "stop",
                "seed": 17 + index,
                "num_prompt_tokens": len(prompt_ids),
                "num_tokens": len(tokens),
                "num_reasoning_tokens": 0,
                **scalars_of(signal),
            }
        )
    plain = pa.Table.from_pylist(rows, pa.schema([field for field in CHAIN_FIELDS if field not in TOKEN_FIELDS]))
    coded = encode(codec, signals)
    schema = chain_schema(codec)
    columns = [coded.get(name, plain[name] if name in plain.column_names else None) for name in schema.names]
    return pa.table(columns, schema=schema).replace_schema_metadata(
        {SHARD_METADATA_KEY: golden_header(codec).model_dump_json()}
    )


def golden_header(codec: str) -> ShardHeader:
    """The golden shards' header, format version 2."""
    return ShardHeader(
        format_version=2,
        codec=codec,
        max_support=3,
        nucleus=0.999,
        draws=2,
        temperatures=[0.5, 2.0],
        entropy="exact",
        vocab_size=VOCAB_SIZE,
        run_id="golden_00000000",
        worker="w0",
        teacher_fingerprint=TEACHER,
        tokenizer_fingerprint="k" * 32,
        template_fingerprint="c" * 32,
    )


if __name__ == "__main__":
    for name in CODECS:
        pq.write_table(golden_table(name), FOLDER / f"v2-{name}.parquet", compression="zstd", write_page_checksum=True)
