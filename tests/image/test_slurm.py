"""What a Slurm node is that has joined its cluster. For humans: the names of the tests are the facts."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from testinfra.host import Host


@pytest.fixture(scope="module")
def status(host: Host) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(host.check_output("bakehouse-agent status --json"))
    return said


@pytest.fixture(scope="module")
def authentication(host: Host) -> str:
    return str(yaml.safe_load(host.file("/etc/bakehouse/join.yaml").content_string)["slurm"]["authentication"])


def test_the_agent_says_that_it_joined(host: Host, status: dict[str, Any]) -> None:
    assert status["state"] == "joined"
    assert status["platform"] == "slurm"
    assert status["node"] == host.check_output("hostname --short")


def test_the_controller_says_so_too(host: Host, status: dict[str, Any]) -> None:
    shown = host.check_output("scontrol --oneliner show node %s", status["node"])
    assert f"NodeAddr={status['address']}" in shown
    assert "NOT_RESPONDING" not in shown


def test_slurmd_runs(host: Host) -> None:
    assert host.service("slurmd").is_running
    assert host.package("slurmd").is_installed


def test_the_agent_starts_slurmd_and_not_systemd(host: Host) -> None:
    """Else it would start before there is a key and a controller."""
    for name in ("slurmd", "munge", "slurmctld"):
        assert not host.service(name).is_enabled, name


def test_no_controller_runs(host: Host) -> None:
    assert not host.service("slurmctld").is_running


def test_slurmd_waits_for_its_controller(host: Host) -> None:
    shown = host.check_output("systemctl show slurmd --property=TimeoutStartUSec,Restart")
    assert "TimeoutStartUSec=infinity" in shown
    assert "Restart=on-failure" in shown


def test_the_key_is_for_its_daemon_only(host: Host, authentication: str) -> None:
    file, user, mode = {
        "munge": ("/etc/munge/munge.key", "munge", 0o400),
        "slurm": ("/etc/slurm/slurm.key", "slurm", 0o600),
    }[authentication]
    assert (host.file(file).user, host.file(file).mode) == (user, mode)


def test_munge_makes_credentials_that_it_takes(host: Host, authentication: str) -> None:
    if authentication == "munge":
        assert "Success" in host.check_output("munge --no-input | unmunge | grep STATUS")


def test_the_configuration_is_for_root_only(host: Host) -> None:
    file = host.file("/etc/bakehouse/join.yaml")
    assert (file.user, file.mode) == ("root", 0o600)


def test_no_secret_is_left_in_the_configuration(host: Host) -> None:
    secret = yaml.safe_load(host.file("/etc/bakehouse/join.yaml").content_string).get("secret", {})
    assert "inline" not in secret
    assert "token" not in secret.get("broker", {})


PLACES = "/var/lib/cloud /run/cloud-init /var/log /etc/bakehouse /run/bakehouse"

TOKEN = "bhj_(?!x{43})[A-Za-z0-9_-]{43}"
"""A token, but not what is left of one that has been blotted out."""


def test_no_key_is_left_in_the_copies_of_cloud_init(host: Host, authentication: str) -> None:
    key = {"munge": "/etc/munge/munge.key", "slurm": "/etc/slurm/slurm.key"}[authentication]
    # Its first bytes in base64, as they would stand in user-data.
    assert host.run(f'grep -rlF "$(head -c 30 {key} | base64)" {PLACES}').stdout == ""


def test_no_token_is_left_in_the_copies_of_cloud_init(host: Host) -> None:
    assert host.run(f"grep -rlP '{TOKEN}' {PLACES}").stdout == ""


def test_no_token_is_in_the_journal(host: Host) -> None:
    assert host.run(f"journalctl --boot --grep '{TOKEN}' --quiet").stdout == ""


def test_jobs_are_held_in_cgroups(host: Host) -> None:
    assert "TaskPlugin" in host.check_output("scontrol show config")
    assert "memory" in host.file("/sys/fs/cgroup/cgroup.controllers").content_string


def test_slurm_is_that_of_the_record(host: Host, record: dict[str, Any]) -> None:
    assert host.package("slurmd").version == record["versions"]["slurm"]
