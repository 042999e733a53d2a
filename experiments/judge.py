"""An objective judge for generated glyphs: a small classifier, its features and two statistics.

The judge reads which of the 36 classes an image shows, and its last hidden layer is the feature
space of a Frechet distance. It is trained on real glyphs only and has never seen the faces of
`glyphs.HELD_OUT_FONTS`, on which it is tested. `python -m experiments.judge` trains it anew.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from safetensors import numpy as safetensors
from scipy import ndimage

from effjax.compat import relaxed_promotion
from experiments import glyphs

WEIGHTS = Path(__file__).parent / "weights" / "judge"
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
            f"{', '.join(differing)}; train it anew with `python -m experiments.judge`"
        )
    values = [jnp.asarray(stored[name], jnp.float32) for name in wanted]
    nnx.replace_by_pure_dict(abstract, jax.tree.unflatten(treedef, values))
    return nnx.merge(graphdef, abstract)


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

    The place is the quarter with most light, the colour that nearest to the light's direction
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
    enlarged = ndimage.zoom(shown.max(-1), (1, 2, 2), order=1, grid_mode=True, mode="nearest")
    labels = predict(judge, 2 * enlarged[..., None] - 1)
    return glyphs.Things(
        labels, (total @ directions.T).argmax(1).astype(np.int32), places.astype(np.int32)
    )


def alignment(judge: Judge, images: np.ndarray | Array, asked: glyphs.Things) -> dict[str, float]:
    """The part of images [N, 32, 32, 3] that show what was asked: class, colour, place, and all."""
    seen = read_scenes(judge, images)
    right = {
        "class": seen.labels == asked.labels,
        "colour": seen.colours == asked.colours,
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
    centre = seen + z * z / (2 * total)
    spread = z * math.sqrt(seen * (1 - seen) / total + (z / (2 * total)) ** 2)
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def _covariance(samples: np.ndarray) -> np.ndarray:
    centred = samples - samples.mean(0)
    return centred.T @ centred / (len(samples) - 1)


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


# Training.


def augment(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    """Vary real glyphs [B, 32, 32, 1] as other faces and generators would.

    Shape, weight of the strokes, blur, contrast and noise: each has its own random strength per
    image, from nothing to mild.
    """
    side, knots = glyphs.SIDE, np.eye(4)
    spread = np.stack([np.interp(np.linspace(0, 3, side), range(4), knot) for knot in knots], 1)
    pulls = rng.uniform(-2.0, 2.0, (len(images), 2, 4, 4))  # pixels, at the knots of a rubber sheet
    sources = np.mgrid[:side, :side] + spread @ pulls @ spread.T  # [B, 2, row, column]
    bend = partial(ndimage.map_coordinates, order=1, cval=-1)
    images = np.stack(list(map(bend, images[..., 0], sources)))[..., None]

    def strength(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, (len(images), 1, 1, 1)).astype(np.float32)

    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1)
    near = np.stack([padded[:, y : y + side, x : x + side] for y in range(3) for x in range(3)])
    weight = strength(-0.4, 0.4)  # thinner or bolder strokes
    pole = np.where(weight > 0, near[1::2].max(0), near[1::2].min(0))
    images = images + np.abs(weight) * (pole - images)
    images = images + strength(0.0, 0.5) * (near.mean(0) - images)
    images = images * strength(0.75, 1.1) + strength(-0.1, 0.1)
    noise = rng.standard_normal(images.shape, dtype=np.float32)
    return images + strength(0.0, 0.2) * noise


def train(seed: int, steps: int, *, size: int = 128, rate: float = 2e-3) -> Judge:
    """Train on `glyphs.FONTS` and `glyphs.JUDGE_FONTS`, `size` images a step; print the loss."""
    graphdef, params = nnx.split(Judge(rngs=nnx.Rngs(seed)))
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps)
    optimiser = optax.adamw(schedule, weight_decay=0.02)

    def loss_of(params: nnx.State, images: Array, labels: Array) -> Array:
        logits = nnx.merge(graphdef, params)(images)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), 0.05)
        return optax.softmax_cross_entropy(logits, targets).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: nnx.State, state: optax.OptState, images: Array, labels: Array):
        loss, gradient = jax.value_and_grad(loss_of)(params, images, labels)
        updates, state = optimiser.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    rng = np.random.default_rng([seed, 0, 1])  # another stream than any batch has
    data = glyphs.batches(seed, size, fonts=glyphs.FONTS + glyphs.JUDGE_FONTS)
    with relaxed_promotion():
        state = optimiser.init(params)
        for index, (images, labels) in zip(range(1, steps + 1), data, strict=False):
            params, state, loss = step(params, state, augment(rng, images), labels)
            if index % 100 == 0 or index == steps:
                print(f"step {index:5d} of {steps}: loss {loss:.4f}", flush=True)
    return nnx.merge(graphdef, params)


def save(judge: Judge, folder: Path) -> None:
    """Write `model.safetensors` in float16; the file appears whole or not at all."""
    leaves, _ = jax.tree.flatten_with_path(nnx.to_pure_dict(nnx.state(judge)))
    tensors = {_name(path): np.asarray(leaf, np.float16) for path, leaf in leaves}
    _write(folder / "model.safetensors", safetensors.save(tensors))


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(path.name + ".partial")
    partial_path.write_bytes(content)
    os.replace(partial_path, path)


def evaluate(judge: Judge, rng: np.random.Generator, *, size: int = 1024) -> dict:
    """Accuracy on world and held-out fonts, and the Frechet distance between two real halves."""

    def on(*fonts: str) -> float:
        return accuracy(judge, *glyphs.batch(rng, size, fonts))

    first, second = (features(judge, glyphs.batch(rng, size)[0]) for _ in range(2))
    return {
        "images_per_figure": size,
        "world_accuracy": on(*glyphs.FONTS),
        "held_out_accuracy": on(*glyphs.HELD_OUT_FONTS),
        "held_out_accuracy_by_font": {font: on(font) for font in glyphs.HELD_OUT_FONTS},
        "frechet_real_halves": frechet(first, second),
    }


def main() -> None:
    """Train, write weights and log, print the figures of the weights as they were written."""
    parser = argparse.ArgumentParser("python -m experiments.judge", description=main.__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    start = time.perf_counter()
    save(train(options.seed, options.steps), options.output)
    seconds = round(time.perf_counter() - start, 1)
    judge = load(options.output)
    log = {
        "command": f"python -m experiments.judge --seed {options.seed} --steps {options.steps}",
        "seed": options.seed,
        "steps": options.steps,
        "training_seconds": seconds,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(nnx.state(judge))),
        **evaluate(judge, np.random.default_rng([options.seed, 0, 2])),
    }
    text = json.dumps(log, indent=2) + "\n"
    _write(options.output / "log.json", text.encode())
    print(text, end="")


if __name__ == "__main__":
    main()
