"""External programs: logged, streamed, ended with us, and, where they need root, kept in namespaces of their own."""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Self

from bakehouse import sandbox
from bakehouse.errors import BakehouseError

TAIL_LINES = 12
"""Lines of a program's output that an error shows."""

STOP_SECONDS = 10
"""How long a program has to end after SIGTERM before it gets SIGKILL."""

PASSED_ON = (
    "HOME LANG TERM TZ http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY "
    "SSL_CERT_FILE SSL_CERT_DIR CURL_CA_BUNDLE REQUESTS_CA_BUNDLE SOURCE_DATE_EPOCH"
).split()
"""Variables of the caller that reach a build. Others (DIB_* above all) would change images behind the digest's back."""


class Terminated(SystemExit):
    """SIGTERM arrived. Exit status 143, as a shell reports it."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into an exception, so that everything taken is given back."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Log:
    """The log of one build: a file, the last lines in memory, and whoever listens.

    Passwords inside addresses are blotted out before a line goes anywhere.

    Args:
        path: the file; lines are appended.
        listener: called with each line.
    """

    def __init__(self, path: Path, listener: Callable[[str], None] | None = None) -> None:
        self.path = path
        self.listener = listener or (lambda _line: None)
        self._tail: deque[str] = deque(maxlen=400)
        self._start = time.monotonic()
        self._file: IO[str] = path.open("a", encoding="utf-8", buffering=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, line: str) -> None:
        """Add a line."""
        line = redact(line.rstrip("\n"))
        self._tail.append(line)
        self._file.write(f"{time.monotonic() - self._start:8.2f} {line}\n")
        self.listener(line)

    def tail(self, count: int = TAIL_LINES) -> str:
        """Return the last lines."""
        return "\n".join([*self._tail][-count:]) if count else ""

    def recent(self) -> str:
        """Return what is kept in memory, for finding out why something failed."""
        return "\n".join(self._tail)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def redact(text: str) -> str:
    """Blot out the user and password part of addresses."""
    return re.sub(r"(?<=://)[^/\s]+@", "***@", text)


@dataclass(frozen=True)
class Took:
    """What an isolated command took."""

    peak_memory: int
    """Bytes."""
    cpu_seconds: float


class CommandError(BakehouseError):
    """A program failed."""

    def __init__(self, command: str, status: int, log: str) -> None:
        ended = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed with exit status {status}"
        super().__init__(f"{command} {ended}", log=log)
        self.status = status


def run(
    command: Sequence[str | Path],
    log: Log,
    *,
    environment: Mapping[str, str] | None = None,
    stop_seconds: float = STOP_SECONDS,
) -> None:
    """Run a program, its output going to the log.

    Args:
        command: the program and its arguments.
        log: takes its output.
        environment: its variables; ours by default.
        stop_seconds: how long it has to end after SIGTERM, where we are ended.

    Raises:
        CommandError: it failed; the error holds the last lines that it wrote.
    """
    words = [str(word) for word in command]
    log.write(f"$ {shlex.join(words)}")
    count = 0
    variables = dict(environment) if environment is not None else None
    with _started(words, variables, subprocess.DEVNULL, stop_seconds) as process:
        assert process.stdout is not None
        for line in process.stdout:
            count += 1
            log.write(line)
        status = process.wait()
    if status != 0:
        raise CommandError(Path(words[0]).name, status, log.tail(min(count, TAIL_LINES)))


class Isolation:
    """A place with mount and PID namespaces of its own, in which programs run as root. A context manager.

    Mounts made in it are seen by nobody else, and the kernel undoes them and ends all processes when the block ends or
    this process does, SIGKILL included.

    Args:
        log: takes the programs' output.
        memory_folder: an empty folder whose files shall be kept in memory; they are seen in this place only.
        memory_size: bytes that it may hold.
        network: the place has a network of its own, empty at first; else it has the host's.
    """

    def __init__(
        self, log: Log, *, memory_folder: Path | None = None, memory_size: int = 0, network: bool = False
    ) -> None:
        self.log = log
        self._network = network
        self._arguments = (
            ["--memory-folder", str(memory_folder), "--memory-size", str(memory_size)] if memory_folder else []
        )
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        namespaces = ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
        namespaces += ["--net", "--"] if self._network else ["--"]
        command = [*as_root(), "unshare", *namespaces, sys.executable, "-I", sandbox.__file__, *self._arguments]
        # Commands get their environment with each request: sudo would neither keep nor hide it.
        self._process = self._stack.enter_context(_started(command, None, subprocess.PIPE))
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all that runs in the place, and the place."""
        self._stack.close()

    @property
    def pid(self) -> int:
        """Process 1 of the place, as the host sees it. Needs root, and a command that has been run already."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[0])

    def run(self, command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> Took:
        """Run a program.

        Args:
            command: the program and its arguments.
            environment: variables beside those of PASSED_ON; nothing else of the caller's environment is seen.

        Raises:
            CommandError: it failed.
        """
        words = [str(word) for word in command]
        self.log.write(f"$ {shlex.join(words)}")
        request = {"command": words, "environment": build_environment(environment or {})}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        count = 0
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # What it said before it ended comes below.
        for line in self._process.stdout:
            # A program's last line need not end.
            said, mark, report = line.partition(sandbox.MARK)
            if said:
                count += 1
                self.log.write(said)
            if mark:
                took = json.loads(report)
                if took["status"] != 0:
                    tail = self.log.tail(min(count, TAIL_LINES))
                    raise CommandError(Path(words[0]).name, int(took["status"]), tail)
                return Took(int(took["peak_memory"]), float(took["cpu_seconds"]))
        raise CommandError("unshare", self._process.wait(), self.log.tail(min(count, TAIL_LINES)))


def isolated(command: Sequence[str | Path], log: Log, *, environment: Mapping[str, str]) -> Took:
    """Run one program in an Isolation of its own.

    Raises:
        CommandError: it failed.
    """
    with Isolation(log) as place:
        return place.run(command, environment)


def build_environment(more: Mapping[str, str]) -> dict[str, str]:
    """Return what a build sees of the caller's environment, and more."""
    path = ":".join([os.environ.get("PATH", ""), str(Path(sys.executable).parent), "/usr/sbin:/sbin:/usr/bin:/bin"])
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return {"LANG": "C.UTF-8", **passed, **more, "PATH": path}


def as_root() -> list[str]:
    """Return what to put before a command so that it runs as root: nothing where we are root.

    Raises:
        BakehouseError: sudo is missing or asks for a password.
    """
    if os.geteuid() == 0:
        return []
    probe = subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False) if shutil.which("sudo") else None
    if probe is None or probe.returncode != 0:
        raise BakehouseError(
            "building a root filesystem needs root, and sudo without a password is not to be had",
            hint="run as root, or let your user run sudo without a password (NOPASSWD) on this builder",
        )
    return ["sudo", "-n", "--"]


def give_back(*paths: Path, but: Sequence[Path] = ()) -> None:
    """Make files that root wrote belong to the user who runs us.

    Args:
        paths: files, and folders with all that is in them.
        but: what stays as it is, with all that is in it.
    """
    if os.geteuid() != 0:
        left: list[str] = []
        for path in but:
            left += ["-path", glob.escape(str(path)), "-prune", "-o"]
        chown = ["-exec", "chown", "-h", f"{os.getuid()}:{os.getgid()}", "--", "{}", "+"]
        subprocess.run([*as_root(), "find", *map(str, paths), *left, "-user", "root", *chown], check=True)


def remove_tree(path: Path) -> None:
    """Remove a folder that may hold files of root.

    Raises:
        BakehouseError: something is mounted in it (it is then left as it is), or it cannot be removed.
    """
    if not path.exists():
        return
    inside = str(path.resolve()) + "/"
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    # proc(5): blanks and backslashes in a path are written as three octal digits.
    mounts = [re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), line.split()[4]) for line in lines]
    busy = [mount for mount in mounts if f"{mount}/".startswith(inside)]
    if busy:
        raise BakehouseError(
            f"{path} cannot be removed: {', '.join(busy)} is mounted in it", hint=f"umount {' '.join(busy)}"
        )
    done = subprocess.run(
        [*as_root(), "rm", "-rf", "--one-file-system", "--", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise BakehouseError(f"{path} cannot be removed: {done.stderr.strip()}")


@contextmanager
def _started(
    command: Sequence[str], environment: dict[str, str] | None, stdin: int, stop_seconds: float = STOP_SECONDS
) -> Iterator[subprocess.Popen[str]]:
    """Start a program; it has ended when the block has."""
    try:
        process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise BakehouseError(f"{command[0]} is not installed", hint="`invoke doctor` says what to install") from error
    try:
        yield process
    finally:
        if process.poll() is None:
            _stop(process, stop_seconds)
        for pipe in (process.stdin, process.stdout):
            if pipe:
                with suppress(BrokenPipeError):
                    pipe.close()


def _stop(process: subprocess.Popen[str], seconds: float) -> None:
    """End a program: by closing its standard input where it is isolated, by signals otherwise."""
    if process.stdin:
        process.stdin.close()
    else:
        _signal(process, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    # Also those of its children that did not care for SIGTERM.
    _signal(process, signal.SIGKILL)
    process.wait()


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    # A sudo may not be signalled by who started it: it ends with its standard input.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
