"""Machines: the command line that QEMU gets, where the data goes, how one logs in, what is kept when one fails.

QEMU and ssh are fakes here; tests/integration boots for real.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bakehouse import kvm, machine, seed
from bakehouse.errors import BakehouseError
from bakehouse.instance import Instance
from bakehouse.machine import DataSource, Login, Machine
from bakehouse.network import Port

PORT = Port(10, "node-1")


class FakeNetwork:
    """Takes what a machine wants of a network."""

    mtu = 1500

    def __init__(self) -> None:
        self.told: list[Instance] = []
        self.done: list[str] = []
        self.only_network: list[str] = []

    def port(self, name: str) -> Port:
        return Port(10, name)

    def serve_metadata(self, told: Instance) -> None:
        self.told.append(told)

    def add_tap(self, port: Port) -> None:
        self.done.append(f"add {port.device}")

    def remove(self, port: Port) -> None:
        self.done.append(f"remove {port.device}")


# The command line.


def command(folder: Path, port: Port | None = None, drives: tuple[Path, ...] = (), **options: Any) -> list[str]:
    chosen: dict[str, Any] = {
        "firmware": "bios", "memory": 1024, "cpus": 1, "accelerated": False, "clock": None, "data_source": "nocloud",
    }  # fmt: skip
    return machine._command(folder, folder / "disk.qcow2", [*drives], port, **chosen | options)


def values(words: list[str], option: str) -> list[str]:
    return [word for before, word in itertools.pairwise(words) if before == option]


def test_a_machine_by_itself_is_reached_through_the_host_only(tmp_path: Path) -> None:
    (netdev,) = values(command(tmp_path), "-netdev")
    assert netdev == "user,id=net,hostfwd=tcp:127.0.0.1:0-:22"


def test_a_disk_is_a_virtual_one_or_as_on_metal(tmp_path: Path) -> None:
    assert "virtio-blk-pci,drive=disk,bootindex=1" in values(command(tmp_path), "-device")
    assert "nvme,serial=bakehouse,drive=disk,bootindex=1" in values(command(tmp_path, bus="nvme"), "-device")


def test_a_machine_on_a_network_has_its_ports_device_and_address(tmp_path: Path) -> None:
    words = command(tmp_path, PORT)
    assert values(words, "-netdev") == ["tap,id=net,ifname=port10,script=no,downscript=no"]
    assert f"virtio-net-pci,netdev=net,mac={PORT.mac},romfile=" in words


@pytest.mark.parametrize(("accelerated", "cpu"), [(True, "host"), (False, machine.EMULATED_CPU)])
def test_the_cpu_is_the_hosts_where_kvm_works(tmp_path: Path, accelerated: bool, cpu: str) -> None:
    words = command(tmp_path, accelerated=accelerated, cpus=2, memory=2048)
    assert values(words, "-cpu") == [cpu]
    assert values(words, "-machine") == [f"q35,accel={'kvm' if accelerated else 'tcg'}"]
    assert (values(words, "-smp"), values(words, "-m")) == (["2"], ["2048"])


@pytest.mark.parametrize(
    ("source", "openstack"),
    [("nocloud", False), ("config-drive", True), ("config-drive-partition", False), ("metadata", True)],
)
def test_a_machine_of_nova_says_that_it_is_one_and_one_of_ironic_does_not(
    tmp_path: Path, source: DataSource, openstack: bool
) -> None:
    said = values(command(tmp_path, data_source=source), "-smbios")
    assert said == (["type=1,manufacturer=OpenStack Foundation,product=OpenStack Nova"] if openstack else [])


def test_jumbo_frames_are_told_to_the_card(tmp_path: Path) -> None:
    port = Port(10, "node-1")
    assert "host_mtu" not in values(command(tmp_path, port), "-device")[-1]
    assert values(command(tmp_path, port, mtu=9000), "-device")[-1].endswith(",host_mtu=9000")


def test_a_seed_is_a_disk_that_can_only_be_read(tmp_path: Path) -> None:
    words = command(tmp_path, drives=(tmp_path / "seed.iso",))
    disk, drive = values(words, "-drive")
    assert "readonly" not in disk
    assert drive == f"if=none,id=seed0,file={tmp_path}/seed.iso,format=raw,readonly=on"
    assert "virtio-blk-pci,drive=disk,bootindex=1" in words, "and is not booted from"


def test_a_clock_may_be_wrong(tmp_path: Path) -> None:
    assert values(command(tmp_path), "-rtc") == []
    east = datetime.timezone(datetime.timedelta(hours=2))
    clock = datetime.datetime(2026, 1, 1, 1, 30, tzinfo=east)
    assert values(command(tmp_path, clock=clock), "-rtc") == ["base=2025-12-31T23:30:00,clock=host"]


def test_uefi_has_variables_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "VARS.fd").write_bytes(b"variables")
    monkeypatch.setattr(machine, "OVMF", (Path("/CODE.fd"), tmp_path / "VARS.fd"))
    flash = [drive for drive in values(command(tmp_path, firmware="uefi"), "-drive") if "pflash" in drive]
    assert flash == [
        "if=pflash,format=raw,unit=0,readonly=on,file=/CODE.fd",
        f"if=pflash,format=raw,unit=1,file={tmp_path}/uefi-variables.fd",
    ]
    assert (tmp_path / "uefi-variables.fd").read_bytes() == b"variables"
    assert not [drive for drive in values(command(tmp_path), "-drive") if "pflash" in drive]


def test_secure_boot_has_firmware_with_keys_that_only_it_can_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "VARS.ms.fd").write_bytes(b"with keys")
    monkeypatch.setattr(machine, "OVMF_SECURE", (Path("/CODE.ms.fd"), tmp_path / "VARS.ms.fd"))
    words = command(tmp_path, firmware="secure-boot")
    assert "if=pflash,format=raw,unit=0,readonly=on,file=/CODE.ms.fd" in values(words, "-drive")
    assert (tmp_path / "uefi-variables.fd").read_bytes() == b"with keys"
    assert values(words, "-machine") == ["q35,accel=tcg,smm=on"]
    assert "driver=cfi.pflash01,property=secure,value=on" in values(words, "-global")


# Data sources.


@pytest.fixture
def key(tmp_path: Path) -> Path:
    (tmp_path / "id.pub").write_text("ssh-ed25519 AAAA me\n")
    (tmp_path / "id").write_text("private")
    return tmp_path / "id"


def test_what_a_machine_is_told_holds_its_name_key_and_user_data(key: Path) -> None:
    told = machine._instance("node-1", key, "#cloud-config\n", PORT, "nocloud")
    assert (told.name, told.user_data, told.public_keys) == ("node-1", "#cloud-config\n", ("ssh-ed25519 AAAA me",))
    assert told.networks == (), "DHCP"
    assert told.uuid != machine._instance("node-1", key, "", PORT, "nocloud").uuid, "each boot is a new instance"


@pytest.mark.parametrize("source", ["config-drive", "config-drive-partition"])
def test_a_config_drive_tells_the_address_too(key: Path, source: DataSource) -> None:
    (network,) = machine._instance("node-1", key, "", PORT, source).networks
    assert (network.mac, network.addresses, network.gateways) == (PORT.mac, ("10.77.0.10/24",), ("10.77.0.1",))
    assert machine._instance("node-1", key, "", None, source).networks == ()


def test_a_key_without_its_public_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "id").touch()
    with pytest.raises(BakehouseError, match=r"id\.pub is not there") as caught:
        machine._instance("node-1", tmp_path / "id", "", None, "nocloud")
    assert "ssh-keygen -y" in caught.value.hint


def test_the_data_goes_where_each_source_looks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, network, told = tmp_path / "disk.qcow2", FakeNetwork(), Instance("node-1", "1")
    made: list[tuple[str, Path]] = []
    monkeypatch.setattr(seed, "nocloud_drive", lambda path, _told: made.append(("nocloud", path)))
    monkeypatch.setattr(seed, "config_drive", lambda path, _told: made.append(("config-drive", path)))
    monkeypatch.setattr(seed, "add_config_drive_partition", lambda onto, _iso: made.append(("partition", onto)))
    iso = tmp_path / "seed.iso"
    drives = {
        source: machine._drives(tmp_path, disk, told, source, network)  # type: ignore[arg-type]
        for source in ("nocloud", "config-drive", "config-drive-partition", "metadata")
    }
    assert drives == {"nocloud": [iso], "config-drive": [iso], "config-drive-partition": [], "metadata": []}
    assert made == [("nocloud", iso), ("config-drive", iso), ("config-drive", iso), ("partition", disk)]
    assert network.told == [told]


def test_the_metadata_service_needs_a_network(tmp_path: Path) -> None:
    with pytest.raises(BakehouseError, match="the metadata service needs a private network"):
        machine._drives(tmp_path, tmp_path / "disk", Instance("node-1", "1"), "metadata", None)


# Disks.


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "64M"], check=True)
    return path


def virtual_size(path: Path) -> int:
    shown = subprocess.run(["qemu-img", "info", "--output=json", str(path)], capture_output=True, check=True)
    return int(json.loads(shown.stdout)["virtual-size"])


def test_a_machine_writes_over_the_image_not_into_it(tmp_path: Path, image: Path) -> None:
    before = image.read_bytes()
    machine._overlay(image, tmp_path / "same.qcow2", 0)
    machine._overlay(image, tmp_path / "larger.qcow2", 128 << 20)
    assert virtual_size(tmp_path / "same.qcow2") == 64 << 20
    assert virtual_size(tmp_path / "larger.qcow2") == 128 << 20
    assert image.read_bytes() == before


def test_a_disk_that_would_cut_the_image_is_refused(tmp_path: Path, image: Path) -> None:
    with pytest.raises(BakehouseError, match=r"no disk could be made over .*image\.qcow2") as caught:
        machine._overlay(image, tmp_path / "smaller.qcow2", 32 << 20)
    assert "shrink" in caught.value.log.lower()


def test_a_config_drive_partition_has_room_behind_the_image(image: Path) -> None:
    assert machine._with_room(image, 0) >= (64 + seed.CONFIG_DRIVE_PARTITION_MIB) << 20
    assert machine._with_room(image, 1 << 30) == 1 << 30, "the one that was asked for"


# Logging in.

LOGIN = Login("10.77.0.10", 22, "debian", Path("/keys/id"), ("nsenter", "--net=/proc/7/ns/net", "--"))


def test_one_logs_in_from_where_the_machine_can_be_reached() -> None:
    assert LOGIN.command[:4] == ["nsenter", "--net=/proc/7/ns/net", "--", "ssh"]
    assert LOGIN.command[-3:] == ["-p", "22", "debian@10.77.0.10"]
    assert LOGIN.command[LOGIN.command.index("-i") + 1] == "/keys/id"


def test_ssh_takes_the_configuration_that_the_suites_get(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(LOGIN.config(tmp_path))
    config.chmod(0o600)
    done = subprocess.run(["ssh", "-G", "-F", str(config), "node"], capture_output=True, text=True, check=True)
    shown = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert shown["identityfile"] == "/keys/id"
    assert (shown["stricthostkeychecking"], shown["userknownhostsfile"]) == ("false", "/dev/null")
    assert (shown["controlmaster"], shown["controlpath"]) == ("auto", f"{tmp_path}/ssh")
    assert shown["identitiesonly"] == "yes"


# A machine that runs.

FAKE_QEMU = """\
#!/bin/bash
printf '%s\\n' "$@" > {folder}/arguments
echo $$ > {folder}/pid
echo 'a complaint of QEMU' >&2
cat {folder}/script
[ -e {folder}/off ] && exit 3
exec sleep 1000
"""
FAKE_SSH = """\
#!/bin/bash
[ -e {folder}/deaf ] && {{ echo 'No route to host' >&2; exit 255; }}
for command; do :; done
case "$command" in
    *cloud-init.log*) echo 'permission denied' >&2; exit 1 ;;
    *) echo "said by: $command" ;;
esac
"""


class Bench:
    """Boots machines with fakes of QEMU and ssh."""

    def __init__(self, folder: Path, image: Path, key: Path) -> None:
        self.folder = folder
        self.image = image
        self.key = key
        self.console("Linux version 6.12\nnode-1 login: ")
        for name, text in (("qemu-system-x86_64", FAKE_QEMU), ("ssh", FAKE_SSH)):
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text.format(folder=folder))
            path.chmod(0o755)

    def console(self, text: str) -> None:
        (self.folder / "script").write_text(text)

    def boot(self, **options: Any) -> Any:
        chosen: dict[str, Any] = {"probe": self.folder / "kvm", "key": self.key, "hostname": "node-1"}
        chosen["network"] = FakeNetwork()
        return machine.boot(self.image, **chosen | options)

    def arguments(self) -> list[str]:
        return (self.folder / "arguments").read_text().splitlines()

    def running(self) -> bool:
        return Path("/proc", (self.folder / "pid").read_text().strip(), "comm").exists()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: Path, key: Path) -> Bench:
    made = Bench(tmp_path, image, key)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(machine, "POLL_SECONDS", 0.005)
    monkeypatch.setattr(kvm, "DEVICE", tmp_path / "no-kvm")
    return made


@pytest.fixture
def running(bench: Bench) -> Iterator[Machine]:
    with bench.boot() as made:
        yield made


def test_a_machine_ends_with_its_block_and_leaves_its_port(bench: Bench) -> None:
    network = FakeNetwork()
    with bench.boot(network=network, data_source="metadata", user_data="#cloud-config\n") as made:
        made.wait_for_console("login prompt", "login:", 5)
        assert (made.running, made.accelerator, made.port) == (True, "tcg", PORT)
        assert made.login.host == PORT.address
        assert bench.running()
    assert not bench.running()
    assert network.done == ["add port10", "remove port10"]
    assert network.told[0].user_data == "#cloud-config\n"
    assert "tap,id=net,ifname=port10,script=no,downscript=no" in bench.arguments()


def test_a_machine_ends_with_a_block_that_fails(bench: Bench) -> None:
    network = FakeNetwork()

    def fail() -> None:
        with bench.boot(network=network) as made:
            made.wait_for_console("start", "Linux", 5)
            raise BakehouseError("no")

    with pytest.raises(BakehouseError, match="no"):
        fail()
    assert not bench.running()
    assert network.done == ["add port10", "remove port10"]


def test_a_console_is_kept_where_it_is_asked_for(bench: Bench, tmp_path: Path) -> None:
    with bench.boot(keep_console=tmp_path / "kept.log") as made:
        made.wait_for_console("login prompt", "login:", 5)
    assert "Linux version 6.12" in (tmp_path / "kept.log").read_text()


def test_the_console_is_waited_for_from_a_line_on(running: Machine) -> None:
    line = running.wait_for_console("login prompt", "login:", 5)
    assert line == 1
    with pytest.raises(BakehouseError, match="no second boot within 0 s") as caught:
        running.wait_for_console("second boot", "Linux version", 0.05, line)
    assert "node-1 login:" in caught.value.log
    assert re.search(r"QEMU used \d+ CPU seconds", caught.value.log)


def test_a_kernel_that_panics_is_not_waited_for(bench: Bench) -> None:
    bench.console("Linux version 6.12\nKernel panic - not syncing: VFS\nCall Trace:\n")
    begun = time.monotonic()
    with bench.boot() as made, pytest.raises(BakehouseError, match="the machine's kernel panicked") as caught:
        made.wait_for_console("login prompt", "login:", 60)
    assert "not syncing: VFS" in caught.value.log
    assert time.monotonic() - begun < 10


def test_a_machine_that_goes_off_is_not_waited_for(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "off").touch()
    with bench.boot() as made, pytest.raises(BakehouseError, match=r"went off \(QEMU's exit status 3\)") as caught:
        made.wait_for_console("join", "agent: joined", 60)
    assert "a complaint of QEMU" in caught.value.log


def test_commands_are_run_in_the_machine(running: Machine) -> None:
    running.wait_for_ssh(5)
    done = running.ssh("uname -r")
    assert (done.returncode, done.stdout) == (0, "said by: uname -r\n")


def test_what_tells_of_a_boot_is_collected(running: Machine, tmp_path: Path) -> None:
    running.wait_for_console("login prompt", "login:", 5)
    running.collect(tmp_path / "evidence" / "node-1")
    kept = {path.name: path.read_text() for path in (tmp_path / "evidence" / "node-1").iterdir()}
    assert set(kept) == {"console.log", *machine.EVIDENCE}
    assert kept["console.log"].startswith("Linux version")
    assert "journalctl --boot" in kept["journal.txt"]
    assert "status.json" in kept["agent-status.json"]
    assert kept["cloud-init.log"] == "permission denied\n", "why there is none"


def test_a_machine_that_cannot_be_reached_leaves_its_console_at_least(running: Machine, tmp_path: Path) -> None:
    running.wait_for_console("login prompt", "login:", 5)
    (tmp_path / "deaf").touch()
    with pytest.raises(BakehouseError, match="no login over SSH"):
        running.wait_for_ssh(0.05)
    running.collect(tmp_path / "evidence")
    assert "Linux version" in (tmp_path / "evidence" / "console.log").read_text()
    assert "No route to host" in (tmp_path / "evidence" / "journal.txt").read_text()


def test_a_machine_that_does_not_answer_to_its_power_button_is_switched_off(running: Machine) -> None:
    running.wait_for_console("start", "Linux", 5)
    assert running.stop() is False
    assert not running.running
    assert running.stop() is False


def test_a_machine_that_does_not_care_for_sigterm_is_killed(bench: Bench) -> None:
    program = bench.folder / "bin" / "qemu-system-x86_64"
    program.write_text(program.read_text().replace("#!/bin/bash\n", "#!/bin/bash\ntrap '' TERM\n"))
    with bench.boot() as made:
        made.wait_for_console("start", "Linux", 5)
        waited = made._process.wait
        made._process.wait = lambda timeout=None: waited(timeout and timeout / 50)
    assert made._process.returncode == -signal.SIGKILL


def test_a_monitor_that_is_not_there_is_told(running: Machine) -> None:
    with pytest.raises(BakehouseError, match="QEMU does not take query-status"):
        running.monitor("query-status")


def test_a_key_is_made_for_a_machine_without_one(tmp_path: Path) -> None:
    made = machine.make_key(tmp_path)
    assert made.stat().st_mode & 0o077 == 0
    assert made.with_name(f"{made.name}.pub").read_text().startswith("ssh-ed25519 ")


def test_what_a_killed_run_left_is_removed_and_what_another_one_uses_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    gone = subprocess.Popen(["true"])
    gone.wait()
    for name in (f"{gone.pid}-x", f"{os.getppid()}-x", "of-somebody"):
        (tmp_path / f"{machine.SCRATCH}{name}").mkdir()
        (tmp_path / f"{machine.SCRATCH}{name}/seed.iso").touch()
    with machine._scratch() as own:
        assert own.name.startswith(f"{machine.SCRATCH}{os.getpid()}-")
        left = {path.name.removeprefix(machine.SCRATCH) for path in tmp_path.iterdir()} - {
            own.name.removeprefix(machine.SCRATCH)
        }
    assert left == {f"{os.getppid()}-x", "of-somebody"}
    assert not own.exists()
