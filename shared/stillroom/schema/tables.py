"""Arrow schemas of the cache's tables. Column meanings, units and order are normative in FORMAT.md."""

import pyarrow as pa

from stillroom.schema import FORMAT_VERSION

CODECS = ("topk-u8", "topk-f32")
"""Codecs that this version reads and writes."""

MESSAGE_TYPE = pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())])


def list_of(kind: pa.DataType) -> pa.DataType:
    """A list type whose child field is named `element`, as Parquet writes it (column path `name.list.element`)."""
    return pa.list_(pa.field("element", kind))


IDENTITY_FIELDS = [
    pa.field("sample_id", pa.string(), nullable=False),
    pa.field("chain_id", pa.string(), nullable=False),
    pa.field("prompt_id", pa.string(), nullable=False),
    pa.field("sample_index", pa.int32(), nullable=False),
    pa.field("run_id", pa.string(), nullable=False),
    pa.field("worker", pa.string(), nullable=False),
    pa.field("created_at", pa.timestamp("us", tz="UTC"), nullable=False),
]

PROMPT_FIELDS = [
    pa.field("source", pa.string(), nullable=False),
    pa.field("split", pa.string(), nullable=False),
    pa.field("messages", list_of(MESSAGE_TYPE), nullable=False),
    pa.field("prompt_token_ids", list_of(pa.int32()), nullable=False),
    pa.field("reference", pa.string()),
    pa.field("metadata", pa.string(), nullable=False),
]

COMPLETION_FIELDS = [
    pa.field("text", pa.string(), nullable=False),
    pa.field("reasoning", pa.string()),
    pa.field("answer", pa.string()),
    pa.field("token_ids", list_of(pa.int32()), nullable=False),
    pa.field("reasoning_end", pa.int32()),
    pa.field("finish_reason", pa.string(), nullable=False),
    pa.field("seed", pa.int64()),
]

SCALAR_FIELDS = [
    pa.field("num_prompt_tokens", pa.int32(), nullable=False),
    pa.field("num_tokens", pa.int32(), nullable=False),
    pa.field("num_reasoning_tokens", pa.int32()),
    pa.field("mean_logprob", pa.float32(), nullable=False),
    pa.field("mean_entropy", pa.float32(), nullable=False),
    pa.field("mean_top1_prob", pa.float32(), nullable=False),
    pa.field("mean_tail_mass", pa.float32(), nullable=False),
    pa.field("mean_support", pa.float32(), nullable=False),
]

TOKEN_FIELDS = [
    pa.field("sampled_logprob", list_of(pa.float32()), nullable=False),
    pa.field("sampled_rank", list_of(pa.int32()), nullable=False),
    pa.field("entropy", list_of(pa.float32()), nullable=False),
]

EXTRA_FIELDS = [
    pa.field("draw_n", list_of(pa.int16()), nullable=False),
    pa.field("log_partitions", list_of(pa.float32()), nullable=False),
]
"""Signal columns that shards of format version 1 lack."""

# int16 for 8-bit codes and counts, because Delta has neither unsigned integers nor half floats; dictionary pages and
# zstd take the empty byte away.
SIGNAL_FIELDS = {
    "topk-u8": [
        pa.field("topk_ids", list_of(pa.int32()), nullable=False),
        pa.field("topk_codes", list_of(pa.int16()), nullable=False),
        pa.field("topk_n", list_of(pa.int16()), nullable=False),
        pa.field("tail_codes", list_of(pa.int16()), nullable=False),
        *EXTRA_FIELDS,
    ],
    "topk-f32": [
        pa.field("topk_ids", list_of(pa.int32()), nullable=False),
        pa.field("topk_logprobs", list_of(pa.float32()), nullable=False),
        pa.field("topk_n", list_of(pa.int16()), nullable=False),
        pa.field("tail_logmass", list_of(pa.float32()), nullable=False),
        *EXTRA_FIELDS,
    ],
}
"""Columns that depend on the codec, in the current format version."""

CHAIN_FIELDS = [*IDENTITY_FIELDS, *PROMPT_FIELDS, *COMPLETION_FIELDS, *SCALAR_FIELDS, *TOKEN_FIELDS]
"""Columns of every chain, whatever the codec."""

JUDGE_METADATA_KEY = "stillroom-judge"
"""Of files with verdicts of a language model: JSON of its name, model, prompt and parameters."""

VERDICT_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("judge", pa.string(), nullable=False),
        pa.field("correct", pa.bool_()),
        pa.field("score", pa.float32()),
        pa.field("judged_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("rule", pa.string()),
        pa.field("compared", pa.string()),
    ]
)
"""`rule` and `compared` are missing from files of versions that did not keep them, and read as null there."""

FAILURE_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("worker", pa.string(), nullable=False),
        pa.field("failed_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)

VOCAB_SCHEMA = pa.schema(
    [
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("piece", pa.string(), nullable=False),
        pa.field("is_special", pa.bool_(), nullable=False),
    ]
)


def signal_fields(codec: str, format_version: int = FORMAT_VERSION) -> list[pa.Field]:
    """Signal columns of `codec` (a name of CODECS) as shards of that format version have them."""
    fields = SIGNAL_FIELDS[codec]
    return fields if format_version >= 2 else [one for one in fields if one not in EXTRA_FIELDS]


def chain_schema(codec: str, format_version: int = FORMAT_VERSION) -> pa.Schema:
    """The Parquet schema of a shard of `codec` (a name of CODECS)."""
    return pa.schema([*CHAIN_FIELDS, *signal_fields(codec, format_version)])


def table_schema() -> pa.Schema:
    """The Delta table's schema: the columns of every codec, those that only one codec has nullable."""
    own: dict[str, pa.Field] = {}
    for fields in SIGNAL_FIELDS.values():
        for one in fields:
            own[one.name] = one.with_nullable(True)
    return pa.schema([*CHAIN_FIELDS, *own.values()])
