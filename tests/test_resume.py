"""A run that is killed, stopped or short of disk goes on, and ends as the run that was never interrupted."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from trainer import Trainer

LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--quiet")


def state_of(output: Path, step: int) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds of the training itself, flat."""
    folder = output / f"checkpoint-{step}"
    state = dict(load_file(folder / "model.safetensors"))
    for name in ("optimizer.bin", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl", "custom_checkpoint_2.pkl"):
        state |= flat(torch.load(folder / name, weights_only=True), name)
    return state


def flat(value: object, name: str) -> dict[str, object]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {name: value}
    return {key: leaf for part, inner in items for key, leaf in flat(inner, f"{name}.{part}").items()}


def assert_same_run(one: Trainer, one_output: Path, other_output: Path, step: int) -> None:
    """Weights, optimizer, schedule, averages, log and the saved pipeline: equal to the bit."""
    first, second = state_of(one_output, step), state_of(other_output, step)
    assert first.keys() == second.keys()
    different = [
        name
        for name, value in first.items()
        if not (torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name])
    ]
    assert different == []
    assert one.log(one_output) == one.log(other_output)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (one_output / weights).read_bytes() == (other_output / weights).read_bytes()
    for grid in (one_output / "samples").iterdir():
        assert grid.read_bytes() == (other_output / "samples" / grid.name).read_bytes()


def trainer_for(folder: Path, steps: int, **recipe: object) -> Trainer:
    return Trainer(
        folder,
        **{
            "max_train_steps": steps,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 2,
            "save_images_epochs": 2,
            **recipe,
        },
    )


RESUME = ("--resume_from_checkpoint", "latest")


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_a_resumed_run_ends_as_the_one_that_was_never_interrupted(stop_at: int, tmp_path: Path) -> None:
    """Mid-epoch, between two lines of the log, with accumulation, warm-up, dropout, EMA and mixed precision."""
    trainer = trainer_for(
        tmp_path, 7, gradient_accumulation_steps=2, logging_steps=2, checkpointing_steps=1, mixed_precision="bf16"
    )
    assert trainer() == 0
    broken = tmp_path / "broken"
    code = (
        "import sys, os; sys.path.insert(0, sys.argv.pop(1)); stop = int(sys.argv.pop(1))\n"
        "import animeface_pipeline.run as run, train_accelerate\n"
        "after = run.Run.after_update\n"
        "def stopping(self, step, norm):\n"
        "    after(self, step, norm)\n"
        "    if step + 1 == stop: os._exit(9)\n"
        "run.Run.after_update = stopping\n"
        "train_accelerate.main(sys.argv[1:])"
    )
    program = Path(__file__).resolve().parent.parent
    argv = [sys.executable, "-c", code, str(program), str(stop_at), *trainer.argv("--output_dir", str(broken))]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    ran = subprocess.run(argv, capture_output=True, text=True, env=env)
    assert ran.returncode == 9, ran.stderr
    assert trainer("--output_dir", broken, *RESUME) == 0
    assert_same_run(trainer, trainer.output, broken, 7)


def kill_at_random(trainer: Trainer, output: Path, kills: int, seed: int) -> list[str]:
    """Start, kill -9 after a random while (every other time inside a checkpoint write), start again, to the end."""
    rng, where = random.Random(seed), []
    while True:
        process = trainer.start("--output_dir", output, *RESUME)
        if len(where) == kills:
            printed, _ = process.communicate(timeout=300)
            assert process.returncode == 0, printed
            return where
        before = set(output.glob("checkpoint-*"))
        wanted = "writing" if len(where) % 2 == 0 else "training"
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            writing = any(output.glob("checkpoint-*.part"))
            if writing if wanted == "writing" else set(output.glob("checkpoint-*")) != before:
                time.sleep(rng.uniform(0, 0.01 if wanted == "writing" else 0.2))
                break
            time.sleep(0.0005)
        if process.poll() is not None:
            pytest.fail(f"ended before kill {len(where)}: {process.communicate()[0]}")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        where.append("writing" if any(output.glob("checkpoint-*.part")) else "training")


@pytest.mark.parametrize(
    ("kills", "steps"), [(3, 120), pytest.param(20, 1000, marks=pytest.mark.slow)], ids=["3 kills", "20 kills"]
)
def test_killed_at_random_moments(kills: int, steps: int, tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, steps, num_epochs=1000, save_images_epochs=1000, logging_steps=3)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = trainer.start("--output_dir", whole)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    where = kill_at_random(trainer, broken, kills, seed=kills)
    print(f"killed while: {', '.join(where)}")
    assert "writing" in where
    assert_same_run(trainer, whole, broken, steps)


def test_latest_skips_an_incomplete_checkpoint_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trainer = trainer_for(tmp_path, 6)
    assert trainer(*RESUME) == 0
    assert "no whole checkpoint yet, starting from the beginning" in capsys.readouterr().out
    optimizer = trainer.output / "checkpoint-6" / "optimizer.bin"
    optimizer.write_bytes(optimizer.read_bytes()[:100])
    assert trainer("--max_train_steps", 7, *RESUME) == 0
    printed = capsys.readouterr().out
    assert "skipping" in printed and "checkpoint-6: not a whole checkpoint, optimizer.bin" in printed
    assert "checkpoint-4, 4 updates done" in printed
    assert [entry["step"] for entry in trainer.log()] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.bin",
        pytest.param("model.safetensors", marks=pytest.mark.slow),
        pytest.param("custom_checkpoint_0.pkl", marks=pytest.mark.slow),
    ],
)
def test_latest_skips_a_damaged_checkpoint_and_its_name_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """As a power cut may leave it: of the right size, with zeros where the data should be."""
    trainer = trainer_for(tmp_path, 6)
    assert trainer() == 0
    file = trainer.output / "checkpoint-6" / name
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    capsys.readouterr()
    assert trainer("--max_train_steps", 7, "--resume_from_checkpoint", "checkpoint-6") == 2
    assert f"checkpoint-6: damaged, {name} is not what was written; try latest" in capsys.readouterr().err
    assert trainer("--max_train_steps", 7, *RESUME) == 0
    assert "checkpoint-4, 4 updates done" in capsys.readouterr().out


def test_going_on_from_an_earlier_checkpoint_forgets_what_came_after_it(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    trainer = trainer_for(tmp_path, 6, num_epochs=10)
    assert trainer() == 0
    assert trainer("--resume_from_checkpoint", "checkpoint-4", "--max_train_steps", 5) == 0
    assert f"removing {trainer.output / 'checkpoint-6'}" in capsys.readouterr().out
    assert [entry["step"] for entry in trainer.log()] == [1, 2, 3, 4, 5]
    assert trainer(*RESUME) == 0
    assert "checkpoint-5, 5 updates done" in capsys.readouterr().out
    assert [entry["step"] for entry in trainer.log()] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (("--value_range", 0, 1), "value_range"),
        (("--prediction_type", "v_prediction"), "prediction_type"),
        (("--no-use_ema",), "use_ema"),
        (("--resolution", 32), "resolution"),
    ],
)
def test_a_setting_that_the_state_cannot_take_is_refused(
    flags: tuple, key: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    trainer = trainer_for(tmp_path, 2)
    assert trainer() == 0
    before = sorted(path.name for path in trainer.output.rglob("*"))
    assert trainer(*flags, "--max_train_steps", 4, *RESUME) == 2
    assert f"--resume_from_checkpoint: {key} was" in capsys.readouterr().err.splitlines()[-1]
    assert sorted(path.name for path in trainer.output.rglob("*")) == before


def test_the_network_is_compared_with_its_defaults_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trainer = trainer_for(tmp_path, 2)
    assert trainer() == 0
    recipe = yaml.safe_load(trainer.recipe.read_text())
    recipe["unet"]["attention_norm"] = True
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(recipe))
    assert trainer("--config", other, "--max_train_steps", 4, *RESUME) == 2
    assert "unet.attention_norm was False and is True now" in capsys.readouterr().err


def test_precision_that_the_checkpoint_has_no_state_for_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    trainer = trainer_for(tmp_path, 4)
    assert trainer("--max_train_steps", 2) == 0
    (trainer.output / "checkpoint-2" / "custom_checkpoint_2.pkl").unlink()
    state = json.loads((trainer.output / "checkpoint-2" / "checkpoint.json").read_text())
    for of_files in (state["files"], state["crc32"]):
        del of_files["custom_checkpoint_2.pkl"]  # as if the run had been one without EMA
    (trainer.output / "checkpoint-2" / "checkpoint.json").write_text(json.dumps(state))
    assert trainer(*RESUME) == 2
    assert "cannot be loaded" in capsys.readouterr().err.splitlines()[-1]


def test_other_settings_take_effect_from_there_on_and_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import animeface_pipeline.run as run

    trainer = trainer_for(tmp_path, 4, lr_scheduler="constant", num_epochs=10)
    assert trainer("--max_train_steps", 2) == 0
    assert trainer.log()[-1]["learning_rate"] == 1e-3
    seen = []
    over_state = run.settings_over_state

    def spy(config: object, lr_scheduler: object, ema: object) -> None:
        over_state(config, lr_scheduler, ema)
        seen.append((lr_scheduler.optimizer.param_groups[0], ema.decay))

    monkeypatch.setattr(run, "settings_over_state", spy)
    flags = ("--learning_rate", 5e-4, "--adam_beta2", 0.9, "--ema_max_decay", 0.5)
    assert trainer(*flags, *RESUME) == 0
    assert "learning_rate: 0.001 until now, 0.0005 from here on" in capsys.readouterr().out
    assert [entry["learning_rate"] for entry in trainer.log()] == [5e-4, 1e-3, 5e-4, 5e-4]  # the first is warm-up
    ((group, decay),) = seen
    assert group["betas"] == (0.9, 0.9) and decay == 0.5


def test_fewer_updates_than_are_done_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trainer = trainer_for(tmp_path, 4)
    assert trainer() == 0
    assert trainer("--max_train_steps", 3, *RESUME) == 2
    assert "4 updates are done already, and these settings want 3 in all" in capsys.readouterr().err


def test_a_card_in_another_encoding_is_somebodys_own(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, 4)
    assert trainer("--max_train_steps", 2) == 0
    written = "我的模型".encode("gbk")
    (trainer.output / "README.md").write_bytes(written)
    assert trainer(*RESUME) == 0
    assert (trainer.output / "README.md").read_bytes() == written


def test_an_unreadable_line_of_the_log_is_left_out(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, 6, num_epochs=10)
    assert trainer("--max_train_steps", 4) == 0
    with (trainer.output / "log.jsonl").open("ab") as log:
        log.write(b'{"step": 5, "lo' + bytes(100))
    assert trainer(*RESUME) == 0
    assert [entry["step"] for entry in trainer.log()] == [1, 2, 3, 4, 5, 6]


# ---- stopping in order ----


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(
    ("number", "to"),
    [
        (signal.SIGTERM, "process"),
        (signal.SIGINT, "process"),
        pytest.param(getattr(signal, "SIGHUP", None), "process", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "process, twice", marks=pytest.mark.slow),
        (signal.SIGTERM, "group"),
        (signal.SIGTERM, "launcher"),
    ],
)
def test_a_signal_finishes_the_update_saves_and_says_how_to_go_on(
    number: signal.Signals, to: str, tmp_path: Path
) -> None:
    trainer = trainer_for(tmp_path, 100_000, num_epochs=100_000, save_images_epochs=100_000, checkpointing_steps=10**6)
    to, _, twice = to.partition(", ")
    launcher = (sys.executable,) if to == "process" else LAUNCH
    command = [*launcher, str(Path(__file__).resolve().parent.parent / "train_accelerate.py"), *trainer.argv()]
    printed = tmp_path / "printed.txt"
    with printed.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        wait_for(lambda: (trainer.output / "log.jsonl").exists() and len(trainer.log()) > 3)
        send = os.killpg if to == "group" else os.kill
        send(process.pid, number)
        if twice:  # by a scheduler to all processes, and once more by their launcher
            wait_for(lambda: "finishing this update" in printed.read_text())
            send(process.pid, number)
        try:
            process.wait(timeout=60)
        finally:
            process.kill()
        wait_for(lambda: "to go on" in printed.read_text() or "goes on" in printed.read_text())
    if to == "process" and not twice:  # the second one may come when all is saved and Python no longer listens
        assert process.returncode == 128 + number
    text = printed.read_text()
    assert f"stopped by {number.name}, saved after update" in text
    assert "the same command with --resume_from_checkpoint latest goes on" in text
    (checkpoint,) = trainer.output.glob("checkpoint-*")
    done = int(checkpoint.name.removeprefix("checkpoint-"))
    wait_for(lambda: not Path(f"{trainer.output}.lock").exists())
    assert trainer("--max_train_steps", done + 1, *RESUME) == 0
    assert [entry["step"] for entry in trainer.log()] == list(range(1, done + 2))


def test_once_more_after_a_while_stops_without_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    import animeface_pipeline.run as run

    signals = run.Signals()
    signals.listen()
    try:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # at once: the same one
        assert signals.number == signal.SIGINT
        monkeypatch.setattr(run, "SAME_SIGNAL", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signals.restore()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_what_nohup_has_ignored_stays_ignored() -> None:
    import animeface_pipeline.run as run

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals = run.Signals()
    signals.listen()
    try:
        signal.raise_signal(signal.SIGHUP)
        assert signals.number == 0
    finally:
        signals.restore()
        signal.signal(signal.SIGHUP, before)


def wait_for(holds: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


# ---- updates that are not finite, a full disk, a folder that is gone ----


def test_training_stops_after_many_updates_that_are_not_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import animeface_pipeline.run
    import animeface_pipeline.training as training

    trainer = trainer_for(tmp_path, 40, num_epochs=100, save_images_epochs=100)
    real, calls = training.F.mse_loss, []

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(1)
        return real(*args, **kwargs) * (float("nan") if len(calls) in (2, 3) or len(calls) > 9 else 1)

    monkeypatch.setattr(training.F, "mse_loss", poisoned)
    monkeypatch.setattr(animeface_pipeline.run, "MAX_SKIPPED_IN_A_ROW", 5)
    assert trainer() == 4
    printed = capsys.readouterr().err.splitlines()[-1]
    assert "stopped after 5 updates in a row" in printed and "checkpoint-" in printed
    log = trainer.log()
    assert [entry["skipped_updates"] for entry in log] == [0, 1, 2, 2, 2, 2, 2, 2, 2, 3, 4, 5, 6, 7]
    last = load_file(sorted(trainer.output.glob("checkpoint-*"))[-1] / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in last.values())


def test_a_folder_that_vanishes_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import animeface_pipeline.run as run

    trainer = trainer_for(tmp_path, 8, num_epochs=100, save_images_epochs=100)
    after_update = run.Run.after_update

    def vanish(self: object, step: int, grad_norm: torch.Tensor) -> None:
        if step == 4:
            shutil.rmtree(trainer.output)
        after_update(self, step, grad_norm)

    monkeypatch.setattr(run.Run, "after_update", vanish)
    assert trainer() == 0
    assert "cannot write the log" in capsys.readouterr().err
    assert (trainer.output / "checkpoint-8").is_dir() and (trainer.output / "model_index.json").is_file()


FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import animeface_pipeline.run as run, train_accelerate
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing beyond the limit raises "File too large"
after_update, limit = run.Run.after_update, resource.getrlimit(resource.RLIMIT_FSIZE)
def full_for_a_while(self, step, grad_norm):
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limit[1]) if 2 <= step < 6 else limit)
    after_update(self, step, grad_norm)
run.Run.after_update = full_for_a_while
train_accelerate.main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_a_full_disk_keeps_the_last_checkpoint_goes_on_and_tries_again(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, 8, num_epochs=100, save_images_epochs=100, checkpoints_total_limit=10)
    program = str(Path(__file__).resolve().parent.parent)
    ran = subprocess.run(
        [sys.executable, "-c", FULL_DISK, program, *trainer.argv()], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert "checkpoint-4 (" in ran.stderr and "going on, and trying again later" in ran.stderr
    saved = {path.name for path in trainer.output.glob("checkpoint-*")}
    assert saved == {"checkpoint-2", "checkpoint-7", "checkpoint-8"}  # 3 to 6 failed; 7 is the first that could be
    assert [entry["step"] for entry in trainer.log()] == list(range(1, 9))


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_a_disk_that_is_full_at_the_end_loses_nothing(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, 8, num_epochs=100, save_images_epochs=100)
    program = str(Path(__file__).resolve().parent.parent)
    full = FULL_DISK.replace("2 <= step < 6", "step == 7").replace("60_000", "200")
    ran = subprocess.run(
        [sys.executable, "-c", full, program, *trainer.argv()], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 2, ran.stderr
    assert "the pipeline cannot be saved" in ran.stderr.splitlines()[-1] and "Traceback" not in ran.stderr
    assert [entry["step"] for entry in trainer.log()] == list(range(1, 8))
    assert trainer(*RESUME) == 0
    assert [entry["step"] for entry in trainer.log()] == list(range(1, 9))
    assert (trainer.output / "model_index.json").is_file()
