"""The test cluster without Slurm: its certificates, and its join broker for real on a private network."""

from __future__ import annotations

import ipaddress
import json
import os
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from bakehouse import cluster, network, userdata
from bakehouse.cluster import Authority, Broker, Cluster
from bakehouse.errors import BakehouseError
from bakehouse.network import FOLDER, GATEWAY
from bakehouse.run import Log
from bakehouse.slurm import Controller

ADDRESS = ipaddress.ip_address("10.77.0.1")


def shake_hands(server: tuple[str, str], trusted: str, name: str, folder: Path) -> None:
    """Let a client that trusts a CA meet a server, in memory.

    Raises:
        ssl.SSLError: they do not come together.
    """
    (folder / "server.pem").write_text("".join(server))
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(folder / "server.pem")
    asking = ssl.create_default_context(cadata=trusted)
    asking.verify_flags |= ssl.VERIFY_X509_STRICT
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = asking.wrap_bio(back, there, server_hostname=name)
    served = serving.wrap_bio(there, back, server_side=True)
    for _ in range(4):
        for side in (client, served):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert client.getpeercert()


# Certificates.


def test_a_certificate_is_taken_by_whoever_trusts_its_authority(tmp_path: Path) -> None:
    authority = Authority()
    shake_hands(authority.certificate_for(ADDRESS), authority.pem, "10.77.0.1", tmp_path)


def test_a_certificate_of_another_authority_is_not_taken(tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(Authority().certificate_for(ADDRESS), Authority().pem, "10.77.0.1", tmp_path)


def test_a_certificate_is_for_one_address(tmp_path: Path) -> None:
    authority = Authority()
    with pytest.raises(ssl.SSLCertVerificationError, match="IP address mismatch"):
        shake_hands(authority.certificate_for(ADDRESS), authority.pem, "10.77.0.2", tmp_path)


def test_an_authoritys_key_is_nowhere(tmp_path: Path) -> None:
    authority = Authority()
    assert "PRIVATE" not in authority.pem
    assert "PRIVATE" not in authority.certificate_for(ADDRESS)[0]
    assert userdata.certificates(authority.pem) == authority.pem, "user-data takes it as it is"


# The broker.

KEY = bytes(range(256)) * 4

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A network with a broker, and a controller of which there is only the key."""
    with Log(tmp_path_factory.mktemp("cluster") / "log") as log, network.up(log) as place:
        controller = Controller(place, "munge")
        place.path(controller.key_file).parent.mkdir(parents=True)
        place.path(controller.key_file).write_bytes(KEY)
        place.path(controller.key_file).chmod(0o400)
        place.path(cluster.NOTE).write_text(json.dumps({"authentication": "munge"}))
        broker = Broker(place)
        broker.prepare({"slurm": {"authentication": "munge", "key_file": str(controller.key_file)}})
        broker.start()
        yield Cluster(place, controller, broker)


def fetch(made: Cluster, broker: userdata.Broker, node: str, folder: Path) -> tuple[int, dict[str, str]]:
    """Ask the broker for the key as a node does."""
    (folder / "ca.crt").write_text(broker.ca)
    (folder / "header").write_text(f"Authorization: Bearer {broker.token}\n")
    done = subprocess.run(
        [*made.network.only_network, "curl", "-sS", "--cacert", str(folder / "ca.crt"), "-H", f"@{folder / 'header'}",
         "-H", "Content-Type: application/json", "-d", json.dumps({"platform": "slurm", "node": node}),
         "-w", "\n%{http_code}", f"{broker.url}/v1/secret"],
        capture_output=True, text=True, check=True, timeout=20,
    )  # fmt: skip
    text, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(text)


def test_a_token_fetches_the_key_once(made: Cluster, tmp_path: Path) -> None:
    offered = made.broker.offer("node-1")
    status, answer = fetch(made, offered, "node-1", tmp_path)
    assert (status, answer["key"]) == (200, userdata.Join(("c",), key=KEY).key_base64)
    status, answer = fetch(made, offered, "node-1", tmp_path)
    assert (status, "used" in answer["error"]) == (401, True)


def test_a_node_is_told_how_to_join_with_a_token_or_with_the_key(made: Cluster) -> None:
    by_token, inline = made.join("node-2"), made.join("node-2", inline=True)
    assert (by_token.controllers, by_token.node, by_token.key) == ((f"{GATEWAY}:6817",), "node-2", None)
    assert by_token.broker is not None
    assert by_token.broker.url == f"https://{GATEWAY}:8444"
    assert (inline.broker, inline.key) == (None, KEY)


def test_a_cluster_is_found_again_by_its_process(made: Cluster, tmp_path: Path) -> None:
    with Log(tmp_path / "log") as log:
        found = cluster.attach(made.network.pid, log)
        offered = found.broker.offer("node-3", lifetime="30m")
        assert (found.controller.authentication, found.controller.key) == ("munge", KEY)
    assert fetch(made, offered, "node-3", tmp_path)[0] == 200


def test_a_token_that_cannot_be_made_says_why(made: Cluster) -> None:
    with pytest.raises(BakehouseError, match="the join broker refuses: token") as caught:
        made.broker.offer("node-4", lifetime="for ever")
    assert "for ever" in caught.value.log


def test_secrets_of_the_broker_are_for_root_only(made: Cluster) -> None:
    folder = made.network.path(cluster.BROKER_FOLDER)
    assert folder.stat().st_mode & 0o777 == 0o700
    for name in ("broker.key", "tokens.sqlite"):
        assert (folder / name).stat().st_mode & 0o077 == 0, name
    config = yaml.safe_load((folder / "broker.yaml").read_text())
    assert config["platforms"] == {"slurm": {"authentication": "munge", "key_file": str(made.controller.key_file)}}


def test_neither_key_nor_token_is_in_a_log(made: Cluster, tmp_path: Path) -> None:
    offered = made.broker.offer("node-5")
    fetch(made, offered, "node-6", tmp_path)
    said = made.network.log_of("broker") + made.network.log.path.read_text()
    assert "node-6" in said
    assert offered.token not in said
    assert "BAUGBw" not in said


def test_a_broker_that_ends_says_so(made: Cluster) -> None:
    second = Broker(made.network)
    with pytest.raises(BakehouseError, match="the join broker ended"):
        second.config = Path("/nothing/broker.yaml")
        second._sockets = lambda: ""  # type: ignore[method-assign]
        second.start()


def test_a_broker_is_stopped_and_started_and_knows_its_tokens(made: Cluster, tmp_path: Path) -> None:
    offered = made.broker.offer("node-7")
    made.broker.stop()
    assert f":{cluster.BROKER_PORT} " not in made.broker._sockets()
    made.broker.start()
    assert fetch(made, offered, "node-7", tmp_path)[0] == 200


def test_a_cluster_that_is_gone_is_told(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    with Log(tmp_path / "log") as log, pytest.raises(BakehouseError, match="the cluster is gone") as caught:
        cluster.attach(process.pid, log)
    assert "invoke cluster.up slurm" in caught.value.hint


def test_an_image_without_slurmctld_is_refused(tmp_path: Path) -> None:
    with Log(tmp_path / "log") as log, network.up(log) as place:
        root = FOLDER / "images" / "image"
        place.run(["mkdir", "-p", root])
        with pytest.raises(BakehouseError, match="this image has no slurmctld to test with") as caught:
            Controller(place, "munge").prepare(root)
    assert "slurm-node" in caught.value.hint
