from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_unet
from gaussian import ExactGaussian
from PIL import Image

from animeface_pipeline import AnimeFacePipeline, interpolate
from animeface_pipeline.interpolate import DETERMINISTIC, draw_from_noise, invert, noise_of_seeds, slerp
from animeface_pipeline.schedulers import SCHEDULERS, original_scheduler, switch_scheduler


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Of an untrained network, which ends far outside [0, 1], with a range as wide."""
    AnimeFacePipeline(tiny_unet(), original_scheduler(), value_range=(-300, 300)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(model: Path, output_dir: Path, *flags: object) -> int:
    with pytest.raises(SystemExit) as exit:
        interpolate.main([str(model), f"--output_dir={output_dir}", "--num_inference_steps=5", *map(str, flags)])
    return exit.value.code


def quiet(pipe: AnimeFacePipeline, scheduler: str = "ddim") -> AnimeFacePipeline:
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = switch_scheduler(pipe.scheduler, scheduler)
    return pipe


# ---- the command ----


def test_frames_strip_and_animation(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(model, out, "--seeds", 3, 14, 15, "--num_frames=4", "--batch_size=3") == 0
    names = [f"frame-{number:03}.png" for number in range(7)]
    assert sorted(file.name for file in out.iterdir()) == sorted([*names, "interpolation.webp", "strip.png"])
    frames = [np.asarray(Image.open(out / name)) for name in names]
    assert len({frame.tobytes() for frame in frames}) == 7
    assert np.array_equal(np.asarray(Image.open(out / "strip.png")), np.concatenate(frames, axis=1))
    film = Image.open(out / "interpolation.webp")
    assert (film.n_frames, film.size, film.info["loop"]) == (12, (16, 16), 0)
    film.seek(8)  # there: 0 to 6, and back: 5, 4
    assert np.array_equal(np.asarray(film.convert("RGB")), frames[4])
    text = Image.open(out / "frame-004.png").text
    assert (text["faces"], text["scheduler"]) == ('["seed 3", "seed 14", "seed 15"]', "ddim")
    assert float(text["position"]) == pytest.approx(4 / 3)


@pytest.mark.parametrize("scheduler", ["ddim", "unipc", "heun", "euler"])
def test_at_its_ends_are_the_seeds_own_faces(scheduler: str, model: Path, tmp_path: Path) -> None:
    assert run(model, tmp_path / "out", "--seeds", 3, 14, "--num_frames=3", f"--scheduler={scheduler}") == 0
    pipe = quiet(AnimeFacePipeline.from_pretrained(model), scheduler)
    for name, seed in (("frame-000.png", 3), ("frame-002.png", 14)):
        face = pipe(generator=torch.Generator().manual_seed(seed), num_inference_steps=5).images[0]
        found = np.asarray(Image.open(tmp_path / "out" / name)).astype(int)
        assert np.abs(found - np.asarray(face)).max() <= 1


def test_from_a_picture_to_a_seed(model: Path, tmp_path: Path) -> None:
    Image.effect_noise((40, 30), 90).save(tmp_path / "portrait.jpg")
    flags = ("--images", tmp_path / "portrait.jpg", "--seeds", 14, "--num_frames=3")
    assert run(model, tmp_path / "out", *flags) == 0
    assert Image.open(tmp_path / "out" / "frame-000.png").text["faces"] == '["portrait.jpg", "seed 14"]'
    pipe = quiet(AnimeFacePipeline.from_pretrained(model))
    face = draw_from_noise(pipe, noise_of_seeds(pipe, [14]), 5)[0]
    found = np.asarray(Image.open(tmp_path / "out" / "frame-002.png")).astype(int)
    assert np.abs(found - np.asarray(face)).max() <= 1


def test_bad_input_is_one_line_and_leaves_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "words.png").write_text("no picture")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    out = tmp_path / "out"
    for flags, message in [
        (("--seeds", 3), "one face leads nowhere"),
        ((), "--seeds and --images"),
        (("--seeds", 3, 4, "--num_frames=1"), "at least 2"),
        (("--seeds", 3, -4), "from 0 to 2**63 - 1"),
        (("--seeds", 3, 4, "--scheduler=ddpm"), "ddpm"),
        (("--seeds", 3, 4, "--num_inference_steps=2000"), "at most 1000"),
        (("--seeds", 3, "--images", tmp_path / "words.png"), "words.png: none of the formats"),
        (("--seeds", 3, "--images", tmp_path / "none.png"), "none.png: cannot be opened"),
    ]:
        assert run(model, out, *flags) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert not out.exists()
    assert run(model, tmp_path / "full", "--seeds", 3, 4) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert run(tmp_path / "nowhere", out, "--seeds", 3, 4) == 2


# ---- the functions ----


def test_noise_on_the_arc_is_as_long_as_at_its_ends() -> None:
    start, end = noise_of_seeds(AnimeFacePipeline(ExactGaussian(64), original_scheduler()), [3, 14])
    for weight in (0.0, 0.25, 0.5, 1.0):
        assert slerp(start, end, weight).std() == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(slerp(start, end, 0.0), start)
    torch.testing.assert_close(slerp(start, end, 1.0), end)
    half = slerp(start, end, 0.5)
    to_start, to_end = (torch.cosine_similarity(half.flatten(), end.flatten(), 0) for end in (start, end))
    torch.testing.assert_close(to_start, to_end, atol=0.02, rtol=0)
    assert torch.equal(slerp(start, start, 0.3), start)


def test_the_solvers_of_the_walk_draw_no_noise() -> None:
    """From one noise comes one face, whatever the state of the global generator."""
    for name in SCHEDULERS:
        pipe = quiet(AnimeFacePipeline(ExactGaussian(), original_scheduler()), name)
        faces = []
        for state in (0, 1):
            torch.manual_seed(state)
            faces.append(np.asarray(draw_from_noise(pipe, noise_of_seeds(pipe, [7]), 10)[0]))
        assert np.array_equal(*faces) == (name in DETERMINISTIC)


class Predicts(ExactGaussian):
    """The exact network, answering with the picture or the velocity instead of the noise."""

    kind = "epsilon"

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        (noise,) = super().forward(sample, timestep)
        alpha_bar = self.alphas_cumprod[torch.as_tensor(timestep)]
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        picture = (sample - sigma * noise) / alpha
        return ({"epsilon": noise, "sample": picture, "v_prediction": alpha * noise - sigma * picture}[self.kind],)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_noise_of_a_drawn_face_is_found_again(kind: str) -> None:
    unet = Predicts()
    unet.kind = kind
    pipe = quiet(AnimeFacePipeline(unet, original_scheduler(prediction_type=kind)))
    noise = noise_of_seeds(pipe, range(8))
    pipe.scheduler.set_timesteps(200)
    face = pipe.decode(pipe.denoise(noise, pipe.scheduler.timesteps), "pt")
    inside = ((face > 0) & (face < 1)).all(dim=(1, 2, 3))  # what was clamped cannot be found again
    assert inside.sum() >= 5
    errors = []
    for iterations in (1, 3):
        found = invert(pipe, face[inside], 200, iterations)
        pipe.scheduler.set_timesteps(200)
        again = pipe.decode(pipe.denoise(found, pipe.scheduler.timesteps), "pt")
        errors.append(float((again - face[inside]).abs().mean()))
    assert errors[1] < 0.5 * errors[0]
    assert errors[1] < 0.005
    grey = noise[inside].mean(dim=(1, 2, 3))  # the direction that decides which grey is drawn
    assert torch.corrcoef(torch.stack([found.mean(dim=(1, 2, 3)), grey]))[0, 1] > 0.99


def test_counts_that_lead_nowhere_are_named(tiny_pipeline: AnimeFacePipeline) -> None:
    with pytest.raises(ValueError, match="must be from 1 to 1000"):
        invert(tiny_pipeline, Image.new("RGB", (16, 16)), 0)
    with pytest.raises(ValueError, match="both must be at least 2"):
        interpolate.interpolate(torch.zeros(2, 3, 16, 16), 1)


def test_inverting_warns_of_no_settings(tiny_pipeline: AnimeFacePipeline, capfd: pytest.CaptureFixture) -> None:
    tiny_pipeline.scheduler = switch_scheduler(tiny_pipeline.scheduler, "unipc", 4)
    invert(tiny_pipeline, Image.new("RGB", (16, 16)), 2)
    assert "were passed to" not in capfd.readouterr().err
