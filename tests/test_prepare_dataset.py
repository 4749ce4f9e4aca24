import errno
import functools
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
from PIL import Image, ImageCms, ImageDraw, ImageFilter, ImageOps

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
from animeface_pipeline.prepare_dataset import RECORD, mark_duplicates, split

COMMAND = [sys.executable, "-m", "animeface_pipeline.prepare_dataset"]
ORIENTATION = 0x0112  # the EXIF tag
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def picture(seed: int, size: tuple[int, int] = (80, 80)) -> Image.Image:
    """A smooth, colourful picture; the perceptual hashes of two seeds differ in more than 64 bits."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (7, 7, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)


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


def checked_noise() -> Image.Image:
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
    "noise.png": (encoded(checked_noise(), "PNG"), "near-blank"),
    "transparent.png": (encoded(Image.new("RGBA", (80, 80), (255, 0, 0, 0)), "PNG"), "near-blank"),
    "grey.png": (encoded(picture(40).convert("L"), "PNG"), "near-monochrome"),
    "grey as colour.jpg": (encoded(picture(41).convert("L").convert("RGB"), "JPEG"), "near-monochrome"),
    "sepia.png": (encoded(sepia(42), "PNG"), "near-monochrome"),
    "line art.png": (encoded(picture(43).convert("1"), "PNG"), "near-monochrome"),
    # copies; the best of each stands in the second source, see `test_copies_across_sources`
    "copy of best.bmp": (encoded(picture(1000, (200, 200)), "BMP"), "exact-duplicate"),
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
    before: list[dict]
    after: list[dict]


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
        picture(seed, (200, 200)).save(good / f"{seed}.png")
    if os.name == "posix":
        (kinds / "deep" / "back up").symlink_to(kinds, target_is_directory=True)
        with open(os.fsencode(good) + b"/not unicode \xff.png", "wb") as file:
            file.write(encoded(picture(90), "PNG"))
    before = [snapshot(kinds), snapshot(good)]
    process = run(kinds, good, "--output_dir", root / "out")
    return Run([kinds, good], root / "out", process, before, [snapshot(kinds), snapshot(good)])


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
    assert odd.before == odd.after, "a source was changed"
    assert not odd.output.with_name("out.partial").exists()
    assert sorted(path.name for path in odd.output.iterdir()) == ["report", "train", "validation"]
    if os.name == "posix":
        assert "not unicode ?.png" in metadata(odd.output)
        assert not any("back up" in name for name in [*metadata(odd.output), *set_aside(odd.output)])


def test_copies_across_sources(odd: Run) -> None:
    best = {"source": "good", "original_name": "1000.png"}
    copies = {name: entry for name, entry in set_aside(odd.output).items() if "kept_instead" in entry}
    assert len(copies) == 6
    assert all(entry["kept_instead"] == best for entry in copies.values())
    assert "1000.png" in metadata(odd.output)


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
    assert originals["good", "1000.png"] == picture_rules.pixel_hash(picture(1000, (200, 200)))


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
    assert page.count("data:image/jpeg;base64,") > 60
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


def keyed_palette() -> Image.Image:
    image = Image.new("P", (80, 80), 1)
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255])
    image.paste(2, (0, 0, 40, 80))
    image.paste(0, (0, 0, 80, 40))
    return image


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
    "P with a transparent colour": (
        encoded(keyed_palette(), "PNG", transparency=0),
        ImageOps.expand(Image.new("RGB", (80, 0)), (0, 80, 0, 0), "white") if False else None,
        0,
    ),
    "1": (encoded(picture(1).convert("1"), "PNG"), picture(1).convert("1").convert("RGB"), 0),
    "L": (encoded(GREY, "JPEG", quality=100), GREY_RGB, 2),
    "16-bit grey PNG": (encoded(Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), "PNG"), GREY_RGB, 0),
    "dark 16-bit grey PNG": (encoded(Image.fromarray(np.asarray(GREY).astype(np.uint16)), "PNG"), 0 * WIDE[..., None], 1),
    "16-bit grey TIFF": (encoded(Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), "TIFF"), GREY_RGB, 0),
    "16-bit colour PNG": (rgb16(), picture(1), 0),
    "32-bit TIFF of 16-bit values": (encoded(Image.fromarray((WIDE * 65535).astype(np.int32)), "TIFF"), GREY_RGB, 1),
    "32-bit TIFF of 8-bit values": (encoded(Image.fromarray((WIDE * 255).astype(np.int32)), "TIFF"), GREY_RGB, 1),
    "float TIFF, 0 to 1": (encoded(Image.fromarray(WIDE.astype(np.float32)), "TIFF"), GREY_RGB, 1),
    "float TIFF, 0 to 255": (encoded(Image.fromarray((WIDE * 255).astype(np.float32)), "TIFF"), GREY_RGB, 1),
    "CMYK TIFF": (encoded(picture(1).convert("CMYK"), "TIFF"), picture(1), 1),
    "CMYK JPEG": (encoded(picture(1).convert("CMYK"), "JPEG", quality=100, subsampling=0), picture(1), 4),
    "LAB TIFF": (encoded(picture(1).convert("LAB"), "TIFF"), picture(1).convert("LAB").convert("RGB"), 0),
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
    "ICC of linear grey": (
        encoded(GREY, "PNG", icc_profile=linear_grey_profile()),
        np.repeat(linear_to_srgb(WIDE)[..., None], 3, axis=2),
        2,
    ),
    "ICC for grey on a colour picture": (encoded(picture(1), "PNG", icc_profile=linear_grey_profile()), picture(1), 0),
    "ICC for colour on a grey picture": (encoded(GREY, "PNG", icc_profile=SRGB), GREY_RGB, 1),
    "MPO": (frames("MPO", 1), Image.open(io.BytesIO(encoded(picture(1), "JPEG"))), 2),
}
