"""Round to nearest: weights and inputs become the nearest quantized value.

Use it for 8 bits, where it needs no data and loses little, and as the baseline that every method of
post-training quantization has to beat. Weights have 2 to 8 bits; where inputs are quantized too,
products are of int8 values.

    W = (q - z) s      one scale and zero point for each output channel, or for each group of inputs
    x = q s            one scale for each token (convolutions: image), from its largest magnitude
    x = (q - z) s      or one scale for all tokens, from a calibrated range ("static")

The plan is static, and with it the bits of every layer. Scales of tokens are found at run time.

Cost: as many products as before. Weights take bits / 32 of float32's bytes, and scales and zero
points.

Source: the dynamic W8A8 and W4A8 baselines of ViDiT-Q, arXiv 2406.02540.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp

from effjax import testing
from effjax.capture import tap
from effjax.context import PyTree
from effjax.fields import Count
from effjax.forward import Forward, Params
from effjax.guidance import Guidance
from effjax.layers.convolution import Conv2d
from effjax.methods.quantization.blocks import with_kernels
from effjax.methods.quantization.rules import (
    LAYER_TYPES,
    Bits,
    check_floats,
    check_rule,
    decided,
    deciding,
    described,
)
from effjax.quant import FLOAT, Activations, QTensor, Quantizer, quantize_matrix, quantize_stack
from effjax.quant.notation import read_bits
from effjax.quant.ranges import Range, minmax, union
from effjax.targets import BLOCK_LAYERS, TargetModule
from effjax.transform import Method, Pair, Plan, Shorthand, Transform


@dataclasses.dataclass(frozen=True)
class RoundToNearestPlan(Plan):
    """Bits for linear layers and convolutions.

    Attributes:
        rules: (selector, weight bits, input bits): the first one whose selector (`role:qkv|out`, or
            a regular expression for whole paths) finds a layer decides; a layer without one stays
            as it is. Bits are 2 ... 8, or 16 for floats.
        group_size: inputs that share a scale of the weights; all of a channel if None. Convolutions
            have no groups.
        symmetric: whether weights have no zero points.
        input_ranges: (path, low, high) of layers whose inputs take a calibrated range instead of
            each token's own; see `calibrate`.
    """

    rules: tuple[tuple[str, Bits, Bits], ...]
    group_size: Count | None = None
    symmetric: bool = False
    input_ranges: tuple[tuple[str, float, float], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for rule in self.rules:
            check_rule(rule)

    def describe(self) -> str:
        """Rules, in the field's notation."""
        rules = "; ".join(f"{described(selector)}: W{w}A{a}" for selector, w, a in self.rules)
        inputs = (
            f"calibrated for {len(self.input_ranges)} layers" if self.input_ranges else "by token"
        )
        return (
            f"{rules or 'nothing'}; group size {self.group_size or 'of a channel'}; inputs {inputs}"
        )

    def bits(self, target: TargetModule) -> tuple[int, int]:
        """Bits of the weights and the inputs of a layer."""
        rule = deciding(self.rules, target)
        return (FLOAT, FLOAT) if rule is None else rule[1:]

    def check_tokens_range_themselves(self) -> None:
        """Raise ValueError for calibrated ranges, for methods that do not know them."""
        if self.input_ranges:
            raise ValueError(
                f"in a {type(self).__name__} each token has its own range; leave out input_ranges"
            )

    def leaf(
        self,
        bits: tuple[int, int],
        kernel: jax.Array,
        *,
        input_range: Range | None = None,
        convolution: bool = False,
    ) -> QTensor:
        """A kernel rounded to nearest.

        Args:
            bits: of its weights and its inputs; see `decided`.
            kernel: [I, O], a stack [*E, I, O], or [R, S, I, O] of a convolution.
            input_range: of the inputs, instead of each token's own; one for all of a stack.
            convolution: whether it is the kernel of one.
        """
        weights, inputs = bits
        activations = None
        if inputs != FLOAT:
            static = input_range is not None
            activations = Activations(Quantizer(inputs, symmetric=not static), not static)
        if input_range is not None and not convolution:
            leading = kernel.shape[:-2]
            input_range = Range(*(jnp.broadcast_to(end, leading) for end in input_range))
        return (quantize_matrix if convolution else quantize_stack)(
            kernel,
            Quantizer(weights, self.symmetric),
            group_size=self.group_size,
            activations=activations,
            input_range=input_range,
        )

    def decided(
        self, forward: Forward, params: Params, kind: type | tuple[type, ...] = LAYER_TYPES
    ) -> dict[str, tuple[int, int]]:
        """Bits of the weights and the inputs of each layer that gets quantized values, by path.

        Raises:
            ValueError: if a selector finds no layer of the kind or lacks a role that it names, or
                a layer is quantized already.
        """
        rules = decided(self.rules, forward.target_modules(params, kind))
        check_floats(params, rules)
        return {path: (weights, inputs) for path, (_, weights, inputs) in rules.items()}


def uniform(
    weights: int,
    inputs: int = FLOAT,
    *,
    group_size: int | None = None,
    symmetric: bool = False,
) -> RoundToNearestPlan:
    """The plan that gives attention and feed-forward layers these bits.

    Args:
        weights: bits of weights, 2 ... 8.
        inputs: bits of inputs, 2 ... 8; 16 leaves them floats.
        group_size: consecutive inputs that share a scale; all of a channel if None.
        symmetric: whether weights have no zero points.
    """
    return RoundToNearestPlan(((BLOCK_LAYERS, weights, inputs),), group_size, symmetric)


def transform(plan: RoundToNearestPlan) -> Transform:
    """Quantize a model's linear layers and convolutions by the plan.

    Raises:
        ValueError: if a selector finds no layer or lacks a role that it names, or a layer is
            quantized already.
    """

    def apply(forward: Forward, params: Params) -> Pair:
        bits = plan.decided(forward, params)
        ranges = {path: Range(jnp.float32(a), jnp.float32(b)) for path, a, b in plan.input_ranges}
        if wrong := sorted(path for path in ranges if bits.get(path, (0, FLOAT))[1] == FLOAT):
            raise ValueError(
                f"the plan has input ranges of {wrong}, whose inputs it does not quantize; "
                f"calibrate it for this model"
            )
        images = {target.path for target in forward.target_modules(params, Conv2d)}
        made = {
            path: partial(plan.leaf, own, input_range=ranges.get(path), convolution=path in images)
            for path, own in bits.items()
        }
        return forward, with_kernels(params, made)

    return Transform(METHOD.name, plan, apply)


def calibrate(
    plan: RoundToNearestPlan,
    forward: Forward,
    params: Params,
    batches: Iterable[tuple[PyTree, ...]],
    *,
    estimate: Callable[[jax.Array], Range] = minmax,
    join: Callable[[Range | None, Range], Range] = union,
    guidance: Guidance | None = None,
) -> RoundToNearestPlan:
    """The plan with ranges of the inputs that its layers see in some batches.

    Args:
        plan: its input ranges are replaced.
        forward: the model, not quantized.
        params: its parameters.
        batches: tuples of the forward's inputs; one compiled program for each shape.
        estimate: range of one layer's inputs in one batch: `effjax.quant.ranges`.
        join: range of all batches so far and one more: `union` or `moving_average`.
        guidance: arrangement of guided batches.

    Raises:
        ValueError: without batches, or if the plan quantizes no inputs.
    """
    bits = plan.decided(forward, params)
    quantized = [path for path, (_, inputs) in bits.items() if inputs != FLOAT]
    if not quantized:
        raise ValueError("the plan quantizes no layer's inputs, there is nothing to calibrate")
    pattern = "|".join(map(re.escape, quantized))

    @jax.jit
    def look(params: Params, inputs: tuple[PyTree, ...]) -> dict[str, Range]:
        seen = tap(
            forward,
            params,
            inputs,
            kind=LAYER_TYPES,
            pattern=pattern,
            what="input",
            guidance=guidance,
        )
        return {path: estimate(x) for path, x in seen.items()}

    found: dict[str, Range | None] = dict.fromkeys(quantized)
    for inputs in batches:
        for path, own in look(params, inputs).items():
            found[path] = join(found[path], own)
    ranges = [(path, own) for path, own in found.items() if own is not None]
    if not ranges:
        raise ValueError("there are no batches to calibrate with")
    return dataclasses.replace(
        plan,
        input_ranges=tuple((path, own.low.item(), own.high.item()) for path, own in ranges),
    )


@dataclasses.dataclass(frozen=True)
class Uniform(Shorthand):
    """The same bits for attention and feed-forward layers.

    Attributes:
        bits: of weights and inputs, such as w8a8, w4a8 or w4.
        group_size: consecutive inputs that share a scale; all of a channel if none.
        symmetric: whether weights have no zero points.
    """

    bits: str = "w8a8"
    group_size: Count | None = None
    symmetric: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        read_bits(self.bits)

    def plan(self, forward: Forward, params: Params) -> RoundToNearestPlan:
        options = {"group_size": self.group_size, "symmetric": self.symmetric}
        return uniform(*read_bits(self.bits), **options)


def _ladder(subject: testing.Subject) -> tuple[RoundToNearestPlan, ...]:
    return uniform(8, 8), uniform(6, 8), uniform(4), uniform(3)


METHOD = Method(
    name="round_to_nearest",
    paper="the baseline of ViDiT-Q, arXiv 2406.02540",
    seams=("leaves",),
    domain="any",
    plan=RoundToNearestPlan,
    transform=transform,
    identity=lambda subject: uniform(FLOAT),
    ladder=_ladder,
    tiny=testing.tiny_dit,
    shorthands=(Uniform,),
)
