"""The README's pictures, drawn by the model that comes with the package.

python docs/pictures.py
"""

from pathlib import Path

import torch
from PIL import Image

from animeface_pipeline import EMBEDDED_MODEL, AnimeFaceImg2ImgPipeline, AnimeFaceInpaintPipeline, AnimeFacePipeline
from animeface_pipeline.draw_faces import draw_face
from animeface_pipeline.images import denoising_strips, image_grid
from animeface_pipeline.interpolate import draw_from_noise, interpolate, invert, noise_of_seeds
from animeface_pipeline.schedulers import switch_scheduler

HERE = Path(__file__).parent
ONE, OTHER, THIRD = 43, 3, 21  # seeds
EYES, HAIR = (8, 26, 56, 46), (0, 0, 64, 26)  # left, upper, right, lower
STRENGTHS = [0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6]
COLUMNS = 10


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def save(name: str, *rows: list[Image.Image]) -> None:
    image_grid([image for row in rows for image in row], columns=len(rows[0])).save(HERE / f"{name}.png")


def main() -> None:
    pipe = AnimeFacePipeline.from_pretrained(EMBEDDED_MODEL)
    pipe.scheduler = switch_scheduler(pipe.scheduler, "unipc")

    faces, strips = denoising_strips(pipe, COLUMNS, batch_size=2, generator=seeds(ONE, OTHER), num_inference_steps=30)
    save("strip", *([strip] for strip in strips))

    ends = noise_of_seeds(pipe, [ONE, OTHER])
    found = torch.cat([invert(pipe, faces[1]), noise_of_seeds(pipe, [THIRD])])
    save("mix", *(draw_from_noise(pipe, interpolate(noise, COLUMNS)) for noise in (ends, found)))

    edit = AnimeFaceImg2ImgPipeline(**pipe.components)
    save("edit", *(edited(edit, face) for face in (draw_face(3), faces[0])))

    pipe.scheduler = switch_scheduler(pipe.scheduler, "ddpm", 50)
    repaint = AnimeFaceInpaintPipeline(**pipe.components)
    save("repaint", *(repainted(repaint, face, box) for face, box in zip(faces, (EYES, HAIR))))


def edited(edit: AnimeFaceImg2ImgPipeline, face: Image.Image) -> list[Image.Image]:
    """The face, and what it becomes as the strength grows, from the same seed."""
    return [face, *(edit(face, strength, 30, seeds(THIRD)[0]).images[0] for strength in STRENGTHS)]


def repainted(
    repaint: AnimeFaceInpaintPipeline, face: Image.Image, box: tuple[int, int, int, int]
) -> list[Image.Image]:
    """The face, the face with its mask, and the masked part drawn from eight seeds."""
    mask, shown = Image.new("L", face.size), face.copy()
    mask.paste(255, box)
    shown.paste("grey", box)
    numbers = range(COLUMNS - 2)
    drawn = repaint(
        [face] * len(numbers),
        [mask] * len(numbers),
        num_inference_steps=50,
        jump_length=5,
        jump_n_sample=4,
        generator=seeds(*numbers),
    )
    return [face, shown, *drawn.images]


if __name__ == "__main__":
    main()
