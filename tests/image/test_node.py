"""What every node is, whatever its platform. For humans: the names of the tests are the facts."""

from __future__ import annotations

import json
from typing import Any

from testinfra.host import Host


def test_cloud_init_finished_without_errors(host: Host) -> None:
    status = json.loads(host.check_output("cloud-init status --wait --format json"))
    assert status["status"] == "done"
    assert status["errors"] == []


def test_cloud_init_has_nothing_to_complain_of(host: Host) -> None:
    # The version in Debian 12 does not count recoverable errors: its log does.
    assert host.run("grep -E 'WARNING|ERROR|CRITICAL|Traceback' /var/log/cloud-init.log").stdout == ""


def test_no_unit_failed(host: Host) -> None:
    assert host.check_output("systemctl list-units --state=failed --plain --no-legend") == ""


def test_root_grew_to_the_disk(host: Host) -> None:
    disk = int(host.check_output("lsblk --bytes --nodeps --noheadings --output SIZE /dev/vda"))
    root = int(host.check_output("findmnt --noheadings --bytes --output SIZE /"))
    # ext4's own tables, the other partitions and the reserved blocks take a little.
    assert root > 0.9 * disk


def test_root_is_writable(host: Host) -> None:
    assert "rw" in host.mount_point("/").options


def test_nothing_else_is_mounted_from_the_disk(host: Host) -> None:
    assert host.check_output("findmnt --noheadings --list --real --output TARGET | grep -v '^/run/' ") == "/"


def test_ssh_takes_keys_only(host: Host) -> None:
    settings = host.check_output("sshd -T").lower().splitlines()
    assert "passwordauthentication no" in settings
    assert "kbdinteractiveauthentication no" in settings


def test_ssh_host_key_was_made_on_this_node(host: Host) -> None:
    # cloud-init keeps when it made the instance what it is; the image was sealed before.
    sealed = int(host.check_output("stat --format %Y /etc/bakehouse/image.json"))
    assert int(host.check_output("stat --format %Y /etc/ssh/ssh_host_ed25519_key")) > sealed


def test_there_is_one_ssh_host_key(host: Host) -> None:
    assert host.check_output("ls /etc/ssh/ | grep 'ssh_host_.*_key$'") == "ssh_host_ed25519_key"


def test_machine_id_was_made_on_this_node(host: Host) -> None:
    assert len(host.file("/etc/machine-id").content_string.strip()) == 32


def test_serial_console_takes_logins(host: Host) -> None:
    assert host.service("serial-getty@ttyS0.service").is_running


def test_network_and_names_are_managed_by_systemd(host: Host) -> None:
    assert host.service("systemd-networkd").is_running
    assert host.service("systemd-resolved").is_running
    assert host.file("/etc/resolv.conf").linked_to == "/run/systemd/resolve/stub-resolv.conf"


def test_time_is_kept(host: Host) -> None:
    assert host.service("systemd-timesyncd").is_running


def test_no_timer_changes_the_node(host: Host) -> None:
    assert not host.service("apt-daily.timer").is_enabled
    assert not host.service("apt-daily-upgrade.timer").is_enabled


def test_a_new_kernel_would_be_booted(host: Host) -> None:
    version = host.check_output("uname -r")
    assert host.file("/vmlinuz").linked_to == f"/boot/vmlinuz-{version}"
    assert host.file("/initrd.img").linked_to == f"/boot/initrd.img-{version}"
    assert not host.file("/usr/sbin/update-initramfs.bakehouse").exists


def test_packages_come_from_the_mirrors_of_the_site(host: Host) -> None:
    found = host.check_output("find /etc/apt -name '*.sources' -o -name '*.list'")
    assert found == "/etc/apt/sources.list.d/debian.sources"


def test_nothing_of_the_build_is_left(host: Host) -> None:
    for path in ("/etc/dib-manifests", "/usr/local/bin/install-packages", "/usr/sbin/policy-rc.d", "/etc/apt/apt.conf"):
        assert not host.file(path).exists, path
    assert host.check_output("dpkg --audit") == ""


def test_identity_is_that_of_the_record(host: Host, record: dict[str, Any]) -> None:
    said = json.loads(host.file("/etc/bakehouse/image.json").content_string)
    assert {key: said[key] for key in ("name", "platform", "tag", "digest")} == {
        key: record[key] for key in ("name", "platform", "tag", "digest")
    }


def test_kernel_is_that_of_the_record(host: Host, record: dict[str, Any]) -> None:
    assert host.check_output("uname -r") == record["kernel"]


def test_packages_are_as_many_as_the_record_says(host: Host, record: dict[str, Any]) -> None:
    installed = host.check_output("dpkg-query --show --showformat '${db:Status-Status}\\n' | grep -c '^installed$'")
    assert int(installed) == record["package_count"]
