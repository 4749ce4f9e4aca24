from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import tiny_unet
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from gaussian import ExactGaussian
from PIL import Image

from animeface_pipeline import AnimeFaceImg2ImgPipeline, AnimeFaceInpaintPipeline, AnimeFacePipeline
from animeface_pipeline.images import denoising_strips
from animeface_pipeline.schedulers import SCHEDULERS, original_scheduler, switch_scheduler


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def editor(scheduler: str = "ddim", **kwargs: object) -> AnimeFaceImg2ImgPipeline:
    """The exact network's pictures are one grey each: what it draws from a picture can be told beforehand."""
    pipe = AnimeFaceImg2ImgPipeline(ExactGaussian(), switch_scheduler(original_scheduler(), scheduler, 20), **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def half_and_half(size: int = 8) -> torch.Tensor:
    """A picture that the exact network never draws: dark on the left, bright on the right, 0.4 on average."""
    image = torch.full((1, 3, size, size), 0.1)
    image[..., size // 2 :] = 0.7
    return image


# ---- what comes out ----


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_draws_a_face_that_is_like_the_picture(name: str) -> None:
    images = editor(name)(half_and_half().expand(16, -1, -1, -1), 0.3, 20, seeded(), output_type="pt").images
    assert images.std(dim=(1, 2, 3)).max() < 0.12  # the halves have become one grey, or nearly
    assert 0.35 < images.mean() < 0.45  # that of the picture


def test_strength_says_how_much_of_the_picture_is_kept() -> None:
    """The exact network keeps the grey alone, and of that the less the more noise there was."""
    pictures = half_and_half().expand(32, -1, -1, -1)
    greys = [
        editor()(pictures, strength, 100, seeded(), output_type="pt").images.mean(dim=(1, 2, 3))
        for strength in (0.05, 0.2, 0.5, 0.8)
    ]
    distances = [float((grey - 0.4).abs().mean()) for grey in greys]
    assert distances == sorted(distances) and distances[0] < 0.02 and distances[-1] > 0.2


def test_at_full_strength_only_the_noise_decides() -> None:
    pipe, plain = editor(), AnimeFacePipeline(**editor().components)
    plain.set_progress_bar_config(disable=True)
    edited = pipe(half_and_half(), 1.0, 20, seeded(3), output_type="pt").images
    torch.testing.assert_close(edited, plain(1, seeded(3), 20, "pt").images, atol=0.02, rtol=0)


@pytest.mark.parametrize("name", ["ddim", "heun", "dpmsolver++"])
def test_it_takes_the_last_steps_of_the_way(name: str) -> None:
    pipe, seen = editor(name), []
    pipe(
        half_and_half(),
        0.35,
        20,
        callback_on_step_end=lambda pipe, step, t, tensors: seen.append((step, int(t))) or {},
    )
    order = pipe.scheduler.order
    assert [t for _, t in seen] == [int(t) for t in pipe.scheduler.timesteps[13 * order :]]
    assert [step for step, _ in seen] == list(range(pipe.num_timesteps))
    assert seen[0][1] == 349


def test_value_range_goes_in_and_out() -> None:
    """A network that predicts no noise at all gives the picture back, whatever black and white are to it."""
    unet = tiny_unet()
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    picture = torch.rand(2, 3, 16, 16, generator=seeded())
    for value_range in ((0, 1), (-1, 1), (-7, 300)):
        pipe = AnimeFaceImg2ImgPipeline(unet, original_scheduler(), value_range)
        torch.testing.assert_close(pipe.decode(pipe.encode(picture), "pt"), picture)
        assert pipe.encode(torch.zeros(1, 3, 16, 16)).unique().tolist() == [value_range[0]]
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        edited = pipe(picture, 0.01, 1000, seeded(), output_type="pt").images
        assert 0 < (edited - picture).abs().mean() < 0.2


def test_one_generator_per_picture(tiny_pipeline: AnimeFacePipeline) -> None:
    pipe = AnimeFaceImg2ImgPipeline(**tiny_pipeline.components)
    pipe.set_progress_bar_config(disable=True)
    pictures = torch.rand(3, 3, 16, 16, generator=seeded())
    together = pipe(pictures, 0.01, generator=[seeded(k) for k in (5, 6, 7)], output_type="pt").images
    alone = pipe(pictures[1], 0.01, generator=seeded(6), output_type="pt").images
    torch.testing.assert_close(together[1:2], alone, atol=1 / 255, rtol=0)


def test_strips_of_an_edit() -> None:
    images, strips = denoising_strips(
        editor(), num_stages=4, image=half_and_half(), strength=0.5, num_inference_steps=16
    )
    assert strips[0].size == (4 * 8, 8)
    assert np.array_equal(np.asarray(strips[0])[:, -8:], np.asarray(images[0]))


# ---- what goes in ----


def test_all_kinds_of_picture_are_the_same_to_it(tmp_path: Path) -> None:
    array = (np.random.default_rng(0).random((2, 8, 8, 3)) * 255).astype(np.uint8)
    floats = array.astype(np.float32) / 255
    tensor = torch.from_numpy(floats).permute(0, 3, 1, 2)
    pictures = [Image.fromarray(entry) for entry in array]
    pipe = editor()
    for image in (pictures, tuple(pictures), floats, list(floats), tensor, list(tensor), [tensor[:1], tensor[1:]]):
        assert torch.equal(pipe.preprocess(image), tensor)
    for image in (pictures[0], floats[0], tensor[0], tensor[:1]):
        assert torch.equal(pipe.preprocess(image), tensor[:1])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "CMYK"])
def test_pictures_of_every_mode_and_size(mode: str) -> None:
    picture = Image.new("RGB", (40, 20), "white").convert("L" if mode == "I;16" else mode)
    image = editor().preprocess(picture.convert(mode))
    assert image.shape == (1, 3, 8, 8)


def test_a_picture_is_read_as_one_sees_it(tiny_pipeline: AnimeFacePipeline) -> None:
    """Turned as its EXIF block says, transparency on white, 16 bits scaled."""
    turned = Image.new("RGB", (16, 16))
    turned.paste("white", (0, 0, 16, 8))
    turned.getexif()[0x0112] = 3  # upside down
    pixels = tiny_pipeline.preprocess(turned)
    assert pixels[0, 0, 0, 0] == 0 and pixels[0, 0, -1, 0] == 1
    assert (tiny_pipeline.preprocess(Image.new("RGBA", (16, 16), (255, 0, 0, 0))) == 1).all()
    grey = tiny_pipeline.preprocess(Image.fromarray(np.full((16, 16), 32768, np.uint16)))
    assert (grey == 127 / 255).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("F", (16, 16)), "a picture of mode F"),
        ([Image.new("RGB", (16, 16)), np.zeros((16, 16, 3))], "must be of one kind"),
        (np.zeros((0, 16, 16, 3)), "there is nothing in it"),
    ],
)
def test_what_is_no_picture_is_named(image: object, message: str, tiny_pipeline: AnimeFacePipeline) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_pipeline.preprocess(image)


def test_another_size_is_cropped_to_the_centred_square() -> None:
    picture = Image.new("RGB", (64, 32), "black")
    picture.paste("white", (16, 0, 48, 32))
    assert editor().preprocess(picture).min() > 0.9
    assert editor().preprocess(picture.crop((0, 0, 32, 32))).min() == 0


BAD_CALLS = [
    ({"image": []}, "empty list"),
    ({"image": "face.png"}, "incorrect format"),
    ({"image": torch.zeros(1, 3, 16, 16)}, r"shape \(1, 3, 16, 16\): expected \(batch_size, 3, 8, 8\)"),
    ({"image": torch.zeros(1, 1, 8, 8)}, "shape"),
    ({"image": np.zeros((8, 8, 3), np.uint8)}, "floats"),
    ({"image": np.full((8, 8, 3), 255.0)}, r"\[0, 1\]"),
    ({"image": torch.full((3, 8, 8), float("nan"))}, r"\[0, 1\]"),
    ({"strength": 0}, "strength=0: must be a number above 0 and up to 1"),
    ({"strength": 1.5}, "strength=1.5"),
    ({"strength": 0.01, "num_inference_steps": 50}, "more than 1/50"),
    ({"num_inference_steps": 2000}, "num_inference_steps=2000"),
    ({"generator": [seeded(), seeded()]}, "2 generators for batch_size=1"),
    ({"output_type": "latent"}, "output_type='latent'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_CALLS)
def test_bad_calls_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        editor()(**{"image": half_and_half(), **arguments})


def test_a_scheduler_that_adds_no_noise_is_named() -> None:
    pipe = editor()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no add_noise"):
        pipe(half_and_half(), 0.5, 10)


# ---- sharing, loading, saving: for both tasks ----

TASKS = [AnimeFaceImg2ImgPipeline, AnimeFaceInpaintPipeline]


@pytest.mark.parametrize("task", TASKS)
def test_the_components_are_shared(task: type[AnimeFacePipeline]) -> None:
    pipe = AnimeFacePipeline(tiny_unet().to(torch.bfloat16), original_scheduler(), value_range=(-1, 1))
    for other in (task(**pipe.components), task.from_pipe(pipe)):
        assert type(other) is task
        assert other.unet is pipe.unet and other.scheduler is pipe.scheduler
        assert other.value_range == (-1, 1)
        assert pipe.unet.dtype == torch.bfloat16
        assert type(AnimeFacePipeline.from_pipe(other)) is AnimeFacePipeline
    ddim = DDIMScheduler()
    assert task.from_pipe(pipe, scheduler=ddim).scheduler is ddim and pipe.scheduler is not ddim


def test_from_pipe_refuses_what_it_cannot_share(tiny_pipeline: AnimeFacePipeline) -> None:
    with pytest.raises(ValueError, match="not torch_dtype"):
        AnimeFaceImg2ImgPipeline.from_pipe(tiny_pipeline, torch_dtype=torch.float16)
    vq = diffusers.DDPMPipeline(
        diffusers.UNet2DModel(
            sample_size=16,
            block_out_channels=(32, 32),
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        ),
        original_scheduler(),
    )
    with pytest.raises(ValueError, match="DDPMPipeline"):
        AnimeFaceImg2ImgPipeline.from_pipe(vq)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_loaded_from_any_pipeline_and_saved_as_a_plain_one(
    task: type[AnimeFacePipeline], tiny_pipeline: AnimeFacePipeline, tmp_path: Path
) -> None:
    tiny_pipeline.save_pretrained(tmp_path / "plain")
    pipe = task.from_pretrained(tmp_path / "plain")
    assert type(pipe) is task
    pipe.save_pretrained(tmp_path / "again")
    plain, again = ((tmp_path / name / "model_index.json").read_text() for name in ("plain", "again"))
    assert plain == again
    remote = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again", trust_remote_code=True)
    remote.set_progress_bar_config(disable=True)
    assert type(remote).__name__ == "AnimeFacePipeline"
    shared = task.from_pipe(remote)
    assert shared.unet is remote.unet
