"""Retention: which published images go, which stay, and why. First a plan; nothing is deleted without one."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bakehouse import channel, pin
from bakehouse.cloud import CloudError
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

    An image stays if it is one of the newest, if a channel points to it or may be rolled back to it, if a lock file
    pins it, or if a server was made of it.

    Args:
        catalogue: what is in the cloud.
        usage: what servers use.
        pins: ids that lock files pin, and which file does.
        keep: how many of each manifest stay in any case, the newest.
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
        newest = [image.id for image in images if not image.incoming][:keep]
        for image in images:
            why = _reason_to_stay(image, newest, pointed, needed, pins, usage, catalogue.cloud.clock)
            age = max(catalogue.cloud.clock - image.image.created, datetime.timedelta(0))
            found.append(Verdict(image, not why, why or _reason_to_go(image, keep), age))
    return found


def _reason_to_stay(
    image: Published,
    newest: list[str],
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
        f"one of the {len(newest)} newest": image.id in newest,
    }
    return next((why for why, holds in reasons.items() if holds), "")


def _reason_to_go(image: Published, keep: int) -> str:
    return "its upload never came to its end" if image.incoming else f"{keep} newer ones are there"


def delete(catalogue: Catalogue, verdicts: Iterable[Verdict]) -> list[Gone]:
    """Delete what a plan says. One that cannot be deleted keeps no other from it.

    Each is looked at once more before: somebody may have promoted it since the plan was made.
    """
    glance = Glance(catalogue.cloud)
    done = []
    for verdict in verdicts:
        if not verdict.delete:
            continue
        try:
            done.append(Gone(verdict.image, _delete_one(glance, verdict.image)))
        except CloudError as error:
            done.append(Gone(verdict.image, error.message))
    return done


def _delete_one(glance: Glance, image: Published) -> str:
    now = glance.get(image.id)
    if now is None:
        return ""
    then = Published(now)
    if (then.moves, then.incoming, now.status) != (image.moves, image.incoming, image.image.status):
        return "it has changed since the plan was made: look again"
    glance.delete(now)
    return ""


def pinned(folder: Path, more: Iterable[Path] = ()) -> dict[str, Path]:
    """Return the ids that lock files pin, and which file does.

    Args:
        folder: searched with all below it for files named images.lock.yaml.
        more: other lock files.

    Raises:
        BakehouseError: a lock file cannot be read. What it pins is not known then, and nothing may be deleted.
    """
    found: dict[str, Path] = {}
    for path in [*pin.find(folder), *more]:
        for entry in pin.read(path).images:
            found.setdefault(entry.id, path)
    return found
