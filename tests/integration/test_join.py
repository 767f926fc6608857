"""Baked nodes boot with every data source, under both kinds of firmware, and join a real cluster."""

from __future__ import annotations

import base64
import datetime
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bakehouse import cluster, timeline, userdata, verify
from bakehouse.cluster import Cluster
from bakehouse.harness import BootMachine
from bakehouse.machine import Machine
from bakehouse.record import Record
from bakehouse.run import Log
from bakehouse.settings import Settings
from bakehouse.store import LocalStore
from bakehouse.verify import JOIN_SECONDS, wait_for_join

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def image(baked: Record, real_settings: Settings) -> Path:
    return LocalStore(real_settings.store).image(baked)


@pytest.fixture
def slurm(image: Path, tmp_path: Path) -> Iterator[Cluster]:
    with Log(tmp_path / "cluster.log") as log, cluster.up(image, log) as made:
        made.controller.start()
        yield made


def status(node: Machine) -> dict[str, Any]:
    return {"waiting_for": "", **verify.agents_status(node)}


def test_verify_passes_and_says_what_it_saw(baked: Record, real_settings: Settings) -> None:
    store = LocalStore(real_settings.store)
    found = verify.verify(baked, store, real_settings, Console(width=160))
    result = found.verification
    assert result is not None
    assert [check for check in [*result.checks, *result.suite] if not check.passed] == []
    assert result.result == "passed"
    assert len(result.checks) == len(verify.stages("slurm"))
    assert len(result.suite) > 30
    assert result.timeline is not None
    moments = [moment.name for moment in result.timeline.moments]
    order = [timeline.POWER_ON, "kernel", "userspace", "agent started", timeline.JOINED, timeline.FIRST_JOB]
    assert [name for name in moments if name in order] == order
    assert result.rejoin is not None
    assert result.rejoin.seconds(timeline.JOINED) is not None
    # The record on disk is the one that later stages read.
    assert store.get(baked.tag).verification == result
    evidence = store.folder(baked.tag) / verify.EVIDENCE
    for name in ("console.log", "journal.txt", "cloud-init-status.txt", "suite.xml", "slurmctld.log", "verify.log"):
        assert (evidence / name).stat().st_size > 0, name
    # Nothing that was told to the node may be kept.
    kept = "".join(path.read_text(errors="replace") for path in evidence.iterdir())
    assert re.search(r"bhj_(?!x{43})[A-Za-z0-9_-]{43}", kept) is None


def test_machines_of_two_clouds_join_one_cluster(image: Path, slurm: Cluster, boot_machine: BootMachine) -> None:
    """One has its data from a partition of its disk, as Ironic writes it, the other from the metadata service."""
    metal = boot_machine(
        image, hostname="metal-1", network=slurm.network, firmware="bios", data_source="config-drive-partition",
        disk_size=3 << 30, user_data=userdata.render(slurm.join("metal-1")),
    )  # fmt: skip
    # Without a name in its user-data: it takes the one that its cloud gives it.
    anonymous = userdata.Join((slurm.controller.address,), key=slurm.controller.key)
    server = boot_machine(
        image, hostname="server-1", network=slurm.network, firmware="uefi", data_source="metadata",
        user_data=userdata.render(anonymous),
    )  # fmt: skip
    for node in (metal, server):
        wait_for_join(node)
    done = slurm.controller.run("srun", "--nodes=2", "hostname", timeout=300)
    assert sorted(done.stdout.split()) == ["metal-1", "server-1"]
    metal.wait_for_ssh(JOIN_SECONDS)
    server.wait_for_ssh(JOIN_SECONDS)
    assert metal.ssh("test -d /sys/firmware/efi").returncode != 0
    assert server.ssh("test -d /sys/firmware/efi").returncode == 0
    for node, source in ((metal, "ConfigDrive"), (server, "OpenStack")):
        said = node.ssh("cloud-init status --wait --long").stdout
        assert "status: done" in said
        assert f"DataSource{source}" in said
    check_metadata_is_for_root(slurm, server)
    check_no_copy_of_the_key(slurm, server)
    check_schema(server, slurm)


def check_metadata_is_for_root(slurm: Cluster, server: Machine) -> None:
    """User-data with the key in it stands at the metadata address: jobs must not read it there."""
    address = "http://169.254.169.254/openstack/latest/user_data"
    fetch = f"python3 -c \"import urllib.request as r; print(r.urlopen('{address}', timeout=5).read())\""
    assert server.ssh(fetch).returncode != 0
    assert "join.yaml" in server.ssh(f"sudo {fetch}").stdout
    job = slurm.controller.run("srun", "--nodelist=server-1", "setpriv", "--reuid=1000", "sh", "-c", fetch, timeout=300)
    assert job.returncode != 0


def check_no_copy_of_the_key(slurm: Cluster, server: Machine) -> None:
    key = base64.b64encode(slurm.controller.key).decode()
    # The pattern goes through standard input: a command line would be seen by the search itself.
    done = subprocess.run(
        [*server.login.command, "sudo grep -rlF -f - /etc /var /run /tmp /root /home 2>/dev/null"],
        input=key[:60], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == ""
    listed = server.ssh("ps -eo args").stdout + server.ssh("sudo journalctl --no-pager").stdout
    assert key[:60] not in listed


def check_schema(server: Machine, slurm: Cluster) -> None:
    """cloud-init's own checker has nothing to say against what we render."""
    prefix = [*server.login.command, "sudo"]
    joins = [slurm.join("x"), slurm.join("x", inline=True), userdata.Join(("ctl",), features=("a", "b"))]
    for join in joins:
        userdata.schema_check(prefix, userdata.render(join))


def test_a_clock_that_is_off_is_named_and_joins_once_it_is_right(
    image: Path, slurm: Cluster, boot_machine: BootMachine
) -> None:
    an_hour_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
    node = boot_machine(
        image, hostname="late-1", network=slurm.network, firmware="uefi", data_source="config-drive",
        clock=an_hour_ago, user_data=userdata.render(slurm.join("late-1", inline=True)),
    )  # fmt: skip
    node.wait_for_ssh(JOIN_SECONDS)
    # Not by the console: the kernel may write into the middle of the agent's line.
    node.wait("word about the clock", lambda: "clock" in status(node)["waiting_for"], JOIN_SECONDS)
    said = status(node)
    assert said["state"] == "waiting"
    assert "NTP" in said["hint"] or "timedatectl" in said["hint"]
    assert slurm.controller.node("late-1") == {}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    assert node.ssh(f"sudo date --set {now}").returncode == 0
    wait_for_join(node)
    assert slurm.controller.run("srun", "hostname", timeout=300).stdout.strip() == "late-1"
