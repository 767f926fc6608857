"""The hybrid path: a plain node with podman starts a platform's container image, from a real registry.

Containers of the image's root do it at the host's own speed. A machine, whose kernel limits jobs, is in the long tier.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from bakehouse import cluster, container, container_serve, registry, run, userdata, verify
from bakehouse.cluster import Cluster
from bakehouse.container import Container
from bakehouse.container_push import Pushed
from bakehouse.harness import BootMachine
from bakehouse.local_registry import LocalRegistry
from bakehouse.network import GATEWAY
from bakehouse.record import Record
from bakehouse.run import Log
from bakehouse.settings import Settings
from bakehouse.store import LocalStore
from tests.integration.conftest import bake, status

pytestmark = pytest.mark.slow

RELAY_PORT = 5001
SECONDS = 120

DROP_IN = "/etc/containers/systemd/slurmd.container.d/site.conf"
"""What a site adds, as docs/hybrid.md says."""

RELAY = """
import socket, sys, threading

listen, to, limit, times = (int(word) for word in sys.argv[2:])
host = sys.argv[1]

def copy(source, target, limit):
    while (part := source.recv(65536)) and limit > 0:
        target.sendall(part)
        limit -= len(part)
    for one in (source, target):
        try:
            one.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

with socket.create_server((host, listen)) as server:
    while True:
        client, _ = server.accept()
        times -= 1
        upstream = socket.create_connection((host, to))
        threading.Thread(target=copy, args=(client, upstream, 1 << 40)).start()
        threading.Thread(target=copy, args=(upstream, client, limit if times >= 0 else 1 << 40)).start()
"""
"""Passes connections on, and cuts the first ones after so many bytes."""


@dataclasses.dataclass
class Site:
    """A cluster, a registry that can be switched on and off, and a plain node's root."""

    slurm: Cluster
    root: Path
    folder: Path
    """The registry's."""
    image: userdata.ContainerImage
    registry: subprocess.Popen[bytes] | None = None

    def switch_on(self) -> None:
        if not self.registry:
            self.registry = container_serve.serve(self.slurm.network, self.folder)

    def switch_off(self) -> None:
        if self.registry:
            self.registry.kill()
            self.registry.wait()
            self.registry = None

    @contextmanager
    def plain(self, name: str, image: userdata.ContainerImage, root: Path | None = None) -> Iterator[Container]:
        """Boot a plain node with what cloud-init would write."""
        storage = Path(tempfile.mkdtemp(prefix="bakehouse-podman-"))
        if root:
            self.slurm.network.run(["cp", "--archive", f"{root}/var/lib/containers/.", storage])
        files = {
            **userdata.files(self.slurm.join(name, image=image)),
            DROP_IN: ("[Container]\nVolume=/srv:/srv\n", 0o644),
        }
        try:
            with container.boot(
                self.slurm.network, root or self.root, name, files=files, podman_storage=storage
            ) as node:
                yield node
        finally:
            run.remove_tree(storage)


@pytest.fixture(scope="module")
def plain_image(real_settings: Settings) -> Record:
    record, _ = bake(real_settings, "hybrid")
    return record


@pytest.fixture(scope="module")
def site(
    baked: Record,
    plain_image: Record,
    pushed: Pushed,
    here: LocalRegistry,
    real_settings: Settings,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Site]:
    store = LocalStore(real_settings.store)
    folder = tmp_path_factory.mktemp("hybrid")
    with Log(folder / "network.log") as log, cluster.up(store.image(baked), log, cgroups=False) as slurm:
        slurm.controller.start()
        root = slurm.network.mount_image(store.image(plain_image))
        yield Site(slurm, root, here.folder, container_serve.served(pushed.reference))


def waits_for(node: Container, words: str) -> Callable[[], bool]:
    return lambda: words in status(node).get("waiting_for", "")


def wait_until_joined(node: Container) -> None:
    node.wait("join", lambda: status(node).get("state") == "joined", SECONDS)


def job(site: Site, node: Container, script: str) -> list[str]:
    done = site.slurm.controller.run("srun", f"--nodelist={node.name}", "sh", "-c", script, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_plain_node_joins_when_the_registry_comes_and_again_without_it(site: Site) -> None:
    site.switch_off()
    with site.plain("hybrid-1", site.image) as node:
        node.wait("word of the registry", waits_for(node, "connection refused"), SECONDS)
        assert status(node)["waiting_for"].startswith("the container image: ")
        assert node.run("sh", "-c", "command -v slurmd munged").stdout == "", "the host has nothing of the platform"
        site.switch_on()
        wait_until_joined(node)

        running = node.run("podman", "ps", "--format", "{{.Names}} {{.Image}}").stdout.splitlines()
        assert sorted(running) == [f"{name} {site.image.reference}" for name in ("munge", "slurmd")]
        script = "hostname; cat /usr/share/bakehouse/node/tmpfiles.conf | tee /tmp/of-a-job /srv/of-a-job; id -un"
        said = job(site, node, script)
        assert (said[0], said[-1]) == ("hybrid-1", "root")
        assert node.shell("cat /tmp/of-a-job /srv/of-a-job").splitlines() == said[1:-1] * 2, "host and jobs share them"
        assert f"NodeName={node.name}" in node.shell("/usr/local/sbin/scontrol show node hybrid-1")
        assert node.shell("stat --format '%U %a' /etc/munge/munge.key").strip() == "munge 400"
        moments = [line.split()[1] for line in node.shell("cat /run/bakehouse/containers.timeline").splitlines()]
        assert moments == ["started", "image", "ready"]

        site.switch_off()
        node.reboot()
        wait_until_joined(node)
        assert job(site, node, "hostname") == ["hybrid-1"]
        assert node.run("bakehouse-agent", "leave", timeout=90).returncode == 0
        assert node.run("podman", "ps", "--quiet").stdout == "", "both containers have ended"
    assert "hybrid-1" not in site.slurm.controller.run("sinfo", "--Node", "--noheader").stdout


def test_a_pull_that_is_cut_off_is_begun_again(site: Site) -> None:
    site.switch_on()
    relay = [sys.executable, "-c", RELAY, str(GATEWAY), str(RELAY_PORT), str(registry.PORT), str(3 << 20), "12"]
    process = site.slurm.network.start(relay, Path("/run/relay.log"))
    name = site.image.reference.partition("/")[2]
    try:
        with site.plain("hybrid-2", userdata.ContainerImage(f"{GATEWAY}:{RELAY_PORT}/{name}", insecure=True)) as node:
            node.wait("word of the pull", waits_for(node, "EOF"), SECONDS)
            wait_until_joined(node)
            assert node.shell("podman images --quiet | wc -l").strip() == "1"
    finally:
        process.kill()


def test_a_digest_that_the_registry_has_not_is_named(site: Site) -> None:
    site.switch_on()
    other = f"{site.image.reference.partition('@')[0]}@sha256:{'0' * 64}"
    with site.plain("hybrid-3", userdata.ContainerImage(other, insecure=True)) as node:
        node.wait("word of the registry", waits_for(node, "manifest unknown"), SECONDS)


def test_containers_that_die_are_started_again(site: Site) -> None:
    site.switch_on()
    with site.plain("hybrid-4", site.image) as node:
        wait_until_joined(node)
        for name in ("slurmd", "munge"):
            node.shell(f"pkill --signal KILL --full '^/usr/sbin/{name}'")
        node.wait("slurmd again", lambda: job_runs(site, node), SECONDS)


def job_runs(site: Site, node: Container) -> bool:
    done = site.slurm.controller.run("srun", "--immediate=5", f"--nodelist={node.name}", "true", timeout=60)
    return done.returncode == 0


def test_a_node_whose_image_holds_the_containers_needs_no_registry(
    site: Site, pushed: Pushed, real_settings: Settings, tmp_path: Path
) -> None:
    manifest = {
        "description": "A plain node with Slurm's container image", "extends": "hybrid", "platform": "base",
        "environment": {"DIB_CONTAINER_IMAGE": pushed.reference, "DIB_CONTAINER_INSECURE": "1"},
    }  # fmt: skip
    (tmp_path / "seeded.yaml").write_text(yaml.safe_dump(manifest))
    record, _ = bake(real_settings.model_copy(update={"manifests": [tmp_path]}), "seeded")
    root = site.slurm.network.mount_image(LocalStore(real_settings.store).image(record))
    with site.plain("hybrid-5", userdata.ContainerImage(pushed.reference), root) as node:
        wait_until_joined(node)
        assert job(site, node, "hostname") == ["hybrid-5"]
        assert "image" not in node.shell("cat /run/bakehouse/containers.timeline"), "nothing was pulled"


@pytest.mark.long
def test_a_machine_limits_jobs_in_containers(
    baked: Record,
    plain_image: Record,
    pushed: Pushed,
    here: LocalRegistry,
    real_settings: Settings,
    boot_machine: BootMachine,
    tmp_path: Path,
) -> None:
    """As verify has it of a baked node: srun, sbatch, limits of memory and processors, the OOM killer, a reboot."""
    store = LocalStore(real_settings.store)
    with Log(tmp_path / "network.log") as log, cluster.up(store.image(baked), log) as slurm:
        slurm.controller.start()
        site = Site(slurm, Path(), here.folder, container_serve.served(pushed.reference))
        site.switch_on()
        trial = verify.SlurmTrial(slurm)
        user_data = userdata.render(slurm.join(verify.NODE, image=site.image))
        node = boot_machine(
            store.image(plain_image), hostname=verify.NODE, network=slurm.network, user_data=user_data,
            disk_size=4 << 30, cpus=verify.CPUS,
        )  # fmt: skip
        verify.wait_for_join(node, seconds=1200)
        for _, _, check in trial.work(node):
            check()
        site.switch_off()
        start = len(node.console.lines)
        node.ssh("sudo systemctl --no-block reboot")
        verify.wait_for_join(node, start, seconds=600)
        trial.work_again(node)
