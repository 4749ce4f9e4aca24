from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import tiny_unet
from diffusers import HeunDiscreteScheduler
from PIL import Image

from animeface_pipeline import AnimeFacePipeline
from animeface_pipeline.images import denoising_strips, image_grid
from animeface_pipeline.schedulers import original_scheduler


@pytest.fixture
def pipe() -> AnimeFacePipeline:
    """With a range as wide as an untrained network's output, so that no picture is clamped to black and white."""
    return AnimeFacePipeline(tiny_unet(), original_scheduler(), value_range=(-300, 300))


def grey(*levels: int) -> list[Image.Image]:
    return [Image.new("RGB", (4, 2), (level, level, level)) for level in levels]


@pytest.mark.parametrize(
    ("number", "columns", "size"),
    [(1, None, (4, 2)), (2, None, (8, 2)), (5, None, (12, 4)), (16, None, (16, 8)), (5, 5, (20, 2)), (3, 1, (4, 6))],
)
def test_the_grid_is_nearly_square_or_as_wide_as_one_says(
    number: int, columns: int | None, size: tuple[int, int]
) -> None:
    assert image_grid(grey(*[9] * number), columns).size == size


def test_the_grid_goes_row_by_row_and_ends_in_black() -> None:
    grid = np.asarray(image_grid(grey(10, 20, 30), columns=2))
    assert grid[::2, ::4, 0].tolist() == [[10, 20], [30, 0]]


@pytest.mark.parametrize(("number", "columns"), [(0, None), (3, 0), (3, -1)])
def test_a_grid_of_nothing_is_refused(number: int, columns: int | None) -> None:
    with pytest.raises(ValueError, match="a grid needs"):
        image_grid(grey(*[9] * number), columns)


@pytest.mark.parametrize(("steps", "stages"), [(60, 20), (47, 20), (7, 7)])
def test_strips_end_with_the_images_that_the_call_itself_gives(
    pipe: AnimeFacePipeline, steps: int, stages: int
) -> None:
    def call() -> dict:
        return {"batch_size": 2, "generator": torch.Generator().manual_seed(1), "num_inference_steps": steps}

    images, strips = denoising_strips(pipe, **call())
    assert [strip.size for strip in strips] == [(stages * 16, 16)] * 2
    for image, strip, expected in zip(images, strips, pipe(**call()).images):
        assert np.array_equal(np.asarray(image), np.asarray(expected))
        assert np.array_equal(np.asarray(strip)[:, -16:], np.asarray(expected))
        parts = np.split(np.asarray(strip), stages, axis=1)
        assert not any(np.array_equal(left, right) for left, right in pairwise(parts))


def test_stages_are_evenly_spaced_over_the_steps(pipe: AnimeFacePipeline) -> None:
    """Each step paints its number: the stages of 100 steps are the pictures after 5, 10, …, 100."""
    values = iter(range(1, 101))

    class Counting(type(pipe.scheduler)):
        def step(self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor, **kwargs: object) -> object:
            output = super().step(model_output, timestep, sample, **kwargs)
            output.prev_sample = torch.full_like(sample, next(values) / 255)
            return output

    pipe.scheduler = Counting.from_config(pipe.scheduler.config)
    pipe.register_to_config(value_range=(0.0, 1.0))
    _, (strip,) = denoising_strips(pipe, batch_size=1, num_inference_steps=100)
    assert np.asarray(strip)[0, ::16, 0].tolist() == list(range(5, 101, 5))


def test_a_solver_that_takes_two_evaluations_a_step_has_as_many_stages(pipe: AnimeFacePipeline) -> None:
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    images, strips = denoising_strips(pipe, num_stages=4, num_inference_steps=6, output_type="pt")
    assert images.shape == (1, 3, 16, 16)
    assert strips[0].size == (4 * 16, 16)


def test_no_stages_are_refused(pipe: AnimeFacePipeline) -> None:
    with pytest.raises(ValueError, match="num_stages=0"):
        denoising_strips(pipe, num_stages=0)
