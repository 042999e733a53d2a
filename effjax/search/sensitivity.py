"""How much worse samples become when one part of a model is quantized: every candidate is data.

One program is compiled. It takes the bits of all layers as an array, rounds weights and inputs to
them, and samples; a search calls it once for each part and candidate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from tqdm.auto import tqdm

from effjax.context import Context, PyTree
from effjax.forward import Forward, Params
from effjax.layers.linear import Linear, dot
from effjax.quant import FLOAT, Quantizer, fake_quantize
from effjax.quant.hadamard import Rotation
from effjax.quant.tensor import prepare_inputs, prepare_weights
from effjax.samplers import Sampler
from effjax.targets import Wrapper, wrap

Metric = Callable[[Array, Array], Array]
"""Of dense samples and others, float32[B, ...]: one number, higher is better."""


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What is done to a layer's inputs before they are rounded, and undone in its weights.

    Attributes:
        smoothing_scale: float32[I] factors of the inputs, of a stack of matrices [*E, I]; None for
            ones.
        rotation: after them, None for none.
    """

    smoothing_scale: Array | None = None
    rotation: Rotation | None = None


class _Rounded(Wrapper):
    """A linear layer with weights and inputs rounded to bits that are data."""

    inner: Linear

    def __init__(self, inner: nnx.Module, bits: Array, preparation: Preparation):
        super().__init__(inner)
        self.weights, self.inputs = bits
        self.preparation = preparation

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        rotation = self.preparation.rotation
        kernel = self.inner.kernel.get_value().astype(jnp.float32)
        bias = self.inner.bias

        def one(x: Array, kernel: Array, scale: Array | None, bias: Array | None) -> Array:
            w = fake_quantize(
                prepare_weights(kernel, scale, rotation),
                Quantizer(symmetric=False),
                bits=self.weights,
                axes=0,
            )
            rounded = fake_quantize(
                prepare_inputs(x, scale, rotation), Quantizer(), bits=self.inputs, axes=-1
            ).astype(x.dtype)
            y = dot(rounded, w)
            return y if bias is None else y + bias.astype(x.dtype)

        for _ in kernel.shape[:-2]:  # every matrix of a stack by itself
            one = jax.vmap(one)
        scale = self.preparation.smoothing_scale
        return one(x, kernel, scale, None if bias is None else bias.get_value())


@dataclasses.dataclass(frozen=True, eq=False)
class Rounding:
    """Patch: round weights (by channel, asymmetric) and inputs (by token) of linear layers.

    Attributes:
        bits: int32[layers, 2], of weights and inputs; 16 leaves them as they are.
        preparations: path and preparation of the layers, in the order of `bits`.
    """

    bits: Array
    preparations: Mapping[str, Preparation]

    def __call__(self, module: nnx.Module, context: Context) -> None:
        for bits, (path, preparation) in zip(self.bits, self.preparations.items(), strict=True):
            wrap(module, path, _Rounded, bits, preparation)


def rounded_samples(
    forward: Forward,
    params: Params,
    sampler: Sampler,
    cond: PyTree,
    *,
    key: Array,
    preparations: Mapping[str, Preparation],
    uncond: PyTree = None,
) -> Callable[[np.ndarray], Array]:
    """Bits int32[layers, 2] to samples, always from the same noise; one compiled program.

    Args:
        forward, params: the model, not quantized.
        sampler, cond, uncond, key: what is sampled.
        preparations: of the layers, in the order of the bits.
    """

    @jax.jit
    def sample(params: Params, bits: Array) -> Array:
        rounded = forward.patch(Rounding(bits, preparations))
        return sampler(rounded, params, cond, key, uncond=uncond)

    return lambda bits: sample(params, bits)


def sensitivity(
    sample: Callable[[np.ndarray], Array],
    layers: Sequence[str],
    *,
    parts: Sequence[Sequence[str]],
    candidates: Sequence[tuple[int, int]],
    metrics: Sequence[Metric],
    rest: tuple[int, int] = (FLOAT, FLOAT),
    progress: bool = True,
) -> np.ndarray:
    """Score samples with one part at a time rounded, all else in floats or to other bits.

    Args:
        sample: from `rounded_samples`.
        layers: paths, in the order of its bits.
        parts: paths of the layers that are rounded together.
        candidates: (weight bits, input bits) to try.
        metrics: by which each part is scored.
        rest: (weight bits, input bits) of the layers of other parts.
        progress: show a bar.

    Returns:
        float[parts, candidates], higher is better.

    Raises:
        ValueError: for a part with other layers, or as many metrics as there are not parts.
    """
    places = {path: i for i, path in enumerate(layers)}
    unknown = sorted({path for part in parts for path in part} - set(places))
    if unknown or len(metrics) != len(parts):
        raise ValueError(
            f"each of {len(parts)} parts needs a metric (given: {len(metrics)}) and layers that "
            f"are rounded (others: {unknown})"
        )
    others = np.tile(np.asarray(rest, np.int32), (len(places), 1))
    dense = sample(np.full_like(others, FLOAT))
    scores = np.empty((len(parts), len(candidates)))
    bar = tqdm(total=scores.size, desc="sensitivity", unit="run", disable=not progress, leave=False)
    with bar:
        for i, part in enumerate(parts):
            for j, candidate in enumerate(candidates):
                bits = others.copy()
                bits[[places[path] for path in part]] = candidate
                scores[i, j] = metrics[i](dense, sample(bits))
                bar.update()
    return scores


def fidelity(dense: Array, other: Array) -> Array:
    """Minus the share of quantization noise in the signal of a typical sample.

    The noise of parts that are rounded one at a time about adds up when all are: sums of it are
    what an allocation should make small. (Sums of decibels are not: each bit is worth six of them
    in every part, however little noise that part makes.)

    Typical is the geometric mean over samples. Now and then a sample tips over to another image,
    whatever made the noise; a few of these are most of an arithmetic mean, and hide the rest.
    """
    each = tuple(range(1, dense.ndim))
    noise, signal = (jnp.sum(jnp.square(x), axis=each) for x in (dense - other, dense))
    share = jnp.maximum(noise / signal, 1e-20)  # a sample without noise is one of many
    return -jnp.exp(jnp.mean(jnp.log(share)))


def sqnr(dense: Array, other: Array) -> Array:
    """Ratio of signal to quantization noise in dB, over the whole batch (MixDQ)."""
    noise = jnp.sum(jnp.square(dense - other))
    return 10 * jnp.log10(jnp.sum(jnp.square(dense)) / jnp.maximum(noise, 1e-20))
