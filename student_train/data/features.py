"""What a stage reads of the tables of features: which sets, which layers, and which layers of the student stand beside.

In: a mix of losses, the pinned feature sets of a run's caches, the student's sizes. Out: `StageFeatures`, which reads
rows for the stream, and a configuration whose losses name every pair of layers. Refusals come here, before any model is
loaded: a cache without features, a set without what a loss reads, layers that do not exist.

    P tokens with features, D teacher's width, R coefficients of a state (D without a basis), A stored heads of a layer
    m stored positions of a query
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stillroom.cache.catalog import Catalog
from stillroom.cache.features import FeatureParts, FeatureRow, FeatureSet, StoredRow
from stillroom.errors import ConfigError, DataError
from stillroom.schema.records import Float32, Int32
from stillroom.storage.paths import write_text_atomic
from student_train.config.data import DataConfig
from student_train.config.stage import StageConfig
from student_train.data.selection import Selection
from student_train.losses.below import AttentionKL, HiddenLoss, ProjectedLoss
from student_train.losses.divergences import FeatureLoss
from student_train.losses.mix import LossMix

COMMAND = "teacher-cache features CONFIG"
MAX_SHOWN = 8


@dataclass(frozen=True)
class StageFeatures:
    """Features that the losses of a stage read; safe to use from several threads.

    Attributes:
        sets: by number of the cache, None where it has none that is read.
        with_hidden: whether last hidden states are read.
        layers: teacher layers whose states are read, ascending; they count decoder layers passed.
        attention: teacher layers whose attention is read, from 0, and their stored heads.
        num_chains: selected chains that have features.
    """

    sets: tuple[FeatureSet | None, ...]
    with_hidden: bool
    layers: tuple[int, ...]
    attention: dict[int, tuple[int, ...]]
    num_chains: int = 0

    @property
    def first(self) -> FeatureSet:
        """Any of the sets; they agree in what they hold, though not in their chains, scales and bases."""
        return next(one for one in self.sets if one is not None)

    @property
    def has_one_basis(self) -> bool:
        """Whether coefficients of all sets mean the same; else they are expanded row by row."""
        return len({one.manifest.constants for one in self.sets if one is not None}) == 1

    def read(self, cache: int, sample_ids: Sequence[str]) -> list[StoredRow | None]:
        """Rows of these chains of a cache; None for chains without features. Raises CorruptError."""
        # Scales and bases are a set's own, so a row must be decoded by the set of the cache that it comes from.
        features = self.sets[cache]
        if features is None:
            return [None] * len(sample_ids)
        # What no loss reads would fill the stream's buffer.
        parts = FeatureParts(hidden=self.with_hidden, layers=self.layers, attention=bool(self.attention))
        found = features.read_stored(sample_ids, parts)
        return [found.get(one) for one in sample_ids]


@dataclass(frozen=True, slots=True)
class PackAttention:
    """Of one teacher layer: keys_PAm int32 positions in the document, weights_PAm and rest_PA float32."""

    keys_PAm: Int32
    weights_PAm: Float32
    rest_PA: Float32


@dataclass(frozen=True, slots=True)
class PackFeatures:
    """Features of P of a pack's loss tokens, document by document.

    Attributes:
        places_P: int32, ascending numbers of those tokens among the N loss tokens.
        counts_D: int32, how many of them each document has.
        is_whole_P: float32, 1 in documents that begin where the chain does; others lack tokens that the teacher
            attended to.
        hidden_PR: last hidden states as stored; None if they are not read.
        layers: states by teacher layer, as stored.
        attention: by teacher layer.
    """

    places_P: Int32
    counts_D: Int32
    is_whole_P: Float32
    hidden_PR: Float32 | None
    layers: dict[int, Float32]
    attention: dict[int, PackAttention]


@dataclass(frozen=True, slots=True)
class PieceFeatures:
    """A piece of a chain in a pack: its row of features, and its loss tokens start..stop-1 of the completion, of which
    the first is number `base` of the pack. `first` counts tokens of the chain before the piece.
    """

    row: StoredRow | None
    base: int
    start: int
    stop: int
    first: int


def pack_features(pieces: Sequence[PieceFeatures], wanted: StageFeatures) -> PackFeatures:
    """Features of the pieces' loss tokens."""
    rows: list[FeatureRow] = []
    places, counts, is_whole = [], [], []
    for piece in pieces:
        stored = piece.row
        positions_P = np.zeros(0, np.int32) if stored is None else stored.positions_P
        # Positions ascend, so the piece's loss tokens are one slice of them.
        first, last = map(int, np.searchsorted(positions_P, [piece.start, piece.stop]))
        counts.append(last - first)
        if stored is None or first == last:
            continue
        # Position t is the state that predicts completion token t: it meets that token's loss.
        places.append(piece.base + positions_P[first:last] - piece.start)
        is_whole.append(np.full(last - first, piece.first == 0, np.float32))
        # Decoded here rather than when the row is read: codes take a quarter of the buffer.
        rows.append(stored.decode(first, last, expand=not wanted.has_one_basis))

    def joined(arrays: list[Float32]) -> Float32:
        return np.concatenate(arrays) if arrays else np.zeros((0, 0), np.float32)

    # concatenate fails without any array, as where no piece has features.
    is_whole_P = np.concatenate([*is_whole, np.zeros(0, np.float32)])
    return PackFeatures(
        places_P=np.concatenate([*places, np.zeros(0)]).astype(np.int32),
        counts_D=np.array(counts, np.int32),
        is_whole_P=is_whole_P,
        hidden_PR=joined([row.hidden_PD for row in rows if row.hidden_PD is not None]) if wanted.with_hidden else None,
        layers={layer: joined([row.layers[layer] for row in rows]) for layer in wanted.layers},
        attention={layer: _attention(rows, is_whole_P, layer, heads) for layer, heads in wanted.attention.items()},
    )


def _attention(rows: Sequence[FeatureRow], is_whole_P: Float32, layer: int, heads: Sequence[int]) -> PackAttention:
    keys, weights, rest = [], [], []
    for row in rows:
        stored = [row.attention[layer, head] for head in heads]
        keys.append(np.stack([one.keys_PM for one in stored], axis=1).astype(np.int32))
        weights.append(np.stack([one.weights_PM for one in stored], axis=1))
        rest.append(np.stack([one.rest_P for one in stored], axis=1))
    if not rows:
        empty = np.zeros((0, len(heads), 1), np.float32)
        return PackAttention(empty.astype(np.int32), empty, empty[:, :, 0])
    # Where a document begins inside its chain, attention has weight 0 (is_whole_P); its keys only have to exist.
    keys_PAm = np.concatenate(keys) * is_whole_P.astype(np.int32)[:, None, None]
    return PackAttention(keys_PAm, np.concatenate(weights), np.concatenate(rest))


def pin_features(path: Path, data: DataConfig) -> list[FeatureSet | None]:
    """The feature set of each cache at the version that the run began with, kept in `path`; None for caches without.

    Raises ConfigError if no cache has any, DataError for a set that does not exist.
    """
    if path.exists():
        return reopen_features(path, data)
    sets: list[FeatureSet | None] = []
    for number, cache in enumerate(data.caches):
        table = Catalog(cache.path).features
        if cache.features is None and len(data.caches) > 1 and (table is None or not table.files()):
            # Among several caches some may have no features.
            sets.append(None)
            continue
        try:
            sets.append(FeatureSet.open(cache.path, cache.features))
        except DataError as error:
            raise ConfigError(f"data.caches.{number}: {error}") from error
    if all(one is None for one in sets):
        raise ConfigError(f"no cache of data.caches has features: `{COMMAND}` adds them")
    pins = [None if one is None else {"set_id": one.set_id, "version": one.version} for one in sets]
    write_text_atomic(path, json.dumps(pins, indent=2) + "\n")
    return sets


def reopen_features(path: Path, data: DataConfig) -> list[FeatureSet | None]:
    """The sets that `pin_features` kept. Raises DataError where one is gone."""
    pins = json.loads(path.read_text(encoding="utf-8"))
    return [
        None if pin is None else FeatureSet.open(cache.path, pin["set_id"], pin["version"])
        for cache, pin in zip(data.caches, pins, strict=True)
    ]


def stage_features(mix: LossMix, selection: Selection, sets: Sequence[FeatureSet | None]) -> StageFeatures:
    """What the losses of `mix`, whose layers are named, read of the sets. Raises ConfigError."""
    if selection.header.text is not None:
        raise ConfigError(
            f"{' and '.join(mix.names)}: features belong to chains as the cache holds them: remove data.prompt, "
            "data.mixture and dpo from this stage's run"
        )
    known = [one for one in sets if one is not None]
    # One pack may hold chains of several caches, whose features are stacked to one array.
    manifests = {_meaning(one) for one in known}
    if len(manifests) > 1:
        raise ConfigError(
            f"feature sets {', '.join(one.set_id for one in known)} differ in teacher, layers or heads: choose sets "
            "that agree with data.caches.features"
        )
    # Sets that agree this far differ in scales and bases alone, so any of them stands for all.
    if mix.reads_hidden and not known[0].stores_hidden:
        raise ConfigError(f"tail: exact needs last hidden states, which {_stored(known[0])}")
    pairs = {
        kind: sorted({teacher for term in mix.features if isinstance(term, kind) for teacher, _ in term.layers or ()})
        for kind in (HiddenLoss, AttentionKL)
    }
    heads = {layer: tuple(head for one, head in known[0].heads if one == layer) for layer in pairs[AttentionKL]}
    num_chains = _num_chains(selection, sets)
    if not num_chains:
        raise ConfigError(
            f"none of the {selection.num_chains} selected chains has features in {known[0].set_id}: select others, or "
            f"add theirs with `{COMMAND}`"
        )
    return StageFeatures(tuple(sets), mix.reads_hidden, tuple(pairs[HiddenLoss]), heads, num_chains)


def with_layers(
    stage: StageConfig, mix: LossMix, features: FeatureSet, num_layers: int, hidden_size: int
) -> StageConfig:
    """The stage with pairs of layers and projections named, for a student of these sizes. Raises ConfigError."""
    losses = dict(stage.losses)
    for term in mix.features:
        is_attention = isinstance(term, AttentionKL)
        stored = tuple(sorted({layer for layer, _ in features.heads})) if is_attention else features.layers
        if not stored:
            what = "the attention" if is_attention else "middle layers"
            raise ConfigError(f"{term.name} needs {what} of the teacher, which {_stored(features)}")
        pairs = _checked(term, stored, features.manifest.num_layers, num_layers, first=0 if is_attention else 1)
        # Named once, here: plan, loss and student then read the same pairs.
        update: dict[str, object] = {"layers": dict(pairs)}
        if isinstance(term, ProjectedLoss):
            # Between equal widths a projection would only add weights to learn.
            same_width = hidden_size == features.hidden_size
            if term.project is False and not same_width:
                raise ConfigError(
                    f"{term.name}.project: the student's states have width {hidden_size}, the teacher's "
                    f"{features.hidden_size}: leave it out"
                )
            update["project"] = not same_width if term.project is None else term.project
        losses[term.name] = losses[term.name].model_copy(update=update)
    return stage.model_copy(update={"losses": losses})


def evenly_spaced(layers: Sequence[int], num_teacher: int, num_student: int, first: int) -> list[tuple[int, int]]:
    """(teacher layer, student layer) of each, at the same share of depth; `first` is the number of the first layer.

    Of 24 layers to 6, layers 4, 12 and 20 (counted from 1) stand beside 1, 3 and 5.
    """
    # Depths are compared counted from 1, whatever number the first layer has.
    return [(layer, max(1, round((layer + 1 - first) * num_student / num_teacher)) - 1 + first) for layer in layers]


def _checked(
    term: FeatureLoss, stored: tuple[int, ...], num_teacher: int, num_student: int, first: int
) -> list[tuple[int, int]]:
    if term.layers is None:
        return evenly_spaced(stored, num_teacher, num_student, first)
    for teacher, student in term.layers:
        if teacher not in stored:
            shown = ", ".join(map(str, stored))
            raise ConfigError(f"{term.name}.layers: the set holds layers {shown} of the teacher, not {teacher}")
        if not first <= student < num_student + first:
            raise ConfigError(
                f"{term.name}.layers: the student has layers {first} to {num_student - 1 + first}, not {student}"
            )
    return list(term.layers)


def _num_chains(selection: Selection, sets: Sequence[FeatureSet | None]) -> int:
    cache_R = selection.cache_G[selection.group_R]
    found = 0
    for number, features in enumerate(sets):
        if features is not None:
            # As in Selection.key_R: the first 16 hex digits.
            keys = np.array([int(one[:16], 16) for one in features.sample_ids()], np.uint64)
            found += int(np.isin(selection.key_R[cache_R == number], keys).sum())
    return found


def _meaning(features: FeatureSet) -> tuple[object, ...]:
    manifest = features.manifest
    return (
        manifest.teacher.fingerprint,
        features.hidden_size,
        features.stores_hidden,
        features.layers,
        features.heads,
        features.num_keys,
    )


def _stored(features: FeatureSet) -> str:
    """`the set ... does not hold: it holds ...`, after what is missing."""
    layers = ", ".join(map(str, features.layers[:MAX_SHOWN]))
    parts = [
        *(["last hidden states"] if features.stores_hidden else []),
        *([f"layers {layers}"] if features.layers else []),
        *([f"attention of {len(features.heads)} heads"] if features.heads else []),
    ]
    return f"the set {features.set_id} does not hold (it holds {' and '.join(parts)}): make one with `{COMMAND}`"
