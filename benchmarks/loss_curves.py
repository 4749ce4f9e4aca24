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
    PLAIN: ["--mixed_precision=no"],
    "channels last": ["--mixed_precision=no", "--channels_last"],
    "bf16": ["--mixed_precision=bf16"],
    "bf16, channels last, compiled": ["--mixed_precision=bf16", "--channels_last", "--torch_compile=default"],
}
QUARTERS, LOGGING_STEPS = 4, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data_dir", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--config", default="quickstart", help="default: quickstart")
    args, of_training = parser.parse_known_args()

    losses = {name: train(name, args, of_training) for name in LEVERS}
    means = {name: [float(part.mean()) for part in np.array_split(curve, QUARTERS)] for name, curve in losses.items()}
    rows = {}
    for name, own in means.items():
        strays = max(abs(one / other - 1) for one, other in zip(own, means[PLAIN]))
        rows[name] = {"mean_loss_by_quarter": own, "largest_difference": strays}
    where = machine("animeface-pipeline", "torch", "diffusers", "accelerate")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    result = {"command": shlex.join(["python", *sys.argv]), "device": device, **where, "rows": rows}
    (args.output_dir / "loss_curves.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    plot(losses, args.output_dir / "loss_curves.png")
    print(f"`{result['command']}`\n\n| | mean loss by quarter | largest difference |\n| --- | --- | --- |")
    for name, row in rows.items():
        print(f"| {name} | {', '.join(f'{mean:.4f}' for mean in means[name])} | {row['largest_difference']:.2%} |")


def train(name: str, args: argparse.Namespace, of_training: list[str]) -> np.ndarray:
    """The loss of every `LOGGING_STEPS` updates of a run with these levers."""
    folder = args.output_dir / name.replace(", ", "-").replace(" ", "-")
    if not (folder / "model_index.json").is_file():
        trainer = Path(__file__).parent.parent / "train_accelerate.py"
        flags = [f"--config={args.config}", f"--train_data_dir={args.train_data_dir}", f"--output_dir={folder}"]
        flags += [f"--logging_steps={LOGGING_STEPS}", *of_training, *LEVERS[name], "--resume_from_checkpoint=latest"]
        subprocess.run([sys.executable, trainer, *flags], check=True)
    log = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return np.array([json.loads(line)["loss"] for line in log])


def plot(losses: dict[str, np.ndarray], file: Path) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for (name, curve), style in zip(losses.items(), ("-", "--", "-.", ":")):
        axes.plot(LOGGING_STEPS * np.arange(1, len(curve) + 1), curve, style, label=name, linewidth=1.2)
    axes.set(yscale="log", xlabel="update", ylabel=f"loss, mean of {LOGGING_STEPS} updates")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
