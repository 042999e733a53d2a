"""Transforms of a forward and its parameters, their plans, and how a method declares itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax

from effjax import fields
from effjax.fields import Checked
from effjax.forward import Forward, Params, flatten_params
from effjax.stacking import Range

Pair = tuple[Forward, Params]


@dataclasses.dataclass(frozen=True)
class Plan(Checked):
    """Everything that a method decides ahead of time.

    A plan is a frozen dataclass of tuples and scalars. It is hashable, and it can be written as
    JSON and read again.
    """

    def describe(self) -> str:
        """The plan in a few lines for people; methods say more than this default."""
        return f"{type(self).__name__}: {self.to_json()}"

    def computed(self, calls: int) -> Mapping[str, Sequence[float]]:
        """What each of so many network calls computes, by what the plan leaves out in others.

        True or 1 where it computes all, False or 0 where nothing, else a share. Empty for plans
        that leave nothing out, or cannot say it before.
        """
        return {}

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`.

        Raises:
            ValueError: for missing or unknown fields and values that do not fit, all named.
        """
        return fields.read(cls, values, f"a {cls.__module__.rpartition('.')[2]} plan")

    def to_json(self) -> str:
        """The plan as a JSON text with sorted keys."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of `to_json`.

        Raises:
            ValueError: for a text that is no JSON, and as `from_dict`.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"a plan must be JSON: {error}") from None
        return cls.from_dict(values)


@dataclasses.dataclass(frozen=True)
class Transform:
    """A method with its plan, as a function `(forward, params) -> (forward, params)`.

    Methods make transforms with `method.transform(plan)`. A call returns a changed forward and
    changed parameters, and adds the method and its plan to `forward.recipe`, from which
    `effjax.save` writes `recipe.json`. The parameters may be abstract: `effjax.load` runs
    transforms on shapes to find out what a checkpoint must hold. Stacked parameters
    (`effjax.scanning.stack_params`) are a ValueError.

    Attributes:
        method: name of the method in the registry.
        plan: its plan.
        apply: the function itself.
        shapes: what `effjax.load` runs instead, for a transform that needs more than its plan.
    """

    method: str
    plan: Plan
    apply: Callable[[Forward, Params], Pair]
    shapes: Callable[[Forward, Params], Pair] | None = None

    def on_shapes(self) -> Transform:
        """The transform for parameters that are shapes only."""
        return dataclasses.replace(self, apply=self.shapes or self.apply)

    def __call__(self, forward: Forward, params: Params) -> Pair:
        check_by_layer(self.method, params)
        forward, params = self.apply(forward, params)
        recipe = (*forward.recipe, (self.method, self.plan))
        return dataclasses.replace(forward, recipe=recipe), params


def check_by_layer(method: str, params: Params) -> None:
    """Check that parameters are not stacked, for what goes by the names of single layers.

    Raises:
        ValueError: for stacked parameters, with the method's name.
    """
    if stacked := [name for name in flatten_params(params) if Range.of(name)]:
        raise ValueError(
            f"{method} takes weights by layer, and these are stacked ({stacked[0]}, ...): "
            f"apply methods before scan_blocks(stack=True), or use "
            f"effjax.scanning.unstack_params"
        )


def chain(*transforms: Callable[[Forward, Params], Pair]) -> Callable[[Forward, Params], Pair]:
    """Compose transforms into one, which applies them from left to right.

    `chain(a, b)(forward, params)` equals `b(*a(forward, params))`. `chain()` is `identity`.
    """

    def chained(forward: Forward, params: Params) -> Pair:
        for transform in transforms:
            forward, params = transform(forward, params)
        return forward, params

    return chained


def on_shapes(transforms: Iterable[Transform], forward: Forward, params: Params) -> Pair:
    """Apply transforms to the shapes of parameters. Nothing is computed or allocated."""

    def apply(params: Params) -> Params:
        nonlocal forward
        forward, params = chain(*[each.on_shapes() for each in transforms])(forward, params)
        return params

    params = jax.eval_shape(apply, params)
    return forward, params


def identity(forward: Forward, params: Params) -> Pair:
    """Return a forward and its parameters unchanged: the transform that does nothing."""
    return forward, params


@dataclasses.dataclass(frozen=True)
class Shorthand(Checked):
    """Base of dataclasses that say a whole plan in a few words, such as bits for all layers.

    A method lists its own in `Method.shorthands`; their fields are options of `effjax apply`.
    """

    def plan(self, forward: Forward, params: Params) -> Plan:
        """The plan for a model.

        Raises:
            ValueError: for a model that it does not fit.
        """
        raise NotImplementedError


Domain = Literal["images", "language models", "any"]


@dataclasses.dataclass(frozen=True)
class Method:
    """A method's declaration, the last statement of its file; the registry finds it there.

    The command line, the tests of all methods and the pages about methods are made of it. Options
    of commands come from the fields of `plan`, `shorthands`, `goals` and `fitting`: their
    annotations are types and ranges, and their docstrings (`Attributes:`) the help.

    Attributes:
        name: name in recipes, on the command line and in the documentation.
        paper: title and arXiv number.
        seams: which of "leaves", "patches", "loops" it changes.
        domain: what models it is for: those of images (and videos), language models, or any.
        plan: type of its plan.
        transform: plan -> Transform; (plan, learned) -> Transform if it calibrates or trains.
        identity: subject -> plan under which wrappers are installed and change nothing.
        ladder: subject -> three or more plans from weak to strong; executed cost falls.
        tiny: makes the subject (see `effjax.testing`) on which the contract suite runs.
        decides: "batch" or "row" if what is computed depends on values, and whether one decision is
            for all samples of a batch; None if it does not.
        systems: names of the published systems that it is, as the page on coverage lists them.
        shorthands: other ways to say a plan.
        data: what it looks at: `Trajectory`, `Sequences` or `Answers` of `effjax.calibration`, or
            several of these, of which a model has one; None if it looks at nothing but the model.
        calibrate: (plan, forward, params, data) -> learned, without training.
        goals: what a search aims at.
        search: (goals, forward, params, data) -> plan.
        fitting: options of training.
        fit: (plan, fitting, forward, params, data, *, checkpoints) -> learned. `checkpoints` is a
            folder from which a second run resumes, or None.
        saves: whether a stronger plan costs less than the dense model; False for what adds to it.
        exact: whether results are those of the model up to rounding: it saves memory alone.
        read: data -> (plan, learned), for methods whose plan follows from files, as adapters.
        given: (plan, forward, params) -> learned, something that stands for what a file gives, for
            methods that neither calibrate nor train.
        loop: (loop, forward) -> the loop that samples what the model became, for methods that put
            another model in its place; None for those that keep the model and its loop. No plan of
            such a method changes nothing; `identity` is the mildest.

    Raises:
        ValueError: for a search without goals, training without options, or the other way round,
            and for reading without data.
    """

    name: str
    paper: str
    seams: tuple[str, ...]
    domain: Domain
    plan: type[Plan]
    transform: Callable[..., Transform]
    identity: Callable[[Any], Plan]
    ladder: Callable[[Any], tuple[Plan, ...]]
    tiny: Callable[[], Any]
    systems: tuple[str, ...] = ()
    shorthands: tuple[type[Shorthand], ...] = ()
    data: type | tuple[type, ...] | None = None
    calibrate: Callable[..., Any] | None = None
    decides: Literal["batch", "row"] | None = None
    goals: type[Checked] | None = None
    search: Callable[..., Plan] | None = None
    fitting: type[Checked] | None = None
    fit: Callable[..., Any] | None = None
    saves: bool = True
    exact: bool = False
    read: Callable[[Any], tuple[Plan, Any]] | None = None
    given: Callable[..., Any] | None = None
    loop: Callable[[Any, Forward], Any] | None = None

    @property
    def applies(self) -> bool:
        """Whether a plan, with what is calibrated or read, changes a model without training."""
        return self.fit is None or self.calibrate is not None or self.read is not None

    @property
    def data_kinds(self) -> tuple[type, ...]:
        """The kinds of data that it may look at; () for none."""
        if self.data is None:
            return ()
        return self.data if isinstance(self.data, tuple) else (self.data,)

    def __post_init__(self) -> None:
        for what, how in (("goals", "search"), ("fitting", "fit")):
            if (getattr(self, what) is None) != (getattr(self, how) is None):
                raise ValueError(f"{self.name} needs both {what} and {how}, or none of them")
        if self.read is not None and self.data is None:
            raise ValueError(f"{self.name} reads, so it must say its data")
        if self.domain not in get_args(Domain):
            raise ValueError(
                f"{self.name} is for {self.domain!r}; the domains are {get_args(Domain)}"
            )
