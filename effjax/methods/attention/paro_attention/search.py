"""The calibration of PAROAttention: orders by their scores, blocks by their mass.

Three runs of the unchanged model see the same trajectory: one measures every order, one the masses
of blocks in the chosen orders. `calibrate` repeats the second one for a plan that is there already.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from effjax.calibration import Trajectory
from effjax.fields import Checked, Count, Natural, Positive, Range, Share
from effjax.forward import Forward, Params
from effjax.layers.attention import required_attentions
from effjax.methods.attention.paro_attention import masks as block_masks
from effjax.methods.attention.paro_attention.order import candidates
from effjax.methods.attention.paro_attention.patch import layers_of
from effjax.methods.attention.paro_attention.plan import (
    KINDS,
    NAME,
    Bits,
    Blocks,
    Masks,
    ParoAttentionPlan,
    Sharing,
    check_bits,
    slots_of_steps,
)
from effjax.methods.attention.paro_attention.statistics import (
    OrderMetrics,
    Score,
    Watch,
    order_scores,
    watched,
)


@dataclasses.dataclass(frozen=True)
class Goals(Checked):
    """What a search aims at.

    Attributes:
        density: kept blocks as a share of all, over all slots, layers and heads; blocks that are
            always kept count. The paper takes 0.5, 0.3 and 0.2 for videos, 0.75 and 0.5 for FLUX.
        block: tokens of a block; TPU kernels take multiples of 128.
        bits: of queries and keys; 16 leaves them floats.
        values: bits of probabilities and values; 16 leaves them floats.
        slots: masks of each head; none for one of each call of the first half and one for the
            second half, or with even sharing for at most 10.
        sharing: which slot a call uses, "even" or "half".
        rule: keep blocks of more than a threshold ("mass"), or equally many of each row ("row").
        thresholds: one threshold for all slots, or one for each "slot".
        least: blocks that a row keeps though they are below the threshold; 0 lets rows be empty.
        score: of orders: "corrected", or as "printed" in the paper.
        alpha: weight of the blocks that can be skipped in the score, beside the peaks in blocks.
        epsilon: probabilities below it are small.
        sigma: share of small probabilities from which a block can be skipped.
        smooth: subtract the mean of the keys before they are quantized.
    """

    density: Annotated[float, Range(0, 1, above=True)] = 0.5
    block: Count = 64
    bits: Bits = 16
    values: Bits = 16
    slots: Count | None = None
    sharing: Sharing = "half"
    rule: Literal["mass", "row"] = "mass"
    thresholds: Literal["one", "slot"] = "one"
    least: Natural = 1
    score: Score = "corrected"
    alpha: Share = 0.5
    epsilon: Positive = 1e-3
    sigma: Share = 0.9
    smooth: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.bits, self.values)


class Found(NamedTuple):
    """What a search finds.

    Attributes:
        plan: the plan.
        masks: its masks, what `transform` takes beside it.
        metrics: of every layer and order, [orders, heads], averaged over samples and calls.
        scores: of orders [orders, heads] by layer; the lowest one is chosen.
    """

    plan: ParoAttentionPlan
    masks: Masks
    metrics: dict[str, OrderMetrics]
    scores: dict[str, np.ndarray]


class _Model(NamedTuple):
    """The attention layers of a model, by layer."""

    paths: list[str]
    heads: list[int]
    joint: tuple[bool, ...]
    blocks: tuple[Blocks, ...]
    grid: tuple[int, int, int]
    text: int
    text_first: bool


def find(
    goals: Goals, forward: Forward, params: Params, data: Trajectory, *, progress: bool = True
) -> Found:
    """Find orders and masks on a trajectory of the model.

    Cost: two runs of the sampler, with one product Q K^T more in every attention for each order
    (two of an image, six of a video) and then for one. Memory: M^2 numbers for each head.

    Raises:
        ValueError: for a model without such attention, a density below what is always kept, and
            more slots than calls.
    """
    model = _describe(forward, params, data, goals.block)
    steps = data.sampler.calls
    slots = _slots(goals, steps)
    _check_density(goals, model)
    metrics = _metrics(goals, model, (forward, params), data, progress)
    scores = {path: order_scores(each, goals.alpha, goals.score) for path, each in metrics.items()}
    numbers = candidates(model.grid)
    chosen = [np.argmin(scores[path], axis=0) for path in model.paths]
    orders = tuple(tuple(numbers[int(place)] for place in own) for own in chosen)
    mass = tuple(
        float(np.mean(np.concatenate([_of_order(metrics[p].mass, o) for p, o in zip(*own)])))
        for own in ((model.paths, [np.zeros_like(o) for o in chosen]), (model.paths, chosen))
    )
    which = slots_of_steps(steps, slots, goals.sharing)
    sums = _sums(model, orders, which, (forward, params), data, progress)
    width = max(blocks.count for blocks in model.blocks)
    taus: tuple[float, ...] = ()
    if goals.rule == "mass":
        keep, taus = _by_mass(goals, model, sums)
        free = [own[..., ~blocks.fixed, :].sum(-1) for own, blocks in zip(keep, model.blocks)]
        width = max(int(rows.max()) if rows.size else 1 for rows in free)
    else:
        keep, width = _by_row(goals, model, sums)
    plan = ParoAttentionPlan(
        orders=orders,
        joint=model.joint,
        kept=_counts(keep),
        grid=model.grid,
        width=max(width, 1),
        steps=steps,
        sharing=goals.sharing,
        text=model.text,
        text_first=model.text_first,
        block=goals.block,
        bits=goals.bits,
        values=goals.values,
        smooth=goals.smooth,
        least=goals.least,
        taus=taus,
        mass=mass,
        sampler=repr(data.sampler.schedule),
        model=f"{forward.model.__name__}({forward.config})",
    )
    packed = {f"{path}.keep": block_masks.pack(own) for path, own in zip(model.paths, keep)}
    return Found(plan, packed, metrics, scores)


def search(goals: Goals, forward: Forward, params: Params, data: Trajectory) -> ParoAttentionPlan:
    """The plan of `find`; `calibrate` makes its masks."""
    return find(goals, forward, params, data).plan


def calibrate(
    plan: ParoAttentionPlan,
    forward: Forward,
    params: Params,
    data: Trajectory,
    *,
    progress: bool = True,
) -> Masks | None:
    """Measure the masks of a plan: of each head as many blocks as it keeps, those of most mass.

    Returns:
        What `transform` takes beside the plan: packed masks, or None for a plan that makes its own.

    Raises:
        ValueError: for a plan of another model, size or number of calls.
    """
    if plan.masks == "diagonal":
        return None
    model = _describe(forward, params, data, plan.block)
    own = (model.grid, model.text, model.text_first, model.joint, model.heads)
    planned = (plan.grid, plan.text, plan.text_first, plan.joint, [*map(len, plan.orders)])
    if own != planned or plan.steps != data.sampler.calls:
        raise ValueError(
            f"the plan of {NAME} is for {plan.steps} calls of a model with grid, text, text first, "
            f"joint layers and heads {planned}; this one makes {data.sampler.calls} calls and has "
            f"{own}. Search a plan for it."
        )
    pair = forward, params
    sums = _sums(model, plan.orders, plan.slot_of_step, pair, data, progress)
    found = {}
    for layer, path in enumerate(model.paths):
        kept = np.array([slot[layer] for slot in plan.kept])
        keep = block_masks.best(sums[layer], model.blocks[layer], kept, plan.width, plan.least)
        found[f"{path}.keep"] = block_masks.pack(keep)
    return found


def _describe(forward: Forward, params: Params, data: Trajectory, block: int) -> _Model:
    """The layers of a model for the samples of a trajectory."""
    module = forward.module(params)
    required_attentions(module, *KINDS, needed_by=NAME)
    layers = layers_of(module)
    samples = len(jax.tree.leaves(data.cond)[0])
    x = jnp.zeros((samples, *data.sampler.sample_shape(forward)))
    uncond = data.sampler.unconditional(forward, data.cond, data.uncond)
    layout = forward.layout(params, *data.sampler.inputs(x, data.cond, uncond, 0))
    if layout is None:
        raise ValueError(f"{forward.model.__name__} says no layout of its tokens to plan for")
    blocks = tuple(
        Blocks(layout.image_tokens + text, text, layout.text_first, block)
        for text in (layout.text if each else 0 for each in layers.joint)
    )
    if all(each.fixed.all() for each in blocks):
        raise ValueError(
            f"of {layout.image_tokens} image tokens and {layout.text} of text no block of {block} "
            f"holds image tokens alone, so all would be kept. Take smaller blocks."
        )
    grid, text = layout.raster(NAME), layout.text
    return _Model(
        *(layers.paths, layers.heads, layers.joint, blocks, grid, text, layout.text_first)
    )


def _slots(goals: Goals, steps: int) -> int:
    if goals.slots is not None:
        if goals.slots > steps:
            raise ValueError(
                f"there are {steps} network calls for {goals.slots} slots: at most one for each"
            )
        return goals.slots
    return min(10, steps) if goals.sharing == "even" else min(-(-steps // 2) + 1, steps)


def _check_density(goals: Goals, model: _Model) -> None:
    """Check that a density allows what is always kept.

    Raises:
        ValueError: if it does not.
    """
    if goals.rule == "row":
        block_masks.equal_rows(goals.density, model.blocks, model.heads, goals.least)
        return
    kept = total = 0
    for heads, blocks in zip(model.heads, model.blocks):
        free = int((~blocks.fixed).sum())
        kept += heads * int(blocks.always.sum() + free * min(goals.least, free))
        total += heads * blocks.count**2
    if kept > goals.density * total + 1e-6:
        raise ValueError(
            f"a density of {goals.density} is below {kept / total:.3f}, which blocks of text, "
            f"incomplete ones and {goals.least} of each other row take. Ask for more, or take "
            f"smaller blocks."
        )


def _metrics(
    goals: Goals, model: _Model, pair: Any, data: Trajectory, progress: bool
) -> dict[str, OrderMetrics]:
    total: dict[str, np.ndarray] = {}
    bar = _bar(data, "orders", progress)

    def see(step: int, measured: dict[str, np.ndarray]) -> None:
        for path, new in measured.items():
            total[path] = total.get(path, 0.0) + new.astype(np.float64) / data.sampler.calls
        bar.update()

    with bar:
        watch = Watch(model.grid, model.blocks, goals.epsilon, goals.sigma)
        watched(watch, pair, data, see)
    return {path: OrderMetrics(*np.moveaxis(total[path], -1, 0)) for path in model.paths}


def _sums(
    model: _Model,
    orders: tuple[tuple[int, ...], ...],
    which: np.ndarray,
    pair: Any,
    data: Trajectory,
    progress: bool,
) -> list[np.ndarray]:
    """Masses of blocks by layer, float32[slots, H, M, M]: means over samples and calls."""
    slots = int(which.max()) + 1
    sums = [
        np.zeros((slots, heads, blocks.count, blocks.count), np.float32)
        for heads, blocks in zip(model.heads, model.blocks)
    ]
    bar = _bar(data, "masses", progress)

    def see(step: int, measured: dict[str, np.ndarray]) -> None:
        slot = which[step]
        for own, path in zip(sums, model.paths):
            own[slot] += measured[path] / np.float32((which == slot).sum())
        bar.update()

    with bar:
        watch = Watch(model.grid, model.blocks, orders=orders)
        watched(watch, pair, data, see)
    return sums


def _bar(data: Trajectory, what: str, progress: bool) -> Any:
    return tqdm(total=data.sampler.calls, desc=f"search, {what}", disable=not progress, leave=False)


def _by_mass(
    goals: Goals, model: _Model, sums: list[np.ndarray]
) -> tuple[list[np.ndarray], tuple[float, ...]]:
    """Blocks above thresholds, which are bisected to the density."""
    pairs = zip(sums, model.blocks)
    required = [block_masks.required(x, blocks, goals.least) for x, blocks in pairs]
    slots = [slice(i, i + 1) for i in range(len(sums[0]))]
    taus = []
    for slot in [slice(None)] if goals.thresholds == "one" else slots:
        own = [(x[slot], must[slot]) for x, must in zip(sums, required)]
        total = sum(x.size for x, _ in own)

        def density(tau: float, own: list = own, total: int = total) -> float:
            return sum(int(((x > tau) | must).sum()) for x, must in own) / total

        low, high = -1.0, float(max(x.max() for x, _ in own))
        if density(low) <= goals.density:  # everything
            high = low
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if density(middle) > goals.density else (low, middle)
        taus.append(high)
    taus = tuple(taus * (len(slots) // len(taus)))
    tau = np.array(taus, np.float32)[:, None, None, None]
    return [(x > tau) | must for x, must in zip(sums, required)], taus


def _by_row(goals: Goals, model: _Model, sums: list[np.ndarray]) -> tuple[list[np.ndarray], int]:
    """Equally many blocks of each row: as many as the density allows."""
    width, counts = block_masks.equal_rows(goals.density, model.blocks, model.heads, goals.least)
    keep = []
    for own, blocks, count in zip(sums, model.blocks, counts):
        kept = np.full(own.shape[:2], count)
        keep.append(block_masks.best(own, blocks, kept, width, goals.least))
    return keep, width


def _counts(keep: list[np.ndarray]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Kept blocks by slot, layer and head."""
    numbers = [own.sum((-1, -2)) for own in keep]
    return tuple(
        tuple(tuple(int(n) for n in layer[slot]) for layer in numbers)
        for slot in range(len(numbers[0]))
    )


def _of_order(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    return np.take_along_axis(np.asarray(values), order[None], axis=0)[0]
