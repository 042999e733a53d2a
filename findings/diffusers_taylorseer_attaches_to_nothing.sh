#!/usr/bin/env bash
# Versions: diffusers 0.42.1, torch 2.13.0, transformers 5.24.0; Python 3.11 or newer.
# Expected: the hook of TaylorSeer with its defaults caches "all attention-like modules", as its
#   documentation says, or says that it found none.
# Behavior: its patterns name modules `attn`. PixArt's are `attn1` and `attn2`: none is cached, and
#   nothing is said. Of the two attentions of a dual block of SD3.5, one is.
# Output seen:
#   PixArtTransformer2DModel: 0 of 4 attentions
#   SD3Transformer2DModel: 2 of 3 attentions
#   FluxTransformer2DModel: 4 of 4 attentions
#   as stated
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'diffusers==0.42.1' 'transformers==5.24.0'
"$folder/venv/bin/python" - <<'END' 2> /dev/null
import re

from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel
from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

sizes = {"num_layers": 2, "num_attention_heads": 2}
models = (
    PixArtTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=8, attention_head_dim=8,
        cross_attention_dim=16, caption_channels=12, **sizes,
    ),
    SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, attention_head_dim=8,
        caption_projection_dim=16, pooled_projection_dim=10, pos_embed_max_size=8,
        joint_attention_dim=12, dual_attention_layers=(0,), **sizes,
    ),
    FluxTransformer2DModel(
        in_channels=16, num_single_layers=2, attention_head_dim=16, pooled_projection_dim=10,
        axes_dims_rope=(4, 6, 6), joint_attention_dim=12, **sizes,
    ),
)
counts = []
for model in models:
    apply_taylorseer_cache(model, TaylorSeerCacheConfig())
    own = [part for name, part in model.named_modules() if re.search(r"\.attn\d?$", name)]
    hooked = [part for part in own if hasattr(part, "_diffusers_hook")]
    counts.append((len(hooked), len(own)))
    print(f"{type(model).__name__}: {len(hooked)} of {len(own)} attentions")
if counts != [(0, 4), (2, 3), (4, 4)]:
    raise SystemExit("changed")
print("as stated")
END
