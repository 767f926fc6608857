"""Publishes an image, and is killed or meets a fault at a chosen point. Run by test_publish.py, never by pytest.

python publish_and_die.py POINT TAG
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from bakehouse import cli_cloud, publish, upload
from bakehouse.glance import Glance


def die(*_: object, **__: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def and_die(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **named: Any) -> NoReturn:
        function(*arguments, **named)
        die()

    return run


class HalfWay(upload.FileChunks):
    """Does something at half of the way, once in all."""

    act: Callable[[], object]
    done = False

    def __iter__(self) -> Iterator[bytes]:
        sent = 0
        for piece in super().__iter__():
            yield piece
            sent += len(piece)
            if sent >= len(self) // 2 and not HalfWay.done:
                HalfWay.done = True
                type(self).act()


def say_and_wait() -> None:
    """Tell the test that it may act, and wait until it has."""
    sign = Path("half-way")
    sign.touch()
    deadline = time.monotonic() + 60
    while sign.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def arm(point: str) -> None:
    if point == "created":
        Glance.create = and_die(Glance.create)  # type: ignore[method-assign]
    elif point in {"half", "wait"}:
        HalfWay.act = staticmethod(die if point == "half" else say_and_wait)
        upload.FileChunks = HalfWay  # type: ignore[misc]
    elif point == "sent":
        Glance.upload = and_die(Glance.upload)  # type: ignore[method-assign]
    elif point == "compared":
        publish.Job._show = die  # type: ignore[method-assign]
    elif point == "shown":
        publish.Job._show = and_die(publish.Job._show)  # type: ignore[method-assign]
    else:
        raise SystemExit(f"no such point: {point}")


if __name__ == "__main__":
    arm(sys.argv[1])
    cli_cloud.publish(sys.argv[2], cloud="", region="", visibility="", file_format="", dry_run=False, as_json=False)
