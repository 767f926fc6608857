"""What the tasks about images of the store print: differences, signatures. The doing is in the other modules."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from bakehouse import sbom, signature
from bakehouse.errors import BakehouseError
from bakehouse.record import Record
from bakehouse.sbom import Change
from bakehouse.terminal import console, open_site, print_json, say, size_text

LEAST_SHOWN = 1 << 19
"""Bytes: what takes less is put together."""

COLOURS = {"added": "green", "removed": "red", "upgraded": "cyan", "downgraded": "bold yellow", "moved": "yellow"}


def diff(old: str, new: str, *, by_size: bool, as_json: bool) -> None:
    """Print which packages changed between two images, or which parts made one larger than the other."""
    _, store, _ = open_site()
    before, after = store.get(old), store.get(new)
    bills = [store.bill(record) for record in (before, after)]
    if by_size:
        _print_sizes(before, after, sbom.sizes(*bills), as_json=as_json)
        return
    changes = sbom.difference(*bills)
    if as_json:
        print_json({"old": before.tag, "new": after.tag, "changes": [dataclasses.asdict(one) for one in changes]})
        return
    console.print(f"{before.name} {before.tag} -> {after.name} {after.tag}", highlight=False)
    _print_versions(before, after)
    if not changes:
        console.print(f"The same {len(bills[1])} packages in the same versions.", highlight=False)
        return
    console.print()
    table = Table("Package", "", before.tag, after.tag, "Origin", "Source", box=None, pad_edge=False)
    for change in changes:
        table.add_row(*_cells(change))
    console.print(table)
    counts = Counter(change.kind for change in changes)
    total = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    console.print(f"[dim]{total}, {len(bills[1])} packages now[/]", highlight=False)


def _print_sizes(before: Record, after: Record, grown: dict[str, int], *, as_json: bool) -> None:
    files = {record.tag: record.files[0].size for record in (before, after)}
    roots = {record.tag: record.root_used for record in (before, after)}
    if as_json:
        print_json({"old": before.tag, "new": after.tag, "files": files, "roots": roots, "grown": grown})
        return
    console.print(f"{before.name} {before.tag} -> {after.name} {after.tag}", highlight=False)
    for what, sizes in (("root", roots), ("file", files)):
        one, other = sizes[before.tag], sizes[after.tag]
        console.print(
            f"[bold]{what}[/] {size_text(one)} -> {size_text(other)}, {other / one:.2f} times", highlight=False
        )
    table = Table("Source package", "MiB in the root", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    large = {name: size for name, size in grown.items() if abs(size) >= LEAST_SHOWN}
    for name, size in large.items():
        table.add_row(escape(name), f"{size / (1 << 20):+.1f}")
    table.add_row("[dim]all others[/]", f"[dim]{(sum(grown.values()) - sum(large.values())) / (1 << 20):+.1f}[/]")
    console.print()
    console.print(table)


def _print_versions(before: Record, after: Record) -> None:
    for name in sorted(before.versions.keys() | after.versions.keys()):
        versions = before.versions.get(name, "-"), after.versions.get(name, "-")
        if versions[0] != versions[1]:
            console.print(f"[bold]{name}[/] {versions[0]} -> {versions[1]}", highlight=False)


def _cells(change: Change) -> list[str]:
    one = change.after or change.before
    assert one is not None
    versions = [package.version if package else "-" for package in (change.before, change.after)]
    origins = [package.origin for package in (change.before, change.after) if package and package.origin]
    origin = " -> ".join(dict.fromkeys(origins)) or "-"
    source = one.source if one.source != one.name else ""
    mark = f"[{COLOURS[change.kind]}]{change.kind}[/]"
    return [change.name, mark, *map(escape, versions), escape(origin), escape(source)]


def sign(tag: str, *, dry_run: bool) -> None:
    """Sign an image of the store."""
    settings, store, _ = open_site()
    record = store.get(tag)
    if settings.signing_key is None:
        raise BakehouseError(
            "this site has no signing key",
            hint="`invoke sign.key PATH` makes one; name it as 'signing_key' in bakehouse.yaml",
        )
    folder = store.folder(record.tag)
    statement = signature.statement_of(record, record.files[0].format, folder)
    made = signature.sign(statement, signature.load_private_key(settings.signing_key))
    path = folder / signature.FILE_NAME if dry_run else signature.write_envelope(folder, statement, made)
    verb = "would sign" if dry_run else "signed"
    say(f"{verb} {record.name} {record.tag} with key {made.keyid[:16]}: {path}")


def check(tag: str) -> None:
    """Check the signature of an image of the store, and all that it covers."""
    settings, store, _ = open_site()
    record = store.get(tag)
    trusted = signature.load_trusted(settings.trusted_keys)
    made = signature.check_local(record, store.folder(record.tag), trusted)
    say(f"{record.name} {record.tag} is as it was signed by key {made.keyid[:16]}: image file, record and SBOM")


def make_key(path: str) -> None:
    """Make a signing key."""
    target = Path(path).expanduser()
    keyid = signature.generate(target)
    public = signature.public_path(target)
    say(f"made key {keyid[:16]}: {target} (keep it secret) and {public}")
    say(f"\nIn bakehouse.yaml:\n  signing_key: {target}\n  trusted_keys: [{public}]")
