"""The plan of an image: a manifest with everything filled in, its input digest, and what a bake would have to do."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from bakehouse import elements, host, kubernetes, manifest
from bakehouse.cache import BaseCache, BaseRoot
from bakehouse.elements import Element, Package
from bakehouse.errors import BakehouseError
from bakehouse.manifest import Manifest, Resolved
from bakehouse.record import Record
from bakehouse.settings import Settings
from bakehouse.store import LocalStore

OPERATING_SYSTEM = "debian-mmdebstrap"
CLEANING = ("image-hygiene", "cleanup.d/95-image-hygiene")
SOURCES = (OPERATING_SYSTEM, "finalise.d/20-apt-sources")
"""Scripts of elements that every image has, and their elements: what goes out; where packages come from at the end."""

HAND_OVER = "root-folder"
"""The element that gives the finished root to Bakehouse in place of a block device."""

BASE_FILES = ("root.d", "environment.d", "finalise.d/10-package-origins")
"""Of the operating system's element: what makes the base root."""

RESULT_MODULES = ("build.py", "disk.py", "rootfs.py")
"""Modules of this library whose code can change what is in an image."""


@dataclass(frozen=True)
class Server:
    """A server in a cloud on which Packer works, in place of a machine on this host."""

    cloud: str
    """As in clouds.yaml."""
    flavor: str
    network: str = ""
    """Name or id; empty for the project's only one."""
    volume_size: int = 0
    """GiB of the volume that it boots from; 0 for the flavor's own disk."""
    floating_network: str = ""
    """Where a floating IP comes from; empty where this host reaches the network."""
    security_group: str = "default"


@dataclass(frozen=True)
class Origin:
    """The image that Packer boots in place of the base root that diskimage-builder begins with. See packer_bake."""

    name: str
    """A manifest's, an image's tag, or an address without password."""
    digest: str
    """What it is: the image's input digest; of what is at an address, its checksum."""
    plan: Plan | None = None
    """Of a manifest's, so that it can be baked where the store has none."""
    record: Record | None = None
    """Of one that the store has."""
    address: str = ""
    checksum: str = ""
    """Of what is at the address: ``sha256:`` or ``sha512:`` and its digits."""
    server: Server | None = None
    image: str = ""
    """Of one that a server in a cloud boots: its id in Glance."""


@dataclass(frozen=True)
class Plan:
    """Everything that a bake needs to know."""

    resolved: Resolved
    elements_path: str
    elements: tuple[Element, ...]
    packages: tuple[Package, ...]
    base_packages: tuple[str, ...]
    environment: dict[str, str]
    """Variables for the elements that can change the result."""
    mirrors: tuple[str, str]
    inputs: dict[str, str]
    """Everything that can change the result, by name; files by their digest."""
    base_inputs: dict[str, str]
    origin: Origin | None = None
    """Of a plan that is baked with Packer."""

    @property
    def name(self) -> str:
        """The manifest's name."""
        return self.resolved.name

    @property
    def manifest(self) -> Manifest:
        """The merged manifest."""
        return self.resolved.manifest

    @property
    def digest(self) -> str:
        """SHA-256 over the inputs: the same inputs give the same digest."""
        return digest_of(self.inputs)

    @property
    def base_key(self) -> str:
        """The name of the base root in the cache: release and 16 digits of its inputs' digest."""
        return f"{self.manifest.distribution}-{self.manifest.release}-{digest_of(self.base_inputs)[:16]}"

    def script(self, element: str, name: str) -> Path:
        """Return a script of one of its elements."""
        return next(found.path for found in self.elements if found.name == element) / name

    def sources(self, components: Sequence[str] = ()) -> list[str]:
        """Return where packages come from while it is built, as lines of apt's sources.list.

        Args:
            components: of the archive; the manifest's by default.
        """
        image = self.manifest
        return source_lines(
            self.mirrors, str(image.release), components or image.components, expired=image.snapshot is not None
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain data, for ``--json`` and for other builders."""
        return {
            "name": self.name,
            "platform": self.manifest.platform,
            "extends": list(self.resolved.chain[:-1]),
            "digest": self.digest,
            "builder": "packer" if self.origin else "dib",
            "base": self.origin.name if self.origin else self.base_key,
            "manifest": self.manifest.model_dump(mode="json", exclude={"extends"}),
            "elements": [{"name": e.name, "path": str(e.path), "built_in": e.built_in} for e in self.elements],
            "packages": [{"name": p.name, "element": p.element, "phase": p.phase} for p in self.packages],
            "environment": self.environment,
            "mirrors": [without_credentials(mirror) for mirror in self.mirrors],
            "inputs": self.inputs,
        }


def source_lines(
    mirrors: tuple[str, str], release: str, components: Sequence[str], *, expired: bool = False
) -> list[str]:
    """Return where packages come from, as lines of apt's sources.list(5).

    Args:
        mirrors: the archive and the security archive.
        release: such as trixie.
        components: of the archive.
        expired: the indexes are those of a snapshot, which have run out long ago; their signatures still count.
    """
    archive, security = mirrors
    kind = "deb [check-valid-until=no]" if expired else "deb"
    suites = {release: archive, f"{release}-updates": archive, f"{release}-security": security}
    words = " ".join(components)
    return [f"{kind} {mirror} {suite} {words}" for suite, mirror in suites.items()]


@dataclass(frozen=True)
class Decision:
    """What a bake of a plan would do, and why."""

    image: Record | None
    """The image that makes a build needless."""
    base: BaseRoot | None
    """The cached base root."""
    reasons: tuple[str, ...]
    """Why there is something to build; empty where there is not."""


def make(
    name: str,
    settings: Settings,
    *,
    release: str | None = None,
    formats: tuple[str, ...] = (),
) -> Plan:
    """Resolve a manifest into a plan.

    Args:
        name: the manifest's name.
        settings: the site's settings.
        release: bakes another release than the manifest's.
        formats: makes other files than the manifest's.

    Raises:
        BakehouseError: the manifest, an element or a tool is missing or faulty.
    """
    overrides: dict[str, Any] = {}
    if release:
        overrides["release"] = release
    if formats:
        overrides["disk"] = {"formats": list(formats)}
    places = manifest.folders(settings.manifests)
    resolved = manifest.resolve(name, places, overrides)
    if resolved.manifest.platform is None:
        known = [other for other in manifest.find_all(places) if _platform(other, places)]
        raise BakehouseError(
            f"{name} is a base for other manifests: it has no 'platform'",
            hint=f"bake one of {', '.join(known)}",
        )
    return _plan(resolved, settings)


def _platform(name: str, places: list[Path]) -> str | None:
    try:
        return manifest.resolve(name, places).manifest.platform
    except BakehouseError:
        return None


def _plan(resolved: Resolved, settings: Settings) -> Plan:
    image = resolved.manifest
    path = elements.search_path(settings.elements)
    environment = {
        "DIB_RELEASE": str(image.release),
        "DIB_KERNEL": image.kernel,
        "DIB_INITRAMFS_DRIVERS": "virtual" if image.kernel == "cloud" else "all",
        "DIB_DEBIAN_COMPONENTS": ",".join(image.components),
        "DIB_NODE_MIRROR": settings.node_mirror,
        "DIB_NODE_SECURITY_MIRROR": settings.node_security_mirror,
        **kubernetes.environment(image, settings),
        **image.environment,
    }
    for number, name in enumerate(image.elements):
        elements.must_be_known(name, path, resolved.document.where(("elements", number)))
    try:
        expanded = elements.expand(tuple(image.elements), path)
    except BakehouseError as error:
        raise BakehouseError(f"{resolved.document.where(('elements',))}: {error.message}", hint=error.hint) from error
    packages = elements.packages(expanded, path, environment)
    packages += tuple(Package(name, "manifest", "extra") for name in image.packages)
    # A base may leave the operating system to those that extend it.
    shared = {e.name for e in elements.expand((OPERATING_SYSTEM, *resolved.base_elements), path)}
    base_packages = tuple(sorted({p.name for p in packages if p.element in shared}))

    tools = host.versions()
    base_inputs = _base_inputs(image, base_packages, expanded, settings, tools["mmdebstrap"])
    inputs = dict(base_inputs)
    fields = image.model_dump(mode="json", exclude={"extends", "description", "image_properties"})
    inputs |= {f"manifest {key}": _plain(value) for key, value in fields.items()}
    inputs |= {f"variable {key}": value for key, value in environment.items()}
    inputs |= kubernetes.inputs(image, settings)
    inputs |= {f"package {p.name}": p.element for p in packages}
    inputs |= {f"element {e.name}": "diskimage-builder" for e in expanded if e.built_in}
    for element in [*expanded, *elements.expand((OPERATING_SYSTEM, HAND_OVER), path)]:
        if not element.built_in:
            inputs |= {f"element {element.name}/{file}": digest for file, digest in element.files().items()}
    inputs |= {f"builder {name}": version for name, version in tools.items()}
    for module in RESULT_MODULES:
        code = (Path(__file__).parent / module).read_bytes()
        inputs[f"builder bakehouse/{module}"] = hashlib.sha256(code).hexdigest()
    return Plan(
        resolved=resolved,
        elements_path=path,
        elements=expanded,
        packages=packages,
        base_packages=base_packages,
        environment=environment,
        mirrors=settings.mirrors(image.snapshot),
        inputs=dict(sorted(inputs.items())),
        base_inputs=base_inputs,
    )


def _base_inputs(
    image: Manifest,
    packages: tuple[str, ...],
    expanded: tuple[Element, ...],
    settings: Settings,
    mmdebstrap: str,
) -> dict[str, str]:
    system = next((e for e in expanded if e.name == OPERATING_SYSTEM), None)
    files = system.files() if system else {}
    maker = {f"element {OPERATING_SYSTEM}/{f}": d for f, d in files.items() if f.startswith(BASE_FILES)}
    # The host's own mirror is one of many that hold the same packages. One that a site names may be frozen or
    # changed, so what it is counts.
    named = {"mirror": settings.mirror, "security_mirror": settings.security_mirror} if not image.snapshot else {}
    return {
        "manifest release": str(image.release),
        "manifest architecture": image.architecture,
        "manifest components": _plain(image.components),
        "manifest snapshot": _plain(image.snapshot),
        **{f"setting {key}": without_credentials(value) for key, value in named.items() if value},
        **{f"package {name}": "base" for name in packages},
        "builder mmdebstrap": mmdebstrap,
        **maker,
    }


def without_credentials(url: str) -> str:
    """Return an address without user and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def digest_of(inputs: dict[str, str]) -> str:
    """Return the SHA-256 over inputs by name, whatever their order."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def decide(plan: Plan, store: LocalStore, cache: BaseCache, *, refresh: bool = False, force: bool = False) -> Decision:
    """Say what a bake would do.

    An image is up to date when it has the plan's digest and was built from the base root that the cache holds now (or
    the cache holds none).

    Args:
        plan: the plan.
        store: where images are.
        cache: where base roots are.
        refresh: the base shall be renewed.
        force: build even where nothing changed.
    """
    base = None if refresh else cache.find(plan.base_key)
    images = [record for record in store.records() if record.name == plan.name]
    newest = next(iter(images), None)
    same = next((record for record in images if record.digest == plan.digest), None)
    if refresh:
        return Decision(None, base, ("--refresh: the base root is renewed",))
    if force:
        return Decision(None, base, ("--force",))
    if same:
        renewed = _renewed(plan, same, base)
        return Decision(None if renewed else same, base, renewed)
    if newest is None:
        return Decision(None, base, ("there is no image of it yet",))
    return Decision(None, base, (f"since {newest.tag}:", *difference(newest.inputs, plan.inputs)))


def _renewed(plan: Plan, image: Record, base: BaseRoot | None) -> tuple[str, ...]:
    """Say whether what an image was made of has been renewed since."""
    booted = plan.origin.record if plan.origin else None
    if booted and booted.tag != image.base.key:
        return (f"its base image is now {booted.tag}, not {image.base.key}",)
    if base and image.base.key == base.key and image.base.sha256 != base.sha256:
        return (f"the base root was renewed on {base.created:%Y-%m-%d %H:%M} UTC",)
    return ()


def difference(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Return what changed between two sets of inputs, a line each."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if before == after:
            continue
        if before is None:
            lines.append(f"{name} was added")
        elif after is None:
            lines.append(f"{name} was removed")
        elif name.startswith(("element ", "builder bakehouse/")):
            lines.append(f"{name} changed")
        else:
            lines.append(f"{name} changed from {before} to {after}")
    return lines


def new_tag(digest: str, store: LocalStore, now: datetime.datetime) -> str:
    """Return the tag for a build that starts now: the UTC date and 7 digits, ``.2`` and on where that is taken."""
    return first_free_tag(digest, now, store.taken)


def first_free_tag(digest: str, now: datetime.datetime, taken: Callable[[str], bool]) -> str:
    """Return the first tag of a digest and a day that is not taken. See new_tag()."""
    first = f"{now.astimezone(datetime.UTC):%Y%m%d}-{digest[:7]}"
    number = 1
    tag = first
    while taken(tag):
        number += 1
        tag = f"{first}.{number}"
    return tag
