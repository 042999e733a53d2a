"""A random Chameleon of transformers, the decoder that its VQGAN has, and a loop over both."""

from typing import Any

import numpy as np
import pytest

from converters.chameleon import name_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CODES, BOS, PAD, PLACEHOLDER, BOI, SEP = 12, 0, 1, 3, 16, 17


def random_model(*, swin_norm: bool = False, grid: int = 2) -> Any:
    """Its codes are tokens in no order, and its vocabulary says what begins and ends prompts."""
    torch.manual_seed(0)
    order = np.random.default_rng(1).permutation(CODES)
    config = transformers.ChameleonConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        swin_norm=swin_norm,
        vocabulary_map={
            "<s>": BOS,
            "<pad>": PAD,
            "<image>": PLACEHOLDER,
            "<racm3:break>": BOI,
            "<reserved08706>": SEP,
            **{name_of(code): 4 + int(order[code]) for code in range(CODES)},
        },
        vq_config={
            "embed_dim": 8,
            "num_embeddings": CODES,
            "latent_channels": 8,
            "resolution": 16 * grid,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1, 1],
            "num_res_blocks": 1,
        },
    )
    model = transformers.ChameleonForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.add_(0.3 * torch.randn_like(value))
    return model


def vqgan(model: Any) -> dict[str, Any]:
    """The tensors of the original file: transformers' encoder, and a decoder."""
    held = {name: value.clone() for name, value in model.model.vqmodel.state_dict().items()}
    held |= _random_decoder()
    # Maps of equal pixels amplify noise.
    held["post_quant_conv.weight"] = 50 * torch.randn(8, 8, 1, 1)
    return held


def _random_decoder() -> dict[str, Any]:
    """That of a VQGAN of five levels, as many channels in each."""
    from tests.models import var_reference

    whole = var_reference.random_vae(widths=(32,) * 5, latents=8)
    found = {
        name: value
        for name, value in whole.items()
        if name.startswith("decoder.") and ".attn." not in name
    }
    for kind in ("weight", "bias"):
        parts = found.pop(f"decoder.mid.attn_1.qkv.{kind}").chunk(3)
        found |= {
            f"decoder.mid.attn_1.{part}.{kind}": value.clone() for part, value in zip("qkv", parts)
        }
    return found


def greedy_codes(model: Any, text: list[int], scale: float) -> np.ndarray:
    """The codes of an image of a prompt: whole sequences, one by one, without cache and padding.

    The model's own outputs leave images out; here its head is read, and nothing but codes.

    Args:
        text: tokens of the prompt's text.
        scale: of guidance.
    """
    names = model.config.vocabulary_map
    ids = [names[name_of(code)] for code in range(CODES)]
    count = (model.config.vq_config.resolution // 16) ** 2
    branches = [[BOS, *text, SEP, BOI], [BOS, BOI]]
    made: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            logits = [
                model.lm_head(model.model(torch.tensor([[*branch, *made]]))[0])[0, -1, ids]
                for branch in branches
            ]
            cond, uncond = logits
            made.append(ids[int((uncond + scale * (cond - uncond)).argmax())])
    return np.array([ids.index(token) for token in made])
