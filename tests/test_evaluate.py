"""The command from end to end: a tiny pipeline, tiny pictures, a feature network trained for five steps."""

import argparse
import importlib.util
import json
import re
import runpy
import shutil
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_unet
from huggingface_hub import ModelCard
from PIL import Image

from animeface_pipeline import AnimeFacePipeline, evaluate, generate, in_domain
from animeface_pipeline.cli import BadInput
from animeface_pipeline.config import load_recipe
from animeface_pipeline.distances import compute_features, feature_distances, inception, sha256_of
from animeface_pipeline.hub import add_results
from animeface_pipeline.picture_statistics import compare_statistics, statistic_rows
from animeface_pipeline.pipeline_animeface import is_our_card
from animeface_pipeline.schedulers import original_scheduler

pytest.importorskip("torchmetrics", reason="the extra eval is not installed")


def save_pictures(folder: Path, number: int, seed: int, brightness: int = 0) -> Path:
    """Smooth random pictures, 16×16."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for k in range(number):
        small = random.integers(0, 256 - brightness, (4, 4, 3), dtype=np.uint8) + np.uint8(brightness)
        Image.fromarray(small).resize((16, 16), Image.Resampling.BICUBIC).save(folder / f"{k:03d}.png")
    return folder


@pytest.fixture
def reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(evaluate, "RECIPE", {**in_domain.RECIPE, "train_steps": 5, "train_batch_size": 8})
    save_pictures(tmp_path / "real" / "train", 40, seed=0)
    save_pictures(tmp_path / "real" / "validation", 10, seed=1)
    return tmp_path / "real"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    AnimeFacePipeline(tiny_unet(), original_scheduler(), value_range=(-300, 300)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(model: Path, reference: Path, output_dir: Path, *flags: object) -> int:
    """The command's exit code; eight pictures, if they are drawn in three steps, unless `flags` say otherwise."""
    paths = [str(model), f"--reference={reference}", f"--output_dir={output_dir}"]
    paths.append(f"--cache_dir={reference.parent / 'cache'}")
    steps = ["--num_inference_steps=3"] if (model / "model_index.json").is_file() else []
    with pytest.raises(SystemExit) as exit:
        evaluate.main([*paths, "--num_images=8", *steps, *map(str, flags)])
    return exit.value.code


def result(output_dir: Path) -> dict[str, Any]:
    return json.loads((output_dir / "evaluation.json").read_text(encoding="utf-8"))


def error_line(capsys: pytest.CaptureFixture) -> str:
    """The one line on stderr, besides progress bars and warnings."""
    lines = [
        line
        for line in re.split(r"[\r\n]+", capsys.readouterr().err)
        if line.strip() and not line.startswith("warning:") and not re.search(r"\d+%\|", line)
    ]
    assert len(lines) == 1, lines
    return lines[0]


# ---- the whole command ----


def test_everything_is_measured_and_written(
    model: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(model, reference, tmp_path / "out", "--seed=5", "--scheduler=ddim") == 0
    said = capsys.readouterr()
    for words in ("in-domain Fréchet distance", "colour deviation", "power spectrum", "suspected copies"):
        assert words in said.out
    assert "FID" not in said.out
    assert "warning: 8 pictures are few" in said.err

    found = result(tmp_path / "out")
    assert (found["num_images"], found["model"]["seed"], found["model"]["scheduler"]) == (8, 5, "DDIMScheduler")
    assert found["reference"]["num_pictures"] == 40
    assert found["reference"]["num_held_out"] == 10
    assert found["in_domain"]["recipe"]["train_steps"] == 5
    assert found["in_domain"]["frechet_distance"] > found["in_domain"]["floor"]
    assert "--seed=5" in found["command"]
    assert {"torch", "torchmetrics", "animeface-pipeline"} <= set(found["versions"])
    for digest in (found["model"]["weights_sha256"], found["in_domain"]["weights_sha256"], found["pictures_sha256"]):
        assert re.fullmatch("[0-9a-f]{64}", digest)
    assert Image.open(tmp_path / "out" / "closest.png").size == (6 * 16, 4 * 16)
    assert (tmp_path / "out" / ".gitignore").read_text() == "*\n"  # it shows real pictures
    assert len(list((tmp_path / "out").glob("seed-*.png"))) == 8


def test_the_batch_size_does_not_matter(model: Path, reference: Path, tmp_path: Path) -> None:
    assert run(model, reference, tmp_path / "one", "--batch_size=3") == 0
    assert run(model, reference, tmp_path / "other", "--batch_size=8") == 0
    one, other = (
        torch.stack([evaluate.read_png(file) for file in sorted((tmp_path / name).glob("seed-*.png"))]).int()
        for name in ("one", "other")
    )
    assert (one - other).abs().max() <= 1
    distances = [result(tmp_path / name)["in_domain"]["frechet_distance"] for name in ("one", "other")]
    assert distances[0] == pytest.approx(distances[1], rel=1e-2)


def test_a_stopped_run_goes_on_and_more_pictures_may_follow(
    model: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_png = generate.save_png

    def save_and_stop(picture: Image.Image, file: Path, metadata: dict) -> None:
        save_png(picture, file, metadata)
        if file.name == "seed-000002.png":
            signal.raise_signal(signal.SIGINT)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(generate, "save_png", save_and_stop)
        assert run(model, reference, out) == 130
    assert "the same command goes on" in error_line(capsys)
    assert not (out / "evaluation.json").exists()
    kept = {file.name: file.stat().st_mtime_ns for file in out.glob("seed-*.png")}
    assert len(kept) == 3

    assert run(model, reference, out) == 0
    assert run(model, reference, tmp_path / "at once") == 0
    assert result(out)["pictures_sha256"] == result(tmp_path / "at once")["pictures_sha256"]
    assert result(out)["in_domain"] == result(tmp_path / "at once")["in_domain"]

    assert run(model, reference, out, "--num_images=10") == 0
    assert result(out)["num_images"] == 10
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    capsys.readouterr()
    assert run(model, reference, out, "--seed=1") == 2
    assert "differs in seed" in error_line(capsys)


def test_network_and_features_of_the_reference_are_kept_by_its_content(
    model: Path, reference: Path, tmp_path: Path
) -> None:
    assert run(model, reference, tmp_path / "first") == 0
    cache = tmp_path / "cache"
    kept = {
        file: file.stat().st_mtime_ns
        for folder in ("in-domain", "features")
        for file in (cache / folder).iterdir()
        if file.suffix != ".lock"
    }
    assert len(kept) == 2
    moved = reference.rename(tmp_path / "moved")
    assert run(model, moved, tmp_path / "second") == 0
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    first, second = result(tmp_path / "first"), result(tmp_path / "second")
    assert first["in_domain"] == second["in_domain"]
    (moved / "train" / "000.png").unlink()
    assert run(model, moved, tmp_path / "third") == 0
    assert len(list((cache / "in-domain").glob("*.safetensors"))) == 2
    assert result(tmp_path / "third")["reference"]["sha256"] != first["reference"]["sha256"]


def test_a_folder_of_pictures_is_judged_like_a_model(reference: Path, tmp_path: Path) -> None:
    save_pictures(tmp_path / "alike", 8, seed=2)
    save_pictures(tmp_path / "bright", 8, seed=2, brightness=150)
    for name in ("alike", "bright"):
        assert run(tmp_path / name, reference, tmp_path / f"of {name}") == 0
    alike, bright = (result(tmp_path / f"of {name}") for name in ("alike", "bright"))
    assert alike["num_images"] == 8 and alike["device"]
    # another number of the same pictures goes on in the same folder
    assert run(tmp_path / "alike", reference, tmp_path / "of alike", "--num_images=6") == 0
    assert result(tmp_path / "of alike")["num_images"] == 6
    assert alike["in_domain"]["frechet_distance"] < bright["in_domain"]["frechet_distance"]
    assert alike["statistics"]["colour mean"]["passes"]
    assert not bright["statistics"]["colour mean"]["passes"]


def test_flags_that_draw_are_refused_for_a_folder_of_pictures(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    faces = save_pictures(tmp_path / "faces", 8, seed=2)
    assert run(faces, reference, tmp_path / "out", "--scheduler=unipc", "--num_inference_steps=3") == 2
    assert f"--scheduler, --num_inference_steps: {faces} is a folder of pictures" in error_line(capsys)
    assert not (tmp_path / "out").exists()


def test_of_a_folder_that_generate_wrote_the_grid_is_left_out(model: Path, reference: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        generate.main([str(model), f"--output_dir={tmp_path / 'drawn'}", "--num_images=8", "--num_inference_steps=3"])
    assert (tmp_path / "drawn" / "8-imgs-final.png").is_file()
    assert run(tmp_path / "drawn", reference, tmp_path / "of drawn") == 0
    assert run(model, reference, tmp_path / "at once") == 0
    assert result(tmp_path / "of drawn")["num_images"] == 8
    assert result(tmp_path / "of drawn")["in_domain"] == result(tmp_path / "at once")["in_domain"]


def test_without_held_out_pictures_memorisation_is_not_measured(model: Path, reference: Path, tmp_path: Path) -> None:
    assert run(model, reference / "train", tmp_path / "out") == 0
    assert "memorisation" not in result(tmp_path / "out")
    assert not (tmp_path / "out" / "closest.png").exists()


def test_how_many_pictures_there_are_is_what_counts_for_the_warning(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    save_pictures(tmp_path / "few", 8, seed=2)
    assert run(tmp_path / "few", reference, tmp_path / "out", "--num_images=10000") == 0
    assert "warning: 8 pictures are few" in capsys.readouterr().err


def test_a_small_reference_has_limits_that_its_like_can_meet() -> None:
    random = torch.Generator().manual_seed(0)
    real, alike = (torch.randint(256, (80, 3, 16, 16), dtype=torch.uint8, generator=random) for _ in range(2))
    assert all(each["limit"] > 0 for each in compare_statistics(statistic_rows(alike), statistic_rows(real)).values())


def test_of_more_pictures_than_can_be_compared_some_are_taken_at_random() -> None:
    random = torch.Generator().manual_seed(0)
    real = torch.randn(40, 3, generator=random)
    mixed = torch.cat([torch.randn(20, 3, generator=random), torch.randn(20, 3, generator=random) + 100])
    found = in_domain.in_domain_distance(mixed, real)
    assert found["num_pictures"] == 20
    assert found["frechet_distance"] > 1000  # the second half is seen


# ---- bad input ----


def test_a_training_run_that_is_not_finished_is_no_folder_of_pictures(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    save_pictures(tmp_path / "run" / "samples", 8, seed=2)
    (tmp_path / "run" / "run.json").write_text("{}", encoding="utf-8")
    assert run(tmp_path / "run", reference, tmp_path / "out") == 2
    assert "a training run that is not finished" in error_line(capsys)
    assert not (tmp_path / "out").exists()


def test_what_is_drawn_must_not_become_the_reference(
    model: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    faces = save_pictures(tmp_path / "faces", 8, seed=2)
    assert run(model, reference, reference / "quality") == 2
    assert "--output_dir" in (line := error_line(capsys)) and "--reference's" in line
    assert run(faces, reference, faces / "quality") == 2
    assert "MODEL's" in error_line(capsys)
    assert not (reference / "quality").exists() and not (faces / "quality").exists()


def test_a_cache_that_cannot_be_written(
    model: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert run(model, reference, tmp_path / "out", f"--cache_dir={tmp_path / 'file'}") == 2
    assert f"--cache_dir {tmp_path / 'file'}" in error_line(capsys)


def test_no_such_reference(model: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(model, tmp_path / "nowhere", tmp_path / "out") == 2
    assert "--reference" in (line := error_line(capsys))
    assert "no such folder" in line
    assert not (tmp_path / "out").exists()  # nothing was drawn in vain


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num_images=0"], "at least 1"),
        (["--feature_weights=x.pth"], "add --fid"),
        (["--scheduler=magic"], "--scheduler"),
    ],
)
def test_bad_flags(
    flags: list[str], words: str, model: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(model, reference, tmp_path / "out", *flags) == 2
    assert words in error_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("module", "flags", "extra"), [("torchmetrics", [], "[eval]"), ("torch_fidelity", ["--fid"], "[fid]")]
)
def test_a_missing_extra_is_named_before_anything_is_drawn(
    module: str,
    flags: list[str],
    extra: str,
    model: Path,
    reference: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == module else find_spec(name, *rest)
    )
    assert run(model, reference, tmp_path / "out", *flags) == 2
    assert f'pip install "animeface-pipeline{extra}"' in error_line(capsys)
    assert not (tmp_path / "out").exists()


# ---- distances by torchmetrics ----


def test_the_frechet_distance_of_gaussians_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    other = one * torch.tensor([2.0, 1.0, 0.5]) + torch.tensor([1.0, 0.0, -2.0])
    covariances = [np.cov(each.numpy().T) for each in (one, other)]
    root = np.linalg.eigvals(covariances[0] @ covariances[1]).real
    mean = float((one.mean(0) - other.mean(0)).square().sum())
    expected = mean + np.trace(covariances[0] + covariances[1]) - 2 * np.sqrt(root).sum()
    found = feature_distances(one, other)
    assert found["frechet"] == pytest.approx(expected, rel=1e-9)
    assert found == feature_distances(one, other)  # its subsets have a seed of their own
    assert feature_distances(one, one, kernel=False)["frechet"] == pytest.approx(0, abs=1e-9)


def test_any_module_gives_features_and_a_stopped_computation_goes_on(tmp_path: Path) -> None:
    class Counting(torch.nn.Module):
        def __init__(self, limit: int) -> None:
            super().__init__()
            self.seen, self.limit = 0, limit

        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            self.seen += len(pictures)
            if self.seen > self.limit:
                raise KeyboardInterrupt
            return pictures.float().mean(dim=(2, 3))

    pictures = torch.randint(256, (50, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    file = tmp_path / "cache" / "features"
    with pytest.raises(KeyboardInterrupt):
        compute_features(Counting(limit=30), pictures, file, batch_size=10)
    network = Counting(limit=31)
    features = compute_features(network, pictures, file, batch_size=10)
    assert torch.equal(features, pictures.float().mean(dim=(2, 3)))
    assert network.seen == 1 + 30  # 20 of 50 were there; 1 tells how many features there are
    assert torch.equal(compute_features(Counting(limit=1), pictures, file), features)
    assert {each.name for each in file.parent.iterdir()} == {"features", "features.lock"}


def test_two_commands_that_want_the_same_features_do_not_mix_them(tmp_path: Path) -> None:
    class Slow(torch.nn.Module):
        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            time.sleep(0.02)
            return pictures.float().mean(dim=(2, 3))

    pictures = torch.randint(256, (40, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    file = tmp_path / "features"
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: compute_features(Slow(), pictures, file, batch_size=4), range(2)))
    assert all(torch.equal(each, pictures.float().mean(dim=(2, 3))) for each in found)
    assert file.stat().st_size == 40 * 3 * 4


def test_hashes_tell_contents_and_shapes_apart() -> None:
    pictures = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert sha256_of(pictures) == sha256_of(pictures.clone())
    assert len({sha256_of(pictures), sha256_of(pictures.view(2, 3, 2, 8)), sha256_of(pictures + 1)}) == 3


# ---- Inception: its weights are not part of this repository, so a network of the right shape stands in ----


def test_inception_with_weights_from_a_file(
    model: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="the extra fid")
    torch.manual_seed(0)
    blank = fidelity.FeatureExtractorInceptionV3.__new__(fidelity.FeatureExtractorInceptionV3)
    loaded: dict[str, torch.Tensor] = {}
    original = torch.nn.Module.load_state_dict
    with pytest.MonkeyPatch.context() as patch:  # its constructor always loads weights: let it keep the random ones
        patch.setattr(torch.nn.Module, "load_state_dict", lambda self, state: loaded.update(self.state_dict()))
        torch.save({}, tmp_path / "none.pth")
        blank.__init__("blank", ["2048"], feature_extractor_weights_path=str(tmp_path / "none.pth"))
    assert torch.nn.Module.load_state_dict is original
    torch.save(loaded, tmp_path / "inception.pth")
    (reference / "train" / "000.png").touch()
    flags = ("--fid", f"--feature_weights={tmp_path / 'inception.pth'}")
    assert run(model, reference, tmp_path / "out", *flags) == 0
    assert "FID" in capsys.readouterr().out
    found = result(tmp_path / "out")["inception"]
    assert found["fid"] > 0
    assert found["weights_sha256"] == sha256_of(loaded)
    assert run(model, reference, tmp_path / "other", "--fid", f"--feature_weights={tmp_path / 'none.pth'}") == 2
    assert "not the weights" in error_line(capsys)


def test_a_file_that_holds_no_weights_is_not_run(tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity", reason="the extra fid")
    import os

    (tmp_path / "weights.pth").write_bytes(b"cos\nsystem\n(S'touch " + os.fsencode(tmp_path / "ran") + b"'\ntR.")
    with pytest.raises(BadInput, match="not a file of weights"):
        inception(tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()


# ---- the model card ----


def test_results_go_into_the_card(model: Path, reference: Path, tmp_path: Path) -> None:
    readme = model / "README.md"
    before = readme.read_text(encoding="utf-8")
    for images in (8, 10):
        assert run(model, reference, tmp_path / "out", "--update_card", f"--num_images={images}") == 0
    text = readme.read_text(encoding="utf-8")
    card = ModelCard(text)
    measured = result(tmp_path / "out")["in_domain"]["frechet_distance"]
    assert [(each.metric_type, each.metric_value) for each in card.data.eval_results] == [
        ("in-domain-frechet-distance", measured)
    ]
    assert card.data.metrics == ["in-domain-frechet-distance"]
    assert card.data.library_name == "diffusers"
    assert text.count("## Results") == 1
    assert f"| in-domain Fréchet distance | {measured:.4g} |" in text
    assert "10 pictures" in text
    assert is_our_card(text)
    body = re.sub(r"\n## Results\n.*?(?=\n## )", "", card.text, flags=re.DOTALL)
    assert body.split("<!--")[0].strip() == ModelCard(before).text.split("<!--")[0].strip()


def test_an_edited_card_stays_its_owners(model: Path) -> None:
    readme = model / "README.md"
    own = "# Mine\n\nMy words.\n\n## Results\n\nMy results.\n\n## More\n"
    readme.write_text(f"---\nlicense: mit\n---\n{own}", encoding="utf-8")
    add_results(model, {"fid": 12.3456}, "on 8 pictures.")
    text = readme.read_text(encoding="utf-8")
    assert "My words." in text and "My results." in text and "## More" in text
    assert "| FID | 12.35 |" in text
    assert not is_our_card(text)
    assert ModelCard(text).data.license == "mit"
    assert ModelCard(text).data.eval_results[0].metric_value == 12.3456
    add_results(model, {"in-domain-frechet-distance": 0.5}, "on 9 pictures, of another model.")
    text = readme.read_text(encoding="utf-8")
    assert "FID | 12" not in text and "on 8 pictures" not in text and "My results." in text
    assert [each.metric_value for each in ModelCard(text).data.eval_results] == [0.5]


def test_update_card_needs_a_folder(reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(reference / "train", reference, tmp_path / "out", "--update_card") == 2
    assert "--update_card" in error_line(capsys)


# ---- quality against steps ----


def exit_code_of(benchmark: dict[str, Any]) -> int:
    with pytest.raises(SystemExit) as done:
        benchmark["main"]()
    return done.value.code


def test_the_table_of_solvers_and_steps_goes_on_where_it_was(
    model: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(__file__).parent.parent / "benchmarks" / "quality_vs_steps.py"
    benchmark = runpy.run_path(str(file))
    flags = [
        model,
        f"--reference={reference}",
        f"--output_dir={tmp_path / 'steps'}",
        f"--cache_dir={tmp_path / 'cache'}",
    ]
    flags += ["--schedulers", "ddim", "unipc", "--num_inference_steps", "3", "60", "--num_images=6", "--few_images=4"]
    monkeypatch.setattr(sys, "argv", ["quality_vs_steps.py", *map(str, flags)])
    assert exit_code_of(benchmark) == 0
    said = capsys.readouterr().out
    results = tmp_path / "steps" / "results"
    names = {"ddim-3-4", "ddim-3-6", "unipc-3-4", "unipc-3-6", "ddim-60-4", "unipc-60-4"}
    assert {each.stem for each in results.iterdir()} == names
    few, many = (tmp_path / "steps" / "steps.md").read_text(encoding="utf-8").split("| in-domain")[1:]
    assert few.startswith(" Fréchet distance, 4 pictures | 3 | 60 |")
    assert many.startswith(" Fréchet distance, 6 pictures | 3 |")
    value = json.loads((results / "unipc-60-4.json").read_text(encoding="utf-8"))["in_domain"]["frechet_distance"]
    assert f"{value:.3f} |" in next(line for line in few.splitlines() if line.startswith("| UniPC"))
    assert "ddim-3, 6 pictures" in said
    assert Image.open(tmp_path / "steps" / "steps.png").width > 500

    (results / "ddim-60-4.json").unlink()
    assert exit_code_of(benchmark) == 0
    said = capsys.readouterr().out
    assert "ddim-60, 4 pictures" in said
    assert "ddim-3" not in said

    (reference / "train" / "000.png").unlink()  # cells of another reference are no rows of the same table
    assert exit_code_of(benchmark) == 0
    assert "ddim-3, 6 pictures" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["quality_vs_steps.py", str(tmp_path / "none"), *map(str, flags[1:])])
    assert exit_code_of(benchmark) == 2
    assert str(tmp_path / "none") in error_line(capsys)


# ---- calibration ----


def test_the_calibration_measures_every_series_and_the_models(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "calibrate_in_domain.py"))
    features, recipe = in_domain.in_domain_features, {**in_domain.RECIPE, "train_steps": 5, "train_batch_size": 8}
    monkeypatch.setitem(
        benchmark["check_order"].__globals__, "in_domain_features", lambda *given: features(*given, recipe=recipe)
    )
    drawn = save_pictures(tmp_path / "drawn", 10, seed=3)
    flags = [f"--reference={reference}", "--num_images=10", f"--models={drawn}", f"--cache_dir={tmp_path / 'cache'}"]
    monkeypatch.setattr(sys, "argv", ["calibrate_in_domain.py", *flags, f"--output_file={tmp_path / 'out.json'}"])
    assert exit_code_of(benchmark) in (0, 1)  # five updates are too few for the right order
    rows = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["rows"]
    amounts = {name: len(amounts) for name, (_, _, amounts) in benchmark["SERIES"].items()}
    assert Counter(row["series"] for row in rows) == {"real": 1, "models": 1, **amounts}
    assert {row["num_pictures"] for row in rows} == {10}
    assert "in order" in capsys.readouterr().out

    next(drawn.iterdir()).unlink()  # one too few
    assert exit_code_of(benchmark) == 2
    assert f"--models {drawn}: 9 pictures" in error_line(capsys)

    shutil.rmtree(reference / "validation")
    assert exit_code_of(benchmark) == 2
    assert f"--reference {reference}: has no validation/" in error_line(capsys)


# ---- ablation ----


TINY_UNET = {"block_out_channels": [8, 16], "attention_levels": [False, True]}
TINY_RUN = {"resolution": 16, "train_batch_size": 8, "eval_batch_size": 2, "mixed_precision": "no"}


@pytest.fixture
def ablation(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    folder = Path(__file__).parent.parent / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))  # it imports its neighbour
    return runpy.run_path(str(folder / "ablation.py"))


def test_every_variant_differs_from_the_modern_recipe_in_its_own_lever_only(ablation: dict[str, Any]) -> None:
    for full in (False, True):
        args = argparse.Namespace(num_pictures=6400, full=full)
        recipes = {name: ablation["recipe_of"](name, args) for name in ablation["VARIANTS"]}
        modern, counts = recipes["modern"], {"max_train_steps", "checkpointing_steps"}
        for name, recipe in recipes.items():
            seen = recipe["max_train_steps"] * recipe["train_batch_size"]
            assert seen == (5 if "5 times" in name else 1) * 6400
            changed = {key for key in {*recipe, *modern} - counts if recipe.get(key) != modern.get(key)}
            if name == "predicts the noise, without min-SNR":
                assert changed == {"prediction_type", "snr_gamma"}
            elif not name.startswith("original"):
                assert len(changed) == (name != "modern"), (name, changed)
        original = load_recipe("original")
        laid_over = {*counts, "unet", "eval_scheduler", "ddpm_num_inference_steps", "save_images_epochs"}
        laid_over |= set() if full else {"learning_rate", "train_batch_size"}
        assert {key: recipes["original"][key] for key in original if key not in laid_over} == {
            key: value for key, value in original.items() if key not in laid_over
        }
        assert recipes["original"]["unet"] == (ablation["UNET"] if not full else {})
        assert recipes["dropout 0.1"]["unet"]["dropout"] == 0.1 and modern["unet"]["dropout"] == 0.0


@pytest.mark.slow  # it trains
def test_the_ablation_trains_with_the_variants_recipe_and_refuses_another(
    ablation: dict[str, Any], reference: Path, tmp_path: Path
) -> None:
    args = argparse.Namespace(reference=reference, output_dir=tmp_path / "ablation", num_pictures=16, full=False)
    ablation["train"].__globals__["UNET"] |= TINY_UNET
    ablation["train"].__globals__["load_recipe"] = lambda name: {**load_recipe(name), **TINY_RUN}
    model = ablation["train"]("predicts the noise", args)
    trained = AnimeFacePipeline.from_pretrained(model)
    assert trained.scheduler.config.prediction_type == "epsilon" and trained.value_range == (-1, 1)
    assert json.loads((model / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"] == 2
    when = (model / "model_index.json").stat().st_mtime_ns
    assert ablation["train"]("predicts the noise", args) == model  # there already
    assert (model / "model_index.json").stat().st_mtime_ns == when
    with pytest.raises(BadInput, match="another command"):
        ablation["train"]("predicts the noise", argparse.Namespace(**{**vars(args), "num_pictures": 32}))


def test_the_ablation_writes_table_and_pictures_row_by_row(
    ablation: dict[str, Any], model: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "log.jsonl").write_text('{"step": 7, "loss": 1.0}\n', encoding="utf-8")
    output = tmp_path / "ablation"

    def trained(name: str, args: argparse.Namespace) -> Path:
        (output / name).mkdir(parents=True, exist_ok=True)
        if not (output / name / "model").exists():
            (output / name / "model").symlink_to(model)
            (output / name / "recipe.yaml").write_text("max_train_steps: 7\ntrain_batch_size: 14\n", encoding="utf-8")
        return output / name / "model"

    flags = [
        f"--reference={reference}",
        f"--output_dir={output}",
        "--num_pictures=100",
        "--variants",
        "modern",
        "original",
    ]
    flags += [f"--cache_dir={tmp_path / 'cache'}", "--num_images=8", "--num_inference_steps=3", "--scheduler=ddpm"]
    monkeypatch.setattr(sys, "argv", ["ablation.py", *flags])
    monkeypatch.setitem(ablation["train"].__globals__, "train", trained)
    assert exit_code_of(ablation) == 0
    table = (output / "ablation.md").read_text(encoding="utf-8")
    value = result(output / "original" / "evaluation")["in_domain"]["frechet_distance"]
    assert (
        f"| original | 98 | 7 | {value:.3f} |" in table
        and "DDPMScheduler, 3 steps" in table
        and "real pictures, limit" in table
    )
    assert Image.open(output / "ablation.png").size == (200 + 8 * 18, 2 * 18)

    more = [*(flag for flag in flags if flag not in ("original", "--num_images=8")), "--num_images=9"]
    monkeypatch.setattr(sys, "argv", ["ablation.py", *more])
    assert exit_code_of(ablation) == 0
    table = (output / "ablation.md").read_text(encoding="utf-8")
    assert "| modern |" in table and "| original |" not in table  # its distance is of another number of pictures


# ---- pictures of two runs, and losses of several ----


def test_two_runs_are_compared_by_seed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "compare_pictures.py"))

    def draw(name: str, *flags: str) -> Path:
        with pytest.raises(SystemExit):
            generate.main([str(model), f"--output_dir={tmp_path / name}", "--scheduler=ddim", *flags])
        return tmp_path / name

    full = draw("full", "--num_images=3", "--num_inference_steps=3")
    half = draw("half", "--num_images=4", "--num_inference_steps=3", "--dtype=bfloat16")
    other = draw("other", "--num_images=3", "--num_inference_steps=4")
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["x", str(full), str(half), f"--output_file={tmp_path / 'compared.png'}"])
    benchmark["main"]()
    said = capsys.readouterr().out
    names = sorted(file.name for file in full.glob("seed-*.png"))
    pictures = [[np.asarray(Image.open(folder / name), dtype=float) for name in names] for folder in (full, half)]
    mean = np.abs(np.array(pictures[0]) - np.array(pictures[1])).mean()
    assert f"| all | {mean:.2f} |" in said and said.count("| seed-") == 3
    assert Image.open(tmp_path / "compared.png").size == (3 * 16, 2 * 16)
    monkeypatch.setattr(sys, "argv", ["x", str(full), str(other)])
    with pytest.raises(SystemExit, match="differ in num_inference_steps"):
        benchmark["main"]()


@pytest.mark.slow  # it trains three times
def test_loss_curves_of_the_levers_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(__file__).parent.parent / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    benchmark = runpy.run_path(str(folder / "loss_curves.py"))
    del benchmark["LEVERS"]["bf16, channels last, compiled"]  # minutes
    faces = save_pictures(tmp_path / "faces", 16, seed=0)
    flags = [f"--train_data_dir={faces}", f"--output_dir={tmp_path / 'curves'}", "--resolution=16"]
    flags += ["--max_train_steps=20", "--train_batch_size=4", "--eval_batch_size=1", "--ddpm_num_inference_steps=2"]
    monkeypatch.setattr(sys, "argv", ["loss_curves.py", *flags])
    benchmark["main"]()
    rows = json.loads((tmp_path / "curves" / "loss_curves.json").read_text(encoding="utf-8"))["rows"]
    plain = rows.pop("float32, eager, contiguous")
    assert plain["largest_difference"] == 0 and len(rows) == 2
    assert rows["channels last"]["largest_difference"] < 1e-3
    assert 0 < rows["bf16"]["largest_difference"] < 0.05
    assert Image.open(tmp_path / "curves" / "loss_curves.png").width > 500
    monkeypatch.setattr(sys, "argv", ["loss_curves.py", *flags, "--seed=1"])
    with pytest.raises(SystemExit, match="another command"):
        benchmark["main"]()
