"""Do step caches save the time that they should?

    python -m experiments.step_cache_speed

Half of the network calls of a sampler compute their blocks (even_steps with every=2). That should
take (computed share) x (dense seconds) + (the rest) x (seconds of the model without its blocks),
which are measured beside it, in turns: "of ideal" is the quotient, at most 1.1. Layers are as many
as two cores run in a few seconds; their shapes are those of the models.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from effjax import testing
from effjax.context import Context, PyTree
from effjax.layers.stack import Stack
from effjax.methods import even_steps
from effjax.samplers import FlowMatchEuler, Sampler
from effjax.targets import Wrapper, target_modules, wrap
from experiments import report
from experiments.recipes import turns

# Fields of the models, by tokens of the image.
SHAPES: dict[str, tuple[Callable[..., testing.Subject], dict[str, Any]]] = {
    "DiT-XL/2": (testing.tiny_dit, {"num_heads": 16, "head_dim": 72, "in_channels": 4}),
    "SD3-medium": (
        testing.tiny_sd3,
        {
            "num_heads": 24,
            "head_dim": 64,
            "in_channels": 16,
            "out_channels": 16,
            "caption_channels": 4096,
            "pooled_channels": 2048,
            "max_grid": 192,
            "qk_norm": False,
            "dual_layers": (),
        },
    ),
    "FLUX.1-dev": (
        testing.tiny_flux,
        {
            "num_heads": 24,
            "head_dim": 128,
            "in_channels": 64,
            "caption_channels": 4096,
            "pooled_channels": 768,
            "axes": (16, 56, 56),
        },
    ),
}
LAYERS = {
    1024: {"DiT-XL/2": 6, "SD3-medium": 3, "FLUX.1-dev": 1},
    4096: {"DiT-XL/2": 2, "SD3-medium": 2, "FLUX.1-dev": 1},
}
EVERY = 2


class Nothing(Wrapper):
    """A stack that does nothing."""

    replaces_internals = True

    def __call__(self, x: PyTree, *conditioning: PyTree) -> PyTree:
        return x


def without_blocks(module: nnx.Module, context: Context) -> None:
    """The patch: no block runs."""
    for target in target_modules(module, Stack):
        wrap(module, target.path, Nothing)


def made(name: str, tokens: int, steps: int) -> testing.Subject:
    """A model of this shape, with a sampler of so many unguided calls."""
    tiny, fields = SHAPES[name]
    layers = LAYERS[tokens][name]
    counts = {"num_layers": layers}
    if name.startswith("FLUX"):
        counts["num_single_layers"] = layers
    side = 2 * int(tokens**0.5)
    subject = tiny(batch=1, sample_size=side, **fields, **counts)
    return testing.Subject(
        subject.forward, subject.params, Sampler(FlowMatchEuler(steps)), subject.cond
    )


def row(name: str, tokens: int, *, steps: int, repeats: int) -> dict[str, Any]:
    """Seconds of the three programs."""
    subject = made(name, tokens, steps)
    forward, params, cond = subject.forward, subject.params, subject.cond
    program, key = jax.jit(subject.sampler), jax.random.key(0)
    plan = even_steps.EvenStepsPlan(every=EVERY)
    cached, _ = even_steps.transform(plan)(forward, params)
    forwards = {"dense": forward, "cached": cached, "tap": forward.patch(without_blocks)}
    seconds = turns(
        {title: lambda own=own: program(own, params, cond, key) for title, own in forwards.items()},
        repeats,
    )
    share = sum(bool(plan.computes(step)) for step in range(steps)) / steps
    ideal = share * seconds["dense"] + (1 - share) * seconds["tap"]
    return {
        "model": f"{name}, {LAYERS[tokens][name]} layers",
        "tokens": tokens,
        "computed share": share,
        "cached / dense": round(seconds["cached"] / seconds["dense"], 3),
        "tap / dense": round(seconds["tap"] / seconds["dense"], 4),
        "of ideal": round(seconds["cached"] / ideal, 3),
        "dense seconds a call": round(seconds["dense"] / steps, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    table = []
    for tokens in arguments.tokens:
        for name in SHAPES:
            table.append(row(name, tokens, steps=arguments.steps, repeats=arguments.repeats))
            print(table[-1], flush=True)
            gc.collect()
    report.write(
        "step_cache_speed",
        title="Step caches: measured by expected seconds",
        command="python -m experiments.step_cache_speed --tokens "
        + " ".join(map(str, arguments.tokens))
        + f" --repeats {arguments.repeats}",
        ideal=table,
    )


if __name__ == "__main__":
    main()
