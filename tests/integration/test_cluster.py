"""The cluster of cluster.up: what people type, and that nothing of it stays."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bakehouse import REPOSITORY
from bakehouse.record import Record
from bakehouse.settings import Settings
from bakehouse.store import LocalStore
from tests.integration.conftest import Invoke, invoking

pytestmark = pytest.mark.slow


@pytest.fixture
def invoke(baked: Record, real_settings: Settings, tmp_path: Path) -> Invoke:
    """Run a task as people do, with the baked image in the store."""
    return invoking({
        "BAKEHOUSE_STORE": str(real_settings.store),
        "BAKEHOUSE_CACHE": str(real_settings.cache),
        "XDG_STATE_HOME": str(tmp_path),
    })  # fmt: skip


class Place:
    """What belongs to one private network, told from what others do on this host."""

    def __init__(self, pid: int) -> None:
        """Look at the network that a process keeps."""
        self.namespace = Path(f"/proc/{pid}/ns/pid").readlink()
        mounts = Path(f"/proc/{pid}/mountinfo").read_text()
        self.loops = sorted(set(re.findall(r"/dev/loop\d+", mounts)))
        assert self.processes()
        assert self.loops

    def processes(self) -> list[str]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (folder / "ns/pid").readlink() == self.namespace:
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
        return found

    def leftovers(self) -> list[str]:
        used = [subprocess.run(["losetup", loop], capture_output=True, text=True, check=False) for loop in self.loops]
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        return [
            *self.processes(),
            *(loop.stdout for loop in used if loop.returncode == 0),
            *(line for line in mounts if "/run/bakehouse" in line),
        ]

    def is_gone(self) -> bool:
        deadline = time.monotonic() + 20
        while left := self.leftovers():
            if time.monotonic() > deadline:
                pytest.fail(f"left behind: {left}")
            time.sleep(0.2)
        return True


@pytest.mark.parametrize("authentication", ["munge", "slurm"])
def test_a_cluster_comes_and_goes(invoke: Invoke, authentication: str) -> None:
    done = invoke("cluster.up", "slurm", "--authentication", authentication)
    assert done.returncode == 0, done.stderr
    try:
        again = invoke("cluster.up", "slurm")
        assert again.returncode == 1
        assert "runs already" in again.stderr
        shown = json.loads(invoke("cluster.status", "--json").stdout)
        assert [(each["platform"], each["authentication"]) for each in shown] == [("slurm", authentication)]
        place = Place(shown[0]["network"])
        assert "10.77.0.1:6817" in invoke("cluster.status").stdout
        assert "is UP" in invoke("cluster.run", "scontrol ping").stdout
        assert invoke("cluster.run", "false").returncode == 1
        token = invoke("join.token", "--platform", "slurm", "--node", "x").stdout.strip()
        assert token.startswith("bhj_")
        assert invoke("join.tokens").stdout.splitlines()[-1].endswith("  x")
        assert invoke("join.revoke", "x").returncode == 0
        assert "revoked" in invoke("join.tokens").stdout
    finally:
        done = invoke("cluster.down", "slurm")
    assert done.returncode == 0, done.stderr
    assert place.is_gone()
    assert json.loads(invoke("cluster.status", "--json").stdout) == []
    gone = invoke("cluster.run", "sinfo")
    assert gone.returncode == 1
    assert "invoke cluster.up slurm" in gone.stderr


def test_a_cluster_whose_keeper_is_killed_leaves_nothing(invoke: Invoke) -> None:
    assert invoke("cluster.up", "slurm").returncode == 0
    shown = json.loads(invoke("cluster.status", "--json").stdout)[0]
    place = Place(shown["network"])
    os.kill(shown["keeper"], signal.SIGKILL)
    assert place.is_gone()
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
        machine.boot(image, probe=probe, network=made.network, hostname="two") as two,
    ):
        print(made.network.pid, two._process.pid, flush=True)
        time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_an_owner_that_is_killed_leaves_nothing(
    baked: Record, real_settings: Settings, tmp_path: Path, number: signal.Signals
) -> None:
    """Controller, broker, a container and a machine on one network."""
    image = LocalStore(real_settings.store).image(baked)
    command = [sys.executable, "-c", CODE, str(image), str(real_settings.cache / "kvm"), str(tmp_path / "log")]
    owner = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    network, qemu = map(int, owner.stdout.readline().split())
    place = Place(network)
    assert len(place.processes()) > 5
    owner.send_signal(number)
    owner.communicate(timeout=60)
    assert place.is_gone()
    qemu_gone = ["timeout", "10", "sh", "-c", f"while grep -qs qemu /proc/{qemu}/cmdline; do sleep 0.1; done"]
    assert subprocess.run(qemu_gone, check=False).returncode == 0
