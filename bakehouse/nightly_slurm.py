"""The bakes of a night spread over a Slurm cluster: one array job, one task an image.

The builders share the folders of images, cache and nights (settings ``store``, ``cache``, ``nights``) and this
checkout, at the same paths. Where a task runs, when, and whether it is tried again after its node has failed, is
Slurm's.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bakehouse import REPOSITORY
from bakehouse.cache import write_atomically
from bakehouse.errors import BakehouseError
from bakehouse.night import JOB_FILE, Stage
from bakehouse.nightly import Site, Work

POLL_SECONDS = 3.0
LONGEST_SECONDS = 16 * 3600.0
"""How long tasks may wait and run: one that is held for ever must not hold up the next night."""

PATIENCE_SECONDS = 600.0
"""How long a controller that does not answer is waited for."""


class SlurmExecutor:
    """Bakes in tasks of an array job."""

    name = "slurm"

    def resume(self, site: Site, night: str) -> None:
        """Wait for the tasks that a night had submitted when it was killed."""
        folder = site.book.folder(night)
        if job := _known(folder) or _of_name(night):
            site.say(f"Slurm job {job}, which was submitted before the night was killed, is waited for")
            _wait_for(job, folder)

    def make(self, site: Site, works: list[Work]) -> None:
        """Bake and verify what needs to be, and wait for the end of all tasks.

        Raises:
            BakehouseError: there is no Slurm here, or it takes no job.
        """
        waiting = [work for work in works if not work.image.finished]
        if not waiting:
            return
        night = waiting[0].night
        folder = site.book.folder(night)
        job = _submit(site, night, [work.image.name for work in waiting], folder)
        site.say(f"Slurm job {job}: {', '.join(work.image.name for work in waiting)}")
        states = _wait_for(job, folder)
        for number, work in enumerate(waiting):
            work.image = site.book.image(night, work.image.name)
            if not work.image.finished and not work.image.stage("verify"):
                _lost(work, states.get(number, ""), folder / f"slurm-{job}_{number}.log")


def _wait_for(job: str, folder: Path) -> dict[int, str]:
    """Wait for a job's end, and return how its tasks ended. Whoever ends us ends them."""
    try:
        _wait(job)
    except BaseException:
        # Where that does not reach the controller, the next night finds the job again.
        with contextlib.suppress(BakehouseError):
            _cancel(job, folder)
        raise
    states = _states(job)
    with contextlib.suppress(BakehouseError):
        # Tasks that wait for something that does not come. Where all have ended, that is an error.
        _ask(["scancel", job])
    (folder / JOB_FILE).unlink(missing_ok=True)
    return states


def _cancel(job: str, folder: Path) -> None:
    """End a job."""
    _ask(["scancel", job])
    (folder / JOB_FILE).unlink(missing_ok=True)


def _of_name(night: str) -> str:
    """Return the job of a night whose number was not written down, since the night was killed just then."""
    with contextlib.suppress(BakehouseError):
        told = _ask(["squeue", "--noheader", f"--name={_name(night)}", "--me", "--format=%F"])
        return next(iter(told.split()), "")
    return ""


def _name(night: str) -> str:
    return f"bakehouse-{night}"


def _lost(work: Work, state: str, log: Path) -> None:
    """Write down that a task ended without saying how."""
    text = f"its Slurm task ended without a result{f' ({state})' if state else ''}"
    with contextlib.suppress(OSError):
        lines = log.read_text(errors="replace").strip().splitlines()
        text += f": {lines[-1]}" if lines else ""
    stages = (*work.image.stages, Stage(name="bake", result="failed", seconds=0, detail=f"{text}\nits log: {log}"))
    work.note(state="failed", finished=True, stages=stages, log=str(log) if log.exists() else "")
    work.need(text)


def _submit(site: Site, night: str, names: Sequence[str], folder: Path) -> str:
    if shutil.which("sbatch") is None:
        raise BakehouseError("this host has no sbatch", hint="apt install slurm-client, or --executor local")
    script = folder / "bakes.sh"
    lines = ["#!/bin/bash", f"names=({' '.join(map(shlex.quote, names))})"]
    if config := os.environ.get("BAKEHOUSE_CONFIG"):
        lines.append(f"export BAKEHOUSE_CONFIG={shlex.quote(str(Path(config).absolute()))}")
    task = [sys.executable, "-m", "invoke", "--search-root", str(REPOSITORY), "nightly.bake", "--night", night]
    task += ["--no-verify"] if site.verify is None else []
    lines.append(f'exec {shlex.join(task)} --image "${{names[SLURM_ARRAY_TASK_ID]}}"')
    write_atomically(script, "\n".join(lines) + "\n")
    made = _ask([
        "sbatch", "--parsable", f"--array=0-{len(names) - 1}", f"--job-name={_name(night)}", "--requeue",
        "--ntasks=1", "--no-kill", f"--chdir={Path.cwd()}", f"--output={folder}/slurm-%A_%a.log", "--open-mode=append",
        *site.settings.nightly.sbatch, str(script),
    ])  # fmt: skip
    job = made.strip().partition(";")[0]
    write_atomically(folder / JOB_FILE, f"{job}\n")
    return job


def _known(folder: Path) -> str | None:
    try:
        return (folder / JOB_FILE).read_text().strip()
    except FileNotFoundError:
        return None


def _wait(job: str) -> None:
    """Wait until no task of a job waits or runs, but not for ever."""
    begun = last = time.monotonic()
    while time.monotonic() - begun < LONGEST_SECONDS:
        try:
            left = _ask(["squeue", "--noheader", f"--jobs={job}", "--format=%i"])
            last = time.monotonic()
        except BakehouseError as error:
            if "Invalid job id" in error.log:
                # The controller forgets jobs some minutes after their end (MinJobAge).
                return
            if time.monotonic() - last > PATIENCE_SECONDS:
                raise
            left = "?"
        if not left.strip():
            return
        time.sleep(POLL_SECONDS)


def _states(job: str) -> dict[int, str]:
    """Return how the tasks of a job ended, by their number, as far as the controller still knows."""
    found: dict[int, str] = {}
    with contextlib.suppress(BakehouseError):
        told = _ask(["squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%K %T"])
        for line in told.splitlines():
            number, _, state = line.partition(" ")
            if number.isdigit():
                found[int(number)] = state.strip()
    return found


def _ask(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip()
        last = said.splitlines()[-1] if said else f"exit status {done.returncode}"
        raise BakehouseError(f"{command[0]}: {last}", hint="`sinfo` shows the cluster", log=said)
    return done.stdout
