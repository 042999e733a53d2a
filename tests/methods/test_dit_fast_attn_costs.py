"""Counted costs of DiTFastAttn at the sizes of DiT-XL/2-512, exactly as the closed forms say."""

from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from effjax.cost import cost, sampler_cost
from effjax.forward import abstract
from effjax.guidance import Guidance
from effjax.methods.attention.dit_fast_attn import (
    DiTFastAttnPlan,
    Strategy,
    attention_macs,
    transform,
)
from effjax.models.dit import DiT, DiTConfig
from effjax.samplers import DDIM, Sampler
from experiments.plan_speed import synthetic_plan
from pallas_kernels.block_mask import Band, block_mask

FULL, AST, WARS_ASC, WARS, FULL_ASC = Strategy
BATCH, TOKENS, WINDOW, LAYERS = 2, 1024, 128, 2


@pytest.fixture(scope="module")
def model():
    return abstract(DiT, DiTConfig.preset("DiT-XL/2", sample_size=64, num_layers=LAYERS))


def inputs():
    shapes = ((BATCH, 64, 64, 4), jnp.float32), ((BATCH,), jnp.float32), ((BATCH,), jnp.int32)
    return [jax.ShapeDtypeStruct(*shape) for shape in shapes]


def call(model, strategy=None, *, then=FULL, platform="cpu"):
    """Cost of one guided network call with one strategy in every layer, and of what it caches."""
    forward, params = model
    state = {}
    step = 0
    if strategy is not None:
        strategies = ((int(FULL), int(strategy), int(then)),) * LAYERS
        plan = DiTFastAttnPlan(strategies=strategies, tokens=TOKENS, window=WINDOW)
        forward, params = transform(plan)(forward, params)
        initial = partial(forward.init, guidance=Guidance())
        state, step = jax.eval_shape(initial, params, *inputs()), 1
    network = partial(forward, step=step, guidance=Guidance())
    return cost(network, params, state, *inputs(), platform=platform)


@pytest.fixture(scope="module")
def dense(model):
    return call(model)


def test_the_dense_model(model, dense):
    config = model[0].config
    assert (config.tokens, config.hidden_size) == (TOKENS, 1152)
    assert dense.scope("attention").flops == LAYERS * 2 * 2 * BATCH * TOKENS**2 * config.hidden_size


@pytest.mark.parametrize(
    ("strategy", "then", "share"),
    [
        (FULL, FULL, lambda beta: 1),
        (FULL, WARS, lambda beta: 1 + beta),
        (AST, FULL, lambda beta: 0),
        (WARS, FULL, lambda beta: beta),
        (WARS_ASC, FULL, lambda beta: beta / 2),
        (FULL_ASC, FULL, lambda beta: Fraction(1, 2)),
        (FULL_ASC, WARS, lambda beta: (1 + beta) / 2),
    ],
)
def test_every_strategy_costs_its_closed_form(model, dense, strategy, then, share):
    area = (2 * WINDOW + 1) * TOKENS - WINDOW * (WINDOW + 1)
    beta = Fraction(area, TOKENS**2)
    assert float(beta) == pytest.approx(0.2352, abs=5e-5)
    counted = call(model, strategy, then=then).scope("attention")
    full = dense.scope("attention").flops
    assert counted.useful_flops == full * share(beta)
    # Executed: the blocks that are visited, in the place of the window's own area.
    visited = block_mask(Band(WINDOW), TOKENS, block=(64, 32)).visited * 64 * 32
    assert counted.flops == full * share(Fraction(visited, TOKENS**2))


@pytest.mark.parametrize(("platform", "block"), [("tpu", 128), ("cuda", 64)])
def test_kernels_refresh_the_residual_in_one_pass(model, platform, block):
    dense = call(model, platform=platform).scope("attention")
    both = call(model, FULL, then=WARS, platform=platform).scope("attention")
    assert both.useful_flops == dense.useful_flops
    # Logits are shared, and only blocks that the window cuts meet the values twice.
    mask = block_mask(Band(WINDOW), TOKENS, block=block)
    cut = int((mask.count - mask.full).sum()) * block**2
    assert both.flops == dense.flops * (1 + Fraction(cut, 2 * TOKENS**2))


def test_the_layer_ratio_of_a_window(model, dense):
    """(4 C + 2 N beta) / (4 C + 2 N), projections included."""
    area = (2 * WINDOW + 1) * TOKENS - WINDOW * (WINDOW + 1)
    beta, width = Fraction(area, TOKENS**2), 1152
    attention = dense.scope("attention").useful_flops
    layer = attention + LAYERS * 2 * 4 * BATCH * TOKENS * width**2
    saved = dense.useful_flops - call(model, WARS).useful_flops
    expected = (4 * width + 2 * TOKENS * beta) / (4 * width + 2 * TOKENS)
    assert Fraction(layer - saved, layer) == expected


def test_projections_are_skipped_or_halved(model, dense):
    projections = LAYERS * 2 * 4 * BATCH * TOKENS * 1152**2
    for strategy, left in ((AST, 0), (FULL_ASC, Fraction(1, 2))):
        compressed = call(model, strategy)
        rest = dense.flops - dense.scope("attention").flops - projections
        other = compressed.flops - compressed.scope("attention").flops - rest
        assert other == projections * left


def test_the_total_of_a_synthetic_plan():
    layers = 8  # after which the plan's rows repeat
    model = abstract(DiT, DiTConfig.preset("DiT-XL/2", sample_size=64, num_layers=layers))
    sampler = Sampler(DDIM(steps=12), guidance=4.0)
    plan = synthetic_plan(layers, 12, TOKENS)
    assert {value for row in plan.strategies for value in row} == set(map(int, Strategy))
    forward, params = transform(plan)(*model)
    columns = list(zip(zip(*plan.strategies), zip(*plan.need)))
    label = jax.ShapeDtypeStruct((1,), jnp.int32)
    counted = sampler_cost(sampler, forward, params, label, distinct=columns.__getitem__)
    closed = attention_macs(plan, batch=2, width=1152).sum()
    assert counted.scope("attention").useful_flops == 2 * closed
