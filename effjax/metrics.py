"""Measures of how far one output is from another."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def relative_difference(
    reference: Float[Array, "..."], output: Float[Array, "..."]
) -> Float[Array, ""]:
    """Compute DiTFastAttn's search loss: mean(clip(|(a - b) / (max(a, b) + 1e-6)|, 0, 10)).

    The maximum is of the signed values, not of magnitudes; published thresholds rely on it.
    """
    a, b = reference.astype(jnp.float32), output.astype(jnp.float32)
    return jnp.mean(jnp.clip(jnp.abs((a - b) / (jnp.maximum(a, b) + 1e-6)), 0.0, 10.0))


def structural_dissimilarity(
    reference: Float[Array, "B H W C"], output: Float[Array, "B H W C"]
) -> Float[Array, ""]:
    """Compute 1 - SSIM with 7 x 7 windows. The data range is that of the reference."""
    a, b = reference.astype(jnp.float32), output.astype(jnp.float32)
    low, high = jnp.min(a), jnp.max(a)
    c1, c2 = (jnp.square(factor * (high - low)) + 1e-12 for factor in (0.01, 0.03))

    def mean(x: jax.Array) -> jax.Array:
        window, strides = (1, 7, 7, 1), (1, 1, 1, 1)
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, strides, "VALID") / 49

    if min(a.shape[1:3]) < 7:
        raise ValueError(f"SSIM needs images of at least 7 x 7, got {a.shape[1]} x {a.shape[2]}")
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return 1 - jnp.mean(luminance * (2 * covariance + c2) / (var_a + var_b + c2))


def psnr(
    reference: Float[Array, "..."], output: Float[Array, "..."], *, data_range: float = 2.0
) -> Float[Array, ""]:
    """Compute the peak signal-to-noise ratio in dB. `data_range` is 2 for images in [-1, 1]."""
    error = jnp.mean(jnp.square(reference.astype(jnp.float32) - output.astype(jnp.float32)))
    return 10 * jnp.log10(data_range**2 / error)
