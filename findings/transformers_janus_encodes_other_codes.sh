#!/usr/bin/env bash
# Versions: torch 2.13.0, transformers 5.24.0; Python 3.11 or newer.
# Expected: the VQ model of Janus decodes codes of unit length (each code divided by its norm). What a
#   token is decoded from is encoded to the same token: no other code is as near.
# Behavior: the encoder compares with the codes as they are stored. Where these are not of unit length
#   most tokens come back as others, those of short codes.
# Output seen:
#   54 of 256 tokens come back; 256 where the stored codes have unit length
#   as stated
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'transformers==5.24.0'
"$folder/venv/bin/python" - <<'END' 2> /dev/null
import torch
from transformers import JanusVQVAE, JanusVQVAEConfig

torch.manual_seed(0)
config = JanusVQVAEConfig(
    embed_dim=8, num_embeddings=256, latent_channels=32, base_channels=32,
    channel_multiplier=[1, 1], num_res_blocks=1, num_patches=16,
)
quantizer = JanusVQVAE(config).eval().quantize
tokens = torch.arange(256)


def back():
    """How many tokens are encoded from what they are decoded from."""
    with torch.no_grad():
        found = quantizer(quantizer.get_codebook_entry(tokens[None]))[2]
    return int((found == tokens).sum())


codes = quantizer.embedding.weight
torch.nn.init.normal_(codes)
stored = back()
with torch.no_grad():
    codes /= codes.norm(dim=1, keepdim=True)
unit = back()
print(f"{stored} of 256 tokens come back; {unit} where the stored codes have unit length")
if not (stored < 128 and unit == 256):
    raise SystemExit("changed")
print("as stated")
END
