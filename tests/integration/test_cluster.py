"""The cluster of cluster.up: what people type, and that nothing of it stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bakehouse import REPOSITORY
from bakehouse.record import Record
from bakehouse.settings import Settings
from bakehouse.store import LocalStore

pytestmark = pytest.mark.slow

Invoke = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def invoke(baked: Record, real_settings: Settings, tmp_path: Path) -> Invoke:
    """Run a task as people do, with the baked image in the store."""
    environment = {
        **os.environ,
        "BAKEHOUSE_STORE": str(real_settings.store),
        "BAKEHOUSE_CACHE": str(real_settings.cache),
        "XDG_STATE_HOME": str(tmp_path),
    }

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "invoke", *words],
            cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip

    return run


def leftovers() -> list[str]:
    """Return processes, mounts and loop devices of clusters."""
    names = "slurmctld|munged|dnsmasq|bakehouse_broker|systemd-nspawn|bakehouse.demo"
    processes = subprocess.run(["pgrep", "-a", "-f", names], capture_output=True, text=True, check=False).stdout
    loops = subprocess.run(["losetup", "--list", "--noheadings"], capture_output=True, text=True, check=True).stdout
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if "bakehouse" in line]
    return [*processes.splitlines(), *loops.splitlines(), *mounts]


def all_gone(before: list[str]) -> bool:
    deadline = time.monotonic() + 20
    while extra := set(leftovers()) - set(before):
        if time.monotonic() > deadline:
            pytest.fail(f"left behind: {sorted(extra)}")
        time.sleep(0.2)
    return True


@pytest.mark.parametrize("authentication", ["munge", "slurm"])
def test_a_cluster_comes_and_goes(invoke: Invoke, authentication: str) -> None:
    before = leftovers()
    done = invoke("cluster.up", "slurm", "--authentication", authentication)
    assert done.returncode == 0, done.stderr
    try:
        again = invoke("cluster.up", "slurm")
        assert again.returncode == 1
        assert "runs already" in again.stderr
        shown = json.loads(invoke("cluster.status", "--json").stdout)
        assert [(each["platform"], each["authentication"]) for each in shown] == [("slurm", authentication)]
        assert "10.77.0.1:6817" in invoke("cluster.status").stdout
        assert "is UP" in invoke("cluster.run", "scontrol ping").stdout
        assert invoke("cluster.run", "false").returncode == 1
        token = invoke("join.token", "--platform", "slurm", "--node", "x").stdout.strip()
        assert token.startswith("bhj_")
    finally:
        done = invoke("cluster.down", "slurm")
    assert done.returncode == 0, done.stderr
    assert all_gone(before)
    assert json.loads(invoke("cluster.status", "--json").stdout) == []
    gone = invoke("cluster.run", "sinfo")
    assert gone.returncode == 1
    assert "invoke cluster.up slurm" in gone.stderr


def test_a_cluster_whose_keeper_is_killed_leaves_nothing(invoke: Invoke) -> None:
    before = leftovers()
    assert invoke("cluster.up", "slurm").returncode == 0
    keeper = json.loads(invoke("cluster.status", "--json").stdout)[0]["keeper"]
    os.kill(keeper, signal.SIGKILL)
    assert all_gone(before)
    assert "No cluster" in invoke("cluster.status").stdout


def test_a_cluster_with_accounting_keeps_jobs(invoke: Invoke) -> None:
    try:
        done = invoke("cluster.up", "slurm", "--accounting")
        assert done.returncode == 0, done.stderr
        assert "bakehouse" in invoke("cluster.run", "sacctmgr --noheader list cluster").stdout
    finally:
        invoke("cluster.down", "slurm")


CODE = """
import sys, time
from pathlib import Path
from bakehouse import cluster, container, machine
from bakehouse.run import Log
image, probe, log = map(Path, sys.argv[1:])
with Log(log) as log, cluster.up(image, log, cgroups=False) as made:
    made.controller.start()
    with (
        container.boot(made.network, made.network.mount_image(image), "one"),
        machine.boot(image, probe=probe, network=made.network, hostname="two"),
    ):
        print("up", flush=True)
        time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_an_owner_that_is_killed_leaves_nothing(
    baked: Record, real_settings: Settings, tmp_path: Path, number: signal.Signals
) -> None:
    """Controller, broker, a container and a machine on one network."""
    before = leftovers()
    image = LocalStore(real_settings.store).image(baked)
    command = [sys.executable, "-c", CODE, str(image), str(real_settings.cache / "kvm"), str(tmp_path / "log")]
    owner = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "up\n"
    owner.send_signal(number)
    owner.communicate(timeout=60)
    assert all_gone(before)
    qemu = subprocess.run(["pgrep", "-f", f"qemu.*{tmp_path}"], capture_output=True, check=False)
    assert qemu.returncode != 0
