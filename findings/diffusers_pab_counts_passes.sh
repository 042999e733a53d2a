#!/usr/bin/env bash
# Versions: diffusers 0.42.1, torch 2.13.0, transformers 5.24.0; Python 3.11 or newer.
# Expected: with two passes a step (guidance as SD3's and others' pipelines may run it), an interval of
#   2 computes attention in every second step, for both passes.
# Behavior: the hook of Pyramid Attention Broadcast counts passes. The first pass of every step
#   computes, and the second one gives the first one's output again, in every step.
# Output seen:
#   first pass computes in steps 0 1 2 3, the second in none
#   the second pass returns what the first one computed, though its inputs differ
#   as stated
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'diffusers==0.42.1' 'transformers==5.24.0'
"$folder/venv/bin/python" - <<'END' 2> /dev/null
import torch
from diffusers import FluxTransformer2DModel
from diffusers.hooks import (
    PyramidAttentionBroadcastConfig,
    apply_pyramid_attention_broadcast,
    hooks,
)

torch.manual_seed(0)
model = FluxTransformer2DModel(
    in_channels=16, num_layers=1, num_single_layers=1, num_attention_heads=2,
    attention_head_dim=16, pooled_projection_dim=10, axes_dims_rope=(4, 6, 6),
    joint_attention_dim=12,
)
config = PyramidAttentionBroadcastConfig(
    spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500.0
)
apply_pyramid_attention_broadcast(model, config)
attention = model.single_transformer_blocks[0].attn
computed, outputs, now = [], [], [None]
attention.to_q.register_forward_hook(lambda *_: computed.append(now[0]))
attention.register_forward_hook(lambda *given: outputs.append(given[-1]))
x, pooled = torch.randn(1, 16, 16), torch.randn(1, 10)
texts = {"cond": torch.randn(1, 5, 12), "uncond": torch.randn(1, 5, 12)}
ids = torch.zeros(16, 3), torch.zeros(5, 3)
with torch.no_grad():
    for step in range(4):
        for name, text in texts.items():
            now[0] = (step, name)
            hooks._set_cache_context(model, hooks.CacheContext(name))
            model(x + step, text, pooled, torch.full((1,), 0.5), *ids)
first = [step for step, name in computed if name == "cond"]
second = [step for step, name in computed if name == "uncond"]
steps = " ".join(map(str, first))
print(f"first pass computes in steps {steps}, the second in {second or 'none'}")
same = all(torch.equal(a, b) for a, b in zip(outputs[::2], outputs[1::2]))
said = "what the first one computed, though its inputs differ" if same else "another"
print(f"the second pass returns {said}")
if (first, second, same) != ([0, 1, 2, 3], [], True):
    raise SystemExit("changed")
print("as stated")
END
