"""The README's quickstart, by its own commands: faces that the package draws, a small network, minutes on a CPU."""

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from animeface_pipeline import AnimeFacePipeline
from animeface_pipeline.dataset import to_pixels
from animeface_pipeline.draw_faces import BACKGROUNDS, HAIR, draw_face

ROOT = Path(__file__).resolve().parent.parent


def test_a_drawn_face_comes_from_its_seed_alone() -> None:
    assert draw_face(7).tobytes() == draw_face(7).tobytes() != draw_face(8).tobytes()
    assert draw_face(7).size == (64, 64) and draw_face(7, 32).size == (32, 32)
    pictures = np.stack([np.asarray(draw_face(seed, 16)) for seed in range(100)])
    assert len(np.unique(pictures.reshape(100, -1), axis=0)) == 100


def nearest(colors: np.ndarray, palette: list[str]) -> set[int]:
    """Which of the palette's colours the given ones (N, 3) are closest to."""
    known = np.array([ImageColor.getrgb(color) for color in palette])
    return set(np.abs(colors[:, None] - known[None]).sum(-1).argmin(1).tolist())


@pytest.mark.slow
def test_the_readmes_first_commands_end_in_recognisable_faces(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    draw = re.search(r"python -m animeface_pipeline.draw_faces .*", readme)[0]
    train = re.search(r"accelerate launch (train_accelerate.py --config quickstart .*)", readme)[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "train_accelerate.py")]
    subprocess.run([sys.executable, *shlex.split(draw)[1:]], cwd=tmp_path, check=True)
    start = time.perf_counter()
    subprocess.run([*launch, *shlex.split(train)[1:], "--cache_dir", "cache"], cwd=tmp_path, check=True)
    print(f"training and sampling took {time.perf_counter() - start:.0f} s")

    data = np.stack([np.frombuffer(to_pixels(file, 32), np.uint8) for file in (tmp_path / "faces").iterdir()])
    data = data.reshape(-1, 3, 32, 32)
    with Image.open(sorted((tmp_path / "quickstart" / "samples").iterdir())[-1]) as grid:
        assert grid.size == (128, 128)
        faces = np.asarray(grid).reshape(4, 32, 4, 32, 3).transpose(0, 2, 4, 1, 3).reshape(16, 3, 32, 32)
    assert len(nearest(faces[:, :, 4:6, 14:18].mean((2, 3)), HAIR)) >= 3
    assert len(nearest(faces[:, :, :2, :2].mean((2, 3)), BACKGROUNDS)) >= 3
    assert np.abs(faces.mean((0, 2, 3)) - data.mean((0, 2, 3))).max() / 255 < 0.05
    assert not {face.tobytes() for face in faces} & {picture.tobytes() for picture in data}

    pipe = AnimeFacePipeline.from_pretrained(tmp_path / "quickstart")
    assert pipe.unet.config.sample_size == 32 and pipe.value_range == (-1.0, 1.0)
