"""Serves an onnx-int8 or onnx-fp32 export by Triton's Python backend: a chat in, its answer out.

`python triton_student.py FOLDER`, with nvidia-pytriton and onnxruntime-genai; serving.md has the commands.
"""

import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnxruntime_genai as og
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

MAX_TOKENS = 1024
"""Of prompt and answer together: their attention cache is reserved at once."""

model = og.Model(sys.argv[1])
tokenizer = og.Tokenizer(model)


def answers(requests: Sequence[dict[str, npt.NDArray[np.object_]]]) -> list[dict[str, npt.NDArray[np.object_]]]:
    """One greedy answer for each request; `messages` is a JSON list, as OpenAI-compatible servers take it."""
    return [{"answer": np.array([answer(one["messages"][0].decode()).encode()])} for one in requests]


def answer(messages: str) -> str:
    """What the student says next."""
    prompt_ids = tokenizer.encode(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=MAX_TOKENS, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(prompt_ids)
    while not generator.is_done():
        generator.generate_next_token()
    return str(tokenizer.decode(generator.get_sequence(0)[len(prompt_ids) :]))


with Triton(config=TritonConfig(http_port=8000)) as triton:
    triton.bind(
        model_name="student",
        infer_func=answers,
        inputs=[Tensor(name="messages", dtype=bytes, shape=(1,))],
        outputs=[Tensor(name="answer", dtype=bytes, shape=(1,))],
        config=ModelConfig(batching=False),
    )
    triton.serve()
