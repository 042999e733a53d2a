"""Checkpoints of TinyVideo's decoder."""

from effjax.models.tiny_video_vae import TinyVideoVAE, TinyVideoVAEConfig

from converters.family import Family, Keys, read_keys, write_keys
from converters.names import Table, affine

_KEYS: Keys = {
    "z_dim": ("latent_channels", 2),
    "latents_mean": ("latents_mean", (0.5, -0.25)),
    "latents_std": ("latents_std", (2.0, 0.5)),
    "scale_factor_spatial": ("downscale", 2),
    "scale_factor_temporal": ("downscale_t", 2),
}

FAMILY = Family(
    class_name="AutoencoderTinyVideo",
    model=TinyVideoVAE,
    config=TinyVideoVAEConfig,
    read_config=lambda config: TinyVideoVAEConfig(**read_keys(config, TinyVideoVAEConfig, _KEYS)),
    write_config=lambda config: write_keys(config, _KEYS),
    tables={"diffusers": Table(rules=affine("decoder.conv_out", "out"))},
)
