"""What a pipeline is loaded from, and how: dtypes, components, variants, repositories."""

import jax
import jax.numpy as jnp

import converters
import effjax
from tests.test_text_pipeline import write_language_model


def test_caches_have_the_dtype_of_the_computation(tmp_path):
    write_language_model(tmp_path / "wide")
    converters.convert(tmp_path / "wide", tmp_path / "half", dtype="bfloat16", progress=False)
    (tmp_path / "half" / "model.safetensors").replace(tmp_path / "wide" / "model.safetensors")
    for asked, computed in (({}, "bfloat16"), ({"compute_dtype": "float32"}, "float32")):
        pipe = effjax.pipeline(tmp_path / "wide", progress=False, **asked)
        assert {leaf.dtype for leaf in jax.tree.leaves(pipe.params)} == {jnp.dtype("bfloat16")}
        state = pipe.compress("a b c", new=4).state
        held = {leaf.dtype for leaf in state.values() if leaf.dtype.kind not in "iub"}
        assert held == {jnp.dtype(computed)}
