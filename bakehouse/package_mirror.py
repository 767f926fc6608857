"""A package mirror in a private network: Debian's apt-cacher-ng, which keeps what it once fetched."""

from __future__ import annotations

import contextlib
import random
import socket
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from bakehouse.chroot import Chroot
from bakehouse.network import GATEWAY, Network

NAME = "apt-cacher-ng"
PORT = 3142
"""Its own default."""

SOCKET = "/run/bakehouse-mirror.socket"
"""Between the networks: a socket in a file system belongs to none."""

KEPT = "/var/cache/apt-cacher-ng"

ALIASES = {
    "debian": "deb.debian.org/debian ftp.debian.org/debian",
    "security": "deb.debian.org/debian-security security.debian.org/debian-security security.debian.org",
}
"""What nodes ask for, whatever mirror it comes from in the end."""


class PackageMirror(Chroot):
    """The mirror, in a copy of an image's root. Its network is the host's; a relay brings it into the private one.

    Args:
        network: where it is; it has the network's gateway's address.
        cache: a folder of the host for what it fetched, kept for the next time.
    """

    def __init__(self, network: Network, cache: Path) -> None:
        super().__init__(network, NAME)
        self._cache = cache
        self._port = _free_port()
        self.proxy = f"http://{GATEWAY}:{PORT}"
        """What nodes name as their HTTP proxy."""

    def prepare(self, image_root: Path, release: str, mirrors: tuple[str, str]) -> None:
        """Make its root.

        Args:
            image_root: a mounted image (Network.mount_image).
            release: Debian release of the image.
            mirrors: archive and security archive that it fetches from, and that it is installed from.

        Raises:
            BakehouseError: the mirrors do not serve it.
        """
        self.make(image_root)
        self.install(release, mirrors, NAME, "socat")
        lines = [
            f"CacheDir: {KEPT}", "LogDir: /var/log/apt-cacher-ng", "BindAddress: 127.0.0.1", f"Port: {self._port}",
            "ForeGround: 1", "ReportPage:", "PidFile: /run/apt-cacher-ng.pid",
        ]  # fmt: skip
        for (name, aliases), mirror in zip(ALIASES.items(), mirrors, strict=True):
            lines.append(f"Remap-{name}: {aliases} ; {mirror}")
        if proxy := proxy_to(mirrors):
            lines.append(f"Proxy: {proxy}")
        self.write("etc/bakehouse-mirror/acng.conf", "\n".join(lines) + "\n")
        self._cache.mkdir(parents=True, exist_ok=True)
        self.network.run(["mount", "--bind", self._cache.absolute(), self.root / KEPT.lstrip("/")])

    def start(self) -> None:
        """Start it and wait until it answers. ``kill(NAME)`` ends it.

        Raises:
            BakehouseError: it does not.
        """
        self.daemon(NAME, ["apt-cacher-ng", "-c", "/etc/bakehouse-mirror"], outside=True)
        if not self.has_daemon("socat-in"):
            out = ["socat", f"UNIX-LISTEN:{SOCKET},fork", f"TCP:127.0.0.1:{self._port}"]
            self.daemon("socat-out", out, outside=True)
            listen = f"TCP-LISTEN:{PORT},bind={GATEWAY},fork,reuseaddr"
            self.daemon("socat-in", ["socat", listen, f"UNIX-CONNECT:{SOCKET}"])
        ask = f"import urllib.request; urllib.request.urlopen('{self.proxy}/', timeout=5)"
        self.wait_for(NAME, lambda: "HTTP Error 406" in self.run("python3", "-c", ask).stderr)


def proxy_to(mirrors: Sequence[str]) -> str:
    """Return the HTTP proxy that this host reaches mirrors by, as apt takes it from the environment; empty for none."""
    direct = [urllib.request.proxy_bypass(urlsplit(mirror).netloc) for mirror in mirrors]
    return "" if all(direct) else urllib.request.getproxies_environment().get("http", "")


def _free_port() -> int:
    """Return a free port of the host that apt-cacher-ng can listen at: it takes none above 32767."""
    while True:
        port = random.randrange(20000, 32768)  # noqa: S311 - no secret
        with socket.socket() as made, contextlib.suppress(OSError):
            made.bind(("127.0.0.1", port))
            return port
