"""Pipelines: the components of a model directory, ready to be called.

pipe = effjax.pipeline("PixArt-alpha/PixArt-Sigma-XL-2-512-MS")
images = pipe("a red fox", key=jax.random.key(0))
pipe = effjax.pipeline("Qwen/Qwen2.5-0.5B-Instruct")
answer = pipe([{"role": "user", "content": "Hello"}], max_new_tokens=64)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
from jax.typing import DTypeLike

import converters
from converters import hub
from effjax import recipe
from effjax.pipelines.diffusion import (
    INDEX,
    SCHEDULER,
    ClassConditionalPipeline,
    Pipeline,
    TextToImagePipeline,
)
from effjax.pipelines.images import to_pil
from effjax.pipelines.labels import read_names
from effjax.pipelines.text import GENERATION, TextPipeline
from effjax.transform import Pair

__all__ = [
    "ClassConditionalPipeline",
    "Pipeline",
    "TextPipeline",
    "TextToImagePipeline",
    "pipeline",
    "to_pil",
]

# diffusers' classes, and those that `save` writes.
_KINDS: Mapping[str, Any] = {
    "DiTPipeline": ClassConditionalPipeline,
    "PixArtSigmaPipeline": TextToImagePipeline,
    "PixArtAlphaPipeline": TextToImagePipeline,
    "ClassConditionalPipeline": ClassConditionalPipeline,
    "TextToImagePipeline": TextToImagePipeline,
    "TextPipeline": TextPipeline,
}


def pipeline(
    source: str | os.PathLike,
    *,
    revision: str | None = None,
    dtype: DTypeLike | None = None,
    compute_dtype: DTypeLike | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    sharding: jax.sharding.Sharding | None = None,
    progress: bool = True,
    check_finite: bool = False,
) -> Any:
    """Load a pipeline directory or hub repository with all its components.

    Args:
        source: directory (diffusers' layout; transformers', for language models; or written by a
            pipeline's `save`), or hub repository ("owner/name").
        revision, token, cache_dir, local_files_only: as in `converters.from_pretrained`.
        dtype: float32, bfloat16 or float16 for the parameters of all components; as stored if
            None. Quantised layers keep their codes.
        compute_dtype: of the computation; that of `dtype` if None, else that in which most
            parameters of a component are stored (as saved, for one that a pipeline's `save` wrote).
        sharding: where parameters go.
        progress: show bars for what takes longer than a second.
        check_finite: reject NaN and infinite weights.

    Returns:
        A `ClassConditionalPipeline` or `TextToImagePipeline`, as model_index.json says; a
        `TextPipeline` if there is only a config.json.

    Raises:
        ValueError: for another kind of pipeline, or if a component is missing or damaged.
    """
    remote = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    index: dict[str, Any]
    try:
        index = hub.read_json_of(source, INDEX, **remote)
    except ValueError:
        if not hub.has_file(source, "config.json", **remote):
            raise
        index = {"_class_name": "TextPipeline"}
    kind = _KINDS.get(index.get("_class_name", ""))
    if kind is None:
        raise ValueError(
            f"{source} is a {index.get('_class_name')}; pipelines that can be loaded are "
            f"{', '.join(_KINDS)}"
        )

    options: dict[str, Any] = {
        "dtype": dtype,
        "compute_dtype": compute_dtype,
        "sharding": sharding,
        "progress": progress,
        "check_finite": check_finite,
    }

    def component(name: str | None) -> Pair:
        if name and (Path(source) / name / recipe.RECIPE).is_file():
            return recipe.load(Path(source) / name, **options)
        return converters.from_pretrained(source, subfolder=name, **options, **remote)

    if kind is TextPipeline:
        folder = "model" if (Path(source) / "model").is_dir() else None
        settings = GENERATION if hub.has_file(source, GENERATION, **remote) else None
        return TextPipeline(
            *component(folder),
            tokenizer=_tokenizer(source, "tokenizer" if folder else None, **remote),
            settings=hub.read_json_of(source, settings, **remote) if settings else {},
        )
    has_vae = (Path(source) / "vae").is_dir() or (index.get("vae") or [None])[0] is not None
    if kind is ClassConditionalPipeline:
        own = {"names": read_names(index.get("id2label"))}
    else:
        own = {
            "text_encoder": component("text_encoder"),
            "tokenizer": _tokenizer(source, "tokenizer", **remote),
        }
    return kind(
        *component("transformer"),
        scheduler=hub.read_json_of(source, SCHEDULER, **remote),
        vae=component("vae") if has_vae else None,
        **own,
    )


def _tokenizer(source: str | os.PathLike, subfolder: str | None, **remote: Any) -> Any:
    from transformers import AutoTokenizer  # slow to import

    folder = Path(source) / (subfolder or "")
    try:
        if Path(source).is_dir():
            return AutoTokenizer.from_pretrained(folder)
        return AutoTokenizer.from_pretrained(str(source), subfolder=subfolder or "", **remote)
    except (OSError, ValueError, ImportError) as error:
        message = f"{source} has no tokenizer that can be read: {error}"
        name = f"{subfolder}/tokenizer.json" if subfolder else "tokenizer.json"
        if find_spec("sentencepiece") is None and not hub.has_file(source, name, **remote):
            message += f"\nIt has no {name}; for a sentencepiece model: pip install sentencepiece"
        raise ValueError(message) from error
