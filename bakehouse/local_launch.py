"""Launches on this host: a cluster in a private network, and machines that join it, kept by a process of their own.

A launch is a folder, and its keeper (see local_keeper) holds a lock on it. The kernel frees the lock when the keeper
ends, however it ends, and with the keeper goes all that it started. So a number of a process is trusted only as long as
the lock is held: after a crash or a power loss no other process of that number is ever taken for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from platformdirs import user_state_path
from pydantic import BaseModel, ConfigDict, ValidationError

from bakehouse import REPOSITORY, machine, waiting
from bakehouse import launch as launches
from bakehouse.cache import write_atomically
from bakehouse.errors import BakehouseError
from bakehouse.slurm import Authentication
from bakehouse.timeline import Timeline
from bakehouse.waiting import TooLateError

NOTE = "launch.json"
SAID = "keeper.err"

STAGES = ("cluster", "machines", "joined")

STAGE_SECONDS = 900.0
"""How long a stage may take, the time for the join left out: the path bootstrap installs a package mirror first."""

END_SECONDS = 30.0

POLL_SECONDS = 0.2


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Node(_Part):
    """A machine that runs."""

    name: str
    address: str
    accelerator: str
    """kvm or tcg (emulation)."""
    ssh: tuple[str, ...]
    """The command that logs in, as root of this host."""


class Problem(_Part):
    """What a BakehouseError said."""

    message: str
    hint: str
    log: str


class LocalLaunch(_Part):
    """Nodes that are, or come, up on this host."""

    name: str
    platform: str
    """The manifest's name."""
    path: str
    tag: str
    """Of the image that the nodes boot."""
    controller_tag: str
    """Of the image that the controller runs from."""
    nodes: tuple[str, ...]
    authentication: Authentication
    until: str
    join_seconds: float
    since: str
    keeper: int = 0
    """The process that keeps it; 0 where it has not begun. It may have ended: see the lock."""
    controller: tuple[str, ...] = ()
    """What to put before a command so that it runs on the controller, as root of this host."""
    running: tuple[Node, ...] = ()
    done: tuple[str, ...] = ()
    """Of the stages."""
    problem: Problem | None = None

    @property
    def folder(self) -> Path:
        """Where its note, its key, its consoles and timelines are."""
        return folder() / self.name

    @property
    def stages(self) -> list[str]:
        """The stages that it goes through."""
        return [stage for stage in STAGES if stage != "joined" or self.until == "joined"]

    def write(self) -> None:
        """Write the note."""
        write_atomically(self.folder / NOTE, self.model_dump_json(indent=1))

    def timelines(self) -> dict[str, Timeline]:
        """Return the timelines of its nodes that have joined."""
        files = {node: self.folder / launches.timeline_name(node) for node in self.nodes}
        return {node: Timeline.model_validate_json(file.read_text()) for node, file in files.items() if file.exists()}


def folder() -> Path:
    """Return where the launches of this host are."""
    return user_state_path("bakehouse") / "machines"


def names() -> list[str]:
    """Return the names of all launches, also of those of which only files are left."""
    return sorted(path.name for path in folder().glob("*/"))


def read(name: str) -> LocalLaunch | None:
    """Return a launch; None where it is not noted."""
    try:
        return LocalLaunch.model_validate_json((folder() / name / NOTE).read_text())
    except (OSError, ValidationError):
        return None


def is_running(name: str) -> bool:
    """Say whether a launch has a keeper."""
    with contextlib.suppress(FileNotFoundError), _lock(name) as lock:
        return not _take(lock)
    return False


# Up.


@contextlib.contextmanager
def up(launch: LocalLaunch, tell: Callable[[str], None], *, keep: bool) -> Iterator[subprocess.Popen[bytes]]:
    """Start a launch's keeper, which goes on when the block has ended. Where the block fails, all of it is ended.

    Args:
        launch: what shall come up.
        tell: takes a line about what happens when the block fails.
        keep: leave what fails, to look at. What is told to end is ended all the same.

    Raises:
        BakehouseError: there is a launch of this name.
    """
    folder().mkdir(parents=True, exist_ok=True)
    try:
        launch.folder.mkdir(mode=0o700)
    except FileExistsError:
        raise BakehouseError(
            f"there is a launch '{launch.name}' on this host already, or what was left of one",
            hint=f"`invoke down --on qemu --name {launch.name}`, or another --name",
        ) from None
    try:
        yield _start(launch)
    except BaseException as error:
        by_hand = f"`invoke down --on qemu --name {launch.name}`"
        if keep and isinstance(error, BakehouseError):
            tell(f"left as it is, since --keep was given: {by_hand} ends it")
            raise
        tell(f"ending what was started for {launch.name} ...")
        try:
            down(launch.name)
        except BaseException:
            tell(f"not all of it was ended: {by_hand} does it")
            raise
        tell("nothing of it is left")
        raise


def _start(launch: LocalLaunch) -> subprocess.Popen[bytes]:
    launch.write()
    with _lock(launch.name) as lock, (launch.folder / SAID).open("wb") as said:
        if not _take(lock):
            # Without it a keeper would be taken for one that has ended.
            raise BakehouseError(f"`invoke down` looks at '{launch.name}' just now", hint="try it again")
        # The lock is the open file's: it is the keeper's alone when we close ours.
        return subprocess.Popen(
            [sys.executable, "-m", "bakehouse.local_keeper", launch.name],
            stdin=subprocess.DEVNULL, stdout=said, stderr=said, pass_fds=[lock], start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip


def wait(launch: LocalLaunch, stage: str, keeper: subprocess.Popen[bytes]) -> LocalLaunch:
    """Wait until a stage is done. Return the launch as it is then.

    Raises:
        BakehouseError: what the keeper met, or it has ended.
    """

    def now() -> LocalLaunch:
        found = read(launch.name)
        if found is None:
            raise BakehouseError(f"'{launch.name}' is gone", hint="`invoke down` ended it meanwhile")
        return found

    def check() -> None:
        ended = keeper.poll() is not None
        problem = now().problem
        if problem:
            raise BakehouseError(problem.message, hint=problem.hint, log=problem.log)
        if ended:
            said = (launch.folder / SAID).read_text(errors="replace")
            raise BakehouseError(f"what keeps '{launch.name}' has ended", log=said[-3000:])

    seconds = STAGE_SECONDS + launch.join_seconds
    waiting.until(stage, lambda: stage in now().done, seconds, poll=POLL_SECONDS, check=check)
    return now()


# Down.


def down(name: str) -> None:
    """End a launch where it runs, and remove what is left of it. Once more does no harm.

    Args:
        name: of the launch.

    Raises:
        BakehouseError: it does not end.
    """
    with contextlib.suppress(FileNotFoundError), _lock(name) as lock:
        if not _ended(name, lock, signal.SIGTERM) and not _ended(name, lock, signal.SIGKILL):
            raise BakehouseError(f"'{name}' does not end", hint=f"its files are in {folder() / name}")
        shutil.rmtree(folder() / name, ignore_errors=True)
    machine.remove_left()


def _ended(name: str, lock: int, number: signal.Signals) -> bool:
    """Signal the keeper, where there is one, and say whether it has ended."""
    try:
        waiting.until("keeper", lambda: _take(lock) or _signal(name, lock, number), END_SECONDS, poll=POLL_SECONDS)
        waiting.until("end", lambda: _take(lock), END_SECONDS, poll=POLL_SECONDS)
    except TooLateError:
        return False
    return True


def _signal(name: str, lock: int, number: signal.Signals) -> bool:
    """Signal the keeper, and say whether it was there to be signalled: one that has just begun has no note yet."""
    found = read(name)
    if found is None or not found.keeper:
        return False
    try:
        handle = os.pidfd_open(found.keeper)
    except ProcessLookupError:
        return False
    try:
        # The handle is of the keeper, and not of a later process of that number, if the lock is held even now.
        if not _take(lock):
            signal.pidfd_send_signal(handle, number)
    finally:
        os.close(handle)
    return True


@contextlib.contextmanager
def _lock(name: str) -> Iterator[int]:
    """Open a launch's lock, which is its folder."""
    lock = os.open(folder() / name, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield lock
    finally:
        os.close(lock)


def _take(lock: int) -> bool:
    """Take a lock, and say whether that could be."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
