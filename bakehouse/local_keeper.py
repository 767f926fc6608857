"""What keeps a launch on this host: the cluster, what its nodes are made of, and the machines. Started by local_launch.

All of it ends with this process, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from bakehouse import (
    bootstrap,
    cluster,
    container_serve,
    definition,
    local_launch,
    machine,
    plan,
    run,
    userdata,
    verify,
)
from bakehouse import launch as launches
from bakehouse import settings as site
from bakehouse.cache import BaseCache, write_atomically
from bakehouse.cluster import Cluster
from bakehouse.errors import BakehouseError
from bakehouse.local_launch import LocalLaunch, Node, Problem
from bakehouse.machine import Machine
from bakehouse.package_mirror import PackageMirror
from bakehouse.record import Record
from bakehouse.run import Log
from bakehouse.settings import Settings
from bakehouse.store import LocalStore

UserData = Callable[[str], str]
"""Gives a node's user-data by its name."""


def _baked(slurm: Cluster, _launch: LocalLaunch, _settings: Settings) -> UserData:
    return slurm.user_data


def _bootstrapped(slurm: Cluster, launch: LocalLaunch, settings: Settings) -> UserData:
    """Serve a bundle, and the packages that it asks for."""
    place = slurm.network
    wanted = plan.make(launch.platform, settings)
    mirror = PackageMirror(place, settings.cache / "apt-cacher-ng")
    root = place.mount_image(_image(settings, launch.controller_tag)[1])
    mirror.prepare(root, str(wanted.manifest.release), settings.mirrors())
    mirror.start()
    bundle = launch.folder / bootstrap.BUNDLE
    definition.write_bundle(wanted, bundle)
    bootstrap.serve(place)
    served = bootstrap.offer(place, bundle.read_bytes())
    return lambda node: bootstrap.user_data(slurm.join(node, bundle=served), mirror.proxy)


def _in_containers(slurm: Cluster, launch: LocalLaunch, settings: Settings) -> UserData:
    """Serve a container image."""
    wanted = plan.make(launch.platform, settings)
    image = container_serve.provide(slurm.network, wanted, settings, launch.folder / "registry")
    return lambda node: userdata.render(slurm.join(node, image=image))


PATHS: Mapping[str, Callable[[Cluster, LocalLaunch, Settings], UserData]] = {
    "bake": _baked,
    "hybrid": _in_containers,
    "bootstrap": _bootstrapped,
}
"""How each path's nodes are provided for: brings up what they need beside the cluster, and says what they are told."""


def keep(launch: LocalLaunch, log: Log) -> None:
    """Bring a launch up, note how far it is, and keep it until SIGTERM comes.

    Args:
        launch: what shall come up; it is noted already.
        log: takes what the programs that set it up say.

    Raises:
        BakehouseError: the cluster or a machine does not come up. Nodes that do not join are noted and kept.
    """
    settings = site.load()
    launch = _note(launch, keeper=os.getpid())
    _, controller_image = _image(settings, launch.controller_tag)
    with (
        cluster.up(controller_image, log, authentication=launch.authentication) as slurm,
        contextlib.ExitStack() as stack,
    ):
        slurm.controller.start()
        user_data = PATHS[launch.path](slurm, launch, settings)
        launch = _note(launch, done=("cluster",), controller=tuple(slurm.controller.prefix))
        machines = {node: stack.enter_context(_boot(node, launch, slurm, user_data, settings)) for node in launch.nodes}
        launch = _note(launch, done=(*launch.done, "machines"), running=tuple(_facts(machines)))
        if launch.until == "joined":
            try:
                _join(launch, machines)
            except BakehouseError as error:
                _note(launch, problem=_problem(error))
            else:
                _note(launch, done=(*launch.done, "joined"))
        while True:
            signal.pause()


def _note(launch: LocalLaunch, **changes: Any) -> LocalLaunch:
    changed = launch.model_copy(update=changes)
    changed.write()
    return changed


def _image(settings: Settings, tag: str) -> tuple[Record, Path]:
    store = LocalStore(settings.store)
    found = store.get(tag)
    return found, store.image(found)


def _boot(
    node: str, launch: LocalLaunch, slurm: Cluster, user_data: UserData, settings: Settings
) -> contextlib.AbstractContextManager[Machine]:
    found, image = _image(settings, launch.tag)
    return machine.boot(
        image, probe=BaseCache(settings.cache).kvm, firmware=cast(machine.Firmware, found.firmware[0]),
        memory=verify.MEMORY["slurm"], disk_size=verify.DISK, key=launch.folder / machine.KEY,
        user_data=user_data(node), hostname=node, network=slurm.network,
        keep_console=launch.folder / f"console-{node}.log",
    )  # fmt: skip


def _facts(machines: Mapping[str, Machine]) -> list[Node]:
    return [
        Node(name=name, address=one.login.host, accelerator=one.accelerator, ssh=tuple(one.login.command))
        for name, one in machines.items()
    ]


def _join(launch: LocalLaunch, machines: Mapping[str, Machine]) -> None:
    """Wait until all have joined, and write their timelines."""
    deadline = time.monotonic() + launch.join_seconds
    for name, one in machines.items():
        try:
            verify.wait_for_join(one, seconds=max(deadline - time.monotonic(), machine.POLL_SECONDS))
        except BakehouseError as error:
            raise BakehouseError(f"{name}: {error.message}", hint=error.hint, log=error.log) from error
    for name, one in machines.items():
        found = verify.read_timeline(one, one.started)
        write_atomically(launch.folder / launches.timeline_name(name), found.model_dump_json(indent=1))


def _problem(error: BakehouseError) -> Problem:
    return Problem(message=error.message, hint=error.hint, log=error.log)


def main() -> int:
    """Keep the launch that is named; started by local_launch.up()."""
    launch = local_launch.read(sys.argv[1])
    if launch is None:
        return 1
    machine.make_key(launch.folder)
    with run.ending_on_sigterm(), Log(launch.folder / "keeper.log") as log:
        try:
            keep(launch, log)
        except BakehouseError as error:
            _note(launch, keeper=os.getpid(), problem=_problem(error))
    return 1


if __name__ == "__main__":
    sys.exit(main())
