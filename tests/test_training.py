"""The verbs of the loop, one by one; the whole program is in test_train_accelerate.py."""

import copy
import math

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_unet
from diffusers.training_utils import compute_snr

from animeface_pipeline import AnimeFacePipeline, AnimeFaceUNet2DModel
from animeface_pipeline.config import TrainingConfig, parse_args
from animeface_pipeline.dataset import Batch
from animeface_pipeline.schedulers import original_scheduler
from animeface_pipeline.training import (
    Meter,
    averaged_weights,
    build_ema,
    build_optimizer,
    build_pipeline,
    diffusion_loss,
    min_snr_weights,
    sample_grid,
    settings_over_state,
    update,
)


def config_of(*argv: str) -> TrainingConfig:
    return parse_args(argv, description="test")


def batch_of(count: int = 4, timesteps: list[int] | None = None) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        clean=torch.rand(count, 3, 16, 16, generator=generator),
        noise=torch.randn(count, 3, 16, 16, generator=generator),
        timesteps=torch.tensor(timesteps or [0, 300, 600, 999]),
        weight=1.0,
    )


def test_the_trainers_own_step_reproduces_the_originals_losses(
    reference_unet: AnimeFaceUNet2DModel, golden: dict[str, torch.Tensor]
) -> None:
    accelerator, scheduler = Accelerator(), original_scheduler()
    unet = copy.deepcopy(reference_unet)  # in eval mode, as the golden losses were computed: dropout off
    optimizer, _ = build_optimizer(config_of(), unet, total_steps=3)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    unet.eval()
    batch = Batch(golden["loss.x0"], golden["loss.noise"], golden["loss.timesteps"], weight=1.0)
    for step, expected in enumerate(golden["loss.values"]):
        loss, _ = diffusion_loss(unet, scheduler, batch)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        accelerator.backward(loss)
        grad_norm = update(accelerator, optimizer, unet, max_grad_norm=None)
        if step == 0:
            assert grad_norm.item() == pytest.approx(golden["loss.grad_norm"].item(), rel=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_prediction_has_no_loss(prediction_type: str) -> None:
    scheduler, batch = original_scheduler(prediction_type=prediction_type), batch_of()
    alphas_cumprod = scheduler.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    perfect = {
        "epsilon": batch.noise,
        # v = √ᾱ ε − √(1−ᾱ) x_0  (Salimans & Ho 2022, appendix D)
        "v_prediction": alphas_cumprod.sqrt() * batch.noise - (1 - alphas_cumprod).sqrt() * batch.clean,
        "sample": batch.clean,
    }[prediction_type]

    def unet(noisy: torch.Tensor, timesteps: torch.Tensor) -> object:
        return type("Output", (), {"sample": perfect})

    loss, errors = diffusion_loss(unet, scheduler, batch, snr_gamma=5.0)
    assert loss.item() == pytest.approx(0, abs=1e-10) and errors.shape == (4,)


def test_min_snr_weights_are_the_papers() -> None:
    timesteps = torch.tensor([0, 100, 500, 999])
    snr = compute_snr(original_scheduler(), timesteps)
    assert snr[0] > 5 > snr[3]
    clipped = snr.clamp(max=5)
    for prediction_type, expected in {
        "epsilon": clipped / snr,
        "v_prediction": clipped / (snr + 1),
        "sample": clipped,
    }.items():
        scheduler = original_scheduler(prediction_type=prediction_type)
        torch.testing.assert_close(min_snr_weights(scheduler, timesteps, 5.0), expected)


def test_noise_and_loss_stay_in_float32_under_autocast() -> None:
    unet, inputs = tiny_unet().train(), []
    unet.register_forward_pre_hook(lambda module, args: inputs.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss, errors = diffusion_loss(unet, original_scheduler(), batch_of())
    assert inputs == [torch.float32] and loss.dtype == errors.dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_with_gradients_that_are_not_finite_is_skipped(bad: float) -> None:
    accelerator, unet = Accelerator(), tiny_unet().train()
    optimizer, _ = build_optimizer(config_of("--learning_rate", "0.01"), unet, total_steps=3)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    meter = Meter(1000, accelerator.device)

    def one_update(factor: float) -> None:
        loss, errors = diffusion_loss(unet, original_scheduler(), batch_of())
        accelerator.backward(loss * factor)
        meter.add(errors * factor, batch_of().timesteps)
        meter.add_update(update(accelerator, optimizer, unet, max_grad_norm=1.0))

    one_update(1.0)
    before = copy.deepcopy(unet.state_dict())
    moments = copy.deepcopy(optimizer.optimizer.state_dict())
    one_update(bad)
    one_update(bad)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    for index, state in optimizer.optimizer.state_dict()["state"].items():
        assert all(torch.equal(tensor, moments["state"][index][name]) for name, tensor in state.items())
    one_update(1.0)
    assert not torch.equal(unet.state_dict()["conv_in.weight"], before["conv_in.weight"])
    read = meter.read(accelerator)
    assert (read["skipped_updates"], read["skipped_in_a_row"]) == (2, 0)
    assert math.isfinite(read["loss"]) and all(math.isfinite(value) for value in read["loss_by_quartile"])


def test_a_state_of_another_memory_layout_goes_on_as_if_it_were_of_this_one() -> None:
    accelerator, config = Accelerator(), config_of("--learning_rate", "0.01")
    nets = [tiny_unet(), tiny_unet(), tiny_unet().to(memory_format=torch.channels_last)]
    for unet in nets[1:]:
        unet.load_state_dict(nets[0].state_dict())
    generator = torch.Generator().manual_seed(0)
    gradients = [[torch.randn(weight.shape, generator=generator) for weight in nets[0].parameters()] for _ in (0, 1)]

    def step(unet: torch.nn.Module, optimizer: object, which: int) -> None:
        for weight, gradient in zip(unet.parameters(), gradients[which]):
            weight.grad = torch.empty_like(weight).copy_(gradient)
        update(accelerator, accelerator.prepare(optimizer), unet, max_grad_norm=None)

    saved = None
    for unet in nets:  # the first update in the first of them, the second update in all
        optimizer, lr_scheduler = build_optimizer(config, unet, total_steps=3)
        if saved is None:
            step(unet, optimizer, 0)
            saved, weights = optimizer.state_dict(), copy.deepcopy(unet.state_dict())
        else:
            unet.load_state_dict(weights)
            optimizer.load_state_dict(copy.deepcopy(saved))
            settings_over_state(config, lr_scheduler, None)
            step(unet, optimizer, 1)
    once, twice, twice_channels_last = (unet.parameters() for unet in nets)
    for before, expected, found in zip(once, twice, twice_channels_last):
        assert torch.allclose(found, expected, rtol=0, atol=1e-5) and not torch.allclose(before, expected, atol=1e-5)


def test_the_meter_sorts_errors_by_timestep_quartile() -> None:
    meter = Meter(1000, torch.device("cpu"))
    meter.add(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 249, 250, 999]))
    read = meter.read(Accelerator())
    assert read["loss"] == 2.5 and read["loss_by_quartile"] == [1.5, 3.0, None, 4.0]


def test_the_average_is_what_is_sampled_and_the_weights_come_back() -> None:
    config = config_of("--use_ema", "--eval_batch_size", "3", "--ddpm_num_inference_steps", "2")
    unet = tiny_unet().train()
    ema = build_ema(config, unet)
    start = copy.deepcopy(unet.state_dict())
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(1)
    trained = copy.deepcopy(unet.state_dict())
    with averaged_weights(unet, ema):
        assert not unet.training  # the original stays in this mode by accident, and so loses its dropout
        assert all(torch.equal(tensor, start[name]) for name, tensor in unet.state_dict().items())
        grid, _ = sample_grid(AnimeFacePipeline(unet, original_scheduler()), config)
    assert unet.training and grid.size == (32, 32)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in unet.state_dict().items())


def test_a_sample_grid_comes_from_fixed_noise() -> None:
    config = config_of("--eval_batch_size", "4", "--ddpm_num_inference_steps", "3")
    pipeline = AnimeFacePipeline(tiny_unet(), original_scheduler())
    first, strips = sample_grid(pipeline, config)
    torch.randn(5)
    again = sample_grid(pipeline, config)
    assert [picture.tobytes() for picture in again] == [first.tobytes(), strips.tobytes()]


def test_the_originals_recipe_builds_the_originals_network() -> None:
    with torch.device("meta"):
        pipeline = build_pipeline(config_of())
    assert sum(parameter.numel() for parameter in pipeline.unet.parameters()) == 168_885_955
    assert pipeline.value_range == (0.0, 1.0) and not pipeline.unet.is_gradient_checkpointing
    assert pipeline.scheduler.to_json_string() == original_scheduler().to_json_string()


def test_gradient_checkpointing_is_switched_on_by_its_flag() -> None:
    with torch.device("meta"):
        assert build_pipeline(config_of("--gradient_checkpointing")).unet.is_gradient_checkpointing
