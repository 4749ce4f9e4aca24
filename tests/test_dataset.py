import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from animeface_pipeline import dataset
from animeface_pipeline.cli import BadInput
from animeface_pipeline.dataset import Batches, load_pictures, to_pixels
from animeface_pipeline.draw_faces import draw_face


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """Seven pictures, some in folders below, some with names that `datasets` would take for another split."""
    folder = tmp_path / "test_faces"
    names = ["1.png", "test_2.png", "a/3.png", "a/validation/4.jpg", "b c/5.webp", "train.png", "ü.png"]
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        draw_face(seed, 32).save(folder / name)
    (folder / "notes.txt").write_text("not a picture")
    return folder


def load(folder: Path, tmp_path: Path, **kwargs: object) -> torch.Tensor:
    return load_pictures(str(folder), resolution=16, cache_dir=tmp_path / "cache", show_progress=False, **kwargs)


# ---- the cache ----


def test_every_picture_below_the_folder_is_decoded(faces: Path, tmp_path: Path) -> None:
    pictures = load(faces, tmp_path)
    assert pictures.shape == (7, 3, 16, 16) and pictures.dtype == torch.uint8
    expected = {to_pixels(path, 16) for path in faces.rglob("*") if path.suffix in (".png", ".jpg", ".webp")}
    assert {picture.numpy().tobytes() for picture in pictures} == expected


def test_a_folder_may_have_any_name_and_hold_other_files(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "faces [1] {a}*"
    folder.mkdir()
    for name in ("a.png", "b[0].png", "no_suffix"):
        draw_face(len(name), 32).save(folder / name, "PNG")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "the only one that is named here"}')
    (folder / "notes.txt").write_text("not a picture")
    for name in (".hidden", ".git/config", "__MACOSX/a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("of other programs")
    monkeypatch.chdir(tmp_path)
    assert len(load(Path(folder.name), tmp_path)) == 2
    expected = "left out 2 files whose names do not end as pictures' do: no_suffix; notes.txt"
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize("name", ["faces/a::b.png", "fa::ces/a.png"])
def test_a_name_that_datasets_cannot_read_is_named(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.parent.mkdir()
    draw_face(0, 16).save(file)
    with pytest.raises(BadInput, match=r"cannot read a name with :: in it; rename .*::"):
        load(file.parent, tmp_path)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((16, 16), 32768, np.uint16)).save(tmp_path / "grey.png")
    assert set(to_pixels(tmp_path / "grey.png", 16)) == {128}


def test_an_empty_row_of_a_data_set_is_skipped_and_numbered(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    faces = [draw_face(k, 16) if k != 300 else None for k in range(302)]
    rows = datasets.Dataset.from_dict({"image": faces}, features=datasets.Features({"image": datasets.Image()}))
    rows.to_parquet(tmp_path / "hub" / "train.parquet")
    pictures = load_pictures(
        dataset_name=str(tmp_path / "hub"), resolution=16, cache_dir=tmp_path / "cache", show_progress=False
    )
    assert len(pictures) == 301
    assert "skipped 1 pictures that cannot be decoded: picture 300: Unidentified" in capsys.readouterr().out


def test_the_cache_is_used_again_and_made_anew_when_the_folder_or_the_settings_change(
    faces: Path, tmp_path: Path
) -> None:
    load(faces, tmp_path)
    (first,) = (tmp_path / "cache").iterdir()
    before = (first / "pictures.uint8").stat().st_mtime_ns
    load(faces, tmp_path)
    assert (first / "pictures.uint8").stat().st_mtime_ns == before
    draw_face(99, 32).save(faces / "1.png")
    assert len(load(faces, tmp_path)) == 7 and len(list((tmp_path / "cache").iterdir())) == 2
    load_pictures(str(faces), resolution=8, cache_dir=tmp_path / "cache", show_progress=False)
    (faces / "ü.png").unlink()
    assert len(load(faces, tmp_path)) == 6 and len(list((tmp_path / "cache").iterdir())) == 4


def test_no_more_than_a_chunk_of_encoded_pictures_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []

    class Rows:
        def __len__(self) -> int:
            return 10

        def __getitem__(self, part: slice) -> dict:
            assert len(decoded) == part.start  # all before are done with
            return {"image": [{"path": f"{k}.png", "bytes": None} for k in range(10)[part]]}

    monkeypatch.setattr(dataset, "CHUNK", 4)
    monkeypatch.setattr(dataset, "to_pixels", lambda path, resolution: decoded.append(path) or b"0")
    dataset._decode_all(Rows(), tmp_path / "cache", 16, "rows", show_progress=False)
    assert sorted(decoded) == [f"{k}.png" for k in range(10)]


def test_a_killed_run_leaves_no_broken_cache(faces: Path, tmp_path: Path) -> None:
    code = (
        "import os, sys; import animeface_pipeline.dataset as d\n"
        "d._decode = lambda *args: os.kill(os.getpid(), 9)\n"
        f"d.load_pictures({str(faces)!r}, resolution=16, cache_dir={str(tmp_path / 'cache')!r})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -9
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".part"]
    assert load(faces, tmp_path).shape == (7, 3, 16, 16)


def test_broken_pictures_are_skipped_named_and_counted(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole = (faces / "a/3.png").read_bytes()
    (faces / "cut.png").write_bytes(whole[: len(whole) // 2])
    (faces / "text.jpg").write_text("this is no picture")
    for _ in range(2):  # the second time from the cache
        assert len(load(faces, tmp_path)) == 7
        printed = capsys.readouterr().out
        assert "skipped 2 pictures" in printed and "cut.png" in printed and "text.jpg" in printed


def test_a_train_folder_is_taken_when_there_is_one(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("validation", 2)):
        (tmp_path / "faces" / split).mkdir(parents=True)
        for seed in range(count):
            draw_face(seed, 16).save(tmp_path / "faces" / split / f"{seed}.png")
    assert len(load(tmp_path / "faces", tmp_path)) == 3
    assert len(load(tmp_path / "faces", tmp_path, split="validation")) == 2


def test_a_data_set_in_parquet(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict(
        {"label": [0, 1], "face": [draw_face(0, 32), draw_face(1, 32)]},
        features=datasets.Features({"label": datasets.Value("int64"), "face": datasets.Image()}),
    )
    (tmp_path / "hub").mkdir()
    rows.to_parquet(tmp_path / "hub" / "train-00000-of-00001.parquet")
    pictures = load_pictures(
        dataset_name=str(tmp_path / "hub"), resolution=32, cache_dir=tmp_path, show_progress=False
    )
    assert np.array_equal(pictures[1].permute(1, 2, 0).numpy(), np.asarray(draw_face(1, 32)))
    rows.remove_columns("face").to_parquet(tmp_path / "hub" / "train-00000-of-00001.parquet")
    with pytest.raises(BadInput, match="no column of pictures, only label"):
        load_pictures(dataset_name=str(tmp_path / "hub"), cache_dir=tmp_path, show_progress=False)


def test_decoding_is_upright_over_white_and_square() -> None:
    def pixels(picture: Image.Image, size: int, **save: object) -> np.ndarray:
        import io

        file = io.BytesIO()
        picture.save(file, **{"format": "PNG", **save})
        return np.frombuffer(to_pixels(file, size), np.uint8).reshape(3, size, size)

    half_transparent = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (pixels(half_transparent, 8) == 255).all()
    wide = Image.new("RGB", (32, 8), "black")
    wide.paste((255, 255, 255), (12, 0, 20, 8))  # only the middle is kept
    assert (pixels(wide, 8) == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    top_red = Image.new("RGB", (8, 8), "blue")
    top_red.paste((255, 0, 0), (0, 0, 8, 4))
    assert pixels(top_red, 8, exif=exif)[0, -1, 0] == 255
    assert pixels(Image.new("L", (8, 8), 7), 4).tolist() == np.full((3, 4, 4), 7).tolist()


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="give either --train_data_dir"):
        load_pictures(cache_dir=tmp_path)
    with pytest.raises(BadInput, match="nowhere: no such folder"):
        load_pictures("nowhere", cache_dir=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="empty: no pictures"):
        load_pictures(str(tmp_path / "empty"), cache_dir=tmp_path)
    (tmp_path / "empty" / "notes.txt").write_text("hello")
    with pytest.raises(BadInput, match="empty: no pictures"):
        load_pictures(str(tmp_path / "empty"), cache_dir=tmp_path)
    (tmp_path / "empty" / "broken.png").write_text("hello")
    with pytest.raises(BadInput, match=r"none of its 1 pictures can be decoded.*broken\.png"):
        load_pictures(str(tmp_path / "empty"), cache_dir=tmp_path)
    with pytest.raises(BadInput, match=r"--dataset_name .*nothing: cannot be read"):
        load_pictures(dataset_name=str(tmp_path / "nothing"), cache_dir=tmp_path)


# ---- the batches ----


def numbered(count: int) -> torch.Tensor:
    """Pictures that can be told apart, and their mirror images too: the left column holds the number."""
    pictures = torch.zeros(count, 3, 4, 4, dtype=torch.uint8)
    pictures[:, :, :, 0] = torch.arange(1, count + 1, dtype=torch.uint8).view(-1, 1, 1)
    return pictures


def numbers(batches: list) -> list[int]:
    return [round(value * 255) for batch in batches for value in batch.clean.amax((1, 2, 3)).tolist()]


def test_an_epoch_shows_every_picture_once_in_a_new_order() -> None:
    batches = Batches(numbered(10), train_batch_size=4, seed=3)
    assert batches.steps_per_epoch == 3
    epochs = [[numbers(batches.of_step(3 * epoch + step)) for step in range(3)] for epoch in range(2)]
    assert [len(step) for step in epochs[0]] == [4, 4, 2]  # the last one is smaller, as the original's
    for epoch in epochs:
        assert sorted(number for step in epoch for number in step) == list(range(1, 11))
    assert epochs[0] != epochs[1]


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    first, second = Batches(numbered(10), 4, seed=3), Batches(numbered(10), 4, seed=3)
    for step in (0, 1, 2):
        first.of_step(step)
    for one, two in zip(first.of_step(4), second.of_step(4)):
        for name in ("clean", "noise", "timesteps"):
            assert torch.equal(getattr(one, name), getattr(two, name))
    other = Batches(numbered(10), 4, seed=4).of_step(4)[0]
    assert not torch.equal(other.noise, second.of_step(4)[0].noise)


@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_processes_and_accumulation_share_the_same_update(processes: int, accumulation: int) -> None:
    size = 8 // processes // accumulation
    alone = Batches(numbered(20), 8, seed=0)
    shares = [
        Batches(
            numbered(20),
            size,
            seed=0,
            gradient_accumulation_steps=accumulation,
            num_processes=processes,
            process_index=index,
        )
        for index in range(processes)
    ]
    for step in range(2 * alone.steps_per_epoch):  # 8, 8, 4 pictures, twice
        (whole,) = alone.of_step(step)
        parts = [share.of_step(step) for share in shares]
        for name in ("clean", "noise", "timesteps"):
            joined = torch.cat([getattr(batch, name) for part in parts for batch in part])
            assert torch.equal(joined, getattr(whole, name)), (step, name)
        for part in parts:
            assert sum(batch.weight for batch in part) == pytest.approx(1)


def test_value_range_and_flips() -> None:
    pictures = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    unit = Batches(pictures, 3, seed=0).of_step(0)[0].clean
    assert sorted(unit[:, 0, 0, 0].tolist()) == pytest.approx([0.0, 0.2, 1.0])
    signed = Batches(pictures, 3, seed=0, value_range=(-1, 1)).of_step(0)[0].clean
    assert sorted(signed[:, 0, 0, 0].tolist()) == pytest.approx([-1.0, -0.6, 1.0])
    batches = Batches(numbered(200), 200, seed=0)
    mirrored = (batches.of_step(0)[0].clean[:, 0, 0, 3] > 0).sum().item()
    assert 70 < mirrored < 130
    still = Batches(numbered(200), 200, seed=0, random_flip=False)
    assert (still.of_step(0)[0].clean[:, 0, 0, 3] > 0).sum() == 0


def test_the_index_of_a_cache_is_readable(faces: Path, tmp_path: Path) -> None:
    load(faces, tmp_path)
    (folder,) = (tmp_path / "cache").iterdir()
    assert json.loads((folder / "index.json").read_text(encoding="utf-8")) == {"num_pictures": 7, "skipped": []}
    assert os.path.getsize(folder / "pictures.uint8") == 7 * 3 * 16 * 16
