"""Pipelines: the components of a model directory, ready to be called.

pipe = effjax.pipeline("PixArt-alpha/PixArt-Sigma-XL-2-512-MS")
images = pipe("a red fox", key=jax.random.key(0))
pipe = effjax.pipeline("Qwen/Qwen2.5-0.5B-Instruct")
answer = pipe([{"role": "user", "content": "Hello"}], max_new_tokens=64)
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.typing import DTypeLike

from converters import hub
from effjax.buckets import POWERS, Buckets, sizes_of
from effjax.executables import load as load_executables
from effjax.fields import naming
from effjax.pipelines.base import INDEX
from effjax.pipelines.diffusion import (
    SCHEDULER,
    ClassConditionalPipeline,
    Pipeline,
    TextToImagePipeline,
)
from effjax.pipelines.images import to_pil
from effjax.pipelines.labels import read_names
from effjax.pipelines.loading import Components, refuse_file
from effjax.pipelines.settings import read_settings
from effjax.pipelines.text import TextPipeline
from effjax.recipe import RECIPE
from effjax.samplers import Schedule

__all__ = [
    "ClassConditionalPipeline",
    "Pipeline",
    "TextPipeline",
    "TextToImagePipeline",
    "pipeline",
    "to_pil",
]


def pipeline(
    source: str | os.PathLike,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: DTypeLike | None = None,
    compute_dtype: DTypeLike | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    sharding: jax.sharding.Sharding | None = None,
    progress: bool = True,
    check_finite: bool = False,
    executables: bool = False,
    text_encoder: Any = None,
    tokenizer: Any = None,
    vae: Any = None,
    buckets: Buckets = POWERS,
) -> Any:
    """Load a pipeline directory or hub repository with all its components.

    Args:
        source: directory (diffusers' layout; transformers', for language models; or written by a
            pipeline's `save`), or hub repository ("owner/name").
        revision, token, cache_dir, local_files_only: as in `converters.from_pretrained`.
        variant: which weights, such as "fp16", of the components that have several; the others give
            those that they have.
        dtype: float32, bfloat16 or float16 for the parameters of all components; as stored if
            None. Quantized layers keep their values.
        compute_dtype: of the computation; that of `dtype` if None, else that in which most
            parameters of a component are stored (as saved, for one that a pipeline's `save` wrote).
        sharding: where parameters go.
        progress: show bars for what takes longer than a second.
        check_finite: reject NaN and infinite weights.
        executables: run the programs that `effjax compile` saved in the directory, see
            `effjax.executables`. They are machine code of whoever wrote the directory.
        text_encoder, vae: forward and parameters in the place of the directory's, which may be
            without.
        tokenizer: of transformers, in the place of the directory's.
        buckets: sizes that shapes are rounded up to, so that few programs are compiled: "powers of
            two", a list (of tokens for texts, of batches for images), or None for exact shapes.

    Returns:
        A `ClassConditionalPipeline` or `TextToImagePipeline`, as model_index.json says; a
        `TextPipeline` if there is only a config.json.

    Raises:
        ValueError: for another kind of pipeline, a single file, a component that is missing or
            damaged, components that belong to different models, and executables that are not there
            or were made for something else.
    """
    sizes_of(buckets)  # before the work
    path = Path(os.path.expanduser(source))
    if path.is_file():
        refuse_file(path)
    folder = hub.open_folder(
        source,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    index = folder.read(INDEX) if folder.has(INDEX) else None
    if index is None and not folder.has("config.json"):
        folder.read(INDEX)  # says why there is none
    name = str((index or {"_class_name": "TextPipeline"}).get("_class_name"))
    if name not in _KINDS:
        raise ValueError(
            f"{source} is a {name}; pipelines that can be loaded are {', '.join(_KINDS)}"
        )
    options = {
        "dtype": dtype,
        "compute_dtype": compute_dtype,
        "sharding": sharding,
        "progress": progress,
        "check_finite": check_finite,
    }
    given = {"text_encoder": text_encoder, "tokenizer": tokenizer, "vae": vae}
    if executables and folder.hub is not None:
        raise ValueError(
            f"{source} is a repository, and executables are machine code, which is run from "
            f"directories of this machine only; leave out executables=True"
        )
    saved = load_executables(path) if executables else None
    with naming(path):
        made = _KINDS[name](Components(folder, index, given, variant, options))
    return dataclasses.replace(made, buckets=buckets, executables=saved)


def _text(found: Components) -> TextPipeline:
    found.allow("tokenizer")
    saved = found.index is not None
    return TextPipeline(
        *found.model("model" if saved else None),
        tokenizer=found.tokenizer("tokenizer" if saved else None),
        settings=read_settings(found.folder),
        origin=found.origin,
    )


def _class_conditional(found: Components) -> ClassConditionalPipeline:
    found.allow("vae")
    with naming(INDEX):
        names = read_names((found.index or {}).get("id2label"))
    return ClassConditionalPipeline(**_denoiser(found), names=names)


def _text_to_image(found: Components) -> TextToImagePipeline:
    found.allow("text_encoder", "tokenizer", "vae")
    found.require("text_encoder", "tokenizer")
    shared = _denoiser(found)
    encoder = found.model("text_encoder")
    width, read = encoder[0].config.hidden_size, shared["forward"].config.caption_channels
    if width != read:
        raise ValueError(
            f"the text encoder gives {width} channels and the transformer reads {read}: they "
            f"belong to different models"
        )
    tokenizer = found.tokenizer("tokenizer")
    return TextToImagePipeline(**shared, text_encoder=encoder, tokenizer=tokenizer)


def _denoiser(found: Components) -> dict[str, Any]:
    """What pipelines of images share."""
    found.require("transformer")
    models = ("transformer", "text_encoder", "vae")
    if found.variant is not None and not any(map(found.has_variant, models)):
        raise ValueError(f"no component of {found.folder.source} has a variant {found.variant!r}")
    scheduler = found.folder.read(SCHEDULER)
    with naming(SCHEDULER):
        Schedule.from_config(scheduler, steps=1, tokens=1)  # so that it is known before the work
    own = found.folder.has(f"transformer/{RECIPE}")  # it may have been saved without a VAE
    channels = found.folder.read("transformer/config.json").get("in_channels", 4)
    if not own and channels not in _PIXELS:
        found.require("vae")
    forward, params = found.model("transformer")
    vae = found.model("vae") if found.has("vae") else None
    if vae is not None and vae[0].config.latent_channels != forward.config.in_channels:
        raise ValueError(
            f"the VAE decodes {vae[0].config.latent_channels} channels and the transformer makes "
            f"{forward.config.in_channels}: they belong to different models"
        )
    return {
        "forward": forward,
        "params": params,
        "scheduler": scheduler,
        "vae": vae,
        "origin": found.origin,
    }


_PIXELS = (1, 3)  # channels of a model that needs no VAE

# diffusers' classes, and those that `save` writes.
_KINDS: Mapping[str, Callable[[Components], Any]] = {
    "DiTPipeline": _class_conditional,
    "PixArtSigmaPipeline": _text_to_image,
    "PixArtAlphaPipeline": _text_to_image,
    "ClassConditionalPipeline": _class_conditional,
    "TextToImagePipeline": _text_to_image,
    "TextPipeline": _text,
}
