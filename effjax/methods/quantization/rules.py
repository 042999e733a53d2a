"""Rules of plans: which layers get how many bits.

A rule is a tuple that begins with a selector, the bits of the weights and the bits of the inputs. A
selector is `role:qkv|out|up|down`, or a regular expression that the whole path of a layer must
match (`effjax.targets`). The first rule of a plan that selects a layer decides; a layer without one
stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, TypeVar

from effjax.fields import OneOf
from effjax.forward import METHODS, Params, flatten_params
from effjax.layers.convolution import Conv2d
from effjax.layers.linear import Linear
from effjax.quant import FLOAT, QTensor
from effjax.quant.quantizer import BITS
from effjax.targets import TargetModule, check_selected, check_selector, selects
from effjax.transform import check_by_layer

Bits = Annotated[int, OneOf(*BITS, FLOAT)]

LAYER_TYPES = (Linear, Conv2d)

R = TypeVar("R", bound=tuple[Any, ...])


def check_rule(rule: Sequence[Any]) -> None:
    """Check the selector and the bits of a rule.

    Raises:
        ValueError: for a selector that is none, and for float weights with quantized inputs.
    """
    selector, weights, inputs = rule[:3]
    check_selector(selector)
    if weights == FLOAT and inputs != FLOAT:
        raise ValueError(
            f"rule {tuple(rule)!r} quantizes the inputs of float weights; quantize the weights "
            f"too, or leave both at {FLOAT}"
        )


def deciding(rules: Iterable[R], target: TargetModule) -> R | None:
    """The rule that decides about a layer; None if the layer stays as it is."""
    for rule in rules:
        if selects(rule[0], target):
            return None if rule[1] == FLOAT else rule
    return None


def decided(rules: Sequence[R], targets: Sequence[TargetModule]) -> dict[str, R]:
    """The deciding rule of each layer that gets quantized values, by path.

    Raises:
        ValueError: for a selector that finds no layer, or lacks layers of a role that it names.
    """
    for selector, *_ in rules:
        check_selected(selector, targets)
    found = {target.path: deciding(rules, target) for target in targets}
    return {path: rule for path, rule in found.items() if rule is not None}


def check_floats(params: Params, paths: Iterable[str]) -> None:
    """Check that the kernels of these layers are arrays, and not stacked.

    Raises:
        ValueError: for a layer that is quantized, and for stacked parameters.
    """
    check_by_layer("quantization", params)
    flat = flatten_params({name: leaf for name, leaf in params.items() if name != METHODS})
    for path in paths:
        if isinstance(flat[f"{path}.kernel"], QTensor):
            raise ValueError(f"{path} is quantized already; a layer can be quantized once")


def described(selector: str) -> str:
    """A selector for people."""
    roles = selector.removeprefix("role:")
    return f"layers {selector}" if roles == selector else f"all {roles.replace('|', ', ')}"
