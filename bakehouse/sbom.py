"""The software bill of materials: every Debian package of an image, as CycloneDX JSON."""

from __future__ import annotations

import datetime
import json
import subprocess
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cyclonedx.model import ExternalReference, ExternalReferenceType, Property, XsUri
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.contact import OrganizationalEntity
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL

from bakehouse.errors import BakehouseError

ORIGIN = "bakehouse:origin"
"""The property of a component that says which archive its version came from."""

SIZE = "bakehouse:installed-size"
"""The property of a component that says what its files take, in bytes, as the package itself says."""

Kind = Literal["added", "removed", "upgraded", "downgraded", "moved"]


@dataclass(frozen=True)
class Package:
    """One package of an image."""

    name: str
    version: str
    architecture: str
    source: str
    """The source package that it was built from."""
    origin: str
    """The archive that it came from, such as ``Debian-Security trixie-security/main``; empty where nobody noted it."""
    size: int = 0
    """Bytes that its files take, as the package says; 0 where nobody noted it."""
    source_version: str = ""
    """Version of the source package: that of the package itself, but for what was only built again."""


@dataclass(frozen=True)
class Change:
    """What became of one package from one image to another."""

    name: str
    kind: Kind
    """``moved``: the same version, from another archive."""
    before: Package | None
    after: Package | None


def write(
    path: Path,
    packages: Sequence[Mapping[str, str]],
    *,
    name: str,
    tag: str,
    distribution: str,
    release: str,
    created: datetime.datetime,
) -> None:
    """Write an SBOM.

    Args:
        path: the file to make.
        packages: rows of rootfs.packages().
        name: the image's name.
        tag: the image's tag.
        distribution: such as debian.
        release: its version number, such as 13.
        created: when the image was baked.
    """
    image = Component(type=ComponentType.OPERATING_SYSTEM, name=name, version=tag, bom_ref=f"image:{name}:{tag}")
    components = [_component(row, distribution, release) for row in packages]
    bom = Bom(
        components=components,
        metadata=BomMetaData(component=image, timestamp=created),
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"bakehouse:{name}:{tag}"),
    )
    bom.register_dependency(image, components)
    outputter = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6)
    path.write_text(outputter.output_as_string(indent=1) + "\n", encoding="utf-8")


def _component(row: Mapping[str, str], distribution: str, release: str) -> Component:
    package = row["binary:Package"].partition(":")[0]
    qualifiers = {"arch": row["Architecture"], "distro": f"{distribution}-{release}"}
    purl = PackageURL("deb", distribution, package, row["Version"], qualifiers)
    homepage = [ExternalReference(type=ExternalReferenceType.WEBSITE, url=XsUri(row["Homepage"]))]
    return Component(
        type=ComponentType.LIBRARY,
        name=package,
        version=row["Version"],
        purl=purl,
        bom_ref=purl.to_string(),
        supplier=OrganizationalEntity(name=row["Maintainer"]),
        external_references=homepage if row["Homepage"] else [],
        properties=[
            Property(name="bakehouse:source", value=row["source:Package"]),
            Property(name="bakehouse:source-version", value=row["source:Version"]),
            *([Property(name=ORIGIN, value=row["origin"])] if row.get("origin") else []),
            # Debian policy, 5.6.20: in KiB.
            *([Property(name=SIZE, value=str(int(size) << 10))] if (size := row.get("Installed-Size")) else []),
        ],
    )


def read(path: Path) -> dict[str, Package]:
    """Read the packages of an SBOM that write() wrote, by name (and architecture, where there are several of a name).

    Raises:
        BakehouseError: it is gone or damaged.
    """
    try:
        bill = json.loads(path.read_text(encoding="utf-8"))
        if bill["bomFormat"] != "CycloneDX":
            raise ValueError("it is not CycloneDX")
        found = [_package(row) for row in bill.get("components", [])]
    except OSError as error:
        raise BakehouseError(f"{path} cannot be read: {error.strerror}", hint="bake the image again") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BakehouseError(f"{path} is not an SBOM of Bakehouse: {error}", hint="bake the image again") from error
    several = {name for name, count in Counter(package.name for package in found).items() if count > 1}
    return {
        f"{package.name}:{package.architecture}" if package.name in several else package.name: package
        for package in found
    }


def _package(row: Mapping[str, Any]) -> Package:
    properties = {item["name"]: item["value"] for item in row.get("properties", [])}
    purl = PackageURL.from_string(row["purl"])
    architecture = purl.qualifiers.get("arch", "") if isinstance(purl.qualifiers, dict) else ""
    return Package(
        name=row["name"],
        version=row["version"],
        architecture=architecture,
        source=properties.get("bakehouse:source", ""),
        origin=properties.get(ORIGIN, ""),
        size=int(properties.get(SIZE, 0)),
        source_version=properties.get("bakehouse:source-version", ""),
    )


def sizes(old: Mapping[str, Package], new: Mapping[str, Package]) -> dict[str, int]:
    """Return what became larger or smaller from one image to another: bytes by source package, the largest first."""
    grown: Counter[str] = Counter()
    for bill, sign in ((new, 1), (old, -1)):
        for package in bill.values():
            grown[package.source or package.name] += sign * package.size
    return {name: size for name, size in sorted(grown.items(), key=lambda item: (-abs(item[1]), item[0])) if size}


def difference(old: Mapping[str, Package], new: Mapping[str, Package]) -> list[Change]:
    """Return what changed between two images, by package name."""
    changes = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        kind = _kind(before, after)
        if kind:
            changes.append(Change(name, kind, before, after))
    return changes


def _kind(before: Package | None, after: Package | None) -> Kind | None:
    if before is None or after is None:
        return "added" if before is None else "removed"
    if before.version != after.version:
        return "upgraded" if is_older(before.version, after.version) else "downgraded"
    # Images that were baked before origins were noted have none.
    if before.origin and after.origin and before.origin != after.origin:
        return "moved"
    return None


def is_older(one: str, other: str) -> bool:
    """Say whether a version comes before another, by Debian's order (deb-version(7))."""
    return subprocess.run(["dpkg", "--compare-versions", one, "lt", other], check=False).returncode == 0
