"""Tasks that need root all the way: run again through sudo where we are somebody else."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

from platformdirs import user_state_path

from bakehouse import run
from bakehouse.cache import BaseCache
from bakehouse.container_image import Shelf
from bakehouse.settings import Settings

STATE = user_state_path("bakehouse")
"""Where running clusters are noted."""

LIFELINE = "BAKEHOUSE_LIFELINE"
"""Tells the second run that its standard input ends when the first one does."""

KEPT = (
    *run.PASSED_ON, "PATH", "REGISTRY_AUTH_FILE",
    "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME",
)  # fmt: skip
"""Variables that the second run gets, beside our own."""


def again_as_root(settings: Settings, words: list[str] | None = None, *, stdout: int | None = None) -> int | None:
    """Run this command line, or another one, as root, if we are not.

    What it writes into the store, the cache and STATE belongs to us afterwards. When we end, so does it: sudo would let
    it run on, but its standard input is a pipe from us.

    Args:
        settings: the site's settings, which hold for root too.
        words: a task and its flags; those that we were given by default.
        stdout: where it shall print to, a file descriptor; our standard output by default.

    Returns:
        The exit status of the second run; None where we are root and go on ourselves.

    Raises:
        BakehouseError: sudo is missing or asks for a password.
    """
    if os.geteuid() == 0:
        if os.environ.pop(LIFELINE, None):
            _end_with_standard_input()
        return None
    kept = {name: os.environ[name] for name in os.environ if name in KEPT or name.startswith("BAKEHOUSE_")}
    variables = [f"{name}={value}" for name, value in {**kept, LIFELINE: "1"}.items()]
    command = [*run.as_root(), "env", *variables, sys.executable, "-m", "invoke", *(words or sys.argv[1:])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stdout) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            # The terminal tells both of us: it has time to end what it does, unless it is told once more.
            with contextlib.suppress(KeyboardInterrupt):
                process.wait()
            status = _end(process)
        except run.Terminated:
            status = _end(process)
    if written := [place for place in (settings.store, settings.cache, STATE) if place.exists()]:
        # Files of images that are being made, or that later ones are made of, have the owners that they have in them.
        cache = BaseCache(settings.cache)
        run.give_back(*written, but=[Shelf(cache).storage, *cache.work.glob("*")])
    return status


def must_be_root(settings: Settings) -> None:
    """Go on as root. Where we are somebody else, a second run does the work, and we end with its status.

    Raises:
        BakehouseError: sudo is missing or asks for a password.
    """
    status = again_as_root(settings)
    if status is not None:
        raise SystemExit(status)


def _end(process: subprocess.Popen[bytes]) -> int:
    assert process.stdin is not None
    process.stdin.close()
    return process.wait()


def _end_with_standard_input() -> None:
    def watch() -> None:
        # Nobody writes to it: that it can be read means that it has ended.
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
