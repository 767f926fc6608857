"""What a Kubernetes image is tried for: a pod, services and names, by a real control plane and the images in it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from bakehouse import waiting
from bakehouse.control_plane import API_SERVICE, DNS_SERVICE
from bakehouse.errors import BakehouseError
from bakehouse.kubernetes_cluster import KubernetesCluster
from bakehouse.machine import Machine

CONTROLLER_STEP = "a controller runs from the image's own root", "cluster"

POD = "bakehouse-verify"
POD_SECONDS = 600
"""Emulated on a busy host; with KVM it is a few."""

CHECK_SECONDS = 300
NAME = "kubernetes.default.svc.cluster.local"

REACH = r"""
import os, socket, struct, sys
pid, server, port, name = sys.argv[1:]
os.setns(os.open(f"/proc/{pid}/ns/net", os.O_RDONLY), os.CLONE_NEWNET)
if name:
    query = b"".join(bytes([len(part)]) + part.encode() for part in name.split(".")) + b"\0" + struct.pack(">HH", 1, 1)
    asked = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    asked.settimeout(20)
    asked.sendto(struct.pack(">6H", 7, 256, 1, 0, 0, 0) + query, (server, int(port)))
    print(socket.inet_ntoa(asked.recv(512)[-4:]))
else:
    socket.create_connection((server, int(port)), 20).close()
    print("connected")
"""
"""Run on the node: connects from a pod's network, or asks a name server from there (RFC 1035, 4.1) and prints the
answer's last address. Pods need no program for it: images of today have none."""


class KubernetesTrial:
    """A Kubernetes cluster that an image is tried in."""

    FIRST = CONTROLLER_STEP

    def __init__(self, made: KubernetesCluster) -> None:
        self.made = made
        self.network = made.network
        self.plane = made.controller
        self.node = ""
        """The name of the node that is tried."""

    def start(self) -> None:
        """Start the control plane, with kube-proxy and DNS for the nodes to come."""
        self.plane.start()
        self.plane.add_ons()

    def user_data(self, node: str) -> str:
        """Return what makes a node join."""
        self.node = node
        return self.made.user_data(node)

    def work(self, node: Machine) -> list[tuple[str, str, Callable[[], None]]]:
        """Return what is tried."""
        return [
            ("a pod of a pre-loaded image runs and answers", "pod", lambda: self.work_again(node)),
            ("a service leads to the API server", "services", lambda: self._services(node)),
            ("the cluster's DNS answers through its service", "names", lambda: self._names(node)),
        ]

    def work_again(self, node: Machine) -> None:
        """Run a pod on it, and reach its address."""
        self.plane.kubectl("delete", "pod", POD, "--ignore-not-found", "--force", "--grace-period=0", check=True)
        self.plane.apply(self._pod())
        made = self.plane.wait_for_pod(POD, POD_SECONDS)
        address = made["status"]["podIP"]
        node.wait_for_ssh(CHECK_SECONDS)
        done = node.ssh(f"ping -c 3 -W 20 {address}", timeout=CHECK_SECONDS)
        if done.returncode != 0:
            raise BakehouseError(f"the pod does not answer at {address}", log=done.stdout + done.stderr)

    def _pod(self) -> dict[str, Any]:
        """Return a pod of the smallest image that is loaded; it is never pulled, so it shows that it was there."""
        done = self.plane.run("kubeadm", "config", "images", "list", f"--kubernetes-version=v{self.plane.version}")
        image = next(line for line in done.stdout.splitlines() if "/pause:" in line)
        container = {"name": "main", "image": image, "imagePullPolicy": "Never"}
        return {
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": POD},
            "spec": {"containers": [container], "nodeName": self.node, "terminationGracePeriodSeconds": 0},
        }  # fmt: skip

    def _services(self, node: Machine) -> None:
        def leads_there() -> bool:
            return self._from_pod(node, API_SERVICE, "443", "") == "connected"

        waiting.until("way through the service kubernetes", leads_there, POD_SECONDS, poll=2.0, last_words=self._pods)

    def _names(self, node: Machine) -> None:
        def answers() -> bool:
            return self._from_pod(node, DNS_SERVICE, "53", NAME) == API_SERVICE

        waiting.until(f"answer for {NAME}", answers, POD_SECONDS, poll=2.0, last_words=self._pods)

    def _from_pod(self, node: Machine, server: str, port: str, name: str) -> str:
        """Return what a connection from the pod's network comes to."""
        node.ssh(f"test -e /tmp/reach || cat > /tmp/reach <<'END'{REACH}END")
        pid = self._pid(node)
        done = node.ssh(f"sudo python3 /tmp/reach {pid} {server} {port} '{name}'", timeout=CHECK_SECONDS)
        return done.stdout.strip()

    def _pid(self, node: Machine) -> str:
        """Return a process of the pod."""
        status = self.plane.get("pod", POD)["status"]
        container = status["containerStatuses"][0]["containerID"].rpartition("/")[2]
        said = node.ssh("sudo ctr --namespace k8s.io tasks list", timeout=CHECK_SECONDS).stdout
        found = re.search(rf"^{container}\s+(\d+)", said, flags=re.MULTILINE)
        if not found:
            raise BakehouseError("containerd does not know the pod's container", log=said)
        return found[1]

    def _pods(self) -> str:
        return str(self.plane.kubectl("get", "pods", "--all-namespaces", "--output=wide").stdout)

    def logs(self) -> dict[str, str]:
        """Return what the control plane said."""
        names = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
        pods = json.dumps(self.plane.get("pods", "--all-namespaces"), indent=1)
        return {**{f"{name}.log": self.plane.log(name) for name in names}, "pods.json": pods}
