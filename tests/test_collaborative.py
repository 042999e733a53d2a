"""CoDe: two models in one loop, costs in closed form, pipelines, commands, errors."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax
from effjax import testing
from effjax.autoregression import (
    Collaborative,
    FlowSolver,
    MappedScales,
    NextScale,
    call_flops,
    peak_cache,
    teacher_forced,
)
from effjax.cli import main
from effjax.cost import sampler_cost, state_bytes
from effjax.forward import abstract
from effjax.layers.scales import Scales, token_starts
from effjax.methods import litevar, round_to_nearest
from effjax.models.var import VAR, VARConfig
from effjax.pipelines import NextScalePipeline

SIDES = (1, 2, 3)
STARTS = token_starts(SIDES)


@pytest.fixture(scope="module")
def subject():
    return testing.tiny_var()


@pytest.fixture(scope="module")
def refiner():
    """A narrower model of one layer."""
    forward, shapes = abstract(
        VAR, dataclasses.replace(testing.tiny_var().forward.config, num_layers=1)
    )
    return forward, testing.random_params(shapes, seed=7)


def joined(loop, refiner, draft_scales, **changes):
    own = {field.name: getattr(loop, field.name) for field in dataclasses.fields(NextScale)}
    return Collaborative(**own | changes, refiner=refiner, draft_scales=draft_scales)


@jax.jit
def outputs(loop, forward, params, cond):
    """The guided logits of every call, and the last carry."""
    uncond = loop.unconditional(forward, cond)
    carry, found = loop.init(forward, params, cond, jax.random.key(0)), []
    for scale in range(loop.calls):
        given = carry.state, carry.x, cond, uncond, scale
        out, _, state = loop.network(forward, params, *given)
        carry = loop.update(carry._replace(state=state), out, scale)
        found.append(out)
    return found, carry


def test_a_model_that_refines_itself_is_the_model(subject):
    pair = subject.forward, subject.params
    wanted, plain = outputs(subject.sampler, *pair, subject.cond)
    for drafts in (1, 2, 3):
        # Nothing is left to refine after all scales: the refiner is not asked.
        params = jax.tree.map(lambda leaf: leaf * jnp.nan, pair[1]) if drafts == 3 else pair[1]
        loop = joined(subject.sampler, (pair[0], params), drafts)
        found, carry = outputs(loop, *pair, subject.cond)
        chex.assert_trees_all_close(found, wanted, atol=1e-4)
        chex.assert_trees_all_equal(carry.memory, plain.memory)
        assert type(loop.alone) is NextScale
    loop = joined(subject.sampler, pair, 2)
    x, tokens = loop.stepwise(*pair, subject.cond, jax.random.key(0))
    chex.assert_trees_all_equal(tokens, plain.memory)
    chex.assert_trees_all_close(x, plain.x, atol=1e-5)


def test_the_refiner_reads_the_draft(subject, refiner):
    """Its logits are those of reading all tokens at once; the draft is the drafter's."""
    pair, loop = (subject.forward, subject.params), joined(subject.sampler, refiner, 1)
    found, carry = outputs(loop, *pair, subject.cond)
    _, plain = outputs(subject.sampler, *pair, subject.cond)
    chex.assert_trees_all_equal(carry.memory[:, :1], plain.memory[:, :1])
    none = jnp.full_like(subject.cond, subject.forward.config.num_classes)
    cond, uncond = (
        jax.jit(teacher_forced)(*refiner, loop.vae, carry.memory, labels)
        for labels in (subject.cond, none)
    )
    for scale in (1, 2):  # guidance goes by the place among all scales
        t, own = 2.0 * scale / 2, slice(STARTS[scale], STARTS[scale + 1])
        guided = (1 + t) * cond[:, own] - t * uncond[:, own]
        chex.assert_trees_all_close(found[scale], guided, atol=1e-4)
    # Mixed codes are no tokens: what was drafted is kept as it was read.
    smooth = joined(subject.sampler, pair, 2, more_smooth=True)
    mixed, _ = outputs(smooth, *pair, subject.cond)
    wanted, _ = outputs(smooth.alone, *pair, subject.cond)
    chex.assert_trees_all_close(mixed, wanted, atol=1e-4)


@pytest.mark.parametrize("drafts", [1, 2])
def test_costs_are_those_of_the_formulas(subject, refiner, drafts):
    loop = joined(subject.sampler, refiner, drafts)
    cost = sampler_cost(loop, subject.forward, subject.params, subject.cond[:1])
    drafter, second = subject.forward.config, refiner[0].config
    calls = [call_flops(drafter, Scales(SIDES, i, i + 1)) for i in range(drafts)]
    calls.append(call_flops(second, Scales(SIDES, 0, drafts + 1, wanted=drafts)))
    calls += [call_flops(second, Scales(SIDES, i, i + 1)) for i in range(drafts + 1, 3)]
    averages = sum(2 * p * 3 * (3 + p) * 4 for p in SIDES[:-1])
    assert sum(part.useful_flops for part in cost.scopes) == sum(calls) + averages
    # Caches: the drafter's end where its draft does, and are gone when the refiner's are there.
    carry = loop.init(subject.forward, subject.params, subject.cond[:1], jax.random.key(0))
    states = [carry.state]
    uncond = loop.unconditional(subject.forward, subject.cond[:1])
    for scale in range(3):
        given = subject.forward, subject.params, carry, subject.cond[:1], uncond
        carry = jax.eval_shape(lambda *given, scale=scale: loop.step(*given, scale), *given)
        states.append(carry.state)
    held = [
        state_bytes({name: leaf for name, leaf in state.items() if ".core." in name}) // 4
        for state in states
    ]
    own = 4 * STARTS[drafts] * 16 * 2
    assert held[: drafts + 1] == [own] * (drafts + 1)
    handed = jax.eval_shape(lambda state: loop.handed(state, drafts), states[drafts])
    assert set(handed) == {"drafted_codes"}
    assert held[drafts + 1 :] == [4 * STARTS[-1] * 16] * (3 - drafts)
    assert peak_cache(drafter, second, drafts) == max(held)


def test_the_paper_s_pair():
    drafter, refiner = VARConfig.preset("d30"), VARConfig.preset("d16")
    sides = drafter.patch_nums
    pairs = [side**2 * end for side, end in zip(sides, token_starts(sides)[1:])]
    assert (sum(pairs[:8]), sum(pairs), token_starts(sides)[8]) == (40_698, 286_434, 255)
    whole = sum(call_flops(drafter, Scales(sides, i, i + 1)) for i in range(10))
    assert whole / 1e9 == pytest.approx(3609.723 + 131.989 + 21.391, rel=2e-3)
    drafted = sum(call_flops(drafter, Scales(sides, i, i + 1)) for i in range(8))
    refined = call_flops(refiner, Scales(sides, 0, 9, wanted=8))
    refined += call_flops(refiner, Scales(sides, 9, 10))
    assert (drafted + refined) / whole == pytest.approx(0.525, abs=0.002)
    large = 255 * 1920 * 30, 680 * 1024 * 16
    assert peak_cache(drafter, refiner, 8) == 4 * max(large) == 4 * large[0]
    assert peak_cache(drafter, refiner, 6) == 4 * large[1]
    assert peak_cache(drafter, refiner, 10) == 4 * 680 * 1920 * 30


def test_pipelines_and_commands(subject, refiner, tmp_path, capsys):
    pipe = NextScalePipeline(subject.forward, subject.params, subject.sampler.vae)
    small = NextScalePipeline(*refiner, subject.sampler.vae)
    pipe.save(tmp_path / "large")
    small.save(tmp_path / "small")
    assert "refiner" not in json.loads((tmp_path / "large" / "model_index.json").read_text())
    both = pipe.with_refiner(small)
    options = {"key": jax.random.key(3), "output_type": "tokens", "progress": False}
    plain, drafted = pipe([1, 4], **options), both([1, 4], **options)
    chex.assert_trees_all_equal(drafted[:, :1], plain[:, :1])
    assert (drafted != plain).any()  # two of three scales are the refiner's
    chex.assert_trees_all_equal(both([1, 4], draft_scales=3, **options), plain)
    both.save(tmp_path / "both")
    again = effjax.pipeline(tmp_path / "both", progress=False)
    assert again.refiner[0] == refiner[0]
    chex.assert_trees_all_equal(again([1, 4], **options), drafted)
    given = effjax.pipeline(tmp_path / "large", refiner=refiner, progress=False)
    chex.assert_trees_all_equal(given.refiner[1], refiner[1])

    words = ["--labels", "1", "--guidance", "2"]
    asked = ["sample", str(tmp_path / "large"), *words, "-o", str(tmp_path / "images")]
    assert main([*asked, "--refiner", str(tmp_path / "small"), "--draft-scales", "2"]) == 0
    assert main([*asked, "--draft-scales", "2"]) == 1
    assert "this pipeline has no refiner" in capsys.readouterr().err
    bench = ["bench", str(tmp_path / "both"), *words, "--batch", "1", "--repeats", "1", "--json"]
    assert main(bench) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["ratio"]["weight_bytes"] > 1 > figures["ratio"]["flops"]
    assert main(["info", str(tmp_path / "both")]) == 0
    assert "refiner: VAR" in capsys.readouterr().out

    # Each model takes methods of its own.
    rounded = small.transform(round_to_nearest.transform(round_to_nearest.uniform(8)))
    shared = pipe.transform(litevar.transform(litevar.uniform(SIDES, layers=2, heads=2)))
    latents = shared.with_refiner(rounded)([1], **options | {"output_type": "latent"})
    chex.assert_tree_all_finite(latents)


def test_errors(subject, refiner):
    pipe = NextScalePipeline(subject.forward, subject.params, subject.sampler.vae)
    both, key = pipe.with_refiner(refiner), jax.random.key(0)
    with pytest.raises(
        ValueError, match="draft_scales must be a whole number of at least 1, got 0"
    ):
        both([1], key=key, draft_scales=0)
    with pytest.raises(ValueError, match=r"draft_scales must be 1 \.\.\. 3, .*got 4"):
        both([1], key=key, draft_scales=4)
    for wrong, message in (("var-d16", "got a str"), (both, "the refiner has a refiner itself")):
        with pytest.raises(ValueError, match=message):
            pipe.with_refiner(wrong)
    with pytest.raises(ValueError, match="are drawn by two: sample without a refiner"):
        MappedScales.of(both.sampler(), FlowSolver())
    for options, message in (
        ({"num_classes": 7}, "the drafter knows 5 classes, and the refiner 7"),
        ({"patch_nums": (1, 3)}, "the refiner does not fit: the model has maps of the sides"),
        ({"vocab_size": 30}, "the refiner does not fit: the VQVAE has 40 codes"),
    ):
        other = testing.tiny_var(**options)
        with pytest.raises(ValueError, match=message):
            pipe.with_refiner((other.forward, other.params))
    with pytest.raises(ValueError, match="some are wanted, and all are kept"):
        Scales(SIDES, 1, 3, kept=2)
    assert np.array_equal(pipe.with_refiner(None).patch_nums, SIDES)
