"""The formats that a student can be exported to: who writes them, who runs them, and those that are refused.

A format's writer and runtime are scripts of `workers/`, run in the project's environment or in one of their own.
"""

from dataclasses import dataclass

from stillroom.errors import ConfigError

PROJECT = "project"
"""The environment that this runs in."""


@dataclass(frozen=True)
class Runtime:
    """What runs a folder: a script of `workers/` in an environment."""

    script: str
    environment: str


@dataclass(frozen=True)
class Format:
    """A format: `writer` is a script of `workers/`, `precision` its argument, `library` what a model card names."""

    writer: str
    environment: str
    precision: str
    runtime: str
    library: str
    label: str
    is_calibrated: bool = False
    """Whether the writer reads training chains."""
    needs_gpu: bool = False


RUNTIMES = {
    "transformers": Runtime("run_transformers", PROJECT),
    "vllm": Runtime("run_vllm", PROJECT),
    "onnx": Runtime("run_onnx", PROJECT),
    "llama.cpp": Runtime("run_llamacpp", "gguf"),
    "openvino": Runtime("run_openvino", "openvino"),
}

FORMATS = {
    "onnx-fp32": Format("write_onnx", PROJECT, "fp32", "onnx", "onnxruntime-genai", "ONNX, float32"),
    "onnx-int8": Format("write_onnx", PROJECT, "int8", "onnx", "onnxruntime-genai", "ONNX, 8-bit weights"),
    "gguf-f16": Format("write_gguf", "gguf", "f16", "llama.cpp", "gguf", "GGUF, float16"),
    "gguf-q8_0": Format("write_gguf", "gguf", "q8_0", "llama.cpp", "gguf", "GGUF, 8-bit weights"),
    "openvino-int8": Format("write_openvino", "openvino", "int8", "openvino", "openvino", "OpenVINO, 8-bit weights"),
    "w8a8": Format(
        "write_compressed",
        "llmcompressor",
        "w8a8",
        "vllm",
        "vllm",
        "compressed-tensors, 8-bit weights and activations",
        is_calibrated=True,
    ),
    "gptq": Format(
        "write_compressed",
        "llmcompressor",
        "gptq",
        "vllm",
        "vllm",
        "compressed-tensors, 4-bit weights in groups of 32 by GPTQ",
        is_calibrated=True,
    ),
    "awq": Format(
        "write_compressed",
        "llmcompressor",
        "awq",
        "vllm",
        "vllm",
        "compressed-tensors, 4-bit weights in groups of 32 by AWQ",
        is_calibrated=True,
        needs_gpu=True,
    ),
}

SHORT = {"onnx": "onnx-int8", "gguf": "gguf-q8_0", "openvino": "openvino-int8"}
"""What a tool's bare name means."""

# Measured on SmolLM2-135M-Instruct on a CPU; docs/recipes/serving.md has the table.
REFUSED = {
    "torch.ao": "torch.ao's dynamic int8 shares one activation scale among all tokens of a call: 37% top-1 agreement, "
    "and the model cannot be saved. Use onnx-int8 or w8a8",
    "torchao": "torchao's int8 weights run at a third of float32's speed on a CPU. Use onnx-int8 or gguf-q8_0",
    "onnx-int4": "4-bit ONNX weights without calibration kept 61% top-1 agreement. Use onnx-int8, or gptq",
    "optimum-onnx": "optimum-onnx needs transformers 4 and reads another rotary base: 71% top-1 agreement. Use "
    "onnx-fp32 or onnx-int8",
    "torchscript": "TorchScript is deprecated, and TorchServe, which serves it, unmaintained since 2024. Use "
    "onnx-int8, or hf with vLLM",
    "torchserve": "TorchServe is unmaintained since 2024. Use hf or w8a8 with vLLM",
    "gptqmodel": "gptqmodel needs torch 2.14 or later, vLLM 2.13. Use gptq, which llmcompressor writes",
    "modelopt": "modelopt has no CPU path for these models. Use w8a8",
}


def find_format(name: str) -> tuple[str, Format]:
    """A format by its name or its tool's. Raises ConfigError, with the reason for those that are refused."""
    wanted = name.lower()
    wanted = SHORT.get(wanted, wanted)
    if wanted in FORMATS:
        return wanted, FORMATS[wanted]
    if wanted in REFUSED:
        raise ConfigError(f"--format {name} is refused: {REFUSED[wanted]}")
    raise ConfigError(f"--format {name} is unknown: choose one of hf, {', '.join(FORMATS)}")
