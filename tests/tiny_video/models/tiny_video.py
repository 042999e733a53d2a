"""A denoiser of two streams, video and text, that is small enough to compute by hand."""

import dataclasses
import math

import jax.numpy as jnp
from flax import nnx

from effjax.context import Layout, Model
from effjax.fields import Checked, Count, FloatName
from effjax.layers.linear import Linear


@dataclasses.dataclass(frozen=True)
class TinyVideoConfig(Checked):
    sample_frames: Count = 3
    sample_size: Count = 4
    patch_size: Count = 2
    in_channels: Count = 2
    hidden_size: Count = 6
    text_channels: Count = 12
    pooled_channels: Count = 5
    dtype: FloatName = "float32"
    param_dtype: FloatName = "float32"

    @property
    def sample_shape(self):
        return (self.sample_frames, self.sample_size, self.sample_size, self.in_channels)

    @property
    def tokens(self):
        return self.sample_frames * (self.sample_size // self.patch_size) ** 2


class TinyVideo(Model):
    Config = TinyVideoConfig
    counts = {}  # noqa: RUF012

    def __init__(self, config, *, rngs):
        self.config = config
        size, numerics = config.hidden_size, {"param_dtype": config.param_dtype, "rngs": rngs}
        self.video_in = Linear(config.in_channels, size, role="embedding", **numerics)
        self.text_in = Linear(config.text_channels, size, role="embedding", **numerics)
        self.pooled_in = Linear(config.pooled_channels, size, role="modulation", **numerics)
        self.video_out = Linear(size, config.in_channels, role="head", **numerics)

    def layout(self, x, *_):
        frames, rows, columns = x.shape[1:4]
        patch = self.config.patch_size
        return Layout(grid=(frames, rows // patch, columns // patch))

    def __call__(self, x, t, condition):
        dtype = jnp.dtype(self.config.dtype)
        video = self.video_in(x.astype(dtype).reshape(len(x), -1, x.shape[-1]))
        text = self.text_in(condition["states"].astype(dtype))
        both = jnp.concatenate([video, text], axis=1)
        shift = self.pooled_in(condition["pooled"].astype(dtype)) + t.astype(dtype)[:, None] / 1000
        if "guidance" in condition:
            shift = shift + condition["guidance"].astype(dtype)[:, None]
        scores = jnp.einsum("bqc,bkc->bqk", both, both) / math.sqrt(self.config.hidden_size)
        both = nnx.softmax(scores) @ both + shift[:, None]
        return self.video_out(both[:, : video.shape[1]]).reshape(x.shape)


MODEL = TinyVideo
