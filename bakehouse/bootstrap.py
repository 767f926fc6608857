"""The bootstrap path from outside: what plain nodes are told and served, and how one is made a platform's over SSH."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bakehouse import definition, userdata
from bakehouse.errors import BakehouseError
from bakehouse.network import FOLDER, GATEWAY, Network
from bakehouse.plan import Plan

UNIT = "bakehouse-bootstrap.service"

WEB = FOLDER / "web"
WEB_PORT = 8080
BUNDLE = "bundle.tar.gz"


def serve(network: Network) -> None:
    """Run the web server of a private network, as long as that is there."""
    network.path(WEB).mkdir(parents=True, exist_ok=True)
    where = ["--bind", str(GATEWAY), "--directory", str(WEB)]
    network.start([sys.executable, "-m", "http.server", *where, str(WEB_PORT)], FOLDER / "web.log")


def offer(network: Network, content: bytes) -> userdata.Bundle:
    """Put a bundle where the web server of a network serves it, in place of another. Return how nodes name it."""
    target = network.path(WEB / BUNDLE)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    return userdata.Bundle(f"http://{GATEWAY}:{WEB_PORT}/{BUNDLE}", hashlib.sha256(content).hexdigest())


def user_data(join: userdata.Join, proxy: str) -> str:
    """Return user-data of a node that has a package mirror of its own.

    Args:
        join: how it joins.
        proxy: of its package mirror.
    """
    return userdata.with_part({"apt": {"http_proxy": proxy}}, userdata.render(join))


def files_of(join: userdata.Join, proxy: str) -> dict[str, tuple[str, int]]:
    """Return what cloud-init would write on a node, for one without cloud-init: a container of its root.

    Args:
        join: how it joins.
        proxy: of its package mirror.

    Returns:
        Texts and modes by path. With a bundle there is one more that starts the bootstrap, as cloud-init would.
    """
    files = userdata.files(join)
    files["/etc/apt/apt.conf.d/90proxy"] = (f'Acquire::http::Proxy "{proxy}";\n', 0o644)
    if join.bundle:
        files["/etc/systemd/system/multi-user.target.d/bootstrap.conf"] = (f"[Unit]\nWants={UNIT}\n", 0o644)
    return files


def push(plan: Plan, host: str, *, ssh_config: Path | None = None) -> None:
    """Make a running node of the base one of the plan's platform. What Ansible says goes to the terminal.

    A node that is so already is not changed.

    Args:
        plan: the plan of a platform's image.
        host: the node, as ssh takes it: [USER@]HOST. Another user than root needs sudo without a password.
        ssh_config: an ssh_config(5) in place of the user's own.

    Raises:
        BakehouseError: a step failed, or the node cannot be reached.
    """
    user, _, name = host.rpartition("@")
    with tempfile.TemporaryDirectory(prefix="bakehouse-push-") as temporary:
        folder = Path(temporary) / "bundle"
        definition.write_play(plan, folder)
        command: list[str | Path] = [
            Path(sys.executable).with_name("ansible-playbook"), f"--inventory={name},",
            *([f"--user={user}"] if user else []),
            *([f"--ssh-common-args=-F {ssh_config}"] if ssh_config else []),
            "site.yml",
        ]  # fmt: skip
        # Ansible wants a locale with UTF-8.
        environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        status = subprocess.run(command, cwd=folder, env=environment, check=False).returncode
    if status != 0:
        raise BakehouseError(
            f"{host} is not a node of {plan.name}: Ansible ended with status {status}",
            hint="its last lines say why; run it again when that is mended: what was done is not done twice",
        )
