"""The test controller's texts: its configuration, and what is read of what Slurm says."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from bakehouse import slurm
from bakehouse.errors import BakehouseError
from bakehouse.network import FOLDER, Network
from bakehouse.slurm import Authentication, Controller


class FakeNetwork:
    """A place that is a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.everything: list[str] = []
        self.started: list[list[str]] = []
        self.ran: list[list[str]] = []

    def path(self, inside: Path) -> Path:
        return self.folder / inside.relative_to("/")

    def log_of(self, name: str) -> str:
        return Network.log_of(self, name)  # type: ignore[arg-type]

    def writable_copy(self, _root: Path, name: str) -> Path:
        root = FOLDER / "copies" / name / "root"
        self.path(root).mkdir(parents=True)
        return root

    def run(self, command: list[str | Path]) -> None:
        self.ran.append([*map(str, command)])

    def start(self, command: list[str | Path], _output: Path, *, prefix: list[str]) -> subprocess.Popen[bytes]:
        assert prefix == self.everything
        self.started.append([*map(str, command)])
        return subprocess.Popen(["true"])


class Quiet(Controller):
    """A controller whose commands are answered by the test."""

    def __init__(self, network: Any, authentication: Authentication = "munge") -> None:
        super().__init__(network, authentication)
        self.asked: list[tuple[str, ...]] = []
        self.answer = subprocess.CompletedProcess[str]([], 0, "", "")

    def run(self, *command: str, **_: Any) -> subprocess.CompletedProcess[str]:
        self.asked.append(command)
        return self.answer

    def says(self, out: str, status: int = 0) -> None:
        self.answer = subprocess.CompletedProcess([], status, out, "")


@pytest.fixture
def place(tmp_path: Path) -> FakeNetwork:
    return FakeNetwork(tmp_path)


@pytest.fixture
def controller(place: FakeNetwork) -> Quiet:
    return Quiet(place)


def settings(text: str) -> dict[str, str]:
    """Return slurm.conf's lines; those with several words by their first one."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    found = dict(line.split("=", 1) for line in lines)
    assert len(found) == len(lines), "each once"
    return found


# Configuration.


@pytest.mark.parametrize(
    ("authentication", "auth", "cred"), [("munge", "auth/munge", "cred/munge"), ("slurm", "auth/slurm", "auth/slurm")]
)
def test_nodes_may_come_and_authenticate(
    place: FakeNetwork, authentication: Authentication, auth: str, cred: str
) -> None:
    made = Quiet(place, authentication)
    made.prepare(Path("/image"))
    conf = settings(made.path("etc/slurm/slurm.conf").read_text())
    assert (conf["AuthType"], conf["CredType"]) == (auth, cred)
    assert (conf["SlurmctldHost"], conf["SlurmctldPort"]) == ("controller(10.77.0.1)", "6817")
    assert conf["SlurmctldParameters"] == "enable_configless"
    assert int(conf["MaxNodeCount"]) >= 30, "dynamic nodes need room"
    assert conf["PartitionName"].startswith("all Nodes=ALL ")
    assert made.address == "10.77.0.1:6817"


@pytest.mark.parametrize("cgroups", [True, False])
def test_machines_limit_jobs_and_containers_do_not(controller: Quiet, cgroups: bool) -> None:
    controller.prepare(Path("/image"), cgroups=cgroups)
    conf = settings(controller.path("etc/slurm/slurm.conf").read_text())
    assert ("task/cgroup" in conf["TaskPlugin"], "cgroup" in conf["ProctrackType"]) == (cgroups, cgroups)
    assert ("ConstrainRAMSpace=yes" in controller.path("etc/slurm/cgroup.conf").read_text()) == cgroups


@pytest.mark.parametrize(
    ("authentication", "file", "owner"),
    [("munge", "etc/munge/munge.key", "munge"), ("slurm", "etc/slurm/slurm.key", "slurm")],
)
def test_each_cluster_has_a_key_of_its_own_which_only_its_owner_reads(
    place: FakeNetwork, tmp_path: Path, authentication: Authentication, file: str, owner: str
) -> None:
    made, other = Quiet(place, authentication), Quiet(FakeNetwork(tmp_path / "other"), authentication)
    made.prepare(Path("/image"))
    other.prepare(Path("/image"))
    assert made.path(file).stat().st_mode & 0o777 == 0o400
    assert f"chown {owner}: /{file}" in made.asked[-1][2]
    assert len(made.key) == slurm.KEY_BYTES
    assert made.key != other.key


def test_the_configuration_is_changed_where_it_says_what_is_replaced(controller: Quiet) -> None:
    controller.prepare(Path("/image"))
    controller.replace_in_configuration("InactiveLimit=0\n", "InactiveLimit=5\n")
    assert settings(controller.path("etc/slurm/slurm.conf").read_text())["InactiveLimit"] == "5"
    with pytest.raises(AssertionError):
        controller.replace_in_configuration("InactiveLimit=0\n", "")


# Daemons.


def test_a_daemon_that_ended_is_told_with_its_last_words(controller: Quiet, place: FakeNetwork) -> None:
    place.path(FOLDER).mkdir(parents=True)
    place.path(FOLDER / "slurmctld.log").write_text("fatal: no key")
    controller.says("Slurmctld(primary) at controller is DOWN")
    with pytest.raises(BakehouseError, match="slurmctld ended") as caught:
        controller.daemon("slurmctld", ["slurmctld"])
        controller.wait_for("slurmctld", lambda: False)
    assert caught.value.log == "fatal: no key"
    assert place.started == [["chroot", str(controller.root), "slurmctld"]]


def test_munge_is_not_started_where_it_is_not_used(place: FakeNetwork) -> None:
    Quiet(place, "slurm").start_munge()
    assert place.started == []


def test_a_command_that_fails_is_an_error_where_it_must_not(place: FakeNetwork) -> None:
    place.everything = ["sh", "-c", "echo out; echo err >&2; exit 3"]
    made = Controller(place, "munge")  # type: ignore[arg-type]
    assert made.run("scontrol", "ping").returncode == 3
    with pytest.raises(BakehouseError, match="scontrol on the controller ended with status 3") as caught:
        made.run("scontrol", "ping", check=True)
    assert caught.value.log == "out\nerr\n"


def test_a_command_sees_nothing_of_this_hosts_environment(place: FakeNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", "/the/hosts/own")
    place.everything = ["sh", "-c", "env"]
    assert "SLURM_CONF" not in Controller(place, "munge").run("x").stdout  # type: ignore[arg-type]


# What Slurm says.


def test_a_node_is_known_by_its_fields(controller: Quiet) -> None:
    controller.says(
        "NodeName=node-1 Arch=x86_64 CoresPerSocket=1 AvailableFeatures=bake NodeAddr=10.77.0.10 "
        "OS=Linux 6.12.0 #1 SMP State=IDLE+DYNAMIC_NORM Gres=(null) "
        "Reason=Not responding [root@2026-01-01T12:00:00] Comment=a=b\n"
    )
    node = controller.node("node-1")
    assert (node["NodeName"], node["State"], node["NodeAddr"]) == ("node-1", "IDLE+DYNAMIC_NORM", "10.77.0.10")
    assert node["Comment"] == "a=b"
    assert controller.asked == [("scontrol", "--oneliner", "show", "node", "node-1")]


@pytest.mark.parametrize(("out", "status"), [("Node node-9 not found", 1), ("Node node-9 not found", 0), ("", 0)])
def test_a_node_that_is_not_known_has_no_fields(controller: Quiet, out: str, status: int) -> None:
    controller.says(out, status)
    assert controller.node("node-9") == {}


def test_the_states_of_all_nodes_are_read(controller: Quiet) -> None:
    controller.says("node-1 idle\nnode-2 down*\nnode-3 mixed \n")
    assert controller.states() == {"node-1": "idle", "node-2": "down*", "node-3": "mixed "}
    controller.says("")
    assert controller.states() == {}
