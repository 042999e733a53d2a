"""Step caches make the decisions and the latents of diffusers' hooks and of cache-dit.

`tests/golden/make_step_caches.py` ran these, on the same weights from the same noise.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.calibration import Trajectory
from effjax.methods import (
    db_cache,
    faster_cache,
    fb_cache,
    mag_cache,
    pab,
    profiling_dit,
    taylor_seer,
)
from tests.golden import make_step_caches as peers


@functools.cache
def golden():
    return dict(np.load(peers.FILE))


def times(name):
    return tuple(float(time) for time in peers.SCHEDULES[name].times)


def transform_of(method, subject, name):
    """The same settings, and the mask where it is known before."""
    if method == "faster_cache":
        pair, data = (subject.forward, subject.params), subject.data(Trajectory)
        plan = faster_cache.search(faster_cache.Goals(), *pair, data)
        if plan.guided:
            assert drawn(plan.branches) == drawn(golden()[f"{method}/{name}/branches"])
        return faster_cache.transform(plan), plan.attention
    if method == "fb_cache":
        plan = fb_cache.FBCachePlan(threshold=peers.THRESHOLDS["fb_cache"])
        return fb_cache.transform(plan), None
    if method == "taylor_seer":
        plan = taylor_seer.TaylorSeerPlan(steps=28)
        return taylor_seer.transform(plan), plan.mask
    if method == "mag_cache":
        plan = mag_cache.MagCachePlan()
        return mag_cache.transform(plan), plan.mask
    if method == "pab":
        plan = pab.PABPlan(times(name))
        return pab.transform(plan), plan.mask(2)
    options = {"threshold": peers.THRESHOLDS["db_cache"], "first_blocks": 1, "last_blocks": 1}
    options["warmup"] = 2
    if method == "db_cache_bounded":
        options |= {**peers.BOUNDS, "threshold": peers.THRESHOLDS[method], "last_blocks": 0}
    if method == "db_cache_mask":
        options |= {"compute": db_cache.named("fast"), "policy": "static", "warmup": 8}
    plan = db_cache.DBCachePlan(**options)
    return db_cache.transform(plan), plan.mask


def drawn(mask):
    return "".join("#" if each else "." for each in mask)


RUNS = [(method, name) for method, names in peers.RUNS.items() for name in names]


@pytest.mark.parametrize(("method", "name"), RUNS)
def test_decisions_and_latents_are_those_of_the_peer(method, name):
    wanted = golden()[f"{method}/{name}/mask"]
    latents = golden()[f"{method}/{name}/latents"]
    guided = peers.guided(method, name)
    subject = peers.subject(name, scale=peers.SCALE if guided else 1.0)
    transform, mask = transform_of(method, subject, name)
    pair = transform(subject.forward, subject.params)
    noise, key = jnp.asarray(peers.start(name)), jax.random.key(0)
    sampler = subject.sampler
    if mask is None:
        step = jax.jit(sampler.step)
        carry, mask = sampler.init(*pair, subject.cond, key, noise=noise), []
        for index in range(peers.STEPS):
            before = carry.state["blocks.before"]
            carry = step(*pair, carry, subject.cond, None, jnp.int32(index))
            mask.append(bool(np.any(before != carry.state["blocks.before"])))
        got = carry.x
    else:
        got = jax.jit(sampler)(*pair, subject.cond, key, noise=noise, uncond=subject.uncond)
    assert drawn(mask) == drawn(wanted)
    scale = np.abs(latents).max()
    np.testing.assert_allclose(got / scale, latents / scale, atol=1e-4)
    dense = golden()[f"{'guided' if guided else 'dense'}/{name}"]
    assert np.abs(dense - latents).max() > 1e-2 * scale


def test_the_page_shows_the_masks():
    page = (Path(__file__).parents[2] / "docs" / "diffusion.md").read_text()
    for method in peers.RUNS:
        if method != "db_cache_bounded":
            assert drawn(golden()[f"{method}/flux/mask"]) in page, method
    for what in ("mask", "branches"):
        assert drawn(golden()[f"faster_cache/sd3/{what}"]) in page
    assert drawn(profiling_dit.ProfilingDiTPlan(blocks=(0,), steps=28).mask) in page
