"""What the `quantization_config` of a config.json says of layers, read and written.

GPTQ, AWQ and torchao have one scheme for the layers that they quantized, which rules of GPTQModel
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
_FLOAT8 = Quantizer(8, levels="e4m3")

# What becomes of other formats, by quant_method, and of other formats of compressed-tensors.
_SAVE = "and save_pretrained it as floats"
_ELSEWHERE = {
    "bitsandbytes": f"load it with transformers, call model.dequantize() {_SAVE}",
    "mxfp4": f"load it with transformers' Mxfp4Config(dequantize=True) {_SAVE}",
    "gguf": f"load it with transformers' from_pretrained(folder, gguf_file=...) {_SAVE}",
}
_MAKERS = "llm-compressor (scheme W4A16, W8A8 or FP8_DYNAMIC) or GPTQModel (gptq, awq)"
_FLOAT_FORMATS = {
    "nvfp4-pack-quantized": "NVFP4",
    "mxfp4-pack-quantized": "MXFP4",
    "mxfp6-pack-quantized": "MXFP6",
    "mxfp8-quantized": "MXFP8",
}


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
        """The quantized layers that a checkpoint holds, by name; all others are floats.

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
                f"the file holds quantized values of {unknown}, which no group or rule of {KEY} "
                "quantizes"
            )
        layers = {}
        for layer, scheme in schemes.items():
            assert scheme is not None
            if scheme.layout.qvalues == "weight" and f"{layer}.weight" in tensors:
                found[layer]["weight"] = tensors[f"{layer}.weight"]
            layers[layer] = Layer(layer, scheme, found[layer])
        return layers


def read_config(config: Any) -> Quantization:
    """A `quantization_config` of config.json.

    Raises:
        ValueError: for methods and formats that are not supported, and options that are wrong, all
            listed at once.
    """
    if not isinstance(config, dict):
        raise ValueError(f"{KEY} must be an object, got {config!r}")
    method = config.get("quant_method")
    readers = {
        "gptq": _gptq,
        "awq": _awq,
        "fp8": _fp8,
        "compressed-tensors": _compressed_tensors,
        "torchao": _torchao,
    }
    if not isinstance(method, str) or method not in readers:
        way = _ELSEWHERE.get(str(method), "convert it to floats with the library that made it")
        raise ValueError(
            f"{KEY} has quant_method={method!r}, which is not read ({', '.join(readers)} are): "
            f"{way}, or quantize the original model with {_MAKERS}"
        )
    wrong: list[str] = []
    read = readers[method](config, wrong)
    if wrong:
        raise ValueError(f"{KEY} of {method} cannot be read: {'; '.join(wrong)}")
    return Quantization(tuple(read))


def _option(
    config: Json,
    wrong: list[str],
    key: str,
    allowed: Sequence[Any],
    default: Any,
    path: str = "",
) -> Any:
    """A value of the configuration, which lies at a path; one that is not allowed is noted."""
    value = config.get(key, default)
    if not any(type(value) is type(each) and value == each for each in allowed):
        wrong.append(f"{path}{key}={value!r} (only {', '.join(map(repr, allowed))})")
        return allowed[0]
    return value


def _object(config: Json, wrong: list[str], key: str, path: str = "") -> Json:
    """An object within the configuration, empty if it is not there."""
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        wrong.append(f"{path}{key}={value!r} (only an object)")
        return {}
    return value or {}


def _group_size(config: Json, wrong: list[str], default: int | None, path: str = "") -> int | None:
    value = config.get("group_size", default)
    if value is None or value == -1:
        return None
    if type(value) is not int or value < 1:
        wrong.append(f"{path}group_size={value!r} (only -1, for all inputs, and positive numbers)")
        return None
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


def _fp8(config: Json, wrong: list[str]) -> Groups:
    """transformers' fine-grained FP8, as of DeepSeek-V3, and GPTQModel's, whose scales divide."""
    divides = "weight_scale_semantics" in config

    def scheme(config: Json, wrong: list[str]) -> Scheme:
        names = ("float8_e4m3fn", "e4m3", "e4m3fn", None)
        for key in ("format", "fmt"):
            _option(config, wrong, key, names, None)
        size = _pair(config, wrong, "weight_block_size", None if divides else [128, 128])
        block = (size[1], size[0]) if size else (None, None)
        if not divides:
            _option(config, wrong, "activation_scheme", ("dynamic",), "dynamic")
            _option(config, wrong, "scale_fmt", ("float", None), None)
            inputs = Activations(_FLOAT8, group_size=block[0])
            return Scheme("fp8", 8, None, True, inputs, block=block)
        _option(config, wrong, "weight_scale_semantics", ("inverse",), None)
        kinds = ("block",) if size else ("row", "tensor")
        if _option(config, wrong, "weight_scale_method", kinds, kinds[0]) == "row":
            block = (None, 1)
        return Scheme("fp8", 8, None, True, block=block, divides=True)

    return _rules(config, wrong, scheme)


def _pair(
    config: Json, wrong: list[str], key: str, default: Any, path: str = ""
) -> tuple[int, int] | None:
    """Outputs and inputs of a block, [128, 128] or "128x128", if it is not null."""
    given = config.get(key, default)
    value: Any = given
    if isinstance(value, str):
        value = [int(each) if each.isdecimal() else None for each in value.split("x")]
    if value is None:
        return None
    if (
        not isinstance(value, list | tuple)
        or len(value) != 2
        or not all(type(each) is int and each > 0 for each in value)
    ):
        wrong.append(f"{path}{key}={given!r} (only outputs and inputs of a block, as [128, 128])")
        return None
    return value[0], value[1]


def _rules(config: Json, wrong: list[str], scheme: Callable[[Json, list[str]], Scheme]) -> Groups:
    """The groups that GPTQModel's `dynamic` makes, and the one of all other layers.

    A rule is an expression that a layer's name begins with, after "-:", which leaves the layer
    floats, or after "+:" or nothing, which changes options. The first that matches holds; those
    that leave floats come first.
    """
    faults: list[str] = []
    others = scheme(config, faults)
    wrong.extend(faults)
    rules = _object(config, wrong, "dynamic")
    groups: Groups = []
    for rule in sorted(rules, key=lambda rule: not rule.startswith("-")):
        expression = rule[2:] if rule.startswith(("-:", "+:")) else rule
        own: list[str] = []
        changed, chosen = _object(rules, wrong, rule, "dynamic: "), None
        if not rule.startswith("-:"):
            chosen = scheme({**config, **changed}, own)
        _check_expression(expression, own)
        wrong.extend(f"dynamic: {rule}: {fault}" for fault in own if fault not in faults)
        groups.append(((f"re:{expression}",), chosen))
    return [*groups, (("Linear",), others)]


def _check_expression(expression: str, wrong: list[str]) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        wrong.append(f"{expression!r} is no regular expression: {error}")


def _compressed_tensors(config: Json, wrong: list[str]) -> Groups:
    sparsity = _object(config, wrong, "sparsity_config").get("format", "dense")
    for key in ("kv_cache_scheme", "transform_config"):
        if config.get(key):
            wrong.append(f"{key} (not supported)")
    if sparsity != "dense":
        wrong.append(f"sparsity_config of format {sparsity!r} (only 'dense')")
    groups: Groups = []
    described = _object(config, wrong, "config_groups")
    for name in described:
        faults: list[str] = []
        group = _object(described, wrong, name)
        targets = group.get("targets", ["Linear"])
        if not isinstance(targets, list) or not all(isinstance(each, str) for each in targets):
            faults.append(f"targets={targets!r} (only a list of names and expressions)")
            targets = []
        for target in targets:
            if target.startswith("re:"):
                _check_expression(target.removeprefix("re:"), faults)
        groups.append((tuple(targets), _group_scheme(group, config.get("format"), faults)))
        wrong.extend(f"{name}: {fault}" for fault in faults)
    if "config_groups" not in config:
        wrong.append("it has no config_groups")
    return groups


def _group_scheme(group: Json, kind: Any, wrong: list[str]) -> Scheme:
    """That of one group of compressed-tensors, with the format of all unless it has its own."""
    kind = group.get("format") or kind
    if str(kind) in _FLOAT_FORMATS:
        wrong.append(
            f"format={kind!r} ({_FLOAT_FORMATS[kind]} is not read: load it with transformers' "
            f"CompressedTensorsConfig(dequantize=True) {_SAVE}, or quantize the original model "
            f"with {_MAKERS})"
        )
        kind = "pack-quantized"
    weights = _object(group, wrong, "weights")
    if kind == "naive-quantized":  # of either kind
        kind = "float-quantized" if weights.get("type") == "float" else "int-quantized"
    kinds = {"pack-quantized": (4, 8), "int-quantized": BITS, "float-quantized": (8,)}
    kind = _option({"format": kind}, wrong, "format", tuple(kinds), "")
    floats = kind == "float-quantized"

    def option(key: str, allowed: Sequence[Any], default: Any) -> Any:
        return _option(weights, wrong, key, allowed, default, "weights.")

    option("type", ("float" if floats else "int",), "int")
    option("dynamic", (False,), False)
    size = _group_size(weights, wrong, None, "weights.")
    strategies = ("channel", "group", "tensor", "block")[: 4 if floats else 2]
    strategy = option("strategy", strategies, "group" if size else "channel")
    if strategy == "group" and size is None:
        wrong.append("weights.strategy='group' without a group_size")
    order = option("actorder", _ORDERS, None)
    if group.get("output_activations"):
        wrong.append("output_activations (not supported)")
    bits = option("num_bits", kinds[kind], None)
    symmetric = option("symmetric", (True,) if floats else (True, False), True)
    inputs = _inputs(_object(group, wrong, "input_activations"), wrong, floats)
    if not floats:
        ordered = size is not None and order in _ORDERS[:3]
        return Scheme(kind, bits, size, symmetric, inputs, ordered=ordered)
    block = {"channel": (None, 1), "group": (size, 1), "tensor": (None, None)}.get(strategy)
    if block is None:
        pair = _pair(weights, wrong, "block_structure", None, "weights.")
        if "block_structure" not in weights:
            wrong.append("weights.strategy='block' without a block_structure")
        block = pair and (pair[1], pair[0])
    return Scheme(kind, bits, None, True, inputs, block=block or (None, None))


# How GPTQ took inputs: the first three keep the group of each, as it was before 0.19.
_ORDERS = ("group", "dynamic", True, "weight", "static", False, None)


def _inputs(config: Json, wrong: list[str], floats: bool) -> Activations | None:
    """Inputs of compressed-tensors, which divides a token's range by 127.5, half its values."""
    if not config:
        return None

    def option(key: str, allowed: Sequence[Any], default: Any) -> Any:
        return _option(config, wrong, key, allowed, default, "input_activations.")

    option("type", ("float" if floats else "int",), None)
    option("dynamic", (True,), None)
    bits = option("num_bits", (8,) if floats else BITS, None)
    symmetric = option("symmetric", (True,) if floats else (True, False), True)
    strategy = option("strategy", ("token", "group") if floats else ("token",), None)
    if not floats:
        levels = "n+1/2" if symmetric else "n"
        return Activations(Quantizer(bits, symmetric, levels))
    size = _group_size(config, wrong, None, "input_activations.")
    return Activations(_FLOAT8, group_size=size if strategy == "group" else None)


def _torchao(config: Json, wrong: list[str]) -> Groups:
    kinds, path = config.get("quant_type"), "quant_type.default."
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
    kind = _option(described, wrong, "_type", names, None, path)
    _option(described, wrong, "_version", (2,), None, path)
    data, path = _object(described, wrong, "_data", path), f"{path}_data."

    def value(key: str, allowed: Sequence[str], default: str) -> str:
        """One of a few names, which may be of an enumeration."""
        held = data.get(key, default)
        held = held.get("_data", default) if isinstance(held, dict) else held
        return _option({key: held}, wrong, key, allowed, None, path)

    bits, symmetric, activations = 8, True, None
    prefix = "weight_" if kind == names[3] else ""
    for key in ("reduce_range", "weight_only_decode"):
        _option(data, wrong, key, (False,), False, path)
    spread = _object(data, wrong, f"{prefix}granularity", path)
    where = f"{path}{prefix}granularity."
    _option(spread, wrong, "_type", ("PerRow", "PerAxis", "PerGroup"), "PerRow", where)
    size = _group_size({**data, **_object(spread, wrong, "_data", where)}, wrong, None, path)
    if kind in names[2:]:
        widths = {f"int{bits}": bits for bits in BITS}
        bits = widths[value("weight_dtype", tuple(widths), "int8")]
        mappings = ("SYMMETRIC", "SYMMETRIC_NO_CLIPPING_ERR", "ASYMMETRIC")
        symmetric = value(f"{prefix}mapping_type", mappings, "SYMMETRIC") != "ASYMMETRIC"
        value("intx_packing_format", ("UNPACKED_TO_INT8",), "UNPACKED_TO_INT8")
    if kind in (names[1], names[3]):
        only = "SYMMETRIC" if kind == names[1] else "ASYMMETRIC"
        value("act_mapping_type", (only,), only)
        even = only == "SYMMETRIC"
        activations = Activations(
            Quantizer(8, levels="n+1/2") if even else Quantizer(8, symmetric=False)
        )
    return [(("Linear",), Scheme("torchao", bits, size, symmetric, activations))]


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
    kind, block, size = "int", None, scheme.group_size
    strategy = "group" if size else "channel"
    if scheme.block is not None:
        kind, (size, wide) = "float", scheme.block
        whole = {1: "channel", None: "tensor"}
        strategy = whole[wide] if size is None else "group"
        if wide != 1 and scheme.block != (None, None):
            strategy, block, size = "block", [wide, size], None
    inputs = scheme.activations
    return {
        "format": scheme.format,
        "targets": layers,
        "weights": {
            "num_bits": scheme.bits,
            "type": kind,
            "symmetric": scheme.symmetric,
            "strategy": strategy,
            "group_size": size,
            "block_structure": block,
            "actorder": None,
            "dynamic": False,
        },
        "input_activations": inputs
        and {
            "num_bits": inputs.quantizer.bits,
            "type": kind,
            "symmetric": inputs.quantizer.symmetric,
            "strategy": "group" if inputs.group_size else "token",
            "group_size": inputs.group_size,
            "dynamic": True,
        },
        "output_activations": None,
    }
