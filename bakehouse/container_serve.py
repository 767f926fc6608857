"""A platform's container image for the nodes of a private network, from Debian's docker-registry.

It is pushed to a registry on this host's loopback, since buildah is on this host's network. Another one serves it in
the private network, from the same folder.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from bakehouse import container_image, container_push, registry, userdata
from bakehouse.cache import BaseCache
from bakehouse.container_image import Shelf
from bakehouse.container_push import Target
from bakehouse.daemon import free_ports
from bakehouse.local_registry import LOOPBACK, PROGRAM, LocalRegistry
from bakehouse.network import FOLDER, GATEWAY, Network
from bakehouse.plan import Plan
from bakehouse.settings import Settings

ADDRESS = f"{GATEWAY}:{registry.PORT}"
"""Of the registry in the network."""


def provide(network: Network, wanted: Plan, settings: Settings, folder: Path) -> userdata.ContainerImage:
    """Serve a plan's image in a network. It is built where the cache has none.

    Args:
        network: where; it has the network's gateway's address.
        wanted: the plan.
        settings: the site's; the image goes into their cache.
        folder: for what the registries hold, as long as the network is there.

    Raises:
        BakehouseError: it cannot be built or pushed.
    """
    shelf, order = Shelf(BaseCache(settings.cache)), container_image.order_of(wanted, settings)
    with on_loopback(folder) as target:
        pushed = container_push.push(order, shelf, target, Console(quiet=True))
    serve(network, folder)
    return served(pushed.reference)


@contextmanager
def on_loopback(folder: Path) -> Iterator[Target]:
    """Run a registry that can be pushed to. It ends with the block, and with this process.

    Args:
        folder: for what it holds.
    """
    (port,) = free_ports(1)
    made = LocalRegistry(folder, LOOPBACK, port)
    made.configure()
    try:
        made.start(tied=True)
        yield Target(made.address, insecure=True)
    finally:
        made.daemon.stop()


def serve(network: Network, folder: Path) -> subprocess.Popen[bytes]:
    """Run a registry in a network, as long as that is there, with what was pushed into a folder."""
    made = LocalRegistry(folder, str(GATEWAY), registry.PORT)
    made.configure()
    return network.start([PROGRAM, "serve", made.configuration], FOLDER / "registry.log")


def served(reference: str) -> userdata.ContainerImage:
    """Return how nodes of the network name an image that was pushed on the loopback."""
    return userdata.ContainerImage(f"{ADDRESS}/{reference.partition('/')[2]}", insecure=True)
