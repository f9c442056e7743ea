"""Runs a GGUF file in llama.cpp through cyllama, the one wheel that reads logits at every position, on the CPU."""

import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from cyllama.llama import llama_cpp
from protocol import Array, serve_runtime

UBATCH_TOKENS = 512


class Model(llama_cpp.LlamaModel):  # type: ignore[misc]  # cyllama has no types
    """With the attribute `n_vocab`, without which cyllama's get_logits_ith fails."""


class LlamaCpp:
    """A model; each call makes its own context."""

    def __init__(self, folder: Path, threads: int | None, is_quick: bool) -> None:
        llama_cpp.disable_logging()
        llama_cpp.ggml_backend_load_all()
        self._threads = threads or len(os.sched_getaffinity(0))
        self._model = Model(str(next(folder.glob("*.gguf"))), llama_cpp.LlamaModelParams())
        self._model.n_vocab = self._model.get_vocab().n_vocab
        self._greedy = llama_cpp.LlamaSampler()
        self._greedy.add_greedy()

    def scores(self, ids: Sequence[int], positions: Sequence[int]) -> dict[str, Array]:
        """Logits, float32."""
        context = self._context(len(ids), 1)
        batch = self._batch([(ids, 0, 0)], every_logit=True)
        context.decode(batch)
        rows = [np.asarray(context.get_logits_ith(position), np.float32) for position in positions]
        return {"logits": np.stack(rows)}

    def generate(self, prompts: Sequence[Sequence[int]], num_new: int) -> list[list[int]]:
        """All sequences of a step in one batch."""
        num_prompt = len(prompts[0])
        context = self._context((num_prompt + num_new) * len(prompts), len(prompts))
        context.decode(self._batch([(ids, 0, number) for number, ids in enumerate(prompts)], every_logit=False))
        # Where the last token of each prompt stands in the batch: only those have logits.
        outputs = [num_prompt * (number + 1) - 1 for number in range(len(prompts))]
        made: list[list[int]] = [[] for _ in prompts]
        for step in range(num_new):
            for number, output in enumerate(outputs):
                made[number].append(int(self._greedy.sample(context, output)))
            if step + 1 < num_new:
                steps = [([ids[-1]], num_prompt + step, number) for number, ids in enumerate(made)]
                context.decode(self._batch(steps, every_logit=False))
                outputs = list(range(len(prompts)))
        return made

    def _context(self, num_tokens: int, num_sequences: int) -> llama_cpp.LlamaContext:
        parameters = llama_cpp.LlamaContextParams()
        parameters.n_ctx = parameters.n_batch = max(num_tokens, 32)
        parameters.n_ubatch = min(max(num_tokens, 32), UBATCH_TOKENS)
        parameters.n_seq_max = num_sequences
        parameters.kv_unified = True
        parameters.n_threads = parameters.n_threads_batch = self._threads
        return llama_cpp.LlamaContext(self._model, parameters)

    def _batch(self, sequences: Sequence[tuple[Sequence[int], int, int]], *, every_logit: bool) -> llama_cpp.LlamaBatch:
        """Of (token ids, first position, sequence number)."""
        batch = llama_cpp.LlamaBatch(n_tokens=sum(len(ids) for ids, _, _ in sequences), embd=0, n_seq_max=1)
        for ids, first, number in sequences:
            for place, one in enumerate(ids):
                batch.add(one, first + place, [number], every_logit or place == len(ids) - 1)
        return batch


if __name__ == "__main__":
    serve_runtime(LlamaCpp, {"cyllama": version("cyllama")})
