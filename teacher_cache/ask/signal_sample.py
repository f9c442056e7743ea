"""A sample of a cache's decoded signals, for charts: whole row groups, spread evenly over the shards.

In: a cache. Out: per-token arrays of some two million tokens at most, one after the other. Everything where the cache
is small; otherwise the sample says of how many shards it is.

Shape legend: T sampled tokens, R sampled chains.
"""

from dataclasses import dataclass

import numpy as np

from schemas.records import Float32, Int32, Int64
from shared.catalog import Catalog
from shared.shards import open_shard, read_signals

MAX_SHARDS = 24
MAX_TOKENS = 2_000_000


@dataclass(frozen=True)
class SignalSample:
    """Arrays over the sampled tokens, and what part of the cache they are of.

    token_ids_T, position_T (0 is the first token of its chain), entropy_T in nats, top1_prob_T, tail_mass_T, support_T,
    draws_T (tokens drawn from the tail); num_tokens_R the lengths of the chains. `entropy` is the shards' word on what
    it is of: `exact` or `support`.
    """

    token_ids_T: Int32
    position_T: Int64
    entropy_T: Float32
    top1_prob_T: Float32
    tail_mass_T: Float32
    support_T: Int32
    draws_T: Int32
    num_tokens_R: Int64
    max_support: int
    entropy: str
    is_whole: bool


def sample_signals(catalog: Catalog, max_tokens: int = MAX_TOKENS) -> SignalSample | None:
    """Decodes row groups until `max_tokens`. None where the cache holds no chain. Raises CorruptError."""
    files = catalog.chains.files()
    if not files:
        return None
    step = max(1, -(-len(files) // MAX_SHARDS))
    chosen = files[::step]
    parts: list[dict[str, np.ndarray]] = []
    num_tokens, max_support, entropy, is_whole = 0, 0, "exact", len(chosen) == len(files)
    for number, data_file in enumerate(chosen):
        path = catalog.chains.path_of(data_file)
        shard, header = open_shard(path)
        max_support = max(max_support, header.max_support)
        entropy = header.entropy if header.entropy != "exact" else entropy
        budget = max_tokens * (number + 1) // len(chosen)
        with shard:
            for group in range(shard.num_row_groups):
                if num_tokens >= budget:
                    is_whole = False
                    break
                table, signals, offsets = read_signals(shard, header, group, ["token_ids"], str(path))
                starts_T = np.cumsum(signals.topk_n_T, dtype=np.int64) - signals.topk_n_T
                lengths_R = np.diff(offsets)
                parts.append(
                    {
                        "token_ids_T": table.column("token_ids").combine_chunks().flatten().to_numpy(),
                        "position_T": np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths_R),
                        "entropy_T": signals.entropy_T,
                        "top1_prob_T": np.exp(signals.topk_logprobs_N[starts_T]),
                        "tail_mass_T": np.exp(signals.tail_logmass_T),
                        "support_T": signals.topk_n_T,
                        "draws_T": np.zeros_like(signals.topk_n_T) if signals.draws is None else signals.draws.n_T,
                        "num_tokens_R": lengths_R,
                    }
                )
                num_tokens += int(offsets[-1])
    if not parts:
        return None
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return SignalSample(**arrays, max_support=max_support, entropy=entropy, is_whole=is_whole)
