"""A comparison of the paths: what was measured, what is answered from it, and where results are kept."""

from __future__ import annotations

import datetime
import itertools
import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self, get_args

from platformdirs import user_state_path
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from bakehouse.cache import write_atomically
from bakehouse.errors import BakehouseError
from bakehouse.record import text_of_format
from bakehouse.timeline import FIRST_JOB, JOINED, Span, Timeline

FORMAT = 1
"""Version of the result's format; raised when an old reader could misread a new result."""

PathName = Literal["bake", "hybrid", "bootstrap"]

PATHS: tuple[PathName, ...] = get_args(PathName)
"""What makes most beforehand comes first."""

SET_UP_BEGINS = ("bootstrap started", "containers started")
"""The moments at which paths that set nodes up at boot begin to. Paths that do not have none."""

SET_UP_ENDS = ("containers ready", "agent started")
"""Of containers the agent, which is there, waits for them; a bootstrap starts it."""

PHASES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("firmware and loader", ("kernel",)),
    ("kernel and initramfs", ("userspace",)),
    ("system start", (*SET_UP_BEGINS, "agent started")),
    ("set-up", SET_UP_ENDS),
    ("join", (JOINED,)),
    ("first job", (FIRST_JOB,)),
)
"""The phases of a boot, one after the other, each with the moments that end it: the first that is known."""

SLOWER_PERCENT = 10.0
"""By how much a median must be above the older one to be a regression."""

MANY = 1000
"""Numbers from which on their decimals say nothing."""

Seconds = Annotated[float, Field(ge=0)]
Bytes = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Scenario(_Part):
    """What a run was made under."""

    nodes: int = Field(default=1, ge=1)
    """How many were switched on together."""
    mirror_rate: int | None = Field(default=None, gt=0)
    """Bits per second that the link to the mirror was held to; None where it was not."""

    @property
    def name(self) -> str:
        """What people call it."""
        parts = [f"{self.nodes} nodes together"] if self.nodes > 1 else []
        parts += [f"mirror at {self.mirror_rate / 1e6:g} Mbit/s"] if self.mirror_rate else []
        return ", ".join(parts) or "plain"


PLAIN = Scenario()


def _in_order(scenarios: Iterable[Scenario]) -> list[Scenario]:
    return sorted(scenarios, key=lambda one: (one.nodes, one.mirror_rate or 0))


class Node(_Part):
    """What was seen of one node in one run. None is what could not be read."""

    name: str
    timeline: Timeline
    received: Bytes | None = None
    """Bytes that came over its network, from power-on until it had joined."""
    disk: Bytes | None = None
    """Bytes that its disk takes when it has joined: the base or image file, and what was written since."""
    memory: Bytes | None = None
    """Bytes of memory in use at rest, after it has joined."""


class Run(_Part):
    """One run of one path: its nodes joined, or it failed."""

    path: PathName
    number: int = Field(ge=1)
    """Of the round. Runs with the same number and scenario are pairs: they followed one another."""
    scenario: Scenario = PLAIN
    nodes: tuple[Node, ...] = ()
    """In a run that failed, those of which something is known."""
    failure: str = ""
    """Why it failed."""

    @model_validator(mode="after")
    def _joined_or_failed(self) -> Self:
        if not self.failure and (
            len(self.nodes) != self.scenario.nodes or any(node.timeline.seconds(JOINED) is None for node in self.nodes)
        ):
            raise ValueError("a run in which not all nodes joined has a failure")
        if any((node.timeline.seconds(JOINED) or 0) < 0 for node in self.nodes):
            raise ValueError("a node joined before it was switched on")
        return self

    @property
    def joined(self) -> float | None:
        """Seconds from power-on until the last node had joined; None where one did not."""
        if self.failure:
            return None
        return max(node.timeline.seconds(JOINED) or 0.0 for node in self.nodes)


class Step(_Part):
    """A part of what making something took."""

    name: str
    seconds: Seconds


class Image(_Part):
    """What a path boots or pulls."""

    name: str
    tag: str
    digest: str = ""
    """The input digest of a baked image, or the digest of a container image."""


class Candidate(_Part):
    """One path: what it is made of, and what making that costs."""

    path: PathName
    images: tuple[Image, ...] = ()
    making: tuple[Step, ...]
    """All that is made anew once per rebuild before a node can boot: the bake, the container build, the bundle."""
    change: tuple[Step, ...] | None = None
    """What is done when one package changes, before a node can boot with it; nothing is an answer, None is none."""

    @property
    def making_seconds(self) -> float:
        """Seconds of everything that is made."""
        return math.fsum(step.seconds for step in self.making)

    @property
    def change_seconds(self) -> float | None:
        """Seconds that a change of one package costs."""
        return None if self.change is None else math.fsum(step.seconds for step in self.change)


class Machine(_Part):
    """What the comparison ran on."""

    cpu: str
    """The processor's model."""
    cores: int
    memory: Bytes
    kernel: str
    accelerator: str
    """kvm or tcg (emulation)."""
    qemu: str = ""
    """QEMU's version."""


class Comparison(_Part):
    """The paths of one platform, measured in turn on the same machine and network."""

    format: int = Field(default=FORMAT, ge=1)
    platform: str
    started: AwareDatetime
    commit: str = ""
    """Of the checkout."""
    machine: Machine
    method: tuple[str, ...] = ()
    """How it was measured: sentences."""
    changed_package: str = ""
    """The package of `Candidate.change`."""
    candidates: tuple[Candidate, ...] = Field(min_length=1)
    runs: tuple[Run, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        known = [one.path for one in self.candidates]
        if len(set(known)) < len(known):
            raise ValueError("a path is there twice")
        keys = [(run.path, run.scenario, run.number) for run in self.runs]
        if len(set(keys)) < len(keys):
            raise ValueError("a run is there twice")
        if not {run.path for run in self.runs} <= set(known):
            raise ValueError("a run is of a path that is not there")
        return self

    @property
    def paths(self) -> list[PathName]:
        """The paths that are there, in the order of PATHS."""
        return [path for path in PATHS if any(one.path == path for one in self.candidates)]

    @property
    def scenarios(self) -> list[Scenario]:
        """The scenarios that are there: plain, slow mirrors, several nodes."""
        return _in_order({run.scenario for run in self.runs})

    def candidate(self, path: PathName) -> Candidate:
        """Return what is known of a path."""
        return next(one for one in self.candidates if one.path == path)

    def of(self, path: PathName, scenario: Scenario) -> list[Run]:
        """Return the runs of a path under a scenario, by their number."""
        found = (run for run in self.runs if (run.path, run.scenario) == (path, scenario))
        return sorted(found, key=lambda run: run.number)


# Answers --------------------------------------------------------------------------------------------------------------


class Measure(StrEnum):
    """What is measured of a run. Less is better."""

    JOINED = "seconds to joined"
    RECEIVED = "bytes over the network"
    DISK = "bytes on disk"
    MEMORY = "memory at rest"

    @property
    def unit(self) -> str:
        """What `amount` calls it."""
        return "s" if self == Measure.JOINED else "bytes"


def amount(number: float, unit: str) -> str:
    """Write a number for people.

    Args:
        number: the number.
        unit: ``s``, ``bytes`` or ``%``.
    """
    if unit == "bytes":
        number, unit = number / (1 << 20), "MiB"
    return f"{number:,.0f} {unit}" if number >= MANY else f"{number:,.1f} {unit}"


def value(run: Run, measure: Measure) -> float | None:
    """Return what a run measured, of all its nodes together; None where it failed or that is not known."""
    if measure == Measure.JOINED or run.failure:
        return run.joined
    field = {Measure.RECEIVED: "received", Measure.DISK: "disk", Measure.MEMORY: "memory"}[measure]
    found: list[int | None] = [getattr(node, field) for node in run.nodes]
    return None if None in found else float(sum(one for one in found if one is not None))


@dataclass(frozen=True)
class Spread:
    """How values lie."""

    median: float
    least: float
    most: float
    count: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """Return how the known values lie; None if there is none."""
    known = [one for one in values if one is not None]
    return Spread(statistics.median(known), min(known), max(known), len(known)) if known else None


@dataclass(frozen=True)
class Summary:
    """What the runs of a path under a scenario come to."""

    path: PathName
    scenario: str
    measures: dict[Measure, Spread | None]
    runs: int
    failed: int

    @property
    def joined(self) -> Spread | None:
        """Seconds to joined."""
        return self.measures[Measure.JOINED]


def summary(comparison: Comparison, path: PathName, scenario: Scenario) -> Summary:
    """Return what the runs of a path under a scenario come to."""
    runs = comparison.of(path, scenario)
    measures = {measure: spread(value(run, measure) for run in runs) for measure in Measure}
    return Summary(path, scenario.name, measures, len(runs), sum(bool(run.failure) for run in runs))


@dataclass(frozen=True)
class Pairing:
    """Two paths side by side, round by round."""

    path: PathName
    other: PathName
    scenario: str
    saved: Spread
    """Seconds by which the path joined earlier than the other in the same round; negative where later."""
    ratio: Spread
    """The path's seconds by the other's."""
    wins: int
    """Rounds in which it joined earlier."""


def pairing(comparison: Comparison, path: PathName, other: PathName, scenario: Scenario) -> Pairing | None:
    """Compare two paths in the rounds in which both joined; None if there is none."""
    others = {run.number: run.joined for run in comparison.of(other, scenario)}
    pairs = [
        (ours, theirs)
        for run in comparison.of(path, scenario)
        if (ours := run.joined) is not None and (theirs := others.get(run.number)) is not None
    ]
    saved = spread(theirs - ours for ours, theirs in pairs)
    ratio = spread(ours / theirs for ours, theirs in pairs if theirs > 0)
    if saved is None or ratio is None:
        return None
    return Pairing(path, other, scenario.name, saved, ratio, sum(ours < theirs for ours, theirs in pairs))


Verdict = Literal["always", "from", "until", "never"]


def break_even(making: float, boot: float, other_making: float, other_boot: float) -> tuple[Verdict, int | None]:
    """Say from how many boots on a path costs no more than another: making + boots * boot. All in seconds.

    Returns:
        ``always``; ``from`` a number of boots on; ``until`` a number of boots, where it is made sooner but boots later;
        or ``never``. The number is None where the verdict says it all.
    """
    # Fractions hold what the numbers are exactly, so that the answer is right at the edge.
    dearer = Fraction(making) - Fraction(other_making)
    saved = Fraction(other_boot) - Fraction(boot)
    if dearer <= saved and saved >= 0:
        return "always", None
    if saved > 0:
        return "from", math.ceil(dearer / saved)
    if saved < 0 and dearer <= saved:
        return "until", math.floor(dearer / saved)
    return "never", None


@dataclass(frozen=True)
class BreakEven:
    """When the making of a path pays off against another path."""

    path: PathName
    other: PathName
    occasion: str
    """What is made: everything, or what one changed package asks for."""
    verdict: Verdict
    boots: int | None

    @property
    def text(self) -> str:
        """The answer."""
        return {
            "always": "from the first boot",
            "from": f"from {self.boots} boots per rebuild",
            "until": f"only up to {self.boots} boots per rebuild",
            "never": "never",
        }[self.verdict]


EVERYTHING = "everything made anew"
ONE_PACKAGE = "one package changed"


def break_evens(comparison: Comparison) -> list[BreakEven]:
    """Return when each path pays off against those that make less beforehand, by the medians of the plain runs."""
    found: list[BreakEven] = []
    for path, other in itertools.combinations(comparison.paths, 2):
        boots = [summary(comparison, one, PLAIN).joined for one in (path, other)]
        ours, theirs = comparison.candidate(path), comparison.candidate(other)
        if boots[0] is None or boots[1] is None:
            continue
        for occasion, costs in (
            (EVERYTHING, (ours.making_seconds, theirs.making_seconds)),
            (ONE_PACKAGE, (ours.change_seconds, theirs.change_seconds)),
        ):
            if costs[0] is not None and costs[1] is not None:
                verdict, count = break_even(costs[0], boots[0].median, costs[1], boots[1].median)
                found.append(BreakEven(path, other, occasion, verdict, count))
    return found


def phases(timeline: Timeline) -> list[Span]:
    """Return a boot's phases, one after the other without gaps. The time of one that is not known is the next one's."""
    found: list[Span] = []
    start = 0.0
    for name, moments in PHASES:
        end = next((at for moment in moments if (at := timeline.seconds(moment)) is not None), None)
        if end is not None and end > start:
            found.append(Span(name, start, end))
            start = end
    return found


class Finding(NamedTuple):
    """A sentence of the report."""

    text: str
    against_bake: bool = False


@dataclass(frozen=True)
class Answers:
    """All that a comparison answers."""

    summaries: list[Summary]
    pairings: list[Pairing]
    break_evens: list[BreakEven]
    findings: list[Finding]


def answers(comparison: Comparison) -> Answers:
    """Answer what a comparison was made for."""
    each = itertools.product(comparison.scenarios, comparison.paths)
    pairs = itertools.product(comparison.scenarios, itertools.combinations(comparison.paths, 2))
    pairings = (pairing(comparison, *both, scenario) for scenario, both in pairs)
    summaries = (summary(comparison, path, scenario) for scenario, path in each)
    return Answers(
        summaries=[one for one in summaries if one.runs],
        pairings=[one for one in pairings if one],
        break_evens=break_evens(comparison),
        findings=findings(comparison),
    )


def findings(comparison: Comparison) -> list[Finding]:
    """Return what was found, in sentences."""
    found = [
        *_joined_findings(comparison),
        *_break_even_findings(comparison),
        *_cost_findings(comparison),
        *_scenario_findings(comparison),
        *_failure_findings(comparison),
    ]
    if "bake" in comparison.paths and len(comparison.paths) > 1 and not any(one.against_bake for one in found):
        found.append(Finding("Bake loses nowhere in what was measured."))
    return found


def _medians(comparison: Comparison, measure: Measure, scenario: Scenario) -> dict[PathName, float | None]:
    found = {path: summary(comparison, path, scenario).measures[measure] for path in comparison.paths}
    return {path: one.median if one else None for path, one in found.items()}


def _beside_bake(what: str, numbers: dict[PathName, float | None], unit: str) -> Iterator[Finding]:
    """Compare bake's number with those of the other paths: a sentence for where it wins, and one for where it loses.

    What reads the same is a draw, and is not told.
    """
    bake = numbers.get("bake")
    if bake is None:
        return
    known = {path: number for path, number in numbers.items() if number is not None}
    for loses, verb in ((False, "Bake wins"), (True, "Bake loses")):
        others = [
            f"{amount(number, unit)} with {path}"
            for path, number in known.items()
            if (number < bake if loses else number > bake) and amount(number, unit) != amount(bake, unit)
        ]
        if others:
            yield Finding(f"{verb} in {what}: {amount(bake, unit)}, against {' and '.join(others)}.", loses)


def _joined_findings(comparison: Comparison) -> Iterator[Finding]:
    for scenario in comparison.scenarios:
        numbers = _medians(comparison, Measure.JOINED, scenario)
        yield from _beside_bake(f"seconds to joined ({scenario.name})", numbers, "s")


def _break_even_findings(comparison: Comparison) -> Iterator[Finding]:
    for one in break_evens(comparison):
        if one.path == "bake" and one.verdict == "never":
            yield Finding(f"Bake loses against {one.other}: it never pays off ({one.occasion}).", against_bake=True)
        elif one.path == "bake":
            yield Finding(f"Bake pays off against {one.other} {one.text} ({one.occasion}).")


def _cost_findings(comparison: Comparison) -> Iterator[Finding]:
    making: dict[PathName, float | None] = {one.path: one.making_seconds for one in comparison.candidates}
    change = {one.path: one.change_seconds for one in comparison.candidates}
    yield from _beside_bake("making everything anew", making, "s")
    yield from _beside_bake("what a change of one package costs", change, "s")
    for measure in (Measure.RECEIVED, Measure.DISK, Measure.MEMORY):
        yield from _beside_bake(measure, _medians(comparison, measure, PLAIN), measure.unit)


def _scenario_findings(comparison: Comparison) -> Iterator[Finding]:
    """Say what each scenario does to each path."""
    for scenario in comparison.scenarios:
        plain, other = (_medians(comparison, Measure.JOINED, one) for one in (PLAIN, scenario))
        ratios = [
            f"{path} {after / before:.2f} times"
            for path in comparison.paths
            if (before := plain[path]) and (after := other[path]) is not None
        ]
        if scenario != PLAIN and ratios:
            yield Finding(f"Seconds to joined ({scenario.name}) against the plain runs: {', '.join(ratios)}.")


def _failure_findings(comparison: Comparison) -> Iterator[Finding]:
    for scenario, path in itertools.product(comparison.scenarios, comparison.paths):
        one = summary(comparison, path, scenario)
        if one.failed:
            verb = "Bake loses: it" if path == "bake" else path.capitalize()
            text = f"{verb} failed in {one.failed} of {one.runs} runs ({scenario.name})."
            yield Finding(text, against_bake=path == "bake")


# Regressions ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A number of an older comparison and of a newer one."""

    path: PathName
    what: str
    unit: str
    """For `amount`."""
    old: Spread | None
    new: Spread | None
    worse: bool

    @property
    def percent(self) -> float | None:
        """By how much the median grew."""
        if self.old is None or self.new is None or self.old.median <= 0:
            return None
        return (self.new.median / self.old.median - 1) * 100


def is_worse(old: Spread, new: Spread, percent: float = SLOWER_PERCENT) -> bool:
    """Say whether a median is above every older value, and above the older median by more than so many percent."""
    return new.median > old.most and new.median > old.median * (1 + percent / 100)


def changes(old: Comparison, new: Comparison, percent: float = SLOWER_PERCENT) -> list[Change]:
    """Compare two comparisons number by number. What only one of them has is told, and is no regression.

    A path of which more runs of a scenario fail than before is one.
    """
    found: list[Change] = []

    def add(path: PathName, what: str, unit: str, before: Spread | None, after: Spread | None) -> None:
        if before or after:
            worse = before is not None and after is not None and is_worse(before, after, percent)
            found.append(Change(path, what, unit, before, after, worse))

    paths = [path for path in PATHS if path in {*old.paths, *new.paths}]
    for scenario, path in itertools.product(_in_order({*old.scenarios, *new.scenarios}), paths):
        before, after = summary(old, path, scenario), summary(new, path, scenario)
        for measure in Measure:
            add(path, f"{measure} ({scenario.name})", measure.unit, before.measures[measure], after.measures[measure])
        if before.runs and after.runs and (before.failed or after.failed):
            shares = spread([100 * before.failed / before.runs]), spread([100 * after.failed / after.runs])
            worse = after.failed * before.runs > before.failed * after.runs
            found.append(Change(path, f"runs that failed ({scenario.name})", "%", *shares, worse))
    for path in paths:
        then, now = ([one for one in each.candidates if one.path == path] for each in (old, new))
        add(
            path, EVERYTHING, "s", spread(one.making_seconds for one in then), spread(one.making_seconds for one in now)
        )
        add(
            path,
            ONE_PACKAGE,
            "s",
            spread(one.change_seconds for one in then),
            spread(one.change_seconds for one in now),
        )
    return found


# Results that are kept ------------------------------------------------------------------------------------------------


def folder() -> Path:
    """Return where results are kept."""
    return user_state_path("bakehouse") / "comparisons"


def keep(comparison: Comparison, over: Path | None = None) -> Path:
    """Keep a result, and return its file. Its name without ``.json`` is the result's.

    Args:
        comparison: the result.
        over: the file of an earlier state of it.
    """
    stem = f"{comparison.platform}-{comparison.started.astimezone(datetime.UTC):%Y%m%dT%H%M%SZ}"
    names = itertools.chain([stem], (f"{stem}.{number}" for number in itertools.count(2)))
    path = over or next(path for name in names if not (path := folder() / f"{name}.json").exists())
    write_atomically(path, comparison.model_dump_json(indent=1) + "\n")
    return path


@dataclass(frozen=True)
class Kept:
    """A result that is kept."""

    name: str
    path: Path
    comparison: Comparison


def kept(platform: str = "") -> tuple[list[Kept], list[BakehouseError]]:
    """Return the results that are kept, the newest first, and what is wrong with those that cannot be read.

    Args:
        platform: only those of this platform.
    """
    good: list[Kept] = []
    bad: list[BakehouseError] = []
    for path in sorted(folder().glob("[!.]*.json"), reverse=True):
        try:
            good.append(Kept(path.stem, path, read(path)))
        except BakehouseError as error:
            bad.append(error)
    wanted = [one for one in good if platform in {"", one.comparison.platform}]
    return sorted(wanted, key=lambda one: one.comparison.started, reverse=True), bad


def get(name: str = "") -> Kept:
    """Return a result.

    Args:
        name: its name or the beginning of it, a platform's for its newest, a file's; of all the newest by default.

    Raises:
        BakehouseError: there is none, it cannot be read, or a beginning is that of several.
    """
    if name.endswith(".json"):
        path = Path(name).expanduser().absolute()
        return Kept(path.stem, path, read(path))
    if (path := folder() / f"{name}.json").is_file():
        return Kept(name, path, read(path))
    found, bad = kept()
    if newest := next((one for one in found if name in {"", one.comparison.platform}), None):
        return newest
    found = [one for one in found if one.name.startswith(name)]
    if len(found) > 1:
        raise BakehouseError(
            f"{name} is the beginning of {len(found)} results", hint="`invoke compare.list` lists them"
        )
    if not found:
        what = f"no result {name}" if name else "no result"
        why = f"{bad[0].message}" if bad else "`invoke compare.list` lists them"
        raise BakehouseError(f"there is {what} of a comparison in {folder()}", hint=why)
    return found[0]


def before(one: Kept) -> Kept:
    """Return the result of the same platform that was kept before another one.

    Raises:
        BakehouseError: there is none.
    """
    older = [other for other in kept(one.comparison.platform)[0] if other.comparison.started < one.comparison.started]
    if not older:
        raise BakehouseError(
            f"there is no older result of {one.comparison.platform} than {one.name}", hint="name one with --against"
        )
    return older[0]


def read(path: Path) -> Comparison:
    """Read a result.

    Raises:
        BakehouseError: it cannot be read or is not a result.
    """
    try:
        return Comparison.model_validate_json(text_of_format(path, FORMAT))
    except OSError as error:
        raise BakehouseError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise BakehouseError(
            f"{path} is not a result of a comparison: {where}: {first['msg']}", hint="remove it and compare again"
        ) from error
    except (ValueError, RecursionError) as error:
        raise BakehouseError(
            f"{path} is not a result of a comparison: {str(error).splitlines()[0]}", hint="remove it and compare again"
        ) from error
