"""Time and memory of `prepare_dataset` for 10,000, 30,000 and 100,000 files: is the memory flat?

    python benchmarks/prepare_dataset.py PICTURES --output_file prepare_dataset.json

Each file is the mean of two different pictures below PICTURES: no two are copies, so the search for near-duplicates
has as many to compare as there can be. Memory is the resident size of the command and its workers added up, sampled
ten times a second; what they share is counted once for each of them.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from hardware import machine
from PIL import Image
from tqdm import tqdm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, metavar="PICTURES", help="a folder, read with all below it")
    parser.add_argument("--num_files", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--num_proc", type=int, default=os.cpu_count())
    parser.add_argument("--output_file", type=Path, required=True)
    args = parser.parse_args()

    pictures = sorted(path for path in args.pictures.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for number in sorted(args.num_files):
            make_files(pictures, number, Path(folder, "source"))
            runs.append({"files": number, **measure(Path(folder, "source"), Path(folder, f"{number}"), args.num_proc)})
            print(runs[-1])
    first, last = runs[0], runs[-1]
    result = {
        **machine("animeface-pipeline", "imagehash", "numpy", "pillow", "scipy"),
        "num_proc": args.num_proc,
        "runs": runs,
        "memory_last_to_first": round(last["peak_memory_mb"] / first["peak_memory_mb"], 3),
        "files_per_second_last_to_first": round(last["files_per_second"] / first["files_per_second"], 3),
    }
    args.output_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def make_files(pictures: list[Path], number: int, folder: Path) -> None:
    """Fill the folder up to so many files; the k-th is always the same."""
    folder.mkdir(exist_ok=True)
    for k in tqdm(range(len(os.listdir(folder)), number), desc="making files"):
        one, other = (
            Image.open(path).convert("RGB").resize((64, 64)) for path in random.Random(k).sample(pictures, 2)
        )
        Image.blend(one, other, 0.5).save(folder / f"{k}.jpg", quality=95)


def measure(source: Path, output: Path, num_proc: int) -> dict[str, float | int]:
    command = [sys.executable, "-m", "animeface_pipeline.prepare_dataset", source, "--output_dir", output]
    begin, earlier = time.perf_counter(), os.times()
    process = psutil.Popen([*map(str, command), "--num_proc", str(num_proc)], stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident_size(process))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: exit code {process.returncode}")
    seconds, now = time.perf_counter() - begin, os.times()
    cpu_seconds = now.children_user + now.children_system - earlier.children_user - earlier.children_system
    report = json.loads((output / "report" / "report.json").read_text(encoding="utf-8"))
    return {
        "kept": sum(report["splits"].values()),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),  # of all processes; tells whether the machine was busy with others
        "files_per_second": round(report["files"]["number"] / seconds, 1),
        "peak_memory_mb": round(peak / 1e6, 1),
    }


def resident_size(process: psutil.Process) -> int:
    total = 0
    try:
        for each in [process, *process.children(recursive=True)]:
            total += each.memory_info().rss
    except psutil.NoSuchProcess:  # it ended meanwhile
        pass
    return total


if __name__ == "__main__":
    main()
