"""DiT against diffusers, and against the original formula on the original layout."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import converters
from converters import dit as family
from effjax.forward import abstract, flatten_params, parameter_count
from effjax.models.dit import DiT, DiTConfig
from tests.converters.conftest import CONFIG, assert_equal_params

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def diffusers_dit(seed=0, **options):
    """diffusers' model with random weights and equal embedders, as trained checkpoints have."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    options = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_embeds_ada_norm": 5,
        **options,
    }
    model = diffusers.DiTTransformer2DModel(**options).eval()
    blocks = model.transformer_blocks
    for block in blocks[1:]:
        block.norm1.emb.load_state_dict(blocks[0].norm1.emb.state_dict())
    return model


def inputs(config, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, *config.sample_shape)).astype(np.float32)
    return x, np.array([3.0, 871.0], np.float32), np.array([0, config.num_classes], np.int32)


def run_torch(model, x, t, labels):
    import torch

    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        output = model(
            torch.tensor(x).permute(0, 3, 1, 2).to(dtype), torch.tensor(t), torch.tensor(labels)
        ).sample
    return output.permute(0, 2, 3, 1).float().numpy()


def run(forward, params, x, t, labels):
    output, _ = jax.jit(forward)(params, {}, x, t, labels)
    return np.asarray(output.astype(jnp.float32))


@pytest.mark.torch
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sample_size": 16, "patch_size": 4, "out_channels": None, "num_layers": 1},
        {"sample_size": 32, "patch_size": 8, "in_channels": 1, "out_channels": 2},
    ],
    ids=["patch 2", "patch 4, no sigma", "patch 8"],
)
def test_parity_with_diffusers(options, tmp_path):
    model = diffusers_dit(**options)
    model.save_pretrained(tmp_path)
    forward, params = converters.from_pretrained(tmp_path)
    arguments = inputs(forward.config)
    np.testing.assert_allclose(
        run(forward, params, *arguments), run_torch(model, *arguments), atol=2e-4
    )


@pytest.mark.torch
def test_bfloat16_is_as_exact_as_in_torch(tmp_path):
    model = diffusers_dit()
    exact = run_torch(model, *inputs(CONFIG))
    model.to(pytest.importorskip("torch").bfloat16).save_pretrained(tmp_path)
    forward, params = converters.from_pretrained(tmp_path, compute_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert (forward.config.dtype, forward.config.param_dtype) == ("bfloat16", "bfloat16")
    ours, theirs = run(forward, params, *inputs(CONFIG)), run_torch(model, *inputs(CONFIG))
    # Both round to 8 bits in every layer: about two percent of the largest output.
    scale = np.abs(exact).max()
    assert np.abs(ours - exact).max() < 0.03 * scale
    assert np.abs(ours - theirs).max() < 0.03 * scale


@pytest.mark.torch
def test_sharded_by_diffusers_and_back(tmp_path):
    model = diffusers_dit()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    forward, params = converters.from_pretrained(tmp_path / "sharded")
    converters.save_pretrained(forward, params, tmp_path / "back", max_shard_bytes=30_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    again = type(model).from_pretrained(tmp_path / "back", local_files_only=True)
    state, expected = again.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all((state[name] == expected[name]).all() for name in expected)
    arguments = inputs(forward.config)
    np.testing.assert_array_equal(run_torch(again, *arguments), run_torch(model, *arguments))
    assert all(again.config[name] == model.config[name] for name in family.write_config(CONFIG))


@pytest.mark.torch
def test_pickle_of_diffusers(tmp_path):
    model = diffusers_dit(num_layers=1)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "diffusion_pytorch_model.bin").is_file()
    _, params = converters.from_pretrained(tmp_path)
    np.testing.assert_array_equal(
        params["final"]["proj"]["kernel"], model.proj_out_2.weight.detach().numpy().T
    )


def test_round_trip_gives_the_same_bytes(dit, saved, tmp_path):
    forward, params = converters.from_pretrained(saved)
    assert forward == dit[0]
    assert_equal_params(params, dit[1])
    converters.save_pretrained(forward, params, tmp_path / "again")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_embedders_are_written_into_every_block(dit, saved):
    tensors = load_file(saved / "diffusion_pytorch_model.safetensors")
    table = "norm1.emb.class_embedder.embedding_table.weight"
    for i in range(CONFIG.num_layers):
        np.testing.assert_array_equal(
            tensors[f"transformer_blocks.{i}.{table}"], dit[1]["label"]["embedding_table"]
        )
    with safe_open(saved / "diffusion_pytorch_model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_parameter_counts_of_the_full_size_model():
    config = DiTConfig.preset("DiT-XL/2")
    _, params = abstract(DiT, config)
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten_params(params).items()}
    for layout, count in {"diffusers": 749_826_464, "original": 674_834_720}.items():
        binding = family.FAMILY.tables[layout].bind(shapes)
        sources = binding.source_shapes(shapes)
        assert sum(math.prod(shape) for shape in sources.values()) == count
    assert parameter_count(params) == 674_834_720


def test_config_both_ways():
    config = DiTConfig(sample_size=16, patch_size=4, out_channels=4, num_layers=3, norm_eps=1e-6)
    written = family.write_config(config)
    assert "time_shift" not in written
    assert family.read_config(json.loads(json.dumps(written))) == config
    shifted = DiTConfig(time_shift=0.0)
    assert family.read_config(family.write_config(shifted)) == shifted
    assert family.read_config({"in_channels": 3, "out_channels": None}).out_channels == 3


def test_legacy_class_name(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "_class_name": "Transformer2DModel"}))
    assert converters.from_pretrained(saved)[0].config == CONFIG


# The original layout ------------------------------------------------------------------------


def original_state(torch, *, width=384, depth=1, classes=5, channels=4, patch=2, size=8, seed=0):
    """A state dict as the original code saves it."""
    generator = torch.Generator().manual_seed(seed)

    def linear(name, inputs, outputs):
        scale = inputs**-0.5
        return {
            f"{name}.weight": scale * torch.randn(outputs, inputs, generator=generator),
            f"{name}.bias": 0.1 * torch.randn(outputs, generator=generator),
        }

    state = linear("x_embedder.proj", channels * patch**2, width)
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].reshape(
        width, channels, patch, patch
    )
    state |= linear("t_embedder.mlp.0", 256, width) | linear("t_embedder.mlp.2", width, width)
    state["y_embedder.embedding_table.weight"] = torch.randn(
        classes + 1, width, generator=generator
    )
    for i in range(depth):
        state |= linear(f"blocks.{i}.attn.qkv", width, 3 * width)
        state |= linear(f"blocks.{i}.attn.proj", width, width)
        state |= linear(f"blocks.{i}.mlp.fc1", width, 4 * width)
        state |= linear(f"blocks.{i}.mlp.fc2", 4 * width, width)
        state |= linear(f"blocks.{i}.adaLN_modulation.1", width, 6 * width)
    state |= linear("final_layer.linear", width, 2 * channels * patch**2)
    state |= linear("final_layer.adaLN_modulation.1", width, 2 * width)
    grid = size // patch
    state["pos_embed"] = torch.tensor(original_positions(width, grid))[None]
    return state


def original_positions(width, grid):
    """Columns in the first half of the channels, rows in the second; sine, then cosine."""
    rates = 1 / 10_000 ** (np.arange(width // 4) / (width / 4))
    rows, columns = np.divmod(np.arange(grid**2), grid)
    halves = [[np.sin(np.outer(p, rates)), np.cos(np.outer(p, rates))] for p in (columns, rows)]
    return np.concatenate([*halves[0], *halves[1]], axis=1).astype(np.float32)


def original_dit(state, x, t, y, *, heads, depth=1):
    """The published formula: unshifted time frequencies, eps 1e-6 in every norm."""
    import torch
    import torch.nn.functional as F

    def linear(name, h):
        return F.linear(h, state[f"{name}.weight"], state[f"{name}.bias"])

    def modulated(h, shift, scale):
        return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    _, channels, patch, _ = state["x_embedder.proj.weight"].shape
    kernel, bias = state["x_embedder.proj.weight"], state["x_embedder.proj.bias"]
    h = F.conv2d(x, kernel, bias, stride=patch).flatten(2).transpose(1, 2) + state["pos_embed"]
    angles = t[:, None] * torch.exp(-math.log(10_000) / 128 * torch.arange(128))
    time = torch.cat([angles.cos(), angles.sin()], dim=1)
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", time)))
    c = F.silu(c + state["y_embedder.embedding_table.weight"][y])
    for i in range(depth):
        block = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(
            f"{block}.adaLN_modulation.1", c
        ).chunk(6, dim=1)
        qkv = linear(f"{block}.attn.qkv", modulated(h, shift1, scale1))
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + gate1[:, None] * linear(f"{block}.attn.proj", attended)
        hidden = F.gelu(
            linear(f"{block}.mlp.fc1", modulated(h, shift2, scale2)), approximate="tanh"
        )
        h = h + gate2[:, None] * linear(f"{block}.mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, dim=1)
    patches = linear("final_layer.linear", modulated(h, shift, scale))
    grid = math.isqrt(patches.shape[1])
    image = patches.reshape(-1, grid, grid, patch, patch, 2 * channels)
    return image.permute(0, 1, 3, 2, 4, 5).reshape(-1, grid * patch, grid * patch, 2 * channels)


@pytest.mark.torch
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "training checkpoint"])
def test_original_pt_keeps_its_own_formula(wrapped, tmp_path):
    torch = pytest.importorskip("torch")
    import argparse

    state = original_state(torch)
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    held = {"model": other, "ema": state, "args": argparse.Namespace(lr=1e-4), "opt": {}}
    torch.save(held if wrapped else state, tmp_path / "DiT-S-2.pt")
    forward, params = converters.from_pretrained(tmp_path / "DiT-S-2.pt")
    config = forward.config
    assert config == DiTConfig.preset(
        "DiT-S/2", sample_size=8, num_layers=1, num_classes=5, norm_eps=1e-6, time_shift=0.0
    )
    x, t, labels = inputs(config)
    with torch.no_grad():
        expected = original_dit(
            state,
            torch.tensor(x).permute(0, 3, 1, 2),
            torch.tensor(t),
            torch.tensor(labels),
            heads=6,
        ).numpy()
    np.testing.assert_allclose(run(forward, params, x, t, labels), expected, atol=2e-4)
    # diffusers' shift is another function: the check above can tell them apart
    shifted, _ = abstract(
        DiT, DiTConfig.preset("DiT-S/2", sample_size=8, num_layers=1, num_classes=5)
    )
    assert np.abs(run(shifted, params, x, t, labels) - expected).max() > 1e-3


@pytest.mark.torch
def test_original_pt_to_diffusers_and_back(tmp_path):
    torch = pytest.importorskip("torch")
    state = original_state(torch)
    torch.save(state, tmp_path / "DiT-S-2.pt")
    report = converters.convert(tmp_path / "DiT-S-2.pt", tmp_path / "diffusers")
    assert report["layout"] == "diffusers"
    assert json.loads((tmp_path / "diffusers/config.json").read_text())["time_shift"] == 0.0
    forward, params = converters.from_pretrained(tmp_path / "DiT-S-2.pt")
    through = converters.from_pretrained(tmp_path / "diffusers")
    assert through[0] == forward
    assert_equal_params(through[1], params)
    converters.convert(tmp_path / "diffusers", tmp_path / "original", layout="original")
    back = load_file(tmp_path / "original/model.safetensors")
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(back[name], tensor.numpy(), err_msg=name)
    assert converters.from_pretrained(tmp_path / "original")[0] == forward


@pytest.mark.torch
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 64}, r"number of heads from width 64.*config\.json"),
        ({"drop": "pos_embed"}, r"cannot infer.*pos_embed"),
        ({"patch": 0}, r"cannot infer.* its shapes are not a model's"),
        ({"positions": 2.0}, r"pos_embed: differs from what the model computes"),
    ],
)
def test_original_pt_that_cannot_be_read(change, message, tmp_path):
    torch = pytest.importorskip("torch")
    state = original_state(torch, width=change.get("width", 384))
    state.pop(change.get("drop"), None)
    if "positions" in change:
        state["pos_embed"] *= change["positions"]
    if "patch" in change:
        state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"][:, :, :0, :0]
    torch.save(state, tmp_path / "DiT.pt")
    with pytest.raises(ValueError, match=message):
        converters.from_pretrained(tmp_path / "DiT.pt")
