"""Methods to compare with that need the teacher in memory: sorted probabilities (ULD) and the hybrid of GOLD.

They get more than a cache holds, the teacher's whole distribution at every position. Packs, their order, optimizer and
schedule are those of student_train, so that only the losses differ.

    S student tokens of a chain, T teacher tokens of it, G groups between common boundaries, V vocabulary
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import LlamaForCausalLM

from benchmarks.cross_vocabulary.setting import Setting, encoded, token_bytes
from student_train.config.stage import StageConfig
from student_train.data.epoch_plan import PlanSpec
from student_train.data.pack import Pack
from student_train.data.selection import Selection
from student_train.data.stream import PackStream
from student_train.losses.divergences import kl
from student_train.schedule import learning_rate


@dataclass(frozen=True)
class AlignedChain:
    """A chain in both vocabularies. Log probabilities predict the tokens of `ids`, the student's with a gradient.

    `groups` are (start, stop) in the student's tokens and (start, stop) in the teacher's, between common boundaries.
    """

    student_SV: Tensor
    teacher_TV: Tensor
    student_ids_S: Tensor
    teacher_ids_T: Tensor
    groups: list[tuple[int, int, int, int]]


ChainLoss = Callable[[AlignedChain], Tensor]
"""Nats summed over a chain."""


def cross_entropy(chain: AlignedChain) -> Tensor:
    """-log q of the student's tokens."""
    return -chain.student_SV.gather(1, chain.student_ids_S[:, None]).sum()


def uld(weight: float) -> ChainLoss:
    """Cross-entropy and `weight` times the L1 distance of sorted probabilities, position by position (2402.12030)."""

    def loss(chain: AlignedChain) -> Tensor:
        num = min(len(chain.student_SV), len(chain.teacher_TV))
        return cross_entropy(chain) + weight * _sorted_distance(
            chain.student_SV[:num].exp(), chain.teacher_TV[:num].exp()
        )

    return loss


class Gold:
    """The hybrid of TRL's GOLD: JSD on ids with an equal string, sorted distance on the others, groups aligned.

    The distribution of a group is the one at its first token, times the probabilities of its further tokens. Matched
    ids weigh as their share of the teacher's vocabulary, the others the rest.
    """

    def __init__(self, setting: Setting, ce_weight: float, beta: float) -> None:
        teacher, student = setting.tokenizer.get_vocab(), setting.other.get_vocab()
        shared = sorted(set(teacher) & set(student))
        self._teacher_M = torch.tensor([teacher[piece] for piece in shared])
        self._student_M = torch.tensor([student[piece] for piece in shared])
        self._teacher_rest = torch.tensor(sorted(set(teacher.values()) - set(self._teacher_M.tolist())))
        self._student_rest = torch.tensor(sorted(set(student.values()) - set(self._student_M.tolist())))
        self._share = len(shared) / len(teacher)
        self._ce_weight, self._beta = ce_weight, beta

    def __call__(self, chain: AlignedChain) -> Tensor:
        """Nats summed over groups, in units of the student's tokens."""
        student_GV = _merged(chain.student_SV, chain.student_ids_S, [group[:2] for group in chain.groups])
        teacher_GV = _merged(chain.teacher_TV, chain.teacher_ids_T, [group[2:] for group in chain.groups])
        matched = _jsd(student_GV[:, self._student_M], teacher_GV[:, self._teacher_M], self._beta)
        rest = _sorted_distance(student_GV[:, self._student_rest].exp(), teacher_GV[:, self._teacher_rest].exp())
        return self._ce_weight * cross_entropy(chain) + self._share * matched + (1.0 - self._share) * rest


def train_online(
    setting: Setting, student: Path, selection: Selection, spec: PlanSpec, stage: StageConfig, loss_of: ChainLoss
) -> Any:
    """The student after one epoch over `selection`, its chains in the student's vocabulary."""
    model = LlamaForCausalLM.from_pretrained(student).train()
    matrices = [one for one in model.parameters() if one.dim() > 1]
    others = [one for one in model.parameters() if one.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": stage.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(stage.beta1, stage.beta2),
    )
    chains = _Chains(setting)
    with PackStream(selection, spec, packs_per_step=1, num_epochs=1, with_signals=False) as stream:
        num_steps = stream.plans.total_packs()
        for step, pack in enumerate(stream):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(stage, step, num_steps)
            loss_sum = torch.stack([loss_of(chain) for chain in chains.of(pack, model)]).sum()
            (loss_sum / pack.num_loss_tokens).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), stage.clip_norm or torch.inf)
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


class _Chains:
    """Finds the chains of a pack again by their ids, and runs both models on them."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        prompts, completions = encoded(setting, same_vocabulary=False)
        self._number = {tuple(p + c): n for n, (p, c) in enumerate(zip(prompts, completions, strict=True))}
        self._completions = completions
        self._bytes = token_bytes(setting.other), token_bytes(setting.tokenizer)

    def of(self, pack: Pack, model: Any) -> Iterator[AlignedChain]:
        """The chains of a pack, in its order."""
        setting = self._setting
        student_bytes, teacher_bytes = self._bytes
        starts = np.flatnonzero(np.diff(pack.document_ids_L, prepend=-1))
        documents = [tuple(ids.tolist()) for ids in np.split(pack.input_ids_L, starts[1:])]
        numbers = [self._number[ids] for ids in documents]
        student_BLV = _logprobs(model, [list(ids) for ids in documents])
        teacher_ids = [setting.chains.prompts_RP[n].tolist() + setting.completions[n] for n in numbers]
        with torch.no_grad():
            teacher_BLV = _logprobs(setting.model, teacher_ids)
        for row, number in enumerate(numbers):
            ids_S, ids_T = self._completions[number], setting.completions[number]
            yield AlignedChain(
                student_BLV[row, len(documents[row]) - len(ids_S) - 1 : len(documents[row]) - 1],
                teacher_BLV[row, len(teacher_ids[row]) - len(ids_T) - 1 : len(teacher_ids[row]) - 1],
                torch.tensor(ids_S),
                torch.tensor(ids_T),
                groups_between([student_bytes[one] for one in ids_S], [teacher_bytes[one] for one in ids_T]),
            )


def groups_between(student: list[bytes], teacher: list[bytes]) -> list[tuple[int, int, int, int]]:
    """Groups of tokens between common boundaries; [b"a", b"bc"] and [b"ab", b"c"] have one, (0, 2, 0, 2).

    The ends of both, which stand for no bytes, are a group of their own. Where the bytes differ (half a character),
    the groups stop.
    """
    ends_S, ends_T = np.cumsum([len(one) for one in student]), np.cumsum([len(one) for one in teacher])
    joined_S, joined_T = b"".join(student), b"".join(teacher)
    groups, first_S, first_T = [], 0, 0
    common = sorted(set(ends_S.tolist()) & set(ends_T.tolist()))
    for end in common:
        # A token of no bytes is the end of the chain, and a group of its own.
        for side in ("left", "right"):
            stop_S = int(np.searchsorted(ends_S, end, side)) + (side == "left")
            stop_T = int(np.searchsorted(ends_T, end, side)) + (side == "left")
            if stop_S > first_S and stop_T > first_T and joined_S[:end] == joined_T[:end]:
                groups.append((first_S, stop_S, first_T, stop_T))
                first_S, first_T = stop_S, stop_T
    return groups


def _logprobs(model: Any, sequences: list[list[int]]) -> Tensor:
    """[B, L, V]; padding stands at the end, where a causal model does not see it."""
    longest = max(len(ids) for ids in sequences)
    ids_BL = torch.tensor([ids + [0] * (longest - len(ids)) for ids in sequences])
    logprobs_BLV: Tensor = model(input_ids=ids_BL).logits.log_softmax(dim=-1)
    return logprobs_BLV


def _merged(logprobs_XV: Tensor, ids_X: Tensor, groups: list[tuple[int, int]]) -> Tensor:
    """[G, V] log probabilities of groups."""
    sampled_X = logprobs_XV.gather(1, ids_X[:, None])[:, 0]
    rows = [logprobs_XV[start] + sampled_X[start + 1 : stop].sum() for start, stop in groups]
    return torch.stack(rows)


def _sorted_distance(left_XV: Tensor, right_XU: Tensor) -> Tensor:
    width = max(left_XV.shape[1], right_XU.shape[1])
    left_XW, right_XW = (
        pad(one.sort(dim=1, descending=True).values, (0, width - one.shape[1])) for one in (left_XV, right_XU)
    )
    return (left_XW - right_XW).abs().sum()


def _jsd(student_GM: Tensor, teacher_GM: Tensor, beta: float) -> Tensor:
    """Generalised JSD of GKD (2306.13649), the teacher's share of the mixture `beta`; 0 is KL(teacher | student)."""
    if beta == 0.0:
        return kl(teacher_GM, student_GM).sum()
    mixture_GM = torch.logaddexp(student_GM + np.log1p(-beta), teacher_GM + np.log(beta))
    return (beta * kl(teacher_GM, mixture_GM) + (1.0 - beta) * kl(student_GM, mixture_GM)).sum()
