"""Writes an ONNX folder by onnxruntime-genai's builder: the model with its attention cache, and how to generate."""

import runpy
import sys
import tempfile
from importlib.metadata import version

from protocol import serve

BUILDER = "onnxruntime_genai.models.builder"


def write(folder: str, out: str, precision: str, chains: str | None) -> dict[str, str]:
    """`precision` is fp32 or int8 (weights in blocks; products also round activations)."""
    assert chains is None
    with tempfile.TemporaryDirectory() as cache:
        # The builder's functions want what its command line prepares. Its defaults are best: on the demo's student,
        # blocks of 64 weights cost half a point of agreement and are no faster, and float activations 30 times slower.
        sys.argv = [BUILDER, "-i", folder, "-o", out, "-p", precision, "-e", "cpu", "-c", cache]
        runpy.run_module(BUILDER, run_name="__main__", alter_sys=True)
    return {name: version(name) for name in ("onnxruntime-genai", "onnx")}


if __name__ == "__main__":
    serve({"write": write})
