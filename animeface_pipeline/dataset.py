"""Pictures for training: an image folder or a Hub data set → a uint8 cache, decoded once → batches that any process
and any later run can make again, because all that is random in them comes from (seed, step, position in the batch).
"""

import dataclasses
import glob
import hashlib
import io
import json
import os
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from .cli import BadInput
from .picture_rules import square, to_rgb

MAX_PIXELS = 100_000_000  # a picture that claims more is refused before it is decoded
# For `datasets`: folders are no classes, and a file metadata.jsonl does not say which pictures there are.
PICTURES_ONLY = {"drop_labels": True, "drop_metadata": True}
NO_PICTURE: dict[str, Any] = {"path": None, "bytes": b""}  # a row of a data set may be empty
CHUNK = 1024  # pictures that are in memory at once
CACHE_VERSION = 2  # counted up when the decoding below changes


# ---- from files to a uint8 cache ----


class NoSuchSplit(BadInput):
    """There are pictures to train on, but none are held out under this name."""


def load_pictures(
    train_data_dir: str | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    split: str = "train",
    resolution: int = 64,
    cache_dir: str | os.PathLike | None = None,
    show_progress: bool = True,
) -> torch.Tensor:
    r"""
    Decode all pictures of a folder or a Hub data set once and keep them in a cache that later calls map into memory.

    Args:
        train_data_dir (`str`, *optional*): A folder; its folder `<split>/` if it has one, else all that is below it.
        dataset_name (`str`, *optional*): What `datasets.load_dataset` takes instead: a Hub name or a folder.
        dataset_config_name (`str`, *optional*): The configuration of the Hub data set.
        split (`str`, *optional*, defaults to `"train"`): Which split; without such a split, `"train"` is all there is.
        resolution (`int`, *optional*, defaults to `64`): Height and width in pixels that pictures are fitted to.
        cache_dir (`str`, *optional*): Defaults to `animeface_pipeline` in the user's cache folder.
        show_progress (`bool`, *optional*, defaults to `True`): Whether to show a bar while decoding.

    Returns:
        `torch.Tensor` of shape `(num_pictures, 3, resolution, resolution)`, uint8. It is memory-mapped: the
        processes of one machine share it, and it need not fit into memory.

    Raises:
        [`BadInput`]: no such folder or data set, no pictures in it, none that can be decoded; as [`NoSuchSplit`]: the
            split is not `"train"` and does not exist.
    """
    rows = _open_rows(train_data_dir, dataset_name, dataset_config_name, split)
    name = str(train_data_dir or dataset_name)
    root = Path(cache_dir) if cache_dir else default_cache()
    folder = root / f"{Path(name).name}-{split}-{resolution}-{_fingerprint(rows, resolution)}"
    if not (folder / "index.json").is_file():
        if train_data_dir is not None and (others := _other_files(train_data_dir, split, rows)):
            print(f"{name}: left out {len(others)} files whose names do not end as pictures' do: {_shown(others)}")
        try:
            _decode_all(rows, folder, resolution, name, show_progress)
        except OSError as error:
            raise BadInput(f"--cache_dir {root}: cannot be written ({error.strerror or error})") from error
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    if skipped := index["skipped"]:
        print(f"{name}: skipped {len(skipped)} pictures that cannot be decoded: {_shown(skipped)}")
    shape = (index["num_pictures"], 3, resolution, resolution)
    return torch.from_numpy(np.memmap(folder / "pictures.uint8", np.uint8, mode="c", shape=shape))


def _open_rows(folder: str | None, dataset_name: str | None, config_name: str | None, split: str) -> Any:
    """A `datasets.Dataset` with one undecoded column `image`."""
    import datasets  # takes seconds

    datasets.disable_progress_bars()
    check_one_source(folder, dataset_name)
    try:
        if folder is not None:
            files = files_of(folder, split)
            loaded = datasets.load_dataset("imagefolder", data_files=files, split=split, **PICTURES_ONLY)
        else:
            splits = datasets.load_dataset(dataset_name, config_name)
            if split not in splits and split != "train":
                raise NoSuchSplit(f"--dataset_name {dataset_name}: has no split {split}")
            loaded = splits[split] if split in splits else splits[next(iter(splits))]
    except BadInput:
        raise
    except Exception as error:  # `datasets` raises a dozen kinds for "there is nothing here that I can read"
        raise explain_unreadable(folder, dataset_name, error) from error
    return picture_column(loaded, dataset_name)


def check_one_source(folder: str | None, dataset_name: str | None) -> None:
    if (folder is None) == (dataset_name is None):
        raise BadInput("give either --train_data_dir, a folder of pictures, or --dataset_name, a data set on the Hub")


def files_of(folder: str, split: str) -> dict[str, str]:
    """A folder's pictures as `data_files`. Left alone, `datasets` would take a file test_1.png for the test split."""
    if not Path(folder).is_dir():
        raise BadInput(f"--train_data_dir {folder}: no such folder")
    if split != "train" and not (Path(folder, "train").is_dir() and Path(folder, split).is_dir()):
        raise NoSuchSplit(f"--train_data_dir {folder}: has no folders train and {split}")
    return {split: f"{glob.escape(str(_folder_of(folder, split)))}/**"}


def _folder_of(folder: str, split: str) -> Path:
    """Where the pictures of a split are: in a folder of its name, if the folder has splits."""
    return (Path(folder, split) if Path(folder, "train").is_dir() else Path(folder)).resolve()


def _other_files(folder: str, split: str, rows: Any) -> list[str]:
    """What lies among a folder's pictures without being read; what is hidden and a data set's metadata aside."""
    base = _folder_of(folder, split)
    read = {Path(row["path"]) for row in rows.with_format(None)["image"]}
    others = (path for path in base.rglob("*") if path not in read and path.stem != "metadata" and path.is_file())
    names = (path.relative_to(base) for path in others)
    return sorted(name.as_posix() for name in names if not any(part.startswith((".", "__")) for part in name.parts))


def _shown(names: list[str]) -> str:
    return "; ".join(names[:5]) + ("; …" if len(names) > 5 else "")


def explain_unreadable(folder: str | None, dataset_name: str | None, error: Exception) -> BadInput:
    """What `datasets` could not read, in one line."""
    paths = (Path(folder).resolve(), *Path(folder).rglob("*::*")) if folder else ()
    if odd := next((path for path in paths if "::" in str(path)), None):
        return BadInput(f"--train_data_dir {folder}: `datasets` cannot read a name with :: in it; rename {odd}")
    what = f"--train_data_dir {folder}: no pictures" if folder else f"--dataset_name {dataset_name}: cannot be read"
    return BadInput(f"{what} ({type(error).__name__}: {str(error).splitlines()[0]})")


def picture_column(rows: Any, dataset_name: str | None) -> Any:
    """A data set (of whatever kind) as nothing but its column of pictures, named `image` and undecoded."""
    import datasets

    features = rows.features or {}
    columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise BadInput(f"--dataset_name {dataset_name}: no column of pictures, only {', '.join(features)}")
    column = "image" if "image" in columns else columns[0]
    rows = rows.select_columns(column).cast_column(column, datasets.Image(decode=False))
    return rows if column == "image" else rows.rename_column(column, "image")


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "animeface_pipeline"


def _fingerprint(rows: Any, resolution: int) -> str:
    """Changes when a file is added, removed or rewritten, when the resolution changes, or the decoding."""
    digest = hashlib.sha256(f"{CACHE_VERSION} {resolution} {len(rows)}".encode())
    for row in rows.with_format(None)["image"]:
        image = row or NO_PICTURE
        path = image["path"]
        if image["bytes"] is None:
            stat = os.stat(path)
            digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode())
        else:
            digest.update(hashlib.sha256(image["bytes"]).digest())
    return digest.hexdigest()[:16]


def _decode_all(rows: Any, folder: Path, resolution: int, name: str, show_progress: bool) -> None:
    """Write the cache aside, then rename it: a killed run leaves no broken one."""
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    aside.mkdir(parents=True)
    try:
        skipped, count = [], 0
        chunks = range(0, len(rows), CHUNK)
        with open(aside / "pictures.uint8", "wb") as file, ThreadPoolExecutor() as threads:
            for start in tqdm(chunks, f"decoding {name}", disable=not show_progress):
                images = rows[start : start + CHUNK]["image"]  # with their bytes, if these are in the data set itself
                decoded = threads.map(_decode, range(start, start + CHUNK), images, repeat(resolution))
                for path, result in decoded:
                    if isinstance(result, str):
                        skipped.append(f"{path}: {result}")
                    else:
                        file.write(result)
                        count += 1
        if count == 0:
            raise BadInput(f"{name}: none of its {len(rows)} pictures can be decoded ({skipped[0]})")
        index = {"num_pictures": count, "skipped": skipped}
        (aside / "index.json").write_text(json.dumps(index), encoding="utf-8")
        if not folder.exists():  # another process may have been faster
            os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _decode(number: int, row: dict | None, resolution: int) -> tuple[str, bytes | str]:
    """A picture as (path, its pixels channels first) or (path, why not)."""
    image = row or NO_PICTURE
    path = image["path"] or f"picture {number}"
    try:
        return path, to_pixels(path if image["bytes"] is None else io.BytesIO(image["bytes"]), resolution)
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, … for broken files
        return path, f"{type(error).__name__}: {error}"


def to_pixels(file: Any, resolution: int) -> bytes:
    """Decode one picture: upright, on white, 8-bit sRGB, cropped to a square and resized; uint8, channels first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we refuse them ourselves
        picture: Image.Image = Image.open(file)
    with picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.width}×{picture.height} pixels, more than {MAX_PIXELS:,}")
        pixels = np.asarray(square(to_rgb(picture), resolution))
    return pixels.transpose(2, 0, 1).tobytes()


# ---- from the cache to batches ----


@dataclasses.dataclass
class Batch:
    """What one forward and backward pass takes. `weight` is its share of the update's pictures in this process."""

    clean: torch.Tensor  # (B, 3, H, W) in the value range
    noise: torch.Tensor  # (B, 3, H, W), float32
    timesteps: torch.Tensor  # (B,), int64
    weight: float


class Batches:
    r"""
    The batches of every update, made from nothing but (seed, step): a run that resumes needs only its step.

    An epoch is a permutation drawn from (seed, epoch). One update takes `train_batch_size` pictures times processes
    times accumulation steps from it; timesteps, flips and noise of the whole update are drawn from (seed, step), and
    a process takes the rows of its own pictures. So 1 process and N processes with the same total batch train on the
    same thing. The last update of an epoch is smaller; with N processes it leaves out up to N − 1 pictures.

    Args:
        pictures (`torch.Tensor` of shape `(num_pictures, 3, height, width)`): uint8, on any device.
        train_batch_size (`int`): Pictures per process and accumulation step.
        seed (`int`): Of the order, timesteps, flips and noise.
        value_range (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`): What 0 and 255 become.
        random_flip (`bool`, *optional*, defaults to `True`): Whether to mirror half of the pictures, by chance.
        num_train_timesteps (`int`, *optional*, defaults to `1000`): Timesteps are uniform in [0, this).
        gradient_accumulation_steps, num_processes, process_index (`int`, *optional*): Of this process's share.
        device (`torch.device`, *optional*): Where the batches are made; a GPU's noise differs from a CPU's.

    Example:

    ```py
    >>> batches = Batches(pictures, train_batch_size=64, seed=0)
    >>> batch = batches.of_step(0)[0]
    >>> batch.clean.shape, batch.timesteps.shape
    (torch.Size([64, 3, 64, 64]), torch.Size([64]))
    ```
    """

    def __init__(
        self,
        pictures: torch.Tensor,
        train_batch_size: int,
        seed: int,
        value_range: tuple[float, float] = (0.0, 1.0),
        random_flip: bool = True,
        num_train_timesteps: int = 1000,
        gradient_accumulation_steps: int = 1,
        num_processes: int = 1,
        process_index: int = 0,
        device: torch.device | str = "cpu",
    ):
        self.pictures = pictures
        self.num_pictures: int | None = len(pictures)
        self.train_batch_size = train_batch_size
        self.seed = seed
        self.value_range = value_range
        self.random_flip = random_flip
        self.num_train_timesteps = num_train_timesteps
        self.num_processes, self.process_index = num_processes, process_index
        self.device = torch.device(device)
        self.total_batch_size = train_batch_size * gradient_accumulation_steps * num_processes
        usable = len(pictures) // num_processes * num_processes
        self.steps_per_epoch = -(-usable // self.total_batch_size)
        self._order: tuple[int, torch.Tensor] = (-1, torch.empty(0))

    def of_step(self, step: int) -> list[Batch]:
        """This process's batches for update `step` (from 0), one for each accumulation step."""
        mine = self._positions(step)
        generator = torch.Generator(self.device).manual_seed(stream_seed(self.seed, "noise", step))
        shape = self.pictures.shape[1:]
        options: dict[str, Any] = {"generator": generator, "device": self.device}
        timesteps = torch.randint(self.num_train_timesteps, (self.total_batch_size,), **options)[mine]
        flips = torch.rand(self.total_batch_size, **options)[mine] < (0.5 if self.random_flip else 0.0)
        noise = torch.randn(self.total_batch_size, *shape, **options)[mine]
        clean = self.clean_of_step(step, flips)
        size = self.train_batch_size
        parts = zip(clean.split(size), noise.split(size), timesteps.split(size))
        return [Batch(*part, weight=len(part[0]) / len(clean)) for part in parts]

    def clean_of_step(self, step: int, flips: torch.Tensor) -> torch.Tensor:
        """This process's pictures of update `step` in the value range, mirrored where `flips`, (B,) bool, says so."""
        pictures = self._pictures_of(step, self._positions(step))
        return to_value_range(torch.where(flips.view(-1, 1, 1, 1), pictures.flip(-1), pictures), self.value_range)

    def _positions(self, step: int) -> slice:
        """Which rows of the whole update are this process's."""
        start = step % self.steps_per_epoch * self.total_batch_size
        size = min(self.total_batch_size, len(self.pictures) - start) // self.num_processes
        return slice(self.process_index * size, (self.process_index + 1) * size)

    def _pictures_of(self, step: int, mine: slice) -> torch.Tensor:
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            order = np.random.default_rng(stream_seed(self.seed, "order", epoch)).permutation(len(self.pictures))
            self._order = (epoch, torch.from_numpy(order).to(self.pictures.device))
        start = step_in_epoch * self.total_batch_size
        rows = self._order[1][start + mine.start : start + mine.stop]
        return self.pictures[rows].to(self.device, non_blocking=True)


def to_value_range(pictures: torch.Tensor, value_range: tuple[float, float]) -> torch.Tensor:
    """uint8 pictures as float32: 0 becomes the first number, 255 the second."""
    low, high = value_range
    return pictures.float().div_(255).mul_(high - low).add_(low)


def stream_seed(seed: int, purpose: str, index: int) -> int:
    """A seed for one purpose and index, such that no two streams of a run are alike."""
    return int(np.random.SeedSequence([seed, *purpose.encode(), index]).generate_state(1, np.uint64)[0] >> 1)
