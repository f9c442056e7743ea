"""What a features pass and an engine exchange: batches of chains go in, their states come out.

TransformersStates (transformers) and VllmStates (vllm) run the teacher, FakeStates makes states up for tests.

Shape legend: P positions asked for, D channels, H heads of a layer, M keys per query, V vocabulary.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from stillroom.schema.records import Float32, Int32


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the engine must return of each chain. `layers` count decoder layers passed, 1 to num_layers - 1;
    `attention` names decoder layers from 0, of which all heads come back with their `num_keys` most attended keys.
    """

    hidden: bool
    layers: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    num_keys: int = 0


@dataclass(frozen=True, slots=True)
class Shape:
    """The teacher's size, known from its config.json."""

    num_layers: int
    hidden_size: int
    num_heads: int
    vocab_size: int
    weight_bytes: int = 4
    """Of each weight in the model's files."""


@dataclass(frozen=True, slots=True)
class ChainTokens:
    """A chain: its prompt and completion ids, and which completion tokens' states are asked for (rising)."""

    sample_id: str
    chain_id: str
    prompt_ids: Int32
    token_ids: Int32
    positions_P: Int32
    sampled_logprob_P: Float32
    """What the cache says of the tokens at `positions_P`, to check the states against."""

    @property
    def num_context(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt_ids) + len(self.token_ids)

    @property
    def inputs(self) -> list[int]:
        """What the model reads. The last token predicts nothing that the chain holds."""
        return [*self.prompt_ids.tolist(), *self.token_ids[:-1].tolist()]

    @property
    def query_P(self) -> Int32:
        """Places among `inputs` whose states predict the tokens at `positions_P`."""
        return (len(self.prompt_ids) - 1 + self.positions_P).astype(np.int32)


@dataclass(frozen=True, slots=True)
class AttendedKeys:
    """One layer: keys_PHM int32 and weights_PHM float32 by falling weight (slots past a query's keys hold 0), and the
    mean over queries of each head's entropy over its possible keys, entropy_H float32 between 0 and 1.
    """

    keys_PHM: Int32
    weights_PHM: Float32
    entropy_H: Float32


@dataclass(frozen=True, slots=True)
class States:
    """What the teacher had at a chain's queries; float32."""

    hidden_PD: Float32 | None = None
    layers: Mapping[int, Float32] = field(default_factory=dict)
    attention: Mapping[int, AttendedKeys] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """The output layer as the model stores it (bfloat16 as its bits in uint16), and what is done to its product."""

    tensors: Mapping[str, Any]
    logit_scale: float
    softcap: float | None
    norm: Mapping[str, Any]


class StatesEngine(Protocol):
    """Runs chains through the teacher. One thread."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What was resolved at startup, for the manifest."""

    @property
    def software(self) -> Mapping[str, str]:
        """Package versions."""

    @property
    def is_teacher(self) -> bool:
        """Whether states times head are the distributions of the cache; not so for invented ones."""

    def head(self) -> HeadWeights:
        """The output layer."""

    def run(self, chains: Sequence[ChainTokens]) -> list[States]:
        """States of each chain, in order. Raises StillroomError if the engine died."""

    def close(self) -> None:
        """Frees the model."""


def batches(chains: Iterable[ChainTokens], batch_tokens: int) -> Iterator[list[ChainTokens]]:
    """Chains in order, as many at a time as fit when padded to the longest; one that is too long comes alone."""
    batch: list[ChainTokens] = []
    longest = 0
    for chain in chains:
        longest = max(longest, chain.num_context)
        # Padded to the longest, a batch costs its length times their number.
        if batch and longest * (len(batch) + 1) > batch_tokens:
            yield batch
            batch, longest = [], chain.num_context
        batch.append(chain)
    if batch:
        yield batch


def most_attended(weights_PHK: Float32, num_keys: int) -> tuple[Int32, Float32]:
    """keys_PHM and weights_PHM by falling weight; with fewer keys than M the rest is 0."""
    num_all = weights_PHK.shape[-1]
    kept = min(num_keys, num_all)
    # Stable: of equal weights the first keys are kept, on every machine.
    keys_PHM = np.argsort(-weights_PHK, axis=-1, kind="stable")[..., :kept]
    best_PHM = np.take_along_axis(weights_PHK, keys_PHM, axis=-1)
    pad = ((0, 0), (0, 0), (0, num_keys - kept))
    # A key with weight 0 lies after the query, or is as good as absent.
    return np.pad(np.where(best_PHM > 0, keys_PHM, 0), pad).astype(np.int32), np.pad(best_PHM, pad)


class FakeStates:
    """Invented states, the same for the same tokens in every batch. Each run sleeps `step_s`."""

    is_teacher = False

    def __init__(self, shape: Shape, wanted: Wanted, step_s: float = 0.0) -> None:
        self._shape, self._wanted, self._step_s = shape, wanted, step_s
        self.settings: Mapping[str, Any] = {"kind": "fake"}
        self.software: Mapping[str, str] = {"fake": "1"}

    def head(self) -> HeadWeights:
        """Random weights, the same each time."""
        size = (self._shape.vocab_size, self._shape.hidden_size)
        return HeadWeights({"weight": np.random.default_rng(0).standard_normal(size, np.float32)}, 1.0, None, {})

    def run(self, chains: Sequence[ChainTokens]) -> list[States]:
        """Noise, with one channel a hundred times as large as the others, as in trained models."""
        time.sleep(self._step_s)
        return [self._states(chain) for chain in chains]

    def close(self) -> None:
        """Nothing to free."""

    def _states(self, chain: ChainTokens) -> States:
        shape, wanted = self._shape, self._wanted

        def vectors(layer: int) -> Float32:
            # Seeded by the tokens, so that a chain has the same states in any batch and on any worker.
            rng = np.random.default_rng([layer, *chain.token_ids.tolist()])
            all_TD = rng.standard_normal((len(chain.token_ids), shape.hidden_size), np.float32)
            all_TD[:, 0] *= 100
            picked_PD: Float32 = all_TD[chain.positions_P]
            return picked_PD

        attention = {}
        for layer in wanted.attention:
            rng = np.random.default_rng([100, layer, *chain.token_ids.tolist()])
            weights_PHK = rng.random((len(chain.positions_P), shape.num_heads, chain.num_context), np.float32)
            weights_PHK *= np.arange(chain.num_context) <= chain.query_P[:, None, None]
            weights_PHK /= weights_PHK.sum(axis=-1, keepdims=True)
            entropy_H = rng.random(shape.num_heads, np.float32)
            attention[layer] = AttendedKeys(*most_attended(weights_PHK, wanted.num_keys), entropy_H)
        hidden_PD = vectors(0) if wanted.hidden else None
        return States(hidden_PD, {layer: vectors(layer) for layer in wanted.layers}, attention)
