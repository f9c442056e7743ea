"""Token ids of a cache that a student with a cut vocabulary keeps, and the cache's rows in the student's ids.

`student-train init` renumbers the kept ids in their order and writes KEPT_IDS into the student's folder. A run
records them in its selections; from then on rows are mapped as they are read. Text that holds a removed id is refused.
Entries of distributions at removed ids join the tail, which is then one bucket: the divergence is that between teacher
and student with all of the teacher's other tokens as one outcome. If every stored id was kept, nothing changes at all.

    K kept ids, V ids of the cache, T tokens, N entries of their distributions
"""

import base64
import functools
import json
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from stillroom.errors import CorruptError, DataError
from stillroom.schema.records import Draws, Float32, Int32, Signals
from stillroom.storage.paths import write_text_atomic

KEPT_IDS = "kept_ids.json"


@dataclass(frozen=True)
class KeptIds:
    """`packed` is a bit for each id of the cache's tokenizer, compressed."""

    tokenizer_fingerprint: str
    packed: str
    has_all_stored: bool
    """Whether no id that a distribution stores was removed."""

    @classmethod
    def of(cls, ids_K: Int32, tokenizer_fingerprint: str, *, has_all_stored: bool) -> Self:
        """`ids_K` ascending."""
        bits_V = np.zeros(int(ids_K[-1]) + 1, bool)
        bits_V[ids_K] = True
        packed = base64.b64encode(zlib.compress(np.packbits(bits_V).tobytes(), 9)).decode()
        return cls(tokenizer_fingerprint, packed, has_all_stored)

    def write(self, folder: Path) -> None:
        """Beside the student's weights."""
        content = {
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "kept": self.packed,
            "has_all_stored": self.has_all_stored,
        }
        write_text_atomic(folder / KEPT_IDS, json.dumps(content, indent=2) + "\n")


def read_kept_ids(model: str) -> KeptIds | None:
    """Of a student's folder; None where its vocabulary is whole. Raises CorruptError."""
    path = Path(model) / KEPT_IDS
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kept = KeptIds(content["tokenizer_fingerprint"], content["kept"], bool(content["has_all_stored"]))
        # Unpacked here once, so that a damaged file is named now and not by the first pack.
        ids_of(kept.packed)
    except (OSError, ValueError, KeyError, TypeError, zlib.error) as error:
        raise CorruptError(f"{path} is not what `student-train init` wrote: {error}") from error
    return kept


# By the string itself: otherwise each row group would unpack it again.
@functools.lru_cache(maxsize=4)
def ids_of(packed: str) -> Int32:
    """The cache's id of each of the student's, ascending [K]."""
    bits = np.unpackbits(np.frombuffer(zlib.decompress(base64.b64decode(packed)), np.uint8))
    return np.flatnonzero(bits).astype(np.int32)


@functools.lru_cache(maxsize=4)
def _new_ids(packed: str, num_ids: int) -> Int32:
    """The student's id of each of the cache's, -1 for removed ones [V]."""
    ids_K = ids_of(packed)
    # Sized for the ids that come too: a cache may hold ids above the last kept one.
    new_V = np.full(max(num_ids, int(ids_K[-1]) + 1), -1, np.int32)
    new_V[ids_K] = np.arange(len(ids_K), dtype=np.int32)
    return new_V


def map_text(packed: str, ids: Int32, where: str) -> Int32:
    """Token ids in the student's. Raises DataError where one was removed."""
    new = _new_ids(packed, int(ids.max(initial=0)) + 1)[ids]
    if (new < 0).any():
        raise DataError(
            f"{where} holds token id {int(ids[new < 0][0])}, which was cut from the student's vocabulary: the cache "
            "is another one than `student-train init` read, or has grown since: set data.caches.chains_version to "
            "what it was, or run init again"
        )
    return new


def map_signals(packed: str, signals: Signals) -> Signals:
    """Distributions over the student's ids; the mass of removed ones joins the tail."""
    ids_N = signals.topk_ids_N
    new_N = _new_ids(packed, int(ids_N.max(initial=0)) + 1)[ids_N]
    is_kept_N = new_N >= 0
    draws = None if signals.draws is None else _map_draws(packed, signals.draws)
    if is_kept_N.all():
        return replace(signals, topk_ids_N=new_N, draws=draws)
    token_N = np.repeat(np.arange(len(signals.topk_n_T)), signals.topk_n_T)
    # In float64: many small masses join a tail that may itself be tiny.
    removed_T = np.bincount(
        token_N[~is_kept_N], np.exp(signals.topk_logprobs_N[~is_kept_N].astype(np.float64)), len(signals.topk_n_T)
    )
    with np.errstate(divide="ignore"):
        tail_T: Float32 = np.log(np.exp(signals.tail_logmass_T.astype(np.float64)) + removed_T).astype(np.float32)
    return replace(
        signals,
        # minlength: a token that loses its whole support stays, as nothing but a tail.
        topk_n_T=np.bincount(token_N[is_kept_N], minlength=len(signals.topk_n_T)).astype(np.int32),
        topk_ids_N=new_N[is_kept_N],
        topk_logprobs_N=signals.topk_logprobs_N[is_kept_N],
        # Rounding must not make a tail of more than everything.
        tail_logmass_T=np.minimum(tail_T, np.float32(0)),
        draws=draws,
    )


def _map_draws(packed: str, draws: Draws) -> Draws:
    """Only where every stored id was kept: the draws of a tail that lost ids would stand for too little."""
    return replace(draws, ids_D=_new_ids(packed, int(draws.ids_D.max(initial=0)) + 1)[draws.ids_D])
