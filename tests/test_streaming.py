"""Training on pictures that are read while it goes on."""

import io
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from trainer import Trainer

from animeface_pipeline import streaming
from animeface_pipeline.config import parse_args
from animeface_pipeline.dataset import NoSuchSplit
from animeface_pipeline.draw_faces import draw_face
from animeface_pipeline.streaming import StreamedBatches, build_streamed_batches


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    draw_face(seed, 16).save(buffer, "PNG")
    return buffer.getvalue()


def write_shards(folder: Path, pictures: list[bytes], split: str = "train", shards: int = 3) -> Path:
    """Parquet files as on the Hub: a column of encoded pictures, in several files."""
    folder.mkdir(exist_ok=True)
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": data, "path": f"{split}-{k}.png"} for k, data in enumerate(pictures)]}
    ).cast_column("image", datasets.Image())
    for k in range(shards):
        rows.shard(shards, k, contiguous=True).to_parquet(folder / f"{split}-{k:05d}-of-{shards:05d}.parquet")
    return folder


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BLOCK_SIZE", 8)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards", [png(seed) for seed in range(32)])


def batches_of(folder: Path, steps: int = 32, **options: object) -> StreamedBatches:
    argv = ["--dataset_name", str(folder), "--streaming", "--max_train_steps", str(steps), "--resolution", "16"]
    config = parse_args([*argv, "--train_batch_size", "2"], description="")
    usual = {"gradient_accumulation_steps": 1, "num_processes": 1, "process_index": 0, "random_flip": False}
    return build_streamed_batches(config, **{**usual, **options})


def seen(batches: StreamedBatches, steps: range) -> list[bytes]:
    parts = [batches.of_step(step)[0].clean for step in steps]
    return [picture.numpy().tobytes() for part in parts for picture in part]


def test_an_epoch_of_the_stream_is_every_picture_once_and_the_next_one_has_another_order(
    shards: Path, small_blocks: None
) -> None:
    pictures = seen(batches_of(shards), range(32))
    assert set(Counter(pictures[:32]).values()) == {1}
    assert set(Counter(pictures).values()) == {2} and pictures[:32] != pictures[32:]


def test_two_processes_share_the_stream(shards: Path, small_blocks: None) -> None:
    batches = [batches_of(shards, num_processes=2, process_index=k) for k in (0, 1)]
    assert batches[0].total_batch_size == 4
    shares = [set(seen(each, range(7))) for each in batches]
    assert len(shares[0]) == len(shares[1]) == 14 and not shares[0] & shares[1]


@pytest.mark.parametrize("stopped_after", [1, 4, 17])  # within a block, at its end, in the second epoch
def test_a_stream_goes_on_at_the_exact_picture(shards: Path, small_blocks: None, stopped_after: int) -> None:
    whole = seen(batches_of(shards), range(24))
    first, second = batches_of(shards), batches_of(shards)
    assert seen(first, range(stopped_after)) == whole[: 2 * stopped_after]
    second.load_state_dict(first.state_dict())
    assert seen(second, range(stopped_after, 24)) == whole[2 * stopped_after :]


@pytest.mark.parametrize("ends", [(6, 16), (5, 6, 16), (16, 7, 16)])  # a block has four updates
def test_a_stream_goes_on_at_the_exact_picture_with_another_number_of_updates(
    ends: tuple[int, ...], shards: Path, small_blocks: None
) -> None:
    pictures, done, state = [], 0, None
    for end in ends:
        batches = batches_of(shards, end)
        if state is not None:
            batches.load_state_dict(state)
        stop = min(end, 5) if end == max(ends) and state is None else end
        pictures += seen(batches, range(done, stop))
        done, state = stop, batches.state_dict()
    assert len(pictures) == 32 and set(Counter(pictures).values()) == {1}


def test_a_run_resumed_from_a_stream_ends_with_the_same_weights(tmp_path: Path, shards: Path) -> None:
    trainer = Trainer(tmp_path)
    flags = ("--dataset_name", shards, "--streaming", "--max_train_steps", 6)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert trainer(*flags, "--output_dir", whole) == 0
    process = trainer.start(*flags, "--output_dir", resumed)
    for _ in process.stdout:
        if (resumed / "checkpoint-2").is_dir():
            process.kill()
            break
    process.wait(timeout=60)
    assert trainer(*flags, "--output_dir", resumed, "--resume_from_checkpoint", "latest") == 0
    assert trainer.log(whole) == trainer.log(resumed)
    weights = [load_file(folder / "unet/diffusion_pytorch_model.safetensors") for folder in (whole, resumed)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_broken_picture_in_a_stream_is_named_and_another_takes_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pictures = [png(seed) for seed in range(9)] + [png(9)[:100]]
    write_shards(tmp_path / "shards", pictures, shards=1)
    write_shards(tmp_path / "shards", [png(seed) for seed in range(20, 24)], "validation", shards=1)
    trainer = Trainer(tmp_path)
    assert trainer("--dataset_name", tmp_path / "shards", "--streaming", "--max_train_steps", 3) == 0
    said = capsys.readouterr()
    assert "skipped train-9.png: " in said.err and "pictures: a stream from" in said.out
    assert "validation_loss" in trainer.log()[-1]


def test_an_image_folder_can_be_streamed_too_whatever_its_files_are_called(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    (trainer.faces / "hair").mkdir()
    for name in ("eval_1.png", "hair/test-2.png"):  # by which `datasets` would tell splits
        (trainer.faces / name).write_bytes(png(20))
    assert trainer("--streaming", "--max_train_steps", 2) == 0
    config = parse_args([*trainer.argv(), "--streaming"], description="")
    assert len(list(streaming.open_stream(config, "train"))) == 12
    with pytest.raises(NoSuchSplit, match="no folders train and validation"):
        streaming.open_stream(config, "validation")


def test_a_stream_that_cannot_be_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trainer, empty = Trainer(tmp_path), tmp_path / "empty"
    empty.mkdir()
    for flags, said in (
        ((), "say how many updates with --max_train_steps"),
        (("--dataset_name", empty, "--max_train_steps", 2), "cannot be read"),
        (("--train_data_dir", tmp_path / "none", "--max_train_steps", 2), "no such folder"),
    ):
        assert trainer("--streaming", *flags) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and said in printed and printed.count("\n") == 1
