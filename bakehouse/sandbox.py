"""The first process of an isolated place: when it ends, the kernel ends everything in it.

Runs as process 1 of a new PID namespace with a mount namespace of its own (see run.Isolation), and runs commands that
it is told of on standard input, a line of JSON each: ``{"command": [...], "environment": {...}}``. Their output goes to
its standard output; after each comes MARK and a line of JSON: ``{"status": 0, "peak_memory": 1, "cpu_seconds": 1}``.

Standard input is also a lifeline: when the caller ends, in whatever way, the pipe closes, this process exits, and with
it go all processes and mounts. Standard library only, since it may run under sudo.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 0.25
"""How often memory is measured."""

MARK = "\0ended "
"""Stands after a command's output. No program writes it by chance."""

NOT_STARTED = 127


def resident_bytes(memory_folder: Path | None) -> int:
    """Return the memory in use here, in bytes: all processes but this one, and files that are kept in memory."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and folder.name != "1":
            try:
                total += int((folder / "statm").read_text().split()[1]) * page
            except (OSError, IndexError, ValueError):
                continue  # It ended meanwhile.
    if memory_folder:
        usage = os.statvfs(memory_folder)
        total += (usage.f_blocks - usage.f_bfree) * usage.f_frsize
    return total


def run(request: dict[str, Any], memory_folder: Path | None) -> dict[str, Any] | None:
    """Run one command. Return what it took, or None where the caller went away meanwhile."""
    try:
        process = subprocess.Popen(request["command"], stdin=subprocess.DEVNULL, env=request["environment"])
    except OSError as error:
        print(f"{request['command'][0]}: {error.strerror}", flush=True)
        return {"status": NOT_STARTED, "peak_memory": 0, "cpu_seconds": 0.0}
    before = cpu_seconds()
    poll = select.poll()
    poll.register(0, select.POLLIN | select.POLLHUP)
    ended = os.pidfd_open(process.pid)
    poll.register(ended, select.POLLIN)
    peak = 0
    try:
        while process.poll() is None:
            # The caller sends nothing while a command runs: anything on standard input is its end.
            if 0 in [descriptor for descriptor, _ in poll.poll(SAMPLE_SECONDS * 1000)]:
                return None
            peak = max(peak, resident_bytes(memory_folder))
    finally:
        os.close(ended)
    status = process.returncode if process.returncode >= 0 else 128 - process.returncode
    return {"status": status, "peak_memory": peak, "cpu_seconds": cpu_seconds() - before}


def cpu_seconds() -> float:
    """Return the CPU seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    """Run commands until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--memory-folder", type=Path, help="a folder whose files shall be kept in memory")
    parser.add_argument("--memory-size", type=int, help="bytes that it may hold")
    arguments = parser.parse_args()
    if arguments.memory_folder:
        options = f"size={arguments.memory_size},mode=755"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", arguments.memory_folder], check=True)
    # Unbuffered: what is read ahead would not be seen by poll().
    with os.fdopen(0, "rb", buffering=0, closefd=False) as requests:
        while line := requests.readline():
            took = run(json.loads(line), arguments.memory_folder)
            if took is None:
                break
            print(f"{MARK}{json.dumps(took)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
