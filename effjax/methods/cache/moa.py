"""MoA: each head keeps the first tokens and a span of the last ones, which grows with the text.

Buys: at a mean span of half the text, half of the cache and of the traffic of decoding, and of the
prompt's attention. Heads differ: some look a constant number of tokens back and some at everything,
so that spans chosen head by head lose far less than one window for all.

    N = prompt + new tokens                         of each text, known when it begins
    c = min(int(alpha + beta N), N), at least `floor`, rounded up to blocks: C slots
    sinks S = min(C, sink), ring R = C - S
    slot(p) = p for p < S, then S + (p - S) mod R

A new token attends to all C slots. In the prompt spans are of whole blocks: a query block sees the
sinks and the last R / block key blocks, its own included, so up to block - 1 tokens less far back
than a new token does at the same place.

Static: the plan and the largest N, hence all sizes. Dynamic: lengths, and with them how many of its
slots a shorter text uses. Cost: mean C / N of the dense cache.
Layouts: "flat", one pair of arrays for all heads, with a stretch of slots for each; "grouped", one
pair for the heads of a layer that have one rule, which can be sharded by heads (on a TPU groups of
other than 8, 16 ... heads are copied for every token). With 8 or 4 bits slots hold quantized
values, each token's and head's with a scale and an offset, which new tokens see and the prompt does
not.

The search asks, for every head, what the loss of answers would be if an element of the attention
map were masked and its row normalized again. To first order, with A = softmax, dA = dLoss / dA:

    E_ij = A_ij (sum_n A_in dA_in - dA_ij) / (1 - A_ij + eps)   and E_00 = -A_00 dA_00

|E| is summed over blocks; a rule's loss is what lies outside of its span. An integer program
chooses a rule for each head, at most two a layer, within a density at every length; of its Pareto
front over the lengths, the plan with the least loss at another length is taken.

Source: Mixture of Attention Spans, arXiv 2406.14909. One rule for each *key* head, whose influence
is the largest of its query heads': the reference copies keys for every query head instead.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped
from tqdm.auto import tqdm

from effjax import capture, testing
from effjax.calibration import Answers
from effjax.context import CacheLength, State
from effjax.fields import Checked, Count, NotNegative, Range, Share
from effjax.forward import Forward, Params, flatten_params, nest_params
from effjax.generate import generate
from effjax.layers.attention import CausalCore, Heads, KeyHeads, Positions
from effjax.layers.cache_quantization import FLOAT, Bits, pack, to_qvalues
from effjax.layers.kv_cache import (
    Caches,
    Kind,
    KVCache,
    Lengths,
    foresee,
    left_aligned,
    lengths_after,
    put,
    ring_positions,
    ring_slot,
    take,
)
from effjax.quant import QTensor
from effjax.search.allocation import Allocation, Budget, allocate
from effjax.storage import read_json
from effjax.transform import Method, Pair, Plan, Shorthand, Transform
from pallas_kernels.block_mask import SinkLocal
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.decode_attention import (
    decode_attention,
    flat_decode_attention,
    quantized_decode_attention,
)

Rule = tuple[float, float]  # alpha and beta
Rules = tuple[tuple[float, ...], ...]

SlotLayout = Literal["flat", "grouped"]
LAYOUTS = get_args(SlotLayout)


@dataclasses.dataclass(frozen=True)
class MoAPlan(Plan):
    """Spans of all key heads.

    Attributes:
        alphas: tokens, by layer and key head.
        betas: shares of a text, by layer and key head.
        block: tokens of a block: what spans are rounded up to.
        sink: first tokens that every head keeps.
        floor: the least number of slots.
        layout: "flat" or "grouped".
        bits: of keys and values in their slots: 16 (floats), 8 or 4.
    """

    alphas: Rules
    betas: Rules
    block: Count = 64
    sink: Count = 64
    floor: Count = 128
    layout: SlotLayout = "flat"
    bits: Bits = FLOAT

    def __post_init__(self) -> None:
        super().__post_init__()
        shapes = [[len(row) for row in table] for table in (self.alphas, self.betas)]
        if not shapes[0] or shapes[0] != shapes[1]:
            raise ValueError(
                f"alphas and betas must name the same heads, layer by layer; alphas have "
                f"{shapes[0]} heads and betas {shapes[1]}"
            )
        if self.sink % self.block or self.floor % self.block:
            raise ValueError(
                f"sink and floor must be multiples of the block; got block={self.block}, "
                f"sink={self.sink}, floor={self.floor}"
            )
        if any(beta < 0 for row in self.betas for beta in row):
            raise ValueError(
                f"betas are shares of a text, 0 or more, since spans do not shrink as it grows; "
                f"the least one is {min(min(row) for row in self.betas if row)}"
            )
        if self.floor <= self.sink:
            raise ValueError(
                f"floor={self.floor} leaves no slot beside sink={self.sink}: take at least "
                f"{self.sink + self.block}"
            )

    def slots(self, layer: int, tokens: int) -> tuple[int, ...]:
        """Slots C of every key head of a layer, for texts of so many tokens.

        Raises:
            ValueError: if a rule gives no span at this length.
        """
        rules = self.rules(layer)
        for head, (alpha, beta) in enumerate(rules):
            if alpha + beta * tokens <= 0:
                raise ValueError(
                    f"layer {layer}, head {head}: {alpha} + {beta} x {tokens} tokens is no span; "
                    f"this plan is for longer texts"
                )
        return tuple(int(self.span(rule, np.asarray(tokens))) for rule in rules)

    def rules(self, layer: int) -> tuple[Rule, ...]:
        """alpha and beta of every key head of a layer."""
        return tuple(zip(self.alphas[layer], self.betas[layer], strict=True))

    def span(self, rule: Rule, tokens: np.ndarray) -> np.ndarray:
        """Slots C of a head, for texts of so many tokens; `floor` where its rule gives no span."""
        alpha, beta = rule
        kept = np.minimum((alpha + beta * tokens).astype(int), tokens)
        return np.asarray(-(-np.maximum(kept, self.floor) // self.block) * self.block)

    def check_length(self, tokens: int) -> None:
        """Raise ValueError if some head has no span in a text that ends after so many tokens."""
        for layer in range(len(self.alphas)):
            self.slots(layer, tokens)

    def describe(self) -> str:
        """How many heads follow which rule, and bits if slots hold quantized values."""
        counts: dict[tuple[float, float], int] = {}
        for layer in range(len(self.alphas)):
            for rule in self.rules(layer):
                counts[rule] = counts.get(rule, 0) + 1
        listed = sorted(counts.items(), key=lambda item: -item[1])
        told = [f"{n} heads {alpha:g} + {beta:g} N" for (alpha, beta), n in listed]
        return ", ".join(told + [f"{self.bits} bits"] * (self.bits != FLOAT))


def uniform(layers: int, heads: int, *, alpha: float = 0.0, beta: float = 0.5) -> MoAPlan:
    """One rule for all heads: the baseline, StreamingLLM at the same density.

    Args:
        layers, heads: attention layers of the model, and key heads of each.
        alpha: tokens of every span.
        beta: share of a text that every span takes beside them.
    """
    return MoAPlan(((float(alpha),) * heads,) * layers, ((float(beta),) * heads,) * layers)


def read_released(source: str | os.PathLike | Mapping[str, Any], **options: Any) -> MoAPlan:
    """A plan from a published `moa_alpha_beta.json`: lists `alphas`, `betas` by layer and head.

    Args:
        source: the file, or what it holds.
        options: other fields of the plan.

    Raises:
        ValueError: if it holds something else.
    """
    held = source if isinstance(source, Mapping) else read_json(Path(source))
    if not {"alphas", "betas"} <= set(held):
        raise ValueError(f"a released plan has alphas and betas, this one has {sorted(held)}")
    tables = {}
    for name in ("alphas", "betas"):
        table = held[name]
        if not isinstance(table, list) or not all(isinstance(row, list) for row in table):
            raise ValueError(
                f"{name} of a released plan must be lists [layer][head], got {table!r}"
            )
        tables[name] = tuple(map(tuple, table))
    return MoAPlan(tables["alphas"], tables["betas"], **options)


# A text's tokens int32[n, N], and how much predicting each of them counts, float32[n, N].
Samples = tuple[np.ndarray, np.ndarray]


def search(
    forward: Forward,
    params: Params,
    samples: Mapping[int, Samples],
    *,
    validation: Samples,
    density: float = 0.5,
    extend: Sequence[int] = (),
    rules: Sequence[Rule] | None = None,
    distinct: int = 2,
    block: int = 64,
    sink: int = 64,
    floor: int = 128,
    time_limit: float = 60.0,
    progress: bool = True,
) -> MoAPlan:
    """The plan of a density with the least loss at a length that it was not made for.

    Args:
        forward, params: a model without a cache.
        samples: by length; weights are 1 for tokens of answers (by the dense model itself, far from
            what they depend on) and 0 for others.
        validation: samples of another length.
        density: the most that heads keep of a text, on average, at every length.
        extend: lengths at which the density holds too, without samples.
        rules: candidates (alpha, beta); `rule_grid` of the lengths if None.
        distinct: rules in a layer.
        block, sink, floor: of the plan; for short texts all smaller.
        time_limit: seconds for each integer program.
        progress: show a bar over samples and programs.

    Raises:
        ValueError: if no choice of rules has the density at all lengths.
    """
    options = {"block": block, "sink": sink, "floor": floor}
    plans = candidates(
        {
            n: influence(forward, params, own, block=block, progress=progress)
            for n, own in samples.items()
        },
        density=density,
        extend=extend,
        rules=rules,
        distinct=distinct,
        time_limit=time_limit,
        progress=progress,
        **options,
    )
    losses = [response_loss(*transform(plan)(forward, params), validation) for plan in plans]
    return plans[int(np.argmin(losses))]


@dataclasses.dataclass(frozen=True)
class Goals(Checked):
    """What a search aims at.

    Attributes:
        density: the most that heads keep of a sequence, on average, at every length.
        lengths: of the sequences; the longest one validates.
    """

    density: Annotated[float, Range(0, 1, above=True)] = 0.5
    lengths: tuple[Count, ...] = (256, 512, 704)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.lengths)) < 2:
            raise ValueError(
                f"give two lengths or more, the longest to validate; got {list(self.lengths)}"
            )
        if wrong := [length for length in self.lengths if length % self.block]:
            raise ValueError(f"lengths must be multiples of {self.block} tokens, got {wrong}")

    @property
    def block(self) -> int:
        """Tokens of a block: fewer for short sequences."""
        return 64 if min(self.lengths) >= 2048 else 16


def _search(goals: Goals, forward: Forward, params: Params, data: Answers) -> MoAPlan:
    *profiled, validated = sorted(set(goals.lengths))
    block = goals.block
    validation = data.draw(validated, data.count, data.seed + 1)  # the longest, or none fit
    return search(
        forward,
        params,
        {length: data.draw(length, data.count, data.seed) for length in profiled},
        validation=validation,
        density=goals.density,
        extend=[validated],
        rules=rule_grid(profiled, [validated], step=max(min(profiled) // 4, block)),
        block=block,
        sink=block,
        floor=2 * block,
    )


@dataclasses.dataclass(frozen=True)
class Uniform(Shorthand):
    """One rule for all heads: StreamingLLM at the same density.

    Attributes:
        alpha: tokens of every span.
        beta: share of a sequence that every span takes beside them.
    """

    alpha: NotNegative = 0.0
    beta: Share = 0.5

    def plan(self, forward: Forward, params: Params) -> MoAPlan:
        config = forward.config
        return uniform(config.num_layers, config.num_kv_heads, alpha=self.alpha, beta=self.beta)


def answered(forward: Forward, params: Params, prompts: Sequence[Any], *, new: int) -> Samples:
    """Samples of prompts: each with what the model itself answers, which alone counts.

    Args:
        forward, params: the dense model.
        prompts: token ids of one length, long ones with a question about what stands far back.
        new: tokens of an answer; with those of a prompt a multiple of the block.

    Raises:
        ValueError: for prompts of several lengths.
    """
    lengths = sorted({len(prompt) for prompt in prompts})
    if len(lengths) != 1:
        raise ValueError(f"samples are of one length, prompts have {lengths} tokens")
    made = generate(forward, params, prompts, max_new_tokens=new)
    tokens = np.concatenate([np.asarray(prompts, np.int32), made.tokens], axis=1)
    weights = np.broadcast_to(np.arange(tokens.shape[1]) >= lengths[0], tokens.shape)
    return tokens, weights.astype(np.float32)


def rule_grid(
    profile: Sequence[int], extend: Sequence[int] = (), *, step: int = 1024, shares: int = 9
) -> tuple[Rule, ...]:
    """Candidates (alpha, beta) that give a span, and none beyond the text, at all lengths.

    Args:
        profile, extend: lengths with and without samples.
        step: between alphas, in tokens.
        shares: number of betas, 0 ... 1.
    """
    lengths = (*profile, *extend)
    least, most, longest = min(lengths), max(profile), max(lengths)
    alphas = np.linspace(-least, most, (most + least) // step + 1)
    grid = [
        (float(alpha), float(beta))
        for alpha in alphas
        for beta in np.linspace(0, 1, shares)
        if alpha + beta * most <= most
        and alpha + beta * longest <= longest
        and alpha + beta * least > 0
    ]
    return tuple(sorted(grid, key=lambda rule: rule[0] + rule[1] * longest))


def influence(
    forward: Forward, params: Params, samples: Samples, *, block: int, progress: bool = True
) -> np.ndarray:
    """What masking would cost, summed over blocks and averaged over samples.

    Args:
        samples: of one length, a multiple of the block.

    Returns:
        float64[layers, key heads, M, M] for blocks of queries and keys.

    Raises:
        ValueError: for a length that blocks do not divide.
    """
    tokens, weights = samples
    if tokens.shape[1] % block:
        raise ValueError(f"texts of {tokens.shape[1]} tokens are no whole blocks of {block}")
    paths = [target.path for target in forward.target_modules(params, CausalCore)]
    total = 0.0
    for row in tqdm(range(len(tokens)), desc="influence", disable=not progress, leave=False):
        found = _influence(forward, params, tokens[row : row + 1], weights[row : row + 1], block)
        total = total + np.stack([np.asarray(found[path], np.float64) for path in paths])
    return np.asarray(total) / len(tokens)


@partial(jax.jit, static_argnums=4)
def _influence(
    forward: Forward, params: Params, tokens: Array, weights: Array, block: int
) -> dict[str, Array]:
    def loss(logits: Array) -> Array:
        return _loss(logits, tokens, weights)

    options: Any = {"kind": CausalCore}
    gradients = capture.gradients(forward, params, loss, (tokens,), **options)
    q, k, v, out = (
        capture.tap(forward, params, (tokens,), what=what, **options)
        for what in ("input", "input1", "input2", "output")
    )
    cores: Any = {
        target.path: target.module for target in forward.target_modules(params, CausalCore)
    }
    turns = jnp.arange(tokens.shape[1])[None]
    return {
        path: _blocks(
            core.rotary(q[path], turns)[0],
            core.rotary(k[path], turns)[0],
            v[path][0],
            out[path][0],
            gradients[path][0],
            block,
        )
        for path, core in cores.items()
    }


def _blocks(
    q: Float[Array, "S H D"],
    k: Float[Array, "S K D"],
    v: Float[Array, "S K D"],
    out: Float[Array, "S H D"],
    gradient: Float[Array, "S H D"],
    block: int,
) -> Float[Array, "K M M"]:
    """|E| summed over blocks, one block of queries after the other."""
    columns, kv_heads, width = k.shape
    q, k, v, out, gradient = (x.astype(jnp.float32) for x in (q, k, v, out, gradient))
    group = q.shape[1] // kv_heads

    def rows(start: Array) -> Array:
        own_q, own_out, own_gradient = (
            jax.lax.dynamic_slice_in_dim(x, start, block).reshape(block, kv_heads, group, -1)
            for x in (q, out, gradient)
        )
        row = start + jnp.arange(block)[:, None]
        seen = (jnp.arange(columns) <= row)[None, None]
        logits = jnp.einsum("skgd,tkd->kgst", own_q, k) * width**-0.5
        weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
        slopes = jnp.einsum("skgd,tkd->kgst", own_gradient, v)
        mean = jnp.einsum("skgd,skgd->kgs", own_gradient, own_out)[..., None]
        masked = weights * (mean - slopes) / (1 - weights + jnp.finfo(jnp.float32).eps)
        # The first row has one element, and nothing to take its weight.
        masked = jnp.where(row[None, None] == 0, -weights * slopes, masked)
        sums = jnp.where(seen, jnp.abs(masked), 0.0).reshape(kv_heads, group, block, -1, block)
        return jnp.max(jnp.sum(sums, axis=(2, 4)), axis=1)

    return jax.lax.map(rows, jnp.arange(0, columns, block)).swapaxes(0, 1)


def candidates(
    profiles: Mapping[int, np.ndarray],
    *,
    block: int = 64,
    sink: int = 64,
    floor: int = 128,
    density: float = 0.5,
    extend: Sequence[int] = (),
    rules: Sequence[Rule] | None = None,
    distinct: int = 2,
    cells: int = 4,
    time_limit: float = 60.0,
    progress: bool = True,
) -> tuple[MoAPlan, ...]:
    """Plans of which none is better than another at all lengths.

    One length's loss is minimized while those of the others lie in cells of their ranges, for all
    lengths and cells.

    Args:
        profiles: `influence` by length.
        cells: into which the range of each loss is cut.
        block, sink, floor, density, extend, rules, distinct, time_limit, progress: as in `search`.

    Raises:
        ValueError: if no choice of rules has the density at all lengths.
    """
    lengths = sorted(profiles)
    layers, heads = profiles[lengths[0]].shape[:2]
    rules = tuple(rules or rule_grid(lengths, extend))
    losses = {n: _losses(profiles[n], rules, block=block, sink=sink) for n in lengths}
    budgets = []
    for n in (*lengths, *extend):
        row = [n * _kept(rule, n, block=block, sink=sink) * block / n for rule in rules]
        high = density * n * layers * heads
        costs = np.tile(row, (layers * heads, 1))
        budgets.append(Budget(costs, high, 0.9 * high, f"density {density:g} at {n} tokens"))
    families = np.arange(layers).repeat(heads).tolist()

    def best(n: int, limits: Sequence[Budget]) -> Allocation:
        return allocate(
            -losses[n],
            [*budgets, *limits],
            families=families,
            distinct=distinct,
            time_limit=time_limit,
        )

    def totals(choice: Sequence[int]) -> tuple[float, ...]:
        return tuple(float(losses[n][np.arange(len(choice)), choice].sum()) for n in lengths)

    found = {best(n, ()).choice for n in lengths}
    table = np.array([totals(choice) for choice in found])
    edges = [np.linspace(low, high, cells + 1) for low, high in zip(table.min(0), table.max(0))]
    programs = [
        (primary, cell)
        for primary in range(len(lengths))
        for cell in itertools.product(range(cells), repeat=len(lengths) - 1)
        if len(lengths) > 1
    ]
    for primary, cell in tqdm(programs, desc="plans", disable=not progress, leave=False):
        others = [i for i in range(len(lengths)) if i != primary]
        limits = [
            Budget(losses[lengths[i]], edges[i][c + 1], edges[i][c], f"loss at {lengths[i]}")
            for i, c in zip(others, cell, strict=True)
        ]
        with contextlib.suppress(ValueError, TimeoutError):  # nothing lies in this cell
            found.add(best(lengths[primary], limits).choice)
    scored = {choice: totals(choice) for choice in found}
    front = [
        choice
        for choice, own in scored.items()
        if not any(
            all(a <= b for a, b in zip(other, own)) and other != own for other in scored.values()
        )
    ]
    return tuple(
        MoAPlan(
            *(
                tuple(
                    tuple(rules[choice[layer * heads + head]][part] for head in range(heads))
                    for layer in range(layers)
                )
                for part in range(2)
            ),
            block=block,
            sink=sink,
            floor=floor,
        )
        for choice in sorted(front, key=lambda choice: scored[choice])
    )


def _kept(rule: Rule, tokens: int, *, block: int, sink: int) -> int:
    """Blocks that the last query block keeps: the sinks' and the span's."""
    alpha, beta = rule
    blocks = tokens // block
    local = max(int(alpha // block + beta * blocks), 1)
    return min(local + sink // block, blocks)


def _losses(profile: np.ndarray, rules: Sequence[Rule], *, block: int, sink: int) -> np.ndarray:
    """What lies outside of each rule's blocks: float[layers * heads, rules]."""
    blocks = profile.shape[-1]
    i, j = np.arange(blocks)[:, None], np.arange(blocks)[None]
    table = []
    for alpha, beta in rules:
        local = max(int(alpha // block + beta * blocks), 1)
        outside = (j <= i) & (j >= sink // block) & (i - j >= local)
        table.append(np.sum(profile, axis=(2, 3), where=outside).reshape(-1))
    return np.stack(table, axis=1)


def response_loss(forward: Forward, params: Params, samples: Samples) -> float:
    """Weighted mean of the negative log-likelihoods of texts, read at once under a plan's mask."""
    tokens, weights = samples
    losses = [
        float(_response_loss(forward, params, tokens[row : row + 1], weights[row : row + 1]))
        for row in range(len(tokens))
    ]
    return float(np.mean(losses))


@jax.jit
def _response_loss(forward: Forward, params: Params, tokens: Array, weights: Array) -> Array:
    forward = forward.with_cache_length(tokens.shape[1], 0)
    token = jnp.zeros((tokens.shape[0], 1), jnp.int32)
    state = forward.init(params, token, token)
    return _loss(forward(params, state, tokens)[0], tokens, weights)


def _loss(logits: Array, tokens: Array, weights: Array) -> Array:
    scores = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32), axis=-1)
    scores = jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
    counted = weights[:, 1:].astype(jnp.float32)
    return -jnp.sum(scores * counted) / jnp.maximum(jnp.sum(counted), 1e-9)


def transform(plan: MoAPlan) -> Transform:
    """Give every attention layer heads of their own spans."""

    def apply(forward: Forward, params: Params) -> Pair:
        config = forward.config
        _check(plan, config.num_layers, config.num_heads, config.num_kv_heads)
        return forward.patch(Caches(_choose, plan)), params

    return Transform(METHOD.name, plan, apply)


def order_heads(
    plan: MoAPlan, forward: Forward, params: Params, *, tokens: int, devices: int = 1
) -> tuple[MoAPlan, Params]:
    """The same model and plan with each layer's key heads in another order, query heads with them.

    For the layout "grouped". On one device heads that have equally many slots stand side by side,
    so that no cache gathers them. For several devices, each of which holds as many heads one after
    the other, the devices' sums of slots are balanced: the largest heads go first, each to the
    device that has the least.

    Args:
        forward, params: a model whose projections are floats.
        tokens: the length that slots are counted for.
        devices: that share the heads.

    Raises:
        ValueError: if devices do not divide the key heads, or projections are quantized already.
    """
    config = forward.config
    kv_heads, group = config.num_kv_heads, config.num_heads // config.num_kv_heads
    _check(plan, config.num_layers, config.num_heads, kv_heads)
    if devices < 1 or kv_heads % devices:
        raise ValueError(f"{kv_heads} key heads cannot be shared evenly by {devices} devices")
    flat, alphas, betas = flatten_params(params), [], []
    for layer in range(config.num_layers):
        order = _order(plan.slots(layer, tokens), plan.rules(layer), devices)
        alphas.append(tuple(plan.alphas[layer][head] for head in order))
        betas.append(tuple(plan.betas[layer][head] for head in order))
        queries = (np.asarray(order)[:, None] * group + np.arange(group)).reshape(-1)
        for name, heads in {"q": queries, "k": order, "v": order, "out": queries}.items():
            for part in ("kernel", "bias"):
                path = f"blocks.{layer}.attn.to_{name}.{part}"
                if path not in flat or (name == "out" and part == "bias"):
                    continue
                if isinstance(flat[path], QTensor):
                    raise ValueError(f"{path} is quantized: order the heads before")
                axis = 0 if name == "out" else -1
                flat[path] = _reordered(flat[path], np.asarray(heads), axis)
    return dataclasses.replace(plan, alphas=tuple(alphas), betas=tuple(betas)), nest_params(flat)


def _order(slots: Sequence[int], rules: Sequence[Rule], devices: int) -> list[int]:
    """Heads in their new order: by device, and in each by slots and rules."""
    cache_length = len(slots) // devices
    held: list[list[int]] = [[] for _ in range(devices)]
    for head in sorted(range(len(slots)), key=lambda head: -slots[head]):
        free = [own for own in held if len(own) < cache_length]
        min(free, key=lambda own: sum(slots[each] for each in own)).append(head)
    return [
        head
        for own in held
        for head in sorted(own, key=lambda head: (slots[head], rules[head], head))
    ]


def _reordered(x: Array, heads: np.ndarray, axis: int) -> Array:
    """An array with its heads, which lie side by side on an axis, in this order."""
    parts = jnp.stack(jnp.split(x, len(heads), axis=axis))
    return jnp.concatenate(list(parts[heads]), axis=axis)


def _check(plan: MoAPlan, layers: int, heads: int, kv_heads: int) -> None:
    given = [len(row) for row in plan.alphas]
    if len(given) == layers and set(given) == {kv_heads}:
        return
    hint = ""
    if set(given) == {heads}:
        hint = (
            f" It has a rule for each query head; {heads // kv_heads} query heads share a key head "
            f"here, and with it a rule."
        )
    raise ValueError(
        f"the plan is for {len(given)} layers of {sorted(set(given))} heads, the model has "
        f"{layers} layers of {kv_heads} key heads.{hint}"
    )


def _choose(plan: MoAPlan, core: CausalCore, cache_length: CacheLength, layer: int) -> Kind:
    options = {"layer": layer, "plan": plan}
    return {"grouped": GroupedCache, "flat": FlatCache}[plan.layout], options


@lru_cache(maxsize=1024)
def _lengths_of_blocks(plan: MoAPlan, rule: Rule, most: int) -> np.ndarray:
    """The least length, up to `most`, at which a head has each of its blocks beyond the floor."""
    slots = plan.span(rule, np.arange(most + 1))
    blocks = np.arange(plan.floor, slots[-1], plan.block)
    return np.searchsorted(slots, blocks, side="right").astype(np.int32)


class SpanCache(KVCache):
    """Heads with sinks and rings of their own sizes: what both layouts share.

    A row uses as many of its slots as a text of its length has.

    Args:
        plan, layer: whose rules they are.
    """

    def __init__(
        self, inner: Any, *, plan: MoAPlan, layer: int, first: bool, cache_length: CacheLength
    ):
        super().__init__(inner, first=first, cache_length=cache_length)
        self.plan = plan
        self.layer = layer
        self.rules = plan.rules(layer)
        self.slots = plan.slots(layer, cache_length.total)
        self.foreseen = State()
        self.sink = plan.sink
        self.bits = plan.bits
        parts = ("",) if self.bits == FLOAT else ("", "_scale", "_offset")
        self.names = tuple(f"{of}{part}" for of in "kv" for part in parts)

    @property
    def multi_token_append(self) -> bool:
        return False

    @property
    def rollback(self) -> bool:
        return False

    @property
    def exact_chunked_prefill(self) -> bool:
        return False

    def used(self, batch: int) -> dict[Rule, Lengths]:
        """Slots that heads use in every row, by their rule."""
        tokens = self.foreseen.read((batch,), jnp.int32)[:, None]
        found = {}
        for rule in dict.fromkeys(self.rules):
            lengths = jnp.asarray(_lengths_of_blocks(self.plan, rule, self.cache_length.total))
            blocks = jnp.sum(tokens >= lengths, axis=1, dtype=jnp.int32)
            found[rule] = self.plan.floor + self.plan.block * blocks
        return found

    def store(
        self, q: Heads, k: KeyHeads, v: KeyHeads, x: Float[Array, "B S C"], positions: Positions
    ) -> None:
        foresee(self.foreseen, positions, self.cache_length)
        self.fill(self.quantized(self.core.rotary(k, positions), v), positions)

    @abc.abstractmethod
    def fill(self, new: dict[str, Shaped[Array, "B S K ..."]], positions: Positions) -> None:
        """Store what slots hold of a text's first tokens."""

    def quantized(self, k: KeyHeads, v: KeyHeads) -> dict[str, Shaped[Array, "B S K ..."]]:
        """What slots hold of tokens, keys rotated, by name."""
        if self.bits == FLOAT:
            return {"k": k, "v": v}
        found = {}
        for name, x in (("k", k), ("v", v)):
            qvalues, scale, offset = to_qvalues(x, self.bits, axis=3)
            found[name] = pack(qvalues, self.bits)
            found |= {f"{name}_scale": scale, f"{name}_offset": offset}
        return found

    def attend_prompt(
        self,
        q: Heads,
        k: KeyHeads,
        v: KeyHeads,
        x: Float[Array, "B S C"],
        positions: Positions | None,
    ) -> Heads:
        """Attend within spans of whole blocks."""
        batch, columns, heads, _ = q.shape
        lengths, group = np.arange(columns + 1), heads // k.shape[2]
        if all((self.plan.span(rule, lengths) >= lengths).all() for rule in self.rules):
            return super().attend_prompt(q, k, v, x, positions)

        def rule(slots: tuple[int, ...]) -> SinkLocal:
            local = tuple(each - self.sink for each in slots for _ in range(group))
            return SinkLocal(self.sink, local, granularity=self.plan.block)

        turns = jnp.arange(columns)[None] if positions is None else positions
        q, k = self.core.rotary(q, turns), self.core.rotary(k, turns)
        with jax.named_scope("attention"):
            if positions is None:
                slots = self.plan.slots(self.layer, columns + self.cache_length.new)
                return block_sparse_attention(q, k, v, rule(slots))
            used = self.used(batch)
            local = jnp.stack([used[each] - self.sink for each in self.rules], axis=1)
            spans = jnp.stack([jnp.full_like(local, self.sink), local], axis=2)
            # Blocks count from a text's first token, wherever its row begins.
            q, k, v = (left_aligned(part, positions) for part in (q, k, v))
            valid = (jnp.arange(columns) < lengths_after(positions)[:, None]).astype(jnp.int32)
            out = block_sparse_attention(
                *(q, k, v, rule(self.slots)),
                segments=(valid, valid),
                by_row=jnp.repeat(spans, group, axis=1),
            )
        places = jnp.maximum(positions, 0)[:, :, None, None]
        return jnp.take_along_axis(out, places, axis=1)

    def positions(self, lengths: Lengths) -> Int[Array, "B G C"]:
        """Heads with fewer slots than the most have -1 at the end."""
        used, most = self.used(lengths.shape[0]), max(self.slots)
        held = [
            ring_positions(lengths, self.sink, used[rule] - self.sink, slots=most)
            for rule in self.rules
        ]
        return jnp.stack(held, axis=1)

    def filled(self, lengths: Lengths) -> Float[Array, ""]:
        slots = lengths.shape[0] * sum(self.slots)
        return jnp.sum(self.positions(lengths) >= 0).astype(jnp.float32) / slots


class GroupedCache(SpanCache):
    """Arrays [B, C, heads, ...] for the heads that have one rule, and so equally many slots."""

    def __init__(self, inner: Any, **options: Any):
        super().__init__(inner, **options)
        kinds = sorted(set(zip(self.slots, self.rules, strict=True)))
        self.groups = tuple(
            (slots, rule, tuple(head for head, each in enumerate(self.rules) if each == rule))
            for slots, rule in kinds
        )
        for name in self.names:
            setattr(self, name, nnx.List([State() for _ in kinds]))

    def fill(self, new: dict[str, Shaped[Array, "B S K ..."]], positions: Positions) -> None:
        lengths = lengths_after(positions)
        used = self.used(lengths.shape[0])
        for group, (slots, rule, heads) in enumerate(self.groups):
            held = ring_positions(lengths, self.sink, used[rule] - self.sink, slots=slots)
            for name, part in new.items():
                own = part[:, :, _of_heads(heads)]
                getattr(self, name)[group].write(take(own, positions, held))

    def append(
        self, q: Heads, k: KeyHeads, v: KeyHeads, x: Float[Array, "B S C"], positions: Positions
    ) -> Heads:
        q = self.core.rotary(q, positions)
        new, lengths = self.quantized(self.core.rotary(k, positions), v), lengths_after(positions)
        batch, _, heads, width = q.shape
        q = q.reshape(batch, 1, k.shape[2], -1, width)
        parts, order, used = [], [], self.used(batch)
        for group, (slots, rule, own) in enumerate(self.groups):
            chosen, held = _of_heads(own), {}
            place = ring_slot(positions, self.sink, (used[rule] - self.sink)[:, None])
            for name, part in new.items():
                state, part = getattr(self, name)[group], part[:, :, chosen]
                old = state.read((batch, slots, *part.shape[2:]), part.dtype)
                held[name] = put(old, part, place)
                state.write(held[name])
            attend = decode_attention if self.bits == FLOAT else quantized_decode_attention
            valid = jnp.minimum(lengths, used[rule])
            out = attend(q[:, :, chosen].reshape(batch, 1, -1, width), lengths=valid, **held)
            assert isinstance(out, jax.Array)
            parts.append(out.reshape(batch, 1, len(own), -1, v.shape[3]))
            order += own
        out = jnp.concatenate(parts, axis=2)
        if order != sorted(order):
            out = out[:, :, jnp.argsort(jnp.asarray(order))]
        return out.reshape(batch, 1, heads, -1)


def _of_heads(heads: tuple[int, ...]) -> slice | Array:
    """Heads as an index: a slice if they stand side by side."""
    if heads == tuple(range(heads[0], heads[-1] + 1)):
        return slice(heads[0], heads[-1] + 1)
    return jnp.asarray(heads)


class FlatCache(SpanCache):
    """Arrays [B, sum of C, ...] with a stretch of slots for each head."""

    def __init__(self, inner: Any, **options: Any):
        super().__init__(inner, **options)
        self.start = tuple(sum(self.slots[:head]) for head in range(len(self.slots)))
        for name in self.names:
            setattr(self, f"{name}_slots", State())

    def fill(self, new: dict[str, Shaped[Array, "B S K ..."]], positions: Positions) -> None:
        lengths = lengths_after(positions)
        used = self.used(lengths.shape[0])
        held = [
            ring_positions(lengths, self.sink, used[rule] - self.sink, slots=slots)
            for rule, slots in zip(self.rules, self.slots, strict=True)
        ]
        for name, part in new.items():
            own = [take(part[:, :, head], positions, each) for head, each in enumerate(held)]
            getattr(self, f"{name}_slots").write(jnp.concatenate(own, axis=1))

    def append(
        self, q: Heads, k: KeyHeads, v: KeyHeads, x: Float[Array, "B S C"], positions: Positions
    ) -> Heads:
        q, k = self.core.rotary(q, positions), self.core.rotary(k, positions)
        used = self.used(q.shape[0])
        own = [
            ring_slot(positions, self.sink, (used[rule] - self.sink)[:, None]) + start
            for rule, start in zip(self.rules, self.start, strict=True)
        ]
        places, held = jnp.where(positions >= 0, jnp.concatenate(own, axis=1), -1), {}
        slots = jnp.stack([used[rule] for rule in self.rules], axis=1)
        for name, new in self.quantized(k, v).items():
            state = getattr(self, f"{name}_slots")
            old = state.read((new.shape[0], sum(self.slots), new.shape[3]), new.dtype)
            held[name] = put(old, new[:, 0], places)
            state.write(held[name])
        out = flat_decode_attention(
            q,
            lengths=jnp.minimum(lengths_after(positions)[:, None], slots),
            head_start=self.start,
            head_capacity=self.slots,
            **held,
        )
        assert isinstance(out, jax.Array)
        return out


def _plan(subject: testing.Subject, *betas: float) -> MoAPlan:
    """Rules that differ by head, for short texts."""
    config = subject.forward.config
    row = tuple(betas[head % len(betas)] for head in range(config.num_kv_heads))
    table = (row,) * config.num_layers
    return MoAPlan(((0.0,) * len(row),) * len(table), table, block=2, sink=2, floor=4)


def _identity(subject: testing.Subject) -> MoAPlan:
    return _plan(subject, 1.0)


def _ladder(subject: testing.Subject) -> tuple[MoAPlan, ...]:
    return tuple(_plan(subject, *betas) for betas in ((1.0, 0.5), (0.5, 0.7), (0.2, 0.5)))


METHOD = Method(
    name="moa",
    paper="Mixture of Attention Spans: Optimizing LLM Inference Efficiency with Heterogeneous "
    "Sliding-Window Lengths, arXiv 2406.14909",
    seams=("patches",),
    domain="language models",
    plan=MoAPlan,
    transform=transform,
    identity=_identity,
    ladder=_ladder,
    tiny=testing.tiny_llama,
    systems=("MoA",),
    shorthands=(Uniform,),
    data=Answers,
    goals=Goals,
    search=_search,
)
