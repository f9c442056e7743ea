"""What each token counts in the losses, out of what the cache says of it: before any model has seen the batch.

In: a pack. Out: the same pack with its chains' weights multiplied token by token. What depends on the student (focal
weights) is a matter of the losses.

    N loss tokens
"""

from dataclasses import replace

import numpy as np

from student_train.stage_config import TokenWeightsConfig
from student_train.streaming.pack import Pack


def weighed(pack: Pack, config: TokenWeightsConfig | None) -> Pack:
    """The pack with weights_N float32 [N] times (1 + entropy)^a times (1 - tail mass)^b, entropy in nats."""
    if config is None:
        return pack
    assert pack.entropy_N is not None
    assert pack.tail_logmass_N is not None
    weights_N = pack.weights_N.astype(np.float64)
    if config.entropy is not None:
        weights_N *= (1.0 + pack.entropy_N.astype(np.float64)) ** config.entropy
    if config.tail is not None:
        held_N = -np.expm1(np.minimum(pack.tail_logmass_N.astype(np.float64), 0.0))
        weights_N *= held_N**config.tail
    return replace(pack, weights_N=weights_N.astype(np.float32))
