"""Training on the student's own chains, on wrong chains, on several teachers and on other prompts.

What stands in another cache meets its token by key, resumed runs repeat the losses bit for bit, and settings that
change nothing are refused.
"""

import dataclasses
import errno
import json
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from stillroom.config import Json, plain
from stillroom.errors import ConfigError, StillroomError
from stillroom.schema.records import Signals, stable_hash
from student_train.config.data import PromptConfig
from student_train.data import prepared
from student_train.data.attached import Attached
from student_train.data.lookup import ChainIndex
from student_train.data.open import open_data, train_request
from student_train.data.pack import TargetView, to_torch
from student_train.data.prepared import PreparedRows, render_prompts, template_arguments
from student_train.data.selection import Selection, load_selection
from student_train.data.stream import PackStream
from student_train.data.token_numbers import TokenNumbers, write_behaviour
from student_train.evaluation import student_metrics
from student_train.model.student import load_student
from student_train.planning import files
from student_train.planning.estimate import plan_run
from student_train.planning.plan import prepare
from student_train.runtime import start as start_module
from student_train.runtime.ranks import RANK_VARIABLES, Ranks
from student_train.runtime.run_folder import RunFolder
from student_train.runtime.start import open_start
from tests.helpers.caches import CacheShape, Chain, SyntheticCache, make_cache, write_cache, write_chains
from tests.helpers.programs import Program
from tests.helpers.students import VOCAB_SIZE, make_tokenizer
from tests.helpers.training import IGNORE_LIBRARY_WARNINGS, Trainer, losses_of

pytestmark = IGNORE_LIBRARY_WARNINGS


@pytest.fixture(autouse=True)
def _tokenizer_of_synthetic_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """They name no teacher whose tokenizer could be loaded."""
    monkeypatch.setattr("student_train.exporting.cache_tokenizer", lambda *_: make_tokenizer())


def said(chain: Chain, shift: float) -> Signals:
    """A chain's signals with log probabilities of its tokens that name chain and token."""
    named_T = -(shift + chain.row / 100 + np.arange(len(chain.token_ids)) / 1e4)
    return dataclasses.replace(chain.signals, sampled_logprob_T=named_T.astype(np.float32))


def rewritten(
    root: Path, chains: Sequence[Chain], signals: Sequence[Signals], num_ids: int = VOCAB_SIZE
) -> SyntheticCache:
    """A cache of the same chains, in another order and in shards of other sizes, with other signals."""
    shape = CacheShape(vocab_size=num_ids, max_support=32, rows_per_group=3, groups_per_shard=2, judged=False)
    made = [
        dataclasses.replace(chain, sample_id=stable_hash("again", chain.sample_id), signals=one)
        for chain, one in zip(chains, signals, strict=True)
    ]
    return write_chains(root, shape, made[::-1])


@pytest.fixture(scope="module")
def own(cache: SyntheticCache, tmp_path_factory: pytest.TempPathFactory) -> SyntheticCache:
    """The student's own cache: it wrote two thirds of the chains that the trainer's cache holds."""
    chains = [chain for chain in cache.chains if chain.row % 3]
    return rewritten(tmp_path_factory.mktemp("own") / "own", chains, [said(chain, 1.0) for chain in chains])


def packs_of(selection: Selection, attached: Attached) -> list[Any]:
    from student_train.data.epoch_plan import PlanSpec

    with PackStream(selection, PlanSpec(pack_tokens=128), packs_per_step=1, num_epochs=1) as stream:
        return [attached.to(pack) for pack in stream]


def test_the_behaviour_meets_its_token(trainer: Trainer, own: SyntheticCache, tmp_path: Path) -> None:
    config = trainer.config("run")
    selection = open_data(
        tmp_path / "s.parquet", train_request(config.data, 0, config.stages[0]), config.data, config.student
    )
    path = tmp_path / "behaviour.npy"
    write_behaviour(path, selection, [own.root])
    by_key = {int(chain.sample_id[:16], 16): chain for chain in trainer.cache.chains}
    num_known = 0
    for pack in packs_of(selection, Attached(behaviour=TokenNumbers(path, selection))):
        for row, token, found, taught in zip(
            pack.row_N, pack.token_N, pack.behaviour_logprobs_N, pack.teacher_logprobs_N, strict=True
        ):
            chain = by_key[int(selection.key_R[row])]
            assert taught == chain.signals.sampled_logprob_T[token]
            if chain.row % 3:
                assert found == np.float32(-(1.0 + chain.row / 100 + token / 1e4))
                num_known += 1
            else:
                assert np.isnan(found)
    assert num_known


def test_a_behaviour_that_was_not_sampled_at_temperature_1_is_named(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = trainer.config("run")
    request = train_request(config.data, 0, config.stages[0])
    selection = open_data(tmp_path / "s.parquet", request, config.data, config.student)
    path = tmp_path / "behaviour.npy"
    write_behaviour(path, selection, [trainer.cache.root])
    assert "was sampled with temperature=0.6, top_p=0.95: policy_gradient takes" in capsys.readouterr().err.replace(
        "\n", " "
    )
    # Reserved, so that a full disk is an error here and no signal when it is written to.
    assert path.stat().st_blocks * 512 >= path.stat().st_size

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(StillroomError, match=r"has no room for 0\.00 GB: \[Errno 28\] No space left"):
        write_behaviour(tmp_path / "again.npy", selection, [trainer.cache.root])
    assert not (tmp_path / "again.npy").exists()


def test_chains_that_nobody_wrote_are_refused(trainer: Trainer, own: SyntheticCache, tmp_path: Path) -> None:
    config = trainer.config("run", data={"where": "json_extract_string(metadata, '$.row') = '3'"})
    selection = open_data(
        tmp_path / "s.parquet", train_request(config.data, 0, config.stages[0]), config.data, config.student
    )
    with pytest.raises(ConfigError, match=r"holds none of the 1 selected chains"):
        write_behaviour(tmp_path / "behaviour.npy", selection, [own.root])


OWN_WORDS = {
    "name": "own",
    "epochs": 1,
    "losses": {
        "policy_gradient": 1.0,
        "reverse_kl": 0.5,
        "taid": 0.2,
        "start_kl": 0.1,
        "asymmetric_likelihood": {"weight": 0.1, "alpha": 0.5},
        "unlikelihood": 0.1,
    },
    "negatives": {"where": "split = 'train' and not correct"},
}
PREFERENCE = {
    "name": "preference",
    "max_steps": 2,
    "losses": {"dpo": 1.0, "cross_entropy": 0.1},
    "negatives": {"where": "split = 'train' and not correct"},
    "learning_rate": 3e-3,
}


def test_a_run_on_own_chains_and_wrong_ones_resumes_bit_for_bit(
    trainer: Trainer, own: SyntheticCache, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"behaviour": [str(own.root)]}
    config = trainer.config("whole", OWN_WORDS, PREFERENCE, data=data)
    whole = trainer.run(config)
    told = capsys.readouterr().err
    evals = RunFolder(config.run).read_evals()
    assert [(one["stage"], one["step"] > 0) for one in evals] == [
        ("own", False), ("own", True), ("preference", False), ("preference", True)
    ]  # fmt: skip
    for before, after in (evals[:2], evals[2:]):
        has_fallen = after["right_cross_entropy"] > before["right_cross_entropy"] + 1e-4
        assert (f"right chains have become less likely since stage {after['stage']} began" in told) == has_fallen
    # The first step of a stage starts where the start is: no margin, no distance.
    assert whole[0]["parts"]["start_kl"] == pytest.approx(0.0, abs=1e-6)
    first = next(record for record in whole if record["stage"] == "preference")
    assert first["parts"]["dpo"] == pytest.approx(np.log(2.0), abs=1e-5)
    resumed = trainer.config("resumed", OWN_WORDS, PREFERENCE, data=data, checkpoint={"every_steps": 1})
    trainer.run(resumed, stop_after=2)
    # Computed again from the weights of the stage's start where they were lost.
    for path in sorted((resumed.run / "start" / "own").iterdir()):
        path.unlink()
    assert losses_of(trainer.run(resumed)) == losses_of(whole)


def test_two_ranks_resume_from_one(trainer: Trainer, own: SyntheticCache) -> None:
    """With the weights spread too (ZeRO 3), through a stage on single chains and one on pairs."""
    preference = {**PREFERENCE, "losses": {"dpo": 1.0, "cross_entropy": 0.1, "start_kl": 0.1}}
    blocks: Json = {"data": {"behaviour": [str(own.root)]}, "engine": {"zero_stage": 3}}
    whole = trainer.run(trainer.config("whole", OWN_WORDS, preference, **blocks))
    config = trainer.config("run", OWN_WORDS, preference, **blocks)
    trainer.run(config, stop_after=2)
    path = trainer.folder / "config.yaml"
    path.write_text(yaml.safe_dump(plain(config)))
    environ = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    code, _, said = Program(["student-train", "run", str(path), "--nproc", "2"], environ=environ).communicate()
    assert code == 0, said
    assert "resuming after step 2 of 4 of stage own, on 2 ranks (the checkpoint was saved by 1)" in said
    found = RunFolder(config.run).read_metrics()
    assert losses_of(found) == pytest.approx(losses_of(whole), rel=1e-3)


def test_wrong_chains_that_come_while_a_run_begins_are_not_imitated(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = CacheShape(num_chains=20, vocab_size=VOCAB_SIZE, max_tokens=40)
    cache = write_cache(tmp_path / "growing", shape)
    stage = {"losses": {"cross_entropy": 1, "unlikelihood": 0.1}, "negatives": {"where": "not correct"}}
    config = trainer.config("run", stage, data={"caches": [str(cache.root)]})
    freeze_negatives = files._open_plain

    def freeze_and_grow(*given: Any) -> Selection:
        selection = freeze_negatives(*given)
        if not RunFolder(config.run).selection_path("distill").exists():
            write_cache(cache.root, dataclasses.replace(shape, seed=1))
        return selection

    monkeypatch.setattr(files, "_open_plain", freeze_and_grow)
    (planned,) = prepare(config, config.run, 1, is_first=True, barrier=lambda: None).stages
    wrong = {int(chain.sample_id[:16], 16) for chain in cache.chains if chain.correct is False}
    known = {int(chain.sample_id[:16], 16) for chain in cache.chains}
    is_negative_R = planned.attached.is_negative_R
    assert is_negative_R is not None
    assert set(planned.selection.key_R.tolist()) <= known
    assert set(planned.selection.key_R[is_negative_R].tolist()) == wrong


def test_pairs_share_a_prompt_and_a_pack(trainer: Trainer) -> None:
    config = trainer.config("run", {**PREFERENCE, "max_steps": 1})
    trainer.run(config)
    selection = load_selection(RunFolder(config.run).selection_path("preference"))
    assert selection.has_pairs
    by_key = {int(chain.sample_id[:16], 16): chain for chain in trainer.cache.chains}
    num_pairs = 0
    for pack in packs_of(selection, Attached()):
        assert pack.pair_signs_N is not None
        assert (pack.is_negative_N == (pack.pair_signs_N < 0)).all()
        batch = to_torch(pack, "cpu", TargetView(with_pairs=True))
        assert sum(batch.document_lengths) == pack.num_tokens
        for number in np.unique(pack.pair_ids_N):
            inside_N = pack.pair_ids_N == number
            chain = by_key[int(selection.key_R[pack.row_N[inside_N][0]])]
            right, wrong = (pack.sampled_ids_N[inside_N & (pack.pair_signs_N == sign)] for sign in (1, -1))
            assert right.tolist() == chain.token_ids.tolist()
            (other,) = [one for one in trainer.cache.chains if one.token_ids.tolist() == wrong.tolist()]
            assert (other.prompt, other.correct) == (chain.prompt, False)
            assert chain.correct is not False
            # Distributions stay with their token: rank 0 of the synthetic cache names the chain.
            assert set(pack.ids_NK[inside_N & (pack.pair_signs_N == -1), 0]) == {other.row}
            num_pairs += 1
    assert num_pairs == selection.num_chains > 0


def other_teacher(chain: Chain) -> Signals:
    """Support of two ids of its own, without a tail."""
    num_tokens = len(chain.token_ids)
    ids_T2 = np.stack([np.full(num_tokens, 7), np.full(num_tokens, chain.row)], axis=1)
    return Signals(
        topk_n_T=np.full(num_tokens, 2, np.int32),
        topk_ids_N=ids_T2.ravel().astype(np.int32),
        topk_logprobs_N=np.tile(np.log(np.array([0.75, 0.25], np.float32)), num_tokens),
        tail_logmass_T=np.full(num_tokens, -np.inf, np.float32),
        sampled_logprob_T=np.full(num_tokens, -2.0, np.float32),
        sampled_rank_T=np.ones(num_tokens, np.int32),
        entropy_T=np.ones(num_tokens, np.float32),
    )


def test_teachers_mix_by_source(trainer: Trainer, tmp_path: Path) -> None:
    chains = [chain for chain in trainer.cache.chains if chain.row % 4]
    second = rewritten(tmp_path / "second", chains, [other_teacher(chain) for chain in chains])
    teachers = [{"path": str(second.root), "weight": "CASE source WHEN 'sums' THEN 3 ELSE 0 END"}]
    config = trainer.config("run", {"max_steps": 2}, data={"mixture": {"own": 1, "teachers": teachers}})
    assert len(trainer.run(config)) == 2
    selection = load_selection(RunFolder(config.run).selection_path("distill"))
    assert selection.header.prepared is not None
    by_key = {int(chain.sample_id[:16], 16): chain for chain in trainer.cache.chains}
    num_mixed = 0
    for pack in packs_of(selection, Attached()):
        for place, (row, token) in enumerate(zip(pack.row_N, pack.token_N, strict=True)):
            chain = by_key[int(selection.key_R[row])]
            own = chain.signals.slice(int(token), int(token) + 1)
            mass = dict(zip(own.topk_ids_N.tolist(), np.exp(own.topk_logprobs_N).tolist(), strict=True))
            if chain.row % 4 and chain.source == "sums":
                mass = {token_id: 0.25 * one for token_id, one in mass.items()}
                for token_id, one in ((7, 0.75 * 0.75), (chain.row, 0.75 * 0.25)):
                    mass[token_id] = mass.get(token_id, 0.0) + one
                num_mixed += 1
            found = {
                int(token_id): float(np.exp(logprob))
                for token_id, logprob in zip(pack.ids_NK[place], pack.logprobs_NK[place], strict=True)
                if logprob > -np.inf
            }
            assert found == pytest.approx(mass, rel=1e-5)
    assert num_mixed
    assert selection.header.prepared.num_mixed == len(
        {row for row in selection.key_R.tolist() if by_key[row].row % 4 and by_key[row].source == "sums"}
    )


def test_mixed_rows_hold_what_the_largest_shard_holds(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards with more draws than others, and a teacher whose logits are wider than the own one's."""
    readers: list[weakref.ref[Any]] = []
    for kind in (ChainIndex, PreparedRows):

        def watched(*given: Any, kind: Any = kind) -> Any:
            made = kind(*given)
            readers.append(weakref.ref(made))
            return made

        monkeypatch.setattr(prepared, kind.__name__, watched)
    made = [
        make_cache(tmp_path / str(draws), 6, vocab_size=VOCAB_SIZE, max_tokens=40, draws=draws, seed=draws)
        for draws in (2, 5)
    ]
    chains = made[0].chains[:3]
    wide = [dataclasses.replace(one, topk_ids_N=one.topk_ids_N + VOCAB_SIZE) for one in map(other_teacher, chains)]
    second = rewritten(tmp_path / "second", chains, wide, num_ids=2 * VOCAB_SIZE)
    data = {"caches": [str(one.root) for one in made], "mixture": {"teachers": [{"path": str(second.root)}]}}
    config = trainer.config("run", data={**data, "where": None})
    request = train_request(config.data, 0, config.stages[0])
    selection = open_data(tmp_path / "s.parquet", request, config.data, config.student)
    assert (selection.header.vocab_size, selection.header.draws) == (2 * VOCAB_SIZE, 5)
    # Row groups that were kept are gone with their readers.
    assert [reader() for reader in readers] == [None, None]
    packs = packs_of(selection, Attached())
    assert max(int((pack.draw_weights_NM > 0).sum(axis=1).max()) for pack in packs) > 2
    assert max(int(pack.ids_NK.max()) for pack in packs) >= VOCAB_SIZE


def test_the_student_reads_another_prompt_than_the_teacher(trainer: Trainer) -> None:
    config = trainer.config("run", {"max_steps": 1}, data={"prompt": {"remove": ["question "]}})
    trainer.run(config)
    selection = load_selection(RunFolder(config.run).selection_path("distill"))
    by_key = {int(chain.sample_id[:16], 16): chain for chain in trainer.cache.chains}
    (pack, *_) = packs_of(selection, Attached())
    lengths = np.bincount(pack.document_ids_L)
    for document, start in enumerate(np.cumsum(lengths) - lengths):
        row = pack.row_N[pack.predict_positions_N >= start][0]
        chain = by_key[int(selection.key_R[row])]
        # "question 3 of 0" without its first word is three unknown words of the tiny vocabulary.
        assert pack.input_ids_L[start : start + 3].tolist() == [0, 0, 0]
        assert pack.input_ids_L[start + 3 : start + lengths[document]].tolist() == chain.token_ids.tolist()
    assert pack.ids_NK[0, 0] == by_key[int(selection.key_R[pack.row_N[0]])].row


def test_arguments_of_the_teachers_template_stay(trainer: Trainer, tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", 4, vocab_size=VOCAB_SIZE, max_tokens=40)
    for path in (cache.root / "runs").glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template_kwargs": {"depth": 2, "x": "w5"}}))
    config = trainer.config("run", data={"caches": [str(cache.root)], "where": None})
    selection = open_data(
        tmp_path / "s.parquet", train_request(config.data, 0, config.stages[0]), config.data, config.student
    )
    (given,) = template_arguments(selection).values()
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ x }} {{ depth }} {{ messages[0].content }}"
    asked = PromptConfig(chat_template_kwargs={"x": "w7"})
    (ids,) = render_prompts(tokenizer, asked, [[{"role": "user", "content": "w9"}]], given)
    assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode("w7 2 w9"))


def test_two_ranks_compute_the_same_start(trainer: Trainer, tmp_path: Path) -> None:
    config = trainer.config("run", {"losses": {"reverse_kl": 1.0, "start_kl": 1.0}})
    stage = config.stages[0]
    selection = open_data(tmp_path / "s.parquet", train_request(config.data, 0, stage), config.data, config.student)
    student = load_student(config.student, config.student.model, stage, config.engine, seed=0, vocab_size=VOCAB_SIZE)
    student.eval()
    from student_train.data.open import plan_spec
    from student_train.losses.fused_head import TokenSlots

    def slots(pack: Any) -> TokenSlots:
        return TokenSlots(*(one.detach() for one in student(pack, None, True)))

    one = open_start(tmp_path / "one", selection, plan_spec(config, 0), slots, trainer.ranks, with_distribution=True)
    for rank in (0, 1):
        (tmp_path / "two").mkdir(exist_ok=True)
        ranks = Ranks(rank, 2, trainer.ranks.device)
        start_module._compute(
            tmp_path / "two", selection, plan_spec(config, 0), slots, ranks, with_distribution=True
        )  # fmt: skip
    start_module._join(tmp_path / "two", selection, 2, with_distribution=True)
    two = start_module.StartLogprobs(tmp_path / "two", selection, with_distribution=True)
    cross_entropy = student_metrics(student)
    for pack in packs_of(selection, Attached()):
        first, second = one.of(pack), two.of(pack)
        for name in ("sampled_N", "support_NK", "rest_N"):
            np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
        expected_N = -cross_entropy(to_torch(pack, "cpu")).cross_entropy_N
        np.testing.assert_allclose(first.sampled_N, expected_N, atol=1e-4)


@pytest.mark.parametrize(
    ("stage", "data", "message"),
    [
        ({"losses": {"unlikelihood": 1}}, {}, "unlikelihood needs wrong chains: set negatives"),
        ({"negatives": {"where": "not correct"}}, {}, "negatives have no effect with the losses forward_kl, cross"),
        ({"losses": {"policy_gradient": 1}}, {}, "policy_gradient needs the student's log probabilities of its own"),
        ({"losses": {"policy_gradient": 1}}, {"behaviour": ["CACHE"]}, "teacher and writer would be one"),
        ({**PREFERENCE, "focal_gamma": 1.0}, {}, "dpo weighs pairs as a whole"),
        (PREFERENCE, {"steps": {}}, "dpo compares whole chains: remove data.steps"),
        (PREFERENCE, {"terms": {"words": ["a"]}}, "dpo weighs pairs as a whole: remove data.terms"),
        (
            {**PREFERENCE, "negatives": {"where": "num_tokens < 0"}},
            {},
            r"preference\): negatives.where 'num_tokens < 0'",
        ),
        (
            {},
            {"mixture": {"own": "correct and", "teachers": [{"path": "CACHE"}]}},
            "data.mixture.own 'correct and': it",
        ),
        (
            {},
            {"mixture": {"own": "'inf'", "teachers": [{"path": "CACHE"}]}},
            r"data\.mixture\.own \"'inf'\" is inf for a chain",
        ),
        (
            {},
            {"mixture": {"own": 0, "teachers": [{"path": "CACHE", "weight": 0}]}},
            "\"split = 'train'\" has a teacher of weight above 0: raise a weight in data.mixture",
        ),
        (
            {**PREFERENCE, "negatives": {"where": "split = 'train'"}},
            {},
            r"\( split = 'train' \) OR \( split = 'train' \)\" has a partner: dpo needs a right and a",
        ),
        ({"losses": {"start_kl": 1, "forward_kl": 1}, "temperature": 2.0}, {}, "start_kl compares at temperature 1"),
        ({"losses": {"taid": {"interpolation": {"kind": "elastic", "start": 1, "end": 0}}}}, {}, "cannot be elastic"),
        ({}, {"kind": "text", "prompt": {"drop_system": True}}, "prompt has no effect with kind: text"),
    ],
)
def test_what_has_no_effect_is_refused(trainer: Trainer, stage: Json, data: Json, message: str) -> None:
    for teacher in data.get("mixture", {}).get("teachers", []):
        teacher["path"] = str(trainer.cache.root)
    if "behaviour" in data:
        data["behaviour"] = [str(trainer.cache.root)]
    with pytest.raises(ConfigError, match=message):
        plan_run(trainer.config("run", stage, data=data), 1)


def test_the_plan_says_what_is_wrong_and_what_is_own(trainer: Trainer, own: SyntheticCache) -> None:
    config = trainer.config("run", OWN_WORDS, PREFERENCE, data={"behaviour": [str(own.root)]})
    single, paired = plan_run(config, 1)["stages"]
    assert 0 < single["num_own_chains"] < single["num_chains"]
    assert 0 < single["num_negative"] < single["num_chains"]
    assert paired["num_negative"] == paired["num_chains"] == paired["prepared"]["num_pairs"]
    assert (
        single["losses"]["policy_gradient"]
        == "the token's log probability under the teacher and under the student that generated it"
    )
