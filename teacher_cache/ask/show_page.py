"""`teacher-cache show --html`: one chain as a self-contained page on which pointing at a token shows its distribution.

In: a decoded sample. Out: an HTML file that needs no network. The page's one script is allowed by its hash; everything
from the cache is data to it (JSON, set as text), never markup.
"""

import base64
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from shared.charts import Line, line_chart
from shared.files import write_text_atomic
from shared.reader import Sample, readable
from shared.report import TEMPLATES, render_page
from shared.terminal import harmless, one_line
from teacher_cache.ask.show import (
    MAX_CANDIDATES,
    check_position,
    draws_of,
    header_lines,
    levels_of,
    parts_of,
    top1_prob_of,
)

SMOOTHED_POINTS = 200
"""A longer chain's entropy is drawn as means over so many windows."""


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
