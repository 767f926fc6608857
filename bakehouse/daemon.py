"""Services that outlive the command that started them. A note beside a service's log says which process it is."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bakehouse import process, waiting
from bakehouse.cache import write_atomically
from bakehouse.errors import BakehouseError

UP_SECONDS = 120
DOWN_SECONDS = 20


@dataclass(frozen=True)
class Process:
    """A service that runs."""

    pid: int
    started: int
    """In ticks since the host's boot (proc(5)): process numbers are used again."""

    @property
    def running(self) -> bool:
        """Whether it is still there."""
        return self.started > 0 and process.started(self.pid) == self.started


@dataclass(frozen=True)
class Daemon:
    """A service, running or not."""

    name: str
    folder: Path
    """Where its log is, and the note of its process."""
    address: str
    """What answers by HTTP when it is up."""

    @property
    def log(self) -> Path:
        """What it writes, where it has a log of its own."""
        return self.folder / f"{self.name}.log"

    @property
    def said(self) -> Path:
        """What it says on its output."""
        return self.folder / f"{self.name}.err"

    def process(self) -> Process | None:
        """Return its process, where it runs."""
        try:
            found = Process(**json.loads(self._note.read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return found if found.running else None

    @property
    def _note(self) -> Path:
        return self.folder / f"{self.name}.json"

    def start(self, command: Sequence[str | Path], environment: Mapping[str, str], *, tied: bool = False) -> None:
        """Start it, if it does not run, and wait until it answers.

        Args:
            command: the program and its arguments.
            environment: its variables.
            tied: it ends together with who started it.

        Raises:
            BakehouseError: it does not come up.
        """
        if self.process():
            return
        tie = ["setpriv", "--pdeathsig", "TERM"] if tied else []
        with self.said.open("wb") as said:
            child = subprocess.Popen(
                [*tie, *command], stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment,
                start_new_session=True,
            )  # fmt: skip
        write_atomically(self._note, json.dumps(dataclasses.asdict(Process(child.pid, process.started(child.pid)))))

        def ended() -> None:
            if child.poll() is not None:
                see = self.log if self.log.exists() else self.said
                raise BakehouseError(f"{self.name} does not start", hint=f"see {see}", log=self._last_words())

        try:
            waiting.until(
                self.name, lambda: answers(self.address), UP_SECONDS, poll=0.1, check=ended,
                last_words=self._last_words,
            )  # fmt: skip
        except BaseException:
            self.stop(signal.SIGKILL)
            raise
        # It shall outlive this object, which would complain of that.
        child.returncode = 0

    def _last_words(self) -> str:
        texts = [path.read_text(errors="replace") for path in (self.said, self.log) if path.exists()]
        return "\n".join(line for text in texts for line in text.splitlines()[-12:])

    def stop(self, how: signal.Signals = signal.SIGTERM) -> bool:
        """End it. Return whether it ran.

        Args:
            how: SIGTERM or SIGKILL.
        """
        found = self.process()
        if found is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(found.pid, how)
        try:
            waiting.until(f"end of {self.name}", lambda: not found.running, DOWN_SECONDS, poll=0.05)
        except BakehouseError:
            with contextlib.suppress(ProcessLookupError):
                os.kill(found.pid, signal.SIGKILL)
            waiting.until(f"end of {self.name}", lambda: not found.running, DOWN_SECONDS, poll=0.05)
        self._note.unlink(missing_ok=True)
        _reap(found.pid)
        return True


def answers(url: str) -> bool:
    """Say whether something answers at an address, on this host: no proxy is asked."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as answer:
            return bool(answer.status)
    except urllib.error.HTTPError as error:
        # 300: several versions to choose from.
        return error.code < 500  # noqa: PLR2004 - RFC 9110
    except OSError:
        return False


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback that nobody listens at."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [made.getsockname()[1] for made in sockets]
    for made in sockets:
        made.close()
    return ports


def _reap(pid: int) -> None:
    """Take note of a child's end, where it is one of ours."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return
