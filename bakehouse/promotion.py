"""Promotion by a site's policy: which image a channel such as stable may move to, and why not to a newer one."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bakehouse import channel as channels
from bakehouse import sbom
from bakehouse.errors import BakehouseError
from bakehouse.published import Catalogue, Published
from bakehouse.record import Record
from bakehouse.sbom import Package, is_older
from bakehouse.settings import Promotion
from bakehouse.store import LocalStore

CANDIDATE = "candidate"
"""The channel of what was baked last and passed its verification."""

TOLERANCE = datetime.timedelta(hours=6)
"""Nights do not begin on the minute: an image has soaked for a night after 18 hours."""

STALE_FEED = datetime.timedelta(days=3)
"""A feed of CVEs that is older is told: it knows of no newer hole."""

NOT_AFFECTED = "0"
"""The version in which the tracker says that a release was never affected."""

NAMED = 5
"""CVEs that a message names."""


@dataclass(frozen=True)
class Ruling:
    """What becomes of a channel."""

    image: Published | None
    """Where it shall move to; None for nowhere."""
    why: str
    """Why not to a newer one, or not at all."""
    needs_person: bool = False
    """Whether what holds an image back does not pass by itself."""


@dataclass(frozen=True)
class Cve:
    """A hole in a package of an image."""

    name: str
    source: str
    urgency: str


def new_candidate(catalogue: Catalogue, image: Published) -> str:
    """Return why an image shall not become the candidate; empty where it shall."""
    return _unverified(image) or _been_there(catalogue, image, CANDIDATE)


def _unverified(image: Published) -> str:
    """Return what is amiss with an image's verification; empty where it passed."""
    if image.verified == "passed":
        return ""
    return "it is not verified" if image.verified == "none" else "it failed its verification"


def choose(
    catalogue: Catalogue,
    name: str,
    policy: Promotion,
    store: LocalStore,
    check: Callable[[Published], None],
) -> Ruling:
    """Say which image of a manifest the policy's channel shall move to: the newest that meets the policy.

    Args:
        catalogue: what is in the cloud.
        name: the manifest.
        policy: the site's.
        store: where SBOMs and sizes are.
        check: raises where the site demands more of an image, such as a signature.
    """
    try:
        feed = read_feed(policy.cve_feed) if policy.cve_feed else None
    except BakehouseError as error:
        return Ruling(None, error.message, needs_person=True)
    held: list[str] = []
    person = False
    for image in catalogue.named(name):
        if any(move.channel == policy.channel for move in image.moves):
            break
        if not image.usable or not _arrivals(image):
            continue
        why, passes = _held(catalogue, image, policy, store, feed, check)
        if not why:
            return Ruling(image, "; ".join(held), person)
        held.append(f"{image.tag}: {why}")
        person = person or not passes
    return Ruling(None, "; ".join(held) or "nothing is newer", person)


def _held(
    catalogue: Catalogue,
    image: Published,
    policy: Promotion,
    store: LocalStore,
    feed: Mapping[str, Any] | None,
    check: Callable[[Published], None],
) -> tuple[str, bool]:
    """Return why an image may not be promoted, empty where it may, and whether that passes by itself."""
    if why := _unverified(image):
        return why, False
    if why := _been_there(catalogue, image, policy.channel):
        return why, True
    since = catalogue.cloud.clock - min(map(_time, _arrivals(image)))
    wanted = datetime.timedelta(days=policy.soak_nights)
    if policy.soak_nights and since < wanted - TOLERANCE:
        left = -(-(wanted - TOLERANCE - since) // datetime.timedelta(days=1))
        return f"it soaks for {left} more night{'s' if left != 1 else ''}", True
    try:
        check(image)
    except BakehouseError as error:
        return error.message, False
    records = {record.tag: record for record in store.records() if record.name == image.name}
    why = _holes(records.get(image.tag), policy, store, feed) or _too_different(
        catalogue, image, policy, store, records
    )
    return why, not why


def _arrivals(image: Published) -> list[str]:
    """Return when it became the candidate. Where somebody has rolled candidate back from it, that counts no more."""
    moves = [move for move in image.moves if move.channel == CANDIDATE]
    return [move.at for move in moves] if any(not move.over for move in moves) else []


def _holes(own: Record | None, policy: Promotion, store: LocalStore, feed: Mapping[str, Any] | None) -> str:
    """Return what is known of open CVEs that hold an image back; empty for none."""
    if feed is None:
        return ""
    if own is None:
        return "its SBOM is not in this store, so that its CVEs cannot be looked up"
    found = open_cves(feed, store.bill(own), own.release, policy.cve_urgencies)
    names = ", ".join(f"{one.name} ({one.source})" for one in found[:NAMED])
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return f"open CVEs: {names}{more}" if found else ""


def _too_different(
    catalogue: Catalogue, image: Published, policy: Promotion, store: LocalStore, records: Mapping[str, Record]
) -> str:
    """Return why an image differs too much from the one that the channel points to; empty where it does not."""
    present = channels.history(catalogue, image.name, policy.channel).current
    if present is None:
        return ""
    if policy.max_changed_packages is not None:
        own, before = records.get(image.tag), records.get(present.tag)
        if own is None or before is None:
            missing = image.tag if own is None else present.tag
            return f"the SBOM of {missing} is not in this store, so that they cannot be compared"
        changes = sbom.difference(store.bill(before), store.bill(own))
        if len(changes) > policy.max_changed_packages:
            return (
                f"{len(changes)} packages differ from {present.tag}, {policy.max_changed_packages} may "
                f"(max_changed_packages); `invoke diff {present.tag} {image.tag}` lists them"
            )
    growth = 100 * (image.image.size - present.image.size) / present.image.size if present.image.size else 0
    if policy.max_growth_percent is not None and growth > policy.max_growth_percent:
        limit = f"{policy.max_growth_percent:g} % may be (max_growth_percent)"
        return f"it is {growth:.1f} % larger than {present.tag}, {limit}"
    return ""


def _been_there(catalogue: Catalogue, image: Published, channel: str) -> str:
    """Return why a channel shall not move to an image by itself: it has been there, or further on, already.

    Somebody who rolled a channel back had a reason: the night does not undo it.
    """
    if any(move.channel == channel for move in image.moves):
        return f"it has been in {channel} already"
    newer = [
        other
        for other in catalogue.named(image.name)
        if baked(other) > baked(image) and any(move.channel == channel for move in other.moves)
    ]
    return f"{newer[0].tag}, which is newer, has been in {channel} already" if newer else ""


def baked(image: Published) -> datetime.datetime:
    """Return when it was baked, or, where it does not say so, came to the cloud."""
    try:
        return datetime.datetime.fromisoformat(image.says("created")).astimezone(datetime.UTC)
    except ValueError:
        return image.image.created


def _time(text: str) -> datetime.datetime:
    try:
        return datetime.datetime.fromisoformat(text).astimezone(datetime.UTC)
    except ValueError:
        # A move whose time cannot be read has soaked for no time.
        return datetime.datetime.max.replace(tzinfo=datetime.UTC)


# CVEs -----------------------------------------------------------------------------------------------------------------


def read_feed(path: Path) -> Mapping[str, Any]:
    """Read a local copy of the Debian security tracker's JSON (security-tracker.debian.org/tracker/data/json).

    Raises:
        BakehouseError: it cannot be read, or it is something else.
    """
    hint = "fetch https://security-tracker.debian.org/tracker/data/json before each night"
    try:
        feed = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BakehouseError(f"the feed of CVEs {path} cannot be read: {error.strerror}", hint=hint) from error
    except ValueError as error:
        raise BakehouseError(f"the feed of CVEs {path} is not JSON: {error}", hint=hint) from error
    if not isinstance(feed, dict) or not all(isinstance(holes, dict) for holes in feed.values()):
        raise BakehouseError(
            f"{path} is not the security tracker's JSON: source packages, each with its CVEs", hint=hint
        )
    return feed


def age_of_feed(path: Path) -> datetime.timedelta:
    """Return how long ago the feed was written."""
    written = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
    return datetime.datetime.now(datetime.UTC) - written


def open_cves(feed: Mapping[str, Any], bill: Mapping[str, Package], release: str, urgencies: list[str]) -> list[Cve]:
    """Return the CVEs that are open in an image, by name.

    Args:
        feed: see read_feed().
        bill: the image's packages.
        release: such as trixie.
        urgencies: those of the tracker that count.
    """
    found = set[tuple[str, str, str]]()
    for package in bill.values():
        source = package.source or package.name
        version = package.source_version or package.version
        for name, hole in feed.get(source, {}).items():
            told = hole.get("releases", {}).get(release) if isinstance(hole, dict) else None
            if not isinstance(told, dict) or told.get("urgency") not in urgencies:
                continue
            fixed = str(told.get("fixed_version") or "")
            is_open = fixed != NOT_AFFECTED and (not fixed or is_older(version, fixed))
            # A release whose fix is told only as "resolved" has it in what it ships.
            if is_open and (told.get("status") == "open" or fixed):
                found.add((str(name), source, str(told["urgency"])))
    return [Cve(*one) for one in sorted(found)]
