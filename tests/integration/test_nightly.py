"""Nights with real bakes, the real mirror, and a real Keystone and Glance."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bakehouse import channel, local_cloud
from bakehouse.local_cloud import LocalCloud
from bakehouse.record import Record
from bakehouse.settings import Settings
from tests.integration.conftest import host_cache, host_environment
from tests.integration.shop import Done, Shop, end
from tests.samples import VERIFIED

pytestmark = pytest.mark.slow


class Nights(Shop):
    """A shop whose store begins with the shared bake, said to be verified: verifications have tests of their own."""

    def night(self, *words: str) -> Done:
        return self.run("nightly", "--platform", "slurm", "--no-verify", "--json", *words)

    def channel(self, name: str) -> str:
        current = channel.history(self.catalogue(), "slurm", name).current
        return current.tag if current else ""


@pytest.fixture
def nights(local: LocalCloud, baked: Record, real_settings: Settings, tmp_path: Path) -> Iterator[Nights]:
    made = Nights(tmp_path, local, local.add_member(f"u-{tmp_path.name}", f"p-{tmp_path.name}"))
    made.configure(
        cache=str(real_settings.cache), nights="nights", cloud="here",
        nightly={"attempts": 2, "pause_seconds": 5, "patience_minutes": 3, "promote": {"soak_nights": 0}},
    )  # fmt: skip
    made.add_cloud("here", local.entry(made.member))
    shutil.copytree(real_settings.store / baked.tag, made.store.folder(baked.tag), copy_function=_link_or_copy)
    record = made.store.folder(baked.tag) / "record.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"verification": VERIFIED}))
    yield made
    made.empty()


def _link_or_copy(source: str, target: str) -> None:
    if source.endswith(".qcow2"):
        Path(target).hardlink_to(source)
    else:
        shutil.copy2(source, target)


def age(nights: Nights, tag: str) -> str:
    """Make an image's SBOM say that it has an older version of a package that is not in the base root."""
    path = nights.store.folder(tag) / "sbom.cdx.json"
    bill = json.loads(path.read_text())
    (munge,) = [part for part in bill["components"] if part["name"] == "munge"]
    munge["version"] = "0.5-1"
    path.write_text(json.dumps(bill))
    return f"munge 0.5-1 -> {nights.store.get(tag).versions['munge']}"


def test_what_has_not_changed_is_published_and_promoted_and_then_left_alone(nights: Nights, baked: Record) -> None:
    done = nights.night()
    assert done.status == 0, done.out + done.err
    (image,) = done.json["images"]
    assert (image["state"], image["tag"]) == ("unchanged", baked.tag)
    assert image["channels"] == {"candidate": f"moved to {baked.tag}", "stable": f"moved to {baked.tag}"}
    assert (nights.channel("candidate"), nights.channel("stable")) == (baked.tag, baked.tag)
    again = nights.night()
    assert again.status == 0, again.err
    assert again.json["images"][0]["channels"] == {"stable": "stays where it is: nothing is newer"}
    assert len(nights.images()) == 1
    print(f"a night in which nothing changed took {again.json['seconds']} s")
    outdated = nights.good("outdated", "--cloud", "here", "--check", "--json").json
    assert [(one["tag"], one["channels"], one["newer"]) for one in outdated] == [
        (baked.tag, ["candidate", "stable"], [])
    ]


def test_a_newer_package_is_baked_in_though_the_night_is_killed_meanwhile(nights: Nights, baked: Record) -> None:
    change = age(nights, baked.tag)
    behind = nights.good("outdated", "--json").json
    assert [one["name"] for one in behind[0]["newer"]] == ["munge"]
    started = nights.start("nightly", "--platform", "slurm", "--no-verify")
    assert started.stdout is not None
    for line in started.stdout:
        if "elements ..." in line:
            break
    time.sleep(5)
    started.send_signal(signal.SIGKILL)
    end(started)
    assert nights.images() == []
    done = nights.night()
    assert done.status == 0, done.out + done.err
    (image,) = done.json["images"]
    assert done.json["resumed"] == 1
    assert image["state"] == "built"
    assert image["before"] == baked.tag
    (reason,) = image["reasons"]
    assert reason.startswith("1 package newer on the mirror")
    assert reason.endswith(change)
    assert [(one["name"], one["before"]) for one in image["changes"]] == [("munge", "0.5-1")]
    assert image["channels"]["candidate"] == "stays where it is: it is not verified"
    assert not [*nights.store.root.glob(".incoming*")]
    assert not [*(nights.folder / "cache").glob("work/*")]
    assert [one.name for one in nights.images()] == [f"slurm-{image['tag']}"]
    assert "munge | upgraded | 0.5-1" in (nights.folder / "nights" / done.json["name"] / "summary.md").read_text()


def test_a_glance_that_is_down_for_a_while_is_waited_for(nights: Nights, baked: Record) -> None:
    nights.local.stop("glance", signal.SIGKILL)
    started = nights.start("nightly", "--platform", "slurm", "--no-verify", "--json")
    try:
        time.sleep(25)
        assert started.poll() is None, end(started)
    finally:
        with host_environment():
            local_cloud.up(
                host_cache(), folder=nights.local.folder, name="test", clouds_file=nights.local.clouds_file, tied=True
            )
    done = end(started)
    assert done.status == 0, done.out + done.err
    assert nights.channel("candidate") == baked.tag
    assert len(nights.images()) == 1
