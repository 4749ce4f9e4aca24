"""Edit a picture: noise it part of the way, and denoise it from there (SDEdit, Meng et al. 2022)."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from .pipeline_animeface import AnimeFacePipeline


class AnimeFaceImg2ImgPipeline(AnimeFacePipeline):
    r"""
    Pipeline that turns pictures (a sketch, a photo, another face) into faces that look like them: SDEdit
    (https://huggingface.co/papers/2108.01073, algorithm 1, without a mask).

    It has the components of [`AnimeFacePipeline`] and is loaded from, and saved as, one.

    Example:

    ```py
    >>> from PIL import Image
    >>> from animeface_pipeline import AnimeFaceImg2ImgPipeline, AnimeFacePipeline

    >>> pipe = AnimeFacePipeline.from_pretrained("path/or/hub-name")
    >>> edit = AnimeFaceImg2ImgPipeline(**pipe.components)  # the same network, not a second one
    >>> face = edit(Image.open("sketch.png"), strength=0.6).images[0]
    ```
    """

    @torch.no_grad()
    def __call__(  # type: ignore[override]  # what a task is asked with is its own, as in Diffusers
        self,
        image: Any,
        strength: float = 0.8,
        num_inference_steps: int = 1000,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["sample"],
    ) -> ImagePipelineOutput | tuple:
        r"""
        Draw one face for each picture.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of these):
                Where to start from. Pictures of any size; arrays `(batch_size, height, width, 3)` and tensors
                `(batch_size, 3, height, width)` of the network's size with values in [0, 1].
            strength (`float`, *optional*, defaults to `0.8`):
                How far towards noise the picture is taken, above 0 and up to 1; the higher, the less of it is kept.
            num_inference_steps (`int`, *optional*, defaults to `1000`):
                Denoising steps of the whole way; `int(num_inference_steps * strength)` of them are taken.
            generator, output_type, return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs (*optional*):
                As in [`AnimeFacePipeline.__call__`].

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`: the faces, in the order of the pictures.

        Raises:
            `ValueError`: an image of another kind, size or range, a strength outside (0, 1] or so small that no step
            is left, a scheduler without `add_noise`, and as in [`AnimeFacePipeline.__call__`].
        """
        clean = self.encode(image)
        self._check_inputs(len(clean), generator, num_inference_steps, output_type, callback_on_step_end_tensor_inputs)
        steps = self._check_strength(strength, num_inference_steps)

        # 1. prepare: x_t = α_t x_0 + σ_t ε (Ho et al. 2020, eq. 4) at the first timestep that is left
        scheduler = self.scheduler
        scheduler.set_timesteps(num_inference_steps)
        start = (num_inference_steps - steps) * scheduler.order  # solvers of order 2 have two timesteps for a step
        timesteps = scheduler.timesteps[start:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        noise = randn_tensor(clean.shape, generator=generator, device=clean.device, dtype=torch.float32)
        sample = scheduler.add_noise(clean, noise, timesteps[:1].expand(len(clean)))

        # 2. loop
        sample = self.denoise(sample, timesteps, generator, callback_on_step_end, callback_on_step_end_tensor_inputs)

        # 3. decode
        images = self.decode(sample, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_strength(self, strength: float, num_inference_steps: int) -> int:
        """How many steps are left."""
        if not hasattr(self.scheduler, "add_noise"):
            raise ValueError(
                f"{type(self.scheduler).__name__} has no add_noise: use DDIMScheduler or another that has"
            )
        if not isinstance(strength, (int, float)) or not 0 < strength <= 1:
            raise ValueError(f"strength={strength!r}: must be a number above 0 and up to 1")
        steps = int(num_inference_steps * strength)
        if steps < 1:
            least = f"it must be more than 1/{num_inference_steps}"
            raise ValueError(f"strength={strength!r}: no step of {num_inference_steps} is left; {least}")
        return steps
