"""The first process of an isolated command: when it ends, the kernel ends everything below it.

Runs as process 1 of a new PID namespace with a mount namespace of its own (see run.isolated). Its standard input is a
pipe that the caller holds open: when the caller ends, in whatever way, the pipe closes, this process exits, and with it
go all processes and mounts of the command. Standard library only, since it may run under sudo.
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

SAMPLE_SECONDS = 0.25
"""How often memory is measured."""
ABANDONED = 125
"""Exit status when the caller went away."""


def resident_bytes() -> int:
    """Return the resident memory of all processes of this namespace but this one, in bytes."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and folder.name != "1":
            try:
                total += int((folder / "statm").read_text().split()[1]) * page
            except (OSError, IndexError, ValueError):
                continue  # It ended meanwhile.
    return total


def main() -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--path", required=True, help="PATH for the command (sudo resets it)")
    parser.add_argument("--report", type=Path, help="where to write what the command took")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    os.environ["PATH"] = arguments.path
    try:
        process = subprocess.Popen(arguments.command, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"{arguments.command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    poll = select.poll()
    poll.register(0, select.POLLIN | select.POLLHUP)
    ended = os.pidfd_open(process.pid)
    poll.register(ended, select.POLLIN)
    peak = 0
    while process.poll() is None:
        ready = [descriptor for descriptor, _ in poll.poll(SAMPLE_SECONDS * 1000)]
        if 0 in ready and not os.read(0, 1):
            return ABANDONED
        peak = max(peak, resident_bytes())
    if arguments.report:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        report = {"peak_memory": peak, "cpu_seconds": used.ru_utime + used.ru_stime}
        arguments.report.write_text(json.dumps(report))
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


if __name__ == "__main__":
    sys.exit(main())
