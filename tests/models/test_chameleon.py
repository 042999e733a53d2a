"""Chameleon: parity with transformers on random weights, images' tokens, the VQGAN's own layout."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters import convert, from_pretrained, save_pretrained
from converters.chameleon import code_of, name_of
from effjax import testing
from effjax.autoregression import NextToken, Prompt
from effjax.generate import generate
from effjax.methods import kivi, round_to_nearest
from effjax.models.chameleon import ChameleonConfig
from effjax.models.vq_model import VQModelConfig, decode, encode, latents_of
from pallas_kernels import use_implementation

CODES, KEY = 12, jax.random.key(0)
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 9)).astype(np.int32)
MASK = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9], bool)
POSITIONS = np.where(MASK, MASK.cumsum(1) - 1, -1).astype(np.int32)


@pytest.fixture(autouse=True)
def _what_runs_here():
    with use_implementation("xla"):
        yield


@pytest.fixture(scope="module", params=[False, True], ids=["7b", "34b"])
def reference(request, tmp_path_factory):
    """A random model of transformers, and its directory."""
    pytest.importorskip("torch")
    from tests.models import chameleon_reference

    model = chameleon_reference.random_model(swin_norm=request.param)
    path = tmp_path_factory.mktemp("chameleon") / "model"
    model.save_pretrained(path)
    return model, path


def test_logits_equal_those_of_transformers(reference, tmp_path):
    """But for the tokens of images, which transformers leaves out; and written back."""
    import torch

    model, path = reference
    forward, params = from_pretrained(path, progress=False)
    config = forward.config
    names = model.config.vocabulary_map
    assert config.image_ids == tuple(names[name_of(code)] for code in range(CODES))
    with torch.no_grad():
        options = {"attention_mask": torch.tensor(MASK).long()}
        tokens = torch.tensor(TOKENS).long()
        wanted = model(input_ids=tokens, **options).logits.numpy()
        hidden = model.model(input_ids=tokens, **options)[0]
        whole = model.lm_head(hidden).numpy()
    got = np.asarray(jax.jit(forward)(params, {}, TOKENS, POSITIONS)[0])
    text = np.setdiff1d(np.arange(40), config.image_ids)
    chex.assert_trees_all_close(got[MASK][:, text], wanted[MASK][:, text], atol=1e-4)
    chex.assert_trees_all_close(got[MASK], whole[MASK], atol=1e-4)
    save_pretrained(forward, params, tmp_path / "again", progress=False)
    again = from_pretrained(tmp_path / "again", progress=False)
    assert again[0] == forward
    chex.assert_trees_all_equal(again[1], params)


def test_caches_and_quantizers_run(reference):
    """Texts continue as by reading them whole; with a cache of few bits they still do."""
    _, path = reference
    forward, params = from_pretrained(path, progress=False)
    made = generate(forward, params, TOKENS[1:], max_new_tokens=4)
    tokens = np.concatenate([TOKENS[1:], made.tokens], axis=1)
    logits = np.asarray(jax.jit(forward)(params, {}, tokens)[0])
    np.testing.assert_array_equal(logits[0, 8:12].argmax(-1), made.tokens[0])
    small = round_to_nearest.transform(round_to_nearest.uniform(8, 16))(forward, params)
    small = kivi.transform(kivi.KIVIPlan(group=4))(*small)
    assert generate(*small, TOKENS[1:], max_new_tokens=4).tokens.shape == (1, 4)


def test_images_are_drawn_among_their_codes(reference):
    """Guided greedy codes through the cache are those of whole sequences, read without one."""
    _, path = reference
    forward, params = from_pretrained(path, progress=False)
    ids = jnp.asarray(forward.config.image_ids)
    codes = testing.tiny_vq_model(vocab_size=CODES)
    loop = NextToken(codes, (2, 2), guidance=2.0, top_k=1, ids=ids)
    cond = Prompt(jnp.asarray(TOKENS), jnp.asarray(MASK))
    away = Prompt(jnp.asarray(TOKENS), jnp.asarray(np.arange(9) >= 7)[None].repeat(2, axis=0))
    run = jax.jit(lambda loop, params: loop.sample(forward, params, cond, KEY, uncond=away))
    _, own = run(loop, params)
    read = jax.jit(forward)
    made = np.zeros((2, 0), np.int32)
    for _ in range(4):
        tokens = np.concatenate([TOKENS, np.asarray(ids)[made]], axis=1)
        z = []
        for mask in (MASK, np.asarray(away.mask)):
            seen = np.pad(mask, ((0, 0), (0, 4)), constant_values=True)[:, : tokens.shape[1]]
            places = np.where(seen, seen.cumsum(1) - 1, -1).astype(np.int32)
            z.append(np.asarray(read(params, {}, tokens, places)[0])[:, -1, np.asarray(ids)])
        guided = z[1] + 2.0 * (z[0] - z[1])
        made = np.concatenate([made, guided.argmax(-1)[:, None].astype(np.int32)], axis=1)
    np.testing.assert_array_equal(own, made)
    unknown = dataclasses.replace(
        forward, config=dataclasses.replace(forward.config, sep_token=None)
    )
    with pytest.raises(ValueError, match=r"know its sep_token.*: vocabulary_map of config"):
        loop.init(unknown, params, cond, KEY)
    with pytest.raises(ValueError, match="12 codes among its tokens: give ids="):
        dataclasses.replace(loop, ids=None).init(forward, params, cond, KEY, uncond=away)


def test_images_are_the_tokens_of_transformers(reference, tmp_path):
    """The VQGAN's own file holds encoder and decoder; transformers has the first of them."""
    import torch

    from tests.models import var_reference
    from tests.models.chameleon_reference import vqgan

    model, _ = reference
    sd = vqgan(model)
    torch.save({"state_dict": sd}, tmp_path / "vqgan.ckpt")
    forward, params = from_pretrained(tmp_path / "vqgan.ckpt", progress=False)
    assert forward.config == VQModelConfig(
        latent_channels=8,
        encoder_channels=8,
        vocab_size=CODES,
        block_out_channels=(32,) * 5,
        layers_per_block=1,
        level_attention=False,
        unit_codes=False,
    )
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        wanted = model.model.vqmodel.encode(images).image_tokens.reshape(2, -1)
    given = jnp.asarray(images.permute(0, 2, 3, 1).numpy())
    tokens = jax.jit(encode)(forward, params, given)
    np.testing.assert_array_equal(tokens, wanted.numpy())
    # The decoder by the reference of VAR's, whose projections are one convolution.
    for kind in ("weight", "bias"):
        parts = [sd[f"decoder.mid.attn_1.{part}.{kind}"] for part in "qkv"]
        sd[f"decoder.mid.attn_1.qkv.{kind}"] = torch.cat(parts)
    codes = sd["quantize.embedding.weight"][wanted].transpose(1, 2).reshape(2, 8, 2, 2)
    z = torch.nn.functional.conv2d(codes, sd["post_quant_conv.weight"], sd["post_quant_conv.bias"])
    sd["post_quant_conv.weight"] = torch.eye(8)[:, :, None, None] * torch.nn.functional.pad(
        torch.ones(1, 1), (1, 1, 1, 1)
    )
    sd["post_quant_conv.bias"] = torch.zeros(8)
    drawn = var_reference.decoded(sd, z).permute(0, 2, 3, 1).numpy()

    @jax.jit
    def images_of(params, tokens):
        return decode(forward, params, latents_of(forward, params, tokens, (2, 2)))

    chex.assert_trees_all_close(images_of(params, tokens), drawn, atol=2e-4)
    convert(tmp_path / "vqgan.ckpt", tmp_path / "again", progress=False)
    again = from_pretrained(tmp_path / "again", progress=False)
    assert again[0] == forward
    chex.assert_trees_all_equal(again[1], params)


def test_names_of_codes():
    for code in (0, 7, 10, 8191):
        assert code_of(name_of(code)) == code
    assert name_of(8191) == "IMGIMGIBJBZ"


def test_bad_input(reference, tmp_path):
    _, path = reference
    config = json.loads((path / "config.json").read_text())
    for changes, message in (
        ({"vocabulary_map": {name_of(1): 5}}, r"every code 0 \.\.\. 0 of images once"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2}}, "a stretched rotation"),
    ):
        folder = tmp_path / message[:5].strip()
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        (folder / "model.safetensors").symlink_to(path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            from_pretrained(folder, progress=False)
    with pytest.raises(ValueError, match="image_ids must be different tokens"):
        dataclasses.replace(ChameleonConfig(), image_ids=(4, 4))
