"""The plugins of pytest that users load: the harness that boots machines, and the suites' own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bakehouse import REPOSITORY, machine
from bakehouse.errors import BakehouseError
from bakehouse.machine import Machine

pytest_plugins = ["pytester"]

QUICK = ("-p", "no:hypothesispytest", "-p", "no:xdist")
"""Without what pytest would load anew each time."""


class Machines:
    """Boots fakes; notes what it was asked for and what became of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[dict[str, Any]] = []
        self.events: list[str] = []
        monkeypatch.setattr(machine, "boot", self.boot)

    @contextlib.contextmanager
    def boot(self, image: Path, **options: Any) -> Iterator[object]:
        self.asked.append({"image": image, **options})
        name = options.get("hostname", "bakehouse")
        if name == "none":
            raise BakehouseError(f"{image} is not there")
        yield SimpleNamespace(running=name != "off", collect=lambda folder: self.events.append(f"collect {folder}"))
        self.events.append(f"end {name}")


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Machines:
    return Machines(monkeypatch)


def test_machines_end_with_their_test_and_leave_evidence_where_it_fails(
    pytester: pytest.Pytester, machines: Machines
) -> None:
    pytester.makepyfile("""
        def test_passes(boot_machine):
            boot_machine("/images/a.qcow2", hostname="node-1", memory=512)
            boot_machine("/images/b.qcow2", hostname="off")
        def test_fails(boot_machine):
            boot_machine("/images/a.qcow2", hostname="node-2")
            boot_machine("/images/b.qcow2", hostname="off")
            assert False
        def test_cannot_boot(boot_machine):
            boot_machine("/nothing.qcow2", hostname="none")
    """)
    result = pytester.runpytest_inprocess(*QUICK, "-p", "bakehouse.harness")
    assert result.parseoutcomes() == {"passed": 1, "failed": 2}
    first, second, *_ = machines.asked
    assert (first["image"], first["memory"]) == (Path("/images/a.qcow2"), 512)
    assert first["probe"].name == "kvm"
    assert first["keep_console"].name == "node-1.console"
    assert second["keep_console"].parent == first["keep_console"].parent
    assert machines.events[:2] == ["end off", "end node-1"], "the last one first, and nothing is kept"
    collected, *ends = machines.events[2:]
    assert Path(collected.removeprefix("collect ")).name == "node-2", "what is off cannot be asked"
    assert ends == ["end off", "end node-2"]
    assert "/nothing.qcow2 is not there" in result.stdout.str()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_private_network_ends_with_its_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        from pathlib import Path
        seen = []
        def test_first(private_network):
            seen.append(private_network.pid)
            assert private_network.port("node-1").address == "10.77.0.10"
        def test_second():
            assert not Path(f"/proc/{seen[0]}/ns").exists()
    """)
    assert pytester.runpytest_inprocess(*QUICK, "-p", "bakehouse.harness").parseoutcomes() == {"passed": 2}


def test_the_machine_that_users_type_is_the_real_one(pytester: pytest.Pytester) -> None:
    from bakehouse.harness import BootMachine

    assert BootMachine.__call__.__annotations__["return"] == Machine.__name__


# The plugin of image suites.

ASKS = """
def test_tag(record):
    assert record["tag"] == "20260101-aaaaaaa"
def test_anything():
    pass
"""


@pytest.mark.parametrize(("given", "outcome"), [(True, {"passed": 2}), (False, {"passed": 1, "skipped": 1})])
def test_a_suite_is_given_the_images_record(pytester: pytest.Pytester, given: bool, outcome: dict[str, int]) -> None:
    """Without one, only what needs it is left out."""
    path = pytester.makefile(".json", record='{"tag": "20260101-aaaaaaa"}')
    pytester.makepyfile(ASKS)
    options = [f"--record={path}"] if given else []
    assert pytester.runpytest_inprocess(*QUICK, "-p", "bakehouse.suite", *options).parseoutcomes() == outcome


def test_our_suites_are_found_by_pytest_as_the_documentation_calls_it(pytester: pytest.Pytester) -> None:
    suites = REPOSITORY / "tests" / "image"
    result = pytester.runpytest_inprocess(
        *QUICK, "-p", "bakehouse.suite", "--collect-only", "-q", f"--rootdir={suites}", f"--confcutdir={suites}",
        suites, "--hosts=ssh://debian@192.0.2.1", "--sudo",
    )  # fmt: skip
    assert result.ret == 0
    assert "test_slurm.py::" in result.stdout.str()
