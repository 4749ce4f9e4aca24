"""A network whose answers are known: the exact prediction for pictures that are one grey each, nearly.

x_0 = b·1 + s·z with b ~ N(1/2, 1/4²), z ~ N(0, I) and s = 0.02, so that a part of a picture says what the rest is.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from animeface_pipeline.schedulers import original_scheduler

MEAN, DEVIATION, GRAIN = 0.5, 0.25, 0.02


class ExactGaussian(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, sample_size: int = 8, in_channels: int = 3):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))  # what a pipeline reads device and precision from
        self.alphas_cumprod = original_scheduler().alphas_cumprod

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        alpha_bar = self.alphas_cumprod[torch.as_tensor(timestep).round().long()]
        offset = sample - alpha_bar.sqrt() * MEAN
        grey = offset.mean(dim=(1, 2, 3), keepdim=True).expand_as(sample)
        dimensions = sample[0].numel()

        def share(variance: float) -> torch.Tensor:
            """Of an offset along a direction in which x_0 has this variance: how much of it is noise, over σ_t."""
            return (1 - alpha_bar).sqrt() / (alpha_bar * variance + 1 - alpha_bar)

        noise = share(DEVIATION**2 * dimensions + GRAIN**2) * grey + share(GRAIN**2) * (offset - grey)
        return (self.scale * noise,)
