#!/usr/bin/env bash
# Versions: diffusers 0.42.1, torch 2.13.0, transformers 5.24.0; Python 3.11 or newer.
# Expected: the hook of First-Block-Cache runs on SD3, whose blocks it has registered by name.
# Behavior: the first pass fails. The last block of an SD3 returns no text, and the hook subtracts the
#   text of the first block from it. FLUX, whose last block returns both, runs.
# Output seen:
#   SD3Transformer2DModel: TypeError, unsupported operand type(s) for -: 'NoneType' and 'Tensor'
#   FluxTransformer2DModel: runs
#   as stated
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'diffusers==0.42.1' 'transformers==5.24.0'
"$folder/venv/bin/python" - <<'END' 2> /dev/null
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache, hooks

torch.manual_seed(0)
sizes = {"num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 12}
sd3 = SD3Transformer2DModel(
    sample_size=8, in_channels=4, out_channels=4, attention_head_dim=8, caption_projection_dim=16,
    pooled_projection_dim=10, pos_embed_max_size=8, **sizes,
)
flux = FluxTransformer2DModel(
    in_channels=16, num_single_layers=2, attention_head_dim=16, pooled_projection_dim=10,
    axes_dims_rope=(4, 6, 6), **sizes,
)
text, pooled, time = torch.randn(1, 5, 12), torch.randn(1, 10), torch.ones(1)
inputs = {
    sd3: (torch.randn(1, 4, 8, 8), text, pooled, time),
    flux: (torch.randn(1, 16, 16), text, pooled, time, torch.zeros(16, 3), torch.zeros(5, 3)),
}
seen = {}
for model, given in inputs.items():
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.1))
    hooks._set_cache_context(model, hooks.CacheContext("cond"))
    try:
        with torch.no_grad():
            model(*given)
        said = "runs"
    except TypeError as error:
        said = f"TypeError, {error}"
    seen[type(model).__name__] = said
    print(f"{type(model).__name__}: {said}")
if [each.split(",")[0] for each in seen.values()] != ["TypeError", "runs"]:
    raise SystemExit("changed")
print("as stated")
END
