"""What the student gave a stage's tokens when the stage began: computed once, kept in the run's folder.

In: the engine before the first step, the stage's packs of one epoch. Out: RUN/start/<stage>/, memory-mapped arrays by
key. A resumed run reads them; where they are missing it computes them again, from the weights that the stage starts
from, before it loads its checkpoint. Cost: one forward pass over the selection; 4 bytes a token, and for losses on
distributions 4 more for each stored and drawn id, and 12.

sampled.npy   float32 [T], log q of the token that came; nan where no loss is (tokens cut off by the length limit)
rest.npy      float32 [T], log q of all ids that are neither stored nor drawn
place.npy     int64 [T], where the token's ids begin in slots.npy
slots.npy     float32, log q of its stored ids in their order, then of its draws
start.json    the selection's hash: written last

Each rank writes the packs that it computes to files of its own, which the first one joins: two processes never write to
one file.

    T completion tokens, N loss tokens of a pack, K support, M draws, X stored and drawn ids of all tokens (flat)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stillroom.errors import CorruptError
from stillroom.log import Progress
from stillroom.storage.paths import write_text_atomic
from student_train.data.epoch_plan import PlanSpec
from student_train.data.pack import Pack, StartNumbers, TargetView, TorchPack, to_torch
from student_train.data.selection import Selection
from student_train.data.stream import PackStream
from student_train.data.token_numbers import new_numbers, token_offsets
from student_train.losses.fused_head import TokenSlots
from student_train.runtime.ranks import Ranks

DONE = "start.json"


class StartLogprobs:
    """The arrays in a stage's folder; `of` reads those of a pack."""

    def __init__(self, folder: Path, selection: Selection, *, with_distribution: bool) -> None:
        """Raises CorruptError where the arrays are not those of the selection."""
        self._offsets_R = token_offsets(selection)
        names = ("sampled", "rest", "place", "slots") if with_distribution else ("sampled",)
        try:
            self._arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
        except (OSError, ValueError) as error:
            raise CorruptError(f"{folder} cannot be read: {error}: delete it to compute it again") from error
        if len(self._arrays["sampled"]) != self._offsets_R[-1]:
            raise CorruptError(f"{folder} does not have one number for each token of its selection: delete it")

    def of(self, pack: Pack) -> StartNumbers:
        """Those of the pack's loss tokens."""
        key_N = self._offsets_R[pack.row_N] + pack.token_N
        sampled_N = np.asarray(self._arrays["sampled"][key_N], np.float32)
        if "slots" not in self._arrays:
            return StartNumbers(sampled_N)
        is_slot_NS = _slots_of(pack)
        n_N = is_slot_NS.sum(axis=1)
        place_N = np.asarray(self._arrays["place"][key_N], np.int64)
        first_N = np.cumsum(n_N) - n_N
        place_X = np.arange(int(n_N.sum())) + np.repeat(place_N - first_N, n_N)
        slots_NS = np.zeros(is_slot_NS.shape, np.float32)
        slots_NS[is_slot_NS] = self._arrays["slots"][place_X]
        num_support = pack.ids_NK.shape[1]
        drawn_NM = None if pack.draw_ids_NM is None else slots_NS[:, num_support:]
        rest_N = np.asarray(self._arrays["rest"][key_N], np.float32)
        return StartNumbers(sampled_N, slots_NS[:, :num_support], drawn_NM, rest_N)


def open_start(
    folder: Path,
    selection: Selection,
    spec: PlanSpec,
    slots_of: Callable[[TorchPack], TokenSlots],
    ranks: Ranks,
    *,
    with_distribution: bool,
) -> StartLogprobs:
    """The arrays in `folder`, computed first unless they are there; called by all ranks together.

    `slots_of` is the student as the stage starts from it. Raises CorruptError.
    """
    identity = {"selection": selection.header.hash, "with_distribution": with_distribution}
    if not _is_done(folder, identity):
        if ranks.is_first:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        # No rank may write into a folder that is about to be removed.
        ranks.barrier()
        _compute(folder, selection, spec, slots_of, ranks, with_distribution=with_distribution)
        # The first rank is about to read the parts of all.
        ranks.barrier()
        if ranks.is_first:
            _join(folder, selection, ranks.num_ranks, with_distribution=with_distribution)
            write_text_atomic(folder / DONE, json.dumps(identity) + "\n")
        ranks.barrier()
    return StartLogprobs(folder, selection, with_distribution=with_distribution)


def _is_done(folder: Path, identity: dict[str, Any]) -> bool:
    path = folder / DONE
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")) == identity)
    except FileNotFoundError:
        return False
    except ValueError as error:
        raise CorruptError(f"{path} is not JSON: {error}: delete {folder} to compute it again") from error


def _compute(
    folder: Path,
    selection: Selection,
    spec: PlanSpec,
    slots_of: Callable[[TorchPack], TokenSlots],
    ranks: Ranks,
    *,
    with_distribution: bool,
) -> None:
    """Writes this rank's part: keys (row, token, number of slots), numbers (sampled, rest), slots."""
    header = selection.header
    # Each chain once, whatever its cache weighs: an epoch may leave chains of light caches out.
    once = header.model_copy(update={"caches": [one.model_copy(update={"weight": 1.0}) for one in header.caches]})
    stream = PackStream(
        replace(selection, header=once),
        spec,
        packs_per_step=ranks.num_ranks,
        rank=ranks.rank,
        world=ranks.num_ranks,
        num_epochs=1,
        with_signals=with_distribution,
        tell=ranks.tell,
    )
    view = TargetView(with_draws=with_distribution and header.draws > 0, with_pairs=selection.has_pairs)
    num_packs, num_tokens = stream.plans.total_packs(), 0
    keys, numbers, slots = _part_paths(folder, ranks.rank)
    with (
        stream,
        keys.open("wb") as key_file,
        numbers.open("wb") as number_file,
        slots.open("wb") as slot_file,
        Progress("score start", num_packs, "packs") if ranks.is_first else nullcontext() as progress,
    ):
        for number, pack in enumerate(stream):
            # Also for an empty pack: all ranks take part in every forward pass under ZeRO-3.
            found = slots_of(to_torch(pack, ranks.device, view))
            if pack.num_loss_tokens:
                is_slot_NS = _slots_of(pack) if with_distribution else np.zeros((pack.num_loss_tokens, 0), bool)
                np.stack([pack.row_N, pack.token_N, is_slot_NS.sum(axis=1)], axis=1).astype(np.int32).tofile(key_file)
                torch.stack([found.sampled_N, found.rest_N], dim=1).float().cpu().numpy().tofile(number_file)
                if with_distribution:
                    found.slots_NS.float().cpu().numpy()[is_slot_NS].tofile(slot_file)
                num_tokens += pack.num_loss_tokens
            if progress is not None:
                progress.update(min((number + 1) * ranks.num_ranks, num_packs), num_tokens)


def _join(folder: Path, selection: Selection, num_ranks: int, *, with_distribution: bool) -> None:
    """Arrays by key from the parts of all ranks."""
    offsets_R = token_offsets(selection)
    num_tokens = int(offsets_R[-1])
    sizes = [path.stat().st_size // 4 for path in (_part_paths(folder, rank)[2] for rank in range(num_ranks))]
    sampled_T = new_numbers(folder / "sampled.npy", np.float32, num_tokens)
    sampled_T[:] = np.nan
    made = [sampled_T]
    if with_distribution:
        rest_T, place_T = (
            new_numbers(folder / "rest.npy", np.float32, num_tokens),
            new_numbers(folder / "place.npy", np.int64, num_tokens),
        )
        slots_X = new_numbers(folder / "slots.npy", np.float32, sum(sizes))
        made += [rest_T, place_T, slots_X]
    first = 0
    for rank, size in enumerate(sizes):
        keys, numbers, slots = _part_paths(folder, rank)
        key_N3 = np.fromfile(keys, np.int32).reshape(-1, 3)
        number_N2 = np.fromfile(numbers, np.float32).reshape(-1, 2)
        key_N = offsets_R[key_N3[:, 0]] + key_N3[:, 1]
        sampled_T[key_N] = number_N2[:, 0]
        if with_distribution:
            rest_T[key_N] = number_N2[:, 1]
            place_T[key_N] = first + np.cumsum(key_N3[:, 2], dtype=np.int64) - key_N3[:, 2]
            slots_X[first : first + size] = np.fromfile(slots, np.float32)
        first += size
        for path in (keys, numbers, slots):
            path.unlink()
    # Before start.json says that they are whole: ranks on other machines read them next, and a power cut may come.
    for numbers_X in made:
        numbers_X.flush()


def _part_paths(folder: Path, rank: int) -> tuple[Path, Path, Path]:
    keys, numbers, slots = (folder / f"{name}-{rank}.bin" for name in ("keys", "numbers", "slots"))
    return keys, numbers, slots


def _slots_of(pack: Pack) -> npt.NDArray[np.bool_]:
    """[N, K + M]: which slots of the pack's padded targets are stored or drawn ids."""
    parts: list[npt.NDArray[np.bool_]] = [pack.logprobs_NK > -np.inf]
    if pack.draw_weights_NM is not None:
        parts.append(pack.draw_weights_NM > 0)
    return np.concatenate(parts, axis=1)
