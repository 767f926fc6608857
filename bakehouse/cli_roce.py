"""What the tasks about RDMA devices print."""

from __future__ import annotations

import json

from rich.markup import escape
from rich.table import Table

from bakehouse import roce
from bakehouse.errors import BakehouseError
from bakehouse.terminal import console, existing_file, print_json

COLOURS = {"applied": "green", "already right": "green", "not supported": "yellow", "failed": "bold red"}


def report(host: str, *, ssh_config: str, as_json: bool) -> None:
    """Show how a node's RDMA devices compare with what is wanted; fail where something is not as wanted."""
    found = roce.report(host, ssh_config=str(existing_file("--ssh-config", ssh_config)) if ssh_config else "")
    if as_json:
        print_json(json.loads(found.text))
    else:
        _show(found)
    failed = [f"{device.name} {knob.name} ({knob.where})" for device in found.devices for knob in device.failed]
    if failed:
        shown = f"{', '.join(failed[:3])}{' and others' if len(failed) > 3 else ''}"  # noqa: PLR2004
        raise BakehouseError(
            f"{len(failed)} settings are not as wanted: {shown}",
            hint="`bakehouse-roce apply` on the node sets what can be set; docs/roce.md says what each is for",
        )


def _show(found: roce.Report) -> None:
    if not found.devices:
        console.print("There is no RDMA device. `bakehouse-roce nics` on the node lists its NICs.", highlight=False)
    for device in found.devices:
        on = f" on {', '.join(device.interfaces)}" if device.interfaces else ""
        console.print(f"[bold]{escape(device.name)}[/] ({escape(device.driver)}){escape(on)}", highlight=False)
        if device.left_alone:
            console.print(f"  left alone: {escape(device.left_alone)}", highlight=False)
            continue
        table = Table(box=None, pad_edge=False)
        for heading in ("Knob", "Of", "Wanted", "Is", "State", "Word, and what to do"):
            table.add_column(heading, overflow="fold")
        for knob in device.knobs:
            then = f" (was {knob.at_apply})" if knob.state == "failed" and knob.at_apply not in {"", "failed"} else ""
            said = "; ".join(part for part in (knob.word, knob.hint) if part)
            colour = COLOURS.get(knob.state, "red")
            table.add_row(
                escape(knob.name), escape(knob.where), escape(knob.wanted), escape(knob.actual) or "-",
                f"[{colour}]{escape(knob.state)}[/]{escape(then)}", escape(said),
            )  # fmt: skip
        console.print(table)
