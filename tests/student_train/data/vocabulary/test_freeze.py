"""Projected selections: every token checked by chain against the teacher's, through the files and the stream."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from stillroom.errors import ConfigError
from stillroom.pieces import vocabulary_of
from student_train.data.epoch_plan import PlanSpec
from student_train.data.freezing import CacheSource, SelectionRequest
from student_train.data.pack import MAX_CHUNK_TOKENS
from student_train.data.rows import read_rows
from student_train.data.stream import PackStream
from student_train.data.text import HuggingFaceText
from student_train.data.vocabulary.freeze import open_projected_selection
from student_train.data.vocabulary.transport import Aligned, Transport
from student_train.evaluation import _byte_counter
from tests.helpers.caches import EOS_ID, SyntheticCache
from tests.helpers.vocabularies import (
    THINK_END,
    make_chain,
    make_text_cache,
    student_folder,
    teacher_tokenizer,
    write_text_chains,
)
from tests.student_train.data.vocabulary.test_alignment import fast, with_prefix_space

pytestmark = pytest.mark.usefixtures("asked_once")

PHRASE = "Ärger über"
IN_FLOATS = pytest.mark.parametrize("cache", ["topk-f32"], indirect=True)
IN_BYTES = pytest.mark.parametrize("cache", ["topk-u8"], indirect=True)
"""Where the codec is not what is tested, one of them."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return teacher_tokenizer(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module", params=["topk-f32", "topk-u8"])
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, teacher: Any) -> SyntheticCache:
    return make_text_cache(tmp_path_factory.mktemp("cache") / "cache", teacher, codec=request.param)


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HuggingFaceText]:
    folder = tmp_path_factory.mktemp("students")
    kinds = ("bytes", "pieces", "lower")
    return {
        kind: HuggingFaceText(AutoTokenizer.from_pretrained(student_folder(folder / kind, kind)), 400) for kind in kinds
    }


def request(cache: SyntheticCache) -> SelectionRequest:
    return SelectionRequest([CacheSource(cache.root)])


def bytes_of(ids: Any, of_id: list[bytes], end: int) -> list[bytes]:
    return [b"" if one == end else of_id[one] for one in ids.tolist()]


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_every_chain_is_aligned_and_projected(
    cache: SyntheticCache, teacher: Any, students: dict[str, HuggingFaceText], kind: str, tmp_path: Path
) -> None:
    student = students[kind]
    selection = open_projected_selection(tmp_path / "run" / "selection.parquet", request(cache), student)
    chains = {int(one.sample_id[:16], 16): one for one in cache.chains}
    theirs, ours = vocabulary_of(teacher).bytes_by_id(), vocabulary_of(student.tokenizer).bytes_by_id()
    num_common = 0
    for group in range(len(selection.file_G)):
        rows = np.flatnonzero(selection.group_R == group)
        block = read_rows(selection, group, rows, with_signals=True)
        for index, row in enumerate(rows.tolist()):
            chain = chains[int(selection.key_R[row])]
            ids_S = block.tokens_of(index)
            pieces_T = bytes_of(chain.token_ids, theirs, EOS_ID)
            pieces_S = bytes_of(ids_S, ours, student.end_id)
            # Reasoning is opened once: the teacher's prompt did not, so the completion does.
            opening = b"<think>\n"
            said = opening + b"".join(pieces_T)
            assert b"".join(pieces_S) == said.decode(errors="ignore").encode()
            assert (ids_S[-1] == student.end_id) == (chain.finish_reason == "stop")
            begins = {len(opening) + sum(map(len, pieces_T[:place])): place for place in range(len(pieces_T))}
            starts_S = [sum(map(len, pieces_S[:place])) for place in range(len(pieces_S))]
            found = block.chunks_of(index, 0, len(ids_S))
            assert found is not None
            is_common_S, chunk_S = found
            assert is_common_S.tolist() == [one in begins for one in starts_S]
            places = np.array([begins.get(one, -1) for one in starts_S])
            has_value = ~np.isnan(chunk_S)
            starts = np.flatnonzero(is_common_S)
            is_whole = len(b"".join(pieces_S)) == len(said)
            assert np.flatnonzero(has_value).tolist() == [*(starts[1:] - 1), *([len(ids_S) - 1] if is_whole else [])]
            sampled_T = chain.signals.sampled_logprob_T
            ends = [*places[starts[1:]], *([len(sampled_T)] if is_whole else [])]
            sums = [sampled_T[places[first] : last].sum() for first, last in zip(starts, ends, strict=False)]
            np.testing.assert_allclose(chunk_S[has_value], sums, rtol=2e-3)
            signals = block.signals_of(index, 0, len(ids_S))
            assert signals is not None
            ids_TK, logprobs_TK = signals.dense(64)
            mass_S = np.exp(logprobs_TK).sum(axis=1) + np.exp(signals.tail_logmass_T)
            np.testing.assert_allclose(mass_S, 1.0, atol=1e-4)
            # What the teacher did not write has the token that came as its target.
            is_written_S = np.array(starts_S) >= len(opening)
            assert (signals.topk_n_T[~is_written_S] == 1).all()
            assert (ids_TK[~is_written_S, 0] == ids_S[~is_written_S]).all()
            assert (logprobs_TK[~is_written_S, 0] == 0).all()
            assert (signals.topk_n_T[is_common_S] > 1).mean() > 0.5
            # Inside a teacher token all candidates go on with the student's bytes so far, the sampled one at least.
            is_inside_S = is_written_S & ~is_common_S
            came_S = (ids_TK == ids_S[:, None]).any(axis=1)
            assert came_S[is_inside_S].sum() >= 0.9 * is_inside_S.sum()
            num_common += int(is_common_S.sum())
    made = selection.header.projection
    assert made is not None
    assert (made.num_aligned, made.num_changed, made.num_respelled) == (len(chains), 0, 0)
    assert made.num_common == num_common > 0.3 * selection.header.num_tokens
    assert made.num_teacher_tokens == sum(len(chain.token_ids) for chain in cache.chains)
    assert 0.5 < made.mass <= 1
    assert made.special == [(THINK_END, THINK_END if kind == "bytes" else None), ("<|im_end|>", "<|im_end|>")]
    if kind == "bytes":
        (own,) = student.tokenizer.encode(THINK_END, add_special_tokens=False)
        mine = read_rows(selection, 0, np.flatnonzero(selection.group_R == 0), with_signals=False).token_ids_T
        assert (mine == own).sum() == (selection.group_R == 0).sum()


@IN_BYTES
def test_an_interrupted_projection_goes_on_and_is_read_again(
    cache: SyntheticCache, students: dict[str, HuggingFaceText], tmp_path: Path
) -> None:
    path = tmp_path / "run" / "selection.parquet"
    whole = open_projected_selection(path, request(cache), students["bytes"])
    files = sorted((path.parent / "selection-projected").iterdir())
    kept = {one.name: one.read_bytes() for one in files}
    path.unlink()
    files[0].unlink()
    # Its first part was made before: it is not made again, or its time of change would differ.
    changed = files[1].stat().st_mtime_ns
    again = open_projected_selection(path, request(cache), students["bytes"])
    assert again.header == whole.header
    assert {one.name: one.read_bytes() for one in files} == kept
    assert files[1].stat().st_mtime_ns == changed
    assert open_projected_selection(path, request(cache), students["bytes"]).header == whole.header
    with pytest.raises(ConfigError, match="another tokenizer or chat template: choose another run folder"):
        open_projected_selection(path, request(cache), students["pieces"])


@IN_FLOATS
def test_what_a_plan_or_a_stage_has_projected_is_not_projected_again(
    cache: SyntheticCache, students: dict[str, HuggingFaceText], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = open_projected_selection(tmp_path / "plan" / "a.selection.parquet", request(cache), students["bytes"])
    with monkeypatch.context() as patch:
        patch.setattr("student_train.data.vocabulary.freeze.ProjectedRows.make", None)
        for name in ("a", "b"):
            made = open_projected_selection(tmp_path / f"{name}.selection.parquet", request(cache), students["bytes"])
            assert made.header.projection == planned.header.projection
            first = made.path_of(0)
            assert isinstance(first, Path)
            assert first.samefile(tmp_path / "plan" / "a.selection-projected" / first.name)
    # Other chains, or another tokenizer: nothing of it serves.
    other = replace(request(cache), where="split = 'heldout'")
    made = open_projected_selection(tmp_path / "c.selection.parquet", other, students["bytes"])
    alone = open_projected_selection(tmp_path / "alone" / "c.selection.parquet", other, students["bytes"])
    assert made.header == alone.header
    made = open_projected_selection(tmp_path / "d.selection.parquet", request(cache), students["pieces"])
    assert made.header.vocab_size == planned.header.vocab_size
    assert made.header.hash != planned.header.hash


@IN_BYTES
def test_held_out_chains_count_with_those_of_training(
    cache: SyntheticCache, students: dict[str, HuggingFaceText], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heldout = replace(request(cache), where="split = 'heldout'")
    trained = tmp_path / "a.selection.parquet"
    open_projected_selection(trained, replace(request(cache), where="split = 'train'"), students["bytes"])
    counted: list[int] = []
    add = Transport.add

    def add_counted(self: Transport, chains: Aligned) -> None:
        counted.append(len(np.unique(chains.ends_T)))
        add(self, chains)

    monkeypatch.setattr(Transport, "add", add_counted)
    made = open_projected_selection(tmp_path / "b.selection.parquet", heldout, students["bytes"], trained)
    assert sum(counted) == sum(chain.split == "train" for chain in cache.chains)
    assert made.header.projection is not None
    assert made.header.projection.num_aligned == sum(chain.split == "heldout" for chain in cache.chains)


def test_a_rare_end_outside_the_counted_chains_is_the_end(
    teacher: Any, students: dict[str, HuggingFaceText], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains = [make_chain(teacher, row) for row in range(24)]
    (rare,) = teacher.encode("<|im_start|>")
    chains[20].token_ids[-1] = rare
    cache = write_text_chains(tmp_path / "cache", teacher, chains)
    monkeypatch.setattr("student_train.data.vocabulary.freeze.MAX_COUNTED", 100)
    student = students["pieces"]
    selection = open_projected_selection(tmp_path / "selection.parquet", request(cache), student)
    made = selection.header.projection
    assert made is not None
    assert ("<|im_start|>", "<|im_end|>") in made.special
    num_ended = 0
    for group in range(len(selection.file_G)):
        rows = np.flatnonzero(selection.group_R == group)
        block = read_rows(selection, group, rows, with_signals=False)
        for index in range(len(rows)):
            ids = block.tokens_of(index).tolist()
            assert student.end_id not in ids[:-1]
            assert "im_start" not in student.tokenizer.decode(ids)
            num_ended += ids[-1] == student.end_id
    assert num_ended == sum(chain.finish_reason == "stop" for chain in chains)


@IN_FLOATS
def test_a_space_in_front_of_texts_is_not_one_of_their_bytes(cache: SyntheticCache, tmp_path: Path) -> None:
    """Llama's tokenizer writes one: bits per byte do not count it, and no target stands at it."""
    student = fast(with_prefix_space())
    selection = open_projected_selection(tmp_path / "run" / "selection.parquet", request(cache), student)
    count = _byte_counter(selection)
    assert count is not None
    num_bytes = 0
    with PackStream(selection, PlanSpec(512), packs_per_step=1, num_epochs=1) as stream:
        for pack in stream:
            assert pack.is_common_N is not None
            assert not pack.is_common_N[pack.token_N == 0].any()
            num_bytes += count(pack)
    said = [f"<think>\n{chain.text}".rstrip("\ufffd").encode() for chain in cache.chains]
    assert num_bytes == sum(map(len, said))


@IN_FLOATS
def test_packs_say_which_chunks_are_whole(
    cache: SyntheticCache, students: dict[str, HuggingFaceText], tmp_path: Path
) -> None:
    selection = open_projected_selection(tmp_path / "selection.parquet", request(cache), students["pieces"])
    seen = {True: 0, False: 0}
    for max_tokens in (None, 40):
        spec = PlanSpec(512, max_tokens=max_tokens, long_chains="split")
        with PackStream(selection, spec, packs_per_step=1, num_epochs=1) as stream:
            for pack in stream:
                assert pack.chunk_ids_N is not None
                assert pack.chunk_logprobs_N is not None
                assert pack.is_common_N is not None
                for row, token, number, logprob in zip(
                    pack.row_N, pack.token_N, pack.chunk_ids_N, pack.chunk_logprobs_N, strict=True
                ):
                    here_N = pack.chunk_ids_N == number
                    seen[bool(number >= 0)] += 1
                    if number < 0:
                        assert logprob == 0
                        continue
                    assert set(pack.row_N[here_N]) == {row}
                    tokens = pack.token_N[here_N]
                    assert tokens.tolist() == list(range(tokens[0], tokens[0] + here_N.sum()))
                    assert token in tokens
                    assert pack.is_common_N[here_N].tolist() == [True] + [False] * (int(here_N.sum()) - 1)
                    assert here_N.sum() <= MAX_CHUNK_TOKENS
    assert min(seen.values()) > 50


@IN_BYTES
def test_chains_of_two_teachers_are_projected_each_by_its_own_vocabulary(
    cache: SyntheticCache, students: dict[str, HuggingFaceText], tmp_path: Path
) -> None:
    tokenizer = teacher_tokenizer(tmp_path / "other", vocab_size=320)
    other = make_text_cache(tmp_path / "cache", tokenizer, num_chains=12, name="other")
    both = SelectionRequest([CacheSource(cache.root), CacheSource(other.root)])
    selection = open_projected_selection(tmp_path / "selection.parquet", both, students["bytes"])
    made = selection.header.projection
    assert made is not None
    assert made.num_aligned == len(cache.chains) + len(other.chains)
    alone = open_projected_selection(tmp_path / "alone.parquet", request(other), students["bytes"])
    # A student of the other's vocabulary learns from both alike.
    mixed = open_projected_selection(tmp_path / "mixed.parquet", both, HuggingFaceText(tokenizer, 400))
    assert mixed.header.projection is not None
    assert mixed.header.projection.num_aligned == made.num_aligned
    rows = np.flatnonzero(selection.cache_G[selection.group_R] == 1)
    for group in range(len(alone.file_G)):
        here = np.flatnonzero(alone.group_R == group)
        there = rows[here]
        mine = read_rows(selection, int(selection.group_R[there[0]]), there, with_signals=True)
        expected = read_rows(alone, group, here, with_signals=True)
        assert mine.signals is not None
        assert expected.signals is not None
        np.testing.assert_array_equal(mine.token_ids_T, expected.token_ids_T)
        np.testing.assert_array_equal(mine.signals.topk_ids_N, expected.signals.topk_ids_N)
        np.testing.assert_array_equal(mine.signals.topk_logprobs_N, expected.signals.topk_logprobs_N)


@IN_FLOATS
def test_text_that_the_student_changes_is_refused(
    cache: SyntheticCache, students: dict[str, HuggingFaceText], teacher: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"normalizer Lowercase\) does not give back the text of most chains"):
        open_projected_selection(tmp_path / "lower.parquet", request(cache), students["lower"])
    with pytest.raises(ConfigError, match="the student has the cache's vocabulary"):
        open_projected_selection(tmp_path / "same.parquet", request(cache), HuggingFaceText(teacher, 400))


@IN_FLOATS
def test_chains_that_cannot_be_aligned_are_learnt_as_text(
    cache: SyntheticCache, students: dict[str, HuggingFaceText], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student's tokenizer lower-cases one phrase."""
    student, encode = students["bytes"], students["bytes"].encode_completions

    def encode_changed(texts: Sequence[str]) -> list[list[int]]:
        return encode([one.replace(PHRASE, PHRASE.lower()) for one in texts])

    monkeypatch.setattr(student, "encode_completions", encode_changed)
    selection = open_projected_selection(tmp_path / "selection.parquet", request(cache), student)
    texts = {int(chain.sample_id[:16], 16): chain.text for chain in cache.chains}
    made = selection.header.projection
    assert made is not None
    assert made.num_changed == sum(PHRASE in text for text in texts.values()) > 0
    assert made.num_aligned == len(texts) - made.num_changed
    with PackStream(selection, PlanSpec(512), packs_per_step=1, num_epochs=1) as stream:
        for pack in stream:
            assert pack.is_common_N is not None
            for row in set(pack.row_N.tolist()):
                is_kept = PHRASE not in texts[int(selection.key_R[row])]
                assert pack.is_common_N[pack.row_N == row].any() == is_kept
