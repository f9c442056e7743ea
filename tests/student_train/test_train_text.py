"""Training on chains as text (a student of another vocabulary), and on chains that are longer than the limit."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillroom.cache.catalog import Catalog
from stillroom.config import Json
from stillroom.errors import ConfigError
from student_train.assess.evaluating import evaluate_config, evaluate_model
from student_train.data.rows import read_rows
from student_train.data.selection import Selection, load_selection
from student_train.exporting import export
from student_train.planning.estimate import plan_run
from student_train.runtime.checkpoint import find_state
from student_train.runtime.run_folder import RunFolder
from tests.helpers.caches import EOS_ID, Chain, SyntheticCache, make_cache
from tests.helpers.dense_losses import stored_kl
from tests.helpers.students import make_student
from tests.helpers.tiny_tokenizer import byte_level, save
from tests.helpers.training import IGNORE_LIBRARY_WARNINGS, Trainer, losses_of
from tests.helpers.vocabularies import make_text_cache, student_folder, teacher_tokenizer

pytestmark = IGNORE_LIBRARY_WARNINGS

LIMIT = 24
ONE_STEP: Json = {"losses": {"cross_entropy": 1}, "epochs": 1, "batch_tokens": 65536, "clip_norm": None}


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with a byte-level vocabulary, which shares no word with the cache."""
    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = AutoTokenizer.from_pretrained(save(byte_level(), folder / "tokenizer"))
    return make_student(folder / "student", vocab_size=400, tokenizer=tokenizer)


def test_text_alone_trains_a_student_of_another_vocabulary(
    trainer: Trainer, tmp_path: Path, cache: SyntheticCache, foreign: Path
) -> None:
    """The loss of one step over everything is that of the rendered and retokenised chains, each alone."""
    config = trainer.config(
        "run",
        ONE_STEP,
        student={"model": str(foreign)},
        data={"kind": "text", "pack_tokens": 512},
        eval={"max_chains": None},
    )
    (record,) = trainer.run(config)
    tokenizer = AutoTokenizer.from_pretrained(foreign)
    chains = [chain for chain in cache.chains if chain.split == "train"]
    # A synthetic chain reasons through the first half of its text; the decoder left out both marks.
    said = [replace(chain, text=_with_marks(chain.text)) for chain in chains]
    expected, num_tokens = _mean_cross_entropy(foreign, [_as_text(chain, tokenizer) for chain in said])
    assert record["num_loss_tokens"] == num_tokens
    assert record["loss"] == pytest.approx(expected, rel=1e-5)
    before, after = RunFolder(config.run).read_evals()
    assert before["forward_kl"] is None
    assert after["cross_entropy"] < before["cross_entropy"]
    assert evaluate_config(config, None, "last")["cross_entropy"] == pytest.approx(after["cross_entropy"], rel=1e-5)
    state = find_state(RunFolder(config.run).checkpoints, "last")
    with pytest.raises(ConfigError, match="--tokenizer has no effect after training on text alone"):
        export(config, state, tmp_path / "out", adapter_only=False, tokenizer=str(foreign))
    export(config, state, tmp_path / "out", adapter_only=False, tokenizer=None)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()


def test_reference_answers_may_be_learnt_instead(trainer: Trainer, cache: SyntheticCache, foreign: Path) -> None:
    data: Json = {"kind": "text", "text": "reference", "pack_tokens": 512}
    config = trainer.config("run", ONE_STEP, student={"model": str(foreign)}, data=data, eval=None)
    (record,) = trainer.run(config)
    tokenizer = AutoTokenizer.from_pretrained(foreign)
    chains = [replace(chain, text="42", finish_reason="stop") for chain in cache.chains if chain.split == "train"]
    expected, num_tokens = _mean_cross_entropy(foreign, [_as_text(chain, tokenizer) for chain in chains])
    assert record["num_loss_tokens"] == num_tokens
    assert record["loss"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ConfigError, match="text: reference has no effect with kind: distributions"):
        trainer.config("run", student={"model": str(foreign)}, data={"text": "reference"})


@pytest.fixture(scope="session")
def spelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[SyntheticCache, Path]:
    """A cache of real text and a student whose tokens spell it in other pieces."""
    folder = tmp_path_factory.mktemp("spelled")
    made = make_text_cache(folder / "cache", teacher_tokenizer(folder / "teacher"), num_chains=48)
    return made, student_folder(folder, "pieces")


def test_chains_of_an_api_without_distributions_train_as_text_alone(
    trainer: Trainer, tmp_path: Path, foreign: Path
) -> None:
    made = make_cache(tmp_path / "api", num_chains=8, max_tokens=20)
    catalog = Catalog(made.root)
    for run in catalog.runs().values():
        catalog.write_run(run.model_copy(update={"engine": {**run.engine, "signals": "none"}}))
    data: Json = {"caches": [str(made.root)], "pack_tokens": 512}
    with pytest.raises(ConfigError, match=r"text without distributions \(engine\.signals: none\): set data\.kind"):
        plan_run(trainer.config("distributions", data=data, eval=None), 1)
    text = trainer.config("text", ONE_STEP, student={"model": str(foreign)}, data=data | {"kind": "text"}, eval=None)
    assert plan_run(text, 1)["stages"][0]["num_chains"] > 0


@pytest.mark.parametrize("losses", [{"cross_entropy": 1}, {"jsd": 0.8, "chunk_likelihood": 0.1, "cross_entropy": 0.1}])
def test_run_in_another_vocabulary_resumes_bit_for_bit(
    trainer: Trainer, foreign: Path, spelled: tuple[SyntheticCache, Path], losses: Json
) -> None:
    stage: Json = {"losses": losses, "batch_tokens": 2048}
    is_text = len(losses) == 1
    text: Json = {"kind": "text" if is_text else "projected", "pack_tokens": 512}
    if not is_text:
        text |= {"caches": [str(spelled[0].root)], "long_chains": "split", "max_tokens": 100}
    model = str(foreign if is_text else spelled[1])
    whole = trainer.config("whole", stage, student={"model": model}, data=text)
    parted = trainer.config("parted", stage, student={"model": model}, data=text)
    expected = losses_of(trainer.run(whole))
    trainer.run(parted, stop_after=3)
    assert losses_of(trainer.run(parted)) == expected
    assert len(expected) > 4


def test_projected_distributions_train_a_student_of_another_vocabulary(
    trainer: Trainer, spelled: tuple[SyntheticCache, Path], tmp_path: Path
) -> None:
    """The loss of one step is that of whole distributions of every chain alone; evaluation says where they compare."""
    cache, student = spelled
    stage: Json = {**ONE_STEP, "losses": {"forward_kl": {"weight": 1, "tail": "bucket"}}}
    data: Json = {"kind": "projected", "caches": [str(cache.root)], "pack_tokens": 512}
    config = trainer.config("run", stage, student={"model": str(student)}, data=data, eval={"max_chains": None})
    planned = plan_run(config, 1)["stages"][0]
    assert planned["projection"]["num_aligned"] == planned["num_chains"]
    assert sorted(one.name for one in RunFolder(config.run).plan_folder.glob("*-projected")) == [
        "distill.selection-projected",
        "heldout.selection-projected",
    ]
    (record,) = trainer.run(config)
    assert not RunFolder(config.run).plan_folder.exists()
    other = config.model_copy(update={"data": config.data.model_copy(update={"kind": "text"})})
    with pytest.raises(ConfigError, match=r"was frozen with data\.kind projected, now it is text: choose another run"):
        evaluate_config(other, None, "initial")
    selection = load_selection(RunFolder(config.run).selection_path("distill"))
    assert record["num_loss_tokens"] == selection.header.num_tokens == planned["num_tokens"]
    sums, _ = _projected_losses(student, selection)
    assert record["loss"] == pytest.approx(sums[0] / selection.header.num_tokens, rel=1e-5)
    heldout = load_selection(RunFolder(config.run).heldout_path)
    sums, counts = _projected_losses(student, heldout)
    before, after = RunFolder(config.run).read_evals()
    assert before["forward_kl"] == pytest.approx(sums[1] / counts[0], rel=1e-5)
    assert after["forward_kl"] < before["forward_kl"]
    assert before["bits_per_byte"] == pytest.approx(sums[2] / math.log(2) / counts[1], rel=1e-5)
    state = find_state(RunFolder(config.run).checkpoints, "last")
    export(config, state, tmp_path / "out", adapter_only=False, tokenizer=None)
    again = evaluate_model(str(tmp_path / "out"), [cache.root], None, kind="projected", pack_tokens=512)
    assert again["forward_kl"] == pytest.approx(after["forward_kl"], rel=1e-4)
    assert again["bits_per_byte"] == pytest.approx(after["bits_per_byte"], rel=1e-4)
    with pytest.raises(ConfigError, match=r"project the distributions into the student's vocabulary \(data.kind: proj"):
        plan_run(trainer.config("other", student={"model": str(student)}, data={**data, "kind": "distributions"}), 1)
    with pytest.raises(ConfigError, match=r"temperature must be 1 with data\.kind: projected"):
        plan_run(trainer.config("warm", {"temperature": 2.0}, student={"model": str(student)}, data=data), 1)


def _projected_losses(student: Path, selection: Selection) -> tuple[list[float], list[int]]:
    """Sums of KL (the tail one bucket) over all tokens and over common ones, and of cross-entropy; counts of common
    tokens and of bytes. Each chain alone, over whole distributions.
    """
    model = AutoModelForCausalLM.from_pretrained(student).double()
    sums, num_common, num_bytes = [0.0, 0.0, 0.0], 0, 0
    tokenizer = AutoTokenizer.from_pretrained(student)
    for group in range(len(selection.file_G)):
        rows = np.flatnonzero(selection.group_R == group)
        block = read_rows(selection, group, rows, with_signals=True)
        for index in range(len(rows)):
            prompt, ids = block.prompt_of(index), block.tokens_of(index)
            with torch.no_grad():
                logits_LV = model(torch.tensor(np.concatenate([prompt, ids]))[None].long()).logits[0]
            logprobs_SV = logits_LV[len(prompt) - 1 : -1].log_softmax(dim=1)
            signals, chunks = block.signals_of(index, 0, len(ids)), block.chunks_of(index, 0, len(ids))
            assert signals is not None
            assert chunks is not None
            kl_S = stored_kl(signals, logprobs_SV)
            common_S = torch.tensor(chunks[0])
            sums[0] += float(kl_S.sum())
            sums[1] += float(kl_S[common_S].sum())
            sums[2] -= float(logprobs_SV.gather(1, torch.tensor(ids).long()[:, None]).sum())
            num_common += int(common_S.sum())
            num_bytes += len(str(tokenizer.decode(ids, skip_special_tokens=True)).encode())
    return sums, [num_common, num_bytes]


def test_long_chains_are_cut_as_the_configuration_says(trainer: Trainer, cache: SyntheticCache, student: Path) -> None:
    chains = [chain for chain in cache.chains if chain.split == "train"]
    long = [chain for chain in chains if len(chain.prompt_ids) + len(chain.token_ids) > LIMIT]
    assert len(long) > 10
    assert any(chain.token_ids[-1] == EOS_ID for chain in long)
    # Which tokens each policy leaves is test_stream's subject; here it reaches the plan, and a cut chain the loss.
    for policy, counted in (("skip", "num_skipped"), ("split", "num_split"), ("truncate", "num_truncated")):
        config = trainer.config("run", ONE_STEP, data={"long_chains": policy, "max_tokens": LIMIT}, eval=None)
        assert plan_run(config, 1)["stages"][0][counted] == len(long)
    (record,) = trainer.run(config)
    # A chain that was cut keeps its beginning and nothing in the place of its end.
    expected, num_tokens = _mean_cross_entropy(
        student,
        [(chain.prompt_ids.tolist(), chain.token_ids.tolist()[: LIMIT - len(chain.prompt_ids)]) for chain in chains],
    )
    assert record["num_loss_tokens"] == num_tokens
    assert record["loss"] == pytest.approx(expected, rel=1e-5)


def _with_marks(text: str) -> str:
    half = len(text) // 2
    return f"<think>\n{text[:half]}</think>{text[half:]}"


def _as_text(chain: Chain, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Prompt and completion as another vocabulary's student reads them: the end only where the teacher ended."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": chain.prompt}], tokenize=False, add_generation_prompt=True
    )
    end = [tokenizer.eos_token_id] if chain.finish_reason == "stop" else []
    answer = tokenizer(chain.text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return tokenizer(prompt, add_special_tokens=False)["input_ids"], [*answer, *end]


def _mean_cross_entropy(folder: Path, chains: Sequence[tuple[list[int], list[int]]]) -> tuple[float, int]:
    """(mean, number) over completion tokens, each chain alone, by transformers in float64 softmaxes."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, num_tokens = 0.0, 0
    for prompt, completion in chains:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0].double()
        logprobs_TV = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
        total -= float(logprobs_TV.gather(1, torch.tensor(completion)[:, None]).sum())
        num_tokens += len(completion)
    return total / num_tokens, num_tokens
