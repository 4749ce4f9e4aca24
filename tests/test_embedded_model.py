"""The small model that comes with the package: its size, its card, and that it draws without being told more."""

from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from animeface_pipeline import EMBEDDED_MODEL, AnimeFacePipeline, generate, interpolate

MAX_PARAMETERS, MAX_BYTES = 8_000_000, 16_000_000


def test_it_is_small_and_in_half_precision() -> None:
    pipe = AnimeFacePipeline.from_pretrained(EMBEDDED_MODEL)
    assert pipe.unet.num_parameters() <= MAX_PARAMETERS
    assert pipe.unet.config.sample_size == 64 and pipe.value_range == (-1.0, 1.0)
    files = [path for path in EMBEDDED_MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    weights = (EMBEDDED_MODEL / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert weights < 2.01 * pipe.unet.num_parameters() + 100_000
    assert {path.suffix for path in files} == {".md", ".json", ".png", ".safetensors"}


def test_its_card_says_that_the_pictures_carry_no_licence() -> None:
    card = ModelCard.load(EMBEDDED_MODEL / "README.md")
    assert card.data.license == "other"
    assert "Anime Face Dataset" in card.text and "no licence" in card.text
    assert (EMBEDDED_MODEL / "assets" / "samples.png").is_file()


def test_generate_draws_with_it_when_no_model_is_given(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as done:
        generate.main(["--output_dir", str(tmp_path / "faces"), "--num_images=8", "--num_inference_steps=10"])
    assert not done.value.code
    files = sorted((tmp_path / "faces").glob("seed-*.png"))
    assert Image.open(files[0]).text["model"] == "embedded_model"
    pictures = np.stack([np.asarray(Image.open(file), dtype=np.float64) for file in files])
    assert pictures.shape == (8, 64, 64, 3)
    # Faces, not noise: neighbouring pixels are alike. Different ones, in colours that use the range.
    across = np.corrcoef(pictures[:, :, 1:].ravel(), pictures[:, :, :-1].ravel())[0, 1]
    assert across > 0.8
    assert 90 < pictures.mean() < 220 and pictures.std() > 40
    assert pictures.mean(axis=(1, 2)).std(axis=0).min() > 8


def test_the_same_seed_is_the_same_face_in_a_notebook(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        generate.main(["--output_dir", str(tmp_path), "--num_images=1", "--seed=3", "--num_inference_steps=5"])
    pipe = AnimeFacePipeline.from_pretrained(EMBEDDED_MODEL)
    picture = pipe(generator=[torch.Generator().manual_seed(3)], num_inference_steps=5).images[0]
    difference = np.asarray(picture, dtype=int) - np.asarray(Image.open(tmp_path / "seed-000003.png"), dtype=int)
    assert abs(difference).max() <= 1


def test_interpolate_walks_with_it_too(tmp_path: Path) -> None:
    flags = ["--seeds", "1", "2", "--output_dir", str(tmp_path / "walk"), "--num_frames=3", "--num_inference_steps=4"]
    with pytest.raises(SystemExit) as done:
        interpolate.main(flags)
    assert not done.value.code and len(list((tmp_path / "walk").glob("frame-*.png"))) == 3
