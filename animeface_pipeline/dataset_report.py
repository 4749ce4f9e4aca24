"""What `prepare_dataset` did, as numbers (report.json, set_aside.jsonl) and as a page to look at (report.html).

The page holds its pictures inside itself: no file in the folder could be taken for a picture of the data set.
"""

import base64
import io
import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .picture_rules import RULES, SetAside, read_picture

if TYPE_CHECKING:
    from .prepare_dataset import Outcome

REPORT_FILE = Path("report", "report.html")
COPIES = ("exact-duplicate", "near-duplicate")
EXAMPLES = 24  # of each rule
PAIRS = 24  # of near-duplicates
GROUPS = 12  # of copies
GROUP_MEMBERS = 6
THUMBNAIL = 96

STYLE = """
:root { --ink: #1d2433; --quiet: #667085; --line: #e4e7ec; --paper: #ffffff; --ground: #f5f6f8; --accent: #c2416b }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --quiet: #98a2b3; --line: #2f3746; --paper: #1b212c; --ground: #12161e; --accent: #f0819f }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1 { margin: 0; font-size: 1.6rem } h2 { margin: 0; font-size: 1.15rem } p { margin: .25rem 0 .75rem }
h2 a { color: inherit; text-decoration: none }
section { margin-top: 1rem; padding: 1rem; border: 1px solid var(--line); border-radius: .75rem;
  background: var(--paper) }
.quiet, figcaption { color: var(--quiet) }
.numbers { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin-top: .75rem }
.numbers b { display: block; font-size: 1.5rem; line-height: 1.2; font-variant-numeric: tabular-nums }
.scroll { overflow-x: auto }
table { width: 100%; border-collapse: collapse }
td, th { padding: .3rem .5rem; border-top: 1px solid var(--line); vertical-align: top }
tr:first-child > * { border-top: 0 }
td, tr:first-child th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
tr > th:first-child { min-width: 11rem; text-align: left; font-weight: 600; white-space: normal }
th a { color: var(--accent) } th small { display: block; font-weight: 400; color: var(--quiet) }
.pictures { display: flex; flex-wrap: wrap; gap: .6rem }
figure { margin: 0; width: 96px; font-size: .72rem; line-height: 1.3 }
figure img, .none { display: flex; width: 96px; height: 96px; object-fit: contain; border-radius: .4rem;
  background: var(--ground) }
.none { align-items: center; justify-content: center; color: var(--quiet) }
figcaption { overflow-wrap: anywhere }
.group { display: flex; flex-wrap: wrap; gap: .4rem; padding: .5rem; border: 1px solid var(--line);
  border-radius: .5rem }
.group figure:first-child img { outline: 3px solid var(--accent); outline-offset: -3px }
"""


def write_report(outcome: "Outcome", root: Path) -> None:
    """Write `root`/report; the pictures that are kept stand in their splits below `root` already."""
    folder = (root / REPORT_FILE).parent
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {**outcome.manifest, **summary(outcome)}
    (folder / "report.json").write_text(
        json.dumps(numbers, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n"
    )
    with open(folder / "set_aside.jsonl", "w", encoding="utf-8", newline="\n") as lines:
        for number in np.flatnonzero(outcome.records["rule"] != b""):
            lines.write(json.dumps(set_aside_entry(outcome, int(number)), ensure_ascii=False) + "\n")
    (root / REPORT_FILE).write_text(page(outcome, numbers, root), encoding="utf-8", newline="\n")


def summary(outcome: "Outcome") -> dict[str, Any]:
    """The counts: for every source its files, its distinct pictures, what is kept and what each rule set aside."""
    records, splits = outcome.records, outcome.splits
    source_of = np.array([file.source for file in outcome.files])
    of_sources = {}
    for source, name in enumerate(outcome.names):
        own = records[source_of == source]
        decoded = own["pixels"][own["pixels"] != b""]
        of_sources[name] = {
            "files": len(own),
            "decoded": len(decoded),
            "distinct": len(np.unique(decoded)),
            "kept": int((own["rule"] == b"").sum()),
            "set_aside": {rule: int((own["rule"] == rule.encode()).sum()) for rule in RULES},
        }
    return {
        "sources": of_sources,
        "set_aside": {rule: int((records["rule"] == rule.encode()).sum()) for rule in RULES},
        "splits": {split: int(is_in.sum()) for split, is_in in splits.items()},
    }


def set_aside_entry(outcome: "Outcome", number: int) -> dict[str, Any]:
    """Why one file was set aside; a copy also tells which file is kept in its stead."""
    record, file = outcome.records[number], outcome.files[number]
    entry = {
        "source": outcome.names[file.source],
        "original_name": printable(file.name),
        "rule": record["rule"].decode(),
        "detail": reason(record),
    }
    if record["twin"] >= 0:
        twin = outcome.files[record["twin"]]
        entry["kept_instead"] = {"source": outcome.names[twin.source], "original_name": printable(twin.name)}
    return entry


def reason(record: np.void) -> str:
    """What was found in this very file."""
    if record["distance"] >= 0:
        return f"{record['distance']} of 256 bits differ"
    return record["detail"].decode("utf-8", "ignore")  # cut to its length, perhaps within a letter


def printable(text: str) -> str:
    """File names need not be valid Unicode; what is written is."""
    return text.encode("utf-8", "replace").decode("utf-8")


# ---- the page ----


def page(outcome: "Outcome", numbers: dict[str, Any], root: Path) -> str:
    sections = [
        overview(outcome, numbers),
        *(rule_section(outcome, rule) for rule in RULES if numbers["set_aside"][rule] and rule not in COPIES),
        *copy_sections(outcome),
        *(split_section(outcome, split, root) for split in outcome.splits if numbers["splits"][split]),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Data set report</title>\n<style>{STYLE}</style>\n" + "\n".join(sections) + "\n</html>\n"
    )


def overview(outcome: "Outcome", numbers: dict[str, Any]) -> str:
    """The totals, the arguments, and the table of rules with one column for each source."""
    records = outcome.records
    totals = {
        "files read": len(records),
        "kept": sum(numbers["splits"].values()),
        **numbers["splits"],
        "copies": sum(numbers["set_aside"][rule] for rule in COPIES),
        "set aside otherwise": sum(numbers["set_aside"][rule] for rule in RULES if rule not in COPIES),
    }
    arguments = ", ".join(
        f"{key} {value}" for key, value in numbers["arguments"].items() if key != "sources" and value
    )
    columns = [{"files": len(records), "set_aside": numbers["set_aside"], "kept": totals["kept"]}]
    columns += [numbers["sources"][name] for name in outcome.names]
    head = "".join(f"<th>{escape(printable(name))}</th>" for name in ["", "all", *outcome.names])
    body = table_row("files", "", [column["files"] for column in columns])
    for rule, meaning in RULES.items():
        body += table_row(rule, meaning, [column["set_aside"][rule] for column in columns])
    body += table_row("kept", "", [column["kept"] for column in columns])
    return (
        f'<h1>Data set report</h1>\n<p class="quiet">{escape(arguments)}</p>\n<div class="numbers">'
        + "".join(f"<div><b>{count:,}</b>{name}</div>" for name, count in totals.items())
        + f'</div>\n<section><div class="scroll"><table>\n<tr>{head}</tr>\n{body}</table></div></section>'
    )


def table_row(name: str, meaning: str, counts: list[int]) -> str:
    title = f'<a href="#{name}">{name}</a>' if meaning and counts[0] else name
    cells = "".join(f"<td>{count:,}</td>" for count in counts)
    return f"<tr><th>{title}<small>{escape(meaning)}</small></th>{cells}</tr>\n"


def rule_section(outcome: "Outcome", rule: str) -> str:
    numbers = np.flatnonzero(outcome.records["rule"] == rule.encode())
    figures = "".join(source_figure(outcome, number) for number in spread_out(numbers))
    return section(rule, len(numbers), RULES[rule], figures)


def copy_sections(outcome: "Outcome") -> Iterator[str]:
    """The largest groups of copies, and the near-duplicates that are least alike: is the threshold right?"""
    records = outcome.records
    for rule in COPIES:
        numbers = np.flatnonzero(records["rule"] == rule.encode())
        if not len(numbers):
            continue
        twins, counts = np.unique(records["twin"][numbers], return_counts=True)
        largest = twins[np.argsort(-counts, kind="stable")][:GROUPS]
        groups = "".join(group(outcome, twin, numbers[records["twin"][numbers] == twin]) for twin in largest)
        text = f"{RULES[rule]}. In {len(twins):,} groups; these are the largest, the copy that is kept is framed."
        yield section(rule, len(numbers), text, groups)
        if rule == "near-duplicate":
            least_alike = numbers[np.argsort(-records["distance"][numbers], kind="stable")][:PAIRS]
            pairs = "".join(group(outcome, records["twin"][number], [number]) for number in least_alike)
            text = "If these are still the same drawings, the threshold is not too high."
            yield section("the near-duplicates that are least alike", len(least_alike), text, pairs)


def split_section(outcome: "Outcome", split: str, root: Path) -> str:
    numbers = np.flatnonzero(outcome.splits[split])
    pixels = [outcome.records["pixels"][number].decode() for number in spread_out(numbers)]
    figures = "".join(figure(root / split / f"{name}.png", "") for name in pixels)
    return section(split, len(numbers), "Some of the pictures as they are in the result.", figures)


def section(title: str, count: int, text: str, content: str) -> str:
    return (
        f'<section id="{title.replace(" ", "-")}"><h2>{title} <span class="quiet">{count:,}</span></h2>'
        f'<p class="quiet">{escape(text)}</p><div class="pictures">{content}</div></section>'
    )


def group(outcome: "Outcome", kept: int, copies: Sequence[int]) -> str:
    more = len(copies) - GROUP_MEMBERS
    figures = [source_figure(outcome, number) for number in [kept, *copies[:GROUP_MEMBERS]]]
    if more > 0:
        figures.append(f'<figure><div class="none">{more:,} more</div></figure>')
    return f'<div class="group">{"".join(figures)}</div>'


def source_figure(outcome: "Outcome", number: int) -> str:
    """A file as it is in its source, with its name and the reason for which it was set aside."""
    file = outcome.files[number]
    caption = f"{outcome.names[file.source]}/{file.name}"
    detail = reason(outcome.records[number])
    return figure(outcome.sources[file.source] / file.name, caption + (f": {detail}" if detail else ""))


def figure(path: Path, caption: str) -> str:
    try:
        picture = read_picture(path, first_frame=True)
    except SetAside:
        shown = '<div class="none">no picture</div>'
    else:
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        jpeg = io.BytesIO()
        picture.save(jpeg, "JPEG", quality=90)
        shown = f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}">'
    return f"<figure>{shown}<figcaption>{escape(printable(caption))}</figcaption></figure>"


def spread_out(numbers: np.ndarray) -> np.ndarray:
    """Up to `EXAMPLES` of the numbers, from the first to the last at equal steps."""
    return numbers[np.unique(np.linspace(0, len(numbers) - 1, EXAMPLES).astype(int))]
