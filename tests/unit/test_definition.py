"""The definition of a platform: what a plan does beyond its base, in diskimage-builder's order, as one archive."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from bakehouse import definition, plan
from bakehouse.definition import Definition
from bakehouse.errors import BakehouseError
from bakehouse.settings import Settings

PLATFORMS = ["slurm", "roce", "slurm-roce", "kubernetes"]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(store=tmp_path / "store", cache=tmp_path / "cache")


def of(name: str, settings: Settings) -> Definition:
    return definition.of(plan.make(name, settings))


@pytest.mark.parametrize("name", PLATFORMS)
def test_it_holds_what_the_plan_installs_beyond_its_base(name: str, settings: Settings) -> None:
    wanted = plan.make(name, settings)
    base = {package.name for package in plan.make("base", settings).packages}
    found = definition.of(wanted)
    # The kernel is the base's.
    assert set(found.packages) >= {package.name for package in wanted.packages} - base - {"linux-image-amd64"}
    assert (found.kernel == "generic") == ("roce" in name)
    assert found.digest == wanted.digest


def test_steps_stand_in_diskimage_builders_order(settings: Settings) -> None:
    steps = of("slurm", settings).steps
    assert [(step.path, step.kind) for step in steps] == [
        ("install.d/01-package-installs", "packages"),
        ("install.d/10-install-static-files", "static"),
        ("install.d/50-join-agent", "script"),
        ("post-install.d/50-munge-key", "script"),
        ("post-install.d/55-units", "script"),
        ("post-install.d/60-presets", "presets"),
    ]


def test_scripts_change_their_digest_with_what_they_read(settings: Settings) -> None:
    """So that a node that was bootstrapped runs them again when it is told a newer definition."""
    slurm, with_roce = of("slurm", settings), of("slurm-roce", settings)

    def digests(found: Definition) -> dict[str, str]:
        return {step.path: step.digest for step in found.steps if step.kind == "script"}

    assert all(len(digest) == 64 for digest in digests(slurm).values())
    assert digests(slurm).keys() <= digests(with_roce).keys()


def test_units_are_enabled_as_the_presets_say(settings: Settings) -> None:
    presets = of("slurm", settings).presets
    assert presets["bakehouse-agent.path"] is True
    assert presets["slurmctld.service"] is False


def test_a_base_has_no_definition(settings: Settings) -> None:
    with pytest.raises(BakehouseError, match="base has nothing beyond its base"):
        of("base", settings)


@pytest.mark.parametrize("name", ["slurm", "slurm-roce"])
def test_a_bundle_holds_all_that_the_play_needs_and_is_always_the_same(
    name: str, settings: Settings, tmp_path: Path
) -> None:
    bundles = [tmp_path / "one.tar.gz", tmp_path / "two.tar.gz"]
    found, _ = (definition.write_bundle(plan.make(name, settings), bundle) for bundle in bundles)
    assert bundles[0].read_bytes() == bundles[1].read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.tar.gz", "two.tar.gz"], "nothing beside them"
    with tarfile.open(bundles[0]) as archive:
        members = {member.name: member for member in archive}
        told = json.load(archive.extractfile("definition.json") or pytest.fail())
        with tarfile.open(fileobj=archive.extractfile("hooks/static.tar")) as files:
            static = files.getmembers()
    assert told == json.loads(json.dumps(found.as_dict()))
    assert {"site.yml", *(f"tasks/{step['kind']}.yml" for step in told["steps"])} <= members.keys()
    for step in told["steps"]:
        if step["kind"] == "script":
            assert members[f"hooks/{step['name']}"].mode == 0o755
    assert "usr/lib/systemd/system-preset/10-slurm-node.preset" in {member.name for member in static}
    assert not any(member.isdir() for member in static), "folders of the node stay as they are"
    assert {(member.uid, member.gid, member.mtime) for member in [*members.values(), *static]} == {(0, 0, 0)}
    assert "extra-data.d" not in {name.split("/")[1] for name in members if "/" in name}, "that was done here"


def test_what_an_element_cannot_fetch_is_said(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(definition, "_merge", failing_extra_data)
    with pytest.raises(BakehouseError, match=r"extra-data.d/50-fails ended with status 3") as caught:
        definition.write_bundle(plan.make("slurm", settings), tmp_path / "bundle.tar.gz")
    assert "the mirror is away" in caught.value.log
    assert list(tmp_path.iterdir()) == []


def failing_extra_data(_element: object, hooks: Path) -> None:
    script = hooks / "extra-data.d" / "50-fails"
    script.parent.mkdir(exist_ok=True)
    script.write_text("#!/bin/sh\necho the mirror is away; exit 3\n")
    script.chmod(0o755)
