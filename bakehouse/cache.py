"""The cache: base roots by the digest of their inputs, downloaded packages, and what killed builds left."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bakehouse import run
from bakehouse.errors import BakehouseError

FRESH_DAYS = 14
"""Downloaded packages that no build has used for so many days go first."""

SERVICES = "OpenStack services"
"""What the cache calls the virtual environments of the local OpenStack."""

CONTAINERS = "container images"
"""What the cache calls buildah's storage, with what is noted of its images."""

INDEX = "package index"
"""What the cache calls what apt knows of a mirror."""

BASE_IMAGE = "base image"
"""What the cache calls an image that Packer has downloaded."""

DEB_NOTES = "SHA256SUMS"
"""The file beside downloaded packages that holds their digests."""


@dataclass(frozen=True)
class BaseRoot:
    """A base root in the cache."""

    key: str
    path: Path
    sha256: str
    size: int
    created: datetime.datetime


@dataclass(frozen=True)
class Entry:
    """One thing that the cache holds."""

    kind: str
    name: str
    path: Path
    size: int
    """Bytes on disk."""
    used: datetime.datetime
    """When it was made or last used."""


class BaseCache:
    """Base roots, packages and build folders under one folder.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bases = root / "base"
        self.work = root / "work"
        self.kvm = root / "kvm"
        self.containers = root / "containers"
        self.indexes = root / "apt"
        """What mirrors offer, see apt_index."""
        self.packer = root / "packer"
        """Images from addresses, that Packer has downloaded."""

    def debs(self, release: str) -> Path:
        """Return the folder for a release's downloaded packages."""
        return self.root / f"debs-{release}-amd64"

    def tarball(self, key: str) -> Path:
        """Return where a base root stands, there or not."""
        return self.bases / f"{key}.tar.zst"

    def find(self, key: str) -> BaseRoot | None:
        """Return a base root if the cache has one that looks whole. Reads no more than its size."""
        path, note = self.tarball(key), self._note(key)
        try:
            data = json.loads(note.read_text())
            found = BaseRoot(
                key, path, data["sha256"], int(data["size"]), datetime.datetime.fromisoformat(data["created"])
            )
            return found if path.stat().st_size == found.size else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def check(self, key: str) -> tuple[BaseRoot | None, str]:
        """Read a base root and compare it with its note.

        Returns:
            The base root, or None and why it cannot be used (empty where there is none at all).
        """
        found = self.find(key)
        if found is None:
            there = self.tarball(key).exists() or self._note(key).exists()
            return None, "half-written or of another size than its note says" if there else ""
        if file_digest(found.path, "sha256")["sha256"] != found.sha256:
            return None, "its content is not what was written"
        os.utime(self._note(key))
        return found, ""

    def enter(self, key: str, made: Path, inputs: dict[str, str], now: datetime.datetime) -> BaseRoot:
        """Move a new base root into the cache, in place of the one that has been there.

        Its note comes last: without it, a tarball does not count.

        Args:
            key: the digest of its inputs.
            made: the tarball, on the cache's filesystem.
            inputs: what it was made from.
            now: when it was made.
        """
        data = {
            "key": key,
            "sha256": file_digest(made, "sha256")["sha256"],
            "size": made.stat().st_size,
            "created": now.isoformat(timespec="seconds"),
            "inputs": inputs,
        }
        path = self.tarball(key)
        self._note(key).unlink(missing_ok=True)
        # Its apt sources are those of the build, and a mirror's address may hold a password.
        made.chmod(0o600)
        made.rename(path)
        write_atomically(self._note(key), json.dumps(data, indent=1))
        found = self.find(key)
        if found is None:
            raise BakehouseError(f"{path} changed while it was entered into the cache")
        return found

    def packages(self, key: str) -> dict[str, str]:
        """Return the packages of a base root and their versions; empty where there is none that is whole.

        Raises:
            BakehouseError: it cannot be read.
        """
        found = self.find(key)
        if found is None:
            return {}
        command = ["tar", "--zstd", "--extract", "--to-stdout", "--file", str(found.path), "./var/lib/dpkg/status"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BakehouseError(
                f"the base root {key} cannot be read: {done.stderr.strip()}", hint="`invoke bake --refresh` renews it"
            )
        paragraphs = re.findall(r"^Package: (\S+)\n(?:.+\n)*?Version: (\S+)$", done.stdout, flags=re.MULTILINE)
        return dict(paragraphs)

    def drop(self, key: str) -> None:
        """Forget a base root: its note first, so that it never counts without its tarball."""
        self._note(key).unlink(missing_ok=True)
        self.tarball(key).unlink(missing_ok=True)

    def _note(self, key: str) -> Path:
        return self.bases / f"{key}.json"

    @contextlib.contextmanager
    def using_debs(self, release: str) -> Iterator[list[str]]:
        """Use a release's downloaded packages. Yield the names of those that were removed, not being what apt checked.

        apt looks at no more than the size of a package that is there already. So the packages' digests are noted after
        each build in which apt has verified them, and compared before the next one. What has no note was left by a
        build that did not end well, or is just being downloaded: so nothing is removed while another build goes on.
        """
        folder = self.debs(release)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("a") as lock:
            removed: list[str] = []
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                removed = self._remove_spoilt_debs(folder)
            except BlockingIOError:
                pass
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield removed

    def _remove_spoilt_debs(self, folder: Path) -> list[str]:
        noted = self._noted_debs(folder)
        spoilt = [
            deb for deb in sorted(folder.glob("*.deb")) if file_digest(deb, "sha256")["sha256"] != noted.get(deb.name)
        ]
        for deb in spoilt:
            deb.unlink()
        return [deb.name for deb in spoilt]

    def note_debs(self, release: str) -> None:
        """Note the digests of downloaded packages, after a build that apt was content with."""
        folder = self.debs(release)
        noted = self._noted_debs(folder)
        digests = {
            deb.name: noted.get(deb.name) or file_digest(deb, "sha256")["sha256"] for deb in folder.glob("*.deb")
        }
        lines = [f"{digest}  {name}\n" for name, digest in sorted(digests.items())]
        write_atomically(folder / DEB_NOTES, "".join(lines))

    @staticmethod
    def _noted_debs(folder: Path) -> dict[str, str]:
        try:
            lines = (folder / DEB_NOTES).read_text().splitlines()
        except (OSError, UnicodeDecodeError):
            return {}
        return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}

    def entries(self) -> list[Entry]:
        """Return what the cache holds, the longest unused first."""
        found = [
            _entry("base root", path.name.removesuffix(".tar.zst"), path, note=self._note(path.name[:-8]))
            for path in self.bases.glob("*.tar.zst")
        ]
        found += [_entry("packages", path.name, path) for path in self.root.glob("debs-*")]
        found += [_entry("build folder", path.name, path) for path in self.work.glob("*")]
        found += [_entry(SERVICES, path.name, path, note=path / "complete") for path in self.root.glob("openstack-*")]
        if self.containers.exists():
            found.append(_entry(CONTAINERS, self.containers.name, self.containers, note=self.containers / "lock"))
        found += [_entry(INDEX, path.name, path) for path in self.indexes.glob("*") if path.is_dir()]
        found += [_entry(BASE_IMAGE, path.name, path) for path in self.packer.glob("*")]
        found += [_entry("KVM probe", self.kvm.name, self.kvm)] if self.kvm.exists() else []
        return sorted(found, key=lambda entry: entry.used)

    def prune(self, limit: int, now: datetime.datetime, *, dry_run: bool = False) -> list[Entry]:
        """Remove what is oldest until the cache is within the limit.

        Downloaded packages go file by file, those unused for FRESH_DAYS first; base roots that no image needs any
        more cannot be told from others, so age decides. Folders of builds in progress are left alone, and so is what
        a local OpenStack runs from.

        Args:
            limit: bytes.
            now: the time that ages are counted to.
            dry_run: remove nothing.

        Returns:
            What was removed, or would be.
        """
        removed: list[Entry] = []
        building = any(self.work.glob("container+*"))
        images = [entry for entry in self.entries() if entry.kind == CONTAINERS and not building]
        bases = [entry for entry in self.entries() if entry.kind == "base root"]
        stale = now - datetime.timedelta(days=FRESH_DAYS)
        debs = [_entry("package", deb.name, deb) for folder in self.root.glob("debs-*") for deb in folder.glob("*.deb")]
        total = sum(entry.size for entry in self.entries())
        order = [deb for deb in sorted(debs, key=lambda deb: deb.used) if deb.used < stale]
        services = [entry for entry in self.entries() if entry.kind == SERVICES and not _is_run_from(entry.path)]
        downloads = [entry for entry in self.entries() if entry.kind in {BASE_IMAGE, INDEX}]
        order += sorted(
            [*bases, *images, *services, *downloads, *(deb for deb in debs if deb.used >= stale)],
            key=lambda entry: entry.used,
        )
        for entry in order:
            if total <= limit:
                break
            if not dry_run:
                self._remove(entry)
            total -= entry.size
            removed.append(entry)
        return removed

    def _remove(self, entry: Entry) -> None:
        if entry.kind == "base root":
            self.drop(entry.name)
        elif entry.kind in {CONTAINERS, INDEX}:
            run.remove_tree(entry.path)
        elif entry.kind == SERVICES:
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            entry.path.unlink(missing_ok=True)


def _entry(kind: str, name: str, path: Path, note: Path | None = None) -> Entry:
    stat = (note if note and note.exists() else path).stat()
    size = disk_usage(path)
    return Entry(kind, name, path, size, datetime.datetime.fromtimestamp(stat.st_mtime, datetime.UTC))


def _is_run_from(folder: Path) -> bool:
    """Say whether a process was started from a program in a folder."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(bytes(folder) + b"/"):
                return True
        except OSError:
            continue
    return False


def disk_usage(path: Path) -> int:
    """Return the bytes that a file or a folder with all in it takes on disk. What vanishes meanwhile counts nothing."""
    try:
        stat = path.lstat()
    except OSError:
        return 0
    total = stat.st_blocks * 512
    if path.is_dir() and not path.is_symlink():
        try:
            with os.scandir(path) as items:
                total += sum(disk_usage(Path(item.path)) for item in items)
        except OSError:
            return total
    return total


def file_digest(path: Path, *algorithms: str) -> dict[str, str]:
    """Return digests of a file, which is read once."""
    digests = {name: hashlib.new(name) for name in algorithms}
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(1 << 20)
        while count := file.readinto(buffer):
            for digest in digests.values():
                digest.update(memoryview(buffer)[:count])
    return {name: digest.hexdigest() for name, digest in digests.items()}


def write_atomically(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Write a file beside its place, sync it and rename it.

    Args:
        path: the file.
        text: what it shall hold.
        mode: its permissions, less the process's umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.touch(mode=mode)
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def free_bytes(folder: Path) -> int:
    """Return the bytes free for us on a folder's filesystem; the folder need not exist yet."""
    return shutil.disk_usage(nearest_existing(folder)).free


def nearest_existing(folder: Path) -> Path:
    """Return a folder, or the nearest one above it that is there."""
    while not folder.exists():
        folder = folder.parent
    return folder
