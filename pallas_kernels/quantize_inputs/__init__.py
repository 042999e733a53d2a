"""Inputs of quantized products: modulated, masked, rotated and quantized, in one pass."""

from pallas_kernels.quantize_inputs.operation import InputCodes, quantize_inputs

__all__ = ["InputCodes", "quantize_inputs"]
