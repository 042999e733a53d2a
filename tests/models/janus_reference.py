"""A random Janus of transformers, which draws images of 3 x 3 codes."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GRID, CODES, BOS, BOI, PAD = 3, 24, 1, 5, 0


def random_model() -> Any:
    """Its codes make a difference, and generation_config.json knows its tokens."""
    torch.manual_seed(0)
    config = transformers.JanusConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 50,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 128,
            "max_position_embeddings": 64,
        },
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 4 * GRID,
            "patch_size": 4,
            "projection_dim": 32,
            "num_image_tokens": GRID**2,
        },
        vq_config={
            "embed_dim": 4,
            "num_embeddings": CODES,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 2],
            "num_res_blocks": 1,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
        },
    )
    model = transformers.JanusForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.add_((1.0 if "embed" in name else 0.15) * torch.randn_like(value))
        for layer in (model.model.generation_aligner.fc1, model.model.generation_head.proj_out):
            layer.weight.mul_(6)
    model.generation_config.bos_token_id = BOS
    model.generation_config.pad_token_id = PAD
    model.generation_config.generation_kwargs = {"boi_token_id": BOI}
    return model
