"""What is wanted of servers on a cloud, and whether the cloud can give it: all is looked at before anything is made."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from bakehouse.cloud import Cloud, CloudError
from bakehouse.errors import BakehouseError
from bakehouse.glance import CloudImage, Glance
from bakehouse.teardown import MICROVERSION, listed
from bakehouse.terminal import GIB, size_text
from bakehouse.yamlfile import did_you_mean

LONGEST_USER_DATA = 65535
"""Characters of base64 that Nova takes (its schema of servers: user_data, maxLength)."""

POLICIES = ("anti-affinity", "affinity", "soft-anti-affinity", "soft-affinity")
"""Of server groups (Compute API, 2.64)."""

VNIC_TYPES = ("normal", "direct", "macvtap", "direct-physical", "baremetal", "vdpa", "accelerator-direct")
"""Of ports (Networking API, binding:vnic_type)."""

UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"

UNLIMITED = -1

MIB = 1 << 20


@dataclass(frozen=True)
class Volume:
    """A volume to boot from, made from the image."""

    size: int
    """GiB."""
    kind: str = ""
    """Its volume type; the cloud's own default by default."""
    keep: bool = False
    """Leave it when its server goes."""


@dataclass(frozen=True)
class Wanted:
    """What servers shall be like, as it was asked for."""

    flavor: str
    """Id or name, as all that follow."""
    image: str = ""
    networks: tuple[str, ...] = ()
    """The project's only network by default."""
    security_groups: tuple[str, ...] = ()
    """The project's own default by default."""
    vnic_type: str = ""
    key_pair: str = ""
    """One that is there. Without one, one is made for the launch."""
    config_drive: bool = False
    volume: Volume | None = None
    group: str = ""
    """Id of a server group, or a policy: then one is made."""
    zone: str = ""
    floating_network: str = ""
    """The external network of floating IPs; none are made without one."""


@dataclass(frozen=True)
class Checked:
    """What servers shall be like, with the ids that the cloud has for it."""

    wanted: Wanted
    image: CloudImage
    flavor: str
    networks: tuple[str, ...]
    security_groups: tuple[str, ...]
    group: str
    """The id of a group that is there; empty where one is to be made, or none."""
    policy: str
    """Of the group that is to be made; empty for none."""
    floating_network: str


def encoded(user_data: str, node: str) -> str:
    """Return user-data as Nova takes it.

    Raises:
        BakehouseError: it is too long.
    """
    text = base64.b64encode(user_data.encode()).decode()
    if len(text) > LONGEST_USER_DATA:
        raise BakehouseError(
            f"the user-data of {node} is too long: {len(text)} characters of base64; Nova takes {LONGEST_USER_DATA}",
            hint="that is 48 KiB of text: what is large belongs into the image, or is fetched at boot",
        )
    return text


def check(cloud: Cloud, wanted: Wanted, count: int) -> Checked:
    """Look whether the cloud has all that is wanted, and room for it. Makes nothing.

    Args:
        cloud: the cloud.
        wanted: what each server shall be like.
        count: how many.

    Raises:
        BakehouseError: something is not there, does not fit, or goes beyond a quota.
    """
    if wanted.vnic_type and wanted.vnic_type not in VNIC_TYPES:
        raise BakehouseError(
            f"--vnic-type {wanted.vnic_type}: it is one of {', '.join(VNIC_TYPES)}"
            f"{did_you_mean(wanted.vnic_type, [*VNIC_TYPES])}"
        )
    for service, what in (("compute", "compute service (Nova)"), ("network", "network service (Neutron)")):
        if not cloud.has(service):
            raise BakehouseError(f"{cloud.place} has no {what}", hint="check 'region_name' in clouds.yaml, or --region")
    image = _image(cloud, wanted.image)
    flavor = _flavor(cloud, wanted.flavor)
    _check_sizes(image, flavor, wanted.volume)
    _check_key_pair(cloud, wanted.key_pair)
    _check_zone(cloud, wanted.zone)
    _check_volume_type(cloud, wanted.volume)
    networks = listed(cloud, "/networks", "networks", service="network")
    external = [one for one in networks if one.get("router:external")]
    policy = wanted.group if wanted.group in POLICIES else ""
    found = Checked(
        wanted=wanted,
        image=image,
        flavor=flavor["id"],
        networks=choose_networks(cloud, wanted.networks, networks),
        security_groups=_security_groups(cloud, wanted.security_groups),
        group="" if policy or not wanted.group else _group(cloud, wanted.group),
        policy=policy,
        floating_network=_one(wanted.floating_network, external, "external network", cloud)["id"]
        if wanted.floating_network
        else "",
    )
    _check_quota(cloud, wanted, flavor, count)
    return found


def _one(
    wanted: str, there: Sequence[Mapping[str, Any]], what: str, cloud: Cloud, name: Callable[[Any], str] | None = None
) -> Any:
    """Return the one thing with an id or name.

    Raises:
        BakehouseError: there is none, or more than one.
    """
    named = name or (lambda one: str(one["name"]))
    found = [one for one in there if one.get("id") == wanted] or [one for one in there if named(one) == wanted]
    if not found:
        known = sorted({named(one) for one in there})
        raise BakehouseError(
            f"{cloud.place} has no {what} '{wanted}'{did_you_mean(wanted, known)}",
            hint=f"it has {', '.join(known[:20])}" if known else f"this project sees no {what} at all",
        )
    if len(found) > 1:
        ids = ", ".join(str(one["id"]) for one in found)
        raise BakehouseError(f"{len(found)} of kind {what} are called '{wanted}'", hint=f"name one by its id: {ids}")
    return found[0]


def _image(cloud: Cloud, wanted: str) -> CloudImage:
    glance = Glance(cloud)
    found = glance.get(wanted) if re.fullmatch(UUID, wanted) else None
    if found is None:
        named = glance.list(name=wanted)
        if len(named) != 1:
            several = ", ".join(image.id for image in named)
            raise BakehouseError(
                f"{len(named)} images are called '{wanted}' in {cloud.place}" if named
                else f"{cloud.place} has no image '{wanted}'",
                hint=f"name one by its id: {several}" if named else f"`invoke images --cloud {cloud.name}` lists ours",
            )  # fmt: skip
        found = named[0]
    if found.status != "active":
        raise BakehouseError(f"the image {found.name} cannot be booted: it is '{found.status}'")
    return found


def _flavor(cloud: Cloud, wanted: str) -> Any:
    flavors = listed(cloud, "/flavors/detail", "flavors", service="compute", microversion=MICROVERSION)
    return _one(wanted, flavors, "flavor", cloud)


def _check_sizes(image: CloudImage, flavor: Mapping[str, Any], volume: Volume | None) -> None:
    if flavor["ram"] < image.min_ram:
        raise BakehouseError(
            f"the flavor {flavor['name']} has {flavor['ram']} MiB of memory; {image.name} needs {image.min_ram}",
            hint="a larger flavor: `openstack flavor list`",
        )
    if volume and volume.size < max(image.min_disk, 1):
        raise BakehouseError(
            f"a volume of {volume.size} GiB is too small: the image {image.name} needs {max(image.min_disk, 1)} GiB",
            hint=f"--volume-size {max(image.min_disk, 1)} or more",
        )
    # A flavor without a disk takes the image's size (Compute API, flavors: disk).
    if not volume and 0 < flavor["disk"] < image.min_disk:
        raise BakehouseError(
            f"the flavor {flavor['name']} has a disk of {flavor['disk']} GiB; {image.name} needs {image.min_disk}",
            hint=f"a larger flavor, or --volume-size {image.min_disk} to boot from a volume",
        )


def _check_key_pair(cloud: Cloud, name: str) -> None:
    if not name:
        return
    pairs = listed(cloud, "/os-keypairs", "keypairs", service="compute", microversion=MICROVERSION)
    _one(name, [pair["keypair"] for pair in pairs], "key pair", cloud)


def _check_zone(cloud: Cloud, wanted: str) -> None:
    if not wanted:
        return
    answer = cloud.request("GET", "/os-availability-zone", service="compute", what="listing availability zones")
    zones = [{"name": zone["zoneName"], **zone} for zone in answer.json()["availabilityZoneInfo"]]
    # Administrators may add a host behind a colon.
    found = _one(wanted.partition(":")[0], zones, "availability zone", cloud)
    if not found["zoneState"]["available"]:
        raise BakehouseError(f"the availability zone {wanted} is not available just now", hint="another --zone")


def _check_volume_type(cloud: Cloud, volume: Volume | None) -> None:
    if not volume:
        return
    if not cloud.has("block-storage"):
        raise BakehouseError(f"{cloud.place} has no volume service (Cinder)", hint="leave out --volume-size")
    if volume.kind:
        answer = cloud.request("GET", "/types", service="block-storage", what="listing volume types")
        _one(volume.kind, answer.json()["volume_types"], "volume type", cloud)


def choose_networks(cloud: Cloud, wanted: Sequence[str], there: list[dict[str, Any]]) -> tuple[str, ...]:
    """Return the ids of networks.

    Args:
        cloud: the cloud.
        wanted: their names or ids; with none, the only one that does not lead outside.
        there: all networks.

    Raises:
        BakehouseError: one is not there, or none was named and there is not just one.
    """
    if wanted:
        return tuple(_one(name, there, "network", cloud)["id"] for name in wanted)
    inner = [one for one in there if not one.get("router:external")]
    if len(inner) != 1:
        names = ", ".join(sorted(one["name"] for one in inner))
        raise BakehouseError(
            f"which network? {cloud.place} has {len(inner) or 'none'} to choose from",
            hint=f"--network NAME: {names}" if names else "make one: `openstack network create`",
        )
    return (inner[0]["id"],)


def _security_groups(cloud: Cloud, wanted: Sequence[str]) -> tuple[str, ...]:
    if not wanted:
        return ()
    groups = listed(cloud, "/security-groups", "security_groups", service="network")
    # An administrator is shown those of all projects, each with a group called default.
    own = [one for one in groups if one.get("project_id", one.get("tenant_id")) == cloud.project]
    return tuple(
        _one(name, own if not re.fullmatch(UUID, name) else groups, "security group", cloud)["id"] for name in wanted
    )


def _group(cloud: Cloud, wanted: str) -> str:
    if not re.fullmatch(UUID, wanted):
        raise BakehouseError(
            f"--server-group {wanted}: it is a policy ({', '.join(POLICIES)}){did_you_mean(wanted, [*POLICIES])} "
            "or the id of a group",
        )
    answer = cloud.request(
        "GET", f"/os-server-groups/{quote(wanted)}", service="compute", ok=(200, 404),
        what="looking at the server group", microversion=MICROVERSION,
    )  # fmt: skip
    if answer.status == HTTPStatus.NOT_FOUND:
        raise BakehouseError(f"{cloud.place} has no server group {wanted}", hint="`openstack server group list`")
    return wanted


def _check_quota(cloud: Cloud, wanted: Wanted, flavor: Mapping[str, Any], count: int) -> None:
    limits = cloud.request("GET", "/limits", service="compute", what="reading the quota", microversion=MICROVERSION)
    absolute = limits.json()["limits"]["absolute"]
    needs = [
        ("servers", "Instances", count, 1),
        ("cores", "Cores", count * flavor["vcpus"], 1),
        ("memory", "RAM", count * flavor["ram"], MIB),
        ("server groups", "ServerGroups", int(wanted.group in POLICIES), 1),
    ]
    for what, word, need, unit in needs:
        # Nova calls the limit of memory maxTotalRAMSize, and that of groups maxServerGroups.
        limit = next(
            (absolute[key] for key in (f"maxTotal{word}", f"maxTotal{word}Size", f"max{word}") if key in absolute),
            UNLIMITED,
        )
        _within(what, limit, absolute.get(f"total{word}Used", 0), need, unit, cloud)
    _within(
        "servers in a group",
        absolute.get("maxServerGroupMembers", UNLIMITED),
        0,
        count if wanted.group else 0,
        1,
        cloud,
    )
    if wanted.volume:
        try:
            answer = cloud.request("GET", "/limits", service="block-storage", what="reading the quota of volumes")
        except CloudError as error:
            if error.status not in {HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND}:
                raise
            return
        absolute = answer.json()["limits"]["absolute"]
        _within(
            "volumes", absolute.get("maxTotalVolumes", UNLIMITED), absolute.get("totalVolumesUsed", 0), count, 1, cloud
        )
        room = absolute.get("maxTotalVolumeGigabytes", UNLIMITED)
        _within("volume space", room, absolute.get("totalGigabytesUsed", 0), count * wanted.volume.size, GIB, cloud)


def _within(what: str, limit: int, used: int, need: int, unit: int, cloud: Cloud) -> None:
    """Check that a need is within a quota. Limits and needs are in units of so many bytes, or plain counts."""
    if not need or limit == UNLIMITED or used + need <= limit:
        return

    def text(number: int) -> str:
        return str(number) if unit == 1 else size_text(number * unit)

    raise BakehouseError(
        f"the quota of {what} in {cloud.place} is {text(limit)}, {text(used)} are used, and this needs {text(need)}",
        hint="fewer or smaller nodes, `invoke down` for what is not needed, or ask for a larger quota",
    )
