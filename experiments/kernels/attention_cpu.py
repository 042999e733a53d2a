"""Block-sparse attention on a CPU against the fastest dense attention of the same run.

    python -m experiments.kernels.attention_cpu

16 heads of 64, float32: bands, and lists of random blocks for each head, at densities from one half
down. Dense: ours, `jax.nn.dot_product_attention` (while its logits fit in memory) and, if torch is
installed, its `scaled_dot_product_attention`. Programs alternate; times are the best of each, so
that a pause of the machine hits none of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from experiments import report
from experiments.kernels.timing import best_seconds
from pallas_kernels.attention import dense_attention
from pallas_kernels.block_mask import Band, BlockMask, block_mask, from_map
from pallas_kernels.block_sparse_attention import block_sparse_attention

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


def dense_programs(operands: tuple[jax.Array, ...]) -> dict[str, Callable[[], Any]]:
    """Everything that computes dense attention here."""
    compiled = jax.jit(dense_attention).lower(*operands).compile()
    programs: dict[str, Callable[[], Any]] = {"effjax": partial(compiled, *operands)}
    tokens = operands[0].shape[1]
    if HEADS * tokens**2 <= MOST_LOGITS:
        theirs = jax.jit(jax.nn.dot_product_attention).lower(*operands).compile()
        programs["jax.nn"] = partial(theirs, *operands)
    try:
        import torch
    except ModuleNotFoundError:
        return programs
    dtype = getattr(torch, operands[0].dtype.name)
    tensors = [torch.tensor(np.array(x.swapaxes(1, 2), np.float32)).to(dtype) for x in operands]
    programs["torch"] = lambda: torch.nn.functional.scaled_dot_product_attention(*tensors)
    return programs


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="4096,16384")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--block", type=int, default=128, help="of the random lists")
    arguments = parser.parse_args(argv)
    rows = []
    for tokens in map(int, arguments.tokens.split(",")):
        keys = jax.random.split(jax.random.key(tokens), 3)
        operands = tuple(jax.random.normal(key, (1, tokens, HEADS, WIDTH)) for key in keys)
        programs = {f"dense, {name}": run for name, run in dense_programs(operands).items()}
        densities = {}
        for one_in in DENSITIES:
            own = block_mask(band(tokens, one_in), tokens).seen
            for name, mask, density in (
                (f"band, 1 in {one_in}", band(tokens, one_in), own / tokens**2),
                (
                    f"random, 1 in {one_in}",
                    random_blocks(tokens, one_in, arguments.block),
                    1 / one_in,
                ),
            ):
                attend = jax.jit(partial(block_sparse_attention, mask=mask))
                compiled = attend.lower(*operands).compile()
                programs[name] = partial(compiled, *operands)
                densities[name] = density
        seconds = best_seconds(programs, arguments.repeats)
        fastest = min(t for name, t in seconds.items() if name.startswith("dense"))
        for name, taken in seconds.items():
            density = densities.get(name, 1.0)
            rows.append(
                {
                    "tokens": tokens,
                    "program": name,
                    "seconds": taken,
                    "density": density,
                    "speed_up_over_fastest_dense": fastest / taken,
                    "share_of_ideal": density * fastest / taken,
                }
            )
        print(report.markdown(rows), flush=True)
    report.write(
        "kernels_attention_cpu",
        title="Block-sparse attention on a CPU",
        command=f"python -m experiments.kernels.attention_cpu --tokens {arguments.tokens} "
        f"--repeats {arguments.repeats} --block {arguments.block}",
        block_sparse_against_the_fastest_dense=rows,
    )


if __name__ == "__main__":
    main()
