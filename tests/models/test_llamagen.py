"""LlamaGen and its VQ model: parity with plain torch, the loop, caches, cost, errors."""

import dataclasses
import json
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters import convert, from_pretrained
from effjax import testing
from effjax.autoregression import NextToken, logits_of
from effjax.capture import tap
from effjax.context import Layout
from effjax.cost import sampler_cost, state_bytes
from effjax.forward import abstract, parameter_count
from effjax.layers.linear import Linear
from effjax.layers.rotary import RasterRotary
from effjax.loops import Carry
from effjax.methods import kivi, round_to_nearest, streaming_llm, vidit_q
from effjax.models.llamagen import Caption, LlamaGen, LlamaGenConfig, positions_of
from effjax.models.vq_model import VQModel, VQModelConfig, decode, encode, latents_of
from effjax.registry import methods
from pallas_kernels import use_implementation

GRID = 3


@pytest.fixture(autouse=True)
def _what_runs_here():
    """The programs of this machine: tracing the kernels of others beside them takes long."""
    with use_implementation("xla"):
        yield


@jax.jit
def sample(loop, forward, params, cond, key):
    return loop.sample(forward, params, cond, key)


@pytest.fixture(scope="module")
def subject():
    return testing.tiny_llamagen()


@pytest.fixture(scope="module")
def captioned():
    return testing.tiny_llamagen(caption_channels=12)


def test_sizes_are_those_of_the_released_models():
    def parameters(config):
        one, two = (
            parameter_count(abstract(LlamaGen, dataclasses.replace(config, num_layers=n))[1])
            for n in (1, 2)
        )
        return one + (config.num_layers - 1) * (two - one)

    sizes = {"B": 111e6, "L": 343e6, "XL": 775e6, "XXL": 1.4e9, "3B": 3.1e9}
    inner = {"B": 2048, "L": 2816, "XL": 3584, "XXL": 4096, "3B": 8704}
    for name, rounded in sizes.items():
        config = LlamaGenConfig.preset(name)
        assert config.intermediate_size == inner[name]
        assert parameters(config) == pytest.approx(rounded, rel=0.03)
    assert LlamaGenConfig.preset("LlamaGen-B") == LlamaGenConfig()
    for downscale, widths in {16: (128, 128, 256, 256, 512), 8: (128, 256, 256, 512)}.items():
        codes = VQModelConfig(block_out_channels=widths)
        assert codes.downscale == downscale
        count = parameter_count(abstract(VQModel, codes)[1])
        assert count == pytest.approx({16: 72e6, 8: 70e6}[downscale], rel=0.02)
    with pytest.raises(ValueError, match="no preset 'M'; they are B, L"):
        LlamaGenConfig.preset("M")


# --- parity ---------------------------------------------------------------------------------------


def config_of(**changes):
    config = {
        "_class_name": "LlamaGen",
        "grid": GRID,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "intermediate_size": 24,
        "num_classes": 5,
        "vocab_size": 40,
        "caption_tokens": 6,
    }
    return {**config, **changes}


@pytest.mark.parametrize("kind", ["classes", "captions"])
def test_logits_and_samples_equal_plain_torch(kind, tmp_path):
    """Teacher-forced logits; and guided greedy samples, token by token through the cache."""
    torch = pytest.importorskip("torch")
    from tests.models import llamagen_reference as reference

    channels = 10 if kind == "captions" else 0
    sd = reference.random_model(channels=channels)
    torch.save({"module": sd, "steps": 3}, tmp_path / "model.pt")
    changes = {"num_classes": 0, "caption_channels": 10} if channels else {}
    (tmp_path / "config.json").write_text(json.dumps(config_of(**changes)))
    forward, params = from_pretrained(tmp_path / "model.pt", progress=False)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(40, (2, GRID**2), generator=random)
    options = {"heads": 2, "grid": GRID}
    if channels:
        states = torch.randn(2, 6, channels, generator=random)
        mask = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
        condition, null = states, sd["cls_embedding.uncond_embedding"][None].repeat(2, 1, 1)
        options["mask"] = mask
        cond = Caption(*map(jnp.asarray, (states.numpy(), mask.bool().numpy(), np.zeros(2, bool))))
    else:
        condition, null = torch.tensor([3, 0]), torch.tensor([5, 5])
        cond = jnp.asarray(condition.numpy(), jnp.int32)
    first = 5 if channels else 0
    wanted = reference.logits_of(sd, condition, tokens[:, :-1], **options)[:, first:]
    given = jnp.asarray(tokens.numpy(), jnp.int32)
    got = jax.jit(logits_of)(forward, params, given, cond)
    chex.assert_trees_all_close(got, wanted.numpy(), atol=1e-4)

    drawn = reference.greedy(sd, condition, null, scale=3.0, interval=5, **options)
    codes = testing.tiny_vq_model()
    loop = NextToken(codes, (GRID, GRID), guidance=3.0, guidance_interval=5, top_k=1)
    _, own = sample(loop, forward, params, cond, jax.random.key(0))
    np.testing.assert_array_equal(own, drawn.numpy())


def test_a_released_file_tells_all_but_the_size_of_images(tmp_path):
    torch = pytest.importorskip("torch")
    from tests.models import llamagen_reference as reference

    sd = reference.random_model(depth=1, width=768)
    torch.save({"model": sd}, tmp_path / "c2i.pt")
    forward, params = from_pretrained(tmp_path / "c2i.pt", progress=False)
    shape = {"num_layers": 1, "vocab_size": 40, "intermediate_size": 24}
    assert forward.config == LlamaGenConfig(num_classes=5, **shape)
    convert(tmp_path / "c2i.pt", tmp_path / "again", progress=False)
    again = from_pretrained(tmp_path / "again", progress=False)
    assert again[0] == forward
    chex.assert_trees_all_equal(again[1], params)
    sd = reference.random_model(depth=1, width=768, channels=12)
    torch.save(sd, tmp_path / "t2i.pt")
    forward, _ = from_pretrained(tmp_path / "t2i.pt", progress=False)
    text = {"num_classes": 0, "caption_channels": 12, "caption_tokens": 6}
    assert forward.config == LlamaGenConfig(**text, **shape)
    torch.save(reference.random_model(depth=1, width=20), tmp_path / "other.pt")
    with pytest.raises(ValueError, match="cannot tell the number of heads from width 20"):
        from_pretrained(tmp_path / "other.pt", progress=False)


@pytest.mark.parametrize("widths", [(32, 64), (32, 32, 64)])
def test_the_vq_model_equals_plain_torch(widths, tmp_path):
    """Images to tokens and tokens to images, from a file alone; and written once more."""
    torch = pytest.importorskip("torch")
    from tests.models import llamagen_reference as reference

    sd = reference.random_codes(widths=widths)
    torch.save({"model": sd}, tmp_path / "vq.pt")
    forward, params = from_pretrained(tmp_path / "vq.pt", progress=False)
    assert forward.config == VQModelConfig(
        encoder_channels=12, vocab_size=40, block_out_channels=widths, layers_per_block=1
    )
    side = 4 * forward.config.downscale
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    wanted = reference.tokens_of(sd, images)
    tokens = jax.jit(encode)(forward, params, jnp.asarray(images.permute(0, 2, 3, 1).numpy()))
    np.testing.assert_array_equal(tokens, wanted.numpy())

    @jax.jit
    def images_of(params, tokens):
        return decode(forward, params, latents_of(forward, params, tokens, (4, 4)))

    wanted = reference.images_of(sd, wanted, 4).permute(0, 2, 3, 1).numpy()
    chex.assert_trees_all_close(images_of(params, tokens), wanted, atol=2e-4)
    convert(tmp_path / "vq.pt", tmp_path / "again", progress=False)
    again = from_pretrained(tmp_path / "again", progress=False)
    assert again[0] == forward
    chex.assert_trees_all_equal(again[1], params)


# --- the loop -------------------------------------------------------------------------------------


def test_positions_have_two_axes_and_the_condition_none():
    """By the angles of each token; and heads of the condition are zero."""
    rotary = RasterRotary(8, theta=100.0, condition=2, columns=3)
    x = jnp.ones((1, 8, 1, 8))
    turned = np.asarray(rotary(x, jnp.arange(8)[None]))[0, :, 0].reshape(8, 4, 2)
    rates = np.array([1.0, 0.1])
    for place in range(6):
        row, column = divmod(place, 3)
        angles = np.concatenate([row * rates, column * rates])
        wanted = np.stack([np.cos(angles) - np.sin(angles), np.cos(angles) + np.sin(angles)], -1)
        np.testing.assert_allclose(turned[2 + place], wanted, atol=1e-6)
    assert not turned[:2].any()
    with pytest.raises(ValueError, match="positions have 2 rows"):
        rotary(x, jnp.zeros((1, 2, 8), jnp.int32))


@pytest.mark.parametrize("kind", ["subject", "captioned"])
def test_cached_calls_give_what_one_call_gives(kind, request):
    """At every token; and several tokens in a call give what they give one by one."""
    subject = request.getfixturevalue(kind)
    forward, params, cond = subject.forward, subject.params, subject.cond
    loop = dataclasses.replace(subject.sampler, guidance=None)

    @jax.jit
    def both(params):
        carry = loop.init(forward, params, cond, jax.random.key(1))
        out, _, state = loop.network(forward, params, carry.state, carry.x, cond, None, 0)
        carry = loop.update(carry._replace(state=state), out, 0)

        def body(carry, step):
            out, _, state = loop.network(forward, params, carry.state, carry.x, cond, None, step)
            return loop.update(carry._replace(state=state), out, step), out

        last, later = jax.lax.scan(body, carry, jnp.arange(1, loop.calls))
        logits = jnp.concatenate([out, later[:, :, 0].swapaxes(0, 1)], axis=1)
        whole = logits_of(forward, params, last.x, cond)
        # Three drafts at once, of which the cache forgets two: then their places are read again.
        ready = loop.cached(forward, loop_condition)
        places = positions_of(cond, loop_condition, 3, 20)
        draft = last.x.at[:, 1:3].set(0)[:, :3]
        several, state = ready(params, state, draft, places, step=1)
        places = positions_of(cond, loop_condition + 1, 2, 20)
        again, _ = ready(params, state, last.x[:, 1:3], places, step=1)
        return logits, whole, several, again, last.x

    loop_condition = 1 if kind == "subject" else 6
    cached, whole, several, again, tokens = both(params)
    chex.assert_trees_all_close(cached, whole, atol=1e-4)
    chex.assert_trees_all_close(several[:, :1], whole[:, 1:2], atol=1e-4)
    chex.assert_trees_all_close(again, whole[:, 2:4], atol=1e-4)
    # A prompt does not depend on what stands in its padding.
    if kind == "captioned":
        other = cond._replace(states=jnp.where(cond.mask[..., None], cond.states, 9.0))
        _, same = sample(loop, forward, params, other, jax.random.key(1))
        chex.assert_trees_all_equal(same, tokens)


@pytest.mark.parametrize(
    "tiny", [testing.tiny_llamagen, testing.tiny_chameleon, testing.tiny_nbp, testing.tiny_nar]
)
def test_one_call_stands_for_a_run(tiny):
    """Its outputs are the logits of the tokens that the run drew, of both branches."""
    subject = tiny(num_layers=1)
    loop, forward, params, cond = subject.sampler, subject.forward, subject.params, subject.cond
    away = loop.unconditional(forward, cond)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 16)).astype(np.int32))
    inputs = loop.whole(Carry(tokens, (), {}, jax.random.split(jax.random.key(0))), cond, away)
    whole = loop.joined.split(jax.jit(forward)(params, {}, *inputs)[0])
    logits = jax.jit(loop.logits)
    for name, each in {"cond": cond, "uncond": away}.items():
        wanted, got = logits(forward, params, tokens, each), whole[name]
        if tiny is testing.tiny_nbp:  # the first block is read token by token
            wanted, got = wanted[:, 4:], got[:, 1:]
        elif tiny is testing.tiny_nar:  # the first and the last token, by what is beside them
            right, below = jnp.split(got, 2, axis=-1)
            wanted = wanted[:, [0, -1]]
            got = (right[:, [0, -1]] + below[:, [0, -2]]) / 2
        got = got[:, -wanted.shape[1] :]
        got = got if loop.ids is None else got[..., loop.ids]
        chex.assert_trees_all_close(got, wanted, atol=1e-5)


def test_a_calibration_along_the_calls_sees_what_one_call_does():
    """Behind prompts of several lengths, which differ by branch."""
    subject = testing.tiny_chameleon(num_layers=1)
    loop, forward, params, cond = subject.sampler, subject.forward, subject.params, subject.cond
    options = {"key": jax.random.key(0), "progress": False}
    found = vidit_q.calibrate(vidit_q.uniform(8), forward, params, loop, cond, **options)
    away = loop.unconditional(forward, cond)
    tokens = jax.jit(loop.tokens)(forward, params, cond, jax.random.key(0))[0]
    inputs = loop.whole(Carry(tokens, (), {}, jax.random.split(jax.random.key(0))), cond, away)
    read = partial(tap, forward, kind=Linear, pattern=r"blocks\.0\..*", what="input")
    seen = jax.jit(read)(params, inputs=inputs)
    assert set(found) == set(seen)
    for path, value in seen.items():
        chex.assert_trees_all_close(found[path][0], jnp.abs(value).max((0, 1)), atol=1e-5)


def test_one_program_for_all_labels_keys_and_guidance(subject):
    traces = []

    @jax.jit
    def run(loop, forward, params, labels, keys):
        traces.append(None)
        return loop.sample(forward, params, labels, keys)

    keys, found = jax.random.split(jax.random.key(0), 2), []
    for guidance, interval, top_p, change in [
        (1.0, 99, 0.9, 0),
        (4.0, 99, 0.9, 1),
        (4.0, 0, 0.9, 1),
    ]:
        numbers = {"guidance": guidance, "guidance_interval": interval, "top_p": top_p}
        loop = dataclasses.replace(subject.sampler, temperature=1.0, **numbers)
        labels = (subject.cond + change) % 5
        found.append(run(loop, subject.forward, subject.params, labels, keys)[1])
    # A sample does not depend on its neighbor.
    other = run(loop, subject.forward, subject.params, labels.at[0].set(4), keys.at[0].set(keys[1]))
    assert len(traces) == 1
    assert (found[0] != found[1]).any()
    chex.assert_trees_all_equal(found[2][1], other[1][1])
    # Guidance of 1, and an interval of no token, are as no guidance, which costs half; the loop on
    # the host is the same; a null label is what is not guided towards.
    loop = dataclasses.replace(subject.sampler, guidance=None)
    pair = subject.forward, subject.params
    latents, tokens = loop.stepwise(*pair, subject.cond, keys)
    chex.assert_trees_all_equal(tokens, found[0])
    chex.assert_trees_all_close(latents, latents_of(*loop.vae, tokens, loop.grid))
    _, plain = sample(loop, *pair, labels, keys)
    chex.assert_trees_all_equal(plain, found[2])
    assert loop.unconditional(subject.forward, labels) is None
    chex.assert_trees_all_equal(
        subject.sampler.unconditional(subject.forward, labels), jnp.full(2, 5)
    )


def test_what_is_drawn(subject):
    """Temperature, top-k and top-p from their definitions."""
    loop = dataclasses.replace(subject.sampler, guidance=None, temperature=0.5, top_k=5, top_p=0.8)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 40)), jnp.float32)
    got = np.asarray(loop.log_probs(logits))
    for row in np.ndindex(2, 3):
        z = np.asarray(logits[row], np.float64) / 0.5
        kept = np.argsort(-z)[:5]
        shares = np.exp(z[kept]) / np.exp(z[kept]).sum()
        kept = kept[: int(np.sum(np.cumsum(shares) < 0.8)) + 1]
        wanted = np.full(40, -np.inf)
        wanted[kept] = z[kept] - np.log(np.exp(z[kept]).sum())
        np.testing.assert_allclose(got[row], wanted, atol=1e-5)


# --- cost -----------------------------------------------------------------------------------------


def test_cost_is_that_of_the_formulas(subject):
    """Linear layers, the head, and attention of later tokens to the slots of the cache."""
    config = subject.forward.config
    cost = sampler_cost(subject.sampler, subject.forward, subject.params, subject.cond)
    rows, tokens, width = 2 * 2, config.image_tokens, config.hidden_size
    linear = 2 * (4 * width**2 + 3 * width * config.intermediate_size) * config.num_layers
    head = 2 * width * config.vocab_size
    attention = 4 * width * config.num_layers * (1 + (tokens - 1) * tokens)
    assert cost.scope("attention").flops == rows * attention
    assert cost.flops == rows * (tokens * (linear + head) + attention)


# --- methods --------------------------------------------------------------------------------------


def test_weights_and_caches_are_compressed(subject):
    """As on a language model: values of 8 bits, a cache of 4, one that forgets."""
    moa, args = methods()["moa"], (subject.cond, jax.random.key(0))
    dense = state_bytes(begin(lambda *pair: pair, subject).state)
    for transform, share in (
        (round_to_nearest.transform(round_to_nearest.uniform(4, 16)), 1.0),
        (kivi.transform(kivi.KIVIPlan(group=4)), 0.95),
        (streaming_llm.transform(streaming_llm.StreamingLLMPlan(capacity=5, sinks=1)), 0.35),
        (moa.transform(moa.ladder(subject)[-1]), 0.9),
    ):
        latents, tokens = sample(
            subject.sampler, *transform(subject.forward, subject.params), *args
        )
        chex.assert_tree_all_finite(latents)
        assert 0 <= int(tokens.min()) <= int(tokens.max()) < 40
        assert state_bytes(begin(transform, subject).state) <= share * dense


def begin(transform, subject):
    """What a loop begins with, on a transformed model."""
    pair = transform(subject.forward, subject.params)
    return subject.sampler.init(*pair, subject.cond, jax.random.key(0))


def test_methods_that_do_not_apply_are_refused(subject):
    for name, message in (
        ("even_steps", "even_steps keeps what a call computed for the next one"),
        ("knorm", "knorm drops tokens of a prompt, and the prompt of this model is one label"),
        ("ada_kv", "ada_kv drops tokens of a prompt"),
        ("cskv", "cskv rotates rebuilt keys by their places in a text"),
        ("faster_cache", "LlamaGen has no attention that faster_cache caches"),
    ):
        method = methods()[name]
        plan = method.plan() if name == "even_steps" else method.ladder(method.tiny())[0]
        with pytest.raises(ValueError, match=message):
            begin(method.transform(plan), subject)


# --- errors ---------------------------------------------------------------------------------------


def test_bad_input(subject, captioned):
    forward, params, loop = subject.forward, subject.params, subject.sampler
    labels, key = subject.cond, jax.random.key(0)

    def refuse(message, kind=ValueError, **changes):
        with pytest.raises(kind, match=message):
            dataclasses.replace(loop, **changes).init(forward, params, labels, key)

    refuse(r"has 4 rows and 4 columns of tokens, and the loop is for \(4, 5\)", grid=(4, 5))
    refuse(r"top_k must be 1 \.\.\. 40, the number of codes", top_k=41)
    refuse("with its VQModel, got LlamaGen and LlamaGen", vae=(forward, params))
    refuse("the VQ model has 39 codes", vae=testing.tiny_vq_model(vocab_size=39))
    with pytest.raises(TypeError, match="key must come from"):
        loop.init(forward, params, labels, jnp.arange(2))
    tokens = jnp.zeros((2, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"conditioned on labels 0 \.\.\. 5; got captions"):
        logits_of(forward, params, tokens, captioned.cond)
    with pytest.raises(ValueError, match=r"conditioned on captions of \[6, 12\]; got labels"):
        logits_of(captioned.forward, captioned.params, tokens, labels)
    short = jax.tree.map(lambda x: x[:, 1:] if x.ndim > 1 else x, captioned.cond)
    with pytest.raises(ValueError, match=r"got captions of \[5, 12\]"):
        logits_of(captioned.forward, captioned.params, tokens, short)
    with pytest.raises(ValueError, match="head_dim that 4 divides"):
        LlamaGenConfig(head_dim=6)
    with pytest.raises(ValueError, match="give num_classes or caption_channels"):
        LlamaGenConfig(caption_channels=3)
    whole = forward.layout(params, jnp.zeros((2, 16), jnp.int32), None, None, None, None, labels)
    assert whole == Layout(
        grid=(1, 4, 4), text=1, text_first=True, changed_by="a call of a part of the image"
    )
