"""Tokens as functions of noise: the flow map of Distilled Decoding (arXiv 2412.17153).

A token with probabilities p of codes c_1 ... c_V is drawn, as a rule, by a random number. Here it
follows from noise e ~ N(0, 1) of the codes' own width: the path x_t = (1 - t) e + t c, with c ~ p,
has a velocity in closed form, and its ordinary differential equation takes e to one of the codes.

    w_v(x, t) ~ p_v exp(-|x - t c_v|^2 / (2 (1 - t)^2)),  sum w_v = 1
    D(x, t)   = sum w_v c_v                                     what x will be, on average
    dx / dt   = (D - x) / (1 - t),  from x(0) = e;  token = the code next to x(1)

Over all e the tokens are distributed as p. In one dimension this is the inverse of the cumulative
distribution at Phi(e). A step from t to s, with a = (1 - s) / (1 - t), is x <- a x + (s - t a) D,
which is Euler's; "2m" is DPM-Solver++ (2M) with lambda = log(t / (1 - t)), whose first two steps
and last one are Euler's. The last step takes x = D.

D is an attention with the codebook as keys and values, queries t x / (1 - t)^2, and a bias
log p_v - t^2 |c_v|^2 / (2 (1 - t)^2) of every query and code. No kernel of `pallas_kernels` takes
such biases: with `tile`, the codebook is scanned tile by tile, with a running softmax, so that the
weights of one tile alone are held.

FLOPs: 4 V C for each step and token. All of it is float32; products are exact to that.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effjax.fields import Checked, Count, Positive
from effjax.layers.attention import BiasedAttentionCore


@dataclasses.dataclass(frozen=True)
class FlowSolver(Checked):
    """How the equation is solved.

    Attributes:
        kind: "euler", or "2m" for DPM-Solver++ of second order, which needs a quarter of the steps.
        steps: evenly spaced in t.
        tile: codes of a tile; None for all at once.
        noise_std: standard deviation of the noise, 1 in the paper. Where codes are much smaller,
            take theirs: a network that reads both cannot tell codes from nothing beside louder
            noise, and the equation does all of its work in its last steps.
    """

    kind: Literal["euler", "2m"] = "2m"
    steps: Count = 50
    tile: Count | None = None
    noise_std: Positive = 1.0

    def coefficients(self) -> np.ndarray:
        """Of every step t, a, b, and f in x <- a x + b (D + f (D - D before)); float32[steps, 4].

        f is h / (2 h_before) for steps h in lambda, 0 for steps of first order.
        """
        t = np.arange(self.steps + 1) / self.steps
        a = (1 - t[1:]) / (1 - t[:-1])
        f = np.zeros(self.steps)
        if self.kind == "2m" and self.steps > 3:
            h = np.diff(np.log(t[1:-1] / (1 - t[1:-1])))  # of the steps 1 ... steps - 2
            f[2:-1] = h[1:] / (2 * h[:-1])
        return np.stack([t[:-1], a, t[1:] - t[:-1] * a, f], axis=1).astype(np.float32)


def flow_map(
    noise: Float[Array, "*N C"],
    logits: Float[Array, "*N V"],
    codes: Float[Array, "V C"],
    solver: FlowSolver | None = None,
) -> tuple[Int[Array, "*N"], Float[Array, "*N C"]]:
    """Map noise to tokens, at every position by itself.

    Args:
        noise: e, of the codes' width, with the solver's standard deviation.
        logits: of the law that tokens have: after guidance, top-k, top-p and temperature. They need
            not be normalized. -inf stands for codes that are never taken; each position needs one
            that may be.
        codes: the codebook.
        solver: `FlowSolver()` if None.

    Returns:
        The tokens, and where noise ends, x(1): the code of the token, but for what the solver is
        off.

    Raises:
        ValueError: for shapes that do not belong together.
    """
    solver = solver or FlowSolver()
    if noise.shape != (*logits.shape[:-1], codes.shape[1]) or logits.shape[-1] != codes.shape[0]:
        raise ValueError(
            f"noise [..., C], logits [..., V] and codes [V, C] belong together; got "
            f"{list(noise.shape)}, {list(logits.shape)} and {list(codes.shape)}"
        )
    flat = logits.reshape(-1, logits.shape[-1]).astype(jnp.float32)
    # In units of the noise, whose path it is a matter of.
    start = noise.reshape(-1, noise.shape[-1]).astype(jnp.float32) / solver.noise_std
    codes = codes.astype(jnp.float32) / solver.noise_std

    def step(carry: tuple[Array, Array], own: Array) -> tuple[tuple[Array, Array], None]:
        (x, before), (t, a, b, f) = carry, own
        mean = posterior_mean(x, t, flat, codes, solver.tile)
        return (a * x + b * (mean + f * (mean - before)), mean), None

    with jax.named_scope("flow_map"), jax.default_matmul_precision("highest"):
        coefficients = jnp.asarray(solver.coefficients())
        (x, _), _ = jax.lax.scan(step, (start, jnp.zeros_like(start)), coefficients)
        distances = jnp.sum(jnp.square(codes), axis=1) - 2 * x @ codes.T
        allowed = jnp.where(jnp.isneginf(flat), jnp.inf, distances)
        tokens = jnp.argmin(allowed, axis=1).astype(jnp.int32)
    return tokens.reshape(noise.shape[:-1]), (solver.noise_std * x).reshape(noise.shape)


def posterior_mean(
    x: Float[Array, "N C"],
    t: Float[Array, ""],
    logits: Float[Array, "N V"],
    codes: Float[Array, "V C"],
    tile: int | None = None,
) -> Float[Array, "N C"]:
    """D(x, t): the codes' mean, weighted by what x says of them.

    Args:
        x: points at time t < 1.
        t: the time.
        logits: see `flow_map`.
        codes: the codebook.
        tile: codes that are looked at together; None for all.
    """
    sharpness = t / jnp.square(1 - t)
    queries, penalty = sharpness * x, t * sharpness / 2
    if tile is None or tile >= codes.shape[0]:
        bias = logits - penalty * jnp.sum(jnp.square(codes), axis=1)
        keys = codes[None, :, None]
        out = BiasedAttentionCore(scale=1.0)(queries[None, :, None], keys, keys, bias[None, None])
        return out[0, :, 0]
    short = -codes.shape[0] % tile
    tiles = jnp.pad(codes, ((0, short), (0, 0))).reshape(-1, tile, codes.shape[1])
    padded = jnp.pad(logits, ((0, 0), (0, short)), constant_values=-jnp.inf)
    by_tile = padded.reshape(x.shape[0], -1, tile).swapaxes(0, 1)

    def add(
        carry: tuple[Array, Array, Array], own: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array, Array], None]:
        (most, total, mean), (codes, logits) = carry, own
        scores = queries @ codes.T + logits - penalty * jnp.sum(jnp.square(codes), axis=1)
        new = jnp.maximum(most, jnp.max(scores, axis=1))
        shift = jnp.where(jnp.isneginf(new), 0.0, new)  # of tiles that are left out so far
        kept, weights = jnp.exp(most - shift), jnp.exp(scores - shift[:, None])
        mean = kept[:, None] * mean + weights @ codes
        return (new, kept * total + jnp.sum(weights, axis=1), mean), None

    least = jnp.full(x.shape[0], -jnp.inf, jnp.float32)
    carry = least, jnp.zeros_like(least), jnp.zeros_like(x)
    (_, total, mean), _ = jax.lax.scan(add, carry, (tiles, by_tile))
    return mean / total[:, None]
