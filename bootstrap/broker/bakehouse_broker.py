#!/usr/bin/python3 -I
"""The join broker: stands beside a controller and hands a node its cluster key, once, for a one-time token.

One file, Python's standard library and PyYAML. HTTPS only; the state is one SQLite file. docs/join-broker.md is for
the operator. A token is never written anywhere but to the standard output of ``token``; a key leaves in answers alone.
"""
# ruff: noqa: T201 - the commands print for people

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import hashlib
import http.client
import io
import ipaddress
import json
import os
import re
import secrets
import select
import signal
import socket
import socketserver
import sqlite3
import ssl
import stat
import sys
import threading
import time
import traceback
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn

import yaml

CONFIG = Path("/etc/bakehouse/broker.yaml")
STATE = Path("/var/lib/bakehouse-broker/tokens.sqlite")
LISTEN = "[::]:8444"
SECRET_PATH = "/v1/secret"  # noqa: S105 - an address
AUTHENTICATIONS = {"slurm": ("munge", "slurm")}
"""What each platform that can be served knows as authentication; the first is the default."""

HEAD_BYTES = 8 << 10
BODY_BYTES = 4 << 10
KEY_BYTES = range(32, 1025)
"""munged(8) takes keys of 32 to 1024 bytes."""
DRAINED_BYTES = 64 << 10
DRAINED_SECONDS = 1.0
"""How much of a body that is too long is read and dropped after the answer, and how long the next part may take."""

IDLE_SECONDS = 5.0
CONNECTION_SECONDS = 10.0
"""The longest that one connection may last, whatever it does. An honest one takes a fraction of a second."""
STOP_SECONDS = 2.0
CONNECTIONS = 64
CONNECTIONS_OF_ONE_ADDRESS = 32

REFUSALS = 20
REFUSALS_SECONDS = 60.0
ADDRESSES_REMEMBERED = 4096

LIFETIME = "1h"
LONGEST_LIFETIME = 30 * 86400
KEPT_SECONDS = 7 * 86400
"""How long a token is kept after its end, to be refused as expired or used and not as unknown."""
BUSY_SECONDS = 5.0
WARN_SECONDS = 14 * 86400

TOKEN = re.compile(r"bhj_[A-Za-z0-9_-]{43}")
NODE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
"""One label of a host name (RFC 1123)."""

ERROR, WARNING, NOTICE, INFO = 3, 4, 5, 6
"""Levels of syslog(3)."""


class BrokerError(Exception):
    """Something that the operator can mend: one sentence, and a hint what to do.

    Args:
        message: what is wrong and where.
        hint: what to do about it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class RefusedError(Exception):
    """What a client asks for is refused.

    Args:
        status: the status of the answer.
        sentence: why, for the client and the log.
        headers: further headers of the answer.
    """

    def __init__(self, status: HTTPStatus, sentence: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence
        self.headers = headers or {}


def log(level: int, sentence: str) -> None:
    """Write one line for the journal; with the time where the journal does not add it."""
    in_journal = "JOURNAL_STREAM" in os.environ
    begin = f"<{level}>" if in_journal else time.strftime("%Y-%m-%dT%H:%M:%SZ ", time.gmtime())
    with contextlib.suppress(OSError, ValueError):  # A log that is gone is no reason to keep a key from a node.
        sys.stderr.write(f"{begin}{' '.join(sentence.split())}\n")
        sys.stderr.flush()


# ---- configuration


@dataclass(frozen=True)
class Platform:
    """A platform whose key is handed out."""

    authentication: str
    key_file: Path


@dataclass(frozen=True)
class Config:
    """What broker.yaml says. The paths of key and private key are as written; ``credential`` finds the files."""

    host: str
    port: int
    certificate: Path
    private_key: Path
    state: Path
    platforms: Mapping[str, Platform]

    @property
    def listen(self) -> str:
        """Return address and port as they are written."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def load_config(path: Path) -> Config:
    """Read and check broker.yaml.

    Raises:
        BrokerError: the file cannot be read, or a field is missing, unknown or wrong.
    """
    known = ["listen", "certificate", "private_key", "state", "platforms"]
    data = _mapping(path, "", _read_yaml(path), known, required=["certificate", "private_key", "platforms"])
    host, port = _listen(path, data.get("listen", LISTEN))
    platforms = _mapping(path, "platforms", data["platforms"], list(AUTHENTICATIONS))
    if not platforms:
        raise BrokerError(f"{path}: platforms: names no platform", "such as: platforms: {slurm: {key_file: ...}}")
    return Config(
        host=host,
        port=port,
        certificate=_absolute(path, "certificate", data["certificate"]),
        private_key=_absolute(path, "private_key", data["private_key"]),
        state=_absolute(path, "state", data.get("state", str(STATE))),
        platforms={name: _platform(path, name, value) for name, value in platforms.items()},
    )


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BrokerError(f"{path} cannot be read: {error.strerror}", "--config names another file") from error
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise BrokerError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from error


def _mapping(path: Path, field: str, value: Any, known: list[str], required: list[str] | None = None) -> Any:
    name = f"{field}: " if field else ""
    if not isinstance(value, dict):
        raise BrokerError(f"{path}: {name}must hold 'key: value' lines")
    for key in value:
        if key not in known:
            raise BrokerError(
                f"{path}: unknown key '{f'{field}.' if field else ''}{key}'", f"known: {', '.join(known)}"
            )
    for key in required or []:
        if key not in value:
            raise BrokerError(f"{path}: {name}'{key}' is missing")
    return value


def _absolute(path: Path, field: str, value: Any) -> Path:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise BrokerError(f"{path}: {field}: must be a path that begins with /")
    return Path(value)


def _listen(path: Path, value: Any) -> tuple[str, int]:
    match = (
        re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^:\[\]\s]+)):([0-9]{1,5})", value, re.ASCII)
        if isinstance(value, str)
        else None
    )
    if not match or int(match[3]) > 65535:  # noqa: PLR2004 - the highest port
        raise BrokerError(f"{path}: listen: must be an address and a port", f"such as {LISTEN} or 10.0.0.2:8444")
    return match[1] or match[2], int(match[3])


def _platform(path: Path, name: str, value: Any) -> Platform:
    field = f"platforms.{name}"
    data = _mapping(path, field, value, ["authentication", "key_file"], required=["key_file"])
    known = AUTHENTICATIONS[name]
    authentication = data.get("authentication", known[0])
    if authentication not in known:
        raise BrokerError(f"{path}: {field}.authentication: must be one of {', '.join(known)}")
    return Platform(authentication, _absolute(path, f"{field}.key_file", data["key_file"]))


def credential(path: Path) -> Path:
    """Return where this process may read a file: systemd's copy (LoadCredential=) of that name, else the file."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    copy = Path(folder, path.name) if folder else path
    return copy if copy.is_file() else path


# ---- the key


def read_key(path: Path) -> bytes:
    """Read a cluster key, anew for each node, so that a rotated key counts at once.

    Raises:
        BrokerError: the file is not there, not readable, not a file, or not 32 to 1024 bytes long.
    """
    try:
        # A pipe in the place of the file must not hold up the answer.
        with open(credential(path), "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            key = file.read(KEY_BYTES.stop) if regular else b""
    except OSError as error:
        raise BrokerError(f"the key file {path} cannot be read: {error.strerror}") from error
    if not regular:
        raise BrokerError(f"the key file {path} is not a file")
    if len(key) not in KEY_BYTES:
        size = f"{len(key)} bytes" if len(key) < KEY_BYTES.stop else "too many bytes"
        raise BrokerError(f"the key file {path} holds {size}, not {KEY_BYTES.start} to {KEY_BYTES.stop - 1}")
    return key


# ---- tokens


@dataclass(frozen=True)
class Token:
    """What is kept of a token. Times are in seconds since 1970."""

    identity: str
    """The first 8 hex digits of its hash: what logs and lists call it."""
    platform: str
    node: str
    made: int
    expires: int
    used: int | None
    used_by: str | None
    """The address that it was used from."""
    revoked: int | None

    def status(self, now: float) -> str:
        """Return ``good``, ``used``, ``revoked`` or ``expired``."""
        if self.used is not None:
            return "used"
        if self.revoked is not None:
            return "revoked"
        return "good" if now < self.expires else "expired"


_SCHEMA = """CREATE TABLE IF NOT EXISTS tokens (
    hash TEXT PRIMARY KEY, platform TEXT NOT NULL, node TEXT NOT NULL, made INTEGER NOT NULL, expires INTEGER NOT NULL,
    used INTEGER, used_by TEXT, revoked INTEGER)"""
_COLUMNS = "substr(hash, 1, 8), platform, node, made, expires, used, used_by, revoked"


@contextlib.contextmanager
def opened(state: Path, *, create: bool = False) -> Iterator[sqlite3.Connection]:
    """Hold the state in one transaction: what is done inside happens as a whole and lasts, or not at all.

    SQLite's rollback journal is used, not its write-ahead log: with ``synchronous = EXTRA`` a token that was used stays
    used through a power cut, and the state is one file that can be copied.

    Raises:
        BrokerError: the state is not there, or cannot be read or written.
    """
    if create:
        _make_file(state)
    address = f"file:{urllib.parse.quote(str(state))}?mode=rw"
    try:
        if stat.S_IMODE(state.stat().st_mode) & 0o077:
            state.chmod(0o600)
        connection = sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
        with contextlib.closing(connection):
            connection.execute("PRAGMA synchronous = EXTRA")
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(_SCHEMA)
            yield connection
            connection.execute("COMMIT")
    except sqlite3.Error as error:
        raise BrokerError(f"the state {state} cannot be used: {error}") from error
    except OSError as error:
        raise BrokerError(f"the state {state} cannot be used: {error.strerror}") from error


def _make_file(state: Path) -> None:
    try:
        state.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(state, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
        try:
            if os.geteuid() == 0:  # Made by root at a prompt, it still belongs to whom the folder belongs: the service.
                owner = state.parent.stat()
                os.fchown(handle, owner.st_uid, owner.st_gid)
        finally:
            os.close(handle)
    except FileExistsError:
        return
    except OSError as error:
        raise BrokerError(f"the state {state} cannot be made: {error.strerror}", "run this as root") from error


def hash_token(token: str) -> str:
    """Return what is stored of a token.

    A plain SHA-256 is enough: a token is 256 random bits, not a password, so there is nothing to guess and no need of
    salt. Being found by its hash, a token needs no comparison in constant time: who measures the look-up learns of a
    hash that he could not choose.
    """
    return hashlib.sha256(token.encode()).hexdigest()


def parse_lifetime(text: str) -> int:
    """Return the seconds of ``90s``, ``30m``, ``2h`` or ``1d``.

    Raises:
        BrokerError: it is not a lifetime, or longer than 30 days.
    """
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text.strip())
    seconds = int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]] if match else 0
    if not 0 < seconds <= LONGEST_LIFETIME:
        raise BrokerError(f"the lifetime '{text}' is not one", "such as 30m, 2h or 1d; 30d at most")
    return seconds


def check_node(node: str) -> str:
    """Return a node's name in lower case: host names do not differ by case.

    Raises:
        BrokerError: it is not the first label of a host name.
    """
    if not NODE.fullmatch(node):
        hint = "its first label only" if "." in node else "letters, digits and inner hyphens, 63 at most"
        raise BrokerError(f"the node name '{node}' is not a host name", hint)
    return node.lower()


def create_token(state: Path, platform: str, node: str, lifetime: int, now: float) -> str:
    """Make a token that is good once, for one node, for a while; the state is made where it is not there.

    Args:
        state: the broker's SQLite file.
        platform: such as ``slurm``.
        node: the node's name.
        lifetime: in seconds.
        now: seconds since 1970.

    Raises:
        BrokerError: the platform, node or lifetime is none, or the state cannot be written.
    """
    if platform not in AUTHENTICATIONS:
        raise BrokerError(f"the platform '{platform}' is not known", f"known: {', '.join(AUTHENTICATIONS)}")
    if not 0 < lifetime <= LONGEST_LIFETIME:
        raise BrokerError(f"a lifetime of {lifetime} seconds is not possible", "1 second to 30 days")
    node = check_node(node)
    token = f"bhj_{secrets.token_urlsafe(32)}"
    with opened(state, create=True) as connection:
        _prune(connection, now)
        row = (hash_token(token), platform, node, int(now), int(now) + lifetime)
        connection.execute("INSERT INTO tokens (hash, platform, node, made, expires) VALUES (?, ?, ?, ?, ?)", row)
    return token


def list_tokens(state: Path) -> list[Token]:
    """Return what is known of all tokens, the newest first. A state that is not there has none.

    Raises:
        BrokerError: the state cannot be read.
    """
    if not state.exists():
        return []
    with opened(state) as connection:
        rows = connection.execute(f"SELECT {_COLUMNS} FROM tokens ORDER BY made DESC, rowid DESC")  # noqa: S608 - constants
        return [Token(*row) for row in rows]


def revoke_tokens(state: Path, which: str, now: float) -> list[Token]:
    """Make the good tokens of a node void, or those whose hash begins so (at least 8 hex digits).

    Returns:
        The tokens that were revoked. One that was used is no longer of use to anybody and stays as it is.

    Raises:
        BrokerError: the state cannot be written.
    """
    if not state.exists():
        return []
    digits = which.lower() if re.fullmatch(r"[0-9a-fA-F]{8,64}", which) else "none"
    good = "used IS NULL AND revoked IS NULL AND expires > ?"
    with opened(state) as connection:
        for chosen, value in (("node = ?", which.lower()), ("substr(hash, 1, length(?)) = ?", digits)):
            values = [value] * chosen.count("?")
            rows = connection.execute(f"SELECT {_COLUMNS} FROM tokens WHERE {chosen} AND {good}", [*values, now])  # noqa: S608 - constants
            found = [Token(*row) for row in rows]
            connection.execute(f"UPDATE tokens SET revoked = ? WHERE {chosen} AND {good}", [int(now), *values, now])  # noqa: S608 - constants
            if found:
                return [dataclasses.replace(token, revoked=int(now)) for token in found]
    return []


def use_token(state: Path, token: str, platform: str, node: str, address: str, now: float) -> None:
    """Use a token up.

    One statement finds and marks it, in a transaction that holds the state's write lock: of any number of simultaneous
    requests, in any number of processes, one succeeds.

    Raises:
        RefusedError: the token is not good for this node now.
        BrokerError: the state cannot be written; the token is not used up.
    """
    digest = hash_token(token)
    with opened(state) as connection:
        used = connection.execute(
            "UPDATE tokens SET used = ?, used_by = ? WHERE hash = ? AND platform = ? AND node = ?"
            " AND used IS NULL AND revoked IS NULL AND expires > ?",
            (int(now), address, digest, platform, node.lower(), now),
        )
        if used.rowcount == 1:
            return
        row = connection.execute(f"SELECT {_COLUMNS} FROM tokens WHERE hash = ?", (digest,)).fetchone()  # noqa: S608 - constants
    raise _refusal(Token(*row) if row else None, platform, node, now)


def _refusal(known: Token | None, platform: str, node: str, now: float) -> RefusedError:
    status = known.status(now) if known else "unknown"
    if known and known.node != node.lower():
        reason = f"it is not for {node}"
    elif known and known.platform != platform:
        reason = f"it is not for {platform}"
    else:
        reason = {
            "unknown": "it is unknown",
            "used": "it has been used",
            "revoked": "it has been revoked",
            "expired": "it has expired",
        }[status]
    return RefusedError(HTTPStatus.UNAUTHORIZED, f"token refused: {reason}", headers={"WWW-Authenticate": "Bearer"})


def prune(state: Path, now: float) -> None:
    """Forget tokens whose end is a week ago; make the state where it is not there.

    Raises:
        BrokerError: the state cannot be written.
    """
    with opened(state, create=True) as connection:
        _prune(connection, now)


def _prune(connection: sqlite3.Connection, now: float) -> None:
    connection.execute("DELETE FROM tokens WHERE expires < ?", (now - KEPT_SECONDS,))


# ---- addresses


def plain_address(host: str) -> str:
    """Return a client's address as people write it: IPv4 as such where it came in through an IPv6 socket."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def neighbourhood(address: str) -> str:
    """Return whom refusals are counted for: an IPv4 address, or the /64 of an IPv6 one, which one host may fill."""
    if ":" not in address:
        return address
    return str(ipaddress.ip_network(f"{address.partition('%')[0]}/64", strict=False))


class Limiter:
    """Counts refusals by address, and says who has had enough of them.

    Args:
        clock: returns seconds that only go forward.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._counts: dict[str, tuple[float, int]] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def wait(self, address: str) -> float:
        """Return the seconds until an address may ask again; 0 where it may now."""
        with self._lock:
            began, count = self._counts.get(neighbourhood(address), (0.0, 0))
            return max(0.0, began + REFUSALS_SECONDS - self._clock()) if count >= REFUSALS else 0.0

    def note(self, address: str) -> None:
        """Count a refusal. Of too many addresses, the one seen first is forgotten."""
        who = neighbourhood(address)
        with self._lock:
            now = self._clock()
            began, count = self._counts.get(who, (now, 0))
            self._counts[who] = (began, count + 1) if now < began + REFUSALS_SECONDS else (now, 1)
            if len(self._counts) > ADDRESSES_REMEMBERED:
                del self._counts[next(iter(self._counts))]


# ---- TLS


def tls_context(config: Config) -> ssl.SSLContext:
    """Load the certificate and its private key.

    Raises:
        BrokerError: one cannot be read, or they do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.num_tickets = 0  # A node comes once: nothing to resume.
    files = f"the certificate {config.certificate} with the private key {config.private_key}"
    try:
        context.load_cert_chain(credential(config.certificate), credential(config.private_key), _refuse_password)
    except ssl.SSLError as error:
        raise BrokerError(f"{files} cannot be used: {error.reason or error}") from error
    except OSError as error:
        raise BrokerError(f"{files} cannot be read: {error.strerror}") from error
    return context


def _refuse_password() -> NoReturn:
    raise BrokerError("the private key is locked with a password", "openssl pkey -in FILE -out NEW takes it off")


@dataclass(frozen=True)
class Certificate:
    """What a client sees of the certificate.

    Args:
        ends: seconds since 1970.
        names: the names and addresses that it is for.
    """

    ends: float
    names: tuple[str, ...]


def examine(config: Config) -> Certificate:
    """Shake hands with ourselves in memory, as a node would, and return what the certificate says.

    Raises:
        BrokerError: the certificate cannot be loaded, or no node would take it today.
    """
    server_context = tls_context(config)
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname = False
    client_context.verify_flags |= (
        ssl.VERIFY_X509_PARTIAL_CHAIN
    )  # The certificate itself is enough, its CA is elsewhere.
    client_context.load_verify_locations(credential(config.certificate))
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(back, there)
    server = server_context.wrap_bio(there, back, server_side=True)
    try:
        for _ in range(4):
            for side in (client, server):
                with contextlib.suppress(ssl.SSLWantReadError):
                    side.do_handshake()
    except ssl.SSLCertVerificationError as error:
        raise BrokerError(f"nodes will refuse the certificate {config.certificate}: {error.verify_message}") from error
    except ssl.SSLError as error:
        raise BrokerError(f"the certificate {config.certificate} cannot be used: {error.reason}") from error
    seen: Any = client.getpeercert() or {}
    names = tuple(str(value) for _, value in seen.get("subjectAltName", ()))
    if not names:
        raise BrokerError(f"the certificate {config.certificate} names no host (subjectAltName)", "make a new one")
    return Certificate(ssl.cert_time_to_seconds(seen["notAfter"]), names)


_REASONS = {
    "TLSV1_ALERT_UNKNOWN_CA": "it does not trust our certificate: it has another CA, or we have another certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it does not take our certificate: is the address that it calls named in it?",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it takes our certificate for expired: so it is, or its clock is wrong",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "it does not take our certificate",
    "HTTP_REQUEST": "it spoke HTTP, not HTTPS",
    "UNSUPPORTED_PROTOCOL": "it knows only old versions of TLS",
    "WRONG_VERSION_NUMBER": "it does not speak TLS",
    "UNEXPECTED_EOF_WHILE_READING": "it hung up",
}
"""What OpenSSL's reasons mean to an operator."""


def _reason(error: OSError) -> str:
    """Return in words why a connection ended."""
    reason = getattr(error, "reason", None) or ""
    if isinstance(error, ssl.SSLEOFError):
        reason = "UNEXPECTED_EOF_WHILE_READING"
    return _REASONS.get(reason, reason) or error.strerror or str(error) or type(error).__name__


# ---- the server


class Server(ThreadingHTTPServer):
    """Takes connections, each in a thread of its own, never more than a fixed number, none for longer than 10 seconds.

    Args:
        config: the configuration.
        clock: returns seconds since 1970.

    Raises:
        BrokerError: the certificate or the state cannot be used, or the address cannot be listened on.
    """

    request_queue_size = 128
    daemon_threads = False  # A key that is on its way is sent before the end.

    def __init__(self, config: Config, clock: Callable[[], float] = time.time) -> None:
        self.config = config
        self.clock = clock
        self.limiter = Limiter()
        self._slots = threading.BoundedSemaphore(CONNECTIONS)
        self._held: dict[socket.socket, tuple[str, float]] = {}
        self._lock = threading.Lock()
        self._files = self._files_now()
        self._context = tls_context(config)
        prune(config.state, clock())
        host, self.address_family = _family(config.host)
        try:
            super().__init__((host, config.port), Handler)
        except OSError as error:
            raise BrokerError(f"cannot listen on {config.listen}: {error.strerror}") from error

    @property
    def port(self) -> int:
        """Return the port that is listened on."""
        return int(self.server_address[1])

    def server_bind(self) -> None:
        """Bind, for both families where that is asked for."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)  # HTTPServer would ask the name service who we are, and wait for it.
        self.server_name, self.server_port = "bakehouse-broker", self.port

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection."""
        raw, address = self.socket.accept()
        try:
            # The handshake waits for the client, so it is for the client's thread.
            return self._context.wrap_socket(raw, server_side=True, do_handshake_on_connect=False), address
        except BaseException:
            raw.close()
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread. Where all are busy, wait: the kernel's queue holds those who come meanwhile."""
        while not self._slots.acquire(timeout=0.1):
            self._cut_off(time.monotonic())
        who = plain_address(client_address[0])
        with self._lock:
            crowd = sum(who == other for other, _ in self._held.values())
            self._held[request] = (who, time.monotonic() + CONNECTION_SECONDS)
        if crowd >= CONNECTIONS_OF_ONE_ADDRESS:
            log(WARNING, f"{who} holds {crowd} connections: one more is closed")
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Shake hands and answer; runs in the connection's own thread."""
        request.settimeout(IDLE_SECONDS)
        try:
            request.do_handshake()
        except OSError as error:
            log(NOTICE, f"no TLS with {plain_address(client_address[0])}: {_reason(error)}")
            return
        super().finish_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """End a connection and give its place to the next."""
        with self._lock:
            if self._held.pop(request, None):
                self._slots.release()
        with contextlib.suppress(OSError, ValueError):
            request.settimeout(0)  # Says good-bye as TLS has it, but does not wait for the other side's.
            request.unwrap()
        super().shutdown_request(request)

    def _cut_off(self, now: float) -> None:
        """End the connections whose time is up; their threads then read an end of file."""
        with self._lock:  # A socket in the table is open: it is taken out before it is closed.
            for request in [request for request, (_, until) in self._held.items() if until <= now]:
                with contextlib.suppress(OSError):
                    # Not SSLSocket's own: that one would let the thread go on without TLS.
                    socket.socket.shutdown(request, socket.SHUT_RDWR)

    def service_actions(self) -> None:
        """Do what is due between connections: end those that last too long, read a new certificate."""
        self._cut_off(time.monotonic())
        files = self._files_now()
        if files == self._files:
            return
        self._files = files
        try:
            self._context = tls_context(self.config)
        except BrokerError as error:
            log(ERROR, f"the former certificate stays in use: {error}")
        else:
            log(NOTICE, "certificate and private key were read again")
            _log_certificate(self.config)

    def reload(self) -> None:
        """Have certificate and private key read again at the next turn of the loop, changed or not."""
        self._files = ()

    def _files_now(self) -> tuple[object, ...]:
        found: list[object] = []
        for path in (credential(self.config.certificate), credential(self.config.private_key)):
            with contextlib.suppress(OSError):
                status = path.stat()
                found += [str(path), status.st_ino, status.st_mtime_ns, status.st_size]
        return tuple(found)

    def server_close(self) -> None:
        """Let those who are being answered have their answer, then end the others."""
        until = time.monotonic() + STOP_SECONDS
        self.socket.close()
        while self._held and time.monotonic() < until:
            time.sleep(0.02)
        self._cut_off(float("inf"))
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Log in one line what went wrong with a connection."""
        who = plain_address(client_address[0])
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            log(NOTICE, f"the connection with {who} broke off: {_reason(error)}")
            return
        # The kind and place alone: an error's own words might quote what a client sent.
        place = traceback.extract_tb(error.__traceback__)[-1] if error else None
        at = f" at {Path(place.filename).name}:{place.lineno}" if place else ""
        log(ERROR, f"an error of the broker itself, {type(error).__name__}{at}, while {who} was served")


def _family(host: str) -> tuple[str, socket.AddressFamily]:
    """Return the address to listen on and its family; IPv4 where all addresses are wanted and IPv6 is off."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise BrokerError(f"cannot listen on {host}: {error.strerror}") from error
    if host == "::" and not _ipv6_works():
        log(NOTICE, "this host has no IPv6: listening on IPv4 alone")
        return "0.0.0.0", socket.AF_INET  # noqa: S104 - what the configuration asks for
    return str(found[4][0]), found[0]


def _ipv6_works() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::", 0))
    except OSError:
        return False
    return True


class _Head(io.BufferedReader):
    """A request as it comes in; its lines together may not be longer than ``HEAD_BYTES``."""

    left = HEAD_BYTES

    def readline(self, _size: int | None = -1, /) -> bytes:
        line = super().readline(self.left + 1)
        self.left -= len(line)
        if self.left < 0:
            raise http.client.LineTooLong("head")
        return line


class Handler(BaseHTTPRequestHandler):
    """One request on one connection."""

    server: Server
    timeout = IDLE_SECONDS
    requestline = command = path = ""
    default_request_version = request_version = "HTTP/1.0"
    """Not 0.9, whose answers have no status."""

    def setup(self) -> None:
        """Bound what is read."""
        super().setup()
        self.rfile = _Head(self.rfile.detach())
        self.who = plain_address(self.client_address[0])

    def handle(self) -> None:
        """Answer one request."""
        try:
            super().handle()
        except http.client.LineTooLong:  # The request line. A header's is caught where headers are read.
            self.send_error(HTTPStatus.REQUEST_URI_TOO_LONG)

    def do_POST(self) -> None:
        """Answer ``POST /v1/secret``."""
        about = ""
        try:
            if wait := self.server.limiter.wait(self.who):
                sentence = "too many refusals, wait a minute"
                raise RefusedError(HTTPStatus.TOO_MANY_REQUESTS, sentence, {"Retry-After": str(int(wait) + 1)})
            if self.path != SECRET_PATH:
                raise RefusedError(HTTPStatus.NOT_FOUND, "there is nothing at this address")
            platform, node = self._wanted()
            about = f"{platform} {node} "
            token = self._token()
            about += f"token {hash_token(token)[:8]} "
            answer = self._take(token, platform, node)
        except RefusedError as refusal:
            self._refuse(refusal, about)
            if refusal.status is HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
                self._drain()
        except BrokerError as error:
            log(ERROR, f"cannot answer {about}at {self.who}, no token was used up: {error}")
            self._send(
                HTTPStatus.SERVICE_UNAVAILABLE, {"error": "the broker cannot hand out the key now; its log says why"}
            )
        else:
            self._hand_over(answer, about)

    def _wanted(self) -> tuple[str, str]:
        """Read the body: which platform's key, for which node."""
        lengths = self.headers.get_all("Content-Length", [])
        if len(lengths) != 1 or not re.fullmatch(r"[0-9]{1,18}", lengths[0]) or "Transfer-Encoding" in self.headers:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "the request must have one Content-Length and a plain body")
        length = int(lengths[0])
        if length > BODY_BYTES:
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the body is over 4 KiB")
        try:
            body = json.loads(self.rfile.read(length).decode("utf-8"))
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict) or set(body) != {"platform", "node"}:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "the body must be JSON with platform and node, nothing else")
        platform, node = body["platform"], body["node"]
        if not isinstance(platform, str) or platform not in self.server.config.platforms:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "this platform is not served here")
        if not isinstance(node, str) or not NODE.fullmatch(node):
            raise RefusedError(HTTPStatus.BAD_REQUEST, "the node must be the first label of a host name")
        return platform, node

    def _drain(self) -> None:
        """Drop what still comes: closing a connection with bytes unread would reset it, and the answer be lost."""
        left = DRAINED_BYTES
        self.connection.settimeout(DRAINED_SECONDS)
        with contextlib.suppress(OSError):
            while left > 0 and (data := self.rfile.read1(left)):
                left -= len(data)

    def _token(self) -> str:
        given = self.headers.get_all("Authorization", [])
        kind, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        challenge = {"WWW-Authenticate": "Bearer"}
        if kind.lower() != "bearer":
            raise RefusedError(HTTPStatus.UNAUTHORIZED, "token refused: none was sent", challenge)
        if not TOKEN.fullmatch(token.strip()):
            raise RefusedError(HTTPStatus.UNAUTHORIZED, "token refused: it is unknown", challenge)
        return token.strip()

    def _take(self, token: str, platform: str, node: str) -> dict[str, str]:
        """Use the token up, after all that can go wrong before."""
        served = self.server.config.platforms[platform]
        key = read_key(served.key_file)
        if self._is_gone():
            raise ConnectionAbortedError(f"{node} went away; its token was not used up")
        use_token(self.server.config.state, token, platform, node, self.who, self.server.clock())
        return {
            "platform": platform,
            "node": node,
            "authentication": served.authentication,
            "key": base64.b64encode(key).decode(),
        }

    def _is_gone(self) -> bool:
        """Tell whether the client has hung up: one that was kept waiting too long should not lose its token."""
        poller = select.poll()
        poller.register(self.connection, select.POLLRDHUP)
        return bool(poller.poll(0))

    def _hand_over(self, answer: dict[str, str], about: str) -> None:
        try:
            self._send(HTTPStatus.OK, answer)
        except OSError:
            log(ERROR, f"{about}at {self.who} went away before it had the key; the token is used up: make a new one")
        else:
            log(INFO, f"key handed out: {about}at {self.who}")

    def _refuse(self, refusal: RefusedError, about: str) -> None:
        if refusal.status != HTTPStatus.TOO_MANY_REQUESTS:
            self.server.limiter.note(self.who)
        who = f"{about}at {self.who}" if about else self.who
        log(WARNING, f"refused: {who}: {refusal.status.value} {refusal.sentence}")
        self._send(refusal.status, {"error": refusal.sentence}, refusal.headers)

    def _send(self, status: HTTPStatus, body: dict[str, str], headers: Mapping[str, str] | None = None) -> None:
        data = json.dumps(body).encode() + b"\n"
        self.send_response(status)
        own = {"Content-Type": "application/json", "Content-Length": str(len(data)), "Cache-Control": "no-store"}
        for name, value in {**own, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """Refuse what the base class cannot take, without its page of HTML and without quoting the client."""
        status = HTTPStatus(code)
        headers: dict[str, str] = {}
        if status is HTTPStatus.NOT_IMPLEMENTED:  # There is no method for the request's.
            here = self.path == SECRET_PATH
            status, headers = (HTTPStatus.METHOD_NOT_ALLOWED, {"Allow": "POST"}) if here else (HTTPStatus.NOT_FOUND, {})
        sentences = {
            HTTPStatus.METHOD_NOT_ALLOWED: "only POST is possible here",
            HTTPStatus.NOT_FOUND: "there is nothing at this address",
            HTTPStatus.REQUEST_URI_TOO_LONG: "the address is too long",
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: "the headers are too long",
        }
        self._refuse(RefusedError(status, sentences.get(status, "the request is not valid HTTP"), headers), "")

    def version_string(self) -> str:
        """Return what ``Server`` says: no versions."""
        return "bakehouse-broker"

    def log_message(self, *_arguments: Any) -> None:
        """Say nothing: the base class would log the client's own words, and those may hold a token."""


# ---- commands


def serve(config: Config) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP reads the certificate again.

    Raises:
        BrokerError: what the server needs is not there.
    """
    with Server(config) as server:

        def stop(*_: object) -> None:
            threading.Thread(
                target=server.shutdown
            ).start()  # shutdown() waits for the loop, which is what we interrupt.

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGHUP, lambda *_: server.reload())
        for name, platform in config.platforms.items():
            try:
                read_key(platform.key_file)
            except BrokerError as error:
                log(ERROR, f"{name} cannot be served until this is mended: {error}")
        _log_certificate(config)
        host = config.host if server.address_family == socket.AF_INET6 else str(server.server_address[0])
        log(NOTICE, f"listening on {dataclasses.replace(config, host=host, port=server.port).listen}")
        _tell_systemd("READY=1")
        server.serve_forever()
        _tell_systemd("STOPPING=1")
    log(NOTICE, "stopped")


def _log_certificate(config: Config) -> None:
    try:
        certificate = examine(config)
    except BrokerError as error:
        log(ERROR, str(error))
        return
    left = certificate.ends - time.time()
    sentence = f"the certificate is for {', '.join(certificate.names)} and ends in {left / 86400:.0f} days"
    log(WARNING if left < WARN_SECONDS else INFO, sentence)


def _tell_systemd(what: str) -> None:
    """Speak sd_notify(3)'s protocol, where systemd listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.connect(f"\0{address[1:]}" if address.startswith("@") else address)
        channel.sendall(what.encode())


def _make(config: Config, platform: str, node: str, lifetime: str) -> None:
    if platform not in config.platforms:
        raise BrokerError(f"the platform '{platform}' is not served here", f"served: {', '.join(config.platforms)}")
    now = time.time()
    seconds = parse_lifetime(lifetime)
    token = create_token(config.state, platform, node, seconds, now)
    print(token)
    print(f"good once, for {node}, until {_moment(now + seconds)}; it is not shown again", file=sys.stderr)
    others = [
        known for known in list_tokens(config.state) if known.node == node.lower() and known.status(now) == "good"
    ]
    if len(others) > 1:
        print(f"note: {node} has {len(others)} good tokens now; 'revoke {node}' makes all void", file=sys.stderr)


def _moment(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds)) if seconds is not None else ""


def _show(config: Config, as_json: bool) -> None:
    now = time.time()
    rows = [
        {
            "id": token.identity,
            "status": token.status(now),
            "platform": token.platform,
            "node": token.node,
            "made": _moment(token.made),
            "expires": _moment(token.expires),
            "used": _moment(token.used),
            "used_by": token.used_by or "",
        }
        for token in list_tokens(config.state)
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    if not rows:
        print("no tokens", file=sys.stderr)
        return
    table = [[name.upper().replace("_", " ") for name in rows[0]], *([*row.values()] for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _revoke(config: Config, which: str) -> None:
    revoked = revoke_tokens(config.state, which, time.time())
    if not revoked:
        raise BrokerError(f"there is no good token of '{which}'", "'tokens' lists them")
    for token in revoked:
        print(f"revoked {token.identity} of {token.node}")


def check(config: Config) -> bool:
    """Print what is right and wrong with a set-up; return whether a node can be served."""
    good = True
    for what in (_check_certificate, _check_keys, _check_state):
        try:
            for sentence in what(config):
                print(sentence)
        except BrokerError as error:
            good = False
            print(f"error: {error}")
    return good


def _check_certificate(config: Config) -> Iterator[str]:
    certificate = examine(config)
    left = certificate.ends - time.time()
    yield f"{'warning' if left < WARN_SECONDS else 'good'}: the certificate ends {_moment(certificate.ends)}"
    yield f"good: nodes may call {', '.join(certificate.names)}"
    yield from _check_private(config.private_key)


def _check_keys(config: Config) -> Iterator[str]:
    for name, platform in config.platforms.items():
        size = len(read_key(platform.key_file))
        yield f"good: the key of {name} ({platform.authentication}) has {size} bytes"
        yield from _check_private(platform.key_file)


def _check_private(path: Path) -> Iterator[str]:
    mode = stat.S_IMODE(credential(path).stat().st_mode)
    if mode & 0o077:
        yield f"warning: {path} is open to others (mode {mode:04o}); chmod 0400 {path}"


def _check_state(config: Config) -> Iterator[str]:
    if not config.state.exists():
        yield f"good: the state {config.state} will be made with the first token"
        return
    now = time.time()
    count = sum(token.status(now) == "good" for token in list_tokens(config.state))
    yield f"good: the state {config.state} holds {count} good token{'' if count == 1 else 's'}"


_EXAMPLES = """\
examples:
  bakehouse-broker check
  bakehouse-broker serve --config /etc/bakehouse/broker.yaml
  bakehouse-broker token --platform slurm --node node-1
  bakehouse-broker token --platform slurm --node node-1 --lifetime 1d >node-1.token
  bakehouse-broker tokens --json
  bakehouse-broker revoke node-1

files:
  /etc/bakehouse/broker.yaml                 the configuration
  /var/lib/bakehouse-broker/tokens.sqlite    the state: hashes of tokens, no secrets

signals:
  TERM, INT   stop, after the answers that are under way
  HUP         read certificate and private key again; a change of the files is also noticed by itself

exit status:
  0  all is well
  1  something is wrong, and a sentence says what
  2  the command line is wrong
"""


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", type=Path, default=CONFIG, metavar="FILE", help=f"default: {CONFIG}")
    parser = argparse.ArgumentParser(
        prog="bakehouse-broker",
        description="Hands a node its cluster key over HTTPS, once, for a one-time token.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("serve", parents=[common], help="serve nodes until stopped")
    token = commands.add_parser("token", parents=[common], help="make a token; it is printed once, alone on stdout")
    token.add_argument("--platform", required=True, metavar="NAME", help="such as slurm")
    token.add_argument("--node", required=True, metavar="NAME", help="the node's host name, first label")
    token.add_argument("--lifetime", default=LIFETIME, help=f"such as 30m, 2h, 1d; default: {LIFETIME}")
    tokens = commands.add_parser("tokens", parents=[common], help="list the tokens of the last days")
    tokens.add_argument("--json", action="store_true", help="print JSON")
    revoke = commands.add_parser("revoke", parents=[common], help="make good tokens void")
    revoke.add_argument("which", metavar="NODE", help="a node's name, or a token's id from the list")
    commands.add_parser("check", parents=[common], help="look for what is wrong with the set-up")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        config = load_config(options.config)
        if options.command == "serve":
            serve(config)
        elif options.command == "token":
            _make(config, options.platform, options.node, options.lifetime)
        elif options.command == "tokens":
            _show(config, options.json)
        elif options.command == "revoke":
            _revoke(config, options.which)
        else:
            return 0 if check(config) else 1
    except BrokerError as error:
        print(f"bakehouse-broker: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
