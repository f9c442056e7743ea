"""Exact streaming: every chain once an epoch, whoever reads, wherever it resumes, each target with its own token."""

import itertools
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillroom.errors import ConfigError, CorruptError
from stillroom.schema.records import Int64
from student_train.data.epoch_plan import LongChains, PlanSpec
from student_train.data.freezing import CacheSource, SelectionRequest, freeze
from student_train.data.pack import Pack
from student_train.data.rows import RowBlock, read_rows
from student_train.data.selection import Selection
from student_train.data.stream import PackStream
from tests.helpers.caches import Chain, SyntheticCache, make_cache

SPEC = PlanSpec(128, lanes=2, window_groups=2)


@dataclass(frozen=True)
class Frozen:
    """A selection, and the chain behind each of its rows."""

    cache: SyntheticCache
    selection: Selection
    chain_R: list[Chain]


@pytest.fixture(scope="module", autouse=True)
def _decode_once() -> Iterator[None]:
    """Hundreds of streams read the same rows."""
    blocks: dict[Any, RowBlock] = {}

    def read_kept(selection: Selection, group: int, rows_R: Int64, *, with_signals: bool, **options: Any) -> RowBlock:
        key = (selection.header.hash, selection.path_of(group), group, rows_R.tobytes(), with_signals)
        if key not in blocks:
            blocks[key] = read_rows(selection, group, rows_R, with_signals=with_signals, **options)
        return blocks[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("student_train.data.stream.read_rows", read_kept)
        yield


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Frozen:
    root = tmp_path_factory.mktemp("stream")
    return freeze_all(root, make_cache(root / "cache", num_chains=70, num_workers=2))


def freeze_all(root: Path, cache: SyntheticCache) -> Frozen:
    selection = freeze(root / "selection.parquet", SelectionRequest([CacheSource(cache.root)]))
    by_id = {one.sample_id: one for one in cache.chains}
    ids = pq.read_table(root / "selection.parquet").column("sample_id").to_pylist()
    return Frozen(cache, selection, [by_id[one] for one in ids])


def read(selection: Selection, spec: PlanSpec, count: int | None = None, **options: Any) -> tuple[list[Pack], Any]:
    """Packs of one rank (all, or the first `count`), and the state after them."""
    state = options.pop("state", None)
    with PackStream(selection, spec, **{"packs_per_step": 1, "num_epochs": 1, **options}) as stream:
        if state is not None:
            stream.load_state_dict(state)
        packs = list(stream if count is None else itertools.islice(stream, count))
        return packs, stream.state_dict()


def read_world(selection: Selection, spec: PlanSpec, world: int, **options: Any) -> list[Pack]:
    """Packs of all ranks in global order."""
    ranks = [read(selection, spec, rank=rank, world=world, **options)[0] for rank in range(world)]
    return [pack for step in zip(*ranks, strict=True) for pack in step]


def content(pack: Pack) -> tuple[Any, ...]:
    """Everything a pack says, to compare bit for bit."""
    arrays = (
        pack.input_ids_L, pack.position_ids_L, pack.document_ids_L, pack.predict_positions_N, pack.sampled_ids_N,
        pack.weights_N, pack.row_N, pack.token_N, pack.ids_NK, pack.logprobs_NK, pack.tail_logmass_N, pack.entropy_N,
    )  # fmt: skip
    return tuple(None if array is None else (array.dtype, array.shape, array.tobytes()) for array in arrays)


def contents(packs: list[Pack]) -> list[tuple[Any, ...]]:
    return [content(pack) for pack in packs if pack.num_loss_tokens]


def keys(packs: list[Pack]) -> Counter[tuple[int, int]]:
    """How often each (row, completion token) had a loss."""
    return Counter(key for pack in packs for key in zip(pack.row_N.tolist(), pack.token_N.tolist(), strict=True))


def all_keys(frozen: Frozen, times: int = 1) -> Counter[tuple[int, int]]:
    lengths = frozen.selection.num_tokens_R.tolist()
    return Counter({(row, token): times for row, length in enumerate(lengths) for token in range(length)})


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    world=st.sampled_from([1, 2, 3, 4, 7]),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 3),
    num_epochs=st.integers(1, 3),
    buffer_mib=st.sampled_from([1, 64]),
    read_ahead_groups=st.sampled_from([0, 1, 8]),
)
def test_every_token_once_an_epoch_whoever_reads(
    frozen: Frozen,
    world: int,
    accumulation: int,
    seed: int,
    num_epochs: int,
    buffer_mib: int,
    read_ahead_groups: int,
) -> None:
    spec = PlanSpec(128, seed=seed, lanes=2, window_groups=2)
    options: dict[str, Any] = {
        "num_epochs": num_epochs,
        "buffer_mib": buffer_mib,
        "read_ahead_groups": read_ahead_groups,
    }
    packs = read_world(frozen.selection, spec, world, packs_per_step=world * accumulation, **options)
    assert keys(packs) == all_keys(frozen, num_epochs)
    assert len(packs) % (world * accumulation) == 0
    # Only the last step holds empty packs, and they come last.
    last_full = max(index for index, pack in enumerate(packs) if pack.num_loss_tokens)
    assert len(packs) - 1 - last_full < world * accumulation
    assert contents(packs) == contents(read(frozen.selection, spec, num_epochs=num_epochs)[0])


@pytest.mark.parametrize("world", [2, 3, 4, 6, 12])
def test_the_global_batches_are_the_same_for_any_world(frozen: Frozen, world: int) -> None:
    alone = read(frozen.selection, SPEC, packs_per_step=12, num_epochs=2)[0]
    together = read_world(frozen.selection, SPEC, world, packs_per_step=12, num_epochs=2)
    assert len(alone) == len(together)
    assert [content(pack) for pack in alone] == [content(pack) for pack in together]


@pytest.mark.parametrize("spec", [SPEC, PlanSpec(128, max_tokens=40, long_chains="split", lanes=3, window_groups=3)])
@pytest.mark.parametrize("codec", ["topk-f32", "topk-u8"])
def test_each_target_belongs_to_its_own_token(tmp_path: Path, spec: PlanSpec, codec: str) -> None:
    """By key: the cache's distribution of token t of chain r holds the ids r and V/2 + t."""
    frozen = freeze_all(tmp_path, make_cache(tmp_path / "cache", num_chains=50, codec=codec))
    half_vocab = frozen.selection.header.vocab_size // 2
    state = read(frozen.selection, spec, count=2, world=3, packs_per_step=3)[1]
    resumed = [read(frozen.selection, spec, rank=rank, world=2, packs_per_step=2, state=state)[0] for rank in (0, 1)]
    seen = 0
    for pack in itertools.chain(*resumed):
        for place, (row, token) in enumerate(zip(pack.row_N.tolist(), pack.token_N.tolist(), strict=True)):
            chain = frozen.chain_R[row]
            position = pack.predict_positions_N[place]
            document = pack.document_ids_L == pack.document_ids_L[position]
            first = np.flatnonzero(document)[0]
            context = pack.input_ids_L[first : position + 1].tolist()
            whole = [*chain.prompt_ids.tolist(), *chain.token_ids.tolist()]
            shown = len(chain.prompt_ids) + token
            # What the model has read so far is the chain up to the token, and the token is the next one.
            assert context == whole[shown - len(context) : shown]
            assert pack.sampled_ids_N[place] == chain.token_ids[token] == whole[shown]
            assert pack.position_ids_L[position] == position - first
            assert pack.ids_NK[place, :2].tolist() == [chain.row, half_vocab + token]
            wanted = chain.signals.slice(token, token + 1)
            error = 0 if codec == "topk-f32" else 0.2
            stored = pack.logprobs_NK[place][: wanted.topk_n_T[0]]
            np.testing.assert_allclose(stored, wanted.topk_logprobs_N, atol=error)
            assert (pack.logprobs_NK[place][wanted.topk_n_T[0] :] == -np.inf).all()
            assert pack.tail_logmass_N is not None
            assert pack.entropy_N is not None
            np.testing.assert_allclose(pack.tail_logmass_N[place], wanted.tail_logmass_T[0], atol=error)
            np.testing.assert_allclose(pack.entropy_N[place], wanted.entropy_T[0], rtol=0 if not error else 1e-3)
            seen += 1
    assert seen > 500


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stop=st.integers(0, 40), old=st.sampled_from([1, 2, 4]), new=st.sampled_from([1, 2, 4]), step=st.integers(1, 3))
def test_resume_in_the_middle_gives_the_same_packs_on_another_world(
    frozen: Frozen, stop: int, old: int, new: int, step: int
) -> None:
    """The global batch of 4 x step packs stays; after `stop` steps the number of ranks changes."""
    batch = 4 * step
    whole = contents(read(frozen.selection, SPEC, packs_per_step=batch, num_epochs=2)[0])
    before = [
        read(frozen.selection, SPEC, stop * batch // old, rank=rank, world=old, packs_per_step=batch, num_epochs=2)
        for rank in range(old)
    ]
    states = [state for _, state in before]
    assert all(state == states[0] for state in states)
    first = [pack for packs in zip(*(packs for packs, _ in before), strict=True) for pack in packs]
    rest = read_world(frozen.selection, SPEC, new, packs_per_step=batch, num_epochs=2, state=states[0])
    assert contents(first) + contents(rest) == whole


def test_state_counts_what_was_consumed_not_what_was_read_ahead(frozen: Frozen) -> None:
    with PackStream(frozen.selection, SPEC, packs_per_step=1, num_epochs=1, prefetch_packs=8) as stream:
        assert (stream.state_dict()["epoch"], stream.state_dict()["cursor"]) == (0, 0)
        next(stream)
        wait_until(stream._queue.full)
        assert stream.state_dict()["cursor"] == 1
        # Going on after a close reads again what was read ahead and not consumed.
        second = next(stream)
        stream.close()
        third = next(stream)
    assert [content(second), content(third)] == [content(pack) for pack in read(frozen.selection, SPEC, count=3)[0][1:]]


def wait_until(condition: Any) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited ten seconds in vain")


def test_epochs_follow_each_other_without_a_gap_and_differ(frozen: Frozen) -> None:
    num_packs = len(read(frozen.selection, SPEC)[0])
    with PackStream(frozen.selection, SPEC, packs_per_step=1) as endless:
        packs = list(itertools.islice(endless, 2 * num_packs + 5))
        assert endless.state_dict()["epoch"] == 2
        assert endless.state_dict()["cursor"] in range(1, 12)
    assert contents(packs[:num_packs]) != contents(packs[num_packs : 2 * num_packs])


def test_totals_are_known_before_training(frozen: Frozen) -> None:
    with PackStream(frozen.selection, SPEC, packs_per_step=4, num_epochs=3) as stream:
        assert -(-stream.plans.total_packs() // 4) == len(list(stream)) / 4


def test_an_ended_stream_stays_ended_also_after_resume(frozen: Frozen) -> None:
    _, state = read(frozen.selection, SPEC)
    assert (state["epoch"], state["cursor"]) == (1, 0)
    assert read(frozen.selection, SPEC, state=state)[0] == []


def test_a_tight_buffer_reads_again_and_says_the_same(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", num_chains=120, max_tokens=800, max_support=64, id_skew=2.0, vocab_size=4000)
    selection = freeze(tmp_path / "selection.parquet", SelectionRequest([CacheSource(cache.root)]))
    spec = PlanSpec(1024, lanes=1, window_groups=30)
    results = {}
    for buffer_mib in (1, 64):
        with PackStream(selection, spec, packs_per_step=1, num_epochs=1, buffer_mib=buffer_mib) as stream:
            results[buffer_mib] = (contents(list(stream)), stream.stats)
    assert results[1][0] == results[64][0]
    assert results[64][1].num_group_reads == len(selection.file_G) < results[1][1].num_group_reads
    assert results[1][1].max_buffer_bytes < (2 << 20) < results[64][1].max_buffer_bytes


@pytest.mark.parametrize("policy", ["truncate", "skip", "split"])
def test_long_chains(frozen: Frozen, policy: LongChains) -> None:
    spec = PlanSpec(128, max_tokens=40, long_chains=policy)
    with PackStream(frozen.selection, spec, packs_per_step=1, num_epochs=1) as stream:
        packs, counts = list(stream), stream.plans.counts
    assert counts.num_long > 0
    lost = all_keys(frozen) - keys(packs)
    assert sum(lost.values()) == counts.num_tokens_lost
    assert not keys(packs) - all_keys(frozen)
    assert all(np.bincount(pack.document_ids_L).max() <= 40 for pack in packs)
    if policy == "skip":
        assert all((row, 0) in lost for row, _ in lost)
    if policy == "split":
        assert not lost
    if policy == "truncate":
        # No target was invented at the cut: the last target of every chain is the token that the teacher said there.
        for pack in packs:
            for row, token, target in zip(pack.row_N, pack.token_N, pack.sampled_ids_N, strict=True):
                assert target == frozen.chain_R[row].token_ids[token]


def test_nothing_left_is_refused(frozen: Frozen) -> None:
    with pytest.raises(ConfigError, match=r"all 70 selected chains \(no condition\) are longer.*raise pack_tokens"):
        PackStream(frozen.selection, PlanSpec(2, long_chains="skip"), packs_per_step=1)


def test_a_batch_that_does_not_divide_is_refused(frozen: Frozen) -> None:
    with pytest.raises(ConfigError, match="8 packs cannot be divided among 3 ranks"):
        PackStream(frozen.selection, SPEC, packs_per_step=8, rank=0, world=3)
    with pytest.raises(ConfigError, match="a global batch of 0 packs"):
        PackStream(frozen.selection, SPEC, packs_per_step=0)
    with pytest.raises(ConfigError, match="rank=2 is none of world=2 ranks"):
        PackStream(frozen.selection, SPEC, packs_per_step=8, rank=2, world=2)


def test_a_state_of_other_data_is_refused(frozen: Frozen) -> None:
    state = read(frozen.selection, SPEC, count=2)[1]
    for spec in (PlanSpec(128, seed=1, lanes=2, window_groups=2), PlanSpec(64)):
        with pytest.raises(ConfigError, match="another selection or packing"):
            read(frozen.selection, spec, state=state)


def test_ids_alone_are_the_same_ids(frozen: Frozen) -> None:
    full = read(frozen.selection, SPEC)[0]
    for one, other in zip(full, read(frozen.selection, SPEC, with_signals=False)[0], strict=True):
        assert one.input_ids_L.tolist() == other.input_ids_L.tolist()
        assert one.sampled_ids_N.tolist() == other.sampled_ids_N.tolist()
        assert other.ids_NK.shape == (one.num_loss_tokens, 0)


def test_a_corrupt_shard_is_never_trained_in_silence(tmp_path: Path) -> None:
    frozen = freeze_all(tmp_path, make_cache(tmp_path / "cache", num_chains=40))
    path = frozen.selection.path_of(3)
    with pq.ParquetFile(path) as file:
        group = file.metadata.row_group(int(frozen.selection.row_group_G[3]))
        chunk = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema.startswith("topk_ids"))
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    path.write_bytes(bytes(data))
    with (
        PackStream(frozen.selection, SPEC, packs_per_step=1, num_epochs=1) as stream,
        pytest.raises(CorruptError, match="row group") as caught,
    ):
        list(stream)
    assert path.name in str(caught.value)
    assert not reading_threads()


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("pack-stream")]


def test_closing_early_leaves_no_thread(frozen: Frozen) -> None:
    with PackStream(frozen.selection, SPEC, packs_per_step=1, prefetch_packs=1) as stream:
        next(stream)
        assert reading_threads()
    assert not reading_threads()
    stream.close()


def test_stalls_are_measured(frozen: Frozen) -> None:
    with PackStream(frozen.selection, SPEC, packs_per_step=1, num_epochs=1) as stream:
        packs = list(stream)
        stats = stream.stats
    assert stats.num_packs == len(packs)
    assert stats.num_tokens == sum(pack.num_tokens for pack in packs)
    assert stats.num_loss_tokens == frozen.selection.header.num_tokens
    assert stats.stall_s > 0


def test_several_caches_with_weights(tmp_path: Path) -> None:
    first = make_cache(tmp_path / "a", num_chains=20)
    second = make_cache(tmp_path / "b", num_chains=30, seed=9, codec="topk-u8", max_support=12)
    sources = [CacheSource(first.root, 2.0), CacheSource(second.root, 0.5)]
    selection = freeze(tmp_path / "selection.parquet", SelectionRequest(sources))
    packs = read(selection, SPEC, num_epochs=2)[0]
    cache_R = selection.cache_G[selection.group_R]
    wanted = Counter({0: 4 * 20, 1: 30})
    starts = Counter(int(cache_R[row]) for row, token in keys(packs).elements() if token == 0)
    assert starts == wanted
    assert {count for (row, _), count in keys(packs).items() if cache_R[row] == 0} == {4}
    assert {count for (row, _), count in keys(packs).items() if cache_R[row] == 1} == {1}


def test_sample_weights_reach_every_token(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", num_chains=20)
    request = SelectionRequest([CacheSource(cache.root)], weight="if(source = 'sums', 2, 0.5)")
    selection = freeze(tmp_path / "selection.parquet", request)
    for pack in read(selection, SPEC)[0]:
        assert pack.weights_N.tolist() == selection.weight_R[pack.row_N].tolist()
    assert set(selection.weight_R.tolist()) == {2.0, 0.5}


def test_a_rank_that_waits_says_for_which_file_and_how_long(frozen: Frozen, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.15)
        return read_rows(*arguments, **options)

    monkeypatch.setattr("student_train.data.stream.read_rows", slowly)
    monkeypatch.setattr("student_train.data.stream.WAIT_NOTE_S", 0.05)
    said: list[str] = []
    read(frozen.selection, SPEC, 1, rank=1, world=2, packs_per_step=2, tell=said.append)
    assert re.fullmatch(r"waiting for data: rank 1 of 2 has waited 0:\d\d for /.*\.parquet: row group \d+", said[0])
