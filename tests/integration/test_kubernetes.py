"""A Kubernetes image, baked from a repository as upstream's is, joins a real control plane and says what ails it."""

from __future__ import annotations

import datetime
import functools
import json
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from bakehouse import kubernetes, kubernetes_cluster, plan, timeline, userdata, verify, waiting
from bakehouse.errors import BakehouseError
from bakehouse.harness import BootMachine
from bakehouse.kubernetes_cluster import KubernetesCluster
from bakehouse.machine import Machine
from bakehouse.record import Record
from bakehouse.run import Log
from bakehouse.settings import Settings
from bakehouse.store import LocalStore
from bakehouse.verify import JOIN_SECONDS, wait_for_join
from bakehouse.verify_kubernetes import KubernetesTrial
from tests.integration.conftest import bake, host_cache, invoking
from tests.support import kubernetes as support

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> support.Built:
    """Kubernetes as upstream publishes it. What takes long is kept in the host's cache."""
    return support.build(host_cache(), Settings().mirrors(), tmp_path_factory.mktemp("kubernetes") / "published")


@pytest.fixture(scope="session")
def upstream(built: support.Built) -> Iterator[str]:
    """Serve the packages as upstream does."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Handler, directory=str(built.packages))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="session")
def site(
    real_settings: Settings, built: support.Built, upstream: str, tmp_path_factory: pytest.TempPathFactory
) -> Settings:
    """A site that has Kubernetes from there."""
    manifests = tmp_path_factory.mktemp("manifests")
    text = {"extends": "kubernetes", "kubernetes": {"version": support.VERSION}}
    (manifests / "old-kubernetes.yaml").write_text(yaml.safe_dump(text))
    return real_settings.model_copy(
        update={
            "manifests": [manifests],
            "kubernetes_packages": upstream,
            "kubernetes_key": built.fingerprint,
            "kubernetes_images": built.images,
            "kubernetes_binaries": str(built.binaries),
        }
    )


@pytest.fixture(scope="session")
def image(site: Settings) -> Record:
    record, made = bake(site, "old-kubernetes")
    assert made
    return record


def test_the_image_holds_one_version_and_its_images(image: Record) -> None:
    assert image.versions["kubernetes"] == f"{support.VERSION}-1.1"
    assert image.versions["containerd"].startswith("1.7")
    assert image.inputs["manifest kubernetes"].count(support.VERSION) == 1
    names = {name.removeprefix("kubernetes image ") for name in image.inputs if name.startswith("kubernetes image ")}
    assert names == {"pause.tar", "kube-proxy.tar", "coredns.tar"}


@pytest.mark.long
def test_verify_passes_and_says_what_it_saw(image: Record, site: Settings) -> None:
    store = LocalStore(site.store)
    result = verify.verify(image, store, site, Console(width=160)).verification
    assert result is not None
    assert [check for check in [*result.checks, *result.suite] if not check.passed] == []
    assert len(result.checks) == len(verify.stages("kubernetes"))
    assert len(result.suite) > 30
    assert result.timeline is not None
    moments = [moment.name for moment in result.timeline.moments]
    order = [timeline.POWER_ON, "kernel", "userspace", "agent started", timeline.JOINED, timeline.FIRST_JOB]
    assert [name for name in moments if name in order] == order
    evidence = store.folder(image.tag) / verify.EVIDENCE
    for name in ("console.log", "journal.txt", "suite.xml", "kube-apiserver.log", "pods.json", "verify.log"):
        assert (evidence / name).stat().st_size > 0, name


def test_a_folder_of_packages_does_as_well(image: Record, site: Settings, built: support.Built) -> None:
    other = site.model_copy(update={"kubernetes_packages": str(built.debs), "kubernetes_images": None})
    wanted = plan.make("old-kubernetes", other)
    assert wanted.inputs["variable DIB_KUBERNETES_PACKAGES"] == "a folder"
    assert f"kubernetes package kubelet_{support.VERSION}-1.1_amd64.deb" in wanted.inputs
    (site.manifests[0] / "no-images.yaml").write_text("extends: old-kubernetes\nkubernetes: {images: []}\n")
    record, _ = bake(other, "no-images")
    assert record.versions["kubernetes"] == f"{support.VERSION}-1.1"
    assert record.root_used < image.root_used, "which the images take"


def test_a_key_of_somebody_else_is_refused(image: Record, site: Settings) -> None:
    other = site.model_copy(update={"kubernetes_key": "DE15B14486CD377B9E876E1A234654DA9A296436"})
    with pytest.raises(BakehouseError) as caught:
        bake(other, "old-kubernetes")
    assert "has the fingerprint" in caught.value.log + caught.value.message


def test_a_version_that_is_not_there_is_named(image: Record, site: Settings) -> None:
    (site.manifests[0] / "newer.yaml").write_text("extends: kubernetes\nkubernetes: {version: '1.20.99'}\n")
    with pytest.raises(BakehouseError, match="the mirror has no package 'kube"):
        bake(site, "newer")


@pytest.fixture
def cluster(image: Record, site: Settings, tmp_path: Path) -> Iterator[KubernetesCluster]:
    programs = kubernetes.binaries(support.VERSION, site)
    file = LocalStore(site.store).image(image)
    with (
        Log(tmp_path / "cluster.log") as log,
        kubernetes_cluster.up(image, file, programs, site.mirrors(), site.cache, log) as made,
    ):
        made.controller.start()
        yield made


def test_a_node_joins_and_runs_pods(
    image: Record, site: Settings, cluster: KubernetesCluster, boot_machine: BootMachine
) -> None:
    """What verify tries, without the reboot and the suites: those take as long again."""
    trial = KubernetesTrial(cluster)
    cluster.controller.add_ons()
    node = boot_machine(
        LocalStore(site.store).image(image), hostname="node-1", network=cluster.network, cpus=2, disk_size=4 << 30,
        memory=verify.MEMORY["kubernetes"], user_data=trial.user_data("node-1"),
    )  # fmt: skip
    wait_for_join(node)
    assert cluster.controller.is_ready("node-1")
    for _, _, do in trial.work(node):
        do()
    said = verify.agents_status(node)
    assert (said["state"], said["platform"], said["warnings"]) == ("joined", "kubernetes", [])
    shown = cluster.controller.node("node-1")
    assert shown["metadata"]["labels"]["bakehouse.example.org/path"] == "bake"
    token = r"\b[a-z0-9]{6}\.[a-z0-9]{16}\b"
    places = "/etc/bakehouse /run/bakehouse /etc/kubernetes /var/lib/cloud /run/cloud-init"
    assert node.ssh(f"sudo grep -rIlP '{token}' {places}").stdout == "", "no bootstrap token is left"


def test_a_cluster_comes_and_goes(image: Record, site: Settings, built: support.Built, tmp_path: Path) -> None:
    """What people type: cluster.up, cluster.run, cluster.down."""
    settings = {
        "store": str(site.store), "cache": str(site.cache), "manifests": [str(site.manifests[0])],
        "kubernetes_binaries": str(built.binaries),
    }  # fmt: skip
    (tmp_path / "bakehouse.yaml").write_text(yaml.safe_dump(settings))
    invoke = invoking({"BAKEHOUSE_CONFIG": str(tmp_path / "bakehouse.yaml"), "XDG_STATE_HOME": str(tmp_path)})
    done = invoke("cluster.up", "kubernetes", "--image", image.tag)
    assert done.returncode == 0, done.stderr
    assert f"invoke boot {image.tag} --join" in done.stdout
    try:
        (shown,) = json.loads(invoke("cluster.status", "--json").stdout)
        assert (shown["platform"], shown["tag"]) == ("kubernetes", image.tag)
        assert invoke("cluster.run", "kubectl auth can-i delete nodes").stdout.strip() == "yes"
        assert invoke("cluster.run", "false").returncode == 1
        token = invoke("join.token", "--platform", "kubernetes", "--node", "x").stdout.strip()
        assert token.startswith("bhj_")
        assert "revoked" in invoke("join.revoke", "x").stdout
    finally:
        done = invoke("cluster.down", "kubernetes")
    assert done.returncode == 0, done.stderr
    assert not Path(f"/proc/{shown['network']}").exists()
    assert json.loads(invoke("cluster.status", "--json").stdout) == []


CLUSTER_API = """\
## template: jinja
#cloud-config

write_files:
-   path: /etc/cni/net.d/10-test.conflist
    content: '{network}'
-   path: /run/kubeadm/kubeadm-join-config.yaml
    owner: root:root
    permissions: '0640'
    content: |
      ---
      apiVersion: kubeadm.k8s.io/v1beta2
      discovery:
        bootstrapToken:
          apiServerEndpoint: {server}
          caCertHashes:
          - {ca_hash}
          token: {token}
      kind: JoinConfiguration
      nodeRegistration:
        ignorePreflightErrors: [FileExisting-crictl]
        kubeletExtraArgs:
          provider-id: openstack:///'{{{{ instance_id }}}}'
        name: '{{{{ local_hostname }}}}'
-   path: /run/cluster-api/placeholder
    owner: root:root
    permissions: '0640'
    content: "This placeholder file is used to create the /run/cluster-api sub directory"
runcmd:
  - >-
    kubeadm join --config /run/kubeadm/kubeadm-join-config.yaml
    && echo success > /run/cluster-api/bootstrap-success.complete
"""
"""What Cluster API's kubeadm bootstrap provider writes (its book, "Kubeadm based bootstrap"); provider id and name come
from cloud-init's instance data, as in the templates for OpenStack."""


class Tour:
    """A node that meets one fault after the other."""

    def __init__(self, node: Machine) -> None:
        self.node = node
        self.line = 0

    def console(self, pattern: str) -> str:
        """Wait for a word of the agent on the console, after the last one."""
        what = f"'{pattern}' of the agent"
        form = rf"bakehouse-agent: \d+\.\d+ {pattern}"
        found = self.node.wait_for_console(what, form, JOIN_SECONDS, self.line)
        self.line = found + 1
        return self.node.console.lines[found].text

    def status(self) -> dict[str, Any]:
        said: dict[str, Any] = json.loads(self.node.ssh("bakehouse-agent status --json").stdout)
        return said

    def until(self, what: str, fact: Callable[[dict[str, Any]], bool], seconds: float = JOIN_SECONDS) -> dict[str, Any]:
        """Wait until the status is so; each look wakes the agent up."""
        seen: dict[str, Any] = {}

        def holds() -> bool:
            # A new file wakes it up, a touched one does not.
            self.node.ssh("sudo sh -c 'rm -f /etc/bakehouse/look; touch /etc/bakehouse/look'")
            seen.update(self.status())
            return fact(seen)

        waiting.until(what, holds, seconds, poll=2.0, check=self.node.check, last_words=lambda: json.dumps(seen))
        return seen

    def until_waiting_for(self, words: str) -> dict[str, Any]:
        return self.until(words, lambda said: words in said["waiting_for"])

    def until_joined(self) -> None:
        self.until("join", lambda said: said["state"] == "joined")

    def configure(self, join: userdata.KubernetesJoin) -> None:
        """Give it another configuration, as an operator does."""
        (file,) = yaml.safe_load(userdata.render(join))["write_files"]
        command = "sudo tee /etc/bakehouse/join.yaml.new > /dev/null && sudo mv /etc/bakehouse/join.yaml{.new,}"
        done = self.node.ssh(f"bash -c '{command}' <<'END'\n{file['content']}\nEND")
        assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_faults_are_named_and_passed_and_cluster_api_is_left_alone(
    image: Record, site: Settings, cluster: KubernetesCluster, boot_machine: BootMachine
) -> None:
    plane, file = cluster.controller, LocalStore(site.store).image(image)
    network = json.dumps(kubernetes_cluster.POD_NETWORK_PLUGIN)
    theirs = boot_machine(
        file, hostname="capi-1", network=cluster.network, data_source="metadata", memory=2048, cpus=2,
        user_data=CLUSTER_API.format(
            network=network, server=plane.address, ca_hash=plane.ca_hash(), token=plane.token()
        ),
    )  # fmt: skip
    good = cluster.join("node-1", inline=True)
    wrong_hash = userdata.KubernetesJoin(
        plane.address, ca_hashes=("sha256:" + "0" * 64,), node="node-1", bootstrap_token=good.bootstrap_token
    )
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    plane.stop_api_server()
    node = boot_machine(
        file, hostname="node-1", network=cluster.network, memory=2048, cpus=2, disk_size=4 << 30, clock=yesterday,
        user_data=kubernetes_cluster.with_pod_network(userdata.render(wrong_hash)),
    )  # fmt: skip
    tour = Tour(node)
    # The API server is down, and comes up later.
    assert "does it run" in tour.console("waiting .*refuses the connection")
    plane.start_api_server()
    # The hash is of another CA.
    assert "ca_hashes" in tour.console("failed .*is not the one of ca_hashes")
    node.wait_for_ssh(JOIN_SECONDS)
    # The token has expired, or was never there.
    expired = userdata.KubernetesJoin(
        plane.address, ca_hashes=good.ca_hashes, node="node-1", bootstrap_token="expire.0123456789abcdef"
    )
    tour.configure(expired)
    assert "kubeadm token create" in tour.until_waiting_for("the bootstrap token expire has expired")["hint"]
    # The clock is a day behind.
    tour.configure(good)
    tour.until("word of the clock", lambda said: "clock" in said["waiting_for"] + said["hint"])
    assert plane.node("node-1") == {}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    assert node.ssh(f"sudo date --set {now}").returncode == 0
    tour.until_joined()
    assert plane.is_ready("node-1")
    check_cluster_api(theirs, cluster)
    # containerd is broken.
    node.ssh("sudo systemctl stop containerd")
    tour.until_waiting_for("containerd")
    node.ssh("sudo systemctl start containerd")
    tour.until_joined()
    # The disk is full.
    free = int(node.ssh("df --output=avail --block-size=1 / | tail -n 1").stdout)
    node.ssh(f"sudo fallocate --length {int(0.97 * free)} /fill")
    assert "df -h" in tour.until_waiting_for("DiskPressure")["hint"]
    node.ssh("sudo rm /fill")
    tour.until_joined()
    # It leaves, and comes back with a token of the broker in place of one that has expired.
    left = node.ssh("sudo bakehouse-agent leave --timeout 300", timeout=600)
    assert "node-1 has left" in left.stdout, left.stdout + left.stderr
    assert plane.node("node-1") == {}
    broker = cluster.broker.offer("node-1", platform="kubernetes")
    tour.configure(
        userdata.KubernetesJoin(
            plane.address, ca_hashes=good.ca_hashes, node="node-1", broker=broker,
            bootstrap_token="expire.0123456789abcdef",
        )
    )  # fmt: skip
    node.ssh("sudo bakehouse-agent join --timeout 600", timeout=700)
    tour.until_joined()
    assert plane.is_ready("node-1")


def check_cluster_api(node: Machine, cluster: KubernetesCluster) -> None:
    """The node of Cluster API has joined by its own bootstrap data, and our agent did nothing."""
    node.wait_for_ssh(JOIN_SECONDS)
    waiting.until(
        "node of Cluster API", lambda: cluster.controller.is_ready("capi-1"), JOIN_SECONDS, poll=2.0, check=node.check,
        last_words=lambda: node.ssh("sudo tail -n 30 /var/log/cloud-init-output.log").stdout,
    )  # fmt: skip
    assert node.ssh("cat /run/cluster-api/bootstrap-success.complete").stdout.strip() == "success"
    provider = cluster.controller.node("capi-1")["spec"]["providerID"]
    assert provider.startswith("openstack:///")
    assert node.ssh("bakehouse-agent status").stdout.strip() == "the agent has not run since this machine started"
    assert node.ssh("systemctl is-active bakehouse-agent").stdout.strip() == "inactive"
