"""What people see of a comparison: one self-contained HTML page, and tables on a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bakehouse import comparison as comparisons
from bakehouse.comparison import (
    EVERYTHING,
    PHASES,
    PLAIN,
    Answers,
    Change,
    Comparison,
    Measure,
    PathName,
    Run,
    Spread,
    amount,
)
from bakehouse.timeline import JOINED, Span, accelerator_text

TEMPLATE = "comparison_report.html.j2"

LETTERS = {name: "ABCDEF"[number] for number, (name, _) in enumerate(PHASES)}
"""What the phases are called in the chart: colours alone tell some people nothing."""

PALETTES = {
    "light": {
        "page": "#ffffff", "text": "#1a1a1a", "quiet": "#555555", "rule": "#757575", "bad": "#9b1c1c", "on": "#ffffff",
        "A": "#1b4f8a", "B": "#6a3d9a", "C": "#8a4b08", "D": "#a11d33", "E": "#0b6b4d", "F": "#4d4d4d",
    },
    "dark": {
        "page": "#16181c", "text": "#e8e8e8", "quiet": "#b5b5b5", "rule": "#8c8c8c", "bad": "#ff9a9a", "on": "#16181c",
        "A": "#8ab8f0", "B": "#c9a6f2", "C": "#e6b070", "D": "#f59aa8", "E": "#6fd0a8", "F": "#c0c0c0",
    },
}  # fmt: skip
"""Text, bars and lines stand out from the page, and letters from their bars, by what WCAG 2.2 asks (1.4.3, 1.4.11)."""

LINES: dict[PathName, tuple[str, str]] = {"bake": ("A", ""), "hybrid": ("C", "10 5"), "bootstrap": ("D", "2 5")}
"""The colour and the dashes of each path's line in the plot."""

LETTER_PERCENT = 4.5
"""Of the chart's width that a bar must have for its letter to fit."""

LEAST_BOOTS = 10
"""That the plot shows."""

MOST_TICKS = 5

MINUTES_FROM = 600.0
"""Seconds from which an axis is in minutes."""


@dataclass(frozen=True)
class Segment:
    """One phase of a bar, in percent of the chart's width."""

    name: str
    letter: str
    start: float
    width: float
    seconds: float


@dataclass(frozen=True)
class Bar:
    """One boot."""

    label: str
    outcome: str
    """Seconds to joined, or that it failed and why."""
    segments: list[Segment]

    def seconds(self, phase: str) -> str:
        """Write what a phase took."""
        return next((f"{one.seconds:.1f}" for one in self.segments if one.name == phase), "-")


@dataclass(frozen=True)
class Tick:
    """A mark of an axis."""

    at: float
    """Percent of the axis."""
    text: str


@dataclass(frozen=True)
class Chart:
    """Boots below one another."""

    title: str
    bars: list[Bar]
    axis: list[Tick]


@dataclass(frozen=True)
class Line:
    """A path in the break-even plot: what so many boots cost, their images' making included."""

    path: PathName
    colour: str
    dashes: str
    start: float
    """Percent of the plot's height, from above."""
    end: float
    making: float
    boot: float


@dataclass(frozen=True)
class Crossing:
    """The whole number of boots at which one path pays off against another."""

    at: float
    """Percent of the axis."""
    text: str


@dataclass(frozen=True)
class Plot:
    """The break-even plot."""

    boots: int
    """That the axis ends at."""
    lines: list[Line]
    crossings: list[Crossing]
    across: list[Tick]
    up: list[Tick]


def ticks(end: float, unit: str = "", scale: float = 1.0) -> list[Tick]:
    """Return marks at round numbers from 0 to an axis's end.

    Args:
        end: the axis's end, above 0.
        unit: written behind each number.
        scale: what the unit is of the axis's.
    """
    rough = end / scale / MOST_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    count = math.floor(end / scale / step * (1 + 1e-9))
    return [Tick(number * step * scale / end * 100, f"{number * step:g}{unit}") for number in range(count + 1)]


def seconds_ticks(end: float) -> list[Tick]:
    """Return marks of an axis of seconds, in minutes where it is long."""
    return ticks(end, " min", 60.0) if end >= MINUTES_FROM else ticks(end, " s")


def charts(comparison: Comparison) -> list[Chart]:
    """Draw the plain runs of each path, and the middle run of each path under each other scenario."""
    plain = {f"{path}": comparison.of(path, PLAIN) for path in comparison.paths}
    found = _charts({title: [(f"run {run.number}", run) for run in runs] for title, runs in plain.items() if runs})
    for scenario in comparison.scenarios:
        runs = [(path, run) for path in comparison.paths if (run := middle(comparison.of(path, scenario)))]
        if scenario != PLAIN:
            last = ", the last node" if scenario.nodes > 1 else ""
            found += _charts({f"{scenario.name}: each path's middle run{last}": [*runs]})
    return found


def middle(runs: Sequence[Run]) -> Run | None:
    """Return the run whose seconds to joined are the median, or next below it; one that failed if none joined."""
    joined = sorted((run for run in runs if run.joined is not None), key=lambda run: run.joined or 0)
    return joined[(len(joined) - 1) // 2] if joined else next(iter(runs), None)


def _charts(titled: Mapping[str, Sequence[tuple[str, Run]]]) -> list[Chart]:
    """Draw runs, with the same scale in all charts."""
    boots = {title: [(label, run, last(run)) for label, run in runs] for title, runs in titled.items()}
    ends = [span.end for each in boots.values() for _, _, spans in each for span in spans]
    end = max(ends, default=0.0) or 1.0
    return [
        Chart(title, [bar(label, run, spans, end) for label, run, spans in each], seconds_ticks(end))
        for title, each in boots.items()
    ]


def last(run: Run) -> list[Span]:
    """Return the phases of a run's last node; none where it failed."""
    if run.failure:
        return []
    return comparisons.phases(max(run.nodes, key=lambda node: node.timeline.seconds(JOINED) or 0).timeline)


def bar(label: str, run: Run, spans: Sequence[Span], end: float) -> Bar:
    """Draw a run.

    Args:
        label: what it is called.
        run: the run.
        spans: its phases.
        end: seconds that the chart's width stands for.
    """
    segments = [
        Segment(name, LETTERS[name], start / end * 100, (stop - start) / end * 100, stop - start)
        for name, start, stop in spans
    ]
    return Bar(label, f"failed: {run.failure}" if run.failure else f"{run.joined:.1f} s", segments)


def plot(comparison: Comparison, answers: Answers) -> Plot | None:
    """Draw what boots cost on each path; None where there are no two paths to compare."""
    medians = {path: comparisons.summary(comparison, path, PLAIN).joined for path in comparison.paths}
    known = [(path, one.median) for path, one in medians.items() if one]
    if len(known) < 2:  # noqa: PLR2004
        return None
    meetings = [one for one in answers.break_evens if one.occasion == EVERYTHING and one.boots is not None]
    boots = max(LEAST_BOOTS, *(2 * (one.boots or 0) for one in meetings), 0)
    making = {path: comparison.candidate(path).making_seconds for path, _ in known}
    top = max(making[path] + boots * boot for path, boot in known) or 1.0
    lines = [
        Line(path, *LINES[path], 100 - making[path] / top * 100, 100 - (making[path] + boots * boot) / top * 100,
             making[path], boot)
        for path, boot in known
    ]  # fmt: skip
    crossings = [
        Crossing((one.boots or 0) / boots * 100, f"{one.path} pays off against {one.other} {one.text}")
        for one in sorted(meetings, key=lambda one: one.boots or 0)
    ]
    return Plot(boots, lines, crossings, ticks(boots), seconds_ticks(top))


def spread_text(one: Spread | None, unit: str) -> str:
    """Write a median, and between what the values lie where there are several."""
    if one is None:
        return "-"
    if one.count == 1 or one.least == one.most:
        return amount(one.median, unit)
    return f"{amount(one.median, unit)} ({amount(one.least, unit)} to {amount(one.most, unit)})"


def html(comparison: Comparison) -> str:
    """Return the report: one page without scripts that refers to nothing outside of itself."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["amount"] = amount
    environment.filters["spread"] = spread_text
    answers = comparisons.answers(comparison)
    return environment.get_template(TEMPLATE).render(
        comparison=comparison,
        answers=answers,
        charts=charts(comparison),
        letters=LETTERS,
        palettes=PALETTES,
        letter_percent=LETTER_PERCENT,
        plot=plot(comparison, answers),
        measures=[measure for measure in Measure if measure != Measure.JOINED],
        machine=machine_text(comparison),
        failed=[run for run in comparison.runs if run.failure],
    )


# On a terminal --------------------------------------------------------------------------------------------------------


def show(console: Console, comparison: Comparison) -> None:
    """Show what a comparison found as tables and sentences."""
    answers = comparisons.answers(comparison)
    _print(
        console,
        ["Scenario", "Path", "To joined", "Least", "Most", "Network", "Disk", "Memory", "Joined"],
        [
            [
                one.scenario, one.path,
                *(_cell(one.joined, which, "s") for which in ("median", "least", "most")),
                *(_cell(one.measures[which], "median", "bytes")
                  for which in (Measure.RECEIVED, Measure.DISK, Measure.MEMORY)),
                f"{one.runs - one.failed} of {one.runs}",
            ]
            for one in answers.summaries
        ],
    )  # fmt: skip
    if answers.pairings:
        _print(
            console,
            ["Scenario", "Side by side", "Saved", "Ratio", "Sooner in"],
            [
                [
                    one.scenario, f"{one.path}, {one.other}", amount(one.saved.median, "s"),
                    f"{one.ratio.median:.2f}", f"{one.wins} of {one.saved.count} rounds",
                ]
                for one in answers.pairings
            ],
        )  # fmt: skip
    for finding in answers.findings:
        style = "[bold yellow]" if finding.against_bake else "[default]"
        console.print(f"{style}{escape(finding.text)}[/]", highlight=False)
    for run in comparison.runs:
        if run.failure:
            text = f"{run.path}, {run.scenario.name}, run {run.number} failed: {run.failure}"
            console.print(f"[red]{escape(text)}[/]", highlight=False)
    console.print(f"[dim]{escape(machine_text(comparison))}[/]", highlight=False)


def show_changes(console: Console, changes: Sequence[Change]) -> None:
    """Show two comparisons side by side."""
    _print(
        console,
        ["Path", "What", "Old", "New", "Change", ""],
        [
            [
                one.path, one.what, spread_text(one.old, one.unit), spread_text(one.new, one.unit),
                "" if one.percent is None else f"{one.percent:+.0f} %", "worse" if one.worse else "",
            ]
            for one in changes
        ],
        {"worse": "bold red"},
    )  # fmt: skip


def machine_text(comparison: Comparison) -> str:
    """Return what a comparison ran on, in one line."""
    one = comparison.machine
    parts = [one.cpu, f"{one.cores} cores", f"{one.memory / (1 << 30):.0f} GiB", f"Linux {one.kernel}"]
    return ", ".join([*parts, f"QEMU {one.qemu}" if one.qemu else "QEMU", accelerator_text(one.accelerator)])


def _cell(one: Spread | None, which: str, unit: str) -> str:
    return "-" if one is None else amount(getattr(one, which), unit)


def _print(
    console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]], styles: dict[str, str] | None = None
) -> None:
    table = Table(*headings, box=None, pad_edge=False)
    for row in rows:
        cells = [f"[{style}]{escape(cell)}[/]" if (style := (styles or {}).get(cell)) else escape(cell) for cell in row]
        table.add_row(*cells)
    console.print(table)
    console.print()
