"""DiTFastAttnV2: every head of a joint transformer gets its own window, or gives its last output.

Use it to save most attention FLOPs of a trained joint transformer (SD3, FLUX) without training, at
images of many tokens; it runs on DiT and PixArt too. For every head, layer and network call a plan
names one of three modes, which a calibration run of one trajectory finds:

=======  ===========  ========================================================================
mode     half width
=======  ===========  ========================================================================
dense    -1           dense attention
arrow    w > 0        image tokens see the image tokens up to w places away in the raster, and
                      all text; text sees everything
cached   0            the head's output of the last call again, before the output layers
=======  ===========  ========================================================================

A layer whose heads are all cached skips its projections of queries, keys and values; output layers
always run. The first call is dense. The plan is data of the compiled program: one program serves
all calls, and branches where heads differ. The state of a layer with cached heads is [B, S, H, D],
what its heads gave last, each branch of guidance in its own rows.

Cost of one head, in multiply-adds of QK^T and PV, with Nv image tokens, Nt of text, S = Nv + Nt:

    dense 2 B D S^2,   arrow 2 B D (S^2 - (Nv - w - 1) (Nv - w)),   cached 0

See `attention_macs`. `tile` makes windows whole tiles, a superset, as the fused kernel of the
released code computes them; more tokens are visible, and results differ from exact windows.

The search measures in each head the error I = mean (o - y)^2 / mean (y - mean y)^2 of a candidate's
output o against the dense output y, and solves for every layer and call

    maximize sum x saving    so that    sum x I <= delta,   I < c_head / heads * delta

with saving 1 for cached and (Nv - w)^2 / S^2 for a window. Candidates `arrow_f` have
w = Nv / (2 f). Videos have `reorder_arrow_f` too, windows over tokens in the order of their places,
in which the frames of a place stand side by side.

Source: DiTFastAttnV2, arXiv 2503.22796. Where paper and released code differ this follows the code
in the error (the paper subtracts the mean in the numerator too), and the paper in the saving: the
released script for FLUX counts every candidate the same, which `uniform_saving` does. Cached heads
are read from the last output; the released kernel leaves their memory as it was. Shared guidance
halves and cached feed-forward layers, which the paper leaves out of its final method, are not here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from effjax import testing
from effjax.calibration import Trajectory
from effjax.context import Layout
from effjax.fields import LARGEST, Checked, Count, NotNegative, Positive
from effjax.forward import Forward, Params
from effjax.layers.attention import attentions
from effjax.methods.attention.dit_fast_attn_v2.patch import (
    DiTFastAttnV2,
    HeadWiseAttention,
    heads_of,
    image_layers,
    transform,
)
from effjax.methods.attention.dit_fast_attn_v2.plan import (
    CANDIDATES,
    KINDS,
    NAME,
    DiTFastAttnV2Plan,
    attention_macs,
    half_width_of,
    saving,
    uniform,
)
from effjax.methods.attention.dit_fast_attn_v2.search import choose, relative_errors, search
from effjax.transform import Method, Shorthand

__all__ = [
    "CANDIDATES",
    "METHOD",
    "DiTFastAttnV2",
    "DiTFastAttnV2Plan",
    "HeadWiseAttention",
    "attention_macs",
    "choose",
    "half_width_of",
    "relative_errors",
    "saving",
    "search",
    "transform",
    "uniform",
]


@dataclasses.dataclass(frozen=True)
class Goals(Checked):
    """What a search aims at.

    Attributes:
        delta: what the errors of a layer's heads may sum to in a call; larger saves more, 0 keeps
            everything dense. The paper takes 0.2 ... 1.0.
        c_head: a head takes only candidates with an error below c_head / heads * delta; none for no
            such limit.
        candidates: cache, windows such as arrow_8 (of an eighth of the image), and for videos
            reorder_arrow_8.
        uniform_saving: count all candidates the same.
        tile: (queries, keys) of tiles that windows see whole or not at all; none for exact windows.
    """

    delta: NotNegative = 0.2
    c_head: Positive | None = 1.5
    candidates: tuple[str, ...] = CANDIDATES
    uniform_saving: bool = False
    tile: tuple[Count, Count] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.candidates:
            half_width_of(name, LARGEST)


def _search(goals: Goals, forward: Forward, params: Params, data: Trajectory) -> DiTFastAttnV2Plan:
    return search(
        *(forward, params, data.sampler, data.cond),
        key=data.key,
        uncond=data.uncond,
        **dataclasses.asdict(goals),
    )


@dataclasses.dataclass(frozen=True)
class Uniform(Shorthand):
    """All heads begin dense and then repeat a pattern.

    Attributes:
        pattern: of the calls after the first: dense, cache, or windows such as arrow_8.
        calls: network calls of a trajectory.
        text: text tokens; those of the model's usual prompts if none.
    """

    pattern: tuple[str, ...]
    calls: Count
    text: int | None = None

    def plan(self, forward: Forward, params: Params) -> DiTFastAttnV2Plan:
        inputs, found = forward.module(params).example_inputs(), []
        if inputs is not None:
            jax.eval_shape(lambda *x: found.append(forward.layout(params, *x)), *inputs)
        if not found or found[0] is None:
            raise ValueError(f"{forward.model.__name__} does not say how many tokens it has")
        layout = found[0]
        if self.text is not None:
            layout = dataclasses.replace(layout, text=self.text)
        return _uniform(self.pattern, self.calls, layout, forward, params)


def _uniform(
    pattern: tuple[str, ...], calls: int, layout: Layout, forward: Forward, params: Params
) -> DiTFastAttnV2Plan:
    """All heads of a model repeat a pattern."""
    module = forward.module(params)
    targets = attentions(module, *KINDS)
    if not targets:
        raise ValueError(f"{forward.model.__name__} has no attention layers to plan for")
    return uniform(
        pattern,
        calls=calls,
        layers=len(targets),
        heads=heads_of(targets[0].module),
        image_tokens=layout.image_tokens,
        text=layout.text,
        text_first=bool(layout.text and layout.text_first),
        image_layers=image_layers(module) if layout.text else (),
    )


def _for(subject: testing.Subject, *pattern: str) -> DiTFastAttnV2Plan:
    forward, params, sampler = subject.forward, subject.params, subject.sampler
    x = jnp.zeros((2, *forward.config.sample_shape))
    inputs = sampler.inputs(x, subject.cond, subject.uncond, 0)  # pyright: ignore
    layout = forward.layout(params, *inputs)
    assert layout is not None
    return _uniform(pattern, sampler.calls, layout, forward, params)


def _mixed(subject: testing.Subject) -> DiTFastAttnV2Plan:
    """One head has a window while the next is cached, or the other way round; then all are."""
    plan = _for(subject, "cache")
    (width, _), calls = half_width_of("arrow_8", plan.image_tokens), range(1, plan.calls)
    heads = [tuple(width if (head + t) % 2 else 0 for head in range(plan.heads)) for t in calls]
    rows = [(row,) * plan.layers for row in heads[:-1]]
    return dataclasses.replace(plan, half_width=(plan.half_width[0], *rows, plan.half_width[-1]))


def _tiny(**options: Any) -> testing.Subject:
    return testing.tiny_flux(**{"steps": 3, "num_single_layers": 1} | options)


METHOD = Method(
    name=NAME,
    paper="DiTFastAttnV2: Head-wise Attention Compression for Multi-Modality Diffusion "
    "Transformers, arXiv 2503.22796",
    seams=("patches",),
    domain="images",
    plan=DiTFastAttnV2Plan,
    transform=transform,
    identity=lambda subject: _for(subject, "dense"),
    ladder=lambda subject: (
        _for(subject, "arrow_8"),
        _for(subject, "arrow_8", "cache"),
        _mixed(subject),
    ),
    tiny=_tiny,
    systems=("DiTFastAttnV2",),
    shorthands=(Uniform,),
    data=Trajectory,
    goals=Goals,
    search=_search,
)
