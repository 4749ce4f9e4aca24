"""What `prepare_dataset` did, as numbers (report.json, set_aside.jsonl) and as a page to look at (report.html).

The page holds its pictures inside itself: no file in the folder could be taken for a picture of the data set.
"""

import base64
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from .picture_rules import RULES, SetAside, printable, read_picture

REPORT_FILE = Path("report", "report.html")
EXAMPLES = 24  # of each rule
GROUPS = 24  # of copies
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
td, th { padding: .3rem .6rem; border-top: 1px solid var(--line); text-align: left; vertical-align: top }
tr:first-child > * { border-top: 0 }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
th { font-weight: 600; white-space: nowrap } th a { color: var(--accent) }
.pictures { display: flex; flex-wrap: wrap; gap: .6rem }
figure { margin: 0; width: 96px; font-size: .72rem; line-height: 1.3 }
figure img, .none { display: flex; width: 96px; height: 96px; object-fit: contain; border-radius: .4rem;
  background: var(--ground) }
.none { align-items: center; justify-content: center; color: var(--quiet) }
figcaption { overflow-wrap: anywhere }
.group { display: flex; flex-wrap: wrap; gap: .4rem; padding: .5rem; border: 1px solid var(--line);
  border-radius: .5rem }
.group figure:first-child img { outline: 3px solid var(--accent) }
"""


class Report:
    """All that is shown. `rows` are the records of `prepare_dataset`; a file is named by its place among them."""

    def __init__(
        self, sources: list[Path], files: Sequence, records: np.ndarray, splits: dict[str, np.ndarray], manifest: dict
    ) -> None:
        self.sources, self.files, self.records, self.splits, self.manifest = sources, files, records, splits, manifest
        self.names: list[str] = manifest["arguments"]["sources"]
        self.of_source = np.array([file.source for file in files])

    def label(self, number: int) -> str:
        file = self.files[number]
        return printable(f"{self.names[file.source]}/{file.name}")
