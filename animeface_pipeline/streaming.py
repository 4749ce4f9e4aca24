"""Pictures that are never stored: read from the Hub (or a folder) while training goes on, in blocks, one block ahead.

A block is the pictures of about BLOCK_SIZE / batch size updates. Files are shuffled anew in every epoch, pictures
within their block, all from the seed. Where a block begins is part of a checkpoint, so that a resumed run goes on at
the exact picture after reading no more than one block again.
"""

import io
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from .cli import BadInput, BadInputHere
from .config import TrainingConfig
from .dataset import (
    NO_PICTURE,
    PICTURES_ONLY,
    Batches,
    NoSuchSplit,
    check_one_source,
    explain_unreadable,
    files_of,
    picture_column,
    stream_seed,
    to_pixels,
)

BLOCK_SIZE = 4096  # pictures of one process: 50 MB at 64×64
STEPS_OF_UNKNOWN_EPOCH = 1000  # what counts as an epoch, for grids and the log, when nobody knows how many there are


class StreamedBatches(Batches):
    r"""
    As [`Batches`], from a stream. Each process reads its own share of it, so that (unlike there) the order of the
    pictures depends on the number of processes. A picture that cannot be decoded is named, and another one of its
    update takes its place.

    Args:
        rows (`datasets.IterableDataset`): With one undecoded column `image`.
        resolution (`int`): Height and width in pixels.
        num_pictures (`int` or `None`): How many there are, if it is known.
        total_steps (`int`): After so many updates nothing more is read.
        train_batch_size, seed, kwargs: As in [`Batches`].
    """

    def __init__(
        self,
        rows: Any,
        resolution: int,
        num_pictures: int | None,
        total_steps: int,
        train_batch_size: int,
        seed: int,
        **kwargs: Any,
    ) -> None:
        total = train_batch_size * kwargs["gradient_accumulation_steps"] * kwargs["num_processes"]
        nominal = max(1, num_pictures // total if num_pictures else STEPS_OF_UNKNOWN_EPOCH) * total
        shape_only = torch.empty((nominal, 3, resolution, resolution), dtype=torch.uint8, device="meta")
        super().__init__(shape_only, train_batch_size, seed, **kwargs)
        self.num_pictures = num_pictures
        self.resolution = resolution
        self.size = total // self.num_processes  # of an update, in this process
        self.steps_per_block = max(1, BLOCK_SIZE // self.size)
        self.ends = [total_steps]  # of this command, after those of former ones that this run was resumed from
        self.rows = rows
        self.reader = ThreadPoolExecutor(1)  # one block is read while another is trained on
        self.starts: dict[int, dict[str, Any]] = {0: {"epoch": 0, "rows": None}}  # where a block begins
        self.blocks: dict[int, Future] = {}
        self.stream: Iterator[dict] | None = None

    def _pictures_of(self, step: int, mine: slice) -> torch.Tensor:
        number, step_in_block = divmod(step, self.steps_per_block)
        for wanted in (number, number + 1):
            if wanted not in self.blocks and wanted * self.steps_per_block < self.ends[-1]:
                self.blocks[wanted] = self.reader.submit(self._read_block, wanted)
        for old in [other for other in self.blocks if other < number]:
            del self.blocks[old], self.starts[old]
        start = step_in_block * self.size
        return self.blocks[number].result()[start : start + self.size].to(self.device, non_blocking=True)

    # ---- in the reader's thread, one block after the other ----

    def _read_block(self, number: int) -> torch.Tensor:
        if self.stream is None:
            self.stream = self._rows_from(**self.starts[number])
        first = number * self.steps_per_block
        last = min(first + self.steps_per_block, self.ends[-1])
        images = [next(self.stream)["image"] for _ in range((last - first) * self.size)]
        self.starts[number + 1] = {"epoch": self.epoch, "rows": self.rows.state_dict()}
        rng = np.random.default_rng(stream_seed(self.seed, f"block of process {self.process_index}", number))
        edges = [(end - first) * self.size for end in (first, *self.ends, last) if first <= end <= last]
        order = np.concatenate([rng.permutation(np.arange(*part)) for part in pairwise(edges)])
        with ThreadPoolExecutor() as threads:
            decoded = list(threads.map(self._decode, [images[k] for k in order]))
        for start in range(0, len(decoded), self.size):
            good = [pixels for pixels in decoded[start : start + self.size] if pixels is not None]
            if not good:
                raise BadInputHere(f"--streaming: none of {self.size} pictures in a row can be decoded")
            for k in range(start, start + self.size):
                if decoded[k] is None:
                    decoded[k] = good[k % len(good)]
        shape = (len(decoded), 3, self.resolution, self.resolution)
        whole = b"".join(pixels for pixels in decoded if pixels is not None)  # by now all of them
        return torch.frombuffer(bytearray(whole), dtype=torch.uint8).view(shape)

    def _rows_from(self, epoch: int, rows: dict | None) -> Iterator[dict]:
        """All rows from there on, epoch after epoch, without end."""
        self.epoch = epoch
        self.rows.set_epoch(epoch)
        if rows is not None:
            self.rows.load_state_dict(rows)
        while True:
            empty = True
            for row in self.rows:
                empty = False
                yield row
            if empty and rows is None:
                raise BadInputHere("--streaming: there are no pictures in the stream")
            rows = None
            self.epoch += 1
            self.rows.set_epoch(self.epoch)

    def _decode(self, row: dict | None) -> bytes | None:
        image = row or NO_PICTURE
        try:
            return decode_row(image, self.resolution)
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, … for broken files
            name = image["path"] or "a picture without a name"
            print(f"skipped {name}: {type(error).__name__}: {error}", file=sys.stderr)
            return None

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        """Where the blocks in hand begin, in every process. To be called by all of them."""
        return {"starts": gather_object([self._known_starts()]), "size": self.size, "ends": self.ends}

    def _known_starts(self) -> dict[int, dict[str, Any]]:
        for block in self.blocks.values():
            block.result()  # not in the middle of reading
        return dict(self.starts)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if (len(state["starts"]), state.get("size", self.size)) != (self.num_processes, self.size):
            raise BadInput("--streaming: a run goes on with as large a batch and as many processes as it began with")
        self.starts = state["starts"][self.process_index]
        before = state.get("ends", [])  # which cut a block short, and its pictures were shuffled as far as that
        self.ends = before + [end for end in self.ends if end > max(before, default=0)]
        self.blocks, self.stream = {}, None


def open_stream(config: TrainingConfig, split: str) -> Any:
    """A `datasets.IterableDataset` with one undecoded column `image`; of nothing but the wanted split is read."""
    import datasets  # takes seconds

    try:
        if config.train_data_dir is not None:
            files = files_of(config.train_data_dir, split)
            splits = datasets.load_dataset("imagefolder", data_files=files, streaming=True, **PICTURES_ONLY)
        else:
            splits = datasets.load_dataset(config.dataset_name, config.dataset_config_name, streaming=True)
    except BadInput:
        raise
    except Exception as error:  # `datasets` raises a dozen kinds for "there is nothing here that I can read"
        raise explain_unreadable(config.train_data_dir, config.dataset_name, error) from error
    if split not in splits and split != "train":
        raise NoSuchSplit(f"--streaming: no split {split}")
    rows = splits[split] if split in splits else splits[next(iter(splits))]
    return picture_column(rows, config.dataset_name or config.train_data_dir)


def build_streamed_batches(config: TrainingConfig, **kwargs: Any) -> StreamedBatches:
    """The batches of `--streaming`; `kwargs` as in [`Batches`]."""
    from datasets.distributed import split_dataset_by_node

    check_one_source(config.train_data_dir, config.dataset_name)
    if config.max_train_steps is None:
        raise BadInput("--streaming: nobody knows how long an epoch is; say how many updates with --max_train_steps")
    rows = open_stream(config, "train")
    splits = rows.info.splits or {}
    num_pictures = splits[rows.split].num_examples if rows.split in splits else None
    rows = rows.shuffle(seed=config.seed, buffer_size=1)  # the files; pictures are shuffled within their block
    rows = split_dataset_by_node(rows, kwargs["process_index"], kwargs["num_processes"])
    steps = config.max_train_steps
    return StreamedBatches(
        rows, config.resolution, num_pictures, steps, config.train_batch_size, config.seed, **kwargs
    )


def first_pictures(config: TrainingConfig, split: str, number: int) -> torch.Tensor:
    """The first pictures of a streamed split that can be decoded, as uint8."""
    pixels = []
    for row in open_stream(config, split).take(number):
        try:
            pixels.append(decode_row(row["image"] or NO_PICTURE, config.resolution))
        except Exception:  # a broken picture is no loss here, as in the loop
            continue
    if not pixels:
        raise NoSuchSplit(f"--streaming: no picture in {split}")
    shape = (len(pixels), 3, config.resolution, config.resolution)
    return torch.frombuffer(bytearray(b"".join(pixels)), dtype=torch.uint8).view(shape)


def decode_row(image: dict, resolution: int) -> bytes:
    """The pixels of a row: its bytes, or the file (perhaps a remote one) that it names."""
    if image["bytes"] is not None:
        return to_pixels(io.BytesIO(image["bytes"]), resolution)
    import fsspec

    with fsspec.open(image["path"], "rb") as file:
        return to_pixels(io.BytesIO(file.read()), resolution)
