"""The port against the original: what its network, sampler and loss computed, from the same weights."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from diffusers.schedulers import scheduling_ddpm
from reference import manifest

from animeface_pipeline import AnimeFaceUNet2DModel
from animeface_pipeline.conversion import DROPPED, MODULES, convert_state_dict
from animeface_pipeline.schedulers import original_scheduler


def test_names_and_shapes_map_one_to_one_or_are_dropped() -> None:
    originals = {name: torch.empty(shape, device="meta") for name, shape in manifest().items()}
    assert len(originals) == 338
    assert sum(tensor.numel() for tensor in originals.values()) == 168_899_011

    dropped = {f"unet.{module}.{kind}" for module in DROPPED for kind in ("weight", "bias")}
    assert len(dropped) == 22 and dropped <= set(originals)
    assert sum(originals[name].numel() for name in dropped) == 13_056
    assert len(set(MODULES.values())) == len(MODULES)

    with torch.device("meta"):
        unet = AnimeFaceUNet2DModel()
    expected = {name: tensor.shape for name, tensor in unet.state_dict().items()}
    assert {name: tensor.shape for name, tensor in convert_state_dict(originals).items()} == expected
    assert sum(parameter.numel() for parameter in unet.parameters()) == 168_885_955


def test_a_name_that_the_original_does_not_have_is_named() -> None:
    with pytest.raises(KeyError, match=r"unet\.encoder\.0\.res\.block3\.0\.weight"):
        convert_state_dict({"unet.encoder.0.res.block3.0.weight": torch.zeros(1)})


@torch.no_grad()
def test_forward_pass(reference_unet: AnimeFaceUNet2DModel, golden: dict[str, torch.Tensor]) -> None:
    prediction = reference_unet(golden["unet.x"], golden["unet.timesteps"]).sample
    assert (prediction - golden["unet.eps"]).abs().max() < 5e-6


@torch.no_grad()
@pytest.mark.parametrize(("phase", "tolerance"), [("early", 5e-6), ("late", 1e-3)])
def test_sampling_steps(
    phase: str,
    tolerance: float,
    reference_unet: AnimeFaceUNet2DModel,
    golden: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Early steps to rounding; late ones to a quarter of one 8-bit level.

    Near t = 0 Diffusers recovers β_t as 1 − ᾱ_t/ᾱ_(t−1) in float32, which cancels to few digits where ᾱ is near 1;
    the original keeps β_t itself. The same recurrence in float64 agrees to 5e-13. And the original adds σ_0·z = 0.01·z
    at t = 0 too, which the paper and Diffusers do not: the test adds it.
    """
    scheduler = original_scheduler()
    sample = golden[f"{phase}.x_start"]
    for step, timestep in enumerate(golden[f"{phase}.timesteps"]):
        noise = golden[f"{phase}.noise"][step]
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, noise=noise, **kwargs: noise)
        prediction = reference_unet(sample, timestep).sample
        sample = scheduler.step(prediction, timestep, sample).prev_sample
        expected = golden[f"{phase}.x"][step] - (0.01 * noise if timestep == 0 else 0)
        assert (sample - expected).abs().max() < tolerance


def test_betas_and_forward_diffusion_are_bit_equal_to_the_formula(golden: dict[str, torch.Tensor]) -> None:
    """x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε (Ho et al. 2020, eq. 4), with β as the original has it."""
    scheduler = original_scheduler()
    betas = torch.linspace(1e-4, 0.02, 1000)
    assert torch.equal(scheduler.betas, betas)
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)[golden["loss.timesteps"]].view(-1, 1, 1, 1)
    expected = alphas_cumprod.sqrt() * golden["loss.x0"] + (1 - alphas_cumprod).sqrt() * golden["loss.noise"]
    noisy = scheduler.add_noise(golden["loss.x0"], golden["loss.noise"], golden["loss.timesteps"])
    assert torch.equal(noisy, expected)


def test_forward_diffusion_is_the_originals_but_for_the_last_bit_of_a_coefficient(
    golden: dict[str, torch.Tensor],
) -> None:
    """The golden machine's float32 square root may round the other way: with both coefficients moved by at most one
    unit in the last place, x_t is equal to the bit."""
    alphas_cumprod = original_scheduler().alphas_cumprod

    def within_one_ulp(value: torch.Tensor) -> list[torch.Tensor]:
        return [value, torch.nextafter(value, torch.tensor(0.0)), torch.nextafter(value, torch.tensor(2.0))]

    for row, timestep in enumerate(golden["loss.timesteps"]):
        x_0, noise, x_t = (golden[f"loss.{name}"][row] for name in ("x0", "noise", "x_t"))
        signal, sigma = alphas_cumprod[timestep].sqrt(), (1 - alphas_cumprod[timestep]).sqrt()
        candidates = itertools.product(within_one_ulp(signal), within_one_ulp(sigma))
        assert any(torch.equal(a * x_0 + b * noise, x_t) for a, b in candidates), f"timestep {timestep}"


def test_loss_and_gradients(reference_unet: AnimeFaceUNet2DModel, golden: dict[str, torch.Tensor]) -> None:
    """The first loss; all three, by the trainer's own step, are in test_training.py."""
    unet = copy.deepcopy(reference_unet)
    loss = F.mse_loss(unet(golden["loss.x_t"], golden["loss.timesteps"]).sample, golden["loss.noise"])
    assert loss.item() == pytest.approx(golden["loss.values"][0].item(), rel=1e-5)
    loss.backward()
    assert [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()] == []
    norm = sum((p.grad.double() ** 2).sum() for p in unet.parameters()).sqrt()
    assert norm.item() == pytest.approx(golden["loss.grad_norm"].item(), rel=1e-5)
