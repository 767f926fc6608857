"""The disk, assembled in user space: nothing is mounted, no loop device, no device-mapper, so nothing can leak.

A GPT with a BIOS boot partition, an EFI system partition and the root; GRUB for both kinds of firmware. The root is
written by ``mke2fs -d``, the EFI partition by mtools, GRUB's images by ``grub-mkimage``. A root that brings shim and
a signed GRUB gets these for UEFI: the chain of Secure Boot.

Runs as root in an isolated process (``python -m bakehouse.disk``), since files in the root belong to root. Standard
library only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

MIB = 1 << 20
SECTOR = 512
BIOS_BOOT_MIB = 1
EFI_MIB = 64

# Partition types (UEFI specification 2.10, table 5.7; systemd's Discoverable Partitions Specification for the root).
BIOS_BOOT_TYPE = "21686148-6449-6E6F-744E-656564454649"
EFI_TYPE = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
ROOT_TYPE = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"

GRUB_FOLDER = Path("/usr/lib/grub")
GRUB_MODULES = (
    "boot cat configfile echo ext2 fat halt help linux ls minicmd normal part_gpt reboot search search_fs_uuid "
    "serial terminal test true"
).split()

# Where Debian's packages shim-signed, shim-helpers-amd64-signed and grub-efi-amd64-signed have their programs, and the
# names that these look for each other by (shim's README.fallback and MokManager).
SIGNED = {
    "usr/lib/shim/shimx64.efi.signed": "BOOTX64.EFI",
    "usr/lib/shim/mmx64.efi.signed": "mmx64.efi",
    "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed": "grubx64.efi",
}
SIGNED_GRUB_MENU = "EFI/debian/grub.cfg"
"""What Debian's signed GRUB reads: its prefix is built in."""

# GRUB's boot.img and diskboot.img (grub-core/boot/i386/pc/boot.S and diskboot.S, include/grub/i386/pc/boot.h).
MBR_CODE_BYTES = 440
KERNEL_SECTOR_AT = 0x5C
DRIVE_CHECK_AT = 0x66
BLOCKLIST_AT = SECTOR - 12

# Features that older GRUBs and kernels cannot read, and that newer mke2fs would turn on by itself.
EXT4_FEATURES = "^metadata_csum_seed,^orphan_file"


@dataclass(frozen=True)
class Layout:
    """Where things are on the disk. All in MiB."""

    root_start: int
    root_size: int
    efi_start: int | None
    bios_start: int | None
    total: int

    @staticmethod
    def of(root_size: int, firmware: list[str]) -> Layout:
        """Lay out a disk.

        Args:
            root_size: bytes of the root partition; rounded up to whole MiB.
            firmware: bios, uefi or both.
        """
        at = 1
        bios = efi = None
        if "bios" in firmware:
            bios, at = at, at + BIOS_BOOT_MIB
        if "uefi" in firmware:
            efi, at = at, at + EFI_MIB
        size = -(-root_size // MIB)
        # The last MiB holds the backup GPT.
        return Layout(root_start=at, root_size=size, efi_start=efi, bios_start=bios, total=at + size + 1)


@dataclass(frozen=True)
class Result:
    """What was made."""

    root_size: int
    """Bytes of the root partition."""
    root_used: int
    """Bytes that the files take."""
    virtual_size: int
    """Bytes of the disk."""
    allocated: int
    """Bytes that the sparse file takes."""
    secure_boot: bool
    """Whether UEFI's loader is the signed one."""


def assemble(root: Path, image: Path, *, root_uuid: str, root_size: int | None, firmware: list[str]) -> Result:
    """Make a bootable raw disk image of a root filesystem.

    Args:
        root: the root filesystem; it is only read.
        image: the file to make; sparse.
        root_uuid: the UUID of the root filesystem.
        root_size: bytes of the root partition, or None for what is needed and some room.
        firmware: bios, uefi or both.

    Raises:
        subprocess.CalledProcessError: a tool failed; what it said is on standard error.
        ValueError: the root does not fit.
    """
    used = int(_output(["du", "--summarize", "--one-file-system", "--block-size=1", str(root)]).split()[0])
    wanted = root_size if root_size is not None else used + used // 5 + 256 * MIB
    if wanted < used + used // 20 + 64 * MIB:
        raise ValueError(
            f"disk.root_size is {wanted // MIB} MiB, but the files take {used // MIB} MiB and ext4 needs some room"
        )
    layout = Layout.of(wanted, firmware)
    with image.open("wb") as file:
        file.truncate(layout.total * MIB)
    _partition(image, layout)
    _make_root(root, image, layout, root_uuid)
    with tempfile.TemporaryDirectory(prefix="grub-", dir=image.parent) as folder:
        early = Path(folder, "early.cfg")
        early.write_text(
            f"search --no-floppy --fs-uuid --set=root {root_uuid}\n"
            "set prefix=($root)/boot/grub\nconfigfile $prefix/grub.cfg\n"
        )
        signed = layout.efi_start is not None and _install_efi(root, image, layout.efi_start, early)
        if layout.bios_start is not None:
            _install_bios(image, layout.bios_start, early)
    return Result(layout.root_size * MIB, used, layout.total * MIB, image.stat().st_blocks * 512, signed)


def _partition(image: Path, layout: Layout) -> None:
    lines = ["label: gpt"]
    if layout.bios_start is not None:
        lines.append(f"start={layout.bios_start}MiB, size={BIOS_BOOT_MIB}MiB, type={BIOS_BOOT_TYPE}, name=bios")
    if layout.efi_start is not None:
        lines.append(f"start={layout.efi_start}MiB, size={EFI_MIB}MiB, type={EFI_TYPE}, name=efi")
    # The root is last, so that it can grow.
    lines.append(f"start={layout.root_start}MiB, size={layout.root_size}MiB, type={ROOT_TYPE}, name=root")
    _tool(["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", str(image)], text="\n".join(lines) + "\n")


def _make_root(root: Path, image: Path, layout: Layout, root_uuid: str) -> None:
    # A file just made reads as zeros, so the tables need not be written nor zeroed later by the node.
    extended = f"offset={layout.root_start * MIB},root_owner=0:0,nodiscard,assume_storage_prezeroed=1"
    options = ["-q", "-F", "-t", "ext4", "-O", EXT4_FEATURES, "-L", "root", "-U", root_uuid, "-m", "1"]
    _tool(["mke2fs", *options, "-E", extended, "-d", str(root), str(image), f"{layout.root_size}M"])


def _install_efi(root: Path, image: Path, start: int, early: Path) -> bool:
    """Make the EFI partition. Return whether its loader is a signed one."""
    files = {f"EFI/BOOT/{name}": root / path for path, name in SIGNED.items()}
    signed = all(path.is_file() for path in files.values())
    if signed:
        files[SIGNED_GRUB_MENU] = early
    else:
        loader = early.with_name("BOOTX64.EFI")
        _tool([
            "grub-mkimage", "--format=x86_64-efi", f"--output={loader}", f"--config={early}", "--prefix=/boot/grub",
            *GRUB_MODULES, "efi_gop",
        ])  # fmt: skip
        files = {"EFI/BOOT/BOOTX64.EFI": loader}
    where = f"{image}@@{start * MIB}"
    sectors = EFI_MIB * MIB // SECTOR
    _tool(["mformat", "-i", where, "-F", "-v", "EFI", "-T", str(sectors), "-h", "64", "-s", "32", "::"])
    folders = sorted({str(parent) for name in files for parent in Path(name).parents if parent.name})
    _tool(["mmd", "-i", where, *(f"::/{folder}" for folder in folders)])
    for name, path in files.items():
        _tool(["mcopy", "-i", where, str(path), f"::/{name}"])
    return signed


def _install_bios(image: Path, start: int, early: Path) -> None:
    """Write GRUB's core image into its partition and the code that finds it into the first sector."""
    core_file = early.with_name("core.img")
    _tool([
        "grub-mkimage", "--format=i386-pc", f"--output={core_file}", f"--config={early}", "--prefix=/boot/grub",
        *GRUB_MODULES, "biosdisk",
    ])  # fmt: skip
    core = bytearray(core_file.read_bytes())
    if len(core) > BIOS_BOOT_MIB * MIB:
        raise ValueError(f"GRUB's core image is {len(core)} bytes, more than its partition holds")
    first = start * MIB // SECTOR
    length = struct.unpack_from("<H", core, BLOCKLIST_AT + 8)[0]
    if length != -(-len(core) // SECTOR) - 1:
        raise ValueError("GRUB's core image has another form than expected; its version may be too new for Bakehouse")
    struct.pack_into("<Q", core, BLOCKLIST_AT, first + 1)
    boot = bytearray((GRUB_FOLDER / "i386-pc/boot.img").read_bytes()[:MBR_CODE_BYTES])
    struct.pack_into("<Q", boot, KERNEL_SECTOR_AT, first)
    # As grub-bios-setup does for hard disks: trust the drive number that the firmware gives.
    boot[DRIVE_CHECK_AT : DRIVE_CHECK_AT + 2] = b"\x90\x90"
    with image.open("r+b") as file:
        file.write(boot)
        file.seek(start * MIB)
        file.write(core)


def _tool(command: list[str], text: str | None = None) -> None:
    print("$", " ".join(command), flush=True)
    environment = {**os.environ, "MTOOLS_SKIP_CHECK": "1"}
    subprocess.run(command, input=text, text=True, check=True, env=environment)


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Assemble a disk from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--root-uuid", required=True)
    parser.add_argument("--root-size", type=int, help="bytes")
    parser.add_argument("--firmware", nargs="+", default=["bios", "uefi"])
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--keep-kernel", type=Path, help="copy the kernel here: it serves to try KVM with")
    arguments = parser.parse_args()
    try:
        result = assemble(
            arguments.root,
            arguments.image,
            root_uuid=arguments.root_uuid,
            root_size=arguments.root_size,
            firmware=arguments.firmware,
        )
    except (subprocess.CalledProcessError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if arguments.keep_kernel:
        kernel = arguments.root / "boot" / (arguments.root / "vmlinuz").readlink().name
        shutil.copyfile(kernel, arguments.keep_kernel)
    arguments.report.write_text(json.dumps(asdict(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
