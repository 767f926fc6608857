"""An image for machines of metal, on a disk as Ironic's deploy agent leaves it."""

from __future__ import annotations

import filecmp
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from oslo_utils.imageutils import format_inspector

from bakehouse import disk
from bakehouse.harness import BootMachine
from bakehouse.machine import Machine
from bakehouse.record import Record
from bakehouse.seed import MIB, SECTOR
from bakehouse.settings import Settings
from bakehouse.store import LocalStore
from tests.support import ironic

pytestmark = pytest.mark.slow

DISK = 6 << 30
"""Bytes: several times the image."""

LARGE_DISK = 3 << 40
"""Bytes: more than MBR could address, and than the room that mke2fs leaves for group descriptors lets ext4 grow to."""

BOOT_SECONDS = 900
"""Emulated on a busy host with two cores; with KVM it is ten."""

FIRMWARE_SECONDS = 180

KERNEL = r"Linux version \d"
"""What the console shows when the boot loader has started the kernel."""

REFUSED = r"BdsDxe: failed to load Boot.*: (Access Denied|Security Violation)"
"""What EDK II says of a boot loader with a bad signature or none (MdeModulePkg/Library/UefiBootManagerLib)."""


@pytest.fixture(scope="module")
def raw(roce_image: Record, real_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The image as raw; it goes with the module, for it is large."""
    file = LocalStore(real_settings.store).image(roce_image)
    made = ironic.raw_of(file, tmp_path_factory.mktemp("raw") / "image.raw") if file.suffix == ".qcow2" else file
    yield made
    if made is not file:
        made.unlink()


@pytest.fixture
def written(raw: Path, tmp_path: Path) -> Iterator[Path]:
    """A disk that the image was written to."""
    made = tmp_path / "disk.raw"
    ironic.write_raw(raw, made, DISK)
    yield made
    made.unlink()


def test_raw_and_qcow2_come_to_the_same_disk(
    roce_image: Record, real_settings: Settings, written: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.raw"
    ironic.write_qcow2(LocalStore(real_settings.store).image(roce_image), other, DISK)
    assert filecmp.cmp(written, other, shallow=False)
    other.unlink()
    assert "at the end of the disk" in " ".join(ironic.problems(written).split()), "which the agent mends"


def test_ironic_takes_both_and_they_need_little_of_its_cache(
    roce_image: Record, real_settings: Settings, raw: Path
) -> None:
    """It looks into images as Glance does, and keeps them as raw."""
    for path, kind in ((LocalStore(real_settings.store).image(roce_image), "qcow2"), (raw, "gpt")):
        found = format_inspector.detect_file_format(str(path))
        assert found is not None
        assert str(found) == kind, "of [conductor]permitted_image_formats"
        found.safety_check()
    size = raw.stat().st_size
    assert size % MIB == 0
    assert size < 2 << 30
    assert size < 1.2 * roce_image.root_used + 400 * MIB, "no more empty room than ext4 needs, and the other partitions"


def boot(boot_machine: BootMachine, written: Path, firmware: str, bus: str = "virtio") -> Machine:
    """Boot a disk that an image was written to, with a config drive added as the agent does, and nothing else."""
    return boot_machine(
        written, hostname="metal-1", firmware=firmware, disk_size=written.stat().st_size, bus=bus, cpus=2,
        data_source="config-drive-partition",
    )  # fmt: skip


def test_it_boots_from_its_own_disk_and_takes_the_rest_of_it(boot_machine: BootMachine, written: Path) -> None:
    node = boot(boot_machine, written, "uefi")
    node.wait_for_ssh(BOOT_SECONDS)
    check_config_drive(node)
    check_root_has_grown(node, DISK)
    assert node.ssh("test -d /sys/firmware/efi").returncode == 0
    assert node.ssh("sudo dmesg | grep -iE 'GPT:|I/O error|EXT4-fs (error|warning)'").stdout == ""
    # This is its first boot still, and it wants no second one.
    assert len(node.ssh("sudo journalctl --list-boots --quiet --no-pager").stdout.splitlines()) == 1
    assert node.ssh("test -e /run/reboot-required").returncode != 0
    assert node.stop(), "it goes down when the power button is pressed"
    after = ironic.raw_of(node.disk, written.with_name("after.raw"))
    assert ironic.problems(after) == ""
    after.unlink()


def check_config_drive(node: Machine, config: str = "/dev/vda4") -> None:
    """Its name and its key are from the partition of the only disk that it has."""
    disks = node.ssh("lsblk --nodeps --noheadings --output TYPE").stdout.split()
    assert disks.count("disk") == 1
    assert node.ssh("sudo blkid -o device -t LABEL=config-2").stdout.strip() == config
    said = node.ssh("cloud-init status --wait --long", timeout=BOOT_SECONDS).stdout
    assert "status: done" in said
    assert f"DataSourceConfigDrive [net,ver=2][source={config}]" in said
    assert "errors: []" in said
    assert node.ssh("cloud-init query subplatform").stdout.strip() == f"config-disk ({config})"
    assert node.ssh("hostname; cloud-init query local_hostname").stdout.split() == ["metal-1", "metal-1"]
    public = node.login.key.with_name(f"{node.login.key.name}.pub").read_text().split()[1]
    assert public in node.ssh("cat .ssh/authorized_keys").stdout


def check_root_has_grown(node: Machine, disk_size: int, device: str = "/dev/vda", partition: str = "vda3") -> None:
    """The root ends where the config drive begins, and the file system fills it."""
    assert "No errors detected" in node.ssh(f"sudo sfdisk --verify {device}").stdout
    *_, root, config = ironic.partitions(node.ssh(f"sudo sfdisk --json {device}").stdout)
    assert root.name == "root"
    assert 0 <= config.start - root.end <= MIB
    assert 64 * MIB <= config.size <= 65 * MIB
    assert 0 < disk_size - config.end <= MIB
    kernel = node.ssh(f"cat /sys/class/block/{partition}/size").stdout
    assert int(kernel) * SECTOR == root.size, "the kernel has seen it too"
    size = int(node.ssh("findmnt --noheadings --bytes --output SIZE /").stdout)
    assert size > 0.9 * root.size


# Secure Boot ----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_it_boots_the_same_under_secure_boot_on_a_large_nvme_disk(
    boot_machine: BootMachine, roce_image: Record, raw: Path, tmp_path: Path
) -> None:
    assert roce_image.secure_boot
    written = tmp_path / "disk.raw"
    ironic.write_raw(raw, written, LARGE_DISK)
    node = boot(boot_machine, written, "secure-boot", bus="nvme")
    node.wait_for_ssh(BOOT_SECONDS)
    assert node.ssh("mokutil --sb-state").stdout.strip() == "SecureBoot enabled"
    assert "[integrity]" in node.ssh("sudo cat /sys/kernel/security/lockdown").stdout
    check_config_drive(node, "/dev/nvme0n1p4")
    check_root_has_grown(node, LARGE_DISK, "/dev/nvme0n1", "nvme0n1p3")


@pytest.mark.long
def test_the_same_firmware_refuses_a_loader_that_nobody_signed(
    boot_machine: BootMachine, written: Path, tmp_path: Path
) -> None:
    replace_loader(written, tmp_path)
    node = boot(boot_machine, written, "uefi")
    node.wait_for_console("start of the kernel", KERNEL, FIRMWARE_SECONDS)
    node.kill()
    node = boot(boot_machine, written, "secure-boot")
    node.wait_for_console("refusal by the firmware", REFUSED, FIRMWARE_SECONDS)
    assert node.console.find(KERNEL) is None


def replace_loader(written: Path, folder: Path) -> None:
    """Put GRUB as an image without a signed one has it in place of shim and the signed GRUB, with the same menu."""
    table = subprocess.check_output(["sfdisk", "--json", str(written)], text=True)
    (efi,) = [part for part in ironic.partitions(table) if part.name == "efi"]
    early = folder / "early.cfg"
    early.write_bytes(
        subprocess.check_output(["mtype", "-i", f"{written}@@{efi.start}", f"::/{disk.SIGNED_GRUB_MENU}"])
    )
    nothing_signed = folder / "root"
    nothing_signed.mkdir()
    assert not disk._install_efi(nothing_signed, written, efi.start // MIB, early)
