"""Arguments that several commands have, and numbers as their fields say them."""

from __future__ import annotations

import argparse
from pathlib import Path

from effjax.fields import Count, Natural, NotNegative, Positive, Share, parse

COUNT, NATURAL, NOT_NEGATIVE = parse(Count), parse(Natural), parse(NotNegative)
POSITIVE = parse(Positive)
NUMBER, SHARE = parse(float), parse(Share)
LENGTHS = parse(tuple[Count, ...])
STEPS = parse(Count | tuple[Count, ...])

Arguments = argparse.ArgumentParser | argparse._ArgumentGroup


def sampler_arguments(command: Arguments) -> None:
    """Settings of a pipeline's sampler."""
    command.add_argument(
        "--steps",
        type=STEPS,
        help="denoising steps; those of the plan, else the model's. 2,4,8 of a model of stages",
    )
    command.add_argument("--height", type=COUNT, help="pixels, of a text-to-image model's images")
    command.add_argument("--width", type=COUNT, help="pixels")
    drawing_arguments(command)


def drawing_arguments(command: Arguments) -> None:
    """Settings of a pipeline's sampler, other than how many steps of which size it takes."""
    command.add_argument(
        "--guidance", type=NOT_NEGATIVE, help="scale; that of the plan, else the model's"
    )
    command.add_argument(
        "--top-k", type=NATURAL, help="codes to draw among, of a model of codes; 0 for all"
    )
    command.add_argument("--top-p", type=SHARE, help="share of their probability; 1 for all")
    command.add_argument(
        "--temperature", type=POSITIVE, help="divides the logits of codes, of a model of tokens"
    )
    command.add_argument(
        "--guidance-interval", type=COUNT, help="first tokens that are guided; all if left out"
    )
    command.add_argument(
        "--more-smooth", action="store_true", default=None, help="mix codes, for pictures"
    )
    command.add_argument(
        "--draft-scales", type=COUNT, help="maps that a model of codes makes before its refiner"
    )


_SAME = (
    *("height", "width", "top_k", "top_p", "temperature", "guidance_interval", "more_smooth"),
    "draft_scales",
)

# Options by the argument of a pipeline's `sampler` that they are.
SETTINGS = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    **{name: name for name in _SAME},
}


def condition_arguments(command: Arguments, what: str) -> None:
    """Labels and prompts."""
    command.add_argument(
        "--labels",
        help=f"class names or indices with commas, {what}; a name that has commas itself stands in "
        f"double quotes: '\"tench, Tinca tinca\",207'",
    )
    command.add_argument("--prompt", action="append", help=f"may be repeated, {what}")


def decoder_argument(command: Arguments) -> None:
    """How several tokens are found in one call."""
    command.add_argument(
        "--decoder",
        metavar="NAME[,FIELD=VALUE...]",
        help="find several tokens in a call, of the same distribution: jacobi,window=8",
    )


def text_arguments(command: Arguments) -> None:
    """Where texts come from."""
    command.add_argument("--texts", type=Path, help="a file; else Python's own library")
