"""The finished root: what must not be in it is found, and it is sealed."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bakehouse import rootfs

UUID = "00000000-0000-4000-8000-000000000001"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "root"
    for name in (
        "boot",
        "etc/ssh",
        "etc/apt/sources.list.d",
        "etc/apt/apt.conf.d",
        "home/debian",
        "root",
        "run",
        "tmp",
        "usr/lib/systemd",
        "usr/sbin",
        "var/log",
        "var/tmp",
        "var/lib/apt/lists",
        "var/lib/dpkg",
    ):
        (made / name).mkdir(parents=True)  # fmt: skip
    for name in ("etc/machine-id", "boot/vmlinuz-6.12-x", "boot/initrd.img-6.12-x", "var/lib/apt/lists/lock"):
        (made / name).write_text("")
    (made / "vmlinuz").symlink_to("boot/vmlinuz-6.12-x")
    (made / "initrd.img").symlink_to("boot/initrd.img-6.12-x")
    systemd = made / "usr/lib/systemd/systemd"
    systemd.write_text("")
    systemd.chmod(0o755)
    (made / "etc/apt/sources.list.d/debian.sources").write_text("URIs: http://deb.debian.org/debian\n")
    (made / "var/log/dpkg.log").write_text("a little\n")
    return made


def test_a_clean_root_has_no_faults(root: Path) -> None:
    assert rootfs.faults(root) == []


def file(name: str, text: str = "x") -> Callable[[Path], None]:
    def write(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)

    return write


def link(name: str, target: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        (root / name).unlink(missing_ok=True)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(target)

    return make


def without(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (file("etc/ssh/ssh_host_rsa_key"), "/etc/ssh/ssh_host_rsa_key is an SSH host key; every node would have it"),
        (file("etc/ssh/ssh_host_rsa_key.pub"), "/etc/ssh/ssh_host_rsa_key.pub is an SSH host key"),
        (file("etc/machine-id", "0123456789abcdef0123456789abcdef\n"), "/etc/machine-id is not empty"),
        (without("etc/machine-id"), "/etc/machine-id"),
        (file("etc/munge/munge.key"), "/etc/munge/munge.key belongs to one cluster"),
        (file("etc/slurm/slurm.key"), "/etc/slurm/slurm.key belongs to one cluster"),
        (file("etc/slurm/jwt_hs256.key"), "/etc/slurm/jwt_hs256.key belongs to one cluster"),
        (file("etc/hostname"), "/etc/hostname belongs to one cluster or node"),
        (link("var/lib/cloud/instance", "/var/lib/cloud/instances/i-1"), "/var/lib/cloud holds data of an instance"),
        (file("var/lib/cloud/instances/i-1/x"), "/var/lib/cloud holds data of an instance"),
        (file("var/lib/systemd/random-seed"), "/var/lib/systemd/random-seed: every node"),
        (file("root/.ssh/authorized_keys"), "/root/.ssh/authorized_keys came from somewhere"),
        (file("home/debian/.ssh/authorized_keys"), "/home/debian/.ssh/authorized_keys came from somewhere"),
        (file("root/.ssh/id_rsa"), "/root/.ssh/id_rsa came"),
        (file("home/debian/.ssh/id_ed25519"), "/home/debian/.ssh/id_ed25519 came"),
        (file("root/.bash_history"), "/root/.bash_history came"),
        (file("etc/apt/apt.conf", 'Acquire::http::Proxy "http://p/";'), "/etc/apt/apt.conf sets a proxy"),
        (file("etc/apt/apt.conf.d/x", 'acquire::HTTP::proxy "http://p/";'), "/etc/apt/apt.conf.d/x sets a proxy"),
        (file("etc/apt/sources.list", "deb file:/debs ./"), "/etc/apt/sources.list names a folder of the builder"),
        (file("etc/apt/sources.list.d/x.sources", "URIs: copy:/debs"), "/etc/apt/sources.list.d/x.sources names"),
        (file("etc/dib-manifests/x"), "/etc/dib-manifests was left behind by the build"),
        (file("usr/sbin/policy-rc.d"), "/usr/sbin/policy-rc.d was left behind"),
        (file("usr/local/bin/install-packages"), "/usr/local/bin/install-packages was left behind"),
        (file("var/log/apt/term.log", "x" * (rootfs.MAX_LOG_BYTES + 1)), "/var/log holds 655"),
        (file("tmp/x"), "/tmp/x and 0 more files were left in /tmp"),
        (file("var/tmp/x/y"), "/var/tmp/x/y and 0 more files were left in /var/tmp"),
        (file("run/x.pid"), "/run/x.pid and 0 more files were left in /run"),
        (file("var/lib/apt/lists/x_Packages"), "/var/lib/apt/lists/x_Packages and 0 more files"),
        (file("var/cache/apt/archives/munge.deb"), "/var/cache/apt/archives/munge.deb and 0 more"),
        (file("core"), "/core is a core dump"),
        (file("core.123"), "/core.123 is a core dump"),
        (file("var/crash/x"), "/var/crash/x is a core dump"),
        (without("vmlinuz"), "/vmlinuz does not lead to a file in /boot"),
        (without("boot/vmlinuz-6.12-x"), "/vmlinuz does not lead to a file in /boot"),
        (without("initrd.img"), "/initrd.img does not lead to a file in /boot"),
        (link("initrd.img", "boot/initrd.img-other"), "/initrd.img does not lead to a file in /boot"),
        (without("usr/lib/systemd/systemd"), "/usr/lib/systemd/systemd is not there"),
    ],
)
def test_what_must_not_be_in_an_image_is_found(root: Path, spoil: Callable[[Path], None], fault: str) -> None:
    spoil(root)
    (found,) = rootfs.faults(root)
    assert found.startswith(fault)


@pytest.mark.parametrize(
    "harmless",
    [
        file("etc/machine-id", "uninitialized\n"),
        file("root/.ssh/authorized_keys", ""),
        file("var/log/apt/term.log", "x" * (rootfs.MAX_LOG_BYTES - 100)),
        file("var/cache/apt/archives/lock", ""),
        link("vmlinuz", "/boot/vmlinuz-6.12-x"),
    ],
)
def test_what_may_be_in_an_image_is_not_a_fault(root: Path, harmless: Callable[[Path], None]) -> None:
    harmless(root)
    assert rootfs.faults(root) == []


def test_all_faults_are_told_at_once(root: Path) -> None:
    for name in ("etc/hostname", "tmp/one", "tmp/two", "core"):
        (root / name).write_text("x")
    found = rootfs.faults(root)
    assert len(found) == 3
    assert any("and 1 more files were left in /tmp" in fault for fault in found)


def sealed(root: Path) -> Path:
    rootfs.seal(root, identity={"name": "slurm", "tag": "t1"}, root_uuid=UUID, kernel_arguments=["nosmt", "quiet"])
    return root


def test_a_sealed_root_says_what_it_is(root: Path) -> None:
    sealed(root)
    assert json.loads((root / rootfs.IDENTITY).read_text()) == {"name": "slurm", "tag": "t1"}
    assert stat.S_IMODE((root / rootfs.IDENTITY).stat().st_mode) == 0o644
    assert rootfs.faults(root) == []


def test_a_sealed_root_mounts_itself(root: Path) -> None:
    (line,) = (sealed(root) / "etc/fstab").read_text().splitlines()
    assert line.split() == [f"UUID={UUID}", "/", "ext4", "defaults,errors=remount-ro", "0", "1"]


def test_a_sealed_root_has_the_menu_of_the_boot_loader(root: Path) -> None:
    assert (sealed(root) / "boot/grub/grub.cfg").read_text() == rootfs.grub_menu(UUID, ["nosmt", "quiet"])


def test_a_sealed_root_was_updated_when_usr_was(root: Path) -> None:
    os.utime(root / "usr", ns=(1, 1_700_000_000_123_456_789))
    sealed(root)
    for name in ("etc/.updated", "var/.updated"):
        assert (root / name).stat().st_mtime_ns == 1_700_000_000_123_456_789
    assert (root / "usr").stat().st_mtime_ns == 1_700_000_000_123_456_789


def test_the_menu_has_both_kernels(root: Path) -> None:
    menu = rootfs.grub_menu(UUID, ["nosmt"])
    kernels = [line.split() for line in menu.splitlines() if line.strip().startswith("linux ")]
    assert [words[1] for words in kernels] == ["/vmlinuz", "/vmlinuz.old"]
    for words in kernels:
        assert words[2] == f"root=UUID={UUID}"
        assert words[-2:] == ["console=ttyS0,115200n8", "nosmt"], "the last console is the main one"
    assert [line.split()[1] for line in menu.splitlines() if line.strip().startswith("initrd ")] == [
        "/initrd.img", "/initrd.img.old",
    ]  # fmt: skip


def test_the_menu_is_one_that_grub_can_read(tmp_path: Path) -> None:
    (tmp_path / "grub.cfg").write_text(rootfs.grub_menu(UUID, ["nosmt", "a=b,c:d"]))
    subprocess.run(["grub-script-check", tmp_path / "grub.cfg"], check=True)


def test_the_kernels_version_is_that_of_the_link(root: Path) -> None:
    assert rootfs.kernel_version(root) == "6.12-x"


STATUS = """Package: {name}
Status: {status}
Architecture: amd64
Version: {version}
Maintainer: Somebody <s@example.org>
Source: {source}
Description: x

"""


def test_installed_packages_are_listed_by_name(root: Path) -> None:
    (root / "var/lib/dpkg/status").write_text(
        STATUS.format(name="slurmd", status="install ok installed", version="24.11.5-4+b1", source="slurm (24.11.5-4)")
        + STATUS.format(name="munge", status="install ok installed", version="1:0.5", source="munge")
        + STATUS.format(name="gone", status="deinstall ok config-files", version="1", source="gone")
    )
    munge, slurmd = rootfs.packages(root)
    assert (munge["binary:Package"], munge["Version"], munge["Homepage"]) == ("munge", "1:0.5", "")
    assert (slurmd["source:Package"], slurmd["source:Version"]) == ("slurm", "24.11.5-4")
    assert set(munge) == {*rootfs.DPKG_FIELDS, "origin"}


def call(root: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    specification = root.parent / "seal.json"
    specification.write_text(json.dumps({"identity": {"name": "slurm"}, "root_uuid": UUID, "kernel_arguments": []}))
    report = root.parent / "report.json"
    monkeypatch.setattr("sys.argv", ["rootfs.py", str(root), str(report), "--seal", str(specification)])
    return rootfs.main()


def test_a_faulty_root_is_not_sealed(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "etc/hostname").write_text("builder")
    assert call(root, monkeypatch) == 1
    assert capsys.readouterr().out == "hygiene: /etc/hostname belongs to one cluster or node, not to an image\n"
    assert not (root / rootfs.IDENTITY).exists()


def test_a_good_root_is_sealed_and_listed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "var/lib/dpkg/status").write_text(
        STATUS.format(name="munge", status="install ok installed", version="0.5", source="munge")
    )
    assert call(root, monkeypatch) == 0
    report = json.loads((root.parent / "report.json").read_text())
    assert report["kernel"] == "6.12-x"
    assert [row["binary:Package"] for row in report["packages"]] == ["munge"]
    assert (root / rootfs.IDENTITY).is_file()


def test_packages_say_where_they_came_from(root: Path) -> None:
    (root / "var/lib/dpkg/status").write_text(
        "".join(
            STATUS.format(name=name, status="install ok installed", version="1.0", source=name)
            for name in ("munge", "slurmd", "site-tool")
        )
    )
    (root / rootfs.ORIGINS).parent.mkdir(parents=True, exist_ok=True)
    (root / rootfs.ORIGINS).write_text(
        "munge\tamd64\t1.0\tDebian-Security trixie-security/main\nslurmd\tamd64\t0.9\tDebian trixie/main\n"
    )
    assert {row["binary:Package"]: row["origin"] for row in rootfs.packages(root)} == {
        "munge": "Debian-Security trixie-security/main",
        "slurmd": "",
        "site-tool": "",
    }
