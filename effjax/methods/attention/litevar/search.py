"""The calibration of LiteVAR: windows by the mass that they keep, and how layers bear rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from tqdm.auto import tqdm

from effjax.autoregression import NextScale
from effjax.calibration import Trajectory
from effjax.context import Context, State
from effjax.fields import Checked, Count, Natural, NotNegative, Share
from effjax.forward import Forward, Params
from effjax.layers.attention import Heads, KeyHeads, attentions
from effjax.layers.linear import Linear
from effjax.layers.scales import Outputs, Scales, Sides, Values, token_starts
from effjax.methods.attention.litevar.patch import described
from effjax.methods.attention.litevar.plan import (
    FIRST,
    LAYER_TYPES,
    NAME,
    AttentionBits,
    LiteVARPlan,
    Sharing,
    mixed_precision,
    windowed_pairs,
)
from effjax.methods.quantization.blocks import along
from effjax.quant.notation import read_bits
from effjax.search.sensitivity import Preparation, Rounding, fidelity
from effjax.search.sensitivity import sensitivity as scores_of
from effjax.targets import Wrapper, wrap

# Share of a head's mass below which a pair of scales is skipped, of the released ten scales: of
# each scale of queries, and of its last pair (keys of scale 3).
_SKIP = {
    3: (0.1, 0.1),
    4: (0.05, 0.05),
    5: (0.05, 0.05),
    6: (0.05, 0.03),
    7: (0.05, 0.03),
    8: (0.03, 0.02),
    9: (0.05, 0.05),
}
_RELEASED, _LAST_PAIR, _OTHERS = 10, 3, 0.05


@dataclasses.dataclass(frozen=True)
class Goals(Checked):
    """What a search aims at. The paper calibrates with guidance 4, top_k 900 and top_p 0.95.

    Attributes:
        tau: mass of a pair of scales that its window keeps.
        floor: probabilities below it do not count, of the sum over a batch.
        skip: mass, as a share of a head's, below which a pair is skipped; if none, the paper's for
            each pair of ten scales, and 0.05 for other models.
        first: the first scale with windows.
        batch: labels of a batch; of several batches the widest windows are taken.
        share: what the unconditional branch takes of the conditional one.
        attention_bits: of queries, keys, probabilities and values, 8 or 16 for floats.
        bits: of weights and inputs of linear layers, such as w8a8, w6a6 or w4a8; w16 for floats.
        floats: how many types of layers, the most sensitive ones, stay floats as measured; if none,
            the feed-forward layers' outputs (fc2), as the paper found.
        min_tokens: scales of fewer tokens stay dense.
    """

    tau: Share = 0.95
    floor: NotNegative = 0.003
    skip: Share | None = None
    first: Count = FIRST
    batch: Count = 8
    share: Sharing = "output"
    attention_bits: AttentionBits = 8
    bits: str = "w8a8"
    floats: Natural | None = None
    min_tokens: Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        read_bits(self.bits)


def search(
    goals: Goals, forward: Forward, params: Params, data: Trajectory, *, progress: bool = True
) -> LiteVARPlan:
    """Calibrate the windows of a model on samples of it.

    Cost: the samples once, with the dense map of every head.

    Raises:
        ValueError: for a model without scales, or with fewer than `first`, a loop that does not
            sample scale by scale, sharing without guidance, and bits that there are not.
    """
    loop = _loop(data, forward, params)
    patch_nums, layers, heads = described(forward, params)
    pairs = windowed_pairs(len(patch_nums), goals.first)
    if goals.share != "none" and not loop.guided:
        raise ValueError(
            f'share="{goals.share}" shares attention over guidance, and these samples are not '
            f'guided: sample with guidance above 0, or aim at share="none"'
        )
    mixed_precision(*read_bits(goals.bits))
    found = np.zeros((len(pairs), layers, heads), int)
    for masses in measured(
        forward, params, data, floor=goals.floor, batch=goals.batch, bar=progress
    ):
        own = [half_widths(masses, patch_nums, pair, goals.tau, goals.skip) for pair in pairs]
        found = np.maximum(found, own)
    plan = LiteVARPlan(
        *(patch_nums, layers, heads),
        windows=tuple((*pair, tuple(map(tuple, own.tolist()))) for pair, own in zip(pairs, found)),
        share=goals.share,
        attention_bits=goals.attention_bits,
        rules=_rules(goals, forward, params, data, progress),
        min_tokens=goals.min_tokens,
        tau=goals.tau,
        model=f"{forward.model.__name__}({forward.config})",
    )
    return plan


def _rules(
    goals: Goals, forward: Forward, params: Params, data: Trajectory, progress: bool
) -> tuple[tuple[str, int, int], ...]:
    bits = read_bits(goals.bits)
    if goals.floats is None or bits[0] == 16:
        return mixed_precision(*bits)
    losses = sensitivity(forward, params, data, progress=progress)
    worst = sorted(losses, key=lambda role: -losses[role])[: goals.floats]
    return mixed_precision(*bits, floats=worst)


def half_widths(
    masses: Sequence[Float[np.ndarray, "K H L"]],
    patch_nums: Sides,
    pair: tuple[int, int],
    tau: float,
    skip: float | None = None,
) -> np.ndarray:
    """Half widths of a pair of scales by layer and head, int[layers, heads].

    The least w whose band holds `tau` of the pair's mass, 0 for a pair with too little of the
    head's.

    Args:
        masses: of `measured`, the tokens of whose scale of queries see.
        patch_nums: sides of the maps.
        pair: scales of queries and keys.
        tau, skip: as in `Goals`.
    """
    query, key = pair
    starts = token_starts(patch_nums)
    size = patch_nums[key] ** 2

    def of_pair(own: np.ndarray, scale: int) -> np.ndarray:
        return own[:, starts[scale] : starts[scale + 1]]

    found = []
    for layer in masses:
        own = np.asarray(layer[query], np.float64)
        whole = np.maximum(own.sum(-1), 1e-30)
        within = np.cumsum(of_pair(own, key), -1)
        mass = within[:, -1]
        reached = within >= tau * mass[:, None]
        widths = np.where(mass > 0, reached.argmax(-1) + 1, size)
        share = mass / whole
        if skip is None and len(patch_nums) == _RELEASED and query == key == _RELEASED - 1:
            before = sum(of_pair(own, scale).sum(-1) for scale in (query - 1, query - 2)) / whole
            skipped = (share < 0.2) & (before < 0.2)
        else:
            skipped = share < (_least(len(patch_nums), query, key) if skip is None else skip)
        found.append(np.where(skipped, 0, widths))
    return np.stack(found)


def _least(scales: int, query: int, key: int) -> float:
    """The paper's share of mass below which a pair is skipped."""
    if scales != _RELEASED or query not in _SKIP:
        return _OTHERS
    if (query, key) == (_RELEASED - 1, _RELEASED - 2):
        return 0.1
    return _SKIP[query][key <= _LAST_PAIR]


def measured(
    forward: Forward,
    params: Params,
    data: Trajectory,
    *,
    floor: float,
    batch: int,
    bar: bool = True,
) -> Iterator[list[np.ndarray]]:
    """Run the dense model, batch by batch, and measure the maps of its heads.

    Returns:
        An iterator over batches: for each layer float32[K, H, L], where P(x, y) of the query x of n
        and the key y of m, summed over the batch, counts at the key's scale and floor(|x m - y n| /
        n): the first w of the scale's m bins are what a half width w keeps.
    """
    loop = _loop(data, forward, params)
    watching = forward.patch(Watch(floor))
    paths = [target.path for target in attentions(forward.module(params), "scales")]
    rows = len(data.cond)
    step = jax.jit(loop.step, static_argnums=5)
    with tqdm(
        total=loop.calls * -(-rows // batch), desc=NAME, disable=not bar, leave=False
    ) as bars:
        for start in range(0, rows, batch):
            own = slice(start, start + batch)
            cond = data.cond[own]
            uncond = None if data.uncond is None else data.uncond[own]
            uncond = loop.unconditional(forward, cond, uncond)
            key = jax.random.fold_in(data.key, start)
            carry = loop.init(watching, params, cond, key, uncond=uncond)
            found: dict[str, list[np.ndarray]] = {path: [] for path in paths}
            for scale in range(loop.calls):
                carry = step(watching, params, carry, cond, uncond, scale)
                for path in paths:
                    found[path].append(np.asarray(carry.state[f"{path}.core.masses"]))
                bars.update()
            yield [np.stack(found[path]) for path in paths]


def _loop(data: Trajectory, forward: Forward, params: Params) -> NextScale:
    described(forward, params)
    loop = data.sampler.alone
    if not isinstance(loop, NextScale):
        raise ValueError(
            f"{NAME} is calibrated on samples of a NextScale, got a {type(loop).__name__}"
        )
    return loop


@dataclasses.dataclass(frozen=True)
class Watch:
    """Patch: every attention over scales measures its map, and attends as before.

    Attributes:
        floor: probabilities below it, summed over the batch, do not count.
    """

    floor: float

    def __call__(self, module: nnx.Module, context: Context) -> None:
        for target in attentions(module, "scales"):
            wrap(module, f"{target.path}.core", _Watched, self.floor)


class _Watched(Wrapper):
    """A core, and the masses of its last call."""

    apart = True

    def __init__(self, inner: nnx.Module, floor: float):
        super().__init__(inner)
        self.floor = floor
        self.masses = State()

    def __call__(self, q: Heads, k: KeyHeads, v: Values, scales: Scales) -> Outputs:
        if scales.stop - scales.start > 1:
            raise ValueError(f"{NAME} is calibrated scale by scale, and this call has several")
        shape = q.shape[2], scales.all_tokens
        self.masses.read(shape, jnp.float32)
        masses = diagonal_masses(q, k, scales, self.floor)
        padding = [(0, 0), (0, scales.all_tokens - masses.shape[1])]
        self.masses.write(jnp.pad(masses, padding))
        return self.inner(q, k, v, scales)


def diagonal_masses(q: Heads, k: KeyHeads, scales: Scales, floor: float) -> Float[Array, "H T"]:
    """Of the map of one scale, summed over the batch, the mass at each distance from a diagonal.

    A probability counts at the key's scale and at floor(|x m / n - y|), see `measured`.
    """

    def add(total: Array, row: tuple[Array, Array]) -> tuple[Array, None]:
        own, keys = (x.astype(jnp.float32) for x in row)
        logits = jnp.einsum("shd,thd->hst", own, keys, precision="highest")
        return total + jax.nn.softmax(logits * own.shape[-1] ** -0.5, axis=-1), None

    queries, keys = q.shape[1], k.shape[1]
    total, _ = jax.lax.scan(add, jnp.zeros((q.shape[2], queries, keys)), (q, k))
    total = jnp.where(total < floor, 0.0, total).reshape(q.shape[2], -1)
    place, bins = np.arange(queries)[:, None], []
    for start, size in zip(token_starts(scales.sides), scales.sizes):
        bins.append(start + np.abs(place * size - np.arange(size) * queries) // queries)
    bins = np.concatenate(bins, axis=1).reshape(-1)
    count = partial(jax.ops.segment_sum, segment_ids=jnp.asarray(bins), num_segments=keys)
    return jax.vmap(count)(total)


def sensitivity(
    forward: Forward,
    params: Params,
    data: Trajectory,
    *,
    bits: tuple[int, int] = (4, 4),
    rest: tuple[int, int] = (8, 8),
    progress: bool = True,
) -> dict[str, float]:
    """How much worse logits become when one type of linear layers is rounded to few bits.

    The tokens are those that the model as it is draws, so that all logits are of the same samples.

    Args:
        forward, params: the model, not quantized.
        data: samples to look at.
        bits: of weights and inputs of one type of layers at a time.
        rest: of all others.
        progress: show a bar.

    Returns:
        Share of noise in the logits, by the role of the layers.

    Raises:
        ValueError: for a model without scales.
    """
    loop = _loop(data, forward, params)
    (inputs,) = along(forward, params, data)
    targets = [
        target for target in forward.target_modules(params, Linear) if target.role in LAYER_TYPES
    ]
    preparations = {target.path: Preparation() for target in targets}

    @jax.jit
    def sample(bits: Array) -> Array:
        rounding = forward.patch(Rounding(bits, preparations))
        return rounding(params, {}, *inputs, guidance=loop.joined)[0]

    roles = [role for role in LAYER_TYPES if any(target.role == role for target in targets)]
    scores = scores_of(
        sample,
        list(preparations),
        parts=[[target.path for target in targets if target.role == role] for role in roles],
        candidates=[bits],
        metrics=[fidelity] * len(roles),
        rest=rest,
        progress=progress,
    )
    return {role: -float(score) for role, (score,) in zip(roles, scores)}
