"""What stands before a product of quantized values, in one pass over the activations.

    y = ((x (1 + scale) + shift) * smoothing_scale * signs) (I (x) H_1 (x) ... (x) H_k)       in
    float32 s = max |y| / n,   q = clip(round(y / s), -n - 1, n),   sums = sum_c q         for each
    row

with n = 2^(b-1) - 1, rounding half to even, and s = 1 for a row of zeros. All that comes before the
quantized values is optional. The identity I fills what the factors H leave of the width.

Platforms: `reference` and `xla` everywhere, `pallas_tpu`, `pallas_gpu`. Programs sum and divide in
different orders: scales differ in their last bits, and a value that stands between two quantized
    values may
take the other one (fewer than one in a thousand, and by one). Sums are those of the quantized
values.

Source: the kernels of ViDiT-Q, arXiv 2406.02540.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.implementation import Implementation, dispatch
from pallas_kernels.quantize_inputs import gpu, reference, tpu, xla


class InputCodes(NamedTuple):
    """Rows as quantized values.

    Attributes:
        qvalues: int8[..., C].
        scale: float32[..., 1]: the row is qvalues * scale.
        sums: int32[..., 1] of the quantized values, which zero points of weights need.
    """

    qvalues: jax.Array
    scale: jax.Array
    sums: jax.Array


def quantize_inputs(
    x: jax.Array,
    *,
    bits: int = 8,
    modulation: tuple[jax.Array, jax.Array] | None = None,
    smoothing_scale: jax.Array | None = None,
    signs: jax.Array | None = None,
    factors: tuple[jax.Array, ...] = (),
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> InputCodes:
    """Modulate, smooth, rotate and quantize rows; the module's docstring has the formulas.

    Args:
        x: float32 or bfloat16[..., C], with modulation [B, ..., C].
        bits: of a quantized value, 2 ... 8.
        modulation: adaLN's (shift, scale), float32 or bfloat16[B, C], one for each sample.
        smoothing_scale: float32[C].
        signs: float32[C], +-1.
        factors: float32[n, n], small and orthogonal, of which the last acts on neighboring
            channels; the product of their orders divides C. H / sqrt(n) for Hadamard matrices.
        implementation, interpret: as in `dispatch`. No gradients.

    Raises:
        ValueError: for bits, dtypes or shapes that do not fit.
        NotImplementedError: if the named implementation cannot run these operands.
    """
    if bits not in range(2, 9):
        raise ValueError(f"quantize_inputs: quantized values have 2 ... 8 bits, got bits={bits!r}")
    floats = (jnp.float32, jnp.bfloat16)
    if x.dtype not in floats or not x.ndim or not x.shape[-1]:
        raise ValueError(
            f"quantize_inputs: x must be float32 or bfloat16[..., C] with C >= 1, got "
            f"{x.dtype}{list(x.shape)}"
        )
    width = x.shape[-1]
    batch = max(1, x.shape[0]) if modulation is not None and x.ndim > 1 else 1
    for name, array in zip(("shift", "scale"), modulation or ()):
        if array.dtype not in floats or array.shape != (batch, width):
            raise ValueError(
                f"quantize_inputs: {name} must be float32 or bfloat16 {[batch, width]} for x "
                f"{list(x.shape)}, got {array.dtype}{list(array.shape)}"
            )
    for name, array in {"smoothing_scale": smoothing_scale, "signs": signs}.items():
        if array is not None and (array.dtype, array.shape) != (jnp.float32, (width,)):
            raise ValueError(
                f"quantize_inputs: {name} must be float32[{width}], got "
                f"{array.dtype}{list(array.shape)}"
            )
    for factor in factors:
        if factor.dtype != jnp.float32 or factor.ndim != 2 or len(set(factor.shape)) != 1:
            raise ValueError(
                f"quantize_inputs: factors must be square and float32, got "
                f"{factor.dtype}{list(factor.shape)}"
            )
    orders = tuple(factor.shape[0] for factor in factors)
    if math.prod(orders) < 1 or width % math.prod(orders):
        raise ValueError(
            f"quantize_inputs: the factors' orders {orders} must have a product that divides "
            f"C = {width}"
        )
    # Signs change no rounding, so smoothing scale and signs are one factor.
    multiplier = (
        smoothing_scale
        if signs is None
        else signs
        if smoothing_scale is None
        else smoothing_scale * signs
    )

    def refusal(kernel: str) -> str | None:
        if not x.size:
            return "there are no rows to quantize; use 'xla'"
        return (tpu if kernel == "pallas_tpu" else gpu).refusal(width, orders)

    found = dispatch(
        "quantize_inputs",
        implementation,
        {
            "reference": partial(reference.quantize_inputs, bits=bits),
            "xla": partial(xla.quantize_inputs, bits=bits),
            "pallas_tpu": partial(tpu.quantize_inputs, bits=bits, interpret=interpret),
            "pallas_gpu": partial(gpu.quantize_inputs, bits=bits, interpret=interpret),
        },
        x.reshape(batch, x.size // (batch * width), width),
        modulation,
        multiplier,
        factors,
        refusal=refusal,
        interpret=interpret,
    )
    return InputCodes(*(part.reshape(*x.shape[:-1], part.shape[-1]) for part in found))
