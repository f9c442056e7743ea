"""Runs a Hugging Face folder in transformers, in the precision that it is stored in; on a GPU if there is one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from protocol import Array, serve_runtime
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging


class Transformers:
    """A model on its device."""

    def __init__(self, folder: Path, threads: int | None, is_quick: bool) -> None:
        logging.disable_progress_bar()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
        self._model = loaded.to(device).eval()

    @torch.inference_mode()
    def scores(self, ids: Sequence[int], positions: Sequence[int]) -> dict[str, Array]:
        """Logits, float32."""
        ids_1L = torch.tensor([ids], device=self._model.device)
        logits_LV = self._model(input_ids=ids_1L, use_cache=False).logits[0]
        return {"logits": logits_LV[list(positions)].float().cpu().numpy()}

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], num_new: int) -> list[list[int]]:
        """By `generate`, as most programs use it."""
        ids_BL = torch.tensor(prompts, device=self._model.device)
        wanted = GenerationConfig(do_sample=False, max_new_tokens=num_new, eos_token_id=None, pad_token_id=0)
        # What a generation config leaves open comes from the model's own, its end of sequence too.
        self._model.generation_config = wanted
        made: torch.Tensor = self._model.generate(
            ids_BL, attention_mask=torch.ones_like(ids_BL), generation_config=wanted
        )
        return [list(map(int, row)) for row in made[:, ids_BL.shape[1] :].tolist()]


if __name__ == "__main__":
    serve_runtime(Transformers, {"transformers": transformers.__version__, "torch": torch.__version__})
