"""Channels: where they point to, how they move, and what happens when several move them at once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bakehouse import channel
from bakehouse.errors import BakehouseError
from bakehouse.properties import KEPT_FREE, MARK, QUOTA
from bakehouse.published import PUBLISHED, STATE, Catalogue, Published
from tests.fake_glance import FakeCloud

TAGS = [f"2026010{number}-aaaaaaa" for number in range(1, 6)]


def cloud_with(*tags: str, name: str = "slurm", verified: str = "passed", cloud: FakeCloud | None = None) -> FakeCloud:
    made = cloud or FakeCloud()
    for tag in tags:
        status, image = made._create({
            "id": f"{name}-{tag}", "name": f"{name}-{tag}", "tags": [MARK], "status": "active", STATE: PUBLISHED,
            "bakehouse_tag": tag, "bakehouse_name": name, "bakehouse_verified": verified, "size": 1,
            "bakehouse_created": f"{tag[:4]}-{tag[4:6]}-{tag[6:8]}T00:00:00Z",
        })  # fmt: skip
        assert status == 201
        image["status"] = "active"
    return made


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)


def past(cloud: FakeCloud, name: str = "slurm", one: str = "stable") -> channel.History:
    return channel.history(Catalogue.read(cloud), name, one)


def now(cloud: FakeCloud) -> str:
    found = past(cloud).current
    assert found is not None
    return found.tag


def promote(cloud: FakeCloud, tag: str, **options: Any) -> channel.Moved:
    return channel.promote(cloud, "", tag, options.pop("to", "stable"), **options)


def shown(cloud: FakeCloud) -> set[str]:
    return {image["bakehouse_tag"] for image in cloud.images.values() if not image["os_hidden"]}


def stack(cloud: FakeCloud) -> list[str]:
    return [image.tag for image in past(cloud).stack]


def walk(cloud: FakeCloud, pile: list[str], step: str) -> None:
    """Promote an image or roll back, and do the same to a pile of tags."""
    if step != "back":
        promote(cloud, step)
        if not pile or pile[-1] != step:
            pile.append(step)
    elif past(cloud).back:
        channel.rollback(cloud, "", "slurm", "stable")
        pile.pop()
        while pile and pile[-1] != now(cloud):
            pile.pop()
    else:
        with pytest.raises(BakehouseError):
            channel.rollback(cloud, "", "slurm", "stable")


STEPS = [*TAGS[:3], "back", "back", "back"]


@settings(deadline=None)
@given(st.lists(st.sampled_from(STEPS), max_size=12))
def test_a_channel_is_a_pile_that_promotions_add_to_and_rollbacks_take_from(steps: list[str]) -> None:
    cloud, pile = cloud_with(*TAGS), list[str]()
    for step in steps:
        walk(cloud, pile, step)
        assert stack(cloud) == pile
        ever = {move.tag for move in past(cloud).moves}
        assert shown(cloud) == set(TAGS) - ever | ({pile[-1]} if pile else set())


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(STEPS), min_size=50, max_size=80))
def test_history_that_was_cut_leads_nowhere_else(steps: list[str]) -> None:
    cloud, pile = cloud_with(*TAGS[:3]), list[str]()
    for step in steps:
        walk(cloud, pile, step)
        found = stack(cloud)
        assert found == pile[len(pile) - len(found) :]
        assert bool(found) == bool(pile)


@settings(deadline=None)
@given(st.lists(st.sampled_from([*STEPS, *(f"delete {tag}" for tag in TAGS)]), max_size=16))
def test_no_loss_of_an_image_moves_a_channel(steps: list[str]) -> None:
    cloud, pile = cloud_with(*TAGS), list[str]()
    for step in steps:
        word, _, tag = step.partition(" ")
        if tag:
            cloud.images.pop(f"slurm-{tag}", None)
        elif word == "back" or f"slurm-{word}" in cloud.images:
            walk(cloud, pile, step)
        assert set(stack(cloud)) <= set(pile), "never what was rolled back from"
        found = past(cloud).current
        assert found is None or found.tag == pile[-1]
        assert found or not pile or f"slurm-{pile[-1]}" not in cloud.images


def test_a_channel_whose_image_was_deleted_does_not_fall_back_to_what_it_was_rolled_back_from() -> None:
    cloud = cloud_with(*TAGS[:4])
    for step in (*TAGS[:3], "back"):
        walk(cloud, [""] * 3, step)
    del cloud.images[f"slurm-{TAGS[1]}"]
    with pytest.raises(BakehouseError, match=rf"points to {TAGS[1]}, which has been deleted") as caught:
        channel.current(Catalogue.read(cloud), "slurm", "stable")
    assert "invoke promote TAG --to stable" in caught.value.hint
    assert channel.pointed_to(Catalogue.read(cloud)) == {}
    promote(cloud, TAGS[3])
    assert (past(cloud).moves[-1].number, past(cloud).moves[-1].before) == (5, TAGS[1])
    channel.rollback(cloud, "", "slurm", "stable")
    assert now(cloud) == TAGS[0]


def test_an_image_that_outlives_all_others_stays_rolled_back_from() -> None:
    """As one that is pinned does, when the others are pruned one after the other."""
    cloud = cloud_with(*TAGS)
    for step in (TAGS[0], TAGS[1], "back", TAGS[2], TAGS[3], TAGS[1], "back"):
        walk(cloud, [""] * 4, step)
    del cloud.images[f"slurm-{TAGS[0]}"], cloud.images[f"slurm-{TAGS[2]}"]
    assert stack(cloud) == [TAGS[3]]
    with pytest.raises(BakehouseError, match="has no image before"):
        channel.rollback(cloud, "", "slurm", "stable")


def test_a_move_that_was_killed_before_it_was_noted_is_noted_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = cloud_with(*TAGS[:4])
    for tag in TAGS[:3]:
        promote(cloud, tag)
    with monkeypatch.context() as killed:
        killed.setattr(channel, "_settle", lambda *_: ())
        channel.rollback(cloud, "", "slurm", "stable")
    assert (now(cloud), stack(cloud)) == (TAGS[1], TAGS[:2])
    promote(cloud, TAGS[3])
    del cloud.images[f"slurm-{TAGS[1]}"]
    assert stack(cloud) == [TAGS[0], TAGS[3]]


def test_a_move_is_one_change(monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = cloud_with(*TAGS[:2])
    promote(cloud, TAGS[0])
    cloud.asked.clear()
    promote(cloud, TAGS[1])
    changes = [line for line in cloud.asked if line.startswith("PATCH")]
    assert changes == [f"PATCH /images/slurm-{TAGS[1]}", f"PATCH /images/slurm-{TAGS[0]}"], "move, then hide"


def test_who_when_and_from_where_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "ops")
    for name in channel.CI_USERS:
        monkeypatch.delenv(name, raising=False)
    cloud = cloud_with(*TAGS[:2], verified="none")
    promote(cloud, TAGS[0], force=True)
    promote(cloud, TAGS[1], force=True)
    move = past(cloud).moves[-1]
    assert (move.number, move.kind, move.tag, move.before, move.forced) == (2, "promote", TAGS[1], TAGS[0], True)
    assert move.at == "2026-11-24T12:00:00Z", "the cloud's time"
    assert move.by == "ops", "and no host: images may be public"
    monkeypatch.setenv("GITLAB_USER_LOGIN", "ada")
    promote(cloud, TAGS[0], force=True)
    assert past(cloud).moves[-1].by == "ada"


def test_force_that_was_not_needed_is_not_kept() -> None:
    cloud = cloud_with(TAGS[0])
    promote(cloud, TAGS[0], force=True)
    assert not past(cloud).moves[0].forced


def test_order_comes_from_numbers_and_never_from_clocks() -> None:
    cloud = cloud_with(*TAGS[:2])
    promote(cloud, TAGS[0])
    cloud.time = cloud.time.replace(year=2020)
    promote(cloud, TAGS[1])
    assert now(cloud) == TAGS[1]
    channel.rollback(cloud, "", "slurm", "stable")
    assert now(cloud) == TAGS[0]


def test_manifests_of_one_platform_have_channels_of_their_own() -> None:
    cloud = cloud_with(TAGS[0])
    cloud_with(TAGS[1], name="slurm-gpu", cloud=cloud)
    promote(cloud, TAGS[0])
    promote(cloud, TAGS[1])
    assert past(cloud).current is not None
    assert (now(cloud), past(cloud, "slurm-gpu").stack[-1].tag) == (TAGS[0], TAGS[1])


@pytest.mark.parametrize("order", [0, 1])
def test_two_that_take_the_same_number_come_one_after_the_other(order: int) -> None:
    """The other one writes between our look and our change; then it either goes on or is gone."""
    mine, other = (TAGS[1], TAGS[2]) if order else (TAGS[2], TAGS[1])
    cloud = cloud_with(*TAGS[:3])
    promote(cloud, TAGS[0])
    value = json.dumps({"move": "promote", "from": TAGS[0], "depth": 2})
    cloud.on("PATCH", lambda: cloud.images[f"slurm-{other}"].update({"bakehouse_channel_stable_2": value}))
    promote(cloud, mine)
    assert [(move.number, move.tag) for move in past(cloud).moves] == [(1, TAGS[0]), (2, other), (3, mine)]
    assert past(cloud).moves[-1].before == other
    assert stack(cloud) == [TAGS[0], other, mine]
    assert shown(cloud) == {mine}


def test_a_change_that_another_one_undid_is_made_again() -> None:
    """Glance writes an image as a whole: a change of the same image at the same moment can undo ours."""
    cloud = cloud_with(*TAGS[:2])
    done = list[bool]()

    def undo() -> None:
        if not done and "bakehouse_channel_stable_1" in cloud.images[f"slurm-{TAGS[0]}"]:
            del cloud.images[f"slurm-{TAGS[0]}"]["bakehouse_channel_stable_1"]
            done.append(True)

    for _ in range(6):
        cloud.on("GET", undo)
    promote(cloud, TAGS[0])
    assert done
    assert now(cloud) == TAGS[0]


def test_an_image_that_vanishes_meanwhile_is_said_so() -> None:
    cloud = cloud_with(TAGS[0])
    cloud.on("PATCH", cloud.images.clear)
    with pytest.raises(BakehouseError):
        promote(cloud, TAGS[0])


def change(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda image: image.update(fields)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (change(bakehouse_verified="none"), "has not been verified"),
        (change(bakehouse_verified="failed"), "failed its verification"),
        (change(**{STATE: "incoming"}), "its upload did not come to its end"),
        (change(status="deactivated"), "it is 'deactivated'"),
        (change(owner="somebody"), "there is no image"),
        (change(tags=[]), "there is no image"),
    ],
    ids=["not verified", "failed", "incoming", "deactivated", "of another project", "not ours"],
)
def test_an_image_that_is_not_fit_is_not_promoted(spoil: Callable[[dict[str, Any]], None], said: str) -> None:
    cloud = cloud_with(TAGS[0])
    spoil(cloud.images[f"slurm-{TAGS[0]}"])
    with pytest.raises(BakehouseError, match=said):
        promote(cloud, TAGS[0])
    assert not any("bakehouse_channel" in key for image in cloud.images.values() for key in image)


@pytest.mark.parametrize("verified", ["none", "failed"])
def test_a_channel_is_rolled_back_to_what_might_be_promoted_only(verified: str) -> None:
    cloud = cloud_with(*TAGS[:2])
    for tag in TAGS[:2]:
        promote(cloud, tag)
    cloud.images[f"slurm-{TAGS[0]}"]["bakehouse_verified"] = verified
    with pytest.raises(BakehouseError, match="verif") as caught:
        channel.rollback(cloud, "", "slurm", "stable")
    assert "--force" in caught.value.hint
    assert now(cloud) == TAGS[1]
    channel.rollback(cloud, "", "slurm", "stable", force=True)
    assert (now(cloud), past(cloud).moves[-1].forced) == (TAGS[0], True)


def test_what_a_site_demands_holds_for_rolling_back_too() -> None:
    cloud = cloud_with(*TAGS[:2])
    for tag in TAGS[:2]:
        promote(cloud, tag)

    def refuse(image: Published) -> None:
        raise BakehouseError(f"{image.tag} is not signed")

    with pytest.raises(BakehouseError, match=f"{TAGS[0]} is not signed"):
        channel.rollback(cloud, "", "slurm", "stable", force=True, check=refuse)
    assert now(cloud) == TAGS[1]


@pytest.mark.parametrize("bad", ["", "Stable", "a_b", "x" * 40, "stable "])
def test_a_channels_name_is_plain(bad: str) -> None:
    with pytest.raises(BakehouseError, match="is not a channel's name"):
        promote(cloud_with(TAGS[0]), TAGS[0], to=bad)


def test_an_image_does_not_fill_up_with_history() -> None:
    cloud = cloud_with(*TAGS[:2])
    for _ in range(20):
        promote(cloud, TAGS[0])
        promote(cloud, TAGS[1])
    for image in cloud.images.values():
        assert sum("bakehouse_channel" in key for key in image) == channel.KEPT_MOVES
    assert now(cloud) == TAGS[1]
    assert past(cloud).moves[-1].number == 40
    channel.rollback(cloud, "", "slurm", "stable")
    assert now(cloud) == TAGS[0]


def test_there_and_back_again_and_again_leads_no_further_back() -> None:
    cloud = cloud_with(*TAGS[:2])
    promote(cloud, TAGS[0])
    for _ in range(12):
        promote(cloud, TAGS[1])
        channel.rollback(cloud, "", "slurm", "stable")
    assert stack(cloud) == [TAGS[0]]
    with pytest.raises(BakehouseError, match="has no image before"):
        channel.rollback(cloud, "", "slurm", "stable")


def test_glances_quota_holds_with_many_properties_and_channels() -> None:
    cloud = cloud_with(*TAGS[:2])
    for image in cloud.images.values():
        image |= {f"site_{number}": "x" for number in range(QUOTA - KEPT_FREE - 4)}
    for step in range(12):
        for one in ("a", "b", "c", "d"):
            promote(cloud, TAGS[step % 2], to=one)
    for found in Catalogue.read(cloud).images:
        assert len(found.image.properties) <= QUOTA
    assert {past(cloud, one=one).moves[-1].number for one in ("a", "b", "c", "d")} == {12}


def test_rolling_back_skips_what_is_out_of_service() -> None:
    cloud = cloud_with(*TAGS[:3])
    for tag in TAGS[:3]:
        promote(cloud, tag)
    cloud.images[f"slurm-{TAGS[1]}"]["status"] = "deactivated"
    channel.rollback(cloud, "", "slurm", "stable")
    assert now(cloud) == TAGS[0]


def test_history_that_cannot_be_read_does_not_stop_anybody() -> None:
    cloud = cloud_with(TAGS[0])
    cloud.images[f"slurm-{TAGS[0]}"].update({
        "bakehouse_channel_stable_1": "not JSON", "bakehouse_channel_stable_x": "{}", "bakehouse_channel_b_c_1": "{}",
    })  # fmt: skip
    found = Catalogue.read(cloud).images[0]
    assert [(move.channel, move.number) for move in found.moves] == [("stable", 1)]


def test_a_channel_that_points_to_what_cannot_be_used_says_how_to_go_on() -> None:
    cloud = cloud_with(TAGS[0])
    promote(cloud, TAGS[0])
    cloud.images[f"slurm-{TAGS[0]}"]["status"] = "deactivated"
    with pytest.raises(BakehouseError, match=r"points to .* which is 'deactivated'") as caught:
        channel.current(Catalogue.read(cloud), "slurm", "stable")
    assert "invoke rollback" in caught.value.hint


def test_an_image_is_found_by_tag_beginning_or_name() -> None:
    cloud = cloud_with(*TAGS[:3])
    cloud.images[f"slurm-{TAGS[2]}"][STATE] = "incoming"
    catalogue = Catalogue.read(cloud)
    assert [catalogue.get(wanted).tag for wanted in (TAGS[0], TAGS[1][:8], "slurm")] == [TAGS[0], TAGS[1], TAGS[1]]
    with pytest.raises(BakehouseError, match="fits 3 images"):
        catalogue.get("2026")
    with pytest.raises(BakehouseError, match="there is no image ''"):
        catalogue.get("")


def test_an_image_of_ours_is_known_by_its_mark() -> None:
    cloud = cloud_with(TAGS[0])
    (image,) = Catalogue.read(cloud).images
    assert isinstance(image, Published)
    assert (image.tag, image.name, image.usable) == (TAGS[0], "slurm", True)
