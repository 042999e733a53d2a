"""Branches of guidance that are estimated from the branch "cond" by their last difference from it.

    branch = cond + low g_low + high g_high,   low + high = branch - cond   of the last full call

where low has the frequencies of an image up to a fifth of its shorter side, as the disc of the
shifted Fourier transform, and high the others (CFG-Cache, arXiv 2410.19355, equations 9 to 11).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from effjax.context import PyTree, State, Step, is_static, when
from effjax.guidance import Guidance, on_condition
from effjax.targets import Wrapper


class EstimatedBranches(Wrapper):
    """A model of which some calls run the branch "cond" alone.

    Args:
        branches: whether each call runs all branches.
        gains: of low and high frequencies in each call.
        step: index of the network call.
        guidance: how the branches stand in the batch.
    """

    inner: Any

    def __init__(
        self,
        inner: nnx.Module,
        branches: tuple[bool, ...],
        gains: tuple[tuple[float, float], ...],
        step: Step,
        guidance: Guidance,
    ):
        super().__init__(inner)
        self.branches, self.gains = branches, gains
        self.step = step if is_static(step) else nnx.data(step)
        self.guidance = guidance
        self.low, self.high = State(), State()

    def __call__(self, *inputs: PyTree) -> Array:
        step = self.step
        estimates = not self.branches[int(step)] if is_static(step) else None
        if estimates is None:
            estimates = jnp.asarray([not full for full in self.branches])[step]
        return when(estimates, _estimate, _run, self, *inputs)


def _run(model: EstimatedBranches, *inputs: PyTree) -> Array:
    """Run all branches, and remember how they differ from "cond"."""
    out = model.inner(*inputs)
    parts = model.guidance.split(out.astype(jnp.float32))
    cond = parts.pop("cond")
    differences = jnp.stack([parts[name] - cond for name in parts])
    low = low_frequencies(differences)
    model.low.write(low)
    model.high.write(differences - low)
    return out


def _estimate(model: EstimatedBranches, *inputs: PyTree) -> Array:
    """Run "cond" alone."""
    step, guidance = model.step, model.guidance
    batch = inputs[0].shape[0]
    own = guidance.branch("cond", inputs)
    with on_condition(guidance, batch):
        cond = model.inner(*own)
    others = [name for name in guidance.branches if name != "cond"]
    held = [each.read((len(others), *cond.shape), jnp.float32) for each in (model.low, model.high)]
    gains = model.gains[int(step)] if is_static(step) else jnp.asarray(model.gains)[step]
    found = cond.astype(jnp.float32) + gains[0] * held[0] + gains[1] * held[1]
    parts = {name: found[place].astype(cond.dtype) for place, name in enumerate(others)}
    return guidance.join({**parts, "cond": cond})


def low_frequencies(x: Float[Array, "... H W C"]) -> Float[Array, "... H W C"]:
    """The part of images, or of the frames of videos, whose frequencies are low."""
    kept = jnp.asarray(_disc(*x.shape[-3:-1]), jnp.complex64)[..., None]
    return jnp.fft.ifft2(jnp.fft.fft2(x, axes=(-3, -2)) * kept, axes=(-3, -2)).real


def _disc(height: int, width: int) -> np.ndarray:
    """Which frequencies are low, in the order of the Fourier transform."""
    rows, columns = np.indices((height, width))
    radius = min(height, width) // 5
    near = (rows - height // 2) ** 2 + (columns - width // 2) ** 2 <= radius**2
    return np.fft.ifftshift(near)
