"""RoCE: data that cross a wire by RDMA, between machines booted from the baked image, with the kernel's soft RoCE."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bakehouse import cluster, verify, verify_roce, waiting
from bakehouse.harness import BootMachine
from bakehouse.machine import Machine
from bakehouse.network import Network
from bakehouse.record import Record
from bakehouse.run import Log
from bakehouse.settings import Settings
from bakehouse.store import LocalStore
from bakehouse.verify import JOIN_SECONDS, wait_for_join
from bakehouse.verify_roce import DEVICE, MTU, RoceTrial, captured, report
from tests.integration.conftest import bake, invoking

pytestmark = pytest.mark.slow

COMMAND_SECONDS = 300


@pytest.fixture
def pair(roce_image: Record, real_settings: Settings, tmp_path: Path) -> Iterator[RoceTrial]:
    """A network with one node of the image; the other is the test's."""
    file = LocalStore(real_settings.store).image(roce_image)
    with Log(tmp_path / "network.log") as log, verify.trial(roce_image, file, real_settings, log) as made:
        assert isinstance(made, RoceTrial)
        made.start()
        yield made


def test_two_nodes_reach_each_other_by_rdma(
    roce_image: Record, real_settings: Settings, pair: RoceTrial, boot_machine: BootMachine, tmp_path: Path
) -> None:
    """What verify tries, without the reboot and the suites, and how a node takes changes."""
    node = boot_machine(
        LocalStore(real_settings.store).image(roce_image), hostname="node-1", network=pair.network, firmware="uefi",
        disk_size=4 << 30, user_data=pair.user_data("node-1"),
    )  # fmt: skip
    wait_for_join(node)
    for _, _, do in pair.work(node):
        do()
    said = verify.agents_status(node)
    assert (said["state"], said["platform"], list(said["roce"])) == ("joined", "roce", [DEVICE])
    assert "SecureBoot disabled" in node.ssh("mokutil --sb-state").stdout
    operators_ask_it_over_ssh(pair.network, node, tmp_path)
    a_setting_that_was_lost_shows(node)
    a_setting_that_is_not_there_is_never_silent(node)
    a_changed_configuration_is_applied(node)
    a_device_that_is_plugged_in_again_is_set_up(node)


def wait_for(node: Machine, what: str, fact: Callable[[], bool]) -> None:
    waiting.until(
        what, fact, JOIN_SECONDS, poll=2.0, check=node.check,
        last_words=lambda: node.ssh("sudo journalctl -u 'bakehouse-roce*' --no-pager | tail -n 20").stdout,
    )  # fmt: skip


def knob(node: Machine, name: str) -> dict[str, Any]:
    (found,) = (each for each in report(node) if each["knob"] == name)
    return dict(found)


def operators_ask_it_over_ssh(network: Network, node: Machine, folder: Path) -> None:
    """As with any node of theirs: by a name and an ssh_config(5), as a user who is not root."""
    config = folder / "ssh_config"
    config.write_text(f"Host metal-1\n  HostName {node.login.host}\n{node.login.config(folder)}")
    reach = ["--host", f"{node.login.user}@metal-1", "--ssh-config", str(config)]
    ask = invoking({}, prefix=network.only_network)
    junit = folder / "metal-1.xml"
    done = ask("verify.host", *reach, "--platform", "roce,bare-metal", "--report", str(junit), "--json")
    facts = json.loads(done.stdout)
    assert (done.returncode, [fact for fact in facts if not fact["passed"]]) == (0, []), done.stderr
    assert {fact["name"].partition(":")[0] for fact in facts} == {"node", "bare metal", "roce"}
    assert junit.stat().st_size > 0
    done = ask("roce.report", *reach, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert [device["device"] for device in json.loads(done.stdout)["devices"]] == [DEVICE]


TOS = f"/sys/kernel/config/rdma_cm/{DEVICE}/ports/1/default_roce_tos"


def a_setting_that_was_lost_shows(node: Machine) -> None:
    assert knob(node, "roce_tos")["state"] == "already right"
    node.ssh(f"sudo sh -c 'mkdir -p $(dirname $(dirname $(dirname {TOS}))); echo 0 > {TOS}'")
    lost = knob(node, "roce_tos")
    assert (lost["wanted"], lost["actual"], lost["state"]) == ("106", "0", "failed")
    assert node.ssh("sudo bakehouse-roce report").returncode == 1
    assert node.ssh(f"sudo bakehouse-roce apply {DEVICE}", timeout=COMMAND_SECONDS).returncode == 0
    assert knob(node, "roce_tos")["state"] == "already right"


def a_setting_that_is_not_there_is_never_silent(node: Machine) -> None:
    for name in ("pfc", "ets", "trust", "dcbx"):
        found = knob(node, name)
        assert (found["state"], "Operation not supported" in found["word"]) == ("not supported", True), name
    assert knob(node, "ecn")["state"] == "not supported"


def a_changed_configuration_is_applied(node: Machine) -> None:
    file = "/etc/bakehouse/roce.yaml"
    node.ssh(f"sudo sh -c 'echo dscp: 24 > {file}.new; mv {file}.new {file}'")
    wait_for(node, "changed type of service", lambda: node.ssh(f"sudo cat {TOS}").stdout.strip() == str(24 << 2 | 2))
    node.ssh(f"sudo sh -c 'echo dcsp: 24 > {file}.new; mv {file}.new {file}'")
    done = node.ssh("sudo bakehouse-roce report")
    assert done.returncode == 2
    assert "dcsp" in done.stderr
    assert "dscp" in done.stderr
    node.ssh(f"sudo rm {file}")
    assert node.ssh(f"sudo bakehouse-roce apply {DEVICE}", timeout=COMMAND_SECONDS).returncode == 0


def a_device_that_is_plugged_in_again_is_set_up(node: Machine) -> None:
    node.ssh(f"sudo rdma link delete {DEVICE}")
    wait_for(node, "word of the agent", lambda: verify.agents_status(node).get("state") != "joined")
    node.ssh(f"sudo sh -ec '{verify_roce.SOFT_ROCE}'")
    wait_for(node, "join", lambda: verify.agents_status(node).get("state") == "joined")
    assert knob(node, "roce_tos")["state"] == "already right"


@pytest.mark.long
def test_verify_passes_and_says_what_it_saw(roce_image: Record, real_settings: Settings) -> None:
    store = LocalStore(real_settings.store)
    result = verify.verify(roce_image, store, real_settings, Console(width=160)).verification
    assert result is not None
    assert [check for check in [*result.checks, *result.suite] if not check.passed] == []
    assert result.firmware == "uefi"
    assert len(result.checks) == len(verify.stages("roce"))
    assert {check.name.partition(":")[0] for check in result.suite} == {"node", "bare metal", "roce"}
    assert (store.folder(roce_image.tag) / verify.EVIDENCE / "node-2.log").stat().st_size > 0


WRITE = f"""
ulimit -l
options="-R -d {DEVICE} -s 65536 -n 5 -m 4096"
[ "$SLURMD_NODENAME" = node-1 ] && peer= || peer=node-1
# Where one comes too early, or an emulated node takes too long to answer, both begin again.
for try in $(seq 20); do
    timeout 60 ib_write_bw $options $peer && exit
    sleep 1
done
exit 1
"""
"""A job of two tasks: the one on node-1 takes what the other writes into its memory."""


@pytest.mark.long
def test_slurm_jobs_move_data_by_rdma(real_settings: Settings, tmp_path: Path, boot_machine: BootMachine) -> None:
    """A job over two nodes of slurm-roce. Its tasks may lock memory, as RDMA needs it."""
    record, _ = bake(real_settings, "slurm-roce")
    file = LocalStore(real_settings.store).image(record)
    with Log(tmp_path / "network.log") as log, cluster.up(file, log, mtu=MTU) as made:
        made.controller.start()
        nodes = [
            boot_machine(
                file, hostname=name, network=made.network, firmware="uefi", disk_size=4 << 30,
                user_data=verify_roce.with_soft_roce(made.user_data(name)),
            )
            for name in ("node-1", "node-2")
        ]  # fmt: skip
        for node in nodes:
            wait_for_join(node)
        for node in nodes:
            wait_for(node, "RDMA device", partial(has_device, node))
        assert nodes[0].port is not None
        with captured(made.network, nodes[0].port.device) as seen:
            done = made.controller.run("srun", "--nodes=2", "--ntasks=2", "bash", "-c", WRITE, timeout=COMMAND_SECONDS)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("unlimited") == 2
        data = [packets for packets in seen if not packets.management]
        assert {packets.tos for packets in data} == {106}
        assert sum(packets.number for packets in data) > 5 * 65536 // MTU, "it went by RDMA"
        said = json.loads(nodes[0].ssh("bakehouse-agent status --json").stdout)
        assert (said["state"], said["platform"], list(said["roce"])) == ("joined", "slurm", [DEVICE])


def has_device(node: Machine) -> bool:
    return bool(report(node))
