"""The original's noise schedule, and the switch from it to few-step solvers with the settings that are right for each.

```py
>>> from animeface_pipeline.schedulers import original_scheduler, switch_scheduler

>>> scheduler = switch_scheduler(original_scheduler(), "sde-dpmsolver++")
```
"""

from typing import Any

import diffusers
from diffusers import DDPMScheduler, SchedulerMixin


def original_scheduler(**overrides: Any) -> DDPMScheduler:
    r"""
    The original's schedule: β linear from 1e-4 to 0.02 over 1000 steps, σ_t² = β_t (Ho et al. 2020, section 4).

    Two settings matter beyond the β: nothing is clipped (Diffusers clips to ±1 by default), and the timesteps are
    spaced "trailing" (Lin et al. 2024, table 2), which begins at 999 for every solver and step count, and which
    `from_config` carries over before and after a reload, as it does not carry the defaults of the solvers.

    Args:
        overrides (*optional*): Arguments of [`DDPMScheduler`], e.g. `prediction_type="v_prediction"`.

    Returns:
        [`DDPMScheduler`]: the scheduler.
    """
    settings: dict[str, Any] = {
        "num_train_timesteps": 1000,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "variance_type": "fixed_large",
        "clip_sample": False,
        "timestep_spacing": "trailing",
    }
    return DDPMScheduler(**{**settings, **overrides})


# Name → class and its settings. DPM-Solver's authors advise order 3 for unconditional sampling; the SDE has order 2,
# because the last term of its third order in Diffusers does not vanish with the step. σ_t² = β_t is right at 1000
# steps only, below them the posterior's variance is (Nichol & Dhariwal 2021, section 3.1).
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    "dpmsolver++2": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "sde-dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "deis": ("DEISMultistepScheduler", {"algorithm_type": "deis", "solver_order": 3}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}

RECOMMENDED_STEPS = {"DDPMScheduler": 1000, "DDIMScheduler": 100}
FEW_STEPS = 25  # for all others; docs/quality.md shows what more or fewer are worth


def recommended_steps(scheduler: SchedulerMixin) -> int:
    """As many denoising steps as pay off with this scheduler."""
    return RECOMMENDED_STEPS.get(type(scheduler).__name__, FEW_STEPS)


def switch_scheduler(scheduler: SchedulerMixin, name: str, num_inference_steps: int = 1000) -> SchedulerMixin:
    r"""
    Make the scheduler `name` for a network that was trained with `scheduler`.

    Args:
        scheduler ([`SchedulerMixin`]): The one that the network was trained with, or one made from it.
        name (`str`): A key of `SCHEDULERS`: `"ddpm"`, `"ddim"`, `"dpmsolver++"`, `"unipc"`, ….
        num_inference_steps (`int`, *optional*, defaults to `1000`):
            How many steps it is for. Below 1000, `"ddpm"` gets the posterior's variance; σ_t² = β_t would leave noise.

    Returns:
        [`SchedulerMixin`]: the new scheduler, `timestep_spacing="trailing"` and its settings in its config.

    Raises:
        `ValueError`: a name that is not in the table, `"euler-ancestral"` for a network that predicts the picture.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler {name!r}: must be one of {', '.join(SCHEDULERS)}")
    if name == "euler-ancestral" and scheduler.config.prediction_type == "sample":
        raise ValueError("scheduler 'euler-ancestral': is not for a network that predicts the picture; take another")
    class_name, settings = SCHEDULERS[name]
    settings = {**settings, "timestep_spacing": "trailing"}
    if name == "ddpm":
        few = num_inference_steps < scheduler.config.num_train_timesteps
        settings["variance_type"] = "fixed_small" if few else "fixed_large"
    return getattr(diffusers, class_name).from_config(scheduler.config, **settings)
