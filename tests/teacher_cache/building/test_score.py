"""Completions that exist already: from every source to tokens, and through the build's own machinery to rows."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.cache.catalog import Catalog
from stillroom.config import validate_config
from stillroom.errors import ConfigError, CorruptError, DataError
from stillroom.schema.records import chain_id_of, scored_sample_id_of
from stillroom.sql.session import open_session
from teacher_cache.building.build import Build
from teacher_cache.building.result import BuildResult
from teacher_cache.config import ScoreConfig
from teacher_cache.engine.api import Engine, Failure, Request
from teacher_cache.engine.teacher import IdentifiedTeacher
from teacher_cache.prompts.completions import Completions
from teacher_cache.prompts.prompts import WorkerShare, part_name
from teacher_cache.scrub.config import Kind, ScrubConfig
from teacher_cache.scrub.recognisers import Finding, Recognisers
from teacher_cache.scrub.rows import Scrubber
from tests.helpers.fake_builds import EOS_ID, K, make_config, make_engine, make_requests, make_teacher, run_build
from tests.helpers.tiny_tokenizer import CHAT_TEMPLATE

ROWS = [
    {"messages": [{"role": "user", "content": "what is 2+3?"}, {"role": "assistant", "content": "The answer is 5."}]},
    {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "<think>\nhm</think>hello world"},
        ]
    },
]


@pytest.fixture
def teacher() -> IdentifiedTeacher:
    made = make_teacher()
    made.tokenizer.chat_template = CHAT_TEMPLATE
    return made


def make_score(cache: Path, *sources: dict[str, Any], **blocks: Any) -> ScoreConfig:
    named = [{"name": f"s{number}", **source} for number, source in enumerate(sources)]
    return validate_config(
        {
            "cache": cache,
            "run": "scored",
            "teacher": {"model": "fake"},
            "completions": {"sources": named, **blocks.pop("completions", {})},
            "capture": {"max_support": K, "draws": 0},
            "shard": {"row_group_tokens": 500, "max_mb": 0.05},
            **blocks,
        },
        ScoreConfig,
        "test",
    )


def run_score(
    config: ScoreConfig,
    teacher: IdentifiedTeacher,
    start_engine: Callable[[], Engine] = make_engine,
    share: WorkerShare = WorkerShare(0, 1),  # noqa: B008
) -> BuildResult:
    with Completions(config, teacher) as completions:
        build = Build(config, teacher, f"w{share.index}")
        try:
            return build.run(completions.requests(share), completions.count(share), start_engine)
        finally:
            build.close()


def requests_of(config: ScoreConfig, teacher: IdentifiedTeacher) -> list[Request | Failure]:
    with Completions(config, teacher) as completions:
        return list(completions.requests())


def scored(config: ScoreConfig, teacher: IdentifiedTeacher) -> list[Request]:
    found = requests_of(config, teacher)
    assert all(isinstance(one, Request) for one in found), found
    return [one for one in found if isinstance(one, Request)]


def rows_of(cache: Path) -> list[dict[str, Any]]:
    with open_session(Catalog(cache)) as session:
        return list(session.arrow("SELECT * FROM shards ORDER BY sample_id").to_pylist())


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text(teacher: IdentifiedTeacher, ids: Any) -> str:
    return str(teacher.tokenizer.decode(ids))


def test_a_conversation_is_split_before_the_answer(tmp_path: Path, teacher: IdentifiedTeacher) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    config = make_score(tmp_path / "c", {"kind": "jsonl", "path": path, "messages_field": "messages"})
    first, second = scored(config, teacher)
    assert text(teacher, first.prompt_token_ids).endswith("<|im_start|>assistant\n")
    assert text(teacher, first.completion_token_ids) == "The answer is 5.<|im_end|>"
    assert [message.role for message in second.prompt.messages] == ["system", "user"]
    assert text(teacher, second.completion_token_ids) == "<think>\nhm</think>hello world<|im_end|>"
    assert (first.seed, first.sampling) == (None, {})
    ids = list(first.completion_token_ids or [])
    assert first.sample_id == scored_sample_id_of("f" * 32, first.prompt_token_ids, ids)


def test_texts_and_datasets_give_the_same_requests(tmp_path: Path, teacher: IdentifiedTeacher) -> None:
    import datasets

    rows: list[dict[str, Any]] = [{"q": "hello", "a": "world"}, {"q": "2+3?", "a": "5"}]
    table = pa.Table.from_pylist([{**row, "right": "5"} for row in rows])
    pq.write_table(table, tmp_path / "b.parquet")
    datasets.Dataset(table).save_to_disk(tmp_path / "d")
    fields: dict[str, Any] = {"prompt_field": "q", "completion_field": "a"}
    fields |= {"reference_field": "right", "judge": "exact"}
    sources: list[dict[str, Any]] = [
        {"kind": "parquet", "path": tmp_path / "b.parquet", **fields},
        {"kind": "huggingface", "dataset": str(tmp_path / "d"), **fields},
    ]
    found = [scored(make_score(tmp_path / "c", source), teacher) for source in sources]
    assert [one.sample_id for one in found[0]] == [one.sample_id for one in found[1]]
    assert found[0][0].prompt.reference == "5"
    assert found[0][0].prompt.metadata == {"row": 0, "judge": "exact"}
    assert Completions(make_score(tmp_path / "c", *sources), teacher).count() == 4


def test_token_ids_are_taken_as_they_are(tmp_path: Path, teacher: IdentifiedTeacher) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"p": [5, 6], "c": [7, 8]}])
    config = make_score(
        tmp_path / "c", {"kind": "jsonl", "path": path, "prompt_ids_field": "p", "completion_ids_field": "c"}
    )
    (request,) = scored(config, teacher)
    assert (request.prompt_token_ids, request.completion_token_ids) == ([5, 6], [7, 8])
    assert request.prompt.messages[0].content == text(teacher, [5, 6])


@pytest.mark.parametrize(
    ("append_eos", "completion", "ends"),
    [
        (True, "5", "5<|im_end|>"),
        (True, "5<|im_end|>", "5<|im_end|>"),
        (True, "5<|im_end|>\n", "5<|im_end|>"),
        (True, "5<|endoftext|>", "5<|endoftext|>"),
        (True, "5\n", "5\n<|im_end|>"),
        (False, "5", "5"),
        (False, "5<|im_end|>\n", "5<|im_end|>\n"),
    ],
)
def test_the_end_of_sequence_token_is_appended_once_or_never(
    tmp_path: Path, teacher: IdentifiedTeacher, append_eos: bool, completion: str, ends: str
) -> None:
    teacher.tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "2+3?", "a": completion}])
    fields = {"prompt_field": "q", "completion_field": "a", "append_eos": append_eos}
    (request,) = scored(make_score(tmp_path / "c", {"kind": "jsonl", "path": path, **fields}), teacher)
    assert text(teacher, request.completion_token_ids) == ends


def test_a_turn_ends_as_the_template_ends_it(tmp_path: Path, teacher: IdentifiedTeacher) -> None:
    teacher.tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    # As in Gemma's template, where the end of sequence is a third token.
    teacher.tokenizer.chat_template = teacher.tokenizer.chat_template.replace("<|im_end|>", "<|endoftext|>")
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "2+3?", "a": "5"}])
    source = {"kind": "jsonl", "path": path, "prompt_field": "q", "completion_field": "a"}
    (request,) = scored(make_score(tmp_path / "c", source), teacher)
    assert text(teacher, request.completion_token_ids) == "5<|endoftext|>"


def test_generations_are_chains_with_their_own_metadata(tmp_path: Path, teacher: IdentifiedTeacher) -> None:
    rows: list[Any] = [
        {"q": "2+3?", "a": ["5", "6"], "right": [True, False], "answer": "5", "level": [1, 2, 3]},
        {"q": "3+3?", "a": ["6"], "right": [True], "answer": "6", "level": None},
        {"q": "4+3?", "a": ["7", None], "right": [True, None], "answer": "7"},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    fields = {"prompt_field": "q", "completion_field": "a", "metadata_fields": ["right", "level"]}
    fields |= {"reference_field": "answer", "judge": "exact"}
    config = make_score(tmp_path / "c", {"kind": "jsonl", "path": path, **fields})
    with Completions(config, teacher) as completions:
        assert completions.count() == 4
        *found, failure = completions.requests()
    assert isinstance(failure, Failure)
    assert failure.message.endswith("field 'a[1]' is null")
    got = [
        (text(teacher, one.completion_token_ids), one.sample_index, one.prompt.reference, one.prompt.metadata["right"])
        for one in found
        if isinstance(one, Request)
    ]
    assert got == [("5<|im_end|>", 0, "5", True), ("6<|im_end|>", 1, "5", False), ("6<|im_end|>", 0, "6", True)]
    assert found[0].prompt.metadata["level"] == [1, 2, 3]  # type: ignore[union-attr]


@pytest.mark.parametrize("opens", [True, False])
def test_a_marker_that_the_template_wrote_is_not_written_again(
    tmp_path: Path, teacher: IdentifiedTeacher, opens: bool
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "2+3?", "a": "<think>\nhm</think>5"}])
    config = make_score(
        tmp_path / "c",
        {"kind": "jsonl", "path": path, "prompt_field": "q", "completion_field": "a"},
        teacher={"model": "fake", "chat_template_kwargs": {"open_reasoning": opens}},
    )
    (request,) = scored(config, teacher)
    whole = text(teacher, [*request.prompt_token_ids, *(request.completion_token_ids or [])])
    assert whole.endswith("assistant\n<think>\nhm</think>5<|im_end|>")
    run_score(config, teacher)
    (row,) = rows_of(tmp_path / "c")
    assert (row["reasoning"], row["answer"], row["finish_reason"], row["seed"]) == ("hm", "5", "scored", None)


@pytest.mark.parametrize("append_eos", [True, False])
@pytest.mark.parametrize("opens", [True, False])
def test_an_answer_alone_behind_opened_reasoning_is_refused(
    tmp_path: Path, teacher: IdentifiedTeacher, opens: bool, append_eos: bool
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "2+3?", "a": "5"}, {"q": "2+3?", "a": "</think>5"}])
    fields = {"prompt_field": "q", "completion_field": "a", "append_eos": append_eos}
    kwargs = {"model": "fake", "chat_template_kwargs": {"open_reasoning": opens}}
    source = {"kind": "jsonl", "path": path, **fields}
    first, second = requests_of(make_score(tmp_path / "c", source, teacher=kwargs), teacher)
    assert isinstance(second, Request)
    assert isinstance(first, Failure) == (opens and append_eos)
    if isinstance(first, Failure):
        assert re.search(r"a\.jsonl:1: .* opens <think> .* has no </think>", first.message)


@pytest.mark.parametrize("ids", [False, True])
def test_an_assistant_turn_beside_a_completion_is_refused(
    tmp_path: Path, teacher: IdentifiedTeacher, ids: bool
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{**ROWS[0], "a": "5", "p": [5], "c": [7]}])
    fields = {"prompt_ids_field": "p", "completion_ids_field": "c"} if ids else {"completion_field": "a"}
    config = make_score(tmp_path / "c", {"kind": "jsonl", "path": path, "messages_field": "messages", **fields})
    (refused,) = requests_of(config, teacher)
    assert isinstance(refused, Failure)
    assert "'messages' ends with the assistant's turn, and" in refused.message


def test_every_turn_of_a_conversation_is_learned_once(tmp_path: Path, teacher: IdentifiedTeacher) -> None:
    spoken = ["hello", "hello world", "what is 2+3?", "<think>\nhm</think>5", "today", "The answer"]
    roles = ["user", "assistant"] * 3
    turns = [{"role": role, "content": content} for role, content in zip(roles, spoken, strict=True)]
    rows = [
        {"m": turns, "right": "The answer"},
        {"m": turns[:2] + turns[1:], "right": ""},
        {"m": turns[:3], "right": ""},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    source = {"kind": "jsonl", "path": path, "messages_field": "m", "turns": "all"}
    source |= {"reference_field": "right", "judge": "exact"}
    config = make_score(tmp_path / "c", source, completions={"heldout_frac": 0.5})
    assert run_score(config, teacher).num_total == 5
    found = rows_of(tmp_path / "c")
    first = sorted((row for row in found), key=lambda row: row["num_prompt_tokens"])
    assert len(found) == 3, "the first turn of the last row is that of the first"
    assert [text(teacher, row["token_ids"]) for row in first] == [f"{one}<|im_end|>" for one in spoken[1::2]]
    assert [[one["content"] for one in row["messages"]] for row in first] == [spoken[:1], spoken[:3], spoken[:5]]
    for row in first:
        assert len(row["sampled_logprob"]) == len(row["token_ids"]), "the prompt has no signal and no loss"
    assert len({row["split"] for row in first}) == 1
    assert [row["reference"] for row in first] == [None, None, "The answer"]
    said = [json.loads(row["metadata"]) for row in first]
    assert [(one["turn"], one.get("judge")) for one in said] == [(0, None), (1, None), (2, "exact")]
    with open_session(Catalog(tmp_path / "c")) as session:
        (failure,) = session.arrow("SELECT message FROM failures").to_pylist()
    assert failure["message"].endswith("messages 1 and 2 are both the assistant's: join them")


def test_bad_rows_fail_alone(tmp_path: Path, teacher: IdentifiedTeacher) -> None:
    question = {"role": "user", "content": "q"}
    answer = {"role": "assistant", "content": "a"}
    bad = [
        {"messages": [question]},
        {"messages": [answer]},
        {"messages": []},
        {"other": 1},
        [1],
        {"messages": [question, {"role": "assistant", "content": " "}]},
        {"messages": [question, {"role": "assistant", "content": "\ud83d"}]},
        {"messages": [{"role": "tool", "content": "q"}, answer]},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", [*bad, ROWS[0]])
    config = make_score(tmp_path / "c", {"kind": "jsonl", "path": path, "messages_field": "messages"})
    found = requests_of(config, teacher)
    assert [one.reason for one in found if isinstance(one, Failure)] == ["malformed"] * 7 + ["chat_template"]
    result = run_score(config, teacher)
    assert (result.recorded.num_chains, result.recorded.num_failures, result.num_total) == (1, 8, 9)
    assert run_score(config, teacher, lambda: pytest.fail("nothing is left")).num_done_before == 9


def test_scoring_resumes_and_shares_like_a_build(tmp_path: Path, teacher: IdentifiedTeacher) -> None:
    rows = [{"p": [5, 6 + number], "c": [7, 8, 9]} for number in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, rows[0]])
    source = {"kind": "jsonl", "path": path, "prompt_ids_field": "p", "completion_ids_field": "c"}
    config = make_score(tmp_path / "c", source)
    assert run_score(config, teacher, share=WorkerShare(1, 3)).recorded.num_chains == 14
    assert run_score(config, teacher).recorded.num_chains == 26
    found = rows_of(tmp_path / "c")
    assert len(found) == 40
    for row in found:
        assert row["chain_id"] == chain_id_of(row["prompt_token_ids"], row["token_ids"])
    (manifest,) = Catalog(tmp_path / "c").runs().values()
    assert (manifest.kind, manifest.sampling) == ("score", {})


def test_chains_of_another_cache_are_joined_by_their_tokens(tmp_path: Path, teacher: IdentifiedTeacher) -> None:
    run_build(make_config(tmp_path / "first"), make_requests(30))
    source = {"kind": "cache", "path": tmp_path / "first", "where": "num_tokens > 20"}
    config = make_score(tmp_path / "second", source)
    for index in range(2):
        run_score(config, teacher, share=WorkerShare(index, 2))
    first = {row["chain_id"]: row for row in rows_of(tmp_path / "first") if row["num_tokens"] > 20}
    second = {row["chain_id"]: row for row in rows_of(tmp_path / "second")}
    assert first.keys() == second.keys()
    for chain_id, row in second.items():
        origin = first[chain_id]
        for name in ("prompt_id", "token_ids", "messages", "reference", "split", "sample_index", "text", "answer"):
            assert row[name] == origin[name]
        assert row["source"] == "s0"
        assert json.loads(row["metadata"])["scored_from"]["sample_id"] == origin["sample_id"]
        assert json.loads(row["metadata"])["number"] == json.loads(origin["metadata"])["number"]


def test_another_tokenizer_needs_the_text(tmp_path: Path, teacher: IdentifiedTeacher) -> None:
    run_build(make_config(tmp_path / "first"), make_requests(5))
    tokenizer = make_teacher().tokenizer
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.add_tokens(["<extra>"])
    record = teacher.record.model_copy(update={"tokenizer_fingerprint": "e" * 32})
    other = IdentifiedTeacher(record, tokenizer)
    source = {"kind": "cache", "path": tmp_path / "first"}
    with pytest.raises(ConfigError, match=r"1 tokens of .* mean something else .*'<extra>' here.*retokenise: true"):
        Completions(make_score(tmp_path / "c", source), other)
    config = make_score(tmp_path / "c", {**source, "retokenise": True})
    requests = scored(config, other)
    assert len(requests) == 5
    for request in requests:
        assert text(other, request.prompt_token_ids).endswith("<|im_start|>assistant\n")
        is_cut = list(request.completion_token_ids or [])[-1] != EOS_ID
        (origin,) = [row for row in rows_of(tmp_path / "first") if row["prompt_id"] == request.prompt.prompt_id]
        assert is_cut == (origin["finish_reason"] == "length")


def test_scored_chains_are_scored_again_as_they_ended(tmp_path: Path, teacher: IdentifiedTeacher) -> None:
    """Text that was given as cut has no end-of-sequence token, and gets none when another teacher looks at it."""
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    for name, ends in (("whole", True), ("cut", False)):
        source = {"kind": "jsonl", "path": path, "messages_field": "messages", "append_eos": ends}
        run_score(make_score(tmp_path / name, source), teacher)
        config = make_score(tmp_path / "c", {"kind": "cache", "path": tmp_path / name, "retokenise": True})
        for request in scored(config, teacher):
            assert ((request.completion_token_ids or [])[-1] == EOS_ID) == ends


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "set messages_field"),
        ({"prompt_field": "q"}, "set messages_field"),
        ({"completion_ids_field": "c"}, "set both"),
        ({"messages_field": "m", "completion_field": "c", "turns": "all"}, "turns: all needs messages_field alone"),
        ({"messages_field": "m", "prompt_field": "q"}, "both give the prompt"),
        ({"prompt_ids_field": "p", "completion_ids_field": "c", "append_eos": True}, "no effect on token ids"),
        ({"messages_field": "m", "judge": "exact"}, "no effect without reference_field"),
        ({"messages_field": "m", "samples": 2}, "unknown key 'samples'"),
    ],
)
def test_mistakes_in_the_configuration_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_score(Path("c"), {"kind": "jsonl", "path": "x", **fields})


def test_contaminated_prompts_are_left_out(tmp_path: Path, teacher: IdentifiedTeacher) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    against = write_jsonl(tmp_path / "test.jsonl", [{"q": "What is 2+3 ?"}])
    evaluation = {"kind": "jsonl", "name": "test", "path": against, "prompt_field": "q"}
    config = make_score(
        tmp_path / "c",
        {"kind": "jsonl", "path": path, "messages_field": "messages"},
        completions={"decontaminate": {"against": [evaluation]}},
    )
    completions = Completions(config, teacher)
    assert len(list(completions.requests())) == 1
    assert len(completions.contaminated) == 1
    # What is replaced in a prompt does not hide it: evaluation sets have their names.
    scrubbing = Completions(config, teacher, Scrubber(ScrubConfig(), Naming(r"2\+3|hello")))
    (request,) = scrubbing.requests()
    assert isinstance(request, Request)
    assert request.prompt.messages[-1].content == "<PERSON_1>"
    assert len(scrubbing.contaminated) == 1


def test_ids_of_scored_chains_are_not_personal_data(tmp_path: Path, teacher: IdentifiedTeacher) -> None:
    run_build(make_config(tmp_path / "first"), make_requests(3))
    config = make_score(tmp_path / "c", {"kind": "cache", "path": tmp_path / "first"})
    scrubber = Scrubber(ScrubConfig(), Naming(r"\b[0-9a-f]{16,}\b"))
    with Completions(config, teacher, scrubber) as completions:
        rows = [*completions.requests()]
    assert [isinstance(one, Request) and len(one.prompt.metadata["scored_from"]) for one in rows] == [3] * 3


def test_what_is_refused_or_replaced_is_not_named_by_an_id_of_the_original(
    tmp_path: Path, teacher: IdentifiedTeacher
) -> None:
    """Ids are hashes of prompt and completion: whoever guesses a phone number can check it."""
    run_build(make_config(tmp_path / "first"), make_requests(3))
    chains = rows_of(tmp_path / "first")
    ids, texts = [row["sample_id"] for row in chains], "|".join(re.escape(row["text"]) for row in chains)
    for retokenise, pattern in ((False, "."), (True, f"^(?:{texts})$")):
        source = {"kind": "cache", "path": tmp_path / "first", "retokenise": retokenise}
        with Completions(
            make_score(tmp_path / "c", source), teacher, Scrubber(ScrubConfig(), Naming(pattern))
        ) as found:
            rows = [*found.requests()]
            assert len(rows) == 3
            assert not [one for one in ids if one in repr(rows)]
            assert [name for name, _ in found.parts(64)] == [
                part_name(0, ["s0", *(f"{place} row {number}" for number in range(3))])
                for place in ["/".join(Catalog(tmp_path / "first").chains.files()[0].path.split("/")[-2:])]
            ]


def test_errors_of_reading_are_without_personal_data(tmp_path: Path, teacher: IdentifiedTeacher) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"Kimberly is not a Parquet file")
    source = {"kind": "parquet", "path": path, "prompt_field": "q", "completion_field": "c"}
    with Completions(make_score(tmp_path / "c", source), teacher, Scrubber(ScrubConfig(), Naming("a.parquet"))) as rows:
        for read in (rows.count, lambda: [*rows.requests()], lambda: [*rows.parts(8)]):
            with pytest.raises(DataError, match="<PERSON_1>"):
                read()


class Naming(Recognisers):
    """Takes what a pattern finds for names."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern

    def find(self, texts: Sequence[str], kinds: Sequence[Kind]) -> list[list[Finding]]:
        return [[Finding(*one.span(), "person") for one in re.finditer(self._pattern, text)] for text in texts]


@pytest.mark.parametrize("ids", [[-1], [2**31], [2**70], [True], [1.0], [], "12"])
@pytest.mark.parametrize("field", ["p", "c"])
def test_a_field_without_token_ids_is_a_malformed_row(
    tmp_path: Path, teacher: IdentifiedTeacher, field: str, ids: object
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"p": [3], "c": [4]}, {"p": [3], "c": [4], field: ids}])
    source = {"kind": "jsonl", "path": path, "prompt_ids_field": "p", "completion_ids_field": "c"}
    _, refused = requests_of(make_score(tmp_path / "c", source), teacher)
    assert isinstance(refused, Failure)
    assert f"field '{field}' is not a list of token ids" in refused.message


def test_workers_agree_on_the_chains_that_a_limit_picks(tmp_path: Path, teacher: IdentifiedTeacher) -> None:
    for number in (30, 60):
        run_build(make_config(tmp_path / "first"), make_requests(number))
    config = make_score(tmp_path / "c", {"kind": "cache", "path": tmp_path / "first", "limit": 20})
    ids = sorted(row["sample_id"] for row in rows_of(tmp_path / "first"))[:20]
    found = []
    for index in range(3):
        with Completions(config, teacher) as completions:
            found += list(completions.requests(WorkerShare(index, 3)))
    assert sorted(one.prompt.metadata["scored_from"]["sample_id"] for one in found if isinstance(one, Request)) == ids


def test_a_cache_that_lost_a_manifest_is_refused_as_a_source(tmp_path: Path, teacher: IdentifiedTeacher) -> None:
    run_build(make_config(tmp_path / "first"), make_requests(3))
    (manifest,) = (tmp_path / "first" / "runs").glob("*.json")
    manifest.unlink()
    config = make_score(tmp_path / "c", {"kind": "cache", "path": tmp_path / "first"})
    with pytest.raises(CorruptError, match=r"source s0: .*\.json is missing"):
        Completions(config, teacher)


def test_another_cache_may_lie_in_a_store() -> None:
    config = make_score(Path("c"), {"kind": "cache", "path": "s3://bucket/caches/r1"})
    (source,) = config.completions.sources
    assert str(source.path) == "s3://bucket/caches/r1"  # type: ignore[union-attr]


def test_a_field_that_is_null_is_not_called_missing(tmp_path: Path, teacher: IdentifiedTeacher) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": None}])
    config = make_score(tmp_path / "c", {"kind": "jsonl", "path": path, "messages_field": "messages"})
    (refused,) = requests_of(config, teacher)
    assert isinstance(refused, Failure)
    assert refused.message.endswith("field 'messages' is null")


def test_a_field_that_no_row_has_is_refused(tmp_path: Path, teacher: IdentifiedTeacher) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", [{"p": "2+3?", "c": "5", "right": "5"}])
    fields = {"prompt_field": "p", "completion_field": "c", "reference_field": "rigth"}
    config = make_score(tmp_path / "cache", {"kind": "jsonl", "name": "own", "path": str(path), **fields})
    with pytest.raises(
        DataError, match=r"source own: no row of .*c\.jsonl has a field 'rigth': did you mean 'right'\?"
    ):
        requests_of(config, teacher)
