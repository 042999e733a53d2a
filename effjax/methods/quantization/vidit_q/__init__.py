"""ViDiT-Q: quantized diffusion transformers, with channels balanced before they are quantized.

Use it for diffusion transformers with 4 or 8-bit weights and 8-bit inputs where rounding to nearest
fails: some channels of the inputs are much larger than others, and one scale for a token must fit
all of them. Smoothing scales need a calibration along the sampler's trajectory.

    x -> x m -> x m R -> quantized values of each token
    W -> W / m -> R^T W / m -> quantized values, once

    m_c = max|W_c|^alpha / max|x_c|^(1 - alpha)
    R = random signs, then a Hadamard matrix

The smoothing scale m removes the differences between channels that are the same at every step. The
rotation R spreads those that change from step to step over all channels. Weights are asymmetric,
with one scale for each output channel. Inputs are symmetric, with one scale for each token, found
at run time. Nothing is shared over the batch. A plan may change at network calls
("timestep-aware"): each segment of the calls has its own smoothing scales, bits and weights. Of a
stack of matrices (experts), every matrix has its own smoothing scale.

The plan is static: bits, and which layers are smoothed and rotated. Scales of tokens are found at
run time.

Cost: as many products as before. Weights take bits / 32 of float32's bytes for each segment, and
scales and zero points. A rotation of width C = a b adds 2 C (a + b) FLOPs for a token.

alpha is that of the second generation of the code (0.99 for PixArt, 0.5665 for Open-Sora 1.2). That
of the first generation, and that of SmoothQuant, is 1 - alpha here; alpha = 0.5 without rotation is
SmoothQuant.

Source: ViDiT-Q, arXiv 2406.02540, sections 3.2 to 3.4.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import jax

from effjax import testing
from effjax.calibration import Trajectory
from effjax.fields import Checked, Range, Share
from effjax.forward import Forward, Params
from effjax.methods.quantization.vidit_q.alpha import best_alpha
from effjax.methods.quantization.vidit_q.bits import Sensitivities, search, sensitivities
from effjax.methods.quantization.vidit_q.calibration import Calibration, calibrate
from effjax.methods.quantization.vidit_q.leaves import Segments, balance, transform
from effjax.methods.quantization.vidit_q.plan import (
    NAME,
    Rule,
    ViDiTQPlan,
    by_time,
    pixart_sigma,
    smooth_quant,
    uniform,
)
from effjax.quant import FLOAT
from effjax.quant.notation import read_bits
from effjax.transform import Method, Shorthand

__all__ = [
    "FLOAT",
    "METHOD",
    "NAME",
    "Calibration",
    "Rule",
    "Segments",
    "Sensitivities",
    "ViDiTQPlan",
    "balance",
    "best_alpha",
    "by_time",
    "calibrate",
    "pixart_sigma",
    "search",
    "sensitivities",
    "smooth_quant",
    "transform",
    "uniform",
]


def _calibrate(
    plan: ViDiTQPlan, forward: Forward, params: Params, data: Trajectory
) -> dict[str, jax.Array]:
    pair = forward, params
    return calibrate(plan, *pair, data.sampler, data.cond, key=data.key, uncond=data.uncond)


@dataclasses.dataclass(frozen=True)
class Goals(Checked):
    """What a search aims at.

    Attributes:
        average_bits: of a weight, up to 0.02.
    """

    average_bits: Annotated[float, Range(2, 16)] = 6.0


def _search(goals: Goals, forward: Forward, params: Params, data: Trajectory) -> ViDiTQPlan:
    options = {"key": data.key, "uncond": data.uncond, "average_bits": goals.average_bits}
    return search(forward, params, data.sampler, data.cond, **options)


@dataclasses.dataclass(frozen=True)
class Uniform(Shorthand):
    """The same bits, smoothing and rotation for attention and feed-forward layers.

    Attributes:
        bits: of weights and inputs, such as w8a8, w4a8 or w4.
        alpha: exponent of the weights in the smoothing scale; none for no smoothing.
        rotate: whether inputs are rotated.
        fold: put smoothing scales into the layers before, where they cost nothing.
    """

    bits: str = "w8a8"
    alpha: Share | None = 0.99
    rotate: bool = True
    fold: bool = False

    def plan(self, forward: Forward, params: Params) -> ViDiTQPlan:
        options: dict[str, Any] = {"alpha": self.alpha, "rotate": self.rotate, "fold": self.fold}
        return uniform(*read_bits(self.bits), **options)


def _ladder(subject: testing.Subject) -> tuple[ViDiTQPlan, ...]:
    return tuple(uniform(bits, alpha=None) for bits in (8, 6, 4, 3))


METHOD = Method(
    name=NAME,
    paper="ViDiT-Q: Efficient and Accurate Quantization of Diffusion Transformers, "
    "arXiv 2406.02540",
    seams=("leaves",),
    domain="images",
    plan=ViDiTQPlan,
    transform=transform,
    identity=lambda subject: uniform(FLOAT, FLOAT, alpha=None, rotate=False),
    ladder=_ladder,
    tiny=testing.tiny_dit,
    systems=("ViDiT-Q", "SmoothQuant"),
    shorthands=(Uniform,),
    data=Trajectory,
    calibrate=_calibrate,
    goals=Goals,
    search=_search,
)
