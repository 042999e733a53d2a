#!/usr/bin/env bash
# Versions: diffusers 0.42.1, torch 2.13.0, transformers 5.24.0; Python 3.11 or newer.
# Expected: under FasterCache an SD3 returns as many images as it is given, in every call.
# Behavior: a call that skips the unconditional branch halves the inputs that it knows by name. Pooled
#   texts are not among them: one image in two branches meets two pooled texts, is broadcast without a
#   word, and comes back as two images in two branches. Naming them in the configuration mends it.
# Output seen:
#   as configured by default: 2, 4
#   with pooled texts named: 2, 2
#   as stated
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'diffusers==0.42.1' 'transformers==5.24.0'
"$folder/venv/bin/python" - <<'END' 2> /dev/null
import torch
from diffusers import FasterCacheConfig, SD3Transformer2DModel, apply_faster_cache

NAMED = ("hidden_states", "encoder_hidden_states", "timestep", "pooled_projections")


def rows(**options):
    """How many rows two calls return, the second one in the range where a branch is skipped."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=16, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16,
        pooled_projection_dim=10, pos_embed_max_size=12,
    )
    now = [0.0]
    apply_faster_cache(model, FasterCacheConfig(
        tensor_format="BCHW", current_timestep_callback=lambda: now[0], **options
    ))
    image, text, pooled = torch.randn(1, 4, 16, 16), torch.randn(2, 5, 12), torch.randn(2, 10)
    found = []
    for time in (1000.0, 500.0):
        now[0] = time
        with torch.no_grad():
            out = model(
                hidden_states=torch.cat([image, image]), encoder_hidden_states=text,
                pooled_projections=pooled, timestep=torch.full((2,), time), return_dict=False,
            )[0]
        found.append(len(out))
    return found


default = rows()
named = rows(_unconditional_conditional_input_kwargs_identifiers=NAMED)
print(f"as configured by default: {default[0]}, {default[1]}")
print(f"with pooled texts named: {named[0]}, {named[1]}")
if (default, named) != ([2, 4], [2, 2]):
    raise SystemExit("changed")
print("as stated")
END
