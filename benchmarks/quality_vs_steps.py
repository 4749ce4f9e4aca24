"""How good are the pictures by solver and number of steps? A table and a plot.

    python benchmarks/quality_vs_steps.py anime-faces --reference faces-64 --output_dir steps
    python benchmarks/quality_vs_steps.py anime-faces --reference faces-64 --output_dir steps \\
        --schedulers unipc ddim --num_inference_steps 5 10 20 --num_images 500 --few_images 500 --device cuda

Up to 50 steps 10,000 pictures are drawn, above 2,000. The in-domain Fréchet distance depends on how many there are, so
the plot and the first table hold the first 2,000 of every cell against each other; the second table is that of 10,000.
Each cell is an evaluation of `animeface_pipeline.evaluate`, whose other flags can be given too (--device, --dtype,
--batch_size, --cache_dir, …). The same command goes on where a stopped one was.

Written are steps.json, steps.md, steps.png, and for each cell its pictures and, under results/, its measures.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from animeface_pipeline import evaluate
from animeface_pipeline.cli import command
from animeface_pipeline.files import write_aside
from animeface_pipeline.generate import describe_run, load_pipeline
from animeface_pipeline.schedulers import SCHEDULERS

SOLVERS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "dpmsolver++2": "DPM-Solver++ 2",
    "dpmsolver++": "DPM-Solver++ 3",
    "unipc": "UniPC",
    "sde-dpmsolver++": "SDE-DPM-Solver++ 2",
}
MANY_UP_TO = 50  # steps


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a pipeline's folder, or its name on the Hub")
    parser.add_argument("--reference", required=True, help="what prepare_dataset wrote")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--schedulers", nargs="+", choices=SCHEDULERS, default=list(SOLVERS))
    parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[5, 8, 10, 20, 50, 100, 250, 1000])
    parser.add_argument("--num_images", type=int, default=10_000, help="up to 50 steps (default: 10000)")
    parser.add_argument("--few_images", type=int, default=2_000, help="above 50 steps (default: 2000)")
    args, of_evaluate = parser.parse_known_args()
    first = evaluate.parse_args(
        [args.model, f"--reference={args.reference}", f"--output_dir={args.output_dir}", *of_evaluate]
    )
    pipe = load_pipeline(first)
    args.same = what_cells_share(
        describe_run(pipe, first), evaluate.load_reference(first, pipe.unet.config.sample_size).describe()
    )

    (args.output_dir / "results").mkdir(parents=True, exist_ok=True)
    cells: dict[int, dict[str, dict[int, Any]]] = {}
    for steps in sorted(args.num_inference_steps):
        for scheduler in args.schedulers:
            numbers = {args.few_images, args.num_images if steps <= MANY_UP_TO else args.few_images}
            for number in sorted(numbers):
                result = measure(args, scheduler, steps, number, of_evaluate)
                cells.setdefault(number, {}).setdefault(scheduler, {})[steps] = result
        write(args, cells)  # after every row, so that there is something to look at
    print((args.output_dir / "steps.md").read_text(encoding="utf-8"))


def what_cells_share(model: dict[str, Any], reference: dict[str, Any]) -> list[Any]:
    return [
        model["weights_sha256"],
        model["value_range"],
        model["scheduler_config"]["prediction_type"],
        reference["sha256"],
    ]


def measure(args: argparse.Namespace, scheduler: str, steps: int, number: int, of_evaluate: list[str]) -> Any:
    """Draw and measure one cell, or read what a former run measured by the same command."""
    name = f"{scheduler}-{steps}"
    kept = args.output_dir / "results" / f"{name}-{number}.json"
    flags = [args.model, f"--reference={args.reference}", f"--output_dir={args.output_dir / name}"]
    flags += [f"--scheduler={scheduler}", f"--num_inference_steps={steps}", f"--num_images={number}", *of_evaluate]
    if kept.is_file():
        result = json.loads(kept.read_text(encoding="utf-8"))
        shared = what_cells_share(result["model"], result["reference"])
        if result["command"].endswith(shlex.join(flags)) and shared == args.same:
            return result
    print(f"{name}, {number:,} pictures", flush=True)
    try:
        evaluate.main(flags)
    except SystemExit as done:
        if done.code:
            raise
    text = (args.output_dir / name / evaluate.RESULT_FILE).read_text(encoding="utf-8")
    write_aside(kept, text.encode())
    return json.loads(text)


def write(args: argparse.Namespace, cells: dict[int, dict[str, dict[int, Any]]]) -> None:
    """All results as JSON, as Markdown tables and as a plot."""
    line = shlex.join(["python", *sys.argv])
    tables = [markdown(number, by_solver) for number, by_solver in sorted(cells.items())]
    text = "\n\n".join([*tables, f"```\n{line}\n```"])
    write_aside(args.output_dir / "steps.md", f"{text}\n".encode())
    result = json.dumps({"command": line, "cells": cells}, indent=2)
    write_aside(args.output_dir / "steps.json", f"{result}\n".encode())
    plot(*min(cells.items()), args.output_dir / "steps.png")


def distance(result: Any) -> float:
    return result["in_domain"]["frechet_distance"]


def floor_of(by_solver: dict[str, dict[int, Any]]) -> tuple[float, float]:
    """Mean and deviation, the same in every cell: they depend on the real pictures and on how many there are."""
    own = next(iter(next(iter(by_solver.values())).values()))["in_domain"]
    return own["floor"], own["floor_std"]


def markdown(number: int, by_solver: dict[str, dict[int, Any]]) -> str:
    steps = sorted({each for cells in by_solver.values() for each in cells})
    header = f"| in-domain Fréchet distance, {number:,} pictures | {' | '.join(map(str, steps))} |"
    rows = [
        f"| {SOLVERS.get(scheduler, scheduler)} | "
        + " | ".join(f"{distance(cells[each]):.3f}" if each in cells else "" for each in steps)
        + " |"
        for scheduler, cells in by_solver.items()
    ]
    floor, deviation = floor_of(by_solver)
    real = f"Real pictures get {floor:.3f} ± {deviation:.3f}."
    return "\n".join([header, f"|{' --- |' * (len(steps) + 1)}", *rows, "", real])


def plot(number: int, by_solver: dict[str, dict[int, Any]], file: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for scheduler, cells in by_solver.items():
        steps = sorted(cells)
        values = [distance(cells[each]) for each in steps]
        axes.plot(steps, values, marker="o", markersize=4, label=SOLVERS.get(scheduler, scheduler))
    axes.axhline(floor_of(by_solver)[0], color="grey", linestyle="--", label="real pictures")
    ticks = sorted({each for cells in by_solver.values() for each in cells})
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel=f"in-domain Fréchet distance, {number:,} pictures")
    axes.set_xticks(ticks, [str(each) for each in ticks])
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
