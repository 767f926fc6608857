"""Taking down what launches made on a cloud. It is found by its mark, so nothing else is ever touched."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from bakehouse import waiting
from bakehouse.cloud import Cloud, CloudError
from bakehouse.errors import BakehouseError
from bakehouse.launch import KEPT, Mark
from bakehouse.waiting import TooLateError

MICROVERSION = "2.64"
"""Of Nova's API (Rocky, 2018): server groups have one policy, servers can be made with tags."""

GONE_SECONDS = 300.0
"""How long a server or volume may take to go."""

POLL_SECONDS = 2.0

AGAIN_SECONDS = 30.0
"""A server that does not go is told again so often."""

ORDER = ("server", "volume", "port", "floating ip", "server group", "keypair")
"""What is deleted first stands first; the words of ``openstack KIND delete``."""


@dataclass(frozen=True)
class Thing:
    """Something that a launch made."""

    kind: str
    """One of ORDER."""
    id: str
    name: str
    mark: Mark
    detail: str = ""
    kept: bool = False
    """A volume that shall outlive its launch."""

    @property
    def path(self) -> tuple[str, str]:
        """The service, and where it is there."""
        places = {
            "server": ("compute", "/servers"),
            "volume": ("block-storage", "/volumes"),
            "port": ("network", "/ports"),
            "floating ip": ("network", "/floatingips"),
            "server group": ("compute", "/os-server-groups"),
            "keypair": ("compute", "/os-keypairs"),
        }
        service, path = places[self.kind]
        return service, f"{path}/{quote(self.id, safe='')}"

    @property
    def by_hand(self) -> str:
        """The command that deletes it."""
        return f"openstack {self.kind} delete {self.id}"

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" + (f" ({self.id})" if self.id != self.name else "")


@dataclass(frozen=True)
class Failed:
    """Something that could not be deleted, and why."""

    thing: Thing
    reason: str


def find(cloud: Cloud, identity: str = "") -> list[Thing]:
    """Return what launches of this project made, in the order in which it is to be deleted.

    Args:
        cloud: the cloud.
        identity: of one launch; all of them by default.

    Raises:
        CloudError: a service does not answer.
    """
    found = [*_compute(cloud)]
    if cloud.has("block-storage"):
        found += _volumes(cloud)
    if cloud.has("network"):
        found += _networks(cloud)
    found = [thing for thing in found if thing.mark.identity == identity or not identity]
    return sorted(found, key=lambda thing: (ORDER.index(thing.kind), thing.name, thing.id))


def key_pair_name(cloud: Cloud, mark: Mark) -> str:
    """Return the name of a launch's key pair, which says the project too: key pairs are in none."""
    return f"{mark.label()}-{cloud.project}"


def listed(cloud: Cloud, path: str, key: str, *, service: str, **options: Any) -> list[dict[str, Any]]:
    """Return all of a list, page by page.

    Args:
        cloud: the cloud.
        path: below the service's endpoint, without a query.
        key: of the list in the answer.
        service: its type in the catalogue.
        options: as for Cloud.request().

    Raises:
        CloudError: the service does not answer.
    """
    return [*cloud.pages(path, key, service=service, what=f"listing {key}", **options)]


def servers(cloud: Cloud) -> list[dict[str, Any]]:
    """Return the project's servers, as Nova tells."""
    return listed(cloud, "/servers/detail", "servers", service="compute", microversion=MICROVERSION)


def _compute(cloud: Cloud) -> Iterator[Thing]:
    for one in servers(cloud):
        # A credential that may see all projects is shown its own only; it is looked at all the same.
        if (mark := Mark.of_metadata(one.get("metadata") or {})) and one.get("tenant_id") == cloud.project:
            yield Thing("server", one["id"], one["name"], mark, one.get("status", ""))
    for one in listed(cloud, "/os-server-groups", "server_groups", service="compute", microversion=MICROVERSION):
        mine = one.get("project_id") in {cloud.project, None}
        if (mark := Mark.of_label(one["name"], one.get("user_id") or "")) and mine:
            yield Thing("server group", one["id"], one["name"], mark, one.get("policy", ""))
    for pair in listed(cloud, "/os-keypairs", "keypairs", service="compute", microversion=MICROVERSION):
        # Key pairs are the user's own, in whatever project.
        name = pair["keypair"]["name"]
        label = name.removesuffix(f"-{cloud.project}")
        if label != name and (mark := Mark.of_label(label, cloud.user)):
            yield Thing("keypair", name, name, mark)


def _volumes(cloud: Cloud) -> Iterator[Thing]:
    for one in listed(cloud, "/volumes/detail", "volumes", service="block-storage"):
        whose = one.get("os-vol-tenant-attr:tenant_id", cloud.project)
        if (mark := Mark.of_metadata(one.get("metadata") or {})) and whose == cloud.project:
            kept = bool(one["metadata"].get(KEPT))
            yield Thing("volume", one["id"], one.get("name") or one["id"], mark, f"{one['size']} GiB", kept)


def _networks(cloud: Cloud) -> Iterator[Thing]:
    for path, kind in (("/ports", "port"), ("/floatingips", "floating ip")):
        for one in listed(cloud, path, path[1:], service="network"):
            # An administrator is shown those of all projects.
            mark = Mark.of_description(one.get("description") or "")
            if mark and one.get("project_id", one.get("tenant_id")) == cloud.project:
                address = one.get("floating_ip_address") or ", ".join(ip["ip_address"] for ip in one["fixed_ips"])
                yield Thing(kind, one["id"], one.get("name") or address, mark, address)


def delete(
    cloud: Cloud, things: Sequence[Thing], say: Callable[[str], None], *, seconds: float = GONE_SECONDS
) -> list[Failed]:
    """Delete things, in their order. What is gone already is no error.

    Args:
        cloud: the cloud.
        things: as find() returns them. Volumes that are to be kept stay.
        say: takes a line for what happens.
        seconds: how long each server and volume may take to go.

    Returns:
        What could not be deleted.
    """
    failed: list[Failed] = []
    for kind in ORDER:
        # All of a kind are told to go before the first is waited for.
        going = [thing for thing in things if thing.kind == kind and not thing.kept]
        told = [thing for thing in going if _tell(cloud, thing, failed)]
        for thing in told:
            try:
                _wait(cloud, thing, seconds)
            except BakehouseError as error:
                failed.append(Failed(thing, error.message))
            else:
                say(f"deleted {thing}")
    for thing in things:
        if thing.kept:
            say(f"kept {thing}: {thing.by_hand} deletes it")
    for one in failed:
        say(f"could not delete {one.thing}: {one.reason}")
    return failed


def left_error(failed: Sequence[Failed]) -> BakehouseError:
    """Return the error for what could not be deleted: with the commands to do it by hand."""
    names = ", ".join(str(one.thing) for one in failed)
    return BakehouseError(
        f"{len(failed)} could not be deleted and may cost: {names}",
        hint="`invoke down` tries again; by hand: " + "; ".join(one.thing.by_hand for one in failed),
        log="\n".join(f"{one.thing}: {one.reason}" for one in failed),
    )


BUSY = {HTTPStatus.BAD_REQUEST, HTTPStatus.CONFLICT}
"""What services say of something that is still in use: Cinder 400, Nova and Neutron 409."""


def _tell(cloud: Cloud, thing: Thing, failed: list[Failed]) -> bool:
    try:
        _delete(cloud, thing)
    except CloudError as error:
        if error.status in BUSY:
            return True
        failed.append(Failed(thing, error.message))
        return False
    return True


def _delete(cloud: Cloud, thing: Thing) -> None:
    _ask(cloud, "DELETE", thing, ok=(200, 202, 204, 404), what=f"deleting {thing}")


def _ask(cloud: Cloud, method: str, thing: Thing, **options: Any) -> Any:
    service, path = thing.path
    if service == "compute":
        options["microversion"] = MICROVERSION
    return cloud.request(method, path, service=service, **options)


def _wait(cloud: Cloud, thing: Thing, seconds: float) -> None:
    """Wait until a thing is gone, and tell it again where it stays."""
    told = time.monotonic()
    refused: CloudError | None = None

    def gone() -> bool:
        nonlocal told, refused
        data = _look(cloud, thing)
        if data is None:
            return True
        pause = AGAIN_SECONDS if thing.kind == "server" else POLL_SECONDS
        if _is_put_aside(thing, data):
            _force(cloud, thing)
        elif time.monotonic() - told >= pause or refused:
            told = time.monotonic()
            try:
                _delete(cloud, thing)
                refused = None
            except CloudError as error:
                if error.status not in BUSY:
                    raise
                refused = error
        return False

    try:
        waiting.until(f"end of {thing}", gone, seconds, poll=POLL_SECONDS)
    except TooLateError:
        reason = refused.message if refused else f"it is still there after {seconds:.0f} s"
        raise BakehouseError(reason) from None


def _look(cloud: Cloud, thing: Thing) -> dict[str, Any] | None:
    answer = _ask(cloud, "GET", thing, ok=(200, 404), what=f"looking at {thing}")
    if answer.status == HTTPStatus.NOT_FOUND:
        return None
    (data,) = answer.json().values()
    return None if data.get("status") == "DELETED" else dict(data)


def _is_put_aside(thing: Thing, data: dict[str, Any]) -> bool:
    """Say whether Nova keeps a deleted server for a while (its reclaim_instance_interval): its volume stays in use."""
    return thing.kind == "server" and data.get("status") == "SOFT_DELETED"


def _force(cloud: Cloud, thing: Thing) -> None:
    with contextlib.suppress(CloudError):
        cloud.request(
            "POST", f"/servers/{thing.id}/action", service="compute", ok=(202, 404, 409), json={"forceDelete": None},
            what=f"deleting {thing} for good", microversion=MICROVERSION,
        )  # fmt: skip
