"""Merge folders of pictures into one clean training set: bad files and copies set aside, the rest cropped and split.

    python -m animeface_pipeline.prepare_dataset SOURCE [SOURCE …] --output_dir DIR

    # how many pictures would stay, without writing anything
    python -m animeface_pipeline.prepare_dataset SOURCE --output_dir DIR --dry_run

    # drawings without colour are set aside like everything that RULES in picture_rules.py names; to keep them:
    python -m animeface_pipeline.prepare_dataset SOURCE --output_dir DIR --keep near-monochrome

`load_dataset("DIR")` reads the result; open DIR/report/report.html to see what was set aside, and why. Nothing in the
sources is changed. A stopped run goes on when the same command is given again, and the same sources and arguments
give the same bytes. It needs the extra: pip install "animeface-pipeline[data]"
"""

import argparse
import functools
import hashlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from .cli import BadInput, OneLineParser, command
from .dataset_report import REPORT_FILE, printable, summary, write_report
from .near_duplicates import families, find_near_duplicates
from .picture_rules import (
    NEAR_DUPLICATE_BITS,
    OPTIONAL_RULES,
    RELATED_BITS,
    RULES,
    THUMBNAIL_SIZE,
    SetAside,
    check_picture,
    perceptual_hash,
    pixel_hash,
    read_picture,
    square,
)

EXIT_INTERRUPTED = 128 + signal.SIGINT
TASK = 64  # files that a worker reads at a time
MAX_NUM_PROC = 61  # Windows cannot wait for more processes at once

# What is remembered of each file: 182 bytes, however large the picture is.
RECORD = np.dtype(
    [
        ("file", "i4"),  # its place in the list of files
        ("rule", "S20"),  # the rule that sets it aside; empty: the picture is kept
        ("detail", "S80"),
        ("pixels", "S32"),  # `pixel_hash`; empty: it could not be decoded
        ("phash", "u1", 32),  # `perceptual_hash`
        ("width", "i4"),
        ("height", "i4"),
        ("twin", "i4"),  # of a copy: the place of the picture that is kept instead; otherwise -1
        ("distance", "i2"),  # of a near-duplicate: how many bits differ; otherwise -1
    ]
)


class File(NamedTuple):
    """A file below a source: the source's number, the path below it with forward slashes, bytes, and time in ns."""

    source: int
    name: str
    size: int
    mtime: int


class Settings(NamedTuple):
    """The arguments that the result depends on."""

    resolution: int
    min_size: int
    holdout: float
    keep: frozenset[str]


class Outcome(NamedTuple):
    """Everything that is known at the end; `splits` says for each split which of the files are in it, (N,) bool."""

    sources: list[Path]
    names: list[str]
    files: list[File]
    records: np.ndarray
    splits: dict[str, np.ndarray]
    manifest: dict[str, Any]


@command
def main(argv: list[str] | None = None) -> int | None:
    args = parse_args(argv)
    sources, output = check_folders(args.sources, args.output_dir)
    try:
        prepare(args, sources, output)
    except KeyboardInterrupt:
        print("stopped" if args.dry_run else "stopped; the same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenProcessPool:
        raise BadInput(
            f"--num_proc {args.num_proc}: a worker process was killed, perhaps for want of memory; give the same"
            " command with fewer, it goes on from here"
        ) from None
    except OSError as error:  # of the output; what is wrong with the sources stands in the records
        raise BadInput(f"{output}: cannot be written ({error}); give the same command again to go on") from error
    return None


def prepare(args: argparse.Namespace, sources: list[Path], output: Path) -> None:
    """List, read, find copies, split, write."""
    settings = Settings(args.resolution, args.min_size, args.holdout, frozenset(args.keep))
    names, files = source_names(sources), list_files(sources)
    if not files:
        raise BadInput(f"{', '.join(map(str, args.sources))}: no file in there; name the folders with the pictures")
    manifest = describe(settings, names, files)
    if output.exists() and any(output.iterdir()):
        check_finished(output, manifest)
        print(f"{output}: already prepared from these files with these arguments; nothing to do")
        return

    work = None if args.dry_run else Workplace(output, manifest, files)
    records = read_all(sources, files, settings, args.num_proc, work)
    family = mark_duplicates(records, files, settings.keep)
    splits = choose_splits(records, family, settings.holdout)
    outcome = Outcome(sources, names, files, records, splits, manifest)
    print_counts(outcome)
    if not (records["rule"] == b"").any():
        if work:
            work.remove()
        raise BadInput(f"{', '.join(map(str, args.sources))}: no picture is left, all were set aside (see above)")
    if work:
        write_result(outcome, work)
        print(f"{output}: ready for load_dataset; {output / REPORT_FILE} shows what was set aside")


# ---- what is asked for ----


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(__doc__, prog="python -m animeface_pipeline.prepare_dataset")
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE", help="a folder, read with all below it")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="a new or an empty folder")
    parser.add_argument("--resolution", type=int, default=64, help="height and width of the result (default: 64)")
    parser.add_argument("--min_size", type=int, default=64, help="least short side of a picture (default: 64)")
    parser.add_argument("--holdout", type=float, default=0.05, help="share for validation (default: 0.05)")
    parser.add_argument(
        "--keep", nargs="+", default=[], choices=OPTIONAL_RULES, metavar="RULE",
        help=f"rules that are not applied, of: {', '.join(OPTIONAL_RULES)}",
    )  # fmt: skip
    parser.add_argument(
        "--num_proc", type=int, default=min(os.cpu_count() or 1, MAX_NUM_PROC),
        help="worker processes (default: %(default)s, the number of cores)",
    )  # fmt: skip
    parser.add_argument("--dry_run", action="store_true", help="print the counts, write nothing")
    args = parser.parse_args(argv)

    limits = {"resolution": (8, 4096), "min_size": (1, 4096), "num_proc": (1, MAX_NUM_PROC)}
    for name, (lowest, highest) in limits.items():
        if not lowest <= getattr(args, name) <= highest:
            raise BadInput(f"--{name} {getattr(args, name)}: must be from {lowest} to {highest}")
    if not 0 <= args.holdout <= 0.5:  # not true of NaN either
        raise BadInput(f"--holdout {args.holdout}: must be from 0 to 0.5; 0.05 keeps one picture in 20 for validation")
    if importlib.util.find_spec("imagehash") is None:
        raise BadInput('the package imagehash is missing: pip install "animeface-pipeline[data]"')
    return args


def check_folders(given_sources: list[Path], given_output: Path) -> tuple[list[Path], Path]:
    """The sources and the output folder as absolute paths, which must not lie inside one another."""
    output = given_output.resolve()
    sources = []
    for given in given_sources:
        if not given.is_dir():
            what = "is a file; unpack archives, and name the folder" if given.exists() else "there is no such folder"
            raise BadInput(f"{given}: {what}")
        source = given.resolve()
        if output.is_relative_to(source) or source.is_relative_to(output):
            raise BadInput(f"--output_dir {given_output}: must lie outside the source {given}, and not around it")
        if source in sources:
            raise BadInput(f"{given}: is given twice")
        sources.append(source)
    if output.exists() and not output.is_dir():
        raise BadInput(f"--output_dir {given_output}: is a file; name a new folder")
    if output == Path.cwd() or output.is_mount():
        raise BadInput(f"--output_dir {given_output}: cannot appear as a whole there; name a new folder inside it")
    return sources, output


def source_names(sources: list[Path]) -> list[str]:
    """The folders' own names, with as many of the folders around them as it takes to tell them apart."""
    depth = 1
    while len({source.parts[-depth:] for source in sources}) < len(sources):
        depth += 1
    return [Path(*source.parts[-depth:]).as_posix() for source in sources]


def list_files(sources: list[Path]) -> list[File]:
    """Every file below the sources, sorted. Links are followed; a folder that is reached twice is read once."""
    files, seen = [], set()
    for number, source in enumerate(sources):
        unlistable: list[OSError] = []
        for folder, subfolders, names in os.walk(source, onerror=unlistable.append, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:  # sources that nest, or a link that leads back up
                subfolders.clear()
                continue
            seen.add(real)
            subfolders.sort()
            files += [file_below(source, number, Path(folder, name)) for name in names]
        files += [file_below(source, number, Path(error.filename)) for error in unlistable]
    return sorted(files)


def file_below(source: Path, number: int, path: Path) -> File:
    try:
        status = path.stat()
        size, mtime = status.st_size, status.st_mtime_ns
    except OSError:  # a link that leads nowhere; reading it will say so
        size, mtime = 0, 0
    return File(number, path.relative_to(source).as_posix(), size, mtime)


def describe(settings: Settings, names: list[str], files: list[File]) -> dict[str, Any]:
    """All that the result depends on, for the report and to tell whether a folder holds this very result."""
    listing = hashlib.sha256()
    for file in files:
        listing.update(json.dumps([file.source, file.name, file.size]).encode())
    return {
        "arguments": {**settings._asdict(), "keep": sorted(settings.keep), "sources": names},
        "rules": RULES,
        "files": {"number": len(files), "sha256_of_names_and_sizes": listing.hexdigest()},
    }


def check_finished(output: Path, manifest: dict[str, Any]) -> None:
    """Raise `BadInput` unless the folder holds the complete result of this very manifest."""
    way_out = "name a new folder, or remove this one yourself"
    try:
        report = json.loads((output / REPORT_FILE).with_suffix(".json").read_text(encoding="utf-8"))
        theirs, splits = {key: report[key] for key in manifest}, report["splits"]
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(
            f"--output_dir {output}: is not empty and was not prepared by this command; {way_out}"
        ) from None
    for key in manifest:
        if theirs[key] != manifest[key]:
            raise BadInput(f"--output_dir {output}: was prepared with other {key}; {way_out}")
    for name, number in splits.items():
        if len(list((output / name).glob("*.png"))) != number:
            raise BadInput(f"--output_dir {output}: not all {number} pictures of {name} are there; {way_out}")


# ---- reading: every file once, in parallel ----


class Workplace:
    """The folder DIR.partial, where the result grows until it is renamed to DIR, and where a stopped run goes on.

    `pictures` holds a PNG named by the hash of its pixels for each picture that was read, `journal` the records.
    Both are used again only if `prepare_dataset.json` shows the same arguments, files and times.
    """

    def __init__(self, output: Path, manifest: dict[str, Any], files: list[File]) -> None:
        self.output = output
        self.folder = output.with_name(output.name + ".partial")
        self.manifest, self.journal = self.folder / "prepare_dataset.json", self.folder / "journal"
        self.pictures, self.result = self.folder / "pictures", self.folder / "result"
        times = hashlib.sha256(np.array([file.mtime for file in files]).tobytes()).hexdigest()
        wanted = json.dumps({**manifest, "sha256_of_times": times})
        if self.folder.exists() and any(self.folder.iterdir()):
            ours = {self.manifest, self.journal, self.pictures, self.result}
            if not self.manifest.is_file() or not ours.issuperset(self.folder.iterdir()):
                raise BadInput(f"{self.folder}: is needed to work in, but holds something else; move it away")
            if self.manifest.read_text(encoding="utf-8") != wanted:
                self.remove()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.manifest.write_text(wanted, encoding="utf-8")
        self.pictures.mkdir(exist_ok=True)

    def finished_records(self) -> np.ndarray:
        """The records of an earlier run that was stopped; the last one may have been written in part."""
        if not self.journal.exists():
            return np.empty(0, RECORD)
        data = self.journal.read_bytes()
        whole = len(data) // RECORD.itemsize * RECORD.itemsize
        os.truncate(self.journal, whole)
        return np.frombuffer(data[:whole], RECORD)

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def read_all(
    sources: list[Path], files: list[File], settings: Settings, num_proc: int, work: Workplace | None
) -> np.ndarray:
    """Read every file and apply the rules that need no other file. Returns one `RECORD` for each file, (N,)."""
    records = np.zeros(len(files), RECORD)
    finished = work.finished_records() if work else records[:0]
    records[finished["file"]] = finished
    is_left = np.ones(len(files), bool)
    is_left[finished["file"]] = False
    left = np.flatnonzero(is_left)
    tasks = (
        [(number, sources[files[number].source] / files[number].name) for number in left[start : start + TASK]]
        for start in range(0, len(left), TASK)
    )
    read = functools.partial(read_files, settings=settings, pictures=work.pictures if work else None)
    with tqdm(total=len(files), initial=len(finished), desc="reading", unit="file") as progress:
        for batch in run_in_processes(read, tasks, num_proc):
            records[batch["file"]] = batch
            if work:
                with open(work.journal, "ab") as journal:
                    journal.write(batch.tobytes())
            progress.update(len(batch))
    return records


def run_in_processes(function: Callable, tasks: Iterable, num_proc: int) -> Iterator:
    """What `function` returns for each task, in order; only a few tasks are ever under way, however many there are."""
    if num_proc == 1:
        yield from map(function, tasks)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_proc, mp_context=spawn, initializer=follow_parent) as executor:
        pending: deque[Future] = deque()
        try:
            for task in tasks:
                pending.append(executor.submit(function, task))
                if len(pending) == 4 * num_proc:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # after Ctrl-C or an error nothing more is begun
            executor.shutdown(cancel_futures=True)


def follow_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and end when the parent is gone, even if it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def read_files(task: list[tuple[int, Path]], settings: Settings, pictures: Path | None) -> np.ndarray:
    """In a worker: one `RECORD` for each file; what may be kept is written to `pictures` at its final size."""
    records = np.zeros(len(task), RECORD)
    records["twin"] = records["distance"] = -1
    for record, (number, path) in zip(records, task):
        record["file"] = number
        try:
            picture = read_picture(path)
            record["pixels"], record["width"], record["height"] = pixel_hash(picture), picture.width, picture.height
            thumbnail = square(picture, THUMBNAIL_SIZE)
            check_picture(picture, thumbnail, settings.min_size, settings.keep)
            record["phash"] = perceptual_hash(thumbnail)
        except SetAside as reason:
            record["rule"], record["detail"] = reason.rule, printable(reason.detail).encode()[:80]
            continue
        if pictures:
            write_png(square(picture, settings.resolution), pictures / f"{record['pixels'].decode()}.png")
    return records


def write_png(picture: Image.Image, path: Path) -> None:
    """Write the file as a whole; two workers may meet two copies of one picture at the same time."""
    unfinished = path.with_suffix(f".{os.getpid()}")
    picture.save(unfinished, "PNG", compress_level=1)  # faster than 6, and at 64×64 not larger
    os.replace(unfinished, path)


# ---- deciding: copies, and who is held out ----


def mark_duplicates(records: np.ndarray, files: list[File], keep: frozenset[str]) -> np.ndarray:
    """
    Set copies aside in favour of the best one: most pixels, then the largest file, then the first by name.

    Returns:
        `np.ndarray` of shape `(N,)`: the family of each picture that is kept; related pictures are of one family.
    """
    sizes = np.array([file.size for file in files])
    best_first = np.lexsort((np.arange(len(files)), -sizes, -records["width"].astype(int) * records["height"]))
    best_first = best_first[records["rule"][best_first] == b""]

    _, first, group = np.unique(records["pixels"][best_first], return_index=True, return_inverse=True)
    original = best_first[first][group]
    is_copy = original != best_first
    copies = best_first[is_copy]
    records["rule"][copies], records["twin"][copies] = b"exact-duplicate", original[is_copy]

    distinct = best_first[~is_copy]
    near_bits = -1 if "near-duplicate" in keep else NEAR_DUPLICATE_BITS
    nearest, distance, related = find_near_duplicates(records["phash"][distinct], near_bits, RELATED_BITS)
    is_copy = distance <= near_bits
    near_copies = distinct[is_copy]
    records["rule"][near_copies], records["twin"][near_copies] = b"near-duplicate", distinct[nearest[is_copy]]
    records["distance"][near_copies] = distance[is_copy]
    chained = copies[np.isin(records["twin"][copies], near_copies)]  # its twin is itself set aside
    records["twin"][chained] = records["twin"][records["twin"][chained]]

    family = np.full(len(files), -1)
    family[distinct] = families(len(distinct), related)
    return family


def choose_splits(records: np.ndarray, family: np.ndarray, holdout: float) -> dict[str, np.ndarray]:
    """
    Hold whole families out for validation, in an order that only their pixels decide, until the share is reached.

    A family that is larger than what is still wanted is passed over; at least one picture is wanted (unless `holdout`
    is 0), and at least one is left for training.
    """
    kept = np.flatnonzero(records["rule"] == b"")
    wanted = min(max(1, round(holdout * len(kept))), len(kept) - 1) if holdout else 0
    hashes = np.array([int(pixels[:16], 16) for pixels in records["pixels"][kept]], np.uint64)
    order, size = np.zeros((2, family.max(initial=0) + 1), np.uint64)
    np.bitwise_xor.at(order, family[kept], hashes)  # does not favour large families, as the least hash would
    np.add.at(size, family[kept], 1)
    is_held_out = np.zeros(len(order), bool)
    for label in np.argsort(order, kind="stable"):
        if 0 < size[label] <= wanted:
            is_held_out[label] = True
            wanted -= int(size[label])
    is_kept = records["rule"] == b""
    validation = is_kept & is_held_out[family]
    return {"train": is_kept & ~validation, "validation": validation}


# ---- writing ----


def print_counts(outcome: Outcome) -> None:
    counts = summary(outcome)
    for name, numbers in counts["sources"].items():
        print(f"{numbers['files']:>9,} files in {printable(name)}")
    for rule, meaning in RULES.items():
        print(f"{counts['set_aside'][rule]:>9,} {rule}: {meaning}")
    parts = ", ".join(f"{number:,} {name}" for name, number in counts["splits"].items())
    print(f"{sum(counts['splits'].values()):>9,} kept: {parts}")


def write_result(outcome: Outcome, work: Workplace) -> None:
    """Move the pictures into their splits, add metadata and report, and let all of it appear at once as `output`."""
    for name, is_in in outcome.splits.items():
        if is_in.any():
            write_split(outcome, np.flatnonzero(is_in), work, work.result / name)
    write_report(outcome, work.result)
    shutil.rmtree(work.pictures)  # only copies are left in it
    if work.output.exists():
        work.output.rmdir()  # it is empty
    os.replace(work.result, work.output)
    work.remove()


def write_split(outcome: Outcome, numbers: np.ndarray, work: Workplace, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metadata.jsonl", "w", encoding="utf-8", newline="\n") as metadata:
        for number in numbers[np.argsort(outcome.records["pixels"][numbers])]:
            file, pixels = outcome.files[number], outcome.records["pixels"][number].decode()
            entry = {
                "file_name": f"{pixels}.png",
                "source": printable(outcome.names[file.source]),
                "original_name": printable(file.name),
                "hash": pixels,
            }
            metadata.write(json.dumps(entry, ensure_ascii=False) + "\n")
            if not (folder / entry["file_name"]).exists():  # moved before an earlier run was stopped
                os.replace(work.pictures / entry["file_name"], folder / entry["file_name"])


if __name__ == "__main__":
    main()
