"""Distilled Decoding: the flow map, pairs, students, sampling in few steps, the pipeline."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.autoregression import FlowSolver, flow_map
from effjax.autoregression.flow_map import posterior_mean
from effjax.generate import Sampling, process_logits

# --- the flow map -------------------------------------------------------------------------------


def log(p, rows):
    return jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (rows, len(p)))


@jax.jit
def mean(x, t, logits, codes):
    return [posterior_mean(x, t, logits, codes, tile) for tile in (None, 3)]


def test_the_velocity_is_that_of_the_formula():
    """D(x, t) by its definition in float64; tiles of the codebook, the last one not full."""
    rng = np.random.default_rng(0)
    codes, x = rng.normal(size=(10, 4)), rng.normal(size=(6, 4))
    p = rng.dirichlet(np.ones(10), size=6)
    p[:, :4] = 0  # a whole tile is left out
    for t in (0.0, 0.3, 0.9):
        distances = np.square(x[:, None] - t * codes).sum(-1)
        w = p * np.exp(-distances / (2 * (1 - t) ** 2))
        wanted = (w / w.sum(-1, keepdims=True)) @ codes
        with np.errstate(divide="ignore"):
            given = x, t, np.log(p), codes
        for got in mean(*(jnp.asarray(each, jnp.float32) for each in given)):
            chex.assert_trees_all_close(got, wanted.astype(np.float32), atol=2e-5)


def test_the_map_is_the_inverse_of_the_cumulative_distribution():
    """In one dimension: what noise takes the code of its quantile, by solver and steps."""
    rng = np.random.default_rng(0)
    codes, p = np.sort(rng.normal(size=8)), rng.dirichlet(np.ones(8))
    noise = np.sort(rng.normal(size=20_000))
    quantiles = np.array([0.5 * math.erfc(-e / math.sqrt(2)) for e in noise])
    wanted = np.searchsorted(np.cumsum(p)[:-1], quantiles)
    noise, codes = (jnp.asarray(each[:, None], jnp.float32) for each in (noise, codes))
    solvers = FlowSolver("euler", 50), FlowSolver("euler", 200), FlowSolver("2m", 50)
    for solver, share in zip(solvers, (0.974, 0.993, 0.997)):
        solve = jax.jit(flow_map, static_argnums=3)
        tokens, x = solve(noise, log(p, len(noise)), codes, solver)
        assert np.mean(np.asarray(tokens) == wanted) == pytest.approx(share, abs=2e-3)
        assert (np.diff(tokens) >= 0).all()
        # Nearly all noise ends on a code.
        assert float(jnp.mean(jnp.abs(x - codes[tokens]) < 1e-3)) > 0.99


def test_tokens_are_distributed_as_the_law_says():
    rng = np.random.default_rng(1)
    codes, p = rng.normal(size=(16, 4)), rng.dirichlet(np.ones(16))
    noise, codes = rng.normal(size=(40_000, 4)), jnp.asarray(codes, jnp.float32)
    tokens, _ = jax.jit(flow_map)(jnp.asarray(noise, jnp.float32), log(p, 40_000), codes)
    distance = 0.5 * np.abs(np.bincount(tokens, minlength=16) / 40_000 - p).sum()
    independent = 0.5 * np.sqrt(2 / np.pi * p * (1 - p) / 40_000).sum()  # expected of such draws
    assert distance < 2 * independent < 0.02


def test_codes_that_are_left_out_are_never_taken():
    """Top-k and top-p give probabilities of zero; one code that is left takes all noise."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(64, 12)), jnp.float32)
    noise, codes = (jnp.asarray(rng.normal(size=(n, 3)), jnp.float32) for n in (64, 12))
    some = process_logits(logits, Sampling(top_k=4, top_p=0.7))
    one = process_logits(logits, Sampling(top_k=1))
    for tile in (None, 5):
        solve = jax.jit(lambda x, law, tile=tile: flow_map(x, law, codes, FlowSolver(tile=tile)))
        tokens, x = solve(noise, some)
        chex.assert_tree_all_finite(x)
        assert jnp.isfinite(some[jnp.arange(64), tokens]).all()
        assert (tokens != one.argmax(-1)).any()  # not the likeliest code
        chex.assert_trees_all_equal(solve(noise, one)[0], one.argmax(-1).astype(jnp.int32))
    # Leading axes are kept, and noise may be as far out as it likes.
    tokens, x = flow_map(100 * noise.reshape(4, 16, 3), some.reshape(4, 16, 12), codes)
    assert (tokens.shape, x.shape) == ((4, 16), (4, 16, 3))


def test_what_does_not_belong_together_is_refused(untyped):
    noise, logits, codes = jnp.zeros((4, 2)), jnp.zeros((4, 12)), jnp.zeros((12, 3))
    with pytest.raises(ValueError, match=r"belong together; got \[4, 2\], \[4, 12\] and \[12, 3\]"):
        flow_map(noise, logits, codes)
    for name, wrong in {"steps": 0, "kind": "heun", "tile": 0}.items():
        with pytest.raises(ValueError, match=f"FlowSolver: {name} must be"):
            dataclasses.replace(FlowSolver(), **{name: wrong})
