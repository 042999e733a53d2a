"""Loops whose calls make maps of tokens, coarse to fine: what those of VAR and ECAR share."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float, Int

from effjax.autoregression.stepwise import Stepwise
from effjax.context import PyTree
from effjax.forward import Forward, Params, StateDict
from effjax.guidance import Guidance
from effjax.loops import Carry


class MapLoop(Stepwise):
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
        return self.made(self.run(forward, params, carry, cond, uncond))

    def made(self, carry: Carry) -> tuple[Float[Array, "B H W Z"], PyTree]:
        return carry.x, carry.memory


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
