"""The original's state dict → ours: a table of modules, a table of layers, and the tensors that are left out.

```py
>>> from animeface_pipeline import AnimeFaceUNet2DModel
>>> from animeface_pipeline.conversion import convert_state_dict

>>> unet = AnimeFaceUNet2DModel()
>>> unet.load_state_dict(convert_state_dict(original_state_dict), strict=True)
```
"""

from collections.abc import Mapping

import torch

PREFIX = "unet."  # the original saves the whole `DDPM` module, whose network is the attribute `unet`

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


def convert_state_dict(original: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    r"""
    Rename the tensors of the original's `DDPM.state_dict()` to those of [`AnimeFaceUNet2DModel`].

    No value is computed, cast or copied: the queries, keys and values are views of the original's joint projection.

    Args:
        original (`Mapping[str, torch.Tensor]`): the 338 tensors, named as the original names them (`unet.…`).

    Returns:
        `dict[str, torch.Tensor]`: 360 tensors under our names, for `load_state_dict(..., strict=True)`.

    Raises:
        `KeyError`: a name that is in none of the tables; the name is the error's argument.
    """
    converted = {}
    for name, tensor in original.items():
        path, _, kind = name.removeprefix(PREFIX).rpartition(".")  # kind is "weight" or "bias"
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
