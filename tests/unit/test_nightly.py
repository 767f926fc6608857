"""Nights: with real bakes on fake tools, a mirror that says what a test wants, and a Glance in memory."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from bakehouse import REPOSITORY, apt_index, build, channel, night_report, nightly, publish
from bakehouse.apt_index import Index, Offer
from bakehouse.cloud import Cloud, CloudError
from bakehouse.errors import BakehouseError
from bakehouse.night import ImageNight, Night, Stage, schedule
from bakehouse.published import Catalogue
from bakehouse.record import Record, Verification
from bakehouse.settings import Nightly, Promotion
from tests.conftest import Site
from tests.fake_glance import FakeCloud
from tests.samples import VERIFIED, add_image
from tests.unit.test_channel import TAGS, cloud_with

NAMES = ("slurm", "roce")
TIMELINE = {"moments": [{"name": "agent joined", "seconds": 61.0, "source": "agent"}], "power_on": 0.0}


@dataclass
class Nights:
    """A site with nights."""

    made: Site
    monkeypatch: pytest.MonkeyPatch
    offers: dict[str, tuple[Offer, ...]] = field(default_factory=dict)
    mirror_error: str = ""
    verdicts: list[str] = field(default_factory=list)
    """How the next verifications end; they pass where nothing is said."""
    verified: list[str] = field(default_factory=list)
    joined: float = 61.0
    cloud: FakeCloud | None = None
    policy: dict[str, Any] = field(default_factory=dict)
    webhook: dict[str, Any] = field(default_factory=dict)

    def site(self) -> nightly.Site:
        policy = Nightly(**{"pause_seconds": 0, "patience_minutes": 0.02, **self.policy})
        settings = self.made.settings.model_copy(
            update={"nightly": policy, "nights": self.made.settings.store.parent / "nights", **self.webhook}
        )
        cloud = self.cloud

        def connect() -> Cloud:
            assert cloud is not None
            return cloud

        console = Console(file=self.made.output, width=200)
        return nightly.Site(
            settings,
            self.made.store,
            self.made.cache,
            console,
            self.verify,
            lambda _record: True,
            connect if cloud else None,
        )

    def verify(self, record: Record) -> Record:
        result = self.verdicts.pop(0) if self.verdicts else "passed"
        if result == "broken":
            raise RuntimeError("something that nobody thought of")
        self.verified.append(record.name)
        timeline = {**TIMELINE, "moments": [{"name": "agent joined", "seconds": self.joined, "source": "agent"}]}
        checks = [{"name": "it boots", "passed": result == "passed", "seconds": 1, "detail": "no login prompt"}]
        facts = {**VERIFIED, "result": result, "timeline": timeline, "checks": checks}
        return self.made.store.amend(record.tag, {"verification": Verification.model_validate(facts)})

    def fetch(self, *_: object) -> Index:
        if self.mirror_error:
            raise BakehouseError(self.mirror_error)
        return Index(self.offers)

    def run(self, *names: str, **options: Any) -> Night:
        return nightly.run_night(self.site(), names or NAMES, **options)

    @property
    def said(self) -> str:
        return self.made.output.getvalue()


@pytest.fixture
def nights(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nights]:
    made = Nights(site, monkeypatch)
    monkeypatch.setattr(apt_index, "fetch", made.fetch)
    monkeypatch.setattr(nightly, "CLOUD_PAUSE_SECONDS", 0.01)
    for name in ("SETTLE_SECONDS", "PATIENCE_SECONDS", "ADOPT_SECONDS"):
        monkeypatch.setattr(publish, name, 0.05)
    monkeypatch.setattr(channel, "GIVE_WAY_SECONDS", 0.0)
    yield made


def states(night: Night) -> dict[str, str]:
    return {image.name: image.state for image in night.images}


def test_the_first_night_builds_and_the_second_has_nothing_to_do(nights: Nights) -> None:
    first = nights.run()
    assert states(first) == {"slurm": "built", "roce": "built"}
    assert first.images[0].reasons == ("there is no image of it yet",)
    assert first.images[0].joined == 61.0
    assert nights.verified == ["slurm", "roce"]
    second = nights.run()
    assert states(second) == {"slurm": "unchanged", "roce": "unchanged"}
    assert (second.number, second.name) == (2, f"{first.name}.2")
    assert nights.verified == ["slurm", "roce"], "nothing is verified twice"
    assert [image.tag for image in second.images] == [image.tag for image in first.images]


def test_a_newer_package_outside_the_base_rebuilds_the_image_that_has_it(nights: Nights) -> None:
    nights.run("slurm")
    base = nights.made.store.records()[0].base
    nights.offers = {"slurmd": (Offer("24.11.6-1", "trixie-security"),)}
    night = nights.run("slurm")
    (image,) = night.images
    assert image.state == "built"
    assert image.reasons == (
        "1 package newer on the mirror, 1 of them security updates: slurmd 24.11.5-4 -> 24.11.6-1",
    )
    assert nights.made.store.records()[0].base == base, "the base is as new as the mirror"
    assert image.before
    assert image.before != image.tag


def test_a_newer_package_of_the_base_renews_it_once_for_all(nights: Nights) -> None:
    nights.run("slurm", "base")
    nights.offers = {"slurmd": (Offer("24.11.6-1", "trixie"),), "libc6": (Offer("2.41-13", "trixie"),)}
    calls = (nights.made.fakes / "calls").read_text().count("one")
    night = nights.run("slurm", "base")
    assert states(night) == {"slurm": "built", "base": "built"}
    assert (nights.made.fakes / "calls").read_text().count("one") == calls + 1
    assert "the base root was renewed" in night.images[0].reasons[0]
    assert "2.41-12 -> 2.41-13" in night.images[0].stages[1].detail


def test_a_change_that_is_taken_back_is_built_anew(nights: Nights) -> None:
    folder = nights.made.settings.store.parent / "manifests"
    folder.mkdir()
    nights.made.settings = nights.made.settings.model_copy(update={"manifests": [folder]})
    manifest = folder / "mine.yaml"
    manifest.write_text("extends: slurm\n")
    first = nights.run("mine").images[0]
    manifest.write_text("extends: slurm\npackages: [tree]\n")
    second = nights.run("mine").images[0]
    manifest.write_text("extends: slurm\n")
    third = nights.run("mine").images[0]
    assert nightly.reasons_now(nights.site(), "mine") == []
    assert third.reasons == (f"its inputs are again those of {first.tag}, and {second.tag} is newer",)
    assert third.before == second.tag
    assert nights.run("mine").images[0].state == "unchanged"


def test_one_that_fails_stops_no_other(nights: Nights) -> None:
    folder = nights.made.settings.store.parent / "manifests"
    folder.mkdir()
    (folder / "faulty.yaml").write_text("extends: slurm\npackages: 7\n")
    nights.made.settings = nights.made.settings.model_copy(update={"manifests": [folder]})
    nights.verdicts = ["broken", "failed", "passed"]
    night = nights.run("faulty", "slurm", "roce", "base")
    assert states(night) == {"faulty": "failed", "slurm": "failed", "roce": "failed", "base": "built"}
    faulty, slurm, roce, _ = night.images
    assert "faulty.yaml" in faulty.failure
    assert "a fault of Bakehouse: RuntimeError" in slurm.failure
    assert "something that nobody thought of" in Path(slurm.log).read_text()
    assert roce.failure.startswith(f"{roce.tag} failed its verification: it boots: no login prompt")
    assert [need.partition(":")[0] for need in night.all_needs] == ["faulty", "slurm", "roce"]
    assert [image.name for image in night.failed] == ["faulty", "slurm", "roce"]


def test_one_that_failed_its_verification_is_verified_again_the_next_night(nights: Nights) -> None:
    nights.verdicts = ["failed"]
    assert states(nights.run("slurm")) == {"slurm": "failed"}
    assert states(nights.run("slurm")) == {"slurm": "unchanged"}
    assert nights.verified == ["slurm", "slurm"]


def test_a_bake_that_fails_is_tried_again(nights: Nights) -> None:
    nights.made.behave("mirror")
    night = nights.run("slurm")
    assert "cannot be reached" in night.images[0].failure
    assert nights.said.count("once more in 0 s") == 1
    nights.policy = {"attempts": 1}
    nights.run("slurm")
    assert nights.said.count("once more in 0 s") == 1


def test_a_mirror_that_is_half_updated_is_told(nights: Nights) -> None:
    nights.run("slurm")
    nights.mirror_error = "what the mirror offers cannot be told: hash sum mismatch"
    night = nights.run("slurm")
    assert states(night) == {"slurm": "failed"}
    assert "hash sum mismatch" in night.all_needs[0]
    assert nights.said.count("once more in 0 s") == 1
    nights.mirror_error = ""
    assert states(nights.run("slurm")) == {"slurm": "unchanged"}, "nothing was lost"


def test_a_full_disk_ends_in_a_clear_report(nights: Nights) -> None:
    nights.made.behave("full")
    night = nights.run("slurm")
    assert "the disk is full" in night.images[0].failure
    nights.made.behave("")
    assert states(nights.run("slurm")) == {"slurm": "built"}


def test_a_night_that_cannot_be_written_down_says_so(nights: Nights) -> None:
    (nights.made.settings.store.parent / "nights").write_text("a file")
    with pytest.raises(BakehouseError, match="cannot be written to"):
        nights.run("slurm")


def test_the_last_summary_is_not_taken_for_that_of_a_night_that_does_not_begin(nights: Nights) -> None:
    first = nights.run("slurm")
    book = nights.site().book
    assert (book.root / "last" / "summary.md").exists()
    book.write(first.model_copy(update={"started": first.started + datetime.timedelta(days=2)}))
    with pytest.raises(BakehouseError):
        nights.run("slurm")
    assert not (book.root / "last").exists()


def test_a_clock_that_went_back_is_named(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    first = nights.run("slurm")
    book = nights.site().book
    book.write(first.model_copy(update={"started": first.started + datetime.timedelta(days=2)}))
    with pytest.raises(BakehouseError, match="this host's clock says") as caught:
        nights.run("slurm")
    assert "--clock-is-right" in (caught.value.hint or "")
    assert len(book.nights()[0]) == 1
    assert nights.run("slurm", clock_is_right=True).number == 2
    assert nights.run("slurm").number == 3, "said once and for all"
    book.write(first.model_copy(update={"started": first.started + datetime.timedelta(days=9)}))
    with pytest.raises(BakehouseError, match="this host's clock says"):
        nights.run("slurm")


def test_two_nights_do_not_cross(nights: Nights) -> None:
    def during(record: Record) -> Record:
        with pytest.raises(BakehouseError, match="the night is held by process"):
            nightly.run_night(nights.site(), NAMES)
        return record

    site = nights.site()
    site.verify = during
    nightly.run_night(site, ("slurm",))


@pytest.mark.parametrize("stage", ["base root", "elements", "verify", "publish", "promote"])
def test_a_night_that_was_killed_goes_on(nights: Nights, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """It is ended at once in the second image's stage, as by a signal that nobody handles."""

    class KilledError(BaseException):
        pass

    nights.cloud = FakeCloud()
    before = len(nights.said)

    def kill(*_: object, **__: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        of_second = [0]

        def second(act: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*words: Any, **named: Any) -> Any:
                of_second[0] += 1
                return kill() if of_second[0] == 2 else act(*words, **named)

            return wrapped

        if stage == "verify":
            site_verify = second(nights.verify)
            patch.setattr(nights, "verify", site_verify)
        else:
            module: Any
            module, name = {
                "base root": (build, "_base_root"), "elements": (build, "_elements"),
                "publish": (publish, "publish"), "promote": (channel, "promote"),
            }[stage]  # fmt: skip
            patch.setattr(module, name, second(getattr(module, name)))
        with pytest.raises(KilledError):
            nights.run()
    (unfinished,) = nights.site().book.nights()[0]
    assert unfinished.ended is None
    night = nights.run()
    assert (night.name, night.resumed) == (unfinished.name, 1)
    assert states(night) == {"slurm": "built", "roce": "built"}
    assert nights.said[before:].count("Baking slurm") == 1, "what was done is not done again"
    assert sorted(nights.verified) == ["roce", "slurm"]
    assert len(nights.cloud.images) == 2, "no orphan"
    assert all(image["status"] == "active" for image in nights.cloud.images.values())
    catalogue = Catalogue.read(nights.cloud)
    assert all(channel.history(catalogue, name, "candidate").current for name in NAMES)
    assert len(nights.made.store.records()) == 2


def test_a_night_of_long_ago_is_not_gone_on_with(nights: Nights) -> None:
    book = nights.site().book
    long_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=30)
    book.begin(long_ago, host="here", executor="local", names=("slurm",), cloud="")
    night = nights.run("slurm")
    assert (night.number, night.resumed) == (2, 0)


def test_images_are_published_and_promoted_by_policy(nights: Nights) -> None:
    nights.cloud = FakeCloud()
    nights.cloud.time = datetime.datetime.now(datetime.UTC)
    nights.policy = {"promote": Promotion(soak_nights=2)}
    first = nights.run("slurm")
    (image,) = first.images
    assert image.channels == {
        "candidate": f"moved to {image.tag}", "stable": f"stays where it is: {image.tag}: it soaks for 2 more nights",
    }  # fmt: skip
    assert image.points_to == {"candidate": image.tag}
    nights.cloud.time += datetime.timedelta(days=2)
    (again,) = nights.run("slurm").images
    assert again.channels == {"stable": f"moved to {image.tag}"}
    assert again.points_to == {"candidate": image.tag, "stable": image.tag}
    assert again.stages[-2].result == "skipped"
    assert again.ages["stable"] > 86400
    (last,) = nights.run("slurm").images
    assert last.channels == {"stable": "stays where it is: nothing is newer"}


def test_one_that_failed_is_not_published(nights: Nights) -> None:
    nights.cloud = FakeCloud()
    nights.verdicts = ["failed"]
    nights.run("slurm")
    assert nights.cloud.images == {}


def test_a_cloud_that_is_away_for_a_while_is_waited_for(nights: Nights) -> None:
    cloud = FakeCloud()
    tried = []

    def connect() -> Cloud:
        tried.append(1)
        if len(tried) < 4:
            raise CloudError("here does not answer")
        return cloud

    nights.policy = {"patience_minutes": 1}
    site = nights.site()
    site.connect = connect
    night = nightly.run_night(site, ("slurm",))
    assert states(night) == {"slurm": "built"}
    assert night.images[0].published
    assert nights.said.count("waiting for up to") == 1


def test_a_cloud_that_stays_away_fails_the_night_and_the_next_one_publishes(nights: Nights) -> None:
    nights.cloud = FakeCloud()

    def connect() -> Cloud:
        raise CloudError("here does not answer")

    site = nights.site()
    site.connect = connect
    night = nightly.run_night(site, NAMES)
    assert states(night) == {"slurm": "failed", "roce": "failed"}
    assert night.images[1].failure.startswith("here does not answer")
    again = nights.run()
    assert states(again) == {"slurm": "unchanged", "roce": "unchanged"}
    assert len(nights.cloud.images) == 2


def test_one_whose_upload_breaks_each_time_keeps_no_other_from_the_cloud(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    nights.cloud = FakeCloud()
    sent = publish.publish

    def break_off(record: Record, *words: Any, **named: Any) -> publish.Done:
        if record.name == "slurm":
            raise CloudError("the connection broke", status=504)
        return sent(record, *words, **named)

    monkeypatch.setattr(publish, "publish", break_off)
    night = nights.run()
    assert states(night) == {"slurm": "failed", "roce": "built"}
    assert night.images[0].failure == "the connection broke"
    assert night.images[1].channels["candidate"].startswith("moved to")


def test_an_image_that_was_removed_before_the_night_goes_on_is_built_again(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(nightly, "_verify", kill)
        with pytest.raises(KeyboardInterrupt):
            nights.run("slurm")
    nights.made.store.remove(nights.made.store.records()[0])
    night = nights.run("slurm")
    assert (night.resumed, states(night)) == (1, {"slurm": "built"})


def test_what_the_cloud_has_stays_in_the_store(nights: Nights) -> None:
    """Its SBOM is wanted. Where the cloud is away, all that was ever published stays."""
    for tag in TAGS:
        published = {"cloud": "here", "region": "", "project": "p", "id": tag, "name": tag, "format": "qcow2",
                     "at": "2026-01-01T00:00:00Z"}  # fmt: skip
        created = f"{tag[:4]}-{tag[4:6]}-{tag[6:8]}T00:00:00Z"
        add_image(nights.made.store, tag, size=1 << 16, created=created, published=[published])
    nights.policy = {"keep": 1}
    nights.run("slurm")
    assert set(TAGS) <= {record.tag for record in nights.made.store.records()}
    nights.cloud = cloud_with(TAGS[0])
    channel.promote(nights.cloud, "", TAGS[0], "stable")
    nights.run("slurm")
    assert set(TAGS) & {record.tag for record in nights.made.store.records()} == {TAGS[0]}


def test_a_package_that_stays_behind_is_told_once(nights: Nights) -> None:
    """Something in the image holds it back: it is not built anew each night for that."""
    nights.run("slurm")
    nights.offers = {"slurmd": (Offer("99-1", "trixie"),)}
    assert states(nights.run("slurm")) == {"slurm": "built"}
    assert states(nights.run("slurm")) == {"slurm": "unchanged"}
    nights.offers = {"slurmd": (Offer("99-2", "trixie"),)}
    assert states(nights.run("slurm")) == {"slurm": "built"}


def test_a_refusal_of_the_cloud_is_not_waited_for(nights: Nights) -> None:
    nights.cloud = FakeCloud()
    nights.policy = {"patience_minutes": 60}
    nights.cloud.fail("POST", 403, "quota", times=1)
    night = nights.run()
    assert states(night) == {"slurm": "failed", "roce": "built"}
    assert "quota" in night.images[0].failure


def test_old_images_go_and_needed_ones_stay(nights: Nights) -> None:
    nights.cloud = cloud_with(*TAGS)
    nights.cloud.servers = []
    for tag in TAGS:
        add_image(nights.made.store, tag, size=1 << 16, created=f"{tag[:4]}-{tag[4:6]}-{tag[6:8]}T00:00:00Z")
    channel.promote(nights.cloud, "", TAGS[0], "stable")
    nights.policy = {"keep": 3}
    night = nights.run("slurm")
    new = night.images[0].tag
    assert [record.tag for record in nights.made.store.records()] == [new, TAGS[4], TAGS[3], TAGS[0]]
    assert {image["bakehouse_tag"] for image in nights.cloud.images.values()} == {new, TAGS[4], TAGS[3], TAGS[0]}
    assert sorted(night.pruned) == [
        f"slurm {tag} from the {where}" for tag in TAGS[1:3] for where in ("cloud", "store")
    ]
    assert night.all_needs == []


def test_nothing_is_pruned_where_it_is_not_known_what_servers_use(nights: Nights) -> None:
    nights.cloud = cloud_with(*TAGS)
    nights.cloud.servers = []
    nights.cloud.may_see_all_servers = False
    nights.cloud.images[f"slurm-{TAGS[0]}"]["visibility"] = "community"
    nights.policy = {"keep": 1}
    night = nights.run("slurm")
    assert len(nights.cloud.images) == len(TAGS) + 1
    assert "nothing was pruned in the cloud: which images servers use is not all known" in night.all_needs[0]
    for image in nights.cloud.images.values():
        image["visibility"] = "private"
    assert nights.run("slurm").all_needs == []
    assert len(nights.cloud.images) < len(TAGS)


def test_images_that_failed_do_not_push_out_good_ones(nights: Nights) -> None:
    for tag, verified in zip(TAGS, ["passed", "failed", "failed", "failed", "failed"], strict=True):
        created = f"{tag[:4]}-{tag[4:6]}-{tag[6:8]}T00:00:00Z"
        add_image(nights.made.store, tag, size=1 << 16, created=created, verified=verified)
    nights.verdicts = ["failed"]
    nights.policy = {"keep": 1}
    nights.run("slurm")
    assert TAGS[0] in {record.tag for record in nights.made.store.records()}


def test_a_boot_that_became_slow_is_told(nights: Nights) -> None:
    for number in range(4):
        nights.offers = {"slurmd": (Offer(f"24.11.{6 + number}-1", "trixie"),)}
        night = nights.run("slurm")
        assert night.all_needs == []
    nights.joined = 100
    nights.offers = {"slurmd": (Offer("25.1-1", "trixie"),)}
    night = nights.run("slurm")
    assert night.all_needs == ["slurm: it took 100 s to join, 61 s is the median of 4 boots before"]
    folder = nights.site().book.folder(night.name)
    plot = (folder / night_report.PLOT).read_text()
    assert plot.count("<svg") == 1
    assert "slurm: seconds to joined" in plot
    assert "100 s (before: 61 to 61 s)" in (folder / night_report.MARKDOWN).read_text()


def test_the_summary_is_for_people_ci_and_programs(nights: Nights) -> None:
    nights.verdicts = ["passed", "failed"]
    night = nights.run()
    folder = nights.site().book.folder(night.name)
    text = (folder / night_report.MARKDOWN).read_text()
    assert "## Needs a person" in text
    assert "| slurm | built |" in text
    assert "there is no image of it yet" in text
    suites = ElementTree.parse(folder / night_report.JUNIT).getroot()
    cases = {(case.get("classname"), case.get("name")): case for case in suites.iter("testcase")}
    failure = cases["nightly.roce", "verify"].find("failure")
    assert failure is not None
    assert "no login prompt" in failure.get("message", "")
    assert [suite.get("failures") for suite in suites] == ["0", "1"]
    last = folder.parent / "last"
    assert json.loads((last / "summary.json").read_text())["failed"] == ["roce"]
    assert {path.name for path in last.iterdir()} == {
        "summary.md", "summary.json", "junit.xml", "joined.svg", "slurm.cdx.json", "slurm.record.json", "roce.cdx.json",
        "roce.record.json",
    }  # fmt: skip
    assert len(nights.site().book.nights()[0]) == 1
    night_report.show(Console(file=nights.made.output, width=200), night, [])
    assert "Needs a person" in nights.said


def made_of(seconds: Sequence[float]) -> list[ImageNight]:
    return [
        ImageNight(name=f"i{number}", state="built", stages=(Stage(name="bake", result="done", seconds=one),))
        for number, one in enumerate(seconds)
    ]


def test_the_schedule_of_several_builders_is_that_of_a_queue() -> None:
    slots = schedule([*made_of([30, 10, 10, 20]), ImageNight(name="other", state="unchanged")], 2)
    assert [(slot.builder, slot.start, slot.end) for slot in slots] == [
        (1, 0, 30),
        (2, 0, 10),
        (2, 10, 20),
        (2, 20, 40),
    ]
    assert max(slot.end for slot in schedule(made_of([25] * 4), 2)) == 0.5 * max(
        slot.end for slot in schedule(made_of([25] * 4), 1)
    )


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=12), st.integers(1, 5))
def test_a_schedule_has_each_image_once_and_no_builder_two_at_a_time(seconds: list[float], builders: int) -> None:
    slots = schedule(made_of(seconds), builders)
    assert [slot.name for slot in slots] == [f"i{number}" for number in range(len(seconds))]
    end = max(slot.end for slot in slots)
    assert end >= max(sum(seconds) / builders, *seconds) - 1
    for number in range(1, builders + 1):
        own = sorted((slot.start, slot.end) for slot in slots if slot.builder == number)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(own))


# Metrics and the webhook ----------------------------------------------------------------------------------------------


class Hook(BaseHTTPRequestHandler):
    """Takes summaries; answers with what a test has laid down, then with 204."""

    answers: ClassVar[list[int]] = []
    taken: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).taken.append((self.headers.get("Authorization", ""), body))
        status = type(self).answers.pop(0) if type(self).answers else 204
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:1/")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[str]:
    Hook.answers, Hook.taken = [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/hooks/xyzzy"
    server.shutdown()
    server.server_close()


def test_the_summary_goes_to_the_webhook_with_its_token(nights: Nights, hook: str, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("s3cret\n")
    Hook.answers = [503, 429]
    nights.webhook = {"webhook": hook, "webhook_token_file": token}
    night = nights.run("slurm")
    assert night.untold == ()
    assert len(Hook.taken) == 3, "tried again"
    said, body = Hook.taken[-1]
    assert said == "Bearer s3cret"
    assert body["verdict"].startswith("1 images: 1 built")
    assert body["images"][0]["name"] == "slurm"


@pytest.mark.parametrize(("answer", "why"), [(403, "refused the summary: status 403"), (302, "sends elsewhere")])
def test_a_webhook_that_refuses_is_told_without_its_path(nights: Nights, hook: str, answer: int, why: str) -> None:
    Hook.answers = [answer]
    nights.webhook = {"webhook": hook}
    night = nights.run("slurm")
    assert why in night.untold[0]
    assert "xyzzy" not in night.untold[0]
    assert len(Hook.taken) == 1
    assert night.untold[0] in night.all_needs
    assert states(night) == {"slurm": "built"}


def test_metrics_are_what_the_night_came_to(nights: Nights, tmp_path: Path) -> None:
    path = tmp_path / "collector" / "bakehouse-slurm+roce.prom"
    nights.cloud = FakeCloud()
    nights.cloud.time = datetime.datetime.now(datetime.UTC)
    nights.policy = {"metrics": path.with_name("bakehouse-{images}.prom")}
    first = nights.run()
    nights.offers = {"slurmd": (Offer("24.11.6-1", "trixie"),)}
    nights.verdicts = ["failed"]
    nights.run()
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(path.read_text())
        for sample in family.samples
    }
    assert found["bakehouse_image_failed", "slurm"] == 1
    assert found["bakehouse_image_failed", "roce"] == 0
    assert found["bakehouse_image_verified", "slurm"] == 0
    assert first.ended is not None
    assert found["bakehouse_image_last_success_timestamp_seconds", "slurm"] == first.ended.timestamp()
    assert found["bakehouse_image_joined_seconds", "tcg", "roce"] == 61
    assert found["bakehouse_image_size_bytes", "roce"] > 0
    assert abs(found["bakehouse_channel_image_created_timestamp_seconds", "candidate", "roce"] - time.time()) < 300
    assert found["bakehouse_image_stage_duration_seconds", "roce", "verify"] >= 0


def test_metrics_that_cannot_be_written_are_told(nights: Nights, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    nights.policy = {"metrics": tmp_path / "file" / "bakehouse.prom", "images": ["slurm"]}
    assert "cannot be written" in nights.run("slurm").untold[0]


def test_a_night_for_some_images_leaves_the_metrics_of_all(nights: Nights, tmp_path: Path) -> None:
    nights.policy = {"metrics": tmp_path / "bakehouse.prom", "images": [*NAMES]}
    nights.run()
    before = (tmp_path / "bakehouse.prom").read_text()
    nights.run("slurm")
    assert (tmp_path / "bakehouse.prom").read_text() == before


# The task -------------------------------------------------------------------------------------------------------------


def task(site: Site, *words: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OS_")} | {
        "BAKEHOUSE_STORE": str(site.settings.store), "BAKEHOUSE_CACHE": str(site.settings.cache),
        "BAKEHOUSE_NIGHTS": str(site.settings.store.parent / "nights"),
        "BAKEHOUSE_NIGHTLY": "{images: [slurm], attempts: 1}",
    }  # fmt: skip
    command = [sys.executable, "-m", "invoke", "--search-root", str(REPOSITORY), *words]
    pipe, folder = subprocess.PIPE, site.settings.store.parent
    return subprocess.Popen(command, env=environment, text=True, stdout=pipe, stderr=pipe, cwd=folder)


@pytest.mark.slow
def test_a_killed_task_goes_on_and_says_how_it_ended(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.behave("pause")
    started = task(site, "nightly", "--no-verify")
    deadline = time.monotonic() + 60
    while not (site.fakes / "paused").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    started.send_signal(signal.SIGKILL)
    started.communicate()
    site.behave("fail")
    failing = task(site, "nightly", "--no-verify")
    out, err = failing.communicate()
    assert failing.returncode == 1, out + err
    assert "goes on" in out
    assert "1 of 1 images failed: slurm" in err
    site.behave("")
    good = task(site, "nightly", "--no-verify", "--json")
    out, err = good.communicate()
    assert good.returncode == 0, out + err
    assert json.loads(out)["images"][0]["state"] == "built"
    listed = task(site, "nightly.list", "--json").communicate()[0]
    assert [night["resumed"] for night in json.loads(listed)] == [0, 1]


def test_a_manifest_that_is_not_there_is_named(site: Site) -> None:
    started = task(site, "nightly", "--platform", "slurmm")
    _, err = started.communicate()
    assert started.returncode == 1
    assert "there is no manifest slurmm" in err


# Slurm, a fake one; tests/integration/test_nightly_slurm.py asks the same of the real one. ---------------------------

SBATCH = """#!/bin/bash
here=$(dirname "$0")
script=${!#}
for word in "$@"; do
    case ${word} in --array=0-*) last=${word#--array=0-} ;; --output=*) output=${word#--output=} ;; esac
done
echo "$@" >> "${here}/asked"
[ ! -e "${here}/refuse" ] || { echo "sbatch: error: invalid partition specified: build" >&2; exit 1; }
touch "${here}/running"
(
    for number in $(seq 0 "${last}"); do
        [ "$(cat "${here}/lose" 2>/dev/null)" = "${number}" ] && continue
        SLURM_ARRAY_TASK_ID=${number} bash "${script}" > "${output//%A_%a/7_${number}}" 2>&1
    done
    rm -f "${here}/running"
) > /dev/null 2>&1 &
echo "7;cluster"
"""
SQUEUE = """#!/bin/bash
here=$(dirname "$0")
case "$*" in
    *--states=all*) printf '0 COMPLETED\\n1 NODE_FAIL\\n' ;;
    *) [ ! -e "${here}/running" ] || echo 7_0 ;;
esac
"""


@pytest.fixture
def slurm(site: Site) -> Site:
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", "#!/bin/bash\n")):
        (site.fakes / name).write_text(text)
        (site.fakes / name).chmod(0o755)
    return site


def on_slurm(site: Site, *names: str) -> tuple[int, dict[str, Any], str]:
    words = [word for name in names for word in ("--platform", name)]
    started = task(site, "nightly", "--executor", "slurm", "--no-verify", "--json", *words)
    out, err = started.communicate(timeout=240)
    return started.returncode, json.loads(out) if out.startswith("{") else {}, err


@pytest.mark.slow
def test_bakes_are_tasks_of_one_job_and_their_results_are_gathered(slurm: Site) -> None:
    status, night, err = on_slurm(slurm, "slurm", "roce")
    assert status == 0, err
    assert {image["name"]: image["state"] for image in night["images"]} == {"slurm": "built", "roce": "built"}
    assert len(slurm.store.records()) == 2
    (asked,) = (slurm.fakes / "asked").read_text().splitlines()
    assert "--array=0-1" in asked
    assert "--requeue" in asked
    assert not [*(slurm.store.root.parent / "nights").glob("*/slurm-job")]


@pytest.mark.slow
def test_a_task_that_ends_without_a_result_is_told(slurm: Site) -> None:
    (slurm.fakes / "lose").write_text("1")
    status, night, err = on_slurm(slurm, "slurm", "roce")
    assert status == 1
    assert "1 of 2 images failed: roce" in err
    assert "ended without a result (NODE_FAIL)" in night["images"][1]["stages"][-1]["detail"]
    assert night["images"][0]["state"] == "built"


@pytest.mark.slow
def test_a_job_that_slurm_refuses_is_told_and_the_night_can_be_started_again(slurm: Site) -> None:
    (slurm.fakes / "refuse").touch()
    status, _, err = on_slurm(slurm, "slurm")
    assert status == 1
    assert "invalid partition specified: build" in err
    (slurm.fakes / "refuse").unlink()
    status, night, err = on_slurm(slurm, "slurm")
    assert (status, night["resumed"]) == (0, 1), err
