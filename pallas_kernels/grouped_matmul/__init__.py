"""Products of sorted rows, each with the matrix of its group: the experts of a layer."""

from pallas_kernels.grouped_matmul.operation import by_groups, grouped_matmul

__all__ = ["by_groups", "grouped_matmul"]
