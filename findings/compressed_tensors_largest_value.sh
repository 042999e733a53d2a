#!/usr/bin/env bash
# Versions: compressed-tensors 0.20.0, torch 2.13.0; Python 3.11 or newer.
# Expected: symmetric codes of b bits divide the largest magnitude of a token by 2^(b-1) - 1, so that
#   it is the largest code and comes back as it was.
# Behavior: it is divided by (2^b - 1) / 2, that is 127.5 for 8 bits and 7.5 for 4; the largest value,
#   whichever its sign, comes back smaller by 0.4 % and 6.7 %.
# Output seen:
#   8 bits: 1 / scale 127.50, 1 -> 0.9961, -1 -> -0.9961
#   4 bits: 1 / scale 7.50, 1 -> 0.9333, -1 -> -0.9333
#   as stated
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'compressed-tensors==0.20.0'
"$folder/venv/bin/python" - <<'END'
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

layer = torch.nn.Linear(3, 3)
tokens = torch.tensor([[1.0, -0.5, 0.25], [-1.0, 0.5, 0.25]])
for bits in (8, 4):
    arguments = QuantizationArgs(num_bits=bits, strategy="token", symmetric=True, dynamic=True)
    largest = []
    for token in tokens:
        scale, zero = compute_dynamic_scales_and_zp(token[None], arguments, layer)
        largest.append(fake_quantize(token[None], scale, zero, arguments)[0, 0].item())
    levels = 1 / scale.item()
    print(f"{bits} bits: 1 / scale {levels:.2f}, 1 -> {largest[0]:.4f}, -1 -> {largest[1]:.4f}")
    most = 2 ** (bits - 1) - 1
    expected = most / (most + 0.5)
    right = (abs(levels - most - 0.5) < 1e-3, *(abs(abs(x) - expected) < 1e-4 for x in largest))
    if not all(right):
        raise SystemExit("changed")
print("as stated")
END
