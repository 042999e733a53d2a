#!/usr/bin/env bash
# Versions: torch 2.13.0, transformers 5.24.0; Python 3.11 or newer.
# Expected: a guidance_scale of 1, which every generation of texts takes for none, gives an image of
#   the prompt alone.
# Behavior: in image mode Janus doubles the batch whatever the scale is, and registers the processor
#   that halves it for scales above 1 alone. At 1 the first token raises a RuntimeError about sizes.
# Output seen:
#   guidance 5: 4 tokens
#   guidance 1: RuntimeError: The expanded size of the tensor (1) must match the existing size (2)
#   as stated
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'transformers==5.24.0'
"$folder/venv/bin/python" - <<'END' 2> /dev/null
import torch
from transformers import JanusConfig, JanusForConditionalGeneration

torch.manual_seed(0)
config = JanusConfig(
    text_config={
        "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
    vision_config={
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4, "num_image_tokens": 4, "projection_dim": 16, "depth": 2,
    },
    vq_config={
        "embed_dim": 4, "num_embeddings": 16, "latent_channels": 32, "base_channels": 32,
        "channel_multiplier": [1, 1], "num_res_blocks": 1, "num_patches": 2,
        "projection_dim": 16, "image_token_embed_dim": 16,
    },
)
model = JanusForConditionalGeneration(config).eval()
tokens = {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": 2}
model.generation_config.update(**tokens)
model.generation_config.generation_kwargs = {"boi_token_id": 3}
prompt = torch.tensor([[1, 5, 6, 3]])
given = {"attention_mask": torch.ones_like(prompt), "generation_mode": "image", "do_sample": False}
image = model.generate(prompt, guidance_scale=5.0, **given)
print(f"guidance 5: {image.shape[1]} tokens")
try:
    model.generate(prompt, guidance_scale=1.0, **given)
except RuntimeError as error:
    said = str(error).partition(" at ")[0]
    print(f"guidance 1: RuntimeError: {said}")
    if image.shape != (1, 4) or "expanded size" not in said:
        raise SystemExit("changed") from error
else:
    raise SystemExit("changed")
print("as stated")
END
