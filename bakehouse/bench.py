"""Benchmarks: ratios measured side by side in one run, since machines are noisy and seconds alone say little."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from bakehouse import REPOSITORY, build, network, plan, run
from bakehouse.cache import BaseCache
from bakehouse.errors import BakehouseError
from bakehouse.plan import Plan
from bakehouse.record import Record
from bakehouse.run import Log
from bakehouse.settings import Settings
from bakehouse.store import LocalStore

MIB = 1 << 20

GOAL_COLD = 1.5
GOAL_NOTHING_SECONDS = 2.0
GOAL_CHANGED = 0.4
GOAL_MEMORY = 2048 * MIB
GOAL_SIZE = 1.15


@dataclass(frozen=True)
class Row:
    """One line of a result."""

    name: str
    value: str
    ratio: float | None = None
    goal: str = ""
    met: bool | None = None


@dataclass(frozen=True)
class Result:
    """What a benchmark found."""

    rows: list[Row]
    machine: str


def bake(name: str, settings: Settings, rounds: int, console: Console) -> Result:
    """Measure a bake against plain mmdebstrap of the same packages into a tar.

    Every round takes them in turn, from the same downloaded packages. The first bake of all, which downloads, is not
    counted. Before each measurement the disk is let come to rest (sync).

    Args:
        name: the manifest.
        settings: the site's settings; its store and cache are left alone.
        rounds: how many.
        console: shows what is being measured.
    """
    settings.cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="bench-", dir=settings.cache))
    try:
        bench = _BakeBench(name, settings.model_copy(update={"cache": scratch / "cache"}), scratch, console)
        return bench.run(rounds)
    finally:
        run.remove_tree(scratch)


class _BakeBench:
    def __init__(self, name: str, settings: Settings, scratch: Path, console: Console) -> None:
        self.name = name
        self.scratch = scratch
        self.console = console
        self.settings = settings.model_copy(update={"store": scratch / "store"})
        self.log = Log(scratch / "bench.log")

    def run(self, rounds: int) -> Result:
        self._measure("downloading the packages (not counted)", lambda: self._bake(self.settings))
        plain: list[float] = []
        cold: list[float] = []
        changed: list[float] = []
        record: Record | None = None
        for number in range(1, rounds + 1):
            self._forget()
            plain.append(self._measure(f"{number}/{rounds}: plain mmdebstrap", self._mmdebstrap))
            cold.append(self._measure(f"{number}/{rounds}: cold bake", lambda: self._bake(self.settings)))
            record = LocalStore(self.settings.store).get(self.name)
            nothing = self._measure(f"{number}/{rounds}: nothing changed", self._command)
            site = self.settings.model_copy(update={"elements": [self._changed_elements(number)]})
            changed.append(self._measure(f"{number}/{rounds}: one file changed", partial(self._bake, site)))
        assert record is not None
        return Result(self._rows(plain, cold, changed, nothing, record), this_machine())

    def _rows(
        self, plain: list[float], cold: list[float], changed: list[float], nothing: float, record: Record
    ) -> list[Row]:
        base, whole, part = statistics.median(plain), statistics.median(cold), statistics.median(changed)
        rows = [
            Row("plain mmdebstrap into a tar", f"{base:.1f} s", 1.0),
            Row(
                "cold bake", f"{whole:.1f} s", whole / base,
                f"at most {GOAL_COLD} of plain", whole / base <= GOAL_COLD,
            ),
            Row(
                "nothing changed (the whole command)", f"{nothing:.2f} s", None,
                f"under {GOAL_NOTHING_SECONDS:g} s", nothing < GOAL_NOTHING_SECONDS,
            ),
            Row(
                "one file of an element changed", f"{part:.1f} s", part / whole,
                f"at most {GOAL_CHANGED} of cold", part / whole <= GOAL_CHANGED,
            ),
            Row(
                "peak memory", f"{record.usage.peak_memory / MIB:.0f} MiB", None, f"under {GOAL_MEMORY / MIB:.0f} MiB",
                record.usage.peak_memory < GOAL_MEMORY,
            ),
            Row("build folder at its fullest", f"{record.usage.disk / MIB:.0f} MiB"),
        ]  # fmt: skip
        files = [file for file in record.files if file.format == "qcow2"]
        if files:
            tar = self._tar_size(record)
            ratio = files[0].size / tar
            rows += [
                Row("root as a tar.zst", f"{tar / MIB:.1f} MiB", 1.0),
                Row("qcow2", f"{files[0].size / MIB:.1f} MiB", ratio, f"at most {GOAL_SIZE} of it", ratio <= GOAL_SIZE),
            ]
        return rows

    def _measure(self, what: str, work: Callable[[], object]) -> float:
        self.console.print(what, end=" ... ", highlight=False)
        # What the one before wrote and deleted is not to be paid for by this one.
        os.sync()
        start = time.monotonic()
        work()
        seconds = time.monotonic() - start
        self.console.print(f"{seconds:.1f} s", highlight=False)
        return seconds

    def _plan(self, settings: Settings) -> Plan:
        return plan.make(self.name, settings)

    def _bake(self, settings: Settings) -> Record:
        return bake_quietly(self._plan(settings), settings)

    def _forget(self) -> None:
        """Empty the caches, but for the downloaded packages."""
        shutil.rmtree(self.settings.cache / "base", ignore_errors=True)
        shutil.rmtree(self.settings.store, ignore_errors=True)

    def _command(self) -> None:
        environment = {
            **os.environ,
            "BAKEHOUSE_STORE": str(self.settings.store),
            "BAKEHOUSE_CACHE": str(self.settings.cache),
        }
        done = subprocess.run(
            [sys.executable, "-m", "invoke", "bake", "--platform", self.name],
            cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0 or "up to date" not in done.stdout:
            raise BakehouseError("the bake with nothing changed did something", log=done.stdout + done.stderr)

    def _mmdebstrap(self) -> None:
        wanted = self._plan(self.settings)
        names = ",".join(sorted({package.name for package in wanted.packages}))
        archive, security = wanted.mirrors
        release = str(wanted.manifest.release)
        components = " ".join(wanted.manifest.components)
        debs = BaseCache(self.settings.cache).debs(release)
        archives = '"$1/var/cache/apt/archives"'
        command: list[str | Path] = [
            "mmdebstrap", "--mode=root", "--variant=minbase", "--format=tar", f"--include={names}",
            '--aptopt=APT::Install-Recommends "0"', "--skip=download/empty,essential/unlink",
            f"--setup-hook=mkdir -p {archives} && cp -lnt {archives} '{debs}'/*.deb",
            release, self.scratch / "plain.tar",
            f"deb {archive} {release} {components}",
            f"deb {archive} {release}-updates {components}",
            f"deb {security} {release}-security {components}",
        ]  # fmt: skip
        run.isolated(command, self.log, environment={"TMPDIR": str(self.scratch)})

    def _changed_elements(self, number: int) -> Path:
        """Return a folder with a copy of the platform's element in which one file is another."""
        folder = self.scratch / f"elements-{number}"
        element = next(e for e in self._plan(self.settings).elements if (e.path / "static").is_dir()
                       and e.name.endswith("-node") and e.name != "common-node")  # fmt: skip
        shutil.copytree(element.path, folder / element.name, symlinks=True)
        changed = next(path for path in sorted((folder / element.name / "static").rglob("*")) if path.is_file())
        changed.write_text(changed.read_text() + f"# Round {number}\n")
        return folder

    def _tar_size(self, record: Record) -> int:
        """Return the bytes of a zstd-compressed tar of the image's root, read back from the image."""
        self.console.print("reading the root back", highlight=False)
        raw, root = self.scratch / "disk.raw", self.scratch / "root"
        image = LocalStore(self.settings.store).image(record, "qcow2")
        run.run(["qemu-img", "convert", "-O", "raw", image, raw], self.log)
        start = network.root_start(raw, record.tag)
        root.mkdir()
        script = (
            'debugfs -R "rdump / $1" "$2?offset=$3" >/dev/null 2>&1; '
            'tar -C "$1" --sort=name -c . | zstd -q -3 -o "$4"; chmod 644 "$4"'
        )
        tar = self.scratch / "root.tar.zst"
        run.isolated(
            ["bash", "-euo", "pipefail", "-c", script, "bash", root, raw, str(start), tar],
            self.log, environment={},
        )  # fmt: skip
        return tar.stat().st_size


def bake_quietly(wanted: Plan, settings: Settings) -> Record:
    """Bake an image into the store of the settings, showing nothing."""
    with Path(os.devnull).open("w") as nowhere:
        return build.bake(
            wanted,
            LocalStore(settings.store),
            BaseCache(settings.cache),
            Console(file=nowhere),
            force=True,
            in_memory=settings.build_in_memory == "auto",
        )[0]


def this_machine() -> str:
    """Return what a result was measured on, in one line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return f"{os.cpu_count()} cores, {memory:.0f} GiB, Linux {platform.release()}, Python {platform.python_version()}"
