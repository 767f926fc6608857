"""The baked image boots under both kinds of firmware, and is what it says it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from bakehouse import REPOSITORY, machine, verify
from bakehouse.cache import BaseCache
from bakehouse.record import Record
from bakehouse.settings import Settings
from bakehouse.store import LocalStore
from tests.integration.conftest import bake

pytestmark = pytest.mark.slow

NEVER_RAN = 4
"""The exit status of the agent's status where it never ran (docs/join-agent.md)."""

BOOT_SECONDS = 900
"""Emulated on a busy host with two cores; with KVM it is ten."""


def test_an_image_that_joins_nothing_boots_and_is_what_it_says(
    baked: Record, real_settings: Settings, tmp_path: Path
) -> None:
    """Under UEFI; verify boots it under BIOS."""
    store = LocalStore(real_settings.store)
    with machine.boot(
        store.image(baked),
        probe=BaseCache(real_settings.cache).kvm,
        firmware="uefi",
        disk_size=4 << 30,
        hostname="node-1",
        keep_console=tmp_path / "console.log",
    ) as running:
        running.wait_for_ssh(BOOT_SECONDS)
        assert running.ssh("hostname").stdout.strip() == "node-1"
        assert running.ssh("test -d /sys/firmware/efi").returncode == 0
        suite = [*verify.Suites((verify.OWN_SUITES,)).of(baked.model_copy(update={"platform": "base"}))]
        facts = verify.ask(running.login, suite, baked, tmp_path)
        assert [fact for fact in facts if not fact.passed] == []
        assert len(facts) > 15
        # Nobody told it to join: nothing runs, and there is no key that it could have been baked with.
        assert "inactive" in running.ssh("systemctl is-active slurmd munge bakehouse-agent").stdout
        assert running.ssh("sudo ls /etc/munge/munge.key /etc/slurm/slurm.key").stdout == ""
        assert running.ssh("bakehouse-agent status").returncode == NEVER_RAN
        assert running.stop(), "it goes down when the power button is pressed"
    assert not running.running


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
def test_debian_12_joins(real_settings: Settings) -> None:
    record, _ = bake(real_settings, "slurm-debian-12")
    store = LocalStore(real_settings.store)
    result = verify.verify(record, store, real_settings, Console(width=160), firmware="uefi").verification
    assert result is not None
    assert [check for check in [*result.checks, *result.suite] if not check.passed] == []
