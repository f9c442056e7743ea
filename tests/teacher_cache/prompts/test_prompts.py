"""Prompts: every source, one bad row is one bad row, and nothing that is added later moves what is there."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.config import validate_config
from stillroom.errors import ConfigError, DataError
from stillroom.models import load_tokenizer
from stillroom.schema.records import Message, Prompt, sample_id_of
from teacher_cache.config import BuildConfig
from teacher_cache.engine.api import Failure, Request
from teacher_cache.prompts.config import PromptsConfig
from teacher_cache.prompts.prompts import (
    LoadedPrompts,
    load_prompts,
    num_requests,
    parse_worker,
    requests,
    seed_of,
)
from teacher_cache.prompts.rendering import tokenize
from tests.helpers.tiny_tokenizer import byte_level, save


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(str(save(byte_level(), tmp_path_factory.mktemp("tokenizer"))))


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def questions(path: Path, count: int, start: int = 0) -> Path:
    rows = [{"question": f"What is {n}+{n}?", "answer": 2 * n} for n in range(start, start + count)]
    return write_jsonl(path, rows)


def jsonl(path: Path, name: str = "sums", **more: Any) -> dict[str, Any]:
    fields = {} if "messages_field" in more else {"prompt_field": "question"}
    return {"kind": "jsonl", "name": name, "path": str(path), **fields, **more}


def load(*sources: dict[str, Any], **more: Any) -> LoadedPrompts:
    return load_prompts(validate_config({"sources": list(sources), **more}, PromptsConfig, "test"))


def build_config(*sources: dict[str, Any], **sampling: Any) -> BuildConfig:
    data = {
        "cache": "cache",
        "run": "test",
        "teacher": {"model": "folder"},
        "prompts": {"sources": list(sources)},
        "sampling": sampling,
    }
    return validate_config(data, BuildConfig, "test")


def ask(config: BuildConfig, tokenizer: Any, worker: str = "0/1") -> tuple[list[Request], list[Failure]]:
    prompts = load_prompts(config.prompts).prompts
    stream = list(requests(config, prompts, tokenizer, "teacher", parse_worker(worker)))
    return [x for x in stream if isinstance(x, Request)], [x for x in stream if isinstance(x, Failure)]


def test_jsonl_rows_become_prompts_with_reference_and_metadata(tmp_path: Path) -> None:
    path = questions(tmp_path / "q.jsonl", 3)
    loaded = load(jsonl(path, reference_field="answer", judge="math", metadata_fields=["question"]))
    prompt = next(p for p in loaded.prompts if p.reference == "2")
    assert prompt.messages == (Message("user", "What is 1+1?"),)
    assert prompt.metadata == {"line": 2, "question": "What is 1+1?", "judge": "math"}
    assert (prompt.source, prompt.split) == ("sums", "train")


def test_malformed_rows_are_named_and_the_rest_is_loaded(tmp_path: Path) -> None:
    bad = ["{oops", [1], {"answer": 1}, {"question": "  "}, {"question": 7}, ""]
    path = write_jsonl(tmp_path / "q.jsonl", [*bad, {"question": "good"}])
    loaded = load(jsonl(path), max_unusable_frac=1)
    assert [prompt.messages[0].content for prompt in loaded.prompts] == ["good"]
    places = [failure.message.split(": ", 1) for failure in loaded.failures]
    assert [place for place, _ in places] == [f"{path}:{line}" for line in (1, 2, 3, 4, 5)]
    reasons = [reason for _, reason in places]
    assert reasons[0].startswith("not JSON")
    assert reasons[1] == "holds a list, a row is a JSON object"
    assert reasons[2].startswith("field 'question' is missing")
    assert {failure.reason for failure in loaded.failures} == {"malformed"}
    assert len({failure.sample_id for failure in loaded.failures}) == 5
    assert load(jsonl(path), max_unusable_frac=1).failures == loaded.failures


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "not a list of messages"),
        ("text", "not a list of messages"),
        ([{"role": "user"}], "message 0 is not {role: text, content: text}"),
        ([{"role": "user", "content": ""}], "message 0 is empty"),
        ([{"role": "user", "content": "q", "name": "Ann"}], "message 0 has 'name', which a prompt cannot hold"),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "ends with the assistant"),
        ([{"role": "system", "content": "s"}], "ends with the system"),
    ],
)
def test_malformed_conversations_are_named(tmp_path: Path, messages: Any, reason: str) -> None:
    good = {"m": [{"role": "user", "content": "q"}]}
    path = write_jsonl(tmp_path / "q.jsonl", [{"m": messages}, good])
    loaded = load(jsonl(path, messages_field="m"))
    assert len(loaded.prompts) == 1
    assert reason in loaded.failures[0].message


def test_finished_conversations_lose_their_answer_on_request(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write_jsonl(tmp_path / "q.jsonl", [{"m": turns}])
    loaded = load(jsonl(path, messages_field="m", drop_final_answer=True))
    assert loaded.prompts[0].messages == (Message("user", "q"),)


def test_a_source_without_prompts_is_an_error(tmp_path: Path) -> None:
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(DataError, match="source sums holds no rows"):
        load(jsonl(empty))
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": "x"}, {"text": "y"}])
    with pytest.raises(DataError, match=r"all 2 rows are malformed, first .*bad\.jsonl:1: field 'question' is missing"):
        load(jsonl(bad))
    with pytest.raises(DataError, match=r"missing\.jsonl does not exist"):
        load(jsonl(tmp_path / "missing.jsonl"))


def test_parquet_and_folders_give_the_same_prompts_as_jsonl(tmp_path: Path) -> None:
    rows = [{"question": f"What is {n}?", "answer": str(n)} for n in range(10)]
    folder = tmp_path / "data" / "nested"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows[:5]), folder / "a.parquet")
    pq.write_table(pa.Table.from_pylist(rows[5:]), folder / "b.parquet")
    source = {"kind": "parquet", "name": "p", "path": str(tmp_path / "data"), "prompt_field": "question"}
    by_parquet = load({**source, "reference_field": "answer"}).prompts
    by_jsonl = load(jsonl(write_jsonl(tmp_path / "q.jsonl", rows), name="p", reference_field="answer")).prompts
    assert [(p.prompt_id, p.reference) for p in by_parquet] == [(p.prompt_id, p.reference) for p in by_jsonl]
    with pytest.raises(DataError, match="has no column 'questoin': did you mean 'question'"):
        load({**source, "prompt_field": "questoin"})
    (tmp_path / "x.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"x\.parquet is not a Parquet file"):
        load({**source, "path": str(tmp_path / "x.parquet")})


def test_parquet_messages_of_mixed_rows(tmp_path: Path) -> None:
    rows = [{"m": [{"role": "user", "content": "q"}]}, {"m": None}, {"m": [{"role": "user", "content": None}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    loaded = load(
        {"kind": "parquet", "name": "p", "path": str(tmp_path / "m.parquet"), "messages_field": "m"},
        max_unusable_frac=1,
    )
    assert (len(loaded.prompts), len(loaded.failures)) == (1, 2)


def test_hugging_face_datasets_from_local_folders(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"question": f"What is {n}?", "answer": n} for n in range(6)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "dict"))
    (tmp_path / "raw").mkdir()
    write_jsonl(tmp_path / "raw" / "train.jsonl", rows)
    source = {"kind": "huggingface", "name": "h", "prompt_field": "question", "reference_field": "answer"}
    for dataset, split in (("one", "train"), ("dict", "test"), ("raw", "train")):
        loaded = load({**source, "dataset": str(tmp_path / dataset), "split": split, "limit": 4})
        assert sorted(p.reference or "" for p in loaded.prompts) == ["0", "1", "2", "3"]
    with pytest.raises(DataError, match=r"cannot be loaded.*no split 'tset': did you mean 'test'"):
        load({**source, "dataset": str(tmp_path / "dict"), "split": "tset"})
    with pytest.raises(DataError, match="has no column 'reference'"):
        load({**source, "dataset": str(tmp_path / "one"), "reference_field": "reference"})


def test_reasoning_gym_keeps_what_its_checker_needs() -> None:
    source = {"kind": "reasoning_gym", "name": "g", "task": "chain_sum", "size": 4, "seed": 3}
    loaded = load({**source, "options": {"min_terms": 2, "max_terms": 2}})
    assert len(loaded.prompts) == 4
    metadata = loaded.prompts[0].metadata
    assert (metadata["judge"], metadata["task"], metadata["seed"]) == ("reasoning_gym", "chain_sum", 3)
    assert metadata["options"] == {"min_terms": 2, "max_terms": 2}
    assert json.loads(json.dumps(metadata, allow_nan=False)) == metadata
    assert loaded.prompts[0].reference is not None
    with pytest.raises(DataError, match="no task 'chain_sums': did you mean 'chain_sum'"):
        load({**source, "task": "chain_sums"})
    with pytest.raises(DataError, match="rejects its options"):
        load({**source, "options": {"min_termz": 2}})


def test_duplicates_are_dropped_and_named(tmp_path: Path) -> None:
    first = questions(tmp_path / "a.jsonl", 4)
    second = questions(tmp_path / "b.jsonl", 4, start=2)
    loaded = load(jsonl(first, "a"), jsonl(second, "b"))
    assert len(loaded.prompts) == 6
    assert [(d.where, d.kept) for d in loaded.duplicates] == [
        (f"b {second}:1", f"a {first}:3"),
        (f"b {second}:2", f"a {first}:4"),
    ]


def test_system_and_instruction_are_put_where_they_belong(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "d"}]
    path = write_jsonl(tmp_path / "m.jsonl", [{"m": chat}, {"m": own}])
    loaded = load(jsonl(path, messages_field="m", system="yours", instruction="Think."))
    by_length = {len(prompt.messages): [m.content for m in prompt.messages] for prompt in loaded.prompts}
    assert by_length == {4: ["yours", "a", "b", "c\n\nThink."], 2: ["mine", "d\n\nThink."]}


def test_splits_and_order_do_not_move_when_prompts_are_added(tmp_path: Path) -> None:
    few = load(jsonl(questions(tmp_path / "a.jsonl", 200)), heldout_frac=0.2)
    many = load(jsonl(questions(tmp_path / "b.jsonl", 600)), heldout_frac=0.2)
    old = {prompt.prompt_id for prompt in few.prompts}
    assert [p.prompt_id for p in many.prompts if p.prompt_id in old] == [p.prompt_id for p in few.prompts]
    assert {p.prompt_id: p.split for p in few.prompts}.items() <= {p.prompt_id: p.split for p in many.prompts}.items()
    heldout = Counter(prompt.split for prompt in many.prompts)["heldout"]
    assert 0.14 < heldout / 600 < 0.26
    more = load(jsonl(tmp_path / "b.jsonl"), heldout_frac=0.4)
    was = {p.prompt_id for p in many.prompts if p.split == "heldout"}
    assert was < {p.prompt_id for p in more.prompts if p.split == "heldout"}


def test_order_is_shuffled_by_the_seed(tmp_path: Path) -> None:
    path = questions(tmp_path / "a.jsonl", 50)
    orders = [[p.metadata["line"] for p in load(jsonl(path), seed=seed).prompts] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_prompts_that_overlap_an_evaluation_set_are_left_out(tmp_path: Path) -> None:
    long = "Natalia sold clips to 48 of her friends in April and then she sold half as many clips in May"
    evaluation = write_jsonl(tmp_path / "eval.jsonl", [{"q": long}, {"q": "What is two plus two?"}])
    rows = [
        "Please solve: " + long.upper().replace(" ", "  ") + "!",
        "What is two plus two",
        "What is two plus two or so?",
    ]
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": row} for row in rows])
    against = {"kind": "jsonl", "name": "eval", "path": str(evaluation), "prompt_field": "q"}
    loaded = load(jsonl(path, instruction="Think."), decontaminate={"against": [against]})
    assert [prompt.metadata["line"] for prompt in loaded.prompts] == [3]
    assert [(c.where, c.against) for c in loaded.contaminated] == [
        (f"sums {path}:1", f"eval {evaluation}:1"),
        (f"sums {path}:2", f"eval {evaluation}:2"),
    ]
    with pytest.raises(DataError, match=r"prompts\.decontaminate, source eval: .*field 'x' is missing"):
        load(jsonl(path), decontaminate={"against": [{**against, "prompt_field": "x"}]})


def test_requests_come_in_rounds_with_their_own_ids_and_seeds(tmp_path: Path, tokenizer: Any) -> None:
    a, b = questions(tmp_path / "a.jsonl", 5), questions(tmp_path / "b.jsonl", 4, start=10)
    config = build_config(jsonl(a, "a"), jsonl(b, "b", samples=3, max_tokens=7, temperature=1.0), samples=2)
    asked, failures = ask(config, tokenizer)
    assert not failures
    assert len(asked) == 5 * 2 + 4 * 3 == num_requests(config, load_prompts(config.prompts).prompts)
    rounds = [request.sample_index for request in asked]
    assert rounds == sorted(rounds)
    assert len({request.sample_id for request in asked}) == len({request.seed for request in asked}) == len(asked)
    assert all(request.seed is not None and 0 <= request.seed < 2**63 for request in asked)
    limits = {(r.prompt.source, r.max_tokens, r.sampling["max_tokens"], r.sampling["temperature"]) for r in asked}
    assert limits == {("a", 32768, 32768, 0.6), ("b", 7, 7, 1.0)}
    text = tokenizer.decode(asked[0].prompt_token_ids)
    content = asked[0].prompt.messages[0].content
    assert text == f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


def test_more_prompts_and_samples_only_add_requests(tmp_path: Path, tokenizer: Any) -> None:
    small, _ = ask(build_config(jsonl(questions(tmp_path / "a.jsonl", 5))), tokenizer)
    large, _ = ask(build_config(jsonl(questions(tmp_path / "a.jsonl", 9)), samples=3), tokenizer)
    assert {r.sample_id for r in small} < {r.sample_id for r in large}
    other, _ = ask(build_config(jsonl(questions(tmp_path / "a.jsonl", 5)), temperature=0.7), tokenizer)
    assert not {r.sample_id for r in small} & {r.sample_id for r in other}


def test_sample_ids_and_seeds_are_pinned(tmp_path: Path, tokenizer: Any) -> None:
    """A change here makes every existing cache generate everything again."""
    assert seed_of(0, "p", 0) == 4937115140991801873
    path = questions(tmp_path / "a.jsonl", 1)
    asked = [ask(build_config(jsonl(path), **more), tokenizer)[0][0] for more in ({}, {"min_p": 0.0, "top_k": None})]
    assert asked[0].prompt.prompt_id == "27888f19f90b1bdb12c4c5a9299ea67d"
    named = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 32768}
    for request in asked:
        assert request.seed is not None
        assert request.sample_id == sample_id_of("teacher", request.prompt_token_ids, named, request.seed, 0)


def test_workers_share_every_request_once(tmp_path: Path, tokenizer: Any) -> None:
    config = build_config(jsonl(questions(tmp_path / "a.jsonl", 60)))
    everything = [request.sample_id for request in ask(config, tokenizer)[0]]
    shares = [[r.sample_id for r in ask(config, tokenizer, f"{index}/3")[0]] for index in range(3)]
    assert sorted(sample_id for share in shares for sample_id in share) == sorted(everything)
    assert all(shares)
    assert shares[0] == [sample_id for sample_id in everything if sample_id in shares[0]]


@pytest.mark.parametrize("text", ["3/3", "1", "-1/2", "a/b", "1/0", "/2"])
def test_impossible_workers_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not I/N with I from 0 to N-1"):
        parse_worker(text)


def test_a_prompt_that_the_template_refuses_is_one_failure_a_sample(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"m": [{"role": role, "content": "x"}, {"role": "user", "content": "q"}]} for role in ("tool", "user")]
    config = build_config(jsonl(write_jsonl(tmp_path / "m.jsonl", rows), messages_field="m"), samples=2)
    asked, failures = ask(config, tokenizer)
    assert len(asked) == 2
    assert [(failure.reason, failure.sample_index) for failure in failures] == [
        ("chat_template", 0),
        ("chat_template", 1),
    ]
    assert "no tools here" in failures[0].message


def test_template_arguments_reach_the_template(tokenizer: Any) -> None:
    prompt = Prompt("id", (Message("user", "q"),), "s", "train")
    plain, opened = (tokenize(tokenizer, [prompt], kwargs)[0] for kwargs in ({}, {"open_reasoning": True}))
    assert tokenizer.decode(opened) == tokenizer.decode(plain) + "<think>\n"


def test_a_tokenizer_without_template_is_refused(tmp_path: Path) -> None:
    bare = load_tokenizer(str(save(byte_level(), tmp_path / "t")))
    bare.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template"):
        ask(build_config(jsonl(questions(tmp_path / "a.jsonl", 1))), bare)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"judge": "math"}, "judge has no effect without reference_field"),
        ({"drop_final_answer": True}, "drop_final_answer has no effect"),
        ({"messages_field": "m"}, "exactly one of messages_field and prompt_field"),
        ({"temperature": 0, "samples": 2}, "would repeat one chain"),
    ],
)
def test_settings_without_effect_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config({"kind": "jsonl", "name": "a", "path": "a.jsonl", "prompt_field": "q", **change})


def test_deep_nesting_is_text_or_a_malformed_row(tmp_path: Path) -> None:
    deep = "[" * 100_000
    path = tmp_path / "q.jsonl"
    path.write_text(f'{{"question": {deep}\n{json.dumps({"question": deep})}\n')
    loaded = load(jsonl(path), max_unusable_frac=1)
    assert [prompt.messages[0].content for prompt in loaded.prompts] == [deep]
    (failure,) = loaded.failures
    assert "not JSON" in failure.message


@pytest.mark.parametrize("field", ["question", "answer"])
def test_half_a_character_makes_a_row_malformed(tmp_path: Path, field: str) -> None:
    """JSON may hold half of an emoji, which no table can; it must not come up hours later, when a shard is written."""
    path = tmp_path / "a.jsonl"
    row = {"question": "1+1?", "answer": "2", field: "HALF"}
    path.write_text(json.dumps(row).replace("HALF", "\\ud83d") + '\n{"question": "2+2?", "answer": "4"}\n')
    source = {"kind": "jsonl", "name": "a", "path": path, "prompt_field": "question", "reference_field": "answer"}
    loaded = load(source)
    assert len(loaded.prompts) == 1
    (failure,) = loaded.failures
    assert "half of a character" in failure.message


@pytest.mark.parametrize("named", [{"reference_field": "anwser"}, {"metadata_fields": ["question", "anwser"]}])
def test_a_field_that_no_row_has_is_refused(tmp_path: Path, named: dict[str, Any]) -> None:
    path = questions(tmp_path / "q.jsonl", 3)
    with pytest.raises(
        DataError, match=r"source sums: no row of .*q\.jsonl has a field 'anwser': did you mean 'answer'\?"
    ):
        load(jsonl(path, **named))
    with pytest.raises(DataError, match="has a field 'anwser'"):
        load(jsonl(path, limit=1, **named))


def test_a_field_that_some_rows_lack_is_taken_where_it_is(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": "1"}, "{bad", {"question": "2", "answer": "two"}])
    loaded = load(jsonl(path, reference_field="answer"))
    assert {prompt.reference for prompt in loaded.prompts} == {None, "two"}
    # It exists in the file, if not among the rows that are taken.
    assert load(jsonl(path, reference_field="answer", limit=1)).prompts[0].reference is None
