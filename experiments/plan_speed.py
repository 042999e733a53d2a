"""DiT-XL/2 under a fixed plan: FLOPs against the closed form, and seconds of a call.

    python -m experiments.plan_speed

The FLOPs are those of 50 guided steps of the full-size DiT-XL/2-512 (1024 tokens), traced on
shapes alone. The seconds are of single network calls of fewer layers of that width, at 1024 and
4096 tokens, dense and compressed in one run on this machine.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effjax.cost import sampler_cost
from effjax.forward import abstract, functional
from effjax.guidance import Guidance
from effjax.methods.attention.dit_fast_attn import (
    DiTFastAttnPlan,
    Strategy,
    attention_macs,
    transform,
)
from effjax.models.dit import DiT, DiTConfig
from effjax.samplers import DDIM, Sampler
from experiments import report

FULL, AST, WARS_ASC, WARS, FULL_ASC = Strategy


def synthetic_plan(layers: int, calls: int, tokens: int) -> DiTFastAttnPlan:
    """A fixed plan that uses all strategies: denser in early calls and early layers."""
    late = (WARS, AST, WARS_ASC, AST, FULL_ASC, AST, WARS, AST)
    early = (FULL, FULL_ASC, WARS, FULL)
    rows = []
    for layer in range(layers):
        row = [FULL]
        for call in range(1, calls):
            pattern = early if call < calls // 4 else late
            row.append(pattern[(call + layer) % len(pattern)])
        rows.append(tuple(int(value) for value in row))
    return DiTFastAttnPlan(strategies=tuple(rows), tokens=tokens, window=tokens // 8)


def flops() -> list[dict[str, Any]]:
    """Attention FLOPs of the whole run, executed and useful, and the closed form."""
    config = DiTConfig.preset("DiT-XL/2", sample_size=64)
    forward, params = abstract(DiT, config)
    sampler = Sampler(DDIM(steps=50), guidance=4.0)
    label = jax.ShapeDtypeStruct((1,), jnp.int32)
    plan = synthetic_plan(config.num_layers, sampler.calls, config.tokens)
    compressed, _ = transform(plan)(forward, params)
    columns = list(zip(zip(*plan.strategies), zip(*plan.need)))
    dense = sampler_cost(sampler, forward, params, label, distinct=lambda step: 0)
    sparse = sampler_cost(sampler, compressed, params, label, distinct=columns.__getitem__)
    closed = 2 * int(attention_macs(plan, batch=2, width=config.hidden_size).sum())
    attention = dense.scope("attention").flops
    return [
        {
            "program": "dense",
            "attention_TFLOPs": attention / 1e12,
            "useful_TFLOPs": attention / 1e12,
            "closed_form_TFLOPs": 2 * 50 * 28 * 2 * 2 * 1024**2 * 1152 / 1e12,
            "executed_kept": 1.0,
            "useful_kept": 1.0,
            "total_kept": 1.0,
        },
        {
            "program": "synthetic plan",
            "attention_TFLOPs": sparse.scope("attention").flops / 1e12,
            "useful_TFLOPs": sparse.scope("attention").useful_flops / 1e12,
            "closed_form_TFLOPs": closed / 1e12,
            "executed_kept": sparse.scope("attention").flops / attention,
            "useful_kept": sparse.scope("attention").useful_flops / attention,
            "total_kept": sparse.flops / dense.flops,
        },
    ]


def seconds(tokens: int, layers: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds of one guided network call (batch 2) by strategy, all layers alike."""
    config = DiTConfig.preset("DiT-XL/2", sample_size=2 * int(tokens**0.5), num_layers=layers)
    forward, params = functional(DiT(config, rngs=nnx.Rngs(0)))
    guidance = Guidance()
    x = jnp.ones((2, *config.sample_shape))
    inputs = (x, jnp.full(2, 500.0), jnp.array([1, 1000], jnp.int32))
    programs: dict[str, Any] = {}
    for strategy in Strategy:
        row = (int(FULL), int(strategy), int(WARS))  # the last makes FULL keep its residual
        plan = DiTFastAttnPlan(strategies=(row,) * layers, tokens=tokens, window=tokens // 8)
        patched, _ = transform(plan)(forward, params)
        state = patched.init(params, *inputs, guidance=guidance)
        run = jax.jit(
            lambda params, state, *inputs, patched=patched: patched(
                params, state, *inputs, step=1, guidance=guidance
            )[0]
        )
        programs[strategy.name] = (run.lower(params, state, *inputs).compile(), state)
    dense = jax.jit(lambda params, state, *inputs: forward(params, state, *inputs)[0])
    programs["dense"] = (dense.lower(params, {}, *inputs).compile(), {})
    best = dict.fromkeys(programs, float("inf"))
    for _ in range(repeats):
        for name, (program, state) in programs.items():
            began = time.perf_counter()
            program(params, state, *inputs).block_until_ready()
            best[name] = min(best[name], time.perf_counter() - began)
    full = synthetic_plan(28, 50, tokens)
    rows = [
        {
            "tokens": tokens,
            "call": name,
            "seconds": best[name],
            "speed_up": best["dense"] / best[name],
        }
        for name in ("dense", *(strategy.name for strategy in Strategy))
    ]
    mean = float(np.mean([best[Strategy(value).name] for row in full.strategies for value in row]))
    rows.append(
        {
            "tokens": tokens,
            "call": "synthetic plan, mean",
            "seconds": mean,
            "speed_up": best["dense"] / mean,
        }
    )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2, help="layers of the timed model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="256 tokens; no results are written")
    arguments = parser.parse_args(argv)
    sizes = (256,) if arguments.quick else (1024, 4096)
    timed = [row for n in sizes for row in seconds(n, arguments.layers, arguments.repeats)]
    print(report.markdown(timed))
    if arguments.quick:
        return
    counted = flops()
    print(report.markdown(counted))
    options = f"--layers {arguments.layers} --repeats {arguments.repeats}"
    report.write(
        "plan_speed",
        title="DiT-XL/2 under a fixed plan",
        command=f"python -m experiments.plan_speed {options}",
        attention_of_50_guided_steps_at_1024_tokens=counted,
        seconds_of_one_guided_network_call=timed,
    )


if __name__ == "__main__":
    main()
