"""DiTFastAttn: window attention, and attention shared over steps and guidance halves.

Use it to save most self-attention FLOPs of a trained diffusion transformer without training; long
sequences gain most. For every layer and network call a plan names one of five strategies, which a
greedy search finds:

=========  ==========================================================================
FULL       dense attention
AST        the module's last output again: no projections, no attention (sharing over steps)
WARS_ASC   WARS on the conditional half only, the result used for both halves
WARS       window attention plus the residual (dense - window) of the last FULL call
FULL_ASC   FULL on the conditional half only, the result used for both halves
=========  ==========================================================================

The plan is static, and with it which caches exist. The step chooses the strategy: a traced step is
a branch for each layer, a static step is none. A layer that uses AST keeps the output of its module
[B, N, C]; a layer that uses a window keeps the residual [B, N, H, D].

Cost of one layer and call, in multiply-adds of QK^T and PV, with A = 2 B N^2 C and
b = ((2W + 1) N - W (W + 1)) / N^2:

    FULL A,   FULL that refreshes the residual A (1 + b),   WARS A b,   AST 0,   half of it with ASC

See `attention_macs`. On TPUs and GPUs a FULL that refreshes costs about A, since one kernel makes
both results (`pallas_kernels.residual_attention`). XLA makes the logits of short sequences once,
for A (1 + b / 2).

Source: DiTFastAttn, arXiv 2406.08552. As in the released code the window reaches W = N / 8 tokens
to *each* side. Unlike there, WARS_ASC reads the conditional half of the residual in either order of
the batch.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from effjax import testing
from effjax.calibration import Trajectory
from effjax.fields import Checked, Count, NotNegative
from effjax.forward import Forward, Params
from effjax.layers.attention import attentions
from effjax.methods.attention.dit_fast_attn.patch import DiTFastAttn, FastAttention, transform
from effjax.methods.attention.dit_fast_attn.plan import (
    KINDS,
    NAME,
    DiTFastAttnPlan,
    Strategy,
    attention_macs,
    uniform,
)
from effjax.methods.attention.dit_fast_attn.search import CANDIDATES, METRICS, search
from effjax.transform import Method, Shorthand

__all__ = [
    "CANDIDATES",
    "METHOD",
    "METRICS",
    "DiTFastAttn",
    "DiTFastAttnPlan",
    "FastAttention",
    "Strategy",
    "attention_macs",
    "search",
    "transform",
    "uniform",
]


@dataclasses.dataclass(frozen=True)
class Goals(Checked):
    """What a search aims at.

    Attributes:
        threshold: loss that a layer may add; larger saves more, 0 keeps everything dense.
        window: tokens that windows reach to each side; an eighth of the sequence if none.
        metric: the loss; dissimilarity is 1 - SSIM, and wants thresholds of 0.001 ... 0.015.
    """

    threshold: NotNegative = 0.1
    window: Count | None = None
    metric: Literal["relative", "dissimilarity"] = "relative"


def _search(goals: Goals, forward: Forward, params: Params, data: Trajectory) -> DiTFastAttnPlan:
    return search(
        *(forward, params, data.sampler, data.cond),
        key=data.key,
        uncond=data.uncond,
        **dataclasses.asdict(goals),
    )


@dataclasses.dataclass(frozen=True)
class Uniform(Shorthand):
    """Every layer begins with FULL and then repeats a pattern of strategies.

    Attributes:
        pattern: of the calls after the first.
        calls: network calls of a trajectory.
        window: tokens that windows reach to each side; an eighth of the sequence if none.
    """

    pattern: tuple[Literal["FULL", "AST", "WARS_ASC", "WARS", "FULL_ASC"], ...]
    calls: Count
    window: Count | None = None

    def plan(self, forward: Forward, params: Params) -> DiTFastAttnPlan:
        return uniform(
            tuple(Strategy[name] for name in self.pattern),
            layers=len(attentions(forward.module(params), *KINDS)),
            calls=self.calls,
            tokens=forward.config.tokens,
            window=self.window,
        )


def _identity(subject: testing.Subject) -> DiTFastAttnPlan:
    return _for(subject, (Strategy.FULL,))


def _ladder(subject: testing.Subject) -> tuple[DiTFastAttnPlan, ...]:
    patterns = (
        (Strategy.WARS,),
        (Strategy.FULL_ASC,),
        (Strategy.WARS_ASC,),
        (Strategy.WARS_ASC, Strategy.AST),
    )
    return tuple(_for(subject, pattern) for pattern in patterns)


def _for(subject: testing.Subject, pattern: tuple[Strategy, ...]) -> DiTFastAttnPlan:
    layers = len(attentions(subject.forward.module(subject.params), *KINDS))
    calls, tokens = subject.sampler.calls, subject.forward.config.tokens
    return uniform(pattern, layers=layers, calls=calls, tokens=tokens)


METHOD = Method(
    name=NAME,
    paper="DiTFastAttn: Attention Compression for Diffusion Transformer Models, arXiv 2406.08552",
    seams=("patches",),
    domain="images",
    plan=DiTFastAttnPlan,
    transform=transform,
    identity=_identity,
    ladder=_ladder,
    tiny=testing.tiny_dit,
    systems=("DiTFastAttn",),
    shorthands=(Uniform,),
    data=Trajectory,
    goals=Goals,
    search=_search,
)
