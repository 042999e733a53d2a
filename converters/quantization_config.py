"""What the `quantization_config` of a config.json says of layers, read and written.

GPTQ, AWQ and torchao have one scheme for the layers that they quantised, which rules of GPTQModel
change; compressed-tensors has groups of layers, by name or class, and is what is written. Options
that are not known to be harmless are errors, all named at once.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from converters.family import Json
from converters.names import LAYOUTS, Binding
from converters.quantized import Layer, Scheme
from effjax.quant import Activations, Quantizer
from effjax.quant.quantizer import BITS
from effjax.storage import Tensor

KEY = "quantization_config"  # of config.json


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What a `quantization_config` says.

    Attributes:
        groups: (targets, scheme): names of layers, "re:" and an expression, or "Linear" for all;
            None leaves them floats.
    """

    groups: tuple[tuple[tuple[str, ...], Scheme | None], ...]

    def scheme(self, layer: str) -> Scheme | None:
        """That of a layer: of the first group that names it, else of the one for all."""

        def named(target: str) -> bool:
            expression = target.removeprefix("re:")
            return target == layer or (target != expression and bool(re.match(expression, layer)))

        for targets, scheme in self.groups:
            if any(map(named, targets)):
                return scheme
        return next((scheme for targets, scheme in self.groups if "Linear" in targets), None)

    def layers(self, tensors: Mapping[str, Tensor]) -> dict[str, Layer]:
        """The quantised layers that a checkpoint holds, by name; all others are floats.

        Raises:
            ValueError: for layers that are floats by the configuration.
        """
        used = {scheme.layout for _, scheme in self.groups if scheme is not None}
        marks = {name for layout in used for name in layout.names} - {"weight"}
        found: dict[str, dict[str, Tensor]] = collections.defaultdict(dict)
        for name, tensor in tensors.items():
            layer, _, last = name.rpartition(".")
            if last in marks:
                found[layer][last] = tensor
        schemes = {layer: self.scheme(layer) for layer in found}
        unknown = sorted(layer for layer, scheme in schemes.items() if scheme is None)
        if unknown:
            raise ValueError(
                f"the file holds codes of {unknown}, which no group or rule of {KEY} quantises"
            )
        layers = {}
        for layer, scheme in schemes.items():
            assert scheme is not None
            if scheme.layout.codes == "weight" and f"{layer}.weight" in tensors:
                found[layer]["weight"] = tensors[f"{layer}.weight"]
            layers[layer] = Layer(layer, scheme, found[layer])
        return layers


def read_config(config: Json) -> Quantization:
    """A `quantization_config` of config.json.

    Raises:
        ValueError: for methods and formats that are not supported, and options that are wrong, all
            listed at once.
    """
    method = config.get("quant_method")
    readers = {
        "gptq": _gptq,
        "awq": _awq,
        "compressed-tensors": _compressed_tensors,
        "torchao": _torchao,
    }
    if method not in readers:
        raise ValueError(f"{KEY} has quant_method={method!r}; {', '.join(readers)} can be read")
    wrong: list[str] = []
    read = readers[method](config, wrong)
    if wrong:
        raise ValueError(f"{KEY} of {method} cannot be read: {'; '.join(wrong)}")
    return Quantization(tuple(read))


def _option(config: Json, wrong: list[str], key: str, allowed: Sequence[Any], default: Any) -> Any:
    """A value of the configuration; one that is not allowed is noted."""
    value = config.get(key, default)
    if not any(type(value) is type(each) and value == each for each in allowed):
        wrong.append(f"{key}={value!r} (only {', '.join(map(repr, allowed))})")
        return allowed[0]
    return value


def _group_size(config: Json, wrong: list[str], default: int | None) -> int | None:
    value = config.get("group_size", default)
    if value is None or value == -1:
        return None
    if type(value) is not int or value < 1:
        wrong.append(f"group_size={value!r} (only -1, for all inputs, and positive numbers)")
    return value


Groups = list[tuple[tuple[str, ...], Scheme | None]]


def _gptq(config: Json, wrong: list[str]) -> Groups:
    kind = config.get("checkpoint_format") or config.get("format") or "gptq"
    kinds = ("gptq", "gptq_v2", "gptq_p")
    kind = _option({"checkpoint_format": kind}, wrong, "checkpoint_format", kinds, "")

    def scheme(config: Json, wrong: list[str]) -> Scheme:
        _option(config, wrong, "pack_dtype", ("int32",), "int32")
        return Scheme(
            "gptq_p" if kind == "gptq_p" else "gptq",
            _option(config, wrong, "bits", BITS if kind == "gptq_p" else (2, 3, 4, 8), None),
            _group_size(config, wrong, 128),
            _option(config, wrong, "sym", (True, False), True),
            minus_one=kind == "gptq",
        )

    return _rules(config, wrong, scheme)


def _awq(config: Json, wrong: list[str]) -> Groups:
    kind = config.get("version") or config.get("format") or "gemm"
    _option({"version": str(kind).lower()}, wrong, "version", ("gemm",), "")

    def scheme(config: Json, wrong: list[str]) -> Scheme:
        bits = _option(config, wrong, "bits", (4,), 4)
        if "sym" in config:
            symmetric = _option(config, wrong, "sym", (True, False), None)
        else:
            symmetric = not _option(config, wrong, "zero_point", (True, False), True)
        return Scheme("awq", bits, _group_size(config, wrong, 128), symmetric)

    return _rules(config, wrong, scheme)


def _rules(config: Json, wrong: list[str], scheme: Callable[[Json, list[str]], Scheme]) -> Groups:
    """The groups that GPTQModel's `dynamic` makes, and the one of all other layers.

    A rule is an expression that a layer's name begins with, after "-:", which leaves the layer
    floats, or after "+:" or nothing, which changes options. The first that matches holds; those
    that leave floats come first.
    """
    faults: list[str] = []
    others = scheme(config, faults)
    wrong.extend(faults)
    rules = config.get("dynamic") or {}
    if not isinstance(rules, dict):
        wrong.append(f"dynamic={rules!r} (only options by expression)")
        return []
    groups: Groups = []
    for rule in sorted(rules, key=lambda rule: not rule.startswith("-")):
        expression = rule[2:] if rule.startswith(("-:", "+:")) else rule
        chosen, changed = None, rules[rule]
        own: list[str] = []
        if not isinstance(changed, dict):
            own.append(f"{changed!r} (only options by name)")
        elif not rule.startswith("-:"):
            chosen = scheme({**config, **changed}, own)
        _check_expression(expression, own)
        wrong.extend(f"dynamic[{rule!r}]: {fault}" for fault in own if fault not in faults)
        groups.append(((f"re:{expression}",), chosen))
    return [*groups, (("Linear",), others)]


def _check_expression(expression: str, wrong: list[str]) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        wrong.append(f"{expression!r} is no regular expression: {error}")


def _compressed_tensors(config: Json, wrong: list[str]) -> Groups:
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    for key in ("kv_cache_scheme", "transform_config"):
        if config.get(key):
            wrong.append(f"{key} (not supported)")
    if sparsity != "dense":
        wrong.append(f"sparsity_config of format {sparsity!r} (only 'dense')")
    groups = []
    for name, group in (config.get("config_groups") or {}).items():
        faults: list[str] = []
        kind = group.get("format") or config.get("format")
        kinds = {"pack-quantized": (4, 8), "int-quantized": (8,)}
        kind = _option({"format": kind}, faults, "format", tuple(kinds), "")
        weights = group.get("weights") or {}
        _option(weights, faults, "type", ("int",), "int")
        _option(weights, faults, "dynamic", (False,), False)
        size = _group_size(weights, faults, None)
        by_group = "group" if size else "channel"
        _option(weights, faults, "strategy", ("channel", "group"), by_group)
        if weights.get("strategy") == "group" and size is None:
            faults.append("strategy='group' without a group_size")
        bits = _option(weights, faults, "num_bits", kinds[kind], None)
        symmetric = _option(weights, faults, "symmetric", (True, False), True)
        activations = None
        if inputs := group.get("input_activations"):
            for key, allowed in _TOKENS.items():
                _option(inputs, faults, f"{key}", (allowed,), None)
            activations = Activations(Quantizer(8))
        if group.get("output_activations"):
            faults.append("output_activations (not supported)")
        scheme = Scheme(kind, bits, size, symmetric, activations)
        targets = tuple(group.get("targets") or ("Linear",))
        for target in targets:
            if target.startswith("re:"):
                _check_expression(target.removeprefix("re:"), faults)
        wrong.extend(f"{name}: {fault}" for fault in faults)
        groups.append((targets, scheme))
    if not groups:
        wrong.append("it has no config_groups")
    return groups


def _torchao(config: Json, wrong: list[str]) -> Groups:
    kinds = config.get("quant_type")
    if (
        not isinstance(kinds, dict)
        or not isinstance(kinds.get("default"), dict)
        or kinds.keys() - {"default"}
    ):
        wrong.append(f"quant_type={kinds!r} (only one for all layers, of version 2)")
        return []
    described = kinds["default"]
    names = (
        "Int8WeightOnlyConfig",
        "Int8DynamicActivationInt8WeightConfig",
        "IntxWeightOnlyConfig",
        "Int8DynamicActivationIntxWeightConfig",
    )
    kind = _option(described, wrong, "_type", names, None)
    _option(described, wrong, "_version", (2,), None)
    data = described.get("_data") or {}

    def value(key: str, default: str) -> str:
        held = data.get(key) or {}
        return held.get("_data", default) if isinstance(held, dict) else str(held)

    bits, symmetric, size, activations = 8, True, data.get("group_size"), None
    prefix = "weight_" if kind == names[3] else ""
    for key in ("reduce_range", "weight_only_decode"):
        _option(data, wrong, key, (False,), False)
    spread: Json = data.get(f"{prefix}granularity") or {"_type": "PerRow"}
    if not isinstance(spread, dict):
        wrong.append(f"granularity={spread!r} (only one for weights and inputs)")
        return []
    _option(spread, wrong, "_type", ("PerRow", "PerAxis", "PerGroup"), "PerRow")
    size = (spread.get("_data") or {}).get("group_size", size)
    if kind in names[2:]:
        kinds = {f"int{bits}": bits for bits in range(2, 9)}
        bits = kinds[
            _option({"dtype": value("weight_dtype", "int8")}, wrong, "dtype", [*kinds], "")
        ]
        symmetric = value(f"{prefix}mapping_type", "SYMMETRIC") != "ASYMMETRIC"
        layout = {"format": value("intx_packing_format", "UNPACKED_TO_INT8")}
        _option(layout, wrong, "format", ("UNPACKED_TO_INT8",), "")
    if kind in (names[1], names[3]):
        inputs = {
            "SYMMETRIC": Quantizer(8, levels="n+1/2"),
            "ASYMMETRIC": Quantizer(8, symmetric=False),
        }
        only = "SYMMETRIC" if kind == names[1] else "ASYMMETRIC"
        _option({"inputs": value("act_mapping_type", only)}, wrong, "inputs", (only,), "")
        activations = Activations(inputs[only])  # by token
    return [(("Linear",), Scheme("torchao", bits, size, symmetric, activations))]


# Inputs by token. The format does not say what divides their largest magnitude; vLLM takes 127.
_TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}


def write_config(binding: Binding, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """The `quantization_config` of layers that are written, by their sources."""
    targets: dict[Scheme, list[str]] = collections.defaultdict(list)
    for source, scheme in schemes.items():
        targets[scheme].append(source.removesuffix(".weight"))
    formats = {scheme.format for scheme in targets}
    dense = [
        source.removesuffix(".weight")
        for source, pieces in binding.sources.items()
        if pieces[0].layout is LAYOUTS["linear"] and source not in schemes
    ]
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {
            f"group_{k}": _group(scheme, layers)
            for k, (scheme, layers) in enumerate(targets.items())
        },
        "ignore": dense,
        "kv_cache_scheme": None,
    }


def _group(scheme: Scheme, layers: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group_size else "channel",
        "group_size": scheme.group_size,
        "actorder": "group" if scheme.ordered else None,
        "dynamic": False,
    }
    return {
        "format": scheme.format,
        "targets": layers,
        "weights": weights,
        "input_activations": None if scheme.activations is None else dict(_TOKENS),
        "output_activations": None,
    }
