"""Redo a part of a picture so that it fits the rest (RePaint, Lugmayr et al. 2022)."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from diffusers import ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from .pipeline_animeface import AnimeFacePipeline, fit_pictures


class AnimeFaceInpaintPipeline(AnimeFacePipeline):
    r"""
    Pipeline that redraws what a mask covers and leaves every other pixel as it is: RePaint
    (https://huggingface.co/papers/2201.09865, algorithm 1), for a network that was never trained to.

    It has the components of [`AnimeFacePipeline`] and is loaded from, and saved as, one.

    Example:

    ```py
    >>> from PIL import Image
    >>> from animeface_pipeline import AnimeFaceInpaintPipeline, AnimeFacePipeline
    >>> from animeface_pipeline.schedulers import switch_scheduler

    >>> pipe = AnimeFacePipeline.from_pretrained("path/or/hub-name")
    >>> repaint = AnimeFaceInpaintPipeline(**pipe.components)
    >>> repaint.scheduler = switch_scheduler(pipe.scheduler, "ddpm", num_inference_steps=50)
    >>> mask = Image.new("L", (64, 64))
    >>> mask.paste(255, (16, 24, 48, 40))  # white is redrawn
    >>> face = repaint(Image.open("face.png"), mask, 50, jump_length=5, jump_n_sample=4).images[0]
    ```
    """

    @torch.no_grad()
    def __call__(  # type: ignore[override]  # what a task is asked with is its own, as in Diffusers
        self,
        image: Any,
        mask_image: Any,
        num_inference_steps: int = 250,
        jump_length: int = 10,
        jump_n_sample: int = 10,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["sample"],
    ) -> ImagePipelineOutput | tuple:
        r"""
        Redraw what the mask covers.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of these):
                The pictures. Those of another size than the network's are cropped to a centred square and resized;
                arrays `(batch_size, height, width, 3)` and tensors `(batch_size, 3, height, width)` are of the
                network's size with values in [0, 1].
            mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of these):
                White, from one half on, is redrawn; black is kept. One for all pictures, or one for each: pictures of
                any size, arrays `(batch_size, height, width)`, tensors `(batch_size, 1, height, width)`, of bools,
                floats in [0, 1], or whole numbers up to 1 or 255.
            num_inference_steps (`int`, *optional*, defaults to `250`): Denoising steps, without those taken again.
            jump_length (`int`, *optional*, defaults to `10`):
                How many steps back towards noise a jump goes, and how far apart the places are where it is done.
            jump_n_sample (`int`, *optional*, defaults to `10`):
                How often each stretch of `jump_length` steps is denoised; 1 for no jumps. In all the network is called
                `len(resampling_levels(...)) - 1` times less the jumps: 2410 times with these defaults.
            generator, output_type, return_dict, callback_on_step_end_tensor_inputs (*optional*):
                As in [`AnimeFacePipeline.__call__`].
            callback_on_step_end (`Callable`, *optional*):
                Called after each denoising step, those taken again counted too; see [`AnimeFacePipeline.__call__`].

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`: the pictures. What is not masked has the values of `image`
            to the bit, in 8 bits for `"pil"`, in float32 for `"np"` and `"pt"`.

        Raises:
            `ValueError`: an image or mask of another kind, size, number or range, jumps below 1, a scheduler that does
            not take one step for one timestep (Heun's, PNDM, flow matching), and as in [`AnimeFacePipeline.__call__`].
        """
        image, mask = self.preprocess(image), self.preprocess_mask(mask_image)
        batch_size = max(len(image), len(mask))
        if {len(image), len(mask)} - {1, batch_size}:
            raise ValueError(f"{len(mask)} masks for {len(image)} images: give one, or one for each")
        self._check_inputs(batch_size, generator, num_inference_steps, output_type, callback_on_step_end_tensor_inputs)
        levels = resampling_levels(num_inference_steps, jump_length, jump_n_sample)

        # 1. prepare: the noise levels, and x_T ~ N(0, I)
        scheduler, device = self.scheduler, image.device
        alphas, sigmas = self._alphas_and_sigmas(num_inference_steps)
        timesteps = scheduler.timesteps.flip(0)  # of level k (k steps from clean) it is timesteps[k - 1]
        low, high = self.value_range
        clean = image * (high - low) + low
        shape = (batch_size, *image.shape[1:])

        def noise() -> torch.Tensor:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

        sample = noise() * scheduler.init_noise_sigma

        # 2. loop
        denoisings = sum(after < before for before, after in pairwise(levels))
        self._num_timesteps, step = denoisings, 0
        with self.progress_bar(total=denoisings) as progress:
            for before, after in pairwise(levels):
                if after > before:  # a jump: x_{t+j} ~ q(x_{t+j} | x_t), the one-step kernels (eq. 1) in one
                    ratio = alphas[after] / alphas[before]
                    sample = ratio * sample + (sigmas[after] ** 2 - (ratio * sigmas[before]) ** 2).sqrt() * noise()
                    continue
                timestep = timesteps[before - 1]
                # What a multistep solver remembers is of another sample than the one pasted together below: forget it.
                scheduler.set_timesteps(num_inference_steps)
                unknown = self.denoise_step(sample, timestep, generator)  # eq. 8b
                known = alphas[after] * clean + sigmas[after] * noise()  # eq. 8a
                sample = torch.where(mask, unknown, known)  # eq. 8c
                if callback_on_step_end is not None:
                    tensors = {name: sample for name in callback_on_step_end_tensor_inputs}
                    sample = (callback_on_step_end(self, step, timestep, tensors) or {}).get("sample", sample)
                step += 1
                progress.update()

        # 3. decode: the pixels that are kept are the given ones, not what scaling there and back makes of them
        images = self.convert_images(torch.where(mask, self.decode(sample, "pt"), image), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def preprocess_mask(self, mask_image: Any) -> torch.Tensor:
        """Masks as in [`~AnimeFaceInpaintPipeline.__call__`] → `(batch_size, 1, height, width)`, true in white."""
        size = self.unet.config.sample_size
        processor = VaeImageProcessor(
            do_resize=False, vae_scale_factor=1, do_normalize=False, do_convert_grayscale=True
        )
        mask = processor.preprocess(fit_pictures(mask_image, size, "L", "mask_image"))
        if mask.shape[1:] != (1, size, size):
            raise ValueError(f"mask_image has the shape {tuple(mask.shape)}: expected (batch_size, 1, {size}, {size})")
        if not mask.is_floating_point():
            mask = mask.float() / (255 if mask.max() > 1 else 1)
        if not (mask.min() >= 0 and mask.max() <= 1):
            raise ValueError("mask_image: arrays and tensors must hold bools, floats in [0, 1] or levels up to 255")
        return (mask >= 0.5).to(self._execution_device)

    def _alphas_and_sigmas(self, num_inference_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """α and σ of x_t = α_t x_0 + σ_t ε at each level, the clean one first: what it adds to 1 and to 0."""
        scheduler = self.scheduler
        scheduler.set_timesteps(num_inference_steps)
        timesteps = scheduler.timesteps
        try:
            if getattr(scheduler, "order", 1) != 1 or len(timesteps) != num_inference_steps:
                raise NotImplementedError("two calls of the network in a step")
            ones = torch.ones(len(timesteps), 1, 1, 1, device=timesteps.device)
            alphas = scheduler.add_noise(ones, torch.zeros_like(ones), timesteps).flatten()
            sigmas = scheduler.add_noise(torch.zeros_like(ones), ones, timesteps).flatten()
        except (AttributeError, NotImplementedError) as error:
            raise ValueError(
                f"{type(scheduler).__name__} cannot go back and forth between noise levels ({error}): use"
                " DDPMScheduler, DDIMScheduler or another that adds noise and calls the network once in a step"
            ) from error
        one, zero = ones[0, 0, 0], torch.zeros_like(ones[0, 0, 0])
        return torch.cat([one, alphas.flip(0)]), torch.cat([zero, sigmas.flip(0)])


def resampling_levels(num_inference_steps: int, jump_length: int, jump_n_sample: int) -> list[int]:
    r"""
    The noise levels that RePaint visits (Lugmayr et al. 2022, figure 9), as in Diffusers' `RePaintScheduler`.

    Args:
        num_inference_steps (`int`): The level of pure noise; 0 is the clean one.
        jump_length (`int`): How many levels a jump goes up, and how far apart the levels are from which it goes.
        jump_n_sample (`int`): How often each stretch is gone down.

    Returns:
        `list[int]`: from `num_inference_steps` to 0; the next one is one lower, or after a jump `jump_length` higher.

    Raises:
        `ValueError`: a length or number below 1.

    Example:

    ```py
    >>> resampling_levels(4, jump_length=2, jump_n_sample=2)
    [4, 3, 2, 1, 0, 2, 1, 0]
    ```
    """
    for name, value in {"jump_length": jump_length, "jump_n_sample": jump_n_sample}.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: must be a whole number of at least 1")
    jumps_left = {level: jump_n_sample - 1 for level in range(0, num_inference_steps - jump_length, jump_length)}
    levels = [num_inference_steps]
    while levels[-1] > 0:
        levels.append(levels[-1] - 1)
        if jumps_left.get(levels[-1], 0) > 0:
            jumps_left[levels[-1]] -= 1
            levels.append(levels[-1] + jump_length)
    return levels
