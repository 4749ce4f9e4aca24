"""What the commands share: one clear line for bad input, and the exit codes."""

import argparse
import functools
import os
import signal
import sys
from collections.abc import Callable
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import NoReturn

# The exit codes of every command. 128 + n: stopped by signal n; the message says what was saved.
EXIT_DONE = 0
EXIT_BAD_INPUT = 2
EXIT_PUSH_FAILED = 3  # everything is on disk, only the push to the Hub failed
EXIT_NON_FINITE = 4  # training was stopped by steps whose loss or gradients were not finite


class BadInput(ValueError):
    """Input that a command refuses; the message names the thing, the rule and the way out in one line."""


class BadInputHere(BadInput):
    """Met by one process of several, which alone can tell of it."""


class Stopped(Exception):
    """The command ends early but in order: the reason for a person, and the exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that keeps the lines of its description and answers a wrong flag with one line."""

    def __init__(self, description: str | None = None, **kwargs: object) -> None:
        # allow_abbrev: a shortened flag would silently change its meaning when another flag is added
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **kwargs,  # type: ignore[arg-type]
        )

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: {message} (see --help)\n")


def command(main: Callable[..., int | None]) -> Callable[..., NoReturn]:
    """Turn `main` into a command: bad input becomes one line on stderr and exit code 2, without a traceback."""

    @functools.wraps(main)
    def run(*args: object, **kwargs: object) -> NoReturn:
        try:
            sys.exit(main(*args, **kwargs) or EXIT_DONE)
        except (BadInput, Stopped) as error:
            # of several processes, one speaks on each machine, which may be the only one that lacks something
            if isinstance(error, BadInputHere) or os.environ.get("LOCAL_RANK", "0") == "0":
                prefix = "error: " if isinstance(error, BadInput) else ""
                print(prefix + " ".join(str(error).split()), file=sys.stderr)
            sys.exit(error.exit_code if isinstance(error, Stopped) else EXIT_BAD_INPUT)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)

    return run


def resource(name: str) -> Traversable:
    """A file that is stored once, at the top of the tree (`recipes/original.yaml`), and that the wheel carries too."""
    inside = files("animeface_pipeline") / name
    beside = Path(__file__).parent.parent / name
    return beside if beside.exists() and not inside.is_file() and not inside.is_dir() else inside
