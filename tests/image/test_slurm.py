"""What a Slurm node is before it has joined a cluster."""

from __future__ import annotations

from typing import Any

from testinfra.host import Host


def test_slurm_and_munge_are_installed(host: Host) -> None:
    for name in ("slurmd", "slurm-client", "munge"):
        assert host.package(name).is_installed, name


def test_they_do_not_run_without_a_configuration(host: Host) -> None:
    for name in ("slurmd", "munge"):
        assert not host.service(name).is_running, name
        assert not host.service(name).is_enabled, name


def test_there_is_no_key_in_the_image(host: Host) -> None:
    assert not host.file("/etc/munge/munge.key").exists
    assert not host.file("/etc/slurm/slurm.key").exists


def test_slurmd_waits_for_its_controller(host: Host) -> None:
    shown = host.check_output("systemctl show slurmd --property=TimeoutStartUSec,Restart")
    assert "TimeoutStartUSec=infinity" in shown
    assert "Restart=on-failure" in shown


def test_slurm_runs(host: Host) -> None:
    assert host.check_output("slurmd -V").startswith("slurm")


def test_slurm_is_that_of_the_record(host: Host, record: dict[str, Any]) -> None:
    assert host.package("slurmd").version == record["versions"]["slurm"]
