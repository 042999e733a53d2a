"""Arrays to quantized leaves, by rounding to nearest."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from effjax.quant.hadamard import Rotation
from effjax.quant.quantizer import Quantizer
from effjax.quant.tensor import Activations, QTensor, prepare_weights
from pallas_kernels.packing import pack


def quantize_matrix(
    w: Array,
    quantizer: Quantizer | None = None,
    *,
    group_size: int | None = None,
    activations: Activations | None = None,
    input_range: tuple[Array, Array] | None = None,
    perm: Array | None = None,
    smoothing_scale: Array | None = None,
    rotation: Rotation | None = None,
    packed: bool | None = None,
) -> QTensor:
    """Quantize a matrix to the nearest quantized values, with what its inputs need.

    Args:
        w: float[I, O], or the kernel of a convolution [R, S, I, O], which has a scale for each
            output and takes no groups, order, smoothing scale or rotation.
        quantizer: of the weights; symmetric 8 bits if None. Levels "e4m3" give float8 values.
        group_size: inputs that share a scale; all of a channel if None.
        activations: how inputs become quantized values; None leaves them floats.
        input_range: float[] low and high of (prepared) inputs, for activations that are not
            dynamic.
        perm: int[I]: the inputs are taken in this order, and the rows of the matrix too, so that
            groups are of inputs that follow each other in it.
        smoothing_scale: float[I]: inputs, in their order, will be multiplied by it, and the matrix
            is divided by it.
        rotation: of inputs of width I, after the smoothing scale.
        packed: pack the quantized values; None packs integers that are not products of int8 values
            by channel.

    Raises:
        ValueError: for a matrix, group, order, smoothing scale, rotation or range that does not
            fit, and for float8 values of a convolution, packed, or with inputs of integer values.
    """
    quantizer = quantizer or Quantizer()
    shape = w.shape
    if w.ndim not in (2, 4):
        raise ValueError(
            f"a quantized weight is a matrix [I, O] or a kernel [R, S, I, O]; got {list(shape)}. "
            f"Stacks of matrices are for quantize_stack"
        )
    if w.ndim == 4 and (
        group_size or any(part is not None for part in (perm, smoothing_scale, rotation))
    ):
        raise ValueError(
            f"the kernel of a convolution, {list(shape)}, has one scale for each output; leave out "
            f"group_size, order, smoothing scale and rotation"
        )
    floats = quantizer.floats
    if floats and (len(shape) != 2 or packed):
        raise ValueError("float8 values are those of a matrix, and are not packed")
    if activations is not None and activations.quantizer.floats != floats:
        raise ValueError(
            'inputs and weights are both float8 (levels="e4m3") or both integers; got '
            f"{activations.quantizer} and {quantizer}"
        )
    w = w.reshape(-1, shape[-1])
    inputs, outputs = w.shape
    group_size = group_size or inputs
    if inputs % group_size:
        raise ValueError(f"group_size {group_size} does not divide the {inputs} inputs")
    if perm is not None and perm.shape != (inputs,):
        raise ValueError(f"perm must have one place for each of {inputs} inputs, got {perm.shape}")
    if smoothing_scale is not None and smoothing_scale.shape != (inputs,):
        raise ValueError(
            f"smoothing scale must have one factor for each of {inputs} inputs, got "
            f"{smoothing_scale.shape}"
        )
    if rotation is not None and rotation.width != inputs:
        raise ValueError(f"a rotation of width {rotation.width} does not fit {inputs} inputs")
    if activations is not None and inputs % (activations.group_size or 1):
        raise ValueError(
            f"groups of {activations.group_size} inputs with a range do not divide the {inputs}"
        )
    static = activations is not None and not activations.dynamic
    if static != (input_range is not None):
        raise ValueError("activations that are not dynamic, and no others, need an input_range")
    if len(shape) == 4 and activations is not None:
        if not activations.quantizer.keeps_zero:
            raise ValueError(
                "the images of a convolution are padded with zeros: keep keeps_zero=True"
            )
        if activations.group_size or (activations.dynamic and not activations.quantizer.symmetric):
            raise ValueError(
                "ranges of single images are symmetric and of all inputs; leave out group_size, "
                "and calibrate asymmetric ones (dynamic=False)"
            )
    w = w.astype(jnp.float32)
    smoothing_scale = None if smoothing_scale is None else smoothing_scale.astype(jnp.float32)
    w = w if perm is None else w[perm]
    w = prepare_weights(w, smoothing_scale, rotation)
    groups = w.reshape(-1, group_size, outputs)
    scale, zero = quantizer.fit_axes(groups, 1)
    qvalues = quantizer.quantize(groups, scale, zero).reshape(inputs, outputs)
    scale, zero = jax.tree.map(lambda x: x[:, 0], (scale, zero))
    input_scale = input_zero = None
    if activations is not None and input_range is not None:
        input_scale, input_zero = activations.quantizer.fit(*input_range)
    offset = activations is not None and not activations.quantizer.symmetric
    if packed is None:
        packed = quantizer.bits < 8
        if len(shape) == 2 and not floats:
            packed = packed or activations is None or group_size != inputs
    tensor = QTensor(
        qvalue=qvalues,
        scale=scale,
        zero_point=zero,
        perm=None if perm is None else perm.astype(jnp.int32),
        smoothing_scale=smoothing_scale,
        input_scale=input_scale,
        input_zero_point=input_zero,
        column_sums=None,
        matrix=tuple(shape),
        bits=quantizer.bits,
        activations=activations,
        rotation=rotation,
        block=(group_size, 1) if floats else None,
    )
    return dataclasses.replace(
        tensor,
        qvalue=pack(qvalues, quantizer.bits) if packed else qvalues,
        column_sums=jnp.sum(tensor.dequantize(), axis=0) if offset else None,
    )


def quantize_stack(
    w: Array,
    quantizer: Quantizer | None = None,
    *,
    input_range: tuple[Array, Array] | None = None,
    perm: Array | None = None,
    smoothing_scale: Array | None = None,
    **options: Any,
) -> QTensor:
    """Quantize a stack of matrices, such as the experts of a layer: each as it would be alone.

    Args:
        w: float[*E, I, O]; without leading axes this is `quantize_matrix`.
        quantizer, options: of `quantize_matrix`, for all matrices alike.
        input_range, perm, smoothing_scale: of `quantize_matrix`, with the leading axes *E: every
            matrix has its own.

    Raises:
        ValueError: as `quantize_matrix`, and for what lacks the leading axes.
    """
    if w.ndim < 2:
        raise ValueError(f"a stack of matrices is [*E, I, O]; got {list(w.shape)}")
    leading = w.shape[:-2]
    own = {"input_range": input_range, "perm": perm, "smoothing_scale": smoothing_scale}
    for name, part in own.items():
        shapes = [array.shape[: len(leading)] for array in jax.tree.leaves(part)]
        if any(shape != leading for shape in shapes):
            raise ValueError(f"{name} must have the leading axes {list(leading)} of the stack")

    def one(w: Array, own: dict[str, Any]) -> QTensor:
        return quantize_matrix(w, quantizer, **own, **options)

    for _ in leading:
        one = jax.vmap(one)
    return one(w, own)
