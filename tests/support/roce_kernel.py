"""A FAKE of what the kernel shows of RDMA devices, for tests of the RoCE tool: a root folder and stand-ins of programs.

Nothing here is a kernel. What sysfs and configfs hold follows Documentation/ABI (configfs-rdma_cm,
sysfs-class-infiniband, sysfs-class-net) and what soft RoCE on Linux 6.12 shows; the DCB side has never been compared
with real hardware, only with the sources of iproute2, ethtool and the drivers. A test can have any file or program
refuse a value, or take it and drop it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from bakehouse import REPOSITORY

TOOL = REPOSITORY / "bootstrap" / "roce" / "bakehouse_roce.py"
FAKES = REPOSITORY / "tests" / "fakes" / "roce"
VENDOR = REPOSITORY / "tests" / "fakes" / "roce-vendor"

LOCAL = "fe80:0000:0000:0000:5054:00ff:fe12:3456"
IPV4 = "0000:0000:0000:0000:0000:ffff:0a00:0005"
SYSCTLS = {
    "net/ipv4/neigh/default/gc_thresh1": "128", "net/ipv4/neigh/default/gc_thresh2": "512",
    "net/ipv4/neigh/default/gc_thresh3": "1024", "net/ipv6/neigh/default/gc_thresh1": "128",
    "net/ipv6/neigh/default/gc_thresh2": "512", "net/ipv6/neigh/default/gc_thresh3": "1024",
    "vm/zone_reclaim_mode": "0", "net/ipv4/tcp_ecn": "2",
}  # fmt: skip


def dcb_defaults() -> dict[str, Any]:
    """Return what a NIC's DCB objects hold before anybody has set them."""
    return {
        "dcbx": {"lld_managed": True, "cee": True, "ieee": True},
        "app": {},
        "apptrust": {"order": ["pcp"]},
        "ets": {
            "willing": False, "ets_cap": 8, "cbs": False, "tc_bw": [0] * 8, "pg_bw": [0] * 8, "tc_tsa": ["strict"] * 8,
            "prio_tc": [0] * 8, "reco_tc_bw": [0] * 8, "reco_tc_tsa": ["strict"] * 8, "reco_prio_tc": [0] * 8,
        },
        "buffer": {"prio_buffer": [0] * 8, "buffer_size": [130944, 130944, 0, 0, 0, 0, 0, 0], "total_size": 261888},
        "pfc": {"pfc_cap": 8, "macsec_bypass": False, "delay": 0, "prio_pfc": [False] * 8},
    }  # fmt: skip


class Kernel:
    """A machine's root folder, and what is to go wrong on it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rules: dict[str, Any] = {}
        self.files: dict[str, int | str] = {}
        """What writing to a file of the kernel does, by the end of its path: an errno, or "ignore"."""
        for name, value in SYSCTLS.items():
            self.write(f"proc/sys/{name}", value)
        for cpu in range(2):
            self.write(f"sys/devices/system/cpu/cpufreq/policy{cpu}/scaling_governor", "powersave")
        self.write("etc/security/limits.d/rdma.conf", "* - memlock unlimited\nroot - memlock unlimited # for MPI\n")
        self.write("etc/systemd/system.conf.d/rdma.conf", "[Manager]\nDefaultLimitMEMLOCK=infinity\n")
        self.write("fake/log", "")
        self.path("sys/class/net").mkdir(parents=True, exist_ok=True)

    # What there is.

    def path(self, name: str) -> Path:
        """Return a path below the root; its folder is made."""
        place = self.root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def write(self, name: str, text: str) -> None:
        """Write a file as the kernel shows it."""
        self.path(name).write_text(text + "\n")

    def read(self, name: str) -> str:
        """Return what a file holds."""
        return (self.root / name).read_text().strip()

    def add_nic(
        self, name: str, *, driver: str = "mlx5_core", address: str = "0000:03:00.0", dcb: bool = True, port: int = 0
    ) -> None:
        """Plug in a NIC's network side."""
        device = self.root / f"sys/devices/pci0000:00/{address}"
        for file, value in {"vendor": "0x15b3", "device": "0x101d", "numa_node": "1", "local_cpulist": "8-15"}.items():
            self.write(f"sys/devices/pci0000:00/{address}/{file}", value)
        drivers = self.path(f"sys/bus/pci/drivers/{driver}")
        drivers.mkdir(exist_ok=True)
        if not (device / "driver").exists():
            (device / "driver").symlink_to(drivers)
        about = {"mtu": "1500", "type": "1", "speed": "100000", "carrier": "1", "address": "b8:ce:f6:00:00:01"}
        for file, value in {**about, "dev_port": str(port), "uevent": f"INTERFACE={name}"}.items():
            self.write(f"sys/class/net/{name}/{file}", value)
        (self.root / f"sys/class/net/{name}/device").symlink_to(device)
        self.path(f"sys/devices/pci0000:00/{address}/net/{name}/x")
        for end in ("np", "rp"):
            for priority in range(8):
                self.write(f"sys/class/net/{name}/ecn/roce_{end}/enable/{priority}", "0")
        self.change("ethtool.json", name, {
            "pause": {"autonegotiate": False, "rx": True, "tx": True}, "firmware": "22.39.1002 (MT_0000000359)",
        } if dcb else {"firmware": ""})  # fmt: skip
        if dcb:
            self.change("dcb.json", name, dcb_defaults())

    def add_rdma(self, name: str, interface: str, *, link_layer: str = "Ethernet", port: int = 1) -> None:
        """Plug in an RDMA device, or one more port of it."""
        folder = f"sys/class/infiniband/{name}"
        self.write(f"{folder}/node_type", "1: CA")
        device = self.root / folder / "device"
        if not device.is_symlink() and interface:
            device.symlink_to((self.root / f"sys/class/net/{interface}/device").resolve())
        about = {
            "link_layer": link_layer,
            "state": "4: ACTIVE",
            "phys_state": "5: LinkUp",
            "rate": "100 Gb/sec (4X EDR)",
        }
        for file, value in about.items():
            self.write(f"{folder}/ports/{port}/{file}", value)
        if link_layer == "Ethernet":
            for index, (kind, gid) in enumerate(
                [("IB/RoCE v1", LOCAL), ("RoCE v2", LOCAL), ("IB/RoCE v1", IPV4), ("RoCE v2", IPV4)]
            ):
                self.write(f"{folder}/ports/{port}/gids/{index}", gid)
                self.write(f"{folder}/ports/{port}/gid_attrs/types/{index}", kind)
                self.write(f"{folder}/ports/{port}/gid_attrs/ndevs/{index}", interface)

    def add_soft(self, name: str, interface: str) -> None:
        """Make a soft RoCE device on an interface that knows no DCB."""
        self.add_nic(interface, driver="virtio_net", address="virtio0", dcb=False)
        (self.root / f"sys/class/net/{interface}/ecn").rename(self.root / f"fake/no-ecn-{interface}")
        self.add_rdma(name, interface)
        (self.root / f"sys/class/infiniband/{name}/device").unlink()
        self.write(f"sys/class/infiniband/{name}/parent", interface)

    def remove_rdma(self, name: str) -> None:
        """Pull an RDMA device out."""
        folder = self.root / f"sys/class/infiniband/{name}"
        folder.rename(self.root / f"fake/removed-{name}")

    def rename_rdma(self, name: str, new: str) -> None:
        """Give an RDMA device another name."""
        (self.root / f"sys/class/infiniband/{name}").rename(self.root / f"sys/class/infiniband/{new}")

    def configure(self, text: str) -> None:
        """Write roce.yaml."""
        self.path("etc/bakehouse/roce.yaml").write_text(text)

    # What the programs know.

    def change(self, file: str, key: str, value: Any) -> None:
        """Change one entry of the fake programs' state."""
        path = self.path(f"fake/{file}")
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, key: value}))

    def dcb(self, interface: str) -> dict[str, Any]:
        """Return the DCB objects of an interface."""
        found: dict[str, Any] = json.loads((self.root / "fake/dcb.json").read_text())[interface]
        return found

    def set_dcb(self, interface: str, **objects: Any) -> None:
        """Change DCB objects; None takes one away."""
        known = {**self.dcb(interface), **objects}
        self.change("dcb.json", interface, {name: value for name, value in known.items() if value is not None})

    def pause(self, interface: str) -> dict[str, bool]:
        """Return the pause frames of an interface."""
        found: dict[str, bool] = json.loads((self.root / "fake/ethtool.json").read_text())[interface]["pause"]
        return found

    def rule(self, name: str, what: Any) -> None:
        """Say what goes wrong, for the fake programs."""
        self.change("rules.json", name, what)

    def log(self) -> list[str]:
        """Return the calls of fake programs, in order."""
        return (self.root / "fake/log").read_text().splitlines()

    # The kernel's part in what the tool does.

    def poke(self, path: str, text: str) -> None:
        """Take a write to a file of the kernel, or not."""
        for end, what in self.files.items():
            if path.endswith(end):
                if isinstance(what, int):
                    raise OSError(what, os.strerror(what), path)
                return
        if path.endswith("/mtu") and (slaves := Path(path).with_name("bonding") / "slaves").exists():
            for name in slaves.read_text().split():
                self.write(f"sys/class/net/{name}/mtu", text)
        with open(os.open(path, os.O_WRONLY | os.O_TRUNC), "w") as file:  # noqa: PTH123 (it must be there)
            file.write(text + "\n")

    def make_folder(self, path: str) -> None:
        """Make a folder of configfs and fill it, as rdma_cm does."""
        name = Path(path).name
        ports = self.root / f"sys/class/infiniband/{name}/ports"
        if not ports.is_dir():
            raise OSError(19, os.strerror(19), path)
        Path(path).mkdir()
        for port in ports.iterdir():
            self.write(f"sys/kernel/config/rdma_cm/{name}/ports/{port.name}/default_roce_mode", "IB/RoCE v1")
            self.write(f"sys/kernel/config/rdma_cm/{name}/ports/{port.name}/default_roce_tos", "0")

    # The tool.

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which the tool meets this machine."""
        return {**os.environ, "BAKEHOUSE_ROOT": str(self.root), "PATH": f"{FAKES}:/usr/bin:/bin"}

    def load(self) -> ModuleType:
        """Return the tool as a module that meets this kernel. BAKEHOUSE_ROOT and PATH must be set to it."""
        spec = importlib.util.spec_from_file_location("bakehouse_roce", TOOL)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.poke = self.poke  # type: ignore[attr-defined]
        module.make_folder = self.make_folder  # type: ignore[attr-defined]
        return module

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the tool as a program of its own; files of the kernel take everything then."""
        command = [sys.executable, "-IS", str(TOOL), *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=30, check=False)

    def result(self, device: str) -> dict[str, Any]:
        """Return what the tool has noted of a device."""
        found: dict[str, Any] = json.loads((self.root / f"run/bakehouse/roce/{device}.json").read_text())
        return found
