"""Measuring the paths of a platform side by side: on one machine, in one network, from one package mirror."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bakehouse import (
    bootstrap,
    cluster,
    container,
    container_image,
    container_push,
    container_serve,
    definition,
    kvm,
    machine,
    plan,
    run,
    userdata,
    verify,
)
from bakehouse.bench import bake_quietly
from bakehouse.bench_boot import read_once
from bakehouse.cache import BaseCache, disk_usage
from bakehouse.cluster import Cluster
from bakehouse.comparison import PATHS, PLAIN, Candidate, Comparison, Image, Node, PathName, Run, Scenario, Step
from bakehouse.comparison import Machine as Host
from bakehouse.container_image import Shelf
from bakehouse.container_push import Pushed
from bakehouse.errors import BakehouseError
from bakehouse.machine import Machine
from bakehouse.package_mirror import PackageMirror
from bakehouse.plan import Plan
from bakehouse.record import Record
from bakehouse.run import Log
from bakehouse.settings import Settings
from bakehouse.store import LocalStore
from bakehouse.userdata import BASES

PLATFORMS = ("slurm",)
"""Platforms whose paths can be compared."""

DISK = 4 << 30
"""Bytes of each node's disk."""

RUNS = 3
RUNS_EMULATED = 1
"""Of the plain scenario. Where machines are emulated a round takes ten minutes."""

JOIN_SECONDS = 1800.0
"""How long a node may take. A bootstrap that is emulated takes minutes."""

REST_SECONDS = 20.0
"""After the join, before memory is asked for."""

CHANGED_PACKAGE = "tree"
"""What is added to the manifest to see what a change costs: a small package without others."""

REGISTRY = "registry"

MEMORY = "awk '/^MemTotal/ {all = $2} /^MemAvailable/ {free = $2} END {print (all - free) * 1024}' /proc/meminfo"
"""Prints the bytes of memory in use."""

METHOD = (
    "The paths take turns: each round boots a node of each, on the same machine and network, with the same controller.",
    "Nodes fetch packages from an apt-cacher-ng on this host that holds them already, the bundle from a web server.",
    "The container image comes from a registry on this host.",
    "Joined is what the join agent says on the console; the controller runs jobs on the node then.",
    "Bytes over the network are those that reached the node's port until it had joined.",
    "The image is not among them: it is a file of this host, as on a hypervisor that holds it already.",
    "What it takes to upload an image to a cloud, and a hypervisor to fetch it first, is in no figure: see its size.",
    "Bytes on disk are those of the image file and of what the node has written since.",
    f"Memory is what is in use {REST_SECONDS:.0f} s after the join, caches left out.",
    "Making is measured once, with downloaded packages.",
    "A change of one package is a bake or a container image with the base root from the cache, or a new bundle.",
)


def compare(
    name: str,
    settings: Settings,
    console: Console,
    *,
    runs: int = 0,
    more: tuple[Scenario, ...] = (),
    keep: Callable[[Comparison], object] = lambda _so_far: None,
) -> Comparison:
    """Measure the paths of a platform in turn.

    Args:
        name: the platform's manifest.
        settings: the site's settings; its store is left alone.
        console: shows what is being measured.
        runs: how many rounds of the plain scenario; 0 for RUNS, or RUNS_EMULATED where KVM does not work.
        more: other scenarios, for a round of each.
        keep: takes what is known after each round, so that a run that is ended later was not for nothing.

    Raises:
        BakehouseError: the paths of this platform cannot be compared, or something cannot be made. A run that fails is
            part of the result.
    """
    wanted = plan.make(name, settings)
    if wanted.manifest.platform not in PLATFORMS:
        raise BakehouseError(
            f"the paths of {name} cannot be compared yet", hint=f"manifests of the platform {', '.join(PLATFORMS)} can"
        )
    started = datetime.datetime.now(datetime.UTC)
    settings.cache.mkdir(parents=True, exist_ok=True)
    if not runs:
        runs = RUNS if kvm.works(BaseCache(settings.cache).kvm).works else RUNS_EMULATED
        if runs == RUNS_EMULATED:
            console.print("one round of each path: machines are emulated here", highlight=False)
    scratch = Path(tempfile.mkdtemp(prefix="compare-", dir=settings.cache))
    try:
        made = _make(wanted, settings, scratch, console)
        with ExitStack() as stack:
            log = stack.enter_context(Log(scratch / "network.log"))
            slurm = stack.enter_context(cluster.up(made.image["bake"], log))
            slurm.controller.start()
            bench = _Bench(slurm, made, settings, scratch, console)
            bench.prepare(str(wanted.manifest.release))
            found: list[Run] = []
            rounds = [(PLAIN, number) for number in range(1, runs + 1)] + [(scenario, 1) for scenario in more]
            for scenario, number in rounds:
                found += [bench.run(path, number, scenario) for path in PATHS]
                result = Comparison(
                    platform=name,
                    started=started,
                    commit=made.commit,
                    machine=_host(found),
                    method=METHOD,
                    changed_package=CHANGED_PACKAGE,
                    candidates=made.candidates,
                    runs=tuple(found),
                )
                keep(result)
    finally:
        run.remove_tree(scratch)
    return result


@dataclass(frozen=True)
class _Made:
    """What the paths are made of."""

    candidates: tuple[Candidate, ...]
    image: dict[PathName, Path]
    bundle: bytes
    container: str
    """The container image as it was pushed into the folder REGISTRY of the scratch folder."""
    commit: str


def _make(wanted: Plan, settings: Settings, scratch: Path, console: Console) -> _Made:
    """Make all, and measure what that takes."""
    own = settings.model_copy(update={"cache": scratch / "cache", "store": scratch / "store"})
    base, host = (plan.make(BASES[path], settings) for path in ("bootstrap", "hybrid"))
    changed = _changed(wanted, settings, scratch)
    shelf = Shelf(BaseCache(own.cache))
    quiet = Console(quiet=True)

    def timed(what: str, work: Callable[[], object]) -> float:
        console.print(what, end=" ... ", highlight=False)
        # What the one before wrote and deleted is not to be paid for by this one.
        os.sync()
        begin = time.monotonic()
        work()
        seconds = time.monotonic() - begin
        console.print(f"{seconds:.1f} s", highlight=False)
        return seconds

    def bake_anew(which: Plan) -> None:
        if (own.cache / "base").exists():
            run.remove_tree(own.cache / "base")
        bake_quietly(which, own)

    def download() -> None:
        for one in (changed, host):
            bake_quietly(one, own)
        with container_image.opened(shelf, quiet):
            order = container_image.order_of(changed, own)
            container_image.make(order, shelf, quiet)
            # From a snapshot the base root comes out the same, and the image would be found when it is to be built.
            shelf.note(order.key).unlink()

    def push_anew(which: Plan) -> None:
        run.remove_tree(own.cache / "base")
        push(which)

    def push(which: Plan) -> None:
        pushed[which.name] = container_push.push(container_image.order_of(which, own), shelf, target, quiet)

    pushed: dict[str, Pushed] = {}
    timed("downloading packages (not counted)", download)
    base_seconds = timed(f"bake of {base.name}", lambda: bake_anew(base))
    host_seconds = timed(f"bake of {host.name}", lambda: bake_anew(host))
    bake_seconds = timed(f"bake of {wanted.name}", lambda: bake_anew(wanted))
    change_seconds = timed(f"bake of {wanted.name} with one more package", lambda: bake_quietly(changed, own))
    with container_serve.on_loopback(scratch / REGISTRY) as target:
        push_seconds = timed("container image", lambda: push_anew(wanted))
        push_change_seconds = timed("container image with one more package", lambda: push(changed))
    bundle = scratch / bootstrap.BUNDLE
    new_bundle = Step(name="bundle", seconds=timed("bundle", lambda: definition.write_bundle(wanted, bundle)))
    store = LocalStore(own.store)
    ours, runtime, plain = (store.get(one.name) for one in (wanted, host, base))

    def images(*records: Record) -> tuple[Image, ...]:
        return tuple(Image(name=one.name, tag=one.tag, digest=one.digest) for one in records)

    return _Made(
        candidates=(
            Candidate(
                path="bake",
                images=images(ours),
                making=(Step(name="bake", seconds=bake_seconds),),
                change=(Step(name="bake with the base root from the cache", seconds=change_seconds),),
            ),
            Candidate(
                path="hybrid",
                images=images(runtime),
                making=(
                    Step(name="bake of the plain image with podman", seconds=host_seconds),
                    Step(name="container image, built and pushed", seconds=push_seconds),
                ),
                change=(Step(name="container image with the base root from the cache", seconds=push_change_seconds),),
            ),
            Candidate(
                path="bootstrap",
                images=images(plain),
                making=(Step(name="bake of the base", seconds=base_seconds), new_bundle),
                change=(new_bundle,),
            ),
        ),
        image={"bake": store.image(ours), "hybrid": store.image(runtime), "bootstrap": store.image(plain)},
        bundle=bundle.read_bytes(),
        container=pushed[wanted.name].reference,
        commit=ours.commit,
    )


def _changed(wanted: Plan, settings: Settings, scratch: Path) -> Plan:
    """Return the plan with one more package."""
    folder = scratch / "manifests"
    folder.mkdir()
    (folder / "changed.yaml").write_text(f"extends: {wanted.name}\npackages: [{CHANGED_PACKAGE}]\n")
    return plan.make("changed", settings.model_copy(update={"manifests": [folder, *settings.manifests]}))


class _Bench:
    """Where nodes are booted.

    Args:
        slurm: the cluster that they join.
        made: what they are made of.
        settings: of the site.
        scratch: a folder.
        console: shows what is being measured.
    """

    def __init__(self, slurm: Cluster, made: _Made, settings: Settings, scratch: Path, console: Console) -> None:
        self.slurm = slurm
        self.made = made
        self.settings = settings
        self.scratch = scratch
        self.console = console
        self.mirror = PackageMirror(slurm.network, settings.cache / "apt-cacher-ng")
        self.key = machine.make_key(scratch)
        self.count = 0

    def prepare(self, release: str) -> None:
        """Start the package mirror and the web server, and have the mirror fetch what nodes will ask it for."""
        place = self.slurm.network
        self.mirror.prepare(place.mount_image(self.made.image["bake"]), release, self.settings.mirrors())
        self.mirror.start()
        bootstrap.serve(place)
        self.bundle = bootstrap.offer(place, self.made.bundle)
        container_serve.serve(place, self.scratch / REGISTRY)
        self.image = container_serve.served(self.made.container)
        for image in self.made.image.values():
            read_once(image)
        self.console.print("filling the package mirror (not counted)", highlight=False)
        # A plain node as a container fetches what machines will fetch, in a tenth of the time.
        files = bootstrap.files_of(self._join("filler", "bootstrap"), self.mirror.proxy)
        root = place.mount_image(self.made.image["bootstrap"])
        with container.boot(place, root, "filler", files=files, layer="4g") as node:
            node.wait(
                "bootstrap", lambda: node.run("cat", "/run/bakehouse/bootstrap").stdout == "applied\n", JOIN_SECONDS
            )

    def _join(self, node: str, path: PathName) -> userdata.Join:
        return self.slurm.join(
            node,
            bundle=self.bundle if path == "bootstrap" else None,
            image=self.image if path == "hybrid" else None,
        )

    def run(self, path: PathName, number: int, scenario: Scenario) -> Run:
        """Boot the nodes of one run together, and measure them."""
        self.console.print(f"{scenario.name}, round {number}: {path}", end=" ... ", highlight=False)
        nodes: list[Node] = []
        failure = ""
        try:
            with ExitStack() as stack:
                booted = [stack.enter_context(self._boot(path, scenario)) for _ in range(scenario.nodes)]
                nodes = self._measure(path, booted)
        except BakehouseError as error:
            failure = error.message
        found = Run(path=path, number=number, scenario=scenario, nodes=tuple(nodes), failure=failure)
        self.console.print(failure or f"{found.joined:.1f} s", highlight=False)
        return found

    @contextmanager
    def _boot(self, path: PathName, scenario: Scenario) -> Iterator[Machine]:
        # Each node has a name of its own, so that each join is a first one.
        self.count += 1
        name = f"node-{self.count}"
        user_data = bootstrap.user_data(self._join(name, path), self.mirror.proxy)
        with machine.boot(
            self.made.image[path], probe=BaseCache(self.settings.cache).kvm, memory=verify.MEMORY["slurm"],
            disk_size=DISK, key=self.key, user_data=user_data, hostname=name, network=self.slurm.network,
        ) as node:  # fmt: skip
            assert node.port is not None
            if scenario.mirror_rate:
                self._in_place(*f"tc qdisc replace dev {node.port.device} root tbf rate {scenario.mirror_rate}bit "
                                "burst 256kbit latency 200ms".split())  # fmt: skip
            yield node

    def _measure(self, path: PathName, booted: list[Machine]) -> list[Node]:
        received = []
        for node in booted:
            verify.wait_for_join(node, seconds=JOIN_SECONDS)
            received.append(self._received(node))
        time.sleep(REST_SECONDS)
        return [
            Node(
                name=node.port.name if node.port else "",
                timeline=verify.read_timeline(node, node.started),
                received=bytes_received,
                disk=disk_usage(self.made.image[path]) + disk_usage(node.disk),
                memory=_memory(node),
            )
            for node, bytes_received in zip(booted, received, strict=True)
        ]

    def _received(self, node: Machine) -> int:
        assert node.port is not None
        said = self._in_place("ip", "-json", "-stats", "link", "show", "dev", node.port.device)
        # What the host sends out at its end of the wire is what the node receives.
        return int(json.loads(said)[0]["stats64"]["tx"]["bytes"])

    def _in_place(self, *command: str) -> str:
        done = subprocess.run([*self.slurm.network.only_network, *command], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BakehouseError(f"{command[0]} ended with status {done.returncode}", log=done.stdout + done.stderr)
        return done.stdout


def _memory(node: Machine) -> int | None:
    """Return the bytes of memory in use; None where the node does not say."""
    try:
        said = node.ssh(MEMORY).stdout.strip()
    except subprocess.TimeoutExpired:
        return None
    return int(said) if said.isdigit() else None


def _host(runs: list[Run]) -> Host:
    """Return what was measured on."""
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    qemu = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"version (\S+)", qemu)
    return Host(
        cpu=cpu[1] if cpu else platform.machine(),
        cores=os.cpu_count() or 1,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        kernel=platform.release(),
        accelerator=next((node.timeline.accelerator for one in runs for node in one.nodes), ""),
        qemu=version[1] if version else "",
    )
