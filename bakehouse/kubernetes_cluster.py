"""A Kubernetes cluster for tests and demos in a private network of this host: a control plane and a join broker."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bakehouse import kubernetes, network, userdata
from bakehouse.cluster import NOTE, Broker, noted
from bakehouse.control_plane import ADMIN, ControlPlane
from bakehouse.network import Network
from bakehouse.record import Record
from bakehouse.run import Log

PLATFORM = "kubernetes"

POD_NETWORK_PLUGIN = {
    "cniVersion": "0.4.0",
    "name": "bakehouse",
    "plugins": [
        {
            "type": "bridge", "bridge": "cni0", "isGateway": True, "ipMasq": True, "hairpinMode": True,
            "ipam": {
                "type": "host-local", "ranges": [[{"subnet": "10.88.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}],
            },
        },
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ],
}  # fmt: skip
"""The reference plugins' bridge: what a network add-on would bring to the node. Pods of one node reach each other."""


@dataclass(frozen=True)
class KubernetesCluster:
    """A private network with a control plane and a join broker. Made by up(), or found again by attach()."""

    network: Network
    controller: ControlPlane
    broker: Broker

    def join(self, node: str, *, inline: bool = False, lifetime: str = "1h") -> userdata.KubernetesJoin:
        """Return what a node needs to know to join: with a token of the broker, or with a bootstrap token inline."""
        return userdata.KubernetesJoin(
            self.controller.address,
            ca_hashes=(self.controller.ca_hash(),),
            node=node,
            labels=("bakehouse.example.org/path=bake",),
            bootstrap_token=self.controller.token(lifetime) if inline else "",
            broker=None if inline else self.broker.offer(node, platform=PLATFORM),
        )

    def user_data(self, node: str) -> str:
        """Return user-data with which a node joins."""
        return with_pod_network(userdata.render(self.join(node)))


def with_pod_network(joining: str, *more: Mapping[str, str]) -> str:
    """Return user-data with what a network add-on would bring to the node.

    Args:
        joining: the cloud-config that makes a node join.
        more: further files of cloud-config's write_files.
    """
    file = {"path": "/etc/cni/net.d/10-bakehouse.conflist", "content": json.dumps(POD_NETWORK_PLUGIN)}
    return userdata.with_part({"write_files": [file, *(dict(each) for each in more)]}, joining)


@contextmanager
def up(
    record: Record, image: Path, binaries: Mapping[str, Path], mirrors: tuple[str, str], cache: Path, log: Log
) -> Iterator[KubernetesCluster]:
    """Make a cluster of an image; its control plane is not started yet. It ends with the block, and with this process.

    Args:
        record: of the image.
        image: its file: a Kubernetes node; the control plane is run from its root.
        binaries: the programs of the control plane (kubernetes.binaries).
        mirrors: archive and security archive that etcd is installed from, once.
        cache: the folder in which etcd is kept.
        log: takes what the programs that set it up say.

    Raises:
        BakehouseError: this host cannot have one, or etcd cannot be had.
    """
    version = kubernetes.version_of(record)
    with network.up(log) as place:
        plane = ControlPlane(place, version)
        plane.prepare(place.mount_image(image), binaries, record.release, mirrors, cache)
        broker = Broker(place)
        command = ["chroot", str(plane.root), "kubeadm", "token", "create", "--ttl=15m", f"--kubeconfig={ADMIN}"]
        broker.prepare({PLATFORM: {"token_command": command}})
        place.path(NOTE).write_text(json.dumps({"version": version}))
        broker.start()
        yield KubernetesCluster(place, plane, broker)


def attach(pid: int, log: Log) -> KubernetesCluster:
    """Find a cluster of another process.

    Args:
        pid: the process that keeps its network (Network.pid).
        log: takes what is done in it.

    Raises:
        BakehouseError: it is gone.
    """
    place = Network(pid, log)
    return KubernetesCluster(place, ControlPlane(place, noted(place, PLATFORM)["version"]), Broker(place))
