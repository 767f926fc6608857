"""The join broker: real servers on the loopback, real certificates, every refusal, and what clients may do to it."""

from __future__ import annotations

import base64
import contextlib
import datetime
import http.client
import ipaddress
import json
import os
import re
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bakehouse import REPOSITORY, token

broker: Any = token.broker()
KEY = bytes(range(128))
NOW = 1_800_000_000.0
FOLDER = REPOSITORY / "bootstrap" / "broker"
DAY = datetime.timedelta(days=1)


# ---- certificates


@dataclass
class Authority:
    """A CA."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def begin(subject: str, public: ec.EllipticCurvePublicKey, days: tuple[int, int]) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + days[0] * DAY)
        .not_valid_after(now + days[1] * DAY)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=authority, crl_sign=authority, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def make_authority() -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = begin("CA", key.public_key(), (-30, 30)).issuer_name(name("CA"))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(usage(authority=True), critical=True)
    return Authority(key, builder.sign(key, hashes.SHA256()))


def certify(
    authority: Authority, folder: Path, days: tuple[int, int] = (-20, 20), *, names: bool = True, password: bytes = b""
) -> None:
    """Write broker.crt and broker.key."""
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = authority.key.public_key()
    builder = begin("broker", key.public_key(), days).issuer_name(name("CA"))
    builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer), critical=False)
    builder = builder.add_extension(usage(authority=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    if names:
        addresses = [x509.IPAddress(ipaddress.ip_address(each)) for each in ("127.0.0.1", "::1")]
        builder = builder.add_extension(x509.SubjectAlternativeName(addresses), critical=False)
    certificate = builder.sign(authority.key, hashes.SHA256())
    (folder / "broker.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    lock = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)
    (folder / "broker.key").write_bytes(pem)
    (folder / "broker.key").chmod(0o600)


# ---- a broker and its clients


@dataclass
class Answer:
    """What a client got."""

    status: int
    body: dict[str, str]
    headers: dict[str, str]


@dataclass
class Stand:
    """A folder with all that a broker needs, and clients that know its CA."""

    folder: Path
    authority: Authority
    port: int = 0
    now: float = NOW
    server: Any = None
    trusted: ssl.SSLContext = field(init=False)

    def __post_init__(self) -> None:
        self.trusted = trusting(self.authority)
        certify(self.authority, self.folder)
        self.key_file.write_bytes(KEY)
        self.key_file.chmod(0o400)
        self.write()

    @property
    def key_file(self) -> Path:
        return self.folder / "munge.key"

    @property
    def state(self) -> Path:
        return self.folder / "tokens.sqlite"

    @property
    def config(self) -> Path:
        return self.folder / "broker.yaml"

    def write(self, **changes: Any) -> None:
        data = {
            "listen": "127.0.0.1:0",
            "certificate": str(self.folder / "broker.crt"),
            "private_key": str(self.folder / "broker.key"),
            "state": str(self.state),
            "platforms": {"slurm": {"authentication": "munge", "key_file": str(self.key_file)}},
        }
        self.config.write_text(yaml.safe_dump(data | changes))

    def token(self, node: str = "node-1", lifetime: int = 3600) -> str:
        return str(broker.create_token(self.state, "slurm", node, lifetime, self.now))

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        with broker.Server(broker.load_config(self.config), clock=lambda: self.now) as self.server:
            self.port = self.server.port
            loop = threading.Thread(target=self.server.serve_forever, args=(0.005,))
            loop.start()
            try:
                yield
            finally:
                self.server.shutdown()
                loop.join()

    def send(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None,
        *, port: int = 0, context: ssl.SSLContext | None = None, host: str = "127.0.0.1",
    ) -> Answer:  # fmt: skip
        connection = http.client.HTTPSConnection(host, port or self.port, timeout=10, context=context or self.trusted)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return Answer(response.status, json.loads(response.read() or b"{}"), dict(response.headers))

    def ask(self, secret: str, node: str = "node-1", platform: str = "slurm", **options: Any) -> Answer:
        body = json.dumps({"platform": platform, "node": node}).encode()
        return self.send("POST", "/v1/secret", body, {"Authorization": f"Bearer {secret}"}, **options)

    def raw(self) -> ssl.SSLSocket:
        """Return a connection for a client that has its own ideas."""
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        return self.trusted.wrap_socket(plain, server_hostname="127.0.0.1", suppress_ragged_eofs=False)

    def status_of(self, secret: str) -> str:
        identity = broker.hash_token(secret)[:8]
        return next(str(each.status(self.now)) for each in broker.list_tokens(self.state) if each.identity == identity)


def trusting(authority: Authority) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=authority.pem)
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # As Python 3.13 has it by itself.
    return context


@pytest.fixture(scope="module")
def authority() -> Authority:
    return make_authority()


@pytest.fixture
def stand(tmp_path: Path, authority: Authority) -> Stand:
    return Stand(tmp_path, authority)


@pytest.fixture
def served(stand: Stand) -> Iterator[Stand]:
    with stand.serving():
        yield stand


@dataclass
class Log:
    """What was logged since the test began."""

    capsys: pytest.CaptureFixture[str]
    text: str = ""

    def has(self, words: str) -> bool:
        self.text += self.capsys.readouterr().err
        return words in self.text


@pytest.fixture
def log(capsys: pytest.CaptureFixture[str]) -> Log:
    return Log(capsys)


def soon(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 5
    while not what():
        assert time.monotonic() < until, "did not come true in 5 seconds"
        time.sleep(0.005)


# ---- handing out


def test_a_node_gets_the_key_for_its_token(served: Stand, log: Log) -> None:
    secret = served.token()
    answer = served.ask(secret)
    assert answer.status == 200
    key = base64.b64encode(KEY).decode()
    assert answer.body == {"platform": "slurm", "node": "node-1", "authentication": "munge", "key": key}
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Server"] == "bakehouse-broker"
    assert "Date" in answer.headers
    [known] = broker.list_tokens(served.state)
    assert (known.status(NOW), known.used, known.used_by) == ("used", int(NOW), "127.0.0.1")
    soon(lambda: log.has(f"key handed out: slurm node-1 token {known.identity} at 127.0.0.1"))
    assert secret not in log.text
    assert key not in log.text


BOOTSTRAP = "abcdef.0123456789abcdef"


def test_a_kubernetes_node_gets_a_fresh_bootstrap_token(stand: Stand, log: Log) -> None:
    made = stand.folder / "made"
    command = ["sh", "-c", f"echo x >> {made}; echo {BOOTSTRAP}"]
    stand.write(platforms={"kubernetes": {"token_command": command}})
    with stand.serving():
        assert stand.ask("bhj_" + "x" * 43, platform="kubernetes").status == 401
        assert not made.exists(), "nobody without a good token makes us do any work"
        secret = broker.create_token(stand.state, "kubernetes", "node-1", 60, stand.now)
        answer = stand.ask(secret, platform="kubernetes")
        assert answer.body == {"platform": "kubernetes", "node": "node-1", "token": BOOTSTRAP}
        assert stand.ask(secret, platform="kubernetes").status == 401
        assert made.read_text().count("x") == 1
        soon(lambda: log.has("handed out: kubernetes node-1"))
    assert BOOTSTRAP not in log.text


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["sh", "-c", "echo no such cluster >&2; exit 1"], "made no token: no such cluster"),
        (["echo", "something else"], "it printed no bootstrap token"),
        (["/nonexistent/kubeadm"], "cannot be run"),
    ],
)
def test_a_token_is_not_used_up_where_no_bootstrap_token_can_be_made(
    stand: Stand, log: Log, command: list[str], words: str
) -> None:
    stand.write(platforms={"kubernetes": {"token_command": command}})
    with stand.serving():
        secret = broker.create_token(stand.state, "kubernetes", "node-1", 60, stand.now)
        assert stand.ask(secret, platform="kubernetes").status == 503
        assert stand.status_of(secret) == "good"
        soon(lambda: log.has(words))


@pytest.mark.parametrize("command", [[], "kubeadm token create", [1]])
def test_a_token_command_is_a_list_of_words(tmp_path: Path, command: object) -> None:
    path = tmp_path / "broker.yaml"
    platforms = {"kubernetes": {"token_command": command}}
    path.write_text(yaml.safe_dump(yaml.safe_load(BASE) | {"platforms": platforms}))
    with pytest.raises(broker.BrokerError, match=r"platforms\.kubernetes\.token_command: must be a list of words"):
        broker.load_config(path)
    path.write_text(yaml.safe_dump(yaml.safe_load(BASE) | {"platforms": {"kubernetes": None}}))
    assert broker.load_config(path).platforms["kubernetes"].command == tuple(broker.TOKEN_COMMAND)


def test_a_name_in_other_letters_is_the_same_node(served: Stand) -> None:
    assert served.ask(served.token("Node-1"), "nODE-1").body["node"] == "nODE-1"


def test_a_token_is_good_once(served: Stand, capsys: pytest.CaptureFixture[str]) -> None:
    secret = served.token()
    assert served.ask(secret).status == 200
    again = served.ask(secret)
    assert (again.status, again.body) == (401, {"error": "token refused: it has been used"})
    assert again.headers["WWW-Authenticate"] == "Bearer"
    identity = broker.hash_token(secret)[:8]
    assert (
        f"refused: slurm node-1 token {identity} at 127.0.0.1: 401 token refused: it has been used"
        in capsys.readouterr().err
    )


def test_a_token_ends(served: Stand) -> None:
    secret = served.token(lifetime=60)
    served.now += 60
    assert served.ask(secret).body == {"error": "token refused: it has expired"}
    served.now -= 1
    assert served.ask(secret).status == 200


def test_a_token_is_forgotten_a_week_after_its_end(served: Stand) -> None:
    secret = served.token(lifetime=60)
    served.now += 60 + broker.KEPT_SECONDS
    served.token("node-2")
    assert served.ask(secret).body == {"error": "token refused: it has expired"}
    served.now += 1
    served.token("node-2")
    assert served.ask(secret).body == {"error": "token refused: it is unknown"}


def test_a_foreign_node_is_refused_and_the_token_stays_good(served: Stand) -> None:
    secret = served.token("node-1")
    assert served.ask(secret, "node-2").body == {"error": "token refused: it is not for node-2"}
    assert served.ask(secret, "node-1").status == 200


def test_a_revoked_token_is_refused(served: Stand) -> None:
    secret = served.token()
    broker.revoke_tokens(served.state, "node-1", NOW)
    assert served.ask(secret).body == {"error": "token refused: it has been revoked"}


@pytest.mark.parametrize("secret", ["bhj_" + "A" * 43, "bhj_short", "", "x" * 4000, "bhj_" + "é" * 43])
def test_an_unknown_token_is_refused(served: Stand, secret: str) -> None:
    answer = served.ask(secret)
    assert (answer.status, answer.body) == (401, {"error": "token refused: it is unknown"})


@pytest.mark.parametrize("value", [None, "Basic Ym9iOmJvYg==", "bhj_" + "A" * 43])
def test_a_request_without_a_token_is_refused(served: Stand, value: str | None) -> None:
    headers = {"Authorization": value} if value else {}
    answer = served.send("POST", "/v1/secret", b'{"platform": "slurm", "node": "node-1"}', headers)
    assert (answer.status, answer.body) == (401, {"error": "token refused: none was sent"})


def test_slurms_own_key_is_named_as_such(stand: Stand) -> None:
    stand.write(platforms={"slurm": {"authentication": "slurm", "key_file": str(stand.key_file)}})
    with stand.serving():
        assert stand.ask(stand.token()).body["authentication"] == "slurm"


# ---- the key


def test_a_rotated_key_counts_at_once(served: Stand) -> None:
    served.key_file.chmod(0o600)
    served.key_file.write_bytes(b"new" * 20)
    assert base64.b64decode(served.ask(served.token()).body["key"]) == b"new" * 20


def spoil(path: Path, how: str) -> None:
    path.unlink()
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how != "missing":
        path.write_bytes(b"k" * int(how))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "cannot be read: No such file"),
        ("31", "does not hold 32 to 1024 bytes"),
        ("1025", "does not hold 32 to 1024 bytes"),
        ("pipe", "is not a file"),
        ("folder", "is not a file"),
    ],
)
def test_a_key_that_is_not_good_uses_no_token_up(
    served: Stand, capsys: pytest.CaptureFixture[str], how: str, said: str
) -> None:
    secret = served.token()
    spoil(served.key_file, how)
    answer = served.ask(secret)
    assert answer.status == 503
    assert str(served.folder) not in answer.body["error"]
    assert re.search(f"no token was used up: the key file .*munge.key {said}", capsys.readouterr().err)
    served.key_file.rmdir() if how == "folder" else served.key_file.unlink(missing_ok=True)
    served.key_file.write_bytes(KEY)
    assert served.ask(secret).status == 200


def test_a_state_that_cannot_be_written_uses_no_token_up(served: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "BUSY_SECONDS", 0.05)
    secret = served.token()
    with contextlib.closing(sqlite3.connect(served.state, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert served.ask(secret).status == 503
    assert served.ask(secret).status == 200


# ---- requests that are none


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/secret", 405),
        ("PUT", "/v1/secret", 405),
        ("BREW", "/v1/secret", 405),
        ("HEAD", "/v1/secret", 405),
        ("GET", "/", 404),
        ("POST", "/", 404),
        ("POST", "/v1/secret?token=bhj_x", 404),
        ("POST", "/v1/secret/../secret", 404),
    ],
)
def test_other_methods_and_addresses_are_refused(
    served: Stand, capsys: pytest.CaptureFixture[str], method: str, path: str, status: int
) -> None:
    answer = served.send(method, path, b"{}")
    assert answer.status == status
    assert answer.headers.get("Allow", "") == ("POST" if status == 405 else "")
    assert answer.headers["Cache-Control"] == "no-store"
    assert "bhj_x" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 4000,
        b"{}",
        b'{"platform": "slurm"}',
        b'{"platform": "slurm", "node": "node-1", "more": 1}',
        b'{"platform": "kubernetes", "node": "node-1"}',
        b'{"platform": ["slurm"], "node": "node-1"}',
        b'{"platform": "slurm", "node": null}',
        b'{"platform": "slurm", "node": "node-1.example.org"}',
        b'{"platform": "slurm", "node": "a\\nb"}',
        b'{"platform": "slurm", "node": ""}',
    ],
)
def test_a_body_that_makes_no_sense_is_refused(served: Stand, body: bytes) -> None:
    secret = served.token()
    assert served.send("POST", "/v1/secret", body, {"Authorization": f"Bearer {secret}"}).status == 400
    assert served.status_of(secret) == "good"


@pytest.mark.parametrize("size", [4097, 60_000])
def test_a_body_that_is_too_long_is_refused(served: Stand, size: int) -> None:
    answer = served.send("POST", "/v1/secret", b" " * size)
    assert (answer.status, answer.body) == (413, {"error": "the body is over 4 KiB"})


def test_a_body_that_is_announced_as_endless_is_not_waited_for(served: Stand) -> None:
    with served.raw() as client:
        client.sendall(b"POST /v1/secret HTTP/1.1\r\nContent-Length: 999999999999999\r\n\r\n{")
        assert received(client).startswith(b"HTTP/1.0 413 ")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST /v1/secret HTTP/1.1\r\n\r\n", 400),
        (b"POST /v1/secret HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /v1/secret HTTP/1.1\r\nContent-Length: 1_0\r\n\r\n", 400),
        (b"POST /v1/secret HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
        (b"POST /v1/secret HTTP/1.1\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}", 400),
        (b"POST /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", 400),
        (b"POST /v1/secret HTTP/1.1\r\nX: " + b"a" * 9000 + b"\r\nContent-Length: 2\r\n\r\n{}", 400),
        (b"POST /v1/secret HTTP/1.1\r\n" + b"X: a\r\n" * 150 + b"\r\n", 431),
        (b"POST /v1/secret HTTP/9.9\r\n\r\n", 505),
        (b"POST /v1/secret FTP\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
    ],
)
def test_a_head_that_makes_no_sense_is_refused(served: Stand, head: bytes, status: int) -> None:
    with served.raw() as client:
        client.sendall(head)
        got = received(client)
    assert json.loads(got.rpartition(b"\r\n")[2])["error"]
    assert b"<html" not in got.lower()
    assert got.startswith(b"HTTP/1.0 %d " % status), got


def received(client: ssl.SSLSocket) -> bytes:
    got = b""
    while data := client.recv(65536):
        got += data
    return got


def test_a_connection_ends_as_tls_has_it(served: Stand) -> None:
    with served.raw() as client:  # It takes an end without a good-bye for an error.
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert received(client)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(garbage=st.binary(max_size=300), inside=st.booleans(), request=st.booleans())
def test_garbage_does_no_harm(stand_with_patience: Stand, garbage: bytes, inside: bool, request: bool) -> None:
    stand = stand_with_patience
    start = b"POST /v1/secret HTTP/1.1\r\nContent-Length: 9\r\n" if request else b""
    with contextlib.suppress(OSError):
        if inside:
            with stand.raw() as client:
                client.sendall(start + garbage)
                socket.socket.shutdown(client, socket.SHUT_WR)
                assert not received(client).startswith((b"HTTP/1.0 2", b"HTTP/1.0 50"))
        else:
            with socket.create_connection(("127.0.0.1", stand.port), timeout=10) as plain:
                plain.sendall(garbage)
                plain.shutdown(socket.SHUT_WR)
                while plain.recv(4096):
                    pass
    stand.server.limiter = broker.Limiter()
    assert stand.send("GET", "/").status == 404


@pytest.fixture
def stand_with_patience(stand: Stand, capsys: pytest.CaptureFixture[str]) -> Iterator[Stand]:
    with stand.serving():
        yield stand
    assert "an error of the broker itself" not in capsys.readouterr().err


# ---- TLS


def handshake_fails(stand: Stand, context: ssl.SSLContext, match: str, host: str = "127.0.0.1") -> None:
    secret = stand.token()
    with pytest.raises(ssl.SSLError, match=match):
        stand.ask(secret, context=context, host=host)
    assert stand.status_of(secret) == "good"


def test_a_node_with_another_ca_sends_no_token(served: Stand, log: Log) -> None:
    handshake_fails(served, trusting(make_authority()), "certificate verify failed")
    soon(lambda: log.has("no TLS with 127.0.0.1: it does not trust our certificate"))


def test_an_expired_certificate_is_not_taken(stand: Stand, capsys: pytest.CaptureFixture[str]) -> None:
    certify(stand.authority, stand.folder, (-20, -1))
    with stand.serving():
        handshake_fails(stand, stand.trusted, "certificate has expired")
    assert broker.main(["check", "--config", str(stand.config)]) == 1
    assert re.search(r"error: nodes will refuse .*broker\.crt: certificate has expired", capsys.readouterr().out)


def test_a_name_that_is_not_in_the_certificate_is_not_taken(stand: Stand) -> None:
    stand.write(listen="127.0.0.2:0")
    with stand.serving():
        handshake_fails(stand, stand.trusted, "IP address mismatch", host="127.0.0.2")


def test_old_tls_is_not_spoken(served: Stand) -> None:
    old = trusting(served.authority)
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        old.minimum_version = ssl.TLSVersion.TLSv1
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    handshake_fails(served, old, "alert protocol version|no protocols available|unsupported protocol")


def test_a_new_certificate_is_noticed(stand: Stand) -> None:
    with stand.serving():
        other = make_authority()
        certify(other, stand.folder)

        def taken() -> bool:
            with contextlib.suppress(ssl.SSLError):
                return stand.send("GET", "/", context=trusting(other)).status == 404
            return False

        soon(taken)


def test_a_broken_new_certificate_leaves_the_former_in_use(stand: Stand, log: Log) -> None:
    said = "the former certificate stays in use"
    with stand.serving():
        (stand.folder / "broker.crt").write_text("nonsense")
        soon(lambda: log.has(said))
        assert stand.ask(stand.token()).status == 200
    assert log.has(said)
    assert log.text.count(said) == 1


# ---- many clients, slow clients, clients that go


def test_simultaneous_requests_with_one_token_give_one_key(served: Stand) -> None:
    served.server.limiter = broker.Limiter(lambda: time.monotonic() * 1e9)  # Forgets at once.
    secrets = [served.token() for _ in range(3)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(served.ask, secrets * 8))
    assert sorted(each.status for each in answers) == [200] * 3 + [401] * 21
    assert {each.body["error"] for each in answers if each.status == 401} == {"token refused: it has been used"}


def test_a_client_that_says_nothing_holds_up_nobody(stand: Stand) -> None:
    with stand.serving(), contextlib.ExitStack() as silent:
        for _ in range(5):
            silent.enter_context(socket.create_connection(("127.0.0.1", stand.port)))
        half = silent.enter_context(stand.raw())
        half.sendall(b"POST /v1/secret HTTP/1.1\r\nContent-Le")
        began = time.monotonic()
        assert stand.ask(stand.token()).status == 200
        assert time.monotonic() - began < 2


def test_a_client_that_drips_is_cut_off(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "CONNECTION_SECONDS", 0.3)
    with stand.serving(), stand.raw() as client:
        began = time.monotonic()
        with pytest.raises(OSError, match=r"."):
            while time.monotonic() - began < 5:
                client.sendall(b"a")
                time.sleep(0.02)
        assert time.monotonic() - began < 2


def test_where_all_places_are_taken_the_next_waits_for_one(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "CONNECTION_SECONDS", 0.3)
    monkeypatch.setattr(broker, "CONNECTIONS", 2)
    with stand.serving(), contextlib.ExitStack() as silent:
        for _ in range(2):
            silent.enter_context(socket.create_connection(("127.0.0.1", stand.port)))
        assert stand.ask(stand.token()).status == 200


def test_one_address_cannot_hold_all_places(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "CONNECTIONS_OF_ONE_ADDRESS", 2)
    with stand.serving(), contextlib.ExitStack() as silent:
        for _ in range(2):
            silent.enter_context(socket.create_connection(("127.0.0.1", stand.port)))
        third = silent.enter_context(socket.create_connection(("127.0.0.1", stand.port), timeout=5))
        assert third.recv(1) == b""


def test_a_client_that_has_hung_up_keeps_its_token(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = threading.Event()
    read_key = broker.read_key

    def slowly(path: Path) -> bytes:
        assert gone.wait(5)
        return bytes(read_key(path))

    monkeypatch.setattr(broker, "read_key", slowly)
    secret = stand.token()
    with stand.serving():
        body = b'{"platform": "slurm", "node": "node-1"}'
        with stand.raw() as client:
            client.sendall(
                b"POST /v1/secret HTTP/1.1\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s"
                % (secret.encode(), len(body), body)
            )
        gone.set()
    assert "node-1 went away; its token was not used up" in capsys.readouterr().err
    assert stand.status_of(secret) == "good"


def test_a_client_that_dies_before_it_has_the_key_is_logged(
    served: Stand, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def die(*_: object) -> None:
        raise BrokenPipeError

    secret = served.token()
    monkeypatch.setattr(broker.Handler, "_send", die)
    with pytest.raises((http.client.HTTPException, OSError)):
        served.ask(secret)
    said = f"slurm node-1 token {broker.hash_token(secret)[:8]} at 127.0.0.1 went away before it had the key"
    assert f"{said}; the token is used up: make a new one" in capsys.readouterr().err
    assert served.status_of(secret) == "used"


def test_a_mistake_of_ours_is_logged_without_what_was_sent(
    served: Stand, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = served.token()

    def fail(*_: object, **__: object) -> None:
        raise KeyError(secret)

    monkeypatch.setattr(broker, "use_token", fail)
    with pytest.raises((http.client.HTTPException, OSError)):
        served.ask(secret)
    log = capsys.readouterr().err
    assert "an error of the broker itself, KeyError at test_broker.py:" in log
    assert secret not in log


# ---- refusals in number


def test_after_twenty_refusals_an_address_has_to_wait(served: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    served.server.limiter = broker.Limiter(lambda: now)
    secret = served.token()
    for _ in range(20):
        assert served.send("POST", "/").status == 404
    answer = served.ask(secret)
    assert (answer.status, answer.body) == (429, {"error": "too many refusals, wait a minute"})
    assert 0 < int(answer.headers["Retry-After"]) <= 61
    assert served.status_of(secret) == "good"
    now = 60.0
    assert served.ask(secret).status == 200


def test_the_limiter_counts_by_address_and_forgets() -> None:
    now = 0.0
    limiter = broker.Limiter(lambda: now)
    assert limiter.count("2001:db8::1", 1) == 1
    assert limiter.count("2001:db8::2") == 1
    assert limiter.count("fe80::1%eth0", 1) == 1
    assert limiter.count("2001:db8:0:1::1") == 0
    assert limiter.count("10.0.0.1") == 0
    now = 60.0
    assert limiter.count("2001:db8::1") == 0


@pytest.mark.parametrize(
    ("host", "plain"), [("::ffff:10.0.0.5", "10.0.0.5"), ("10.0.0.5", "10.0.0.5"), ("fe80::1%eth0", "fe80::1%eth0")]
)
def test_addresses_are_written_plainly(host: str, plain: str) -> None:
    assert broker.plain_address((host, 1)) == plain


# ---- where it listens


def test_both_families_are_listened_on(stand: Stand) -> None:
    stand.write(listen="[::]:0")
    with stand.serving():
        assert stand.ask(stand.token()).status == 200
        if stand.server.address_family == socket.AF_INET6:
            assert stand.ask(stand.token(), host="::1").status == 200
    assert {each.used_by for each in broker.list_tokens(stand.state)} <= {"127.0.0.1", "::1"}


def test_a_host_without_ipv6_listens_on_ipv4(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    stand.write(listen="[::]:0")
    with stand.serving():
        assert stand.server.address_family == socket.AF_INET
        assert stand.ask(stand.token()).status == 200


def test_a_port_that_is_taken_is_named(served: Stand) -> None:
    served.write(listen=f"127.0.0.1:{served.port}")
    with pytest.raises(broker.BrokerError, match=rf"cannot listen on 127.0.0.1:{served.port}: Address already in use"):
        broker.Server(broker.load_config(served.config))


# ---- real processes


@contextlib.contextmanager
def process(stand: Stand, log: Path, **variables: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run a broker of its own; give its port when it listens."""
    command: list[str | Path] = [
        sys.executable,
        "-I",
        FOLDER / "bakehouse_broker.py",
        "serve",
        "--config",
        stand.config,
    ]
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stderr=errors, text=True, env={**os.environ, **variables}) as running,
    ):
        try:
            soon(lambda: "listening on" in log.read_text() or running.poll() is not None)
            listening = re.search(r"listening on 127\.0\.0\.1:(\d+)", log.read_text())
            assert listening, log.read_text()
            yield running, int(listening[1])
        finally:
            running.kill()


def test_what_was_used_stays_used_through_kill_and_restart(stand: Stand, tmp_path: Path) -> None:
    stand.now = time.time()
    used, good = stand.token(), stand.token()
    with process(stand, tmp_path / "log") as (running, port):
        assert stand.ask(used, port=port).status == 200
        running.send_signal(signal.SIGKILL)
        running.wait()
    with process(stand, tmp_path / "log") as (running, port):
        assert stand.ask(used, port=port).body == {"error": "token refused: it has been used"}
        assert stand.ask(good, port=port).status == 200
        running.send_signal(signal.SIGTERM)
        assert running.wait(5) == 0
    log = (tmp_path / "log").read_text()
    assert "the certificate is for 127.0.0.1, " in log
    assert "stopped" in log
    assert used not in log
    assert good not in log


def test_two_brokers_on_one_state_give_one_key(stand: Stand, tmp_path: Path) -> None:
    stand.now = time.time()
    secrets = [stand.token() for _ in range(4)]
    with (
        process(stand, tmp_path / "1") as (_, first),
        process(stand, tmp_path / "2") as (_, second),
        ThreadPoolExecutor(8) as pool,
    ):
        asked = [pool.submit(stand.ask, each, port=port) for each in secrets for port in (first, second)]
        answers = [each.result() for each in asked]
    assert sorted(each.status for each in answers) == [200] * 4 + [401] * 4


def test_systemd_is_told_and_its_copies_of_files_are_used(stand: Stand, tmp_path: Path) -> None:
    copies = tmp_path / "credentials"
    copies.mkdir()
    stand.key_file.rename(copies / "munge.key")
    (stand.folder / "broker.key").rename(copies / "broker.key")
    stand.now = time.time()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(tmp_path / "n"))
        variables = {"NOTIFY_SOCKET": str(tmp_path / "n"), "CREDENTIALS_DIRECTORY": str(copies), "JOURNAL_STREAM": "1"}
        with process(stand, tmp_path / "log", **variables) as (running, port):
            notified.settimeout(5)
            assert notified.recv(100) == b"READY=1"
            assert stand.ask(stand.token(), port=port).status == 200
            (copies / "broker.key").touch()
            soon(lambda: "<5>certificate and private key were read again" in (tmp_path / "log").read_text())
            with socket.create_connection(("127.0.0.1", port)):  # Says nothing, and does not hold up the end for long.
                running.send_signal(signal.SIGINT)
                assert running.wait(5) == 0


# ---- commands


def run(stand: Stand, *arguments: str) -> int:
    command, *options = arguments
    return int(broker.main([command, "--config", str(stand.config), *options]))


def test_a_token_is_alone_on_standard_output(stand: Stand, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(stand, "token", "--platform", "slurm", "--node", "node-1", "--lifetime", "2h") == 0
    first = capsys.readouterr()
    assert broker.TOKEN.fullmatch(first.out.rstrip("\n"))
    assert re.fullmatch(r"good once, for node-1, until 20\S+Z; it is not shown again\n", first.err)


def test_tokens_are_listed_and_revoked(stand: Stand, capsys: pytest.CaptureFixture[str]) -> None:
    stand.now = time.time()
    secret = stand.token()
    identity = broker.hash_token(secret)[:8]
    assert run(stand, "revoke", "node-1") == 0
    assert capsys.readouterr().out == f"revoked {identity} of node-1\n"
    assert run(stand, "tokens") == 0
    assert re.match(rf"ID +STATUS +PLATFORM .*\n{identity}  revoked  slurm  .*  node-1\n", capsys.readouterr().out)
    assert run(stand, "revoke", "node-1") == 1
    assert "there is no good token of 'node-1'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--platform", "nomad", "--node", "a"], "the platform 'nomad' is not served here"),
        (["--platform", "slurm", "--node", "a.b"], "the node name 'a.b' is not a host name (its first label only: "),
        (["--platform", "slurm", "--node", "a", "--lifetime", "2w"], "the lifetime '2w' is not one"),
    ],
)
def test_a_wrong_command_is_one_sentence(
    stand: Stand, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert run(stand, "token", *options) == 1
    assert said in capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        broker.main(["--help"])
    assert "bakehouse-broker token --platform slurm --node node-1 " in capsys.readouterr().out


def test_check_finds_a_good_set_up_good(stand: Stand, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(stand, "check") == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("good: ") for line in lines)
    assert lines[0].startswith("good: the certificate is for 127.0.0.1, 0:0:0:0:0:0:0:1 and ends 20")
    assert "good: the key of slurm has 128 bytes" in lines
    assert not stand.state.exists()
    stand.now = time.time()
    stand.token()
    assert run(stand, "check") == 0
    assert "holds 1 good tokens\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("days", "options", "said"),
    [
        ((1, 20), {}, "nodes will refuse the certificate .*: certificate is not yet valid"),
        ((-1, 20), {"names": False}, "the certificate .* names no host"),
        ((-1, 20), {"password": b"secret"}, "the certificate .* cannot be used: .*password"),
    ],
)
def test_check_finds_a_certificate_that_nodes_will_not_take(
    stand: Stand, capsys: pytest.CaptureFixture[str], days: tuple[int, int], options: dict[str, Any], said: str
) -> None:
    certify(stand.authority, stand.folder, days, **options)
    assert run(stand, "check") == 1
    assert re.search(f"^error: {said}", capsys.readouterr().out, flags=re.MULTILINE)


def test_check_warns_of_a_near_end_and_open_files(stand: Stand, capsys: pytest.CaptureFixture[str]) -> None:
    certify(stand.authority, stand.folder, (-1, 13))
    stand.key_file.chmod(0o644)
    assert run(stand, "check") == 0
    out = capsys.readouterr().out
    assert re.search(r"^warning: the certificate is for .* and ends 20", out)
    assert re.search(r"warning: \S+munge\.key is open to others: chmod 0400 ", out)


def test_a_certificate_of_another_key_is_refused(stand: Stand, capsys: pytest.CaptureFixture[str]) -> None:
    of_other = (stand.folder / "broker.crt").read_bytes()
    certify(stand.authority, stand.folder)
    (stand.folder / "broker.crt").write_bytes(of_other)
    assert run(stand, "serve") == 1
    assert "cannot be used: KEY_VALUES_MISMATCH" in capsys.readouterr().err


# ---- configuration


BASE = "certificate: /c\nprivate_key: /k\nplatforms: {slurm: {key_file: /m}}\n"


def test_what_is_not_said_has_a_default(tmp_path: Path) -> None:
    (tmp_path / "broker.yaml").write_text(BASE)
    config = broker.load_config(tmp_path / "broker.yaml")
    assert (config.listen, config.state, config.platforms["slurm"].authentication) == (
        "[::]:8444",
        Path("/var/lib/bakehouse-broker/tokens.sqlite"),
        "munge",
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must hold 'key: value' lines"),
        ("a: [", "not valid YAML: while parsing a flow node"),
        (BASE + "listn: x", "unknown key 'listn' (known: listen, certificate, private_key, state, platforms)"),
        ("certificate: /c\nprivate_key: /k", "'platforms' is missing"),
        (BASE + "listen: 8444", "listen: must be an address and a port"),
        (BASE + "listen: '::1:8444'", "listen: must be an address and a port"),
        (BASE + "listen: '[::]:65536'", "listen: must be an address and a port"),
        (BASE + "state: tokens.sqlite", "state: must be a path that begins with /"),
        (BASE.replace("/k", "[]"), "private_key: must be a path that begins with /"),
        (BASE.replace("{slurm: {key_file: /m}}", "{}"), "platforms must hold 'key: value' lines"),
        (BASE.replace("slurm", "nomad"), "unknown key 'platforms.nomad' (known: slurm, kubernetes)"),
        (BASE.replace("key_file", "key"), "unknown key 'platforms.slurm.key' (known: authentication, key_file)"),
        (BASE.replace("{key_file: /m}", "{}"), "'platforms.slurm.key_file' is missing"),
        (BASE.replace("{key_file: /m}", "x"), "platforms.slurm must hold 'key: value' lines"),
        (BASE.replace("/m", "/m, authentication: none"), "platforms.slurm.authentication: must be one of munge, slurm"),
    ],
)
def test_a_wrong_configuration_is_named_by_file_and_field(
    stand: Stand, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    stand.config.write_text(text)
    assert run(stand, "check") == 1
    assert capsys.readouterr().err.startswith(f"bakehouse-broker: {stand.config}")
    with pytest.raises(broker.BrokerError, match=re.escape(said)):
        broker.load_config(stand.config)


def test_a_configuration_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(broker.BrokerError, match=r"none\.yaml cannot be read: No such file .*--config names another"):
        broker.load_config(tmp_path / "none.yaml")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.sampled_from(["/x", "[::]:1", "munge", ":1"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["slurm", "key_file", "authentication", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(change=st.dictionaries(st.sampled_from(["listen", "state", "platforms", "private_key"]), anything))
def test_a_hostile_configuration_is_refused_plainly(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "broker.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(BASE) | change))
    with contextlib.suppress(broker.BrokerError):
        assert broker.load_config(path).platforms["slurm"].key_file.is_absolute()


# ---- what the operator installs


def test_the_example_configuration_holds() -> None:
    config = broker.load_config(FOLDER / "broker.yaml")
    assert (config.listen, str(config.state)) == (broker.LISTEN, broker.STATE)
    unit = (FOLDER / "bakehouse-broker.service").read_text()
    for path in (config.private_key, config.platforms["slurm"].key_file):
        assert f"LoadCredential={path.name}:{path}\n" in unit


def test_every_field_of_the_configuration_is_documented() -> None:
    text = (REPOSITORY / "docs/join-broker.md").read_text()
    names = ["listen", "certificate", "private_key", "state", "platforms.slurm.authentication"]
    for each in [*names, "platforms.slurm.key_file"]:
        assert f"| `{each}` |" in text


def test_the_openssl_commands_of_the_page_make_a_certificate_that_nodes_take(stand: Stand) -> None:
    page = (REPOSITORY / "docs/join-broker.md").read_text()
    commands = [block for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL) if "openssl req" in block]
    assert len(commands) == 2
    (stand.folder / "certificate.cnf").write_bytes((FOLDER / "certificate.cnf").read_bytes())
    script = "set -eu\n" + "\n".join(commands).replace("IP:10.0.0.2", "IP:127.0.0.1")
    subprocess.run(["bash", "-c", script], cwd=stand.folder, check=True, capture_output=True)
    strict = ssl.create_default_context(cadata=(stand.folder / "ca.crt").read_text())
    strict.verify_flags |= ssl.VERIFY_X509_STRICT
    with stand.serving():
        assert stand.ask(stand.token(), context=strict).status == 200
    assert broker.examine(broker.load_config(stand.config))[1] == ("ctl.example.org", "127.0.0.1")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")
def test_a_state_made_by_root_belongs_to_whom_its_folder_belongs(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, 12345)
    broker.create_token(tmp_path / "tokens.sqlite", "slurm", "node-1", 60, NOW)
    assert (tmp_path / "tokens.sqlite").stat().st_uid == 12345


def test_a_node_that_lost_the_answer_asks_again_with_its_claim(tmp_path: Path) -> None:
    state = tmp_path / "tokens.sqlite"
    secret = broker.create_token(state, "slurm", "node-1", 3600, NOW)
    claim, other = "1" * 64, "2" * 64
    broker.use_token(state, secret, "slurm", "node-1", "192.0.2.1", NOW, claim)
    broker.use_token(state, secret, "slurm", "node-1", "192.0.2.9", NOW + 599, claim)
    [known] = broker.list_tokens(state)
    assert (known.used, known.used_by) == (int(NOW), "192.0.2.1")
    assert claim not in state.read_bytes().decode(errors="replace"), "only its hash is kept"
    for node, later, asked in (
        ("node-1", 1, other), ("node-1", 1, ""), ("node-2", 1, claim), ("node-1", 600, claim),
    ):  # fmt: skip
        with pytest.raises(broker.RefusedError):
            broker.use_token(state, secret, "slurm", node, "192.0.2.1", NOW + later, asked)


def test_a_token_that_was_used_without_a_claim_cannot_be_claimed(tmp_path: Path) -> None:
    state = tmp_path / "tokens.sqlite"
    secret = broker.create_token(state, "slurm", "node-1", 3600, NOW)
    broker.use_token(state, secret, "slurm", "node-1", "192.0.2.1", NOW)
    with pytest.raises(broker.RefusedError, match="it has been used"):
        broker.use_token(state, secret, "slurm", "node-1", "192.0.2.1", NOW, "1" * 64)
