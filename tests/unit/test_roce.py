"""The RoCE tool, against a FAKE of the kernel's interfaces (tests/support/roce_kernel.py). No NIC is asked anything."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bakehouse import REPOSITORY
from tests.support.roce_kernel import FAKES, TOOL, VENDOR, Kernel

Knobs = dict[tuple[str, str], dict[str, str]]
SYSTEM = "/usr/sbin:/usr/bin:/sbin:/bin"


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel(tmp_path)
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    return made


@pytest.fixture
def nic(kernel: Kernel) -> Kernel:
    """A machine with one NIC that can do everything."""
    kernel.add_nic("eth0")
    kernel.add_rdma("mlx5_0", "eth0")
    return kernel


def knobs(result: dict[str, Any]) -> Knobs:
    return {(knob["knob"], knob["where"]): knob for knob in result["knobs"]}


def apply(kernel: Kernel, *names: str, status: int = 0) -> None:
    assert kernel.load().main(["apply", *names]) == status


def applied(kernel: Kernel, device: str = "mlx5_0", status: int = 0) -> Knobs:
    apply(kernel, status=status)
    return knobs(kernel.result(device))


def states(found: Knobs) -> dict[str, str]:
    return {name: knob["state"] for (name, _), knob in found.items()}


def report(kernel: Kernel, capsys: pytest.CaptureFixture[str], status: int = 0) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert kernel.load().main(["report", "--json"]) == status
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["devices"]
    return found


# Applied, already right ----------------------------------------------------------------------------------------------


def test_all_is_set_and_reads_back(nic: Kernel) -> None:
    found = applied(nic)
    assert set(states(found).values()) == {"applied", "already right"}
    folder = "sys/kernel/config/rdma_cm/mlx5_0/ports/1"
    assert nic.read(f"{folder}/default_roce_mode") == "RoCE v2"
    assert nic.read(f"{folder}/default_roce_tos") == "106"  # 26 << 2 | ECT(0)
    assert nic.read("sys/class/net/eth0/mtu") == "9000"
    assert found["path_mtu", "port 1"]["actual"] == "4096"
    dcb = nic.dcb("eth0")
    assert dcb["dcbx"] == {"host": True, "ieee": True}
    assert dcb["app"] == {"dscp_prio": [[26, 3]]}
    assert dcb["apptrust"] == {"order": ["dscp"]}
    assert dcb["pfc"]["prio_pfc"] == [prio == 3 for prio in range(8)]
    assert dcb["ets"]["prio_tc"] == [0, 0, 0, 1, 0, 0, 0, 0]
    assert dcb["ets"]["tc_tsa"] == ["ets", "ets"] + ["strict"] * 6
    assert dcb["ets"]["tc_bw"] == [50, 50, 0, 0, 0, 0, 0, 0]
    assert nic.pause("eth0") == {"autonegotiate": False, "rx": False, "tx": False}
    for end in ("np", "rp"):
        enabled = [nic.read(f"sys/class/net/eth0/ecn/roce_{end}/enable/{prio}") for prio in range(8)]
        assert enabled == ["0", "0", "0", "1", "0", "0", "0", "0"]
    assert nic.read("proc/sys/net/ipv4/neigh/default/gc_thresh3") == "16384"
    assert nic.read("proc/sys/net/ipv4/tcp_ecn") == "1"
    assert nic.read("sys/devices/system/cpu/cpufreq/policy1/scaling_governor") == "performance"


def test_a_second_run_changes_nothing(nic: Kernel) -> None:
    apply(nic)
    before = len(nic.log())
    assert set(states(applied(nic)).values()) == {"already right"}
    assert [call for call in nic.log()[before:] if " set " in call or "-A" in call or " replace " in call] == []


def test_each_knob_says_what_is_wanted_and_what_is(nic: Kernel) -> None:
    found = applied(nic)
    assert found["ets", "eth0"]["wanted"] == "TC0 (prio 0,1,2,4,5,6,7) ets 50%; TC1 (prio 3) ets 50%"
    assert found["ecn", "eth0"]["actual"] == "np 1 rp 1"
    assert found["prio_buffer", "eth0"]["wanted"] == "left to the driver"
    assert all(knob["wanted"] and knob["actual"] for knob in found.values())


def test_dcb_is_read_in_one_start(nic: Kernel) -> None:
    apply(nic)
    before = len(nic.log())
    apply(nic)
    assert [call for call in nic.log()[before:] if call.startswith("dcb")] == ["dcb batch"]


def test_a_larger_neighbour_table_stays(nic: Kernel) -> None:
    nic.write("proc/sys/net/ipv4/neigh/default/gc_thresh1", "100000")
    assert states(applied(nic))["net.ipv4.neigh.default.gc_thresh1"] == "already right"


def test_other_dscps_keep_their_priority(nic: Kernel) -> None:
    nic.set_dcb("eth0", app={"dscp_prio": [[26, 2], [46, 5]], "default_prio": [0]})
    assert states(applied(nic))["dscp_priority"] == "applied"
    assert nic.dcb("eth0")["app"] == {"dscp_prio": [[26, 3], [46, 5]], "default_prio": [0]}


def test_shares_of_classes_that_do_not_share_mean_nothing(nic: Kernel) -> None:
    """Some drivers report 100 for strict classes."""
    apply(nic)
    ets = nic.dcb("eth0")["ets"]
    nic.set_dcb("eth0", ets={**ets, "tc_bw": [50, 50] + [100] * 6, "tc_tsa": ["ets", "ets"] + ["vendor"] * 6})
    assert states(applied(nic))["ets"] == "already right"


# Not supported -------------------------------------------------------------------------------------------------------


def test_soft_roce_has_no_dcb_and_says_so(kernel: Kernel) -> None:
    kernel.add_soft("rxe0", "eth0")
    found = applied(kernel, "rxe0")
    for name in ("dcbx", "dscp_priority", "trust", "ets", "prio_buffer", "pfc"):
        assert found[name, "eth0"]["state"] == "not supported"
        assert found[name, "eth0"]["word"] == "Attribute read: Operation not supported"
    assert found["pause", "eth0"]["word"] == "netlink error: Operation not supported"
    assert found["ecn", "eth0"]["word"].startswith("No such file or directory: /sys/class/net/eth0/ecn/")
    assert states(found)["roce_mode"] == states(found)["roce_tos"] == states(found)["mtu"] == "applied"
    assert kernel.result("rxe0")["driver"] == "rxe"


@pytest.mark.parametrize(
    ("name", "knob"),
    [("dcbx", "dcbx"), ("app", "dscp_priority"), ("ets", "ets"), ("buffer", "prio_buffer"), ("pfc", "pfc")],
)
def test_what_a_driver_lacks_is_not_supported_and_the_rest_is_set(nic: Kernel, name: str, knob: str) -> None:
    nic.set_dcb("eth0", **{name: None})
    found = applied(nic)
    assert found[knob, "eth0"]["state"] == "not supported"
    assert found[knob, "eth0"]["word"] == "Attribute not found: Success"
    assert [each for each in states(found).values() if each == "not supported"] == ["not supported"]


def test_a_dcb_from_before_a_knob_says_so(nic: Kernel) -> None:
    nic.rule("dcb apptrust", "unknown")
    assert 'Object "apptrust" is unknown' in applied(nic)["trust", "eth0"]["word"]


def test_what_a_driver_refuses_to_do_at_all_is_not_supported(nic: Kernel) -> None:
    nic.rule("dcb ets", f"refuse {errno.EOPNOTSUPP}")
    found = applied(nic)["ets", "eth0"]
    assert found["state"] == "not supported"
    assert found["word"].endswith("Operation not supported")


@pytest.mark.skipif(not shutil.which("dcb", path=SYSTEM), reason="iproute2 is not installed")
def test_the_real_dcb_is_understood_when_it_refuses(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """No interface here knows DCB; that much of the fake can be compared."""
    monkeypatch.setenv("PATH", SYSTEM)
    tool = kernel.load()
    for interface, word in (("lo", "Operation not supported"), ("nope", "No such device")):
        dcb = tool.Dcb(interface)
        for name in ("dcbx", "app", "ets", "buffer", "pfc"):
            with pytest.raises((tool.NotSupported, tool.Trouble)) as caught:
                dcb.show(name)
            assert caught.value.word == f"Attribute read: {word}"


def test_one_traffic_class_is_too_few(nic: Kernel) -> None:
    nic.set_dcb("eth0", ets={**nic.dcb("eth0")["ets"], "ets_cap": 1})
    assert "ets-cap 1" in applied(nic)["ets", "eth0"]["word"]


def test_without_the_vendors_files_ecn_is_the_firmwares(nic: Kernel) -> None:
    (nic.root / "sys/class/net/eth0/ecn").rename(nic.root / "fake/ecn")
    nic.write("sys/kernel/debug/mlx5/0000:03:00.0/cc_params/np_cnp_dscp", "48")
    nic.write("sys/kernel/debug/mlx5/0000:03:00.0/cc_params/np_cnp_prio", "6")
    found = applied(nic)["ecn", "eth0"]
    assert (found["state"], found["actual"]) == ("not supported", "np_cnp_dscp 48 np_cnp_prio 6")


def test_the_trust_of_mlx5_comes_with_the_dscp(nic: Kernel) -> None:
    nic.set_dcb("eth0", apptrust=None)
    found = applied(nic)["trust", "eth0"]
    assert found["state"] == "not supported"
    assert "trusts DSCP as soon as a DSCP has a priority" in found["word"]


def test_a_vendors_tool_does_what_the_kernel_lacks(nic: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    nic.set_dcb("eth0", apptrust=None)
    nic.path("fake/trust").write_text("pcp")
    monkeypatch.setenv("PATH", f"{VENDOR}:{nic.environment['PATH']}")
    assert applied(nic)["trust", "eth0"]["state"] == "applied"
    assert nic.read("fake/trust") == "dscp"
    assert applied(nic)["trust", "eth0"]["state"] == "already right"
    nic.path("fake/trust").write_text("pcp")
    nic.configure("vendor_tools: false\n")
    assert applied(nic)["trust", "eth0"]["state"] == "not supported"


def test_an_mtu_that_an_interface_cannot_have_is_not_supported(nic: Kernel) -> None:
    nic.files["net/eth0/mtu"] = errno.EINVAL
    found = applied(nic, status=1)
    assert found["mtu", "eth0"]["state"] == "not supported"
    assert found["mtu", "eth0"]["word"] == "Invalid argument: the interface does not take an MTU of 9000"
    assert found["path_mtu", "port 1"]["state"] == "failed", "the path MTU is less than wanted: not silent"
    assert found["path_mtu", "port 1"]["actual"] == "1024"


def test_a_machine_whose_frequency_nobody_can_choose(nic: Kernel) -> None:
    (nic.root / "sys/devices/system/cpu/cpufreq").rename(nic.root / "fake/cpufreq")
    found = applied(nic)["governor", "machine"]
    assert (found["state"], found["word"]) == (
        "not supported", "No such file or directory: /sys/devices/system/cpu/cpufreq/policy*",
    )  # fmt: skip


def test_a_sysctl_that_a_kernel_lacks(nic: Kernel) -> None:
    (nic.root / "proc/sys/vm/zone_reclaim_mode").unlink()
    assert states(applied(nic))["vm.zone_reclaim_mode"] == "not supported"


# Failed --------------------------------------------------------------------------------------------------------------

REFUSALS = [("app", "dscp_priority"), ("apptrust", "trust"), ("ets", "ets"), ("pfc", "pfc")]


@pytest.mark.parametrize(("name", "knob"), REFUSALS)
def test_what_a_driver_refuses_failed_with_its_word_and_a_hint(nic: Kernel, name: str, knob: str) -> None:
    nic.rule(f"dcb {name}", f"refuse {errno.EINVAL}")
    found = applied(nic, status=1)[knob, "eth0"]
    assert found["state"] == "failed"
    assert found["word"] == "Error when attempting to set attribute: Invalid argument"
    assert "firmware" in found["hint"]


def test_firmware_that_keeps_dcbx_is_named(nic: Kernel) -> None:
    nic.rule("dcb dcbx", f"refuse {errno.EPERM}")
    found = applied(nic, status=1)["dcbx", "eth0"]
    assert (found["state"], found["actual"]) == ("failed", "lld-managed cee ieee")
    assert "Operation not permitted" in found["word"]
    assert "firmware" in found["hint"]


@pytest.mark.parametrize(("name", "knob"), [*REFUSALS, ("dcbx", "dcbx")])
def test_what_is_silently_not_taken_failed(nic: Kernel, name: str, knob: str) -> None:
    nic.rule(f"dcb {name}", "ignore")
    found = applied(nic, status=1)[knob, "eth0"]
    assert found["state"] == "failed"
    assert "another one reads back" in found["word"]
    assert found["actual"] != found["wanted"]
    assert found["hint"]


@pytest.mark.parametrize(
    ("end", "knob", "where"),
    [
        ("default_roce_mode", "roce_mode", "port 1"),
        ("default_roce_tos", "roce_tos", "port 1"),
        ("net/eth0/mtu", "mtu", "eth0"),
        ("roce_rp/enable/3", "ecn", "eth0"),
        ("ipv6/neigh/default/gc_thresh2", "net.ipv6.neigh.default.gc_thresh2", "machine"),
        ("tcp_ecn", "net.ipv4.tcp_ecn", "machine"),
        ("policy1/scaling_governor", "governor", "machine"),
    ],
)
@pytest.mark.parametrize("what", ["ignore", errno.EIO])
def test_files_of_the_kernel_that_do_not_take_a_value(
    nic: Kernel, end: str, knob: str, where: str, what: int | str
) -> None:
    nic.files[end] = what
    found = applied(nic, status=1)[knob, where]
    assert found["state"] == "failed"
    assert ("Input/output error" if what == errno.EIO else "another one reads back") in found["word"]
    assert found["hint"]


def test_pause_frames_that_stay_on(nic: Kernel) -> None:
    nic.rule("ethtool", "ignore")
    assert applied(nic, status=1)["pause", "eth0"]["actual"] == "rx on tx on"
    nic.rule("ethtool", f"refuse {errno.EINVAL}")
    assert applied(nic, status=1)["pause", "eth0"]["word"] == "netlink error: Invalid argument"


def test_negotiated_pause_frames_are_no_longer_negotiated(nic: Kernel) -> None:
    nic.change("ethtool.json", "eth0", {"pause": {"autonegotiate": True, "rx": True, "tx": False}})
    apply(nic)
    assert nic.pause("eth0") == {"autonegotiate": False, "rx": False, "tx": False}


def test_a_nic_whose_path_mtu_is_small(nic: Kernel) -> None:
    nic.rule("max_mtu", 2048)
    found = applied(nic, status=1)["path_mtu", "port 1"]
    assert (found["state"], found["actual"]) == ("failed", "2048")
    assert "max_mtu" in found["hint"]


def test_limits_that_nobody_has_raised(nic: Kernel) -> None:
    nic.write("etc/security/limits.d/rdma.conf", "* - memlock unlimited\n* soft memlock 64\n@x - memlock unlimited\n")
    nic.write("etc/systemd/system.conf.d/rdma.conf", "[Manager]\n#DefaultLimitMEMLOCK=infinity\n")
    found = applied(nic, status=1)
    pam, systemd = found["memlock_pam", "machine"], found["memlock_systemd", "machine"]
    assert (pam["state"], pam["actual"]) == ("failed", "* 64/unlimited root default")
    assert "'root - memlock unlimited'" in pam["hint"]
    assert (systemd["state"], systemd["actual"]) == ("failed", "8M")
    assert "DefaultLimitMEMLOCK=infinity" in systemd["hint"]


def test_later_files_of_systemd_win(nic: Kernel) -> None:
    nic.write("usr/lib/systemd/system.conf.d/zz.conf", "[Manager]\nDefaultLimitMEMLOCK=1G:2G\n")
    assert applied(nic, status=1)["memlock_systemd", "machine"]["actual"] == "1G:2G"
    nic.write("etc/systemd/system.conf.d/zz.conf", "# hides the other")
    assert applied(nic)["memlock_systemd", "machine"]["state"] == "already right"


@pytest.mark.parametrize(
    ("program", "knob", "package"),
    [("dcb", "pfc", "iproute2"), ("ethtool", "pause", "ethtool"), ("ibv_devinfo", "path_mtu", "ibverbs-utils")],
)
def test_a_missing_tool_failed_with_its_package(
    nic: Kernel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, knob: str, package: str
) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for name in {path.name for path in FAKES.iterdir()} - {program}:
        (few / name).symlink_to(FAKES / name)
    (few / "cat").symlink_to("/bin/cat")
    (few / "mkdir").symlink_to("/bin/mkdir")
    monkeypatch.setenv("PATH", str(few))
    found = [each for (name, _), each in applied(nic, status=1).items() if name == knob]
    assert found[0]["state"] == "failed"
    assert found[0]["word"] == f"{program}: No such file or directory"
    assert package in found[0]["hint"]


@pytest.mark.parametrize("how", ["silent", "garbage"])
def test_a_dcb_that_answers_in_another_form(nic: Kernel, how: str) -> None:
    nic.rule("dcb pfc", how)
    found = applied(nic, status=1)
    assert "what is not understood" in found["pfc", "eth0"]["word"]
    assert found["ets", "eth0"]["state"] == "applied", "the others are asked for one by one"


def test_rdma_cm_that_is_not_there(nic: Kernel) -> None:
    nic.write("fake/no-rdma-cm", "")
    found = applied(nic, status=1)["roce_mode", "port 1"]
    assert (found["state"], found["word"]) == ("failed", "No such file or directory: /sys/kernel/config/rdma_cm")
    assert "modprobe rdma_cm" in found["hint"]
    assert "mount -t configfs none" in "\n".join(nic.log())


def test_a_device_that_rdma_cm_does_not_know(nic: Kernel) -> None:
    tool = nic.load()

    def unknown(path: str) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), path)

    tool.make_folder = unknown  # type: ignore[attr-defined]
    assert tool.main(["apply"]) == 1
    assert "No such device" in knobs(nic.result("mlx5_0"))["roce_tos", "port 1"]["word"]


def test_a_port_without_an_interface(nic: Kernel) -> None:
    nic.add_rdma("rocep9", "", port=1)
    assert states(applied(nic, "rocep9", status=1))["netdev"] == "failed"


# Devices -------------------------------------------------------------------------------------------------------------


def test_infiniband_is_left_alone_and_said_so(nic: Kernel, capsys: pytest.CaptureFixture[str]) -> None:
    nic.add_rdma("ibp1s0", "", link_layer="InfiniBand")
    apply(nic)
    result = nic.result("ibp1s0")
    assert (result["left_alone"], result["knobs"]) == ("its ports are InfiniBand, not Ethernet", [])
    assert "ibp1s0: left alone: its ports are InfiniBand" in capsys.readouterr().out
    assert not (nic.root / "run/bakehouse/roce/ibp1s0.env").exists()


def test_one_port_of_each_kind(nic: Kernel) -> None:
    nic.add_rdma("mlx5_0", "", link_layer="InfiniBand", port=2)
    apply(nic)
    result = nic.result("mlx5_0")
    assert result["notes"] == ["port 2 is InfiniBand: left alone"]
    assert ("roce_mode", "port 1") in knobs(result)
    assert ("roce_mode", "port 2") not in knobs(result)


def test_iwarp_is_left_alone(nic: Kernel) -> None:
    nic.write("sys/class/infiniband/mlx5_0/node_type", "4: RNIC")
    apply(nic)
    assert nic.result("mlx5_0")["left_alone"] == "it speaks iWARP, not RoCE"


def test_two_devices_on_one_nic_are_set_each(nic: Kernel) -> None:
    nic.add_nic("eth1", address="0000:03:00.1")
    nic.add_rdma("mlx5_1", "eth1")
    apply(nic)
    for device, interface in (("mlx5_0", "eth0"), ("mlx5_1", "eth1")):
        found = knobs(nic.result(device))
        assert found["pfc", interface]["state"] == "applied"
        assert nic.dcb(interface)["pfc"]["prio_pfc"][3] is True
    assert states(knobs(nic.result("mlx5_1")))["net.ipv4.tcp_ecn"] == "already right", "the first has set it"


def test_two_ports_of_one_device(kernel: Kernel) -> None:
    kernel.add_nic("eth0", driver="mlx4_core", port=0)
    kernel.add_nic("eth1", driver="mlx4_core", port=1)
    kernel.add_rdma("mlx4_0", "eth0", port=1)
    kernel.add_rdma("mlx4_0", "eth1", port=2)
    for port in (1, 2):
        for file in (kernel.root / f"sys/class/infiniband/mlx4_0/ports/{port}/gid_attrs/ndevs").iterdir():
            file.write_text("")  # then the port's number tells
    result = kernel.load().Device("mlx4_0").about()
    assert [port["netdev"] for port in result["ports"]] == ["eth0", "eth1"]


def test_a_bonds_members_get_what_is_of_ports(kernel: Kernel) -> None:
    for number in (0, 1):
        kernel.add_nic(f"eth{number}", address=f"0000:03:00.{number}")
    kernel.write("sys/class/net/bond0/mtu", "1500")
    kernel.write("sys/class/net/bond0/bonding/slaves", "eth0 eth1")
    kernel.add_rdma("mlx5_bond_0", "bond0")
    (kernel.root / "sys/class/infiniband/mlx5_bond_0/device").unlink()
    (kernel.root / "sys/class/infiniband/mlx5_bond_0/device").symlink_to(
        (kernel.root / "sys/class/net/eth0/device").resolve()
    )
    found = applied(kernel, "mlx5_bond_0")
    assert {where for name, where in found if name == "pfc"} == {"eth0", "eth1"}
    assert {where for name, where in found if name == "mtu"} == {"bond0"}
    assert kernel.read("sys/class/net/eth1/mtu") == "9000"


def test_a_member_gets_its_mtu_from_the_bond(nic: Kernel) -> None:
    nic.write("sys/class/net/bond0/mtu", "1500")
    nic.write("sys/class/net/bond0/bonding/slaves", "eth0")
    (nic.root / "sys/class/net/eth0/master").symlink_to(nic.root / "sys/class/net/bond0")
    found = applied(nic)
    assert [where for name, where in found if name == "mtu"] == ["bond0", "eth0"]
    assert found["mtu", "eth0"]["state"] == "already right"


def test_vlans_get_the_mtu_too(nic: Kernel) -> None:
    nic.write("sys/class/net/vlan7/mtu", "1500")
    nic.write("sys/class/net/vlan7/uevent", "DEVTYPE=vlan\nINTERFACE=vlan7")
    nic.write("sys/class/net/br0/uevent", "DEVTYPE=bridge")
    for name in ("vlan7", "br0"):
        (nic.root / f"sys/class/net/eth0/upper_{name}").symlink_to(nic.root / f"sys/class/net/{name}")
    found = applied(nic)
    assert [where for name, where in found if name == "mtu"] == ["eth0", "vlan7"]
    assert nic.read("sys/class/net/vlan7/mtu") == "9000"


def test_a_device_that_is_plugged_in_later_is_set_alone(nic: Kernel) -> None:
    apply(nic, "mlx5_0")
    nic.add_nic("eth1", address="0000:04:00.0")
    nic.add_rdma("mlx5_1", "eth1")
    before = nic.result("mlx5_0")
    apply(nic, "mlx5_1")
    assert states(knobs(nic.result("mlx5_1")))["pfc"] == "applied"
    assert nic.result("mlx5_0") == before


def test_results_go_with_their_device(nic: Kernel) -> None:
    apply(nic)
    nic.rename_rdma("mlx5_0", "rocep3s0")
    apply(nic, "rocep3s0")
    assert sorted(path.name for path in (nic.root / "run/bakehouse/roce").iterdir()) == [
        ".lock", "rocep3s0.env", "rocep3s0.json",
    ]  # fmt: skip
    nic.remove_rdma("rocep3s0")
    apply(nic)
    assert [path.name for path in (nic.root / "run/bakehouse/roce").iterdir()] == [".lock"]


def test_a_device_that_is_not_there(nic: Kernel, capsys: pytest.CaptureFixture[str]) -> None:
    apply(nic, "mlx5_7", status=1)
    assert "there is no RDMA device mlx5_7" in capsys.readouterr().err
    nic.remove_rdma("mlx5_0")
    apply(nic)
    assert "there is no RDMA device" in capsys.readouterr().out


def test_devices_that_the_configuration_leaves_out(nic: Kernel) -> None:
    nic.configure("devices: {include: ['mlx5_*', roce*], exclude: [mlx5_0]}\n")
    apply(nic)
    assert nic.result("mlx5_0")["left_alone"] == "devices in roce.yaml leave it out"
    assert nic.dcb("eth0")["app"] == {}


# Configuration -------------------------------------------------------------------------------------------------------


def test_a_changed_configuration_is_applied(nic: Kernel) -> None:
    apply(nic)
    nic.configure(
        "dscp: 24\npriority: 5\necn: false\nmtu: 4200\nets: {share: 70, traffic_class: 2}\ngovernor: false\n"
        "buffers: {prio_buffer: {5: 1}, buffer_size: {1: 200000}}\ntrust: pcp\nsysctl: {net.ipv4.tcp_ecn: 2}\n"
    )
    found = applied(nic)
    assert set(states(found).values()) == {"applied", "already right"}
    assert nic.read("sys/kernel/config/rdma_cm/mlx5_0/ports/1/default_roce_tos") == "96"
    dcb = nic.dcb("eth0")
    assert dcb["app"]["dscp_prio"] == [[24, 5], [26, 3]]
    assert dcb["pfc"]["prio_pfc"] == [prio == 5 for prio in range(8)]
    assert (dcb["ets"]["prio_tc"][5], dcb["ets"]["tc_bw"][:3]) == (2, [30, 0, 70])
    assert (dcb["buffer"]["prio_buffer"][5], dcb["buffer"]["buffer_size"][1]) == (1, 200000)
    assert dcb["apptrust"]["order"] == ["pcp"]
    assert found["path_mtu", "port 1"]["actual"] == "4096"
    assert found["ecn", "eth0"]["actual"] == "np 0 rp 0"
    assert nic.read("proc/sys/net/ipv4/tcp_ecn") == "2"
    assert ("governor", "machine") not in found


def test_what_is_to_be_left_alone_is(nic: Kernel) -> None:
    nic.configure("ets: false\ndcbx: leave\npfc: false\nsysctl: false\nmemlock: false\nbuffers: false\n")
    found = applied(nic)
    left = {name for (name, _), knob in found.items() if knob["wanted"] in {"left alone", "left to the driver"}}
    assert left == {"dcbx", "pause", "ets", "prio_buffer"}
    assert nic.dcb("eth0")["dcbx"]["lld_managed"]
    assert nic.pause("eth0")["rx"]
    assert found["pfc", "eth0"]["actual"] == "none"
    assert not [where for _, where in found if where == "machine" and _ != "governor"]


def test_a_configuration_that_changes_meanwhile_is_applied_too(nic: Kernel) -> None:
    nic.configure("dscp: 24\n")
    tool = nic.load()
    first = tool.load

    def load() -> Any:
        found = first()
        tool.load = first  # type: ignore[attr-defined]
        nic.configure("dscp: 26\nmtu: 4200\n")
        return found

    tool.load = load  # type: ignore[attr-defined]
    assert tool.main(["apply"]) == 0
    assert nic.read("sys/class/net/eth0/mtu") == "4200"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("dscp: 64", "dscp: 64 is not a whole number from 0 to 63"),
        ("dscp: '26'", "dscp: '26' is not a whole number from 0 to 63"),
        ("dscp: true", "dscp: True is not a whole number from 0 to 63"),
        ("priority: 8", "priority: 8 is not a whole number from 0 to 7"),
        ("ecn: maybe", "ecn: 'maybe' is not true or false"),
        ("mode: RoCE v3", "mode: 'RoCE v3' is not RoCE v2 or IB/RoCE v1"),
        ("mtu: 90000", "mtu: 90000 is not a whole number from 1280 to 65535"),
        ("trust: vlan", "trust: 'vlan' is not dscp or pcp"),
        ("dcbx: firmware", "dcbx: 'firmware' is not host or leave"),
        ("ets: {share: 100}", "ets.share: 100 is not a whole number from 1 to 99"),
        ("ets: {shares: 50}", "ets.shares: not known; did you mean share?"),
        ("ets: 50", "ets: must be false, or a mapping with share, traffic_class"),
        ("buffers: {prio_buffer: {9: 1}}", "buffers.prio_buffer: {9: 1} is not a mapping from numbers 0 to 7"),
        ("buffers: {buffer_size: [1]}", "buffers.buffer_size: [1] is not a mapping"),
        ("governor: On Demand", "governor: 'On Demand' is not false, or a governor such as performance"),
        ("governor: true", "governor: True is not false, or a governor"),
        ("sysctl: {net.ipv4.tcp_ecm: 1}", "sysctl.net.ipv4.tcp_ecm: not known; did you mean net.ipv4.tcp_ecn?"),
        ("devices: {include: mlx5_0}", "devices.include: 'mlx5_0' is not a list of device names"),
        ("devices: [mlx5_0]", "devices: must be a mapping with include, exclude"),
        ("dcsp: 26", "dcsp: not known; did you mean dscp?"),
        ("xyzzy: 26", "xyzzy: not known; one of dscp, priority"),
        ("dscp: 1\ndscp: 2", "line 2: dscp stands here a second time"),
        ("dscp: [", "line 2: not YAML"),
        ("dscp: 2001-99-99", "not YAML"),
        ("[a]: 1", "not YAML"),
        ("- dscp", "the file: must be a mapping"),
        ("#" * 70000, "the file has more than 64 KiB"),
    ],
)
def test_a_fault_is_named_with_its_key(nic: Kernel, capsys: pytest.CaptureFixture[str], text: str, fault: str) -> None:
    nic.configure(text)
    apply(nic, status=2)
    assert fault in capsys.readouterr().err
    result = nic.result("mlx5_0")
    assert fault in result["faults"][0]
    assert result["knobs"] == []
    assert nic.dcb("eth0")["app"] == {}, "nothing is set by halves"
    assert nic.load().main(["report"]) == 2
    assert nic.load().main(["check"]) == 2


def test_all_faults_come_at_once_and_go_when_mended(nic: Kernel, capsys: pytest.CaptureFixture[str]) -> None:
    nic.configure("dscp: 99\npriority: x\nfoo: 1\n")
    apply(nic, status=2)
    assert len(nic.result("mlx5_0")["faults"]) == 3
    assert "roce.yaml: dscp" in capsys.readouterr().err
    nic.configure("dscp: 24\n")
    apply(nic)
    assert nic.result("mlx5_0")["faults"] == []


def test_a_configuration_that_cannot_be_read(nic: Kernel, capsys: pytest.CaptureFixture[str]) -> None:
    nic.path("etc/bakehouse/roce.yaml").write_bytes(b"dscp: \xff")
    apply(nic, status=2)
    assert "byte 6: the file is not UTF-8 text" in capsys.readouterr().err
    (nic.root / "etc/bakehouse/roce.yaml").unlink()
    (nic.root / "etc/bakehouse/roce.yaml").mkdir()
    apply(nic, status=2)
    assert "cannot be read: Is a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "---\n", "dscp:\nets:\n", "ets: {share: }\nsysctl: {}\nbuffers: {}\n"]
)
def test_nothing_that_is_said_is_the_default(nic: Kernel, text: str) -> None:
    tool = nic.load()
    found, faults = tool.parse(text)
    assert faults == []
    assert {**vars(tool.Settings()), "ets": tool.Settings.ets, "buffers": None} | vars(found) == {
        **vars(tool.Settings()), "ets": tool.Settings.ets, "buffers": None, "include": ("*",), "exclude": (),
    }  # fmt: skip


GOOD = st.fixed_dictionaries(
    {},
    optional={
        "dscp": st.integers(0, 63),
        "priority": st.integers(0, 7),
        "ecn": st.booleans(),
        "mtu": st.integers(1280, 9216),
        "pfc": st.booleans(),
        "trust": st.sampled_from(["dscp", "pcp"]),
        "ets": st.just(False) | st.fixed_dictionaries({}, optional={
            "share": st.integers(1, 99), "traffic_class": st.integers(1, 7),
        }),
        "buffers": st.fixed_dictionaries({}, optional={
            "prio_buffer": st.dictionaries(st.integers(0, 7), st.integers(0, 7), min_size=1),
        }),
        "devices": st.fixed_dictionaries({}, optional={"exclude": st.lists(st.sampled_from(["a*", "mlx5_?"]))}),
    },
)  # fmt: skip


@pytest.fixture(scope="module")
def tool(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The tool, for what needs no machine."""
    return Kernel(tmp_path_factory.mktemp("root")).load()


@settings(deadline=None)
@given(GOOD)
def test_what_is_right_is_taken_as_it_is(tool: ModuleType, document: dict[str, Any]) -> None:
    found, faults = tool.parse(yaml.safe_dump(document))
    assert faults == []
    assert 0 <= found.tos <= 255
    assert found.tos >> 2 == document.get("dscp", 26)
    assert found.tos & 3 == (2 if document.get("ecn", True) else 0)
    assert found.path_mtu in {256, 512, 1024, 2048, 4096}
    assert found.path_mtu + 96 <= found.mtu


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 100000) | st.text(max_size=12) | st.sampled_from(["dscp", "host"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["dscp", "ets", "share", "buffers", "prio_buffer", "devices", "include", "sysctl", "x"])
        | st.integers(0, 9), inner, max_size=4,
    ),
    max_leaves=10,
)  # fmt: skip


@settings(deadline=None)
@given(ANYTHING)
def test_whatever_is_given_is_taken_or_named(tool: ModuleType, document: Any) -> None:
    found, faults = tool.parse(yaml.safe_dump(document))
    assert all(isinstance(fault, str) and fault and "\n" not in fault for fault in faults)
    if not faults:
        assert type(found.dscp) is int
        assert found.ets is None or set(found.ets) == {"share", "traffic_class"}


@given(st.text(max_size=60))
def test_any_text_is_read_or_named(tool: ModuleType, text: str) -> None:
    _, faults = tool.parse(text)
    assert all(faults)


@given(st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.lists(st.booleans(), max_size=8))))
def test_objects_in_a_row_are_read_with_and_without_commas(tool: ModuleType, values: list[Any]) -> None:
    for between in (",", "\n", " ,\n", ""):
        assert tool.objects_in(between.join(json.dumps(value) for value in values) + "\n") == values


@given(st.lists(st.tuples(st.integers(1, 9), st.lists(st.sampled_from(["Attribute read: X", "Attribute not found"])))))
def test_refusals_belong_to_their_lines(tool: ModuleType, lines: list[tuple[int, list[str]]]) -> None:
    said = "".join("".join(f"{word}\n" for word in words) + f"Command failed -:{line}\n" for line, words in lines)
    assert tool.refusals(said) == {line: "; ".join(words) or "Command failed" for line, words in lines}


SHARES = st.lists(st.integers(0, 100), min_size=8, max_size=8)


@given(
    st.lists(st.integers(0, 7), min_size=8, max_size=8),
    st.lists(st.sampled_from(["ets", "strict"]), min_size=8, max_size=8),
    SHARES,
    SHARES,
)
def test_shares_are_the_same_where_they_mean_the_same(
    tool: ModuleType, prio_tc: list[int], tsa: list[str], one: list[int], other: list[int]
) -> None:
    mixed = [one[tc] if tc in prio_tc and tsa[tc] == "ets" else other[tc] for tc in range(8)]
    assert tool.ets_text(prio_tc, tsa, one) == tool.ets_text(prio_tc, tsa, mixed)


# Report --------------------------------------------------------------------------------------------------------------


def test_the_report_says_what_is_now_and_what_was(nic: Kernel, capsys: pytest.CaptureFixture[str]) -> None:
    apply(nic)
    (device,) = report(nic, capsys)
    assert {knob["state"] for knob in device["knobs"]} == {"already right"}
    assert {knob["at_apply"] for knob in device["knobs"]} == {"applied", "already right"}
    assert device["applied"] == nic.result("mlx5_0")["time"]


def test_the_report_changes_nothing(nic: Kernel, capsys: pytest.CaptureFixture[str]) -> None:
    def everything() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in nic.root.rglob("*") if path.is_file() and path.name != "log"}

    before = everything()
    (device,) = report(nic, capsys, status=1)
    assert everything() == before
    wrong = {knob["knob"] for knob in device["knobs"] if knob["state"] == "failed"}
    assert {"roce_mode", "roce_tos", "mtu", "path_mtu", "dcbx", "pause", "pfc", "ets", "ecn", "governor"} <= wrong
    assert all(knob["hint"] for knob in device["knobs"] if knob["state"] == "failed")


Change = Callable[[Kernel], None]
DRIFTS: list[tuple[str, Change]] = [
    ("mtu", lambda kernel: kernel.write("sys/class/net/eth0/mtu", "1500")),
    ("roce_tos", lambda kernel: kernel.write("sys/kernel/config/rdma_cm/mlx5_0/ports/1/default_roce_tos", "0")),
    ("pfc", lambda kernel: kernel.set_dcb("eth0", pfc={"prio_pfc": [True] * 8})),
    ("trust", lambda kernel: kernel.set_dcb("eth0", apptrust={"order": []})),
    ("dcbx", lambda kernel: kernel.set_dcb("eth0", dcbx={"lld_managed": True, "ieee": True})),
    ("dscp_priority", lambda kernel: kernel.set_dcb("eth0", app={"dscp_prio": [[26, 3], [26, 4]]})),
    ("pause", lambda kernel: kernel.change("ethtool.json", "eth0", {"pause": {"rx": True, "tx": False}})),
    ("ecn", lambda kernel: kernel.write("sys/class/net/eth0/ecn/roce_np/enable/3", "0")),
    ("net.ipv4.tcp_ecn", lambda kernel: kernel.write("proc/sys/net/ipv4/tcp_ecn", "0")),
    ("governor", lambda kernel: kernel.write("sys/devices/system/cpu/cpufreq/policy0/scaling_governor", "powersave")),
]


@pytest.mark.parametrize(("knob", "change"), DRIFTS, ids=[name for name, _ in DRIFTS])
def test_what_drifts_is_seen_and_brought_back(
    nic: Kernel, capsys: pytest.CaptureFixture[str], knob: str, change: Change
) -> None:
    apply(nic)
    change(nic)
    (device,) = report(nic, capsys, status=1)
    failed = {each["knob"]: each for each in device["knobs"] if each["state"] == "failed"}
    assert set(failed) - {"path_mtu"} == {knob}
    assert (failed[knob]["at_apply"], failed[knob]["hint"] != "") == ("applied", True)
    apply(nic)
    report(nic, capsys)


def test_the_report_for_people(nic: Kernel, capsys: pytest.CaptureFixture[str]) -> None:
    apply(nic)
    nic.write("sys/class/net/eth0/mtu", "1500")
    capsys.readouterr()
    assert nic.load().main(["report"]) == 1
    out = capsys.readouterr().out
    assert "mlx5_0 (mlx5_core): " in out
    assert "port 1: Ethernet, eth0, ACTIVE, 100 Gb/sec (4X EDR), RoCE v2 GID index 3" in out
    assert "NUMA node 1, CPUs 8-15" in out
    assert re.search(
        r"failed +mtu \(eth0\): wanted 9000, is 1500, at apply: applied\n +is not as wanted\n +bakehouse-roce apply",
        out,
    )


def test_without_devices_the_report_is_empty(kernel: Kernel, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(kernel, capsys) == []


# Hints for jobs ------------------------------------------------------------------------------------------------------


def hints_of(kernel: Kernel) -> dict[str, str]:
    text = f". {kernel.root}/run/bakehouse/roce/mlx5_0.env && set"
    done = subprocess.run(["sh", "-c", text], capture_output=True, text=True, check=True, env={})
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def test_hints_can_be_sourced(nic: Kernel) -> None:
    apply(nic)
    found = hints_of(nic)
    wanted = {
        "BAKEHOUSE_ROCE_DEVICE": "mlx5_0", "BAKEHOUSE_ROCE_NETDEV": "eth0", "BAKEHOUSE_ROCE_NUMA_NODE": "1",
        "BAKEHOUSE_ROCE_CPUS": "8-15", "UCX_NET_DEVICES": "mlx5_0:1", "NCCL_IB_HCA": "=mlx5_0:1",
        "UCX_IB_GID_INDEX": "3", "NCCL_IB_GID_INDEX": "3", "UCX_IB_TRAFFIC_CLASS": "106", "NCCL_IB_TC": "106",
    }  # fmt: skip
    assert {name: value.strip("'") for name, value in found.items() if name in wanted} == wanted


def test_hints_follow_the_address(nic: Kernel) -> None:
    ports = nic.root / "sys/class/infiniband/mlx5_0/ports/1"
    for index in (2, 3):
        (ports / f"gid_attrs/types/{index}").rename(nic.root / f"fake/type{index}")
    apply(nic)
    assert hints_of(nic)["UCX_IB_GID_INDEX"].strip("'") == "1"
    before = nic.result("mlx5_0")
    for index in (2, 3):
        (nic.root / f"fake/type{index}").rename(ports / f"gid_attrs/types/{index}")
    assert nic.load().main(["hints"]) == 0
    assert hints_of(nic)["UCX_IB_GID_INDEX"].strip("'") == "3"
    assert hints_of(nic)["NCCL_IB_TC"].strip("'") == "106"
    assert nic.result("mlx5_0") == before


# NICs ----------------------------------------------------------------------------------------------------------------

LLDP = {"lldp": [{"interface": [{
    "name": "eth0", "via": "LLDP",
    "chassis": [{"id": [{"type": "mac", "value": "b8:59:9f:00:00:01"}], "name": [{"value": "leaf-1"}]}],
    "port": [{"id": [{"type": "ifname", "value": "swp7"}], "descr": [{"value": "node 7"}]}],
}]}]}  # fmt: skip


def test_nics_are_found_with_what_they_are(nic: Kernel, capsys: pytest.CaptureFixture[str]) -> None:
    nic.add_nic("eth1", driver="e1000e", address="0000:00:19.0", dcb=False)
    nic.write("sys/class/net/lo/type", "772")
    nic.write("sys/class/net/docker0/type", "1")
    nic.path("fake/lldp.json").write_text(json.dumps(LLDP))
    assert nic.load().main(["nics", "--json"]) == 0
    found = {each["interface"]: each for each in json.loads(capsys.readouterr().out)["nics"]}
    assert set(found) == {"eth0", "eth1"}
    assert found["eth0"] == {
        "interface": "eth0", "driver": "mlx5_core", "pci_id": "15b3:101d", "address": "0000:03:00.0",
        "mac": "b8:ce:f6:00:00:01", "speed_mbit": 100000, "carrier": True, "mtu": 1500,
        "firmware": "22.39.1002 (MT_0000000359)", "rdma": "mlx5_0", "numa_node": 1, "switch": "leaf-1",
        "switch_port": "swp7",
    }  # fmt: skip
    assert found["eth1"]["rdma"] == found["eth1"]["switch"] == ""
    assert nic.load().main(["nics"]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"eth0 +mlx5_core +15b3:101d +100 Gbit/s +up +mlx5_0 +22.39.1002 \(MT_0000000359\) +leaf-1 swp7", out
    )


@pytest.mark.parametrize("answer", ["", "{}", '{"lldp": [{}]}', '{"lldp": [{"interface": [{"name": "x"}]}]}', "[1]"])
def test_lldpd_that_knows_nothing(nic: Kernel, capsys: pytest.CaptureFixture[str], answer: str) -> None:
    nic.path("fake/lldp.json").write_text(answer)
    assert nic.load().main(["nics"]) == 0
    assert "eth0" in capsys.readouterr().out


# The program itself --------------------------------------------------------------------------------------------------


def test_as_a_program(nic: Kernel) -> None:
    nic.path("sys/kernel/config/rdma_cm/x")
    nic.make_folder(str(nic.root / "sys/kernel/config/rdma_cm/mlx5_0"))
    done = nic.run("apply", "mlx5_0")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"bakehouse-roce: mlx5_0: \d+ applied, \d+ already right\n", done.stdout)
    assert nic.run("report").returncode == 0
    assert nic.run("--help").stdout.startswith("NAME\n")


@pytest.mark.parametrize(
    "arguments", [[], ["appyl"], ["apply", "--json"], ["report", "--jsn"], ["nics", "eth0"], ["check", "a", "b"]]
)
def test_a_command_line_that_is_none(kernel: Kernel, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert kernel.load().main(arguments) == 2
    assert "bakehouse-roce --help" in capsys.readouterr().err


def test_a_run_without_configuration_imports_little(nic: Kernel) -> None:
    """Under emulation each module costs 25 times as much."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import bakehouse_roce as tool; tool.main(['report', '--json']);"
        "print(sorted(set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-IS", "-c", code, str(TOOL.parent)],
        env=nic.environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    heavy = {
        "yaml",
        "argparse",
        "subprocess",
        "pathlib",
        "dataclasses",
        "inspect",
        "fnmatch",
        "difflib",
        "socket",
        "typing",
    }
    assert not heavy & {name.strip("' ") for name in done.stderr.strip("[]\n").split(",")}


def test_its_files_say_what_they_are() -> None:
    folder = REPOSITORY / "bootstrap/roce"
    readme = (folder / "README.md").read_text()
    assert [path.name for path in folder.iterdir() if path.is_file() and f"`{path.name}`" not in readme] == [
        "README.md"
    ]
    assert (folder / "bakehouse-roce").stat().st_mode & 0o111
    rules = (folder / "90-bakehouse-roce.rules").read_text()
    assert 'ENV{SYSTEMD_WANTS}+="bakehouse-roce@%k.service"' in rules


def test_the_limits_that_come_with_it_are_what_it_asks_for(nic: Kernel) -> None:
    for name, folder in (("limits", "security/limits.d"), ("memlock", "systemd/system.conf.d")):
        (nic.root / f"etc/{folder}/rdma.conf").unlink()
        text = (REPOSITORY / f"bootstrap/roce/90-bakehouse-roce-{name}.conf").read_text()
        nic.write(f"etc/{folder}/90-bakehouse-roce.conf", text)
    found = states(applied(nic))
    assert found["memlock_pam"] == found["memlock_systemd"] == "already right"
