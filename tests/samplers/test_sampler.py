"""The sampling loop on a tiny DiT: both forms, guidance, state, keys and meshes.

Most tests share one sampler and one forward, so that few programs are compiled.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.context import State
from effjax.forward import abstract
from effjax.guidance import Guidance
from effjax.layers.stack import Stack
from effjax.loops import Carry
from effjax.models.dit import DiT, DiTConfig
from effjax.samplers import DDIM, DDPM, DPMSolver, Sampler, sample_keys
from effjax.samplers.sampler import _compiled_step
from effjax.targets import Wrapper, target_modules, wrap

NULL = 5
SAMPLER = Sampler(DDPM(steps=3, variance="learned_range"), guidance=3.0)
PLAIN = Sampler(DDIM(steps=2))

program = functools.cache(jax.jit)  # of a sampler; equal samplers share it


def fused(sampler, *args):
    return program(sampler)(*args)


class Trail(Wrapper):
    """Adds a share of what the wrapped module returned at the calls before."""

    def __init__(self, inner):
        super().__init__(inner)
        self.trail = State()

    def __call__(self, x, *rest):
        out = self.inner(x, *rest)
        trail = self.trail.read(out.shape, out.dtype)
        self.trail.write(0.5 * trail + out)
        return out + 0.1 * trail


def remember(module, context):
    for target in target_modules(module, Stack):
        wrap(module, target.path, Trail)


@pytest.fixture(scope="module")
def model():
    """A stateful forward and its parameters."""
    config = DiTConfig(num_layers=1, num_heads=2, head_dim=8, num_classes=NULL, sample_size=8)
    forward, shapes = abstract(DiT, config)
    rng = np.random.default_rng(0)
    # Not as a new DiT, which returns zeros: its gates and its last layer start at zero.
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype), shapes
    )
    return forward.patch(remember), params


def assert_close(a, b, atol=1e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol * max(1.0, np.abs(b).max()))


def labels(count=3):
    return jnp.asarray(np.array([0, 3, 1, 4, 2, 2, 0, 3])[:count], jnp.int32)


@pytest.mark.parametrize(
    "sampler", [SAMPLER, Sampler(DPMSolver(steps=4), guidance=3.0)], ids=["ddpm", "dpm_solver"]
)
def test_both_forms_give_the_same_samples(model, key, sampler):
    images = fused(sampler, *model, labels(), key)
    assert images.shape == (3, 8, 8, 4)
    assert images.dtype == jnp.float32
    assert np.isfinite(images).all()

    before, seen = _compiled_step._cache_size(), []
    options = {"progress": False, "callback": lambda step, x: seen.append((step, x))}
    host = sampler.stepwise(*model, labels(), key, **options)
    assert_close(host, images, 1e-6)
    assert [step for step, _ in seen] == list(range(sampler.calls))
    assert_close(seen[-1][1], images, 1e-6)
    assert not np.allclose(seen[0][1], images)  # still readable after the steps that followed

    sampler.stepwise(*model, labels() + 1, jax.random.key(9), **options)
    assert _compiled_step._cache_size() == before + 1


@pytest.mark.parametrize("buckets", [None, (2,)], ids=["whole", "in parts"])
def test_a_callback_may_change_the_samples(model, key, buckets):
    """What it returns is where the next step starts; other rows go on as they would."""
    options = {"progress": False, "buckets": buckets}
    plain, seen = SAMPLER.stepwise(*model, labels(), key, **options), []

    def first_again(step, x):
        seen.append(np.asarray(x))
        return x.at[1].set(x[0]) if step == 1 else None

    changed = SAMPLER.stepwise(*model, labels(), key, callback=first_again, **options)
    assert_close(changed[::2], plain[::2], 1e-6)
    assert not np.allclose(changed[1], plain[1])
    same = SAMPLER.stepwise(*model, labels(), key, callback=lambda _, x: np.asarray(x), **options)
    assert_close(same, plain, 1e-6)
    with pytest.raises(ValueError, match=r"latents of a callback must be float\[3, 8, 8, 4\]: b"):
        SAMPLER.stepwise(*model, labels(), key, callback=lambda _, x: x[:2], **options)


def test_jit_of_a_sampler_is_one_program(model, key):
    fused(SAMPLER, *model, labels(), key)
    before = program(SAMPLER)._cache_size()
    fused(SAMPLER, model[0].patch(), model[1], labels() + 1, jax.random.key(1))
    assert program(SAMPLER)._cache_size() == before


def test_progress_bar(model, key, capsys):
    SAMPLER.stepwise(*model, labels(), key)
    assert "sampling: 100%" in capsys.readouterr().err
    SAMPLER.stepwise(*model, labels(), key, progress=False)
    assert capsys.readouterr().err == ""


def test_a_sample_does_not_depend_on_its_batch(model, key):
    eight = fused(SAMPLER, *model, labels(8), key)
    assert_close(fused(SAMPLER, *model, labels(3), key), eight[:3])
    later = sample_keys(key, 3, first=5)
    assert_close(fused(SAMPLER, *model, labels(8)[5:], later), eight[5:])
    assert not np.allclose(eight[1], eight[7])  # the same label, another key


@pytest.mark.parametrize("arrangement", [Guidance(), Guidance(("uncond", "cond"), paired=True)])
def test_the_pieces_make_the_loop(model, key, arrangement):
    """A caller's own loop; any arrangement gives the same samples."""
    sampler = dataclasses.replace(SAMPLER, arrangement=arrangement)
    uncond = jnp.full((3,), NULL, jnp.int32)
    carry = sampler.init(*model, labels(), key)
    assert carry.state["blocks.trail"].shape == (6, 16, 16)
    network, update = jax.jit(sampler.network), jax.jit(sampler.update)
    for step in range(sampler.calls):
        step = np.int32(step)
        out, raw, state = network(*model, carry.state, carry.x, labels(), uncond, step)
        assert raw.shape == (6, 8, 8, 8)
        c, u = (arrangement.branch(name, raw) for name in ("cond", "uncond"))
        assert_close(out[..., :4], u[..., :4] + 3.0 * (c[..., :4] - u[..., :4]))
        np.testing.assert_array_equal(out[..., 4:], c[..., 4:])
        carry = update(carry._replace(state=state), out, step)
    assert_close(carry.x, fused(SAMPLER, *model, labels(), key))


def test_segments_make_the_loop(model, key):
    run = jax.jit(functools.partial(Sampler.run, SAMPLER), static_argnames=("start", "stop"))
    carry = SAMPLER.init(*model, labels(), key)
    carry = run(*model, carry, labels(), start=0, stop=1)
    carry = run(*model, carry, labels(), start=1)
    assert_close(carry.x, fused(SAMPLER, *model, labels(), key))


@pytest.mark.parametrize(
    ("sampler", "batch"),
    [(PLAIN, 3), (Sampler(DDIM(steps=2), guidance=2.0, arrangement=Guidance(paired=True)), 6)],
    ids=["unguided", "guided"],
)
def test_what_the_network_sees(model, key, sampler, batch):
    forward, params = model
    seen = []
    watched = forward.patch(lambda _, context: seen.append((context.guidance, context.step)))
    carry = sampler.init(watched, params, labels(), key)
    expected = sampler.arrangement if batch == 6 else None
    assert {guidance for guidance, _ in seen} == {expected}

    uncond = sampler.unconditional(watched, labels())
    x, time, cond = sampler.inputs(carry.x, labels(), uncond, 1)
    assert (x.shape[0], time.shape, cond.shape) == (batch, (batch,), (batch,))
    np.testing.assert_array_equal(time, np.full(batch, sampler.schedule.times[1]))
    if batch == 6:
        np.testing.assert_array_equal(cond, [0, NULL, 3, NULL, 1, NULL])
        np.testing.assert_array_equal(x[::2], x[1::2])
        given = labels() + 1
        assert sampler.unconditional(watched, labels(), given) is given

    seen.clear()
    network = functools.partial(sampler.network, watched, step=1)
    jax.eval_shape(network, params, carry.state, carry.x, labels(), uncond)
    assert seen == [(expected, 1)]


def test_guidance_zero_is_unconditional(model, key):
    plain = fused(PLAIN, *model, labels(), key)
    null = fused(PLAIN, *model, jnp.full_like(labels(), NULL), key)
    assert_close(fused(dataclasses.replace(PLAIN, guidance=0.0), *model, labels(), key), null)
    assert not np.allclose(plain, null)


def test_initial_noise_is_unit_noise(model, key):
    carry = PLAIN.init(*model, jnp.zeros(64, jnp.int32), key)
    assert abs(float(carry.x.mean())) < 0.03
    assert abs(float(carry.x.std()) - 1) < 0.03


def test_four_devices_give_the_samples_of_one(model, key):
    forward, params = model
    sampler = dataclasses.replace(SAMPLER, arrangement=Guidance(paired=True))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    spread = (
        jax.device_put(params, whole),
        jax.device_put(labels(8), rows),
        jax.device_put(key, whole),
    )
    compiled = jax.jit(sampler).lower(forward, *spread).compile()
    for exchange in ("all-to-all", "all-gather", "collective-permute"):
        assert exchange not in compiled.as_text()
    images = compiled(forward, *spread)
    assert images.sharding.is_equivalent_to(rows, images.ndim)
    assert_close(images, fused(SAMPLER, forward, params, labels(8), key))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f, p, k: Sampler(DDIM(steps=2), guidance=-1.0), ValueError, "got -1.0"),
        (lambda f, p, k: Sampler(DDIM(steps=2), guidance=float("nan")), ValueError, "got nan"),
        (lambda f, p, k: Sampler(DDIM), TypeError, "schedule"),
        (lambda f, p, k: PLAIN(f, p, labels(), 0), TypeError, "key"),
        (lambda f, p, k: PLAIN(f, p, labels(), jax.random.PRNGKey(0)), TypeError, "random.key"),
        (lambda f, p, k: PLAIN(f, p, labels(), jax.random.split(k, 2)), ValueError, "of the 3"),
        (lambda f, p, k: PLAIN(f, p, [1, 2, 3], k), ValueError, "leading batch axis"),
        (lambda f, p, k: PLAIN(f, p, {}, k), ValueError, "leading batch axis"),
        (
            lambda f, p, k: PLAIN.run(f, p, Carry(*4 * [None]), labels(), start=3),
            ValueError,
            "start=3, stop=2",
        ),
        (lambda f, p, k: PLAIN(f.at(1), p, labels(), k), ValueError, "fixed at step 1"),
    ],
)
def test_errors(model, key, call, error, message):
    with pytest.raises(error, match=message):
        call(*model, key)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"guidance": True}, ValueError, "guidance must be a finite scale.*got True"),
        ({"guidance": "3"}, ValueError, "guidance must be.*got '3'"),
        ({"guidance": math.inf}, ValueError, "guidance must be.*got inf"),
        ({"arrangement": True}, TypeError, "arrangement must be a Guidance, got True"),
        ({"shape": (8, 8.0, 4)}, ValueError, r"shape must be a tuple.*got \(8, 8\.0, 4\)"),
        ({"shape": (8, 0, 4)}, ValueError, "whole numbers of at least 1"),
        ({"shape": ()}, ValueError, r"got \(\)"),
        ({"shape": [8, 8, 4]}, ValueError, "shape must be a tuple"),
    ],
)
def test_samplers_that_cannot_be(options, error, message, untyped):
    with pytest.raises(error, match=message):
        Sampler(DDIM(steps=2), **options)


def test_scales_of_numpy_guide_like_those_of_python(untyped):
    raw = jnp.arange(8, dtype=jnp.float32).reshape(4, 2)
    expected = Sampler(DDIM(steps=2), guidance=3.0).guide(raw, 2)
    for scale in (np.float32(3), np.float64(3), 3):
        np.testing.assert_array_equal(
            Sampler(DDIM(steps=2), guidance=scale).guide(raw, 2), expected
        )


@pytest.mark.parametrize(
    ("key", "message"),
    [(7, r"got 7; write jax\.random\.key\(7\)"), (np.zeros(2, np.uint32), "legacy key of uint32")],
)
def test_what_is_no_key(model, key, message, untyped):
    for call in (PLAIN, functools.partial(PLAIN.stepwise, progress=False)):
        with pytest.raises(TypeError, match=message):
            call(*model, labels(), key)


def test_noise_that_is_given(model, key):
    shape = (3, 8, 8, 4)
    noise = np.random.default_rng(0).standard_normal(shape)
    carry = PLAIN.init(*model, labels(), key, noise=noise)
    np.testing.assert_allclose(carry.x, PLAIN.schedule.initial_scale * noise, rtol=1e-6)
    options = {"noise": noise, "progress": False}
    other = PLAIN.stepwise(*model, labels(), jax.random.key(7), **options)  # DDIM draws no more
    assert_close(PLAIN.stepwise(*model, labels(), key, **options), other)
    for wrong in (noise[:2], noise.transpose(0, 3, 1, 2), np.zeros(shape, int)):
        with pytest.raises(ValueError, match=r"must be float\[3, 8, 8, 4\].*; got "):
            PLAIN(*model, labels(), key, noise=wrong)


def test_a_model_without_a_null_condition(model):
    bare = dataclasses.replace(model[0], config=("bare",))
    with pytest.raises(ValueError, match="tuple has no null condition: pass uncond="):
        SAMPLER.unconditional(bare, labels())
