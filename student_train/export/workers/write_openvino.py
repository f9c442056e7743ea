"""Writes an OpenVINO folder by optimum-intel: weights of 8 bits a channel, activations float."""

from importlib.metadata import version

from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
from protocol import serve


def write(folder: str, out: str, precision: str, chains: str | None) -> dict[str, str]:
    """`precision` is int8."""
    assert (precision, chains) == ("int8", None)
    model = OVModelForCausalLM.from_pretrained(
        folder, export=True, compile=False, quantization_config=OVWeightQuantizationConfig(bits=8)
    )
    model.save_pretrained(out)
    return {name: version(name) for name in ("optimum-intel", "nncf", "openvino")}


if __name__ == "__main__":
    serve({"write": write})
