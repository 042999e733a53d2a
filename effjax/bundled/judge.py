"""An objective judge for generated glyphs: a small classifier, its features and two statistics.

The judge reads which of the 36 classes an image shows, and its last hidden layer is the feature
space of a Frechet distance. It was trained on real glyphs only and has never seen the faces of
`glyphs.HELD_OUT_FONTS`, on which it is tested (`experiments/train_judge.py` of the repository).
"""

import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from safetensors import numpy as safetensors
from scipy import ndimage

from effjax import bundled
from effjax.bundled import glyphs

WEIGHTS = bundled.WEIGHTS / "judge"
"""Where the bundled `model.safetensors` and the `log.json` of its training lie."""

_CHUNK = 256


class Judge(nnx.Module):
    """Strided convolutions with group norm: an image to 64 features to 36 logits, in float32."""

    def __init__(self, *, rngs: nnx.Rngs):
        convolution = partial(nnx.Conv, strides=2, rngs=rngs)
        self.convolutions = nnx.List(
            [convolution(1, 32, (5, 5)), convolution(32, 64, (3, 3)), convolution(64, 64, (3, 3))]
        )
        self.norms = nnx.List(nnx.GroupNorm(c, num_groups=8, rngs=rngs) for c in (32, 64, 64))
        self.hidden = nnx.Linear(4 * 4 * 64, 64, rngs=rngs)
        self.head = nnx.Linear(64, len(glyphs.CLASSES), rngs=rngs)

    def embed(self, images: Float[Array, "B 32 32 1"]) -> Float[Array, "B 64"]:
        """The features that `frechet` compares."""
        x = images
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nnx.silu(norm(convolution(x)))
        return nnx.silu(self.hidden(x.reshape(len(x), -1)))

    def __call__(self, images: Float[Array, "B 32 32 1"]) -> Float[Array, "B 36"]:
        return self.head(self.embed(images))


def load(folder: Path = WEIGHTS) -> Judge:
    """Load the trained judge that ships with this package, or one that was trained into `folder`.

    Raises FileNotFoundError where there is none, ValueError where its tensors are not this judge's.
    """
    stored = safetensors.load_file(folder / "model.safetensors")
    judge = nnx.eval_shape(lambda: Judge(rngs=nnx.Rngs(0)))
    graphdef, abstract = nnx.split(judge)
    leaves, treedef = jax.tree.flatten_with_path(nnx.to_pure_dict(abstract))
    wanted = {_name(path): leaf.shape for path, leaf in leaves}
    found = {name: tensor.shape for name, tensor in stored.items()}
    if wanted != found:
        differing = dict(sorted(wanted.items() ^ found.items()))
        raise ValueError(
            f"{folder} holds another network: missing, unexpected or misshapen tensors are "
            f"{', '.join(differing)}; train it anew with `python -m experiments.train_judge`"
        )
    values = [jnp.asarray(stored[name], jnp.float32) for name in wanted]
    nnx.replace_by_pure_dict(abstract, jax.tree.unflatten(treedef, values))
    return nnx.merge(graphdef, abstract)


def save(judge: Judge, folder: Path) -> None:
    """Write `model.safetensors` in float16; the file appears whole or not at all."""
    leaves, _ = jax.tree.flatten_with_path(nnx.to_pure_dict(nnx.state(judge)))
    tensors = {_name(path): np.asarray(leaf, np.float16) for path, leaf in leaves}
    folder.mkdir(parents=True, exist_ok=True)
    partial_path = folder / "model.safetensors.partial"
    partial_path.write_bytes(safetensors.save(tensors))
    os.replace(partial_path, folder / "model.safetensors")


def features(judge: Judge, images: np.ndarray | Array) -> np.ndarray:
    """Features float32 [N, 64] of images [N, 32, 32, 1] in [-1, 1]."""
    return np.concatenate([chunk for chunk, _ in _chunks(judge, images)])


def predict(judge: Judge, images: np.ndarray | Array) -> np.ndarray:
    """The class, int32 [N], that the judge reads in each of the images [N, 32, 32, 1]."""
    return np.concatenate(
        [logits.argmax(-1) for _, logits in _chunks(judge, images)], dtype=np.int32
    )


def accuracy(judge: Judge, images: np.ndarray | Array, labels: np.ndarray | Array) -> float:
    """The part of images [N, 32, 32, 1] in which the judge reads the class of `labels`, int [N]."""
    if np.shape(labels) != (len(images),):
        raise ValueError(f"{len(images)} images need as many labels, not {np.shape(labels)}")
    return float(np.mean(predict(judge, images) == np.asarray(labels)))


def read_scenes(judge: Judge, images: np.ndarray | Array) -> glyphs.Things:
    """The thing that each of the images [N, 32, 32, 3] shows, as `glyphs.captioned` draws them.

    The place is the quarter with most light, the color that nearest to the light's direction
    there, and the class is what the judge reads in that quarter, enlarged to twice its size.
    """
    images = np.asarray(images, np.float32)
    side, half = glyphs.SIDE, glyphs.SIDE // 2
    if images.shape[1:] != (side, side, 3):
        raise ValueError(f"images of shape {images.shape}: scenes are [N, {side}, {side}, 3]")
    light = np.clip((images + 1) / 2, 0, 1).reshape(-1, 2, half, 2, half, 3)
    quarters = light.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4, half, half, 3)
    places = quarters.sum((2, 3, 4)).argmax(1)
    shown = quarters[np.arange(len(images)), places]
    total = shown.sum((1, 2))
    directions = glyphs.RGB / np.linalg.norm(glyphs.RGB, axis=1, keepdims=True)
    zoomed = ndimage.zoom(shown.max(-1), (1, 2, 2), order=1, grid_mode=True, mode="nearest")
    labels = predict(judge, 2 * np.asarray(zoomed)[..., None] - 1)
    return glyphs.Things(
        labels, (total @ directions.T).argmax(1).astype(np.int32), places.astype(np.int32)
    )


def alignment(judge: Judge, images: np.ndarray | Array, asked: glyphs.Things) -> dict[str, float]:
    """The part of images [N, 32, 32, 3] that show what was asked: class, color, place, and all."""
    seen = read_scenes(judge, images)
    right = {
        "class": seen.labels == asked.labels,
        "color": seen.colors == asked.colors,
        "place": seen.places == asked.places,
    }
    right["all"] = np.logical_and.reduce(list(right.values()))
    return {name: float(np.mean(values)) for name, values in right.items()}


def frechet(a: np.ndarray | Array, b: np.ndarray | Array) -> float:
    """Frechet distance between the Gaussians fitted to two sets of features, [N, F] and [M, F].

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), as in Heusel et al. (arXiv 1706.08500).
    The trace of the root is the sum of the singular values of S_a^(1/2) S_b^(1/2), which stays
    exact for singular covariances (few samples, or a generator that collapsed).
    Raises ValueError on fewer than two samples, on unequal F, and on values that are not finite.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"features of shapes {a.shape} and {b.shape}: give [N, F] and [M, F] with the same F, "
            "and at least two samples each"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("features hold NaN or infinity; look at the images they were read from")
    covariance_a, covariance_b = _covariance(a), _covariance(b)
    cross = np.linalg.norm(_root(covariance_a) @ _root(covariance_b), "nuc")
    means = np.sum((a.mean(0) - b.mean(0)) ** 2)
    distance = means + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross
    return max(0.0, float(distance))


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion of which `correct` out of `total` were seen."""
    if not (0 <= correct <= total and total > 0 and 0 < confidence < 1):
        raise ValueError(
            f"correct {correct}, total {total}, confidence {confidence}: "
            "0 <= correct <= total, total > 0 and 0 < confidence < 1 are needed"
        )
    z, seen = NormalDist().inv_cdf((1 + confidence) / 2), correct / total
    center = seen + z * z / (2 * total)
    spread = z * math.sqrt(seen * (1 - seen) / total + (z / (2 * total)) ** 2)
    scale = 1 + z * z / total
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


def _covariance(samples: np.ndarray) -> np.ndarray:
    centered = samples - samples.mean(0)
    return centered.T @ centered / (len(samples) - 1)


def _root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


@partial(jax.jit, static_argnums=0)
def _read(graphdef: nnx.GraphDef, params: nnx.State, images: Array) -> tuple[Array, Array]:
    judge = nnx.merge(graphdef, params)
    embedded = judge.embed(images)
    return embedded, judge.head(embedded)


def _chunks(judge: Judge, images: np.ndarray | Array) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Features and logits in chunks of one padded size: any number of images, one compilation."""
    images = np.asarray(images, np.float32)
    side = glyphs.SIDE
    if images.shape[1:] != (side, side, 1) or not len(images):
        raise ValueError(
            f"images of shape {images.shape}: the judge reads [N >= 1, {side}, {side}, 1]"
        )
    graphdef, params = nnx.split(judge)
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK]
        padded = np.zeros((_CHUNK, side, side, 1), np.float32)
        padded[: len(chunk)] = chunk
        embedded, logits = _read(graphdef, params, padded)
        yield np.asarray(embedded)[: len(chunk)], np.asarray(logits)[: len(chunk)]


def _name(path: tuple) -> str:
    return ".".join(str(part.key) for part in path)
