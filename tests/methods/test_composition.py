"""Methods of different kinds on one model: they compose to closed-form cost, or refuse by name."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import pytest

import effjax
from effjax import testing
from effjax.cost import sampler_cost
from effjax.guidance import Guidance
from effjax.methods import dit_fast_attn, kivi, knorm, round_to_nearest, vidit_q
from effjax.methods.attention.dit_fast_attn import Strategy, uniform
from effjax.samplers import DDIM, Sampler
from pallas_kernels import use_implementation
from tests.subjects import first_block_cache, step_cache, token_merging
from tests.subjects.joint import tiny_joint

CALLS = 3  # a first, one in between and a last
NEVER, ALWAYS = 1e6, 0.0  # thresholds of step caches


@functools.cache
def shared(tokens):
    """Attention in the first call alone."""
    return dit_fast_attn.transform(uniform((Strategy.AST,), layers=2, calls=CALLS, tokens=tokens))


@functools.cache
def windowed(tokens):
    return dit_fast_attn.transform(uniform((Strategy.WARS,), layers=2, calls=CALLS, tokens=tokens))


@functools.cache
def stepped(threshold):
    return step_cache.transform(step_cache.StepCachePlan(threshold, CALLS))


@functools.cache
def first_block(threshold):
    return first_block_cache.transform(first_block_cache.FirstBlockCachePlan(threshold))


MERGED = token_merging.transform(token_merging.TokenMergingPlan(0.25))
ROUNDED = round_to_nearest.transform(round_to_nearest.uniform(8, 8))


@pytest.fixture(scope="module", params=[testing.tiny_dit, tiny_joint], ids=["dit", "joint"])
def subject(request):
    return request.param(steps=CALLS)


@pytest.fixture(scope="module")
def tokens(subject):
    return {"DiT": 64, "Joint": 69}[subject.forward.model.__name__]


COUNTED = {}


def cost(subject, *transforms, branch="max", scope=None):
    """FLOPs here, each counted once; programs of other platforms are not traced meanwhile."""
    key = subject.forward, subject.sampler, transforms, branch
    if key not in COUNTED:
        pair = effjax.chain(*transforms)(subject.forward, subject.params)
        options = {"uncond": subject.uncond, "branch": branch}
        with use_implementation("xla"):
            COUNTED[key] = sampler_cost(subject.sampler, *pair, subject.cond, **options)
    found = COUNTED[key]
    return (found if scope is None else found.scope(scope)).flops


def both_orders(subject, one, two, **options):
    """The cost of two transforms, which must not depend on their order."""
    found = {cost(subject, *pair, **options) for pair in ((one, two), (two, one))}
    assert len(found) == 1
    return found.pop()


def test_leaves_meet_patches_on_blocks_and_tokens(subject):
    """Leaves change no product's size: costs are those of the patch alone."""
    for patch, branch in ((stepped(NEVER), "max"), (first_block(NEVER), "min"), (MERGED, "max")):
        together = both_orders(subject, ROUNDED, patch, branch=branch)
        assert together == cost(subject, patch, branch=branch)


def test_attention_meets_patches_on_blocks(subject, tokens):
    dense = cost(subject)
    attention = cost(subject, scope="attention")
    for cache in (stepped(NEVER), first_block(NEVER)):
        together = both_orders(subject, shared(tokens), cache)
        assert together == cost(subject, shared(tokens)) < dense  # all blocks run
        least = both_orders(subject, shared(tokens), cache, branch="min")
        blocks = {stepped(NEVER).method: 0, first_block(NEVER).method: 1}[cache.method]
        # Of two layers so many run in the cheapest call; attention in the first call alone.
        found = both_orders(subject, shared(tokens), cache, branch="min", scope="attention")
        assert found == attention // CALLS * blocks // 2
        assert least <= cost(subject, cache, branch="min")


def test_merged_tokens_meet_attention(subject, tokens):
    merged = cost(subject, MERGED, scope="attention")
    text = tokens - 64
    assert merged == cost(subject, scope="attention") * (48 + text) ** 2 // (64 + text) ** 2
    assert both_orders(subject, MERGED, shared(tokens), scope="attention") == merged // CALLS


def test_windows_refuse_merged_tokens_in_either_order():
    subject = testing.tiny_dit(steps=CALLS)
    for pair in itertools.permutations((MERGED, windowed(64))):
        with pytest.raises(ValueError, match=r"WARS\) needs .* token_merging has left 48 tokens"):
            cost(subject, *pair)


def test_windows_refuse_text_among_the_tokens():
    with pytest.raises(ValueError, match="for image tokens alone, and this sequence has 5 of text"):
        cost(tiny_joint(steps=CALLS), windowed(69))


def test_merged_tokens_meet_patches_on_blocks(subject):
    for cache in (stepped(NEVER), first_block(NEVER)):
        assert both_orders(subject, MERGED, cache) == cost(subject, MERGED)
    outside = both_orders(subject, MERGED, stepped(NEVER), branch="min")
    assert outside == cost(subject, stepped(NEVER), branch="min")


def test_two_patches_on_the_blocks(subject):
    """A step cache goes around a first-block cache, whatever comes first."""
    pair = stepped(NEVER), first_block(NEVER)
    assert both_orders(subject, *pair) == cost(subject)
    assert both_orders(subject, *pair, branch="min") == cost(subject, pair[0], branch="min")


def test_a_patch_of_one_kind_cannot_come_twice():
    subject = testing.tiny_dit(steps=CALLS)
    with pytest.raises(ValueError, match="FirstBlockCache and FirstBlockCache both replace"):
        cost(subject, first_block(NEVER), first_block(ALWAYS))
    with pytest.raises(ValueError, match=r"two patches keep a state named 'blocks\."):
        cost(subject, stepped(NEVER), stepped(ALWAYS))
    llama = testing.tiny_llama()
    pair = kivi.transform(kivi.KIVIPlan()), knorm.transform(knorm.KnormPlan())
    for one, two in (pair, pair[::-1]):
        forward, params = effjax.chain(one, two)(llama.forward, llama.params)
        with pytest.raises(ValueError, match=r"both replace the internals of 'blocks\.0\.attn"):
            llama.sampler.init(forward, params, llama.cond)


def test_three_kinds_run_together_as_one_program(subject, tokens):
    """Leaves, shared attention and merged tokens under a step cache that never skips a call."""
    transforms = ROUNDED, shared(tokens), MERGED
    run = jax.jit(subject.sampler)
    given = {} if subject.uncond is None else {"uncond": subject.uncond}

    def sample(*transforms):
        pair = effjax.chain(*transforms)(subject.forward, subject.params)
        return run(*pair, subject.cond, jax.random.key(0), **given)

    plain, cached = sample(*transforms), sample(stepped(ALWAYS), *transforms)
    chex.assert_tree_all_finite(plain)
    # What is rounded at a boundary may fall on the other side in another program.
    chex.assert_trees_all_close(plain, cached, rtol=1e-3, atol=1e-2)
    assert float(jnp.abs(plain - sample(stepped(NEVER), *transforms)).max()) > 0


def test_smoothing_folds_into_every_stream():
    """Blocks say where factors go: with two streams, into the modulation of each."""
    subject = tiny_joint()
    plan = vidit_q.uniform(8, 8, rotate=False, fold=True)
    options = {"key": jax.random.key(0), "uncond": subject.uncond, "progress": False}
    pair = subject.forward, subject.params
    largest = vidit_q.calibrate(plan, *pair, subject.sampler, subject.cond, **options)
    _, params = vidit_q.transform(plan, largest)(*pair)
    attn = params["blocks"]["0"]["attn"]
    assert attn["text"]["to_q"]["kernel"].smoothing_scale is None
    assert attn["image"]["to_q"]["kernel"].smoothing_scale is None
    assert attn["text"]["to_out"]["kernel"].smoothing_scale is not None


def test_guidance_of_three_branches():
    """A second condition is one more branch, with its own weight."""
    subject = testing.tiny_dit()
    order = Guidance(("cond", "style", "uncond"), paired=True)
    sampler = Sampler(DDIM(steps=2), guidance={"cond": 3.0, "style": -0.5}, arrangement=order)
    style = effjax.loops.Branches({"style": (subject.cond + 2) % 5})
    x = jax.random.normal(jax.random.key(1), (2, 16, 16, 4))
    uncond = sampler.unconditional(subject.forward, subject.cond, style)
    out, raw, _ = sampler.network(subject.forward, subject.params, {}, x, subject.cond, uncond, 0)
    parts = [sampler.arrangement.branch(name, raw)[..., :4] for name in ("cond", "style", "uncond")]
    for part, label in zip(parts, (subject.cond, (subject.cond + 2) % 5, jnp.full(2, 5))):
        alone, _ = subject.forward(
            subject.params, {}, x, sampler.inputs(x, subject.cond, uncond, 0)[1][:2], label
        )
        chex.assert_trees_all_close(part, alone[..., :4], atol=1e-5)
    cond, style_out, last = parts
    expected = last + 3.0 * (cond - last) - 0.5 * (style_out - last)
    chex.assert_trees_all_close(out[..., :4], expected, atol=1e-5)
    assert sampler(
        subject.forward, subject.params, subject.cond, jax.random.key(0), uncond=style
    ).shape == (2, 16, 16, 4)


@pytest.mark.parametrize(
    ("branches", "guidance", "message"),
    [
        (("cond", "style", "uncond"), 2.0, "one scale guides two branches"),
        (("cond", "style", "uncond"), {"cond": 1.0}, "all branches but one of"),
        (("cond", "uncond"), {"cond": float("nan")}, "finite numbers"),
        (("cond", "uncond"), {"cond": 1.0, "other": 2.0}, "all branches but one of"),
    ],
)
def test_weights_of_guidance_that_do_not_fit(branches, guidance, message):
    with pytest.raises(ValueError, match=message):
        Sampler(DDIM(steps=2), guidance=guidance, arrangement=Guidance(branches))
