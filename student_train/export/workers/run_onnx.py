"""Runs an ONNX folder of onnxruntime-genai's builder in onnxruntime-genai, on the CPU."""

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
from protocol import Array, serve_runtime


class OnnxRuntime:
    """A model and its session."""

    def __init__(self, folder: Path, threads: int | None, is_quick: bool) -> None:
        config = og.Config(str(folder))
        if threads is not None:
            session = {"session_options": {"intra_op_num_threads": threads}}
            config.overlay(json.dumps({"model": {"decoder": session}}))
        self._model = og.Model(config)

    def scores(self, ids: Sequence[int], positions: Sequence[int]) -> dict[str, Array]:
        """Logits, float32."""
        generator = self._generator(1, len(ids) + 1)
        generator.append_tokens(np.array([ids], np.int32))
        logits_LV = generator.get_output("logits")[0]
        return {"logits": np.asarray(logits_LV[list(positions)], np.float32)}

    def generate(self, prompts: Sequence[Sequence[int]], num_new: int) -> list[list[int]]:
        """Token by token."""
        num_prompt = len(prompts[0])
        generator = self._generator(len(prompts), num_prompt + num_new)
        generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(num_new):
            generator.generate_next_token()
        return [list(map(int, generator.get_sequence(row)[num_prompt:])) for row in range(len(prompts))]

    def _generator(self, batch_size: int, max_length: int) -> og.Generator:
        parameters = og.GeneratorParams(self._model)
        # min_length keeps the end of sequence away.
        parameters.set_search_options(
            batch_size=batch_size, max_length=max_length, min_length=max_length, do_sample=False
        )
        return og.Generator(self._model, parameters)


if __name__ == "__main__":
    serve_runtime(OnnxRuntime, {"onnxruntime-genai": og.__version__, "onnxruntime": version("onnxruntime")})
