"""Launches: nodes that were brought up together. What marks all that was made for one, and the note of it on this host.

The mark stands in the cloud itself, so that what was made is found where the note was lost; the note stands here, so
that one knows which cloud to ask.
"""

from __future__ import annotations

import datetime
import json
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from platformdirs import user_state_path

from bakehouse.cache import write_atomically
from bakehouse.errors import BakehouseError
from bakehouse.userdata import LABEL

NOTE = "launch.json"
PREFIX = "bakehouse-"

IDENTITY = "bakehouse_launch"
"""The metadata key whose value is a launch's id."""

NAME, USER, NODE, KEPT = "bakehouse_launch_name", "bakehouse_user", "bakehouse_node", "bakehouse_kept"

LONGEST_NAME = 40

_NAMED = re.compile(rf"{PREFIX}(?P<name>[a-z0-9-]+)-(?P<identity>[0-9a-f]{{12}})")
_DESCRIBED = re.compile(
    r"bakehouse launch (?P<identity>[0-9a-f]{12}) name (?P<name>[a-z0-9-]+) user (?P<user>\S*) node (?P<node>\S*)"
)


@dataclass(frozen=True)
class Mark:
    """Whose something is."""

    identity: str
    """Of the launch: 12 hexadecimal digits."""
    name: str
    """Of the launch."""
    user: str
    """The id of the user that made it; empty where that is not told."""
    node: str = ""
    """The node that it belongs to."""

    def metadata(self) -> dict[str, str]:
        """Write it as metadata of a server or volume."""
        return {IDENTITY: self.identity, NAME: self.name, USER: self.user, **({NODE: self.node} if self.node else {})}

    @classmethod
    def of_metadata(cls, data: Mapping[str, str]) -> Self | None:
        """Read it from metadata; None where there is none."""
        if not data.get(IDENTITY):
            return None
        return cls(data[IDENTITY], data.get(NAME, ""), data.get(USER, ""), data.get(NODE, ""))

    def description(self) -> str:
        """Write it as the description of a port or floating IP, which have no metadata."""
        return f"bakehouse launch {self.identity} name {self.name} user {self.user} node {self.node}"

    @classmethod
    def of_description(cls, text: str) -> Self | None:
        """Read it from a description; None where there is none."""
        found = _DESCRIBED.fullmatch(text)
        return cls(found["identity"], found["name"], found["user"], found["node"]) if found else None

    def label(self) -> str:
        """Write it as the name of a server group or key pair, which have nothing but a name."""
        return f"{PREFIX}{self.name}-{self.identity}"

    @classmethod
    def of_label(cls, text: str, user: str) -> Self | None:
        """Read it from a name; None where there is none."""
        found = _NAMED.fullmatch(text)
        return cls(found["identity"], found["name"], user) if found else None


@dataclass(frozen=True)
class Launch:
    """Nodes that are, or come, up."""

    name: str
    identity: str
    platform: str
    path: str
    image: str
    """The image's id."""
    nodes: tuple[str, ...]
    cloud: str
    region: str
    project: str
    user: str
    since: str

    def mark(self, node: str = "") -> Mark:
        """Return what marks all that is made for it."""
        return Mark(self.identity, self.name, self.user, node)

    @property
    def folder(self) -> Path:
        """Where its note, its key, its consoles and timelines are."""
        return folder() / self.identity

    def write(self) -> None:
        """Write the note. Only its owner can read the folder."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(self.folder / NOTE, json.dumps(asdict(self), indent=1))

    def forget(self) -> None:
        """Remove the note and all beside it."""
        shutil.rmtree(self.folder, ignore_errors=True)


def new_identity() -> str:
    """Return an id that no launch has had."""
    return secrets.token_hex(6)


def check_name(name: str) -> None:
    """Check the name of a launch. Its nodes are NAME-1, NAME-2, ...

    Raises:
        BakehouseError: it cannot be one.
    """
    if not re.fullmatch(LABEL, name) or name != name.lower() or len(name) > LONGEST_NAME:
        raise BakehouseError(
            f"--name {name}: nodes cannot be named after that",
            hint=f"lower-case letters, digits and hyphens, {LONGEST_NAME} at most",
        )


def timeline_name(node: str) -> str:
    """Return the name of the file in a launch's folder with a node's timeline."""
    return f"timeline-{node}.json"


def node_names(name: str, count: int) -> tuple[str, ...]:
    """Return the names of a launch's nodes."""
    return tuple(f"{name}-{number}" for number in range(1, count + 1))


def now() -> str:
    """Return the time for a note."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def folder() -> Path:
    """Return where launches are noted."""
    return user_state_path("bakehouse") / "launches"


def notes() -> list[Launch]:
    """Return the launches that are noted here, the oldest first."""
    found = []
    for path in folder().glob(f"*/{NOTE}"):
        try:
            data = json.loads(path.read_text())
            found.append(Launch(**{**data, "nodes": tuple(data["nodes"])}))
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return sorted(found, key=lambda one: (one.since, one.identity))
