"""The plugin inside vLLM: speculation, chunks, preemption and scoring give what the reference gives; both runners."""

import numpy as np
import pytest
import torch

from stillroom.errors import StillroomError
from stillroom.schema.records import Float32, Int32
from teacher_cache.engine.plugin.batch import Asked, Batch, asked_of
from teacher_cache.engine.plugin.signals import Rows, signal_rows
from teacher_cache.engine.row_layout import Layout, capture_of_rows, is_marked
from tests.helpers.programs import run_with_vllm
from tests.helpers.vllm_sampler import LAYOUT, MAX_TOKENS, NUM_CHAINS, Answers, prompt_of, run


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    torch.set_num_threads(1)
    return run(tmp_path_factory.mktemp("sampler"))


def reference(answers: Answers, prompt: list[int], tokens: list[int], seed: int) -> Rows:
    """Rows of the tokens after the prompt, from the model in transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(answers.teacher, dtype=torch.float32)
    with torch.inference_mode():
        logits_TV = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    places_T = torch.arange(len(prompt), len(prompt) + len(tokens))
    return signal_rows(logits_TV, torch.tensor(tokens), LAYOUT, torch.full_like(places_T, seed), places_T)


def assert_rows(ids: Int32, logprobs: Float32, expected: Rows) -> None:
    same = ids == expected.ids.numpy()
    # Near ties may change places, draws near a border may fall on its other side.
    assert same.mean() > 0.99
    np.testing.assert_allclose(logprobs[same], expected.logprobs.numpy()[same], atol=1e-3)


def test_speculated_chunked_and_preempted_chains_agree_with_the_reference(answers: Answers) -> None:
    for number in range(NUM_CHAINS):
        capture = answers.captures[f"chain{number}"]
        tokens = capture.token_ids_T.tolist()
        assert len(tokens) == MAX_TOKENS
        expected = reference(answers, prompt_of(number), tokens, seed=number)
        assert capture.draw_ids_TM is not None
        assert capture.draw_logprobs_TM is not None
        assert capture.entropy_T is not None
        assert capture.log_partitions_TS is not None
        zeros_T3 = np.zeros((len(tokens), 3), np.int32)
        ids = np.hstack([capture.token_ids_T[:, None], capture.topk_ids_TK, capture.draw_ids_TM, zeros_T3])
        scalars = [capture.entropy_T[:, None], capture.log_partitions_TS, np.ones((len(tokens), 1), np.float32)]
        values = [capture.sampled_logprob_T[:, None], capture.topk_logprobs_TK, capture.draw_logprobs_TM, *scalars]
        assert_rows(ids, np.hstack(values), expected)
        assert (np.abs(capture.sampled_rank_T - expected.ranks.numpy()) <= 1).all()


def test_a_neighbour_that_asks_for_plain_candidates_gets_vllms_own(answers: Answers) -> None:
    plain = answers.captures["plain"]
    expected = reference(answers, prompt_of(2), plain.token_ids_T.tolist(), seed=2)
    assert plain.entropy_T is None
    assert (plain.topk_ids_TK == expected.ids[:, 1:4].numpy()).mean() > 0.99
    np.testing.assert_allclose(plain.topk_logprobs_TK, expected.logprobs[:, 1:4].numpy(), atol=1e-3)


def test_scored_tokens_have_the_rows_of_generated_ones(answers: Answers) -> None:
    prompt = prompt_of(4)
    ids, logprobs = answers.scored
    assert len(ids) == len(prompt) - 1
    assert is_marked(ids, logprobs, LAYOUT)
    assert_rows(ids, logprobs, reference(answers, prompt[:1], prompt[1:], seed=4))


SECOND_RUNNER = r"""
import numpy as np, torch
from types import SimpleNamespace
from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.sample import prompt_logprob, sampler
from vllm.v1.worker.gpu.spec_decode import rejection_sampler
from teacher_cache.engine.plugin import hooks_v2
from teacher_cache.engine.plugin.batch import Batch, asked_of
from teacher_cache.engine.plugin.batch import mapped_rows
from teacher_cache.engine.plugin.signals import signal_rows
from teacher_cache.engine.row_layout import Layout

hooks_v2.install()
for module in (sampler, prompt_logprob, rejection_sampler):
    assert module.compute_topk_scores is hooks_v2.scores_with_signals

# vLLM's own function needs Triton: a plain one in its place is what other rows must get.
def stock(logits, num_logprobs, sampled, *rest):
    top = logits.log_softmax(-1).topk(num_logprobs)
    own = logits.log_softmax(-1).gather(1, sampled[:, None])
    ids = torch.cat([sampled[:, None], top.indices], 1)
    return LogprobsTensors(ids, torch.cat([own, top.values], 1), torch.zeros(len(logits), dtype=torch.int64))
hooks_v2._scores = stock

layout, generator = Layout(8, 5, (2.0,)), torch.Generator().manual_seed(0)
logits = torch.randn(7, 5000, generator=generator)
sampled = torch.randint(5000, (7,), generator=generator)
width = layout.width
params = SamplingParams(logprobs=width, seed=11, extra_args=layout.extra_args())

# Requests are noted by slot; three of them hold 2, 1 and 4 rows of a step with draft tokens.
noted = SimpleNamespace(sampling_states=None)
class Fake:
    pass
fake = Fake()
add, hooks_v2._add_request = hooks_v2._add_request, lambda self, index, params: None
hooks_v2._add_request_noted(fake, 3, params)
hooks_v2._add_request_noted(fake, 5, SamplingParams(logprobs=2))
fake.logprobs_mode = "raw_logprobs"
positions = torch.arange(100, 140)
batch_of = SimpleNamespace(num_reqs=3, cu_num_logits_np=np.array([0, 2, 3, 7]), positions=positions,
                           logits_indices=torch.tensor([3, 4, 9, 20, 21, 22, 23]), idx_mapping_np=np.array([3, 5, 3]))
seen = {}
def call(self, logits, input_batch):
    # In two pieces, as a rejection sampler that works in chunks.
    seen["first"] = sampler.compute_topk_scores(logits[:3], width, sampled[:3], [0, 2, 3])
    seen["second"] = sampler.compute_topk_scores(logits[3:], width, sampled[3:])
hooks_v2._call = call
hooks_v2._call_with_signals(fake, logits, batch_of)
places = positions[batch_of.logits_indices] + 1
own = signal_rows(logits, sampled, layout, torch.full((7,), 11), places)
first, second = seen["first"], seen["second"]
assert first.cu_num_generated_tokens == [0, 2, 3] and second.cu_num_generated_tokens is None
assert first.logprob_token_ids.dtype == sampled.dtype
assert torch.equal(first.logprob_token_ids[:2].int(), own.ids[:2])
assert torch.equal(first.selected_token_ranks[:2], own.ranks[:2])
assert torch.equal(second.logprob_token_ids.int(), own.ids[3:])
torch.testing.assert_close(second.logprobs, own.logprobs[3:], rtol=0, atol=1e-6)
plain = stock(logits[2:3], width, sampled[2:3])
assert torch.equal(first.logprob_token_ids[2:3], plain.logprob_token_ids)

# A request over HTTP, which asks for a column more than its row has.
mapped = Layout(8, 5, (2.0,), mapped=True)
asked = SamplingParams(logprobs=mapped.width + 1, seed=11, extra_args=mapped.extra_args())
hooks_v2._add_request_noted(fake, 6, asked)
batch_of.idx_mapping_np, narrow, width = np.array([6, 5, 6]), width, mapped.width + 1
hooks_v2._call_with_signals(fake, logits, batch_of)
expected, second = mapped_rows(own, mapped), seen["second"]
assert torch.equal(second.logprob_token_ids[:, :-1].int(), expected.ids[3:])
torch.testing.assert_close(second.logprobs[:, :-1], expected.logprobs[3:], rtol=0, atol=1e-6)
assert torch.equal(second.logprob_token_ids[:, -1], sampled[3:]), "the sampled token again, which adds nothing"
width = narrow

# Nobody asks, another mode, or nothing known: vLLM's own.
for asked, mode in ((np.array([5, 5, 5]), "raw_logprobs"), (np.array([3, 5, 3]), "processed_logprobs")):
    batch_of.idx_mapping_np, fake.logprobs_mode = asked, mode
    hooks_v2._call_with_signals(fake, logits, batch_of)
    assert torch.equal(seen["second"].logprob_token_ids, stock(logits[3:], width, sampled[3:]).logprob_token_ids)
outside = sampler.compute_topk_scores(logits, width, sampled)
assert torch.equal(outside.logprob_token_ids, stock(logits, width, sampled).logprob_token_ids)

# Draft tokens are verified by another class, which knows the sampler; where it drops rows on the device, nobody asks.
batch_of.idx_mapping_np, fake.logprobs_mode = np.array([3, 5, 3]), "raw_logprobs"
def verify(self, logits, input_batch, draft_logits, invalid_drafts):
    assert (draft_logits, invalid_drafts) == ("drafts", "invalid")
    call(self, logits, input_batch)
hooks_v2._verify = verify
verifier = SimpleNamespace(sampler=fake, enable_adaptive_verification=False)
hooks_v2._verify_with_signals(verifier, logits, batch_of, "drafts", "invalid")
assert torch.equal(seen["second"].logprob_token_ids.int(), own.ids[3:])
verifier.enable_adaptive_verification = True
hooks_v2._verify_with_signals(verifier, logits, batch_of, "drafts", "invalid")
assert torch.equal(seen["second"].logprob_token_ids, stock(logits[3:], width, sampled[3:]).logprob_token_ids)

# vLLM's own prompt scorer, but for its Triton kernel: a prompt in two chunks beside one that asks for candidates.
head = torch.randn(16, 5000, generator=generator)
prompts = torch.zeros(8, 64, dtype=torch.int64)
prompts[2, :10], prompts[6, :5] = torch.arange(100, 110), torch.arange(200, 205)
def targets(num_tokens, starts, slots, num_computed, all_ids):
    return torch.cat([all_ids[slot, int(num_computed[slot]) + 1 :][: end - start]
                      for slot, start, end in zip(slots.tolist(), starts.tolist(), starts.tolist()[1:])])
prompt_logprob.get_prompt_logprobs_token_ids, prompt_logprob.CHUNK_SIZE = targets, 4
scorer = prompt_logprob.PromptLogprobsWorker(8, torch.device("cpu"))
scorer.add_request("ours", 2, SamplingParams(prompt_logprobs=width, logprobs=width, seed=9,
                                             extra_args=layout.extra_args()))
scorer.add_request("other", 6, SamplingParams(prompt_logprobs=2))
hidden, computed, got = torch.randn(15, 16, generator=generator), np.zeros(8, np.int64), {}
for requests, rows in (([("ours", 2, 6), ("other", 6, 5)], hidden[:11]), ([("ours", 2, 4)], hidden[11:])):
    slots, lengths = np.array([slot for _, slot, _ in requests]), np.array([num for *_, num in requests])
    starts, done = np.concatenate([[0], lengths.cumsum()]), computed[slots]
    places = torch.cat([torch.arange(one, one + num) for one, num in zip(done, lengths)])
    step = SimpleNamespace(
        req_ids=[name for name, *_ in requests], num_reqs=len(requests), num_tokens=len(rows),
        idx_mapping_np=slots, idx_mapping=torch.tensor(slots), query_start_loc_np=starts, positions=places,
        query_start_loc=torch.tensor(starts), num_computed_prefill_tokens_np=done, num_scheduled_tokens=lengths,
        prefill_len_np=np.array([10, 5])[: len(slots)])
    got |= scorer.compute_prompt_logprobs(lambda one: one @ head, rows, step, prompts, torch.tensor(computed),
                                          np.array([0, 0, 10, 0, 0, 0, 5, 0]))
    computed[slots] += lengths
logits = torch.cat([hidden[:6], hidden[11:14]]) @ head
own = signal_rows(logits, prompts[2, 1:10], layout, torch.full((9,), 9), torch.arange(1, 10))
assert torch.equal(got["ours"].logprob_token_ids.int(), own.ids)
torch.testing.assert_close(got["ours"].logprobs, own.logprobs, rtol=0, atol=1e-5)
plain = stock(hidden[6:10] @ head, 2, prompts[6, 1:5])
assert torch.equal(got["other"].logprob_token_ids, plain.logprob_token_ids)
print("all good")
"""

INSTALLATION = r"""
from teacher_cache.engine.vllm import fit
from teacher_cache.engine.plugin import hooks_v2, register
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.sampler import Sampler as SecondSampler
from vllm.v1.worker.worker_base import WorkerWrapperBase

first, second, init = Sampler.gather_logprobs, SecondSampler.__call__, WorkerWrapperBase.init_device
real, fit.WORKER = fit.WORKER, (fit.Fact("v1.worker.elsewhere"),)
assert register.register() == "it has no module vllm.v1.worker.elsewhere"
assert WorkerWrapperBase.init_device is init
fit.WORKER = real

# A runner that does not fit is left alone, the other one is not.
real, fit.RUNNERS[1] = fit.RUNNERS[1], (fit.Fact("v1.sample.sampler", "Sampler.gone"),)
register.install()
assert Sampler.gather_logprobs is first
assert SecondSampler.__call__ is not second
fit.RUNNERS[1] = real

for _ in range(2):
    assert register.register() is None
    register.install()
assert Sampler.gather_logprobs is not first
assert register._unwrapped == [init]

from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable as Compilation
assert Compilation.finalize_loading(object(), None) is None
print("all good")
"""


@pytest.mark.parametrize("program", [SECOND_RUNNER, INSTALLATION], ids=["second runner", "installation"])
def test_in_a_process_with_vllm(program: str) -> None:
    assert run_with_vllm(["tests.helpers.vllm_script", program]).endswith("all good\n")


def test_a_mixed_batch_gives_every_row_its_own() -> None:
    logits = torch.randn(6, 2602, generator=torch.Generator().manual_seed(1))
    sampled, places = torch.arange(6) * 100, torch.arange(6) + 50
    narrow, wide = Layout(4), Layout(8, 3)
    asked = [
        Asked(wide, 1),
        None,
        Asked(narrow, 2),
        Asked(None, 0),
        Asked(wide, 3),
        Asked(Layout(2600, mapped=True), 4),
    ]
    width = 14

    def plain(part: torch.Tensor, ids: torch.Tensor, num: int) -> Rows:
        return Rows(torch.full((len(part), num + 1), 7, dtype=torch.int32), torch.zeros(len(part), num + 1), ids)

    rows = Batch(asked, places).rows(logits, sampled, width, plain)
    for row, layout, seed in ((0, wide, 1), (2, narrow, 2), (4, wide, 3)):
        one = slice(row, row + 1)
        own = signal_rows(logits[one], sampled[one], layout, torch.tensor([seed]), places[one])
        assert torch.equal(rows.ids[one, : layout.width + 1], own.ids)
        torch.testing.assert_close(rows.logprobs[one, : layout.width + 1], own.logprobs)
        assert (rows.ids[one, layout.width + 1 :] == sampled[one, None]).all()
        assert (rows.logprobs[one, layout.width + 1 :] == own.logprobs[:, :1]).all()
    assert (rows.ids[1] == 7).all()
    assert rows.logprobs[3].isnan().all()
    assert rows.logprobs[5].isnan().all(), "too few ids for so many columns"


@pytest.mark.parametrize(
    ("extra_args", "width", "seed"),
    [
        ({"stillroom_top": 8}, 9, None),
        ({"stillroom_top": 8, "stillroom_draws": 2}, 12, None),
        ({"stillroom_top": 0}, 12, 1),
        ({"stillroom_top": 4, "stillroom_temperatures": [-1.0]}, 12, 1),
        ({"stillroom_top": 4, "stillroom_temperatures": 2.0}, 12, 1),
        ({"stillroom_top": [4]}, 12, 1),
        ({"stillroom_top": {"a": 1}}, 12, 1),
        ({"stillroom_top": 1e400}, 12, 1),
        ({"stillroom_top": "x"}, 12, 1),
        ({"stillroom_top": 4, "stillroom_mapped": 1}, 12, 1),
        ({"stillroom_top": 4, "stillroom_mapped": [2]}, 12, 1),
        ({"stillroom_top": 4, "stillroom_mapped": 2}, 6, 1),
    ],
)
def test_what_makes_no_sense_is_not_taken_for_plain_candidates(
    extra_args: dict[str, object], width: int, seed: int | None
) -> None:
    asked = asked_of(extra_args, width, seed)
    assert asked is not None
    assert asked.layout is None


def test_nothing_asked_is_nothing() -> None:
    assert asked_of(None, 5, 1) is None
    assert asked_of({"other": 1}, 5, 1) is None
    assert asked_of(Layout(4).extra_args(), None, 1) is None
    assert asked_of(Layout(4).extra_args(), 6, None) == Asked(Layout(4), 0)


def test_rows_without_the_mark_are_refused() -> None:
    """A worker without the plugin answers with as many plain candidates: nothing of that may be stored."""
    layout = Layout(3, 2)
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    top = logits.log_softmax(-1).topk(layout.width + 1)
    ids, logprobs, ranks = top.indices.int().numpy(), top.values.numpy(), np.ones(4, np.int32)
    with pytest.raises(StillroomError, match="without the sampler plugin"):
        capture_of_rows(ids, logprobs, ranks, ids[:, 0].tolist(), 3, layout)
    assert capture_of_rows(ids, logprobs, ranks, ids[:, 0].tolist(), 3, None).entropy_T is None
