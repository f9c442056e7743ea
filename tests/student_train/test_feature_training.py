"""Losses below the head end to end: from a feature set through stream and packs into steps, checkpoints and reports."""

import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from stillroom.cache.features import FeatureSet
from stillroom.config import Json, plain
from stillroom.errors import ConfigError, DataError
from student_train.commands.result_lines import plan_lines
from student_train.data.epoch_plan import LongChains, PlanSpec
from student_train.data.features import StageFeatures, evenly_spaced, stage_features
from student_train.data.freezing import CacheSource, SelectionRequest, freeze
from student_train.data.selection import Selection
from student_train.data.stream import PackStream
from student_train.exporting import trained_model
from student_train.losses import LossMix
from student_train.losses.below import AttentionKL, HiddenCosine, HiddenMSE, HiddenRelations
from student_train.losses.features import hidden_values
from student_train.model.taps import load_teacher, make_projections
from student_train.planning.estimate import plan_run
from student_train.planning.plan import RunPlan, prepare
from student_train.report import write_student_report
from student_train.runtime.checkpoint import find_state
from student_train.runtime.ranks import RANK_VARIABLES
from student_train.runtime.run_folder import RunFolder
from teacher_cache.maintenance.gc import gc_cache
from teacher_cache.states.engine import Shape
from tests.helpers.caches import SyntheticCache, make_cache
from tests.helpers.dense_losses import stored_kl
from tests.helpers.feature_sets import add_features
from tests.helpers.programs import Program
from tests.helpers.students import VOCAB_SIZE
from tests.helpers.training import IGNORE_LIBRARY_WARNINGS, Trainer, losses_of

pytestmark = IGNORE_LIBRARY_WARNINGS

SHAPE = Shape(num_layers=4, hidden_size=16, num_heads=4, vocab_size=VOCAB_SIZE)
EVERY: Json = {
    "forward_kl": 0.5,
    "reverse_kl": {"weight": 0.4, "tail": "exact"},
    "hidden_mse": 0.3,
    "hidden_cosine": {"weight": 0.2, "layers": {2: 2}},
    "hidden_relations": 0.6,
    "attention_kl": {"weight": 0.7, "layers": {2: 0}},
}
BELOW: Json = {"hidden_mse": 1.0, "attention_kl": 0.5}


@pytest.fixture(scope="module")
def featured(tmp_path_factory: pytest.TempPathFactory) -> SyntheticCache:
    """A cache of 60 chains, four fifths of which have features at the more uncertain half of their tokens."""
    root = tmp_path_factory.mktemp("featured") / "cache"
    made = make_cache(root, num_chains=60, vocab_size=VOCAB_SIZE, max_tokens=40)
    add_features(root, shape=SHAPE, chains={"fraction": 0.8}, tokens={"entropy_frac": 0.5})
    return made


@pytest.fixture
def own(trainer: Trainer, featured: SyntheticCache) -> Trainer:
    return dataclasses.replace(trainer, cache=featured, pack_tokens=256)


@pytest.fixture(scope="module")
def dense(featured: SyntheticCache, student: Path) -> tuple[dict[str, float], float, float]:
    """See `_dense`."""
    return _dense(featured, student)


@pytest.fixture(scope="module")
def selection(featured: SyntheticCache, tmp_path_factory: pytest.TempPathFactory) -> Selection:
    path = tmp_path_factory.mktemp("selection") / "selection.parquet"
    return freeze(path, SelectionRequest([CacheSource(featured.root)]))


@pytest.mark.parametrize("long_chains", ["truncate", "split", "skip"])
def test_each_feature_meets_its_own_token(
    featured: SyntheticCache, selection: Selection, long_chains: LongChains
) -> None:
    """By key, on two ranks, one of which resumes in the middle, from small buffers."""
    features = FeatureSet.open(featured.root)
    layer, head = features.heads[0]
    heads = tuple(one for number, one in features.heads if number == layer)
    wanted = StageFeatures((features,), True, features.layers, {layer: heads})
    spec = PlanSpec(64, seed=3, max_tokens=24, long_chains=long_chains, lanes=2, window_groups=2)
    ids = {key: one.sample_id for one in featured.chains for key in [int(one.sample_id[:16], 16)]}
    prompts = {one.sample_id: len(one.prompt_ids) for one in featured.chains}
    seen: Counter[tuple[str, int]] = Counter()
    for pack in _packs(selection, spec, wanted):
        held = pack.features
        assert held is not None
        assert held.hidden_PR is not None
        for number, place in enumerate(held.places_P.tolist()):
            sample_id, token = ids[int(selection.key_R[pack.row_N[place]])], int(pack.token_N[place])
            row = features.read([sample_id], expand=False)[sample_id]
            at = row.positions_P.tolist().index(token)
            assert row.hidden_PD is not None
            np.testing.assert_array_equal(held.hidden_PR[number], row.hidden_PD[at])
            for one, states_PR in held.layers.items():
                np.testing.assert_array_equal(states_PR[number], row.layers[one][at])
            stored, packed = row.attention[layer, head], held.attention[layer]
            np.testing.assert_array_equal(packed.weights_PAm[number, heads.index(head)], stored.weights_PM[at])
            # A document that begins at its prompt has the chain's positions, and the query sees every key.
            document = pack.document_ids_L[pack.predict_positions_N[place]]
            position = pack.position_ids_L[pack.predict_positions_N[place]]
            begins = prompts[sample_id] + token - 1 == position
            assert held.is_whole_P[number] == float(begins)
            if begins:
                np.testing.assert_array_equal(packed.keys_PAm[number, heads.index(head)], stored.keys_PM[at])
                assert int(packed.keys_PAm[number].max()) <= position
            assert held.counts_D[document] > 0
            seen[sample_id, token] += 1
    assert set(seen.values()) == {1}
    everything = {(one, int(t)) for one in features.sample_ids() for t in features.read([one])[one].positions_P}
    assert set(seen) == everything if long_chains == "split" else set(seen) < everything


def _packs(selection: Selection, spec: PlanSpec, wanted: StageFeatures) -> Iterator[Any]:
    options: Json = {"packs_per_step": 2, "world": 2, "num_epochs": 1, "features": wanted, "read_ahead_groups": 2}
    for rank in range(2):
        with PackStream(selection, spec, rank=rank, with_signals=rank == 0, **options) as stream:
            for _, pack in zip(range(3), stream, strict=False):
                yield pack
            state = stream.state_dict()
        with PackStream(selection, spec, rank=rank, with_signals=rank == 0, **options) as stream:
            stream.load_state_dict(state)
            yield from stream


@pytest.mark.parametrize(
    ("engine", "pack_tokens"),
    [
        ({"zero_stage": 2, "gradient_checkpointing": True}, 64),
        ({"zero_stage": 3, "chunk_tokens": 7}, 128),
    ],
)
def test_step_equals_dense_means_over_tokens_with_features(
    own: Trainer, dense: tuple[dict[str, float], float, float], engine: Json, pack_tokens: int
) -> None:
    """One step over everything: each loss, and the gradient of their sum, as of each chain alone."""
    stage = {"epochs": 1, "batch_tokens": 8192, "clip_norm": None, "losses": EVERY, "temperature": 1.0}
    (record,) = own.run(own.config("run", stage, data={"pack_tokens": pack_tokens}, engine=engine, eval=None))
    parts, stored_kl_mean, grad_norm = dense
    for name, value in parts.items():
        assert record["parts"][name] == pytest.approx(value, rel=1e-4), name
    weights = {name: one["weight"] if isinstance(one, dict) else one for name, one in EVERY.items()}
    kl = record["parts"]["forward_kl"]
    assert kl == pytest.approx(stored_kl_mean, rel=1e-4)
    assert record["loss"] == pytest.approx(0.5 * kl + sum(weights[name] * parts[name] for name in parts), rel=1e-4)
    assert record["grad_norm"] == pytest.approx(grad_norm, rel=1e-3)


def _dense(cache: SyntheticCache, student: Path) -> tuple[dict[str, float], float, float]:
    """Each loss by name, the stored KL, and the norm of the gradient of them all: each chain alone, whole matrices."""
    features = FeatureSet.open(cache.root)
    rows = features.read(features.sample_ids())
    model = AutoModelForCausalLM.from_pretrained(student, attn_implementation="eager", dtype=torch.float32)
    states: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *given, n=number: states.__setitem__(n + 1, given[2]))
    pairs = dict(evenly_spaced(features.layers, SHAPE.num_layers, 2, 1))
    losses = (HiddenMSE(layers=tuple(pairs.items()), project=True), HiddenCosine(layers=((2, 2),), project=True))
    projections = make_projections(losses, 32, 16, seed=0)
    head_VD = torch.from_numpy(features.head().weight_VD)
    sums, num_tokens, kl_sum, num_loss = dict.fromkeys(list(EVERY)[1:], torch.zeros(())), 0, torch.zeros(()), 0
    for chain in cache.chains:
        if chain.split != "train":
            continue
        ids = torch.tensor([*chain.prompt_ids, *chain.token_ids])
        out = model(ids[None], output_attentions=True)
        logprobs_TV = out.logits[0, len(chain.prompt_ids) - 1 : -1].log_softmax(dim=-1)
        kl_sum, num_loss = kl_sum + stored_kl(chain.signals, logprobs_TV).sum(), num_loss + len(chain.token_ids)
        row = rows.get(chain.sample_id)
        if row is None:
            continue
        at = torch.tensor(row.positions_P).long()
        query_P = at + len(chain.prompt_ids) - 1
        log_p = (torch.tensor(row.hidden_PD) @ head_VD.t()).log_softmax(dim=-1)
        log_q = logprobs_TV[at]
        one: dict[str, torch.Tensor] = {"reverse_kl": (log_q.exp() * (log_q - log_p)).sum()}
        teacher = {layer: torch.tensor(states_PD) for layer, states_PD in row.layers.items()}
        mse, relations = [], []
        for theirs, mine in pairs.items():
            student_PH = states[mine][0, query_P]
            mapped_PD = projections[f"{theirs}-{mine}"](student_PH)
            mse.append(hidden_values(losses[0], mapped_PD, teacher[theirs], [len(at)]))
            relations.append(hidden_values(HiddenRelations(), student_PH, teacher[theirs], [len(at)]))
        one["hidden_mse"], one["hidden_relations"] = (torch.stack(x).mean(0).sum() for x in (mse, relations))
        cosine_PD = projections["2-2"](states[2][0, query_P])
        one["hidden_cosine"] = hidden_values(losses[1], cosine_PD, teacher[2], [len(at)]).sum()
        one["attention_kl"] = _dense_attention(row, out.attentions[0][0], query_P, features.heads)
        num_tokens += len(at)
        sums = {name: sums[name] + one[name] for name in sums}
    parts = {name: value / num_tokens for name, value in sums.items()}
    weights = {name: each["weight"] if isinstance(each, dict) else each for name, each in EVERY.items()}

    kl = kl_sum / num_loss
    (0.5 * kl + sum(weights[name] * part for name, part in parts.items())).backward()
    trained = [*model.parameters(), *projections.parameters()]
    norms = [one.grad.norm() for one in trained if one.grad is not None]
    return (
        {name: float(part.detach()) for name, part in parts.items()},
        float(kl.detach()),
        float(torch.stack(norms).norm()),
    )


def _dense_attention(row: Any, probs_ALL: torch.Tensor, query_P: torch.Tensor, heads: Any) -> torch.Tensor:
    """Heads of teacher and student are as many, so each has its own."""
    total = torch.zeros(())
    for layer, head in heads:
        stored = row.attention[layer, head]
        keys_PM, weights_PM, rest_P = (torch.tensor(one) for one in (stored.keys_PM, stored.weights_PM, stored.rest_P))
        q_PL = probs_ALL[head, query_P]
        is_stored_PM, keys_PM = weights_PM > 0, keys_PM.long()
        listed = weights_PM * (weights_PM.log() - q_PL.gather(1, keys_PM).log())
        is_listed_PL = torch.zeros(len(q_PL), q_PL.shape[1] + 1, dtype=torch.bool)
        is_listed_PL = is_listed_PL.scatter(1, keys_PM.where(is_stored_PM, q_PL.shape[1]), True)[:, :-1]
        # Later keys have probability 0, so that only those up to the query are left.
        left_P = q_PL.masked_fill(is_listed_PL, 0.0).sum(dim=1)
        has_rest_P = (rest_P > 0) & (left_P > 0)
        rest = rest_P * (rest_P.log() - left_P.where(has_rest_P, 1.0).log())
        total = total + (listed.where(is_stored_PM, 0.0).sum() + rest.where(has_rest_P, 0.0).sum()) / len(heads)
    return total


@pytest.mark.parametrize(
    ("stage", "engine"),
    [
        ({"losses": BELOW, "trainable": "body"}, {"zero_stage": 1, "gradient_checkpointing": True}),
        ({"losses": EVERY, "trainable": "lora", "lora": {"r": 2, "dropout": 0.3}}, {"zero_stage": 3}),
        ({"losses": BELOW}, {"zero_stage": 0, "precision": "bfloat16"}),
    ],
    ids=["body", "lora", "bfloat16"],
)
def test_resumed_run_is_the_same_and_exports_without_projections(own: Trainer, stage: Json, engine: Json) -> None:
    stage = {**stage, "max_steps": 3}
    whole = own.run(own.config("whole", stage, eval=None, engine=engine))
    config = own.config("run", stage, eval=None, engine=engine)
    own.run(config, stop_after=1)
    assert losses_of(own.run(config)) == losses_of(whole)
    assert whole[-1]["parts"]["hidden_mse"] < whole[0]["parts"]["hidden_mse"]
    model = trained_model(config, find_state(RunFolder(config.run).checkpoints, "last"), merged=True)
    start = AutoModelForCausalLM.from_pretrained(own.student).state_dict()
    found = model.state_dict()
    assert found.keys() == start.keys()
    if stage.get("trainable") == "body":
        # Layers above those that a loss reads have no gradient either.
        same = {name for name in start if torch.equal(found[name], start[name])}
        assert {"model.embed_tokens.weight", "lm_head.weight"} <= same
        assert "model.layers.0.mlp.up_proj.weight" not in same


def test_sets_fitted_apart_are_each_expanded_in_their_own_basis(tmp_path: Path) -> None:
    """The same set in two caches has two bases, and coefficients of one mean nothing in the other."""
    roots = [make_cache(tmp_path / f"c{num}", num_chains=num, vocab_size=VOCAB_SIZE).root for num in (10, 20)]
    for number, root in enumerate(roots):
        add_features(root, shape=SHAPE, attention=None, calibration={"tokens": 100 + 50 * number})
    sets = [FeatureSet.open(root) for root in roots]
    assert sets[0].set_id == sets[1].set_id
    selection = freeze(tmp_path / "s.parquet", SelectionRequest([CacheSource(root) for root in roots]))
    wanted = stage_features(LossMix((), features=(HiddenMSE(layers=((2, 1),)),)), selection, sets)
    teacher = load_teacher(wanted, torch.device("cpu"), torch.float32)
    rows = [features.read(features.sample_ids()) for features in sets]
    by_key = {int(one[:16], 16): one for found in rows for one in found}
    seen = set()
    for pack in _packs(selection, PlanSpec(64, seed=0, lanes=2, window_groups=2), wanted):
        held = pack.features
        states_PD = teacher.expand(torch.from_numpy(held.layers[2]), 2).numpy()
        for number, place in enumerate(held.places_P.tolist()):
            row = int(pack.row_N[place])
            cache, sample_id = int(selection.cache_G[selection.group_R[row]]), by_key[int(selection.key_R[row])]
            true_D = rows[cache][sample_id].layers[2][int(pack.token_N[place])]
            np.testing.assert_allclose(states_PD[number], true_D, rtol=1e-4, atol=1e-4)
            seen.add(cache)
    assert seen == {0, 1}


def test_features_added_after_a_refusal_are_found(own: Trainer) -> None:
    root = own.folder / "cache"
    make_cache(root, num_chains=20, vocab_size=VOCAB_SIZE, max_tokens=40)
    add_features(root, shape=SHAPE, chains={"where": "split <> 'train'"}, calibration={"tokens": 64})
    config = own.config("run", {"losses": BELOW}, data={"caches": [str(root)]}, eval=None)

    def prepared() -> RunPlan:
        return prepare(config, config.run, 1, is_first=True, barrier=lambda: None)

    with pytest.raises(ConfigError, match=r"none of the .* selected chains has features"):
        prepared()
    add_features(root, shape=SHAPE, calibration={"tokens": 64})
    assert prepared().stages[0].features is not None


def test_a_cache_with_several_sets_must_name_one_beside_others(own: Trainer) -> None:
    root = own.folder / "several"
    make_cache(root, num_chains=20, vocab_size=VOCAB_SIZE, max_tokens=40)
    for name in ("one", "two"):
        add_features(root, shape=SHAPE, name=name, calibration={"tokens": 64})
    data = {"caches": [str(own.cache.root), str(root)]}
    with pytest.raises(ConfigError, match=r"data.caches.1: .* has several feature sets: choose one of one_.*, two_"):
        plan_run(own.config("run", {"losses": BELOW}, data=data, eval=None), 1)
    # A set that was dropped is none of them, although its manifest is there for older versions.
    gc_cache(root, dry_run=False, grace_s=0.0, drop_runs=["one"])
    assert FeatureSet.open(root).manifest.name == "two"


def test_runs_without_such_losses_do_not_read_features(own: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = own.folder / "bare"
    shutil.copytree(own.cache.root, bare, ignore=shutil.ignore_patterns("features", "feature_sets"))
    plain = own.run(own.config("plain", {"max_steps": 3}, eval=None, data={"caches": [str(bare)]}))
    monkeypatch.setattr(FeatureSet, "open", None)
    assert losses_of(own.run(own.config("run", {"max_steps": 3}, eval=None))) == losses_of(plain)


def test_exact_losses_follow_any_temperature(own: Trainer) -> None:
    """A schedule is not bound to stored temperatures; text and states of the teacher are all that is read."""
    tau = {"kind": "linear", "start": 3.0, "end": 1.0}
    losses = {"jsd": {"tail": "exact"}, "cross_entropy": 0.1}
    records = own.run(own.config("run", {"losses": losses, "temperature": tau}, eval=None))
    assert [one["temperature"] for one in records] == pytest.approx(np.linspace(3.0, 1.0, len(records)))
    assert all(0.0 < one["parts"]["jsd"] < 9 * np.log(2) for one in records)


def test_plan_prints_layers_and_report_shows_each_stages_losses(own: Trainer) -> None:
    align = {"name": "align", "losses": {**BELOW, "hidden_relations": 1.0}, "trainable": "body", "epochs": 1}
    match = {"name": "match", "losses": {"forward_kl": 1.0, "cross_entropy": 0.2}, "epochs": 1}
    config = own.config("run", align, match, eval=None)
    said = "\n".join(plan_lines(plan_run(config, 1)))
    features = FeatureSet.open(own.cache.root)
    for line in (
        "hidden_mse: the teacher's states after layers: 1 → 1, 2 → 1, through learned projections",
        "hidden_relations: the teacher's states after layers: 1 → 1, 2 → 1\n",
        f"attention_kl: the attention of {len(features.heads)} of the teacher's heads, layers from 0: 2 → 1",
        f"features   {features.set_id}: ",
        "trains body",
    ):
        assert line in said
    without = next(one.sample_id for one in own.cache.chains if one.sample_id not in features)
    with pytest.raises(ConfigError, match="none of the 1 selected chains has features in all_"):
        plan_run(own.config("none", {**align, "where": f"sample_id = '{without}'"}, eval=None), 1)
    own.run(config)
    page = own.folder / "page.html"
    write_student_report([config.run], page)
    text = page.read_text()
    for words in ("hidden MSE", "attention KL", "hidden relations", "forward KL", "align, ", "match, "):
        assert words in text


@pytest.mark.parametrize(
    ("stage", "blocks", "message"),
    [
        ({"losses": {"hidden_mse": 1.0}}, {"features": "none"}, "no feature set 'none': choose one of all_"),
        ({"losses": {"hidden_mse": {"layers": {3: 1}}}}, {}, "the set holds layers 1, 2 of the teacher, not 3"),
        ({"losses": {"hidden_mse": {"layers": {1: 3}}}}, {}, "the student has layers 1 to 2, not 3"),
        ({"losses": {"hidden_cosine": {"project": False}}}, {}, "states have width 32, the teacher's 16: leave it out"),
        ({"losses": {"attention_kl": 1.0}}, {"attention": "eager"}, "attention_kl needs student.attention: sdpa"),
        ({"losses": {"hidden_relations": {"project": True}}}, {}, "hidden_relations takes no project"),
        ({"losses": {"hidden_mse": 1.0}, "focal_gamma": 1.0}, {}, "focal_gamma has no effect on hidden_mse"),
        ({"losses": {"hidden_mse": 1.0}, "trainable": "head"}, {}, "no effect with trainable: head"),
        ({"losses": {"hidden_mse": 1.0}, "temperature": 2.0}, {}, "temperature has no effect on hidden_mse"),
        ({"losses": {"reverse_kl": {"tail": "exact"}}}, {"kind": "projected"}, "set data.kind: distributions"),
        ({"losses": {"hidden_mse": 1.0}}, {"bare": True}, "has no features: `teacher-cache features CONFIG`"),
        ({"losses": {"reverse_kl": {"tail": "exact"}}}, {"only": "layers"}, "needs last hidden states, which the set"),
        ({"losses": {"attention_kl": 1.0}}, {"only": "layers"}, "needs the attention of the teacher, which the set"),
    ],
)
def test_refused_with_one_line(own: Trainer, student: Path, stage: Json, blocks: Json, message: str) -> None:
    data: Json = {"caches": [{"path": str(own.cache.root), "features": blocks.get("features")}]}
    if "kind" in blocks:
        data["kind"] = blocks["kind"]
    if "bare" in blocks or "only" in blocks:
        root = own.folder / "cache"
        make_cache(root, num_chains=20, vocab_size=VOCAB_SIZE, max_tokens=40)
        if "only" in blocks:
            add_features(root, shape=SHAPE, last_hidden=None, attention=None)
        data["caches"] = [str(root)]
    given: Json = {"model": str(student), **({"attention": "eager"} if "attention" in blocks else {})}
    with pytest.raises((ConfigError, DataError), match=message) as refusal:
        plan_run(own.config("run", stage, data=data, student=given, eval=None), 1)
    assert "\n" not in str(refusal.value)


def test_layers_are_evenly_spaced() -> None:
    assert evenly_spaced((4, 12, 20), 24, 6, 1) == [(4, 1), (12, 3), (20, 5)]
    assert evenly_spaced((1, 2, 3), 4, 4, 1) == [(1, 1), (2, 2), (3, 3)]
    assert evenly_spaced((0, 3), 4, 2, 0) == [(0, 0), (3, 1)]
    assert LossMix((), features=(AttentionKL(layers=((0, 0),)),)).names == ("attention_kl",)


def test_two_ranks_resume_from_one(own: Trainer) -> None:
    """With weights and projections spread by ZeRO 3, and packs without features on either rank."""
    stage = {"losses": {**EVERY, "cross_entropy": 0.1}, "max_steps": 3}
    engine: Json = {"zero_stage": 3}
    whole = own.run(own.config("whole", stage, eval=None, engine=engine))
    config = own.config("run", stage, eval=None, engine=engine)
    own.run(config, stop_after=1)
    path = own.folder / "config.yaml"
    path.write_text(yaml.safe_dump(plain(config)))
    environ = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    code, _, said = Program(["student-train", "run", str(path), "--nproc", "2"], environ=environ).communicate()
    assert code == 0, said
    found = RunFolder(config.run).read_metrics()
    for name in whole[0]["parts"]:
        expected = [one["parts"][name] for one in whole]
        assert [one["parts"][name] for one in found] == pytest.approx(expected, rel=2e-3), name
