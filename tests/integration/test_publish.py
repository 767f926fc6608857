"""Publishing to a real Glance behind a real Keystone, in good times and bad."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bakehouse import REPOSITORY, channel, waiting
from bakehouse.glance import Glance
from bakehouse.local_cloud import LocalCloud
from bakehouse.properties import KNOWN
from bakehouse.published import PUBLISHED, Catalogue, Published
from bakehouse.record import Record
from bakehouse.settings import Settings
from bakehouse.store import LocalStore
from tests.integration.shop import Done, Shop, end
from tests.samples import MIB, add_image

pytestmark = pytest.mark.slow

TAG = "20260101-aaaaaaa"
OTHER = "20260102-bbbbbbb"
THIRD = "20260103-ccccccc"

DIES = REPOSITORY / "tests" / "integration" / "publish_and_die.py"


@pytest.fixture
def shop(tmp_path: Path, local: LocalCloud, request: pytest.FixtureRequest) -> Iterator[Shop]:
    """A store, and a project that nobody else has."""
    name = f"p{abs(hash(request.node.name)) % 10**8}-{time.monotonic_ns() % 10**6}"
    made = Shop(tmp_path, local, local.add_member(f"u-{name}", f"p-{name}"))
    made.configure()
    made.add_cloud("here", local.entry(made.member))
    made.add_cloud("admin", local.admin_entry())
    yield made
    made.empty()


def dying(shop: Shop, point: str, tag: str = TAG) -> subprocess.Popen[str]:
    return subprocess.Popen(
        # Whoever runs the tests may ignore Ctrl-C, as a shell's background jobs do.
        ["env", "--default-signal=INT", sys.executable, DIES, point, tag], cwd=shop.folder, text=True,
        env=shop.environment | {"PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@contextlib.contextmanager
def half_way(shop: Shop, tag: str = TAG) -> Iterator[subprocess.Popen[str]]:
    """Publish, and let something happen when half is sent."""
    sign = shop.folder / "half-way"
    process = dying(shop, "wait", tag)

    def ended() -> None:
        assert process.poll() is None, process.communicate()

    try:
        waiting.until("half of an upload", sign.exists, 30, poll=0.02, check=ended)
        yield process
    finally:
        sign.unlink(missing_ok=True)


def whole(shop: Shop, record: Record) -> Published:
    """Return the one image of the project, which is as it should be."""
    image = shop.only_image()
    assert (image.status, image.hidden, image.size) == ("active", False, record.files[0].size)
    assert image.hash_value == record.files[0].sha512
    published = Published(image)
    assert published.says("state") == PUBLISHED
    assert published.usable
    assert not published.says("uploader")
    return published


# In good times.


def test_a_baked_image_comes_to_glance_with_all_that_is_known_of_it(
    shop: Shop, baked: Record, real_settings: Settings
) -> None:
    shop.configure(store=str(real_settings.store), cache=str(real_settings.cache))
    store = LocalStore(real_settings.store)
    there = {record.tag for record in store.records()}
    done = shop.good("bake", "--platform", "slurm", "--no-verify", "--upload", "--json")
    assert done.json["tag"] in there, "nothing has changed: it is only uploaded"
    # Another test may have baked the same again since: then that one is the newest, under a tag of its own.
    record = store.get(done.json["tag"])
    image = whole(shop, record).image
    properties = image.properties
    assert (image.name, image.disk_format, image.visibility) == (f"slurm-{record.tag}", "qcow2", "private")
    assert image.min_disk * (1 << 30) >= record.files[0].virtual_size
    assert set(image.tags) == {"bakehouse", "slurm", "os:debian"}
    # SCS-0102, mandatory and recommended.
    for name in (
        "architecture", "os_version", "os_distro", "hw_disk_bus", "hw_scsi_model", "hw_rng_model", "hw_firmware_type",
        "hw_vif_multiqueue_enabled", "image_build_date", "image_original_user", "image_source", "image_description",
        "replace_frequency", "uuid_validity", "provided_until",
    ):  # fmt: skip
        assert properties[name], name
    assert properties["os_admin_user"] == "debian"
    assert "hw_qemu_guest_agent" not in properties, "it is not in the image"
    assert properties["bakehouse_slurm_version"] == record.versions["slurm"]
    assert properties["bakehouse_kernel_version"] == record.kernel
    assert properties["bakehouse_digest"] == record.digest
    assert properties["bakehouse_sbom_sha256"] == record.sbom_sha256
    assert done.json["outcome"] == "published"
    (entry,) = record.published
    assert (entry.cloud, entry.id, entry.format) == ("here", image.id, "qcow2")
    shop.good("images.verify", record.tag)


def test_publishing_twice_does_nothing(shop: Shop) -> None:
    record = add_image(shop.store, TAG)
    shop.good("publish", TAG)
    before = whole(shop, record).image
    done = shop.good("publish", TAG, "--json")
    assert done.json["outcome"] == "unchanged"
    assert shop.only_image() == before, "not even the time of its last change"


def test_what_is_known_later_is_added(shop: Shop) -> None:
    record = add_image(shop.store, TAG, verified=None)
    shop.good("publish", TAG)
    assert whole(shop, record).verified == "none"
    again = add_image(LocalStore(shop.folder / "elsewhere"), OTHER)
    shop.store.amend(TAG, {"verification": again.verification})
    shop.configure(image_properties={"hw_disk_bus": "scsi", "hw_rng_model": None, "os_require_quiesce": True})
    refused = shop.run("publish", TAG)
    assert "os_require_quiesce: 'true' is not one of its values" in refused.err
    shop.configure(image_properties={"hw_disk_bus": "scsi", "hw_rng_model": None})
    done = shop.good("publish", TAG, "--json")
    assert done.json["outcome"] == "updated"
    published = whole(shop, record)
    assert published.verified == "passed"
    assert published.image.properties["hw_disk_bus"] == "scsi"
    assert "hw_rng_model" not in published.image.properties


def test_a_dry_run_changes_nothing(shop: Shop) -> None:
    add_image(shop.store, TAG)
    done = shop.good("publish", TAG, "--dry-run")
    assert "would upload" in done.out
    assert shop.images() == []


NOVA_TAKES_MORE = {"hw_cpu_policy": {"mixed"}, "img_hide_hypervisor_id": {"true", "false"}}
"""Values that Nova takes (nova/objects/fields.py and image_meta.py) and Glance does not list."""


def test_what_we_lay_down_for_properties_is_what_glance_knows(local: LocalCloud) -> None:
    """Against the metadata definitions that Glance itself ships; all but those of VMware, which is no place for us."""
    folder = local.environment / "etc" / "glance" / "metadefs"
    known: dict[str, set[str]] = {}
    for path in folder.glob("*.json"):
        if "vmware" in path.name:
            continue
        data = json.loads(path.read_text())
        places = data.get("resource_type_associations", [])
        prefixes = [place.get("prefix", "") for place in places if place["name"] == "OS::Glance::Image"]
        for part in [data, *data.get("objects", [])]:
            for name, spec in part.get("properties", {}).items():
                for prefix in prefixes if "enum" in spec else []:
                    known.setdefault(prefix + name, set()).update(spec["enum"])
    checked = KNOWN.keys() & known.keys()
    assert len(checked) > 15
    for name in sorted(checked):
        ours = set(KNOWN[name].replace("\\", "").split("|"))
        assert ours == known[name] | NOVA_TAKES_MORE.get(name, set()), name


# Killed clients.


@pytest.mark.parametrize("point", ["created", "half", "sent", "compared", "shown"])
def test_a_killed_publication_is_finished_by_the_next_run(shop: Shop, point: str) -> None:
    record = add_image(shop.store, TAG)
    assert end(dying(shop, point)).status == -signal.SIGKILL
    waiting.until("Glance's notice of it", lambda: shop.only_image().status != "saving", 10)
    left = shop.only_image()
    if point != "shown":
        assert left.hidden, "nobody sees it"
        assert "unfinished" in shop.run("publish.check").out
        assert shop.run("resolve", "--platform", "slurm", "--tag", TAG).status == 1
    shop.good("publish", TAG)
    published = whole(shop, record)
    assert published.id == left.id, "finished, not made anew"
    shop.good("publish.check")


def test_what_a_killed_publication_of_another_image_left_is_removed(shop: Shop) -> None:
    add_image(shop.store, TAG)
    record = add_image(shop.store, OTHER)
    assert end(dying(shop, "created")).status == -signal.SIGKILL
    assert "half-uploaded" in shop.good("publish", OTHER).out
    assert whole(shop, record).tag == OTHER


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_publication_that_is_stopped_leaves_nothing(shop: Shop, how: signal.Signals) -> None:
    add_image(shop.store, TAG)
    with half_way(shop) as process:
        process.send_signal(how)
    assert end(process).status != 0
    assert shop.images() == []
    assert [*shop.local.filestore.iterdir()] == []


# Failing services.


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_glance_that_goes_away_in_mid_upload_is_waited_for(shop: Shop, how: signal.Signals) -> None:
    record = add_image(shop.store, TAG, size=24 * MIB)
    with half_way(shop) as process:
        shop.local.stop("glance", how)
    time.sleep(1)
    shop.local.start("glance")
    done = end(process)
    assert done.status == 0, done.out + done.err
    assert "trying again" in done.out
    whole(shop, record)
    remove_halves(shop)


def remove_halves(shop: Shop) -> None:
    """Remove what a killed Glance had written: it does not know of it any more, and no client can reach it."""
    for left in shop.local.filestore.iterdir():
        if left.name != shop.only_image().id:
            left.unlink()


def test_a_glance_that_is_killed_together_with_its_client(shop: Shop) -> None:
    """The image is stuck in 'saving' for good: only the next run can tell, since it holds the lock."""
    record = add_image(shop.store, TAG)
    with half_way(shop) as process:
        shop.local.stop("glance", signal.SIGKILL)
        process.kill()
    end(process)
    shop.local.start("glance")
    assert shop.only_image().status == "saving"
    done = shop.good("publish", TAG)
    assert "stuck" in done.out
    assert whole(shop, record)
    remove_halves(shop)


def test_a_service_that_stays_away_is_one_sentence(shop: Shop) -> None:
    add_image(shop.store, TAG)
    (shop.folder / "sitecustomize.py").write_text("from bakehouse import cloud\ncloud.RETRY_SECONDS = 1.0\n")
    shop.local.stop("keystone")
    try:
        done = shop.run("publish", TAG, PYTHONPATH=f"{REPOSITORY}:{shop.folder}")
    finally:
        shop.local.start("keystone")
    assert done.status == 1
    assert "error: here cannot be reached: connecting" in done.err
    assert "hint:" in done.err
    assert "Traceback" not in done.err


def test_a_keystone_that_is_away_for_a_moment_is_waited_for(shop: Shop) -> None:
    record = add_image(shop.store, TAG)
    shop.local.stop("keystone")
    try:
        process = shop.start("publish", TAG)
        assert process.stderr is not None
        assert "trying again" in process.stderr.readline()
    finally:
        shop.local.start("keystone")
    done = end(process)
    assert done.status == 0, done.err
    whole(shop, record)


@contextlib.contextmanager
def configured(local: LocalCloud, service: str, text: str) -> Iterator[None]:
    """Run a service with more configuration for a while."""
    assert service in {"keystone", "glance"}
    name = "keystone.conf" if service == "keystone" else "glance-api.conf"
    path = local.folder / name
    before = path.read_text()
    try:
        path.write_text(before + text)
        local.stop(service)  # type: ignore[arg-type]
        local.start(service)  # type: ignore[arg-type]
        yield
    finally:
        path.write_text(before)
        local.stop(service)  # type: ignore[arg-type]
        local.start(service)  # type: ignore[arg-type]


def test_a_token_that_expires_is_renewed(shop: Shop) -> None:
    """Once while the upload runs, once between the upload and what comes after."""
    record = add_image(shop.store, TAG)
    with configured(shop.local, "keystone", "[token]\nexpiration = 4\nallow_expired_window = 0\n"):
        with half_way(shop) as process:
            time.sleep(6)
        done = end(process)
    assert done.status == 0, done.out + done.err
    whole(shop, record)


def test_a_token_that_is_revoked_before_the_upload_is_renewed(shop: Shop) -> None:
    record = add_image(shop.store, TAG)
    with shop.connect() as cloud:
        token = cloud.connection.auth_token
        admin = shop.local.admin()
        try:
            admin.identity.delete("/auth/tokens", headers={"X-Subject-Token": token})
        finally:
            admin.close()
        assert Glance(cloud).list() == [], "asked with a new one"
        assert cloud.connection.auth_token != token
    shop.good("publish", TAG)
    whole(shop, record)


@pytest.mark.skipif(os.geteuid() != 0, reason="a full filesystem is mounted")
def test_a_full_store_is_said_so_and_leaves_nothing(shop: Shop) -> None:
    add_image(shop.store, TAG, size=24 * MIB)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", shop.local.filestore], check=True)
    try:
        done = shop.run("publish", TAG)
    finally:
        subprocess.run(["umount", shop.local.filestore], check=True)
    assert done.status == 1, done.out
    assert "store is full" in done.err
    assert "Traceback" not in done.err
    assert shop.images() == []


def test_a_quota_is_said_so_and_leaves_nothing(shop: Shop) -> None:
    add_image(shop.store, TAG)
    with configured(shop.local, "glance", "[DEFAULT]\nuser_storage_quota = 4MB\n"):
        done = shop.run("publish", TAG)
    assert done.status == 1, done.out
    assert "quota" in done.err
    assert "invoke prune" in done.err
    assert shop.images() == []


# Refused before or after.


def test_a_file_that_needs_another_is_refused_before_the_upload(shop: Shop) -> None:
    record = add_image(shop.store, TAG)
    image = shop.store.image(record)
    base = shop.folder / "base.qcow2"
    shutil.copy(image, base)
    make = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(base), str(image)]
    subprocess.run(make, check=True)
    file = record.files[0].model_copy(update={"size": image.stat().st_size})
    shop.store.amend(TAG, {"files": [file]})
    done = shop.run("publish", TAG)
    assert done.status == 1
    assert f"it has a backing file, {base}" in done.err
    assert shop.images() == []


def test_a_file_that_was_altered_is_not_published(shop: Shop) -> None:
    record = add_image(shop.store, TAG)
    image = shop.store.image(record)
    with image.open("r+b") as file:
        file.seek(image.stat().st_size - 100_000)
        file.write(b"altered")
    done = shop.run("publish", TAG)
    assert done.status == 1
    assert "is not what was baked" in done.err
    assert shop.images() == []


def test_a_wrong_credential_is_one_sentence(shop: Shop) -> None:
    add_image(shop.store, TAG)
    entry = shop.local.entry(shop.member)
    shop.add_cloud("wrong", {**entry, "auth": {**shop.member.credential, "application_credential_secret": "guess"}})
    done = shop.run("publish", TAG, "--cloud", "wrong")
    assert done.status == 1
    assert done.err.splitlines()[0].startswith("error: wrong refuses the credential")
    assert "clouds.yaml" in done.err
    assert "guess" not in done.err + done.out


def test_a_cloud_that_is_not_there_is_named(shop: Shop) -> None:
    done = shop.run("images", "--cloud", "hree")
    assert "there is no cloud 'hree' in clouds.yaml (did you mean 'here'?)" in done.err


def test_a_name_that_is_taken_is_left_alone(shop: Shop) -> None:
    add_image(shop.store, TAG)
    with shop.connect() as cloud:
        foreign = Glance(cloud).create({"name": f"slurm-{TAG}", "disk_format": "raw", "container_format": "bare"})
        assert foreign is not None
    done = shop.run("publish", TAG)
    assert done.status == 1
    assert f"the name slurm-{TAG} is taken" in done.err
    assert foreign.id in done.err
    assert [image.id for image in shop.images()] == [foreign.id]


def test_the_same_tag_with_other_content_is_refused(shop: Shop) -> None:
    record = add_image(shop.store, TAG)
    shop.good("publish", TAG)
    shop.store.remove(record)
    add_image(shop.store, TAG)
    done = shop.run("publish", TAG)
    assert done.status == 1
    assert "already with other content" in done.err
    whole(shop, record)


def test_what_a_role_does_not_allow_is_one_sentence(shop: Shop) -> None:
    add_image(shop.store, TAG)
    done = shop.run("publish", TAG, "--visibility", "public")
    assert done.status == 1
    assert "HTTP 403" in done.err
    assert "administrator" in done.err
    assert shop.images() == [], "said before the upload, and nothing is left"
    reader = shop.local.add_member(f"reader-{shop.member.user}", shop.member.project, "reader")
    shop.add_cloud("reader", shop.local.entry(reader))
    done = shop.run("publish", TAG, "--cloud", "reader")
    assert done.status == 1
    assert "HTTP 403" in done.err


def test_an_administrator_publishes_for_all(shop: Shop) -> None:
    add_image(shop.store, TAG)
    done = shop.good("publish", TAG, "--cloud", "admin", "--visibility", "public", "--json")
    with shop.connect("admin") as cloud:
        image = Glance(cloud).get(done.json["id"])
        assert image is not None
        assert image.visibility == "public"
        owner = cloud.project
    # Another project names whose images it trusts.
    assert shop.run("resolve", "--platform", "slurm", "--tag", TAG).status == 1
    shop.configure(image_owner=owner)
    assert shop.good("resolve", "--platform", "slurm", "--tag", TAG).out.strip() == image.id
    with shop.connect("admin") as cloud:
        Glance(cloud).delete(image)


# Several at once.


def test_two_publishers_at_once_make_one_image(shop: Shop) -> None:
    record = add_image(shop.store, TAG, size=24 * MIB)
    shutil.copytree(shop.store.root, shop.folder / "other-host")
    stores = [shop.store.root, shop.folder / "other-host"] * 2
    processes = [shop.start("publish", TAG, "--json", BAKEHOUSE_STORE=str(store)) for store in stores]
    done = [end(process) for process in processes]
    assert [one.status for one in done] == [0] * len(done), [one.err for one in done]
    assert {one.json["id"] for one in done} == {whole(shop, record).id}


def test_a_publisher_waits_for_another_host(shop: Shop) -> None:
    record = add_image(shop.store, TAG, size=24 * MIB)
    shutil.copytree(shop.store.root, shop.folder / "other-host")
    with half_way(shop) as first:
        second = shop.start("publish", TAG, BAKEHOUSE_STORE=str(shop.folder / "other-host"))
        time.sleep(3)
        assert second.poll() is None
    done = [end(first), end(second)]
    assert [one.status for one in done] == [0, 0], [one.err for one in done]
    assert "another publisher is uploading it" in done[1].out
    whole(shop, record)


# Channels.


def publish_three(shop: Shop) -> None:
    for number, tag in enumerate((TAG, OTHER, THIRD), 1):
        add_image(shop.store, tag, size=MIB, created=f"2026-01-0{number}T12:00:00Z")
        shop.good("publish", tag)


def resolved(shop: Shop, channel_name: str = "stable") -> str:
    done = shop.good("resolve", "--platform", "slurm", "--channel", channel_name, "--format", "json")
    return str(done.json["tag"])


def test_a_channel_moves_hides_and_goes_back(shop: Shop) -> None:
    publish_three(shop)
    shop.good("promote", TAG, "--to", "stable")
    assert resolved(shop) == TAG
    before = {Published(image).tag: image for image in shop.images()}
    assert "would move" in shop.good("promote", OTHER, "--to", "stable", "--dry-run").out
    assert {Published(image).tag: image for image in shop.images()} == before
    shop.good("promote", OTHER, "--to", "stable")
    shop.good("promote", OTHER, "--to", "candidate")
    shop.good("promote", THIRD, "--to", "stable")
    hidden = {Published(image).tag: image.hidden for image in shop.images()}
    assert hidden == {TAG: True, OTHER: False, THIRD: False}, "what another channel points to is not hidden"
    assert {image.id for image in shop.images()} == {image.id for image in before.values()}, "servers keep their id"
    assert resolved(shop) == THIRD
    assert resolved(shop, "candidate") == OTHER
    shop.good("rollback", "--platform", "slurm", "--channel", "stable")
    assert resolved(shop) == OTHER
    shop.good("rollback", "--platform", "slurm", "--channel", "stable")
    assert resolved(shop) == TAG
    assert {Published(image).tag: image.hidden for image in shop.images()} == {TAG: False, OTHER: False, THIRD: True}
    done = shop.run("rollback", "--platform", "slurm", "--channel", "stable")
    assert "has no image before" in done.err
    (stable,) = [one for one in shop.good("channels", "--json").json if one["channel"] == "stable"]
    kinds = [(move["kind"], move["tag"], move["before"]) for move in stable["moves"]]
    assert kinds == [
        ("promote", TAG, ""), ("promote", OTHER, TAG), ("promote", THIRD, OTHER),
        ("rollback", OTHER, THIRD), ("rollback", TAG, OTHER),
    ]  # fmt: skip


def test_an_image_that_is_not_verified_is_promoted_by_force_only(shop: Shop) -> None:
    add_image(shop.store, TAG, verified="failed")
    shop.good("publish", TAG)
    done = shop.run("promote", TAG, "--to", "stable")
    assert done.status == 1
    assert "failed its verification" in done.err
    shop.good("promote", TAG, "--to", "stable", "--force")
    (history,) = shop.good("channels", "--json").json
    assert history["moves"][0]["forced"] is True


def test_a_channel_never_points_nowhere_and_two_moves_at_once_are_two_moves(shop: Shop) -> None:
    publish_three(shop)
    shop.good("promote", TAG, "--to", "stable")
    seen: list[str] = []
    over = threading.Event()

    def watch() -> None:
        with shop.connect() as cloud:
            while not over.is_set():
                seen.append(channel.current(Catalogue.read(cloud), "slurm", "stable").tag)

    with ThreadPoolExecutor() as pool:
        watcher = pool.submit(watch)
        waiting.until("a look", lambda: len(seen) > 0 or watcher.done(), 20, poll=0.05)
        processes = [shop.start("promote", tag, "--to", "stable", "--json") for tag in (OTHER, THIRD)]
        done = [end(process) for process in processes]
        over.set()
        watcher.result()
    assert [one.status for one in done] == [0, 0], [one.err for one in done]
    assert len(seen) > 2
    assert set(seen) <= {TAG, OTHER, THIRD}
    past = channel.history(shop.catalogue(), "slurm", "stable")
    assert sorted(move.number for move in past.moves) == [1, 2, 3]
    assert past.current is not None
    shown = {Published(image).tag for image in shop.images() if not image.hidden}
    assert shown == {past.current.tag}
    assert {past.stack[-2].tag, past.current.tag} == {OTHER, THIRD}


@pytest.mark.long
def test_many_moves_at_once_are_as_many_moves(shop: Shop) -> None:
    publish_three(shop)
    for tags in [(TAG, OTHER, THIRD)] * 4 + [(TAG, OTHER, THIRD) * 2] * 2:
        done = [end(process) for process in [shop.start("promote", tag, "--to", "stable") for tag in tags]]
        assert {one.status for one in done} == {0}, [one.err for one in done]
        past = channel.history(shop.catalogue(), "slurm", "stable")
        assert past.current is not None
        assert {Published(image).tag for image in shop.images() if not image.hidden} == {past.current.tag}
        numbers = [move.number for move in past.moves]
        # Several that promote the same image at once may share a number with another one; their order is clear still.
        assert len(tags) > len({*tags}) or len(set(numbers)) == len(numbers)


@pytest.mark.long
def test_publications_that_are_killed_at_any_moment_leave_nothing(shop: Shop) -> None:
    record = add_image(shop.store, TAG, size=24 * MIB)
    shutil.copytree(shop.store.root, shop.folder / "other-host")
    for number in range(40):
        store = shop.store.root if number % 2 else shop.folder / "other-host"
        process = shop.start("publish", TAG, BAKEHOUSE_STORE=str(store))
        time.sleep(0.5 + number * 0.02)
        process.kill()
        end(process)
        assert len(shop.images()) <= 1
        if number % 8 == 7:
            shop.good("publish", TAG)
            whole(shop, record)
            shop.empty()


def test_a_move_that_was_killed_half_way_is_mended_by_the_next(shop: Shop) -> None:
    publish_three(shop)
    shop.good("promote", TAG, "--to", "stable")
    shop.good("promote", OTHER, "--to", "stable")
    with shop.connect() as cloud:
        first = Catalogue.read(cloud).get(TAG)
        Glance(cloud).change(first.image, {"os_hidden": False})
    assert shop.run("publish.check").status == 1
    shop.good("promote", OTHER, "--to", "stable")
    shop.good("publish.check")


# Retention, pins, lists.


def test_prune_shows_first_and_keeps_what_is_needed(shop: Shop) -> None:
    publish_three(shop)
    for number in (4, 5, 6):
        add_image(shop.store, f"2026010{number}-ddddddd", size=MIB, created=f"2026-01-0{number}T12:00:00Z")
        shop.good("publish", f"2026010{number}-ddddddd")
    shop.good("promote", TAG, "--to", "stable")
    shop.good("promote", OTHER, "--to", "stable")
    (shop.folder / "deploy").mkdir()
    shop.good("pin", "--platform", "slurm", "--tag", THIRD, "--file", "deploy/images.lock.yaml")
    plan = shop.good("prune", "--keep", "1", "--json").json
    assert not plan["usage"]["known"]
    verdicts = {row["tag"]: row["why"] for row in plan["images"] if not row["delete"]}
    assert verdicts[OTHER] == "channel stable"
    assert verdicts[TAG] == "channel stable may be rolled back to it"
    assert "images.lock.yaml" in verdicts[THIRD]
    assert verdicts["20260106-ddddddd"] == "one of the 1 newest"
    assert len(shop.images()) == 6
    text = shop.good("prune", "--keep", "1").out
    assert "2 of 6 images would go" in text
    assert "what servers use is not known" in text
    shop.good("prune", "--keep", "1", "--yes", "--dry-run")
    assert len(shop.images()) == 6
    shop.good("prune", "--keep", "1", "--yes")
    assert {Published(image).tag for image in shop.images()} == {TAG, OTHER, THIRD, "20260106-ddddddd"}
    done = shop.run("publish.check", "--json")
    assert {row["tag"] for row in done.json if row["state"] == "lost"} == {"20260104-ddddddd", "20260105-ddddddd"}


def test_a_pin_is_checked_against_the_cloud(shop: Shop) -> None:
    publish_three(shop)
    shop.good("promote", TAG, "--to", "stable")
    shop.good("pin", "--platform", "slurm", "--channel", "stable")

    def state() -> tuple[int, str]:
        done = shop.run("pin", "--check", "--json")
        return done.status, done.json[0]["state"]

    assert state() == (0, "ok")
    shop.good("promote", OTHER, "--to", "stable")
    assert state() == (1, "behind")
    assert shop.run("pin", "--check", "--allow-behind").status == 0
    shop.good("pin", "--platform", "slurm", "--tag", TAG)
    assert state() == (1, "hidden")
    with shop.connect() as cloud:
        image = Catalogue.read(cloud).get(TAG).image
        Glance(cloud).change(image, {"bakehouse_tag": OTHER})
        assert state() == (1, "altered")
        Glance(cloud).delete(image)
    assert state() == (1, "gone")


def test_the_list_shows_what_people_ask_for(shop: Shop) -> None:
    publish_three(shop)
    shop.good("promote", TAG, "--to", "stable")
    rows = {row["tag"]: row for row in shop.good("images", "--cloud", "here", "--json").json}
    assert rows[TAG]["channels"] == ["stable"]
    assert rows[TAG]["verified"] == "passed"
    assert rows[TAG]["servers"] is None, "this cloud has no Nova"
    assert shop.good("images", "--cloud", "here").out.count("\n") == 5


# Clocks and keys.


@pytest.mark.parametrize("skew", ["-1d", "+1d"])
def test_a_clock_that_is_a_day_off_changes_nothing(shop: Shop, skew: str) -> None:
    """The client's clock: ages come from the cloud's, order from numbers, tokens are renewed when refused."""
    record = add_image(shop.store, TAG, size=MIB)
    add_image(shop.store, OTHER, size=MIB)
    shop.good("publish", OTHER)
    shop.good("promote", OTHER, "--to", "stable")

    def off(*words: str) -> Done:
        done = shop.run(*words, prefix=("faketime", "-f", skew))
        assert done.status == 0, done.out + done.err
        return done

    off("publish", TAG)
    off("promote", TAG, "--to", "stable")
    assert resolved(shop) == TAG
    rows = {row["tag"]: row for row in off("images", "--cloud", "here", "--json").json}
    assert all(0 <= row["age_seconds"] < 3600 for row in rows.values()), rows
    assert off("images.verify", TAG).status == 0
    shop.good("rollback", "--platform", "slurm", "--channel", "stable")
    assert resolved(shop) == OTHER
    assert record.tag == TAG


def test_a_site_may_demand_signatures(shop: Shop) -> None:
    shop.good("sign.key", "site.key")
    shop.configure(trusted_keys=["site.key.pub"], require_signature=True)
    add_image(shop.store, TAG, size=MIB)
    shop.good("publish", TAG)
    assert "is not signed" in shop.run("promote", TAG, "--to", "stable").err
    shop.configure(trusted_keys=["site.key.pub"], require_signature=True, signing_key="site.key")
    shop.good("publish", TAG)
    shop.good("sign.check", TAG)
    assert "good, by key" in shop.good("images.verify", TAG).out
    shop.good("promote", TAG, "--to", "stable")
    with shop.connect() as cloud:
        Glance(cloud).change(Catalogue.read(cloud).get(TAG).image, {"bakehouse_sbom_sha256": "0" * 64})
    assert "does not fit" in shop.run("promote", TAG, "--to", "candidate").err
    shop.good("publish", TAG)
    shop.good("sign.key", "other.key")
    shop.configure(trusted_keys=["other.key.pub"], require_signature=True)
    assert "is not trusted here" in shop.run("promote", TAG, "--to", "candidate").err
