"""Which images the servers of a cloud were made of, as Nova tells."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import urlsplit

from bakehouse.cloud import Cloud, CloudError

PAGE = 1000


@dataclass(frozen=True)
class Usage:
    """How many servers use each image."""

    known: str
    """What was asked: ``all projects``, ``own project``, or empty where the cloud cannot be asked."""
    reason: str
    """Why not all is known."""
    servers: Counter[str]
    """Servers by the image's id. Those that boot from a volume name no image and need none."""

    def text(self, image: str) -> str:
        """Write how many use an image."""
        return str(self.servers[image]) if self.known else "?"


def usage(cloud: Cloud) -> Usage:
    """Ask how many servers use each image: in all projects where we may, else in our own.

    Raises:
        CloudError: Nova is there, but does not answer.
    """
    if not cloud.has("compute"):
        return Usage("", f"{cloud.place} has no compute service (Nova) in its catalogue", Counter())
    try:
        return Usage("all projects", "", _count(cloud, "all_tenants=1&"))
    except CloudError as error:
        if error.status != HTTPStatus.FORBIDDEN:
            raise
    try:
        servers = _count(cloud, "")
    except CloudError as error:
        if error.status not in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            raise
        return Usage("", "the credential may not list servers", Counter())
    return Usage("own project", "servers of other projects cannot be seen with this credential", servers)


def _count(cloud: Cloud, scope: str) -> Counter[str]:
    found: Counter[str] = Counter()
    path: str | None = f"/servers/detail?{scope}limit={PAGE}"
    while path:
        page = cloud.request("GET", path, service="compute", what="listing servers").json()
        for server in page["servers"]:
            image = server.get("image")
            if isinstance(image, dict) and image.get("id"):
                found[image["id"]] += 1
        following = [link["href"] for link in page.get("servers_links", []) if link.get("rel") == "next"]
        path = f"/servers/detail?{urlsplit(following[0]).query}" if following else None
    return found
