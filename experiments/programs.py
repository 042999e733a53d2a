"""How long programs take to compile and what memory they need: every block traced, or scanned.

    python -m experiments.programs --chip v5e      (needs the `tpu` extra)
    python -m experiments.programs                 (for the CPU; with seconds of running)

Full-size models of shapes alone: nothing is allocated. `scanned` picks the weights of a layer in
each turn, `stacked` has them stacked. Each program is compiled in a process of its own, one form
beside the other. Peak memory is that of arguments, results and temporaries, less what is shared.
Running times are those of narrower models with as many layers, in turns.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.caches.install import Caches, as_it_is
from effjax.forward import Forward, abstract, parameter_count
from effjax.methods.attention import dit_fast_attn
from effjax.models.dit import DiT, DiTConfig
from effjax.models.llama import Llama, LlamaConfig
from effjax.models.pixart import PixArt, PixArtConfig, PromptEmbeddings
from effjax.models.t5 import T5Config, T5Encoder
from effjax.samplers import DDIM, Sampler
from effjax.scanning import scan_blocks, stack_params
from effjax.testing import random_params
from experiments import report
from experiments.plan_speed import synthetic_plan

BFLOAT16: dict[str, Any] = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
FORMS = ("unrolled", "scanned", "stacked")
Case = tuple[Forward, Any, Callable[..., Any], tuple]  # forward, shapes, call, its other operands


def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def llama(form: str, *, small: bool) -> Case:
    """A prefill of 512 tokens, the last one's logits."""
    config = LlamaConfig(
        num_layers=64,
        hidden_size=256 if small else 2048,
        intermediate_size=704 if small else 5632,
        num_heads=4 if small else 16,
        num_kv_heads=2 if small else 8,
        head_dim=64 if small else 128,
        **({} if small else BFLOAT16),
    )
    forward, params = scanned(form, *abstract(Llama, config))
    keep = np.full((1, 1), 511)

    def call(params, tokens):
        return forward(params, {}, tokens, None, jnp.asarray(keep))[0]

    return forward, params, call, (shape(1, 512, dtype=jnp.int32),)


def cached(form: str, *, small: bool) -> Case:
    """The same with a cache for 512 more tokens."""
    forward, params, _, operands = llama(form, small=small)
    forward = forward.patch(Caches(as_it_is)).with_cache_length(512, 512)
    keep = np.full((1, 1), 511)

    def call(params, tokens):
        state = forward.init(params, tokens)
        return forward(params, state, tokens, None, jnp.asarray(keep), step=0)

    return forward, params, call, operands


def dit(form: str, *, small: bool, compressed: bool = False) -> Case:
    """A guided step of DiT-XL/2-512, two images; the step is known when the program runs."""
    if small:
        config = DiTConfig.preset("DiT-S/2", num_layers=28)
    else:
        config = DiTConfig.preset("DiT-XL/2", sample_size=64, **BFLOAT16)
    forward, params = abstract(DiT, config)
    sampler = Sampler(DDIM(steps=50), guidance=4.0)
    if compressed:
        plan = synthetic_plan(config.num_layers, sampler.calls, config.tokens)
        forward, params = dit_fast_attn.transform(plan)(forward, params)
    forward, params = scanned(form, forward, params)
    labels = shape(2, dtype=jnp.int32)

    def start(params, labels):
        return sampler.init(forward, params, labels, jax.random.key(0))

    carry = jax.eval_shape(start, params, labels)

    def call(params, state, x, memory, labels, index):
        before = carry._replace(x=x, memory=memory, state=state, keys=None)
        uncond = sampler.unconditional(forward, labels)
        after = sampler.step(forward, params, before, labels, uncond, index)
        return after.x, after.memory, after.state

    index = shape(dtype=jnp.int32)
    return forward, params, call, (carry.state, carry.x, carry.memory, labels, index)


def pixart(form: str, *, small: bool) -> Case:
    """A call of PixArt-alpha 512 on two branches of one image, 120 tokens of text."""
    narrow = {"num_heads": 4, "sample_size": 32}
    options: dict[str, Any] = narrow if small else {"sample_size": 64, **BFLOAT16}
    config = PixArtConfig(**options)
    forward, params = scanned(form, *abstract(PixArt, config))
    size, channels = config.sample_size, config.in_channels
    inputs: tuple[Any, Any] = shape(2, 120, config.caption_channels), shape(2, 120, dtype=bool)
    text = PromptEmbeddings(*inputs)

    def call(params, x, t, text):
        return forward(params, {}, x, t, text)[0]

    return forward, params, call, (shape(2, size, size, channels), shape(2), text)


def t5(form: str, *, small: bool) -> Case:
    """T5 v1.1 XXL's encoder on 120 tokens."""
    narrow: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 640, "num_heads": 4}
    config = T5Config(**(narrow if small else BFLOAT16))
    forward, params = scanned(form, *abstract(T5Encoder, config))

    def call(params, ids, mask):
        return forward(params, {}, ids, mask)[0]

    return forward, params, call, (shape(1, 120, dtype=jnp.int32), shape(1, 120, dtype=bool))


CASES: dict[str, Callable[..., Case]] = {
    "Llama of 64 layers, prefill": llama,
    "the same with a cache": cached,
    "DiT-XL/2-512": dit,
    "DiT-XL/2-512, DiTFastAttn": lambda form, **options: dit(form, compressed=True, **options),
    "PixArt-alpha 512": pixart,
    "T5 XXL encoder": t5,
}


def scanned(form: str, forward: Forward, params: Any) -> tuple[Forward, Any]:
    if form == "unrolled":
        return forward, params
    return scan_blocks(stack=form == "stacked")(forward, params)


def compiled(name: str, form: str, chip: str | None) -> dict[str, Any]:
    """Lower and compile a program."""
    _, params, call, operands = CASES[name](form, small=False)
    operands = (params, *operands)
    donated = (1, 2, 3) if "DiT" in name else ()
    if chip is not None:
        from experiments import tpu

        operands = tpu.on_chip(chip, operands)
        jax.jit(jnp.sin).lower(tpu.on_chip(chip, shape(8, 128))).compile()  # starts the compiler
    start = time.perf_counter()
    lowered = jax.jit(call, donate_argnums=donated).lower(*operands)
    middle = time.perf_counter()
    program = lowered.compile()
    end = time.perf_counter()
    memory = program.memory_analysis()
    assert memory is not None
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes
    peak += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return {
        "lower_s": middle - start,
        "compile_s": end - middle,
        "lines": lowered.as_text().count("\n"),
        "weights_GB": 2 * parameter_count(params) / 1e9,
        "peak_GB": peak / 1e9,
    }


def timed(name: str, repeats: int) -> dict[str, Any]:
    """Seconds of calls of a narrow model, the forms in turns, and how far results differ."""
    forward, shapes, _, _ = CASES[name]("unrolled", small=True)
    weights = random_params(shapes)
    of_form = {"unrolled": weights, "scanned": weights, "stacked": stack_params(forward, weights)}
    programs: dict[str, Callable[[], Any]] = {}
    for form, params in of_form.items():
        _, _, call, operands = CASES[name](form, small=True)
        given = params, *_random(operands)
        programs[form] = functools.partial(jax.jit(call).lower(*given).compile(), *given)
    results = {form: jax.tree.leaves(run())[0] for form, run in programs.items()}
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(repeats):
        for form, run in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[form].append(time.perf_counter() - start)
    base, largest = results["unrolled"], float(jnp.abs(results["unrolled"]).max())
    row: dict[str, Any] = {"program": name, "unrolled_s": float(np.median(seconds["unrolled"]))}
    for form in FORMS[1:]:
        ratios = np.divide(seconds[form], seconds["unrolled"])
        row[f"{form}_ratio"] = float(np.median(ratios))
        row[f"{form}_error"] = float(jnp.abs(results[form] - base).max()) / largest
    return row


def _random(operands: tuple) -> tuple:
    """Arrays of these shapes, the same for every form: numbers, ones and zeros."""
    rng = np.random.default_rng(0)

    def one(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.dtype == bool:
            return jnp.ones(leaf.shape, bool)
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32)).astype(leaf.dtype)

    return jax.tree.map(one, operands)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chip", help="compile for a TPU; for the CPU if none")
    parser.add_argument("--cases", default=",".join(map(str, range(len(CASES)))))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a case and a form
    arguments = parser.parse_args(argv)
    names = [list(CASES)[int(number)] for number in arguments.cases.split(",")]
    if arguments.one:
        print(json.dumps(compiled(arguments.one[0], arguments.one[1], arguments.chip)))
        return
    options = sys.argv[1:] if argv is None else argv
    rows: list[dict[str, Any]] = []
    running: list[dict[str, Any]] = []
    where = ["--chip", arguments.chip] if arguments.chip else []
    for name in names:
        found = {}
        for form in FORMS:
            command = [sys.executable, "-m", "experiments.programs", "--one", name, form, *where]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[form] = json.loads(done.stdout.splitlines()[-1])
            row = {"program": name, "form": form, **found[form]}
            of = found["unrolled"]
            total = found[form]["lower_s"] + found[form]["compile_s"]
            row["seconds_ratio"] = total / (of["lower_s"] + of["compile_s"])
            row["compile_ratio"] = found[form]["compile_s"] / of["compile_s"]
            row["peak_ratio"] = found[form]["peak_GB"] / of["peak_GB"]
            rows.append(row)
            print(report.markdown([row]), flush=True)
        if not arguments.chip:
            running.append(timed(name, arguments.repeats))
            print(report.markdown(running[-1:]), flush=True)
        report.write(
            f"programs_{arguments.chip or 'cpu'}",
            title=f"Equal blocks in one program, {arguments.chip or 'CPU'}",
            command=" ".join(["python -m experiments.programs", *options]),
            compiling=rows,
            **({"running_narrower_models": running} if running else {}),
        )


if __name__ == "__main__":
    main()
