"""Schedules to and from the `scheduler_config.json` of diffusers.

Each schedule's file declares by `reads` which scheduler classes of diffusers it reads, with one
table for each, used both ways: which option is which field here, which options must keep a value
because nothing else is supported, and which have no effect then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from effjax import fields
from effjax.samplers.tables import Betas, one_of

Fields = Mapping[str, tuple[str, Any]]
Kind = TypeVar("Kind", bound=type)


@dataclasses.dataclass(frozen=True)
class SchedulerClass:
    """A scheduler class of diffusers.

    Attributes:
        fields: option -> (attribute of the schedule, value if the file does not hold it). Fields of
            its `betas` are "betas.start"; "dynamic" says that the shift depends on the size.
        fixed: option -> the only value that is supported (also that of files without it).
        idle: option -> value to write; without effect as long as the fixed options are as above.
    """

    fields: Fields
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    idle: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# What several classes have in common.
DIFFUSION: Fields = {
    "num_train_timesteps": ("betas.train_timesteps", 1000),
    "beta_start": ("betas.start", 0.0001),
    "beta_end": ("betas.end", 0.02),
    "beta_schedule": ("betas.schedule", "linear"),
    "rescale_betas_zero_snr": ("betas.zero_snr", False),
    "prediction_type": ("prediction", "epsilon"),
    "steps_offset": ("steps_offset", 0),
}
CLIPPING: Fields = {
    "clip_sample": ("clip_sample", True),
    "clip_sample_range": ("clip_sample_range", 1.0),
}
LEADING: Fields = {"timestep_spacing": ("spacing", "leading")}
PLAIN = {"trained_betas": None, "thresholding": False}
THRESHOLDS = {"dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}

# Files of converted checkpoints keep options of the scheduler that they had before.
_ELSEWHERE = {"skip_prk_steps", "interpolation_type"}
_schedules: dict[str, type[Any]] = {}
_classes: dict[str, SchedulerClass] = {}


def reads(name: str, described: SchedulerClass) -> Callable[[Kind], Kind]:
    """Decorate the schedule that reads a scheduler class of diffusers.

    A schedule that reads several classes writes the one that stands first, outermost.

    Args:
        name: of the class in diffusers.
        described: its options.

    Raises:
        ValueError: if another schedule reads it.
    """

    def join(schedule: Kind) -> Kind:
        if name in _schedules:
            raise ValueError(f"{name} is read by {_schedules[name].__name__} already")
        _schedules[name], _classes[name] = schedule, described
        _ELSEWHERE.update(described.fields, described.fixed, described.idle)
        return schedule

    return join


def from_config(
    config: Mapping[str, Any], *, steps: int, tokens: int | None = None, **options: Any
) -> Any:
    """The schedule of a `scheduler_config.json`; see `Schedule.from_config`."""
    name = str(config.get("_class_name"))
    one_of("_class_name", config.get("_class_name"), list(_classes))
    kind, known = _schedules[name], _classes[name]
    _check(name, config)
    values = {
        attribute: fields.from_json(_annotation(kind, attribute), config.get(option, default))
        for option, (attribute, default) in known.fields.items()
    }
    betas = {
        attribute.removeprefix("betas."): values.pop(attribute)
        for attribute in list(values)
        if attribute.startswith("betas.")
    }
    if betas:
        values["betas"] = Betas(**betas)
    dynamic = values.pop("dynamic", False)
    schedule = kind(**{**values, **options, "steps": steps})
    if dynamic and not schedule.dynamic:
        if tokens is None:
            raise ValueError(
                "this configuration shifts by image size (use_dynamic_shifting): pass tokens=, the "
                "number of image tokens of the model's sequence, or mu="
            )
        return schedule.for_tokens(tokens)
    return schedule


def to_config(schedule: Any) -> dict[str, Any]:
    """The `scheduler_config.json` of a schedule; see `Schedule.to_config`."""
    names = [name for name, kind in _schedules.items() if type(schedule) is kind]
    if not names:
        raise ValueError(f"{type(schedule).__name__} has no counterpart in diffusers")
    known = _classes[names[-1]]

    def read(attribute: str) -> Any:
        value: Any = schedule
        for part in attribute.split("."):
            value = getattr(value, part)
        return value

    fields = {option: read(attribute) for option, (attribute, _) in known.fields.items()}
    return {
        "_class_name": names[-1],
        **dict(sorted({**known.fixed, **known.idle, **fields}.items())),
    }


def _annotation(schedule: type[Any], attribute: str) -> Any:
    """What an attribute of a schedule may be."""
    if attribute == "dynamic":  # tells whether there is a `mu`
        return bool
    kind = Betas if attribute.startswith("betas.") else schedule
    return fields.annotated(kind)[attribute.removeprefix("betas.")]


def _check(name: str, config: Mapping[str, Any]) -> None:
    kind, known, problems = _schedules[name], _classes[name], []
    for option, value in config.items():
        if option in known.fields:
            allowed = _annotation(kind, known.fields[option][0])
            problems += fields.problems(allowed, fields.from_json(allowed, value), option)
        if option in known.fixed and not fields.same(value, known.fixed[option]):
            problems.append(f"{option}={value!r}: only {known.fixed[option]!r} is supported")
        elif not option.startswith("_") and option not in _ELSEWHERE:
            problems.append(f"{option}={value!r}: unknown option")
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(
            f"this configuration of {name} is not supported:\n  {listed}\n"
            f"Supported options: {', '.join(sorted(known.fields))}."
        )
