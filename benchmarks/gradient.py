"""The gradient that stored targets give a student, against that of the teacher's whole distribution.

    python -m benchmarks.gradient [--json] [--teacher FOLDER] [--student FOLDER] [--cache CACHE] [--tokens N]
                                  [--loss NAME]

Chains of a cache (by default the demo's) are read by the teacher again. Its logits give the dense reference, the
gradient of sum_v p_v log(p_v / q_v) over all of the vocabulary with respect to every weight of the student, in float32;
and, through the sampler plugin's functions, the support, a codec and back, and student_train's fused losses, the
gradient of each kind of stored target. `angle_deg` is between the two, `length` is their ratio, both of the sum over
all tokens. Drawn tails are unbiased, so their angle shrinks with the number of tokens (`tokens`) and with the draws
averaged over; truncation does not. `--loss` asks the same of another divergence, by so many exact entries and draws,
against that divergence of the whole distributions. The last line is one JSON object; with --json it is the only one.

    T completion tokens of a chain, V vocabulary, H hidden, P weights of the student
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from stillroom.cache.codec import decode, encode
from stillroom.config import Json
from stillroom.schema.manifest import ShardHeader
from stillroom.schema.records import Signals
from student_train.data.pack import dense_draws
from student_train.losses.divergences import Divergence, ForwardKL, Tail
from student_train.losses.fused_head import fused_loss
from student_train.losses.mix import LossMix
from student_train.losses.names import LOSSES
from student_train.losses.targets import SparseTargets, TailDraws
from teacher_cache.engine.plugin.signals import signal_rows
from teacher_cache.engine.row_layout import Layout, capture_of_rows
from teacher_cache.writer.rows import support_of

DEMO = Path("runs/demo")
DENSE_LOSS = ForwardKL()
"""With a bucket for every id it is the plain KL(teacher, student)."""


@dataclass(frozen=True)
class Target:
    """What is stored of a token, and the loss that reads it. Draws of another `seed` are other draws."""

    name: str
    codec: str
    max_support: int
    nucleus: float | None
    loss: Divergence
    draws: int = 0
    seed: int = 0


def _other_targets(loss: Divergence) -> list[Target]:
    """Without draws the tail is one bucket."""
    sizes = [(8, 0), (8, 8), (16, 0), (16, 16), (64, 0)]
    return [Target(f"{m} exact" + f" + {n} drawn" * (n > 0), "topk-u8", m, 0.999, loss, n) for m, n in sizes]


def _targets() -> list[Target]:
    tops: list[tuple[str, Tail]] = [("truncated", "drop"), ("renormalised", "renormalise"), ("tail bucket", "bucket")]
    found = [
        Target(f"{name} {k}", "topk-f32", k, None, ForwardKL(tail=tail)) for k in (8, 16, 64) for name, tail in tops
    ]
    found += [Target(f"nucleus 64, {codec}", codec, 64, 0.999, ForwardKL()) for codec in CODECS_SHOWN]
    found += [Target(f"hybrid {m}+{n}", "topk-u8", m, 0.999, ForwardKL(), n) for m, n in ((4, 4), (8, 8), (16, 16))]
    found += [
        Target(f"hybrid 8+8, draws {s + 1}", "topk-u8", 8, 0.999, ForwardKL(), 8, s) for s in range(1, NUM_REDRAWS)
    ]
    return found


COMPARED = {
    name: kind for name, kind in LOSSES.items() if issubclass(kind, Divergence) and kind.needs_start == "nothing"
}
CODECS_SHOWN = ("topk-f32", "topk-u8")
NUM_REDRAWS = 4
AVERAGED = "hybrid 8+8, mean of 4 draws"


def main() -> None:
    """Measures and prints."""
    from transformers import AutoModelForCausalLM

    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    chains = read_chains(arguments.cache, arguments.tokens)
    teacher = AutoModelForCausalLM.from_pretrained(arguments.teacher, dtype=torch.float32).eval()
    student = AutoModelForCausalLM.from_pretrained(arguments.student, dtype=torch.float32).eval()
    loss = COMPARED[arguments.loss]()
    targets = _targets() if loss == DENSE_LOSS else _other_targets(loss)
    result = compare(teacher, student, chains, targets, loss)
    if not arguments.json:
        print(f"{result['tokens']} tokens, student {arguments.student}")
        print(f"{'targets':28} {'angle':>8} {'length':>7}")
        for row in result["rows"]:
            print(f"{row['targets']:28} {row['angle_deg']:7.2f}° {row['length']:7.3f}")
    print(json.dumps(result))


def read_chains(cache: Path, num_tokens: int) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, completion ids) of chains, by sample id, until they have `num_tokens` completion tokens."""
    from stillroom.cache.reader import open_cache

    found, seen = [], 0
    with open_cache(cache) as opened:
        query = "SELECT prompt_token_ids, token_ids FROM shards ORDER BY sample_id"
        for row in opened.session.arrow(query).to_pylist():
            if seen >= num_tokens:
                break
            found.append((row["prompt_token_ids"], row["token_ids"]))
            seen += len(row["token_ids"])
    return found


def compare(
    teacher: Any,
    student: Any,
    chains: Sequence[tuple[list[int], list[int]]],
    targets: Sequence[Target],
    dense: Divergence = DENSE_LOSS,
) -> Json:
    """Angles and lengths of each target's gradient against that of the divergence `dense` of whole distributions;
    teacher and student are Hugging Face models of one vocabulary.
    """
    parameters = [one for one in student.parameters() if one.requires_grad]
    dense_P = [torch.zeros_like(one) for one in parameters]
    sums = {target.name: [torch.zeros_like(one) for one in parameters] for target in targets}
    num_tokens = 0
    for number, (prompt, completion) in enumerate(chains):
        logits_TV, hidden_TH = _forward(teacher, student, prompt, completion)
        num_tokens += len(completion)
        weight_VH = student.get_output_embeddings().weight
        _add(dense_P, _dense_loss(dense, logits_TV, hidden_TH, weight_VH), parameters)
        for target in targets:
            stored = stored_targets(logits_TV, completion, target, number)
            mix = LossMix((target.loss,))
            _add(sums[target.name], fused_loss(hidden_TH, weight_VH, stored, mix).loss_sum, parameters)
        print(f"chain {number + 1} of {len(chains)}", file=sys.stderr)
    redrawn = [sums[target.name] for target in targets if target.name.startswith("hybrid 8+8")]
    rows = [{"targets": name, **_against(dense_P, gradient)} for name, gradient in sums.items() if "draws" not in name]
    if len(redrawn) > 1:
        mean_P = [torch.stack(parts).mean(dim=0) for parts in zip(*redrawn, strict=True)]
        rows.append({"targets": AVERAGED, **_against(dense_P, mean_P)})
    return {"tokens": num_tokens, "rows": rows}


def stored_targets(logits_TV: Tensor, completion: list[int], target: Target, chain: int) -> SparseTargets:
    """What a loss would read after the teacher's logits [T, V] went through sampler, support and codec."""
    num_tokens, vocab_size = logits_TV.shape
    layout = Layout(min(target.max_support, vocab_size), target.draws)
    seeds_T = torch.full((num_tokens,), 1000 * target.seed + chain)
    rows = signal_rows(logits_TV, torch.tensor(completion), layout, seeds_T, torch.arange(num_tokens))
    ranks_T = rows.ranks.numpy().astype(np.int32)
    capture = capture_of_rows(rows.ids.numpy(), rows.logprobs.numpy(), ranks_T, completion, layout.top, layout)
    written = support_of(capture, layout.top, target.nucleus)
    return targets_of(through_codec(written, target.codec, layout, vocab_size), completion)


def through_codec(signals: Signals, codec: str, layout: Layout, vocab_size: int) -> Signals:
    """The signals as a reader of a shard would see them."""
    header = ShardHeader(
        codec=codec,
        max_support=layout.top,
        nucleus=None,
        draws=layout.draws,
        entropy="exact",
        vocab_size=vocab_size,
        run_id="r",
        worker="w",
        teacher_fingerprint="t",
        tokenizer_fingerprint="k",
        template_fingerprint="c",
    )
    token_ids = [np.zeros(len(signals.topk_n_T), np.int32)]
    columns = encode(codec, [signals])
    return decode(pa.table({"token_ids": pa.array(token_ids), **columns}), header, "memory")[0]


def targets_of(signals: Signals, completion: list[int]) -> SparseTargets:
    """Decoded signals as the losses want them."""
    ids_TK, logprobs_TK = signals.dense(int(signals.topk_n_T.max()))
    draws = None
    if signals.draws is not None:
        ids_TM, drawn_TM, weights_TM = dense_draws(signals.draws, signals.tail_logmass_T)
        draws = TailDraws(torch.from_numpy(ids_TM), torch.from_numpy(weights_TM), torch.from_numpy(drawn_TM))
    return SparseTargets(
        torch.from_numpy(ids_TK),
        torch.from_numpy(logprobs_TK),
        torch.tensor(signals.tail_logmass_T),
        torch.tensor(completion),
        draws=draws,
    )


def _forward(teacher: Any, student: Any, prompt: list[int], completion: list[int]) -> tuple[Tensor, Tensor]:
    """The teacher's logits [T, V] and the student's hidden states [T, H] that predict the completion."""
    ids_1L = torch.tensor([[*prompt, *completion]])
    places = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
    with torch.no_grad():
        logits_TV = teacher(input_ids=ids_1L, use_cache=False).logits[0, places].float()
    hidden_TH = student.get_decoder()(input_ids=ids_1L, use_cache=False).last_hidden_state[0, places]
    return logits_TV, hidden_TH


def _dense_loss(loss: Divergence, logits_TV: Tensor, hidden_TH: Tensor, weight_VH: Tensor) -> Tensor:
    teacher_TV, student_TV = logits_TV.log_softmax(dim=-1), (hidden_TH @ weight_VH.T).log_softmax(dim=-1)
    # Each id a bucket: nothing is merged.
    return loss.between(teacher_TV, student_TV).sum()


def _add(sums_P: list[Tensor], loss: Tensor, parameters: list[Tensor]) -> None:
    for total, gradient in zip(sums_P, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True):
        total += gradient


def _against(dense_P: list[Tensor], other_P: list[Tensor]) -> dict[str, float]:
    """Angle in degrees and ratio of lengths of two gradients."""
    dot = sum(float((a.double() * b.double()).sum()) for a, b in zip(dense_P, other_P, strict=True))
    lengths = [math.sqrt(sum(float(a.double().square().sum()) for a in one)) for one in (dense_P, other_P)]
    cosine = min(1.0, max(-1.0, dot / (lengths[0] * lengths[1])))
    return {"angle_deg": round(math.degrees(math.acos(cosine)), 3), "length": round(lengths[1] / lengths[0], 4)}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gradient", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--json", action="store_true", help="print the JSON object alone")
    parser.add_argument("--teacher", type=Path, default=DEMO / "teacher")
    parser.add_argument("--student", type=Path, default=DEMO / "student")
    parser.add_argument("--cache", type=Path, default=DEMO / "cache", help="cache whose chains are read")
    parser.add_argument("--tokens", type=int, default=2000, help="completion tokens to read")
    parser.add_argument("--loss", choices=list(COMPARED), default=DENSE_LOSS.name, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
