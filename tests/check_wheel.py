"""What someone with only the wheel does from an empty folder: build the full-size pipeline, save, load on both routes.

Not a pytest file: it must run in an environment that holds the wheel and nothing of this tree.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

import animeface_pipeline
from animeface_pipeline import AnimeFacePipeline, AnimeFaceUNet2DModel
from animeface_pipeline.cli import resource
from animeface_pipeline.config import load_recipe
from animeface_pipeline.schedulers import original_scheduler

GENERIC = """
import sys, torch
sys.modules["animeface_pipeline"] = None
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("pipe", trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, variance_type="fixed_small")
torch.save(pipe(1, torch.Generator().manual_seed(0), 2, "pt").images, "generic.pt")
"""


def main() -> None:
    here = Path(__file__).resolve().parent.parent
    installed = Path(animeface_pipeline.__file__).resolve()
    assert not installed.is_relative_to(here), f"{installed} is the tree, not the wheel"
    assert load_recipe("original")["train_batch_size"] == 64
    assert resource("model_card.md").read_text(encoding="utf-8").startswith("---")
    assert resource("recipes/quickstart.yaml").is_file()

    faces = [sys.executable, "-m", "animeface_pipeline.generate", "--output_dir=faces", "--num_images=2"]
    subprocess.run([*faces, "--num_inference_steps=5"], check=True)
    assert len(list(Path("faces").glob("seed-*.png"))) == 2, "the embedded model does not draw"

    start = time.perf_counter()
    torch.manual_seed(0)
    pipe = AnimeFacePipeline(AnimeFaceUNet2DModel(), original_scheduler())
    parameters = sum(parameter.numel() for parameter in pipe.unet.parameters())
    assert parameters == 168_885_955, parameters
    pipe.save_pretrained("pipe")
    del pipe

    loaded = AnimeFacePipeline.from_pretrained("pipe")
    loaded.set_progress_bar_config(disable=True)
    loaded.scheduler = original_scheduler(variance_type="fixed_small")
    images = loaded(1, torch.Generator().manual_seed(0), 2, "pt").images
    subprocess.run([sys.executable, "-c", GENERIC], check=True)
    assert torch.equal(images, torch.load("generic.pt")), "the two routes differ"
    files = sorted(path.as_posix() for path in Path("pipe").rglob("*") if path.is_file())
    print(
        f"{animeface_pipeline.__version__} from {installed.parent.parent.name}: {parameters:,} parameters, both routes"
    )
    print(f"give the same picture after two steps; {time.perf_counter() - start:.0f} s, {os.cpu_count()} CPUs")
    print("\n".join(files))


if __name__ == "__main__":
    main()
