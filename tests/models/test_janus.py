"""Janus: parity with transformers on random weights, in logits, images and guided tokens."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters import from_pretrained, save_pretrained
from effjax.autoregression import NextToken, Prompt, logits_of
from effjax.methods import kivi, round_to_nearest
from effjax.models.janus import JanusConfig
from effjax.models.vq_model import VQModelConfig, decode, latents_of
from effjax.storage import open_safetensors
from pallas_kernels import use_implementation

GRID, CODES, BOS, BOI, PAD = 3, 24, 1, 5, 0
TOKENS = np.random.default_rng(0).integers(6, 50, (2, 7)).astype(np.int32)
MASK = np.array([[0, 0, 1, 1, 1, 1, 1], [1] * 7], bool)
TOKENS[0, :3], TOKENS[1, 0], TOKENS[:, -1] = (PAD, PAD, BOS), BOS, BOI
PROMPT = Prompt(jnp.asarray(TOKENS), jnp.asarray(MASK))
KEY = jax.random.key(0)
PARTS = ("vision_model", "aligner")


@pytest.fixture(autouse=True)
def _what_runs_here():
    with use_implementation("xla"):
        yield


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A random model of transformers, and its directory."""
    pytest.importorskip("torch")
    from tests.models import janus_reference

    model = janus_reference.random_model()
    path = tmp_path_factory.mktemp("janus") / "model"
    model.save_pretrained(path)
    return model, path


@pytest.fixture(scope="module")
def loaded(reference):
    """The generation path and the VQ model, as pairs."""
    _, path = reference
    options = {"progress": False}
    return from_pretrained(path, **options), from_pretrained(path, part="vqmodel", **options)


def test_logits_equal_those_of_transformers(reference, loaded):
    """Of codes behind padded prompts, and the log-probabilities of what follows."""
    import torch

    model, _ = reference
    (forward, params), _ = loaded
    codes = np.random.default_rng(1).integers(0, CODES, (2, GRID**2))
    with torch.no_grad():
        text = model.get_input_embeddings()(torch.tensor(TOKENS).long())
        images = model.prepare_embeddings_for_image_generation(torch.tensor(codes[:, :-1]))
        mask = np.pad(MASK, ((0, 0), (0, GRID**2 - 1)), constant_values=True)
        hidden = model.model.language_model(
            inputs_embeds=torch.cat([text, images], dim=1),
            attention_mask=torch.tensor(mask).long(),
            position_ids=torch.tensor(np.maximum(mask.cumsum(1) - 1, 0)),
        ).last_hidden_state
        wanted = model.model.generation_head(hidden[:, TOKENS.shape[1] - 1 :]).numpy()
    got = jax.jit(logits_of)(forward, params, jnp.asarray(codes, jnp.int32), PROMPT)
    assert wanted.std() > 0.1
    chex.assert_trees_all_close(got, wanted, atol=1e-4)


def test_greedy_tokens_equal_those_of_transformers(reference, loaded):
    """With the unconditional branch that keeps the tokens that begin a text and an image."""
    import torch

    model, _ = reference
    pair, codes = loaded
    asked = {"generation_mode": "image", "do_sample": False, "guidance_scale": 5.0}
    inputs = torch.tensor(TOKENS).long(), torch.tensor(MASK).long()
    wanted = model.generate(inputs[0], attention_mask=inputs[1], **asked).numpy()
    loop = NextToken(codes, (GRID, GRID), guidance=5.0, top_k=1)
    latents, tokens = jax.jit(loop.sample)(*pair, PROMPT, KEY)
    np.testing.assert_array_equal(tokens, wanted)
    assert len(np.unique(wanted)) > 3
    images = jax.jit(decode)(*codes, latents)
    with torch.no_grad():
        drawn = model.decode_image_tokens(torch.tensor(wanted)).numpy()
    chex.assert_trees_all_close(images, drawn, atol=1e-4)


def test_the_decoder_is_that_of_transformers(reference, loaded):
    import torch

    model, _ = reference
    _, (forward, params) = loaded
    assert forward.config == VQModelConfig(
        latent_channels=4,
        encoder_channels=8,
        vocab_size=CODES,
        block_out_channels=(32, 64),
        layers_per_block=1,
    )
    tokens = np.arange(2 * GRID**2).reshape(2, -1) % CODES
    with torch.no_grad():
        wanted = model.decode_image_tokens(torch.tensor(tokens)).numpy()
        pixels = torch.rand(2, 3, 2 * GRID, 2 * GRID) * 2 - 1
        vqmodel = model.model.vqmodel
        latents = vqmodel.quant_conv(vqmodel.encoder(pixels)).permute(0, 2, 3, 1).numpy()

    @jax.jit
    def images_of(params, tokens):
        return decode(forward, params, latents_of(forward, params, tokens, (GRID, GRID)))

    chex.assert_trees_all_close(images_of(params, jnp.asarray(tokens)), wanted, atol=1e-4)
    own = jax.jit(forward)(params, {}, None, jnp.asarray(pixels.permute(0, 2, 3, 1).numpy()))[0]
    chex.assert_trees_all_close(own, latents, atol=1e-4)


def test_written_back_by_name(reference, loaded, tmp_path):
    """Tensors to the bit; what reads images is what is left out. A file alone tells as much."""
    model, path = reference
    pair, codes = loaded
    held = {name: value.numpy() for name, value in model.state_dict().items()}
    written = {}
    for name, (each, layout) in {"model": (pair, None), "codes": (codes, "janus")}.items():
        save_pretrained(*each, tmp_path / name, layout=layout, progress=False)
        again = from_pretrained(tmp_path / name, progress=False)
        assert again[0] == each[0]
        chex.assert_trees_all_equal(again[1], each[1])
        tensors = open_safetensors(tmp_path / name / "model.safetensors")
        written |= {name: tensor.read() for name, tensor in tensors.items()}
    for name, value in written.items():
        np.testing.assert_array_equal(value, held[name])
    left = {name.removeprefix("model.").split(".")[0] for name in held.keys() - written.keys()}
    assert left == {*PARTS, "lm_head"}

    alone = from_pretrained(path / "model.safetensors", progress=False)
    assert alone[0] == pair[0]  # a config.json is beside it
    (tmp_path / "weights.safetensors").symlink_to(path / "model.safetensors")
    inferred = from_pretrained(tmp_path / "weights.safetensors", progress=False)
    tokens = {"bos_token": None, "boi_token": None, "pad_token": None, "max_positions": 16384}
    assert inferred[0].config == dataclasses.replace(pair[0].config, **tokens)
    part = from_pretrained(tmp_path / "weights.safetensors", part="vqmodel", progress=False)
    assert part[0] == codes[0]
    chex.assert_trees_all_equal((inferred[1], part[1]), (pair[1], codes[1]))
    loop = NextToken(codes, (GRID, GRID), guidance=5.0)
    with pytest.raises(ValueError, match=r"know its bos_token, .*: generation_config.json"):
        loop.init(*inferred, PROMPT, KEY)


def test_compressed_caches_and_weights_run(loaded):
    """As on LlamaGen; a cache of floats behind each method's own gives the same tokens."""
    pair, codes = loaded
    small = round_to_nearest.transform(round_to_nearest.uniform(8, 16))(*pair)
    small = kivi.transform(kivi.KIVIPlan(group=4))(*small)
    loop = NextToken(codes, (GRID, GRID), guidance=5.0, top_k=1)
    _, tokens = jax.jit(loop.sample)(*small, PROMPT, KEY)
    assert tokens.shape == (2, GRID**2)
    assert [name for name, _ in small[0].recipe] == ["round_to_nearest", "kivi"]


def test_bad_input(reference, loaded, tmp_path):
    _, path = reference
    pair, codes = loaded
    config = json.loads((path / "config.json").read_text())
    for number, (section, changes, message) in enumerate(
        (
            ("vq_config", {"num_embeddings": 30}, r"(?s)3 problems.*vision_head.weight: misshapen"),
            ("vq_config", {"projection_dim": 16}, "projection_dim must be the hidden_size"),
            ("vq_config", {"num_hidden_layers": 3}, "asks for what the model does not have"),
            ("vision_config", {"num_image_tokens": 8}, "3 x 3 tokens, and num_image_tokens is 8"),
            ("text_config", {"num_hidden_layers": 99999}, "text_config.num_hidden_layers asks for"),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        changed = {**config, section: {**config[section], **changes}}
        (folder / "config.json").write_text(json.dumps(changed))
        (folder / "model.safetensors").symlink_to(path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            from_pretrained(folder, progress=False)
    with pytest.raises(ValueError, match="has no part 'vision': they are vqmodel"):
        from_pretrained(path, part="vision", progress=False)
    with pytest.raises(ValueError, match=r"tokens of prompts are 0 \.\.\. 49, got boi_token=50"):
        dataclasses.replace(pair[0].config, boi_token=50)
    loop = NextToken(codes, (GRID, GRID))
    long = Prompt(jnp.zeros((1, 60), jnp.int32), jnp.ones((1, 60), bool))
    with pytest.raises(ValueError, match=r"prompt of 60 tokens.*more than the 64"):
        loop.init(*pair, long, KEY)
    with pytest.raises(ValueError, match="conditioned on a Prompt; got"):
        jax.eval_shape(loop.sample, *pair, jnp.zeros(1, jnp.int32), KEY)
    with pytest.raises(ValueError, match="VQ model has 24 codes, and the model predicts 16384"):
        dataclasses.replace(loop, grid=(24, 24)).check(
            dataclasses.replace(pair[0], config=JanusConfig())
        )
