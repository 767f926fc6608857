"""Choosing: one image, for a deploy config; and lock files, which pin what was chosen."""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from bakehouse import channel, yamlfile
from bakehouse.cache import write_atomically
from bakehouse.errors import BakehouseError
from bakehouse.glance import Glance
from bakehouse.published import Catalogue, Published

FILE_NAME = "images.lock.yaml"

FORMATS = ("id", "name", "json", "yaml", "tfvars", "env", "ansible")

SKIPPED = {".git", ".venv", "node_modules", ".terraform", "__pycache__", ".tox"}

State = Literal["ok", "behind", "hidden", "gone", "altered", "unusable"]


class Pin(BaseModel):
    """One image in a lock file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    platform: str = Field(description="The manifest's name.")
    channel: str = Field(default="", description="The channel that it came from; none where a tag was named.")
    tag: str
    id: str = Field(pattern=r"^[0-9a-f-]{36}$", description="Of the image in Glance: what deploy configs use.")
    name: str
    sha512: str = Field(pattern=r"^([0-9a-f]{128})?$", description="Of the image file.")
    cloud: str
    region: str = ""


class Lock(BaseModel):
    """A lock file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: list[Pin] = []


@dataclass(frozen=True)
class Checked:
    """How a pinned image stands."""

    pin: Pin
    state: State
    detail: str


def choose(catalogue: Catalogue, name: str, *, channel_name: str = "", tag: str = "") -> Published:
    """Return the image that a channel points to, or the one with a tag.

    Raises:
        BakehouseError: there is none, or nothing can be made of it.
    """
    if tag:
        found = catalogue.get(tag)
        if found.name != name:
            raise BakehouseError(f"{found.tag} is an image of {found.name}, not of {name}")
        if not found.usable:
            state = "its upload did not come to its end" if found.incoming else f"it is '{found.image.status}'"
            raise BakehouseError(f"{found.tag} cannot be used: {state}", hint="`invoke images --cloud` shows others")
        return found
    if name not in catalogue.names():
        raise BakehouseError(
            f"{catalogue.cloud.place} has no image of '{name}'{yamlfile.did_you_mean(name, catalogue.names())}",
            hint=f"it has images of {', '.join(catalogue.names())}"
            if catalogue.images
            else "`invoke publish` sends one",
        )
    return channel.current(catalogue, name, channel_name)


def pin_of(catalogue: Catalogue, image: Published, channel_name: str = "") -> Pin:
    """Return what a lock file says of an image."""
    return Pin(
        platform=image.name,
        channel=channel_name,
        tag=image.tag,
        id=image.id,
        name=image.image.name,
        sha512=image.statement.sha512,
        cloud=catalogue.cloud.name,
        region=catalogue.cloud.region,
    )


def render(pinned: Pin, form: str) -> str:
    """Write an image for a deploy config, without a line end.

    Args:
        pinned: the image.
        form: one of FORMATS.

    Raises:
        BakehouseError: it is none of them.
    """
    if form not in FORMATS:
        raise BakehouseError(
            f"--format {form}: it is one of {', '.join(FORMATS)}{yamlfile.did_you_mean(form, [*FORMATS])}"
        )
    word = re.sub(r"\W", "_", pinned.platform)
    facts = pinned.model_dump()
    named = {f"{word}_image_{key}": value for key, value in facts.items() if key in {"id", "name", "tag", "sha512"}}
    writers: dict[str, Callable[[], str]] = {
        "id": lambda: pinned.id,
        "name": lambda: pinned.name,
        "json": lambda: json.dumps(facts, indent=1),
        "yaml": lambda: yaml.safe_dump(facts, sort_keys=False).rstrip(),
        # JSON strings are HCL strings but for templates, which ${ and %{ begin.
        "tfvars": lambda: "\n".join(f"{key} = {_hcl(value)}" for key, value in named.items()),
        "env": lambda: "\n".join(f"{key.upper()}={shlex.quote(value)}" for key, value in named.items()),
        "ansible": lambda: yaml.safe_dump(named, sort_keys=False).rstrip(),
    }
    return writers[form]()


def _hcl(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("${", "$${").replace("%{", "%%{")


def top(folder: Path) -> Path:
    """Return the top folder of the git repository that a folder is in; the folder itself where it is in none."""
    folder = folder.resolve()
    return next((place for place in (folder, *folder.parents) if (place / ".git").exists()), folder)


def find(folder: Path) -> list[Path]:
    """Return the lock files in a folder and below it; not in those of tools and of version control.

    Raises:
        BakehouseError: a folder cannot be read. Whether there are lock files in it is not known then.
    """

    def refuse(error: OSError) -> None:
        raise BakehouseError(
            f"{error.filename} cannot be read: {error.strerror}; what lock files in it pin is not known",
            hint="run it as somebody who may read it, or in the folder of your deploy configs",
        ) from error

    found = []
    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(set(folders) - SKIPPED)
        if FILE_NAME in files:
            found.append(Path(place) / FILE_NAME)
    return found


def read(path: Path) -> Lock:
    """Read a lock file.

    Raises:
        BakehouseError: it is not there, or not a lock file.
    """
    if not path.exists():
        raise BakehouseError(f"{path} is not there", hint="`invoke pin --platform slurm --channel stable` writes it")
    return yamlfile.check(Lock, yamlfile.read(path))


def write(path: Path, new: Pin, *, dry_run: bool = False) -> tuple[Pin | None, bool]:
    """Pin an image, in place of the one of the same platform, cloud and region.

    Args:
        path: the lock file; it is made where it is missing.
        new: the image.
        dry_run: change nothing.

    Returns:
        What was pinned before, and whether the file changed, or would change.

    Raises:
        BakehouseError: the file is there and is not a lock file, or cannot be written.
    """
    lock = read(path) if path.exists() else Lock()
    same = [entry for entry in lock.images if _place(entry) == _place(new)]
    before = same[0] if same else None
    if before == new or dry_run:
        return before, before != new
    entries = sorted([*(entry for entry in lock.images if _place(entry) != _place(new)), new], key=_place)
    text = (
        "# Images that this deployment uses. `invoke pin` writes it; commit it.\n"
        "# `invoke pin --check` says whether they are still what they were.\n"
    )
    body = {"images": [entry.model_dump(exclude_defaults=True) for entry in entries]}
    try:
        write_atomically(path, text + yaml.safe_dump(body, sort_keys=False, width=200))
    except OSError as error:
        raise BakehouseError(f"{path} cannot be written: {error.strerror}") from error
    return before, True


def _place(entry: Pin) -> tuple[str, str, str]:
    return entry.platform, entry.cloud, entry.region


def check(entry: Pin, catalogue: Catalogue) -> Checked:
    """Say how a pinned image stands: still there, still the same, still what its channel points to.

    Args:
        entry: of a lock file.
        catalogue: of its cloud.
    """
    image = Glance(catalogue.cloud).get(entry.id)
    if image is None:
        return Checked(entry, "gone", "the cloud has no such image, or does not show it to this credential")
    found = Published(image)
    altered = _altered(entry, found)
    if altered:
        return Checked(entry, "altered", altered)
    if image.status != "active":
        return Checked(entry, "unusable", f"it is '{image.status}'")
    behind = _behind(entry, catalogue, found)
    if behind:
        return Checked(entry, "behind", behind)
    if image.hidden:
        return Checked(entry, "hidden", "no channel points to it any more")
    return Checked(entry, "ok", "")


def _altered(entry: Pin, found: Published) -> str:
    if found.image.hash_algorithm == "sha512" and found.image.hash_value not in {entry.sha512, ""}:
        return "its SHA-512 is not the pinned one"
    if found.tag != entry.tag or found.statement.sha512 != entry.sha512:
        return f"it says that it is {found.tag or 'no image of ours'}"
    return ""


def _behind(entry: Pin, catalogue: Catalogue, found: Published) -> str:
    if not entry.channel:
        return ""
    now = channel.history(catalogue, entry.platform, entry.channel).current
    if now is None or now.id == found.id:
        return ""
    age: datetime.timedelta = catalogue.cloud.clock - now.image.created
    hidden = ", and this one is hidden" if found.image.hidden else ""
    return f"{entry.channel} points to {now.tag}, {max(age.days, 0)} days old{hidden}"
