"""The cache: what it holds, what goes first, and files that are whole or not there."""

from __future__ import annotations

import datetime
import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from bakehouse import cache, waiting
from bakehouse.cache import FRESH_DAYS, BaseCache

NOW = datetime.datetime(2026, 6, 1, 12, 0, tzinfo=datetime.UTC)
KIB = 1024


@pytest.fixture
def held(tmp_path: Path) -> BaseCache:
    return BaseCache(tmp_path / "cache")


def age(path: Path, days: float) -> None:
    then = (NOW - datetime.timedelta(days=days)).timestamp()
    os.utime(path, (then, then))


def add_base(held: BaseCache, key: str, days: float, size: int = 64 * KIB) -> None:
    held.bases.mkdir(parents=True, exist_ok=True)
    made = held.root / "made"
    made.write_bytes(os.urandom(size))
    held.enter(key, made, {"manifest release": "trixie"}, NOW)
    age(held.tarball(key), 500)
    age(held.bases / f"{key}.json", days)


def add_deb(held: BaseCache, name: str, days: float, size: int = 64 * KIB) -> Path:
    path = held.debs("trixie") / f"{name}.deb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(size))
    age(path, days)
    return path


def total(held: BaseCache) -> int:
    return sum(entry.size for entry in held.entries())


def test_an_empty_cache_holds_nothing(held: BaseCache) -> None:
    assert held.entries() == []
    assert held.prune(0, NOW) == []
    assert held.find("debian-trixie-0") is None
    assert held.check("debian-trixie-0") == (None, "")


def test_everything_in_it_is_listed_the_longest_unused_first(held: BaseCache) -> None:
    add_base(held, "debian-trixie-1", days=2)
    add_base(held, "debian-trixie-2", days=9)
    add_deb(held, "munge", days=1)
    (held.work / "slurm+123").mkdir(parents=True)
    held.kvm.mkdir()
    held.packer.mkdir()
    (held.packer / "0a1b.qcow2").write_bytes(bytes(64 * KIB))
    age(held.packer / "0a1b.qcow2", 4)
    age(held.debs("trixie"), 5)
    age(held.work / "slurm+123", 3)
    age(held.kvm, 7)
    assert [(entry.kind, entry.name) for entry in held.entries()] == [
        ("base root", "debian-trixie-2"),
        ("KVM probe", "kvm"),
        ("packages", "debs-trixie-amd64"),
        ("base image", "0a1b.qcow2"),
        ("build folder", "slurm+123"),
        ("base root", "debian-trixie-1"),
    ]
    assert held.entries()[0].used == NOW - datetime.timedelta(days=9)
    assert held.entries()[0].size >= 64 * KIB


def test_a_base_root_that_is_entered_is_found(held: BaseCache) -> None:
    add_base(held, "debian-trixie-1", days=0)
    found = held.find("debian-trixie-1")
    assert found is not None
    assert found.sha256 == hashlib.sha256(held.tarball("debian-trixie-1").read_bytes()).hexdigest()
    assert (found.size, found.created) == (64 * KIB, NOW)
    assert held.check("debian-trixie-1") == (found, "")


def test_a_base_root_that_is_used_is_young_again(held: BaseCache) -> None:
    add_base(held, "debian-trixie-1", days=30)
    before = held.entries()[0].used
    held.check("debian-trixie-1")
    assert held.entries()[0].used > before + datetime.timedelta(days=1)


def test_a_dropped_base_root_is_gone(held: BaseCache) -> None:
    add_base(held, "debian-trixie-1", days=0)
    held.drop("debian-trixie-1")
    assert list(held.bases.iterdir()) == []
    held.drop("debian-trixie-1")


def test_a_cache_within_its_limit_is_left_alone(held: BaseCache) -> None:
    add_base(held, "debian-trixie-1", days=100)
    add_deb(held, "munge", days=100)
    assert held.prune(total(held), NOW) == []
    assert held.find("debian-trixie-1") is not None


def test_stale_packages_go_first_then_by_age(held: BaseCache) -> None:
    add_base(held, "debian-trixie-old", days=100)
    add_base(held, "debian-trixie-new", days=1)
    add_deb(held, "staler", days=FRESH_DAYS + 9)
    add_deb(held, "stale", days=FRESH_DAYS + 1)
    add_deb(held, "fresh", days=FRESH_DAYS - 1)
    add_deb(held, "fresher", days=0.5)
    order = ["staler.deb", "stale.deb", "debian-trixie-old", "fresh.deb", "debian-trixie-new", "fresher.deb"]
    assert [entry.name for entry in held.prune(0, NOW)] == order
    assert list(held.bases.iterdir()) == []
    assert list(held.debs("trixie").iterdir()) == []


def test_no_more_goes_than_must(held: BaseCache) -> None:
    add_deb(held, "one", days=30)
    add_deb(held, "two", days=20)
    add_deb(held, "three", days=1)
    add_base(held, "debian-trixie-1", days=2)
    limit = total(held) - 64 * KIB - 1
    assert [entry.name for entry in held.prune(limit, NOW)] == ["one.deb", "two.deb"]
    assert total(held) <= limit
    assert held.find("debian-trixie-1") is not None


def test_a_build_in_progress_is_not_pruned(held: BaseCache) -> None:
    (held.work / "slurm+123").mkdir(parents=True)
    (held.work / "slurm+123" / "disk.raw").write_bytes(b"x" * 64 * KIB)
    held.kvm.mkdir()
    add_deb(held, "munge", days=0)
    assert [entry.name for entry in held.prune(0, NOW)] == ["munge.deb"]
    assert (held.work / "slurm+123" / "disk.raw").exists()


def test_disk_usage_counts_what_is_on_disk(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    empty = cache.disk_usage(tmp_path)
    (tmp_path / "a" / "b" / "full").write_bytes(os.urandom(100 * KIB))
    with (tmp_path / "a" / "holes").open("wb") as file:
        file.truncate(1 << 30)
    (tmp_path / "a" / "link").symlink_to("/usr")
    used = cache.disk_usage(tmp_path) - empty
    assert 100 * KIB <= used < 200 * KIB
    assert cache.disk_usage(tmp_path / "a" / "b" / "full") >= 100 * KIB
    assert cache.disk_usage(tmp_path / "nothing") == 0


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_digests_are_those_of_the_whole_file(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    assert cache.file_digest(tmp_path / "file", "sha256", "sha512") == {
        "sha256": hashlib.sha256(content).hexdigest(),
        "sha512": hashlib.sha512(content).hexdigest(),
    }


def test_a_file_is_replaced_and_its_folder_made(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "note.json"
    cache.write_atomically(path, "old")
    cache.write_atomically(path, "né")
    assert path.read_text(encoding="utf-8") == "né"
    assert [found.name for found in path.parent.iterdir()] == ["note.json"]


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    cache.write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        cache.write_atomically(path, "new" * 10000 + "\ud800")
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["note.json"]


def test_free_space_is_told_for_a_folder_yet_to_be_made(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    free = cache.free_bytes(tmp_path / "not" / "yet")
    assert 0 < free <= status.f_blocks * status.f_frsize
    assert not (tmp_path / "not").exists()


def test_container_images_go_with_age_unless_one_is_being_built(tmp_path: Path) -> None:
    cache = BaseCache(tmp_path)
    (cache.containers / "storage").mkdir(parents=True)
    (cache.containers / "lock").touch()
    building = cache.work / "container+1"
    building.mkdir(parents=True)
    now = datetime.datetime.now(datetime.UTC)
    assert cache.prune(0, now) == []
    building.rmdir()
    assert [entry.kind for entry in cache.prune(0, now)] == ["container images"]
    assert not cache.containers.exists()


def test_services_of_the_local_openstack_go_with_age_unless_they_run(tmp_path: Path) -> None:
    cache = BaseCache(tmp_path)
    for name in ("openstack-old", "openstack-running"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "complete").write_text("x" * 10000)
    program = tmp_path / "openstack-running" / "bin" / "sleep"
    program.symlink_to("/bin/sleep")
    assert {entry.kind for entry in cache.entries()} == {"OpenStack services"}
    with subprocess.Popen([program, "60"]) as running:
        # The kernel tells its command line a moment after Popen has returned.
        told = Path(f"/proc/{running.pid}/cmdline")
        waiting.until("command line", lambda: told.read_bytes() != b"", 20, poll=0.01)
        removed = cache.prune(0, datetime.datetime.now(datetime.UTC))
        running.kill()
    assert [entry.name for entry in removed] == ["openstack-old"]
    assert (tmp_path / "openstack-running").exists()
    assert not (tmp_path / "openstack-old").exists()


def test_what_a_build_downloads_is_left_to_it_by_another(tmp_path: Path) -> None:
    cache = BaseCache(tmp_path)
    with cache.using_debs("trixie") as removed:
        assert removed == []
        deb = cache.debs("trixie") / "x_1_amd64.deb"
        deb.write_bytes(b"just downloaded")
        with cache.using_debs("trixie") as others:
            assert others == []
        assert deb.exists()
    with cache.using_debs("trixie") as removed:
        assert removed == [deb.name], "the build did not end well: nobody noted it"
    deb.write_bytes(b"downloaded")
    cache.note_debs("trixie")
    with cache.using_debs("trixie") as removed:
        assert removed == []
    deb.write_bytes(b"downLoaded")
    with cache.using_debs("trixie") as removed:
        assert removed == [deb.name]
