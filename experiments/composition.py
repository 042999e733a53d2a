"""Step caches together with quantized layers and shared attention: what order 1 does to the noise.

    python -m experiments.composition

Rounded inputs add noise to what blocks compute, which differs from call to call. A series of order
1 predicts from the difference of two calls, in which the noise of both stands: t steps behind the
last of two calls that are p steps apart, its variance is (1 + t / p)^2 + (t / p)^2 times that of
one call. Order 0 holds one call, and its variance. Rounded weights are the same in both calls and
cancel.

Images of each pair of methods are compared with the dense ones, and with those of the same
quantized model without a cache, from the same noise: the second tells what the cache itself costs.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax import metrics
from effjax.calibration import Trajectory
from effjax.methods import dit_fast_attn_v2, even_steps, round_to_nearest, vidit_q
from effjax.samplers import sample_keys
from effjax.transform import chain, identity
from experiments import recipes, report

# Computed steps: all, every second one, one in three (two skips in a row).
SKIPS = {"none": 1, "one": 2, "two": 3}
ROUNDED = ("floats", "W8A16", "W4A16", "W8A8", "W4A8", "W8A4")


def rounding(name: str, subject: recipes.Subject, sampler: Any, images: int) -> Any:
    """The transform that quantizes the block layers so."""
    pipe = subject.pipe
    if name == "floats":
        return identity
    weights, inputs = (int(each) for each in name[1:].split("A"))
    if inputs == 16:
        return round_to_nearest.transform(round_to_nearest.uniform(weights))
    plan = vidit_q.uniform(weights, inputs)
    some = jax.tree.map(lambda leaf: leaf[:8], (subject.cond, subject.uncond))
    largest = vidit_q.calibrate(
        plan, pipe.forward, pipe.params, sampler, some[0], key=jax.random.key(7), uncond=some[1]
    )
    return vidit_q.transform(plan, largest)


def rows(name: str, *, images: int, steps: int) -> list[dict[str, Any]]:
    """Every pair on one model."""
    subject = recipes.subject(name, images)
    pipe, cond, uncond, right = subject
    sampler = pipe.sampler(num_inference_steps=steps, guidance_scale=recipes.demo.GUIDANCE)
    keys = sample_keys(jax.random.key(0), images)
    options = {} if uncond is None else {"uncond": uncond}
    program = jax.jit(sampler)

    def sample(*transforms: Any) -> np.ndarray:
        forward, params = chain(*transforms)(pipe.forward, pipe.params)
        return np.asarray(program(forward, params, cond, keys, **options))

    def far(one: np.ndarray, other: np.ndarray) -> float:
        return round(float(metrics.psnr(jnp.asarray(one), jnp.asarray(other))), 1)

    dense, found = sample(), []
    some = jax.tree.map(lambda leaf: leaf[:8], (cond, uncond))
    data = Trajectory(sampler, some[0], keys[:8], some[1])
    goals = dit_fast_attn_v2.Goals(delta=0.2)
    search: Any = dit_fast_attn_v2.METHOD.search
    plan = search(goals, pipe.forward, pipe.params, data)
    others = {"DiTFastAttnV2": dit_fast_attn_v2.transform(plan)}
    for title in (*ROUNDED, "DiTFastAttnV2", "DiTFastAttnV2 and W8A8"):
        parts = [
            others[part] if part in others else rounding(part, subject, sampler, images)
            for part in title.split(" and ")
        ]
        alone = sample(*parts)
        for skipped, every in SKIPS.items():
            for order in (0, 1) if every > 1 else (0,):
                cache = even_steps.EvenStepsPlan(every=every, order=order)
                own = sample(*parts, even_steps.transform(cache)) if every > 1 else alone
                found.append(
                    {
                        "model": name,
                        "with": title,
                        "skips in a row": skipped,
                        "order": order if every > 1 else "-",
                        "PSNR to dense": far(dense, own),
                        "PSNR to no cache": "-" if every == 1 else far(alone, own),
                        "right": round(right(own), 3),
                    }
                )
                print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--models", nargs="+", default=["PixArt", "SD3"], choices=recipes.MODELS)
    arguments = parser.parse_args()
    options = {name: getattr(arguments, name) for name in ("images", "steps")}
    table = [row for name in arguments.models for row in rows(name, **options)]
    report.write(
        "composition",
        title="Step caches with quantized layers and shared attention",
        command=f"python -m experiments.composition --models {' '.join(arguments.models)} "
        f"--images {arguments.images}",
        pairs=table,
    )


if __name__ == "__main__":
    main()
