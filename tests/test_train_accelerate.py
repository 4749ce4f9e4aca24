import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from conftest import tiny_unet
from fake_hub import FakeHub
from PIL import Image
from safetensors.torch import load_file
from trainer import PROGRAM, Trainer

from animeface_pipeline import AnimeFacePipeline
from animeface_pipeline.draw_faces import draw_face
from animeface_pipeline.schedulers import original_scheduler


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(tmp_path)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_pictures_in_a_pipeline_out(trainer: Trainer, capsys: pytest.CaptureFixture) -> None:
    assert trainer() == 0
    printed = capsys.readouterr().out
    for said in ("CPU threads", "parameters, 16×16", "10 from", "6 of 4 pictures, 3 an epoch", "recipe:", "EMA on"):
        assert said in printed

    log = trainer.log()
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    assert all(0 < entry["loss"] < 3 and entry["learning_rate"] == 1e-3 for entry in log)
    grids = sorted(path.name for path in (trainer.output / "samples").iterdir())
    assert grids == [f"step-0000000{step}{kind}.png" for step in (3, 6) for kind in ("-strips", "")]
    with Image.open(trainer.output / "samples" / grids[-1]) as grid:
        assert grid.size == (32, 32) and grid.mode == "RGB"

    pipe = AnimeFacePipeline.from_pretrained(trainer.output)
    assert pipe.value_range == (-1.0, 1.0) and pipe.unet.config.sample_size == 16
    assert type(pipe.scheduler).__name__ == "DDPMScheduler"
    checkpoint = trainer.output / "checkpoint-6"
    live = load_file(checkpoint / "model.safetensors")
    assert any(not torch.equal(tensor, live[name]) for name, tensor in weights(trainer.output).items())  # the EMA's
    assert sorted(path.name for path in trainer.output.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_the_last_grid_too_is_drawn_as_the_flags_say(trainer: Trainer) -> None:
    assert trainer("--max_train_steps", 2, "--eval_batch_size", 2) == 0
    (grid,) = (trainer.output / "samples").glob("*[0-9].png")
    with Image.open(grid) as picture:
        assert grid.name == "step-00000002.png" and picture.size == (32, 16)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(trainer: Trainer, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert trainer("--output_dir", tmp_path / name, "--seed", seed, "--max_train_steps", 3) == 0
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)
    assert trainer.log(tmp_path / "a") == trainer.log(tmp_path / "b")


def test_fine_tuning_takes_range_schedule_and_size_from_the_pipeline(trainer: Trainer, tmp_path: Path) -> None:
    assert trainer("--prediction_type", "v_prediction") == 0
    tuned = tmp_path / "tuned"
    recipe = ["--config", "original", "--pretrained_model_name_or_path", trainer.output, "--output_dir", tuned]
    small = ["--train_batch_size", 4, "--eval_batch_size", 1, "--ddpm_num_inference_steps", 1]
    assert trainer(*recipe, *small, "--max_train_steps", 1) == 0
    before, after = AnimeFacePipeline.from_pretrained(trainer.output), AnimeFacePipeline.from_pretrained(tuned)
    assert after.value_range == (-1.0, 1.0) and after.unet.config.sample_size == 16
    assert after.scheduler.config.prediction_type == "v_prediction"
    pairs = zip(before.unet.parameters(), after.unet.parameters())
    assert max((one - two).abs().max().item() for one, two in pairs) < 1e-4  # one step of 1e-5


def test_fine_tuning_a_pipeline_of_a_short_schedule(
    trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    short = AnimeFacePipeline(tiny_unet(), original_scheduler(num_train_timesteps=20))
    short.save_pretrained(tmp_path / "short")
    flags = ["--config", "original", "--pretrained_model_name_or_path", tmp_path / "short", "--max_train_steps", 1]
    assert trainer(*flags, "--ddpm_num_inference_steps", 100) == 2
    assert "--ddpm_num_inference_steps: must be at most 20" in capsys.readouterr().err
    assert trainer(*flags, "--eval_batch_size", 1) == 0
    assert AnimeFacePipeline.from_pretrained(trainer.output).scheduler.config.num_train_timesteps == 20


def test_a_data_set_and_a_network_from_files(trainer: Trainer, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict(
        {"image": [draw_face(seed, 16) for seed in range(4)]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    (tmp_path / "hub").mkdir()
    rows.to_parquet(tmp_path / "hub" / "train-00000-of-00001.parquet")
    network = tmp_path / "network.json"
    network.write_text(json.dumps({"block_out_channels": [16], "attention_levels": [False], "norm_num_groups": 16}))
    flags = ["--dataset_name", tmp_path / "hub", "--model_config_name_or_path", network, "--max_train_steps", 1]
    assert trainer(*flags) == 0
    assert AnimeFacePipeline.from_pretrained(trainer.output).unet.config.block_out_channels == [16]
    again = ["--model_config_name_or_path", trainer.output, "--output_dir", tmp_path / "again"]
    assert trainer(*again, "--max_train_steps", 1) == 0
    assert AnimeFacePipeline.from_pretrained(tmp_path / "again").unet.config.block_out_channels == [16]


def test_training_runs_to_the_end_with_corrupt_files_in_the_folder(
    trainer: Trainer, capsys: pytest.CaptureFixture
) -> None:
    (trainer.faces / "empty.png").write_bytes(b"")
    (trainer.faces / "cut.png").write_bytes((trainer.faces / "1.png").read_bytes()[:200])
    assert trainer("--max_train_steps", 2) == 0
    printed = capsys.readouterr().out
    assert "skipped 2 pictures" in printed and "cut.png" in printed and "10 from" in printed


# ---- the output folder ----


def test_an_output_folder_that_holds_something_else_is_never_touched(
    trainer: Trainer, capsys: pytest.CaptureFixture
) -> None:
    trainer.output.mkdir()
    (trainer.output / "thesis.txt").write_text("mine")
    for flags in ([], ["--overwrite_output_dir"], ["--resume_from_checkpoint", "latest"]):
        assert trainer(*flags) == 2
        assert "holds something that is not a training run" in capsys.readouterr().err
    assert [path.name for path in trainer.output.iterdir()] == ["thesis.txt"]


def test_overwriting_removes_only_what_a_former_run_wrote(trainer: Trainer, capsys: pytest.CaptureFixture) -> None:
    assert trainer() == 0
    (trainer.output / "samples" / "mine.png").write_text("mine")
    (trainer.output / "notes.txt").write_text("mine")
    (trainer.output / "empty").mkdir()
    (trainer.output / "assets" / "mine.png").write_text("mine")
    (trainer.output / "checkpoint-99").mkdir()
    (trainer.output / "checkpoint-99" / "mine").write_text("mine")
    pictures = {path: path.read_bytes() for path in (trainer.output / "assets").iterdir()}
    (trainer.output / "README.md").write_text("a card that I wrote myself")
    assert trainer() == 2
    assert "add --resume_from_checkpoint latest" in capsys.readouterr().err
    assert trainer("--overwrite_output_dir", "--max_train_steps", 1) == 0
    assert (trainer.output / "samples" / "mine.png").read_text() == "mine"
    assert (trainer.output / "notes.txt").read_text() == "mine"
    assert (trainer.output / "empty").is_dir() and (trainer.output / "checkpoint-99" / "mine").is_file()
    assert all(path.read_bytes() == data for path, data in pictures.items())  # of the card, which stays
    assert (trainer.output / "README.md").read_text() == "a card that I wrote myself"
    assert not (trainer.output / "checkpoint-6").exists()
    assert not (trainer.output / "samples" / "step-00000006.png").exists()
    assert len(trainer.log()) == 1


def test_a_second_trainer_on_the_same_folder_is_refused(trainer: Trainer, capsys: pytest.CaptureFixture) -> None:
    from filelock import FileLock

    with FileLock(f"{trainer.output}.lock"):
        assert trainer() == 2
    assert "another trainer is writing to it" in capsys.readouterr().err
    assert not trainer.output.exists()


# ---- bad input: one line, exit code 2, nothing written ----


def text_file(trainer: Trainer) -> Path:
    file = trainer.folder / "file.json"
    file.write_text("[1, 2]")
    return file


def latin_recipe(trainer: Trainer) -> Path:
    file = trainer.folder / "latin.yaml"
    file.write_bytes("# für alle\n".encode("latin-1"))
    return file


def grey_network(trainer: Trainer) -> Path:
    file = trainer.folder / "grey.json"
    file.write_text(
        '{"block_out_channels": [16], "attention_levels": [false], "norm_num_groups": 16, "in_channels": 1}'
    )
    return file


BAD_INPUT = {
    "no such folder": (lambda t: ["--train_data_dir", "nowhere"], "--train_data_dir nowhere: no such folder"),
    "no pictures": (lambda t: ["--train_data_dir", t.folder / "cache"], "no such folder"),
    "two sources": (lambda t: ["--dataset_name", "x", "--train_data_dir", t.faces], "give either"),
    "output is a file": (lambda t: ["--output_dir", text_file(t)], "is a file"),
    "no such recipe": (lambda t: ["--config", "huge"], "--config huge: no such recipe"),
    "a flag out of range": (lambda t: ["--learning_rate", "nan"], "--learning_rate nan"),
    "resolution that cannot be halved": (lambda t: ["--resolution", 17], "sample_size=17"),
    "no such pipeline": (lambda t: ["--pretrained_model_name_or_path", "./nowhere"], "./nowhere: no such folder"),
    "no such network": (lambda t: ["--model_config_name_or_path", "./nowhere"], "./nowhere"),
    "a network that is a list": (lambda t: ["--model_config_name_or_path", text_file(t)], "one JSON object"),
    "no such checkpoint": (lambda t: ["--resume_from_checkpoint", "checkpoint-9"], "no readable checkpoint.json"),
    "a recipe in Latin-1": (lambda t: ["--config", latin_recipe(t)], "latin.yaml: not UTF-8 text"),
    "a network for grey pictures": (lambda t: ["--model_config_name_or_path", grey_network(t)], "in_channels is 1"),
    "a solver that cannot": (
        lambda t: ["--prediction_type", "sample", "--eval_scheduler", "euler-ancestral"],
        "--eval_scheduler: scheduler 'euler-ancestral'",
    ),
    "output below a file": (lambda t: ["--output_dir", text_file(t) / "out"], "cannot be written"),
    "output with a long name": (lambda t: ["--output_dir", t.folder / ("x" * 300)], "cannot be written"),
    "cache below a file": (lambda t: ["--cache_dir", text_file(t) / "cache"], "--cache_dir"),
    "a name, but no push": (lambda t: ["--hub_model_id", "user/faces"], "add it"),
    "go on, and begin anew": (
        lambda t: ["--resume_from_checkpoint", "latest", "--overwrite_output_dir"],
        "give one of them",
    ),
    "a stream of nothing": (
        lambda t: ["--streaming", "--dataset_name", "x", "--train_data_dir", t.faces],
        "give either",
    ),
    "unknown flag": (lambda t: ["--epochs", 3], "unrecognized arguments"),
}


@pytest.mark.parametrize(("flags", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_gets_one_line(flags: object, message: str, trainer: Trainer, capsys: pytest.CaptureFixture) -> None:
    assert trainer(*flags(trainer)) == 2
    last = capsys.readouterr().err.rstrip("\n").splitlines()
    assert message in last[-1] and not any("Traceback" in line for line in last)
    assert not trainer.output.exists() and not Path(f"{trainer.output}.lock").exists()


def test_a_full_gpu_is_answered_with_what_to_change(
    trainer: Trainer, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sys.path.insert(0, str(PROGRAM.parent))
    import train_accelerate

    def no_memory(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train_accelerate, "diffusion_loss", no_memory)
    assert trainer() == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    for flag in ("--train_batch_size", "--gradient_accumulation_steps", "--gradient_checkpointing"):
        assert flag in printed


def test_an_nvidia_card_that_torch_cannot_use_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from animeface_pipeline.training import unused_gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    assert unused_gpu() is None
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/proc/driver/nvidia/version")
    assert "there is an NVIDIA card, but torch" in unused_gpu()


def test_under_accelerate_launch(trainer: Trainer) -> None:
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--quiet")
    ran = trainer.start("--max_train_steps", 1, launcher=launch)
    printed, _ = ran.communicate(timeout=200)
    assert ran.returncode == 0, printed
    refused = trainer.start("--max_train_steps", 1, launcher=launch)
    printed, _ = refused.communicate(timeout=200)
    assert refused.returncode == 1 and "holds a run; add --resume_from_checkpoint latest" in printed
    assert "Traceback" not in printed


def test_the_pipeline_is_pushed_at_the_end_and_a_failure_costs_nothing_but_the_push(
    trainer: Trainer, tmp_path: Path
) -> None:
    flags = ["--max_train_steps", 2, "--push_to_hub", "--hub_model_id", "user/faces", "--hub_private_repo"]
    with FakeHub() as hub:
        env = hub.env(tmp_path / "hf_home")
        ran = trainer.start(*flags, **env)
        printed, _ = ran.communicate(timeout=200)
        assert ran.returncode == 0, printed
        pushed = set(hub.files("user/faces"))
        assert {"README.md", "assets/samples.png", "assets/loss_curve.png", "unet/unet_animeface.py"} <= pushed
        assert not any("checkpoint" in name or "log" in name or name == "run.json" for name in pushed)
        assert hub.repo("user/faces").private
        card = hub.files("user/faces")["README.md"].decode()
        assert "user/faces" in card and "10" in card and str(tmp_path) not in card

        hub.fail("POST .*/commit/.*", status=403)
        ran = trainer.start("--output_dir", tmp_path / "second", *flags, **env)
        printed, _ = ran.communicate(timeout=200)
    assert ran.returncode == 3, printed
    assert "python -m animeface_pipeline.hub" in printed.splitlines()[-1] and "Traceback" not in printed
    assert AnimeFacePipeline.from_pretrained(tmp_path / "second").unet.config.sample_size == 16


def test_a_name_that_the_hub_would_refuse_is_refused_before_training(
    trainer: Trainer, capsys: pytest.CaptureFixture
) -> None:
    assert trainer("--push_to_hub", "--hub_model_id", "not a name") == 2
    assert "--hub_model_id not a name" in capsys.readouterr().err and not trainer.output.exists()


def test_help_reads_as_a_manual() -> None:
    ran = subprocess.run([sys.executable, str(PROGRAM), "--help"], capture_output=True, text=True)
    assert ran.returncode == 0 and "accelerate launch train_accelerate.py --train_data_dir" in ran.stdout
    assert "(default: 64)" in ran.stdout
