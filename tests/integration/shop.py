"""Images to publish, and the means to do it in this process or in one that is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bakehouse import REPOSITORY, clouds_yaml
from bakehouse.cloud import Cloud, connect
from bakehouse.glance import CloudImage, Glance
from bakehouse.local_cloud import LocalCloud, Member
from bakehouse.properties import MARK
from bakehouse.published import Catalogue
from bakehouse.store import LocalStore


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
