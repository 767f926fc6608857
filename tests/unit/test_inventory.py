"""What store and cloud hold of each other's images."""

from __future__ import annotations

import datetime
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bakehouse import channel, inventory
from bakehouse.cloud import CloudError
from bakehouse.glance import CloudImage, Glance
from bakehouse.inventory import Finding
from bakehouse.published import Catalogue
from bakehouse.record import FILE_NAME, Publication
from bakehouse.store import LocalStore
from tests.fake_glance import FakeCloud
from tests.unit.test_channel import TAGS, cloud_with
from tests.unit.test_store import record


def findings(store: LocalStore, cloud: FakeCloud) -> dict[str, Finding]:
    return {finding.state: finding for finding in inventory.compare(store, Catalogue.read(cloud))}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def add(store: LocalStore, tag: str, sha512: str = "", published: str = "") -> None:
    made = record(tag)
    files = [file.model_copy(update={"sha512": sha512}) for file in made.files]
    where = Publication.model_validate({
        "cloud": "here", "region": "", "project": "ours", "id": published, "name": "n", "format": "qcow2",
        "at": "2026-01-01T00:00:00Z",
    })  # fmt: skip
    with store.adding("slurm", tag) as folder:
        changed = made.model_copy(update={"files": files, "published": [where] if published else []})
        (folder / FILE_NAME).write_text(changed.model_dump_json())


def test_the_same_on_both_sides_is_nothing(store: LocalStore) -> None:
    add(store, TAGS[0])
    assert findings(store, cloud_with(TAGS[0])) == {}


def test_every_difference_is_told(store: LocalStore) -> None:
    add(store, TAGS[0])
    add(store, TAGS[1], published="x")
    add(store, TAGS[2], sha512="a" * 128)
    add(store, TAGS[3])
    cloud = cloud_with(TAGS[2], TAGS[3], TAGS[4])
    cloud.images[f"slurm-{TAGS[3]}"]["bakehouse_state"] = "incoming"
    found = findings(store, cloud)
    assert {state: (one.tag, one.fault) for state, one in found.items()} == {
        "store only": (TAGS[0], False),
        "lost": (TAGS[1], False),
        "differs": (TAGS[2], True),
        "unfinished": (TAGS[3], True),
        "cloud only": (TAGS[4], False),
    }


def test_a_channel_that_points_to_a_deleted_image_is_told(store: LocalStore) -> None:
    cloud = cloud_with(*TAGS[:2])
    for tag in TAGS[:2]:
        channel.promote(cloud, "", tag, "stable")
    del cloud.images[f"slurm-{TAGS[1]}"]
    found = findings(store, cloud)["lost"]
    assert (found.tag, found.fault) == (TAGS[1], True)
    assert "the channel stable points to it" in found.detail


def test_an_upload_that_goes_on_is_no_fault(store: LocalStore) -> None:
    cloud = cloud_with(TAGS[0])
    cloud.images[f"slurm-{TAGS[0]}"].update(bakehouse_state="incoming", status="saving")
    assert not findings(store, cloud)["uploading"].fault
    cloud.time += datetime.timedelta(days=2)
    assert findings(store, cloud)["unfinished"].fault


@pytest.mark.parametrize("breaks", [2, 3])
def test_a_download_that_breaks_off_is_begun_again(monkeypatch: pytest.MonkeyPatch, breaks: int) -> None:
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    cloud = cloud_with(TAGS[0])
    data, left = b"abc" * 1000, [breaks]
    digest = hashlib.sha512(data).hexdigest()
    cloud.images[f"slurm-{TAGS[0]}"].update(bakehouse_sha512=digest, os_hash_algo="sha512", os_hash_value=digest)

    class Breaking(Glance):
        def download(self, image: CloudImage) -> Iterator[bytes]:
            yield data[:100]
            if left[0]:
                left[0] -= 1
                raise CloudError("the connection broke")
            yield data[100:]

    (image,) = Catalogue.read(cloud).images
    if breaks < inventory.MOST_TRIES:
        assert inventory.verify(image, None, Breaking(cloud), lambda _count: None)
        return
    with pytest.raises(CloudError, match="the connection broke"):
        inventory.verify(image, None, Breaking(cloud), lambda _count: None)


def test_two_of_one_tag_are_told(store: LocalStore) -> None:
    cloud = cloud_with(TAGS[0])
    twin = {**cloud.images[f"slurm-{TAGS[0]}"], "id": "twin"}
    cloud.images["twin"] = twin
    add(store, TAGS[0])
    assert findings(store, cloud)["doubled"].fault
