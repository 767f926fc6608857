"""The software bill of materials: every Debian package of an image, as CycloneDX JSON."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from cyclonedx.model import ExternalReference, ExternalReferenceType, Property, XsUri
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.contact import OrganizationalEntity
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL


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
        packages: rows of rootfs.DPKG_FIELDS.
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
        ],
    )
