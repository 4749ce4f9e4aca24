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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import is_compiled_module, randn_tensor
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError

logger = logging.get_logger(__name__)

# Read when the file is imported: the copy that remote code runs from may be overwritten by the next repository.
_SOURCE = Path(__file__).read_text(encoding="utf-8")

CARD_FILES = ("README.md", "assets/*.png")
PUBLISHED_FILES = (
    "model_index.json",
    "pipeline_animeface.py",
    "scheduler/*.json",
    "unet/config.json",
    "unet/unet_animeface.py",
    "unet/*.safetensors*",
    *CARD_FILES,
)

_HUB_KWARGS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
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

With the package `animeface_pipeline` no code of the repository is run:

```py
from animeface_pipeline import AnimeFacePipeline

pipe = AnimeFacePipeline.from_pretrained("USER/NAME")
```
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
        value_range: tuple = (0.0, 1.0),  # tuple[float, float]; Diffusers warns of annotations that are no class
    ):
        super().__init__()
        low, high = (float(value) for value in value_range)
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
                right at 1000; for 10 to 50 steps swap the scheduler (DPM-Solver++, UniPC, DDIM).
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
        >>> from diffusers import UniPCMultistepScheduler

        >>> pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, solver_order=3)
        >>> face = pipe(num_inference_steps=20).images[0]
        ```
        """
        self._check_inputs(batch_size, generator, num_inference_steps, output_type, callback_on_step_end_tensor_inputs)
        device, scheduler, config = self._execution_device, self.scheduler, self.unet.config

        # 1. prepare: x_T ~ N(0, I), always in float32, so that a half-precision network gets the same noise
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        sample = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        scheduler.set_timesteps(num_inference_steps, device=device)
        sample = sample * scheduler.init_noise_sigma
        accepts_generator = "generator" in inspect.signature(scheduler.step).parameters
        step_kwargs = {"generator": generator} if accepts_generator else {}

        # 2. loop: the network predicts in its own precision, the scheduler steps in float32
        for step, timestep in enumerate(self.progress_bar(scheduler.timesteps)):
            model_input = scheduler.scale_model_input(sample, timestep).to(self.unet.dtype)
            prediction = self.unet(model_input, timestep, return_dict=False)[0].float()
            sample = scheduler.step(prediction, timestep, sample, **step_kwargs).prev_sample
            if callback_on_step_end is not None:
                tensors = {name: sample for name in callback_on_step_end_tensor_inputs}
                sample = (callback_on_step_end(self, step, timestep, tensors) or {}).get("sample", sample)

        # 3. decode
        images = self.decode(sample, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

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
        images = ((sample - low) / (high - low)).clamp(0, 1)
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
        **kwargs: Any,
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
            kwargs (*optional*): `repo_id`, `commit_message`, `private`, `token`, `create_pr`, for `push_to_hub`.

        Raises:
            `ValueError`: `safe_serialization=False`.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write a pickle: pipelines are saved as safetensors only")
        folder = Path(save_directory)
        super().save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
        (folder / "pipeline_animeface.py").write_text(_SOURCE, encoding="utf-8")
        self._write_card(folder, card)
        if push_to_hub:
            upload_folder_as_pipeline(folder, kwargs.pop("repo_id", folder.resolve().name), **kwargs)

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
            self.save_pretrained(folder, safe_serialization, variant, card=card)
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
            library, class_name = index["scheduler"]
            scheduler_class = getattr(diffusers, class_name, None) if library == "diffusers" else None
            if not inspect.isclass(scheduler_class) or not issubclass(scheduler_class, SchedulerMixin):
                raise ValueError(f"{folder}: model_index.json names the scheduler {class_name}, unknown to Diffusers")
            parts["scheduler"] = scheduler_class.from_pretrained(folder, subfolder="scheduler")
        parts.setdefault("value_range", index["value_range"])
        unet = kwargs.pop("unet", None) or _unet_class(cls).from_pretrained(folder / "unet", **kwargs)
        return cls(unet=unet, **parts)

    def to_json_string(self) -> str:
        """`model_index.json`: the classes by the files that hold them, without the path that we were loaded from."""
        index = json.loads(super().to_json_string())
        index.pop("_name_or_path", None)
        unet_class = type(self.unet._orig_mod if is_compiled_module(self.unet) else self.unet)
        unet_file = unet_class.__module__.rpartition(".")[2]
        index["_class_name"] = ["pipeline_animeface", type(self).__name__]
        index["unet"] = [unet_file, unet_class.__name__]
        index["auto_map"] = {"AutoModel": f"{unet_file}.{unet_class.__name__}"}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in Diffusers, which would warn of the entry `auto_map` that its own `AutoModel` needs."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def _write_card(self, folder: Path, card: Mapping[str, str | bytes] | None) -> None:
        readme, source = folder / "README.md", self._source_folder()
        if card is None and source is not None and source.resolve() != folder.resolve():
            card = {str(file.relative_to(source)): file.read_bytes() for p in CARD_FILES for file in source.glob(p)}
        if not card:
            card = {} if readme.is_file() else {"README.md": sign_card(MINIMAL_CARD)}
        for name, content in card.items():
            if name == "README.md" and readme.is_file() and not is_our_card(readme.read_text(encoding="utf-8")):
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    def _source_folder(self) -> Path | None:
        """The pipeline's folder that the weights were loaded from, if there is one."""
        folder = Path(self.unet.config.get("_name_or_path") or "none").parent
        return folder if (folder / "model_index.json").is_file() else None


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
    patterns = ["model_index.json", "scheduler/*.json", "unet/config.json", *weights, *CARD_FILES]
    try:
        return Path(snapshot_download(str(name_or_path), allow_patterns=patterns, **hub_kwargs))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"{name_or_path}: no such folder, and not to be had from the Hub: {reason}") from error


def _read_index(folder: Path, shown_as: str | os.PathLike) -> dict[str, Any]:
    """`model_index.json` of an `AnimeFacePipeline`, or one clear error."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OSError(f"{shown_as}: not a pipeline's folder, it has no model_index.json") from None
    except ValueError as error:
        raise OSError(f"{shown_as}: model_index.json is not JSON ({error})") from error
    class_name = index.get("_class_name")
    class_name = class_name[-1] if isinstance(class_name, list) else class_name
    missing = {"scheduler", "value_range"} - set(index)
    if not str(class_name).startswith("AnimeFace") or missing:
        raise ValueError(f"{shown_as}: model_index.json describes a {class_name}, not an AnimeFacePipeline")
    return index


def upload_folder_as_pipeline(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    r"""
    Push a saved pipeline's folder to the Hub in one commit: only its own files, no checkpoints and no logs.

    Args and errors are those of [`AnimeFacePipeline.push_to_hub`]; `folder` is one that `save_pretrained` wrote.
    """
    folder = Path(folder)
    _read_index(folder, shown_as=folder)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    existing = set(api.list_repo_files(repo_id)) - {".gitattributes", "LICENSE"}

    def read(name: str) -> str:
        return Path(api.hf_hub_download(repo_id, name)).read_text(encoding="utf-8") if name in existing else ""

    if existing - {"README.md"} and '"AnimeFace' not in read("model_index.json"):
        names = ", ".join(sorted(existing)[:3])
        raise ValueError(f"{repo_id} on the Hub holds something else ({names}, …): choose another name, or empty it")
    files: dict[str, str | bytes] = {
        path.relative_to(folder).as_posix(): str(path)
        for pattern in PUBLISHED_FILES
        for path in sorted(folder.glob(pattern))
    }
    if "README.md" in files:
        card = Path(folder, "README.md").read_text(encoding="utf-8")
        if "README.md" in existing and not is_our_card(read("README.md")):
            del files["README.md"]  # somebody edited the one on the Hub
        elif is_our_card(card):
            files["README.md"] = sign_card(card.replace("USER/NAME", repo_id)).encode()
    return api.create_commit(
        repo_id,
        [CommitOperationAdd(name, content) for name, content in files.items()],
        commit_message=commit_message or "Upload AnimeFacePipeline",
        create_pr=create_pr,
    )


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
