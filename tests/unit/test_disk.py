"""The disk: its layout, its boot loaders and its root, read back with the tools of others."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bakehouse import disk
from bakehouse.disk import MIB, SECTOR, Layout

UUID = "00000000-0000-4000-8000-000000000001"
SIZE = 96 * MIB


@pytest.mark.parametrize(
    ("firmware", "layout"),
    [
        (["bios", "uefi"], Layout(root_start=66, root_size=100, efi_start=2, bios_start=1, total=167)),
        (["uefi", "bios"], Layout(root_start=66, root_size=100, efi_start=2, bios_start=1, total=167)),
        (["bios"], Layout(root_start=2, root_size=100, efi_start=None, bios_start=1, total=103)),
        (["uefi"], Layout(root_start=65, root_size=100, efi_start=1, bios_start=None, total=166)),
    ],
)
def test_partitions_follow_one_another_and_the_root_is_last(firmware: list[str], layout: Layout) -> None:
    assert Layout.of(100 * MIB, firmware) == layout


def test_a_root_is_rounded_up_to_whole_mebibytes() -> None:
    assert Layout.of(100 * MIB + 1, ["bios"]).root_size == 101
    assert Layout.of(100 * MIB - 1, ["bios"]).root_size == 100


def make_root(folder: Path) -> Path:
    root = folder / "root"
    for name in ("boot/grub", "etc", "home/debian", "tmp", "usr/bin"):
        (root / name).mkdir(parents=True)
    (root / "boot/vmlinuz-6.12-x").write_bytes(b"kernel")
    (root / "vmlinuz").symlink_to("boot/vmlinuz-6.12-x")
    (root / "boot/grub/grub.cfg").write_text("# menu\n")
    (root / "tmp").chmod(0o1777)
    (root / "usr/bin/sudo").write_bytes(b"x" * 5000)
    (root / "usr/bin/sudo").chmod(0o4755)
    (root / "etc/shadow").write_text("secret\n")
    os.chown(root / "etc/shadow", 0, 42)
    (root / "etc/shadow").chmod(0o640)
    os.chown(root / "home/debian", 1000, 1001)
    os.setxattr(root / "usr/bin/sudo", "user.note", b"kept")
    os.chown(root, 12, 13)
    return root


@dataclass
class Assembled:
    """A disk and the root that it was made of."""

    root: Path
    image: Path
    result: disk.Result
    mounted_something: bool

    def table(self) -> list[dict[str, Any]]:
        output = subprocess.check_output(["sfdisk", "--json", str(self.image)], text=True)
        parts: list[dict[str, Any]] = json.loads(output)["partitiontable"]["partitions"]
        return parts

    def start(self, name: str) -> int:
        """Return the first byte of a partition."""
        return next(int(part["start"]) for part in self.table() if part["name"] == name) * SECTOR

    def ask_root(self, request: str) -> str:
        """Ask debugfs about the root filesystem."""
        return subprocess.check_output(
            ["debugfs", "-R", request, f"{self.image}?offset={self.start('root')}"],
            text=True,
            stderr=subprocess.DEVNULL,
        )


NEEDLESS = ("mount", "losetup", "kpartx", "dmsetup", "chroot", "sudo")


@pytest.fixture(scope="module")
def assembled(tmp_path_factory: pytest.TempPathFactory) -> Assembled:
    folder, traps = tmp_path_factory.mktemp("disk"), tmp_path_factory.mktemp("traps")
    for name in NEEDLESS:
        (traps / name).write_text(f"#!/bin/sh\ntouch {traps}/sprung\nexit 1\n")
        (traps / name).chmod(0o755)
    root, image = make_root(folder), folder / "disk.raw"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{traps}:{os.environ['PATH']}")
        result = disk.assemble(root, image, root_uuid=UUID, root_size=SIZE, firmware=["bios", "uefi"])
    return Assembled(root, image, result, (traps / "sprung").exists())


def test_the_disk_has_the_size_that_is_told(assembled: Assembled) -> None:
    layout = Layout.of(SIZE, ["bios", "uefi"])
    assert assembled.result.root_size == SIZE
    assert assembled.result.virtual_size == layout.total * MIB == assembled.image.stat().st_size
    assert 5000 < assembled.result.root_used < MIB
    assert assembled.image.stat().st_blocks * 512 < 40 * MIB, "sparse"


def test_partitions_have_their_types_and_places(assembled: Assembled) -> None:
    layout = Layout.of(SIZE, ["bios", "uefi"])
    assert layout.bios_start is not None
    assert layout.efi_start is not None
    found = [(part["name"], part["type"], part["start"] * SECTOR, part["size"] * SECTOR) for part in assembled.table()]
    assert found == [
        ("bios", disk.BIOS_BOOT_TYPE, layout.bios_start * MIB, MIB),
        ("efi", disk.EFI_TYPE, layout.efi_start * MIB, disk.EFI_MIB * MIB),
        ("root", disk.ROOT_TYPE, layout.root_start * MIB, SIZE),
    ]


def test_the_partition_table_is_sound(assembled: Assembled) -> None:
    done = subprocess.run(["sfdisk", "--verify", str(assembled.image)], capture_output=True, text=True, check=True)
    assert "No errors detected" in done.stdout
    with assembled.image.open("rb") as file:
        file.seek(-SECTOR, os.SEEK_END)
        assert file.read(8) == b"EFI PART", "the backup table is at the end"


def test_the_root_filesystem_is_clean(assembled: Assembled, tmp_path: Path) -> None:
    partition = tmp_path / "root.ext4"
    with assembled.image.open("rb") as source, partition.open("wb") as target:
        source.seek(assembled.start("root"))
        for _ in range(SIZE // MIB):
            piece = source.read(MIB)
            if piece.strip(b"\0"):
                target.write(piece)
            else:
                target.seek(MIB, os.SEEK_CUR)
        target.truncate(SIZE)
    done = subprocess.run(["e2fsck", "-fn", str(partition)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_root_filesystem_has_its_name_and_features(assembled: Assembled) -> None:
    told = dict(
        line.split(":", 1) for line in assembled.ask_root("show_super_stats -h").splitlines() if ":" in line
    )  # fmt: skip
    assert told["Filesystem UUID"].strip() == UUID
    assert told["Filesystem volume name"].strip() == "root"
    features = set(told["Filesystem features"].split())
    assert {"extent", "has_journal"} <= features
    assert not {"metadata_csum_seed", "orphan_file"} & features


@pytest.mark.parametrize(
    ("path", "mode", "user", "group"),
    [
        ("/usr/bin/sudo", "04755", 0, 0),
        ("/etc/shadow", "0640", 0, 42),
        ("/home/debian", "0755", 1000, 1001),
        ("/tmp", "01777", 0, 0),
        ("/", "0755", 0, 0),
    ],
)
def test_owners_and_modes_survive(assembled: Assembled, path: str, mode: str, user: int, group: int) -> None:
    words = assembled.ask_root(f"stat {path}").replace(":", ": ").split()
    found = {name: words[words.index(f"{name}:") + 1] for name in ("Mode", "User", "Group")}
    assert found == {"Mode": mode, "User": str(user), "Group": str(group)}


def test_contents_links_and_attributes_survive(assembled: Assembled) -> None:
    assert assembled.ask_root("cat /etc/shadow") == "secret\n"
    assert 'Fast link dest: "boot/vmlinuz-6.12-x"' in assembled.ask_root("stat /vmlinuz")
    assert "kept" in assembled.ask_root("ea_get /usr/bin/sudo user.note")


def test_the_efi_partition_has_a_loader_where_firmware_looks(assembled: Assembled, tmp_path: Path) -> None:
    where = f"{assembled.image}@@{assembled.start('efi')}"
    listing = subprocess.check_output(["mdir", "-b", "-i", where, "::/EFI/BOOT"], text=True)
    assert listing.split() == ["::/EFI/BOOT/BOOTX64.EFI"]
    subprocess.run(["mcopy", "-i", where, "::/EFI/BOOT/BOOTX64.EFI", str(tmp_path / "loader")], check=True)
    loader = (tmp_path / "loader").read_bytes()
    header = struct.unpack_from("<I", loader, 0x3C)[0]
    assert loader[:2] == b"MZ"
    assert loader[header : header + 6] == b"PE\0\0" + struct.pack("<H", 0x8664), "for x86-64"
    assert UUID.encode() in loader, "it looks for the root by its UUID"


@pytest.mark.parametrize("missing", ["", "usr/lib/shim/mmx64.efi.signed"])
def test_a_root_with_a_signed_chain_boots_by_it(tmp_path: Path, missing: str) -> None:
    root = make_root(tmp_path)
    for path in disk.SIGNED:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())
    if missing:
        (root / missing).unlink()
    image = tmp_path / "disk.raw"
    result = disk.assemble(root, image, root_uuid=UUID, root_size=SIZE, firmware=["uefi"])
    where = f"{image}@@{MIB}"
    listed = subprocess.check_output(["mdir", "-/", "-b", "-i", where, "::/EFI"], text=True).split()
    files = {name.removeprefix("::/") for name in listed if not name.endswith("/")}
    assert result.secure_boot is not bool(missing)
    if missing:
        assert files == {"EFI/BOOT/BOOTX64.EFI"}, "one of our own: half a chain boots nowhere"
        return
    assert files == {"EFI/BOOT/BOOTX64.EFI", "EFI/BOOT/grubx64.efi", "EFI/BOOT/mmx64.efi", "EFI/debian/grub.cfg"}
    read = {name: subprocess.check_output(["mtype", "-i", where, f"::/{name}"]) for name in files}
    assert read["EFI/BOOT/BOOTX64.EFI"] == b"usr/lib/shim/shimx64.efi.signed"
    assert UUID.encode() in read["EFI/debian/grub.cfg"], "it looks for the root by its UUID"


def test_the_first_sector_leads_to_the_bios_boot_partition(assembled: Assembled) -> None:
    start = assembled.start("bios")
    with assembled.image.open("rb") as file:
        first = file.read(SECTOR)
        file.seek(start)
        core = file.read(MIB)
    assert struct.unpack_from("<Q", first, 0x5C)[0] == start // SECTOR
    assert first[SECTOR - 2 :] == b"\x55\xaa"
    assert first[446 + 4] == 0xEE, "the protective partition of a GPT is still there"
    sector, length = struct.unpack_from("<QH", core, SECTOR - 12)
    assert sector == start // SECTOR + 1
    assert core[: (length + 1) * SECTOR].rstrip(b"\0")
    assert not core[(length + 1) * SECTOR :].strip(b"\0"), "the list of blocks covers all that was written"


def test_nothing_is_mounted_and_no_loop_device_is_used(assembled: Assembled) -> None:
    assert not assembled.mounted_something
    loops = subprocess.check_output(["losetup", "--list", "--noheadings", "--output", "BACK-FILE"], text=True)
    assert str(assembled.image) not in Path("/proc/self/mountinfo").read_text() + loops


def test_no_scratch_files_stay(assembled: Assembled) -> None:
    assert {path.name for path in assembled.image.parent.iterdir()} == {"root", "disk.raw"}


@pytest.mark.parametrize(("firmware", "names"), [(["bios"], ["bios", "root"]), (["uefi"], ["efi", "root"])])
def test_a_disk_for_one_kind_of_firmware_has_only_that(tmp_path: Path, firmware: list[str], names: list[str]) -> None:
    image = tmp_path / "disk.raw"
    result = disk.assemble(make_root(tmp_path), image, root_uuid=UUID, root_size=SIZE, firmware=firmware)
    made = Assembled(tmp_path / "root", image, result, mounted_something=False)
    assert [part["name"] for part in made.table()] == names
    with image.open("rb") as file:
        has_code = bool(file.read(disk.MBR_CODE_BYTES).strip(b"\0"))
    assert has_code == (firmware == ["bios"])


def test_a_root_without_a_size_gets_some_room(tmp_path: Path) -> None:
    result = disk.assemble(
        make_root(tmp_path), tmp_path / "disk.raw", root_uuid=UUID, root_size=None, firmware=["bios"]
    )  # fmt: skip
    assert 256 * MIB <= result.root_size < 260 * MIB


def test_a_size_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"disk\.root_size is 32 MiB, but the files take 0 MiB"):
        disk.assemble(
            make_root(tmp_path), tmp_path / "disk.raw", root_uuid=UUID, root_size=32 * MIB, firmware=["bios"]
        )  # fmt: skip
    assert not (tmp_path / "disk.raw").exists()


def call(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(
        "sys.argv",
        ["disk.py", str(folder / "root"), str(folder / "disk.raw"), "--root-uuid", UUID, "--report",
         str(folder / "report.json"), *options],
    )  # fmt: skip
    return disk.main()


def test_the_command_line_reports_and_keeps_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_root(tmp_path)
    kept = tmp_path / "kept"
    options = ["--root-size", str(SIZE), "--firmware", "bios", "--keep-kernel", str(kept)]
    assert call(tmp_path, monkeypatch, *options) == 0
    assert json.loads((tmp_path / "report.json").read_text())["root_size"] == SIZE
    assert kept.read_bytes() == b"kernel"


def test_the_command_line_says_why_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_root(tmp_path)
    assert call(tmp_path, monkeypatch, "--root-size", str(MIB)) == 1
    assert "disk.root_size is 1 MiB" in capsys.readouterr().err
    assert not (tmp_path / "report.json").exists()
