"""Publishing as a site's settings say: which file, what it says of itself, its signature, whose signatures count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from bakehouse import manifest, properties, signature
from bakehouse import publish as publication
from bakehouse import record as record_module
from bakehouse.cloud import Cloud
from bakehouse.errors import BakehouseError
from bakehouse.properties import Metadata
from bakehouse.published import Catalogue, Published
from bakehouse.record import ImageFile, Record
from bakehouse.settings import Settings
from bakehouse.store import LocalStore

GUEST_AGENT = "qemu-guest-agent"


def publish(
    record: Record,
    settings: Settings,
    store: LocalStore,
    cloud: Cloud,
    console: Console,
    *,
    visibility: str = "",
    kind: str = "",
) -> publication.Done:
    """Publish an image to a cloud, signed where the site has a key, and remove what killed publishers left there.

    Args:
        record: the image.
        settings: of the site.
        store: where the image is.
        cloud: where it goes.
        console: shows progress.
        visibility: who shall see it; the site's setting by default.
        kind: qcow2 or raw; whichever there is by default.

    Raises:
        BakehouseError: see publish.publish().
    """
    known_visibility(visibility)
    file, metadata = described(record, settings, store, kind)
    folder = store.folder(record.tag)
    if signed := _sign(record, settings, file.format, folder):
        signature.write_envelope(folder, signature.statement_of(record, file.format, folder), signed)
    done = publication.publish(
        record,
        file,
        store,
        cloud,
        metadata,
        console,
        visibility=visibility or settings.visibility,
        set_visibility=bool(visibility),
    )

    def warn(text: str) -> None:
        console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    publication.remove_leftovers(Catalogue.read(cloud), store, record.tag, warn)
    return done


def known_visibility(visibility: str) -> str:
    """Return a visibility that --visibility names, or none.

    Raises:
        BakehouseError: Glance knows no such one.
    """
    allowed = ("private", "shared", "community", "public")
    if visibility and visibility not in allowed:
        raise BakehouseError(f"--visibility {visibility}: it is one of {', '.join(allowed)}")
    return visibility


def described(record: Record, settings: Settings, store: LocalStore, kind: str) -> tuple[ImageFile, Metadata]:
    """Return the file to publish and what the image shall say of itself."""
    file, folder = _file(record, kind), store.folder(record.tag)
    overrides: list[tuple[str, properties.Values]] = [("image_properties of the site", settings.image_properties)]
    description = ""
    places = manifest.folders(settings.manifests)
    if record.name in manifest.find_all(places):
        resolved = manifest.resolve(record.name, places).manifest
        description = resolved.description
        overrides.append((f"image_properties of the manifest {record.name}", resolved.image_properties))
    made = properties.make(
        record,
        file,
        description=description,
        overrides=tuple(overrides),
        guest_agent=GUEST_AGENT in store.bill(record),
        record_sha256=record_module.digest(folder / record_module.FILE_NAME),
        signature=_sign(record, settings, file.format, folder),
    )
    return file, made


def _file(record: Record, kind: str) -> ImageFile:
    files = [file for file in record.files if file.format == kind or not kind]
    if not files:
        made = ", ".join(file.format for file in record.files)
        raise BakehouseError(f"{record.tag} has no {kind} file, only {made}", hint=f"bake with --format {kind}")
    return files[0]


def _sign(record: Record, settings: Settings, kind: str, folder: Path) -> signature.Signature | None:
    """Return the site's signature of what is published; None where it has no key."""
    if settings.signing_key is None:
        return None
    key = signature.load_private_key(settings.signing_key)
    return signature.sign(signature.statement_of(record, kind, folder), key)


def signature_check(settings: Settings) -> Callable[[Published], None]:
    """Return what raises where the site demands a signature that an image does not have."""

    def check_it(image: Published) -> None:
        if not settings.require_signature:
            return
        trusted = signature.load_trusted(settings.trusted_keys)
        if image.signature is None:
            raise BakehouseError(
                f"{image.tag} is not signed, and this site demands it (require_signature)",
                hint=f"publish it again where 'signing_key' is set: `invoke publish {image.tag}`",
            )
        signature.verify(image.statement, image.signature, trusted)

    return check_it
