"""The demo: convert the bundled PyTorch checkpoint, accelerate it, sample and compare.

Three programs take turns on one machine: the dense model; the model with the recipe that
`pipe.accelerate()` recommends for it; and the dense model with as many fewer steps as cost the same
seconds, which is what anybody can do without a library. They start from the same noise and labels,
so that their images pair up. The report says what was gained (seconds, FLOPs) and what was paid
(caches, accuracy, distance to the dense images).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
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
from effjax.pipelines.summary import Watch, summarize
from effjax.samplers import Sampler, sample_keys
from effjax.storage.json_files import figures_json

MODEL = WEIGHTS / "dit_glyphs"
GUIDANCE = 3.0  # of the bundled model; its gate was passed with it
ROWS = {"dense": "dense", "accelerated": "accelerated", "fewer_steps": "fewer steps"}
CHUNK = 32  # images that one program samples at a time

Program = tuple[Sampler, Forward, Params]


def labels_for(count: int) -> np.ndarray:
    """Every class in turn, int32[count]."""
    return (np.arange(count) % len(glyphs.CLASSES)).astype(np.int32)


def sample(
    programs: Mapping[str, Program], labels: np.ndarray, key: jax.Array
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, float]]]:
    """Sample in chunks; the programs take turns, so that what else a machine does hits all.

    Returns:
        Images of each program, and its timings: `compile_seconds` (trace and compile) and
        `seconds_per_image` after a warm-up chunk.
    """
    chunk = min(CHUNK, len(labels))
    padded = np.resize(labels, math.ceil(len(labels) / chunk) * chunk)
    compiled, timings = {}, {}
    for name, (sampler, forward, params) in programs.items():
        began = time.perf_counter()
        lowered = jax.jit(sampler).lower(forward, params, padded[:chunk], sample_keys(key, chunk))
        compiled[name] = lowered.compile()
        timings[name] = {"compile_seconds": time.perf_counter() - began, "seconds_per_image": 0.0}
    images: dict[str, list[np.ndarray]] = {name: [] for name in programs}
    for first in tqdm(range(-chunk, len(padded), chunk), desc="sampling", leave=False):
        start = max(first, 0)  # the first round is the warm-up
        keys = sample_keys(key, chunk, first=start)
        for name, program in compiled.items():
            _, forward, params = programs[name]
            began = time.perf_counter()
            batch = jax.device_get(program(forward, params, padded[start : start + chunk], keys))
            if first >= 0:
                spent = time.perf_counter() - began
                timings[name]["seconds_per_image"] += spent / len(padded)
                images[name].append(batch)
    whole = {name: np.concatenate(parts)[: len(labels)] for name, parts in images.items()}
    return whole, timings


def program_cost(sampler: Sampler, forward: Forward, params: Params) -> dict[str, int]:
    """FLOPs and bytes of caches of one image, and bytes of weights."""
    label = jnp.zeros(1, jnp.int32)
    cost = sampler_cost(sampler, forward, params, label)
    carry = jax.eval_shape(lambda p: sampler.init(forward, p, label, jax.random.key(0)), params)
    return {
        "total_flops": cost.flops,
        "state_bytes": state_bytes(carry.state),
        "weight_bytes": weight_bytes(params),
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
    speed: float | None = None,
    guidance: float = GUIDANCE,
    seed: int = 0,
) -> dict[str, Any]:
    """Run the demo and write report.json, samples.png and steps.png to `output`.

    Args:
        output: folder of the results.
        model: directory of a pipeline in diffusers' layout.
        steps, images, guidance, seed: of the sampling.
        speed: the mildest recipe that reached it; None for the recommended one.
    """
    if steps < 2 or images < 2:
        raise ValueError(f"the demo needs at least 2 steps and 2 images, got {steps} and {images}")
    output.mkdir(parents=True, exist_ok=True)
    key = jax.random.key(seed)

    say(f"1/4 converting {model.name} from its PyTorch layout")
    pipe = effjax.pipeline(model, dtype="float32")
    fast = pipe.accelerate(speed)
    sampler = pipe.sampler(num_inference_steps=steps, guidance_scale=guidance)
    programs: dict[str, Program] = {
        "dense": (sampler, pipe.forward, pipe.params),
        "accelerated": (sampler, fast.forward, fast.params),
    }

    say("2/4 finding how many dense steps cost as much")
    labels = labels_for(images)
    _, first = sample(programs, labels[:CHUNK], key)
    share = first["accelerated"]["seconds_per_image"] / first["dense"]["seconds_per_image"]
    fewer = min(max(math.ceil(steps * share), 1), steps)
    short = pipe.sampler(num_inference_steps=fewer, guidance_scale=guidance)
    programs["fewer_steps"] = (short, pipe.forward, pipe.params)

    say(f"3/4 sampling {images} images with each program")
    pictures, timings = sample(programs, labels, key)
    for name, own in first.items():  # compiled there; here JAX has them already
        timings[name]["compile_seconds"] = own["compile_seconds"]
    reader = judge.load()
    real, _ = glyphs.batch(np.random.default_rng(seed), max(images, 512))
    real_features = judge.features(reader, real)
    report: dict[str, Any] = {}
    for name, program in programs.items():
        report[name] = {
            "steps": program[0].calls,
            **program_cost(*program),
            **timings[name],
            "judge_accuracy": judge.accuracy(reader, pictures[name], labels),
            "frechet": judge.frechet(judge.features(reader, pictures[name]), real_features),
        }
        if name != "dense":
            pair = (jnp.asarray(pictures[each]) for each in ("dense", name))
            distance = float(metrics.psnr(*pair))
            report[name]["psnr"] = distance if math.isfinite(distance) else None  # equal images
    watch = Watch()
    sampler.stepwise(
        fast.forward, fast.params, jnp.asarray(labels[:2]), key, progress=False, watch=watch
    )
    said = summarize(watch, fast.forward, fast.params)
    report |= {
        "computed": {name: list(mask) for name, mask in said.computed.items()},
        "methods": [[name, plan.to_dict()] for name, plan in fast.forward.recipe],
        "settings": {
            "steps": steps,
            "images": images,
            "guidance": guidance,
            "seed": seed,
            "device": str(jax.devices()[0].device_kind),
        },
    }
    say("4/4 drawing")
    (output / "report.json").write_text(figures_json(report) + "\n")
    names = [glyphs.CLASSES[label] for label in labels]
    rows = {title: pictures[name] for name, title in ROWS.items()}
    draw_samples(rows, names, output / "samples.png")
    draw_steps(said.computed, output / "steps.png")
    return report


def table(report: dict[str, Any]) -> str:
    """The report as a short text table."""
    rows = [
        ("steps", "steps", 1, ".0f"),
        ("seconds per image", "seconds_per_image", 1, ".3f"),
        ("total GFLOPs per image", "total_flops", 1e9, ".3f"),
        ("compile seconds", "compile_seconds", 1, ".1f"),
        ("cache KiB per image", "state_bytes", 1024, ".0f"),
        ("weights KiB", "weight_bytes", 1024, ".0f"),
        ("judge accuracy, %", "judge_accuracy", 0.01, ".1f"),
        ("Frechet distance to real", "frechet", 1, ".2f"),
    ]
    dense, *others = (report[name] for name in ROWS)
    first, *titles = ROWS.values()
    lines = [f"{'':26}{first:>9}" + "".join(f"{title:>13}{'ratio':>7}" for title in titles)]
    for title, field, unit, form in rows:
        line = f"{title:26}{dense[field] / unit:>9{form}}"
        for other in others:
            ratio = f"{other[field] / dense[field]:7.3f}" if dense[field] else f"{'-':>7}"
            line += f"{other[field] / unit:>13{form}}{ratio}"
        lines.append(line)
    near = ("equal" if other["psnr"] is None else f"{other['psnr']:.1f}" for other in others)
    far = "".join(f"{each:>13}{'-':>7}" for each in near)
    lines.append(f"{'PSNR to dense, dB':26}{'-':>9}{far}")
    times = dense["seconds_per_image"] / others[0]["seconds_per_image"]
    methods = ", ".join(name for name, _ in report["methods"])
    lines.append(f"{methods}: {times:.2f} times the dense images per second")
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


def draw_steps(computed: Mapping[str, Sequence[float]], path: Path) -> None:
    """Which network calls compute what, and in which it is predicted."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    calls = max(map(len, computed.values()), default=1)
    figure = Figure(figsize=(max(6.0, 1.5 + 0.3 * calls), 1.2 + 0.4 * len(computed)))
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    for row, mask in enumerate(computed.values()):
        for call, share in enumerate(mask):
            color = "#33415c" if share >= 0.5 else "#f2e9de"
            axes.barh(row, 0.9, left=call - 0.45, height=0.7, color=color, edgecolor="#33415c")
    axes.set_yticks(range(len(computed)), list(computed))
    axes.set_xticks(range(0, calls, max(1, calls // 10)))
    axes.set_xlabel("network call: computed where dark, predicted where light")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=100)
