"""Containers that are off; tests/integration boots them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from bakehouse import container
from bakehouse.container import Container
from bakehouse.errors import BakehouseError
from bakehouse.network import FOLDER, Port


class FakeNetwork:
    """A place that is a folder, in which programs end at once or after a while."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.starts: list[list[str]] = []
        (folder / FOLDER.relative_to("/")).mkdir(parents=True)

    def path(self, inside: Path) -> Path:
        return self.folder / inside.relative_to("/")

    def start(self, command: list[str], output: Path, _environment: object) -> subprocess.Popen[bytes]:
        self.starts.append(command)
        self.path(output).write_text("Failed to open system root directory")
        return subprocess.Popen(["false"], start_new_session=True)


@pytest.fixture
def place(tmp_path: Path) -> FakeNetwork:
    return FakeNetwork(tmp_path)


@pytest.fixture
def off(place: Any) -> Container:
    return Container(place, Port(10, "node-1"), FOLDER / "copies" / "node-1" / "root", "late-name")


def test_a_container_that_is_off_says_so(off: Container) -> None:
    assert (off.name, off.running, off.leader(), off.output()) == ("node-1", False, None, "")
    with pytest.raises(BakehouseError, match="node-1 is off"):
        off.run("true")
    off.power_off()


def test_a_file_is_written_with_its_mode(off: Container, tmp_path: Path) -> None:
    off.write("/etc/bakehouse/join.yaml", "secret", 0o600)
    written = tmp_path / "run/bakehouse/copies/node-1/root/etc/bakehouse/join.yaml"
    assert (written.read_text(), written.stat().st_mode & 0o777) == ("secret", 0o600)
    off.write("/etc/bakehouse/join.yaml", "public")
    assert written.stat().st_mode & 0o777 == 0o644


def test_a_container_that_does_not_start_says_why(
    off: Container, place: FakeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "POLL_SECONDS", 0.005)
    with pytest.raises(BakehouseError, match="node-1 does not start") as caught:
        off.power_on()
    assert caught.value.log == "Failed to open system root directory"
    (command,) = place.starts
    assert {"--machine=node-1", "--hostname=late-name", "--network-namespace-path=/run/netns/node-1"} <= {*command}
