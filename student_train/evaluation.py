"""How close a student is to its teacher on held-out chains: during training, and in assess/evaluating.py.

In: a function from a pack to token metrics, a frozen selection. Out: means over all loss tokens of all ranks. Every
token counts equally, whatever its chain's weight. Where the cache holds draws from the tail, KL and JSD are unbiased
estimates of the dense ones; otherwise the tail is one bucket and they are lower bounds, exact where the support holds
all of the mass. Reverse KL is always a lower bound. Of projected chains only the tokens that begin where a teacher
token does are compared with its distribution.

Bits per byte compare students of different vocabularies: the bits of all loss tokens over the bytes that they spell.
"""

import contextlib
import math
from collections.abc import Callable

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from stillroom.log import Progress
from stillroom.models import cached_pieces
from stillroom.pieces import Vocabulary
from student_train.assess.breakdown import Breakdown
from student_train.data.epoch_plan import PlanSpec
from student_train.data.kept_ids import ids_of
from student_train.data.pack import Pack, TargetView, TorchPack, to_torch
from student_train.data.retokenised import has_leading_space, vocab_path_of
from student_train.data.selection import Selection
from student_train.data.stream import PackStream
from student_train.data.vocabulary.pieces import lengths_of
from student_train.losses.metrics import TokenMetrics
from student_train.model.student import Student
from student_train.runtime.ranks import Ranks


class EvalResult(BaseModel):
    """Means over `num_tokens` held-out tokens, in nats. None where there are no distributions."""

    model_config = ConfigDict(frozen=True)

    num_chains: int
    num_tokens: int
    cross_entropy: float
    """-log q of the teacher's token."""
    bits_per_byte: float | None = None
    """Cross-entropy in bits for each byte of text; the token that ends a chain has none. None where neither cache nor
    run has the vocabulary."""
    forward_kl: float | None
    """KL(teacher | student), the tail as the cache holds it."""
    reverse_kl: float | None
    """KL(student | teacher), everything not stored in one bucket."""
    js: float | None
    """Jensen-Shannon divergence, at most log 2; knowledge retention is 1 - js / log 2."""
    top1_agreement: float | None
    """Share of tokens on which the student's most likely token is the teacher's."""
    accuracy: float
    """Share of tokens on which the student's most likely token is the one that the teacher sampled."""
    confidence: float
    """The student's largest probability."""
    confidence_minus_accuracy: float
    """Calibration: above 0 the student is overconfident."""
    entropy: float
    """Entropy of the student's distribution."""

    @property
    def loss(self) -> float:
        """Decides which checkpoint is best: KL to the teacher, or cross-entropy without distributions."""
        return self.cross_entropy if self.forward_kl is None else self.forward_kl

    def line(self) -> str:
        """For the progress output."""
        parts = [f"cross-entropy {self.cross_entropy:.4f}"]
        if self.bits_per_byte is not None:
            parts.append(f"bits per byte {self.bits_per_byte:.4f}")
        if self.forward_kl is not None:
            parts += [f"KL {self.forward_kl:.4f}", f"JSD {self.js:.4f}", f"top-1 agreement {self.top1_agreement:.1%}"]
        return "  ".join([*parts, f"confidence - accuracy {self.confidence_minus_accuracy:+.3f}"])


def evaluate(
    metrics_of: Callable[[TorchPack], TokenMetrics],
    selection: Selection,
    spec: PlanSpec,
    ranks: Ranks,
    breakdown: Breakdown | None = None,
) -> EvalResult:
    """Metrics over all packs of the selection, sharded over the ranks, which must all call this together.

    `breakdown` gets this rank's packs.
    """
    sums = torch.zeros(len(TokenMetrics._fields), dtype=torch.float64, device=ranks.device)
    num_tokens = num_compared = num_bytes = 0
    bytes_of = _byte_counter(selection)
    # A step is one pack a rank: all ranks call the model equally often, as collectives under ZeRO-3 require.
    stream = PackStream(
        selection,
        spec,
        packs_per_step=ranks.num_ranks,
        rank=ranks.rank,
        world=ranks.num_ranks,
        num_epochs=1,
        tell=ranks.tell,
    )
    num_packs = stream.plans.total_packs()
    view = TargetView(with_draws=selection.header.draws > 0)
    with stream, Progress("evaluate", num_packs, "packs") if ranks.is_first else contextlib.nullcontext() as progress:
        for number, pack in enumerate(stream):
            metrics = metrics_of(to_torch(pack, ranks.device, view))
            if pack.num_loss_tokens:
                is_compared_N = _compared(pack)
                sums += _sums(metrics, is_compared_N)
                if breakdown is not None:
                    breakdown.add(pack, metrics, None if is_compared_N is None else is_compared_N.numpy())
                num_tokens += pack.num_loss_tokens
                num_compared += pack.num_loss_tokens if is_compared_N is None else int(is_compared_N.sum())
                num_bytes += 0 if bytes_of is None else bytes_of(pack)
            if progress is not None:
                # What other ranks read is only known at the end.
                known = num_tokens if ranks.num_ranks == 1 else 0
                progress.update(min((number + 1) * ranks.num_ranks, num_packs), known)
        counts = map(float, (num_compared, num_bytes, num_tokens))
        *totals, total_compared, total_bytes, total_tokens = ranks.sum([*sums.tolist(), *counts])
        if progress is not None:
            progress.update(num_packs, int(total_tokens))
    named = dict(zip(TokenMetrics._fields, totals, strict=True))
    return _result(selection, named, int(total_tokens), int(total_compared), int(total_bytes))


def student_metrics(student: Student) -> Callable[[TorchPack], TokenMetrics]:
    """Metrics of a student without an engine."""
    student.eval()

    def metrics_of(pack: TorchPack) -> TokenMetrics:
        with torch.no_grad():
            return TokenMetrics(*student(pack))

    return metrics_of


COMPARED = ("forward_kl_N", "reverse_kl_N", "jsd_N", "agreement_N")
"""Metrics that compare with a distribution."""


def _compared(pack: Pack) -> torch.Tensor | None:
    """bool [N]: which loss tokens have a distribution to compare with; None for text alone."""
    if pack.tail_logmass_N is None:
        return None
    # A cut vocabulary may have lost all stored ids of a token, where metrics are nan.
    has_support_N = (pack.logprobs_NK > -np.inf).any(axis=1)
    return torch.from_numpy(has_support_N if pack.is_common_N is None else has_support_N & pack.is_common_N)


def _sums(metrics: TokenMetrics, is_compared_N: torch.Tensor | None) -> torch.Tensor:
    """float64, one sum for each metric."""
    values = metrics._asdict()
    if is_compared_N is not None:
        is_compared_N = is_compared_N.to(metrics.forward_kl_N.device)
        # Not a product: nan * 0 is nan.
        values |= {name: values[name].where(is_compared_N, 0.0) for name in COMPARED}
    return torch.stack([one.double().sum() for one in values.values()])


def _byte_counter(selection: Selection) -> Callable[[Pack], int] | None:
    """A function from a pack to the bytes that its loss tokens stand for; None without the vocabulary's file.

    A special token counts as its text, which a student without it has to spell, and as nothing where it ends a chain.
    """
    paths = [vocab_path_of(selection, folder) for folder in dict.fromkeys(selection.folders)]
    found = [cached_pieces(path) for path in paths if path.exists()]
    if not found:
        return None
    pieces, special = found[0]
    known_V = lengths_of(Vocabulary(pieces, special).bytes_by_id())
    width = selection.header.vocab_size
    # Kept ids are the cache's, and go beyond the number that is left of them.
    if selection.header.kept_ids is not None:
        width = int(ids_of(selection.header.kept_ids)[-1]) + 1
    lengths_V = np.zeros(max(len(known_V), width), np.int64)
    lengths_V[: len(known_V)] = known_V
    is_special_V = np.zeros(len(lengths_V), bool)
    is_special_V[sorted(special)] = True
    has_space_V = np.zeros(len(lengths_V), bool)
    if selection.is_retokenised and has_leading_space(selection):
        has_space_V[[token_id for token_id, piece in pieces.items() if piece.startswith(" ")]] = True
    if selection.header.kept_ids is not None:
        kept_K = ids_of(selection.header.kept_ids)
        lengths_V, is_special_V, has_space_V = lengths_V[kept_K], is_special_V[kept_K], has_space_V[kept_K]

    def count(pack: Pack) -> int:
        ids_N = pack.sampled_ids_N
        is_last_N = pack.token_N == selection.num_tokens_R[pack.row_N] - 1
        is_end_N = is_last_N & is_special_V[ids_N]
        # A text begins with a chain, and again after a special token.
        is_first_N = (pack.token_N == 0) | np.append(False, is_special_V[ids_N])[:-1]
        return int(lengths_V[ids_N][~is_end_N].sum()) - int((is_first_N & has_space_V[ids_N]).sum())

    return count


def _result(
    selection: Selection, totals: dict[str, float], num_tokens: int, num_compared: int, num_bytes: int
) -> EvalResult:
    counts = dict.fromkeys(COMPARED, max(num_compared, 1))
    mean = {name: total / counts.get(name, num_tokens) for name, total in totals.items()}
    has_teacher = not selection.is_text
    return EvalResult(
        num_chains=selection.num_chains,
        num_tokens=num_tokens,
        cross_entropy=mean["cross_entropy_N"],
        bits_per_byte=totals["cross_entropy_N"] / math.log(2.0) / num_bytes if num_bytes else None,
        forward_kl=mean["forward_kl_N"] if has_teacher else None,
        reverse_kl=mean["reverse_kl_N"] if has_teacher else None,
        js=mean["jsd_N"] if has_teacher else None,
        top1_agreement=mean["agreement_N"] if has_teacher else None,
        accuracy=mean["correct_N"],
        confidence=mean["confidence_N"],
        confidence_minus_accuracy=mean["confidence_N"] - mean["correct_N"],
        entropy=mean["entropy_N"],
    )
