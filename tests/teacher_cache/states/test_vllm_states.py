"""The command through real vLLM stores what transformers has at the same tokens."""

import shutil
from pathlib import Path

import numpy as np
import yaml

from stillroom.cache.features import FeatureSet
from teacher_cache.prompts.prompts import WHOLE
from teacher_cache.states.config import FeaturesConfig
from teacher_cache.states.passes import features_of_cache
from tests.helpers.line import NUM_CHAINS, Line


def test_vllm_and_transformers_agree_by_key(line: Line, tmp_path: Path) -> None:
    # A copy: other tests count what is in the line's own.
    cache = shutil.copytree(line.folder / "runs/demo/cache", tmp_path / "c")
    blocks = {
        "cache": str(cache),
        "teacher": {"model": str(line.folder / "runs/demo/teacher")},
        "chains": {"fraction": 0.5},
        "last_hidden": {"bits": 8},
        "layers": {"at": [1], "rank": None},
    }
    path = tmp_path / "features.yaml"
    engine = {"kind": "vllm", "dtype": "float32", "max_model_len": 256, "kv_cache_gb": 0.25}
    path.write_text(yaml.safe_dump({**blocks, "name": "vllm", "engine": engine}))
    planned = line.step("features plan", "teacher-cache", "plan", str(path))
    result = line.step("features", "teacher-cache", "features", str(path))
    assert 0 < result["num_chains"] == planned["num_left"] < NUM_CHAINS
    engine = {"kind": "transformers", "dtype": "float32"}
    features_of_cache(FeaturesConfig.model_validate({**blocks, "name": "dense", "engine": engine}), WHOLE)
    ours, dense = FeatureSet.open(cache, "vllm"), FeatureSet.open(cache, "dense")
    assert ours.manifest.logprob_error is not None
    assert ours.manifest.logprob_error < 1e-3
    found, true = ours.read(ours.sample_ids()), dense.read(dense.sample_ids())
    assert found.keys() == true.keys()
    for sample_id, row in true.items():
        own = found[sample_id]
        assert own.hidden_PD is not None
        assert row.hidden_PD is not None
        for one, other in ((own.hidden_PD, row.hidden_PD), (own.layers[1], row.layers[1])):
            # Both are rounded to 8 bits, with scales that were fitted apart.
            assert np.square(one - other).mean() < 1e-3 * np.square(other).mean()
    assert line.step("features verify", "teacher-cache", "verify", str(cache))["ok"]
