"""AWQ: channels that carry large inputs are scaled up before weights are rounded.

Buys: what rounding to nearest gives, with a smaller error where inputs are large, for nothing when
the model runs: factors stand in the norm or layer that makes the inputs.

    s = max(mean|x|^a, 1e-4) / sqrt(max s min s)          for a = 0, 1/n, ... (n - 1)/n
    loss(a) = |f(x; W) - f(x; Q(s W) / s)|^2              Q rounds to nearest
    W -> Q(s W),   what makes x -> divided by s           for the a of the least loss

f is all of what reads the same inputs: the attention for its queries, keys and values, the
feed-forward for its first layers, else one layer. Losses are those of the float model: scaling
changes nothing of what it computes, so the choices do not depend on each other.

Static: bits and groups. Dynamic: quantized values, scales. Cost: as round_to_nearest; to make, n
    runs of f.

Source: AWQ, arXiv 2306.00978, without clipping. Output projections behind grouped keys have nowhere
to put factors, and are rounded as they are.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from tqdm.auto import tqdm

from effjax import testing
from effjax.calibration import Sequences
from effjax.capture import statistics, tap
from effjax.context import PyTree
from effjax.fields import Count
from effjax.forward import METHODS, Forward, Params, flatten_params, nest_params
from effjax.layers.attention import CausalAttention
from effjax.layers.folding import Fold, fits, fold, folds
from effjax.layers.linear import Linear
from effjax.methods.quantization.round_to_nearest import RoundToNearestPlan, with_kernels
from effjax.models.llama import Llama
from effjax.quant import FLOAT, Quantizer, fake_quantize, quantize_matrix
from effjax.quant.notation import read_bits
from effjax.targets import BLOCK_LAYERS
from effjax.transform import Method, Pair, Shorthand, Transform

Scales = Mapping[str, Array]  # s [I] by the path of what makes the inputs


@dataclasses.dataclass(frozen=True)
class AWQPlan(RoundToNearestPlan):
    """Bits of linear layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_tokens_range_themselves()

    def rounded(self, kernel: Float[Array, "I O"], bits: int) -> Float[Array, "I O"]:
        """A kernel as its quantized values say it."""
        quantizer = Quantizer(bits, self.symmetric)
        return quantize_matrix(kernel, quantizer, group_size=self.group_size).restore()


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
    batches: Sequence[tuple[PyTree, ...]],
    *,
    points: int = 20,
    progress: bool = True,
) -> dict[str, Array]:
    """Scales of the inputs, by the path of the norm or layer that makes them.

    Args:
        forward, params: the model, not quantized.
        batches: tuples of the forward's inputs, each token of which counts once: no padding.
        points: n, how many exponents are tried.
        progress: show a bar over the places of scales.

    Raises:
        ValueError: without batches, with padding in them, if the pattern matches no layer, or a
            layer is quantized.
    """
    if not len(batches):
        raise ValueError("there are no batches to calibrate with")
    for number, inputs in enumerate(batches):
        positions = inputs[1] if issubclass(forward.model, Llama) and len(inputs) > 1 else None
        if positions is not None and np.any(np.asarray(positions) < 0):
            raise ValueError(
                f"batch {number} has padding (positions below 0), which would count as tokens. "
                f"Give texts of one length in a batch; batches may differ."
            )
    decided = plan.decided(forward, params, Linear)
    places = _places(plan, forward, params)
    first = {where.source: where.readers[0] for where in places}
    pattern = "|".join(map(re.escape, first.values()))
    seen = statistics(forward, params, batches, kind=Linear, pattern=pattern, what="input")
    exponents = jnp.arange(points) / points
    candidates = {
        where.source: jax.vmap(partial(_scales, seen[first[where.source]].absmean))(exponents)
        for where in places
    }
    units = {where.source: _unit(where) for where in places}
    modules = {target.path: nnx.split(target.module) for target in forward.target_modules(params)}
    look = jax.jit(partial(_inputs, forward, "|".join(map(re.escape, units.values()))))
    losses = {where.source: jnp.zeros(points) for where in places}
    work = [(inputs, where) for inputs in batches for where in places]
    tapped, x = None, {}
    for inputs, where in tqdm(work, desc="awq", disable=not progress, leave=False):
        if inputs is not tapped:
            tapped, x = inputs, look(params, inputs)
        unit = units[where.source]
        readers = tuple(reader.removeprefix(unit).removeprefix(".") for reader in where.readers)
        bits = decided[where.readers[0]]
        losses[where.source] += _losses(
            plan, bits, readers, *modules[unit], x[unit], candidates[where.source]
        )
    return {source: candidates[source][int(np.argmin(own))] for source, own in losses.items()}


def _inputs(
    forward: Forward, pattern: str, params: Params, inputs: tuple[PyTree, ...]
) -> dict[str, Array]:
    return tap(forward, params, inputs, pattern=pattern, what="input")


def _scales(mean: Float[Array, " I"], exponent: Float[Array, ""]) -> Float[Array, " I"]:
    s = jnp.maximum(mean**exponent, 1e-4)
    return s / jnp.sqrt(jnp.max(s) * jnp.min(s))


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _losses(
    plan: AWQPlan,
    bits: tuple[int, int],
    readers: tuple[str, ...],
    graph: nnx.GraphDef,
    variables: Any,
    x: Float[Array, "B S I"],
    candidates: Float[Array, "N I"],
) -> Float[Array, " N"]:
    """Squared errors of what reads the scaled inputs, summed over tokens, for every candidate.

    Args:
        bits: of weights and inputs.
        readers: paths within the module; "" is the module itself.
        graph, variables: the module whose outputs are compared.
    """

    def output(module: Any, x: Array) -> Array:
        out = module(x, None) if isinstance(module, CausalAttention) else module(x)
        return out.astype(jnp.float32)

    def loss(scale: Array) -> Array:
        module: Any = nnx.merge(graph, variables, copy=True)
        for reader in readers:
            layer = module if reader == "" else getattr(module, reader)
            kernel = layer.kernel.get_value()
            scaled = kernel.astype(jnp.float32) * scale[:, None]
            rounded = plan.rounded(scaled, bits[0]) / scale[:, None]
            layer.kernel.set_value(rounded.astype(kernel.dtype))
        error = jnp.square(output(module, _quantized(x, bits[1], scale)) - exact)
        return jnp.mean(error) * (error.size // error.shape[-1])

    exact = output(nnx.merge(graph, variables, copy=True), x)
    return jax.lax.map(loss, candidates)


def _quantized(x: Float[Array, "B S I"], bits: int, scale: Float[Array, " I"]) -> Array:
    """Inputs as their quantized values say them, if they have any."""
    if bits == FLOAT:
        return x
    quantized = fake_quantize(x / scale.astype(x.dtype), Quantizer(bits), axes=-1)
    return (quantized * scale.astype(x.dtype)).astype(x.dtype)


def _unit(where: Fold) -> str:
    """The module whose output is compared: a single reader, or what holds all of them."""
    if len(where.readers) == 1:
        return where.readers[0]
    return where.readers[0].rpartition(".")[0]


def transform(plan: AWQPlan, learned: Scales | None = None) -> Transform:
    """Quantize a model's linear layers.

    Args:
        learned: scales from `fit`; None rounds to nearest, a baseline.

    Raises:
        ValueError: if the pattern matches no layer, a layer is quantized already, or the scales
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
    wanted = {each.source: flat[f"{each.readers[0]}.kernel"].shape[:1] for each in places}
    if given != wanted:
        raise ValueError(
            f"the scales are those of another model or plan: they are {given}, must be {wanted}"
        )
    for where in places:
        scale = learned[where.source]
        flat = fold(flat, where, 1 / scale)
        for reader in where.readers:
            name = f"{reader}.kernel"
            scaled = flat[name].astype(jnp.float32) * scale[:, None]
            flat[name] = scaled.astype(flat[name].dtype)
    return nest_params(flat) | {name: leaf for name, leaf in params.items() if name == METHODS}


def _places(plan: AWQPlan, forward: Forward, params: Params) -> list[Fold]:
    """Where scales can go, of layers that get quantized values."""
    decided = set(plan.decided(forward, params, Linear))
    flat = flatten_params({name: leaf for name, leaf in params.items() if name != METHODS})
    return [
        each
        for each in folds(forward.target_modules(params))
        if set(each.readers) <= decided and fits(flat, each)
    ]


def _calibrate(
    plan: AWQPlan, forward: Forward, params: Params, data: Sequences
) -> dict[str, Array]:
    return fit(plan, forward, params, [(jnp.asarray(data.calibration()),)])


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
    domain="language models",
    plan=AWQPlan,
    transform=transform,
    identity=lambda subject: uniform(FLOAT),
    ladder=lambda subject: tuple(uniform(bits) for bits in (8, 4, 3)),
    tiny=testing.tiny_llama,
    systems=("AWQ",),
    shorthands=(Uniform,),
    data=Sequences,
    calibrate=_calibrate,
)
