"""The join agent fetches its key from the real broker, once, and trusts nobody else."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from bakehouse import REPOSITORY
from tests.unit.test_agent import Node, listening, load

BROKER = REPOSITORY / "bootstrap" / "broker" / "bakehouse_broker.py"
KEY = os.urandom(128)
DAY = datetime.timedelta(days=1)
PEM = serialization.Encoding.PEM


@dataclass
class Authority:
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(PEM).decode()

    def certify(self, folder: Path, begin: int = -1, end: int = 1, address: str = "127.0.0.1") -> None:
        """Write broker.crt and broker.key, good from one day to another."""
        key = ec.generate_private_key(ec.SECP256R1())
        made = builder("broker", key, self.certificate.subject, begin, end).add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=False
        )
        (folder / "broker.crt").write_bytes(made.sign(self.key, hashes.SHA256()).public_bytes(PEM))
        private = folder / "broker.key"
        private.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
        private.chmod(0o600)


def builder(
    subject: str, key: ec.EllipticCurvePrivateKey, issuer: x509.Name | None, begin: int, end: int
) -> x509.CertificateBuilder:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer or name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begin * DAY)
        .not_valid_after(now + end * DAY)
    )


def make_authority() -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    made = builder("CA", key, None, -30, 30).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return Authority(key, made.sign(key, hashes.SHA256()))


@dataclass
class Broker:
    folder: Path
    authority: Authority
    port: int

    def token(self, node: str = "node-1", lifetime: str = "1h") -> str:
        done = self.command("token", "--platform", "slurm", "--node", node, "--lifetime", lifetime)
        return subprocess.run(done, capture_output=True, text=True, check=True).stdout.strip()

    def command(self, verb: str, *arguments: str) -> list[str]:
        return [sys.executable, str(BROKER), verb, "--config", str(self.folder / "broker.yaml"), *arguments]

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        with subprocess.Popen(self.command("serve"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                end = time.monotonic() + 10
                while time.monotonic() < end:
                    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                        break
                    time.sleep(0.05)
                yield
            finally:
                process.terminate()


@pytest.fixture
def broker(tmp_path: Path) -> Broker:
    folder = tmp_path / "broker"
    folder.mkdir(mode=0o700)
    with listening() as port:
        pass
    authority = make_authority()
    authority.certify(folder)
    key = folder / "munge.key"
    key.write_bytes(KEY)
    key.chmod(0o400)
    (folder / "broker.yaml").write_text(
        f"listen: 127.0.0.1:{port}\ncertificate: {folder}/broker.crt\nprivate_key: {folder}/broker.key\n"
        f"state: {folder}/tokens.sqlite\nplatforms: {{slurm: {{authentication: munge, key_file: {key}}}}}\n"
    )
    return Broker(folder, authority, port)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with listening() as port:
        machine = Node(tmp_path / "node", port)
        machine.path("fake/log").touch()
        machine.path("fake/key").write_bytes(KEY)
        yield machine
        for process in machine.running:
            process.kill()
            process.communicate()


def configure(node: Node, broker: Broker, token: str, authority: Authority | None = None) -> None:
    pem = (authority or broker.authority).pem.replace("\n", "\n      ").rstrip()
    node.configure(
        f"platform: slurm\nnode: {{name: node-1}}\nslurm: {{controllers: ['127.0.0.1:{node.port}']}}\n"
        f"secret:\n  broker:\n    url: https://127.0.0.1:{broker.port}\n    token: {token}\n    ca: |\n      {pem}\n"
    )


def test_a_node_joins_with_a_token(node: Node, broker: Broker) -> None:
    with broker.serving():
        token = broker.token()
        configure(node, broker, token)
        agent = node.start()
        node.until_joined()
    assert (node.root / "etc/munge/munge.key").read_bytes() == KEY
    config = (node.root / "etc/bakehouse/join.yaml").read_text()
    assert "token:" not in config
    assert "BEGIN CERTIFICATE" in config
    assert "ip " not in node.log(), "the metadata holds no secret any more"
    agent.kill()
    node.start()
    node.until_joined()
    holders = [p for p in node.root.rglob("*") if p.is_file() and token.encode() in p.read_bytes()]
    assert holders == []


def test_a_node_killed_before_it_removed_its_token_does_not_use_it_twice(node: Node, broker: Broker) -> None:
    with broker.serving():
        token = broker.token()
        configure(node, broker, token)
        whole = (node.root / "etc/bakehouse/join.yaml").read_text()
        node.start()
        node.until_joined()
        node.running[0].kill()
        node.configure(whole)
        node.start()
        node.until_joined()
        node.until(lambda _: "token:" not in (node.root / "etc/bakehouse/join.yaml").read_text())


@pytest.mark.parametrize("kind", ["unknown", "foreign", "used", "expired"])
def test_a_refused_token_ends_it_with_the_brokers_sentence(node: Node, broker: Broker, kind: str) -> None:
    with broker.serving():
        token = {"unknown": "bhj_" + "x" * 43, "foreign": ""}.get(kind) or broker.token(
            "node-2" if kind == "foreign" else "node-1", "1s" if kind == "expired" else "1h"
        )
        configure(node, broker, token)
        if kind == "used":
            node.start()
            node.until_joined()
            node.running[0].kill()
            configure(node, broker, token)
            (node.root / "etc/munge/munge.key").unlink()
        if kind == "expired":
            time.sleep(1.2)
        done = node.run("join", "--boot")
    assert done.returncode == 3
    status = node.status()
    assert status["state"] == "failed"
    assert "token refused" in status["faults"][0]
    assert "invoke join.token --platform slurm --node node-1" in status["hint"]
    assert token not in done.stdout + str(status)


def test_a_broker_that_comes_later_is_waited_for(node: Node, broker: Broker) -> None:
    configure(node, broker, broker.token())
    node.start()
    node.until_waiting_for("refuses the connection")
    with broker.serving():
        node.until_joined()


@pytest.mark.parametrize(
    ("days", "address", "other", "sentence"),
    [
        ((-1, 1), "127.0.0.1", True, "is not from the CA in join.yaml"),
        ((1, 2), "127.0.0.1", False, "is not yet valid, by this node's clock"),
        ((-3, -1), "127.0.0.1", False, "has expired, by this node's clock"),
        ((-1, 1), "127.0.0.9", False, "is for another name"),
    ],
)
def test_a_certificate_that_does_not_hold_gets_no_token(
    node: Node, broker: Broker, days: tuple[int, int], address: str, other: bool, sentence: str
) -> None:
    broker.authority.certify(broker.folder, *days, address)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(broker.folder / "broker.crt", broker.folder / "broker.key")
    with answering(context, broker.port, b"") as heard:
        configure(node, broker, "bhj_" + "x" * 43, make_authority() if other else None)
        node.start()
        status = node.until_waiting_for(sentence)
        if "clock" in sentence:
            assert re.search(r"clock says 20\d\d-", status["hint"])
    assert heard == []


@contextlib.contextmanager
def answering(context: ssl.SSLContext, port: int, body: bytes, status: int = 200) -> Iterator[list[str]]:
    """A server that is not the broker."""
    heard: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(self.headers["Authorization"])
            self.send_response(status)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    class Server(HTTPServer):
        def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
            connection, address = super().get_request()
            try:
                return context.wrap_socket(connection, server_side=True), address
            except OSError:
                connection.close()
                raise

    with Server(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield heard
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (503, b'{"error": "the key cannot be read"}', "answers 503: the key cannot be read"),
        (500, b"<html>", "answers 500: no reason"),
        (200, b"x" * 40000, "not for munge"),
        (200, b'{"authentication": "munge", "key": "!"}', "sends no key that can be one"),
        (200, b'{"authentication": "slurm", "key": ""}', "has a key for slurm, not for munge"),
        (200, b"[" * 9000, "has a key for"),
    ],
)
def test_an_answer_that_makes_no_sense_is_waited_out(
    node: Node, broker: Broker, status: int, body: bytes, sentence: str
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(broker.folder / "broker.crt", broker.folder / "broker.key")
    configure(node, broker, "bhj_" + "x" * 43)
    with answering(context, broker.port, body, status):
        node.start()
        node.until_waiting_for(sentence)
    assert not (node.root / "etc/munge/munge.key").exists()


def test_what_does_not_speak_tls_is_named(node: Node, broker: Broker) -> None:
    with socket.create_server(("127.0.0.1", broker.port)) as server:

        def talk() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(b"SSH-2.0-OpenSSH\r\n")
                        connection.recv(1000)

        threading.Thread(target=talk, daemon=True).start()
        configure(node, broker, "bhj_" + "x" * 43)
        node.start()
        node.until_waiting_for("does not speak TLS")
        node.running[0].kill()
        server.shutdown(socket.SHUT_RDWR)


def test_no_connection_is_put_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent: ModuleType = load(tmp_path, monkeypatch)
    where = "the broker at ctl.example.org:8444"
    for error, sentence in (
        (socket.gaierror(-2, "Name or service not known"), "the name ctl.example.org of the broker is not found"),
        (TimeoutError("timed out"), f"{where} does not answer"),
        (OSError(113, "No route to host"), f"{where} cannot be reached: no route to it"),
        (OSError(101, "Network is unreachable"), f"{where} cannot be reached: this node has no network to it"),
        (OSError(99, "Cannot assign"), f"{where} cannot be reached: this node has no address"),
        (OSError(5, "Input/output error"), f"{where} cannot be reached: Input/output error"),
    ):
        assert agent.no_connection(where, error).what == sentence
