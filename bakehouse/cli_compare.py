"""What the tasks about comparisons of the paths print. The doing is in the other modules."""

from __future__ import annotations

import dataclasses
import re
import tempfile
import webbrowser
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from bakehouse import compare, comparison_report, sudo
from bakehouse import comparison as comparisons
from bakehouse import run as processes
from bakehouse import settings as site
from bakehouse.cache import write_atomically
from bakehouse.comparison import Comparison, Kept, Scenario
from bakehouse.errors import BakehouseError
from bakehouse.terminal import age_text, console, errors, print_json, say, show_error


def run(platform: str, *, runs: int, together: int, mirror_rate: str, html: str, as_json: bool) -> None:
    """Compare the paths of a platform, keep the result, and show it.

    Args:
        platform: the manifest.
        runs: rounds of the plain scenario; 0 for 3, or 1 where machines are emulated.
        together: nodes that are switched on together in one more round; 0 for none.
        mirror_rate: to which the nodes' link is held in one more round, such as 10mbit; empty for none.
        html: a file for the report.
        as_json: print JSON.

    Raises:
        BakehouseError: a flag is wrong, the paths cannot be compared, or something cannot be made.
    """
    if runs < 0:
        raise BakehouseError(f"--runs {runs}: it is 1 or more, or 0 for what suits this host")
    if together < 0 or together == 1:
        raise BakehouseError(f"--together {together}: it is 2 or more, or 0 for none")
    more = [Scenario(nodes=together)] if together else []
    more += [Scenario(mirror_rate=_rate(mirror_rate))] if mirror_rate else []
    settings = site.load()
    sudo.must_be_root(settings)
    kept: Path | None = None

    def keep(found: Comparison) -> None:
        nonlocal kept
        kept = comparisons.keep(found, over=kept)

    try:
        with processes.ending_on_sigterm():
            compare.compare(platform, settings, errors, runs=runs, more=tuple(more), keep=keep)
    finally:
        if kept:
            errors.print(f"kept as {kept.stem}: `invoke compare.show` shows it again", highlight=False)
    if kept:
        show(kept.stem, html=html, open_page=False, as_json=as_json)


def _rate(text: str) -> int:
    """Read a rate: a number and kbit, mbit or gbit."""
    found = re.fullmatch(r"([1-9][0-9]{0,5})([kmg])bit", text.lower())
    if not found:
        raise BakehouseError(f"--mirror-rate {text} is no rate", hint="such as 10mbit or 1gbit")
    return int(found[1]) * {"k": 10**3, "m": 10**6, "g": 10**9}[found[2]]


def results(platform: str, *, as_json: bool) -> None:
    """List the results that are kept."""
    found, bad = comparisons.kept(platform)
    for error in bad:
        show_error(error)
    if as_json:
        print_json([
            {"name": one.name, "file": str(one.path), "platform": one.comparison.platform,
             "started": one.comparison.started, "paths": one.comparison.paths, "runs": len(one.comparison.runs)}
            for one in found
        ])  # fmt: skip
        return
    if not found:
        console.print(f"No results in {escape(str(comparisons.folder()))}.", highlight=False)
        return
    table = Table("Result", "Age", "Paths", "Runs", "Failed", box=None, pad_edge=False)
    for one in found:
        runs = one.comparison.runs
        table.add_row(
            escape(one.name), age_text(one.comparison.started), ", ".join(one.comparison.paths), f"{len(runs)}",
            f"{sum(bool(run.failure) for run in runs)}",
        )  # fmt: skip
    console.print(table)


def show(name: str, *, html: str, open_page: bool, as_json: bool) -> None:
    """Show a result, and write or open its report."""
    found = comparisons.get(name)
    if as_json:
        print_json(_json(found))
    else:
        console.print(f"[bold]{escape(found.name)}[/]\n", highlight=False)
        comparison_report.show(console, found.comparison)
    page = Path(html).expanduser().absolute() if html else None
    if page or open_page:
        page = page or Path(tempfile.mkdtemp(prefix="bakehouse-"), f"{found.name}.html")
        try:
            write_atomically(page, comparison_report.html(found.comparison))
        except OSError as error:
            raise BakehouseError(f"{page} cannot be written: {error.strerror}") from error
        errors.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)
    if page and open_page and not webbrowser.open(page.as_uri()):
        raise BakehouseError("no browser could be started", hint=f"open {page} yourself")


def _json(found: Kept) -> dict[str, object]:
    return {
        "name": found.name,
        "result": found.comparison.model_dump(mode="json"),
        "answers": dataclasses.asdict(comparisons.answers(found.comparison)),
    }


def regression(name: str, *, against: str, percent: float, as_json: bool) -> None:
    """Compare a result with an older one; fail where something got worse."""
    if percent < 0:
        raise BakehouseError(f"--percent {percent:g}: it is 0 or more")
    new = comparisons.get(name)
    old = comparisons.get(against) if against else comparisons.before(new)
    if old.comparison.platform != new.comparison.platform:
        raise BakehouseError(f"{old.name} is of {old.comparison.platform}, {new.name} of {new.comparison.platform}")
    changes = comparisons.changes(old.comparison, new.comparison, percent)
    same_machine = old.comparison.machine == new.comparison.machine
    if as_json:
        said = [dataclasses.asdict(one) | {"percent": one.percent} for one in changes]
        print_json({"old": old.name, "new": new.name, "same_machine": same_machine, "changes": said})
    else:
        say(f"{old.name} -> {new.name}")
        if not same_machine:
            console.print("[yellow]They ran on different machines: seconds may differ by that.[/]")
        console.print()
        comparison_report.show_changes(console, changes)
    worse = [f"{one.path}: {one.what}" for one in changes if one.worse]
    if worse:
        raise BakehouseError(
            f"{len(worse)} numbers are worse than in {old.name}: {'; '.join(worse)}",
            hint=f"worse is above all older values and by more than {percent:g} percent above their median",
        )
