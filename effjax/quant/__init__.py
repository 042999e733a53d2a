"""Quantized weights and activations: the leaf, its product, quantizers, rotations."""

from effjax.quant.convolution import qconv
from effjax.quant.hadamard import Rotation, hadamard
from effjax.quant.product import qdot
from effjax.quant.quantize import quantize_matrix, quantize_stack
from effjax.quant.quantizer import FLOAT, Quantizer, dequantize, fake_quantize
from effjax.quant.tensor import Activations, QTensor, restore

__all__ = [
    "FLOAT",
    "Activations",
    "QTensor",
    "Quantizer",
    "Rotation",
    "dequantize",
    "fake_quantize",
    "hadamard",
    "qconv",
    "qdot",
    "quantize_matrix",
    "quantize_stack",
    "restore",
]
