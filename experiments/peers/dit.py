"""DiT-B/2, two images of 32 x 32 latents, against diffusers.

On a GPU diffusers' calls start one kernel after the other, and two images are too few to hide that.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import converters
from effjax.forward import Forward, Params, functional
from effjax.models.dit import DiT, DiTConfig
from experiments.peers.comparison import HAS_TORCH, Row, extra_memory, timed, torch_device

AT_MOST = {"float32": 1.0, "bfloat16": 1.0}  # of their seconds


def rows(quick: bool) -> Iterator[Row]:
    layers, repeats = (1, 1) if quick else (12, 10)
    for dtype, at_most in AT_MOST.items():
        name = f"DiT-B/2, {dtype}"
        with tempfile.TemporaryDirectory() as folder:
            theirs = _saved(Path(folder), layers, dtype) if HAS_TORCH else None
            forward, params = _ours(Path(folder), layers, dtype, given=theirs is not None)
        rng = np.random.default_rng(0)
        x = rng.normal(size=(2, 32, 32, 4)).astype(np.float32)
        inputs = jnp.asarray(x), jnp.full(2, 500.0), jnp.array([1, 1000], jnp.int32)

        @jax.jit
        def call(params, *inputs, forward=forward):
            return forward(params, {}, *inputs)[0]

        if theirs is not None:
            programs = {"effjax": partial(call, params, *inputs), "diffusers": theirs(x)}
            yield timed(name, programs, repeats=repeats, at_most=at_most)
        if dtype == "bfloat16":
            yield extra_memory(name, call, params, *inputs, at_most=0.25)


def _ours(folder: Path, layers: int, dtype: str, *, given: bool) -> tuple[Forward, Params]:
    if given:
        how = {"dtype": dtype, "compute_dtype": dtype}
        return converters.from_pretrained(folder / "dit", progress=False, **how)
    options = {"num_layers": layers, "dtype": dtype, "param_dtype": dtype}
    return functional(DiT(DiTConfig.preset("DiT-B/2", sample_size=32, **options), rngs=nnx.Rngs(0)))


def _saved(
    folder: Path, layers: int, dtype: str
) -> Callable[[np.ndarray], Callable[[], np.ndarray]]:
    """Save diffusers' model with random weights; a maker of its calls."""
    import torch
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model: Any = DiTTransformer2DModel(
        num_attention_heads=12, attention_head_dim=64, num_layers=layers, sample_size=32
    )
    state = model.state_dict()
    for name in state:  # trained checkpoints have equal embedders in all blocks
        _, _, tail = name.partition(".norm1.emb.")
        if tail:
            state[name] = state[f"transformer_blocks.0.norm1.emb.{tail}"]
    model.load_state_dict(state)
    model = model.to(torch_device(), getattr(torch, dtype)).eval()
    model.save_pretrained(folder / "dit")

    def calls(x: np.ndarray) -> Callable[[], np.ndarray]:
        images = torch.tensor(x.transpose(0, 3, 1, 2)).to(model.device, model.dtype)
        times = torch.full((2,), 500.0, device=model.device)
        labels = torch.tensor([1, 1000], device=model.device)

        @torch.inference_mode()
        def call() -> np.ndarray:
            return model(images, times, labels).sample.float().cpu().numpy()

        return call

    return calls
