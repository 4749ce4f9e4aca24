"""Running the trainer in tests: a tiny recipe, in this process or in one that can be killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState

from animeface_pipeline.draw_faces import draw_face

PROGRAM = Path(__file__).resolve().parent.parent / "train_accelerate.py"

TINY_RECIPE = {
    "resolution": 16,
    "value_range": [-1, 1],
    "unet": {
        "block_out_channels": [8, 16],
        "attention_levels": [False, True],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "dropout": 0.1,
    },
    "train_batch_size": 4,
    "num_epochs": 2,
    "learning_rate": 1e-3,
    "use_ema": True,
    "max_grad_norm": 1.0,
    "eval_batch_size": 4,
    "eval_scheduler": "ddim",
    "ddpm_num_inference_steps": 2,
    "save_images_epochs": 1,
    "logging_steps": 1,
    "checkpointing_steps": 2,
}


def make_faces(folder: Path, count: int = 10) -> Path:
    folder.mkdir(parents=True)
    for seed in range(count):
        draw_face(seed, 16).save(folder / f"{seed}.png")
    return folder


class Trainer:
    """`trainer(*flags)` runs train_accelerate.py on ten faces with the tiny recipe and returns its exit code."""

    def __init__(self, folder: Path, **recipe: object) -> None:
        self.folder, self.output = folder, folder / "out"
        self.faces = make_faces(folder / "faces")
        self.recipe = folder / "tiny.yaml"
        self.recipe.write_text(yaml.safe_dump({**TINY_RECIPE, **recipe}), encoding="utf-8")

    def argv(self, *flags: str) -> list[str]:
        base = {
            "--config": self.recipe,
            "--train_data_dir": self.faces,
            "--output_dir": self.output,
            "--cache_dir": self.folder / "cache",
        }
        if "--dataset_name" in flags:
            del base["--train_data_dir"]
        defaults = [str(part) for flag, value in base.items() if flag not in flags for part in (flag, value)]
        return [*defaults, *(str(flag) for flag in flags)]

    def __call__(self, *flags: object) -> int:
        sys.path.insert(0, str(PROGRAM.parent))
        import train_accelerate

        numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
        handlers = {number: signal.getsignal(number) for number in numbers}
        with pytest.raises(SystemExit) as ended:
            train_accelerate.main(self.argv(*map(str, flags)))
        for number, handler in handlers.items():
            signal.signal(number, handler)  # a run that breaks off leaves its own
        reset_accelerate()
        return ended.value.code

    def start(
        self,
        *flags: object,
        launcher: tuple[str, ...] = (sys.executable,),
        program: Path = PROGRAM,
        cwd: Path | None = None,
        **env: str,
    ) -> subprocess.Popen:
        """In a process of its own."""
        return subprocess.Popen(
            [*launcher, str(program), *self.argv(*map(str, flags))],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        )

    def log(self, output: Path | None = None) -> list[dict]:
        """The log without what may differ between two equal runs."""
        lines = ((output or self.output) / "log.jsonl").read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line) for line in lines]
        return [
            {k: v for k, v in entry.items() if k not in ("pictures_per_second", "memory_gib")} for entry in entries
        ]


def reset_accelerate() -> None:
    """Accelerate keeps its state in the class; a test must not inherit it from the last one."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
