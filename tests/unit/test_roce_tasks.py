"""What Invoke does for nodes with RDMA devices: user-data, and reports of nodes (against FAKES of ssh and the tool)."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bakehouse import REPOSITORY, roce, userdata
from bakehouse.errors import BakehouseError
from bakehouse.userdata import Join, RoceJoin
from tests.support.roce_kernel import Kernel
from tests.unit.test_agent import load
from tests.unit.test_cli import Tasks
from tests.unit.test_userdata import SSH_KEY

SETTINGS = "dscp: 24  # as on the switch\n\nets: {share: 60}\ndevices:\n  exclude: ['mlx5_[23]']\n"


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tasks:
    return Tasks(tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        return load(tmp_path_factory.mktemp("root"), patch)


@pytest.fixture(scope="module")
def tool(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return Kernel(tmp_path_factory.mktemp("root")).load()


def files(text: str) -> dict[str, str]:
    assert text.startswith("#cloud-config\n")
    return {file["path"]: file["content"] for file in yaml.safe_load(text)["write_files"]}


# User-data -----------------------------------------------------------------------------------------------------------


def test_a_node_is_told_its_platform_and_its_settings(agent: ModuleType, tool: ModuleType) -> None:
    text = userdata.render(RoceJoin(devices=2, node="node-1", roce=SETTINGS, ssh_keys=(SSH_KEY,)))
    found = files(text)
    assert list(found) == ["/etc/bakehouse/roce.yaml", "/etc/bakehouse/join.yaml"], (
        "settings before what waits for them"
    )
    config, faults = agent.parse(found["/etc/bakehouse/join.yaml"].encode())
    assert (faults, config.platform, config.name, config.devices) == ([], "roce", "node-1", 2)
    assert yaml.safe_load(found["/etc/bakehouse/roce.yaml"]) == yaml.safe_load(SETTINGS)
    assert "# as on the switch" in text
    given, faults = tool.parse(found["/etc/bakehouse/roce.yaml"])
    assert (faults, given.dscp, given.exclude) == ([], 24, ("mlx5_[23]",))
    assert yaml.safe_load(text)["ssh_authorized_keys"] == [SSH_KEY]
    assert "# For: the node node-1 only" in text


def test_without_settings_there_is_no_file_of_them(agent: ModuleType) -> None:
    found = files(userdata.render(RoceJoin()))
    assert list(found) == ["/etc/bakehouse/join.yaml"]
    assert agent.parse(found["/etc/bakehouse/join.yaml"].encode())[0].devices == 1


def test_a_slurm_node_takes_settings_too(agent: ModuleType) -> None:
    found = files(userdata.render(Join(("ctl",), roce=SETTINGS)))
    assert list(found) == ["/etc/bakehouse/roce.yaml", "/etc/bakehouse/join.yaml"]
    assert agent.parse(found["/etc/bakehouse/join.yaml"].encode())[0].platform == "slurm"


VALUES = st.fixed_dictionaries(
    {},
    optional={
        "dscp": st.integers(0, 63),
        "ecn": st.booleans(),
        "governor": st.sampled_from(["performance", "schedutil", False]),
        "buffers": st.just({"prio_buffer": {3: 1}, "buffer_size": {0: 1 << 16}}),
        "sysctl": st.just({"net.ipv4.tcp_ecn": 2}),
        "devices": st.fixed_dictionaries(
            {
                "include": st.lists(
                    st.text(st.characters(codec="ascii", exclude_categories=["C"]), min_size=1), min_size=1
                )
            }
        ),
    },
)


@settings(deadline=None)
@given(VALUES, st.booleans(), st.sampled_from(["", "---\n", "# ünï\n\n"]))
def test_settings_read_back_as_they_were_given(tool: ModuleType, values: dict[str, Any], flow: bool, head: str) -> None:
    text = head + yaml.safe_dump(values, default_flow_style=flow, allow_unicode=True)
    written = files(userdata.render(RoceJoin(roce=text)))["/etc/bakehouse/roce.yaml"]
    assert yaml.safe_load(written) == values
    assert vars(tool.parse(written)[0]) == vars(tool.parse(text)[0])


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("dscp: 64\ndcsp: 1\n", "roce.yaml: dscp: 64 is not a whole number from 0 to 63\nroce.yaml: dcsp: not known"),
        ("dscp: [", "not YAML"),
        ("dscp: 1\r\n", "line 1 holds a control character"),
    ],
)
def test_settings_that_a_node_would_refuse_are_refused_here(text: str, error: str) -> None:
    with pytest.raises(BakehouseError) as caught:
        RoceJoin(roce=text)
    assert error in caught.value.message
    with pytest.raises(BakehouseError):
        Join(("ctl",), roce=text)


@pytest.mark.parametrize("devices", [0, -1, 65])
def test_a_number_of_devices_that_no_node_has(devices: int) -> None:
    with pytest.raises(BakehouseError, match="cannot have"):
        RoceJoin(devices=devices)


def test_user_data_by_the_task(invoke: Tasks) -> None:
    path = invoke.folder / "roce.yaml"
    path.write_text(SETTINGS)
    done = invoke.run("userdata", "--platform", "roce", "--devices", "2", "--roce", str(path))
    assert (done.status, done.err) == (0, "")
    assert yaml.safe_load(files(done.out)["/etc/bakehouse/join.yaml"])["roce"] == {"devices": 2}
    done = invoke.run("userdata", "--controller", "ctl", "--roce", str(path))
    assert list(files(done.out)) == ["/etc/bakehouse/roce.yaml", "/etc/bakehouse/join.yaml"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--platform", "roce", "--roce", "/nothing"], "--roce /nothing cannot be read: No such file"),
        (["--platform", "roce", "--key-file", "/nothing"], "joins nothing that has a secret"),
        (["--platform", "roce", "--devices", "0"], "a node cannot have 0 RDMA devices"),
        (["--platform", "kubernetes", "--roce", "x"], "--roce is not for Kubernetes nodes yet"),
    ],
)
def test_user_data_that_cannot_be_made(invoke: Tasks, words: list[str], error: str) -> None:
    done = invoke.run("userdata", *words)
    assert (done.status, done.out) == (1, "")
    assert error in done.err


# Reports -------------------------------------------------------------------------------------------------------------


def program(folder: Path, name: str, text: str) -> None:
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def node(invoke: Tasks, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A machine that ``ssh root@node-1`` leads to, and on which the tool is."""
    made = Kernel(invoke.folder / "node")
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    program(
        invoke.folder, "bakehouse-roce", f'exec /usr/bin/python3 -IS {REPOSITORY}/bootstrap/roce/bakehouse_roce.py "$@"'
    )
    program(
        invoke.folder,
        "ssh",
        'echo "$@" >>"$BAKEHOUSE_ROOT/fake/ssh"; while [ "$1" != -- ]; do shift; done; shift 2; exec sh -c "$*"',
    )
    monkeypatch.setenv("PATH", f"{invoke.folder}/bin:{made.environment['PATH']}")
    return made


def test_a_nodes_report_is_shown(invoke: Tasks, node: Kernel) -> None:
    node.add_soft("rxe0", "eth0")
    node.add_rdma("ibp1", "", link_layer="InfiniBand")
    assert node.load().main(["apply"]) == 0
    done = invoke.run("roce.report", "--host", "root@node-1")
    assert (done.status, done.err) == (0, "")
    assert " -- root@node-1 " in node.read("fake/ssh")
    assert "rxe0 (rxe) on eth0" in done.out
    assert "left alone: its ports are InfiniBand, not Ethernet" in done.out
    assert "Attribute read: Operation not" in done.out
    rows = {line.split()[0]: line for line in done.out.splitlines() if line.strip()}
    assert "already right" in rows["roce_mode"]
    assert "not supported" in rows["pfc"]


def test_what_is_not_as_wanted_is_a_failure(invoke: Tasks, node: Kernel) -> None:
    node.add_nic("eth0")
    node.add_rdma("mlx5_0", "eth0")
    assert node.load().main(["apply"]) == 0
    node.write("sys/class/net/eth0/mtu", "1500")
    node.write("proc/sys/net/ipv4/tcp_ecn", "0")
    done = invoke.run("roce.report")
    assert done.status == 1
    assert not (node.root / "fake/ssh").exists()
    assert "failed (was applied)" in done.out
    assert "error: 3 settings are not as wanted: mlx5_0 mtu (eth0), mlx5_0 path_mtu (port 1)" in done.err
    done = invoke.run("roce.report", "--json")
    assert done.status == 1
    (device,) = json.loads(done.out)["devices"]
    assert device["device"] == "mlx5_0"


def test_another_user_asks_by_sudo_and_another_configuration_of_ssh_is_taken(invoke: Tasks, node: Kernel) -> None:
    program(invoke.folder, "id", "echo 1000")
    program(invoke.folder, "sudo", 'printf "%s\\n" "$*" >"$BAKEHOUSE_ROOT/fake/sudo"; shift; exec "$@"')
    (invoke.folder / "config").touch()
    done = invoke.run("roce.report", "--host", "debian@node-1", f"--ssh-config={invoke.folder}/config")
    assert (done.status, done.err) == (0, "")
    assert node.read("fake/sudo").strip() == "-n bakehouse-roce report --json"
    assert node.read("fake/ssh").startswith(f"-F {invoke.folder}/config -o BatchMode=yes")
    done = invoke.run("roce.report", "--host", "debian@node-1", "--ssh-config=none")
    assert done.status == 1
    assert "--ssh-config none is no file" in done.err


def test_a_node_without_devices(invoke: Tasks, node: Kernel) -> None:
    done = invoke.run("roce.report", "--host", "node-1")
    assert done.status == 0
    assert "There is no RDMA device" in done.out


@pytest.mark.parametrize(
    ("tool", "error"),
    [
        ("exit 255", "node-1 cannot be reached by ssh"),
        ("exit 127", "there is no bakehouse-roce on node-1"),
        ("echo /etc/bakehouse/roce.yaml: dscp: 99 >&2; exit 2", "| /etc/bakehouse/roce.yaml: dscp: 99"),
        ("echo; echo Welcome", "the node's report is not of the known form"),
        ("echo '{\"devices\": [{}]}'", "the node's report is not of the known form"),
    ],
)
def test_a_node_that_cannot_be_asked(invoke: Tasks, node: Kernel, tool: str, error: str) -> None:
    program(invoke.folder, "ssh", tool)
    done = invoke.run("roce.report", "--host", "node-1")
    assert (done.status, done.out) == (1, "")
    assert error in done.err
    assert "hint: " in done.err or "form" in error


@pytest.mark.parametrize("host", ["-oProxyCommand=x", "a b", "a;b", "$(id)"])
def test_a_host_that_is_none(invoke: Tasks, node: Kernel, host: str) -> None:
    done = invoke.run("roce.report", f"--host={host}")
    assert done.status == 1
    assert "is no host" in done.err


def test_this_host_without_the_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BakehouseError, match="there is no bakehouse-roce on this host"):
        roce.report()
    with pytest.raises(BakehouseError, match="there is no ssh on this host"):
        roce.report("node-1")
