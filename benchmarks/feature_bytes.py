"""Bytes a token of feature sets on SmolLM2, what the plan said, and what coding loses.

    python -m benchmarks.feature_bytes [--tokens N] [--folder DIR] [--json]

Builds a cache of the demo's teacher (vLLM), runs the teacher once over its chains in transformers, and stores sets
from these states: the last hidden state in int8, int4 and rank 256, four middle layers in rank 64, eight heads with
eight positions each. Bytes are those of the sets' files, without constants. Of `hidden` the KL divergence is that of
the reconstructed distribution from the exact one, on chains that no basis was fitted on; of layers the squared error
relative to the variance; of attention the mass of the stored positions and the total variation of their weights. The
last line is one JSON object; with --json it is the only one.
"""

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import teacher_cache
from benchmarks.demo.smollm2 import ensure_teacher
from stillroom.cache.catalog import Catalog
from stillroom.cache.features import FeatureRow, FeatureSet
from stillroom.config import validate_config
from stillroom.log import note
from stillroom.schema.records import Float32
from teacher_cache.config import BuildConfig, EmbeddedConfig
from teacher_cache.engine.teacher import identify_teacher
from teacher_cache.prompts.prompts import WHOLE
from teacher_cache.states.config import FeaturesConfig, TransformersConfig
from teacher_cache.states.engine import ChainTokens, HeadWeights, States, StatesEngine, Wanted, batches
from teacher_cache.states.model import shape_of, wanted_of
from teacher_cache.states.passes import FeaturesPass
from teacher_cache.states.plan import plan_features
from teacher_cache.states.selection import choose, read_unit
from teacher_cache.states.transformers import TransformersStates

CHAIN_TOKENS = 160
LAYERS = [6, 12, 18, 24]
ATTENTION_LAYER = 15
SETS: dict[str, dict[str, Any]] = {
    "hidden_int8": {"last_hidden": {}},
    "hidden_rank256": {"last_hidden": {"rank": 256}},
    "hidden_int4": {"last_hidden": {"bits": 4}},
    "layers_rank64": {"layers": {"at": LAYERS, "rank": 64}},
    # Eight of the nine heads.
    "attention_8x8": {"attention": {"layers": [ATTENTION_LAYER], "keep_frac": 0.85, "keys": 8}},
}
FIT_FRAC, UNSEEN_FROM_FRAC = 0.7, 0.8
"""Share of the tokens that bases are fitted on, and where the chains begin on which errors are measured."""
EVERYTHING = Wanted(True, tuple(LAYERS), (ATTENTION_LAYER,), 8)


@dataclass(frozen=True)
class Measured:
    """One set; bytes a stored token. Errors are None where they do not apply."""

    name: str
    num_tokens: int
    bytes_per_token: float
    planned_bytes_per_token: float
    planned_total_off: float
    constant_bytes: int
    lost_frac: float | None
    kl_mean: float | None
    kl_p99: float | None
    error_frac: float | None
    attention_mass: float | None
    attention_tv: float | None
    decode_tokens_per_s: float


class Replayed:
    """Implements StatesEngine with states that were computed before."""

    is_teacher = True
    settings: Mapping[str, Any] = {"kind": "replayed"}
    software: Mapping[str, str] = {}

    def __init__(self, states: Mapping[str, States], head: HeadWeights) -> None:
        self._states, self._head = states, head

    def head(self) -> HeadWeights:
        return self._head

    def run(self, chains: Sequence[ChainTokens]) -> list[States]:
        return [self._states[chain.sample_id] for chain in chains]

    def close(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=10_000, help="completion tokens to generate, about")
    parser.add_argument("--folder", type=Path, help="keep teacher and cache here")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON object")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stillroom-features-")))
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(folder, options.tokens)
    if not options.json:
        for one in found:
            note(
                f"{one.name}: {one.bytes_per_token:.1f} B/token (planned {one.planned_bytes_per_token:.1f}, in all "
                f"{one.planned_total_off:+.2%}), decoded at {one.decode_tokens_per_s:.0f} tok/s"
            )
    print(json.dumps([asdict(one) for one in found]))


def measure(folder: Path, num_tokens: int) -> list[Measured]:
    """All sets over one cache in `folder`."""
    model = ensure_teacher(folder / "teacher")
    cache = folder / "cache"
    teacher_cache.build(_build_config(model, cache, num_tokens))
    teacher = identify_teacher(_config(model, cache, "none").teacher.as_teacher, EmbeddedConfig()).record
    shape, catalog = shape_of(teacher, False), Catalog(cache)
    units = choose(catalog, _config(model, cache, "none").chains, teacher)
    chains = [chain for unit in units for chain in read_unit(catalog, unit, unit.places, None)]
    engine = TransformersStates(teacher, False, TransformersConfig(kind="transformers", batch_tokens=2048), EVERYTHING)
    states: dict[str, States] = {}
    for batch in batches(chains, 2048):
        states |= {chain.sample_id: one for chain, one in zip(batch, engine.run(batch), strict=True)}
        note(f"{len(states)}/{len(chains)} chains")
    head = engine.head()
    engine.close()
    found = []
    for name, blocks in SETS.items():
        calibration = {"tokens": int(FIT_FRAC * sum(len(chain.token_ids) for chain in chains))}
        config = _config(model, cache, name, **blocks, calibration=calibration)
        planned = plan_features(config)
        assert set(wanted_of(config, shape).layers) <= set(LAYERS)
        features = FeaturesPass(config, teacher, shape, WHOLE)
        with contextlib.closing(features):
            features.run(lambda _: _replayed(states, head))
        found.append(_measured(cache, name, planned.bytes_per_token, planned.total_bytes, chains, states))
    return found


def _replayed(states: Mapping[str, States], head: HeadWeights) -> StatesEngine:
    return Replayed(states, head)


def _measured(
    cache: Path,
    name: str,
    planned: float,
    planned_total: float,
    chains: Sequence[ChainTokens],
    states: Mapping[str, States],
) -> Measured:
    opened = FeatureSet.open(cache, name)
    files = list((cache / "features" / opened.set_id).glob("*.parquet"))
    size = sum(path.stat().st_size for path in files)
    constants = sum(path.stat().st_size for path in (cache / "feature_sets" / opened.set_id).iterdir())
    # Only the first set that needs the head has it in its plan.
    head = sum(path.stat().st_size for path in (cache / "feature_sets").glob("head-*")) if name == "hidden_int8" else 0
    num_tokens = sum(len(chain.positions_P) for chain in chains)
    started_s = time.monotonic()
    rows = opened.read([chain.sample_id for chain in chains])
    seconds = time.monotonic() - started_s
    # Calibration took the first chains by hash.
    unseen = sorted(chain.sample_id for chain in chains)[int(UNSEEN_FROM_FRAC * len(chains)) :]
    stored = [*opened.manifest.layers, *([opened.manifest.hidden] if opened.manifest.hidden else [])]
    kl_mean, kl_p99 = _divergence(opened, rows, states, unseen) if opened.stores_hidden else (None, None)
    mass, variation = _attention(opened, rows, states, unseen) if opened.heads else (None, None)
    return Measured(
        name=name,
        num_tokens=num_tokens,
        bytes_per_token=size / num_tokens,
        planned_bytes_per_token=planned,
        planned_total_off=planned_total / (size + constants + head) - 1,
        constant_bytes=constants + head,
        lost_frac=float(np.mean([one.lost_frac for one in stored])) if stored else None,
        kl_mean=kl_mean,
        kl_p99=kl_p99,
        error_frac=_error(rows, states, unseen) if opened.layers else None,
        attention_mass=mass,
        attention_tv=variation,
        decode_tokens_per_s=num_tokens / seconds,
    )


def _divergence(
    opened: FeatureSet, rows: Mapping[str, FeatureRow], states: Mapping[str, States], unseen: Sequence[str]
) -> tuple[float, float]:
    head = opened.head()
    found = []
    for sample_id in unseen:
        true_PD, decoded_PD = states[sample_id].hidden_PD, rows[sample_id].hidden_PD
        assert true_PD is not None
        assert decoded_PD is not None
        true_PV, decoded_PV = _log_softmax(head.logits(true_PD)), _log_softmax(head.logits(decoded_PD))
        found.append((np.exp(true_PV) * (true_PV - decoded_PV)).sum(axis=1))
    kl_P = np.concatenate(found)
    return float(kl_P.mean()), float(np.quantile(kl_P, 0.99))


def _log_softmax(logits_PV: Float32) -> Float32:
    shifted_PV = logits_PV - logits_PV.max(axis=1, keepdims=True)
    logprobs_PV: Float32 = shifted_PV - np.log(np.exp(shifted_PV).sum(axis=1, keepdims=True))
    return logprobs_PV


def _error(rows: Mapping[str, FeatureRow], states: Mapping[str, States], unseen: Sequence[str]) -> float:
    """Mean over the layers."""
    found = []
    for layer in LAYERS:
        true_ND = np.concatenate([states[one].layers[layer] for one in unseen])
        decoded_ND = np.concatenate([rows[one].layers[layer] for one in unseen])
        variance = np.square(true_ND - true_ND.mean(axis=0)).sum()
        found.append(np.square(decoded_ND - true_ND).sum() / variance)
    return float(np.mean(found))


def _attention(
    opened: FeatureSet, rows: Mapping[str, FeatureRow], states: Mapping[str, States], unseen: Sequence[str]
) -> tuple[float, float]:
    masses, variations = [], []
    for sample_id in unseen:
        for layer, head in opened.heads:
            decoded = rows[sample_id].attention[layer, head]
            true_PM = states[sample_id].attention[layer].weights_PHM[:, head]
            masses.append(true_PM.sum(axis=1))
            rest_P = np.abs(decoded.rest_P - (1 - true_PM.sum(axis=1)))
            variations.append((np.abs(decoded.weights_PM - true_PM).sum(axis=1) + rest_P) / 2)
    return float(np.concatenate(masses).mean()), float(np.concatenate(variations).mean())


def _config(model: Path, cache: Path, name: str, **blocks: object) -> FeaturesConfig:
    content = {
        "cache": cache,
        "name": name,
        "teacher": {"model": str(model)},
        "engine": {"kind": "transformers"},
        **(blocks or {"last_hidden": {}}),
    }
    return validate_config(content, FeaturesConfig, "feature_bytes")


def _build_config(model: Path, cache: Path, num_tokens: int) -> BuildConfig:
    num = max(16, num_tokens // CHAIN_TOKENS)
    content = {
        "cache": cache,
        "run": "bytes",
        "teacher": {"model": str(model)},
        "prompts": {
            "sources": [
                {"kind": "reasoning_gym", "name": "sums", "task": "gsm_symbolic", "size": num // 2},
                {"kind": "reasoning_gym", "name": "words", "task": "family_relationships", "size": num - num // 2},
            ]
        },
        "sampling": {"temperature": 0.8, "max_tokens": CHAIN_TOKENS},
        "capture": {"max_support": 8, "draws": 0},
        "engine": {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 32, "enforce_eager": True},
    }
    return validate_config(content, BuildConfig, "feature_bytes")


if __name__ == "__main__":
    main()
