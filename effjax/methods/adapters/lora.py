"""LoRA: a trained change of low rank, added to layers or merged into them (arXiv 2106.09685).

    y = x W + b + scale (x down) up        down [I, r], up [r, O]; up holds alpha / r already

`add` puts adapters beside the layers: several at once, on quantized layers too, each with a scale
that is data (`set_scales`), so that one compiled program serves all scales. `merge` adds one to the
weights, which then cost what they did before. `converters.load_lora` reads files, and so does
`effjax apply MODEL SMALLER lora --file style.safetensors --scale 0.8`.

Use `add` to try adapters and scales, or where weights are quantized; use `merge` for one adapter
that stays, before any quantization.

Static: which layers, and ranks. Dynamic: nothing. Cost beside a layer: r (I + O) products for each
token and adapter, and as many weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float

from effjax import testing
from effjax.calibration import Adapters
from effjax.context import Context
from effjax.fields import Count
from effjax.forward import METHODS, Forward, Params, flatten_params, nest_params
from effjax.layers.linear import Linear, dot
from effjax.quant import QTensor
from effjax.targets import Wrapper, wrap
from effjax.transform import Method, Pair, Plan, Transform

NAME = "lora"

Factors = tuple[Array | np.ndarray, Array | np.ndarray]
Adapter = Mapping[str, Factors]
"""The factors (down [I, r], up [r, O]) of each layer, by its path."""


@dataclasses.dataclass(frozen=True)
class LoRAPlan(Plan):
    """Which layers adapters change.

    Attributes:
        adapters: for each its name, and the rank of each layer by path.
    """

    adapters: tuple[tuple[str, tuple[tuple[str, Count], ...]], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [name for name, _ in self.adapters]
        wrong = [name for name in names if not name.isidentifier() or name == _SCALES]
        if wrong or len({*names}) < len(names):
            raise ValueError(
                f"adapters need different names, each a Python identifier and not {_SCALES!r}; "
                f"got {names}"
            )

    def describe(self) -> str:
        """Of each adapter how many layers it changes, and their ranks."""
        said = []
        for name, layers in self.adapters:
            ranks = ", ".join(map(str, sorted({rank for _, rank in layers})))
            said.append(f"{name}: {len(layers)} layers of rank {ranks}")
        return "\n".join(said) or "no adapters"


_SCALES = "scales"


def add(adapters: Mapping[str, Adapter], scales: Mapping[str, float] | None = None) -> Transform:
    """The transform that puts adapters beside the layers of a model.

    Args:
        adapters: by names that you choose.
        scales: of each; 1 where none is given.

    Raises:
        ValueError: for scales of adapters that there are not, or that are no finite numbers; when
            it is applied, for an adapter of another model, with all that does not fit, for a name
            that is taken, for layers into whose inputs another method has folded factors, and for
            those that another method has replaced by factors of its own.
    """
    return transform(*read(Adapters(adapters, scales or {})))


def read(data: Adapters) -> tuple[LoRAPlan, Params]:
    """The plan of adapters, and what `transform` takes beside it.

    Raises:
        ValueError: as `add`.
    """
    _check_scales(data.scales, data.factors)
    ranks = tuple((name, _ranks(adapter)) for name, adapter in data.factors.items())
    flat: dict[str, Any] = {}
    for name, adapter in data.factors.items():
        flat[f"{_SCALES}.{name}"] = jnp.asarray(data.scales.get(name, 1.0), jnp.float32)
        for path, (down, up) in adapter.items():
            flat[f"{path}.{name}.down"], flat[f"{path}.{name}.up"] = map(jnp.asarray, (down, up))
    return LoRAPlan(ranks), nest_params(flat)


def transform(plan: LoRAPlan, learned: Params | None = None) -> Transform:
    """Put adapters beside the layers.

    Args:
        plan: their names, layers and ranks.
        learned: scales, and factors by path of the layer and name of the adapter, as `add` makes
            them.
    """

    def shapes(forward: Forward, params: Params) -> Pair:
        return put(forward, params, nest_params(_shapes(plan, forward, params)))

    def put(forward: Forward, params: Params, given: Params) -> Pair:
        _check_inputs(forward, [path for _, ranks in plan.adapters for path, _ in ranks])
        methods = params.get(METHODS, {})
        held = flatten_params(methods.get(NAME, {}))
        if taken := [name for name, _ in plan.adapters if f"{_SCALES}.{name}" in held]:
            raise ValueError(
                f"this model has adapters {', '.join(taken)} already: choose other names"
            )
        both = nest_params({**held, **flatten_params(given)})
        return forward.patch(_Patch(plan)), {**params, METHODS: {**methods, NAME: both}}

    def apply(forward: Forward, params: Params) -> Pair:
        wanted = _shapes(plan, forward, params)
        if learned is None and wanted:
            raise ValueError(
                "lora needs the factors of its adapters: read a file with converters.load_lora, "
                "and give it to lora.add"
            )
        given = {} if learned is None else flatten_params(learned)
        _check_fit(given, wanted)
        dtype = forward.config.param_dtype
        cast = {
            name: leaf if name.startswith(f"{_SCALES}.") else jnp.asarray(leaf).astype(dtype)
            for name, leaf in given.items()
        }
        return put(forward, params, nest_params(cast))

    return Transform(NAME, plan, apply, shapes)


def merge(adapter: Adapter, scale: float = 1.0) -> Callable[[Forward, Params], Pair]:
    """The transform that adds an adapter to the weights.

    Nothing else changes, and no recipe tells it: the result is a model with other weights.

    Raises:
        ValueError: for a scale that is no finite number; when it is applied, for an adapter of
            another model, with all that does not fit, for quantized layers, whose values have no
            room for it, and as `add` for what other methods did to the layers.
    """

    _check_scales({"merged": scale}, {"merged": adapter})

    def apply(forward: Forward, params: Params) -> Pair:
        flat = flatten_params(params)
        wanted = _shapes(LoRAPlan((("merged", _ranks(adapter)),)), forward, params)
        del wanted[f"{_SCALES}.merged"]
        given = {
            f"{path}.merged.{part}": factor
            for path, factors in adapter.items()
            for part, factor in zip(("down", "up"), factors, strict=True)
        }
        _check_fit(given, wanted)
        _check_inputs(forward, adapter)
        quantized = [path for path in adapter if isinstance(flat[f"{path}.kernel"], QTensor)]
        if quantized:
            raise ValueError(
                f"{len(quantized)} layers of this adapter are quantized ({quantized[0]}, ...): "
                f"merge it before you quantize, or put it beside them with lora.add"
            )
        for path, (down, up) in adapter.items():
            kernel = flat[f"{path}.kernel"]
            change = jnp.asarray(down, jnp.float32) @ jnp.asarray(up, jnp.float32)
            wide = kernel.astype(jnp.float32) + jnp.float32(scale) * change
            flat[f"{path}.kernel"] = wide.astype(kernel.dtype)
        return forward, nest_params(flat)

    return apply


def set_scales(params: Params, **scales: float) -> Params:
    """Parameters with other scales of adapters that `add` put there; no program changes.

    Raises:
        ValueError: for adapters that there are not, and scales that are no finite numbers.
    """
    held = params.get(METHODS, {}).get(NAME, {}).get(_SCALES, {})
    _check_scales(scales, held)
    if not scales:
        return params
    new = {name: jnp.asarray(scale, jnp.float32) for name, scale in scales.items()}
    methods = params[METHODS]
    own = {**methods[NAME], _SCALES: {**held, **new}}
    return {**params, METHODS: {**methods, NAME: own}}


def _check_scales(scales: Mapping[str, float], adapters: Mapping[str, Any]) -> None:
    """Scales must be finite numbers of adapters that there are; traced ones are not looked at."""
    if unknown := sorted(set(scales) - set(adapters)):
        raise ValueError(
            f"there are no adapters {', '.join(unknown)}; there are {', '.join(adapters) or 'none'}"
        )
    given = {name: each for name, each in scales.items() if not isinstance(each, Tracer)}
    for name, each in given.items():
        if isinstance(each, str) or np.ndim(each) or not np.isfinite(each):
            raise ValueError(f"the scale of {name} must be a finite number, got {each!r}")


def _ranks(adapter: Adapter) -> tuple[tuple[str, int], ...]:
    """The rank of each layer.

    Raises:
        ValueError: for factors that are no matrices.
    """
    wrong = [path for path, each in adapter.items() if {*map(np.ndim, each)} != {2}]
    if wrong:
        raise ValueError(f"factors must be matrices [I, r] and [r, O]; not so: {', '.join(wrong)}")
    return tuple((path, int(down.shape[1])) for path, (down, _) in adapter.items())


def _shapes(plan: LoRAPlan, forward: Forward, params: Params) -> dict[str, jax.ShapeDtypeStruct]:
    """Scales and factors that a plan needs, by name.

    Raises:
        ValueError: for paths that are no layers of this model.
    """
    layers = {
        target.path: target.module.kernel.get_value().shape  # pyright: ignore
        for target in forward.target_modules(params, Linear)
    }
    asked = [path for _, ranks in plan.adapters for path, _ in ranks]
    if wrong := [path for path in asked if len(layers.get(path, ())) != 2]:
        raise ValueError(
            f"{forward.model.__name__} has no layers {', '.join(wrong)}: is the adapter of another "
            f"model? Its layers are {', '.join([*layers][:8])}, ..."
        )
    dtype, found = jnp.dtype(forward.config.param_dtype), {}
    for name, ranks in plan.adapters:
        found[f"{_SCALES}.{name}"] = jax.ShapeDtypeStruct((), jnp.float32)
        for path, rank in ranks:
            inputs, outputs = layers[path]
            found[f"{path}.{name}.down"] = jax.ShapeDtypeStruct((inputs, rank), dtype)
            found[f"{path}.{name}.up"] = jax.ShapeDtypeStruct((rank, outputs), dtype)
    return found


def _check_fit(given: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """All that does not fit, at once."""
    problems = [f"{name} is missing" for name in wanted if name not in given]
    problems += [f"{name} is not in the plan" for name in given if name not in wanted]
    problems += [
        f"{name} is {list(np.shape(given[name]))}, the layer needs {list(spec.shape)}"
        for name, spec in wanted.items()
        if name in given and np.shape(given[name]) != spec.shape
    ]
    if problems:
        raise ValueError("the adapter does not fit this model:\n  " + "\n  ".join(problems))


def _check_inputs(forward: Forward, paths: Iterable[str]) -> None:
    """Check that layers still read and write what an adapter was trained on."""
    folding = [method for method, plan in forward.recipe if getattr(plan, "fold", False)]
    if folding:
        raise ValueError(
            f"{folding[0]} has folded factors into what layers read, so an adapter would see other "
            f"inputs than it was trained on: add the adapter to the model as it was, or quantize "
            f"without folding"
        )
    for method, plan in forward.recipe:
        ends = tuple(f".{name}" for name in getattr(plan, "decomposes", ()))
        if held := [path for path in paths if ends and path.endswith(ends)]:
            raise ValueError(
                f"{method} holds factors of its own in place of {held[0]}, which an adapter there "
                f"would not reach: merge the adapter before {method}"
            )


@dataclasses.dataclass(frozen=True)
class _Patch:
    """Every layer with an adapter is wrapped."""

    plan: LoRAPlan

    def __call__(self, module: nnx.Module, context: Context) -> None:
        if not self.plan.adapters:
            return
        learned = flatten_params(context.learned[NAME])
        by_path: dict[str, list[str]] = {}
        for name, ranks in self.plan.adapters:
            for path, _ in ranks:
                by_path.setdefault(path, []).append(name)
        for path, names in by_path.items():
            factors = {
                name: (
                    learned[f"{path}.{name}.down"],
                    learned[f"{path}.{name}.up"],
                    learned[f"{_SCALES}.{name}"],
                )
                for name in names
            }
            wrap(module, path, LoRALinear, factors)


class LoRALinear(Wrapper):
    """A linear layer and its adapters.

    Args:
        factors: down, up and scale by the name of the adapter.
    """

    def __init__(self, inner: nnx.Module, factors: Mapping[str, tuple[Array, Array, Array]]):
        super().__init__(inner)
        self.names = tuple(factors)
        self.factors = nnx.Dict(
            {
                name: nnx.Dict(
                    {
                        part: nnx.Variable(value)
                        for part, value in zip(("down", "up", "scale"), values, strict=True)
                    }
                )
                for name, values in factors.items()
            }
        )

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        inner: Any = self.inner
        y = inner(x)
        for name in self.names:
            own = self.factors[name]
            down, up, scale = (own[part].get_value() for part in ("down", "up", "scale"))
            y = y + scale.astype(y.dtype) * dot(dot(x, down), up)
        return y


# Contract -----------------------------------------------------------------------------------------


def _plan(subject: testing.Subject, rank: int) -> LoRAPlan:
    layers = subject.forward.target_modules(subject.params, Linear, r"blocks\.\d+\..*")
    paths = [target.path for target in layers if target.module.kernel.get_value().ndim == 2]  # pyright: ignore
    return LoRAPlan((("style", tuple((path, rank) for path in paths)),))


def random_factors(plan: LoRAPlan, forward: Forward, params: Params) -> Params:
    """Random scales and factors for a plan, to try a model with it before there are any."""
    rng = np.random.default_rng(0)
    return nest_params(
        {
            name: jnp.asarray(rng.standard_normal(spec.shape) * 0.1, spec.dtype)
            for name, spec in _shapes(plan, forward, params).items()
        }
    )


METHOD = Method(
    name=NAME,
    paper="LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685",
    seams=("patches",),
    domain="any",
    plan=LoRAPlan,
    transform=transform,
    identity=lambda subject: LoRAPlan(),
    ladder=lambda subject: tuple(_plan(subject, rank) for rank in (4, 2, 1)),
    tiny=testing.tiny_dit,
    saves=False,
    data=Adapters,
    read=read,
    given=random_factors,
)
