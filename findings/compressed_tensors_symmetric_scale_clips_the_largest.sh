#!/usr/bin/env bash
# compressed-tensors 0.19.0: symmetric int8 and int4 scales are max / 127.5 and max / 7.5, so the largest weight of every
# channel or group is the one that is clipped.
#
# The usual symmetric rule is max / 127 (max / 7): the largest magnitude is exact. Here the scale is half of the whole
# range of codes, max / ((2**bits - 1) / 2), and +max, which would be code 7.5, becomes 7: in 4 bits the largest weight of
# each group, the outlier that matters, comes back 6.7% smaller, and so does -max, though code -8 exists. Simulating a
# folder's kernels with the usual rule (quantisation-aware training, error analysis, porting scales to another runtime)
# is therefore off by a constant factor of 127/127.5 or 7/7.5: read the stored scales instead of computing them again.
# Seen: weights (1, -1, 0.5, 0.25): int8 gives 0.9961, int4 0.9333 for both signs.
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 compressed-tensors==0.19.0
cat > "$folder/check.py" <<'PY'
import sys

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams

weight = torch.tensor([[1.0, -1.0, 0.5, 0.25]])


def largest_after(bits: int) -> list[float]:
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="channel")
    scale, zero = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), args)
    print(f"int{bits}: scale {scale.item():.6f}, usual {1 / (2 ** (bits - 1) - 1):.6f}")
    return [round(value, 4) for value in fake_quantize(weight, scale, zero, args)[0, :2].tolist()]


found = {bits: largest_after(bits) for bits in (8, 4)}
for bits, values in found.items():
    print(f"int{bits}: 1 and -1 become {values}")
sys.exit(found != {8: [0.9961, -0.9961], 4: [0.9333, -0.9333]})
PY
"$folder/venv/bin/python" "$folder/check.py"
