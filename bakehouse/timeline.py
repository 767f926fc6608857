"""The timeline of a boot: named moments from power-on to useful work, in seconds.

Two clocks are read. The guest's monotonic clock (kernel log, systemd, agent) is exact but begins with the kernel; the
host's knows when the machine was switched on. The console ties them: see _tie().
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

POWER_ON = "power-on"
LOGIN_PROMPT = "login prompt"
JOINED = "agent joined"
FIRST_JOB = "first job done"

MANAGER_PROPERTIES = (
    "InitRDTimestampMonotonic",
    "UserspaceTimestampMonotonic",
    "FinishTimestampMonotonic",
)
"""Of systemd itself, in microseconds, 0 for what did not happen: see org.freedesktop.systemd1(5)."""

UNIT_PROPERTIES = ("Id", "InactiveExitTimestampMonotonic", "ActiveEnterTimestampMonotonic")

UNITS = (
    "cloud-init-main.service",
    "cloud-init-local.service",
    "cloud-init-network.service",
    "cloud-init.service",
    "cloud-config.service",
    "cloud-final.service",
    "systemd-networkd.service",
    "systemd-networkd-wait-online.service",
    "network-online.target",
    "ssh.service",
    "munge.service",
    "slurmd.service",
    "bakehouse-agent.service",
    "serial-getty@ttyS0.service",
)

STATUS_FILE = "/run/bakehouse/status.json"
PREPARATIONS = ("bootstrap", "containers")
"""What makes a plain node one of the platform before it joins: the other paths than bake. Each writes a file of lines
of a time and a word: /run/bakehouse/NAME.timeline."""

# The kernel's log is only for root (kernel.dmesg_restrict), and the default user may use sudo. /proc/uptime comes last:
# the reply's arrival is then close to it.
GUEST_COMMAND = "; ".join(
    [
        "echo --- manager",
        f"systemctl show --property={','.join(MANAGER_PROPERTIES)}",
        "echo --- units",
        f"systemctl show --property={','.join(UNIT_PROPERTIES)} {' '.join(UNITS)}",
        "echo --- kernel",
        "{ dmesg || sudo -n dmesg; } 2>/dev/null | grep -m 1 -F 'Run /init as init process'",
        "echo --- status",
        f"cat {STATUS_FILE} 2>/dev/null",
        "echo",
        *(f"echo --- {name}; cat /run/bakehouse/{name}.timeline 2>/dev/null" for name in PREPARATIONS),
        "echo --- uptime",
        "cat /proc/uptime",
    ]
)
"""A shell command line for the guest. GuestFacts.parse() reads its output."""

NEVER = 2**64 - 1
"""What systemd calls USEC_INFINITY."""

CLOCK_TOLERANCE = 0.5
"""Seconds. The kernel's log runs on another clock than CLOCK_MONOTONIC; they start together but for milliseconds, and
under emulation on a busy host for some more."""

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[()][0-9A-B]|[\x00-\x08\x0b-\x1f]")
_STAMP = re.compile(r"\[ *(\d{1,9}\.\d{6})\]")
_AGENT = re.compile(r"bakehouse-agent: (\d{1,9}\.\d{3}) (\w+)")
_PREPARATION = re.compile(r"(\d{1,9}\.\d{2,3}) ([a-z]+)")
_UNIT_LINE = re.compile(r"(\w+)=(.*)")
_NUMBER = re.compile(r"[0-9]{1,20}")
_INIT = re.compile(r"\[ *(\d{1,9}\.\d{6})\].* Run /init as init process")
_SYSTEMD = re.compile(r"\[ *(\d{1,9}\.\d{6})\].* systemd\[1\]: systemd \d.* running in system mode")
_CLOUD_INIT = re.compile(r"Cloud-init v\. .* running '([a-z:-]+)' at .*Up (\d{1,9}\.\d{1,6}) seconds")
_CLOUD_INIT_END = re.compile(r"Cloud-init v\. .* finished at .*Up (\d{1,9}\.\d{1,6}) seconds")
_LOGIN = re.compile(r"(?!Last )[\w.-]+ login:")
_FIRMWARE_ENDS = re.compile(r"BdsDxe: starting |Booting from ")
_LOADER = re.compile(r"GRUB|Booting `|Loading Linux ")
_PHASE = re.compile(r"[a-z][a-z-]{0,30}")

_NO_PHASES = frozenset({"waiting", "failed", "left"})
"""Words of the agent that are no step of a join."""

_CLOUD_INIT_STAGES = {"init-local": "local", "init": "network", "modules:config": "config", "modules:final": "final"}


class Line(Protocol):
    """One line of a console, as the machine module gives it."""

    @property
    def at(self) -> float:
        """When its first byte came: seconds of the host's monotonic clock."""

    @property
    def text(self) -> str:
        """What it says."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Moment(_Part):
    """Something that happened."""

    name: str
    seconds: float
    """Since power-on."""
    source: str
    """Where it was read: host, console, kernel (its log), systemd, agent (its status file), a preparation (its file)
    or ssh."""


class Timeline(_Part):
    """The moments of one boot, in their order. What is not known is not there."""

    moments: tuple[Moment, ...]
    power_on: float
    """When the machine was switched on: seconds of the host's monotonic clock, which tells later hosts nothing."""
    accelerator: str = ""
    """kvm or tcg (emulation)."""
    clock_error: float | None = None
    """Seconds by which all that the guest's clock told may be too late; none if that cannot be said."""

    def seconds(self, name: str) -> float | None:
        """Return when something happened, in seconds since power-on; None if that is not known."""
        return next((moment.seconds for moment in self.moments if moment.name == name), None)


class Span(NamedTuple):
    """What lasted from one moment to another, in seconds since power-on."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Unit:
    """When a systemd unit last began to start and last was up: seconds of the guest's clock, None for never."""

    name: str
    began: float | None
    up: float | None


@dataclass(frozen=True)
class GuestFacts:
    """What a guest knows of its boot, in seconds of its monotonic clock."""

    manager: tuple[tuple[str, float], ...] = ()
    """systemd's own moments, by property."""
    units: tuple[Unit, ...] = ()
    init: float | None = None
    """When the kernel started /init of the initramfs."""
    agent: tuple[tuple[str, float], ...] = ()
    """The agent's phases."""
    preparation: tuple[tuple[str, str, float], ...] = ()
    """What a preparation had done, and which one."""
    uptime: float | None = None
    """When these facts were read."""

    @classmethod
    def parse(cls, text: str) -> GuestFacts:
        """Read what GUEST_COMMAND said. What cannot be read is left out."""
        sections: dict[str, list[str]] = {}
        lines: list[str] = []
        for line in text.splitlines():
            if line.startswith("--- "):
                lines = sections.setdefault(line[4:].strip(), [])
            else:
                lines.append(line)
        kernel = "\n".join(sections.get("kernel", []))
        up = re.match(r"(\d{1,9}\.\d{1,6}) ", "".join(sections.get("uptime", [])))
        return cls(
            manager=tuple(_manager(sections.get("manager", []))),
            units=tuple(_units(sections.get("units", []))),
            init=float(found[1]) if (found := _INIT.search(kernel)) else None,
            agent=_status_phases("\n".join(sections.get("status", []))),
            preparation=tuple(
                (name, found[2], float(found[1]))
                for name in PREPARATIONS
                for line in sections.get(name, [])
                if (found := _PREPARATION.fullmatch(line.strip()))
            ),
            uptime=float(up[1]) if up else None,
        )

    def property(self, name: str) -> float | None:
        """Return one of systemd's own moments."""
        return dict(self.manager).get(name)

    def began(self, *names: str) -> float | None:
        """Return when the first of these units that ever began did so."""
        return next((unit.began for name in names for unit in self.units if unit.name == name and unit.began), None)

    def up(self, *names: str) -> float | None:
        """Return when the first of these units that was ever up came up."""
        return next((unit.up for name in names for unit in self.units if unit.name == name and unit.up), None)


def _seconds(microseconds: str) -> float | None:
    if not _NUMBER.fullmatch(microseconds) or int(microseconds) in {0, NEVER}:
        return None
    return int(microseconds) / 1e6


def _manager(lines: Iterable[str]) -> Iterator[tuple[str, float]]:
    for line in lines:
        found = _UNIT_LINE.fullmatch(line)
        if found and found[1] in MANAGER_PROPERTIES and (at := _seconds(found[2])):
            yield found[1], at


def _units(lines: Sequence[str]) -> Iterator[Unit]:
    """Read blocks of properties with empty lines between, the Id anywhere among them."""
    block: dict[str, str] = {}
    for line in [*lines, ""]:
        if found := _UNIT_LINE.fullmatch(line):
            block[found[1]] = found[2]
        elif block:
            began, up = (
                _seconds(block.get(f"{name}TimestampMonotonic", "")) for name in ("InactiveExit", "ActiveEnter")
            )
            if block.get("Id"):
                yield Unit(block["Id"], began, up)
            block = {}


def _status_phases(text: str) -> tuple[tuple[str, float], ...]:
    try:
        entries = json.loads(text)["timeline"]
        pairs = [(str(name), float(at)) for name, at in entries]
    # Whatever stands in that file: a boot without phases is better than none. RecursionError: thousands of brackets.
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return ()
    return tuple((name, at) for name, at in pairs if _is_phase(name) and math.isfinite(at) and at > 0)


def _is_phase(name: str) -> bool:
    return bool(_PHASE.fullmatch(name)) and name not in _NO_PHASES


@dataclass(frozen=True)
class _Tie:
    """How the guest's clock lies on the host's."""

    offset: float
    """The host's time when the guest's clock showed 0."""
    error: float | None
    source: str


@dataclass(frozen=True)
class _Heard:
    """A console line without control sequences, with the guest's time if it tells one."""

    at: float
    text: str
    guest: float | None

    @property
    def offset(self) -> float | None:
        """The host's time of the guest's 0, if this line had taken no time to arrive."""
        return None if self.guest is None else self.at - self.guest


def from_boot(
    console: Sequence[Line],
    power_on: float,
    guest: GuestFacts,
    *,
    accelerator: str = "",
    asked: tuple[float, float] | None = None,
) -> Timeline:
    """Put the moments of one boot together.

    Lines of an earlier boot on the same console do no harm: a line that says that its kernel ran before the power came
    is passed over. For a reboot give the time of the reset as power-on.

    Args:
        console: the serial console.
        power_on: when the machine was switched on or reset, seconds of the host's monotonic clock.
        guest: what the guest says.
        accelerator: kvm or tcg.
        asked: when GUEST_COMMAND was sent and when its output was there, on the host's monotonic clock. It ties the
            clocks where the console cannot, and tells this boot from one that ended by itself.
    """
    earliest = power_on
    if asked and guest.uptime is not None:
        earliest = max(earliest, asked[0] - guest.uptime - CLOCK_TOLERANCE)
    heard = [line for line in map(_hear, console) if line.at >= power_on]
    heard = [line for line in heard if line.offset is None or line.offset >= earliest]
    tie = _tie(heard, guest, asked)
    moments = [Moment(name=POWER_ON, seconds=0.0, source="host")]
    moments += _host_moments(heard, power_on, tie)
    if tie:
        begin = tie.offset - power_on
        moments.append(Moment(name="kernel", seconds=round(begin, 3), source=tie.source))
        for name, at, source in _first(_guest_moments(heard, guest)):
            moments.append(Moment(name=name, seconds=round(begin + at, 3), source=source))
    return Timeline(
        moments=tuple(sorted(moments, key=_by_time)),
        power_on=power_on,
        accelerator=accelerator,
        clock_error=None if tie is None or tie.error is None else round(tie.error, 3),
    )


def latest_start(console: Sequence[Line]) -> float | None:
    """Return a time, of the host's monotonic clock, before which a machine's kernel has begun for certain.

    Args:
        console: the serial console of its first boot.

    Returns:
        Seconds; None where no line of it tells the guest's time.
    """
    return min((offset for offset in (_hear(line).offset for line in console) if offset is not None), default=None)


def with_moment(timeline: Timeline, name: str, seconds: float, source: str = "host") -> Timeline:
    """Return the timeline with one more moment, in place of one of that name.

    Args:
        timeline: the boot.
        name: what happened, for instance FIRST_JOB.
        seconds: since power-on.
        source: who says so.
    """
    others = [moment for moment in timeline.moments if moment.name != name]
    moments = sorted([*others, Moment(name=name, seconds=round(seconds, 3), source=source)], key=_by_time)
    return timeline.model_copy(update={"moments": tuple(moments)})


def _by_time(moment: Moment) -> float:
    return moment.seconds


def _hear(line: Line) -> _Heard:
    text = _CONTROL.sub("", line.text).strip()
    # journald stamps what it passes on from a service: that is the later time, so the nearer to the arrival.
    found = _STAMP.match(text) or _AGENT.search(text)
    return _Heard(line.at, text, float(found[1]) if found else None)


def _tie(heard: Sequence[_Heard], guest: GuestFacts, asked: tuple[float, float] | None) -> _Tie | None:
    """Find the host's time at which the guest's clock showed 0.

    A line that tells the guest's time t and arrives at the host's time a was on its way for a - t - offset seconds.
    That is never negative: nothing arrives before it is sent. So a - t is the offset or more, and the smallest a - t of
    all lines is the best that can be known: the line that came fastest. What the second fastest took longer is a fair
    guess of what the fastest took; lines that came in one piece count once, since they were delayed together.
    """
    fastest: dict[float, float] = {}
    for line in heard:
        if line.offset is not None:
            fastest[line.at] = min(line.offset, fastest.get(line.at, math.inf))
    offsets = sorted(fastest.values())
    if asked and guest.uptime is not None:
        # The reply is such a line too, and the question bounds it from below.
        reply = asked[1] - guest.uptime
        if not offsets or reply < offsets[0]:
            return _Tie(reply, max(asked[1] - asked[0], 0.0), "ssh")
    if not offsets:
        return None
    return _Tie(offsets[0], offsets[1] - offsets[0] if len(offsets) > 1 else None, "console")


def _host_moments(heard: Sequence[_Heard], power_on: float, tie: _Tie | None) -> Iterator[Moment]:
    """Yield the moments for which the arrival of a line on the host stands."""
    before = [line for line in heard if tie and line.guest is None and line.at <= tie.offset]
    firmware = [line for line in before if _FIRMWARE_ENDS.search(line.text)]
    loader = [line for line in before if _LOADER.search(line.text)]
    # The firmware may try several devices: the last is the one that booted.
    if begin := firmware[-1:] or loader[:1]:
        yield Moment(name="boot loader", seconds=round(begin[0].at - power_on, 3), source="console")
    prompt = next((line for line in heard if _LOGIN.match(line.text)), None)
    if prompt:
        yield Moment(name=LOGIN_PROMPT, seconds=round(prompt.at - power_on, 3), source="console")


_Found = tuple[str, float | None, str]


def _first(found: Iterable[_Found]) -> Iterator[tuple[str, float, str]]:
    """Pass on the first that is known of each name."""
    seen = set()
    for name, at, source in found:
        if at is not None and name not in seen:
            seen.add(name)
            yield name, at, source


def _guest_moments(heard: Sequence[_Heard], guest: GuestFacts) -> Iterator[_Found]:
    """Yield the moments on the guest's clock, the better source of a name first."""
    yield "initramfs", guest.init, "kernel"
    yield "initramfs", guest.property("InitRDTimestampMonotonic"), "systemd"
    yield "initramfs", _stamp(heard, _INIT), "console"
    yield "userspace", guest.property("UserspaceTimestampMonotonic"), "systemd"
    yield "userspace", _stamp(heard, _SYSTEMD), "console"
    yield from _cloud_init(heard, guest)
    yield "networkd", guest.up("systemd-networkd.service"), "systemd"
    yield "network online", guest.up("systemd-networkd-wait-online.service", "network-online.target"), "systemd"
    yield "sshd", guest.up("ssh.service"), "systemd"
    yield "munge", guest.up("munge.service"), "systemd"
    yield "slurmd", guest.up("slurmd.service"), "systemd"
    for name, what, at in guest.preparation:
        yield f"{name} {what}", at, name
    yield "agent launched", guest.began("bakehouse-agent.service"), "systemd"
    yield from _agent(heard, guest)
    yield "getty", guest.began("serial-getty@ttyS0.service"), "systemd"
    yield "boot finished", guest.property("FinishTimestampMonotonic"), "systemd"


def _stamp(heard: Sequence[_Heard], pattern: re.Pattern[str]) -> float | None:
    """Return the kernel's stamp of the last line of a kind: systemd greets once in the initramfs, and once after."""
    return next((float(found[1]) for line in reversed(heard) if (found := pattern.match(line.text))), None)


def _cloud_init(heard: Sequence[_Heard], guest: GuestFacts) -> Iterator[_Found]:
    """Yield the stages of cloud-init.

    Since 24.3 one process runs all stages (cloud-init-main), and the stages' units only tell it to begin and wait until
    it says that the stage is done: their times are still those of the stages. Before, each unit is a process.
    """
    yield "cloud-init started", guest.began("cloud-init-main.service", "cloud-init-local.service"), "systemd"
    yield "cloud-init loaded", guest.up("cloud-init-main.service"), "systemd"
    units = {
        "local": ["cloud-init-local.service"],
        "network": ["cloud-init-network.service", "cloud-init.service"],
        "config": ["cloud-config.service"],
        "final": ["cloud-final.service"],
    }
    for stage, names in units.items():
        yield f"cloud-init {stage} begins", guest.began(*names), "systemd"
        yield f"cloud-init {stage} ends", guest.up(*names), "systemd"
    for line in heard:
        if found := _CLOUD_INIT.search(line.text):
            yield f"cloud-init {_CLOUD_INIT_STAGES.get(found[1], found[1])} begins", float(found[2]), "console"
        elif found := _CLOUD_INIT_END.search(line.text):
            yield "cloud-init final ends", float(found[1]), "console"


def _agent(heard: Sequence[_Heard], guest: GuestFacts) -> Iterator[_Found]:
    """Yield the agent's phases: the console's first, since the status file knows only the agent's last start."""
    for line in heard:
        if (found := _AGENT.search(line.text)) and _is_phase(found[2]):
            yield f"agent {found[2]}", float(found[1]), "console"
    for name, at in guest.agent:
        yield f"agent {name}", at, "agent"


def spans(timeline: Timeline) -> list[Span]:
    """Return what took time, by its begin. Spans overlap: much of a boot happens at once."""
    loader, kernel = timeline.seconds("boot loader"), timeline.seconds("kernel")
    initramfs, userspace = timeline.seconds("initramfs"), timeline.seconds("userspace")
    pairs: list[tuple[str, float | None, float | None]] = [
        ("firmware", 0.0, loader) if loader is not None else ("firmware and loader", 0.0, kernel),
        ("boot loader", loader, kernel),
        ("kernel", kernel, initramfs) if initramfs is not None else ("kernel and initramfs", kernel, userspace),
        ("initramfs", initramfs, userspace),
        ("userspace", userspace, timeline.seconds("boot finished")),
        ("cloud-init loads", timeline.seconds("cloud-init started"), timeline.seconds("cloud-init loaded")),
        *(
            (
                f"cloud-init {stage}",
                timeline.seconds(f"cloud-init {stage} begins"),
                timeline.seconds(f"cloud-init {stage} ends"),
            )
            for stage in _CLOUD_INIT_STAGES.values()
        ),
        ("network", timeline.seconds("networkd"), timeline.seconds("network online")),
        *(pair for name in PREPARATIONS for pair in _pairs_of(timeline, name)),
        *_pairs_of(timeline, "agent"),
        ("first job", timeline.seconds(JOINED), timeline.seconds(FIRST_JOB)),
    ]
    known = [Span(name, start, end) for name, start, end in pairs if start is not None and end is not None]
    return sorted((span for span in known if span.start <= span.end), key=lambda span: span.start)


def _pairs_of(timeline: Timeline, who: str) -> Iterator[tuple[str, float, float]]:
    """Yield the phases of the agent or a preparation, each named after the moment that ends it."""
    moments = [moment for moment in timeline.moments if moment.name.startswith(f"{who} ")]
    for before, after in itertools.pairwise(moments):
        yield f"{who}: {after.name.removeprefix(f'{who} ')}", before.seconds, after.seconds


def accelerator_text(accelerator: str) -> str:
    """Write a timeline's accelerator for people."""
    return {"kvm": "KVM", "tcg": "emulation"}.get(accelerator, accelerator)


def show(console: Console, timeline: Timeline) -> None:
    """Show the moments as a table and the spans as bars. Fits 80 columns."""
    table = Table("Moment", "At", "Since previous", "Read from", box=None, pad_edge=False)
    table.columns[1].justify = table.columns[2].justify = "right"
    table.columns[3].style = "dim"
    before = 0.0
    for moment in timeline.moments:
        headline = moment.name in {LOGIN_PROMPT, JOINED, FIRST_JOB}
        since = "" if moment.name == POWER_ON else f"+{moment.seconds - before:.2f}"
        name = Text(moment.name, style="bold" if headline else "")
        table.add_row(name, f"{moment.seconds:.2f} s", since, moment.source)
        before = moment.seconds
    console.print(table)
    if bars := spans(timeline):
        console.print()
        console.print(_chart(bars, console))
    error = timeline.clock_error
    notes = [
        accelerator_text(timeline.accelerator),
        "" if error is None else f"the guest's moments may be up to {max(error, 0.01):.2f} s too late",
    ]
    if any(notes):
        console.print(Text("; ".join(filter(None, notes)), style="dim"))


def _chart(bars: Sequence[Span], console: Console) -> Table:
    end = max(span.end for span in bars)
    label = min(max(len(span.name) for span in bars), 24)
    width = max(min(console.width, 100) - label - 12, 10)
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=label, no_wrap=True, overflow="ellipsis")
    grid.add_column(width=width, no_wrap=True, style="cyan")
    grid.add_column(justify="right", no_wrap=True)
    for span in bars:
        bar = _bar(span.start / end, span.end / end, width) if end > 0 else ""
        if console.options.ascii_only:
            bar = re.sub(r"\S", "#", bar)
        grid.add_row(Text(span.name), Text(bar), f"{span.end - span.start:.2f} s")
    grid.add_row("", Text("0" + f"{end:.0f} s".rjust(width - 1), style="dim"), "")
    return grid


def _bar(start: float, end: float, width: int) -> str:
    """Draw one bar in half cells, at least one of them.

    Args:
        start: share of the width.
        end: share of the width.
        width: cells.
    """
    first = min(round(start * width * 2), width * 2 - 1)
    last = max(round(end * width * 2), first + 1)
    halves = [first <= half < last for half in range(width * 2)]
    cells = zip(halves[::2], halves[1::2], strict=True)
    marks = {(False, False): " ", (True, False): "▌", (False, True): "▐", (True, True): "█"}
    return "".join(marks[cell] for cell in cells).rstrip()
