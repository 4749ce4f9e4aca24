"""Draw faces with a saved pipeline: one file for each seed, and a grid of all.

    python -m animeface_pipeline.generate anime-faces --output_dir faces
    python -m animeface_pipeline.generate user/anime-faces --output_dir faces --num_images 64 --scheduler unipc
        --num_inference_steps 20
    python -m animeface_pipeline.generate anime-faces --output_dir faces --save_process

One seed, one picture: all noise of image k comes from a generator seeded with seed + k, on the CPU, whatever the
device, the batch size and the number of images. A run that was stopped goes on when the same command is given again.
Exit codes: 0 done, 2 bad input, 130 stopped by Ctrl-C.
"""

import argparse
import hashlib
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from . import __version__
from .cli import BadInput, OneLineParser, command
from .images import denoising_strips, image_grid
from .pipeline_animeface import AnimeFacePipeline
from .schedulers import SCHEDULERS, switch_scheduler

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SETTINGS_FILE = "generate.json"  # by it a run knows its own folder
UNCOMPARED = ("animeface_pipeline", "model")  # the weights count, not what they are called


def parse_args() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("model", help="a pipeline's folder, or its name on the Hub (user/name)")
    parser.add_argument("--output_dir", type=Path, required=True, help="new, empty, or of a run that was stopped")
    parser.add_argument("--num_images", type=_count, default=16, help="how many images (default: 16)")
    parser.add_argument("--batch_size", type=_count, default=16, help="how many at once (default: 16)")
    parser.add_argument("--seed", type=_seed, default=0, help="of the first image; the next has seed + 1 (default: 0)")
    parser.add_argument(
        "--num_inference_steps", type=_count, default=1000, help="denoising steps, 20 do for unipc (default: 1000)"
    )
    parser.add_argument("--scheduler", choices=SCHEDULERS, help="(default: the one that the pipeline was saved with)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="the network's precision (default: float32)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, … (default: cuda if there is one, else cpu)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network: pays off on long runs")
    parser.add_argument("--save_process", action="store_true", help="also save a strip of 20 stages for each image")
    return parser.parse_args()


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2**63 - 1, not {text!r}")
    return int(text)


@command
def main() -> int | None:
    args = parse_args()
    former = read_settings(args.output_dir)
    pipe = load_pipeline(args)
    settings = describe_run(pipe, args)
    claim_folder(args.output_dir, settings, former)
    try:
        draw_missing(pipe, args, settings)
    except KeyboardInterrupt:
        print(f"stopped: the same command goes on with what is in {args.output_dir}", file=sys.stderr)
        return 128 + signal.SIGINT
    except torch.OutOfMemoryError:
        raise BadInput(
            f"out of memory at --batch_size {args.batch_size}: the same command with less goes on"
        ) from None
    except OSError as error:
        raise BadInput(f"{args.output_dir}: cannot be written ({error}): the same command goes on later") from error
    save_grid(args)
    return None


# ---- before the first image: the pipeline and the folder ----


def load_pipeline(args: argparse.Namespace) -> AnimeFacePipeline:
    """The pipeline on its device, with the scheduler and the precision that were asked for."""
    try:
        pipe = AnimeFacePipeline.from_pretrained(args.model, torch_dtype=DTYPES[args.dtype])
    except (OSError, ValueError) as error:
        raise BadInput(str(error)) from error
    most = pipe.scheduler.config.num_train_timesteps
    if args.num_inference_steps > most:
        raise BadInput(f"--num_inference_steps {args.num_inference_steps}: must be at most {most}, as in training")

    # The original's own scheduler is switched too: its variance is right at 1000 steps only.
    is_original = getattr(pipe.scheduler.config, "variance_type", None) == "fixed_large"
    if name := args.scheduler or ("ddpm" if is_original else None):
        pipe.scheduler = switch_scheduler(pipe.scheduler, name, args.num_inference_steps)

    torch.backends.cudnn.allow_tf32 = False  # float32 means float32: a picture must not depend on the device
    pipe.to(usable_device(args.device))
    if args.compile:
        pipe.unet.compile()
    pipe.set_progress_bar_config(desc="denoising", leave=False, position=1, disable=None)
    return pipe


def usable_device(name: str | None) -> torch.device:
    """The device of that name, or the best one that there is."""
    if name is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        torch.ones(1, device=name).item()
        return torch.device(name)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise BadInput(
            f"--device {name}: cannot be used here ({reason}): leave it out for the best there is"
        ) from error


def describe_run(pipe: AnimeFacePipeline, args: argparse.Namespace) -> dict[str, Any]:
    """What the pictures depend on, and what they are called."""
    config = json.loads(pipe.scheduler.to_json_string())
    digest = hashlib.sha256()
    for weight in pipe.unet.state_dict().values():
        digest.update(weight.cpu().contiguous().view(torch.uint8).numpy())
    return {
        "animeface_pipeline": __version__,
        "model": args.model,
        "weights_sha256": digest.hexdigest(),
        "scheduler": config.pop("_class_name"),
        "scheduler_config": {name: value for name, value in config.items() if not name.startswith("_")},
        "num_inference_steps": args.num_inference_steps,
        "value_range": list(pipe.value_range),
        "dtype": args.dtype,
        "seed": args.seed,
        "num_images": args.num_images,
        "save_process": args.save_process,
    }


def read_settings(output_dir: Path) -> dict[str, Any] | None:
    """The settings of the run whose folder it is; `None` where there is no folder yet, or an empty one."""
    try:
        if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
            return None
        return dict(json.loads((output_dir / SETTINGS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise BadInput(f"{output_dir}: is not empty and no folder of a former run: choose another one") from None


def claim_folder(output_dir: Path, settings: dict[str, Any], former: dict[str, Any] | None) -> None:
    """Make the folder this run's own, or make sure that it is."""
    if former is None:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            write_aside(output_dir / SETTINGS_FILE, json.dumps(settings, indent=2).encode())
        except OSError as error:
            raise BadInput(f"{output_dir}: cannot be written ({error}): choose another folder") from error
    elif other := [name for name in settings if name not in UNCOMPARED and former.get(name) != settings[name]]:
        raise BadInput(f"{output_dir}: holds a run that differs in {', '.join(other)}: choose another folder")


# ---- the images ----


def draw_missing(pipe: AnimeFacePipeline, args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Draw the images that are not there yet, batch by batch, and save each as soon as it is finished."""
    seeds = range(args.seed, args.seed + args.num_images)
    missing = [seed for seed in seeds if not all(file.is_file() for file in files_of(seed, args))]
    with tqdm(total=len(seeds), initial=len(seeds) - len(missing), unit="image") as progress:
        for start in range(0, len(missing), args.batch_size):
            batch = missing[start : start + args.batch_size]
            for seed, pictures in zip(batch, draw(pipe, batch, args)):
                for file, picture in zip(files_of(seed, args), pictures):
                    save_png(picture, file, {**settings, "seed": seed})
            progress.update(len(batch))


def files_of(seed: int, args: argparse.Namespace) -> list[Path]:
    """Where the image of `seed` is saved, and its strip if there is to be one."""
    names = [f"seed-{seed:06d}.png"] + [f"{seed - args.seed + 1}.png"] * args.save_process
    return [args.output_dir / name for name in names]


def draw(pipe: AnimeFacePipeline, seeds: list[int], args: argparse.Namespace) -> list[list[Image.Image]]:
    """For each seed its image, followed by its strip if there is to be one."""
    call: dict[str, Any] = {
        "batch_size": len(seeds),
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "num_inference_steps": args.num_inference_steps,
        "output_type": "np",
    }
    images, *strips = denoising_strips(pipe, **call) if args.save_process else pipe(**call, return_dict=False)
    if not np.isfinite(images).all():
        raise BadInput(f"the network's output in {args.dtype} is not finite: use --dtype float32")
    return [list(pictures) for pictures in zip(pipe.numpy_to_pil(images), *strips)]


def save_grid(args: argparse.Namespace) -> None:
    images = []
    for seed in range(args.seed, args.seed + args.num_images):
        with Image.open(files_of(seed, args)[0]) as image:
            images.append(image.copy())
    grid = args.output_dir / f"{args.num_images}-imgs-final.png"
    save_png(image_grid(images), grid)
    print(f"{args.num_images} images and their grid, {grid.name}, are in {args.output_dir}")


def save_png(picture: Image.Image, file: Path, metadata: dict[str, Any] | None = None) -> None:
    """Write a PNG with metadata (text; what is not text, as JSON)."""
    info, buffer = PngInfo(), io.BytesIO()
    for name, value in (metadata or {}).items():
        info.add_text(name, value if isinstance(value, str) else json.dumps(value))
    picture.save(buffer, format="PNG", pnginfo=info)
    write_aside(file, buffer.getvalue())


def write_aside(file: Path, content: bytes) -> None:
    """Write beside `file` and rename, so that a file is never there in part."""
    aside = file.with_name(f".{file.name}.part")
    try:
        aside.write_bytes(content)
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
