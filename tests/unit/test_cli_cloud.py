"""The tasks about clouds: what they print, and how they fail. The cloud is one in memory."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from bakehouse import channel, cli_cloud, local_cloud, signature
from bakehouse.cloud import CloudError
from bakehouse.published import STATE, Catalogue
from bakehouse.store import LocalStore
from tests.fake_glance import FakeCloud
from tests.samples import add_image
from tests.unit.test_channel import TAGS, cloud_with
from tests.unit.test_cli import Tasks


class Shop(Tasks):
    """Tasks with a store and a cloud."""

    cloud: FakeCloud

    @property
    def images(self) -> LocalStore:
        return LocalStore(self.store)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shop:
    made = Shop(tmp_path, monkeypatch, capsys)
    made.cloud = FakeCloud()
    # Closing it is openstacksdk's.
    monkeypatch.setattr(FakeCloud, "__exit__", lambda *_: None)
    monkeypatch.setattr(cli_cloud, "_connect", lambda *_: made.cloud)
    return made


def filled(shop: Shop) -> FakeCloud:
    cloud = cloud_with(*TAGS[:3], cloud=shop.cloud)
    cloud.time += datetime.timedelta(hours=2)
    for tag in TAGS[:2]:
        channel.promote(cloud, "", tag, "stable")
    return cloud


def test_publishing_shows_where_the_image_is_and_what_comes_next(shop: Shop) -> None:
    add_image(shop.images, TAGS[0], size=1 << 20)
    done = shop.run("publish", TAGS[0])
    assert done.status == 0
    (image,) = shop.cloud.images.values()
    assert f"id        {image['id']}" in done.out
    assert f"Next: invoke promote {TAGS[0]} --to candidate --cloud here" in done.out
    again = shop.run("publish", TAGS[0])
    assert "is in here already, as it should be" in again.out


def test_an_image_that_is_not_verified_is_said_so(shop: Shop) -> None:
    add_image(shop.images, TAGS[0], size=1 << 20, verified=None)
    assert f"Next: invoke verify {TAGS[0]}" in shop.run("publish", TAGS[0]).out


def test_a_dry_run_shows_every_property(shop: Shop) -> None:
    add_image(shop.images, TAGS[0], size=1 << 20)
    done = shop.run("publish", TAGS[0], "--dry-run")
    for words in ("hw_disk_bus", "bakehouse_sbom_sha256", "os:debian", "would upload 1 MiB to here, private"):
        assert words in done.out
    assert "to here, community" in shop.run("publish", TAGS[0], "--dry-run", "--visibility", "community").out
    told = json.loads(shop.run("publish", TAGS[0], "--dry-run", "--json").out)
    assert (told["outcome"], told["id"], told["visibility"], told["dry_run"]) == ("published", None, "private", True)
    assert told["properties"]["hw_disk_bus"] == "virtio"
    assert shop.cloud.images == {}


def test_a_dry_run_looks_as_publishing_does(shop: Shop, tmp_path: Path) -> None:
    add_image(shop.images, TAGS[0], size=1 << 20)
    shop.cloud._create({"id": "taken", "name": f"slurm-{TAGS[0]}", "owner": "somebody"})
    for flags in ((), ("--dry-run",)):
        done = shop.run("publish", TAGS[0], *flags)
        assert (done.status, [*shop.cloud.images]) == (1, ["taken"])
        assert "is taken in here by the image taken of project somebody" in done.err
    shop.cloud.images.clear()
    # Where images are chosen from is another project's business.
    (tmp_path / "bakehouse.yaml").write_text("image_owner: another\n")
    shop.run("publish", TAGS[0])
    (image,) = shop.cloud.images.values()
    assert f"is in here already: {image['id']}" in shop.run("publish", TAGS[0], "--dry-run").out
    assert "hold the same images" in shop.run("publish.check").out
    image["hw_disk_bus"] = "scsi"
    before = dict(image)
    done = shop.run("publish", TAGS[0], "--dry-run", "--visibility", "community")
    assert "would change hw_disk_bus: scsi -> virtio" in done.out
    assert "would change visibility: private -> community" in done.out
    told = json.loads(shop.run("publish", TAGS[0], "--dry-run", "--json").out)
    assert (told["outcome"], told["changes"], told["id"]) == ("updated", ["hw_disk_bus"], image["id"])
    assert image == before
    image[STATE] = "incoming"
    assert "would finish the upload of 1 MiB" in shop.run("publish", TAGS[0], "--dry-run").out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--visibility", "secret"), "it is one of private, shared, community, public"),
        (("--dry-run", "--visibility", "secret"), "it is one of private, shared, community, public"),
        (("--format", "vmdk"), "has no vmdk file, only qcow2"),
    ],
)
def test_a_wrong_flag_is_told(shop: Shop, flags: tuple[str, ...], said: str) -> None:
    add_image(shop.images, TAGS[0], size=1 << 20)
    done = shop.run("publish", TAGS[0], *flags)
    assert (done.status, shop.cloud.images) == (1, {})
    assert said in done.err


def test_the_list_is_a_table(shop: Shop) -> None:
    filled(shop)
    shop.cloud.servers = [{"image": {"id": f"slurm-{TAGS[0]}"}}] * 3
    lines = shop.run("images", "--cloud", "here").out.splitlines()
    assert lines[0].split() == ["Tag", "Manifest", "Platform", "Channel", "Age", "Size", "Verified", "Servers", "State"]
    assert lines[2].split()[:3] == [TAGS[1], "slurm", "stable"]
    assert "2 h" in lines[2]
    assert lines[3].split()[-4:] == ["passed", "3", "active,", "hidden"]
    assert lines[-1].startswith("3 images")


def test_a_nova_that_is_away_does_not_hide_the_list(shop: Shop) -> None:
    filled(shop).servers = []

    def away() -> None:
        raise CloudError("here cannot be reached")

    # The first two are the images themselves.
    for act in (lambda: None, lambda: None, away):
        shop.cloud.on("GET", act)
    done = shop.run("images", "--cloud", "here")
    assert done.status == 0
    assert "Nova does not answer" in done.out
    shop.cloud.on("GET", away)
    assert shop.run("prune", "--keep", "1", "--yes").status == 1, "but nothing is deleted then"
    assert len(shop.cloud.images) == 3


def test_an_empty_cloud_says_how_to_fill_it(shop: Shop) -> None:
    assert "invoke publish TAG" in shop.run("images", "--cloud", "here").out
    assert "invoke promote TAG" in shop.run("channels").out
    assert "No images of ours" in shop.run("prune").out


def test_channels_are_told_with_their_history(shop: Shop) -> None:
    filled(shop)
    shop.run("rollback", "--platform", "slurm", "--channel", "stable")
    lines = shop.run("channels", "--platform", "slurm").out.splitlines()
    assert ["stable", "3", "rollback", TAGS[0]] == lines[1].split()[1:5]
    assert "points here" in lines[1]
    assert "No channels" in shop.run("channels", "--platform", "other").out


def test_a_move_says_what_changed_and_how_to_undo_it(shop: Shop) -> None:
    filled(shop)
    done = shop.run("promote", TAGS[2], "--to", "stable")
    assert f"moved stable of slurm from {TAGS[1]} to {TAGS[2]}" in done.out
    assert f"hid {TAGS[1]}" in done.out
    assert "Back: invoke rollback --platform slurm --channel stable --cloud here" in done.out
    assert "points to" in shop.run("promote", TAGS[2], "--to", "stable").out
    assert json.loads(shop.run("promote", TAGS[0], "--to", "stable", "--dry-run", "--json").out)["now"] == TAGS[0]
    assert "would hide" in shop.run("promote", TAGS[0], "--to", "stable", "--dry-run").out


def test_a_site_that_demands_signatures_rolls_back_to_signed_images_only(shop: Shop, tmp_path: Path) -> None:
    cloud = filled(shop)
    signature.generate(tmp_path / "site.key")
    (tmp_path / "bakehouse.yaml").write_text("trusted_keys: [site.key.pub]\nrequire_signature: true\n")
    done = shop.run("rollback", "--platform", "slurm", "--channel", "stable", "--force")
    assert done.status == 1
    assert f"{TAGS[0]} is not signed, and this site demands it" in done.err
    assert Catalogue.read(cloud).get(TAGS[1]).image.hidden is False


def test_a_plan_of_retention_is_shown_first(shop: Shop) -> None:
    cloud = filled(shop)
    cloud_with(TAGS[3], TAGS[4], cloud=cloud)
    shown = shop.run("prune", "--keep", "1").out
    assert "2 of 5 images would go" in shown
    assert "what servers use is not known" in shown
    assert "--yes" in shown
    assert len(cloud.images) == 5
    cloud.fail("DELETE", 409, "in use")
    done = shop.run("prune", "--keep", "1", "--yes")
    assert (done.status, len(cloud.images)) == (1, 4)
    assert "in use" in done.err
    assert "deleted 1 images" in shop.run("prune", "--keep", "1", "--yes").out


def test_servers_and_channels_are_asked_again_before_anything_is_deleted(shop: Shop) -> None:
    cloud = filled(shop)
    cloud.servers = []

    def start_one() -> None:
        cloud.servers = [{"image": {"id": f"slurm-{TAGS[0]}"}}]

    (shop.folder / "bakehouse.yaml").write_text("rollback_steps: 1\n")
    cloud_with(TAGS[3], cloud=cloud)
    shop.run("promote", TAGS[2], "--to", "stable")
    cloud.asked.clear()
    shop.run("prune", "--keep", "1")
    # Each plan asks the same; the first of the second plan finds a server.
    for _ in cloud.asked:
        cloud.on("GET", lambda: None)
    cloud.on("GET", start_one)
    done = shop.run("prune", "--keep", "1", "--yes")
    assert (done.status, len(cloud.images)) == (1, 4)
    assert "needed since the plan was made: used by 1 server" in done.err


def test_machines_are_told_whether_servers_are_known(shop: Shop) -> None:
    cloud = filled(shop)
    told = json.loads(shop.run("prune", "--json").out)
    assert told["usage"] == {"known": "", "reason": "here has no compute service (Nova) in its catalogue"}
    assert [row["tag"] for row in told["images"]] == TAGS[2::-1]
    cloud.servers = []
    assert json.loads(shop.run("prune", "--json").out)["usage"] == {"known": "all projects", "reason": ""}


def test_pins_are_checked_in_a_table(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = filled(shop)
    identity = "8f4a8d34-7c15-51db-bd63-1b5519d6f857"
    for image in cloud.images.values():
        image |= {"os_hash_algo": "sha512", "os_hash_value": "a" * 128, "bakehouse_sha512": "a" * 128}
    moved = cloud.images.pop(f"slurm-{TAGS[1]}")
    cloud.images[identity] = moved | {"id": identity}
    monkeypatch.chdir(tmp_path)
    assert "would pin" in shop.run("pin", "--platform", "slurm", "--dry-run").out
    told = json.loads(shop.run("pin", "--platform", "slurm", "--dry-run", "--json").out)
    assert (told["changed"], told["before"], told["id"], told["dry_run"]) == (True, None, identity, True)
    assert not (tmp_path / "images.lock.yaml").exists()
    assert f"pinned slurm {TAGS[1]}" in shop.run("pin", "--platform", "slurm").out
    assert "has been pinned before" in shop.run("pin", "--platform", "slurm").out
    assert shop.run("pin", "--check").out.splitlines()[1].split()[:2] == ["ok", "slurm"]
    channel.promote(cloud, "", TAGS[2], "stable")
    done = shop.run("pin", "--check")
    assert done.status == 1
    assert "slurm is behind" in done.err
    assert "invoke pin --platform slurm --channel stable" in done.err
    assert yaml.safe_load((tmp_path / "images.lock.yaml").read_text())["images"][0]["id"] == identity
    assert "which image?" in shop.run("pin").err
    assert "pins no image of other" in shop.run("pin", "--check", "--platform", "other").err


def test_packages_that_changed_are_a_table(shop: Shop) -> None:
    add_image(shop.images, TAGS[0], size=1 << 20, packages=("munge", "gone"))
    add_image(shop.images, TAGS[1], size=1 << 20, packages=("munge", "came"), versions={"slurm": "25.05"})
    done = shop.run("images.diff", TAGS[0], TAGS[1])
    assert "slurm 24.11.5 -> 25.05" in done.out
    rows = [line.split() for line in done.out.splitlines()]
    assert ["came", "added", "-", "1.0-1", "Debian", "trixie/main"] in rows
    assert ["gone", "removed", "1.0-1", "-", "Debian", "trixie/main"] in rows
    assert "1 added, 1 removed, 2 packages now" in done.out
    assert "The same 2 packages" in shop.run("images.diff", TAGS[0], TAGS[0]).out
    changes = json.loads(shop.run("images.diff", TAGS[0], TAGS[1], "--json").out)["changes"]
    assert [change["kind"] for change in changes] == ["added", "removed"]


def test_what_made_an_image_larger_is_told(shop: Shop) -> None:
    add_image(shop.images, TAGS[0], size=1 << 20, packages=("munge",))
    add_image(shop.images, TAGS[1], size=3 << 20, packages=("munge", "firmware"))
    told = json.loads(shop.run("images.diff", TAGS[0], TAGS[1], "--by-size", "--json").out)
    assert told["files"][TAGS[1]] - told["files"][TAGS[0]] == 2 << 20
    assert told["grown"] == {"firmware": 5 << 20}
    shown = shop.run("images.diff", TAGS[0], TAGS[1], "--by-size").out
    assert "file 1 MiB -> 3 MiB, 2.52 times" in shown
    assert [line.split() for line in shown.splitlines() if line.startswith("firmware")] == [["firmware", "+5.0"]]


def test_signing_is_told_step_by_step(shop: Shop, tmp_path: Path) -> None:
    add_image(shop.images, TAGS[0], size=1 << 20)
    assert "has no signing key" in shop.run("sign", TAGS[0]).err
    made = shop.run("sign.key", str(tmp_path / "site.key"))
    assert f"signing_key: {tmp_path}/site.key" in made.out
    assert "PRIVATE" not in made.out
    assert "is there already" in shop.run("sign.key", str(tmp_path / "site.key")).err
    (tmp_path / "bakehouse.yaml").write_text("signing_key: site.key\ntrusted_keys: [site.key.pub]\n")
    assert f"would sign slurm {TAGS[0]}" in shop.run("sign", TAGS[0], "--dry-run").out
    assert "cannot be read" in shop.run("sign.check", TAGS[0]).err
    assert f"signed slurm {TAGS[0]}" in shop.run("sign", TAGS[0]).out
    assert "image file, record and SBOM" in shop.run("sign.check", TAGS[0]).out


def test_a_bake_that_shall_be_uploaded_asks_for_the_cloud_first(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(shop.folder / "none.yaml"))
    (shop.folder / "none.yaml").write_text("clouds: {}\n")
    done = shop.run("bake", "--platform", "slurm", "--upload", "--cloud", "nowhere")
    assert done.status == 1
    assert "there is no cloud 'nowhere'" in done.err


def test_a_bake_is_uploaded_only_where_that_is_asked_for(shop: Shop) -> None:
    for flags in (("--cloud", "here"), ("--region", "R1")):
        done = shop.run("bake", "--platform", "slurm", *flags)
        assert done.status == 1
        assert f"error: {flags[0]} without --upload" in done.err
        assert "hint: --upload publishes" in done.err


def test_the_local_openstack_is_not_touched_by_a_dry_run(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    there = SimpleNamespace(name="bakehouse", folder=shop.folder)
    monkeypatch.setattr(local_cloud, "find", lambda: there)
    monkeypatch.setattr(local_cloud, "down", lambda **_: pytest.fail("it was"))
    assert f"would delete 'bakehouse' in {shop.folder}" in shop.run("openstack.down", "--delete", "--dry-run").out
    monkeypatch.setattr(local_cloud, "find", lambda: None)
    assert "there is no local OpenStack" in shop.run("openstack.down", "--dry-run").out
