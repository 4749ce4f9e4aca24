import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import tiny_unet
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet2DModel, UniPCMultistepScheduler
from safetensors.torch import load_file, save_file

from animeface_pipeline import AnimeFacePipeline, AnimeFaceUNet2DModel
from animeface_pipeline.schedulers import original_scheduler

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipe: AnimeFacePipeline, **kwargs: object) -> torch.Tensor:
    """Two pictures in 1000 steps would take long; a deterministic solver's 5 show the same."""
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    arguments = {"batch_size": 2, "generator": seeded(), "num_inference_steps": 5, "output_type": "pt", **kwargs}
    return pipe(**arguments).images


# ---- calling ----


def test_output_types(tiny_pipeline: AnimeFacePipeline) -> None:
    tensor = draw(tiny_pipeline)
    assert tensor.shape == (2, 3, 16, 16) and 0 <= tensor.min() < tensor.max() <= 1
    array = draw(tiny_pipeline, output_type="np")
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    pictures = draw(tiny_pipeline, output_type="pil")
    assert [picture.size for picture in pictures] == [(16, 16)] * 2
    assert np.array_equal(np.asarray(pictures[1]), (array[1] * 255).round().astype("uint8"))
    assert isinstance(tiny_pipeline(num_inference_steps=1), diffusers.ImagePipelineOutput)
    (images,) = tiny_pipeline(num_inference_steps=1, return_dict=False)
    assert len(images) == 1


def test_one_generator_per_image_makes_an_image_independent_of_its_batch(tiny_pipeline: AnimeFacePipeline) -> None:
    """With a scheduler that draws noise in every step."""
    arguments = {"num_inference_steps": 5, "output_type": "pt"}
    together = tiny_pipeline(3, [seeded(k) for k in (5, 6, 7)], **arguments).images
    for row, seed in enumerate((5, 6, 7)):
        alone = tiny_pipeline(1, [seeded(seed)], **arguments).images
        torch.testing.assert_close(together[row], alone[0], atol=1 / 255, rtol=0)


def test_value_range_is_honoured_in_decoding(tiny_pipeline: AnimeFacePipeline) -> None:
    sample = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0]).expand(1, 3, 6, 6)
    assert torch.equal(tiny_pipeline.decode(sample, "pt")[0, 0, 0], torch.tensor([0, 0, 0, 0.5, 1, 1]))
    signed = AnimeFacePipeline(tiny_pipeline.unet, tiny_pipeline.scheduler, value_range=(-1, 1))
    assert torch.equal(signed.decode(sample, "pt")[0, 0, 0], torch.tensor([0, 0, 0.5, 0.75, 1, 1]))
    assert AnimeFacePipeline(**signed.components).value_range == (-1.0, 1.0)
    for bad in ((1, 0), (0, 0), (0, float("nan")), (0, float("inf"))):
        with pytest.raises(ValueError, match="value_range"):
            AnimeFacePipeline(tiny_pipeline.unet, tiny_pipeline.scheduler, value_range=bad)


def test_callback_sees_and_may_change_every_step(tiny_pipeline: AnimeFacePipeline) -> None:
    seen = []

    def watch(pipe: AnimeFacePipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        seen.append((step, int(timestep), tensors["sample"].shape))
        return {"sample": torch.full_like(tensors["sample"], 0.25)} if step == 2 else {}

    images = tiny_pipeline(2, num_inference_steps=3, output_type="pt", callback_on_step_end=watch).images
    assert seen == [(step, timestep, (2, 3, 16, 16)) for step, timestep in enumerate((999, 666, 332))]
    assert torch.equal(images, torch.full((2, 3, 16, 16), 0.25))


BAD_CALLS = [
    ({"batch_size": 0}, "batch_size=0"),
    ({"batch_size": 1.5}, "batch_size=1.5"),
    ({"num_inference_steps": 0}, "num_inference_steps=0: must be a whole number from 1 to 1000"),
    ({"num_inference_steps": 1001}, "num_inference_steps=1001: must be a whole number from 1 to 1000"),
    ({"batch_size": 3, "generator": [torch.Generator()]}, "1 generators for batch_size=3"),
    ({"output_type": "latent"}, "output_type='latent'"),
    ({"callback_on_step_end_tensor_inputs": ["latents"]}, "latents"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_CALLS, ids=[message[:30] for _, message in BAD_CALLS])
def test_bad_calls_are_refused(arguments: dict, message: str, tiny_pipeline: AnimeFacePipeline) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(**arguments)


def test_few_steps_with_the_wrong_variance_are_warned_of(
    tiny_pipeline: AnimeFacePipeline, caplog: pytest.LogCaptureFixture
) -> None:
    logger = diffusers.utils.logging.get_logger("animeface_pipeline.pipeline_animeface")
    logger.addHandler(caplog.handler)
    tiny_pipeline(num_inference_steps=2)
    assert "leaves noise in the picture at 2 steps" in caplog.text
    caplog.clear()
    tiny_pipeline.scheduler = UniPCMultistepScheduler.from_config(tiny_pipeline.scheduler.config)
    tiny_pipeline(num_inference_steps=2)
    assert caplog.text == ""


def test_half_precision_gets_the_same_noise_and_steps_in_float32(tiny_pipeline: AnimeFacePipeline) -> None:
    inputs, samples = [], []
    tiny_pipeline.unet.register_forward_pre_hook(lambda unet, args: inputs.append(args[0]))

    def keep(pipe: AnimeFacePipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        samples.append(tensors["sample"])
        return {}

    for dtype in (torch.float32, torch.bfloat16):
        tiny_pipeline.to(dtype)(2, seeded(), 1, callback_on_step_end=keep)
    assert [tensor.dtype for tensor in inputs] == [torch.float32, torch.bfloat16]
    assert torch.equal(inputs[0].bfloat16(), inputs[1])
    assert [tensor.dtype for tensor in samples] == [torch.float32, torch.float32]


def test_to_offload_and_progress_bar(tiny_pipeline: AnimeFacePipeline, capsys: pytest.CaptureFixture) -> None:
    expected = draw(tiny_pipeline)
    assert tiny_pipeline.to("cpu", torch.float64).unet.dtype == torch.float64
    tiny_pipeline.to(torch.float32)
    tiny_pipeline.enable_model_cpu_offload(device="cpu")
    assert torch.equal(draw(tiny_pipeline), expected)
    capsys.readouterr()
    tiny_pipeline.set_progress_bar_config(disable=False, desc="denoising")
    tiny_pipeline(num_inference_steps=2)
    assert "denoising" in capsys.readouterr().err


def test_importing_the_package_loads_only_what_it_needs() -> None:
    code = (
        "import sys, animeface_pipeline; assert 'torch' not in sys.modules;"
        "from animeface_pipeline import AnimeFacePipeline, AnimeFaceUNet2DModel;"
        "heavy = {'gradio', 'datasets', 'matplotlib', 'torchmetrics', 'pandas', 'torchvision'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# ---- saving and loading ----


def test_the_folder_has_the_hub_layout_and_no_paths_in_it(tiny_pipeline: AnimeFacePipeline, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    tiny_pipeline.save_pretrained(first)
    AnimeFacePipeline.from_pretrained(first).save_pretrained(second)
    files = {str(path.relative_to(second)) for path in second.rglob("*") if path.is_file()}
    assert files == {
        "README.md",
        "model_index.json",
        "pipeline_animeface.py",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/unet_animeface.py",
        WEIGHTS,
    }
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
        assert str(tmp_path).encode() not in (second / name).read_bytes(), name
    index = json.loads((second / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == ["pipeline_animeface", "AnimeFacePipeline"]
    assert index["unet"] == ["unet_animeface", "AnimeFaceUNet2DModel"]
    assert index["value_range"] == [0.0, 1.0]


LOADERS = """
import sys, torch
if {blocked!r}:
    sys.modules["animeface_pipeline"] = None  # importing it fails, as if it were not installed
from diffusers import AutoModel, DDIMScheduler, DiffusionPipeline
def pictures(pipe):
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe(2, torch.Generator().manual_seed(0), 5, "pt").images
pipe = DiffusionPipeline.from_pretrained({folder!r}, trust_remote_code=True)
assert type(pipe).__module__.startswith("diffusers_modules"), type(pipe).__module__
assert pipe.value_range == (-1.0, 1.0)
unet = AutoModel.from_pretrained({folder!r}, subfolder="unet", trust_remote_code=True)
assert type(unet).__name__ == "AnimeFaceUNet2DModel"
torch.save(pictures(pipe), {out!r} + "1")
pipe.save_pretrained({again!r})
torch.save(pictures(DiffusionPipeline.from_pretrained({again!r}, trust_remote_code=True)), {out!r} + "2")
"""


@pytest.mark.parametrize("blocked", [True, False], ids=["without the package", "with the package"])
def test_the_generic_call_gives_the_same_pictures(blocked: bool, tmp_path: Path) -> None:
    pipe = AnimeFacePipeline(tiny_unet(), original_scheduler(), value_range=(-1, 1))
    folder, again, out = (str(tmp_path / name) for name in ("pipe", "again", "out.pt"))
    pipe.save_pretrained(folder)
    code = LOADERS.format(blocked=blocked, folder=folder, again=again, out=out)
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on the number of threads
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert ran.returncode == 0, ran.stderr
    assert "not expected and will be ignored" not in ran.stderr
    loaded_here = AnimeFacePipeline.from_pretrained(folder)
    assert type(loaded_here.unet) is AnimeFaceUNet2DModel
    expected = draw(pipe)
    assert torch.equal(draw(loaded_here), expected)
    assert torch.equal(draw(AnimeFacePipeline.from_pretrained(again)), expected)  # what remote code saved is whole
    for suffix in "12":
        assert torch.equal(torch.load(out + suffix), expected)


def test_parts_load_alone_and_may_be_replaced(tiny_pipeline: AnimeFacePipeline, tmp_path: Path) -> None:
    expected = draw(tiny_pipeline)
    tiny_pipeline.save_pretrained(tmp_path)
    unet = AnimeFaceUNet2DModel.from_pretrained(tmp_path, subfolder="unet")
    assert not unet.training
    loaded = AnimeFacePipeline.from_pretrained(tmp_path, unet=unet, scheduler=tiny_pipeline.scheduler)
    assert loaded.unet is unet and loaded.scheduler is tiny_pipeline.scheduler
    assert torch.equal(draw(loaded), expected)
    half = AnimeFacePipeline.from_pretrained(tmp_path, torch_dtype=torch.float16, value_range=(-1.0, 1.0))
    assert half.unet.dtype == torch.float16 and half.value_range == (-1.0, 1.0)


def test_a_swapped_scheduler_keeps_its_class_and_timesteps(tiny_pipeline: AnimeFacePipeline, tmp_path: Path) -> None:
    scheduler = DPMSolverMultistepScheduler.from_config(tiny_pipeline.scheduler.config, solver_order=3)
    tiny_pipeline.scheduler = scheduler
    tiny_pipeline.save_pretrained(tmp_path)
    loaded = AnimeFacePipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is DPMSolverMultistepScheduler and loaded.scheduler.config.solver_order == 3
    for one in (scheduler, loaded.scheduler):
        one.set_timesteps(7)
    assert loaded.scheduler.timesteps.tolist() == scheduler.timesteps.tolist()
    swapped_later = UniPCMultistepScheduler.from_config(loaded.scheduler.config)
    swapped_later.set_timesteps(7)
    assert swapped_later.timesteps.tolist() == scheduler.timesteps.tolist()


def test_a_variant_is_saved_beside_the_weights(tiny_pipeline: AnimeFacePipeline, tmp_path: Path) -> None:
    tiny_pipeline.save_pretrained(tmp_path)
    tiny_pipeline.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert AnimeFacePipeline.from_pretrained(tmp_path).unet.dtype == torch.float32
    half = AnimeFacePipeline.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert half.unet.dtype == torch.float16


def test_no_pickle_is_written_or_read(tiny_pipeline: AnimeFacePipeline, tmp_path: Path) -> None:
    for part in (tiny_pipeline, tiny_pipeline.unet):
        with pytest.raises(ValueError, match="safetensors only"):
            part.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    tiny_pipeline.save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / "unet/diffusion_pytorch_model.bin")
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(OSError, match=r"diffusion_pytorch_model.safetensors"):
        AnimeFacePipeline.from_pretrained(tmp_path)


def test_a_stock_diffusers_network_is_not_mistaken_for_ours(tmp_path: Path) -> None:
    stock = diffusers.DDPMPipeline(
        UNet2DModel(
            16, block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
        ),
        original_scheduler(),
    )
    stock.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="describes a DDPMPipeline, not an AnimeFacePipeline"):
        AnimeFacePipeline.from_pretrained(tmp_path)


# ---- folders that cannot be loaded: one clear error each ----


def truncate(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def change_a_shape(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({**weights, "conv_in.weight": torch.zeros(8, 4, 3, 3)}, folder / WEIGHTS, metadata={"format": "pt"})


def lose_a_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["conv_out.bias"]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def add_a_tensor(folder: Path) -> None:
    save_file({**load_file(folder / WEIGHTS), "extra": torch.zeros(1)}, folder / WEIGHTS, metadata={"format": "pt"})


def write_bad_config(folder: Path) -> None:
    config = json.loads((folder / "unet/config.json").read_text(encoding="utf-8"))
    (folder / "unet/config.json").write_text(json.dumps({**config, "norm_num_groups": 5}), encoding="utf-8")


def change_index(folder: Path, **values: object) -> None:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    (folder / "model_index.json").write_text(json.dumps({**index, **values}), encoding="utf-8")


BAD_FOLDERS = {
    "no such folder": (shutil.rmtree, OSError, "no such folder"),
    "no model_index.json": (lambda f: (f / "model_index.json").unlink(), OSError, "no model_index.json"),
    "index not JSON": (lambda f: (f / "model_index.json").write_text("{"), OSError, "model_index.json is not JSON"),
    "index a list": (lambda f: (f / "model_index.json").write_text("[]"), OSError, "holds no JSON object"),
    "a scheduler of nobody": (lambda f: change_index(f, scheduler="ddpm"), ValueError, "the scheduler ddpm, unknown"),
    "a range of words": (lambda f: change_index(f, value_range="ab"), ValueError, "value_range='ab'"),
    "a scheduler's config that is a list": (
        lambda f: (f / "scheduler/scheduler_config.json").write_text("[]"),
        ValueError,
        "scheduler_config.json is damaged",
    ),
    "a schedule of nobody": (
        lambda f: (f / "scheduler/scheduler_config.json").write_text('{"beta_schedule": "steep"}'),
        ValueError,
        "scheduler_config.json is damaged",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), OSError, "no such weights file"),
    "truncated weights": (truncate, OSError, "truncated"),
    "empty weights": (lambda f: (f / WEIGHTS).write_bytes(b""), OSError, "truncated"),
    "another shape": (change_a_shape, ValueError, "of another shape: conv_in.weight"),
    "a tensor missing": (lose_a_tensor, ValueError, "missing: conv_out.bias"),
    "a tensor too many": (add_a_tensor, ValueError, "unexpected: extra"),
    "no network config": (lambda f: (f / "unet/config.json").unlink(), OSError, "config.json"),
    "a config that cannot work": (write_bad_config, ValueError, "divisible by norm_num_groups=5"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), OSError, "scheduler_config.json"),
}


@pytest.mark.parametrize(("damage", "kind", "message"), BAD_FOLDERS.values(), ids=BAD_FOLDERS.keys())
def test_bad_folders_give_one_clear_error(
    damage: object, kind: type[Exception], message: str, tiny_pipeline: AnimeFacePipeline, tmp_path: Path
) -> None:
    folder = tmp_path / "some" / "deep" / "pipe"
    tiny_pipeline.save_pretrained(folder)
    damage(folder)
    with pytest.raises(kind, match=message) as caught:
        AnimeFacePipeline.from_pretrained(folder)
    print(f"{type(caught.value).__name__}: {caught.value}")
