"""Loops: how often a forward is called, and on what.

A loop makes a known number of network calls. Samplers of diffusion models and the teacher-forced
reading of a language model are loops; costs, searches and calibrations drive the pieces of any loop
themselves, and the contract of methods runs on all of them.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Hashable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from effjax.context import PyTree, Step
from effjax.forward import Forward, Params, StateDict
from effjax.guidance import Guidance


class Carry(NamedTuple):
    """The values that a loop hands from one call to the next.

    Attributes:
        x: what the loop makes: samples float32[B, ...], or logits [B, calls, V].
        memory: of the loop's own arithmetic, such as a multistep schedule's.
        state: the forward's (caches of methods).
        keys: one PRNG key per sample, for loops that draw.
    """

    x: Float[Array, "B ..."]
    memory: PyTree
    state: StateDict
    keys: Key[Array, " B"] | Float[Array, " 0"]


class Branches(NamedTuple):
    """Conditions of the branches of guidance other than "cond", where there are more than two.

    Attributes:
        conditions: trees of arrays [B, ...] by the name of the branch; a branch that is missing has
            the condition of "cond".
    """

    conditions: dict[str, PyTree]


class Loop(abc.ABC):
    """The protocol of a loop. Its pieces are functions of the forward, and it has no state.

    `cond` is the condition that each sample is made from. `uncond` is its unconditional counterpart
    (or `Branches`), or None for a loop without guidance.

    Attributes:
        counted_by: implementation of the kernels whose costs are counted; None for those that run.
    """

    counted_by: ClassVar[str | None] = None

    @property
    def apart(self) -> tuple[int, ...]:
        """Calls whose shapes differ from others': each is traced by itself, at a static step."""
        return ()

    def alike(self, step: int) -> Hashable:
        """A key that is the same for calls of the same cost."""
        return step

    @property
    def alone(self) -> Loop:
        """The loop in which one model makes all calls, for searches and calibrations of it."""
        return self

    @property
    @abc.abstractmethod
    def calls(self) -> int:
        """Number of network calls of a whole run."""

    @property
    def joined(self) -> Guidance | None:
        """How branches of guidance stand in the network's batch; None without guidance."""
        return None

    def unconditional(self, forward: Forward, cond: PyTree, uncond: PyTree = None) -> PyTree:
        """`uncond`, or what the model has for it; None if the loop does not guide."""
        return None

    @abc.abstractmethod
    def init(
        self,
        forward: Forward,
        params: Params,
        cond: PyTree,
        key: Any = None,
        *,
        uncond: PyTree = None,
    ) -> Carry:
        """Make the carry for the first call."""

    @abc.abstractmethod
    def inputs(self, x: Array, cond: PyTree, uncond: PyTree, step: Step) -> tuple[PyTree, ...]:
        """The inputs of the network at a call."""

    def ready(self, forward: Forward, cond: PyTree = None) -> Forward:
        """The forward that is called: with caches, for a loop that needs them.

        Args:
            forward: the network, possibly patched.
            cond: the condition, for a loop whose caches hold it.
        """
        return forward

    def output(self, raw: PyTree, x: Array, step: Step) -> PyTree:
        """What a call's raw output becomes, such as guided by its branches."""
        return raw

    def network(
        self,
        forward: Forward,
        params: Params,
        state: StateDict,
        x: Array,
        cond: PyTree,
        uncond: PyTree,
        step: Step,
    ) -> tuple[PyTree, PyTree, StateDict]:
        """Call the network.

        Returns:
            The guided output, the raw output (of all branches) and the next state.
        """
        inputs = self.inputs(x, cond, uncond, step)
        ready, options = self.ready(forward, cond), {"step": step, "guidance": self.joined}
        raw, state = ready(params, state, *inputs, **options)
        return self.output(raw, x, step), raw, state

    def whole(self, carry: Carry, cond: PyTree, uncond: PyTree) -> tuple[PyTree, ...]:
        """The inputs of one call that stands for all of a run, without what calls keep.

        For loops whose calls differ in shape (`apart`) and read what earlier ones kept.

        Args:
            carry: after the run.
            cond, uncond: its conditions.

        Raises:
            ValueError: for a loop that has no such call.
        """
        raise ValueError(
            f"calls of a {type(self).__name__} read what earlier ones kept, and no single one "
            f"stands for all of them: calibrate on inputs of your own"
        )

    @abc.abstractmethod
    def update(self, carry: Carry, out: PyTree, step: Step) -> Carry:
        """Update the carry with an output. `carry.state` must be the new state."""

    def last(self, start: int, stop: int | None) -> int:
        """The call after the last one of a run, which is `stop` if that is given.

        Raises:
            ValueError: for calls that the loop does not make.
        """
        stop = self.calls if stop is None else stop
        if not 0 <= start <= stop <= self.calls:
            raise ValueError(
                f"a segment of a {self.calls}-call trajectory needs 0 <= start <= stop <= "
                f"{self.calls}; got start={start}, stop={stop}"
            )
        return stop

    def step(
        self,
        forward: Forward,
        params: Params,
        carry: Carry,
        cond: PyTree,
        uncond: PyTree,
        step: Step,
    ) -> Carry:
        """Do one call of the network and the update that follows."""
        out, _, state = self.network(forward, params, carry.state, carry.x, cond, uncond, step)
        return self.update(carry._replace(state=state), out, step)

    def run(
        self,
        forward: Forward,
        params: Params,
        carry: Carry,
        cond: PyTree,
        uncond: PyTree = None,
        *,
        start: int = 0,
        stop: int | None = None,
    ) -> Carry:
        """Do the calls `start ... stop - 1` in one `lax.scan`, or in one for each segment.

        A plan may change parameters at `forward.boundaries`, which cut the calls into segments.
        Between two runs the caller may change forward, parameters or state.

        Raises:
            ValueError: for calls that the loop does not make.
        """
        stop = self.last(start, stop)
        uncond = self.unconditional(forward, cond, uncond)
        for own, first, last in forward.segments(start, stop):
            cuts = {first, last, *self.apart, *(call + 1 for call in self.apart)}
            for begin, end in itertools.pairwise(sorted(c for c in cuts if first <= c <= last)):
                if begin in self.apart:
                    carry = self.step(own, params, carry, cond, uncond, begin)
                    continue

                def body(carry: Carry, step: Array, own: Forward = own) -> tuple[Carry, None]:
                    return self.step(own, params, carry, cond, uncond, step), None

                carry, _ = jax.lax.scan(body, carry, jnp.arange(begin, end, dtype=jnp.int32))
        return carry
