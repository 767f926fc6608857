"""Retention: which published images go, which stay, and why. First a plan; nothing is deleted without one."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bakehouse import channel, pin
from bakehouse.cloud import Cloud, CloudError
from bakehouse.compute import Usage
from bakehouse.errors import BakehouseError
from bakehouse.glance import Glance
from bakehouse.published import Catalogue, Published


@dataclass(frozen=True)
class Verdict:
    """What shall become of one image, and why."""

    image: Published
    delete: bool
    why: str
    age: datetime.timedelta


@dataclass(frozen=True)
class Gone:
    """What became of one deletion."""

    image: Published
    error: str
    """Empty where it was deleted."""


def plan(
    catalogue: Catalogue,
    usage: Usage,
    pins: Mapping[str, Path],
    *,
    keep: int,
    rollback_steps: int,
    names: Iterable[str] = (),
) -> list[Verdict]:
    """Say what shall become of each image, the newest first.

    An image stays if it is one of the newest or the newest that passed its verification, if a channel points to it or
    may be rolled back to it, if a lock file pins it, or if a server was made of it.

    Args:
        catalogue: what is in the cloud.
        usage: what servers use.
        pins: ids that lock files pin, and which file does.
        keep: how many of each manifest stay in any case, the newest. Images that failed their verification and those
            that nothing can be made of do not count.
        rollback_steps: how many steps back each channel shall be able to go.
        names: only images of these manifests; of all where empty.

    Raises:
        BakehouseError: keep is less than one.
    """
    if keep < 1:
        raise BakehouseError(f"--keep {keep}: it is 1 or more", hint="`openstack image delete` deletes single images")
    chosen = sorted(set(names)) or catalogue.names()
    unknown = sorted(set(chosen) - set(catalogue.names()))
    if unknown:
        raise BakehouseError(
            f"{catalogue.cloud.place} has no images of {', '.join(unknown)}",
            hint=f"it has images of {', '.join(catalogue.names()) or 'none'}",
        )
    pointed = channel.pointed_to(catalogue)
    histories = [channel.history(catalogue, name, one) for name, one in catalogue.channels()]
    needed = channel.needed_by_history(histories, rollback_steps)
    found = []
    for name in chosen:
        images = catalogue.named(name)
        newest = _newest(images, keep)
        for image in images:
            why = _reason_to_stay(image, newest, pointed, needed, pins, usage, catalogue.cloud.clock)
            age = max(catalogue.cloud.clock - image.image.created, datetime.timedelta(0))
            found.append(Verdict(image, not why, why or _reason_to_go(image, keep), age))
    return found


def _newest(images: list[Published], keep: int) -> dict[str, str]:
    """Return the images that stay for their age, by id, each with the reason."""
    good = [image.id for image in images if image.usable and image.verified != "failed"][:keep]
    whole = [image.id for image in images if not image.incoming]
    last = whole.index(good[-1]) + 1 if len(good) == keep else len(whole)
    found = dict.fromkeys(whole[:last], f"not {keep} good ones are newer")
    passed = [image.id for image in images if image.usable and image.verified == "passed"][:1]
    found |= dict.fromkeys(passed, "the newest that passed its verification")
    return found | dict.fromkeys(good, f"one of the {len(good)} newest")


def _reason_to_stay(
    image: Published,
    newest: Mapping[str, str],
    pointed: Mapping[str, list[str]],
    needed: Mapping[str, str],
    pins: Mapping[str, Path],
    usage: Usage,
    now: datetime.datetime,
) -> str:
    servers = usage.servers[image.id]
    reasons = {
        f"channel {', '.join(pointed.get(image.id, []))}": image.id in pointed,
        f"channel {needed.get(image.id)} may be rolled back to it": image.id in needed,
        f"pinned by {pins.get(image.id)}": image.id in pins,
        f"used by {servers} server{'s' if servers != 1 else ''}": servers > 0,
        "protected": image.image.protected,
        "its upload may still be going on": image.incoming and not image.abandoned(now),
    }
    return next((why for why, holds in reasons.items() if holds), newest.get(image.id, ""))


def _reason_to_go(image: Published, keep: int) -> str:
    return "its upload never came to its end" if image.incoming else f"{keep} newer ones are there"


def delete(cloud: Cloud, verdicts: Iterable[Verdict], again: Iterable[Verdict]) -> list[Gone]:
    """Delete what a plan says. One that cannot be deleted keeps no other from it.

    Args:
        cloud: where the images are.
        verdicts: the plan.
        again: the same plan, made anew just now. Meanwhile somebody may have promoted an image, made a server of it, or
            brought its upload to its end: only what both plans delete goes, and only if it is as it was.
    """
    latest = {verdict.image.id: verdict for verdict in again}
    done = []
    for verdict in verdicts:
        if not verdict.delete:
            continue
        try:
            done.append(Gone(verdict.image, _delete_one(Glance(cloud), verdict.image, latest.get(verdict.image.id))))
        except CloudError as error:
            done.append(Gone(verdict.image, error.message))
    return done


def _delete_one(glance: Glance, image: Published, latest: Verdict | None) -> str:
    if latest and not latest.delete:
        return f"it is needed since the plan was made: {latest.why}"
    now = glance.get(image.id)
    if now is not None and now != image.image:
        return "it has changed since the plan was made: look again"
    if now is not None:
        glance.delete(now)
    return ""


def pinned(folder: Path, more: Iterable[Path] = ()) -> dict[str, Path]:
    """Return the ids that lock files pin, and which file does.

    Args:
        folder: the git repository that it is in is searched for files named images.lock.yaml; without one, the folder
            and all below it.
        more: other lock files.

    Raises:
        BakehouseError: a lock file or a folder cannot be read. What it pins is not known then, and nothing may be
            deleted.
    """
    found: dict[str, Path] = {}
    for path in [*pin.find(pin.top(folder)), *more]:
        for entry in pin.read(path).images:
            found.setdefault(entry.id, path)
    return found
