"""The patch that puts a cache at every attention core, and the caches that models need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from flax import nnx

from effjax.caches.dense import DenseCache
from effjax.caches.protocol import KVCache
from effjax.caches.ring import RingCache
from effjax.context import CacheLength, Context, is_static
from effjax.layers.attention import CausalCore
from effjax.targets import target_modules, wrap

Kind = tuple[type[KVCache], dict[str, Any]]  # and its options


class Place(NamedTuple):
    """Where a cache goes.

    Attributes:
        core: what it wraps.
        cache_length: how long sequences may become.
        layer: number of the layer, from 0.
        layers: how many there are.
    """

    core: CausalCore
    cache_length: CacheLength
    layer: int
    layers: int


@dataclasses.dataclass(frozen=True)
class Caches:
    """Patch: a cache at every attention core.

    Attributes:
        choose: (plan, place) -> `Kind` for one core; a function of a module, so that equal patches
            are equal.
        plan: what it goes by.
    """

    choose: Callable[[Any, Place], Kind]
    plan: Any = None
    caches: ClassVar[bool] = True

    def check(self, tokens: int) -> None:
        """Raise ValueError if the plan has nothing for a sequence of so few tokens."""
        if hasattr(self.plan, "check_length"):
            self.plan.check_length(tokens)

    def __call__(self, module: nnx.Module, context: Context) -> None:
        found = target_modules(module, CausalCore)
        if not found:
            raise ValueError(f"{type(module).__name__} has no causal attention to cache")
        if context.cache_length is None:
            raise ValueError(
                "a cache must know how long sequences may become: use "
                "forward.with_cache_length(prompt, new), or the functions of effjax.generate, "
                "which do"
            )
        first = is_static(context.step) and int(context.step) == 0
        for layer, target in enumerate(found):
            core = target.module
            assert isinstance(core, CausalCore)
            if core.window is not None and self.choose is not as_it_is:
                raise ValueError(
                    f"layer {layer} of this model sees the last {core.window} tokens only, and its "
                    f"own ring holds no more; other caches are for models whose layers see all"
                )
            place = Place(core, context.cache_length, layer, len(found))
            kind, options = self.choose(self.plan, place)
            if core.leading is not None and not kind.takes_latents:
                raise ValueError(
                    f"{kind.__name__} is made for keys and values of every head, and layer {layer} "
                    f"of this model holds one latent for all heads: use the dense cache, or one "
                    f"that chooses or quantizes tokens"
                )
            options = {"first": first, "cache_length": context.cache_length, **options}
            wrap(module, target.path, kind, **options)


def as_it_is(plan: None, place: Place) -> Kind:
    """All that a core's queries see: every token, or those of its window."""
    if place.core.window is None:
        return DenseCache, {}
    return RingCache, {"sinks": 0, "ring": place.core.window}
