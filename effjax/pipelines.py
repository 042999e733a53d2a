"""Pipelines: the components of a model directory with a sampler, from conditions to PIL images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from PIL import Image

import converters
from converters import hub
from effjax import recipe
from effjax.forward import Forward, Params
from effjax.models import autoencoder_kl
from effjax.samplers import Sampler, Schedule
from effjax.storage import new_directory, write_json
from effjax.transform import Pair

INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
STEPS, GUIDANCE = 50, 4.0  # of diffusers' DiTPipeline


@dataclasses.dataclass(frozen=True)
class ClassConditionalPipeline:
    """A class-conditional diffusion model, ready to sample.

    Attributes:
        forward, params: the denoiser, possibly transformed.
        scheduler: contents of its scheduler_config.json.
        names: class index by name; may be empty.
        vae: forward and parameters of the latent decoder, None for models of pixels.
    """

    forward: Forward
    params: Params
    scheduler: Mapping[str, Any]
    names: Mapping[str, int] = dataclasses.field(default_factory=dict)
    vae: Pair | None = None

    def __call__(
        self,
        labels: Sequence[int | str],
        *,
        key: jax.Array,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        progress: bool = True,
        callback_on_step_end: Callable[[int, jax.Array], Any] | None = None,
    ) -> list[Image.Image]:
        """Generate one image for each label.

        Args:
            labels: class indices or names; the same key gives the same image for a label's place.
            key: PRNG key, `jax.random.key(seed)`.
            num_steps: denoising steps; those of the plan, else 50.
            guidance_scale: 1 is no guidance; that of the plan, else 4.0.
            progress: show a bar over the steps.
            callback_on_step_end: called as `callback_on_step_end(step, latents)`.

        Returns:
            PIL images, "L" or "RGB".

        Raises:
            ValueError: for unknown labels, or steps that the forward is not planned for.
        """
        sampler = self.sampler(num_steps=num_steps, guidance_scale=guidance_scale)
        indices = jnp.asarray([self.index(label) for label in labels], jnp.int32)
        x = sampler.stepwise(
            self.forward,
            self.params,
            indices,
            key,
            progress=progress,
            callback=callback_on_step_end,
        )
        return to_pil(self.decode(x))

    def sampler(
        self, *, num_steps: int | None = None, guidance_scale: float | None = None
    ) -> Sampler:
        """The sampler that a call uses: `jax.jit(sampler)(forward, params, labels, key)`."""
        steps = self._planned("calls", STEPS) if num_steps is None else num_steps
        scale = self._planned("guidance", GUIDANCE) if guidance_scale is None else guidance_scale
        tokens = getattr(self.forward.config, "tokens", None)
        schedule = Schedule.from_config(self.scheduler, steps=steps, tokens=tokens)
        return Sampler(schedule, guidance=float(scale))

    def index(self, label: int | str) -> int:
        """Class index of a label: an index, the name of a class, or an index as text.

        Raises:
            ValueError: for an unknown label.
        """
        if isinstance(label, str) and label in self.names:
            return self.names[label]
        classes = self.forward.config.num_classes
        index = int(label) if not isinstance(label, str) or label.isdigit() else -1
        if not 0 <= index < classes:
            known = f", or one of {', '.join(self.names)}" if self.names else ""
            raise ValueError(f"no class {label!r}: a label is 0 ... {classes - 1}{known}")
        return index

    def decode(self, x: jax.Array) -> jax.Array:
        """Samples [B, H, W, C] to images float32 in -1 ... 1 (about)."""
        return x if self.vae is None else _decode(*self.vae, x)

    def transform(self, *transforms: Callable[[Forward, Params], Pair]) -> ClassConditionalPipeline:
        """This pipeline with a transformed denoiser."""
        forward, params = self.forward, self.params
        for each in transforms:
            forward, params = each(forward, params)
        return dataclasses.replace(self, forward=forward, params=params)

    def save(self, path: str | os.PathLike) -> None:
        """Save all components as one directory that `effjax.pipeline` reads, atomically."""
        index = {
            "_class_name": type(self).__name__,
            "id2label": {str(index): name for name, index in self.names.items()},
        }
        with new_directory(Path(path)) as directory:
            write_json(directory / INDEX, index)
            (directory / SCHEDULER).parent.mkdir()
            write_json(directory / SCHEDULER, self.scheduler)
            recipe.save(directory / "transformer", self.forward, self.params)
            if self.vae is not None:
                recipe.save(directory / "vae", *self.vae)

    def _planned(self, attribute: str, default: Any) -> Any:
        """What a plan of the recipe says, else the default."""
        values = [getattr(plan, attribute, None) for _, plan in self.forward.recipe]
        return next((value for value in values if value is not None), default)


def pipeline(
    source: str | os.PathLike,
    *,
    revision: str | None = None,
    dtype: DTypeLike | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    sharding: jax.sharding.Sharding | None = None,
    progress: bool = True,
) -> ClassConditionalPipeline:
    """Load a pipeline directory or hub repository: denoiser, scheduler, labels, latent decoder.

    Args:
        source: directory (diffusers' layout, or written by `ClassConditionalPipeline.save`), or hub
            repository ("owner/name").
        revision, token, cache_dir, local_files_only: as in `converters.from_pretrained`.
        dtype: of parameters; as stored if None.
        sharding: where parameters go.
        progress: show bars for what takes longer than a second.

    Raises:
        ValueError: if this is no class-conditional pipeline, or a component is missing or damaged.
    """
    remote = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    index = hub.read_json_of(source, INDEX, **remote)
    if "transformer" not in index and index.get("_class_name") != "ClassConditionalPipeline":
        raise ValueError(
            f"{source} is a {index.get('_class_name')}; only class-conditional transformer "
            f"pipelines (DiTPipeline) can be loaded"
        )

    def component(name: str) -> Pair:
        if (Path(source) / name / recipe.RECIPE).is_file():
            return recipe.load(Path(source) / name, sharding=sharding)
        options = {"dtype": dtype, "sharding": sharding, "progress": progress, **remote}
        return converters.from_pretrained(source, subfolder=name, **options)

    has_vae = (Path(source) / "vae").is_dir() or index.get("vae", [None])[0] is not None
    return ClassConditionalPipeline(
        *component("transformer"),
        scheduler=hub.read_json_of(source, SCHEDULER, **remote),
        names={name: int(number) for number, name in index.get("id2label", {}).items()},
        vae=component("vae") if has_vae else None,
    )


def to_pil(images: jax.Array | np.ndarray) -> list[Image.Image]:
    """Images float[B, H, W, 1 or 3] in -1 ... 1 as 8-bit PIL images."""
    pixels = np.asarray(jax.device_get(images), np.float32)
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3):
        raise ValueError(
            f"images must be [B, H, W, 1 or 3], got {list(pixels.shape)}; latents need a decoder"
        )
    pixels = np.clip(np.rint(127.5 * (pixels + 1)), 0, 255).astype(np.uint8)
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]


@jax.jit
def _decode(forward: Forward, params: Params, latents: jax.Array) -> jax.Array:
    return autoencoder_kl.decode(forward, params, latents)
