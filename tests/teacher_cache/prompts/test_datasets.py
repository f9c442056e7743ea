"""Data sets as people have them: from raw files to rendered prompts and verdicts, with nothing dropped unsaid."""

import bz2
import csv
import gzip
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.cache.catalog import Catalog
from stillroom.config import validate_config
from stillroom.errors import ConfigError, DataError
from stillroom.sql.session import open_session
from teacher_cache.building.build import Build
from teacher_cache.config import BuildConfig
from teacher_cache.engine.api import Failure, Request
from teacher_cache.engine.fake import FakeEngine
from teacher_cache.engine.teacher import IdentifiedTeacher, check_template_kwargs
from teacher_cache.prompts.config import PromptsConfig
from teacher_cache.prompts.prompts import LoadedPrompts, load_prompts, requests
from teacher_cache.prompts.rendering import tokenize
from tests.helpers.fake_builds import K, make_teacher
from tests.helpers.tiny_tokenizer import CHAT_TEMPLATE

NUM_ROWS = 10


def load(*sources: dict[str, Any], **more: Any) -> LoadedPrompts:
    named = [{"name": f"s{number}", **source} for number, source in enumerate(sources)]
    return load_prompts(validate_config({"sources": named, **more}, PromptsConfig, "test"))


def lines(rows: list[Any]) -> bytes:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()


@pytest.fixture
def teacher() -> IdentifiedTeacher:
    made = make_teacher()
    made.tokenizer.chat_template = CHAT_TEMPLATE
    return made


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TEXT_PARTS = [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]
CALL = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
NO_FIELD = "is not a list of messages"


@pytest.mark.parametrize(
    ("messages", "right"),
    [
        ([{"from": "human", "value": "q"}], "user:q"),
        ([{"from": "system", "value": "s"}, {"from": "human", "value": "q"}], "system:s user:q"),
        ([{"role": "Human", "content": "q"}], "user:q"),
        ([{"role": "developer", "content": "s"}, USER], "system:s user:q"),
        ([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, USER], "user:q assistant:a user:q"),
        ([USER, {"role": "model", "content": "a"}, USER], "user:q assistant:a user:q"),
        ([USER, ANSWER], "user:q"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": CALL}], "user:q"),
        (json.dumps([USER]), "user:q"),
        ([{"role": "user", "content": TEXT_PARTS}], "user:q\nr"),
        ([{"role": "user", "content": ["q"]}], "user:q"),
        ([{**USER, "tool_calls": None, "reasoning_content": ""}], "user:q"),
        ([{"role": "system", "content": ""}, USER], "system: user:q"),
        ([USER, {**ANSWER, "tool_calls": CALL}, USER], r"message 1 has 'tool_calls'.*ignored_fields: \[tool_calls\]"),
        ([USER, {**ANSWER, "reasoning_content": "hm"}, USER], r"message 1 has 'reasoning_content'"),
        ([USER, {"role": "assistant", "content": ""}, USER], r"message 1 is empty \(role assistant\)"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"message 0, part 0 is 'image_url': only text"),
        ([{**USER, "images": ["a.png"]}], r"message 0 has 'images'"),
        ([{**USER, "value": "r"}], r"message 0 is not \{role: text"),
        (["q", "a"], r"message 0 is not \{role"),
        ("[{'role': 'user'}]", r"its text is not JSON: write it with json\.dumps"),
        ("What?", NO_FIELD),
        ({"role": "user"}, NO_FIELD),
        ([ANSWER], r"ends with the assistant"),
    ],
)
def test_conversations_are_understood_or_refused_by_name(tmp_path: Path, messages: Any, right: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"m": messages}]))
    source = {"kind": "jsonl", "path": tmp_path / "a.jsonl", "messages_field": "m", "drop_final_answer": True}
    if right.startswith(("user:", "system:")):
        (prompt,) = load(source).prompts
        assert " ".join(f"{one.role}:{one.content}" for one in prompt.messages) == right
        return
    with pytest.raises(DataError, match=rf"a\.jsonl:1: field 'm'.*{right}"):
        load(source)


@pytest.mark.parametrize(
    ("row", "fields", "right"),
    [
        ({"p": [USER]}, {}, "user:q"),
        ({"p": USER}, {}, "user:q"),
        ({"p": json.dumps([USER])}, {}, "user:q"),
        ({"p": "[1, 2] are which?"}, {}, "user:[1, 2] are which?"),
        ({"p": "q", "system": "s"}, {"system_field": "system"}, "system:s user:q"),
        ({"p": "q", "system": ""}, {"system_field": "system", "system": "t"}, "system:t user:q"),
        ({"p": "q", "tools": "[]", "context": None}, {}, "user:q"),
        ({"p": "q", "tools": [{"name": "f"}]}, {"ignored_fields": ["tools"]}, "user:q"),
        ({"p": "q", "tools": [{"name": "f"}]}, {}, r"'tools' is not part of the prompt: .*ignored_fields: \[tools\]"),
        ({"p": "q", "system": "s"}, {}, r"'system' is not part of the prompt: set system_field: system"),
        ({"p": "q", "choices": ["1", "2"]}, {}, r"'choices' is not part of the prompt: write it into the text"),
        ({"p": "w\nclass S:", "starter_code": "class S:\n"}, {}, "user:w\nclass S:"),
        ({"p": "w", "starter_code": "class S:"}, {}, r"'starter_code' is not part of the prompt"),
        ({"p": ["q", "r"]}, {}, r"'p' holds a list of 2, not a text: write one row per item"),
        ({"p": [USER, ANSWER]}, {}, r"'p' ends with the assistant.*messages_field: p with drop_final_answer"),
        ({"p": "q", "s": 5}, {"system_field": "s"}, r"'s' is not a text"),
        ({"p": [{"role": "system", "content": "a"}, USER], "s": "b"}, {"system_field": "s"}, "second system message"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_beside_the_prompt_are_used_or_named(
    tmp_path: Path, kind: str, row: dict[str, Any], fields: dict[str, Any], right: str
) -> None:
    path = tmp_path / "a"
    if kind == "jsonl":
        path.write_bytes(lines([row]))
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    source = {"kind": kind, "path": path, "prompt_field": "p", **fields}
    if right.startswith(("user:", "system:")):
        (prompt,) = load(source).prompts
        assert " ".join(f"{one.role}:{one.content}" for one in prompt.messages) == right
        return
    with pytest.raises(DataError, match=right):
        load(source)


ROWS = [{"q": "1+1?", "a": "2"}, {"q": "你好", "a": "x"}]
QUOTED_CSV = 'q,a\n1+1?,2\n"你好",x\n'.encode()
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4\nsize 12\n"


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", lines(ROWS), None),
        ("a.jsonl", b"\xef\xbb\xbf" + lines(ROWS), None),
        ("a.jsonl", lines(ROWS).replace(b"\n", b"\r\n\r\n"), None),
        ("a.jsonl.gz", gzip.compress(lines(ROWS[:1])) + gzip.compress(lines(ROWS[1:])), None),
        ("a.jsonl.zst", pa.compress(lines(ROWS), codec="zstd", asbytes=True), None),
        ("a.jsonl.bz2", bz2.compress(lines(ROWS)), None),
        ("a.jsonl", gzip.compress(lines(ROWS)), None),
        ("a.json", json.dumps(ROWS).encode(), None),
        ("a.json", json.dumps(ROWS, indent=2).encode(), None),
        ("a.csv", QUOTED_CSV, None),
        ("a.csv", b"\xef\xbb\xbf" + QUOTED_CSV.replace(b"\n", b"\r\n"), None),
        ("a.csv.gz", gzip.compress(QUOTED_CSV), None),
        ("a.tsv", QUOTED_CSV.replace(b",", b"\t"), None),
        ("a.jsonl", gzip.compress(lines(ROWS))[:-9], r"a\.jsonl cannot be read: Truncated"),
        ("a.jsonl", json.dumps(ROWS).encode("utf-16"), r"is UTF-16 text.*iconv -f UTF-16"),
        ("a.csv", QUOTED_CSV.decode().encode("utf-16-le"), r"is UTF-16 text"),
        ("a.csv", "q,a\nÄ?,1\n".encode("latin-1"), r"a\.csv is not UTF-8 text: convert"),
        ("a.jsonl", b"<!DOCTYPE html><html></html>", r"is a web page"),
        ("a.jsonl", LFS, r"is a Git LFS pointer.*git lfs pull"),
        ("a.jsonl", b"PK\x03\x04rest", r"is a zip archive"),
        ("a.jsonl", b"PAR1rest", r"is a Parquet file: set kind: parquet"),
        ("a.jsonl", QUOTED_CSV, r"is not JSON: set kind: csv"),
        ("a.csv", lines(ROWS), r"is JSON: set kind: jsonl"),
        ("a.parquet", lines(ROWS), r"a\.parquet is JSON: set kind: jsonl"),
        ("a.parquet", LFS, r"is a Git LFS pointer"),
        ("a.parquet", b"PAR1 and no more", r"is a damaged Parquet file"),
        ("a.json", b'[\n{"q": "1"},\n{"q": \n', r"is neither JSON Lines nor one JSON document"),
        (
            "a.json",
            b'{"version": 1,\n"data": [{"q": "1"}]}',
            r"rows in the field 'data': .* jq -c '.data\[\]' OLD > NEW",
        ),
        ("a.json", b'{"q": ["1", "2"], "a": ["3", "4"]}', r"holds columns, not rows: convert it: python -c"),
        ("a.json", b'{"q": {"0": "1", "1": "2"},\n"a": {"0": "3", "1": "4"}}', r"holds columns, not rows"),
        ("a.csv", b'q,a\n1,"2\n', r"a\.csv:\d is not CSV"),
        ("a.csv", b"q,a\n1,2,3\n", r"a\.csv:2: has 3 cells for 2 columns"),
        ("a.jsonl", b"[1]\n[2]\n", r"a\.jsonl:1: holds a list"),
        ("a.jsonl", '{"q": "caf\u00e9", "a": 1}'.encode("latin-1"), r"a\.jsonl:1: not UTF-8 text .*iconv"),
        ("a.jsonl", gzip.compress(bytes(257) + b"ustar" + bytes(250)), r"is a tar archive: unpack"),
        ("a.csv", b"q,a,q\n1,2,3\n", r"a\.csv has 2 columns 'q': rename"),
        ("a.csv", b"q;a\n1;2\n", r"a\.csv has one column, 'q;a': set delimiter: \";\""),
    ],
    # Workers must name tests alike, and gzip writes the time.
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_files_are_read_by_what_they_are(tmp_path: Path, name: str, content: bytes, problem: str | None) -> None:
    (tmp_path / name).write_bytes(content)
    kind = {"json": "jsonl", "jsonl": "jsonl", "csv": "csv", "tsv": "csv"}.get(name.split(".")[1], "parquet")
    source = {"kind": kind, "path": tmp_path / name, "prompt_field": "q", "reference_field": "a"}
    if problem is not None:
        with pytest.raises(DataError, match=problem):
            load(source)
        return
    found = {prompt.messages[0].content: prompt.reference for prompt in load(source).prompts}
    assert found == {row["q"]: row["a"] for row in ROWS}


def test_one_damaged_first_line_does_not_make_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"q": "cut",\n' + lines(ROWS))
    loaded = load({"kind": "jsonl", "path": tmp_path / "a.jsonl", "prompt_field": "q"})
    assert (len(loaded.prompts), len(loaded.failures)) == (2, 1)
    assert {prompt.metadata["line"] for prompt in loaded.prompts} == {2, 3}


def test_folders_hide_dot_files_and_keep_splits_apart(tmp_path: Path) -> None:
    for place in ("main/train-00000-of-00002", "main/train-00001-of-00002", "main/test-00000-of-00001"):
        path = tmp_path / f"{place}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(lines([{"q": place}]))
    for hidden in (".cache/train.jsonl", "main/._a.jsonl", "_tmp/a.jsonl", "main/info.json"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(b"not data")

    def questions(path: str, **more: Any) -> list[str]:
        loaded = load({"kind": "jsonl", "path": f"{tmp_path}{path}", "prompt_field": "q", **more})
        return sorted(prompt.messages[0].content.removeprefix("main/")[:11] for prompt in loaded.prompts)

    assert questions("", split="train") == ["train-00000", "train-00001"]
    assert questions("/main/t*-00000*.jsonl") == ["test-00000-", "train-00000"]
    assert questions("/**/*1.jsonl") == ["test-00000-"]
    with pytest.raises(DataError, match=r"holds the splits test and train: set split: train"):
        questions("")
    with pytest.raises(DataError, match=r"has no file of split 'tset': did you mean 'test'"):
        questions("", split="tset")
    with pytest.raises(DataError, match="split selects files of a folder"):
        questions("/main/*.jsonl", split="train")
    with pytest.raises(DataError, match="no file matches"):
        questions("/nothing*")
    (tmp_path / "_delta_log").mkdir()
    with pytest.raises(DataError, match="is a Delta table, whose folder also holds removed rows"):
        questions("", split="train")


def test_sources_that_mostly_fail_stop_at_their_first_row(tmp_path: Path) -> None:
    rows = [{"q": "good"}, *({"x": number} for number in range(3))]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    source = {"kind": "jsonl", "path": tmp_path / "a.jsonl", "prompt_field": "q"}
    with pytest.raises(
        DataError, match=r"s0 has 3 malformed rows among 4, first .*:2: field 'q' is missing.*unusable_"
    ):
        load(source)
    assert len(load(source, max_unusable_frac=0.75).failures) == 3
    (tmp_path / "a.jsonl").write_bytes(lines([{"x": 1}] * 500))
    with pytest.raises(DataError, match=r"the first 100 rows are malformed, first .*:1: field 'q'"):
        load(source)


def test_duplicates_give_their_reference(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"q": "1+1?"}, {"q": "2+2?"}]))
    (tmp_path / "c.jsonl").write_bytes(lines([{"q": "1+1?", "a": None}]))
    answered = [{"q": "1+1?", "a": "2"}, {"q": "1+1?", "a": "3"}, {"q": "1+1?", "a": "2"}]
    (tmp_path / "b.jsonl").write_bytes(lines(answered))
    fields = {"kind": "jsonl", "prompt_field": "q"}
    judged = {**fields, "path": tmp_path / "b.jsonl", "reference_field": "a", "judge": "math"}
    (other,) = load({**judged, "judge": "exact", "path": tmp_path / "c.jsonl"}, judged | {"limit": 1}).prompts
    assert (other.reference, other.metadata["judge"]) == ("2", "math"), "the judge of the row that gives the reference"
    loaded = load({**fields, "path": tmp_path / "a.jsonl"}, judged)
    found = {prompt.messages[0].content: prompt for prompt in loaded.prompts}
    assert (found["1+1?"].reference, found["1+1?"].source) == ("2", "s0")
    assert found["1+1?"].metadata == {"line": 1, "judge": "math"}
    assert (found["2+2?"].reference, found["2+2?"].metadata) == (None, {"line": 2})
    assert [one.contradicts for one in loaded.duplicates] == [False, True, False]
    assert str(loaded.duplicates[1]).endswith("a.jsonl:1, whose reference differs")


NO_SYSTEM = "{% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}] {{ m.content }}{% endif %}{% endfor %}"
KNOWN_ROLES = (
    "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}[{{ m.content | trim }}]{% endif %}{% endfor %}"
)
R1_LIKE = "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}{% endfor %}"
MERGING = "[INST]{{ messages[0].content }} {% for m in messages[1:] %}{{ m.content }}{% endfor %}[/INST]"


@pytest.mark.parametrize(
    ("template", "messages", "problem"),
    [
        (CHAT_TEMPLATE, [USER, ANSWER, USER], None),
        (CHAT_TEMPLATE, [{"role": "moderator", "content": "be nice"}, USER], "has the role 'moderator'"),
        (CHAT_TEMPLATE, [USER, {"role": "observation", "content": "5"}], "rejects the prompt: no tools here"),
        (
            NO_SYSTEM,
            [{"role": "system", "content": "Be\nbrief."}, USER],
            r"leaves out message 0 of the system: 'Be brief",
        ),
        (KNOWN_ROLES, [{"role": "user", "content": " 2+3=5? "}], None),
        (
            KNOWN_ROLES,
            [{"role": "user", "content": "2+3=5?"}, {"role": "tool", "content": "5"}],
            r"message 1 of the tool: '5'",
        ),
        (R1_LIKE, [USER, {"role": "assistant", "content": "<think>hm</think>5"}, USER], None),
        (MERGING, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}], None),
        (
            "{{ messages[0].content | replace(' ', '\n') }}",
            [{"role": "user", "content": "spaces are all lost here"}],
            None,
        ),
        (
            "{{ messages[0].content }}",
            [USER, ANSWER, {"role": "user", "content": "And why?"}],
            "message 1 of the assistant",
        ),
        ("{{ messages[0].content | tojson }}", [{"role": "user", "content": 'Say "hello" and go'}], None),
    ],
)
def test_what_a_template_leaves_out_is_named(
    tmp_path: Path, teacher: IdentifiedTeacher, template: str, messages: list[Any], problem: str | None
) -> None:
    teacher.tokenizer.chat_template = template
    (tmp_path / "a.jsonl").write_bytes(lines([{"m": messages}]))
    loaded = load({"kind": "jsonl", "path": tmp_path / "a.jsonl", "messages_field": "m"})
    (found,) = tokenize(teacher.tokenizer, loaded.prompts, {})
    if problem is None:
        assert isinstance(found, list)
    else:
        assert isinstance(found, str)
        assert re.search(problem, found), found


def test_a_template_that_drops_a_source_stops_the_build(tmp_path: Path, teacher: IdentifiedTeacher) -> None:
    teacher.tokenizer.chat_template = NO_SYSTEM
    rows = [{"q": f"{number}?", "s": "Be brief." if number % 4 else None} for number in range(40)]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    source = {"kind": "jsonl", "name": "a", "path": tmp_path / "a.jsonl", "prompt_field": "q", "system_field": "s"}
    config = build_config(tmp_path, source)
    prompts = load_prompts(config.prompts).prompts
    message = r"source a: 30 of the first 40 prompts cannot be used, first source a, line \d+: .*leaves out message 0"
    with pytest.raises(DataError, match=message):
        list(requests(config, prompts, teacher.tokenizer, "teacher"))
    accepting = build_config(tmp_path, source, prompts={"max_unusable_frac": 0.9})
    stream = list(requests(accepting, prompts, teacher.tokenizer, "teacher"))
    assert sum(isinstance(one, Failure) for one in stream) == 30


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("open_reasoning", None),
        ("open_reasonin", "has no effect: .*did you mean 'open_reasoning'"),
        ("add_generation_prompt", "is set by teacher-cache"),
    ],
)
def test_template_arguments_are_checked_against_the_template(name: str, problem: str | None) -> None:
    template = CHAT_TEMPLATE + "{% generation %}{% break %}{%- endgeneration %}" if problem is None else CHAT_TEMPLATE
    if problem is None:
        check_template_kwargs(template.replace("{% break %}", ""), [name])
        return
    with pytest.raises(ConfigError, match=rf"teacher\.chat_template_kwargs\.{name} {problem}"):
        check_template_kwargs(template, [name])


def build_config(folder: Path, *sources: dict[str, Any], **blocks: Any) -> BuildConfig:
    data = {
        "cache": folder / "cache",
        "run": "test",
        "teacher": {"model": "fake"},
        "capture": {"max_support": K, "draws": 0},
        **blocks,
        "prompts": {"sources": list(sources), **blocks.get("prompts", {})},
    }
    return validate_config(data, BuildConfig, "test")


class AnsweringEngine(FakeEngine):
    """Answers each request with the tokens of a given text."""

    def __init__(self, tokenizer: Any, answer: Callable[[Request], str]) -> None:
        super().__init__(400, K)
        self._tokenizer, self._answer = tokenizer, answer

    def submit(self, request: Request) -> None:
        ids = [*self._tokenizer(self._answer(request), add_special_tokens=False)["input_ids"], 1]
        super().submit(replace(request, completion_token_ids=ids))


def sums(subject: str) -> list[tuple[str, int]]:
    """Ten questions and their answers; `subject` makes them another source's."""
    return [(f"{subject}: what is {n} plus {n + 2}?", 2 * n + 2) for n in range(1, NUM_ROWS + 1)]


def turns(*pairs: tuple[str, str], keys: tuple[str, str] = ("role", "content")) -> list[dict[str, str]]:
    return [dict(zip(keys, pair, strict=True)) for pair in pairs]


def open_r1(folder: Path) -> dict[str, Any]:
    rows = [
        {
            "problem": question,
            "solution": f"Adding gives ${right}$.",
            "answer": str(right),
            "problem_type": "Algebra",
            "uuid": f"u{right}",
            "generations": [f"<think>hm</think>\\boxed{{{right}}}", "<think>hm"],
            "correctness_math_verify": [True, False],
            "messages": turns(("user", question), ("assistant", f"<think>hm</think>{right}")),
        }
        for question, right in sums("OpenR1")
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
    fields = {"messages_field": "messages", "drop_final_answer": True, "reference_field": "answer", "judge": "math"}
    return {"kind": "parquet", "path": folder, **fields}


def share_gpt(folder: Path) -> dict[str, Any]:
    rows = []
    for number, (question, right) in enumerate(sums("ShareGPT")):
        conversation = turns(("human", "hi"), ("gpt", "hello"), ("human", question), keys=("from", "value"))
        # One row of the ten calls a tool, in LLaMA-Factory's way.
        last = ("function_call", "{}") if number == 3 else ("gpt", str(right))
        rows.append({"id": f"x_{number}", "conversations": [*conversation, {"from": last[0], "value": last[1]}]})
    (folder / "sg_90k_part1.json").write_text(json.dumps(rows))
    path = folder / "sg_90k_part1.json"
    return {"kind": "jsonl", "path": path, "messages_field": "conversations", "drop_final_answer": True}


def verl(folder: Path) -> dict[str, Any]:
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": turns(("user", question)),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(right)},
            "extra_info": {"index": right, "split": "train"},
        }
        for question, right in sums("verl")
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    pq.write_table(pa.Table.from_pylist(rows), folder / "test.parquet")
    fields = {"prompt_field": "prompt", "reference_field": "reward_model.ground_truth", "judge": "math"}
    return {"kind": "parquet", "path": folder, "split": "train", "metadata_fields": ["data_source"], **fields}


def kod_code(folder: Path) -> dict[str, Any]:
    rows = [
        {
            "style": "instruct",
            "question_id": f"Prefill_{number}",
            "question": f"KodCode: write plus{number}(a, b), which adds {number} to the sum.",
            "solution": f"def plus{number}(a, b):\n    return a + b + {number}",
            "test": f"from solution import plus{number} as f\n\ndef test_sum():\n    assert f(1, 2) == {number} + 3\n",
            "test_info": [{"function_name": f"plus{number}", "parameter_list": "(a, b)"}],
        }
        for number in range(NUM_ROWS)
    ]
    (folder / "k.jsonl.gz").write_bytes(gzip.compress(lines(rows)))
    fields = {"prompt_field": "question", "reference_field": "test", "judge": "code"}
    return {"kind": "jsonl", "path": folder / "*.jsonl.gz", "metadata_fields": ["solution"], **fields}


def gsm8k(folder: Path) -> dict[str, Any]:
    rows = [
        {"question": question, "answer": f"The sum is <<{right}={right}>>{right}.\n#### {right}"}
        for question, right in sums("GSM8K")
    ]
    for split, table in (("train", rows), ("test", rows[:2])):
        (folder / "main").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(table), folder / "main" / f"{split}-00000-of-00001.parquet")
    fields = {"prompt_field": "question", "reference_field": "answer", "judge": "math"}
    return {"kind": "parquet", "path": folder, "split": "train", **fields}


def math_competition(folder: Path) -> dict[str, Any]:
    for number, (question, right) in enumerate(sums("MATH")):
        row = {"problem": question, "level": "Level 1", "type": "Algebra", "solution": f"So $x=\\boxed{{{right}}}$."}
        for split in ("train", "test"):
            path = folder / split / "algebra" / f"{number}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(row, indent=4 if number % 2 else None))
    fields = {"prompt_field": "problem", "reference_field": "solution", "judge": "math"}
    return {"kind": "jsonl", "path": folder, "split": "train", "metadata_fields": ["level"], **fields}


def open_thoughts(folder: Path) -> dict[str, Any]:
    rows = [
        {
            "system": "Your role as an assistant involves thinking first.",
            "conversations": turns(
                ("user", question),
                ("assistant", f"<|begin_of_thought|>hm {right}"),
                keys=("from", "value"),
            ),
        }
        for question, right in sums("OpenThoughts")
    ]
    (folder / "o.jsonl.zst").write_bytes(pa.compress(lines(rows), codec="zstd", asbytes=True))
    fields = {"messages_field": "conversations", "system_field": "system", "drop_final_answer": True}
    return {"kind": "jsonl", "path": folder / "o.jsonl.zst", **fields}


def csv_of_conversations(folder: Path) -> dict[str, Any]:
    with (folder / "a.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["messages", "gold"])
        writer.writerows([json.dumps(turns(("user", question))), right] for question, right in sums("CSV"))
    return {
        "kind": "csv",
        "path": folder / "a.csv",
        "messages_field": "messages",
        "reference_field": "gold",
        "judge": "math",
    }


SHAPES = [open_r1, share_gpt, verl, kod_code, gsm8k, math_competition, open_thoughts, csv_of_conversations]


def answer(request: Request) -> str:
    """Right for every other row of a source."""
    prompt = request.prompt
    is_right = prompt.metadata.get("line", prompt.metadata.get("row")) % 2 == 0
    if prompt.metadata.get("judge") == "code":
        body = prompt.metadata["solution"] if is_right else "def nothing():\n    pass"
        return f"```python\n{body}\n```"
    right = re.search(r"(\d+)\D*$", prompt.reference or "0")
    assert right is not None
    return f"\\boxed{{{int(right[1]) + (not is_right)}}}"


def test_public_data_sets_go_from_raw_files_to_verdicts(tmp_path: Path, teacher: IdentifiedTeacher) -> None:
    sources = []
    for shape in SHAPES:
        (tmp_path / shape.__name__).mkdir()
        sources.append({"name": shape.__name__, **shape(tmp_path / shape.__name__)})
    config = build_config(tmp_path, *sources)
    loaded = load_prompts(config.prompts)
    stream = [*loaded.failures, *requests(config, loaded.prompts, teacher.tokenizer, "f" * 32)]
    assert not loaded.duplicates
    refused = [one for one in stream if isinstance(one, Failure)]
    (call,) = refused
    assert re.search(r"share_gpt, row 3: message 3 has the role 'function_call', which the chat template", call.message)
    build = Build(config, teacher, "w0")
    try:
        result = build.run(stream, len(stream), lambda: AnsweringEngine(teacher.tokenizer, answer))
    finally:
        build.close()
    assert (result.recorded.num_chains, result.recorded.num_failures) == (NUM_ROWS * len(SHAPES) - 1, 1)
    with open_session(Catalog(tmp_path / "cache")) as session:
        columns = "c.source, s.prompt_token_ids, c.metadata, c.reference, c.correct"
        rows = session.arrow(f"SELECT {columns} FROM chains c JOIN shards s USING (sample_id)").to_pylist()
    asked = {row["source"]: set[str]() for row in rows}
    for row in rows:
        rendered = teacher.tokenizer.decode(row["prompt_token_ids"])
        asked[row["source"]].add(rendered)
        metadata = json.loads(row["metadata"])
        is_right = None if row["reference"] is None else metadata.get("line", metadata.get("row")) % 2 == 0
        assert row["correct"] == is_right, row
        # What a person would expect to read, and nothing of the answer.
        assert rendered.count("<|im_start|>user\n") == (2 if row["source"] == "share_gpt" else 1)
        assert ("<|im_start|>system\nYour role" in rendered) == (row["source"] == "open_thoughts")
        assert re.search(r"what is \d+ plus \d+\?<\|im_end\|>|adds \d+ to the sum\.<\|im_end\|>", rendered)
        assert rendered.endswith("<|im_start|>assistant\n")
        assert "hm" not in rendered
    assert {name: len(texts) for name, texts in asked.items()} == {
        shape.__name__: NUM_ROWS - (shape is share_gpt) for shape in SHAPES
    }
