"""Near-duplicates: found whatever their place, never by chance, and reported."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from stillroom.config import validate_config
from stillroom.schema.records import Message
from teacher_cache.prompts.config import DedupeConfig, PromptsConfig
from teacher_cache.prompts.dedupe import NUM_PERMUTATIONS, Compared, _num_bands, near_duplicates
from teacher_cache.prompts.prompts import LoadedPrompts, load_prompts

SHOP = "A shop sells pens for 3 euros each and gives every tenth pen away. What do 25 pens cost in the shop today?"


def load(path: Path, texts: list[str], *sources: dict[str, Any], **dedupe: Any) -> LoadedPrompts:
    path.write_text("".join(json.dumps({"q": text}) + "\n" for text in texts))
    rows = {"kind": "jsonl", "name": "rows", "path": str(path), "prompt_field": "q", "instruction": "Say why, please."}
    config = {"sources": [rows, *sources], "dedupe": dedupe, "heldout_frac": 0.5}
    return load_prompts(validate_config(config, PromptsConfig, "test"))


@pytest.mark.parametrize(
    ("other", "similarity", "is_near"),
    [
        (SHOP.upper().replace(",", " ;"), 1.0, True),
        (SHOP.replace("today", "now"), 0.8, True),
        (SHOP.replace("today", "now"), 0.95, False),
        (SHOP.replace("pens", "nuts"), 0.8, False),
        (SHOP + " " + SHOP.replace("shop", "market"), 0.8, False),
    ],
)
def test_likeness_is_of_shared_words(tmp_path: Path, other: str, similarity: float, is_near: bool) -> None:
    loaded = load(tmp_path / "q.jsonl", [SHOP, "Why is the sky blue?", other], similarity=similarity)
    assert len(loaded.prompts) == 3 - is_near
    if is_near:
        (found,) = loaded.near_duplicates
        assert (found.where, found.kept) == (f"rows {tmp_path}/q.jsonl:3", f"rows {tmp_path}/q.jsonl:1")
        assert str(found).split(" is ")[1].startswith(f"{found.similarity:.0%} like rows")
        assert found.similarity >= similarity


def test_chinese_is_compared_by_characters(tmp_path: Path) -> None:
    texts = ["商店里每支铅笔三元，买二十五支铅笔一共要付多少钱？", "商店里每支铅笔三元，买二十五支铅笔总共要付多少钱？"]
    assert len(load(tmp_path / "q.jsonl", texts, similarity=0.7).near_duplicates) == 1


def test_tasks_and_templates_are_alike_on_purpose(tmp_path: Path) -> None:
    template = {"text": SHOP.replace("25", "{n}"), "variables": {"n": {"min": 1, "max": 9}}}
    source = {"kind": "template", "name": "shop", "templates": [template], "size": 5}
    loaded = load(tmp_path / "q.jsonl", [SHOP], source)
    assert (len(loaded.prompts), loaded.near_duplicates) == (6, [])


@pytest.mark.parametrize("similarity", [0.2, 0.5, 0.8, 0.9, 1.0])
def test_pairs_at_the_threshold_are_hardly_missed(similarity: float) -> None:
    bands = _num_bands(similarity)
    assert (1 - similarity ** (NUM_PERMUTATIONS // bands)) ** bands <= 0.005


def test_every_pair_above_the_threshold_is_found() -> None:
    rng = random.Random(0)
    prompts = []
    for number in range(300):
        words = [f"w{rng.randrange(10**6)}" for _ in range(40)]
        for name in ("first", "second"):
            prompts.append(Compared(f"{name} {number}", [Message("user", " ".join(words))]))
            words[: rng.randrange(1, 9)] = ["other"]
    found = [*near_duplicates(DedupeConfig(similarity=0.6, ngram=1), prompts)]
    assert [None if one is None else one.kept for one in found] == [
        None if one.where.startswith("first") else one.where.replace("second", "first") for one in prompts
    ]


def test_prompts_with_other_system_messages_are_none(tmp_path: Path) -> None:
    systems = ["Be brief.", "Be brief.", "Explain.", None]
    rows = [{"q": SHOP + " " * number, "s": system} for number, system in enumerate(systems)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    source = {"kind": "jsonl", "path": str(tmp_path / "q.jsonl"), "prompt_field": "q"}
    own = [
        {**source, "name": "rows", "system_field": "s"},
        {**source, "name": "others", "system": "Explain.", "ignored_fields": ["s"], "limit": 1},
    ]
    loaded = load_prompts(validate_config({"sources": own, "dedupe": {}}, PromptsConfig, "test"))
    assert [one.where.rpartition(":")[2] for one in loaded.near_duplicates] == ["2", "1"]


def test_thousands_that_resemble_each_other_take_seconds() -> None:
    rng = random.Random(0)
    texts = [SHOP.replace("25", str(n)).replace("3 euros", f"{rng.randrange(9**9)} euros {n}") for n in range(4000)]
    started_s = time.process_time()
    found = [
        *near_duplicates(DedupeConfig(), [Compared(str(n), [Message("user", one)]) for n, one in enumerate(texts)])
    ]
    assert not any(found)
    assert time.process_time() - started_s < 15, "it takes 2 s"
