"""Containers of an image's own root: systemd, agent and platform as on a machine, on the host's kernel.

They boot within a second where an emulated machine takes a minute, so faults and storms of many nodes are tried with
them. What depends on the kernel (cgroups, drivers, clocks) is not: that takes a machine.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from bakehouse import waiting
from bakehouse.errors import BakehouseError
from bakehouse.network import FOLDER, INSIDE, Network, Port

POLL_SECONDS = 0.1
START_SECONDS = 30
MANY_WATCHES = 2048
"""systemd takes about five inotify instances in each container; a host has 128 by default."""

OPTIONS = [
    "--quiet", "--boot", "--register=no", "--keep-unit", "--console=pipe", "--kill-signal=SIGRTMIN+3",
    "--resolv-conf=off", "--timezone=off", "--link-journal=no",
    # Its network namespace is its own, so it may set addresses and rules there.
    "--capability=CAP_NET_ADMIN",
]  # fmt: skip
"""See systemd-nspawn(1)."""

NESTED = "--system-call-filter=@keyring bpf"
"""What crun needs beside that to run containers in a container."""


class Container:
    """A running container. Made by boot()."""

    def __init__(
        self,
        network: Network,
        port: Port,
        root: Path,
        hostname: str,
        podman_storage: Path | None = None,
        shared: Sequence[Path] = (),
    ) -> None:
        self.network = network
        self.hostname = hostname
        self.podman_storage = podman_storage
        self.shared = shared
        self.port = port
        self.root = root
        """Its root, in the network's place."""
        self._console = FOLDER / f"{port.name}.console"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        """The node's name."""
        return self.port.name

    @property
    def running(self) -> bool:
        """Whether it is on."""
        return self._process is not None and self._process.poll() is None

    def path(self, inside: str) -> Path:
        """Return how the host reaches a file of the container."""
        return self.network.path(self.root / inside.lstrip("/"))

    def write(self, inside: str, text: str, mode: int = 0o644) -> None:
        """Write a file of the container."""
        target = self.path(inside)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch(mode=mode)
        target.chmod(mode)
        target.write_text(text, encoding="utf-8")

    def power_on(self) -> None:
        """Boot."""
        command = [
            "systemd-nspawn", *OPTIONS, f"--directory={self.root}", f"--machine={self.name}",
            f"--hostname={self.hostname}", f"--network-namespace-path=/run/netns/{self.name}",
        ]  # fmt: skip
        if self.podman_storage:
            command += [f"--bind={self.podman_storage}:/var/lib/containers", NESTED]
        command += [f"--bind={folder}" for folder in self.shared]
        # A host with both versions of cgroups would give it the first otherwise.
        unified = {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}
        self._process = self.network.start(command, self._console, unified)
        waiting.until(
            f"start of {self.name}", lambda: self.leader() is not None, START_SECONDS, poll=POLL_SECONDS,
            check=self._must_run, last_words=self.output,
        )  # fmt: skip

    def _must_run(self) -> None:
        if not self.running:
            raise BakehouseError(
                f"the container {self.name} does not start",
                hint=f"with many of them: sysctl fs.inotify.max_user_instances={MANY_WATCHES}",
                log=self.output()[-2000:],
            )

    def output(self) -> str:
        """Return what the console said so far."""
        console = self.network.path(self._console)
        return console.read_text(errors="replace") if console.exists() else ""

    def leader(self) -> int | None:
        """Return its process 1, as the host sees it."""
        pid = self._process.pid if self._process else 0
        # nsenter started systemd-nspawn, which started the container.
        for _ in range(2):
            try:
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            except OSError:
                return None
            if not children:
                return None
            pid = int(children[0])
        return pid

    def run(self, *command: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command in the container, as root.

        Args:
            command: the program and its arguments.
            timeout: seconds.

        Raises:
            BakehouseError: the container is off.
        """
        leader = self.leader()
        if leader is None:
            raise BakehouseError(f"{self.name} is off", log=self.output()[-2000:])
        return subprocess.run(
            ["nsenter", f"--target={leader}", "--all", "--", *command],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=timeout, check=False,
            env=INSIDE,
        )  # fmt: skip

    def shell(self, script: str, timeout: float = 60) -> str:
        """Run a shell script in the container. Return what it printed.

        Raises:
            BakehouseError: it failed.
        """
        done = self.run("bash", "-euo", "pipefail", "-c", script, timeout=timeout)
        if done.returncode != 0:
            raise BakehouseError(f"{self.name}: {script} ended with {done.returncode}", log=done.stdout + done.stderr)
        return done.stdout

    def journal(self, *options: str) -> str:
        """Return the journal of this boot, or a part of it."""
        return self.run("journalctl", "--boot", "--no-pager", *options).stdout

    def wait(self, what: str, fact: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until something holds.

        Raises:
            BakehouseError: it did not come to hold.
        """

        def last_words() -> str:
            with contextlib.suppress(BakehouseError, subprocess.TimeoutExpired):
                return self.journal("--lines=40")
            return self.output()[-3000:]

        waiting.until(f"{what} on {self.name}", fact, seconds, poll=POLL_SECONDS, last_words=last_words)

    def power_off(self, *, clean: bool = True, seconds: float = 20) -> None:
        """Go down, or have the power cut."""
        if self._process is None:
            return
        leader = self.leader()
        if clean and leader is not None:
            # What systemd-nspawn sends to have systemd power off: halt.target.
            with contextlib.suppress(ProcessLookupError):
                os.kill(leader, signal.SIGRTMIN + 3)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        leader = self.leader()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        if leader is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(leader, signal.SIGKILL)
        self._process.wait(10)
        self._process = None

    def reboot(self, *, clean: bool = True) -> None:
        """Go down and boot again."""
        self.power_off(clean=clean)
        # Its network namespace stays, as a machine's port does; its link begins anew.
        self.power_on()


@contextmanager
def boot(
    network: Network,
    image_root: Path,
    name: str,
    *,
    files: Mapping[str, tuple[str, int]] | None = None,
    layer: str = "50%",
    hostname: str = "",
    podman_storage: Path | None = None,
    shared: Sequence[Path] = (),
) -> Iterator[Container]:
    """Boot a container of an image's root. It ends with the block, and what it wrote is thrown away.

    Args:
        network: where it is plugged in.
        image_root: a mounted image (Network.mount_image).
        name: the node's name.
        files: by path, texts and modes to write before it boots.
        hostname: another host name than the node's.
        layer: the size of what it may write, in the words of tmpfs(5).
        podman_storage: a folder for images and containers of a node that runs some: overlays cannot be on overlays.
        shared: folders of the host that it has at the same paths. None below /tmp, which it has of its own.
    """
    port = network.port(name)
    network.add_namespace(port)
    root = network.writable_copy(image_root, name, size=layer)
    made = Container(network, port, root, hostname or name, podman_storage, shared)
    for path, (text, mode) in (files or {}).items():
        made.write(path, text, mode)
    try:
        made.power_on()
        yield made
    finally:
        made.power_off(clean=False)
        # The kernel takes a link back some time after its namespace; its name may be wanted at once.
        network.remove(port)
        network.run(["ip", "netns", "delete", name])
        network.drop_copy(name)
