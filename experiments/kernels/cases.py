"""Kernels at the sizes of real models: what is compiled, lowered and tabulated.

A case is a function of arrays, which takes `implementation=` too, and the shapes of its arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from effjax.quant import Rotation
from pallas_kernels.arrow_attention import arrow_attention
from pallas_kernels.attention import dense_attention
from pallas_kernels.block_mask import Arrow, Band, Causal, Rule, SinkLocal, from_map, top_blocks
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.decode_attention import (
    decode_attention,
    flat_decode_attention,
    low_rank_decode_attention,
    quantized_decode_attention,
)
from pallas_kernels.packing import pack
from pallas_kernels.quantize_inputs import quantize_inputs
from pallas_kernels.quantized_attention import quantized_attention
from pallas_kernels.quantized_matmul import int8_matmul, packed_matmul
from pallas_kernels.residual_attention import dense_and_sparse_attention

Case = tuple[Callable[..., Any], tuple[Any, ...]]

_struct = jax.ShapeDtypeStruct
_bf16 = jnp.bfloat16


def _heads(batch: int, tokens: int, heads: int, width: int, key_heads: int = 0) -> tuple[Any, ...]:
    q = _struct((batch, tokens, heads, width), _bf16)
    k = _struct((batch, tokens, key_heads or heads, width), _bf16)
    return q, k, k


def _sparse(rule: Rule) -> Callable[..., Any]:
    return partial(block_sparse_attention, mask=rule)


def _packed_rows(q: Any, k: Any, v: Any, numbers: Any, **options: Any) -> jax.Array:
    return block_sparse_attention(q, k, v, Band(512), segments=(numbers, numbers), **options)


def _own_spans(q: Any, k: Any, v: Any, numbers: Any, **options: Any) -> jax.Array:
    widest = SinkLocal((64,) * 32, (1024,) * 32, granularity=64)
    by_row = jnp.clip(numbers, 1, 64)
    return block_sparse_attention(q, k, v, widest, by_row=by_row, **options)


def head_wise(batch: int, tokens: int, heads: int, width: int, **text: Any) -> Case:
    """Heads that are dense, have windows of f = 8, 16 or 32, or are kept, as it turns out."""
    image = tokens - text["text"]

    def attend(q: Any, k: Any, v: Any, numbers: Any, kept: Any, **options: Any) -> jax.Array:
        widths = -1, 0, image // 64, image // 32, image // 16
        window = jnp.asarray(widths)[numbers[0] % 5]
        return arrow_attention(q, k, v, window, widths=widths, kept=kept, **text, **options)

    operands = _heads(batch, tokens, heads, width)
    return attend, (*operands, _struct((1, heads), jnp.int32), operands[0])


def _best_blocks(q: Any, k: Any, v: Any, scores: Any, **options: Any) -> jax.Array:
    mask = top_blocks(scores, 16, q.shape[1], block=128)
    return block_sparse_attention(q, k, v, mask, **options)


def _kept_blocks(q: Any, k: Any, v: Any, bits: Any, *, kind: Any, **options: Any) -> jax.Array:
    """Masks of blocks by head, packed in bits: half of each row at most."""
    tokens = q.shape[1]
    blocks = -(-tokens // 128)
    keep = jnp.unpackbits(bits, axis=-1, count=blocks)
    mask = from_map(keep, tokens, block=128, width=blocks // 2)
    if kind is None:
        return block_sparse_attention(q, k, v, mask, **options)
    options |= {"bits": int(kind[-1]), "values": kind, "tokens": (32, 64), "unit": "tile"}
    return quantized_attention(q, k, v, mask, smooth=False, **options)


def _bits(tokens: int, heads: int) -> Any:
    blocks = -(-tokens // 128)
    return _struct((heads, blocks, -(-blocks // 8)), jnp.uint8)


def _quantized_cache(
    q: Any, k: Any, v: Any, lengths: Any, k_scale: Any, v_scale: Any, k_offset: Any, v_offset: Any,
    **options: Any,
) -> jax.Array:  # fmt: skip
    scales = {"k_scale": k_scale, "k_offset": k_offset, "v_scale": v_scale, "v_offset": v_offset}
    return quantized_decode_attention(q, k, v, lengths, **scales, **options)


def _low_rank_cache(
    q: Any, features: Any, basis: Any, v: Any, lengths: Any, frequencies: Any, **options: Any
) -> jax.Array:
    return low_rank_decode_attention(
        q, features, basis, v, lengths, frequencies=frequencies, **options
    )


def _cache(tokens: int, width: int) -> tuple[Any, ...]:
    cache = _struct((8, tokens, 8, width), _bf16)
    return _struct((8, 1, 32, width), _bf16), cache, cache, _struct((8,), jnp.int32)


def _int4_cache(tokens: int, *, by_token: bool = False) -> tuple[Any, ...]:
    q, _, _, lengths = _cache(tokens, 128)
    qvalues = _struct((8, tokens, 8, 64), jnp.uint8)
    of_values = _struct((8, tokens, 8, 1), _bf16)
    of_keys = of_values if by_token else _struct((8, tokens // 32, 8, 128), _bf16)
    return q, qvalues, qvalues, lengths, *(of_keys, of_values) * 2


_CAPACITIES = [128, 8192, 1024, 512, 256, 4096, 2048, 192] * 4
_STARTS = [sum(_CAPACITIES[:head]) for head in range(32)]


def _quantized_rings(
    q: Any, k: Any, v: Any, lengths: Any, k_scale: Any, v_scale: Any, k_offset: Any, v_offset: Any,
    **options: Any,
) -> jax.Array:  # fmt: skip
    places = {"head_start": _STARTS, "head_capacity": _CAPACITIES}
    scales = {"k_scale": k_scale, "k_offset": k_offset, "v_scale": v_scale, "v_offset": v_offset}
    return flat_decode_attention(q, k, v, lengths, **places, **scales, **options)


def int8_product(m: int, k: int, n: int) -> Case:
    """Quantized values [m, k] times quantized values [k, n], with scales and zero points."""

    def product(x: Any, w: Any, x_scale: Any, w_scale: Any, zero: Any, **options: Any) -> jax.Array:
        return int8_matmul(x, w, x_scale=x_scale, w_scale=w_scale, w_zero=zero, **options)

    qvalues = _struct((m, k), jnp.int8), _struct((k, n), jnp.int8)
    scales = _struct((m, 1), jnp.float32), _struct((n,), jnp.float32), _struct((n,), jnp.int32)
    return product, (*qvalues, *scales)


def packed_product(m: int, k: int, n: int, bits: int, group: int, dtype: Any) -> Case:
    """Floats or quantized values [m, k] times packed weights [k, n] in groups, with zero points."""

    def product(x: Any, planes: Any, scale: Any, zero: Any, x_scale: Any, **options: Any):
        quantizer = {"bits": bits, "group_size": group, "scale": scale, "zero": zero}
        return packed_matmul(x, planes, x_scale=x_scale, **quantizer, **options)

    planes = jax.eval_shape(partial(pack, bits=bits), _struct((k, n), jnp.int8))
    scale, zero = _struct((k // group, n), _bf16), _struct((k // group, n), jnp.int8)
    x_scale = _struct((m, 1), jnp.float32) if dtype == jnp.int8 else None
    return product, (_struct((m, k), dtype), planes, scale, zero, x_scale)


def _quantized(
    shape: tuple[int, int, int], *, rotated: bool = False, modulated: bool = False
) -> Case:
    batch, _, width = shape

    def quantized(x: Any, smoothing_scale: Any, modulation: Any, **options: Any) -> jax.Array:
        if rotated:
            rotation = Rotation(width)
            options["signs"] = jnp.asarray(rotation.signs())
            options["factors"] = tuple(map(jnp.asarray, rotation.matrices()))
        found = quantize_inputs(
            x, smoothing_scale=smoothing_scale, modulation=modulation, **options
        )
        return found.qvalues.astype(jnp.float32) * found.scale

    pair = (_struct((batch, width), _bf16),) * 2 if modulated else None
    return quantized, (_struct(shape, _bf16), _struct((width,), jnp.float32), pair)


ATTENTION: dict[str, Case] = {
    "dense, PixArt 2048": (dense_attention, _heads(1, 16384, 16, 72)),
    "dense, DiT-XL/2 256": (dense_attention, _heads(8, 256, 16, 72)),
    "dense, DiT-XL/2 512": (dense_attention, _heads(2, 1024, 16, 72)),
    "dense, FLUX": (dense_attention, _heads(1, 4096, 24, 128)),
    "causal, Llama 3": (_sparse(Causal()), _heads(1, 4096, 32, 128, 8)),
    "band, PixArt 2048": (_sparse(Band(2048)), _heads(1, 16384, 16, 72)),
    "arrow, SD3 1024, uneven": (_sparse(Arrow((256,) * 24, text=333)), _heads(2, 4429, 24, 64)),
    "sinks and local, prompt of 8192": (
        _sparse(SinkLocal((64,) * 32, (1024,) * 32)),
        _heads(1, 8192, 32, 128, 8),
    ),
    "segments": (_packed_rows, (*_heads(1, 4096, 8, 64), _struct((1, 4096), jnp.int32))),
    "sinks and local by row": (
        _own_spans,
        (*_heads(2, 8192, 32, 128, 8), _struct((2, 32, 2), jnp.int32)),
    ),
    "best 16 of 64 blocks, at run time": (
        _best_blocks,
        (*_heads(1, 8192, 8, 64), _struct((1, 8, 64, 64), jnp.float32)),
    ),
}

HEAD_WISE: dict[str, Case] = {
    "arrow by head, SD3 1024": head_wise(2, 4429, 24, 64, text=333),
    "arrow by head, FLUX 1024": head_wise(1, 4608, 24, 128, text=512, text_first=True),
    "arrow by head, FLUX 2048, tiles": head_wise(
        1, 16896, 24, 128, text=512, text_first=True, tile=(128, 64)
    ),
}

RESIDUAL: dict[str, Case] = {
    f"dense and band, {name}": (partial(dense_and_sparse_attention, rule=Band(window)), operands)
    for name, window, operands in (
        ("DiT-XL/2 512", 128, _heads(2, 1024, 16, 72)),
        ("PixArt 1024", 512, _heads(2, 4096, 16, 72)),
        ("uneven", 512, _heads(1, 4429, 24, 64)),
    )
}

QUANTIZED_ATTENTION: dict[str, Case] = {
    f"{name}, {values or 'bfloat16'} values": (
        partial(quantized_attention, values=values),
        operands,
    )
    for name, operands in (
        ("int8, CogVideoX", _heads(1, 17776, 8, 64)),
        ("int8, grouped heads", _heads(1, 8192, 16, 128, 4)),
    )
    for values in (None, "int8")
} | {
    f"kept blocks by head, {name}, {kind or 'bfloat16'}": (
        partial(_kept_blocks, kind=kind),
        (*_heads(1, tokens, heads, width), _bits(tokens, heads)),
    )
    for name, tokens, heads, width, kind in (
        ("FLUX", 4608, 24, 128, None),
        ("FLUX", 4608, 24, 128, "int8"),
        ("FLUX", 4608, 24, 128, "int4"),
        ("CogVideoX", 17776, 48, 64, "int8"),
        ("Wan2.1 720p", 75600, 8, 128, "int8"),
    )
}

DECODE: dict[str, Case] = {
    "decode, 32768 keys": (decode_attention, _cache(32768, 128)),
    "decode, uneven": (decode_attention, _cache(1000, 80)),
    "decode, int4 cache": (_quantized_cache, _int4_cache(32768)),
    "decode, int4 cache, keys by token": (_quantized_cache, _int4_cache(16384, by_token=True)),
    "decode, rings of each head": (
        partial(flat_decode_attention, head_start=_STARTS, head_capacity=_CAPACITIES),
        (
            _struct((8, 1, 32, 128), _bf16),
            *[_struct((8, sum(_CAPACITIES), 128), _bf16)] * 2,
            _struct((8, 32), jnp.int32),
        ),
    ),
    "decode, int4 rings of each head": (
        _quantized_rings,
        (
            _struct((8, 1, 32, 128), _bf16),
            *[_struct((8, sum(_CAPACITIES), 64), jnp.uint8)] * 2,
            _struct((8, 32), jnp.int32),
            *[_struct((8, sum(_CAPACITIES), 1), jnp.float32)] * 4,
        ),
    ),
    "decode, low-rank keys": (
        _low_rank_cache,
        (
            _struct((4, 1, 32, 128), _bf16),
            _struct((4, 8192, 1024), _bf16),
            _struct((1024, 4096), _bf16),
            _struct((4, 8192, 32, 128), _bf16),
            _struct((4,), jnp.int32),
            _struct((64,), jnp.float32),
        ),
    ),
}

PRODUCTS: dict[str, Case] = {
    "W8A8, DiT-XL": int8_product(4096, 1152, 4608),
    "W8A8, uneven": int8_product(1000, 200, 1000),
    "W4A16 GEMV, Llama": packed_product(1, 4096, 14336, 4, 128, _bf16),
    "W3A16, 8 rows, Qwen": packed_product(8, 3584, 18944, 3, 128, _bf16),
    "W4A8, uneven": packed_product(1000, 1152, 600, 4, 64, jnp.int8),
}

CODES: dict[str, Case] = {
    "quantized values, modulated, DiT-XL": _quantized((2, 1024, 1152), modulated=True),
    "quantized values, rotated, 1152 channels": _quantized((1, 4096, 1152), rotated=True),
    "quantized values, rotated, 4608 channels": _quantized((1, 4096, 4608), rotated=True),
    "quantized values, modulated and rotated, uneven": _quantized(
        (2, 300, 1152), rotated=True, modulated=True
    ),
}

CASES = {**ATTENTION, **HEAD_WISE, **RESIDUAL, **QUANTIZED_ATTENTION, **DECODE, **PRODUCTS, **CODES}
