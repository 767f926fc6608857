"""A machine's serial console: kept in a file, with the time at which each line came."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import IO, NamedTuple


class ConsoleLine(NamedTuple):
    """One line."""

    at: float
    """When its first byte came: seconds of the host's monotonic clock."""
    text: str


class Console:
    """Reads what a machine says, in a thread that ends when the machine does.

    Args:
        stream: what to read.
        path: the file to copy it to.
    """

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        self.path = path
        self.path.write_bytes(b"")
        self._lines: list[ConsoleLine] = []
        self._unfinished = (0.0, b"")
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._read, args=(stream,), name="console", daemon=True)
        self._thread.start()

    def _read(self, stream: IO[bytes]) -> None:
        with self.path.open("ab", buffering=0) as file:
            # read1() gives what is there; read() would wait for more.
            while piece := stream.read1(65536):  # type: ignore[attr-defined]
                now = time.monotonic()
                file.write(piece)
                with self._lock:
                    self._take(now, piece)
        stream.close()

    def _take(self, now: float, piece: bytes) -> None:
        begun, rest = self._unfinished
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            self._lines.append(_line(begun or now, line))
            begun = 0.0
        self._unfinished = (begun or now, rest) if rest else (0.0, b"")

    @property
    def lines(self) -> list[ConsoleLine]:
        """The lines so far. The last one may not have ended: a prompt does not."""
        with self._lock:
            begun, rest = self._unfinished
            return [*self._lines, *([_line(begun, rest)] if rest else [])]

    def text(self) -> str:
        """Return all of it so far."""
        return self.path.read_text(errors="replace")

    def find(self, pattern: str, start: int = 0) -> tuple[int, ConsoleLine] | None:
        """Return the first line in which a pattern is found, and its number.

        Args:
            pattern: a regular expression.
            start: the number of the line to begin with.
        """
        for number, line in enumerate(self.lines[start:], start):
            if re.search(pattern, line.text):
                return number, line
        return None

    def end(self, seconds: float) -> None:
        """Wait for the end of what the machine said, after it has ended."""
        self._thread.join(seconds)


def _line(at: float, line: bytes) -> ConsoleLine:
    return ConsoleLine(at, line.decode(errors="replace").rstrip("\r"))
