"""Manifests: the YAML files that declare one image each."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from bakehouse import REPOSITORY, yamlfile
from bakehouse.errors import BakehouseError

RELEASES = {"trixie": "13", "bookworm": "12"}
"""Debian releases that can be baked, by code name, with their version numbers."""

SIZE_UNITS = {"MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def parse_size(value: object) -> int | None:
    """Turn ``auto`` into None and a size such as ``4GiB`` into bytes."""
    if value is None or value == "auto":
        return None
    match = re.fullmatch(r"([1-9]\d*)\s*([MGT]iB)", str(value))
    if not match:
        raise ValueError("must be 'auto' or a size such as 512MiB or 4GiB")
    return int(match[1]) * SIZE_UNITS[match[2]]


def _release(value: object) -> object:
    by_number = {number: name for name, number in RELEASES.items()}
    return by_number.get(str(value), value)


def _package(value: str) -> str:
    # Debian policy 5.6.1; an architecture or a version may follow.
    if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+(:[a-z0-9]+)?(=[\w.+:~-]+)?", value):
        raise ValueError("is not the name of a Debian package")
    return value


def _element(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", value):
        raise ValueError("is not the name of an element")
    return value


def _variable(value: str) -> str:
    if not re.fullmatch(r"DIB_[A-Z0-9_]+", value):
        raise ValueError("variables of elements begin with DIB_ and are in capitals")
    return value


def _kernel_argument(value: str) -> str:
    if not re.fullmatch(r"[\w.,:/=+-]+", value):
        raise ValueError("may hold letters, digits and . , : / = + - _ only, one argument an item")
    return value


def _snapshot(value: str) -> str:
    if not re.fullmatch(r"\d{8}T\d{6}Z", value):
        raise ValueError("must be a time such as 20261101T000000Z")
    return value


def _property(value: object) -> object:
    """Turn what YAML makes of ``true``, ``3`` or ``2027-01-31`` back into what was written."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float | datetime.date) else value


Property = Annotated[str | None, BeforeValidator(_property, json_schema_input_type=str | int | bool | None)]

Size = Annotated[int | None, BeforeValidator(parse_size, json_schema_input_type=str)]


Release = Annotated[
    Literal["trixie", "bookworm"],
    BeforeValidator(_release, json_schema_input_type=Literal["trixie", "bookworm", "13", "12", 13, 12]),
]


class Disk(BaseModel):
    """The disk of the image."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    root_size: Size = Field(
        default=None,
        description="Size of the root partition in the image, such as 4GiB; it grows to the node's disk at boot. "
        "'auto' is what the root needs plus a fifth and 256 MiB.",
    )
    firmware: list[Literal["bios", "uefi"]] = Field(
        default=["bios", "uefi"], min_length=1, description="Firmware that can boot the image."
    )
    formats: list[Literal["qcow2", "raw"]] = Field(
        default=["qcow2"], min_length=1, description="Files to make; several are made from one build."
    )
    compression: Literal["zstd", "zlib", "none"] = Field(
        default="zstd", description="Compression inside the qcow2. zlib is for clouds with a QEMU older than 5.1."
    )


def _version(value: str) -> str:
    if not re.fullmatch(r"[0-9]+\.[0-9]+\.[0-9]+", value):
        raise ValueError("must be a version such as '1.35.5', in quotes")
    return value


def _container_image(value: str) -> str:
    # A short name, or registry/repository with a tag, a digest or both (the OCI distribution specification, "Pulling").
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*|[\w.:-]+(/[\w.-]+)+(:[\w.-]+)?(@sha256:[0-9a-f]{64})?", value):
        raise ValueError("is neither a name of kubeadm's such as kube-proxy nor an image such as docker.io/a/b:v1")
    return value


class Kubernetes(BaseModel):
    """Kubernetes in the image."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Annotated[str, AfterValidator(_version)] | None = Field(
        default=None, description="The one version of kubelet, kubeadm and kubectl, such as '1.35.5'."
    )
    images: list[Annotated[str, AfterValidator(_container_image)]] = Field(
        default=["pause", "kube-proxy", "coredns"],
        description="Container images that are loaded at bake time, so that nodes need not pull them: names that "
        "`kubeadm config images list` has, or whole names such as docker.io/flannel/flannel:v0.27.4.",
    )


class Manifest(BaseModel):
    """One image: what it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    extends: str | None = Field(
        default=None,
        description="The manifest that this one builds on. Its lists come before this one's, its other values are "
        "the defaults.",
    )
    description: str = Field(default="", description="What the image is for, for people.")
    platform: Literal["slurm", "kubernetes", "roce", "base"] | None = Field(
        default=None,
        description="What a node becomes; base: no member of a cluster, what bootstrap and hybrid start from. A "
        "manifest without it only serves as a base for others.",
    )
    distribution: Literal["debian"] = Field(default="debian", description="The distribution.")
    release: Release | None = Field(default=None, description="The release, by code name or number.")
    architecture: Literal["amd64"] = Field(default="amd64", description="The architecture, in Debian's words.")
    components: list[str] = Field(default=["main"], description="Components of the Debian archive.")
    snapshot: Annotated[str, AfterValidator(_snapshot)] | None = Field(
        default=None, description="Pins the mirror to a point in time, such as 20261101T000000Z."
    )
    kernel: Literal["cloud", "generic"] = Field(
        default="cloud", description="cloud: virtual machines only, small and quick to boot. generic: all hardware."
    )
    kernel_arguments: list[Annotated[str, AfterValidator(_kernel_argument)]] = Field(
        default=[], description="Added to the kernel's command line."
    )
    elements: list[Annotated[str, AfterValidator(_element)]] = Field(
        default=[], description="diskimage-builder elements; those that they depend on come by themselves."
    )
    packages: list[Annotated[str, AfterValidator(_package)]] = Field(
        default=[], description="Debian packages beside those of the elements."
    )
    environment: dict[Annotated[str, AfterValidator(_variable)], str] = Field(
        default={}, description="Variables that elements read (DIB_...)."
    )
    kubernetes: Kubernetes | None = Field(
        default=None, description="Kubernetes in the image; the platform kubernetes needs it."
    )
    disk: Disk = Field(default=Disk(), description="The disk of the image.")
    image_properties: dict[str, Property] = Field(
        default={},
        description="Properties that the image gets in Glance, beside or in place of those by default; null leaves one "
        "out. Not an input of the digest: publish again to change them.",
    )


@dataclass(frozen=True)
class Resolved:
    """A manifest with everything that it extends merged in."""

    name: str
    manifest: Manifest
    chain: tuple[str, ...]
    """Names from the outermost base to the manifest itself."""
    base_elements: tuple[str, ...]
    """Elements that the outermost base names: what all manifests on it share."""
    document: yamlfile.Document
    """The merged fields, each with the file and line that it came from (for errors)."""


@dataclass(frozen=True)
class _Merged(yamlfile.Document):
    """A document whose fields come from several files."""

    origins: tuple[tuple[yamlfile.FieldPath, yamlfile.Document, yamlfile.FieldPath], ...] = ()

    def where(self, field_path: yamlfile.FieldPath) -> str:
        for length in range(len(field_path), 0, -1):
            for merged, document, own in reversed(self.origins):
                if merged == field_path[:length]:
                    return document.where(own)
        return f"{self.path}:1"


def folders(site: list[Path]) -> list[Path]:
    """Return the folders that manifests are looked for in, the site's own first."""
    return [*site, REPOSITORY / "manifests"]


def find_all(places: list[Path]) -> dict[str, Path]:
    """Return every manifest by name; a name that stands in two folders is the first one's."""
    found: dict[str, Path] = {}
    for place in places:
        if not place.is_dir():
            raise BakehouseError(f"the manifest folder {place} is not there", hint="see 'manifests' in bakehouse.yaml")
        for path in sorted(place.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def resolve(name: str, places: list[Path], overrides: dict[str, Any] | None = None) -> Resolved:
    """Load a manifest and merge it onto what it extends.

    Mappings are merged, lists are appended (without repeats), other values replace. ``disk.firmware`` and
    ``disk.formats`` are choices and not collections: they replace.

    Args:
        name: the manifest's file name without ``.yaml``.
        places: the folders to look in.
        overrides: values from the command line, which win.

    Raises:
        BakehouseError: the manifest or one below it is missing or faulty.
    """
    known = find_all(places)
    documents: list[yamlfile.Document] = []
    chain: list[str] = []
    wanted: str | None = name
    asked_at = ""
    while wanted is not None:
        if wanted in chain:
            raise BakehouseError(f"{asked_at}extends: {' -> '.join([*reversed(chain), wanted])} goes in a circle")
        if wanted not in known:
            raise BakehouseError(
                f"{asked_at}there is no manifest '{wanted}'{yamlfile.did_you_mean(wanted, sorted(known))}",
                hint=f"known manifests: {', '.join(sorted(known)) or 'none'}",
            )
        document = yamlfile.read(known[wanted])
        checked = yamlfile.check(Manifest, document)
        documents.insert(0, document)
        chain.insert(0, wanted)
        wanted, asked_at = checked.extends, f"{document.where(('extends',))}: "

    data: dict[str, Any] = {}
    origins: list[tuple[yamlfile.FieldPath, yamlfile.Document, yamlfile.FieldPath]] = []
    for document in documents:
        own = {key: value for key, value in document.data.items() if key != "extends"}
        if document is not documents[-1]:
            own.pop("description", None)
        _merge(data, own, (), document, origins)
    if overrides:
        flags = yamlfile.Document(Path("command line"), overrides)
        _merge(data, overrides, (), flags, origins)
    merged = _Merged(known[name], data, {}, tuple(origins))
    manifest = yamlfile.check(Manifest, merged)
    if manifest.release is None:
        raise BakehouseError(
            f"{known[name]}:1: neither {name} nor what it extends sets 'release'",
            hint=f"add 'release: {next(iter(RELEASES))}'",
        )
    if manifest.platform == "kubernetes" and not (manifest.kubernetes and manifest.kubernetes.version):
        raise BakehouseError(
            f"{merged.where(('platform',))}: a kubernetes image needs 'kubernetes' with a version",
            hint="extend the manifest 'kubernetes', or add 'kubernetes: {version: \"1.35.5\"}'",
        )
    return Resolved(
        name=name,
        manifest=manifest,
        chain=tuple(chain),
        base_elements=tuple(documents[0].data.get("elements") or ()),
        document=merged,
    )


def _merge(
    into: dict[str, Any],
    new: dict[str, Any],
    at: yamlfile.FieldPath,
    document: yamlfile.Document,
    origins: list[tuple[yamlfile.FieldPath, yamlfile.Document, yamlfile.FieldPath]],
) -> None:
    for key, value in new.items():
        here = (*at, key)
        origins.append((here, document, here))
        if isinstance(value, dict):
            into[key] = dict(into.get(key) or {})
            _merge(into[key], value, here, document, origins)
        elif isinstance(value, list) and at == ():
            merged = list(into.get(key) or [])
            for number, item in enumerate(value):
                if item not in merged:
                    origins.append(((*here, len(merged)), document, (*here, number)))
                    merged.append(item)
            into[key] = merged
        else:
            into[key] = value


def schema() -> dict[str, Any]:
    """Return the JSON Schema of a manifest, for editors."""
    described = Manifest.model_json_schema(mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **described}
