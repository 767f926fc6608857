"""What a node with RoCE is, whatever else it does. For humans: the names of the tests are the facts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from testinfra.host import Host


@pytest.fixture(scope="module")
def report(host: Host) -> dict[str, Any]:
    """What is set on the node, as it says itself."""
    said: dict[str, Any] = json.loads(host.run("bakehouse-roce report --json").stdout)
    return said


@pytest.fixture(scope="module")
def devices(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The RDMA devices that are set up."""
    return [device for device in report["devices"] if not device["left_alone"]]


def test_there_is_an_rdma_device(devices: list[dict[str, Any]]) -> None:
    assert devices


def test_no_setting_failed(devices: list[dict[str, Any]]) -> None:
    failed = {
        f"{device['device']}: {knob['knob']}": knob["word"]
        for device in devices
        for knob in device["knobs"]
        if knob["state"] == "failed"
    }
    assert failed == {}


def test_each_device_was_set_up_by_its_unit(host: Host, devices: list[dict[str, Any]]) -> None:
    for device in devices:
        unit = f"bakehouse-roce@{device['device']}.service"
        assert host.check_output(f"systemctl show {unit} --property=Result --value") == "success"
        assert host.file(f"/run/bakehouse/roce/{device['device']}.json").exists


def test_connections_are_made_with_roce_v2(devices: list[dict[str, Any]]) -> None:
    for device in devices:
        modes = {knob["actual"] for knob in device["knobs"] if knob["knob"] == "roce_mode"}
        assert modes == {"RoCE v2"}, device["device"]


def test_ports_are_active_and_have_an_address_for_roce_v2(devices: list[dict[str, Any]]) -> None:
    for device in devices:
        active = [port for port in device["ports"] if port["state"] == "ACTIVE"]
        assert active, device["device"]
        assert any(port["gid"] for port in active), device["device"]


def test_memory_may_be_locked_by_who_logs_in(host: Host) -> None:
    assert host.check_output("su - debian -c 'ulimit -l'") == "unlimited"
    assert host.check_output("su - root -c 'ulimit -l'") == "unlimited"


def test_memory_may_be_locked_by_services(host: Host) -> None:
    assert host.check_output("systemctl show --property=DefaultLimitMEMLOCK --value") == "infinity"


def test_devices_have_lasting_names(host: Host) -> None:
    rules = "/usr/lib/udev/rules.d/60-rdma-persistent-naming.rules"
    assert "rdma_rename" in host.file(rules).content_string


def test_the_tools_are_there(host: Host) -> None:
    wanted = ("ibv_devinfo", "rping", "ib_write_bw", "rdma", "dcb", "ethtool")
    assert [program for program in wanted if not host.exists(program)] == []
