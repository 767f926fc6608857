"""A night: every image is looked at, baked where it needs to be, verified, published, promoted; old ones go.

What has been done stands in files (see night.py), and each stage finds out by itself what is left to do: so a night
that was killed goes on where it was. One image that fails stops no other.
"""

from __future__ import annotations

import contextlib
import datetime
import platform
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import tenacity
from rich.console import Console

from bakehouse import (
    apt_index,
    build,
    channel,
    compute,
    lock,
    manifest,
    night_metrics,
    night_report,
    plan,
    promotion,
    retention,
    run,
    sbom,
    site_publish,
    timeline,
    webhook,
)
from bakehouse import night as nights
from bakehouse.apt_index import Index, Newer
from bakehouse.cache import BaseCache, write_atomically
from bakehouse.cloud import Cloud, is_passing
from bakehouse.errors import BakehouseError
from bakehouse.night import Book, Night, PackageChange, Stage
from bakehouse.plan import Plan
from bakehouse.published import Catalogue, Published
from bakehouse.record import Record
from bakehouse.sbom import Package
from bakehouse.settings import Settings
from bakehouse.store import LocalStore

Result = TypeVar("Result")

RESUMED_HOURS = 20
"""A night that was killed goes on for so long; then the next one begins."""

CROSSING = "another night is going on: `invoke nightly.show` says how far it is"
CLOCK_TOLERANCE = datetime.timedelta(minutes=5)
CLOCK_NOTE = ".clock"
"""The file that says up to when what is of a time to come was made with a wrong clock."""

CLOUD_PAUSE_SECONDS = 20.0

NAMED = 8
"""Packages that a reason names."""


@dataclass
class Site:
    """What all stages of a night share."""

    settings: Settings
    store: LocalStore
    cache: BaseCache
    console: Console
    verify: Callable[[Record], Record] | None
    """Verifies an image, and writes that into its record; None where images are not verified."""
    can_verify: Callable[[Record], bool]
    """Says whether images of its platform can be verified."""
    connect: Callable[[], Cloud] | None
    """Connects to the cloud that is published to; None where there is none."""
    verbose: bool = False
    _indexes: dict[tuple[str, ...], Index] = field(default_factory=dict)

    @property
    def book(self) -> Book:
        """Where nights are written down."""
        return Book(self.settings.nights)

    def say(self, text: str, style: str = "") -> None:
        """Print a line."""
        self.console.print(text, style=style or None, markup=False, highlight=False, soft_wrap=True)

    def index(self, wanted: Plan) -> Index:
        """Return what the mirrors of a plan offer, asked once a night.

        Raises:
            BakehouseError: they cannot be asked, or what they have is not whole.
        """
        sources = tuple(wanted.sources())
        if sources not in self._indexes:
            folder = self.cache.indexes
            self._indexes[sources] = self.trying(lambda: apt_index.fetch(sources, folder, wanted.manifest.architecture))
        return self._indexes[sources]

    def trying(self, act: Callable[[], Result]) -> Result:
        """Do something, again where it fails, as often as the site says."""
        policy = self.settings.nightly

        def tell(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            self.say(f"{error}; once more in {policy.pause_seconds:g} s", "yellow")

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(BakehouseError),
            wait=tenacity.wait_fixed(policy.pause_seconds),
            stop=tenacity.stop_after_attempt(policy.attempts),
            before_sleep=tell,
            reraise=True,
        )
        return retrying(act)


class _StageFailedError(Exception):
    """A stage failed; that is written down."""


class Work:
    """What a night does for one image, written down after each stage.

    Args:
        site: what all share.
        night: the night's name.
        name: the manifest's.
    """

    def __init__(self, site: Site, night: str, name: str) -> None:
        self.site = site
        self.night = night
        self.image = site.book.image(night, name)

    def note(self, **changes: object) -> None:
        """Write down what has become known."""
        self.image = self.image.model_copy(update=changes)
        self.site.book.note(self.night, self.image)

    def need(self, text: str) -> None:
        """Write down what needs a person."""
        if text not in self.image.needs:
            self.note(needs=(*self.image.needs, text))

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[list[str]]:
        """Do a stage. Yield a list that takes what is to be said of it; one that did nothing says ``skipped: ...``.

        Raises:
            _StageFailedError: in place of any error of it.
        """
        begun = time.monotonic()
        said: list[str] = []
        try:
            yield said
        except BakehouseError as error:
            passing = is_passing(error)
            text = f"{error.message}\n{error.hint}" if error.hint else error.message
            if not passing:
                self.site.say(f"{self.image.name}: {name} failed: {error.message}", "bold red")
            self._add(Stage(name=name, result="failed", seconds=_since(begun), detail=text))
            if passing:
                raise
            raise _StageFailedError from error
        except Exception as error:
            # A fault of ours in one image shall not take the others with it.
            self._write_traceback(error)
            text = f"a fault of Bakehouse: {type(error).__name__}: {error}"
            self.site.say(f"{self.image.name}: {name}: {text}", "bold red")
            self._add(Stage(name=name, result="failed", seconds=_since(begun), detail=text))
            raise _StageFailedError from error
        detail = "; ".join(said)
        skipped = detail.startswith("skipped: ")
        result = "skipped" if skipped else "done"
        self._add(Stage(name=name, result=result, seconds=_since(begun), detail=detail.removeprefix("skipped: ")))

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Do stages; where one of them fails, that is the image's end of the night."""
        try:
            yield
        except _StageFailedError:
            self.note(state="failed", finished=True)
            self.need(self.image.failure.splitlines()[0])

    def _add(self, stage: Stage) -> None:
        others = tuple(one for one in self.image.stages if one.name != stage.name)
        self.note(stages=(*others, stage))

    def _write_traceback(self, error: Exception) -> None:
        path = self.site.book.folder(self.night) / f"{self.image.name}-fault.log"
        with contextlib.suppress(OSError):
            path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            self.note(log=str(path))


def _since(begun: float) -> float:
    return round(time.monotonic() - begun, 2)


class Executor(Protocol):
    """Bakes and verifies what needs to be."""

    @property
    def name(self) -> str:
        """Its name, for ``--executor``."""

    def resume(self, site: Site, night: str, /) -> None:
        """Come to rest what a killed night had left running."""

    def make(self, site: Site, works: list[Work]) -> None:
        """Bake and verify all images that are not finished. What fails is written down at the image."""


class LocalExecutor:
    """Bakes one image after the other on this machine."""

    name = "local"

    def resume(self, site: Site, night: str) -> None:
        """Check that no other executor is at work on it. What a killed bake has left, the next one removes.

        Raises:
            BakehouseError: its bakes run on a cluster.
        """
        if (site.book.folder(night) / nights.JOB_FILE).exists():
            raise BakehouseError(
                f"the bakes of the night {night} run on a Slurm cluster", hint="--executor slurm goes on with it"
            )

    def make(self, site: Site, works: list[Work]) -> None:
        """Bake and verify one after the other."""
        for work in works:
            make(site, work)


# The night ------------------------------------------------------------------------------------------------------------


def names_of(settings: Settings, wanted: Sequence[str]) -> tuple[str, ...]:
    """Return the manifests that a night is for.

    Args:
        settings: of the site.
        wanted: those that were asked for; those of the site's setting, or all that can be baked, where empty.

    Raises:
        BakehouseError: there is none of a name.
    """
    places = manifest.folders(settings.manifests)
    known = manifest.find_all(places)
    chosen = tuple(dict.fromkeys(wanted or settings.nightly.images))
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise BakehouseError(f"there is no manifest {', '.join(unknown)}", hint="`invoke manifests` lists them")
    if chosen:
        return chosen

    def can_be_baked(name: str) -> bool:
        try:
            return manifest.resolve(name, places).manifest.platform is not None
        except BakehouseError:
            # A faulty one is said to be so in the night.
            return True

    return tuple(name for name in sorted(known) if can_be_baked(name))


def run_night(
    site: Site,
    names: tuple[str, ...],
    *,
    cloud_name: str = "",
    executor: Executor | None = None,
    clock_is_right: bool = False,
) -> Night:
    """Run a night, or go on with one that was killed.

    Args:
        site: what all stages share.
        names: the manifests.
        cloud_name: where it publishes, for the summary.
        executor: bakes and verifies what needs to be; one after the other on this machine by default.
        clock_is_right: begin also where the last night seems to be still to come.

    Returns:
        The night, ended. Its files are in the folder of nights.

    Raises:
        BakehouseError: it cannot begin: another one is going on, the clock is wrong, its folder cannot be written to.
    """
    book = site.book
    try:
        book.root.mkdir(parents=True, exist_ok=True)
        with (
            run.ending_on_sigterm(),
            lock.held(book.root / ".lock", "the night", wait=False, say=site.say, hint=CROSSING),
        ):
            return _locked(site, book, names, cloud_name, executor or LocalExecutor(), clock_is_right)
    except OSError as error:
        raise BakehouseError(
            f"what the night comes to cannot be written to {book.root}: {error.strerror or error}",
            hint="make room, or name another folder: 'nights' in bakehouse.yaml; started again, the night goes on",
        ) from error


def _locked(
    site: Site,
    book: Book,
    names: tuple[str, ...],
    cloud_name: str,
    executor: Executor,
    clock_is_right: bool,
) -> Night:
    begun = time.monotonic()
    now = datetime.datetime.now(datetime.UTC)
    # Whoever keeps it shall not take the last night's for this one's.
    shutil.rmtree(book.root / nights.LAST, ignore_errors=True)
    unfinished = next((one for one in book.nights()[0][:1] if one.ended is None), None)
    _check_clock(site, book, now, accepted=clock_is_right)
    goes_on = unfinished is not None and unfinished.names == names and unfinished.cloud == cloud_name
    if unfinished and goes_on and now - unfinished.started < datetime.timedelta(hours=RESUMED_HOURS):
        night = unfinished.model_copy(update={"resumed": unfinished.resumed + 1})
        book.write(night)
        site.say(f"night {night.name}, begun at {night.started:%H:%M} UTC, goes on: it had not come to its end")
        executor.resume(site, night.name)
    else:
        night = book.begin(now, host=platform.node(), executor=executor.name, names=names, cloud=cloud_name)
        site.say(f"night {night.name}: {', '.join(names)}")
    limit = int(site.settings.cache_limit_gib * (1 << 30))
    for entry in site.cache.prune(limit, now):
        site.say(f"the cache is over its limit: removed {entry.kind} {entry.name}")
    works = [Work(site, night.name, name) for name in names]
    _look_all(site, night, works)
    executor.make(site, works)
    _send_all(site, works)
    pruned, needs = _prune(site, works)
    if datetime.datetime.now(datetime.UTC) < night.started:
        needs.append("the clock of this host went back during the night")
    return _finish(site, night, works, pruned, needs, night.seconds + time.monotonic() - begun)


def _check_clock(site: Site, book: Book, now: datetime.datetime, *, accepted: bool) -> None:
    """Refuse to begin where something is of a time to come, unless somebody has said that the clock is right."""
    note = book.root / CLOCK_NOTE
    seen = [(night.started, f"the night {night.name}") for night in book.nights()[0]]
    seen += [(record.created, f"the image {record.tag}") for record in site.store.records()]
    last = max(seen, default=None)
    if last is None or now >= last[0] - CLOCK_TOLERANCE:
        return
    if accepted:
        write_atomically(note, last[0].isoformat() + "\n")
    with contextlib.suppress(OSError, ValueError):
        if last[0] <= datetime.datetime.fromisoformat(note.read_text().strip()):
            return
    raise BakehouseError(
        f"this host's clock says {now:%Y-%m-%d %H:%M} UTC, but {last[1]} is of {last[0]:%Y-%m-%d %H:%M}",
        hint="set the clock; where it is right now, and was wrong then, --clock-is-right says so, once and for all",
    )


def _finish(site: Site, night: Night, works: list[Work], pruned: list[str], needs: list[str], seconds: float) -> Night:
    book = site.book
    before = book.before(night)
    for work in works:
        if slow := nights.slower(work.image, before, site.settings.nightly.slower_percent):
            work.need(slow)
    ended = max(datetime.datetime.now(datetime.UTC), night.started)
    night = night.model_copy(
        update={
            "ended": ended, "seconds": round(seconds, 1), "images": tuple(work.image for work in works),
            "pruned": tuple(pruned), "needs": tuple(needs),
        }
    )  # fmt: skip
    folder = book.folder(night.name)
    night_report.write(night, before, folder)
    if untold := _tell(site, night, before):
        night = night.model_copy(update={"untold": tuple(untold)})
        night_report.write(night, before, folder)
    book.write(night)
    night_report.lay_out(night, folder, site.store, book.root / nights.LAST)
    book.forget_old()
    return night


def _tell(site: Site, night: Night, before: list[Night]) -> list[str]:
    """Write the metrics and send the summary. Return what could not be."""
    policy = site.settings.nightly
    untold = []
    try:
        if policy.metrics and _is_for_all(site, policy.metrics, night):
            night_metrics.write(policy.metrics, night, before)
    except BakehouseError as error:
        untold.append(error.message)
    try:
        if site.settings.webhook:
            webhook.send(site.settings.webhook, night_report.summary(night), site.settings.webhook_token_file)
    except BakehouseError as error:
        untold.append(error.message)
    for text in untold:
        site.say(text, "bold red")
    return untold


def _is_for_all(site: Site, metrics: Path, night: Night) -> bool:
    """Say whether a night's metrics may replace those of the night before: not where it was for some images only."""
    return night_metrics.IMAGES in metrics.name or set(night.names) >= set(names_of(site.settings, ()))


# Look -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """What a look at an image found."""

    wanted: Plan
    newest: Record | None
    newer: tuple[Newer, ...]
    """Packages of the newest image that are newer on the mirror."""


def _look_all(site: Site, night: Night, works: list[Work]) -> None:
    """Find out which images need to be built, and renew the base roots that are behind the mirror, each once."""
    seen: dict[str, _Seen] = {}
    for work in works:
        if not work.image.finished and not _has_image(site, work):
            with work.attempt():
                seen[work.image.name] = _look(site, work)
    renewed: dict[str, str] = {}
    for work in works:
        if found := seen.get(work.image.name):
            with work.attempt():
                _decide(site, night, work, found, renewed)


def _has_image(site: Site, work: Work) -> bool:
    """Say whether there is an image of it: built in this night, or of before. It may have been removed since."""
    stage = work.image.stage("bake")
    if stage is None or stage.result == "failed":
        return False
    return any(record.tag == work.image.tag for record in site.store.records())


def _look(site: Site, work: Work) -> _Seen:
    with work.stage("look"):
        seen = _see(site, work.image.name)
        work.note(platform=seen.wanted.manifest.platform or "")
        future = datetime.datetime.now(datetime.UTC) + CLOCK_TOLERANCE
        if seen.newest and seen.newest.created > future:
            work.need(
                f"{seen.newest.tag} was baked with a wrong clock ({seen.newest.created:%Y-%m-%d}): remove it from the "
                "store and the cloud, or no image counts as newer"
            )
        return seen


def _see(site: Site, name: str) -> _Seen:
    wanted = plan.make(name, site.settings)
    records = [record for record in site.store.records() if record.name == wanted.name]
    newest = next(iter(records), None)
    same = next((record for record in records if record.digest == wanted.digest), newest)
    newer = _newer(site, wanted, same) if same else ()
    return _Seen(wanted, newest, newer)


def _newer(site: Site, wanted: Plan, record: Record) -> tuple[Newer, ...]:
    """Return what is newer on the mirror than in an image, but for what it would not get by being built anew."""
    pinned = {name.partition("=")[0] for name in wanted.manifest.packages if "=" in name}
    behind = next(
        (set(image.behind) for night in site.book.nights()[0] for image in night.images if image.tag == record.tag),
        set(),
    )
    found = site.index(wanted).newer(site.store.bill(record))
    return tuple(one for one in found if one.name not in pinned and _offer(one) not in behind)


def _offer(one: Newer) -> str:
    return f"{one.name} {one.offered}"


def _reasons(site: Site, seen: _Seen) -> tuple[list[str], Record | None]:
    """Return why an image is to be built, nothing where it is not, and the image of just its inputs."""
    decision = plan.decide(seen.wanted, site.store, site.cache)
    reasons = list(decision.reasons)
    if seen.newer:
        reasons.append(newer_text(seen.newer))
    if decision.image and seen.newest and seen.newest.tag != decision.image.tag:
        # A change was taken back: what it made shall not stay the newest.
        reasons.append(f"its inputs are again those of {decision.image.tag}, and {seen.newest.tag} is newer")
    return reasons, decision.image


def reasons_now(site: Site, name: str) -> list[str]:
    """Return why a night would build an image now; nothing where it would not.

    Raises:
        BakehouseError: its manifest is faulty, or the mirror cannot be asked.
    """
    return _reasons(site, _see(site, name))[0]


def _decide(site: Site, night: Night, work: Work, seen: _Seen, renewed: dict[str, str]) -> None:
    """Write down why an image is to be built, or that it is not."""
    wanted = seen.wanted
    with work.stage("base") as said:
        if seen.newer or seen.newest is None or seen.newest.digest != wanted.digest:
            said.append(_renew_base(site, wanted, renewed))
        else:
            said.append("skipped: nothing is newer on the mirror")
    reasons, image = _reasons(site, seen)
    if image and not reasons:
        _up_to_date(site, night, work, image)
        return
    previous = work.image.before or (seen.newest.tag if seen.newest else "")
    # A builder may have other versions of its tools, and an image of just what it would build: not of these packages.
    forced = image is not None or bool(seen.newer)
    work.note(reasons=work.image.reasons or tuple(reasons), before=previous, forced=forced, tag="", state="waiting")


def _renew_base(site: Site, wanted: Plan, renewed: dict[str, str]) -> str:
    key = wanted.base_key
    if key in renewed:
        return renewed[key]
    packages = site.cache.packages(key)
    bill = {name: Package(name, version, "", name, "") for name, version in packages.items()}
    newer = site.index(wanted).newer(bill)
    if not newer:
        renewed[key] = "skipped: it is as new as the mirror" if packages else "skipped: the bake makes it"
    else:
        site.trying(lambda: build.renew_base(wanted, site.store, site.cache, site.console, verbose=site.verbose))
        renewed[key] = f"renewed: {newer_text(newer)}"
    return renewed[key]


def newer_text(newer: Sequence[Newer]) -> str:
    """Write which packages are newer on the mirror."""
    security = sum(one.security for one in newer)
    count = f"{len(newer)} package{'s' if len(newer) != 1 else ''} newer on the mirror"
    count += f", {security} of them security updates" if security else ""
    names = ", ".join(f"{one.name} {one.has} -> {one.offered}" for one in newer[:NAMED])
    return f"{count}: {names}{' and others' if len(newer) > NAMED else ''}"


def _up_to_date(site: Site, night: Night, work: Work, image: Record) -> None:
    """Write down that there is nothing to build."""
    if work.image.reasons and image.created >= night.started:
        # It was built in this night, before the night was killed.
        _built(site, work, image, work.image.before)
        return
    work.note(state="unchanged", tag=image.tag, size=image.files[0].size)
    with work.stage("bake") as said:
        said.append("skipped: nothing that goes into it has changed")


# Make -----------------------------------------------------------------------------------------------------------------


def make(site: Site, work: Work) -> None:
    """Bake an image where that was decided, and verify it. What fails is written down."""
    if work.image.finished:
        return
    with work.attempt():
        _bake(site, work)
        _verify(site, work)


def _bake(site: Site, work: Work) -> None:
    if _has_image(site, work):
        return
    with work.stage("bake") as said:
        force = work.image.forced
        wanted = plan.make(work.image.name, site.settings)
        in_memory = site.settings.build_in_memory == "auto"
        record, built = site.trying(
            lambda: build.bake(
                wanted, site.store, site.cache, site.console, force=force, verbose=site.verbose, in_memory=in_memory
            )
        )
        if not built and record.created < site.book.get(work.night).started:
            # A builder with other versions of its tools than who looked: it has an image of just this.
            work.note(state="unchanged", tag=record.tag, size=record.files[0].size, before="", reasons=())
            said.append("skipped: nothing that goes into it has changed, by the builder's own tools")
            return
        said.append(record.tag)
    _built(site, work, record, work.image.before)


def _built(site: Site, work: Work, record: Record, before: str) -> None:
    """Write down what was built, and what changed in it."""
    work.note(
        state="built", tag=record.tag, size=record.files[0].size, builder=platform.node(),
        log=str(site.store.folder(record.tag) / "build.log"),
    )  # fmt: skip
    if not work.image.stage("bake"):
        with work.stage("bake") as said:
            said.append(f"{record.tag}, before the night was killed")
    with contextlib.suppress(BakehouseError):
        wanted = plan.make(work.image.name, site.settings)
        behind = site.index(wanted).newer(site.store.bill(record)) if work.image.forced else []
        work.note(behind=tuple(map(_offer, behind)))
    older = next((one for one in site.store.records() if one.tag == before), None)
    if older is None:
        return
    with contextlib.suppress(BakehouseError):
        changes = sbom.difference(site.store.bill(older), site.store.bill(record))
        work.note(size_before=older.files[0].size, changes=tuple(_change(one) for one in changes))


def _change(one: sbom.Change) -> PackageChange:
    return PackageChange(
        name=one.name,
        kind=one.kind,
        before=one.before.version if one.before else "",
        after=one.after.version if one.after else "",
        security=bool(one.after and one.after.origin.startswith("Debian-Security")),
    )


def _verify(site: Site, work: Work) -> None:
    with work.stage("verify") as said:
        record = site.store.get(work.image.tag)
        known = record.verification
        if known and known.result == "passed":
            said.append(f"skipped: it passed on {known.at:%Y-%m-%d}")
        elif site.verify is None or not site.can_verify(record):
            said.append("skipped: " + ("--no-verify" if site.verify is None else "images of it cannot be verified"))
        else:
            record = site.verify(record)
        result = record.verification
        work.note(verified=result.result if result else "none", **_boot(record))
        if result and result.result == "failed":
            failed = [check for check in [*result.checks, *result.suite] if not check.passed]
            why = "; ".join(f"{check.name}: {check.detail}".splitlines()[0] for check in failed)
            raise BakehouseError(
                f"{record.tag} failed its verification: {why}",
                hint=f"what was seen is in {site.store.folder(record.tag)}/verify",
            )


def _boot(record: Record) -> dict[str, object]:
    result = record.verification
    if result is None or result.timeline is None:
        return {}
    joined = result.timeline.seconds(timeline.JOINED)
    return {"joined": round(joined, 1) if joined is not None else None, "accelerator": result.accelerator}


# Send -----------------------------------------------------------------------------------------------------------------


def _send_all(site: Site, works: list[Work]) -> None:
    """Publish and promote all images that are whole. A cloud that is away is waited for."""
    waiting = [work for work in works if not work.image.finished]
    if site.connect is None:
        for work in waiting:
            work.note(finished=True)
        return
    deadline = time.monotonic() + 60 * site.settings.nightly.patience_minutes
    told = False
    while waiting:
        failures = _send_round(site, waiting)
        final = time.monotonic() > deadline
        for work in [*waiting]:
            error = failures.get(work.image.name)
            if error is None or final or not is_passing(error):
                waiting.remove(work)
                with work.attempt():
                    if error:
                        _away(work, error)
                work.note(finished=True)
        if waiting:
            left = deadline - time.monotonic()
            if not told:
                first = failures[waiting[0].image.name]
                site.say(f"{first.message}; waiting for up to {left / 60:.0f} min", "yellow")
            told = True
            time.sleep(min(CLOUD_PAUSE_SECONDS, max(left, 0.1)))


def _send_round(site: Site, works: list[Work]) -> dict[str, BakehouseError]:
    """Publish and promote images. Return what may pass by itself, or keeps all of them from it, by the image's name."""
    assert site.connect is not None
    failures: dict[str, BakehouseError] = {}
    try:
        with site.connect() as cloud:
            for work in works:
                try:
                    with work.attempt():
                        _send(site, work, cloud)
                except BakehouseError as error:
                    failures[work.image.name] = error
    except BakehouseError as error:
        return {work.image.name: error for work in works}
    return failures


def _away(work: Work, error: BakehouseError) -> None:
    with work.stage("publish"):
        # As it was said, but final now.
        raise BakehouseError(error.message, hint=error.hint)


def _send(site: Site, work: Work, cloud: Cloud) -> None:
    with work.stage("publish") as said:
        record = site.store.get(work.image.tag)
        there = _there(Catalogue.read(cloud), record)
        if there:
            said.append("skipped: it is there")
        else:
            done = site_publish.publish(record, site.settings, site.store, cloud, site.console)
            there = done.image
            said.append(done.outcome)
        work.note(published=there.id)
    with work.stage("promote") as said:
        said.extend(_promote(site, work, cloud, there))


def _there(catalogue: Catalogue, record: Record) -> Published | None:
    """Return the image where it is in the cloud already, whole, and says of its verification what the record says."""
    verified = record.verification.result if record.verification else "none"
    fitting = [
        image
        for image in catalogue.named(record.name)
        if image.tag == record.tag and image.usable and image.verified == verified
    ]
    return fitting[0] if fitting else None


def _promote(site: Site, work: Work, cloud: Cloud, image: Published) -> list[str]:
    """Move channels as the site's policy says. Return what was done."""
    owner, policy = site.settings.image_owner, site.settings.nightly.promote
    check = site_publish.signature_check(site.settings)
    done: list[str] = []
    told: dict[str, str] = {}
    why = promotion.new_candidate(Catalogue.read(cloud, owner), image)
    if not why:
        moved = channel.promote(cloud, owner, image.tag, promotion.CANDIDATE, check=check)
        told[promotion.CANDIDATE] = _moved_text(moved)
        done.append(f"{promotion.CANDIDATE}: {_moved_text(moved)}")
    elif work.image.state == "built":
        told[promotion.CANDIDATE] = f"stays where it is: {why}"
    if policy:
        ruling = promotion.choose(Catalogue.read(cloud, owner), work.image.name, policy, site.store, check)
        if ruling.image:
            moved = channel.promote(cloud, owner, ruling.image.tag, policy.channel, check=check)
            told[policy.channel] = _moved_text(moved) + (f" ({ruling.why})" if ruling.why else "")
            done.append(f"{policy.channel}: {_moved_text(moved)}")
        else:
            told[policy.channel] = f"stays where it is: {ruling.why}"
        with contextlib.suppress(OSError):
            if policy.cve_feed and promotion.age_of_feed(policy.cve_feed) > promotion.STALE_FEED:
                work.need(f"the feed of CVEs {policy.cve_feed} has not been renewed for days")
        if ruling.needs_person:
            work.need(f"{policy.channel} is held back: {ruling.why}")
    catalogue = Catalogue.read(cloud, owner)
    points: dict[str, Published] = {}
    for one in (other for name, other in catalogue.channels() if name == work.image.name):
        if current := channel.history(catalogue, work.image.name, one).current:
            points[one] = current
    ages = {one: (cloud.clock - promotion.baked(there)).total_seconds() for one, there in points.items()}
    work.note(channels=told, points_to={one: there.tag for one, there in points.items()}, ages=ages)
    return done or ["skipped: no channel moves"]


def _moved_text(moved: channel.Moved) -> str:
    return f"moved to {moved.now.tag}" + (f" from {moved.before.tag}" if moved.before else "")


# Prune ----------------------------------------------------------------------------------------------------------------


def _prune(site: Site, works: list[Work]) -> tuple[list[str], list[str]]:
    """Remove old images from the cloud and from the store. Return what went, and what needs a person."""
    if not site.settings.nightly.keep:
        return [], []
    gone: list[str] = []
    needs: list[str] = []
    there: set[str] | None = None
    if site.connect is not None:
        try:
            there = _prune_cloud(site, [work.image.name for work in works], gone, needs)
        except BakehouseError as error:
            needs.append(f"nothing was pruned in the cloud: {error.message}")
    for work in works:
        try:
            gone += _prune_store(site, work, there)
        except (BakehouseError, OSError) as error:
            needs.append(f"images of {work.image.name} were not pruned from the store: {error}")
    return gone, needs


def _prune_cloud(site: Site, names: list[str], gone: list[str], needs: list[str]) -> set[str]:
    """Remove old images from the cloud. Return the tags of those that are there still."""
    assert site.connect is not None
    policy = site.settings.nightly
    pins = retention.pinned(Path.cwd(), policy.locks)
    with site.connect() as cloud:

        def verdicts() -> list[retention.Verdict]:
            catalogue = Catalogue.read(cloud, site.settings.image_owner)
            there = [name for name in names if name in catalogue.names()]
            if not there:
                return []
            usage, steps = compute.usage(cloud), site.settings.rollback_steps
            found = retention.plan(catalogue, usage, pins, keep=policy.keep, rollback_steps=steps, names=there)
            seen = any(one.delete and one.image.image.visibility != "private" for one in found)
            if cloud.endpoints("compute") and (not usage.known or (seen and usage.known != "all projects")):
                raise BakehouseError(f"which images servers use is not all known ({usage.reason or usage.known})")
            return found

        first = verdicts()
        if any(verdict.delete for verdict in first):
            for one in retention.delete(cloud, first, verdicts()):
                if one.error:
                    needs.append(f"{one.image.name} {one.image.tag} could not be pruned in the cloud: {one.error}")
                else:
                    gone.append(f"{one.image.name} {one.image.tag} from the cloud")
        return {image.tag for image in Catalogue.read(cloud, site.settings.image_owner).images}


def _prune_store(site: Site, work: Work, there: set[str] | None) -> list[str]:
    """Remove images of the store that are older than those that are kept.

    What the cloud has stays, since its SBOM is wanted: for promotions, for what is outdated.

    Args:
        site: the site.
        work: the image.
        there: tags in the cloud; None where they are not known, and all that were ever published stay.
    """
    keep = site.settings.nightly.keep
    records = [record for record in site.store.records() if record.name == work.image.name]
    failed = {record.tag for record in records if record.verification and record.verification.result == "failed"}
    good = [record for record in records if record.tag not in failed]
    passed = [record for record in good if record.verification][:1]
    stay = {record.tag for record in [*good[:keep], *passed]}
    stay |= {record.tag for record in records if (record.published if there is None else record.tag in there)}
    if len(good) <= keep:
        return []
    oldest = min(record.created for record in good[:keep])
    removed = []
    for record in records:
        if record.created < oldest and record.tag not in stay:
            site.store.remove(record)
            removed.append(f"{record.name} {record.tag} from the store")
    return removed
