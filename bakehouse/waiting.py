"""Waiting for facts, not for time to pass."""

from __future__ import annotations

import time
from collections.abc import Callable

from bakehouse.errors import BakehouseError


class TooLateError(BakehouseError):
    """Something did not come to hold within its time."""


def until(
    what: str,
    fact: Callable[[], bool],
    seconds: float,
    *,
    poll: float = 1.0,
    check: Callable[[], object] = lambda: None,
    last_words: Callable[[], str] = lambda: "",
) -> None:
    """Wait until something holds.

    Args:
        what: what is waited for, for the error.
        fact: says whether it holds.
        seconds: how long at most.
        poll: seconds between two looks.
        check: called while waiting; raises where it cannot come to hold any more.
        last_words: what an error shows below itself, such as the end of a log.

    Raises:
        TooLateError: it did not come to hold.
    """
    deadline = time.monotonic() + seconds
    while not fact():
        check()
        if time.monotonic() > deadline:
            raise TooLateError(
                f"no {what} within {seconds:.0f} s",
                hint="the last lines of what was said are above; a busy host may need more time",
                log=last_words(),
            )
        time.sleep(poll)
