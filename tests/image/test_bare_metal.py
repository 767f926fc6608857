"""What an image for machines of metal is. For humans: the names of the tests are the facts."""

from __future__ import annotations

from typing import Any

import pytest
from testinfra.host import Host


def test_it_speaks_to_both_consoles(host: Host) -> None:
    arguments = host.file("/proc/cmdline").content_string.split()
    assert [word for word in arguments if word.startswith("console=")] == ["console=tty0", "console=ttyS0,115200n8"]


def test_lldpd_tells_the_switch_who_is_there(host: Host) -> None:
    assert host.service("lldpd").is_running
    assert host.service("lldpd").is_enabled


def test_the_kernel_has_drivers_of_servers(host: Host) -> None:
    wanted = "mlx5_core bnxt_en ice qede mlx5_ib bnxt_re irdma qedr"
    assert host.run(f"modinfo --filename {wanted}").succeeded


def test_the_initramfs_has_drivers_of_disks(host: Host) -> None:
    listing = host.check_output("lsinitramfs /initrd.img")
    wanted = ("nvme", "megaraid_sas", "mpt3sas", "ahci", "virtio_blk")
    assert [driver for driver in wanted if f"/{driver}.ko" not in listing] == []


def test_firmware_and_microcode_are_there(host: Host) -> None:
    for package in ("firmware-misc-nonfree", "firmware-bnx2x", "intel-microcode", "amd64-microcode"):
        assert host.package(package).is_installed, package


def test_the_signed_chain_is_there(host: Host, record: dict[str, Any]) -> None:
    if not record["secure_boot"]:
        pytest.skip("this image has no signed boot loader")
    assert host.package("shim-signed").is_installed
    assert host.package("grub-efi-amd64-signed").is_installed


def test_a_kernel_upgrade_does_not_write_another_menu(host: Host) -> None:
    assert not host.file("/etc/kernel/postinst.d/zz-update-grub").mode & 0o111
