"""Decode attention: one or a few query tokens against a long cache of keys and values.

    o = softmax(scale * q K^T) V      over the keys t < length of the query's row

For S > 1 queries, these are the last S tokens of their row: query s sees t < length - (S - 1 - s).
Query head h reads key head h // (H / K). A row of length 0 gives zeros (log-sum-exp -inf). What a
cache holds beyond a row's length, even NaN, has no influence.

============================  ====================================================================
function                      cache
============================  ====================================================================
`decode_attention`            k [B, T, K, D], v [B, T, K, W]
`latent_decode_attention`     k [B, T, K, D] alone: values are its first W channels
`flat_decode_attention`       k, v [B, N, D]: each head has its own stretch of slots on one axis
`quantized_decode_attention`  int8 or packed int4 values with scales and offsets
`low_rank_decode_attention`   features c [B, T, R] of the keys; k = rotary(c basis), tile by tile
============================  ====================================================================

The cache is cut in tiles along its tokens, and only tiles with valid keys are read. On a GPU and in
XLA the tiles of all rows form one list that is divided evenly (LeanAttention), and partial results
are merged by log-sum-exp; a TPU core walks the same list from end to end. Low-rank keys have no GPU
kernel: a basis of rank 1024 does not fit beside the tiles of one program.

For inference: no gradients, except of `implementation="reference"`. For more than 8 queries, as in
prefill, use `pallas_kernels.block_sparse_attention`. To attend to a cache and to some other keys,
as to a compressed past and an exact present, ask for log-sum-exps and use `pallas_kernels.merge`.

B batch, S queries, H query heads, K key heads, T tokens, D head dim, W value dim, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from pallas_kernels.decode_attention import tiles
from pallas_kernels.decode_attention.checks import (
    check_cache,
    check_places,
    check_queries,
    check_scales,
    check_shape,
    check_width,
    qvalue_bits,
)
from pallas_kernels.decode_attention.problem import Options, Part, Result, along, attend
from pallas_kernels.decode_attention.reference import (
    dequantize,
    flat_dequantize,
    flat_reference,
    rebuild_keys,
    reference,
)
from pallas_kernels.implementation import Implementation


def decode_attention(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    tile: int | None = None,
    splits: int | None = None,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Result:
    """Attend to a cache of plain keys and values.

    Args:
        q: float[B, S, H, D], float32, bfloat16 or float16; 1 <= S <= 8.
        k, v: float[B, T, K, D] and [B, T, K, W] in q's dtype; H is a multiple of K.
        lengths: int32[B] valid tokens of each row, or int32[B, K] of each row's key heads; values
            outside of 0 ... T are clipped.
        scale: factor on the scores; 1 / sqrt(D) if None.
        return_lse: return the log-sum-exp of the scaled scores too, for `merge`.
        tile: tokens in a tile; chosen by the program if None.
        splits: among how many workers the list of tiles is divided; chosen by the program if None.
            A TPU core is one worker, whatever is asked for.
        implementation: see `pallas_kernels.implementation`.
        interpret: run a named kernel in interpret mode.

    Returns:
        float[B, S, H, W] in q's dtype, and float32[B, S, H] if `return_lse`.

    Raises:
        ValueError: for shapes, dtypes or options that do not fit, naming what is allowed.
        NotImplementedError: if a named implementation cannot run this.

    Source: FlashDecoding; LeanAttention, arXiv 2405.10480.
    """
    check_queries(q)
    check_cache(q, k, "k", (q.shape[0], None, None, q.shape[3]))
    check_cache(q, v, "v", (*k.shape[:3], None))
    return attend(
        "decode_attention",
        q,
        Part(tiles.plain_keys(tiles.TOKENS, q.shape[3]), (k,)),
        Part(tiles.plain_values(tiles.TOKENS, v.shape[3]), (v,)),
        lengths,
        Options(scale, return_lse, tile, splits, implementation, interpret),
        lambda lengths, scale: reference(q, k, v, lengths, scale=scale),
        heads=k.shape[2],
        tokens=k.shape[1],
    )


def latent_decode_attention(
    q: Array,
    k: Array,
    lengths: Array,
    *,
    values: int,
    scale: float | None = None,
    return_lse: bool = False,
    tile: int | None = None,
    splits: int | None = None,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Result:
    """`decode_attention` to a cache whose values are the first W channels of its keys.

    That is the absorbed form of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): one
    key head of a latent and a rotated part.

    Args:
        q, k, lengths: as in `decode_attention`.
        values: W, 1 ... D.
        scale, return_lse, tile, splits, implementation, interpret: likewise.

    Returns:
        float[B, S, H, W] in q's dtype, and float32[B, S, H] if `return_lse`.

    Raises:
        ValueError: as `decode_attention`, and for values wider than keys.
        NotImplementedError: if a named implementation cannot run this.
    """
    check_queries(q)
    check_cache(q, k, "k", (q.shape[0], None, None, q.shape[3]))
    if not 1 <= values <= q.shape[3]:
        raise ValueError(
            f"values are the first 1 ... {q.shape[3]} channels of the keys, got values={values}"
        )
    return attend(
        "latent_decode_attention",
        q,
        Part(tiles.plain_keys(tiles.TOKENS, q.shape[3]), (k,)),
        Part(tiles.leading_values(tiles.TOKENS, values), (k,)),
        lengths,
        Options(scale, return_lse, tile, splits, implementation, interpret),
        lambda lengths, scale: reference(q, k, k[..., :values], lengths, scale=scale),
        heads=k.shape[2],
        tokens=k.shape[1],
    )


def flat_decode_attention(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array,
    *,
    head_start: Sequence[int],
    head_capacity: Sequence[int],
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    k_offset: Array | None = None,
    v_offset: Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    tile: int | None = None,
    splits: int | None = None,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Result:
    """Attend to a cache in which each key head keeps a number of slots of its own.

    Key head h owns slots head_start[h] ... head_start[h] + head_capacity[h] - 1 of the one token
    axis; its first `lengths[b, h]` are valid, in any order (a ring buffer's phase does not matter).
    Each tile of slots is read once; a head's queries see its own slots.

    Args:
        q: float[B, 1, H, D]: one token, since slots of a ring have no order.
        k, v: float[B, N, D] and [B, N, W] in q's dtype; with scales quantized values, as
            `quantized_decode_attention` takes them.
        lengths: int32[B] or int32[B, K] valid slots, clipped to each head's capacity.
        head_start, head_capacity: K host integers each; heads may not overlap.
        k_scale, v_scale, k_offset, v_offset: float[B, N, 1] of quantized values, for each slot.
        scale, return_lse, tile, splits, implementation, interpret: as in `decode_attention`.

    Returns:
        As `decode_attention`.

    Raises:
        ValueError, NotImplementedError: as `decode_attention`.

    Source: Mixture of Attention Spans, arXiv 2406.14909.
    """
    check_queries(q)
    if q.shape[1] != 1:
        raise ValueError(
            f"flat_decode_attention takes one query token, since the slots of a ring are in no "
            f"order that a later token's mask could follow; got S = {q.shape[1]}. Call it once for "
            f"each token, after writing that token's key."
        )
    (batch, _, _, width), scales = q.shape, (k_scale, k_offset, v_scale, v_offset)
    if k_scale is not None and v_scale is not None:
        k_bits, v_bits = qvalue_bits(k, "k"), qvalue_bits(v, "v")
        check_width(width, k_bits)
        check_shape(k, "k", (batch, None, width * k_bits // 8))
        check_shape(v, "v", (*k.shape[:2], None))
        check_scales((*k.shape[:2], 1), k_scale=k_scale, k_offset=k_offset)
        check_scales((*k.shape[:2], 1), v_scale=v_scale, v_offset=v_offset)
        keys = tiles.token_quantized_keys(
            tiles.FLAT, width, bits=k_bits, offset=k_offset is not None
        )
        values = tiles.quantized_values(
            tiles.FLAT,
            v.shape[2] * 8 // v_bits,
            bits=v_bits,
            offset=v_offset is not None,
            dtype=q.dtype,
        )
    elif any(x is not None for x in scales):
        raise ValueError(
            "quantized values need both k_scale and v_scale, and offsets come with these"
        )
    else:
        check_cache(q, k, "k", (batch, None, width))
        check_cache(q, v, "v", (*k.shape[:2], None))
        keys = tiles.plain_keys(tiles.FLAT, width)
        values = tiles.plain_values(tiles.FLAT, v.shape[2])
    places = starts, capacities = check_places(head_start, head_capacity, k.shape[1])

    def specification(lengths: Array, scale: float) -> tuple[Array, Array]:
        keys, values = k, v
        if k_scale is not None and v_scale is not None:
            keys = flat_dequantize(k, k_scale, k_offset)
            values = flat_dequantize(v, v_scale, v_offset)
        return flat_reference(
            q, keys, values, lengths, starts=starts, capacities=capacities, scale=scale
        )

    return attend(
        "flat_decode_attention",
        q,
        Part(keys, (k, *along(k_scale, k_offset))),
        Part(values, (v, *along(v_scale, v_offset))),
        lengths,
        Options(scale, return_lse, tile, splits, implementation, interpret),
        specification,
        heads=len(starts),
        tokens=k.shape[1],
        places=places,
    )


def quantized_decode_attention(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array,
    *,
    k_scale: Array,
    v_scale: Array,
    k_offset: Array | None = None,
    v_offset: Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    tile: int | None = None,
    splits: int | None = None,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Result:
    """Attend to quantized keys and values: x = qvalue * scale + offset, made tile by tile.

    Quantized values are int8, or uint8 with two signed 4-bit values of one head each (`pack_int4`:
    channels 0 ... D/2 - 1 in the low nibbles, the others in the high ones); keys and values may
    differ.

    Args:
        q: float[B, S, H, D], 1 <= S <= 8.
        k, v: int8[B, T, K, D] and [B, T, K, W], or uint8 with half the last axis.
        lengths: as in `decode_attention`.
        k_scale, k_offset: float[B, G, K, D], for each channel and T / G consecutive tokens (G = 1:
            one for all tokens); or float[B, T, K, 1], for each token, as a ring needs whose slots
            are overwritten one by one.
        v_scale, v_offset: float[B, T, K, 1], for each token.
        scale, return_lse, tile, splits, implementation, interpret: as in `decode_attention`.

    Returns:
        As `decode_attention`.

    Raises:
        ValueError, NotImplementedError: as `decode_attention`.

    Source: KIVI, arXiv 2402.02750 (keys per channel, values per token).
    """
    check_queries(q)
    batch, _, _, width = q.shape
    k_bits, v_bits = qvalue_bits(k, "k"), qvalue_bits(v, "v")
    check_width(width, k_bits)
    check_shape(k, "k", (batch, None, None, width * k_bits // 8))
    check_shape(v, "v", (*k.shape[:3], None))
    tokens, heads, value_width = k.shape[1], k.shape[2], v.shape[3] * 8 // v_bits
    token_scales = (batch, tokens, heads, 1)
    by_token = k_scale.ndim == 4 and k_scale.shape[3] == 1 != width
    groups = tokens if by_token or k_scale.ndim != 4 else k_scale.shape[1]
    k_scales = token_scales if by_token else (batch, groups, heads, width)
    check_scales(k_scales, k_scale=k_scale, k_offset=k_offset)
    check_scales(token_scales, v_scale=v_scale, v_offset=v_offset)
    if groups < 1 or tokens % groups:
        raise ValueError(
            f"k_scale has {groups} groups of tokens, which do not divide the cache's {tokens}; "
            f"pad the cache, or use one group"
        )
    every = tokens // groups if groups > 1 else None
    if every and tile and every % tile and tile % every:
        raise ValueError(
            f"a tile must be a multiple or a divisor of the {every} tokens that share a scale of "
            f"the keys; got tile = {tile}"
        )
    if by_token:
        keys = tiles.token_quantized_keys(
            tiles.TOKENS, width, bits=k_bits, offset=k_offset is not None
        )
    else:
        keys = tiles.quantized_keys(width, bits=k_bits, every=every, offset=k_offset is not None)
    values = tiles.quantized_values(
        tiles.TOKENS, value_width, bits=v_bits, offset=v_offset is not None, dtype=q.dtype
    )
    key_scales = [x for x in (k_scale, k_offset) if x is not None]
    return attend(
        "quantized_decode_attention",
        q,
        Part(keys, (k, *(along(*key_scales) if by_token else key_scales))),
        Part(values, (v, *along(v_scale, v_offset))),
        lengths,
        Options(scale, return_lse, tile, splits, implementation, interpret),
        lambda lengths, scale: reference(
            q,
            dequantize(k, k_scale, k_offset),
            dequantize(v, v_scale, v_offset),
            lengths,
            scale=scale,
        ),
        heads=heads,
        tokens=tokens,
    )


def low_rank_decode_attention(
    q: Array,
    features: Array,
    basis: Array,
    v: Array,
    lengths: Array,
    *,
    frequencies: Array,
    positions: Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    tile: int | None = None,
    splits: int | None = None,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Result:
    """Attend to keys that are stored as low-rank features, before their rotation.

    Key head h of token t is rotary(features[t] basis[:, h D : (h + 1) D], positions[t]), with
    channel i paired with channel i + D / 2 (the halves of Llama) and angle positions[t] *
    frequencies[i]. Keys are rebuilt tile by tile and never stored.

    Args:
        q: float[B, S, H, D], rotated already; 1 <= S <= 8.
        features: float[B, T, R] in q's dtype.
        basis: float[R, K D] in q's dtype.
        v: float[B, T, K, W]; or [B, T, W], low-rank features of the values that all heads share:
            these are attended to as they are, and the caller multiplies by their basis (softmax(s)
            (C B) = (softmax(s) C) B), folded into the output projection.
        lengths: as in `decode_attention`.
        frequencies: float32[D / 2], radians a position.
        positions: int32[B, T]; 0, 1, 2 ... if None.
        scale, return_lse, tile, splits, implementation, interpret: as in `decode_attention`.

    Returns:
        As `decode_attention`.

    Raises:
        ValueError, NotImplementedError: as `decode_attention`.

    Source: CSKV, arXiv 2409.10593.
    """
    check_queries(q)
    batch, width = q.shape[0], q.shape[3]
    check_cache(q, features, "features", (batch, None, None))
    tokens, rank = features.shape[1:]
    check_cache(q, basis, "basis", (rank, None))
    heads = basis.shape[1] // width
    if heads * width != basis.shape[1] or heads == 0:
        raise ValueError(
            f"basis must have K D columns, a multiple of the head dim {width}; got {basis.shape}"
        )
    own = v.ndim == 4
    check_cache(q, v, "v", (batch, tokens, heads, None) if own else (batch, tokens, None))
    if width % 2:
        raise ValueError(f"rotary needs an even head dim, got D = {width}")
    check_shape(frequencies, "frequencies", (width // 2,), "float")
    places = (
        jnp.broadcast_to(jnp.arange(tokens), (batch, tokens)) if positions is None else positions
    )
    check_shape(places, "positions", (batch, tokens), "int")
    keys = tiles.low_rank_keys(width, rank)
    values = tiles.plain_values(tiles.TOKENS if own else tiles.FLAT, v.shape[-1])
    column = frequencies.astype(jnp.float32)[:, None]
    parts = basis, features, places.astype(jnp.int32)[:, None], column

    def specification(lengths: Array, scale: float) -> tuple[Array, Array]:
        k = rebuild_keys(features, basis, places, frequencies)
        shared = v if own else jnp.broadcast_to(v[:, :, None], (batch, tokens, heads, v.shape[-1]))
        return reference(q, k, shared, lengths, scale=scale)

    return attend(
        "low_rank_decode_attention",
        q,
        Part(keys, parts),
        Part(values, (v,)),
        lengths,
        Options(scale, return_lse, tile, splits, implementation, interpret),
        specification,
        heads=heads,
        tokens=tokens,
    )


def pack_int4(qvalues: Array) -> Array:
    """Two signed 4-bit values to a uint8: channel i in the low nibble, i + D / 2 in the high one.

    Args:
        qvalues: int[..., D], -8 ... 7, D even.

    Raises:
        ValueError: for an odd last axis or quantized values that are no integers.
    """
    if qvalues.shape[-1] % 2 or not jnp.issubdtype(qvalues.dtype, jnp.integer):
        raise ValueError(
            f"pack_int4 takes integers with an even last axis, got {qvalues.dtype}{qvalues.shape}"
        )
    low, high = jnp.split(qvalues.astype(jnp.int32) & 15, 2, axis=-1)
    return (low | high << 4).astype(jnp.uint8)
