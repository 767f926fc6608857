"""A container registry in a private network: Debian's docker-registry, with the images that a node image holds."""

from __future__ import annotations

from pathlib import Path

import yaml

from bakehouse.chroot import Chroot
from bakehouse.network import GATEWAY, Network

NAME = "registry"
PORT = 5000
LOADED = "/usr/share/bakehouse/container-images"
"""Names of the images in the store of an image's containerd. The element kubernetes-node writes it."""

PUSH_SECONDS = 600
STORE = 'version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n'


def configuration(storage: str, address: str) -> str:
    """Return docker-registry's configuration, as its "Configuration reference" has it. It asks for no password.

    Args:
        storage: the folder of its blobs.
        address: where it listens, such as 127.0.0.1:5000 or :5000.
    """
    storages = {"filesystem": {"rootdirectory": storage}, "delete": {"enabled": True}}
    return yaml.safe_dump({"version": 0.1, "log": {"level": "info"}, "storage": storages, "http": {"addr": address}})


class Registry(Chroot):
    """The registry, in a copy of an image's root.

    Args:
        network: where it is; it has the network's gateway's address.
    """

    def __init__(self, network: Network) -> None:
        super().__init__(network, NAME)
        self.address = f"{GATEWAY}:{PORT}"

    def prepare(self, image_root: Path, release: str, mirrors: tuple[str, str]) -> None:
        """Make its root.

        Args:
            image_root: a mounted image (Network.mount_image).
            release: Debian release of the image.
            mirrors: archive and security archive that the registry is installed from.

        Raises:
            BakehouseError: the mirrors do not serve it.
        """
        self.make(image_root)
        self.install(release, mirrors, "docker-registry")
        # Its network leads nowhere.
        self.write("etc/bakehouse-registry.yml", configuration("/var/lib/registry", f":{PORT}"))

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            BakehouseError: it does not.
        """
        self.daemon(NAME, ["docker-registry", "serve", "/etc/bakehouse-registry.yml"])
        ask = f"import urllib.request; urllib.request.urlopen('http://{self.address}/v2/', timeout=5)"
        self.wait_for(NAME, lambda: self.run("python3", "-c", ask).returncode == 0)

    def push_loaded(self) -> list[str]:
        """Push the images that are loaded in the image, each under its path at its own registry. Return their names.

        Raises:
            BakehouseError: one cannot be pushed.
        """
        self.write("run/store.toml", STORE)
        where = ["--root", "/var/lib/containerd", "--state", "/run/store", "--address", "/run/store.sock"]
        self.daemon("containerd", ["containerd", "--config", "/run/store.toml", *where])
        ctr = ["ctr", "--address", "/run/store.sock", "--namespace", "k8s.io"]
        self.wait_for("containerd", lambda: self.run(*ctr, "version").returncode == 0)
        try:
            names = self.run("cat", LOADED, check=True).stdout.split()
            for name in names:
                target = f"{self.address}/{name.partition('/')[2]}"
                push = ["images", "push", "--plain-http", "--platform", "linux/amd64", target, name]
                self.run(*ctr, *push, check=True, timeout=PUSH_SECONDS)
        finally:
            self.kill("containerd")
        return names


def mirror_of_all(address: str) -> dict[str, str]:
    """Return a file of cloud-config's write_files by which containerd pulls all images from one registry.

    Source: containerd, docs/hosts.md.

    Args:
        address: of the registry, with its port.
    """
    # 1.7 reads no file without a host in it.
    text = f'[host."http://{address}"]\ncapabilities = ["pull", "resolve"]\n'
    return {"path": "/etc/containerd/certs.d/_default/hosts.toml", "content": text}
