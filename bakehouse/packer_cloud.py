"""Packer on a server in a cloud, for sites that bake inside theirs: the server's image is fetched and finished here.

What Packer makes in the cloud is the copy of a server's disk, without properties, checks or record. So it is not what
gets published: it is fetched into the bake, becomes an image like any other, and is deleted.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from bakehouse import run, server_checks, teardown
from bakehouse.cloud import Cloud, connect
from bakehouse.errors import BakehouseError
from bakehouse.glance import CloudImage, Glance
from bakehouse.plan import Server
from bakehouse.published import Catalogue

if TYPE_CHECKING:
    from bakehouse.build import Job

BUILDER = "openstack"

STOP_SECONDS = 120.0
"""How long Packer has to delete its server when a bake is ended."""

HURRY_SECONDS = 10.0
"""How long a cloud that is away is waited for when something is to be removed."""

CREDENTIALS = "OS_"
"""What the variables begin with that say how to log in to a cloud (openstackclient's documentation)."""


def base_in(server: Server, name: str, owner: str) -> tuple[CloudImage, str, str, str]:
    """Find the image that a server shall boot.

    Args:
        server: the server.
        name: a manifest's name, for its newest published image; a tag; or the id of any image.
        owner: the project whose images count as ours; the credential's own by default.

    Returns:
        The image; its tag, manifest's name and input digest, all empty where it is not one of ours.

    Raises:
        BakehouseError: there is none, or the cloud does not answer.
    """
    with connect(server.cloud) as cloud:
        ours = Catalogue.read(cloud, owner).images
        found = next((one for one in ours if one.usable and name in {one.name, one.tag, one.id}), None)
        if found:
            return found.image, found.tag, found.name, found.says("digest")
        other = Glance(cloud).get(name) if name.count("-") == 4 else None  # noqa: PLR2004 # as UUIDs have
        if other is None or other.status != "active":
            raise BakehouseError(
                f"{cloud.place} has no image '{name}' that a server can boot",
                hint=f"invoke publish {name} --cloud {cloud.name}, or --base with an image's id",
            )
        return other, "", "", ""


def disk_of(job: Job, folder: Path, write: Callable[[Mapping[str, str]], list[str | Path]]) -> Path:
    """Have Packer set a server up, and fetch its disk.

    Args:
        job: the bake.
        folder: for files.
        write: writes variables beside those that every builder has, and returns the command that runs Packer.

    Returns:
        The disk, a file in the folder.

    Raises:
        BakehouseError: Packer failed, or the cloud refused something. Nothing is left in it.
    """
    assert job.plan.origin is not None
    server = job.plan.origin.server
    assert server is not None
    # Another bake of the same waits for this host's lock; on another host it has another name.
    name = f"bakehouse-packer-{job.plan.name}-{platform.node()}"
    variables = {
        "cloud": server.cloud, "base": job.plan.origin.image, "server_name": name,
        "image_name": name, "flavor": server.flavor, "floating_network": server.floating_network,
        "security_group": server.security_group, "use_volume": "true" if server.volume_size else "false",
        "volume_size": str(server.volume_size),
    }  # fmt: skip
    credentials = {key: value for key, value in os.environ.items() if key.startswith(CREDENTIALS)}
    (folder / "tmp").mkdir(exist_ok=True)
    environment = run.build_environment({**credentials, "TMPDIR": str(folder / "tmp")})
    with connect(server.cloud) as cloud:
        for what in _remove(cloud, name):
            job.progress.note(f"removed {what} from {cloud.place}, which a killed run had left")
        try:
            there = teardown.listed(cloud, "/networks", "networks", service="network")
            wanted = (server.network,) if server.network else ()
            command = write(variables | {"network": server_checks.choose_networks(cloud, wanted, there)[0]})
            # Ended with us, however we end, so that it deletes its server.
            run.run(["setpriv", "--pdeathsig", "TERM", *command, str(STOP_SECONDS)], job.log, environment=environment,
                    stop_seconds=STOP_SECONDS + HURRY_SECONDS)  # fmt: skip
            return _fetched(cloud, name, folder)
        finally:
            with cloud.hurried(HURRY_SECONDS):
                _remove(cloud, name)


def _fetched(cloud: Cloud, name: str, folder: Path) -> Path:
    glance = Glance(cloud)
    found = [image for image in glance.list(name=name, owner=cloud.project) if image.status == "active"]
    if not found:
        raise BakehouseError(f"Packer ended well but left no image '{name}' in {cloud.place}")
    image = found[0]
    disk = folder / f"server.{image.disk_format}"
    digest = hashlib.new(image.hash_algorithm) if image.hash_algorithm else None
    with disk.open("wb") as file:
        for chunk in glance.download(image):
            file.write(chunk)
            if digest:
                digest.update(chunk)
    if digest and digest.hexdigest() != image.hash_value:
        raise BakehouseError(
            f"{cloud.place}: what came of image {image.id} is not what Glance says it is", hint="try again"
        )
    return disk


def _remove(cloud: Cloud, name: str) -> list[str]:
    """Delete servers, volumes and images of a name. Return what they were."""
    removed = []
    for one in teardown.servers(cloud):
        if one["name"] == name and one.get("tenant_id") == cloud.project:
            cloud.request("DELETE", f"/servers/{one['id']}", service="compute", ok=(204, 404), what="deleting a server")
            removed.append(f"server {one['id']}")
    glance = Glance(cloud)
    for image in glance.list(name=name, owner=cloud.project):
        # Glance's filters are not trusted with what is to be deleted.
        if (image.name, image.owner) == (name, cloud.project):
            with suppress(BakehouseError):
                glance.delete(image)
                removed.append(f"image {image.id}")
    for volume in _volumes(cloud, name):
        # One that a server is still giving up is not deleted: the next bake does it.
        with suppress(BakehouseError):
            path = f"/volumes/{volume}"
            cloud.request("DELETE", path, service="block-storage", ok=(202, 404), what="deleting a volume")
            removed.append(f"volume {volume}")
    return removed


def _volumes(cloud: Cloud, name: str) -> list[str]:
    if not cloud.has("block-storage"):
        return []
    found = teardown.listed(cloud, "/volumes/detail", "volumes", service="block-storage")
    mine = [one for one in found if one.get("os-vol-tenant-attr:tenant_id", cloud.project) == cloud.project]
    return [one["id"] for one in mine if one["name"] == name]
