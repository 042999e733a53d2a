"""The only place where models multiply by a quantized matrix."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from effjax.quant.quantizer import Quantizer, dequantize
from effjax.quant.tensor import Activations, QTensor
from pallas_kernels.implementation import Implementation
from pallas_kernels.quantize_inputs import quantize_inputs
from pallas_kernels.quantized_matmul import int8_matmul, packed_matmul

Path = Literal["integer", "reference"]


def qdot(
    x: Array,
    w: QTensor,
    *,
    path: Path = "integer",
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Array:
    """Multiply inputs with a quantized matrix, or with the matrices of a stack, in x's dtype.

    Args:
        x: float[..., I]; for a stack float[*E, ..., I], each part times its own matrix.
        w: [I, O] or [*E, I, O].
        path: "integer" multiplies quantized values: int8 with int8 where inputs are quantized,
            floats with packed quantized values else; float8 values are multiplied as floats.
            "reference" multiplies what the quantized values stand for, in float32: the
            specification.
        implementation, interpret: of the kernels; see `pallas_kernels.implementation`.

    Returns:
        [..., O] or [*E, ..., O] in x's dtype. Gradients of the integer path are straight through
        the quantized values of the inputs.

    Raises:
        ValueError: for inputs of another width, or a path that there is not.
        NotImplementedError: if the integer path cannot run these operands; nothing falls back.
    """
    leading = len(w.leading)
    fits = x.shape[-1:] == w.matrix[:1] and x.shape[:-1][:leading] == w.leading
    if w.convolution or not fits:
        stack = " in a stack: they are [*E, ..., I], each part for its own matrix" * bool(leading)
        raise ValueError(f"inputs {list(x.shape)} do not fit a matrix {list(w.shape)}{stack}")
    if path not in ("integer", "reference"):
        raise ValueError(f'path must be "integer" or "reference", got {path!r}')
    if path == "reference":
        return w.each(lambda w, x: _reference(x, w), x)
    return w.each(lambda w, x: _integer((implementation, interpret), x, w), x)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _integer(how: tuple[Implementation | None, bool], x: Array, w: QTensor) -> Array:
    if w.block is not None:
        return _float8(x, w)
    run: Any = {"implementation": how[0], "interpret": how[1]}
    # The kernels' zero points are added, a leaf's are subtracted.
    zero = None if w.zero_point is None else -w.zero_point
    if w.activations is None:
        if not w.packed:
            raise NotImplementedError(
                "float inputs are multiplied with packed values: quantize with packed=True, or use "
                'path="reference"'
            )
        kernel_dtype = x.dtype if x.dtype != jnp.float16 else jnp.dtype(jnp.float32)
        out = packed_matmul(
            w.prepare(x).astype(kernel_dtype),
            w.qvalue,
            bits=w.bits,
            group_size=w.group_size,
            scale=w.scale,
            zero=zero,
            **run,
        )
        return out.astype(x.dtype)
    if w.activations.group_size:
        return _by_group(x, w, zero, **run).astype(x.dtype)
    if _fused(w):
        qvalues, scale, sums = quantize_inputs(
            w.permuted(x if x.dtype != jnp.float16 else x.astype(jnp.float32)),
            bits=w.activations.quantizer.bits,
            smoothing_scale=w.smoothing_scale,
            signs=None if w.rotation is None else jnp.asarray(w.rotation.signs()),
            factors=() if w.rotation is None else tuple(map(jnp.asarray, w.rotation.matrices())),
            **run,
        )
        input_zero = None
    else:
        qvalues, scale, input_zero = _quantized_inputs(x, w)
        sums = None
    if w.packed:
        out = packed_matmul(
            qvalues,
            w.qvalue,
            bits=w.bits,
            group_size=w.group_size,
            scale=w.scale,
            zero=zero,
            x_scale=scale,
            **run,
        )
    elif w.group_size == w.shape[0]:
        out = int8_matmul(
            qvalues, w.qvalue, x_scale=scale, w_scale=w.scale, w_zero=zero, x_sums=sums, **run
        )
    else:
        raise NotImplementedError(
            f"int8 values with a scale for every {w.group_size} inputs are multiplied when packed: "
            f'quantize with packed=True, or use path="reference"'
        )
    if input_zero is not None:
        out = out - scale * input_zero.astype(jnp.float32) * w.column_sums
    return out.astype(x.dtype)


def _float8(x: Array, w: QTensor) -> Array:
    """The product of what float8 values stand for, in x's dtype and summed in float32."""
    dtype = x.dtype if x.dtype != jnp.float16 else jnp.dtype(jnp.float32)
    values = w.prepare(x) if w.activations is None else dequantize(*_quantized_inputs(x, w))
    out = jnp.matmul(
        values.astype(dtype),
        w.dequantize().astype(dtype),
        precision="highest" if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return out.astype(x.dtype)


def _by_group(x: Array, w: QTensor, zero: Array | None, **run: Any) -> Array:
    """The sum of a product for each group of inputs that share a range."""
    assert w.activations is not None
    assert w.activations.group_size is not None
    if w.packed:
        raise NotImplementedError(
            "inputs with a range for every few of them are multiplied with int8 values: quantize "
            'weights of 8 bits with packed=False, or use path="reference"'
        )
    qvalues, scale, _ = _quantized_inputs(x, w)
    every, inputs = w.activations.group_size, w.shape[0]
    if w.group_size not in (every, inputs):
        raise NotImplementedError(
            f"weights have a scale for every {w.group_size} inputs, which must be all, or the "
            f'{every} that share a range; else use path="reference"'
        )
    out = jnp.zeros((*x.shape[:-1], w.shape[1]), jnp.float32)
    for group, start in enumerate(range(0, inputs, every)):
        own = slice(start, start + every)
        row = slice(group, group + 1) if w.group_size == every else slice(None)
        out += int8_matmul(
            qvalues[..., own],
            w.qvalue[own],
            x_scale=scale[..., own][..., :1],
            w_scale=w.scale[row],
            w_zero=None if zero is None else zero[row],
            **run,
        )
    return out


def _forward(how: Any, x: Array, w: QTensor) -> tuple[Array, Any]:
    return _integer(how, x, w), (x, w)


def _backward(how: Any, saved: Any, gradient: Array) -> Any:
    """Straight through the quantized values of the inputs."""

    def smooth(x: Array, w: QTensor) -> Array:
        values = w.prepare(x).astype(jnp.float32)
        return jnp.matmul(values, w.dequantize()).astype(x.dtype)

    return jax.vjp(smooth, *saved)[1](gradient)


_integer.defvjp(_forward, _backward)


def _reference(x: Array, w: QTensor) -> Array:
    if w.activations is None:
        values = w.prepare(x.astype(jnp.float32))
    else:
        values = dequantize(*_quantized_inputs(x, w))
    return jnp.matmul(values, w.dequantize(), precision="highest").astype(x.dtype)


def _fused(w: QTensor) -> bool:
    """Whether the kernel of `quantize_inputs` prepares and quantizes the inputs of a leaf."""
    how = w.activations
    return how == Activations(Quantizer(how.quantizer.bits)) if how is not None else False


def _quantized_inputs(x: Array, w: QTensor) -> tuple[Array, Array, Array | None]:
    """Quantized values [..., I] of prepared inputs, scales float32[..., 1 or I] and zero points."""
    assert w.activations is not None
    quantizer, every = w.activations.quantizer, w.activations.group_size
    values = w.prepare(x.astype(jnp.float32))
    if not w.activations.dynamic:
        qvalues = quantizer.quantize(values, w.input_scale, w.input_zero_point)
        return qvalues, jnp.broadcast_to(w.input_scale, (*x.shape[:-1], 1)), w.input_zero_point
    if every is None:
        scale, zero = quantizer.fit_axes(values, -1)
        return quantizer.quantize(values, scale, zero), scale, zero
    inputs = values.shape[-1]
    padded = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -inputs % every)])
    groups = padded.reshape(*values.shape[:-1], -1, every)
    scale, _ = quantizer.fit_axes(groups, -1)
    scale = jnp.broadcast_to(scale, groups.shape).reshape(padded.shape)[..., :inputs]
    return quantizer.quantize(values, scale), scale, None
