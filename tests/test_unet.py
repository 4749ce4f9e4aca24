import copy

import pytest
import torch
from conftest import TINY, tiny_unet
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from animeface_pipeline import AnimeFaceUNet2DModel

OTHER_NETWORKS = {
    "32 pixels": {"sample_size": 32, "block_out_channels": (16, 32), "norm_num_groups": 8},
    "96 pixels, three levels": {
        "sample_size": 96,
        "block_out_channels": (8, 16, 24),
        "attention_levels": (False, False, True),
    },
    "128 pixels, five levels": {
        "sample_size": 128,
        "block_out_channels": (8, 8, 16, 16, 32),
        "attention_levels": (False,) * 4 + (True,),
    },
    "no attention at all": {"attention_levels": (False, False)},
    "attention everywhere": {"attention_levels": (True, True)},
    "attention with its norm": {"attention_levels": (False, True), "attention_norm": True},
    "three layers per block": {"layers_per_block": 3},
    "one level": {"block_out_channels": (16,), "attention_levels": (True,)},
    "grey pictures": {"in_channels": 1, "out_channels": 1},
}


@pytest.mark.parametrize("overrides", OTHER_NETWORKS.values(), ids=OTHER_NETWORKS.keys())
def test_other_sizes_work_through_the_config_and_every_parameter_learns(overrides: dict) -> None:
    unet = tiny_unet(**overrides)
    channels, size = unet.config.in_channels, unet.config.sample_size
    prediction = unet(torch.randn(2, channels, size, size), torch.tensor([0, 999])).sample
    assert prediction.shape == (2, channels, size, size)
    prediction.square().mean().backward()
    assert [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()] == []


BAD_CONFIGS = [
    ({"block_out_channels": (8, 20)}, "block_out_channels.*divisible by norm_num_groups=8"),
    ({"block_out_channels": (12, 16), "norm_num_groups": 4}, "block_out_channels.*first entry.*divisible by 8"),
    ({"block_out_channels": (8, 0)}, "block_out_channels.*whole number of at least 1"),
    ({"block_out_channels": (8, 16.0)}, "block_out_channels.*whole number of at least 1"),
    ({"block_out_channels": (), "attention_levels": ()}, "block_out_channels.*at least one"),
    ({"block_out_channels": 8}, "block_out_channels.*list"),
    ({"block_out_channels": None}, "block_out_channels.*list"),
    ({"attention_levels": (False,)}, "attention_levels.*as many entries as block_out_channels, 2"),
    ({"attention_levels": (False, "yes")}, "attention_levels.*true or false"),
    ({"sample_size": 15}, "sample_size=15.*divisible by 2"),
    ({"sample_size": 0}, "sample_size=0.*whole number"),
    ({"sample_size": (16, 16)}, "sample_size.*whole number"),
    ({"in_channels": 0}, "in_channels=0.*whole number"),
    ({"out_channels": -3}, "out_channels=-3.*whole number"),
    ({"layers_per_block": 0}, "layers_per_block=0.*whole number"),
    ({"layers_per_block": True}, "layers_per_block=True.*whole number"),
    ({"norm_num_groups": 0}, "norm_num_groups=0.*whole number"),
    ({"attention_norm": 1}, "attention_norm=1.*true or false"),
    ({"dropout": 1}, "dropout=1.*0 <= dropout < 1"),
    ({"dropout": -0.1}, "dropout=-0.1.*0 <= dropout < 1"),
    ({"dropout": float("nan")}, "dropout=nan.*0 <= dropout < 1"),
    ({"dropout": "0.1"}, "dropout='0.1'.*0 <= dropout < 1"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD_CONFIGS, ids=lambda value: str(value)[:50])
def test_a_config_that_cannot_work_is_refused(overrides: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnimeFaceUNet2DModel(**{**TINY, **overrides})


@torch.no_grad()
def test_timestep_as_number_scalar_or_one_per_sample() -> None:
    unet, sample = tiny_unet(), torch.randn(2, 3, 16, 16)
    expected = unet(sample, 7).sample
    for timestep in (7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7])):
        assert torch.equal(unet(sample, timestep).sample, expected)
    assert torch.equal(unet(sample, 7, return_dict=False)[0], expected)
    other = unet(sample, torch.tensor([7, 500])).sample
    torch.testing.assert_close(other[0], expected[0])  # another batch may sum in another order
    assert not torch.allclose(other[1], expected[1])


def test_shapes_that_do_not_fit_are_refused() -> None:
    unet = tiny_unet()
    with pytest.raises(ValueError, match=r"sample has the shape \(1, 4, 16, 16\)"):
        unet(torch.zeros(1, 4, 16, 16), 0)
    with pytest.raises(ValueError, match="multiples of 2"):
        unet(torch.zeros(1, 3, 15, 15), 0)
    with pytest.raises(ValueError, match=r"timestep has the shape \(3,\)"):
        unet(torch.zeros(2, 3, 16, 16), torch.tensor([1, 2, 3]))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    plain = tiny_unet(dropout=0.0).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.enable_gradient_checkpointing()
    assert checkpointed.is_gradient_checkpointing
    sample = torch.randn(2, 3, 16, 16)
    for unet in (plain, checkpointed):
        unet(sample, 10).sample.square().mean().backward()
    for (name, one), two in zip(plain.named_parameters(), checkpointed.parameters()):
        assert torch.equal(one.grad, two.grad), name


@torch.no_grad()
def test_attention_processors() -> None:
    unet, sample = tiny_unet(attention_levels=(True, True)), torch.randn(2, 3, 16, 16)
    expected = unet(sample, 7).sample
    assert len(unet.attn_processors) == 2 * (1 + 2) + 1  # down 1, up 2 per level; one in the middle
    assert {type(processor) for processor in unet.attn_processors.values()} == {AttnProcessor2_0}
    unet.set_attn_processor(AttnProcessor())
    torch.testing.assert_close(unet(sample, 7).sample, expected)
    unet.fuse_qkv_projections()
    torch.testing.assert_close(unet(sample, 7).sample, expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    unet, sample = tiny_unet(), torch.randn(2, 3, 16, 16)
    expected = unet(sample, 500).sample
    prediction = unet.to(dtype)(sample.to(dtype), 500).sample
    assert prediction.dtype == dtype
    assert (prediction.float() - expected).abs().max() < 0.05
