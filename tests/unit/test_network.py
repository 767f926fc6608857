"""The private network, made for real: what is on it, who finds whom, and that nothing of it is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bakehouse import REPOSITORY, network, waiting
from bakehouse.errors import BakehouseError
from bakehouse.instance import Instance
from bakehouse.network import FOLDER, GATEWAY, METADATA, Network, Port
from bakehouse.run import CommandError, Log

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    with Log(tmp_path / "network.log") as made:
        yield made


@pytest.fixture
def place(log: Log) -> Iterator[Network]:
    with network.up(log) as made:
        yield made


def said(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout


def links(place: Network) -> dict[str, dict[str, object]]:
    """Return the devices of the network, by name."""
    shown = json.loads(said([*place.only_network, "ip", "--json", "link", "show"]))
    return {str(link["ifname"]): link for link in shown}


def plug(place: Network, name: str) -> tuple[Port, list[str]]:
    """Make a namespace with its address set. Return its port, and what to put before a command in it."""
    port = place.port(name)
    path = place.add_namespace(port)
    inside = [*place.everything, "nsenter", f"--net={path}", "--"]
    for command in (
        ["ip", "link", "set", "lo", "up"],
        ["ip", "address", "add", f"{port.address}/24", "dev", "host0"],
        ["ip", "link", "set", "host0", "up"],
        ["ip", "route", "add", "default", "via", str(GATEWAY)],
    ):
        said([*inside, *command])
    return port, inside


class Host:
    """This host as it was before the network."""

    def __init__(self) -> None:
        self.mounts, self.devices = self._mounts(), self._devices()

    def _mounts(self) -> set[str]:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return {line for line in lines if str(FOLDER) in line or "netns" in line}

    def _devices(self) -> set[str]:
        return {path.name for path in Path("/sys/class/net").iterdir()}

    def left(self, *pids: int) -> list[str]:
        """Return what is left of a network: processes, mounts, devices."""
        left = [f"process {pid}" for pid in pids if _runs(pid)]
        return left + sorted((self._mounts() - self.mounts) | (self._devices() - self.devices))

    def until_clean(self, *pids: int) -> None:
        waiting.until("end", lambda: not self.left(*pids), 5, poll=0.01, last_words=lambda: str(self.left(*pids)))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def this_host() -> Host:
    return Host()


# Addresses.


def test_a_name_has_one_address(place: Network) -> None:
    first, second = place.port("node-1"), place.port("node-2")
    assert (first.address, first.mac, first.device) == ("10.77.0.10", "52:54:00:77:00:0a", "port10")
    assert (second.address, second.number) == ("10.77.0.11", 11)
    assert place.port("node-1") == first


def test_addresses_are_known_to_whoever_finds_the_network_again(place: Network, log: Log) -> None:
    first = place.port("node-1")
    again = Network(place.pid, log)
    assert again.port("node-1") == first
    assert again.port("node-2").number == first.number + 1
    assert place.port("node-2").number == first.number + 1


def test_the_dhcp_server_is_told_of_each_machine(place: Network) -> None:
    port = place.port("node-1")
    assert place.path(FOLDER / "dhcp" / "node-1").read_text() == f"{port.mac},{port.address},node-1\n"
    waiting.until("reading", lambda: str(FOLDER / "dhcp") in place.log_of("dnsmasq"), 5, poll=0.01)


def test_a_full_network_is_said_to_be_so(place: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "LAST", network.FIRST + 1)
    place.port("node-1")
    place.port("node-2")
    with pytest.raises(BakehouseError, match="the network holds 2 machines at the most"):
        place.port("node-3")
    assert place.port("node-1").number == network.FIRST


# Devices.


def test_the_bridge_has_the_gateways_and_the_metadata_services_address(place: Network) -> None:
    shown = said([*place.only_network, "ip", "-br", "-4", "address", "show", "dev", "br0"])
    assert shown.split()[2:] == [f"{GATEWAY}/24", f"{METADATA}/32"]


def test_devices_come_and_go_with_their_machines(place: Network) -> None:
    tap, veth = place.port("machine"), place.port("container")
    assert place.add_tap(tap) == tap.device
    path = place.add_namespace(veth)
    assert path == Path("/run/netns/container")
    devices = links(place)
    assert (devices[tap.device]["master"], devices[veth.device]["master"]) == ("br0", "br0")
    assert not Path("/sys/class/net", tap.device).exists(), "the host does not see it"
    assert not Path("/run/netns/container").exists(), "the host does not see it"
    place.remove(tap)
    place.run(["ip", "netns", "delete", "container"])
    waiting.until("end of the link", lambda: set(links(place)) == {"lo", "br0"}, 5, poll=0.01)


def test_a_cable_is_pulled_and_put_back(place: Network) -> None:
    port, inside = plug(place, "node-1")

    def is_up() -> bool:
        (link,) = json.loads(said([*inside, "ip", "--json", "link", "show", "host0"]))
        return bool(link["operstate"] == "UP")

    waiting.until("link", is_up, 5, poll=0.01)
    place.pull(port)
    waiting.until("end of the link", lambda: not is_up(), 5, poll=0.01)
    place.put_back(port)
    waiting.until("link", is_up, 5, poll=0.01)


def test_large_frames_are_allowed_where_they_are_asked_for(log: Log) -> None:
    with network.up(log, mtu=9000) as place:
        tap, veth = place.port("a"), place.port("b")
        place.add_tap(tap)
        place.add_namespace(veth)
        assert {name: link["mtu"] for name, link in links(place).items() if name != "lo"} == {
            "br0": 9000, tap.device: 9000, veth.device: 9000,
        }  # fmt: skip


# Talking.


CONNECT = """
import socket, sys
print(socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5).recv(99).decode())
"""
ANSWER = """
import socket
server = socket.create_server(("0.0.0.0", 7000))
print("ready", flush=True)
peer, address = server.accept()
peer.sendall(address[0].encode())
"""


def test_machines_reach_each_other_through_the_bridge(place: Network) -> None:
    (one, on_one), (two, on_two) = plug(place, "one"), plug(place, "two")
    with subprocess.Popen([*on_one, sys.executable, "-c", ANSWER], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        assert said([*on_two, sys.executable, "-c", CONNECT, one.address, "7000"]).strip() == two.address


def test_a_machine_is_told_about_itself_and_no_other(place: Network) -> None:
    (_, on_one), (_, on_two) = plug(place, "one"), plug(place, "two")
    place.serve_metadata(Instance("one", "uuid-1", "#cloud-config\n{}\n"))
    place.serve_metadata(Instance("two", "uuid-2", "secret of two"))
    url = f"http://{METADATA}/openstack/latest/"
    waiting.until("service", lambda: "listening on" in place.log_of("metadata"), 10, poll=0.01)
    assert json.loads(said([*on_one, "curl", "-sf", f"{url}meta_data.json"]))["name"] == "one"
    assert json.loads(said([*on_two, "curl", "-sf", f"{url}meta_data.json"]))["uuid"] == "uuid-2"
    assert said([*on_two, "curl", "-sf", f"{url}user_data"]) == "secret of two"
    assert place.path(FOLDER / "instances.json").stat().st_mode & 0o077 == 0
    assert place.log_of("metadata").count("listening on") == 1


# Programs and files of the place.


def test_a_program_that_fails_in_the_place_says_why(place: Network) -> None:
    with pytest.raises(CommandError) as caught:
        place.run(["ip", "link", "set", "nothing", "up"])
    assert "nothing" in caught.value.log


def test_a_program_that_is_started_leaves_what_it_says(place: Network, tmp_path: Path) -> None:
    process = place.start(["sh", "-c", "echo $0 $COLOUR; id -u", "hello"], FOLDER / "program.log", {"COLOUR": "blue"})
    assert process.wait(10) == 0
    assert place.log_of("program") == "hello blue\n0\n"
    assert place.log_of("another") == ""


def test_a_writable_copy_leaves_its_origin_as_it_is(place: Network) -> None:
    origin = FOLDER / "images" / "image"
    place.run(["mkdir", "-p", origin])
    place.path(origin / "file").write_text("as baked")
    root = place.writable_copy(origin, "node-1", size="1m")
    assert place.path(root / "file").read_text() == "as baked"
    place.path(root / "file").write_text("changed")
    assert place.path(origin / "file").read_text() == "as baked"
    with pytest.raises(OSError, match="No space left"):
        place.path(root / "big").write_bytes(b"x" * (2 << 20))
    place.drop_copy("node-1")
    assert not place.path(FOLDER / "copies" / "node-1").exists()
    assert place.path(origin / "file").read_text() == "as baked"


def image(folder: Path, table: str) -> Path:
    """Return an image whose root filesystem holds one file, behind a partition table."""
    root, raw = folder / "root", folder / "image.raw"
    root.mkdir()
    (root / "os-release").write_text("ID=debian\n")
    with raw.open("wb") as file:
        file.truncate(4 << 20)
    if table:
        subprocess.run(["sfdisk", "-q", str(raw)], input=table, text=True, check=True)
    said(["mke2fs", "-q", "-t", "ext4", "-d", str(root), "-E", f"offset={1 << 20}", str(raw), "2M"])
    said(["qemu-img", "convert", "-O", "qcow2", str(raw), str(folder / "slurm.qcow2")])
    raw.unlink()
    return folder / "slurm.qcow2"


@pytest.mark.skipif(not Path("/dev/loop-control").exists(), reason="this host has no loop devices")
def test_an_images_root_is_mounted_to_be_read(place: Network, tmp_path: Path) -> None:
    made = image(tmp_path, "label: gpt\nstart=2048, name=root\n")
    root = place.mount_image(made)
    assert place.path(root / "os-release").read_text() == "ID=debian\n"
    with pytest.raises(OSError, match="Read-only"):
        place.path(root / "new").touch()
    assert place.mount_image(made) == root
    assert sorted(path.name for path in tmp_path.iterdir()) == ["network.log", "root", "slurm.qcow2"]


@pytest.mark.parametrize("table", ["", "label: gpt\nstart=2048, name=data\n"], ids=["no table", "no root"])
def test_an_image_without_a_root_partition_is_refused(place: Network, tmp_path: Path, table: str) -> None:
    with pytest.raises(BakehouseError, match=r"slurm\.qcow2"):
        place.mount_image(image(tmp_path, table))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["network.log", "root", "slurm.qcow2"]


# The end.


def test_nothing_is_left_when_the_block_ends(this_host: Host, log: Log) -> None:
    with network.up(log) as place:
        pid = place.pid
        _, inside = plug(place, "node-1")
        sleeper = place.start(["sleep", "1000"], FOLDER / "sleep.log")
        lingering = subprocess.Popen([*inside, "sleep", "1000"])
    assert sleeper.wait(5) != 0
    assert lingering.wait(5) != 0
    this_host.until_clean(pid)


def test_nothing_is_left_when_the_block_fails(this_host: Host, log: Log) -> None:
    pids = []

    def fail() -> None:
        with network.up(log) as place:
            pids.append(place.pid)
            raise BakehouseError("no")

    with pytest.raises(BakehouseError, match="no"):
        fail()
    this_host.until_clean(*pids)


OWNER = """
import sys, time
from pathlib import Path
from bakehouse import network
from bakehouse.run import Log
with Log(Path(sys.argv[1])) as log, network.up(log) as place:
    place.add_tap(place.port("node-1"))
    sleeper = place.start(["sleep", "1000"], network.FOLDER / "sleep.log")
    print(place.pid, sleeper.pid, flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_when_its_owner_is_killed(this_host: Host, tmp_path: Path, number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as owner:
        assert owner.stdout is not None
        pids = [int(word) for word in owner.stdout.readline().split()]
        assert this_host.left(*pids) == [f"process {pid}" for pid in pids], "the host sees processes, and no more"
        owner.send_signal(number)
        owner.wait(10)
    this_host.until_clean(*pids)
