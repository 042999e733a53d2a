"""T5's encoder in float16, whose range it leaves: near float32, and near transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters.t5 import TRANSFORMERS, write_config
from effjax import testing
from effjax.forward import abstract, flatten_params, nest_params
from effjax.models.t5 import T5Config, T5Encoder

CONFIG = T5Config(
    vocab_size=40, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, head_dim=8
)
IDS = np.arange(12, dtype=np.int32)[None]
MASK = np.arange(12)[None] < 10


def large_params(last):
    """Parameters whose MLPs return values above 65504, float16's largest."""
    _, shapes = abstract(T5Encoder, CONFIG)
    flat = flatten_params(testing.random_params(shapes))
    factors = {"mlp.gate.kernel": 30, "mlp.up.kernel": 30, "mlp.down.kernel": last}
    for path in flat:
        flat[path] *= next((f for end, f in factors.items() if path.endswith(end)), 1)
    return nest_params(jax.tree.map(lambda leaf: leaf.astype(jnp.float16), flat))


def encode(dtype, params):
    config = dataclasses.replace(CONFIG, dtype=dtype, param_dtype="float16")
    states, _ = jax.jit(abstract(T5Encoder, config)[0])(params, {}, IDS, MASK)
    assert states.dtype == dtype
    return np.asarray(states, np.float32)[0, :10]


def test_float16_is_near_float32():
    params = large_params(100)
    expected = encode("float32", params)
    np.testing.assert_allclose(encode("float16", params), expected, atol=0.02)
    np.testing.assert_allclose(encode("bfloat16", params), expected, atol=0.15)
    # Gates and inputs whose product alone is above 65504.
    for block in params["blocks"].values():
        block["mlp"]["gate"]["kernel"] *= 30
        block["mlp"]["up"]["kernel"] *= 30
    np.testing.assert_allclose(encode("float16", params), encode("float32", params), atol=0.02)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_float16_is_near_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    params = large_params(100)
    flat = flatten_params(params)
    binding = TRANSFORMERS.bind(flat)
    weights = {
        name: torch.tensor(binding.assemble(name, lambda path: np.asarray(flat[path])))
        for name in binding.sources
    }
    settings = {k: v for k, v in write_config(CONFIG).items() if k != "architectures"}
    model = transformers.T5EncoderModel(transformers.T5Config(**settings)).eval().half()
    model.load_state_dict(weights, strict=False)
    for block in model.encoder.block:  # as loading in float16 does
        block.layer[1].DenseReluDense.wo.float()
    with torch.no_grad():
        states = model(torch.tensor(IDS), torch.tensor(MASK).long()).last_hidden_state
    expected = states[0, :10].float().numpy()
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(encode("float16", params), expected, atol=0.02)
