"""Models of codes whose logits are NaN: no token, and an image that warnings see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import testing
from effjax.finite import NotFiniteWarning, token_or_none
from effjax.generate import JacobiDecoding
from effjax.layers.autoencoder import codes_at
from effjax.pipelines import NextTokenPipeline


def test_what_is_no_token():
    logits = jnp.array([[0.0, 1.0], [0.0, -jnp.inf], [jnp.nan, 1.0], [jnp.inf, 0.0]])
    tokens = token_or_none(jnp.array([1, 0, 1, 0]), logits)
    np.testing.assert_array_equal(tokens, [1, 0, -1, -1])
    vectors = codes_at(tokens[None], jnp.eye(2))[0]
    np.testing.assert_array_equal(jnp.isnan(vectors).any(-1), [False, False, True, True])


CASES = {
    "next_scale": (testing.tiny_var, {}),
    "next_token": (testing.tiny_llamagen, {}),
    "decoder": (testing.tiny_llamagen, {"decoder": JacobiDecoding(window=3)}),
    "next_diagonal": (testing.tiny_nar, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_of_two_images_one_is_not_finite(case):
    make, changes = CASES[case]
    subject = make()
    label = jax.tree.map(lambda table: table.at[1].set(jnp.nan), subject.params["label"])
    params = {**subject.params, "label": label}
    loop = dataclasses.replace(subject.sampler, **changes)
    keys = jax.random.split(jax.random.key(0))
    latents, tokens = jax.jit(loop.sample)(subject.forward, params, jnp.array([0, 1]), keys)
    assert jnp.isfinite(latents[0]).all()
    assert (tokens[0] >= 0).all()
    assert jnp.isnan(latents[1]).any()
    assert (tokens[1] == -1).any()


def test_a_pipeline_warns_of_it():
    subject = testing.tiny_llamagen()
    params = jax.tree.map(lambda leaf: leaf * jnp.nan, subject.params)
    pipe = NextTokenPipeline(subject.forward, params, subject.sampler.vae)
    with pytest.warns(NotFiniteWarning, match="sampled images: "):
        pipe([1], key=jax.random.key(0), output_type="np", progress=False)
