"""Locks between processes that say who holds them. The kernel frees them when their holder ends, however it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from bakehouse.errors import BakehouseError


@contextmanager
def held(
    path: Path,
    what: str,
    *,
    wait: bool,
    say: Callable[[str], None],
    hint: str = "wait for it, or leave out --no-wait",
) -> Iterator[None]:
    """Hold a lock.

    Args:
        path: the lock file; who holds it stands beside it.
        what: what it protects, for messages, such as "the bake of slurm".
        wait: wait for whoever holds it, saying so once.
        say: takes that message.
        hint: what to do where we do not wait.

    Raises:
        BakehouseError: somebody else holds it and we do not wait.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    holder = path.with_suffix(".holder")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = holder.read_text().strip() if holder.is_file() else "another process"
        if not wait:
            raise BakehouseError(f"{what} is held by {who}", hint=hint) from None
        say(f"waiting for {what}, held by {who}")
        lock.acquire()
    try:
        holder.write_text(f"process {os.getpid()} since {time.strftime('%H:%M:%S')}\n")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
