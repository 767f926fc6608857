"""What the tasks about nights print: the night itself, its summary, what is outdated. The doing is elsewhere."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bakehouse import cli_cloud, cli_nodes, night_report, nightly, nightly_slurm, outdated, pipelines
from bakehouse.errors import BakehouseError
from bakehouse.night import Book, Night, schedule
from bakehouse.nightly import Site, Work
from bakehouse.published import Catalogue
from bakehouse.record import Record
from bakehouse.run import as_root
from bakehouse.settings import Settings
from bakehouse.terminal import age_text, console, errors, open_site, print_json, say

EXECUTORS: dict[str, Callable[[], nightly.Executor]] = {
    "local": nightly.LocalExecutor,
    "slurm": nightly_slurm.SlurmExecutor,
}


def run(
    platforms: list[str],
    *,
    cloud: str,
    region: str,
    publish: bool,
    verify: bool,
    executor: str,
    clock_is_right: bool,
    dry_run: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Run a night and print its summary."""
    cli_nodes.one_of("--executor", executor, tuple(EXECUTORS))
    settings, _, _ = open_site()
    progress = errors if as_json else console
    names = nightly.names_of(settings, platforms)
    cloud_name = cloud or settings.cloud or os.environ.get("OS_CLOUD", "") if publish else ""
    site = _site(settings, progress, verify=verify, verbose=verbose)
    if dry_run:
        _preview(site, names, as_json=as_json)
        return
    if executor == "local":
        # Bakes and verifications become root by themselves: that they can is found out now.
        as_root()
    if cloud_name:
        site.connect = lambda: cli_cloud.Target(cloud_name, region).connect(settings)
    elif publish:
        progress.print("no cloud is named: nothing is published", style="yellow")
    night = nightly.run_night(
        site, names, cloud_name=cloud_name, executor=EXECUTORS[executor](), clock_is_right=clock_is_right
    )
    before = site.book.before(night)
    if as_json:
        print_json(night_report.summary(night))
    else:
        console.print()
        night_report.show(console, night, before)
        _say_where(site.book, night)
    _judge(site.book, night)


def _site(settings: Settings, progress: Console, *, verify: bool, verbose: bool) -> Site:
    _, store, cache = open_site()
    verifier: Callable[[Record], Record] | None = None
    if verify:

        def verifier(record: Record) -> Record:
            return cli_nodes.verified(record, settings, store, progress, verbose=verbose)

    return Site(settings, store, cache, progress, verifier, cli_nodes.can_verify, None, verbose)


def _say_where(book: Book, night: Night) -> None:
    folder = book.folder(night.name)
    console.print(f"\nSummary: {folder / night_report.MARKDOWN}", markup=False, highlight=False, soft_wrap=True)


def _judge(book: Book, night: Night) -> None:
    """Raise where a night did not go well: its exit status tells CI."""
    folder = book.folder(night.name)
    if night.failed:
        names = ", ".join(image.name for image in night.failed)
        raise BakehouseError(
            f"{len(night.failed)} of {len(night.images)} images failed: {names}", hint=f"why stands in {folder}"
        )
    if night.untold:
        raise BakehouseError("the images are well, but " + "; ".join(night.untold), hint=f"the summary is in {folder}")


def _preview(site: Site, names: tuple[str, ...], *, as_json: bool) -> None:
    rows = []
    table = Table("Image", "", "Why", box=None, pad_edge=False)
    for name in names:
        try:
            reasons = nightly.reasons_now(site, name)
            state = "would be built" if reasons else "unchanged"
            rows.append({"name": name, "state": state, "reasons": reasons})
        except BakehouseError as error:
            rows.append({"name": name, "state": "failed", "reasons": [error.message]})
        state = str(rows[-1]["state"])
        colour = {"unchanged": "dim", "failed": "bold red"}.get(state, "green")
        table.add_row(name, f"[{colour}]{state}[/]", escape("\n".join(map(str, rows[-1]["reasons"]))))
    if as_json:
        print_json(rows)
    else:
        console.print(table)


def bake(night: str, name: str, *, verify: bool) -> None:
    """Bake and verify one image of a night that is going on elsewhere: a task of the Slurm executor."""
    settings, _, _ = open_site()
    site = _site(settings, console, verify=verify, verbose=True)
    site.book.get(night)
    work = Work(site, night, name)
    nightly.make(site, work)
    if work.image.state == "failed":
        raise BakehouseError(f"{name} failed: {work.image.failure}")


def show(name: str, *, builders: int, as_json: bool) -> None:
    """Print what a night came to, or how several builders would have shared it."""
    settings, _, _ = open_site()
    book = Book(settings.nights)
    night = book.get(name)
    if builders:
        _show_schedule(night, builders, as_json=as_json)
        return
    if as_json:
        print_json(night_report.summary(night))
        return
    if night.ended is None:
        console.print(f"Night {night.name} has not come to its end; so far:", highlight=False)
        night = night.model_copy(update={"images": tuple(book.image(night.name, one) for one in night.names)})
    night_report.show(console, night, book.before(night))
    _say_where(book, night)


def _show_schedule(night: Night, builders: int, *, as_json: bool) -> None:
    if builders < 1:
        raise BakehouseError(f"--builders {builders}: it is 1 or more")
    slots = schedule(night.images, builders)
    if not slots:
        raise BakehouseError(f"nothing was built in the night {night.name}", hint="`invoke nightly.list` shows others")
    alone = sum(slot.end - slot.start for slot in slots)
    together = max(slot.end for slot in slots)
    if as_json:
        rows = [dataclasses.asdict(slot) for slot in slots]
        print_json({"builders": builders, "seconds": together, "seconds_of_one": round(alone, 1), "slots": rows})
        return
    table = Table("Builder", "Image", "Begins", "Ends", box=None, pad_edge=False)
    for slot in sorted(slots, key=lambda slot: (slot.builder, slot.start)):
        table.add_row(str(slot.builder), slot.name, f"{slot.start:.0f} s", f"{slot.end:.0f} s")
    console.print(table)
    say(
        f"\n{builders} builders like this one: {night_report.minutes_text(together)}, {together / alone:.2f} of the "
        f"{night_report.minutes_text(alone)} that one takes to bake and verify"
    )


def list_all(*, as_json: bool) -> None:
    """List the nights."""
    settings, _, _ = open_site()
    found, bad = Book(settings.nights).nights()
    for error in bad:
        errors.print(f"warning: {error}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print_json([night_report.summary(night) for night in found])
        return
    if not found:
        console.print("No nights yet: [bold]invoke nightly[/]", highlight=False)
        return
    table = Table("Night", "Began", "Executor", "Cloud", "Result", "Needs a person", box=None, pad_edge=False)
    for night in found:
        result = night_report.verdict(night) if night.ended else "did not come to its end"
        needs = str(len(night.all_needs) or "-")
        age = f"{age_text(night.started)} ago"
        table.add_row(night.name, age, night.executor, night.cloud or "-", escape(result), needs)
    console.print(table)


def show_outdated(*, cloud: str, region: str, platforms: list[str], check: bool, as_json: bool) -> None:
    """Print of which packages of images the mirror has newer versions."""
    settings, store, cache = open_site()
    folder = cache.indexes
    with errors.status("asking the mirrors"):
        if cloud:
            with cli_cloud.Target(cloud, region).connect(settings) as connected:
                catalogue = Catalogue.read(connected, settings.image_owner)
                found = outdated.of_cloud(catalogue, store, settings, folder, platforms)
        else:
            found = outdated.of_store(store, settings, folder, platforms)
    if as_json:
        print_json([dataclasses.asdict(one) | {"security": one.security} for one in found])
    else:
        _print_outdated(found, cloud)
    behind = [one for one in found if one.security]
    if check and behind:
        names = ", ".join(f"{one.name} {one.tag}" for one in behind)
        raise BakehouseError(f"security updates are missing in {names}", hint="`invoke nightly` rebuilds them")


def _print_outdated(found: list[outdated.Outdated], cloud: str) -> None:
    if not found:
        console.print(f"No images {f'in {cloud}' if cloud else 'in the store'} to compare.", highlight=False)
        return
    table = Table("Image", "Tag", "Channels", "Newer", "Security", "", box=None, pad_edge=False)
    for one in found:
        security = f"[bold red]{one.security}[/]" if one.security else "0"
        newer, security = ("?", "?") if one.unknown else (str(len(one.newer)), security)
        table.add_row(one.name, one.tag, ", ".join(one.channels) or "-", newer, security, escape(one.unknown))
    console.print(table)
    for one in found:
        if not one.newer:
            continue
        console.print(f"\n[bold]{one.name} {one.tag}[/]", highlight=False)
        packages = Table("Package", "Has", "Newer", "Suite", "Source", box=None, pad_edge=False)
        for package in one.newer:
            name = f"[bold red]{package.name}[/]" if package.security else package.name
            packages.add_row(
                name, escape(package.has), escape(package.offered), escape(package.suite), escape(package.source)
            )
        console.print(packages)


# Pipelines ------------------------------------------------------------------------------------------------------------


def render(
    *,
    system: str,
    platforms: list[str],
    cloud: str,
    runner: str,
    at: str,
    folder: str,
    output: str,
) -> None:
    """Print the files of a CI system, or write them."""
    settings, _, _ = open_site()
    hour, minute = pipelines.parse_time(at)
    images = nightly.names_of(settings, platforms)
    made = pipelines.Pipeline(images, hour, minute, cloud=cloud or settings.cloud or "mycloud")
    made = dataclasses.replace(made, runner=runner or made.runner, folder=folder or made.folder)
    files = pipelines.render(made, system)
    if output:
        for path in pipelines.write(files, Path(output)):
            say(f"wrote {path}")
        return
    for name, text in files.items():
        if len(files) > 1:
            say(f"# --- {name}")
        say(text.rstrip("\n"))
