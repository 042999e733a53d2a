"""Kernels on a GPU: first that they are right, then against peers and against the memory's speed.

    python -m experiments.kernels.gpu      (a few minutes; needs the `gpu` extra)

Dense and block-sparse attention against cuDNN, torch and tokamax where these are
installed; int8 against bfloat16 attention; decode attention and 4-bit products against a copy's
bandwidth. bfloat16, 16 heads of 64. Programs alternate, times are the best of each. Results are
written after every part.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import report
from experiments.kernels.cases import ATTENTION, CASES
from experiments.kernels.timing import best_seconds
from pallas_kernels.attention import dense_attention
from pallas_kernels.block_mask import Band, from_map, visible_pairs
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.packing import pack
from pallas_kernels.quantized_attention import quantized_attention
from pallas_kernels.quantized_matmul import packed_matmul

HEADS, WIDTH, BLOCK = 16, 64, 64
DENSITIES = (2, 4, 8, 16)  # one in
MOSAIC: dict[str, Any] = {"implementation": "pallas_mosaic_gpu"}
RUNS = {"triton": "Triton", "mosaic_gpu": "Mosaic"}  # by what stands in a lowered program

Programs = dict[str, Callable[[], Any]]
Row = dict[str, Any]


def on_hopper() -> bool:
    return getattr(jax.devices()[0], "compute_capability", None) == "9.0"


def heads(tokens: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(tokens), 3)
    return tuple(jax.random.normal(k, (1, tokens, HEADS, WIDTH), jnp.bfloat16) for k in keys)


def _first_line(reason: Exception) -> str:
    return (str(reason) or repr(reason)).splitlines()[0]


def compiled(function: Callable[..., Any], *operands: Any) -> Callable[[], Any]:
    return partial(jax.jit(function).lower(*operands).compile(), *operands)


class Torch:
    """A result of torch, which waits for it as JAX's arrays do."""

    def __init__(self, tensor: Any):
        self.tensor = tensor

    def block_until_ready(self) -> Torch:
        import torch

        torch.cuda.synchronize()
        return self


def peers(operands: tuple[jax.Array, ...]) -> Programs:
    """Dense attention of others, as far as it is there."""
    programs: Programs = {}

    def add(name: str, make: Callable[[], Callable[[], Any]]) -> None:
        try:
            run = make()
            jax.block_until_ready(run())
            programs[name] = run
        except Exception as reason:
            print(f"{name} does not run here: {_first_line(reason)}", flush=True)

    def of_torch() -> Callable[[], Any]:
        import torch

        tensors = [torch.from_dlpack(x.swapaxes(1, 2)) for x in operands]

        return lambda: Torch(torch.nn.functional.scaled_dot_product_attention(*tensors))

    def of_tokamax() -> Callable[[], Any]:
        import tokamax

        return compiled(tokamax.dot_product_attention, *operands)

    cudnn = partial(jax.nn.dot_product_attention, implementation="cudnn")
    add("cuDNN", lambda: compiled(cudnn, *operands))
    add("torch", of_torch)
    add("tokamax", of_tokamax)
    return programs


def check() -> list[Row]:
    """Every kernel against its reference, at the sizes of real models cut to what fits."""
    cases = [(name, function, shapes) for name, (function, shapes) in CASES.items()]
    cases += [
        (f"{name}, by Mosaic", partial(function, **MOSAIC), shapes)
        for name, (function, shapes) in ATTENTION.items()
        if on_hopper()
    ]
    rows = []
    for name, function, shapes in cases:
        operands = jax.tree.map(_example, shapes)
        run = jax.jit(function)
        try:
            found = jax.block_until_ready(run(*operands))
        except NotImplementedError as reason:  # Mosaic's kernel has no segments
            print(f"{name} does not run: {_first_line(reason)}", flush=True)
            continue
        expected = None
        for other in ("reference", "xla"):
            try:
                expected = jax.block_until_ready(
                    jax.jit(partial(function, implementation=other))(*operands)
                )
                break
            except Exception as reason:  # the reference of long sequences may not fit
                print(f"{name}: {other} fails: {_first_line(reason)}", flush=True)
        if expected is None:
            raise SystemExit(f"{name}: nothing to compare with")
        found, expected = (
            jnp.concatenate([leaf.astype(jnp.float32).reshape(-1) for leaf in jax.tree.leaves(x)])
            for x in (found, expected)
        )
        difference = float(jnp.max(jnp.abs(found - expected)))  # NaN stays NaN
        scale = float(jnp.max(jnp.abs(expected)))
        text = run.lower(*operands).as_text()
        rows.append(
            {
                "kernel": name,
                "runs": next((each for mark, each in RUNS.items() if mark in text), "XLA"),
                "compared_with": other,
                "largest_difference_over_largest_value": difference / scale,
            }
        )
        print(report.markdown(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def _example(shape: Any) -> jax.Array:
    key = jax.random.key(sum(shape.shape))
    if shape.dtype == jnp.int32 and len(shape.shape) == 1:
        return jnp.full(shape.shape, 1000, jnp.int32)  # lengths, zero points
    if jnp.issubdtype(shape.dtype, jnp.integer):
        low, high = (0, 127) if shape.dtype == jnp.int32 else (-8, 8)
        return jax.random.randint(key, shape.shape, low, high).astype(shape.dtype)
    return jax.random.normal(key, shape.shape, jnp.float32).astype(shape.dtype)


def attention(tokens: int, repeats: int) -> list[Row]:
    """Dense and block-sparse attention against the fastest dense one."""
    operands = heads(tokens)
    programs = {f"dense, {name}": run for name, run in peers(operands).items()}
    programs["dense, effjax"] = compiled(dense_attention, *operands)
    routes: dict[str, Any] = {"": {}}
    if on_hopper():
        programs["dense, effjax, by Mosaic"] = compiled(
            partial(dense_attention, **MOSAIC), *operands
        )
        routes[", by Mosaic"] = MOSAIC
    densities = dict.fromkeys(programs, 1.0)
    rng = np.random.default_rng(0)
    blocks = -(-tokens // BLOCK)
    for one_in in DENSITIES:
        band = Band(tokens // one_in // 2)
        kept = max(blocks // one_in, 1)
        ranks = np.stack([rng.random((blocks, blocks)).argsort(-1) for _ in range(HEADS)])
        lists = from_map(ranks < kept, tokens, block=BLOCK)
        shares = {"band": visible_pairs(band, tokens) / tokens**2, "random": kept / blocks}
        for (kind, mask), (route, options) in product(
            {"band": band, "random": lists}.items(), routes.items()
        ):
            name = f"{kind}, 1 in {one_in}{route}"
            sparse = partial(block_sparse_attention, mask=mask, **options)
            programs[name] = compiled(sparse, *operands)
            densities[name] = shares[kind]
    for values in (None, "int8", "float8"):
        name = f"int8 logits, {values or 'bfloat16'} values"
        quantized = partial(quantized_attention, values=values)
        try:
            programs[name] = compiled(quantized, *operands)
        except Exception as reason:  # float8 on older GPUs
            print(f"{name} does not run here: {_first_line(reason)}", flush=True)
            continue
        densities[name] = 1.0
    seconds = best_seconds(programs, repeats, calls=5)
    fastest = min(t for name, t in seconds.items() if name.startswith("dense"))
    ours = seconds["dense, effjax"]
    return [
        {
            "tokens": tokens,
            "program": name,
            "milliseconds": 1e3 * taken,
            "density": densities[name],
            "speed_up_over_our_dense": ours / taken,
            "speed_up_over_fastest_dense": fastest / taken,
            "share_of_ideal": densities[name] * fastest / taken,
        }
        for name, taken in seconds.items()
    ]


def bandwidth(repeats: int, *, scale: int = 1) -> list[Row]:
    """Programs that read much and compute little, against a copy."""
    rows = []
    big = jnp.zeros((1 << 28) // scale, jnp.float32)
    batch, tokens, width = 8, 32768 // scale, 128
    cache = jax.random.normal(jax.random.key(0), (batch, tokens, 8, width), jnp.bfloat16)
    q = jax.random.normal(jax.random.key(1), (batch, 1, 32, width), jnp.bfloat16)
    lengths = jnp.full(batch, tokens, jnp.int32)
    inputs, outputs = 8192, 28672 // scale
    weights = jax.random.randint(jax.random.key(2), (inputs, outputs), -8, 8).astype(jnp.int8)
    planes = pack(weights, bits=4)
    x = jax.random.normal(jax.random.key(3), (1, inputs), jnp.bfloat16)
    group = jnp.ones((inputs // 128, outputs), jnp.bfloat16)
    dense = jnp.zeros((inputs, outputs), jnp.bfloat16)
    coded = partial(packed_matmul, bits=4, group_size=128)
    programs = {
        "copy": compiled(lambda x: x + 1, big),
        "decode attention": compiled(decode_attention, q, cache, cache, lengths),
        "W4A16, one row": compiled(lambda x, p, s: coded(x, p, scale=s), x, planes, group),
        "bfloat16 product, one row": compiled(jnp.matmul, x, dense),
    }
    moved = {
        "copy": 2 * big.nbytes,
        "decode attention": 2 * cache.nbytes,
        "W4A16, one row": weights.size // 2 + group.nbytes,
        "bfloat16 product, one row": dense.nbytes,
    }
    seconds = best_seconds(programs, repeats, calls=20)
    copied = moved["copy"] / seconds["copy"]
    for name, taken in seconds.items():
        rate = moved[name] / taken
        rows.append(
            {
                "program": name,
                "microseconds": 1e6 * taken,
                "GB_per_second": rate / 1e9,
                "share_of_copy": rate / copied,
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="4096,16384,65536")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--skip-check", action="store_true")
    parser.add_argument(
        "--scale", type=int, default=1, help="divides the sizes of the bandwidth part"
    )
    arguments = parser.parse_args(argv)
    tables: dict[str, list[Row]] = {}

    def add(table: str, rows: list[Row]) -> None:
        tables.setdefault(table, []).extend(rows)
        print(report.markdown(rows), flush=True)
        report.write(
            f"kernels_{jax.devices()[0].platform}",
            title=f"Kernels on {jax.devices()[0].device_kind}",
            command=f"python -m experiments.kernels.gpu --tokens {arguments.tokens} "
            f"--repeats {arguments.repeats}",
            **tables,
        )

    if not arguments.skip_check:
        add("against_the_reference", check())
    add("programs_bound_by_memory", bandwidth(arguments.repeats, scale=arguments.scale))
    for tokens in map(int, arguments.tokens.split(",")):
        add("attention", attention(tokens, arguments.repeats))


if __name__ == "__main__":
    main()
