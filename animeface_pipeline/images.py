"""Pictures of pictures: grids, and strips that show how an image comes out of the noise.

```py
>>> from animeface_pipeline.images import denoising_strips, image_grid

>>> images, strips = denoising_strips(pipe, batch_size=4)
>>> image_grid(images).save("grid.png")
>>> image_grid(strips, columns=1).save("strips.png")
```
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils import make_image_grid
from PIL import Image

from .pipeline_animeface import AnimeFacePipeline


def image_grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    r"""
    Lay images of one size out row by row; places that stay free at the end are black.

    Args:
        images (`Sequence[PIL.Image.Image]`): At least one.
        columns (`int`, *optional*): How many stand in a row; by default as many as make the grid nearly square.

    Returns:
        `PIL.Image.Image`: the grid.

    Raises:
        `ValueError`: no image, or a number of columns below 1.

    Example:

    ```py
    >>> from animeface_pipeline.images import image_grid

    >>> image_grid(pipe(batch_size=16).images).size  # 4 × 4 images of 64 × 64 pixels
    (256, 256)
    ```
    """
    if not images or (columns is not None and columns < 1):
        raise ValueError(f"{len(images)} images in {columns} columns: a grid needs at least one of each")
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    blank = Image.new(images[0].mode, images[0].size)
    return make_image_grid([*images, *[blank] * (rows * columns - len(images))], rows=rows, cols=columns)


def denoising_strips(
    pipe: AnimeFacePipeline, num_stages: int = 20, **kwargs: Any
) -> tuple[list[Image.Image], list[Image.Image]]:
    r"""
    Draw faces as `pipe(**kwargs)` does, and keep a strip of the stages that each one went through.

    Args:
        pipe ([`AnimeFacePipeline`]): The pipeline, or one for another task.
        num_stages (`int`, *optional*, defaults to `20`):
            How many stages, evenly spaced over the denoising steps and ending with the finished image; with fewer
            steps than that, every step is one.
        kwargs (*optional*): Arguments of its `__call__`, e.g. `batch_size` and `generator`.

    Returns:
        `tuple`: the images, of the kind that `output_type` says, and one strip (`PIL.Image.Image`) for each, noise on
        the left.

    Raises:
        `ValueError`: as in [`AnimeFacePipeline.__call__`], or `num_stages` below 1.

    Example:

    ```py
    >>> import torch
    >>> from animeface_pipeline.images import denoising_strips

    >>> generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    >>> images, strips = denoising_strips(pipe, batch_size=2, generator=generators)
    >>> strips[0].size  # 20 stages of 64 × 64 pixels
    (1280, 64)
    ```
    """
    if num_stages < 1:
        raise ValueError(f"num_stages={num_stages!r}: must be at least 1")
    stages: list[list[Image.Image]] = []

    def keep_stage(pipe: AnimeFacePipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        if (step + 1) * num_stages // pipe.num_timesteps > step * num_stages // pipe.num_timesteps:
            stages.append(pipe.decode(tensors["sample"]))
        return {}

    (images,) = pipe(callback_on_step_end=keep_stage, return_dict=False, **kwargs)
    return images, [image_grid(strip, columns=len(strip)) for strip in zip(*stages)]
