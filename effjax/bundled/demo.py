"""The demo: convert the bundled PyTorch checkpoint, compress it, sample dense and compressed.

Three programs: dense; with a searched attention plan (DiTFastAttn); with that plan and values of 8
bits for weights and inputs (ViDiT-Q). They start from the same noise and labels, so that their
images pair up. The report says what was gained (FLOPs, bytes, seconds) and what was paid (caches,
accuracy, distance to the dense images).
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

import effjax
from effjax import metrics
from effjax.bundled import WEIGHTS, glyphs, judge
from effjax.cost import sampler_cost, state_bytes, weight_bytes
from effjax.forward import Forward, Params
from effjax.methods.attention import dit_fast_attn
from effjax.methods.attention.dit_fast_attn import DiTFastAttnPlan, Strategy
from effjax.methods.quantization import vidit_q
from effjax.samplers import Sampler, sample_keys

MODEL = WEIGHTS / "dit_glyphs"
THRESHOLD = 0.15
GUIDANCE = 3.0  # of the bundled model; its gate was passed with it
ROWS = ("dense", "compressed", "and W8A8")  # how the report's programs are titled
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
    """FLOPs and bytes of caches of one image, and bytes of weights."""
    label = jnp.zeros(1, jnp.int32)
    cost = sampler_cost(sampler, forward, params, label, distinct=distinct)
    carry = jax.eval_shape(lambda p: sampler.init(forward, p, label, jax.random.key(0)), params)
    attention = cost.scope("attention")
    return {
        "attention_flops": attention.flops,
        "attention_flops_useful": attention.useful_flops,
        "total_flops": cost.flops,
        "state_bytes": state_bytes(carry.state),
        "weight_bytes": weight_bytes(params),
    }


def say(message: str) -> None:
    """Messages go to standard error: standard output is for figures."""
    print(message, file=sys.stderr)


def compressed(
    dense: tuple[Forward, Params], sampler: Sampler, key: jax.Array, threshold: float = THRESHOLD
) -> tuple[dict[str, tuple[Forward, Params]], DiTFastAttnPlan, float]:
    """The model, the model with a searched plan, and that in 8 bits; the plan and its seconds."""
    say(f"2/5 searching a plan on {sampler.calls} network calls, threshold {threshold}")
    began = time.perf_counter()
    plan = dit_fast_attn.search(
        *dense,
        sampler,
        jnp.asarray(labels_for(8)),
        key=jax.random.fold_in(key, 1),
        threshold=threshold,
    )
    search_seconds = time.perf_counter() - began
    fast = dit_fast_attn.transform(plan)(*dense)

    say("3/5 calibrating values of 8 bits")
    rounded = vidit_q.uniform(8, 8)
    largest = vidit_q.calibrate(
        rounded, *dense, sampler, jnp.asarray(labels_for(8)), key=jax.random.fold_in(key, 2)
    )
    quantized = vidit_q.transform(rounded, largest)(*fast)
    return {"dense": dense, "compressed": fast, "quantized": quantized}, plan, search_seconds


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

    say(f"1/5 converting {model.name} from its PyTorch layout")
    pipe = effjax.pipeline(model, dtype="float32")
    sampler = pipe.sampler(num_inference_steps=steps, guidance_scale=guidance)
    dense = (pipe.forward, pipe.params)

    programs, plan, search_seconds = compressed(dense, sampler, key, threshold)

    say(f"4/5 sampling {images} images with each program")
    labels = labels_for(images)
    reader = judge.load()
    real, _ = glyphs.batch(np.random.default_rng(seed), max(images, 512))
    real_features = judge.features(reader, real)
    report: dict[str, Any] = {}
    pictures = {}
    columns = np.array(plan.strategies).T
    for name, (forward, params) in programs.items():
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
    for name in ("compressed", "quantized"):
        pair = (jnp.asarray(pictures[each]) for each in ("dense", name))
        report[name]["psnr"] = float(metrics.psnr(*pair))
    report |= {
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
    say("5/5 drawing")
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (output / "plan.json").write_text(plan.to_json() + "\n")
    names = [glyphs.CLASSES[label] for label in labels]
    draw_samples(dict(zip(ROWS, pictures.values(), strict=True)), names, output / "samples.png")
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
        ("weights KiB", "weight_bytes", 1024, ".0f"),
        ("judge accuracy, %", "judge_accuracy", 0.01, ".1f"),
        ("Frechet distance to real", "frechet", 1, ".2f"),
    ]
    dense, *others = (report[name] for name in ("dense", "compressed", "quantized"))
    lines = [f"{'':30}{ROWS[0]:>10}{ROWS[1]:>12}{'ratio':>7}{ROWS[2]:>12}{'ratio':>7}"]
    for title, field, unit, form in rows:
        line = f"{title:30}{dense[field] / unit:>10{form}}"
        for other in others:
            ratio = f"{other[field] / dense[field]:7.3f}" if dense[field] else f"{'-':>7}"
            line += f"{other[field] / unit:>12{form}}{ratio}"
        lines.append(line)
    far = "".join(f"{other['psnr']:>12.1f}{'-':>7}" for other in others)
    lines.append(f"{'PSNR to dense, dB':30}{'-':>10}{far}")
    saved = 1 - others[0]["attention_flops"] / dense["attention_flops"]
    lines.append(f"executed attention FLOPs saved: {saved:.1%}")
    return "\n".join(lines)


def draw_samples(
    programs: Mapping[str, np.ndarray], names: Sequence[str], path: Path, *, columns: int = 16
) -> None:
    """Images of one noise and class one below the other.

    Args:
        programs: images [N, H, W, 1] in -1 ... 1 of each program, by the title of its row.
        names: class of each image.
        path: of the picture; it holds up to four bands of columns.
        columns: images side by side.
    """
    from PIL import Image, ImageDraw, ImageFont

    first, *_ = programs.values()
    count = min(len(first) // columns, 4) * columns or len(first)
    columns = min(columns, count)
    side, gap, line = 2 * first.shape[1], 2, 24
    font = ImageFont.truetype(glyphs.font_file("DejaVuSans"), 15)
    left = math.ceil(max(font.getlength(title) for title in programs)) + 20
    band = line + len(programs) * (side + gap) + 8
    size = (left + columns * (side + gap) + 8, line + count // columns * band)
    canvas = Image.new("L", size, 255)
    pen = ImageDraw.Draw(canvas)
    pen.text((10, 6), "Columns: one noise and class each. Rows: programs.", 0, font)
    for index in range(count):
        row, column = divmod(index, columns)
        x, y = left + column * (side + gap), line + row * band
        pen.text((x + side / 2, y + line / 2 + 2), names[index], 0, font, anchor="mm")
        for title, images in programs.items():
            if not column:
                pen.text((10, y + line + side / 2), title, 0, font, anchor="lm")
            pixels = np.clip(np.rint(127.5 * (images[index, ..., 0] + 1)), 0, 255).astype(np.uint8)
            drawn = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(drawn, (x, y + line))
            y += side + gap
    canvas.save(path, optimize=True)


STRATEGIES = {
    Strategy.FULL: ("#33415c", "dense attention"),
    Strategy.FULL_ASC: ("#81b29a", "dense on the conditional half, used for both halves"),
    Strategy.WARS: ("#f2b880", "a window, and the residual of the last FULL call"),
    Strategy.WARS_ASC: ("#e07a5f", "the same on the conditional half, used for both halves"),
    Strategy.AST: ("#f2e9de", "the last output again"),
}
"""Color and meaning of a plan's strategies."""


def draw_plan(plan: DiTFastAttnPlan, path: Path) -> None:
    """Strategies over layers and network calls, with a legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colors = [STRATEGIES[strategy][0] for strategy in Strategy]
    size = (max(6.0, 1.5 + 0.32 * plan.calls), 2.3 + 0.32 * plan.layers)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    norm = BoundaryNorm(np.arange(len(Strategy) + 1) - 0.5, len(Strategy))
    axes.imshow(np.array(plan.strategies), cmap=ListedColormap(colors), norm=norm, aspect="auto")
    axes.set_title("What attention does, by layer and network call", fontsize="medium")
    axes.set_xlabel("network call")
    axes.set_ylabel("layer")
    axes.set_xticks(range(0, plan.calls, max(1, plan.calls // 10)))
    axes.set_yticks(range(plan.layers))
    for edges, mark in ((plan.calls, axes.axvline), (plan.layers, axes.axhline)):
        for edge in range(1, edges):
            mark(edge - 0.5, color="white", linewidth=0.8)
    handles = [
        Patch(facecolor=color, edgecolor="#33415c", label=f"{strategy.name}: {meaning}")
        for strategy, (color, meaning) in STRATEGIES.items()
    ]
    figure.legend(handles=handles, loc="outside lower left", frameon=False)
    figure.savefig(path, dpi=100)
