"""Settings of a site: ``bakehouse.yaml``, then ``BAKEHOUSE_*``, then flags. docs/settings.md explains each."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import yaml
from platformdirs import user_cache_path, user_data_path
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from bakehouse import REPOSITORY, yamlfile
from bakehouse.errors import BakehouseError
from bakehouse.manifest import Property

APT_SOURCES = Path("/etc/apt")
PREFIX = "BAKEHOUSE_"


def _url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in {"http", "https", "file"} or not (parts.netloc or parts.scheme == "file"):
        raise ValueError("must be an address that begins with http://, https:// or file://")
    return value.rstrip("/")


def _url_of_nodes(value: str) -> str:
    if "@" in urlsplit(value).netloc:
        raise ValueError("must not hold a password: it would be in every image or its record")
    return _url(value)


def _url_without_password(value: str) -> str:
    if "@" in urlsplit(value).netloc:
        raise ValueError("must not hold a password: webhook_token_file names a file with the token")
    return _url(value)


def _fingerprint(value: str) -> str:
    plain = value.replace(" ", "").upper()
    if not re.fullmatch(r"[0-9A-F]{40}", plain):
        raise ValueError("must be the 40 digits of a key's fingerprint (gpg --show-keys Release.key)")
    return plain


def _template(value: str) -> str:
    try:
        return _url(value.format(archive="debian", snapshot="20260101T000000Z")) and value.rstrip("/")
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError("must be an address in which {archive} and {snapshot} are replaced") from error


def _packages(value: str) -> str:
    """Take an address as it is, and a folder as an absolute path."""
    if "://" in value:
        return _url_of_nodes(value).removeprefix("file://")
    return str(Path(value).expanduser().absolute())


def registry_address(value: str) -> str:
    """Check what names of images may begin with; none at all is as good.

    Raises:
        ValueError: it is something else.
    """
    # The OCI distribution specification's names of repositories may follow.
    if not re.fullmatch(r"([\w.-]+|\[[0-9a-fA-F:]+\])(:[0-9]+)?(/[a-z0-9._-]+)*|", value):
        raise ValueError("must be HOST, HOST:PORT or HOST:PORT/PATH, without http://")
    return value


Url = Annotated[str, AfterValidator(_url)]
Packages = Annotated[str, AfterValidator(_packages)]
SecretlessUrl = Annotated[str, AfterValidator(_url_without_password)]
NodeUrl = Annotated[str, AfterValidator(_url_of_nodes)]
Folder = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]


class Promotion(BaseModel):
    """When a night moves a channel such as stable to an image."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channel: str = Field(default="stable", description="The channel that is moved.")
    soak_nights: int = Field(default=3, ge=0, description="Nights that an image has to have been a candidate before.")
    max_changed_packages: int | None = Field(
        default=None, ge=0, description="The most packages that may differ from the image that the channel points to."
    )
    max_growth_percent: float | None = Field(
        default=None, ge=0, description="By how much the image file may be larger than that of the image before."
    )
    cve_feed: Folder | None = Field(
        default=None,
        description="A local copy of the Debian security tracker's JSON; open CVEs in it hold an image back.",
    )
    cve_urgencies: list[str] = Field(default=["high"], description="The tracker's urgencies that hold an image back.")


class Nightly(BaseModel):
    """What `invoke nightly` does. docs/nightly.md explains each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: list[str] = Field(default=[], description="Manifests that are rebuilt; all by default.")
    promote: Promotion | None = Field(default=None, description="When images are promoted beyond candidate.")
    keep: int = Field(default=7, ge=0, description="Images of each manifest that are kept; 0 prunes nothing.")
    locks: list[Folder] = Field(default=[], description="Lock files whose pinned images are kept.")
    attempts: int = Field(default=2, ge=1, description="How often a bake or a look at the mirror is tried.")
    pause_seconds: float = Field(default=60, ge=0, description="Between attempts.")
    patience_minutes: float = Field(default=30, ge=0, description="How long a cloud that is away is waited for.")
    slower_percent: float = Field(
        default=50, gt=0, description="By how much a boot may be slower than the median of ten nights, unsaid."
    )
    metrics: Folder | None = Field(
        default=None, description="File for node_exporter's textfile collector, such as .../bakehouse.prom."
    )
    sbatch: list[str] = Field(default=[], description="Options for sbatch, for `--executor slurm`.")

    @model_validator(mode="after")
    def _keeps_what_soaks(self) -> Self:
        if self.promote and 0 < self.keep <= self.promote.soak_nights:
            raise ValueError("keep must be more than promote.soak_nights, or images go before they have soaked")
        return self


class Settings(BaseModel):
    """What differs from site to site. No secrets."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    store: Folder = Field(
        default_factory=lambda: user_data_path("bakehouse") / "images",
        description="The folder that holds the images.",
    )
    cache: Folder = Field(
        default_factory=lambda: user_cache_path("bakehouse"),
        description="The folder for base roots, downloaded packages and builds in progress.",
    )
    manifests: list[Folder] = Field(
        default=[], description="Folders with manifests of the site; they come before Bakehouse's own."
    )
    elements: list[Folder] = Field(
        default=[], description="Folders with elements of the site; they come before Bakehouse's own."
    )
    image_tests: list[Folder] = Field(
        default=[], description="Folders with testinfra suites of the site; `invoke verify` asks them too."
    )
    broker: Folder = Field(
        default=Path("/etc/bakehouse/broker.yaml"),
        description="The configuration of the join broker on this host, for `invoke join.token`.",
    )
    mirror: Url | None = Field(
        default=None, description="Debian mirror to build from. Default: the one this host's apt uses."
    )
    security_mirror: Url | None = Field(
        default=None, description="Mirror of Debian's security archive to build from. Default: this host's."
    )
    snapshot_mirror: Annotated[str, AfterValidator(_template)] = Field(
        default="https://snapshot.debian.org/archive/{archive}/{snapshot}",
        description="Where pinned snapshots are; {archive} is debian or debian-security.",
    )
    node_mirror: NodeUrl = Field(
        default="http://deb.debian.org/debian", description="The mirror that nodes are left with."
    )
    node_security_mirror: NodeUrl = Field(
        default="http://deb.debian.org/debian-security", description="The security mirror that nodes are left with."
    )
    kubernetes_packages: Packages = Field(
        default="https://pkgs.k8s.io/core:/stable:",
        description="Where kubelet, kubeadm and kubectl come from: upstream's repository, a mirror of the same layout "
        "(vMINOR/deb/ below it), or a folder of .deb files.",
    )
    kubernetes_key: Annotated[str, AfterValidator(_fingerprint)] = Field(
        default="DE15B14486CD377B9E876E1A234654DA9A296436",
        description="Fingerprint of the key that they are signed with; upstream's by default. A folder has none.",
    )
    kubernetes_images: Folder | None = Field(
        default=None,
        description="A folder of container image archives (*.tar) that are loaded into Kubernetes images; only what is "
        "not there is pulled from registries.",
    )
    kubernetes_binaries: Packages = Field(
        default="https://dl.k8s.io/release",
        description="Where the control plane of `verify` and `cluster.up` comes from: an address or a folder with "
        "vVERSION/bin/linux/amd64/ below it.",
    )
    build_in_memory: Literal["auto", "never"] = Field(
        default="auto",
        description="auto: the build tree is kept in memory where memory is plenty. never: always on disk.",
    )
    cloud: str = Field(
        default="", description="The cloud of clouds.yaml that images are published to, where no other is named."
    )
    visibility: Literal["private", "shared", "community", "public"] = Field(
        default="private", description="Who sees published images; public takes an administrator in most clouds."
    )
    image_properties: dict[str, Property] = Field(
        default={}, description="Properties that all published images get in Glance; a manifest's own win."
    )
    image_owner: str = Field(
        default="",
        description="Id of the project whose published images are looked at. Default: the credential's own.",
    )
    signing_key: Folder | None = Field(
        default=None, description="Private key (PEM, Ed25519) that published images are signed with."
    )
    trusted_keys: list[Folder] = Field(default=[], description="Public keys whose signatures count.")
    require_signature: bool = Field(
        default=False, description="Promote only images with a good signature of a trusted key."
    )
    rollback_steps: int = Field(
        default=3, ge=1, description="How many images a channel can be rolled back by; `invoke prune` keeps so many."
    )
    registry: Annotated[str, AfterValidator(registry_address)] = Field(
        default="",
        description="The container registry of the hybrid path, HOST[:PORT][/PATH]. Default: the one of `registry.up`, "
        "where it runs.",
    )
    registry_insecure: bool = Field(
        default=False, description="The registry speaks plain HTTP, or HTTPS with a certificate that nobody checks."
    )
    nights: Folder = Field(
        default_factory=lambda: user_data_path("bakehouse") / "nights",
        description="The folder that holds what nights came to.",
    )
    nightly: Nightly = Field(default=Nightly(), description="What `invoke nightly` does.")
    webhook: SecretlessUrl | None = Field(
        default=None, description="Address that the summary of a night is sent to as JSON."
    )
    webhook_token_file: Folder | None = Field(
        default=None, description="File with the token that it is sent with: Authorization: Bearer."
    )
    cache_limit_gib: float = Field(default=20, gt=0, description="What `invoke cache.prune` shrinks the cache to, GiB.")

    def mirrors(self, snapshot: str | None = None) -> tuple[str, str]:
        """Return the archive and the security archive to build from.

        Args:
            snapshot: the point in time that a manifest pins, such as ``20261101T000000Z``.
        """
        if snapshot:
            archive, security = (
                self.snapshot_mirror.format(archive=name, snapshot=snapshot) for name in ("debian", "debian-security")
            )
            return archive, security
        host = host_mirrors()
        return (
            self.mirror or host.get("debian", "http://deb.debian.org/debian"),
            self.security_mirror or host.get("debian-security", "http://deb.debian.org/debian-security"),
        )


def load(environment: Mapping[str, str] = os.environ, start: Path | None = None) -> Settings:
    """Load the settings that hold here.

    The file is the one that ``BAKEHOUSE_CONFIG`` names, else ``bakehouse.yaml`` in the current folder or in the
    checkout, else ``~/.config/bakehouse/bakehouse.yaml``, else ``/etc/bakehouse/bakehouse.yaml``.

    Raises:
        BakehouseError: the file or a variable holds something that is not a setting.
    """
    _refuse_unknown_variables(environment)
    path = _find_file(environment, start or Path.cwd())
    document = yamlfile.read(path) if path else yamlfile.Document(Path("bakehouse.yaml"), {})
    folder = path.parent if path else Path.cwd()
    data = {name: _absolute(name, value, folder) for name, value in document.data.items()}
    given: set[str] = set()
    for name in Settings.model_fields:
        value = environment.get(PREFIX + name.upper())
        if value is not None:
            given.add(name)
            data[name] = _absolute(name, _of_variable(name, value), Path.cwd())
    return yamlfile.check(Settings, _Given(document.path, data, document.lines, frozenset(given)))


_FOLDERS = {
    "store", "cache", "broker", "signing_key", "kubernetes_images", "nights", "cve_feed", "metrics",
    "webhook_token_file",
}  # fmt: skip
_ADDRESSES_OR_FOLDERS = {"kubernetes_packages", "kubernetes_binaries"}
_LISTS = {"manifests", "elements", "image_tests", "trusted_keys", "locks"}
_MAPPINGS = {"image_properties", "nightly"}
_NESTED = {"nightly", "promote"}
"""Mappings with paths in them."""


def _of_variable(name: str, value: str) -> Any:
    """Return what a variable says: lists have colons between their items, mappings are YAML on one line."""
    if name in _LISTS:
        return value.split(":")
    if name in _MAPPINGS:
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise BakehouseError(
                f"variable {PREFIX}{name.upper()}: not YAML: {' '.join(str(error).split())}",
                hint="write it like '{hw_disk_bus: scsi}'",
            ) from error
    return value


@dataclass(frozen=True)
class _Given(yamlfile.Document):
    """Settings of a file and of variables."""

    variables: frozenset[str] = frozenset()

    def where(self, field_path: yamlfile.FieldPath) -> str:
        if field_path and field_path[0] in self.variables:
            return f"variable {PREFIX}{str(field_path[0]).upper()}"
        return super().where(field_path)


def _absolute(name: str, value: Any, folder: Path) -> Any:
    """Make relative paths begin at a folder: that of the file, or the current one for variables."""
    if isinstance(value, str) and (name in _FOLDERS or (name in _ADDRESSES_OR_FOLDERS and "://" not in value)):
        return str(folder / Path(value).expanduser())
    if name in _LISTS and isinstance(value, list):
        return [str(folder / Path(str(item)).expanduser()) for item in value]
    if name in _NESTED and isinstance(value, dict):
        return {key: _absolute(key, item, folder) for key, item in value.items()}
    return value


def _find_file(environment: Mapping[str, str], start: Path) -> Path | None:
    named = environment.get(PREFIX + "CONFIG")
    if named:
        if not Path(named).is_file():
            raise BakehouseError(f"BAKEHOUSE_CONFIG names {named}, which is not a file")
        return Path(named).absolute()
    places = [
        start,
        REPOSITORY,
        Path("~/.config/bakehouse").expanduser(),
        Path("/etc/bakehouse"),
    ]
    return next((place / "bakehouse.yaml" for place in places if (place / "bakehouse.yaml").is_file()), None)


def _refuse_unknown_variables(environment: Mapping[str, str]) -> None:
    known = [PREFIX + name.upper() for name in Settings.model_fields] + [
        PREFIX + "CONFIG",
        PREFIX + "DEBUG",
        PREFIX + "LIFELINE",
    ]
    for name in environment:
        if name.startswith(PREFIX) and name not in known:
            raise BakehouseError(
                f"the variable {name} is not a setting{yamlfile.did_you_mean(name, known)}",
                hint="docs/settings.md lists them",
            )


def host_mirrors(folder: Path = APT_SOURCES) -> dict[str, str]:
    """Return the Debian mirrors of this host's apt, by archive: ``debian`` and ``debian-security``.

    Reads both the one-line and the deb822 form (sources.list(5)). Empty on a host that is not Debian.
    """
    found: dict[str, str] = {}
    for uri, suite in _apt_entries(folder):
        name = "debian-security" if suite.endswith(("-security", "/updates")) else "debian"
        path = urlsplit(uri).path.rstrip("/")
        if path.endswith(("/debian", "/debian-security")):
            found.setdefault(name, uri.rstrip("/"))
    return found


def _apt_entries(folder: Path) -> Iterator[tuple[str, str]]:
    files = [folder / "sources.list", *sorted(folder.glob("sources.list.d/*.list"))]
    for path in files:
        if path.is_file():
            for line in path.read_text(errors="replace").splitlines():
                match = re.match(r"deb\s+(?:\[[^]]*\]\s+)?(\S+)\s+(\S+)", line.strip())
                if match:
                    yield match[1], match[2]
    for path in sorted(folder.glob("sources.list.d/*.sources")):
        for stanza in path.read_text(errors="replace").split("\n\n"):
            text = "\n".join(line for line in stanza.splitlines() if not line.startswith("#"))
            fields = {
                key.strip().lower(): value.split()
                for key, value in re.findall(r"^([\w-]+):((?:.*)(?:\n[ \t].*)*)", text, flags=re.MULTILINE)
            }
            if fields.get("enabled") == ["no"] or "deb" not in fields.get("types", []):
                continue
            for uri in fields.get("uris", []):
                for suite in fields.get("suites", []):
                    yield uri, suite


def dump(settings: Settings) -> str:
    """Return the settings as YAML, as ``bakehouse.yaml`` would hold them."""
    data: dict[str, Any] = settings.model_dump(mode="json")
    return yaml.safe_dump(data, sort_keys=False)
