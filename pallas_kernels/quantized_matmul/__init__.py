"""Products with quantized matrices."""

from pallas_kernels.quantized_matmul.operation import (
    GROUP_SIZES,
    dynamic_int8_matmul,
    int8_matmul,
    packed_matmul,
    quantize_per_token,
)

__all__ = [
    "GROUP_SIZES",
    "dynamic_int8_matmul",
    "int8_matmul",
    "packed_matmul",
    "quantize_per_token",
]
