"""Which images the servers of a cloud were made of, as Nova tells."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from http import HTTPStatus

from bakehouse.cloud import Cloud, CloudError


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

    All regions are asked: one Glance may serve several.

    Raises:
        CloudError: Nova is there and uses this Glance, but does not answer.
    """
    regions = sorted(cloud.endpoints("compute"))
    if not regions:
        return Usage("", f"{cloud.place} has no compute service (Nova) in its catalogue", Counter())
    found = [_usage_in(cloud, region) for region in regions]
    known = {one.known for one in found}
    return Usage(
        "all projects" if known == {"all projects"} else "own project" if any(known) else "",
        "; ".join(dict.fromkeys(one.reason for one in found if one.reason)),
        sum((one.servers for one in found), Counter()),
    )


def _usage_in(cloud: Cloud, region: str) -> Usage:
    where = "" if region == cloud.region else f" in {region}"
    try:
        return Usage("all projects", "", _count(cloud, region, "all_tenants=1&"))
    except CloudError as error:
        if error.status != HTTPStatus.FORBIDDEN:
            return _not_answered(cloud, region, error)
    try:
        servers = _count(cloud, region, "")
    except CloudError as error:
        if error.status not in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            return _not_answered(cloud, region, error)
        return Usage("", f"the credential may not list servers{where}", Counter())
    return Usage("own project", "servers of other projects cannot be seen with this credential", servers)


def _not_answered(cloud: Cloud, region: str, error: CloudError) -> Usage:
    """Return what is known of a Nova that does not answer: nothing, and that only where it has a Glance of its own."""
    images = cloud.endpoints("image")
    ours = images.get(cloud.region)
    if images.get(region, ours) == ours:
        raise error
    return Usage("", f"the Nova of {region} does not answer ({error.message})", Counter())


def _count(cloud: Cloud, region: str, scope: str) -> Counter[str]:
    found: Counter[str] = Counter()
    what = f"listing servers in {region}" if region else "listing servers"
    for server in cloud.pages("/servers/detail", "servers", service="compute", query=scope, region=region, what=what):
        image = server.get("image")
        if isinstance(image, dict) and image.get("id"):
            found[image["id"]] += 1
    return found
