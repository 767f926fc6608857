"""The join agent on nodes with RDMA devices, against the FAKE of the kernel's interfaces of tests/support/."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.support.roce_kernel import FAKES, Kernel
from tests.unit.test_agent import KEY, Node, listening, load


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel(tmp_path)
    monkeypatch.setenv("BAKEHOUSE_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", f"{FAKES}:/usr/bin:/bin")
    return made


@pytest.fixture
def node(kernel: Kernel) -> Iterator[Node]:
    machine = Node(kernel.root, 0)
    configure(machine)
    yield machine
    for process in machine.running:
        process.kill()
        process.communicate()


def configure(node: Node, **roce: Any) -> None:
    text = {"platform": "roce", "node": {"name": "node-1"}, **({"roce": roce} if roce else {})}
    node.configure(yaml.safe_dump(text))


def set_up(kernel: Kernel, status: int = 0) -> None:
    assert kernel.load().main(["apply"]) == status


def test_a_node_joins_when_its_device_is_set_up_and_connected(node: Node, kernel: Kernel) -> None:
    node.start()
    status = node.until_waiting_for("no RDMA device has appeared yet")
    assert "bakehouse-roce nics" in status["hint"]
    kernel.add_soft("rxe0", "eth0")
    status = node.until_waiting_for("rxe0 to be set up")
    assert status["hint"] == "systemctl status bakehouse-roce@rxe0"
    kernel.write("sys/class/infiniband/rxe0/ports/1/state", "1: DOWN")
    set_up(kernel)
    status = node.until_waiting_for("a port to become active: rxe0 (DOWN)")
    assert "cable" in status["hint"]
    kernel.write("sys/class/infiniband/rxe0/ports/1/state", "4: ACTIVE")
    status = node.until_joined()
    assert [name for name, _ in status["timeline"]] == ["started", "configured", "devices", "services", "joined"]
    assert (status["platform"], status["node"], status["controller"]) == ("roce", "node-1", "")
    assert node.run("join").returncode == 0


def test_as_many_devices_as_are_wanted(node: Node, kernel: Kernel) -> None:
    configure(node, devices=2)
    kernel.add_nic("eth0")
    kernel.add_rdma("mlx5_0", "eth0")
    kernel.add_rdma("ibp1", "", link_layer="InfiniBand")
    set_up(kernel)
    node.start()
    node.until_waiting_for("1 of 2 RDMA devices are there: mlx5_0")
    kernel.add_nic("eth1", address="0000:03:00.1")
    kernel.add_rdma("mlx5_1", "eth1")
    set_up(kernel)
    node.until_joined()


def test_one_cable_is_enough_for_one_device(node: Node, kernel: Kernel) -> None:
    for number in (0, 1):
        kernel.add_nic(f"eth{number}", address=f"0000:03:00.{number}")
        kernel.add_rdma(f"mlx5_{number}", f"eth{number}")
    kernel.write("sys/class/infiniband/mlx5_1/ports/1/state", "1: DOWN")
    set_up(kernel)
    node.start()
    node.until_joined()
    configure(node, devices=2)
    node.until_waiting_for("a port to become active: mlx5_1 (DOWN)")


def test_a_knob_that_failed_is_said_and_mended(node: Node, kernel: Kernel) -> None:
    kernel.add_nic("eth0")
    kernel.add_rdma("mlx5_0", "eth0")
    kernel.rule("dcb pfc", "ignore")
    set_up(kernel, status=1)
    node.start()
    status = node.until_waiting_for("mlx5_0 is not as wanted: pfc of eth0: wanted 3, is none")
    assert "bakehouse-roce apply" in status["hint"]
    kernel.rule("dcb pfc", "")
    set_up(kernel)
    node.until_joined()


def test_an_mtu_that_the_network_sets_back_is_said(node: Node, kernel: Kernel) -> None:
    kernel.add_soft("rxe0", "eth0")
    set_up(kernel)
    kernel.write("sys/class/net/eth0/mtu", "1500")
    node.start()
    status = node.until_waiting_for("rxe0: the network's configuration set the MTU of eth0 back to 1500")
    assert "networkctl cat eth0" in status["hint"]
    kernel.write("sys/class/net/eth0/mtu", "9000")
    node.until_joined()


def test_a_wrong_roce_configuration_is_said(node: Node, kernel: Kernel) -> None:
    kernel.add_soft("rxe0", "eth0")
    kernel.configure("dscp: 99\n")
    set_up(kernel, status=2)
    node.start()
    node.until_waiting_for("roce.yaml: dscp: 99 is not a whole number from 0 to 63")


def test_a_device_that_goes_is_noticed(node: Node, kernel: Kernel) -> None:
    kernel.add_soft("rxe0", "eth0")
    set_up(kernel)
    node.start()
    node.until_joined()
    kernel.remove_rdma("rxe0")
    configure(node, devices=1)  # wakes the agent up
    node.path("etc/bakehouse/join.yaml").write_text("platform: roce\nnode: {name: node-1}\n# changed\n")
    node.until_waiting_for("no RDMA device has appeared yet")


def test_leaving_and_coming_back(node: Node, kernel: Kernel) -> None:
    kernel.add_soft("rxe0", "eth0")
    set_up(kernel)
    assert node.run("join").returncode == 0
    assert "node-1 has left" in node.run("leave").stdout
    assert node.run("join", "--boot").returncode == 0
    assert node.status()["state"] == "left"
    assert node.run("join").returncode == 0


def test_the_status_says_how_each_device_is(node: Node, kernel: Kernel) -> None:
    kernel.add_soft("rxe0", "eth0")
    kernel.add_rdma("ibp1", "", link_layer="InfiniBand")
    set_up(kernel)
    assert node.run("join").returncode == 0
    found = json.loads(node.run("status", "--json").stdout)["roce"]
    assert set(found) == {"rxe0", "ibp1"}
    assert found["rxe0"]["counts"]["failed"] == 0
    assert found["rxe0"]["counts"]["not supported"] == len(found["rxe0"]["not supported"]) == 8
    assert "pfc" in found["rxe0"]["not supported"]
    out = node.run("status").stdout
    assert "RoCE rxe0    " in out
    assert "the device lacks dcbx, dscp_priority, ecn, ets, pause, pfc, prio_buffer, trust" in out
    assert "left alone: its ports are InfiniBand" in out


def test_a_slurm_node_has_warnings_that_go(kernel: Kernel) -> None:
    kernel.add_nic("eth0")
    kernel.add_rdma("mlx5_0", "eth0")
    kernel.files["net/eth0/mtu"] = 5
    set_up(kernel, status=1)
    with listening() as port:
        node = Node(kernel.root, port)
        node.path("fake/key").write_bytes(KEY)
        node.configure()
        assert node.run("join").returncode == 0
        status = json.loads(node.run("status", "--json").stdout)
        assert status["state"] == "joined"
        wanted = "mlx5_0: mtu of eth0: wanted 9000, is 1500: Input/output error"
        assert any(text.startswith(wanted) for text in status["warnings"])
        assert "warning      mlx5_0: mtu of eth0" in node.run("status").stdout
        kernel.files.clear()
        set_up(kernel)
        assert json.loads(node.run("status", "--json").stdout)["warnings"] == []


def test_a_node_without_rdma_devices_has_none_of_it(node: Node) -> None:
    node.start()
    node.until_waiting_for("no RDMA device")
    assert "roce" not in json.loads(node.run("status", "--json").stdout)
    assert "RoCE" not in node.run("status").stdout


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("platform: roce\nroce: {devices: 0}\n", "roce.devices: '0' is not a whole number from 1"),
        ("platform: roce\nroce: {device: 1}\n", "roce.device: not known; did you mean devices?"),
        ("platform: roce\nsecret: {inline: x}\n", "secret: not known"),
        ("platform: rose\n", "a platform that this agent knows: slurm, kubernetes, roce"),
    ],
)
def test_faults_of_its_configuration(agent: ModuleType, text: str, fault: str) -> None:
    assert any(fault in each for each in agent.parse(text.encode())[1])


def test_nothing_but_the_platform_is_required(agent: ModuleType) -> None:
    config, faults = agent.parse(b"platform: roce\n")
    assert (faults, config.devices) == ([], 1)
    assert agent.parse(b"platform: roce\nroce: {devices: 4}\n")[0].devices == 4


def test_results_of_another_configuration_do_not_count(node: Node, kernel: Kernel) -> None:
    kernel.add_soft("rxe0", "eth0")
    set_up(kernel)
    kernel.configure("dscp: 24\n")
    node.start()
    node.until_waiting_for("rxe0 to be set up as roce.yaml says now")
    set_up(kernel)
    node.until_joined()
