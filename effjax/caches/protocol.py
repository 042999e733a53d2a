"""What every kind of cache is."""

from __future__ import annotations

import abc
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from effjax.caches.inputs import AttentionInputs
from effjax.caches.slots import Lengths
from effjax.context import CacheLength
from effjax.layers.attention import CausalCore, CoreHeads, CoreKeys, Heads, Positions
from effjax.targets import Wrapper, original


class KVCache(Wrapper, abc.ABC):
    """What every kind of cache is. A kind declares what it can:

        multi_token_append     append several tokens in one call (a question, speculative decoding)
        joint_append           append several tokens that see each other (a `GroupCore`)
        rollback               go back to a shorter sequence by appending at an earlier position
        takes_latents          hold keys that queries and values are made of (a `LatentCore`)
        exact_chunked_prefill  reading a prompt in chunks gives what reading it at once gives

    Args:
        inner: the core.
        first: whether this call is the prefill.
        cache_length: how long sequences may become.
    """

    replaces_internals = True
    apart = True
    takes_latents: ClassVar[bool] = True

    def __init__(self, inner: nnx.Module, *, first: bool, cache_length: CacheLength):
        super().__init__(inner)
        self.first = first
        self.cache_length = cache_length

    @property
    def multi_token_append(self) -> bool:
        """Whether several tokens may be appended in one call."""
        return True

    @property
    def joint_append(self) -> bool:
        """Whether several tokens that see each other may be appended in one call."""
        return False

    @property
    def rollback(self) -> bool:
        """Whether appending at an earlier position forgets what came after it."""
        return True

    @property
    def exact_chunked_prefill(self) -> bool:
        """Whether a prompt that is read in chunks gives what it gives when read at once."""
        return True

    @property
    def scans(self) -> bool:
        """The prefill only: for one token more a scan would move all weights and caches."""
        return self.first

    @property
    def core(self) -> CausalCore:
        """The original core, for its rotation and its window."""
        core = original(self)
        assert isinstance(core, CausalCore)
        return core

    def __call__(
        self,
        q: CoreHeads,
        k: CoreKeys,
        v: CoreKeys,
        x: Float[Array, "B S C"],
        positions: Positions | None,
    ) -> Heads:
        inputs = AttentionInputs.of(q, k, v, x, positions, self.core)
        if self.first:
            if q.shape[1] > self.cache_length.prompt:
                raise ValueError(
                    f"a prompt of {q.shape[1]} tokens does not fit: there is room for "
                    f"{self.cache_length.prompt}. Make more with "
                    f"forward.with_cache_length(prompt, new)."
                )
            self.store(inputs)
            return self.attend_prompt(inputs, positions)
        if q.shape[1] > 1 and not self.multi_token_append:
            raise ValueError(
                f"{type(self).__name__} appends one token in a call, not several: later tokens "
                f"would overwrite what earlier ones attend to. Append them one by one."
            )
        if q.shape[1] > 1 and self.core.together and not self.joint_append:
            raise ValueError(
                f"{type(self).__name__} appends tokens one after the other, and those of this call "
                f"see each other: use the dense cache, or one that keeps the last tokens"
            )
        with jax.named_scope("attention"):
            return self.core.finish(self.append(inputs))

    def attend_prompt(self, inputs: AttentionInputs, positions: Positions | None) -> Heads:
        """Attention within the first tokens: as without a cache, unless a kind says else."""
        return self.inner(inputs.q, inputs.k, inputs.v, inputs.x, positions)

    @abc.abstractmethod
    def store(self, inputs: AttentionInputs) -> None:
        """Store what is kept of the first tokens of sequences."""

    @abc.abstractmethod
    def append(self, inputs: AttentionInputs) -> Heads:
        """Store tokens, and attend to all that is held."""

    @abc.abstractmethod
    def positions(self, lengths: Lengths) -> Int[Array, "B G C"]:
        """Position of the token in every slot after this many tokens; -1 for an empty slot.

        G is 1 where all heads hold the same tokens.
        """

    def filled(self, lengths: Lengths) -> Float[Array, ""]:
        """Share of the slots that hold a token."""
        return jnp.mean((self.positions(lengths) >= 0).astype(jnp.float32))
