"""Seeds: the disks that give cloud-init its data where there is no cloud, or as a cloud would."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from bakehouse.errors import BakehouseError
from bakehouse.instance import Instance, config_drive_files, nocloud_files

MIB = 1 << 20
SECTOR = 512
LINUX_TYPE = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"

CONFIG_DRIVE_LABEL = "config-2"
CONFIG_DRIVE_PARTITION_MIB = 64
"""What Ironic takes at the end of a disk for a config drive (ironic-python-agent, MAX_CONFIG_DRIVE_SIZE_MB)."""


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
    """Put a config drive into a new partition at the end of a disk, as Ironic does on bare metal.

    Nothing is mounted and nothing is converted: the partition table is made in an empty copy of the disk that is as
    large, and only what changed is written to the disk itself.

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
        # The first MiB holds boot code and partition table, the last one the table's copy.
        first, last, table = Path(folder, "first"), Path(folder, "last"), Path(folder, "table")
        _tool(["qemu-img", "dd", "-f", form, "-O", "raw", f"bs={MIB}", "count=1", f"if={disk}", f"of={first}"])
        first.replace(table)
        with table.open("r+b") as file:
            file.truncate(size)
            start = _append_partition(table, disk)
            first.write_bytes(file.read(MIB))
            file.seek(size - MIB)
            last.write_bytes(file.read(MIB))
        Path(folder, "iso").symlink_to(iso.resolve())
        # qemu-io knows no quoting, so the names in its commands are plain ones.
        writes = [f"write -s first 0 {MIB}", f"write -s last {size - MIB} {MIB}", f"write -s iso {start} {length}"]
        commands = [part for command in (*writes, "flush") for part in ("-c", command)]
        _tool(["qemu-io", "-f", form, *commands, str(disk.resolve())], folder=Path(folder))


def _append_partition(table: Path, disk: Path) -> int:
    """Append the config drive's partition to a partition table. Return the byte where it starts."""
    # The disk may have been made larger than the image: the table's copy moves to its end first.
    _tool(["sfdisk", "--no-reread", "--no-tell-kernel", "--relocate", "gpt-bak-std", str(table)])
    now = json.loads(_tool(["sfdisk", "--json", str(table)]))["partitiontable"]
    end = max((part["start"] + part["size"] for part in now.get("partitions", [])), default=now["firstlba"])
    sectors = MIB // SECTOR
    start = ((now["lastlba"] + 1) // sectors - CONFIG_DRIVE_PARTITION_MIB) * sectors
    if start < end:
        raise BakehouseError(
            f"{disk} has no room for a config drive of {CONFIG_DRIVE_PARTITION_MIB} MiB behind its last partition",
            hint=f"make the disk {-(-(end - start) // sectors)} MiB larger",
        )
    line = f"start={start}, type={LINUX_TYPE}\n"
    _tool(["sfdisk", "--no-reread", "--no-tell-kernel", "--append", str(table)], text=line)
    return int(start * SECTOR)


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
