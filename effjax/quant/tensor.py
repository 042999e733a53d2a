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
from collections.abc import Callable, Mapping
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
    """How the inputs of a layer become quantized values. It is static.

    Attributes:
        quantizer: the quantizer of the inputs.
        dynamic: True if each token (each image, for a convolution) has its own range; False if one
            range was calibrated for all of them.
        group_size: number of consecutive inputs of a token that share a range, for ranges that are
            dynamic and symmetric; None for all inputs.
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
    meta_fields=("matrix", "bits", "activations", "rotation", "block"),
)
@dataclasses.dataclass(frozen=True, repr=False)
class QTensor:
    """A quantized matrix [I, O], or a stack of such matrices.

    It is a pytree, and stands in the parameters in the place of the array. Make one with
    `quantize_matrix` or `quantize_stack`, multiply with `qdot`, and get floats with `dequantize`.
    The kernel of a convolution [R, S, I, O] is kept as the matrix [R S I, O].

    The static fields describe one matrix. In a stack [*E, I, O], such as the experts of a layer,
    every array has the leading axes *E. So `jax.vmap` and `jax.lax.map` over a leaf give the leaves
    of single matrices, and results that are leaves become stacks again (see `each`).

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
        matrix: shape of the array that one matrix stands for: (I, O), or (R, S, I, O) of a
            convolution.
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
    matrix: tuple[int, ...]
    bits: int
    activations: Activations | None
    rotation: Rotation | None
    block: tuple[int, int] | None = None

    def __repr__(self) -> str:
        # Of what is static: transformations put other things in the places of arrays.
        quantized = f", inputs: {self.activations}" if self.activations else ""
        turned = f", {self.rotation}" if self.rotation else ""
        blocks = f" of float8, blocks {self.block}" if self.block else ""
        shape = [*getattr(self.scale, "shape", ())[:-2], *self.matrix]
        return f"QTensor({shape}, {self.bits} bits{blocks}{quantized}{turned})"

    @property
    def packed(self) -> bool:
        """Whether quantized values are packed planes."""
        return isinstance(self.qvalue, tuple)

    @property
    def leading(self) -> tuple[int, ...]:
        """Leading axes of a stack of matrices; () for one."""
        return tuple(self.scale.shape[:-2])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array: (*E, I, O), or (R, S, I, O) of a convolution."""
        return (*self.leading, *self.matrix)

    @property
    def convolution(self) -> bool:
        """Whether it is the kernel of a convolution."""
        return len(self.matrix) == 4

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return self.scale.dtype

    @property
    def rows(self) -> int:
        """Rows of a matrix: inputs of one output."""
        return math.prod(self.matrix[:-1])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(I, O) of a matrix that is held."""
        return self.rows, self.matrix[-1]

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.block[0] if self.block else self.rows // self.scale.shape[-2]

    @property
    def logical_bytes(self) -> int:
        """Bytes of quantized values at their bits, and of everything beside them."""
        beside = jax.tree.leaves(dataclasses.replace(self, qvalue=()))
        qvalues = -(-math.prod(self.shape) * self.bits // 8)
        return qvalues + sum(math.prod(x.shape) * x.dtype.itemsize for x in beside)

    def to_dict(self) -> dict[str, Any]:
        """What the leaf is, without its numbers, as JSON types."""
        return {
            "shape": list(self.matrix),
            "stack": list(self.leading),
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
            *inputs, outputs = matrix = tuple(values["shape"])
            leading = tuple(values.get("stack", ()))
            rows, bits, quantized = math.prod(inputs), values["bits"], values["activations"]
            if any(type(size) is not int or size < 1 for size in (*leading, *matrix)):
                raise ValueError(f"shape {list(matrix)}, stack {list(leading)}")
            if len(matrix) not in (2, 4) or (len(matrix) == 4 and leading):
                raise ValueError(f"shape {list(matrix)}, stack {list(leading)}")
            if bits not in BITS or type(bits) is not int:
                raise ValueError(f"{bits} bits")
            block, scales = _scales(values, rows, outputs)
            if block is not None and (bits != 8 or values["packed"] or len(matrix) != 2):
                raise ValueError(f"float8 values of {list(matrix)}, {bits} bits or packed")
            dims = {"G": scales[0], "I": rows, "O": outputs}

            def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
                return jax.ShapeDtypeStruct((*leading, *shape), dtype)

            parts: dict[str, Any] = dict.fromkeys(_PARTS)
            for name in values["parts"]:
                axes, dtype = _PARTS[name]
                parts[name] = array(tuple(dims[axis] for axis in axes), dtype)
            qvalue: Any = array((rows, outputs), FLOAT8 if block else jnp.int8)
            if values["packed"]:
                one = jax.ShapeDtypeStruct((rows, outputs), jnp.int8)
                planes = jax.eval_shape(partial(pack, bits=bits), one)
                qvalue = jax.tree.map(lambda plane: array(plane.shape, plane.dtype), planes)
            return cls(
                qvalue=qvalue,
                scale=array(scales, jnp.float32),
                **parts,
                matrix=matrix,
                bits=bits,
                activations=quantized and _activations(quantized),
                rotation=values["rotation"] and Rotation(**values["rotation"]),
                block=block,
            )
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"this describes no quantized leaf: {values!r} ({error!r})") from error

    def each(self, function: Callable[..., Any], *others: Any) -> Any:
        """`function(leaf, *others)` for every matrix of a stack, with results stacked.

        Args:
            function: of the leaf of one matrix, and of what belongs to it.
            others: trees of arrays with the leading axes of the stack.
        """
        for _ in self.leading:
            function = jax.vmap(function)
        return function(self, *others)

    def qvalues(self) -> Array:
        """int8[*E, I, O], or float8_e4m3fn."""
        return self.each(QTensor._qvalues)

    def dequantize(self) -> Array:
        """The matrices float32[*E, I, O] that the quantized values stand for.

        They multiply prepared inputs, see `prepare`. `restore` gives matrices for plain inputs.
        """
        return self.each(QTensor._dequantize)

    def restore(self) -> Array:
        """The array in float32, of unprepared inputs: what was quantized, with its rounding."""
        return self.each(QTensor._restore)

    def _qvalues(self) -> Array:
        return unpack(self.qvalue, self.bits, self.rows) if self.packed else self.qvalue

    def _dequantize(self) -> Array:
        zero = None if self.zero_point is None else self._spread(self.zero_point)
        return dequantize(self._qvalues(), self._spread(self.scale), zero)

    def _spread(self, part: Array) -> Array:
        """The value of its group or block for each element of the matrix, or of its rows."""
        rows = jnp.repeat(part, self.group_size, axis=0)[: self.rows]
        if self.block is None or self.block[1] == 1:
            return rows
        return jnp.repeat(rows, self.block[1], axis=1)[:, : self.matrix[-1]]

    def _restore(self) -> Array:
        w = self._dequantize()
        if self.rotation is not None:
            w = self.rotation.undo(w.T).T
        if self.smoothing_scale is not None:
            w = w * self.smoothing_scale[:, None]
        if self.perm is not None:
            w = w[jnp.argsort(self.perm)]
        return w.reshape(self.matrix)

    def permuted(self, x: Array) -> Array:
        """Inputs [..., I] in the order of the quantized values' rows."""
        return x if self.perm is None else jnp.take(x, self.perm, axis=-1, unique_indices=True)

    def prepare(self, x: Array) -> Array:
        """Inputs [..., I] as the quantized values expect them: ordered, smoothed, then rotated."""
        return prepare_inputs(self.permuted(x), self.smoothing_scale, self.rotation)

    def to_qwix(self) -> Any:
        """As a `qwix.QArray` [*E, I, O], whose zero points are int8 (ranges must contain zero).

        Raises:
            ValueError: if inputs are prepared or quantized, which a QArray does not know, or for
                the kernel of a convolution or float8 values.
        """
        if self.block is not None:
            raise ValueError("a qwix.QArray is made of integer values here, not of float8")
        if self.convolution:
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
    matrix, bits, activations, rotation, block = static
    described = (x and dataclasses.asdict(x) for x in (activations, rotation))
    return json.dumps([matrix, bits, *described, block]).encode()


def _static_from_json(text: bytes | bytearray) -> tuple[Any, ...]:
    matrix, bits, activations, rotation, block = json.loads(text)
    quantized, rotated = (
        activations and _activations(activations),
        rotation and Rotation(**rotation),
    )
    return tuple(matrix), bits, quantized, rotated, block and tuple(block)


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


# Axes and dtypes of what the leaf of one matrix may hold beside its quantized values and scales.
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
    """Turn the quantized leaves of a tree of parameters into arrays of a dtype."""
    return jax.tree.map(
        lambda leaf: leaf.restore().astype(dtype) if isinstance(leaf, QTensor) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, QTensor),
    )
