"""A private network on this host: namespaces that hold a bridge, machines on it, and whatever serves them.

Process 1 of the place hangs on a pipe from us (see sandbox): when we end, SIGKILL included, the kernel ends all that
runs in it and takes back bridge, taps, namespaces and mounts. Needs root.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bakehouse import REPOSITORY, instance, run
from bakehouse.errors import BakehouseError
from bakehouse.instance import Instance
from bakehouse.run import Isolation, Log

SUBNET = ipaddress.IPv4Network("10.77.0.0/24")
"""The network's addresses. Seen in its own namespace only, so that it cannot clash with networks of the host."""

GATEWAY = SUBNET[1]
DEFAULT_MTU = 1500
"""Bytes."""
METADATA = ipaddress.IPv4Address("169.254.169.254")
"""Where clouds serve metadata (OpenStack's administration guide, metadata service)."""

FIRST, LAST = 10, 250
REAP_SECONDS = 20
BRIDGE = "br0"
DOMAIN = "bakehouse.test"
INSIDE = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "HOME": "/root"}
"""The environment of commands that run in an image's root: nothing of the caller's."""

FOLDER = Path("/run/bakehouse")
"""A file system in memory that only the place sees."""


@dataclass(frozen=True)
class Port:
    """A place on the network for one machine."""

    number: int
    name: str
    """Of the machine; also its name in the network's DNS."""

    @property
    def address(self) -> str:
        """The IPv4 address that DHCP gives."""
        return str(SUBNET[self.number])

    @property
    def mac(self) -> str:
        """The hardware address; 52:54:00 is QEMU's."""
        return f"52:54:00:77:00:{self.number:02x}"

    @property
    def device(self) -> str:
        """The name of the bridge's end."""
        return f"port{self.number}"


class Network:
    """A bridge with DHCP and DNS in namespaces of its own. Made by up(), or found again by its process.

    Args:
        pid: the process that keeps the place, as the host sees it.
        log: takes the output of the programs that set things up.
        mtu: bytes.
    """

    def __init__(self, pid: int, log: Log, *, mtu: int = DEFAULT_MTU) -> None:
        self.pid = pid
        self.log = log
        self.mtu = mtu
        self._started: list[subprocess.Popen[bytes]] = []

    @property
    def only_network(self) -> list[str]:
        """What to put before a command of the host so that it sees this network, and else what the host has."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", "--"]

    @property
    def everything(self) -> list[str]:
        """What to put before a command so that it runs in the place: network, mounts, processes."""
        return ["nsenter", f"--target={self.pid}", "--mount", "--net", "--pid", "--"]

    @property
    def but_for_network(self) -> list[str]:
        """What to put before a command so that it runs in the place, with the host's network."""
        return ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--"]

    def path(self, inside: Path) -> Path:
        """Return how the host reaches a file that only the place sees."""
        return Path(f"/proc/{self.pid}/root") / inside.relative_to("/")

    def run(self, command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
        """Run a program in the place and wait for it.

        Raises:
            CommandError: it failed.
        """
        run.run([*self.everything, *command], self.log, environment=run.build_environment(environment or {}))

    def start(
        self,
        command: Sequence[str | Path],
        output: Path,
        environment: Mapping[str, str] | None = None,
        *,
        prefix: Sequence[str] = (),
    ) -> subprocess.Popen[bytes]:
        """Start a program in the place. It ends when the place does.

        Args:
            command: the program and its arguments.
            output: a file in the place for what it says.
            environment: variables beside those that builds see (see run.PASSED_ON).
            prefix: in place of ``everything``, what part of the place it sees.
        """
        words = [str(word) for word in command]
        self.log.write(f"$ {' '.join(words)} &")
        with self.path(output).open("ab") as file:
            process = subprocess.Popen(
                [*(prefix or self.everything), *words],
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                env=run.build_environment(environment or {}), start_new_session=True,
            )  # fmt: skip
        self._started.append(process)
        return process

    def reap(self) -> None:
        """Wait for the end of what was started, after the place has ended."""
        for process in self._started:
            process.wait(REAP_SECONDS)

    def port(self, name: str) -> Port:
        """Reserve a place for a machine: the same name gets the same address.

        Raises:
            BakehouseError: the network is full.
        """
        # Several commands may plug machines into one network.
        with self.path(FOLDER / "ports.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            ports = self._ports()
            if name not in ports:
                number = max((port.number for port in ports.values()), default=FIRST - 1) + 1
                if number > LAST:
                    raise BakehouseError(f"the network holds {LAST - FIRST + 1} machines at the most")
                ports[name] = Port(number, name)
                line = f"{ports[name].mac},{ports[name].address},{name}\n"
                self.path(FOLDER / "dhcp" / name).write_text(line)
            return ports[name]

    def _ports(self) -> dict[str, Port]:
        """Return what is reserved, which is what dnsmasq was told."""
        lines = {path.name: path.read_text() for path in self.path(FOLDER / "dhcp").iterdir()}
        return {name: Port(int(line.partition(",")[0][-2:], 16), name) for name, line in lines.items()}

    def add_tap(self, port: Port) -> str:
        """Make the tap device of a virtual machine. Return its name.

        Raises:
            BakehouseError: a machine of this name is plugged in already.
        """
        there = [*self.everything, "ip", "link", "show", "dev", port.device]
        if subprocess.run(there, capture_output=True, check=False).returncode == 0:
            raise BakehouseError(
                f"a machine {port.name} runs on this network already", hint="give this one another name"
            )
        self.run(["ip", "tuntap", "add", "dev", port.device, "mode", "tap"])
        self._plug(port)
        return port.device

    def add_namespace(self, port: Port) -> Path:
        """Make a network namespace with a link ``host0`` to the bridge, for a container. Return its path."""
        self.run(["ip", "netns", "add", port.name])
        peer = ["peer", "name", "host0", "address", port.mac, "mtu", str(self.mtu), "netns", port.name]
        self.run(["ip", "link", "add", port.device, "mtu", str(self.mtu), "type", "veth", *peer])
        self._plug(port)
        return Path("/run/netns", port.name)

    def _plug(self, port: Port) -> None:
        self.run(["ip", "link", "set", port.device, "mtu", str(self.mtu), "master", BRIDGE, "up"])

    def pull(self, port: Port) -> None:
        """Pull the cable of a machine."""
        self.run(["ip", "link", "set", port.device, "down"])

    def put_back(self, port: Port) -> None:
        """Put the cable back."""
        self.run(["ip", "link", "set", port.device, "up"])

    def remove(self, port: Port) -> None:
        """Take a machine's device away. Its address stays reserved. With the network its devices are gone already."""
        if not Path(f"/proc/{self.pid}").exists():
            return
        self.run(["ip", "link", "delete", port.device])

    def serve_metadata(self, told: Instance) -> None:
        """Let OpenStack's metadata service tell a machine about itself, at its address on this network."""
        file = self.path(FOLDER / "instances.json")
        known = instance.load(file) if file.exists() else {}
        instance.save(file, {**known, self.port(told.name).address: told})
        if not known:
            service: list[str | Path] = [sys.executable, "-m", "bakehouse.metadata", "--instances", FOLDER / file.name]
            self.start(service, FOLDER / "metadata.log", {"PYTHONPATH": str(REPOSITORY)})

    def log_of(self, name: str) -> str:
        """Return what a program of the place said: dnsmasq or metadata."""
        path = self.path(FOLDER / f"{name}.log")
        return path.read_text(errors="replace") if path.exists() else ""

    def mount_image(self, image: Path) -> Path:
        """Mount the root filesystem of an image, to be read only. Return where, in the place.

        Raises:
            BakehouseError: the host has no loop devices, or the image has no root partition.
        """
        target = FOLDER / "images" / str(image.resolve()).strip("/").replace("/", "+")
        if self.path(target).is_dir():
            return target
        # In memory, so that it cannot be left behind, however we end.
        raw = FOLDER / "disk.raw"
        try:
            self.run(["qemu-img", "convert", "-O", "raw", image.resolve(), raw])
            start = root_start(self.path(raw), image.name)
            self.run(["mkdir", "-p", target])
            self.run(["mount", "-o", f"loop,ro,noload,offset={start}", "-t", "ext4", raw, target])
        except run.CommandError as error:
            with contextlib.suppress(OSError):
                self.path(target).rmdir()
            raise BakehouseError(
                f"the root filesystem of {image.name} cannot be mounted: {error.message}",
                hint="this host needs loop devices (modprobe loop; in a container: --privileged)",
                log=error.log,
            ) from error
        finally:
            # The loop device keeps the content for as long as it is mounted.
            self.path(raw).unlink(missing_ok=True)
        return target

    def writable_copy(self, root: Path, name: str, *, size: str = "50%") -> Path:
        """Lay a writable layer, kept in memory, over a mounted root. Return where.

        Args:
            root: the root, in the place.
            name: of the copy.
            size: of the layer, in the words of tmpfs(5).
        """
        folder = FOLDER / "copies" / name
        self.run(["mkdir", "-p", folder])
        self.run(["mount", "-t", "tmpfs", "-o", f"mode=755,size={size}", "tmpfs", folder])
        self.run(["mkdir", folder / "upper", folder / "work", folder / "root"])
        layers = f"lowerdir={root},upperdir={folder}/upper,workdir={folder}/work"
        self.run(["mount", "-t", "overlay", "-o", layers, "overlay", folder / "root"])
        return folder / "root"

    def drop_copy(self, name: str) -> None:
        """Throw a writable copy away."""
        folder = FOLDER / "copies" / name
        self.run(["umount", "--recursive", folder])
        self.run(["rmdir", folder])


@contextmanager
def up(log: Log, *, mtu: int = DEFAULT_MTU) -> Iterator[Network]:
    """Make a private network. It ends with the block, and with this process, however it ends.

    Args:
        log: takes the output of the programs that set it up.
        mtu: bytes; 9000 for jumbo frames.

    Raises:
        BakehouseError: this host cannot have one.
    """
    with Isolation(log, network=True) as place:
        commands: list[list[str | Path]] = [
            # Names of namespaces, locks and sockets: ours must not be seen outside, nor stay.
            ["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run"],
            ["mkdir", "-p", "/run/netns", "/run/lock", FOLDER / "dhcp"],
            ["ip", "link", "set", "lo", "up"],
            ["ip", "link", "add", BRIDGE, "type", "bridge", "forward_delay", "0"],
            ["ip", "link", "set", BRIDGE, "mtu", str(mtu), "up"],
            ["ip", "address", "add", f"{GATEWAY}/{SUBNET.prefixlen}", "dev", BRIDGE],
            ["ip", "address", "add", f"{METADATA}/32", "dev", BRIDGE],
        ]
        for command in commands:
            place.run(command)
        made = Network(place.pid, log, mtu=mtu)
        made.start(
            [
                "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--user=root", "--log-facility=-",
                "--pid-file=", "--no-resolv", "--no-hosts", "--bind-interfaces", f"--interface={BRIDGE}",
                f"--dhcp-range={SUBNET.network_address},static,1h", f"--dhcp-hostsdir={FOLDER}/dhcp", "--leasefile-ro",
                "--dhcp-authoritative", f"--domain={DOMAIN}", "--local=//", "--no-ping",
                f"--dhcp-option=option:mtu,{mtu}",
            ],
            FOLDER / "dnsmasq.log",
        )  # fmt: skip
        try:
            yield made
        finally:
            place.close()
            made.reap()


def root_start(raw: Path, name: str) -> int:
    """Return the first byte of the root partition of an image that Bakehouse made.

    Args:
        raw: the image, as a raw file.
        name: what to call it in an error.

    Raises:
        BakehouseError: it has no partition of that name.
    """
    shown = subprocess.run(["sfdisk", "--json", str(raw)], capture_output=True, text=True, check=False)
    table = json.loads(shown.stdout)["partitiontable"] if shown.returncode == 0 else {}
    start = next((part["start"] for part in table.get("partitions", ()) if part.get("name") == "root"), None)
    if start is None:
        raise BakehouseError(f"{name} has no partition named root", hint="images that Bakehouse baked have one")
    return int(start) * 512
