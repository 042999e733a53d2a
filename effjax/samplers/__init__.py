"""Noise schedules and the sampling loop.

>>> from effjax.samplers import DDIM, Sampler
>>> sampler = Sampler(DDIM(steps=50), guidance=4.0)
>>> sampler.calls
50
"""

from effjax.samplers.ddim import DDIM
from effjax.samplers.ddpm import DDPM
from effjax.samplers.dpm_solver import DPMSolver
from effjax.samplers.flow_match import FlowMatchEuler
from effjax.samplers.sampler import Sampler, check_keys, keys_of, sample_keys
from effjax.samplers.schedule import DiffusionSchedule, Schedule, step_noise
from effjax.samplers.tables import Betas

__all__ = [
    "DDIM",
    "DDPM",
    "Betas",
    "DPMSolver",
    "DiffusionSchedule",
    "FlowMatchEuler",
    "Sampler",
    "Schedule",
    "check_keys",
    "keys_of",
    "sample_keys",
    "step_noise",
]
