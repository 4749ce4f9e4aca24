import argparse
import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    monkeypatch.syspath_prepend(str(FOLDER))  # it imports its neighbours
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    tf32 = torch.backends.cuda.matmul.allow_tf32
    yield runpy.run_path(str(FOLDER / "speed.py"))
    torch.backends.cuda.matmul.allow_tf32 = tf32


@pytest.fixture
def measure(
    benchmark: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    def run(*flags: str) -> dict[str, Any]:
        file = tmp_path / "result.json"
        words = [
            "speed.py",
            *flags,
            "--tiny",
            "--device=cpu",
            "--batch_size=2",
            "--repeats=2",
            f"--output_file={file}",
        ]
        monkeypatch.setattr(sys, "argv", words)
        benchmark["main"]()
        return json.loads(file.read_text(encoding="utf-8"))

    return run


@pytest.mark.parametrize("table", ["forward", "training"])
def test_every_variant_that_a_cpu_can_run_has_a_row(
    table: str, benchmark: dict[str, Any], measure: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture
) -> None:
    result = measure(table)
    not_here = "compiled|graphs|autotuned|TF32|on the CPU"
    wanted = [name for name in benchmark["VARIANTS"][table] if not re.search(not_here, name)]
    assert list(result["rows"]) == wanted and wanted[0] == "as the original" and "ours, bf16, channels last" in wanted
    first = result["rows"]["as the original"]
    said = capsys.readouterr().out
    for name, row in result["rows"].items():
        assert f"| {name} | {row['median_s']} |" in said
        assert 0 < row["least_s"] <= row["median_s"] <= row["most_s"]
        assert row["pictures_per_second"] == pytest.approx(2 / row["median_s"], rel=0.05)
        assert row["times_first"] == pytest.approx(first["median_s"] / row["median_s"], rel=0.3, abs=0.02)
    assert result["roof"]["float32_tflops"] > 0 and result["roof"]["copy_gb_per_second"] > 0
    assert result["versions"]["torch"] == torch.__version__ and result["command"].startswith("python speed.py")


def test_all_ways_of_sampling(measure: Callable[..., dict[str, Any]]) -> None:
    rows = measure("sampling", "--num_inference_steps", "4", "2")["rows"]
    ours = "ours, channels last"
    assert list(rows) == [
        "as the original, ddpm, 4 steps",
        *(f"{ours}, {solver} steps" for solver in ("ddpm, 4", "unipc, 2", "dpmsolver++, 2")),
    ]


@pytest.mark.parametrize("loop", ["original", "diffusers", "ours"])
def test_an_update_of_each_loop_changes_the_weights(loop: str, benchmark: dict[str, Any]) -> None:
    args = argparse.Namespace(tiny=True, size=16, batch_size=2, device="cpu")
    variant = benchmark["Variant"](loop)
    unet = benchmark["build_network"](variant, args)
    before = [tensor.detach().clone() for tensor in unet.parameters()]
    benchmark["build_training"](unet, variant, args)()
    assert not all(torch.equal(old, new) for old, new in zip(before, unet.parameters()))


@pytest.mark.parametrize("kind", ["forward", "training", "data"])
def test_the_peak_is_this_process_s(
    kind: str, benchmark: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ["speed.py", "peak", "--tiny", "--device=cpu", f"--kind={kind}", "--batch_size=128"]
    monkeypatch.setattr(sys, "argv", words)
    benchmark["main"]()
    assert 0.1 < float(capsys.readouterr().out) < 100


@pytest.mark.parametrize("most", [0, 1, 5, 37, 64, 1000])
def test_the_largest_batch_is_found_by_trying(most: int, benchmark: dict[str, Any]) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= most

    found = benchmark["largest"](fits)
    assert most * 7 // 8 - 1 <= found <= most and len(tried) < 20
    assert found == 0 or found in tried


def test_a_variant_that_fails_is_named_and_left_out(benchmark: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError("no memory")

    args = argparse.Namespace(device="cpu", steps=1, repeats=3)
    times = benchmark["in_turn"]({"one": lambda: None, "two": fails, "three": lambda: None}, args)
    assert {name: len(values) for name, values in times.items()} == {"one": 3, "three": 3}
    assert "left out: two: no memory" in capsys.readouterr().err
    with pytest.raises(torch.OutOfMemoryError):
        benchmark["in_turn"]({"one": fails, "two": lambda: None}, args)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--repeats=0"], "--repeats 0: must be at least 1"),
        (["--batch_size=-4"], "--batch_size -4: must be at least 1"),
        (["--device=cuda"], "--device cuda: torch finds no GPU here"),
        (["--memory_limit_gb=8"], "--memory_limit_gb: is of a GPU"),
        (["--output_file=nowhere/x.json"], "its folder is not there"),
    ],
)
def test_bad_input_is_told_before_anything_is_measured(
    flags: list[str],
    said: str,
    benchmark: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["speed.py", "forward", "--tiny", "--device=cpu", *flags])
    with pytest.raises(SystemExit) as ended:
        benchmark["main"]()
    last = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and said in last
