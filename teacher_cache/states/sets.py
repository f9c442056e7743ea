"""A feature set's constants, fitted once by its first worker: scales, low-rank bases, chosen heads, the teacher's head.

The manifest is written last: a set without one does not exist yet, and what its first worker wrote is written again.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stillroom.cache import tensors
from stillroom.cache.catalog import Catalog
from stillroom.cache.feature_codec import VectorCodec, encode_attention
from stillroom.cache.features import SETS_FOLDER, constants_of, read_codecs, read_sets, set_folder
from stillroom.config import plain
from stillroom.errors import ConfigError, StillroomError
from stillroom.log import format_count, note
from stillroom.schema.features import Head, SetManifest, StoredAttention, StoredVectors
from stillroom.schema.manifest import Teacher
from stillroom.schema.records import Float32, stable_hash
from stillroom.storage.paths import Location, atomic_path, write_text_atomic
from teacher_cache.states.config import FeaturesConfig, HiddenConfig, LayersConfig
from teacher_cache.states.engine import (
    AttendedKeys,
    ChainTokens,
    HeadWeights,
    Shape,
    States,
    StatesEngine,
    Wanted,
    batches,
)
from teacher_cache.states.fitting import error_frac, fit_codec, head_metric
from teacher_cache.states.model import float_head
from teacher_cache.writer.commit import is_locked, lock_path, worker_lock
from teacher_cache.writer.feature_file import FeatureValues

HASH_CHARS = 32
CREATOR = "constants"
"""Takes the worker's place in the name of the lock that the first worker of a set holds while it fits."""
FIT_WAIT_S = 3600.0
MAX_LOGPROB_ERROR = 0.25
"""Median difference in nats from the cache's log probabilities above which states and chains do not belong together.
Another precision makes about 0.01, another token several nats.
"""
CHECKED_POSITIONS = 512


@dataclass(frozen=True)
class OpenSet:
    """A set with its codecs: turns states into rows."""

    manifest: SetManifest
    codecs: Mapping[str, VectorCodec]

    def encoded(self, chain: ChainTokens, states: States) -> FeatureValues:
        """The row of one chain."""
        hidden = layers = attention = None
        if self.manifest.hidden is not None and states.hidden_PD is not None:
            hidden = self.codecs["hidden"].encode(states.hidden_PD)
        if self.manifest.layers:
            layers = b"".join(
                self.codecs[one.name].encode(states.layers[one.layer])
                for one in self.manifest.layers
                if one.layer is not None
            )
        if self.manifest.attention is not None:
            heads = self.manifest.attention.heads
            # Only the heads that were chosen at calibration; the engine returns all of a layer.
            keys_PHM = np.stack([states.attention[layer].keys_PHM[:, head] for layer, head in heads], axis=1)
            weights_PHM = np.stack([states.attention[layer].weights_PHM[:, head] for layer, head in heads], axis=1)
            attention = encode_attention(keys_PHM, weights_PHM, chain.num_context)
        return FeatureValues(
            chain.sample_id, chain.chain_id, chain.num_context, chain.positions_P, hidden, layers, attention
        )


def set_id_of(config: FeaturesConfig, teacher: Teacher, wanted: Wanted) -> str:
    """`<name>_<8 hex>`: another teacher, other states, precision or tokens make another set; more chains do not."""
    stored = {key: plain(config)[key] for key in ("tokens", "last_hidden", "layers", "attention")}
    # By number: 0.5 of 30 layers and 15 are the same layer.
    for key, numbers in (("layers", wanted.layers), ("attention", wanted.attention)):
        if stored[key] is not None:
            stored[key] = {**stored[key], "at" if key == "layers" else "layers": list(numbers)}
    return f"{config.name}_{stable_hash('features', teacher.fingerprint, stored)[:8]}"


def rank_of(block: HiddenConfig | LayersConfig, hidden_size: int) -> int | None:
    """The rank of the basis, None for no basis."""
    if block.rank is None and block.bits == 4:
        # 4 bits are too coarse for single channels: rounded in a basis of full rank, the last state of SmolLM2 has half
        # of the KL.
        return hidden_size
    return block.rank


def finite_states(engine: StatesEngine, chains: Sequence[ChainTokens]) -> list[States]:
    """The engine's states of these chains. Raises StillroomError naming a chain whose states are not finite."""
    found = engine.run(chains)
    for chain, one in zip(chains, found, strict=True):
        parts: dict[str, Float32 | None] = {"last_hidden": one.hidden_PD}
        parts |= {f"layer {number}": states_PD for number, states_PD in one.layers.items()}
        parts |= {f"attention of layer {number}": keys.weights_PHM for number, keys in one.attention.items()}
        wrong = [name for name, part in parts.items() if part is not None and not np.isfinite(part).all()]
        if wrong:
            dtype = engine.settings.get("dtype", "its own")
            raise StillroomError(
                f"chain {chain.sample_id}: {wrong[0]} is not finite with weights of type {dtype}: set engine.dtype to "
                "bfloat16 or float32, or exclude the chain with chains.where. Finished chains are saved"
            )
    return found


def find_set(catalog: Catalog, set_id: str) -> OpenSet | None:
    """The set if it exists. Raises CorruptError for a damaged one."""
    manifest = read_sets(catalog.root).get(set_id)
    return None if manifest is None else OpenSet(manifest, read_codecs(catalog.root, manifest))


def create_set(
    catalog: Catalog,
    config: FeaturesConfig,
    teacher: Teacher,
    shape: Shape,
    wanted: Wanted,
    engine: StatesEngine,
    calibration: Sequence[ChainTokens],
) -> OpenSet:
    """Fits and writes the set, or returns the one that another worker wrote meanwhile.

    Raises StillroomError if the states do not reproduce the cache's log probabilities, ConfigError if the calibration
    chains are too few for a rank.
    """
    set_id = set_id_of(config, teacher, wanted)
    lock = lock_path(catalog.root, set_id, CREATOR)
    if is_locked(lock):
        note(f"waiting for the worker that fits the set {set_id}")
    with worker_lock(lock, FIT_WAIT_S):
        # Another worker may have written it while this one waited for the lock.
        found = find_set(catalog, set_id)
        if found is not None:
            return found
        states = [
            one for batch in batches(calibration, config.engine.batch_tokens) for one in finite_states(engine, batch)
        ]
        num_tokens = sum(len(chain.positions_P) for chain in calibration)
        note(f"fitting the set {set_id} on {format_count(num_tokens)} tokens of {len(calibration)} chains")
        head = engine.head() if wanted.hidden else None
        error = None
        # Invented states reproduce nothing.
        if head is not None and engine.is_teacher:
            error = _check_states(head, calibration, states)
        stored, codecs = _fit_vectors(config, wanted, head, states)
        attention = _choose_heads(config, wanted, states)
        folder = set_folder(catalog.root, set_id)
        manifest = SetManifest(
            set_id=set_id,
            name=config.name,
            created_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            teacher=teacher,
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            entropy_frac=config.tokens.entropy_frac,
            hidden=next((one for one in stored if one.layer is None), None),
            layers=[one for one in stored if one.layer is not None],
            attention=attention,
            head=None if head is None else _write_head(catalog, head, shape),
            constants=_write_named(folder, "constants", constants_of(codecs)),
            num_calibration_tokens=num_tokens,
            logprob_error=error,
            engine={**plain(config.engine), **engine.settings},
            software=dict(engine.software),
        )
        # A store has no lock: where this worker slept and was taken for dead, another one has fitted the set.
        if (found := find_set(catalog, set_id)) is not None:
            return found
        write_text_atomic(folder / "manifest.json", manifest.model_dump_json(indent=2) + "\n")
    for one in stored:
        basis = "all channels" if one.rank is None else f"rank {one.rank}, {one.lost_frac:.2%} of the variance lost"
        note(f"{one.name}: {basis}, {one.error_frac:.2e} of it after coding")
    return OpenSet(manifest, codecs)


def _fit_vectors(
    config: FeaturesConfig, wanted: Wanted, head: HeadWeights | None, states: Sequence[States]
) -> tuple[list[StoredVectors], dict[str, VectorCodec]]:
    stored: list[StoredVectors] = []
    codecs: dict[str, VectorCodec] = {}
    if config.last_hidden is not None and head is not None:
        hidden_ND = np.concatenate([one.hidden_PD for one in states if one.hidden_PD is not None])
        metric = None
        if rank_of(config.last_hidden, hidden_ND.shape[1]) is not None:
            # The metric of the head: what the distributions do not show may be lost.
            metric = head_metric(hidden_ND, float_head(head))
        bits, rank = config.last_hidden.bits, rank_of(config.last_hidden, hidden_ND.shape[1])
        stored.append(_fit("hidden", None, hidden_ND, bits, rank, metric, codecs))
    if config.layers is not None:
        for layer in wanted.layers:
            states_ND = np.concatenate([one.layers[layer] for one in states])
            bits, rank = config.layers.bits, rank_of(config.layers, states_ND.shape[1])
            stored.append(_fit(f"layer{layer}", layer, states_ND, bits, rank, None, codecs))
    return stored, codecs


def _fit(
    name: str,
    layer: int | None,
    states_ND: Float32,
    bits: int,
    rank: int | None,
    metric: Any,
    codecs: dict[str, VectorCodec],
) -> StoredVectors:
    if rank is not None and len(states_ND) < rank:
        raise ConfigError(
            f"{name}: a basis of rank {rank} cannot be fitted on {len(states_ND)} tokens: raise calibration.tokens, "
            "select more chains, or lower the rank"
        )
    codecs[name], lost_frac = fit_codec(states_ND, bits, rank, metric)
    error = error_frac(codecs[name], states_ND)
    return StoredVectors(name=name, layer=layer, bits=bits, rank=rank, lost_frac=lost_frac, error_frac=error)


def _choose_heads(config: FeaturesConfig, wanted: Wanted, states: Sequence[States]) -> StoredAttention | None:
    attention = config.attention
    if attention is None:
        return None
    heads: list[tuple[int, int]] = []
    entropies: list[float] = []
    num_heads = 0
    for layer in wanted.attention:
        entropy_H = _mean_entropy([one.attention[layer] for one in states])
        num_heads = len(entropy_H)
        # Of equal entropies the lower head, so that two workers would choose alike.
        order_H = np.argsort(-entropy_H if attention.entropy == "high" else entropy_H, kind="stable")
        # - 1e-9: 0.28 of 25 heads is 7.000000000000001 as a float, and would be 8.
        kept = np.sort(order_H[: max(1, int(np.ceil(attention.keep_frac * len(entropy_H) - 1e-9)))])
        heads += [(layer, int(head)) for head in kept]
        entropies += [float(entropy_H[head]) for head in kept]
    return StoredAttention(heads=heads, num_heads=num_heads, num_keys=attention.keys, entropy=entropies)


def _mean_entropy(parts: Sequence[AttendedKeys]) -> Float32:
    weights = [len(one.keys_PHM) for one in parts]
    mean_H: Float32 = np.average([one.entropy_H for one in parts], axis=0, weights=weights).astype(np.float32)
    return mean_H


def _check_states(head: HeadWeights, chains: Sequence[ChainTokens], states: Sequence[States]) -> float:
    """Median difference of head x state from the cache. Raises StillroomError if the two do not belong together."""
    loaded, differences, left = float_head(head), [], CHECKED_POSITIONS
    for chain, one in zip(chains, states, strict=True):
        if not left or one.hidden_PD is None:
            break
        # Not all of a long chain: its logits would be tens of gigabytes.
        logits_PV = loaded.logits(one.hidden_PD[:left])
        top_P1 = logits_PV.max(axis=1, keepdims=True)
        log_sum_P = top_P1[:, 0] + np.log(np.exp(logits_PV - top_P1).sum(axis=1))
        picked_P = logits_PV[np.arange(len(logits_PV)), chain.token_ids[chain.positions_P[:left]]]
        differences.append(np.abs(picked_P - log_sum_P - chain.sampled_logprob_P[:left]))
        left -= len(logits_PV)
    error = float(np.median(np.concatenate(differences)))
    # Also not a number, which compares as false.
    if not error <= MAX_LOGPROB_ERROR:
        raise StillroomError(
            f"the teacher's states times its head differ from the cache's log probabilities by {error:.2g} nats: the "
            "chains were generated in another precision or quantization, or this architecture scales its logits in a "
            "way that is not known here. Nothing was written"
        )
    return error


def _write_head(catalog: Catalog, head: HeadWeights, shape: Shape) -> Head:
    name = _write_named(catalog.root / SETS_FOLDER, "head", head.tensors)
    vocab_size = len(head.tensors["weight"])
    return Head(
        file=f"head-{name}.safetensors",
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        norm=dict(head.norm),
    )


def _write_named(folder: Location, stem: str, content: Mapping[str, Any]) -> str:
    """Writes `<stem>-<hash>.safetensors` unless it is there; returns the hash of its bytes."""
    data = tensors.tensor_bytes(content)
    name = hashlib.sha256(data).hexdigest()[:HASH_CHARS]
    target = folder / f"{stem}-{name}.safetensors"
    # Named by its bytes, so a file of this name has this content.
    if not target.exists():
        with atomic_path(target) as temp:
            temp.write_bytes(data)
    return name
