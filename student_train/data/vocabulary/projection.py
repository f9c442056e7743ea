"""The teacher's stored distributions as distributions over the student's next token.

S student tokens, T teacher tokens, N events: a string that the teacher may spell next, and its probability
"""

from dataclasses import dataclass

import numpy as np

from stillroom.schema.records import Float32, Int32, Int64, Signals
from student_train.data.vocabulary.merges import Bool
from student_train.data.vocabulary.pairs import Pairs
from student_train.data.vocabulary.transport import Aligned, Float64, Strings, Transport

MIN_MASS = 2e-4
MAX_SUPPORT = 32
MAX_STEPS = 4
PATH_WEIGHT = 0.5
"""How far the sampled path stands in for the transport: 0 keeps the probabilities, 1 is a full control variate. In the
setting of benchmarks/cross_vocabulary, one seed: 1.8976 bits per byte at 0, 1.8912 at 0.5; 1 was no better."""
MIN_TOTAL = 1e-30
MAX_STRINGS = 2_000_000


@dataclass(frozen=True)
class Targets:
    """Sparse distributions at S student tokens; token s owns the next `n_S[s]` entries, by falling probability.

    n_S int32, 0 where there is no distribution or nothing of it is possible; ids_N int32; logprobs_N float32;
    tail_logmass_S float32, the log of the mass outside them; teacher_mass_S float32, the share of the teacher's mass
    that found student tokens, those that cannot follow included.
    """

    n_S: Int32
    ids_N: Int32
    logprobs_N: Float32
    tail_logmass_S: Float32
    teacher_mass_S: Float32


@dataclass(frozen=True)
class _Entries:
    """What is stored at each teacher token: flat candidates and draws with their mass, the sampled token left out."""

    starts_T: Int64
    ends_T: Int64
    ids_N: Int64
    mass_N: Float64
    sampled_T: Float64


def project(chains: Aligned, signals: Signals, strings: Strings, transport: Transport, pairs: Pairs) -> Targets:
    """Projects `signals` [T] of aligned chains to targets [S] at the student tokens that have a place among them.

    The sum over the teacher's stored candidates a of p(a) times the transport of a's bytes. The sampled candidate's own
    term looks ahead instead: the next stored distribution shows how the text continues, so that the candidates there
    either settle the student's token or lengthen the string that the transport is asked for, and so on along the path
    until it has passed the token that came. Tokens that cannot follow the one before are left out, the rest scaled up.
    Mass is conserved: what finds no token is tail.

    A student token may start inside a teacher token, after "dis" of "distance". Then only the candidates that begin
    with "dis" and go on count, scaled up; where the teacher stopped at "dis", its next token tells the rest.

    At temperature 1 the targets are calibrated: the mean mass of the token that came equals the mean sum of squares.
    """
    # What the transport has counted must keep its numbers; later strings only save time.
    if len(strings) > transport.num_strings + MAX_STRINGS:
        strings.forget_from(transport.num_strings)
    entries = _entries_of(chains.teacher_ids_T, signals)
    index_N = np.flatnonzero(chains.places_S >= 0)
    path_N = np.zeros(len(index_N), np.int64)
    weight_N = np.ones(len(index_N))
    events: list[tuple[Int64, Int64, Float64]] = []
    for step in range(MAX_STEPS + 1):
        places_N = chains.places_S[index_N] + step
        is_inside_N = places_N < chains.ends_T[chains.places_S[index_N]]
        has_passed_N = strings.lengths[path_N] > chains.student_bytes_S[index_N] if step else ~is_inside_N
        has_ended_N = ~has_passed_N & (~is_inside_N | (step == MAX_STEPS))
        ended_N = path_N[has_ended_N]
        events.append(_rows(transport, index_N[has_ended_N], weight_N[has_ended_N], ended_N, strings.first[ended_N]))
        events.append((index_N[has_passed_N], chains.student_ids_S[index_N[has_passed_N]], weight_N[has_passed_N]))
        goes_on_N = ~(has_passed_N | has_ended_N)
        index_N, path_N, places_N = index_N[goes_on_N], path_N[goes_on_N], places_N[goes_on_N]
        weight_N = weight_N[goes_on_N]
        if not len(index_N):
            break
        tokens_N, skipped_N = chains.teacher_ids_T[places_N], chains.skipped_S[index_N]
        # A token alone is known; what one adds to a path is mostly new, and the student's tokenizer has to be asked.
        others, ids, mass = _others_at(entries, places_N, weight_N, MIN_MASS if step else MIN_MASS / 10)
        p_N = entries.sampled_T[places_N]
        if step:
            events.append(_rows(transport, index_N[others], mass, *strings.look_ahead(path_N[others], ids)))
        else:
            alike = np.flatnonzero(skipped_N[others] > 0)
            is_kept = np.ones(len(others), np.bool_)
            is_kept[alike] = strings.begin_alike(tokens_N[others[alike]], ids[alike], skipped_N[others[alike]])
            others, ids, mass = others[is_kept], ids[is_kept], mass[is_kept]
            total_N = np.where(skipped_N > 0, p_N + np.bincount(others, mass, len(index_N)), 1.0)
            p_N, mass = p_N / np.maximum(total_N, MIN_TOTAL), mass / np.maximum(total_N, MIN_TOTAL)[others]
            begun = strings.begin(ids, skipped_N[others])
            events.append(_rows(transport, index_N[others], mass, begun, strings.first[begun]))
        # The control variate: the path's own outcome less what the transport expects of it, zero in the mean.
        extra_N = (1 - p_N) * (0 if step else PATH_WEIGHT)
        weight_N = weight_N * p_N + extra_N
        before_N = path_N
        path_N = strings.extend(path_N, tokens_N) if step else strings.begin(tokens_N, skipped_N)
        if not step:
            events.append(_rows(transport, index_N, -extra_N, path_N, strings.first[path_N]))
        # The end of the chain is the student's end, or what came before it is whole.
        is_end_N = strings.lengths[path_N] == strings.lengths[before_N]
        ids = chains.student_ids_S[index_N[is_end_N]]
        events.append((index_N[is_end_N], ids, weight_N[is_end_N]))
        index_N, path_N, weight_N = index_N[~is_end_N], path_N[~is_end_N], weight_N[~is_end_N]
    return _collect(events, chains, pairs)


def _entries_of(teacher_ids_T: Int64, signals: Signals) -> _Entries:
    num_tokens = len(teacher_ids_T)
    tokens = np.arange(num_tokens)
    owner = np.repeat(tokens, signals.topk_n_T)
    ids, mass = signals.topk_ids_N.astype(np.int64), np.exp(signals.topk_logprobs_N.astype(np.float64))
    is_sampled = ids == teacher_ids_T[owner]
    sampled_T = np.exp(np.minimum(signals.sampled_logprob_T.astype(np.float64), 0.0))
    in_support_T = np.bincount(owner[is_sampled], minlength=num_tokens) > 0
    sampled_T[owner[is_sampled]] = mass[is_sampled]
    owners, all_ids, all_mass = [owner[~is_sampled]], [ids[~is_sampled]], [mass[~is_sampled]]
    if signals.draws is not None and len(signals.draws.ids_D):
        draws = signals.draws
        owner, ids = np.repeat(tokens, draws.n_T), draws.ids_D.astype(np.int64)
        # The sampled token's own mass is known exactly; the other draws share what is left of the tail.
        tail_T = np.exp(signals.tail_logmass_T.astype(np.float64))
        tail_T = np.maximum(tail_T - np.where(in_support_T, 0.0, sampled_T), 0.0)
        is_other = ids != teacher_ids_T[owner]
        owner, ids = owner[is_other], ids[is_other]
        owners.append(owner)
        all_ids.append(ids)
        all_mass.append((tail_T / np.maximum(np.bincount(owner, minlength=num_tokens), 1))[owner])
    owner = np.concatenate(owners)
    order = np.argsort(owner, kind="stable")
    ends_T = np.cumsum(np.bincount(owner, minlength=num_tokens))
    starts_T = np.concatenate([[0], ends_T[:-1]]).astype(np.int64)
    return _Entries(starts_T, ends_T, np.concatenate(all_ids)[order], np.concatenate(all_mass)[order], sampled_T)


def _others_at(entries: _Entries, places_N: Int64, weight_N: Float64, min_mass: float) -> tuple[Int64, Int64, Float64]:
    """(index into places_N, teacher id, mass) of what is stored at each place with more than `min_mass`, flat."""
    num_N = entries.ends_T[places_N] - entries.starts_T[places_N]
    others = np.repeat(np.arange(len(places_N)), num_N)
    at = np.arange(len(others)) + np.repeat(entries.starts_T[places_N] - np.cumsum(num_N) + num_N, num_N)
    mass = weight_N[others] * entries.mass_N[at]
    is_kept = mass > min_mass
    return others[is_kept], entries.ids_N[at[is_kept]], mass[is_kept]


def _rows(
    transport: Transport,
    index_N: Int64,
    mass_N: Float64,
    strings_N: Int64,
    first_N: Int64,
    is_settled_N: Bool | None = None,
) -> tuple[Int64, Int64, Float64]:
    settled_N = np.zeros(len(strings_N), np.bool_) if is_settled_N is None else is_settled_N
    rows, tokens, probs = transport.expand(strings_N, settled_N, first_N)
    mass = mass_N[rows] * probs
    # Most of what a candidate may become comes to next to nothing, and would still have to be sorted.
    is_kept = np.abs(mass) > MIN_MASS / 10
    return index_N[rows[is_kept]], tokens[is_kept], mass[is_kept]


def _collect(events: list[tuple[Int64, Int64, Float64]], chains: Aligned, pairs: Pairs) -> Targets:
    index, tokens, mass = (np.concatenate(part) for part in zip(*events, strict=True))
    num_tokens = len(chains.places_S)
    width = int(tokens.max(initial=0)) + 1
    keys, order = _sorted(index * width + tokens, num_tokens * width)
    # Half the time of np.unique with its inverse, for a hundred entries a token.
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    mass = np.add.reduceat(mass[order], starts) if len(starts) else mass
    index, tokens = keys[starts] // width, keys[starts] % width
    found_S = np.bincount(index, mass, num_tokens)
    # The control variate may leave less than nothing at a few ids, of which the others then give the mass back.
    mass = np.maximum(mass, 0.0)
    mass *= (found_S / np.maximum(np.bincount(index, mass, num_tokens), 1e-9))[index]
    is_possible = (mass <= MIN_MASS) | (tokens == chains.student_ids_S[index])
    asked = np.flatnonzero(~is_possible)
    is_possible[asked] = pairs.allowed(chains.before_S[index[asked]], tokens[asked])
    # What is left is the distribution given that the token before ends where it does.
    left_S = np.maximum(1.0 - np.bincount(index, mass * ~is_possible, num_tokens), MIN_MASS)
    is_possible &= mass > 0.0
    index, tokens, mass = index[is_possible], tokens[is_possible], mass[is_possible]
    mass /= left_S[index]
    # Small entries become tail anyway, and are most of those that would have to be sorted.
    is_large = mass > MIN_MASS
    is_large |= (np.bincount(index, is_large, num_tokens) == 0)[index]
    index, tokens, mass = index[is_large], tokens[is_large], mass[is_large]
    # By index, then falling mass, which is at most 1.
    order = np.argsort(index - 0.5 * mass)
    index, tokens, mass = index[order], tokens[order], mass[order]
    n_S = np.bincount(index, minlength=num_tokens)
    rank = np.arange(len(index)) - np.repeat(np.cumsum(n_S) - n_S, n_S)
    is_kept = (rank == 0) | ((rank < MAX_SUPPORT) & (mass > MIN_MASS))
    index, tokens, mass = index[is_kept], tokens[is_kept], mass[is_kept]
    tail_S = np.maximum(1.0 - np.bincount(index, mass, num_tokens), 0.0)
    with np.errstate(divide="ignore"):
        return Targets(
            n_S=np.bincount(index, minlength=num_tokens).astype(np.int32),
            ids_N=tokens.astype(np.int32),
            logprobs_N=np.log(mass).astype(np.float32),
            tail_logmass_S=np.log(tail_S).astype(np.float32),
            teacher_mass_S=found_S.astype(np.float32),
        )


def _sorted(keys_N: Int64, limit: int) -> tuple[Int64, Int64]:
    """The keys, all below `limit`, in order, and where each stood."""
    num_bits = len(keys_N).bit_length()
    # Key and place share the 63 bits below the sign.
    if limit.bit_length() + num_bits > 63:
        order = np.argsort(keys_N, kind="stable")
        return keys_N[order], order
    # Sorting numbers that carry their place takes a third of the time of argsort.
    packed_N = np.sort((keys_N << num_bits) | np.arange(len(keys_N)))
    return packed_N >> num_bits, packed_N & ((1 << num_bits) - 1)
