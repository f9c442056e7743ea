"""One number for each completion token of a selection, by key: the chain's row and the token's place in it.

In: a selection, caches that know more of its chains. Out: a flat float32 file in the run's folder, memory-mapped, and
the numbers of a pack's loss tokens by `row_N` and `token_N`. So what stands in another cache meets its token however
chains are shuffled, cut and packed. Cost: 4 bytes a token on disk; nothing in memory but the offsets.

R chains, T completion tokens of all chains
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.cache.catalog import Catalog
from stillroom.cache.columns import offsets_of
from stillroom.errors import ConfigError, CorruptError, StillroomError, one_line
from stillroom.log import Progress, warn
from stillroom.schema.records import Float32, Int32, Int64
from stillroom.storage.paths import Location, atomic_path
from student_train.data.lookup import ChainIndex, chain_keys
from student_train.data.selection import Selection

BATCH_CHAINS = 4096
UNCHANGED = {"temperature": 1.0, "top_p": 1.0, "top_k": None, "min_p": 0.0, "repetition_penalty": 1.0}
"""Sampling by the very probabilities that a cache stores."""


class TokenNumbers:
    """The numbers at `path`; nan where nothing is known."""

    def __init__(self, path: Path, selection: Selection) -> None:
        """Raises CorruptError where the file is not one number for each token."""
        self._offsets_R = token_offsets(selection)
        try:
            self._values_T = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise CorruptError(f"{path} cannot be read: {error}: delete it to rebuild it") from error
        if self._values_T.shape != (self._offsets_R[-1],):
            raise CorruptError(f"{path} does not have one number for each token of its selection: delete it")

    def of(self, row_N: Int32, token_N: Int32) -> Float32:
        """float32 [N] of tokens by key."""
        return np.asarray(self._values_T[self._offsets_R[row_N] + token_N], np.float32)

    def num_known_chains(self) -> int:
        """Chains whose first token has a number."""
        return int(np.isfinite(self._values_T[self._offsets_R[:-1]]).sum())


def token_offsets(selection: Selection) -> Int64:
    """int64 [R+1]: where the tokens of each chain begin among those of all."""
    return offsets_of(selection.num_tokens_R)


def numbers_path(folder: Path, stage: str, kind: str, selection: Selection) -> Path:
    """Where a kind of numbers of a stage lies; numbers of another selection lie elsewhere."""
    return folder / f"{stage}.{kind}-{selection.header.hash[:16]}.npy"


def write_behaviour(path: Path, selection: Selection, caches: Sequence[Location]) -> None:
    """For each token, what the student that wrote its chain gave it: `sampled_logprob` of the first cache that holds
    the chain.

    Raises ConfigError where no cache holds any of the chains, CorruptError.
    """
    keys_R, offsets_R = chain_keys(selection), token_offsets(selection)
    left_R = np.ones(len(keys_R), bool)
    with atomic_path(path) as temp, Progress("match behaviour", len(keys_R), "chains") as progress:
        values_T = new_numbers(temp, np.float32, int(offsets_R[-1]))
        # nan, not 0: a log probability of 0 would say that the writer was certain.
        values_T[:] = np.nan
        for root in caches:
            catalog = Catalog(root)
            _warn_of_sampling(catalog)
            index = ChainIndex(catalog)
            for rows in np.split(np.flatnonzero(left_R), range(BATCH_CHAINS, int(left_R.sum()), BATCH_CHAINS)):
                for found in index.read(index.find(keys_R[rows]), lambda _: ["sampled_logprob"]):
                    column = found.table.column("sampled_logprob").combine_chunks()
                    for row, logprobs_T in zip(rows[found.rows].tolist(), column, strict=True):
                        _place(values_T, offsets_R, row, logprobs_T.values.to_numpy(), found.where)
                    # The first cache that holds a chain wins: a later one may be another student's.
                    left_R[rows[found.rows]] = False
                    progress.update(int((~left_R).sum()), 0)
        if left_R.all():
            raise ConfigError(
                f"data.behaviour: {', '.join(map(str, caches))} holds none of the {len(keys_R)} selected chains (same "
                "prompt and completion tokens): use the cache that `teacher-cache score` read them from"
            )
        values_T.flush()


def new_numbers(path: Path, kind: type[np.generic], size: int) -> np.memmap[Any, np.dtype[Any]]:
    """A memory-mapped .npy file of `size` numbers, or one where there are none: mmap refuses an empty file.

    Raises StillroomError where the disk has no room for it.
    """
    made: np.memmap[Any, np.dtype[Any]] = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
        path, "w+", kind, (max(size, 1),)
    )
    try:
        with path.open("r+b") as file:
            # A mapped file gets its blocks when it is written to, and a full disk then kills the process (SIGBUS).
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        # Some file systems cannot reserve blocks.
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            size_gb = path.stat().st_size / 1e9
            raise StillroomError(f"{path.parent} has no room for {size_gb:.2f} GB: {one_line(error)}") from error
    return made


def _warn_of_sampling(catalog: Catalog) -> None:
    """Says which chains were not sampled by the probabilities that are stored of them."""
    for manifest in catalog.runs().values():
        changed = {
            key: value
            for key, plain in UNCHANGED.items()
            if manifest.kind == "generate" and (value := manifest.sampling.get(key, plain)) != plain
        }
        if changed:
            how = ", ".join(f"{key}={value:g}" for key, value in changed.items())
            warn(
                f"run {manifest.run_id} of {catalog.root} was sampled with {how}: policy_gradient takes its chains for "
                "samples at temperature 1, and is biased: generate with temperature=1, top_p=1"
            )


def _place(values_T: Float32, offsets_R: Int64, row: int, logprobs_T: Float32, where: str) -> None:
    start, stop = int(offsets_R[row]), int(offsets_R[row + 1])
    if len(logprobs_T) != stop - start:
        raise CorruptError(f"{where} holds a chain of {len(logprobs_T)} tokens that has {stop - start} elsewhere")
    values_T[start:stop] = logprobs_T
