"""What happens around the updates of a run: log, grids, checkpoints, signals, and the pipeline at the end."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list
from PIL import Image
from tqdm import tqdm

from .cli import EXIT_DONE, EXIT_NON_FINITE, BadInput, BadInputHere, Stopped
from .config import TrainingConfig
from .curves import draw_curves, flat
from .dataset import Batches
from .hub import (
    TrainingSummary,
    check_repo_id,
    code_commit,
    hardware_name,
    library_versions,
    png,
    push_or_explain,
    render_card,
)
from .pipeline_animeface import AnimeFacePipeline
from .run_folder import WRITE_ERRORS, RunFolder
from .speed import choose_fast_settings, imitates_bf16, keep_freed_memory
from .streaming import StreamedBatches
from .trackers import chosen_trackers, report_pictures, start_trackers
from .training import (
    EMA,
    Meter,
    averaged_weights,
    memory_gib,
    sample_grid,
    settings_over_state,
    unused_gpu,
    with_weights,
)
from .validation import Validation

MAX_SKIPPED_IN_A_ROW = 50  # fp16 skips its first updates while it looks for a loss scale
WAIT_FOR_PICTURES = timedelta(hours=3)  # while one process downloads and decodes them; NCCL's own limit is 10 minutes
SAME_SIGNAL = 2.0  # seconds, in which a second one is the first, sent on by a launcher to whom it was sent as well


@contextmanager
def launched(config: TrainingConfig) -> Iterator[tuple[Accelerator, RunFolder]]:
    """The accelerator and the claimed output folder; afterwards both are let go, whatever happened."""
    if config.push_to_hub:
        check_repo_id(hub_model_id(config))
    choose_fast_settings(config)
    trackers = chosen_trackers(config.report_to)
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=trackers or None,
            project_config=ProjectConfiguration(config.output_dir, logging_dir=str(Path(config.output_dir, "logs"))),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT_FOR_PICTURES)],
        )
    except ValueError as error:  # e.g. fp16 without a GPU
        raise BadInput(f"--mixed_precision {config.mixed_precision}: {error}") from error
    if accelerator.device.type not in ("cpu", "cuda"):
        raise BadInput(f"training on {accelerator.device.type} was never tried; use accelerate launch --cpu")
    if accelerator.distributed_type == DistributedType.FSDP and config.channels_last:
        config.channels_last = False
        accelerator.print("channels_last: left off, because FSDP takes contiguous weights only")
    if accelerator.device.type == "cpu":
        use_all_cores()
        keep_freed_memory()
    if (warning := unused_gpu()) is not None:
        accelerator.print(warning)
    if config.mixed_precision == "bf16" and imitates_bf16(accelerator.device):
        accelerator.print(
            "warning: this CPU has no instructions for bf16 and is many times slower in it than in float32:"
            " add --mixed_precision no"
        )
    folder = RunFolder(Path(config.output_dir), accelerator)
    try:
        resume = config.resume_from_checkpoint is not None
        on_main_process(accelerator, lambda: folder.claim(config.overwrite_output_dir, resume))
        yield accelerator, folder
    except torch.OutOfMemoryError as error:
        raise BadInputHere(
            "the GPU's memory is full: lower --train_batch_size and raise --gradient_accumulation_steps by the same"
            " factor, or add --gradient_checkpointing"
        ) from error
    finally:
        folder.release()
        accelerator.end_training()


def use_all_cores() -> None:
    """`accelerate launch` holds a CPU process to one thread unless told otherwise; one process may have them all."""
    alone = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("WORLD_SIZE", "1") == "1"
    if alone and torch.get_num_threads() == 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(cores)


def on_main_process(accelerator: Accelerator, function: Callable[[], None]) -> None:
    """Run `function` on the main process; if it refuses the input, every process does."""
    refusal: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            function()
        except BadInput as error:
            refusal = [str(error)]
    broadcast_object_list(refusal)
    if refusal[0] is not None:
        raise BadInput(refusal[0])


class Run:
    r"""
    A run in progress.

    ```py
    run = Run(config, accelerator, folder, pipeline, unet, lr_scheduler, ema, batches, validation, total_steps)
    run.begin()
    for step in run.steps():
        ...
        run.after_update(step, grad_norm)
    run.finish()
    ```
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        folder: RunFolder,
        pipeline: AnimeFacePipeline,
        unet: torch.nn.Module,
        lr_scheduler: Any,
        ema: EMA | None,
        batches: Batches,
        validation: Validation | None,
        total_steps: int,
    ) -> None:
        self.config, self.accelerator, self.folder = config, accelerator, folder
        self.pipeline, self.unet, self.ema = pipeline, unet, ema
        self.lr_scheduler, self.batches, self.validation = lr_scheduler, batches, validation
        self.total_steps = total_steps
        self.meter = Meter(pipeline.scheduler.config.num_train_timesteps, accelerator.device)
        self.signals = Signals()
        self.first_step = 0
        self.save_again = False  # a checkpoint could not be written
        self.last_grid: Image.Image | None = None
        streamed = batches if isinstance(batches, StreamedBatches) else None
        gathered = [Gathered(part) for part in (self.meter, ema, streamed) if part is not None]
        accelerator.register_for_checkpointing(lr_scheduler, *gathered)
        for part in gathered:
            accelerator.register_save_state_pre_hook(part.gather)

    def begin(self) -> None:
        """Open the output folder; go on from a checkpoint if the config says so and there is one."""
        which = self.config.resume_from_checkpoint
        if which is not None:
            on_main_process(self.accelerator, lambda: self.folder.check_recipe(self.config.recipe_values()))
            self.first_step = self.folder.resume(which)
            settings_over_state(self.config, self.lr_scheduler, self.ema)
        if self.first_step > self.total_steps:
            raise BadInput(
                f"{self.first_step} updates are done already, and these settings want {self.total_steps} in all; raise"
                " --max_train_steps or --num_epochs"
            )
        on_main_process(self.accelerator, self.open_folder)
        self.folder.check_shared()
        on_main_process(self.accelerator, self.start_trackers)
        self.accelerator.wait_for_everyone()
        self.signals.listen()  # until now there was nothing to save

    def open_folder(self) -> None:
        try:
            if self.config.resume_from_checkpoint is not None:
                self.folder.forget_after(self.first_step)
            self.folder.begin(self.config.recipe_values(), self.config.overwrite_output_dir)
        except WRITE_ERRORS as error:
            raise BadInput(f"--output_dir {self.folder.path}: cannot be written ({error})") from error

    def start_trackers(self) -> None:
        if self.config.report_to is None:
            return
        self.folder.wrote(["logs"])
        name, settings = self.folder.path.resolve().name, self.config.recipe_values()
        start_trackers(self.accelerator, settings, name, self.folder.manifest["run_id"], self.first_step)

    def steps(self) -> Any:
        """The updates that are still to do, with a progress bar."""
        self.bar = tqdm(
            total=self.total_steps,
            initial=self.first_step,
            desc="training",
            unit="step",
            disable=not self.accelerator.is_main_process,
        )
        self.logged_at, self.logged_step = time.perf_counter(), self.first_step
        with self.bar:
            for step in range(self.first_step, self.total_steps):
                yield step
                self.bar.update()

    def after_update(self, step: int, grad_norm: torch.Tensor) -> None:
        """Log, draw, save, or stop, as it is due after update `step` (from 0)."""
        self.meter.add_update(grad_norm)
        done = step + 1
        is_last, config = done == self.total_steps, self.config
        validated = self.validate() if done % config.validation_steps == 0 or is_last else {}
        is_grid = done % (config.save_images_epochs * self.batches.steps_per_epoch) == 0 or is_last
        if done % config.logging_steps == 0 or is_grid or validated:  # a grid shows the curves too
            self.log(done, grad_norm, validated)
        if is_grid:
            self.draw(done)
        again = self.save_again and done % config.logging_steps == 0
        if done % config.checkpointing_steps == 0 or is_last or again:
            with self.not_training():
                self.save_again = not self.folder.save_checkpoint(done, config.checkpoints_total_limit)
        # With several processes all must agree, and asking makes them wait for each other.
        if self.accelerator.num_processes == 1 or done % config.logging_steps == 0:
            self.stop_after_signal(done)

    @contextmanager
    def not_training(self) -> Iterator[None]:
        """What is done within does not count for the pictures per second."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()  # updates that still wait in the GPU's queue are training
        began = time.perf_counter()
        yield
        self.logged_at += time.perf_counter() - began

    def validate(self) -> dict[str, float]:
        """The loss on the held-out split, with the weights as they are and with their average."""
        losses: dict[str, float] = {}
        if self.validation is None:
            return losses
        with self.not_training():
            for key, ema in {"validation_loss": None, "validation_loss_ema": self.ema}.items():
                if key == "validation_loss" or ema is not None:
                    with averaged_weights(self.unet, ema):
                        losses[key] = self.validation.loss(self.unet)
        return losses

    def log(self, done: int, grad_norm: torch.Tensor, validated: dict[str, float]) -> None:
        read = self.meter.read(self.accelerator)
        now, pictures = time.perf_counter(), (done - self.logged_step) * self.batches.total_batch_size
        entry = {
            "step": done,
            "epoch": round(done / self.batches.steps_per_epoch, 4),
            **{key: value for key, value in read.items() if key != "skipped_in_a_row"},
            "grad_norm": float(grad_norm),
            "learning_rate": self.lr_scheduler.get_last_lr()[0],
            "pictures_per_second": round(pictures / (now - self.logged_at), 2),
            "memory_gib": memory_gib(self.accelerator.device),
            **validated,
        }
        self.logged_at, self.logged_step = now, done
        if self.accelerator.is_main_process:
            self.bar.set_postfix(loss=f"{entry['loss']:.4f}", pictures_per_s=f"{entry['pictures_per_second']:.1f}")
            try:
                self.folder.log(entry)
                self.accelerator.log(flat(entry), step=done)
            except WRITE_ERRORS as error:
                print(f"cannot write the log ({error}); going on", file=sys.stderr)
        if read["skipped_in_a_row"] >= MAX_SKIPPED_IN_A_ROW:
            last = next(iter(reversed(self.folder.checkpoints())), None)
            raise Stopped(
                f"stopped after {read['skipped_in_a_row']} updates in a row whose loss or gradients were not finite;"
                f" the last good checkpoint: {last or 'none yet'}; lower --learning_rate or set --max_grad_norm",
                EXIT_NON_FINITE,
            )

    def draw(self, done: int) -> None:
        with self.not_training():
            with averaged_weights(self.unet, self.ema):
                self.last_grid, strips = sample_grid(self.pipeline, self.config)
            if self.accelerator.is_main_process:
                try:
                    name = f"samples/step-{done:08d}"
                    self.folder.save_pictures(
                        {
                            f"{name}.png": png(self.last_grid),
                            f"{name}-strips.png": png(strips),
                            "curves.png": draw_curves(self.folder.read_log()),
                        }
                    )
                    report_pictures(self.accelerator, {"samples": self.last_grid, "strips": strips}, done)
                except WRITE_ERRORS as error:
                    print(f"cannot write the grid ({error}); going on", file=sys.stderr)

    def stop_after_signal(self, done: int) -> None:
        number = self.signals.number
        if self.accelerator.num_processes > 1:
            mine = torch.tensor([number], device=self.accelerator.device)
            number = int(self.accelerator.gather(mine).max())
        if number == 0 or done == self.total_steps:
            return
        saved = self.folder.save_checkpoint(done, self.config.checkpoints_total_limit)
        state = f"saved after update {done}" if saved else "could not save"
        raise Stopped(
            f"stopped by {signal.Signals(number).name}, {state}; the same command with"
            " --resume_from_checkpoint latest goes on",
            128 + number,
        )

    def finish(self) -> int:
        """Save the pipeline with the averaged weights, if there are any, and its card; push it if asked to."""
        self.signals.restore()
        if self.last_grid is None:  # resumed after the last update
            self.draw(self.total_steps)
        with averaged_weights(self.unet, self.ema):
            weights = self.accelerator.get_state_dict(self.unet)  # of all processes, if they share them out
            on_main_process(self.accelerator, lambda: self.save_pipeline(weights))
        self.accelerator.print(f"the pipeline is in {self.folder.path}")
        if not self.config.push_to_hub or not self.accelerator.is_main_process:
            return EXIT_DONE
        return push_or_explain(self.folder.path, hub_model_id(self.config), self.config.hub_private_repo)

    def save_pipeline(self, weights: dict[str, torch.Tensor]) -> None:
        pipeline = with_weights(self.pipeline, weights)
        try:
            self.folder.save_pipeline(pipeline, render_card(pipeline, self.summary(), self.last_grid))
        except WRITE_ERRORS as error:
            raise BadInput(
                f"--output_dir {self.folder.path}: the pipeline cannot be saved ({str(error).splitlines()[0]}); make"
                " room, and the same command with --resume_from_checkpoint latest saves it"
            ) from error

    def summary(self) -> TrainingSummary:
        """What the card tells of this run: no paths, they are nobody's business."""
        config, of_the_hub = self.config, not os.path.isdir(self.config.dataset_name or ".")
        seen = self.total_steps / self.batches.steps_per_epoch
        log, batch_size = self.folder.read_log(), self.batches.total_batch_size
        return TrainingSummary(
            recipe=Path(config.config).stem,
            settings=config.recipe_values(),
            dataset=Path(config.train_data_dir or config.dataset_name or "").resolve().name,
            hub_dataset=config.dataset_name if of_the_hub else None,
            dataset_size=self.batches.num_pictures,
            steps=self.total_steps,
            epochs=round(seen, 2),
            samples_seen=round(seen * len(self.batches.pictures)),
            batch_size=batch_size,
            hours=training_hours(log, batch_size),
            ema_decay=config.ema_max_decay if config.use_ema else None,
            hardware=f"{self.accelerator.num_processes} × {hardware_name()}",
            commit=code_commit(),
            versions=library_versions(),
            losses=[(entry["step"], entry["loss"]) for entry in log],
            base_model=base_model(config),
        )


def training_hours(log: list[dict[str, Any]], batch_size: int) -> float:
    """What the updates took, without sampling, saving and what happened between two runs."""
    seconds = 0.0
    for former, entry in pairwise([{"step": 0}, *log]):
        seconds += (entry["step"] - former["step"]) * batch_size / max(entry["pictures_per_second"], 0.01)
    return seconds / 3600


def hub_model_id(config: TrainingConfig) -> str:
    return config.hub_model_id or Path(config.output_dir).resolve().name


def base_model(config: TrainingConfig) -> str | None:
    """The model that was fine-tuned, by its name on the Hub, or the last part of its path."""
    name = config.pretrained_model_name_or_path
    return Path(name).resolve().name if name and os.path.isdir(name) else name


class Gathered:
    """A part of a checkpoint whose state is gathered from all processes: before any of them writes, because one that
    cannot write does not come to a later gathering, and the others would wait for it."""

    def __init__(self, part: Any) -> None:
        self.part = part
        self.state: dict[str, Any] = {}

    def gather(self, *_: Any) -> None:
        self.state = self.part.state_dict()

    def state_dict(self) -> dict[str, Any]:
        state, self.state = self.state, {}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.part.load_state_dict(state)


class Signals:
    """Notes SIGTERM, SIGINT, SIGHUP, and the end of the launcher, so that the loop can finish its update and save."""

    def __init__(self) -> None:
        self._number = 0
        self._noted_at = 0.0
        self._before: dict[int, Any] = {}
        # Set by `accelerate launch`: then our parent is the launcher, which dies of a SIGTERM without telling us.
        self._launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None

    def listen(self) -> None:
        numbers = [signal.SIGTERM, signal.SIGINT]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup has it ignored
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._note) for number in numbers}

    @property
    def number(self) -> int:
        """The signal, or 0."""
        if self._number == 0 and self._launcher is not None and os.getppid() != self._launcher:
            return signal.SIGTERM
        return self._number

    def _note(self, number: int, frame: object) -> None:
        if self._number == 0:
            self._number, self._noted_at = number, time.monotonic()
            print("\nfinishing this update and saving; once more to stop without saving", file=sys.stderr)
        elif time.monotonic() - self._noted_at > SAME_SIGNAL:
            self.restore()
            signal.raise_signal(number)  # ends the program at once

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
