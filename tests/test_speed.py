"""The levers change the speed and nothing else."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_unet
from trainer import TINY_RECIPE, Trainer

from animeface_pipeline import AnimeFacePipeline, AnimeFaceUNet2DModel, speed
from animeface_pipeline.cli import BadInput
from animeface_pipeline.config import parse_args
from animeface_pipeline.schedulers import original_scheduler, switch_scheduler
from animeface_pipeline.speed import FAST, choose_fast_settings, compile_for_sampling, speed_up

WITHOUT_DROPOUT = {**TINY_RECIPE["unet"], "dropout": 0.0}  # its masks depend on the layout in memory


def drawn(pipe: AnimeFacePipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(batch_size=2, generator=generator, num_inference_steps=3, output_type="pt").images


def test_a_faster_pipeline_draws_the_same_pictures() -> None:
    pipe = AnimeFacePipeline(tiny_unet(), original_scheduler())
    before = drawn(pipe)
    assert speed_up(pipe) is pipe
    assert pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert (drawn(pipe) - before).abs().max() < 1e-3
    assert drawn(speed_up(pipe, torch_dtype=torch.bfloat16)).dtype == torch.float32
    assert (drawn(pipe) - before).abs().mean() < 0.02 and pipe.unet.dtype == torch.bfloat16


def test_it_can_be_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda forward, **options: compiled.append(forward) or forward)
    unet = tiny_unet()
    expected = unet.eval()(torch.ones(1, 3, 16, 16), 5).sample
    for _ in range(2):
        compile_for_sampling(unet)
    assert compiled[0] == compiled[1] == AnimeFaceUNet2DModel.forward.__get__(unet)
    assert torch.allclose(unet(torch.ones(1, 3, 16, 16), 5).sample, expected, atol=1e-3)


@pytest.mark.slow  # the compiler takes minutes on a CPU
def test_compiled_for_sampling_it_computes_the_same_and_takes_new_weights_when_compiled_again() -> None:
    pipe = AnimeFacePipeline(tiny_unet(), original_scheduler())
    before, names = drawn(pipe), set(pipe.unet.state_dict())
    assert (drawn(speed_up(pipe, compile_mode="default")) - before).abs().max() < 1e-3
    assert set(pipe.unet.state_dict()) == names
    torch.nn.init.zeros_(pipe.unet.conv_out.weight)
    changed = drawn(AnimeFacePipeline(copy_of(pipe.unet), original_scheduler()))
    assert (drawn(speed_up(pipe, compile_mode="default")) - changed).abs().max() < 1e-3
    assert (changed - before).abs().max() > 0.01


def copy_of(unet: AnimeFaceUNet2DModel) -> AnimeFaceUNet2DModel:
    other = tiny_unet()
    other.load_state_dict(unet.state_dict())
    return other


@pytest.mark.slow  # the compiler takes minutes on a CPU
def test_compiled_training_has_the_same_curve_and_saves_the_same_names(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, unet=WITHOUT_DROPOUT, max_train_steps=4, train_batch_size=5, eval_batch_size=5)
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    assert trainer("--output_dir", plain) == 0
    assert trainer("--output_dir", compiled, "--torch_compile", "default", "--channels_last") == 0
    first, second = ([entry["loss"] for entry in trainer.log(folder)] for folder in (plain, compiled))
    assert first == pytest.approx(second, rel=1e-3)
    names = [set(AnimeFacePipeline.from_pretrained(folder).unet.state_dict()) for folder in (plain, compiled)]
    assert names[0] == names[1]


def test_channels_last_training_has_the_same_curve(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, unet=WITHOUT_DROPOUT, max_train_steps=4)
    plain, fast = tmp_path / "plain", tmp_path / "fast"
    assert trainer("--output_dir", plain) == 0
    assert trainer("--output_dir", fast, "--fast") == 0
    first, second = ([entry["loss"] for entry in trainer.log(folder)] for folder in (plain, fast))
    assert first == pytest.approx(second, rel=1e-4)


def test_fast_is_a_table_and_flags_go_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    for has_triton in (True, False):
        monkeypatch.setattr(speed, "can_compile_on_gpu", lambda has_triton=has_triton: has_triton)
        config = parse_args(["--train_data_dir", "x", "--fast", "--no-channels_last"], description="")
        choose_fast_settings(config)
        assert (config.mixed_precision, config.channels_last) == ("fp16", False)
        assert config.torch_compile == (FAST["cuda"]["torch_compile"] if has_triton else None) and config.allow_tf32


def test_cuda_graphs_and_accumulation_are_refused_together() -> None:
    flags = ["--train_data_dir", "x", "--gradient_accumulation_steps", "2", "--torch_compile"]
    with pytest.raises(BadInput, match=r"--torch_compile reduce-overhead.*max-autotune-no-cudagraphs"):
        parse_args([*flags, "reduce-overhead"], description="")
    assert parse_args([*flags, "default"], description="").torch_compile == "default"


@pytest.mark.parametrize("solver", ["dpmsolver++", "unipc"])
def test_a_solver_keeps_no_memory_of_the_network_that_a_cuda_graph_would_overwrite(
    solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = switch_scheduler(original_scheduler(prediction_type="sample"), solver)
    pipe = AnimeFacePipeline(tiny_unet(), scheduler)
    before, forward, held = drawn(pipe), pipe.unet.forward, torch.empty(2, 3, 16, 16)
    monkeypatch.setattr(pipe.unet, "forward", lambda *args, **kwargs: (held.copy_(forward(*args, **kwargs)[0]),))
    assert torch.equal(drawn(pipe), before)


def test_a_cpu_that_only_imitates_bf16_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    cpu, warning = torch.device("cpu"), "many times slower in it than in float32: add --mixed_precision no"
    for supported in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda supported=supported: supported)
        assert speed.imitates_bf16(cpu) != supported
    assert not speed.imitates_bf16(torch.device("cuda"))
    for precision in ("no", "bf16"):
        assert Trainer(tmp_path / precision, mixed_precision=precision)("--max_train_steps", 1) == 0
        assert (warning in capsys.readouterr().out) == (precision == "bf16")


PAGES = """
import resource, torch
from animeface_pipeline.speed import keep_freed_memory
if {keep}: keep_freed_memory()
for _ in range(3):  # until there is room for it, aligned
    torch.ones(2**26)  # 256 MiB, freed at once
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.ones(2**26)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left as they are")
def test_freed_memory_is_kept_and_not_asked_for_again() -> None:
    def page_faults(keep: bool) -> int:
        code = PAGES.format(keep=keep)
        return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)

    assert page_faults(keep=True) < 50 < page_faults(keep=False)
