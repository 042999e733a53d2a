"""The demo: convert the bundled PyTorch checkpoint, search a plan, sample dense and compressed.

Both programs start from the same noise and labels, so that their images pair up. The report says
what was gained (FLOPs, seconds) and what was paid (caches, accuracy, distance to the dense images).
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

import effjax
from effjax import metrics
from effjax.cost import sampler_cost, state_bytes
from effjax.forward import Forward, Params
from effjax.methods.attention import dit_fast_attn
from effjax.methods.attention.dit_fast_attn import DiTFastAttnPlan, Strategy
from effjax.samplers import Sampler, sample_keys
from experiments import glyphs, judge

MODEL = Path(__file__).parent / "weights" / "dit_glyphs"
THRESHOLD = 0.15
GUIDANCE = 3.0  # of the bundled model; its gate was passed with it
CHUNK = 32  # images that one program samples at a time


def labels_for(count: int) -> np.ndarray:
    """Every class in turn, int32[count]."""
    return (np.arange(count) % len(glyphs.CLASSES)).astype(np.int32)


def sample(
    sampler: Sampler, forward: Forward, params: Params, labels: np.ndarray, key: jax.Array
) -> tuple[np.ndarray, dict[str, float]]:
    """Sample in chunks with one fused program; return images and timings.

    Timings: `compile_seconds` (trace and compile) and `seconds_per_image` after a warm-up chunk.
    """
    chunk = min(CHUNK, len(labels))
    padded = np.resize(labels, math.ceil(len(labels) / chunk) * chunk)
    began = time.perf_counter()
    program = (
        jax.jit(sampler).lower(forward, params, padded[:chunk], sample_keys(key, chunk)).compile()
    )
    compiled = time.perf_counter() - began
    images, spent = [], []
    for first in tqdm(range(-chunk, len(padded), chunk), desc="sampling", leave=False):
        start = max(first, 0)  # the first round is the warm-up
        keys = sample_keys(key, chunk, first=start)
        began = time.perf_counter()
        batch = jax.device_get(program(forward, params, padded[start : start + chunk], keys))
        if first >= 0:
            spent.append(time.perf_counter() - began)
            images.append(batch)
    timings = {"compile_seconds": compiled, "seconds_per_image": sum(spent) / len(padded)}
    return np.concatenate(images)[: len(labels)], timings


def program_cost(
    sampler: Sampler, forward: Forward, params: Params, *, distinct: Callable[[int], Any]
) -> dict[str, int]:
    """FLOPs of one image and bytes of the caches of one image."""
    label = jnp.zeros(1, jnp.int32)
    cost = sampler_cost(sampler, forward, params, label, distinct=distinct)
    carry = jax.eval_shape(lambda p: sampler.init(forward, p, label, jax.random.key(0)), params)
    attention = cost.scope("attention")
    return {
        "attention_flops": attention.flops,
        "attention_flops_useful": attention.useful_flops,
        "total_flops": cost.flops,
        "state_bytes": state_bytes(carry.state),
    }


def say(message: str) -> None:
    """Messages go to standard error: standard output is for figures."""
    print(message, file=sys.stderr)


def run(
    output: Path,
    *,
    model: Path = MODEL,
    steps: int = 20,
    images: int = 128,
    threshold: float = THRESHOLD,
    guidance: float = GUIDANCE,
    seed: int = 0,
) -> dict[str, Any]:
    """Run the demo and write report.json, plan.json, samples.png and plan.png to `output`."""
    if steps < 2 or images < 2:
        raise ValueError(f"the demo needs at least 2 steps and 2 images, got {steps} and {images}")
    output.mkdir(parents=True, exist_ok=True)
    key = jax.random.key(seed)

    say(f"1/4 converting {model.name} from its PyTorch layout")
    pipe = effjax.pipeline(model, dtype="float32")
    sampler = pipe.sampler(num_steps=steps, guidance_scale=guidance)
    dense = (pipe.forward, pipe.params)

    say(f"2/4 searching a plan on {sampler.calls} network calls, threshold {threshold}")
    began = time.perf_counter()
    plan = dit_fast_attn.search(
        *dense,
        sampler,
        jnp.asarray(labels_for(8)),
        key=jax.random.fold_in(key, 1),
        threshold=threshold,
    )
    search_seconds = time.perf_counter() - began
    compressed = dit_fast_attn.transform(plan)(*dense)

    say(f"3/4 sampling {images} images with each program")
    labels = labels_for(images)
    reader = judge.load()
    real, _ = glyphs.batch(np.random.default_rng(seed), max(images, 512))
    real_features = judge.features(reader, real)
    report: dict[str, Any] = {}
    pictures = {}
    columns = np.array(plan.codes).T
    for name, (forward, params) in {"dense": dense, "compressed": compressed}.items():
        pictures[name], timings = sample(sampler, forward, params, labels, key)
        report[name] = {
            **program_cost(
                sampler,
                forward,
                params,
                distinct=lambda step: (tuple(columns[step]), tuple(row[step] for row in plan.need)),
            ),
            **timings,
            "judge_accuracy": judge.accuracy(reader, pictures[name], labels),
            "frechet": judge.frechet(judge.features(reader, pictures[name]), real_features),
        }
    report |= {
        "psnr": float(
            metrics.psnr(jnp.asarray(pictures["dense"]), jnp.asarray(pictures["compressed"]))
        ),
        "search_seconds": search_seconds,
        "settings": {
            "steps": steps,
            "images": images,
            "threshold": threshold,
            "guidance": guidance,
            "seed": seed,
            "device": str(jax.devices()[0].device_kind),
        },
    }
    say("4/4 drawing")
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (output / "plan.json").write_text(plan.to_json() + "\n")
    draw_samples(pictures["dense"], pictures["compressed"], output / "samples.png")
    draw_plan(plan, output / "plan.png")
    return report


def table(report: dict[str, Any]) -> str:
    """The report as a short text table."""
    rows = [
        ("attention GFLOPs per image", "attention_flops", 1e9, ".3f"),
        ("  of which useful", "attention_flops_useful", 1e9, ".3f"),
        ("total GFLOPs per image", "total_flops", 1e9, ".3f"),
        ("seconds per image", "seconds_per_image", 1, ".3f"),
        ("compile seconds", "compile_seconds", 1, ".1f"),
        ("cache KiB per image", "state_bytes", 1024, ".0f"),
        ("judge accuracy, %", "judge_accuracy", 0.01, ".1f"),
        ("Frechet distance to real", "frechet", 1, ".2f"),
    ]
    dense, compressed = report["dense"], report["compressed"]
    lines = [f"{'':30}{'dense':>12}{'compressed':>12}{'ratio':>9}"]
    for title, field, unit, form in rows:
        a, b = dense[field], compressed[field]
        ratio = f"{b / a:9.3f}" if a else f"{'-':>9}"
        lines.append(f"{title:30}{a / unit:>12{form}}{b / unit:>12{form}}{ratio}")
    saved = 1 - compressed["attention_flops"] / dense["attention_flops"]
    lines.append(
        f"executed attention FLOPs saved: {saved:.1%}; PSNR to dense: {report['psnr']:.1f} dB"
    )
    return "\n".join(lines)


def draw_samples(
    dense: np.ndarray, compressed: np.ndarray, path: Path, *, columns: int = 16
) -> None:
    """Pairs of images of the same noise and label, dense above compressed."""
    from PIL import Image

    count = min(len(dense) // columns, 4) * columns or len(dense)
    columns = min(columns, count)
    bands = []
    for first in range(0, count, columns):
        for images in (dense, compressed):
            bands.append(np.concatenate(images[first : first + columns, ..., 0], axis=1))
        bands.append(np.zeros((4, bands[-1].shape[1])))
    pixels = np.clip(np.rint(127.5 * (np.concatenate(bands[:-1]) + 1)), 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(path)


def draw_plan(plan: DiTFastAttnPlan, path: Path) -> None:
    """Strategies over layers and network calls."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = ["#33415c", "#f2e9de", "#e07a5f", "#f2b880", "#81b29a"]
    figure = Figure(figsize=(1.5 + 0.32 * plan.calls, 1.6 + 0.32 * plan.layers))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    norm = BoundaryNorm(np.arange(len(Strategy) + 1) - 0.5, len(Strategy))
    axes.imshow(np.array(plan.codes), cmap=ListedColormap(colours), norm=norm, aspect="auto")
    axes.set_xlabel("network call")
    axes.set_ylabel("layer")
    axes.set_xticks(range(0, plan.calls, max(1, plan.calls // 10)))
    axes.set_yticks(range(plan.layers))
    handles = [
        Patch(facecolor=colour, edgecolor="#33415c", label=strategy.name)
        for colour, strategy in zip(colours, Strategy)
    ]
    axes.legend(
        handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, frameon=False
    )
    figure.savefig(path, dpi=120, bbox_inches="tight")
