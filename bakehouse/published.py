"""Images that Bakehouse published, as they are found in a cloud. The cloud itself holds all that is known of them."""

from __future__ import annotations

import datetime
import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bakehouse.cloud import Cloud
from bakehouse.errors import BakehouseError
from bakehouse.glance import CloudImage, Glance
from bakehouse.properties import LONGEST_VALUE, MARK, OURS
from bakehouse.signature import Signature, Statement

STATE = OURS + "state"
INCOMING = "incoming"
"""State of an image that is being uploaded or checked: it is hidden, and nobody may use it."""
PUBLISHED = "published"
"""State of an image that is whole and whose hash was compared."""

UPLOADER = OURS + "uploader"
"""Which host's store an incoming image comes from."""

STALE = datetime.timedelta(days=1)
"""How long an upload may take before it counts as one that a killed run left."""

CHANNEL = OURS + "channel_"
LEFT = OURS + "left_"


@dataclass(frozen=True)
class Move:
    """One step in a channel's history.

    It is kept at the image that the channel moved to, and at the one that it left as long as that is its last
    departure: so it is known also where one of them has been deleted.
    """

    channel: str
    number: int
    """Counts a channel's moves: the highest is where it points to. Never a time: clocks differ."""
    image: str
    """Id of the image that the channel moved to."""
    tag: str
    kind: str
    """``promote`` or ``rollback``."""
    at: str
    by: str
    before: str
    """Tag of the image that it pointed to before; empty for the first."""
    depth: int
    """How many images were piled up then, this one on top: a promotion adds one, a rollback goes back to where its
    image lay."""
    forced: bool = False
    over: bool = False
    """Whether a later move came to the same place in the pile, or below it: rolling back leads here no more."""

    @property
    def key(self) -> str:
        """The property of the image that it moved to."""
        return f"{CHANNEL}{self.channel}_{self.number}"

    @property
    def left_key(self) -> str:
        """The property of the image that it left."""
        return LEFT + self.channel

    def value(self) -> str:
        """Return what the property of the image says that it moved to."""
        return self._text({"from": self.before})

    def left_value(self) -> str:
        """Return what the property of the image says that it left."""
        return self._text({"number": self.number, "image": self.image, "to": self.tag})

    def _text(self, more: dict[str, object]) -> str:
        data: dict[str, object] = {"move": self.kind, "depth": self.depth, "at": self.at, **more, "by": self.by}
        data |= {key: True for key, holds in (("forced", self.forced), ("over", self.over)) if holds}
        text = json.dumps(data, separators=(",", ":"))
        if len(text) <= LONGEST_VALUE:
            return text
        return json.dumps({**data, "by": self.by[:20]}, separators=(",", ":"))


@dataclass(frozen=True)
class Published:
    """An image of ours in a cloud."""

    image: CloudImage

    def says(self, key: str) -> str:
        """Return one of our properties; empty where it is not there."""
        return self.image.properties.get(OURS + key, "")

    @property
    def id(self) -> str:
        """Its id in Glance."""
        return self.image.id

    @property
    def tag(self) -> str:
        """The tag of the bake."""
        return self.says("tag")

    @property
    def name(self) -> str:
        """The manifest's name."""
        return self.says("name")

    @property
    def verified(self) -> str:
        """``passed``, ``failed`` or ``none``."""
        return self.says("verified") or "none"

    @property
    def usable(self) -> bool:
        """Whether servers can be made of it: whole, compared, not taken out of service by an administrator."""
        return self.image.status == "active" and self.says("state") == PUBLISHED

    @property
    def incoming(self) -> bool:
        """Whether its upload has not come to its end."""
        return self.says("state") != PUBLISHED

    def abandoned(self, now: datetime.datetime) -> bool:
        """Say whether an upload has stood still for so long, by the cloud's clock, that nobody is at work on it."""
        return self.incoming and now - self.image.updated >= STALE

    @cached_property
    def moves(self) -> tuple[Move, ...]:
        """The moves of channels to it, oldest first in each channel. What cannot be read is left out."""
        found = []
        for key, value in self.image.properties.items():
            match = re.fullmatch(rf"{CHANNEL}([a-z][a-z0-9-]*)_(\d+)", key)
            if match:
                data = _read(value)
                before = str(data.get("from", ""))
                found.append(_move(data, match[1], int(match[2]), image=self.id, tag=self.tag, before=before))
        return tuple(sorted(found, key=lambda move: (move.channel, move.number)))

    @cached_property
    def departures(self) -> tuple[Move, ...]:
        """The moves by which channels left it last, one for each channel. What cannot be read is left out."""
        found = []
        for key, value in self.image.properties.items():
            match = re.fullmatch(rf"{LEFT}([a-z][a-z0-9-]*)", key)
            data = _read(value) if match else {}
            if match and _number(data.get("number")):
                image, tag = str(data.get("image", "")), str(data.get("to", ""))
                found.append(_move(data, match[1], data["number"], image=image, tag=tag, before=self.tag))
        return tuple(found)

    @property
    def statement(self) -> Statement:
        """What a signature of it covers, as far as the cloud says it."""
        return Statement(
            name=self.name,
            platform=self.says("platform"),
            tag=self.tag,
            digest=self.says("digest"),
            format=self.image.disk_format,
            sha512=self.image.hash_value if self.image.hash_algorithm == "sha512" else self.says("sha512"),
            record_sha256=self.says("record_sha256"),
            sbom_sha256=self.says("sbom_sha256"),
            verified=self.verified,
        )

    @property
    def signature(self) -> Signature | None:
        """Its signature, where it has one."""
        value, key = self.says("signature"), self.says("signature_key")
        return Signature(keyid=key, value=value) if value and key else None


@dataclass(frozen=True)
class Catalogue:
    """All images of ours in a cloud at one moment."""

    cloud: Cloud
    owner: str
    """The project whose images count. Anybody can mark an image of his own as ours."""
    images: tuple[Published, ...]
    """The newest first."""

    @classmethod
    def read(cls, cloud: Cloud, owner: str = "") -> Catalogue:
        """Read it.

        Args:
            cloud: the cloud.
            owner: id of the project whose images count; the credential's own by default.
        """
        whose = owner or cloud.project
        found = Glance(cloud).list(tag=MARK, owner=whose, visibility="all", member_status="all")
        # Glance's filters are not trusted with this one: an owner that it does not know filters nothing in some.
        images = [Published(image) for image in found if image.owner == whose and image.properties.get(OURS + "tag")]
        return cls(cloud, whose, tuple(sorted(images, key=_age, reverse=True)))

    def named(self, name: str) -> list[Published]:
        """Return the images of a manifest, the newest first."""
        return [image for image in self.images if image.name == name]

    def get(self, tag: str) -> Published:
        """Return the image with a tag.

        Args:
            tag: a tag, or its beginning where only one image has it, or a manifest's name for its newest.

        Raises:
            BakehouseError: no image or more than one has it.
        """
        exact = [image for image in self.images if image.tag == tag]
        named = [image for image in self.named(tag) if not image.incoming][:1]
        fitting = exact or named or [image for image in self.images if tag and image.tag.startswith(tag)]
        if not fitting:
            raise BakehouseError(
                f"there is no image '{tag}' in {self.cloud.place}",
                hint=f"`invoke images --cloud {self.cloud.name}` lists them; `invoke publish {tag or 'TAG'}` sends one",
            )
        if len(fitting) > 1:
            several = ", ".join(f"{image.name} {image.tag} ({image.id})" for image in fitting)
            raise BakehouseError(f"'{tag}' fits {len(fitting)} images: {several}", hint="write more of the tag")
        return fitting[0]

    def channels(self) -> list[tuple[str, str]]:
        """Return the (manifest, channel) pairs that have a history."""
        return sorted(
            {(image.name, move.channel) for image in self.images for move in (*image.moves, *image.departures)}
        )

    def names(self) -> list[str]:
        """Return the manifests that have images here."""
        return sorted({image.name for image in self.images})


def _read(value: str) -> dict[str, Any]:
    try:
        data = json.loads(value)
    except ValueError:
        data = None
    return data if isinstance(data, dict) else {}


def _number(value: object) -> int:
    """Return what counts from one; 0 where it is nothing of the kind."""
    return value if isinstance(value, int) and value > 0 else 0


def _move(data: dict[str, Any], channel: str, number: int, *, image: str, tag: str, before: str) -> Move:
    return Move(
        channel=channel,
        number=number,
        image=image,
        tag=tag,
        kind="rollback" if data.get("move") == "rollback" else "promote",
        at=str(data.get("at", "")),
        by=str(data.get("by", "")),
        before=before,
        # Where it cannot be read, nothing below it counts: rather no way back than a wrong one.
        depth=_number(data.get("depth")) or 1,
        forced=bool(data.get("forced")),
        over=bool(data.get("over")),
    )


def _age(published: Published) -> tuple[datetime.datetime, datetime.datetime, str]:
    """Return what images are ordered by: when they were baked, where that cannot be read, when they came to be."""
    try:
        baked = datetime.datetime.fromisoformat(published.says("created"))
    except ValueError:
        baked = published.image.created
    baked = baked if baked.tzinfo else baked.replace(tzinfo=datetime.UTC)
    return baked, published.image.created, published.id
