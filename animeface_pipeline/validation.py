"""The loss on pictures that are held out, with the same noise every time, so that two moments can be compared."""

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler

from .config import TrainingConfig
from .dataset import Batch, NoSuchSplit, stream_seed, to_value_range
from .streaming import first_pictures
from .training import diffusion_loss, load_split

MAX_PICTURES = 1024  # of the held-out split: enough for two digits, and quick
GOLDEN_RATIO = 0.618033988749895


class Validation:
    r"""
    The held-out split, each picture with a timestep and noise of its own that never change.

    Args:
        pictures (`torch.Tensor` of shape `(num_pictures, 3, height, width)`): uint8.
        config ([`TrainingConfig`]): Its seed, value range and batch size.
        accelerator (`Accelerator`): Each of its processes takes its share of the pictures.
        noise_scheduler ([`DDPMScheduler`]): As in training.
    """

    def __init__(
        self, pictures: torch.Tensor, config: TrainingConfig, accelerator: Accelerator, noise_scheduler: DDPMScheduler
    ) -> None:
        self.pictures, self.config, self.accelerator = pictures, config, accelerator
        self.noise_scheduler = noise_scheduler
        processes = accelerator.num_processes
        self.count = min(len(pictures), MAX_PICTURES) // processes * processes  # all make the same number of passes

    @torch.no_grad()
    def loss(self, unet: torch.nn.Module) -> float:
        """The mean squared error of the prediction, without weights, over pictures and timesteps."""
        mine = range(self.accelerator.process_index, self.count, self.accelerator.num_processes)
        size = self.config.train_batch_size
        total = torch.zeros(1, dtype=torch.float64, device=self.accelerator.device)
        for start in range(0, len(mine), size):
            _, errors = diffusion_loss(unet, self.noise_scheduler, self._batch(list(mine[start : start + size])))
            total += errors.double().sum()
        return float(self.accelerator.reduce(total)) / self.count

    def _batch(self, numbers: list[int]) -> Batch:
        device, steps = self.accelerator.device, self.noise_scheduler.config.num_train_timesteps
        clean = to_value_range(self.pictures[numbers].to(device), self.config.value_range)
        seeds = (stream_seed(self.config.seed, "validation", number) for number in numbers)
        noise = [torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        # multiples of the golden ratio: however many pictures there are, their timesteps are spread evenly
        timesteps = torch.tensor([int(number * GOLDEN_RATIO % 1 * steps) for number in numbers])
        return Batch(clean, torch.stack(noise).to(device), timesteps.to(device), weight=1.0)


def build_validation(
    config: TrainingConfig, accelerator: Accelerator, noise_scheduler: DDPMScheduler
) -> Validation | None:
    """The held-out split of the data, if there is one: a folder validation/ beside train/, or a split of that name."""
    try:
        if config.streaming:
            pictures = first_pictures(config, "validation", MAX_PICTURES)
        else:
            pictures = load_split(config, accelerator, "validation")
    except NoSuchSplit:
        return None
    if len(pictures) < accelerator.num_processes:
        accelerator.print(f"{len(pictures)} held-out pictures are too few for {accelerator.num_processes} processes")
        return None
    return Validation(pictures, config, accelerator, noise_scheduler)
