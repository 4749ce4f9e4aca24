from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from conftest import tiny_unet
from diffusers import RePaintScheduler
from gaussian import ExactGaussian
from PIL import Image

from animeface_pipeline import AnimeFaceInpaintPipeline
from animeface_pipeline.inpaint_animeface import resampling_levels
from animeface_pipeline.schedulers import SCHEDULERS, original_scheduler, switch_scheduler


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def painter(scheduler: str = "ddpm", **kwargs: object) -> AnimeFaceInpaintPipeline:
    """The exact network's pictures are one grey each: what belongs into a hole can be told from the rest."""
    pipe = AnimeFaceInpaintPipeline(ExactGaussian(), switch_scheduler(original_scheduler(), scheduler, 20), **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def right_half(size: int = 8) -> torch.Tensor:
    mask = torch.zeros(1, 1, size, size)
    mask[..., size // 2 :] = 1
    return mask


ONE_STEP_SOLVERS = [name for name in SCHEDULERS if name != "heun"]


# ---- what comes out ----


@pytest.mark.parametrize("name", ONE_STEP_SOLVERS)
def test_what_is_redrawn_fits_the_rest(name: str) -> None:
    greys = torch.tensor([0.2, 0.4, 0.8]).reshape(3, 1, 1, 1).expand(3, 3, 8, 8)
    call = {"num_inference_steps": 20, "jump_length": 4, "generator": seeded(), "output_type": "pt"}
    images = painter(name)(greys, right_half(), jump_n_sample=5, **call).images
    torch.testing.assert_close(images[..., 4:].mean(dim=(1, 2, 3)), greys[:, 0, 0, 0], atol=0.05, rtol=0)


def test_resampling_makes_it_fit_better() -> None:
    """As in figure 3 of the paper: pasting the known part alone leaves the two halves at odds."""
    greys = torch.linspace(0.1, 0.9, 16).reshape(16, 1, 1, 1).expand(16, 3, 8, 8)

    def error(jump_n_sample: int) -> float:
        images = painter()(greys, right_half(), 20, 2, jump_n_sample, seeded(), output_type="pt").images
        return float((images[..., 4:].mean(dim=(1, 2, 3)) - greys[:, 0, 0, 0]).abs().mean())

    assert error(10) < 0.6 * error(1)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler", "unipc"])
@pytest.mark.parametrize("value_range", [(0, 1), (-1, 1), (-3, 200)])
def test_what_is_not_masked_is_unchanged_to_the_bit(name: str, value_range: tuple[float, float]) -> None:
    pipe = AnimeFaceInpaintPipeline(tiny_unet(), switch_scheduler(original_scheduler(), name, 4), value_range)
    pipe.set_progress_bar_config(disable=True)
    values = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    kept = right_half(16)[0, 0].numpy() == 0
    call = {"num_inference_steps": 4, "jump_length": 2, "jump_n_sample": 2}
    pictures = pipe([Image.fromarray(picture) for picture in values], right_half(16), **call).images
    for picture, given in zip(pictures, values):
        assert np.array_equal(np.asarray(picture)[kept], given[kept])
        assert not np.array_equal(np.asarray(picture)[~kept], given[~kept])
    floats = np.random.default_rng(1).random((2, 16, 16, 3), dtype=np.float32)
    assert np.array_equal(pipe(floats, right_half(16), output_type="np", **call).images[:, kept], floats[:, kept])
    tensor = torch.from_numpy(floats).permute(0, 3, 1, 2)
    images = pipe(tensor, right_half(16), output_type="pt", **call).images
    assert torch.equal(images[..., :8], tensor[..., :8])


def test_one_generator_per_picture() -> None:
    pipe, greys = painter(), torch.rand(3, 3, 8, 8, generator=seeded())
    call = {"num_inference_steps": 10, "jump_length": 2, "jump_n_sample": 2, "output_type": "pt"}
    together = pipe(greys, right_half(), generator=[seeded(k) for k in (5, 6, 7)], **call).images
    alone = pipe(greys[1], right_half(), generator=seeded(6), **call).images
    torch.testing.assert_close(together[1:2], alone)


# ---- the way up and down ----


@pytest.mark.parametrize(("steps", "jump_length", "jump_n_sample"), [(250, 10, 10), (20, 4, 3), (7, 3, 2), (5, 9, 4)])
def test_the_levels_are_those_of_diffusers(steps: int, jump_length: int, jump_n_sample: int) -> None:
    """Its scheduler lists the timestep before each denoising, and each one on the way up."""
    scheduler = RePaintScheduler(num_train_timesteps=steps)
    scheduler.set_timesteps(steps, jump_length, jump_n_sample)
    listed, before = [], steps
    for timestep in scheduler.timesteps.tolist():
        if timestep < before:
            listed.append(timestep)  # from timestep + 1 steps left to `timestep` left
        before = timestep
    levels = resampling_levels(steps, jump_length, jump_n_sample)
    assert [after for before, after in pairwise(levels) if after < before] == listed
    assert {after - before for before, after in pairwise(levels)} <= {-1, jump_length}


def test_the_number_of_calls_that_the_docstring_names() -> None:
    levels = resampling_levels(250, 10, 10)
    assert sum(after < before for before, after in pairwise(levels)) == 2410
    assert resampling_levels(3, 1, 1) == [3, 2, 1, 0]


def test_callback_sees_every_denoising() -> None:
    pipe, seen = painter(), []

    def watch(pipe: AnimeFaceInpaintPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        seen.append((step, int(timestep)))
        return {"sample": torch.full_like(tensors["sample"], 0.25)} if step == pipe.num_timesteps - 1 else {}

    images = pipe(torch.zeros(3, 8, 8), right_half(), 4, 2, 2, output_type="pt", callback_on_step_end=watch).images
    assert seen == list(enumerate([999, 749, 499, 249, 499, 249]))
    assert torch.equal(images[0, 0, 0], torch.tensor([0.0] * 4 + [0.25] * 4))


@pytest.mark.parametrize("name", ["ddpm", "euler"])
def test_a_jump_has_the_noise_of_its_level(name: str) -> None:
    """Of a picture that is known as a whole, α and σ at every level are those that it was noised with."""
    pipe = painter(name)
    alphas, sigmas = pipe._alphas_and_sigmas(20)
    assert (alphas[0], sigmas[0]) == (1, 0)
    snr = (alphas / sigmas)[1:] ** 2
    alpha_bar = original_scheduler().alphas_cumprod[torch.arange(49, 1000, 50)]
    torch.testing.assert_close(snr, alpha_bar / (1 - alpha_bar), rtol=1e-3, atol=0)


# ---- what goes in ----


def test_all_kinds_of_mask_are_the_same_to_it() -> None:
    pipe, expected = painter(), right_half() > 0.5
    array = expected[0, 0].numpy()
    picture = Image.fromarray(array.astype(np.uint8) * 255)
    kinds = [
        (picture, [picture], picture.convert("1"), picture.convert("RGB"), picture.resize((80, 80), 0)),
        (
            array.astype(np.float32),
            array,
            array.astype(np.uint8) * 255,
            array[None],
            array[..., None],
            array[None, ..., None],
        ),
        (expected, expected[0], expected[0, 0], expected.float(), [expected[0]], [expected[0, 0]]),
    ]
    for mask in (mask for kind in kinds for mask in kind):
        assert torch.equal(pipe.preprocess_mask(mask), expected)
    assert pipe.preprocess_mask([picture, picture]).shape == (2, 1, 8, 8)


def test_a_mask_drawn_on_a_transparent_layer_is_what_was_drawn() -> None:
    layer = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    layer.paste((255, 255, 255, 255), (4, 0, 8, 8))
    ones = right_half()[0].numpy().astype(np.uint8)
    for mask in (layer, layer.convert("LA"), ones, ones.astype(np.int64), ones * 255):
        assert torch.equal(painter().preprocess_mask(mask).float(), right_half())


def test_one_mask_for_all_or_one_picture_for_all() -> None:
    pipe, call = painter(), {"num_inference_steps": 2, "jump_n_sample": 1, "output_type": "pt"}
    masks = torch.cat([right_half(), 1 - right_half()])
    assert pipe(torch.zeros(3, 3, 8, 8), right_half(), **call).images.shape == (3, 3, 8, 8)
    images = pipe(torch.zeros(1, 3, 8, 8), masks, **call).images
    assert (images[0, :, :, :4] == 0).all() and (images[1, :, :, 4:] == 0).all()


BAD_CALLS = [
    ({"image": torch.zeros(3, 3, 8, 8), "mask_image": torch.zeros(2, 1, 8, 8)}, "2 masks for 3 images"),
    ({"mask_image": torch.zeros(1, 1, 4, 4)}, r"mask_image has the shape \(1, 1, 4, 4\): expected"),
    ({"mask_image": torch.zeros(1, 3, 8, 8)}, "mask_image has the shape"),
    ({"mask_image": []}, "mask_image: an empty list"),
    ({"mask_image": np.full((1, 8, 8), 2.0)}, r"mask_image: .* bools, floats in \[0, 1\]"),
    ({"mask_image": torch.full((1, 1, 8, 8), float("nan"))}, "bools, floats"),
    ({"mask_image": "mask.png"}, "incorrect format"),
    ({"image": np.zeros((8, 8, 3), np.uint8)}, "floats"),
    ({"jump_length": 0}, "jump_length=0"),
    ({"jump_n_sample": 1.5}, "jump_n_sample=1.5"),
    ({"num_inference_steps": 0}, "num_inference_steps=0"),
    ({"generator": [seeded(), seeded()]}, "2 generators"),
    ({"output_type": "latent"}, "output_type='latent'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_CALLS)
def test_bad_calls_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        painter()(**{"image": torch.zeros(3, 8, 8), "mask_image": right_half(), "num_inference_steps": 4, **arguments})


@pytest.mark.parametrize(
    "name",
    [
        "HeunDiscreteScheduler",
        "PNDMScheduler",
        "KDPM2DiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "RePaintScheduler",
    ],
)
def test_schedulers_that_cannot_go_back_are_named(name: str) -> None:
    pipe = painter()
    pipe.scheduler = getattr(diffusers, name)()
    with pytest.raises(ValueError, match=f"{name} cannot"):
        pipe(torch.zeros(3, 8, 8), right_half(), 10)
