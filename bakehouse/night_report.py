"""The summary of a night: Markdown with a plot for people, JUnit XML for CI, a table for the terminal."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jinja2
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bakehouse import night as nights
from bakehouse.cache import write_atomically
from bakehouse.night import ImageNight, Night
from bakehouse.record import FILE_NAME as RECORD
from bakehouse.store import LocalStore
from bakehouse.terminal import size_text
from bakehouse.timeline import accelerator_text

MARKDOWN, JSON, JUNIT, PLOT = "summary.md", "summary.json", "junit.xml", "joined.svg"
TEMPLATE = Path(__file__).with_name("night_summary.md.j2")
COLOURS = {"built": "green", "unchanged": "dim", "failed": "bold red", "waiting": "yellow"}
SVG_SALT = "bakehouse"
"""Makes matplotlib name the parts of a plot alike each time."""


def write(night: Night, before: Sequence[Night], folder: Path) -> None:
    """Write the summary's files into the night's folder.

    Args:
        night: the night, ended.
        before: the nights before.
        folder: the night's.
    """
    plotted = plot([night, *before])
    if plotted:
        write_atomically(folder / PLOT, plotted)
    write_atomically(folder / MARKDOWN, markdown(night, before, with_plot=bool(plotted)))
    write_atomically(folder / JSON, json.dumps(summary(night), indent=1) + "\n")
    write_atomically(folder / JUNIT, junit(night))


def lay_out(night: Night, folder: Path, store: LocalStore, target: Path) -> None:
    """Lay out what CI systems keep of the last night: its summary, and records and SBOMs of its images.

    Args:
        night: the night, its files written.
        folder: the night's.
        store: where its images are.
        target: what is in it goes.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in (MARKDOWN, JSON, JUNIT, PLOT):
        if (folder / name).exists():
            shutil.copy(folder / name, target / name)
    records = {record.tag: record for record in store.records()}
    for image in night.images:
        if record := records.get(image.tag):
            shutil.copy(store.folder(record.tag) / record.sbom, target / f"{image.name}.cdx.json")
            shutil.copy(store.folder(record.tag) / RECORD, target / f"{image.name}.record.json")


def markdown(night: Night, before: Sequence[Night], *, with_plot: bool) -> str:
    """Return the summary for people."""
    environment = jinja2.Environment(
        autoescape=False,  # noqa: S701 - no HTML
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["size"] = size_text
    environment.filters["cell"] = _cell
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        night=night, plot=PLOT if with_plot else "", verdict=verdict(night),
        boot=lambda image: boot_text(image, before), growth=growth_text, minutes=minutes_text,
    )  # fmt: skip


def _cell(text: object) -> str:
    """Write text so that it stays one cell of a table of Markdown."""
    return " ".join(str(text).split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;") or "-"


def verdict(night: Night) -> str:
    """Return the night in a sentence."""
    built = sum(image.state == "built" for image in night.images)
    unchanged = sum(image.state == "unchanged" for image in night.images)
    parts = [f"{len(night.failed)} failed"] if night.failed else []
    parts += [f"{built} built"] if built else []
    parts += [f"{unchanged} unchanged"] if unchanged else []
    return f"{len(night.images)} images: {', '.join(parts) or 'nothing to do'}, {minutes_text(night.seconds)}"


def summary(night: Night) -> dict[str, Any]:
    """Return the summary as plain data: what is kept, and what follows from it."""
    return night.model_dump(mode="json") | {
        "verdict": verdict(night), "failed": [image.name for image in night.failed], "needs_person": night.all_needs,
    }  # fmt: skip


def minutes_text(seconds: float) -> str:
    """Write how long something took."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"  # noqa: PLR2004 - two minutes


def growth_text(image: ImageNight) -> str:
    """Write how much larger an image became."""
    if not image.size_before or not image.size or image.state != "built":
        return ""
    return f"{100 * (image.size / image.size_before - 1):+.1f} %"


def boot_text(image: ImageNight, before: Sequence[Night]) -> str:
    """Write how long an image took to join, and how long it took in the nights before."""
    if image.joined is None:
        return ""
    earlier = [seconds for _, seconds in nights.boots(list(before), image.name, image.accelerator)][-nights.SHOWN :]
    text = f"{image.joined:.0f} s"
    if earlier:
        text += f" (before: {min(earlier):.0f} to {max(earlier):.0f} s)"
    return text


# JUnit XML ------------------------------------------------------------------------------------------------------------


def junit(night: Night) -> str:
    """Return the night as JUnit XML: a suite an image, a case a stage."""
    root = ElementTree.Element("testsuites", name=f"nightly {night.name}")
    for image in night.images:
        cases = list(image.stages)
        suite = ElementTree.SubElement(
            root, "testsuite", name=image.name, timestamp=f"{night.started:%Y-%m-%dT%H:%M:%S}",
            tests=str(len(cases)), failures=str(sum(case.result == "failed" for case in cases)), errors="0",
            skipped=str(sum(case.result == "skipped" for case in cases)), time=f"{image.seconds:.1f}",
        )  # fmt: skip
        for stage in cases:
            case = ElementTree.SubElement(
                suite, "testcase", classname=f"nightly.{image.name}", name=stage.name, time=f"{stage.seconds:.1f}"
            )
            if stage.result == "failed":
                message = stage.detail.splitlines()[0] if stage.detail else stage.name
                ElementTree.SubElement(case, "failure", message=message).text = stage.detail
            elif stage.result == "skipped":
                ElementTree.SubElement(case, "skipped", message=stage.detail)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


# The plot -------------------------------------------------------------------------------------------------------------


def plot(night_list: Sequence[Night]) -> str:
    """Return seconds to joined over the last nights as SVG, a panel an image; empty where nothing was booted."""
    kinds = sorted({
        (image.name, image.accelerator)
        for night in night_list
        for image in night.images
        if image.joined is not None
    })  # fmt: skip
    series = {kind: nights.boots(list(night_list), *kind)[-nights.SHOWN - 1 :] for kind in kinds}
    if not series:
        return ""
    # It takes a second to load, and most tasks draw nothing.
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": SVG_SALT,
        "font.size": 9,
        "font.family": "sans-serif",
    }
    with mpl.rc_context(style):
        figure, axes = pyplot.subplots(
            len(series), 1, figsize=(7, 0.6 + 1.7 * len(series)), squeeze=False, layout="constrained"
        )
        for axis, ((name, accelerator), points) in zip(axes[:, 0], series.items(), strict=True):
            where = range(len(points))
            axis.plot(where, [seconds for _, seconds in points], marker="o", color="#1f5fa8", linewidth=1.5)
            axis.set_title(f"{name}: seconds to joined, {accelerator_text(accelerator)}", loc="left", fontsize=9)
            axis.set_xticks(where, [label for label, _ in points], rotation=30, ha="right", fontsize=7)
            axis.set_ylim(0, max(seconds for _, seconds in points) * 1.25)
            axis.grid(axis="y", color="#dddddd", linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
            axis.annotate(
                f"{points[-1][1]:.0f} s", (len(points) - 1, points[-1][1]), textcoords="offset points", xytext=(0, 6),
                ha="center", fontsize=8,
            )  # fmt: skip
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return written.getvalue()


# The terminal ---------------------------------------------------------------------------------------------------------


def show(console: Console, night: Night, before: Sequence[Night]) -> None:
    """Print a night."""
    table = Table("Image", "", "Tag", "Verified", "Joined", "Size", "Took", "", box=None, pad_edge=False)
    for image in night.images:
        table.add_row(
            image.name,
            f"[{COLOURS[image.state]}]{image.state}[/]",
            image.tag or "-",
            image.verified if image.verified != "none" else "-",
            boot_text(image, before) or "-",
            " ".join(filter(None, [size_text(image.size) if image.size else "-", growth_text(image)])),
            minutes_text(image.seconds),
            escape(_note(image)),
        )
    console.print(table)
    for image in night.images:
        for channel, what in image.channels.items():
            console.print(f"[bold]{image.name}[/] {channel}: {escape(what)}", highlight=False, soft_wrap=True)
    if night.pruned:
        console.print(f"pruned: {', '.join(night.pruned)}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"\nNight {night.name}: {verdict(night)}", highlight=False)
    if night.all_needs:
        console.print("\n[bold yellow]Needs a person[/]")
        for need in night.all_needs:
            console.print(f"  {need}", markup=False, highlight=False, soft_wrap=True)


def _note(image: ImageNight) -> str:
    if image.state == "failed":
        return image.failure.splitlines()[0] if image.failure else "failed"
    security = sum(change.security for change in image.changes)
    parts = [f"{len(image.changes)} packages changed" + (f", {security} of them security" if security else "")]
    return parts[0] if image.changes else ""
