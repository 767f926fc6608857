"""What the tasks of the bootstrap path print."""

from __future__ import annotations

import hashlib
from pathlib import Path

from bakehouse import bootstrap, definition, plan
from bakehouse import settings as site
from bakehouse.errors import BakehouseError
from bakehouse.terminal import existing_file, print_json, say, size_text


def bundle(platform: str, output: str, *, as_json: bool) -> None:
    """Write the bundle that makes plain nodes those of a platform.

    Args:
        platform: the manifest's name.
        output: the file; by default it is named after the definition, in the current folder.
        as_json: print JSON.

    Raises:
        BakehouseError: it cannot be made or written.
    """
    wanted = plan.make(platform, site.load())
    target = Path(output or definition.bundle_name(wanted))
    try:
        made = definition.write_bundle(wanted, target)
    except OSError as error:
        raise BakehouseError(f"{target} cannot be written: {error.strerror}") from error
    content = target.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    if as_json:
        print_json({
            "file": str(target), "bytes": len(content), "sha256": sha256, "name": made.name, "base": made.base,
            "digest": made.digest, "packages": list(made.packages),
        })  # fmt: skip
        return
    say(f"{target}  {size_text(len(content))}  sha256 {sha256}")
    say(f"It makes a node of '{made.base}' one of '{made.name}': {len(made.packages)} packages and what they need.")
    say(f"User-data: invoke userdata --path bootstrap --bundle {target} --bundle-url https://.../{target.name} ...")


def push(platform: str, host: str, *, ssh_config: str) -> None:
    """Make a running plain node one of a platform, over SSH."""
    config = existing_file("--ssh-config", ssh_config) if ssh_config else None
    bootstrap.push(plan.make(platform, site.load()), host, ssh_config=config)
    say(f"{host} is a node of {platform}. It joins when /etc/bakehouse/join.yaml is there: bakehouse-agent status")
