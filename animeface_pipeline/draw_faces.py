"""Draw simple anime faces to try the trainer on: pictures that carry nobody's licence.

    python -m animeface_pipeline.draw_faces --output_dir faces --num_images 4000

Hair, eyes, mouth, skin and background vary by seed; picture k of a folder is `draw_face(seed + k)`.
"""

import os
import random
from pathlib import Path

from PIL import Image, ImageColor, ImageDraw
from tqdm import tqdm

from .cli import BadInput, OneLineParser, command

# CSS colours by hue, saturation and lightness.
HAIR = [
    "hsl(25,50%,25%)",
    "hsl(45,80%,65%)",
    "hsl(345,70%,70%)",
    "hsl(215,60%,50%)",
    "hsl(280,40%,50%)",
    "hsl(150,40%,40%)",
]
EYES = ["hsl(210,80%,45%)", "hsl(130,60%,35%)", "hsl(20,70%,35%)", "hsl(330,65%,50%)", "hsl(265,55%,50%)"]
BACKGROUNDS = [
    "hsl(200,70%,85%)",
    "hsl(50,90%,82%)",
    "hsl(330,70%,88%)",
    "hsl(110,40%,75%)",
    "hsl(0,0%,96%)",
    "hsl(235,30%,45%)",
]
SKINS = ["hsl(25,100%,90%)", "hsl(24,75%,83%)", "hsl(20,50%,66%)"]
MOUTHS = ["smile", "open", "line"]
LINE = "hsl(340,30%,20%)"


def draw_face(seed: int, size: int = 64) -> Image.Image:
    r"""
    Draw one face.

    Args:
        seed (`int`): Everything that varies comes from it.
        size (`int`, *optional*, defaults to `64`): Height and width in pixels, at least 16.

    Returns:
        `PIL.Image.Image`: an RGB picture of `size` × `size` pixels, drawn four times as large and scaled down.

    Example:

    ```py
    >>> from animeface_pipeline.draw_faces import draw_face

    >>> draw_face(seed=7).size
    (64, 64)
    ```
    """
    rng = random.Random(seed)
    hair, iris, mouth = rng.choice(HAIR), rng.choice(EYES), rng.choice(MOUTHS)
    skin, background = rng.choice(SKINS), rng.choice(BACKGROUNDS)
    x, y = 32 + rng.uniform(-3, 3), 34 + rng.uniform(-2, 2)  # the middle of the face; the picture is 64 wide and high
    length, fringe, eye_height = rng.uniform(8, 30), rng.uniform(6, 11), rng.uniform(5, 7)

    picture = Image.new("RGB", (4 * size, 4 * size), background)
    canvas, unit = ImageDraw.Draw(picture), 4 * size / 64

    def scaled(*points: float) -> list[float]:
        return [unit * point for point in points]

    def ellipse(cx: float, cy: float, rx: float, ry: float, fill: str) -> None:
        canvas.ellipse(scaled(cx - rx, cy - ry, cx + rx, cy + ry), fill=fill)

    # back hair, shoulders, face
    ellipse(x, y - 4, 24, 24, hair)
    canvas.rounded_rectangle(scaled(x - 24, y - 4, x + 24, y + length), radius=6 * unit, fill=hair)
    ellipse(x, y + 36, 22, 14, _darker(iris))
    canvas.polygon(scaled(x - 17, y - 4, x + 17, y - 4, x + 15, y + 10, x, y + 20, x - 15, y + 10), fill=skin)
    ellipse(x, y + 2, 17, 15, skin)

    # eyes: white, iris, pupil, light, lash; then blush
    for side in (-1, 1):
        ex, ey = x + 8.5 * side, y + 3
        ellipse(ex, ey, 5, eye_height, "white")
        ellipse(ex, ey + 0.5, 4, eye_height - 1, iris)
        ellipse(ex, ey + 1, 2, eye_height / 2 - 1, LINE)
        ellipse(ex - 1.5, ey - 2, 1.4, 1.6, "white")
        canvas.arc(scaled(ex - 6, ey - eye_height - 1, ex + 6, ey + 4), 200, 340, fill=LINE, width=round(1.5 * unit))
        ellipse(x + 13 * side, y + 10, 3, 1.5, "hsl(355,85%,80%)")

    # mouth
    if mouth == "open":
        ellipse(x, y + 14, 3, 2.5, "hsl(355,60%,50%)")
    elif mouth == "smile":
        canvas.arc(scaled(x - 5, y + 8, x + 5, y + 15), 30, 150, fill=LINE, width=round(1.2 * unit))
    else:
        canvas.line(scaled(x - 3, y + 14, x + 3, y + 14), fill=LINE, width=round(1.2 * unit))

    # fringe: three locks over the forehead, and one strand on each side
    for left, tip, right in ((-21, -15, -6), (-9, 1, 9), (6, 14, 21)):
        root, end = y - 14, y - 14 + fringe
        canvas.polygon(scaled(x + left, root, x + tip, end + 2, x + right, root), fill=hair)
    canvas.pieslice(scaled(x - 21, y - 27, x + 21, y + 3), 180, 360, fill=hair)
    for side in (-1, 1):
        canvas.polygon(scaled(x + 16 * side, y - 10, x + 22 * side, y - 6, x + 19 * side, y + 14), fill=hair)
    canvas.arc(scaled(x - 14, y - 24, x + 14, y - 4), 215, 300, fill=_lighter(hair), width=round(1.5 * unit))
    return picture.resize((size, size), Image.Resampling.LANCZOS)


def _blend(color: str, other: int, share: float) -> str:
    mixed = [round((1 - share) * part + share * other) for part in ImageColor.getrgb(color)[:3]]
    return f"rgb({mixed[0]},{mixed[1]},{mixed[2]})"


def _darker(color: str) -> str:
    return _blend(color, 0, 0.3)


def _lighter(color: str) -> str:
    return _blend(color, 255, 0.45)


@command
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--num_images", type=int, default=4000, help="how many to draw (default: 4000)")
    parser.add_argument("--resolution", type=int, default=64, help="height and width in pixels (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture (default: 0)")
    args = parser.parse_args(argv)
    for name, least in (("num_images", 1), ("resolution", 16), ("seed", 0)):
        if getattr(args, name) < least:
            raise BadInput(f"--{name} {getattr(args, name)}: must be at least {least}")
    if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
        raise BadInput(f"--output_dir {args.output_dir}: holds something already; choose a new or empty folder")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(args.num_images), desc="drawing", unit="face"):
        file = args.output_dir / f"{index:06d}.png"
        draw_face(args.seed + index, args.resolution).save(file.with_suffix(".part"), format="PNG")
        os.replace(file.with_suffix(".part"), file)
    print(f"{args.num_images} faces in {args.output_dir}")


if __name__ == "__main__":
    main()
