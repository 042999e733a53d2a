"""Stages of resolution: a flow from noise to data in windows of time, coarse to fine.

Time is 0 at noise and 1 at data. Stage k makes images of its own size, each side half of the next
one's, and its flow runs from t = s_k to t = e_k along straight lines (arXiv 2410.05954):

    start = s_k U(D_{k-1} x) + (1 - s_k) n          D_k averages to the size of stage k
    end   = e_k D_k x + (1 - e_k) n                 U repeats pixels, n is the noise of both ends

Between two stages an image is enlarged and gets new noise, so that it has the mean and the
covariance of the next start:

    start = (s / e) U(end) + alpha n'               n' has the covariance 1, and gamma in a block

Enlarged noise is equal in blocks of 2 x 2. Its variance is made whole by alpha, and its covariances
within a block cancel for gamma < 0; with e = 2 s / (1 + s) that is gamma = -1/3, the lowest there
is, and alpha = sqrt(3) (1 - s) / 2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from effjax.layers.embeddings import unpatchify
from effjax.layers.linear import Linear
from effjax.layers.norms import AffineLayerNorm
from effjax.layers.scales import Scales, Sides

LOWEST_GAMMA = -1 / 3
"""Covariance of four values with variance 1 whose sum is 0."""
_ROUNDING = 1e-6


def even_windows(stages: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Starts (k - 1) / S, and the ends that need the least new noise."""
    starts = tuple(stage / stages for stage in range(stages))
    return starts, (*(2 * start / (1 + start) for start in starts[1:]), 1.0)


@dataclasses.dataclass(frozen=True)
class Stages:
    """Sizes and windows of the stages of an image, static. Stages are numbered from 0.

    Attributes:
        sample_size: height and width of the images of the last stage.
        patch_size: side of the patch of pixels that is one token, in all stages.
        starts, ends: of the windows, in 0 ... 1.

    Raises:
        ValueError: for sizes that do not halve, windows that are none, and ends so early that no
            noise makes a start of them.
    """

    sample_size: int
    patch_size: int
    starts: tuple[float, ...]
    ends: tuple[float, ...]

    def __post_init__(self) -> None:
        starts, ends = self.starts, self.ends
        if not starts or len(starts) != len(ends):
            raise ValueError(
                f"every stage has a start and an end, got {len(starts)} starts and {len(ends)} ends"
            )
        unit = self.patch_size * 2 ** (len(starts) - 1)
        if self.sample_size % unit:
            raise ValueError(
                f"{len(starts)} stages with patches of {self.patch_size} halve an image "
                f"{len(starts) - 1} times: sample_size must be a multiple of {unit}, got "
                f"{self.sample_size}. Take fewer stages, or another size."
            )
        rising = all(a < b for a, b in pairwise(starts))
        if starts[0] != 0 or not rising or not starts[-1] < 1:
            raise ValueError(f"starts must be 0 first, then rise, and stay below 1; got {starts}")
        if ends[-1] != 1 or not all(0 < end <= 1 for end in ends):
            raise ValueError(f"ends must be above 0 and at most 1, and 1 last; got {ends}")
        for stage, (end, start) in enumerate(zip(ends, starts[1:])):
            if end <= start:
                raise ValueError(
                    f"stage {stage} must end after stage {stage + 1} starts, got the end {end} and "
                    f"the start {start}: the default is 2 s / (1 + s) = {2 * start / (1 + start):g}"
                )
            if self._gamma(stage + 1) < LOWEST_GAMMA - _ROUNDING:
                raise ValueError(
                    f"from the end {end} of stage {stage} to the start {start} of the next one "
                    f"takes noise with gamma = {self._gamma(stage + 1):.4g}, and none is below "
                    f"-1/3: end at 2 s / (1 + s) = {2 * start / (1 + start):g} or later"
                )

    @property
    def count(self) -> int:
        return len(self.starts)

    @property
    def sides(self) -> Sides:
        """Tokens on a side of every stage."""
        return tuple(self.size(stage) // self.patch_size for stage in range(self.count))

    def size(self, stage: int) -> int:
        """Height and width of the images of a stage."""
        return self.sample_size // self.factor(stage)

    def factor(self, stage: int) -> int:
        """How many times larger the images of the last stage are."""
        return 2 ** (self.count - 1 - stage)

    def scales(self, start: int, stop: int) -> Scales:
        """The stages start ... stop - 1 as parts of a sequence."""
        return Scales(self.sides, start, stop)

    def span(self, stage: int) -> float:
        """Length of a window."""
        return self.ends[stage] - self.starts[stage]

    # --- tokens -----------------------------------------------------------------------------------

    def tokens(self, x: Float[Array, "B H W I"]) -> Float[Array, "B S P"]:
        """Patches of an image, row by row; in each its pixels, row by row, with their channels."""
        batch, height, width, channels = x.shape
        p = self.patch_size
        x = x.reshape(batch, height // p, p, width // p, p, channels)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, p * p * channels)

    def image(self, tokens: Float[Array, "B S P"], stage: int) -> Float[Array, "B H W I"]:
        """The inverse of `tokens`."""
        side = self.sides[stage]
        return unpatchify(tokens, side, side, patch=self.patch_size)

    # --- images of a stage, and at full size ------------------------------------------------------

    def whole(self, x: Float[Array, "B H W I"], stage: int) -> Float[Array, "B X Y I"]:
        """An image of a stage, enlarged to the size of the last one."""
        return enlarged(x, self.factor(stage))

    def part(self, x: Float[Array, "B X Y I"], stage: int) -> Float[Array, "B H W I"]:
        """The image of a stage of which `whole` made this one; or that of an earlier stage, at the
        size of this one."""
        factor = self.factor(stage)
        return x[:, ::factor, ::factor]

    # --- flows ------------------------------------------------------------------------------------

    def start(
        self, x: Float[Array, "B X Y I"], noise: Float[Array, "B H W I"], stage: int
    ) -> Float[Array, "B H W I"]:
        """Where the flow of a stage to images x (of full size) starts."""
        s = self.starts[stage]
        if stage == 0:
            return noise
        return s * enlarged(averaged(x, self.factor(stage - 1)), 2) + (1 - s) * noise

    def end(
        self, x: Float[Array, "B X Y I"], noise: Float[Array, "B H W I"], stage: int
    ) -> Float[Array, "B H W I"]:
        """Where it ends."""
        e = self.ends[stage]
        return e * averaged(x, self.factor(stage)) + (1 - e) * noise

    def alpha(self, stage: int) -> float:
        """Standard deviation of the new noise before a stage: all of it for the first one."""
        if stage == 0:
            return 1.0
        return math.sqrt((1 - self.starts[stage]) ** 2 - self._left(stage) ** 2)

    def gamma(self, stage: int) -> float:
        """Covariance of new noise in a block of 2 x 2 with which a start is as in training."""
        return 0.0 if stage == 0 else max(self._gamma(stage), LOWEST_GAMMA)

    def jump(
        self,
        x: Float[Array, "B H W I"],
        noise: Float[Array, "B H W I"],
        stage: int,
        *,
        gamma: float | None = None,
    ) -> Float[Array, "B H W I"]:
        """The start of a stage, from the end of the one before.

        Args:
            x: that end, enlarged to this stage. It is not read for the first one.
            noise: white, with variance 1.
            stage: the one that starts.
            gamma: see `block_noise`; that of training if None.
        """
        if stage == 0:
            return noise
        gamma = self.gamma(stage) if gamma is None else gamma
        kept = self.starts[stage] / self.ends[stage - 1]
        return kept * x + self.alpha(stage) * block_noise(noise, gamma)

    def noises(
        self, key: Key[Array, ""], batch: int, channels: int, *, coupled: bool = False
    ) -> list[Float[Array, "B H W I"]]:
        """Noise of every stage, white.

        Args:
            key: PRNG key.
            batch, channels: of the images.
            coupled: make it of the noise of the stage before, so that a start is what `jump` makes
                of the end before it. It is white all the same.
        """
        made: list[Array] = []
        for stage, own in enumerate(jax.random.split(key, self.count)):
            size = self.size(stage)
            noise = jax.random.normal(own, (batch, size, size, channels))
            if coupled and stage > 0:
                new = self.alpha(stage) * block_noise(noise, self.gamma(stage))
                old = self._left(stage) * enlarged(made[-1], 2)
                noise = (old + new) / (1 - self.starts[stage])
            made.append(noise)
        return made

    def _left(self, stage: int) -> float:
        """Standard deviation of the noise that a rescaled end brings."""
        s, e = self.starts[stage], self.ends[stage - 1]
        return s * (1 - e) / e

    def _gamma(self, stage: int) -> float:
        left = self._left(stage) ** 2
        return -left / ((1 - self.starts[stage]) ** 2 - left)


def averaged(x: Float[Array, "B X Y I"], factor: int) -> Float[Array, "B H W I"]:
    """Averages of blocks of factor x factor pixels."""
    batch, height, width, channels = x.shape
    shape = batch, height // factor, factor, width // factor, factor, channels
    return jnp.mean(x.reshape(shape), axis=(2, 4))


def enlarged(x: Float[Array, "B H W I"], factor: int) -> Float[Array, "B X Y I"]:
    """Pixels repeated into blocks of factor x factor."""
    return jnp.repeat(jnp.repeat(x, factor, axis=1), factor, axis=2)


def block_noise(noise: Float[Array, "B H W I"], gamma: float) -> Float[Array, "B H W I"]:
    """Noise with variance 1 and covariance gamma in blocks of 2 x 2, from white noise.

    Raises:
        ValueError: for a gamma that no noise has.
    """
    if not LOWEST_GAMMA - _ROUNDING <= gamma <= 1:
        raise ValueError(
            f"noise in blocks of 2 x 2 has a covariance gamma in -1/3 ... 1 (else it is not "
            f"positive semi-definite), got {gamma:g}"
        )
    mean = enlarged(averaged(noise, 2), 2)
    # The covariance's eigenvalues are 1 + 3 gamma, of the mean of a block, and 1 - gamma.
    return math.sqrt(1 - gamma) * (noise - mean) + math.sqrt(max(1 + 3 * gamma, 0.0)) * mean


class TokenMaps(nnx.Module):
    """Norm and projection of what a backbone says of tokens, for the head that makes them.

    The place of a cache: all steps of a stage read what one call has made.
    """

    def __init__(
        self,
        hidden_size: int,
        width: int,
        *,
        eps: float,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.width, self.dtype = width, jnp.dtype(dtype)
        self.norm = AffineLayerNorm(hidden_size, eps=eps, param_dtype=param_dtype)
        self.proj = Linear(hidden_size, width, role="embedding", param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B S C"] | None, scales: Scales, rows: int
    ) -> Float[Array, "B S D"]:
        """Make the maps.

        Args:
            x: tokens as they come out of the backbone; None for those that a cache holds.
            scales: which ones they are of.
            rows: of the batch.

        Raises:
            ValueError: if there are no tokens, as there is no cache here.
        """
        if x is None:
            raise ValueError(
                f"the token maps of stages {scales.start} ... {scales.stop - 1} come from a cache "
                f"(effjax.caches.StageCaches), or are made in the same call: give `before`, what "
                f"the stages before have made"
            )
        return self.proj(self.norm(x))


def by_token(values: Float[Array, "B K C"], scales: Scales) -> Float[Array, "B S C"]:
    """Give every token the value of its stage; values of tokens stay as they are.

    Raises:
        ValueError: for numbers of values that are neither.
    """
    sizes = scales.sizes[scales.start :]
    if values.shape[1] == scales.tokens:
        return values
    if values.shape[1] != len(sizes):
        raise ValueError(
            f"times are given for each of {len(sizes)} stages or of {scales.tokens} tokens, got "
            f"{values.shape[1]}"
        )
    parts: Sequence[Array] = [
        jnp.repeat(values[:, i : i + 1], size, axis=1) for i, size in enumerate(sizes)
    ]
    return jnp.concatenate(parts, axis=1)
