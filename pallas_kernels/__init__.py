"""Attention and matrix-product kernels for generative inference; depends on JAX alone."""
