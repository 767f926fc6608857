"""A container registry on this host: Debian's docker-registry, which outlives the command that started it.

It runs as who calls, from a folder of its own: its configuration, its log, and what was pushed to it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from platformdirs import user_state_path

from bakehouse import host, lock, registry
from bakehouse.cache import disk_usage, write_atomically
from bakehouse.daemon import Daemon, Process
from bakehouse.errors import BakehouseError

PROGRAM = "docker-registry"
LOOPBACK = "127.0.0.1"
ANY = ("0.0.0.0", "::")  # noqa: S104 - looked for, not listened at


@dataclass(frozen=True)
class LocalRegistry:
    """The registry in a folder, running or not."""

    folder: Path
    host: str
    """Where it listens."""
    port: int

    @property
    def address(self) -> str:
        """What this host calls it, as in the name of an image."""
        return _joined(LOOPBACK if self.host in ANY else self.host, self.port)

    @property
    def storage(self) -> Path:
        """What was pushed to it."""
        return self.folder / "storage"

    @property
    def configuration(self) -> Path:
        """Its configuration file, which says where it listens."""
        return self.folder / "config.yml"

    @property
    def daemon(self) -> Daemon:
        """Its service."""
        return Daemon(PROGRAM, self.folder, f"http://{self.address}/v2/")

    def process(self) -> Process | None:
        """Return its process, where it runs."""
        return self.daemon.process()

    def repositories(self) -> list[str]:
        """Return the names of what it holds."""
        # Its "Architecture": a folder of manifests in each repository's.
        top = self.storage / "docker" / "registry" / "v2" / "repositories"
        return sorted(str(path.parent.relative_to(top)) for path in top.rglob("_manifests"))

    def disk(self) -> int:
        """Return the bytes that it takes on disk."""
        return disk_usage(self.folder)

    def configure(self) -> None:
        """Write its configuration."""
        self.storage.mkdir(parents=True, exist_ok=True)
        text = registry.configuration(str(self.storage), _joined(self.host, self.port))
        write_atomically(self.configuration, text)

    def must_be_free(self) -> None:
        """Check that it can listen where it shall.

        Raises:
            BakehouseError: something else does, or it is no place of this host.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            with socket.socket(family) as probe:
                # As it does: what it has just closed does not keep it out.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((self.host, self.port))
        except (OSError, OverflowError) as error:
            raise BakehouseError(
                f"no registry can listen at {self.host}, port {self.port}: {getattr(error, 'strerror', None) or error}",
                hint="choose another with --port or --address",
            ) from error

    def start(self, *, tied: bool = False) -> None:
        """Start it, and wait until it answers.

        Args:
            tied: it ends together with who started it.

        Raises:
            BakehouseError: it does not come up.
        """
        # It takes REGISTRY_* for its own settings (its "Configuration reference"): REGISTRY_AUTH_FILE, too.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("REGISTRY_")}
        self.daemon.start([PROGRAM, "serve", self.configuration], environment, tied=tied)


def default_folder() -> Path:
    """Return where the one of ``invoke registry.up`` is."""
    return user_state_path("bakehouse") / "registry"


def find(folder: Path | None = None) -> LocalRegistry | None:
    """Return the registry in a folder, running or not."""
    where = folder or default_folder()
    try:
        name, _, port = yaml.safe_load((where / "config.yml").read_text())["http"]["addr"].rpartition(":")
        return LocalRegistry(where, name.strip("[]"), int(port))
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError):
        return None


def up(
    *, folder: Path | None = None, address: str = "", port: int = 0, say: Callable[[str], None] = lambda _text: None
) -> LocalRegistry:
    """Bring the registry up: made where there is none, started where it does not run.

    Args:
        folder: where it is or shall be.
        address: where it listens: what it was last time, or the loopback.
        port: the same.
        say: takes lines about what is done.

    Raises:
        BakehouseError: the program is missing, it does not come up, or it runs elsewhere already.
    """
    host.must_have_tools(host.CONTAINER_TOOLS)
    where = folder or default_folder()
    with _held(where, say):
        there = find(where)
        old = there or LocalRegistry(where, LOOPBACK, registry.PORT)
        wanted = LocalRegistry(where, address or old.host, port or old.port)
        if there and there.process():
            if wanted != there:
                raise BakehouseError(
                    f"the registry runs at {there.host}, port {there.port}",
                    hint="`invoke registry.down` first; what it holds stays",
                )
            return there
        wanted.must_be_free()
        wanted.configure()
        say(f"starting {PROGRAM}")
        wanted.start()
    return wanted


def down(
    folder: Path | None = None, *, purge: bool = False, say: Callable[[str], None] = lambda _text: None
) -> LocalRegistry:
    """End the registry; what it holds stays, unless it shall be removed.

    Raises:
        BakehouseError: there is none.
    """
    where = folder or default_folder()
    with _held(where, say):
        found = find(where)
        if found is None:
            raise BakehouseError("there is no registry here", hint="`invoke registry.up` makes one")
        found.daemon.stop()
        if purge:
            shutil.rmtree(found.folder)
    return found


def _joined(host_name: str, port: int) -> str:
    return f"[{host_name}]:{port}" if ":" in host_name else f"{host_name}:{port}"


def _held(folder: Path, say: Callable[[str], None]) -> contextlib.AbstractContextManager[None]:
    """Keep others from bringing it up or down."""
    return lock.held(folder.with_suffix(".lock"), "the registry", wait=True, say=say)
