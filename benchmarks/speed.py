"""How fast the network trains and samples, beside the original's way and Diffusers' way: one command for each table.

    python benchmarks/speed.py training --output_file training.json
    python benchmarks/speed.py forward --output_file forward.json
    python benchmarks/speed.py sampling --num_inference_steps 1000 20 --output_file sampling.json
    python benchmarks/speed.py memory --output_file memory.json
    python benchmarks/speed.py growth --output_file growth.json
    python benchmarks/speed.py training --variants ours 'ours, channels last' 'ours, bf16, channels last, compiled'

The variants take turns, `--repeats` times in one run, after each was run twice to warm up; shown are the median, the
least and the most, and the ratio of the medians to the first row. Our update is made of the trainer's own parts, with
pictures in the device's memory; the original and Diffusers' example open and decode their files with Pillow. The roof
is a large matrix product in the same number format, and a copy in the device's memory, in the same run. On a GPU the
full-size network and batches of 64; on a CPU batches of 4, unless told otherwise. `--device` chooses; `--tiny` takes a
very small network, to try it. All variants are built before the first is timed, and compiling one for training takes
minutes: `--variants` takes some of them, beside the original's.
"""

import argparse
import gc
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from hardware import machine
from loader import Files
from PIL import Image
from torch.utils.data import DataLoader

from animeface_pipeline import AnimeFacePipeline, AnimeFaceUNet2DModel
from animeface_pipeline.dataset import Batches
from animeface_pipeline.schedulers import original_scheduler, switch_scheduler
from animeface_pipeline.speed import compile_for_sampling, imitates_bf16, keep_freed_memory
from animeface_pipeline.training import Meter, diffusion_loss, update

GFLOP_FORWARD, GFLOP_TRAINING = 32.2, 96.7  # of the full-size network for one picture of 64×64
FULL = {"block_out_channels": (64, 128, 256, 1024), "attention_levels": (False, False, True, True)}
TINY = {"block_out_channels": (8, 16), "attention_levels": (False, True), "norm_num_groups": 8}


@dataclass(frozen=True)
class Variant:
    """A way to run the network: in the original's loop, in Diffusers' example's, or in ours, with some levers."""

    loop: str = "ours"  # or "original", or "diffusers": a UNet2DModel of the same widths
    precision: torch.dtype = torch.float32
    channels_last: bool = False
    compile_mode: str | None = None
    tf32: bool = False  # in matrix products too; in convolutions torch has it by default
    fused: bool = False  # the optimizer of the original's loop; ours always is
    foreach: bool = True  # the EMA
    pictures_on: str = "device"
    gradient_checkpointing: bool = False

    def runs(self, args: argparse.Namespace) -> bool:
        """Whether it is of use on this device: some levers are a GPU's, and a CPU that imitates bf16 takes hours."""
        if self.compile_mode is not None and not args.compile:
            return False
        if self.precision == torch.bfloat16 and not args.tiny and imitates_bf16(torch.device(args.device)):
            return False
        of_gpu = self.tf32 or self.pictures_on == "cpu" or self.compile_mode not in (None, "default")
        return args.device == "cuda" or not of_gpu


AS_ORIGINAL = Variant(loop="original")
BF16 = torch.bfloat16
FASTEST = {"precision": BF16, "channels_last": True}
VARIANTS: dict[str, dict[str, Variant]] = {
    "forward": {
        "as the original": AS_ORIGINAL,
        "Diffusers' UNet2DModel": Variant("diffusers"),
        "ours": Variant(),
        "ours, channels last": Variant(channels_last=True),
        "ours, compiled": Variant(compile_mode="default"),
        "ours, channels last, compiled": Variant(channels_last=True, compile_mode="default"),
        "ours, bf16": Variant(precision=BF16),
        "ours, bf16, channels last": Variant(**FASTEST),
        "ours, bf16, channels last, compiled": Variant(**FASTEST, compile_mode="default"),
        "ours, bf16, channels last, CUDA graphs": Variant(**FASTEST, compile_mode="reduce-overhead"),
    },
    "training": {
        "as the original": AS_ORIGINAL,
        "as the original, optimizer fused": Variant("original", fused=True),
        "Diffusers' way": Variant("diffusers"),
        "ours": Variant(),
        "ours, EMA not foreach": Variant(foreach=False),
        "ours, pictures on the CPU": Variant(pictures_on="cpu"),
        "ours, TF32": Variant(tf32=True),
        "ours, channels last": Variant(channels_last=True),
        "ours, compiled": Variant(compile_mode="default"),
        "ours, channels last, compiled": Variant(channels_last=True, compile_mode="default"),
        "ours, bf16": Variant(precision=BF16),
        "ours, bf16, channels last": Variant(**FASTEST),
        "ours, bf16, compiled": Variant(precision=BF16, compile_mode="default"),
        "ours, bf16, channels last, compiled": Variant(**FASTEST, compile_mode="default"),
        "ours, bf16, channels last, CUDA graphs": Variant(**FASTEST, compile_mode="reduce-overhead"),
        "ours, bf16, channels last, autotuned": Variant(**FASTEST, compile_mode="max-autotune"),
    },
}
SAMPLING = {  # name: variant, scheduler; the step counts come from the command line, the first one for the original
    "as the original": (AS_ORIGINAL, "ddpm"),
    "ours, channels last": (Variant(channels_last=True), "ddpm"),
    "ours, channels last, compiled": (Variant(channels_last=True, compile_mode="default"), "ddpm"),
    "ours, bf16, channels last, CUDA graphs": (
        Variant(**FASTEST, compile_mode="reduce-overhead"),
        "ddpm",
    ),
}
FEW_STEPS = ("unipc", "dpmsolver++")


# ---- running a variant ----


def build(kind: str, variant: Variant, args: argparse.Namespace) -> Callable[[], None]:
    """One step of `kind`, "forward" or "training", of a network of its own."""
    return BUILDERS[kind](build_network(variant, args), variant, args)


def build_network(variant: Variant, args: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(0)
    config = TINY if args.tiny else FULL
    if variant.loop == "diffusers":
        attention = config["attention_levels"]
        unet: torch.nn.Module = UNet2DModel(
            sample_size=args.size,
            block_out_channels=config["block_out_channels"],
            down_block_types=tuple("AttnDownBlock2D" if has else "DownBlock2D" for has in attention),
            up_block_types=tuple("AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)),
            norm_num_groups=config.get("norm_num_groups", 32),
        )
    else:
        unet = AnimeFaceUNet2DModel(sample_size=args.size, **config)
    unet.to(args.device)
    if variant.channels_last:
        unet.to(memory_format=torch.channels_last)
    if variant.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def autocast(variant: Variant, args: argparse.Namespace) -> torch.autocast:
    half = variant.precision != torch.float32
    return torch.autocast(args.device, variant.precision if half else BF16, enabled=half)


def build_forward(unet: torch.nn.Module, variant: Variant, args: argparse.Namespace) -> Callable[[], None]:
    """A forward pass without gradients; half precision as in sampling, with the weights converted."""
    unet.eval().to(variant.precision)
    if variant.compile_mode is not None:
        compile_for_sampling(unet, variant.compile_mode)
    sample = torch.randn(args.batch_size, 3, args.size, args.size, device=args.device, dtype=variant.precision)
    timestep = torch.full((args.batch_size,), 500, device=args.device)

    @torch.no_grad()
    def step() -> None:
        unet(sample, timestep)

    return step


def build_training(unet: torch.nn.Module, variant: Variant, args: argparse.Namespace) -> Callable[[], None]:
    """One update, with everything that training does for it."""
    unet.train()
    if variant.compile_mode is not None:
        unet.compile(mode=variant.compile_mode, dynamic=False)
    return (our_update if variant.loop == "ours" else others_update)(unet, variant, args)


def our_update(unet: torch.nn.Module, variant: Variant, args: argparse.Namespace) -> Callable[[], None]:
    """As in train_accelerate.py, by its own parts."""
    accelerator = Accelerator(cpu=args.device == "cpu")
    optimizer = accelerator.prepare(torch.optim.AdamW(unet.parameters(), 1e-5, weight_decay=0.0, fused=True))
    ema = EMAModel(unet.parameters(), foreach=variant.foreach)
    pictures = torch.randint(256, (32 * args.batch_size, 3, args.size, args.size), dtype=torch.uint8)
    if variant.pictures_on == "device":
        pictures = pictures.to(args.device)
    batches = Batches(pictures, args.batch_size, seed=0, device=args.device)
    scheduler, meter, steps = original_scheduler(), Meter(1000, torch.device(args.device)), itertools.count()

    def step() -> None:
        torch.backends.cuda.matmul.allow_tf32 = variant.tf32
        [batch] = batches.of_step(next(steps))
        with autocast(variant, args):
            loss, errors = diffusion_loss(unet, scheduler, batch)
        accelerator.backward(loss)
        meter.add(errors, batch.timesteps)
        meter.add_update(update(accelerator, optimizer, unet, max_grad_norm=None))
        ema.step(unet.parameters())

    return step


def others_update(unet: torch.nn.Module, variant: Variant, args: argparse.Namespace) -> Callable[[], None]:
    """The original's: Adam, and the loss is read every time. Diffusers' example: AdamW, clipping and EMA as well."""
    as_diffusers = variant.loop == "diffusers"
    kind = torch.optim.AdamW if as_diffusers else torch.optim.Adam
    optimizer = kind(unet.parameters(), 1e-5, fused=variant.fused or None)
    ema = EMAModel(unet.parameters()) if as_diffusers else None
    pictures, scheduler = decoded_pictures(args), original_scheduler()

    def step() -> None:
        torch.backends.cuda.matmul.allow_tf32 = False
        clean = next(pictures).to(args.device)
        noise = torch.randn_like(clean)
        timesteps = torch.randint(1000, (len(clean),), device=args.device)
        loss = F.mse_loss(unet(scheduler.add_noise(clean, noise, timesteps), timesteps).sample, noise)
        loss.backward()
        if ema is not None:
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.step(unet.parameters())
        loss.item()

    return step


def decoded_pictures(args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Batches without end from JPEG files, opened and decoded by two workers."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{k}.jpg" for k in range(32 * args.batch_size)]
        for file in files:
            Image.effect_noise((64, 64), 64).convert("RGB").save(file)
        loader = DataLoader(Files(files), args.batch_size, shuffle=True, num_workers=2, persistent_workers=True)
        while True:
            for batch in loader:
                yield F.interpolate(batch, args.size) if args.tiny else batch


BUILDERS = {"forward": build_forward, "training": build_training}


def wait(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def seconds(step: Callable[[], None], args: argparse.Namespace, steps: int | None = None) -> float:
    """Of one step, over as many as `--steps` says."""
    steps = steps or args.steps
    wait(args)
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    wait(args)
    return (time.perf_counter() - begin) / steps


def in_turn(steps: dict[str, Callable[[], None]], args: argparse.Namespace) -> dict[str, list[float]]:
    """The seconds of each, `--repeats` times; what fails while it warms up is named and left out."""
    first, *_ = names = list(steps)
    for name in names:
        print(f"warming up: {name}", file=sys.stderr)
        try:
            steps[name]()
            steps[name]()
        except RuntimeError as error:  # no memory, or the compiler
            if name == first:  # the others are held against it
                raise
            print(f"left out: {name}: {str(error).splitlines()[0]}", file=sys.stderr)
            del steps[name]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, step in steps.items():
            times[name].append(seconds(step, args))
    return times


def roof(args: argparse.Namespace) -> dict[str, float]:
    """What the device can do at most, measured: TFLOP/s of a matrix product by format, GB/s of a copy."""
    size = 128 if args.tiny else 8192 if args.device == "cuda" else 2048
    result, steps = {}, 10 if args.device == "cuda" else 1
    formats = {"float32": torch.float32}
    if Variant(precision=BF16).runs(args):
        formats["bfloat16"] = BF16
    if args.device == "cuda":  # convolutions have it by default, so it is the roof of float32 there
        formats["tf32"] = torch.float32
    for name, dtype in formats.items():
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        one, other = (torch.randn(size, size, device=args.device, dtype=dtype) for _ in range(2))
        fastest = min(seconds(lambda one=one, other=other: one @ other, args, steps) for _ in range(5))
        result[f"{name}_tflops"] = round(2 * size**3 / fastest / 1e12, 3)
    source = torch.empty(2**28, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    fastest = min(seconds(lambda: target.copy_(source), args, steps) for _ in range(5))
    result["copy_gb_per_second"] = round(2 * len(source) / fastest / 1e9, 1)
    return result


# ---- the tables ----


def forward_or_training(args: argparse.Namespace) -> dict[str, Any]:
    variants = {name: v for name, v in VARIANTS[args.table].items() if v.runs(args)}
    if args.variants:
        variants = {name: v for name, v in variants.items() if name in ("as the original", *args.variants)}
    times = in_turn({name: build(args.table, variant, args) for name, variant in variants.items()}, args)
    limits, gflop = roof(args), GFLOP_FORWARD if args.table == "forward" else GFLOP_TRAINING
    rows = {}
    for name, values in times.items():
        row = summary(values, times["as the original"])
        row["pictures_per_second"] = round(args.batch_size / row["median_s"], 2)
        if not args.tiny and variants[name].loop != "diffusers":
            row["tflops"] = round(gflop * row["pictures_per_second"] / 1000, 3)
            row["of_roof"] = round(row["tflops"] / limits[roof_of(variants[name], args)], 3)
        rows[name] = row
    return {"rows": rows, "roof": limits, "batch_size": args.batch_size}


def roof_of(variant: Variant, args: argparse.Namespace) -> str:
    if variant.precision != torch.float32:
        return "bfloat16_tflops"
    return "tf32_tflops" if args.device == "cuda" else "float32_tflops"


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    most, *few = args.num_inference_steps
    variants = {name: v for name, v in SAMPLING.items() if v[0].runs(args)}
    calls, plan_of = {}, {}
    for name, (variant, scheduler) in variants.items():
        unet = build_network(variant, args).eval()
        unet.to(dtype=variant.precision)
        if variant.compile_mode is not None:
            compile_for_sampling(unet, variant.compile_mode)
        plans = [(scheduler, most)]
        if name != "as the original":
            plans += [(solver, number) for number in few for solver in FEW_STEPS]
        for solver, number in plans:
            pipe = AnimeFacePipeline(unet, switch_scheduler(original_scheduler(), solver, number))
            pipe.set_progress_bar_config(disable=True)

            def draw(pipe: AnimeFacePipeline = pipe, number: int = number) -> None:
                noise = torch.Generator(args.device).manual_seed(0)  # a CPU's would be waited for in each step
                pipe(args.batch_size, noise, num_inference_steps=number)

            calls[f"{name}, {solver}, {number} steps"] = draw
            plan_of[f"{name}, {solver}, {number} steps"] = (variant, number)
    times, limits = in_turn(calls, args), roof(args)
    rows = {name: summary(values, next(iter(times.values()))) for name, values in times.items()}
    for name, row in rows.items() if not args.tiny else ():
        variant, number = plan_of[name]
        row["tflops"] = round(GFLOP_FORWARD * args.batch_size * number / row["median_s"] / 1000, 3)
        row["of_roof"] = round(row["tflops"] / limits[roof_of(variant, args)], 3)
    return {"rows": rows, "roof": limits, "batch_size": args.batch_size}


# What `memory` measures: the kind of work, and the flags that `peak` takes for it.
MEMORY = {
    "training": ("training", []),
    "training, gradient checkpointing": ("training", ["--gradient_checkpointing"]),
    "training, bf16": ("training", ["--bf16"]),
    "training, bf16, gradient checkpointing": ("training", ["--bf16", "--gradient_checkpointing"]),
    "sampling": ("forward", []),
    "sampling, bf16": ("forward", ["--bf16"]),
}


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """The peak of a process that does two steps, for one picture and for `--batch_size`, and what fits into a GPU."""
    rows: dict[str, dict[str, Any]] = {}
    works = {name: work for name, work in MEMORY.items() if "bf16" not in name or Variant(precision=BF16).runs(args)}
    for name, (kind, flags) in works.items():
        one, batch = (peak_of(args, kind, size, *flags) for size in (1, args.batch_size))
        each = (batch - one) / max(args.batch_size - 1, 1)
        rows[name] = {"one_picture_gib": one, "batch_gib": batch, "each_further_picture_gib": round(each, 4)}
        if args.device == "cuda":
            there = torch.cuda.get_device_properties(0).total_memory
            for gb in (gb for gb in (8, 16, 24) if gb * 1e9 <= there):
                most = peak_of(args, kind, 1, *flags, "--memory_limit_gb", str(gb))
                rows[name][f"largest_batch_{gb}_gb"] = int(most)
    return {"rows": rows, "batch_size": args.batch_size}


def peak_of(args: argparse.Namespace, kind: str, batch_size: int, *flags: str) -> float:
    """What `peak` prints in a process of its own."""
    command = [sys.executable, __file__, "peak", "--kind", kind, "--device", args.device, *flags]
    command += ["--batch_size", str(batch_size), *(["--tiny"] if args.tiny else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return float(done.stdout)


def peak(args: argparse.Namespace) -> None:
    """Print the peak memory of two steps, or of reading an epoch of `--batch_size` pictures, in GiB.

    With `--memory_limit_gb`, print the largest batch that fits into so much of the GPU's memory.
    """
    precision, checkpointing = BF16 if args.bf16 else torch.float32, args.gradient_checkpointing
    variant = Variant("ours", precision, channels_last=True, gradient_checkpointing=checkpointing, pictures_on="cpu")
    if args.memory_limit_gb is not None:
        print(largest_batch(variant, args))
        return
    if args.kind == "data":
        with tempfile.TemporaryDirectory() as folder:
            read_epoch(mapped_batches(args.batch_size, folder, args))
    else:
        step = build(args.kind, variant, args)
        step()
        step()
    if args.device == "cuda" and args.kind != "data":
        held = torch.cuda.max_memory_reserved()
    elif sys.platform == "linux":
        import resource

        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        held = psutil.Process().memory_info().peak_wset  # Windows
    print(round(held / 2**30, 3))


def largest_batch(variant: Variant, args: argparse.Namespace) -> int:
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(args.memory_limit_gb * 1e9 / whole)
    unet = build_network(variant, args)

    def fits(size: int) -> bool:
        args.batch_size = size
        try:
            step = BUILDERS[args.kind](unet, variant, args)
            step()
            step()
        except RuntimeError as error:
            if not any(words in str(error) for words in OUT_OF_MEMORY):
                raise
            return False
        finally:
            step = None
            unet.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
        return True

    return largest(fits)


# What PyTorch, cuDNN and cuBLAS say when the memory is full.
OUT_OF_MEMORY = ("out of memory", "unable to find an engine", "ALLOC_FAILED")


def largest(fits: Callable[[int], bool]) -> int:
    """The largest batch that fits, found by trying, to an eighth of it; 0 if not even one picture does."""
    works, too_many = 0, 1
    while fits(too_many):
        works, too_many = too_many, too_many * 2
    while too_many - works > max(works // 8, 1):
        middle = (works + too_many) // 2
        works, too_many = (middle, too_many) if fits(middle) else (works, middle)
    return works


def growth(args: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of a forward pass at four batch sizes, and of an epoch's batches of four data sets."""
    sizes = [args.batch_size * factor for factor in (1, 2, 4, 8)]
    numbers = [n // (100 if args.tiny else 1) for n in (10_000, 20_000, 40_000, 80_000)]
    # First, while this process is small: on Linux the peak of a child is at least what its parent held at the fork.
    peaks = {size: peak_of(args, "forward", size) for size in sizes}
    peaks_of_data = {number: peak_of(args, "data", number) for number in numbers}
    steps = {}
    for size in sizes:
        of_size = argparse.Namespace(**{**vars(args), "batch_size": size})
        steps[size] = build("forward", Variant(channels_last=True), of_size)
    times = in_turn({str(size): step for size, step in steps.items()}, args)
    rows = {}
    for size in sizes:
        row = summary(times[str(size)], times[str(sizes[0])])
        row |= {"ms_per_picture": round(row["median_s"] / size * 1000, 1), "peak_gib": peaks[size]}
        rows[f"batch of {size}"] = row
    with tempfile.TemporaryDirectory() as folder:
        epochs = {number: mapped_batches(number, folder, args) for number in numbers}
        times = in_turn({str(n): lambda batches=batches: read_epoch(batches) for n, batches in epochs.items()}, args)
    for number in numbers:
        row = summary(times[str(number)], times[str(numbers[0])])
        row |= {"ms_per_picture": round(row["median_s"] / number * 1000, 4), "peak_gib": peaks_of_data[number]}
        rows[f"{number:,} pictures"] = row
    return {"rows": rows, "batch_size": args.batch_size}


def mapped_batches(number: int, folder: str, args: argparse.Namespace) -> Batches:
    """Batches of 64 from a memory-mapped file of so many pictures, as from the cache."""
    pictures = torch.from_file(f"{folder}/{number}", True, number * 3 * args.size**2, dtype=torch.uint8)
    pictures.random_()
    return Batches(pictures.view(-1, 3, args.size, args.size), train_batch_size=64, seed=0)


def read_epoch(batches: Batches) -> None:
    flips = torch.arange(64) % 2 == 0
    for step in range(len(batches.pictures) // batches.train_batch_size):  # whole ones
        batches.clean_of_step(step, flips)


def summary(values: list[float], first: list[float]) -> dict[str, float]:
    middle = statistics.median(values)
    return {
        "median_s": round(middle, 4),
        "least_s": round(min(values), 4),
        "most_s": round(max(values), 4),
        "times_first": round(statistics.median(first) / middle, 2),
    }


TABLES = {
    "forward": forward_or_training,
    "training": forward_or_training,
    "sampling": sampling,
    "memory": memory,
    "growth": growth,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=[*TABLES, "peak"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, help="in each turn (default: 1 on a CPU, 10 on a GPU)")
    parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[1000, 20])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    names = dict.fromkeys(name for table in VARIANTS.values() for name in table)
    parser.add_argument("--variants", nargs="+", choices=names, help="only these and the original's way: less memory")
    parser.add_argument("--keep_memory", action="store_true", help="of all variants, as the trainer does on a CPU")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--kind", choices=["forward", "training", "data"], default="training", help="of `peak`")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="of `peak`")
    parser.add_argument("--bf16", action="store_true", help="of `peak`")
    parser.add_argument("--memory_limit_gb", type=float, help="of `peak`, on a GPU")
    parser.add_argument("--output_file", type=Path)
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    for name in ("batch_size", "repeats", "steps"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} {value}: must be at least 1")
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; --device cpu measures the CPU")
    if args.memory_limit_gb is not None and not on_gpu:
        parser.error("--memory_limit_gb: is of a GPU; leave it out, or add --device cuda")
    if args.output_file and not args.output_file.parent.is_dir():
        parser.error(f"--output_file {args.output_file}: its folder is not there; make it first")
    args.size = 16 if args.tiny else 64
    args.batch_size = args.batch_size or ((16 if args.table == "sampling" else 64) if on_gpu else 4)
    args.steps = args.steps or (10 if on_gpu and args.table != "sampling" else 1)
    args.compile = on_gpu if args.compile is None else args.compile
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    if args.table == "peak":
        return peak(args)
    if args.keep_memory:
        keep_freed_memory()

    result = {
        "command": shlex.join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads",
        **machine("animeface-pipeline", "torch", "diffusers", "accelerate"),
        "repeats": args.repeats,
        **TABLES[args.table](args),
    }
    if args.output_file:
        args.output_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print_table(result)


def print_table(result: dict[str, Any]) -> None:
    """As Markdown, ready for RESULTS.md."""
    where = {**result["machine"], **result["versions"]}
    print(f"`{result['command']}`: {result['device']}, batch of {result['batch_size']}, {result['repeats']} turns")
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    if "roof" in result:
        print("roof: " + ", ".join(f"{key} {value}" for key, value in result["roof"].items()))
    columns = list(dict.fromkeys(key for row in result["rows"].values() for key in row))
    print(f"\n| | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}")
    for name, row in result["rows"].items():
        print(f"| {name} | {' | '.join(str(row.get(key, '')) for key in columns)} |")


if __name__ == "__main__":
    main()
