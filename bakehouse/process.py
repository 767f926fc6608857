"""Telling a process from a later one with the same number."""

from __future__ import annotations

from pathlib import Path


def started(pid: int) -> int:
    """Return when a process started, in ticks since the host's boot (proc(5)); -1 where it has ended.

    One whose first thread has ended has not while another thread runs, and holds its files and ports.
    """
    folder = Path(f"/proc/{pid}")
    try:
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        ended = fields[0] in "ZX" and len([*(folder / "task").iterdir()]) <= 1
    except OSError:
        return -1
    return -1 if ended else int(fields[19])
