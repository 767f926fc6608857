"""What a cloud tells a machine about itself: one definition, from which every data source of cloud-init is rendered.

Standard library only, since the metadata service runs by itself in a network namespace.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OPENSTACK_VERSIONS = (
    "2012-08-10",
    "2013-04-04",
    "2013-10-17",
    "2015-10-15",
    "2016-06-30",
    "2016-10-06",
    "2017-02-22",
    "2018-08-27",
)
"""Versions of Nova's format that cloud-init knows (cloudinit/sources/helpers/openstack.py). It reads the newest."""

# The version that brought each part (nova/api/metadata/base.py). As text, "latest" is greater than every date.
RANDOM_SEED_SINCE = "2013-04-04"
VENDOR_DATA_SINCE = "2013-10-17"
NETWORK_DATA_SINCE = "2015-10-15"

EC2_VERSIONS = ("2009-04-04",)

LATEST = "latest"


@dataclass(frozen=True)
class Network:
    """One network interface. Without addresses it uses DHCP."""

    mac: str
    """cloud-init finds the interface by it."""
    addresses: tuple[str, ...] = ()
    """Each with its prefix length: ``10.0.0.5/24``."""
    gateways: tuple[str, ...] = ()
    """Where the default routes go: at most one address of IPv4 and one of IPv6."""
    routes: tuple[tuple[str, str], ...] = ()
    """Other routes: destination (``169.254.169.254/32``) and gateway."""
    dns: tuple[str, ...] = ()
    mtu: int | None = None

    def all_routes(self) -> list[tuple[_Net, _Address]]:
        """Return destination and gateway of every route, the default ones first."""
        gateways = [ipaddress.ip_address(gateway) for gateway in self.gateways]
        # Written out: cloud-init's renderer for systemd-networkd fails on the word "default".
        default = [(ipaddress.ip_network("0.0.0.0/0" if to.version == 4 else "::/0"), to) for to in gateways]  # noqa: PLR2004
        return default + [(ipaddress.ip_network(net), ipaddress.ip_address(via)) for net, via in self.routes]


_Net = ipaddress.IPv4Network | ipaddress.IPv6Network
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Instance:
    """A machine as its cloud knows it."""

    name: str
    """Its name and host name."""
    uuid: str
    """cloud-init does its first-boot work again when this changes."""
    user_data: str = field(default="", repr=False)
    """For cloud-init; may hold a secret."""
    public_keys: tuple[str, ...] = ()
    """SSH keys that may log in as the image's default user."""
    networks: tuple[Network, ...] = ()
    """The interfaces. With none the machine is told nothing about networks, and tries DHCP on the first it finds."""
    availability_zone: str = "nova"
    project_id: str = "00000000000000000000000000000000"
    meta: Mapping[str, str] = field(default_factory=dict)
    """What ``openstack server create --property`` sets."""
    vendor_data: Mapping[str, Any] = field(default_factory=dict)
    """What the cloud adds; cloud-init takes the cloud-config under the key ``cloud-init``."""

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Instance:
        """Return the instance that dataclasses.asdict() or JSON of it says.

        Raises:
            TypeError: a field is missing or unknown.
        """
        networks = tuple(_network(network) for network in data.get("networks", ()))
        return Instance(**{**data, "networks": networks, "public_keys": tuple(data.get("public_keys", ()))})


def _network(data: Mapping[str, Any]) -> Network:
    lists = {name: tuple(data.get(name, ())) for name in ("addresses", "gateways", "dns")}
    return Network(**{**data, **lists, "routes": tuple((net, via) for net, via in data.get("routes", ()))})


def save(path: Path, instances: Mapping[str, Instance]) -> None:
    """Write instances by address, for the metadata service. Readable by its owner only: user-data may hold secrets."""
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        json.dump({address: asdict(instance) for address, instance in instances.items()}, file, indent=2)
    beside.replace(path)


def load(path: Path) -> dict[str, Instance]:
    """Read what save() wrote."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return {address: Instance.from_dict(instance) for address, instance in data.items()}


def nocloud_files(instance: Instance) -> dict[str, bytes]:
    """Return the files of a NoCloud seed by name. JSON is YAML too."""
    meta_data = {
        "instance-id": instance.uuid,
        "local-hostname": instance.name,
        "public-keys": list(instance.public_keys),
        "availability-zone": instance.availability_zone,
    }
    # cloud-init looks for user-data even where there is none.
    files = {"meta-data": _json(meta_data), "user-data": instance.user_data.encode()}
    if instance.networks:
        files["network-config"] = _json(_network_config(instance))
    if "cloud-init" in instance.vendor_data:
        files["vendor-data"] = str(instance.vendor_data["cloud-init"]).encode()
    return files


def openstack_files(instance: Instance, version: str) -> dict[str, bytes]:
    """Return the files that Nova shows under ``openstack/VERSION``, by name."""
    keys = {f"key-{number}": key for number, key in enumerate(instance.public_keys)}
    meta_data: dict[str, Any] = {
        "uuid": instance.uuid,
        "name": instance.name,
        "hostname": instance.name,
        "launch_index": 0,
        "availability_zone": instance.availability_zone,
        "project_id": instance.project_id,
        "meta": dict(instance.meta),
        "public_keys": keys,
        "keys": [{"name": name, "type": "ssh", "data": key} for name, key in keys.items()],
        "devices": [],
    }
    if version >= RANDOM_SEED_SINCE:
        meta_data["random_seed"] = base64.b64encode(secrets.token_bytes(512)).decode()
    files = {"meta_data.json": _json(meta_data)}
    if instance.user_data:
        files["user_data"] = instance.user_data.encode()
    if version >= VENDOR_DATA_SINCE:
        files["vendor_data.json"] = _json(dict(instance.vendor_data))
    if version >= NETWORK_DATA_SINCE and instance.networks:
        files["network_data.json"] = _json(_network_data(instance))
    return files


def ec2_meta_data(instance: Instance, address: str = "") -> dict[str, Any]:
    """Return what Nova shows under ``latest/meta-data`` in the way of EC2: a tree of texts.

    Args:
        instance: the machine.
        address: the address that it asks from.
    """
    fixed = [ipaddress.ip_interface(text) for network in instance.networks for text in network.addresses]
    local = next((str(one.ip) for one in fixed if one.version == 4), address)  # noqa: PLR2004
    tree: dict[str, Any] = {
        "ami-id": "ami-00000001",
        "ami-launch-index": "0",
        "ami-manifest-path": "FIXME",  # Nova's own words
        "block-device-mapping": {"ami": "vda", "root": "/dev/vda"},
        "hostname": instance.name,
        "instance-action": "none",
        "instance-id": f"i-{instance.uuid.replace('-', '')[:8]}",
        "instance-type": "bakehouse",
        "local-hostname": instance.name,
        "local-ipv4": local,
        "placement": {"availability-zone": instance.availability_zone},
        "public-hostname": instance.name,
        "public-ipv4": "",
        "reservation-id": "r-00000001",
        "security-groups": "default",
    }
    if instance.public_keys:
        tree["public-keys"] = {str(number): {"openssh-key": key} for number, key in enumerate(instance.public_keys)}
    return tree


def config_drive_files(instance: Instance) -> dict[str, bytes]:
    """Return the files of an OpenStack config drive by path, as Nova writes them."""
    files: dict[str, bytes] = {}
    for version in (*OPENSTACK_VERSIONS, LATEST):
        files |= {f"openstack/{version}/{name}": data for name, data in openstack_files(instance, version).items()}
    for version in (*EC2_VERSIONS, LATEST):
        files[f"ec2/{version}/meta-data.json"] = _json(ec2_meta_data(instance))
        if instance.user_data:
            files[f"ec2/{version}/user-data"] = instance.user_data.encode()
    return files


def _network_config(instance: Instance) -> dict[str, Any]:
    """Return the network configuration of version 2 (cloud-init's own, for NoCloud)."""
    ethernets = {}
    for number, network in enumerate(instance.networks):
        config: dict[str, Any] = {"match": {"macaddress": network.mac.lower()}}
        if network.addresses:
            config["addresses"] = list(network.addresses)
        else:
            config["dhcp4"] = True
        if network.all_routes():
            config["routes"] = [{"to": str(net), "via": str(via)} for net, via in network.all_routes()]
        if network.dns:
            config["nameservers"] = {"addresses": list(network.dns)}
        if network.mtu:
            config["mtu"] = network.mtu
        ethernets[f"nic{number}"] = config
    return {"version": 2, "ethernets": ethernets}


def _network_data(instance: Instance) -> dict[str, Any]:
    """Return Nova's network_data.json (nova/virt/netutils.py, get_network_metadata)."""
    links: list[dict[str, Any]] = []
    networks: list[dict[str, Any]] = []
    for number, network in enumerate(instance.networks):
        link = f"tap{number}"
        links.append({"id": link, "vif_id": link, "type": "ovs", "ethernet_mac_address": network.mac.lower()})
        if network.mtu:
            links[-1]["mtu"] = network.mtu
        if not network.addresses:
            networks.append({"type": "ipv4_dhcp", "link": link})
        networks += [{**_static(network, ipaddress.ip_interface(text)), "link": link} for text in network.addresses]
    for number, data in enumerate(networks):
        data.update(id=f"network{number}", network_id=data["link"])
    servers = dict.fromkeys(address for network in instance.networks for address in network.dns)
    return {"links": links, "networks": networks, "services": [_dns(server) for server in servers]}


def _static(network: Network, address: ipaddress.IPv4Interface | ipaddress.IPv6Interface) -> dict[str, Any]:
    return {
        "type": f"ipv{address.version}",
        "ip_address": str(address.ip),
        "netmask": str(address.netmask),
        "routes": [
            {"network": str(net.network_address), "netmask": str(net.netmask), "gateway": str(via)}
            for net, via in network.all_routes()
            if net.version == address.version
        ],
        "services": [_dns(one) for one in network.dns if ipaddress.ip_address(one).version == address.version],
    }


def _dns(address: str) -> dict[str, str]:
    return {"type": "dns", "address": address}


def _json(data: object) -> bytes:
    return json.dumps(data).encode()
