"""Walk from one face to another: spherical interpolation of the noise that they are drawn from.

    python -m animeface_pipeline.interpolate --seeds 3 14 15 --output_dir between
    python -m animeface_pipeline.interpolate anime-faces --images portrait.png --seeds 14 --output_dir mixed

Without a model, the small one is taken that comes with the package.

A deterministic solver makes a face of noise and of nothing else, so noise between two faces' noise is a face between
the two (Song et al. 2021, section 5.3). A given picture has noise too: DDIM's way, gone backwards, finds it. Pictures
come first on the walk, then the seeds, whose faces are those of `python -m animeface_pipeline.generate` with the same
solver and number of steps.

Written at the end are frame-000.png …, strip.png with all of them in a row, and interpolation.webp, which goes there
and back. Exit codes: 0 done, 2 bad input, 130 stopped by Ctrl-C.
"""

import argparse
import inspect
import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMInverseScheduler
from PIL import Image
from tqdm import tqdm

from . import __version__
from .cli import BadInput, OneLineParser, command
from .files import write_aside
from .generate import (
    DTYPES,
    add_model_argument,
    count,
    load_pipeline,
    model_name,
    parse_device,
    parse_seed,
    save_png,
)
from .images import image_grid
from .picture_rules import RULES, SetAside, read_picture
from .pipeline_animeface import AnimeFacePipeline
from .schedulers import SCHEDULERS

FRAME_MS = 80
# The solvers of the probability flow: they draw no noise of their own in any step.
DETERMINISTIC = tuple(name for name in SCHEDULERS if name not in ("ddpm", "sde-dpmsolver++", "euler-ancestral"))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, prog="python -m animeface_pipeline.interpolate")
    add_model_argument(parser)
    parser.add_argument("--output_dir", type=Path, required=True, help="new or empty")
    parser.add_argument("--seeds", type=parse_seed, nargs="+", default=[], help="of the faces to walk along")
    parser.add_argument("--images", type=Path, nargs="+", default=[], help="pictures of faces to begin with")
    parser.add_argument("--num_frames", type=count, default=16, help="from one face to the next (default: 16)")
    parser.add_argument("--batch_size", type=count, default=16, help="frames drawn at once (default: 16)")
    parser.add_argument("--num_inference_steps", type=count, default=50, help="default: 50")
    parser.add_argument("--scheduler", choices=DETERMINISTIC, default="ddim", help="default: ddim")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="the network's precision; default: float32")
    parser.add_argument("--device", type=parse_device, help="cpu, cuda, mps, … (default: the best one there is)")
    parser.set_defaults(compile=False)
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if len(args.images) + len(args.seeds) < 2:
        raise BadInput("one face leads nowhere: give two or more with --seeds and --images")
    if args.num_frames < 2:
        raise BadInput("--num_frames 1: must be at least 2, both ends included")
    if args.output_dir.exists() and not (args.output_dir.is_dir() and not any(args.output_dir.iterdir())):
        raise BadInput(f"{args.output_dir}: is there already: choose another folder")
    pictures = [read_image(path) for path in args.images]
    pipe = load_pipeline(args)
    ends = [
        *([invert(pipe, pictures, args.num_inference_steps)] if pictures else []),
        noise_of_seeds(pipe, args.seeds),
    ]
    noise = interpolate(torch.cat(ends), args.num_frames)
    frames = draw_from_noise(pipe, noise, args.num_inference_steps, args.batch_size)
    save(frames, args)


def read_image(path: Path) -> Image.Image:
    """A picture from a file, upright and on white; one line for everything else."""
    try:
        return read_picture(path, first_frame=True)
    except SetAside as error:
        found = f" ({error.detail})" if error.detail else ""
        raise BadInput(f"{path}: {RULES[error.rule]}{found}") from None


# ---- the noise ----


def noise_of_seeds(pipe: AnimeFacePipeline, seeds: Sequence[int]) -> torch.Tensor:
    """The noise that `pipe` draws from with a CPU generator of each seed: `(len(seeds), 3, height, width)`."""
    config = pipe.unet.config
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat([torch.empty(0, *shape[1:]), *noise]).to(pipe.device)


@torch.no_grad()
def invert(
    pipe: AnimeFacePipeline, image: Any, num_inference_steps: int = 50, num_iterations: int = 2
) -> torch.Tensor:
    r"""
    Find the noise that DDIM draws given pictures from (Song et al. 2021, section 5.4).

    A step backwards needs the prediction at its end, which is not known yet. DDIM takes the one at its beginning;
    going on from there, each further iteration predicts at the end that the last one found, and comes closer to the
    exact inverse of DDIM's step.

    Args:
        pipe ([`AnimeFacePipeline`]): Any scheduler: only the noise schedule and the prediction's type are read.
        image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list): As in [`~AnimeFacePipeline.preprocess`].
        num_inference_steps (`int`, *optional*, defaults to `50`): Steps from the picture to the noise.
        num_iterations (`int`, *optional*, defaults to `2`): How often the network is asked in each of them.

    Returns:
        `torch.Tensor` of shape `(batch_size, 3, height, width)`: the noise, about N(0, I) for pictures that the
        network could have drawn, and larger the less it could.

    Raises:
        `ValueError`: as in [`~AnimeFacePipeline.preprocess`], or counts that no schedule has.

    Example:

    ```py
    >>> from animeface_pipeline.interpolate import draw_from_noise, interpolate, invert, noise_of_seeds

    >>> ends = torch.cat([invert(pipe, Image.open("portrait.png")), noise_of_seeds(pipe, [14])])
    >>> frames = draw_from_noise(pipe, interpolate(ends, num_frames=5), num_inference_steps=50)
    ```
    """
    most = pipe.scheduler.config.num_train_timesteps
    if not 1 <= num_inference_steps <= most:
        raise ValueError(f"num_inference_steps={num_inference_steps!r}: must be from 1 to {most}")
    if num_iterations < 1:
        raise ValueError(f"num_iterations={num_iterations!r}: must be at least 1")
    known = inspect.signature(DDIMInverseScheduler).parameters
    config = {name: value for name, value in pipe.scheduler.config.items() if name in known}
    # Left to itself it divides by the noise of the clean picture, zero, where the network predicts the picture.
    scheduler = DDIMInverseScheduler.from_config(
        config, prediction_type="epsilon", timestep_spacing="trailing", clip_sample=False
    )
    scheduler.set_timesteps(num_inference_steps)
    sample = pipe.encode(image)
    for timestep in pipe.progress_bar(scheduler.timesteps):
        end = sample
        for _ in range(num_iterations):
            model_input, on_device = end.to(pipe.unet.dtype), timestep.to(end.device, non_blocking=True)
            prediction = pipe.unet(model_input, on_device, return_dict=False)[0].float()
            alpha_bar = scheduler.alphas_cumprod[timestep]
            noise = _as_noise(pipe.scheduler.config.prediction_type, prediction, end, alpha_bar)
            end = scheduler.step(noise, timestep, sample).prev_sample
        sample = end
    return sample


def _as_noise(
    prediction_type: str, prediction: torch.Tensor, sample: torch.Tensor, alpha_bar: torch.Tensor
) -> torch.Tensor:
    """The noise in x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε that a prediction of any type amounts to."""
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if prediction_type == "sample":
        return (sample - alpha * prediction) / sigma
    if prediction_type == "v_prediction":
        return alpha * prediction + sigma * sample  # v = α ε − σ x_0 (Salimans & Ho 2022, appendix D)
    return prediction


def interpolate(ends: torch.Tensor, num_frames: int = 16) -> torch.Tensor:
    r"""
    Walk along noises, on an arc from each to the next.

    Args:
        ends (`torch.Tensor` of shape `(num_ends, 3, height, width)`): Two or more.
        num_frames (`int`, *optional*, defaults to `16`): From each to the next, both included; at least 2.

    Returns:
        `torch.Tensor` of shape `((num_ends - 1) * (num_frames - 1) + 1, 3, height, width)`: the noises on the way.

    Raises:
        `ValueError`: fewer than two ends, or than two frames.
    """
    if len(ends) < 2 or num_frames < 2:
        raise ValueError(f"{len(ends)} ends and num_frames={num_frames!r}: both must be at least 2")
    weights = [frame / (num_frames - 1) for frame in range(num_frames - 1)]
    between = [slerp(start, end, weight) for start, end in pairwise(ends) for weight in weights]
    return torch.stack([*between, ends[-1]])


def slerp(start: torch.Tensor, end: torch.Tensor, weight: float) -> torch.Tensor:
    """
    Spherical linear interpolation (Shoemake 1985; Song et al. 2021, eq. 67): from `start` at 0 to `end` at 1.

    What lies on the straight line between two noises is shorter than either, and no noise that the network knows.
    """
    cosine = torch.nn.functional.cosine_similarity(start.flatten(), end.flatten(), dim=0)
    angle = cosine.clamp(-1, 1).acos()
    if angle.sin() < 1e-4:  # the same noise twice, or its opposite: no arc is the one between them
        return torch.lerp(start, end, weight)
    return (((1 - weight) * angle).sin() * start + (weight * angle).sin() * end) / angle.sin()


# ---- the pictures ----


def draw_from_noise(
    pipe: AnimeFacePipeline, noise: torch.Tensor, num_inference_steps: int = 50, batch_size: int = 16
) -> list[Image.Image]:
    r"""
    Draw a face from each noise.

    Args:
        pipe ([`AnimeFacePipeline`]): With a deterministic scheduler (DDIM, DPM-Solver++, UniPC, …).
        noise (`torch.Tensor` of shape `(num_images, 3, height, width)`): With the variance of N(0, I).
        num_inference_steps (`int`, *optional*, defaults to `50`): Denoising steps.
        batch_size (`int`, *optional*, defaults to `16`): How many are drawn at once.

    Returns:
        `list[PIL.Image.Image]`: the faces.

    Raises:
        `BadInput`: the network's output is not finite.
    """
    images = []
    with tqdm(total=len(noise), unit="image", disable=None) as progress:
        for batch in noise.split(batch_size):
            pipe.scheduler.set_timesteps(num_inference_steps)
            sample = pipe.denoise(batch * pipe.scheduler.init_noise_sigma, pipe.scheduler.timesteps)
            array = pipe.decode(sample, "np")
            if not np.isfinite(array).all():
                raise BadInput("the network's output is not finite; use another precision, model or picture")
            images += pipe.numpy_to_pil(array)
            progress.update(len(batch))
    return images


def save(frames: list[Image.Image], args: argparse.Namespace) -> None:
    """Frames, strip and animation; each frame's metadata say between which faces it lies."""
    ends = [path.name for path in args.images] + [f"seed {seed}" for seed in args.seeds]
    settings = {
        "animeface_pipeline": __version__,
        "model": model_name(args.model),
        "faces": ends,
        "num_frames": args.num_frames,
        "scheduler": args.scheduler,
        "num_inference_steps": args.num_inference_steps,
    }
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        digits = max(3, len(str(len(frames) - 1)))
        for number, frame in enumerate(frames):
            position = number / (args.num_frames - 1)  # 1.25 is a quarter of the way from the second to the third
            save_png(frame, args.output_dir / f"frame-{number:0{digits}}.png", {**settings, "position": position})
        save_png(image_grid(frames, columns=len(frames)), args.output_dir / "strip.png", settings)
        write_aside(args.output_dir / "interpolation.webp", animation(frames))
    except OSError as error:
        raise BadInput(f"{args.output_dir}: cannot be written: {error}; choose another folder") from error
    print(f"{len(frames)} frames from {' over '.join(ends)} are in {args.output_dir}")


def animation(frames: list[Image.Image]) -> bytes:
    """An animated WebP, lossless, that goes there and back for ever."""
    buffer = io.BytesIO()
    there_and_back = [*frames, *frames[-2:0:-1]]
    there_and_back[0].save(
        buffer,
        "WEBP",
        save_all=True,
        append_images=there_and_back[1:],
        duration=FRAME_MS,
        loop=0,
        lossless=True,
    )
    return buffer.getvalue()


if __name__ == "__main__":
    main()
