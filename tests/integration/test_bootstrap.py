"""The bootstrap path: a plain node is made one of a platform by the real Ansible, from a real mirror.

Containers of the images' roots do it at the host's own speed. A machine with cloud-init is in the long tier.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest

from bakehouse import bootstrap, cluster, container, definition, plan, userdata, waiting
from bakehouse.cluster import Cluster
from bakehouse.container import Container
from bakehouse.harness import BootMachine
from bakehouse.package_mirror import NAME, PackageMirror
from bakehouse.record import Record
from bakehouse.run import Log
from bakehouse.settings import Settings
from bakehouse.store import LocalStore
from tests.integration.conftest import LIST, bake, host_cache, invoking, status

pytestmark = pytest.mark.slow

FOLDER = "/var/lib/bakehouse/bootstrap"
SECONDS = 300
"""How long a bootstrap may take on a busy host; it takes half a minute."""

PLAY = (
    f"cd {FOLDER}/bundle && HOME=/root LC_ALL=C.UTF-8 ANSIBLE_NOCOLOR=1"
    " ansible-playbook --connection local --inventory localhost, site.yml"
)


@dataclass
class Site:
    """A cluster, and what plain nodes need to become its members."""

    slurm: Cluster
    mirror: PackageMirror
    base: Path
    """Roots, mounted in the network's place."""
    baked: Path
    bundle: bytes

    wanted: userdata.Bundle
    """How nodes name it."""

    def serve(self, content: bytes) -> None:
        """Put something where nodes fetch the bundle."""
        bootstrap.offer(self.slurm.network, content)

    def plain(self, name: str, *, with_bundle: bool = True) -> AbstractContextManager[Container]:
        """Boot a plain node with what cloud-init would write."""
        join = self.slurm.join(name, bundle=self.wanted if with_bundle else None)
        files = bootstrap.files_of(join, self.mirror.proxy)
        return container.boot(self.slurm.network, self.base, name, files=files, layer="4g")


@pytest.fixture(scope="module")
def base_image(real_settings: Settings) -> Record:
    record, _ = bake(real_settings, "base")
    return record


@pytest.fixture(scope="module")
def bootstrap_site(
    baked: Record, base_image: Record, real_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("bootstrap")
    store = LocalStore(real_settings.store)
    definition.write_bundle(plan.make("slurm", real_settings), folder / bootstrap.BUNDLE)
    with Log(folder / "network.log") as log, cluster.up(store.image(baked), log, cgroups=False) as slurm:
        slurm.controller.start()
        base_root, baked_root = (slurm.network.mount_image(store.image(record)) for record in (base_image, baked))
        mirror = PackageMirror(slurm.network, host_cache() / "apt-cacher-ng")
        mirror.prepare(baked_root, "trixie", real_settings.mirrors())
        mirror.start()
        bootstrap.serve(slurm.network)
        bundle = (folder / bootstrap.BUNDLE).read_bytes()
        yield Site(slurm, mirror, base_root, baked_root, bundle, bootstrap.offer(slurm.network, bundle))


def said(node: Container) -> str:
    """Return what the bootstrap does or waits for."""
    return node.run("cat", "/run/bakehouse/bootstrap").stdout.strip()


def joined(node: Container) -> bool:
    return bool(status(node).get("state") == "joined")


def wait_until_bootstrapped(node: Container) -> None:
    node.wait("bootstrap", lambda: said(node) == "applied", SECONDS)
    node.wait("join", lambda: joined(node), SECONDS)


OWN = (
    # Each node has its own, by what it is or when it was made.
    r"/etc/machine-id|/etc/fstab|/etc/ssh/ssh_host_.*|/etc/bakehouse/(image\.json|join\.yaml)|/var/lib/dbus/machine-id"
    r"|/var/lib/bakehouse/(secret\.json|timeline.*)|/var/spool/slurm.*|/var/lib/systemd/.*|/var/tmp/.*"
    r"|/boot/grub/grub\.cfg"
    # Caches, and logs.
    r"|/var/log/.*|/var/cache/.*|/etc/ld\.so\.cache"
    # The same content in other order, or with times in it; both are made from files that are compared.
    r"|/boot/initrd\.img-.*"
    # What is installed, which is compared by name and version.
    r"|/var/lib/dpkg/.*|/var/lib/apt/.*"
)
"""Paths of which two nodes of one definition may have different ones."""

ONLY_BOOTSTRAPPED = (
    rf"{FOLDER}(/.*)?|/usr/local/sbin/bakehouse-bootstrap|/etc/systemd/system/{bootstrap.UNIT}|/etc/bakehouse/bootstrap\.env"
    r"|/etc/systemd/system/multi-user\.target\.d(/.*)?|/root/\.ansible(/.*)?|/root/\.cache(/.*)?"
    # Python compiles what runs.
    r"|.*/__pycache__(/.*)?"
)
"""Paths that only a bootstrapped node has, beside those of Ansible's packages."""


def packages(node: Container) -> dict[str, str]:
    """Return what is installed: versions by name."""
    lines = node.shell("dpkg-query --show --showformat '${Package} ${Version}\n'").splitlines()
    return dict(line.split() for line in lines)


def listed(node: Container) -> dict[str, list[object]]:
    found: dict[str, list[object]] = json.loads(node.run("python3", "-c", LIST, timeout=120).stdout)
    return found


def test_a_bootstrapped_node_is_what_a_baked_one_is(bootstrap_site: Site) -> None:
    """It joins, and holds the same packages and files; beside them Ansible's. A second run changes nothing."""
    slurm = bootstrap_site.slurm
    baked_files = bootstrap.files_of(slurm.join("baked"), bootstrap_site.mirror.proxy)
    with (
        bootstrap_site.plain("plain") as plain,
        container.boot(slurm.network, bootstrap_site.baked, "baked", files=baked_files, layer="4g") as baked,
    ):
        baked.wait("join", lambda: joined(baked), SECONDS)
        before = packages(plain)
        wait_until_bootstrapped(plain)
        done = slurm.controller.run("srun", "--nodelist=plain", "hostname", timeout=60)
        assert done.stdout.strip() == "plain", done.stderr

        has, should = packages(plain), packages(baked)
        assert {name: has.get(name) for name in should} == should
        assert should.keys() - before.keys() >= {"slurmd", "munge"}, "the comparison compares something"
        for_ansible = has.keys() - should.keys()
        assert for_ansible <= brought_by(plain, "ansible-core", "python3-apt")

        has_files, should_files = listed(plain), listed(baked)
        wrong = [
            f"{path}: {has_files.get(path)}, not {about}"
            for path, about in should_files.items()
            if has_files.get(path) != about and not re.fullmatch(OWN, path)
        ]
        assert wrong == []
        more = {path for path in has_files.keys() - should_files.keys() if not re.fullmatch(OWN, path)}
        more -= files_of(plain, for_ansible)
        assert sorted(path for path in more if not re.fullmatch(ONLY_BOOTSTRAPPED, path)) == []
        assert units(plain) - units(baked) == {(bootstrap.UNIT, "disabled", "enabled")}
        assert units(baked) - units(plain) == set()

        again = plain.shell(PLAY, timeout=SECONDS)
        assert re.search(r"changed=0 .*failed=0", again), again
        plain.shell(f"systemctl restart {bootstrap.UNIT}")
        assert said(plain) == "applied"
        assert "started" not in plain.journal("--unit", bootstrap.UNIT, "--output=cat").partition(" applied")[2]


def brought_by(node: Container, *names: str) -> set[str]:
    """Return packages and all that they need, directly or not."""
    command = (
        "apt-cache depends --recurse --installed --important --no-suggests --no-conflicts --no-breaks --no-replaces"
    )
    return set(re.findall(r"^[a-z0-9][a-z0-9.+-]+", node.shell(f"{command} {' '.join(names)}"), re.MULTILINE))


def files_of(node: Container, names: set[str]) -> set[str]:
    """Return what packages have brought, as paths without links: /bin is /usr/bin."""
    listed_by_dpkg = node.shell(f"dpkg --listfiles {' '.join(sorted(names))}").splitlines()
    found = {path for path in listed_by_dpkg if path.startswith("/")}
    return found | {f"/usr{path}" for path in found if re.match(r"/(s?bin|lib)", path)}


def units(node: Container) -> set[tuple[str, ...]]:
    return {
        tuple(line.split())
        for line in node.shell("systemctl list-unit-files --plain --no-legend").splitlines()
        if ".mount" not in line
    }


def test_a_bootstrap_waits_for_what_is_not_there_and_says_so(bootstrap_site: Site) -> None:
    """Another bundle than wanted, a mirror that is down before and within the play: each is said, and it goes on."""
    mirror = bootstrap_site.mirror
    bootstrap_site.serve(b"something else")
    mirror.kill(NAME)
    with bootstrap_site.plain("patient") as node:
        node.wait("wrong bundle", lambda: "bundle: error: what is at" in said(node), SECONDS)
        assert hashlib.sha256(b"something else").hexdigest() in said(node)
        bootstrap_site.serve(bootstrap_site.bundle)
        node.wait("lists", lambda: "package lists of the mirror: E: Failed to fetch" in said(node), SECONDS)
        mirror.start()
        node.wait("Ansible", lambda: said(node) == "ansible", SECONDS)
        mirror.kill(NAME)
        node.wait("play", lambda: said(node).startswith("waiting: Ansible: "), SECONDS)
        assert "slurmd" not in packages(node)
        assert not joined(node)
        mirror.start()
        wait_until_bootstrapped(node)


def test_a_play_that_fails_half_way_goes_on_where_it_was(bootstrap_site: Site) -> None:
    with bootstrap_site.plain("halfway") as node:
        # A file where a folder belongs: the step after the packages cannot be done.
        node.shell("touch /etc/systemd/system/munge.service.d")
        node.wait("failure", lambda: said(node).startswith("waiting: Ansible: "), SECONDS)
        assert "etc/systemd/system/munge.service.d" in said(node)
        assert "slurmd" in packages(node)
        # As a power cut leaves it: apt refuses to do anything.
        node.shell("dpkg --status tar | sed 's/ok installed/ok unpacked/' > /var/lib/dpkg/updates/0001")
        assert "dpkg was interrupted" in node.run("apt-get", "install", "munge").stderr
        node.shell("rm /etc/systemd/system/munge.service.d")
        wait_until_bootstrapped(node)
        assert node.shell("dpkg --audit") == ""


def test_a_node_is_made_over_ssh(bootstrap_site: Site, real_settings: Settings, tmp_path: Path) -> None:
    """Pushed by an operator, as a user with sudo; the second time nothing changes."""
    slurm = bootstrap_site.slurm
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    with bootstrap_site.plain("pushed", with_bundle=False) as node:
        node.write("/root/authorized", key.with_suffix(".pub").read_text())
        node.shell(
            "useradd --create-home --shell /bin/bash ops && install -d -m 700 -o ops ~ops/.ssh"
            " && install -m 600 -o ops /root/authorized ~ops/.ssh/authorized_keys"
            " && echo 'ops ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/ops"
            " && echo 'Defaults umask = 0077' >> /etc/sudoers.d/ops"
            " && ssh-keygen -A && systemctl reset-failed ssh && systemctl restart ssh"
        )
        config = tmp_path / "config"
        config.write_text(
            f"Host node\n HostName {node.port.address}\n IdentityFile {key}\n StrictHostKeyChecking no\n"
            " UserKnownHostsFile /dev/null\n"
        )
        invoke = invoking(
            {"BAKEHOUSE_STORE": str(real_settings.store), "BAKEHOUSE_CACHE": str(real_settings.cache)},
            prefix=slurm.network.only_network,
        )
        push = ("bootstrap.push", "--platform", "slurm", "--host", "ops@node", "--ssh-config", str(config))
        done = invoke(*push)
        assert done.returncode == 0, done.stdout + done.stderr
        node.wait("join", lambda: joined(node), SECONDS)
        folders = "/usr/lib/systemd/networkd.conf.d /etc/systemd/system/munge.service.d"
        assert node.shell(f"stat --format %a {folders}").split() == ["755", "755"], "whatever the user's umask"
        node.shell(
            "touch --date '10 minutes ago' /run/bakehouse/package-lists; touch /etc/apt/sources.list.d/site.list"
        )
        again = invoke(*push)
        assert re.search(r"changed=0 .*failed=0", again.stdout), again.stdout
        assert node.shell("find /run/bakehouse/package-lists -mmin -9"), "lists are read again for a new source"


@pytest.mark.long
def test_a_machine_becomes_a_node_by_its_user_data(
    bootstrap_site: Site, base_image: Record, real_settings: Settings, boot_machine: BootMachine
) -> None:
    """With cloud-init and a kernel of its own; and after a reboot it joins again without a bootstrap."""
    slurm = bootstrap_site.slurm
    user_data = bootstrap.user_data(slurm.join("machine", bundle=bootstrap_site.wanted), bootstrap_site.mirror.proxy)
    file = LocalStore(real_settings.store).image(base_image)
    node = boot_machine(file, hostname="machine", network=slurm.network, user_data=user_data, disk_size=4 << 30)

    def state() -> str:
        done = node.ssh("cat /run/bakehouse/status.json")
        return str(json.loads(done.stdout)["state"]) if done.stdout else ""

    node.wait_for_ssh(SECONDS)
    waiting.until("join", lambda: state() == "joined", 1200, poll=5, last_words=node.output)
    assert slurm.controller.run("srun", "--nodelist=machine", "hostname", timeout=60).stdout.strip() == "machine"
    node.ssh("sudo systemctl --no-block reboot")
    waiting.until(
        "join",
        lambda: state() == "joined" and node.ssh("test -e /run/bakehouse/bootstrap").returncode == 1,
        SECONDS,
        poll=5,
        last_words=node.output,
    )
