"""What the tasks about container images and the registry on this host print."""

from __future__ import annotations

from rich.markup import escape

from bakehouse import container_image, container_push, local_registry
from bakehouse import settings as site
from bakehouse.cache import BaseCache
from bakehouse.container_image import ContainerImage, Shelf
from bakehouse.local_registry import LocalRegistry
from bakehouse.terminal import console, errors, print_json, say, size_text


def build(platform: str, *, refresh: bool, verbose: bool, as_json: bool) -> None:
    """Build the container image of a platform."""
    settings = site.load()
    shelf = Shelf(BaseCache(settings.cache))
    wanted = container_image.order(platform, settings)
    progress = errors if as_json else console
    with container_image.opened(shelf, progress):
        made, new = container_image.make(wanted, shelf, progress, refresh=refresh, verbose=verbose)
    if as_json:
        print_json({**_facts(made), "built": new})
        return
    say(f"{made.name}:{made.tag}  {len(made.packages)} packages{'' if new else '  (there already: nothing changed)'}")
    console.print(f"\nNext: [bold]invoke container.push --platform {made.name}[/]", highlight=False)


def push(platform: str, *, address: str, insecure: bool, verbose: bool, as_json: bool) -> None:
    """Push the container image of a platform, built where it is not there."""
    settings = site.load()
    to = container_push.target(settings, address, insecure=insecure)
    wanted = container_image.order(platform, settings)
    shelf = Shelf(BaseCache(settings.cache))
    done = container_push.push(wanted, shelf, to, errors if as_json else console, verbose=verbose)
    if as_json:
        layers = [{"digest": digest, "size": size} for digest, size in done.layers]
        print_json({
            **_facts(done.image), "registry": to.address, "insecure": to.insecure, "reference": done.reference,
            "pushed": done.new, "layers": layers,
        })  # fmt: skip
        return
    say(done.reference)
    if done.layers:
        sizes = " and ".join(size_text(size) for _, size in done.layers)
        say(f"{done.image.tag}: layers of {sizes}{'' if done.new else '; the registry had it already'}")


def _facts(image: ContainerImage) -> dict[str, object]:
    return {
        "name": image.name, "tag": image.tag, "digest": image.digest, "id": image.id, "created": image.created,
        "packages": image.packages,
    }  # fmt: skip


def registry_up(*, address: str, port: int) -> None:
    """Bring the registry of this host up, and say how to use it."""
    made = local_registry.up(address=address, port=port, say=say)
    _print(made)
    if made.host in local_registry.ANY:
        say("Everybody who reaches it can pull, and push: it asks for no password.")
    console.print("\nNext: [bold]invoke container.push --platform slurm[/]", highlight=False)


def registry_down(*, purge: bool, dry_run: bool) -> None:
    """End it."""
    if dry_run:
        there = local_registry.find()
        verb = "remove" if purge else "stop"
        say(f"would {verb} the registry in {there.folder}" if there else "there is no registry here")
        return
    found = local_registry.down(purge=purge, say=say)
    say(f"removed {found.folder}" if purge else f"stopped; its images stay in {found.folder} (--purge removes them)")


def registry_status(*, as_json: bool) -> None:
    """Say whether it runs and where."""
    found = local_registry.find()
    if as_json:
        print_json(_registry_facts(found) if found else None)
    elif found is None:
        console.print("No registry here. [bold]invoke registry.up[/] makes one.", highlight=False)
    else:
        _print(found)


def _registry_facts(found: LocalRegistry) -> dict[str, object]:
    process = found.process()
    return {
        "running": process is not None, "process": process.pid if process else None, "address": found.address,
        "listens": found.host, "folder": str(found.folder), "repositories": found.repositories(), "disk": found.disk(),
    }  # fmt: skip


def _print(found: LocalRegistry) -> None:
    process = found.process()
    state = f"[green]runs[/] at {found.address}, process {process.pid}" if process else "[bold red]is down[/]"
    facts = {
        "registry": f"{state}; log {escape(str(found.daemon.said))}",
        "holds": escape(f"{', '.join(found.repositories()) or 'nothing'}, {size_text(found.disk())} in {found.folder}"),
    }
    for name, value in facts.items():
        console.print(f"[bold]{name:9}[/] {value}", highlight=False, soft_wrap=True)
