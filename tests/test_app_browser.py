"""Every control of the page in Debian's Chromium, which the page is served to as a person starts it."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_unet
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from animeface_pipeline import AnimeFacePipeline
from animeface_pipeline.page_text import AREAS, CHINESE, ENGLISH, MESSAGES
from animeface_pipeline.schedulers import original_scheduler

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 375, "height": 800}
PATIENCE = 60_000  # ms


# ---- the server, the browser, a visitor ----


def start_server(folder: Path) -> tuple[subprocess.Popen, str]:
    """The command, from an empty folder, with a temporary folder of its own."""
    for name in ("cwd", "tmp"):
        (folder / name).mkdir()
    pipe = AnimeFacePipeline(tiny_unet(), original_scheduler(), value_range=(-300, 300))
    pipe.save_pretrained(folder / "tiny-faces")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "animeface_pipeline.app", str(folder / "tiny-faces"), f"--server_port={port}"]
    environment = {**os.environ, "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=folder / "cwd", env=environment)
    for _ in range(240):
        assert process.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/config", timeout=5)
            return process, f"http://127.0.0.1:{port}"
        except OSError:
            time.sleep(0.5)
    process.kill()
    raise AssertionError("the server did not start")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    process, url = start_server(folder)
    yield url
    assert any((folder / "tmp").iterdir())
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert not list((folder / "cwd").iterdir())  # nothing was written anywhere else
    assert not list((folder / "tmp").glob("animeface-*"))  # and what was is gone


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Visitor:
    """A browser window on the page, and what a person does in it."""

    def __init__(self, page: Page, texts: dict[str, str]) -> None:
        self.page, self.texts = page, texts

    def button(self, key: str, nth: int = 0) -> Locator:
        return self.page.get_by_role("button", name=self.texts[key], exact=True).nth(nth)

    def tab(self, key: str) -> Locator:
        return self.page.get_by_role("tab", name=self.texts[key], exact=True)

    def set(self, key: str, value: object) -> None:
        """A number into the field of a slider."""
        field = self.page.get_by_label(f"number input for {self.texts[key]}")
        field.fill(str(value))
        field.press("Tab")

    def choose(self, key: str, option: str) -> None:
        self.page.get_by_role("combobox", name=self.texts[key]).click()
        self.page.get_by_role("option", name=option, exact=True).click()

    def faces(self) -> list[str]:
        return self.page.locator("#faces img").evaluate_all("images => images.map(image => image.src)")

    def run(self, act: Callable[[], object], expected: int) -> None:
        """Do something, and wait for that many faces which were not there before."""
        before = self.faces()
        act()
        self.page.wait_for_function(
            "([n, before]) => { const now = [...document.querySelectorAll('#faces img')].map(image => image.src);"
            " return now.length == n && !now.some(source => before.includes(source)); }",
            arg=[expected, before],
            timeout=PATIENCE,
        )
        expect(self.button("save_face")).to_be_enabled(timeout=PATIENCE)

    def download(self, key: str, folder: Path) -> Path:
        with self.page.expect_download(timeout=PATIENCE) as download:
            self.button(key).click()
        target = folder / f"{time.monotonic_ns()}-{download.value.suggested_filename}"
        download.value.save_as(target)
        return target

    def upload(self, nth: int, file: Path) -> None:
        """Into the nth upload button, of those that are to be seen."""
        with self.page.expect_file_chooser() as chooser:
            visible = self.page.get_by_role("button", name=self.texts["upload"]).locator("visible=true")
            visible.nth(nth).click()
        chooser.value.set_files(file)

    def seed_of_picked(self, folder: Path) -> str:
        return Image.open(self.download("save_face", folder)).text["seed"]


@pytest.fixture
def visit(server: str, browser: Browser) -> Iterator[Callable[..., Visitor]]:
    contexts, elsewhere, broken = [], [], []

    def open_page(locale: str = "en-US", size: dict[str, int] = DESKTOP) -> Visitor:
        context = browser.new_context(locale=locale, viewport=size, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: elsewhere.append(request.url) if "127.0.0.1" not in request.url else None)
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.goto(server)
        page.locator("#faces").wait_for(timeout=PATIENCE)
        visitor = Visitor(page, CHINESE if locale.startswith("zh") else ENGLISH)
        expect(visitor.button("draw")).to_be_visible(timeout=PATIENCE)
        return visitor

    yield open_page
    for context in contexts:
        context.close()
    assert not [url for url in elsewhere if url.startswith("http")]  # the page asks no other server for anything
    assert not broken


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def noise_picture(file: Path, seed: int = 0) -> Path:
    values = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(values).save(file)
    return file


# ---- every control once ----


def test_draw_look_through_pick_and_download(visit: Callable[..., Visitor], tmp_path: Path) -> None:
    visitor = visit()
    seed = visitor.page.get_by_role("spinbutton", name=ENGLISH["seed"], exact=True)
    seed.fill("41")
    visitor.choose("solver", "ddim")
    visitor.set("steps", 12)
    visitor.set("count", 3)
    visitor.run(lambda: visitor.button("draw").click(), 3)
    assert visitor.seed_of_picked(tmp_path) == "41"
    face = visitor.download("save_face", tmp_path)
    text = Image.open(face).text
    assert (text["scheduler"], text["num_inference_steps"], text["model"]) == ("ddim", "12", "tiny-faces")

    visitor.page.locator("#faces button").nth(2).click()
    visitor.page.wait_for_timeout(500)
    assert visitor.seed_of_picked(tmp_path) == "43"
    assert Image.open(visitor.download("save_strip", tmp_path)).size == (12 * 16, 3 * 16)
    assert Image.open(visitor.download("save_film", tmp_path)).n_frames == 22

    shown = visitor.page.locator(".image-frame img").first
    last = shown.get_attribute("src")
    visitor.set("stage", 3)
    expect(shown).not_to_have_attribute("src", last, timeout=PATIENCE)

    visitor.button("dice").click()
    expect(seed).not_to_have_value("41")
    visitor.run(lambda: seed.press("Enter"), 3)
    assert visitor.seed_of_picked(tmp_path) == seed.input_value()


def test_the_face_comes_about_before_ones_eyes(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.set("count", 8)
    visitor.set("steps", 100)
    visitor.page.evaluate(
        "window.seen = new Set(); new MutationObserver(() => document.querySelectorAll('.image-frame img')"
        ".forEach(image => window.seen.add(image.src))).observe(document.body, {subtree: true, childList: true,"
        " attributes: true})"
    )
    visitor.run(lambda: visitor.button("draw").click(), 8)
    assert visitor.page.evaluate("window.seen.size") >= 5


def test_mix_two_faces(visit: Callable[..., Visitor], tmp_path: Path) -> None:
    visitor = visit()
    visitor.set("count", 2)
    visitor.run(lambda: visitor.button("draw").click(), 2)
    visitor.button("to_a").click()
    expect(visitor.tab("mix")).to_have_attribute("aria-selected", "true")
    visitor.page.locator("#faces button").nth(1).click()
    visitor.page.wait_for_timeout(500)
    visitor.button("to_b").click()
    expect(visitor.page.locator("[role=tabpanel] .image-frame img").locator("visible=true")).to_have_count(2)
    visitor.set("frames", 5)
    visitor.run(lambda: visitor.button("mix").click(), 5)
    assert Image.open(visitor.download("save_strip", tmp_path)).size == (5 * 16, 16)
    assert Image.open(visitor.download("save_film", tmp_path)).n_frames == 8


def test_mix_two_uploaded_pictures(visit: Callable[..., Visitor], tmp_path: Path) -> None:
    visitor = visit()
    visitor.tab("mix").click()
    for nth in (0, 1):
        visitor.upload(nth, noise_picture(tmp_path / f"{nth}.png", nth))
        shown = visitor.page.locator("[role=tabpanel] .image-frame img").locator("visible=true")
        expect(shown).to_have_count(nth + 1, timeout=PATIENCE)
    visitor.set("frames", 3)
    visitor.run(lambda: visitor.button("mix").click(), 3)


def test_paint_and_redo(visit: Callable[..., Visitor], tmp_path: Path) -> None:
    visitor = visit()
    visitor.set("count", 1)
    visitor.run(lambda: visitor.button("draw").click(), 1)
    before = pixels(visitor.download("save_face", tmp_path))
    visitor.button("to_redo").click()
    canvas = visitor.page.locator("#canvas canvas").first
    canvas.wait_for(timeout=PATIENCE)
    visitor.page.wait_for_timeout(1500)  # until the picture is on the canvas
    visitor.button("redo").scroll_into_view_if_needed()
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    visitor.page.mouse.move(middle[0] - 40, middle[1])
    visitor.page.mouse.down()
    visitor.page.mouse.move(middle[0] + 40, middle[1], steps=8)
    visitor.page.mouse.up()
    visitor.page.wait_for_timeout(500)
    visitor.set("passes", 2)
    visitor.run(lambda: visitor.button("redo").click(), 1)
    face = visitor.download("save_face", tmp_path)
    assert Image.open(face).text["jump_n_sample"] == "2"
    changed = (pixels(face) != before).any(axis=2)
    assert 4 < changed.sum() < 128  # what was painted, of 256 pixels, and nothing at the border
    assert not changed[:2].any() and not changed[-2:].any()
    assert not changed[:, 0].any() and not changed[:, -1].any()


def test_redo_an_uploaded_picture_without_painting(visit: Callable[..., Visitor], tmp_path: Path) -> None:
    visitor = visit()
    visitor.set("count", 1)
    visitor.tab("redo").click()
    picture = noise_picture(tmp_path / "picture.png")
    visitor.upload(0, picture)
    visitor.page.wait_for_timeout(1500)
    visitor.button("redo").click()
    expect(visitor.page.get_by_text(MESSAGES["nothing-painted"][0])).to_be_visible(timeout=PATIENCE)
    visitor.choose("area", "lower half 下半")
    visitor.run(lambda: visitor.button("redo").click(), 1)
    face = pixels(visitor.download("save_face", tmp_path))
    assert np.array_equal(face[:8], pixels(picture)[:8])
    assert not np.array_equal(face[8:], pixels(picture)[8:])


def test_edit_an_uploaded_picture_and_a_drawn_one(visit: Callable[..., Visitor], tmp_path: Path) -> None:
    visitor = visit()
    visitor.tab("edit").click()
    Image.new("RGB", (300, 200), "orange").save(tmp_path / "photo.jpg")
    visitor.upload(0, tmp_path / "photo.jpg")
    expect(visitor.page.locator("[role=tabpanel] .image-frame img").locator("visible=true")).to_have_count(
        1, timeout=PATIENCE
    )
    visitor.set("strength", 0.3)
    visitor.set("count", 2)
    visitor.run(lambda: visitor.button("edit").click(), 2)
    assert Image.open(visitor.download("save_face", tmp_path)).text["strength"] == "0.3"
    visitor.button("to_edit").click()
    visitor.page.wait_for_timeout(500)
    visitor.run(lambda: visitor.button("edit").click(), 2)


# ---- who it is for ----


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_what_cannot_be_used_is_said_in_the_visitors_language(
    locale: str, visit: Callable[..., Visitor], tmp_path: Path
) -> None:
    Image.new("1", (12000, 12000)).save(tmp_path / "bomb.png")
    (tmp_path / "words.png").write_text("no picture")
    visitor, language = visit(locale), locale == "zh-CN"

    def expect_message(key: str) -> None:
        said = re.split(r"\{\w+\}", MESSAGES[key][language])[0]
        expect(visitor.page.get_by_text(said)).to_be_visible(timeout=PATIENCE)

    visitor.button("to_a").click()
    expect_message("nothing-picked")
    visitor.tab("edit").click()
    visitor.button("edit").click()
    expect_message("no-picture")
    visitor.upload(0, tmp_path / "bomb.png")
    expect_message("too-many-pixels")
    visitor.upload(0, tmp_path / "words.png")
    expect_message("not-an-image")
    visitor.tab("mix").click()
    visitor.button("mix").click()
    expect_message("two-faces")


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_on_a_phone_nothing_is_cut_off(locale: str, visit: Callable[..., Visitor]) -> None:
    visitor = visit(locale, PHONE)
    visitor.set("count", 2)
    visitor.run(lambda: visitor.button("draw").click(), 2)
    for key in ("draw", "mix", "redo", "edit"):
        visitor.tab(key).click()
        expect(visitor.button(key)).to_be_visible()
        assert visitor.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        box = visitor.button(key).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"] and box["height"] >= 24


def test_by_keyboard_alone(visit: Callable[..., Visitor], tmp_path: Path) -> None:
    visitor = visit()
    keyboard, page = visitor.page.keyboard, visitor.page

    def tab_to(name: str, key: str = "Tab") -> None:
        """Press Tab until the control of this name has the focus."""
        for _ in range(60):
            keyboard.press(key)
            focused = page.evaluate(
                "(() => { const e = document.activeElement; return [e.getAttribute('aria-label'), e.innerText,"
                " e.labels?.[0]?.innerText].filter(Boolean).join(' | '); })()"
            )
            if name in focused:
                return
        raise AssertionError(f"{key} never comes to {name}")

    tab_to(ENGLISH["seed"])
    keyboard.press("Control+A")
    keyboard.type("7")
    tab_to(f"range slider for {ENGLISH['count']}")
    for _ in range(2):
        keyboard.press("ArrowLeft")
    tab_to(ENGLISH["draw"])  # the tab
    tab_to(ENGLISH["draw"])  # the button
    visitor.run(lambda: keyboard.press("Enter"), 2)
    tab_to("Thumbnail 2")
    keyboard.press("Enter")
    page.wait_for_timeout(500)
    tab_to(ENGLISH["save_face"])
    with page.expect_download(timeout=PATIENCE) as download:
        keyboard.press("Enter")
    download.value.save_as(tmp_path / "face.png")
    assert Image.open(tmp_path / "face.png").text["seed"] == "8"

    tab_to(ENGLISH["to_redo"])
    keyboard.press("Enter")
    expect(visitor.tab("redo")).to_have_attribute("aria-selected", "true", timeout=PATIENCE)
    page.wait_for_timeout(1500)
    tab_to(ENGLISH["area"], "Shift+Tab")
    keyboard.type("lower")
    expect(page.get_by_role("option", name="lower half 下半")).to_be_visible()
    expect(page.get_by_role("option", name="upper half 上半")).to_be_hidden()
    keyboard.press("ArrowDown")
    keyboard.press("Enter")
    expect(page.get_by_role("combobox", name=ENGLISH["area"])).to_have_value("lower half 下半")
    tab_to(ENGLISH["redo"])
    visitor.run(lambda: keyboard.press("Enter"), 2)
    face = pixels(visitor.download("save_face", tmp_path))
    assert np.array_equal(face[:8], pixels(tmp_path / "face.png")[:8])


def test_eight_visitors_at_once_and_none_waits_for_ever(visit: Callable[..., Visitor], tmp_path: Path) -> None:
    visitors = [visit() for _ in range(8)]
    for number, visitor in enumerate(visitors):
        visitor.page.get_by_role("spinbutton", name=ENGLISH["seed"], exact=True).fill(str(100 + number))
        visitor.set("count", 1)
        visitor.set("steps", 100)
    for visitor in visitors:
        visitor.button("draw").click()
    for number, visitor in enumerate(visitors):
        visitor.page.wait_for_function("document.querySelectorAll('#faces img').length == 1", timeout=PATIENCE)
        expect(visitor.button("save_face")).to_be_enabled(timeout=PATIENCE)
        assert visitor.seed_of_picked(tmp_path) == str(100 + number)


def test_a_program_cannot_paint_with_a_bomb(server: str, tmp_path: Path) -> None:
    Image.new("1", (12000, 12000)).save(tmp_path / "bomb.png")
    painted = {"background": None, "layers": [handle_file(tmp_path / "bomb.png")], "composite": None}
    client = Client(server, verbose=False)
    with pytest.raises(AppError):
        client.predict(painted, next(iter(AREAS)), 1, 0, "ddim", 5, 1, api_name="/redo")
    harmless = {"background": None, "layers": [handle_file(noise_picture(tmp_path / "dots.png"))], "composite": None}
    with pytest.raises(AppError, match="Choose a picture first"):
        client.predict(harmless, next(iter(AREAS)), 1, 0, "ddim", 5, 1, api_name="/redo")


def test_every_area_has_a_name_in_both_languages() -> None:
    assert all(re.fullmatch(r"[a-z ]+ [\u4e00-\u9fff]+", name) for name in AREAS)
