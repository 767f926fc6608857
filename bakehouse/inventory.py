"""What the store and a cloud hold of each other's images, and whether a cloud still holds what was published."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import tenacity

from bakehouse import channel
from bakehouse.cloud import is_passing
from bakehouse.errors import BakehouseError
from bakehouse.glance import Glance
from bakehouse.published import Catalogue, Published
from bakehouse.record import Record
from bakehouse.store import LocalStore

MOST_TRIES = 3
"""Downloads of one image, where the connection breaks."""

UPLOADING = {"saving", "uploading", "importing"}
"""States in which Glance takes data (Image API v2)."""


@dataclass(frozen=True)
class Finding:
    """One image that is not in both places, or not as it should be."""

    state: str
    """``store only``, ``cloud only``, ``uploading``, ``unfinished``, ``differs``, ``doubled``, ``lost``, ``hidden`` or
    ``shown``."""
    name: str
    """The manifest's."""
    tag: str
    id: str
    """In Glance; empty where it is in the store only."""
    detail: str
    fault: bool
    """Whether something is to be mended."""


def compare(store: LocalStore, catalogue: Catalogue) -> list[Finding]:
    """Compare a store with a cloud.

    Returns:
        What is in one and not in the other, and what is amiss, in this order of tags.
    """
    records = {(record.name, record.tag): record for record in store.records()}
    found: list[Finding] = []
    seen: dict[tuple[str, str], Published] = {}
    for image in catalogue.images:
        key = (image.name, image.tag)
        found += _of_cloud(image, records.get(key), seen.get(key), catalogue.cloud.clock)
        seen.setdefault(key, image)
    for key, record in records.items():
        if key not in seen:
            found.append(_of_store(record, catalogue))
    for name in catalogue.names():
        for image in channel.wrongly_shown(catalogue, name):
            state = "hidden" if image.image.hidden else "shown"
            why = "though a channel points to it" if image.image.hidden else "though all channels have left it"
            found.append(Finding(state, image.name, image.tag, image.id, f"{why}: the next move mends it", True))
    found += _lost_targets(catalogue)
    return sorted(found, key=lambda finding: (finding.name, finding.tag))


def _lost_targets(catalogue: Catalogue) -> list[Finding]:
    """Return the images that channels point to and that have been deleted."""
    histories = [channel.history(catalogue, name, one) for name, one in catalogue.channels()]
    lost = [(past, past.moves[-1]) for past in histories if past.current is None]
    why = "the channel {} points to it, and it is deleted: promote another, or roll back"
    return [
        Finding("lost", past.name, move.tag, move.image, why.format(past.channel), fault=True) for past, move in lost
    ]


def _of_cloud(
    image: Published, record: Record | None, other: Published | None, now: datetime.datetime
) -> list[Finding]:
    def finding(state: str, detail: str, fault: bool = True) -> Finding:
        return Finding(state, image.name, image.tag, image.id, detail, fault)

    if image.incoming:
        again = f"`invoke publish {image.tag}` finishes it" if record else "`invoke prune` removes it after a day"
        if image.image.status in UPLOADING and not image.abandoned(now):
            return [
                finding("uploading", "somebody is sending it; else `invoke prune` removes it after a day", fault=False)
            ]
        return [finding("unfinished", f"its upload did not come to its end; {again}")]
    if other is not None:
        return [finding("doubled", f"{other.id} has the same tag; delete one by hand")]
    if record is None:
        return [finding("cloud only", "published from another host, or removed from this store", fault=False)]
    if image.says("sha512") not in {file.sha512 for file in record.files}:
        return [finding("differs", "its content is not that of the image in the store")]
    return []


def _of_store(record: Record, catalogue: Catalogue) -> Finding:
    cloud = catalogue.cloud
    was = [
        entry.id for entry in record.published if (entry.project, entry.region) == (catalogue.owner, cloud.region)
        and entry.cloud == cloud.name
    ]  # fmt: skip
    if was:
        return Finding(
            "lost", record.name, record.tag, was[0], "was published: pruned since, or deleted by hand", False
        )
    return Finding("store only", record.name, record.tag, "", "not published", False)


def _download(image: Published, glance: Glance, tell: Callable[[int], None]) -> tuple[str, int]:
    """Return the SHA-512 of an image's data and its length. A download that breaks off is begun again."""

    def once() -> tuple[str, int]:
        digest, count = hashlib.sha512(), 0
        for piece in glance.download(image.image):
            digest.update(piece)
            count += len(piece)
            tell(count)
        return digest.hexdigest(), count

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_passing),
        wait=tenacity.wait_exponential(multiplier=2, max=20),
        stop=tenacity.stop_after_attempt(MOST_TRIES),
        reraise=True,
    )(once)


def verify(image: Published, record: Record | None, cloud_glance: Glance, tell: Callable[[int], None]) -> list[str]:
    """Download an image and check that it is what was baked.

    Args:
        image: the image.
        record: its record, where the store has it.
        cloud_glance: where to download it from.
        tell: called with the bytes read so far.

    Returns:
        What its SHA-512 was compared with.

    Raises:
        BakehouseError: it is something else, or cannot be downloaded.
    """
    found, count = _download(image, cloud_glance, tell)
    expected = {"its property bakehouse_sha512": image.says("sha512")}
    if image.image.hash_algorithm == "sha512":
        expected["Glance's own hash"] = image.image.hash_value
    if record:
        of_format = [file.sha512 for file in record.files if file.format == image.image.disk_format]
        expected["the record in the store"] = of_format[0] if of_format else ""
    wrong = [what for what, value in expected.items() if value != found]
    if wrong:
        raise BakehouseError(
            f"{image.tag} ({image.id}) is not what was baked: the SHA-512 of its {count} bytes is not that of "
            f"{' and of '.join(wrong)}",
            hint=f"do not use it; `invoke rollback --platform {image.name} --channel ...`, then delete it",
        )
    return [*expected]
