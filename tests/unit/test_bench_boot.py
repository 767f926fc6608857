"""The benchmark of booting, with a cluster and machines that do as they are told."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bakehouse import bench_boot, cluster, machine, userdata, verify
from bakehouse.bench import Result, Row
from bakehouse.bench_boot import Boot, Reached
from bakehouse.console import Console as SerialConsole
from bakehouse.errors import BakehouseError
from bakehouse.machine import Login, Machine
from bakehouse.record import FILE_NAME, Record
from bakehouse.settings import Settings
from bakehouse.store import LocalStore

OURS = """\
[    0.000000] Linux version 6.12
bakehouse-agent: 34.500 started pid 370
bakehouse-agent: 37.250 joined node-1 at 10.77.0.1:6817

Debian GNU/Linux 13 node-1 ttyS0

node-1 login: """
PLAIN = "[    0.000000] Linux version 6.12\n[  80.1] systemd: Starting Login Service\n\nplain-1 login: "


def record(name: str, **changes: Any) -> Record:
    return Record.model_validate(
        {
            "name": name, "platform": "slurm" if name == "slurm" else "base", "tag": f"20260101-{name}",
            "digest": "0" * 64, "inputs": {}, "created": "2026-01-01T12:00:00Z", "commit": "", "distribution": "debian",
            "release": "trixie", "architecture": "amd64", "kernel": "6.12", "firmware": ["bios", "uefi"],
            "root_size": 1, "root_used": 1, "sbom": "sbom.cdx.json", "sbom_sha256": "", "package_count": 1,
            "versions": {}, "steps": [], "builder": {},
            "files": [{"format": "qcow2", "file": "image.qcow2", "size": 1, "virtual_size": 9, "sha256": "",
                       "sha512": ""}],
            "base": {"key": "", "sha256": "", "created": "2026-01-01T11:00:00Z"},
            "usage": {"peak_memory": 1, "disk": 1, "cpu_seconds": 1}, **changes,
        }
    )  # fmt: skip


class Guest(Machine):
    """A machine of which one at a time runs."""

    cpu = 0.0
    wire = -1

    @property
    def running(self) -> bool:
        return True

    def cpu_seconds(self) -> float:
        return self.cpu

    def wait_for_ssh(self, seconds: float) -> None:
        pass

    def ssh(self, command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        assert "CPUUsageNSec" in command
        return subprocess.CompletedProcess([], 0, "1500000000\n", "")


class Controller:
    def start(self) -> None:
        pass


class World:
    """A store with both images, and machines that say what they are told to."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.settings = Settings(store=folder / "store", cache=folder / "cache")
        self.shown = io.StringIO()
        self.says = {"slurm": OURS, "debian-cloud": PLAIN}
        self.boots: list[tuple[str, dict[str, Any]]] = []
        self.running = 0
        monkeypatch.setattr(machine, "POLL_SECONDS", 0.002)
        monkeypatch.setattr(machine, "make_key", lambda folder: folder / "id")
        monkeypatch.setattr(machine, "boot", self.boot)
        monkeypatch.setattr(cluster, "up", self.up)
        monkeypatch.setattr(verify, "needed", lambda _record: None)
        monkeypatch.setattr(bench_boot, "BOOT_SECONDS", 0.3)
        monkeypatch.setattr(bench_boot, "native", lambda _image: 0.4)

    def add(self, made: Record) -> None:
        folder = LocalStore(self.settings.store).folder(made.tag)
        folder.mkdir(parents=True)
        (folder / "image.qcow2").write_bytes(b"x")
        (folder / FILE_NAME).write_text(made.model_dump_json())

    @contextlib.contextmanager
    def up(self, image: Path, _log: object, **_: object) -> Iterator[cluster.Cluster]:
        assert image.parent.name == "20260101-slurm", "the controller has the version of the node"
        made = cluster.Cluster(None, Controller(), None)  # type: ignore[arg-type]
        with self.monkeypatch.context() as patch:
            patch.setattr(
                cluster.Cluster, "join", lambda _, node: userdata.Join(("10.77.0.1:6817",), node=node, key=b"k" * 1024)
            )
            yield made

    @contextlib.contextmanager
    def boot(self, image: Path, **options: Any) -> Iterator[Machine]:
        name = image.parent.name.removeprefix("20260101-")
        self.boots.append((name, options))
        self.running += 1
        assert self.running == 1, "never two machines at once"
        reading, writing = os.pipe()
        console = SerialConsole(os.fdopen(reading, "rb"), options["keep_console"])
        login = Login("10.77.0.10", 22, "debian", options["key"])
        guest = Guest(login, console, "tcg", 0.0, None, None, Path(), Path())  # type: ignore[arg-type]
        guest.cpu = {"slurm": 50.0, "debian-cloud": 100.0}[name]
        os.write(writing, self.says[name].encode())
        try:
            yield guest
        finally:
            self.running -= 1
            os.close(writing)
            console.end(5)

    def bench(self, rounds: int = 1) -> Result:
        return bench_boot.boot(self.settings, rounds, Console(file=self.shown, width=160))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path, monkeypatch)
    made.add(record("slurm"))
    made.add(record("debian-cloud"))
    return made


def test_the_two_images_are_booted_in_turn_on_the_same_kind_of_machine(world: World) -> None:
    world.bench(rounds=2)
    assert [name for name, _ in world.boots] == ["slurm", "debian-cloud"] * 2
    same = ("memory", "cpus", "disk_size", "network", "key", "probe")
    assert len({str([options[key] for key in same]) for _, options in world.boots}) == 1


def test_only_ours_is_told_to_join_and_each_time_under_another_name(world: World) -> None:
    world.bench(rounds=2)
    told = {options["hostname"]: options["user_data"] for _, options in world.boots}
    assert sorted(told) == ["node-1", "node-2", "plain-1", "plain-2"]
    assert 'name: "node-2"' in told["node-2"]
    assert told["plain-1"] == ""


def test_seconds_of_qemu_stand_beside_those_of_the_clock(world: World) -> None:
    found = {row.name: row for row in world.bench().rows}
    assert found["CPU seconds, ours to joined"] == Row("CPU seconds, ours to joined", "50.0 s", 0.5)
    assert "(100.0 s of QEMU's CPU)" in found["plain Debian: power-on to login prompt"].value


def test_the_agents_time_is_that_of_the_guests_clock(world: World) -> None:
    found = {row.name: row.value for row in world.bench().rows}
    assert found["agent: its start to joined"] == "2.8 s of the guest's"
    assert found["agent: its own work"] == "1.5 s of the guest's CPU"


def test_the_agent_is_measured_at_native_speed_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _name: "/usr/bin/systemd-nspawn")
    row = world.bench().rows[-1]
    assert (row.value, row.met) == ("0.40 s", True)
    monkeypatch.setattr("shutil.which", lambda _name: None)
    assert world.bench().rows[-1].name == "agent: its own work"


def test_the_accelerator_is_named(world: World) -> None:
    assert world.bench().machine.endswith("; emulation")


def test_the_result_is_plain_data(world: World) -> None:
    assert {"rows", "machine"} == set(asdict(world.bench()))


def test_progress_is_shown(world: World) -> None:
    world.bench(rounds=2)
    assert "2/2: debian-cloud to login prompt ... " in world.shown.getvalue()


@pytest.mark.parametrize("name", ["slurm", "debian-cloud"])
def test_a_missing_image_is_named_with_the_command_that_bakes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    world = World(tmp_path, monkeypatch)
    world.add(record({"slurm": "debian-cloud", "debian-cloud": "slurm"}[name]))
    with pytest.raises(BakehouseError, match=f"no image of {name}") as caught:
        world.bench()
    assert caught.value.hint == f"invoke bake --platform {name}"


def test_images_with_different_kernels_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, monkeypatch)
    world.add(record("slurm", kernel="6.13"))
    world.add(record("debian-cloud"))
    with pytest.raises(BakehouseError, match=r"the kernels differ: 6\.13"):
        world.bench()


def test_a_node_that_cannot_join_ends_the_benchmark_at_once(world: World) -> None:
    world.says["slurm"] = (
        "bakehouse-agent: 34.500 started\nbakehouse-agent: 34.900 failed slurm.controllers: is missing\n"
    )
    with pytest.raises(BakehouseError, match=r"the node cannot join: slurm\.controllers: is missing"):
        world.bench()


def test_a_boot_without_a_prompt_ends_the_benchmark(world: World) -> None:
    world.says["debian-cloud"] = "[    0.000000] Linux version 6.12\nLast login: never\n"
    with pytest.raises(BakehouseError, match="no login within"):
        world.bench()


def reached(seconds: float, cpu: float = 1.0) -> Reached:
    return Reached(seconds, cpu, "")


def test_medians_are_compared_with_the_goals() -> None:
    joining = [Boot("tcg", reached(60), reached(at), agent=6.0, work=4.0) for at in (50.0, 40.0, 400.0)]
    standing = [Boot("tcg", reached(at)) for at in (100.0, 90.0, 110.0)]
    found = bench_boot.rows(joining, standing, "slurm")
    assert (found[1].ratio, found[1].met) == (0.5, True)
    assert found[2].ratio == pytest.approx(0.6)
    assert (found[-2].ratio, found[-2].met) == (0.12, None)
    assert (found[-1].ratio, found[-1].met) == (0.08, True)
    slow = [replace(made, joined=reached(126), work=20.0) for made in joining]
    assert [row.met for row in bench_boot.rows(slow, standing, "slurm")] == [None, False, None, None, None, None, False]


@pytest.mark.parametrize(("seconds", "met"), [(1.9, True), (2.1, False)])
def test_with_kvm_the_agent_has_two_seconds(seconds: float, met: bool) -> None:
    joining = [Boot("kvm", reached(8), reached(7), agent=seconds)]
    row = bench_boot.rows(joining, [Boot("kvm", reached(8))], "slurm")[-2]
    assert (row.goal, row.met) == ("under 2 s", met)


def test_a_kubernetes_node_has_a_goal_of_its_own_and_none_for_kubeadms_work() -> None:
    joining = [Boot("tcg", reached(60), reached(130), agent=40.0, work=15.0)]
    found = bench_boot.rows(joining, [Boot("tcg", reached(100))], "kubernetes")
    assert (found[1].ratio, found[1].met) == (1.3, True)
    assert [(row.name, row.met) for row in found[-1:]] == [("agent and kubeadm: their work", None)]


def test_an_image_with_the_kernel_for_all_hardware_is_compared_with_one_that_has_it(world: World) -> None:
    world.add(record("slurm", tag="20260102-slurm", inputs={"manifest kernel": "generic"}))
    with pytest.raises(BakehouseError, match="no image of debian-generic"):
        world.bench()
