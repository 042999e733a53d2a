"""What the training scripts of the bundled tiny models share: flow matching, a command line.

Interpolant x_s = (1 - s) x + s e with noise e and s in [0, 1]; the network predicts e - x at time
1000 s (rectified flow, arXiv 2209.03003; logit-normal s as in SD3, arXiv 2403.03206). Conditions
are dropped in one sample of ten, for classifier-free guidance.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from effjax.forward import Params
from effjax.storage import write_json


def optimizer(
    steps: int, learning_rate: float, *, hold: float = 0.0
) -> optax.GradientTransformation:
    """AdamW with clipped gradients: a short warm-up, level for a share `hold`, cosine decay."""
    warm, level = min(200, steps // 10 + 1), round(hold * steps)
    parts = [
        optax.linear_schedule(0.0, learning_rate, warm),
        optax.constant_schedule(learning_rate),
        optax.cosine_decay_schedule(learning_rate, max(steps - warm - level, 1), 0.01),
    ]
    schedule = optax.join_schedules(parts, [warm, warm + level])
    adamw = optax.adamw(schedule, b1=0.9, b2=0.99, weight_decay=0.01)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def flow_matching(
    images: Float[Array, "B H W C"],
    key: Key[Array, ""],
    predict: Callable[[Array, Array, Array], Float[Array, "B H W C"]],
) -> Float[Array, ""]:
    """Mean squared error of the velocity `predict(noisy images, times [B], dropped bool [B])`."""
    key_s, key_noise, key_drop = jax.random.split(key, 3)
    batch = images.shape[0]
    s = jax.nn.sigmoid(jax.random.normal(key_s, (batch,)))
    noise = jax.random.normal(key_noise, images.shape)
    mixed = (1 - s)[:, None, None, None] * images + s[:, None, None, None] * noise
    dropped = jax.random.bernoulli(key_drop, 0.1, (batch,))
    return jnp.mean(jnp.square(predict(mixed, 1000 * s, dropped) - (noise - images)))


def bfloat16(params: Params) -> Params:
    """Parameters as they are shipped."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give an empty folder to fill, and put it in the place of `path` at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        new = Path(folder) / path.name
        new.mkdir()
        yield new
        if path.exists():
            os.replace(path, Path(folder) / "old")
        os.replace(new, path)


def command(
    module: str,
    argv: list[str] | None,
    *,
    about: str,
    output: Path,
    steps: int,
    options: Mapping[str, tuple[float, str]],
    make: Callable[[argparse.Namespace], dict[str, Any]],
    evaluate: Callable[[argparse.Namespace], dict[str, Any]],
    passes: Callable[[dict[str, Any]], bool],
) -> int:
    """The command line of a training script: train, export, judge, write log.json.

    Args:
        module: name of the script.
        argv: its arguments.
        about: one line on it.
        output, steps: defaults.
        options: further ones: their defaults and what they are.
        make: trains and exports with the parsed arguments; gives the log of the training.
        evaluate: judges the exported model; gives figures.
        passes: whether figures are good enough.

    Returns:
        The exit status: 1 if the gate is not passed.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--output", type=Path, default=output, help="folder of the exported model")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    for name, (default, what) in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=what)
    arguments = parser.parse_args(argv)
    logging.getLogger("absl").setLevel(logging.ERROR)
    log = make(arguments)
    figures = evaluate(arguments)
    given = {
        name: getattr(arguments, name) for name in ("steps", "seed", "learning_rate", *options)
    }
    written = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
    written = f"python -m {module} --checkpoints DIR {written}"
    write_json(arguments.output / "log.json", {"command": written, "judged": figures, **log})
    print(json.dumps(figures, indent=1))
    if not passes(figures):
        print("the gate is not passed: train longer", file=sys.stderr)
        return 1
    return 0


def given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Arguments of these names; without names those that a training takes."""
    names = names or ("steps", "batch", "seed", "learning_rate", "checkpoints")
    return {name: getattr(arguments, name) for name in names}


def judged_images(*, guidance: float) -> dict[str, tuple[float, str]]:
    """Options of the scripts that train on images."""
    return {
        "batch": (32, "images of a batch"),
        "images": (1024, "images to judge"),
        "guidance": (guidance, "of the judged images"),
    }


def judging(evaluate: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """From (path, images=, steps=, guidance=, seed=) -> figures to what `command` takes."""

    def judge(arguments: argparse.Namespace) -> dict[str, Any]:
        options = given(arguments, "images", "guidance", "seed")
        return evaluate(arguments.output, steps=20, **options)

    return judge
