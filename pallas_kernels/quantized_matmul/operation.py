"""Products with quantized matrices: W8A8, weights of 2 to 8 bits with group scales, W4A8.

    int8_matmul     y = s_x s_w (sum_k x_k (q_kn + z_n))             x and q int8, sums in int32
    packed_matmul   y = sum_g s_gn (sum_{k in g} x_k (q_kn + z_gn))  x float, or int8 times s_x

M rows (tokens; any leading axes), K inputs, N outputs, G inputs in a group. One convention holds
for all weights: W = s (q + z), with signed values q and an integer z, absent where the quantizer is
symmetric. Unsigned values u with W = s (u - z) are q = u - 2^(b-1) with zero point 2^(b-1) - z.

The zero point never touches a weight: it comes in as z sum_k x_k, and group scales multiply the
groups' products. Quantized values reach the products as they are, exact in int8 and in bfloat16.
But for one
case: on a GPU, float32 x of more than a few rows and other floats of 512 rows and more meet what
quantized values stand for, a whole matrix of W in x's dtype, as tensor cores gain nothing from
unpacking.

Platforms: `reference` and `xla` everywhere, `pallas_tpu`, `pallas_gpu`. Kernels want N in whole
tiles: a TPU kernel reads uneven edges in place, the GPU's pads a copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.implementation import Implementation, dispatch
from pallas_kernels.packing import Planes, check_planes, packed_rows
from pallas_kernels.quantized_matmul import gpu, reference, tpu, xla

GROUP_SIZES = (32, 64, 128, 256)
_FLOATS = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))


def quantize_per_token(
    x: jax.Array, *, bits: int = 8, floor: float = 1e-5
) -> tuple[jax.Array, jax.Array]:
    """Quantize each row of activations by its own largest value, symmetrically.

    n = 2^(bits-1) - 1, scale = max(absmax, floor) / n, qvalues = clip(round(x / scale), -n - 1, n),
    rounding half to even.

    Args:
        x: float[..., K].
        bits: 2 ... 8.
        floor: smallest absmax, so that a row of zeros has a scale.

    Returns:
        Quantized values int8[..., K] and scales float32[..., 1].

    Raises:
        ValueError: for bits outside of 2 ... 8.

    Source: the dynamic quantizer of ViDiT-Q (arXiv 2406.02540) and MBQ (arXiv 2412.19509).
    """
    if bits not in range(2, 9):
        raise ValueError(f"activations have 2 ... 8 bits, got bits={bits!r}")
    most = 2 ** (bits - 1) - 1
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), floor) / most
    qvalues = jnp.clip(jnp.round(x / scale), -most - 1, most)
    return qvalues.astype(jnp.int8), scale


def int8_matmul(
    x_qvalues: jax.Array,
    w_qvalues: jax.Array,
    *,
    x_scale: jax.Array,
    w_scale: jax.Array,
    w_zero: jax.Array | None = None,
    x_sums: jax.Array | None = None,
    out_dtype: Any = jnp.float32,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> jax.Array:
    """W8A8: integer products summed in int32, then scaled in float32.

    Args:
        x_qvalues: int8[..., K].
        w_qvalues: int8[K, N].
        x_scale: float32[..., 1], one for each row.
        w_scale: float32[N] or [1, N], one for each output.
        w_zero: integers [N] or [1, N] of asymmetric weights W = w_scale (q + w_zero); None for
            symmetric ones. 127 K |w_zero| must stay below 2^31.
        x_sums: int32[..., 1], sums of the rows' quantized values, which `w_zero` needs; None
            computes them.
        out_dtype: float32 or bfloat16.
        implementation, interpret: as in `dispatch`.

    Returns:
        out_dtype[..., N], differentiable in the scales; the quantized values are constants.

    Raises:
        ValueError: for shapes that disagree, unsupported dtypes, or K beyond 2^17 (int32 sums).
    """
    name = "int8_matmul"
    _check_dtype(name, "x_qvalues", x_qvalues, jnp.int8)
    _check_dtype(name, "w_qvalues", w_qvalues, jnp.int8)
    _check_dtype(name, "x_scale", x_scale, jnp.float32)
    _check_dtype(name, "w_scale", w_scale, jnp.float32)
    out_dtype = _check_out(name, out_dtype)
    _check_matrix(name, "w_qvalues", w_qvalues)
    rows, columns = w_qvalues.shape
    _check_rows(name, x_qvalues, rows)
    _check_shape(name, "x_scale", x_scale, (*x_qvalues.shape[:-1], 1))
    w_scale = _row(name, "w_scale", w_scale, columns)
    if w_zero is not None:
        _check_integers(name, "w_zero", w_zero)
        w_zero = _row(name, "w_zero", w_zero, columns).astype(jnp.int32)
        if x_sums is None:
            x_sums = jnp.sum(x_qvalues, axis=-1, keepdims=True, dtype=jnp.int32)
        _check_dtype(name, "x_sums", x_sums, jnp.int32)
        _check_shape(name, "x_sums", x_sums, (*x_qvalues.shape[:-1], 1))
        x_sums = x_sums.reshape(-1, 1)
    if rows > 2**17:
        raise ValueError(
            f"{name}: sums of {rows} products of int8 can exceed int32; split K into parts of at "
            f"most {2**17} and add their results"
        )
    programs = {
        "reference": reference.int8_matmul,
        "xla": xla.int8_matmul,
        "pallas_tpu": partial(tpu.int8_matmul, interpret=interpret),
        "pallas_gpu": partial(gpu.int8_matmul, interpret=interpret),
    }
    out = _run(
        name,
        implementation,
        {key: partial(program, out_dtype=out_dtype) for key, program in programs.items()},
        (x_scale.reshape(-1, 1), w_scale),
        (x_qvalues.reshape(-1, rows), w_qvalues, w_zero, None if w_zero is None else x_sums),
        size=x_qvalues.size * columns,
        interpret=interpret,
    )
    return out.reshape(*x_qvalues.shape[:-1], columns)


def dynamic_int8_matmul(
    x: jax.Array,
    w_qvalues: jax.Array,
    *,
    w_scale: jax.Array,
    w_zero: jax.Array | None = None,
    x_bits: int = 8,
    out_dtype: Any = None,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`int8_matmul` of activations float[..., K] that `quantize_per_token` quantizes first.

    The result has `out_dtype`, x's own if None. Rounding has no useful gradient: what reaches x
    comes through its scale alone.
    """
    qvalues, scale = quantize_per_token(x, bits=x_bits)
    return int8_matmul(
        qvalues,
        w_qvalues,
        x_scale=scale,
        w_scale=w_scale,
        w_zero=w_zero,
        out_dtype=x.dtype if out_dtype is None else out_dtype,
        implementation=implementation,
        interpret=interpret,
    )


def packed_matmul(
    x: jax.Array,
    planes: Planes,
    *,
    bits: int,
    scale: jax.Array,
    zero: jax.Array | None = None,
    group_size: int | None = None,
    x_scale: jax.Array | None = None,
    out_dtype: Any = None,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Product with packed weights, unpacked tile by tile on their way into it (all at once: above).

    Args:
        x: float32 or bfloat16[..., K] (weight-only: W4A16, W3A16), or int8[..., K] quantized values
            (W4A8): then every group's product is an integer one.
        planes: `packing.pack(qvalues, bits)` of int8 values [K, N].
        bits: 2 ... 8.
        scale: float32 or bfloat16[K / G, N], one for each group and output.
        zero: integers [K / G, N] of asymmetric weights W = scale (q + zero), None for symmetric.
        group_size: inputs G that share a scale: 32, 64, 128, 256, or K (or None) for one group.
        x_scale: float32[..., 1] of int8 activations, one for each row; None for float ones.
        out_dtype: float32 or bfloat16; None for x's own, float32 for int8 activations.
        implementation, interpret: as in `dispatch`.

    Returns:
        out_dtype[..., N], summed in float32; differentiable in x (float) and the scales.

    Raises:
        ValueError: for wrong bits, groups that do not divide K, shapes that disagree, or
            unsupported dtypes.
    """
    name = "packed_matmul"
    packed = check_planes(planes, bits)
    integer = x.dtype == jnp.int8
    _check_dtype(name, "x", x, jnp.float32, jnp.bfloat16, jnp.int8)
    _check_dtype(name, "scale", scale, jnp.float32, jnp.bfloat16)
    rows, columns = x.shape[-1], planes[0].shape[1]
    _check_rows(name, x, rows)
    if packed_rows(rows, bits) != packed:
        raise ValueError(
            f"{name}: x has K = {rows}, whose {bits}-bit values fill "
            f"{packed_rows(rows, bits)} packed rows; the planes hold {packed}"
        )
    group_size = rows if group_size is None else group_size
    _check_group(name, rows, group_size)
    _check_shape(name, "scale", scale, (rows // group_size, columns))
    if zero is not None:
        _check_integers(name, "zero", zero)
        _check_shape(name, "zero", zero, scale.shape)
        zero = zero if zero.dtype == jnp.int8 else zero.astype(jnp.int32)
    if integer != (x_scale is not None):
        raise ValueError(
            f"{name}: int8 activations need x_scale, float ones take none; got {x.dtype} and "
            f"x_scale={'None' if x_scale is None else x_scale.dtype}"
        )
    if x_scale is not None:
        _check_dtype(name, "x_scale", x_scale, jnp.float32)
        _check_shape(name, "x_scale", x_scale, (*x.shape[:-1], 1))
        x_scale = x_scale.reshape(-1, 1)
    default = jnp.float32 if integer else x.dtype
    out_dtype = _check_out(name, default if out_dtype is None else out_dtype)
    programs = {
        "reference": reference.packed_matmul,
        "xla": xla.packed_matmul,
        "pallas_tpu": partial(tpu.packed_matmul, interpret=interpret),
        "pallas_gpu": partial(gpu.packed_matmul, interpret=interpret),
    }
    flat = x.reshape(-1, rows)
    out = _run(
        name,
        implementation,
        {key: partial(run, bits=bits, out_dtype=out_dtype) for key, run in programs.items()},
        (None if integer else flat, x_scale, scale),
        (flat if integer else None, planes, zero),
        size=x.size * columns,
        interpret=interpret,
    )
    return out.reshape(*x.shape[:-1], columns)


def _run(
    name: str,
    implementation: Implementation | None,
    programs: Mapping[str, Callable[..., jax.Array]],
    floats: tuple,
    qvalues: tuple,
    *,
    size: int,
    interpret: bool,
) -> jax.Array:
    """Dispatch, with the gradient of the `xla` program whatever runs forward."""
    empty = "a product without rows or columns has nothing to run; use 'xla'" if not size else None

    @jax.custom_vjp
    def run(floats: tuple, qvalues: tuple) -> jax.Array:
        return dispatch(
            name,
            implementation,
            programs,
            *(floats, qvalues),
            refusal=lambda kernel: empty,
            interpret=interpret,
        )

    def forward(floats: tuple, qvalues: tuple) -> tuple[jax.Array, tuple]:
        return run(floats, qvalues), (floats, qvalues)

    def backward(saved: tuple, gradient: jax.Array) -> tuple:
        floats, qvalues = saved
        return *jax.vjp(lambda floats: programs["xla"](floats, qvalues), floats)[1](gradient), None

    run.defvjp(forward, backward)
    return run(floats, qvalues)


def _check_dtype(name: str, what: str, array: jax.Array, *allowed: Any) -> None:
    names = [jnp.dtype(dtype).name for dtype in allowed]
    if array.dtype.name not in names:
        raise ValueError(f"{name}: {what} must be {' or '.join(names)}, got {array.dtype}")


def _check_integers(name: str, what: str, array: jax.Array) -> None:
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name}: {what} must be integers, got {array.dtype}")


def _check_out(name: str, dtype: Any) -> Any:
    if jnp.dtype(dtype) not in _FLOATS:
        raise ValueError(f"{name}: out_dtype must be float32 or bfloat16, got {dtype}")
    return jnp.dtype(dtype)


def _check_matrix(name: str, what: str, array: jax.Array) -> None:
    if array.ndim != 2:
        raise ValueError(f"{name}: {what} must be [K, N], got shape {array.shape}")


def _check_rows(name: str, x: jax.Array, rows: int) -> None:
    if x.ndim < 1 or x.shape[-1] != rows or not rows:
        raise ValueError(
            f"{name}: x must be [..., K] with the weights' K = {rows} >= 1, got shape {x.shape}"
        )


def _check_shape(name: str, what: str, array: jax.Array, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name}: {what} must have shape {shape}, got {array.shape}")


def _row(name: str, what: str, array: jax.Array, columns: int) -> jax.Array:
    if array.shape not in ((columns,), (1, columns)):
        raise ValueError(
            f"{name}: {what} must have shape ({columns},) or (1, {columns}), one for each output; "
            f"got {array.shape}"
        )
    return array.reshape(1, columns)


def _check_group(name: str, rows: int, group_size: int) -> None:
    if group_size != rows and (group_size not in GROUP_SIZES or rows % group_size):
        dividing = [size for size in GROUP_SIZES if rows % size == 0]
        raise ValueError(
            f"{name}: groups of {group_size} are not supported for K = {rows}; group_size may be "
            f"{', '.join(map(str, [*dividing, rows]))} (the last is one group)"
        )
