"""Promotion by policy: soaking, CVEs, limits, and what people decided before."""

from __future__ import annotations

import datetime
import json
import time
from pathlib import Path
from typing import Any

import pytest

from bakehouse import channel, promotion
from bakehouse.errors import BakehouseError
from bakehouse.published import Catalogue, Published
from bakehouse.sbom import Package
from bakehouse.settings import Promotion
from bakehouse.store import LocalStore
from tests.fake_glance import NOW, FakeCloud
from tests.samples import add_image
from tests.unit.test_channel import TAGS, cloud_with

ONE, TWO, THREE = TAGS[:3]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def candidate(cloud: FakeCloud, tag: str, *, days_ago: float = 0) -> None:
    cloud.time = NOW - datetime.timedelta(days=days_ago)
    channel.promote(cloud, "", tag, "candidate")
    cloud.time = NOW


def choose(cloud: FakeCloud, store: LocalStore, **policy: Any) -> promotion.Ruling:
    return promotion.choose(Catalogue.read(cloud), "slurm", Promotion(**policy), store, channel.nothing_more)


def chosen(ruling: promotion.Ruling) -> str:
    return ruling.image.tag if ruling.image else ""


def test_an_image_soaks_before_it_is_promoted(store: LocalStore) -> None:
    cloud = cloud_with(ONE)
    assert choose(cloud, store).why == "nothing is newer"
    candidate(cloud, ONE, days_ago=1)
    ruling = choose(cloud, store, soak_nights=3)
    assert (chosen(ruling), ruling.why, ruling.needs_person) == ("", f"{ONE}: it soaks for 2 more nights", False)
    cloud.time = NOW + datetime.timedelta(days=1.8)
    assert chosen(choose(cloud, store, soak_nights=3)) == ONE, "nights do not begin on the minute"
    assert chosen(choose(cloud, store, soak_nights=0)) == ONE


def test_newer_candidates_do_not_keep_one_that_has_soaked(store: LocalStore) -> None:
    cloud = cloud_with(ONE, TWO)
    candidate(cloud, ONE, days_ago=4)
    candidate(cloud, TWO, days_ago=1)
    ruling = choose(cloud, store, soak_nights=3)
    assert chosen(ruling) == ONE
    assert TWO in ruling.why


def test_what_was_never_a_candidate_or_is_older_than_stable_is_left(store: LocalStore) -> None:
    cloud = cloud_with(ONE, TWO, THREE)
    candidate(cloud, ONE, days_ago=9)
    channel.promote(cloud, "", TWO, "stable")
    assert choose(cloud, store).image is None


def test_a_rollback_is_not_undone(store: LocalStore) -> None:
    cloud = cloud_with(ONE, TWO)
    for tag in (ONE, TWO):
        candidate(cloud, tag, days_ago=9)
        channel.promote(cloud, "", tag, "stable")
    channel.rollback(cloud, "", "slurm", "stable")
    assert choose(cloud, store).image is None
    channel.rollback(cloud, "", "slurm", "candidate")
    catalogue = Catalogue.read(cloud)
    assert "already" in promotion.new_candidate(catalogue, catalogue.get(TWO))
    assert "already" in promotion.new_candidate(catalogue, catalogue.get(ONE))


def test_a_candidate_that_was_rolled_back_from_does_not_become_stable(store: LocalStore) -> None:
    cloud = cloud_with(ONE, TWO)
    for tag in (ONE, TWO):
        candidate(cloud, tag, days_ago=9)
    channel.rollback(cloud, "", "slurm", "candidate")
    assert chosen(choose(cloud, store)) == ONE


def test_an_older_image_does_not_become_candidate_after_a_newer_one() -> None:
    cloud = cloud_with(ONE, TWO)
    candidate(cloud, TWO)
    catalogue = Catalogue.read(cloud)
    assert promotion.new_candidate(catalogue, catalogue.get(ONE)) == (
        f"{TWO}, which is newer, has been in candidate already"
    )


@pytest.mark.parametrize(("verified", "why"), [("failed", "failed its verification"), ("none", "not verified")])
def test_only_verified_images_move_channels(store: LocalStore, verified: str, why: str) -> None:
    cloud = cloud_with(ONE, verified=verified)
    catalogue = Catalogue.read(cloud)
    assert why in promotion.new_candidate(catalogue, catalogue.get(ONE))
    channel.promote(cloud, "", ONE, "candidate", force=True)
    ruling = choose(cloud, store, soak_nights=0)
    assert why in ruling.why
    assert ruling.needs_person


def test_a_missing_signature_holds_it_back(store: LocalStore) -> None:
    def refuse(_image: Published) -> None:
        raise BakehouseError("it is not signed")

    cloud = cloud_with(ONE)
    candidate(cloud, ONE, days_ago=9)
    ruling = promotion.choose(Catalogue.read(cloud), "slurm", Promotion(), store, refuse)
    assert (ruling.image, ruling.needs_person) == (None, True)


def test_an_image_that_differs_too_much_is_held_back(store: LocalStore) -> None:
    cloud = cloud_with(ONE, TWO)
    candidate(cloud, ONE, days_ago=9)
    channel.promote(cloud, "", ONE, "stable")
    candidate(cloud, TWO, days_ago=8)
    assert chosen(choose(cloud, store)) == TWO
    assert "not in this store" in choose(cloud, store, max_changed_packages=1).why
    add_image(store, ONE, size=1 << 16, packages=("a", "b", "c"))
    add_image(store, TWO, size=1 << 16, packages=("a", "d"))
    ruling = choose(cloud, store, max_changed_packages=2)
    assert f"3 packages differ from {ONE}, 2 may" in ruling.why
    assert ruling.needs_person
    assert chosen(choose(cloud, store, max_changed_packages=3)) == TWO
    cloud.images[f"slurm-{TWO}"]["size"] = 130
    cloud.images[f"slurm-{ONE}"]["size"] = 100
    assert "30.0 % larger" in choose(cloud, store, max_growth_percent=20).why
    assert chosen(choose(cloud, store, max_growth_percent=30)) == TWO


FEED = {
    "openssl": {
        "CVE-2026-1": {"releases": {"trixie": {"status": "open", "urgency": "high"}}},
        "CVE-2026-2": {"releases": {"trixie": {"status": "resolved", "urgency": "high", "fixed_version": "2.0-1"}}},
        "CVE-2026-3": {"releases": {"trixie": {"status": "resolved", "urgency": "high", "fixed_version": "1.0-1"}}},
        "CVE-2026-4": {"releases": {"trixie": {"status": "open", "urgency": "low"}}},
        "CVE-2026-5": {"releases": {"bookworm": {"status": "open", "urgency": "high"}}},
        "CVE-2026-6": {"releases": {"trixie": {"status": "resolved", "urgency": "high", "fixed_version": "0"}}},
    },
    "other": {"CVE-2026-7": {"releases": {"trixie": {"status": "open", "urgency": "high"}}}},
}


def test_open_cves_are_those_that_the_images_versions_have() -> None:
    bill = {
        "libssl3": Package("libssl3", "1.0-1+b1", "amd64", "openssl", "", source_version="1.0-1"),
        "openssl": Package("openssl", "1.0-1", "amd64", "openssl", ""),
    }
    assert [one.name for one in promotion.open_cves(FEED, bill, "trixie", ["high"])] == ["CVE-2026-1", "CVE-2026-2"]
    assert [one.name for one in promotion.open_cves(FEED, bill, "trixie", ["low"])] == ["CVE-2026-4"]
    assert promotion.open_cves(FEED, {}, "trixie", ["high"]) == []


def test_open_cves_hold_an_image_back(store: LocalStore, tmp_path: Path) -> None:
    feed = tmp_path / "feed.json"
    feed.write_text(json.dumps(FEED))
    cloud = cloud_with(ONE)
    candidate(cloud, ONE, days_ago=9)
    assert "cannot be looked up" in choose(cloud, store, cve_feed=feed).why
    add_image(store, ONE, size=1 << 16, packages=("openssl",))
    ruling = choose(cloud, store, cve_feed=feed)
    assert ruling.why == f"{ONE}: open CVEs: CVE-2026-1 (openssl), CVE-2026-2 (openssl)"
    assert ruling.needs_person
    assert chosen(choose(cloud, store, cve_feed=feed, cve_urgencies=["critical"])) == ONE


def test_a_feed_that_cannot_be_read_holds_all_back(store: LocalStore, tmp_path: Path) -> None:
    cloud = cloud_with(ONE)
    candidate(cloud, ONE, days_ago=9)
    ruling = choose(cloud, store, cve_feed=tmp_path / "none.json")
    assert (ruling.image, ruling.needs_person) == (None, True)
    assert "cannot be read" in ruling.why


@pytest.mark.parametrize("text", ["", "[]", '{"openssl": 1}'])
def test_a_feed_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    feed = tmp_path / "feed.json"
    feed.write_text(text)
    with pytest.raises(BakehouseError, match=r"feed\.json"):
        promotion.read_feed(feed)
    with pytest.raises(BakehouseError, match="cannot be read"):
        promotion.read_feed(tmp_path / "none")
