"""What a compressed pipeline is compared with: the model that it was made of."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

from converters.hub import open_folder
from effjax.forward import METHODS, Forward, Params
from effjax.pipelines.base import INDEX, BasePipeline, Origin
from effjax.pipelines.loading import Components
from effjax.quant import QTensor, restore
from effjax.registry import method
from effjax.transform import Pair, on_shapes


class Reference(NamedTuple):
    """A model without methods.

    Attributes:
        pair: its forward and parameters.
        kind: "dense" for weights that no method changed; "dequantized" for floats that were made of
            quantized values, whose rounding is in them.
        model: where the weights come from; None for the pipeline's own.
        reason: why they are dequantized.
    """

    pair: Pair
    kind: str
    model: str | None = None
    reason: str = ""

    def sentence(self) -> str:
        """What it is, for people."""
        if self.kind == "dense":
            return f"the dense model{f', {self.model}' if self.model else ''}"
        return f"dequantized weights ({self.reason})"


def reference(pipe: BasePipeline, model: str | None = None) -> Reference:
    """What a pipeline is compared with.

    Methods that change no weights leave the pipeline's own; else the model that it was made of is
    loaded, in its dtypes. Where that cannot be found, its own weights are dequantized. What a
    method added to the model (adapters) belongs to it, where others made that smaller.

    Args:
        pipe: the compressed pipeline.
        model: directory or repository of the model that it was made of; what the pipeline remembers
            if None.

    Raises:
        ValueError: for a model that was given and cannot be loaded, is compressed itself, or has
            another configuration.
    """
    found = _without_methods(pipe, model)
    return found._replace(pair=_with_additions(pipe, *found.pair))


def _with_additions(pipe: BasePipeline, forward: Forward, params: Params) -> Pair:
    added = [(name, plan) for name, plan in pipe.forward.recipe if not method(name).saves]
    if (
        forward.model is not pipe.forward.model
        or not added
        or len(added) == len(pipe.forward.recipe)
    ):
        return forward, params
    transforms = [method(name).transform(plan) for name, plan in added]
    forward, _ = on_shapes(transforms, forward, params)
    learned = pipe.params.get(METHODS, {})
    return forward, {**params, METHODS: {n: learned[n] for n, _ in added if n in learned}}


def _without_methods(pipe: BasePipeline, model: str | None) -> Reference:
    if model is not None:
        return _loaded(pipe, Origin(model))
    own = {name: leaf for name, leaf in pipe.params.items() if name != METHODS}
    bare = _bare(pipe)
    methods = dict.fromkeys(name for name, _ in pipe.forward.recipe)
    changing = [name for name in methods if "leaves" in method(name).seams]
    if not changing and not _is_quantized(own):
        return Reference((bare, own), "dense")
    reason = "what it was made of is not known; give the model as reference"
    if changing and pipe.origin is not None:
        try:
            return _loaded(pipe, pipe.origin)
        except (ValueError, OSError, ImportError) as error:
            reason = f"{pipe.origin.model} cannot be loaded: {str(error).splitlines()[0]}"
    if _replaced(pipe):
        raise ValueError(
            f"a {pipe.forward.model.__name__} is compared with the model that it was made of, and "
            f"{reason}"
        )
    if not changing:
        reason = "it was quantized when it was loaded"
    restored = restore(own, pipe.forward.config.param_dtype)
    return Reference((bare, restored), "dequantized", None, reason)


def _replaced(pipe: BasePipeline) -> bool:
    """Whether a method put another model in the place of the one that it was given."""
    return any(method(name).loop is not None for name, _ in pipe.forward.recipe)


def _bare(pipe: BasePipeline) -> Forward:
    return dataclasses.replace(pipe.forward, patches=(), recipe=())


def _loaded(pipe: BasePipeline, origin: Origin) -> Reference:
    """The model of an origin, computed as the pipeline is."""
    config = pipe.forward.config
    options: dict[str, Any] = {"compute_dtype": config.dtype, "progress": True}
    folder = open_folder(origin.model, revision=origin.revision)
    index = folder.read(INDEX) if folder.has(INDEX) else None
    found = Components(pipe.family, folder, index, {}, origin.variant, options)
    name = None if index is None else pipe.family.model
    forward, params = found.model(name, any_kind=_replaced(pipe))
    if forward.recipe:
        raise ValueError(f"{origin.model} is compressed itself; give the model that it was made of")
    given, own = dataclasses.asdict(forward.config), dataclasses.asdict(config)
    bare = forward if _replaced(pipe) else _bare(pipe)
    if _replaced(pipe):  # the new model's fields are those of the old one, and more
        own = {name: value for name, value in own.items() if name in given}
    other = [name for name in own if name != "param_dtype" and given.get(name) != own[name]]
    if other or bare.model is not forward.model:
        other = other or ["its class"]
        raise ValueError(f"{origin.model} is another model: it differs in {', '.join(other)}")
    if _is_quantized(params):
        restored = restore(params, config.param_dtype)
        reason = f"{origin.model} is quantized itself"
        return Reference((bare, restored), "dequantized", origin.model, reason)
    if forward.config.param_dtype != config.param_dtype:
        params = jax.tree.map(lambda leaf: leaf.astype(config.param_dtype), params)
    return Reference((bare, params), "dense", origin.model)


def _is_quantized(params: Any) -> bool:
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    return any(isinstance(leaf, QTensor) for leaf in leaves)
