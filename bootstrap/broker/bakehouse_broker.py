#!/usr/bin/python3 -I
"""The join broker: stands beside a controller and hands a node its cluster key, once, for a one-time token.

One file, Python's standard library and PyYAML. HTTPS only; the state is one SQLite file. docs/join-broker.md is for
the operator. A token is never written anywhere but to the standard output of ``token``; a key leaves in answers alone.
Every function may raise BrokerError where something is wrong that the operator can mend.
"""
# ruff: noqa: T201 - the commands print for people

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import hashlib
import io
import ipaddress
import json
import os
import re
import secrets
import select
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import stat
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import yaml

CONFIG = "/etc/bakehouse/broker.yaml"
LISTEN = "[::]:8444"
STATE = "/var/lib/bakehouse-broker/tokens.sqlite"
AUTHENTICATIONS = {"slurm": ("munge", "slurm")}
"""What platforms with a key know as authentication; the first is the default."""
TOKEN_COMMAND = ["kubeadm", "token", "create", "--ttl=15m", "--kubeconfig=/etc/kubernetes/admin.conf"]
"""What prints a fresh bootstrap token of a Kubernetes cluster."""
TOKEN_SECONDS = 30
BOOTSTRAP_TOKEN = re.compile(r"[a-z0-9]{6}\.[a-z0-9]{16}")
PLATFORMS = (*AUTHENTICATIONS, "kubernetes")

HEAD_BYTES = 8 << 10
BODY_BYTES = 4 << 10
KEY_BYTES = range(32, 1025)
"""munged(8) takes keys of 32 to 1024 bytes."""
CONNECTIONS = 64
CONNECTIONS_OF_ONE_ADDRESS = 32
CONNECTION_SECONDS = 10.0
"""The longest that a connection may last, whatever it does. An honest one takes a fraction of a second."""
STOP_SECONDS = 2.0
BUSY_SECONDS = 5.0
REFUSALS_A_MINUTE = 20

LONGEST_LIFETIME = 30 * 86400
KEPT_SECONDS = 7 * 86400
"""How long a token is kept after its end, to be refused as expired or used and not as unknown."""
WARN_SECONDS = 14 * 86400
"""How long before the certificate's end the log begins to warn."""

TOKEN = re.compile(r"bhj_[A-Za-z0-9_-]{43}")
CLAIM = re.compile(r"(?:[0-9a-f]{64})?")
AGAIN_SECONDS = 600
"""How long a node that was killed before it had the answer may ask again."""
NODE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
"""One label of a host name (RFC 1123)."""

ERROR, WARNING, NOTICE, INFO = 3, 4, 5, 6
"""Levels of syslog(3)."""


class BrokerError(Exception):
    """Something that the operator can mend: one sentence, and a hint what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message} ({hint})" if hint else message)
        self.message = message
        self.hint = hint


class RefusedError(Exception):
    """What a client asks for is refused; the sentence is for the client and the log."""

    def __init__(self, status: HTTPStatus, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence


def log(level: int, sentence: str) -> None:
    """Write one line for the journal; with the time where the journal does not add it."""
    begin = f"<{level}>" if "JOURNAL_STREAM" in os.environ else f"{moment(time.time())} "
    with contextlib.suppress(OSError, ValueError):  # A log that is gone is no reason to keep a key from a node.
        sys.stderr.write(f"{begin}{' '.join(sentence.split())}\n")  # One write: threads must not mix their lines.
        sys.stderr.flush()


def moment(seconds: float | None) -> str:
    """Return seconds since 1970 as date and time in UTC; nothing for None."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds)) if seconds is not None else ""


# ---- configuration


@dataclass(frozen=True)
class KeyPlatform:
    """A platform whose key is handed out."""

    authentication: str
    key_file: Path

    def secret(self) -> dict[str, str]:
        """Return what a node is told."""
        key = base64.b64encode(read_key(self.key_file)).decode()
        return {"authentication": self.authentication, "key": key}

    def finding(self, name: str) -> str:
        """Say what there is to hand out."""
        return f"the key of {name} has {len(read_key(self.key_file))} bytes"


@dataclass(frozen=True)
class TokenPlatform:
    """A platform of which each node gets a fresh bootstrap token."""

    command: tuple[str, ...]

    def secret(self) -> dict[str, str]:
        """Return what a node is told."""
        try:
            done = subprocess.run(
                self.command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=TOKEN_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BrokerError(f"{self.command[0]} cannot be run: {error}", "see token_command") from error
        token = done.stdout.strip()
        if done.returncode != 0 or not BOOTSTRAP_TOKEN.fullmatch(token):
            reason = " ".join(done.stderr.split())[-300:] or "it printed no bootstrap token"
            raise BrokerError(f"{self.command[0]} made no token: {reason}", "see token_command")
        return {"token": token}

    def finding(self, name: str) -> str:
        """Say what there is to hand out."""
        if not shutil.which(self.command[0]):
            raise BrokerError(f"there is no program {self.command[0]}", "see token_command")
        return f"the tokens of {name} come from {self.command[0]}"


Platform = KeyPlatform | TokenPlatform


@dataclass(frozen=True)
class Config:
    """What broker.yaml says."""

    listen: str
    certificate: Path
    private_key: Path
    state: Path
    platforms: dict[str, Platform]


def load_config(path: Path) -> Config:
    """Read broker.yaml; a field that is missing, unknown or wrong is named."""
    try:
        with path.open(encoding="utf-8") as file:
            return _config(yaml.safe_load(file))
    except OSError as error:
        raise BrokerError(f"{path} cannot be read: {error.strerror}", "--config names another file") from error
    except yaml.YAMLError as error:
        raise BrokerError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise BrokerError(f"{path}: {error}") from error


def _config(data: Any) -> Config:
    known = {"listen": LISTEN, "certificate": None, "private_key": None, "state": STATE, "platforms": None}
    fields = _fields("", data, known)
    address = re.fullmatch(r"(?:\[[\w:.%]+\]|[^:\[\]\s]+):([0-9]{1,5})", str(fields["listen"]), re.ASCII)
    if not address or int(address[1]) > 65535:  # noqa: PLR2004 - the highest port
        raise ValueError(f"listen: must be an address and a port, such as {LISTEN} or 10.0.0.2:8444")
    platforms = _fields("platforms.", fields["platforms"], dict.fromkeys(PLATFORMS), some=True)
    return Config(
        listen=address[0],
        certificate=_path("certificate", fields["certificate"]),
        private_key=_path("private_key", fields["private_key"]),
        state=_path("state", fields["state"]),
        platforms={name: _platform(f"platforms.{name}.", value, name) for name, value in platforms.items()},
    )


def _platform(where: str, value: Any, name: str) -> Platform:
    if name not in AUTHENTICATIONS:
        command = _fields(where, value or {}, {"token_command": TOKEN_COMMAND})["token_command"]
        if not isinstance(command, list) or not command or not all(isinstance(word, str) for word in command):
            raise ValueError(f"{where}token_command: must be a list of words, such as {TOKEN_COMMAND}")
        return TokenPlatform(tuple(command))
    known = AUTHENTICATIONS[name]
    fields = _fields(where, value, {"authentication": known[0], "key_file": None})
    if fields["authentication"] not in known:
        raise ValueError(f"{where}authentication: must be one of {', '.join(known)}")
    return KeyPlatform(fields["authentication"], _path(f"{where}key_file", fields["key_file"]))


def _fields(where: str, value: Any, defaults: dict[str, Any], *, some: bool = False) -> dict[str, Any]:
    """Check the keys of a mapping, and fill in the defaults; a field without one must be there, or ``some`` of them."""
    if not isinstance(value, dict) or (some and not value):
        raise ValueError(f"{where.rstrip('.') or 'it'} must hold 'key: value' lines")
    if unknown := [key for key in value if key not in defaults]:
        raise ValueError(f"unknown key '{where}{unknown[0]}' (known: {', '.join(defaults)})")
    if some:
        return value
    filled = defaults | value
    if missing := [key for key in defaults if filled[key] is None]:
        raise ValueError(f"'{where}{missing[0]}' is missing")
    return filled


def _path(field: str, value: Any) -> Path:
    """Check a path; give systemd's copy (LoadCredential=) of a file of that name where this process has one."""
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ValueError(f"{field}: must be a path that begins with /")
    copy = Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nonexistent"), Path(value).name)
    return copy if copy.is_file() else Path(value)


def read_key(path: Path) -> bytes:
    """Read a cluster key, anew for each node, so that a rotated key counts at once."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # To open a pipe would hold up the answer.
            raise BrokerError(f"the key file {path} is not a file")
        with path.open("rb") as file:
            key = file.read(KEY_BYTES.stop)
    except OSError as error:
        raise BrokerError(f"the key file {path} cannot be read: {error.strerror}") from error
    if len(key) not in KEY_BYTES:
        raise BrokerError(f"the key file {path} does not hold {KEY_BYTES.start} to {KEY_BYTES.stop - 1} bytes")
    return key


# ---- tokens


@dataclass(frozen=True)
class Token:
    """What is kept of a token, as the state has it. Times are in seconds since 1970."""

    hash: str
    platform: str
    node: str
    made: int
    expires: int
    used: int | None
    used_by: str | None
    """The address that it was used from."""
    revoked: int | None
    claim: str | None = None
    """The hash of what the node that used it can ask again with."""

    @property
    def identity(self) -> str:
        """What logs and lists call it."""
        return self.hash[:8]

    def status(self, now: float) -> str:
        """Return ``good``, ``used``, ``revoked`` or ``expired``."""
        if self.used is not None:
            return "used"
        if self.revoked is not None:
            return "revoked"
        return "good" if now < self.expires else "expired"


_SCHEMA = """CREATE TABLE IF NOT EXISTS tokens (
    hash TEXT PRIMARY KEY, platform TEXT NOT NULL, node TEXT NOT NULL, made INTEGER NOT NULL, expires INTEGER NOT NULL,
    used INTEGER, used_by TEXT, revoked INTEGER, claim TEXT)"""


@contextlib.contextmanager
def opened(state: Path) -> Iterator[sqlite3.Connection]:
    """Hold the state in one transaction: what is done inside happens as a whole and lasts, or not at all.

    It holds the write lock from its begin: no other thread or process sees or changes a token meanwhile. SQLite's
    rollback journal is used, not its write-ahead log: with ``synchronous = EXTRA`` a token that was used stays used
    through a power cut, and the state is one file.
    """
    try:
        _make_private(state)
        with contextlib.closing(sqlite3.connect(state, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous = EXTRA")
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(_SCHEMA)
            yield connection
            connection.execute("COMMIT")
    except (sqlite3.Error, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BrokerError(f"the state {state} cannot be used: {reason}") from error


def _make_private(state: Path) -> None:
    with contextlib.suppress(FileExistsError):
        state.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Only a new file is opened here: to close one that is in use would drop SQLite's locks on it.
        handle = os.open(state, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        if os.geteuid() == 0:  # Made by root at a prompt, it still belongs to whom the folder belongs: the service.
            folder = state.parent.stat()
            os.fchown(handle, folder.st_uid, folder.st_gid)
        os.close(handle)
    if stat.S_IMODE(state.stat().st_mode) & 0o077:
        state.chmod(0o600)


def hash_token(token: str) -> str:
    """Return what is stored of a token.

    A plain SHA-256 is enough: a token is 256 random bits, not a password, so there is nothing to guess and no need of
    salt. Being found by its hash, a token needs no comparison in constant time: who measures the look-up learns of a
    hash that he could not choose.
    """
    return hashlib.sha256(token.encode()).hexdigest()


def parse_lifetime(text: str) -> int:
    """Return the seconds of ``90s``, ``30m``, ``2h`` or ``1d``; 30 days at most."""
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text.strip())
    seconds = int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]] if match else 0
    if not 0 < seconds <= LONGEST_LIFETIME:
        raise BrokerError(f"the lifetime '{text}' is not one", "such as 30m, 2h or 1d; 30d at most")
    return seconds


def create_token(state: Path, platform: str, node: str, lifetime: int, now: float) -> str:
    """Make a token that is good once, for one node, for a lifetime in seconds. It is stored nowhere in clear."""
    if platform not in PLATFORMS:
        raise BrokerError(f"the platform '{platform}' is not known", f"known: {', '.join(PLATFORMS)}")
    if not NODE.fullmatch(node):
        raise BrokerError(f"the node name '{node}' is not a host name", "its first label only: a-z, 0-9, hyphens")
    if not 0 < lifetime <= LONGEST_LIFETIME:
        raise BrokerError(f"a lifetime of {lifetime} seconds is not possible", "1 second to 30 days")
    token = f"bhj_{secrets.token_urlsafe(32)}"
    row = (hash_token(token), platform, node.lower(), int(now), int(now) + lifetime)  # Host names have no case.
    with opened(state) as connection:
        connection.execute("DELETE FROM tokens WHERE expires < ?", (now - KEPT_SECONDS,))
        connection.execute("INSERT INTO tokens (hash, platform, node, made, expires) VALUES (?, ?, ?, ?, ?)", row)
    return token


def list_tokens(state: Path) -> list[Token]:
    """Return what is known of all tokens, the newest first."""
    if not state.exists():  # To look must not make one, with an owner that may be wrong.
        return []
    with opened(state) as connection:
        return [Token(*row) for row in connection.execute("SELECT * FROM tokens ORDER BY made DESC, rowid DESC")]


def revoke_tokens(state: Path, which: str, now: float) -> list[Token]:
    """Make void the good tokens of a node, or the one of that identity; return them."""
    with opened(state) as connection:
        tokens = [Token(*row) for row in connection.execute("SELECT * FROM tokens")]
        good = [token for token in tokens if token.status(now) == "good"]
        chosen = [token for token in good if which.lower() in (token.node, token.identity)]
        for token in chosen:
            connection.execute("UPDATE tokens SET revoked = ? WHERE hash = ?", (int(now), token.hash))
    return [dataclasses.replace(token, revoked=int(now)) for token in chosen]


def use_token(
    state: Path, token: str, platform: str, node: str, address: str, now: float, claim: str = "", *, look: bool = False
) -> None:
    """Use a token up. Of any number of simultaneous requests, in any number of processes, one succeeds.

    With ``look`` nothing is used up: it is only said whether it could be.

    A node that was killed before it had the answer may ask again within AGAIN_SECONDS: it sends the same claim, a
    secret that it made for this token and that nobody else knows. A replay without it is refused.

    Raises:
        RefusedError: the token is not good for this node now.
        BrokerError: the state cannot be written; the token is not used up.
    """
    digest = hash_token(token)
    with opened(state) as connection:
        row = connection.execute("SELECT * FROM tokens WHERE hash = ?", (digest,)).fetchone()
        known, claimed = Token(*row) if row else None, hash_token(claim) if claim else None
        again = known and claimed and known.claim == claimed and now - (known.used or 0) < AGAIN_SECONDS
        judged = dataclasses.replace(known, used=None) if known and again else known
        if reason := _objection(judged, platform, node, now):
            raise RefusedError(HTTPStatus.UNAUTHORIZED, f"token refused: {reason}")
        if not again and not look:
            change = "UPDATE tokens SET used = ?, used_by = ?, claim = ? WHERE hash = ?"
            connection.execute(change, (int(now), address, claimed, digest))


def _objection(known: Token | None, platform: str, node: str, now: float) -> str:
    if known is None:
        return "it is unknown"
    if known.node != node.lower():
        return f"it is not for {node}"
    if known.platform != platform:
        return f"it is not for {platform}"
    status = known.status(now)
    return {"good": "", "expired": "it has expired"}.get(status, f"it has been {status}")


# ---- TLS


def tls_context(config: Config) -> ssl.SSLContext:
    """Load the certificate and its private key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.num_tickets = 0  # A node comes once: nothing to resume.
    try:
        context.load_cert_chain(config.certificate, config.private_key, password="")  # Else OpenSSL would ask for one.
    except OSError as error:
        files = f"the certificate {config.certificate} with the private key {config.private_key}"
        reason = getattr(error, "reason", None) or error.strerror
        raise BrokerError(f"{files} cannot be used: {reason}", "PEM files, without a password") from error
    return context


def examine(config: Config) -> tuple[float, tuple[str, ...]]:
    """Shake hands with ourselves in memory, to see the certificate as a node does.

    Returns:
        When it ends, in seconds since 1970, and the names and addresses that it is for.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # The certificate itself is enough, its CA is elsewhere.
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = tls_context(config).wrap_bio(there, back, server_side=True)
    context.load_verify_locations(config.certificate)
    client = context.wrap_bio(back, there)
    try:
        for side in (client, server, client):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    except ssl.SSLError as error:
        reason = getattr(error, "verify_message", error.reason)
        raise BrokerError(f"nodes will refuse the certificate {config.certificate}: {reason}") from error
    seen: Any = client.getpeercert()
    names = tuple(value for _, value in seen.get("subjectAltName", ()))
    if not names:
        raise BrokerError(f"the certificate {config.certificate} names no host (subjectAltName)")
    return ssl.cert_time_to_seconds(seen["notAfter"]), names


# ---- the server


class Limiter:
    """Counts the refusals of each address, anew each minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._minute = 0
        self._counts: dict[str, int] = {}

    def count(self, address: str, more: int = 0) -> int:
        """Add to the refusals of an address in this minute; return how many they are."""
        if ":" in address:  # A host may have all addresses of its /64.
            address = str(ipaddress.ip_network(f"{address.partition('%')[0]}/64", strict=False))
        minute = int(self._clock() / 60)
        if minute != self._minute:
            self._minute, self._counts = minute, {}
        count = self._counts.get(address, 0) + more
        if more:
            self._counts[address] = count
        return count


class Server(socketserver.ThreadingTCPServer):
    """Takes connections, each in a thread of its own, never more than a fixed number, none for longer than 10 seconds.

    The clock returns seconds since 1970.
    """

    allow_reuse_address = True
    request_queue_size = 128
    daemon_threads = True  # A client must not hold up the end; server_close() gives it time.

    def __init__(self, config: Config, clock: Callable[[], float] = time.time) -> None:
        self.config = config
        self.clock = clock
        self.limiter = Limiter()
        self._places = threading.BoundedSemaphore(CONNECTIONS)
        self._held: list[str] = []
        """The client's address of each connection."""
        self._written = self._last_written()
        self._context = tls_context(config)
        with opened(config.state):  # Made here where it is not there, so that it is ours.
            pass
        host, _, port = config.listen.rpartition(":")
        if host == "[::]" and not socket.has_dualstack_ipv6():
            log(NOTICE, "this host has no IPv6: listening on IPv4 alone")
            host = "0.0.0.0"  # noqa: S104 - what the configuration asks for
        try:
            found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self.address_family, *_, address = found[0]
            super().__init__(address, Handler)  # type: ignore[arg-type]
        except OSError as error:
            raise BrokerError(f"cannot listen on {config.listen}: {error.strerror}") from error
        self.port = int(self.server_address[1])

    def server_bind(self) -> None:
        """Bind; ``[::]`` is for both families."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection. The handshake waits for the client, so it is for the client's thread."""
        raw, address = self.socket.accept()
        return self._context.wrap_socket(raw, server_side=True, do_handshake_on_connect=False), address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread. Where all are busy, wait: the kernel's queue holds those who come meanwhile."""
        who = plain_address(client_address)
        if self._held.count(who) >= CONNECTIONS_OF_ONE_ADDRESS:
            log(WARNING, f"{who} holds {CONNECTIONS_OF_ONE_ADDRESS} connections: one more is closed")
            self.shutdown_request(request)
            return
        self._places.acquire()
        self._held.append(who)
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # No thread was to be had.
            self._leave(who)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection until its time is up, then give its place to the next."""
        watch = threading.Timer(CONNECTION_SECONDS, _cut_off, [request])
        watch.daemon = True
        try:
            watch.start()
            super().process_request_thread(request, client_address)
        finally:
            watch.cancel()
            self._leave(plain_address(client_address))

    def _leave(self, who: str) -> None:
        self._held.remove(who)
        self._places.release()

    def shutdown_request(self, request: Any) -> None:
        """End a connection."""
        with contextlib.suppress(OSError, ValueError):
            request.settimeout(0)  # Says good-bye as TLS has it, but does not wait for the other side's.
            request.unwrap()
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Read a new certificate, between connections."""
        written = self._last_written()
        if written == self._written:
            return
        self._written = written
        try:
            self._context = tls_context(self.config)
            log(NOTICE, "certificate and private key were read again")
        except BrokerError as error:
            log(ERROR, f"the former certificate stays in use: {error}")

    def _last_written(self) -> list[int]:
        with contextlib.suppress(OSError):  # Just being replaced, perhaps.
            return [path.stat().st_mtime_ns for path in (self.config.certificate, self.config.private_key)]
        return []

    def server_close(self) -> None:
        """Stop listening, and let those who are being answered have their answer."""
        super().server_close()
        until = time.monotonic() + STOP_SECONDS
        while self._held and time.monotonic() < until:
            time.sleep(0.02)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Log in one line what went wrong with a connection."""
        who = plain_address(client_address)
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            log(
                NOTICE,
                f"{'no TLS' if isinstance(error, ssl.SSLError) else 'connection lost'} with {who}: {_reason(error)}",
            )
        elif error:
            # The kind and place alone: an error's own words might quote what a client sent.
            place = traceback.extract_tb(error.__traceback__)[-1]
            at = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
            log(ERROR, f"an error of the broker itself, {at}, while {who} was served")


def plain_address(client_address: Any) -> str:
    """Return a client's address as people write it: IPv4 as such where it came in through an IPv6 socket."""
    address = ipaddress.ip_address(client_address[0])
    return str(getattr(address, "ipv4_mapped", None) or address)


def _cut_off(request: socket.socket) -> None:
    """End a connection whose time is up; its thread then reads an end of file."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(request, socket.SHUT_RDWR)  # SSLSocket's own would let the thread go on without TLS.


def _reason(error: OSError) -> str:
    """Return in words why a connection ended."""
    reason = str(getattr(error, "reason", None) or error.strerror or error or type(error).__name__)
    if "ALERT_UNKNOWN_CA" in reason:
        return "it does not trust our certificate: it has another CA, or we have another certificate"
    if "ALERT" in reason and "CERTIFICATE" in reason:
        return "it does not take our certificate: is the address that it calls named in it? Is its clock right?"
    return reason


class Head(io.BufferedReader):
    """A request as it comes in. Its head seems to end after ``HEAD_BYTES``; the base class would take 6 MiB."""

    left = HEAD_BYTES

    def readline(self, _size: int | None = -1, /) -> bytes:
        """Read a line of the head."""
        line = super().readline(self.left)
        self.left -= len(line)
        return line


class Handler(BaseHTTPRequestHandler):
    """One request on one connection."""

    server: Server
    default_request_version = "HTTP/1.0"
    """Not 0.9, whose answers have no status."""

    def setup(self) -> None:
        """Shake hands."""
        self.request.do_handshake()
        super().setup()
        self.rfile = Head(self.rfile.detach())
        self.about = self.who = plain_address(self.client_address)
        """Whom the log is to name; more as more is known."""

    def do_POST(self) -> None:
        """Answer ``POST /v1/secret``, and refuse all else."""
        try:
            self._check_address()
            platform, node, claim = self._wanted()
            self.about = f"{platform} {node} at {self.who}"
            token = self._token()
            self.about = f"{platform} {node} token {hash_token(token)[:8]} at {self.who}"
            answer = self._take(token, platform, node, claim)
        except RefusedError as refusal:
            self._refuse(refusal)
        except BrokerError as error:
            log(ERROR, f"cannot answer {self.about}, no token was used up: {error}")
            sentence = "the broker cannot hand out the key now; its log says why"
            self._send(HTTPStatus.SERVICE_UNAVAILABLE, {"error": sentence})
        else:
            self._hand_over(answer)

    def _check_address(self) -> None:
        if self.server.limiter.count(self.who) >= REFUSALS_A_MINUTE:
            raise RefusedError(HTTPStatus.TOO_MANY_REQUESTS, "too many refusals, wait a minute")
        if self.path != "/v1/secret":
            raise RefusedError(HTTPStatus.NOT_FOUND, "there is nothing at this address")
        if self.command != "POST":
            raise RefusedError(HTTPStatus.METHOD_NOT_ALLOWED, "only POST is possible here")

    def _wanted(self) -> tuple[str, str, str]:
        """Read the body: which platform's key, for which node, and the claim if there is one."""
        try:
            body = json.loads(self._body())
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict) or not {"platform", "node"} <= set(body) <= {"platform", "node", "claim"}:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "the body must be JSON with platform, node and perhaps claim")
        platform, node, claim = body["platform"], body["node"], body.get("claim", "")
        if not isinstance(claim, str) or not CLAIM.fullmatch(claim):
            raise RefusedError(HTTPStatus.BAD_REQUEST, "the claim must be 64 hexadecimal digits")
        if not isinstance(platform, str) or platform not in self.server.config.platforms:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "this platform is not served here")
        if not isinstance(node, str) or not NODE.fullmatch(node):
            raise RefusedError(HTTPStatus.BAD_REQUEST, "the node must be the first label of a host name")
        return platform, node, claim

    def _body(self) -> bytes:
        lengths = self.headers.get_all("Content-Length", [])
        if len(lengths) != 1 or not re.fullmatch(r"[0-9]{1,18}", lengths[0]) or "Transfer-Encoding" in self.headers:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "the request must have one Content-Length and a plain body")
        length = int(lengths[0])
        if length > BODY_BYTES:
            # Some is read and dropped: to close a connection with bytes unread resets it, and the answer is lost.
            self.connection.settimeout(1)
            with contextlib.suppress(OSError):
                self.rfile.read(min(length, 16 * BODY_BYTES))
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the body is over 4 KiB")
        return self.rfile.read(length)

    def _token(self) -> str:
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer":
            raise RefusedError(HTTPStatus.UNAUTHORIZED, "token refused: none was sent")
        if not TOKEN.fullmatch(token):
            raise RefusedError(HTTPStatus.UNAUTHORIZED, "token refused: it is unknown")
        return token

    def _take(self, token: str, platform: str, node: str, claim: str) -> dict[str, str]:
        """Use the token up, after all that can go wrong before."""
        state, clock = self.server.config.state, self.server.clock
        # Nobody without a good token makes us do any work.
        use_token(state, token, platform, node, self.who, clock(), claim, look=True)
        secret = self.server.config.platforms[platform].secret()
        hung_up = select.poll()
        hung_up.register(self.connection, select.POLLRDHUP)
        if hung_up.poll(0):  # One that was kept waiting too long should not lose its token.
            raise ConnectionAbortedError(f"{node} went away; its token was not used up")
        use_token(state, token, platform, node, self.who, clock(), claim)
        return {"platform": platform, "node": node, **secret}

    def _hand_over(self, answer: dict[str, str]) -> None:
        try:
            self._send(HTTPStatus.OK, answer)
            log(INFO, f"key handed out: {self.about}")
        except OSError:
            log(ERROR, f"{self.about} went away before it had the key; the token is used up: make a new one")

    def _refuse(self, refusal: RefusedError) -> None:
        if refusal.status != HTTPStatus.TOO_MANY_REQUESTS:
            self.server.limiter.count(self.who, 1)
        log(WARNING, f"refused: {self.about}: {refusal.status.value} {refusal.sentence}")
        self._send(refusal.status, {"error": refusal.sentence})

    def _send(self, status: HTTPStatus, body: dict[str, str]) -> None:
        data = json.dumps(body).encode() + b"\n"
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), "Cache-Control": "no-store"}
        further = {401: {"WWW-Authenticate": "Bearer"}, 405: {"Allow": "POST"}, 429: {"Retry-After": "60"}}
        self.send_response(status)
        for name, value in (headers | further.get(status, {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """Refuse what the base class cannot take, without its page of HTML and without quoting the client."""
        if code == HTTPStatus.NOT_IMPLEMENTED:  # There is no do_ for the method.
            self.do_POST()
        else:
            self._refuse(RefusedError(HTTPStatus(code), f"the request is not valid HTTP: {HTTPStatus(code).phrase}"))

    def version_string(self) -> str:
        """Return what ``Server`` says: no versions."""
        return "bakehouse-broker"

    def log_message(self, *_arguments: Any) -> None:
        """Say nothing: the base class would log the client's own words, and those may hold a token."""


# ---- commands


def serve(config: Config, _options: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT."""
    with Server(config) as server:

        def stop(*_: object) -> None:
            # shutdown() waits for the loop, which is what a signal interrupts.
            threading.Thread(target=server.shutdown).start()

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        for level, sentence in findings(config):
            log(level, sentence)
        host = str(server.server_address[0])
        log(NOTICE, f"listening on {f'[{host}]' if ':' in host else host}:{server.port}")
        if channel := os.environ.get("NOTIFY_SOCKET"):  # systemd listens: sd_notify(3)
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
                systemd.sendto(b"READY=1", channel.replace("@", "\0", 1))
        server.serve_forever()
    log(NOTICE, "stopped")


def findings(config: Config) -> Iterator[tuple[int, str]]:
    """Yield what is right and wrong with a set-up, each with its level: for the log and for ``check``."""
    try:
        ends, names = examine(config)
        level = WARNING if ends - time.time() < WARN_SECONDS else INFO
        yield level, f"the certificate is for {', '.join(names)} and ends {moment(ends)}"
        for name, platform in config.platforms.items():
            yield INFO, platform.finding(name)
        good = sum(token.status(time.time()) == "good" for token in list_tokens(config.state))
        yield INFO, f"the state {config.state} holds {good} good tokens"
    except BrokerError as error:
        yield ERROR, str(error)
    key_files = [platform.key_file for platform in config.platforms.values() if isinstance(platform, KeyPlatform)]
    for path in (config.private_key, *key_files):
        if path.exists() and path.stat().st_mode & 0o007:
            yield WARNING, f"{path} is open to others: chmod 0400 {path}"


def check(config: Config, _options: argparse.Namespace) -> int:
    """Print what is right and wrong; return the exit status."""
    worst = INFO
    for level, sentence in findings(config):
        print(f"{ {ERROR: 'error', WARNING: 'warning'}.get(level, 'good') }: {sentence}")
        worst = min(worst, level)
    return int(worst == ERROR)


def make(config: Config, options: argparse.Namespace) -> None:
    """Make a token and print it, alone on standard output."""
    if options.platform not in config.platforms:
        raise BrokerError(f"the platform '{options.platform}' is not served here")
    now = time.time()
    seconds = parse_lifetime(options.lifetime)
    print(create_token(config.state, options.platform, options.node, seconds, now))
    print(f"good once, for {options.node}, until {moment(now + seconds)}; it is not shown again", file=sys.stderr)


def show(config: Config, _options: argparse.Namespace) -> None:
    """List the tokens."""
    print(f"{'ID':8}  {'STATUS':7}  {'PLATFORM':10}  {'MADE':20}  {'EXPIRES':20}  {'USED':20}  {'FROM':15}  NODE")
    for token in list_tokens(config.state):
        times = f"{moment(token.made)}  {moment(token.expires)}  {moment(token.used):20}  {token.used_by or '':15}"
        print(f"{token.identity}  {token.status(time.time()):7}  {token.platform:10}  {times}  {token.node}")


def revoke(config: Config, options: argparse.Namespace) -> None:
    """Make tokens void."""
    revoked = revoke_tokens(config.state, options.which, time.time())
    if not revoked:
        raise BrokerError(f"there is no good token of '{options.which}'", "'tokens' lists them")
    for token in revoked:
        print(f"revoked {token.identity} of {token.node}")


_EXAMPLES = """\
examples:
  bakehouse-broker check
  bakehouse-broker token --platform slurm --node node-1 --lifetime 1d >node-1.token
  bakehouse-broker revoke node-1

exit status: 0 all is well, 1 a sentence says what is wrong, 2 the command line is wrong
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bakehouse-broker",
        description="Hands a node its cluster key over HTTPS, once, for a one-time token.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[..., int | None], said: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=said)
        command.add_argument("--config", type=Path, default=Path(CONFIG), help=f"default: {CONFIG}")
        command.set_defaults(run=run)
        return command

    add("serve", serve, "serve nodes until stopped")
    token = add("token", make, "make a token; it is printed once, alone on standard output")
    token.add_argument("--platform", required=True, help="such as slurm")
    token.add_argument("--node", required=True, help="the node's host name, first label")
    token.add_argument("--lifetime", default="1h", help="such as 30m, 2h, 1d; default: 1h")
    add("tokens", show, "list the tokens of the last days")
    add("revoke", revoke, "make good tokens void").add_argument("which", metavar="NODE", help="or a token's id")
    add("check", check, "look for what is wrong with the set-up")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(load_config(options.config), options) or 0
    except BrokerError as error:
        print(f"bakehouse-broker: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
