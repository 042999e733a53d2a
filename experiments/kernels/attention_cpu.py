"""Block-sparse attention on a CPU against the fastest dense attention of the same run.

    python -m experiments.kernels.attention_cpu

First table, the heads below by dtype: dense, sparse, and one query against a cache. Second: the
attention of a tiny DiT (64 rows of 256 tokens, 4 heads of 32), a window of an eighth to each side,
and both in one pass. Third, in float32: bands, and lists of random blocks for each head, at
densities from one half down, against the fastest dense attention. That is ours,
`jax.nn.dot_product_attention` (while its logits fit in memory) or, if torch is installed, its
`scaled_dot_product_attention`. Programs alternate; times are the best of each, so that a pause of
the machine hits none of them. `--quick` is small, and writes nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from experiments import report
from experiments.kernels.timing import best_seconds
from pallas_kernels.attention import dense_attention
from pallas_kernels.block_mask import Band, BlockMask, block_mask, from_map
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.residual_attention import dense_and_sparse_attention

HEADS, WIDTH = 16, 64
DENSITIES = (2, 4, 8, 16)  # one in
MOST_LOGITS = 1 << 29  # of `jax.nn`: 2 GiB


def band(tokens: int, one_in: int) -> Band:
    """A band that shows about one key in so many."""
    return Band(tokens // one_in // 2)


def random_blocks(tokens: int, one_in: int, block: int) -> BlockMask:
    """Every head and block of queries visits its own random blocks."""
    rng = np.random.default_rng(0)
    blocks = -(-tokens // block)
    ranks = rng.random((HEADS, blocks, blocks)).argsort(-1)
    return from_map(ranks < blocks // one_in, tokens, block=block)


def torch_attention(operands: Sequence[jax.Array]) -> Callable[[], Any] | None:
    """torch's attention to the same operands, if it is installed and both run on the CPU."""
    if jax.default_backend() != "cpu":
        return None
    try:
        import torch
    except ModuleNotFoundError:
        return None
    dtype = getattr(torch, operands[0].dtype.name)
    heads = [np.array(x.swapaxes(1, 2).astype(np.float32)) for x in operands]
    tensors = [torch.tensor(x).to(dtype) for x in heads]
    return lambda: torch.nn.functional.scaled_dot_product_attention(*tensors)


def compiled(function: Callable[..., Any], *operands: Any) -> Callable[[], Any]:
    """A call of a jitted function."""
    return partial(jax.jit(function).lower(*operands).compile(), *operands)


def dense_programs(operands: tuple[jax.Array, ...]) -> dict[str, Callable[[], Any]]:
    """Everything that computes dense attention here."""
    programs = {"effjax": compiled(dense_attention, *operands)}
    if HEADS * operands[0].shape[1] ** 2 <= MOST_LOGITS:
        programs["jax.nn"] = compiled(jax.nn.dot_product_attention, *operands)
    if theirs := torch_attention(operands):
        programs["torch"] = theirs
    return programs


def by_density(tokens: int, repeats: int, block: int) -> report.Rows:
    """Block-sparse attention against the fastest dense attention."""
    keys = jax.random.split(jax.random.key(tokens), 3)
    operands = tuple(jax.random.normal(key, (1, tokens, HEADS, WIDTH)) for key in keys)
    programs = {f"dense, {name}": run for name, run in dense_programs(operands).items()}
    densities = {}
    for one_in in DENSITIES:
        own = block_mask(band(tokens, one_in), tokens).seen
        for name, mask, density in (
            (f"band, 1 in {one_in}", band(tokens, one_in), own / tokens**2),
            (f"random, 1 in {one_in}", random_blocks(tokens, one_in, block), 1 / one_in),
        ):
            programs[name] = compiled(partial(block_sparse_attention, mask=mask), *operands)
            densities[name] = density
    seconds = best_seconds(programs, repeats)
    fastest = min(t for name, t in seconds.items() if name.startswith("dense"))
    return [
        {
            "tokens": tokens,
            "program": name,
            "seconds": taken,
            "density": densities.get(name, 1.0),
            "speed_up_over_fastest_dense": fastest / taken,
            "share_of_ideal": densities.get(name, 1.0) * fastest / taken,
        }
        for name, taken in seconds.items()
    ]


def by_dtype(tokens: int, repeats: int, block: int) -> report.Rows:
    """Attention to keys of 32 and 16 bits, and torch's where it has the same."""
    programs: dict[tuple[str, str], Callable[[], Any]] = {}
    one_in = min(8, DENSITIES[-1])
    for dtype in ("float32", "bfloat16", "float16"):
        keys = jax.random.split(jax.random.key(tokens), 3)
        operands = [jax.random.normal(key, (1, tokens, HEADS, WIDTH), dtype) for key in keys]
        first = [operands[0][:, :1], *operands[1:]]
        lengths = jax.numpy.full(1, tokens)
        masks = {"band": band(tokens, one_in), "random": random_blocks(tokens, one_in, block)}
        programs["dense", dtype] = compiled(dense_attention, *operands)
        programs["one query", dtype] = compiled(decode_attention, *first, lengths)
        for name, mask in masks.items():
            attend = partial(block_sparse_attention, mask=mask)
            programs[f"{name}, 1 in {one_in}", dtype] = compiled(attend, *operands)
        for name, own in (("dense", operands), ("one query", first)):
            if theirs := torch_attention(own):
                programs[f"{name}, torch", dtype] = theirs
    seconds = best_seconds(programs, repeats)
    return [
        {
            "tokens": tokens,
            "program": name,
            "dtype": dtype,
            "seconds": taken,
            "of_float32": taken / seconds[name, "float32"],
            "of_torch": taken / theirs
            if (theirs := seconds.get((f"{name}, torch", dtype)))
            else "",
        }
        for (name, dtype), taken in seconds.items()
    ]


def of_a_tiny_model(batch: int, repeats: int) -> report.Rows:
    """What DiTFastAttn calls in the bundled DiT, as shares of its dense attention."""
    keys = jax.random.split(jax.random.key(0), 3)
    operands = [jax.random.normal(key, (batch, 256, 4, 32)) for key in keys]
    window = Band(32)
    programs = {
        "dense": compiled(dense_attention, *operands),
        "window": compiled(partial(block_sparse_attention, mask=window), *operands),
        "both": compiled(partial(dense_and_sparse_attention, rule=window), *operands),
    }
    seconds = best_seconds(programs, repeats)
    return [
        {"program": name, "seconds": taken, "of_dense": taken / seconds["dense"]}
        for name, taken in seconds.items()
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="4096,16384")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--block", type=int, default=128, help="of the random lists")
    parser.add_argument("--quick", action="store_true", help="small sizes; no results are written")
    arguments = parser.parse_args(argv)
    repeats = arguments.repeats
    block = 32 if arguments.quick else arguments.block
    sizes = [512] if arguments.quick else list(map(int, arguments.tokens.split(",")))
    tables: dict[str, report.Rows] = {
        "by_dtype": by_dtype(sizes[0], repeats, block),
        "of_a_tiny_model": of_a_tiny_model(8 if arguments.quick else 64, 5 * repeats),
        "block_sparse_against_the_fastest_dense": [],
    }
    for tokens in sizes:
        tables["block_sparse_against_the_fastest_dense"] += by_density(tokens, repeats, block)
    for rows in tables.values():
        print(report.markdown(rows), end="\n\n", flush=True)
    if not arguments.quick:
        report.write(
            "kernels_attention_cpu",
            title="Attention on a CPU",
            command=f"python -m experiments.kernels.attention_cpu --tokens {arguments.tokens} "
            f"--repeats {repeats} --block {block}",
            **tables,
        )


if __name__ == "__main__":
    main()
