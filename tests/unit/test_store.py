"""The store: images come whole or not at all, and are found by tag, part of a tag, or name."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import pytest

from bakehouse.errors import BakehouseError
from bakehouse.record import FILE_NAME, Publication, Record
from bakehouse.store import LocalStore

PUBLICATION = Publication(
    cloud="here",
    region="",
    project="p",
    id="x",
    name="slurm",
    format="qcow2",
    at=datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
)


def record(tag: str, *, name: str = "slurm", created: str = "2026-01-01T12:00:00Z", **changes: Any) -> Record:
    return Record.model_validate(
        {
            "name": name, "platform": "slurm", "tag": tag, "digest": "0" * 64, "inputs": {}, "created": created,
            "commit": "", "distribution": "debian", "release": "trixie", "architecture": "amd64", "kernel": "6.12",
            "firmware": ["bios"], "root_size": 1, "root_used": 1, "sbom": "sbom.cdx.json", "sbom_sha256": "",
            "files": [
                {"format": kind, "file": f"{name}-{tag}.{kind}", "size": 4, "virtual_size": 9, "sha256": "",
                 "sha512": ""}
                for kind in ("qcow2", "raw")
            ],
            "package_count": 1, "versions": {}, "base": {"key": "", "sha256": "", "created": created}, "steps": [],
            "usage": {"peak_memory": 1, "disk": 1, "cpu_seconds": 1}, "builder": {}, **changes,
        }
    )  # fmt: skip


def add(store: LocalStore, made: Record) -> Record:
    with store.adding(made.name, made.tag) as folder:
        for file in made.files:
            (folder / file.file).write_bytes(b"x" * file.size)
        (folder / FILE_NAME).write_text(made.model_dump_json())
    return made


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def hidden(store: LocalStore) -> list[str]:
    return [path.name for path in store.root.glob(".*")]


def test_a_store_that_is_not_there_is_empty(store: LocalStore) -> None:
    assert (store.records(), store.damaged(), store.leftovers("slurm")) == ([], [], [])
    assert not store.root.exists()


def test_an_image_is_there_when_it_is_whole(store: LocalStore) -> None:
    made = record("20260101-aaaaaaa")
    with store.adding("slurm", made.tag) as folder:
        (folder / FILE_NAME).write_text(made.model_dump_json())
        assert store.records() == []
        assert not store.folder(made.tag).exists()
    assert store.records() == [made]
    assert hidden(store) == []


def test_an_image_that_fails_half_way_leaves_nothing(store: LocalStore) -> None:
    def fail() -> None:
        with store.adding("slurm", "20260101-aaaaaaa") as folder:
            (folder / FILE_NAME).write_text(record("20260101-aaaaaaa").model_dump_json())
            raise RuntimeError("no space")

    with pytest.raises(RuntimeError, match="no space"):
        fail()
    assert list(store.root.iterdir()) == []


def test_an_image_without_a_record_is_refused(store: LocalStore) -> None:
    with (
        pytest.raises(BakehouseError, match="no record was written for 20260101-aaaaaaa"),
        store.adding("slurm", "20260101-aaaaaaa") as folder,
    ):
        (folder / "image.qcow2").write_bytes(b"x")
    assert list(store.root.iterdir()) == []


def test_what_a_killed_run_left_is_replaced(store: LocalStore) -> None:
    stale = store.root / ".incoming-slurm+20260101-aaaaaaa"
    stale.mkdir(parents=True)
    (stale / "half.qcow2").write_bytes(b"x")
    made = add(store, record("20260101-aaaaaaa"))
    assert "half.qcow2" not in {path.name for path in store.folder(made.tag).iterdir()}


def test_leftovers_are_a_manifests_own(store: LocalStore) -> None:
    for name in (".incoming-slurm+1", ".incoming-slurm-gpu+1", ".incoming-slurm+removed-2", "20260101-aaaaaaa"):
        (store.root / name).mkdir(parents=True)
    assert sorted(path.name for path in store.leftovers("slurm")) == [".incoming-slurm+1", ".incoming-slurm+removed-2"]
    assert [path.name for path in store.leftovers("slurm-gpu")] == [".incoming-slurm-gpu+1"]


def test_the_newest_image_comes_first(store: LocalStore) -> None:
    for tag, created in (("b", "2026-01-02T00:00:00Z"), ("c", "2026-01-01T00:00:00Z"), ("a", "2026-01-03T00:00:00Z")):
        add(store, record(tag, created=created))
    assert [found.tag for found in store.records()] == ["a", "b", "c"]


@pytest.fixture
def filled(store: LocalStore) -> LocalStore:
    add(store, record("20260101-aaaaaaa", created="2026-01-01T00:00:00Z"))
    add(store, record("20260101-aaaaaaa.2", created="2026-01-01T01:00:00Z"))
    add(store, record("20260102-bbbbbbb", created="2026-01-02T00:00:00Z"))
    add(store, record("20260103-ccccccc", name="slurm-gpu", created="2026-01-03T00:00:00Z"))
    return store


@pytest.mark.parametrize(
    ("wanted", "tag"),
    [
        ("20260102-bbbbbbb", "20260102-bbbbbbb"),
        ("20260102", "20260102-bbbbbbb"),
        ("20260101-aaaaaaa", "20260101-aaaaaaa"),
        ("20260101-aaaaaaa.", "20260101-aaaaaaa.2"),
        ("slurm", "20260102-bbbbbbb"),
        ("slurm-gpu", "20260103-ccccccc"),
    ],
)
def test_an_image_is_found_by_tag_beginning_or_name(filled: LocalStore, wanted: str, tag: str) -> None:
    assert filled.get(wanted).tag == tag


def test_a_beginning_that_fits_several_images_names_them(filled: LocalStore) -> None:
    with pytest.raises(BakehouseError, match=r"'20260101' fits 2 images: 20260101-aaaaaaa\.2, 20260101-aaaaaaa "):
        filled.get("20260101")


@pytest.mark.parametrize("wanted", ["", "2027", "slurmgpu"])
def test_an_image_that_is_not_there_is_said_so(filled: LocalStore, wanted: str) -> None:
    with pytest.raises(BakehouseError, match=f"there is no image '{wanted}' in {filled.root}") as caught:
        filled.get(wanted)
    assert "invoke images" in caught.value.hint


def test_an_empty_store_says_how_to_bake(store: LocalStore) -> None:
    with pytest.raises(BakehouseError) as caught:
        store.get("slurm")
    assert "invoke bake" in caught.value.hint


def test_an_image_file_is_given_by_format(store: LocalStore) -> None:
    made = add(store, record("20260101-aaaaaaa"))
    assert store.image(made).name == "slurm-20260101-aaaaaaa.qcow2"
    assert store.image(made, "raw").name == "slurm-20260101-aaaaaaa.raw"
    with pytest.raises(BakehouseError, match="has no vmdk file, only qcow2, raw"):
        store.image(made, "vmdk")


def test_an_image_file_that_is_gone_or_cut_is_not_given(store: LocalStore) -> None:
    made = add(store, record("20260101-aaaaaaa"))
    store.image(made, "raw").write_bytes(b"xx")
    with pytest.raises(BakehouseError, match="raw has 2 bytes in place of 4") as caught:
        store.image(made, "raw")
    assert "images.remove 20260101-aaaaaaa" in caught.value.hint
    store.image(made, "qcow2").unlink()
    with pytest.raises(BakehouseError, match="qcow2 is gone"):
        store.image(made)


def test_a_removed_image_is_gone_and_says_what_it_freed(store: LocalStore) -> None:
    made = add(store, record("20260101-aaaaaaa"))
    other = add(store, record("20260102-bbbbbbb"))
    (store.folder(made.tag) / "big").write_bytes(b"x" * (1 << 20))
    assert (1 << 20) <= store.remove(made) < (2 << 20)
    assert store.records() == [other]
    assert sorted(path.name for path in store.root.iterdir()) == [other.tag]


# What is found out later.


def test_what_is_found_out_later_goes_into_the_record(store: LocalStore) -> None:
    made = add(store, record("20260101-aaaaaaa"))
    add(store, record("20260102-bbbbbbb"))
    amended = store.amend(made.tag, {"kernel": "6.13", "published": [PUBLICATION]})
    assert (amended.kernel, amended.published, amended.files) == ("6.13", [PUBLICATION], made.files)
    assert store.get(made.tag) == amended
    assert store.get("20260102-bbbbbbb").kernel == made.kernel
    assert store.get(made.tag) == store.amend(made.tag, {}), "nothing more, nothing less"


def test_what_somebody_else_found_out_meanwhile_stays(store: LocalStore) -> None:
    made = add(store, record("20260101-aaaaaaa"))
    store.amend(made.tag, {"published": [PUBLICATION]})
    assert store.amend(made.tag, {"kernel": "6.13"}).published == [PUBLICATION]


def test_a_record_is_replaced_whole_or_not_at_all(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    made = add(store, record("20260101-aaaaaaa"))
    before = (store.folder(made.tag) / FILE_NAME).read_text()

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        store.amend(made.tag, {"kernel": "6.13"})
    assert (store.folder(made.tag) / FILE_NAME).read_text() == before
    assert store.records() == [made]


def test_an_image_that_is_gone_meanwhile_is_not_amended(store: LocalStore) -> None:
    made = add(store, record("20260101-aaaaaaa"))
    store.remove(made)
    with pytest.raises(BakehouseError, match=r"record\.json cannot be read"):
        store.amend(made.tag, {"kernel": "6.13"})
    assert not store.folder(made.tag).exists()


def test_a_tag_is_used_once(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    names = iter(["a", "a", "b", "a", "c", "d"])

    def choose() -> str:
        return next(name for name in names if not store.taken(name))

    with store.claiming(choose) as first, store.claiming(choose) as second:
        assert (first, second) == ("a", "b"), "of two at once each has its own"
        store.folder("a").mkdir()
    assert store.taken("a")
    assert not store.taken("b"), "no image came of it"
    store.folder("a").rmdir()
    with store.claiming(choose) as third:
        assert third == "c", "that of an image that is gone is not used again"
