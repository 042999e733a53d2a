"""Attention and matrix-product kernels for generative inference; depends on JAX alone."""

from pallas_kernels.implementation import use_implementation

__all__ = ["use_implementation"]
