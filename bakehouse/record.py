"""The record of an image: the JSON beside it, and the only thing that later stages read."""

from __future__ import annotations

import datetime
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from bakehouse.errors import BakehouseError
from bakehouse.timeline import Timeline

FILE_NAME = "record.json"
FORMAT = 1
"""Version of the record's format; raised when an old reader could misread a new record."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class ImageFile(_Part):
    """One image file."""

    format: str
    file: str
    size: int
    """Bytes on disk."""
    virtual_size: int
    """Bytes that the guest sees."""
    sha256: str
    sha512: str


class Step(_Part):
    """One stage of the bake."""

    name: str
    seconds: float
    cached: bool = False


class Base(_Part):
    """The base root that the image was built from."""

    key: str
    sha256: str
    created: datetime.datetime


class Usage(_Part):
    """What the bake took."""

    peak_memory: int
    """Bytes: the largest sum at one moment of the resident memory of the build's processes (shared pages counted for
    each) and of the build tree, where that is in memory."""
    disk: int
    """Bytes: root filesystem, raw disk and image files, which stand beside each other at the end."""
    cpu_seconds: float


class Check(_Part):
    """One thing that an image was tried for."""

    name: str
    passed: bool
    seconds: float
    detail: str = ""
    """Why it failed."""


class Verification(_Part):
    """How the verification of an image ended. One that failed must not be promoted."""

    result: Literal["passed", "failed"]
    at: datetime.datetime
    seconds: float
    accelerator: str
    """kvm or tcg (emulation); empty where no machine was booted."""
    firmware: str
    checks: list[Check]
    """What was tried, in this order; the first failure ends it."""
    suite: list[Check]
    """The facts that the testinfra suites asked for."""
    timeline: Timeline | None
    """Of the first boot, to the first job."""
    rejoin: Timeline | None
    """Of the boot after."""


class Publication(_Part):
    """Where an image was published."""

    cloud: str
    """As in clouds.yaml."""
    region: str
    project: str
    id: str
    """Of the image in Glance."""
    name: str
    format: str
    at: datetime.datetime


class Record(_Part):
    """All that is known about one image."""

    format: int = FORMAT
    name: str
    platform: str
    tag: str
    digest: str
    """Input digest: SHA-256 over all that can change the result."""
    inputs: dict[str, str]
    created: datetime.datetime
    commit: str
    distribution: str
    release: str
    architecture: str
    kernel: str
    """Version of the kernel in the image."""
    firmware: list[str]
    secure_boot: bool = False
    """Whether it boots under UEFI Secure Boot: shim, GRUB and kernel are signed."""
    root_size: int
    """Bytes of the root partition."""
    root_used: int
    """Bytes that the root filesystem's files take."""
    files: list[ImageFile]
    sbom: str
    sbom_sha256: str
    package_count: int
    versions: dict[str, str]
    """Versions of the packages that name the image: slurm, kernel, cloud-init, ..."""
    base: Base
    steps: list[Step]
    usage: Usage
    builder: dict[str, str]
    """Versions of the tools that built it."""
    verification: Verification | None = None
    published: list[Publication] = []

    def has_element(self, name: str) -> bool:
        """Say whether an element is among those that it was baked with."""
        return any(key == f"element {name}" or key.startswith(f"element {name}/") for key in self.inputs)

    @property
    def seconds(self) -> float:
        """Seconds that the bake took."""
        return sum(step.seconds for step in self.steps)


def text_of_format(path: Path, newest: int) -> str:
    """Return the text of a JSON file that says its format's version.

    Args:
        path: the file.
        newest: the newest format that we can read.

    Raises:
        BakehouseError: it is of a newer one.
        OSError: it cannot be read.
        ValueError: it is no JSON.
    """
    text = path.read_text(encoding="utf-8")
    written = json.loads(text)
    form = written.get("format") if isinstance(written, dict) else None
    if isinstance(form, int) and form > newest:
        raise BakehouseError(f"{path} has format {form}, written by a newer Bakehouse", hint="update this checkout")
    return text


def read(path: Path) -> Record:
    """Read a record.

    Raises:
        BakehouseError: it cannot be read or is not a record.
    """
    try:
        return Record.model_validate_json(text_of_format(path, FORMAT))
    except OSError as error:
        raise BakehouseError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BakehouseError(
            f"{path} is not a record of an image: {str(error).splitlines()[0]}",
            hint="remove its folder and bake again",
        ) from error


def canonical(data: dict[str, Any]) -> bytes:
    """Return the one form of JSON that digests and signatures are about: keys sorted, no blanks, UTF-8."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(path: Path) -> str:
    """Return the SHA-256 of a record: of its canonical JSON without ``published``, which changes later.

    It is about all that the file says, also what another version of Bakehouse wrote and this one does not know.

    Raises:
        BakehouseError: it cannot be read or is not a record.
    """
    read(path)
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return hashlib.sha256(
            canonical({name: value for name, value in said.items() if name != "published"})
        ).hexdigest()
    except OSError as error:
        raise BakehouseError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BakehouseError(f"{path} has no canonical form: {error}") from error
