"""Calibrate the offline measures: real pictures against real ones, then worse and worse ones. Is the order right?

    python benchmarks/calibrate_in_domain.py --reference faces-64 --num_images 300 --output_file calibration.json
    python benchmarks/calibrate_in_domain.py --reference faces-64 --num_images 300 --output_file calibration.json \\
        --models early/ later/

Held-out pictures of the reference (validation/) are made worse in steps, and every set is held against train/ as
`animeface_pipeline.evaluate` does. --models are folders of pictures that models drew, the least trained one first.
All sets have the same number of pictures, because the Fréchet distance depends on it. Exit code 1 if within one of
the series a worse set is nearer than a better one.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from animeface_pipeline.cli import BadInput, command
from animeface_pipeline.dataset import default_cache
from animeface_pipeline.distances import compute_features
from animeface_pipeline.evaluate import features_of, load_reference, pictures_to_judge, versions
from animeface_pipeline.hub import code_commit, hardware_name
from animeface_pipeline.in_domain import ALTERATIONS, gaussian_blur, in_domain_distance, in_domain_features
from animeface_pipeline.picture_statistics import compare_statistics, statistic_rows

Worsen = Callable[[torch.Tensor, float, torch.Generator], torch.Tensor]


def all_of(pictures: torch.Tensor, amount: float) -> torch.Tensor:
    return torch.full((len(pictures),), amount)


def half_and_half(pictures: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """The right half of some pictures comes from another one."""
    other = pictures.roll(1, 0)
    mixed = torch.cat([pictures[..., :32], other[..., 32:]], dim=-1)
    chosen = torch.arange(len(pictures)) < share * len(pictures)
    return torch.where(chosen.view(-1, 1, 1, 1), mixed, pictures)


# What is done to pictures in [0, 1], with what unit, how much.
SERIES: dict[str, tuple[Worsen, str, list[float]]] = {
    "blur": (lambda x, much, _: gaussian_blur(x, all_of(x, much)), "σ = {} pixels", [0.5, 0.7, 1, 1.5, 2]),
    "noise": (
        lambda x, much, g: x + torch.randn(x.shape, generator=g) * much / 255,
        "σ = {} of 255 levels",
        [2, 4, 8, 16, 32],
    ),
    "colour shift": (
        lambda x, much, _: x + torch.tensor([much / 255, 0, 0]).view(1, 3, 1, 1),
        "red + {} of 255 levels",
        [4, 8, 16, 32],
    ),
    "washed out": (lambda x, much, _: x * (1 - much) + much, "towards white by {}", [0.1, 0.25, 0.5]),
    "warped": (lambda x, much, g: ALTERATIONS["warp"][0](x, all_of(x, much), g), "strength {}", [0.2, 0.4, 0.8]),
    "half of another face": (half_and_half, "{} of the pictures", [0.25, 0.5, 1.0]),
    "few different pictures": (
        lambda x, much, _: x[: int(much)].repeat(-(-len(x) // int(much)), 1, 1, 1)[: len(x)],
        "{} different ones",
        [100, 30, 10],
    ),
}


@command
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="what prepare_dataset wrote")
    parser.add_argument("--num_images", type=int, default=300, help="of every set (default: 300)")
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="folders of pictures, the worst first")
    parser.add_argument("--cache_dir", type=Path, default=default_cache())
    parser.add_argument("--output_file", type=Path, required=True)
    args = parser.parse_args()

    here = SimpleNamespace(
        reference=args.reference, cache_dir=args.cache_dir, device=torch.device("cpu"), batch_size=64
    )
    reference = load_reference(here, 64)
    if reference.held_out is None:
        raise BadInput(f"--reference {args.reference}: has no validation/; give what prepare_dataset wrote")
    chosen = torch.randperm(len(reference.held_out), generator=torch.Generator().manual_seed(0))[: args.num_images]
    held_out = reference.held_out[chosen]
    num_images = len(held_out)
    drawn = {folder: pictures_to_judge(folder, "--models", here)[:num_images] for folder in args.models}
    for folder, pictures in drawn.items():
        if len(pictures) < num_images:
            raise BadInput(f"--models {folder}: {len(pictures)} pictures, but every set has {num_images}; draw more")
    network = in_domain_features(reference.train, reference.train_sha256, args.cache_dir)
    _, real, weights = features_of(network, held_out, reference, here)

    real_rows = statistic_rows(reference.train)
    floors = {}
    for number in (100, 300, 1000, 3000, len(real) // 2):
        found = in_domain_distance(real[:number], real)
        floors[number] = {name: found[name] for name in ("floor", "floor_std")}
        print(f"real against real, {number:,} pictures: {found['floor']:.4f} ± {found['floor_std']:.4f}", flush=True)
    rows = []

    def measure(series: str, name: str, pictures: torch.Tensor) -> None:
        distance = in_domain_distance(compute_features(network, pictures), real)
        checks = compare_statistics(statistic_rows(pictures), real_rows)
        rows.append({"series": series, "name": name, **distance, "statistics": checks})
        shown = "  ".join(f"{each['value']:6.2f}{' ' if each['passes'] else '!'}" for each in checks.values())
        print(f"{series + ', ' + name:45}  {distance['frechet_distance']:8.3f}  {shown}", flush=True)

    measure("real", "held out", held_out)
    for series, (worsen, unit, amounts) in SERIES.items():
        for amount in amounts:
            worse = worsen(held_out.float() / 255, amount, torch.Generator().manual_seed(0))
            measure(series, unit.format(amount), worse.clamp(0, 1).mul(255).round().to(torch.uint8))
    for folder, pictures in drawn.items():
        measure("models", folder.name, pictures)

    result = {
        "reference": reference.describe(),
        "weights_sha256": weights,
        "versions": versions(),
        "commit": code_commit(),
        "hardware": hardware_name(),
        "floors": floors,
        "rows": rows,
    }
    args.output_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    limits = "  ".join(f"{name} {each['limit']:.2f}" for name, each in rows[0]["statistics"].items())
    print(f"floor {rows[0]['floor']:.3f} ± {rows[0]['floor_std']:.3f} at {rows[0]['num_pictures']} pictures; {limits}")
    return check_order(rows)


def check_order(rows: list[dict]) -> int:
    """Each series must be in order, with the real pictures at its better end."""
    wrong = 0
    real = rows[0]["frechet_distance"]
    for series in [*SERIES, "models"]:
        values = [row["frechet_distance"] for row in rows if row["series"] == series]
        values = [real, *(values[::-1] if series == "models" else values)]
        if values != sorted(values):
            print(f"{series}: not in order: {', '.join(f'{value:.3f}' for value in values)}")
            wrong += 1
    print("all series are in order" if not wrong else f"{wrong} series are not in order")
    return int(wrong > 0)


if __name__ == "__main__":
    main()
