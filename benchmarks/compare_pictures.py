"""How far apart are the pictures of two runs of `generate` from the same seeds? E.g. half precision against float32.

    flags="--scheduler ddpm --num_inference_steps 1000 --num_images 8"
    python -m animeface_pipeline.generate --output_dir full $flags --dtype float32
    python -m animeface_pipeline.generate --output_dir half $flags --dtype bfloat16
    python benchmarks/compare_pictures.py full half --output_file compared.png

Differences are in levels of 255. The picture shows the first folder's pictures over the second's.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs=2)
    parser.add_argument("--output_file", type=Path)
    args = parser.parse_args()

    names = sorted(set.intersection(*({file.name for file in folder.glob("seed-*.png")} for folder in args.folders)))
    if len(names) < 2:
        sys.exit(f"{len(names)} seeds are in both folders; it takes two")
    settings = [json.loads((folder / "generate.json").read_text(encoding="utf-8")) for folder in args.folders]
    if others := [key for key in ("scheduler", "num_inference_steps") if settings[0][key] != settings[1][key]]:
        sys.exit(f"the runs differ in {' and '.join(others)}")
    one, other = (np.stack([np.asarray(Image.open(folder / name)) for name in names]) for folder in args.folders)
    difference = np.abs(one.astype(float) - other).reshape(len(names), -1)
    # What two different faces differ by: each picture against the next one.
    unlike = np.abs(one.astype(float) - np.roll(one, 1, axis=0)).mean()
    print("| picture | mean difference | 99 of 100 values within | largest |\n| --- | --- | --- | --- |")
    for name, own in zip(names, difference):
        print(f"| {name} | {own.mean():.2f} | {np.quantile(own, 0.99):.0f} | {own.max():.0f} |")
    print(f"| all | {difference.mean():.2f} | {np.quantile(difference, 0.99):.0f} | {difference.max():.0f} |")
    print(f"\nTwo different pictures of the first folder: {unlike:.1f} on average.")
    if args.output_file:
        Image.fromarray(np.concatenate([np.concatenate(each, axis=1) for each in (one, other)])).save(args.output_file)


if __name__ == "__main__":
    main()
