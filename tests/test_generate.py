import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_unet
from diffusers import DDPMScheduler
from PIL import Image

from animeface_pipeline import AnimeFacePipeline, __version__, generate
from animeface_pipeline.schedulers import SCHEDULERS, original_scheduler, switch_scheduler


def save_model(folder: Path, seed: int = 0, scheduler: str | None = None) -> Path:
    """An untrained network ends far outside [0, 1]: with its range as wide, its pictures show every difference."""
    noise_scheduler = original_scheduler() if scheduler is None else switch_scheduler(original_scheduler(), scheduler)
    AnimeFacePipeline(tiny_unet(seed), noise_scheduler, value_range=(-300, 300)).save_pretrained(folder)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


def run(model: Path | str, output_dir: Path, *flags: object) -> int:
    """The command's exit code; ten steps unless `flags` say otherwise."""
    with pytest.raises(SystemExit) as exit:
        generate.main([str(model), f"--output_dir={output_dir}", "--num_inference_steps=10", *map(str, flags)])
    return exit.value.code


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {file.name: np.asarray(Image.open(file)).astype(int) for file in sorted(folder.glob("*.png"))}


def assert_one_line(capsys: pytest.CaptureFixture, *words: str) -> None:
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line and not re.match(r" *\d+%", line)]  # but the progress bar
    assert len(lines) == 1, error
    for word in words:
        assert word in lines[0]


# ---- what is written ----


def test_images_grid_strips_and_settings(model: Path, tmp_path: Path) -> None:
    flags = ("--num_images=5", "--batch_size=2", "--seed=40", "--num_inference_steps=25", "--save_process")
    assert run(model, tmp_path / "out", *flags) == 0
    images = pixels(tmp_path / "out")
    seeds = [f"seed-{seed:06d}.png" for seed in range(40, 45)]
    strips = [f"{number}.png" for number in range(1, 6)]
    assert set(images) == {*seeds, *strips, "5-imgs-final.png"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*images, "generate.json"}
    grid = images["5-imgs-final.png"]
    assert grid.shape == (32, 48, 3)
    for place, (seed, strip) in enumerate(zip(seeds, strips)):
        row, column = divmod(place, 3)
        assert np.array_equal(grid[16 * row : 16 * row + 16, 16 * column : 16 * column + 16], images[seed])
        assert images[strip].shape == (16, 20 * 16, 3)
        assert np.array_equal(images[strip][:, -16:], images[seed])
    assert len({images[seed].tobytes() for seed in seeds}) == 5


def test_seed_model_and_settings_are_in_the_metadata(model: Path, tmp_path: Path) -> None:
    assert run(model, tmp_path / "out", "--num_images=2", "--seed=7", "--scheduler=unipc") == 0
    text = Image.open(tmp_path / "out" / "seed-000008.png").text
    assert (text["seed"], text["num_inference_steps"], text["dtype"]) == ("8", "10", "float32")
    assert (text["model"], text["scheduler"]) == (str(model), "UniPCMultistepScheduler")
    assert text["animeface_pipeline"] == __version__
    config = json.loads(text["scheduler_config"])
    assert (config["solver_order"], config["timestep_spacing"]) == (3, "trailing")


@pytest.mark.parametrize(("steps", "variance_type"), [(10, "fixed_small"), (1000, "fixed_large")])
def test_the_saved_ddpm_scheduler_gets_the_variance_that_is_right_for_the_steps(
    steps: int, variance_type: str, model: Path
) -> None:
    args = generate.parse_args([str(model), "--output_dir=out", f"--num_inference_steps={steps}"])
    scheduler = generate.load_pipeline(args).scheduler
    assert type(scheduler) is DDPMScheduler
    assert scheduler.config.variance_type == variance_type


def test_another_saved_scheduler_is_the_default(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", scheduler="ddim")
    assert run(model, tmp_path / "out", "--num_images=1") == 0
    pipe = AnimeFacePipeline.from_pretrained(model)
    expected = pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=10).images[0]
    assert np.array_equal(pixels(tmp_path / "out")["seed-000000.png"], np.asarray(expected))


# ---- one seed, one picture ----


@pytest.mark.parametrize("name", SCHEDULERS)
def test_all_noise_of_an_image_is_its_own_to_the_bit(name: str) -> None:
    """With a network that predicts zero only noise is left, before the first step and in each of them."""
    unet = tiny_unet()
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    pipe = AnimeFacePipeline(unet, switch_scheduler(original_scheduler(), name, num_inference_steps=8))
    pipe.set_progress_bar_config(disable=True)

    def samples(*seeds: int) -> torch.Tensor:
        """(images, steps, 3, 16, 16), not clamped"""
        seen: list[torch.Tensor] = []
        pipe(
            batch_size=len(seeds),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=8,
            callback_on_step_end=lambda pipe, step, timestep, tensors: seen.append(tensors["sample"].clone()) or {},
        )
        return torch.stack(seen, dim=1)

    together = samples(3, 4, 5)
    assert torch.equal(together, torch.cat([samples(3), samples(4, 5)]))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("scheduler", ["ddpm", "sde-dpmsolver++", "unipc"])
def test_pictures_do_not_depend_on_batch_size_or_number(scheduler: str, model: Path, tmp_path: Path) -> None:
    flags = (f"--scheduler={scheduler}", "--num_inference_steps=40")
    assert run(model, tmp_path / "all", *flags, "--num_images=7", "--batch_size=7") == 0
    assert run(model, tmp_path / "some", *flags, "--num_images=4", "--batch_size=3", "--seed=2") == 0
    expected, found = pixels(tmp_path / "all"), pixels(tmp_path / "some")
    for seed in range(2, 6):
        name = f"seed-{seed:06d}.png"
        assert np.abs(found[name] - expected[name]).max() <= 1


def test_a_cpu_that_only_imitates_bf16_is_told_of_before_it_draws(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("animeface_pipeline.generate.imitates_bf16", lambda device: device.type == "cpu")
    flags = ("--num_images=1", "--num_inference_steps=2", "--device=cpu")
    for dtype, told in [("bfloat16", True), ("bfloat16", False), ("float32", False)]:  # the second draws nothing
        assert run(model, tmp_path / dtype, *flags, f"--dtype={dtype}") == 0
        assert ("many times slower in it than in float32" in capsys.readouterr().err) == told


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, model: Path, tmp_path: Path) -> None:
    assert run(model, tmp_path / "full", "--num_images=2", "--scheduler=ddim") == 0
    assert run(model, tmp_path / "half", "--num_images=2", "--scheduler=ddim", f"--dtype={dtype}") == 0
    full, half = pixels(tmp_path / "full")["seed-000001.png"], pixels(tmp_path / "half")["seed-000001.png"]
    assert np.abs(full - half).max() > 0
    assert np.abs(full - half).mean() < 3
    assert Image.open(tmp_path / "half" / "seed-000001.png").text["dtype"] == dtype


@pytest.mark.slow
def test_compiled_pictures_are_the_same(model: Path, tmp_path: Path) -> None:
    assert run(model, tmp_path / "eager", "--num_images=2") == 0
    assert run(model, tmp_path / "compiled", "--num_images=2", "--compile") == 0
    eager, compiled = pixels(tmp_path / "eager"), pixels(tmp_path / "compiled")
    assert max(np.abs(eager[name] - compiled[name]).max() for name in eager) <= 1


def test_the_number_of_steps_that_pays_off_is_the_schedulers(model: Path) -> None:
    steps = {}
    for scheduler in ("ddpm", "ddim", "unipc", "dpmsolver++"):
        args = generate.parse_args([str(model), "--output_dir=out", f"--scheduler={scheduler}"])
        assert args.num_inference_steps is None
        generate.load_pipeline(args)
        steps[scheduler] = args.num_inference_steps
    assert steps == {"ddpm": 1000, "ddim": 100, "unipc": 25, "dpmsolver++": 25}


# ---- going on ----


def test_a_run_draws_only_what_is_missing(model: Path, tmp_path: Path) -> None:
    out, flags = tmp_path / "out", ("--num_images=4", "--save_process")
    assert run(model, out, *flags) == 0
    whole = {file.name: file.read_bytes() for file in out.iterdir()}
    for name in ("seed-000001.png", "3.png", "4-imgs-final.png"):
        (out / name).unlink()
    (out / ".seed-000001.png.part").write_bytes(b"half a picture")
    kept = {name: (out / name).stat().st_mtime_ns for name in ("seed-000000.png", "1.png", "4.png")}
    assert run(model, out, *flags, "--batch_size=2") == 0  # a smaller batch, e.g. after running out of memory
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert {file.name for file in out.iterdir()} == set(whole)
    for name, image in pixels(out).items():
        (tmp_path / "before.png").write_bytes(whole[name])
        assert np.abs(image - np.asarray(Image.open(tmp_path / "before.png"))).max() <= 1


def assert_same_pictures(folder: Path, expected_in: Path) -> None:
    found, expected = pixels(folder), pixels(expected_in)
    assert set(found) == set(expected)
    assert max(np.abs(found[name] - expected[name]).max() for name in expected) <= 1


def test_a_run_that_was_stopped_goes_on(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--num_images=6", "--batch_size=4")
    save_png = generate.save_png

    def save_and_stop(picture: Image.Image, file: Path, metadata: dict) -> None:
        save_png(picture, file, metadata)
        if file.name == "seed-000002.png":
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "save_png", save_and_stop)
        assert run(model, tmp_path / "out", *flags) == 130
    assert_one_line(capsys, "the same command goes on", str(tmp_path / "out"))
    assert list(pixels(tmp_path / "out")) == [f"seed-{seed:06d}.png" for seed in range(3)]
    assert run(model, tmp_path / "out", *flags) == 0
    assert run(model, tmp_path / "at once", *flags) == 0
    assert_same_pictures(tmp_path / "out", tmp_path / "at once")


def test_a_run_that_was_killed_goes_on(model: Path, tmp_path: Path) -> None:
    flags = ("--num_images=8", "--batch_size=1", "--num_inference_steps=50", "--device=cpu")
    command = [sys.executable, "-m", "animeface_pipeline.generate", str(model), f"--output_dir={tmp_path / 'out'}"]
    with subprocess.Popen([*command, *flags], env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        while len(list(tmp_path.glob("out/seed-*.png"))) < 2:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert 2 <= len(pixels(tmp_path / "out")) < 8  # each of them a whole one: it could be read
    assert run(model, tmp_path / "out", *flags) == 0
    assert run(model, tmp_path / "at once", *flags) == 0
    assert_same_pictures(tmp_path / "out", tmp_path / "at once")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--seed=1"], "seed"),
        (["--num_images=3"], "num_images"),
        (["--num_inference_steps=11"], "num_inference_steps"),
        (["--scheduler=ddim"], "scheduler, scheduler_config"),
        (["--dtype=bfloat16"], "weights_sha256, dtype"),
        (["--save_process"], "save_process"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(
    flags: list[str], named: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(model, tmp_path / "out", "--num_images=2") == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert run(model, tmp_path / "out", "--num_images=2", *flags) == 2
    assert_one_line(capsys, f"differs in {named}:", "choose another folder")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_the_same_model_is_told_by_its_weights_not_its_name(model: Path, tmp_path: Path) -> None:
    assert run(model, tmp_path / "out", "--num_images=1") == 0
    moved = model.rename(tmp_path / "moved")
    assert run(moved, tmp_path / "out", "--num_images=1") == 0
    save_model(moved, seed=1)
    assert run(moved, tmp_path / "out", "--num_images=1") == 2


# ---- bad input: one line, exit code 2, nothing written ----


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num_images=0"], ["--num_images", "at least 1", "0"]),
        (["--num_images=-3"], ["--num_images", "at least 1", "-3"]),
        (["--num_images=many"], ["--num_images", "at least 1", "many"]),
        (["--batch_size=0"], ["--batch_size", "at least 1"]),
        (["--num_inference_steps=0"], ["--num_inference_steps", "at least 1"]),
        (["--num_inference_steps=-1"], ["--num_inference_steps", "at least 1"]),
        (["--num_inference_steps=1001"], ["--num_inference_steps 1001", "at most 1000"]),
        (["--scheduler=magic"], ["--scheduler", "magic", "ddim", "unipc"]),
        (["--dtype=int8"], ["--dtype", "int8", "bfloat16"]),
        (["--device=nowhere"], ["--device", "nowhere"]),
        (["--device=meta"], ["--device", "meta"]),
        (["--seed=-1"], ["--seed", "from 0", "-1"]),
        ([f"--seed={2**63}"], ["--seed", "from 0"]),
        (["--num_image=3"], ["--num_image"]),
    ],
)
def test_bad_flags(
    flags: list[str], words: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(model, tmp_path / "out", *flags) == 2
    assert_one_line(capsys, *words)
    assert not (tmp_path / "out").exists()


def test_a_damaged_picture_of_a_former_run_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ("--num_images", 2)
    assert run(model, tmp_path / "out", *flags) == 0
    (tmp_path / "out" / "seed-000001.png").write_bytes(b"half")
    capsys.readouterr()
    assert run(model, tmp_path / "out", *flags) == 2
    assert "seed-000001.png: is damaged" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "out" / "seed-000001.png").unlink()
    assert run(model, tmp_path / "out", *flags) == 0


def test_a_model_that_is_no_pipeline(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    for folder, words in ((tmp_path / "empty", "model_index.json"), (tmp_path / "nowhere", "no such folder")):
        assert run(folder, tmp_path / "out") == 2
        assert_one_line(capsys, str(folder), words)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert run(model, tmp_path / "out") == 2
    assert_one_line(capsys, "truncated")
    index = json.loads((model / "model_index.json").read_text(encoding="utf-8"))
    (model / "model_index.json").write_text(json.dumps({**index, "_class_name": "DDPMPipeline"}), encoding="utf-8")
    assert run(model, tmp_path / "out") == 2
    assert_one_line(capsys, "DDPMPipeline")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_else_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary", encoding="utf-8")
    (tmp_path / "notes" / "seed-000000.png").write_bytes(b"mine")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "generate.json").write_text("{", encoding="utf-8")
    for place in (tmp_path / "notes", tmp_path / "notes" / "diary.txt", tmp_path / "broken"):
        assert run(model, place) == 2
        assert_one_line(capsys, str(place), "choose another folder")
    assert sorted(file.name for file in (tmp_path / "notes").iterdir()) == ["diary.txt", "seed-000000.png"]
    assert (tmp_path / "notes" / "seed-000000.png").read_bytes() == b"mine"


def test_a_folder_that_cannot_be_written(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert run(model, tmp_path / "file" / "out") == 2
    assert_one_line(capsys, str(tmp_path / "file" / "out"), "cannot be written")


@pytest.mark.skipif(os.name == "nt", reason="limits file sizes by setrlimit")
def test_a_full_disk_loses_nothing(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import resource

    flags = ("--num_images=16", "--batch_size=4")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))  # enough for a picture, too little for the grid
    try:
        assert run(model, tmp_path / "out", *flags) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_line(capsys, "cannot be written", "the same command goes on")
    assert len(pixels(tmp_path / "out")) == 16
    assert {file.suffix for file in (tmp_path / "out").iterdir()} == {".png", ".json"}
    assert run(model, tmp_path / "out", *flags) == 0
    assert (tmp_path / "out" / "16-imgs-final.png").is_file()


def test_a_network_that_gives_nan_is_named(
    tiny_pipeline: AnimeFacePipeline, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    torch.nn.init.constant_(tiny_pipeline.unet.conv_out.bias, 1e38)
    torch.nn.init.constant_(tiny_pipeline.unet.conv_out.weight, 1e38)
    tiny_pipeline.save_pretrained(tmp_path / "model")
    assert run(tmp_path / "model", tmp_path / "out", "--num_images=1") == 2
    assert_one_line(capsys, "--dtype float32", "not finite")


def test_compile_without_a_compiler_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*args: object, **kwargs: object) -> None:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1 …")

    monkeypatch.setattr(torch, "compile", lambda forward, **options: no_compiler)
    assert run(model, tmp_path / "out", "--compile") == 2
    assert_one_line(capsys, "--compile", "No working C++ compiler found", "leave it out")
