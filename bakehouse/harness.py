"""A plugin of pytest: the harness that boots images, as fixtures. Needs root.

Load it with ``-p bakehouse.harness``, or ``pytest_plugins = ["bakehouse.harness"]`` in the outermost conftest.py::

    def test_my_user_data(boot_machine, private_network):
        node = boot_machine("image.qcow2", data_source="metadata", user_data=TEXT, network=private_network)
        node.wait_for_ssh(600)
        assert node.ssh("cloud-init status --wait").returncode == 0

A machine that a test fails with leaves its console, journal and cloud-init's reports in the test's temporary folder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from bakehouse import machine, network, settings
from bakehouse.machine import Machine
from bakehouse.network import Network
from bakehouse.run import Log

OUTCOME = pytest.StashKey[bool]()


class BootMachine(Protocol):
    """Boots an image; takes what machine.boot() takes."""

    def __call__(self, image: Path | str, **options: Any) -> Machine:
        """Boot an image. The machine ends with the test."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Note whether a test failed, for the fixtures that it used."""
    report = yield
    if call.when == "call":
        item.stash[OUTCOME] = report.failed  # type: ignore[attr-defined]
    return report


@pytest.fixture
def private_network(tmp_path: Path) -> Iterator[Network]:
    """Give a private network that ends with the test."""
    with Log(tmp_path / "network.log") as log, network.up(log) as made:
        yield made


@pytest.fixture
def boot_machine(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[BootMachine]:
    """Give what boots images; the machines end with the test."""
    probe = settings.load().cache / "kvm"
    booted: list[tuple[str, Machine]] = []
    with contextlib.ExitStack() as stack:

        def boot(image: Path | str, **options: Any) -> Machine:
            name = str(options.get("hostname", "bakehouse"))
            options.setdefault("probe", probe)
            options.setdefault("keep_console", tmp_path / f"{name}.console")
            made = stack.enter_context(machine.boot(Path(image), **options))
            booted.append((name, made))
            return made

        yield boot
        if request.node.stash.get(OUTCOME, False):
            for name, made in booted:
                if made.running:
                    made.collect(tmp_path / name)
