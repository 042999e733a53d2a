"""What blocks attend to: the foreground of an image or video, or its background.

A block's *preference* is the share of the foreground in what the image's tokens attend to among
themselves, over the share of the foreground in the image: 1 for a block that does not tell them
apart, more for one that looks at the foreground. It is measured along a trajectory, without a map
of all queries and keys: attention with the values "is foreground" and "is image" gives both sums.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from effjax.calibration import Trajectory
from effjax.context import Context, Layout, State
from effjax.forward import Forward, Params
from effjax.layers.attention import Heads, attentions
from effjax.layers.stack import Stack
from effjax.methods.steps.watching import layout_of, sampled
from effjax.targets import AttentionKind, Wrapper, target_modules, wrap
from pallas_kernels.attention import dense_attention

KINDS: tuple[AttentionKind, ...] = ("self", "joint")
Mask = Bool[np.ndarray, "B T"]


def raster_of(forward: Forward, params: Params, data: Trajectory) -> Layout:
    """The tokens of a trajectory's network calls.

    Raises:
        ValueError: for a model whose image tokens are no raster, and as `layout_of`.
    """
    layout = layout_of(forward, params, data)
    if layout is None:
        raise ValueError(f"{forward.model.__name__} does not say what its tokens are")
    layout.raster("a profile of foreground and background")
    return layout


def foreground_of(samples: Array | np.ndarray, layout: Layout) -> Mask:
    """Which image tokens are foreground: those far from the sample's median.

    A token's place is compared with the median of each channel over the sample; the distances are
    cut in two by Otsu's threshold, which leaves the least variance within both parts. That asks for
    a background that covers more than half of the sample: give masks of your own otherwise.

    Args:
        samples: images [B, H, W, C], or videos [B, F, H, W, C], such as latents.
        layout: of the tokens.

    Returns:
        bool[B, image tokens].
    """
    frames, rows, columns = layout.raster("a profile of foreground and background")
    x = np.asarray(samples, np.float32)
    x = x.reshape(len(x), frames, -1, *x.shape[-2:]) if x.ndim == 4 else x
    batch, _, height, width, channels = x.shape
    patches = x.reshape(
        *(batch, frames, -1, rows, height // rows, columns, width // columns, channels)
    )
    tokens = patches.mean((2, 4, 6)).reshape(batch, -1, channels)
    distance = np.linalg.norm(tokens - np.median(tokens, axis=1, keepdims=True), axis=-1)
    return np.stack([row > _otsu(row) for row in distance])


def _otsu(values: Float[np.ndarray, " N"]) -> float:
    """The threshold between two parts of values whose variance between them is the largest."""
    ordered = np.sort(values.astype(np.float64))
    counts = np.arange(1, len(ordered))
    sums = np.cumsum(ordered)
    low, high = sums[:-1] / counts, (sums[-1] - sums[:-1]) / (len(ordered) - counts)
    between = counts * (len(ordered) - counts) * np.square(high - low)
    return float(ordered[int(np.argmax(between))])


def preferences(
    forward: Forward, params: Params, data: Trajectory, foreground: Mask
) -> Float[np.ndarray, "calls blocks"]:
    """How much each block prefers the foreground in each call; blocks of all stacks in order.

    Raises:
        ValueError: for masks of another shape, or with nothing or everything in the foreground of a
            sample, and for a model with a block without self- or joint attention.
    """
    layout = raster_of(forward, params, data)
    batch = jax.tree.leaves(data.cond)[0].shape[0]
    if foreground.shape != (batch, layout.image_tokens) or foreground.dtype != bool:
        raise ValueError(
            f"foreground must be bool[{batch}, {layout.image_tokens}], one row for each sample and "
            f"one column for each image token, got {foreground.dtype}{list(foreground.shape)}"
        )
    plain = [i for i, row in enumerate(foreground) if row.all() or not row.any()]
    if plain:
        raise ValueError(
            f"the samples {plain} have no foreground, or no background: give others, or masks"
        )
    model = forward.module(params)
    blocks = [
        [f"{stack.path}.{number}.{target.path}" for target in attentions(block, *KINDS)]
        for stack in target_modules(model, Stack)
        for number, block in enumerate(stack.module)  # pyright: ignore[reportArgumentType]
    ]
    if bare := [number for number, own in enumerate(blocks) if not own]:
        raise ValueError(
            f"{forward.model.__name__} has blocks without self- or joint attention to look at: "
            f"{bare}"
        )
    paths = [path for own in blocks for path in own]

    def look(carry: Any) -> Array:
        return jnp.stack([carry.state[f"{path}.core.preference"] for path in paths])

    watched = forward.patch(Watch(jnp.asarray(foreground), layout))
    calls = np.stack([np.asarray(seen) for seen in sampled(watched, params, data, look)])
    ends = np.cumsum([len(own) for own in blocks])[:-1]
    return np.stack([part.mean(-1) for part in np.split(calls, ends, axis=-1)], axis=-1)


@dataclasses.dataclass(frozen=True, eq=False)
class Watch:
    """Patch: every attention measures its preference, and attends as before.

    Attributes:
        foreground: bool[B, image tokens], the same for all branches of guidance.
        layout: of the model's sequence.
    """

    foreground: Array
    layout: Layout

    def __call__(self, module: nnx.Module, context: Context) -> None:
        mask = self.foreground
        if context.guidance is not None:
            mask = context.guidance.duplicate(mask)
        for target in attentions(module, *KINDS):
            wrap(module, f"{target.path}.core", _Watched, mask, self.layout)


class _Watched(Wrapper):
    """An attention core that measures its preference in every call."""

    apart = True

    def __init__(self, inner: nnx.Module, foreground: Array, layout: Layout):
        super().__init__(inner)
        self.foreground = nnx.data(foreground)
        self.layout = layout
        self.preference = State()

    def __call__(self, q: Heads, k: Heads, v: Heads) -> Heads:
        layout, foreground = self.layout, self.foreground
        # The image stands alone, or with the text in one sequence.
        first = layout.text if layout.text_first and k.shape[1] == layout.tokens else 0
        stop = first + layout.image_tokens
        marks = jnp.stack([foreground, jnp.ones_like(foreground)], axis=-1).astype(v.dtype)
        values = jnp.zeros((*k.shape[:2], 1, v.shape[-1]), v.dtype)
        values = values.at[:, first:stop, 0, :2].set(marks)
        values = jnp.broadcast_to(values, (*k.shape[:3], v.shape[-1]))
        with jax.named_scope("attention"):
            sums = dense_attention(q, k, values)[:, first:stop].astype(jnp.float32)
        share = jnp.mean(sums[..., 0] / sums[..., 1], (1, 2))
        own = jnp.mean(share / jnp.mean(foreground.astype(jnp.float32), 1))
        self.preference.write(own)
        return self.inner(q, k, v)
