"""FLOPs and bytes of a traced program, counted from its jaxpr; nothing is computed.

Counted are products: `dot_general`, `ragged_dot`, `conv_general_dilated` (2 FLOPs a multiply-add),
and what a `pallas_call` declares. Elementwise work, reductions and data movement are not counted.
Whatever is traced counts, also results that the compiler would find unused.

*Executed* FLOPs include the masked-out elements of the blocks that a sparse kernel computes;
*useful* FLOPs leave them out (see `pallas_kernels.marks`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effjax import compat
from effjax.context import PyTree
from effjax.forward import Forward, Params
from effjax.quant import QTensor
from pallas_kernels import use_implementation
from pallas_kernels.marks import Work, declared_work, useful_fraction

Branch = str | int | float | Callable[[int, str], int]
Trips = int | Callable[[str], int]


class ScopeCost(NamedTuple):
    """The cost of the equations that stand directly in one scope path ("attention/softmax")."""

    scope: str
    flops: int
    useful_flops: int
    bytes_: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a program, by scope path.

    Costs can be added, and multiplied by an int.

    Attributes:
        scopes: cost by path of `jax.named_scope`s ("" outside of any), sorted, each path once.
    """

    scopes: tuple[ScopeCost, ...] = ()

    @property
    def flops(self) -> int:
        """Executed FLOPs, two for each multiply-add."""
        return sum(part.flops for part in self.scopes)

    @property
    def useful_flops(self) -> int:
        """Executed FLOPs without those on masked-out elements."""
        return sum(part.useful_flops for part in self.scopes)

    @property
    def bytes_(self) -> int:
        """Logical bytes of all operands and results of the counted operations."""
        return sum(part.bytes_ for part in self.scopes)

    def scope(self, name: str) -> Cost:
        """The part of the cost under a named scope, at any depth. It is zero if there is none.

        Args:
            name: one name, "attention", or several consecutive ones, "attention/softmax".
        """
        return Cost(tuple(part for part in self.scopes if f"/{name}/" in f"/{part.scope}/"))

    def __add__(self, other: Cost) -> Cost:
        totals: dict[str, ScopeCost] = {}
        for part in self.scopes + other.scopes:
            old = totals.get(part.scope, ScopeCost(part.scope, 0, 0, 0))
            totals[part.scope] = ScopeCost(part.scope, *(a + b for a, b in zip(old[1:], part[1:])))
        return Cost(tuple(totals[scope] for scope in sorted(totals)))

    def __mul__(self, times: int) -> Cost:
        return Cost(
            tuple(ScopeCost(part.scope, *(times * n for n in part[1:])) for part in self.scopes)
        )

    __rmul__ = __mul__

    def share(self, part: float) -> Cost:
        """This cost times a factor 0 ... 1, with each figure rounded to a whole number."""
        return Cost(
            tuple(
                ScopeCost(each.scope, *(round(part * number) for number in each[1:]))
                for each in self.scopes
            )
        )


def cost(
    function: Callable[..., PyTree],
    *args: PyTree,
    branch: Branch = "max",
    while_trips: Trips | None = None,
    platform: str | None = None,
    **kwargs: PyTree,
) -> Cost:
    """Count what `function(*args, **kwargs)` costs: FLOPs and bytes.

    The function is traced and not run, so shapes are enough. A convolution counts 2 * outputs *
    kernel positions * input channels of a group, including padded and dilated positions. Rows of a
    ragged product count once, for their one group. A `shard_map` counts for all of its devices.

        counted = effjax.cost.cost(function, jax.ShapeDtypeStruct((8, 64), "float32"))
        counted.flops, counted.scope("attention").flops

    Args:
        function: any function that JAX can trace, jitted or not.
        args, kwargs: trees of arrays or `jax.ShapeDtypeStruct`s. Python numbers are traced too, so
            close over what must be static (a step, a guidance): `partial(forward, step=3)`.
        branch: which branch of each `lax.cond` or `lax.switch` to count: the "max" or "min" of
            their executed FLOPs; a float p for the expected cost where the dearest branch is taken
            with probability p and else the cheapest, rounded; an index; or a function of (number of
            branches, scope path) that returns an index. An index need not exist where no branch has
            any cost.
        while_trips: how often the bodies of while loops with products run: an int for all, or a
            function of the scope path. Scans need none.
        platform: whose programs to count where they differ by platform ("cpu", "tpu", "cuda"); that
            of JAX's default device if None.

    Raises:
        ValueError: for a branch that does not exist, a while loop without trips, a kernel that
            declares no cost, or an unknown primitive that contains products.
    """
    return _traced(function, args, kwargs, branch, while_trips, platform)[0]


def _traced(
    function: Callable[..., PyTree],
    args: tuple[PyTree, ...],
    kwargs: Mapping[str, PyTree],
    branch: Branch,
    while_trips: Trips | None,
    platform: str | None,
) -> tuple[Cost, PyTree]:
    """The cost of a function, and the shapes of its results."""
    known = not isinstance(branch, str) or branch in ("max", "min")
    if not known or (isinstance(branch, float) and not 0 <= branch <= 1):
        raise ValueError(
            f'branch must be "max", "min", a probability 0.0 ... 1.0, an index or a function, got '
            f"{branch!r}"
        )
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args, **kwargs)
    platform = platform or {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    return _Walk(branch, while_trips, platform).program(jaxpr, ""), shapes


def sampler_cost(
    sampler: Any,
    forward: Forward,
    params: Params,
    cond: PyTree,
    *,
    uncond: PyTree = None,
    distinct: Callable[[int], Hashable] | None = None,
    branch: Branch = "max",
    while_trips: Trips | None = None,
    platform: str | None = None,
) -> Cost:
    """Count what all network calls of a sampler cost.

    Each call is traced at its own static step. Decisions of plans that depend on the step are
    therefore made during tracing, and leave no branches. Branches on values remain; `branch` says
    which of them to count.

    Args:
        sampler: a `Loop`.
        forward, params, cond, uncond: what the sampler is called with; arrays or shapes.
        distinct: function of a step that returns a key. Steps with equal keys cost the same and are
            traced once. None takes the sampler's own (`Loop.alike`).
        branch, while_trips, platform: as in `cost`.
    """
    carry = jax.eval_shape(
        lambda params, cond, uncond: sampler.init(
            forward, params, cond, jax.random.key(0), uncond=uncond
        ),
        params,
        cond,
        uncond,
    )

    def call(step: int, state: PyTree) -> tuple[Cost, PyTree]:
        """The cost of a call, and the shapes of the state that it leaves."""

        def network(params: Params, state: PyTree, x: PyTree, cond: PyTree, uncond: PyTree):
            uncond = sampler.unconditional(forward, cond, uncond)
            return sampler.network(forward, params, state, x, cond, uncond, step)

        inputs = params, state, carry.x, cond, uncond
        counted, (_, _, state) = _traced(network, inputs, {}, branch, while_trips, platform)
        return counted, state

    keys = [(distinct or sampler.alike)(step) for step in range(sampler.calls)]
    program, total, state = sampler.counted_by, Cost(), carry.state
    with contextlib.nullcontext() if program is None else use_implementation(program):
        for key, times in Counter(keys).items():
            counted, state = call(keys.index(key), state)
            total += counted * times
    return total


def array_bytes(array: Any) -> int:
    """Logical bytes of an array or shape. An element of 4 bits counts as half a byte."""
    dtype = array.dtype
    if jnp.issubdtype(dtype, jnp.integer):
        bits = jnp.iinfo(dtype).bits
    elif jnp.issubdtype(dtype, jnp.floating):
        bits = jnp.finfo(dtype).bits
    else:
        bits = 8 * dtype.itemsize
    return math.ceil(math.prod(array.shape) * bits / 8)


def weight_bytes(params: PyTree) -> int:
    """Logical bytes of all leaves of a tree of parameters (arrays, shapes, quantized leaves)."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    return sum(
        leaf.logical_bytes if isinstance(leaf, QTensor) else array_bytes(leaf) for leaf in leaves
    )


def state_bytes(state: PyTree) -> int:
    """Logical bytes that a forward's state takes between two calls, for one batch of its shape."""
    return sum(map(array_bytes, jax.tree.leaves(state)))


def compiled_memory(function: Callable[..., PyTree], *args: PyTree, **kwargs: PyTree) -> dict:
    """Compile for these arguments (arrays or shapes) and report the program's memory.

    On several devices the figures are those of one device.

    Returns:
        Bytes by name: `argument_bytes`, `output_bytes`, `temp_bytes`, `alias_bytes` (outputs that
        reuse donated arguments), and `peak_bytes`: the compiler's own figure where it gives one,
        else the sum of the first three without aliases.

    Raises:
        ValueError: if the backend reports no memory.
    """
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    return memory_of(jitted.lower(*args, **kwargs).compile())


def memory_of(program: jax.stages.Compiled) -> dict[str, int]:
    """Bytes by name of a compiled program; see `compiled_memory`."""
    stats = program.memory_analysis()
    if stats is None:
        raise ValueError("this backend reports no memory; compile for CPU, GPU or TPU")
    memory = {
        f"{name}_bytes": getattr(stats, f"{name}_size_in_bytes")
        for name in ("argument", "output", "temp", "alias")
    }
    total = sum(memory.values()) - 2 * memory["alias_bytes"]
    memory["peak_bytes"] = getattr(stats, "peak_memory_in_bytes", 0) or total
    return memory


@dataclasses.dataclass(frozen=True)
class _Walk:
    """Walks a jaxpr under one choice of branches and trip counts."""

    branch: Branch
    while_trips: Trips | None
    platform: str

    def program(self, jaxpr: Any, scope: str) -> Cost:
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        return sum((self.equation(equation, scope) for equation in jaxpr.eqns), Cost())

    def equation(self, equation: Any, outer: str) -> Cost:
        scope = "/".join([*filter(None, [outer]), *compat.scope_names(equation)])
        name, params = equation.primitive.name, equation.params
        if name in _PRODUCTS:
            flops = _PRODUCTS[name](equation)
            operands = [*equation.invars, *equation.outvars]
            moved = sum(array_bytes(operand.aval) for operand in operands)
            return Cost((ScopeCost(scope, flops, flops, moved),))
        if name == "pallas_call":
            return _declared(equation, scope)
        if work := declared_work(params.get("name") or ""):
            return _from_name(equation, work, scope)
        if name in compat.CALLS:
            called = self.program(params[compat.CALLS[name]], scope)
            fraction = useful_fraction(params.get("name") or "")
            return called if fraction is None else _useful(called, fraction, params["name"])
        if name == "scan":
            return self.program(params["jaxpr"], scope) * params["length"]
        if name == "shard_map":
            return self.program(params["jaxpr"], scope) * compat.shard_count(equation)
        if name == "cond" and (platforms := params.get("branches_platforms")):
            own = [names is None or self.platform in names for names in platforms]
            if True not in own:
                raise ValueError(
                    f"no program for {self.platform!r} (scope {scope!r}), only for {platforms}. "
                    f"Count with platform=..., or choose another implementation."
                )
            return self.program(params["branches"][own.index(True)], scope)
        if name == "cond":
            return self.chosen([self.program(each, scope) for each in params["branches"]], scope)
        if name == "while":
            body = self.program(params["body_jaxpr"], scope)
            test = self.program(params["cond_jaxpr"], scope)
            return self.loop(body, test, scope) if body.scopes or test.scopes else Cost()
        if any(self.program(inner, scope).scopes for inner in compat.inner_jaxprs(equation)):
            raise ValueError(
                f"cannot count the products inside of {name!r} (scope {scope!r}): how often it "
                f"runs them is unknown. Count its parts with separate calls of cost()."
            )
        return Cost()

    def chosen(self, branches: list[Cost], scope: str) -> Cost:
        if not any(each.scopes for each in branches):
            return Cost()
        if isinstance(self.branch, str):
            best = max if self.branch == "max" else min
            return best(branches, key=lambda each: (each.flops, each.bytes_))
        if isinstance(self.branch, float):
            low, high = (
                best(branches, key=lambda each: (each.flops, each.bytes_)) for best in (min, max)
            )
            return low.share(1 - self.branch) + high.share(self.branch)
        index = self.branch(len(branches), scope) if callable(self.branch) else self.branch
        if not 0 <= index < len(branches):
            raise ValueError(
                f"branch {index} of a switch with {len(branches)} branches (scope {scope!r}); "
                f"give an index below {len(branches)}, or a function that chooses by switch"
            )
        return branches[index]

    def loop(self, body: Cost, test: Cost, scope: str) -> Cost:
        if self.while_trips is None:
            raise ValueError(
                f"a while loop with products (scope {scope!r}) runs an unknown number of times; "
                f"say how often with cost(..., while_trips=...)"
            )
        trips = self.while_trips(scope) if callable(self.while_trips) else self.while_trips
        return body * trips + test * (trips + 1)


def _useful(called: Cost, fraction: Fraction, name: str) -> Cost:
    parts = []
    for part in called.scopes:
        if part.useful_flops != part.flops:
            raise ValueError(f"{name!r} contains another function marked with useful()")
        useful_flops = part.flops * fraction
        if useful_flops.denominator != 1:
            raise ValueError(
                f"{name!r} executes {part.flops} FLOPs in scope {part.scope!r}, and {fraction} of "
                f"them is no whole number. Mark only the masked products with useful()."
            )
        parts.append(part._replace(useful_flops=int(useful_flops)))
    return Cost(tuple(parts))


def _declared(equation: Any, scope: str) -> Cost:
    declared = equation.params["cost_estimate"]
    if declared is None:
        raise ValueError(
            f"the kernel {compat.kernel_name(equation)!r} declares no cost. Give its pallas_call "
            f"cost_estimate=pl.CostEstimate(flops=..., bytes_accessed=..., transcendentals=...)."
        )
    flops = int(declared.flops)
    return Cost((ScopeCost(scope, flops, flops, int(declared.bytes_accessed)),))


def _from_name(equation: Any, work: Work, scope: str) -> Cost:
    elements = _size(equation.outvars[0])
    flops, moved = int(work.flops * elements), int(work.bytes_ * elements)
    return Cost((ScopeCost(scope, flops, flops, moved),))


def _dot_flops(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2 * _size(equation.outvars[0]) * _size(equation.invars[0], contracted)


def _ragged_dot_flops(equation: Any) -> int:
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    flops = 2 * _size(equation.outvars[0]) * _size(equation.invars[0], contracted)
    # If the groups divide the contracted axis, each output sees the rows of its own group only.
    groups = equation.invars[2].aval.shape[-1]
    return flops // groups if set(numbers.lhs_ragged_dimensions) & set(contracted) else flops


def _conv_flops(equation: Any) -> int:
    # The kernel's input axis already counts the channels of one feature group.
    _, *contracted = equation.params["dimension_numbers"].rhs_spec
    return 2 * _size(equation.outvars[0]) * _size(equation.invars[1], contracted)


def _size(variable: Any, axes: Iterable[int] | None = None) -> int:
    shape = variable.aval.shape
    return math.prod(shape if axes is None else (shape[axis] for axis in axes))


_PRODUCTS: dict[str, Callable[[Any], int]] = {
    "dot_general": _dot_flops,
    "ragged_dot_general": _ragged_dot_flops,
    "conv_general_dilated": _conv_flops,
}
