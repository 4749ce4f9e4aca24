"""Do the levers that make training faster change what it learns? The same run with and without them, in one plot.

    python -m animeface_pipeline.draw_faces --output_dir faces
    python benchmarks/loss_curves.py --train_data_dir faces --output_dir curves

Every run takes the same recipe, seed, pictures and noise. Other flags go to all of them (--max_train_steps, --config,
…). Shown is the mean loss of each quarter of the run, and its largest difference from the plain run's. Written are
loss_curves.json, loss_curves.png, and a folder for each run; the same command goes on where a stopped one was.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from hardware import machine
from matplotlib.figure import Figure

PLAIN = "float32, eager, contiguous"
LEVERS = {
    PLAIN: ["--mixed_precision=no", "--no-channels_last", "--torch_compile=none"],
    "channels last": ["--mixed_precision=no", "--channels_last", "--torch_compile=none"],
    "bf16": ["--mixed_precision=bf16", "--no-channels_last", "--torch_compile=none"],
    "bf16, channels last, compiled": ["--mixed_precision=bf16", "--channels_last", "--torch_compile=default"],
}
QUARTERS, LOGGING_STEPS = 4, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data_dir", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--config", default="quickstart", help="default: quickstart")
    args, of_training = parser.parse_known_args()

    curves = {name: train(name, args, of_training) for name in LEVERS}
    if min(len(losses) for _, losses in curves.values()) < QUARTERS:
        sys.exit(f"at least {QUARTERS * LOGGING_STEPS} updates, please")
    means = {
        name: [float(part.mean()) for part in np.array_split(losses, QUARTERS)] for name, (_, losses) in curves.items()
    }
    rows = {}
    for name, own in means.items():
        strays = max(abs(one / other - 1) for one, other in zip(own, means[PLAIN]))
        rows[name] = {"mean_loss_by_quarter": own, "largest_difference": strays}
    where = machine("animeface-pipeline", "torch", "diffusers", "accelerate")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    result = {"command": shlex.join(["python", *sys.argv]), "device": device, **where, "rows": rows}
    (args.output_dir / "loss_curves.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    plot(curves, args.output_dir / "loss_curves.png")
    print(f"`{result['command']}`\n\n| | mean loss by quarter | largest difference |\n| --- | --- | --- |")
    for name, row in rows.items():
        print(f"| {name} | {', '.join(f'{mean:.4f}' for mean in means[name])} | {row['largest_difference']:.2%} |")


def train(name: str, args: argparse.Namespace, of_training: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Updates and losses, as logged, of a run with these levers."""
    folder = args.output_dir / name.replace(", ", "-").replace(" ", "-")
    flags = [f"--config={args.config}", f"--train_data_dir={args.train_data_dir}", f"--output_dir={folder}"]
    flags += [f"--logging_steps={LOGGING_STEPS}", *of_training, *LEVERS[name]]
    written, command = folder.with_suffix(".txt"), shlex.join(flags)
    if written.is_file() and written.read_text(encoding="utf-8") != command:
        sys.exit(f"{written}: is of another command; choose another --output_dir")
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(command, encoding="utf-8")
    if not (folder / "model_index.json").is_file():
        trainer = Path(__file__).parent.parent / "train_accelerate.py"
        subprocess.run([sys.executable, trainer, *flags, "--resume_from_checkpoint=latest"], check=True)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return np.array([entry["step"] for entry in log]), np.array([entry["loss"] for entry in log])


def plot(curves: dict[str, tuple[np.ndarray, np.ndarray]], file: Path) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for (name, (steps, losses)), style in zip(curves.items(), ("-", "--", "-.", ":")):
        axes.plot(steps, losses, style, label=name, linewidth=1.2)
    axes.set(yscale="log", xlabel="update", ylabel=f"loss, mean of {LOGGING_STEPS} updates")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
