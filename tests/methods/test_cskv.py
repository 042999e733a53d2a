"""CSKV: features against what they stand for, where they start, how they are trained."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import testing
from effjax.context import CacheLength
from effjax.cost import state_bytes
from effjax.forward import METHODS
from effjax.generate import Reading, generate, prefill
from effjax.layers.attention import CausalCore
from effjax.layers.rotary import Rotary
from effjax.methods import cskv
from effjax.methods.cache.cskv.training import rounded
from tests.caches.test_caches import TEXT, pieces, run, texts

WINDOW = 4


def random_factors(rank_k=6, rank_v=10, width=16, out=16):
    shapes = {
        "down_k": (width, rank_k),
        "up_k": (rank_k, out),
        "down_v": (width, rank_v),
        "up_v": (rank_v, out),
    }
    keys = jax.random.split(jax.random.key(9), 4)
    return {n: 0.3 * jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items())}


def rebuilt(found, *, constant):
    """Keys and values [B, S, K, D] of all tokens by the definition, in numpy."""
    _, k, _, x = (np.asarray(part) for part in texts())
    out = []
    for name in "kv":
        c = x @ np.asarray(found[f"down_{name}"])
        if constant:
            c[..., -1] = 1
        out.append((c @ np.asarray(found[f"up_{name}"])).reshape(k.shape))
    return out


def reference(found, prompt, *, constant):
    """Attention of all tokens: prompts exact, then windows that are full rebuilt."""
    q, k, v, _ = texts()
    rotary, turns = Rotary(8, theta=100.0), jnp.arange(TEXT)[None]
    q, exact_k = (np.asarray(rotary(part, turns)) for part in (q, k))
    low_k, low_v = rebuilt(found, constant=constant)
    low_k = np.asarray(rotary(jnp.asarray(low_k), turns))
    out = np.zeros(q.shape, np.float32)
    for token in range(TEXT):
        sealed = 0 if token < prompt else token // WINDOW * WINDOW
        for head in range(4):
            keys, values = (
                np.concatenate(
                    [low[:, :sealed, head // 2], own[:, sealed : token + 1, head // 2]], 1
                )
                for low, own in ((low_k, exact_k), (low_v, np.asarray(v)))
            )
            logits = np.einsum("bd,btd->bt", q[:, token, head], keys) / np.sqrt(8)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[:, token, head] = np.einsum("bt,btd->bd", weights, values)
    return out


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("sizes", [(10,) + (1,) * 13, (9, 6, 8)], ids=str)
def test_full_windows_are_rebuilt_and_the_others_exact(sizes, constant):
    found, plan = random_factors(), cskv.CSKVPlan(0.5, 0.5, window=WINDOW)
    options = {"plan": plan, "factors": found, "constant": constant}
    outputs, _ = run(cskv.CSKVCache, pieces(*sizes), **options)
    want = reference(found, sizes[0], constant=constant)
    chex.assert_trees_all_close(jnp.concatenate(outputs, 1), want, atol=2e-5)


@pytest.mark.parametrize("window", [1, WINDOW])
@pytest.mark.parametrize(("bits", "near"), [(8, 0.02), (4, 0.4)])
def test_quantized_values_stand_for_features(bits, near, window):
    found = random_factors()
    whole, _ = run(
        cskv.CSKVCache,
        pieces(10, *[1] * 13),
        plan=cskv.CSKVPlan(window=window),
        factors=found,
        constant=False,
    )
    plan = cskv.CSKVPlan(window=window, bits=bits)
    quantized, values = run(
        cskv.CSKVCache, pieces(10, *[1] * 13), plan=plan, factors=found, constant=False
    )
    error = float(jnp.abs(jnp.concatenate(quantized, 1) - jnp.concatenate(whole, 1)).max())
    assert 0 < error < near
    core = CausalCore(Rotary(8, theta=100.0))
    options = {
        "factors": found,
        "constant": False,
        "first": False,
        "cache_length": CacheLength(16, 16),
    }
    cache = cskv.CSKVCache(core, plan=plan, **options)
    sealed = {path[-1]: value for path, value in values.items()}
    x = np.asarray(texts()[3])
    full = TEXT // window * window
    for name in "kv":
        features = x @ np.asarray(found[f"down_{name}"])
        back = np.asarray(cache._restored(sealed, name, jnp.float32))[:, :full]
        step = np.asarray(sealed[f"{name}_scale"]).max()
        chex.assert_trees_all_close(back, features[:, :full], atol=step / 2 + 1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_whole_ranks_are_the_dense_model(bias):
    """With biases a feature is the constant, so one more than the rank of the inputs is needed."""
    subject = testing.tiny_llama(hidden_size=12, num_heads=4, num_kv_heads=4, qkv_bias=bias)
    plan = cskv.CSKVPlan(0.375, 0.375, window=4)
    if bias:
        # Projections of rank 7, so that eight features are enough.
        for block in subject.params["blocks"].values():
            for name in ("to_k", "to_v"):
                left, s, right = np.linalg.svd(block["attn"][name]["kernel"], full_matrices=False)
                block["attn"][name]["kernel"] = jnp.asarray((left[:, :7] * s[:7]) @ right[:7])
        plan = cskv.CSKVPlan(0.25, 0.25, window=4)
    run_ = jax.jit(subject.sampler)
    dense = run_(subject.forward, subject.params, subject.cond)
    forward, params = cskv.transform(plan)(subject.forward, subject.params)
    chex.assert_trees_all_close(run_(forward, params, subject.cond), dense, atol=1e-4)


def test_prompts_read_themselves_exactly():
    subject = testing.tiny_llama()
    dense = prefill(subject.forward, subject.params, subject.cond, new=4)
    forward, params = cskv.transform(cskv.CSKVPlan(0.25, 0.25, window=4))(
        subject.forward, subject.params
    )
    low = prefill(forward, params, subject.cond, new=4)
    chex.assert_trees_all_close(low.logits, dense.logits, atol=1e-5)


@pytest.mark.parametrize(("bits", "densities"), [(16, (0.25, 0.75)), (4, (0.25, 0.25))])
def test_bytes_are_those_of_the_formula(bits, densities):
    """(R_k + R_v) bits / 8 a token and layer, scales and offsets, and a window of floats."""
    subject = testing.tiny_llama(dtype="bfloat16")
    window, config = 4, subject.forward.config
    plan = cskv.CSKVPlan(*densities, window=window, bits=bits)
    forward, params = cskv.transform(plan)(subject.forward, subject.params)
    held = state_bytes(Reading(12, 8).init(forward, params, subject.cond).state)
    batch, tokens = subject.cond.shape
    r_k, r_v = (int(d * config.head_dim) * config.num_kv_heads for d in densities)
    sealed = tokens * (r_k + r_v) * bits // 8
    if bits != 16:
        sealed += 2 * 4 * (tokens // window * r_k + tokens * config.num_kv_heads)
    exact = 2 * config.num_kv_heads * config.head_dim + r_k + r_v
    assert held == batch * config.num_layers * (sealed + window * exact * 2)


def test_the_published_ranks():
    """LongChat-7B: 25 of 128 channels at a mean density of 0.2."""
    assert cskv.CSKVPlan(0.2, 0.2).ranks(128, 32) == (25 * 32, 25 * 32)
    assert 2 * sum(cskv.CSKVPlan(0.2, 0.2).ranks(128, 32)) * 32 == 102_400
    assert cskv.CSKVPlan(0.3, 0.7).ranks(10, 1) == (3, 7)  # 0.7 x 10 is 7 less 1e-15


# Training --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def skewed():
    return skew(testing.tiny_llama())


def skew(subject):
    """Let keys and values be made of inputs of very different sizes."""
    for block in subject.params["blocks"].values():
        block["norm1"]["scale"] = block["norm1"]["scale"] * jnp.geomspace(0.1, 10, 16)
    return subject


def token_batches(start):
    for step in itertools.count(start):
        yield np.random.default_rng(step).integers(0, 50, (2, 12)).astype(np.int32)


def loss_of(plan, subject, found):
    tokens = next(token_batches(1000))
    return float(
        cskv.reconstruction_loss(plan, subject.forward, subject.params, found, jnp.asarray(tokens))
    )


def starts(plan, subject):
    pair = subject.forward, subject.params
    batches = itertools.islice(token_batches(0), 4)
    return cskv.factors(plan, *pair), cskv.factors(plan, *pair, cskv.magnitudes(*pair, batches))


def test_statistics_make_a_better_start_and_training_a_better_end(skewed):
    plan = cskv.CSKVPlan(0.5, 0.5, window=4)
    plain, weighted = starts(plan, skewed)
    chance = jax.tree.map(
        lambda leaf: jnp.std(leaf) * jax.random.normal(jax.random.key(1), leaf.shape), plain
    )
    trained, log = cskv.fit(
        plan,
        skewed.forward,
        skewed.params,
        weighted,
        token_batches,
        steps=60,
        learning_rate=3e-3,
        progress=False,
    )
    losses = [loss_of(plan, skewed, each) for each in (chance, plain, weighted, trained)]
    assert losses[0] > 3 * losses[1], losses
    assert losses[1] > losses[2] > losses[3] > 0, losses
    assert log["runs"] == [{"first_step": 0, "steps": 60}]


def test_training_with_quantized_values_beats_rounding_afterwards():
    """With groups of a dozen: the two ends of a group have no gradients."""
    subject = skew(testing.tiny_llama(num_heads=2, num_kv_heads=1, head_dim=16))
    floats, quantized = (cskv.CSKVPlan(0.75, 0.75, window=12, bits=bits) for bits in (16, 4))
    _, start = starts(floats, subject)
    options = {"steps": 150, "learning_rate": 3e-3, "progress": False}
    pair = subject.forward, subject.params
    after = cskv.fit(floats, *pair, start, token_batches, **options)[0]
    aware = cskv.fit(quantized, *pair, start, token_batches, **options)[0]
    assert loss_of(quantized, subject, aware) < loss_of(quantized, subject, after)


def test_training_resumes_and_keeps_the_constant(tmp_path):
    subject = testing.tiny_llama(qkv_bias=True)
    plan = cskv.CSKVPlan(0.5, 0.5)
    pair = subject.forward, subject.params
    start = cskv.factors(plan, *pair)
    options = {"learning_rate": 1e-3, "progress": False}
    cskv.fit(plan, *pair, start, token_batches, steps=2, checkpoints=tmp_path / "ck", **options)
    found, log = cskv.fit(
        plan, *pair, start, token_batches, steps=4, checkpoints=tmp_path / "ck", **options
    )
    assert [each["first_step"] for each in log["runs"]] == [0, 2]
    other = jax.tree.map(lambda leaf: leaf * 2, subject.params)
    for params, changed in ((other, plan), (subject.params, cskv.CSKVPlan(0.5, 0.75))):
        with pytest.raises(ValueError, match=r"holds was made with (model|plan) .*, and now it is"):
            cskv.fit(
                changed,
                subject.forward,
                params,
                start,
                token_batches,
                steps=4,
                checkpoints=tmp_path / "ck",
                **options,
            )
    path = "blocks.0.attn.core"
    assert float(jnp.abs(found[path]["up_k"] - start[path]["up_k"]).max()) > 0
    chex.assert_trees_all_close(start[path]["up_v"][-1], _bias(subject, "to_v"))


def _bias(subject, name):
    return subject.params["blocks"]["0"]["attn"][name]["bias"]


def test_gradients_stop_at_the_ends_of_a_group():
    plan = cskv.CSKVPlan(window=4, bits=4)
    c = jnp.arange(8.0).reshape(1, 4, 2) ** 2
    gradient = jax.grad(lambda c: rounded(c, plan, 1, keys=True).sum())(c)
    chex.assert_trees_all_equal(gradient[0, :, 0], jnp.array([0.0, 1, 1, 0]))
    gradient = jax.grad(lambda c: rounded(c, plan, 2, keys=False).sum())(c)
    assert float(jnp.abs(gradient).sum()) == 0  # each is alone in its group


# What is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_density": 0.0}, "k_density must be a finite number above 0 and at most 1"),
        ({"v_density": 1.5}, "v_density must be a finite number above 0 and at most 1"),
        ({"window": 0}, "window must be a whole number of at least 1"),
        ({"bits": 3}, "bits must be one of 4, 8, 16"),
    ],
)
def test_plans_out_of_range(untyped, options, message):
    with pytest.raises(ValueError, match=message):
        cskv.CSKVPlan(**options)


def test_models_and_factors_that_do_not_fit():
    subject = testing.tiny_llama()
    pair = subject.forward, subject.params
    with pytest.raises(ValueError, match="keeps none of the 8 channels"):
        cskv.transform(cskv.CSKVPlan(0.1, 0.5))(*pair)
    with pytest.raises(
        ValueError, match="keeps 3 channels of 1 heads together, and bits=4 puts two"
    ):
        cskv.CSKVPlan(0.375, 0.5, bits=4).ranks(8, 1)
    wide = testing.tiny_llama(num_kv_heads=4)
    with pytest.raises(ValueError, match="rank 32 is above that"):
        cskv.transform(cskv.CSKVPlan(0.5, 1.0))(wide.forward, wide.params)
    normed = testing.tiny_llama(qk_norm=True)
    with pytest.raises(ValueError, match="normalizes keys"):
        cskv.transform(cskv.CSKVPlan())(normed.forward, normed.params)
    other = cskv.factors(cskv.CSKVPlan(0.5, 0.5), *pair)
    with pytest.raises(ValueError, match="another plan or model"):
        cskv.transform(cskv.CSKVPlan(), other)(*pair)
    with pytest.raises(ValueError, match="magnitudes are those of another model"):
        cskv.factors(cskv.CSKVPlan(), *pair, {})
    windowed = testing.tiny_llama(window=5)
    forward, params = cskv.transform(cskv.CSKVPlan())(windowed.forward, windowed.params)
    with pytest.raises(ValueError, match="sees the last 5 tokens only"):
        generate(forward, params, [[1, 2, 3]], max_new_tokens=2)
    start = cskv.factors(cskv.CSKVPlan(), *pair)
    plan = cskv.CSKVPlan(bits=4, window=5)
    with pytest.raises(ValueError, match="no whole windows of 5"):
        cskv.fit(plan, *pair, start, token_batches, steps=1, progress=False)


def test_factors_are_saved_as_what_the_method_learned():
    subject = testing.tiny_llama()
    forward, params = cskv.transform(cskv.CSKVPlan())(subject.forward, subject.params)
    held = params[METHODS]["cskv"]["blocks"]
    assert sorted(held) == ["0", "1"]
    assert sorted(held["0"]["attn"]["core"]) == ["down_k", "down_v", "up_k", "up_v"]
    assert forward.recipe[0][0] == "cskv"
