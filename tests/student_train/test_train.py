"""Training in one process: agreement with a dense reference on unpacked sequences, resumption, stages, refusals."""

import datetime
import functools
import gc
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import deepspeed
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from stillroom.config import Json, load_config
from stillroom.errors import CacheConflict, ConfigError, DataError, StillroomError
from stillroom.html.report import Figure, Table
from stillroom.log import format_count
from stillroom.program import StopRequest
from stillroom.storage.paths import write_text_atomic
from student_train.assess.evaluating import evaluate_config, evaluate_model
from student_train.commands.result_lines import plan_lines, run_lines
from student_train.config.run import TrainConfig
from student_train.data.pack import to_torch
from student_train.data.selection import load_selection
from student_train.exporting import trained_model
from student_train.model.importance import init_calibration
from student_train.model.prune import init_student
from student_train.model.student import Student, load_student
from student_train.planning.estimate import plan_run
from student_train.report import student_sections
from student_train.runtime.checkpoint import find_state, tags
from student_train.runtime.cost import read_sessions
from student_train.runtime.run_folder import RunFolder, summarise
from student_train.training.loop import train
from tests.helpers import ROOT
from tests.helpers.caches import CacheShape, Chain, SyntheticCache, write_cache
from tests.helpers.dense_losses import stored_kl
from tests.helpers.students import VOCAB_SIZE, make_student, make_tokenizer
from tests.helpers.training import IGNORE_LIBRARY_WARNINGS, StopAfter, Trainer, losses_of

pytestmark = IGNORE_LIBRARY_WARNINGS

Dense = tuple[float, float, float, float, float]
DenseReference = Callable[[float, float, float], Dense]


@pytest.fixture
def trainer(trainer: Trainer) -> Trainer:
    """Steps of two packs: a tiny model takes its time by the pack."""
    return replace(trainer, pack_tokens=256)


@pytest.fixture(scope="module")
def dense_reference(cache: SyntheticCache, student: Path) -> DenseReference:
    """`_dense_reference` of the cache and the student, computed once for equal arguments."""
    return functools.cache(lambda entropy, tail, chunk: _dense_reference(cache, student, entropy, tail, chunk))


@pytest.mark.parametrize(
    ("pack_tokens", "zero_stage", "attention"),
    [(64, 2, "sdpa"), (1024, 1, "sdpa"), (256, 3, "eager"), (128, 0, "sdpa")],
)
def test_step_equals_dense_mean_over_unpacked_chains(
    trainer: Trainer, dense_reference: DenseReference, pack_tokens: int, zero_stage: int, attention: str
) -> None:
    """One step over everything: loss and gradient are those of each chain alone, averaged over all loss tokens."""
    config = trainer.config(
        "run",
        {"epochs": 1, "batch_tokens": 8192, "clip_norm": None},
        data={"pack_tokens": pack_tokens},
        engine={"zero_stage": zero_stage},
        student={"attention": attention},
        eval=None,
    )
    (record,) = trainer.run(config)
    loss, kl, ce, _, grad_norm = dense_reference(0.0, 0.0, 0.0)
    assert record["loss"] == pytest.approx(loss, rel=1e-5)
    assert record["parts"]["forward_kl"] == pytest.approx(kl, rel=1e-5)
    assert record["parts"]["cross_entropy"] == pytest.approx(ce, rel=1e-5)
    assert record["num_loss_tokens"] == sum(len(chain.token_ids) for chain in _train_chains(trainer.cache))
    assert record["grad_norm"] == pytest.approx(grad_norm, rel=1e-4)


def test_token_weights_make_the_loss_a_weighted_mean(
    trainer: Trainer, dense_reference: DenseReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradient against dense sums with (1 + entropy)^2 (1 - tail)^3 on every token, a chunk of its own."""
    learnt = Mock(wraps=to_torch)
    monkeypatch.setattr("student_train.training.stage.to_torch", learnt)
    config = trainer.config(
        "run",
        {
            "epochs": 1,
            "batch_tokens": 8192,
            "clip_norm": None,
            "token_weights": {"entropy": 2.0, "tail": 3.0},
            "losses": {
                "forward_kl": 0.9,
                "cross_entropy": 0.1,
                "chunk_likelihood": {"weight": 0.5, "temperature": 3.0},
            },
        },
        eval=None,
    )
    (record,) = trainer.run(config)
    # Of a batch of 32 packs; the others hold nothing.
    assert learnt.call_count < 16
    loss, kl, ce, chunk, grad_norm = dense_reference(2.0, 3.0, 0.5)
    plain_loss = dense_reference(0.0, 0.0, 0.0)[0]
    assert abs(loss - plain_loss) > 1e-3
    assert record["loss"] == pytest.approx(loss, rel=1e-5)
    assert record["parts"]["forward_kl"] == pytest.approx(kl, rel=1e-5)
    assert record["parts"]["cross_entropy"] == pytest.approx(ce, rel=1e-5)
    assert record["parts"]["chunk_likelihood"] == pytest.approx(chunk, rel=1e-5)
    assert record["grad_norm"] == pytest.approx(grad_norm, rel=1e-4)


def test_elastic_weights_follow_the_held_out_loss(trainer: Trainer) -> None:
    elastic: Json = {
        "forward_kl": {"weight": {"kind": "elastic", "start": 0.9, "end": 0.1}},
        "cross_entropy": {"weight": {"kind": "elastic", "start": 0.1, "end": 0.9}},
    }
    stages: list[Json] = [
        {"name": name, "losses": elastic, "max_steps": steps} for name, steps in (("one", 5), ("two", 3))
    ]
    evaluation: Json = {"max_chains": 5, "every_steps": 2}
    whole = trainer.config("whole", *stages, eval=evaluation)
    parted = trainer.config("parted", *stages, eval=evaluation)
    records = trainer.run(whole)
    evals = RunFolder(whole.run).read_evals()
    for record in records:
        here = (record["stage_number"], record["step"])
        before = [one["forward_kl"] for one in evals if (one["stage_number"], one["step"]) < here]
        # A stage begins where the one before it ended.
        start = [one["forward_kl"] for one in evals if (one["stage_number"], one["step"]) < (here[0], 1)][-1]
        remaining = min(1.0, before[-1] / start)
        assert record["weights"]["forward_kl"] == pytest.approx(0.1 + 0.8 * remaining)
        assert record["weights"]["cross_entropy"] == pytest.approx(0.9 - 0.8 * remaining)
    assert records[0]["weights"]["cross_entropy"] == pytest.approx(0.1)
    assert records[4]["weights"]["cross_entropy"] > 0.101
    trainer.run(parted, stop_after=3)
    assert losses_of(trainer.run(parted)) == losses_of(records)
    changed = trainer.config("parted", *stages, eval={**evaluation, "every_steps": 3})
    with pytest.raises(ConfigError, match=r"was started with eval\.every_steps=2, now it is 3"):
        trainer.finish(changed)


@pytest.mark.parametrize(
    "engine",
    [
        {"zero_stage": 0},
        {"zero_stage": 3},
        {"zero_stage": 0, "precision": "bfloat16"},
        {"zero_stage": 2, "precision": "bfloat16"},
        {"zero_stage": 1, "precision": "float16"},
        {"zero_stage": 2, "precision": "float16"},
    ],
)
def test_every_precision_takes_the_same_steps(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, engine: Json) -> None:
    """Losses after several steps, and so the steps, are those of float32 at ZeRO 2 within the precision's rounding."""
    # torch computes float16 on any CPU, DeepSpeed asks for one that is fast at it.
    monkeypatch.setattr(deepspeed.accelerator.get_accelerator(), "is_fp16_supported", lambda: True)
    expected = trainer.reference({"max_steps": 5}, eval=None)
    records = trainer.run(trainer.config("run", {"max_steps": 5}, eval=None, engine=engine))
    half = engine.get("precision") is not None
    assert losses_of(records) == pytest.approx(losses_of(expected), rel=2e-3 if half else 1e-5)
    norms, expected_norms = ([one["grad_norm"] for one in run] for run in (records, expected))
    assert norms == pytest.approx(expected_norms, rel=3e-2 if half else 1e-3)
    assert not any(one["skipped"] for one in records)


def test_a_step_that_overflows_is_shown_and_learns_nothing(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed.accelerator.get_accelerator(), "is_fp16_supported", lambda: True)
    # A weight of this size makes the scaled gradient of the first steps too large for float16.
    stage: Json = {"batch_tokens": 256, "max_steps": 25, "losses": {"cross_entropy": 50.0}}
    config = trainer.config("run", stage, engine={"precision": "float16"}, eval=None)
    summary = trainer.finish(config)
    records = RunFolder(config.run).read_metrics()
    skipped = [one["skipped"] for one in records]
    assert skipped[0]
    assert not skipped[-1]
    assert [one["grad_norm"] is None for one in records] == skipped
    assert summary["num_skipped_steps"] == sum(skipped)
    assert any("float16 overflow" in line for line in run_lines(summary))


def test_a_precision_that_the_machine_lacks_is_refused(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed.accelerator.get_accelerator(), "is_fp16_supported", lambda: False)
    config = trainer.config("run", engine={"precision": "float16"}, eval=None)
    with pytest.raises(ConfigError, match=r"precision=float16 is not supported on this cpu: choose float32, bfloat16"):
        trainer.finish(config)
    with pytest.raises(ConfigError, match="float16 needs zero_stage 1, 2 or 3"):
        trainer.config("run", engine={"precision": "float16", "zero_stage": 0})


def test_held_out_chains_may_change_between_resumptions(trainer: Trainer, tmp_path: Path) -> None:
    """Eval turned on late and then changed: evaluated on what is asked, and compared with nothing else."""
    run = RunFolder(tmp_path / "run")

    def resume(steps: int, evaluation: Json | None) -> Json:
        config = trainer.config("run", {"epochs": 3}, eval=evaluation)
        trainer.run(config, stop_after=steps)
        return summarise(run, config)

    assert resume(2, None)["heldout_after"] is None
    late = resume(2, {"max_chains": 5, "every_steps": 2})
    assert late["heldout_before"] is None
    assert late["heldout_after"]["num_chains"] == 5
    assert late["best_checkpoint"] == "distill-000004"
    other = resume(2, {"max_chains": 3, "where": "split = 'heldout' AND source = 'stories'", "every_steps": 2})
    assert other["heldout_after"]["num_chains"] == 3
    assert other["heldout_after"]["where"] == "split = 'heldout' AND source = 'stories'"
    # The best on other chains does not compete with what is measured now.
    assert other["best_checkpoint"] == "distill-000006"


def test_held_out_numbers_before_and_after_are_of_the_same_chains(trainer: Trainer, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    config = trainer.config("run")
    trainer.run(config, stop_after=2)
    assert summarise(run, config)["heldout_before"]["step"] == 0
    changed = trainer.config("run", eval={"max_chains": 4})
    summary = trainer.finish(changed)
    assert summary["heldout_before"] is None
    assert summary["heldout_after"]["num_chains"] == 4


@pytest.mark.parametrize(
    ("engine", "stage"),
    [
        ({"zero_stage": 2}, {}),
        ({"zero_stage": 0, "precision": "bfloat16", "gradient_checkpointing": True}, {}),
        ({"zero_stage": 3, "precision": "bfloat16"}, {"trainable": "head"}),
        ({"zero_stage": 3}, {"trainable": "lora", "lora": {"r": 4, "dropout": 0.2}}),
        ({"zero_stage": 2, "offload_optimizer": True}, {"weight_decay": 0.1}),
    ],
)
def test_interrupted_run_resumes_bit_for_bit(trainer: Trainer, engine: Json, stage: Json) -> None:
    # The second epoch begins in the last step.
    stage = {**stage, "max_steps": 4}
    whole = trainer.finished(stage, engine=engine)
    parted = trainer.config("parted", stage, engine=engine)
    records = RunFolder(whole.run).read_metrics()
    expected = losses_of(records)
    assert losses_of(trainer.run(parted, stop_after=2)) == expected[:2]
    assert losses_of(trainer.run(parted)) == expected
    evals = [RunFolder(config.run).read_evals() for config in (whole, parted)]
    assert evals[0] == evals[1]
    first, second = read_sessions(RunFolder(parted.run).sessions_path)
    assert first.num_tokens + second.num_tokens >= sum(one["num_tokens"] for one in records)
    assert min(first.seconds, second.seconds) > 0
    assert (first.num_devices, first.device) == (1, second.device)


def test_what_a_kill_left_behind_is_swept_and_done_again(trainer: Trainer) -> None:
    config = trainer.config("run")
    expected = losses_of(trainer.reference())
    trainer.run(config, stop_after=4)
    run = RunFolder(config.run)
    # As after a kill in the middle of step 6's line and of the checkpoint after it.
    with run.metrics_path.open("a") as file:
        file.write('{"stage_number": 0, "step": 5, "loss": 123.0}\n{"stage_number": 0, "st')
    (run.checkpoints / "distill-000006.tmp").mkdir()
    (run.checkpoints / "distill-000006.tmp" / "mp_rank_00_model_states.pt").write_bytes(b"torn")
    run.add_eval({"stage_number": 0, "step": 6, "forward_kl": 123.0})
    assert losses_of(trainer.run(config)) == expected
    assert [one["step"] for one in run.read_evals()] == [0, 7]
    assert not list(run.checkpoints.glob("*.tmp"))


def test_finished_run_is_left_as_it_is(trainer: Trainer) -> None:
    config = trainer.config("run", {"max_steps": 2}, tensorboard=True)
    first = trainer.finish(config)
    assert first == trainer.finish(config)
    assert first["num_steps"] == 2
    assert list((config.run / "tensorboard").glob("events.*"))


def test_keeps_the_last_checkpoints_and_the_best(trainer: Trainer) -> None:
    config = trainer.config(
        "run",  # The rate rises to a ruinous one: the first evaluation is the best.
        {"learning_rate": 1.0, "warmup_frac": 0.99, "clip_norm": None},
        checkpoint={"every_steps": 1, "keep_last": 2},
        eval={"every_steps": 1, "max_chains": 5},
    )
    trainer.run(config)
    run = RunFolder(config.run)
    evals = {one["step"]: one["forward_kl"] for one in run.read_evals() if one["step"] > 0}
    best_step = min(evals, key=lambda step: evals[step])
    assert find_state(run.checkpoints, "best").step == best_step
    assert set(tags(run.checkpoints)) == {f"distill-{step:06d}" for step in {best_step, 6, 7}}
    assert evaluate_config(config, None, "best")["forward_kl"] == pytest.approx(evals[best_step], rel=1e-5)


def test_stages_follow_each_other(trainer: Trainer, cache: SyntheticCache, student: Path) -> None:
    stages: list[Json] = [
        {"name": "head", "trainable": "head", "max_steps": 1, "losses": {"cross_entropy": 1}},
        {"name": "lora", "trainable": "lora", "max_steps": 2, "where": "split = 'train' AND source = 'sums'"},
        {
            "name": "all",
            "max_steps": 2,
            "losses": {
                "forward_kl": {"weight": {"kind": "linear", "start": 1.0, "end": 0.5}},
                "jsd": {"weight": {"kind": "linear", "start": 0.0, "end": 0.5}, "beta": 0.3},
            },
        },
    ]
    every_chain: Json = {"max_chains": None}
    whole = trainer.config("whole", *stages, eval=every_chain)
    parted = trainer.config("parted", *stages, eval=every_chain)
    expected = trainer.run(whole)
    # It is also asked at the end of the first stage.
    trainer.run(parted, stop_after=3)
    assert losses_of(trainer.run(parted)) == losses_of(expected)
    assert [record["stage"] for record in expected] == ["head"] + ["lora"] * 2 + ["all"] * 2
    assert [record["weights"]["jsd"] for record in expected[3:]] == [0.0, 0.5]
    # Each stage's model is a folder of its own, with the adapter merged: evaluated alone it is what the run saw.
    for entry in RunFolder(whole.run).read_evals()[1:3]:
        folder = _with_tokenizer(RunFolder(whole.run).model_after(entry["stage"]), student)
        alone = evaluate_model(str(folder), [cache.root], None)
        assert alone["num_tokens"] == entry["num_tokens"]
        assert alone["forward_kl"] == pytest.approx(entry["forward_kl"], rel=1e-5)


def test_a_stage_leaves_no_tensors_in_memory(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    num_alive = []

    def counted(*arguments: Any, **options: Any) -> Student:
        # By type: an instance check would ask every lazy object of torch for its class.
        num_alive.append(sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()))
        return load_student(*arguments, **options)

    monkeypatch.setattr("student_train.training.stage.load_student", counted)
    stages: list[Json] = [{"name": name, "max_steps": 1} for name in ("first", "second")]
    # What tests before have left must not count for the first stage alone.
    gc.collect()
    trainer.run(trainer.config("run", *stages, eval=None))
    assert num_alive[1] == num_alive[0]


def test_a_stop_in_the_last_step_of_a_stage_ends_there(trainer: Trainer) -> None:
    stages: list[Json] = [{"name": "one", "max_steps": 2}, {"name": "two", "max_steps": 2}]
    config = trainer.config("run", *stages, eval=None)
    assert len(trainer.run(config, stop_after=2)) == 2
    # In the last step of all it changes nothing.
    assert train(config, trainer.ranks, StopAfter(2))["num_steps"] == 4


def test_a_finished_run_says_so_and_does_nothing(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = trainer.config("run", {"max_steps": 3})
    summary = trainer.finish(config)
    said = capsys.readouterr().err
    # The last step's line comes once, before the evaluation after it.
    steps = [line.split("  ")[0] for line in said.splitlines() if line.startswith(("train", "evaluate"))]
    assert steps == ["evaluate", "train distill", "evaluate"]
    monkeypatch.setattr(
        "student_train.training.loop.prepare", lambda *_, **__: pytest.fail("nothing is left to prepare")
    )
    assert trainer.finish(config) == summary
    assert capsys.readouterr().err.startswith("the run is finished: nothing is left to train")


def test_the_end_of_a_run_compares_only_what_is_alike(trainer: Trainer) -> None:
    changing = {
        "jsd": {"weight": {"kind": "linear", "start": 1.0, "end": 0.0}},
        "cross_entropy": {"weight": {"kind": "linear", "start": 0.0, "end": 1.0}},
    }
    stages: list[Json] = [{"name": "same", "max_steps": 2}, {"name": "other", "max_steps": 2, "losses": changing}]
    config = trainer.config("run", *stages, eval=None)
    lines = run_lines(trainer.finish(config))
    records = RunFolder(config.run).read_metrics()
    kl, jsd = ([one["parts"].get(name) for one in records] for name in ("forward_kl", "jsd"))
    ce = [one["parts"]["cross_entropy"] for one in records]
    loss = losses_of(records)
    assert lines[0] == (
        f"same       2 steps, loss {loss[0]:.4f} -> {loss[1]:.4f} "
        f"(kl {kl[0]:.4f} -> {kl[1]:.4f}, ce {ce[0]:.4f} -> {ce[1]:.4f})"
    )
    assert lines[1] == f"other      2 steps, jsd {jsd[2]:.4f} -> {jsd[3]:.4f}, ce {ce[2]:.4f} -> {ce[3]:.4f}"
    num_read, num_learnt = (format_count(sum(one[n] for one in records)) for n in ("num_tokens", "num_loss_tokens"))
    assert lines[2].startswith(f"read       {num_read} tokens ({num_learnt} in the loss) in ")
    assert lines[3].startswith("took       ")
    assert lines[4] == f"checkpoint {config.run}/checkpoints/other-000002"
    assert f"student-train export {config.run}/config.yaml --out FOLDER" in lines[5]


def test_another_meaning_is_refused_by_name(trainer: Trainer) -> None:
    trainer.run(trainer.config("run", {"max_steps": 1}))
    changed = trainer.config("run", {"max_steps": 1, "learning_rate": 2e-2})
    with pytest.raises(ConfigError, match=r"stages\.0\.learning_rate=0\.01, now it is 0\.02: set"):
        trainer.finish(changed)
    changed = trainer.config("run", {"max_steps": 2, "learning_rate": 2e-2}, seed=1)
    with pytest.raises(
        ConfigError, match=r"seed=0, now it is 1 \(other keys that differ: stages.0.max_steps, stages.0.le"
    ):
        trainer.finish(changed)
    kept_longer = trainer.config("run", {"max_steps": 1}, checkpoint={"keep_last": 5})
    trainer.finish(kept_longer)


def test_until_there_is_a_checkpoint_a_run_may_still_mean_another_thing(
    trainer: Trainer, tmp_path: Path, cache: SyntheticCache
) -> None:
    run = tmp_path / "run"
    refused = trainer.config("run", data={"where": "correct"}, eval={"where": "split = 'nowhere'"})
    with pytest.raises(ConfigError, match="selects none"):
        trainer.finish(refused)
    frozen = RunFolder(run).selection_path("distill")
    assert frozen.exists()
    assert not RunFolder(run).has_frozen(trainer.config("run"))
    repaired = trainer.config("run", data={"where": "num_tokens < 30"})
    trainer.run(repaired)
    assert load_selection(frozen, [cache.root]).header.where == "num_tokens < 30"
    assert RunFolder(run).has_frozen(repaired)
    with pytest.raises(ConfigError, match=r"was started with data\.where='num_tokens < 30', now it is 'correct'"):
        trainer.finish(refused)


def test_two_processes_never_train_one_run(trainer: Trainer) -> None:
    config = trainer.config("run", {"max_steps": 1})
    with RunFolder(config.run).lock(), pytest.raises(CacheConflict, match="in use by another process"):
        trainer.finish(config)


def test_a_nan_loss_ends_the_run(trainer: Trainer, tmp_path: Path) -> None:
    broken = make_student(tmp_path / "broken")
    model = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    model.save_pretrained(broken)
    config = trainer.config("run", student={"model": str(broken)}, eval=None)
    with pytest.raises(StillroomError, match=r"stages.0 \(distill\): the loss is nan at step 1: lower"):
        trainer.finish(config)


@pytest.mark.parametrize(
    "engine", [{"zero_stage": 0}, {"zero_stage": 2}, {"zero_stage": 3}, {"zero_stage": 0, "precision": "bfloat16"}]
)
def test_a_stage_that_skips_every_step_fails(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, engine: Json) -> None:
    def overflowing(*arguments: Any, **options: Any) -> Student:
        loaded = load_student(*arguments, **options)
        loaded.causal.model.norm.weight.register_hook(lambda grad: grad * torch.inf)
        return loaded

    monkeypatch.setattr("student_train.training.stage.load_student", overflowing)
    config = trainer.config("run", {"max_steps": 2}, eval=None, engine=engine)
    with pytest.raises(
        StillroomError, match=r"all 2 steps were skipped because the gradient was not finite, and nothing was learned"
    ):
        trainer.finish(config)
    assert [one["skipped"] for one in RunFolder(config.run).read_metrics()] == [True, True]
    assert not tags(RunFolder(config.run).checkpoints)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_broken_weights_are_never_a_checkpoint_and_the_run_can_go_back(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, zero_stage: int
) -> None:
    """The advice of the message is followed: an earlier step, a lower rate."""
    blocks: Json = {
        "checkpoint": {"every_steps": 1, "keep_last": 9},
        "engine": {"zero_stage": zero_stage},
        "eval": None,
    }
    config = trainer.config("run", {"max_steps": 5}, **blocks)
    run = RunFolder(config.run)
    before = trainer.run(config, stop_after=3)
    with monkeypatch.context() as patch:
        patch.setattr("student_train.training.stage.learning_rate", lambda *_: 1e39)
        with pytest.raises(StillroomError) as caught:
            trainer.finish(config)
    assert "weights or moments are not finite after step 4, so it is not saved: go back" in str(caught.value)
    advice = f"student-train run {run.config_path} --from-step 3 --set stages.0.learning_rate=0.005 (checkpoints of"
    assert advice in str(caught.value)
    assert len(tags(run.checkpoints)) == 3

    slower = trainer.config("run", {"learning_rate": 5e-3, "max_steps": 5}, **blocks)
    with pytest.raises(ConfigError, match="set it back to resume, resume from a checkpoint with --from-step, or"):
        trainer.finish(slower)
    with pytest.raises(DataError, match="--from-step 6: stage distill has checkpoints of steps 1, 2, 3"):
        train(slower, trainer.ranks, StopRequest(), 6)
    with pytest.raises(ConfigError, match=r"started with seed=0, now it is 1: set"):
        train(trainer.config("run", {"max_steps": 5}, seed=1, **blocks), trainer.ranks, StopRequest(), 2)
    train(slower, trainer.ranks, StopRequest(), 2)
    records = run.read_metrics()
    assert [one["step"] for one in records] == [1, 2, 3, 4, 5]
    assert losses_of(records)[:3] == losses_of(before)
    assert records[2]["learning_rate"] == pytest.approx(before[2]["learning_rate"] / 2)
    assert records[3]["loss"] != before[2]["loss"]
    (change,) = run.read_changes()
    assert (change["step"], change["keys"]) == (2, {"stages.0.learning_rate": [1e-2, 5e-3]})
    assert trainer.finish(slower)["num_steps"] == 5


def test_another_clip_norm_counts_after_from_step(trainer: Trainer) -> None:
    """In bfloat16, where DeepSpeed clips and would load the limit that it saved."""
    stage: Json = {"max_steps": 3}
    blocks: Json = {"eval": None, "checkpoint": {"every_steps": 1, "keep_last": 9}, "engine": {"precision": "bfloat16"}}
    before = losses_of(trainer.run(trainer.config("run", stage, **blocks)))
    train(trainer.config("run", {**stage, "clip_norm": 1e-9}, **blocks), trainer.ranks, StopRequest(), 1)
    after = losses_of(RunFolder(trainer.folder / "run").read_metrics())
    assert after[:2] == before[:2]
    assert after[2] != before[2]


def test_a_checkpoint_that_was_saved_broken_is_not_resumed(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    config = trainer.config("run", {"max_steps": 3}, eval=None, checkpoint={"every_steps": 1, "keep_last": 9})
    trainer.run(config, stop_after=1)
    with monkeypatch.context() as patch:
        patch.setattr("student_train.training.stage.learning_rate", lambda *_: 1e39)
        patch.setattr("student_train.runtime.engine.Engine.is_finite", lambda _: True)
        trainer.run(config, stop_after=1)
    with pytest.raises(StillroomError, match=r"not finite after step 2, .* --from-step 1 "):
        trainer.finish(config)
    assert train(config, trainer.ranks, StopRequest(), 1)["num_steps"] == 3


def _train_chains(cache: SyntheticCache) -> list[Chain]:
    return [chain for chain in cache.chains if chain.split == "train"]


def _dense_reference(cache: SyntheticCache, student: Path, entropy: float, tail: float, chunk_weight: float) -> Dense:
    """(loss, KL, CE, binary KL at 3, norm of the loss's gradient), each chain alone, from full float64 softmaxes.

    Means by weights (1 + entropy)^a (1 - tail mass)^b of the tokens.
    """
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    kl_sum = torch.zeros((), dtype=torch.float64)
    ce_sum = torch.zeros((), dtype=torch.float64)
    chunk_sum = torch.zeros((), dtype=torch.float64)
    weight_sum = 0.0
    for chain in _train_chains(cache):
        held_T = 1 - np.exp(chain.signals.tail_logmass_T.astype(np.float64))
        weights_T = torch.from_numpy((1 + chain.signals.entropy_T.astype(np.float64)) ** entropy * held_T**tail)
        ids = torch.tensor([*chain.prompt_ids, *chain.token_ids])
        logits = model(ids[None]).logits[0].double()
        logprobs_TV = logits[len(chain.prompt_ids) - 1 : -1].log_softmax(dim=-1)
        sampled_T = torch.tensor(chain.token_ids, dtype=torch.int64)
        student_T = logprobs_TV.gather(1, sampled_T[:, None])[:, 0]
        ce_sum = ce_sum - (weights_T * student_T).sum()
        p_T, q_T = torch.from_numpy(np.exp(chain.signals.sampled_logprob_T / 3.0)).double(), (student_T / 3.0).exp()
        binary_T = p_T * (p_T / q_T).log() + (1 - p_T) * ((1 - p_T) / (1 - q_T)).log()
        chunk_sum = chunk_sum + (weights_T * 3.0 * binary_T).sum()
        kl_sum = kl_sum + (weights_T * stored_kl(chain.signals, logprobs_TV)).sum()
        weight_sum += float(weights_T.sum())
    loss = (0.9 * kl_sum + 0.1 * ce_sum + chunk_weight * chunk_sum) / weight_sum
    loss.backward()
    norms = torch.stack([parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None])
    return (
        float(loss.detach()),
        float(kl_sum.detach()) / weight_sum,
        float(ce_sum.detach()) / weight_sum,
        float(chunk_sum.detach()) / weight_sum,
        float(norms.norm()),
    )


def _with_tokenizer(folder: Path, student: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((student / name).read_bytes())
    return folder


def test_config_is_kept_with_the_run(trainer: Trainer) -> None:
    config = trainer.finished()
    kept: TrainConfig = RunFolder(config.run).read_config()
    assert kept == config


def test_steps_with_all_before_them_learn_what_whole_chains_do(
    trainer: Trainer, dense_reference: DenseReference, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = {"pattern": r"w\d*[37](?!\d)", "min_tokens": 4}
    stage: Json = {"epochs": 1, "batch_tokens": 32768, "clip_norm": None}
    config = trainer.config("run", stage, data={"steps": steps}, eval=None)
    (record,) = trainer.run(config)
    loss, *_, grad_norm = dense_reference(0.0, 0.0, 0.0)
    assert record["loss"] == pytest.approx(loss, rel=1e-5)
    assert record["grad_norm"] == pytest.approx(grad_norm, rel=1e-4)
    terms = {"words": ["w151"], "whole_words": False}
    plan = plan_run(
        trainer.config("other", stage, {**stage, "name": "again"}, data={"steps": steps, "terms": terms}), 1
    )
    planned, again = plan["stages"]
    assert (again["num_examples"], again["terms"]) == (planned["num_examples"], planned["terms"])
    # Stages of the same chains share what was found in them.
    assert capsys.readouterr().err.count("mark terms") == 1
    assert planned["num_examples"] > 2 * planned["num_chains"]
    lines = "\n".join(plan_lines(plan))
    assert f"steps      {planned['num_examples']} examples, " in lines
    assert "count 3x: w151 " in lines
    write_text_atomic(config.run / "distill.terms-0.json", json.dumps(planned["terms"]))
    shown = [one for one in student_sections(config.run)[2].pieces if isinstance(one, Table)]
    assert (shown[0].title, shown[0].rows[0][0]) == ("Weighted terms of stage distill", "w151")


def test_shifts_of_no_size_change_nothing(trainer: Trainer) -> None:
    """So small that no embedding changes, in every pack: losses are those without shifts, dropout included."""
    stage: Json = {"max_steps": 2, "trainable": "lora", "lora": {"dropout": 0.2}}
    shifted = {**stage, "adversarial": {"epsilon": 1e-30, "steps": 2, "fraction": 1}}
    records = trainer.run(trainer.config("run", shifted, eval=None))
    assert losses_of(records) == losses_of(trainer.reference(stage, eval=None))
    assert [one["adversarial_rise"] for one in records] == [0.0] * 2


def test_disturbed_training_resumes_and_agrees_under_zero(trainer: Trainer) -> None:
    stage: Json = {"max_steps": 3, "adversarial": {"epsilon": 0.2, "steps": 2, "fraction": 0.5}}
    expected = trainer.run(trainer.config("expected", stage, eval=None, engine={"zero_stage": 0}))
    whole, parted = (trainer.config(name, stage, eval=None, engine={"zero_stage": 3}) for name in ("whole", "parted"))
    records = trainer.run(whole)
    assert losses_of(records) == pytest.approx(losses_of(expected), rel=1e-5)
    rises = [one["adversarial_rise"] for one in records if one["adversarial_rise"] is not None]
    assert rises
    assert min(rises) > 0
    trainer.run(parted, stop_after=1)
    assert losses_of(trainer.run(parted)) == losses_of(records)
    titles = [one.title for section in student_sections(whole.run) for one in section.pieces if isinstance(one, Figure)]
    assert "Disturbed prompts" in titles
    summary = summarise(RunFolder(whole.run), whole)
    assert summary["stages"][0]["adversarial_rise"] == pytest.approx(sum(rises) / len(rises))
    assert f"disturbed prompts raised the loss by {sum(rises) / len(rises):.4f} on average" in run_lines(summary)[0]


def test_progressive_students_are_each_cut_from_the_last(trainer: Trainer, tmp_path: Path) -> None:
    """docs/examples/progressive.yaml, small."""
    make_student(tmp_path / "teacher", layers=9)
    stages = [f"stages.{number}.{key}" for number in range(3) for key in ("batch_tokens=128", "max_steps=1")]
    prunes = [f"stages.{number}.prune.calibration_tokens=32" for number in (1, 2)]
    places = [f"run={tmp_path / 'run'}", f"student.model={tmp_path / 'student'}", f"data.caches=[{trainer.cache.root}]"]
    init = [f"student.init.teacher={tmp_path / 'teacher'}", "student.init.calibration_tokens=32"]
    engine = ["data.pack_tokens=128", "engine.precision=float32", "eval=null"]
    path = ROOT / "docs/examples/progressive.yaml"
    config = load_config(path, [*places, *init, *engine, *stages, *prunes], TrainConfig)
    asked = config.student.init
    assert asked is not None
    init_student(asked, Path(config.student.model), lambda: init_calibration(config, asked))
    trainer.run(config)
    folders = [config.run / "stages" / name for name in ("eight", "six.pruned", "six", "four.pruned")]
    layers = [json.loads((one / "config.json").read_text())["num_hidden_layers"] for one in folders]
    assert layers == [8, 6, 6, 4]


def test_students_are_trained_again_as_their_cache_grows(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/recipes/continual.md, small: old chains are from before its date, new ones from after it."""
    page = (ROOT / "docs/recipes/continual.md").read_text(encoding="utf-8")
    shape = CacheShape(num_chains=30, vocab_size=VOCAB_SIZE, max_tokens=40)
    with monkeypatch.context() as past:
        past.setattr("tests.helpers.caches.CREATED_AT", datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC))
        old = write_cache(tmp_path / "cache", shape)
    pins = f"chains_version: {old.catalog.chains.version}, verdicts_version: {old.catalog.verdicts.version}"
    places = {
        "/shared/caches/r1-7b-math": str(old.root),
        "/shared/students/of-march": str(tmp_path / "of-march"),
        "/shared/runs": str(tmp_path),
        "Qwen/Qwen2.5-1.5B": str(trainer.student),
        "chains_version: 128, verdicts_version: 40": pins,
    }
    configs = []
    for number, block in enumerate(re.findall(r"^```yaml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)):
        for shown, here in places.items():
            block = block.replace(shown, here)
        (tmp_path / f"{number}.yaml").write_text(block)
        small = ["data.pack_tokens=128", "stages.0.batch_tokens=256", "stages.0.max_steps=1", "eval=null"]
        configs.append(load_config(tmp_path / f"{number}.yaml", [*small, "engine.precision=float32"], TrainConfig))
    march, june = configs
    new = write_cache(old.root, replace(shape, seed=1))
    trainer.run(march)
    state = find_state(RunFolder(march.run).checkpoints, "last")
    trained_model(march, state, merged=True).save_pretrained(tmp_path / "of-march")
    # Synthetic caches name a tokenizer that is nowhere, so `export` finds none.
    make_tokenizer().save_pretrained(tmp_path / "of-march")
    trainer.run(june)
    chains = ([one for one in made.chains if one.split == "train" and one.correct] for made in (old, new))
    before, after = ({int(one.sample_id[:16], 16) for one in each} for each in chains)
    first, second = (load_selection(RunFolder(one.run).selection_path("distill")).key_R for one in (march, june))
    assert set(first.tolist()) == before
    assert after <= set(second.tolist()) <= before | after
    assert len(set(second.tolist()) & before) < len(before) / 2
