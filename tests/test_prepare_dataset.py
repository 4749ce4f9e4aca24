import errno
import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import datasets
import imagehash
import numpy as np
import psutil
import pytest
from PIL import Image, ImageCms, ImageFilter, ImageOps

from animeface_pipeline import near_duplicates, picture_rules, prepare_dataset
from animeface_pipeline.near_duplicates import differing_bits, families, find_near_duplicates, signs
from animeface_pipeline.picture_rules import (
    NEAR_DUPLICATE_BITS,
    RELATED_BITS,
    RULES,
    SetAside,
    colour_spread,
    perceptual_hash,
    read_picture,
    square,
)
from animeface_pipeline.prepare_dataset import RECORD, choose_splits, mark_duplicates, source_names

COMMAND = [sys.executable, "-m", "animeface_pipeline.prepare_dataset"]
ORIENTATION = 0x0112  # the EXIF tag
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def picture(seed: int, size: tuple[int, int] = (80, 80)) -> Image.Image:
    """A colourful picture with soft spots; the perceptual hashes of two seeds differ in more than 64 bits."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)


def run(*arguments: object, num_proc: int = 2) -> subprocess.CompletedProcess:
    command = [*COMMAND, *map(str, arguments), "--num_proc", str(num_proc)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)


def run_here(*arguments: object) -> int:
    """Run the command in this process, where a test can break its parts."""
    with pytest.raises(SystemExit) as exit:
        prepare_dataset.main([*map(str, arguments), "--num_proc", "1"])
    return exit.value.code


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def metadata(output: Path) -> dict[str, dict]:
    """The metadata of all pictures that are kept, by original name."""
    lines = [line for path in output.glob("*/metadata.jsonl") for line in path.read_text("utf-8").splitlines()]
    return {entry["original_name"]: entry for entry in map(json.loads, lines)}


def set_aside(output: Path) -> dict[str, dict]:
    lines = (output / "report" / "set_aside.jsonl").read_text("utf-8").splitlines()
    return {entry["original_name"]: entry for entry in map(json.loads, lines)}


# ---- every kind of file ----


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(width: int, height: int, bit_depth: int, colour_type: int, data: bytes) -> bytes:
    """A PNG of any kind, also of those that Pillow does not write; `data` are the rows, each after its filter byte."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def cut(format: str, seed: int) -> bytes:
    data = encoded(picture(seed), format)
    return data[: len(data) // 2]


def zero_tail(seed: int) -> bytes:
    """A JPEG whose second half was never written to the disk; libjpeg decodes it without complaint."""
    data = encoded(picture(seed), "JPEG")
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def frames(format: str, seed: int) -> bytes:
    return encoded(picture(seed), format, save_all=True, append_images=[picture(seed + 1)])


def sepia(seed: int) -> Image.Image:
    return ImageOps.colorize(picture(seed).convert("L"), "#201000", "#ffe8c0")


def faint_noise() -> Image.Image:
    values = np.random.default_rng(0).normal(128, 4, (80, 80, 3))
    return Image.fromarray(values.round().astype(np.uint8))


def make_link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


# name → what the file holds (or how it is made), and the rule that must set it aside ("" for: it is kept)
KINDS: dict[str, tuple[bytes | Callable[[Path], None], str]] = {
    # no pictures
    "empty.jpg": (b"", "not-an-image"),
    "notes.txt": (b"These are my favourite faces.", "not-an-image"),
    "error page.jpg": (b"<!doctype html><title>404</title>", "not-an-image"),
    "drawing.svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not-an-image"),
    "archive.zip": (b"PK\x03\x04" + bytes(60), "not-an-image"),
    "._resource fork.png": (b"\x00\x05\x16\x07" + bytes(60), "not-an-image"),
    "page.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 80 80\n", "not-an-image"),
    "paper.pdf": (b"%PDF-1.7\n", "not-an-image"),
    "layers.psd": (b"8BPS\x00\x01" + bytes(60), "not-an-image"),
    # damaged ones
    "cut.jpg": (cut("JPEG", 1), "corrupt"),
    "cut.png": (cut("PNG", 2), "corrupt"),
    "cut.webp": (cut("WEBP", 3), "corrupt"),
    "cut.gif": (cut("GIF", 4), "corrupt"),
    "cut.bmp": (cut("BMP", 5), "corrupt"),
    "cut.tiff": (cut("TIFF", 6), "corrupt"),
    "cut.avif": (cut("AVIF", 7), "corrupt"),
    "cut.jp2": (cut("JPEG2000", 8), "corrupt"),
    "zero tail.jpg": (zero_tail(9), "corrupt"),
    "signature only.png": (b"\x89PNG\r\n\x1a\n", "corrupt"),
    "header only.jpg": (encoded(picture(10), "JPEG")[:20], "corrupt"),
    "bad data.png": (flipped(encoded(picture(11), "PNG"), 2000), "corrupt"),
    "bad checksum.png": (flipped(encoded(picture(12), "PNG"), -13), "corrupt"),
    "infinite.tiff": (encoded(Image.fromarray(np.full((80, 80), np.inf, np.float32)), "TIFF"), "corrupt"),
    # too large to decode: one by what Pillow refuses itself, one by our limit
    "bomb.png": (png(50_000, 50_000, 8, 2, bytes(1000)), "too-many-pixels"),
    "scan.png": (encoded(Image.new("1", (5000, 5000)), "PNG"), "too-many-pixels"),
    # more than one picture
    "animated.gif": (frames("GIF", 20), "animated"),
    "animated.webp": (frames("WEBP", 22), "animated"),
    "animated.png": (frames("PNG", 24), "animated"),
    "animated.avif": (frames("AVIF", 26), "animated"),
    "pages.tiff": (frames("TIFF", 28), "animated"),
    # shape
    "small.png": (encoded(picture(30, (100, 63)), "PNG"), "too-small"),
    "icon.gif": (encoded(picture(31, (16, 16)), "GIF"), "too-small"),
    "banner.jpg": (encoded(picture(32, (80, 161)), "JPEG"), "extreme-aspect"),
    "just short enough.jpg": (encoded(picture(33, (80, 160)), "JPEG"), ""),
    # content
    "white.png": (encoded(Image.new("RGB", (80, 80), "white"), "PNG"), "near-blank"),
    "black.jpg": (encoded(Image.new("RGB", (80, 80)), "JPEG"), "near-blank"),
    "noise.png": (encoded(faint_noise(), "PNG"), "near-blank"),
    "transparent.png": (encoded(Image.new("RGBA", (80, 80), (255, 0, 0, 0)), "PNG"), "near-blank"),
    "grey.png": (encoded(picture(40).convert("L"), "PNG"), "near-monochrome"),
    "grey as colour.jpg": (encoded(picture(41).convert("L").convert("RGB"), "JPEG"), "near-monochrome"),
    "sepia.png": (encoded(sepia(42), "PNG"), "near-monochrome"),
    "line art.png": (encoded(picture(43).convert("1"), "PNG"), "near-monochrome"),
    # copies; the best of each stands in the second source, see `test_copies_across_sources`
    "copy of best.png": (encoded(picture(1000, (200, 200)), "PNG"), "exact-duplicate"),
    "smaller.png": (encoded(picture(1000, (100, 100)), "PNG"), "near-duplicate"),
    "compressed.jpg": (encoded(picture(1000, (200, 200)), "JPEG", quality=20), "near-duplicate"),
    "mirrored.png": (encoded(ImageOps.mirror(picture(1000, (200, 200))), "PNG"), "near-duplicate"),
    "blurred.png": (
        encoded(picture(1000, (200, 200)).filter(ImageFilter.GaussianBlur(3)), "PNG"),
        "near-duplicate",
    ),
    "moved.png": (encoded(picture(1000, (200, 200)).crop((2, 2, 200, 200)), "PNG"), "near-duplicate"),
    # what must be converted (to what: see `test_conversion`)
    "alpha.png": (encoded(picture(50).convert("RGBA"), "PNG"), ""),
    "palette.gif": (encoded(picture(51).quantize(64), "GIF"), ""),
    "palette.png": (encoded(picture(52).quantize(64), "PNG"), ""),
    "print.jpg": (encoded(picture(53).convert("CMYK"), "JPEG"), ""),
    "print.tiff": (encoded(picture(54).convert("CMYK"), "TIFF"), ""),
    "lab.tiff": (encoded(picture(55).convert("LAB"), "TIFF"), ""),
    "profile.png": (encoded(picture(56), "PNG", icc_profile=SRGB), ""),
    "damaged profile.png": (encoded(picture(57), "PNG", icc_profile=b"no profile at all"), ""),
    "damaged exif.jpg": (encoded(picture(58), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff"), ""),
    "preview.mpo": (frames("MPO", 60), ""),
    "progressive.jpg": (encoded(picture(62), "JPEG", progressive=True), ""),
    "image.avif": (encoded(picture(63), "AVIF"), ""),
    "image.webp": (encoded(picture(64), "WEBP"), ""),
    "image.jp2": (encoded(picture(65), "JPEG2000"), ""),
    "image.ppm": (encoded(picture(66), "PPM"), ""),
    "image.ico": (encoded(picture(67), "ICO", sizes=[(80, 80)]), ""),
    # odd names
    "png in disguise.jpg": (encoded(picture(70), "PNG"), ""),
    "NO EXTENSION": (encoded(picture(71), "JPEG"), ""),
    "UPPER.JPEG": (encoded(picture(72), "JPEG"), ""),
    "女の子 ✿.png": (encoded(picture(73), "PNG"), ""),
    "train_validation_test.png": (encoded(picture(74), "PNG"), ""),
    "deep/er/metadata.jsonl": (b'{"file_name": "x.png"}\n', "not-an-image"),
    "deep/er/face.png": (encoded(picture(75), "PNG"), ""),
}  # fmt: skip
if os.name == "posix":
    KINDS |= {
        "line\nbreak.png": (encoded(picture(80), "PNG"), ""),
        "dangling.png": (make_link("nowhere.png"), "unreadable"),
        "loop a.png": (make_link("loop b.png"), "unreadable"),
        "loop b.png": (make_link("loop a.png"), "unreadable"),
        "pipe.png": (os.mkfifo, "unreadable"),
    }


class Run(NamedTuple):
    sources: list[Path]
    output: Path
    process: subprocess.CompletedProcess
    sources_are_unchanged: bool


def snapshot(folder: Path) -> dict:
    """Names, times and contents of everything in a folder."""
    return {
        path.relative_to(folder): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The command run once over all KINDS in one source, and a few good pictures in another."""
    root = tmp_path_factory.mktemp("odd")
    kinds, good = root / "kinds", root / "good"
    for name, (content, _) in KINDS.items():
        path = kinds / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content(path)
    good.mkdir()
    for seed in range(1000, 1021):
        picture(seed, (200, 200)).save(good / f"{seed}.bmp")
    if os.name == "posix":
        (kinds / "deep" / "back up").symlink_to(kinds, target_is_directory=True)
        with open(os.fsencode(good) + b"/not unicode \xff.png", "wb") as file:
            file.write(encoded(picture(90), "PNG"))
    before = [snapshot(kinds), snapshot(good)]
    process = run(kinds, good, "--output_dir", root / "out")
    return Run([kinds, good], root / "out", process, [snapshot(kinds), snapshot(good)] == before)


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_file(odd: Run, name: str) -> None:
    expected = KINDS[name][1]
    if expected:
        entry = set_aside(odd.output)[name]
        assert (entry["rule"], entry["source"]) == (expected, "kinds")
    else:
        assert name not in set_aside(odd.output)
        entry = metadata(odd.output)[name]
        (path,) = odd.output.glob(f"*/{entry['file_name']}")
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))


def test_there_are_enough_kinds() -> None:
    assert len(KINDS) >= 60
    assert {rule for _, rule in KINDS.values()} >= set(RULES) - {"unreadable"} | {""}


def test_the_run_over_all_kinds(odd: Run) -> None:
    assert odd.process.returncode == 0, odd.process.stderr
    assert "Traceback" not in odd.process.stderr
    assert odd.sources_are_unchanged
    assert not odd.output.with_name("out.partial").exists()
    assert sorted(path.name for path in odd.output.iterdir()) == ["report", "train", "validation"]
    if os.name == "posix":
        assert "not unicode ?.png" in metadata(odd.output)
        assert not any("back up" in name for name in [*metadata(odd.output), *set_aside(odd.output)])


def test_copies_across_sources(odd: Run) -> None:
    best = {"source": "good", "original_name": "1000.bmp"}
    copies = {name: entry for name, entry in set_aside(odd.output).items() if "kept_instead" in entry}
    assert len(copies) == 6
    assert all(entry["kept_instead"] == best for entry in copies.values())
    assert "1000.bmp" in metadata(odd.output)


def test_load_dataset_reads_the_result(odd: Run, tmp_path: Path) -> None:
    loaded = datasets.load_dataset(str(odd.output), cache_dir=str(tmp_path))
    report = json.loads((odd.output / "report" / "report.json").read_text("utf-8"))
    assert {split: len(rows) for split, rows in loaded.items()} == report["splits"]
    assert all(loaded.values())
    originals = {}
    for rows in loaded.values():
        assert set(rows.column_names) == {"image", "source", "original_name", "hash"}
        for row in rows:
            assert (row["image"].mode, row["image"].size) == ("RGB", (64, 64))
            originals[row["source"], row["original_name"]] = row["hash"]
    assert len(originals) == sum(report["splits"].values()) == len(set(originals.values()))
    assert originals["good", "1000.bmp"] == picture_rules.pixel_hash(picture(1000, (200, 200)))


def test_without_a_holdout_there_is_only_train(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for seed in range(3):
        picture(seed).save(tmp_path / "source" / f"{seed}.png")
    assert run_here(tmp_path / "source", "--output_dir", tmp_path / "out", "--holdout", "0") == 0
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 3}


def test_report(odd: Run) -> None:
    folder = odd.output / "report"
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json", "set_aside.jsonl"]
    report = json.loads((folder / "report.json").read_text("utf-8"))
    entries = [json.loads(line) for line in (folder / "set_aside.jsonl").read_text("utf-8").splitlines()]
    counts = Counter(entry["rule"] for entry in entries)
    assert report["set_aside"] == {rule: counts[rule] for rule in RULES}
    assert report["files"]["number"] == sum(counts.values()) + sum(report["splits"].values())
    assert report["sources"]["kinds"]["files"] == len(KINDS)
    assert report["arguments"]["sources"] == ["kinds", "good"]

    page = (folder / "report.html").read_text("utf-8")
    for rule in counts:
        assert f'id="{rule}"' in page
    assert page.count("data:image/jpeg;base64,") > 50
    assert "src=" in page and page.count("src=") == page.count('src="data:'), "a picture outside the page"
    assert "://" not in page.replace("http://www.w3.org", "")
    for text in contents(odd.output).values():
        assert str(odd.sources[0].parent).encode() not in text, "a path of this machine"


# ---- conversion ----


def assert_close(image: Image.Image, expected: Image.Image | np.ndarray, tolerance: int) -> None:
    assert image.mode == "RGB"
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= tolerance


def on_white(image: Image.Image, alpha: Image.Image) -> np.ndarray:
    share = np.asarray(alpha)[..., None] / 255
    return np.asarray(image) * share + 255 * (1 - share)


RAMP = Image.linear_gradient("L").resize((80, 80))
GREY = picture(1).convert("L")
GREY_RGB = GREY.convert("RGB")
WIDE = np.asarray(GREY).astype(np.float64) / 255


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(RAMP)
    return image


def transparent_palette() -> tuple[Image.Image, np.ndarray]:
    """Blue on the left, red on the right, the lower half transparent; and what it should become."""
    image = Image.new("P", (80, 80), 1)
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255])
    image.paste(2, (0, 0, 40, 80))
    image.paste(0, (0, 40, 80, 80))
    expected = np.full((80, 80, 3), 255)
    expected[:40, :40] = 0, 0, 255
    expected[:40, 40:] = 255, 0, 0
    return image, expected


def rgb16() -> bytes:
    rows = np.asarray(picture(1)).astype(">u2") * 257
    return png(80, 80, 16, 2, b"".join(b"\0" + row.tobytes() for row in rows))


def swapped_profile() -> bytes:
    """sRGB with the names of its red and green primaries exchanged: red becomes green and green becomes red."""
    return SRGB.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")


def linear_grey_profile() -> bytes:
    """A profile for greyscale pictures whose values are linear light."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    white = b"XYZ \0\0\0\0" + fixed(0.9642, 1.0, 0.8249)
    curve = b"curv" + bytes(8)  # no points: the identity
    tags = struct.pack(">I", 2) + struct.pack(">4sII", b"wtpt", 156, 20) + struct.pack(">4sII", b"kTRC", 176, 12)
    header = struct.pack(">I4xI4s4s4s12x4s", 188, 0x02100000, b"mntr", b"GRAY", b"XYZ ", b"acsp").ljust(68, b"\0")
    return (header + fixed(0.9642, 1.0, 0.8249)).ljust(128, b"\0") + tags + white + curve


def linear_to_srgb(values: np.ndarray) -> np.ndarray:
    return 255 * np.where(values <= 0.0031308, 12.92 * values, 1.055 * values ** (1 / 2.4) - 0.055)


CONVERSIONS = {
    "RGB": (encoded(picture(1), "PNG"), picture(1), 0),
    "RGBA": (encoded(with_alpha(picture(1)), "PNG"), on_white(picture(1), RAMP), 1),
    "LA": (encoded(with_alpha(GREY), "PNG"), on_white(GREY_RGB, RAMP), 1),
    "P": (encoded(picture(1).quantize(256), "PNG"), picture(1).quantize(256).convert("RGB"), 0),
    "P, transparent": (encoded(transparent_palette()[0], "PNG", transparency=0), transparent_palette()[1], 0),
    "1": (encoded(picture(1).convert("1"), "PNG"), picture(1).convert("1").convert("RGB"), 0),
    "L": (encoded(GREY, "JPEG", quality=100), GREY_RGB, 2),
    "16-bit grey PNG": (encoded(Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), "PNG"), GREY_RGB, 0),
    "dark 16-bit grey PNG": (
        encoded(Image.fromarray(np.asarray(GREY).astype(np.uint16)), "PNG"),
        0 * WIDE[..., None],
        1,
    ),
    "16-bit grey TIFF": (encoded(Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), "TIFF"), GREY_RGB, 0),
    "16-bit colour PNG": (rgb16(), picture(1), 0),
    "32-bit TIFF of 16-bit values": (encoded(Image.fromarray((WIDE * 65535).astype(np.int32)), "TIFF"), GREY_RGB, 1),
    "32-bit TIFF of 8-bit values": (encoded(Image.fromarray((WIDE * 255).astype(np.int32)), "TIFF"), GREY_RGB, 1),
    "float TIFF, 0 to 1": (encoded(Image.fromarray(WIDE.astype(np.float32)), "TIFF"), GREY_RGB, 1),
    "float TIFF, 0 to 255": (encoded(Image.fromarray((WIDE * 255).astype(np.float32)), "TIFF"), GREY_RGB, 1),
    "CMYK TIFF": (encoded(picture(1).convert("CMYK"), "TIFF"), picture(1), 1),
    "CMYK JPEG": (encoded(picture(1).convert("CMYK"), "JPEG", quality=100, subsampling=0), picture(1), 4),
    "LAB TIFF": (encoded(picture(1).convert("LAB"), "TIFF"), picture(1).convert("LAB").convert("RGB"), 1),
    "ICC sRGB": (encoded(picture(1), "PNG", icc_profile=SRGB), picture(1), 1),
    "ICC red and green exchanged": (
        encoded(picture(1), "PNG", icc_profile=swapped_profile()),
        np.asarray(picture(1))[..., [1, 0, 2]],
        2,
    ),
    "ICC with alpha": (
        encoded(with_alpha(picture(1)), "PNG", icc_profile=swapped_profile()),
        on_white(Image.fromarray(np.asarray(picture(1))[..., [1, 0, 2]]), RAMP),
        2,
    ),
    "ICC of linear grey": (  # Little CMS is coarse near black
        encoded(GREY, "PNG", icc_profile=linear_grey_profile()),
        np.repeat(linear_to_srgb(WIDE)[..., None], 3, axis=2),
        8,
    ),
    "ICC for grey on a colour picture": (encoded(picture(1), "PNG", icc_profile=linear_grey_profile()), picture(1), 0),
    "ICC for colour on a grey picture": (encoded(GREY, "PNG", icc_profile=SRGB), GREY_RGB, 1),
    "MPO": (frames("MPO", 1), Image.open(io.BytesIO(encoded(picture(1), "JPEG"))), 2),
}


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_conversion(kind: str, tmp_path: Path) -> None:
    data, expected, tolerance = CONVERSIONS[kind]
    (tmp_path / "picture").write_bytes(data)
    converted = read_picture(tmp_path / "picture")
    assert_close(converted, expected, tolerance)
    assert converted.info == {}, "metadata that would be applied twice"


TRANSPOSED = Image.Transpose
UPRIGHT_TO_STORED = {
    1: None,
    2: TRANSPOSED.FLIP_LEFT_RIGHT,
    3: TRANSPOSED.ROTATE_180,
    4: TRANSPOSED.FLIP_TOP_BOTTOM,
    5: TRANSPOSED.TRANSPOSE,
    6: TRANSPOSED.ROTATE_90,
    7: TRANSPOSED.TRANSVERSE,
    8: TRANSPOSED.ROTATE_270,
}


@pytest.mark.parametrize("orientation", UPRIGHT_TO_STORED)
def test_exif_orientation(orientation: int, tmp_path: Path) -> None:
    upright = picture(1, (90, 70))
    transpose = UPRIGHT_TO_STORED[orientation]
    stored = upright if transpose is None else upright.transpose(transpose)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(tmp_path / "picture.png", exif=exif)
    assert_close(read_picture(tmp_path / "picture.png"), upright, 0)


def test_the_crop_is_centred_and_antialiased() -> None:
    stripes = Image.new("RGB", (300, 100), "red")  # red, then black and white columns in the middle, then blue
    stripes.paste("blue", (200, 0, 300, 100))
    columns = np.zeros((100, 100, 3), np.uint8)
    columns[:, ::2] = 255
    stripes.paste(Image.fromarray(columns), (100, 0))
    cropped = np.asarray(square(stripes, 25)).astype(int)
    assert cropped.shape == (25, 25, 3)
    assert np.abs(cropped[:, 2:-2] - 127).max() < 10  # without antialiasing the columns would be black or white


def test_a_picture_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(1).save(tmp_path / "picture.png")
    denied = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr("builtins.open", lambda *_: (_ for _ in ()).throw(denied))
    with pytest.raises(SetAside, match="unreadable"):
        read_picture(tmp_path / "picture.png")


def test_colour_spread() -> None:
    assert colour_spread(GREY_RGB) == 0
    assert colour_spread(sepia(1)) < 0.8
    assert colour_spread(picture(1)) > 10
    two_hues = Image.new("RGB", (64, 64), "red")
    two_hues.paste("blue", (0, 0, 32, 64))
    assert colour_spread(two_hues) > 10


# ---- copies ----


def hashes_near(center: np.ndarray, bits: list[int]) -> np.ndarray:
    """Hashes that differ from a hash in so many bits, the first ones."""
    changed = np.repeat(np.unpackbits(center)[None], len(bits), axis=0)
    for row, number in zip(changed, bits):
        row[:number] ^= 1
    return np.packbits(changed, axis=1)


def random_hashes(number: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (number, 32), np.uint8)


def test_differing_bits_are_those_of_imagehash() -> None:
    thumbnails = [square(picture(seed), 64) for seed in range(20)]
    ours = np.stack([perceptual_hash(thumbnail) for thumbnail in thumbnails])
    theirs = [imagehash.phash(thumbnail, hash_size=16) for thumbnail in thumbnails]
    mirrored = [imagehash.phash(ImageOps.mirror(thumbnail), hash_size=16) for thumbnail in thumbnails]
    expected = np.array([[one - other for other in theirs] for one in theirs])
    expected_mirrored = np.array([[one - other for other in mirrored] for one in theirs])
    bits = differing_bits(signs(ours), signs(ours))
    assert (bits <= expected).all()
    assert np.array_equal(bits[expected < expected_mirrored - 20], expected[expected < expected_mirrored - 20])
    assert np.abs(bits - np.minimum(expected, expected_mirrored)).max() <= 16  # mirroring moves the median a little


def test_near_duplicates_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search in blocks finds what a plain loop over all pictures finds."""
    monkeypatch.setattr(near_duplicates, "BLOCK", 64)
    rng = np.random.default_rng(1)
    centers = np.unpackbits(random_hashes(40), axis=1)
    members = centers[rng.integers(0, 40, 500)] ^ (rng.random((500, 256)) < rng.uniform(0, 0.25, (500, 1)))
    hashes = np.packbits(members, axis=1)
    bits = differing_bits(signs(hashes), signs(hashes))
    kept, copies = [], {}
    for number in range(500):
        distance = bits[number, kept]
        if kept and distance.min() <= NEAR_DUPLICATE_BITS:
            copies[number] = (kept[distance.argmin()], distance.min())
        else:
            kept.append(number)
    pairs = {(min(i, j), max(i, j)) for i in kept for j in kept if i != j and bits[i, j] <= RELATED_BITS}
    assert len(copies) > 100 and len(pairs) > 100

    nearest, distance, related = find_near_duplicates(hashes, NEAR_DUPLICATE_BITS, RELATED_BITS)
    is_copy = distance <= NEAR_DUPLICATE_BITS
    assert {n: (nearest[n], distance[n]) for n in np.flatnonzero(is_copy)} == copies
    assert {(min(pair), max(pair)) for pair in related.tolist()} == pairs
    assert len(related) == len(pairs)


def test_chains_do_not_drift() -> None:
    steps = list(range(0, 201, 40))  # each within the threshold of the one before
    hashes = hashes_near(random_hashes(1)[0], steps)
    _, distance, _ = find_near_duplicates(hashes, NEAR_DUPLICATE_BITS, RELATED_BITS)
    assert (distance <= NEAR_DUPLICATE_BITS).tolist() == [False, True, False, True, False, True]


def test_families() -> None:
    labels = families(6, np.array([[0, 3], [3, 5]]))
    assert labels[0] == labels[3] == labels[5]
    assert len(set(labels)) == 4
    assert len(set(families(3, np.empty((0, 2), int)))) == 3


def make_records(pixels: list[str], hashes: np.ndarray, size: int = 100) -> np.ndarray:
    records = np.zeros(len(pixels), RECORD)
    records["file"] = np.arange(len(pixels))
    records["pixels"], records["phash"] = pixels, hashes
    records["width"] = records["height"] = size
    records["twin"] = records["distance"] = -1
    return records


def test_the_best_copy_is_kept() -> None:
    records = make_records(["a", "b", "b", "c", "d"], hashes_near(random_hashes(1)[0], [0, 8, 8, 8, 16]))
    records["width"] = [50, 100, 100, 100, 200]  # the last one has the most pixels, although it is not the middle one
    files = [prepare_dataset.File(0, f"{name}.png", size, 0) for name, size in zip("abcde", (9, 5, 6, 7, 1))]
    mark_duplicates(records, files, frozenset())
    assert records["rule"].tolist() == [
        b"near-duplicate",
        b"exact-duplicate",
        b"near-duplicate",
        b"near-duplicate",
        b"",
    ]
    assert records["twin"].tolist() == [4, 4, 4, 4, -1]  # also of the exact copy of a near copy

    records = make_records(["a", "b", "c"], hashes_near(random_hashes(1)[0], [0, 8, 16]))
    files = [prepare_dataset.File(0, f"{name}.png", size, 0) for name, size in zip("abc", (5, 6, 6))]
    mark_duplicates(records, files, frozenset())
    assert records["rule"].tolist() == [b"near-duplicate", b"", b"near-duplicate"]  # the largest file, then the name


def test_keep_near_duplicates() -> None:
    records = make_records(["a", "b", "b"], hashes_near(random_hashes(1)[0], [0, 8, 8]))
    files = [prepare_dataset.File(0, f"{name}.png", 1, 0) for name in "abc"]
    family = mark_duplicates(records, files, frozenset({"near-duplicate"}))
    assert records["rule"].tolist() == [b"", b"", b"exact-duplicate"]
    assert family[0] == family[1]


# ---- the split ----


def split_of(families: list[int], holdout: float) -> np.ndarray:
    records = make_records([f"{number:032x}" for number in range(len(families))], random_hashes(len(families)))
    splits = choose_splits(records, np.array(families), holdout)
    assert not (splits["train"] & splits["validation"]).any()
    assert (splits["train"] | splits["validation"]).all()
    return splits["validation"]


@pytest.mark.parametrize(
    ("number", "holdout", "held_out"),
    [(100, 0.05, 5), (1000, 0.5, 500), (10, 0.05, 1), (2, 0.05, 1), (1, 0.5, 0), (100, 0, 0)],
)
def test_the_share_that_is_held_out(number: int, holdout: float, held_out: int) -> None:
    assert split_of(list(range(number)), holdout).sum() == held_out


def test_a_family_stays_together() -> None:
    validation = split_of([number // 3 for number in range(300)], 0.1)
    assert validation.sum() == 30
    assert all(len(set(validation[start : start + 3])) == 1 for start in range(0, 300, 3))
    assert not split_of([0] * 100, 0.1).any()  # one family alone is left for training


def test_no_copy_on_both_sides(tmp_path: Path) -> None:
    """Crops of one picture, some too different to be copies: imagehash itself compares what the two sides got."""
    source = tmp_path / "source"
    source.mkdir()
    for seed in range(30):
        for shift in range(0, 24, 6):
            picture(seed, (200, 200)).crop((shift, 0, 176 + shift, 176)).save(source / f"{seed} {shift}.png")
    assert run_here(source, "--output_dir", tmp_path / "out", "--holdout", "0.3") == 0
    sides = {}
    for name in ("train", "validation"):
        paths = (tmp_path / "out" / name).glob("*.png")
        sides[name] = [imagehash.phash(Image.open(path), hash_size=16) for path in paths]
    assert len(sides["train"]) + len(sides["validation"]) > 40
    assert len(sides["validation"]) >= 10
    assert min(one - other for one in sides["train"] for other in sides["validation"]) > RELATED_BITS


# ---- the command: again, stopped, refused ----


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for seed in range(12):
        picture(seed).save(folder / f"{seed}.png")
    picture(0).save(folder / "copy.bmp")
    (folder / "broken.jpg").write_bytes(cut("JPEG", 1))
    return folder


def test_the_same_arguments_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    results = []
    for number in (1, 2):
        process = run(source, "--output_dir", tmp_path / f"out {number}", num_proc=number)
        assert process.returncode == 0, process.stderr
        results.append(contents(tmp_path / f"out {number}"))
    assert results[0] == results[1]
    assert len(results[0]) == 12 + 2 + 3


def test_a_finished_result_is_left_alone(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert run_here(source, "--output_dir", out) == 0
    before = snapshot(out)
    assert run_here(source, "--output_dir", out) == 0
    assert "already prepared" in capsys.readouterr().out
    assert snapshot(out) == before

    assert run_here(source, "--output_dir", out, "--resolution", "32") == 2
    assert "other arguments" in capsys.readouterr().err
    picture(50).save(source / "new.png")
    assert run_here(source, "--output_dir", out) == 2
    assert "other files" in capsys.readouterr().err
    assert snapshot(out) == before
    (source / "new.png").unlink()
    next(out.glob("train/*.png")).unlink()
    assert run_here(source, "--output_dir", out) == 2
    assert "not all 11 pictures of train are there" in capsys.readouterr().err


def test_dry_run_writes_nothing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before = snapshot(tmp_path)
    assert run_here(source, "--output_dir", tmp_path / "out", "--dry_run") == 0
    printed = capsys.readouterr().out
    assert snapshot(tmp_path) == before
    for line in ("14 files in source", "1 corrupt", "1 exact-duplicate", "12 kept: 11 train, 1 validation"):
        assert line in printed


def test_source_names() -> None:
    assert source_names([Path("/pictures/a/data"), Path("/pictures/b/other")]) == ["data", "other"]
    assert source_names([Path("/pictures/a/data"), Path("/pictures/b/data")]) == ["a/data", "b/data"]


def test_sources_that_nest_are_read_once(source: Path, tmp_path: Path) -> None:
    (source / "inner").mkdir()
    picture(60).save(source / "inner" / "a.png")
    assert run_here(source / "inner", source, "--output_dir", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report" / "report.json").read_text("utf-8"))
    assert [each["files"] for each in report["sources"].values()] == [1, 14]


def test_keep_drawings_without_colour(source: Path, tmp_path: Path) -> None:
    picture(60).convert("L").save(source / "grey.png")
    assert run_here(source, "--output_dir", tmp_path / "out", "--keep", "near-monochrome", "near-blank") == 0
    assert "grey.png" in metadata(tmp_path / "out")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """So many pictures that a run over them can be stopped, and what a run that is not stopped makes of them."""
    root = tmp_path_factory.mktemp("many")
    (root / "source").mkdir()
    for seed in range(400):
        picture(seed, (256, 256)).save(root / "source" / f"{seed}.bmp")
    assert run(root / "source", "--output_dir", root / "out").returncode == 0
    return root / "source", contents(root / "out")


@pytest.mark.parametrize("stop", [signal.SIGINT, getattr(signal, "SIGKILL", signal.SIGTERM)])
@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_a_stopped_run_goes_on(stop: signal.Signals, many: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    source, whole = many
    command = [*COMMAND, str(source), "--output_dir", str(tmp_path / "out"), "--num_proc", "2"]
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "out.partial" / "journal"
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.stat().st_size):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    workers = process.children(recursive=True)
    process.send_signal(stop)
    _, error = process.communicate(timeout=60)
    if stop == signal.SIGINT:
        assert process.returncode == 130
        assert "goes on from here" in error.splitlines()[-1]
    assert "Traceback" not in error
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive, "workers outlived the command"
    assert not (tmp_path / "out").exists()
    read = journal.stat().st_size // RECORD.itemsize
    assert 0 < read < 400

    again = run(source, "--output_dir", tmp_path / "out")
    assert again.returncode == 0, again.stderr
    assert f"{read}/400" in again.stderr, "what was read before was read again"
    assert contents(tmp_path / "out") == whole
    assert not (tmp_path / "out.partial").exists()


def test_a_run_stopped_while_writing_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_here(source, "--output_dir", tmp_path / "whole") == 0
    with monkeypatch.context() as broken:
        broken.setattr(prepare_dataset, "write_report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run_here(source, "--output_dir", tmp_path / "out") == 130
    assert not (tmp_path / "out").exists()
    with open(tmp_path / "out.partial" / "journal", "ab") as journal:
        journal.write(b"a record that was written in part")
    assert run_here(source, "--output_dir", tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_stopped_run_begins_anew_when_a_source_changed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(prepare_dataset, "mark_duplicates", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run_here(source, "--output_dir", tmp_path / "out") == 130
    picture(70).save(source / "3.png")
    assert run_here(source, "--output_dir", tmp_path / "out") == 0
    assert metadata(tmp_path / "out")["3.png"]["hash"] == picture_rules.pixel_hash(picture(70))


def test_a_full_disk(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as broken:
        broken.setattr(prepare_dataset, "write_png", lambda *_: (_ for _ in ()).throw(full))
        assert run_here(source, "--output_dir", tmp_path / "out") == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert run_here(source, "--output_dir", tmp_path / "out") == 0
    assert len(metadata(tmp_path / "out")) == 12


def test_nothing_left(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "notes.txt").write_text("no picture", encoding="utf-8")
    before = snapshot(tmp_path)
    assert run_here(tmp_path / "source", "--output_dir", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert "1 not-an-image" in captured.out and "no picture is left" in captured.err
    assert snapshot(tmp_path) == before


REFUSED = {
    "no such source": (["nowhere", "--output_dir", "out"], "no such folder"),
    "a file as source": (["archive.zip", "--output_dir", "out"], "unpack"),
    "an empty source": (["empty", "--output_dir", "out"], "no file in there"),
    "a source twice": (["source", "source/../source", "--output_dir", "out"], "is given twice"),
    "no source": (["--output_dir", "out"], "SOURCE"),
    "no output": (["source"], "--output_dir"),
    "output inside a source": (["source", "--output_dir", "source/out"], "must lie outside the source"),
    "source inside the output": (["source/inner", "--output_dir", "source"], "must lie outside the source"),
    "output is a source": (["source", "--output_dir", "source"], "must lie outside the source"),
    "output is a file": (["source", "--output_dir", "archive.zip"], "is a file"),
    "output is the current folder": (["source", "--output_dir", "."], "must lie outside"),
    "output of somebody else": (["source", "--output_dir", "full"], "was not prepared by this command"),
    "working folder of somebody else": (["source", "--output_dir", "taken"], "taken.partial"),
    "resolution 0": (["source", "--output_dir", "out", "--resolution", "0"], "--resolution 0"),
    "resolution too large": (["source", "--output_dir", "out", "--resolution", "100000"], "--resolution 100000"),
    "resolution no number": (["source", "--output_dir", "out", "--resolution", "big"], "--resolution"),
    "min_size -1": (["source", "--output_dir", "out", "--min_size", "-1"], "--min_size -1"),
    "holdout 1": (["source", "--output_dir", "out", "--holdout", "1"], "--holdout 1.0"),
    "holdout below 0": (["source", "--output_dir", "out", "--holdout=-0.1"], "--holdout -0.1"),
    "holdout NaN": (["source", "--output_dir", "out", "--holdout", "nan"], "--holdout nan"),
    "num_proc 0": (["source", "--output_dir", "out", "--num_proc", "0"], "--num_proc 0"),
    "unknown rule": (["source", "--output_dir", "out", "--keep", "corrupt"], "--keep"),
    "unknown flag": (["source", "--output_dir", "out", "--size", "64"], "--size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input(
    case: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "source/inner", "full", "taken.partial"):
        Path(folder).mkdir()
    for file in ("archive.zip", "full/thesis.docx", "taken.partial/thesis.docx"):
        Path(file).write_bytes(b"mine")
    before = snapshot(tmp_path)
    arguments, message = REFUSED[case]
    with pytest.raises(SystemExit) as exit:
        prepare_dataset.main(arguments)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert snapshot(tmp_path) == before


def test_without_imagehash(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run_here(source, "--output_dir", tmp_path / "out") == 2
    assert "animeface-pipeline[data]" in capsys.readouterr().err


def test_the_command_needs_no_torch() -> None:
    code = "import sys, animeface_pipeline.prepare_dataset; sys.exit(bool({'torch', 'diffusers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# ---- the real pictures ----


@pytest.mark.slow
def test_every_exact_duplicate_of_the_real_pictures(real_pictures: Path, tmp_path: Path) -> None:
    command = [
        *COMMAND,
        str(real_pictures / "getchu64"),
        str(real_pictures / "fanart96"),
        "--output_dir",
        str(tmp_path),
    ]
    assert subprocess.run(command, timeout=900).returncode == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
    found = {name: (source["files"], source["distinct"]) for name, source in report["sources"].items()}
    assert found == {"getchu64": (26_914, 20_626), "fanart96": (6_000, 5_999)}
    assert report["set_aside"]["exact-duplicate"] == 26_914 - 20_626 + 1
    hashes = {name: perceptual_hashes(tmp_path / name) for name in report["splits"]}
    assert {name: len(of_split) for name, of_split in hashes.items()} == report["splits"]
    assert differing_bits(signs(hashes["validation"]), signs(hashes["train"])).min() > RELATED_BITS


def perceptual_hashes(folder: Path) -> np.ndarray:
    return np.stack([perceptual_hash(Image.open(path)) for path in sorted(folder.glob("*.png"))])
