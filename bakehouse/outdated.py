"""Which images are behind their mirror: their SBOMs compared with what it offers now."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bakehouse import apt_index, channel, plan
from bakehouse.apt_index import Index, Newer
from bakehouse.errors import BakehouseError
from bakehouse.published import Catalogue
from bakehouse.record import Record
from bakehouse.settings import Settings
from bakehouse.store import LocalStore


@dataclass(frozen=True)
class Outdated:
    """How far one image is behind."""

    name: str
    """The manifest's."""
    tag: str
    channels: tuple[str, ...]
    """Those that point to it."""
    newer: tuple[Newer, ...]
    """Packages of which the mirror has a newer version, security first."""
    unknown: str = ""
    """Why that is not known."""

    @property
    def security(self) -> int:
        """How many of them are security updates."""
        return sum(one.security for one in self.newer)


def of_store(store: LocalStore, settings: Settings, folder: Path, names: Sequence[str] = ()) -> list[Outdated]:
    """Say how far the newest image of each manifest is behind.

    Args:
        store: where they are.
        settings: of the site: its mirrors count, also for images of a pinned snapshot.
        folder: where apt keeps its files.
        names: only these manifests.

    Raises:
        BakehouseError: a mirror cannot be asked.
    """
    newest: dict[str, Record] = {}
    for record in store.records():
        newest.setdefault(record.name, record)
    chosen = [(record.name, record.tag, ()) for name, record in newest.items() if name in names or not names]
    return _all(chosen, store, settings, folder)


def of_cloud(
    catalogue: Catalogue, store: LocalStore, settings: Settings, folder: Path, names: Sequence[str] = ()
) -> list[Outdated]:
    """Say how far the images that channels point to are behind, and the newest of each manifest without a channel.

    Raises:
        BakehouseError: a mirror cannot be asked.
    """
    pointed = channel.pointed_to(catalogue)
    chosen = []
    for name in catalogue.names():
        images = [image for image in catalogue.named(name) if image.usable]
        wanted = [image for image in images if image.id in pointed] or images[:1]
        if name in names or not names:
            chosen += [(name, image.tag, tuple(sorted(pointed.get(image.id, [])))) for image in wanted]
    return _all(chosen, store, settings, folder)


def _all(
    chosen: Iterable[tuple[str, str, tuple[str, ...]]], store: LocalStore, settings: Settings, folder: Path
) -> list[Outdated]:
    records = {record.tag: record for record in store.records()}
    indexes: dict[tuple[str, ...], Index] = {}
    found = [_one(name, tag, at, records, store, settings, folder, indexes) for name, tag, at in chosen]
    return sorted(found, key=lambda one: (-one.security, -len(one.newer), one.name, one.tag))


def _one(
    name: str,
    tag: str,
    channels: tuple[str, ...],
    records: Mapping[str, Record],
    store: LocalStore,
    settings: Settings,
    folder: Path,
    indexes: dict[tuple[str, ...], Index],
) -> Outdated:
    record = records.get(tag)
    if record is None:
        return Outdated(name, tag, channels, (), "its SBOM is not in this store")
    try:
        bill = store.bill(record)
    except BakehouseError as error:
        return Outdated(name, tag, channels, (), error.message)
    components = json.loads(record.inputs.get("manifest components", '["main"]'))
    sources = tuple(plan.source_lines(settings.mirrors(), record.release, components))
    if sources not in indexes:
        indexes[sources] = apt_index.fetch(sources, folder, record.architecture)
    return Outdated(name, tag, channels, tuple(indexes[sources].newer(bill)))
