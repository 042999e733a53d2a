"""Makes dit.npz: a random `DiTTransformer2DModel` of diffusers with inputs and its output.

python tests/golden/make_dit.py      (needs the `torch` extra)
"""

from pathlib import Path

import numpy as np


def main() -> None:
    import torch
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=5,
    ).eval()
    state = model.state_dict()
    for name in state:  # trained checkpoints have equal embedders in all blocks
        _, _, tail = name.partition(".norm1.emb.")
        if tail:
            state[name] = state[f"transformer_blocks.0.norm1.emb.{tail}"]
    model.load_state_dict(state)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 8, 8, 4)).astype(np.float32)
    t = np.array([0.0, 3.5, 999.0], np.float32)
    labels = np.array([0, 4, 5], np.int32)
    with torch.no_grad():
        out = model(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t), torch.tensor(labels))
    arrays = {name: value.numpy() for name, value in state.items()}
    np.savez_compressed(
        Path(__file__).with_name("dit.npz"),
        **arrays,
        **{"in.x": x, "in.t": t, "in.labels": labels},
        out=out.sample.numpy().transpose(0, 2, 3, 1),
    )


if __name__ == "__main__":
    main()
