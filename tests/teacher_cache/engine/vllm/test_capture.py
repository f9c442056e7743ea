"""Arrays out of synthetic engine outputs: copies, widths, blocks, and refusal of what does not line up.

Importing teacher_cache.engine.vllm.capture imports vLLM: these tests run in one process of their own.
"""

from tests.helpers.programs import run_with_vllm

PROGRAM = r"""
import numpy as np
from vllm.logprobs import FlatLogprobs
from teacher_cache.engine.vllm import arrays as a
from teacher_cache.engine.vllm import capture as c
from stillroom.errors import StillroomError

def raises(text, call):
    try:
        call()
    except StillroomError as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"no error with {text!r}")

def step(rng, n, width):
    logprobs = -np.sort(rng.exponential(size=(n, width)), axis=1).astype(np.float32)
    return rng.integers(0, 1000, (n, width)), logprobs, rng.integers(1, 50, n)

rng = np.random.default_rng(0)

# Steps of several tokens cross block borders; a batch is wider than its narrow request; arrays are copied.
arrays, seen = c.TokenArrays(4), []
for n in (1, 1, c.BLOCK_TOKENS + 3, 2, 1, 3 * c.BLOCK_TOKENS):
    ids, logprobs, ranks = step(rng, n, 9)
    seen.append((ids.copy(), logprobs.copy(), ranks.copy()))
    arrays.append(ids, logprobs, ranks)
    ids[:], logprobs[:], ranks[:] = 0, 0, 0
ids, logprobs, ranks = (np.concatenate(parts) for parts in zip(*seen))
assert len(arrays) == len(ids)
got = c.capture_of(arrays, ids[:, 0].tolist(), 4)
np.testing.assert_array_equal(got.token_ids_T, ids[:, 0])
np.testing.assert_array_equal(got.sampled_logprob_T, logprobs[:, 0])
np.testing.assert_array_equal(got.sampled_rank_T, ranks)
np.testing.assert_array_equal(got.topk_ids_TK, ids[:, 1:5])
np.testing.assert_array_equal(got.topk_logprobs_TK, logprobs[:, 1:5])
assert (got.topk_ids_TK.dtype, got.topk_logprobs_TK.dtype, got.sampled_rank_T.dtype) == (np.int32, np.float32, np.int32)

# What does not line up is refused.
raises("3 candidates per token, 4 were requested", lambda: c.TokenArrays(4).append(*step(rng, 1, 4)))
raises("do not match its tokens: token 1 differs",
       lambda: c.capture_of(arrays, [ids[0, 0], ids[1, 0] + 1, *ids[2:, 0]], 4))
raises(f"distributions of {len(ids)} tokens for a completion of 1", lambda: c.capture_of(arrays, [1], 4))
raises("returned NoneType", lambda: c.capture_of(None, [1], 4))
raises("0 tokens for a completion of 1", lambda: c.capture_of(c.TokenArrays(4), [1], 4))

# vLLM's flat lists hold the same.
flat = FlatLogprobs()
for row in range(5):
    flat.append_fast(ids[row, :5].tolist(), logprobs[row, :5].tolist(), [ranks[row], 1, 2, 3, 4], [None] * 5)
same = c.capture_of(flat, ids[:5, 0].tolist(), 4)
np.testing.assert_array_equal(same.topk_ids_TK, ids[:5, 1:5])
np.testing.assert_array_equal(same.sampled_rank_T, ranks[:5])
np.testing.assert_array_equal(same.topk_logprobs_TK, logprobs[:5, 1:5])

from vllm.v1.engine import output_processor
before = output_processor.LogprobsProcessor
a.install_arrays()
assert output_processor.LogprobsProcessor is a.ArrayLogprobs
a.uninstall_arrays()
assert output_processor.LogprobsProcessor is before
print("all good")
"""


def test_arrays_from_synthetic_outputs() -> None:
    assert run_with_vllm(["tests.helpers.vllm_script", PROGRAM]).endswith("all good\n")
