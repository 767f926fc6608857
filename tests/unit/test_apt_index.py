"""What mirrors offer: with real apt and small repositories in folders."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import pytest

from bakehouse import apt_index
from bakehouse.errors import BakehouseError
from bakehouse.sbom import Package


class Repository:
    """A mirror in a folder, with the suites of a release."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, suite: str, packages: dict[str, str], *, spoil: bool = False) -> None:
        """Write a suite's indexes."""
        folder = self.folder / "dists" / suite
        text = "".join(
            f"Package: {name}\nArchitecture: amd64\nVersion: {version}\nFilename: pool/{name}.deb\nSize: 1\n"
            f"SHA256: {'0' * 64}\nDescription: x\n more\n\n"
            for name, version in packages.items()
        ).encode()
        index = folder / "main" / "binary-amd64"
        index.mkdir(parents=True, exist_ok=True)
        files = {"main/binary-amd64/Packages": text, "main/binary-amd64/Packages.gz": gzip.compress(text, mtime=0)}
        sums = "".join(f" {hashlib.sha256(data).hexdigest()} {len(data)} {name}\n" for name, data in files.items())
        (folder / "Release").write_text(
            f"Suite: {suite}\nCodename: {suite}\nComponents: main\nArchitectures: amd64\nSHA256:\n{sums}"
        )
        for name, data in files.items():
            # Half updated: the new Release with the old indexes.
            (folder / name).write_bytes(data.replace(b"Version: 1", b"Version: 9") if spoil else data)
        if spoil:
            (index / "Packages.gz").write_bytes(gzip.compress(b"of another day", mtime=0))

    @property
    def sources(self) -> list[str]:
        return [f"deb [trusted=yes] file://{self.folder} {suite} main" for suite in ("trixie", "trixie-security")]


@pytest.fixture
def mirror(tmp_path: Path) -> Repository:
    made = Repository(tmp_path / "mirror")
    made.put("trixie", {"slurmd": "24.11.5-4", "openssl": "3.5.1-1", "munge": "0.5.16-1", "zstd": "1.5.7-1"})
    made.put("trixie-security", {"openssl": "3.5.1-1+deb13u1"})
    return made


def bill(**versions: str) -> dict[str, Package]:
    return {name: Package(name, version, "amd64", name, "Debian trixie/main") for name, version in versions.items()}


def test_newer_packages_are_told_security_first(mirror: Repository, tmp_path: Path) -> None:
    index = apt_index.fetch(mirror.sources, tmp_path / "apt")
    found = index.newer(bill(munge="0.5.15-1", openssl="3.5.1-1", slurmd="24.11.5-4", zstd="1.5.8-1", other="1"))
    assert [(one.name, one.has, one.offered, one.security) for one in found] == [
        ("openssl", "3.5.1-1", "3.5.1-1+deb13u1", True),
        ("munge", "0.5.15-1", "0.5.16-1", False),
    ]
    assert found[0].suite == "trixie-security"


def test_a_security_update_that_a_point_release_took_in_stays_one(mirror: Repository, tmp_path: Path) -> None:
    mirror.put("trixie", {"openssl": "3.5.2-1"})
    (found,) = apt_index.fetch(mirror.sources, tmp_path / "apt").newer(bill(openssl="3.5.1-1"))
    assert (found.offered, found.suite, found.security) == ("3.5.2-1", "trixie", True)


def test_packages_of_other_archives_are_not_compared(mirror: Repository, tmp_path: Path) -> None:
    kubelet = {"slurmd": Package("slurmd", "1.0", "amd64", "slurmd", "kubernetes core:/stable:/v1.35")}
    assert apt_index.fetch(mirror.sources, tmp_path / "apt").newer(kubelet) == []


def test_what_changes_is_seen_the_next_time(mirror: Repository, tmp_path: Path) -> None:
    assert apt_index.fetch(mirror.sources, tmp_path / "apt").newer(bill(slurmd="24.11.5-4")) == []
    mirror.put("trixie", {"slurmd": "24.11.5-5"})
    assert len(apt_index.fetch(mirror.sources, tmp_path / "apt").newer(bill(slurmd="24.11.5-4"))) == 1


def test_a_half_updated_mirror_is_not_believed(mirror: Repository, tmp_path: Path) -> None:
    apt_index.fetch(mirror.sources, tmp_path / "apt")
    mirror.put("trixie", {"slurmd": "24.11.5-5"}, spoil=True)
    with pytest.raises(BakehouseError, match="what the mirror offers cannot be told") as caught:
        apt_index.fetch(mirror.sources, tmp_path / "apt")
    assert "half updated" in (caught.value.hint or "")
    mirror.put("trixie", {"slurmd": "24.11.5-5"})
    assert len(apt_index.fetch(mirror.sources, tmp_path / "apt").newer(bill(slurmd="24.11.5-4"))) == 1


def test_a_mirror_without_the_release_or_a_signature_is_named(mirror: Repository, tmp_path: Path) -> None:
    gone = [f"deb [trusted=yes] file://{tmp_path}/nowhere trixie main"]
    with pytest.raises(BakehouseError, match="trixie"):
        apt_index.fetch(gone, tmp_path / "apt")
    unsigned = [line.replace("[trusted=yes] ", "") for line in mirror.sources]
    with pytest.raises(BakehouseError, match="is not signed"):
        apt_index.fetch(unsigned, tmp_path / "apt")


def test_passwords_of_mirrors_are_not_told(tmp_path: Path) -> None:
    with pytest.raises(BakehouseError) as caught:
        apt_index.fetch(["deb http://me:secret@127.0.0.1:9/debian trixie main"], tmp_path / "apt")
    assert "secret" not in f"{caught.value.message} {caught.value.log}"
    (own,) = (tmp_path / "apt").glob("*/sources.list")
    assert own.stat().st_mode & 0o077 == 0
