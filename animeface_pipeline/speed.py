"""What makes the network faster without changing what it computes: memory layout, compilation, half precision.

```py
>>> from animeface_pipeline.speed import speed_up

>>> pipe = speed_up(AnimeFacePipeline.from_pretrained("anime-faces").to("cuda"))
```
"""

import ctypes
import importlib.util
import sys
from typing import Any

import torch

from .config import TrainingConfig
from .pipeline_animeface import AnimeFacePipeline

# What `--fast` turns on, by the kind of device (benchmarks/RESULTS.md). On a CPU half precision is left to
# --mixed_precision, because only some CPUs have it, and compiling takes minutes.
FAST: dict[str, dict[str, Any]] = {
    "cuda": {"mixed_precision": "bf16", "channels_last": True, "torch_compile": "default", "allow_tf32": True},
    "cpu": {"channels_last": True},
}


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory() -> None:
    """On Linux, let the allocator keep what is freed, for the next step of a CPU; on a GPU torch does so itself.

    By default glibc hands gigabytes back to the system after each step, and the system clears every page anew.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
        libc.mallopt(M_MMAP_MAX, 0)


def can_compile_on_gpu() -> bool:
    """Whether torch.compile can make GPU code: it needs Triton (which pip leaves out on Windows), and that a Volta."""
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability() >= (7, 0)


def imitates_bf16(device: torch.device) -> bool:
    """Whether it is a CPU without instructions for bf16, which was seen to take 8 to 20 times as long as float32."""
    has_mkldnn = device.type == "cpu" and torch.backends.mkldnn.is_available()
    return has_mkldnn and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def choose_fast_settings(config: TrainingConfig) -> None:
    """With `--fast`, set what is fastest on this machine, except what a flag says otherwise."""
    if not config.fast:
        return
    has_gpu = torch.cuda.is_available()
    settings = dict(FAST["cuda" if has_gpu else "cpu"])
    if has_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        settings["mixed_precision"] = "fp16"
    if has_gpu and not can_compile_on_gpu():
        settings["torch_compile"] = None
    for name, value in settings.items():
        if name not in config.given:
            setattr(config, name, value)


def prepare_for_training(unet: torch.nn.Module, config: TrainingConfig) -> None:
    """Apply the config's levers to the network, in place; its weights and their names stay as they are."""
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True  # cudnn's, for convolutions, is torch's default
    if config.channels_last:
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's hints
    if config.torch_compile is not None:
        unet.compile(mode=config.torch_compile, dynamic=False)


def compile_for_sampling(unet: torch.nn.Module, mode: str = "default") -> None:
    """Channels last and compiled, in place. On a CPU the weights of the first call are packed for it and stay."""
    if vars(unet).pop("forward", None):  # of a former call, whose code would be found again, old weights and all
        torch.compiler.reset()
    unet.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's hints
    compiled = torch.compile(unet.forward, mode=mode, dynamic=False)
    if next(unet.parameters()).device.type == "cpu":
        compiled = torch._inductor.config.patch(freezing=True)(compiled)  # read when it compiles, in the first call
    unet.forward = compiled


def speed_up(
    pipe: AnimeFacePipeline, torch_dtype: torch.dtype | None = None, compile_mode: str | None = None
) -> AnimeFacePipeline:
    r"""
    Make a pipeline sample faster, in place: channels-last weights; on a GPU also half precision, and compilation with
    CUDA graphs. The scheduler and the sample stay in float32. It is for sampling only: compiled on a CPU, the network
    keeps to the weights that it has now; called again, it is compiled anew, and whatever else was compiled as well.

    Args:
        pipe ([`AnimeFacePipeline`]): The pipeline, on the device that it will run on.
        torch_dtype (`torch.dtype`, *optional*):
            Of the network. By default bfloat16 on a GPU that has it, else float16; on a CPU as it is.
        compile_mode (`str`, *optional*):
            A mode of `torch.compile`. By default `"reduce-overhead"` (CUDA graphs) on a GPU if Triton is there; on a
            CPU no compilation, but `"default"` pays off there too if there is much to draw. The first call takes a
            minute or more, and so does the first with another batch size.

    Returns:
        [`AnimeFacePipeline`]: the same pipeline.

    Example:

    ```py
    >>> from animeface_pipeline.schedulers import switch_scheduler

    >>> pipe = speed_up(pipe)
    >>> pipe.scheduler = switch_scheduler(pipe.scheduler, "sde-dpmsolver++")
    >>> images = pipe(batch_size=16, num_inference_steps=20).images
    ```
    """
    if pipe.device.type == "cuda":
        half = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        torch_dtype = torch_dtype or half
        compile_mode = compile_mode or ("reduce-overhead" if can_compile_on_gpu() else None)
    if torch_dtype is not None:
        pipe.unet.to(dtype=torch_dtype)
    if compile_mode is not None:
        compile_for_sampling(pipe.unet, compile_mode)
    else:
        pipe.unet.to(memory_format=torch.channels_last)
    return pipe
