"""Round to nearest: weights, and inputs token by token, to the nearest code; no calibration.

Buys: weights of 2 to 8 bits, and products of int8 codes where inputs are coded too. The baseline
that every method of post-training quantisation has to beat.

    W = (q - z) s, one scale for each output channel, or for each group of inputs
    x = q s, one scale for each token, from its largest magnitude

Static: the plan, hence the bits of every layer. Dynamic: the scales of the inputs. Cost: as many
products; weights take bits / 32 of float32's bytes, and scales and zero points.

Source: the dynamic W8A8 and W4A8 baselines of ViDiT-Q, arXiv 2406.02540.
"""

from __future__ import annotations

import dataclasses
import re

from effjax import testing
from effjax.forward import Forward, Params, flatten_params, nest_params
from effjax.layers.linear import Linear
from effjax.quant import Activations, QTensor, Quantizer, quantize_matrix
from effjax.transform import Method, Pair, Plan, Transform

FLOAT = 16  # bits that leave numbers as they are

# What a path must match to be coded by default: attention and feed-forward layers. Embeddings,
# modulations and the final layer are small, and sensitive.
LAYERS = r".*\.(attn|mlp)\..*"


@dataclasses.dataclass(frozen=True)
class RoundToNearestPlan(Plan):
    """Bits for linear layers.

    Attributes:
        rules: (pattern, weight bits, input bits): the first pattern that matches the whole path of
            a layer decides; a layer without one stays as it is. Bits are 2 ... 8, or 16 for floats.
        group_size: inputs that share a scale of the weights; all of a channel if None.
        symmetric: whether weights have zero points.
    """

    rules: tuple[tuple[str, int, int], ...]
    group_size: int | None = None
    symmetric: bool = False

    def __post_init__(self) -> None:
        for rule in self.rules:
            if len(rule) != 3:
                raise ValueError(f"a rule is (pattern, weight bits, input bits), got {rule!r}")
            pattern, weights, inputs = rule
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
            for bits in (weights, inputs):
                if bits != FLOAT:
                    Quantizer(bits)
            if weights == FLOAT and inputs != FLOAT:
                raise ValueError(
                    f"rule {rule!r} codes the inputs of float weights; code the weights too, or "
                    f"leave both at {FLOAT}"
                )

    def describe(self) -> str:
        """Rules, in the field's notation."""
        rules = "; ".join(f"{pattern}: W{w}A{a}" for pattern, w, a in self.rules)
        return f"{rules or 'nothing'}; group size {self.group_size or 'of a channel'}"

    def bits(self, path: str) -> tuple[int, int]:
        """Bits of the weights and the inputs of the layer at a path."""
        for pattern, weights, inputs in self.rules:
            if re.fullmatch(pattern, path):
                return weights, inputs
        return FLOAT, FLOAT


def uniform(
    weights: int,
    inputs: int = FLOAT,
    *,
    group_size: int | None = None,
    symmetric: bool = False,
) -> RoundToNearestPlan:
    """The plan that gives attention and feed-forward layers these bits."""
    return RoundToNearestPlan(((LAYERS, weights, inputs),), group_size, symmetric)


def transform(plan: RoundToNearestPlan) -> Transform:
    """Quantise a model's linear layers by the plan.

    Raises:
        ValueError: if a rule's pattern decides no layer, or a layer is quantised already.
    """

    def apply(forward: Forward, params: Params) -> Pair:
        flat = flatten_params(params)
        paths = [site.path for site in forward.sites(params, Linear)]
        for pattern, *_ in plan.rules:
            if not any(re.fullmatch(pattern, path) for path in paths):
                raise ValueError(
                    f"the pattern {pattern!r} matches no linear layer; there are {paths}"
                )
        for path in paths:
            weights, inputs = plan.bits(path)
            if weights == FLOAT:
                continue
            name = f"{path}.kernel"
            if isinstance(flat[name], QTensor):
                raise ValueError(f"{name} is quantised already; a layer can be quantised once")
            activations = None if inputs == FLOAT else Activations(Quantizer(inputs))
            flat[name] = quantize_matrix(
                flat[name],
                Quantizer(weights, plan.symmetric),
                group_size=plan.group_size,
                activations=activations,
            )
        return forward, nest_params(flat)

    return Transform(METHOD.name, plan, apply)


def _ladder(subject: testing.Subject) -> tuple[RoundToNearestPlan, ...]:
    return uniform(8, 8), uniform(6, 8), uniform(4), uniform(3)


METHOD = Method(
    name="round_to_nearest",
    paper="the baseline of ViDiT-Q, arXiv 2406.02540",
    seams=("leaves",),
    plan=RoundToNearestPlan,
    transform=transform,
    search=None,
    identity=lambda subject: uniform(FLOAT),
    ladder=_ladder,
    tiny=testing.tiny_dit,
)
