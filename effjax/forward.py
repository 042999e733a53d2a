"""A model as a pure function: `forward(params, state, *inputs) -> (outputs, state)`.

`functional(model)` splits a `flax.nnx.Module` into a `Forward` (structure, configuration, patches:
a hashable value) and its parameters (a plain nested dict). Patches are applied at trace time to a
fresh copy of the module, so that nothing outside a call ever changes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.context import (
    CacheLength,
    Context,
    Layout,
    Model,
    PyTree,
    State,
    Step,
    is_static,
    states,
    tokens_as,
)
from effjax.guidance import Guidance, guided_by
from effjax.quant import QTensor
from effjax.stacking import by_layer, stacked_as, stacks_of_call
from effjax.targets import TargetModule, canonical, original, target_modules

# Wraps target modules in place; what it returns, if anything, stands in for the whole model.
Patch = Callable[[nnx.Module, Context], nnx.Module | None]
Params = dict[str, Any]
StateDict = dict[str, jax.Array]

METHODS = "methods"  # params[METHODS][method][target module]: what a method learned


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Forward:
    """The computation of a model, without its parameters.

    `functional` makes a forward of a model, and transforms return a changed one. Call it as
    `outputs, state = forward(params, state, *inputs)`. A forward is frozen and hashable, and two
    forwards with equal fields are equal. It is a pytree node without leaves, so it may be an
    argument of a jitted function; equal forwards run the same compiled program.

    Attributes:
        model: the class of the unpatched module.
        graphdef: structure of the unpatched module.
        leaves: path and shape of every parameter of the unpatched module.
        config: the model's configuration, a frozen dataclass.
        patches: functions `patch(module, context)` that wrap target modules, applied in order. One
            that returns a `Wrapper` around the module wraps the whole model.
        fixed_step: the step that `at` fixed, or None.
        span: the calls that `within` promised, or None.
        cache_length: how long sequences may become, or None.
        recipe: (method, plan) of every transform that was applied.
    """

    model: type[Model]
    graphdef: nnx.GraphDef
    leaves: tuple[tuple[tuple, tuple[int, ...]], ...]
    config: Any
    patches: tuple[Patch, ...] = ()
    fixed_step: int | None = None
    span: tuple[int, int] | None = None
    cache_length: CacheLength | None = None
    recipe: tuple[tuple[str, Any], ...] = ()

    def _key(self) -> tuple:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def __repr__(self) -> str:
        methods = ", ".join(name for name, _ in self.recipe) or "none"
        step = "" if self.fixed_step is None else f", at step {self.fixed_step}"
        patches = len(self.patches)
        return f"Forward({self.model.__name__}, methods: {methods}, patches: {patches}{step})"

    def __hash__(self) -> int:
        # Cached: jit hashes its arguments at every call.
        if "_hash" not in self.__dict__:
            object.__setattr__(self, "_hash", hash(self._key()))
        return self.__dict__["_hash"]

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Forward) or hash(self) != hash(other):
            return False
        return self._key() == other._key()

    def __call__(
        self,
        params: Params,
        state: StateDict,
        *inputs: PyTree,
        step: Step | None = None,
        guidance: Guidance | None = None,
    ) -> tuple[PyTree, StateDict]:
        """Run the model with its patches.

        Args:
            params: parameters, a nested dict in the layout of the model without patches. What
                methods learned is in `params["methods"]`. Names may say ranges of blocks, see
                `effjax.scanning.stack_params`.
            state: what patches remember between calls. `{}` for a model whose patches keep nothing;
                else the result of `init`, or of the last call.
            inputs: the model's inputs.
            step: index of the network call, static (int) or traced (int32[]); 0 if not given.
            guidance: how the branches of a guided batch are arranged; None if it is not guided.

        Returns:
            The model's outputs, and the state after this call with the same keys as `state`.

        Raises:
            ValueError: for parameters or state that do not fit; the message lists all of them.
        """
        with stacks_of_call():
            module, held = self._loaded(params, state, inputs, self._step(step), guidance)
            with tokens_as(_layout(module, inputs)), guided_by(guidance):
                outputs = module(*inputs)
            values = {path: held_.get_value() for path, held_ in held.items() if not held_.empty}
            return outputs, stacked_as(state, values)

    def init(self, params: Params, *inputs: PyTree, guidance: Guidance | None = None) -> StateDict:
        """Make the state for the first call, for inputs of these shapes.

        The model is traced on shapes and not computed. The trace visits every branch of every
        step, even if `at` has fixed a step. Inputs may be arrays or shapes.
        """
        if not self.patches:  # what has no patches keeps nothing: no need to trace it
            return {}
        found: dict[str, tuple] = {}  # shape, dtype, fill
        first = self.segments(0, 1)[0][0]  # in all segments the same

        def shape_states(params: Params, inputs: tuple, step: jax.Array) -> None:
            module = first.patched(params, inputs, step, guidance)
            held = _named_states(module)
            for path, variable in held.items():
                variable.set_metadata(path=path, creating=True)
            with tokens_as(_layout(module, inputs)), guided_by(guidance):
                module(*inputs)
            found.update(_kept_together({p: v for p, v in held.items() if not v.empty}))

        jax.eval_shape(shape_states, params, inputs, jax.ShapeDtypeStruct((), jnp.int32))
        return {path: jnp.full(shape, fill, dtype) for path, (shape, dtype, fill) in found.items()}

    def patch(self, *patches: Patch) -> Forward:
        """Return this forward with more patches at the end of the list.

        Outside of jit patches must be hashable. Inside of jit they may hold tracers.
        """
        return dataclasses.replace(self, patches=self.patches + patches)

    def at(self, step: int) -> Forward:
        """Return this forward for one step only.

        Plans then choose while the model is traced, and the program has no branches for other
        steps. Calls must leave out `step`.
        """
        if not is_static(step) or step < 0:
            raise ValueError(f"at() takes a static step >= 0, got {step!r}")
        return dataclasses.replace(self, fixed_step=int(step))

    def within(self, start: int, stop: int) -> Forward:
        """Return this forward for the steps start ... stop - 1 only.

        No plan may change parameters between them, see `boundaries`. Samplers use this for each
        segment that they scan.
        """
        return dataclasses.replace(self, span=(start, stop))

    def with_cache_length(self, prompt: int, new: int, most: int | None = None) -> Forward:
        """Say how long sequences may become, which caches must know; see `CacheLength`."""
        return dataclasses.replace(self, cache_length=CacheLength(prompt, new, most))

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Network calls at which some patch changes parameters, in order.

        Samplers run one scan for each segment between two of them.
        """
        found = {call for patch in self.patches for call in getattr(patch, "boundaries", ())}
        return tuple(sorted(found))

    def segments(self, start: int, stop: int) -> tuple[tuple[Forward, int, int], ...]:
        """Cut the calls start ... stop - 1 at the boundaries.

        Returns:
            For each segment the forward for it, its first call, and the call after its last.
        """
        inner = [call for call in self.boundaries if start < call < stop]
        cuts = [start, *inner, stop]
        if not self.boundaries:
            return ((self, start, stop),)
        return tuple((self.within(a, b), a, b) for a, b in itertools.pairwise(cuts))

    def check_calls(self, calls: int) -> None:
        """Check that every patch is planned for this number of network calls.

        Raises:
            ValueError: if a patch's `calls` differs; samplers call this before they start.
        """
        for patch in self.patches:
            planned = getattr(patch, "calls", calls)
            if planned != calls:
                raise ValueError(
                    f"{type(patch).__name__} is planned for {planned} network calls, but the "
                    f"sampler makes {calls}. Sample with {planned}, or search a plan for {calls}."
                )

    def layout(self, params: Params, *inputs: PyTree) -> Layout | None:
        """The token layout for inputs of these shapes; None if the model has none."""
        return self.module(params).layout(*inputs)

    def target_modules(
        self, params: Params, kind: type | tuple[type, ...] = nnx.Module, pattern: str = ".*"
    ) -> tuple[TargetModule, ...]:
        """List the modules that patches can wrap.

        Args:
            params: the parameters that the listed modules hold.
            kind: class of the modules, or several classes.
            pattern: regular expression for their paths.
        """
        return target_modules(self.module(params), kind, pattern)

    def module(self, params: Params) -> Model:
        """A fresh, unpatched module that holds these parameters (arrays or their shapes)."""
        weights = {name: value for name, value in params.items() if name != METHODS}
        given = by_layer(flatten_params(weights), of="params")
        problems = []
        for path, shape in self.leaves:
            name = canonical(path)
            if name not in given:
                problems.append(f"missing: {name} {list(shape)}")
            elif tuple(given[name].shape) != shape:
                problems.append(
                    f"misshapen: {name} is {list(given[name].shape)}, must be {list(shape)}"
                )
        known = {canonical(path) for path, _ in self.leaves}
        problems += [f"unexpected: {name}" for name in given if name not in known]
        if problems:
            listed = "\n  ".join(problems)
            raise ValueError(
                f"these parameters do not fit {type(self.config).__name__} "
                f"({len(problems)} problems):\n  {listed}\n"
                f"Load them with the converter of this model, or check the configuration."
            )
        filled = nnx.from_flat_state({path: given[canonical(path)] for path, _ in self.leaves})
        # Without the copy, a write in the module would reach the caller's arrays.
        return nnx.merge(self.graphdef, filled, copy=True)

    def patched(
        self,
        params: Params,
        inputs: tuple[PyTree, ...],
        step: Step = 0,
        guidance: Guidance | None = None,
    ) -> Any:
        """A fresh module with its patches and empty states, as a call at this step makes it."""
        module: Any = self.module(params)
        layout, learned = module.layout(*inputs), params.get(METHODS, {})
        context = Context(step, guidance, layout, learned, self.span, self.cache_length)
        for patch in self.patches:
            whole = patch(module, context)
            module = module if whole is None else whole
        return module

    def loaded(
        self, params: Params, state: StateDict, *inputs: PyTree, step: Step | None = None
    ) -> Any:
        """A fresh module with its patches and this state: to ask its wrappers what they hold."""
        return self._loaded(params, state, inputs, self._step(step), None)[0]

    def _loaded(
        self,
        params: Params,
        state: StateDict,
        inputs: tuple[PyTree, ...],
        step: Step,
        guidance: Guidance | None,
    ) -> tuple[Any, dict[str, State]]:
        module = self.patched(params, inputs, step, guidance)
        held = _named_states(module)
        _load_state(held, state)
        return module, held

    def abstract_params(self, dtype: jax.typing.DTypeLike | None = None) -> Params:
        """The unpatched model's parameters as shapes, in the config's dtype or in `dtype`."""
        dtype = jnp.dtype(dtype or self.config.param_dtype)
        return nest_params(
            {canonical(path): jax.ShapeDtypeStruct(shape, dtype) for path, shape in self.leaves}
        )

    def _step(self, step: Step | None) -> Step:
        if self.fixed_step is None:
            return 0 if step is None else step
        if step is not None:
            raise ValueError(
                f"this forward was fixed at step {self.fixed_step}; leave out step={step!r}"
            )
        return self.fixed_step


jax.tree_util.register_pytree_node(
    Forward,
    # The hash fails at once for a patch that holds an array, which jit could not cache.
    lambda forward: (hash(forward), ((), forward))[1],
    lambda forward, _: forward,
)


def functional(model: Model) -> tuple[Forward, Params]:
    """Split a model into its forward and its parameters.

    Use it for a model that you build yourself. For files, `effjax.load` and
    `converters.from_pretrained` return the same pair.

    Args:
        model: a model whose variables are all `nnx.Param`. It may be abstract (`nnx.eval_shape`).

    Returns:
        The forward, and the parameters as a nested dict of arrays, or of shapes for an abstract
        model.

    Raises:
        ValueError: if the model holds state. Base models have no state; caches are patches.
    """
    graphdef, variables = nnx.split(model)
    flat = list(nnx.to_flat_state(variables))
    stateful = [canonical(path) for path, leaf in flat if not isinstance(leaf, nnx.Param)]
    if stateful:
        raise ValueError(
            f"{type(model).__name__} holds variables that are no parameters: {stateful}. "
            f"A base model has no state; a cache is a patch."
        )
    leaves = tuple((tuple(path), tuple(leaf.get_value().shape)) for path, leaf in flat)
    params = nest_params({canonical(path): leaf.get_value() for path, leaf in flat})
    return Forward(type(model), graphdef, leaves, model.config), params


def abstract(model_type: type[Model], config: Any) -> tuple[Forward, Params]:
    """Make the forward of a model and the shapes of its parameters. Nothing is allocated."""
    return functional(nnx.eval_shape(lambda: model_type(config, rngs=nnx.Rngs(0))))


def _layout(module: nnx.Module, inputs: tuple[PyTree, ...]) -> Layout | None:
    """The layout that a model states for its inputs, whatever wraps it."""
    model = original(module)
    assert isinstance(model, Model)
    return model.layout(*inputs)


def _named_states(module: nnx.Module) -> dict[str, State]:
    """States by canonical name, independent of the order of patches; duplicates are errors."""
    named: dict[str, State] = {}
    for path, variable in states(module).items():
        name = canonical(path)
        if name in named:
            raise ValueError(
                f"two patches keep a state named {name!r}. Apply the method once to this target "
                "module, or "
                f"rename the state in one of the wrappers."
            )
        named[name] = variable
    return dict(sorted(named.items()))


def _kept_together(held: Mapping[str, State]) -> dict[str, tuple]:
    """Shape, dtype and fill of states by name; layers of one run are one array.

    Layers that a wrapper calls again, in other runs, belong to the run of their last call.
    """
    found: dict[str, tuple] = {}
    runs: dict[tuple, dict[int, str]] = {}
    for path, variable in held.items():
        value, run = variable.get_value(), variable.get_metadata("run")
        kind = value.shape, value.dtype, variable.get_metadata("fill")
        if run is None:
            found[path] = kind
        else:
            layer, _, after = path.removeprefix(f"{run[0]}.").partition(".")
            runs.setdefault((run, after, kind), {})[int(layer)] = path
    for ((stack, *_), after, (shape, *rest)), paths in runs.items():
        layers = sorted(paths)
        starts = [i for i, each in enumerate(layers) if i == 0 or each != layers[i - 1] + 1]
        for start, stop in itertools.pairwise([*starts, len(layers)]):
            first, count = layers[start], stop - start
            if count == 1:
                found[paths[first]] = (shape, *rest)
            else:
                found[f"{stack}.{first}:{first + count}.{after}"] = ((count, *shape), *rest)
    return found


def _load_state(held: Mapping[str, State], state: StateDict) -> None:
    state = by_layer(state)
    unknown = sorted(set(state) - set(held))
    if unknown:
        raise ValueError(
            f"the state holds {unknown}, which this forward does not keep (it keeps "
            f"{sorted(held)}). A state belongs to one forward: make it with forward.init."
        )
    for path, variable in held.items():
        variable.set_metadata(path=path)
        if path in state:
            variable.set_value(jnp.asarray(state[path]))


def flatten_params(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested parameters as a flat dict of dotted paths."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        flat |= flatten_params(value, name) if isinstance(value, Mapping) else {name: value}
    return flat


def nest_params(flat: Mapping[str, Any]) -> Params:
    """The inverse of `flatten_params`."""
    nested: Params = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        node = nested
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return nested


def parameter_count(params: Params) -> int:
    """Number of parameters (elements) of a tree of arrays, shapes or quantized leaves."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    return sum(math.prod(leaf.shape) for leaf in leaves)
