"""CSKV: low-rank features of keys and values in place of keys and values.

Use it where memory matters more than time: at a mean density of 0.2 the cache takes a fifth, and
with 4-bit values a twentieth. Attention gets no cheaper, and keys are rebuilt from their features
at every token, tile by tile.

    c_k = x A_k,  k = rotary(c_k B_k)      R_k = int(k_density D) K features for all heads together
    c_v = x A_v,  v = c_v B_v              R_v = int(v_density D) K likewise

The tokens of the window that is being filled (see `effjax.caches.residual_buffer`) stay exact, and
a prompt attends to itself exactly. B_v is applied to the result of attention and not to every
token, since softmax(s) (C B) = (softmax(s) C) B. Keys must be rebuilt, since the rotation stands
between them and B_k.

A and B start as a singular value decomposition of the projection W, weighted by the mean magnitudes
of its inputs (ASVD): diag(s) W = U S V^T with s = mean|x|^alpha; then A = diag(1/s) U sqrt(S) and
B = sqrt(S) V^T. `fit` trains A and B, and nothing else, to reproduce what the projections give.
With `bits` it rounds the features in training too, with straight-through gradients.

Ranks, window and bits are static; scales are found at run time.

Cost: (R_k + R_v) bits / 8 bytes for each token and layer. Quantized values have besides two floats
for a channel and window (keys) and two for a token and head (values). Each sequence has one window
of floats. Projections with biases have one feature that is always 1.

Source: CSKV, arXiv 2409.10593, with the offsets of quantized values as floats (the released code
clips a group whose values have one sign). ASVD: arXiv 2312.05821.
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
