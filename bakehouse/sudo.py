"""Tasks that need root all the way: run again through sudo where we are somebody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

from bakehouse import run
from bakehouse.settings import Settings

LIFELINE = "BAKEHOUSE_LIFELINE"
"""Tells the second run that its standard input ends when the first one does."""

KEPT = ("HOME", "LANG", "TERM", "PATH", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME")


def again_as_root(settings: Settings, words: list[str] | None = None) -> int | None:
    """Run this command line, or another one, as root, if we are not.

    What it writes into the store and the cache belongs to us afterwards. When we end, so does it: sudo would let it run
    on, but its standard input is a pipe from us.

    Args:
        settings: the site's settings, which hold for root too.
        words: a task and its flags; those that we were given by default.

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
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            status = process.wait()
        except (KeyboardInterrupt, run.Terminated):
            assert process.stdin is not None
            process.stdin.close()
            status = process.wait()
    if written := [place for place in (settings.store, settings.cache) if place.exists()]:
        run.give_back(*written)
    return status


def _end_with_standard_input() -> None:
    def watch() -> None:
        # Nobody writes to it: that it can be read means that it has ended.
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
