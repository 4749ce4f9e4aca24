"""Experiment trackers (TensorBoard, Weights & Biases, trackio), through Accelerate."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from .cli import BadInput

TRACKERS = ("tensorboard", "wandb", "trackio")
PROJECT = "animeface-pipeline"
# How a tracker that shows pictures takes them, beyond what Accelerate passes on.
PICTURE_OPTIONS: dict[str, dict[str, Any]] = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}}


def chosen_trackers(report_to: str | None) -> list[str]:
    """The names that `--report_to` stands for; `BadInput` if the library of one is not installed."""
    installed = [name for name in TRACKERS if importlib.util.find_spec(name) is not None]
    if report_to is None:
        return []
    if report_to == "all":
        if not installed:
            raise BadInput(f"--report_to all: none is installed; pip install one of {', '.join(TRACKERS)}")
        return installed
    if report_to not in installed:
        raise BadInput(f"--report_to {report_to}: it is not installed; pip install {report_to}")
    return [report_to]


def start_trackers(accelerator: Accelerator, settings: dict[str, Any], run_name: str, run_id: str, step: int) -> None:
    """
    Begin to report, or go on after update `step`: what was reported later than that is replaced where the tracker can.

    Raises:
        [`BadInput`]: a tracker does not start, e.g. because nobody is logged in.
    """
    logs = str(accelerator.logging_dir)
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": step + 1} if step else {},
        "wandb": {"id": run_id, "name": run_name, "resume": "allow", "dir": logs},
        "trackio": {"name": f"{run_name}-{run_id}", "resume": "allow"},
    }
    plain = {key: value if isinstance(value, (int, float)) else str(value) for key, value in settings.items()}
    Path(logs).mkdir(exist_ok=True)
    try:
        accelerator.init_trackers(PROJECT, config=plain, init_kwargs=options)
    except Exception as error:  # each of them raises kinds of its own
        accelerator.trackers.clear()
        names = ", ".join(map(str, accelerator.log_with))
        raise BadInput(f"--report_to {names}: cannot start ({type(error).__name__}: {error})") from error


def report_pictures(accelerator: Accelerator, pictures: dict[str, Image.Image], step: int) -> None:
    """Show pictures in the trackers that can."""
    arrays = {name: np.asarray(picture)[None] for name, picture in pictures.items()}
    for tracker in accelerator.trackers:
        if tracker.name in PICTURE_OPTIONS:
            tracker.log_images(arrays, step=step, **PICTURE_OPTIONS[tracker.name])
