"""What publishing an image would do. It looks as publishing itself does, and changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bakehouse import publish, upload
from bakehouse.cloud import Cloud
from bakehouse.progress import Progress
from bakehouse.properties import Metadata
from bakehouse.publish import Outcome
from bakehouse.published import Published
from bakehouse.record import ImageFile, Record
from bakehouse.store import LocalStore
from bakehouse.terminal import errors


@dataclass(frozen=True)
class Rehearsal:
    """What would be done."""

    outcome: Outcome
    """As of publishing."""
    image: Published | None
    """The image where it is there already, whole or not."""
    changes: Mapping[str, object]
    """What a whole one would say of itself that it does not say now; None is taken away."""


def rehearse(
    record: Record,
    file: ImageFile,
    store: LocalStore,
    cloud: Cloud,
    metadata: Metadata,
    *,
    visibility: str = "private",
    set_visibility: bool = False,
) -> Rehearsal:
    """Say what publishing an image would do.

    Args:
        record: the image.
        file: the one of its files that would be sent.
        store: where it is.
        cloud: where it would go.
        metadata: what it would say of itself.
        visibility: who would see it.
        set_visibility: change that also where the image is there already.

    Raises:
        BakehouseError: publishing would refuse it: its file cannot be sent, or its name or tag is somebody else's.
    """
    path = store.image(record, file.format)
    upload.check(path, file)
    silent = Progress("", [], errors)
    own = publish.uploader(store)
    job = publish.Job(record, file, path, cloud, metadata, silent, visibility, set_visibility, own)
    found = job.look()
    image = Published(found) if found else None
    if found is None or image is None:
        return Rehearsal("published", None, {})
    if image.incoming:
        return Rehearsal("finished", image, {})
    changes = job.differences(found)
    if set_visibility and found.visibility != visibility:
        changes["visibility"] = visibility
    return Rehearsal("updated" if changes else "unchanged", image, changes)
