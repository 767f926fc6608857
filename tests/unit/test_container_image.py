"""Container images without building one: what they are made of, what makes them other ones, what is noted of them."""

from __future__ import annotations

import dataclasses
import datetime
import io
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bakehouse import build, container_image, host, manifest, plan
from bakehouse.cache import BaseCache
from bakehouse.container_image import ContainerImage, Order, Shelf
from bakehouse.errors import BakehouseError
from bakehouse.run import CommandError, Log
from bakehouse.settings import Settings

NOW = datetime.datetime(2026, 11, 26, 12, 0, tzinfo=datetime.UTC)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(store=tmp_path / "store", cache=tmp_path / "cache")


@pytest.fixture
def shelf(settings: Settings) -> Shelf:
    return Shelf(BaseCache(settings.cache))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of bootstrap/containers to change."""
    copy = tmp_path / "containers"
    shutil.copytree(container_image.FILES, copy)
    monkeypatch.setattr(container_image, "FILES", copy)
    return copy


def order(name: str, settings: Settings) -> Order:
    return Order(plan.make(name, settings), manifest.resolve("hybrid", manifest.folders(settings.manifests)))


def image(**changed: Any) -> ContainerImage:
    made = ContainerImage(
        key="a" * 64, name="slurm", tag="20261126-aaaaaaa", digest="a" * 64, id="sha256:" + "b" * 64, base="c" * 64,
        created="2026-11-26T12:00:00+00:00", packages={"slurmd": "24.11"}, pushed={},
    )  # fmt: skip
    return dataclasses.replace(made, **changed)


def job(wanted: Order, shelf: Shelf) -> container_image._Build:
    shelf.folder.mkdir(parents=True)
    with Log(shelf.folder / "log") as log:
        nothing: Any = None
        return container_image._Build(wanted, "20261126-aaaaaaa", NOW, shelf, shelf.folder, log, nothing, nothing)


def test_only_what_the_base_image_lacks_is_applied(settings: Settings) -> None:
    definition = order("slurm", settings).definition
    assert definition.base == "hybrid"
    assert [(step.kind, step.path) for step in definition.steps] == [
        ("packages", "install.d/01-package-installs"),
        ("static", "install.d/10-install-static-files"),
        ("script", "post-install.d/50-munge-key"),
        ("script", "post-install.d/55-units"),
        ("presets", "post-install.d/60-presets"),
    ]


def test_what_sets_a_machine_up_belongs_in_the_nodes_image(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(BakehouseError, match="slurm-roce has bare-metal and roce, for the machine itself") as caught:
        container_image.order("slurm-roce", settings)
    assert "by a manifest hybrid of your own" in caught.value.hint
    (tmp_path / "hybrid.yaml").write_text(
        "extends: debian-13\nplatform: base\ncomponents: [non-free-firmware]\nkernel: generic\n"
        "elements: [container-host, bare-metal, roce]\n"
    )
    own = settings.model_copy(update={"manifests": [tmp_path]})
    assert container_image.order("slurm-roce", own).elements == {"slurm-node"}


def test_the_bundle_says_it_in_words_of_a_shell(settings: Settings, shelf: Shelf, tmp_path: Path) -> None:
    wanted = order("slurm", settings)
    bundle = tmp_path / "bundle"
    container_image._write_bundle(job(wanted, shelf), bundle)
    assert (bundle / "steps").read_text().splitlines() == [
        "packages munge slurm-client slurmctld slurmd",
        "static install.d/10-install-static-files",
        "script post-install.d/50-munge-key",
        "script post-install.d/55-units",
    ]
    assert "export DIB_RELEASE=trixie\n" in (bundle / "environment").read_text()
    sources = (bundle / "sources.list").read_text().splitlines()
    assert [line.split()[2:] for line in sources] == [
        [suite, "main"] for suite in ("trixie", "trixie-updates", "trixie-security")
    ]
    for name in ("apply", "bin/sudo", "bin/apt-sources", "bin/image-hygiene", "hooks/post-install.d/55-units"):
        assert os.access(bundle / name, os.X_OK), name


def test_a_pinned_snapshot_is_the_images_time(settings: Settings, shelf: Shelf, tmp_path: Path) -> None:
    (tmp_path / "pinned.yaml").write_text("extends: slurm\nsnapshot: 20261101T000000Z\n")
    pinned = job(order("pinned", settings.model_copy(update={"manifests": [tmp_path]})), shelf)
    assert pinned.epoch(NOW) == "1793491200"
    assert pinned.order.plan.sources()[0].startswith("deb [check-valid-until=no] ")


def test_the_time_can_be_given(settings: Settings, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = job(order("slurm", settings), shelf)
    assert usual.epoch(NOW) == str(int(NOW.timestamp()))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1764000000")
    assert usual.epoch(NOW) == "1764000000"


def test_labels_name_the_plan(settings: Settings, shelf: Shelf) -> None:
    wanted = order("slurm", settings)
    labels = container_image._labels(job(wanted, shelf))
    assert labels["bakehouse_digest"] == wanted.plan.digest
    assert labels["org.opencontainers.image.version"] == "20261126-aaaaaaa"
    assert labels["org.opencontainers.image.created"] == "2026-11-26T12:00:00Z"


def test_all_platforms_of_a_release_share_the_base_root(settings: Settings) -> None:
    slurm, metal, old = (order(name, settings) for name in ("slurm", "slurm-roce", "slurm-debian-12"))
    assert slurm.base_key == metal.base_key != old.base_key
    assert slurm.key != metal.key


@pytest.mark.parametrize(
    ("name", "changes_image", "changes_base"),
    [("slurm/users", True, False), ("apply", True, False), ("without-docs", True, True), ("other/users", False, False)],
)
def test_what_changes_an_image(
    settings: Settings, files: Path, name: str, changes_image: bool, changes_base: bool
) -> None:
    before = order("slurm", settings)
    keys = before.key, before.base_key
    (files / name).parent.mkdir(exist_ok=True)
    with (files / name).open("a") as file:
        file.write("# more\n")
    after = order("slurm", settings)
    assert (after.key != keys[0], after.base_key != keys[1]) == (changes_image, changes_base)


def test_a_platform_without_files_has_no_image(settings: Settings) -> None:
    with pytest.raises(BakehouseError, match="no container images of the platform roce yet") as caught:
        container_image.order("roce", settings)
    assert "slurm" in caught.value.hint


def test_a_missing_tool_is_named_with_its_package(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "missing", lambda wanted: [tool for tool in wanted if tool.name == "buildah"])
    with pytest.raises(BakehouseError, match="this host lacks buildah") as caught:
        container_image.order("slurm", settings)
    assert caught.value.hint == "apt-get install buildah"


def test_tools_are_installed_for_the_tasks_that_need_them() -> None:
    names = {task: {tool.name for tool in host.needed_by([task])} for task in ("bake", "container.build", "test", "")}
    assert not {"buildah", "docker-registry"} & (names["bake"] | names[""])
    assert {"buildah", "docker-registry"} <= names["container.build"] & names["test"]
    assert "systemd-nspawn" not in names["container.build"]
    for words, tool in ((["up", "--path=hybrid"], "buildah"), (["bake", "--builder=packer"], "packer")):
        assert tool in {tool.name for tool in host.needed_by(words)}, words


def test_an_image_is_found_until_its_base_root_is_renewed(settings: Settings, shelf: Shelf) -> None:
    wanted = order("slurm", settings)
    assert container_image.find(wanted, shelf) is None
    made = image(key=wanted.key)
    shelf.write(made)
    assert container_image.find(wanted, shelf) == made
    shelf.cache.bases.mkdir(parents=True)
    root = shelf.cache.root / "root"
    root.write_text("root")
    base = shelf.cache.enter(wanted.base_key, root, {}, NOW)
    assert container_image.find(wanted, shelf) is None
    shelf.write(dataclasses.replace(made, base=base.sha256))
    assert container_image.find(wanted, shelf) is not None


def test_a_note_that_cannot_be_read_is_none(shelf: Shelf) -> None:
    shelf.folder.mkdir(parents=True)
    shelf.note("a" * 64).write_text('{"key": "aaaa"}')
    assert shelf.find("a" * 64) is None
    assert shelf.images() == []


def test_the_storage_is_asked_for_the_image(shelf: Shelf) -> None:
    made = image()
    assert not shelf.holds(made)
    (shelf.storage / "overlay-images" / ("b" * 64)).mkdir(parents=True)
    assert shelf.holds(made)


def test_a_second_image_of_a_day_has_another_tag(settings: Settings, shelf: Shelf) -> None:
    wanted = plan.make("slurm", settings)
    first = container_image._new_tag(wanted, shelf, NOW)
    assert first == f"20261126-{wanted.digest[:7]}"
    shelf.write(image(tag=first))
    assert container_image._new_tag(wanted, shelf, NOW) == f"{first}.2"


def test_what_a_killed_run_left_is_removed_and_said(shelf: Shelf) -> None:
    left = shelf.cache.work / "container+123" / "run"
    left.mkdir(parents=True)
    said = io.StringIO()
    with container_image.opened(shelf, Console(file=said, width=200)):
        assert not left.parent.exists()
    assert "which a killed run had left" in said.getvalue()


def test_a_full_disk_is_said_before_the_build(
    settings: Settings, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container_image, "free_bytes", lambda _: 5 << 20)
    with pytest.raises(BakehouseError, match="only 5 MiB are free"):
        container_image.make(order("slurm", settings), shelf, Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("said", "meaning"),
    [
        (
            "apply: script install.d/50-x\nboom\napply: failed: script install.d/50-x",
            "its step 'script install.d/50-x'",
        ),
        ("E: Unable to locate package frob\napply: failed: packages frob", "the mirror has no package 'frob'"),
        (
            "Err:1 http://m trixie InRelease\n  Could not connect to m:80 (10.0.0.1)",
            "the mirror m:80 cannot be reached",
        ),
        ("write /var/x: no space left on device", "the disk is full"),
    ],
)
def test_why_a_build_failed(tmp_path: Path, said: str, meaning: str) -> None:
    with Log(tmp_path / "log") as log:
        for line in said.splitlines():
            log.write(line)
        error = build.explained(CommandError("buildah", 1, ""), log, "the build", container_image.CAUSES)
    assert error.message.startswith(f"the build failed: {meaning}")
