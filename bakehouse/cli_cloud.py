"""What the tasks about clouds print: publish, channels, retention, pins, lists. The doing is in the other modules."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections import Counter
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from bakehouse import (
    channel,
    compute,
    inventory,
    pin,
    rehearsal,
    retention,
    signature,
    site_publish,
    upload,
)
from bakehouse import publish as publication
from bakehouse import settings as site
from bakehouse.cloud import Cloud, CloudError, connect
from bakehouse.errors import BakehouseError
from bakehouse.glance import Glance
from bakehouse.pin import Pin
from bakehouse.progress import Progress
from bakehouse.published import Catalogue, Published
from bakehouse.record import ImageFile, Record
from bakehouse.settings import Settings
from bakehouse.store import LocalStore
from bakehouse.terminal import age_text, console, errors, open_site, print_json, say, size_text

NOVA_SECONDS = 10
"""How long a list of images waits for a Nova that is away."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A cloud as flags name it."""

    cloud: str
    region: str

    def connect(self, settings: Settings) -> Cloud:
        """Connect to it."""
        return _connect(settings, self.cloud, self.region)


def target(cloud: str, region: str, *, upload: bool) -> Target | None:
    """Return where a bake is published to; None where it is not.

    Raises:
        BakehouseError: a cloud is named, and nothing shall be published.
    """
    if not upload and (cloud or region):
        flag = "--cloud" if cloud else "--region"
        raise BakehouseError(f"{flag} without --upload", hint="--upload publishes the image there when it is baked")
    return Target(cloud, region) if upload else None


def _connect(settings: Settings, cloud: str, region: str) -> Cloud:
    def warn(text: str) -> None:
        errors.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    return connect(cloud, region=region, default=settings.cloud, say=warn)


def _catalogue(cloud: Cloud, settings: Settings) -> Catalogue:
    return Catalogue.read(cloud, settings.image_owner)


# Publish.


def publish(
    tag: str, *, cloud: str, region: str, visibility: str, file_format: str, dry_run: bool, as_json: bool
) -> None:
    """Publish an image and print where it is."""
    settings, store, _ = open_site()
    record = store.get(tag)
    with _connect(settings, cloud, region) as connected:
        act = rehearsed if dry_run else published
        act(record, settings, store, connected, visibility=visibility, kind=file_format, as_json=as_json)


def published(
    record: Record,
    settings: Settings,
    store: LocalStore,
    cloud: Cloud,
    *,
    visibility: str = "",
    kind: str = "",
    as_json: bool = False,
) -> None:
    """Publish an image to a cloud that is connected, and print where it is."""
    progress = errors if as_json else console
    done = site_publish.publish(record, settings, store, cloud, progress, visibility=visibility, kind=kind)
    if as_json:
        facts = {"outcome": done.outcome, "changes": done.changes, "seconds": round(done.seconds, 2)}
        print_json(_row(done.image, None, None, cloud) | facts)
        return
    _print_publication(record, done, cloud)


def _print_publication(record: Record, done: publication.Done, cloud: Cloud) -> None:
    image = done.image.image
    if done.outcome == "unchanged":
        say(f"{record.name} {record.tag} is in {cloud.place} already, as it should be.")
    elif done.outcome == "updated":
        say(f"changed: {', '.join(done.changes)}")
    console.print()
    rate = f", {done.rate / (1 << 20):.0f} MiB/s" if done.seconds else ""
    facts = [
        ("image", f"{image.name}  ({size_text(image.size)}{rate})"),
        ("id", image.id),
        ("cloud", f"{cloud.place}, {image.visibility}"),
        ("sha512", f"{done.image.says('sha512')[:32]}... is what Glance has"),
        ("verified", done.image.verified),
        ("signed", done.image.says("signature_key")[:16] or "-"),
    ]
    for name, value in facts:
        console.print(f"[bold]{name:9}[/] {escape(value)}", highlight=False, soft_wrap=True)
    following = f"invoke promote {record.tag} --to candidate --cloud {cloud.name}"
    if done.image.verified == "none":
        following = f"invoke verify {record.tag}, then publish again: it is not verified yet"
    console.print(f"\nNext: [bold]{escape(following)}[/]", highlight=False, soft_wrap=True)


def rehearsed(
    record: Record,
    settings: Settings,
    store: LocalStore,
    cloud: Cloud,
    *,
    visibility: str = "",
    kind: str = "",
    as_json: bool = False,
) -> None:
    """Look as publishing does, and print what it would do."""
    file, metadata = site_publish.described(record, settings, store, kind)
    shown = site_publish.known_visibility(visibility) or settings.visibility
    plan = rehearsal.rehearse(record, file, store, cloud, metadata, visibility=shown, set_visibility=bool(visibility))
    if as_json:
        print_json({
            "name": record.name, "tag": record.tag, "cloud": cloud.name, "region": cloud.region, "size": file.size,
            "outcome": plan.outcome, "id": plan.image.id if plan.image else None, "changes": sorted(plan.changes),
            "visibility": shown, "properties": metadata.fields(), "dry_run": True,
        })  # fmt: skip
        return
    table = Table("Property", "Value", box=None, pad_edge=False)
    for key, value in metadata.fields().items():
        table.add_row(key, escape(_value_text(value)))
    console.print(table)
    console.print()
    if plan.outcome == "published":
        say(f"would upload {size_text(file.size)} to {cloud.place}, {shown}")
    elif plan.image:
        _print_rehearsal(record, file, plan, plan.image, cloud)


def _print_rehearsal(
    record: Record, file: ImageFile, plan: rehearsal.Rehearsal, image: Published, cloud: Cloud
) -> None:
    if plan.outcome == "finished":
        say(f"would finish the upload of {size_text(file.size)} to {cloud.place}: {image.id}")
        return
    say(f"{record.tag} is in {cloud.place} already: {image.id}")
    for key, value in sorted(plan.changes.items()):
        has = image.image.properties.get(key, getattr(image.image, key, None))
        say(f"would change {key}: {_value_text(has)} -> {_value_text(value)}")


def _value_text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)


def check(*, cloud: str, region: str, as_json: bool) -> None:
    """List what is in the store or in the cloud only, and what is amiss."""
    settings, store, _ = open_site()
    with _connect(settings, cloud, region) as connected:
        # Of the project that publish sends to, whosever images are chosen from.
        findings = inventory.compare(store, Catalogue.read(connected))
        place = connected.place
    if as_json:
        print_json([dataclasses.asdict(finding) for finding in findings])
    elif not findings:
        say(f"The store and {place} hold the same images.")
    else:
        table = Table("State", "Manifest", "Tag", "Id in Glance", "", box=None, pad_edge=False)
        for finding in findings:
            state = f"[bold red]{finding.state}[/]" if finding.fault else finding.state
            table.add_row(state, finding.name, finding.tag, finding.id or "-", escape(finding.detail))
        console.print(table)
    faults = [finding for finding in findings if finding.fault]
    if faults:
        raise BakehouseError(
            f"{len(faults)} images are not as they should be", hint="the last column says how to mend it"
        )


# Channels.


def promote(tag: str, *, to: str, cloud: str, region: str, force: bool, dry_run: bool, as_json: bool) -> None:
    """Move a channel to an image, and print what that changed."""
    settings = site.load()
    with _connect(settings, cloud, region) as connected:
        moved = channel.promote(
            connected,
            settings.image_owner,
            tag,
            to,
            force=force,
            dry_run=dry_run,
            check=site_publish.signature_check(settings),
        )
        _print_moved(moved, to, connected, dry_run=dry_run, as_json=as_json)


def rollback(name: str, *, of: str, cloud: str, region: str, force: bool, dry_run: bool, as_json: bool) -> None:
    """Move a channel back by one image, and print what that changed."""
    settings = site.load()
    with _connect(settings, cloud, region) as connected:
        moved = channel.rollback(
            connected,
            settings.image_owner,
            name,
            of,
            force=force,
            dry_run=dry_run,
            check=site_publish.signature_check(settings),
        )
        _print_moved(moved, of, connected, dry_run=dry_run, as_json=as_json)


def _print_moved(moved: channel.Moved, name: str, cloud: Cloud, *, dry_run: bool, as_json: bool) -> None:
    before = moved.before.tag if moved.before else None
    if as_json:
        print_json({
            "channel": name, "platform": moved.now.name, "before": before, "now": moved.now.tag, "id": moved.now.id,
            "moved": moved.moved, "hidden": [image.tag for image in moved.hidden], "dry_run": dry_run,
        })  # fmt: skip
        return
    would = "would move" if dry_run else "moved"
    if not moved.moved:
        say(f"{name} of {moved.now.name} points to {moved.now.tag} already.")
    else:
        from_text = f" from {before}" if before else ""
        console.print(
            f"{would} {name} of {moved.now.name}{from_text} to [bold]{moved.now.tag}[/] ({moved.now.id})",
            highlight=False,
        )
    for image in moved.hidden:
        verb = "would hide" if dry_run else "hid"
        say(f"{verb} {image.tag} ({image.id}); servers and pins keep it")
    after = moved.history.current
    if not dry_run and after is not None and after.id != moved.now.id:
        console.print(f"[yellow]meanwhile somebody else moved it on to {after.tag}[/]", highlight=False)
    if moved.moved and not dry_run and before:
        undo = f"invoke rollback --platform {moved.now.name} --channel {name} --cloud {cloud.name}"
        console.print(f"\nBack: [bold]{undo}[/]", highlight=False, soft_wrap=True)


def channels(*, cloud: str, region: str, platform: str, as_json: bool) -> None:
    """Print where channels point to and how they came there."""
    settings = site.load()
    with _connect(settings, cloud, region) as connected:
        catalogue = _catalogue(connected, settings)
    wanted = [(name, one) for name, one in catalogue.channels() if name == platform or not platform]
    histories = [channel.history(catalogue, name, one) for name, one in wanted]
    if as_json:
        print_json([_history_facts(past) for past in histories])
        return
    if not histories:
        console.print(
            f"No channels in {catalogue.cloud.place} yet: [bold]invoke promote TAG --to candidate[/]", highlight=False
        )
        return
    table = Table("Manifest", "Channel", "Move", "Tag", "When", "From", "By", "", box=None, pad_edge=False)
    for past in histories:
        for move in reversed(past.moves):
            points = "[green]points here[/] " if past.current else "[bold red]points here, deleted[/] "
            note = (points if move is past.moves[-1] else "") + ("[yellow]forced[/]" if move.forced else "")
            kind = move.kind if move.kind == "promote" else f"[yellow]{move.kind}[/]"
            row = [move.tag, move.at.replace("T", " ").rstrip("Z"), move.before or "-", escape(move.by), note]
            table.add_row(past.name, past.channel, f"{move.number} {kind}", *row)
    console.print(table)


def _history_facts(past: channel.History) -> dict[str, Any]:
    now, back = past.current, past.back
    return {
        "platform": past.name,
        "channel": past.channel,
        "tag": now.tag if now else None,
        "id": now.id if now else None,
        "rollback": back[0].tag if back else None,
        "moves": [dataclasses.asdict(move) for move in past.moves],
    }


# Retention.


def prune(
    *, keep: int, cloud: str, region: str, platforms: list[str], locks: list[str], yes: bool, as_json: bool
) -> None:
    """Show which images would go and why, and delete them with yes."""
    settings = site.load()
    pins = retention.pinned(Path.cwd(), [Path(name).expanduser() for name in locks])
    with _connect(settings, cloud, region) as connected:

        def plan() -> tuple[list[retention.Verdict], compute.Usage]:
            usage = compute.usage(connected)
            catalogue, steps = _catalogue(connected, settings), settings.rollback_steps
            found = retention.plan(catalogue, usage, pins, keep=keep, rollback_steps=steps, names=platforms)
            return found, usage

        verdicts, usage = plan()
        going = [verdict for verdict in verdicts if verdict.delete]
        if not as_json:
            _print_verdicts(verdicts, usage, connected)
        done = retention.delete(connected, verdicts, plan()[0]) if yes and going else []
    if as_json:
        failed = {gone.image.id: gone.error for gone in done}
        rows = [_verdict_facts(verdict) | {"error": failed.get(verdict.image.id)} for verdict in verdicts]
        print_json({"usage": {"known": usage.known, "reason": usage.reason}, "images": rows})
    elif going and not yes:
        console.print("\nNothing was deleted: [bold]--yes[/] does it.", highlight=False)
    elif yes:
        freed = sum(gone.image.image.size for gone in done if not gone.error)
        count = sum(not gone.error for gone in done)
        say(f"\ndeleted {count} images, {size_text(freed)}")
    errors_found = [gone for gone in done if gone.error]
    if errors_found:
        log = "\n".join(f"{gone.image.tag}: {gone.error}" for gone in errors_found)
        raise BakehouseError(
            f"{len(errors_found)} images could not be deleted", hint="the lines above say why", log=log
        )


def _verdict_facts(verdict: retention.Verdict) -> dict[str, Any]:
    image = verdict.image
    return {
        "platform": image.name, "tag": image.tag, "id": image.id, "size": image.image.size,
        "age_seconds": round(verdict.age.total_seconds()), "delete": verdict.delete, "why": verdict.why,
    }  # fmt: skip


def _print_verdicts(verdicts: list[retention.Verdict], usage: compute.Usage, cloud: Cloud) -> None:
    if not verdicts:
        say(f"No images of ours in {cloud.place}.")
        return
    table = Table("", "Manifest", "Tag", "Age", "Size", "Why", box=None, pad_edge=False)
    table.columns[4].justify = "right"
    for verdict in verdicts:
        mark = "[bold red]delete[/]" if verdict.delete else "[green]keep[/]"
        image = verdict.image
        size = size_text(image.image.size)
        table.add_row(mark, image.name, image.tag, _age(verdict.age), size, escape(verdict.why))
    console.print(table)
    going = [verdict for verdict in verdicts if verdict.delete]
    size = size_text(sum(verdict.image.image.size for verdict in going))
    say(f"{len(going)} of {len(verdicts)} images would go, {size}")
    if usage.reason:
        scope = "what servers use is not known" if not usage.known else "not all is known of what servers use"
        console.print(f"[yellow]{scope}: {escape(usage.reason)}[/]", highlight=False, soft_wrap=True)


def _age(age: datetime.timedelta) -> str:
    return age_text(datetime.datetime.now(datetime.UTC) - age)


# Choosing.


def resolve(platform: str, *, of: str, tag: str, cloud: str, region: str, form: str) -> None:
    """Print one image, for a deploy config."""
    settings = site.load()
    channel.check_name(of)
    with _connect(settings, cloud, region) as connected:
        catalogue = _catalogue(connected, settings)
        found = pin.choose(catalogue, platform, channel_name=of, tag=tag)
        print(pin.render(pin.pin_of(catalogue, found, "" if tag else of), form))


def pin_image(
    *,
    platform: str,
    of: str,
    tag: str,
    cloud: str,
    region: str,
    file: str,
    check_only: bool,
    allow_behind: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write an image into a lock file, or check the images in it."""
    settings = site.load()
    path = Path(file or pin.FILE_NAME)
    if check_only:
        _check_pins(path, settings, cloud, region, platform, allow_behind=allow_behind, as_json=as_json)
        return
    if not platform:
        raise BakehouseError("which image? --platform is missing", hint="invoke pin --platform slurm --channel stable")
    channel.check_name(of)
    with _connect(settings, cloud, region) as connected:
        catalogue = _catalogue(connected, settings)
        found = pin.choose(catalogue, platform, channel_name=of, tag=tag)
        entry = pin.pin_of(catalogue, found, "" if tag else of)
    before, changed = pin.write(path, entry, dry_run=dry_run)
    if as_json:
        facts = {"file": str(path), "changed": changed, "before": before.tag if before else None, "dry_run": dry_run}
        print_json(facts | entry.model_dump())
        return
    was = f", in place of {before.tag}" if before and before.tag != entry.tag else ""
    done = ("would pin" if dry_run else "pinned") if changed else "has been pinned before:"
    console.print(
        f"{done} {entry.platform} {entry.tag} ({entry.id}) in {escape(str(path))}{was}", highlight=False, soft_wrap=True
    )


def _check_pins(
    path: Path, settings: Settings, cloud: str, region: str, platform: str, *, allow_behind: bool, as_json: bool
) -> None:
    entries = [entry for entry in pin.read(path).images if entry.platform == platform or not platform]
    if not entries:
        raise BakehouseError(f"{path} pins no image{f' of {platform}' if platform else ''}")
    found: list[pin.Checked] = []
    catalogues: dict[tuple[str, str], Catalogue] = {}
    with contextlib.ExitStack() as opened:
        for entry in entries:
            key = (cloud or entry.cloud, region or entry.region)
            if key not in catalogues:
                catalogues[key] = _catalogue(opened.enter_context(_connect(settings, *key)), settings)
            found.append(pin.check(entry, catalogues[key]))
    if as_json:
        print_json([{"state": one.state, "detail": one.detail, **one.pin.model_dump()} for one in found])
    else:
        _print_pins(found)
    good = {"ok", "behind"} if allow_behind else {"ok"}
    bad = [one for one in found if one.state not in good]
    if bad:
        names = ", ".join(f"{one.pin.platform} is {one.state}" for one in bad)
        raise BakehouseError(f"{path}: {names}", hint=_how_to_renew(bad[0].pin))


def _how_to_renew(entry: Pin) -> str:
    where = f"--channel {entry.channel}" if entry.channel else "--tag TAG"
    return f"`invoke pin --platform {entry.platform} {where} --cloud {entry.cloud}` pins anew"


def _print_pins(found: list[pin.Checked]) -> None:
    table = Table("", "Manifest", "Tag", "Channel", "Cloud", "", box=None, pad_edge=False)
    colours = {"ok": "green", "behind": "yellow"}
    for one in found:
        mark = f"[{colours.get(one.state, 'bold red')}]{one.state}[/]"
        entry = one.pin
        table.add_row(mark, entry.platform, entry.tag, entry.channel or "-", entry.cloud, escape(one.detail))
    console.print(table)


# Lists.


def _row(
    image: Published, channels_of: dict[str, list[str]] | None, usage: compute.Usage | None, cloud: Cloud
) -> dict[str, Any]:
    return {
        "platform": image.says("platform"),
        "name": image.name,
        "tag": image.tag,
        "channels": (channels_of or {}).get(image.id, []),
        "id": image.id,
        "image_name": image.image.name,
        "state": "unfinished" if image.incoming else image.image.status,
        "hidden": image.image.hidden,
        "visibility": image.image.visibility,
        "created": image.image.created.isoformat(),
        "age_seconds": round((cloud.clock - image.image.created).total_seconds()),
        "size": image.image.size,
        "verified": image.verified,
        "signed": bool(image.signature),
        "servers": usage.servers[image.id] if usage and usage.known else None,
        "sha512": image.says("sha512"),
        "cloud": cloud.name,
        "region": cloud.region,
    }


def images(*, cloud: str, region: str, as_json: bool) -> None:
    """List the images in a cloud."""
    settings = site.load()
    with _connect(settings, cloud, region) as connected:
        catalogue = _catalogue(connected, settings)
        try:
            with connected.hurried(NOVA_SECONDS):
                usage = compute.usage(connected)
        except CloudError as error:
            usage = compute.Usage("", f"Nova does not answer ({error.message})", Counter())
    pointed = channel.pointed_to(catalogue)
    if as_json:
        print_json([_row(image, pointed, usage, connected) for image in catalogue.images])
        return
    if not catalogue.images:
        console.print(f"No images of ours in {connected.place} yet: [bold]invoke publish TAG[/]", highlight=False)
        return
    titles = ["Tag", "Manifest", "Platform", "Channel", "Age", "Size", "Verified", "Servers", "State"]
    table = Table(*titles, box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    table.columns[5].justify = table.columns[7].justify = "right"
    colours = {"passed": "green", "failed": "bold red", "none": "yellow"}
    for image in catalogue.images:
        state = "[bold red]unfinished[/]" if image.incoming else image.image.status
        signed = ", signed" if image.signature else ""
        table.add_row(
            image.tag,
            image.name,
            image.says("platform"),
            f"[bold]{', '.join(pointed.get(image.id, [])) or '-'}[/]",
            _age(max(connected.clock - image.image.created, datetime.timedelta(0))),
            size_text(image.image.size),
            f"[{colours.get(image.verified, '')}]{image.verified}[/]{signed}",
            usage.text(image.id),
            state + (", hidden" if image.image.hidden else ""),
            style="dim" if image.image.hidden else "",
        )
    console.print(table)
    total = sum(image.image.size for image in catalogue.images)
    note = f"{len(catalogue.images)} images, {size_text(total)}, in {connected.place}"
    console.print(
        f"[dim]{note}{f'; {escape(usage.reason)}' if usage.reason else ''}[/]", highlight=False, soft_wrap=True
    )


def verify(tag: str, *, cloud: str, region: str, as_json: bool) -> None:
    """Download an image and check that it is what was baked."""
    settings, store, _ = open_site()
    with _connect(settings, cloud, region) as connected:
        image = _catalogue(connected, settings).get(tag)
        progress_console = errors if as_json else console
        records = [record for record in store.records() if (record.name, record.tag) == (image.name, image.tag)]
        with (
            Progress(
                f"Checking {image.name} {image.tag} in {connected.place}", ["download"], progress_console
            ) as shown,
            shown.stage("download"),
        ):
            meter = upload.Meter(image.image.size, shown.line, shown.note)
            against = inventory.verify(image, records[0] if records else None, Glance(connected), meter.tell)
    signed = _check_signature(image, settings)
    if as_json:
        print_json(
            {"tag": image.tag, "id": image.id, "sha512": image.says("sha512"), "compared": against, "signed": signed}
        )
        return
    say(f"{image.tag} is what was baked: its SHA-512 is that of {', '.join(against)}.")
    say(f"signature: {signed}")


def _check_signature(image: Published, settings: Settings) -> str:
    if image.signature is None:
        site_publish.signature_check(settings)(image)
        return "none"
    if not settings.trusted_keys:
        return f"by key {image.signature.keyid[:16]}, not checked: 'trusted_keys' is not set"
    signature.verify(image.statement, image.signature, signature.load_trusted(settings.trusted_keys))
    return f"good, by key {image.signature.keyid[:16]}"
