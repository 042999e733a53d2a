"""Loops of few calls that run on the host too, which can watch them and change what they make."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.context import PyTree, Step
from effjax.executables import Program
from effjax.forward import Forward, Params, StateDict
from effjax.loops import Carry, Loop


class Stepwise(Loop):
    """A loop with labels as conditions, in one program or in one for each kind of call."""

    @abc.abstractmethod
    def made(self, carry: Carry) -> tuple[Float[Array, "B H W Z"], PyTree]:
        """Latents, and tokens if there are any, of the carry after the last call."""

    def handed(self, state: StateDict, call: int) -> StateDict:
        """What a call is given of the state that the one before left."""
        return state

    def program(self, call: int) -> tuple[Loop, Step]:
        """What does a call of `stepwise`: a loop and a step, int32 where calls share programs."""
        return self, call

    def stepwise(
        self,
        forward: Forward,
        params: Params,
        cond: Int[Array, " B"],
        key: Array,
        *,
        uncond: Int[Array, " B"] | None = None,
        callback: Callable[[int, Array], Any] | None = None,
        watch: Callable[[int, Sequence[StateDict]], Any] | None = None,
        progress: bool = False,
    ) -> tuple[Float[Array, "B H W Z"], PyTree]:
        """Sample in a loop on the host, a program for each kind of call.

        Args:
            forward, params, cond, key, uncond: as in a call of the loop.
            callback: called as `callback(call, latents)` after every call; the latents of a student
                are the vectors of its slots. If it returns latents, sampling goes on from those.
            watch: called as `watch(call, [state])` after every call; the next one overwrites it.
            progress: show a bar over the calls.

        Raises:
            ValueError: for latents of another shape.
        """
        from tqdm.auto import tqdm

        uncond = self.unconditional(forward, cond, uncond)
        carry = _init(self, forward, params, cond, key, uncond)
        for call in tqdm(range(self.calls), desc="calls", disable=not progress):
            loop, step = self.program(call)
            run = _own_step if isinstance(step, int) else _shared_step
            held, state = (carry.x, carry.memory, carry.keys), self.handed(carry.state, call)
            carry = run(step, loop, forward, params, cond, uncond, *held, state=state)
            if watch is not None:
                watch(call, [carry.state])
            changed = None if callback is None else callback(call, carry.x)
            if changed is not None:
                x = carry.x
                if getattr(changed, "shape", None) != x.shape:
                    raise ValueError(
                        f"a callback returns latents float{list(x.shape)} or None, got "
                        f"{getattr(changed, 'shape', changed)!r}"
                    )
                carry = carry._replace(x=jnp.asarray(changed, x.dtype))
        return self.made(carry)


@Program
def _init(
    loop: Loop, forward: Forward, params: Params, cond: Array, key: Array, uncond: Any
) -> Carry:
    return loop.init(forward, params, cond, key, uncond=uncond)


def _step(
    step: Step,
    loop: Loop,
    forward: Forward,
    params: Params,
    cond: Array,
    uncond: Any,
    x: Array,
    memory: PyTree,
    keys: Array,
    *,
    state: StateDict,
) -> Carry:
    return loop.step(forward, params, Carry(x, memory, state, keys), cond, uncond, step)


_STATE = ("state",)
_own_step = Program(_step, name="_own_step", static_argnums=(0,), donate_argnames=_STATE)
_shared_step = Program(_step, name="_shared_step", donate_argnames=_STATE)
