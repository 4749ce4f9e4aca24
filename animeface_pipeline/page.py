"""The page of `python -m animeface_pipeline.app`: its controls, and what happens when they are used."""

import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image, ImageChops

from . import __version__
from .files import write_aside
from .generate import save_png
from .images import image_grid
from .img2img_animeface import AnimeFaceImg2ImgPipeline
from .inpaint_animeface import AnimeFaceInpaintPipeline
from .interpolate import animation, interpolate, invert
from .page_text import AREAS, TEXTS, message
from .picture_rules import MAX_PIXELS, SetAside, read_picture, square
from .pipeline_animeface import AnimeFacePipeline
from .schedulers import SCHEDULERS, switch_scheduler

MAX_COUNT, MAX_FRAMES, MAX_STEPS, MAX_SEED = 8, 16, 100, 2**32 - 1
MAX_STAGES = 20  # pictures of the way from noise to face that are shown and kept
CANVAS = 448  # pixels of the square that is painted on
KEPT_FOR = 3600  # seconds that files are there for downloading
QUEUE = 64  # requests that may wait

CSS = """
.pixels img, .pixels canvas { image-rendering: pixelated; }
.pixels .image-frame img { width: 100%; height: 100%; object-fit: contain; }
#faces .grid-wrap { height: auto; min-height: 0; max-height: none; overflow: hidden; }
#faces .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; height: auto; }
#faces .grid-container { grid-template-rows: auto !important; grid-auto-rows: auto !important; }
#faces .grid-container button { aspect-ratio: 1; height: auto; }
"""
LAUNCH: dict[str, Any] = {
    "css": CSS,
    # fonts of the system: the page asks no other server for anything
    "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    "i18n": gr.I18n(**TEXTS),
    "max_file_size": "10mb",
    "ssr_mode": False,
    "show_error": False,  # only what is meant for the person: gr.Error
    "footer_links": ["settings"],
}


class Refused(Exception):
    """What cannot be done: a key of the page's messages, and what they leave open."""

    def __init__(self, key: str, **values: object) -> None:
        super().__init__(key)
        self.key, self.values = key, values


@dataclass
class Drawn:
    """What was drawn last: the stages that can be looked through, and the files that can be downloaded."""

    stages: list[Image.Image]
    faces: list[Path]
    strip: Path
    film: Path
    picked: int = 0


# ---- the tasks ----


class Tasks:
    """What can be done with a pipeline; each task yields pictures while it runs, and at last a `Drawn`."""

    def __init__(self, pipe: AnimeFacePipeline, model: str, folder: Path) -> None:
        self.pipe, self.model, self.folder = pipe, model, folder / "drawn"
        self.size = pipe.unet.config.sample_size

    def draw(self, seed: int, solver: str, steps: int, count: int) -> Iterator[Image.Image | Drawn]:
        pipe, seeds = self._pipe(AnimeFacePipeline, solver, steps), range(seed, seed + count)
        call = partial(pipe, count, _generators(seeds), steps)
        yield from self._denoise(pipe, call, seeds, task="draw", scheduler=solver, num_inference_steps=steps)

    def edit(
        self, picture: Image.Image, strength: float, seed: int, solver: str, steps: int, count: int
    ) -> Iterator[Image.Image | Drawn]:
        pipe, seeds = self._pipe(AnimeFaceImg2ImgPipeline, solver, steps), range(seed, seed + count)
        call = partial(pipe, [picture] * count, strength, steps, _generators(seeds))
        settings = {"scheduler": solver, "num_inference_steps": steps, "strength": strength}
        yield from self._denoise(pipe, call, seeds, task="edit", **settings)

    def redo(
        self, picture: Image.Image, mask: Image.Image, passes: int, seed: int, solver: str, steps: int, count: int
    ) -> Iterator[Image.Image | Drawn]:
        pipe, seeds = self._pipe(AnimeFaceInpaintPipeline, solver, steps), range(seed, seed + count)
        jumps = {"jump_length": max(1, steps // 5), "jump_n_sample": passes}
        call = partial(pipe, [picture] * count, mask, steps, **jumps, generator=_generators(seeds))
        yield from self._denoise(pipe, call, seeds, task="redo", scheduler=solver, num_inference_steps=steps, **jumps)

    def mix(self, start: Image.Image, end: Image.Image, num_frames: int, steps: int) -> Iterator[Image.Image | Drawn]:
        pipe = self._pipe(AnimeFacePipeline, "ddim", steps)

        def call(callback_on_step_end: Any, **_: Any) -> tuple[np.ndarray]:
            noise = interpolate(invert(pipe, [start, end], steps), num_frames)
            pipe.scheduler.set_timesteps(steps)
            return (pipe.decode(pipe.denoise(noise, pipe.scheduler.timesteps, None, callback_on_step_end), "np"),)

        for seen in _watch(pipe, call):
            if isinstance(seen, list):
                yield image_grid(seen)
            else:
                frames = seen
        strip = image_grid(frames, columns=len(frames))
        settings = {"task": "mix", "scheduler": "ddim", "num_inference_steps": steps, "num_frames": num_frames}
        names = [f"mix-{number:02}" for number in range(num_frames)]
        yield self._save(frames, names, frames, strip, settings)

    def _pipe(self, task: type[AnimeFacePipeline], solver: str, steps: int) -> Any:
        """Shares the network; the scheduler, which counts its steps, is this request's own."""
        pipe = task.from_pipe(self.pipe, scheduler=switch_scheduler(self.pipe.scheduler, solver, steps))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _denoise(
        self, pipe: AnimeFacePipeline, call: Callable[..., tuple], seeds: range, **settings: Any
    ) -> Iterator[Image.Image | Drawn]:
        stages: list[list[Image.Image]] = []
        for seen in _watch(pipe, call):
            if isinstance(seen, list):
                stages.append(seen)
                yield image_grid(seen)
            else:
                stages[-1] = faces = seen  # the last stage as it was returned: with the pixels that were kept
        strip = image_grid([stage[face] for face in range(len(seeds)) for stage in stages], columns=len(stages))
        names = [f"{settings['task']}-{seed}" for seed in seeds]
        yield self._save(faces, names, [image_grid(stage) for stage in stages], strip, settings, list(seeds))

    def _save(
        self,
        faces: list[Image.Image],
        names: list[str],
        stages: list[Image.Image],
        strip: Image.Image,
        settings: dict[str, Any],
        seeds: list[int] | None = None,
    ) -> Drawn:
        """Write what can be downloaded, and forget what was written long ago."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.iterdir():
            if time.time() - old.stat().st_mtime > KEPT_FOR:
                shutil.rmtree(old, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        settings = {"animeface_pipeline": __version__, "model": self.model, **settings}
        files = [folder / f"{name}.png" for name in names]
        for place, (face, file) in enumerate(zip(faces, files)):
            save_png(face, file, {**settings, "seed": seeds[place]} if seeds else {**settings, "frame": place})
        save_png(strip, folder / "strip.png", {**settings, **({"seeds": seeds} if seeds else {})})
        write_aside(folder / "animation.webp", animation(stages))
        return Drawn(stages, files, folder / "strip.png", folder / "animation.webp")


def _generators(seeds: range) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _watch(pipe: AnimeFacePipeline, call: Callable[..., tuple]) -> Iterator[Any]:
    """Run `call` in a thread: the pictures of at most `MAX_STAGES` stages as lists, at last those that it returns as a
    tuple. Whoever stops asking stops it at the next step."""
    seen: queue.Queue[list[Image.Image] | None] = queue.Queue()
    abandoned = threading.Event()

    def on_step_end(pipe: AnimeFacePipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        if abandoned.is_set():
            raise InterruptedError("nobody waits for it any more")
        if (step + 1) * MAX_STAGES // pipe.num_timesteps > step * MAX_STAGES // pipe.num_timesteps:
            seen.put(pipe.decode(tensors["sample"]))
        return {}

    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(call, output_type="np", return_dict=False, callback_on_step_end=on_step_end)
        result.add_done_callback(lambda _: seen.put(None))
        try:
            while (stage := seen.get()) is not None:
                yield stage
        finally:
            abandoned.set()
    (images,) = result.result()
    if not np.isfinite(images).all():
        raise Refused("not-finite")
    yield tuple(pipe.numpy_to_pil(images))


# ---- what goes in ----


def read_upload(path: str, size: int) -> Image.Image:
    """An uploaded file as a picture of the network's size; nothing but its header is read of what is too large."""
    try:
        return square(read_picture(Path(path), first_frame=True), size)
    except SetAside as error:
        raise Refused(error.rule, pixels=f"{MAX_PIXELS:,}") from None


def canvas_of(picture: Image.Image | None) -> dict[str, Any] | None:
    """The picture, large enough to paint on, with nothing painted."""
    if picture is None:
        return None
    return {"background": picture.resize((CANVAS, CANVAS), Image.Resampling.NEAREST), "layers": [], "composite": None}


def mask_of(painted: dict[str, Any] | None, area: str, size: int) -> Image.Image:
    """White where the picture is to be drawn anew: an area by name, or what was painted in any layer."""
    mask = Image.new("L", (size, size))
    box = AREAS[area]
    if box is not None:
        left, top, right, bottom = (round(share * size) for share in box)
        mask.paste(255, (left, top, right, bottom))
        return mask
    for layer in (painted or {}).get("layers", []):
        alpha = layer.convert("RGBA").getchannel("A").resize((size, size), Image.Resampling.BOX)
        mask = ImageChops.lighter(mask, alpha.point(lambda value: 255 * (value >= 64)))
    if not mask.getbbox():
        raise Refused("nothing-painted")
    return mask


# ---- the page ----


def build_page(pipe: AnimeFacePipeline, model: str, folder: Path) -> gr.Blocks:
    """The page for one pipeline; what it writes goes into `folder`."""
    tasks, text = Tasks(pipe, model, folder), LAUNCH["i18n"]
    solvers = list(SCHEDULERS)

    with gr.Blocks(
        title=f"{model} – animeface", analytics_enabled=False, fill_width=True, delete_cache=(600, KEPT_FOR)
    ) as page:
        drawn = gr.State(None, time_to_live=KEPT_FOR)
        start, end, redone, edited = (gr.State(None, time_to_live=KEPT_FOR) for _ in range(4))
        gr.Markdown(f"# {model}")
        gr.Markdown(text("intro"))
        with gr.Row():
            with gr.Column(min_width=300):
                with gr.Group():
                    with gr.Row(equal_height=True):
                        seed = gr.Number(
                            0, label=text("seed"), precision=0, minimum=0, maximum=MAX_SEED, min_width=120
                        )
                        dice = gr.Button(text("dice"), min_width=120)
                    with gr.Row():
                        solver = gr.Dropdown(solvers, value="sde-dpmsolver++", label=text("solver"), min_width=200)
                        steps = gr.Slider(1, MAX_STEPS, 20, step=1, precision=0, label=text("steps"), min_width=200)
                    count = gr.Slider(
                        1, MAX_COUNT, 4, step=1, precision=0, label=text("count"), info=text("count_info")
                    )
                with gr.Tabs(elem_id="tasks") as tabs:
                    with gr.Tab(text("draw"), id="draw"):
                        draw = gr.Button(text("draw"), variant="primary")
                    with gr.Tab(text("mix"), id="mix"):
                        gr.Markdown(text("mix_help"))
                        with gr.Row():
                            with gr.Column(min_width=130):
                                start_shown = picture_view(text("face_a"))
                                start_upload = upload_button(text("upload"))
                            with gr.Column(min_width=130):
                                end_shown = picture_view(text("face_b"))
                                end_upload = upload_button(text("upload"))
                        frames = gr.Slider(3, MAX_FRAMES, 8, step=1, precision=0, label=text("frames"))
                        mix = gr.Button(text("mix"), variant="primary")
                    with gr.Tab(text("redo"), id="redo"):
                        gr.Markdown(text("redo_help"))
                        redo_upload = upload_button(text("upload"))
                        canvas = gr.ImageEditor(
                            label=text("canvas"),
                            type="pil",
                            image_mode="RGBA",
                            format="png",
                            sources=(),
                            transforms=(),
                            layers=False,
                            brush=gr.Brush(
                                default_size=40, colors=["#ff2d95"], default_color="#ff2d95", color_mode="fixed"
                            ),
                            canvas_size=(CANVAS, CANVAS),
                            fixed_canvas=True,
                            buttons=[],
                            elem_id="canvas",
                            elem_classes="pixels",
                        )
                        area = gr.Dropdown(list(AREAS), value=next(iter(AREAS)), label=text("area"))
                        passes = gr.Slider(
                            1, 10, 4, step=1, precision=0, label=text("passes"), info=text("passes_info")
                        )
                        redo = gr.Button(text("redo"), variant="primary")
                    with gr.Tab(text("edit"), id="edit"):
                        gr.Markdown(text("edit_help"))
                        edit_shown = picture_view(text("edited"))
                        edit_upload = upload_button(text("upload"))
                        strength = gr.Slider(
                            0.05, 1, 0.5, step=0.05, label=text("strength"), info=text("strength_info")
                        )
                        edit = gr.Button(text("edit"), variant="primary")
            with gr.Column(min_width=300):
                gr.Markdown(text("stages"))
                stage_image = gr.Image(
                    label=text("stages"),
                    show_label=False,
                    interactive=False,
                    format="png",
                    height=320,
                    buttons=["fullscreen"],
                    elem_classes="pixels",
                )
                stage = gr.Slider(
                    1, 2, 1, step=1, precision=0, label=text("stage"), info=text("stage_info"), interactive=False
                )
                gr.Markdown(text("faces"))
                gallery = gr.Gallery(
                    label=text("faces"),
                    show_label=False,
                    columns=4,
                    height="auto",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    object_fit="contain",
                    elem_id="faces",
                    elem_classes="pixels",
                )
                with gr.Row():
                    save_face = download_button(text("save_face"))
                    save_strip = download_button(text("save_strip"))
                    save_film = download_button(text("save_film"))
                with gr.Row():
                    to_start, to_end, to_redo, to_edit = (
                        gr.Button(text(key), size="sm", min_width=100)
                        for key in ("to_a", "to_b", "to_redo", "to_edit")
                    )
        gr.Markdown(text("credits"))

        # 1. tasks: one at a time, the others wait
        result = [stage_image, stage, gallery, drawn, save_face, save_strip, save_film]
        run: dict[str, Any] = {
            "outputs": result,
            "concurrency_id": "network",
            "concurrency_limit": 1,
            "show_progress": "minimal",
            "show_progress_on": stage_image,
        }

        def on_draw(seed: int, solver: str, steps: int, count: int, request: gr.Request) -> Iterator[tuple]:
            yield from show(request, lambda: tasks.draw(check_seed(seed), solver, steps, count))

        def on_mix(start: Any, end: Any, frames: int, steps: int, request: gr.Request) -> Iterator[tuple]:
            yield from show(
                request, lambda: tasks.mix(need(start, "two-faces"), need(end, "two-faces"), frames, steps)
            )

        def on_redo(
            picture: Any,
            painted: Any,
            area: str,
            passes: int,
            seed: int,
            solver: str,
            steps: int,
            count: int,
            request: gr.Request,
        ) -> Iterator[tuple]:
            def begin() -> Iterator[Any]:
                given = need(picture, "no-picture"), mask_of(painted, area, tasks.size)
                return tasks.redo(*given, passes, check_seed(seed), solver, steps, count)

            yield from show(request, begin)

        def on_edit(
            picture: Any, strength: float, seed: int, solver: str, steps: int, count: int, request: gr.Request
        ) -> Iterator[tuple]:
            yield from show(
                request,
                lambda: tasks.edit(need(picture, "no-picture"), strength, check_seed(seed), solver, steps, count),
            )

        settings = [seed, solver, steps, count]
        draw.click(on_draw, settings, api_name="draw", **run)
        seed.submit(on_draw, settings, api_visibility="private", **run)
        mix.click(on_mix, [start, end, frames, steps], api_name="mix", **run)
        redo.click(on_redo, [redone, canvas, area, passes, *settings], api_name="redo", **run)
        edit.click(on_edit, [edited, strength, *settings], api_name="edit", **run)
        dice.click(None, None, seed, js=f"() => Math.floor(Math.random() * {MAX_SEED})")

        # 2. looking at the result, and picking a face: whatever is running, answered at once
        at_once: dict[str, Any] = {
            "concurrency_limit": None,
            "show_progress": "hidden",
            "api_visibility": "private",
        }

        def on_stage(number: int, drawn: Drawn | None) -> Any:
            return drawn.stages[min(number, len(drawn.stages)) - 1] if drawn else gr.skip()

        def on_pick(drawn: Drawn | None, event: gr.SelectData) -> tuple:
            if drawn is None or event.index >= len(drawn.faces):
                return gr.skip(), gr.skip()
            return replace(drawn, picked=event.index), gr.update(value=drawn.faces[event.index])

        stage.input(on_stage, [stage, drawn], stage_image, **at_once)
        gallery.select(on_pick, drawn, [drawn, save_face], **at_once)

        # 3. from a file, or from the result, to a task
        places: list[tuple[Any, ...]] = [
            (to_start, start_upload, start, start_shown, "mix", lambda picture: picture),
            (to_end, end_upload, end, end_shown, "mix", lambda picture: picture),
            (to_redo, redo_upload, redone, canvas, "redo", canvas_of),
            (to_edit, edit_upload, edited, edit_shown, "edit", lambda picture: picture),
        ]
        for button, upload, state, shown, tab, view in places:

            def on_take(drawn: Drawn | None, request: gr.Request, tab: str = tab, view: Any = view) -> tuple:
                with spoken(request):
                    picture = open_picked(drawn)
                return picture, view(picture), gr.Tabs(selected=tab)

            def on_upload(path: str, request: gr.Request, view: Any = view) -> tuple:
                with spoken(request):
                    picture = read_upload(path, tasks.size)
                return picture, view(picture)

            taken = button.click(on_take, drawn, [state, shown, tabs], **at_once)
            taken.success(None, js="() => document.getElementById('tasks').scrollIntoView({block: 'nearest'})")
            upload.upload(on_upload, upload, [state, shown], **at_once)

    page.queue(max_size=QUEUE, default_concurrency_limit=1)
    return page


def picture_view(label: Any) -> gr.Image:
    return gr.Image(label=label, interactive=False, format="png", height=180, buttons=[], elem_classes="pixels")


def upload_button(label: Any) -> gr.UploadButton:
    return gr.UploadButton(label, file_types=["image"], type="filepath", size="sm")


def download_button(label: Any) -> gr.DownloadButton:
    return gr.DownloadButton(label, interactive=False, size="sm", min_width=100)


def show(request: gr.Request, begin: Callable[[], Iterator[Image.Image | Drawn]]) -> Iterator[tuple]:
    """What a task yields, as updates of the page's result."""
    skip = gr.skip()
    with spoken(request):
        for seen in begin():
            if isinstance(seen, Image.Image):
                yield seen, skip, skip, skip, skip, skip, skip
            else:
                last = len(seen.stages)
                yield (
                    seen.stages[-1],
                    gr.update(maximum=max(last, 2), value=last, interactive=last > 1),
                    gr.update(value=seen.faces, selected_index=0),
                    seen,
                    gr.update(value=seen.faces[0], interactive=True),
                    gr.update(value=seen.strip, interactive=True),
                    gr.update(value=seen.film, interactive=True),
                )


@contextmanager
def spoken(request: gr.Request | None) -> Iterator[None]:
    """Refusals become messages in the language that the browser prefers."""
    language = request.headers.get("accept-language") if request else None
    try:
        yield
    except Refused as refused:
        raise gr.Error(message(refused.key, language, **refused.values), print_exception=False) from None
    except ValueError as error:
        raise gr.Error(message("refused", language, error=error), print_exception=False) from None


def open_picked(drawn: Drawn | None) -> Image.Image:
    """The picked face, unless none was drawn within the hour."""
    if drawn is None or not drawn.faces[drawn.picked].exists():
        raise Refused("nothing-picked")
    return Image.open(drawn.faces[drawn.picked]).convert("RGB")


def need(value: Any, key: str) -> Any:
    if value is None:
        raise Refused(key)
    return value


def check_seed(seed: int | None) -> int:
    if seed is None or not 0 <= seed <= MAX_SEED:
        raise Refused("bad-seed", most=MAX_SEED)
    return seed
