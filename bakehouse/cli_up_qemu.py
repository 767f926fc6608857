"""What ``up --on qemu`` and its ``down`` print. The doing is in local_launch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast, get_args

from rich.table import Table

from bakehouse import cli_up, launch, local_launch, run, sudo, timeline
from bakehouse import settings as site
from bakehouse.cli_nodes import one_of
from bakehouse.cli_up import Wish
from bakehouse.errors import BakehouseError
from bakehouse.local_launch import LocalLaunch
from bakehouse.progress import Progress
from bakehouse.record import Record
from bakehouse.slurm import Authentication
from bakehouse.store import LocalStore
from bakehouse.terminal import console, errors, open_site, print_json, say
from bakehouse.userdata import BASES

PLATFORM = "slurm"
"""What nodes on this host can become so far."""

UP_FLAGS = {
    "platform", "path", "on", "name", "count", "until", "join_timeout", "keep", "tag", "authentication", "json",
}  # fmt: skip
DOWN_FLAGS = {"name", "on", "all", "dry_run", "json"}
"""Flags that mean something here: a cluster of this host needs no others."""


def refuse_others(task: Callable[..., None], given: Mapping[str, Any], allowed: set[str]) -> None:
    """Refuse flags that say nothing here.

    Args:
        task: whose flags they are.
        given: what it was called with, its context too.
        allowed: the names of those that mean something.

    Raises:
        BakehouseError: another one has a value that is not its default.
    """
    defaults = {name: one.default for name, one in [*inspect.signature(task).parameters.items()][1:]}
    others = [name for name, default in defaults.items() if name not in allowed and given[name] != default]
    if others:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise BakehouseError(f"{flags} with --on qemu", hint="nodes on this host have a cluster of their own there")


def up(wish: Wish, *, tag: str, authentication: str, as_json: bool) -> None:
    """Bring nodes up on this host, with a cluster that they join, and print their timelines. They stay up.

    Where something fails, or the process is told to end, all of it is ended.

    Args:
        wish: which nodes.
        tag: of the image in the local store; the newest of the path's manifest by default.
        authentication: munge or slurm.
        as_json: print JSON.

    Raises:
        BakehouseError: there is no image for it, or something does not come up or join.
    """
    settings, store, _ = open_site()
    wanted = _wanted(wish, store, tag, authentication)
    sudo.must_be_root(settings)
    progress_console = errors if as_json else console
    title = f"Bringing up {', '.join(wish.nodes)} on this host, from {wanted.tag}"
    with run.ending_on_sigterm(), Progress(title, wanted.stages, progress_console) as progress:
        made = wanted
        with local_launch.up(wanted, progress.note, keep=wish.keep) as keeper:
            for stage in wanted.stages:
                with progress.stage(stage):
                    made = local_launch.wait(wanted, stage, keeper)
    if as_json:
        print_json(_facts(made))
    else:
        _print_up(made)


def _wanted(wish: Wish, store: LocalStore, tag: str, authentication: str) -> LocalLaunch:
    controller = _of_slurm(store.get(wish.platform))
    if wish.path in BASES:
        found = store.get(tag or BASES[wish.path])
    else:
        found = _of_slurm(store.get(tag or wish.platform))
        controller = found
    return LocalLaunch(
        name=wish.name,
        platform=wish.platform,
        path=wish.path,
        tag=found.tag,
        controller_tag=controller.tag,
        nodes=wish.nodes,
        authentication=cast(Authentication, one_of("--authentication", authentication, get_args(Authentication))),
        until=wish.until,
        join_seconds=wish.join_seconds,
        since=launch.now(),
    )


def _of_slurm(found: Record) -> Record:
    if found.platform != PLATFORM:
        raise BakehouseError(
            f"{found.tag} is a {found.platform} image, and --on qemu brings up nodes of {PLATFORM}",
            hint=f"`invoke boot {found.tag}`; with --join into the cluster of `invoke cluster.up`",
        )
    return found


def _facts(made: LocalLaunch) -> dict[str, Any]:
    timelines = made.timelines()
    nodes = [
        node.model_dump(mode="json")
        | {"timeline": timelines[node.name].model_dump(mode="json") if node.name in timelines else None}
        for node in made.running
    ]
    return made.model_dump(mode="json", exclude={"running", "done", "problem"}) | {"running": nodes}


def _print_up(made: LocalLaunch) -> None:
    timelines = made.timelines()
    cli_up.print_timelines(timelines)
    table = Table("Node", "Address", "Joined after", box=None, pad_edge=False)
    for node in made.running:
        joined = timelines[node.name].seconds(timeline.JOINED) if node.name in timelines else None
        table.add_row(node.name, node.address, "-" if joined is None else f"{joined:.0f} s")
    console.print(table)
    say("\nLog in, and ask the controller:")
    for node in made.running:
        say(f"  {' '.join(node.ssh)}")
    say(f"  {' '.join(made.controller)} sinfo")
    console.print(f"\nThey run until: [bold]invoke down --on qemu --name {made.name}[/]", highlight=False)


def down(name: str, *, everything: bool, dry_run: bool, as_json: bool) -> None:
    """End launches on this host, and remove what is left of those that were killed.

    Args:
        name: of the launch; may be left out where there is but one.
        everything: all of them.
        dry_run: only say what would end.
        as_json: print JSON.

    Raises:
        BakehouseError: it is not clear which, or one does not end.
    """
    if name and everything:
        raise BakehouseError(f"--name {name} and --all", hint="one of them")
    chosen = [one for one in local_launch.names() if name in {one, ""}]
    if not name and not everything and len(chosen) > 1:
        raise BakehouseError(
            f"which launch? There are {len(chosen)} on this host: {', '.join(chosen)}", hint="--name NAME, or --all"
        )
    if chosen and not dry_run:
        sudo.must_be_root(site.load())
    runs = {one: local_launch.is_running(one) for one in chosen}
    with run.ending_on_sigterm():
        for one in chosen:
            if not dry_run:
                local_launch.down(one)
            if not as_json:
                say(_what(one, runs=runs[one], dry_run=dry_run))
    if as_json:
        print_json([{"name": one, "running": runs[one]} for one in chosen])
    elif not chosen:
        say("Nothing of it is on this host.")


def _what(name: str, *, runs: bool, dry_run: bool) -> str:
    what = f"'{name}', its nodes and their cluster" if runs else f"what was left of '{name}'"
    return f"would end: {what}" if dry_run else f"gone: {what}"
