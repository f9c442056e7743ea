"""Students that keep the ids of their cache alone: tokenizer, embeddings, targets."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from stillroom.errors import ConfigError, DataError
from stillroom.schema.records import Signals
from student_train.data.kept_ids import KeptIds, ids_of, map_signals, map_text
from student_train.model.cut_vocabulary import _closed, _cut_tokenizer
from tests.helpers.tiny_tokenizer import CORPUS, metaspace, save
from tests.helpers.vocabularies import teacher_tokenizer

TEXT = "hello world, what is the answer?"


def test_distributions_over_kept_ids_lose_no_mass() -> None:
    kept = KeptIds.of(np.array([1, 4, 6], np.int32), "t", has_all_stored=False)
    assert ids_of(kept.packed).tolist() == [1, 4, 6]
    assert map_text(kept.packed, np.array([6, 1, 4], np.int32), "here").tolist() == [2, 0, 1]
    for unknown in (5, 900):
        with pytest.raises(DataError, match=f"here holds token id {unknown}, which .* cache has grown"):
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
