"""Images for tests: small, with real files."""

from __future__ import annotations

import datetime
import os
import subprocess
from typing import Any

from bakehouse import sbom
from bakehouse.cache import file_digest
from bakehouse.record import FILE_NAME, Record
from bakehouse.store import LocalStore

MIB = 1 << 20

VERIFIED = {
    "result": "passed", "at": "2026-01-01T12:05:00Z", "seconds": 100.0, "accelerator": "tcg", "firmware": "uefi",
    "checks": [], "suite": [], "timeline": None, "rejoin": None,
}  # fmt: skip


def row(package: str, version: str = "1.0-1", origin: str = "Debian trixie/main") -> dict[str, str]:
    return {
        "binary:Package": package, "Version": version, "Architecture": "amd64", "source:Package": package,
        "source:Version": version, "Maintainer": "Somebody <somebody@example.org>", "Homepage": "",
        "db:Status-Status": "installed", "Installed-Size": "5120", "origin": origin,
    }  # fmt: skip


def add_image(
    store: LocalStore,
    tag: str,
    *,
    name: str = "slurm",
    size: int = 8 * MIB,
    verified: str | None = "passed",
    packages: tuple[str, ...] = ("slurmd", "munge"),
    created: str = "2026-01-01T12:00:00Z",
    **changes: Any,
) -> Record:
    """Put an image into a store: a real qcow2 of so many bytes of noise, with record and SBOM."""
    with store.adding(name, tag) as folder:
        raw, image = folder / "noise.raw", folder / f"{name}-{tag}.qcow2"
        raw.write_bytes(os.urandom(size))
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image], check=True)
        raw.unlink()
        bill = folder / "sbom.cdx.json"
        when = datetime.datetime.fromisoformat(created)
        sbom.write(bill, [*map(row, packages)], name=name, tag=tag, distribution="debian", release="13", created=when)
        made = Record.model_validate({
            "name": name, "platform": "slurm", "tag": tag, "digest": "d" * 64, "inputs": {"package munge": "x"},
            "created": created, "commit": "c0ffee", "distribution": "debian", "release": "trixie",
            "architecture": "amd64", "kernel": "6.12.1", "firmware": ["bios", "uefi"], "root_size": 1 << 30,
            "root_used": 1 << 29, "sbom": bill.name, "sbom_sha256": file_digest(bill, "sha256")["sha256"],
            "package_count": len(packages),
            "files": [{"format": "qcow2", "file": image.name, "size": image.stat().st_size, "virtual_size": size,
                       **file_digest(image, "sha256", "sha512")}],
            "versions": {"kernel": "6.12.1", "slurm": "24.11.5"},
            "base": {"key": "debian-trixie-0", "sha256": "", "created": "2026-01-01T11:00:00Z"},
            "steps": [], "usage": {"peak_memory": 1, "disk": 1, "cpu_seconds": 1}, "builder": {},
            "verification": {**VERIFIED, "result": verified} if verified else None, **changes,
        })  # fmt: skip
        (folder / FILE_NAME).write_text(made.model_dump_json())
    return made
