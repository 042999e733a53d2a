"""Llamas with experts: parity with transformers, layouts of checkpoints, routing."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import converters
from converters import moe_llama
from effjax import testing
from effjax.cost import cost
from effjax.forward import abstract, flatten_params
from effjax.generate import generate
from effjax.layers.moe import Routing
from effjax.models.moe_llama import MoELlama, MoELlamaConfig

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CASES = {
    "Mixtral": {"intermediate_size": 24, "num_local_experts": 4, "sliding_window": 6},
    "Qwen2Moe": {
        "intermediate_size": 40,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "num_experts": 6,
        "mlp_only_layers": [1],
    },
    "Qwen3Moe": {
        "intermediate_size": 40,
        "moe_intermediate_size": 16,
        "num_experts": 6,
        "head_dim": 16,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
    },
    "Olmoe": {"intermediate_size": 16, "num_experts": 6},
}
TOKENS = np.random.default_rng(0).integers(0, 40, (3, 12)).astype(np.int32)
LENGTHS = np.array([12, 7, 1])
MASK = np.arange(12) >= 12 - LENGTHS[:, None]  # padded at the left
POSITIONS = np.where(MASK, MASK.cumsum(1) - 1, -1).astype(np.int32)


def make(name, folder):
    """A random model of transformers, saved."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**SIZES, **CASES[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and routers that matter
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return torch, model


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, *make(request.param, folder)


def agrees(folder, torch, model):
    """Logits of texts of 12, 7 and 1 tokens, padded at the left; greedy texts token for token."""
    forward, params = converters.from_pretrained(folder, progress=False)
    got, _ = jax.jit(forward)(params, {}, TOKENS, POSITIONS)
    given = {
        "input_ids": torch.tensor(TOKENS, dtype=torch.long),
        "attention_mask": torch.tensor(MASK, dtype=torch.long),
    }
    with torch.no_grad():
        want = model(**given).logits.numpy()
        texts = model.generate(**given, max_new_tokens=8, do_sample=False).numpy()[:, 12:]
    chex.assert_trees_all_close(got[MASK], want[MASK], atol=1e-4)
    prompts = [row[mask] for row, mask in zip(TOKENS, MASK)]
    out = generate(forward, params, prompts, max_new_tokens=8)
    np.testing.assert_array_equal(out.tokens, texts)


@pytest.mark.torch
def test_logits_and_texts_equal_those_of_transformers(made):
    agrees(*made[1:])


@pytest.mark.torch
def test_files_by_expert_and_fused(made, tmp_path):
    """What is written is what transformers wrote; state dictionaries of version 5 are read too."""
    name, folder, _, model = made
    forward, params = converters.from_pretrained(folder, progress=False)
    converters.save_pretrained(forward, params, tmp_path / "copy", progress=False)
    one, two = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "copy"))
    chex.assert_trees_all_equal(two, one)
    again, copied = converters.from_pretrained(tmp_path / "copy", progress=False)
    assert again == forward
    chex.assert_trees_all_equal(copied, params)
    written = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert written["architectures"] == [f"{name}ForCausalLM"]

    (tmp_path / "fused").mkdir()
    held = {key: np.ascontiguousarray(each.numpy()) for key, each in model.state_dict().items()}
    assert any(key.endswith("mlp.experts.gate_up_proj") for key in held)
    save_file(held, tmp_path / "fused" / "model.safetensors")
    (tmp_path / "fused" / "config.json").write_text((folder / "config.json").read_text())
    assert converters.describe(tmp_path / "fused")["layout"] == "fused"
    chex.assert_trees_all_equal(
        converters.from_pretrained(tmp_path / "fused", progress=False)[1], params
    )


@pytest.mark.torch
def test_transformers_reads_what_is_written(made, tmp_path):
    _, folder, torch, model = made
    transformers = pytest.importorskip("transformers")
    converters.convert(folder, tmp_path / "copy", progress=False)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "copy", trust_remote_code=False
    ).eval()
    tokens = torch.tensor(TOKENS[:1], dtype=torch.long)
    with torch.no_grad():
        chex.assert_trees_all_equal(again(tokens).logits.numpy(), model(tokens).logits.numpy())


def test_damaged_files_name_their_tensors(tmp_path):
    """A missing expert, names of two layouts, an expert of another size, a router without rows."""
    forward, params = tiny()
    converters.save_pretrained(forward, params, tmp_path / "good", progress=False)
    good = load_file(tmp_path / "good" / "model.safetensors")
    expert = "model.layers.0.mlp.experts.2.up_proj.weight"
    for number, (change, message) in enumerate(
        (
            ({expert: None}, rf"{expert}: missing, must be \[16, 32\]"),
            ({expert: good[expert][:8]}, rf"{expert}: misshapen, is \[8, 32\]"),
            (
                {"model.layers.0.mlp.experts.gate_up_proj": np.zeros((6, 32, 32), np.float32)},
                "gate_up_proj: unexpected",
            ),
            ({"model.layers.1.mlp.gate.weight": None}, r"gate.weight: missing, must be \[6, 32\]"),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        held = {key: value for key, value in {**good, **change}.items() if value is not None}
        save_file(
            {k: np.ascontiguousarray(v) for k, v in held.items()}, folder / "model.safetensors"
        )
        (folder / "config.json").write_text((tmp_path / "good" / "config.json").read_text())
        with pytest.raises(ValueError, match=message):
            converters.from_pretrained(folder, progress=False)


def tiny(**changes):
    config = MoELlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=40,
        moe_intermediate_size=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_positions=64,
        num_experts=6,
        qk_norm=True,
        round_topk_prob=True,
        **changes,
    )
    forward, shapes = abstract(MoELlama, config)
    return forward, testing.random_params(shapes)


def test_a_token_takes_its_experts_alone():
    """FLOPs of two experts of six; other tokens of a batch change nothing."""
    forward, params = tiny()
    flops = cost(forward, params, {}, TOKENS[:1]).flops
    more = cost(tiny(num_experts_per_tok=3)[0], params, {}, TOKENS[:1]).flops
    assert more - flops == 2 * 12 * 2 * (3 * 32 * 16 + 32)  # its MLP and its share of the sum
    whole, _ = jax.jit(forward)(params, {}, TOKENS, POSITIONS)
    for row in range(3):
        alone, _ = jax.jit(forward)(params, {}, TOKENS[row : row + 1], POSITIONS[row : row + 1])
        chex.assert_trees_all_close(alone[0][MASK[row]], whole[row][MASK[row]], atol=1e-5)


def test_experts_are_counted_under_either_name():
    config = moe_llama.write_config(tiny()[0].config)
    assert config["num_experts"] == 6
    other = {**config, "num_local_experts": config["num_experts"]}
    del other["num_experts"]
    assert moe_llama.read_config(other) == moe_llama.read_config(config)
    with pytest.raises(ValueError, match=r"counts experts in two ways: .*6.*8"):
        moe_llama.read_config({**config, "num_local_experts": 8})


def test_wrong_configurations():
    for changes, message in (
        ({"num_experts_per_tok": 7}, "a token takes 7 experts, and there are 6"),
        ({"sparse_layers": (True,)}, "must name all 2 layers or none, got 1"),
        ({"qk_norm": False, "qk_norm_joined": True}, "qk_norm_joined says how the norms"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(tiny()[0].config, **changes)


# Routing -----------------------------------------------------------------------------------------


def by_hand(routing, logits, bias):
    """The sheet's arithmetic for one token, in float64."""
    wide = np.float64(logits)
    scores = 1 / (1 + np.exp(-wide))
    if routing.scores == "softmax":
        scores = np.exp(wide - wide.max()) / np.exp(wide - wide.max()).sum()
    choice = scores if bias is None else scores + np.float64(bias)
    size = routing.experts // routing.groups
    groups = choice.reshape(routing.groups, size)
    best = 2 if routing.group_score == "top2" else 1
    ranks = np.sort(groups, axis=1)[:, -best:].sum(axis=1)
    allowed = np.argsort(-ranks, kind="stable")[: routing.top_groups]
    masked = np.where(np.isin(np.arange(routing.experts) // size, allowed), choice, -np.inf)
    chosen = np.argsort(-masked, kind="stable")[: routing.top_k]
    weights = scores[chosen]
    if routing.normalize:
        weights = weights / weights.sum()
    return chosen, weights * routing.scale


@pytest.mark.parametrize(
    ("routing", "biased"),
    [
        (Routing(8, 2), False),
        (Routing(8, 3, normalize=False), False),
        (Routing(8, 2, normalize=False, scale=16.0, groups=4, top_groups=2), False),
        (Routing(8, 2, "sigmoid", scale=2.5, groups=4, top_groups=2, group_score="top2"), True),
    ],
)
def test_routing_is_the_arithmetic_of_the_papers(routing, biased):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((22, 8)).astype(np.float32)
    # Biases so low that all choices are negative: what is not allowed must stay below them.
    bias = rng.standard_normal(8).astype(np.float32) - 5 if biased else None
    weights, experts = routing.choose(
        jnp.asarray(logits), None if bias is None else jnp.asarray(bias)
    )
    for token in range(22):
        chosen, want = by_hand(routing, logits[token], bias)
        np.testing.assert_array_equal(experts[token], chosen)
        np.testing.assert_allclose(weights[token], want, rtol=1e-5)
    groups = np.asarray(experts) // (8 // routing.groups)
    assert max(len(set(row)) for row in groups) <= routing.top_groups
    if routing.normalize:
        np.testing.assert_allclose(np.sum(weights, axis=1), routing.scale, rtol=1e-5)


def test_wrong_routing():
    for given, message in (
        ({"groups": 3}, "8 experts cannot stand in 3 equal groups"),
        ({"groups": 4, "top_groups": 5}, "of which a token takes 5"),
        (
            {"groups": 8, "top_groups": 1},
            "a token takes 2 experts, and there are 1 in the 1 groups",
        ),
        ({"groups": 8, "top_groups": 8, "group_score": "top2"}, "no two best scores"),
    ):
        with pytest.raises(ValueError, match=message):
            Routing(8, 2, **given)


def test_experts_are_the_same_sum_apart():
    """As methods that look at single layers see them: every expert gets its own tokens."""
    forward, params = tiny(shared_expert_intermediate_size=12)
    module = forward.module(params).blocks[0].mlp
    x = jax.random.normal(jax.random.key(0), (2, 5, 32))
    routed = module.router(x.reshape(-1, 32))
    chex.assert_trees_all_close(module._apart(x, routed), module._sorted(x, routed), atol=1e-5)
    assert len(flatten_params(params)) == len(set(flatten_params(params)))
