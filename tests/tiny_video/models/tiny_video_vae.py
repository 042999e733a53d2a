"""A decoder of videos: statistics by channel, sides doubled, two frames to each latent but one."""

import dataclasses

import jax.numpy as jnp

from effjax.context import Model
from effjax.fields import Checked, Count, FloatName
from effjax.layers.linear import Linear


@dataclasses.dataclass(frozen=True)
class TinyVideoVAEConfig(Checked):
    latent_channels: Count = 2
    latents_mean: tuple[float, ...] = (0.5, -0.25)
    latents_std: tuple[float, ...] = (2.0, 0.5)
    downscale: Count = 2
    downscale_t: Count = 2
    dtype: FloatName = "float32"
    param_dtype: FloatName = "float32"


class TinyVideoVAE(Model):
    Config = TinyVideoVAEConfig
    counts = {}  # noqa: RUF012

    def __init__(self, config, *, rngs):
        self.config = config
        numerics = {"param_dtype": config.param_dtype, "rngs": rngs}
        self.out = Linear(config.latent_channels, 3, role="head", **numerics)

    def __call__(self, latents):
        config = self.config
        std, mean = (
            jnp.asarray(each, jnp.float32) for each in (config.latents_std, config.latents_mean)
        )
        z = (latents * std + mean).astype(config.dtype)
        later = jnp.repeat(z[:, 1:], config.downscale_t, axis=1)
        frames = jnp.concatenate([z[:, :1], later], axis=1)
        for axis in (2, 3):
            frames = jnp.repeat(frames, config.downscale, axis=axis)
        return jnp.tanh(self.out(frames)).astype(jnp.float32)


MODEL = TinyVideoVAE
