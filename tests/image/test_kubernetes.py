"""What a Kubernetes node is that has joined its cluster. For humans: the names of the tests are the facts."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from testinfra.host import Host


@pytest.fixture(scope="module")
def status(host: Host) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(host.check_output("bakehouse-agent status --json"))
    return said


@pytest.fixture(scope="module")
def kubelet(host: Host) -> dict[str, Any]:
    """What the kubelet was configured with."""
    found: dict[str, Any] = yaml.safe_load(host.file("/var/lib/kubelet/config.yaml").content_string)
    return found


def test_the_agent_says_that_it_joined(host: Host, status: dict[str, Any]) -> None:
    assert status["state"] == "joined"
    assert status["platform"] == "kubernetes"
    assert status["node"] == host.check_output("hostname --short")


def test_kubelet_and_containerd_run(host: Host) -> None:
    for name in ("kubelet", "containerd"):
        assert host.service(name).is_running, name
        assert host.service(name).is_enabled, name


def test_containerd_does_not_wait_for_the_network(host: Host) -> None:
    after = host.check_output("systemctl show containerd --property=After --value").split()
    assert "local-fs.target" in after
    assert not {"network.target", "basic.target", "sysinit.target"} & set(after)


def test_the_kubelet_uses_cgroups_as_systemd_and_containerd_do(host: Host, kubelet: dict[str, Any]) -> None:
    assert kubelet["cgroupDriver"] == "systemd"
    assert "SystemdCgroup = true" in host.file("/etc/containerd/config.toml").content_string
    assert host.check_output("findmnt --noheadings --output FSTYPE /sys/fs/cgroup") == "cgroup2"


def test_certificates_are_renewed(kubelet: dict[str, Any]) -> None:
    assert kubelet["rotateCertificates"] is True


def test_pods_are_not_told_of_the_nodes_own_name_server(host: Host) -> None:
    assert "--resolv-conf=/run/systemd/resolve/resolv.conf" in host.check_output("ps -o args= -C kubelet")


def test_there_is_no_swap(host: Host) -> None:
    assert len(host.file("/proc/swaps").content_string.splitlines()) == 1


def test_the_kernel_forwards_and_filters(host: Host) -> None:
    for name in ("net.ipv4.ip_forward", "net.bridge.bridge-nf-call-iptables", "net.bridge.bridge-nf-call-ip6tables"):
        assert host.sysctl(name) == 1, name


def test_plugins_of_the_network_are_where_add_ons_expect_them(host: Host) -> None:
    for name in ("bridge", "host-local", "loopback", "portmap"):
        assert host.file(f"/opt/cni/bin/{name}").exists, name


def test_images_were_loaded_at_bake_time(host: Host) -> None:
    wanted = host.file("/usr/share/bakehouse/container-images").content_string.split()
    there = host.check_output("ctr --namespace k8s.io images list --quiet").split()
    assert wanted
    assert set(wanted) <= set(there)


def test_kubelet_and_kubeadm_are_of_one_version(host: Host) -> None:
    kubelet = host.check_output("kubelet --version").split()[-1]
    assert kubelet == host.check_output("kubeadm version --output short")
    assert re.fullmatch(r"v\d+\.\d+\.\d+", kubelet)


def test_no_other_version_can_be_installed(host: Host) -> None:
    shown = host.check_output("apt-cache policy kubectl")
    candidate = re.search(r"Candidate: (\S+)", shown)
    assert candidate
    assert candidate[1] == host.package("kubectl").version


def test_the_packages_repository_is_not_left_behind(host: Host) -> None:
    assert host.run("grep -r kubernetes /etc/apt/sources.list.d").stdout == ""


def test_the_kubelets_credentials_are_for_root_only(host: Host) -> None:
    for name in ("/etc/kubernetes/kubelet.conf", "/var/lib/kubelet/pki/kubelet-client-current.pem"):
        file = host.file(name)
        assert (file.user, file.mode & 0o077) == ("root", 0), name


TOKEN = r"\b[a-z0-9]{6}\.[a-z0-9]{16}\b"


def test_no_bootstrap_token_is_left(host: Host) -> None:
    places = "/etc/bakehouse /run/bakehouse /etc/kubernetes /var/lib/cloud /run/cloud-init"
    assert host.run(f"grep -rIlP '{TOKEN}' {places}").stdout == ""
    assert host.run(f"journalctl --boot --unit bakehouse-agent --grep '{TOKEN}' --quiet").stdout == ""


def test_kubernetes_is_that_of_the_record(host: Host, record: dict[str, Any]) -> None:
    assert host.package("kubelet").version == record["versions"]["kubernetes"]
