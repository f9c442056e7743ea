"""From a SQL condition to packs: which chains are read, in which order, and what stands at each position of a pack.

For a training loop of your own:

    selection = freeze_selection("selection.parquet", "s3://b/r1", where="split = 'train' and correct")
    with PackStream(selection, PlanSpec(pack_tokens=4096), packs_per_step=8, num_epochs=1) as stream:
        for pack in stream:
            batch = to_torch(pack, "cuda")  # input_ids_1L, position_ids_1L, predict_positions_N, targets

`stream.state_dict()` belongs in your checkpoints: loaded again, the stream continues with the next pack.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom.storage.objects import ObjectPath
    from student_train.data.epoch_plan import PlanSpec
    from student_train.data.pack import Pack, TorchPack, to_torch
    from student_train.data.selection import Selection, load_selection
    from student_train.data.stream import PackStream

__all__ = [
    "Pack",
    "PackStream",
    "PlanSpec",
    "Selection",
    "TorchPack",
    "freeze_selection",
    "load_selection",
    "to_torch",
]

_MODULE_OF = {
    "Pack": "pack",
    "PackStream": "stream",
    "PlanSpec": "epoch_plan",
    "Selection": "selection",
    "TorchPack": "pack",
    "load_selection": "selection",
    "to_torch": "pack",
}


def freeze_selection(
    path: str | Path,
    caches: str | Path | ObjectPath | Sequence[str | Path | ObjectPath],
    *,
    where: str | None = None,
    weight: str | None = None,
    max_chains: int | None = None,
) -> Selection:
    """Chooses the chains to train on and pins them in the file `path`, so that the choice survives a growing cache.

    `where` is a SQL condition over `chains` (None selects all), `weight` a SQL expression for the weight of a chain's
    tokens in the losses (None is 1), `max_chains` keeps a fair sample. An existing file is loaded. Raises ConfigError
    if that one was frozen with other arguments, if the SQL is wrong or if nothing is selected.
    """
    from stillroom.storage.objects import ObjectPath
    from stillroom.storage.paths import location
    from student_train.data.freezing import CacheSource, SelectionRequest, open_selection

    roots = [caches] if isinstance(caches, str | Path | ObjectPath) else caches
    sources = [CacheSource(location(root)) for root in roots]
    return open_selection(Path(path), SelectionRequest(sources, where, weight, max_chains, key="where"))


# Lazy, because configuration imports names from this package and `--help` must not wait for pyarrow.
def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
