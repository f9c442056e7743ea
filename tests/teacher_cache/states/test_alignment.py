"""States and attention of the transformers engine are those of a dense model at the same token, by key."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from stillroom.cache.catalog import Catalog
from stillroom.cache.features import FeatureSet, Head
from stillroom.errors import ConfigError, DataError, StillroomError
from stillroom.schema.records import Float32, Int32
from teacher_cache.config import TeacherConfig
from teacher_cache.engine.teacher import identify_teacher
from teacher_cache.prompts.prompts import WHOLE
from teacher_cache.states import sets
from teacher_cache.states.config import FeaturesConfig, TransformersConfig
from teacher_cache.states.engine import ChainTokens, HeadWeights, States, Wanted
from teacher_cache.states.model import float_head, load_outer
from teacher_cache.states.passes import features_of_cache
from teacher_cache.states.selection import choose, read_unit
from teacher_cache.states.transformers import TransformersStates
from tests.helpers.dense_scores import make_scored_cache
from tests.helpers.feature_sets import teacher_of

WANTED = Wanted(hidden=True, layers=(1,), attention=(0, 1), num_keys=4)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    folder = tmp_path_factory.mktemp("dense")
    _, model = make_scored_cache(folder)
    return folder, model


def config_of(folder: Path, **blocks: object) -> FeaturesConfig:
    content = {
        "cache": folder / "cache",
        "name": "states",
        "teacher": {"model": str(folder / "teacher")},
        "engine": {"kind": "transformers", "dtype": "float32", "batch_tokens": 120},
    }
    return FeaturesConfig.model_validate({**content, **blocks})


def chains_of(folder: Path) -> list[ChainTokens]:
    config, catalog = config_of(folder, last_hidden={}), Catalog(folder / "cache")
    teacher = identify_teacher(config.teacher.as_teacher).record
    units = choose(catalog, config.chains, teacher)
    return [one for unit in units for one in read_unit(catalog, unit, unit.places, 0.5)]


def logprobs(hidden_PD: Float32, weight_VD: Float32, ids_P: Int32) -> Float32:
    logits_PV = hidden_PD @ weight_VD.T
    log_sum_P = np.log(np.exp(logits_PV - logits_PV.max(axis=1, keepdims=True)).sum(axis=1)) + logits_PV.max(axis=1)
    found_P: Float32 = logits_PV[np.arange(len(ids_P)), ids_P] - log_sum_P
    return found_P


def test_each_state_is_that_of_the_token_it_predicts(scored: tuple[Path, LlamaForCausalLM]) -> None:
    folder, model = scored
    chains = chains_of(folder)
    teacher = identify_teacher(config_of(folder, last_hidden={}).teacher.as_teacher).record
    engine = TransformersStates(teacher, False, TransformersConfig(kind="transformers", dtype="float32"), WANTED)
    weight_VD = float_head(engine.head()).weight_VD
    for chain, states in zip(chains, engine.run(chains), strict=True):
        assert states.hidden_PD is not None
        ids_P = chain.token_ids[chain.positions_P]
        assert np.abs(logprobs(states.hidden_PD, weight_VD, ids_P) - chain.sampled_logprob_P).max() < 1e-3
        with torch.inference_mode():
            dense = model.model(torch.tensor([chain.inputs]), output_hidden_states=True, output_attentions=True)
        np.testing.assert_allclose(states.layers[1], dense.hidden_states[1][0, chain.query_P], atol=1e-4)
        for layer in WANTED.attention:
            whole_PHK = dense.attentions[layer][0, :, chain.query_P].transpose(0, 1).numpy()
            found = states.attention[layer]
            true_PHM = np.take_along_axis(whole_PHK, found.keys_PHM, axis=-1)
            # Slots past a query's keys hold weight 0.
            np.testing.assert_allclose(found.weights_PHM, np.where(found.weights_PHM > 0, true_PHM, 0), atol=1e-5)
            best_PHM = -np.sort(-whole_PHK, axis=-1)[..., :4]
            np.testing.assert_allclose(found.weights_PHM[..., : best_PHM.shape[-1]], best_PHM, atol=1e-5)
    engine.close()


def test_an_adapter_is_in_the_states_and_the_head(tmp_path: Path) -> None:
    make_scored_cache(tmp_path, 3, has_adapter=True)
    teacher = {"model": str(tmp_path / "teacher"), "adapter": str(tmp_path / "adapter")}
    with pytest.raises(ConfigError, match="wrote no chain of"):
        chains_of(tmp_path)
    config, catalog = config_of(tmp_path, last_hidden={}, teacher=teacher), Catalog(tmp_path / "cache")
    record = identify_teacher(config.teacher.as_teacher).record
    engine = TransformersStates(record, False, TransformersConfig(kind="transformers", dtype="float32"), WANTED)
    (unit,) = choose(catalog, config.chains, record)
    chains = list(read_unit(catalog, unit, unit.places, 0.5))
    for chain, states in zip(chains, engine.run(chains), strict=True):
        assert states.hidden_PD is not None
        ids_P = chain.token_ids[chain.positions_P]
        found_P = logprobs(states.hidden_PD, float_head(engine.head()).weight_VD, ids_P)
        assert np.abs(found_P - chain.sampled_logprob_P).max() < 1e-3
    with pytest.raises(ValueError, match=r"teacher.adapter needs engine.kind: transformers"):
        config_of(tmp_path, last_hidden={}, teacher=teacher, engine={"kind": "vllm"})


def test_the_stored_set_gives_the_distributions_of_the_cache(scored: tuple[Path, LlamaForCausalLM]) -> None:
    folder, model = scored
    config = config_of(folder, last_hidden={}, attention={"layers": [1], "keep_frac": 0.5, "keys": 4})
    result = features_of_cache(config, WHOLE)
    assert (result.num_chains, result.stopped) == (12, None)
    opened = FeatureSet.open(folder / "cache")
    assert opened.manifest.logprob_error is not None
    assert opened.manifest.logprob_error < 1e-4
    head = opened.head()
    np.testing.assert_array_equal(head.weight_VD, model.lm_head.weight.detach().numpy())
    rows = opened.read(opened.sample_ids())
    for chain in chains_of(folder):
        row = rows[chain.sample_id]
        assert row.hidden_PD is not None
        found_T = logprobs(row.hidden_PD, head.weight_VD, chain.token_ids)
        # Rounding to 8 bits moves the logits of this random model by a few hundredths.
        np.testing.assert_allclose(found_T[chain.positions_P], chain.sampled_logprob_P, atol=0.2)
        np.testing.assert_allclose(head.logits(row.hidden_PD).shape, (len(chain.token_ids), 400))


@pytest.mark.parametrize("name", ["cuda:7", "no-such-device"])
def test_a_device_that_is_not_there_is_named(scored: tuple[Path, LlamaForCausalLM], name: str) -> None:
    config = TransformersConfig(kind="transformers", device=name)
    teacher = identify_teacher(config_of(scored[0], last_hidden={}).teacher.as_teacher).record
    with pytest.raises(ConfigError, match=f"engine.device: {name} cannot be used here"):
        TransformersStates(teacher, False, config, WANTED)


def test_a_weight_file_that_is_cut_short_is_named(scored: tuple[Path, LlamaForCausalLM], tmp_path: Path) -> None:
    folder = shutil.copytree(scored[0] / "teacher", tmp_path / "teacher")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    teacher = identify_teacher(TeacherConfig(model=str(folder))).record
    with pytest.raises(DataError, match=r"model\.safetensors is damaged or cut short: copy it again"):
        TransformersStates(teacher, False, TransformersConfig(kind="transformers"), WANTED)


def test_attention_is_found_by_other_names(scored: tuple[Path, LlamaForCausalLM]) -> None:
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=400, n_positions=256)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(scored[0] / "gpt2")
    chains = chains_of(scored[0])[:2]
    teacher = teacher_of(scored[0] / "cache").model_copy(update={"model": str(scored[0] / "gpt2"), "revision": None})
    engine = TransformersStates(teacher, False, TransformersConfig(kind="transformers"), WANTED)
    for states in engine.run(chains):
        assert states.attention[1].weights_PHM[..., 0].min() > 0
    engine.close()


def test_a_long_chain_is_checked_at_its_first_positions(
    scored: tuple[Path, LlamaForCausalLM], monkeypatch: Any
) -> None:
    """Its logits need not fit in memory."""
    monkeypatch.setattr(sets, "CHECKED_POSITIONS", 3)
    sizes: list[int] = []

    logits_of = Head.logits

    def noted(head: Head, states_PD: Float32) -> Float32:
        sizes.append(len(states_PD))
        return logits_of(head, states_PD)

    monkeypatch.setattr(Head, "logits", noted)
    chains = chains_of(scored[0])
    rng, head = np.random.default_rng(0), HeadWeights({"weight": np.zeros((400, 8), np.float32)}, 1.0, None, {})
    states = [States(rng.standard_normal((len(one.positions_P), 8)).astype(np.float32)) for one in chains]
    with pytest.raises(StillroomError, match="differ from the cache"):
        sets._check_states(head, chains, states)
    assert sum(sizes) == 3


def test_states_of_other_tokens_are_refused(scored: tuple[Path, LlamaForCausalLM]) -> None:
    folder, _ = scored
    chains = chains_of(folder)
    teacher = identify_teacher(config_of(folder, last_hidden={}).teacher.as_teacher).record
    wanted = Wanted(hidden=True)
    engine = TransformersStates(teacher, False, TransformersConfig(kind="transformers", dtype="float32"), wanted)
    states = engine.run(chains)
    assert sets._check_states(engine.head(), chains, states) < 1e-4
    shifted = [States(np.roll(one.hidden_PD, 1, axis=0)) for one in states if one.hidden_PD is not None]
    with pytest.raises(StillroomError, match=r"differ from the cache's log probabilities by .* nats"):
        sets._check_states(engine.head(), chains, shifted)
    # What the vLLM engine reads from the files alone is the model's own head and norm.
    head, norm, _ = load_outer(teacher, False)
    for name, module in (("lm_head", head), ("model.norm", norm)):
        own = engine._model.get_submodule(name)
        assert torch.equal(module.get_parameter("weight"), own.get_parameter("weight"))
    engine.close()
