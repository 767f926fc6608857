"""Publish: an image of the local store becomes one in Glance, whole, described and compared, or none."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import re
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Literal

import tenacity
from rich.console import Console

from bakehouse import lock, run, upload
from bakehouse.cache import file_digest
from bakehouse.cloud import Cloud, CloudError, is_passing
from bakehouse.errors import BakehouseError
from bakehouse.glance import CloudImage, Glance
from bakehouse.progress import Progress
from bakehouse.properties import OURS, Metadata
from bakehouse.published import INCOMING, PUBLISHED, STATE, UPLOADER, Catalogue, Published
from bakehouse.record import ImageFile, Publication, Record
from bakehouse.store import LocalStore

STAGES = ["look", "claim", "upload", "compare", "show"]

NAMESPACE = uuid.UUID("6f1d3c0e-9a55-5c0b-8d0e-0b9f6f4e7a11")
"""Of the ids that images get (RFC 9562, version 5); drawn once by chance."""

MOST_CLAIMS = 200
"""How often one tag may be published and deleted again in one project: Glance takes an id only once."""

MOST_TRIES = 5
"""Uploads of one image in one run, where the connection breaks."""

SETTLE_SECONDS = 10.0
"""A living Glance puts an image back to ``queued`` within a second of its uploader's end; a killed one never does."""

ADOPT_SECONDS = 5.0
"""How long another host's publisher has from creating an image to sending it, before we do."""

SLOWEST = 1 << 19
"""Bytes a second: an upload by another host that is slower than this is taken for dead."""

PATIENCE_SECONDS = 300.0
"""Beside that: Glance may still be writing to its own store."""

POLL_SECONDS = 2.0

MACHINE_ID = Path("/etc/machine-id")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

CHANGED = {HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT, HTTPStatus.GONE}
"""Answers to an upload that say that somebody else was at work on the image."""

Outcome = Literal["published", "finished", "updated", "unchanged"]


@dataclass(frozen=True)
class Done:
    """What publishing came to."""

    image: Published
    outcome: Outcome
    """``finished``: it was in the cloud from a run before, but not at its end. ``updated``: only what it says of itself
    was changed."""
    changes: tuple[str, ...]
    """What of its metadata was changed."""
    seconds: float
    """Of the upload alone; 0 where there was none."""
    rate: float
    """Bytes a second, of the upload alone."""


def image_id(project: str, name: str, tag: str, attempt: int) -> str:
    """Return the id that an image of ours gets.

    It is the same for all who publish the same thing, and Glance takes each id once: so of two publishers one comes
    second, whatever happens in between, and no two images come to be.

    Args:
        project: id of the project.
        name: the manifest's name.
        tag: the image's tag.
        attempt: 0, or more where images with the ids before have been deleted.
    """
    return str(uuid.uuid5(NAMESPACE, f"{project}/{name}/{tag}/{attempt}"))


def publish(
    record: Record,
    file: ImageFile,
    store: LocalStore,
    cloud: Cloud,
    metadata: Metadata,
    console: Console,
    *,
    visibility: str = "private",
    set_visibility: bool = False,
) -> Done:
    """Publish an image.

    Args:
        record: the image.
        file: the one of its files that is sent.
        store: where it is.
        cloud: where it goes.
        metadata: what it shall say of itself.
        console: shows progress.
        visibility: who shall see it.
        set_visibility: change that also where the image is there already.

    Raises:
        BakehouseError: it cannot be. Nothing new is left in the cloud then, as far as the cloud lets us.
    """

    def say(text: str) -> None:
        console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    path = store.image(record, file.format)
    upload.check(path, file)
    own_lock = store.root / ".locks" / f"publish-{record.tag}.lock"
    what = f"the publication of {record.tag}"
    with (
        run.ending_on_sigterm(),
        lock.held(own_lock, what, wait=True, say=say),
        Progress(f"Publishing {record.name} {record.tag} to {cloud.place}", STAGES, console) as progress,
    ):
        job = Job(record, file, path, cloud, metadata, progress, visibility, set_visibility, uploader(store))
        done = job.run()
        _note(record, file, store, cloud, done.image.image)
        return done


def uploader(store: LocalStore) -> str:
    """Return what tells this host's store from all others. Who holds its lock knows that nobody else here uploads.

    A store's identity is in all copies of it, and on all hosts that share it: they have locks of their own, or locks
    that may not reach from one to another. So where it is counts as well.
    """
    return hashlib.sha256(f"{_host()}:{store.root.resolve()}:{store.identity}".encode()).hexdigest()[:16]


def _host() -> str:
    """Return what tells this host from all others."""
    machine = MACHINE_ID.read_text().strip() if MACHINE_ID.is_file() else ""
    if re.fullmatch("[0-9a-f]{32}", machine):
        # Cloned machines often have one id in common, but seldom a name.
        return f"{machine}:{socket.gethostname()}"
    # Containers mostly have none (machine-id(5): empty, or "uninitialized"). Those on one host see each other's locks.
    return BOOT_ID.read_text().strip()


def _note(record: Record, file: ImageFile, store: LocalStore, cloud: Cloud, image: CloudImage) -> None:
    """Write into the record where the image was published. Call it under the lock of its publication."""
    # As it is now: while we waited for the lock, it may have been published elsewhere.
    before = store.get(record.tag).published
    if image.id in {entry.id for entry in before}:
        return
    entry = Publication(
        cloud=cloud.name,
        region=cloud.region,
        project=cloud.project,
        id=image.id,
        name=image.name,
        format=file.format,
        at=datetime.datetime.now(datetime.UTC).replace(microsecond=0),
    )
    others = [
        one for one in before if (one.cloud, one.region, one.project) != (entry.cloud, entry.region, entry.project)
    ]
    store.amend(record.tag, {"published": [*others, entry]})


class Job:
    """One publication.

    Args:
        record: the image.
        file: the one of its files that is sent.
        path: where that is.
        cloud: where it goes.
        metadata: what it shall say of itself.
        progress: shows how it gets on.
        visibility: who shall see it.
        set_visibility: change that also where the image is there already.
        own: what tells this host's store from all others (uploader()).
    """

    def __init__(
        self,
        record: Record,
        file: ImageFile,
        path: Path,
        cloud: Cloud,
        metadata: Metadata,
        progress: Progress,
        visibility: str,
        set_visibility: bool,
        own: str,
    ) -> None:
        self.record = record
        self.file = file
        self.path = path
        self.cloud = cloud
        self.glance = Glance(cloud)
        self.metadata = metadata
        self.progress = progress
        self.visibility = visibility
        self.set_visibility = set_visibility
        self.own = own
        self.meter = upload.Meter(file.size, progress.line, progress.note)
        self.seconds = 0.0
        self.begun = ""
        """Id of the image that this run created or uploaded, where it works on one."""
        self.adopted = ""
        """Id of an image that another publisher created and did not send."""

    def run(self) -> Done:
        """Do it."""
        with self.progress.stage("look"):
            found = self.look()
        if found and not Published(found).incoming:
            for name in STAGES[1:-1]:
                with self.progress.stage(name):
                    self.progress.cached(name)
            return self._bring_up_to_date(found)
        resumed = found is not None
        image = found
        try:
            with self.progress.stage("claim"):
                image = image or self._claim()
            with self.progress.stage("upload"):
                image = self._fill(image)
            if not Published(image).incoming:
                # Another publisher has done all of it meanwhile.
                return self._bring_up_to_date(image)
            with self.progress.stage("compare"):
                self._compare(image)
            with self.progress.stage("show"):
                image = self._show(image)
        except BaseException:
            self._take_back()
            raise
        rate = self.file.size / self.seconds if self.seconds else 0.0
        return Done(Published(image), "finished" if resumed else "published", (), self.seconds, rate)

    # Looking for what is there.

    def look(self) -> CloudImage | None:
        """Return the image that is there already, whole or not.

        Raises:
            BakehouseError: the name or the tag is somebody else's.
        """
        same_tag = self.glance.list(**{OURS + "tag": self.record.tag}, owner=self.cloud.project)
        ours = [image for image in same_tag if self._is_ours(image)]
        for image in self.glance.list(name=self.metadata.name):
            known = image.id in {own.id for own in ours}
            if not known and image.properties.get(OURS + "sha512") != self.file.sha512:
                raise BakehouseError(
                    f"the name {image.name} is taken in {self.cloud.place} by the image {image.id} of project "
                    f"{image.owner}, which is another one",
                    hint="rename or delete it; Bakehouse does not touch what it did not make",
                )
        for image in ours:
            self._must_be_the_same(image)
        # Whole ones first: there is one only, but for what hands did.
        return min(ours, key=lambda image: (Published(image).incoming, image.created), default=None)

    def _must_be_the_same(self, image: CloudImage) -> None:
        there = image.properties.get(OURS + "sha512", "")
        if there in {file.sha512 for file in self.record.files if file != self.file}:
            raise BakehouseError(
                f"{self.record.tag} is in {self.cloud.place} already as {image.disk_format} (image {image.id}); a "
                "project takes one of its formats",
                hint=f"publish the {self.file.format} file to another project or cloud, or delete that image first",
            )
        if there != self.file.sha512:
            raise BakehouseError(
                f"{self.record.tag} is in {self.cloud.place} already with other content (image {image.id}): it was "
                "baked elsewhere from the same inputs",
                hint=f"bake anew for a new tag: `invoke bake --platform {self.record.name} --force`",
            )

    def _is_ours(self, image: CloudImage) -> bool:
        published = Published(image)
        return published.tag == self.record.tag and published.name == self.record.name

    # A new image.

    def _claim(self) -> CloudImage:
        """Create the image, or return it as another publisher created it a moment ago."""
        for attempt in range(MOST_CLAIMS):
            identity = image_id(self.cloud.project, self.record.name, self.record.tag, attempt)
            image = self.glance.get(identity) or self._create(identity) or self.glance.get(identity)
            # None: an image with this id has been deleted, and Glance gives it to nobody again.
            if image is not None and image.owner == self.cloud.project and image.status not in {"deleted", "killed"}:
                self._must_be_the_same(image)
                return image
        raise BakehouseError(
            f"{self.record.tag} has been published to {self.cloud.place} and deleted {MOST_CLAIMS} times",
            hint=f"bake anew for a new tag: `invoke bake --platform {self.record.name} --force`",
        )

    def _create(self, identity: str) -> CloudImage | None:
        # With the visibility that it shall have in the end, so that a cloud that does not allow it says so before the
        # upload. It is hidden, and without data nothing can be made of it. Before there is data it becomes private.
        fields = self.metadata.fields() | {
            "id": identity,
            "visibility": self.visibility,
            "os_hidden": True,
            STATE: INCOMING,
            UPLOADER: self.own,
        }
        self.begun = identity
        image = self.glance.create(fields)
        self.begun = identity if image else ""
        return image

    # Its data.

    def _fill(self, image: CloudImage) -> CloudImage:
        """Bring an image to ``active``: upload it, or wait for whoever does."""
        tries = 0
        while image.status != "active":
            if image.status == "queued" and self._may_be_anothers(image):
                # He may be about to send it: only where nothing comes of it do we.
                following = self._poll(image, ADOPT_SECONDS, lambda found: found.status == "queued")
                self.adopted = image.id
            elif image.status == "queued":
                tries += 1
                following = self._send(image, tries)
            elif image.status in {"saving", "uploading", "importing"}:
                following = self._await(image)
            elif image.status == "deactivated":
                raise BakehouseError(
                    f"an administrator of {self.cloud.place} has taken {image.name} ({image.id}) out of service",
                    hint="ask why; `openstack image set --activate` puts it back",
                )
            else:
                self.glance.delete(image)
                following = None
            # Gone: somebody took it away, or it was stuck and we did.
            image = following or self._claim()
        if Published(image).incoming and not self.begun and image.properties.get(UPLOADER) != self.own:
            # Whoever uploaded it is about to show it. If not, he has been killed, and we do.
            image = self._poll(image, SETTLE_SECONDS, lambda found: Published(found).incoming) or image
        return image

    def _may_be_anothers(self, image: CloudImage) -> bool:
        return image.properties.get(UPLOADER) != self.own and self.adopted != image.id

    def _send(self, image: CloudImage, tries: int) -> CloudImage | None:
        """Upload once. Return the image as it is then, None where it is gone.

        Raises:
            CloudError: it was refused for good, or the connection broke too often.
        """
        self.begun = image.id
        if image.properties.get(UPLOADER) != self.own or image.visibility != "private":
            image = self.glance.change(image, {UPLOADER: self.own, "visibility": "private"})
        self.meter.begin()
        try:
            self.glance.upload(image.id, upload.FileChunks(self.path, self.meter.tell))
            self.seconds = time.monotonic() - self.meter.started
        except CloudError as error:
            if error.status in CHANGED:
                # Another publisher was quicker by a moment: what comes of it is his.
                self.begun = ""
                found = self.glance.get(image.id)
                return self._wait_for_another(found) if found and found.status == "saving" else found
            if not is_passing(error):
                raise
            if error.status == HTTPStatus.GATEWAY_TIMEOUT and self.meter.sent == self.file.size:
                written = self._written(image)
                if written and written.status == "active":
                    return written
            self._pause(error, tries)
            found = self.glance.get(image.id)
            return self._settled(found) if found and found.status == "saving" else found
        return self.glance.get(image.id)

    def _written(self, image: CloudImage) -> CloudImage | None:
        """Wait for Glance, which has all of an upload and has not answered in time: its own store may be slow.

        Return the image as it is then, None where it is gone.
        """
        found = self.glance.get(image.id)
        if found and found.status == "saving":
            self.progress.note("all of it is sent, and no answer has come: waiting for Glance to write it")
            found = self._patiently(found)
        self.seconds = time.monotonic() - self.meter.started
        return found

    def _pause(self, error: CloudError, tries: int) -> None:
        if tries >= MOST_TRIES:
            raise CloudError(
                f"{error.message} (tried {tries} times)",
                hint=f"{error.hint}; Glance may also break off an upload where its store is full",
                status=error.status,
            ) from error
        self.progress.note(f"the upload broke off after {self.meter.sent >> 20} MiB, trying again: {error.message}")
        time.sleep(max(min(2.0**tries, 20.0), error.retry_after))

    def _settled(self, image: CloudImage) -> CloudImage | None:
        """Wait for Glance to see that an upload of this host has ended; delete what a killed Glance left stuck.

        Stuck is what has not changed in all that time: another upload that began meanwhile changes ``updated_at``.
        """
        found = self._poll(image, SETTLE_SECONDS)
        if found and _same(found, image):
            self.progress.note(f"image {image.id} is stuck in 'saving' (its Glance was killed): it is made anew")
            self.glance.delete(found)
            return None
        return found

    def _await(self, image: CloudImage) -> CloudImage | None:
        """Wait for another publisher's upload. Return the image as it is then, None where it is gone."""
        if image.properties.get(UPLOADER) == self.own:
            # We hold the lock: nobody on this host uploads it.
            return self._settled(image)
        return self._wait_for_another(image)

    def _wait_for_another(self, image: CloudImage) -> CloudImage | None:
        self.progress.note("another publisher is uploading it; waiting for that")
        return self._patiently(image)

    def _patiently(self, image: CloudImage) -> CloudImage | None:
        """Wait for as long as an upload may take since it began; delete what has not changed then."""
        age = (self.cloud.clock - image.updated).total_seconds()
        left = PATIENCE_SECONDS + self.file.size / SLOWEST - age
        found = self._poll(image, max(left, SETTLE_SECONDS))
        if found and _same(found, image):
            self.progress.note(f"image {image.id} has been '{image.status}' for too long: it is made anew")
            self.glance.delete(found)
            return None
        return found

    def _poll(
        self, image: CloudImage, seconds: float, same: Callable[[CloudImage], bool] | None = None
    ) -> CloudImage | None:
        """Return the image when it is no more the same, or as it is after so many seconds."""
        unchanged = same or (lambda found: _same(found, image))
        return tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda found: found is not None and unchanged(found)),
            wait=tenacity.wait_exponential(multiplier=0.25, max=POLL_SECONDS),
            stop=tenacity.stop_after_delay(seconds),
            retry_error_callback=lambda state: state.outcome.result() if state.outcome else image,
        )(lambda: self.glance.get(image.id))

    # Its end.

    def _compare(self, image: CloudImage) -> None:
        """Compare what Glance has got with the record.

        Raises:
            BakehouseError: it is something else. The image is removed, as far as the cloud lets us.
        """
        if image.size == self.file.size and image.hash_value == self._hash(image.hash_algorithm):
            return
        # Whoever sent it: it never becomes the image that it shall be, and all would find it so.
        self._remove(image)
        if file_digest(self.path, "sha512")["sha512"] == self.file.sha512:
            raise BakehouseError(
                f"{self.cloud.place} holds something else than what was sent of {self.record.tag}",
                hint="try again; if it stays so, tell the cloud's operator",
            )
        raise BakehouseError(
            f"{self.path} is not what was baked: its SHA-512 differs from the record's",
            hint=f"the disk may be failing; `invoke images.remove {self.record.tag}` and bake again",
        )

    def _hash(self, algorithm: str) -> str:
        recorded = {"sha512": self.file.sha512, "sha256": self.file.sha256}
        return recorded.get(algorithm) or file_digest(self.path, algorithm)[algorithm]

    def _show(self, image: CloudImage) -> CloudImage:
        """Make a compared image one that can be used: one step."""
        return self.glance.change(
            image,
            {
                **self.differences(image),
                STATE: PUBLISHED,
                UPLOADER: None,
                "os_hidden": False,
                "visibility": self.visibility,
            },
        )

    def _bring_up_to_date(self, image: CloudImage) -> Done:
        """Change what a published image says of itself, where that is not what it shall say."""
        with self.progress.stage("show"):
            changes = self.differences(image)
            if self.set_visibility and image.visibility != self.visibility:
                changes["visibility"] = self.visibility
            if not changes:
                self.progress.cached("show")
                return Done(Published(image), "unchanged", (), 0.0, 0.0)
            changed = self.glance.change(image, changes)
        told = tuple(sorted(changes))
        return Done(Published(changed), "updated", told, 0.0, 0.0)

    def differences(self, image: CloudImage) -> dict[str, object]:
        """Return what an image should say and does not. What others have added to it stays."""
        wanted, has = self.metadata, image.properties
        changes: dict[str, object] = {key: value for key, value in wanted.properties.items() if has.get(key) != value}
        changes |= {key: None for key in wanted.left_out if key in has}
        if {OURS + "record_sha256", OURS + "verified"} & changes.keys() and OURS + "signature" not in wanted.properties:
            # A signature covers them, and this site has no key to sign anew.
            changes |= {key: None for key in (OURS + "signature", OURS + "signature_key") if key in has}
        if (image.min_disk, image.min_ram) != (wanted.min_disk, wanted.min_ram):
            changes |= {"min_disk": wanted.min_disk, "min_ram": wanted.min_ram}
        if not set(wanted.tags) <= set(image.tags):
            changes["tags"] = sorted({*wanted.tags, *image.tags})
        return changes

    def _take_back(self) -> None:
        """Remove what this run began and did not bring to its end."""
        if not self.begun:
            return
        try:
            with self.cloud.hurried(5):
                image = self.glance.get(self.begun)
                # Deleted while Glance still saves, its half file would stay in Glance's store.
                if image and image.status == "saving":
                    image = self._poll(image, 5.0)
                if image and Published(image).incoming and image.properties.get(UPLOADER) == self.own:
                    self._remove(image)
        except CloudError as error:
            self._tell_what_stayed(self.begun, error)

    def _remove(self, image: CloudImage) -> None:
        """Delete an image that cannot be brought to its end, and say what became of that."""
        try:
            if self.glance.delete(image):
                self.progress.note("what was begun in the cloud has been removed")
        except CloudError as error:
            self._tell_what_stayed(image.id, error)

    def _tell_what_stayed(self, identity: str, error: CloudError) -> None:
        self.progress.note(
            f"image {identity} may have stayed behind in {self.cloud.place}: {error.message}; `openstack image delete "
            f"{identity}` removes it, the next `invoke publish {self.record.tag}` goes on with it"
        )


def _same(one: CloudImage, other: CloudImage) -> bool:
    """Say whether nothing has happened to an image between two looks, by what the cloud says."""
    return (one.status, one.updated) == (other.status, other.updated)


def remove_leftovers(catalogue: Catalogue, store: LocalStore, tag: str, say: Callable[[str], None]) -> list[Published]:
    """Remove incoming images of other tags than this one that a killed run left: of this host's store, or a day ago.

    An image whose publication is going on is left alone.

    Args:
        catalogue: what is in the cloud.
        store: this host's.
        tag: the one that is being published now.
        say: takes a line about each.
    """
    own, glance = uploader(store), Glance(catalogue.cloud)
    removed = []
    for found in catalogue.images:
        if found.tag == tag or not _is_leftover(found.image, own, catalogue.cloud):
            continue
        path = store.root / ".locks" / f"publish-{found.tag}.lock"
        with contextlib.suppress(BakehouseError), lock.held(path, "", wait=False, say=say):
            # Its publication may have come to its end before we had the lock.
            image = glance.get(found.id)
            if image and _is_leftover(image, own, catalogue.cloud) and glance.delete(image):
                say(f"removed the half-uploaded image {found.image.name} ({found.id}), which a killed run had left")
                removed.append(found)
    return removed


def _is_leftover(image: CloudImage, own: str, cloud: Cloud) -> bool:
    """Say whether nobody is at work on an incoming image: it is this host's store's, or has stood still for a day."""
    published = Published(image)
    # Whoever sends it may be taken for us.
    fresh = image.status == "saving" and (cloud.clock - image.updated).total_seconds() < SETTLE_SECONDS
    ours = image.properties.get(UPLOADER) == own and not fresh
    return published.incoming and (ours or published.abandoned(cloud.clock))
