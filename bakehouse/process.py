"""Telling a process from a later one with the same number."""

from __future__ import annotations

from pathlib import Path


def started(pid: int) -> int:
    """Return when a process started, in ticks since the host's boot (proc(5)); -1 where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1
    return -1 if fields[0] in "ZX" else int(fields[19])
