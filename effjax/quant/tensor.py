"""The quantized weight: one leaf in the place of an array, and what its layer does with inputs.

    y = x W   with   W = (q - z) s   by channel or by group of inputs

and, where inputs are prepared for it, x -> rotate(x[perm] m), whose inverse is in W already.
Quantized values are int8, or packed planes of 2 to 8 bits (`pallas_kernels.packing`); or they are
numbers of float8_e4m3fn, W = q s by blocks of inputs and outputs. Names and signs are those of
`qwix.QArray`, into which `to_qwix` turns a leaf.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax import Array

from effjax.fields import Checked, Count
from effjax.quant.hadamard import Rotation
from effjax.quant.quantizer import BITS, FLOAT8, Quantizer, dequantize
from pallas_kernels.packing import pack, unpack


@dataclasses.dataclass(frozen=True)
class Activations(Checked):
    """How a layer's inputs become quantized values; static.

    Attributes:
        quantizer: of the inputs.
        dynamic: each token (each image, for a convolution) takes its own range; else one range was
            calibrated for all of them.
        group_size: consecutive inputs of a token that share a range, if it is dynamic and
            symmetric; None for all.
    """

    quantizer: Quantizer = dataclasses.field(default_factory=Quantizer)
    dynamic: bool = True
    group_size: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size is None:
            return
        if not self.dynamic or not self.quantizer.symmetric:
            raise ValueError(
                f"groups of {self.group_size} inputs: ranges of groups are those of single tokens "
                f"(dynamic=True) and symmetric"
            )


@partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "qvalue",
        "scale",
        "zero_point",
        "perm",
        "smoothing_scale",
        "input_scale",
        "input_zero_point",
        "column_sums",
    ),
    meta_fields=("shape", "bits", "activations", "rotation", "block"),
)
@dataclasses.dataclass(frozen=True, repr=False)
class QTensor:
    """A quantized matrix [I, O]; a pytree that stands where the array did.

    The kernel of a convolution [R, S, I, O] is held as the matrix [R S I, O].

    Attributes:
        qvalue: quantized values int8[I, O], or the planes of `pallas_kernels.packing.pack`; or
            float8_e4m3fn[I, O].
        scale: float32[G, O], one for each output and I / G consecutive inputs; of float8 values one
            for each block, those at the edges cut: float32[ceil(I / block[0]), ceil(O / block[1])].
        zero_point: int32[G, O]; None if symmetric.
        perm: int32[I]: row i of the quantized values is of input perm[i], argsort(g_idx) of GPTQ's
            desc_act, where inputs of a group stand apart; None if row i is of input i.
        smoothing_scale: float32[I] that inputs are multiplied by; None for ones.
        input_scale, input_zero_point: float32[] and int32[] of calibrated activations.
        column_sums: float32[O] of the matrix, which zero points of activations need.
        shape: of the array: (I, O) or (R, S, I, O).
        bits: of a weight.
        activations: how inputs become quantized values; None leaves them floats.
        rotation: of the inputs, after the smoothing scale; None for none.
        block: (inputs, outputs) that share a scale, of float8 values; None for integers.
    """

    qvalue: Any
    scale: Any
    zero_point: Any
    perm: Any
    smoothing_scale: Any
    input_scale: Any
    input_zero_point: Any
    column_sums: Any
    shape: tuple[int, ...]
    bits: int
    activations: Activations | None
    rotation: Rotation | None
    block: tuple[int, int] | None = None

    def __repr__(self) -> str:
        # Of what is static: transformations put other things in the places of arrays.
        quantized = f", inputs: {self.activations}" if self.activations else ""
        turned = f", {self.rotation}" if self.rotation else ""
        blocks = f" of float8, blocks {self.block}" if self.block else ""
        return f"QTensor({list(self.shape)}, {self.bits} bits{blocks}{quantized}{turned})"

    @property
    def packed(self) -> bool:
        """Whether quantized values are packed planes."""
        return isinstance(self.qvalue, tuple)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return self.scale.dtype

    @property
    def rows(self) -> int:
        """Rows of the matrix: inputs of one output."""
        return math.prod(self.shape[:-1])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(I, O) of the matrix that is held."""
        return self.rows, self.shape[-1]

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.block[0] if self.block else self.rows // self.scale.shape[0]

    @property
    def logical_bytes(self) -> int:
        """Bytes of quantized values at their bits, and of everything beside them."""
        beside = jax.tree.leaves(dataclasses.replace(self, qvalue=()))
        qvalues = -(-math.prod(self.shape) * self.bits // 8)
        return qvalues + sum(math.prod(x.shape) * x.dtype.itemsize for x in beside)

    def to_dict(self) -> dict[str, Any]:
        """What the leaf is, without its numbers, as JSON types."""
        return {
            "shape": list(self.shape),
            "bits": self.bits,
            "packed": self.packed,
            "group_size": self.group_size,
            "block": self.block and list(self.block),
            "parts": [name for name in _PARTS if getattr(self, name) is not None],
            "activations": self.activations and dataclasses.asdict(self.activations),
            "rotation": self.rotation and dataclasses.asdict(self.rotation),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QTensor:
        """The inverse of `to_dict`: a leaf of shapes.

        Raises:
            ValueError: for values that describe no leaf.
        """
        try:
            *leading, outputs = shape = tuple(values["shape"])
            rows, bits, quantized = math.prod(leading), values["bits"], values["activations"]
            if bits not in BITS or type(bits) is not int:
                raise ValueError(f"{bits} bits")
            block, scales = _scales(values, rows, outputs)
            if block is not None and (bits != 8 or values["packed"] or len(leading) != 1):
                raise ValueError(f"float8 values of {list(shape)}, {bits} bits or packed")
            dims = {"G": scales[0], "I": rows, "O": outputs}
            parts: dict[str, Any] = dict.fromkeys(_PARTS)
            for name in values["parts"]:
                axes, dtype = _PARTS[name]
                parts[name] = jax.ShapeDtypeStruct(tuple(dims[axis] for axis in axes), dtype)
            qvalues = jax.ShapeDtypeStruct((rows, outputs), FLOAT8 if block else jnp.int8)
            return cls(
                qvalue=jax.eval_shape(partial(pack, bits=bits), qvalues)
                if values["packed"]
                else qvalues,
                scale=jax.ShapeDtypeStruct(scales, jnp.float32),
                **parts,
                shape=shape,
                bits=bits,
                activations=quantized and _activations(quantized),
                rotation=values["rotation"] and Rotation(**values["rotation"]),
                block=block,
            )
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"this describes no quantized leaf: {values!r} ({error!r})") from error

    def qvalues(self) -> Array:
        """int8[I, O], or float8_e4m3fn."""
        return unpack(self.qvalue, self.bits, self.rows) if self.packed else self.qvalue

    def dequantize(self) -> Array:
        """The matrix float32[I, O] that the quantized values stand for, of prepared inputs."""
        zero = None if self.zero_point is None else self._spread(self.zero_point)
        return dequantize(self.qvalues(), self._spread(self.scale), zero)

    def _spread(self, part: Array) -> Array:
        """The value of its group or block for each element of the matrix, or of its rows."""
        rows = jnp.repeat(part, self.group_size, axis=0)[: self.rows]
        if self.block is None or self.block[1] == 1:
            return rows
        return jnp.repeat(rows, self.block[1], axis=1)[:, : self.shape[-1]]

    def restore(self) -> Array:
        """The array in float32, of unprepared inputs: what was quantized, with its rounding."""
        w = self.dequantize()
        if self.rotation is not None:
            w = self.rotation.undo(w.T).T
        if self.smoothing_scale is not None:
            w = w * self.smoothing_scale[:, None]
        if self.perm is not None:
            w = w[jnp.argsort(self.perm)]
        return w.reshape(self.shape)

    def permuted(self, x: Array) -> Array:
        """Inputs [..., I] in the order of the quantized values' rows."""
        return x if self.perm is None else jnp.take(x, self.perm, axis=-1, unique_indices=True)

    def prepare(self, x: Array) -> Array:
        """Inputs [..., I] as the quantized values expect them: ordered, smoothed, then rotated."""
        return prepare_inputs(self.permuted(x), self.smoothing_scale, self.rotation)

    def to_qwix(self) -> Any:
        """As a `qwix.QArray` [I, O], whose zero points are int8 (ranges must contain zero).

        Raises:
            ValueError: if inputs are prepared or quantized, which a QArray does not know, or for
                the kernel of a convolution or float8 values.
        """
        if self.block is not None:
            raise ValueError("a qwix.QArray is made of integer values here, not of float8")
        if self.ndim != 2:
            raise ValueError(f"a qwix.QArray is made of a matrix, not of a kernel {self.shape}")
        prepared = (self.perm, self.smoothing_scale, self.rotation, self.activations)
        if any(part is not None for part in prepared):
            raise ValueError(
                "a qwix.QArray knows nothing of orders, smoothing scales, rotations and activations"
            )
        from qwix import QArray

        zero = None if self.zero_point is None else self.zero_point.astype(jnp.int8)
        return QArray(self.qvalues(), self.scale, zero, f"int{self.bits}")


def _activations(values: Mapping[str, Any]) -> Activations:
    return Activations(**{**values, "quantizer": Quantizer(**values["quantizer"])})


def _static_to_json(static: tuple[Any, ...]) -> bytes:
    shape, bits, activations, rotation, block = static
    described = (x and dataclasses.asdict(x) for x in (activations, rotation))
    return json.dumps([shape, bits, *described, block]).encode()


def _static_from_json(text: bytes | bytearray) -> tuple[Any, ...]:
    shape, bits, activations, rotation, block = json.loads(text)
    quantized, rotated = (
        activations and _activations(activations),
        rotation and Rotation(**rotation),
    )
    return tuple(shape), bits, quantized, rotated, block and tuple(block)


# So that an exported program may take leaves as arguments.
jax.export.register_pytree_node_serialization(
    QTensor,
    serialized_name="effjax.QTensor",
    serialize_auxdata=_static_to_json,
    deserialize_auxdata=_static_from_json,
)


def _scales(
    values: Mapping[str, Any], rows: int, outputs: int
) -> tuple[tuple[int, int] | None, tuple[int, int]]:
    """Of a description: the block of float8 values that share a scale, and the scales' shape."""
    if values.get("block") is None:
        groups, rest = divmod(rows, values["group_size"])
        if rest:
            raise ValueError(f"{rows} inputs in groups of {values['group_size']}")
        return None, (groups, outputs)
    high, wide = values["block"]
    if type(high) is not int or type(wide) is not int or min(high, wide) < 1:
        raise ValueError(f"blocks of {high!r} x {wide!r}")
    if "zero_point" in values["parts"]:
        raise ValueError("zero points of float8 values")
    return (high, wide), (-(-rows // high), -(-outputs // wide))


# Axes and dtypes of what a leaf may hold beside its quantized values and scales.
_PARTS: dict[str, tuple[str, Any]] = {
    "zero_point": ("GO", jnp.int32),
    "perm": ("I", jnp.int32),
    "smoothing_scale": ("I", jnp.float32),
    "input_scale": ("", jnp.float32),
    "input_zero_point": ("", jnp.int32),
    "column_sums": ("O", jnp.float32),
}


def prepare_inputs(x: Array, smoothing_scale: Array | None, rotation: Rotation | None) -> Array:
    """Inputs float[..., I] times a scale float32[I], then rotated; None leaves a step out."""
    if smoothing_scale is not None:
        x = (x.astype(jnp.float32) * smoothing_scale).astype(x.dtype)
    return x if rotation is None else rotation.apply(x)


def prepare_weights(w: Array, smoothing_scale: Array | None, rotation: Rotation | None) -> Array:
    """The matrix [I, O] whose product with prepared inputs is that of w with the inputs."""
    w = w if smoothing_scale is None else w / smoothing_scale[:, None]
    return w if rotation is None else rotation.apply(w.T).T  # x m R R^T W / m


def restore(params: Any, dtype: jax.typing.DTypeLike) -> Any:
    """A tree of parameters with arrays of a dtype in the place of its quantized leaves."""
    return jax.tree.map(
        lambda leaf: leaf.restore().astype(dtype) if isinstance(leaf, QTensor) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, QTensor),
    )


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
            f"a quantized weight is a matrix [I, O] or a kernel [R, S, I, O]; got {list(shape)}"
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
        shape=shape,
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
