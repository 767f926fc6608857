"""Channels: moving pointers to published images. Their history stands at the images themselves, in Glance.

A move is one property, written to the image that the channel moves to, with a number higher than all before. The
channel points to the image with the highest number: so it moves in one step, and there is no moment in which it points
nowhere.
"""

from __future__ import annotations

import dataclasses
import getpass
import re
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus

from bakehouse.cloud import Cloud, CloudError
from bakehouse.errors import BakehouseError
from bakehouse.glance import Glance
from bakehouse.properties import QUOTA
from bakehouse.published import Catalogue, Move, Published

MOST_ROUNDS = 20
"""How often a move looks whether others moved at the same moment."""

GIVE_WAY_SECONDS = 0.5
"""How long the second of two with the same number has to see that and to give way."""

KEPT_MOVES = 8
"""Moves of one channel that one image keeps; the oldest go."""


@dataclass(frozen=True)
class History:
    """What a channel has pointed to."""

    name: str
    """The manifest's."""
    channel: str
    moves: tuple[Move, ...]
    """All that are still known, the oldest first. Those to deleted images went with them."""
    stack: tuple[Published, ...]
    """The images that rolling back leads through: the last one is where it points to."""

    @property
    def current(self) -> Published | None:
        """Where it points to."""
        return self.stack[-1] if self.stack else None

    @property
    def previous(self) -> Published | None:
        """Where rolling back leads."""
        return next((image for image in reversed(self.stack[:-1]) if image.usable and image is not self.current), None)


@dataclass(frozen=True)
class Moved:
    """What a move came to."""

    history: History
    before: Published | None
    now: Published
    hidden: tuple[Published, ...]
    """Images that are no channel's any more and were hidden."""
    moved: bool
    """False where it pointed there already."""


def check_name(channel: str) -> str:
    """Return a channel's name.

    Raises:
        BakehouseError: it is none.
    """
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,30}", channel):
        raise BakehouseError(
            f"'{channel}' is not a channel's name", hint="small letters, digits and dashes, such as stable or candidate"
        )
    return channel


def history(catalogue: Catalogue, name: str, channel: str) -> History:
    """Return the history of a manifest's channel."""
    images = {image.id: image for image in catalogue.named(name)}
    moves = sorted((move for image in images.values() for move in image.moves if move.channel == channel), key=_order)
    stack: list[Published] = []
    for move in moves:
        image = images[move.image]
        if move.kind == "rollback" and image in stack[:-1]:
            stack.pop()
            while stack[-1] is not image:
                stack.pop()
        elif not stack or stack[-1] is not image:
            stack.append(image)
    return History(name, channel, tuple(moves), tuple(stack))


def _order(move: Move) -> tuple[int, str]:
    # Two that moved at the same moment have one number, for as long as it takes the second to see that.
    return move.number, move.image


def current(catalogue: Catalogue, name: str, channel: str) -> Published:
    """Return the image that a channel points to.

    Raises:
        BakehouseError: it points to none, or to one that nothing can be made of.
    """
    found = history(catalogue, name, channel).current
    if found is None:
        there = sorted({other for manifest, other in catalogue.channels() if manifest == name})
        known = f"its channels: {', '.join(there)}; " if there else ""
        raise BakehouseError(
            f"no image of {name} is in the channel '{channel}' of {catalogue.cloud.place}",
            hint=f"{known}`invoke promote TAG --to {channel} --cloud {catalogue.cloud.name}` puts one there",
        )
    if not found.usable:
        raise BakehouseError(
            f"the channel '{channel}' of {name} points to {found.tag}, which is '{found.image.status}'",
            hint=f"`invoke rollback --platform {name} --channel {channel}` goes back one step",
        )
    return found


def pointed_to(catalogue: Catalogue) -> dict[str, list[str]]:
    """Return the channels that point to each image, by its id."""
    found: dict[str, list[str]] = {}
    for name, channel in catalogue.channels():
        image = history(catalogue, name, channel).current
        if image:
            found.setdefault(image.id, []).append(channel)
    return found


def promote(
    cloud: Cloud,
    owner: str,
    tag: str,
    channel: str,
    *,
    force: bool = False,
    dry_run: bool = False,
    check: Callable[[Published], None] = lambda _image: None,
) -> Moved:
    """Move a channel to an image.

    Args:
        cloud: where.
        owner: project whose images count; the credential's own where empty.
        tag: the image.
        channel: the channel; it is made where it is new.
        force: also where the image is not verified. It is kept in the history.
        dry_run: change nothing.
        check: raises where an image may not be promoted for a reason of the site, such as a missing signature.

    Raises:
        BakehouseError: there is no such image, it is not whole, or it is not verified.
    """
    check_name(channel)
    catalogue = Catalogue.read(cloud, owner)
    target = catalogue.get(tag)
    must_be_fit(target, force=force)
    check(target)
    return _move(catalogue, target, channel, "promote", forced=force and target.verified != "passed", dry_run=dry_run)


def must_be_fit(image: Published, *, force: bool) -> None:
    """Check that an image may go into a channel.

    Raises:
        BakehouseError: it may not.
    """
    if not image.usable:
        state = "its upload did not come to its end" if image.incoming else f"it is '{image.image.status}'"
        raise BakehouseError(
            f"{image.tag} cannot be promoted: {state}", hint=f"`invoke publish {image.tag}` brings it to its end"
        )
    if image.verified != "passed" and not force:
        how = "failed its verification" if image.verified == "failed" else "has not been verified"
        raise BakehouseError(
            f"{image.tag} {how}",
            hint=f"`invoke verify {image.tag}` and publish again; --force promotes it all the same, which is kept in "
            "the channel's history",
        )


def rollback(cloud: Cloud, owner: str, name: str, channel: str, *, dry_run: bool = False) -> Moved:
    """Move a channel back by one image.

    Args:
        cloud: where.
        owner: project whose images count; the credential's own where empty.
        name: the manifest.
        channel: its channel.
        dry_run: change nothing.

    Raises:
        BakehouseError: there is nothing to go back to.
    """
    check_name(channel)
    catalogue = Catalogue.read(cloud, owner)
    past = history(catalogue, name, channel)
    if past.current is None:
        current(catalogue, name, channel)
    target = past.previous
    if target is None:
        raise BakehouseError(
            f"the channel '{channel}' of {name} has no image before {past.stack[-1].tag} to go back to",
            hint="`invoke promote TAG` moves it to any other image",
        )
    return _move(catalogue, target, channel, "rollback", forced=False, dry_run=dry_run)


def _move(catalogue: Catalogue, target: Published, channel: str, kind: str, *, forced: bool, dry_run: bool) -> Moved:
    past = history(catalogue, target.name, channel)
    before = past.current
    if before is not None and before.id == target.id:
        hidden = _settle(catalogue, target.name) if not dry_run else ()
        return Moved(past, before, target, hidden, moved=False)
    number = past.moves[-1].number + 1 if past.moves else 1
    move = Move(
        channel=channel,
        number=number,
        image=target.id,
        tag=target.tag,
        kind=kind,
        at=f"{catalogue.cloud.clock:%Y-%m-%dT%H:%M:%SZ}",
        by=_who(),
        before=before.tag if before else "",
        forced=forced,
    )
    if dry_run:
        would = tuple(image for image in (before,) if image and _would_be_hidden(catalogue, image, channel))
        return Moved(past, before, target, would, moved=True)
    catalogue = _write(catalogue, target, move)
    hidden = _settle(catalogue, target.name)
    catalogue = Catalogue.read(catalogue.cloud, catalogue.owner)
    return Moved(history(catalogue, target.name, channel), before, target, hidden, moved=True)


def _write(catalogue: Catalogue, target: Published, move: Move) -> Catalogue:
    """Write a move, and see to it that it comes after all that were made at the same moment.

    Glance changes an image as a whole: what somebody else writes to the same image at the same moment can undo ours. So
    it is read back until it stands.
    """
    given_way = False
    for _ in range(MOST_ROUNDS):
        image = next((one for one in catalogue.images if one.id == target.id), None)
        if image is None:
            raise BakehouseError(f"{target.tag} has been deleted meanwhile", hint="promote another image")
        others = [
            other
            for one in catalogue.named(target.name)
            for other in one.moves
            if other.channel == move.channel and other.image != target.id
        ]
        own = image.image.properties.get(move.property) == move.value()
        same = [other for other in others if other.number == move.number]
        clash = [other for other in same if given_way or _order(other) > _order(move)]
        if own and not same:
            return catalogue
        if own and not clash:
            # The other one gives way, unless it looked before we wrote, and is content.
            given_way = True
            time.sleep(GIVE_WAY_SECONDS)
            catalogue = Catalogue.read(catalogue.cloud, catalogue.owner)
            continue
        changes: dict[str, object] = {}
        if clash:
            # The other one has this number: we come after it.
            given_way = False
            changes[move.property] = None
            highest = max(other.number for other in others)
            move = dataclasses.replace(move, number=highest + 1, before=max(others, key=_order).tag)
        changes |= {move.property: move.value(), "os_hidden": False, **_outdated(image, move.channel)}
        try:
            Glance(catalogue.cloud).change(image.image, changes)
        except CloudError as error:
            if error.status != HTTPStatus.CONFLICT:
                raise
            # A property that was to go has gone already: look again.
        catalogue = Catalogue.read(catalogue.cloud, catalogue.owner)
    raise BakehouseError(f"others move the channel '{move.channel}' all the time", hint="ask who does, and try again")


def _outdated(image: Published, channel: str) -> dict[str, object]:
    """Return the oldest moves of an image, to be removed, where there are many."""
    own = [move for move in image.moves if move.channel == channel]
    crowded = len(image.image.properties) > QUOTA - 2
    keep = KEPT_MOVES - 1 if not crowded else 1
    return {move.property: None for move in own[: max(len(own) - keep, 0)]}


def _settle(catalogue: Catalogue, name: str) -> tuple[Published, ...]:
    """Hide what channels have left behind, and show what they point to, until that is so.

    Also mends what a killed run left half done.
    """
    hidden: dict[str, Published] = {}
    for _ in range(MOST_ROUNDS):
        wrong = wrongly_shown(catalogue, name)
        if not wrong:
            break
        for image in wrong:
            try:
                Glance(catalogue.cloud).change(image.image, {"os_hidden": not image.image.hidden})
            except CloudError as error:
                if error.status != HTTPStatus.NOT_FOUND:
                    raise
            if not image.image.hidden:
                hidden[image.id] = image
        catalogue = Catalogue.read(catalogue.cloud, catalogue.owner)
    return tuple(hidden.values())


def wrongly_shown(catalogue: Catalogue, name: str) -> list[Published]:
    """Return images that are hidden though a channel points to them, or shown though all channels have left them."""
    pointed = pointed_to(catalogue)
    return [
        image
        for image in catalogue.named(name)
        if image.usable and image.moves and image.image.hidden == (image.id in pointed)
    ]


def _would_be_hidden(catalogue: Catalogue, image: Published, channel: str) -> bool:
    return not set(pointed_to(catalogue).get(image.id, [])) - {channel}


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "?"
    return f"{user}@{socket.gethostname()}"


def needed_by_history(histories: Iterable[History], steps: int) -> dict[str, str]:
    """Return the images that rolling back by so many steps needs, by id, each with the channel that needs it."""
    needed: dict[str, str] = {}
    for past in histories:
        for image in past.stack[-1 - steps : -1]:
            needed.setdefault(image.id, past.channel)
    return needed
