"""Machines: something that boots an image. Here QEMU, with KVM where it works and emulation otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qemu.qmp import QMPClient, QMPError

from bakehouse import instance, kvm, run, seed, waiting
from bakehouse.console import Console
from bakehouse.errors import BakehouseError
from bakehouse.instance import Instance
from bakehouse.network import DEFAULT_MTU, GATEWAY, SUBNET, Network, Port

Firmware = Literal["bios", "uefi", "secure-boot"]

DataSource = Literal["nocloud", "config-drive", "config-drive-partition", "metadata"]
"""Where cloud-init finds its data: a NoCloud seed, OpenStack's config drive as a disk of its own (Nova) or as a
partition at the end of the machine's disk (Ironic), or OpenStack's metadata service, which needs a private network."""

Bus = Literal["virtio", "nvme"]
"""How the machine's disk is attached."""

OVMF = Path("/usr/share/OVMF/OVMF_CODE_4M.fd"), Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
OVMF_SECURE = Path("/usr/share/OVMF/OVMF_CODE_4M.ms.fd"), Path("/usr/share/OVMF/OVMF_VARS_4M.ms.fd")
"""Program and variables of the firmware (Debian's ovmf)."""

EMULATED_CPU = "Nehalem,-cx16"
"""Without cmpxchg16b: QEMU's emulation of it panics guests now and then, and this model costs a fifth less than max."""

POLL_SECONDS = 0.5

EVIDENCE = {
    "cloud-init-status.txt": "cloud-init status --long",
    "cloud-init-analyze.txt": "cloud-init analyze show",
    "cloud-init.log": "sudo cat /var/log/cloud-init.log",
    "journal.txt": "sudo journalctl --boot --no-pager --output=short-monotonic",
    "agent-status.json": "cat /run/bakehouse/status.json",
}
"""Files of Machine.collect() and the commands that give them."""

MIB = 1 << 20

DISK = "disk.qcow2"
"""The file in a machine's folder."""


SSH_SETTINGS = {
    "StrictHostKeyChecking": "no",
    "UserKnownHostsFile": "/dev/null",
    "IdentitiesOnly": "yes",
    "LogLevel": "ERROR",
}
"""This key only, and no memory of host keys, since machines come and go."""


@dataclass(frozen=True)
class Login:
    """How to log in to a machine."""

    host: str
    port: int
    user: str
    key: Path
    """The private key."""
    prefix: tuple[str, ...] = ()
    """What to put before ssh, so that it sees the machine's network."""

    @property
    def options(self) -> list[str]:
        """Options of ssh."""
        settings = (part for name, value in SSH_SETTINGS.items() for part in ("-o", f"{name}={value}"))
        return ["-i", str(self.key), *settings]

    def config(self, folder: Path) -> str:
        """Return the text of an ssh_config(5) for all hosts, which keeps one connection for several logins.

        Args:
            folder: where the connection's socket goes.
        """
        # A handshake takes seconds in an emulated machine.
        shared = {"ControlMaster": "auto", "ControlPath": f'"{folder}/ssh"', "ControlPersist": "60"}
        settings = {**SSH_SETTINGS, "IdentityFile": f'"{self.key}"', **shared}
        return "Host *\n" + "".join(f"  {name} {value}\n" for name, value in settings.items())

    @property
    def command(self) -> list[str]:
        """The ssh command line."""
        return [*self.prefix, "ssh", *self.options, "-p", str(self.port), f"{self.user}@{self.host}"]

    def run(self, command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a shell command over SSH.

        Args:
            command: the command line.
            timeout: seconds.
        """
        return subprocess.run(
            [*self.command, "-o", "ConnectTimeout=20", command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )


@dataclass
class Machine:
    """A running machine. Made by boot()."""

    login: Login
    console: Console
    accelerator: str
    """kvm or tcg (emulation)."""
    started: float
    """When it was switched on: seconds of the host's monotonic clock."""
    port: Port | None
    """Its place on a private network."""
    _process: subprocess.Popen[bytes]
    _monitor: Path
    _said: Path

    @property
    def disk(self) -> Path:
        """Its disk, a qcow2 file, to be looked at when the machine is off. It goes with boot()'s block."""
        return self._monitor.with_name(DISK)

    @property
    def running(self) -> bool:
        """Whether it is on."""
        return self._process.poll() is None

    def output(self) -> str:
        """Return what the serial console said so far."""
        return self.console.text()

    def cpu_seconds(self) -> float:
        """Return the CPU seconds that QEMU has used: a measure that a busy host disturbs less than the clock."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100

    def check(self) -> None:
        """Raise if the machine has ended or its kernel has panicked.

        Raises:
            BakehouseError: it has; the error holds the last lines of the console.
        """
        text = self.output()
        if "Kernel panic" in text:
            raise BakehouseError("the machine's kernel panicked", log="\n".join(text.splitlines()[-20:]))
        if not self.running:
            said = self._said.read_text(errors="replace").strip()
            raise BakehouseError(
                f"the machine went off (QEMU's exit status {self._process.returncode})",
                log="\n".join([*text.splitlines()[-20:], said]),
            )

    def wait(self, what: str, fact: Callable[[], bool], seconds: float) -> None:
        """Wait until something holds.

        Args:
            what: what is waited for, for the error.
            fact: says whether it holds.
            seconds: how long at most.

        Raises:
            BakehouseError: it did not come to hold, or the machine ended.
        """

        def last_words() -> str:
            lines = self.output().splitlines()[-20:]
            return "\n".join([*lines, f"(QEMU used {self.cpu_seconds():.0f} CPU seconds)"])

        waiting.until(what, fact, seconds, poll=POLL_SECONDS, check=self.check, last_words=last_words)

    def wait_for_console(self, what: str, pattern: str, seconds: float, start: int = 0) -> int:
        """Wait until the console says something.

        Args:
            what: what is waited for, for the error.
            pattern: a regular expression.
            seconds: how long at most.
            start: the number of the line to begin with.

        Returns:
            The number of the line.

        Raises:
            BakehouseError: it did not say it, or the machine ended.
        """
        self.wait(what, lambda: self.console.find(pattern, start) is not None, seconds)
        found = self.console.find(pattern, start)
        assert found is not None
        return found[0]

    def ssh(self, command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a shell command in the machine, as its default user.

        Args:
            command: the command line.
            timeout: seconds.
        """
        return self.login.run(command, timeout)

    def wait_for_ssh(self, seconds: float) -> None:
        """Wait until one can log in.

        Raises:
            BakehouseError: not within the time, or the machine ended.
        """

        def answers() -> bool:
            try:
                return self.ssh("true", timeout=60).returncode == 0
            except subprocess.TimeoutExpired:
                return False

        self.wait("login over SSH", answers, seconds)

    def collect(self, folder: Path) -> None:
        """Save what tells how the boot went: console, cloud-init's status and analysis, journal, the agent's status.

        Args:
            folder: where to; it is made.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "console.log").write_text(self.output())
        for name, command in EVIDENCE.items():
            with contextlib.suppress(subprocess.TimeoutExpired):
                done = self.ssh(command)
                (folder / name).write_text(done.stdout or done.stderr)

    def stop(self, seconds: float = 90) -> bool:
        """Press the power button, wait for the system to go down, and switch off where it does not.

        Args:
            seconds: how long it may take to go down.

        Returns:
            Whether it went down by itself.
        """
        if self.running:
            with contextlib.suppress(BakehouseError):
                self.monitor("system_powerdown")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(seconds)
                    return True
        self.kill()
        return False

    def kill(self) -> None:
        """Switch off."""
        if self.running:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def monitor(self, command: str, **arguments: object) -> object:
        """Give QEMU a command over QMP.

        Raises:
            BakehouseError: QEMU does not answer or refuses.
        """
        return asyncio.run(_qmp(self._monitor, command, arguments))


async def _qmp(path: Path, command: str, arguments: dict[str, object]) -> object:
    client = QMPClient("bakehouse")
    try:
        await asyncio.wait_for(client.connect(str(path)), 20)
        return await asyncio.wait_for(client.execute(command, arguments or None), 60)
    except (QMPError, OSError, TimeoutError) as error:
        raise BakehouseError(f"QEMU does not take {command}: {error or type(error).__name__}") from error
    finally:
        with contextlib.suppress(QMPError, OSError, EOFError):
            await client.disconnect()


KEY = "id_ed25519"
"""The file of make_key()."""


def make_key(folder: Path) -> Path:
    """Make an SSH key for a machine's lifetime. Return the private one's path; the public one has ``.pub``."""
    path = folder / KEY
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "bakehouse", "-f", str(path)],
        stdin=subprocess.DEVNULL, capture_output=True, check=True,
    )  # fmt: skip
    return path


@contextlib.contextmanager
def boot(
    image: Path,
    *,
    probe: Path,
    firmware: Firmware = "bios",
    memory: int = 1024,
    cpus: int = 1,
    disk_size: int = 0,
    key: Path | None = None,
    user_data: str = "",
    hostname: str = "bakehouse",
    user: str = "debian",
    keep_console: Path | None = None,
    data_source: DataSource = "nocloud",
    network: Network | None = None,
    clock: datetime.datetime | None = None,
    bus: Bus = "virtio",
) -> Iterator[Machine]:
    """Boot an image. The image is only read: what the machine writes goes to an overlay.

    The machine ends with the block, and with this process, however it ends.

    Args:
        image: a qcow2 or raw file.
        probe: the folder where the answer about KVM is kept.
        firmware: bios, uefi, or secure-boot: UEFI that boots only what is signed (Microsoft's keys are in it).
        memory: MiB.
        cpus: how many.
        disk_size: bytes of the disk that the machine sees; the image's own size if that is larger.
        key: the private key to log in with, its public one beside it; one is made if there is none.
        user_data: for cloud-init.
        hostname: the node's name.
        user: the image's default user.
        keep_console: where to write the console; a temporary file by default.
        data_source: how cloud-init gets its data.
        network: the private network to plug it into; by default it can go out through the host, and nobody can come in
            but over SSH from this host.
        clock: what its clock shall say when it is switched on, UTC; the right time by default.
        bus: virtio, or nvme for a disk as machines of metal have it.

    Raises:
        BakehouseError: QEMU does not start.
    """
    try:
        accelerated = kvm.works(probe).works
    except BakehouseError:
        accelerated = False
    with run.ending_on_sigterm(), _scratch() as folder:
        key = key or make_key(folder)
        port = network.port(hostname) if network else None
        told = _instance(hostname, key, user_data, port, data_source)
        disk = folder / DISK
        _overlay(image, disk, _with_room(image, disk_size) if data_source == "config-drive-partition" else disk_size)
        drives = _drives(folder, disk, told, data_source, network)
        command = _command(folder, disk, drives, port, firmware=firmware, memory=memory, cpus=cpus,
                           accelerated=accelerated, clock=clock, data_source=data_source, bus=bus,
                           mtu=network.mtu if network else DEFAULT_MTU)  # fmt: skip
        if network and port:
            network.add_tap(port)
            command = [*network.only_network, *command]
        said = folder / "qemu.log"
        with said.open("wb") as errors:
            started = time.monotonic()
            process = subprocess.Popen(
                # setpriv makes the kernel end QEMU when we end, SIGKILL included.
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True,
            )  # fmt: skip
        assert process.stdout is not None
        console = Console(process.stdout, keep_console or folder / "console.log")
        login = Login(port.address, 22, user, key, tuple(network.only_network)) if network and port else None
        nowhere = Login("127.0.0.1", 0, user, key)
        accelerator = "kvm" if accelerated else "tcg"
        machine = Machine(login or nowhere, console, accelerator, started, port, process, folder / "qmp", said)
        try:
            if not login:
                machine.login = Login("127.0.0.1", _forwarded_port(machine), user, key)
            yield machine
        finally:
            machine.kill()
            console.end(5)
            if network and port:
                network.remove(port)


SCRATCH = "bakehouse-machine-"


def remove_left() -> None:
    """Remove the disks and seeds that killed runs left: seeds may hold secrets."""
    for left in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        owner = left.name.removeprefix(SCRATCH).partition("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            # Those of other users are theirs to remove.
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """Give a folder for disks and seeds."""
    remove_left()
    with tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{os.getpid()}-") as name:
        yield Path(name)


def _instance(hostname: str, key: Path, user_data: str, port: Port | None, data_source: DataSource) -> Instance:
    """Return what the machine is told about itself."""
    public = key.with_name(f"{key.name}.pub")
    if not public.is_file():
        raise BakehouseError(f"{public} is not there", hint=f"ssh-keygen -y -f {key} > {public}")
    networks: tuple[instance.Network, ...] = ()
    if port and data_source.startswith("config-drive"):
        # A config drive is for clouds without DHCP.
        address = f"{port.address}/{SUBNET.prefixlen}"
        networks = (instance.Network(port.mac, (address,), (str(GATEWAY),), dns=(str(GATEWAY),)),)
    return Instance(hostname, str(uuid.uuid4()), user_data, (public.read_text().strip(),), networks)


def _with_room(image: Path, disk_size: int) -> int:
    """Return the size of a disk: the one asked for, else the image's with room for a config drive at its end."""
    if disk_size:
        return disk_size
    shown = subprocess.run(
        ["qemu-img", "info", "--output=json", str(image)], capture_output=True, text=True, check=True
    )
    found = re.search(r'"virtual-size": (\d+)', shown.stdout)
    assert found is not None
    return int(found[1]) + (seed.CONFIG_DRIVE_PARTITION_MIB + 2) * MIB


def _drives(folder: Path, disk: Path, told: Instance, data_source: DataSource, network: Network | None) -> list[Path]:
    """Bring the data to where cloud-init finds it. Return the disks to add to the machine."""
    drive = folder / "seed.iso"
    if data_source == "nocloud":
        seed.nocloud_drive(drive, told)
        return [drive]
    if data_source == "metadata":
        if network is None:
            raise BakehouseError("the metadata service needs a private network")
        network.serve_metadata(told)
        return []
    seed.config_drive(drive, told)
    if data_source == "config-drive":
        return [drive]
    seed.add_config_drive_partition(disk, drive)
    return []


def _overlay(image: Path, overlay: Path, disk_size: int) -> None:
    form = "raw" if image.suffix == ".raw" else "qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", form, "-b", str(image.resolve()), str(overlay)]
    for step in (command, ["qemu-img", "resize", "-q", str(overlay), str(disk_size)]):
        if step is not command and not disk_size:
            continue
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        # A disk smaller than the image would cut it: qemu-img refuses to shrink without being told to.
        if done.returncode != 0:
            raise BakehouseError(f"no disk could be made over {image}", log=done.stderr.strip())


def _command(
    folder: Path,
    disk: Path,
    drives: list[Path],
    port: Port | None,
    *,
    firmware: Firmware,
    memory: int,
    cpus: int,
    accelerated: bool,
    clock: datetime.datetime | None,
    data_source: DataSource,
    mtu: int = DEFAULT_MTU,
    bus: Bus = "virtio",
) -> list[str]:
    secure = firmware == "secure-boot"
    # Only code in system management mode may write to the firmware's variables then (EDK II, OvmfPkg/README).
    manner = f"q35,accel={'kvm' if accelerated else 'tcg'}{',smm=on' if secure else ''}"
    command = [
        "qemu-system-x86_64", "-nodefaults", "-display", "none", "-vga", "none",
        "-machine", manner,
        "-cpu", "host" if accelerated else EMULATED_CPU,
        "-smp", str(cpus), "-m", str(memory),
        "-drive", f"if=none,id=disk,file={disk},format=qcow2,cache=unsafe,discard=unmap",
        "-device", f"{'nvme,serial=bakehouse' if bus == 'nvme' else 'virtio-blk-pci'},drive=disk,bootindex=1",
        "-device", "virtio-rng-pci",
        "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
        "-qmp", f"unix:{folder / 'qmp'},server=on,wait=off",
    ]  # fmt: skip
    for number, drive in enumerate(drives):
        command += ["-drive", f"if=none,id=seed{number},file={drive},format=raw,readonly=on"]
        command += ["-device", f"virtio-blk-pci,drive=seed{number}"]
    if port:
        # A card takes no larger packets unless it is told so.
        jumbo = f",host_mtu={mtu}" if mtu != DEFAULT_MTU else ""
        command += ["-netdev", f"tap,id=net,ifname={port.device},script=no,downscript=no"]
        command += ["-device", f"virtio-net-pci,netdev=net,mac={port.mac},romfile={jumbo}"]
    else:
        command += ["-netdev", "user,id=net,hostfwd=tcp:127.0.0.1:0-:22"]
        command += ["-device", "virtio-net-pci,netdev=net,romfile="]
    if data_source in {"metadata", "config-drive"}:
        # As Nova has libvirt say it; cloud-init asks the metadata service only where it sees this (its ds-identify).
        command += ["-smbios", "type=1,manufacturer=OpenStack Foundation,product=OpenStack Nova"]
    if clock:
        command += ["-rtc", f"base={clock.astimezone(datetime.UTC):%Y-%m-%dT%H:%M:%S},clock=host"]
    if firmware != "bios":
        code, before = OVMF_SECURE if secure else OVMF
        variables = folder / "uefi-variables.fd"
        shutil.copyfile(before, variables)
        command += ["-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={code}"]
        command += ["-drive", f"if=pflash,format=raw,unit=1,file={variables}"]
    if secure:
        command += ["-global", "driver=cfi.pflash01,property=secure,value=on", "-global", "ICH9-LPC.disable_s3=1"]
    return command


def _forwarded_port(machine: Machine) -> int:
    """Ask QEMU which port it took for SSH: it chose a free one itself, so nobody can have taken it meanwhile."""
    machine.wait("answer from QEMU", machine._monitor.exists, 30)
    try:
        text = str(machine.monitor("human-monitor-command", **{"command-line": "info usernet"}))
    except BakehouseError:
        machine.check()  # If it has ended, it has said why.
        raise
    match = re.search(r"TCP\[HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)", text)
    if not match:
        raise BakehouseError("QEMU does not say which port leads to SSH", log=text)
    return int(match[1])
