"""Writes an OpenVINO folder by optimum-intel: weights of 8 bits a channel, activations float; with the tokenizer as a
model, without which OpenVINO's pipelines and servers open none.
"""

from importlib.metadata import version
from pathlib import Path

import openvino as ov
from openvino_tokenizers import convert_tokenizer
from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
from protocol import serve
from transformers import AutoTokenizer


def write(folder: str, out: str, precision: str, chains: str | None) -> dict[str, str]:
    """`precision` is int8."""
    assert (precision, chains) == ("int8", None)
    model = OVModelForCausalLM.from_pretrained(
        folder, export=True, compile=False, quantization_config=OVWeightQuantizationConfig(bits=8)
    )
    model.save_pretrained(out)
    tokenizer, detokenizer = convert_tokenizer(AutoTokenizer.from_pretrained(folder), with_detokenizer=True)
    ov.save_model(tokenizer, Path(out) / "openvino_tokenizer.xml")
    ov.save_model(detokenizer, Path(out) / "openvino_detokenizer.xml")
    return {name: version(name) for name in ("optimum-intel", "nncf", "openvino", "openvino-tokenizers")}


if __name__ == "__main__":
    serve({"write": write})
