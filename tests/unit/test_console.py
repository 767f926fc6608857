"""The console: every byte in the file, every line with the time at which it began."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bakehouse import waiting
from bakehouse.console import Console


class Wire:
    """A machine's end of its console."""

    def __init__(self, folder: Path) -> None:
        reading, self._writing = os.pipe()
        self.console = Console(os.fdopen(reading, "rb"), folder / "console.log")
        self._open = True

    def say(self, piece: bytes) -> None:
        """Say something, and wait until it stands in the file."""
        before = len(self.console.path.read_bytes())
        os.write(self._writing, piece)
        self.until(lambda: len(self.console.path.read_bytes()) == before + len(piece))

    def until(self, fact: Callable[[], bool]) -> None:
        waiting.until("line", fact, 5, poll=0.001)

    def texts(self) -> list[str]:
        return [line.text for line in self.console.lines]

    def hang_up(self) -> None:
        if self._open:
            os.close(self._writing)
            self._open = False
        self.console.end(5)


@pytest.fixture
def wire(tmp_path: Path) -> Iterator[Wire]:
    made = Wire(tmp_path)
    yield made
    made.hang_up()


def test_lines_come_whole_whatever_the_pieces(wire: Wire) -> None:
    for piece in (b"Linux ", b"version\r\nRun /in", b"it\r\n", b"\r\n", b"last\n"):
        wire.say(piece)
    wire.until(lambda: wire.texts() == ["Linux version", "Run /init", "", "last"])
    assert wire.console.text() == "Linux version\nRun /init\n\nlast\n"


def test_a_prompt_is_there_although_its_line_has_not_ended(wire: Wire) -> None:
    wire.say(b"hello\nnode-1 login: ")
    wire.until(lambda: wire.texts() == ["hello", "node-1 login: "])
    wire.say(b"root\n")
    wire.until(lambda: wire.texts() == ["hello", "node-1 login: root"])


def test_a_line_has_the_time_of_its_first_byte(wire: Wire) -> None:
    begun = time.monotonic()
    wire.say(b"slow ")
    wire.until(lambda: wire.texts() == ["slow "])
    first = wire.console.lines[0].at
    assert begun <= first <= time.monotonic()
    time.sleep(0.02)
    between = time.monotonic()
    wire.say(b"line\nnext\n")
    wire.until(lambda: wire.texts() == ["slow line", "next"])
    assert wire.console.lines[0].at == first
    assert wire.console.lines[1].at >= between


def test_a_line_is_found_by_a_pattern_and_by_where_the_search_begins(wire: Wire) -> None:
    wire.say(b"agent: joined\nreboot\nagent: joined\nlogin: ")
    wire.until(lambda: len(wire.texts()) == 4)
    first, again = wire.console.find("joined"), wire.console.find("joined", 1)
    assert first is not None
    assert again is not None
    assert (first[0], again[0], again[1].text) == (0, 2, "agent: joined")
    assert wire.console.find("joined", 3) is None
    assert wire.console.find("log.n", 3) is not None
    assert wire.console.find("joined", 99) is None


def test_bytes_that_are_no_text_do_no_harm(wire: Wire) -> None:
    wire.say(b"\xff\xfe\x00\x1b[2J firmware\n")
    wire.until(lambda: len(wire.texts()) == 1)
    assert "firmware" in wire.texts()[0]
    assert wire.console.find("firmware") is not None
    assert wire.console.path.read_bytes() == b"\xff\xfe\x00\x1b[2J firmware\n"


def test_an_old_console_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "console.log").write_text("of an earlier boot\n")
    wire = Wire(tmp_path)
    wire.say(b"new\n")
    wire.hang_up()
    assert wire.console.text() == "new\n"


def test_what_was_said_last_is_there_when_the_machine_has_ended(wire: Wire) -> None:
    wire.say(b"reboot: Power down")
    wire.hang_up()
    assert wire.texts() == ["reboot: Power down"]
