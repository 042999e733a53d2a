"""Streamlined Inference: blocks run on a part of the samples or tokens at a time, to hold less.

Two kinds of parts (arXiv 2411.01171, its feature slicer and operator grouping):

- `samples`: a whole stack of blocks runs on some samples, with all their branches of guidance,
  before the next ones: of what is inside of blocks only one part is held.
- `tokens`: feed-forward layers run on some tokens at a time: their hidden channels, four times the
  width of a block, are held for one part.

Results are those of the model up to rounding, and no work is saved. Use it where a batch or an
image does not fit: first `tokens`, which costs least, then `samples`. Attention is cut by its own
kernels. Step caches and attention methods go inside or around in either order; a patch that keeps
state inside of a feed-forward layer is refused. The paper's third part is `step_rehash`.

Static: the sizes. Dynamic: nothing. Cost: dense, in smaller products; memory of activations inside
of blocks: (part / all) of the dense ones.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from effjax import testing
from effjax.context import Context
from effjax.fields import Count
from effjax.forward import Forward, Params
from effjax.layers.chunks import TokenParts
from effjax.layers.stack import Stack
from effjax.targets import target_modules
from effjax.transform import Method, Pair, Plan, Transform

NAME = "streamlined"


@dataclasses.dataclass(frozen=True)
class StreamlinedPlan(Plan):
    """How much runs together.

    Attributes:
        samples: that run through a stack of blocks together, at most; equal parts are taken. None
            for all.
        tokens: that run through a feed-forward layer together, at most; None for all.
    """

    samples: Count | None = None
    tokens: Count | None = None


def transform(plan: StreamlinedPlan) -> Transform:
    """Run blocks on parts of the samples or tokens.

    Raises:
        ValueError: for a model without a stack of blocks, or without feed-forward layers to cut;
            while tracing, for samples of a language model with a KV cache.
    """

    def apply(forward: Forward, params: Params) -> Pair:
        module = forward.module(params)
        if not target_modules(module, Stack):
            raise ValueError(f"{forward.model.__name__} has no stack of blocks to run in parts")
        if plan.tokens is not None and not _feed_forward(module):
            raise ValueError(f"{forward.model.__name__} has no feed-forward layers to run in parts")
        return forward.patch(Streamlining(plan)), params

    return Transform(NAME, plan, apply)


@dataclasses.dataclass(frozen=True)
class Streamlining:
    """The patch: stacks and feed-forward layers run in parts."""

    plan: StreamlinedPlan

    def __call__(self, module: nnx.Module, context: Context) -> None:
        if self.plan.samples is not None and context.cache_length is not None:
            raise ValueError(
                f"KV caches hold a whole batch, so {NAME} cannot run on some samples: leave out "
                f"samples="
            )
        for target in target_modules(module, Stack):
            assert isinstance(target.module, Stack)
            target.module.samples = self.plan.samples
        for layer in _feed_forward(module):
            layer.tokens = self.plan.tokens


def _feed_forward(module: nnx.Module) -> list[TokenParts]:
    """What has feed-forward layers, in all blocks."""
    return [
        target.module
        for stack in target_modules(module, Stack)
        for target in target_modules(stack.module, TokenParts)
        if isinstance(target.module, TokenParts)
    ]


def _tiny(**options: Any) -> testing.Subject:
    """Wide, for few tokens: most memory is that of feed-forward layers, as in large models."""
    return testing.tiny_dit(**{"sample_size": 8, "head_dim": 32} | options)


METHOD = Method(
    name=NAME,
    paper="Fast and Memory-Efficient Video Diffusion Using Streamlined Inference, arXiv 2411.01171",
    seams=("patches",),
    domain="images",
    plan=StreamlinedPlan,
    transform=transform,
    identity=lambda subject: StreamlinedPlan(),
    ladder=lambda subject: (
        StreamlinedPlan(tokens=8),
        StreamlinedPlan(samples=1),
        StreamlinedPlan(samples=1, tokens=4),
    ),
    tiny=_tiny,
    systems=("Streamlined Inference",),
    exact=True,
)
