"""DeepSeek-V2 and V3: parity with transformers, latent caches, what is read past."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import converters
from converters import deepseek
from effjax import testing
from effjax.caches import Caches, as_it_is
from effjax.calibration import Sequences
from effjax.forward import abstract
from effjax.generate import generate
from effjax.methods import (
    cskv,
    expected_attention,
    gptq,
    kivi,
    moa,
    round_to_nearest,
    snap_kv,
    streaming_llm,
)
from effjax.models.deepseek import DeepSeek, DeepSeekConfig
from tests.models.test_moe_llama import LENGTHS, SIZES, TOKENS, agrees

ALIKE = {
    **SIZES,
    "num_key_value_heads": 4,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "beta_fast": 32,
    "beta_slow": 1,
    "rope_theta": 10000.0,
}
CASES = {
    "V2-Lite": ("DeepseekV2", {"q_lora_rank": None, "topk_method": "greedy"}),
    "V2": (
        "DeepseekV2",
        {
            "q_lora_rank": 20,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 4.0,
        },
    ),
    "V3": (
        "DeepseekV3",
        {
            "q_lora_rank": 20,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 2,
            "rope_parameters": YARN,
            "attention_bias": True,
        },
    ),
}


def make(name, folder):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    kind, own = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**ALIKE, **own)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():  # the correction is a buffer
            if value.is_floating_point():
                value.add_(torch.randn_like(value) * (1.0 if "correction" in key else 0.2))
    model.save_pretrained(folder)
    return torch, model


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, *make(request.param, folder)


@pytest.mark.torch
def test_logits_and_texts_equal_those_of_transformers(made):
    agrees(*made[1:])


@pytest.mark.torch
def test_files_are_written_as_they_were(made, tmp_path):
    name, folder, *_ = made
    forward, params = converters.from_pretrained(folder, progress=False)
    converters.save_pretrained(forward, params, tmp_path / "copy", progress=False)
    one, two = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "copy"))
    chex.assert_trees_all_equal(two, one)
    again, _ = converters.from_pretrained(tmp_path / "copy", progress=False)
    assert again == forward
    written = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert written["architectures"] == [f"{CASES[name][0]}ForCausalLM"]
    half, leaves = converters.from_pretrained(folder, dtype="bfloat16", progress=False)
    router = leaves["blocks"]["1"]["mlp"]["router"]  # as transformers has it
    assert {leaf.dtype for leaf in jax.tree.leaves(router)} == {jnp.dtype("float32")}
    assert leaves["embed_tokens"].dtype == jnp.bfloat16
    logits, _ = jax.jit(half)(leaves, {}, TOKENS)
    assert logits.dtype == jnp.bfloat16
    if name != "V3":
        return
    # The released V3 predicts one more token with one more layer.
    more = {
        key.replace("layers.2.", "layers.3."): value
        for key, value in one.items()
        if "layers.2." in key
    }
    more["model.layers.3.eh_proj.weight"] = np.zeros((32, 64), np.float32)
    (tmp_path / "more").mkdir()
    save_file(one | more, tmp_path / "more" / "model.safetensors")
    (tmp_path / "more" / "config.json").write_text((folder / "config.json").read_text())
    past, same = converters.from_pretrained(tmp_path / "more", progress=False)
    assert past == forward
    chex.assert_trees_all_equal(same, params)


def tiny(**changes):
    config = DeepSeekConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=40,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        max_positions=64,
        num_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        sparse_layers=(False, True),
        q_lora_rank=None,
        kv_lora_rank=12,
        qk_nope_head_dim=10,
        v_head_dim=6,
        **changes,
    )
    forward, shapes = abstract(DeepSeek, config)
    return forward, testing.random_params(shapes)


def test_absorbed_is_expanded():
    """What follows a prompt meets latents in the cache; a whole text is expanded."""
    forward, params = tiny()
    given = jnp.asarray(TOKENS[:2])
    whole, _ = jax.jit(forward)(params, {}, given)
    cached = forward.patch(Caches(as_it_is)).with_cache_length(8, 4)
    first, state = cached(params, cached.init(params, given[:, :8]), given[:, :8], step=0)
    chex.assert_trees_all_close(first, whole[:, :8], atol=1e-5)
    for at, tokens in ((8, given[:, 8:9]), (9, given[:, 9:12])):
        places = jnp.broadcast_to(at + jnp.arange(tokens.shape[1]), tokens.shape)
        out, state = cached(params, state, tokens, places, step=1)
        chex.assert_trees_all_close(out, whole[:, at : at + tokens.shape[1]], atol=1e-5)
    held = {name: leaf.shape for name, leaf in state.items()}
    # 12 + 8 values of each of 12 tokens, and nothing else.
    assert held == {f"blocks.{i}.attn.core.tokens.k": (2, 12, 1, 20) for i in (0, 1)}


@pytest.mark.parametrize(
    "transform",
    [
        kivi.transform(kivi.KIVIPlan()),
        snap_kv.transform(snap_kv.SnapKVPlan(ratio=0.5, window=2)),
        streaming_llm.transform(streaming_llm.StreamingLLMPlan(capacity=12, sinks=1)),
        round_to_nearest.transform(round_to_nearest.uniform(8)),
    ],
    ids=["kivi", "snap_kv", "streaming_llm", "round_to_nearest"],
)
def test_methods_run_on_latents(transform):
    forward, params = tiny()
    small = transform(forward, params)
    prompts = [row[:length] for row, length in zip(TOKENS, LENGTHS)]
    out = generate(*small, prompts, max_new_tokens=3)
    assert out.tokens.shape == (3, 3)
    whole, _ = jax.jit(forward)(params, {}, TOKENS)
    first = [int(jnp.argmax(whole[row, length - 1])) for row, length in enumerate(LENGTHS)]
    if transform.plan.__class__.__name__ != "RoundToNearestPlan":  # prompts are read exactly
        assert out.tokens[:, 0].tolist() == first


def test_methods_without_a_meaning_refuse_by_name():
    forward, params = tiny()
    for transform, message in (
        (moa.transform(moa.uniform(layers=2, heads=4)), "one latent for all heads"),
        (
            expected_attention.transform(expected_attention.ExpectedAttentionPlan(ratio=0.5)),
            "queries of latents are turned in a part",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            generate(*transform(forward, params), [TOKENS[0]], max_new_tokens=2)
    with pytest.raises(ValueError, match="are made of latents as they are"):
        cskv.factors(cskv.CSKVPlan(0.5, 0.5), forward, params)


def test_gptq_reads_every_layer():
    """The layer that expands latents too, in the form of prompts."""
    forward, params = tiny()
    plan = gptq.uniform(8)

    def draw(tokens, count, seed):
        return np.random.default_rng(seed).integers(0, 40, (count, tokens)).astype(np.int32)

    leaves = gptq.METHOD.calibrate(plan, forward, params, Sequences(draw, tokens=24, count=4))
    small = gptq.transform(plan, leaves)(forward, params)
    one, two = (jax.jit(f)(p, {}, TOKENS)[0] for f, p in ((forward, params), small))
    assert 0 < float(jnp.linalg.norm(two - one) / jnp.linalg.norm(one)) < 0.1


def test_wrong_configurations():
    good = deepseek.write_config(tiny()[0].config)
    assert deepseek.read_config(good) == tiny()[0].config
    for change, message in (
        ({"n_group": 3}, "8 experts cannot stand in 3 equal groups"),
        ({"topk_method": "greedy"}, "topk_method='greedy' .only 'noaux_tc'"),
        ({"num_experts_per_tok": 5}, "a token takes 5 experts, and there are 4 in the 2 groups"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
    ):
        with pytest.raises(ValueError, match=message):
            deepseek.read_config({**good, **change})
    with pytest.raises(ValueError, match="topk_method must be greedy or group_limited_greedy"):
        deepseek.read_config({"model_type": "deepseek_v2", "topk_method": "noaux_tc"})
