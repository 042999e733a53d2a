"""What calibrations need: values of target modules, their running statistics, gradients at them.

`Tap` and `Observe` are patches like any other. They wrap target modules in modules that only look
at one value of each call and remember it in state, so they see what the target modules compute
under the patches made before them, also inside `switch` branches, and work in any loop that carries
state.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effjax.context import Context, PyTree, State, Step
from effjax.forward import Forward, Params, StateDict
from effjax.guidance import Guidance
from effjax.stacking import updated
from effjax.targets import TargetModule, Wrapper, target_modules, wrap

Kind = type | tuple[type, ...]
Call = tuple[tuple[PyTree, ...], dict[str, PyTree]]  # positional inputs and options


@dataclasses.dataclass(frozen=True)
class Tap:
    """Patch: remember the value of the last call of each chosen module, as state `tap_{what}`.

    Attributes:
        kind: type of the original modules.
        pattern: regular expression that the whole path of a target module must match.
        what: "output", "input" (the first positional one), "input1", "input2", ...
    """

    kind: Kind = nnx.Module
    pattern: str = ".*"
    what: str = "output"

    def __call__(self, module: nnx.Module, context: Context) -> None:
        for target in chosen(module, self.kind, self.pattern):
            wrap(module, target.path, _Recorder, target.path, self.what)


@dataclasses.dataclass(frozen=True)
class Observe:
    """Patch: accumulate statistics of each chosen target module over calls; see `read_statistics`.

    Attributes:
        kind, pattern, what: as in `Tap`.
        per: "channel" keeps the last axis, "tensor" reduces all axes.
    """

    kind: Kind = nnx.Module
    pattern: str = ".*"
    what: str = "output"
    per: Literal["channel", "tensor"] = "channel"

    def __post_init__(self) -> None:
        if self.per not in ("channel", "tensor"):
            raise ValueError(f'statistics are per "channel" or per "tensor", not per {self.per!r}')

    def __call__(self, module: nnx.Module, context: Context) -> None:
        for target in chosen(module, self.kind, self.pattern):
            wrap(module, target.path, _Observer, target.path, self.what, self.per)


class Statistics(NamedTuple):
    """Statistics in float32, each [C] per channel or [] per tensor.

    Attributes:
        elements: how many elements each figure covers, each counted once however calls divide them,
            padding too (float32, exact up to 2^24).
        absmax, absmean: largest and mean magnitude.
        min, max, mean, mean_square: over these elements.
    """

    elements: jax.Array
    absmax: jax.Array
    absmean: jax.Array
    min: jax.Array
    max: jax.Array
    mean: jax.Array
    mean_square: jax.Array


def tap(
    forward: Forward,
    params: Params,
    inputs: tuple[PyTree, ...],
    *,
    kind: Kind = nnx.Module,
    pattern: str = ".*",
    what: str = "output",
    state: StateDict | None = None,
    step: Step | None = None,
    guidance: Guidance | None = None,
) -> dict[str, jax.Array]:
    """Get the values of chosen modules in one call.

    It is a pure function. Use it under `jit` for large models.

    Args:
        inputs: the forward's inputs.
        kind, pattern, what: as in `Tap`.
        state, step, guidance: as in `Forward.__call__`; the forward's initial state if None.

    Returns:
        Value by target module path. A target module that the branches taken at this step do not
        call holds NaN (zero if its dtype has none).

    Raises:
        ValueError: if no target module matches, if a target module is called twice, or is never
            called.
        TypeError: if a value is no array.
    """
    patch = Tap(kind, pattern, what)
    options = {"state": state, "step": step, "guidance": guidance}
    return tapped_call(forward, params, inputs, patch, **options)[2]


def tapped_call(
    forward: Forward,
    params: Params,
    inputs: tuple[PyTree, ...],
    patch: Tap,
    *,
    state: StateDict | None = None,
    step: Step | None = None,
    guidance: Guidance | None = None,
) -> tuple[PyTree, StateDict, dict[str, jax.Array]]:
    """Call the forward, and also return the values that a `Tap` saw. Arguments are as for `tap`.

    Returns:
        Outputs, the state after the call, and the values by target module path.
    """
    tapped, name = forward.patch(patch), f"tap_{patch.what}"
    initial, recorded = _initial_record(tapped, patch, params, inputs, guidance)
    before = initial | {f"{path}.{name}": value for path, value in recorded.items()}
    before = updated(before, state or {})
    outputs, after = tapped(params, before, *inputs, step=step, guidance=guidance)
    values = {path: after.pop(f"{path}.{name}") for path in recorded}
    return outputs, after, values


def statistics(
    forward: Forward,
    params: Params,
    batches: Iterable[tuple[PyTree, ...]],
    *,
    kind: Kind = nnx.Module,
    pattern: str = ".*",
    what: str = "output",
    per: Literal["channel", "tensor"] = "channel",
    step: Step | None = None,
    guidance: Guidance | None = None,
) -> dict[str, Statistics]:
    """Collect statistics of chosen target modules over batches of inputs, by their paths.

    Each batch starts from the forward's initial state. For statistics along a sampler's trajectory,
    call the sampler with `forward.patch(Observe(...))`, and give its last state to
    `read_statistics`.

    Args:
        batches: tuples of the forward's inputs; one compiled program for each shape.
        kind, pattern, what, per: as in `Observe`.
        step, guidance: as in `Forward.__call__`.

    Raises:
        ValueError: if there is no batch, no target module matches, or a chosen target module is
            never called.
        TypeError: if a value is no array.
    """
    patch = Observe(kind, pattern, what, per)
    observing = forward.patch(patch)
    observed: StateDict = {}
    for inputs in batches:
        if not observed:
            initial = observing.init(params, *_checked(inputs), guidance=guidance)
            observed = {key: value for key, value in initial.items() if ".observe_" in key}
            _called(observing, params, patch, read_statistics(observed, what=what))
        observed = _observe(observing, params, observed, _checked(inputs), step, guidance=guidance)
    if not observed:
        raise ValueError("statistics need at least one batch of inputs")
    return read_statistics(observed, what=what)


def read_statistics(
    state: Mapping[str, jax.Array], *, what: str = "output"
) -> dict[str, Statistics]:
    """What `Observe` patches of this `what` accumulated in a state, by target module path."""
    fields: dict[str, dict[str, jax.Array]] = {}
    for key, value in state.items():
        if found := re.fullmatch(rf"(.+)\.observe_{what}_(\w+)", key):
            fields.setdefault(found[1], {})[found[2]] = value
    return {path: Statistics(**values) for path, values in fields.items()}


def gradients(
    forward: Forward,
    params: Params,
    loss: Callable[[PyTree], jax.Array],
    inputs: tuple[PyTree, ...],
    *,
    kind: Kind = nnx.Module,
    pattern: str = ".*",
    what: str = "output",
    state: StateDict | None = None,
    step: Step | None = None,
    guidance: Guidance | None = None,
) -> dict[str, jax.Array]:
    """Compute gradients of `loss(outputs)` for the values at chosen modules, by their paths.

    The loss is differentiated with respect to a zero that is added to each value. A target module
    that is not called at this step has the gradient zero.

    Args:
        loss: function of the forward's outputs that returns a scalar.
        inputs, kind, pattern, what, state, step, guidance: as in `tap`.

    Raises:
        ValueError: as `tap`.
        TypeError: if a value is no array of floating dtype.
    """
    patch = Tap(kind, pattern, what)
    initial, recorded = _initial_record(forward.patch(patch), patch, params, inputs, guidance)
    if fixed := [p for p, v in recorded.items() if not jnp.issubdtype(v.dtype, jnp.inexact)]:
        raise TypeError(f"no gradient at {fixed}: their {what} is not of a floating dtype")
    taps = {f"{path}.tap_{what}" for path in recorded}
    before = {key: value for key, value in initial.items() if key not in taps}
    before = updated(before, state or {})

    def perturbed_loss(perturbations: dict[str, jax.Array]) -> jax.Array:
        perturbed = forward.patch(partial(_perturb, perturbations, what))
        outputs, _ = perturbed(params, before, *inputs, step=step, guidance=guidance)
        return loss(outputs)

    return jax.grad(perturbed_loss)({p: jnp.zeros_like(value) for p, value in recorded.items()})


def calls(module: nnx.Module, paths: Iterable[str], *inputs: PyTree) -> dict[str, list[Call]]:
    """Record the inputs of all target modules below a module, in one call of the module.

    Within `jit` these are traced values of the same trace: use them there, or return them.

    Args:
        module: it is changed in place; give it a copy.
        paths: canonical paths of the target modules in the module.
        inputs: of the module.
    """
    found: dict[str, list[Call]] = {path: [] for path in paths}
    for path, own in found.items():
        wrap(module, path, _Listener, own.append)
    assert callable(module)
    module(*inputs)
    return found


def stack_inputs(
    forward: Forward,
    params: Params,
    inputs: tuple[PyTree, ...],
    path: str = "blocks",
    *,
    step: Step | None = None,
    guidance: Guidance | None = None,
) -> tuple[PyTree, ...]:
    """Get the inputs that a forward gives to a stack of blocks.

    It is a pure function. Use it under `jit` for large models.

    Args:
        inputs: the forward's inputs.
        path: of the `Stack`.
        step, guidance: as in `Forward.__call__`.

    Returns:
        (x, *conditioning): the tokens, an array or a dictionary of streams, and what all blocks are
        given beside them.

    Raises:
        ValueError: if there is no such stack, or it is not called once.
    """
    found: list[Call] = []
    state = forward.init(params, *_checked(inputs), guidance=guidance)
    listening = forward.patch(lambda module, _: wrap(module, path, _Listener, found.append))
    listening(params, state, *inputs, step=step, guidance=guidance)
    if len(found) != 1:
        raise ValueError(f"{path} is called {len(found)} times in one forward, must be once")
    return found[0][0]


def chosen(module: nnx.Module, kind: Kind, pattern: str) -> tuple[TargetModule, ...]:
    """The callable target modules of this kind and pattern.

    Raises:
        ValueError: if there is none, naming some that exist.
    """
    found = tuple(
        target for target in target_modules(module, kind, pattern) if callable(target.module)
    )
    if not found:
        known = [target.path for target in target_modules(module, kind)] or [
            s.path for s in target_modules(module)
        ]
        names = kind if isinstance(kind, tuple) else (kind,)
        raise ValueError(
            f"no target module of kind {' | '.join(each.__name__ for each in names)} matches "
            f"'{pattern}', "
            f"which must match a whole path. There are {', '.join(known[:12])}"
            f"{', ...' if len(known) > 12 else ''}"
        )
    return found


class _Listener(Wrapper):
    """Tells a function what a module is called with."""

    def __init__(self, inner: nnx.Module, tell: Callable[[Call], None]):
        super().__init__(inner)
        self.tell = tell

    def __call__(self, *inputs: PyTree, **options: PyTree) -> PyTree:
        self.tell((inputs, options))
        return self.inner(*inputs, **options)


class _Probe(Wrapper):
    """Looks at one value of each call: `see` gets it and returns what takes its place.

    `once` refuses a second call. Each branch of a `switch` works on a copy and counts its own, so
    that a target module may be called in several branches.
    """

    once: ClassVar[bool] = True
    apart = True

    def __init__(self, inner: nnx.Module, path: str, what: str):
        super().__init__(inner)
        if not re.fullmatch(r"output|input\d*", what):
            raise ValueError(f'what must be "output", "input", "input1", ..., got {what!r}')
        self.path = path
        self.what = what
        self.called = False

    def see(self, value: jax.Array) -> jax.Array:
        raise NotImplementedError

    def __call__(self, *inputs: PyTree, **options: PyTree) -> PyTree:
        if self.what == "output":
            return self._seen(self.inner(*inputs, **options))
        index = int(self.what.removeprefix("input") or 0)
        if index >= len(inputs):
            raise ValueError(
                f"{self.path} is called with {len(inputs)} positional inputs; there is no "
                f"{self.what} (they count from 0)"
            )
        value = self._seen(inputs[index])
        return self.inner(*inputs[:index], value, *inputs[index + 1 :], **options)

    def _seen(self, value: PyTree) -> jax.Array:
        if not isinstance(value, (jax.Array, np.ndarray)):
            raise TypeError(
                f"the {self.what} of {self.path} is {type(value).__name__}, not one array; choose "
                f"another target module or value"
            )
        if self.once and self.called:
            raise ValueError(
                f"{self.path} is called more than once in one forward, so its {self.what} is no "
                f"single value. Choose target modules inside or around it, or use Observe."
            )
        self.called = not self._shaping()
        return self.see(jnp.asarray(value))

    def _shaping(self) -> bool:
        # While the initial state is shaped, every branch runs, and a target module may stand in
        # several.
        held = [value for value in vars(self).values() if isinstance(value, State)]
        return any(state.get_metadata("creating") for state in held)


class _Recorder(_Probe):
    def __init__(self, inner: nnx.Module, path: str, what: str):
        super().__init__(inner, path, what)
        setattr(self, f"tap_{what}", State())

    def see(self, value: jax.Array) -> jax.Array:
        getattr(self, f"tap_{self.what}").write(value)
        return value


class _Observer(_Probe):
    once = False

    def __init__(self, inner: nnx.Module, path: str, what: str, per: str):
        super().__init__(inner, path, what)
        self.per = per
        fills = {"min": jnp.inf, "max": -jnp.inf}
        for name in Statistics._fields:
            setattr(self, f"observe_{what}_{name}", State(fill=fills.get(name, 0.0)))

    def see(self, value: jax.Array) -> jax.Array:
        x = value.astype(jnp.float32)
        axes = tuple(range(x.ndim - (self.per == "channel" and x.ndim > 0)))
        shape = x.shape[len(axes) :]
        held: list[State] = [getattr(self, f"observe_{self.what}_{n}") for n in Statistics._fields]
        old = Statistics(*(state.read(shape, jnp.float32) for state in held))
        count = float(x.size // math.prod(shape))
        elements = old.elements + count
        share = count / elements
        new = Statistics(
            elements,
            absmax=jnp.maximum(old.absmax, jnp.max(jnp.abs(x), axes)),
            absmean=old.absmean + (jnp.mean(jnp.abs(x), axes) - old.absmean) * share,
            min=jnp.minimum(old.min, jnp.min(x, axes)),
            max=jnp.maximum(old.max, jnp.max(x, axes)),
            mean=old.mean + (jnp.mean(x, axes) - old.mean) * share,
            mean_square=old.mean_square + (jnp.mean(jnp.square(x), axes) - old.mean_square) * share,
        )
        for state, figure in zip(held, new):
            state.write(figure)
        return value


class _Perturbed(_Probe):
    def __init__(self, inner: nnx.Module, path: str, what: str, perturbation: jax.Array):
        super().__init__(inner, path, what)
        self.perturbation = nnx.Variable(perturbation)

    def see(self, value: jax.Array) -> jax.Array:
        return value + self.perturbation.get_value()


def _perturb(
    perturbations: Mapping[str, jax.Array], what: str, module: nnx.Module, context: Context
) -> None:
    for path, perturbation in perturbations.items():
        wrap(module, path, _Perturbed, path, what, perturbation)


def _initial_record(
    tapped: Forward, patch: Tap, params: Params, inputs: tuple, guidance: Guidance | None
) -> tuple[StateDict, StateDict]:
    """Initial state of a tapped forward, and the part that its tap writes, by module path."""
    state = tapped.init(params, *_checked(inputs), guidance=guidance)
    suffix, recorded = f".tap_{patch.what}", {}
    written = {key.removesuffix(suffix) for key in state if key.endswith(suffix)}
    for path in _called(tapped, params, patch, written):
        value = state[path + suffix]
        nothing = jnp.nan if jnp.issubdtype(value.dtype, jnp.inexact) else 0
        recorded[path] = jnp.full_like(value, nothing)
    return state, recorded


def _called(
    forward: Forward, params: Params, patch: Tap | Observe, called: Collection[str]
) -> list[str]:
    """Paths of the target modules that a patch chose, which must all be among the called ones."""
    paths = [target.path for target in chosen(forward.module(params), patch.kind, patch.pattern)]
    if silent := [path for path in paths if path not in called]:
        raise ValueError(
            f"this forward never calls {', '.join(silent)}: another patch stands in for it. Choose "
            f"a target module around it, or a narrower pattern."
        )
    return paths


def _checked(inputs: PyTree) -> tuple[PyTree, ...]:
    if not isinstance(inputs, (tuple, list)):
        raise TypeError(
            f"inputs must be the tuple of a forward's inputs, got {type(inputs).__name__}"
        )
    return tuple(inputs)


@partial(jax.jit, static_argnames="guidance")
def _observe(
    forward: Forward,
    params: Params,
    observed: StateDict,
    inputs: tuple,
    step: Step | None,
    *,
    guidance: Guidance | None,
) -> StateDict:
    initial = forward.init(params, *inputs, guidance=guidance)
    _, state = forward(params, initial | observed, *inputs, step=step, guidance=guidance)
    return {key: state[key] for key in observed}
