"""SD3 and FLUX: parity with diffusers, round trips, sizes, methods, errors."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import converters
from converters.family import family_of_config
from effjax import testing
from effjax.forward import abstract, flatten_params, parameter_count
from effjax.layers.joint import PooledEmbeddings, axial_angles, rotate_pairs
from effjax.methods import dit_fast_attn, round_to_nearest
from effjax.models.flux import Flux, FluxConfig
from effjax.models.sd3 import SD3, SD3Config
from effjax.scanning import find_runs, scan_blocks

SD3_TINY = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 10,
}
FLUX_TINY = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "axes_dims_rope": (4, 6, 6),
}
KINDS = {
    "sd3": ("SD3Transformer2DModel", SD3_TINY),
    "sd3.5": (
        "SD3Transformer2DModel",
        {**SD3_TINY, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    ),
    "flux-dev": ("FluxTransformer2DModel", {**FLUX_TINY, "guidance_embeds": True}),
    "flux-schnell": ("FluxTransformer2DModel", {**FLUX_TINY, "guidance_embeds": False}),
}


def inputs(guided):
    """Not square, times that differ; guidance too."""
    rng = np.random.default_rng(0)
    x, embeds, pooled = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((2, 8, 12, 4), (2, 5, 12), (2, 10))
    )
    t = np.array([3.0, 701.0], np.float32)
    return x, t, embeds, pooled, np.array([3.5, 2.0], np.float32) if guided else None


def reference(torch, model, x, t, embeds, pooled, guidance):
    """The network of diffusers on images [B, H, W, C], in its dtype."""
    dtype = model.dtype
    x, embeds, pooled = (torch.tensor(value).to(dtype) for value in (x, embeds, pooled))
    if type(model).__name__ == "SD3Transformer2DModel":
        image = x.permute(0, 3, 1, 2)
        out = model(image, embeds, pooled, torch.tensor(t)).sample.permute(0, 2, 3, 1)
        return out.float().numpy()
    batch, height, width, channels = x.shape
    rows, columns = height // 2, width // 2
    tokens = x.reshape(batch, rows, 2, columns, 2, channels).permute(0, 1, 3, 5, 2, 4)
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)[None]
    out = model(
        tokens.reshape(batch, rows * columns, -1),
        embeds,
        pooled,
        torch.tensor(t) / 1000,
        ids.reshape(-1, 3),
        torch.zeros(embeds.shape[1], 3),
        None if guidance is None else torch.tensor(guidance),
    ).sample
    out = out.float().numpy().reshape(batch, rows, columns, channels, 2, 2)
    return out.transpose(0, 1, 4, 2, 5, 3).reshape(batch, height, width, channels)


@pytest.fixture(scope="module", params=KINDS)
def released(request, tmp_path_factory):
    """A random model of diffusers, saved."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    name, config = KINDS[request.param]
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**config).eval()
    with torch.no_grad():
        for path, value in model.named_parameters():
            norm = "norm_" in path and value.ndim == 1 and "linear" not in path
            value.copy_(0.1 * torch.randn_like(value) + norm)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    return torch, model, directory, request.param


def outputs(forward, params, x, t, *prompt):
    embeds, pooled, guidance = jax.tree.map(jnp.asarray, prompt)
    given = jnp.asarray(x), jnp.asarray(t), PooledEmbeddings(embeds, pooled, guidance)
    out, state = jax.jit(forward)(params, {}, *given)
    assert state == {}
    return np.asarray(out, np.float32)


def test_outputs_equal_those_of_diffusers(released):
    torch, model, directory, kind = released
    given = inputs(kind == "flux-dev")
    with torch.no_grad():
        wanted = reference(torch, model, *given)
    forward, params = converters.from_pretrained(directory, progress=False)
    chex.assert_trees_all_close(outputs(forward, params, *given), wanted, atol=2e-4)


def test_bfloat16_errs_no_more_than_diffusers(released):
    torch, model, directory, kind = released
    given = inputs(kind == "flux-dev")
    options = {"dtype": "bfloat16", "progress": False}
    forward, params = converters.from_pretrained(directory, **options)
    with torch.no_grad():
        exact = reference(torch, model, *given)
        theirs = reference(torch, model.to(torch.bfloat16), *given)
        model.to(torch.float32)
    ours = outputs(forward, params, *given)
    error, allowed = (np.sqrt(np.mean((out - exact) ** 2)) for out in (ours, theirs))
    assert 0 < error < 1.25 * allowed


def test_files_come_back_as_they_were(released, tmp_path):
    torch, model, directory, kind = released
    held = {name: value.clone() for name, value in model.state_dict().items()}
    fresh = type(model).from_pretrained(directory).state_dict()
    pair = converters.from_pretrained(directory, progress=False)
    converters.save_pretrained(*pair, tmp_path / "again", progress=False)
    again = type(model).from_pretrained(tmp_path / "again")
    assert held.keys() == again.state_dict().keys()
    assert all(torch.equal(fresh[name], value) for name, value in again.state_dict().items())
    for key, value in KINDS[kind][1].items():
        assert again.config[key] == (list(value) if isinstance(value, tuple) else value)


# As the original code names them; heads have the released models' size.
ORIGINALS = {
    "sd3": (
        SD3Config(
            sample_size=8, num_layers=2, num_heads=1, in_channels=4, out_channels=4,
            caption_channels=12, pooled_channels=10, max_grid=10,
        ),
        "convert_sd3_transformer_checkpoint_to_diffusers",
    ),
    "sd3.5": (
        SD3Config(
            num_layers=2, num_heads=1, in_channels=4, out_channels=4, qk_norm=True,
            dual_layers=(0,), caption_channels=12, pooled_channels=10, max_grid=10,
        ),
        "convert_sd3_transformer_checkpoint_to_diffusers",
    ),
    "flux": (
        FluxConfig(
            num_layers=1, num_single_layers=1, num_heads=24, in_channels=16, caption_channels=12,
            pooled_channels=10,
        ),
        "convert_flux_transformer_checkpoint_to_diffusers",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("sd3", "original"), ("sd3", "all-in-one"), ("sd3.5", "original"), ("flux", "all-in-one")],
)
def test_original_names_are_those_that_diffusers_reads(kind, layout):
    """What this library writes under them, diffusers converts to what it writes for diffusers.

    Its converter takes FLUX's width as given, so that one is 3072 here, of bytes.
    """
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    config, name = ORIGINALS[kind]
    family = family_of_config(config)
    _, shapes = abstract(family.model, config)
    rng = np.random.default_rng(0)
    flat = {
        path: rng.integers(-128, 128, leaf.shape, np.int8)
        for path, leaf in flatten_params(shapes).items()
    }

    def written(layout):
        binding = family.tables[layout].bind(flat)
        return {source: binding.assemble(source, flat.__getitem__) for source in binding.sources}

    theirs = written(layout)
    infer = family.tables[layout].infer
    assert infer is not None
    inferred = infer({name: value.shape for name, value in theirs.items()})
    assert dataclasses.replace(inferred, sample_size=config.sample_size) == config
    assert family.layout(theirs) == layout
    given = {name: torch.tensor(np.ascontiguousarray(value)) for name, value in theirs.items()}
    converted = getattr(utils, name)(given)
    wanted = written("diffusers")
    assert converted.keys() == wanted.keys()
    for name, value in converted.items():
        assert np.array_equal(value.numpy(), wanted[name]), name


@pytest.mark.parametrize(
    ("model", "config", "count"),
    [
        (SD3, SD3Config(), 2_028_328_000),
        (SD3, SD3Config(num_layers=38, num_heads=38, qk_norm=True), 8_056_627_520),
        (
            SD3,
            SD3Config(qk_norm=True, dual_layers=tuple(range(13)), max_grid=384),
            2_243_171_520,
        ),
        (Flux, FluxConfig(), 11_901_408_320),
    ],
    ids=["SD3-medium", "SD3.5-large", "SD3.5-medium", "FLUX.1-dev"],
)
def test_sizes_are_those_of_the_released_checkpoints(model, config, count):
    """The table of SD3's positions is no trained parameter there. Layers are counted by what one
    more of a kind adds to a model of two.
    """

    def counted(**layers):
        short = dataclasses.replace(config, **{**few, **layers})
        _, shapes = abstract(model, short)
        table = config.max_grid**2 * config.hidden_size if model is SD3 else 0
        return parameter_count(shapes) - table

    few = {"num_layers": 2}
    few |= {"dual_layers": ()} if model is SD3 else {"num_single_layers": 1}
    base = counted()
    total = base + (config.num_layers - 2) * (counted(num_layers=3) - base)
    if model is Flux:
        total += (config.num_single_layers - 1) * (counted(num_single_layers=2) - base)
    elif config.dual_layers:
        total += len(config.dual_layers) * (counted(dual_layers=(0,)) - base)
    assert total == count


TINY = pytest.mark.parametrize("tiny", [testing.tiny_sd3, testing.tiny_flux])


@TINY
def test_scanned_blocks_give_the_same_samples(tiny):
    """SD3's first block has a second attention, its last one ends the text; FLUX has two stacks."""
    subject = tiny(num_layers=4)
    forward, params = subject.forward, subject.params
    x = jnp.ones((2, *forward.config.sample_shape))
    found = find_runs(forward, params, x, jnp.ones(2), subject.cond)
    assert [(run.stack, run.stop - run.start) for run in found] == {
        SD3: [("blocks", 1), ("blocks", 2), ("blocks", 1)],
        Flux: [("blocks", 4), ("single_blocks", 2)],
    }[forward.model]
    small, stacked = scan_blocks(stack=True)(forward, params)
    run = jax.jit(subject.sampler)
    options = {} if subject.uncond is None else {"uncond": subject.uncond}
    key = jax.random.key(0)
    chex.assert_trees_all_close(
        run(small, stacked, subject.cond, key, **options),
        run(forward, params, subject.cond, key, **options),
        atol=1e-5,
    )


@TINY
def test_methods_run_on_joint_transformers(tiny):
    """Shared outputs and quantized layers do; windows are for images alone, and say so."""
    subject = tiny()
    patterns = (dit_fast_attn.Strategy.FULL, dit_fast_attn.Strategy.AST)
    tokens = subject.forward.config.tokens + 5
    layers = len(dit_fast_attn.attentions(subject.forward.module(subject.params), "self", "joint"))
    plan = dit_fast_attn.uniform(
        patterns, layers=layers, calls=subject.sampler.calls, tokens=tokens
    )
    pair = dit_fast_attn.transform(plan)(subject.forward, subject.params)
    pair = round_to_nearest.transform(round_to_nearest.uniform(8))(*pair)
    run = jax.jit(subject.sampler)
    options = {} if subject.uncond is None else {"uncond": subject.uncond}
    key = jax.random.key(0)
    exact = run(subject.forward, subject.params, subject.cond, key, **options)
    full, wars = dit_fast_attn.Strategy.FULL, dit_fast_attn.Strategy.WARS
    row = ((full, wars, wars, wars),) * layers
    window = dataclasses.replace(plan, strategies=row)
    windowed = dit_fast_attn.transform(window)(subject.forward, subject.params)
    with pytest.raises(ValueError, match="window attention is for image tokens alone"):
        run(*windowed, subject.cond, key, **options)
    out = run(*pair, subject.cond, key, **options)
    assert 0 < float(jnp.abs(out - exact).max()) < float(jnp.abs(exact).max())


def test_pairs_of_channels_are_turned():
    """As complex numbers are, by the angles of every axis."""
    positions = np.array([[0, 0, 0], [0, 2, 5]])
    cos, sin = axial_angles((2, 4, 2), positions)
    angles = np.array([0.0, 2.0, 2.0 * 10_000**-0.5, 5.0])
    x = np.random.default_rng(0).standard_normal((1, 2, 3, 8)).astype(np.float32)
    pairs = x[..., ::2] + 1j * x[..., 1::2]
    wanted = np.stack([pairs[:, 0], pairs[:, 1] * np.exp(1j * angles)], axis=1)
    got = np.asarray(rotate_pairs(jnp.asarray(x), jnp.asarray(cos), jnp.asarray(sin)))
    chex.assert_trees_all_close(got[..., ::2], wanted.real.astype(np.float32), atol=1e-5)
    chex.assert_trees_all_close(got[..., 1::2], wanted.imag.astype(np.float32), atol=1e-5)


class TestErrors:
    def test_guidance_is_given_where_it_is_read(self):
        dev, schnell = testing.tiny_flux(), testing.tiny_flux(guidance_embeds=False)
        x, t = jnp.ones((2, 16, 16, 4)), jnp.ones(2)
        with pytest.raises(ValueError, match="is told a guidance scale: give PooledEmbeddings"):
            dev.forward(dev.params, {}, x, t, schnell.cond)
        with pytest.raises(ValueError, match="takes no guidance scale: leave out guidance"):
            schnell.forward(schnell.params, {}, x, t, dev.cond)

    @TINY
    def test_images_and_prompts_must_fit(self, tiny):
        subject = tiny()
        forward, params, t = subject.forward, subject.params, jnp.ones(2)
        with pytest.raises(ValueError, match=r"multiples of the patch size|even sides"):
            forward(params, {}, jnp.ones((2, 16, 15, 4)), t, subject.cond)
        wrong = subject.cond._replace(pooled=jnp.ones((2, 11)))
        with pytest.raises(ValueError, match="pooled ones of 10, got 12 and 11"):
            forward(params, {}, jnp.ones((2, 16, 16, 4)), t, wrong)

    def test_positions_end(self):
        subject = testing.tiny_sd3()
        with pytest.raises(ValueError, match="at most 12 patches of 2 on a side"):
            subject.forward(subject.params, {}, jnp.ones((2, 26, 16, 4)), jnp.ones(2), subject.cond)

    def test_configurations_are_checked(self):
        with pytest.raises(ValueError, match="dual_layers must be numbers below num_layers=3"):
            SD3Config(num_layers=3, dual_layers=(3,))
        with pytest.raises(ValueError, match="three even numbers with the sum head_dim=128"):
            dataclasses.replace(FluxConfig(), axes=(16, 56))
