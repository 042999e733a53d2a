"""Inputs of quantized products: modulated, masked, rotated and coded, in one pass."""

from pallas_kernels.input_codes.operation import InputCodes, input_codes

__all__ = ["InputCodes", "input_codes"]
