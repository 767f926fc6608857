"""Publishing against a Glance in memory: what real ones do too seldom to wait for."""

from __future__ import annotations

import datetime
import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bakehouse import publish, upload
from bakehouse.cloud import CloudError
from bakehouse.errors import BakehouseError
from bakehouse.properties import Metadata, make
from bakehouse.published import INCOMING, PUBLISHED, STATE, UPLOADER, Catalogue
from bakehouse.record import Record
from bakehouse.store import LocalStore
from tests.fake_glance import FakeCloud
from tests.samples import add_image

TAG = "20260101-aaaaaaa"

# The old way to encrypt: unlike LUKS, it does not first measure the processor, which fails now and then on a busy one.
ENCRYPTED = "encrypt.format=aes,encrypt.key-secret=s"


class Publisher:
    """A host with a store and an image, and a cloud."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = LocalStore(folder / "store")
        self.cloud = FakeCloud()
        self.output = io.StringIO()
        self.record = add_image(self.store, TAG, size=1 << 20)

    def metadata(self, **options: Any) -> Metadata:
        return make(self.record, self.record.files[0], **options)

    def publish(self, store: LocalStore | None = None, **options: Any) -> publish.Done:
        console = Console(file=self.output, width=200)
        found = (store or self.store).get(TAG)
        metadata = options.pop("metadata", None) or self.metadata()
        return publish.publish(found, found.files[0], store or self.store, self.cloud, metadata, console, **options)

    @property
    def only(self) -> dict[str, Any]:
        (image,) = self.cloud.images.values()
        return image

    def is_whole(self) -> bool:
        image = self.only
        return (
            image["status"] == "active"
            and not image["os_hidden"]
            and image[STATE] == PUBLISHED
            and UPLOADER not in image
            and self.cloud.data[image["id"]] == self.store.image(self.record).read_bytes()
        )


@pytest.fixture
def publisher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publisher:
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    for name in ("SETTLE_SECONDS", "PATIENCE_SECONDS", "ADOPT_SECONDS"):
        monkeypatch.setattr(publish, name, 0.05)
    monkeypatch.setattr(publish, "SLOWEST", 1 << 40)
    return Publisher(tmp_path)


def test_an_image_is_published_in_six_requests_besides_the_looks(publisher: Publisher) -> None:
    done = publisher.publish()
    assert (done.outcome, publisher.is_whole()) == ("published", True)
    assert [line.split()[0] for line in publisher.cloud.asked if not line.startswith("GET")] == ["POST", "PUT", "PATCH"]


def test_it_is_hidden_until_its_end(publisher: Publisher) -> None:
    seen: list[tuple[bool, str]] = []
    publisher.cloud.on("PUT", lambda: seen.append((publisher.only["os_hidden"], publisher.only[STATE])))
    publisher.cloud.on("PATCH", lambda: seen.append((publisher.only["os_hidden"], publisher.only[STATE])))
    publisher.publish()
    assert seen == [(True, INCOMING), (True, INCOMING)]


def test_a_visibility_is_asked_for_before_the_upload_and_given_after_it(publisher: Publisher) -> None:
    seen: list[str] = []
    publisher.cloud.on("PUT", lambda: seen.append(publisher.only["visibility"]))
    publisher.publish(visibility="public")
    assert (seen, publisher.only["visibility"]) == (["private"], "public")


@pytest.mark.parametrize("visibility", ["private", "public"])
@pytest.mark.parametrize("method", ["POST", "PATCH"])
def test_an_answer_may_be_lost(publisher: Publisher, method: str, visibility: str) -> None:
    """The request arrived, is sent again, and is refused: the id is taken, the property is gone."""
    seen: list[str] = []

    def look() -> None:
        seen.append(publisher.only["visibility"])
        if method == "PATCH":
            publisher.cloud.lose_answer("PATCH")

    publisher.cloud.on("PUT", look)
    if method == "POST":
        publisher.cloud.lose_answer("POST")
    publisher.publish(visibility=visibility)
    assert publisher.is_whole()
    assert (seen, publisher.only["visibility"]) == (["private"], visibility)


def test_what_a_killed_run_left_public_is_private_before_it_has_data(publisher: Publisher) -> None:
    stuck(publisher, publish.uploader(publisher.store))
    publisher.only.update(status="queued", visibility="public")
    seen: list[str] = []
    publisher.cloud.on("PUT", lambda: seen.append(publisher.only["visibility"]))
    publisher.publish()
    assert seen == ["private"]


def test_the_id_is_the_same_for_all_who_publish_it() -> None:
    ids = [publish.image_id("p", "slurm", TAG, attempt) for attempt in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]
    assert publish.image_id("q", "slurm", TAG, 0) != ids[0]


def test_what_was_deleted_is_published_under_the_next_id(publisher: Publisher) -> None:
    first = publisher.publish().image.id
    publisher.cloud.images.clear()
    second = publisher.publish().image.id
    assert first != second
    assert publisher.is_whole()
    assert [entry.id for entry in publisher.store.get(TAG).published] == [second]


def test_all_clouds_that_have_it_are_noted(publisher: Publisher) -> None:
    """Two publications at once: the second read the record before the first wrote into it."""
    before = publisher.store.get(TAG)
    publisher.publish()
    publisher.cloud = FakeCloud("theirs")
    metadata, file = publisher.metadata(), before.files[0]
    publish.publish(before, file, publisher.store, publisher.cloud, metadata, Console(file=publisher.output))
    assert [entry.project for entry in publisher.store.get(TAG).published] == ["ours", "theirs"]


@pytest.mark.parametrize("status", [0, 500, 503])
def test_a_passing_failure_is_tried_again(publisher: Publisher, status: int) -> None:
    publisher.cloud.fail("PUT", status, times=2)
    publisher.publish()
    assert publisher.is_whole()
    assert publisher.output.getvalue().count("trying again") == 2


@pytest.mark.parametrize("comes", [True, False])
def test_an_answer_that_comes_late_is_waited_for(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch, comes: bool
) -> None:
    """All of it is sent, and what is behind Glance or before it takes longer than we wait for an answer."""
    monkeypatch.setattr(publish, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(publish, "PATIENCE_SECONDS", 30 if comes else 0.0)
    put, late = publisher.cloud._put, list[int]()

    def slow(image: dict[str, Any], data: Any) -> tuple[int, Any]:
        if late:
            return put(image, data)
        content = b"".join(data)
        image["status"] = "saving"

        def come() -> None:
            late.append(1)
            if comes and len(late) == 5:
                image["status"] = "queued"
                put(image, [content])
            else:
                publisher.cloud.on("GET", come)

        publisher.cloud.on("GET", come)
        raise CloudError("no answer in time", status=504)

    monkeypatch.setattr(publisher.cloud, "_put", slow)
    publisher.publish()
    assert publisher.is_whole()
    assert ("trying again" in publisher.output.getvalue()) != comes
    assert "waiting for Glance to write it" in publisher.output.getvalue()
    assert any(line.startswith("DELETE") for line in publisher.cloud.asked) != comes


def test_an_upload_that_always_breaks_is_given_up_and_leaves_nothing(publisher: Publisher) -> None:
    publisher.cloud.fail("PUT", 0, times=99)
    with pytest.raises(CloudError, match="tried 5 times") as caught:
        publisher.publish()
    assert "store is full" in caught.value.hint
    assert publisher.cloud.images == {}


@pytest.mark.parametrize(
    ("status", "hint"), [(403, "roles do not allow"), (413, "larger quota"), (415, "")], ids=["role", "quota", "format"]
)
def test_a_refusal_is_final_and_leaves_nothing(publisher: Publisher, status: int, hint: str) -> None:
    publisher.cloud.fail("PUT", status)
    with pytest.raises(CloudError, match=f"HTTP {status}") as caught:
        publisher.publish()
    assert hint in caught.value.hint
    assert publisher.cloud.images == {}
    assert publisher.store.get(TAG).published == []


def stop(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def test_ctrl_c_takes_back_what_was_begun(publisher: Publisher) -> None:
    publisher.cloud.on("PUT", stop(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        publisher.publish()
    assert publisher.cloud.images == {}


def test_another_publisher_who_creates_it_a_moment_before(publisher: Publisher) -> None:
    """Between our look and our creation; it then dies without a byte sent."""
    identity = publish.image_id("ours", "slurm", TAG, 0)
    theirs = {**publisher.metadata().fields(), "id": identity, "os_hidden": True, STATE: INCOMING, UPLOADER: "them"}
    publisher.cloud.on("POST", lambda: publisher.cloud._create(theirs) and None)
    publisher.publish()
    assert publisher.is_whole()


def test_another_publisher_who_sends_it_a_moment_before(publisher: Publisher) -> None:
    def other() -> None:
        publisher.cloud._put(publisher.only, [publisher.store.image(publisher.record).read_bytes()])

    publisher.cloud.on("PUT", other)
    publisher.publish()
    assert publisher.is_whole()


def test_an_upload_that_another_one_began_a_moment_before_is_never_deleted(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Glance says 409 and 'saving': it looks as what a killed Glance leaves of ours, and is not."""
    monkeypatch.setattr(publish, "PATIENCE_SECONDS", 30)
    monkeypatch.setattr(publish, "SETTLE_SECONDS", 0.0)
    looks = list[int]()

    def other_begins() -> None:
        publisher.only["status"] = "saving"
        for _ in range(8):
            publisher.cloud.on("GET", other_goes_on)

    def other_goes_on() -> None:
        looks.append(1)
        if len(looks) == 6:
            publisher.only["status"] = "queued"
            publisher.cloud._put(publisher.only, [publisher.store.image(publisher.record).read_bytes()])

    publisher.cloud.on("PUT", other_begins)
    publisher.publish()
    assert publisher.is_whole()
    assert not any(line.startswith("DELETE") for line in publisher.cloud.asked)


def test_other_content_that_appears_a_moment_before_is_told(publisher: Publisher) -> None:
    identity = publish.image_id("ours", "slurm", TAG, 0)
    theirs = {**publisher.metadata().fields(), "id": identity, "os_hidden": True, STATE: INCOMING, UPLOADER: "them",
              "bakehouse_sha512": "0" * 128}  # fmt: skip
    publisher.cloud.on("POST", lambda: publisher.cloud._create(theirs) and None)
    with pytest.raises(BakehouseError, match="already with other content"):
        publisher.publish()
    assert len(publisher.cloud.images) == 1, "it is not ours to remove"


def test_the_other_of_two_formats_is_told_from_other_content(publisher: Publisher) -> None:
    raw = publisher.record.files[0].model_copy(update={"format": "raw", "sha512": "a" * 128})
    publisher.store.amend(TAG, {"files": [*publisher.record.files, raw]})
    publisher.publish()
    publisher.only.update(bakehouse_sha512=raw.sha512, disk_format="raw")
    with pytest.raises(BakehouseError, match=r"already as raw .* a project takes one of its formats") as caught:
        publisher.publish()
    assert caught.value.hint == "publish the qcow2 file to another project or cloud, or delete that image first"


def stuck(publisher: Publisher, own: str) -> None:
    identity = publish.image_id("ours", "slurm", TAG, 0)
    fields = {**publisher.metadata().fields(), "id": identity, "os_hidden": True, STATE: INCOMING, UPLOADER: own}
    publisher.cloud._create(fields)
    publisher.only["status"] = "saving"


def test_what_a_killed_glance_left_is_made_anew_at_once_where_it_was_ours(publisher: Publisher) -> None:
    stuck(publisher, publish.uploader(publisher.store))
    publisher.publish()
    assert publisher.is_whole()
    assert "stuck" in publisher.output.getvalue()


def test_an_upload_that_began_a_moment_ago_is_not_what_a_killed_run_left(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sends it is taken for us, as a clone of this host may be: the cloud says that it lives."""
    monkeypatch.setattr(publish, "PATIENCE_SECONDS", 30)
    monkeypatch.setattr(publish, "SETTLE_SECONDS", 0.0)
    stuck(publisher, publish.uploader(publisher.store))
    looks = list[int]()

    def other_goes_on() -> None:
        looks.append(1)
        publisher.only["updated_at"] = f"2026-11-24T12:00:{min(len(looks), 5):02}Z"
        if len(looks) == 5:
            publisher.only["status"] = "queued"
            publisher.cloud._put(publisher.only, [publisher.store.image(publisher.record).read_bytes()])
            return
        publisher.cloud.on("GET", other_goes_on)

    for _ in range(2):
        publisher.cloud.on("GET", lambda: None)
    publisher.cloud.on("GET", other_goes_on)
    publisher.publish()
    assert publisher.is_whole()
    assert not any(line.startswith("DELETE") for line in publisher.cloud.asked)


@pytest.mark.parametrize("machine", ["", "uninitialized", "0123456789abcdef0123456789abcdef"])
def test_every_hosts_store_is_told_from_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str
) -> None:
    """Containers have an empty machine-id; stores are at the same place in all of them; hosts share and copy stores."""
    import shutil
    import socket

    boot = tmp_path / "boot_id"
    boot.write_text("host-1\n")
    (tmp_path / "machine-id").write_text(f"{machine}\n")
    monkeypatch.setattr(publish, "MACHINE_ID", tmp_path / "machine-id")
    monkeypatch.setattr(publish, "BOOT_ID", boot)
    monkeypatch.setattr(socket, "gethostname", lambda: "host-1")

    store = LocalStore(tmp_path / "store")
    own = publish.uploader(store)
    assert publish.uploader(LocalStore(tmp_path / "store")) == own, "the next run's is the same"
    shutil.copytree(store.root, tmp_path / "copy")
    found = {own, publish.uploader(LocalStore(tmp_path / "copy"))}
    store.root.rename(tmp_path / "other")
    found.add(publish.uploader(store))
    shutil.rmtree(store.root)
    (tmp_path / "other").rename(store.root)
    boot.write_text("host-2\n")
    monkeypatch.setattr(socket, "gethostname", lambda: "host-2")
    found.add(publish.uploader(store))
    assert len(found) == 4, "a copy, a store of another container at the same place, a store that two hosts share"


def test_another_hosts_upload_is_waited_for_and_then_taken_for_dead(publisher: Publisher) -> None:
    stuck(publisher, "them")
    publisher.publish()
    assert publisher.is_whole()
    assert "another publisher is uploading it" in publisher.output.getvalue()
    assert "too long" in publisher.output.getvalue()


def test_the_age_of_another_hosts_upload_counts(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for from our start, but from its own, by the cloud's clock."""
    monkeypatch.setattr(publish, "PATIENCE_SECONDS", 3600.0)
    stuck(publisher, "them")
    publisher.cloud.time += datetime.timedelta(hours=2)
    publisher.publish()
    assert publisher.is_whole()


def test_an_image_out_of_service_is_said_so(publisher: Publisher) -> None:
    stuck(publisher, "them")
    publisher.only["status"] = "deactivated"
    with pytest.raises(BakehouseError, match="out of service"):
        publisher.publish()
    assert len(publisher.cloud.images) == 1


def test_glance_that_stores_something_else_is_found_out(publisher: Publisher) -> None:
    def spoil() -> None:
        publisher.cloud.before.append(("GET", lambda: publisher.only.update(os_hash_value="0" * 128)))

    publisher.cloud.on("PUT", spoil)
    with pytest.raises(BakehouseError, match="holds something else than what was sent"):
        publisher.publish()
    assert publisher.cloud.images == {}


def test_wrong_content_that_another_host_left_is_removed(publisher: Publisher) -> None:
    stuck(publisher, "them")
    publisher.only["status"] = "queued"
    publisher.cloud._put(publisher.only, [b"wrong"])
    with pytest.raises(BakehouseError, match="holds something else than what was sent"):
        publisher.publish()
    assert publisher.cloud.images == {}
    publisher.publish()
    assert publisher.is_whole()


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_what_cannot_be_taken_back_is_named(publisher: Publisher, method: str) -> None:
    def refuse() -> None:
        publisher.cloud.fail(method, 403)
        raise publisher.cloud.refusal(415, "", "uploading")

    publisher.cloud.on("PUT", refuse)
    with pytest.raises(CloudError, match="HTTP 415"):
        publisher.publish()
    assert f"image {publisher.only['id']} may have stayed behind in here" in publisher.output.getvalue()
    assert f"openstack image delete {publisher.only['id']}" in publisher.output.getvalue()


def test_an_unusual_hash_is_computed(publisher: Publisher) -> None:
    def other_algorithm() -> None:
        import hashlib

        digest = hashlib.blake2b(publisher.store.image(publisher.record).read_bytes()).hexdigest()
        change = {"os_hash_algo": "blake2b", "os_hash_value": digest}
        publisher.cloud.before.append(("GET", lambda: publisher.only.update(change)))

    publisher.cloud.on("PUT", other_algorithm)
    publisher.publish()
    assert publisher.only[STATE] == PUBLISHED


def test_what_hands_added_stays(publisher: Publisher) -> None:
    publisher.publish()
    publisher.only.update(colour="red", bakehouse_channel_stable_1="{}", visibility="shared", name="renamed")
    done = publisher.publish(metadata=publisher.metadata(overrides=(("site", {"hw_disk_bus": "scsi"}),)))
    assert (done.outcome, done.changes) == ("updated", ("hw_disk_bus",))
    assert {publisher.only[key] for key in ("colour", "visibility", "name")} == {"red", "shared", "renamed"}
    assert publisher.publish(visibility="public", set_visibility=True).changes == ("hw_disk_bus", "visibility")


def test_a_replaced_image_stays_hidden(publisher: Publisher) -> None:
    publisher.publish()
    publisher.only["os_hidden"] = True
    assert publisher.publish().outcome == "unchanged"
    assert publisher.only["os_hidden"]


def test_leftovers_of_others_and_of_running_publications_stay(publisher: Publisher) -> None:
    own = publish.uploader(publisher.store)
    for number, (tag, who) in enumerate((("20260102-b", own), ("20260103-c", own), ("20260104-d", "them"), (TAG, own))):
        publisher.cloud._create({
            "id": str(number), "name": tag, "tags": ["bakehouse"], "bakehouse_tag": tag, STATE: INCOMING, UPLOADER: who,
            "bakehouse_name": "slurm",
        })  # fmt: skip
    said: list[str] = []
    busy = publisher.store.root / ".locks" / "publish-20260103-c.lock"
    from bakehouse import lock

    with lock.held(busy, "it", wait=False, say=said.append):
        removed = publish.remove_leftovers(Catalogue.read(publisher.cloud), publisher.store, TAG, said.append)
    assert [image.tag for image in removed] == ["20260102-b"]
    assert set(publisher.cloud.images) == {"1", "2", "3"}


def test_leftovers_of_other_hosts_go_after_a_day(publisher: Publisher) -> None:
    for number, hours in enumerate((0, 2)):
        publisher.cloud.time += datetime.timedelta(hours=hours)
        publisher.cloud._create({
            "id": str(number), "name": "x", "tags": ["bakehouse"], "bakehouse_tag": f"2026010{number}-b",
            "bakehouse_name": "slurm", STATE: INCOMING, UPLOADER: "them", "status": "saving",
        })  # fmt: skip
    publisher.cloud.time += datetime.timedelta(hours=23)
    removed = publish.remove_leftovers(Catalogue.read(publisher.cloud), publisher.store, TAG, print)
    assert [image.id for image in removed] == ["0"]


def test_what_came_to_its_end_meanwhile_is_no_leftover(publisher: Publisher) -> None:
    own = publish.uploader(publisher.store)
    publisher.cloud._create({
        "id": "0", "name": "x", "tags": ["bakehouse"], "bakehouse_tag": "20260102-b", "bakehouse_name": "slurm",
        STATE: INCOMING, UPLOADER: own,
    })  # fmt: skip
    before = Catalogue.read(publisher.cloud)
    publisher.only[STATE] = PUBLISHED
    assert publish.remove_leftovers(before, publisher.store, TAG, print) == []
    publisher.only.update({STATE: INCOMING, "status": "saving"})
    assert publish.remove_leftovers(Catalogue.read(publisher.cloud), publisher.store, TAG, print) == []
    assert publisher.only, "it has just begun"


# The file.


def test_a_files_pieces_begin_anew_each_time(publisher: Publisher) -> None:
    path, told = publisher.store.image(publisher.record), list[int]()
    chunks = upload.FileChunks(path, told.append)
    for _ in range(2):
        assert b"".join(chunks) == path.read_bytes()
    assert len(chunks) == path.stat().st_size == told[-1]


def test_a_file_that_cannot_be_read_is_no_fault_of_the_network(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    path, real = publisher.store.image(publisher.record), Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *a, **k: Failing() if self == path and "buffering" in k else real(self, *a, **k)
    )
    with pytest.raises(BakehouseError, match="cannot be read: Input/output error") as caught:
        publisher.publish()
    assert "dmesg" in caught.value.hint
    assert [line.split()[0] for line in publisher.cloud.asked].count("PUT") == 1
    assert publisher.cloud.images == {}


def test_a_check_that_hangs_is_ended(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = publisher.folder / "bin" / "qemu-img"
    hangs.parent.mkdir()
    hangs.write_text("#!/bin/sh\nexec sleep 1000\n")
    hangs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{hangs.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(upload, "CHECK_SECONDS", 0.05)
    with pytest.raises(BakehouseError, match="qemu-img says nothing"):
        publisher.publish()


def test_a_meter_says_how_far_how_fast_and_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    shown, said = list[str](), list[str]()
    meter = upload.Meter(100 << 20, shown.append, said.append)
    for second in range(1, 21):
        now[0] += 1
        meter.tell(second << 20)
    assert shown[9] == "10 of 100 MiB (10%), 1.0 MiB/s, 90 s left"
    assert len(said) == 2


@pytest.mark.parametrize(
    ("make_bad", "said"),
    [
        (["create", "-f", "qcow2", "-o", "data_file=d.raw,data_file_raw=on", "IMAGE", "1M"], "its data in another"),
        (["create", "-f", "qcow2", "IMAGE", "2M"], "the guest would see 2097152 bytes, its record says 1048576"),
        (["create", "-f", "raw", "IMAGE", "1M"], "is not a qcow2 file"),
        (["create", "-f", "qcow2", "--object", "secret,id=s,data=x", "-o", ENCRYPTED,
          "IMAGE", "1M"], "is encrypted"),
    ],
    ids=["data file", "size", "format", "encrypted"],
)  # fmt: skip
def test_a_file_that_is_not_fit_is_refused(publisher: Publisher, make_bad: list[str], said: str) -> None:
    import subprocess

    path = publisher.store.image(publisher.record)
    path.unlink()
    words = [str(path) if word == "IMAGE" else word for word in make_bad]
    subprocess.run(["qemu-img", *words], check=True, capture_output=True, cwd=publisher.folder)
    with pytest.raises(BakehouseError, match=said):
        upload.check(path, publisher.record.files[0])


def test_a_qcow2_that_is_declared_raw_is_refused(publisher: Publisher) -> None:
    path = publisher.store.image(publisher.record)
    size = path.stat().st_size
    declared = publisher.record.files[0].model_copy(update={"format": "raw", "virtual_size": -(-size // 512) * 512})
    with pytest.raises(BakehouseError, match="is a qcow2 file, not a raw one"):
        upload.check(path, declared)


def test_the_record_of_an_image_is_what_decides(publisher: Publisher) -> None:
    assert isinstance(publisher.store.get(TAG), Record)
    assert publisher.publish().image.says("sha512") == publisher.record.files[0].sha512
