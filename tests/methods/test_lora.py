"""LoRA: products beside layers and merged ones, files of every naming, errors."""

import json
import shutil

import chex
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import converters
import effjax
from converters import load_lora
from effjax import testing
from effjax.forward import flatten_params
from effjax.methods import awq, cskv, lora, moa, round_to_nearest

RNG = np.random.default_rng(0)


def adapter_of(subject, rank=2, pattern=""):
    shapes = flatten_params(subject.params)
    return {
        name.removesuffix(".kernel"): (
            RNG.standard_normal((leaf.shape[0], rank)).astype(np.float32),
            0.1 * RNG.standard_normal((rank, leaf.shape[1])).astype(np.float32),
        )
        for name, leaf in shapes.items()
        if name.endswith(".kernel") and name.startswith("blocks.") and pattern in name
    }


def output(subject, forward, params):
    uncond = subject.sampler.unconditional(forward, subject.cond, subject.uncond)
    x = jnp.ones((2, *forward.config.sample_shape)) * 0.3
    inputs = subject.sampler.inputs(x, subject.cond, uncond, 0)
    return jax.jit(lambda params: forward(params, {}, *inputs)[0])(params)


@pytest.mark.parametrize("tiny", [testing.tiny_sd3, testing.tiny_flux, testing.tiny_dit])
def test_beside_the_layers_and_merged_are_the_same(tiny):
    """Two at once, and the formula written down once more."""
    subject = tiny()
    one, two = adapter_of(subject), adapter_of(subject, 3, pattern="attn")
    pair = subject.forward, subject.params
    beside = lora.add({"one": one, "two": two}, {"one": 0.5})(*pair)
    merged = effjax.chain(lora.merge(one, 0.5), lora.merge(two))(*pair)
    got, wanted = output(subject, *beside), output(subject, *merged)
    np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-5)
    assert np.abs(wanted - output(subject, *pair)).max() > 1e-3
    path = next(iter(two))
    down, up = (np.asarray(each, np.float64) for each in one[path])
    change = 0.5 * down @ up + np.asarray(two[path][0], np.float64) @ two[path][1]
    kernel = flatten_params(subject.params)[f"{path}.kernel"]
    np.testing.assert_allclose(
        flatten_params(merged[1])[f"{path}.kernel"], kernel + change, atol=1e-5
    )


def test_scales_are_data():
    subject = testing.tiny_sd3()
    style = adapter_of(subject)
    forward, params = lora.add({"style": style})(subject.forward, subject.params)
    run = jax.jit(lambda params: output(subject, forward, params))
    off = run(lora.set_scales(params, style=0.0))
    chex.assert_trees_all_close(off, output(subject, subject.forward, subject.params), atol=1e-6)
    half = run(lora.set_scales(params, style=0.5))
    merged = lora.merge(style, 0.5)(subject.forward, subject.params)
    chex.assert_trees_all_close(half, output(subject, *merged), rtol=2e-4, atol=2e-5)
    assert run._cache_size() == 1
    with pytest.raises(ValueError, match="no adapters other; there are style"):
        lora.set_scales(params, other=1.0)
    assert lora.set_scales(subject.params) is subject.params
    for scale in (float("nan"), float("inf")):
        for give in (
            lambda scale: lora.set_scales(params, style=scale),
            lambda scale: lora.add({"style": style}, {"style": scale}),
            lambda scale: lora.merge(style, scale),
        ):
            with pytest.raises(ValueError, match="must be a finite number, got"):
                give(scale)


def test_adapters_are_added_one_after_the_other(tmp_path):
    """Each of them stays, and a name is for one."""
    subject = testing.tiny_sd3()
    one, two = adapter_of(subject, pattern="0.image.mlp"), adapter_of(subject, 3, pattern="0.")
    pair = subject.forward, subject.params
    small = effjax.chain(lora.add({"one": one}, {"one": 0.5}), lora.add({"two": two}))(*pair)
    together = lora.add({"one": one, "two": two}, {"one": 0.5})(*pair)
    chex.assert_trees_all_equal(small[1], together[1])
    wanted = output(subject, *together)
    np.testing.assert_allclose(output(subject, *small), wanted, atol=1e-5)
    effjax.save(tmp_path / "both", *small)
    read = effjax.load(tmp_path / "both")
    np.testing.assert_array_equal(output(subject, *read), output(subject, *small))
    with pytest.raises(ValueError, match="has adapters one already: choose other names"):
        lora.add({"one": two})(*small)


def test_beside_quantized_layers():
    """The change of the output is the adapter's, whatever the layers were rounded to."""
    subject = testing.tiny_sd3()
    plan = round_to_nearest.uniform(8)
    style = adapter_of(subject, pattern="blocks.2.image.mlp.fc2")
    small = round_to_nearest.transform(plan)(subject.forward, subject.params)
    both = lora.add({"style": style})(*small)
    swapped = effjax.chain(lora.add({"style": style}), round_to_nearest.transform(plan))(
        subject.forward, subject.params
    )
    chex.assert_trees_all_equal(both[1], swapped[1])
    got = output(subject, *both) - output(subject, *small)
    dense = lora.merge(style)(subject.forward, subject.params)
    wanted = output(subject, *dense) - output(subject, subject.forward, subject.params)
    assert np.linalg.norm(got - wanted) < 0.05 * np.linalg.norm(wanted)
    with pytest.raises(ValueError, match=r"are quantized .* merge it before you quantize"):
        lora.merge(style)(*small)


def test_factors_are_not_folded_past_adapters():
    subject = testing.tiny_llama()
    style = adapter_of(subject)
    pair = lora.add({"style": style})(subject.forward, subject.params)
    plan = awq.AWQPlan.from_dict(round_to_nearest.uniform(8).to_dict())
    scales = awq.fit(plan, subject.forward, subject.params, [(subject.cond,)])
    with pytest.raises(ValueError, match=r"lora has parameters of its own at blocks.0"):
        awq.transform(plan, scales)(*pair)
    small = awq.transform(plan, scales)(subject.forward, subject.params)
    with pytest.raises(ValueError, match="awq has folded factors into what layers read"):
        lora.add({"style": style})(*small)


def test_methods_that_read_weights_do_not_leave_adapters_out():
    """Factors of projections, and heads in another order, in either order of application."""
    subject = testing.tiny_llama()
    style = adapter_of(subject, pattern="0.attn.to_v")
    pair = lora.add({"style": style})(subject.forward, subject.params)
    plan = cskv.METHOD.ladder(subject)[0]
    with pytest.raises(ValueError, match=r"lora has parameters of its own at blocks.0.attn.to_v"):
        cskv.transform(plan)(*pair)
    small = cskv.transform(plan)(subject.forward, subject.params)
    for change in (lora.add({"style": style}), lora.merge(style)):
        with pytest.raises(ValueError, match=r"cskv holds factors of its own in place of blocks.0"):
            change(*small)
    lora.add({"style": adapter_of(subject, pattern="to_q")})(*small)
    with pytest.raises(ValueError, match=r"at blocks.0.attn.to_v, whose heads keep their order"):
        moa.order_heads(moa.METHOD.ladder(subject)[0], *pair, tokens=16)


# Files ----------------------------------------------------------------------------------------


def random_deltas(sources, layers, rank=2):
    """Pairs [r, in] and [out, r] for layers of a file's own names."""
    return {
        layer: (
            RNG.standard_normal((rank, sources[f"{layer}.weight"][1])).astype(np.float32),
            0.1 * RNG.standard_normal((sources[f"{layer}.weight"][0], rank)).astype(np.float32),
        )
        for layer in layers
    }


LAYERS = {
    ("sd3", "diffusers"): (
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.add_v_proj",
        "transformer_blocks.1.ff.net.2",
        "norm_out.linear",
    ),
    ("sd3", "original"): (
        "joint_blocks.0.x_block.attn.qkv",
        "joint_blocks.1.context_block.mlp.fc1",
    ),
    ("flux", "diffusers"): (
        "single_transformer_blocks.1.proj_out",
        "transformer_blocks.1.attn.to_add_out",
        "single_transformer_blocks.0.norm.linear",
    ),
    ("flux", "original"): (
        "single_blocks.0.linear1",
        "single_blocks.1.linear2",
        "double_blocks.0.img_attn.qkv",
        "final_layer.adaLN_modulation.1",
    ),
}
TINY = {"sd3": testing.tiny_sd3, "flux": testing.tiny_flux}
NAMED = {
    "peft": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", None),
    "comfy": (
        "model.diffusion_model.{}.lora_A.weight",
        "model.diffusion_model.{}.lora_B.weight",
        None,
    ),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "lora_unet_{}.alpha"),
}


@pytest.mark.parametrize(("model", "layout"), LAYERS)
@pytest.mark.parametrize("naming", NAMED)
def test_files_of_every_naming(tmp_path, model, layout, naming):
    """The weights of the file's own layout with B A added, and converted, are the merged ones."""
    subject = TINY[model]()
    converters.save_pretrained(
        subject.forward, subject.params, tmp_path / "model", layout=layout, progress=False
    )
    (file,) = (tmp_path / "model").glob("*.safetensors")
    tensors = {name: each.read() for name, each in effjax.storage.open_safetensors(file).items()}
    pairs = random_deltas(
        {name: each.shape for name, each in tensors.items()}, LAYERS[model, layout]
    )
    down, up, alpha = NAMED[naming]
    written, scale = {}, 1.0
    for layer, (first, second) in pairs.items():
        name = layer.replace(".", "_") if naming == "kohya" else layer
        written |= {down.format(name): first, up.format(name): second}
        if alpha is not None:
            written[alpha.format(name)] = np.array(5.0, np.float32)
            scale = 2.5
    save_file(written, tmp_path / "style.safetensors")
    found = load_lora(tmp_path / "style.safetensors", subject.forward)
    got = flatten_params(lora.merge(found)(subject.forward, subject.params)[1])
    for layer, (first, second) in pairs.items():
        weight = tensors[f"{layer}.weight"].copy()
        tensors[f"{layer}.weight"] = weight + np.float32(scale) * second @ first
    save_file({name: np.ascontiguousarray(each) for name, each in tensors.items()}, file)
    _, wanted = converters.from_pretrained(tmp_path / "model", progress=False)
    wanted = flatten_params(wanted)
    changed = [
        name for name in wanted if np.any(wanted[name] != flatten_params(subject.params)[name])
    ]
    assert sorted(changed) == sorted(f"{path}.kernel" for path in found)
    for name, leaf in wanted.items():
        np.testing.assert_allclose(got[name], leaf, atol=1e-5, err_msg=name)


def test_settings_of_peft_and_of_diffusers(tmp_path):
    """alpha, patterns and the root of rsLoRA, beside the file and in it."""
    subject = testing.tiny_llama()
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qv"]
    down, up = np.ones((4, 16), np.float32), np.ones((16, 4), np.float32)
    value = np.ones((8 * 2, 4), np.float32)
    tensors = {}
    for name, second in zip(names, (up, value), strict=True):
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = second
    shapes = {path: leaf.shape for path, leaf in flatten_params(subject.params).items()}
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"] = np.ones(
        (shapes["blocks.0.attn.to_q.kernel"][1], 4), np.float32
    )
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    patterns = {"v_proj": 2, r"self_attn\..*": 8}  # the first one that fits, as in PEFT
    settings = {"r": 4, "lora_alpha": 7, "alpha_pattern": patterns, "use_rslora": False}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    found = load_lora(folder, subject.forward)
    assert [float(found[f"blocks.0.attn.to_{part}"][1][0, 0]) for part in "qv"] == [2.0, 0.5]
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "use_rslora": True}))
    found = load_lora(folder, subject.forward)
    assert [float(found[f"blocks.0.attn.to_{part}"][1][0, 0]) for part in "qv"] == [4.0, 1.0]

    for wrong, message in (
        ({"use_dora": True}, "this is DoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the model's own weights too"),
        ({"alpha_pattern": {"(": 1}}, "is no regular expression"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps({**settings, **wrong}))
        with pytest.raises(ValueError, match=message):
            load_lora(folder, subject.forward)
    (folder / "adapter_config.json").unlink()
    said = {"text_encoder.r": 4, "text_encoder.lora_alpha": 1}
    said |= {"transformer.r": 4, "transformer.lora_alpha": 16}
    held = {"lora_adapter_metadata": json.dumps(said)}
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", metadata=held)
    found = load_lora(folder, subject.forward)
    assert float(found["blocks.0.attn.to_q"][1][0, 0]) == 4.0


def test_a_file_of_the_hub_has_its_settings(tmp_path, monkeypatch):
    """Though only the file was asked for."""
    subject = testing.tiny_llama()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    wide = flatten_params(subject.params)["blocks.0.attn.to_q.kernel"].shape[1]
    pair = {"A": np.ones((4, 16), np.float32), "B": np.ones((wide, 4), np.float32)}
    origin, held = tmp_path / "origin/inner", tmp_path / "snapshots/commit/inner"
    for folder in (origin, held):
        folder.mkdir(parents=True)
    tensors = {f"{name}.lora_{part}.weight": each for part, each in pair.items()}
    save_file(tensors, origin / "adapter_model.safetensors")
    (origin / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8}))

    def download(repo, file, **options):
        assert repo == "owner/name"
        if not (origin.parent / file).is_file():
            raise huggingface_hub.errors.EntryNotFoundError(file)
        return shutil.copy(origin.parent / file, held.parent / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = load_lora("owner/name/inner/adapter_model.safetensors", subject.forward)
    assert found["blocks.0.attn.to_q"][1][0, 0] == 2.0


def test_copies_of_a_weight_change_together(tmp_path):
    subject = testing.tiny_dit()
    wide = flatten_params(subject.params)["time.fc1.kernel"].shape

    def load(*scales):
        tensors = {}
        for layer, scale in enumerate(scales):
            name = f"transformer_blocks.{layer}.norm1.emb.timestep_embedder.linear_1"
            tensors[f"{name}.lora_A.weight"] = np.ones((2, wide[0]), np.float32)
            tensors[f"{name}.lora_B.weight"] = np.full((wide[1], 2), scale, np.float32)
        save_file(tensors, tmp_path / "style.safetensors")
        return load_lora(tmp_path / "style.safetensors", subject.forward)

    assert list(load(1, 1)) == ["time.fc1"]
    with pytest.raises(ValueError, match=r"changes time.fc1 twice, in different ways"):
        load(1, 2)


def test_bad_files(tmp_path):
    subject = testing.tiny_flux()

    def load(tensors, **options):
        save_file(tensors, tmp_path / "style.safetensors")
        return load_lora(tmp_path / "style.safetensors", subject.forward, **options)

    down, up = np.ones((2, 32), np.float32), np.ones((32, 2), np.float32)
    stem = "transformer.transformer_blocks.0.attn.to_q"
    good = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    assert list(load(good)) == ["blocks.0.attn.image.to_q"]
    other = {name.replace("blocks.0", "blocks.9"): each for name, each in good.items()}
    with pytest.raises(
        ValueError, match="1 of its 2 layers are not in the model:\n  transformer_bl"
    ):
        load(good | other)
    with pytest.raises(ValueError, match="only down"):
        load({f"{stem}.lora_A.weight": down})
    with pytest.raises(ValueError, match="factors must be matrices"):
        lora.add({"style": {"blocks.0.attn.image.to_q": (down[0], up[0])}})
    with pytest.raises(ValueError, match="holds DoRA"):
        load(good | {f"{stem}.lora_magnitude_vector": np.ones(32, np.float32)})
    with pytest.raises(ValueError, match=r"no \[rank, in\] and \[out, rank\]"):
        load({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up.T.copy()})
    text = {
        "text_encoder.layers.0.q.lora_A.weight": down,
        "text_encoder.layers.0.q.lora_B.weight": up,
    }
    with pytest.warns(UserWarning, match="changes text_encoder too: read these with component="):
        load(good | text)
    with pytest.raises(ValueError, match="changes no text_encoder_2; it changes transformer"):
        load(good, component="text_encoder_2")
    wide = {f"{stem}.lora_A.weight": np.ones((2, 30), np.float32), f"{stem}.lora_B.weight": up}
    with pytest.raises(ValueError, match=r"style.down is \[30, 2\], the layer needs \[32, 2\]"):
        lora.add({"style": load(wide)})(subject.forward, subject.params)
    with pytest.raises(ValueError, match=r"looked for pytorch_lora_weights.safetensors"):
        load_lora(tmp_path, subject.forward)
    with pytest.raises(ValueError, match=r"has no layers blocks.9.attn"):
        lora.merge({"blocks.9.attn": (down.T, up.T)})(subject.forward, subject.params)
    with pytest.raises(ValueError, match="needs the factors of its adapters"):
        lora.transform(lora.METHOD.ladder(subject)[0])(subject.forward, subject.params)
    with pytest.raises(ValueError, match="different names, each a Python identifier"):
        lora.LoRAPlan((("a b", ()),))
