"""Checkpoints of TinyVideo."""

from effjax.models.tiny_video import TinyVideo, TinyVideoConfig

from converters.family import Family, Keys, read_keys, write_keys
from converters.names import Table, affine

_KEYS: Keys = {
    "sample_frames": ("sample_frames", 3),
    "sample_size": ("sample_size", 4),
    "in_channels": ("in_channels", 2),
    "inner_dim": ("hidden_size", 6),
    "joint_attention_dim": ("text_channels", 12),
    "pooled_projection_dim": ("pooled_channels", 5),
}

FAMILY = Family(
    class_name="TinyVideoTransformer3DModel",
    model=TinyVideo,
    config=TinyVideoConfig,
    read_config=lambda config: TinyVideoConfig(**read_keys(config, TinyVideoConfig, _KEYS)),
    write_config=lambda config: write_keys(config, _KEYS),
    tables={
        "diffusers": Table(
            rules=(
                *affine("x_embedder", "video_in"),
                *affine("context_embedder", "text_in"),
                *affine("text_embedder", "pooled_in"),
                *affine("proj_out", "video_out"),
            )
        )
    },
)
