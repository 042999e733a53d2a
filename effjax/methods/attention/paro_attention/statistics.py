"""What attention looks like in blocks: measured on a trajectory, a block of queries at a time.

No map of all queries and keys is ever held: of the softmax of one block of queries only sums,
largest values and numbers of small ones are kept for each block of keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from effjax.calibration import Trajectory
from effjax.context import Context, State
from effjax.forward import Forward, Params
from effjax.layers.attention import Heads, attentions
from effjax.methods.attention.paro_attention.order import Grid, candidates, permute
from effjax.methods.attention.paro_attention.patch import check_raster
from effjax.methods.attention.paro_attention.plan import KINDS, Blocks
from effjax.targets import Wrapper, wrap
from effjax.transform import Pair

Score = Literal["corrected", "printed"]


class Statistics(NamedTuple):
    """Of the softmax P of each head, in blocks: float32[B, H, M, M].

    Attributes:
        sums: of P.
        small: share of the elements with |P| < epsilon.
        largest: max |P|.
    """

    sums: Array
    small: Array
    largest: Array


class OrderMetrics(NamedTuple):
    """What one order does to the blocks of a head, over blocks of image tokens alone: [..., H].

    Attributes:
        sparse: share of blocks that can be skipped, as a share sigma of their elements is small.
        peaky: mean of max / mean of the blocks: what quantizing a block costs.
        mass: share of the attention in the best fifth of the blocks.
    """

    sparse: Any
    peaky: Any
    mass: Any


def block_statistics(q: Heads, k: Heads, blocks: Blocks, epsilon: float) -> Statistics:
    """Statistics of softmax(q k^T / sqrt(D)) for heads [B, S, H, D] in an order."""
    batch, tokens, heads, width = q.shape
    count, size = blocks.count, blocks.size
    padding = [(0, 0), (0, count * size - tokens), (0, 0), (0, 0)]

    def by_head(x: Array) -> Array:
        padded = jnp.pad(x.astype(jnp.float32), padding)
        return padded.swapaxes(1, 2).reshape(batch * heads, count, size, width)

    exists = (jnp.arange(count * size) < tokens).reshape(count, size)

    def of_head(operands: tuple[Array, Array]) -> Statistics:
        queries, keys = operands
        keys = keys.reshape(-1, width)

        def of_rows(rows: tuple[Array, Array]) -> Statistics:
            own, there = rows
            logits = jnp.matmul(own, keys.T, precision="highest") * width**-0.5
            logits = jnp.where(exists.reshape(-1), logits, -jnp.inf)
            weights = jnp.where(there[:, None], jax.nn.softmax(logits, axis=-1), 0.0)
            weights = weights.reshape(size, count, size)
            small = jnp.mean((weights < epsilon).astype(jnp.float32), (0, 2))
            return Statistics(jnp.sum(weights, (0, 2)), small, jnp.max(weights, (0, 2)))

        return jax.lax.map(of_rows, (queries, exists))

    found = jax.lax.map(of_head, (by_head(q), by_head(k)))
    return jax.tree.map(lambda x: x.reshape(batch, heads, count, count), found)


def order_metrics(statistics: Statistics, blocks: Blocks, sigma: float) -> OrderMetrics:
    """Metrics [B, H] of an order, over the blocks that no mask is bound to keep."""
    free = np.flatnonzero(~blocks.fixed)
    if not len(free):
        nothing = jnp.zeros(statistics.sums.shape[:2], jnp.float32)
        return OrderMetrics(nothing, nothing + 1, nothing + 1)
    own = jax.tree.map(lambda x: x[..., free[:, None], free], statistics)
    mean = own.sums / blocks.size**2
    ratio = jnp.where(mean > 0, own.largest / jnp.where(mean > 0, mean, 1.0), 1.0)
    flat = own.sums.reshape(*own.sums.shape[:2], -1)
    top = max(1, round(0.2 * flat.shape[-1]))
    best = jnp.sum(jax.lax.top_k(flat, top)[0], -1)
    return OrderMetrics(
        sparse=jnp.mean((own.small >= sigma).astype(jnp.float32), (-1, -2)),
        peaky=jnp.mean(ratio, (-1, -2)),
        mass=best / jnp.maximum(jnp.sum(flat, -1), 1e-30),
    )


def order_scores(
    metrics: OrderMetrics, alpha: float, score: Score = "corrected"
) -> Float[np.ndarray, "O H"]:
    """Scores of orders [O, H], lower is better; both parts are shares of their sum over the orders.

    alpha (1 - sparse) + (1 - alpha) peaky. The paper prints alpha sparse + (1 - alpha) peaky, which
    prefers orders with *fewer* blocks to skip: "printed".
    """

    def share(x: Any) -> np.ndarray:
        x = np.asarray(x, np.float64)
        total = x.sum(0)
        return x / np.where(total > 0, total, 1.0)

    sparse = share(metrics.sparse if score == "printed" else 1 - np.asarray(metrics.sparse))
    return alpha * sparse + (1 - alpha) * share(metrics.peaky)


@dataclasses.dataclass(frozen=True)
class Watch:
    """Patch: every attention layer measures its blocks, and attends as before.

    Attributes:
        grid: of the image tokens.
        blocks: of each layer's sequence.
        epsilon, sigma: see `OrderMetrics`.
        orders: by layer and head, to measure sums; None to measure metrics of all orders.
    """

    grid: Grid
    blocks: tuple[Blocks, ...]
    epsilon: float = 1e-3
    sigma: float = 0.9
    orders: tuple[tuple[int, ...], ...] | None = None

    def __call__(self, module: nnx.Module, context: Context) -> None:
        for layer, target in enumerate(attentions(module, *KINDS)):
            orders = None if self.orders is None else self.orders[layer]
            wrap(module, f"{target.path}.core", _Watched, self, self.blocks[layer], orders)


class _Watched(Wrapper):
    """An attention core, and what was measured of its last call."""

    apart = True

    def __init__(
        self, inner: nnx.Module, watch: Watch, blocks: Blocks, orders: tuple[int, ...] | None
    ):
        super().__init__(inner)
        self.watch, self.blocks, self.orders = watch, blocks, orders
        self.measured = State()

    def __call__(self, q: Heads, k: Heads, v: Heads) -> Heads:
        watch, blocks = self.watch, self.blocks
        check_raster(q.shape[1], watch.grid, blocks.tokens)
        place: Any = {"text": blocks.text, "text_first": blocks.text_first}

        def statistics(orders: tuple[int, ...]) -> Statistics:
            moved = (permute(x, orders, watch.grid, **place) for x in (q, k))
            return block_statistics(next(moved), next(moved), blocks, watch.epsilon)

        if self.orders is not None:
            measured = jnp.mean(statistics(self.orders).sums, axis=0)
        else:
            found = []
            for order in candidates(watch.grid):
                metrics = order_metrics(statistics((order,) * q.shape[2]), blocks, watch.sigma)
                found.append(jnp.stack([jnp.mean(x, axis=0) for x in metrics], axis=-1))
            measured = jnp.stack(found)
        self.measured.read(measured.shape, jnp.float32)
        self.measured.write(measured)
        return self.inner(q, k, v)


def watched(
    watch: Watch, pair: Pair, data: Trajectory, see: Callable[[int, dict[str, np.ndarray]], None]
) -> None:
    """Run a trajectory of the model as it is, and show what every call measured.

    Args:
        watch: what to measure.
        pair: the model.
        data: trajectories of a small batch.
        see: called as see(step, measured) with an array by path of an attention layer.
    """
    forward, params = pair[0].patch(watch), pair[1]
    sampler, suffix = data.sampler, ".core.measured"
    options = {} if data.uncond is None else {"uncond": data.uncond}
    uncond = sampler.unconditional(forward, data.cond, data.uncond)
    carry = jax.jit(partial(sampler.init, forward, cond=data.cond, key=data.key, **options))(
        params=params
    )
    step = jax.jit(partial(_step, sampler, forward, data.cond, uncond))
    for index in range(sampler.calls):
        carry = step(params, carry, np.int32(index))
        see(
            index,
            {
                name.removesuffix(suffix): np.asarray(value)
                for name, value in carry.state.items()
                if name.endswith(suffix)
            },
        )


def _step(
    sampler: Any, forward: Forward, cond: Any, uncond: Any, params: Params, carry: Any, step: Array
) -> Any:
    return sampler.step(forward, params, carry, cond, uncond, step)
