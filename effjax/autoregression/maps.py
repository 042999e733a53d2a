"""Loops whose calls make maps of tokens, coarse to fine: what those of VAR and ECAR share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.context import PyTree, Step
from effjax.executables import Program
from effjax.forward import Forward, Params, StateDict
from effjax.guidance import Guidance
from effjax.loops import Carry, Loop


class MapLoop(Loop):
    """A loop with labels as conditions, whose calls differ in their numbers of tokens.

    Attributes:
        guidance: None for none, which halves the cost.
    """

    guidance: Any

    @property
    def apart(self) -> tuple[int, ...]:
        return tuple(range(self.calls))

    @property
    def joined(self) -> Guidance | None:
        return Guidance() if self.guided else None

    @property
    def guided(self) -> bool:
        """True if every call runs both branches."""
        return self.guidance is not None

    def unconditional(
        self, forward: Forward, cond: Int[Array, " B"], uncond: Int[Array, " B"] | None = None
    ) -> Int[Array, " B"] | None:
        if not self.guided:
            return None
        return forward.config.null_condition(cond) if uncond is None else uncond

    def __call__(
        self,
        forward: Forward,
        params: Params,
        cond: Int[Array, " B"],
        key: Array,
        *,
        uncond: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B H W Z"]:
        """Sample latents.

        Args:
            forward: the network, possibly patched.
            params: its parameters.
            cond: labels.
            key: one key, or keys [B]. Sample i depends on the key and on i, not on how many
                samples there are; what is drawn for a map does not depend on other maps.
            uncond: labels of the unconditional branch; the null class if None.
        """
        return self.sample(forward, params, cond, key, uncond=uncond)[0]

    def sample(
        self,
        forward: Forward,
        params: Params,
        cond: Int[Array, " B"],
        key: Array,
        *,
        uncond: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B H W Z"], PyTree]:
        """Sample latents, and what a loop remembers beside them: the tokens of VAR."""
        carry = self.init(forward, params, cond, key, uncond=uncond)
        carry = self.run(forward, params, carry, cond, uncond)
        return carry.x, carry.memory

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
        """The same in a loop on the host, a program for each kind of call.

        Args:
            forward, params, cond, key, uncond: as in a call of the loop.
            callback: called as `callback(call, latents)` after every call. If it returns latents,
                sampling goes on from those.
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
        return carry.x, carry.memory


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


def check_kept(forward: Forward, first: StateDict, last: StateDict) -> None:
    """Check that what patches keep has the same shapes in all calls.

    Args:
        forward: for the names of its methods.
        first, last: states as the calls of two scales shape them.

    Raises:
        ValueError: for methods that keep tokens of a call for the next one.
    """
    wrong = [
        name
        for name in sorted({*first, *last})
        if name not in first or name not in last or first[name].shape != last[name].shape
    ]
    if wrong:
        methods = ", ".join(dict.fromkeys(name for name, _ in forward.recipe)) or "a patch"
        raise ValueError(
            f"{methods} keeps tokens of a call for the next one ({wrong[0]}), but calls of a model "
            f"of scales have different numbers of tokens: this kind of method does not apply"
        )
