"""Pictures per second that a data loader delivers as shuffled, mirrored float batches at 64×64: ours beside the usual.

    python benchmarks/loader.py PICTURES --output_file loader.json

Each way delivers `--num_pictures` pictures, and all of them take turns, `--repeats` times in one run:

- dataloader: a PyTorch DataLoader with two workers that opens and decodes each file with Pillow, as the original does;
- set_transform: the same with `datasets` and a transform, as Diffusers' example does;
- indexing: plain indexing into a decoded tensor: no noise, no timesteps, no order to resume; what memory can give;
- cache: our `Batches`, from the memory-mapped cache of decoded pictures, without the noise that it makes as well;
- cache with noise: our `Batches` as training takes them, noise and timesteps included.

PICTURES is a folder; what is below it is cached in a temporary folder first, which is timed too.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from hardware import machine
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from animeface_pipeline.dataset import Batches, load_pictures

BATCH_SIZE, SIZE, WORKERS = 64, 64, 2


def to_float(picture: Image.Image) -> torch.Tensor:
    """(3, 64, 64) in [0, 1], mirrored by chance."""
    pixels = torch.from_numpy(np.array(picture.convert("RGB").resize((SIZE, SIZE)))).permute(2, 0, 1).float() / 255
    return pixels.flip(-1) if torch.rand(()) < 0.5 else pixels


class Files(Dataset):
    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, k: int) -> torch.Tensor:
        return to_float(Image.open(self.paths[k]))


def transformed(rows: dict) -> dict:
    return {"input": [to_float(picture) for picture in rows["image"]]}


def collate(rows: list[dict]) -> torch.Tensor:
    return torch.stack([row["input"] for row in rows])


def dataloader_batches(paths: list[Path]) -> Iterator[torch.Tensor]:
    yield from DataLoader(Files(paths), BATCH_SIZE, shuffle=True, num_workers=WORKERS)


def set_transform_batches(paths: list[Path]) -> Iterator[torch.Tensor]:
    rows = datasets.Dataset.from_dict({"image": [str(path) for path in paths]}).cast_column("image", datasets.Image())
    rows.set_transform(transformed)
    yield from DataLoader(rows, BATCH_SIZE, shuffle=True, num_workers=WORKERS, collate_fn=collate)


def indexing_batches(pictures: torch.Tensor, number: int) -> Iterator[torch.Tensor]:
    for rows in torch.randperm(len(pictures))[:number].split(BATCH_SIZE):
        flips = torch.rand(len(rows)) < 0.5
        clean = pictures[rows]
        yield torch.where(flips.view(-1, 1, 1, 1), clean.flip(-1), clean).float() / 255


def our_batches(pictures: torch.Tensor, number: int, noise: bool) -> Iterator[torch.Tensor]:
    batches = Batches(pictures, BATCH_SIZE, seed=0)
    for step in range(number // BATCH_SIZE):
        yield batches.of_step(step)[0].clean if noise else batches.clean_of_step(step, torch.rand(BATCH_SIZE) < 0.5)


def rate(batches: Iterator[torch.Tensor], number: int) -> float:
    """Pictures per second, from asking for the first batch to having the last."""
    begin, seen = time.perf_counter(), 0
    for batch in batches:
        seen += len(batch)
        if seen >= number:
            break
    return seen / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, metavar="PICTURES")
    parser.add_argument("--num_pictures", type=int, default=12_800)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output_file", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)

    paths = sorted(path for path in args.pictures.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    number = min(args.num_pictures, len(paths)) // BATCH_SIZE * BATCH_SIZE
    with tempfile.TemporaryDirectory() as cache:
        begin = time.perf_counter()
        mapped = load_pictures(str(args.pictures), resolution=SIZE, cache_dir=cache)
        filling = len(mapped) / (time.perf_counter() - begin)
        in_memory = mapped.clone()
        ways: dict[str, Callable[[], Iterator[torch.Tensor]]] = {
            "dataloader": lambda: dataloader_batches(paths[:number]),
            "set_transform": lambda: set_transform_batches(paths[:number]),
            "indexing": lambda: indexing_batches(in_memory, number),
            "cache": lambda: our_batches(mapped, number, noise=False),
            "cache with noise": lambda: our_batches(mapped, number, noise=True),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.repeats):
            for name, batches in ways.items():
                rates[name].append(rate(batches(), number))
    base = statistics.median(rates["dataloader"])
    result = {
        **machine("animeface-pipeline", "datasets", "numpy", "pillow", "torch"),
        "pictures": number,
        "filling_the_cache_per_second": round(filling),
        "pictures_per_second": {name: [round(value) for value in values] for name, values in rates.items()},
        "times_dataloader": {name: round(statistics.median(values) / base, 2) for name, values in rates.items()},
    }
    args.output_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{result['machine']['processor']}, {result['machine']['cores']} cores; decoding once: {filling:,.0f}/s")
    print("| way | pictures/s, median | least | most | times dataloader |\n| --- | --- | --- | --- | --- |")
    for name, values in rates.items():
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"| {name} | {middle:,.0f} | {low:,.0f} | {high:,.0f} | {middle / base:.1f} |")


if __name__ == "__main__":
    main()
