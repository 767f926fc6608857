"""What the tasks ``up`` and ``down`` print. The doing is in the other modules."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from bakehouse import cli_nodes, machine, manifest, pin, run, server, server_checks, teardown, timeline, userdata
from bakehouse import launch as launches
from bakehouse import settings as site
from bakehouse.cache import write_atomically
from bakehouse.cli_cloud import Target
from bakehouse.cli_nodes import Shared
from bakehouse.cloud import Cloud
from bakehouse.errors import BakehouseError
from bakehouse.launch import Launch
from bakehouse.progress import Progress
from bakehouse.published import Catalogue
from bakehouse.server import Access, Server
from bakehouse.server_checks import Checked, Volume, Wanted
from bakehouse.settings import Settings
from bakehouse.teardown import Failed, Thing
from bakehouse.terminal import console, errors, print_json, say
from bakehouse.timeline import Timeline
from bakehouse.userdata import BASES, PATHS

OPENSTACK, QEMU = "openstack", "qemu"

MACHINES = (OPENSTACK, QEMU)
"""What nodes can come up on."""

UNTIL = ("joined", "active")

NODE = "{node}"
"""In the name of a file: the node's name."""

JOIN_STAGE = "joined"

STRAGGLERS_SECONDS = 3.0
"""How long after a broken-off request what it made may appear."""

ROUNDS = 3
"""How often it is looked for stragglers."""

MOST_NODES = 100

DEFAULT_USER = "debian"

UserData = Callable[[str], str]
"""Gives a node's user-data by the node's name; empty for none. Called once for each node, before anything is made."""


@dataclass(frozen=True)
class Wish:
    """Which nodes shall come up, whatever they run on."""

    platform: str
    """The manifest's name, such as slurm."""
    path: str
    """bake, bootstrap or hybrid."""
    name: str
    """Of the launch; its nodes are NAME-1, NAME-2, ..."""
    count: int = 1
    until: str = "joined"
    """joined: the agent says so; active: the machine runs."""
    join_seconds: float = 900
    keep: bool = False
    """Leave the nodes where they do not join, to look at."""

    def __post_init__(self) -> None:
        launches.check_name(self.name)
        cli_nodes.one_of("--path", self.path, PATHS)
        cli_nodes.one_of("--until", self.until, UNTIL)
        if not 1 <= self.count <= MOST_NODES:
            raise BakehouseError(f"--count {self.count}: 1 to {MOST_NODES}")

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes' names."""
        return launches.node_names(self.name, self.count)


@dataclass(frozen=True)
class Choice:
    """Which image of a cloud: one of ours by channel or tag, or any by its id or name."""

    channel: str = "stable"
    tag: str = ""
    image: str = ""

    def __post_init__(self) -> None:
        if self.tag and self.image:
            raise BakehouseError("--tag and --image", hint="one of them says which image")


@dataclass(frozen=True)
class OpenStack:
    """How nodes come up on an OpenStack cloud, as flags say it."""

    target: Target
    choice: Choice
    wanted: Wanted
    identity: str = ""
    """The file with the private key of the key pair."""
    login: str = ""
    """The user to log in as; by default the one that the image names."""
    timeout: float = server.BUILD_SECONDS
    """Seconds until the servers must be active."""

    def __post_init__(self) -> None:
        if not self.wanted.flavor:
            raise BakehouseError("no flavor is given", hint="--flavor NAME: `openstack flavor list`")
        if self.identity and not Path(self.identity).expanduser().is_file():
            raise BakehouseError(f"--identity {self.identity} is not a file", hint="the private key of --key-pair")
        if self.identity and not self.wanted.key_pair:
            raise BakehouseError("--identity without --key-pair", hint="a key is made where neither is given")


def volume(size: int, kind: str, *, keep: bool) -> Volume | None:
    """Return the volume to boot from, as flags say it; None for none.

    Raises:
        BakehouseError: flags do not go together.
    """
    if not size and (kind or keep):
        raise BakehouseError(
            "--volume-type and --keep-volume need --volume-size", hint="--volume-size GIB boots from a volume"
        )
    return Volume(size, kind, keep) if size else None


def user_data(
    wish: Wish, shared: Shared, *, file: str, controllers: list[str], authentication: str, features: list[str]
) -> UserData:
    """Return what gives nodes the user-data that makes them join.

    Args:
        wish: which nodes.
        shared: as for the task userdata, and so the rest. Its node is filled in, and so is ``{node}`` in the name of
            its token_file, since each token is for one node.
        file: with user-data; ``{node}`` in its name stands for the node's name.
        controllers: without a file: where slurmctld listens.
        authentication: munge or slurm.
        features: of the nodes.

    Raises:
        BakehouseError: flags do not go together; and by what is returned, where a file cannot be read.
    """
    if bool(file) == bool(controllers):
        raise BakehouseError(
            "--user-data and --controller" if file else "nothing says how the nodes join",
            hint="--user-data FILE, or --controller HOST with --broker, --ca and --token-file, or with --key-file",
        )
    if not file and (platform := _platform(wish.platform)) in {"kubernetes", "roce"}:
        of = "" if platform == wish.platform else f" (platform {platform})"
        raise BakehouseError(
            f"--controller is for Slurm nodes, and --platform is {wish.platform}{of}",
            hint=f"`invoke userdata --platform {wish.platform}` makes a file for --user-data",
        )
    if wish.count > 1 and shared.token_file and NODE not in shared.token_file:
        raise BakehouseError(
            "a token is for one node", hint=f"--token-file 'token-{NODE}': one file for each node, such as token-node-1"
        )
    if file:
        return lambda node: cli_nodes.text_of("--user-data", file.replace(NODE, node))

    def make(node: str) -> str:
        own = dataclasses.replace(shared, node=node, token_file=shared.token_file.replace(NODE, node))
        return userdata.render(cli_nodes.slurm_join(
            own, platform="slurm", controllers=controllers, authentication=authentication, features=features,
            hardware="", roce="",
        ))  # fmt: skip

    return make


def _platform(name: str) -> str:
    """Return the platform of a manifest; the name itself where this site has no such manifest, only images of it."""
    places = manifest.folders(site.load().manifests)
    return str(manifest.resolve(name, places).manifest.platform) if name in manifest.find_all(places) else name


# Up.


def up_on_openstack(wish: Wish, joining: UserData, options: OpenStack, *, as_json: bool = False) -> None:
    """Bring nodes up as servers of a cloud, wait until they have joined, and print their timelines.

    Where something fails, or the process is told to end, all that was made is deleted again.

    Args:
        wish: which nodes.
        joining: what makes them join.
        options: how they come up.
        as_json: print JSON.

    Raises:
        BakehouseError: something is not there, does not fit, cannot be made, or does not join.
    """
    settings = site.load()
    encoded = server.encode_all(wish.nodes, joining)
    progress_console = errors if as_json else console
    stages = ["check", *server.STAGES, *([JOIN_STAGE] if wish.until == JOIN_STAGE else [])]
    with run.ending_on_sigterm(), options.target.connect(settings) as cloud:
        title = f"Bringing up {', '.join(wish.nodes)} in {cloud.place}"
        with Progress(title, stages, progress_console) as progress, contextlib.ExitStack() as opened:
            with progress.stage("check"):
                checked = _checked(cloud, wish, options, settings)
                launch = _launch(cloud, wish, checked)
            with _all_or_none(cloud, launch, progress.note, keep=wish.keep):
                # From here on a killed process leaves a note, and `down` knows where to look.
                launch.write()
                access = _access(launch, checked, options)
                servers = server.start(
                    cloud, launch, checked, access, encoded, progress, opened, seconds=options.timeout
                )
                timelines: dict[str, Timeline] = {}
                if wish.until == JOIN_STAGE:
                    with progress.stage(JOIN_STAGE):
                        timelines = _join(servers, wish.join_seconds, progress)
                for node, found in timelines.items():
                    write_atomically(launch.folder / launches.timeline_name(node), found.model_dump_json(indent=1))
    _print_up(launch, servers, timelines, cloud, as_json=as_json)


def _checked(cloud: Cloud, wish: Wish, options: OpenStack, settings: Settings) -> Checked:
    choice = options.choice
    image = choice.image
    if not image:
        catalogue = Catalogue.read(cloud, settings.image_owner)
        platform = BASES.get(wish.path, wish.platform)
        image = pin.choose(catalogue, platform, channel_name=choice.channel, tag=choice.tag).id
    checked = server_checks.check(cloud, dataclasses.replace(options.wanted, image=image), wish.count)
    there = [thing for thing in teardown.find(cloud) if thing.mark.name == wish.name and not thing.kept]
    if there:
        raise BakehouseError(
            f"there is a launch '{wish.name}' in {cloud.place} already, or what was left of one: {there[0]}",
            hint=f"`invoke down --name {wish.name} --cloud {cloud.name}`, or another --name",
        )
    return checked


def _launch(cloud: Cloud, wish: Wish, checked: Checked) -> Launch:
    return Launch(
        name=wish.name,
        identity=launches.new_identity(),
        platform=wish.platform,
        path=wish.path,
        image=checked.image.id,
        nodes=wish.nodes,
        cloud=cloud.name,
        region=cloud.region,
        project=cloud.project,
        user=cloud.user,
        since=launches.now(),
    )


def _access(launch: Launch, checked: Checked, options: OpenStack) -> Access:
    user = options.login or checked.image.properties.get("os_admin_user", DEFAULT_USER)
    if options.wanted.key_pair:
        identity = str(Path(options.identity).expanduser()) if options.identity else ""
        return Access(options.wanted.key_pair, "", user, identity)
    key = machine.make_key(launch.folder)
    return Access("", key.with_suffix(".pub").read_text().strip(), user, str(key))


@contextlib.contextmanager
def _all_or_none(cloud: Cloud, launch: Launch, tell: Callable[[str], None], *, keep: bool) -> Iterator[None]:
    """Delete all that was made where something fails or the process is told to end."""
    try:
        yield
    except BaseException as error:
        if keep and isinstance(error, BakehouseError):
            tell(f"left as it is, since --keep was given: `invoke down --name {launch.name}` deletes it")
            raise
        tell(f"deleting what was made for {launch.name} ...")
        try:
            failed = _clear(cloud, launch.identity, tell, stragglers=True)
        except BaseException:
            tell(f"not all of it was deleted: `invoke down --name {launch.name} --cloud {cloud.name}` does it")
            raise
        if failed:
            tell("by hand: " + "; ".join(one.thing.by_hand for one in failed))
        else:
            launch.forget()
            tell("nothing of it is left")
        raise


def _clear(cloud: Cloud, identity: str, tell: Callable[[str], None], *, stragglers: bool = False) -> list[Failed]:
    """Delete all of a launch. What a request that was broken off made may appear a moment later."""
    failed: list[Failed] = []
    for _ in range(ROUNDS):
        things = [dataclasses.replace(thing, kept=False) for thing in teardown.find(cloud, identity)]
        if not things and not stragglers:
            return []
        failed = teardown.delete(cloud, things, tell)
        if failed:
            return failed
        if stragglers:
            stragglers = False
            time.sleep(STRAGGLERS_SECONDS)
    return failed


def _join(servers: Sequence[Server], seconds: float, progress: Progress) -> dict[str, Timeline]:
    deadline = time.monotonic() + seconds
    found = {}
    for one in servers:
        progress.line(f"waiting for {one.node} ({one.address}) to join")
        one.wait_for_join(max(deadline - time.monotonic(), server.POLL_SECONDS))
    for one in servers:
        progress.line(f"reading when {one.node} did what")
        found[one.node] = one.read_timeline()
    return found


def _print_up(
    launch: Launch, servers: Sequence[Server], timelines: dict[str, Timeline], cloud: Cloud, *, as_json: bool
) -> None:
    if as_json:
        print_json({
            **dataclasses.asdict(launch),
            "servers": [_server_facts(one, timelines.get(one.node)) for one in servers],
        })  # fmt: skip
        return
    print_timelines(timelines)
    table = Table("Node", "Id", "Address", "Launched after", "Joined after", "Console", box=None, pad_edge=False)
    for one in servers:
        shown = timelines.get(one.node)
        joined = shown.seconds(timeline.JOINED) if shown else None
        table.add_row(
            one.node, one.id, one.address or "-", f"{one.cloud_seconds:.0f} s",
            "-" if joined is None else f"{joined:.0f} s", escape(one.console.silent[:60]) or "read",
        )  # fmt: skip
    console.print(table)
    say("Launched after: from our request to Nova's own time of the launch. Joined after: from the launch.")
    for one in servers:
        if one.login:
            console.print(f"{' '.join(one.login.command)}", style="dim", highlight=False, soft_wrap=True, markup=False)
    console.print(f"\nThey cost until: [bold]invoke down --name {launch.name} --cloud {cloud.name}[/]", highlight=False)


def print_timelines(timelines: Mapping[str, Timeline]) -> None:
    """Print timelines, each below its node's name."""
    console.print()
    for node, shown in timelines.items():
        console.print(f"[bold]{node}[/]")
        timeline.show(console, shown)
        console.print()


def _server_facts(one: Server, shown: Timeline | None) -> dict[str, Any]:
    return {
        "node": one.node, "id": one.id, "address": one.address, "addresses": one.fixed,
        "launched_after_seconds": round(one.cloud_seconds, 2), "console": one.console.silent or "read",
        "timeline": json.loads(shown.model_dump_json()) if shown else None,
    }  # fmt: skip


# Down.


def down_on_openstack(
    name: str,
    *,
    target: Target,
    everything: bool = False,
    any_user: bool = False,
    with_volumes: bool = False,
    dry_run: bool = False,
    as_json: bool = False,
) -> None:
    """Delete all that launches made in a cloud, found by its mark, and print what it was.

    Args:
        name: of the launch, or its id; may be left out where this user has but one.
        target: the cloud; by default the one that the note of the launch names.
        everything: all launches of this user in this project.
        any_user: those of other users of the project too.
        with_volumes: also volumes that were to be kept.
        dry_run: only say what would be deleted.
        as_json: print JSON.

    Raises:
        BakehouseError: the launch is another user's or project's, or something could not be deleted.
    """
    if name and everything:
        raise BakehouseError(f"--name {name} and --all", hint="one of them")
    noted = (
        launches.notes() if everything else [one for one in launches.notes() if name in {one.name, one.identity, ""}]
    )
    settings = site.load()
    tell = _to_errors if as_json else say
    with run.ending_on_sigterm(), _where(target, noted).connect(settings) as cloud:
        things = teardown.find(cloud)
        chosen = _chosen(cloud, things, name, noted, everything=everything, any_user=any_user, tell=tell)
        if with_volumes:
            chosen = [dataclasses.replace(thing, kept=False) for thing in chosen]
        if not as_json:
            _print_things(chosen, cloud, dry_run=dry_run)
        failed: list[Failed] = []
        if not dry_run:
            failed = teardown.delete(cloud, chosen, tell)
            _forget(cloud, noted, failed)
        if as_json:
            reasons = {one.thing.id: one.reason for one in failed}
            print_json([_thing_facts(thing) | {"error": reasons.get(thing.id)} for thing in chosen])
    if failed:
        raise teardown.left_error(failed)


def _to_errors(text: str) -> None:
    errors.print(text, markup=False, highlight=False, soft_wrap=True)


def _where(target: Target, noted: Sequence[Launch]) -> Target:
    places = {(one.cloud, one.region) for one in noted}
    if target.cloud or len(places) != 1:
        return target
    ((cloud, region),) = places
    # A cloud that is named by variables has no name in clouds.yaml.
    return Target("" if cloud == "envvars" else cloud, target.region or region)


def _chosen(
    cloud: Cloud,
    things: Sequence[Thing],
    name: str,
    noted: Sequence[Launch],
    *,
    everything: bool,
    any_user: bool,
    tell: Callable[[str], None],
) -> list[Thing]:
    own = {"", cloud.user}
    fitting = [thing for thing in things if everything or not name or name in {thing.mark.name, thing.mark.identity}]
    chosen = [thing for thing in fitting if any_user or thing.mark.user in own]
    others = sorted({(thing.mark.name, thing.mark.user) for thing in fitting if thing not in chosen})
    if others and name and not chosen:
        raise BakehouseError(
            f"'{name}' is a launch of another user of this project ({others[0][1]})", hint="--any-user deletes it too"
        )
    for other, user in others if not name else []:
        tell(f"{other} is a launch of another user ({user}): left alone")
    elsewhere = [one for one in noted if one.cloud == cloud.name and one.project != cloud.project]
    if name and not chosen and elsewhere:
        raise BakehouseError(
            f"'{name}' was made in another project ({elsewhere[0].project}) than this credential is for",
            hint="name the entry of clouds.yaml that it was made with: --cloud NAME",
        )
    names = sorted({(thing.mark.name, thing.mark.identity) for thing in chosen if not thing.kept})
    if not name and not everything and len(names) > 1:
        raise BakehouseError(
            f"which launch? There are {len(names)} in {cloud.place}: {', '.join(one for one, _ in names)}",
            hint="--name NAME, or --all",
        )
    return chosen


def _print_things(things: Sequence[Thing], cloud: Cloud, *, dry_run: bool) -> None:
    if not things:
        say(f"Nothing of it is in {cloud.place}.")
        return
    table = Table("", "Kind", "Name", "Id", "Launch", "", box=None, pad_edge=False)
    for thing in things:
        verb = "[green]keep[/]" if thing.kept else "[bold red]delete[/]"
        row = (thing.kind, thing.name, thing.id, thing.mark.name, thing.detail)
        table.add_row(verb, *(escape(text) for text in row))
    console.print(table)
    if dry_run:
        say("Nothing was deleted.")


def _thing_facts(thing: Thing) -> dict[str, Any]:
    return {
        "kind": thing.kind, "id": thing.id, "name": thing.name, "launch": thing.mark.name,
        "launch_id": thing.mark.identity, "kept": thing.kept,
    }  # fmt: skip


def _forget(cloud: Cloud, noted: Sequence[Launch], failed: Sequence[Failed]) -> None:
    """Remove the notes of launches of which nothing is left in this project."""
    left = {one.thing.mark.identity for one in failed}
    left |= {thing.mark.identity for thing in teardown.find(cloud) if not thing.kept}
    for one in noted:
        here = (one.cloud, one.project) == (cloud.name, cloud.project) and one.region == cloud.region
        if here and one.identity not in left:
            one.forget()
