"""Runs an OpenVINO folder in OpenVINO, on the CPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from protocol import Array, serve_runtime


class OpenVino:
    """A compiled, stateful model: its cache lives inside until `reset_state`."""

    def __init__(self, folder: Path, threads: int | None, is_quick: bool) -> None:
        core = ov.Core()
        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        self._request = core.compile_model(core.read_model(folder / "openvino_model.xml"), "CPU", options)
        self._request = self._request.create_infer_request()
        self._inputs = {name for one in self._request.model_inputs for name in one.get_names()}

    def scores(self, ids: Sequence[int], positions: Sequence[int]) -> dict[str, Array]:
        """Logits, float32."""
        self._request.reset_state()
        logits_LV = self._step(np.array([ids], np.int64), 0)[0]
        # A copy: the next request writes into the same tensor.
        return {"logits": np.array(logits_LV[list(positions)], np.float32)}

    def generate(self, prompts: Sequence[Sequence[int]], num_new: int) -> list[list[int]]:
        """Token by token."""
        self._request.reset_state()
        ids_BL, num_past = np.array(prompts, np.int64), 0
        made: list[Array] = []
        for _ in range(num_new):
            logits_BLV = self._step(ids_BL, num_past)
            num_past += ids_BL.shape[1]
            ids_BL = logits_BLV[:, -1].argmax(axis=-1)[:, None]
            made.append(ids_BL)
        return [list(map(int, row)) for row in np.concatenate(made, axis=1)]

    def _step(self, ids_BL: Array, num_past: int) -> Array:
        batch, length = ids_BL.shape
        inputs = {
            "input_ids": ids_BL,
            "attention_mask": np.ones((batch, num_past + length), np.int64),
            "position_ids": np.broadcast_to(np.arange(num_past, num_past + length), (batch, length)),
            "beam_idx": np.arange(batch, dtype=np.int32),
        }
        # Exported models differ in which of these they take.
        self._request.infer({name: value for name, value in inputs.items() if name in self._inputs})
        found: Array = self._request.get_tensor("logits").data
        return found


if __name__ == "__main__":
    serve_runtime(OpenVino, {"openvino": ov.__version__})
