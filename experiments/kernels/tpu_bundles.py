"""Attention kernels of a TPU by the instructions that the compiler schedules, without a TPU.

    python -m experiments.kernels.tpu_bundles      (needs the `tpu` extra)

A TPU core issues a bundle of instructions a cycle, in the order that the compiler wrote down. So
the bundles that a call executes are the best figure of its time that there is without a TPU; they
say nothing of waits for memory, and nothing was timed. Compared are this library's kernel, the same
without its variants, JAX's splash attention, and, with `--before FOLDER`, the kernel of another
checkout. Each program is compiled in a process of its own, as the dump's place is a flag of libtpu.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from experiments import report, tpu

# isort: split
import jax
import jax.numpy as jnp

from pallas_kernels.block_mask import EVERYTHING, Band, BlockMask, Causal, Rule, block_mask
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.block_sparse_attention import tpu as kernel
from pallas_kernels.block_sparse_attention.heads import Arithmetic, Heads
from pallas_kernels.block_sparse_attention.operation import choose_block

# Batch, tokens, heads of queries and of keys, width; and what is seen.
CASES: dict[str, tuple[tuple[int, int, int, int, int], Rule]] = {
    "DiT-XL/2 256": ((8, 256, 16, 16, 72), EVERYTHING),
    "DiT-XL/2 512": ((2, 1024, 16, 16, 72), EVERYTHING),
    "FLUX": ((1, 4096, 24, 24, 128), EVERYTHING),
    "Llama 3, causal": ((1, 4096, 32, 8, 128), Causal()),
    "FLUX, band": ((1, 4096, 24, 24, 128), Band(512)),
}

# This kernel without a variant: constants of its module.
VARIANTS: dict[str, dict[str, int]] = {
    "ours": {},
    "ours, without the bound": {"SMALL_TILES": 0},
    "ours, one head a tile": {"TILE": 1},
    "ours, neither": {"SMALL_TILES": 0, "TILE": 1},
}
SPLASH = {"splash, 512 x 512": (512, 512), "splash, 512 x 1024": (512, 1024)}
BEFORE = "ours, before"


def regions(bundles: str) -> tuple[int, list[tuple[int, str]], int]:
    """What a scheduled kernel executes.

    Returns:
        Bundles of every step of its loop, of its branches (that contain no others) those that
        multiply, with their text, and the sum of the other branches, which start and end a row.
    """
    place, started, ended = -1, {}, {}
    lines: list[str] = []
    for line in bundles.splitlines():
        if re.match(r"\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:", line):
            place += 1
            lines.append(line)
        started |= dict.fromkeys(re.findall(r"Start region (\d+)", line), place)
        ended |= dict.fromkeys(re.findall(r"End region (\d+)", line), place)
    spans = {(start, ended[number] + 1) for number, start in started.items() if number in ended}
    spans = {(start, stop) for start, stop in spans if stop - start >= 60}
    loop = max(spans, key=lambda span: span[1] - span[0])
    texts = {(start, stop): "\n".join(lines[start:stop]) for start, stop in spans}
    products = _innermost([span for span in spans if "vmatmul" in texts[span]])
    others = _innermost([span for span in spans if "vmatmul" not in texts[span]])

    def size(span: tuple[int, int]) -> int:
        """Bundles of a region, but not those of branches in it."""
        inside = [b - a for a, b in others if span[0] <= a and b <= span[1] and (a, b) != span]
        return span[1] - span[0] - sum(inside)

    multiply = [(size(span), texts[span]) for span in products]
    ends = sum(stop - start for start, stop in others)
    return loop[1] - loop[0] - ends - sum(size for size, _ in multiply), multiply, ends


def _innermost(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those that contain none of the others, in order."""
    return [
        (start, stop)
        for start, stop in sorted(spans)
        if not any(start <= a and b <= stop and (a, b) != (start, stop) for a, b in spans)
    ]


def _splash(rule: Rule, blocks: tuple[int, int], q: Any, k: Any, v: Any) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    lengths = q.shape[2], k.shape[2]
    if isinstance(rule, Band):
        assert isinstance(rule.window, int)
        own = splash.LocalMask(lengths, (rule.window, rule.window), 0)
    else:
        own = (splash.CausalMask if isinstance(rule, Causal) else splash.FullMask)(lengths)
    of_queries, of_keys = blocks
    run = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([own] * q.shape[1]),
        block_sizes=splash.BlockSizes(block_q=of_queries, block_kv=of_keys),
    )
    return jax.vmap(run)(q, k, v)


def compile_one(chip: str, case: str, program: str) -> list[dict[str, Any]]:
    """Compile one program, whose bundles go to the folder of `LIBTPU_INIT_ARGS`."""
    (batch, tokens, heads, key_heads, width), rule = CASES[case]
    shapes = [(batch, tokens, count, width) for count in (heads, key_heads, key_heads)]
    if program in SPLASH:
        of_queries, of_keys = SPLASH[program]
        blocks, tile = (min(of_queries, tokens), min(of_keys, tokens)), 1
        shapes = [(b, h, s, d) for b, s, h, d in shapes]
        run = partial(_splash, rule, blocks)
    else:
        for name, value in VARIANTS.get(program, {}).items():
            setattr(kernel, name, value)
        run = partial(block_sparse_attention, mask=rule, implementation="pallas_tpu")
        blocks = choose_block(rule, tokens, tokens, **kernel.blocks(width))
    operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    mask = block_mask(rule, tokens, block=blocks)
    if program not in SPLASH:
        tile = _tile(mask, operands, width)
    compiled = jax.jit(run).lower(*tpu.on_chip(chip, operands)).compile()
    config = _config(compiled.as_text() or "")
    declared = config["custom_call_config"].get("cost_estimate", {})
    spaces = config["used_scoped_memory_configs"]
    folder = Path(os.environ["DUMPED"])
    [scheduled] = [
        path for path in folder.glob("*-final_bundles.txt")
        if "schedule-analysis" not in path.name and "vmatmul" in path.read_text()
    ]  # fmt: skip
    every_step, visits, ends = regions(scheduled.read_text())
    lines = batch * heads // tile
    rows, longest = mask.index.shape[2:]
    whole, cut = int(mask.full.sum()), int((mask.count - mask.full).sum())
    logits = tile * blocks[0] * blocks[1]
    found = []
    ways = {"": visits}
    if len(visits) == 4:  # in a branch for small logits, and in one for all others
        ways = {", norms small": visits[::2], ", norms large": visits[1::2]}
    for name, bodies in ways.items():
        executed = rows * longest * every_step + rows * ends
        executed += whole * bodies[0][0] + cut * bodies[-1][0]
        found.append(
            {
                "case": case,
                "chip": chip,
                "program": program + name,
                "heads x queries x keys": f"{tile} x {blocks[0]} x {blocks[1]}",
                "bundles_M": lines * executed / 1e6,
                "of_2^18_logits": bodies[0][0] * 2**18 / logits,
                "cut": bodies[-1][0] * 2**18 / logits,
                "of_a_step": every_step,
                "exponentials_of_a_logit": bodies[0][1].count("vpow2") * 1024 / logits,
                # Memory space 1 is VMEM.
                "VMEM_KiB": sum(int(s["size"]) for s in spaces if s["memory_space"] == "1") / 1024,
                "GFLOP": mask.flops(batch, heads, head_dim=width) / 1e9,
                "memory_MB": int(declared["bytes_accessed"]) / 1e6 if declared else "undeclared",
            }
        )
    return found


def _config(program: str) -> dict[str, Any]:
    """What a compiled program says of its one kernel."""
    [_, own] = program.split('custom_call_target="tpu_custom_call"')
    _, _, config = own.partition("backend_config=")
    return json.JSONDecoder().raw_decode(config)[0]


def _tile(mask: BlockMask, operands: list[Any], width: int) -> int:
    if not hasattr(kernel, "heads_of_a_tile"):  # of an earlier checkout
        return 1
    q, k, v = (
        jax.ShapeDtypeStruct((b, h, s, d), x.dtype) for x in operands for b, s, h, d in [x.shape]
    )
    return kernel.heads_of_a_tile(mask, Arithmetic(width**-0.5, "bfloat16"), Heads(q, k, v))


def rows_of(chip: str, case: str, program: str, before: str | None = None) -> list[dict[str, Any]]:
    """`compile_one` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        root = before if program == BEFORE else str(Path(__file__).parents[2])
        environment = os.environ | {
            "LIBTPU_INIT_ARGS": flags, "DUMPED": folder, "PYTHONPATH": root or ""
        }  # fmt: skip
        command = [sys.executable, "-P", __file__, "--one", chip, case, program]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{chip}, {case}, {program}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Bundles of attention kernels for TPUs")
    parser.add_argument("--chips", default="v5e,v6e")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--programs", nargs="+", default=[*VARIANTS, *SPLASH])
    parser.add_argument("--before", help="a checkout whose kernel is compared too")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        print(json.dumps(compile_one(*arguments.one)))
        return
    programs = arguments.programs + ([BEFORE] if arguments.before else [])
    rows: list[dict[str, Any]] = []
    for chip in arguments.chips.split(","):
        for case in arguments.cases:
            for program in programs:
                own = rows_of(chip, case, program, arguments.before)
                rows += own
                print("\n".join(report.markdown(own).splitlines()[2:]), flush=True)
    given = sys.argv[1:] if argv is None else argv
    shown = ["CHECKOUT" if word == arguments.before else word for word in given]
    report.write(
        "kernels_tpu_bundles",
        title="Bundles that the compiler schedules for attention on TPUs",
        command=shlex.join(["python", "-m", "experiments.kernels.tpu_bundles", *shown]),
        per_call=rows,
    )


if __name__ == "__main__":
    main()
