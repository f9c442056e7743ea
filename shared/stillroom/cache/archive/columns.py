"""The columns of `topk-u8` to those of `archive` and back; loads numba when it must.

Shape legend: T tokens, E entries of all tokens, R rows.
"""

import importlib.util
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stillroom.cache.columns import whole_column
from stillroom.errors import ConfigError
from stillroom.schema.manifest import ShardHeader
from stillroom.schema.records import Int64

Array = npt.NDArray[Any]

BLOBS = ("archive_model", "archive")
"""Binary columns of `archive`."""


def pack(values: dict[str, Array], tokens_R: Int64) -> dict[str, pa.Array]:
    """The binary columns of `archive` out of what `topk-u8` would store."""
    archive = _archive()
    row_offsets = np.concatenate([[0], np.cumsum(tokens_R)]).astype(np.int64)
    known = archive.Known(values["token_ids"], values["sampled_rank"], values["sampled_logprob"], row_offsets)
    candidates = archive.Candidates(
        size_T=values["topk_n"].astype(np.int32),
        num_draws_T=values["draw_n"].astype(np.int32),
        tail_T=values["tail_codes"].astype(np.uint8),
        id_E=values["topk_ids"],
        code_E=values["topk_codes"].astype(np.uint8),
    )
    columns = archive.encode_block(known, candidates)
    return {name: pa.array(blobs, pa.binary()) for name, blobs in zip(BLOBS, columns, strict=True)}


def unpack(
    table: pa.Table,
    values: dict[str, Array],
    lengths: dict[str, Int64],
    row_offsets: Int64,
    header: ShardHeader,
    where: str,
) -> tuple[dict[str, Array], dict[str, Int64]]:
    """Values and lengths as those of `topk-u8`."""
    archive = _archive()
    models, streams = (whole_column(table, name, where).to_pylist() for name in BLOBS)
    known = archive.Known(values["token_ids"], values["sampled_rank"], values["sampled_logprob"], row_offsets)
    limits = (header.vocab_size, header.max_support, header.draws)
    candidates, entries_R = archive.decode_blocks(models, streams, known, limits, where)
    unpacked = {
        "topk_ids": candidates.id_E,
        "topk_codes": candidates.code_E,
        "topk_n": candidates.size_T,
        "draw_n": candidates.num_draws_T,
        "tail_codes": candidates.tail_T,
    }
    return values | unpacked, lengths | {"topk_ids": entries_R, "topk_codes": entries_R}


def check_numba() -> None:
    """Raises ConfigError where numba is missing, which `archive` alone needs."""
    if importlib.util.find_spec("numba") is None:
        raise ConfigError("codec archive needs numba: pip install 'stillroom[archive]'")


def _archive() -> ModuleType:
    """stillroom.cache.archive.blocks, loaded late: numba takes half a second."""
    check_numba()
    import stillroom.cache.archive.blocks

    return stillroom.cache.archive.blocks
