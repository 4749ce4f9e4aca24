"""Two processes (gloo on the CPU) train on the same thing as one with the same total batch."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from test_resume import FULL_DISK
from torch.distributed.checkpoint.api import CheckpointException
from trainer import TINY_RECIPE, Trainer, make_faces

from animeface_pipeline.run_folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
TWO_PROCESSES = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
FSDP2 = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/fsdp2.yaml")
LAUNCHERS = {
    "DDP": {"launcher": TWO_PROCESSES, "ACCELERATE_USE_CPU": "true"},
    "FSDP2": {"launcher": FSDP2, "program": ROOT / "tests" / "fsdp_on_cpu.py", "cwd": ROOT},
}


OWN_FOLDER = """
import os, sys
sys.path.insert(0, {root!r})
import animeface_pipeline.run_folder as run_folder, train_accelerate
run_folder.SEEN_WITHIN = 1
os.makedirs(os.path.join({folder!r}, os.environ["RANK"]), exist_ok=True)
os.chdir(os.path.join({folder!r}, os.environ["RANK"]))
train_accelerate.main(sys.argv[1:])
"""


def run(trainer: Trainer, how: str, *flags: object) -> str:
    process = trainer.start(*flags, **LAUNCHERS[how])
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed
    return printed


def assert_close_logs(one: list[dict], two: list[dict]) -> None:
    assert [entry["step"] for entry in one] == [entry["step"] for entry in two]
    for first, second in zip(one, two):
        for key in ("loss", "grad_norm", "learning_rate", "epoch"):
            assert first[key] == pytest.approx(second[key], rel=1e-5), (first["step"], key)
        assert first.get("validation_loss", 0) == pytest.approx(second.get("validation_loss", 0), rel=1e-4)
        assert first["loss_by_quartile"] == pytest.approx(second["loss_by_quartile"], abs=2e-6)


@pytest.mark.parametrize("how", LAUNCHERS)
def test_two_processes_against_one_and_against_themselves_resumed(how: str, tmp_path: Path) -> None:
    unet = {**TINY_RECIPE["unet"], "dropout": 0.0}  # dropout masks are drawn by each process for itself
    trainer = Trainer(tmp_path, unet=unet, max_train_steps=6, train_batch_size=2, logging_steps=3)
    alone, two, resumed = tmp_path / "alone", tmp_path / "two", tmp_path / "resumed"
    trainer.faces.rename(tmp_path / "train")
    trainer.faces.mkdir()
    (tmp_path / "train").rename(trainer.faces / "train")
    make_faces(trainer.faces / "validation", 4)
    assert trainer("--output_dir", alone, "--train_batch_size", 4) == 0
    printed = run(trainer, how, "--output_dir", two, *(["--channels_last"] if how == "FSDP2" else []))
    assert printed.count("recipe:") == 1 and "2 × 1 CPU threads" in printed
    assert ("channels_last: left off" in printed) == (how == "FSDP2")
    assert "validation_loss_ema" in trainer.log(two)[-1]
    assert_close_logs(trainer.log(alone), trainer.log(two))
    # The weights may differ by a learning rate where the gradient is nothing but rounding: Adam takes its sign.
    grids = [np.asarray(Image.open(folder / "samples/step-00000006.png"), float) for folder in (alone, two)]
    assert np.abs(grids[0] - grids[1]).mean() < 1  # of 255

    # from the middle: as if the second half had never been
    shutil.copytree(two, resumed)
    shutil.rmtree(resumed / "checkpoint-6")
    assert "checkpoint-4, 4 updates done" in run(
        trainer, how, "--output_dir", resumed, "--resume_from_checkpoint", "latest"
    )
    assert_close_logs(trainer.log(two), trainer.log(resumed))
    whole, other = (load_file(folder / "unet/diffusion_pytorch_model.safetensors") for folder in (two, resumed))
    assert all(torch.allclose(tensor, other[name], atol=1e-6) for name, tensor in whole.items())


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
@pytest.mark.parametrize(
    "flags", [(), pytest.param(("--streaming",), marks=pytest.mark.slow)], ids=["cached", "streamed"]
)
def test_two_processes_go_on_when_one_of_them_cannot_save(flags: tuple, tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, max_train_steps=8, train_batch_size=2, save_images_epochs=100)
    program = tmp_path / "full_disk.py"
    only_the_first = FULL_DISK.replace("if 2 <= step", "if self.accelerator.is_main_process and 2 <= step")
    program.write_text(only_the_first.replace("sys.argv.pop(1)", repr(str(ROOT))), encoding="utf-8")
    process = trainer.start("--checkpoints_total_limit", 10, *flags, program=program, **LAUNCHERS["DDP"])
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed
    assert "checkpoint-4 (" in printed and "going on, and trying again later" in printed
    saved = {path.name for path in trainer.output.glob("checkpoint-*")}
    assert saved == {"checkpoint-2", "checkpoint-7", "checkpoint-8"}  # 3 to 6 failed; 7 is the first that could be


def test_machines_that_do_not_share_the_output_folder_are_told_so(tmp_path: Path) -> None:
    program = tmp_path / "own_folder.py"
    program.write_text(OWN_FOLDER.format(root=str(ROOT), folder=str(tmp_path)), encoding="utf-8")
    trainer = Trainer(tmp_path, max_train_steps=2)

    def refused(*flags: object) -> str:
        process = trainer.start(*flags, program=program, **LAUNCHERS["DDP"])
        printed, _ = process.communicate(timeout=200)
        assert process.returncode != 0
        return next(line for line in printed.splitlines() if line.startswith("error: "))

    assert "is not one folder for all processes" in refused("--output_dir", "out")
    assert trainer("--output_dir", tmp_path / "0" / "half") == 0  # checkpoints that only one of them has
    assert "is not one folder" in refused("--output_dir", "half", "--resume_from_checkpoint", "latest")


def test_pictures_that_one_machine_lacks_stop_all_of_them(tmp_path: Path) -> None:
    program = tmp_path / "own_folder.py"
    program.write_text(OWN_FOLDER.format(root=str(ROOT), folder=str(tmp_path)), encoding="utf-8")
    make_faces(tmp_path / "0" / "own")
    trainer = Trainer(tmp_path)
    process = trainer.start("--train_data_dir", "own", program=program, **LAUNCHERS["DDP"])
    printed, _ = process.communicate(timeout=200)
    assert process.returncode != 0
    assert printed.count("error: --train_data_dir own: no such folder") == 1  # in the words of the first process


def test_what_sharded_saving_raises_is_heard_of() -> None:
    def write() -> None:
        raise CheckpointException("no space", {})

    assert RunFolder(Path("unused"), Accelerator(cpu=True))._error_of_any(write)


def test_of_two_processes_one_refuses_bad_input_for_both(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    trainer.output.mkdir()
    (trainer.output / "thesis.txt").write_text("mine")
    process = trainer.start(**LAUNCHERS["DDP"])
    printed, _ = process.communicate(timeout=200)
    assert process.returncode != 0
    assert printed.count("error: --output_dir") == 1 and "holds something that is not a training run" in printed
