"""The benchmark of booting: from power-on to joined, beside a plain Debian cloud-style image, in one run."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from bakehouse import cluster, container, machine, userdata, verify
from bakehouse.bench import MIB, Result, Row, this_machine
from bakehouse.cache import BaseCache
from bakehouse.errors import BakehouseError
from bakehouse.machine import Machine
from bakehouse.record import Record
from bakehouse.run import Log
from bakehouse.settings import Settings
from bakehouse.store import LocalStore
from bakehouse.timeline import accelerator_text

PLAIN = {"cloud": "debian-cloud", "generic": "debian-generic"}
"""The manifests of the images that ours are compared with, by kernel."""

DISK = 4 << 30
"""Bytes of disk of both machines."""

CPUS = {"slurm": 1, "kubernetes": 2, "roce": 1}
"""CPUs of both machines. With one CPU its seconds are those of all that was done."""

BOOT_SECONDS = 900
"""Emulated on a busy host; with KVM it is ten."""

GOAL_JOINED = {"slurm": 1.25, "kubernetes": 1.35, "roce": 1.35}
"""Of the time from power-on to the login prompt of the plain image."""

GOAL_AGENT_SECONDS = 2.0
GOAL_AGENT_SHARE = 0.1
"""Of the time from power-on to joined, under emulation, for the agent's own work."""

LOGIN = r"\b(?!Last )[\w.-]+ login:"
JOINED = r"bakehouse-agent: (?P<guest>\d+\.\d+) (?P<moment>joined|failed)(?P<rest>.*)"
STARTED = r"bakehouse-agent: (?P<guest>\d+\.\d+) started"


@dataclass(frozen=True)
class Reached:
    """A moment of a boot."""

    seconds: float
    """Since power-on."""
    cpu_seconds: float
    """That QEMU had used by then: a measure that a busy host disturbs less."""
    text: str
    """The console's line."""


@dataclass(frozen=True)
class Boot:
    """What was seen of one boot."""

    accelerator: str
    login: Reached
    joined: Reached | None = None
    agent: float = 0.0
    """Seconds of the guest's clock from the agent's first word to joined, slurmd's start among them."""
    work: float = 0.0
    """CPU seconds of the agent's unit: what it does itself, and the commands that it runs."""


def boot(settings: Settings, rounds: int, console: Console, name: str = "slurm") -> Result:
    """Measure power-on to joined of our image against power-on to login prompt of a plain Debian image.

    Both boots of a round follow one another on the same private network, with a controller beside it, and from the
    same kind of machine.

    Args:
        settings: the site's settings.
        rounds: how many.
        console: shows what is being measured.
        name: the manifest of ours.

    Raises:
        BakehouseError: an image is not in the store, the two have different kernels, or a boot failed.
    """
    store = LocalStore(settings.store)
    ours = newest(store, name)
    plain = newest(store, PLAIN["generic" if "generic" in ours.inputs.get("manifest kernel", "") else "cloud"])
    verify.needed(ours)
    if ours.kernel != plain.kernel:
        raise BakehouseError(
            f"the kernels differ: {ours.kernel} in {ours.tag}, {plain.kernel} in {plain.tag}",
            hint=f"`invoke bake --platform {name} --refresh` and the same for {plain.name}",
        )
    with tempfile.TemporaryDirectory(prefix="bench-boot-") as scratch, ExitStack() as stack:
        folder = Path(scratch)
        log = stack.enter_context(Log(folder / "bench.log"))
        made = stack.enter_context(verify.trial(ours, store.image(ours), settings, log))
        if ours.platform != "roce":  # whose second node would run beside the one that is measured
            made.start()
        bench = _BootBench(made, store, BaseCache(settings.cache).kvm, machine.make_key(folder), console)
        for image in (ours, plain):
            read_once(store.image(image))
        boots = [bench.round(f"{number}/{rounds}", f"{number}", ours, plain) for number in range(1, rounds + 1)]
    joining, standing = [first for first, _ in boots], [second for _, second in boots]
    found = rows(joining, standing, ours.platform)
    if ours.platform == "slurm" and shutil.which("systemd-nspawn"):
        console.print(f"{ours.name} in a container, at native speed", highlight=False)
        found.append(native_row(native(store.image(ours))))
    return Result(found, f"{this_machine()}; {_accelerator(joining)}")


def native(image: Path) -> float:
    """Return the seconds from the agent's start to joined in a container of the image's root, on the host's kernel.

    That is what a node with KVM takes for it, or nearly so, also on a host without KVM.

    Raises:
        BakehouseError: the container does not start or join.
    """
    with tempfile.TemporaryDirectory(prefix="bench-boot-") as name, ExitStack() as stack:
        log = stack.enter_context(Log(Path(name, "bench.log")))
        made = stack.enter_context(cluster.up(image, log, cgroups=False))
        made.controller.start()
        root = made.network.mount_image(image)
        files = userdata.files(made.join("native"))
        node = stack.enter_context(container.boot(made.network, root, "native", files=files))
        status: dict[str, Any] = {}

        def joined() -> bool:
            said = node.run("cat", "/run/bakehouse/status.json").stdout
            status.update(json.loads(said) if said else {})
            return status.get("state") == "joined"

        node.wait("join", joined)
        moments = dict(status["timeline"])
        return float(moments["joined"] - moments["started"])


def native_row(seconds: float) -> Row:
    """Return the row for the agent at native speed."""
    name = "agent: its start to joined, at native speed"
    return Row(name, f"{seconds:.2f} s", None, f"under {GOAL_AGENT_SECONDS:g} s", seconds < GOAL_AGENT_SECONDS)


def newest(store: LocalStore, name: str) -> Record:
    """Return the newest image of a manifest.

    Raises:
        BakehouseError: the store has none.
    """
    found = next((record for record in store.records() if record.name == name), None)
    if found is None:
        raise BakehouseError(f"there is no image of {name} in {store.root}", hint=f"invoke bake --platform {name}")
    return found


def read_once(image: Path) -> None:
    """Bring an image into the host's memory: the first boot is not to pay for the disk."""
    with image.open("rb") as file:
        while file.read(MIB):
            pass


@dataclass(frozen=True)
class _BootBench:
    made: verify.Trial
    store: LocalStore
    probe: Path
    key: Path
    console: Console

    def round(self, title: str, number: str, ours: Record, plain: Record) -> tuple[Boot, Boot]:
        """Boot both images, one after the other."""
        # Each node has a name of its own, so that each join is a first one.
        node = f"node-{number}"
        self.console.print(f"{title}: {ours.name} to joined", end=" ... ", highlight=False)
        joining = self._boot(ours, ours.platform, node, self.made.user_data(node), joins=True)
        assert joining.joined is not None
        self.console.print(f"{joining.joined.seconds:.1f} s", highlight=False)
        self.console.print(f"{title}: {plain.name} to login prompt", end=" ... ", highlight=False)
        standing = self._boot(plain, ours.platform, f"plain-{number}", "", joins=False)
        self.console.print(f"{standing.login.seconds:.1f} s", highlight=False)
        return joining, standing

    def _boot(self, image: Record, platform: str, name: str, user_data: str, *, joins: bool) -> Boot:
        with (
            tempfile.TemporaryDirectory(prefix="bench-boot-") as folder,
            machine.boot(
                self.store.image(image), probe=self.probe, memory=verify.MEMORY[platform], cpus=CPUS[platform],
                disk_size=DISK, key=self.key, user_data=user_data, hostname=name, network=self.made.network,
                keep_console=Path(folder, "console.log"),
            ) as node,
        ):  # fmt: skip
            seen = watch(node, {"login": LOGIN, **({"started": STARTED, "joined": JOINED} if joins else {})})
            if not joins:
                return Boot(node.accelerator, seen["login"])
            agent = _guest(seen["joined"], JOINED) - _guest(seen["started"], STARTED)
            return Boot(node.accelerator, seen["login"], seen["joined"], agent, _agents_work(node))


def _agents_work(node: Machine) -> float:
    """Ask systemd what the agent's unit has used: CPU seconds."""
    node.wait_for_ssh(BOOT_SECONDS)
    said = node.ssh("systemctl show bakehouse-agent.service --property=CPUUsageNSec --value").stdout.strip()
    if not said.isdigit():
        raise BakehouseError("the node does not say what its agent has used", log=said)
    return int(said) / 1e9


def watch(node: Machine, marks: Mapping[str, str]) -> dict[str, Reached]:
    """Wait until a machine's console has said each of some things. Return when it did.

    Args:
        node: the machine.
        marks: patterns by name.

    Raises:
        BakehouseError: it did not say all of them, or the node cannot join.
    """
    seen: dict[str, Reached] = {}

    def all_seen() -> bool:
        used = node.cpu_seconds()
        for name, pattern in marks.items():
            if name not in seen and (found := node.console.find(pattern)):
                seen[name] = Reached(found[1].at - node.started, used, found[1].text)
                _must_not_fail(seen[name].text)
        return len(seen) == len(marks)

    node.wait(" and ".join(marks), all_seen, BOOT_SECONDS)
    return seen


def _must_not_fail(text: str) -> None:
    said = re.search(JOINED, text)
    if said and said["moment"] == "failed":
        raise BakehouseError(f"the node cannot join:{said['rest']}")


def _guest(reached: Reached, pattern: str) -> float:
    found = re.search(pattern, reached.text)
    assert found is not None
    return float(found["guest"])


def rows(joining: Sequence[Boot], standing: Sequence[Boot], platform: str) -> list[Row]:
    """Return what a number of boots comes to: medians and ratios.

    Args:
        joining: boots of our image.
        standing: boots of the plain one.
        platform: of ours.
    """
    goal = GOAL_JOINED[platform]
    joined = [made.joined for made in joining if made.joined]
    logins = [made.login for made in joining]
    plain = [made.login for made in standing]
    ratio = _seconds(joined) / _seconds(plain)
    return [
        Row("plain Debian: power-on to login prompt", _text(plain), 1.0),
        Row("ours: power-on to joined", _text(joined), ratio, f"at most {goal} of plain", ratio <= goal),
        Row("ours: power-on to login prompt", _text(logins), _seconds(logins) / _seconds(plain)),
        Row("CPU seconds, ours to joined", f"{_cpu(joined):.1f} s", _cpu(joined) / _cpu(plain)),
        Row("CPU seconds, ours to login prompt", f"{_cpu(logins):.1f} s", _cpu(logins) / _cpu(plain)),
        *_agent_rows(joining, _seconds(joined), platform),
    ]


def _agent_rows(joining: Sequence[Boot], whole: float, platform: str) -> list[Row]:
    seconds = statistics.median(made.agent for made in joining)
    work = statistics.median(made.work for made in joining)
    # The joining of a Kubernetes node is kubeadm's and the kubelet's work: there is no goal for it.
    ours = platform != "kubernetes"
    took = Row("agent: its start to joined", f"{seconds:.1f} s of the guest's", seconds / whole)
    name = "agent: its own work" if ours else "agent and kubeadm: their work"
    worked = Row(name, f"{work:.1f} s of the guest's CPU", work / whole)
    if ours and _accelerator(joining) == "KVM":
        took = replace(took, goal=f"under {GOAL_AGENT_SECONDS:g} s", met=seconds < GOAL_AGENT_SECONDS)
    elif ours:
        goal = f"at most {GOAL_AGENT_SHARE} of the boot where emulated"
        worked = replace(worked, goal=goal, met=work / whole <= GOAL_AGENT_SHARE)
    return [took, worked]


def _accelerator(boots: Sequence[Boot]) -> str:
    return accelerator_text(boots[0].accelerator)


def _seconds(moments: Sequence[Reached]) -> float:
    return statistics.median(moment.seconds for moment in moments)


def _cpu(moments: Sequence[Reached]) -> float:
    return statistics.median(moment.cpu_seconds for moment in moments)


def _text(moments: Sequence[Reached]) -> str:
    return f"{_seconds(moments):.1f} s ({_cpu(moments):.1f} s of QEMU's CPU)"
