"""Seeds: what is on the disks for cloud-init, read back with the tools of others."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bakehouse import seed
from bakehouse.errors import BakehouseError
from bakehouse.instance import Instance, Network
from bakehouse.seed import MIB, SECTOR

UUID = "11111111-2222-4333-8444-555555555555"
USER_DATA = "#cloud-config\n# höher\n{}\n"
KEY = "ssh-ed25519 AAAA me"
NODE = Instance(
    name="node-1",
    uuid=UUID,
    user_data=USER_DATA,
    public_keys=(KEY,),
    networks=(
        Network(
            mac="52:54:00:AB:00:01",
            addresses=("10.0.0.5/24", "fd00::5/64"),
            gateways=("10.0.0.1", "fd00::1"),
            routes=(("169.254.169.254/32", "10.0.0.2"),),
            dns=("10.0.0.3",),
            mtu=9000,
        ),
        Network(mac="52:54:00:ab:00:02"),
    ),
    availability_zone="rack-7",
    meta={"role": "compute"},
    vendor_data={"cloud-init": "#cloud-config\n{}\n"},
)


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def unpack(iso: Path, folder: Path) -> dict[str, bytes]:
    run("xorriso", "-osirrox", "on", "-indev", str(iso), "-extract", "/", str(folder))
    run("chmod", "-R", "u+w", str(folder))
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def label(iso: Path) -> str:
    return run("blkid", "--probe", "--output", "value", "--match-tag", "LABEL", str(iso)).strip()


# NoCloud --------------------------------------------------------------------------------------------------------------


def test_a_nocloud_seed_names_the_node_and_its_networks(tmp_path: Path) -> None:
    seed.nocloud_drive(tmp_path / "seed.iso", NODE)
    files = unpack(tmp_path / "seed.iso", tmp_path / "files")
    assert label(tmp_path / "seed.iso") == "cidata"
    assert set(files) == {"meta-data", "user-data", "network-config", "vendor-data"}
    assert files["user-data"] == USER_DATA.encode()
    assert files["vendor-data"] == b"#cloud-config\n{}\n"
    meta_data = json.loads(files["meta-data"])
    assert (meta_data["instance-id"], meta_data["local-hostname"]) == (UUID, "node-1")
    assert meta_data["public-keys"] == [KEY]
    assert json.loads(files["network-config"]) == {
        "version": 2,
        "ethernets": {
            "nic0": {
                "match": {"macaddress": "52:54:00:ab:00:01"},
                "addresses": ["10.0.0.5/24", "fd00::5/64"],
                "routes": [
                    {"to": "0.0.0.0/0", "via": "10.0.0.1"},
                    {"to": "::/0", "via": "fd00::1"},
                    {"to": "169.254.169.254/32", "via": "10.0.0.2"},
                ],
                "nameservers": {"addresses": ["10.0.0.3"]},
                "mtu": 9000,
            },
            "nic1": {"match": {"macaddress": "52:54:00:ab:00:02"}, "dhcp4": True},
        },
    }


def test_the_least_seed_leaves_the_network_to_the_image(tmp_path: Path) -> None:
    seed.nocloud_drive(tmp_path / "seed.iso", Instance("node-1", "i-1", USER_DATA))
    assert set(unpack(tmp_path / "seed.iso", tmp_path / "files")) == {"meta-data", "user-data"}


def test_only_the_owner_can_read_a_seed(tmp_path: Path) -> None:
    iso = tmp_path / "seed.iso"
    iso.write_text("older")
    iso.chmod(0o644)
    seed.nocloud_drive(iso, NODE)
    assert iso.stat().st_mode & 0o777 == 0o600


def test_a_seed_that_cannot_be_written_is_an_error_with_the_tools_words(tmp_path: Path) -> None:
    script = tmp_path / "xorriso"
    script.write_text("#!/bin/sh\necho 'no space' >&2; exit 5\n")
    script.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        with pytest.raises(BakehouseError, match="xorriso failed") as caught:
            seed.nocloud_drive(tmp_path / "seed.iso", NODE)
    assert "no space" in caught.value.log


# Config drive ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    iso = tmp_path / "config.iso"
    seed.config_drive(iso, NODE)
    return iso


def test_a_config_drive_holds_what_nova_writes(drive: Path, tmp_path: Path) -> None:
    files = unpack(drive, tmp_path / "files")
    assert label(drive) == "config-2"
    for version in ("2018-08-27", "latest"):
        folder = f"openstack/{version}"
        meta_data = json.loads(files[f"{folder}/meta_data.json"])
        assert (meta_data["uuid"], meta_data["hostname"], meta_data["name"]) == (UUID, "node-1", "node-1")
        assert meta_data["public_keys"] == {"key-0": KEY}
        assert meta_data["keys"] == [{"name": "key-0", "type": "ssh", "data": KEY}]
        assert meta_data["availability_zone"] == "rack-7"
        assert meta_data["meta"] == {"role": "compute"}
        assert files[f"{folder}/user_data"] == USER_DATA.encode()
        assert json.loads(files[f"{folder}/vendor_data.json"]) == {"cloud-init": "#cloud-config\n{}\n"}
    assert json.loads(files["ec2/latest/meta-data.json"])["local-ipv4"] == "10.0.0.5"


def test_an_older_version_has_only_what_it_had(drive: Path, tmp_path: Path) -> None:
    files = unpack(drive, tmp_path / "files")
    names = {version: {path.name for path in (tmp_path / "files/openstack" / version).iterdir()} for version in
             ("2012-08-10", "2013-10-17", "2015-10-15")}  # fmt: skip
    assert names["2012-08-10"] == {"meta_data.json", "user_data"}
    assert names["2013-10-17"] == {"meta_data.json", "user_data", "vendor_data.json"}
    assert names["2015-10-15"] == {"meta_data.json", "user_data", "vendor_data.json", "network_data.json"}
    assert "random_seed" not in json.loads(files["openstack/2012-08-10/meta_data.json"])
    assert len(json.loads(files["openstack/latest/meta_data.json"])["random_seed"]) > 512


def test_a_config_drive_describes_networks_as_neutron_does(drive: Path, tmp_path: Path) -> None:
    data = json.loads(unpack(drive, tmp_path / "files")["openstack/latest/network_data.json"])
    assert [(link["id"], link["ethernet_mac_address"], link.get("mtu")) for link in data["links"]] == [
        ("tap0", "52:54:00:ab:00:01", 9000),
        ("tap1", "52:54:00:ab:00:02", None),
    ]
    four, six, dhcp = data["networks"]
    assert (four["type"], four["link"], four["ip_address"], four["netmask"]) == (
        "ipv4", "tap0", "10.0.0.5", "255.255.255.0",
    )  # fmt: skip
    assert four["routes"] == [
        {"network": "0.0.0.0", "netmask": "0.0.0.0", "gateway": "10.0.0.1"},
        {"network": "169.254.169.254", "netmask": "255.255.255.255", "gateway": "10.0.0.2"},
    ]
    assert four["services"] == [{"type": "dns", "address": "10.0.0.3"}]
    assert (six["type"], six["ip_address"], six["services"]) == ("ipv6", "fd00::5", [])
    assert six["routes"] == [{"network": "::", "netmask": "::", "gateway": "fd00::1"}]
    assert (dhcp["type"], dhcp["link"]) == ("ipv4_dhcp", "tap1")


# The partition --------------------------------------------------------------------------------------------------------

TABLE = """label: gpt
label-id: 00000000-0000-4000-8000-00000000000A
start=1MiB, size=1MiB, type=21686148-6449-6E6F-744E-656564454649, name=bios
start=2MiB, size=21MiB, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709, name=root
"""


def make_disk(folder: Path, size: int, form: str = "qcow2") -> Path:
    """Return a disk over an image of 24 MiB, enlarged to a size in MiB."""
    image = folder / "image.raw"
    with image.open("wb") as file:
        file.truncate(24 * MIB)
    subprocess.run(["sfdisk", "--quiet", "--no-reread", str(image)], input=TABLE, text=True, check=True)
    with image.open("r+b") as file:
        file.write(b"boot code")
        file.seek(5 * MIB)
        file.write(b"the root")
    if form == "raw":
        run("qemu-img", "resize", "-q", "-f", "raw", str(image), f"{size}M")
        return image
    disk = folder / "disk of a node.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(image), str(disk), f"{size}M")
    return disk


def partitions(raw: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(run("sfdisk", "--json", str(raw)))["partitiontable"]
    return table


def flat(disk: Path) -> Path:
    raw = disk.with_name("flat.raw")
    run("qemu-img", "convert", "-O", "raw", str(disk), str(raw))
    return raw


@pytest.mark.parametrize("form", ["qcow2", "raw"])
@pytest.mark.parametrize("size", [256, 1024 * 40])
def test_a_config_drive_fits_at_the_end_of_a_disk(drive: Path, tmp_path: Path, form: str, size: int) -> None:
    disk = make_disk(tmp_path, size, form)
    seed.add_config_drive_partition(disk, drive)
    raw = flat(disk) if form == "qcow2" else disk
    table = partitions(raw)
    assert "No errors detected" in run("sfdisk", "--verify", str(raw))
    assert "No problems found" in run("sgdisk", "--verify", str(raw))
    assert table["id"] == "00000000-0000-4000-8000-00000000000A", "the same table, not a new one"
    bios, root, config = table["partitions"]
    assert (bios["name"], root["name"], root["start"]) == ("bios", "root", 2 * MIB // SECTOR)
    assert config["type"] == "0FC63DAF-8483-4772-8E79-3D69D8477DE4", "Linux, what sgdisk gives by default"
    # sgdisk begins at a whole MiB and takes all up to the last sector that may be used.
    assert 64 * MIB <= config["size"] * SECTOR <= 65 * MIB
    assert config["start"] % (MIB // SECTOR) == 0
    assert 0 < size * MIB - (config["start"] + config["size"]) * SECTOR <= 1 * MIB
    with raw.open("rb") as file:
        assert file.read(9) == b"boot code"
        file.seek(5 * MIB)
        assert file.read(8) == b"the root"
        file.seek(config["start"] * SECTOR)
        assert file.read(drive.stat().st_size) == drive.read_bytes()
    assert disk.stat().st_blocks * 512 < 32 * MIB, "empty room stays empty"


def test_the_root_can_grow_up_to_the_config_drive(drive: Path, tmp_path: Path) -> None:
    disk = make_disk(tmp_path, 256)
    seed.add_config_drive_partition(disk, drive)
    raw = flat(disk)
    subprocess.run(["sfdisk", "--quiet", "--no-reread", "-N", "2", str(raw)], input=", +\n", text=True, check=True)
    _, root, config = partitions(raw)["partitions"]
    assert root["start"] + root["size"] == config["start"]


def test_the_image_below_is_not_touched(drive: Path, tmp_path: Path) -> None:
    disk = make_disk(tmp_path, 256)
    before = (tmp_path / "image.raw").read_bytes()
    seed.add_config_drive_partition(disk, drive)
    assert (tmp_path / "image.raw").read_bytes() == before


def test_a_disk_without_room_is_refused_and_left_as_it_was(drive: Path, tmp_path: Path) -> None:
    disk = make_disk(tmp_path, 80)
    before = disk.read_bytes()
    with pytest.raises(BakehouseError, match="has no room for a config drive") as caught:
        seed.add_config_drive_partition(disk, drive)
    assert caught.value.hint == "make the disk 8 MiB larger"
    assert disk.read_bytes() == before
    run("qemu-img", "resize", "-q", str(disk), "+8M")
    seed.add_config_drive_partition(disk, drive)


def test_a_config_drive_larger_than_ironic_takes_is_refused(tmp_path: Path) -> None:
    iso = tmp_path / "config.iso"
    with iso.open("wb") as file:
        file.truncate(64 * MIB + 1)
    with pytest.raises(BakehouseError, match="larger than the 64 MiB"):
        seed.add_config_drive_partition(make_disk(tmp_path, 256), iso)


def test_a_disk_without_a_partition_table_is_refused(drive: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(empty), "256M")
    with pytest.raises(BakehouseError, match="sfdisk failed"):
        seed.add_config_drive_partition(empty, drive)
