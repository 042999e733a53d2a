"""GPTQ: weights rounded one input after the other, each error spread over the inputs to come.

Use it for weights of 3 and 4 bits: the model is as fast and as small as with rounding to nearest,
and the outputs of its layers are nearer to what they were, which restores much of the lost quality.
It needs a few sequences of tokens, or samples of a model of images, to calibrate on.

    H = mean x x^T + damp mean(diag) I          over all tokens' inputs x of the layer
    U = upper Cholesky factor of H^-1
    for each input i:   q_i = round(w_i),   w_j -= U_ij (w_i - q_i) / U_ii   for all j > i

With `act_order` inputs are rounded from the largest diag(H) to the smallest. The scales of a group
are found when its first input is reached, with `act_order` before anything is rounded. Layers are
taken block by block; their inputs are those that the blocks quantized so far give them.

Bits and groups are static; quantized values and scales are learned.

Cost: as `round_to_nearest`. To make, the Cholesky factor of an I x I matrix for each layer.

Source: GPTQ, arXiv 2210.17323. `act_order` here is `act_order` with `static_groups` of its code: a
group is of consecutive inputs, so that nothing is reordered when the model runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int8

from effjax import testing
from effjax.calibration import Sequences, Trajectory
from effjax.capture import calls
from effjax.context import Layout, PyTree, tokens_as
from effjax.fields import Count, Positive
from effjax.forward import Forward, Params
from effjax.layers.linear import Linear
from effjax.methods.quantization.blocks import (
    Batches,
    BlockInputs,
    inputs_of,
    stacks,
    valid_rows,
    walk,
    with_kernels,
)
from effjax.methods.quantization.round_to_nearest import RoundToNearestPlan
from effjax.quant import FLOAT, QTensor, Quantizer, dequantize
from effjax.quant.notation import read_bits
from effjax.targets import BLOCK_LAYERS, TargetModule, target_modules
from effjax.transform import Method, Pair, Shorthand, Transform
from pallas_kernels.packing import pack

Kernels = Mapping[str, QTensor]


@dataclasses.dataclass(frozen=True)
class GPTQPlan(RoundToNearestPlan):
    """Bits of linear layers.

    Attributes:
        damp: what is added to the diagonal of H, as a share of its mean.
        act_order: round the inputs that matter most first, while most others can make up for it.
    """

    damp: Positive = 0.01
    act_order: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_tokens_range_themselves()


def uniform(
    weights: int, inputs: int = FLOAT, *, group_size: int | None = None, act_order: bool = False
) -> GPTQPlan:
    """The plan that gives attention and feed-forward layers these bits.

    Args:
        weights: bits of weights, 2 ... 8.
        inputs: bits of inputs, 2 ... 8; 16 leaves them floats.
        group_size: consecutive inputs that share a scale; all of a channel if None.
        act_order: take inputs in the order of falling second moments.
    """
    return GPTQPlan(((BLOCK_LAYERS, weights, inputs),), group_size, act_order=act_order)


def fit(
    plan: GPTQPlan,
    forward: Forward,
    params: Params,
    batches: Batches,
    *,
    progress: bool = True,
) -> dict[str, QTensor]:
    """Quantized values of layers in a model's blocks, by path.

    How tokens are divided among batches does not matter, but for rounding. Padding does not count
    where the model says what it is (`Model.valid_tokens`).

    Args:
        forward, params: the model, not quantized.
        batches: tuples of the forward's inputs: token ids and positions of a language model
            (`blocks.texts` makes them of texts of any lengths), or what a sampler gives a diffusion
            model (`blocks.along`).
        progress: show a bar over the blocks.

    Raises:
        ValueError: without batches, for a selector that finds no layer or one outside of the
            blocks, or a layer that is quantized.
    """
    bits = plan.decided(forward, params, Linear)
    found: dict[str, QTensor] = {}
    inside = tuple(f"{stack.path}." for stack in stacks(forward.target_modules(params)))
    if outside := [path for path in bits if not path.startswith(inside)]:
        raise ValueError(f"only layers of a model's blocks are quantized, not {outside}")

    def visit(block: TargetModule, batches: Sequence[BlockInputs]) -> dict[str, QTensor]:
        layers = {
            target.path: target.module
            for target in target_modules(block.module, Linear)
            if f"{block.path}.{target.path}" in bits
        }
        if not layers:
            return {}
        graph, variables = nnx.split(block.module)
        seen = [
            _moments(graph, each.layout, tuple(layers), variables, each.inputs, each.valid)
            for each in batches
        ]
        sums = jax.tree.map(lambda *each: sum(each), *seen)
        made = {}
        for path, layer in layers.items():
            assert isinstance(layer, Linear)
            kernel = layer.kernel.get_value()
            leaf = plan.leaf(bits[f"{block.path}.{path}"], kernel)
            moment, count = sums[path]
            moment = moment / jnp.maximum(count, 1)[..., None, None]
            made[path] = _rounded(plan, kernel, moment, leaf)
        found.update({f"{block.path}.{path}": leaf for path, leaf in made.items()})
        return made

    walk(forward, params, batches, visit, name="gptq", progress=progress)
    return found


@partial(jax.jit, static_argnums=(0, 1, 2))
def _moments(
    graph: nnx.GraphDef,
    layout: Layout | None,
    paths: tuple[str, ...],
    variables: Any,
    inputs: tuple[PyTree, ...],
    valid: Array | None,
) -> dict[str, tuple[Array, Array]]:
    """Sum of x x^T over the tokens' inputs of linear layers of a block, and how many tokens.

    Those of a layer whose kernel is a stack have its leading axes.
    """
    block = nnx.merge(graph, variables, copy=True)
    leading = {
        target.path: target.module.kernel.get_value().ndim - 2
        for target in target_modules(block, Linear)
        if isinstance(target.module, Linear)
    }
    with tokens_as(layout):
        seen = calls(block, paths, *inputs)
    found = {}
    for path, own in seen.items():
        if not own:
            raise ValueError(f"{path} is never called in its block; leave it out of the plan")
        parts = [_second_moment(x, valid, leading[path]) for (x,), _ in own]
        found[path] = tuple(sum(each) for each in zip(*parts, strict=True))
    return found


def _second_moment(x: Array, valid: Array | None, leading: int) -> tuple[Array, Array]:
    values, counted = valid_rows(x, valid)
    lead = x.shape[:leading]
    rows = values.reshape(*lead, -1, x.shape[-1])
    moment = jnp.matmul(jnp.swapaxes(rows, -1, -2), rows, precision="highest")
    return moment, jnp.sum(counted.reshape(*lead, -1), axis=-1)


def _rounded(
    plan: GPTQPlan, kernel: Float[Array, "*E I O"], moment: Float[Array, "*E I I"], leaf: QTensor
) -> QTensor:
    """The leaf with GPTQ's quantized values, of each matrix of a stack by itself."""
    quantizer = Quantizer(leaf.bits, plan.symmetric)

    def one(kernel: Array, moment: Array, leaf: QTensor) -> QTensor:
        qvalues, scale, zero = _spread(plan, quantizer, kernel, moment, leaf)
        qvalue = pack(qvalues, leaf.bits) if leaf.packed else qvalues
        return dataclasses.replace(leaf, qvalue=qvalue, scale=scale, zero_point=zero)

    if kernel.ndim == 2:
        return one(kernel, moment, leaf)
    return jax.lax.map(lambda each: _rounded(plan, *each), (kernel, moment, leaf))


@partial(jax.jit, static_argnums=(0, 1))
def _spread(
    plan: GPTQPlan,
    quantizer: Quantizer,
    kernel: Float[Array, "I O"],
    moment: Float[Array, "I I"],
    leaf: QTensor,
) -> tuple[Int8[Array, "I O"], Float[Array, "G O"], Int[Array, "G O"] | None]:
    """Quantized values of one kernel, its scales and zero points.

    Args:
        leaf: the kernel rounded to nearest, for the scales of what is not a group by itself.
    """
    inputs, outputs = kernel.shape
    group = plan.group_size or inputs
    # Within a block of inputs errors are spread at once, over the rest in one product.
    size = group if plan.group_size and group <= 512 else math.gcd(group, 128)
    diagonal = jnp.diagonal(moment)
    unused = diagonal == 0
    moment = moment + jnp.diag(jnp.where(unused, 1.0, plan.damp * jnp.mean(diagonal)))
    order = jnp.argsort(-diagonal) if plan.act_order else jnp.arange(inputs)
    upper = jnp.linalg.cholesky(jnp.linalg.inv(moment[order][:, order])).T
    scale, zero = leaf.scale, leaf.zero_point

    def block(carry: Any, number: Array) -> tuple[Any, Array]:
        w, scale, zero = carry
        start = number * size
        rows = jax.lax.dynamic_slice_in_dim(w, start, size)
        own = jax.lax.dynamic_slice(upper, (start, start), (size, size))
        if plan.group_size and not plan.act_order:
            which = start // group
            members = jax.lax.dynamic_slice_in_dim(w, which * group, group)
            fresh = quantizer.fit_axes(members, 0)
            begins = start % group == 0
            scale, zero = jax.tree.map(  # there is no zero point in symmetric quantized values
                lambda old, new: old.at[which].set(jnp.where(begins, new[0], old[which])),
                (scale, zero),
                fresh,
            )
        groups = jax.lax.dynamic_slice_in_dim(order, start, size) // group

        def one(i: Array, held: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            rows, qvalues, errors = held
            at = jax.tree.map(lambda part: part[groups[i]], (scale, zero))
            qvalue = quantizer.quantize(rows[i], *at)
            error = (rows[i] - dequantize(qvalue, *at)) / own[i, i]
            later = jnp.where(jnp.arange(size) > i, own[i], 0.0)
            rows = rows - later[:, None] * error[None]
            return rows, qvalues.at[i].set(qvalue), errors.at[i].set(error)

        blank = jnp.zeros((size, outputs), jnp.int8), jnp.zeros((size, outputs))
        _, qvalues, errors = jax.lax.fori_loop(0, size, one, (rows, *blank))
        wide = jax.lax.dynamic_slice_in_dim(upper, start, size)
        wide = jnp.where(jnp.arange(inputs) >= start + size, wide, 0.0)
        w = w - jnp.matmul(wide.T, errors, precision="highest")
        return (w, scale, zero), qvalues

    carry = kernel.astype(jnp.float32)[order], scale, zero
    (_, scale, zero), qvalues = jax.lax.scan(block, carry, jnp.arange(inputs // size))
    return qvalues.reshape(inputs, outputs)[jnp.argsort(order)], scale, zero


def transform(plan: GPTQPlan, learned: Kernels | None = None) -> Transform:
    """Quantize a model's linear layers.

    Args:
        learned: quantized values from `fit`; None rounds to nearest, a baseline.

    Raises:
        ValueError: if a selector finds no layer, a layer is quantized already, or the quantized
            values belong to another model or plan.
    """

    def apply(forward: Forward, params: Params) -> Pair:
        bits = plan.decided(forward, params, Linear)
        if learned is not None and set(learned) != set(bits):
            raise ValueError(
                f"the quantized values are those of another model or plan: {sorted(learned)}"
            )

        def make(path: str, kernel: Array) -> QTensor:
            if learned is None:
                return plan.leaf(bits[path], kernel)
            wanted = jax.eval_shape(partial(plan.leaf, bits[path]), kernel)
            if jax.tree.map(jnp.shape, learned[path]) != jax.tree.map(jnp.shape, wanted):
                raise ValueError(
                    f"the quantized values of {path} are those of another model or plan"
                )
            return learned[path]

        return forward, with_kernels(params, {path: partial(make, path) for path in bits})

    return Transform(METHOD.name, plan, apply)


def _calibrate(
    plan: GPTQPlan, forward: Forward, params: Params, data: Sequences | Trajectory
) -> dict[str, QTensor]:
    return fit(plan, forward, params, inputs_of(forward, params, data))


@dataclasses.dataclass(frozen=True)
class Uniform(Shorthand):
    """The same bits for attention and feed-forward layers.

    Attributes:
        bits: of weights and inputs, such as w4, w3 or w8a8.
        group_size: consecutive inputs that share a scale; all of a channel if none.
        act_order: take inputs in the order of falling second moments.
    """

    bits: str = "w4"
    group_size: Count | None = None
    act_order: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        read_bits(self.bits)

    def plan(self, forward: Forward, params: Params) -> GPTQPlan:
        return uniform(*read_bits(self.bits), group_size=self.group_size, act_order=self.act_order)


METHOD = Method(
    name="gptq",
    paper="GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, "
    "arXiv 2210.17323",
    seams=("leaves",),
    domain="any",
    plan=GPTQPlan,
    transform=transform,
    identity=lambda subject: uniform(FLOAT),
    ladder=lambda subject: tuple(uniform(bits) for bits in (8, 4, 3)),
    tiny=testing.tiny_llama,
    systems=("GPTQ",),
    shorthands=(Uniform,),
    data=(Sequences, Trajectory),
    calibrate=_calibrate,
)
