"""Records that flow between the stages: prompts, captures of one completion, signals as codecs store them, and ids.

Shape legend: T completion tokens, K captured candidates per token, M draws per token, S temperatures besides 1, N
stored candidates and D stored draws of all tokens (ragged, flat), R rows. Log probabilities are natural logarithms of
the teacher's own distribution at temperature 1, before penalties and truncation.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

CUT_REASONS = ("length", "repetition")
"""Finish reasons of chains that the engine ended before the model did."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation in the `messages` form of chat templates."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question for the teacher. `prompt_id` depends on the messages only: equal questions have equal ids."""

    prompt_id: str
    messages: tuple[Message, ...]
    source: str
    split: str
    reference: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Capture:
    """The teacher's distributions for one completion as the engine returns them, before the support is cut.

    token_ids_T int32, sampled_logprob_T float32, sampled_rank_T int32 (1 is the most probable token), topk_ids_TK int32
    and topk_logprobs_TK float32 by falling probability. The rest needs the plugin inside the sampler and is None
    without it: entropy_T float32 in nats over the whole vocabulary; draw_ids_TM int32 and draw_logprobs_TM float32, M
    draws with replacement from the distribution outside the K candidates, each with the teacher's own log probability;
    log_partitions_TS float32, log sum_v p_v^(1/tau_s) for each of S temperatures.
    """

    token_ids_T: Int32
    sampled_logprob_T: Float32
    sampled_rank_T: Int32
    topk_ids_TK: Int32
    topk_logprobs_TK: Float32
    entropy_T: Float32 | None = None
    draw_ids_TM: Int32 | None = None
    draw_logprobs_TM: Float32 | None = None
    log_partitions_TS: Float32 | None = None


@dataclass(frozen=True, slots=True)
class Draws:
    """Sampled tails of T tokens: token t owns the next `n_T[t]` entries of the flat arrays.

    n_T int32 (>= 0), ids_D int32, logprobs_D float32 (the teacher's own, at temperature 1). Drawn with replacement from
    the distribution outside the support, so each entry stands for the tail's mass over n_T[t] and ids may repeat
    (Sparse Logit Sampling, arXiv 2503.16870).
    """

    n_T: Int32
    ids_D: Int32
    logprobs_D: Float32

    def slice(self, start: int, stop: int) -> "Draws":
        """Draws of tokens start..stop-1, as views."""
        first = int(self.n_T[:start].sum(dtype=np.int64))
        last = first + int(self.n_T[start:stop].sum(dtype=np.int64))
        return Draws(self.n_T[start:stop], self.ids_D[first:last], self.logprobs_D[first:last])

    @staticmethod
    def none(num_tokens: int) -> "Draws":
        """No draw for any of `num_tokens` tokens."""
        return Draws(np.zeros(num_tokens, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))

    @staticmethod
    def concat(parts: Sequence["Draws"]) -> "Draws":
        """The parts in order; at least one."""
        return Draws(
            n_T=np.concatenate([part.n_T for part in parts]),
            ids_D=np.concatenate([part.ids_D for part in parts]),
            logprobs_D=np.concatenate([part.logprobs_D for part in parts]),
        )

    def dense(self, m: int) -> tuple[Int32, Float32]:
        """ids_TM int32 and logprobs_TM float32; slots past a token's draws hold id 0 and -inf.

        `m` must not be below the largest n_T: a draw left out would bias the rest.
        """
        assert self.n_T.max(initial=0) <= m
        return ragged_to_dense(self.n_T, self.ids_D, self.logprobs_D, m)


@dataclass(frozen=True, slots=True)
class Signals:
    """Stored distributions of T tokens: the support of token t is the next `topk_n_T[t]` entries of the flat arrays.

    topk_n_T int32 (>= 1), topk_ids_N int32 by falling probability, topk_logprobs_N float32, tail_logmass_T float32
    (log of the mass outside the support, -inf when there is none), sampled_logprob_T float32, sampled_rank_T int32
    (1-based over the whole vocabulary), entropy_T float32 in nats. `draws`: draws from that tail, None where the cache
    stores none; log_partitions_TS float32, log sum_v p_v^(1/tau_s) for the S temperatures of the shard's header, None
    where it has none.
    """

    topk_n_T: Int32
    topk_ids_N: Int32
    topk_logprobs_N: Float32
    tail_logmass_T: Float32
    sampled_logprob_T: Float32
    sampled_rank_T: Int32
    entropy_T: Float32
    draws: Draws | None = None
    log_partitions_TS: Float32 | None = None

    def slice(self, start: int, stop: int) -> "Signals":
        """Signals of tokens start..stop-1, as views."""
        first = int(self.topk_n_T[:start].sum(dtype=np.int64))
        last = first + int(self.topk_n_T[start:stop].sum(dtype=np.int64))
        return Signals(
            topk_n_T=self.topk_n_T[start:stop],
            topk_ids_N=self.topk_ids_N[first:last],
            topk_logprobs_N=self.topk_logprobs_N[first:last],
            tail_logmass_T=self.tail_logmass_T[start:stop],
            sampled_logprob_T=self.sampled_logprob_T[start:stop],
            sampled_rank_T=self.sampled_rank_T[start:stop],
            entropy_T=self.entropy_T[start:stop],
            draws=None if self.draws is None else self.draws.slice(start, stop),
            log_partitions_TS=None if self.log_partitions_TS is None else self.log_partitions_TS[start:stop],
        )

    @staticmethod
    def concat(parts: Sequence["Signals"]) -> "Signals":
        """The tokens of all parts; draws and log-partitions only where all of them hold any."""
        draws = [one.draws for one in parts if one.draws is not None]
        partitions = [one.log_partitions_TS for one in parts if one.log_partitions_TS is not None]
        return Signals(
            topk_n_T=np.concatenate([one.topk_n_T for one in parts]),
            topk_ids_N=np.concatenate([one.topk_ids_N for one in parts]),
            topk_logprobs_N=np.concatenate([one.topk_logprobs_N for one in parts]),
            tail_logmass_T=np.concatenate([one.tail_logmass_T for one in parts]),
            sampled_logprob_T=np.concatenate([one.sampled_logprob_T for one in parts]),
            sampled_rank_T=np.concatenate([one.sampled_rank_T for one in parts]),
            entropy_T=np.concatenate([one.entropy_T for one in parts]),
            draws=Draws.concat(draws) if len(draws) == len(parts) else None,
            log_partitions_TS=np.concatenate(partitions) if len(partitions) == len(parts) else None,
        )

    def dense(self, k: int) -> tuple[Int32, Float32]:
        """Rank-ordered arrays ids_TK int32 and logprobs_TK float32; slots past the support hold id 0 and -inf.

        Tokens with more than k entries keep their first k; the tail does not grow accordingly, so pass k >= max_support
        for losses.
        """
        return ragged_to_dense(self.topk_n_T, self.topk_ids_N, self.topk_logprobs_N, k)


def ragged_to_dense(n_T: Int32, ids_N: Int32, logprobs_N: Float32, k: int) -> tuple[Int32, Float32]:
    """ids_TK int32 and logprobs_TK float32 of flat entries, `n_T` a token; empty slots hold id 0 and -inf."""
    num_tokens, num_entries = len(n_T), len(ids_N)
    ids_TK = np.zeros((num_tokens, k), np.int32)
    logprobs_TK = np.full((num_tokens, k), -np.inf, np.float32)
    starts_T = np.cumsum(n_T, dtype=np.int64) - n_T
    # Entry i of token t has rank i - starts_T[t], so it goes to slot t k + rank of the flattened array.
    slot_N = np.arange(num_entries) + np.repeat(np.arange(num_tokens) * k - starts_T, n_T)
    if n_T.max(initial=0) > k:
        kept_N = np.arange(num_entries) - np.repeat(starts_T, n_T) < k
        slot_N, ids_N, logprobs_N = slot_N[kept_N], ids_N[kept_N], logprobs_N[kept_N]
    ids_TK.reshape(-1)[slot_N] = ids_N
    logprobs_TK.reshape(-1)[slot_N] = logprobs_N
    return ids_TK, logprobs_TK


def stable_hash(*parts: object) -> str:
    """32 hex characters (BLAKE2b, 16 bytes) of the parts' canonical JSON; the same on every machine and version."""
    # Every option is part of the identity: FORMAT.md fixes the bytes that are hashed.
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()


def prompt_id_of(messages: Sequence[Message]) -> str:
    """Identity of a prompt: hash of roles and contents."""
    return stable_hash("prompt", [[m.role, m.content] for m in messages])


def chain_id_of(prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> str:
    """Identity of a chain independent of the teacher: joins what two teachers think of the same tokens."""
    return stable_hash("chain", list(map(int, prompt_token_ids)), list(map(int, token_ids)))


def sample_id_of(
    teacher_fingerprint: str,
    prompt_token_ids: Sequence[int],
    sampling: Mapping[str, Any],
    seed: int,
    sample_index: int,
) -> str:
    """Identity of a generated row: the same request to the same teacher always has the same id."""
    # NumPy integers are not JSON.
    ids = list(map(int, prompt_token_ids))
    return stable_hash("sample", teacher_fingerprint, ids, dict(sampling), seed, sample_index)


def scored_sample_id_of(teacher_fingerprint: str, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> str:
    """Identity of a scored row: completion tokens replace sampling, seed and index."""
    return stable_hash("scored", teacher_fingerprint, list(map(int, prompt_token_ids)), list(map(int, token_ids)))
