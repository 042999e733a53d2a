"""Makes pixart.npz: a random T5 encoder and PixArt transformer with inputs and their outputs.

python tests/golden/make_pixart.py      (needs the `torch` extra)
"""

from pathlib import Path

import numpy as np


def main() -> None:
    import torch
    from diffusers import PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=50,
            d_model=12,
            d_kv=4,
            d_ff=24,
            num_layers=2,
            num_heads=3,
            feed_forward_proj="gated-gelu",
        )
    ).eval()
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=12,
        interpolation_scale=2,
        use_additional_conditions=False,
    ).eval()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8, 12, 4)).astype(np.float32)
    t = np.array([3.5, 999.0], np.float32)
    ids = rng.integers(0, 50, (2, 40)).astype(np.int32)
    mask = np.arange(40)[None] < np.array([[40], [7]])
    with torch.no_grad():
        states = encoder(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask).long()
        ).last_hidden_state
        out = transformer(
            torch.tensor(x.transpose(0, 3, 1, 2)),
            encoder_hidden_states=states,
            timestep=torch.tensor(t),
            encoder_attention_mask=torch.tensor(mask).float(),
        ).sample
    np.savez_compressed(
        Path(__file__).with_name("pixart.npz"),
        **{
            f"{part}.{name}": value.numpy()
            for part, model in (("t5", encoder), ("pixart", transformer))
            for name, value in model.state_dict().items()
        },
        **{"in.x": x, "in.t": t, "in.ids": ids, "in.mask": mask},
        states=states.numpy(),
        out=out.numpy().transpose(0, 2, 3, 1),
    )


if __name__ == "__main__":
    main()
