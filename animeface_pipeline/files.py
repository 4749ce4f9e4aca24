"""Writing so that a file is there whole or not at all."""

import os
from pathlib import Path


def write_aside(file: Path, content: bytes) -> None:
    """Write beside `file`, then rename: whatever happens, it is the old file or the new one."""
    aside = file.with_name(f".{file.name}.part")
    try:
        aside.write_bytes(content)
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)
