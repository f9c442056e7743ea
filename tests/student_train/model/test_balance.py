"""The balance loss of experts: transformers' own number and gradient, on packs, under ZeRO, and in the log."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GptOssConfig,
    GraniteMoeConfig,
    JambaConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)
from transformers.models.auto import AutoModelForCausalLM

from stillroom.errors import ConfigError
from student_train.config.run import EngineConfig, StudentConfig
from student_train.config.stage import StageConfig
from student_train.data.pack import TorchPack
from student_train.losses.balance import BALANCE, find_balance
from student_train.losses.divergences import CrossEntropy
from student_train.losses.mix import LossMix
from student_train.losses.targets import SparseTargets
from student_train.model.packed_attention import Apart
from student_train.model.shape import balance_weight_of
from student_train.model.student import load_student
from student_train.runtime.run_folder import RunFolder
from tests.helpers.caches import EOS_ID
from tests.helpers.students import VOCAB_SIZE, make_tokenizer
from tests.helpers.training import IGNORE_LIBRARY_WARNINGS, Trainer

pytestmark = IGNORE_LIBRARY_WARNINGS

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": EOS_ID,
    "pad_token_id": None,
}
MIXTURES: list[PreTrainedConfig] = [
    MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    Qwen3MoeConfig(**SMALL, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=3),
    OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2),
    GraniteMoeConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    GptOssConfig(**SMALL, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=64),
]


def make_mixture(folder: Path, config: PreTrainedConfig) -> Path:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name or name.endswith("gate.weight"):
                # Initial routers are nearly equal: choices must differ for the loss to say anything.
                parameter.normal_(std=1.0)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def two_documents() -> TorchPack:
    """Of 9 and 6 tokens; each predicts its last 4."""
    generator = torch.Generator().manual_seed(1)
    ids_L = torch.randint(3, VOCAB_SIZE, (15,), generator=generator)
    predict_N = torch.tensor([4, 5, 6, 7, 10, 11, 12, 13])
    return TorchPack(
        input_ids_1L=ids_L.unsqueeze(0),
        position_ids_1L=torch.cat([torch.arange(9), torch.arange(6)]).unsqueeze(0),
        document_lengths=(9, 6),
        predict_positions_N=predict_N,
        targets=SparseTargets.text_alone(ids_L[predict_N + 1], weights_N=torch.full((8,), 0.5)),
    )


def own_loss(folder: Path, pack: TorchPack) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """transformers' balance loss of the same documents as a padded batch, and its gradients of the routers."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    documents = pack.input_ids_1L[0].split(list(pack.document_lengths))
    ids_BL = torch.nn.utils.rnn.pad_sequence(list(documents), batch_first=True)
    mask_BL = torch.nn.utils.rnn.pad_sequence([torch.ones(len(one)) for one in documents], batch_first=True)
    loss = model(input_ids=ids_BL, attention_mask=mask_BL, output_router_logits=True, use_cache=False).aux_loss
    loss.backward()
    return loss.detach(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("config", MIXTURES, ids=lambda one: one.model_type)
def test_a_pack_has_the_balance_loss_of_its_documents(tmp_path: Path, config: PreTrainedConfig) -> None:
    folder, pack, mix = make_mixture(tmp_path, config), two_documents(), LossMix((CrossEntropy(),))
    expected, gradients = own_loss(folder, pack)
    stage = StageConfig(learning_rate=1e-3, balance_weight=0.3)
    engine = EngineConfig(precision="float32", gradient_checkpointing=True)
    attention = "eager" if config.model_type == "gpt_oss" else "sdpa"
    named = StudentConfig(model=str(folder), attention=attention)
    student = load_student(named, str(folder), stage, engine, seed=0, vocab_size=VOCAB_SIZE)
    ways = [student.apart, *({Apart.ONE_BY_ONE} - {student.apart})]
    for way in ways:
        if way is Apart.ONE_BY_ONE:
            student.causal.set_attn_implementation(attention)
        student.apart = way
        student.zero_grad()
        loss_sum, term_sums_J, _ = student(pack, mix)
        # Eight tokens of weight 0.5: the mean over a batch divides by the same 4.
        torch.testing.assert_close(term_sums_J[1], 4.0 * expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(loss_sum, term_sums_J[0] + 0.3 * term_sums_J[1])
        (loss_sum - student_loss_alone(student, pack, mix)).backward()
        found = {name.removeprefix("model."): one.grad for name, one in student.named_parameters()}
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], 4.0 * 0.3 * gradient, rtol=1e-3, atol=1e-5)


def student_loss_alone(student: Any, pack: TorchPack, mix: LossMix) -> torch.Tensor:
    """The loss without the balance, whose gradient cancels that of the whole."""
    balance, student.balance = student.balance, None
    loss_sum: torch.Tensor = student(pack, mix)[0]
    student.balance = balance
    return loss_sum


def test_the_weight_is_the_models_own_or_the_configured_one(tmp_path: Path) -> None:
    def found(config: PreTrainedConfig, weight: float | None) -> float | None:
        model = AutoModelForCausalLM.from_config(config)
        balance = find_balance(model, balance_weight_of(config.to_dict()), weight)
        return None if balance is None else balance.weight

    mixtral = MIXTURES[0]
    assert found(mixtral, None) == mixtral.router_aux_loss_coef
    assert found(mixtral, 0.5) == 0.5
    assert found(mixtral, 0.0) is None
    dense = LlamaConfig(**SMALL)
    assert found(dense, None) is None
    # A dense member of a family with experts has the coefficient in its configuration, and no router.
    assert (
        found(
            JambaConfig(**SMALL, num_experts=1, use_mamba_kernels=False, attn_layer_period=1, attn_layer_offset=0), None
        )
        is None
    )
    with pytest.raises(ConfigError, match=r"balance_weight=0.5: LlamaForCausalLM has no balance loss"):
        found(dense, 0.5)


def test_a_run_logs_the_balance_under_every_zero_stage(trainer: Trainer, tmp_path: Path) -> None:
    folder = str(make_mixture(tmp_path / "mixture", MIXTURES[0]))
    logs = []
    for zero_stage in (0, 3):
        config = trainer.config(
            f"zero{zero_stage}",
            {"max_steps": 2, "epochs": None, "balance_weight": 0.1},
            student={"model": folder},
            engine={"zero_stage": zero_stage},
            eval=None,
        )
        logs.append(trainer.run(config))
        assert RunFolder(config.run).read_metrics()[0]["weights"][BALANCE] == 0.1
    for one, other in zip(*logs, strict=True):
        assert one["parts"] == pytest.approx(other["parts"], rel=1e-5)
        whole = sum(weight * one["parts"][name] for name, weight in one["weights"].items())
        assert one["loss"] == pytest.approx(whole, rel=1e-5)
        # Equal use of all experts has 2, the number that a token gets.
        assert 2.0 < one["parts"][BALANCE] < 4.0
