"""What all that is printed has in common: the terminal, errors, sizes, ages, JSON."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from bakehouse import manifest
from bakehouse import settings as site
from bakehouse.cache import BaseCache
from bakehouse.errors import BakehouseError
from bakehouse.store import LocalStore

WIDTH = None if sys.stdout.isatty() else 160
"""Columns where no terminal says how many: logs of CI are read in wide windows."""

console = Console(width=WIDTH)
errors = Console(stderr=True, width=WIDTH)

GIB = 1 << 30


def show_error(error: BakehouseError) -> None:
    """Print an error: the log's last lines, the sentence, the hint."""
    for line in error.log.splitlines():
        errors.print(f"  | {line}", style="dim", markup=False, highlight=False, soft_wrap=True)
    errors.print(f"[bold red]error:[/] {escape(error.message)}", highlight=False, soft_wrap=True)
    if error.hint:
        errors.print(f"[bold]hint:[/] {escape(error.hint)}", highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print a line as it is: nothing in it is markup, and nothing is broken into lines."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_json(data: Any) -> None:
    """Print plain data as JSON."""
    print(json.dumps(data, indent=1, default=str))


def size_text(count: float) -> str:
    """Write bytes for people."""
    step = 1024
    for unit in ("B", "KiB", "MiB"):
        if count < step:
            return f"{count:.0f} {unit}"
        count /= step
    return f"{count:.2f} GiB"


def age_text(since: datetime.datetime) -> str:
    """Write how long ago something was."""
    seconds = max(0.0, (datetime.datetime.now(datetime.UTC) - since).total_seconds())
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def parse_size(text: str, what: str) -> int:
    """Read a size that was given on the command line.

    Args:
        text: such as 4GiB.
        what: the flag, for the error.

    Raises:
        BakehouseError: it is none.
    """
    try:
        size = manifest.parse_size(text)
    except ValueError:
        size = None
    if size is None:
        raise BakehouseError(f"{what} {text}: it is a size such as 512MiB or 4GiB")
    return size


def existing_file(option: str, name: str) -> Path:
    """Return the absolute path of a file that an option names.

    Raises:
        BakehouseError: it is not there.
    """
    path = Path(name).expanduser().absolute()
    if not path.is_file():
        raise BakehouseError(f"{option} {name} is no file", hint="a relative path starts at the folder that you are in")
    return path


def open_site() -> tuple[site.Settings, LocalStore, BaseCache]:
    """Return the settings that hold here, the store and the cache."""
    settings = site.load()
    return settings, LocalStore(settings.store), BaseCache(settings.cache)
