"""Kernels for generative inference: attention and matrix products. They depend on JAX alone."""

from pallas_kernels.implementation import use_implementation

__all__ = ["use_implementation"]
