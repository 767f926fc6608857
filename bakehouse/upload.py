"""An image file on its way to Glance: checked before, read once, counted while it goes."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bakehouse.errors import BakehouseError
from bakehouse.glance import CHUNK
from bakehouse.record import ImageFile

SHOWN_SECONDS = 0.2
"""Between two updates on a terminal."""

CHECK_SECONDS = 60

MIB = 1 << 20


class FileChunks:
    """A file's bytes, to be sent. Each iteration reads it anew from its beginning.

    Args:
        path: the file.
        tell: called with the bytes sent since the beginning.

    Raises:
        BakehouseError: while it is iterated, where it cannot be read: an OSError would be taken for the network's.
    """

    def __init__(self, path: Path, tell: Callable[[int], None]) -> None:
        self.path = path
        self.size = path.stat().st_size
        # Not self.tell: requests would take this for a file, and us for its position.
        self._report = tell

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[bytes]:
        sent = 0
        for piece in self._pieces():
            yield piece
            sent += len(piece)
            self._report(sent)

    def _pieces(self) -> Iterator[bytes]:
        try:
            with self.path.open("rb", buffering=0) as file:
                while piece := file.read(CHUNK):
                    yield piece
        except OSError as error:
            raise BakehouseError(
                f"{self.path} cannot be read: {error.strerror}",
                hint="the disk may be failing: see the kernel's log (dmesg)",
            ) from error


class Meter:
    """Says how an upload gets on: all the time on a terminal, every few seconds elsewhere.

    Args:
        total: bytes.
        show: takes a line that replaces the one before.
        say: takes a line that stays.
        every: seconds between two that stay.
    """

    def __init__(
        self, total: int, show: Callable[[str], None], say: Callable[[str], None], *, every: float = 10.0
    ) -> None:
        self.total = total
        self.show = show
        self.say = say
        self.every = every
        self.begin()

    def begin(self) -> None:
        """Start counting anew."""
        self.started = self._said = self._shown = time.monotonic()
        self.sent = 0

    def tell(self, sent: int) -> None:
        """Take the bytes sent so far."""
        now = time.monotonic()
        self.sent = sent
        if now - self._shown >= SHOWN_SECONDS:
            self._shown = now
            self.show(self.line(now))
        if now - self._said >= self.every:
            self._said = now
            self.say(self.line(now))

    def line(self, now: float) -> str:
        """Write how far it is, how fast it goes, and how long it will take."""
        seconds = max(now - self.started, 1e-3)
        rate = self.sent / seconds
        left = (self.total - self.sent) / rate if rate else 0.0
        done = self.sent / self.total if self.total else 1.0
        size = f"{self.sent / MIB:.0f} of {self.total / MIB:.0f} MiB"
        return f"{size} ({done:.0%}), {rate / MIB:.1f} MiB/s, {left:.0f} s left"


def check(path: Path, file: ImageFile) -> None:
    """Check that an image file is what its record says, and nothing that a cloud refuses or should.

    Glance refuses some of this itself, but only after the whole upload and in words that help nobody; some it takes
    without complaint (an encrypted qcow2, a qcow2 that is declared raw).

    Raises:
        BakehouseError: it is not.
    """
    try:
        done = subprocess.run(
            ["qemu-img", "info", "--output=json", "-f", file.format, str(path)],
            capture_output=True, text=True, check=False, timeout=CHECK_SECONDS,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise BakehouseError("qemu-img is not installed", hint="apt-get install qemu-utils") from error
    except subprocess.TimeoutExpired as error:
        raise BakehouseError(
            f"qemu-img says nothing of {path} within {CHECK_SECONDS} s",
            hint="is its disk, or what is mounted, all right?",
        ) from error
    again = "bake it again: what is in the store was changed after its bake"
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:] or [""]
        raise BakehouseError(f"{path} is not a {file.format} file: {said[0]}", hint=again)
    found = json.loads(done.stdout)
    special = found.get("format-specific", {}).get("data", {})
    wrong = {
        f"it has a backing file, {found.get('backing-filename')}, which the cloud does not have": "backing-filename"
        in found,
        f"it keeps its data in another file, {special.get('data-file')}, which the cloud does not have": "data-file"
        in special,
        "it is encrypted, and no node could read it": bool(found.get("encrypted")),
        "it is marked as damaged": bool(special.get("corrupt")),
        f"the guest would see {found['virtual-size']} bytes, its record says {file.virtual_size}": found["virtual-size"]
        != file.virtual_size,
        "it has snapshots inside": bool(found.get("snapshots")),
    }
    for what, holds in wrong.items():
        if holds:
            hint = "`qemu-img convert` makes a whole file of it" if "backing" in what else again
            raise BakehouseError(f"{path} is not fit for a cloud: {what}", hint=hint)
    if file.format == "raw" and _begins_with(path, b"QFI\xfb"):
        raise BakehouseError(f"{path} is a qcow2 file, not a raw one", hint=again)


def _begins_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic
