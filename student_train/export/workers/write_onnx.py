"""Writes an ONNX folder by onnxruntime-genai's builder: the model with its attention cache, and how to generate."""

import runpy
import sys
import tempfile
from importlib.metadata import version

from protocol import serve

BUILDER = "onnxruntime_genai.models.builder"


def write(folder: str, out: str, precision: str, chains: str | None) -> dict[str, str]:
    """`precision` is fp32 or int8 (weights in blocks, activations float)."""
    assert chains is None
    with tempfile.TemporaryDirectory() as cache:
        # The builder's functions want what its command line prepares.
        sys.argv = [BUILDER, "-i", folder, "-o", out, "-p", precision, "-e", "cpu", "-c", cache]
        runpy.run_module(BUILDER, run_name="__main__", alter_sys=True)
    return {name: version(name) for name in ("onnxruntime-genai", "onnx")}


if __name__ == "__main__":
    serve({"write": write})
