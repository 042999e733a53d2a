"""Kernels on a GPU: against peers, against the memory's speed, and whether they are right.

    python -m experiments.kernels.gpu      (a few minutes; needs the `gpu` extra)

Dense and block-sparse attention against cuDNN, torch and tokamax where these are
installed; int8 against bfloat16 attention; arrow windows by head against dense attention; decode
attention and 4-bit products against a copy's bandwidth. bfloat16, 16 heads. Programs alternate,
times are the best of each. Results are written after every part.
"""

from __future__ import annotations

import argparse
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import report
from experiments.kernels import arrow
from experiments.kernels.cases import ATTENTION, CASES
from experiments.kernels.timing import best_seconds
from pallas_kernels.attention import dense_attention
from pallas_kernels.block_mask import Band, from_map, visible_pairs
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.implementation import for_hopper
from pallas_kernels.packing import pack
from pallas_kernels.quantized_attention import quantized_attention
from pallas_kernels.quantized_matmul import int8_matmul, packed_matmul

HEADS, WIDTH, BLOCK = 16, 64, 64
DENSITIES = (2, 4, 8, 16)  # one in
PARTS = ("products", "memory", "attention", "windows", "check")
TRITON: dict[str, Any] = {"implementation": "pallas_gpu"}  # where Mosaic's kernels are chosen
CORES = os.cpu_count() or 1
RUNNING = threading.Lock()  # one program at a time has the device's memory
WHOLE = 1 << 29  # logits that a reference may hold
ALLOWED = 0.04  # of operands in bfloat16, some of which are rounded twice
DIFFERENCE = "largest_difference_over_largest_value"
RUNS = {"triton": "Triton", "mosaic_gpu": "Mosaic"}  # by what stands in a lowered program

Programs = dict[str, Callable[[], Any]]
Row = dict[str, Any]


def heads(tokens: int, width: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(tokens), 3)
    return tuple(jax.random.normal(k, (1, tokens, HEADS, width), jnp.bfloat16) for k in keys)


def _first_line(reason: Exception) -> str:
    return (str(reason) or repr(reason)).splitlines()[0]


def compiled(function: Callable[..., Any], *operands: Any) -> Callable[[], Any]:
    """A call of a jitted function, which was compiled by a first one: the quickest to start."""
    run = partial(jax.jit(function), *operands)
    jax.block_until_ready(run())
    return run


def all_compiled(calls: dict[str, tuple[Any, ...]]) -> Programs:
    """Functions and their operands as programs, compiled side by side; those that fail are told."""

    def of(name: str) -> Callable[[], Any] | None:
        try:
            return compiled(*calls[name])
        except Exception as reason:
            print(f"{name} does not run here: {_first_line(reason)}", flush=True)
            return None

    with ThreadPoolExecutor(CORES) as pool:
        programs = dict(zip(calls, pool.map(of, calls)))
    return {name: run for name, run in programs.items() if run is not None}


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
        (f"{name}, by Triton", partial(function, **TRITON), shapes)
        for name, (function, shapes) in ATTENTION.items()
        if for_hopper()
    ]
    with ThreadPoolExecutor(CORES) as pool:  # compiling takes most of the time
        rows = []
        for row in pool.map(_compare, cases):
            print(report.markdown([row]).splitlines()[-1], flush=True)
            rows.append(row)
    return rows


def _compare(case: tuple[str, Callable[..., Any], Any]) -> Row:
    """One kernel against the reference, or against XLA where logits are too many for that."""
    name, function, shapes = case
    row = {"kernel": name, "runs": "", "compared_with": "", DIFFERENCE: float("nan"), "failed": ""}
    try:
        lowered = jax.jit(function).lower(*shapes)
        text = lowered.as_text()
        row["runs"] = next((each for mark, each in RUNS.items() if mark in text), "XLA")
        program = lowered.compile()
        other = "reference" if _logits(shapes) <= WHOLE else "xla"
        own = jax.jit(partial(function, implementation=other)).lower(*shapes).compile()
        with RUNNING:
            operands = jax.jit(lambda: jax.tree.map(_example, shapes))()
            found, expected = jax.device_get((program(*operands), own(*operands)))
        row |= {"compared_with": other, DIFFERENCE: _difference(found, expected)}
        return row if row[DIFFERENCE] <= ALLOWED else row | {"failed": "other values"}
    except Exception as reason:  # what fails is told of all of them
        return row | {"failed": _first_line(reason)}


def _logits(shapes: Any) -> int:
    """How many logits queries and keys of attention have, which its reference holds."""
    if len(shapes) < 3 or shapes[0].ndim != 4:
        return 0
    batch, queries, heads, _ = shapes[0].shape
    return batch * heads * queries * shapes[1].shape[1]


def _difference(found: Any, expected: Any) -> float:
    """The largest difference as a share of the largest value; NaN stays NaN."""
    found, expected = (
        np.concatenate([np.asarray(leaf, np.float32).reshape(-1) for leaf in jax.tree.leaves(x)])
        for x in (found, expected)
    )
    return float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))


def _example(shape: Any) -> jax.Array:
    key = jax.random.key(sum(shape.shape))
    if shape.dtype == jnp.int32 and len(shape.shape) == 1:
        return jnp.full(shape.shape, 1000, jnp.int32)  # lengths, zero points
    if jnp.issubdtype(shape.dtype, jnp.integer):
        low, high = (0, 127) if shape.dtype == jnp.int32 else (-8, 8)
        return jax.random.randint(key, shape.shape, low, high).astype(shape.dtype)
    return jax.random.normal(key, shape.shape, jnp.float32).astype(shape.dtype)


def attention(tokens: int, width: int, repeats: int) -> list[Row]:
    """Dense and block-sparse attention against the fastest dense one."""
    operands = heads(tokens, width)
    programs = {f"dense, {name}": run for name, run in peers(operands).items()}
    densities = dict.fromkeys(programs, 1.0)
    calls: dict[str, tuple[Any, ...]] = {"dense, effjax": (dense_attention, *operands)}
    routes: dict[str, Any] = {"": {}}
    if for_hopper():
        calls["dense, effjax, by Triton"] = partial(dense_attention, **TRITON), *operands
        routes[", by Triton"] = TRITON
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
            calls[name] = partial(block_sparse_attention, mask=mask, **options), *operands
            densities[name] = shares[kind]
    for values in (None, "int8", "float8"):  # float8 not on older GPUs
        quantized = partial(quantized_attention, values=values)
        calls[f"int8 logits, {values or 'bfloat16'} values"] = quantized, *operands
    programs |= all_compiled(calls)
    seconds = best_seconds(programs, repeats, calls=20)
    fastest = min(t for name, t in seconds.items() if name.startswith("dense"))
    ours = seconds["dense, effjax"]
    return [
        {
            "tokens": tokens,
            "program": name,
            "milliseconds": 1e3 * taken,
            "density": densities.get(name, 1.0),
            "speed_up_over_our_dense": ours / taken,
            "speed_up_over_fastest_dense": fastest / taken,
            "share_of_ideal": densities.get(name, 1.0) * fastest / taken,
        }
        for name, taken in seconds.items()
    ]


def bandwidth(repeats: int, *, scale: int = 1) -> list[Row]:
    """Programs that read much and compute little, against a copy."""
    big = jnp.zeros((1 << 28) // scale, jnp.float32)
    batch, tokens, width = 8, 32768 // scale, 128
    shape = (batch, tokens, 8, width)
    k, v = (jax.random.normal(jax.random.key(each), shape, jnp.bfloat16) for each in (0, 4))
    q = jax.random.normal(jax.random.key(1), (batch, 1, 32, width), jnp.bfloat16)
    lengths = jnp.full(batch, tokens, jnp.int32)
    inputs, outputs = 8192, 28672 // scale
    weights = jax.random.randint(jax.random.key(2), (inputs, outputs), -8, 8).astype(jnp.int8)
    # Four layers to a call, so that no cache holds them and starting a call counts little.
    layers = [jax.tree.map(jnp.copy, pack(weights, bits=4)) for _ in range(4)]
    x = jax.random.normal(jax.random.key(3), (8, inputs), jnp.bfloat16)
    group = jnp.ones((inputs // 128, outputs), jnp.bfloat16)
    dense = jnp.zeros((inputs, outputs), jnp.bfloat16)

    def of_layers(x: jax.Array, layers: Any, scale: jax.Array) -> list[jax.Array]:
        return [_w4a16(x, planes, scale) for planes in layers]

    few = {f"W4A16, four layers, rows: {rows}": rows for rows in (1, 2, 4, 8)}
    programs = all_compiled(
        {
            "copy": (lambda x: x + 1, big),
            "decode attention": (decode_attention, q, k, v, lengths),
            "bfloat16 product, one row": (jnp.matmul, x[:1], dense),
        }
        | {name: (of_layers, x[:rows], layers, group) for name, rows in few.items()}
    )
    moved = {
        "copy": 2 * big.nbytes,
        "decode attention": 2 * k.nbytes,
        "bfloat16 product, one row": dense.nbytes,
    } | dict.fromkeys(few, len(layers) * weights.size // 2 + group.nbytes)
    seconds = best_seconds(programs, repeats, calls=20)
    copied = moved["copy"] / seconds["copy"]
    return [
        {
            "program": name,
            "microseconds": 1e6 * taken,
            "GB_per_second": moved[name] / taken / 1e9,
            "share_of_copy": moved[name] / taken / copied,
        }
        for name, taken in seconds.items()
    ]


def _w8a8(x: jax.Array, w: jax.Array, x_scale: jax.Array, w_scale: jax.Array, **options: Any):
    scales = {"x_scale": x_scale, "w_scale": w_scale}
    return int8_matmul(x, w, **scales, out_dtype=jnp.bfloat16, **options)


def _w4a16(x: jax.Array, planes: Any, scale: jax.Array, **options: Any) -> jax.Array:
    return packed_matmul(x, planes, bits=4, group_size=128, scale=scale, **options)


def products(repeats: int, *, scale: int = 1) -> list[Row]:
    """Products of many rows, by quantized values against bfloat16."""
    rows = []
    for m, k, n in ((4096, 1152, 4608), (4096, 4096, 14336)):
        m, n = m // scale, n // scale
        keys = jax.random.split(jax.random.key(0), 2)
        x, w = (jax.random.normal(key, shape) for key, shape in zip(keys, ((m, k), (k, n))))
        halves = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
        qvalues = [jnp.clip(jnp.round(each * 32), -127, 127).astype(jnp.int8) for each in (x, w)]
        scales = jnp.ones((m, 1)) / 32, jnp.ones(n) / 32
        packed = pack(qvalues[1] >> 4, bits=4), jnp.ones((k // 128, n), jnp.bfloat16)
        programs = all_compiled(
            {
                "bfloat16": (jnp.matmul, *halves),
                "W8A8": (_w8a8, *qvalues, *scales),
                "W8A8, by XLA": (partial(_w8a8, implementation="xla"), *qvalues, *scales),
                "W4A16": (_w4a16, halves[0], *packed),
                "W4A16, by XLA": (partial(_w4a16, implementation="xla"), halves[0], *packed),
            }
        )
        seconds = best_seconds(programs, repeats, calls=20)
        rows += [
            {
                "product": f"{m} x {k} x {n}",
                "program": name,
                "microseconds": 1e6 * taken,
                "T_per_second": 2 * m * k * n / taken / 1e12,
                "speed_up_over_bfloat16": seconds["bfloat16"] / taken,
            }
            for name, taken in seconds.items()
        ]
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="4096,16384,65536")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--width", type=int, default=WIDTH, help="of attention's heads")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to run, of the default")
    parser.add_argument(
        "--scale", type=int, default=1, help="divides sizes of the parts memory and windows"
    )
    arguments = parser.parse_args(argv)
    tables: dict[str, list[Row]] = {}

    device, command = jax.devices()[0], "python -m experiments.kernels.gpu"

    def add(table: str, rows: list[Row]) -> None:
        tables.setdefault(table, []).extend(rows)
        print(report.markdown(rows), flush=True)
        report.write(
            f"kernels_{device.platform}",
            title=f"Kernels on {device.device_kind}",
            command=" ".join(
                [command, *(f"--{name} {value}" for name, value in vars(arguments).items())]
            ),
            **tables,
        )

    parts, scale = arguments.parts.split(","), arguments.scale
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if "products" in parts:
        add("products", products(arguments.repeats, scale=scale))
    if "memory" in parts:
        add("programs_bound_by_memory", bandwidth(arguments.repeats, scale=scale))
    for tokens in map(int, arguments.tokens.split(",")) if "attention" in parts else ():
        add("attention", attention(tokens, arguments.width, arguments.repeats))
    for model in arrow.MODELS if "windows" in parts else ():
        add(
            "windows_by_head", arrow.rows(model, 4096 // scale, 24, arguments.repeats, jnp.bfloat16)
        )
    failed = []
    if "check" in parts:
        rows = check()
        print(report.markdown(rows), flush=True)
        report.write(
            f"kernels_{device.platform}_values",
            title=f"Values of kernels on {device.device_kind}",
            command=f"{command} --parts check",
            against_the_reference=rows,
        )
        failed = [row["kernel"] for row in rows if row["failed"]]
    if failed:
        raise SystemExit(f"these kernels fail: {', '.join(failed)}")


if __name__ == "__main__":
    main()
