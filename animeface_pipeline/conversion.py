"""The original's checkpoint → a pipeline: tables of names, a reader that runs nothing, a writer of all or nothing.

```py
>>> from animeface_pipeline import AnimeFacePipeline
>>> from animeface_pipeline.conversion import convert_checkpoint

>>> convert_checkpoint("ddpm-model-45.ckpt", "anime-faces")
>>> pipe = AnimeFacePipeline.from_pretrained("anime-faces")
```
"""

import hashlib
import itertools
import os
import re
import shutil
import sys
import tempfile
import textwrap
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .cli import BadInput
from .hub import TrainingSummary, render_card
from .pipeline_animeface import AnimeFacePipeline
from .schedulers import original_scheduler
from .unet_animeface import AnimeFaceUNet2DModel

PUBLISHED_NAME = "ddpm-model-45.ckpt"
PUBLISHED_SHA256 = "ef6fa7ef728307128be5e78bd1a36f21e75c06a5b4bfcaa7c997b998a3d3a98c"

NUM_TRAIN_TIMESTEPS = 1000
DTYPES = {None: torch.float32, "fp16": torch.float16}  # of the weights' files, by variant

# Where a checkpoint may keep the state dict; averaged weights first, because they are the ones to sample with.
ENTRIES = ("ema", "state_dict", "model_state_dict", "model")

# The original saves the whole `DDPM` module, whose network is the attribute `unet`; DataParallel and `torch.compile`
# put a name of their own before it.
_PREFIXES = re.compile(r"^((unet|module|_orig_mod)\.)+")

# The original numbers its encoder and decoder straight through, blocks and resamplers alike; Diffusers by level.
MODULES = {
    "time_embedding.time_embedding_layer.0": "time_embedding.linear_1",
    "time_embedding.time_embedding_layer.2": "time_embedding.linear_2",
    "pre_conv": "conv_in",
    "encoder.0.res": "down_blocks.0.resnets.0",
    "encoder.1.res": "down_blocks.0.resnets.1",
    "encoder.2": "down_blocks.0.downsamplers.0",
    "encoder.3.res": "down_blocks.1.resnets.0",
    "encoder.4.res": "down_blocks.1.resnets.1",
    "encoder.5": "down_blocks.1.downsamplers.0",
    "encoder.6.res": "down_blocks.2.resnets.0",
    "encoder.6.attention": "down_blocks.2.attentions.0",
    "encoder.7.res": "down_blocks.2.resnets.1",
    "encoder.7.attention": "down_blocks.2.attentions.1",
    "encoder.8": "down_blocks.2.downsamplers.0",
    "encoder.9.res": "down_blocks.3.resnets.0",
    "encoder.9.attention": "down_blocks.3.attentions.0",
    "encoder.10.res": "down_blocks.3.resnets.1",
    "encoder.10.attention": "down_blocks.3.attentions.1",
    "middle_block.res1": "mid_block.resnets.0",
    "middle_block.attn": "mid_block.attentions.0",
    "middle_block.res2": "mid_block.resnets.1",
    "decoder.0.res": "up_blocks.0.resnets.0",
    "decoder.0.attention": "up_blocks.0.attentions.0",
    "decoder.1.res": "up_blocks.0.resnets.1",
    "decoder.1.attention": "up_blocks.0.attentions.1",
    "decoder.2.res": "up_blocks.0.resnets.2",
    "decoder.2.attention": "up_blocks.0.attentions.2",
    "decoder.3": "up_blocks.0.upsamplers.0",
    "decoder.4.res": "up_blocks.1.resnets.0",
    "decoder.4.attention": "up_blocks.1.attentions.0",
    "decoder.5.res": "up_blocks.1.resnets.1",
    "decoder.5.attention": "up_blocks.1.attentions.1",
    "decoder.6.res": "up_blocks.1.resnets.2",
    "decoder.6.attention": "up_blocks.1.attentions.2",
    "decoder.7": "up_blocks.1.upsamplers.0",
    "decoder.8.res": "up_blocks.2.resnets.0",
    "decoder.9.res": "up_blocks.2.resnets.1",
    "decoder.10.res": "up_blocks.2.resnets.2",
    "decoder.11": "up_blocks.2.upsamplers.0",
    "decoder.12.res": "up_blocks.3.resnets.0",
    "decoder.13.res": "up_blocks.3.resnets.1",
    "decoder.14.res": "up_blocks.3.resnets.2",
    "final_conv.0": "conv_norm_out",
    "final_conv.2": "conv_out",
}

# Inside a residual block and an attention block; the resamplers and the other modules keep their names.
LAYERS = {
    "time_embedding.1": "time_emb_proj",
    "block1.0": "norm1",
    "block1.2": "conv1",
    "block2.0": "norm2",
    "block2.3": "conv2",
    "shortcut": "conv_shortcut",
    "conv": "conv",
    "output": "to_out.0",
}

QKV = "projection"  # one Linear C → 3C; its rows are query, key, value, in this order

# Every attention block of the original owns a GroupNorm that its forward pass never calls: no gradient, no effect.
DROPPED = tuple(f"{module}.norm" for module in MODULES if module.endswith((".attention", ".attn")))

_LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"


def convert_state_dict(original: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    r"""
    Rename the tensors of the original's `DDPM.state_dict()` to those of [`AnimeFaceUNet2DModel`].

    No value is computed, cast or copied: the queries, keys and values are views of the original's joint projection.

    Args:
        original (`Mapping[str, torch.Tensor]`):
            The 338 tensors, named as the original names them (`unet.…`), also without that prefix or with those of
            wrappers (`module.unet.…`).

    Returns:
        `dict[str, torch.Tensor]`: 360 tensors under our names, for `load_state_dict(..., strict=True)`.

    Raises:
        `KeyError`: a name that is in none of the tables; the name is the error's argument.

    Example:

    ```py
    >>> unet = AnimeFaceUNet2DModel()
    >>> unet.load_state_dict(convert_state_dict(original_state_dict), strict=True)
    ```
    """
    converted = {}
    for name, tensor in original.items():
        path, _, kind = bare_name(name).rpartition(".")  # kind is "weight" or "bias"
        if path in DROPPED:
            continue
        if path in MODULES:
            converted[f"{MODULES[path]}.{kind}"] = tensor
            continue
        module = next((module for module in MODULES if path.startswith(module + ".")), None)
        layer = path.removeprefix(f"{module}.")
        if module is not None and layer == QKV:
            for part, rows in zip(("to_q", "to_k", "to_v"), tensor.chunk(3)):
                converted[f"{MODULES[module]}.{part}.{kind}"] = rows
        elif module is not None and layer in LAYERS:
            converted[f"{MODULES[module]}.{LAYERS[layer]}.{kind}"] = tensor
        else:
            raise KeyError(name)
    return converted


def bare_name(name: str) -> str:
    """The name of a tensor inside the original's network: `module.unet.pre_conv.bias` → `pre_conv.bias`."""
    return _PREFIXES.sub("", name)


def original_shapes(unet: AnimeFaceUNet2DModel) -> dict[str, tuple[int, ...]]:
    """Bare name → shape of every tensor that the original has for a network like `unet`: the tables read backwards."""
    ours = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    shapes = {}
    for module, layer in itertools.product(MODULES, ("", *LAYERS, QKV)):
        for kind in ("weight", "bias"):
            name = ".".join(filter(None, (module, layer, kind)))
            new_layer = "to_q" if layer == QKV else LAYERS.get(layer)
            new_name = ".".join(filter(None, (MODULES[module], new_layer, kind)))
            if new_name in ours:
                rows, *rest = ours[new_name]
                shapes[name] = (3 * rows if layer == QKV else rows, *rest)
    return shapes


# ---- reading: nothing in the file is ever run ----


def read_checkpoint(path: str | os.PathLike) -> Any:
    r"""
    Read what `torch.save` (both its formats) or safetensors wrote, memory-mapped where the format allows.

    Args:
        path (`str` or `os.PathLike`): The file. Its first bytes tell the format, not its name.

    Returns:
        What was saved, usually a dictionary; tensors are on the CPU, wherever they were saved from.

    Raises:
        `BadInput`: no checkpoint, a truncated one, or a pickle that asks for anything but tensors.

    Example:

    ```py
    >>> from animeface_pipeline.conversion import read_checkpoint

    >>> read_checkpoint("ddpm-model-45.ckpt")["unet.pre_conv.weight"].shape
    torch.Size([64, 3, 3, 3])
    ```
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(len(_LFS_POINTER))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}): give the checkpoint file") from error
    if not head:
        raise BadInput(f"{path}: is empty: fetch or copy it again")
    if head == _LFS_POINTER:
        raise BadInput(
            f"{path}: is a Git LFS pointer, not the weights: run `git lfs install` and `git lfs pull` in the clone, or"
            f" download {PUBLISHED_NAME} (675,729,362 bytes) from the repository's page"
        )
    is_zip, is_pickle, is_safetensors = head[:4] == b"PK\x03\x04", head[:1] == b"\x80", head[8:9] == b"{"
    if not (is_zip or is_pickle or is_safetensors):
        raise BadInput(f"{path}: begins with {head[:8]!r}: neither a torch checkpoint nor a safetensors file")
    try:
        return load_file(path) if is_safetensors else _torch_load(path, is_zip)
    except BadInput:
        raise
    except Exception as error:  # whatever a damaged file makes a reader raise
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise BadInput(
                f"{path}: asks for {named[1]}, which is no tensor: refused, nothing in it was run; if the file is"
                " yours, save the state dict alone: torch.save(model.state_dict(), path)"
            ) from error
        raise BadInput(
            f"{path}: is truncated, damaged, or holds more than tensors (of which nothing was run): fetch it again"
        ) from error


def _torch_load(path: Path, is_zip: bool) -> Any:
    mmap = False  # the older format cannot be mapped
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        names = [entry.filename.rpartition("/")[2] for entry in entries]
        if "data.pkl" not in names or "constants.pkl" in names:  # TorchScript, which is a program, has both
            raise BadInput(f"{path}: is a zip archive, but none that torch.save wrote (it holds {_some(names)})")
        mmap = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    with warnings.catch_warnings(action="ignore"):  # of other pickle protocols
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


# ---- choosing and checking: exactly the tensors that the network needs ----


def find_state_dict(content: Any, place: str = "") -> tuple[Mapping[str, Any], str]:
    """The first mapping that holds tensors named as the original's, and its place in the file (`"ema.model"`)."""
    if isinstance(content, Mapping):
        names = [bare_name(str(name)) for name, value in content.items() if isinstance(value, torch.Tensor)]
        if any(name.startswith(tuple(f"{module}." for module in MODULES)) for name in names):
            return content, place
        for entry in ENTRIES:
            found = find_state_dict(content.get(entry), f"{place}.{entry}".lstrip("."))
            if found[0]:
                return found
    return {}, ""


def select_tensors(
    state_dict: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], shown_as: str | os.PathLike
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    r"""
    Split a state dict into what the network needs and what is left out, and refuse one that is not the original's.

    Left out are the norms that the original never applies, and whatever is no weight: values that are not tensors,
    single numbers (counters, decay rates), and schedule buffers (one number for each timestep).

    Args:
        state_dict (`Mapping[str, Any]`): What the file holds, under its own names.
        shapes (`Mapping[str, tuple[int, ...]]`): What the network needs, from [`original_shapes`].
        shown_as (`str` or `os.PathLike`): The file's name, for errors.

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, Any]]`: the needed tensors, in float32, under their bare names; what
        is left out, under the file's names.

    Raises:
        `BadInput`: tensors are missing, unexpected, misshapen or not finite; at most 10 of each are named.
    """
    needed: dict[str, torch.Tensor] = {}
    left_out: dict[str, Any] = {}
    faults: dict[str, list[str]] = {"missing": [], "unexpected": [], "misshapen": [], "with NaN or infinity": []}
    for name, value in state_dict.items():
        bare = bare_name(str(name))
        if bare in shapes and bare not in needed:
            needed[bare] = value
            if not isinstance(value, torch.Tensor) or tuple(value.shape) != shapes[bare]:
                faults["misshapen"].append(f"{name} {list(getattr(value, 'shape', []))} for {list(shapes[bare])}")
            elif not value.is_floating_point():
                faults["misshapen"].append(f"{name} {value.dtype} for floating point")
            elif not value.float().isfinite().all():
                faults["with NaN or infinity"].append(f"{name}")
        elif _is_dropped(bare) or not _is_weight(value):
            left_out[str(name)] = value
        else:
            faults["unexpected"].append(f"{name}")
    faults["missing"] = [f"unet.{bare}" for bare in shapes if bare not in needed]
    if any(faults.values()):
        listed = "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in faults.items() if names)
        raise BadInput(f"{shown_as}: the tensors are not those of the original's network: {listed}")
    return {bare: value.float().contiguous() for bare, value in needed.items()}, left_out


def _is_dropped(name: str) -> bool:
    return bare_name(name).rpartition(".")[0] in DROPPED


def _is_weight(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() not in (1, NUM_TRAIN_TIMESTEPS)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


# ---- writing: a whole pipeline that has passed its check, or nothing ----


def convert_checkpoint(
    checkpoint: str | os.PathLike, output_dir: str | os.PathLike, variant: str | None = None, **unet_config: Any
) -> None:
    r"""
    Turn a checkpoint of the original into a pipeline with the original's scheduler and value range, and check it.

    Args:
        checkpoint (`str` or `os.PathLike`):
            What the original's training wrote: `DDPM.state_dict()` or the network's own, saved from any device, in any
            precision, by `torch.save` or safetensors, also inside an entry `state_dict`, `model` or `ema`.
        output_dir (`str` or `os.PathLike`): The pipeline's folder; it must not exist yet, or be empty.
        variant (`str`, *optional*): `"fp16"` adds float16 weights beside the float32 ones.
        unet_config (*optional*):
            Arguments of [`AnimeFaceUNet2DModel`] for a changed original of the same depth, e.g. `sample_size=128`.

    Raises:
        `BadInput`: the file is no checkpoint or of another network, or the folder cannot be written. Nothing is left
        behind then.

    Example:

    ```py
    >>> from animeface_pipeline.conversion import convert_checkpoint

    >>> convert_checkpoint("ddpm-model-45.ckpt", "anime-faces", variant="fp16")
    ```
    """
    if variant not in DTYPES:
        raise BadInput(f"variant {variant!r}: must be 'fp16' or None")
    checkpoint, output_dir = Path(checkpoint), Path(output_dir).resolve()
    _check_output(output_dir)
    variants = [None] if variant is None else [None, variant]

    unet = _read_network(checkpoint, unet_config)
    size = sum(unet.num_parameters() * DTYPES[variant].itemsize for variant in variants)
    with whole_or_not_at_all(output_dir, size) as folder:
        pipe = AnimeFacePipeline(unet, original_scheduler())
        pipe.save_pretrained(folder, card=render_card(pipe, TrainingSummary(converted_from=checkpoint.name)))
        if variant is not None:
            _save_variant(unet, folder / "unet", variant)
        del pipe, unet  # the check needs their memory
        for name in variants:
            _check_pipeline(folder, name)
        digests = {file.name: sha256(file) for file in sorted(folder.glob("unet/*.safetensors"))}
    print("checked: loaded again, one forward pass, all values finite")
    for name, digest in digests.items():
        print(f"{output_dir / 'unet' / name}: sha256 {digest}")


def _check_output(output_dir: Path) -> None:
    try:
        is_free = not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir()))
    except OSError as error:
        raise BadInput(f"{output_dir}: cannot be used for the output: {_reason(error)}") from error
    if not is_free:
        raise BadInput(f"{output_dir}: exists and is not an empty folder; nothing is overwritten: choose another one")


@contextmanager
def whole_or_not_at_all(output_dir: Path, size: int) -> Iterator[Path]:
    """A new folder on the same disk, with room for `size` bytes, that becomes `output_dir` if the block ends well."""
    existing = next(parent for parent in output_dir.parents if parent.exists())
    if (free := shutil.disk_usage(existing).free) < size:
        raise BadInput(f"{output_dir}: {size:,} bytes are needed, {free:,} are free: make room or choose another disk")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{output_dir.name}.", dir=existing) as private_folder:
            folder = Path(private_folder, "pipeline")  # that one is open to its maker alone; this one as any folder
            folder.mkdir()
            yield folder
            output_dir.parent.mkdir(parents=True, exist_ok=True)
            if output_dir.exists():
                output_dir.rmdir()  # it is empty; Windows moves a folder to a free name only
            os.replace(folder, output_dir)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{output_dir}: cannot be written, and nothing was: {_reason(error)}") from error


def _read_network(checkpoint: Path, unet_config: Mapping[str, Any]) -> AnimeFaceUNet2DModel:
    """The network with the file's weights, still memory-mapped where that is possible; prints what the file holds."""
    content = read_checkpoint(checkpoint)
    state_dict, place = find_state_dict(content)
    if not state_dict:
        raise BadInput(
            f"{checkpoint}: is of another network: no tensor in it, at the top or under {', '.join(ENTRIES)}, is named"
            " as the original's are (unet.pre_conv.weight, …)"
        )
    with torch.device("meta"):
        unet = AnimeFaceUNet2DModel(**unet_config).eval()
    tensors, left_out = select_tensors(state_dict, original_shapes(unet), shown_as=checkpoint)
    unet.load_state_dict(convert_state_dict(tensors), strict=True, assign=True)

    norms = {name: value for name, value in left_out.items() if _is_dropped(name) and isinstance(value, torch.Tensor)}
    others = [name for name in left_out if name not in norms]
    converted, unused = unet.num_parameters(), sum(norm.numel() for norm in norms.values())
    digest = sha256(checkpoint)
    print(f"{checkpoint}: {checkpoint.stat().st_size:,} bytes, sha256 {digest}")
    print(f"  {'is' if digest == PUBLISHED_SHA256 else 'is not'} the published {PUBLISHED_NAME}")
    print(f"  {converted + unused:,} parameters{place and f' in the entry {place}'}, {converted:,} are converted")
    if norms:
        print(f"  {unused:,} are left out, the original never applies them:")
        print(textwrap.indent(textwrap.fill(", ".join(norms), 110), "    "))
    if others:
        print(f"  left out as well, no weights of the network: {', '.join(others)}")
    _warn_of_another_schedule(left_out)
    return unet


def _warn_of_another_schedule(left_out: Mapping[str, Any]) -> None:
    betas = original_scheduler().betas
    for name, value in left_out.items():
        is_beta = name.rpartition(".")[2] in ("beta", "betas") and isinstance(value, torch.Tensor)
        if is_beta and value.numel() == len(betas) and not torch.allclose(value.flatten().float(), betas, atol=1e-6):
            print(
                f"warning: {name} is not the original's linear schedule, which the pipeline gets: sample with"
                " DDPMScheduler(trained_betas=…) of these values",
                file=sys.stderr,
            )


def _save_variant(unet: AnimeFaceUNet2DModel, folder: Path, variant: str) -> None:
    for weight in unet.parameters():  # `unet.to(dtype)` would warn of modules to be kept in float32: there are none
        weight.data = weight.data.to(DTYPES[variant])
    if broken := [name for name, weight in unet.named_parameters() if not weight.isfinite().all()]:
        raise BadInput(f"--variant {variant}: {len(broken)} tensors exceed its range: {_some(broken)}")
    unet.save_pretrained(folder, variant=variant)


@torch.no_grad()
def _check_pipeline(folder: Path, variant: str | None) -> None:
    """Load what was written, as a user will, and predict once."""
    pipe = AnimeFacePipeline.from_pretrained(folder, variant=variant, torch_dtype=DTYPES[variant])
    config = pipe.unet.config
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(pipe.unet.dtype)
    if not pipe.unet(noise, timestep=500).sample.isfinite().all():
        raise BadInput(
            f"the prediction in {DTYPES[variant]} is not finite, nothing was written: the weights are damaged"
        )


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
