"""The finished root filesystem: sealed with its identity, checked for what must not be in it, and listed.

Runs as root in an isolated process (``python -m bakehouse.rootfs``), since files in the root belong to root. Standard
library only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

IDENTITY = "etc/bakehouse/image.json"
"""Where an image says what it is."""

ORIGINS = "usr/share/bakehouse/package-origins"
"""Where the build has noted from which archive each package came. See the element debian-mmdebstrap."""

MAX_LOG_BYTES = 64 * 1024

DPKG_FIELDS = (
    "binary:Package",
    "Version",
    "Architecture",
    "source:Package",
    "source:Version",
    "Maintainer",
    "Homepage",
    "db:Status-Status",
    "Installed-Size",
)


def seal(root: Path, *, identity: dict[str, object], root_uuid: str, kernel_arguments: list[str]) -> None:
    """Write what makes the root an image: its identity, fstab and the boot loader's menu.

    Args:
        root: the root filesystem.
        identity: what ``/etc/bakehouse/image.json`` shall say.
        root_uuid: the UUID that the root filesystem will have.
        kernel_arguments: added to the kernel's command line.
    """
    _write(root / IDENTITY, json.dumps(identity, indent=1) + "\n")
    _write(root / "etc/fstab", f"UUID={root_uuid} / ext4 defaults,errors=remount-ro 0 1\n")
    _write(root / "boot/grub/grub.cfg", grub_menu(root_uuid, kernel_arguments))
    # Units with ConditionNeedsUpdate= (ldconfig and others) would run at the first boot otherwise: systemd compares
    # these stamps with the time of /usr (systemd.unit(5)).
    stamp = (root / "usr").stat().st_mtime_ns
    for folder in ("etc", "var"):
        path = root / folder / ".updated"
        path.write_text("")
        os.utime(path, ns=(stamp, stamp))


def grub_menu(root_uuid: str, kernel_arguments: list[str]) -> str:
    """Return GRUB's menu.

    It loads ``/vmlinuz`` and ``/initrd.img``, links that Debian's kernel packages keep pointing to the newest kernel
    and ``.old`` to the one before: a kernel upgrade on a node needs no boot loader there to take effect.
    """
    # The last console= is /dev/console: cloud consoles are serial; the screen comes first for bare metal.
    arguments = " ".join([f"root=UUID={root_uuid}", "ro", "console=tty0", "console=ttyS0,115200n8", *kernel_arguments])
    return f"""# Written by Bakehouse.
set timeout=0
set default=0
if [ -e /vmlinuz.old ]; then set timeout=1; fi
serial --unit=0 --speed=115200
terminal_input console serial
terminal_output console serial
menuentry 'Linux' {{
    linux /vmlinuz {arguments}
    initrd /initrd.img
}}
if [ -e /vmlinuz.old ]; then
    menuentry 'Linux, the kernel before' {{
        linux /vmlinuz.old {arguments}
        initrd /initrd.img.old
    }}
fi
"""


def faults(root: Path, *, boots: bool = True) -> list[str]:
    """Return what must not be in an image but is, a sentence each. See docs/image-authors.md.

    Args:
        root: the root filesystem.
        boots: it must be able to; that of a container need not.
    """
    found = [*_identity_faults(root), *_builder_faults(root), *_remnants(root)]
    return [*found, *_boot_faults(root)] if boots else found


def _identity_faults(root: Path) -> Iterator[str]:
    for key in root.glob("etc/ssh/ssh_host_*_key*"):
        yield f"/{key.relative_to(root)} is an SSH host key; every node would have it"
    machine_id = root / "etc/machine-id"
    if not machine_id.is_file() or machine_id.read_text().strip() not in {"", "uninitialized"}:
        yield "/etc/machine-id is not empty; every node would have the same one"
    for name in ("etc/munge/munge.key", "etc/slurm/slurm.key", "etc/slurm/jwt_hs256.key", "etc/hostname"):
        # An empty one is where a container runtime mounts its own.
        if (root / name).is_file() and (root / name).stat().st_size:
            yield f"/{name} belongs to one cluster or node, not to an image"
    if (root / "var/lib/cloud/instance").is_symlink() or list(root.glob("var/lib/cloud/instances/*")):
        yield "/var/lib/cloud holds data of an instance; cloud-init would not run"
    if (root / "var/lib/systemd/random-seed").exists():
        yield "/var/lib/systemd/random-seed: every node would start from the same randomness"
    for home in (root / "root", *root.glob("home/*")):
        for name in (".ssh/authorized_keys", ".ssh/id_rsa", ".ssh/id_ed25519", ".bash_history"):
            if (home / name).is_file() and (home / name).stat().st_size:
                yield f"/{(home / name).relative_to(root)} came from somewhere"


def _builder_faults(root: Path) -> Iterator[str]:
    for config in [root / "etc/apt/apt.conf", *root.glob("etc/apt/apt.conf.d/*")]:
        if config.is_file() and "proxy" in config.read_text(errors="replace").lower():
            yield f"/{config.relative_to(root)} sets a proxy, the builder's"
    for source in [*root.glob("etc/apt/sources.list.d/*"), root / "etc/apt/sources.list"]:
        if source.is_file() and ("file:" in (text := source.read_text(errors="replace")) or "copy:" in text):
            yield f"/{source.relative_to(root)} names a folder of the builder"
    for name in ("etc/dib-manifests", "usr/local/bin/install-packages", "usr/sbin/policy-rc.d"):
        if (root / name).exists():
            yield f"/{name} was left behind by the build"


def _remnants(root: Path) -> Iterator[str]:
    log_bytes = sum(path.lstat().st_size for path in (root / "var/log").rglob("*") if path.is_file())
    if log_bytes > MAX_LOG_BYTES:
        yield f"/var/log holds {log_bytes} bytes of the build's logs"
    for folder in ("tmp", "var/tmp", "run", "var/lib/apt/lists", "var/cache/apt/archives"):
        left = [path for path in (root / folder).rglob("*") if path.is_file()]
        left = [path for path in left if path.name != "lock"]
        if left:
            yield f"/{left[0].relative_to(root)} and {len(left) - 1} more files were left in /{folder}"
    for core in (*root.glob("core"), *root.glob("core.[0-9]*"), *root.glob("var/crash/*")):
        yield f"/{core.relative_to(root)} is a core dump"


def _boot_faults(root: Path) -> Iterator[str]:
    for name in ("vmlinuz", "initrd.img"):
        if not (root / name).is_symlink() or not (root / "boot" / (root / name).readlink().name).is_file():
            yield f"/{name} does not lead to a file in /boot; there is no kernel to boot"
    if not os.access(root / "usr/lib/systemd/systemd", os.X_OK):
        yield "/usr/lib/systemd/systemd is not there; nothing would run"


def kernel_version(root: Path) -> str:
    """Return the version of the kernel that boots."""
    return (root / "vmlinuz").readlink().name.removeprefix("vmlinuz-")


def packages(root: Path) -> list[dict[str, str]]:
    """Return the installed packages with DPKG_FIELDS and their origin (empty if not known), sorted by name."""
    form = "\\t".join(f"${{{field}}}" for field in DPKG_FIELDS) + "\\n"
    done = subprocess.run(
        ["dpkg-query", f"--admindir={root}/var/lib/dpkg", "--show", f"--showformat={form}"],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [dict(zip(DPKG_FIELDS, line.split("\t"), strict=True)) for line in done.stdout.splitlines()]
    origins = _origins(root)
    for row in rows:
        package = row["binary:Package"].partition(":")[0]
        row["origin"] = origins.get((package, row["Architecture"], row["Version"]), "")
    return sorted(
        (row for row in rows if row["db:Status-Status"] == "installed"), key=lambda row: row["binary:Package"]
    )


def _origins(root: Path) -> dict[tuple[str, ...], str]:
    """Return from which archive packages came, by name, architecture and version. Empty where that was not noted."""
    path = root / ORIGINS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {tuple(package): origin for *package, origin in (line.split("\t") for line in lines)}


def _forget_origins(root: Path) -> None:
    """Take the notes on packages' origins out of a root: they are about the build, and are in the SBOM."""
    path = root / ORIGINS
    path.unlink(missing_ok=True)
    if path.parent.is_dir() and not any(path.parent.iterdir()):
        path.parent.rmdir()


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o644)


def main() -> int:
    """Seal, check and list a root; print what is wrong with it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("report", type=Path, help="where to write packages and kernel version")
    parser.add_argument("--seal", type=Path, metavar="FILE", help="JSON: the arguments of seal(); none for a container")
    arguments = parser.parse_args()
    wrong = faults(arguments.root, boots=bool(arguments.seal))
    for fault in wrong:
        print(f"hygiene: {fault}")
    if wrong:
        return 1
    report: dict[str, object] = {"packages": packages(arguments.root)}
    if arguments.seal:
        report["kernel"] = kernel_version(arguments.root)
        _forget_origins(arguments.root)
        seal(arguments.root, **json.loads(arguments.seal.read_text()))
    arguments.report.write_text(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
