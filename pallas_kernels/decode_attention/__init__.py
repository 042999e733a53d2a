"""Attention of one or a few queries to a long cache."""

from pallas_kernels.decode_attention.operation import (
    decode_attention,
    flat_decode_attention,
    latent_decode_attention,
    low_rank_decode_attention,
    pack_int4,
    quantized_decode_attention,
)

__all__ = [
    "decode_attention",
    "flat_decode_attention",
    "latent_decode_attention",
    "low_rank_decode_attention",
    "pack_int4",
    "quantized_decode_attention",
]
