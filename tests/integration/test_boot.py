"""The baked image boots under both kinds of firmware, and is what it says it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bakehouse import REPOSITORY, machine
from bakehouse.cache import BaseCache
from bakehouse.machine import Firmware, Machine
from bakehouse.record import FILE_NAME, Record
from bakehouse.settings import Settings
from bakehouse.store import LocalStore
from tests.integration.conftest import bake

pytestmark = pytest.mark.slow

BOOT_SECONDS = 900
"""Emulated on a busy host with two cores; with KVM it is ten."""


def check(running: Machine, record: Path, suites: list[str]) -> None:
    """Run image suites against a machine."""
    login = running.login
    config = record.with_name("ssh-config")
    options = "".join(f"  {part}\n" for part in login.options if "=" in part)
    # One connection for all tests: a handshake takes seconds in an emulated machine.
    options += f"  ControlMaster auto\n  ControlPath {login.key.parent}/ssh\n  ControlPersist 60\n"
    config.write_text(f"Host *\n{options}".replace("=", " ") + f"  IdentityFile {login.key}\n")
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "--rootdir", REPOSITORY, "-p", "no:cacheprovider", "-W", "default",
            *(REPOSITORY / "tests/image" / suite for suite in suites),
            f"--hosts=ssh://{login.user}@{login.host}:{login.port}", f"--ssh-config={config}", "--sudo",
            f"--record={record}",
        ],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    config.unlink()
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def boot_and_check(settings: Settings, record: Record, firmware: Firmware, tmp_path: Path) -> None:
    store = LocalStore(settings.store)
    with machine.boot(
        store.image(record),
        probe=BaseCache(settings.cache).kvm,
        firmware=firmware,
        disk_size=4 << 30,
        hostname="node-1",
        keep_console=tmp_path / "console.log",
    ) as running:
        running.wait_for_ssh(BOOT_SECONDS)
        assert running.ssh("hostname").stdout.strip() == "node-1"
        booted = "test -d /sys/firmware/efi && echo uefi || echo bios"
        assert running.ssh(booted).stdout.strip() == firmware
        copy = tmp_path / FILE_NAME
        copy.write_bytes((store.folder(record.tag) / FILE_NAME).read_bytes())
        check(running, copy, ["test_node.py", "test_slurm.py"])
        assert running.stop(), "it goes down when the power button is pressed"
    assert not running.running


@pytest.mark.parametrize("firmware", ["bios", "uefi"])
def test_the_image_boots_and_is_what_it_says(
    baked: Record, real_settings: Settings, firmware: Firmware, tmp_path: Path
) -> None:
    boot_and_check(real_settings, baked, firmware, tmp_path)


def test_a_machine_ends_with_its_owner(baked: Record, real_settings: Settings, tmp_path: Path) -> None:
    image = LocalStore(real_settings.store).image(baked)
    code = (
        "import sys, time; from pathlib import Path; from bakehouse import machine\n"
        "with machine.boot(Path(sys.argv[1]), probe=Path(sys.argv[2])) as m: print(m._process.pid, flush=True); "
        "time.sleep(600)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, image, BaseCache(real_settings.cache).kvm],
        cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert owner.stdout is not None
    qemu = Path("/proc") / owner.stdout.readline().strip()
    assert qemu.exists()
    owner.kill()
    owner.communicate()
    machine_gone = subprocess.run(
        ["timeout", "10", "sh", "-c", f"while grep -qs qemu {qemu}/cmdline; do sleep 0.1; done"], check=False
    )
    assert machine_gone.returncode == 0


def test_debian_12_bakes_too(real_settings: Settings) -> None:
    record, built = bake(real_settings, "slurm-debian-12")
    assert built
    assert record.release == "bookworm"
    assert record.versions["slurm"].startswith("22.05")


@pytest.mark.long
def test_debian_12_boots(real_settings: Settings, tmp_path: Path) -> None:
    record, _ = bake(real_settings, "slurm-debian-12")
    boot_and_check(real_settings, record, "uefi", tmp_path)
