"""The software bill of materials."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from bakehouse import sbom
from bakehouse.errors import BakehouseError

CREATED = datetime.datetime(2026, 11, 23, 12, 30, tzinfo=datetime.UTC)


def row(package: str, version: str = "1.0-1", **changes: str) -> dict[str, str]:
    return {
        "binary:Package": package,
        "Version": version,
        "Architecture": "amd64",
        "source:Package": package.partition(":")[0],
        "source:Version": version,
        "Maintainer": "Somebody <somebody@example.org>",
        "Homepage": "https://example.org",
        "db:Status-Status": "installed",
    } | changes


def write(folder: Path, *rows: dict[str, str], tag: str = "20261123-5853cc9") -> dict[str, Any]:
    path = folder / "sbom.cdx.json"
    sbom.write(path, rows, name="slurm", tag=tag, distribution="debian", release="13", created=CREATED)
    bill: dict[str, Any] = json.loads(path.read_text())
    return bill


def test_the_image_is_what_the_bill_is_about(tmp_path: Path) -> None:
    bill = write(tmp_path, row("munge"))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    about = bill["metadata"]["component"]
    assert (about["type"], about["name"], about["version"]) == ("operating-system", "slurm", "20261123-5853cc9")
    assert datetime.datetime.fromisoformat(bill["metadata"]["timestamp"]) == CREATED


@pytest.mark.parametrize(
    ("found", "purl"),
    [
        (row("munge"), "pkg:deb/debian/munge@1.0-1?arch=amd64&distro=debian-13"),
        (row("libc6:amd64"), "pkg:deb/debian/libc6@1.0-1?arch=amd64&distro=debian-13"),
        (row("tzdata", Architecture="all"), "pkg:deb/debian/tzdata@1.0-1?arch=all&distro=debian-13"),
        (row("ssh", "1:10.0p1-7+deb13u1"), "pkg:deb/debian/ssh@1:10.0p1-7%2Bdeb13u1?arch=amd64&distro=debian-13"),
        (row("g++", "4:14.2~rc1-1"), "pkg:deb/debian/g%2B%2B@4:14.2~rc1-1?arch=amd64&distro=debian-13"),
    ],
    ids=["plain", "architecture in its name", "for all architectures", "epoch", "plus and tilde"],
)
def test_a_package_has_its_package_url(tmp_path: Path, found: dict[str, str], purl: str) -> None:
    (component,) = write(tmp_path, found)["components"]
    assert component["purl"].replace("%3A", ":") == purl
    assert component["version"] == found["Version"]
    assert ":" not in component["name"]


def test_a_package_names_its_source_and_who_keeps_it(tmp_path: Path) -> None:
    found = row("slurmd", "24.11.5-4+b1", **{"source:Package": "slurm-wlm", "source:Version": "24.11.5-4"})
    (component,) = write(tmp_path, found)["components"]
    assert {item["name"]: item["value"] for item in component["properties"]} == {
        "bakehouse:source": "slurm-wlm",
        "bakehouse:source-version": "24.11.5-4",
    }
    assert component["supplier"]["name"] == "Somebody <somebody@example.org>"
    assert component["externalReferences"] == [{"type": "website", "url": "https://example.org"}]


def test_a_package_without_a_homepage_has_no_reference(tmp_path: Path) -> None:
    (component,) = write(tmp_path, row("base-files", Homepage=""))["components"]
    assert "externalReferences" not in component


def test_every_package_stands_once_and_hangs_on_the_image(tmp_path: Path) -> None:
    bill = write(tmp_path, row("munge"), row("slurmd"), row("libc6:amd64"), row("libc6:i386", Architecture="i386"))
    assert sorted(component["name"] for component in bill["components"]) == ["libc6", "libc6", "munge", "slurmd"]
    references = {component["bom-ref"] for component in bill["components"]}
    assert len(references) == 4
    (tree,) = [item for item in bill["dependencies"] if item["ref"] == bill["metadata"]["component"]["bom-ref"]]
    assert set(tree["dependsOn"]) == references


def test_the_serial_number_is_the_tags(tmp_path: Path) -> None:
    one = write(tmp_path, row("munge"))["serialNumber"]
    assert one.startswith("urn:uuid:")
    assert write(tmp_path, row("munge"))["serialNumber"] == one
    assert write(tmp_path, row("munge"), tag="20261123-5853cc9.2")["serialNumber"] != one


def test_the_same_packages_make_the_same_file(tmp_path: Path) -> None:
    rows = [row("munge"), row("slurmd"), row("adduser")]
    write(tmp_path, *rows)
    before = (tmp_path / "sbom.cdx.json").read_bytes()
    write(tmp_path, *reversed(rows))
    assert (tmp_path / "sbom.cdx.json").read_bytes() == before


# What changed between two.


def bill(folder: Path, name: str, *rows: dict[str, str]) -> dict[str, sbom.Package]:
    (folder / name).mkdir()
    write(folder / name, *rows)
    return sbom.read(folder / name / "sbom.cdx.json")


def test_changes_are_told_by_kind(tmp_path: Path) -> None:
    old = bill(
        tmp_path, "old", row("gone"), row("up", "1.0~rc1-1"), row("down", "1:1.0-1"), row("same"),
        row("moved", origin="Debian trixie/main"),
    )  # fmt: skip
    new = bill(
        tmp_path, "new", row("came"), row("up", "1.0-1"), row("down", "2.0-1"), row("same", origin="x"),
        row("moved", origin="Site trixie/main"),
    )  # fmt: skip
    kinds = {change.name: change.kind for change in sbom.difference(old, new)}
    assert kinds == {"came": "added", "gone": "removed", "up": "upgraded", "down": "downgraded", "moved": "moved"}
    assert sbom.difference(new, new) == []


def test_origin_and_source_are_read_back(tmp_path: Path) -> None:
    origin = "Debian-Security trixie-security/main"
    found = bill(tmp_path, "a", row("libssl3", **{"source:Package": "openssl"}, origin=origin), row("old"))
    assert (found["libssl3"].source, found["libssl3"].origin, found["old"].origin) == ("openssl", origin, "")


def test_packages_of_several_architectures_are_told_apart(tmp_path: Path) -> None:
    found = bill(tmp_path, "a", row("libc6:amd64"), row("libc6:i386", Architecture="i386"))
    assert set(found) == {"libc6:amd64", "libc6:i386"}


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"bomFormat": "x"}', '{"bomFormat": "CycloneDX", "components": [1]}']
)
def test_what_is_no_bill_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "sbom.cdx.json"
    path.write_text(text)
    with pytest.raises(BakehouseError, match="is not an SBOM of Bakehouse"):
        sbom.read(path)
    with pytest.raises(BakehouseError, match="cannot be read"):
        sbom.read(tmp_path / "gone")


def test_what_a_part_takes_is_told_by_its_source(tmp_path: Path) -> None:
    for folder, rows in (
        ("old", [row("tool", **{"Installed-Size": "100"}), row("gone", **{"Installed-Size": "7"})]),
        ("new", [
            row("tool", **{"Installed-Size": "100"}), row("firmware-one", **{"Installed-Size": "2048"}),
            row("firmware-two", **{"Installed-Size": "1024", "source:Package": "firmware-one"}), row("unknown"),
        ]),
    ):  # fmt: skip
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, *rows)
    old, new = (sbom.read(tmp_path / folder / "sbom.cdx.json") for folder in ("old", "new"))
    assert new["firmware-two"].size == 1 << 20
    assert list(sbom.sizes(old, new).items()) == [("firmware-one", 3 << 20), ("gone", -7 << 10)]
    assert sbom.sizes(new, new) == {}
