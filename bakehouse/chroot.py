"""A writable copy of an image's root in a private network, in which commands and daemons run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from bakehouse import waiting
from bakehouse.errors import BakehouseError
from bakehouse.network import FOLDER, INSIDE, Network
from bakehouse.run import PASSED_ON

START_SECONDS = 60

SOURCES = """\
deb {archive} {release} main
deb {archive} {release}-updates main
deb {security} {release}-security main
"""


class Chroot:
    """The copy. It and all that runs in it end with the network at the latest.

    Args:
        network: where it is; its daemons have the network's gateway's address.
        name: of the copy.
    """

    environment: Mapping[str, str] = INSIDE
    """Variables of its commands."""

    def __init__(self, network: Network, name: str) -> None:
        self.network = network
        self.root = FOLDER / "copies" / name / "root"
        self._name = name
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def prefix(self) -> list[str]:
        """What to put before a command so that it runs in it."""
        return [*self.network.everything, "chroot", str(self.root)]

    def path(self, inside: str) -> Path:
        """Return how the host reaches a file of it."""
        return self.network.path(self.root / inside.lstrip("/"))

    def make(self, image_root: Path) -> None:
        """Make it of a mounted image (Network.mount_image)."""
        self.network.writable_copy(image_root, self._name)
        mounts: list[list[str | Path]] = [
            ["mkdir", "-p", self.root / "proc", self.root / "dev", self.root / "run"],
            ["mount", "-t", "proc", "proc", self.root / "proc"],
            ["mount", "--bind", "/dev", self.root / "dev"],
            ["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", self.root / "run"],
        ]
        for command in mounts:
            self.network.run(command)

    def bind(self, file: Path, inside: str) -> None:
        """Show a file of the host in it."""
        self.path(inside).parent.mkdir(parents=True, exist_ok=True)
        self.path(inside).touch()
        self.network.run(["mount", "--bind", file, self.root / inside.lstrip("/")])

    def write(self, inside: str, text: str) -> None:
        """Write a file of it."""
        self.path(inside).parent.mkdir(parents=True, exist_ok=True)
        self.path(inside).write_text(text, encoding="utf-8")

    def run(self, *command: str, check: bool = False, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command in it.

        Args:
            command: the program and its arguments, such as ``srun hostname``.
            check: a failure is an error.
            timeout: seconds.

        Raises:
            BakehouseError: it failed and that is an error.
        """
        done = subprocess.run(
            [*self.prefix, *command],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=timeout, check=False,
            env=self.environment,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise BakehouseError(
                f"{command[0]} on the controller ended with status {done.returncode}", log=done.stdout + done.stderr
            )
        return done

    def install(self, release: str, mirrors: tuple[str, str], *packages: str) -> None:
        """Install Debian packages into it; they are thrown away with it.

        Args:
            release: of Debian, its own.
            mirrors: archive and security archive to install from.
            packages: their names.

        Raises:
            BakehouseError: the mirrors do not serve them.
        """
        archive, security = mirrors
        self.write("etc/apt/sources.list.d/debian.sources", "")
        self.write("etc/apt/sources.list", SOURCES.format(archive=archive, security=security, release=release))
        # Nothing is started by being installed (Debian policy, invoke-rc.d).
        self.write("usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n")
        self.path("usr/sbin/policy-rc.d").chmod(0o755)
        # With the host's network and names: the private network leads nowhere.
        self.write("run/systemd/resolve/stub-resolv.conf", Path("/etc/resolv.conf").read_text())
        script = 'apt-get update -qq && apt-get install -qq --yes --no-install-recommends "$@"'
        done = subprocess.run(
            [*self.network.but_for_network, "chroot", str(self.root), "sh", "-c", script, "sh", *packages],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
            env={
                **{name: value for name, value in os.environ.items() if name in PASSED_ON and "proxy" in name.lower()},
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive", "LANG": "C.UTF-8",
            },
        )  # fmt: skip
        if done.returncode != 0:
            raise BakehouseError(
                f"{', '.join(packages)} cannot be installed", hint="`invoke doctor` checks the mirrors",
                log=(done.stdout + done.stderr)[-3000:],
            )  # fmt: skip

    def daemon(self, name: str, command: list[str], *, outside: bool = False) -> None:
        """Start a daemon in it. What it says is in log().

        Args:
            name: of the program.
            command: with its arguments.
            outside: with the host's network.
        """
        prefix = self.network.but_for_network if outside else self.network.everything
        command = ["chroot", str(self.root), *command]
        self._daemons[name] = self.network.start(command, FOLDER / f"{name}.log", prefix=prefix)

    def has_daemon(self, name: str) -> bool:
        """Say whether a daemon was started and not killed."""
        return name in self._daemons

    def must_run(self, name: str) -> None:
        """Raise where a daemon has ended.

        Raises:
            BakehouseError: it has.
        """
        if self._daemons[name].poll() is not None:
            raise BakehouseError(f"{name} ended", log=self.log(name)[-3000:])

    def wait_for(self, name: str, fact: Callable[[], bool], seconds: float = START_SECONDS) -> None:
        """Wait for the first answer of a daemon.

        Raises:
            BakehouseError: it ended, or does not answer within the time.
        """
        waiting.until(
            f"answer from {name}", fact, seconds, poll=0.1,
            check=lambda: self.must_run(name), last_words=lambda: self.log(name)[-3000:],
        )  # fmt: skip

    def kill(self, name: str) -> None:
        """Kill a daemon, as a crash would."""
        process = self._daemons.pop(name, None)
        if process:
            # The process that we started is nsenter; the name of a program has 15 characters (proc(5), comm).
            self.network.run(["pkill", "-KILL", "-x", name[:15]])
            process.wait(10)

    def log(self, name: str) -> str:
        """Return what a daemon said."""
        return self.network.log_of(name)
