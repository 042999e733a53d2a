"""Trajectories of diffusers' schedulers under fixed fake network outputs.

`python -m tests.samplers.diffusers_trajectories` writes golden.npz, which the tests read where
diffusers is absent. Made with diffusers 0.42.1 and torch 2.13.0.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

GOLDEN = Path(__file__).with_name("golden.npz")
SHAPE = (2, 1, 2, 3)  # B H W C


class Case(NamedTuple):
    scheduler: str
    steps: int
    config: Mapping[str, Any] = MappingProxyType({})
    options: Mapping[str, Any] = MappingProxyType({})  # what pipelines pass at run time

    @property
    def learned(self) -> bool:
        return self.config.get("variance_type") == "learned_range"


DDIM, DDPM = "DDIMScheduler", "DDPMScheduler"
DPM, FLOW = "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"

LATENT = {"clip_sample": False}
STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STABLE_DDIM = {**LATENT, **STABLE, "steps_offset": 1, "set_alpha_to_one": False}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
V, DATA = {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}
TRAILING, LINSPACE = {"timestep_spacing": "trailing"}, {"timestep_spacing": "linspace"}
LEADING = {"timestep_spacing": "leading"}
LEARNED = {"variance_type": "learned_range"}
FLUX = {"shift": 3.0, "use_dynamic_shifting": True}

CASES = {
    # DiT's pipeline is ddim50
    "ddim50": Case(DDIM, 50, LATENT),
    "ddim1": Case(DDIM, 1, LATENT),
    "ddim_trailing7": Case(DDIM, 7, {**LATENT, **TRAILING}),
    "ddim_linspace10": Case(DDIM, 10, {**LATENT, **LINSPACE}),
    "ddim_stable20": Case(DDIM, 20, STABLE_DDIM),
    "ddim_stable_v10": Case(DDIM, 10, {**STABLE_DDIM, **V}),
    "ddim_data10": Case(DDIM, 10, {**LATENT, **DATA}),
    "ddim_zero_snr12": Case(DDIM, 12, {**LATENT, **ZERO_SNR, **V}),
    "ddim_zero_snr_leading10": Case(DDIM, 10, {**LATENT, **ZERO_SNR, **LEADING}),
    "ddim_cosine10": Case(DDIM, 10, {**LATENT, "beta_schedule": "squaredcos_cap_v2"}),
    "ddim_short9": Case(DDIM, 9, {**LATENT, "num_train_timesteps": 100}),
    "ddim_half_eta10": Case(DDIM, 10, LATENT, {"eta": 0.5}),
    "ddim_eta_trailing9": Case(DDIM, 9, {**LATENT, **TRAILING}, {"eta": 1.0}),
    "ddim_clip10": Case(DDIM, 10, {"clip_sample_range": 1.5}),
    "ddpm_small20": Case(DDPM, 20, LATENT),
    "ddpm_large10": Case(DDPM, 10, {**LATENT, **TRAILING, "variance_type": "fixed_large"}),
    "ddpm_learned100": Case(DDPM, 100, {**LATENT, **LEARNED}),
    "ddpm_learned_linspace10": Case(DDPM, 10, {**LATENT, **LEARNED, **LINSPACE}),
    "ddpm_learned_trailing10": Case(DDPM, 10, {**LATENT, **LEARNED, **TRAILING}),
    "ddpm_v10": Case(DDPM, 10, {**LATENT, **V}),
    "ddpm_data10": Case(DDPM, 10, {**LATENT, **DATA}),
    "ddpm_stable15": Case(DDPM, 15, {**LATENT, **STABLE, "steps_offset": 1}),
    "ddpm_zero_snr10": Case(DDPM, 10, {**LATENT, **ZERO_SNR, **V}),
    "ddpm_clip10": Case(DDPM, 10),
    # PixArt's pipeline is dpm20
    "dpm20": Case(DPM, 20),
    "dpm1": Case(DPM, 1),
    "dpm2": Case(DPM, 2),
    "dpm5": Case(DPM, 5),
    "dpm14": Case(DPM, 14),
    "dpm15": Case(DPM, 15),
    "dpm50": Case(DPM, 50),
    "dpm_leading20": Case(DPM, 20, {**STABLE, **LEADING, "steps_offset": 1}),
    "dpm_trailing10": Case(DPM, 10, TRAILING),
    "dpm_trailing_v18": Case(DPM, 18, {**TRAILING, **V}),
    "dpm_data16": Case(DPM, 16, DATA),
    "dpm_karras8": Case(DPM, 8, {**STABLE, "use_karras_sigmas": True}),
    "dpm_karras20": Case(DPM, 20, {"use_karras_sigmas": True}),
    "dpm_sigma_min10": Case(DPM, 10, {"final_sigmas_type": "sigma_min"}),
    "dpm_sigma_min20": Case(DPM, 20, {"final_sigmas_type": "sigma_min"}),
    "dpm_high_order10": Case(
        DPM, 10, {"final_sigmas_type": "sigma_min", "lower_order_final": False}
    ),
    "dpm_karras_min9": Case(DPM, 9, {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
    "dpm_cosine12": Case(
        DPM, 12, {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}
    ),
    "dpm_zero_snr10": Case(DPM, 10, {**ZERO_SNR, **V}),
    "sd3_28": Case(FLOW, 28, {"shift": 3.0}),
    "sd3_5": Case(FLOW, 5, {"shift": 3.0}),
    "flow1": Case(FLOW, 1),
    "flow10": Case(FLOW, 10),
    "flux_dev28": Case(FLOW, 28, FLUX, {"spacing": "trailing", "mu": 1.15}),
    "flux_dev7": Case(FLOW, 7, FLUX, {"spacing": "trailing", "mu": 0.63}),
    "flux_schnell4": Case(FLOW, 4, {}, {"spacing": "trailing"}),
    "sd3_dynamic10": Case(FLOW, 10, FLUX, {"mu": 0.9}),
}


def fakes(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Initial sample, network outputs and injected noises, float32, [steps, ...] the last two."""
    rng = np.random.default_rng(case.steps)
    x = rng.standard_normal(SHAPE)
    outs = rng.standard_normal((case.steps, *SHAPE))
    noises = rng.standard_normal((case.steps, *SHAPE))
    if case.learned:
        outs = np.concatenate([outs, rng.uniform(-1, 1, outs.shape)], axis=-1)
    return x.astype(np.float32), outs.astype(np.float32), noises.astype(np.float32)


def scheduler(case: Case) -> Any:
    import diffusers

    made = getattr(diffusers, case.scheduler)(**case.config)
    if case.scheduler != FLOW:
        made.set_timesteps(case.steps)
        return made
    given = {}
    if case.options.get("spacing") == "trailing":
        given["sigmas"] = np.linspace(1.0, 1 / case.steps, case.steps)
    made.set_timesteps(case.steps, mu=case.options.get("mu"), **given)
    return made


def reference(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Times [steps] and samples [steps, *SHAPE] after every step, from diffusers."""
    import torch
    from diffusers.schedulers import scheduling_ddpm

    def to_torch(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.moveaxis(array, -1, 1).copy())

    made = scheduler(case)
    if case.scheduler == DPM:
        made.set_begin_index(0)  # with Karras sigmas, two calls can share a timestep
    x, outs, noises = fakes(case)
    x = to_torch(x)
    samples = []
    drawn = scheduling_ddpm.randn_tensor
    for step, time in enumerate(made.timesteps):
        noise = to_torch(noises[step])
        extra = {}
        if case.scheduler == DDIM and "eta" in case.options:
            extra = {"eta": case.options["eta"], "variance_noise": noise}
        scheduling_ddpm.randn_tensor = lambda *_, noise=noise, **__: noise
        try:
            x = made.step(to_torch(outs[step]), time, x, **extra).prev_sample
        finally:
            scheduling_ddpm.randn_tensor = drawn
        samples.append(np.moveaxis(x.numpy(), 1, -1))
    return made.timesteps.numpy().astype(np.float32), np.stack(samples)


def kept(samples: np.ndarray) -> np.ndarray:
    """The first, a middle and the last sample: what golden.npz holds of a trajectory."""
    return samples[[0, len(samples) // 2, -1]].astype(np.float32)


def write_golden() -> None:
    arrays = {}
    for name, case in CASES.items():
        arrays[f"{name}.times"], samples = reference(case)
        arrays[f"{name}.samples"] = kept(samples)
    temporary = GOLDEN.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, **arrays)
    os.replace(temporary, GOLDEN)


if __name__ == "__main__":
    write_golden()
