"""Measure how good the pictures of a model are, against real ones.

    python -m animeface_pipeline.evaluate anime-faces --reference faces-64 --output_dir quality
    python -m animeface_pipeline.evaluate anime-faces --reference faces-64 --output_dir quality --fid
    python -m animeface_pipeline.evaluate anime-faces --reference faces-64 --output_dir few \\
        --scheduler sde-dpmsolver++ --num_inference_steps 20 --num_images 2000
    python -m animeface_pipeline.evaluate other-pictures --reference faces-64 --output_dir others

MODEL is a pipeline's folder, its name on the Hub, or a folder of pictures. DIR is what prepare_dataset wrote; its
train/ is what MODEL was trained on, its validation/ what it never saw (without one, memorisation is not measured).

Measured are the in-domain Fréchet distance (in_domain.py; its small network is trained the first time, minutes on a
CPU), colours, sharpness and memorisation, all without network; with --fid also FID and KID on Inception's features.
The pictures stay in the output folder, and evaluation.json beside them holds all numbers and all that it takes to
repeat them. A run that was stopped goes on where it was when the same command is given again, with a larger
--num_images too. It needs the extra: pip install "animeface-pipeline[eval]", with --fid "animeface-pipeline[fid]".

Exit codes: 0 done, 2 bad input, 130 stopped by Ctrl-C.
"""

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from . import __version__
from .cli import EXIT_DONE, BadInput, OneLineParser, command
from .dataset import default_cache, load_pictures
from .distances import compute_features, feature_distances, inception, sha256_of, torchmetrics_modules
from .files import write_aside
from .generate import (
    SETTINGS_FILE,
    add_sampling_arguments,
    best_device,
    claim_folder,
    count,
    describe_run,
    draw_missing,
    files_of,
    load_pipeline,
    read_settings,
)
from .hub import add_results, code_commit, hardware_name, library_versions, png
from .in_domain import RECIPE, in_domain_distance, in_domain_features
from .picture_statistics import compare_statistics, memorisation, statistic_rows
from .pipeline_animeface import AnimeFacePipeline

RESULT_FILE, CLOSEST_FILE = "evaluation.json", "closest.png"
ENOUGH_IMAGES = 10_000
RESOLUTION = 64  # that a folder of pictures is judged at


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, prog="python -m animeface_pipeline.evaluate")
    parser.add_argument("model", help="a pipeline's folder, its name on the Hub, or a folder of pictures")
    parser.add_argument("--reference", type=Path, required=True, metavar="DIR", help="the real pictures")
    parser.add_argument("--output_dir", type=Path, required=True, help="new, empty, or of a run that was stopped")
    parser.add_argument("--num_images", type=count, default=ENOUGH_IMAGES, help="default: 10000")
    add_sampling_arguments(parser, batch_size=64)
    parser.add_argument("--fid", action="store_true", help="also FID and KID on Inception's features; extra [fid]")
    parser.add_argument("--feature_weights", type=Path, help="Inception's weights, where they cannot be downloaded")
    parser.add_argument("--update_card", action="store_true", help="write the results into MODEL's README.md")
    parser.add_argument("--cache_dir", type=Path, default=default_cache(), help="of networks and features")
    args = parser.parse_args(argv)
    args.save_process = False  # a flag of generate
    if args.update_card and not all(Path(args.model, name).is_file() for name in ("model_index.json", "README.md")):
        raise BadInput(f"--update_card: {args.model} is no pipeline's folder with a card; save or download it first")
    read = {"--reference": args.reference}
    if is_folder_of_pictures(args.model):
        read["MODEL"] = Path(args.model)
        if drawing := [f"--{name}" for name in ("scheduler", "num_inference_steps", "compile") if getattr(args, name)]:
            raise BadInput(f"{', '.join(drawing)}: {args.model} is a folder of pictures, none is drawn; leave it out")
    for flag, folder in read.items():
        if args.output_dir.resolve().is_relative_to(folder.resolve()):
            raise BadInput(
                f"--output_dir {args.output_dir}: what is written there would count as {flag}'s; move it out"
            )
    if args.feature_weights and not args.fid:
        raise BadInput("--feature_weights: is for Inception; add --fid")
    return args


@command
def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parse_args(arguments)
    torchmetrics_modules()  # before anything is drawn
    inception_network = inception(args.feature_weights) if args.fid else None
    former = read_settings(args.output_dir)
    torch.backends.cudnn.allow_tf32 = False  # features are kept: they must not depend on what else was loaded
    try:
        source = open_model(args)
        given = isinstance(source, torch.Tensor)
        reference = load_reference(args, source.shape[-1] if given else source.unet.config.sample_size)
        if (number := min(args.num_images, len(source)) if given else args.num_images) < ENOUGH_IMAGES:
            few = f"{number} pictures are few: compare {ENOUGH_IMAGES:,} or more, and equal numbers"
            print(f"warning: {few}", file=sys.stderr)
        pictures, settings = (choose if given else draw)(source, args, former)
        results = {
            "command": shlex.join(["python", "-m", "animeface_pipeline.evaluate", *arguments]),
            "versions": versions(),
            "commit": code_commit(),
            "hardware": hardware_name(),
            "device": str(args.device or best_device()),
            "model": settings,
            "num_images": len(pictures),
            "pictures_sha256": sha256_of(pictures),
            "reference": reference.describe(),
            **measure(pictures, reference, inception_network, args),
        }
        write_aside(args.output_dir / RESULT_FILE, (json.dumps(results, indent=2) + "\n").encode())
        if args.update_card:
            add_results(Path(args.model), *for_the_card(results))
    except KeyboardInterrupt:
        print(f"stopped: the same command goes on with what is in {args.output_dir}", file=sys.stderr)
        return 128 + signal.SIGINT
    except OSError as error:
        where = f"{args.output_dir} or --cache_dir {args.cache_dir}"
        raise BadInput(f"{where}: cannot be written: {error}; the same command goes on from here") from error
    except torch.OutOfMemoryError as error:
        raise BadInput(f"--batch_size {args.batch_size}: out of memory; the same command goes on with less") from error
    print(table(results))
    print(f"all of it is in {args.output_dir / RESULT_FILE}")
    return EXIT_DONE


# ---- the pictures to judge ----


def open_model(args: argparse.Namespace) -> Any:
    """The pictures, uint8 (N, 3, H, W), if MODEL is a folder of them, else the pipeline that draws them."""
    if is_folder_of_pictures(args.model):
        return pictures_to_judge(Path(args.model), "MODEL", args)
    return load_pipeline(args)


def draw(
    pipe: AnimeFacePipeline, args: argparse.Namespace, former: dict[str, Any] | None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Draw into the output folder what is not there yet: the pictures, uint8 (N, 3, H, W), and what they come from."""
    settings = describe_run(pipe, args)
    for changeable in ("num_images", "save_process"):
        del settings[changeable]
    claim_folder(args.output_dir, settings, former)
    draw_missing(pipe, args, settings)
    files = [files_of(seed, args)[0] for seed in range(args.seed, args.seed + args.num_images)]
    return torch.stack([read_png(file) for file in files]), settings


def choose(
    pictures: torch.Tensor, args: argparse.Namespace, former: dict[str, Any] | None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The same of pictures that are there; if there are more than are wanted, some at random."""
    settings = {"animeface_pipeline": __version__, "model": args.model, "pictures_sha256": sha256_of(pictures)}
    claim_folder(args.output_dir, settings, former)
    order = np.random.default_rng(args.seed).permutation(len(pictures))[: args.num_images]
    return pictures[torch.from_numpy(np.sort(order))], settings


def pictures_to_judge(folder: Path, flag: str, args: argparse.Namespace) -> torch.Tensor:
    """All pictures of a folder; of one that `generate` wrote not its grid and its strips."""
    if (folder / SETTINGS_FILE).is_file():
        pictures = [read_png(file) for file in sorted(folder.glob("seed-*.png"))]
        if not pictures:
            raise BadInput(f"{flag} {folder}: a run that was stopped before its first picture; let it go on first")
        return torch.stack(pictures)
    if (folder / "run.json").is_file():
        raise BadInput(f"{flag} {folder}: a training run that is not finished, and no pictures; let it go on first")
    return pictures_in(folder, flag, args, resolution=RESOLUTION)


def is_folder_of_pictures(model: str) -> bool:
    return Path(model).is_dir() and not Path(model, "model_index.json").is_file() and any(Path(model).iterdir())


def read_png(file: Path) -> torch.Tensor:
    try:
        with Image.open(file) as image:
            return torch.from_numpy(np.asarray(image.convert("RGB")).transpose(2, 0, 1).copy())
    except OSError as error:
        raise BadInput(f"{file}: cannot be read as a picture ({error}); delete it to have it drawn again") from error


# ---- the pictures to judge by ----


class Reference(NamedTuple):
    """The real pictures, uint8 (N, 3, H, W): those trained on, and those held out, if any."""

    name: str
    train: torch.Tensor
    held_out: torch.Tensor | None
    train_sha256: str

    def describe(self) -> dict[str, Any]:
        known = {"name": self.name, "num_pictures": len(self.train), "sha256": self.train_sha256}
        if self.held_out is not None:
            known |= {"num_held_out": len(self.held_out), "held_out_sha256": sha256_of(self.held_out)}
        return known


def load_reference(args: argparse.Namespace, resolution: int) -> Reference:
    train = pictures_in(args.reference, "--reference", args, resolution=resolution)
    held_out = None
    if (args.reference / "train").is_dir() and (args.reference / "validation").is_dir():
        held_out = pictures_in(args.reference, "--reference", args, resolution=resolution, split="validation")
    if len(train) < 4:
        raise BadInput(f"--reference {args.reference}: {len(train)} pictures; it takes at least 4")
    return Reference(str(args.reference), train, held_out, sha256_of(train))


def pictures_in(folder: Path, flag: str, args: argparse.Namespace, **options: Any) -> torch.Tensor:
    try:
        return load_pictures(str(folder), cache_dir=args.cache_dir, **options)
    except BadInput as error:
        raise BadInput(str(error).replace("--train_data_dir", flag)) from error


# ---- measuring ----


def measure(
    pictures: torch.Tensor, reference: Reference, inception_network: torch.nn.Module | None, args: argparse.Namespace
) -> dict[str, Any]:
    """Everything that is measured, by name."""
    network = in_domain_features(reference.train, reference.train_sha256, args.cache_dir, RECIPE)
    drawn, real, weights = features_of(network, pictures, reference, args)
    results: dict[str, Any] = {
        "in_domain": {"recipe": RECIPE, "weights_sha256": weights, **in_domain_distance(drawn, real)},
        "statistics": compare_statistics(statistic_rows(pictures), statistic_rows(reference.train)),
    }
    if reference.held_out is not None and len(reference.held_out) > 1:
        results["memorisation"], closest = memorisation(pictures, reference.train, reference.held_out)
        write_aside(args.output_dir / ".gitignore", b"*\n")  # the next file holds real pictures
        write_aside(args.output_dir / CLOSEST_FILE, png(closest))
    if inception_network is not None:
        resized_by = f"-torchmetrics-{version('torchmetrics')}"
        drawn, real, weights = features_of(inception_network, pictures, reference, args, resized_by)
        distances = feature_distances(drawn, real)
        results["inception"] = {
            "weights_sha256": weights,
            "fid": distances["frechet"],
            "kid": distances["kernel"],
            "kid_std": distances["kernel_std"],
        }
    return results


def features_of(
    network: torch.nn.Module, pictures: torch.Tensor, reference: Reference, args: argparse.Namespace, made_by: str = ""
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Features of the pictures and of the reference (from the cache, if they are there), and the weights' hash.

    `made_by` is what they depend on besides the weights.
    """
    weights = sha256_of(network.state_dict())
    how: dict[str, Any] = {"batch_size": args.batch_size, "device": args.device or best_device()}
    cached = args.cache_dir / "features" / f"{reference.train_sha256[:16]}-{weights[:16]}{made_by}.float32"
    real = compute_features(network, reference.train, cached, description="features of the reference", **how)
    return compute_features(network, pictures, **how), real, weights


def versions() -> dict[str, str]:
    known = library_versions()
    for name in ("torchmetrics", "torch-fidelity", "numpy"):
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            known[name] = "not installed"
    return known


# ---- showing ----


def table(results: dict[str, Any]) -> str:
    """All measures as text: value, what real pictures get, and a verdict where there is a limit."""
    own = results["in_domain"]
    number = f"{own['num_pictures']:,} pictures"
    rows = [
        ("measure", "value", "real pictures", ""),
        (
            "in-domain Fréchet distance",
            f"{own['frechet_distance']:.3f}",
            f"{own['floor']:.3f} ± {own['floor_std']:.3f}",
            number,
        ),
        ("in-domain kernel distance", f"{own['kernel_distance']:.4f}", "0", number),
    ]
    for name, each in results["statistics"].items():
        verdict = "within" if each["passes"] else "FAILS"
        rows.append((f"{name}, {each['unit']}", f"{each['value']:.2f}", f"up to {each['limit']:.2f}", verdict))
    if own := results.get("memorisation"):
        usual = f"{own['median_ratio_held_out']:.2f}"
        rows.append(("nearest training / held-out picture", f"{own['median_ratio']:.2f}", usual, "median"))
        rows.append(("suspected copies", f"{own['suspects']:.1%}", f"{own['expected_suspects']:.0%}", CLOSEST_FILE))
    if own := results.get("inception"):
        rows.append(("FID", f"{own['fid']:.3f}", "", f"{results['num_images']:,} pictures"))
        rows.append(("KID", f"{own['kid']:.5f} ± {own['kid_std']:.5f}", "0", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def for_the_card(results: dict[str, Any]) -> tuple[dict[str, float], str]:
    """The metrics for the model card by their names on the Hub, and how they were measured."""
    model, own = results["model"], results["in_domain"]
    metrics = {"in-domain-frechet-distance": own["frechet_distance"]}
    if inception_results := results.get("inception"):
        metrics |= {"fid": inception_results["fid"], "kid": inception_results["kid"]}
    how = (
        f"on {own['num_pictures']:,} pictures ({model['scheduler']},"
        f" {model['num_inference_steps']} steps, seeds from {model['seed']}) against"
        f" {results['reference']['num_pictures']:,} real ones. The in-domain Fréchet distance is no FID: real pictures"
        f" get {own['floor']:.3f} by it."
    )
    return metrics, how


if __name__ == "__main__":
    main()
