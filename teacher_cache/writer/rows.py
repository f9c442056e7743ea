"""Turns a finished completion into one row: identity, text split into reasoning and answer, scalars, stored signals.

Shape legend: T tokens, K captured candidates, M draws a token, S temperatures; N stored candidates and D stored draws
of all tokens (flat).
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stillroom.errors import StillroomError
from stillroom.models import reasoning_ids, split_reasoning
from stillroom.schema.records import Capture, Draws, Float32, Int32, Signals, chain_id_of
from teacher_cache.config import CaptureConfig, ReasoningConfig
from teacher_cache.engine.api import Finished


@dataclass(frozen=True, slots=True)
class ChainRow:
    """One row to be written: a field for every column of CHAIN_FIELDS but those of tokens' signals, and the signals."""

    sample_id: str
    chain_id: str
    prompt_id: str
    sample_index: int
    run_id: str
    worker: str
    created_at: datetime.datetime
    source: str
    split: str
    messages: Sequence[Mapping[str, str]]
    prompt_token_ids: Int32
    reference: str | None
    metadata: str
    text: str
    reasoning: str | None
    answer: str | None
    token_ids: Int32
    reasoning_end: int | None
    finish_reason: str
    seed: int | None
    num_prompt_tokens: int
    num_tokens: int
    num_reasoning_tokens: int
    mean_logprob: float
    mean_entropy: float
    mean_top1_prob: float
    mean_tail_mass: float
    mean_support: float
    signals: Signals


class RowMaker:
    """Makes rows of one run and worker; its tokenizer turns ids into text."""

    def __init__(
        self, tokenizer: Any, capture: CaptureConfig, reasoning: ReasoningConfig, run_id: str, worker: str
    ) -> None:
        self._tokenizer = tokenizer
        self._capture = capture
        self._start_id, self._end_id = reasoning_ids(tokenizer, reasoning.start, reasoning.end)
        self._run_id, self._worker = run_id, worker

    def row(self, finished: Finished) -> ChainRow:
        """Raises StillroomError if the captured arrays do not match the tokens, which would store misaligned rows."""
        request, capture, prompt = finished.request, finished.capture, finished.request.prompt
        token_ids = capture.token_ids_T
        _require_aligned(finished)
        self._require_asked(finished)
        signals = support_of(capture, self._capture.max_support, self._capture.nucleus)
        reasoning_end = split_reasoning(token_ids, request.prompt_token_ids, self._start_id, self._end_id)
        reasoning, answer = self._split_text(token_ids.tolist(), reasoning_end)
        return ChainRow(
            sample_id=request.sample_id,
            chain_id=chain_id_of(request.prompt_token_ids, token_ids.tolist()),
            prompt_id=prompt.prompt_id,
            sample_index=request.sample_index,
            run_id=self._run_id,
            worker=self._worker,
            created_at=datetime.datetime.now(datetime.UTC),
            source=prompt.source,
            split=prompt.split,
            messages=[{"role": message.role, "content": message.content} for message in prompt.messages],
            # As an array: a list takes nine times the memory, and a row group may hold many long prompts.
            prompt_token_ids=np.asarray(request.prompt_token_ids, np.int32),
            reference=prompt.reference,
            metadata=json.dumps(dict(prompt.metadata), sort_keys=True, ensure_ascii=False),
            text=self.text(token_ids.tolist()),
            reasoning=reasoning,
            answer=answer,
            token_ids=token_ids,
            reasoning_end=reasoning_end,
            finish_reason=finished.finish_reason,
            seed=request.seed,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_tokens=len(token_ids),
            num_reasoning_tokens=len(token_ids) if reasoning_end is None else reasoning_end,
            **scalars_of(signals),
            signals=signals,
        )

    def _require_asked(self, finished: Finished) -> None:
        """The capture must hold what the shard's header promises to readers."""
        capture, asked = finished.capture, self._capture
        num_draws = 0 if capture.draw_ids_TM is None else capture.draw_ids_TM.shape[1]
        num_temperatures = 0 if capture.log_partitions_TS is None else capture.log_partitions_TS.shape[1]
        if (num_draws, num_temperatures) != (asked.draws, len(asked.temperatures)):
            raise StillroomError(
                f"sample {finished.request.sample_id}: the engine gave {num_draws} draws and {num_temperatures} "
                f"log-partitions per token, {asked.draws} and {len(asked.temperatures)} were requested"
            )

    def _split_text(self, ids: list[int], reasoning_end: int | None) -> tuple[str | None, str | None]:
        """Reasoning and answer, without the tokens that open and close the reasoning."""
        if reasoning_end == 0:
            return None, self.text(ids)
        # Most templates open the reasoning in the prompt; a model that opens it itself writes the mark first.
        first = 1 if ids[0] == self._start_id else 0
        if reasoning_end is None:
            return self.text(ids[first:]).strip("\n"), None
        # reasoning_end counts the closing mark, which belongs to neither text.
        return self.text(ids[first : reasoning_end - 1]).strip("\n"), self.text(ids[reasoning_end:]).strip("\n")

    def text(self, ids: list[int]) -> str:
        """The tokens as text, without special ones."""
        # Clean-up would delete spaces before punctuation that the model did write.
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def support_of(capture: Capture, max_support: int, nucleus: float | None) -> Signals:
    """Cuts each token's candidates to the smallest prefix with mass >= nucleus, at most max_support entries.

    Tail mass is 1 minus the prefix's mass. Entropy (nats) is the engine's if exact, else that of the captured
    candidates with the rest as one outcome, a lower bound. Draws are kept only for tokens whose support ends at
    `max_support` before the nucleus; they come from outside all captured candidates, so at most `max_support` of those
    may have been captured.
    """
    logprobs_TK = capture.topk_logprobs_TK
    num_captured = logprobs_TK.shape[1]
    probs_TK = np.exp(logprobs_TK.astype(np.float64))
    cumulative_TK = np.cumsum(probs_TK, axis=1)
    limit = min(max_support, num_captured)
    if nucleus is None:
        n_T = np.full(len(logprobs_TK), limit, np.int32)
    else:
        # + 1: the entry that crosses the nucleus belongs to the support.
        n_T = np.minimum((cumulative_TK[:, :limit] < nucleus).sum(axis=1) + 1, limit).astype(np.int32)
    kept_TK = np.arange(num_captured)[None, :] < n_T[:, None]
    kept_mass_T = np.take_along_axis(cumulative_TK, n_T[:, None].astype(np.int64) - 1, axis=1)[:, 0]
    # 1 - sum(p) loses its digits when the tail is small; the captured mass that is cut off is a lower bound.
    tail_T = np.maximum(1.0 - kept_mass_T, np.where(kept_TK, 0.0, probs_TK).sum(axis=1))
    partitions_TS = capture.log_partitions_TS
    entropy_T = capture.entropy_T if capture.entropy_T is not None else _support_entropy(probs_TK, logprobs_TK)
    return Signals(
        topk_n_T=n_T,
        topk_ids_N=capture.topk_ids_TK[kept_TK].astype(np.int32),
        topk_logprobs_N=logprobs_TK[kept_TK].astype(np.float32),
        tail_logmass_T=_log(tail_T).astype(np.float32),
        sampled_logprob_T=capture.sampled_logprob_T.astype(np.float32),
        sampled_rank_T=capture.sampled_rank_T.astype(np.int32),
        entropy_T=entropy_T.astype(np.float32),
        draws=_draws_of(capture, n_T, kept_mass_T, nucleus),
        # A copy, as all the others: a view would keep every captured candidate in memory until the row group is full.
        log_partitions_TS=None if partitions_TS is None else partitions_TS.astype(np.float32),
    )


def scalars_of(signals: Signals) -> dict[str, float]:
    """Per-chain means that SQL reads without decoding distributions. T must be >= 1."""
    starts_T = np.cumsum(signals.topk_n_T, dtype=np.int64) - signals.topk_n_T
    return {
        "mean_logprob": float(signals.sampled_logprob_T.mean(dtype=np.float64)),
        "mean_entropy": float(signals.entropy_T.mean(dtype=np.float64)),
        # Supports are in rank order: the first entry of a token is its most probable.
        "mean_top1_prob": float(np.exp(signals.topk_logprobs_N[starts_T], dtype=np.float64).mean()),
        "mean_tail_mass": float(np.exp(signals.tail_logmass_T, dtype=np.float64).mean()),
        "mean_support": float(signals.topk_n_T.mean(dtype=np.float64)),
    }


def _require_aligned(finished: Finished) -> None:
    capture = finished.capture
    lengths = {
        len(capture.token_ids_T),
        len(capture.sampled_logprob_T),
        len(capture.sampled_rank_T),
        len(capture.topk_ids_TK),
        len(capture.topk_logprobs_TK),
    }
    if len(lengths) != 1 or lengths == {0}:
        raise StillroomError(
            f"sample {finished.request.sample_id}: the engine gave tokens and distributions of lengths"
            f" {sorted(lengths)}: token and logprob counts differ"
        )


def _support_entropy(probs_TK: npt.NDArray[np.float64], logprobs_TK: Float32) -> npt.NDArray[np.float64]:
    tail_T = np.maximum(1.0 - probs_TK.sum(axis=1), 0.0)
    # A candidate without probability adds nothing, but 0 * -inf would be NaN.
    safe_TK = np.where(probs_TK > 0, logprobs_TK, 0.0)
    return np.asarray(-(probs_TK * safe_TK).sum(axis=1) - tail_T * np.where(tail_T > 0, _log(tail_T), 0.0))


def _draws_of(
    capture: Capture, n_T: Int32, kept_mass_T: npt.NDArray[np.float64], nucleus: float | None
) -> Draws | None:
    """Draws of the tokens whose support reached its limit before the nucleus."""
    if capture.draw_ids_TM is None or capture.draw_logprobs_TM is None:
        return None
    num_captured, num_draws = capture.topk_ids_TK.shape[1], capture.draw_ids_TM.shape[1]
    cut_T = (n_T == num_captured) & (kept_mass_T < (1.0 if nucleus is None else nucleus))
    # With no probability outside the support there is nothing to draw: the engine then reports -inf.
    cut_T &= np.isfinite(capture.draw_logprobs_TM).all(axis=1)
    return Draws(
        n_T=np.where(cut_T, num_draws, 0).astype(np.int32),
        ids_D=capture.draw_ids_TM[cut_T].reshape(-1).astype(np.int32),
        logprobs_D=capture.draw_logprobs_TM[cut_T].reshape(-1).astype(np.float32),
    )


def _log(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    with np.errstate(divide="ignore"):
        return np.log(x)
