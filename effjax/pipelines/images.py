"""Images and videos as models take and make them, as arrays and as PIL images."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from effjax.finite import warn_unless_finite


def to_unit(images: jax.Array | np.ndarray) -> np.ndarray:
    """Turn images float[B, H, W, 1 or 3] in -1 ... 1 into float32 in 0 ... 1, on the host.

    Raises:
        ValueError: for other shapes.
    """
    pixels = np.asarray(jax.device_get(images), np.float32)
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3):
        raise ValueError(
            f"images must be [B, H, W, 1 or 3], got {list(pixels.shape)}; latents need a decoder"
        )
    return np.clip((pixels + 1) / 2, 0, 1)


def draw(unit: np.ndarray) -> list[Image.Image]:
    """Turn images float32[B, H, W, 1 or 3] in 0 ... 1 into 8-bit PIL images, "L" or "RGB"."""
    pixels = np.rint(255 * np.nan_to_num(unit, nan=0.0)).astype(np.uint8)
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]


def to_pil(images: jax.Array | np.ndarray) -> list[Image.Image]:
    """Turn images float[B, H, W, 1 or 3] in -1 ... 1 into 8-bit PIL images. NaN becomes black.

    Use it for what `decode` of a pipeline returns.

    Warns:
        NotFiniteWarning: if any value is NaN or infinite.

    Raises:
        ValueError: for other shapes.
    """
    unit = to_unit(images)
    warn_unless_finite("images", jnp.asarray(images), "NaN is drawn black.")
    return draw(unit)


def prepared(name: str, given: Any, count: int, size: tuple[int, ...]) -> np.ndarray:
    """Turn images to change into float32[count, H, W, C] in -1 ... 1.

    Args:
        name: of the argument, for messages.
        given: PIL images, which are resized; or arrays [H, W, C] or [N, H, W, C] of that size,
            uint8, or floats in 0 ... 1 as `output_type="np"` gives them. One for all, or one each.
        count: how many there must be.
        size: (H, W, C), with C 1 or 3.

    Raises:
        ValueError: for another number, shape or kind of values.
    """
    height, width, channels = size
    if isinstance(given, Image.Image):
        given = [given]
    if isinstance(given, list | tuple) and all(isinstance(each, Image.Image) for each in given):
        mode = "L" if channels == 1 else "RGB"
        drawn = [each.convert(mode) for each in given]
        resized = [
            each
            if each.size == (width, height)
            else each.resize((width, height), Image.Resampling.LANCZOS)
            for each in drawn
        ]
        pixels = np.stack([np.asarray(each) for each in resized] or [np.empty((0, 0))])
        pixels = pixels[..., None] if channels == 1 else pixels
    else:
        try:
            pixels = np.asarray(given)
        except ValueError:
            raise ValueError(
                f"{name} must be PIL images, or arrays of one shape; got a mixture of kinds or "
                f"shapes"
            ) from None
    if pixels.dtype == np.uint8:
        pixels = pixels.astype(np.float32) / 255
    pixels = pixels[None] if pixels.ndim == 3 else pixels
    fits = pixels.ndim == 4 and pixels.shape[1:] == size and len(pixels) in (1, count)
    if not fits or not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise ValueError(
            f"{name} must be a PIL image or an array {list(size)} of uint8 or floats in 0 ... 1, "
            f"one for all or {count}; got {pixels.dtype}{list(pixels.shape)}"
        )
    if not (pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError(
            f"{name} must have values in 0 ... 1, got {pixels.min():.3g} ... {pixels.max():.3g}; "
            f"images in -1 ... 1 are (x + 1) / 2 there"
        )
    pixels = 2 * pixels.astype(np.float32) - 1
    return np.broadcast_to(pixels, (count, *size))


def finished(outputs: jax.Array, output_type: str) -> Any:
    """Images [B, H, W, C] or videos [B, F, H, W, C] in -1 ... 1 as they are asked for.

    Args:
        outputs: decoded, or still latents.
        output_type: "pil", "np" or "latent".

    Returns:
        PIL images, or a list of them for each video; float32 in 0 ... 1 on the host; or `outputs`.
    """
    if output_type == "latent":
        return outputs
    frames = outputs.shape[1:-3]  # of a video
    unit = to_unit(outputs.reshape(-1, *outputs.shape[-3:]) if frames else outputs)
    if output_type == "np":
        return unit.reshape(outputs.shape)
    drawn = draw(unit)
    if not frames:
        return drawn
    return [drawn[start : start + frames[0]] for start in range(0, len(drawn), frames[0])]
