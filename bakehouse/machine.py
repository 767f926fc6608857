"""Machines: something that boots an image. Here QEMU, with KVM where it works and emulation otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qemu.qmp import QMPClient, QMPError

from bakehouse import kvm, run, seed
from bakehouse.errors import BakehouseError

Firmware = Literal["bios", "uefi"]

OVMF_CODE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
OVMF_VARIABLES = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")

EMULATED_CPU = "Nehalem,-cx16"
"""Without cmpxchg16b: QEMU's emulation of it panics guests now and then, and this model costs a fifth less than max."""

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Login:
    """How to log in to a machine."""

    host: str
    port: int
    user: str
    key: Path
    """The private key."""

    @property
    def options(self) -> list[str]:
        """Options of ssh: this key only, and no memory of host keys, since machines come and go."""
        settings = {
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": "/dev/null",
            "IdentitiesOnly": "yes",
            "LogLevel": "ERROR",
        }
        return ["-i", str(self.key), *(part for key, value in settings.items() for part in ("-o", f"{key}={value}"))]

    @property
    def command(self) -> list[str]:
        """The ssh command line."""
        return ["ssh", *self.options, "-p", str(self.port), f"{self.user}@{self.host}"]


@dataclass
class Machine:
    """A running machine. Made by boot()."""

    login: Login
    console: Path
    """What the serial console said so far."""
    accelerator: str
    """kvm or tcg (emulation)."""
    _process: subprocess.Popen[bytes]
    _monitor: Path
    _said: Path
    started: float = field(default_factory=time.monotonic)

    @property
    def running(self) -> bool:
        """Whether it is on."""
        return self._process.poll() is None

    def output(self) -> str:
        """Return what the serial console said so far."""
        return self.console.read_text(errors="replace") if self.console.exists() else ""

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
        deadline = time.monotonic() + seconds
        while not fact():
            self.check()
            if time.monotonic() > deadline:
                last = "\n".join(self.output().splitlines()[-20:])
                raise BakehouseError(
                    f"no {what} within {seconds:.0f} s (QEMU used {self.cpu_seconds():.0f} CPU seconds)",
                    hint="the console's last lines are below; a busy host may need --timeout",
                    log=last,
                )
            time.sleep(POLL_SECONDS)

    def ssh(self, command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a shell command in the machine, as its default user.

        Args:
            command: the command line.
            timeout: seconds.
        """
        return subprocess.run(
            [*self.login.command, "-o", "ConnectTimeout=20", command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )

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


def make_key(folder: Path) -> Path:
    """Make an SSH key for a machine's lifetime. Return the private one's path; the public one has ``.pub``."""
    path = folder / "id_ed25519"
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
) -> Iterator[Machine]:
    """Boot an image with a NoCloud seed. The image is only read: what the machine writes goes to an overlay.

    The machine ends with the block, and with this process, however it ends.

    Args:
        image: a qcow2 or raw file.
        probe: the folder where the answer about KVM is kept.
        firmware: bios or uefi.
        memory: MiB.
        cpus: how many.
        disk_size: bytes of the disk that the machine sees; the image's own size if that is larger.
        key: the private key to log in with, its public one beside it; one is made if there is none.
        user_data: for cloud-init; by default just the key.
        hostname: the node's name.
        user: the image's default user.
        keep_console: where to write the console; a temporary file by default.

    Raises:
        BakehouseError: QEMU does not start.
    """
    try:
        accelerated = kvm.works(probe).works
    except BakehouseError:
        accelerated = False
    with tempfile.TemporaryDirectory(prefix="bakehouse-machine-") as name:
        folder = Path(name)
        key = key or make_key(folder)
        public = key.with_name(f"{key.name}.pub")
        if not public.is_file():
            raise BakehouseError(f"{public} is not there", hint=f"ssh-keygen -y -f {key} > {public}")
        overlay, seed_disk = folder / "disk.qcow2", folder / "seed.iso"
        _overlay(image, overlay, disk_size)
        data = user_data or seed.user_data_with_key(public.read_text())
        seed.nocloud(seed_disk, hostname=hostname, instance_id=f"i-{uuid.uuid4().hex[:12]}", user_data=data)
        console = keep_console or folder / "console.log"
        console.write_bytes(b"")
        command = _command(
            folder, overlay, seed_disk, console, firmware=firmware, memory=memory, cpus=cpus, accelerated=accelerated
        )
        said = folder / "qemu.log"
        with said.open("wb") as output:
            process = subprocess.Popen(
                # setpriv makes the kernel end QEMU when we end, SIGKILL included.
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        login = Login("127.0.0.1", 0, user, key)
        machine = Machine(login, console, "kvm" if accelerated else "tcg", process, folder / "qmp", said)
        try:
            with run.ending_on_sigterm():
                machine.login = Login("127.0.0.1", _forwarded_port(machine), user, key)
                yield machine
        finally:
            machine.kill()


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
    seed_disk: Path,
    console: Path,
    *,
    firmware: Firmware,
    memory: int,
    cpus: int,
    accelerated: bool,
) -> list[str]:
    command = [
        "qemu-system-x86_64", "-nodefaults", "-display", "none", "-vga", "none",
        "-machine", f"q35,accel={'kvm' if accelerated else 'tcg'}",
        "-cpu", "host" if accelerated else EMULATED_CPU,
        "-smp", str(cpus), "-m", str(memory),
        "-drive", f"if=none,id=disk,file={disk},format=qcow2,cache=unsafe,discard=unmap",
        "-device", "virtio-blk-pci,drive=disk,bootindex=1",
        "-drive", f"if=none,id=seed,file={seed_disk},format=raw,readonly=on",
        "-device", "virtio-blk-pci,drive=seed",
        "-netdev", "user,id=net,hostfwd=tcp:127.0.0.1:0-:22",
        "-device", "virtio-net-pci,netdev=net,romfile=",
        "-device", "virtio-rng-pci",
        "-chardev", f"file,id=console,path={console},append=on", "-serial", "chardev:console",
        "-qmp", f"unix:{folder / 'qmp'},server=on,wait=off",
    ]  # fmt: skip
    if firmware == "uefi":
        variables = folder / "uefi-variables.fd"
        shutil.copyfile(OVMF_VARIABLES, variables)
        command += ["-drive", f"if=pflash,format=raw,readonly=on,file={OVMF_CODE}"]
        command += ["-drive", f"if=pflash,format=raw,file={variables}"]
    return command


def _forwarded_port(machine: Machine) -> int:
    """Ask QEMU which port it took for SSH: it chose a free one itself, so nobody can have taken it meanwhile."""
    machine.wait("answer from QEMU", machine._monitor.exists, 30)
    text = str(machine.monitor("human-monitor-command", **{"command-line": "info usernet"}))
    match = re.search(r"TCP\[HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)", text)
    if not match:
        raise BakehouseError("QEMU does not say which port leads to SSH", log=text)
    return int(match[1])
