"""Retention: what goes, what stays, and why; and what servers use."""

from __future__ import annotations

import datetime
import errno
import os
from collections import Counter
from pathlib import Path

import pytest

from bakehouse import channel, compute, pin, published, retention
from bakehouse.cloud import CloudError
from bakehouse.compute import Usage
from bakehouse.errors import BakehouseError
from bakehouse.pin import Pin
from bakehouse.published import PUBLISHED, STATE, Catalogue
from tests.fake_glance import FakeCloud
from tests.unit.test_channel import TAGS, cloud_with

UNKNOWN = Usage("", "no Nova", Counter())


def verdicts(cloud: FakeCloud, *, keep: int = 1, usage: Usage = UNKNOWN, pins: dict[str, Path] | None = None,
             steps: int = 3) -> dict[str, tuple[bool, str]]:  # fmt: skip
    found = retention.plan(Catalogue.read(cloud), usage, pins or {}, keep=keep, rollback_steps=steps)
    return {verdict.image.tag: (verdict.delete, verdict.why) for verdict in found}


def test_the_newest_stay_and_the_others_go() -> None:
    found = verdicts(cloud_with(*TAGS), keep=2)
    assert [tag for tag, (delete, _) in found.items() if not delete] == [TAGS[4], TAGS[3]]
    assert found[TAGS[0]] == (True, "2 newer ones are there")


def test_three_bad_nights_do_not_take_the_last_good_image() -> None:
    cloud = cloud_with(*TAGS)
    for tag, bad in zip(TAGS[1:4], ({"bakehouse_verified": "failed"}, {"status": "deactivated"}) * 2, strict=False):
        cloud.images[f"slurm-{tag}"] |= bad
    found = verdicts(cloud, keep=2)
    assert found[TAGS[0]] == (False, "one of the 2 newest")
    assert found[TAGS[1]] == found[TAGS[2]] == (False, "not 2 good ones are newer")
    assert {tag for tag, (delete, _) in verdicts(cloud, keep=1).items() if delete} == set(TAGS[:4])


def test_the_newest_that_is_known_to_work_stays() -> None:
    cloud = cloud_with(*TAGS)
    for tag in TAGS[2:]:
        cloud.images[f"slurm-{tag}"]["bakehouse_verified"] = "none"
    found = verdicts(cloud, keep=3)
    assert found[TAGS[1]] == (False, "the newest that passed its verification")
    assert found[TAGS[0]] == (True, "3 newer ones are there")


def test_what_is_out_of_service_is_no_step_back() -> None:
    cloud = cloud_with(*TAGS)
    for tag in TAGS[:3]:
        channel.promote(cloud, "", tag, "stable")
    cloud.images[f"slurm-{TAGS[1]}"]["status"] = "deactivated"
    found = verdicts(cloud, steps=1)
    assert found[TAGS[0]] == (False, "channel stable may be rolled back to it")


def test_newest_is_what_was_baked_last_not_what_was_uploaded_last() -> None:
    cloud = cloud_with(TAGS[2])
    cloud.time += datetime.timedelta(hours=1)
    cloud_with(TAGS[0], cloud=cloud)
    assert verdicts(cloud)[TAGS[2]] == (False, "one of the 1 newest")


def test_each_manifest_keeps_its_own() -> None:
    cloud = cloud_with(*TAGS[:2])
    cloud_with(TAGS[2], name="slurm-gpu", cloud=cloud)
    assert [tag for tag, (delete, _) in verdicts(cloud).items() if delete] == [TAGS[0]]


def test_what_a_channel_needs_stays() -> None:
    cloud = cloud_with(*TAGS)
    for tag in TAGS[:3]:
        channel.promote(cloud, "", tag, "stable")
    found = verdicts(cloud)
    assert found[TAGS[2]] == (False, "channel stable")
    assert found[TAGS[1]] == found[TAGS[0]] == (False, "channel stable may be rolled back to it")
    assert found[TAGS[3]][0]
    fewer = verdicts(cloud, steps=1)
    assert (fewer[TAGS[1]][0], fewer[TAGS[0]][0]) == (False, True)


def test_what_servers_and_lock_files_need_stays() -> None:
    cloud = cloud_with(*TAGS)
    usage = Usage("all projects", "", Counter({f"slurm-{TAGS[0]}": 2, f"slurm-{TAGS[1]}": 1}))
    found = verdicts(cloud, usage=usage, pins={f"slurm-{TAGS[2]}": Path("deploy/images.lock.yaml")})
    assert found[TAGS[0]] == (False, "used by 2 servers")
    assert found[TAGS[1]] == (False, "used by 1 server")
    assert found[TAGS[2]] == (False, "pinned by deploy/images.lock.yaml")
    assert found[TAGS[3]][0]


def test_protected_ones_and_running_uploads_stay() -> None:
    cloud = cloud_with(*TAGS[:4])
    cloud.images[f"slurm-{TAGS[0]}"]["protected"] = True
    cloud.images[f"slurm-{TAGS[1]}"]["bakehouse_state"] = "incoming"
    cloud.images[f"slurm-{TAGS[3]}"]["bakehouse_state"] = "incoming"
    found = verdicts(cloud)
    assert found[TAGS[0]] == (False, "protected")
    assert found[TAGS[1]] == (False, "its upload may still be going on")
    assert found[TAGS[2]] == (False, "one of the 1 newest"), "one that is not whole counts for nothing"
    cloud.time += datetime.timedelta(days=2)
    assert verdicts(cloud)[TAGS[1]] == (True, "its upload never came to its end")


def test_what_changed_since_the_plan_is_left_alone() -> None:
    cloud = cloud_with(*TAGS)
    cloud.images[f"slurm-{TAGS[2]}"][STATE] = "incoming"
    cloud.time += 2 * published.STALE
    before = planned(cloud)
    assert [verdict.image.tag for verdict in before if verdict.delete] == TAGS[3::-1]
    channel.promote(cloud, "", TAGS[0], "stable")
    usage = Usage("all projects", "", Counter({f"slurm-{TAGS[1]}": 1}))
    after = planned(cloud, usage)
    cloud.images[f"slurm-{TAGS[2]}"][STATE] = PUBLISHED
    cloud.fail("DELETE", 409, "image is in use")
    done = {gone.image.tag: gone.error for gone in retention.delete(cloud, before, after)}
    assert done[TAGS[0]] == "it is needed since the plan was made: channel stable"
    assert done[TAGS[1]] == "it is needed since the plan was made: used by 1 server"
    assert "it has changed since the plan was made" in done[TAGS[2]], "another publisher has just shown it"
    assert "in use" in done[TAGS[3]]
    assert len(cloud.images) == 5


def planned(cloud: FakeCloud, usage: Usage = UNKNOWN) -> list[retention.Verdict]:
    return retention.plan(Catalogue.read(cloud), usage, {}, keep=1, rollback_steps=3)


def test_what_both_plans_delete_goes() -> None:
    cloud = cloud_with(*TAGS)
    before = planned(cloud)
    del cloud.images[f"slurm-{TAGS[0]}"]
    assert [gone.error for gone in retention.delete(cloud, before, planned(cloud))] == [""] * 4
    assert [*cloud.images] == [f"slurm-{TAGS[4]}"]


def test_bad_requests_are_told() -> None:
    with pytest.raises(BakehouseError, match="--keep 0: it is 1 or more"):
        verdicts(cloud_with(TAGS[0]), keep=0)
    with pytest.raises(BakehouseError, match="no images of slrum"):
        retention.plan(Catalogue.read(cloud_with(TAGS[0])), UNKNOWN, {}, keep=1, rollback_steps=1, names=["slrum"])


# Lock files.


def a_pin(number: int) -> Pin:
    identity = f"00000000-0000-0000-0000-00000000000{number}"
    return Pin(platform="slurm", tag="t", id=identity, name="n", sha512="", cloud=f"c{number}")


def test_lock_files_are_found_below_a_folder(tmp_path: Path) -> None:
    for number, place in enumerate(("", "deploy/prod", ".git", ".venv/lib")):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        pin.write(tmp_path / place / pin.FILE_NAME, a_pin(number))
    pin.write(tmp_path / "other.yaml", a_pin(9))
    found = retention.pinned(tmp_path, [tmp_path / "other.yaml"])
    assert {identity[-1] for identity in found} == {"0", "1", "9"}


def test_lock_files_of_the_whole_repository_count(tmp_path: Path) -> None:
    for number, place in enumerate(("", "deploy/prod", "deploy/test")):
        pin.write(tmp_path / "repository" / place / pin.FILE_NAME, a_pin(number))
    pin.write(tmp_path / pin.FILE_NAME, a_pin(9))
    here = tmp_path / "repository" / "deploy" / "test"
    assert {identity[-1] for identity in retention.pinned(here)} == {"2"}
    (tmp_path / "repository" / ".git").mkdir()
    assert {identity[-1] for identity in retention.pinned(here)} == {"0", "1", "2"}


def test_a_folder_that_cannot_be_read_stops_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    look = os.scandir

    def scandir(folder: str) -> object:
        if str(folder).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return look(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(BakehouseError, match="closed cannot be read: Permission denied; what lock files in it pin"):
        retention.pinned(tmp_path)


def test_a_lock_file_that_cannot_be_read_stops_everything(tmp_path: Path) -> None:
    (tmp_path / pin.FILE_NAME).write_text("images: [{platform: slurm}]\n")
    with pytest.raises(BakehouseError, match=r"images\.lock\.yaml:1: images\.0\.tag"):
        retention.pinned(tmp_path)


# Servers.


def server(image: object) -> dict[str, object]:
    return {"id": "s", "image": image}


def test_servers_are_counted_by_image_page_after_page() -> None:
    cloud = FakeCloud()
    cloud.servers = [server({"id": "a"}), server({"id": "b"}), server(""), server({"id": "a"}), server(None)]
    found = compute.usage(cloud)
    assert (found.known, dict(found.servers)) == ("all projects", {"a": 2, "b": 1})
    assert (found.text("a"), found.text("z")) == ("2", "0")


def test_servers_of_all_regions_are_counted() -> None:
    """One Glance may serve several."""
    cloud = FakeCloud()
    cloud.servers = [server({"id": "a"})]
    cloud.elsewhere = {"two": [server({"id": "a"}), server({"id": "b"})], "three": []}
    assert dict(compute.usage(cloud).servers) == {"a": 2, "b": 1}
    cloud.servers = None
    assert dict(compute.usage(cloud).servers) == {"a": 1, "b": 1}, "also where the own region has no Nova"


@pytest.mark.parametrize("own_glance", [False, True])
def test_a_nova_of_another_region_that_is_away_is_said_or_stops_all(own_glance: bool) -> None:
    cloud = FakeCloud()
    cloud.servers, cloud.elsewhere = [server({"id": "a"})], {"two": []}
    cloud.on("GET", lambda: None)
    cloud.fail("GET", 503)
    if not own_glance:
        with pytest.raises(CloudError, match="HTTP 503"):
            compute.usage(cloud)
        return
    cloud.glances = {"two": "http://there"}
    found = compute.usage(cloud)
    assert (found.known, dict(found.servers)) == ("own project", {"a": 1})
    assert "the Nova of two does not answer" in found.reason


def test_where_other_projects_cannot_be_seen_it_is_said() -> None:
    cloud = FakeCloud()
    cloud.servers, cloud.may_see_all_servers = [server({"id": "a"})], False
    found = compute.usage(cloud)
    assert (found.known, found.servers["a"]) == ("own project", 1)
    assert "other projects" in found.reason


def test_without_nova_nothing_is_known() -> None:
    found = compute.usage(FakeCloud())
    assert (found.known, found.text("a")) == ("", "?")
    assert "no compute service" in found.reason
