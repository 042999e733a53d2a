"""Tiny models with random weights, on which every method can be tried in a second."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.autoregression import NextBlock, NextDiagonal, NextScale, NextStage, NextToken
from effjax.autoregression.next_token import ids_of
from effjax.calibration import Answers, Samples, Sequences, Trajectory
from effjax.context import PyTree
from effjax.forward import (
    Forward,
    Params,
    abstract,
    flatten_params,
    nest_params,
    parameter_count,
)
from effjax.generate import Reading
from effjax.guidance import Guidance
from effjax.layers.joint import PooledEmbeddings
from effjax.models.chameleon import Chameleon, ChameleonConfig
from effjax.models.dit import DiT, DiTConfig
from effjax.models.ecar import ECAR, ECARConfig
from effjax.models.flux import Flux, FluxConfig
from effjax.models.janus import Janus, JanusConfig
from effjax.models.llama import Llama, LlamaConfig
from effjax.models.llamagen import Caption, LlamaGen, LlamaGenConfig, Prompt
from effjax.models.nar import NAR, NARConfig
from effjax.models.nbp import NBP, NBPConfig
from effjax.models.pixart import PixArt, PixArtConfig, PromptEmbeddings
from effjax.models.sd3 import SD3, SD3Config
from effjax.models.var import VAR, VARConfig
from effjax.models.vq_model import VQModel, VQModelConfig
from effjax.models.vqvae import VQVAE, VQVAEConfig
from effjax.samplers import DDIM, DPMSolver, FlowMatchEuler, Sampler


@dataclasses.dataclass(frozen=True, repr=False)
class Subject:
    """A model with what it takes to run it.

    Attributes:
        forward, params: the model.
        sampler: a guided sampler of a few steps or scales; a `Reading`, for language models.
        cond: its conditioning, with a leading batch axis.
        uncond: the unconditional counterpart, None where the model has a null condition.
    """

    forward: Forward
    params: Params
    sampler: Sampler | NextScale | NextStage | NextToken | Reading
    cond: PyTree
    uncond: PyTree = None

    def data(self, kind: type | tuple[type, ...] | None) -> Any:
        """What a method with this `Method.data` looks at; None if it looks at nothing."""
        if isinstance(kind, tuple):
            reads = isinstance(self.sampler, Reading)
            kind = next(each for each in kind if (each is not Trajectory) == reads)
        if kind is None:
            return None
        if kind is Trajectory:
            return Trajectory(self.sampler, self.cond, jax.random.key(0), self.uncond)
        if kind is Samples:
            return Samples(self.sampler, lambda count, number: jnp.resize(self.cond, (count,)))
        texts = np.asarray(self.cond)
        if kind is Sequences:
            count, tokens = texts.shape
            return Sequences(lambda *size: np.resize(texts, size[1::-1]), tokens, count)

        def answers(tokens: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
            weights = np.broadcast_to(np.arange(tokens) >= tokens * 3 // 4, (count, tokens))
            return np.resize(texts, (count, tokens)), weights.astype(np.float32)

        return Answers(answers, len(texts))

    def __repr__(self) -> str:
        return f"Subject({self.forward}, {parameter_count(self.params):,} parameters)"


def random_params(shapes: Params, *, seed: int = 0) -> Params:
    """Parameters of these shapes and dtypes, none of them zero: kernels by their inputs' number.

    Made by numpy, which compiles nothing: a new shape costs no time.
    """
    rng = np.random.default_rng(seed)

    def fill(path: str, leaf: Any) -> jax.Array:
        scale = math.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.05
        values = scale * rng.standard_normal(leaf.shape) + path.endswith("scale")
        return jnp.asarray(values.astype(leaf.dtype))

    return nest_params({path: fill(path, leaf) for path, leaf in flatten_params(shapes).items()})


def tiny_dit(*, steps: int = 4, batch: int = 2, **options: Any) -> Subject:
    """A DiT of two layers on 16 x 16 images (64 tokens) with a guided DDIM sampler.

    Args:
        steps: steps of the sampler.
        batch: images to sample.
        options: fields of `DiTConfig` to change.
    """
    shape = {
        "sample_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "head_dim": 8,
        "num_classes": 5,
    }
    config = DiTConfig(**{**shape, **options})
    forward, shapes = abstract(DiT, config)
    sampler = Sampler(DDIM(steps=steps), guidance=2.0)
    cond = jnp.arange(batch, dtype=jnp.int32) % config.num_classes
    return Subject(forward, random_params(shapes), sampler, cond)


def tiny_pixart(*, steps: int = 4, batch: int = 2, **options: Any) -> Subject:
    """A PixArt of two layers on 16 x 16 images (64 tokens) with random captions of five tokens.

    Args:
        steps: steps of the sampler, a guided DPM-Solver++.
        batch: images to sample.
        options: fields of `PixArtConfig` to change.
    """
    shape = {
        "sample_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "head_dim": 8,
        "caption_channels": 12,
        "interpolation": 1.0,
    }
    config = PixArtConfig(**{**shape, **options})
    forward, shapes = abstract(PixArt, config)
    sampler = Sampler(
        DPMSolver(steps=steps), guidance=2.0, arrangement=Guidance(("uncond", "cond"))
    )
    rng = np.random.default_rng(2)
    states = rng.standard_normal((2, batch, 5, config.caption_channels)).astype(np.float32)
    mask = np.arange(5) < 2 + np.arange(batch)[:, None] % 4
    cond, uncond = (
        PromptEmbeddings(jnp.asarray(each), jnp.asarray(keep))
        for each, keep in zip(states, (mask, np.ones_like(mask)))
    )
    return Subject(forward, random_params(shapes), sampler, cond, uncond)


def _pooled(batch: int, tokens: int, channels: int, pooled: int) -> list[PooledEmbeddings]:
    """Random embeddings of prompts and of the empty one."""
    rng = np.random.default_rng(2)
    return [
        PooledEmbeddings(
            *(
                jnp.asarray(rng.standard_normal(shape), jnp.float32)
                for shape in ((batch, tokens, channels), (batch, pooled))
            )
        )
        for _ in range(2)
    ]


def tiny_sd3(*, steps: int = 4, batch: int = 2, **options: Any) -> Subject:
    """An SD3.5 of three layers, one of them dual, on 16 x 16 images (64 tokens) and five tokens.

    Args:
        steps: steps of the sampler, a guided Euler method of flows.
        batch: images to sample.
        options: fields of `SD3Config` to change.
    """
    shape = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "num_heads": 2,
        "head_dim": 8,
        "caption_channels": 12,
        "pooled_channels": 10,
        "max_grid": 12,
        "qk_norm": True,
        "dual_layers": (0,),
    }
    config = SD3Config(**{**shape, **options})
    forward, shapes = abstract(SD3, config)
    order = Guidance(("uncond", "cond"))
    sampler = Sampler(FlowMatchEuler(steps=steps, shift=3.0), guidance=2.0, arrangement=order)
    cond, uncond = _pooled(batch, 5, config.caption_channels, config.pooled_channels)
    return Subject(forward, random_params(shapes), sampler, cond, uncond)


def tiny_flux(*, steps: int = 4, batch: int = 2, **options: Any) -> Subject:
    """A FLUX of two dual and two single layers on 16 x 16 images (64 tokens) and five tokens.

    Args:
        steps: steps of the sampler, an Euler method of flows; guidance is told to the model.
        batch: images to sample.
        options: fields of `FluxConfig` to change.
    """
    shape = {
        "sample_size": 16,
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_heads": 2,
        "head_dim": 16,
        "caption_channels": 12,
        "pooled_channels": 10,
        "axes": (4, 6, 6),
    }
    config = FluxConfig(**{**shape, **options})
    forward, shapes = abstract(Flux, config)
    sampler = Sampler(FlowMatchEuler(steps=steps))
    cond, _ = _pooled(batch, 5, config.caption_channels, config.pooled_channels)
    scales = jnp.full(batch, 3.5) if config.guidance_embeds else None
    return Subject(forward, random_params(shapes), sampler, cond._replace(guidance=scales))


def tiny_vqvae(**options: Any) -> tuple[Forward, Params]:
    """A VQVAE of two levels: 40 codes of 4 channels, images twice as wide as latents.

    Args:
        options: fields of `VQVAEConfig` to change.
    """
    shape = {
        "latent_channels": 4,
        "vocab_size": 40,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "norm_groups": 4,
    }
    forward, shapes = abstract(VQVAE, VQVAEConfig(**{**shape, **options}))
    return forward, random_params(shapes)


def tiny_var(*, batch: int = 2, **options: Any) -> Subject:
    """A VAR of two layers and three scales (14 tokens) with `tiny_vqvae` and a guided loop.

    Args:
        batch: images to sample.
        options: fields of `VARConfig` to change.
    """
    shape = {
        "patch_nums": (1, 2, 3),
        "num_layers": 2,
        "num_heads": 2,
        "head_dim": 8,
        "intermediate_size": 32,
        "num_classes": 5,
        "vocab_size": 40,
        "code_channels": 4,
    }
    config = VARConfig(**{**shape, **options})
    forward, shapes = abstract(VAR, config)
    codes = {"vocab_size": config.vocab_size, "latent_channels": config.code_channels}
    loop = NextScale(tiny_vqvae(**codes), config.patch_nums, guidance=2.0, top_k=20, top_p=0.9)
    cond = jnp.arange(batch, dtype=jnp.int32) % config.num_classes
    return Subject(forward, random_params(shapes), loop, cond)


def tiny_vq_model(**options: Any) -> tuple[Forward, Params]:
    """A VQ model of two levels: 40 codes of 4 channels, images twice as wide as latents.

    Args:
        options: fields of `VQModelConfig` to change.
    """
    shape = {
        "latent_channels": 4,
        "encoder_channels": 6,
        "vocab_size": 40,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "norm_groups": 4,
    }
    forward, shapes = abstract(VQModel, VQModelConfig(**{**shape, **options}))
    return forward, random_params(shapes)


def tiny_llamagen(*, batch: int = 2, **options: Any) -> Subject:
    """A LlamaGen of two layers and 4 x 4 tokens with `tiny_vq_model` and a guided loop.

    Args:
        batch: images to sample.
        options: fields of `LlamaGenConfig` to change; with `caption_channels` it is a text-to-image
            model.
    """
    return _of_codes(LlamaGen, LlamaGenConfig, NextToken, batch, options)


def tiny_nar(*, batch: int = 2, **options: Any) -> Subject:
    """A NAR of two layers and one more, 4 x 4 tokens, with `tiny_vq_model` and a guided loop."""
    return _of_codes(NAR, NARConfig, NextDiagonal, batch, options)


def tiny_nbp(*, batch: int = 2, **options: Any) -> Subject:
    """An NBP of two layers and four rows of four tokens, as `tiny_nar`."""
    options = {"block": (1, 1, 4), **options}
    return _of_codes(NBP, NBPConfig, NextBlock, batch, options)


def _of_codes(
    model: type[LlamaGen],
    kind: type[LlamaGenConfig],
    loop: type[NextToken],
    batch: int,
    options: Any,
) -> Subject:
    shape = {
        "grid": 4,
        "num_layers": 2,
        "num_heads": 2,
        "head_dim": 8,
        "intermediate_size": 24,
        "vocab_size": 40,
        "num_classes": 0 if options.get("caption_channels") else 5,
        "caption_tokens": 6,
    }
    config = kind(**{**shape, **options})
    forward, shapes = abstract(model, config)
    codes = tiny_vq_model(vocab_size=config.vocab_size)
    grid = config.image_tokens // config.grid, config.grid
    own: dict[str, Any] = (
        {"groups": config.groups} if isinstance(config, NARConfig | NBPConfig) else {}
    )
    sampler = loop(codes, grid, guidance=2.0, top_k=20, top_p=0.9, **own)
    cond: PyTree = jnp.arange(batch, dtype=jnp.int32) % max(config.num_classes, 1)
    if config.caption_channels:
        size = batch, config.caption_tokens, config.caption_channels
        states = np.random.default_rng(4).standard_normal(size).astype(np.float32)
        mask = np.arange(size[1]) >= 1 + 2 * (np.arange(batch)[:, None] % 3)
        cond = Caption(jnp.asarray(states), jnp.asarray(mask), jnp.zeros(batch, bool))
    return Subject(forward, random_params(shapes), sampler, cond)


def tiny_janus(*, batch: int = 2, **options: Any) -> Subject:
    """A Janus of two layers and 4 x 4 codes with `tiny_vq_model`, prompts and a guided loop.

    Args:
        batch: images to sample.
        options: fields of `JanusConfig` to change.
    """
    shape = {
        "vocab_size": 40,
        "text_vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 8,
        "max_positions": 64,
        "code_channels": 4,
        "grid": 4,
        "bos_token": 1,
        "boi_token": 2,
        "pad_token": 0,
    }
    return _of_prompts(Janus, JanusConfig(**{**shape, **options}), batch)


def tiny_chameleon(*, batch: int = 2, **options: Any) -> Subject:
    """A Chameleon of two layers and 4 x 4 codes, as `tiny_janus`; token 24 + i is the code i."""
    shape = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "max_positions": 64,
        "image_ids": tuple(range(24, 64)),
        "image_placeholder": 5,
        "grid": 4,
        "bos_token": 1,
        "boi_token": 2,
        "pad_token": 0,
        "sep_token": 3,
    }
    return _of_prompts(Chameleon, ChameleonConfig(**{**shape, **options}), batch)


def _of_prompts(
    model: type[Janus | Chameleon], config: JanusConfig | ChameleonConfig, batch: int
) -> Subject:
    forward, shapes = abstract(model, config)
    ids = ids_of(config)
    codes = tiny_vq_model(vocab_size=config.vocab_size if ids is None else len(ids))
    grid = config.grid, config.grid
    loop = NextToken(codes, grid, guidance=2.0, top_k=20, top_p=0.9, ids=ids)
    rng = np.random.default_rng(5)
    tokens = rng.integers(3, config.text_vocab_size, (batch, 6)).astype(np.int32)
    tokens[:, 0], tokens[:, -1] = 1, 2
    mask = np.arange(6) >= np.arange(batch)[:, None] % 3
    cond = Prompt(jnp.asarray(np.where(mask, tokens, 0)), jnp.asarray(mask))
    return Subject(forward, random_params(shapes), loop, cond)


def tiny_ecar(*, batch: int = 2, **options: Any) -> Subject:
    """An ECAR of three stages (21 tokens) with two layers in both parts, and a guided loop.

    Args:
        batch: images to sample.
        options: fields of `ECARConfig` to change.
    """
    shape = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 1,
        "num_layers": 2,
        "num_heads": 2,
        "head_dim": 8,
        "intermediate_size": 32,
        "head_layers": 2,
        "head_width": 24,
        "head_intermediate_size": 32,
        "num_classes": 5,
    }
    config = ECARConfig(**{**shape, **options})
    forward, shapes = abstract(ECAR, config)
    steps = tuple(range(2, 2 + config.num_stages))
    loop = NextStage(config.stages, config.in_channels, steps, guidance=3.0)
    cond = jnp.arange(batch, dtype=jnp.int32) % config.num_classes
    return Subject(forward, random_params(shapes), loop, cond)


def tiny_llama(*, batch: int = 2, **options: Any) -> Subject:
    """A Llama of two layers with grouped heads, and random sequences of 20 tokens to read.

    Args:
        batch: sequences.
        options: fields of `LlamaConfig` to change.
    """
    shape = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "max_positions": 64,
    }
    config = LlamaConfig(**{**shape, **options})
    forward, shapes = abstract(Llama, config)
    texts = np.random.default_rng(3).integers(0, config.vocab_size, (batch, 20)).astype(np.int32)
    return Subject(forward, random_params(shapes), Reading(prompt=12, new=8), jnp.asarray(texts))
