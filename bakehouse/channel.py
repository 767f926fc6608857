"""Channels: moving pointers to published images. Their history stands at the images themselves, in Glance.

A move is one property, written to the image that the channel moves to, with a number higher than all before. The
channel points to the image with the highest number: so it moves in one step, and there is no moment in which it points
nowhere. Then it is noted at the image that was left how the channel left it: so that stays known when other images are
deleted, and a channel never falls back to an image that it was rolled back from.
"""

from __future__ import annotations

import dataclasses
import getpass
import os
import re
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
"""Moves of one channel that one image keeps. Those go first that do not matter for rolling back, then the oldest."""

CI_USERS = ("GITLAB_USER_LOGIN", "GITHUB_ACTOR")
"""Variables by which GitLab and GitHub name who started a job."""


@dataclass(frozen=True)
class History:
    """What a channel has pointed to."""

    name: str
    """The manifest's."""
    channel: str
    moves: tuple[Move, ...]
    """All that are still known, the oldest first. What is known of deleted images stands at their neighbours."""
    path: tuple[Move, ...]
    """The moves that no later one came to the place of, or below it: rolling back leads through them."""
    stack: tuple[Published, ...]
    """The images of the path that are still there."""

    @property
    def current(self) -> Published | None:
        """Where it points to. None where it points nowhere, or to an image that has been deleted."""
        return self.stack[-1] if self.stack and self.stack[-1].id == self.moves[-1].image else None

    @property
    def back(self) -> list[Published]:
        """Where rolling back leads, step by step."""
        found, at = list[Published](), self.current
        for image in reversed(self.stack):
            if image.usable and image is not at:
                found.append(image)
                at = image
        return found

    def untold(self, image: Published) -> dict[str, object]:
        """Return the properties that tell how the channel left an image, as far as the image does not have them yet."""
        own = [move for move in image.moves if move.channel == self.channel]
        over = [
            move
            for move in own
            if not move.over and any(one.number > move.number and one.depth <= move.depth for one in self.moves)
        ]
        found: dict[str, object] = {move.key: dataclasses.replace(move, over=True).value() for move in over}
        arrived = max((move.number for move in own), default=0)
        left = max((move.number for move in image.departures if move.channel == self.channel), default=0)
        later = [move for move in self.moves if move.number > arrived and move.image != image.id]
        if arrived > left and later:
            found[later[0].left_key] = later[0].left_value()
        return found


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
    arrivals = [move for image in images.values() for move in image.moves if move.channel == channel]
    numbers = {move.number for move in arrivals}
    # Departures tell of moves to images that are gone. Two that moved at once may have left one that nobody made.
    lost = {
        move.number: move
        for image in images.values()
        for move in image.departures
        if move.channel == channel and move.number not in numbers
    }
    moves = sorted([*arrivals, *lost.values()], key=_order)
    path: list[Move] = []
    for move in reversed(moves):
        if not move.over and (not path or move.depth < path[0].depth):
            path.insert(0, move)
    stack = tuple(images[move.image] for move in path if move.image in images)
    return History(name, channel, tuple(moves), tuple(path), stack)


def _order(move: Move) -> tuple[int, str]:
    # Two that moved at the same moment have one number, for as long as it takes the second to see that.
    return move.number, move.image


def current(catalogue: Catalogue, name: str, channel: str) -> Published:
    """Return the image that a channel points to.

    Raises:
        BakehouseError: it points to none, or to one that nothing can be made of.
    """
    past = history(catalogue, name, channel)
    found = past.current
    if not past.moves:
        there = sorted({other for manifest, other in catalogue.channels() if manifest == name})
        known = f"its channels: {', '.join(there)}; " if there else ""
        raise BakehouseError(
            f"no image of {name} is in the channel '{channel}' of {catalogue.cloud.place}",
            hint=f"{known}`invoke promote TAG --to {channel} --cloud {catalogue.cloud.name}` puts one there",
        )
    if found is None:
        raise BakehouseError(
            f"the channel '{channel}' of {name} points to {past.moves[-1].tag}, which has been deleted",
            hint=f"`invoke promote TAG --to {channel}` moves it to another image, `invoke rollback --platform {name} "
            f"--channel {channel}` to the one before",
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


def nothing_more(_image: Published) -> None:
    """Check nothing: the site demands no more of an image."""


def promote(
    cloud: Cloud,
    owner: str,
    tag: str,
    channel: str,
    *,
    force: bool = False,
    dry_run: bool = False,
    check: Callable[[Published], None] = nothing_more,
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
    forced = must_be_fit(target, force=force)
    check(target)
    return _move(catalogue, target, channel, "promote", forced=forced, dry_run=dry_run)


def must_be_fit(image: Published, *, force: bool) -> bool:
    """Check that an image may go into a channel. Return whether it may by force only.

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
            hint=f"`invoke verify {image.tag}` and publish again; --force takes it all the same, which is kept in the "
            "channel's history",
        )
    return image.verified != "passed"


def rollback(
    cloud: Cloud,
    owner: str,
    name: str,
    channel: str,
    *,
    force: bool = False,
    dry_run: bool = False,
    check: Callable[[Published], None] = nothing_more,
) -> Moved:
    """Move a channel back by one image, which has to be as good as one that is promoted.

    Args:
        cloud: where.
        owner: project whose images count; the credential's own where empty.
        name: the manifest.
        channel: its channel.
        force: also where the image is not verified. It is kept in the history.
        dry_run: change nothing.
        check: raises where an image may not be in a channel for a reason of the site, such as a missing signature.

    Raises:
        BakehouseError: there is nothing to go back to, or it may not be in a channel.
    """
    check_name(channel)
    catalogue = Catalogue.read(cloud, owner)
    past = history(catalogue, name, channel)
    if not past.moves:
        current(catalogue, name, channel)
    if not past.back:
        raise BakehouseError(
            f"the channel '{channel}' of {name} has no image before {past.moves[-1].tag} to go back to",
            hint="`invoke promote TAG` moves it to any other image",
        )
    target = past.back[0]
    forced = must_be_fit(target, force=force)
    check(target)
    return _move(catalogue, target, channel, "rollback", forced=forced, dry_run=dry_run)


def _move(catalogue: Catalogue, target: Published, channel: str, kind: str, *, forced: bool, dry_run: bool) -> Moved:
    past = history(catalogue, target.name, channel)
    before = past.current
    if before is not None and before.id == target.id:
        hidden = _settle(catalogue, target.name) if not dry_run else ()
        return Moved(past, before, target, hidden, moved=False)
    last = past.moves[-1] if past.moves else None
    move = Move(
        channel=channel,
        number=last.number + 1 if last else 1,
        image=target.id,
        tag=target.tag,
        kind=kind,
        at=f"{catalogue.cloud.clock:%Y-%m-%dT%H:%M:%SZ}",
        by=_who(),
        before=last.tag if last else "",
        depth=_depth(past, target, kind),
        forced=forced,
    )
    if dry_run:
        would = tuple(image for image in (before,) if image and _would_be_hidden(catalogue, image, channel))
        return Moved(past, before, target, would, moved=True)
    catalogue = _write(catalogue, target, move)
    hidden = _settle(catalogue, target.name)
    catalogue = Catalogue.read(catalogue.cloud, catalogue.owner)
    return Moved(history(catalogue, target.name, channel), before, target, hidden, moved=True)


def _depth(past: History, target: Published, kind: str) -> int:
    if kind == "rollback":
        return max(move.depth for move in past.path if move.image == target.id)
    return past.moves[-1].depth + 1 if past.moves else 1


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
        own = image.image.properties.get(move.key) == move.value()
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
            changes[move.key] = None
            last = max(others, key=_order)
            depth = last.depth + 1 if move.kind == "promote" else move.depth
            move = dataclasses.replace(move, number=last.number + 1, before=last.tag, depth=depth)
        past = history(catalogue, target.name, move.channel)
        changes |= {**_outdated(image, past), move.key: move.value(), "os_hidden": False}
        try:
            Glance(catalogue.cloud).change(image.image, changes)
        except CloudError as error:
            if error.status != HTTPStatus.CONFLICT:
                raise
            # A property that was to go has gone already: look again.
        catalogue = Catalogue.read(catalogue.cloud, catalogue.owner)
    raise BakehouseError(f"others move the channel '{move.channel}' all the time", hint="ask who does, and try again")


def _outdated(image: Published, past: History) -> dict[str, object]:
    """Return moves of an image, to be removed, where there are many.

    First those that a later one went back behind: whatever they cover, that one covers as well.
    """
    own = [move for move in image.moves if move.channel == past.channel]
    own.sort(key=lambda move: (move in past.path, move.number))
    # Two are written yet: this move, and the one that will leave the image.
    crowded = len(image.image.properties) > QUOTA - 2
    keep = KEPT_MOVES - 1 if not crowded else 0
    return {move.key: None for move in own[: max(len(own) - keep, 0)]}


def _settle(catalogue: Catalogue, name: str) -> tuple[Published, ...]:
    """Hide what channels have left, note how they left it, and show what they point to, until that is so.

    Also mends what a killed run left half done.
    """
    hidden: dict[str, Published] = {}
    for _ in range(MOST_ROUNDS):
        wrong = _unsettled(catalogue, name)
        if not wrong:
            break
        for image, changes in wrong:
            try:
                Glance(catalogue.cloud).change(image.image, changes)
            except CloudError as error:
                if error.status != HTTPStatus.NOT_FOUND:
                    raise
            if changes.get("os_hidden"):
                hidden[image.id] = image
        catalogue = Catalogue.read(catalogue.cloud, catalogue.owner)
    return tuple(hidden.values())


def _unsettled(catalogue: Catalogue, name: str) -> list[tuple[Published, dict[str, object]]]:
    """Return the images that are not as channels left them, each with what is to be changed."""
    histories = [history(catalogue, name, channel) for manifest, channel in catalogue.channels() if manifest == name]
    shown = {image.id for image in wrongly_shown(catalogue, name)}
    found = []
    for image in catalogue.named(name):
        changes: dict[str, object] = {"os_hidden": not image.image.hidden} if image.id in shown else {}
        for past in histories:
            changes |= past.untold(image)
        if changes:
            found.append((image, changes))
    return found


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
    """Return the user's name. Not the host's: whoever may see the image reads it."""
    started_by = [os.environ[name] for name in CI_USERS if os.environ.get(name)]
    try:
        return started_by[0] if started_by else getpass.getuser()
    except (KeyError, OSError):
        return "?"


def needed_by_history(histories: Iterable[History], steps: int) -> dict[str, str]:
    """Return the images that rolling back by so many steps needs, by id, each with the channel that needs it."""
    needed: dict[str, str] = {}
    for past in histories:
        for image in past.back[:steps]:
            needed.setdefault(image.id, past.channel)
    return needed
