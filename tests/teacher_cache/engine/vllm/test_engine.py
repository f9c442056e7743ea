"""The embedded engine on a tiny real model: against a dense reference, by every path, with bad prompts among good
ones.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from stillroom.errors import ConfigError
from stillroom.schema.records import Capture
from teacher_cache.config import CaptureConfig, EmbeddedConfig, TeacherConfig
from teacher_cache.engine.api import Failure
from teacher_cache.engine.row_layout import Layout
from tests.helpers.tiny import VOCAB_SIZE, make_tiny_teacher, merged
from tests.helpers.vllm_session import (
    CAPTURE,
    MAX_MODEL_LEN,
    NUM_CHAINS,
    K,
    Session,
    capture_of_dicts,
    finished,
    make_requests,
    run_session,
    run_start,
)


@pytest.fixture(scope="session")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return run_session(tmp_path_factory.mktemp("vllm"))


def test_captured_distributions_are_the_teachers_own(session: Session) -> None:
    """Sampling had temperature 0.8 and top_p 0.9; what is captured is the distribution before both."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(session.teacher, dtype=torch.float32)
    chains = finished(session.arrays)
    assert len(chains) == NUM_CHAINS
    for chain in chains.values():
        capture, prompt = chain.capture, list(chain.request.prompt_token_ids)
        ids = torch.tensor([prompt + capture.token_ids_T.tolist()])
        with torch.inference_mode():
            dense_TV = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1].double(), dim=-1).numpy()
        tokens = np.arange(len(capture.token_ids_T))
        np.testing.assert_allclose(capture.sampled_logprob_T, dense_TV[tokens, capture.token_ids_T], atol=1e-3)
        np.testing.assert_allclose(
            capture.topk_logprobs_TK, np.take_along_axis(dense_TV, capture.topk_ids_TK, axis=1), atol=1e-3
        )
        np.testing.assert_allclose(capture.topk_logprobs_TK, -np.sort(-dense_TV, axis=1)[:, :K], atol=1e-3)
        sampled_T = dense_TV[tokens, capture.token_ids_T]
        # Other tokens within rounding of the sampled one may stand on either side of it.
        low_T = (dense_TV > sampled_T[:, None] + 1e-4).sum(axis=1) + 1
        high_T = (dense_TV >= sampled_T[:, None] - 1e-4).sum(axis=1)
        assert ((low_T <= capture.sampled_rank_T) & (capture.sampled_rank_T <= high_T)).all()
        assert (low_T == high_T).mean() > 0.95, "ties are rare, so that ranks are really compared"


def test_an_adapter_is_part_of_the_teacher(session: Session) -> None:
    """What is generated and what is scored agree with transformers and peft at every token."""
    import torch

    model = merged(session.teacher, session.adapter)
    chains, scores, plain = finished(session.adapted), finished(session.adapted_scores), finished(session.arrays)
    assert len(chains) == NUM_CHAINS
    for name, chain in chains.items():
        prompt, tokens = list(chain.request.prompt_token_ids), chain.capture.token_ids_T
        assert tokens.tolist() != plain[name].capture.token_ids_T.tolist()
        with torch.inference_mode():
            logits_TV = model(torch.tensor([prompt + tokens.tolist()])).logits[0, len(prompt) - 1 : -1]
        dense_TV = torch.log_softmax(logits_TV.double(), dim=-1).numpy()
        entropy_T = -(np.exp(dense_TV) * dense_TV).sum(axis=1)
        for capture in (chain.capture, scores[name].capture):
            np.testing.assert_array_equal(capture.token_ids_T, tokens)
            np.testing.assert_allclose(capture.sampled_logprob_T, dense_TV[range(len(tokens)), tokens], atol=1e-3)
            np.testing.assert_allclose(capture.topk_logprobs_TK, -np.sort(-dense_TV, axis=1)[:, :K], atol=1e-3)
            assert capture.entropy_T is not None
            np.testing.assert_allclose(capture.entropy_T, entropy_T, atol=1e-3)


def test_what_only_the_sampler_sees_agrees_with_a_dense_computation(session: Session) -> None:
    """Entropy and log-partitions within rounding; draws are those that the reference's own logits give."""
    import torch
    from transformers import AutoModelForCausalLM

    from teacher_cache.engine.plugin.signals import signal_rows

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(session.teacher, dtype=torch.float32)
    layout = Layout(K, CAPTURE.draws, tuple(CAPTURE.temperatures))
    num_same = num_draws = 0
    for chain in finished(session.arrays).values():
        capture, prompt = chain.capture, list(chain.request.prompt_token_ids)
        assert capture.entropy_T is not None
        assert capture.draw_ids_TM is not None
        assert capture.draw_logprobs_TM is not None
        assert capture.log_partitions_TS is not None
        tokens = capture.token_ids_T.tolist()
        with torch.inference_mode():
            logits_TV = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        dense_TV = torch.log_softmax(logits_TV.double(), dim=-1)
        entropy_T = -(dense_TV.exp() * dense_TV).sum(dim=-1)
        np.testing.assert_allclose(capture.entropy_T, entropy_T, atol=1e-3)
        for column, tau in enumerate(CAPTURE.temperatures):
            partition_T = (dense_TV / tau).logsumexp(dim=-1)
            np.testing.assert_allclose(capture.log_partitions_TS[:, column], partition_T, atol=2e-3)
        drawn_TM = np.take_along_axis(dense_TV.numpy(), capture.draw_ids_TM, axis=1)
        np.testing.assert_allclose(capture.draw_logprobs_TM, drawn_TM, atol=1e-3)
        assert not (capture.draw_ids_TM[:, :, None] == capture.topk_ids_TK[:, None, :]).any(), "draws are from the tail"
        assert chain.request.seed is not None
        places_T = torch.arange(len(prompt), len(prompt) + len(tokens))
        seeds_T = torch.full_like(places_T, chain.request.seed)
        own = signal_rows(logits_TV, torch.tensor(tokens), layout, seeds_T, places_T).ids[:, 1 + K : 1 + K + 6]
        num_same += int((own.numpy() == capture.draw_ids_TM).sum())
        num_draws += own.numel()
    # A draw within rounding of the border between two tokens may fall on either side.
    assert num_same > 0.995 * num_draws > 1000


def test_every_token_has_its_row_the_last_one_included(session: Session) -> None:
    reasons = set()
    for chain in finished(session.arrays).values():
        reasons.add(chain.finish_reason)
        num = len(chain.capture.token_ids_T)
        assert chain.capture.topk_ids_TK.shape == chain.capture.topk_logprobs_TK.shape == (num, K)
        if chain.finish_reason == "stop":
            assert chain.capture.token_ids_T[-1] == 1, "the end-of-sequence token is part of the chain"
        else:
            assert num == 40
    assert reasons == {"stop", "length"}


def test_arrays_flat_and_default_path_agree(session: Session) -> None:
    arrays, flat = finished(session.arrays), finished(session.flat)
    assert arrays.keys() == flat.keys() == session.dicts.keys()
    for name, chain in arrays.items():
        _assert_equal(chain.capture, flat[name].capture)
        _assert_same_signals(chain.capture, flat[name].capture)
        _assert_equal(chain.capture, capture_of_dicts(session.dicts[name], K))


def _assert_equal(one: Capture, other: Capture) -> None:
    np.testing.assert_array_equal(one.token_ids_T, other.token_ids_T)
    # Batches are composed differently each time: log probabilities move in their last digits.
    np.testing.assert_allclose(one.sampled_logprob_T, other.sampled_logprob_T, atol=2e-4)
    np.testing.assert_array_equal(one.sampled_rank_T, other.sampled_rank_T)
    np.testing.assert_array_equal(one.topk_ids_TK, other.topk_ids_TK)
    np.testing.assert_allclose(one.topk_logprobs_TK, other.topk_logprobs_TK, atol=2e-4)


def _assert_same_signals(one: Capture, other: Capture) -> None:
    assert one.entropy_T is not None
    assert other.entropy_T is not None
    np.testing.assert_allclose(one.entropy_T, other.entropy_T, atol=2e-4)
    assert one.draw_ids_TM is not None
    assert other.draw_ids_TM is not None
    assert (one.draw_ids_TM == other.draw_ids_TM).mean() > 0.99


def test_scoring_a_chain_gives_what_its_generation_gave(session: Session) -> None:
    chains = finished(session.arrays)
    for scores in (finished(session.scores), finished(session.flat_scores)):
        assert scores.keys() == {*chains, "full", "single"}
        for name, chain in chains.items():
            one, other = scores[name].capture, chain.capture
            assert scores[name].finish_reason == "scored"
            np.testing.assert_array_equal(one.token_ids_T, other.token_ids_T)
            np.testing.assert_allclose(one.sampled_logprob_T, other.sampled_logprob_T, atol=2e-4)
            np.testing.assert_allclose(one.topk_logprobs_TK, other.topk_logprobs_TK, atol=2e-4)
            assert (one.topk_ids_TK == other.topk_ids_TK).mean() > 0.99
            assert (one.sampled_rank_T == other.sampled_rank_T).mean() > 0.99
            assert one.entropy_T is not None
            assert other.entropy_T is not None
            np.testing.assert_allclose(one.entropy_T, other.entropy_T, atol=2e-4)
            assert one.log_partitions_TS is not None
            assert other.log_partitions_TS is not None
            np.testing.assert_allclose(one.log_partitions_TS, other.log_partitions_TS, atol=2e-4)


def test_chains_of_any_length_that_fits_are_scored(session: Session) -> None:
    assert len(finished(session.scores)["full"].capture.token_ids_T) == MAX_MODEL_LEN - 2
    assert finished(session.scores)["single"].capture.token_ids_T.tolist() == [1]
    reasons = {name: one.reason for name, one in session.scores.items() if isinstance(one, Failure)}
    assert reasons == {"nothing": "empty_completion", "too long": "too_long", "vocabulary": "vocabulary"}


def test_bad_prompts_fail_alone_and_say_why(session: Session) -> None:
    failed = {name: outcome for name, outcome in session.arrays.items() if isinstance(outcome, Failure)}
    reasons = {name: outcome.reason for name, outcome in failed.items()}
    assert reasons == {"empty": "empty_prompt", "long": "too_long", "vocabulary": "vocabulary", "refused": "refused"}
    assert "top_p" in failed["refused"].message
    assert all("\n" not in outcome.message for outcome in failed.values())
    assert len(session.arrays) == len(make_requests())


def test_the_engine_says_what_it_is_and_prints_nothing_to_stdout(session: Session) -> None:
    assert session.stdout == ""
    assert (session.info.vocab_size, session.info.entropy) == (VOCAB_SIZE, "exact")
    assert (session.info.settings["capture"], session.info.settings["sampler"]) == ("arrays", "plugin")
    for num_tokens, outcomes in (
        (session.num_tokens, session.arrays),
        # Of completions that are scored, not of their prompts: `plan` predicts hours by this.
        (session.num_scored_tokens, session.scores),
    ):
        assert num_tokens == sum(len(chain.capture.token_ids_T) for chain in finished(outcomes).values())


def test_vllms_own_switches_keep_the_capture_right(session: Session) -> None:
    """Masks, penalties and forced tokens change what is sampled, never what is stored of the distribution."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(session.teacher)
    model = AutoModelForCausalLM.from_pretrained(session.teacher, dtype=torch.float32)
    chains = finished(session.switched)
    assert len(chains) == 24
    ends = Counter[tuple[str, str]]()
    for name, chain in chains.items():
        prompt, tokens = list(chain.request.prompt_token_ids), chain.capture.token_ids_T.tolist()
        with torch.inference_mode():
            dense_TV = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        own_T = dense_TV[torch.arange(len(tokens)), tokens]
        np.testing.assert_allclose(chain.capture.sampled_logprob_T, own_T, atol=1e-3)
        np.testing.assert_allclose(chain.capture.topk_logprobs_TK, dense_TV.topk(K).values, atol=1e-3)
        kind = name.rstrip("0123456789")
        ends[kind, chain.finish_reason] += 1
        if (kind, chain.finish_reason) == ("stop", "stop") and tokens[-1] != tokenizer.eos_token_id:
            assert set(tokenizer.decode(tokens[-1])) & set("abcde"), "the stop string's tokens are part of the chain"
        if kind == "budget":
            assert tokenizer.convert_tokens_to_ids("</think>") in tokens[:8]
        if kind == "forbidden":
            assert len(tokens) >= 20
            assert tokenizer.convert_tokens_to_ids("a") not in tokens
    assert ends["stop", "stop"]
    assert ends["repetition", "repetition"]


def test_what_is_not_configured_is_left_to_vllm() -> None:
    from teacher_cache.engine.vllm.arguments import engine_args

    teacher = TeacherConfig(model="m")
    bare = engine_args(teacher, EmbeddedConfig(), CaptureConfig(), on_cpu=False)
    assert bare["max_logprobs"] == 18
    assert not {"max_model_len", "quantization", "kv_cache_memory_bytes", "enable_chunked_prefill"} & set(bare)
    on_cpu = engine_args(teacher, EmbeddedConfig(kv_cache_gb=2), CaptureConfig(), on_cpu=True)
    assert on_cpu["enable_chunked_prefill"] is False
    assert on_cpu["kv_cache_memory_bytes"] == 2 * 2**30


@pytest.mark.parametrize(
    ("enforce_eager", "is_compiled", "tokens_left", "eager", "line"),
    [
        (None, False, 900.0, True, "about 900 tokens left do not repay 1:15 of compiling"),
        (None, True, 900.0, False, "with its saved compilation"),
        (None, False, 1e7, False, "compiling it for this CPU (about 1:15, once)"),
        (None, False, None, False, "compiling it"),
        (False, False, 900.0, False, "compiling it"),
        (True, True, 1e7, True, "engine.enforce_eager"),
    ],
)
def test_a_cpu_compiles_where_it_pays(
    enforce_eager: bool | None, is_compiled: bool, tokens_left: float | None, eager: bool, line: str
) -> None:
    from teacher_cache.engine.vllm.cpu import cpu_start

    chosen = cpu_start("m", 30, enforce_eager=enforce_eager, is_compiled=is_compiled, tokens_left=tokens_left)
    assert chosen[0] is eager
    assert line in chosen[1]


def test_the_second_start_loads_the_compilation_of_the_first(tmp_path: Path) -> None:
    make_tiny_teacher(tmp_path / "teacher", layers=1)
    first, second = (run_start(tmp_path) for _ in range(2))
    assert first["loaded"] == 0
    assert "compiling it for this CPU" in first["stderr"]
    assert second["loaded"] == 1, second["stderr"]
    assert "saved compilation" in second["stderr"]
    assert first["token_ids"] == second["token_ids"]
    # 4 chains of 128 tokens, in blocks of 128, and the block that vLLM keeps: not a quarter of the memory.
    assert first["num_kv_blocks"] == 5


def test_without_the_plugin_candidates_come_from_vllm_and_what_only_it_sees_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from teacher_cache.engine.vllm.engine import require_no_plugin

    require_no_plugin(CaptureConfig(draws=0), "another version")
    assert "using vLLM's own top-k" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"capture\.draws needs stillroom's plugin .* another version"):
        require_no_plugin(CaptureConfig(draws=2), "another version")
    with pytest.raises(ConfigError, match=r"capture\.temperatures needs"):
        require_no_plugin(CaptureConfig(draws=0, temperatures=[2.0]), "another version")
