"""The console log of a server on a cloud, asked for now and then, as the console of a machine that is listened to.

Nova gives the end of the log (libvirt's driver: 100 KiB), as a whole each time. What is new in it goes through a pipe
to the same reader that listens to QEMU; so a line's time is when we saw it, up to one pause later than it was said.
"""

from __future__ import annotations

import os
import time
from http import HTTPStatus
from pathlib import Path

from bakehouse.cloud import Cloud, CloudError
from bakehouse.console import Console, ConsoleLine

POLL_SECONDS = 3.0
"""Between two looks at a console. Each is a request to Nova and one of Nova to the hypervisor."""

ANCHOR = 400
"""Characters by which the place of an answer in the one before is found."""

NOT_READY = HTTPStatus.CONFLICT

NEVER_COMES = {HTTPStatus.BAD_REQUEST, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND, HTTPStatus.NOT_IMPLEMENTED}
"""What clouds without a console log answer (Nova: os-getConsoleOutput), or one's role does not allow."""


class ServerConsole:
    """What a server said on its serial console. A context manager.

    Args:
        cloud: where it runs.
        server: its id.
        path: the file to copy it to.
    """

    def __init__(self, cloud: Cloud, server: str, path: Path) -> None:
        self.cloud = cloud
        self.server = server
        self.silent = ""
        """Why the cloud gives no console log; empty as long as it may."""
        self._before = ""
        self._asked = -POLL_SECONDS
        reading, self._writing = os.pipe()
        self._console = Console(os.fdopen(reading, "rb"), path)

    def close(self) -> None:
        """Stop listening."""
        if self._writing >= 0:
            os.close(self._writing)
            self._writing = -1
            self._console.end(1)

    @property
    def lines(self) -> list[ConsoleLine]:
        """The lines so far."""
        return self._console.lines

    def find(self, pattern: str, start: int = 0) -> tuple[int, ConsoleLine] | None:
        """Return the first line in which a pattern is found, and its number."""
        return self._console.find(pattern, start)

    def text(self) -> str:
        """Return all of it so far."""
        return self._console.text()

    def poll(self) -> None:
        """Ask for what was said since the last look, where that was long enough ago.

        Raises:
            CloudError: the cloud does not answer.
        """
        if self.silent or time.monotonic() - self._asked < POLL_SECONDS:
            return
        body: dict[str, object] = {"os-getConsoleOutput": {}}
        try:
            answer = self.cloud.request(
                "POST", f"/servers/{self.server}/action", service="compute", json=body, ok=(200,),
                what="reading the console log",
            )  # fmt: skip
        except CloudError as error:
            if error.status in NEVER_COMES:
                self.silent = error.reason or error.message
            elif error.status != NOT_READY:
                raise
        else:
            self._take(answer.json()["output"] or "")
        self._asked = time.monotonic()

    def _take(self, now: str) -> None:
        new = news(self._before, now)
        if new is None:
            # More was said between two looks than the cloud keeps.
            new = f"\n{now}"
        self._before = now
        data = new.encode(errors="replace")
        while data:
            data = data[os.write(self._writing, data) :]


def news(before: str, now: str) -> str | None:
    """Return what an answer says beyond the one before: both are the end of the same log.

    Returns:
        The new text; None where the two do not overlap, so that something between is lost.
    """
    if not before:
        return now
    if not now:
        # Some hypervisors begin the log anew, and some answer nothing for a moment.
        return ""
    anchor = now[:ANCHOR]
    place = before.find(anchor)
    while place >= 0:
        known = before[place:]
        if now.startswith(known):
            return now[len(known) :]
        place = before.find(anchor, place + 1)
    # An answer shorter than the anchor, or one whose beginning the log before did not hold in full.
    for length in range(min(len(before), len(now), ANCHOR), 0, -1):
        if now.startswith(before[-length:]):
            return now[length:]
    return None
