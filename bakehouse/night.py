"""What a night came to: the files in its folder, which say also where a killed one has to go on."""

from __future__ import annotations

import datetime
import heapq
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from pydantic import BaseModel, ConfigDict

from bakehouse.cache import write_atomically
from bakehouse.errors import BakehouseError
from bakehouse.record import text_of_format

FORMAT = 1
FILE_NAME = "night.json"
IMAGES = "images"
"""The folder with a file for each image: builders on several machines write at once."""

JOB_FILE = "slurm-job"
"""The file in a night's folder with the number of the array job that bakes."""

LAST = "last"
"""The folder with the summary of the last night, for whoever shall not have to look for it."""

KEPT = 100
"""Nights that are kept."""

SHOWN = 10
"""Nights that a boot is compared with."""

LEAST_COMPARED = 3
"""Boots from which on a median says something."""

State = Literal["waiting", "unchanged", "built", "failed"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Stage(_Part):
    """One stage of an image's night."""

    name: str
    result: Literal["done", "skipped", "failed"]
    seconds: float
    detail: str = ""


class PackageChange(_Part):
    """One package that changed."""

    name: str
    kind: str
    """added, removed, upgraded, downgraded or moved."""
    before: str
    after: str
    security: bool
    """Whether its new version came from the security archive."""


class ImageNight(_Part):
    """What a night came to for one image."""

    name: str
    """The manifest's."""
    platform: str = ""
    state: State = "waiting"
    reasons: tuple[str, ...] = ()
    """Why it was built."""
    forced: bool = False
    """Whether its inputs are those of an image that is there, but not what the mirror has."""
    behind: tuple[str, ...] = ()
    """Packages and versions that the mirror offers and that it did not get: something holds them back."""
    tag: str = ""
    before: str = ""
    """Tag of the image before; empty where there was none."""
    stages: tuple[Stage, ...] = ()
    changes: tuple[PackageChange, ...] = ()
    size: int = 0
    """Bytes of the image file."""
    size_before: int = 0
    joined: float | None = None
    """Seconds from power-on until it had joined its cluster, when it was verified."""
    accelerator: str = ""
    verified: str = "none"
    """passed, failed or none."""
    published: str = ""
    """Id of the image in Glance."""
    channels: dict[str, str] = {}
    """What the night did to channels, or why not."""
    points_to: dict[str, str] = {}
    """Where channels point to in the end: the tag."""
    ages: dict[str, float] = {}
    """Seconds since the image that a channel points to was baked."""
    needs: tuple[str, ...] = ()
    """What needs a person."""
    log: str = ""
    builder: str = ""
    """The machine that built it."""
    finished: bool = False

    def stage(self, name: str) -> Stage | None:
        """Return a stage that it came to."""
        return next((stage for stage in self.stages if stage.name == name), None)

    @property
    def failure(self) -> str:
        """Why it failed; empty where it did not."""
        return next((stage.detail for stage in self.stages if stage.result == "failed"), "")

    @property
    def seconds(self) -> float:
        """Seconds that it took."""
        return sum(stage.seconds for stage in self.stages)


class Night(_Part):
    """One night."""

    format: int = FORMAT
    name: str
    """UTC date of its beginning, with ``.2`` and on for more of a day."""
    number: int
    """Counts the nights of a site. Never a time: clocks are wrong."""
    started: datetime.datetime
    host: str
    executor: str
    names: tuple[str, ...]
    """The manifests that it is for."""
    cloud: str = ""
    resumed: int = 0
    """How often it was killed and went on."""
    ended: datetime.datetime | None = None
    seconds: float = 0
    images: tuple[ImageNight, ...] = ()
    """Filled in at its end."""
    pruned: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    """What needs a person beside what the images say."""
    untold: tuple[str, ...] = ()
    """Why its metrics or its summary did not reach whom they are for."""

    @property
    def failed(self) -> list[ImageNight]:
        """The images that failed."""
        return [image for image in self.images if image.state == "failed"]

    @property
    def all_needs(self) -> list[str]:
        """All that needs a person."""
        return [*self.needs, *self.untold, *(f"{image.name}: {need}" for image in self.images for need in image.needs)]


@dataclass(frozen=True)
class Book:
    """The folder with all nights of a site."""

    root: Path

    def folder(self, name: str) -> Path:
        """Return the folder of a night."""
        return self.root / name

    def nights(self) -> tuple[list[Night], list[BakehouseError]]:
        """Return all nights, the newest first, and what is wrong with those that cannot be read."""
        good: list[Night] = []
        bad: list[BakehouseError] = []
        for path in self.root.glob(f"[!.]*/{FILE_NAME}"):
            try:
                good.append(Night.model_validate_json(text_of_format(path, FORMAT)))
            except BakehouseError as error:
                bad.append(error)
            except (OSError, ValueError) as error:
                bad.append(BakehouseError(f"{path} is not what a night came to: {str(error).splitlines()[0]}"))
        return sorted(good, key=lambda night: night.number, reverse=True), bad

    def get(self, name: str = "") -> Night:
        """Return a night; the newest by default.

        Raises:
            BakehouseError: there is none.
        """
        found, bad = self.nights()
        chosen = [night for night in found if night.name == name or not name]
        if not chosen:
            why = bad[0].message if bad else "`invoke nightly` makes one"
            raise BakehouseError(f"there is no night {name} in {self.root}".replace("  ", " "), hint=why)
        return chosen[0]

    def begin(self, now: datetime.datetime, *, host: str, executor: str, names: tuple[str, ...], cloud: str) -> Night:
        """Begin a night, and write that down."""
        found, _ = self.nights()
        number = found[0].number + 1 if found else 1
        first = f"{now.astimezone(datetime.UTC):%Y-%m-%d}"
        taken = [path.name for path in self.root.glob(f"{first}*")]
        count = max([int(match[1]) for name in taken if (match := re.fullmatch(r".*\.(\d+)", name))], default=1)
        name = f"{first}.{count + 1}" if taken else first
        made = Night(name=name, number=number, started=now, host=host, executor=executor, names=names, cloud=cloud)
        self.write(made)
        return made

    def write(self, night: Night) -> None:
        """Write a night down."""
        write_atomically(self.folder(night.name) / FILE_NAME, night.model_dump_json(indent=1) + "\n")

    def image(self, night: str, name: str) -> ImageNight:
        """Return what a night came to for an image so far."""
        path = self._image_file(night, name)
        try:
            return ImageNight.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return ImageNight(name=name)
        except (OSError, ValueError) as error:
            raise BakehouseError(
                f"{path} cannot be read: {error}", hint="remove it: the image is looked at again"
            ) from error

    def note(self, night: str, image: ImageNight) -> None:
        """Write down what a night came to for an image so far."""
        write_atomically(self._image_file(night, image.name), image.model_dump_json(indent=1) + "\n")

    def _image_file(self, night: str, name: str) -> Path:
        return self.folder(night) / IMAGES / f"{name}.json"

    def forget_old(self) -> None:
        """Remove all nights but the last ones."""
        for night in self.nights()[0][KEPT:]:
            shutil.rmtree(self.folder(night.name), ignore_errors=True)

    def before(self, night: Night) -> list[Night]:
        """Return the finished nights before one, the newest first."""
        return [other for other in self.nights()[0] if other.number < night.number and other.ended]


def boots(nights: list[Night], name: str, accelerator: str) -> list[tuple[str, float]]:
    """Return nights and seconds to joined of an image on machines of one kind, the oldest first."""
    found: list[tuple[str, float]] = []
    tags = set[str]()
    for night in sorted(nights, key=lambda one: one.number):
        for image in night.images:
            fits = image.name == name and image.joined is not None and image.accelerator == accelerator
            # What is not built is not booted: it stands in the night that booted it.
            if fits and image.tag not in tags and image.joined is not None:
                tags.add(image.tag)
                found.append((night.name, image.joined))
    return found


def slower(image: ImageNight, nights: list[Night], percent: float) -> str:
    """Say by how much an image boots slower than in the nights before; empty where it does not.

    Args:
        image: it.
        nights: those before.
        percent: what is not said.
    """
    earlier = [seconds for _, seconds in boots(nights, image.name, image.accelerator)][-SHOWN:]
    if image.joined is None or len(earlier) < LEAST_COMPARED or image.state != "built":
        return ""
    usual = median(earlier)
    if image.joined <= usual * (1 + percent / 100):
        return ""
    return f"it took {image.joined:.0f} s to join, {usual:.0f} s is the median of {len(earlier)} boots before"


@dataclass(frozen=True)
class Slot:
    """One image on one of several builders."""

    name: str
    builder: int
    """Counted from 1."""
    start: float
    """Seconds."""
    end: float


def schedule(images: Sequence[ImageNight], builders: int) -> list[Slot]:
    """Say which of several builders would have made which image when: each takes the next one as soon as it is free.

    So Slurm goes through an array job. What a night does itself, before and after, is not in it.

    Args:
        images: those of a night; the ones that were built count.
        builders: how many machines, as fast as the one that built them, one image at a time.
    """
    free = [(0.0, number + 1) for number in range(builders)]
    found: list[Slot] = []
    for image in images:
        seconds = sum(stage.seconds for stage in image.stages if stage.name in {"bake", "verify"})
        if image.state == "built":
            start, builder = heapq.heappop(free)
            heapq.heappush(free, (start + seconds, builder))
            found.append(Slot(image.name, builder, round(start, 1), round(start + seconds, 1)))
    return found
