"""The watch on samples: silent for every way of sampling, one line for noise, and committed chains stay."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from stillroom.cache.catalog import Catalog
from stillroom.errors import StillroomError
from stillroom.schema.records import Capture, Float32
from teacher_cache.engine.api import Finished, Outcome
from teacher_cache.engine.fake import FakeEngine
from teacher_cache.writer.watch import BLOCK_TOKENS, SampleWatch, max_entropy
from tests.helpers.fake_builds import EOS_ID, VOCAB_SIZE, K, make_config, make_requests, run_build

NUM_IDS = 2000


def distributions(num: int, seed: int = 0) -> Float32:
    """Log probabilities [T, V], certain and uncertain ones, with long tails."""
    rng = np.random.default_rng(seed)
    logits_TV = rng.normal(0, 1, (num, NUM_IDS)) + rng.exponential(1.5, (num, NUM_IDS)) * rng.uniform(0, 3, (num, 1))
    return np.asarray(logits_TV - np.logaddexp.reduce(logits_TV, axis=1, keepdims=True), np.float32)


def chain(
    logprobs_TV: Float32,
    sampled_TV: npt.NDArray[Any],
    *,
    k: int | None = None,
    temperature: float = 1.0,
    **sampling: Any,
) -> Finished:
    """Tokens drawn from `sampled_TV`, and what an engine says of them: exact entropies, or k candidates."""
    gumbel_TV = np.random.default_rng(1).gumbel(size=logprobs_TV.shape)
    tokens_T = (sampled_TV + gumbel_TV).argmax(axis=1).astype(np.int32)
    ids_TK = np.argsort(-logprobs_TV, axis=1)[:, : k or 8].astype(np.int32)
    entropy_T = -(np.exp(logprobs_TV) * logprobs_TV).sum(axis=1)
    capture = Capture(
        token_ids_T=tokens_T,
        sampled_logprob_T=logprobs_TV[np.arange(len(tokens_T)), tokens_T],
        sampled_rank_T=np.ones(len(tokens_T), np.int32),
        topk_ids_TK=ids_TK,
        topk_logprobs_TK=np.take_along_axis(logprobs_TV, ids_TK, axis=1),
        entropy_T=entropy_T if k is None else None,
    )
    return Finished(replace(make_requests(1)[0], sampling={"temperature": temperature, **sampling}), capture, "stop")


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1e-3])
@pytest.mark.parametrize("k", [None, 1, 16])
def test_samples_pass_however_they_were_drawn(temperature: float, k: int | None) -> None:
    watch, top_p = SampleWatch(NUM_IDS), 0.9
    for seed in range(4):
        logprobs_TV = distributions(400, seed)
        nucleus_TV = np.where(
            logprobs_TV > np.quantile(logprobs_TV, top_p, axis=1, keepdims=True), logprobs_TV, -np.inf
        )
        for drawn_from_TV in (logprobs_TV, nucleus_TV):
            assert watch.problem(chain(logprobs_TV, drawn_from_TV / temperature, k=k, temperature=temperature)) is None


@pytest.mark.parametrize("k", [None, 16])
def test_noise_is_noticed_within_a_few_hundred_tokens(k: int | None) -> None:
    logprobs_TV = distributions(300)
    problem = SampleWatch(NUM_IDS).problem(chain(logprobs_TV, np.zeros_like(logprobs_TV), k=k))
    assert problem is not None
    assert problem.startswith("the tokens cannot be the teacher's: over 300 tokens of 1 chain the mean log probab")


def test_settings_that_lower_the_mean_are_not_watched() -> None:
    logprobs_TV = distributions(300)
    noise_TV = np.zeros_like(logprobs_TV)
    for setting in ({"temperature": 1.5}, {"repetition_penalty": 1.2}, {"engine": {"frequency_penalty": 1.0}}):
        assert SampleWatch(NUM_IDS).problem(chain(logprobs_TV, noise_TV, **setting)) is None


def test_an_entropy_of_candidates_is_bounded_from_above() -> None:
    logprobs_TV = distributions(50)
    exact, bounded = chain(logprobs_TV, logprobs_TV), chain(logprobs_TV, logprobs_TV, k=4)
    assert (max_entropy(bounded.capture, NUM_IDS) >= max_entropy(exact.capture, NUM_IDS)).all()


class Noisy(FakeEngine):
    """Forgets its temperature after `num_sound` chains."""

    num_sound = 64

    def step(self) -> list[Outcome]:
        outcomes = super().step()
        self.num_sound -= len(outcomes)
        return [self._spoilt(one) if self.num_sound < 0 and isinstance(one, Finished) else one for one in outcomes]

    def _spoilt(self, finished: Finished) -> Finished:
        low_T = np.full_like(finished.capture.sampled_logprob_T, -14.0)
        return replace(finished, capture=replace(finished.capture, sampled_logprob_T=low_T))


def test_a_build_of_noise_stops_and_keeps_what_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_cache.writer.watch.BLOCK_TOKENS", 1000)
    assert BLOCK_TOKENS > 1000
    # A shard for every few chains.
    config = make_config(tmp_path / "cache", shard={"row_group_tokens": 200, "max_mb": 1e-3})
    with pytest.raises(StillroomError, match="the tokens cannot be the teacher's"):
        run_build(config, make_requests(200), lambda: Noisy(VOCAB_SIZE, K, mean_tokens=40, eos_id=EOS_ID))
    num_kept = sum(file.num_rows for file in Catalog(tmp_path / "cache").chains.files())
    assert 32 <= num_kept <= Noisy.num_sound + 24
    result = run_build(config, make_requests(200), lambda: FakeEngine(VOCAB_SIZE, K, mean_tokens=40, eos_id=EOS_ID))
    assert result.num_done_before == num_kept
    assert result.recorded.num_chains == 200 - num_kept
