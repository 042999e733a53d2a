"""Memory and work of one step of FLUX.1-dev on TPUs, compiled ahead of time without one.

    python -m experiments.flux_memory                         (needs the `tpu` extra)
    python -m experiments.flux_memory --part caches           (what step caches hold and save)

All 57 blocks, one image and 512 tokens of text, the step known when the program runs. On several
chips arrays are cut by `effjax.parallel.tensor_parallel`, attention runs on each chip's own heads,
and the figures are those of one chip; collectives are counted in the compiled program, whose blocks
are scanned, by how often they run. It times nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from functools import partial
from typing import Any, NamedTuple

from experiments import report
from experiments.tpu import in_processes

# isort: split
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from effjax.chips import chips
from effjax.cost import compiled_memory, cost, memory_of, state_bytes, weight_bytes
from effjax.forward import abstract
from effjax.layers.joint import PooledEmbeddings
from effjax.methods import db_cache, even_steps, fb_cache, round_to_nearest, taylor_seer
from effjax.models.flux import Flux, FluxConfig
from effjax.models.t5 import T5Config, T5Encoder
from effjax.parallel import device_mesh, shardings, tensor_parallel
from effjax.samplers import FlowMatchEuler, Sampler
from effjax.scanning import scan_blocks, stack_params
from effjax.transform import on_shapes

# Chip, how many, pixels and weights. A v5e has 15.75 GiB, a v6e 31.25, a v5p 95.
CASES = [
    ("v5e", 1, 1024, "W4A16"),
    *(("v5e", 8, pixels, kind) for pixels in (1024, 2048) for kind in ("bf16", "W8A8", "W4A16")),
    *(("v5p", 1, pixels, kind) for pixels in (1024, 2048) for kind in ("bf16", "W8A8", "W4A16")),
    ("v6e", 1, 1024, "bf16"),
    *(("v6e", 1, pixels, kind) for pixels in (1024, 2048) for kind in ("W8A8", "W4A16")),
    ("v5e", 2, 1024, "W4A16 and T5 W8A16"),
]
STEPS, TEXT = 28, 512
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def quantized(kind: str) -> tuple[Any, ...]:
    """Plans by name: layers of attention and feed-forward layers. Modulations stay in bfloat16."""
    bits = {"bf16": None, "W8A8": (8, 8), "W8A16": (8, 16), "W4A16": (4, 16)}[kind]
    if bits is None:
        return ()
    group = {"group_size": 128} if bits[0] == 4 else {}
    plan = round_to_nearest.uniform(*bits, **group)
    return (round_to_nearest.transform(plan),)


CACHES: dict[str, Any] = {
    "none": None,
    "even_steps, 2": (even_steps, even_steps.EvenStepsPlan(steps=STEPS, every=2)),
    "taylor_seer, 2, order 1": (taylor_seer, taylor_seer.TaylorSeerPlan(steps=STEPS, every=2)),
    "fb_cache": (fb_cache, fb_cache.FBCachePlan()),
    "db_cache, 8": (db_cache, db_cache.DBCachePlan(steps=STEPS)),
}


def flux(kind: str, pixels: int, cache: str = "none") -> tuple[Any, Any, Any]:
    """Forward, shapes of parameters, and of a prompt."""
    dtypes: dict[str, Any] = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    config = FluxConfig(sample_size=pixels // 8, **dtypes)
    transforms = quantized(kind)
    if cache != "none":
        method, plan = CACHES[cache]
        transforms = (*transforms, method.transform(plan))
    forward, params = on_shapes(transforms, *abstract(Flux, config))
    shapes = (1, TEXT, config.caption_channels), (1, config.pooled_channels), (1,)
    prompt = PooledEmbeddings(*(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes))
    return forward, params, prompt


def collectives(program: str) -> dict[str, Any]:
    """How often chips exchange arrays in a compiled program, and the bytes of these arrays.

    What is in the body of a loop counts as often as it runs.
    """
    calls: dict[str, list[int]] = {}
    name, loops, numbers = "", {}, {}
    for line in program.splitlines():
        if match := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = match[1]
        if match := re.search(r"s32\[\]\S* constant\((\d+)\)", line):
            numbers[name] = int(match[1])  # a condition has one: how often its loop runs
        if match := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
            loops[match[2]] = (name, match[1])
        if match := re.search(r"= (.*?) (" + "|".join(COLLECTIVES) + r")(-start)?\(", line):
            parts = re.findall(r"([a-z]+)(\d+)[a-z\d]*\[([\d,]*)\]", match[1])
            sizes = [
                int(bits) // 8 * math.prod(int(n) for n in sides.split(",") if n)
                for _, bits, sides in parts
            ]
            calls.setdefault(name, []).append(max(sizes) if match[3] else sum(sizes))

    def times(name: str) -> int:
        if name not in loops:
            return 1
        outer, condition = loops[name]
        return numbers[condition] * times(outer)

    return {
        "collectives": sum(times(name) * len(own) for name, own in calls.items()),
        "exchanged_MB": sum(times(name) * sum(own) for name, own in calls.items()) / 1e6,
    }


def there(tree: Any, places: Any) -> Any:
    """Shapes with their places, or with one for all."""
    if isinstance(places, NamedSharding):
        places = jax.tree.map(lambda _, place=places: place, tree)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        *(tree, places),
    )


def scanned(forward: Any, params: Any) -> tuple[Any, Any]:
    """Blocks scanned, over shapes of stacked parameters."""
    forward, _ = scan_blocks()(forward, params)
    return forward, jax.eval_shape(partial(stack_params, forward), params)


class Step(NamedTuple):
    """A call of the sampler on one image, the step known when it runs, and its operands' shapes."""

    run: Any
    carry: Any
    prompt: Any

    @classmethod
    def of(cls, forward: Any, params: Any, prompt: Any) -> Step:
        sampler = Sampler(FlowMatchEuler(steps=STEPS))

        def start(params: Any, prompt: Any) -> Any:
            return sampler.init(forward, params, prompt, jax.random.key(0))

        carry = jax.eval_shape(start, params, prompt)

        def run(params: Any, x: Any, memory: Any, state: Any, prompt: Any, index: Any) -> Any:
            before = carry._replace(x=x, memory=memory, state=state, keys=None)
            after = sampler.step(forward, params, before, prompt, None, index)
            return after.x, after.memory, after.state

        return cls(run, carry, prompt)

    @property
    def operands(self) -> tuple[Any, ...]:
        carry = self.carry
        index = jax.ShapeDtypeStruct((), jnp.int32)
        return carry.x, carry.memory, carry.state, self.prompt, index


def compile_one(chip: str, number: int, pixels: int, kind: str) -> dict[str, Any]:
    """Compile one step for chips; memory of one of them in GiB."""
    kind, _, encoder = kind.partition(" and T5 ")
    mesh = device_mesh(chips(chip, number), model=number)
    forward, params, prompt = flux(kind, pixels)
    weights, rules = weight_bytes(params), tensor_parallel(forward)
    forward, params = scanned(forward, params)
    step = Step.of(forward, params, prompt)
    whole = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        counted = cost(step.run, params, *step.operands, platform="tpu")
        given = there(params, shardings(params, mesh, rules)), *there(step.operands, whole)
        compiled = jax.jit(step.run, donate_argnums=(1, 2, 3)).lower(*given).compile()
    memory = memory_of(compiled)
    row = {
        "chips": f"{number} x {chip}",
        "pixels": pixels,
        "weights": kind,
        "all_weights_GiB": weights / 2**30,
        "arguments_GiB": memory["argument_bytes"] / 2**30,
        "temp_GiB": memory["temp_bytes"] / 2**30,
        "peak_GiB": memory["peak_bytes"] / 2**30,
        "TFLOP": counted.flops / 1e12,
        **collectives(compiled.as_text() or ""),
    }
    if encoder:
        found = encode(mesh, encoder)
        # They run one after the other: the weights of both, and what one of them needs besides.
        most = max(each["peak_bytes"] - each["argument_bytes"] for each in (memory, found))
        row["weights"] = f"{kind}, T5-XXL {encoder}"
        row["arguments_GiB"] += found["argument_bytes"] / 2**30
        row["temp_GiB"] = max(memory["temp_bytes"], found["temp_bytes"]) / 2**30
        row["peak_GiB"] = row["arguments_GiB"] + most / 2**30
    return row


def encode(mesh: Any, kind: str) -> dict[str, int]:
    """Memory of T5 v1.1 XXL's encoder on 512 tokens, on the same chips."""
    dtypes: dict[str, Any] = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    forward, params = on_shapes(quantized(kind), *abstract(T5Encoder, T5Config(**dtypes)))
    rules = tensor_parallel(forward)
    forward, params = scanned(forward, params)
    shapes = jax.ShapeDtypeStruct((1, TEXT), jnp.int32), jax.ShapeDtypeStruct((1, TEXT), bool)
    given = there(shapes, NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        call = jax.jit(lambda params, ids, mask: forward(params, {}, ids, mask)[0])
        return compiled_memory(call, there(params, shardings(params, mesh, rules)), *given)


def held(pixels: int, cache: str) -> dict[str, Any]:
    """What a step cache holds between two calls, and what a call costs that computes or skips."""
    forward, params, prompt = flux("bf16", pixels, cache)
    step = Step.of(forward, params, prompt)
    computed, skipped = (
        cost(step.run, params, *step.operands, branch=branch, platform="tpu").flops / 1e12
        for branch in ("max", "min")
    )
    return {
        "pixels": pixels,
        "cache": cache,
        "state_GiB": state_bytes(step.carry.state) / 2**30,
        "computed_TFLOP": computed,
        "skipped_TFLOP": skipped,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("memory", "caches"), default="memory")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        print(json.dumps(compile_one(*json.loads(arguments.one))))
        return
    if arguments.part == "caches":
        rows = []
        for pixels, cache in itertools.product((1024, 2048), CACHES):
            rows.append(held(pixels, cache))
            print(report.markdown(rows[-1:]).splitlines()[-1], flush=True)
        report.write(
            "flux_caches",
            title="What step caches of FLUX.1-dev hold",
            command="python -m experiments.flux_memory --part caches",
            rows=rows,
        )
        return
    rows = []
    for row in in_processes("experiments.flux_memory", CASES):
        rows.append(row)
        report.write(
            "flux_memory",
            title="One step of FLUX.1-dev compiled ahead of time for TPUs",
            command="python -m experiments.flux_memory",
            rows=rows,
        )


if __name__ == "__main__":
    main()
