"""What the sampler's signals cost inside vLLM, against its own top k: functions of logits, no engine.

    python -m benchmarks.sampler [--vocab V] [--rows N] [--threads T] [--json]

`stock` does what vLLM's first runner does for `logprobs=64`: log_softmax, a top k over the vocabulary, the sampled
token's rank. Microseconds a token, best of 40 repetitions. The last line is one JSON object.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor

from stillroom.log import note
from teacher_cache.engine.plugin.signals import signal_rows
from teacher_cache.engine.row_layout import Layout

LAYOUTS = {
    "top_64": Layout(64),
    "top_64_tau": Layout(64, 0, (2.0,)),
    "top_64_draws_16": Layout(64, 16),
    "top_64_draws_16_taus": Layout(64, 16, (0.5, 2.0, 4.0)),
    "top_8_draws_8": Layout(8, 8),
    "top_256": Layout(256),
}
"""All of them with the exact entropy."""
NUM_REPEATS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logits_NV = 3.0 * torch.randn(options.rows, options.vocab, generator=torch.Generator().manual_seed(0))
    sampled_N, numbers_N = logits_NV.argmax(dim=1), torch.arange(options.rows)
    result = {"stock_top_64": _us_per_token(lambda: _stock(logits_NV, sampled_N), options.rows)}
    for name, layout in LAYOUTS.items():
        result[name] = _us_per_token(
            lambda layout=layout: signal_rows(logits_NV, sampled_N, layout, numbers_N, numbers_N),  # type: ignore[misc]
            options.rows,
        )
    if not options.json:
        for name, cost in result.items():
            note(f"{name:24s} {cost:7.1f} us/token")
    print(json.dumps(result))


def _stock(logits_NV: Tensor, sampled_N: Tensor) -> None:
    logprobs_NV = logits_NV.log_softmax(dim=-1, dtype=torch.float32)
    logprobs_NV.topk(64, dim=-1)
    (logprobs_NV >= logprobs_NV.gather(1, sampled_N[:, None])).sum(dim=-1)


def _us_per_token(run: Callable[[], object], num_rows: int) -> float:
    run()
    seconds = []
    for _ in range(NUM_REPEATS):
        before_s = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - before_s)
    return round(1e6 * min(seconds) / num_rows, 1)


if __name__ == "__main__":
    main()
