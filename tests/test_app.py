import json
import runpy
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from conftest import tiny_unet
from gradio_client import Client
from PIL import Image

from animeface_pipeline import AnimeFacePipeline, __version__, app, page
from animeface_pipeline.page import (
    Drawn,
    Refused,
    Tasks,
    build_page,
    canvas_of,
    mask_of,
    open_picked,
    read_upload,
    spoken,
)
from animeface_pipeline.page_text import AREAS, CHINESE, ENGLISH, MESSAGES, message
from animeface_pipeline.schedulers import SCHEDULERS, original_scheduler, switch_scheduler


@pytest.fixture(scope="module")
def pipe() -> AnimeFacePipeline:
    """Of an untrained network, which ends far outside [0, 1], with a range as wide."""
    pipe = AnimeFacePipeline(tiny_unet(), original_scheduler(), value_range=(-300, 300))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def tasks(pipe: AnimeFacePipeline, tmp_path: Path) -> Tasks:
    return Tasks(pipe, "tiny", tmp_path)


def finish(run: Iterator) -> tuple[list[Image.Image], Drawn]:
    *stages, drawn = run
    assert isinstance(drawn, Drawn)
    return stages, drawn


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(int)


def noise_picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


# ---- the command ----


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as exit:
        app.main(list(argv))
    return exit.value.code


def test_without_a_model_it_is_the_embedded_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANIMEFACE_MODEL", raising=False)
    shown = []
    monkeypatch.setattr("animeface_pipeline.page.build_page", lambda pipe, name, folder: shown.append((pipe, name)))
    with pytest.raises(AttributeError):  # there is no page to launch
        app.main([])
    pipe, name = shown[0]
    assert name == "embedded_model" and pipe.unet.num_parameters() <= 8_000_000


def test_bad_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(str(tmp_path)) == 2
    assert "model_index.json" in capsys.readouterr().err
    assert run("--server_port", "99999") == 2
    assert "from 1 to 65535, not 99999" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("model") == 2
    error = capsys.readouterr().err
    assert 'pip install "animeface-pipeline[demo]"' in error and error.count("\n") == 1


def test_a_space_runs_the_file_alone_and_names_its_model_in_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ANIMEFACE_MODEL", str(tmp_path / "nothing"))
    monkeypatch.setattr("sys.argv", ["app.py"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(shutil.copy(app.__file__, tmp_path / "app.py")), run_name="__main__")
    assert exit.value.code == 2
    assert str(tmp_path / "nothing") in capsys.readouterr().err
    monkeypatch.setenv("ANIMEFACE_MODEL", "user/faces")
    assert app.parse_args([]).model == "user/faces"
    assert app.parse_args(["other"]).model == "other"


# ---- the tasks ----


def test_drawing_goes_from_noise_to_the_seeds_own_faces(tasks: Tasks, pipe: AnimeFacePipeline) -> None:
    stages, drawn = finish(tasks.draw(40, "unipc", 25, 3))
    assert len(stages) == len(drawn.stages) == page.MAX_STAGES
    assert {stage.size for stage in stages} == {(32, 32)}
    pipe.scheduler = switch_scheduler(pipe.scheduler, "unipc")
    for seed, file in zip(range(40, 43), drawn.faces):
        expected = pipe(generator=torch.Generator().manual_seed(seed), num_inference_steps=25).images[0]
        assert np.abs(pixels(file) - np.asarray(expected)).max() <= 1
        text = Image.open(file).text
        assert (text["seed"], text["scheduler"], text["model"]) == (str(seed), "unipc", "tiny")
        assert (text["num_inference_steps"], text["animeface_pipeline"]) == ("25", __version__)
    assert Image.open(drawn.strip).size == (page.MAX_STAGES * 16, 3 * 16)
    assert np.array_equal(pixels(drawn.strip)[16:32, -16:], pixels(drawn.faces[1]))
    assert json.loads(Image.open(drawn.strip).text["seeds"]) == [40, 41, 42]
    assert Image.open(drawn.film).n_frames == 2 * page.MAX_STAGES - 2


@pytest.mark.parametrize("solver", SCHEDULERS)
def test_every_solver_of_the_page_draws_and_edits(solver: str, tasks: Tasks) -> None:
    assert len(finish(tasks.draw(0, solver, 4, 2))[1].faces) == 2
    assert len(finish(tasks.edit(noise_picture(), 0.5, 0, solver, 4, 1))[1].faces) == 1


def test_redoing_keeps_what_is_not_painted(tasks: Tasks) -> None:
    picture, mask = noise_picture(), mask_of(None, "lower half 下半", 16)
    stages, drawn = finish(tasks.redo(picture, mask, 2, 7, "ddpm", 5, 2))
    for file in drawn.faces:
        assert np.array_equal(pixels(file)[:8], np.asarray(picture)[:8])
        assert not np.array_equal(pixels(file)[8:], np.asarray(picture)[8:])
    assert np.array_equal(np.asarray(drawn.stages[-1])[:8, :16], np.asarray(picture)[:8])
    assert Image.open(drawn.faces[1]).text["jump_n_sample"] == "2"
    assert len(stages) == 5 + 4  # each of the four stretches of one step twice


def test_mixing_ends_at_both_faces(pipe: AnimeFacePipeline, tmp_path: Path) -> None:
    """With a network that predicts no noise, DDIM's way back ends where its way there began."""
    unet = tiny_unet()
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    tasks = Tasks(AnimeFacePipeline(unet, original_scheduler()), "zero", tmp_path)
    stages, drawn = finish(tasks.mix(noise_picture(1), noise_picture(2), 5, 10))
    assert len(drawn.faces) == len(drawn.stages) == 5 and len(stages) == 10
    assert np.abs(pixels(drawn.faces[0]) - np.asarray(noise_picture(1))).max() <= 1
    assert np.abs(pixels(drawn.faces[4]) - np.asarray(noise_picture(2))).max() <= 1
    assert Image.open(drawn.strip).size == (5 * 16, 16)
    assert Image.open(drawn.faces[3]).text["frame"] == "3"


def test_whoever_stops_asking_stops_the_network(tasks: Tasks) -> None:
    run = tasks.draw(0, "ddim", 100, 1)
    next(run)
    before = threading.active_count()
    began = time.monotonic()
    run.close()
    assert threading.active_count() < before
    assert time.monotonic() - began < 5


def test_files_are_forgotten_after_an_hour(tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = finish(tasks.draw(0, "ddim", 1, 1))
    _, second = finish(tasks.draw(0, "ddim", 1, 1))
    assert first.strip.exists() and second.strip.exists()
    assert open_picked(first).size == (16, 16)
    monkeypatch.setattr(page, "KEPT_FOR", -1)
    finish(tasks.draw(0, "ddim", 1, 1))
    assert not first.strip.exists() and not second.strip.exists()
    for drawn in (first, None):
        with pytest.raises(Refused, match="nothing-picked"):
            open_picked(drawn)


# ---- what goes in ----


def test_uploads_become_pictures_of_the_networks_size(tmp_path: Path) -> None:
    Image.new("RGBA", (90, 60), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    picture = read_upload(str(tmp_path / "clear.png"), 16)
    assert (picture.size, picture.mode, picture.getpixel((3, 3))) == ((16, 16), "RGB", (255, 255, 255))


def test_bombs_and_what_is_no_picture_are_refused(tmp_path: Path) -> None:
    Image.new("1", (12000, 12000)).save(tmp_path / "bomb.png")
    (tmp_path / "words.png").write_text("no picture")
    small = tmp_path / "small.png"
    noise_picture().save(small)
    (tmp_path / "damaged.png").write_bytes(small.read_bytes()[:-40])
    for name, rule in {
        "bomb.png": "too-many-pixels",
        "words.png": "not-an-image",
        "damaged.png": "corrupt",
        "none.png": "unreadable",
    }.items():
        with pytest.raises(Refused) as refused:
            read_upload(str(tmp_path / name), 16)
        assert refused.value.key == rule


def test_the_mask_is_what_is_painted() -> None:
    layer = Image.new("RGBA", (page.CANVAS, page.CANVAS))
    layer.paste((255, 45, 149, 255), (0, 0, page.CANVAS // 2, page.CANVAS // 4))
    painted = {"background": None, "layers": [layer], "composite": None}
    mask = np.asarray(mask_of(painted, next(iter(AREAS)), 16))
    assert (mask[:4, :8] == 255).all() and mask.sum() == 4 * 8 * 255
    with pytest.raises(Refused, match="nothing-painted"):
        mask_of({"background": None, "layers": [], "composite": None}, next(iter(AREAS)), 16)
    with pytest.raises(Refused, match="nothing-painted"):
        mask_of(None, next(iter(AREAS)), 16)
    assert canvas_of(noise_picture())["background"].size == (page.CANVAS, page.CANVAS)


def test_messages_are_in_the_browsers_language() -> None:
    assert ENGLISH.keys() == CHINESE.keys()
    for key in MESSAGES:
        values = {"pixels": 1, "most": 2, "error": "x"}
        english, chinese = message(key, "en-US,en;q=0.9", **values), message(key, "zh-CN,zh;q=0.9", **values)
        assert english.isascii() and not chinese.isascii()
        assert message(key, None, **values) == english
    with pytest.raises(gr.Error, match="Choose a picture first"), spoken(None):
        raise Refused("no-picture")
    with pytest.raises(gr.Error, match="This does not work: heun"), spoken(None):
        raise ValueError("heun")


# ---- the page, asked by Gradio's own client ----


@pytest.fixture(scope="module")
def url(pipe: AnimeFacePipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("page")
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        demo = build_page(pipe, "tiny", folder)
        _, url, _ = demo.launch(**page.LAUNCH, quiet=True, prevent_thread_lock=True)
        yield url
        demo.close()


@pytest.fixture(scope="module")
def client(url: str, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(url, verbose=False, download_files=tmp_path_factory.mktemp("downloads"))


def seeds_of(result: tuple) -> list[int]:
    gallery = result[2]["value"]
    return [int(Image.open(entry["image"]).text["seed"]) for entry in gallery]


def test_it_listens_on_this_machine_only(url: str) -> None:
    assert url.startswith("http://127.0.0.1:")


def test_draw(client: Client) -> None:
    job = client.submit(5, "unipc", 6, 2, api_name="/draw")
    assert seeds_of(job.result()) == [5, 6]
    assert len(job.outputs()) == 7  # six stages while it runs, and the faces


def test_eight_requests_at_once_and_none_is_lost(client: Client) -> None:
    jobs = [client.submit(seed, "ddim", 3, 1, api_name="/draw") for seed in range(100, 108)]
    assert [seeds_of(job.result()) for job in jobs] == [[seed] for seed in range(100, 108)]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((0, "unipc", 5, page.MAX_COUNT + 1), "greater than maximum"),
        ((0, "unipc", page.MAX_STEPS + 1, 1), "greater than maximum"),
        ((0, "unipc", 0, 1), "less than minimum"),
        ((-1, "unipc", 5, 1), "less than minimum"),
        ((2**40, "unipc", 5, 1), "greater than maximum"),
        ((None, "unipc", 5, 1), "seed must be a whole number"),
        ((0, "none", 5, 1), "not in the list of choices"),
    ],
)
def test_limits_hold_for_programs_too(client: Client, arguments: tuple, reason: str) -> None:
    with pytest.raises(Exception, match=reason):
        client.predict(*arguments, api_name="/draw")


def test_tasks_without_a_picture_say_so(client: Client) -> None:
    with pytest.raises(Exception, match="Mixing needs two faces"):
        client.predict(5, 5, api_name="/mix")
    with pytest.raises(Exception, match="Choose a picture first"):
        client.predict(0.5, 0, "unipc", 5, 1, api_name="/edit")
