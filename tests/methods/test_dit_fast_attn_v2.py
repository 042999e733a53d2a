"""DiTFastAttnV2: formulas, identities, costs in closed form, the 0/1 program, search and replay."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import effjax
from effjax import testing
from effjax.context import Layout, Model, tokens_as
from effjax.cost import cost, sampler_cost
from effjax.forward import functional
from effjax.layers.attention import JointAttention
from effjax.methods import even_steps, round_to_nearest
from effjax.methods.attention.dit_fast_attn_v2 import (
    DiTFastAttnV2Plan,
    Goals,
    Uniform,
    attention_macs,
    choose,
    half_width_of,
    relative_errors,
    saving,
    search,
    transform,
    uniform,
)
from effjax.methods.attention.dit_fast_attn_v2.patch import Tokens, token_major, windows
from effjax.methods.attention.dit_fast_attn_v2.search import Choice
from pallas_kernels import use_implementation
from pallas_kernels.arrow_attention import arrow_attention
from pallas_kernels.block_mask import Arrow, Band, block_mask, dense_mask, visible_pairs
from pallas_kernels.block_sparse_attention import block_sparse_attention

IMAGE, TEXT = 64, 5
ARROWS = {"kinds": ((0, False), (4, False), (2, False), (1, False)), "uniform_saving": False}
TOKENS = Tokens(IMAGE, TEXT, False, None)


def plan_of(*rows, **options):
    """A plan of one layer with two heads, or of those that the rows say."""
    layers = tuple((row,) if isinstance(row[0], int) else row for row in rows)
    return DiTFastAttnV2Plan(**{"half_width": layers, "image_tokens": IMAGE} | options)


# ---- the formulas, written down once more without the library ----


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("tile", [None, (16, 8)])
def test_every_head_follows_the_formula(text_first, tile):
    """Run one joint attention by the plan, through a module that is nothing but that layer."""
    order = ("text", "image") if text_first else ("image", "text")

    class Alone(Model):
        def __init__(self):
            self.config = None
            self.attn = JointAttention(16, streams=order, heads=2, head_dim=8, rngs=nnx.Rngs(0))

        def layout(self, x):
            return Layout(grid=(1, 8, 8), text=TEXT, text_first=text_first)

        def __call__(self, x):
            return self.attn(x)

    rows = ((-1, -1), (4, 0), (0, -1), (0, 0), (0, 20), (-1, -1), (2, 4), (0, 0))
    plan = plan_of(*rows, text=TEXT, text_first=text_first, tile=tile)
    forward, params = functional(Alone())
    patched, params = transform(plan)(forward, params)
    noise = jax.random.split(jax.random.key(5), len(rows))
    calls = [
        {
            name: jax.random.normal(key, (2, size, 16))
            for name, size in (("image", IMAGE), ("text", TEXT))
        }
        for key in noise
    ]
    traced = static = patched.init(params, calls[0])
    assert {key: value.shape for key, value in traced.items()} == {"attn.output": (2, 69, 2, 8)}
    run = jax.jit(lambda p, s, x, t: patched(p, s, x, step=t))
    last, attn = None, forward.module(params).attn
    with use_implementation("xla"):
        for step, (row, x) in enumerate(zip(rows, calls)):
            q, k, v = attn.project(x)
            seen = dense_mask(block_mask(Arrow(row, TEXT, text_first, tile), 69))
            logits = jnp.einsum("bshd,bthd->bhst", q, k) * 8**-0.5
            weights = jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1)
            o = jnp.einsum("bhst,bthd->bshd", weights, v)
            last = o if last is None else jnp.where((np.array(row) == 0)[:, None], last, o)
            out, traced = run(params, traced, x, step)
            chex.assert_trees_all_close(out, attn.merge(last, x), atol=1e-5)
            out, static = patched(params, static, x, step=step)
            chex.assert_trees_all_close(out, attn.merge(last, x), atol=1e-5)
    chex.assert_trees_all_close(traced, static, atol=1e-5)
    assert run._cache_size() == 1


def test_errors_follow_the_formula():
    """One scalar mean for each head, over batch, tokens and channels."""
    rng = np.random.default_rng(0)
    dense, *gives = (rng.standard_normal((2, 9, 3, 4)).astype(np.float32) + 5 for _ in range(3))
    found = relative_errors([jnp.asarray(o) for o in gives], jnp.asarray(dense))
    for head, candidate in np.ndindex(3, 2):
        y, o = dense[:, :, head], gives[candidate][:, :, head]
        expected = np.mean((o - y) ** 2) / np.mean((y - y.mean()) ** 2)
        assert found[head, candidate] == pytest.approx(expected, rel=1e-4)
    constant = jnp.ones((1, 4, 2, 3))
    errors = relative_errors([constant, 2 * constant], constant)
    assert errors[:, 0].tolist() == [0, 0]
    assert (errors[:, 1] > 1e30).all()


# ---- the 0/1 program ----


def total(errors, savings, chosen):
    """Saving and error of a choice."""
    taken = [(savings[c], errors[h, c]) for h, c in enumerate(chosen) if c >= 0]
    return sum(s for s, _ in taken), sum(e for _, e in taken)


def graded(heads, seed=0):
    """Errors of heads of graded locality (windows) and drift (cache)."""
    rng = np.random.default_rng(seed)
    local = rng.random(heads)[:, None] * np.array([0.3, 0.6, 1.0])
    return np.concatenate([rng.random((heads, 1)), local], axis=1) * 0.3


@pytest.mark.parametrize("c_head", [None, 1.5])
@pytest.mark.parametrize("uniform_saving", [False, True])
def test_the_program_is_solved_exactly(c_head, uniform_saving):
    for seed, delta in itertools.product(range(3), (0.05, 0.2, 0.6)):
        errors = graded(4, seed)
        choice = Choice(ARROWS["kinds"], delta, c_head, uniform_saving)
        savings = choice.savings(TOKENS)
        allowed = errors < (np.inf if c_head is None else c_head / 4 * delta)
        best = max(
            saved
            for tried in itertools.product(range(-1, 4), repeat=4)
            if all(c < 0 or allowed[h, c] for h, c in enumerate(tried))
            for saved, error in [total(errors, savings, tried)]
            if error <= delta
        )
        chosen = choose(errors, savings, choice)
        saved, error = total(errors, savings, chosen)
        assert saved == pytest.approx(best)
        assert error <= delta + 1e-6
        assert all(c < 0 or allowed[h, c] for h, c in enumerate(chosen))


def test_the_program_pays():
    """More error allows more saving; heads of their own beat one choice for all of a layer."""
    errors = graded(24)
    choices = [Choice(**ARROWS, delta=delta, c_head=1.5) for delta in (0, 0.05, 0.2, 0.6, 1.5)]
    savings = choices[0].savings(TOKENS)
    found = [choose(errors, savings, choice) for choice in choices]
    assert (found[0] == -1).all()
    saved = [total(errors, savings, chosen)[0] for chosen in found]
    assert saved == sorted(saved)
    assert saved[-1] > saved[1] > 0
    arrows = choose(errors[:, 1:], savings[1:], choices[2])
    assert total(errors[:, 1:], savings[1:], arrows)[0] <= saved[2]
    for candidate in range(4):  # at no less saving, no more error than all heads alike
        alike = np.full(24, candidate)
        least, budget = total(errors, savings, alike)
        free = Choice(**ARROWS, delta=budget, c_head=None)
        assert total(errors, savings, choose(errors, savings, free))[0] >= least


def test_savings_of_the_paper():
    for image, text, expected in (
        (4096, 333, (0.7517, 0.8027, 0.8288)),
        (4096, 512, (0.6944, 0.7415, 0.7656)),
        (16384, 512, (0.8264, 0.8825, 0.9112)),
    ):
        widths = [half_width_of(f"arrow_{f}", image)[0] for f in (8, 16, 32)]
        found = [saving(width, image, text) for width in widths]
        np.testing.assert_allclose(found, expected, atol=6e-5)
    assert (saving(0, 9, 9), saving(-1, 9, 9)) == (1, 0)


def local_head():
    """A head of image tokens on a circle, which look at their neighbors and at the text alike."""
    rng, angle = np.random.default_rng(0), np.arange(IMAGE) * 2 * np.pi / IMAGE
    circle = np.stack([np.cos(angle), np.sin(angle), np.ones(IMAGE)], axis=1)
    q = np.concatenate([60 * circle, rng.standard_normal((TEXT, 3))])
    k = np.concatenate([circle * [1, 1, 0], np.tile([0, 0, 1.0], (TEXT, 1))])
    v = rng.standard_normal((IMAGE + TEXT, 3))
    return [jnp.asarray(x, jnp.float32)[None, :, None] for x in (q, k, v)]


def test_windows_that_keep_the_text_are_nearer_to_dense_attention():
    q, k, v = local_head()
    dense = arrow_attention(q, k, v, (-1,))
    arrow = arrow_attention(q, k, v, (4,), text=TEXT)
    plain = block_sparse_attention(q, k, v, Band(4))
    errors = relative_errors([arrow, plain], dense)[0]
    assert errors[0] < 0.02 < 1 < errors[1]


# ---- videos ----


@pytest.mark.parametrize("text_first", [False, True])
def test_tokens_of_videos_are_reordered_by_head(text_first):
    grid, tokens = (4, 2, 8), Tokens(IMAGE, TEXT, text_first, None)
    q, k, v, kept = (
        jax.random.normal(key, (2, IMAGE + TEXT, 3, 8))
        for key in jax.random.split(jax.random.key(0), 4)
    )
    order = token_major(grid, tokens)
    first = TEXT if text_first else 0
    for frame, place in itertools.product(range(4), range(16)):  # p F + f holds f P + p
        assert order[first + place * 4 + frame] == first + frame * 16 + place
    turned = arrow_attention(*(x[:, order] for x in (q, k, v)), (6,) * 3, text=TEXT,
                             text_first=text_first)[:, np.argsort(order)]  # fmt: skip
    straight = arrow_attention(q, k, v, (6,) * 3, text=TEXT, text_first=text_first)
    options = {"widths": (0, 6), "kept": kept, "tokens": tokens}
    with tokens_as(Layout(grid, TEXT, text_first)):
        static = windows(q, k, v, (6, 6, 0), (True, False, False), **options)
        traced = jax.jit(lambda w, r: windows(q, k, v, w, r, **options))(
            jnp.array([6, 6, 0]), jnp.array([True, False, False])
        )
    expected = jnp.stack([turned[:, :, 0], straight[:, :, 1], kept[:, :, 2]], axis=2)
    chex.assert_trees_all_close(static, expected, atol=1e-5)
    chex.assert_trees_all_close(traced, expected, atol=1e-5)


def test_attention_over_time_wants_reordered_windows():
    """Every token attends to its own place in all frames."""
    grid, tokens = (8, 2, 4), Tokens(IMAGE, 0, False, None)
    place = jnp.tile(jnp.eye(8), (8, 1))[None, :, None]
    v = jax.random.normal(jax.random.key(0), place.shape)
    dense = arrow_attention(40 * place, place, v, (-1,))
    with tokens_as(Layout(grid)):
        options = {"widths": (8,), "kept": None, "tokens": tokens}
        arrow, reordered = (
            windows(40 * place, place, v, (8,), (turned,), **options) for turned in (False, True)
        )
    errors = relative_errors([arrow, reordered], dense)[0]
    assert errors[1] < 1e-6 < 1 < errors[0]


# ---- models ----


@pytest.fixture(scope="module")
def subject():
    """SD3.5: a block with two attentions, one that ends the text, two branches of guidance."""
    return testing.tiny_sd3(steps=3, num_layers=2)


def arguments(subject):
    return subject.forward, subject.params, subject.sampler, subject.cond


def sample(subject, plan=None, **options):
    forward, params = subject.forward, subject.params
    if plan is not None:
        forward, params = transform(plan)(forward, params)
    options |= {} if subject.uncond is None else {"uncond": subject.uncond}
    return jax.jit(subject.sampler)(forward, params, subject.cond, jax.random.key(3), **options)


def sd3_plan(subject, *pattern, **options):
    sizes = {"calls": 3, "layers": 3, "heads": 2, "image_tokens": IMAGE, "text": TEXT}
    return uniform(pattern, **sizes, image_layers=(1,), **options)


def test_the_found_plan_replays_the_search(subject):
    seen, options = {}, {"uncond": subject.uncond, "progress": False, "key": jax.random.key(3)}

    def remember(step, x, errors):
        seen[step] = x, errors

    with use_implementation("xla"):
        plan = search(*arguments(subject), delta=0.9, callback=remember, **options)
        assert (plan.widths[0] == -1).all()
        assert {-1, 0} < set(plan.widths[1:].ravel().tolist())
        chex.assert_trees_all_close(sample(subject, plan), seen[2][0], atol=1e-6)
        assert (plan.text, plan.image_layers, plan.guidance, plan.calls) == (TEXT, (1,), 2.0, 3)
        assert DiTFastAttnV2Plan.from_json(plan.to_json()) == plan
        # The decisions are those of the errors, and both their limits hold.
        for step, layer in itertools.product((1, 2), range(3)):
            path = ("blocks.0.attn", "blocks.0.attn2", "blocks.1.attn")[layer]
            errors = seen[step][1][path]
            choice = Choice(**ARROWS, delta=0.9, c_head=1.5)
            savings = choice.savings(TOKENS._replace(text=plan.text_of(layer)))
            chosen = choose(errors, savings, choice)
            widths = [-1 if c < 0 else choice.kinds[c][0] for c in chosen]
            assert plan.widths[step, layer].tolist() == widths


def test_delta_zero_is_dense_to_the_bit(subject):
    with use_implementation("xla"):
        options = {"uncond": subject.uncond, "key": jax.random.key(0), "progress": False}
        plan = search(*arguments(subject), delta=0.0, candidates=("cache",), **options)
        assert (plan.widths == -1).all()
        chex.assert_trees_all_equal(sample(subject, plan), sample(subject))


def test_costs_in_closed_form(subject):
    plan = sd3_plan(subject, "arrow_8", "cache")
    macs, tokens = attention_macs(plan, batch=4, head_dim=8), IMAGE + TEXT
    for layer, text in enumerate((TEXT, 0, TEXT)):
        whole = (IMAGE + text) ** 2
        hidden = (IMAGE - 4 - 1) * (IMAGE - 4)
        assert macs[layer].tolist() == [2 * 4 * 8 * 2 * n for n in (whole, whole - hidden, 0)]
        assert visible_pairs(Arrow(4, text), IMAGE + text) == whole - hidden
    forward, params = transform(plan)(subject.forward, subject.params)
    with use_implementation("xla"):
        counted = sampler_cost(
            subject.sampler, forward, params, subject.cond, uncond=subject.uncond
        )
    found = counted.scope("attention")
    assert found.useful_flops == 2 * macs.sum()
    assert found.flops < 1.3 * found.useful_flops
    # A layer without any work left skips its projections, the text's too.
    x, prompt = jnp.ones((2, 16, 16, 4)), subject.cond
    state = forward.init(params, x, jnp.ones(2), prompt)

    def call(step):
        return cost(lambda: forward(params, state, x, jnp.ones(2), prompt, step=step)).flops

    with use_implementation("xla"):
        attention = 2 * attention_macs(plan, batch=2, head_dim=8)[:, 0].sum()
        projections = 3 * 2 * 2 * 16 * 16 * (2 * tokens + IMAGE)
        assert call(0) - call(2) == attention + projections


def test_sparsity():
    half = plan_of((-1, -1), *[(0, -1)] * 999)
    assert half.sparsity == pytest.approx(0.5, abs=1e-3)
    assert plan_of((-1, -1), (4, 0)).sparsity == pytest.approx((1 + (60 / 64) ** 2) / 4)
    masks = plan_of((-1, -1), (4, 0)).computed(2)
    np.testing.assert_allclose(masks["attention"], (1, 1 - (1 + (60 / 64) ** 2) / 2))
    assert "sparsity 0.470" in plan_of((-1, -1), (4, 0)).describe()


def test_windows_over_everything_are_dense(subject):
    wide = tuple((((-1 if t == 0 else 63,) * 2),) * 3 for t in range(3))
    plan = dataclasses.replace(sd3_plan(subject, "dense"), half_width=wide)
    with use_implementation("xla"):
        chex.assert_trees_all_close(sample(subject, plan), sample(subject), atol=1e-5)


def test_an_unchanged_input_is_cached_exactly(subject):
    forward, params = transform(sd3_plan(subject, "cache"))(subject.forward, subject.params)
    inputs = jnp.ones((2, 16, 16, 4)), jnp.ones(2), subject.cond
    state = forward.init(params, *inputs)
    with use_implementation("xla"):
        first, state = forward(params, state, *inputs, step=0)
        again, _ = forward(params, state, *inputs, step=1)
    chex.assert_trees_all_close(first, again, atol=1e-6)


def test_it_meets_step_caches_and_quantized_weights(subject, tmp_path):
    """In either order the same model, saved as one recipe."""
    rounded = round_to_nearest.transform(round_to_nearest.uniform(8))
    cached = even_steps.transform(even_steps.EvenStepsPlan(steps=3, every=2))
    heads = transform(sd3_plan(subject, "arrow_8", "cache"))
    pair = subject.forward, subject.params
    one, two = (
        effjax.chain(*each)(*pair) for each in ((rounded, cached, heads), (heads, cached, rounded))
    )
    options = {"uncond": subject.uncond}
    with use_implementation("xla"):
        found, swapped = (
            jax.jit(subject.sampler)(*each, subject.cond, jax.random.key(3), **options)
            for each in (one, two)
        )
    chex.assert_trees_all_close(found, swapped, atol=1e-5)
    effjax.save(tmp_path / "fast", *one)
    assert effjax.load(tmp_path / "fast")[0] == one[0]


def test_it_runs_on_images_alone():
    subject = testing.tiny_dit(steps=3)
    plan = Uniform(("arrow_8", "cache"), calls=3).plan(subject.forward, subject.params)
    assert (plan.image_tokens, plan.text, plan.image_layers) == (IMAGE, 0, ())
    with use_implementation("xla"):
        out = sample(subject, plan)
        assert 0 < float(jnp.abs(out - sample(subject)).max()) < 5


# ---- errors ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"half_width": ()}, "got 0 calls"),
        ({"half_width": (((-1,), (-1, -1)),)}, r"heads \[1, 2\]"),
        ({"half_width": (((-1, 0),),)}, r"layers \[0\] have heads of half width 0 in the first"),
        ({"half_width": (((-1, -2),),)}, "half_width.* must be a whole number of at least -1"),
        ({"reorder": (((True,),),)}, r"half_width, \[2, 1, 2\]; it is of \[1, 1, 1\]"),
        ({"reorder": (((False, True),),) * 2}, r"layers \[0\] reorder tokens of heads that have"),
        ({"image_layers": (1,)}, r"image_layers \[1\] are not among 1 layers"),
        ({"candidates": ("arrow_33",)}, "'arrow_33' reach no token to each side"),
        ({"candidates": ("window",)}, "unknown candidate 'window'"),
        ({"tile": (0, 8)}, "tile"),
    ],
)
def test_bad_plans(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(plan_of((-1, -1), (4, 0)), **change)


def test_a_plan_for_something_else_is_refused(subject):
    right = sd3_plan(subject, "arrow_8")
    with pytest.raises(ValueError, match="the plan has 1 layers"):
        transform(plan_of((-1, -1)))(subject.forward, subject.params)
    for change, message in (
        ({"half_width": (((-1,),) * 3,) * 3}, "for layers of 1 heads, but .* has layers of"),
        ({"image_layers": ()}, r"the layers \[1\] attend to the image alone, in the plan \[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            transform(dataclasses.replace(right, **change))(subject.forward, subject.params)
    for change, message in (
        ({"text": 6}, "made for 64 image tokens and 6 of text, this call has 64 image tokens and"),
        ({"image_tokens": 60}, "made for 60 image tokens"),
        ({"text_first": True}, "5 of text before them, this call has 64 image tokens and 5 of tex"),
        ({"half_width": right.half_width[:2]}, "planned for 2 network calls, but the sampler make"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(subject, dataclasses.replace(right, **change))
    patched, params = transform(right)(subject.forward, subject.params)
    inputs = jnp.ones((2, 16, 16, 4)), jnp.ones(2), subject.cond
    with pytest.raises(ValueError, match="step 3 lies outside the plan"):
        patched(params, {}, *inputs, step=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": -0.1}, "delta must be at least 0"),
        ({"delta": float("nan")}, "delta must be at least 0"),
        ({"delta": 0.1, "c_head": 0.0}, "c_head above it"),
        ({"delta": 0.1, "candidates": ()}, "at least one"),
        ({"delta": 0.1, "candidates": ("cache", "cache")}, "different names"),
        ({"delta": 0.1, "candidates": ("arrow_40",)}, "they need at least 80 image tokens"),
    ],
)
def test_bad_searches(subject, options, message):
    with pytest.raises(ValueError, match=message):
        search(*arguments(subject), key=jax.random.key(0), uncond=subject.uncond, **options)


def test_bad_options(subject):
    with pytest.raises(ValueError, match="unknown candidate 'window'"):
        Goals(candidates=("cache", "window"))
    for pattern, message in (((), "at least one call"), (("sparse",), "unknown candidate")):
        with pytest.raises(ValueError, match=message):
            Uniform(pattern, calls=3).plan(subject.forward, subject.params)
