"""Seeds: the disks that give cloud-init its data where there is no cloud, or as a cloud would."""

from __future__ import annotations

import json
import struct
import subprocess
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path

from bakehouse.errors import BakehouseError
from bakehouse.instance import Instance, config_drive_files, nocloud_files

MIB = 1 << 20
SECTOR = 512

CONFIG_DRIVE_LABEL = "config-2"
CONFIG_DRIVE_PARTITION_MIB = 64
"""What Ironic takes at the end of a disk for a config drive (ironic-python-agent, MAX_CONFIG_DRIVE_SIZE_MB)."""

BACKUP_HEADER_AT = SECTOR + 32
"""The byte with the number of the sector of the partition table's copy (UEFI specification 2.10, table 5.5)."""
BACKUP_SECTORS = 33
"""What the copy takes: 128 entries of 128 bytes, and its header behind them (the same, 5.3)."""
NOT_AT_THE_END = "it doesn't reside\nat the end of the disk"
"""What sgdisk says of a partition table's copy on a disk that is larger than the image."""


def nocloud_drive(path: Path, instance: Instance) -> None:
    """Write a NoCloud seed: an ISO labelled ``cidata`` (cloud-init's documentation of the NoCloud data source).

    Args:
        path: the file to make, readable by its owner only since user-data may hold secrets.
        instance: what it says.

    Raises:
        BakehouseError: xorriso failed.
    """
    _iso(path, "cidata", nocloud_files(instance))


def config_drive(path: Path, instance: Instance) -> None:
    """Write an OpenStack config drive: an ISO labelled ``config-2``, as Nova attaches it to a server.

    Args:
        path: the file to make, readable by its owner only since user-data may hold secrets.
        instance: what it says.

    Raises:
        BakehouseError: xorriso failed.
    """
    _iso(path, CONFIG_DRIVE_LABEL, config_drive_files(instance))


def add_config_drive_partition(disk: Path, iso: Path) -> None:
    """Put a config drive into a new partition at the end of a disk, with the commands that Ironic's deploy agent uses.

    The partition table's copy moves to the end of the disk, sgdisk makes a partition of 64 MiB there, and the ISO is
    written to it (ironic-python-agent: partition_utils.create_config_drive_partition, disk_utils.fix_gpt_partition).
    Nothing is mounted and nothing is converted: sgdisk works on an empty copy of the disk that is as large, and only
    what changed is written to the disk itself.

    Args:
        disk: qcow2 or raw, with a GPT; no machine may be using it. Room that was added after its last partition stays,
            up to the new partition, for the root to grow into.
        iso: what config_drive() wrote.

    Raises:
        BakehouseError: there is no room, the config drive is too large, or a tool failed.
    """
    length = iso.stat().st_size
    if length > CONFIG_DRIVE_PARTITION_MIB * MIB:
        raise BakehouseError(f"{iso} is larger than the {CONFIG_DRIVE_PARTITION_MIB} MiB that Ironic gives")
    about = json.loads(_tool(["qemu-img", "info", "--output=json", str(disk)]))
    form, size = str(about["format"]), int(about["virtual-size"])
    with tempfile.TemporaryDirectory(prefix="config-drive-") as folder:
        first, last, table = Path(folder, "first"), Path(folder, "last"), Path(folder, "table")
        _copy_table(disk, form, size, table)
        start = _append_partition(table, disk)
        # The first MiB holds boot code and partition table, the last one the table's copy.
        with table.open("rb") as file:
            first.write_bytes(file.read(MIB))
            file.seek(size - MIB)
            last.write_bytes(file.read(MIB))
        Path(folder, "iso").symlink_to(iso.resolve())
        # qemu-io knows no quoting, so the names in its commands are plain ones.
        writes = [f"write -s first 0 {MIB}", f"write -s last {size - MIB} {MIB}", f"write -s iso {start} {length}"]
        commands = [part for command in (*writes, "flush") for part in ("-c", command)]
        _tool(["qemu-io", "-f", form, *commands, str(disk.resolve())], folder=Path(folder))


def _copy_table(disk: Path, form: str, size: int, table: Path) -> None:
    """Copy a disk's partition table and the table's own copy, wherever that is, into an empty file that is as large."""
    with table.open("w+b") as file:
        file.truncate(size)
        file.write(_piece(disk, form, 0, MIB, table.parent))
        file.seek(BACKUP_HEADER_AT)
        (header,) = struct.unpack("<Q", file.read(8))
        start = (header - BACKUP_SECTORS + 1) * SECTOR
        if MIB <= start < size:
            file.seek(start)
            file.write(_piece(disk, form, start, BACKUP_SECTORS * SECTOR, table.parent))


def _piece(disk: Path, form: str, start: int, length: int, folder: Path) -> bytes:
    below = {"driver": form, "file": {"driver": "file", "filename": str(disk.resolve())}}
    part = json.dumps({"driver": "raw", "offset": start, "size": length, "file": below})
    _tool(["qemu-img", "convert", "-O", "raw", f"json:{part}", str(folder / "piece")])
    return (folder / "piece").read_bytes()


def _append_partition(table: Path, disk: Path) -> int:
    """Append the config drive's partition to a partition table. Return the byte where it starts."""
    if NOT_AT_THE_END in _tool(["sgdisk", "-v", str(table)]):
        _tool(["sgdisk", "-e", str(table)])
    now = json.loads(_tool(["sfdisk", "--json", str(table)]))["partitiontable"]
    end = max((part["start"] + part["size"] for part in now.get("partitions", [])), default=now["firstlba"])
    sectors = MIB // SECTOR
    start = ((now["lastlba"] + 1) // sectors - CONFIG_DRIVE_PARTITION_MIB) * sectors
    if start < end:
        raise BakehouseError(
            f"{disk} has no room for a config drive of {CONFIG_DRIVE_PARTITION_MIB} MiB behind its last partition",
            hint=f"make the disk {-(-(end - start) // sectors)} MiB larger",
        )
    name = str(uuid.uuid4())
    _tool(["sgdisk", "-n", f"0:-{CONFIG_DRIVE_PARTITION_MIB}MB:0", "-u", f"0:{name}", str(table)])
    made = json.loads(_tool(["sfdisk", "--json", str(table)]))["partitiontable"]["partitions"]
    return next(int(part["start"]) for part in made if part["uuid"].lower() == name) * SECTOR


def _iso(path: Path, label: str, files: Mapping[str, bytes]) -> None:
    with tempfile.TemporaryDirectory(prefix="seed-") as folder:
        for name, data in files.items():
            file = Path(folder, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        # The file is there before its content is, so that nobody else can ever read it.
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)
        _tool(["xorriso", "-as", "mkisofs", "-quiet", "-V", label, "-J", "-r", "-o", str(path), folder])


def _tool(command: list[str], *, text: str = "", folder: Path | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode != 0:
        raise BakehouseError(
            f"a disk for cloud-init could not be made: {command[0]} failed", log=(done.stderr or done.stdout)[-2000:]
        )
    return done.stdout
