"""Accounting's texts and commands; tests/integration installs and runs it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bakehouse import accounting, slurm
from bakehouse.chroot import Chroot
from bakehouse.errors import BakehouseError


class FakeController:
    """Notes what is done with it."""

    def __init__(self, folder: Path, authentication: str = "munge") -> None:
        self.folder = folder
        self.authentication = authentication
        self.root = Path("/root/of/controller")
        self.network = SimpleNamespace(but_for_network=["false"])
        self.commands: list[str] = []
        self.daemons: list[str] = []
        self.replaced: list[tuple[str, str]] = []

    install = Chroot.install

    def path(self, inside: str) -> Path:
        return self.folder / inside

    def write(self, inside: str, text: str) -> None:
        self.path(inside).parent.mkdir(parents=True, exist_ok=True)
        self.path(inside).write_text(text)

    def replace_in_configuration(self, before: str, after: str) -> None:
        self.replaced.append((before, after))

    def run(self, *command: str, check: bool = False) -> subprocess.CompletedProcess[str]:
        self.commands.append(" ".join(command))
        return subprocess.CompletedProcess([], 0, "", "")

    def daemon(self, name: str, command: list[str]) -> None:
        self.daemons.append(name)

    def must_run(self, name: str) -> None:
        raise AssertionError

    def log(self, name: str) -> str:
        raise AssertionError


def test_the_line_that_accounting_replaces_is_in_slurm_conf_once() -> None:
    assert slurm.SLURM_CONF.count("AccountingStorageType=accounting_storage/none\n") == 1
    assert f"AccountingStorageHost={slurm.NAME}\n" in accounting.SLURM_CONF
    assert f"AccountingStoragePort={accounting.PORT}\n" in accounting.SLURM_CONF


@pytest.mark.parametrize("authentication", ["munge", "slurm"])
def test_slurmdbd_is_set_up_as_the_cluster_is(tmp_path: Path, authentication: str) -> None:
    controller: Any = FakeController(tmp_path, authentication)
    accounting.start(controller)
    text = (tmp_path / "etc/slurm/slurmdbd.conf").read_text()
    lines = text.splitlines()
    assert f"AuthType=auth/{authentication}" in lines
    assert ("AuthInfo=use_client_ids" in lines) == (authentication == "slurm")
    assert "{" not in text
    assert all("=" in line for line in lines)
    assert "StoragePass" not in text, "the database knows its user by the socket"
    assert controller.daemons == ["mariadbd", "slurmdbd"]
    private = next(command for command in controller.commands if "chmod 600" in command)
    assert "/etc/slurm/slurmdbd.conf" in private


def test_mirrors_that_do_not_serve_it_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    controller: Any = FakeController(tmp_path)
    asked: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        assert options["env"]["DEBIAN_FRONTEND"] == "noninteractive"
        return subprocess.CompletedProcess(command, 100, "", "E: Unable to locate package slurmdbd")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(
        BakehouseError, match="slurmdbd, mariadb-server, slurm-wlm-mysql-plugin cannot be installed"
    ) as caught:
        accounting.install(controller, "trixie", ("http://mirror/debian", "http://mirror/security"))
    assert "Unable to locate package" in caught.value.log
    assert controller.replaced == []
    assert (tmp_path / "etc/apt/sources.list").read_text().splitlines() == [
        "deb http://mirror/debian trixie main",
        "deb http://mirror/debian trixie-updates main",
        "deb http://mirror/security trixie-security main",
    ]
    assert (tmp_path / "usr/sbin/policy-rc.d").stat().st_mode & 0o111, "nothing starts by being installed"
    assert "--net" not in " ".join(asked[0]), "with the host's network"
