"""Images that Bakehouse published, as they are found in a cloud. The cloud itself holds all that is known of them."""

from __future__ import annotations

import datetime
import json
import re
from dataclasses import dataclass
from functools import cached_property

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


@dataclass(frozen=True)
class Move:
    """One step in a channel's history. It is kept at the image that the channel moved to."""

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
    forced: bool = False

    @property
    def property(self) -> str:
        """The property of the image that holds it."""
        return f"{CHANNEL}{self.channel}_{self.number}"

    def value(self) -> str:
        """Return what the property says."""
        data = {"move": self.kind, "at": self.at, "from": self.before, "by": self.by}
        text = json.dumps(data | ({"forced": True} if self.forced else {}), separators=(",", ":"))
        if len(text) <= LONGEST_VALUE:
            return text
        return json.dumps({**data, "by": self.by[:40], "forced": self.forced}, separators=(",", ":"))


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
                found.append(self._move(match[1], int(match[2]), value))
        return tuple(sorted(found, key=lambda move: (move.channel, move.number)))

    def _move(self, channel: str, number: int, value: str) -> Move:
        try:
            data = json.loads(value)
        except ValueError:
            data = None
        data = data if isinstance(data, dict) else {}
        return Move(
            channel=channel,
            number=number,
            image=self.id,
            tag=self.tag,
            kind="rollback" if data.get("move") == "rollback" else "promote",
            at=str(data.get("at", "")),
            by=str(data.get("by", "")),
            before=str(data.get("from", "")),
            forced=bool(data.get("forced")),
        )

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
        return sorted({(image.name, move.channel) for image in self.images for move in image.moves})

    def names(self) -> list[str]:
        """Return the manifests that have images here."""
        return sorted({image.name for image in self.images})


def _age(published: Published) -> tuple[datetime.datetime, datetime.datetime, str]:
    """Return what images are ordered by: when they were baked, where that cannot be read, when they came to be."""
    try:
        baked = datetime.datetime.fromisoformat(published.says("created"))
    except ValueError:
        baked = published.image.created
    baked = baked if baked.tzinfo else baked.replace(tzinfo=datetime.UTC)
    return baked, published.image.created, published.id
