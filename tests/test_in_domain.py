"""The offline measures: the feature network and its distance, colours, spectrum, memorisation."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from animeface_pipeline.draw_faces import draw_face
from animeface_pipeline.in_domain import (
    ALTERATIONS,
    RECIPE,
    InDomainFeatures,
    alter,
    gaussian_blur,
    in_domain_distance,
    in_domain_features,
    train_features,
)
from animeface_pipeline.picture_statistics import (
    compare_statistics,
    deviation,
    histograms,
    memorisation,
    radial_power,
    statistic_rows,
)

SHORT = {**RECIPE, "train_steps": 120, "train_batch_size": 32, "channels": [16, 32, 32], "num_features": 16}


def faces(number: int, first_seed: int, size: int = 32) -> torch.Tensor:
    pictures = [np.asarray(draw_face(first_seed + k, size)) for k in range(number)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def to_uint8(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.clamp(0, 1).mul(255).round().to(torch.uint8)


@pytest.fixture(scope="session")
def train() -> torch.Tensor:
    return faces(600, 0)


@pytest.fixture(scope="session")
def held_out() -> torch.Tensor:
    return faces(150, 10_000)


@pytest.fixture(scope="session")
def network(train: torch.Tensor) -> InDomainFeatures:
    return train_features(train, SHORT)


# ---- the network ----


def test_the_network_of_the_recipe() -> None:
    network = InDomainFeatures(**RECIPE)
    assert sum(parameter.numel() for parameter in network.parameters()) == 367_400
    pictures = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    assert network(pictures).shape == (2, 64)


def test_training_is_reproducible_to_the_bit_whatever_the_threads_and_the_random_state(train: torch.Tensor) -> None:
    recipe = {**SHORT, "train_steps": 4}
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    one = train_features(train, recipe).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    torch.set_num_threads(3 - min(threads, 2))
    try:
        other = train_features(train, recipe).state_dict()
        assert torch.get_num_threads() == 3 - min(threads, 2)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one[name], other[name]) for name in one)
    third = train_features(train, {**recipe, "seed": 1}).state_dict()
    assert not torch.equal(one["features.weight"], third["features.weight"])


def test_every_alteration_changes_every_picture_and_none_at_strength_0(train: torch.Tensor) -> None:
    clean = train[:8].float() / 255
    for name, (function, signed) in ALTERATIONS.items():
        for strength in (1.0, -1.0) if signed else (1.0,):
            altered = function(clean, torch.full((8,), strength), torch.Generator().manual_seed(0))
            assert altered.shape == clean.shape
            assert bool(((altered - clean).abs().amax(dim=(1, 2, 3)) > 0.02).all()), name
        still = function(clean, torch.zeros(8), torch.Generator().manual_seed(0))
        assert torch.allclose(still, clean, atol=1e-4), name


def test_alter_tells_what_it_did(train: torch.Tensor) -> None:
    clean = train[:200].float() / 255
    altered, strengths = alter(clean, torch.Generator().manual_seed(0))
    assert strengths.shape == (200, len(ALTERATIONS))
    assert 0.4 < (strengths == 0).float().mean() < 0.6
    signed = torch.tensor([signed for _, signed in ALTERATIONS.values()])
    assert strengths[:, ~signed].min() == 0
    assert strengths[:, signed].min() < -0.9
    assert torch.equal(altered * 255, (altered * 255).round())
    untouched = (strengths == 0).all(dim=1)
    assert torch.allclose(altered[untouched], clean[untouched], atol=1e-6)


def test_blur_is_gaussian() -> None:
    point = torch.zeros(1, 1, 33, 33)
    point[0, 0, 16, 16] = 1
    blurred = gaussian_blur(point, torch.tensor([2.0]))[0, 0]
    assert blurred.sum() == pytest.approx(1, abs=1e-5)
    assert float(blurred[16, 18] / blurred[16, 16]) == pytest.approx(math.exp(-0.5), abs=1e-5)


def test_the_network_is_kept_by_pictures_and_recipe(train: torch.Tensor, tmp_path: Path) -> None:
    recipe = {**SHORT, "train_steps": 2}
    first = in_domain_features(train, "a", tmp_path, recipe)
    file = next((tmp_path / "in-domain").glob("*.safetensors"))
    changed = file.stat().st_mtime_ns
    again = in_domain_features(train, "a", tmp_path, recipe)
    assert file.stat().st_mtime_ns == changed
    assert torch.equal(first.features.weight, again.features.weight)
    in_domain_features(train, "b", tmp_path, recipe)
    in_domain_features(train, "a", tmp_path, {**recipe, "seed": 7})
    assert len(list((tmp_path / "in-domain").glob("*.safetensors"))) == 3


# ---- the distance: worse pictures are farther ----


def distances(network: InDomainFeatures, train: torch.Tensor, *sets: torch.Tensor) -> list[float]:
    real = network(train)
    return [in_domain_distance(network(pictures), real)["frechet_distance"] for pictures in sets]


def test_the_floor_is_that_of_real_pictures_at_the_same_number(
    network: InDomainFeatures, train: torch.Tensor, held_out: torch.Tensor
) -> None:
    found = in_domain_distance(network(held_out), network(train))
    assert found["num_pictures"] == 150
    assert found["frechet_distance"] == pytest.approx(found["floor"], rel=0.5)
    fewer = in_domain_distance(network(held_out[:40]), network(train))
    assert fewer["floor"] > 2 * found["floor"]  # which is why it is measured at equal numbers
    assert in_domain_distance(network(train.repeat(2, 1, 1, 1)), network(train))["num_pictures"] == 300


@pytest.mark.parametrize(
    "worse",
    [
        lambda clean, much: gaussian_blur(clean, torch.full((len(clean),), 1.5 * much)),
        lambda clean, much: clean + 0.4 * much * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)),
        lambda clean, much: clean + torch.tensor([0.2 * much, 0.0, 0.0]).view(1, 3, 1, 1),
        lambda clean, much: ALTERATIONS["warp"][0](
            clean, torch.full((len(clean),), much), torch.Generator().manual_seed(0)
        ),
        lambda clean, much: clean * (1 - much / 2) + much / 2,
    ],
    ids=["blur", "noise", "colour", "warp", "washed-out"],
)
def test_what_is_worse_is_farther(
    worse: object, network: InDomainFeatures, train: torch.Tensor, held_out: torch.Tensor
) -> None:
    clean = held_out.float() / 255
    graded = [to_uint8(worse(clean, much)) for much in (0.3, 0.6, 1.0)]
    found = distances(network, train, held_out, *graded)
    assert found == sorted(found)
    assert found[-1] > 5 * found[0]


def test_few_different_pictures_are_farther_than_many(
    network: InDomainFeatures, train: torch.Tensor, held_out: torch.Tensor
) -> None:
    many, few = distances(network, train, held_out, held_out[:5].repeat(30, 1, 1, 1))
    assert few > 3 * many


# ---- colours and spectrum ----


def test_histograms_give_mean_and_deviation(train: torch.Tensor) -> None:
    histogram = histograms(train[:5]).mean(axis=0)
    pixels = train[:5].numpy().astype(float).transpose(1, 0, 2, 3).reshape(3, -1)
    assert histogram.sum(axis=1) == pytest.approx(np.ones(3), abs=1e-5)
    assert histogram @ np.arange(256) == pytest.approx(pixels.mean(axis=1), abs=1e-2)
    assert deviation(histogram) == pytest.approx(pixels.std(axis=1), abs=1e-2)


def test_the_power_of_a_wave_is_at_its_frequency() -> None:
    wave = 127.5 + 100 * torch.sin(2 * math.pi * 6 * torch.arange(32) / 32)
    picture = wave.expand(1, 3, 32, 32).to(torch.uint8)
    power = radial_power(picture)[0]
    assert power.shape == (16,)
    assert power.argmax() == 5  # 1, 2, … periods
    assert power[10:].max() < power[5] / 1000


def test_real_pictures_pass_and_washed_out_ones_fail(train: torch.Tensor, held_out: torch.Tensor) -> None:
    real = statistic_rows(train)
    found = compare_statistics(statistic_rows(held_out), real)
    assert all(each["passes"] for each in found.values()), found
    assert found == compare_statistics(statistic_rows(held_out), real)
    washed = compare_statistics(statistic_rows(to_uint8(held_out.float() / 255 / 2 + 0.5)), real)
    assert not any(washed[name]["passes"] for name in ("colour mean", "colour deviation", "colour histogram"))
    assert washed["colour deviation"]["value"] > 3 * washed["colour deviation"]["limit"]
    blurred = gaussian_blur(held_out.float() / 255, torch.full((len(held_out),), 1.0))
    assert not compare_statistics(statistic_rows(to_uint8(blurred)), real)["power spectrum"]["passes"]


# ---- memorisation ----


def test_copies_are_suspected_mirrored_ones_too_and_new_pictures_are_not(
    train: torch.Tensor, held_out: torch.Tensor
) -> None:
    new = faces(100, 50_000)
    found, closest = memorisation(new, train, held_out)
    assert found["suspects"] <= 0.05
    assert found["median_ratio"] == pytest.approx(found["median_ratio_held_out"], abs=0.1)
    assert closest.size == (6 * 32, 8 * 32)

    copies = new.clone()
    copies[:10] = train[30:40]
    copies[10:20] = train[40:50].flip(-1)
    found, _ = memorisation(copies, train, held_out)
    assert 0.2 <= found["suspects"] <= 0.25
    nearest = {each["picture"]: each["train"] for each in found["closest"]}
    assert all(nearest[k] == k + 30 for k in nearest if k < 20)
    assert sum(k < 20 for k in nearest) == 16
