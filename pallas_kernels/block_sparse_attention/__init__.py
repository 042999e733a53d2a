"""Attention over lists of key blocks."""

from pallas_kernels.block_sparse_attention.operation import block_sparse_attention

__all__ = ["block_sparse_attention"]
