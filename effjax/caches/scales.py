"""What a model of scales keeps from call to call: keys, values, and what calls have in common.

VAR computes once what the label alone decides, ECAR the token maps of a stage. A call has whole
scales, and the number of its tokens differs from that of others. Which scales they are is static,
and so is where their keys and values go: a call writes what is new, and reads what its tokens
attend to.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Float

from effjax.context import Context, State, is_static
from effjax.layers.attention import Heads, KeyHeads
from effjax.layers.linear import Linear
from effjax.layers.scales import Outputs, ScaleCore, Scales, Values
from effjax.layers.stages import TokenMaps
from effjax.targets import Wrapper, original, target_modules, wrap


class ScaleCache(Wrapper):
    """Keys and values of all scales, around a `ScaleCore`: the token of place p in slot p."""

    def __init__(self, inner: nnx.Module):
        super().__init__(inner)
        self.k, self.v = State(), State()

    def __call__(self, q: Heads, k: KeyHeads, v: Values, scales: Scales) -> Outputs:
        keys = scales.before + scales.tokens
        k, v = _held(self.k, k, scales), _held(self.v, v, scales)
        return self.inner(q, k[:, :keys], v[:, :keys], scales)


def _held(state: State, new: Float[Array, "B S *K"], scales: Scales) -> Float[Array, "B L *K"]:
    """What is held of the tokens of all scales, the new ones among them."""
    held = state.read((new.shape[0], scales.all_tokens, *new.shape[2:]), new.dtype)
    held = jax.lax.dynamic_update_slice_in_dim(held, new, scales.before, axis=1)
    state.write(held)
    return held


class FirstCall(Wrapper):
    """A layer whose inputs are the same in all calls: its outputs are those of the first call.

    Args:
        first: whether this is the first call; None if that is not known while tracing.
        width: channels of the outputs, O.
    """

    def __init__(self, inner: nnx.Module, *, first: bool | None, width: int):
        super().__init__(inner)
        self.first = first
        self.width = width
        self.outputs = State()

    def __call__(self, x: Float[Array, "B C"]) -> Float[Array, "B O"]:
        if self.first or self.outputs.get_metadata("creating"):
            y = self.inner(x)
            self.outputs.write(y)
            return y
        if self.first is None:
            raise ValueError(
                "scales differ in their numbers of tokens, so that each is a call of its own: give "
                "step=0 for the first one, 1 for the next"
            )
        return self.outputs.read((x.shape[0], self.width), x.dtype)


class KeptMaps(Wrapper):
    """Token maps of all stages, around a `TokenMaps`: calls that make none read what was made."""

    def __init__(self, inner: nnx.Module):
        super().__init__(inner)
        self.maps = State()

    def __call__(
        self, x: Float[Array, "B S C"] | None, scales: Scales, rows: int
    ) -> Float[Array, "B S D"]:
        if x is not None:
            maps = self.inner(x, scales, rows)
            _held(self.maps, maps, scales)
            return maps
        made = original(self)
        assert isinstance(made, TokenMaps)
        held = self.maps.read((rows, scales.all_tokens, made.width), made.dtype)
        return held[:, scales.before : scales.before + scales.tokens]


@dataclasses.dataclass(frozen=True)
class StageCaches:
    """Patch: a cache at every core of scales, and at what the backbone hands to the head.

    A call that is given what the stages before have made runs the backbone and keeps its token
    maps; a call without that runs the head alone, on the maps that are held.
    """

    caches: ClassVar[bool] = True

    def __call__(self, module: nnx.Module, context: Context) -> None:
        maps = target_modules(module, TokenMaps)
        if not maps:
            raise ValueError(f"{type(module).__name__} makes no token maps to cache")
        for target in target_modules(module, ScaleCore):
            wrap(module, target.path, ScaleCache)
        for target in maps:
            wrap(module, target.path, KeptMaps)


@dataclasses.dataclass(frozen=True)
class ScaleCaches:
    """Patch: a cache at every core of scales, and modulations computed once.

    Calls with this patch go by their step: step 0 is the first one of a sequence. All calls of a
    sequence have the same labels.
    """

    caches: ClassVar[bool] = True

    def __call__(self, module: nnx.Module, context: Context) -> None:
        cores = target_modules(module, ScaleCore)
        if not cores:
            raise ValueError(f"{type(module).__name__} has no attention over scales to cache")
        for target in cores:
            wrap(module, target.path, ScaleCache)
        first = int(context.step) == 0 if is_static(context.step) else None
        for path, layer in target_modules(module, Linear):
            assert isinstance(layer, Linear)
            if layer.role == "modulation":
                width = layer.kernel.get_value().shape[-1]
                wrap(module, path, FirstCall, first=first, width=width)
