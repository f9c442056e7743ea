"""What a stage reads of the tables of features: which sets, which layers, and which layers of the student stand beside.

In: a mix of losses, the pinned feature sets of a run's caches, the student's sizes. Out: `StageFeatures`, which reads
rows for the stream, and a configuration whose losses name every pair of layers. Refusals come here, before any model is
loaded: a cache without features, a set without what a loss reads, layers that do not exist.

    P tokens with features, D teacher's width, R coefficients of a state (D without a basis), A stored heads of a layer
    m stored positions of a query
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from stillroom.cache.features import FeatureRow, FeatureSet
from stillroom.errors import ConfigError, DataError
from stillroom.schema.records import Float32, Int32
from stillroom.storage.paths import write_text_atomic
from student_train.config import DataConfig, StageConfig
from student_train.data.selection import Selection
from student_train.losses.below import AttentionKL, HiddenLoss, ProjectedLoss
from student_train.losses.divergences import FeatureLoss, LossMix

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
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def first(self) -> FeatureSet:
        """Any of the sets; they agree in everything but their chains."""
        return next(one for one in self.sets if one is not None)

    def read(self, cache: int, sample_ids: Sequence[str]) -> list[FeatureRow | None]:
        """Rows of these chains of a cache; None for chains without features. Raises CorruptError."""
        features = self.sets[cache]
        if features is None:
            return [None] * len(sample_ids)
        with self._lock:
            found = features.read(sample_ids, expand=False)
        return [self._needed(found[one]) if one in found else None for one in sample_ids]

    def _needed(self, row: FeatureRow) -> FeatureRow:
        """Without what no loss reads, which would fill the stream's buffer."""
        return FeatureRow(
            row.sample_id,
            row.chain_id,
            row.positions_P,
            row.hidden_PD if self.with_hidden else None,
            {layer: row.layers[layer] for layer in self.layers},
            {(layer, head): row.attention[layer, head] for layer, heads in self.attention.items() for head in heads},
        )


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

    row: FeatureRow | None
    base: int
    start: int
    stop: int
    first: int


def pack_features(pieces: Sequence[PieceFeatures], wanted: StageFeatures) -> PackFeatures:
    """Features of the pieces' loss tokens."""
    parts, places, counts, is_whole = [], [], [], []
    for piece in pieces:
        if piece.row is None:
            counts.append(0)
            continue
        first, last = np.searchsorted(piece.row.positions_P, [piece.start, piece.stop])
        counts.append(int(last - first))
        # Position t is the state that predicts completion token t: it meets that token's loss.
        places.append(piece.base + piece.row.positions_P[first:last] - piece.start)
        is_whole.append(np.full(last - first, piece.first == 0, np.float32))
        parts.append((piece, slice(int(first), int(last))))

    def joined(arrays: list[Float32]) -> Float32:
        return np.concatenate(arrays) if arrays else np.zeros((0, 0), np.float32)

    rows = [(piece.row, own) for piece, own in parts if piece.row is not None]
    return PackFeatures(
        places_P=np.concatenate([*places, np.zeros(0)]).astype(np.int32),
        counts_D=np.array(counts, np.int32),
        is_whole_P=np.concatenate([*is_whole, np.zeros(0, np.float32)]),
        hidden_PR=joined([row.hidden_PD[own] for row, own in rows if row.hidden_PD is not None])
        if wanted.with_hidden
        else None,
        layers={layer: joined([row.layers[layer][own] for row, own in rows]) for layer in wanted.layers},
        attention={layer: _attention(parts, layer, heads) for layer, heads in wanted.attention.items()},
    )


def _attention(parts: Sequence[tuple[PieceFeatures, slice]], layer: int, heads: Sequence[int]) -> PackAttention:
    keys, weights, rest = [], [], []
    for piece, own in parts:
        assert piece.row is not None
        stored = [piece.row.attention[layer, head] for head in heads]
        keys.append(np.stack([one.keys_PM[own] for one in stored], axis=1).astype(np.int32))
        weights.append(np.stack([one.weights_PM[own] for one in stored], axis=1))
        rest.append(np.stack([one.rest_P[own] for one in stored], axis=1))
        if piece.first:
            # These have weight 0 (is_whole_P); their keys only have to exist.
            keys[-1] = np.zeros_like(keys[-1])
    if not parts:
        empty = np.zeros((0, len(heads), 1), np.float32)
        return PackAttention(empty.astype(np.int32), empty, empty[:, :, 0])
    return PackAttention(np.concatenate(keys), np.concatenate(weights), np.concatenate(rest))


def pin_features(path: Path, data: DataConfig) -> list[FeatureSet | None]:
    """The feature set of each cache at the version that the run began with, kept in `path`; None for caches without.

    Raises ConfigError if no cache has any, DataError for a set that does not exist.
    """
    if path.exists():
        return reopen_features(path, data)
    sets: list[FeatureSet | None] = []
    for number, cache in enumerate(data.caches):
        try:
            sets.append(FeatureSet.open(cache.path, cache.features))
        except DataError as error:
            # Among several caches some may have no features; one that is named must exist.
            if cache.features is not None or len(data.caches) == 1:
                raise ConfigError(f"data.caches.{number}: {error}") from error
            sets.append(None)
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
    manifests = {_meaning(one) for one in known}
    if len(manifests) > 1:
        raise ConfigError(
            f"feature sets {', '.join(one.set_id for one in known)} differ in teacher, layers or heads: name sets that "
            "agree with data.caches.features"
        )
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
        update: dict[str, object] = {"layers": dict(pairs)}
        if isinstance(term, ProjectedLoss):
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
