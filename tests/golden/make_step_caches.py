"""Decisions and latents of other libraries' step caches on tiny models: step_caches.npz.

    python -m pip install torch diffusers==0.42.1 cache-dit==1.5.3
    python -m tests.golden.make_step_caches [methods to run anew]

The models are those of `effjax.testing` with their random weights, converted to diffusers. Each is
sampled with 28 Euler steps, one pass a step, from the noise that `start` draws; FasterCache with
guidance, "uncond" and "cond" in one batch, where a model is not told a scale. A run that skipped
nothing, or everything, is refused: a hook that attaches to no module says nothing.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import converters
from effjax import testing
from effjax.guidance import Guidance
from effjax.samplers import FlowMatchEuler, Sampler

FILE = Path(__file__).with_name("step_caches.npz")
STEPS = 28
SCHEDULES = {
    "flux": FlowMatchEuler(STEPS, spacing="trailing"),
    "sd3": FlowMatchEuler(STEPS, shift=3.0),
    "pixart": FlowMatchEuler(STEPS),
}
# What the peers are asked for, by a name that the test knows.
RUNS = {
    "fb_cache": ("flux",),  # on SD3 the hook fails: the last block returns no text
    "taylor_seer": ("flux", "sd3", "pixart"),
    "mag_cache": ("flux", "sd3"),
    "pab": ("flux", "sd3", "pixart"),
    "db_cache": ("flux",),
    "db_cache_bounded": ("flux",),
    "db_cache_mask": ("flux",),
    "faster_cache": ("flux", "sd3", "pixart"),
}
SCALE = 2.5
THRESHOLDS = {"fb_cache": 0.6, "db_cache": 0.6, "db_cache_bounded": 0.9}
BOUNDS = {"max_cached": 9, "max_continuous": 2, "warmup": 4}
MASK = "1111110100010000100000100001"


def guided(method: str, name: str) -> bool:
    """Whether a model is sampled with guidance."""
    return method == "faster_cache" and name != "flux"


def subject(name: str, *, scale: float = 1.0) -> testing.Subject:
    """A tiny model that is sampled a row at a time, with guidance of this scale."""
    tiny = {"flux": testing.tiny_flux, "sd3": testing.tiny_sd3, "pixart": testing.tiny_pixart}
    more = {"flux": {"num_layers": 3, "num_single_layers": 3}, "sd3": {"num_layers": 5}}
    made = tiny[name](batch=1, **more.get(name, {"num_layers": 4}))
    sampler = Sampler(SCHEDULES[name], scale, Guidance(("uncond", "cond")))
    return testing.Subject(made.forward, made.params, sampler, made.cond, made.uncond)


def start(name: str) -> np.ndarray:
    """The noise that a model is sampled from."""
    shape = subject(name).forward.config.sample_shape
    return np.random.default_rng(len(name)).standard_normal((1, *shape)).astype(np.float32)


def peer(name: str, scale: float) -> tuple[Any, Callable[[Any, float], Any]]:
    """diffusers' model with these weights, and how it is called at a step, with guidance."""
    import diffusers
    import torch

    made = subject(name, scale=scale)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        converters.save_pretrained(made.forward, made.params, path, progress=False)
        kind = {
            "flux": diffusers.FluxTransformer2DModel,
            "sd3": diffusers.SD3Transformer2DModel,
            "pixart": diffusers.PixArtTransformer2DModel,
        }[name]
        model = kind.from_pretrained(path).eval()
    whole = made.sampler.guided
    cond = made.cond
    if whole:
        cond = made.sampler.arrangement.join({"uncond": made.uncond, "cond": cond})
    embeds = torch.tensor(np.asarray(cond.embeds))

    def call(x: Any, time: float) -> Any:
        if not whole:
            return once(x, time)
        uncond, cond = once(torch.cat([x, x]), time)[:, : x.shape[1]].chunk(2)
        return uncond + scale * (cond - uncond)

    def once(x: Any, time: float) -> Any:
        times = torch.full((len(x),), time)
        given: dict[str, Any] = {"hidden_states": x, "encoder_hidden_states": embeds}
        given["timestep"] = times
        if name == "pixart":
            given["encoder_attention_mask"] = torch.tensor(np.asarray(cond.mask)).long()
            given["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
            return model(**given, return_dict=False)[0]
        pooled = torch.tensor(np.asarray(cond.pooled))
        if name == "sd3":
            return model(**given, pooled_projections=pooled, return_dict=False)[0]
        packing = diffusers.FluxPipeline
        _, channels, height, width = x.shape
        ids = packing._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", x.dtype)
        packed = packing._pack_latents(x, 1, channels, height, width)
        guidance = None if cond.guidance is None else torch.tensor(np.asarray(cond.guidance))
        text = torch.zeros(embeds.shape[1], 3)
        out = model(packed, embeds, pooled, times / 1000, ids, text, guidance=guidance)[0]
        return packing._unpack_latents(out, height * 8, width * 8, 8)

    return model, call


@contextlib.contextmanager
def context(model: Any) -> Iterator[None]:
    """What a pipeline says to the hooks of a pass, for models without `cache_context` too."""
    from diffusers.hooks import hooks

    hooks._set_cache_context(model, hooks.CacheContext("cond"))
    yield
    hooks._set_cache_context(model, None)


def attach(method: str, name: str, model: Any, time: Callable[[], float]) -> Any:
    """Attach a cache; return the module whose calls count as computed steps."""
    import torch
    from diffusers import hooks

    single = getattr(model, "single_transformer_blocks", None)
    last = model.transformer_blocks[-1] if single is None else single[-1]
    attention = getattr(last, "attn", None) or last.attn1
    if method == "fb_cache":
        config = hooks.FirstBlockCacheConfig(threshold=THRESHOLDS["fb_cache"])
        hooks.apply_first_block_cache(model, config)
    elif method == "taylor_seer":
        # Its own patterns find neither PixArt's attentions nor the second one of SD3.5's blocks.
        own = None if name == "flux" else [r".*\.attn[12]?"]
        config = hooks.TaylorSeerCacheConfig(
            taylor_factors_dtype=torch.float32, cache_identifiers=own
        )
        hooks.apply_taylorseer_cache(model, config)
        return attention.to_out[0] if hasattr(attention, "to_out") else attention.to_q
    elif method == "mag_cache":
        config = hooks.MagCacheConfig(mag_ratios=hooks.mag_cache.FLUX_MAG_RATIOS)
        hooks.apply_mag_cache(model, config)
    elif method == "pab":
        config = hooks.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            cross_attention_block_skip_range=6,
            current_timestep_callback=time,
        )
        hooks.apply_pyramid_attention_broadcast(model, config)
        return attention.to_q
    elif method == "faster_cache":
        # Of its own it does not halve SD3's pooled texts.
        halved = ("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask")
        config = hooks.FasterCacheConfig(
            tensor_format="BCHW",
            is_guidance_distilled=name == "flux",
            current_timestep_callback=time,
            _unconditional_conditional_input_kwargs_identifiers=(*halved, "pooled_projections"),
        )
        hooks.apply_faster_cache(model, config)
        return attention.to_q
    else:
        import cache_dit

        options: dict[str, Any] = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 1}
        options |= {"max_warmup_steps": 2, "residual_diff_threshold": THRESHOLDS["db_cache"]}
        if method == "db_cache_bounded":
            options |= {
                "Bn_compute_blocks": 0,
                "max_warmup_steps": BOUNDS["warmup"],
                "max_cached_steps": BOUNDS["max_cached"],
                "max_continuous_cached_steps": BOUNDS["max_continuous"],
                "residual_diff_threshold": THRESHOLDS["db_cache_bounded"],
            }
        if method == "db_cache_mask":
            options |= {
                "max_warmup_steps": 8,
                "steps_computation_mask": [int(each) for each in MASK],
                "steps_computation_policy": "static",
            }
        config = cache_dit.DBCacheConfig(**options, num_inference_steps=STEPS)
        cache_dit.enable_cache(model, cache_config=config)
        return model.single_transformer_blocks[0]
    return attention.to_q


def run(method: str, name: str) -> dict[str, np.ndarray]:
    """Which steps computed, the latents, and which steps ran all branches of guidance."""
    import torch

    model, call = peer(name, SCALE if guided(method, name) else 1.0)
    schedule, now, computed, rows = SCHEDULES[name], [0.0], [], []
    watched = attach(method, name, model, lambda: now[0])
    watched.register_forward_hook(lambda *_: computed.append(len(steps)))
    if guided(method, name):
        model.pos_embed.register_forward_hook(lambda *seen: rows.append(len(seen[-1])))
    x = torch.tensor(start(name).transpose(0, 3, 1, 2))
    steps: list[float] = []
    sigmas = schedule.sigmas
    with torch.no_grad():
        for step, time in enumerate(schedule.times):
            now[0] = float(time)
            with context(model):
                velocity = call(x, float(time))
            x = x + float(sigmas[step + 1] - sigmas[step]) * velocity[:, : x.shape[1]]
            steps.append(float(time))
    mask = np.isin(np.arange(STEPS), computed)
    if mask.all() or not mask.any():
        raise SystemExit(f"{method} on {name} skipped {'nothing' if mask.all() else 'everything'}")
    found = {"mask": mask, "latents": x.numpy().transpose(0, 2, 3, 1)}
    return {**found, "branches": np.array(rows) > 1} if rows else found


def dense(name: str, scale: float) -> np.ndarray:
    """The latents of a model without a cache."""
    made, options = subject(name, scale=scale), {"noise": jnp.asarray(start(name))}
    key = jax.random.key(0)
    sample = jax.jit(made.sampler)
    return np.asarray(
        sample(made.forward, made.params, made.cond, key, uncond=made.uncond, **options)
    )


def main(methods: Sequence[str]) -> int:
    """Run the peers' caches; of these methods alone if some are named."""
    found = dict(np.load(FILE)) if methods else {}
    for method, names in RUNS.items():
        for name in names if method in methods or not methods else ():
            for what, value in run(method, name).items():
                found[f"{method}/{name}/{what}"] = value
                if value.dtype == bool:
                    print(f"{method:18} {name:8} {''.join(map(str, value.astype(int)))} {what}")
    for name in SCHEDULES:
        found[f"dense/{name}"] = dense(name, 1.0)
        if guided("faster_cache", name):
            found[f"guided/{name}"] = dense(name, SCALE)
    np.savez_compressed(FILE, **found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
