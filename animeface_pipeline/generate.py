"""Draw faces with a saved pipeline: one file for each seed, and a grid of all of them.

    python -m animeface_pipeline.generate --output_dir faces
    python -m animeface_pipeline.generate anime-faces --output_dir faces --save_process
    python -m animeface_pipeline.generate user/anime-faces --output_dir few --scheduler sde-dpmsolver++ \\
        --num_inference_steps 20

Without a model, the small one is taken that comes with the package. By what was measured (docs/quality.md), the solver
to choose is sde-dpmsolver++ from 10 steps on, and unipc below.

One seed, one picture: all noise of image k comes from a generator of its own, seeded with seed + k and kept on the
CPU, whatever the batch size, the number of images and the device. A run that was stopped goes on where it was when the
same command is given again; batch size, device and --compile may change then.

Written are seed-000000.png …, the grid N-imgs-final.png, with --save_process the strips 1.png … N.png, and
generate.json, by which a run knows its folder. The pictures carry seed, model and settings in their PNG metadata.
Exit codes: 0 done, 2 bad input, 130 stopped by Ctrl-C.
"""

import argparse
import hashlib
import io
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from . import EMBEDDED_MODEL, __version__
from .cli import EXIT_DONE, BadInput, OneLineParser, command
from .files import write_aside
from .images import denoising_strips, image_grid
from .pipeline_animeface import AnimeFacePipeline
from .schedulers import SCHEDULERS, recommended_steps, switch_scheduler
from .speed import FAST, compile_for_sampling, imitates_bf16

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SETTINGS_FILE = "generate.json"
MODEL_HELP = "a pipeline's folder, or its name on the Hub (user/name); default: the small one of the package"
NAMES_ONLY = ("animeface_pipeline", "model")  # settings that may differ when a run goes on: the weights' hash counts


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, prog="python -m animeface_pipeline.generate")
    add_model_argument(parser)
    parser.add_argument("--output_dir", type=Path, required=True, help="new, empty, or of a run that was stopped")
    parser.add_argument("--num_images", type=count, default=16, help="default: 16")
    add_sampling_arguments(parser, batch_size=16)
    parser.add_argument("--save_process", action="store_true", help="also save a strip of 20 stages for each image")
    return parser.parse_args(argv)


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default=str(EMBEDDED_MODEL), help=MODEL_HELP)


def model_name(model: str) -> str:
    """What is written down: of the embedded model not where this machine has it."""
    return EMBEDDED_MODEL.name if model == str(EMBEDDED_MODEL) else model


def add_sampling_arguments(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """The flags that every command has that draws."""
    parser.add_argument(
        "--batch_size", type=count, default=batch_size, help="images drawn at once (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=parse_seed, default=0, help="of the first image; the next has seed + 1 (default: 0)"
    )
    parser.add_argument("--num_inference_steps", type=count, help="default: 1000 for ddpm, 100 for ddim, else 25")
    parser.add_argument("--scheduler", choices=SCHEDULERS, help="default: the one that the pipeline was saved with")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="the network's precision; default: float32")
    parser.add_argument(
        "--device", type=parse_device, help="cpu, cuda, cuda:1, mps, … (default: the best one there is)"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the network; pays off on long runs")


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text}")
    return int(text)


def parse_seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2**63 - 1, not {text}")
    return int(text)


def parse_device(text: str) -> torch.device:
    try:
        torch.ones(1, device=text).item()
        return torch.device(text)
    except (AssertionError, RuntimeError) as error:  # torch's, for a name that is none and a device that is not there
        raise argparse.ArgumentTypeError(f"{text} cannot be used here: {_first_line(error)}") from error


def best_device() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


@command
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    former = read_settings(args.output_dir)
    pipe = load_pipeline(args)
    settings = describe_run(pipe, args)
    claim_folder(args.output_dir, settings, former)
    try:
        draw_missing(pipe, args, settings)
        save_grid(args)
    except KeyboardInterrupt:
        print(f"stopped: the same command goes on with what is in {args.output_dir}", file=sys.stderr)
        return 128 + signal.SIGINT
    except OSError as error:
        raise BadInput(f"{args.output_dir}: cannot be written: {error}; the same command goes on from here") from error
    return EXIT_DONE


# ---- before the first image: the pipeline and the folder ----


def load_pipeline(args: argparse.Namespace) -> AnimeFacePipeline:
    """The pipeline on its device, with the scheduler and the precision that were asked for."""
    try:
        pipe = AnimeFacePipeline.from_pretrained(args.model, torch_dtype=DTYPES[args.dtype])
    except (OSError, ValueError) as error:
        raise BadInput(str(error)) from error
    most = pipe.scheduler.config.num_train_timesteps
    if args.num_inference_steps is not None and args.num_inference_steps > most:
        raise BadInput(f"--num_inference_steps {args.num_inference_steps}: must be at most {most}, as in training")

    # The original's own scheduler is made anew as well: its variance is right at 1000 steps only.
    is_original = isinstance(pipe.scheduler, DDPMScheduler) and pipe.scheduler.config.variance_type == "fixed_large"
    if name := args.scheduler or ("ddpm" if is_original else None):
        try:
            pipe.scheduler = switch_scheduler(pipe.scheduler, name)
        except ValueError as error:
            raise BadInput(f"--scheduler: {error}") from error
    args.num_inference_steps = args.num_inference_steps or min(recommended_steps(pipe.scheduler), most)
    if name is not None:
        pipe.scheduler = switch_scheduler(pipe.scheduler, name, args.num_inference_steps)

    torch.backends.cudnn.allow_tf32 = False  # torch allows it by default: float32 pictures would depend on the device
    pipe.to(args.device or best_device())
    if args.compile:
        compile_for_sampling(pipe.unet, "reduce-overhead" if pipe.device.type == "cuda" else "default")
    elif pipe.device.type in FAST:  # the same pictures, sooner (benchmarks/RESULTS.md)
        pipe.unet.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(desc="denoising", leave=False, position=1, disable=None)
    return pipe


def describe_run(pipe: AnimeFacePipeline, args: argparse.Namespace) -> dict[str, Any]:
    """What the pictures depend on, by names and by the weights' hash."""
    weights = hashlib.sha256()
    for tensor in pipe.unet.state_dict().values():
        weights.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    config = json.loads(pipe.scheduler.to_json_string())
    return {
        "animeface_pipeline": __version__,
        "model": model_name(args.model),
        "weights_sha256": weights.hexdigest(),
        "value_range": list(pipe.value_range),
        "scheduler": config["_class_name"],
        "scheduler_config": {name: value for name, value in config.items() if not name.startswith("_")},
        "num_inference_steps": args.num_inference_steps,
        "dtype": args.dtype,
        "seed": args.seed,
        "num_images": args.num_images,
        "save_process": args.save_process,
    }


def read_settings(output_dir: Path) -> dict[str, Any] | None:
    """The settings of the run whose folder it is, or `None` where there is no folder yet or an empty one."""
    try:
        if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
            return None
        return dict(json.loads((output_dir / SETTINGS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{output_dir}: holds something other than a former run: choose another folder") from error


def claim_folder(output_dir: Path, settings: dict[str, Any], former: dict[str, Any] | None) -> None:
    """Make the folder this run's own, or make sure that it is."""
    if former is None:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            write_aside(output_dir / SETTINGS_FILE, json.dumps(settings, indent=2).encode())
        except OSError as error:
            raise BadInput(f"{output_dir}: cannot be written: {error}; choose another folder") from error
    elif other := [name for name in settings if name not in NAMES_ONLY and former.get(name) != settings[name]]:
        raise BadInput(f"{output_dir}: holds a run that differs in {', '.join(other)}: choose another folder")


# ---- the images ----


def draw_missing(pipe: AnimeFacePipeline, args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Draw the images that are not there yet, batch by batch, and save each batch when it is finished."""
    seeds = range(args.seed, args.seed + args.num_images)
    missing = [seed for seed in seeds if not all(file.is_file() for file in files_of(seed, args))]
    if missing and args.dtype == "bfloat16" and imitates_bf16(pipe.device):
        message = "this CPU has no instructions for it and is many times slower in it than in float32"
        print(f"warning: --dtype bfloat16: {message}", file=sys.stderr)
    with tqdm(total=len(seeds), initial=len(seeds) - len(missing), unit="image") as progress:
        for start in range(0, len(missing), args.batch_size):
            batch = missing[start : start + args.batch_size]
            for seed, pictures in zip(batch, draw(pipe, batch, args)):
                for file, picture in zip(files_of(seed, args), pictures):
                    save_png(picture, file, {**settings, "seed": seed})
            progress.update(len(batch))


def files_of(seed: int, args: argparse.Namespace) -> list[Path]:
    """Where the image of `seed` goes, and its strip if there is to be one."""
    strip = [f"{seed - args.seed + 1}.png"] if args.save_process else []
    return [args.output_dir / name for name in (f"seed-{seed:06d}.png", *strip)]


def draw(pipe: AnimeFacePipeline, seeds: Sequence[int], args: argparse.Namespace) -> list[list[Image.Image]]:
    """For each seed its image, and its strip if there is to be one."""
    call: dict[str, Any] = {
        "batch_size": len(seeds),
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "num_inference_steps": args.num_inference_steps,
        "output_type": "np",
    }
    try:
        images, *strips = denoising_strips(pipe, **call) if args.save_process else pipe(**call, return_dict=False)
    except torch.OutOfMemoryError as error:
        raise BadInput(f"--batch_size {args.batch_size}: out of memory; the same command goes on with less") from error
    except RuntimeError as error:
        if not args.compile:
            raise
        raise BadInput(f"--compile: does not work here ({_first_line(error)}); leave it out") from error
    if not np.isfinite(images).all():
        raise BadInput(f"--dtype {args.dtype}: the network's output is not finite; use another precision or model")
    return [list(pictures) for pictures in zip(pipe.numpy_to_pil(images), *strips)]


def save_grid(args: argparse.Namespace) -> None:
    images = []
    for seed in range(args.seed, args.seed + args.num_images):
        file = files_of(seed, args)[0]
        try:
            with Image.open(file) as image:
                images.append(image.copy())
        except (OSError, SyntaxError) as error:
            raise BadInput(f"{file}: is damaged ({error}); remove it, and the same command draws it anew") from error
    grid = args.output_dir / f"{args.num_images}-imgs-final.png"
    save_png(image_grid(images), grid)
    print(f"{args.num_images} images are in {args.output_dir}, all of them in {grid.name}")


def save_png(picture: Image.Image, file: Path, metadata: dict[str, Any] | None = None) -> None:
    """Write a PNG whose metadata is text: strings as they are, everything else as JSON."""
    info, buffer = PngInfo(), io.BytesIO()
    for name, value in (metadata or {}).items():
        info.add_text(name, value if isinstance(value, str) else json.dumps(value))
    picture.save(buffer, format="PNG", pnginfo=info)
    write_aside(file, buffer.getvalue())


if __name__ == "__main__":
    main()
