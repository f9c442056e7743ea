"""`teacher-cache show`: one chain, with every token coloured by the teacher's certainty and its alternatives.

In: a decoded sample. Out: text on the terminal, or with --html a self-contained page on which pointing at a token shows
its distribution. What a model wrote never reaches the terminal as control characters, nor the page as markup: the
page's one script is allowed by its hash, and everything from the cache is data to it (JSON, set as text).

Shape legend: T completion tokens.
"""

import base64
import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from stillroom.cache.reader import Sample, readable
from stillroom.errors import ConfigError
from stillroom.html.charts import Line, line_chart
from stillroom.html.report import TEMPLATES, render_page
from stillroom.log import harmless, one_line, pad, width_of
from stillroom.schema.records import Float32
from stillroom.storage.paths import write_text_atomic

CERTAINTY = (0.9, 0.7, 0.5, 0.3)
"""Lower ends of the levels of certainty, by the probability of the first choice; below the last is level 4."""

STYLES = ("", "color(71)", "color(178)", "color(208)", "color(196)")
CONTEXT_TOKENS = 12
MAX_CANDIDATES = 20
EXACT = "topk-f32"
ROUNDED = "the list is stored as 8-bit codes, the sampled token's probability (above) in 16 bits: they differ slightly"
BAR_WIDTH = 24


def print_chain(sample: Sample) -> None:
    """The whole chain on stdout; colours where that is a terminal."""
    console = _console()
    for line in header_lines(sample.chain):
        console.print(line, markup=False)
    for message in sample.messages:
        _heading(console, f"prompt, {one_line(message['role'])}")
        console.print(harmless(message["content"]), markup=False)
    # Not each piece by itself: a character may be spread over several tokens.
    texts = readable(sample.pieces_T)
    levels_T = levels_of(top1_prob_of(sample))
    for name, start, stop in parts_of(sample):
        _heading(console, name)
        console.print(_coloured(texts, levels_T, sample, start, stop))
    console.print()
    console.print(_legend())


def print_token(sample: Sample, position: int) -> None:
    """The distribution at one position, from 0, in its context. Raises ConfigError outside the chain."""
    check_position(sample, position)
    num_tokens = len(sample.token_ids_T)
    console, signals = _console(), sample.signals
    texts = readable(sample.pieces_T)
    start, stop = max(position - CONTEXT_TOKENS, 0), min(position + CONTEXT_TOKENS + 1, num_tokens)
    context = Text(harmless("".join(texts[start:position])), style="dim")
    context.append(harmless(sample.pieces_T[position]), style="bold reverse")
    context.append(harmless("".join(texts[position + 1 : stop])), style="dim")
    console.print(context)
    console.print()
    rank, prob = signals.sampled_rank_T[position], np.exp(signals.sampled_logprob_T[position])
    where = f"token {position} of {num_tokens}"
    console.print(f"{where}  rank {rank}  probability {prob:.4f}  entropy {signals.entropy_T[position]:.3f} nats")
    for line in candidate_lines(sample, position):
        console.print(line, markup=False)
    if sample.header.codec != EXACT:
        console.print()
        console.print(ROUNDED, style="dim")


def check_position(sample: Sample, position: int) -> None:
    """Raises ConfigError for a position outside the chain."""
    if not 0 <= position < len(sample.token_ids_T):
        raise ConfigError(f"--token {position}: the chain has tokens 0 to {len(sample.token_ids_T) - 1}")


def header_lines(chain: dict[str, Any]) -> list[str]:
    """What is known of a chain, in three lines; a fourth says what decided the verdict."""
    undecided = "undecided" if chain["judge"] else "not judged"
    verdict = {True: "right", False: "wrong", None: undecided}[chain["correct"]]
    judge = f" ({one_line(chain['judge'])})" if chain["judge"] else ""
    reference = "" if chain["reference"] is None else f"  reference {one_line(chain['reference'])}"
    reasoning = "reasoning never ended" if chain["reasoning_end"] is None else f"{chain['reasoning_end']} of reasoning"
    where = f"source {one_line(chain['source'])}  split {one_line(chain['split'])}"
    means = f"mean top-1 {chain['mean_top1_prob']:.1%}  mean tail {chain['mean_tail_mass']:.2%}"
    rule = f"{one_line(chain['rule'])}: {one_line(chain['compared'] or '')}" if chain.get("rule") else ""
    return [
        f"sample {chain['sample_id']}  {where}  run {one_line(chain['run_id'])}",
        f"verdict {verdict}{judge}{reference}  finish {one_line(chain['finish_reason'])}",
        *([f"decided by {rule.removesuffix(': ')}"] if rule else []),
        f"{chain['num_tokens']} tokens, {reasoning}  mean entropy {chain['mean_entropy']:.3f} nats  {means}",
    ]


def candidate_lines(sample: Sample, position: int) -> list[str]:
    """The candidates of one token, the sampled one marked; what is outside the support and what was drawn there."""
    signals = sample.signals.slice(position, position + 1)
    num_shown = min(len(signals.topk_ids_N), MAX_CANDIDATES)
    ids = signals.topk_ids_N[:num_shown].tolist()
    pieces = [repr_piece(sample.piece_of[token]) for token in ids]
    probs = np.exp(signals.topk_logprobs_N, dtype=np.float64)
    width = max(map(width_of, (*pieces, "outside the support")))
    sampled = int(sample.token_ids_T[position])
    lines = []
    for rank, (token, prob, piece) in enumerate(zip(ids, probs, pieces, strict=False), 1):
        mark = "◀ sampled" if token == sampled else ""
        bar = "█" * round(BAR_WIDTH * float(prob))
        lines.append(f"{rank:>4}  {pad(piece, width)}  {prob:8.4f}  {bar} {mark}".rstrip())
    tail = float(np.exp(signals.tail_logmass_T[0]))
    lines.append(f"      {pad('outside the support', width)}  {tail:8.4f}")
    if len(probs) > num_shown:
        lines.append(f"      {pad(f'{len(probs) - num_shown} more candidates', width)}  {probs[num_shown:].sum():8.4f}")
    if (drawn := draws_of(sample, position)) is not None:
        lines.append(f"      drawn from the tail: {drawn}")
    if sampled not in signals.topk_ids_N:
        lines.append(f"      the sampled token, rank {signals.sampled_rank_T[0]}, is outside the support")
    return lines


def draws_of(sample: Sample, position: int) -> str | None:
    """The tokens drawn from the tail at one position, with how often; None where there are none."""
    draws = sample.signals.slice(position, position + 1).draws
    if draws is None or not len(draws.ids_D):
        return None
    times = Counter(draws.ids_D.tolist())
    return ", ".join(repr_piece(sample.piece_of[token]) + (f" ×{n}" if n > 1 else "") for token, n in times.items())


def top1_prob_of(sample: Sample) -> Float32:
    """Probability of the first choice of each token, [T] float32."""
    n_T = sample.signals.topk_n_T
    # Candidates are stored from the most probable one on.
    starts_T = np.cumsum(n_T, dtype=np.int64) - n_T
    probs_T: Float32 = np.exp(sample.signals.topk_logprobs_N[starts_T])
    return probs_T


def levels_of(top1_prob_T: Float32) -> list[int]:
    """Level of certainty of each token: 0 is sure, 4 is not."""
    return [sum(prob < limit for limit in CERTAINTY) for prob in top1_prob_T.tolist()]


def parts_of(sample: Sample) -> list[tuple[str, int, int]]:
    """Name and token range of reasoning and answer, those that hold a token."""
    end, num_tokens = sample.chain["reasoning_end"], len(sample.token_ids_T)
    if end is None:
        return [("reasoning, which never ended", 0, num_tokens)]
    parts = [("reasoning", 0, end), ("answer", end, num_tokens)]
    return [(name, start, stop) for name, start, stop in parts if stop > start]


def repr_piece(piece: str) -> str:
    """A piece with its blanks to be seen and nothing that could act on a terminal."""
    return "'" + one_line(piece) + "'"


def _coloured(texts: Sequence[str], levels_T: Sequence[int], sample: Sample, start: int, stop: int) -> Text:
    ranks_T = sample.signals.sampled_rank_T
    text = Text()
    for position in range(start, stop):
        style = STYLES[levels_T[position]] + (" underline" if ranks_T[position] > 1 else "")
        text.append(harmless(texts[position]), style=style.strip() or None)
    return text


def _legend() -> Text:
    text = Text("the teacher's first choice had ", style="dim")
    ends = ("90% or more", "70 to 90%", "50 to 70%", "30 to 50%", "under 30%")
    for style, words in zip(STYLES, ends, strict=True):
        text.append(words, style=style or None)
        text.append("  ")
    text.append("another token was sampled", style="underline")
    return text


def _heading(console: Console, name: str) -> None:
    console.print()
    console.print(f"── {name} " + "─" * max(0, 40 - len(name)), style="bold", markup=False)


def _console() -> Console:
    # soft_wrap: the terminal folds the lines, so that what is copied has no line breaks of ours.
    return Console(file=sys.stdout, highlight=False, soft_wrap=True, emoji=False)


SMOOTHED_POINTS = 200
"""A longer chain's entropy is drawn as means over this many windows."""


def write_chain_page(sample: Sample, out: Path, position: int | None = None) -> None:
    """Writes the page whole; it opens with the token at `position` chosen. Raises ConfigError outside the chain."""
    if position is not None:
        check_position(sample, position)
    script = (TEMPLATES / "show.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    page = render_page(
        "show.html",
        title=f"Chain {sample.chain['sample_id'][:12]}",
        facts=[line.replace("  ", " · ") for line in header_lines(sample.chain)],
        chosen=position,
        messages=[{name: harmless(value) for name, value in one.items()} for one in sample.messages],
        parts=_parts(sample),
        entropy_svg=_entropy_chart(sample),
        data=_data(sample),
        script=script,
        script_hash=digest,
    )
    write_text_atomic(out, page)


def _parts(sample: Sample) -> list[dict[str, Any]]:
    """Reasoning and answer, each a list of tokens with the classes that colour them."""
    texts, levels_T = readable(sample.pieces_T), levels_of(top1_prob_of(sample))
    ranks_T = sample.signals.sampled_rank_T.tolist()
    return [
        {
            "name": name,
            "tokens": [
                {"position": at, "text": harmless(texts[at]), "level": levels_T[at], "other": ranks_T[at] > 1}
                for at in range(start, stop)
            ],
        }
        for name, start, stop in parts_of(sample)
    ]


def _data(sample: Sample) -> dict[str, Any]:
    """What the script shows of each token; pieces are named once and pointed to by number."""
    signals = sample.signals
    pieces: dict[str, int] = {}

    def number_of(token: int) -> int:
        return pieces.setdefault(one_line(sample.piece_of[token]), len(pieces))

    ends_T = np.cumsum(signals.topk_n_T, dtype=np.int64)
    tokens = []
    for at, (end, n) in enumerate(zip(ends_T.tolist(), signals.topk_n_T.tolist(), strict=True)):
        shown = slice(end - n, end - n + min(n, MAX_CANDIDATES))
        probs = np.exp(signals.topk_logprobs_N[shown], dtype=np.float64)
        rest = float(np.exp(signals.topk_logprobs_N[shown.stop : end], dtype=np.float64).sum())
        tokens.append(
            {
                "sampled": number_of(int(sample.token_ids_T[at])),
                "rank": int(signals.sampled_rank_T[at]),
                # Rounded: a chain of 32,000 tokens has 640,000 numbers here, and the page has to open at once.
                "prob": round(float(np.exp(signals.sampled_logprob_T[at])), 6),
                "entropy": round(float(signals.entropy_T[at]), 4),
                "ids": [number_of(token) for token in signals.topk_ids_N[shown].tolist()],
                "probs": [round(prob, 5) for prob in probs.tolist()],
                "more": n - len(probs),
                "rest": round(rest, 5),
                "draws": draws_of(sample, at),
                "tail": round(float(np.exp(signals.tail_logmass_T[at])), 5),
            }
        )
    return {"pieces": list(pieces), "tokens": tokens}


def _entropy_chart(sample: Sample) -> str:
    entropy_T = sample.signals.entropy_T
    windows = np.array_split(np.arange(len(entropy_T)), min(len(entropy_T), SMOOTHED_POINTS))
    x = [float(window.mean()) for window in windows]
    y = [float(entropy_T[window].mean()) for window in windows]
    return line_chart([Line("", x, y)], "position (tokens)", "entropy (nats)", from_zero=True).svg(wide=True)
