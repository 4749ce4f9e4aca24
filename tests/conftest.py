import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by torch: threads that wait leave the cores to others

import pytest
import torch
from reference import golden as golden_tensors
from reference import reference_state_dict

from animeface_pipeline import AnimeFacePipeline, AnimeFaceUNet2DModel
from animeface_pipeline.conversion import convert_state_dict
from animeface_pipeline.schedulers import original_scheduler

TINY = {
    "sample_size": 16,
    "block_out_channels": (8, 16),
    "attention_levels": (False, True),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}

signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's `pytest &` hands down an ignored one
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and so does nohup

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


def tiny_unet(seed: int = 0, **overrides: object) -> AnimeFaceUNet2DModel:
    torch.manual_seed(seed)
    return AnimeFaceUNet2DModel(**{**TINY, **overrides}).eval()


@pytest.fixture
def tiny_pipeline() -> AnimeFacePipeline:
    pipe = AnimeFacePipeline(tiny_unet(), original_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    return golden_tensors()


@pytest.fixture(scope="session")
def reference_unet() -> AnimeFaceUNet2DModel:
    """The full-size network with the weights that the golden tensors were computed from. Do not train it."""
    with torch.device("meta"):
        unet = AnimeFaceUNet2DModel()
    unet.load_state_dict(convert_state_dict(reference_state_dict()), strict=True, assign=True)
    return unet.eval()


@pytest.fixture(scope="session")
def real_pictures() -> Path:
    """The folder with getchu64/ and fanart96/, which are not part of the project."""
    folder = os.environ.get("ANIMEFACE_TEST_DATA")
    if not folder:
        pytest.skip("ANIMEFACE_TEST_DATA is not set: no real pictures to test with")
    return Path(folder)
