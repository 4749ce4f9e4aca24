"""The material that parity is shown against: what the original computed, and the rule that fills its weights.

`data/golden.safetensors` holds tensors that the original's network, sampler and loss computed on a CPU in float32, in
eval mode, from the weights that `reference_state_dict(20250301)` returns; `data/state_dict_manifest.json` the names
and shapes of the original's `DDPM.state_dict()`, in order.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

DATA = Path(__file__).parent / "data"
GOLDEN_SEED = 20250301


def golden() -> dict[str, torch.Tensor]:
    return load_file(DATA / "golden.safetensors")


def manifest() -> dict[str, tuple[int, ...]]:
    """Name → shape of the original's 338 tensors."""
    entries = json.loads((DATA / "state_dict_manifest.json").read_text(encoding="utf-8"))
    return {name: tuple(shape) for name, shape in entries}


def reference_state_dict(seed: int = GOLDEN_SEED) -> dict[str, torch.Tensor]:
    """Fill the original's tensors in manifest order from one MT19937 stream.

    Biases are uniform in ±0.05, normalisation scales 1 + 0.1·N(0, 1), every other weight uniform in ±1/√fan_in.
    """
    stream = np.random.RandomState(seed)

    def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith(".bias"):
            return stream.uniform(-0.05, 0.05, shape)
        if len(shape) == 1:
            return 1 + 0.1 * stream.standard_normal(shape)
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        return stream.uniform(-bound, bound, shape)

    return {name: torch.from_numpy(fill(name, shape).astype(np.float32)) for name, shape in manifest().items()}
