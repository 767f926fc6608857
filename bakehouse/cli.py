"""What the tasks print: tables, summaries, JSON. The doing is in the other modules."""

from __future__ import annotations

import dataclasses
import datetime
import os
import subprocess
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bakehouse import (
    REPOSITORY,
    bench,
    bench_boot,
    bench_preload,
    bench_publish,
    build,
    cli_cloud,
    cli_nodes,
    host,
    kubernetes,
    manifest,
    packer_bake,
    run,
    sudo,
)
from bakehouse import plan as plans
from bakehouse import settings as site
from bakehouse.cache import SERVICES, BaseRoot
from bakehouse.errors import BakehouseError
from bakehouse.plan import Plan
from bakehouse.record import Record
from bakehouse.store import LocalStore
from bakehouse.terminal import GIB, age_text, console, errors, open_site, parse_size, print_json, say, size_text

MOST_WORKERS = 4
"""Tests with real machines at a time: each may take 4 GiB of memory."""


@dataclasses.dataclass(frozen=True)
class Builder:
    """Who makes the root filesystem: a flag of tasks."""

    name: str = "dib"
    """dib or packer."""
    base: str = ""
    checksum: str = ""
    """What Packer boots, see packer_bake.planned()."""
    server: plans.Server | None = None
    """Where Packer works in a cloud."""


BUILDERS = ("dib", "packer")


def server(
    cloud: str, flavor: str, network: str, volume_size: int, floating_network: str, security_group: str
) -> plans.Server | None:
    """Return the server that flags describe; None where they name no cloud."""
    if not cloud:
        if flavor or network or volume_size or floating_network:
            raise BakehouseError("--flavor, --network, --volume-size and --floating-network are for --in-cloud")
        return None
    if not flavor:
        raise BakehouseError("--in-cloud needs --flavor", hint="`openstack flavor list` shows them")
    if volume_size < 0:
        raise BakehouseError(f"--volume-size {volume_size}: it is in GiB, or 0 for the flavor's own disk")
    return plans.Server(cloud, flavor, network, volume_size, floating_network, security_group)


def _make_plan(
    name: str, settings: site.Settings, store: LocalStore, release: str, formats: str, builder: Builder
) -> Plan:
    if builder.name not in BUILDERS:
        raise BakehouseError(f"--builder {builder.name} is none", hint=f"it is {' or '.join(BUILDERS)}")
    if builder.name != "packer" and (builder.base or builder.checksum or builder.server):
        raise BakehouseError(
            "--base, --base-checksum and --in-cloud are for --builder packer", hint="diskimage-builder takes none"
        )
    chosen = tuple(part.strip() for part in formats.split(",") if part.strip())
    wanted = plans.make(name, settings, release=release or None, formats=chosen)
    if builder.name == "packer":
        wanted = packer_bake.planned(
            wanted, settings, store, base=builder.base, checksum=builder.checksum, server=builder.server
        )
    return wanted


def doctor(*, as_json: bool) -> None:
    """Check the host and print a table."""
    settings = site.load()
    rows = []
    table = Table("", "Check", "Found", "What to do", box=None, pad_edge=False)
    marks = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "failed": "[bold red]failed[/]"}
    with console.status("looking at this host") if not as_json else errors.status(""):
        for check in host.examine(settings):
            rows.append(check)
            table.add_row(marks[check.state], check.subject, escape(check.finding), escape(check.remedy))
    if as_json:
        print_json([dataclasses.asdict(check) for check in rows])
    else:
        console.print(table)
    failed = [check.subject for check in rows if check.state == "failed"]
    if failed:
        raise BakehouseError(f"this host cannot bake yet: {', '.join(failed)}", hint="the table's last column says how")


def bake(
    name: str,
    *,
    release: str,
    formats: str,
    builder: Builder,
    refresh: bool,
    force: bool,
    verbose: bool,
    wait: bool,
    verify: bool,
    upload: cli_cloud.Target | None,
    as_json: bool,
) -> None:
    """Bake an image, verify it, publish it where that is wanted, and print a summary."""
    settings, store, cache = open_site()
    if upload:
        # A wrong name or credential is said before the bake, not after it.
        upload.connect(settings).connection.close()
    _warn_of_damage(store)
    wanted = _make_plan(name, settings, store, release, formats, builder)
    progress = errors if as_json else console
    found, built = build.bake(
        wanted,
        store,
        cache,
        progress,
        refresh=refresh,
        force=force,
        wait=wait,
        verbose=verbose,
        in_memory=settings.build_in_memory == "auto",
    )
    if not built:
        progress.print(
            f"{found.name} {found.tag} is up to date: nothing that goes into it has changed. (--force builds)"
        )
    if verify and found.verification is None and cli_nodes.can_verify(found):
        found = _verified(found, settings, store, progress, verbose=verbose)
    failed = found.verification is not None and found.verification.result == "failed"
    if built and not as_json:
        _print_summary(found, store)
    if as_json and (failed or not upload):
        print_json(found.model_dump(mode="json") | {"built": built})
    if failed:
        raise cli_nodes.failure(found, store)
    if upload:
        with upload.connect(settings) as cloud:
            cli_cloud.published(found, settings, store, cloud, as_json=as_json)
    elif not as_json:
        _print_next(found)


def _verified(found: Record, settings: site.Settings, store: LocalStore, progress: Console, *, verbose: bool) -> Record:
    try:
        return cli_nodes.verified(found, settings, store, progress, verbose=verbose)
    except BakehouseError as error:
        raise BakehouseError(
            f"{found.tag} is baked, but it could not be verified here: {error.message}",
            hint=f"{error.hint or '`invoke doctor` checks this host'}; --no-verify leaves it out",
            log=error.log,
        ) from error


def _print_summary(found: Record, store: LocalStore) -> None:
    table = Table("Stage", "Seconds", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for step in found.steps:
        table.add_row(step.name, f"{step.seconds:.1f}" + (" (cached)" if step.cached else ""))
    table.add_row("[bold]all[/]", f"[bold]{found.seconds:.1f}[/]")
    console.print()
    console.print(table)
    console.print()
    _print_facts(found, store)


def _print_facts(found: Record, store: LocalStore) -> None:
    folder = store.folder(found.tag)
    facts = [
        ("image", f"{found.name} {found.tag}"),
        *(
            (
                file.format,
                f"{folder / file.file}  ({size_text(file.size)}, the guest sees {size_text(file.virtual_size)})",
            )
            for file in found.files
        ),
        (
            "root",
            f"{size_text(found.root_used)} used of {size_text(found.root_size)}, grows to the node's disk at boot",
        ),
        ("boots", f"{' and '.join(found.firmware).upper()}, kernel {found.kernel}"),
        ("packages", f"{found.package_count}: {folder / found.sbom}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in found.versions.items() if name != "kernel")),
        ("took", f"{size_text(found.usage.peak_memory)} of memory, {size_text(found.usage.disk)} of disk at the most"),
        ("log", str(folder / "build.log")),
        ("verified", cli_nodes.verdict(found)),
    ]
    for name, value in facts:
        console.print(f"[bold]{name:9}[/] {escape(value)}", highlight=False, soft_wrap=True)


def _print_next(found: Record) -> None:
    console.print(f"\nNext: [bold]invoke boot {found.tag}[/]  or  [bold]invoke images[/]", highlight=False)


def _warn_of_damage(store: LocalStore) -> None:
    for error in store.damaged():
        errors.print(f"warning: {error}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def plan(name: str, *, release: str, formats: str, builder: Builder, as_json: bool) -> None:
    """Print a plan and what a bake of it would do."""
    settings, store, cache = open_site()
    wanted = _make_plan(name, settings, store, release, formats, builder)
    decision = plans.decide(wanted, store, cache)
    if as_json:
        would = {
            "image": decision.image.tag if decision.image else None,
            "base_cached": decision.base is not None,
            "reasons": list(decision.reasons),
        }
        print_json(wanted.as_dict() | {"decision": would})
        return
    image = wanted.manifest
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    by_element: dict[str, list[str]] = {}
    for package in wanted.packages:
        by_element.setdefault(package.element, []).append(package.name)
    own = [element.name for element in wanted.elements if not element.built_in]
    others = [element.name for element in wanted.elements if element.built_in]
    base = decision.base
    root = f"root {size_text(image.disk.root_size) if image.disk.root_size else 'auto'}"
    formats = " and ".join(image.disk.formats)
    rows = [
        ("manifest", " <- ".join(reversed(wanted.resolved.chain))),
        ("description", image.description or "-"),
        ("system", f"{image.distribution} {image.release}, {image.architecture}, {image.kernel} kernel"),
        ("snapshot", image.snapshot or "none: the mirror as it is when the base root is made"),
        ("mirrors", "\n".join(map(plans.without_credentials, wanted.mirrors))),
        ("disk", ", ".join([root, " and ".join(image.disk.firmware), f"{formats} ({image.disk.compression})"])),
        ("elements", ", ".join(own) + f"\n[dim]and of diskimage-builder: {', '.join(others)}[/]"),
        *((f"  {element}", " ".join(sorted(set(names)))) for element, names in sorted(by_element.items())),
        ("digest", wanted.digest),
        _begins_with(wanted, base),
    ]  # fmt: skip
    for key, value in rows:
        table.add_row(key, value)
    console.print(table)
    console.print()
    if decision.image:
        console.print(f"Nothing to build: {decision.image.tag} was built from just this.", highlight=False)
    else:
        console.print("[bold]A bake would build the image[/], because:", highlight=False)
        for reason in decision.reasons:
            console.print(f"  {escape(reason)}", highlight=False, soft_wrap=True)


def _begins_with(wanted: Plan, base: BaseRoot | None) -> tuple[str, str]:
    if origin := wanted.origin:
        about = origin.record.tag if origin.record else origin.checksum or "to be baked"
        return "Packer boots", f"{origin.name}: {about}"
    about = f"cached, {size_text(base.size)}, {age_text(base.created)} old" if base else "to be made"
    return "base root", f"{wanted.base_key}: {about}"


def manifests(*, as_json: bool) -> None:
    """List the manifests."""
    settings, store, _ = open_site()
    places = manifest.folders(settings.manifests)
    newest = {found.name: found for found in reversed(store.records())}
    rows: list[dict[str, Any]] = []
    table = Table("Manifest", "Platform", "System", "Newest image", "Description", box=None, pad_edge=False)
    for name, path in manifest.find_all(places).items():
        try:
            resolved = manifest.resolve(name, places)
        except BakehouseError as error:
            rows.append({"name": name, "file": str(path), "error": error.message})
            table.add_row(escape(name), "[bold red]faulty[/]", "", "", escape(error.message))
            continue
        found, image = newest.get(name), resolved.manifest
        system = f"{image.distribution} {image.release}"
        version = image.kubernetes.version if image.kubernetes else None
        rows.append({
            "name": name, "file": str(path), "platform": image.platform, "extends": list(resolved.chain[:-1]),
            "release": image.release, "kubernetes": version, "description": image.description,
            "newest": found.tag if found else None,
        })  # fmt: skip
        last = f"{found.tag}, {age_text(found.created)} old" if found else "-"
        platform = f"{image.platform} {version or ''}".strip() if image.platform else "[dim](base)[/]"
        table.add_row(name, platform, system, last, escape(image.description))
    if as_json:
        print_json(rows)
    else:
        console.print(table)


def schema() -> None:
    """Print the JSON Schema of manifests."""
    print_json(manifest.schema())


def images(*, as_json: bool) -> None:
    """List the images in the store."""
    _, store, _ = open_site()
    _warn_of_damage(store)
    found = store.records()
    if as_json:
        print_json([image.model_dump(mode="json", exclude={"inputs"}) for image in found])
        return
    if not found:
        console.print(f"No images in {store.root} yet. Bake one: [bold]invoke bake --platform slurm[/]", soft_wrap=True)
        return
    table = Table("Tag", "Manifest", "Platform", "System", "Age", "Files", "Verified", box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    for image in found:
        files = ", ".join(f"{file.format} {size_text(file.size)}" for file in image.files)
        verified = cli_nodes.verdict(image)
        system = f"{image.distribution} {image.release}"
        of_kubernetes = image.platform == "kubernetes" and "kubernetes" in image.versions
        platform = f"{image.platform} {kubernetes.version_of(image)}" if of_kubernetes else image.platform
        table.add_row(image.tag, image.name, platform, system, age_text(image.created), files, verified)
    console.print(table)
    total = sum(file.size for image in found for file in image.files)
    console.print(f"[dim]{len(found)} images, {size_text(total)}, in {store.root}[/]", highlight=False, soft_wrap=True)


def show(tag: str, *, as_json: bool) -> None:
    """Show one image."""
    _, store, _ = open_site()
    found = store.get(tag)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    _print_summary(found, store)
    more = [("digest", found.digest), ("created", f"{found.created:%Y-%m-%d %H:%M:%S} UTC"), ("commit", found.commit)]
    more += [("base", f"{found.base.key}, made {found.base.created:%Y-%m-%d %H:%M} UTC")]
    more += [(f"{file.format} sha512", file.sha512) for file in found.files]
    console.print()
    for name, value in more:
        console.print(f"[bold]{name:9}[/] {escape(value)}", highlight=False, soft_wrap=True)


def remove(tag: str, *, dry_run: bool) -> None:
    """Remove an image."""
    _, store, _ = open_site()
    found = store.get(tag)
    if not found.tag.startswith(tag):
        raise BakehouseError(
            f"'{tag}' is a manifest's name; to remove an image, name its tag", hint=f"its newest image is {found.tag}"
        )
    if dry_run:
        say(f"would remove {found.name} {found.tag}: {store.folder(found.tag)}")
        return
    freed = store.remove(found)
    console.print(f"removed {found.name} {found.tag}, {size_text(freed)}", highlight=False)


def cache(*, as_json: bool) -> None:
    """Show the cache."""
    settings, _, held = open_site()
    entries = held.entries()
    if as_json:
        print_json([dataclasses.asdict(entry) for entry in entries])
        return
    table = Table("What", "Name", "Size", "Last used", box=None, pad_edge=False)
    table.columns[2].justify = "right"
    for entry in entries:
        table.add_row(entry.kind, entry.name, size_text(entry.size), f"{age_text(entry.used)} ago")
    console.print(table)
    total = sum(entry.size for entry in entries)
    limit = f"limit {settings.cache_limit_gib:g} GiB"
    console.print(f"[dim]{size_text(total)} in {held.root} ({limit})[/]", highlight=False, soft_wrap=True)


def prune(*, limit: str, everything: bool, dry_run: bool) -> None:
    """Shrink the cache."""
    settings, _, held = open_site()
    size = parse_size(limit, "--limit") if limit else int(settings.cache_limit_gib * GIB)
    removed = held.prune(0 if everything else size, datetime.datetime.now(datetime.UTC), dry_run=dry_run)
    freed = sum(entry.size for entry in removed)
    bases = [entry.name for entry in removed if entry.kind == "base root"]
    services = sum(entry.kind == SERVICES for entry in removed)
    packages = len(removed) - len(bases) - services
    verb = "would remove" if dry_run else "removed"
    console.print(f"{verb} {len(bases)} base roots and {packages} packages, {size_text(freed)}", highlight=False)
    if services:
        console.print("  and the services of the local OpenStack; `invoke openstack.up` installs them anew")
    for name in bases:
        console.print(f"  {name}", highlight=False)


def bench_bake(name: str, *, rounds: int, as_json: bool) -> None:
    """Measure a bake and print ratios."""
    _check_rounds(rounds)
    settings = site.load()
    with run.ending_on_sigterm():
        _print_result(bench.bake(name, settings, rounds, errors), as_json=as_json)


def bench_boot_to_joined(platform: str, *, rounds: int, as_json: bool) -> None:
    """Measure boots and print ratios."""
    _check_rounds(rounds)
    settings = site.load()
    sudo.must_be_root(settings)
    with run.ending_on_sigterm():
        _print_result(bench_boot.boot(settings, rounds, errors, platform), as_json=as_json)


def bench_preloading(platform: str, *, rounds: int, as_json: bool) -> None:
    """Measure a node's first pod with images loaded and pulled, and print ratios."""
    _check_rounds(rounds)
    settings = site.load()
    sudo.must_be_root(settings)
    with run.ending_on_sigterm():
        _print_result(bench_preload.preload(settings, rounds, errors, platform), as_json=as_json)


def bench_publishing(*, rounds: int, size: str, as_json: bool) -> None:
    """Measure publishing and print ratios."""
    _check_rounds(rounds)
    settings = site.load()
    with run.ending_on_sigterm():
        _print_result(bench_publish.publish(settings, rounds, parse_size(size, "--size"), errors), as_json=as_json)


def _check_rounds(rounds: int) -> None:
    if rounds < 1:
        raise BakehouseError(f"--rounds {rounds}: it is 1 or more")


def _print_result(result: bench.Result, *, as_json: bool) -> None:
    if as_json:
        print_json(dataclasses.asdict(result))
        return
    table = Table("Measure", "Value", "Ratio", "Goal", "", box=None, pad_edge=False)
    for row in result.rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        met = {True: "[green]met[/]", False: "[bold red]missed[/]", None: ""}[row.met]
        table.add_row(row.name, row.value, ratio, row.goal, met)
    console.print(table)
    console.print(f"[dim]{escape(result.machine)}[/]", highlight=False, soft_wrap=True)


def show_settings() -> None:
    """Print the settings."""
    print(site.dump(site.load()), end="")


def test(*, fast: bool, long: bool, only: str) -> None:
    """Run the tests."""
    if fast and long:
        raise BakehouseError("--fast and --long are two tiers: give one of them")
    os.chdir(REPOSITORY)
    cores = os.cpu_count() or 1
    # Twice as many as cores: half of the tests wait for a process most of the time.
    quick = ["-n", str(2 * cores), "-m", "not slow and not long"]
    # Without KVM each machine takes a core. Tests of a file share what they bake; tests/conftest.py orders the files.
    each_file_at_once = ["--dist", "loadfile", "--no-loadscope-reorder"]
    real = ["-n", str(min(cores, MOST_WORKERS)), *each_file_at_once, "-m", "slow and not long"]
    fastest = [*quick[:2], "-m", "not slow and not long and not lasting"]
    runs = [["-m", "long"]] if long else [fastest] if fast else [quick, real]
    selected = ["-k", only] if only else []
    # Exit status 5: no test was selected.
    failed = [
        status
        for options in runs
        if (status := subprocess.run([sys.executable, "-m", "pytest", *options, *selected], check=False).returncode)
        not in ({0, 5} if only else {0})
    ]
    if failed:
        raise SystemExit(failed[0])
