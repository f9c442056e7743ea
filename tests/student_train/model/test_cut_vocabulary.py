"""Students that keep the ids of their cache alone: tokenizer, embeddings, targets."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillroom.errors import ConfigError, DataError
from stillroom.schema.records import Signals
from student_train.assess.evaluating import evaluate_config, evaluate_model
from student_train.config.run import InitConfig
from student_train.data.kept_ids import KeptIds, ids_of, map_signals, map_text, read_kept_ids
from student_train.exporting import export
from student_train.model.cut_vocabulary import _closed, _cut_tokenizer
from student_train.model.prune import init_student
from student_train.runtime.checkpoint import find_state
from student_train.runtime.run_folder import RunFolder
from tests.helpers.caches import EOS_ID, THINK_END_ID, CacheShape, SyntheticCache, write_chains
from tests.helpers.students import make_student
from tests.helpers.tiny_tokenizer import CORPUS, metaspace, save
from tests.helpers.training import IGNORE_LIBRARY_WARNINGS, Trainer
from tests.helpers.vocabularies import _signals, make_chain, teacher_tokenizer

TEXT = "hello world, what is the answer?"


def test_distributions_over_kept_ids_lose_no_mass() -> None:
    kept = KeptIds.of(np.array([1, 4, 6], np.int32), "t", has_all_stored=False)
    assert ids_of(kept.packed).tolist() == [1, 4, 6]
    assert map_text(kept.packed, np.array([6, 1, 4], np.int32), "here").tolist() == [2, 0, 1]
    for unknown in (5, 900):
        with pytest.raises(DataError, match=f"here holds token id {unknown}, which .* has grown since"):
            map_text(kept.packed, np.array([1, unknown], np.int32), "here")
    probs = np.array([0.5, 0.3, 0.1, 0.9, 0.08])
    signals = Signals(
        topk_n_T=np.array([3, 2], np.int32),
        topk_ids_N=np.array([4, 5, 6, 1, 4], np.int32),
        topk_logprobs_N=np.log(probs).astype(np.float32),
        tail_logmass_T=np.array([np.log(0.1), -np.inf], np.float32),
        sampled_logprob_T=np.zeros(2, np.float32),
        sampled_rank_T=np.ones(2, np.int32),
        entropy_T=np.zeros(2, np.float32),
    )
    mapped = map_signals(kept.packed, signals)
    assert mapped.topk_n_T.tolist() == [2, 2]
    assert mapped.topk_ids_N.tolist() == [1, 2, 0, 1]
    assert np.allclose(np.exp(mapped.topk_logprobs_N), [0.5, 0.1, 0.9, 0.08])
    assert np.allclose(np.exp(mapped.tail_logmass_T), [0.1 + 0.3, 0.0])


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_a_cut_tokenizer_splits_the_text_as_before(tmp_path: Path, kind: str) -> None:
    if kind == "bytes":
        tokenizer = teacher_tokenizer(tmp_path / "whole", 340)
    else:
        tokenizer = AutoTokenizer.from_pretrained(save(metaspace(), tmp_path / "whole"))
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = tokenizer.encode(TEXT)
    messages = [{"role": "user", "content": TEXT}]
    rendered_ids = tokenizer.apply_chat_template(messages, return_dict=False)
    kept = _closed(backend, [*ids, *rendered_ids])
    assert set(ids) <= set(kept)
    assert len(kept) < len(tokenizer)
    cut = _cut_tokenizer(tokenizer, backend, kept)
    assert [kept[number] for number in cut.encode(TEXT)] == ids
    assert len(cut) == len(kept)
    # Text of another kind is longer, and still itself.
    assert cut.decode(cut.encode(CORPUS[0])) == tokenizer.decode(tokenizer.encode(CORPUS[0]))
    assert [kept[number] for number in cut.apply_chat_template(messages, return_dict=False)] == rendered_ids
    assert cut.convert_tokens_to_ids(cut.eos_token) == kept.index(tokenizer.eos_token_id)


def test_only_bpe_can_be_cut() -> None:
    from tokenizers import models

    unigram = Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], unk_id=0))
    with pytest.raises(ConfigError, match="the tokenizer is a Unigram, and only BPE"):
        _closed(json.loads(unigram.to_str()), [0])


def _cache(root: Path, tokenizer: Any) -> SyntheticCache:
    """Chains of few words, whose stored ids lie below 270 but for what they say."""
    chains = []
    for row in range(24):
        ids = np.array([*tokenizer.encode(TEXT), THINK_END_ID, *tokenizer.encode(str(row)), EOS_ID], np.int32)
        signals = _signals(ids, 270, np.random.default_rng(row))
        # The likeliest token is the one that was said, or a small id.
        chains.append(
            replace(
                make_chain(tokenizer, row, "cut"),
                text=tokenizer.decode(ids[:-1].tolist()),
                token_ids=ids,
                signals=signals,
            )
        )
    shape = CacheShape(codec="topk-f32", vocab_size=len(tokenizer), max_support=4, tokenizer="cut")
    return write_chains(root, shape, chains, tokenizer)


@IGNORE_LIBRARY_WARNINGS
def test_a_student_of_a_cut_vocabulary_learns_from_the_cache(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = teacher_tokenizer(tmp_path / "tokenizer", 340)
    cache = _cache(tmp_path / "cache", tokenizer)
    # Synthetic caches carry a made-up fingerprint.
    (made_up,) = {run.teacher.tokenizer_fingerprint for run in cache.catalog.runs().values()}
    monkeypatch.setattr("student_train.model.cut_vocabulary.fingerprint_tokenizer", lambda _: made_up)
    teacher = make_student(tmp_path / "teacher", vocab_size=len(tokenizer) + 8, tokenizer=tokenizer)
    init = {"teacher": str(teacher), "vocabulary": "written"}
    config = trainer.config(
        "run",
        {"epochs": None, "max_steps": 2},
        student={"model": str(tmp_path / "cut"), "init": init},
        data={"caches": [str(cache.root)]},
    )
    asked = config.student.init
    assert asked is not None
    with pytest.raises(ConfigError, match="vocabulary reads the caches: pass a CONFIG"):
        init_student(asked, tmp_path / "cut")
    record = init_student(asked, tmp_path / "cut", None, config.data)
    kept = read_kept_ids(str(tmp_path / "cut"))
    assert kept is not None
    ids_K = ids_of(kept.packed)
    assert record["num_ids"] == len(ids_K) < len(tokenizer)
    whole: Any = AutoModelForCausalLM.from_pretrained(teacher)
    cut: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert cut.config.vocab_size == len(ids_K)
    assert ids_K[cut.config.eos_token_id] == EOS_ID
    text_ids = torch.tensor([tokenizer.encode(TEXT)])
    cut_ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "cut").encode(TEXT)])
    with torch.no_grad():
        assert torch.allclose(cut(cut_ids).logits, whole(text_ids).logits[..., ids_K], atol=1e-5)
    trainer.finish(config)
    state = find_state(RunFolder(config.run).checkpoints, "last")
    export(config, state, tmp_path / "out", adapter_only=False, tokenizer=None)
    measured = evaluate_config(config, None, "last")
    again = evaluate_model(str(tmp_path / "out"), [cache.root], None, max_chains=5, pack_tokens=128)
    assert again["forward_kl"] == pytest.approx(measured["forward_kl"], rel=1e-5)
    assert again["bits_per_byte"] == pytest.approx(measured["bits_per_byte"], rel=1e-5)
    # A student cut again keeps the ids, and the vocabulary is not cut twice.
    init_student(InitConfig(teacher=str(tmp_path / "out"), layers=1), tmp_path / "smaller")
    assert read_kept_ids(str(tmp_path / "smaller")) == kept
    with pytest.raises(ConfigError, match="has already been cut"):
        init_student(
            InitConfig(teacher=str(tmp_path / "out"), vocabulary="stored"), tmp_path / "twice", None, config.data
        )
