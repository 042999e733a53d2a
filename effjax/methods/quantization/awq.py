"""AWQ: channels that carry large inputs are scaled up before weights are rounded.

Use it for weights of 3 and 4 bits. The error is smaller where inputs are large, and it costs
nothing when the model runs: the factors stand in the norm or the layer that makes the inputs. It
needs a few sequences of tokens, or samples of a model of images, to calibrate on.

    s = max(mean|x|^a, 1e-4) / sqrt(max s min s)          for a = 0, 1/n, ... (n - 1)/n
    loss(a) = |f(x; W) - f(x; Q(s W) / s)|^2              Q rounds to nearest
    W -> Q(s W),   what makes x -> divided by s           for the a of the least loss

f is the module that holds all layers that read the same inputs, with all other inputs that it has:
the attention for queries, keys and values, the feed-forward for its first layers, otherwise one
layer. Losses are those of the float model. Scaling does not change what that model computes, so the
choices do not depend on each other.

Bits and groups are static; quantized values and scales are learned.

Cost: as `round_to_nearest`. To make, n runs of f.

Source: AWQ, arXiv 2306.00978, without clipping. Output projections behind grouped keys have no
place for factors, and are rounded as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from effjax import testing
from effjax.calibration import Sequences, Trajectory
from effjax.capture import Call, calls
from effjax.context import Layout, PyTree, tokens_as
from effjax.fields import Count
from effjax.forward import METHODS, Forward, Params, flatten_params, nest_params
from effjax.layers.folding import Fold, check_untouched, fits, fold, folds
from effjax.layers.linear import Linear
from effjax.methods.quantization.blocks import (
    Batches,
    BlockInputs,
    inputs_of,
    valid_rows,
    walk,
    with_kernels,
)
from effjax.methods.quantization.round_to_nearest import RoundToNearestPlan
from effjax.quant import FLOAT, QTensor, Quantizer, fake_quantize
from effjax.quant.notation import read_bits
from effjax.targets import BLOCK_LAYERS, TargetModule, Wrapper, target_modules, wrap
from effjax.transform import Method, Pair, Shorthand, Transform

Scales = Mapping[str, Array]  # s [I] by the path of what makes the inputs


@dataclasses.dataclass(frozen=True)
class AWQPlan(RoundToNearestPlan):
    """Bits of linear layers."""

    fold: ClassVar[bool] = True  # scales stand in what makes the inputs

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_tokens_range_themselves()


def uniform(weights: int, inputs: int = FLOAT, *, group_size: int | None = None) -> AWQPlan:
    """The plan that gives attention and feed-forward layers these bits.

    Args:
        weights: bits of weights, 2 ... 8.
        inputs: bits of inputs, 2 ... 8; 16 leaves them floats.
        group_size: consecutive inputs that share a scale; all of a channel if None.
    """
    return AWQPlan(((BLOCK_LAYERS, weights, inputs),), group_size)


def fit(
    plan: AWQPlan,
    forward: Forward,
    params: Params,
    batches: Batches,
    *,
    points: int = 20,
    progress: bool = True,
) -> dict[str, Array]:
    """Scales of the inputs, by the path of the norm or layer that makes them.

    How tokens are divided among batches does not matter, but for rounding. Padding does not count
    where the model says what it is (`Model.valid_tokens`).

    Args:
        forward, params: the model, not quantized.
        batches: tuples of the forward's inputs: token ids and positions of a language model
            (`blocks.texts` makes them of texts of any lengths), or what a sampler gives a diffusion
            model (`blocks.along`).
        points: n, how many exponents are tried.
        progress: show a bar over the blocks.

    Raises:
        ValueError: without batches, if a selector finds no layer, or a layer is quantized.
    """
    bits = plan.decided(forward, params, Linear)
    places = _places(plan, forward, params)
    exponents = jnp.arange(points) / points
    found: dict[str, Array] = {}

    def visit(block: TargetModule, batches: Sequence[BlockInputs]) -> dict[str, QTensor]:
        own = [each for each in places if each.source.startswith(f"{block.path}.")]
        if not own:
            return {}
        below = {target.path: target.module for target in target_modules(block.module)}
        here = {each.source: _within(each, block.path) for each in own}
        graph, variables = nnx.split(block.module)
        inputs = tuple((each.readers[0], _leading(each, below)) for each in here.values())
        seen = [
            _magnitudes(graph, each.layout, inputs, variables, each.inputs, each.valid)
            for each in batches
        ]
        sums = jax.tree.map(lambda *each: sum(each), *seen)
        means = {
            path: total / jnp.maximum(count, 1)[..., None] for path, (total, count) in sums.items()
        }
        candidates = {
            source: jax.vmap(partial(_scales, means[each.readers[0]]))(exponents)
            for source, each in here.items()
        }
        units = {source: _unit(each.readers, below) for source, each in here.items()}
        losses = {source: jnp.zeros(points) for source in here}
        for batch in batches:
            called = _called(graph, batch.layout, tuple(units.values()), variables, batch.inputs)
            for source, each in here.items():
                unit = units[source]
                readers = tuple(
                    (
                        reader.removeprefix(unit).removeprefix("."),
                        bits.get(f"{block.path}.{reader}"),
                    )
                    for reader in each.readers
                )
                losses[source] += _losses(
                    *(plan, readers, batch.layout, *nnx.split(below[unit])),
                    *(called[unit], batch.valid, candidates[source]),
                )
        for source, loss in losses.items():
            found[source] = candidates[source][int(np.argmin(loss))]
        return {}

    walk(forward, params, batches, visit, name="awq", progress=progress)
    return found


def _within(where: Fold, block: str) -> Fold:
    """A place by paths in its block."""
    cut = len(block) + 1
    readers = tuple(reader[cut:] for reader in where.readers)
    return dataclasses.replace(where, readers=readers, source=where.source[cut:])


def _leading(where: Fold, modules: Mapping[str, Any]) -> int:
    """How many leading axes the scales have: those of a stack of matrices that makes the inputs."""
    return modules[where.source].kernel.get_value().ndim - 2 if where.kind == "linear" else 0


def _unit(readers: Sequence[str], modules: Mapping[str, Any]) -> str:
    """The module whose outputs are compared: a single reader, or what holds all of them."""
    if len(readers) == 1:
        return readers[0]
    holders = [
        path
        for path, module in modules.items()
        if callable(module) and all(reader.startswith(f"{path}.") for reader in readers)
    ]
    if not holders:
        raise ValueError(
            f"no module of the block but itself holds {', '.join(readers)}, which read the same "
            f"inputs: put them in a module whose outputs can be compared"
        )
    return max(holders, key=len)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _magnitudes(
    graph: nnx.GraphDef,
    layout: Layout | None,
    layers: tuple[tuple[str, int], ...],
    variables: Any,
    inputs: tuple[PyTree, ...],
    valid: Array | None,
) -> dict[str, tuple[Array, Array]]:
    """Sums [*E, I] of |x| over the tokens' inputs of linear layers, and how many tokens, [*E].

    Args:
        layers: paths in the block, and how many leading axes are kept.
    """
    block = nnx.merge(graph, variables, copy=True)
    with tokens_as(layout):
        seen = calls(block, [path for path, _ in layers], *inputs)
    found = {}
    for path, leading in layers:
        (((x,), _),) = seen[path]
        values, counted = valid_rows(x, valid)
        axes = tuple(range(leading, x.ndim - 1))
        found[path] = jnp.sum(jnp.abs(values), axes), jnp.sum(counted, axes)
    return found


@partial(jax.jit, static_argnums=(0, 1, 2))
def _called(
    graph: nnx.GraphDef,
    layout: Layout | None,
    paths: tuple[str, ...],
    variables: Any,
    inputs: tuple[PyTree, ...],
) -> dict[str, Call]:
    """What modules of a block are called with."""
    block = nnx.merge(graph, variables, copy=True)
    with tokens_as(layout):
        return {path: call for path, (call,) in calls(block, paths, *inputs).items()}


def _scales(mean: Float[Array, "*E I"], exponent: Float[Array, ""]) -> Float[Array, "*E I"]:
    s = jnp.maximum(mean**exponent, 1e-4)
    most, least = (end(s, axis=-1, keepdims=True) for end in (jnp.max, jnp.min))
    return s / jnp.sqrt(most * least)


class _ReadsRounded(Wrapper):
    """A layer whose inputs are what their quantized values say."""

    def __init__(self, inner: nnx.Module, bits: int, scale: Array):
        super().__init__(inner)
        self.bits = bits
        self.scale = nnx.Variable(scale)

    def __call__(self, x: Array) -> Array:
        scale = self.scale.get_value().astype(x.dtype)
        scale = scale.reshape(*scale.shape[:-1], *(1,) * (x.ndim - scale.ndim), scale.shape[-1])
        quantized = fake_quantize(x / scale, Quantizer(self.bits), axes=-1)
        return self.inner((quantized * scale).astype(x.dtype))


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _losses(
    plan: AWQPlan,
    readers: tuple[tuple[str, tuple[int, int] | None], ...],
    layout: Layout | None,
    graph: nnx.GraphDef,
    variables: Any,
    call: Call,
    valid: Array | None,
    candidates: Float[Array, "N *E I"],
) -> Float[Array, " N"]:
    """Squared errors of what reads the scaled inputs, summed over tokens, for every candidate.

    Args:
        readers: paths within the module, "" for the module itself, and their bits of weights and
            inputs; None for layers that stay floats.
        layout: what the tokens are.
        graph, variables: the module whose outputs are compared.
        call: what it is called with.
        valid: which tokens count.
    """
    inputs, options = call

    def outputs(module: Any) -> list[Array]:
        with tokens_as(layout):
            out = module(*inputs, **options)
        return [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(out)]

    def loss(scale: Array) -> Array:
        module: Any = nnx.merge(graph, variables, copy=True)
        for path, bits in readers:
            if bits is None:
                continue
            layer = module
            for part in filter(None, path.split(".")):
                layer = layer[int(part)] if isinstance(layer, nnx.List) else getattr(layer, part)
            kernel = layer.kernel.get_value()
            scaled = kernel.astype(jnp.float32) * scale[..., None]
            rounded = plan.leaf((bits[0], FLOAT), scaled).restore() / scale[..., None]
            layer.kernel.set_value(rounded.astype(kernel.dtype))
            if bits[1] == FLOAT:
                continue
            if path == "":
                module = _ReadsRounded(module, bits[1], scale)
            else:
                wrap(module, path, _ReadsRounded, bits[1], scale)
        errors = [
            jnp.sum(jnp.mean(jnp.square(valid_rows(found - want, valid)[0]), axis=-1))
            for found, want in zip(outputs(module), exact, strict=True)
        ]
        return jnp.sum(jnp.stack(errors))

    exact = outputs(nnx.merge(graph, variables, copy=True))
    return jax.lax.map(loss, candidates)


def transform(plan: AWQPlan, learned: Scales | None = None) -> Transform:
    """Quantize a model's linear layers.

    Args:
        learned: scales from `fit`; None rounds to nearest, a baseline.

    Raises:
        ValueError: if a selector finds no layer, a layer is quantized already, or the scales
            belong to another model or plan.
    """

    def apply(forward: Forward, params: Params) -> Pair:
        if learned is not None:
            params = _scaled(plan, learned, forward, params)
        bits = plan.decided(forward, params, Linear)
        made = {path: partial(plan.leaf, own) for path, own in bits.items()}
        return forward, with_kernels(params, made)

    return Transform(METHOD.name, plan, apply)


def _scaled(plan: AWQPlan, learned: Scales, forward: Forward, params: Params) -> Params:
    """The same model, with other weights: what reads is scaled up, what makes the inputs down."""
    places = _places(plan, forward, params)
    flat = flatten_params({name: leaf for name, leaf in params.items() if name != METHODS})
    given = {path: scale.shape for path, scale in learned.items()}
    wanted = {each.source: _scale_shape(each, flat) for each in places}
    if given != wanted:
        raise ValueError(
            f"the scales are those of another model or plan: they are {given}, must be {wanted}"
        )
    for where in places:
        check_untouched(flatten_params(params.get(METHODS, {})), where)
        scale = learned[where.source]
        flat = fold(flat, where, 1 / scale)
        for reader in where.readers:
            name = f"{reader}.kernel"
            scaled = flat[name].astype(jnp.float32) * scale[..., None]
            flat[name] = scaled.astype(flat[name].dtype)
    return nest_params(flat) | {name: leaf for name, leaf in params.items() if name == METHODS}


def _scale_shape(where: Fold, flat: Mapping[str, Array]) -> tuple[int, ...]:
    leading = flat[f"{where.source}.kernel"].shape[:-2] if where.kind == "linear" else ()
    return (*leading, flat[f"{where.readers[0]}.kernel"].shape[-2])


def _places(plan: AWQPlan, forward: Forward, params: Params) -> list[Fold]:
    """Where scales can go, of layers of which some get quantized values."""
    bits = plan.decided(forward, params, Linear)
    flat = flatten_params({name: leaf for name, leaf in params.items() if name != METHODS})
    return [
        each
        for each in folds(forward.target_modules(params))
        if not set(each.readers).isdisjoint(bits) and fits(flat, each)
    ]


def _calibrate(
    plan: AWQPlan, forward: Forward, params: Params, data: Sequences | Trajectory
) -> dict[str, Array]:
    return fit(plan, forward, params, inputs_of(forward, params, data))


@dataclasses.dataclass(frozen=True)
class Uniform(Shorthand):
    """The same bits for attention and feed-forward layers.

    Attributes:
        bits: of weights and inputs, such as w4, w3 or w8a8.
        group_size: consecutive inputs that share a scale; all of a channel if none.
    """

    bits: str = "w4"
    group_size: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        read_bits(self.bits)

    def plan(self, forward: Forward, params: Params) -> AWQPlan:
        return uniform(*read_bits(self.bits), group_size=self.group_size)


METHOD = Method(
    name="awq",
    paper="AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, "
    "arXiv 2306.00978",
    seams=("leaves",),
    domain="any",
    plan=AWQPlan,
    transform=transform,
    identity=lambda subject: uniform(FLOAT),
    ladder=lambda subject: tuple(uniform(bits) for bits in (8, 4, 3)),
    tiny=testing.tiny_llama,
    systems=("AWQ",),
    shorthands=(Uniform,),
    data=(Sequences, Trajectory),
    calibrate=_calibrate,
)
