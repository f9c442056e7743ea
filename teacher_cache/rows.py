"""A finished completion to one row of the cache: text, reasoning split from answer, identity, scalars, signals.

T completion tokens.
"""

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from schemas.records import Signals, chain_id_of
from shared.errors import StillroomError
from shared.support import scalars_of, support_of
from shared.tokens import reasoning_ids, split_reasoning
from teacher_cache.config import CaptureConfig, ReasoningConfig
from teacher_cache.requests import Finished


@dataclass(frozen=True, slots=True)
class ChainRow:
    """One row to be: plain columns by name, and the signals that the codec stores."""

    columns: Mapping[str, Any]
    signals: Signals

    @property
    def sample_id(self) -> str:
        return str(self.columns["sample_id"])

    @property
    def num_tokens(self) -> int:
        return len(self.signals.topk_n_T)


class RowMaker:
    """Makes rows of one run and worker; holds the tokenizer that turns ids into text."""

    def __init__(
        self, tokenizer: Any, capture: CaptureConfig, reasoning: ReasoningConfig, run_id: str, worker: str
    ) -> None:
        self._tokenizer = tokenizer
        self._capture = capture
        self._start_id, self._end_id = reasoning_ids(tokenizer, reasoning.start, reasoning.end)
        self._run_id, self._worker = run_id, worker

    def row(self, finished: Finished) -> ChainRow:
        """Raises StillroomError when the captured arrays do not fit the tokens: that would be misalignment."""
        request, capture = finished.request, finished.capture
        token_ids = capture.token_ids_T
        _require_aligned(finished)
        self._require_asked(finished)
        signals = support_of(capture, self._capture.max_support, self._capture.nucleus)
        reasoning_end = split_reasoning(token_ids, request.prompt_token_ids, self._start_id, self._end_id)
        reasoning, answer = self._split_text(token_ids.tolist(), reasoning_end)
        prompt = request.prompt
        columns = {
            "sample_id": request.sample_id,
            "chain_id": chain_id_of(request.prompt_token_ids, token_ids.tolist()),
            "prompt_id": prompt.prompt_id,
            "sample_index": request.sample_index,
            "run_id": self._run_id,
            "worker": self._worker,
            "created_at": datetime.datetime.now(datetime.UTC),
            "source": prompt.source,
            "split": prompt.split,
            "messages": [{"role": message.role, "content": message.content} for message in prompt.messages],
            "prompt_token_ids": list(request.prompt_token_ids),
            "reference": prompt.reference,
            "metadata": json.dumps(dict(prompt.metadata), sort_keys=True, ensure_ascii=False),
            "text": self._text(token_ids.tolist()),
            "reasoning": reasoning,
            "answer": answer,
            "token_ids": token_ids,
            "reasoning_end": reasoning_end,
            "finish_reason": finished.finish_reason,
            "seed": request.seed,
            "num_prompt_tokens": len(request.prompt_token_ids),
            "num_tokens": len(token_ids),
            "num_reasoning_tokens": len(token_ids) if reasoning_end is None else reasoning_end,
            **scalars_of(signals),
        }
        return ChainRow(columns, signals)

    def _require_asked(self, finished: Finished) -> None:
        """An engine that leaves out what the shard's header promises would make every reader guess."""
        capture, asked = finished.capture, self._capture
        num_draws = 0 if capture.draw_ids_TM is None else capture.draw_ids_TM.shape[1]
        num_temperatures = 0 if capture.log_partitions_TS is None else capture.log_partitions_TS.shape[1]
        if (num_draws, num_temperatures) != (asked.draws, len(asked.temperatures)):
            raise StillroomError(
                f"sample {finished.request.sample_id}: the engine gave {num_draws} draws and {num_temperatures} "
                f"log-partitions a token, {asked.draws} and {len(asked.temperatures)} were asked for"
            )

    def _split_text(self, ids: list[int], reasoning_end: int | None) -> tuple[str | None, str | None]:
        """Reasoning and answer. The tokens that open and close the reasoning belong to neither text."""
        if reasoning_end == 0:
            return None, self._text(ids)
        first = 1 if ids[0] == self._start_id else 0
        if reasoning_end is None:
            return self._text(ids[first:]).strip("\n"), None
        return self._text(ids[first : reasoning_end - 1]).strip("\n"), self._text(ids[reasoning_end:]).strip("\n")

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


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
            f" {sorted(lengths)}: they would not meet token by token"
        )
