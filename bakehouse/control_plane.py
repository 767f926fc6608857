"""A Kubernetes control plane for tests and demos, run in a copy of an image's own root, without containers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bakehouse import waiting
from bakehouse.chroot import Chroot
from bakehouse.errors import BakehouseError
from bakehouse.network import GATEWAY, INSIDE, Network

NAME = "control-plane"
PORT = 6443
POD_NETWORK = "10.88.0.0/16"
SERVICE_NETWORK = "10.96.0.0/12"
API_SERVICE = "10.96.0.1"
DNS_SERVICE = "10.96.0.10"
"""As Kubernetes and kubeadm have them: the first and the tenth address of the service network."""

START_SECONDS = 120
PKI = "/etc/kubernetes/pki"
ADMIN = "/etc/kubernetes/admin.conf"

LEAVE_RULES: list[dict[str, Any]] = [
    {
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
        "metadata": {"name": "bakehouse:leave"},
        "rules": [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["delete"]}],
    },
    {
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
        "metadata": {"name": "bakehouse:leave"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "bakehouse:leave"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": "system:nodes"}],
    },
]  # fmt: skip
"""Lets a node take itself out when it leaves; the admission plugin NodeRestriction keeps it from others."""


def api_version(version: str) -> str:
    """Return the version of kubeadm's configuration that a version of Kubernetes takes.

    Source: kubernetes.io, kubeadm Configuration; each is read by later versions for a year or more.
    """
    minor = int(version.split(".")[1])
    return "kubeadm.k8s.io/" + ("v1beta2" if minor < 22 else "v1beta3" if minor < 31 else "v1beta4")  # noqa: PLR2004


def _is_ready(node: Mapping[str, Any]) -> bool:
    """Say whether a node, as the API has it, is ready."""
    conditions = (node.get("status") or {}).get("conditions") or []
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


class ControlPlane(Chroot):
    """etcd, API server, controller manager and scheduler.

    Args:
        network: where it is; it has the network's gateway's address.
        version: of Kubernetes, such as 1.35.5.
    """

    environment = MappingProxyType({**INSIDE, "KUBECONFIG": ADMIN})

    def __init__(self, network: Network, version: str) -> None:
        super().__init__(network, NAME)
        self.version = version
        self.address = f"{GATEWAY}:{PORT}"

    def prepare(
        self, image_root: Path, binaries: Mapping[str, Path], release: str, mirrors: tuple[str, str], cache: Path
    ) -> None:
        """Make its root, certificates and configuration.

        Args:
            image_root: a mounted image (Network.mount_image).
            binaries: the programs of the control plane, by name.
            release: Debian release of the image.
            mirrors: archive and security archive that etcd is installed from, once.
            cache: the folder in which etcd is kept.

        Raises:
            BakehouseError: the image has no kubeadm, or etcd cannot be had.
        """
        self.make(image_root)
        if self.run("test", "-x", "/usr/bin/kubeadm").returncode != 0:
            raise BakehouseError("this image has no kubeadm", hint="the element kubernetes-node installs it")
        for name, path in binaries.items():
            self.bind(path, f"/usr/local/bin/{name}")
        self._have_etcd(release, mirrors, cache)
        self.write("etc/hosts", f"127.0.0.1 localhost\n{GATEWAY} {NAME}\n")
        self.write("etc/kubernetes/init.json", "\n---\n".join(json.dumps(part) for part in self._configuration()))
        for phase in ("certs all", "kubeconfig admin", "kubeconfig controller-manager", "kubeconfig scheduler"):
            self.kubeadm(*phase.split())

    def _have_etcd(self, release: str, mirrors: tuple[str, str], cache: Path) -> None:
        kept = cache / "kubernetes" / f"etcd-{release}"
        if kept.exists():
            self.bind(kept, "/usr/local/bin/etcd")
            return
        self.install(release, mirrors, "etcd-server")
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(".partial")
        shutil.copy(self.path("/usr/bin/etcd"), partial)
        partial.rename(kept)

    def _configuration(self) -> list[dict[str, Any]]:
        """Return kubeadm's configuration. What is uploaded of it reaches every node that joins."""
        api = api_version(self.version)
        return [
            {
                "apiVersion": api, "kind": "InitConfiguration",
                "localAPIEndpoint": {"advertiseAddress": str(GATEWAY), "bindPort": PORT},
                "nodeRegistration": {"name": NAME, "criSocket": "unix:///run/containerd/containerd.sock"},
                "bootstrapTokens": [],
            },
            {
                "apiVersion": api, "kind": "ClusterConfiguration", "clusterName": "bakehouse",
                "kubernetesVersion": f"v{self.version}", "controlPlaneEndpoint": self.address,
                "networking": {"podSubnet": POD_NETWORK, "serviceSubnet": SERVICE_NETWORK},
            },
            {
                "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
                "cgroupDriver": "systemd", "rotateCertificates": True,
                # Five minutes by default: tests would wait for it.
                "evictionPressureTransitionPeriod": "20s",
            },
            {"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration", "mode": "iptables"},
        ]  # fmt: skip

    def kubeadm(self, *phase: str, config: bool = True) -> str:
        """Run a phase of ``kubeadm init``. Return what it said.

        Raises:
            BakehouseError: it failed.
        """
        given = ["--config", "/etc/kubernetes/init.json"] if config else []
        return self.run("kubeadm", "init", "phase", *phase, *given, check=True).stdout

    def start(self) -> None:
        """Start everything, and wait until the API server answers.

        Raises:
            BakehouseError: something does not come up.
        """
        self.start_etcd()
        self.start_api_server()
        conf = "--kubeconfig=/etc/kubernetes"
        self.daemon("kube-controller-manager", [
            "kube-controller-manager", f"{conf}/controller-manager.conf", "--leader-elect=false",
            "--use-service-account-credentials=true", f"--service-account-private-key-file={PKI}/sa.key",
            f"--root-ca-file={PKI}/ca.crt", f"--cluster-signing-cert-file={PKI}/ca.crt",
            f"--cluster-signing-key-file={PKI}/ca.key", "--controllers=*,bootstrapsigner,tokencleaner",
            f"--cluster-cidr={POD_NETWORK}", "--allocate-node-cidrs=true",
        ])  # fmt: skip
        self.daemon("kube-scheduler", ["kube-scheduler", f"{conf}/scheduler.conf", "--leader-elect=false"])
        # kubeadm notes something at the node that the control plane is on, and waits for it. Here there is none.
        about = {"name": NAME, "labels": {"kubernetes.io/hostname": NAME}}
        self.apply({"apiVersion": "v1", "kind": "Node", "metadata": about})
        for phase in ("upload-config all", "bootstrap-token"):
            self.kubeadm(*phase.split())
        self.kubectl("delete", "node", NAME, check=True)
        for part in LEAVE_RULES:
            self.apply(part)

    def start_etcd(self) -> None:
        """Start etcd, whose data are in memory."""
        self.daemon("etcd", [
            "etcd", "--data-dir=/run/etcd", "--listen-client-urls=http://127.0.0.1:2379",
            "--advertise-client-urls=http://127.0.0.1:2379", "--listen-peer-urls=http://127.0.0.1:2380",
        ])  # fmt: skip

    def start_api_server(self) -> None:
        """Start the API server and wait until it answers.

        Raises:
            BakehouseError: it does not.
        """
        self.daemon("kube-apiserver", [
            "kube-apiserver", f"--advertise-address={GATEWAY}", f"--secure-port={PORT}", "--allow-privileged=true",
            "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
            "--enable-bootstrap-token-auth=true", "--etcd-servers=http://127.0.0.1:2379",
            f"--client-ca-file={PKI}/ca.crt", f"--tls-cert-file={PKI}/apiserver.crt",
            f"--tls-private-key-file={PKI}/apiserver.key", f"--service-cluster-ip-range={SERVICE_NETWORK}",
            f"--kubelet-client-certificate={PKI}/apiserver-kubelet-client.crt",
            f"--kubelet-client-key={PKI}/apiserver-kubelet-client.key",
            "--kubelet-preferred-address-types=InternalIP,Hostname",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--service-account-key-file={PKI}/sa.pub", f"--service-account-signing-key-file={PKI}/sa.key",
        ])  # fmt: skip
        self.wait_for("kube-apiserver", lambda: self.kubectl("get", "--raw=/readyz").returncode == 0, START_SECONDS)

    def stop_api_server(self) -> None:
        """Kill the API server, as a crash would."""
        self.kill("kube-apiserver")

    def kubectl(self, *words: str, check: bool = False, timeout: float = 120) -> Any:
        """Run kubectl as the cluster's administrator. Return what subprocess.run() does."""
        return self.run("kubectl", *words, check=check, timeout=timeout)

    def get(self, *words: str) -> dict[str, Any]:
        """Return an object of the API; an empty one where there is none."""
        done = self.kubectl("get", "--output=json", *words)
        found: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 and done.stdout else {}
        return found

    def apply(self, what: Mapping[str, Any]) -> None:
        """Create or change an object of the API.

        Raises:
            BakehouseError: the API server refuses it.
        """
        self.write("run/object.json", json.dumps(what))
        self.kubectl("apply", "--filename=/run/object.json", check=True)

    def add_ons(self) -> None:
        """Install kube-proxy and the cluster's DNS, as ``kubeadm init`` does."""
        self.kubeadm("addon", "all")

    def node(self, name: str) -> dict[str, Any]:
        """Return a node as the API server knows it; empty where there is none."""
        return self.get("node", name)

    def is_ready(self, name: str) -> bool:
        """Say whether a node is ready."""
        return _is_ready(self.node(name))

    def states(self) -> dict[str, str]:
        """Return the states of all nodes, by name."""
        nodes = self.get("nodes").get("items") or []
        return {node["metadata"]["name"]: "ready" if _is_ready(node) else "not ready" for node in nodes}

    def token(self, lifetime: str = "1h") -> str:
        """Make a bootstrap token.

        Args:
            lifetime: such as 15m.
        """
        command = ["kubeadm", "token", "create", f"--ttl={lifetime}"]
        return self.run(*command, check=True).stdout.strip()

    def ca_hash(self) -> str:
        """Return what nodes know the cluster's CA by: a hash of its public key."""
        script = f"openssl x509 -pubkey -noout -in {PKI}/ca.crt | openssl pkey -pubin -outform der | sha256sum"
        return "sha256:" + self.run("sh", "-c", script, check=True).stdout.split()[0]

    def wait_for_pod(self, name: str, seconds: float, namespace: str = "default") -> dict[str, Any]:
        """Wait until a pod runs and is ready. Return it.

        Raises:
            BakehouseError: it does not within the time.
        """

        def state() -> dict[str, Any]:
            status: dict[str, Any] = self.get("pod", name, f"--namespace={namespace}").get("status") or {}
            return status

        def runs() -> bool:
            containers = state().get("containerStatuses") or []
            return bool(containers) and all(each["ready"] for each in containers)

        waiting.until(
            f"pod {name}", runs, seconds,
            last_words=lambda: self.kubectl("describe", "pod", name, f"--namespace={namespace}").stdout[-3000:],
        )  # fmt: skip
        return self.get("pod", name, f"--namespace={namespace}")
