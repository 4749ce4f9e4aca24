"""The converter: every layout that the original's weights may come in, and every file that it must refuse.

Most tests use a stand-in of the original's depth and names with narrow layers; the full size stands at the end.
"""

import contextlib
import functools
import hashlib
import os
import pickle
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import FakeHub
from PIL import Image
from reference import GOLDEN_SEED, golden, manifest, reference_state_dict
from safetensors.torch import load_file, save_file

from animeface_pipeline import AnimeFacePipeline, AnimeFaceUNet2DModel, conversion, hub
from animeface_pipeline.cli import BadInput
from animeface_pipeline.conversion import DROPPED, convert_checkpoint, convert_state_dict, original_shapes
from animeface_pipeline.schedulers import original_scheduler

SCRIPT = Path(__file__).parent.parent / "convert_checkpoint.py"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
NARROW = {"sample_size": 16, "block_out_channels": (8, 16, 24, 32), "norm_num_groups": 8}
Tensors = dict[str, torch.Tensor]


def narrow_state_dict(seed: int = 0) -> OrderedDict[str, torch.Tensor]:
    """What the original's `DDPM.state_dict()` would be with narrow layers: all of its 338 names."""
    with torch.device("meta"):
        shapes = original_shapes(AnimeFaceUNet2DModel(**NARROW))
    norms = {f"{path}.{kind}": (16,) for path in DROPPED for kind in ("weight", "bias")}
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"unet.{name}": shape for name, shape in {**shapes, **norms}.items()}
    assert set(shapes) == set(manifest())
    return OrderedDict((name, 0.1 * torch.randn(shapes[name], generator=generator)) for name in manifest())


def full_size_state_dict() -> Tensors:
    """The original's names and shapes in a file of some kilobytes: every tensor is one number, seen many times."""
    return {name: torch.ones(1).expand(shape) for name, shape in manifest().items()}


def saved(content: Any, path: Path, **kwargs: Any) -> Path:
    torch.save(content, path, **kwargs)
    return path


def run(*arguments: object) -> int:
    """The exit code of the command, run in this process."""
    script = runpy.run_path(str(SCRIPT))
    with pytest.raises(SystemExit) as exit:
        script["main"]([str(argument) for argument in arguments])
    return exit.value.code


def assert_refused(capsys: pytest.CaptureFixture, output_dir: Path, *words: str) -> None:
    """One line on stderr with these words, and nothing written: neither the folder nor anything beside it."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: "), error
    for word in words:
        assert word in error
    assert not output_dir.exists()
    assert not list(output_dir.parent.glob(f".{output_dir.name}*"))


# ---- layouts ----


def cuda_tagged(content: Any, path: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        saved(content, path)
    assert b"cuda:0" in path.read_bytes()
    return path


def compressed(content: Any, path: Path) -> Path:
    """As a repacked archive: such a file must not be memory-mapped."""
    stored = saved(content, path.with_suffix(".zip"))
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return path


def as_safetensors(content: Tensors, path: Path) -> Path:
    save_file(content, path)
    return path


def renamed(tensors: Tensors, prefix: str) -> Tensors:
    return {name.replace("unet.", prefix, 1): tensor for name, tensor in tensors.items()}


SCHEDULE = {
    "betas": original_scheduler().betas,
    "alphas_cumprod": original_scheduler().alphas_cumprod,
    "unet.sqrt_alphas_bar": original_scheduler().alphas_cumprod.sqrt(),
    "num_batches": torch.tensor(5),
}

LAYOUTS: dict[str, Callable[[Tensors, Path], Path]] = {
    "the original's": saved,
    "no prefix": lambda tensors, path: saved(renamed(tensors, ""), path),
    "DataParallel": lambda tensors, path: saved(renamed(tensors, "module.unet."), path),
    "DataParallel, the network alone": lambda tensors, path: saved(renamed(tensors, "module."), path),
    "DataParallel inside": lambda tensors, path: saved(renamed(tensors, "unet.module."), path),
    "torch.compile": lambda tensors, path: saved(renamed(tensors, "_orig_mod.unet."), path),
    "state_dict": lambda tensors, path: saved({"state_dict": tensors, "epoch": 45}, path),
    "model": lambda tensors, path: saved({"model": tensors, "optimizer": {"lr": 1e-5}, "loss": 0.1}, path),
    "ema": lambda tensors, path: saved({"ema": tensors, "model": narrow_state_dict(1), "ema_decay": 0.999}, path),
    "model.state_dict": lambda tensors, path: saved({"model": {"state_dict": tensors}, "ema": None}, path),
    "schedule buffers": lambda tensors, path: saved({**tensors, **SCHEDULE}, path),
    "beside other things": lambda tensors, path: saved({**tensors, "epoch": 45, "name": "ddpm"}, path),
    "cuda:0": cuda_tagged,
    "old format": lambda tensors, path: saved(tensors, path, _use_new_zipfile_serialization=False),
    "compressed": compressed,
    "channels_last": lambda tensors, path: saved(
        {name: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for name, t in tensors.items()}, path
    ),
    "safetensors": as_safetensors,
    "safetensors by another name": lambda tensors, path: as_safetensors(tensors, path.with_suffix(".safetensors")),
    "without the unused norms": lambda tensors, path: saved(
        {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0][5:] not in DROPPED}, path
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tensors = narrow_state_dict()
    checkpoint = LAYOUTS[layout](tensors, tmp_path / "model.ckpt")
    convert_checkpoint(checkpoint, tmp_path / "out", **NARROW)
    pipe = AnimeFacePipeline.from_pretrained(tmp_path / "out")
    converted, expected = pipe.unet.state_dict(), convert_state_dict(tensors)
    assert set(converted) == set(expected)
    assert all(torch.equal(converted[name], expected[name]) for name in expected)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in narrow_state_dict().items()}
    convert_checkpoint(saved(tensors, tmp_path / "model.ckpt"), tmp_path / "out", **NARROW)
    for name, tensor in load_file(tmp_path / "out" / WEIGHTS).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, convert_state_dict(tensors)[name].float())


def test_the_pipeline_has_the_originals_scheduler_and_range_and_no_licence(tmp_path: Path) -> None:
    convert_checkpoint(saved(narrow_state_dict(), tmp_path / "ddpm.ckpt"), tmp_path / "out", **NARROW)
    pipe = AnimeFacePipeline.from_pretrained(tmp_path / "out")
    assert pipe.value_range == (0.0, 1.0)
    for name, value in original_scheduler().config.items():
        assert name.startswith("_") or pipe.scheduler.config[name] == value
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "\nlicense: other\n" in card
    assert "ddpm.ckpt" in card and str(tmp_path) not in card
    assert pipe(num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)


def test_the_fp16_variant_stands_beside_the_float32_weights(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    convert_checkpoint(saved(narrow_state_dict(), tmp_path / "m.ckpt"), tmp_path / "out", variant="fp16", **NARROW)
    full = AnimeFacePipeline.from_pretrained(tmp_path / "out").unet
    half = AnimeFacePipeline.from_pretrained(tmp_path / "out", variant="fp16", torch_dtype=torch.float16).unet
    assert (full.dtype, half.dtype) == (torch.float32, torch.float16)
    for weight, rounded in zip(full.parameters(), half.parameters()):
        assert torch.equal(weight.half(), rounded)
    printed, warned = capsys.readouterr()
    assert warned == ""
    for file in (tmp_path / "out" / "unet").glob("*.safetensors"):
        assert f"{file}: sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}\n" in printed


def test_what_is_said(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {**narrow_state_dict(), **SCHEDULE}
    checkpoint = saved({"model": content}, tmp_path / "model.ckpt")
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    convert_checkpoint(checkpoint, tmp_path / "out", **NARROW)
    printed = capsys.readouterr().out
    parameters = AnimeFacePipeline.from_pretrained(tmp_path / "out").unet.num_parameters()
    for words in (
        digest,
        "is not the published",
        f"{parameters + 352:,} parameters in the entry model, {parameters:,} are",
        "352 are left",
    ):
        assert words in printed
    for path in DROPPED:
        assert f"unet.{path}.weight" in printed and f"unet.{path}.bias" in printed
    for name in SCHEDULE:
        assert name in printed
    assert "unet.pre_conv.weight" not in printed

    monkeypatch.setattr(conversion, "PUBLISHED_SHA256", digest)
    convert_checkpoint(checkpoint, tmp_path / "again", **NARROW)
    assert "is the published ddpm-model-45.ckpt" in capsys.readouterr().out


def test_another_schedule_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    content = {**narrow_state_dict(), "betas": torch.linspace(1e-4, 0.01, 1000, dtype=torch.float64)}
    convert_checkpoint(saved(content, tmp_path / "model.ckpt"), tmp_path / "out", **NARROW)
    assert "warning: betas is not the original's" in capsys.readouterr().err


def test_an_empty_folder_and_missing_parents_are_used(tmp_path: Path) -> None:
    checkpoint = saved(narrow_state_dict(), tmp_path / "model.ckpt")
    (tmp_path / "empty").mkdir()
    for output_dir in (tmp_path / "empty", tmp_path / "new" / "deep" / "out"):
        convert_checkpoint(checkpoint, output_dir, **NARROW)
        assert (output_dir / WEIGHTS).is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"model.ckpt", "empty", "new"}


# ---- nothing in the file is run ----


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.trace,)


@pytest.mark.parametrize(
    "save",
    [
        saved,
        lambda content, path: saved(content, path, _use_new_zipfile_serialization=False),
        lambda content, path: path.write_bytes(pickle.dumps(content)),
        lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)),
        lambda content, path: path.write_bytes(pickle.dumps(content, protocol=0)),
    ],
    ids=["zip", "old format", "pickle", "pickle, protocol 2", "pickle, protocol 0"],
)
def test_a_malicious_pickle_does_nothing(
    save: Callable[[Any, Path], object], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    trace, checkpoint = tmp_path / "trace", tmp_path / "model.ckpt"
    save({"state_dict": full_size_state_dict(), "args": Malicious(trace)}, checkpoint)
    assert run(checkpoint, tmp_path / "out") == 2
    assert not trace.exists()
    assert_refused(capsys, tmp_path / "out", str(checkpoint))
    with contextlib.suppress(Exception):  # the file does what it is meant to do, if one lets it
        torch.load(checkpoint, weights_only=False)
    if not trace.exists():
        pickle.loads(checkpoint.read_bytes())
    assert trace.exists()


# ---- bad input: one line, exit code 2, nothing written ----


def script_module(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<xml/>")


def truncated(share: float, **kwargs: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        content = saved(full_size_state_dict(), path, **kwargs).read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return write


def truncated_safetensors(path: Path) -> None:
    content = as_safetensors({"unet.pre_conv.bias": torch.zeros(64)}, path).read_bytes()
    path.write_bytes(content[:-10])


LFS_POINTER = """version https://git-lfs.github.com/spec/v1
oid sha256:ef6fa7ef728307128be5e78bd1a36f21e75c06a5b4bfcaa7c997b998a3d3a98c
size 675729362
"""

BAD_FILES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "nothing": (lambda path: None, ["cannot be read", "No such file"]),
    "folder": (lambda path: path.mkdir(), ["cannot be read"]),
    "empty": (lambda path: path.write_bytes(b""), ["is empty"]),
    "LFS pointer": (lambda path: path.write_text(LFS_POINTER, encoding="utf-8"), ["Git LFS pointer", "git lfs pull"]),
    "text": (lambda path: path.write_text("no weights here", encoding="utf-8"), ["neither a torch checkpoint nor"]),
    "picture": (lambda path: Image.new("RGB", (9, 9)).save(path, "PNG"), ["neither a torch checkpoint nor"]),
    "other zip": (other_zip, ["zip archive", "document.xml"]),
    "TorchScript": (script_module, ["zip archive", "none that torch.save wrote"]),
    "truncated": (truncated(0.9), ["truncated"]),
    "truncated to a few bytes": (truncated(0.0005), ["truncated"]),
    "truncated in the old format": (truncated(0.9, _use_new_zipfile_serialization=False), ["truncated"]),
    "truncated safetensors": (truncated_safetensors, ["truncated"]),
    "noise": (lambda path: path.write_bytes(b"\x80\x02" + bytes(range(256))), ["truncated, damaged"]),
    "module": (lambda path: saved(torch.nn.Linear(2, 2), path), ["Linear", "state_dict()"]),
    "list": (lambda path: saved([torch.zeros(2)], path), ["another network"]),
    "no tensors": (lambda path: saved({"epoch": 45}, path), ["another network"]),
    "other network": (lambda path: saved(torch.nn.Linear(2, 2).state_dict(), path), ["another network"]),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write, words = BAD_FILES[kind]
    write(tmp_path / "model.ckpt")
    assert run(tmp_path / "model.ckpt", tmp_path / "out") == 2
    assert_refused(capsys, tmp_path / "out", str(tmp_path / "model.ckpt"), *words)


def without(count: int) -> Tensors:
    return dict(list(full_size_state_dict().items())[count:])


def changed(**tensors: torch.Tensor) -> Tensors:
    return {**full_size_state_dict(), **{f"unet.{name.replace('__', '.')}": value for name, value in tensors.items()}}


with_nan, with_infinity = torch.ones(64), torch.ones(64)
with_nan[7], with_infinity[0] = float("nan"), float("-inf")

BAD_TENSORS: dict[str, tuple[Tensors, list[str]]] = {
    "one missing": (without(1), ["1 missing: unet.time_embedding.time_embedding_layer.0.weight"]),
    "many missing": (without(30), ["30 missing: unet.time_embedding", "and 20 more"]),
    "one unexpected": (changed(extra__weight=torch.zeros(3)), ["1 unexpected: unet.extra.weight"]),
    "many unexpected": (
        changed(**{f"extra__{number}": torch.zeros(3) for number in range(12)}),
        ["12 unexpected: unet.extra.0, ", "unet.extra.9 and 2 more"],
    ),
    "deeper than the original": (changed(encoder__11__res__block1__0__bias=torch.zeros(64)), ["unexpected: unet.enc"]),
    "misshapen": (changed(pre_conv__bias=torch.zeros(65)), ["1 misshapen: unet.pre_conv.bias [65] for [64]"]),
    "the same number in another shape": (changed(pre_conv__bias=torch.zeros(8, 8)), ["unet.pre_conv.bias [8, 8]"]),
    "whole numbers": (changed(pre_conv__bias=torch.ones(64, dtype=torch.int64)), ["unet.pre_conv.bias torch.int64"]),
    "no tensor": (changed(pre_conv__bias=3), ["misshapen: unet.pre_conv.bias"]),
    "twice": ({**full_size_state_dict(), "pre_conv.bias": torch.zeros(64)}, ["1 unexpected: pre_conv.bias"]),
    "NaN": (changed(pre_conv__bias=with_nan), ["1 with NaN or infinity: unet.pre_conv.bias"]),
    "infinity": (changed(pre_conv__bias=with_infinity), ["1 with NaN or infinity: unet.pre_conv.bias"]),
    "too large for float32": (
        changed(pre_conv__bias=torch.full((64,), 1e300, dtype=torch.float64)),
        ["1 with NaN or infinity: unet.pre_conv.bias"],
    ),
    "several faults": (
        {**without(2), "unet.pre_conv.bias": with_nan, "unet.extra.weight": torch.zeros(3)},
        ["2 missing", "1 unexpected", "1 with NaN"],
    ),
}


@pytest.mark.parametrize("fault", BAD_TENSORS)
def test_bad_tensors(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tensors, words = BAD_TENSORS[fault]
    checkpoint = saved(tensors, tmp_path / "model.ckpt")
    assert checkpoint.stat().st_size < 1_000_000  # the stand-in: shapes of full size, hardly any numbers
    assert run(checkpoint, tmp_path / "out") == 2
    assert_refused(capsys, tmp_path / "out", str(checkpoint), "not those of the original's network", *words)


def test_a_network_of_another_width_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(saved(narrow_state_dict(), tmp_path / "model.ckpt"), tmp_path / "out") == 2
    assert_refused(capsys, tmp_path / "out", "misshapen", "[8, 3, 3, 3] for [64, 3, 3, 3]", "and 3")


def test_weights_that_are_finite_but_overflow_are_refused(tmp_path: Path) -> None:
    huge = {name: tensor * 1e30 for name, tensor in narrow_state_dict().items()}
    with pytest.raises(BadInput, match=r"float32 is not finite"):
        convert_checkpoint(saved(huge, tmp_path / "model.ckpt"), tmp_path / "out", **NARROW)
    large = {**narrow_state_dict(), "unet.pre_conv.bias": torch.full((8,), 1e5)}
    with pytest.raises(BadInput, match=r"--variant fp16: 1 tensors exceed its range: conv_in.bias"):
        convert_checkpoint(saved(large, tmp_path / "model.ckpt"), tmp_path / "out", variant="fp16", **NARROW)
    assert [path.name for path in tmp_path.iterdir()] == ["model.ckpt"]


def test_a_folder_that_is_not_empty_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint = saved(full_size_state_dict(), tmp_path / "model.ckpt")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary", encoding="utf-8")
    for output_dir in (tmp_path / "notes", tmp_path / "notes" / "diary.txt"):
        assert run(checkpoint, output_dir) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"{output_dir}: exists and is not an empty folder" in error
    assert (tmp_path / "notes" / "diary.txt").read_text(encoding="utf-8") == "dear diary"
    assert len(list(tmp_path.rglob("*"))) == 3


def test_too_little_room_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = saved(narrow_state_dict(), tmp_path / "model.ckpt")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(BadInput, match=r"[\d,]+ bytes are needed, 100,000 are free"):
        convert_checkpoint(checkpoint, tmp_path / "out", **NARROW)
    assert [path.name for path in tmp_path.iterdir()] == ["model.ckpt"]


@pytest.mark.skipif(os.name == "nt", reason="limits file sizes by setrlimit")
def test_a_disk_that_is_full_after_all_leaves_nothing(tmp_path: Path) -> None:
    import resource

    checkpoint = saved(narrow_state_dict(), tmp_path / "model.ckpt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # enough for all files but the weights
    try:
        with pytest.raises(BadInput, match="cannot be written, and nothing was"):
            convert_checkpoint(checkpoint, tmp_path / "out", **NARROW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["model.ckpt"]


@contextlib.contextmanager
def unprivileged(folder: Path) -> Iterator[None]:
    """Root may write everywhere: be nobody for a while, who may read the folder."""
    if os.geteuid() != 0:
        yield
        return
    modes = {path: path.stat().st_mode for path in (folder, *folder.parents)}
    for path, mode in modes.items():
        path.chmod(mode | 0o055)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(mode)


@pytest.mark.skipif(os.name == "nt", reason="permissions are POSIX ones here")
def test_a_folder_without_permission_to_write(tmp_path: Path) -> None:
    checkpoint = saved(narrow_state_dict(), tmp_path / "model.ckpt")
    (tmp_path / "locked").mkdir(mode=0o555)
    with unprivileged(tmp_path), pytest.raises(BadInput, match="cannot be written, and nothing was: Permission"):
        convert_checkpoint(checkpoint, tmp_path / "locked" / "out", **NARROW)
    assert list((tmp_path / "locked").iterdir()) == []


# ---- pushing ----


def test_a_name_that_no_repository_can_have_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = saved(full_size_state_dict(), tmp_path / "model.ckpt")
    assert run(checkpoint, tmp_path / "out", "--push_to_hub", "--hub_model_id=a/b/c") == 2
    assert_refused(capsys, tmp_path / "out", "--hub_model_id a/b/c")


PUSH = """
import functools, runpy, sys
from animeface_pipeline import conversion
conversion.convert_checkpoint = functools.partial(conversion.convert_checkpoint, **{narrow!r})
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_pushing(tmp_path: Path) -> None:
    """In a fresh process, because the client reads the Hub's address when it is imported."""
    checkpoint, out = saved(narrow_state_dict(), tmp_path / "model.ckpt"), tmp_path / "out"
    flags = ["--variant=fp16", "--push_to_hub", "--hub_model_id=user/faces", "--hub_private_repo"]
    code = PUSH.format(narrow=NARROW, argv=[str(SCRIPT), str(checkpoint), str(out), *flags])
    with FakeHub() as server:
        env = {**os.environ, **server.env(hf_home=tmp_path / "hf_home")}
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert ran.returncode == 0, ran.stderr
        files = server.files("user/faces")
        assert server.repo("user/faces").private
    on_disk = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
    assert set(files) - {".gitattributes"} == on_disk
    assert {WEIGHTS, WEIGHTS.replace(".safetensors", ".fp16.safetensors")} <= on_disk


def test_a_push_that_fails_leaves_everything_on_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to the Hub")

    monkeypatch.setattr(hub, "upload_folder_as_pipeline", no_network)
    monkeypatch.setattr(conversion, "convert_checkpoint", functools.partial(convert_checkpoint, **NARROW))
    checkpoint = saved(narrow_state_dict(), tmp_path / "model.ckpt")
    assert run(checkpoint, tmp_path / "out", "--push_to_hub", "--hub_model_id=user/faces") == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no route to the Hub" in error
    assert f"animeface_pipeline.hub {tmp_path / 'out'} --hub_model_id user/faces" in error
    assert AnimeFacePipeline.from_pretrained(tmp_path / "out")


# ---- the full size ----


def reference_checkpoint(path: Path, seed: int = GOLDEN_SEED) -> Path:
    """As `DDPM.state_dict()` is saved: ordered, with the modules' versions."""
    tensors = OrderedDict(reference_state_dict(seed))
    tensors._metadata = OrderedDict({"": {"version": 1}})
    return saved(tensors, path)


WITHOUT_THE_PACKAGE = """
import sys, torch
sys.modules["animeface_pipeline"] = None  # importing it fails, as if it were not installed
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
golden = load_file({golden!r})
pipe = DiffusionPipeline.from_pretrained({folder!r}, trust_remote_code=True)
with torch.no_grad():
    prediction = pipe.unet(golden["unet.x"][:2], golden["unet.timesteps"][:2]).sample
print((prediction - golden["unet.eps"][:2]).abs().max().item())
"""


@torch.no_grad()
def test_full_size_by_the_command_and_on_both_loading_routes(tmp_path: Path) -> None:
    """A fresh process converts; on both routes the network then predicts what the original's did."""
    checkpoint = reference_checkpoint(tmp_path / "ddpm-model-45.ckpt")
    command = [sys.executable, str(SCRIPT), str(checkpoint), str(tmp_path / "out")]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "168,899,011 parameters, 168,885,955 are converted\n  13,056 are left out" in ran.stdout
    checkpoint.unlink()

    tensors = golden()
    unet = AnimeFacePipeline.from_pretrained(tmp_path / "out").unet
    prediction = unet(tensors["unet.x"][:2], tensors["unet.timesteps"][:2]).sample
    assert (prediction - tensors["unet.eps"][:2]).abs().max() < 5e-6
    del unet
    data = str(Path(__file__).parent / "data" / "golden.safetensors")
    code = WITHOUT_THE_PACKAGE.format(golden=data, folder=str(tmp_path / "out"))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 5e-6
    shutil.rmtree(tmp_path / "out")


MEASURED = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory as Linux counts it")
@pytest.mark.parametrize(("layout", "seed"), [("cuda:0", 2), ("old format", 3), ("safetensors", 4)])
def test_full_size_weights_to_the_bit_and_the_peak_memory(layout: str, seed: int, tmp_path: Path) -> None:
    """At most 2.5 times the checkpoint's size, the import of torch and Diffusers and the fp16 variant included."""
    checkpoint = LAYOUTS[layout](reference_state_dict(seed), tmp_path / "model.ckpt")
    arguments = [str(SCRIPT), str(checkpoint), str(tmp_path / "out"), "--variant=fp16"]
    ran = subprocess.run([sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    peak = 1024 * int(ran.stdout.split("VmHWM:")[1].split()[0])
    assert peak <= 2.5 * checkpoint.stat().st_size
    checkpoint.unlink()
    expected, written = convert_state_dict(reference_state_dict(seed)), load_file(tmp_path / "out" / WEIGHTS)
    assert set(written) == set(expected)
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    shutil.rmtree(tmp_path / "out")
