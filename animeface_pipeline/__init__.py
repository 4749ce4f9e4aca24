"""Anime faces by denoising diffusion, as a Diffusers pipeline.

The classes are imported when they are first used: `prepare_dataset` and its worker processes need no torch.
"""

from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .img2img_animeface import AnimeFaceImg2ImgPipeline
    from .inpaint_animeface import AnimeFaceInpaintPipeline
    from .pipeline_animeface import AnimeFacePipeline
    from .unet_animeface import AnimeFaceUNet2DModel

__version__ = version("animeface-pipeline")
EMBEDDED_MODEL = Path(__file__).parent / "embedded_model"  # a small pipeline, for `from_pretrained`
__all__ = [
    "EMBEDDED_MODEL",
    "AnimeFaceImg2ImgPipeline",
    "AnimeFaceInpaintPipeline",
    "AnimeFacePipeline",
    "AnimeFaceUNet2DModel",
    "__version__",
]

_MODULES = {
    "AnimeFaceImg2ImgPipeline": "img2img_animeface",
    "AnimeFaceInpaintPipeline": "inpaint_animeface",
    "AnimeFacePipeline": "pipeline_animeface",
    "AnimeFaceUNet2DModel": "unet_animeface",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
