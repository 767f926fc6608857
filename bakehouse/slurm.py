"""A Slurm controller for tests and demos, run from an image's own root in a private network, with no host packages."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Literal

from bakehouse.chroot import Chroot
from bakehouse.errors import BakehouseError
from bakehouse.network import GATEWAY, Network

Authentication = Literal["munge", "slurm"]

NAME = "controller"
PORT = 6817
KEY_BYTES = 1024
"""As munge's mungekey(8) makes them at the most, and what Slurm's documentation of auth/slurm shows."""

SLURM_CONF = """\
ClusterName=bakehouse
SlurmctldHost={name}({address})
SlurmctldPort={port}
SlurmUser=slurm
SlurmctldParameters=enable_configless
MaxNodeCount=1024
# Jobs lock as much memory as their nodes allow, not as little as where they were submitted: RDMA needs it.
PropagateResourceLimitsExcept=MEMLOCK
# A node that comes back after it was lost is used again.
ReturnToService=2
TreeWidth=65533
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
{authentication}
{tasks}
AccountingStorageType=accounting_storage/none
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmctldTimeout=30
SlurmdTimeout=60
MessageTimeout=60
InactiveLimit=0
KillWait=10
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

AUTHENTICATION = {
    "munge": "AuthType=auth/munge\nCredType=cred/munge",
    # Users of nodes need not be known to the controller (slurm.conf(5), AuthInfo).
    "slurm": "AuthType=auth/slurm\nCredType=auth/slurm\nAuthInfo=use_client_ids",
}
KEY_FILES = {"munge": ("etc/munge/munge.key", "munge"), "slurm": ("etc/slurm/slurm.key", "slurm")}

LIMITED = "ProctrackType=proctrack/cgroup\nTaskPlugin=task/affinity,task/cgroup"
UNLIMITED = "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none"
CGROUP_CONF = "CgroupPlugin=autodetect\nConstrainCores=yes\nConstrainRAMSpace=yes\n"
"""For nodes that are machines. Containers of a host with both versions of cgroups cannot limit jobs."""


class Controller(Chroot):
    """slurmctld and munged in a copy of an image's root.

    Args:
        network: where it is; it has the network's gateway's address.
        authentication: munge, or slurm for Slurm's own auth/slurm.
    """

    def __init__(self, network: Network, authentication: Authentication) -> None:
        super().__init__(network, NAME)
        self.authentication = authentication
        self.address = f"{GATEWAY}:{PORT}"

    @property
    def key_file(self) -> Path:
        """The cluster's key, in the place."""
        return self.root / KEY_FILES[self.authentication][0]

    @property
    def key(self) -> bytes:
        """The cluster's key."""
        return self.network.path(self.key_file).read_bytes()

    def prepare(self, image_root: Path, *, cgroups: bool = True) -> None:
        """Make its root and configuration, and a key.

        Args:
            image_root: a mounted image (Network.mount_image).
            cgroups: nodes limit jobs by cgroups; False for nodes that are containers.

        Raises:
            BakehouseError: the image has no slurmctld.
        """
        self.make(image_root)
        if self.run("test", "-x", "/usr/sbin/slurmctld").returncode != 0:
            raise BakehouseError(
                "this image has no slurmctld to test with",
                hint="the element slurm-node installs it, not enabled: bake the image anew",
            )
        text = SLURM_CONF.format(
            name=NAME, address=GATEWAY, port=PORT, authentication=AUTHENTICATION[self.authentication],
            tasks=LIMITED if cgroups else UNLIMITED,
        )  # fmt: skip
        self.write("etc/slurm/slurm.conf", text)
        self.write("etc/slurm/cgroup.conf", CGROUP_CONF if cgroups else "CgroupPlugin=disabled\n")
        self.write("etc/hosts", f"127.0.0.1 localhost\n{GATEWAY} {NAME}\n")
        file, owner = KEY_FILES[self.authentication]
        self.path(file).parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path(file), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o400)
        with os.fdopen(handle, "wb") as key:
            key.write(secrets.token_bytes(KEY_BYTES))
        self.run("sh", "-euc", f"""
            chown {owner}: /{file}
            install -d -o slurm -g slurm /var/spool/slurmctld /run/slurmctld
            install -d -o munge -g munge /run/munge /var/log/munge
            install -d -m 700 -o munge -g munge /var/lib/munge
        """, check=True)  # fmt: skip

    def replace_in_configuration(self, before: str, after: str) -> None:
        """Change slurm.conf, which nodes get too."""
        text = self.path("etc/slurm/slurm.conf").read_text()
        assert before in text
        self.write("etc/slurm/slurm.conf", text.replace(before, after))

    def start_munge(self) -> None:
        """Start munged, where it is used and does not run yet.

        Raises:
            BakehouseError: it does not come up.
        """
        if self.authentication == "munge" and not self.has_daemon("munged"):
            become = ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "--"]
            self.daemon("munged", [*become, "/usr/sbin/munged", "--foreground"])
            self.wait_for("munged", lambda: self.path("run/munge/munge.socket.2").exists())

    def start(self) -> None:
        """Start munged, if it is used, and slurmctld; wait until it answers.

        Raises:
            BakehouseError: it does not answer.
        """
        self.start_munge()
        # slurmctld compares the host's name with slurm.conf.
        script = f"hostname {NAME}; exec /usr/sbin/slurmctld -D"
        self.daemon("slurmctld", ["unshare", "--uts", "sh", "-c", script])
        self.wait_for("slurmctld", lambda: " is UP" in self.run("scontrol", "ping").stdout)

    def stop(self) -> None:
        """Stop slurmctld, as a crash would: nodes lose it. munged goes on."""
        self.kill("slurmctld")

    def log(self, name: str = "slurmctld") -> str:
        """Return what a daemon said: slurmctld or munged."""
        return super().log(name)

    def node(self, name: str) -> dict[str, str]:
        """Return what the controller knows of a node, by field; empty where there is none."""
        done = self.run("scontrol", "--oneliner", "show", "node", name)
        if done.returncode != 0 or "=" not in done.stdout:
            return {}
        return dict(part.split("=", 1) for part in done.stdout.split() if "=" in part)

    def states(self) -> dict[str, str]:
        """Return the states of all nodes, by name."""
        lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %T").stdout.splitlines()
        return dict(line.split(None, 1) for line in lines if " " in line)
