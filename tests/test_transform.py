"""Chains, identity, recipes, saving and loading."""

import json

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import effjax
from effjax import testing
from effjax.methods import dit_fast_attn
from effjax.registry import method, methods, model, models
from effjax.transform import Method, chain, identity
from tests.test_forward import MemoryPatch


@pytest.fixture(scope="module")
def subject():
    return testing.tiny_dit()


def plan_for(subject, *pattern):
    return dit_fast_attn.uniform(pattern, layers=2, calls=subject.sampler.calls, tokens=64)


def test_chain_composes_from_left_to_right_and_identity_is_neutral(subject):
    log = []

    def note(name):
        def transform(forward, params):
            log.append(name)
            return forward, params

        return transform

    pair = (subject.forward, subject.params)
    assert chain(note("a"), chain(note("b"), note("c")))(*pair) == pair
    assert log == ["a", "b", "c"]
    transform = dit_fast_attn.transform(plan_for(subject, 1))
    assert chain()(*pair) == identity(*pair) == pair
    assert chain(identity, transform)(*pair) == transform(*pair) == chain(transform)(*pair)


def test_chained_is_nested(subject):
    """A chain of transforms equals applying them one after the other, associatively."""
    a = effjax.chain(dit_fast_attn.transform(plan_for(subject, 1)))
    left, _ = chain(chain(identity, a), identity)(subject.forward, subject.params)
    right, _ = chain(identity, chain(a, identity))(subject.forward, subject.params)
    assert left == right


def test_two_plans_for_the_same_attention_are_refused(subject):
    transform = dit_fast_attn.transform(plan_for(subject, 1))
    forward, params = chain(transform, transform)(subject.forward, subject.params)
    x = jnp.ones((2, 16, 16, 4))
    with pytest.raises(ValueError, match="both replace the internals"):
        forward.init(params, x, jnp.ones(2), subject.cond)


def test_the_registry_finds_methods_and_models():
    assert isinstance(methods()["dit_fast_attn"], Method)
    assert method("dit_fast_attn") is dit_fast_attn.METHOD
    assert model("DiT") is models()["DiT"]
    with pytest.raises(ValueError, match=r"no method 'nope'; there are .*dit_fast_attn"):
        method("nope")
    with pytest.raises(ValueError, match=r"no model 'nope'; there are .*DiT"):
        model("nope")
    with pytest.raises(AttributeError, match="no method 'nope'"):
        effjax.methods.nope  # noqa: B018


def test_shards_and_dtypes_round_trip(subject, tmp_path):
    params = {**subject.params, "label": {"embedding_table": jnp.ones((6, 16), jnp.bfloat16)}}
    effjax.save(tmp_path / "m", subject.forward, params, max_shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "m").iterdir())
    assert sum(name.startswith("model-") for name in files) > 2
    forward, loaded = effjax.load(tmp_path / "m")
    assert forward == subject.forward
    chex.assert_trees_all_equal(loaded, params)
    chex.assert_trees_all_equal_dtypes(loaded, params)


def test_saving_is_atomic(subject, tmp_path):
    with pytest.raises(ValueError, match="recipe"):
        effjax.save(tmp_path / "m", subject.forward.patch(MemoryPatch("blocks.0")), subject.params)
    with pytest.raises(ValueError, match=r"at\(step\)"):
        effjax.save(tmp_path / "m", subject.forward.at(1), subject.params)
    broken = {**subject.params, "patch": {"kernel": object(), "bias": object()}}
    with pytest.raises((TypeError, AttributeError, ValueError)):
        effjax.save(tmp_path / "m", subject.forward, broken)
    assert not list(tmp_path.iterdir())
    effjax.save(tmp_path / "m", subject.forward, subject.params)
    with pytest.raises(ValueError, match="not empty"):
        effjax.save(tmp_path / "m", subject.forward, subject.params)
    effjax.load(tmp_path / "m")


@pytest.fixture
def saved(subject, tmp_path):
    effjax.save(tmp_path / "m", subject.forward, subject.params)
    return tmp_path / "m"


def test_damaged_models_are_explained(saved, tmp_path):
    with pytest.raises(ValueError, match=r"no directory that effjax\.save wrote"):
        effjax.load(tmp_path)

    tensors = load_file(saved / "model.safetensors")
    changed = {name: value for name, value in tensors.items() if name != "patch.bias"}
    changed["label.embedding_table"] = changed["label.embedding_table"][:3]
    changed["extra"] = changed["final.proj.bias"]
    save_file(changed, saved / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit") as error:
        effjax.load(saved)
    save_file(
        {
            **tensors,
            "patch.bias": tensors["patch.bias"].astype(np.int32),
            "final.proj.bias": tensors["final.proj.bias"].astype(bool),
            "final.proj.kernel": tensors["final.proj.kernel"].astype(np.float16),
        },
        saved / "kinds.safetensors",
    )
    for part in ("missing: patch.bias", "misshapen: label.embedding_table", "unexpected: extra"):
        assert part in str(error.value)

    (saved / "kinds.safetensors").replace(saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"2 problems") as error:
        effjax.load(saved)
    for part in ("patch.bias is int32, must be float32", "final.proj.bias is bool, must"):
        assert f"mistyped: {part}" in str(error.value)

    content = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="truncated"):
        effjax.load(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model\.safetensors"):
        effjax.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "Nope"}, "no model 'Nope'"),
        ({"depth": 3}, r"unknown fields \['depth'\]"),
        ({"patch_size": 3}, "multiple of patch_size"),
        ({"num_layers": 0}, "at least 1"),
    ],
)
def test_bad_configurations_are_explained(saved, change, message):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        effjax.load(saved)


def test_bad_recipes_are_explained(saved):
    (saved / "recipe.json").write_text("[{")
    with pytest.raises(ValueError, match="not valid JSON"):
        effjax.load(saved)
    (saved / "recipe.json").write_text('{"steps": [{"method": "magic", "plan": {}}]}')
    with pytest.raises(ValueError, match="no method 'magic'"):
        effjax.load(saved)
    plan = {"strategies": [[0, 1]], "tokens": 64, "window": 8}
    recipe = {"steps": [{"method": "dit_fast_attn", "plan": plan}]}
    (saved / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match="the plan has 1 layers"):
        effjax.load(saved)
