"""The noise-prediction network: a UNet over 64×64 pictures, built from Diffusers' own layers.

This file stands alone (it imports torch, safetensors and diffusers only), because it is uploaded as it is beside the
weights, so that someone who has only Diffusers can load them.
"""

import json
import os
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.upsampling import Upsample2D
from safetensors import SafetensorError, safe_open
from torch import nn

# Read when the file is imported: the copy that remote code runs from may be overwritten by the next repository.
_SOURCE = Path(__file__).read_text(encoding="utf-8")

OUTPUT_NORM_GROUPS = 8  # the original normalises before its last convolution in 8 groups, everywhere else in 32


class AnimeFaceUNet2DModel(ModelMixin, AttentionMixin, ConfigMixin):
    r"""
    A 2D UNet that takes a noisy sample and a timestep and returns a sample-shaped prediction.

    With its defaults it is the network of KawaiiDDPM-PyTorch, weight for weight (168,885,955 parameters): Ho et al.
    2020 (https://huggingface.co/papers/2006.11239), appendix B, with single-head self-attention as wide as the
    channels, transposed convolutions, and decoder levels whose last block already narrows to the next level's width.

    Parameters:
        sample_size (`int`, *optional*, defaults to `64`):
            Height and width of the samples in pixels; a multiple of `2 ** (len(block_out_channels) - 1)`.
        in_channels (`int`, *optional*, defaults to `3`): Channels of the input sample.
        out_channels (`int`, *optional*, defaults to `3`): Channels of the prediction.
        block_out_channels (`tuple[int, ...]`, *optional*, defaults to `(64, 128, 256, 1024)`):
            Channels of each level, finest first; multiples of `norm_num_groups`, the first one also of 8. The time
            embedding has `4 * block_out_channels[0]` channels.
        attention_levels (`tuple[bool, ...]`, *optional*, defaults to `(False, False, True, True)`):
            Which levels have self-attention after each residual block. The middle has it when the last level has.
        layers_per_block (`int`, *optional*, defaults to `2`):
            Residual blocks of a level on the way down; the way up has one more.
        norm_num_groups (`int`, *optional*, defaults to `32`): Groups of every normalisation but the output's (8).
        dropout (`float`, *optional*, defaults to `0.1`): Dropout inside the residual blocks, 0 <= dropout < 1.
        attention_norm (`bool`, *optional*, defaults to `False`):
            Whether self-attention normalises its input, as Ho et al. do and the original forgot to.

    Raises:
        `ValueError`: a config that cannot work; the message names the entry and the rule.

    Example:

    ```py
    >>> import torch
    >>> from animeface_pipeline import AnimeFaceUNet2DModel

    >>> unet = AnimeFaceUNet2DModel(sample_size=32, block_out_channels=(32, 64), attention_levels=(False, True))
    >>> unet(torch.randn(4, 3, 32, 32), timestep=999).sample.shape
    torch.Size([4, 3, 32, 32])
    ```
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock2D", "Attention"]
    _repeated_blocks = ["ResnetBlock2D", "Attention"]  # for `compile_repeated_blocks`
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (64, 128, 256, 1024),
        attention_levels: tuple[bool, ...] = (False, False, True, True),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        dropout: float = 0.1,
        attention_norm: bool = False,
    ):
        super().__init__()
        _check_config(dict(self.config))
        widths = tuple(block_out_channels)
        temb_channels = 4 * widths[0]
        shared: dict[str, Any] = {
            "temb_channels": temb_channels,
            "groups": norm_num_groups,
            "dropout": dropout,
            "attention_norm": attention_norm,
        }

        # 1. time: sinusoids of the timestep (Vaswani et al. 2017, section 3.5; sines first), then two linear layers
        self.time_proj = Timesteps(widths[0], flip_sin_to_cos=False, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(widths[0], temb_channels)

        # 2. down: every hidden state that the way up will need is noted in `skip_widths`, in the order of `forward`
        self.conv_in = nn.Conv2d(in_channels, widths[0], kernel_size=3, padding=1)
        self.down_blocks = nn.ModuleList()
        skip_widths, width = [widths[0]], widths[0]
        for level, level_width in enumerate(widths):
            in_out = list(zip([width] + [level_width] * (layers_per_block - 1), [level_width] * layers_per_block))
            is_last = level == len(widths) - 1
            self.down_blocks.append(DownBlock2D(in_out, attention_levels[level], downsample=not is_last, **shared))
            skip_widths += [level_width] * (layers_per_block + (not is_last))
            width = level_width

        # 3. middle: residual, attention, residual
        self.mid_block = MidBlock2D([(width, width)] * 2, attention_levels[-1], **shared)

        # 4. up: each residual block is fed the concatenation with one skip; the last one of a level already narrows
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            in_out = []
            for out_width in [widths[level]] * layers_per_block + [widths[max(level - 1, 0)]]:
                in_out.append((width + skip_widths.pop(), out_width))
                width = out_width
            self.up_blocks.append(UpBlock2D(in_out, attention_levels[level], upsample=level > 0, **shared))

        # 5. out
        self.conv_norm_out = nn.GroupNorm(OUTPUT_NORM_GROUPS, widths[0])
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(widths[0], out_channels, kernel_size=3, padding=1)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, return_dict: bool = True
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        r"""
        Predict the noise in `sample` (or what `prediction_type` of the scheduler says).

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`):
                The noisy sample x_t; height and width are multiples of `2 ** (len(block_out_channels) - 1)`.
            timestep (`torch.Tensor`, `float` or `int`):
                The timestep t of every sample: a number, a 0-d tensor, or a tensor of shape `(batch_size,)`.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`~models.unets.unet_2d.UNet2DOutput`] instead of a plain tuple.

        Returns:
            [`~models.unets.unet_2d.UNet2DOutput`] or `tuple`: the prediction, of shape `(batch_size, out_channels,
            height, width)`, as `.sample` or as the tuple's only element.

        Raises:
            `ValueError`: a sample or timestep of a shape that does not fit.
        """
        halvings = 2 ** (len(self.down_blocks) - 1)
        channels = self.config.in_channels
        if sample.ndim != 4 or sample.shape[1] != channels or any(size % halvings for size in sample.shape[2:]):
            raise ValueError(
                f"sample has the shape {tuple(sample.shape)}: expected (batch_size, {channels}, height, width) with"
                f" height and width multiples of {halvings}"
            )
        timesteps = torch.as_tensor(timestep, device=sample.device)
        if timesteps.ndim > 1 or timesteps.numel() not in (1, sample.shape[0]):
            raise ValueError(
                f"timestep has the shape {tuple(timesteps.shape)}: expected a number or ({sample.shape[0]},), one"
                " for each sample"
            )

        # 1. time: (B,) → (B, 256)
        temb = self.time_proj(timesteps.expand(sample.shape[0]))
        temb = self.time_embedding(temb.to(sample.dtype))  # the sinusoids are float32; half weights want half input

        # 2. down: (B, 3, 64, 64) → (B, 1024, 8, 8); every hidden state is pushed as it is made
        hidden_states = self.conv_in(sample)
        skips = [hidden_states]
        for down_block in self.down_blocks:
            hidden_states, outputs = down_block(hidden_states, temb)
            skips.extend(outputs)

        # 3. middle: (B, 1024, 8, 8) → (B, 1024, 8, 8)
        hidden_states = self.mid_block(hidden_states, temb)

        # 4. up: (B, 1024, 8, 8) → (B, 64, 64, 64); the skips are popped, the last one first
        for up_block in self.up_blocks:
            hidden_states = up_block(
                hidden_states, [skips.pop() for _ in range(self.config.layers_per_block + 1)], temb
            )

        # 5. out: (B, 64, 64, 64) → (B, 3, 64, 64)
        prediction = self.conv_out(self.conv_act(self.conv_norm_out(hidden_states)))
        return UNet2DOutput(sample=prediction) if return_dict else (prediction,)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        **kwargs: Any,
    ) -> None:
        """As [`~ModelMixin.save_pretrained`], safetensors only, and this file itself, which remote code needs."""
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write a pickle: this model is saved as safetensors only")
        super().save_pretrained(
            save_directory, is_main_process, variant=variant, max_shard_size=max_shard_size, **kwargs
        )
        if is_main_process:
            Path(save_directory, "unet_animeface.py").write_text(_SOURCE, encoding="utf-8")
            mode = Path(save_directory, "config.json").stat().st_mode
            for file in Path(save_directory).glob("*.safetensors"):
                file.chmod(mode)  # safetensors makes them readable by their maker alone

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """
        As [`~ModelMixin.from_pretrained`], from safetensors only; the weights in a folder must fit its config exactly
        (Diffusers fills what is missing with noise and only warns).

        Raises:
            `OSError`: no such folder, no config, or a weights file that is missing or cannot be read.
            `ValueError`: weights that do not fit the config, or a config that cannot work.
        """
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if folder.is_dir():
            expected = cls.from_config_without_weights(folder).state_dict()
            _check_weights(folder, kwargs.get("variant"), {name: tensor.shape for name, tensor in expected.items()})
        return super().from_pretrained(pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True})

    @classmethod
    def from_config_without_weights(cls, folder: str | os.PathLike) -> "AnimeFaceUNet2DModel":
        """The network that a folder's `config.json` describes, with shapes but no values and no memory (on "meta")."""
        with torch.device("meta"):
            return cls.from_config(cls.load_config(folder))

    def to_json_string(self) -> str:
        """The config as JSON, without the path that it was loaded from."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


class ResnetBlocks2D(nn.Module):
    """What the three kinds of block share: residual blocks, and self-attentions of the given widths."""

    def __init__(
        self,
        in_out: list[tuple[int, int]],
        attention_widths: list[int],
        temb_channels: int,
        groups: int,
        dropout: float,
        attention_norm: bool,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Any = None  # set by `enable_gradient_checkpointing`
        self.resnets = nn.ModuleList(
            ResnetBlock2D(
                in_channels=in_width,
                out_channels=out_width,
                temb_channels=temb_channels,
                groups=groups,
                dropout=dropout,
                eps=1e-5,
            )
            for in_width, out_width in in_out
        )
        # one head as wide as the channels; the original has a norm before it that it never applies
        self.attentions = nn.ModuleList(
            Attention(
                width,
                heads=1,
                dim_head=width,
                bias=True,
                residual_connection=True,
                norm_num_groups=groups if attention_norm else None,
            )
            for width in attention_widths
        )

    def run(self, layer: nn.Module, *args: torch.Tensor) -> torch.Tensor:
        """Call `layer`, keeping its activations or (with gradient checkpointing) making them again when needed."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(layer, *args)
        return layer(*args)


class DownBlock2D(ResnetBlocks2D):
    """A level on the way down: residual blocks, then a strided convolution except on the last level."""

    def __init__(self, in_out: list[tuple[int, int]], attention: bool, downsample: bool, **kwargs: Any) -> None:
        super().__init__(in_out, [width for _, width in in_out if attention], **kwargs)
        width = in_out[-1][1]
        self.downsamplers = nn.ModuleList([Downsample2D(width, use_conv=True, name="op")] if downsample else [])

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        outputs = []
        for resnet, attention in zip_longest(self.resnets, self.attentions):
            hidden_states = self.run(resnet, hidden_states, temb)
            if attention is not None:
                hidden_states = self.run(attention, hidden_states)
            outputs.append(hidden_states)
        for downsampler in self.downsamplers:
            hidden_states = downsampler(hidden_states)
            outputs.append(hidden_states)
        return hidden_states, outputs


class MidBlock2D(ResnetBlocks2D):
    """The deepest block: residual, attention, residual."""

    def __init__(self, in_out: list[tuple[int, int]], attention: bool, **kwargs: Any) -> None:
        super().__init__(in_out, [in_out[0][1]] if attention else [], **kwargs)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        hidden_states = self.run(self.resnets[0], hidden_states, temb)
        for attention in self.attentions:
            hidden_states = self.run(attention, hidden_states)
        return self.run(self.resnets[1], hidden_states, temb)


class UpBlock2D(ResnetBlocks2D):
    """A level on the way up: residual blocks, each fed a skip, then a transposed convolution except on the last."""

    def __init__(self, in_out: list[tuple[int, int]], attention: bool, upsample: bool, **kwargs: Any) -> None:
        super().__init__(in_out, [width for _, width in in_out if attention], **kwargs)
        width = in_out[-1][1]
        self.upsamplers = nn.ModuleList([Upsample2D(width, use_conv_transpose=True)] if upsample else [])

    def forward(self, hidden_states: torch.Tensor, skips: list[torch.Tensor], temb: torch.Tensor) -> torch.Tensor:
        for resnet, attention, skip in zip_longest(self.resnets, self.attentions, skips):
            hidden_states = self.run(resnet, torch.cat([hidden_states, skip], dim=1), temb)
            if attention is not None:
                hidden_states = self.run(attention, hidden_states)
        for upsampler in self.upsamplers:
            hidden_states = upsampler(hidden_states)
        return hidden_states


def _check_weights(folder: Path, variant: str | None, expected: Mapping[str, torch.Size]) -> None:
    """Compare the header of the weights file with the network; raise one error that names what is wrong."""
    file = folder / f"diffusion_pytorch_model{'.' + variant if variant else ''}.safetensors"
    if any(folder.glob("*.safetensors.index*.json")):
        return  # in several files: left to Diffusers
    if not file.is_file():
        raise OSError(f"{file}: no such weights file (only safetensors are loaded)")
    try:
        with safe_open(file, framework="pt") as weights:
            names = weights.keys()  # no mapping: it can only be asked for its keys
            found = {name: torch.Size(weights.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise OSError(f"{file}: truncated, or not a safetensors file ({error})") from error
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [name for name in expected if name in found and found[name] != expected[name]],
    }
    for problem, names in problems.items():
        if names:
            shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
            raise ValueError(f"{file}: the weights do not fit config.json, {problem}: {shown}")


def _check_config(config: Mapping[str, Any]) -> None:
    """Raise a `ValueError` that names the entry and the rule if the network cannot be built or run."""

    def require(holds: bool, entry: str, rule: str) -> None:
        if not holds:
            raise ValueError(f"{entry}={config[entry]!r}: {rule}")

    def is_count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1

    for entry in ("sample_size", "in_channels", "out_channels", "layers_per_block", "norm_num_groups"):
        require(is_count(config[entry]), entry, "must be a whole number of at least 1")
    for entry in ("block_out_channels", "attention_levels"):
        rule = "must be a list with one entry for each level, at least one"
        require(isinstance(config[entry], (list, tuple)) and len(config[entry]) > 0, entry, rule)
    widths, groups, levels = config["block_out_channels"], config["norm_num_groups"], len(config["block_out_channels"])
    require(all(map(is_count, widths)), "block_out_channels", "every entry must be a whole number of at least 1")
    rule = f"every entry must be divisible by norm_num_groups={groups}"
    require(all(width % groups == 0 for width in widths), "block_out_channels", rule)
    rule = f"the first entry must be divisible by {OUTPUT_NORM_GROUPS}, the groups of the output's normalisation"
    require(widths[0] % OUTPUT_NORM_GROUPS == 0, "block_out_channels", rule)
    attention = config["attention_levels"]
    rule = f"must have as many entries as block_out_channels, {levels}"
    require(len(attention) == levels, "attention_levels", rule)
    are_bools = all(isinstance(entry, bool) for entry in attention)
    require(are_bools, "attention_levels", "every entry must be true or false")
    rule = f"must be divisible by {2 ** (levels - 1)}, because {levels} levels halve it {levels - 1} times"
    require(config["sample_size"] % 2 ** (levels - 1) == 0, "sample_size", rule)
    dropout = config["dropout"]
    is_share = isinstance(dropout, (int, float)) and not isinstance(dropout, bool) and 0 <= dropout < 1
    require(is_share, "dropout", "must be a number with 0 <= dropout < 1")
    require(isinstance(config["attention_norm"], bool), "attention_norm", "must be true or false")
