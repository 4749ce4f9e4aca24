"""What a person looks at during a run: validation loss, trackers, curves, strips."""

import importlib.util
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from conftest import tiny_unet
from PIL import Image
from trainer import TINY_RECIPE, Trainer, make_faces, reset_accelerate

from animeface_pipeline.cli import BadInput
from animeface_pipeline.config import TrainingConfig, load_recipe, parse_args
from animeface_pipeline.curves import draw_curves
from animeface_pipeline.schedulers import original_scheduler
from animeface_pipeline.training import build_batches
from animeface_pipeline.validation import Validation, build_validation


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(tmp_path)


@pytest.fixture
def split_faces(tmp_path: Path) -> Path:
    """train/ with 6 faces and validation/ with 5 others."""
    make_faces(tmp_path / "split" / "train", 6)
    make_faces(tmp_path / "split" / "validation", 11)
    for seed in range(6):
        (tmp_path / "split" / "validation" / f"{seed}.png").unlink()
    return tmp_path / "split"


# ---- validation ----


def test_the_held_out_split_is_measured_with_live_and_averaged_weights(trainer: Trainer, split_faces: Path) -> None:
    flags = ("--train_data_dir", split_faces, "--max_train_steps", 5, "--validation_steps", 2, "--logging_steps", 3)
    assert trainer(*flags) == 0
    log = trainer.log()
    assert [entry["step"] for entry in log] == [2, 3, 4, 5]  # a line for every validation, and every third
    measured = {entry["step"]: entry for entry in log if "validation_loss" in entry}
    assert list(measured) == [2, 4, 5]
    assert all(0 < entry["validation_loss"] < 3 for entry in measured.values())
    assert all(entry["validation_loss"] != entry["validation_loss_ema"] for entry in measured.values())


def test_without_a_held_out_split_nothing_is_invented(trainer: Trainer) -> None:
    assert trainer("--max_train_steps", 2, "--validation_steps", 1) == 0
    assert not any("validation_loss" in entry for entry in trainer.log())


def test_looking_changes_nothing_of_the_training(trainer: Trainer, split_faces: Path, tmp_path: Path) -> None:
    for often in (1, 100):
        flags = ("--train_data_dir", split_faces, "--validation_steps", often, "--output_dir", tmp_path / str(often))
        assert trainer(*flags, "--max_train_steps", 4) == 0
    assert [e["loss"] for e in trainer.log(tmp_path / "1")] == [e["loss"] for e in trainer.log(tmp_path / "100")]


def test_the_validation_loss_has_the_same_noise_whatever_the_batch_size() -> None:
    torch.manual_seed(0)
    unet, scheduler, pictures = tiny_unet().eval(), original_scheduler(), torch.arange(7 * 3 * 256) % 256
    pictures = pictures.view(7, 3, 16, 16).to(torch.uint8)
    losses = []
    for size in (2, 7):
        config = TrainingConfig(**{**load_recipe("original"), **TINY_RECIPE, "train_batch_size": size})
        losses.append(Validation(pictures, config, Accelerator(cpu=True), scheduler).loss(unet))
        reset_accelerate()
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_fewer_pictures_than_processes(split_faces: Path, tmp_path: Path) -> None:
    """Held out, they are left alone; to train on, they are refused."""
    printed: list[str] = []
    of_many = SimpleNamespace(
        num_processes=8,
        process_index=0,
        device=torch.device("cpu"),
        local_main_process_first=nullcontext,
        is_local_main_process=False,
        print=printed.append,
    )
    Accelerator(cpu=True)
    flags = ["--train_data_dir", str(split_faces), "--resolution", "16", "--cache_dir", str(tmp_path / "cache")]
    config = parse_args(flags, description="")
    assert build_validation(config, of_many, original_scheduler()) is None
    assert printed == ["5 held-out pictures are too few for 8 processes"]
    with pytest.raises(BadInput, match="6 pictures are too few for 8 processes"):
        build_batches(config, of_many, original_scheduler())


# ---- trackers ----


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs" / "animeface-pipeline"))
    events.Reload()
    assert {"samples", "strips"} <= set(events.Tags()["images"])
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_what_the_log_says_once_also_after_a_resume(trainer: Trainer) -> None:
    assert trainer("--report_to", "tensorboard", "--max_train_steps", 3) == 0  # its last checkpoint is at update 2
    assert trainer("--report_to", "tensorboard", "--resume_from_checkpoint", "latest") == 0
    scalars, log = read_events(trainer.output), trainer.log()
    assert [step for step, _ in scalars["loss"]] == [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [value for _, value in scalars[key]] == pytest.approx([entry[key] for entry in log], rel=1e-6)
    assert "loss_quartile_1" in scalars and "memory_gib" in scalars

    assert trainer("--overwrite_output_dir", "--max_train_steps", 1) == 0  # what trackers wrote is ours to remove
    assert not (trainer.output / "logs").exists()


def test_a_tracker_that_is_not_installed_is_one_line(
    trainer: Trainer, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("wandb", "all"):
        assert trainer("--report_to", name) == 2
        printed = capsys.readouterr().err
        assert printed.startswith(f"error: --report_to {name}: ") and "pip install" in printed
    assert not trainer.output.exists()


def test_a_tracker_that_does_not_start_is_one_line(
    trainer: Trainer, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(tracker: object) -> None:
        raise RuntimeError("nobody is logged in")

    monkeypatch.setattr(TensorBoardTracker, "start", refuse)
    assert trainer("--report_to", "tensorboard") == 2
    assert capsys.readouterr().err.endswith("cannot start (RuntimeError: nobody is logged in)\n")


# ---- pictures ----


def test_every_grid_has_the_strips_and_the_curves_beside_it(trainer: Trainer) -> None:
    assert trainer("--ddpm_num_inference_steps", 3) == 0
    with Image.open(trainer.output / "samples" / "step-00000006-strips.png") as strips:
        assert strips.size == (3 * 16, 4 * 16)  # as many stages as steps, a strip for each of the four pictures
        last_stages = [strips.crop((32, 16 * k, 48, 16 * k + 16)) for k in range(4)]
    with Image.open(trainer.output / "samples" / "step-00000006.png") as grid:
        finished = [grid.crop((16 * x, 16 * y, 16 * x + 16, 16 * y + 16)) for y in (0, 1) for x in (0, 1)]
    assert [picture.tobytes() for picture in last_stages] == [picture.tobytes() for picture in finished]
    with Image.open(trainer.output / "curves.png") as curves:
        assert curves.format == "PNG" and curves.width > 600 and curves.getcolors(100_000)


def test_an_empty_log_is_an_empty_picture() -> None:
    assert draw_curves([]).startswith(b"\x89PNG")


def test_curves_show_what_there_is(tmp_path: Path) -> None:
    few = draw_curves([{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "validation_loss": math.nan}])
    entry = {"loss": 0.5, "loss_by_quartile": [0.4, None, 0.2, 0.1], "grad_norm": 1.0, "memory_gib": 2.0}
    many = draw_curves([{"step": step, **entry} for step in range(1, 2000)])
    sizes = []
    for number, data in enumerate((few, many)):
        (tmp_path / f"{number}.png").write_bytes(data)
        with Image.open(tmp_path / f"{number}.png") as picture:
            sizes.append(picture.height)
    assert sizes[0] < sizes[1]  # one panel; two rows of them


def test_a_grid_before_the_first_line_of_the_log_brings_one(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, logging_steps=100, max_train_steps=7, save_images_epochs=1)
    assert trainer() == 0
    assert [entry["step"] for entry in trainer.log()] == [3, 6, 7]
    assert (trainer.output / "curves.png").is_file()
