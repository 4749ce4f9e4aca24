"""What pictures can be compared by without a network: colours, sharpness, and nearness to the pictures trained on.

A statistic is a row of numbers for each picture. Its mean over the drawn pictures is held against its mean over the
real ones, and the limit is what the real ones themselves stray by: the farthest of 200 samples of 100 real pictures.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from .images import image_grid

SAMPLES, SAMPLE_SIZE = 200, 100
LEVELS = np.arange(256)
THUMBNAIL = 32  # pixels: what nearest neighbours are sought by
PAIRS = 16  # of the closest, in the picture


# ---- a row of numbers for each picture ----


def histograms(pictures: torch.Tensor) -> np.ndarray:
    """uint8 (N, 3, H, W) → (N, 3, 256): the share of the pixels that has each level."""
    num_pixels = pictures.shape[-1] * pictures.shape[-2]
    rows = np.empty((len(pictures), 3, 256), np.float32)
    place = torch.arange(3).view(3, 1) * 256
    for number, picture in enumerate(pictures):
        counts = torch.bincount((picture.reshape(3, -1) + place).reshape(-1), minlength=768)
        rows[number] = counts.view(3, 256) / num_pixels
    return rows


def radial_power(pictures: torch.Tensor) -> np.ndarray:
    """uint8 (N, 3, H, W) → (N, H/2): the power of the grey picture by frequency, 1 … H/2 periods in its width."""
    size = pictures.shape[-1]
    window = torch.hann_window(size, periodic=False)
    frequency = torch.fft.fftfreq(size) * size
    radius = torch.hypot(frequency.view(-1, 1), frequency.view(1, -1)).round().long().view(-1)
    kept = (radius >= 1) & (radius <= size // 2)
    ring = torch.nn.functional.one_hot(radius[kept] - 1, size // 2).float()
    ring = ring / ring.sum(dim=0)
    rows = []
    for part in pictures.split(256):
        grey = part.float().mean(dim=1) / 255
        grey = (grey - grey.mean(dim=(1, 2), keepdim=True)) * window.view(-1, 1) * window.view(1, -1)
        rows.append(torch.fft.fft2(grey).abs().square().flatten(1)[:, kept] @ ring)
    return torch.cat(rows).numpy()


# ---- means over pictures → how far apart ----


def mean_apart(one: np.ndarray, other: np.ndarray) -> float:
    """Of two mean histograms (3, 256): the difference of the means, of the channel where it is largest."""
    return float(np.abs((one - other) @ LEVELS).max())


def deviation(histogram: np.ndarray) -> np.ndarray:
    mean = histogram @ LEVELS
    return np.sqrt((histogram * (LEVELS - mean[:, None]) ** 2).sum(axis=1))


def deviation_apart(one: np.ndarray, other: np.ndarray) -> float:
    """The difference of the standard deviations over all pixels, of the channel where it is largest."""
    return float(np.abs(deviation(one) - deviation(other)).max())


def histogram_apart(one: np.ndarray, other: np.ndarray) -> float:
    """The earth mover's distance: by how many levels a pixel must change on average, averaged over the channels."""
    return float(np.abs(np.cumsum(one - other, axis=1)).sum(axis=1).mean())


def spectrum_apart(one: np.ndarray, other: np.ndarray) -> float:
    """Root mean square over the frequencies of the power ratio in decibels."""
    tiny = 1e-12
    return float(np.sqrt(np.mean((10 * np.log10((one + tiny) / (other + tiny))) ** 2)))


class Statistic(NamedTuple):
    """Rows by picture, how far two means of them are apart, and in what."""

    rows: Callable[[torch.Tensor], np.ndarray]
    apart: Callable[[np.ndarray, np.ndarray], float]
    unit: str


STATISTICS: dict[str, Statistic] = {
    "colour mean": Statistic(histograms, mean_apart, "of 255 levels"),
    "colour deviation": Statistic(histograms, deviation_apart, "of 255 levels"),
    "colour histogram": Statistic(histograms, histogram_apart, "of 255 levels"),
    "power spectrum": Statistic(radial_power, spectrum_apart, "dB"),
}


Rows = dict[Callable[[torch.Tensor], np.ndarray], np.ndarray]


def statistic_rows(pictures: torch.Tensor) -> Rows:
    """Of pictures, uint8 (N, 3, H, W), by the functions that `STATISTICS` names: their rows, N of each."""
    return {function: function(pictures) for function in {statistic.rows for statistic in STATISTICS.values()}}


def compare_statistics(rows: Rows, real: Rows, seed: int = 0) -> dict[str, dict[str, Any]]:
    r"""
    Hold the statistics of pictures against those of real ones.

    Args:
        rows, real (`Rows`): What [`statistic_rows`] gives for the pictures and for the real ones.
        seed (`int`, *optional*, defaults to `0`): Of the samples of real pictures.

    Returns:
        `dict`: for each name of `STATISTICS` its `"value"`, how far the pictures are from the real ones; the
        `"limit"`, the farthest of 200 samples of 100 real pictures (of as many as there are, if fewer);
        the `"unit"`; and `"passes"`, whether the value is within the limit.
    """
    random = np.random.default_rng(seed)
    num_pictures, num_real = len(rows[histograms]), len(real[histograms])
    size = min(SAMPLE_SIZE, num_pictures, num_real)
    few = num_real < 10 * size  # then samples are much the same, or all of them, unless drawn with replacement
    samples = [random.choice(num_real, size, replace=few) for _ in range(SAMPLES)]
    results = {}
    for name, statistic in STATISTICS.items():
        own, others = rows[statistic.rows], real[statistic.rows]
        truth = others.mean(axis=0, dtype=np.float64)
        value = statistic.apart(own.mean(axis=0, dtype=np.float64), truth)
        limit = max(statistic.apart(others[sample].mean(axis=0, dtype=np.float64), truth) for sample in samples)
        results[name] = {"value": value, "limit": limit, "unit": statistic.unit, "passes": value <= limit}
    return results


# ---- memorisation ----


def nearest(these: torch.Tensor, those: torch.Tensor, exclude_self: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """
    For each of `these` (N, 3, H, W) the nearest of `those`, mirrored or not: root mean square differences in 8-bit
    levels of pictures shrunk to 32 pixels, (N,), and which one it is, (N,).
    """
    few, many = thumbnails(these), thumbnails(those)
    norms = many.square().sum(dim=1)
    distances, places = [], []
    for start in tqdm(range(0, len(few), 256), "nearest neighbours", disable=None, leave=False):
        block = few[start : start + 256]
        mirrored = block.view(-1, 3, *thumbnail_size(these)).flip(-1).flatten(1)
        product = torch.maximum(block @ many.T, mirrored @ many.T)
        squares = block.square().sum(dim=1, keepdim=True) + norms - 2 * product
        if exclude_self:
            rows = torch.arange(len(block))
            squares[rows, rows + start] = torch.inf
        least, place = squares.min(dim=1)
        distances.append((least.clamp(min=0) / few.shape[1]).sqrt())
        places.append(place)
    return torch.cat(distances).numpy(), torch.cat(places).numpy()


def thumbnail_size(pictures: torch.Tensor) -> tuple[int, int]:
    return min(THUMBNAIL, pictures.shape[-2]), min(THUMBNAIL, pictures.shape[-1])


def thumbnails(pictures: torch.Tensor) -> torch.Tensor:
    size = thumbnail_size(pictures)
    return torch.cat([F.adaptive_avg_pool2d(part.float(), size).flatten(1) for part in pictures.split(1024)])


def memorisation(
    pictures: torch.Tensor, train: torch.Tensor, held_out: torch.Tensor
) -> tuple[dict[str, Any], Image.Image]:
    r"""
    Are drawn pictures nearer to pictures that were trained on than real pictures are which were not?

    Of each drawn picture, the distance to its nearest training picture is divided by that to its nearest held-out one.
    A copy of a training picture gets about 0. The same ratio of the held-out pictures themselves says what is usual.

    Args:
        pictures (`torch.Tensor` of shape `(N, 3, H, W)`): uint8, drawn.
        train, held_out (`torch.Tensor`): uint8, real; at least two are held out.

    Returns:
        `tuple[dict, PIL.Image.Image]`: the median ratio and that of the held-out pictures; `"suspects"`, the share of
        pictures with a ratio below that of 99 of 100 held-out ones (0.01 is expected of a model that remembers none);
        and a picture of the 16 closest, two in a row, each as what was drawn, the nearest training picture, the
        nearest held-out one.
    """
    to_train, place = nearest(pictures, train)
    to_held_out, other_place = nearest(pictures, held_out)
    ratio = to_train / np.maximum(to_held_out, 1e-6)
    usual = nearest(held_out, train)[0] / np.maximum(nearest(held_out, held_out, exclude_self=True)[0], 1e-6)
    limit = float(np.quantile(usual, 0.01))
    closest = np.argsort(ratio)[:PAIRS]
    rows = [to_image(tensor) for k in closest for tensor in (pictures[k], train[place[k]], held_out[other_place[k]])]
    values = {
        "median_ratio": float(np.median(ratio)),
        "median_ratio_held_out": float(np.median(usual)),
        "limit": limit,
        "suspects": float((ratio < limit).mean()),
        "expected_suspects": 0.01,
        "closest": [{"picture": int(k), "train": int(place[k]), "ratio": round(float(ratio[k]), 4)} for k in closest],
    }
    return values, image_grid(rows, columns=6)


def to_image(picture: torch.Tensor) -> Image.Image:
    return Image.fromarray(picture.permute(1, 2, 0).numpy())
