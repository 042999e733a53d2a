"""GPTQ: weights rounded one input after the other, each error spread over the inputs to come.

Buys: what rounding to nearest gives, with a smaller error of what a layer computes: at 3 and 4 bits
much of the lost quality.

    H = mean x x^T + damp mean(diag) I          over all tokens' inputs of the layer
    U = upper Cholesky factor of H^-1
    for each input i:   q_i = round(w_i),   w_j -= U_ij (w_i - q_i) / U_ii   for all j > i

Scales of a group are taken when its first input is reached; with `act_order`, where inputs are
rounded from the largest diag(H) to the smallest, before anything is rounded. Layers are taken block
by block, with the inputs that the blocks quantized so far give them.

Static: bits and groups. Dynamic: quantized values and scales. Cost: as round_to_nearest; to make, a
    factor of
an I x I matrix for each layer.

Source: GPTQ, arXiv 2210.17323. Its code's `act_order` with `static_groups` is `act_order` here: a
group is of consecutive inputs, so that nothing is reordered when the model runs.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int8
from tqdm.auto import tqdm

from effjax import testing
from effjax.calibration import Sequences
from effjax.capture import tap
from effjax.fields import Count, Positive
from effjax.forward import Forward, Params
from effjax.generate import Prompts
from effjax.generate.prefix_cache import padded
from effjax.layers.linear import Linear
from effjax.methods.quantization.round_to_nearest import RoundToNearestPlan, with_kernels
from effjax.models.llama import LlamaBlock
from effjax.quant import FLOAT, QTensor, Quantizer, dequantize
from effjax.quant.notation import read_bits
from effjax.targets import BLOCK_LAYERS, Wrapper, target_modules, wrap
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
    batches: Sequence[Prompts],
    *,
    progress: bool = True,
) -> dict[str, QTensor]:
    """Quantized values of a language model's layers, by path.

    How tokens are divided among batches does not matter, but for rounding.

    Args:
        forward, params: the model, not quantized.
        batches: token ids int32[B, S], or rows of any lengths, of which each token counts once.
        progress: show a bar over the blocks.

    Raises:
        ValueError: without batches, for a pattern that matches no layer or one outside of the
            blocks, or a layer that is quantized.
    """
    if not len(batches):
        raise ValueError("there are no batches to calibrate with")
    decided = plan.decided(forward, params, Linear)
    blocks = forward.target_modules(params, LlamaBlock)
    if outside := [p for p in decided if not any(p.startswith(f"{b.path}.") for b in blocks)]:
        raise ValueError(f"only layers of a language model's blocks are quantized, not {outside}")
    start = jax.jit(partial(_first_inputs, forward, blocks[0].path))
    texts = [_with_positions(rows) for rows in batches]
    hidden = [start(params, *text) for text in texts]
    places = [positions for _, positions in texts]
    counts = [tokens.size if at is None else int(np.sum(at >= 0)) for tokens, at in texts]
    found: dict[str, QTensor] = {}
    for target in tqdm(blocks, desc="gptq", disable=not progress, leave=False):
        graph, variables = nnx.split(target.module)
        seen = [_moments(graph, variables, x, at) for x, at in zip(hidden, places, strict=True)]
        means = jax.tree.map(lambda *each: sum(each) / sum(counts), *seen)
        for own in target_modules(target.module, Linear):
            path = f"{target.path}.{own.path}"
            if path not in decided:
                continue
            assert isinstance(own.module, Linear)
            kernel = own.module.kernel.get_value()
            leaf = plan.leaf(decided[path], kernel)
            quantizer = Quantizer(leaf.bits, plan.symmetric)
            qvalues, scale, zero = _spread(plan, quantizer, kernel, means[own.path], leaf)
            qvalue = pack(qvalues, leaf.bits) if leaf.packed else qvalues
            leaf = dataclasses.replace(leaf, qvalue=qvalue, scale=scale, zero_point=zero)
            setattr(own.module, "kernel", nnx.Param(leaf))  # noqa: B010 - a leaf stands for an array
            found[path] = leaf
        graph, variables = nnx.split(target.module)
        hidden = [_run(graph, variables, x, at) for x, at in zip(hidden, places, strict=True)]
    return found


def _with_positions(rows: Prompts) -> tuple[np.ndarray, np.ndarray | None]:
    """Tokens int32[B, S] and their positions, -1 for padding; None where there is none."""
    tokens, lengths = padded(rows)
    columns = np.arange(tokens.shape[1], dtype=np.int32)
    if lengths.min() == lengths.max():
        return tokens, None
    return tokens, np.where(columns < lengths[:, None], columns, -1)


def _first_inputs(
    forward: Forward, path: str, params: Params, tokens: Array, positions: Array | None
) -> Array:
    return tap(forward, params, (tokens, positions), pattern=re.escape(path), what="input")[path]


class _Watch(Wrapper):
    """Shows a layer's inputs to a function."""

    def __init__(self, inner: nnx.Module, show: Callable[[Array], None]):
        super().__init__(inner)
        self.show = show

    def __call__(self, x: Array) -> Array:
        self.show(x)
        return self.inner(x)


@partial(jax.jit, static_argnums=0)
def _run(graph: nnx.GraphDef, variables: Any, x: Array, positions: Array | None) -> Array:
    return nnx.merge(graph, variables, copy=True)(x, positions)


@partial(jax.jit, static_argnums=0)
def _moments(
    graph: nnx.GraphDef, variables: Any, x: Array, positions: Array | None
) -> dict[str, Array]:
    """Sum of x x^T over the tokens' inputs of every linear layer of a block."""
    block, found = nnx.merge(graph, variables, copy=True), {}

    def moment(path: str, x: Array) -> None:
        if positions is not None:
            x = jnp.where(positions[:, :, None] >= 0, x, 0)
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        found[path] = jnp.matmul(rows.T, rows, precision="highest")

    for target in target_modules(block, Linear):
        wrap(block, target.path, _Watch, partial(moment, target.path))
    block(x, positions)
    return found


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
        ValueError: if the pattern matches no layer, a layer is quantized already, or the quantized
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
    plan: GPTQPlan, forward: Forward, params: Params, data: Sequences
) -> dict[str, QTensor]:
    return fit(plan, forward, params, [data.calibration()])


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
    domain="language models",
    plan=GPTQPlan,
    transform=transform,
    identity=lambda subject: uniform(FLOAT),
    ladder=lambda subject: tuple(uniform(bits) for bits in (8, 4, 3)),
    tiny=testing.tiny_llama,
    systems=("GPTQ",),
    shorthands=(Uniform,),
    data=Sequences,
    calibrate=_calibrate,
)
