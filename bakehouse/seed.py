"""Seeds: the disks that give cloud-init its data where there is no cloud."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import yaml

from bakehouse.errors import BakehouseError


def nocloud(path: Path, *, hostname: str, instance_id: str, user_data: str) -> None:
    """Write a NoCloud seed: an ISO labelled ``cidata`` (cloud-init's documentation of the NoCloud data source).

    Args:
        path: the file to make.
        hostname: the node's name.
        instance_id: cloud-init does its first-boot work again when this changes.
        user_data: a cloud-config or a script, with its first line.
    """
    meta_data = yaml.safe_dump({"instance-id": instance_id, "local-hostname": hostname})
    _iso(path, "cidata", {"meta-data": meta_data, "user-data": user_data})


def user_data_with_key(public_key: str) -> str:
    """Return the least user-data that lets somebody log in as the image's default user."""
    return "#cloud-config\n" + yaml.safe_dump({"ssh_authorized_keys": [public_key.strip()]})


def _iso(path: Path, label: str, files: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory(prefix="seed-") as folder:
        for name, text in files.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        command = ["xorriso", "-as", "mkisofs", "-quiet", "-V", label, "-J", "-r", "-o", str(path), folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BakehouseError("the seed for cloud-init could not be made", log=(done.stderr or done.stdout)[-2000:])
