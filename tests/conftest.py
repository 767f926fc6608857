"""Fixtures that all tests share."""

from __future__ import annotations

import io
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from bakehouse import REPOSITORY, build, plan
from bakehouse.cache import BaseCache
from bakehouse.record import Record
from bakehouse.settings import Settings
from bakehouse.store import LocalStore

pytest_plugins = ["bakehouse.harness"]

FAKES = REPOSITORY / "tests" / "fakes"


@pytest.fixture(autouse=True)
def no_settings_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("BAKEHOUSE_", "DIB_")):
            monkeypatch.delenv(name)


def pytest_configure() -> None:
    """Take SIGINT as people's shells do: what is started in the background ignores it, and hands that on."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


LONGEST = ("join", "roce", "packer", "kubernetes", "ironic", "boot", "bootstrap", "hybrid", "local_launch", "bake")
"""Files of tests that boot machines or bake much, the longest first: no worker is left with one of them at the end."""


LASTING = frozenset((REPOSITORY / "tests" / "unit" / "lasting.txt").read_text().splitlines()[1:])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, and mark the unit tests that take their time."""
    for item in items:
        if f"{item.path.name}::{item.name.partition('[')[0]}" in LASTING:
            item.add_marker("lasting")
    order = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)) if "integration" in item.path.parts else 99)


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    """Give each test the umask that people have: the join agent, which tests run in this process too, changes it."""
    os.umask(0o022)
    yield
    os.umask(0o022)


@dataclass
class Site:
    """A store, a cache, and fakes in place of mmdebstrap and diskimage-builder."""

    settings: Settings
    fakes: Path
    output: io.StringIO

    @property
    def store(self) -> LocalStore:
        return LocalStore(self.settings.store)

    @property
    def cache(self) -> BaseCache:
        return BaseCache(self.settings.cache)

    def behave(self, how: str) -> None:
        (self.fakes / "behaviour").write_text(how)

    def plan(self, name: str = "slurm") -> plan.Plan:
        return plan.make(name, self.settings)

    def bake(self, *, refresh: bool = False, force: bool = False, wait: bool = True) -> tuple[Record, bool]:
        console = Console(file=self.output, width=200)
        return build.bake(self.plan(), self.store, self.cache, console, refresh=refresh, force=force, wait=wait)

    def leftovers(self) -> list[str]:
        """Return what a bake should have given back."""
        mounts = Path("/proc/self/mountinfo").read_text()
        found = [str(path) for path in self.settings.cache.glob("work/*")]
        found += [str(path) for path in self.settings.store.glob(".incoming*")]
        return found + [line for line in mounts.splitlines() if str(self.settings.cache) in line]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    fakes = tmp_path / "fakes"
    shutil.copytree(FAKES, fakes)
    monkeypatch.setenv("PATH", f"{fakes}:{os.environ['PATH']}")
    settings = Settings(store=tmp_path / "store", cache=tmp_path / "cache")
    made = Site(settings, fakes, io.StringIO())
    yield made
    assert made.leftovers() == []
