"""How far two sets of pictures are apart, seen through a feature network: Fréchet and kernel distance by torchmetrics.

With Inception for the network they are FID (Heusel et al. 2017, eq. 6) and KID (Bińkowski et al. 2018, section 4).

```py
>>> from animeface_pipeline.distances import compute_features, feature_distances, inception

>>> network = inception()  # or any module that turns uint8 pictures (B, 3, H, W) into features (B, num_features)
>>> feature_distances(compute_features(network, drawn), compute_features(network, real))
{'frechet': 21.3, 'kernel': 0.0124, 'kernel_std': 0.0011}
```
"""

import hashlib
import importlib
import importlib.util
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import nn
from tqdm import tqdm

from .cli import BadInput

KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = 100, 1000


def need(module: str, package: str, extra: str) -> None:
    """Raise `BadInput` that names the extra if `module` is not installed."""
    if importlib.util.find_spec(module) is None:
        raise BadInput(f'the package {package} is missing: pip install "animeface-pipeline[{extra}]"')


def torchmetrics_modules() -> tuple[Any, Any]:
    """`torchmetrics.image.fid` and `.kid`, which import torch-fidelity if it is there, and that torchvision."""
    need("torchmetrics", "torchmetrics", "eval")
    try:
        return importlib.import_module("torchmetrics.image.fid"), importlib.import_module("torchmetrics.image.kid")
    except ImportError as error:
        raise BadInput(f'torchmetrics cannot be used ({error}): pip install "animeface-pipeline[fid]"') from error


def inception(feature_weights: Path | None = None) -> nn.Module:
    r"""
    The Inception network of FID and KID, from torch-fidelity: 2048 features of its last pooling layer.

    Args:
        feature_weights (`Path`, *optional*): A file with its state dict; downloaded by torch-fidelity if left out.

    Returns:
        `torch.nn.Module`: uint8 pictures (B, 3, H, W) → features (B, 2048).

    Raises:
        [`BadInput`]: the extra `fid` is not installed, the weights cannot be had or are not Inception's.
    """
    need("torch_fidelity", "torch-fidelity", "fid")
    fid, _ = torchmetrics_modules()
    if feature_weights is not None:
        try:  # torch-fidelity would run whatever code a pickle holds
            torch.load(feature_weights, map_location="meta", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise BadInput(f"--feature_weights {feature_weights}: not a file of weights ({reason})") from error
    path = None if feature_weights is None else str(feature_weights)
    try:
        return fid.NoTrainInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
    except OSError as error:  # of the download
        raise BadInput(
            f"Inception's weights cannot be downloaded ({error}); name a file of them with --feature_weights"
        ) from error
    except (RuntimeError, TypeError, AttributeError) as error:
        if path is None:
            raise BadInput(f"Inception's weights are damaged ({error}); try again or use --feature_weights") from error
        raise BadInput(f"--feature_weights {path}: not the weights of torch-fidelity's Inception") from error


def compute_features(
    network: nn.Module,
    pictures: torch.Tensor,
    file: Path | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    description: str = "features",
) -> torch.Tensor:
    r"""
    Run a feature network over pictures.

    Args:
        network (`torch.nn.Module`): Turns uint8 pictures (B, 3, H, W) into features (B, num_features).
        pictures (`torch.Tensor` of shape `(N, 3, H, W)`): uint8.
        file (`Path`, *optional*): Where to keep the features; read if it is there. A stopped call goes on from it.
        batch_size (`int`, *optional*, defaults to `64`): How many pictures at once.
        device (`torch.device`, *optional*): Where.
        description (`str`, *optional*): What the progress bar says.

    Returns:
        `torch.Tensor` of shape `(N, num_features)`: float32, on the CPU.
    """
    if file is None:
        return _compute_features(network, pictures, None, batch_size, device, description)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.part")
    with FileLock(file.with_name(f"{file.name}.lock")):  # another command may want the same
        if file.is_file():
            return torch.from_numpy(np.fromfile(file, np.float32).reshape(len(pictures), -1))
        features = _compute_features(network, pictures, unfinished, batch_size, device, description)
        os.replace(unfinished, file)
    return features


def _compute_features(
    network: nn.Module,
    pictures: torch.Tensor,
    unfinished: Path | None,
    batch_size: int,
    device: torch.device | str,
    description: str,
) -> torch.Tensor:
    """Batch by batch, each of them appended to the file `unfinished`, whose whole rows need no computing."""
    network = network.to(device).eval()
    with torch.inference_mode():
        width = network(pictures[:1].to(device)).shape[1]
        done = torch.empty(0, width)
        if unfinished is not None:
            values = np.fromfile(unfinished, np.float32) if unfinished.is_file() else np.empty(0, np.float32)
            done = torch.from_numpy(values[: len(values) // width * width].reshape(-1, width))
            unfinished.write_bytes(done.numpy().tobytes())
        parts = [done]
        with tqdm(total=len(pictures), initial=len(done), desc=description, unit="image", disable=None) as progress:
            for start in range(len(done), len(pictures), batch_size):
                batch = pictures[start : start + batch_size]
                parts.append(network(batch.to(device)).float().cpu())
                if unfinished is not None:
                    with open(unfinished, "ab") as part:
                        part.write(parts[-1].numpy().tobytes())
                progress.update(len(batch))
    return torch.cat(parts)


def feature_distances(
    features: torch.Tensor, reference: torch.Tensor, kernel: bool = True, seed: int = 0
) -> dict[str, float]:
    r"""
    Fréchet and kernel distance between two sets of features, in float64.

    The Fréchet distance ‖μ₁−μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) grows when a set gets smaller: compare it only at equal
    numbers of pictures. The kernel distance, of 100 random subsets of at most 1000, does not.

    Args:
        features, reference (`torch.Tensor` of shape `(N, D)` and `(M, D)`): at least two of each.
        kernel (`bool`, *optional*, defaults to `True`): Whether to compute the kernel distance too.
        seed (`int`, *optional*, defaults to `0`): Of its subsets.

    Returns:
        `dict[str, float]`: `"frechet"`, and with `kernel` also `"kernel"` and `"kernel_std"`, over the subsets.

    Raises:
        [`BadInput`]: the extra `eval` is not installed, or fewer than two pictures.
    """
    fid, kid = torchmetrics_modules()
    smallest = min(len(features), len(reference))
    if smallest < 2:
        raise BadInput(f"{smallest} pictures: a distance needs at least two on either side")
    given = nn.Identity()
    given.num_features = features.shape[1]  # type: ignore[assignment]
    metrics: dict[str, Any] = {"frechet": fid.FrechetInceptionDistance(feature=given).set_dtype(torch.float64)}
    if kernel:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it keeps the features: they are there anyway
            size = min(KERNEL_SUBSET_SIZE, smallest)
            metrics["kernel"] = kid.KernelInceptionDistance(given, subsets=KERNEL_SUBSETS, subset_size=size)
    for metric in metrics.values():
        metric.update(reference.double(), real=True)
        metric.update(features.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        values = {"frechet": float(metrics["frechet"].compute())}
        if kernel:
            values["kernel"], values["kernel_std"] = map(float, metrics["kernel"].compute())
    return values


def sha256_of(tensors: torch.Tensor | dict[str, torch.Tensor]) -> str:
    """Of pictures, or of a network's state dict: names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in {"": tensors}.items() if isinstance(tensors, torch.Tensor) else tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for part in tensor.cpu().contiguous().reshape(-1).split(1 << 24):
            digest.update(part.view(torch.uint8).numpy())
    return digest.hexdigest()
