"""Writes the golden feature set: `python -m tests.helpers.golden_features`, once a format version, never to make a test
pass.
"""

import numpy as np

from stillroom.cache.feature_codec import Basis, VectorCodec, encode_attention
from stillroom.cache.features import constants_of
from stillroom.cache.tensors import tensor_bytes
from stillroom.schema.features import FeatureHeader, Head, SetManifest, StoredAttention, StoredVectors
from stillroom.schema.manifest import Teacher
from stillroom.schema.records import Float32
from teacher_cache.writer.feature_file import FeatureFile, FeatureValues
from tests.helpers.golden import FOLDER, TEACHER

CONSTANTS = "f" * 32
HIDDEN_PD: Float32 = np.array([[1.0, -200.0, 0.5, 0.0], [0.25, 100.0, -0.5, 2.0]], np.float32)
LAYER_PD: Float32 = np.array([[3.0, 5.0, 1.0, 1.0], [-1.0, 1.0, 1.0, 1.0]], np.float32)
KEYS_PHM = np.array([[[0, 4]], [[5, 0]]], np.int32)
WEIGHTS_PHM = np.array([[[0.64, 0.25]], [[1.0, 0.0]]], np.float32)
CODECS = {
    "hidden": VectorCodec(8, np.array([1.0, 100.0, 1.0, 1.0], np.float32)),
    "layer2": VectorCodec(
        4,
        np.array([2.0, 1.0], np.float32),
        # x = mean + c @ vectors: the first two channels alone vary.
        Basis(np.ones(4, np.float32), np.eye(2, 4, dtype=np.float32), np.eye(4, 2, dtype=np.float32)),
    ),
}
HEADER = FeatureHeader(
    set_id="golden_00000000",
    worker="w0",
    constants=CONSTANTS,
    teacher_fingerprint=TEACHER,
    chains_file="golden_00000000/w0-000000-" + "0" * 32 + ".parquet",
)
MANIFEST = SetManifest(
    set_id="golden_00000000",
    name="golden",
    created_at="2026-11-29T00:00:00Z",
    teacher=Teacher(
        model="golden",
        fingerprint=TEACHER,
        weights_fingerprint="a" * 32,
        tokenizer_fingerprint="b" * 32,
        template_fingerprint="c" * 32,
        vocab_size=6,
    ),
    num_layers=3,
    hidden_size=4,
    entropy_frac=None,
    hidden=StoredVectors(name="hidden", layer=None, bits=8, rank=None, lost_frac=0.0, error_frac=0.0),
    layers=[StoredVectors(name="layer2", layer=2, bits=4, rank=2, lost_frac=0.0, error_frac=0.0)],
    attention=StoredAttention(heads=[(1, 3)], num_heads=4, num_keys=2, entropy=[0.5]),
    head=Head(file="head-" + "e" * 32 + ".safetensors", vocab_size=6, hidden_size=4),
    constants=CONSTANTS,
    num_calibration_tokens=2,
    logprob_error=0.0,
    engine={},
    software={},
)


def golden_values() -> FeatureValues:
    """One chain of three prompt and three completion tokens, of which the first and the last have features."""
    return FeatureValues(
        sample_id="bfdef3aeb594a39fbff79daae30acd5f",
        chain_id="0123456789abcdef0123456789abcdef",
        num_context=6,
        positions_P=np.array([0, 2], np.int32),
        hidden=CODECS["hidden"].encode(HIDDEN_PD),
        layers=CODECS["layer2"].encode(LAYER_PD),
        attention=encode_attention(KEYS_PHM, WEIGHTS_PHM, 6),
    )


if __name__ == "__main__":
    file = FeatureFile(FOLDER / "features-v1.parquet", HEADER)
    file.add(golden_values())
    file.close()
    (FOLDER / "features-v1.safetensors").write_bytes(tensor_bytes(constants_of(CODECS)))
    (FOLDER / "features-v1.json").write_text(MANIFEST.model_dump_json(indent=2) + "\n")
