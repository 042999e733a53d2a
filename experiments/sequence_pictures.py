"""Pictures of how images come about as sequences, by the tiny models of glyphs.

    python -m experiments.sequence_pictures

Writes into docs/pictures: what VAR has after each scale, the places that each call of speculative
Jacobi decoding settles in an image of LlamaGen, and what ECAR has after each stage.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import effjax
from effjax.autoregression.drafted import drafted
from effjax.generate import JacobiDecoding
from experiments import train_ecar, train_llamagen, train_var

FOLDER = Path(__file__).parent.parent / "docs" / "pictures"
LABELS = ("A", "G", "R", "2", "8")


def after_calls(pipe: Any, labels: Sequence[str], key: jax.Array) -> list[np.ndarray]:
    """Images [labels, H, W] after every call of a loop of maps."""
    seen: list[np.ndarray] = []

    def keep(call: int, x: jax.Array) -> None:
        seen.append(np.clip(np.asarray(pipe.decode(x))[..., 0], -1, 1))

    cond, _ = pipe.conditions(list(labels))
    pipe.sampler().stepwise(pipe.forward, pipe.params, cond, key, callback=keep)
    return seen


def settled(pipe: Any, label: str, key: jax.Array, decoder: JacobiDecoding) -> np.ndarray:
    """The number of the call that settled each token of an image, int[rows, columns]."""
    cond, _ = pipe.conditions([label])
    loop = pipe.sampler()

    @jax.jit
    def calls(params: Any, limit: jax.Array) -> jax.Array:
        carry = loop.init(pipe.forward, params, cond, key)
        uncond = loop.unconditional(pipe.forward, cond)
        given = loop, decoder, pipe.forward, params, carry, cond, uncond
        return drafted(*given, limit=limit).calls[0]

    found = [int(calls(pipe.params, jnp.int32(limit))) for limit in range(1, loop.calls + 1)]
    return np.array(found).reshape(loop.grid)


def draw_rows(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], path: Path) -> None:
    """Rows of pictures with a title for each column."""
    figure, axes = _figure(len(rows), len(titles))
    for row, own in zip(axes, rows):
        for place, image in zip(row, own):
            place.imshow(image, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    for place, title in zip(axes[0], titles):
        place.set_title(title, fontsize="small")
    figure.savefig(path, dpi=80)


def draw_calls(calls: Sequence[np.ndarray], images: Sequence[np.ndarray], path: Path) -> None:
    """Images, and below each the call that settled each of its tokens."""
    figure, axes = _figure(2, len(images))
    for place, image in zip(axes[0], images):
        place.imshow(image, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    for place, own in zip(axes[1], calls):
        place.imshow(own % 6, cmap="Set2", vmin=0, vmax=8, interpolation="nearest")
        place.set_title(f"{own.max()} calls, {own.size} tokens", fontsize="small")
        for (y, x), call in np.ndenumerate(own):
            place.text(x, y, str(call), ha="center", va="center", fontsize=4)
    figure.savefig(path, dpi=130)


def _figure(rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.3 * columns, 1.35 * rows + 0.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for place in axes.flat:
        place.set_axis_off()
    return figure, axes


def scales(key: jax.Array) -> None:
    pipe = effjax.pipeline(train_var.WEIGHTS, dtype="float32", progress=False)
    sides = pipe.patch_nums
    seen = after_calls(pipe, LABELS, key)
    draw_rows(list(zip(*seen)), [f"{side} x {side}" for side in sides], FOLDER / "scales.png")


def stages(key: jax.Array) -> None:
    pipe = effjax.pipeline(train_ecar.WEIGHTS, dtype="float32", progress=False)
    loop = pipe.sampler()
    seen = after_calls(pipe, LABELS, key)
    ends = [(begin, after - 1) for begin, after in zip(loop.starts, loop.starts[1:])]
    titles, shown = [], []
    for stage, (begin, end) in enumerate(ends, 1):
        titles += [f"stage {stage}, noise", f"stage {stage}, end"]
        shown += [seen[begin], seen[end]]
    draw_rows(list(zip(*shown)), titles, FOLDER / "stages.png")


def drafts(key: jax.Array) -> None:
    pipe = effjax.pipeline(train_llamagen.WEIGHTS, dtype="float32", progress=False)
    decoder = JacobiDecoding(window=16)
    found = [settled(pipe, label, key, decoder) for label in LABELS]
    draw = partial(pipe, key=key, decoder=decoder, output_type="np", progress=False)
    images = [2 * np.asarray(draw(label))[0, ..., 0] - 1 for label in LABELS]
    draw_calls(found, images, FOLDER / "drafts.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("what", nargs="*", choices=["scales", "stages", "drafts"])
    arguments = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    makers = {"scales": scales, "stages": stages, "drafts": drafts}
    for name in arguments.what or makers:
        makers[name](jax.random.key(arguments.seed))


if __name__ == "__main__":
    main()
