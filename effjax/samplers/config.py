"""Schedules to and from the `scheduler_config.json` of diffusers.

One table per scheduler class, used both ways: which option is which field here, which options must
keep a value because nothing else is supported, and which have no effect then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from effjax import fields
from effjax.samplers.ddim import DDIM
from effjax.samplers.ddpm import DDPM
from effjax.samplers.dpm_solver import DPMSolver
from effjax.samplers.flow_match import FlowMatchEuler
from effjax.samplers.schedule import Schedule
from effjax.samplers.tables import Betas, one_of

Fields = Mapping[str, tuple[str, Any]]


@dataclasses.dataclass(frozen=True)
class _Class:
    """A scheduler class of diffusers.

    Attributes:
        schedule: its counterpart here.
        fields: option -> (attribute of the counterpart, value if the file does not hold it).
        fixed: option -> the only value that is supported (also that of files without it).
        idle: option -> value to write; without effect as long as the fixed options are as above.
    """

    schedule: type[Schedule]
    fields: Fields
    fixed: Mapping[str, Any]
    idle: Mapping[str, Any]


_DIFFUSION: Fields = {
    "num_train_timesteps": ("betas.train_timesteps", 1000),
    "beta_start": ("betas.start", 0.0001),
    "beta_end": ("betas.end", 0.02),
    "beta_schedule": ("betas.schedule", "linear"),
    "rescale_betas_zero_snr": ("betas.zero_snr", False),
    "prediction_type": ("prediction", "epsilon"),
    "steps_offset": ("steps_offset", 0),
}
_CLIPPING: Fields = {
    "clip_sample": ("clip_sample", True),
    "clip_sample_range": ("clip_sample_range", 1.0),
}
_LEADING: Fields = {"timestep_spacing": ("spacing", "leading")}
_PLAIN = {"trained_betas": None, "thresholding": False}
_THRESHOLDS = {"dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}

CLASSES: dict[str, _Class] = {
    "DDIMScheduler": _Class(
        DDIM,
        {**_DIFFUSION, **_LEADING, **_CLIPPING, "set_alpha_to_one": ("set_alpha_to_one", True)},
        _PLAIN,
        _THRESHOLDS,
    ),
    "DDPMScheduler": _Class(
        DDPM,
        {**_DIFFUSION, **_LEADING, **_CLIPPING, "variance_type": ("variance", "fixed_small")},
        _PLAIN,
        _THRESHOLDS,
    ),
    "DPMSolverMultistepScheduler": _Class(
        DPMSolver,
        {
            **_DIFFUSION,
            "timestep_spacing": ("spacing", "linspace"),
            "use_karras_sigmas": ("karras_sigmas", False),
            "final_sigmas_type": ("final_sigmas", "zero"),
            "lower_order_final": ("lower_order_final", True),
            "lambda_min_clipped": ("lambda_min_clipped", -float("inf")),
        },
        {
            **_PLAIN,
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "solver_type": "midpoint",
            "euler_at_final": False,
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
            "use_lu_lambdas": False,
            "use_flow_sigmas": False,
            "use_dynamic_shifting": False,
        },
        # A learned variance is told by the network's number of channels.
        {
            **_THRESHOLDS,
            "variance_type": None,
            "flow_shift": 1.0,
            "time_shift_type": "exponential",
        },
    ),
    "FlowMatchEulerDiscreteScheduler": _Class(
        FlowMatchEuler,
        {
            "num_train_timesteps": ("train_timesteps", 1000),
            "shift": ("shift", 1.0),
            "use_dynamic_shifting": ("dynamic", False),
            "base_shift": ("base_shift", 0.5),
            "max_shift": ("max_shift", 1.15),
            "base_image_seq_len": ("base_tokens", 256),
            "max_image_seq_len": ("max_tokens", 4096),
        },
        {
            "time_shift_type": "exponential",
            "shift_terminal": None,
            "invert_sigmas": False,
            "use_karras_sigmas": False,
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
            "stochastic_sampling": False,
        },
        {},
    ),
}

# Files of converted checkpoints keep options of the scheduler that they had before.
_ELSEWHERE = {"skip_prk_steps", "interpolation_type"}.union(
    *({*known.fields, *known.fixed, *known.idle} for known in CLASSES.values())
)


def from_config(
    config: Mapping[str, Any], *, steps: int, tokens: int | None = None, **options: Any
) -> Schedule:
    """The schedule of a `scheduler_config.json`; see `Schedule.from_config`."""
    name = config.get("_class_name")
    one_of("_class_name", name, list(CLASSES))
    known = CLASSES[str(name)]
    _check(str(name), known, config)
    values = {
        attribute: fields.from_json(_annotation(known, attribute), config.get(option, default))
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
    schedule = known.schedule(**{**values, **options, "steps": steps})
    if isinstance(schedule, FlowMatchEuler) and dynamic and not schedule.dynamic:
        if tokens is None:
            raise ValueError(
                "this configuration shifts by image size (use_dynamic_shifting): pass tokens=, the "
                "number of image tokens of the model's sequence, or mu="
            )
        return schedule.for_tokens(tokens)
    return schedule


def to_config(schedule: Schedule) -> dict[str, Any]:
    """The `scheduler_config.json` of a schedule; see `Schedule.to_config`."""
    names = [name for name, known in CLASSES.items() if type(schedule) is known.schedule]
    if not names:
        raise ValueError(f"{type(schedule).__name__} has no counterpart in diffusers")
    known = CLASSES[names[0]]

    def read(attribute: str) -> Any:
        value: Any = schedule
        for part in attribute.split("."):
            value = getattr(value, part)
        return value

    fields = {option: read(attribute) for option, (attribute, _) in known.fields.items()}
    return {
        "_class_name": names[0],
        **dict(sorted({**known.fixed, **known.idle, **fields}.items())),
    }


def _annotation(known: _Class, attribute: str) -> Any:
    """What an attribute of a schedule may be."""
    if attribute == "dynamic":  # tells whether there is a `mu`
        return bool
    kind = Betas if attribute.startswith("betas.") else known.schedule
    return fields.annotated(kind)[attribute.removeprefix("betas.")]


def _check(name: str, known: _Class, config: Mapping[str, Any]) -> None:
    problems = []
    for option, value in config.items():
        if option in known.fields:
            kind = _annotation(known, known.fields[option][0])
            problems += fields.problems(kind, fields.from_json(kind, value), option)
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
