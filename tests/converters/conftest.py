"""Small models and checkpoints, made without torch."""

import jax.numpy as jnp
import numpy as np
import pytest

import converters
from effjax import testing
from effjax.forward import abstract, flatten_params, nest_params
from effjax.models.dit import DiT, DiTConfig
from effjax.models.t5 import T5Encoder
from tests.converters.formats import T5

CONFIG = DiTConfig(
    sample_size=8, patch_size=2, num_layers=2, num_heads=2, head_dim=8, num_classes=5
)


def random_params(params, seed=0, dtype=None):
    """Parameters of the same shapes without any zeros."""
    rng = np.random.default_rng(seed)
    return nest_params(
        {
            path: jnp.asarray(0.1 * rng.standard_normal(leaf.shape), dtype or leaf.dtype)
            for path, leaf in flatten_params(params).items()
        }
    )


@pytest.fixture(scope="session")
def dit():
    """Forward and parameters of a tiny DiT."""
    forward, shapes = abstract(DiT, CONFIG)
    return forward, random_params(shapes)


@pytest.fixture
def saved(dit, tmp_path):
    """The tiny DiT as a diffusers directory."""
    converters.save_pretrained(*dit, tmp_path / "saved")
    return tmp_path / "saved"


def assert_equal_params(given, expected):
    given, expected = flatten_params(given), flatten_params(expected)
    assert list(given) == list(expected)
    for path, leaf in expected.items():
        assert given[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(given[path], leaf, err_msg=path)


@pytest.fixture(scope="module")
def t5():
    """Forward and parameters of the encoder whose layers are quantized."""
    forward, shapes = abstract(T5Encoder, T5)
    return forward, testing.random_params(shapes)
