"""A small network whose features tell real pictures of one data set from others: for the in-domain Fréchet distance.

It is trained on the very pictures that it is to judge by, in minutes on one CPU core, where Inception cannot be had or
is out of place: pictures are altered in ways of known strength, and from the altered picture alone the network tells
what was done to it (warping, blur, contrast, colours, noise) and what it looked like before. The first makes
its features sensitive to how a picture is drawn, the second to what is in it.

The distance between such features is no FID and is never called so: it depends on the pictures that the network was
trained on, and it can be compared only where these, and the number of pictures, are the same.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock
from safetensors.torch import load, save
from torch import nn
from tqdm import tqdm

from .distances import feature_distances
from .files import write_aside

# Everything that the weights depend on besides the pictures. `version` is counted up when the code below changes them.
RECIPE: dict[str, Any] = {
    "version": 1,
    "num_features": 64,
    "channels": [32, 64, 96, 128],
    "train_steps": 1000,
    "train_batch_size": 64,
    "learning_rate": 2e-3,
    "seed": 0,
}
SPLITS = 5  # of the real pictures, that the distance is averaged over
THUMBNAIL = 16  # pixels, of the picture before it was altered


class InDomainFeatures(nn.Module):
    r"""
    The feature network: four strided convolutions, then one linear layer over what is left of the picture.

    Batch normalisation, which in use is a fixed scaling, keeps what a normalisation by picture would take away: how
    bright and how rich in contrast it is.

    Parameters:
        num_features (`int`, *optional*, defaults to `64`): How many features a picture gets.
        channels (`list[int]`, *optional*, defaults to `[32, 64, 96, 128]`): The widths of the convolutions.
        kwargs (*optional*): The other entries of a recipe, which say how it is trained.
    """

    def __init__(self, num_features: int = 64, channels: list[int] = RECIPE["channels"], **kwargs: Any) -> None:
        super().__init__()
        self.num_features = num_features
        layers: list[nn.Module] = []
        for before, after in zip([3, *channels], channels):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.features = nn.Linear(16 * channels[-1], num_features)
        self.what_was_done = nn.Linear(num_features, len(ALTERATIONS))
        self.before = nn.Linear(num_features, 3 * THUMBNAIL**2)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """uint8 pictures, or float ones in [0, 255], (B, 3, H, W) → features (B, num_features)."""
        return self.features(self.body(pictures.float() / 127.5 - 1))


# ---- what is done to the pictures: (pictures in [0, 1], strengths in [-1, 1] of (B,), generator) → pictures ----


def warp(pictures: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A smooth random displacement, a twelfth of the width (root mean square) at most."""
    field = torch.randn(len(pictures), 2, 4, 4, generator=generator) * strength.abs().view(-1, 1, 1, 1) / 6
    field = F.interpolate(field, pictures.shape[-2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    still = torch.eye(2, 3).expand(len(pictures), 2, 3)
    grid = F.affine_grid(still, list(pictures.shape), align_corners=False) + field
    return F.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False)


def blur(pictures: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gaussian, σ up to a 32nd of the width."""
    sigma = (strength.abs() * pictures.shape[-1] / 32).clamp(min=1e-3)
    return gaussian_blur(pictures, sigma)


def contrast(pictures: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Up to twice, down to half, around the picture's own mean."""
    mean = pictures.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (pictures - mean) * torch.exp2(strength).view(-1, 1, 1, 1)


def saturation(pictures: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """From grey to twice as colourful."""
    grey = pictures.mean(dim=1, keepdim=True)
    return grey + (pictures - grey) * (1 + strength).view(-1, 1, 1, 1)


def shift(channel: int) -> Callable[[torch.Tensor, torch.Tensor, torch.Generator], torch.Tensor]:
    """One colour channel brighter or darker, by up to 0.2."""
    unit = F.one_hot(torch.tensor(channel), 3).float().view(1, 3, 1, 1) * 0.2
    return lambda pictures, strength, generator: pictures + unit * strength.view(-1, 1, 1, 1)


def noise(pictures: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """White, σ up to 0.1."""
    return pictures + torch.randn(pictures.shape, generator=generator) * strength.abs().view(-1, 1, 1, 1) * 0.1


# In the order in which they are applied. `True`: the strength has a sign that the network is to tell.
ALTERATIONS: dict[str, tuple[Callable[..., torch.Tensor], bool]] = {
    "warp": (warp, False),
    "blur": (blur, False),
    "contrast": (contrast, True),
    "saturation": (saturation, True),
    "red": (shift(0), True),
    "green": (shift(1), True),
    "blue": (shift(2), True),
    "noise": (noise, False),
}


def gaussian_blur(pictures: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Blur each picture (B, C, H, W) by its own σ in pixels, (B,)."""
    radius = max(1, math.ceil(3 * float(sigma.max())))
    radius = min(radius, pictures.shape[-1] - 1)  # what reflection allows
    place = torch.arange(-radius, radius + 1)
    kernel = torch.softmax(-(place**2) / (2 * sigma.view(-1, 1) ** 2), dim=1)
    batch, channels, height, width = pictures.shape
    kernels = kernel.repeat_interleave(channels, 0).view(-1, 1, 1, 2 * radius + 1)
    flat = F.pad(pictures.reshape(1, -1, height, width), [radius] * 4, mode="reflect")
    flat = F.conv2d(flat, kernels, groups=batch * channels)
    flat = F.conv2d(flat, kernels.transpose(2, 3), groups=batch * channels)
    return flat.view(batch, channels, height, width)


def alter(pictures: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Alter pictures, each in about half of all ways.

    Args:
        pictures (`torch.Tensor` of shape `(B, 3, H, W)`): in [0, 1].
        generator (`torch.Generator`): Of everything that is random.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the altered pictures, in [0, 1] and rounded to 256 levels; the strengths
        `(B, len(ALTERATIONS))`, in [-1, 1], 0 where nothing was done.
    """
    size = (len(pictures), len(ALTERATIONS))
    strengths = torch.rand(size, generator=generator) * (torch.rand(size, generator=generator) < 0.5)
    signs = torch.randint(2, size, generator=generator) * 2 - 1
    is_signed = torch.tensor([signed for _, signed in ALTERATIONS.values()])
    strengths = torch.where(is_signed, strengths * signs, strengths)
    for (function, _), strength in zip(ALTERATIONS.values(), strengths.T):
        pictures = function(pictures, strength, generator)
    return pictures.clamp(0, 1).mul(255).round().div(255), strengths


# ---- training ----


def train_features(pictures: torch.Tensor, recipe: dict[str, Any] = RECIPE) -> InDomainFeatures:
    r"""
    Train the feature network; the same pictures and recipe give the same weights to the bit on one machine.

    Args:
        pictures (`torch.Tensor` of shape `(N, 3, H, W)`): uint8, the training split.
        recipe (`dict`, *optional*, defaults to `RECIPE`): How.

    Returns:
        [`InDomainFeatures`]: the network in eval mode.
    """
    generator = torch.Generator().manual_seed(recipe["seed"])
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe["seed"])
        network: InDomainFeatures = InDomainFeatures(**recipe).train()
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(network.parameters(), lr=recipe["learning_rate"], weight_decay=1e-2)
        steps = recipe["train_steps"]
        warm = steps // 20 + 1
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm, (1 + math.cos(math.pi * step / steps)) / 2)
        )
        progress = tqdm(range(steps), "training the in-domain features", unit="step", disable=None, leave=False)
        for step in progress:
            rows = torch.randint(len(pictures), (recipe["train_batch_size"],), generator=generator)
            clean = pictures[rows].float() / 255
            flips = torch.rand(len(rows), generator=generator) < 0.5
            clean = torch.where(flips.view(-1, 1, 1, 1), clean.flip(-1), clean)
            altered, strengths = alter(clean, generator)
            features = network(altered * 255)
            before = F.adaptive_avg_pool2d(clean, THUMBNAIL).flatten(1)
            # the spread of each target is about the same: 0.4 of a strength, 0.25 of a pixel
            loss = F.mse_loss(network.what_was_done(features), strengths)
            loss = loss + 2 * F.mse_loss(network.before(features), before)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                progress.set_postfix(loss=f"{loss.item():.4f}")
    return network.eval().requires_grad_(False)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in another number of threads are rounded otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---- the network of a training split, trained once; and the distance ----


def in_domain_features(
    pictures: torch.Tensor, pictures_sha256: str, cache_dir: Path, recipe: dict[str, Any] = RECIPE
) -> InDomainFeatures:
    """The network of these pictures and this recipe: from the cache, or trained now and kept there."""
    key = hashlib.sha256(f"{pictures_sha256} {json.dumps(recipe, sort_keys=True)}".encode()).hexdigest()[:16]
    file = cache_dir / "in-domain" / f"{key}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):  # another command may want the same, and waits instead of training too
        if not file.is_file():
            trained = train_features(pictures, recipe).state_dict()
            write_aside(file, save({name: tensor.contiguous() for name, tensor in trained.items()}))
    network = InDomainFeatures(**recipe)
    network.load_state_dict(load(file.read_bytes()))
    return network.eval().requires_grad_(False)


def in_domain_distance(features: torch.Tensor, real: torch.Tensor, seed: int = 0) -> dict[str, Any]:
    r"""
    The in-domain Fréchet distance of drawn pictures, and the floor: that of as many real ones, measured alike.

    The distance depends on how many pictures there are on either side. So n real pictures are set aside, and the drawn
    and the real ones, n of each, are held against the remaining real ones; this is done five times, with others set
    aside each time. n is the number of drawn pictures, or half of the real ones if that is less; then the n drawn ones
    are chosen at random.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): Of the drawn pictures.
        real (`torch.Tensor` of shape `(M, D)`): Of the pictures that the network was trained on.
        seed (`int`, *optional*, defaults to `0`): Of who is set aside.

    Returns:
        `dict`: `"frechet_distance"` and `"floor"`, each a mean over the five, with `"floor_std"`, `"kernel_distance"`
        (of the first of the five), and `"num_pictures"`, n.
    """
    generator = torch.Generator().manual_seed(seed)
    number = min(len(features), len(real) // 2)
    if len(features) > number:
        features = features[torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))]
    drawn: list[float] = []
    floor: list[float] = []
    kernel: dict[str, float] = {}
    for draw in range(SPLITS):
        order = torch.randperm(len(real), generator=generator)
        rest = real[order[number:]]
        distances = feature_distances(features[:number], rest, kernel=draw == 0, seed=seed)
        kernel = kernel or distances
        drawn.append(distances["frechet"])
        floor.append(feature_distances(real[order[:number]], rest, kernel=False)["frechet"])
    return {
        "frechet_distance": statistics.mean(drawn),
        "floor": statistics.mean(floor),
        "floor_std": statistics.stdev(floor),
        "kernel_distance": kernel["kernel"],
        "num_pictures": number,
    }
