"""What the tasks about comparisons of the paths print. The doing is in the other modules."""

from __future__ import annotations

import dataclasses
import tempfile
import webbrowser
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from bakehouse import comparison as comparisons
from bakehouse import comparison_report
from bakehouse.cache import write_atomically
from bakehouse.comparison import Kept
from bakehouse.errors import BakehouseError
from bakehouse.terminal import age_text, console, errors, print_json, say, show_error


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
