#!/usr/bin/env bash
# Versions: diffusers 0.42.1, torch 2.13.0, transformers 5.24.0; Python 3.11 or newer.
# Expected: a cache that was put on SD3 by its hook starts anew with each call of the pipeline, as on FLUX.
# Behavior: pipelines free a model's caches through a method that only models of `CacheMixin` have. SD3
#   and PixArt are none, so that the second sample of the same seed goes on with the first one's
#   counts and caches, and is another image.
# Output seen:
#   SD3Transformer2DModel: the second sample of a seed differs
#   SD3Transformer2DModel, hooks reset by hand: the second sample of a seed is equal
#   as stated
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'diffusers==0.42.1' 'transformers==5.24.0'
"$folder/venv/bin/python" - <<'END' 2> /dev/null
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    PyramidAttentionBroadcastConfig,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    apply_pyramid_attention_broadcast,
)
from diffusers.hooks import HookRegistry

torch.manual_seed(0)
model = SD3Transformer2DModel(
    sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
    num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16,
    pooled_projection_dim=10, pos_embed_max_size=8,
)
vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, shift_factor=0.1)
pipe = StableDiffusion3Pipeline(model, FlowMatchEulerDiscreteScheduler(), vae, *(None,) * 6)
pipe.set_progress_bar_config(disable=True)
apply_pyramid_attention_broadcast(model, PyramidAttentionBroadcastConfig(
    spatial_attention_block_skip_range=4, spatial_attention_timestep_skip_range=(-1, 1001),
    spatial_attention_block_identifiers=("transformer_blocks",),
    current_timestep_callback=lambda: 500,  # within the range, as every time is
))
text, pooled = torch.randn(1, 5, 12), torch.randn(1, 10)


def sample():
    return pipe(
        prompt_embeds=text, pooled_prompt_embeds=pooled, guidance_scale=1.0, num_inference_steps=6,
        height=8, width=8, output_type="latent", generator=torch.manual_seed(3),
    ).images


first, second = sample(), sample()
HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks(recurse=True)
third = sample()
seen = [not torch.equal(first, second), torch.equal(first, third)]
print(f"SD3Transformer2DModel: the second sample of a seed {'differs' if seen[0] else 'is equal'}")
print(
    "SD3Transformer2DModel, hooks reset by hand: the second sample of a seed "
    + ("is equal" if seen[1] else "differs")
)
if seen != [True, True]:
    raise SystemExit("changed")
print("as stated")
END
