"""Images to publish, and the means to do it in this process or in one that is killed."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bakehouse import REPOSITORY, clouds_yaml, sbom
from bakehouse.cache import file_digest
from bakehouse.cloud import Cloud, connect
from bakehouse.glance import CloudImage, Glance
from bakehouse.local_cloud import LocalCloud, Member
from bakehouse.properties import MARK
from bakehouse.published import Catalogue
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
        "db:Status-Status": "installed", "origin": origin,
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


@dataclass
class Done:
    """How a task ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass
class Shop:
    """A store with a project of its own in the local OpenStack."""

    folder: Path
    local: LocalCloud
    member: Member

    @property
    def store(self) -> LocalStore:
        return LocalStore(self.folder / "store")

    @property
    def clouds(self) -> Path:
        return self.folder / "clouds.yaml"

    @property
    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("OS_", "BAKEHOUSE_"))}
        return kept | {
            "OS_CLIENT_CONFIG_FILE": str(self.clouds),
            "OS_CLOUD": "here",
            "BAKEHOUSE_CONFIG": str(self.folder / "bakehouse.yaml"),
        }

    def configure(self, **settings: object) -> None:
        text = {"store": "store", "cache": "cache", **settings}
        (self.folder / "bakehouse.yaml").write_text(yaml.safe_dump(text))

    def add_cloud(self, name: str, entry: dict[str, object]) -> None:
        clouds_yaml.add(self.clouds, name, entry)

    def connect(self, name: str = "here") -> Cloud:
        before = os.environ.get("OS_CLIENT_CONFIG_FILE")
        os.environ["OS_CLIENT_CONFIG_FILE"] = str(self.clouds)
        try:
            return connect(name)
        finally:
            if before is None:
                del os.environ["OS_CLIENT_CONFIG_FILE"]

    def start(self, *words: str, prefix: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*prefix, sys.executable, "-m", "invoke", "--search-root", str(REPOSITORY), *words],
            cwd=self.folder, env=self.environment | environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *words: str, prefix: tuple[str, ...] = (), **environment: str) -> Done:
        """Run a task as people do."""
        return end(self.start(*words, prefix=prefix, **environment))

    def good(self, *words: str) -> Done:
        done = self.run(*words)
        assert done.status == 0, done.out + done.err
        return done

    def images(self) -> list[CloudImage]:
        """Return what is in the project, hidden and half-uploaded too."""
        with self.connect() as cloud:
            return Glance(cloud).list(owner=cloud.project)

    def only_image(self) -> CloudImage:
        """Return the one image that there shall be."""
        (image,) = self.images()
        return image

    def catalogue(self) -> Catalogue:
        with self.connect() as cloud:
            return Catalogue.read(cloud)

    def empty(self) -> None:
        with self.connect() as cloud:
            for image in Glance(cloud).list(owner=cloud.project):
                Glance(cloud).delete(image)


def end(process: subprocess.Popen[str], seconds: float = 240) -> Done:
    """Wait for a task."""
    with process:
        out, err = process.communicate(timeout=seconds)
    return Done(process.returncode, out, err)


def is_ours(image: CloudImage) -> bool:
    return MARK in image.tags
