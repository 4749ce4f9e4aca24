"""Anime faces by denoising diffusion, as a Diffusers pipeline."""

from importlib.metadata import version

from .pipeline_animeface import AnimeFacePipeline
from .unet_animeface import AnimeFaceUNet2DModel

__version__ = version("animeface-pipeline")
__all__ = ["AnimeFacePipeline", "AnimeFaceUNet2DModel", "__version__"]
