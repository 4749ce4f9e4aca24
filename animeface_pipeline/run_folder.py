"""The output folder of a run: who may write to it, what we wrote there, its log, its grids and its checkpoints."""

import errno
import inspect
import json
import os
import secrets
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from .cli import BadInput
from .files import write_aside
from .pipeline_animeface import PUBLISHED_FILES, AnimeFacePipeline, has_edited_card, is_of_card
from .unet_animeface import AnimeFaceUNet2DModel

# What writing raises when the disk is full or the folder is gone: Python, torch.save, safetensors, and FSDP in turn.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, CheckpointException)
NOT_SHARED = "is not one folder for all processes; choose one that all machines share"
FITS_THE_STATE = ("unet", "resolution", "value_range", "prediction_type", "use_ema")  # what a resumed run must keep
SEEN_WITHIN = 90  # seconds, in which a network's file system shows what another machine wrote


class RunFolder:
    r"""
    `output_dir` while a run holds it.

    ```
    output_dir/
      run.json              the manifest: the recipe's values, and the names of everything we wrote
      log.jsonl             one line for every `logging_steps` updates
      samples/              step-00001000.png …, and step-00001000-strips.png: how each came out of the noise
      curves.png            the log as a picture
      logs/                 of TensorBoard and other trackers
      checkpoint-1000/ …    to go on from
      model_index.json …    the pipeline, at the end
    ```

    Args:
        path (`Path`): The folder.
        accelerator (`Accelerator`): Only its main process touches the folder, except for checkpoints.

    Raises:
        [`BadInput`]: (from `claim`) the folder holds something else, or another trainer is at work in it.
    """

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path, self.accelerator = path, accelerator
        self.lock = FileLock(str(path) + ".lock")
        self.manifest: dict[str, Any] = {"program": "animeface_pipeline", "wrote": []}

    # ---- claiming ----

    def claim(self, overwrite: bool, resume: bool) -> None:
        """Make sure that the folder may be ours, and nobody else's meanwhile. Nothing is written or removed yet."""
        try:
            if self.path.exists() and not self.path.is_dir():
                raise BadInput(f"--output_dir {self.path}: is a file; choose a folder")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=0)
        except Timeout:
            raise BadInput(f"--output_dir {self.path}: another trainer is writing to it; choose another one") from None
        except (OSError, NotImplementedError) as error:  # the second: a file system that knows no locks
            reason = getattr(error, "strerror", None) or error
            raise BadInput(f"--output_dir {self.path}: cannot be written ({reason}); choose another one") from error
        manifest = self._read_manifest()
        if manifest is None and self.path.is_dir() and any(self.path.iterdir()):
            raise BadInput(f"--output_dir {self.path}: holds something that is not a training run; choose another one")
        if manifest is not None and not (resume or overwrite):
            raise BadInput(
                f"--output_dir {self.path}: holds a run; add --resume_from_checkpoint latest to go on with it, or"
                " --overwrite_output_dir to replace it"
            )
        self.manifest = manifest or self.manifest

    def begin(self, recipe: dict[str, Any], overwrite: bool) -> None:
        """Create the folder, or empty it of what a run of ours wrote and of nothing else."""
        if overwrite:
            self._remove_what_we_wrote()
        self.path.mkdir(exist_ok=True)
        self.manifest["recipe"] = recipe
        self.manifest.setdefault("run_id", secrets.token_hex(4))  # by which trackers know it again
        self.wrote(["run.json", "log.jsonl"])

    def check_shared(self) -> None:
        """Refuse a folder that not all processes see, because a checkpoint has a part of each. To be called by all."""
        deadline = time.monotonic() + SEEN_WITHIN
        while not (seen := (self.path / "run.json").is_file()) and time.monotonic() < deadline:
            time.sleep(0.5)
        if not all(gather_object([seen])):
            raise BadInput(f"--output_dir {self.path}: {NOT_SHARED}")

    def release(self) -> None:
        if self.lock.is_locked:
            with suppress(OSError):  # Windows does not remove an open file
                os.unlink(self.lock.lock_file)
            self.lock.release()

    def wrote(self, names: Iterable[str]) -> None:
        """Note files and folders (relative names) as ours."""
        self.manifest["wrote"] = sorted({*self.manifest["wrote"], *names})
        write_aside(self.path / "run.json", json.dumps(self.manifest, indent=2).encode())

    def _read_manifest(self) -> dict[str, Any] | None:
        try:
            manifest = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        is_ours = isinstance(manifest, dict) and manifest.get("program") == "animeface_pipeline"
        return manifest if is_ours else None

    def _remove_what_we_wrote(self) -> None:
        kept = has_edited_card(self.path)
        for name in self.manifest["wrote"]:
            path = self.path / name
            if kept and is_of_card(name):
                continue
            if path.is_dir() and (name == "logs" or name.startswith("checkpoint-")):
                shutil.rmtree(path)
            elif path.is_file():
                path.unlink()
        parents = {parent for name in self.manifest["wrote"] for parent in Path(name).parents} - {Path()}
        for folder in sorted((self.path / parent for parent in parents), reverse=True):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        self.manifest = {"program": "animeface_pipeline", "wrote": []}

    # ---- log, grids, pipeline: by the main process ----

    def log(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        with open(self.path / "log.jsonl", "ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if file.write(line) < len(line):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def read_log(self) -> list[dict[str, Any]]:
        return [entry for _, entry in self._log_lines()]

    def _log_lines(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """Each line and what it says, without those that a crash of the machine left unreadable."""
        log = self.path / "log.jsonl"
        for line in log.read_bytes().splitlines(keepends=True) if log.exists() else []:
            with suppress(ValueError):
                yield line, json.loads(line)

    def save_pictures(self, pictures: dict[str, bytes]) -> None:
        """Write PNGs by name."""
        for name, data in pictures.items():
            (self.path / name).parent.mkdir(exist_ok=True)
            write_aside(self.path / name, data)
        self.wrote(pictures)

    def save_pipeline(self, pipeline: AnimeFacePipeline, card: dict[str, str | bytes]) -> None:
        card = {} if has_edited_card(self.path) else card
        pipeline.save_pretrained(self.path, card=card)
        files = {file for pattern in PUBLISHED_FILES for file in self.path.glob(pattern)}
        names = {file.relative_to(self.path).as_posix() for file in files}
        self.wrote(name for name in names if name in card or not is_of_card(name))

    # ---- checkpoints: by all processes ----

    def save_checkpoint(self, step: int, keep: int) -> bool:
        """Write a checkpoint aside, rename it, then drop the oldest. Says so and returns `False` if it cannot."""
        name = f"checkpoint-{step}"
        aside = self.path / f"{name}.part"

        def clear() -> None:
            shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
            aside.mkdir(parents=True)

        def write() -> None:
            self.accelerator.save_state(str(aside))

        def publish() -> None:
            sizes = {p.relative_to(aside).as_posix(): p.stat().st_size for p in aside.rglob("*") if p.is_file()}
            state = {"step": step, "files": sizes, "crc32": _checksums(aside, sizes)}
            write_aside(aside / "checkpoint.json", json.dumps(state, indent=2).encode())
            shutil.rmtree(self.path / name, ignore_errors=True)  # of the same step, from before a resume
            os.replace(aside, self.path / name)
            self.wrote([name])
            for old in [folder for folder in self.checkpoints() if _step_of(folder) <= step][:-keep]:
                shutil.rmtree(old, ignore_errors=True)

        is_main = self.accelerator.is_main_process
        error = None
        for stage, by_all in ((clear, False), (write, True), (publish, False)):
            if error is None:
                error = self._error_of_any(stage if by_all or is_main else lambda: None)
        if error is not None and is_main:
            shutil.rmtree(aside, ignore_errors=True)
            print(f"cannot save {self.path / name} ({error}); going on, and trying again later", file=sys.stderr)
        return error is None

    def _error_of_any(self, function: Callable[[], None]) -> str | None:
        """Call it in every process; all of them hear of an error that any of them met, so that none waits for ever."""
        error = None
        try:
            function()
        except WRITE_ERRORS as caught:
            error = str(caught).splitlines()[0]
        return next((each for each in gather_object([error]) if each is not None), None)

    def resume(self, which: str) -> int:
        """Load the checkpoint `latest`, or the named one; returns the updates done, 0 if there is none."""
        folder = self._whole_checkpoint(which)
        if len(set(gather_object([folder and folder.name]))) > 1:
            raise BadInput(f"--output_dir {self.path}: {NOT_SHARED}")
        if folder is None:
            self.accelerator.print(f"{self.path}: no whole checkpoint yet, starting from the beginning")
            return 0
        problem = self._error_of_any(lambda: self.accelerator.load_state(str(folder)))
        if problem is not None:
            raise BadInput(
                f"--resume_from_checkpoint {folder}: cannot be loaded ({problem}); give the same flags as before"
            )
        step = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))["step"]
        self.accelerator.print(f"going on from {folder}, {step} updates done")
        return step

    def forget_after(self, step: int) -> None:
        """Drop the log's lines and the checkpoints beyond the update that the run goes on from."""
        if (self.path / "log.jsonl").exists():
            kept = b"".join(line for line, entry in self._log_lines() if entry["step"] <= step)
            write_aside(self.path / "log.jsonl", kept)
        for later in self.checkpoints() if step > 0 else []:
            if _step_of(later) > step and later.name in self.manifest["wrote"]:
                print(f"removing {later}: the run goes on from before it")
                shutil.rmtree(later, ignore_errors=True)

    def check_recipe(self, recipe: dict[str, Any]) -> None:
        """Compare with the recipe of the run until now: refuse what its state cannot take, tell of the rest."""
        recipes = (self.manifest.get("recipe", {}), recipe)
        before, now = (json.loads(json.dumps(_flat(each))) for each in recipes)  # JSON knows no tuples
        for key in (key for key in now if key in before and now[key] != before[key]):
            if key.split(".")[0] in FITS_THE_STATE:
                raise BadInput(
                    f"--resume_from_checkpoint: {key} was {before[key]} and is {now[key]} now; give the same flags as"
                    " before, or another --output_dir"
                )
            print(f"{key}: {before[key]} until now, {now[key]} from here on")

    def _whole_checkpoint(self, which: str) -> Path | None:
        if which != "latest":
            folder = Path(which) if Path(which).is_dir() else self.path / which
            if (problem := _incomplete(folder)) is not None:
                raise BadInput(f"--resume_from_checkpoint {which}: {problem}; try latest")
            return folder
        for folder in reversed(self.checkpoints()):
            if (problem := _incomplete(folder)) is None:
                return folder
            self.accelerator.print(f"skipping {folder}: {problem}")
        return None

    def checkpoints(self) -> list[Path]:
        folders = [path for path in self.path.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
        return sorted(folders, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """The network's arguments, those left at their defaults too, as keys of their own: `unet.block_out_channels`."""
    if "unet" not in recipe:
        return recipe
    parameters = inspect.signature(AnimeFaceUNet2DModel.__init__).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in parameters if parameter.name != "self"}
    network = {**defaults, **recipe["unet"]}
    del network["sample_size"]  # the resolution
    others = {key: value for key, value in recipe.items() if key != "unet"}
    return others | {f"unet.{key}": value for key, value in network.items()}


def _incomplete(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or `None`."""
    try:
        state = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "not a whole checkpoint, it has no readable checkpoint.json"
    for name, size in state["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            return f"not a whole checkpoint, {name} is missing or truncated"
    written = state.get("crc32", {})  # which the first checkpoints did not have
    damaged = [name for name, crc32 in _checksums(folder, written).items() if crc32 != written[name]]
    return f"damaged, {damaged[0]} is not what was written" if damaged else None


def _checksums(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """The CRC-32 of each file: a power cut may leave one that is long enough, with zeros in it."""

    def crc32(name: str) -> int:
        checksum = 0
        with open(folder / name, "rb") as file:
            while chunk := file.read(1 << 20):
                checksum = zlib.crc32(chunk, checksum)
        return checksum

    with ThreadPoolExecutor() as threads:
        return dict(zip(names, threads.map(crc32, names)))
