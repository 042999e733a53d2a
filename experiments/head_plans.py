"""What plans by head lose on the tiny SD3: DiTFastAttnV2 and PAROAttention against simpler choices.

    python -m experiments.head_plans

"windows": mean error of a head (see `relative_errors`) over layers, heads and calls of a dense
trajectory, through the arrow of each candidate, and through a plain window over the joint sequence
that cuts the text as well and sees at least as many pairs.

"choices": on the errors of the same trajectory, what the 0/1 program chooses head by head within
each budget, and one candidate for all heads of a layer at a budget that saves at least as much.

"plans": images of plans against the dense ones of the same noise: searched head by head, without
cached heads, with one choice for each layer, and masks of blocks in the order of each head against
masks in the raster. Plans by head are searched along their own compressed trajectory, as the paper
does; those by layer are chosen on the errors of the dense one, so that the two differ in this too.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effjax import metrics
from effjax.calibration import Trajectory
from effjax.context import Context, PyTree, State
from effjax.layers.attention import attentions
from effjax.methods import dit_fast_attn_v2, paro_attention
from effjax.methods.attention.dit_fast_attn_v2 import CANDIDATES, choose, half_width_of, saving
from effjax.methods.attention.dit_fast_attn_v2.patch import Tokens, heads_before_core
from effjax.methods.attention.dit_fast_attn_v2.plan import KINDS, DiTFastAttnV2Plan
from effjax.methods.attention.dit_fast_attn_v2.search import Choice, relative_errors
from effjax.samplers import sample_keys
from effjax.targets import Wrapper, wrap
from experiments import recipes, report

DELTAS = (0.05, 0.1, 0.2, 0.4, 0.8)
DENSITIES = (0.55, 0.65, 0.75)  # text alone takes 0.47
BLOCK = 8  # tokens: the tiny model has 64 of the image


def plain_width(pairs: int, tokens: int) -> int:
    """The least half width of a window over all tokens that sees at least so many pairs."""
    return next(w for w in range(tokens) if tokens * (2 * w + 1) - w * (w + 1) >= pairs)


@dataclasses.dataclass(frozen=True)
class Measure:
    """A patch: dense attention, which notes the errors of windows."""

    tokens: Tokens
    widths: tuple[int, ...]

    def __call__(self, module: nnx.Module, context: Context) -> None:
        for target in attentions(module, *KINDS):
            wrap(module, target.path, Measured, self.tokens, self.widths)


class Measured(Wrapper):
    """Attention as it is, and the errors [heads, 2 windows]: arrows, then plain windows."""

    replaces_internals = True
    inner: Any

    def __init__(self, inner: nnx.Module, tokens: Tokens, widths: tuple[int, ...]):
        super().__init__(inner)
        self.tokens, self.widths, self.errors = tokens, widths, State()

    def __call__(self, x: PyTree, *positions: jax.Array) -> PyTree:
        q, k, v = heads_before_core(self.inner, x, *positions)
        dense = self.inner.core(q, k, v)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5

        def through(mask: np.ndarray) -> jax.Array:
            shares = jax.nn.softmax(jnp.where(jnp.asarray(mask), scores, -jnp.inf))
            return jnp.einsum("bhqk,bkhd->bqhd", shares, v)

        masks = [*(arrow_mask(self.tokens, w) for w in self.widths)]
        masks += [plain_mask(self.tokens, w) for w in self.widths]
        self.errors.write(relative_errors([through(mask) for mask in masks], dense))
        return self.inner.merge(dense, x)


def arrow_mask(tokens: Tokens, width: int) -> np.ndarray:
    """bool[S, S]: text sees and is seen by all, image tokens see `width` to each side."""
    places = np.arange(tokens.image + tokens.text)
    first = tokens.text if tokens.text_first else 0
    text = (places < first) | (places >= first + tokens.image)
    near = np.abs(np.subtract.outer(places, places)) <= width
    return near | text[:, None] | text


def plain_mask(tokens: Tokens, width: int) -> np.ndarray:
    """bool[S, S]: a window over the joint sequence that sees at least the pairs of the arrow."""
    count = tokens.image + tokens.text
    pairs = int(arrow_mask(tokens, width).sum())
    places = np.arange(count)
    return np.abs(np.subtract.outer(places, places)) <= plain_width(pairs, count)


class Bench:
    """The tiny SD3 with captions that it was not trained on."""

    def __init__(self, images: int, steps: int):
        found = recipes.subject("SD3", images)
        self.pipe, self.cond, self.uncond, self.right = found
        self.pair = (self.pipe.forward, self.pipe.params)
        options = {"num_inference_steps": steps, "guidance_scale": recipes.demo.GUIDANCE}
        self.sampler = self.pipe.sampler(**options)
        self.keys = sample_keys(jax.random.key(0), images)
        self.program = jax.jit(self.sampler)
        some = jax.tree.map(lambda leaf: leaf[:8], (self.cond, self.uncond))
        self.data = Trajectory(self.sampler, some[0], jax.random.key(3), some[1])
        x = jnp.zeros((8, *self.sampler.sample_shape(self.pair[0])))
        given = self.sampler.inputs(x, *some, 0)
        layout = self.pair[0].layout(self.pair[1], *given)
        self.tokens = Tokens(layout.image_tokens, layout.text, bool(layout.text_first), None)
        self.dense = self.images()

    def images(self, *transforms: Any) -> np.ndarray:
        pipe = self.pipe.transform(*transforms)
        given = (pipe.forward, pipe.params, self.cond, self.keys)
        return np.asarray(self.program(*given, uncond=self.uncond))

    def row(self, name: str, kept: float, *transforms: Any) -> dict[str, Any]:
        own = self.images(*transforms) if transforms else self.dense
        distance = float(metrics.psnr(jnp.asarray(self.dense), jnp.asarray(own)))
        right = round(self.right(own), 3)
        found = {"plan": name, "kept": kept, "PSNR to dense": distance, "right": right}
        print(found, flush=True)
        return found

    def errors(self) -> np.ndarray:
        """float64[calls, layers, heads, candidates] on the dense trajectory; none at call 0."""
        noted: list[np.ndarray] = []

        def note(step: int, x: jax.Array, errors: dict[str, np.ndarray]) -> None:
            if step:
                noted.append(np.stack(list(errors.values())))

        self.search(0.0, callback=note)
        return np.stack(noted).astype(float)

    def search(self, delta: float, **options: Any) -> DiTFastAttnV2Plan:
        data = self.data
        return dit_fast_attn_v2.search(
            *self.pair,
            data.sampler,
            data.cond,
            key=data.key,
            delta=delta,
            uncond=data.uncond,
            progress=False,
            **options,
        )

    def windows(self) -> list[dict[str, Any]]:
        names = [name for name in CANDIDATES if name != "cache"]
        widths = tuple(half_width_of(name, self.tokens.image)[0] for name in names)
        forward, params = self.pair
        patched = forward.patch(Measure(self.tokens, widths))
        data, noted = self.data, []
        given = {"uncond": data.uncond}
        carry = self.sampler.init(patched, params, data.cond, data.key, **given)
        step = jax.jit(lambda p, c, i: self.sampler.step(patched, p, c, data.cond, data.uncond, i))
        for number in range(self.sampler.calls):
            carry = step(params, carry, np.int32(number))
            noted.append([x for name, x in carry.state.items() if name.endswith(".errors")])
        means = np.mean(np.asarray(noted, float), axis=(0, 1, 2)).reshape(2, -1).tolist()
        count = self.tokens.image + self.tokens.text
        return [
            {
                "candidate": name,
                "pairs": int(arrow_mask(self.tokens, width).sum()) / count**2,
                "error of the arrow": arrow,
                "pairs of the plain window": int(plain_mask(self.tokens, width).sum()) / count**2,
                "error of the plain window": plain,
            }
            for name, width, arrow, plain in zip(names, widths, *means, strict=True)
        ]


def by_layer(errors: np.ndarray, savings: np.ndarray, delta: float) -> np.ndarray:
    """int[calls, layers]: the candidate that all heads of a layer take within a budget, or -1."""
    total = errors.sum(axis=2)
    gains = np.where(total <= delta, savings, -1.0)
    return np.where(gains.max(-1) < 0, -1, gains.argmax(-1))


def taken(errors: np.ndarray, savings: np.ndarray, chosen: np.ndarray) -> tuple[float, float]:
    """Mean saving of all heads, and the sum of their errors."""
    some = chosen >= 0
    own = np.take_along_axis(errors, np.maximum(chosen, 0)[..., None], -1)[..., 0]
    return float(np.where(some, savings[chosen], 0).mean()), float(np.where(some, own, 0).sum())


def matched(errors: np.ndarray, savings: np.ndarray, target: float) -> np.ndarray:
    """The choice by layer of least budget that saves at least the target."""
    budgets = np.unique(errors.sum(axis=2))
    low, high = 0, len(budgets) - 1

    def chosen(place: int) -> np.ndarray:
        layers = by_layer(errors, savings, budgets[place])
        return np.broadcast_to(layers[..., None], errors.shape[:3])

    while low < high:
        middle = (low + high) // 2
        enough = taken(errors, savings, chosen(middle))[0] >= target
        low, high = (low, middle) if enough else (middle + 1, high)
    return chosen(low)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    bench = Bench(given.images, given.steps)
    tokens = bench.tokens
    windows = bench.windows()
    errors = bench.errors()
    kinds = tuple(half_width_of(name, tokens.image) for name in CANDIDATES)
    savings = np.array([saving(width, tokens.image, tokens.text) for width, _ in kinds])
    choices, plans = [], [bench.row("dense", 1.0)]
    heads = errors.shape[2]
    for delta in DELTAS:
        choice = Choice(kinds, delta, None, False)
        own = np.stack([[choose(each, savings, choice) for each in call] for call in errors])
        saved, lost = taken(errors, savings, own)
        layers = matched(errors, savings, saved)
        more, other = taken(errors, savings, layers)
        choices.append(
            {
                "delta": delta,
                "saved by head": saved,
                "error by head": lost,
                "saved by layer": more,
                "error by layer": other,
            }
        )
        for name, candidates in (
            ("arrows and cached heads", CANDIDATES),
            ("arrows", tuple(each for each in CANDIDATES if each != "cache")),
        ):
            plan = bench.search(delta, candidates=candidates)
            kept = 1 - plan.sparsity
            plans.append(
                bench.row(f"{name}, delta {delta}", kept, dit_fast_attn_v2.transform(plan))
            )
            if name != "arrows and cached heads":
                continue
            same = matched(errors, savings, float(plan.savings[1:].mean()))
            widths = np.array([-1, *(width for width, _ in kinds)])[same + 1]
            dense = np.full((1, *widths.shape[1:]), -1)
            table = np.concatenate([dense, widths]).tolist()
            uniform = dataclasses.replace(
                plan,
                half_width=tuple(tuple(map(tuple, call)) for call in table),
                candidates=(),
            )
            kept = 1 - uniform.sparsity
            title = f"one choice for each layer, delta {delta}"
            plans.append(bench.row(title, kept, dit_fast_attn_v2.transform(uniform)))
    for density in DENSITIES:
        goals = paro_attention.Goals(density=density, block=BLOCK, least=0)
        found = paro_attention.find(goals, *bench.pair, bench.data, progress=False)
        orders = tuple((0,) * heads for _ in found.plan.orders)
        raster = dataclasses.replace(found.plan, orders=orders)
        masks = paro_attention.calibrate(raster, *bench.pair, bench.data, progress=False)
        for name, plan, own in (
            ("order of each head", found.plan, found.masks),
            ("raster", raster, masks),
        ):
            title = f"blocks in the {name}, density {density}"
            plans.append(bench.row(title, plan.mean_density, paro_attention.transform(plan, own)))
    report.write(
        "head_plans",
        title="Plans by head on the tiny SD3",
        command=f"python -m experiments.head_plans --images {given.images} --steps {given.steps}",
        windows=windows,
        choices=choices,
        plans=plans,
    )


if __name__ == "__main__":
    main()
