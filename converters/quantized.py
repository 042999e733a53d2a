"""Quantized layers in checkpoints of other libraries: GPTQ, AWQ, compressed-tensors, torchao.

A linear layer `b` holds several tensors `b.<name>` in the place of `b.weight` [O, I]. They say

    W = (q - z) s     with one s and z for each output and each of G groups of inputs

                    quantized values q                  zero points z                  scales s [G,
                    O]
    gptq            qweight [I n/32, O]       qzeros [G, O n/32]             scales
    awq             qweight [I, O n/32]       qzeros [G, O n/32]             scales
                                                                             scales s [O, G]
    pack-quantized  weight_packed [O, I n/32] weight_zero_point [O n/32, G]  weight_scale
    int-quantized   weight int8[O, I]         weight_zero_point int8[O, G]   weight_scale
    float-quantized weight float8[O, I]                                      weight_scale
    fp8             weight float8[O, I]                                      weight_scale_inv
    torchao         _weight_qdata int8[O, I]  _weight_zero_point int8[O, G]  _weight_scale

Quantized values of n bits stand in int32 words, from the lowest bits on, along the axis that is
divided; those of 3 bits cross from word to word, so that an axis is one stream of bits
(`effjax.quant.disk`). In
words, quantized values and zero points are unsigned: 2^(n-1) is subtracted from both. Further:

    gptq  Version 1 stores z - 1. It was subtracted from whole words, borrows and all, which matters
          where z is 0; not so for 3 bits. Version 2 ("gptq_v2") stores z.
    gptq_p  Every 32 consecutive quantized values are n words: of their low bits, then of the bits
        above
          (`pallas_kernels.packing.plane_widths`). Zero points as in version 2.
    awq   Eight consecutive outputs stand in a word in the order 0, 2, 4, 6, 1, 3, 5, 7.
    pack-quantized  `weight_shape` is [O, I]. Older files have zero points as int8 [O, G].
    torchao  Of its tensor types those with plain int8 values, of 2 to 8 bits: Int8Tensor and
          IntxUnpackedToInt8Tensor. Symmetric layers have zero points too, all zero.
    float8  Numbers of float8_e4m3fn, W = q s with one s for each block of the matrix, [O / 128,
          I / 128] say, the last ones cut; or one for each output, or for all. The name
          `weight_scale_inv` is DeepSeek-V3's for a factor; GPTQModel's is a divisor.
    g_idx, weight_g_idx  The group of each input, where groups are not consecutive inputs (desc_act,
          or actorder=group). Quantized values stand in the order of inputs here, in that of groups
          in a leaf.

Sources: AutoGPTQ and GPTQModel (`nn_modules/qlinear`), AutoAWQ (`utils/packing_utils.py`),
compressed-tensors (`compressors/pack_quantized`, `naive_quantized`), torchao
(`prototype/safetensors`, `quantization/quantize_/workflows`), transformers
(`integrations/finegrained_fp8.py`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import ml_dtypes
import numpy as np

from converters.names import Piece
from effjax.quant import Activations, QTensor, Quantizer, quantize_matrix
from effjax.quant.disk import QValues, pack_bits, signed, unpack_bits
from effjax.storage import FLOATS, Shape, Spec, Tensor
from pallas_kernels.packing import plane_widths

INT8, INT32, INT64 = np.dtype(np.int8), np.dtype(np.int32), np.dtype(np.int64)
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)


class Format(NamedTuple):
    """Which tensors a format keeps of a layer.

    Attributes:
        quantized values, zeros, scale: their names; None for zero points that there are not.
        packed: along which axis words hold quantized values; None if they are int8 or float8.
        transposed: tensors are [O, ...], as torch's weights are; else [..., O].
        order: outputs within a word, by their places.
        planes: words hold bits of one plane each (`pallas_kernels.packing.plane_widths`), by
            blocks of 32 quantized values, and no stream.
        groups: name of the group of each input.
        shape: name of the tensor that holds [O, I].
    """

    qvalues: str
    zeros: str | None
    scale: str
    packed: Literal["inputs", "outputs"] | None
    transposed: bool
    order: tuple[int, ...] | None = None
    groups: str | None = None
    shape: str | None = None
    planes: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Of all tensors that a layer may hold."""
        held = (self.qvalues, self.zeros, self.scale, self.groups, self.shape)
        return tuple(name for name in held if name)


FORMATS = {
    "gptq": Format("qweight", "qzeros", "scales", "inputs", False, groups="g_idx"),
    "gptq_p": Format("qweight", "qzeros", "scales", "inputs", False, groups="g_idx", planes=True),
    "awq": Format("qweight", "qzeros", "scales", "outputs", False, (0, 2, 4, 6, 1, 3, 5, 7)),
    "pack-quantized": Format(
        *("weight_packed", "weight_zero_point", "weight_scale", "inputs", True),
        groups="weight_g_idx",
        shape="weight_shape",
    ),
    "int-quantized": Format(
        *("weight", "weight_zero_point", "weight_scale", None, True), groups="weight_g_idx"
    ),
    "float-quantized": Format("weight", None, "weight_scale", None, True),
    "fp8": Format("weight", None, "weight_scale_inv", None, True),
    "torchao": Format("_weight_qdata", "_weight_zero_point", "_weight_scale", None, True),
}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How one layer is quantized.

    Attributes:
        format: in `FORMATS`.
        bits: of a weight.
        group_size: inputs that share a scale; None for all.
        symmetric: whether all zero points are zero.
        activations: how inputs become quantized values; None leaves them floats.
        minus_one: whether zero points are stored minus one, as in version 1 of GPTQ.
        ordered: whether the group of each input must be there.
        block: (inputs, outputs) that share a scale, of float8 values, None for all of them; None
            for integer values.
        divides: whether quantized values are divided by scales.
    """

    format: str
    bits: int
    group_size: int | None
    symmetric: bool
    activations: Activations | None = None
    minus_one: bool = False
    ordered: bool = False
    block: tuple[int | None, int | None] | None = None
    divides: bool = False

    @property
    def layout(self) -> Format:
        return FORMATS[self.format]

    def words(self, count: int) -> int:
        """Words along an axis of this many quantized values."""
        return -(-count * self.bits // 32)

    def groups(self, inputs: int) -> int:
        return inputs // (self.group_size or inputs)

    def blocks(self, shape: Shape) -> tuple[int, int]:
        """(inputs, outputs) that share a scale of a matrix [I, O] of float8 values."""
        inputs, outputs = self.block or (None, None)
        return min(inputs or shape[0], shape[0]), min(outputs or shape[1], shape[1])

    def grid(self, shape: Shape) -> Shape:
        """How many scales there are along the inputs and the outputs of a matrix [I, O]."""
        if self.block is None:
            return self.groups(shape[0]), shape[1]
        rows, columns = self.blocks(shape)
        return -(-shape[0] // rows), -(-shape[1] // columns)

    def specs(self, shape: Shape) -> dict[str, tuple[tuple[Spec, ...], bool]]:
        """What each tensor of a layer [O, I] may be, first what is written, and if it must be."""
        outputs, inputs = shape
        layout, groups = self.layout, self.groups(shape[1])
        if self.block is not None:
            rows, columns = self.grid((inputs, outputs))
            shapes = {1: [(1,), (), (1, 1)]}.get(rows * columns, [(columns, rows)])
            shapes += [(columns,)] if rows == 1 < columns else []
            scales = tuple(Spec(each, dtype) for each in shapes for dtype in FLOATS)
            qvalues = Spec((outputs, inputs), FLOAT8)
            return {layout.qvalues: ((qvalues,), True), layout.scale: (scales, True)}

        def oriented(rows: int, columns: int) -> Shape:
            return (columns, rows) if layout.transposed else (rows, columns)

        whole = Spec(oriented(groups, outputs), INT8)
        if layout.packed is None:
            qvalues, zeros = [Spec(oriented(inputs, outputs), INT8)], [whole]
        else:
            rows, columns = inputs, self.words(outputs)
            if layout.packed == "inputs":
                rows, columns = self.words(inputs), outputs
            qvalues = [Spec(oriented(rows, columns), INT32)]
            zeros = [Spec(oriented(groups, self.words(outputs)), INT32)]
            zeros += [whole] if self.format == "pack-quantized" else []
        found = {
            layout.qvalues: (qvalues, True),
            str(layout.zeros): (zeros, not self.symmetric or self.layout.zeros == "qzeros"),
            layout.scale: ([Spec(oriented(groups, outputs), dtype) for dtype in FLOATS], True),
        }
        if layout.shape:
            found[layout.shape] = [Spec((2,), INT64), Spec((2,), INT32)], True
        if layout.groups:
            found[layout.groups] = [Spec((inputs,), INT32), Spec((inputs,), INT64)], self.ordered
        return {name: (tuple(specs), must) for name, (specs, must) in found.items()}

    # Reading: tensors by name to arrays [inputs or groups, O].

    def qvalues(
        self, held: Mapping[str, np.ndarray], outputs: int, inputs: np.ndarray
    ) -> np.ndarray:
        """Signed values int8[inputs, O], or float8, of the inputs that are named."""
        qvalues = self._oriented(held[self.layout.qvalues])
        if self.layout.packed is None:
            return qvalues[inputs]
        if self.layout.packed == "outputs":
            return self._signed(self._fields(qvalues[inputs])[:, :outputs])
        words = qvalues.view(np.uint32)
        if self.layout.planes:
            return self._signed(self._of_planes(words, inputs))
        word, low = np.divmod(inputs * self.bits, 32)
        fields = words[word] >> low.astype(np.uint32)[:, None]
        across = np.flatnonzero(low + self.bits > 32)
        above = words[word[across] + 1] << (32 - low[across]).astype(np.uint32)[:, None]
        fields[across] |= above
        return self._signed(fields.astype(np.uint8) & np.uint8(2**self.bits - 1))

    def zeros(self, held: Mapping[str, np.ndarray], outputs: int) -> np.ndarray:
        """Signed zero points int32[G, O]."""
        zeros = self._oriented(held[str(self.layout.zeros)])
        if zeros.dtype == INT8:
            return zeros.astype(np.int32)
        if self.layout.planes:
            fields = self._of_planes(zeros.T.view(np.uint32), np.arange(outputs)).T
            return self._signed(fields).astype(np.int32)
        ones = sum(1 << low for low in range(0, 32, self.bits))
        whole = 32 % self.bits == 0
        if self.minus_one and whole:
            zeros = (zeros.astype("<i4").view("<u4") + np.uint32(ones)).view("<i4")
        fields = self._fields(zeros)[:, :outputs]
        if self.minus_one and not whole:
            fields = fields + np.uint8(1) & np.uint8(2**self.bits - 1)
        return self._signed(fields).astype(np.int32)

    def scale(self, held: Mapping[str, np.ndarray], shape: Shape) -> np.ndarray:
        """float32[G, O] of a matrix [I, O], or one for each of its blocks."""
        scale = held[self.layout.scale]
        if self.block is not None:
            scale = scale.reshape(self.grid(shape)[::-1])
        scale = np.ascontiguousarray(self._oriented(scale), np.float32)
        return 1 / scale if self.divides else scale

    def _oriented(self, array: np.ndarray) -> np.ndarray:
        return array.T if self.layout.transposed else array

    def _signed(self, fields: np.ndarray) -> np.ndarray:
        return signed(fields ^ np.uint8(2 ** (self.bits - 1)), self.bits)

    def _of_planes(self, words: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Unsigned values uint8[places, columns] at places of words uint32[words, columns]."""
        block, place = np.divmod(places, 32)
        first, low = block * self.bits, 0
        fields = np.zeros((len(places), words.shape[1]), np.uint8)
        for width in plane_widths(self.bits):
            word, slot = np.divmod(place, 32 // width)
            plane = words[first + word] >> (width * slot).astype(np.uint32)[:, None]
            fields |= (plane & np.uint32(2**width - 1)).astype(np.uint8) << np.uint8(low)
            first, low = first + width, low + width
        return fields

    def _fields(self, words: np.ndarray) -> np.ndarray:
        """Unsigned values uint8[rows, quantized values] of words int32[rows, words]."""
        stream = np.ascontiguousarray(words, "<i4").view(np.uint8)
        fields = unpack_bits(stream, self.bits, words.shape[1] * 32 // self.bits)
        if self.layout.order is None:
            return fields
        places = np.argsort(self.layout.order)
        return fields.reshape(len(fields), -1, len(places))[..., places].reshape(fields.shape)

    # Writing, in the formats of compressed-tensors.

    def written(self, shape: Shape) -> dict[str, Spec]:
        """What a layer [O, I] is written as."""
        return {name: specs[0] for name, (specs, must) in self.specs(shape).items() if must}

    def assemble(
        self, name: str, pieces: Sequence[Piece], read: Callable[[str], QTensor]
    ) -> np.ndarray:
        """One tensor of a layer, from leaves that `read` gives by path, parts of its outputs."""
        leaves = [read(piece.target) for piece in pieces]
        if name == self.layout.shape:
            return np.array([sum(leaf.shape[1] for leaf in leaves), leaves[0].shape[0]], np.int64)
        if name == self.layout.scale:
            scale = np.concatenate([leaf.scale for leaf in leaves], axis=1).T
            return scale.reshape(1) if self.block == (None, None) else scale
        if name == self.layout.zeros:
            zeros = np.concatenate([leaf.zero_point for leaf in leaves], axis=1).astype(np.int8)
            return (zeros if self.layout.packed is None else self._words(zeros)).T
        qvalues = [QValues(leaf.qvalue, leaf.matrix_shape, leaf.bits).unpacked() for leaf in leaves]
        whole = np.concatenate(qvalues, axis=1).T
        return whole if self.layout.packed is None else self._words(whole)

    def _words(self, qvalues: np.ndarray) -> np.ndarray:
        """int32[rows, words] of signed values int8[rows, quantized values]."""
        fields = qvalues.view(np.uint8) ^ np.uint8(2 ** (self.bits - 1))
        stream = np.zeros((len(qvalues), 4 * self.words(qvalues.shape[1])), np.uint8)
        packed = pack_bits(fields, self.bits)
        stream[:, : packed.shape[1]] = packed
        return stream.view("<i4")


@functools.cache
def _leaf(shape: Shape, scheme: Scheme, ordered: bool) -> QTensor:
    if scheme.block is not None:
        described = {"shape": shape, "bits": 8, "packed": False, "block": scheme.blocks(shape)}
        inputs = scheme.activations and dataclasses.asdict(scheme.activations)
        rest = {"parts": [], "activations": inputs, "rotation": None}
        return QTensor.from_dict({**described, **rest})
    return jax.eval_shape(
        lambda w, order: quantize_matrix(
            w,
            Quantizer(scheme.bits, scheme.symmetric),
            group_size=scheme.group_size,
            activations=scheme.activations,
            perm=order,
        ),
        jax.ShapeDtypeStruct(shape, np.float32),
        jax.ShapeDtypeStruct(shape[:1], np.int32) if ordered else None,
    )


@dataclasses.dataclass(frozen=True)
class Layer:
    """A quantized layer of a checkpoint.

    Attributes:
        name: of the layer.
        scheme: how it is quantized.
        tensors: what the checkpoint holds of it, by their names in the format.
    """

    name: str
    scheme: Scheme
    tensors: Mapping[str, Tensor]

    @functools.cached_property
    def groups(self) -> np.ndarray | None:
        """The group of each input; None if they are consecutive."""
        held = self.tensors.get(self.scheme.layout.groups or "")
        groups = None if held is None else held.read()
        # compressed-tensors makes room for them with -1, and leaves it so where nothing is ordered.
        unset = self.scheme.layout.groups != "g_idx" and groups is not None and -1 in groups
        return None if unset else groups

    @functools.cached_property
    def order(self) -> np.ndarray | None:
        """Inputs int32[I], group after group; None if they stand so already."""
        if self.groups is None:
            return None
        order = np.argsort(self.groups, kind="stable").astype(np.int32)
        return None if (order == np.arange(len(order))).all() else order

    def leaf(self, shape: Shape) -> QTensor:
        """The shapes of the leaf for a matrix [I, O]."""
        return _leaf(shape, self.scheme, self.order is not None)

    def problems(self, shape: Shape) -> list[tuple[str, str]]:
        """What keeps the tensors from being a layer [O, I]: (name, fault); small ones are read."""
        scheme, layout = self.scheme, self.scheme.layout
        if shape[1] % (scheme.group_size or 1):
            return [(self.name, f"groups of {scheme.group_size} do not divide {shape[1]} inputs")]
        if layout.planes and any(size % 32 for size in shape):
            return [
                (self.name, f"planes of 32 quantized values do not divide a layer {list(shape)}")
            ]
        problems = []
        for name, (specs, must) in scheme.specs(shape).items():
            if name not in self.tensors:
                if must:
                    problems.append((f"{self.name}.{name}", f"missing, must be {_texts(specs)}"))
                continue
            given = Spec(*self.tensors[name][:2])
            if given not in specs:
                fault = f"misshapen, is {_texts([given])}, must be {_texts(specs)}"
                problems.append((f"{self.name}.{name}", fault))
        if problems:
            return problems
        small = {name: self.tensors[name].read() for name in self.tensors if name != layout.qvalues}
        if scheme.symmetric and layout.zeros in small and scheme.zeros(small, shape[0]).any():
            fault = "holds zero points that are not in the middle, but the layer is symmetric"
            said = {"gptq": "sym, or checkpoint_format (gptq or gptq_v2),", "awq": "zero_point"}
            if scheme.format in said:
                fault += f"; is {said[scheme.format]} wrong?"
            problems.append((f"{self.name}.{layout.zeros}", fault))
        groups = scheme.groups(shape[1])
        wanted = np.repeat(np.arange(groups), shape[1] // groups)
        if self.groups is not None and (np.sort(self.groups) != wanted).any():
            fault = f"must name each of {groups} groups {shape[1] // groups} times"
            problems.append((f"{self.name}.{layout.groups}", fault))
        if layout.shape in small and tuple(small[layout.shape]) != shape:
            fault = f"says {small[layout.shape].tolist()}, must be {list(shape)}"
            problems.append((f"{self.name}.{layout.shape}", fault))
        return problems

    def read(self, shape: Shape, part: int = 0, parts: int = 1) -> QTensor:
        """The leaf of a matrix [I, O], on the host, whose outputs are one part of the layer's."""
        scheme, leaf, order = self.scheme, self.leaf(shape), self.order
        outputs = slice(part * shape[1], (part + 1) * shape[1])
        held = {name: tensor.read() for name, tensor in self.tensors.items()}
        inputs = np.arange(shape[0]) if order is None else order

        def rows(begin: int, end: int) -> np.ndarray:
            qvalues = scheme.qvalues(held, parts * shape[1], inputs[begin:end])[:, outputs]
            half = 2 ** (scheme.bits - 1)
            if scheme.bits < 8 and not (-half <= qvalues.min() and qvalues.max() < half):
                raise ValueError(
                    f"{self.name}.{scheme.layout.qvalues} holds {qvalues.min()} ... "
                    f"{qvalues.max()}, "
                    f"but {scheme.bits}-bit values are {-half} ... {half - 1}; is "
                    "the number "
                    f"of bits in its configuration wrong?"
                )
            return qvalues

        zeros = None
        if not scheme.symmetric:
            zeros = scheme.zeros(held, parts * shape[1])[:, outputs].copy()
        scale, column_sums = self._scale(held, shape, part, parts), None
        if leaf.column_sums is not None:
            qvalues = rows(0, shape[0]).reshape(len(scale), -1, shape[1])
            sums = qvalues.sum(axis=1, dtype=np.int64)
            if zeros is not None:
                sums = sums - qvalues.shape[1] * zeros
            column_sums = np.sum(sums * scale, axis=0, dtype=np.float32)
        return dataclasses.replace(
            leaf,
            qvalue=QValues(leaf.qvalue, leaf.matrix_shape, leaf.bits).fill(rows),
            scale=scale,
            zero_point=zeros,
            perm=order,
            column_sums=column_sums,
        )

    def _scale(
        self, held: Mapping[str, np.ndarray], shape: Shape, part: int, parts: int
    ) -> np.ndarray:
        """Of a part of the layer's outputs."""
        inputs, outputs = shape
        scale = self.scheme.scale(held, (inputs, parts * outputs))
        _, every = self.scheme.block or (None, 1)
        if every is None or parts == 1:
            return scale.copy()
        if outputs % every:
            raise ValueError(
                f"{self.name}.{self.scheme.layout.scale} is of blocks of {every} outputs, which do "
                f"not divide the {outputs} of each of {parts} layers that are one there"
            )
        return scale[:, part * outputs // every : (part + 1) * outputs // every].copy()


def _texts(specs: Iterable[Spec]) -> str:
    return " or ".join(f"{spec.dtype}{list(spec.shape)}" for spec in specs)
