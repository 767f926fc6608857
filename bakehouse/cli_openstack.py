"""What the tasks about the local OpenStack print. The doing is in local_cloud."""

from __future__ import annotations

import datetime

from rich.markup import escape

from bakehouse import clouds_yaml, local_cloud
from bakehouse import settings as site
from bakehouse.errors import BakehouseError
from bakehouse.local_cloud import SERVICES, LocalCloud
from bakehouse.terminal import age_text, console, print_json, say, size_text


def up(*, name: str) -> None:
    """Bring it up and say how to use it."""
    settings = site.load()

    made = local_cloud.up(settings.cache, name=name or "bakehouse", say=say)
    if name and made.name != name:
        raise BakehouseError(
            f"the local OpenStack is called '{made.name}'",
            hint="`invoke openstack.down --delete` first, for another name",
        )
    _print(made)
    console.print(f"\nNext: [bold]invoke publish slurm --cloud {made.name}[/]", highlight=False)


def down(*, delete: bool, dry_run: bool) -> None:
    """End it."""
    if dry_run:
        there = local_cloud.find()
        verb = "delete" if delete else "stop"
        say(f"would {verb} '{there.name}' in {there.folder}" if there else "there is no local OpenStack here")
        return
    found = local_cloud.down(delete=delete, say=say)
    if delete:
        say(f"deleted the local OpenStack with its images, and '{found.name}' from {found.clouds_file}")
    else:
        say(f"stopped; its images stay in {found.folder} (--delete removes them)")


def status(*, as_json: bool) -> None:
    """Say whether it runs and where."""
    found = local_cloud.find()
    if as_json:
        print_json(_facts(found) if found else None)
    elif found is None:
        console.print("No local OpenStack here. [bold]invoke openstack.up[/] makes one.", highlight=False)
    else:
        _print(found)


def _facts(found: LocalCloud) -> dict[str, object]:
    processes = {service: found.process(service) for service in SERVICES}
    return {
        "name": found.name,
        "running": found.running,
        "services": {service: one.pid if one else None for service, one in processes.items()},
        "auth_url": found.auth_url,
        "image_url": found.image_url,
        "clouds_file": str(found.clouds_file),
        "folder": str(found.folder),
        "since": found.since,
        "images": sum(path.is_file() for path in found.filestore.glob("*")),
        "disk": found.disk(),
    }


def _print(found: LocalCloud) -> None:
    ports = {"keystone": found.auth_url, "glance": found.image_url}
    for service in SERVICES:
        process = found.process(service)
        state = f"[green]runs[/] at {ports[service]}, process {process.pid}" if process else "[bold red]is down[/]"
        console.print(
            f"[bold]{service:9}[/] {state}; log {escape(str(found.log(service)))}", highlight=False, soft_wrap=True
        )
    count = sum(path.is_file() for path in found.filestore.glob("*"))
    age = age_text(datetime.datetime.fromisoformat(found.since))
    facts = [
        ("cloud", f"{found.name} and {found.admin_name} in {found.clouds_file}"),
        ("made", f"{age} ago in {found.folder}, {count} images, {size_text(found.disk())}"),
    ]
    for name, value in facts:
        console.print(f"[bold]{name:9}[/] {escape(value)}", highlight=False, soft_wrap=True)
    read_here = clouds_yaml.user_file()
    if read_here.resolve() != found.clouds_file.resolve():
        remedy = f"here {read_here} is read in its place: export OS_CLIENT_CONFIG_FILE={found.clouds_file}"
        console.print(f"[yellow]{escape(remedy)}[/]", highlight=False, soft_wrap=True)
