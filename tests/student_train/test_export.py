"""Checkpoints as Hugging Face folders: weights, tokenizer, card; merged or adapter only; evaluated as they came out."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from stillroom.config import Json
from stillroom.errors import ConfigError, DataError, StillroomError
from stillroom.models import fingerprint_template, fingerprint_tokenizer
from student_train.assess.evaluating import More, evaluate_config, evaluate_model
from student_train.commands.result_lines import export_lines
from student_train.config.run import TrainConfig
from student_train.data.selection import Selection, load_selection
from student_train.exporting import adopt_tokens, cache_tokenizer, export, trained_model
from student_train.runtime.checkpoint import CheckpointState, find_state
from student_train.runtime.run_folder import RunFolder
from tests.helpers.caches import SyntheticCache
from tests.helpers.students import make_student, make_tokenizer
from tests.helpers.training import IGNORE_LIBRARY_WARNINGS, Trainer

pytestmark = IGNORE_LIBRARY_WARNINGS


@pytest.fixture
def own_tokenizer(monkeypatch: pytest.MonkeyPatch, student: Path) -> None:
    """Lets the synthetic cache, whose fingerprints are invented, have the student's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(student)
    ours = fingerprint_tokenizer(tokenizer), fingerprint_template(tokenizer)

    def with_fingerprints(path: Path, roots: list[Path] | None = None) -> Selection:
        selection = load_selection(path, roots)
        header = selection.header.model_copy(
            update={"tokenizer_fingerprints": [ours[0]], "template_fingerprints": [ours[1]]}
        )
        return replace(selection, header=header)

    monkeypatch.setattr("student_train.exporting.load_selection", with_fingerprints)


@pytest.mark.parametrize(
    ("engine", "stage"),
    [({"zero_stage": 2}, {}), ({"zero_stage": 3, "precision": "bfloat16"}, {}), ({}, {"trainable": "lora"})],
)
@pytest.mark.usefixtures("own_tokenizer")
def test_exported_folder_is_the_student_that_the_run_saw(
    trainer: Trainer, tmp_path: Path, cache: SyntheticCache, engine: Json, stage: Json
) -> None:
    config = _trained(trainer, engine, stage)
    out = tmp_path / "out"
    result = export(config, _last(config), out, adapter_only=False, tokenizer=None)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert result["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert {path.stat().st_mode for path in out.glob("*.safetensors")} == {(out / "config.json").stat().st_mode}
    assert AutoTokenizer.from_pretrained(out).chat_template == make_tokenizer().chat_template
    card = (out / "README.md").read_text()
    for said in (
        "synthetic-teacher",
        "split = 'train'",
        "forward_kl",
        "KL(teacher, student)",
        f"path: {cache.root.name}",
    ):
        assert said in card
    # It is published: neither this machine's folders nor pages of defaults.
    assert not any(str(folder) in card for folder in (tmp_path, config.run.parent))
    assert "lora: null" not in card
    seen = RunFolder(config.run).read_evals()[-1]
    tolerance = 1e-2 if engine.get("precision") == "bfloat16" else 1e-5
    assert evaluate_model(str(out), [cache.root], None)["forward_kl"] == pytest.approx(
        seen["forward_kl"], rel=tolerance
    )
    measured = evaluate_config(config, None, "last", more=More(forgetting=str(cache.root)))
    assert measured["forward_kl"] == pytest.approx(seen["forward_kl"], rel=tolerance)
    before = RunFolder(config.run).read_evals()[0]
    kl = [measured["forgetting"][when]["forward_kl"] for when in ("before", "after")]
    assert kl == pytest.approx([before["forward_kl"], seen["forward_kl"]], rel=tolerance)
    assert evaluate_config(config, None, "initial")["forward_kl"] == pytest.approx(before["forward_kl"], rel=1e-5)
    with pytest.raises(ConfigError, match="already exists"):
        export(config, _last(config), out, adapter_only=False, tokenizer=None)


@pytest.mark.usefixtures("own_tokenizer")
def test_adapter_alone_gives_the_merged_logits(
    trainer: Trainer, tmp_path: Path, cache: SyntheticCache, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a configuration has it that was written for one directory.
    monkeypatch.chdir(student.parent)
    config = _trained(replace(trainer, student=Path(student.name)), {}, {"trainable": "lora"})
    result = export(config, _last(config), tmp_path / "adapter", adapter_only=True, tokenizer=None)
    assert not list((tmp_path / "adapter").glob("model*.safetensors"))
    assert f"library_name: peft\npipeline_tag: text-generation\nbase_model: {student.name}\n" in (
        (tmp_path / "adapter" / "README.md").read_text()
    )
    assert export_lines(result)[1] == f"base model: {student}"
    with pytest.raises(ConfigError, match="is a LoRA adapter without its model: export it merged"):
        evaluate_model(str(tmp_path / "adapter"), [cache.root], None)
    with monkeypatch.context() as patch:
        patch.setattr("student_train.assess.evaluating.evaluate", _out_of_memory)
        with pytest.raises(StillroomError, match=r"CUDA out of memory\. Lower data"):
            evaluate_config(config, None, "last")
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(student), str(tmp_path / "adapter"))
    ids = torch.arange(3, 30)[None]
    merged = trained_model(config, _last(config), merged=True)
    assert torch.allclose(loaded(ids).logits, merged(ids).logits, atol=1e-5)
    monkeypatch.chdir(tmp_path)
    assert peft.PeftConfig.from_pretrained("adapter").base_model_name_or_path == str(student)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.usefixtures("own_tokenizer")
def test_an_adapter_on_one_of_two_tied_layers_leaves_the_other(
    trainer: Trainer, tmp_path: Path, student: Path, target: str
) -> None:
    config = _trained(trainer, {}, {"trainable": "lora", "lora": {"targets": [target]}})
    export(config, _last(config), tmp_path / "out", adapter_only=False, tokenizer=None)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(student).config.tie_word_embeddings
    ids = torch.arange(3, 30)[None]
    trained = trained_model(config, _last(config), merged=False)
    assert torch.allclose(trained(ids).logits, merged(ids).logits, atol=1e-5)
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("own", "template", "wanted"),
    [
        (1, "", 1),
        (7, "", 1),
        ([7, 1], "", [7, 1]),
        # A teacher whose answers end with another token than its end of sequence.
        (1, "w2", [1, 2]),
        ([2, 1], "w2", [2, 1]),
        (7, "w2", [1, 2]),
    ],
)
def test_generation_ends_where_answers_do(own: int | list[int], template: str, wanted: int | list[int]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} " + template + "{% endfor %}"
    model = SimpleNamespace(config=GenerationConfig(), generation_config=GenerationConfig(eos_token_id=own))
    adopt_tokens(model, tokenizer)
    assert model.generation_config.eos_token_id == wanted


@pytest.mark.usefixtures("own_tokenizer")
def test_the_card_tells_of_every_stage(trainer: Trainer, tmp_path: Path) -> None:
    losses: Json = {
        "jsd": {"weight": {"kind": "linear", "start": 1.0, "end": 0.5}, "tail": "bucket", "beta": 0.3},
        "skewed_forward_kl": {"weight": {"kind": "exponential", "start": 2.0, "factor": 0.5}, "alpha": 0.2},
        "cross_entropy": 0.1,
    }
    stages: list[Json] = [
        {"name": "sums", "max_steps": 1, "where": "source = 'sums'", "losses": losses, "focal_gamma": 2},
        {"name": "all", "max_steps": 1, "token_weights": {"entropy": 0.5}, "adversarial": {"epsilon": 0.05}},
    ]
    data = {
        "weight": "1 + num_tokens",
        "steps": {"pattern": "w", "min_tokens": 2},
        "terms": {"words": ["w"], "whole_words": False},
    }
    config = trainer.config("run", *stages, eval=None, data=data)
    trainer.run(config)
    export(config, _last(config), tmp_path / "out", adapter_only=False, tokenizer=None)
    lines = [line for line in (tmp_path / "out" / "README.md").read_text().splitlines() if line.startswith("- Stage")]
    sizes = [
        f"({one.num_chains} chains, {one.num_tokens} completion tokens)"
        for one in (load_selection(RunFolder(config.run).selection_path(name)).header for name in ("sums", "all"))
    ]
    weights = "chains weighted by `1 + num_tokens`; chains split at their steps; terms weighted 3 times"
    first = (
        "losses jsd x linear from 1 to 0.5 (tail bucket, beta 0.3), skewed_forward_kl x exponential from 2 "
        "by 0.5 a step (alpha 0.2), cross_entropy x 0.1; peak rate 0.01; focal_gamma 2"
    )
    second = "losses forward_kl x 0.9, cross_entropy x 0.1; peak rate 0.01; token_weights entropy 0.5"
    second += "; prompts disturbed with epsilon 0.05, steps 1, fraction 0.5"
    assert lines == [
        f"- Stage sums: trains all on `source = 'sums'` {sizes[0]}; {first}; {weights}",
        f"- Stage all: trains all on `split = 'train'` {sizes[1]}; {second}; {weights}",
    ]


def test_tokenizer_that_nobody_has_is_refused(
    trainer: Trainer, tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The teacher's name is not a hub id: without this the hub would be asked for half a minute.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = _trained(trainer, {}, {})
    with pytest.raises(DataError, match="pass the folder that has it with --tokenizer"):
        export(config, _last(config), tmp_path / "out", adapter_only=False, tokenizer=None)
    selection = load_selection(RunFolder(config.run).selection_path("distill"))
    with pytest.raises(ConfigError, match="is not the cache's"):
        cache_tokenizer(config.student, selection, str(student))
    with pytest.raises(ConfigError, match="--adapter-only needs a LoRA checkpoint"):
        export(config, _last(config), tmp_path / "out", adapter_only=True, tokenizer=None)
    assert not (tmp_path / "out").exists()


def test_student_with_fewer_rows_learns_the_padded_ids_too(trainer: Trainer, tmp_path: Path) -> None:
    """Relatives differ in how far they pad their embeddings."""
    narrow = make_student(tmp_path / "narrow", vocab_size=290, tokenizer=make_tokenizer(), tied=False)
    config = _trained(replace(trainer, student=narrow), {}, {})
    model = trained_model(config, _last(config), merged=True)
    assert model.get_output_embeddings().weight.shape[0] == 300


def _trained(trainer: Trainer, engine: Json, stage: Json) -> TrainConfig:
    short: Json = {"epochs": 1, "max_steps": 2, "learning_rate": 0.05, **stage}
    return trainer.finished(short, engine=engine, eval={"max_chains": None})


def _last(config: TrainConfig) -> CheckpointState:
    return find_state(RunFolder(config.run).checkpoints, "last")


def _out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")
