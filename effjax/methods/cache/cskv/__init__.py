"""CSKV: low-rank features of keys and values in place of keys and values.

Buys: at a mean density of 0.2 a fifth of the cache, with 4-bit values a twentieth; attention
itself gets no cheaper, and keys are rebuilt tile by tile at every step.

    c_k = x A_k,  k = rotary(c_k B_k)      R_k = int(k_density D) K features for all heads together
    c_v = x A_v,  v = c_v B_v              R_v likewise

Tokens of the window that is being filled (see `residual_buffer`) stay exact, and so does all of a
prompt while it reads itself. B_v is applied to what attention gives, not to every token:
softmax(s) (C B) = (softmax(s) C) B. Between keys and B_k stands the rotation, so they are rebuilt.

A and B begin as a singular value decomposition of the projection, weighted by the mean magnitudes
of its inputs (ASVD): diag(s) W = U S V^T, s = mean|x|^alpha; A = diag(1/s) U sqrt(S),
B = sqrt(S) V^T. `fit` then trains them, and nothing else, to rebuild what the layers' projections
make of their inputs; with `bits` it rounds in the middle, with gradients straight through.

Static: ranks, window, bits. Dynamic: scales. Cost: for each token and layer (R_k + R_v) bits / 8
bytes, with quantized values two floats a channel and window (keys) and a token and head (values);
one window of floats. Projections with biases have one feature that is always 1.

Source: CSKV, arXiv 2409.10593, with the offsets of quantized values as floats (the released code
clips a group whose values share a sign). ASVD: arXiv 2312.05821.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from effjax import testing
from effjax.calibration import Sequences
from effjax.fields import Checked, Count, Positive
from effjax.forward import Forward, Params
from effjax.methods.cache.cskv.caches import CSKVCache, transform
from effjax.methods.cache.cskv.decomposition import factors, magnitudes
from effjax.methods.cache.cskv.plan import NAME, CSKVPlan, Factors
from effjax.methods.cache.cskv.training import fit, reconstruction_loss
from effjax.transform import Method

__all__ = [
    "CSKVCache",
    "CSKVPlan",
    "Factors",
    "Fitting",
    "factors",
    "fit",
    "magnitudes",
    "reconstruction_loss",
    "transform",
]


def _calibrate(plan: CSKVPlan, forward: Forward, params: Params, data: Sequences) -> Factors:
    seen = magnitudes(forward, params, [data.calibration()])
    return factors(plan, forward, params, seen)


@dataclasses.dataclass(frozen=True)
class Fitting(Checked):
    """Training of the factors.

    Attributes:
        steps: of AdamW.
        learning_rate: falls linearly to 0.
        batch: sequences of a step.
    """

    steps: Count = 400
    learning_rate: Positive = 5e-5
    batch: Count = 4


def _fit(
    plan: CSKVPlan,
    fitting: Fitting,
    forward: Forward,
    params: Params,
    data: Sequences,
    *,
    checkpoints: Path | None = None,
) -> Factors:
    start = _calibrate(plan, forward, params, data)
    options = {"steps": fitting.steps, "learning_rate": fitting.learning_rate}
    batches = data.batches(fitting.batch)
    return fit(plan, forward, params, start, batches, checkpoints=checkpoints, **options)[0]


def _identity(subject: testing.Subject) -> CSKVPlan:
    return CSKVPlan(1.0, 1.0, window=1 << 20)  # no window is ever full


def _ladder(subject: testing.Subject) -> tuple[CSKVPlan, ...]:
    return (
        CSKVPlan(0.5, 0.5, window=4),
        CSKVPlan(0.25, 0.25, window=4),
        CSKVPlan(0.25, 0.25, window=4, bits=4),
    )


METHOD = Method(
    name=NAME,
    paper="CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios, "
    "arXiv 2409.10593",
    seams=("patches",),
    domain="language models",
    plan=CSKVPlan,
    transform=transform,
    identity=_identity,
    ladder=_ladder,
    tiny=testing.tiny_llama,
    systems=("CSKV",),
    data=Sequences,
    calibrate=_calibrate,
    fitting=Fitting,
    fit=_fit,
)
