"""What Ironic's deploy agent does to the disk of a machine of metal, done to a file."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bakehouse.seed import MIB, SECTOR


@dataclass(frozen=True)
class Partition:
    """A partition of a disk. Places and sizes are bytes."""

    name: str
    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


def write_raw(image: Path, disk: Path, size: int) -> None:
    """Write a raw image onto an empty disk that is larger.

    The agent streams raw images to the disk as they come (ironic-python-agent, extensions/standby.py).

    Args:
        image: raw.
        disk: to be made.
        size: bytes of the disk.
    """
    _empty(disk, size)
    subprocess.run(["dd", f"if={image}", f"of={disk}", f"bs={MIB}", "conv=notrunc,sparse", "status=none"], check=True)


def write_qcow2(image: Path, disk: Path, size: int) -> None:
    """Write a qcow2 image onto an empty disk that is larger, as the agent does where nothing made it raw before.

    Its command is ``qemu-img convert -t directsync -S 0 -O host_device -W`` (extensions/standby.py,
    _write_whole_disk_image). The file that stands for the device stays sparse here.

    Args:
        image: qcow2.
        disk: to be made.
        size: bytes of the disk.
    """
    _empty(disk, size)
    # -n: the disk is there, and stays as large as it is.
    subprocess.run(["qemu-img", "convert", "-n", "-W", "-f", "qcow2", "-O", "raw", str(image), str(disk)], check=True)


def _empty(disk: Path, size: int) -> None:
    with disk.open("wb") as file:
        file.truncate(size)


def raw_of(qcow2: Path, target: Path) -> Path:
    """Make a raw file of a qcow2 one."""
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(qcow2), str(target)], check=True)
    return target


def partitions(table: str) -> list[Partition]:
    """Return the partitions of what ``sfdisk --json`` wrote, in their order on the disk."""
    rows: list[dict[str, Any]] = json.loads(table)["partitiontable"]["partitions"]
    found = [Partition(row.get("name", ""), row["start"] * SECTOR, row["size"] * SECTOR) for row in rows]
    return sorted(found, key=lambda part: part.start)


def problems(disk: Path) -> str:
    """Return what sgdisk, which the agent asks, finds wrong with the partition table of a raw disk."""
    done = subprocess.run(["sgdisk", "--verify", str(disk)], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 and "No problems found" in done.stdout else done.stdout + done.stderr
