"""Text for a student of another vocabulary: the same chains in its own ids, planned and streamed like any other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from stillroom.errors import ConfigError, CorruptError
from stillroom.storage.paths import Location
from student_train.data.epoch_plan import PlanSpec
from student_train.data.freezing import CacheSource, SelectionRequest
from student_train.data.selection import Selection, load_selection
from student_train.data.stream import PackStream
from student_train.data.text import HuggingFaceText, Markers, completion_text, open_text_selection
from tests.helpers.caches import EOS_ID, NUM_SPECIAL, SyntheticCache, damage, make_cache


class Letters:
    """One id a character; 0 ends an answer. Answers that hold `nothing` come to no ids."""

    def __init__(self, nothing: str = "\0", fingerprint: str = "letters") -> None:
        self.vocab_size, self.end_id, self.fingerprint = 200, 0, fingerprint
        self.identity: tuple[object, ...] = (fingerprint,)
        self._nothing = nothing
        self.num_encoded = 0

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        return "".join(f"[{one['role']}]{one['content']}" for one in messages) + "[assistant]"

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        return [[ord(letter) for letter in text] for text in texts]

    @property
    def metadata(self) -> dict[bytes, bytes]:
        return {}

    def write_vocab(self, path: Location) -> None:
        path.write_bytes(b"")

    def encode_completions(self, texts: Sequence[str]) -> list[list[int]]:
        self.num_encoded += len(texts)
        return [[ord(letter) for letter in text if self._nothing not in text] for text in texts]


@pytest.fixture
def cache(tmp_path: Path) -> SyntheticCache:
    return make_cache(tmp_path / "cache", num_chains=30, num_runs=2, max_tokens=12, unfinished_frac=0.4)


def request(*caches: SyntheticCache, where: str | None = None) -> SelectionRequest:
    return SelectionRequest([CacheSource(one.root) for one in caches], where)


def texts_of(selection: Selection, **options: Any) -> dict[int, tuple[str, str]]:
    """By row: everything that was read before the first loss token, and the loss tokens, as text (0 as a dollar)."""
    found: dict[int, tuple[str, str]] = {}
    with PackStream(selection, PlanSpec(400), packs_per_step=1, num_epochs=1, **options) as stream:
        for pack in stream:
            assert pack.ids_NK.shape == (pack.num_loss_tokens, 0)
            for row in set(pack.row_N.tolist()):
                mine_N = pack.row_N == row
                first = pack.predict_positions_N[mine_N][0]
                document_L = pack.document_ids_L == pack.document_ids_L[first]
                prompt = pack.input_ids_L[document_L][: pack.position_ids_L[first] + 1]
                found[row] = (as_text(prompt), as_text(pack.sampled_ids_N[mine_N]))
    return found


def as_text(ids: Any) -> str:
    return "".join("$" if one == 0 else chr(one) for one in ids.tolist())


def test_the_student_reads_the_teachers_words_in_its_own_ids(cache: SyntheticCache, tmp_path: Path) -> None:
    path = tmp_path / "run" / "selection.parquet"
    selection = open_text_selection(path, request(cache, where="source = 'sums'"), Letters())
    chains = {int(one.sample_id[:16], 16): one for one in cache.chains}
    found = texts_of(selection)
    assert len(found) == sum(one.source == "sums" for one in cache.chains)
    for row, (prompt, completion) in found.items():
        chain = chains[int(selection.key_R[row])]
        assert prompt == f"[user]{chain.prompt}[assistant]"
        ended = chain.finish_reason == "stop"
        # The synthetic teacher's text has no marks, so reasoning and answer are joined by them.
        middle = len(chain.text) // 2
        body = f"<think>\n{chain.text[:middle]}</think>{chain.text[middle:]}"
        assert completion == body + "$" * ended
    assert any(not text.endswith("$") for _, text in found.values())
    assert selection.is_text
    assert selection.header.max_support == 0
    assert selection.header.tokenizer_fingerprints == ["letters"]
    assert selection.header.vocab_size == 200


def test_scored_chains_end_as_they_were_given(tmp_path: Path) -> None:
    """Published chains are scored with an end-of-sequence token: without one a student would never learn to stop."""
    made = make_cache(tmp_path / "cache", num_chains=20, max_tokens=12, unfinished_frac=0.4, scored=True)
    chains = {int(one.sample_id[:16], 16): one for one in made.chains}
    selection = open_text_selection(tmp_path / "selection.parquet", request(made), Letters())
    found = texts_of(selection)
    seen = set()
    for row, (_, text) in found.items():
        chain = chains[int(selection.key_R[row])]
        # The first chains of a synthetic cache write special tokens into their text.
        if chain.row >= NUM_SPECIAL:
            assert text.endswith("$") == (chain.token_ids[-1] == EOS_ID)
            seen.add(text.endswith("$"))
    assert seen == {True, False}


def test_it_is_tokenised_once(cache: SyntheticCache, tmp_path: Path) -> None:
    path, letters = tmp_path / "run" / "selection.parquet", Letters()
    first = open_text_selection(path, request(cache), letters)
    assert letters.num_encoded == 30
    again = open_text_selection(path, request(cache), letters)
    assert letters.num_encoded == 30
    assert again.header == first.header
    assert texts_of(again) == texts_of(load_selection(path))


def test_an_interrupted_call_resumes_where_it_stopped(cache: SyntheticCache, tmp_path: Path) -> None:
    path = tmp_path / "run" / "selection.parquet"
    whole = open_text_selection(path, request(cache), Letters())
    path.unlink()
    files = sorted((path.parent / "selection-text").iterdir())
    assert len(files) == 3
    files[0].unlink()
    letters = Letters()
    assert open_text_selection(path, request(cache), letters).header.hash == whole.header.hash
    assert letters.num_encoded == 12


def test_caches_of_several_tokenizers(cache: SyntheticCache, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", num_chains=8, tokenizer="another", seed=4)
    selection = open_text_selection(tmp_path / "selection.parquet", request(cache, other), Letters())
    assert selection.num_chains == 38
    assert len(texts_of(selection)) == 38


def test_resume_is_exact(cache: SyntheticCache, tmp_path: Path) -> None:
    selection = open_text_selection(tmp_path / "selection.parquet", request(cache), Letters())
    with PackStream(selection, PlanSpec(400), packs_per_step=1, num_epochs=1) as stream:
        packs = [stream.__next__().input_ids_L.tolist() for _ in range(4)]
        state = stream.state_dict()
        packs += [pack.input_ids_L.tolist() for pack in stream]
    with PackStream(selection, PlanSpec(400), packs_per_step=1, num_epochs=1) as stream:
        stream.load_state_dict(state)
        assert [pack.input_ids_L.tolist() for pack in stream] == packs[4:]


def test_empty_answers_are_left_out_and_counted(cache: SyntheticCache, tmp_path: Path) -> None:
    # Every text holds a w; those that were cut off get no end of sequence and so come to nothing.
    selection = open_text_selection(tmp_path / "selection.parquet", request(cache), Letters(nothing="w"))
    unfinished = sum(one.finish_reason == "length" for one in cache.chains)
    assert selection.header.num_empty == unfinished > 0
    assert {text for _, text in texts_of(selection).values()} == {"$"}


def test_a_selection_without_text_is_refused(cache: SyntheticCache, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none of the \d+ chains of \"finish_reason = 'length'\" has text"):
        open_text_selection(
            tmp_path / "selection.parquet", request(cache, where="finish_reason = 'length'"), Letters(nothing="w")
        )


def test_another_tokenizer_needs_another_run(cache: SyntheticCache, tmp_path: Path) -> None:
    path = tmp_path / "selection.parquet"
    open_text_selection(path, request(cache), Letters())
    with pytest.raises(ConfigError, match="another tokenizer or chat template: choose another run folder"):
        open_text_selection(path, request(cache), Letters(fingerprint="other"))
    with pytest.raises(ConfigError, match="frozen with where"):
        open_text_selection(path, request(cache, where="correct"), Letters())


def test_damage_is_named(cache: SyntheticCache, tmp_path: Path) -> None:
    selection = open_text_selection(tmp_path / "selection.parquet", request(cache), Letters())
    path = selection.path_of(0)
    with pq.ParquetFile(path) as file:
        chunk = file.metadata.row_group(0).column(2)
    damage(path, (chunk.data_page_offset + chunk.total_compressed_size // 2) / path.stat().st_size)
    with pytest.raises(CorruptError, match=path.name):
        texts_of(selection)
    path.unlink()
    with pytest.raises(CorruptError, match="cannot be read"):
        texts_of(selection)


@pytest.mark.parametrize(
    ("text", "prompt", "wanted"),
    [
        ("<think>\nab</think>\n\nc", "P", "<think>\nab</think>\n\nc"),
        # R1's template opens the reasoning, the student's does not.
        ("ab</think>\n\nc", "P", "<think>\nab</think>\n\nc"),
        # Both do.
        ("ab</think>\n\nc", "P<think>\n", "ab</think>\n\nc"),
        # The student's does, the teacher's did not.
        ("<think>\nab</think>\n\nc", "P<think>\n", "ab</think>\n\nc"),
        # A decoder left out both marks.
        ("ab\n\nc", "P", "<think>\nab</think>\n\nc"),
    ],
)
def test_reasoning_is_opened_once(text: str, prompt: str, wanted: str) -> None:
    row = {"text": text, "reasoning": "ab", "answer": "\n\nc"}
    assert completion_text(row, prompt, Markers("<think>", "</think>")) == wanted


def test_reasoning_that_never_closed_stays_open() -> None:
    row = {"text": "ab", "reasoning": "ab", "answer": None}
    assert completion_text(row, "P", Markers("<think>", "</think>")) == "<think>\nab"


def test_no_reasoning_no_marks() -> None:
    row = {"text": "c", "reasoning": None, "answer": "c"}
    assert completion_text(row, "P", Markers("<think>", "</think>")) == "c"
    assert completion_text({**row, "reasoning": "b"}, "P", Markers(None, None)) == "c"


def tiny_tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<end>", "<user>", "a", "b", "end", "<", ">", "<think>"]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation("isolated")])
    core.add_special_tokens([AddedToken("<end>"), AddedToken("<user>")])
    core.add_tokens(["<think>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}<user>{{ m.content }}<end>{% endfor %}"
    return tokenizer


def test_a_transformers_tokenizer() -> None:
    text = HuggingFaceText(tiny_tokenizer(), vocab_size=16)
    rendered = text.render([{"role": "user", "content": "a b"}])
    assert rendered == "<user>a b<end>"
    assert text.encode_prompts([rendered]) == [[2, 3, 4, 1]]
    # A teacher that writes the student's end of sequence does not end the student's; <think> is an ordinary token.
    assert text.encode_completions(["<think> a <end> b"]) == [[8, 3, 6, 5, 7, 4]]
    assert text.encode_prompts([]) == text.encode_completions([]) == []
    assert text.end_id == 1
    assert len(text.fingerprint) == 32


def test_an_answer_ends_as_the_template_ends_it() -> None:
    tokenizer = tiny_tokenizer()
    plain = HuggingFaceText(tokenizer, vocab_size=16)
    assert plain.identity == (plain.fingerprint,)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<user>\n{% endfor %}"
    other = HuggingFaceText(tokenizer, vocab_size=16)
    assert (other.end_id, tokenizer.eos_token_id) == (2, 1)
    assert other.identity == (other.fingerprint, 2)
    # What the template writes behind an answer is not a special token, or it refuses the question.
    for template in ("{% for m in messages %}{{ m.content }} a{% endfor %}", "{{ raise_exception('no') }}"):
        tokenizer.chat_template = template
        assert HuggingFaceText(tokenizer, vocab_size=16).end_id == 1


def test_a_tokenizer_without_template_or_end_is_refused() -> None:
    for change, message in ((("chat_template", None), "chat template"), (("eos_token", None), "eos_token")):
        tokenizer = tiny_tokenizer()
        setattr(tokenizer, *change)
        with pytest.raises(ConfigError, match=message):
            HuggingFaceText(tokenizer, vocab_size=16)
