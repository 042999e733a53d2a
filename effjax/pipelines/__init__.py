"""Pipelines: the components of a model directory, ready to be called.

pipe = effjax.pipeline("PixArt-alpha/PixArt-Sigma-XL-2-512-MS")
images = pipe("a red fox", key=jax.random.key(0))
pipe = effjax.pipeline("Qwen/Qwen2.5-0.5B-Instruct")
answer = pipe([{"role": "user", "content": "Hello"}], max_new_tokens=64)
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
from jax.typing import DTypeLike

from converters import hub
from effjax.buckets import POWERS, Buckets, sizes_of
from effjax.executables import load as load_executables
from effjax.fields import naming
from effjax.pipelines import families
from effjax.pipelines.base import INDEX
from effjax.pipelines.class_conditional import ClassConditionalPipeline
from effjax.pipelines.diffusion import Pipeline
from effjax.pipelines.few_step import FewStepPipeline, FewTokenPipeline
from effjax.pipelines.images import to_pil
from effjax.pipelines.loading import Components, refuse_file
from effjax.pipelines.next_scale import NextScalePipeline
from effjax.pipelines.next_stage import NextStagePipeline
from effjax.pipelines.next_token import NextTokenPipeline, TextNextTokenPipeline
from effjax.pipelines.prompt_token import PromptTokenPipeline
from effjax.pipelines.prompts import PromptPipeline, TextToImagePipeline, TextToVideoPipeline
from effjax.pipelines.text import TextPipeline

__all__ = [
    "ClassConditionalPipeline",
    "FewStepPipeline",
    "FewTokenPipeline",
    "NextScalePipeline",
    "NextStagePipeline",
    "NextTokenPipeline",
    "Pipeline",
    "PromptPipeline",
    "PromptTokenPipeline",
    "TextNextTokenPipeline",
    "TextPipeline",
    "TextToImagePipeline",
    "TextToVideoPipeline",
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
    buckets: Buckets = POWERS,
    **components: Any,
) -> Any:
    """Load a pipeline from a directory or a hub repository, with all its components.

    A pipeline holds a model and everything that is needed to call it: text encoders, tokenizers,
    the VAE and settings. For a single model without these use `converters.from_pretrained`.

        pipe = effjax.pipeline("facebook/DiT-XL-2-512", dtype="bfloat16")
        images = pipe("golden retriever", key=jax.random.key(0))

    Args:
        source: a directory or a hub repository ("owner/name"). A directory has the layout of
            diffusers, for language models that of transformers, was written by a pipeline's `save`,
            or has a model_index.json that names weight files beside it.
        revision, token, cache_dir, local_files_only: as in `converters.from_pretrained`.
        variant: which weights to load, such as "fp16", of components that have several. Other
            components load the weights that they have.
        dtype: float32, bfloat16 or float16 for the parameters of all components. None keeps the
            stored dtypes. Quantized layers keep their values.
        compute_dtype: dtype of the computation. None takes `dtype`; without that either, it takes
            the dtype in which most parameters of a component are stored, or the saved one for a
            component that a pipeline's `save` wrote.
        sharding: where to put the parameters.
        progress: show bars for what takes longer than a second.
        check_finite: refuse weights that are NaN or infinite.
        executables: run the programs that `effjax compile` saved in the directory, see
            `effjax.executables`. They are machine code of whoever wrote the directory.
        buckets: sizes that shapes are rounded up to, so that few programs are compiled. "powers of
            two", a list (of tokens for texts, of batches for images), or None for exact shapes.
        components: components to use instead of the directory's, which may lack them:
            `text_encoder`, `vae` and other models as pairs of forward and parameters, `tokenizer`
            and processors of transformers.

    Returns:
        A pipeline. Its class is the one that the table (`effjax.pipelines.families`) has for the
        class in model_index.json. If there is only a config.json, it is a `TextPipeline`, or that
        of the class in `architectures`.

    Raises:
        ValueError: for another kind of pipeline, a single file, a component that is missing or
            damaged, components that belong to different models, and executables that are missing
            or were made for something else.
        TypeError: for unknown arguments.
    """
    sizes_of(buckets)  # before the work
    families.check_names(components)
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
    family = (
        families.of_architectures(folder.read("config.json"))
        if index is None
        else families.of_index(index, str(source))
    )
    options = {
        "dtype": dtype,
        "compute_dtype": compute_dtype,
        "sharding": sharding,
        "progress": progress,
        "check_finite": check_finite,
    }
    if executables and folder.hub is not None:
        raise ValueError(
            f"{source} is a repository, and executables are machine code, which is run from "
            f"directories of this machine only; leave out executables=True"
        )
    saved = load_executables(path) if executables else None
    with naming(path):
        found = Components(family, folder, index, components, variant, options)
        found.check_given()
        made = _CLASSES[family.pipeline].of(found)
    return dataclasses.replace(made, buckets=buckets, executables=saved)


_CLASSES: dict[str, Any] = {
    each.__name__: each
    for each in (
        ClassConditionalPipeline,
        FewStepPipeline,
        FewTokenPipeline,
        NextScalePipeline,
        NextStagePipeline,
        NextTokenPipeline,
        PromptTokenPipeline,
        TextNextTokenPipeline,
        TextPipeline,
        TextToImagePipeline,
        TextToVideoPipeline,
    )
}
