"""The pipeline: noise in, faces out; how it is saved, loaded and pushed so that both kinds of user can load it.

This file stands alone (no import of ours), because it is uploaded as it is: someone who has only Diffusers loads the
repository with `DiffusionPipeline.from_pretrained(name, trust_remote_code=True)` and runs this very code.
"""

import hashlib
import importlib
import inspect
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging
from diffusers.utils.torch_utils import is_compiled_module, randn_tensor
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image, ImageOps

logger = logging.get_logger(__name__)

# Read when the file is imported: the copy that remote code runs from may be overwritten by the next repository.
_SOURCE = Path(__file__).read_text(encoding="utf-8")

CARD_FILES = ("README.md", "assets/*.png")
REQUIRED_FILES = (
    "model_index.json",
    "pipeline_animeface.py",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/unet_animeface.py",
    "unet/*.safetensors",
)
PUBLISHED_FILES = (*REQUIRED_FILES, "unet/*.safetensors.index*.json", *CARD_FILES)

_HUB_KWARGS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
# A weights file, one of its shards or their index; the variant is before the shard's number or in the index's name.
_WEIGHTS = re.compile(
    r"unet/diffusion_pytorch_model(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors(?:\.index(?:\.(\w+))?\.json)?"
)
# The repository's name in the card's examples: `USER/NAME` until it is pushed, another one if it is pushed elsewhere.
_NAME_IN_CARD = re.compile(r'(?<=from_pretrained\(")[^"]+(?=")')
_SIGNATURE = re.compile(r"\n*<!-- written by animeface_pipeline, sha256 of the text above: [0-9a-f]{64} -->\s*$")

MINIMAL_CARD = """\
---
library_name: diffusers
pipeline_tag: unconditional-image-generation
license: other
tags: [diffusers, ddpm, anime, unconditional-image-generation]
---

# AnimeFacePipeline

Draws anime faces by denoising diffusion (Ho et al. 2020). With Diffusers alone:

```py
from diffusers import DiffusionPipeline

# The network's class is in this repository; the flag lets Diffusers run it. Read the two .py files first.
pipe = DiffusionPipeline.from_pretrained("USER/NAME", trust_remote_code=True)
pipe(batch_size=4).images[0]
```

With the package, `AnimeFacePipeline.from_pretrained("USER/NAME")` does the same, and runs no code of
this repository.
"""


class AnimeFacePipeline(DiffusionPipeline):
    r"""
    Pipeline for unconditional image generation by denoising diffusion (Ho et al. 2020, algorithm 2).

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Parameters:
        unet ([`AnimeFaceUNet2DModel`]):
            The network that predicts the noise in a sample.
        scheduler ([`SchedulerMixin`]):
            Any scheduler of Diffusers for discrete timesteps; the original's is a `DDPMScheduler` with 1000 linear-β
            steps. Keep `timestep_spacing="trailing"` in its config when you swap it with `from_config`.
        value_range (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
            What black and white are to the network. The original trains on pictures in [0, 1]; most other recipes use
            [-1, 1]. Saved in `model_index.json`; training scales pictures to it, sampling scales back from it.

    Example:

    ```py
    >>> import torch
    >>> from animeface_pipeline import AnimeFacePipeline

    >>> pipe = AnimeFacePipeline.from_pretrained("path/or/hub-name").to("cuda")
    >>> images = pipe(batch_size=16, generator=torch.Generator().manual_seed(0)).images
    ```
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["sample"]

    def __init__(
        self,
        unet: torch.nn.Module,
        scheduler: SchedulerMixin,
        value_range: tuple[float, float] | list[float] = (0.0, 1.0),  # a list when Diffusers reads it from the index
    ):
        super().__init__()
        try:
            low, high = (float(value) for value in value_range)
        except (TypeError, ValueError):
            low = high = float("nan")
        if not -float("inf") < low < high < float("inf"):
            raise ValueError(f"value_range={value_range!r}: must be two finite numbers, the first one smaller")
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(value_range=(low, high))

    @property
    def value_range(self) -> tuple[float, float]:
        """What black and white are to the network; an entry of `model_index.json`."""
        low, high = self.config.value_range
        return low, high

    @property
    def components(self) -> dict[str, Any]:
        """What another pipeline needs to share this one's network: `Other(**pipe.components)`, range included."""
        return {**super().components, "value_range": self.value_range}

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        r"""
        Make a pipeline of this class that shares another one's network, scheduler and value range.

        Diffusers' own casts what is shared to float32 for both; here the network stays as it is.

        Args:
            pipeline ([`AnimeFacePipeline`]): That one, or one for another task.
            unet, scheduler, value_range (*optional*): Take the place of what `pipeline` has.

        Raises:
            `ValueError`: another kind of pipeline, or an argument that is not one of the three.

        Example:

        ```py
        >>> from animeface_pipeline import AnimeFaceImg2ImgPipeline

        >>> edit = AnimeFaceImg2ImgPipeline.from_pipe(pipe)
        ```
        """
        names = {"unet", "scheduler", "value_range"}
        if set(pipeline.components) != names:
            raise ValueError(f"{type(pipeline).__name__} has not the components of an AnimeFacePipeline")
        if unknown := sorted(set(kwargs) - names):
            raise ValueError(f"from_pipe takes unet, scheduler and value_range, not {', '.join(unknown)}")
        return cls(**{**pipeline.components, **kwargs})

    @property
    def num_timesteps(self) -> int:
        """How many steps the call that runs, or the last one, takes."""
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 1000,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["AnimeFacePipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["sample"],
    ) -> ImagePipelineOutput | tuple:
        r"""
        Draw faces.

        Args:
            batch_size (`int`, *optional*, defaults to `1`): How many to draw at once.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                The source of all noise. With a list, one for each image, an image depends on its own generator alone,
                whatever else is in the batch; with CPU generators also whatever the device.
            num_inference_steps (`int`, *optional*, defaults to `1000`):
                Denoising steps, at most the scheduler's `num_train_timesteps`. The original's `DDPMScheduler` is
                right at 1000; for fewer swap the scheduler: SDE-DPM-Solver++ for 10 to 50, UniPC for fewer
                (docs/quality.md).
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"` for `PIL.Image`, `"np"` for an array `(batch_size, height, width, 3)`, `"pt"` for a tensor
                `(batch_size, 3, height, width)`, the last two with values in [0, 1].
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an [`~pipelines.ImagePipelineOutput`] instead of a plain tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback_on_step_end(pipe, step, timestep, {"sample": sample})`. What it
                returns under `"sample"` takes the sample's place.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["sample"]`):
                The tensors that the callback gets; `"sample"` is the only one.

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`: the images, as `.images` or as the tuple's only element.

        Raises:
            `ValueError`: a count below 1, more steps than were trained, as many generators as there are not images,
            an unknown output type or callback tensor.

        Example:

        ```py
        >>> from diffusers import DPMSolverMultistepScheduler

        >>> solver = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}
        >>> pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **solver)
        >>> face = pipe(num_inference_steps=20).images[0]
        ```
        """
        self._check_inputs(batch_size, generator, num_inference_steps, output_type, callback_on_step_end_tensor_inputs)
        config = self.unet.config

        # 1. prepare: x_T ~ N(0, I), always in float32, so that a half-precision network gets the same noise
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        noise = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        self.scheduler.set_timesteps(num_inference_steps)

        # 2. loop
        sample = self.denoise(
            noise * self.scheduler.init_noise_sigma,
            self.scheduler.timesteps,
            generator,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )

        # 3. decode
        images = self.decode(sample, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def denoise(
        self,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["sample"],
    ) -> torch.Tensor:
        r"""
        The loop of every task: one step of the scheduler for each timestep.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, 3, height, width)`):
                Where it starts, at the noise level of the first timestep, in float32.
            timesteps (`torch.Tensor` of shape `(steps,)`): The scheduler's own, or the last ones of them.
            generator, callback_on_step_end, callback_on_step_end_tensor_inputs (*optional*):
                As in [`~AnimeFacePipeline.__call__`].

        Returns:
            `torch.Tensor` of the sample's shape: the clean sample, for [`~AnimeFacePipeline.decode`].
        """
        self._num_timesteps = len(timesteps)
        for step, timestep in enumerate(self.progress_bar(timesteps)):
            sample = self.denoise_step(sample, timestep, generator)
            if callback_on_step_end is not None:
                tensors = {name: sample for name in callback_on_step_end_tensor_inputs}
                sample = (callback_on_step_end(self, step, timestep, tensors) or {}).get("sample", sample)
        return sample

    def denoise_step(
        self, sample: torch.Tensor, timestep: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None
    ) -> torch.Tensor:
        """x_t → x_{t-1}: the network predicts in its own precision, the scheduler steps in float32."""
        accepts_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"generator": generator} if accepts_generator else {}
        model_input = self.scheduler.scale_model_input(sample, timestep).to(self.unet.dtype)
        on_device = timestep.to(sample.device, non_blocking=True)  # the scheduler branches on the CPU's
        prediction = self.unet(model_input, on_device, return_dict=False)[0]
        prediction = prediction.to(torch.float32, copy=True)  # a solver keeps it, and a CUDA graph writes over its own
        return self.scheduler.step(prediction, timestep, sample, **step_kwargs).prev_sample

    def preprocess(self, image: Any) -> torch.Tensor:
        r"""
        Turn images of any kind into a tensor of the network's size.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of these):
                Pictures of any size and mode, which are cropped to a centred square and resized; arrays
                `(batch_size, height, width, 3)` or tensors `(batch_size, 3, height, width)` of the network's size with
                values in [0, 1]; the first dimension may be missing.

        Returns:
            `torch.Tensor` of shape `(batch_size, 3, height, width)`: the images in float32, with values in [0, 1].

        Raises:
            `ValueError`: no image, another kind of input, another size or other values.
        """
        channels, size = self.unet.config.in_channels, self.unet.config.sample_size
        processor = VaeImageProcessor(do_resize=False, vae_scale_factor=1, do_normalize=False)
        tensor = processor.preprocess(fit_pictures(image, size, "RGB", "image"))
        if tensor.shape[1:] != (channels, size, size):
            expected = f"(batch_size, {channels}, {size}, {size})"
            raise ValueError(f"image has the shape {tuple(tensor.shape)}: expected {expected}")
        if not tensor.is_floating_point() or not (tensor.min() >= 0 and tensor.max() <= 1):
            raise ValueError("image: arrays and tensors must hold floats in [0, 1]; divide whole numbers by 255")
        return tensor.to(self._execution_device, torch.float32)

    def encode(self, image: Any) -> torch.Tensor:
        """Images as in [`~AnimeFacePipeline.preprocess`] → clean samples, with values in `value_range`."""
        low, high = self.value_range
        return self.preprocess(image) * (high - low) + low

    def decode(self, sample: torch.Tensor, output_type: str = "pil") -> Any:
        r"""
        Turn samples in the network's value range into images.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, 3, height, width)`): values around `value_range`.
            output_type (`str`, *optional*, defaults to `"pil"`): as in [`~AnimeFacePipeline.__call__`].

        Returns:
            `list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`: the images, clamped to [0, 1] before conversion.
        """
        low, high = self.value_range
        return self.convert_images(((sample - low) / (high - low)).clamp(0, 1), output_type)

    def convert_images(self, images: torch.Tensor, output_type: str) -> Any:
        """Images `(batch_size, 3, height, width)` with values in [0, 1] → images of the kind `output_type`."""
        if output_type == "pt":
            return images
        array = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array

    def _check_inputs(
        self, batch_size: Any, generator: Any, num_inference_steps: Any, output_type: Any, tensor_inputs: Any
    ) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}: must be a whole number of at least 1")
        most = self.scheduler.config.num_train_timesteps
        if not isinstance(num_inference_steps, int) or not 1 <= num_inference_steps <= most:
            raise ValueError(f"num_inference_steps={num_inference_steps!r}: must be a whole number from 1 to {most}")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for batch_size={batch_size}: give one, or one per image")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type={output_type!r}: must be 'pil', 'np' or 'pt'")
        if unknown := set(tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"callback_on_step_end_tensor_inputs: {sorted(unknown)} not in ['sample']")
        is_ddpm = isinstance(self.scheduler, diffusers.DDPMScheduler)
        if is_ddpm and num_inference_steps < most and self.scheduler.config.variance_type == "fixed_large":
            logger.warning(
                f"DDPMScheduler with variance_type='fixed_large' leaves noise in the picture at {num_inference_steps}"
                f" steps instead of {most}: use variance_type='fixed_small', or better UniPCMultistepScheduler or"
                " DPMSolverMultistepScheduler with from_config(pipe.scheduler.config)"
            )

    # ---- saving, loading, pushing: one layout for both kinds of user ----

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        card: Mapping[str, str | bytes] | None = None,
        repo_id: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
    ) -> None:
        r"""
        Save everything that either kind of user needs: index, weights, scheduler, the two code files and a card.

        Args:
            save_directory (`str` or `os.PathLike`): The folder; created if it is not there.
            safe_serialization (`bool`, *optional*, defaults to `True`): Only `True`: no pickle is ever written.
            variant (`str`, *optional*): For `diffusion_pytorch_model.<variant>.safetensors`, e.g. `"fp16"`.
            max_shard_size (`int` or `str`, *optional*): As in [`~ModelMixin.save_pretrained`].
            push_to_hub (`bool`, *optional*, defaults to `False`): Whether to push the folder afterwards.
            card (`dict[str, str | bytes]`, *optional*):
                The model card and its pictures by file name (`README.md`, `assets/….png`). Without it the card that
                came with the weights is carried along. A `README.md` that somebody edited is never overwritten.
            repo_id (`str`, *optional*): Where to push to; defaults to the folder's name, in your own namespace.
            commit_message, private, token, create_pr (*optional*): As in [`~AnimeFacePipeline.push_to_hub`].

        Raises:
            `ValueError`: `safe_serialization=False`.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write a pickle: pipelines are saved as safetensors only")
        folder = Path(save_directory)
        # Of a former save, in shards or in one file, Diffusers leaves what would be loaded instead of the new weights.
        weights, index = _weights_and_index(folder, variant)
        index.unlink(missing_ok=True)
        super().save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
        if index.is_file():
            weights.unlink(missing_ok=True)
        (folder / "pipeline_animeface.py").write_text(_SOURCE, encoding="utf-8", newline="\n")
        self._write_card(folder, card, token)
        if push_to_hub:
            upload_folder_as_pipeline(
                folder,
                repo_id or folder.resolve().name,
                commit_message=commit_message,
                private=private,
                token=token,
                create_pr=create_pr,
            )

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        card: Mapping[str, str | bytes] | None = None,
    ) -> CommitInfo:
        r"""
        Push weights, scheduler, code, card and pictures to the Hub in one commit.

        Args:
            repo_id (`str`): `user/name`; created if it is not there.
            commit_message (`str`, *optional*): Defaults to `"Upload AnimeFacePipeline"`.
            private (`bool`, *optional*): Whether a new repository is private.
            token (`str`, *optional*): Defaults to the one of `hf auth login` or `HF_TOKEN`.
            create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request instead.
            safe_serialization, variant, card (*optional*): As in [`~AnimeFacePipeline.save_pretrained`].

        Returns:
            `huggingface_hub.CommitInfo`: the commit.

        Raises:
            `ValueError`: the repository holds something that is not an `AnimeFacePipeline`.
            `huggingface_hub.errors.HfHubHTTPError`: no token, a refused name, a server that fails.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization, variant, card=card, token=token)
            return upload_folder_as_pipeline(
                folder, repo_id, commit_message=commit_message, private=private, token=token, create_pr=create_pr
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "AnimeFacePipeline":
        r"""
        Load a pipeline from a folder or the Hub with the installed classes; no code of the repository is run.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder, or a name on the Hub (`user/name`).
            revision, token, cache_dir, force_download, local_files_only (*optional*): As in Diffusers. Weights and
                scheduler come from the one commit that `revision` stands for.
            unet, scheduler, value_range (*optional*): Take the place of what the folder holds.
            kwargs (*optional*): For [`~ModelMixin.from_pretrained`], e.g. `torch_dtype` and `variant`.

        Raises:
            `OSError`: no such folder or repository, not a pipeline's folder, weights that are missing or truncated.
            `ValueError`: another kind of pipeline, weights of another shape.
        """
        kwargs.pop("trust_remote_code", None)  # there is nothing to trust: see above
        hub_kwargs = {name: kwargs.pop(name) for name in _HUB_KWARGS if name in kwargs}
        folder = _local_folder(pretrained_model_name_or_path, kwargs.get("variant"), hub_kwargs)
        index = _read_index(folder, shown_as=pretrained_model_name_or_path)
        parts = {name: kwargs.pop(name) for name in ("scheduler", "value_range") if name in kwargs}
        if "scheduler" not in parts:
            parts["scheduler"] = _load_scheduler(folder, index["scheduler"], pretrained_model_name_or_path)
        parts.setdefault("value_range", index["value_range"])
        unet = kwargs.pop("unet", None) or _unet_class(cls).from_pretrained(folder / "unet", **kwargs)
        return cls(unet=unet, **parts)

    def to_json_string(self) -> str:
        """`model_index.json`: the classes by the files that hold them, without the path that we were loaded from."""
        index = json.loads(super().to_json_string())
        index.pop("_name_or_path", None)
        unet_class = type(self.unet._orig_mod if is_compiled_module(self.unet) else self.unet)
        unet_file = unet_class.__module__.rpartition(".")[2]
        # Pipelines for other tasks have the same components: they save themselves as this one, whose file goes along.
        index["_class_name"] = ["pipeline_animeface", "AnimeFacePipeline"]
        index["unet"] = [unet_file, unet_class.__name__]
        index["auto_map"] = {"AutoModel": f"{unet_file}.{unet_class.__name__}"}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in Diffusers, which would warn of the entry `auto_map` that its own `AutoModel` needs."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def _write_card(self, folder: Path, card: Mapping[str, str | bytes] | None, token: str | None) -> None:
        if has_edited_card(folder):
            return  # its pictures are somebody's own, too
        for name, content in (self._former_card(folder, token) if card is None else card).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    def _former_card(self, folder: Path, token: str | None) -> dict[str, str | bytes]:
        """The card that came with the weights, with its pictures; for weights that never had one, a new card."""
        source = Path(self.unet.config.get("_name_or_path") or "none").parent
        if (source / "model_index.json").is_file() and source.resolve() != folder.resolve():
            if not _fetch_card(source, token):
                logger.warning(f"The card of these weights cannot be had from the Hub: {folder} is saved without it")
                return {}
            files = [file for pattern in CARD_FILES for file in source.glob(pattern)]
            if files:
                return {file.relative_to(source).as_posix(): file.read_bytes() for file in files}
        return {} if (folder / "README.md").is_file() else self._new_card()

    def _new_card(self) -> dict[str, str | bytes]:
        try:
            return importlib.import_module("animeface_pipeline.hub").render_card(self)
        except ImportError:
            return {"README.md": sign_card(MINIMAL_CARD)}


def fit_pictures(image: Any, size: int, mode: str, name: str) -> Any:
    """Pictures upright, on white (masks, of mode L, on black), the centred square; arrays and tensors as they are.

    `picture_rules.to_rgb` does more of the kind for files, but cannot be called from here: this module stands alone.
    """
    if isinstance(image, (list, tuple)):
        if not image:
            raise ValueError(f"{name}: an empty list")
        if len({Image.Image if isinstance(entry, Image.Image) else type(entry) for entry in image}) > 1:
            raise ValueError(f"{name}: a list must be of one kind: pictures, arrays or tensors")
        return [fit_pictures(entry, size, mode, name) for entry in image]
    if not isinstance(image, Image.Image):
        if 0 in getattr(image, "shape", ()):
            raise ValueError(f"{name} has the shape {tuple(image.shape)}: there is nothing in it")
        return image
    if image.mode in ("I", "F"):
        raise ValueError(f"{name}: a picture of mode {image.mode}, whose white nobody knows: give one of 8 or 16 bits")
    picture = ImageOps.exif_transpose(image)
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black" if mode == "L" else "white"), picture)
    picture = picture.convert(mode)
    return picture if picture.size == (size, size) else ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)


def _unet_class(pipeline_class: Any) -> Any:
    """The network's class in the package that `pipeline_class` is from, or in the installed one."""
    package = pipeline_class.__module__.rpartition(".")[0]
    for name in (package, "animeface_pipeline"):
        try:
            module: Any = importlib.import_module(f"{name}.unet_animeface")
            return module.AnimeFaceUNet2DModel
        except ImportError:
            continue
    raise ImportError(
        "the package animeface_pipeline is not installed: load with"
        " diffusers.DiffusionPipeline.from_pretrained(..., trust_remote_code=True)"
    )


def _local_folder(name_or_path: str | os.PathLike, variant: str | None, hub_kwargs: dict[str, Any]) -> Path:
    """The folder itself, or the Hub's files of one commit (without any code) in the cache."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    stem, dotted = "unet/diffusion_pytorch_model", f".{variant}" if variant else ""
    weights = [f"{stem}{dotted}.safetensors", f"{stem}{dotted}-*.safetensors", f"{stem}.*.index{dotted}.json"]
    patterns = ["model_index.json", "scheduler/*.json", "unet/config.json", *weights]
    try:
        folder = Path(snapshot_download(str(name_or_path), allow_patterns=patterns, **hub_kwargs))
    except Exception as error:  # of the client, of the HTTP library below it, of xet: all mean the same here
        reason = explain_hub_error(error, hub_kwargs.get("token"))
        raise OSError(f"{name_or_path}: no such folder, and not to be had from the Hub: {reason}") from error
    if not hub_kwargs.get("local_files_only"):
        _fetch_card(folder, hub_kwargs.get("token"))
    return folder


def _fetch_card(folder: Path, token: str | None) -> bool:
    """Add the card to a commit in the Hub's cache (Diffusers downloads none); False if it cannot be had now."""
    if folder.parent.name != "snapshots" or (folder / "README.md").is_file():
        return True
    cache, repo = folder.parents[2], folder.parents[1].name  # <cache>/models--user--name/snapshots/<commit>
    repo_id = repo.removeprefix("models--").replace("--", "/")
    try:
        snapshot_download(repo_id, revision=folder.name, cache_dir=cache, allow_patterns=list(CARD_FILES), token=token)
    except Exception as error:  # the pipeline works without its card
        logger.info(f"No card: {explain_hub_error(error, token)}")
        return False
    return True


def _weights_and_index(folder: Path, variant: str | None) -> tuple[Path, Path]:
    """Where Diffusers saves the weights: in one file, or in shards with an index."""
    dotted = f".{variant}" if variant else ""
    stem = "diffusion_pytorch_model"
    return folder / f"unet/{stem}{dotted}.safetensors", folder / f"unet/{stem}.safetensors.index{dotted}.json"


def _read_index(folder: Path, shown_as: str | os.PathLike) -> dict[str, Any]:
    """`model_index.json` of an `AnimeFacePipeline`, or one clear error."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OSError(f"{shown_as}: not a pipeline's folder, it has no model_index.json") from None
    except ValueError as error:
        raise OSError(f"{shown_as}: model_index.json is not JSON ({error})") from error
    if not isinstance(index, dict):
        raise OSError(f"{shown_as}: model_index.json holds no JSON object")
    class_name = index.get("_class_name")
    class_name = class_name[-1] if isinstance(class_name, list) else class_name
    if not str(class_name).startswith("AnimeFace"):
        raise ValueError(f"{shown_as}: model_index.json describes a {class_name}, not an AnimeFacePipeline")
    if missing := {"scheduler", "value_range"} - set(index):
        raise ValueError(f"{shown_as}: model_index.json has no {' and no '.join(sorted(missing))}")
    return index


def _load_scheduler(folder: Path, named: Any, shown_as: str | os.PathLike) -> SchedulerMixin:
    """The scheduler that `model_index.json` names, with the folder's settings, or one clear error."""
    library, class_name = named if isinstance(named, list) and len(named) == 2 else (None, named)
    scheduler_class: Any = getattr(diffusers, str(class_name), None) if library == "diffusers" else None
    is_scheduler = inspect.isclass(scheduler_class) and issubclass(scheduler_class, SchedulerMixin)
    if not is_scheduler:
        raise ValueError(f"{shown_as}: model_index.json names the scheduler {class_name}, unknown to Diffusers")
    settings = scheduler_class.load_config(folder, subfolder="scheduler")
    try:
        loaded: SchedulerMixin = scheduler_class.from_config({**settings})
    except (AttributeError, TypeError, NotImplementedError, ValueError) as error:
        raise ValueError(f"{shown_as}: scheduler/scheduler_config.json is damaged ({error})") from error
    return loaded


def check_folder(folder: Path) -> None:
    """Raise an `OSError` or a `ValueError` if `folder` is not a whole pipeline."""
    _read_index(folder, shown_as=folder)
    for pattern in REQUIRED_FILES:
        if not any(folder.glob(pattern)):
            raise OSError(f"{folder}: not a whole pipeline, it has no {pattern}; save it again")


def upload_folder_as_pipeline(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    include: Iterable[str] = (),
) -> CommitInfo:
    r"""
    Push a saved pipeline's folder to the Hub in one commit: only its own files, no checkpoints and no logs.

    Args:
        folder (`str` or `os.PathLike`): One that `save_pretrained` wrote.
        repo_id, commit_message, private, token, create_pr: As in [`AnimeFacePipeline.push_to_hub`].
        include (`Iterable[str]`, *optional*): Patterns of more files of the folder to push, e.g. `"logs/**/*"`.

    Returns and raises what [`AnimeFacePipeline.push_to_hub`] does; `OSError` also if `folder` is no pipeline's.
    """
    folder = Path(folder)
    check_folder(folder)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    head = api.model_info(repo_id)
    there = {file.rfilename for file in head.siblings or []}

    def read(name: str) -> str:
        file = Path(api.hf_hub_download(repo_id, name, revision=head.sha)) if name in there else None
        return file.read_text(encoding="utf-8", errors="replace") if file else ""

    # 1. nothing of another kind is overwritten
    foreign = sorted(there - {".gitattributes", "LICENSE", "README.md"})
    if foreign and '"AnimeFace' not in read("model_index.json"):
        raise ValueError(f"{repo_id} on the Hub holds something else ({', '.join(foreign[:3])}): choose another name")

    # 2. the files, and the card under the repository's name
    files: dict[str, str | bytes] = {
        path.relative_to(folder).as_posix(): str(path)
        for pattern in (*PUBLISHED_FILES, *include)
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }
    card_here = Path(folder, "README.md").read_text(encoding="utf-8") if files.pop("README.md", None) else ""
    card = _card_to_push(card_here, read("README.md"), repo_id)
    if card is not None:
        files["README.md"] = card.encode()
    else:  # its pictures stay as well
        files = {name: file for name, file in files.items() if not (name in there and is_of_card(name))}
        if card_here:
            logger.warning(f"{repo_id} keeps its README.md, which somebody edited")

    # 3. former weights of the same variant that would be loaded instead of these
    variants = {_variant(name) for name in files}
    stale = sorted(name for name in there - set(files) if _WEIGHTS.fullmatch(name) and _variant(name) in variants)

    # 4. one commit, on top of the one that was looked at: what somebody pushes meanwhile is not overwritten
    return api.create_commit(
        repo_id,
        [*(CommitOperationAdd(*file) for file in files.items()), *map(CommitOperationDelete, stale)],
        commit_message=commit_message or "Upload AnimeFacePipeline",
        create_pr=create_pr,
        parent_commit=head.sha,
    )


def _card_to_push(here: str, there: str, repo_id: str) -> str | None:
    """The card that names `repo_id`; None to leave the one there: nothing that we wrote replaces an edited card."""
    if there and (not here or (is_our_card(here) and not is_our_card(there))):
        return None
    card = here or sign_card(MINIMAL_CARD)
    return sign_card(_NAME_IN_CARD.sub(repo_id, card)) if is_our_card(card) else card


def _variant(name: str) -> str | None:
    """Which variant a file holds weights of: `"fp16"`, `""`, or None if it is no weights file."""
    found = _WEIGHTS.fullmatch(name)
    return (found[1] or found[2] or "") if found else None


_EXPLAINED_ERRORS = (
    (RevisionNotFoundError, "it has no such revision"),
    (GatedRepoError, "its owner must give you access first"),
    (RepositoryNotFoundError, "no such repository, or a private one that the token may not read"),
    (LocalEntryNotFoundError, "the Hub cannot be reached, and the cache does not have it"),
)
_EXPLAINED_STATUSES = {
    401: "the Hub refuses the token: make a new one for `hf auth login` or HF_TOKEN",
    403: "the token may not write there",
    412: "somebody else pushed at the same moment: push again",
}


def explain_hub_error(error: Exception, token: str | None = None) -> str:
    """Why the Hub could not do what it was asked to, in one line."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the client's "Error while uploading …" alone says nothing
    for kind, explanation in _EXPLAINED_ERRORS:
        if isinstance(error, kind):
            return explanation
    said = " ".join((getattr(error, "server_message", None) or str(error)).split()).rstrip(".")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401 and not (token or get_token()):
            return "there is no token: run `hf auth login`, or set HF_TOKEN"
        return f"{_EXPLAINED_STATUSES.get(status, f'the Hub answered {status}')} ({said})"
    return said if isinstance(error, ValueError) else f"{type(error).__name__}: {said}"


# ---- the card is ours, and may be written anew, as long as its text has the hash that it was signed with ----


def unsigned_card(text: str) -> str:
    """The card without its signature."""
    return _SIGNATURE.split(text)[0].strip()


def sign_card(text: str) -> str:
    """The card with a trailing comment that holds the hash of its text."""
    text = unsigned_card(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}\n\n<!-- written by animeface_pipeline, sha256 of the text above: {digest} -->\n"


def is_our_card(text: str) -> bool:
    """Whether nobody changed the card since we signed it."""
    return text.strip() == sign_card(text).strip() and _SIGNATURE.search(text) is not None


def has_edited_card(folder: Path) -> bool:
    """Whether there is a card that somebody changed, or wrote."""
    card = folder / "README.md"
    return card.is_file() and not is_our_card(card.read_text(encoding="utf-8", errors="replace"))


def is_of_card(name: str) -> bool:
    """Whether a file of a pipeline's folder, by its relative name, is its card or one of the card's pictures."""
    return any(fnmatchcase(name, pattern) for pattern in CARD_FILES)
