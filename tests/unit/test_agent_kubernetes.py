"""The join agent's Kubernetes part, against a stand-in of kubeadm and an API server that speaks TLS."""

from __future__ import annotations

import base64
import ipaddress
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from bakehouse import userdata
from bakehouse.cluster import Authority
from bakehouse.errors import BakehouseError
from tests.unit.test_agent import Node, load

TOKEN = "abcdef.0123456789abcdef"
FRESH = "fresh0.0123456789abcdef"
HASH = "sha256:" + "0" * 64
READY = [{"type": "Ready", "status": "True"}]


class Api:
    """An API server of which a test says what it knows."""

    def __init__(self, folder: Path) -> None:
        self.tokens = {TOKEN[:6]}
        self.conditions: list[dict[str, str]] = list(READY)
        self.registered = True
        self.pods: list[dict[str, Any]] = []
        self.may_delete = True
        self.asked: list[str] = []
        self.clock_off = 0.0
        self.deleted = False
        authority = Authority()
        certificate, key = authority.certificate_for(ipaddress.ip_address("127.0.0.1"))
        (folder / "ca.crt").write_text(authority.pem)
        (folder / "node.pem").write_text(certificate + key)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(folder / "node.pem")
        self.port = 0
        self.start()

    def start(self) -> None:
        api = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else {}
                api.asked.append(f"{self.command} {self.path}")
                status, found = api.answer(self.command, self.path, body)
                data = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PATCH = do_DELETE = answer  # noqa: N815 - the base class looks for them

            def date_time_string(self, timestamp: float | None = None) -> str:
                return super().date_time_string(time.time() + api.clock_off)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_port
        self.server.socket = self._context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path.endswith("/cluster-info"):
            return 200, {"data": {f"jws-kubeconfig-{name}": "x" for name in self.tokens} | {"kubeconfig": "x"}}
        if path.endswith("/eviction"):
            name = path.split("/")[-2]
            self.pods = [pod for pod in self.pods if pod["metadata"]["name"] != name]
            return 201, {}
        if path.startswith("/api/v1/pods"):
            return 200, {"items": self.pods}
        if method == "DELETE":
            self.deleted = self.may_delete
            return (200, {}) if self.may_delete else (403, {"message": 'nodes "node-1" is forbidden'})
        if not self.registered:
            return 404, {"message": "not found"}
        return 200, {"metadata": {"name": "node-1"}, "status": {"conditions": self.conditions}}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    machine = Node(tmp_path, 0)
    machine.path("fake/log").touch()
    machine.path("fake/kubeadm-version").write_text("v1.35.5")
    machine.path("run/containerd/x")
    with socket.socket(socket.AF_UNIX) as containerd:
        containerd.bind(str(tmp_path / "run/containerd/containerd.sock"))
        containerd.listen()
        yield machine
    for process in machine.running:
        process.kill()
        process.communicate()


@pytest.fixture
def api(node: Node) -> Iterator[Api]:
    made = Api(node.root / "fake")
    configure(node, made.port)
    yield made
    made.stop()


def configure(node: Node, port: int, secret: dict[str, Any] | None = None, **more: Any) -> None:
    about = {"api_server": f"127.0.0.1:{port}", "ca_hashes": [HASH], **more}
    text = {
        "platform": "kubernetes", "node": {"name": "node-1"}, "kubernetes": about,
        "secret": {"inline": TOKEN} if secret is None else secret,
    }  # fmt: skip
    node.configure("# a comment\n" + yaml.safe_dump(text))


def joined_with(node: Node) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((node.root / "fake/join.json").read_text())
    return found


def test_a_node_joins(node: Node, api: Api) -> None:
    node.start()
    status = node.until_joined()
    assert (status["platform"], status["node"], status["controller"]) == (
        "kubernetes", "node-1", f"127.0.0.1:{api.port}",
    )  # fmt: skip
    order = "started configured network controller secret services registered joined".split()
    assert [name for name, _ in status["timeline"]] == order
    config = joined_with(node)
    assert config["apiVersion"] == "kubeadm.k8s.io/v1beta4"
    assert config["discovery"]["bootstrapToken"] == {
        "token": TOKEN, "apiServerEndpoint": f"127.0.0.1:{api.port}", "caCertHashes": [HASH],
    }  # fmt: skip
    assert config["nodeRegistration"]["name"] == "node-1"
    assert {"name": "node-ip", "value": "127.0.0.1"} in config["nodeRegistration"]["kubeletExtraArgs"]


def test_the_token_is_nowhere_afterwards(node: Node, api: Api) -> None:
    cloud = node.path("var/lib/cloud/instances/i-1/user-data.txt")
    cloud.write_text(f"#cloud-config\nwrite_files: [{{content: 'inline: {TOKEN}'}}]\n")
    node.start()
    node.until_joined()
    node.until(lambda _: TOKEN not in cloud.read_text())
    (node.root / "fake/join.json").unlink()
    holders = [p for p in node.root.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
    assert holders == []
    assert "# a comment" in (node.root / "etc/bakehouse/join.yaml").read_text()
    # cloud-init lays its copies down at each boot: the token is known again by its digest.
    cloud.write_text(base64.b64encode(f"#cloud-config\n# long enough\ninline: {TOKEN} {'x' * 40}".encode()).decode())
    before = cloud.read_text()
    assert node.run("scrub").returncode == 0
    assert cloud.read_text() != before


def test_the_version_that_was_baked_in_is_not_asked_for(node: Node, api: Api) -> None:
    node.path("usr/share/bakehouse/kubernetes-version").write_text("v1.24.3\n")
    node.start()
    node.until_joined()
    assert joined_with(node)["apiVersion"] == "kubeadm.k8s.io/v1beta3"


@pytest.mark.parametrize(
    ("version", "api_version", "socket_name"),
    [("v1.20.2", "v1beta2", "/run/containerd"), ("v1.24.0", "v1beta3", "unix://"), ("v1.31.0", "v1beta4", "unix://")],
)
def test_each_version_of_kubeadm_gets_its_form(
    node: Node, api: Api, version: str, api_version: str, socket_name: str
) -> None:
    node.path("fake/kubeadm-version").write_text(version)
    configure(
        node, api.port, labels=["zone=a", "example.org/rack="], taints=["gpu=yes:NoSchedule", "slow:NoExecute"],
        provider_id="openstack:///1", cloud_provider="external",
    )  # fmt: skip
    node.start()
    node.until_joined()
    config = joined_with(node)
    assert config["apiVersion"] == f"kubeadm.k8s.io/{api_version}"
    node_registration = config["nodeRegistration"]
    assert socket_name in node_registration["criSocket"]
    arguments = node_registration["kubeletExtraArgs"]
    if api_version == "v1beta4":
        arguments = {each["name"]: each["value"] for each in arguments}
    assert arguments == {
        "node-ip": "127.0.0.1", "node-labels": "zone=a,example.org/rack=", "provider-id": "openstack:///1",
        "cloud-provider": "external",
    }  # fmt: skip
    assert node_registration["taints"] == [
        {"key": "gpu", "value": "yes", "effect": "NoSchedule"}, {"key": "slow", "effect": "NoExecute"},
    ]  # fmt: skip
    limit = config["timeouts"]["discovery"] if api_version == "v1beta4" else config["discovery"]["timeout"]
    assert limit == "30s"


@pytest.mark.parametrize(
    ("cloud", "identity", "wanted"),
    [
        ("openstack", "165f301e-d185-5117-adc2-c687bd9ddab8", "openstack:///165f301e-d185-5117-adc2-c687bd9ddab8"),
        ("openstack", "i-0001", ""),
        ("nocloud", "165f301e-d185-5117-adc2-c687bd9ddab8", ""),
    ],
)
def test_the_provider_id_is_that_of_the_server_in_openstack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cloud: str, identity: str, wanted: str
) -> None:
    agent = load(tmp_path, monkeypatch)
    path = tmp_path / "run/cloud-init/instance-data.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"v1": {"cloud_name": cloud, "instance_id": identity}}))
    assert made(agent).provider_id() == wanted
    assert made(agent, provider_id="none").provider_id() == ""
    assert made(agent, provider_id="x://y").provider_id() == "x://y"


def made(agent: ModuleType, **more: Any) -> Any:
    about = {"api_server": "127.0.0.1:6443", "ca_hashes": [HASH], **more}
    config, faults = agent.parse(yaml.safe_dump({"platform": "kubernetes", "kubernetes": about}).encode())
    assert faults == []
    return agent.Kubernetes(config, "node-1")


def test_a_second_run_and_a_reboot_change_nothing(node: Node, api: Api) -> None:
    node.start()
    node.until_joined()
    joins = node.log().count("kubeadm join")
    assert joins == 1
    assert node.run("join").returncode == 0
    (node.root / "run/bakehouse/status.json").unlink()
    first = node.running.pop()
    first.kill()
    first.communicate()
    node.start()
    node.until_joined()
    assert node.log().count("kubeadm join") == joins


def test_an_api_server_that_is_late_is_waited_for(node: Node, api: Api) -> None:
    api.stop()
    node.start()
    status = node.until_waiting_for("refuses the connection")
    assert "does it run" in status["hint"]
    api.start()
    node.until_joined()


def test_a_token_that_expired_is_said_and_a_new_one_is_taken(node: Node, api: Api) -> None:
    api.tokens = {FRESH[:6]}
    node.start()
    status = node.until_waiting_for("the bootstrap token abcdef has expired")
    assert "kubeadm token create" in status["hint"]
    assert "kubeadm join" not in node.log(), "which would take its time to say so in other words"
    assert TOKEN not in json.dumps(status)
    configure(node, api.port, {"inline": FRESH})
    node.until_joined()


def test_without_a_token_it_says_what_is_missing(node: Node, api: Api) -> None:
    configure(node, api.port, {})
    node.start()
    assert "secret.inline" in node.until_waiting_for("there is no bootstrap token")["hint"]


def test_a_wrong_ca_ends_it_until_the_configuration_changes(node: Node, api: Api) -> None:
    node.path("fake/kubeadm-says").write_text(
        'cluster CA found in cluster-info ConfigMap is invalid: none of the public keys "sha256:1" are pinned'
    )
    agent = node.start()
    status = node.until(lambda s: s["state"] == "failed")
    assert "is not the one of ca_hashes" in status["faults"][0]
    assert agent.wait(10) == 2


@pytest.mark.parametrize(
    ("said", "clock_off", "words"),
    [
        ("x509: certificate has expired or is not yet valid: current time", 0, "clocks"),
        ("error execution phase kubelet-start: timed out waiting", 0, "the kubelet to come up"),
        ("could not connect", 7200, "clocks"),
        ("[preflight] Some fatal errors\n\t[ERROR Swap]: running with swap on is not supported", 0, "swap on is not"),
        ("everything is odd", 0, "kubeadm join failed: everything is odd"),
        ("no JWS signature", 0, "does not sign for this bootstrap token"),
    ],
)  # fmt: skip
def test_what_kubeadm_says_is_put_into_plain_words(
    node: Node, api: Api, said: str, clock_off: float, words: str
) -> None:
    api.clock_off = clock_off
    trouble = node.path("fake/kubeadm-says")
    trouble.write_text(said)
    node.start()
    node.until_waiting_for(words)
    trouble.unlink()
    node.until_joined()


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        ([*READY, {"type": "DiskPressure", "status": "True"}], "the disk is full (DiskPressure)"),
        ([*READY, {"type": "MemoryPressure", "status": "True"}], "memory is short"),
        ([{"type": "Ready", "status": "Unknown"}], "the kubelet does not report"),
        ([{"type": "Ready", "status": "False", "message": "container runtime is down"}], "container runtime is down"),
        (
            [{"type": "Ready", "status": "False", "message": "cni plugin not initialized: network"}],
            "no pod network here",
        ),
        ([], "has not said anything"),
    ],
)
def test_a_node_that_is_not_ready_says_why(node: Node, api: Api, conditions: list[dict[str, str]], words: str) -> None:
    api.conditions = conditions
    node.start()
    node.until_waiting_for(words)
    api.conditions = READY
    node.until_joined()


def test_a_kubelet_that_is_slow_to_register_is_waited_for(node: Node, api: Api) -> None:
    api.registered = False
    node.start()
    node.until_waiting_for("the kubelet to register")
    api.registered = True
    node.until_joined()


def test_containerd_that_does_not_run_is_named(node: Node, api: Api) -> None:
    place = node.root / "run/containerd/containerd.sock"
    aside = place.with_name("aside")
    place.rename(aside)
    node.start()
    assert "systemctl status containerd" in node.until_waiting_for("containerd to start")["hint"]
    aside.rename(place)
    node.until_joined()


def pod(name: str, **metadata: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "default", **metadata}, "status": {"phase": "Running"}}


def test_leave_evicts_what_others_would_run_and_deletes_the_node(node: Node, api: Api) -> None:
    assert node.run("join").returncode == 0
    api.pods = [
        pod("web"),
        pod("proxy", ownerReferences=[{"kind": "DaemonSet"}]),
        pod("static", annotations={"kubernetes.io/config.mirror": "x"}),
    ]
    done = node.run("leave")
    assert done.returncode == 0
    assert done.stdout.endswith("node-1 has left\n")
    assert [pod["metadata"]["name"] for pod in api.pods] == ["proxy", "static"]
    assert api.deleted
    assert not (node.root / "etc/kubernetes/kubelet.conf").exists()
    order = [line for line in api.asked if line.split()[0] in {"PATCH", "POST", "DELETE"}]
    assert [line.split()[0] for line in order] == ["PATCH", "POST", "DELETE"]


def test_leave_says_what_it_may_not_do(node: Node, api: Api) -> None:
    api.may_delete = False
    assert node.run("join").returncode == 0
    done = node.run("leave")
    assert done.returncode == 1
    assert "kubectl delete node node-1" in done.stdout


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"ca_hashes": []}, "needs ca_hashes or discovery_file"),
        ({"ca_hashes": ["sha256:1"]}, "ca_hashes[0]"),
        ({"api_server": "http://x"}, "api_server"),
        ({"labels": ["a b=c"]}, "labels[0]"),
        ({"taints": ["a=b"]}, "taints[0]"),
        ({"taints": ["a=b:Never"]}, "taints[0]"),
        ({"provider_id": "a b"}, "provider_id"),
        ({"controllers": ["a"]}, "controllers: not known"),
    ],
)
def test_a_configuration_that_is_wrong_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], fault: str
) -> None:
    agent = load(tmp_path, monkeypatch)
    about = {"api_server": "api:6443", "ca_hashes": [HASH], **change}
    text = yaml.safe_dump({"platform": "kubernetes", "kubernetes": about})
    assert fault in "; ".join(agent.parse(text.encode())[1])
    if "controllers" not in change:
        given: dict[str, Any] = {
            "api_server": about["api_server"], "ca_hashes": tuple(about["ca_hashes"]),
            **{name: tuple(change[name]) for name in ("labels", "taints") if name in change},
            **({"provider_id": change["provider_id"]} if "provider_id" in change else {}),
        }  # fmt: skip
        with pytest.raises(BakehouseError):
            userdata.KubernetesJoin(**given)


def test_user_data_is_what_the_agent_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = load(tmp_path, monkeypatch)
    broker = userdata.Broker("https://ctl:8444", "bhj_" + "x" * 43, Authority().pem)
    join = userdata.KubernetesJoin(
        "api.example.org", ca_hashes=(HASH,), node="node-1", labels=("a=b",), taints=("c:NoSchedule",),
        bootstrap_token=TOKEN, broker=broker, provider_id="none", cloud_provider="external",
    )  # fmt: skip
    text = userdata.render(join)
    assert "SECRET until" in text
    (file,) = yaml.safe_load(text)["write_files"]
    assert (file["path"], file["permissions"]) == ("/etc/bakehouse/join.yaml", "0600")
    config, faults = agent.parse(file["content"].encode())
    assert faults == []
    assert (config.bootstrap_token, config.token) == (TOKEN, broker.token)
    assert config.controllers == [("api.example.org", 6443)]
    assert TOKEN not in repr(join)
